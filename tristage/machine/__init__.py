"""What a process can find out about its machine and its place on it. Imports the standard library only."""
