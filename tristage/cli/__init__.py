"""The `tristage` command."""
