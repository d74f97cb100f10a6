"""The one exception that a user is meant to read."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user gave: one sentence that names the file, the key or row, and the fix."""
