"""Scripts that measure; tests only see that they start."""
