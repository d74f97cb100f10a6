"""`--dry-run`: what a launcher would start. Also the summary that a pipeline prints at its end."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from tristage.config import RunSettings
from tristage.errors import UserError
from tristage.launch import cpu_op
from tristage.launch.nodes import read_nodes
from tristage.launch.options import option, requested_ranks
from tristage.runs.finished import has_finished, is_finished

SUMMARY = ("loss", "perplexity", "accuracy", "score", "kl", "grade", "length")


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


def summary(out: Path) -> str:
    """One line per step in `out`: its last held-out metrics, or those of its last training step."""
    lines = []
    for folder in sorted(path.parent for path in out.glob("*/metrics.jsonl")):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        heldout = [row for row in rows if row["split"] == "heldout"]
        shown = {name.partition("/")[2]: value for name, value in (heldout or rows)[-1].items() if "/" in name}
        kept = [f"{name} {value:.4g}" for name, value in shown.items() if name in SUMMARY]
        state = "finished" if has_finished(folder) else "not finished"
        of = ", held out" if heldout else ""
        lines.append(f"{folder.name}: {state} at step {rows[-1]['step']}{of}: {', '.join(kept)}")
    return "\n".join(lines)
