"""What a launcher would start, and what a pipeline reached; called by launch/.

    python -m tristage.launch.dry_run MODULE CONFIG [key=value ...] -- [deepspeed launcher options]
    python -m tristage.launch.dry_run summary OUT
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from tristage.config import BatchPlan, RunSettings, TrainSettings, load_config
from tristage.config.steps import settings_class
from tristage.errors import UserError
from tristage.launch.nodes import read_nodes
from tristage.launch.options import option, ranks_asked, split_words
from tristage.runs.finished import has_finished, is_finished

SUMMARY = ("loss", "perplexity", "accuracy", "score", "kl", "grade", "length")


def main(argv: list[str]) -> int:
    """Exit code 2 and one sentence for what a user must mend."""
    if argv[0] == "summary":
        print(summary(Path(argv[1])))
        return 0
    module, config, *rest = argv
    settings, options = split_words(rest)
    try:
        show([module, "--config", config, *settings], options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def show(words: list[str], options: list[str]) -> None:
    """What `prepare` would have started: nodes, ranks, batches, where the run stands. Nothing is written or asked."""
    settings = load_config(settings_class(words[2], words[0].removesuffix(".train")), words[1:])
    nodes = read_nodes(options)
    ranks = ranks_asked(nodes, options)
    if ranks is None:
        ranks = local_ranks(options)
    print("would run: " + shlex.join(["deepspeed", "--no_local_rank", *options, "--module", *words]))
    for node, slots in nodes.items():
        print(f"node {node}: {len(slots)} ranks")
    print(batch_table(settings, ranks))
    output = Path(settings.output)
    checkpoints = sorted(path.name for path in output.glob("checkpoints/step_*"))
    state = _finished(settings) or "is new"
    if checkpoints and state == "is new":
        state = f"goes on from {checkpoints[-1]}" if settings.resume == "auto" else "starts over (resume=never)"
    print(f"output: {output} {state}; log: {output}/logs/launch.log")


def _finished(settings: RunSettings) -> str | None:
    try:
        return "is finished" if is_finished(settings) else None
    except UserError as error:
        return f"cannot be continued: {error}"


def batch_table(settings: RunSettings, ranks: int) -> str:
    """Micro-batch x accumulation x ranks = global batch, of each optimizer that steps. Raises UserError."""
    if isinstance(settings, TrainSettings):
        keys = f"{settings.file}: global_batch, micro_batch"
        plan = BatchPlan.make(settings.global_batch, settings.micro_batch, ranks, keys)
    else:
        plan = cast(Any, settings).plan(ranks)
    heads = ("micro-batch", "accumulation", "ranks", "rows a step")
    row = (plan.micro_batch, plan.accumulation, plan.world_size, plan.global_batch)
    cells = [f"{value:>{len(head)}}" for head, value in zip(heads, row, strict=True)]
    return "\n".join(f"{a} x {b} x {c} = {d}" for a, b, c, d in (heads, cells))


def local_ranks(options: Sequence[str]) -> int:
    """Ranks on this machine alone, where no count is given."""
    if include := option(options, "--include"):
        return len(include.partition(":")[2].split(","))
    probe = "import torch; print(torch.cuda.device_count())"
    return int(subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout or 0)


def summary(out: Path) -> str:
    """What each step in `out` reached: its last held-out measures, or its last step."""
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
