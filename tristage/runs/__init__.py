"""Facts about a run, without torch: what it read, which settings may change, whether it has finished."""
