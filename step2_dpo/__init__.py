"""Step 2 without a reward model: the policy learns from ranked answers itself."""
