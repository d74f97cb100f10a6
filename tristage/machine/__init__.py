"""What a process can learn of its machine and its place on it. Imports the standard library only."""
