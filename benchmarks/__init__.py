"""Scripts that measure; nothing here is asserted by a test."""
