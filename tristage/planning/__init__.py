"""What a run needs in memory: formulas, the plan of a step, its report."""
