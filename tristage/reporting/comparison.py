"""The page of `tristage compare`: the table of results and a browser of the answers, in one file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tristage.reporting.report import rendered, script_json

KEPT = ("response", "score", "grade", "length", "ended")


def comparison_page(rows: Sequence[dict[str, Any]], lines: Sequence[dict[str, Any]]) -> str:
    """`rows`: a model's summary each (answering.compare.summary); `lines`: a prompt each, with all its answers."""
    items = []
    for line in lines:
        prompt = "\n".join(f"{turn['role']}: {turn['content']}" for turn in line["messages"])
        answers = [(each["model"], {key: each[key] for key in KEPT if key in each}) for each in line["answers"]]
        items.append({"prompt": prompt, "answers": answers})
    return rendered(
        "comparison.html",
        title=" / ".join(row["model"] for row in rows),
        prompts=len(lines),
        written=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        rows=rows,
        judges=[name for name in ("score", "grade") if name in rows[0]],
        data=script_json({"figures": [], "samples": [{"prompts": items}], "reload": None}),
    )
