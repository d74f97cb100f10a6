"""`--dry-run`: what a launcher would start."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from tristage.config import RunSettings
from tristage.errors import UserError
from tristage.launch import cpu_op
from tristage.launch.nodes import read_nodes
from tristage.launch.options import option, requested_ranks
from tristage.runs.finished import is_finished


def show(settings: RunSettings, words: Sequence[str], options: Sequence[str]) -> None:
    """Print what a launch would start: command, nodes, batches, checkpoint. Writes nothing.

    Args:
        words: MODULE --config CONFIG [key=value ...], which gave `settings`.

    Raises:
        UserError: batches that don't divide over the ranks.
    """
    nodes = read_nodes(options)
    ranks = requested_ranks(nodes, options) or local_ranks(options)
    print("would run: " + shlex.join(["deepspeed", "--no_local_rank", *options, "--module", *words]))
    for node, slots in nodes.items():
        print(f"node {node}: {len(slots)} ranks")
    print(settings.plan(ranks).table())
    output = Path(settings.output)
    checkpoints = sorted(path.name for path in output.glob("checkpoints/step_*"))
    state = _finished(settings) or "new run"
    if checkpoints and state == "new run":
        state = f"resumes from {checkpoints[-1]}" if settings.resume == "auto" else "starts over (resume=never)"
    print(f"output: {output} ({state}); log: {output}/logs/launch.log")


def _finished(settings: RunSettings) -> str | None:
    try:
        return "finished" if is_finished(settings) else None
    except UserError as error:
        return f"cannot be continued: {error}"


def local_ranks(options: Sequence[str]) -> int:
    """Number of ranks on this machine only, if no count is given."""
    if include := option(options, "--include"):
        return len(include.partition(":")[2].split(","))
    return cpu_op.num_gpus()
