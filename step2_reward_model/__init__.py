"""Step 2: a reward model learned from ranked answers."""
