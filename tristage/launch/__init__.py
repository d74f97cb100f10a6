"""Everything before the ranks: options, nodes, checks, the `deepspeed` command. Never imports torch."""
