"""Models that answer people: chat, and comparison on the same prompts. One process, without engines."""
