"""Step 3: PPO with four engines: actor, critic, reference, reward model."""
