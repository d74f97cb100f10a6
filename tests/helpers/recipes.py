"""The YAML files of configs/: which there are, what they are called, for how many ranks they are."""

from __future__ import annotations

import re
from pathlib import Path

REPO = Path(__file__).parents[2]
STEP_YAMLS = sorted(path for path in (REPO / "configs").glob("**/step[0-9]_*.yaml") if path.parent.name != "bases")


def name_of(path: Path) -> str:
    return path.relative_to(REPO / "configs").as_posix()


def ranks_of(path: Path) -> int:
    """Ranks that a config's header comment says it is for ("ranks: 8"); else 2."""
    header = "\n".join(line for line in path.read_text().split("\n") if line.startswith("#"))
    ranks = re.search(r"\branks: (\d+)", header)
    return int(ranks[1]) if ranks else 2
