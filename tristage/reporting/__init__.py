"""What people read of runs and models: reports. Nothing here imports torch when it is imported."""
