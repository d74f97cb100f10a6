"""What a run's folder says without torch: what it read, what may change, whether it has finished."""
