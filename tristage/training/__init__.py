"""What the loop of every step uses: the run's folder, setup, health, metrics, preflight checks."""
