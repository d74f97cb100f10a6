"""Answers of several models to the same prompts with the same random numbers: scores, win rates, a page.

    tristage compare A B [C ...] --prompts FILE [--reward-model R] [--grader module:function]
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from tristage.answering.models import Answer, Judge, Speaker, name_of, unique_names
from tristage.answering.scorers import TextScorer, score_texts
from tristage.config.settings import SourceSettings
from tristage.data.rows import PromptRow, Turn, Unusable, read_row
from tristage.data.sources import open_source
from tristage.errors import UserError
from tristage.intervals import bootstrap_interval, win_rate
from tristage.reporting.comparison import comparison_page
from tristage.rollout import SamplingConfig
from tristage.storage.durable import replace_text


@dataclass
class Answers:
    """One model's answers to all prompts, and what each judge says of them."""

    name: str
    path: str
    answers: list[Answer]
    scores: dict[str, list[float]]  # judge -> a number per prompt


def read_prompts(file: str, limit: int | None) -> list[tuple[Turn, ...]]:
    """The dialogues of any source that step 3 could take its prompts from.

    Raises:
        UserError: it cannot be read, a row is malformed, or it has no prompt.
    """
    source = SourceSettings.model_validate({"path": file})
    prompts: list[tuple[Turn, ...]] = []
    for place in open_source(source).rows():
        if limit is not None and len(prompts) == limit:
            break
        try:
            row = read_row(place, source, "prompt")
        except Unusable:
            continue
        assert isinstance(row, PromptRow)
        prompts.append(row.prompt)
    if not prompts:
        raise UserError(f"{file}: has no prompt; give rows with a column `prompt` or `messages`")
    return prompts


def compare(
    paths: Sequence[str],
    prompts: Sequence[tuple[Turn, ...]],
    sampling: SamplingConfig,
    seed: int,
    judge: Judge | None,
    grader: TextScorer | None,
    **loading: Any,
) -> list[Answers]:
    """Each model's answers, one model in memory at a time. Raises UserError like Speaker."""
    names = unique_names([name_of(path) for path in paths])
    found = []
    for name, path in zip(names, paths, strict=True):
        speaker = Speaker(path, **loading)
        answers = speaker.answers(prompts, sampling, seed)
        del speaker  # before the next model is loaded
        scores = {} if judge is None else {"score": judge.scores(prompts, answers)}
        if grader is not None:
            texts = [prompt[-1]["content"] for prompt in prompts]
            grades = score_texts(grader, texts, [answer.text for answer in answers], "--grader")
            scores["grade"] = grades.scores.tolist()
        found.append(Answers(name, path, answers, scores))
    return found


def summary(found: Sequence[Answers]) -> list[dict[str, Any]]:
    """Per model: mean length, share that ended, and by each judge the mean and the win rate against the first model,
    each with its 95 % interval over prompts.
    """
    first, rows = found[0], []
    for each in found:
        row: dict[str, Any] = {
            "model": each.name,
            "path": each.path,
            "length": float(np.mean([answer.tokens for answer in each.answers])),
            "ended": float(np.mean([answer.ended for answer in each.answers])),
        }
        for judge, numbers in each.scores.items():
            row[judge] = {"mean": float(np.mean(numbers)), "interval": bootstrap_interval(numbers)}
            if each is not first:
                rate, low, high = win_rate(numbers, first.scores[judge])
                row[judge] |= {"win_rate": rate, "win_interval": (low, high)}
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The summary for a terminal."""
    judges = [name for name in ("score", "grade") if name in rows[0]]
    shown = Table(title=f"Win rates are against {rows[0]['model']}, with 95 % intervals over prompts")
    for column in ("model", *judges, *(f"wins by {judge}" for judge in judges), "tokens", "ended"):
        shown.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        means = [f"{row[judge]['mean']:.3f} ({_range(row[judge]['interval'])})" for judge in judges]
        wins = [_wins(row[judge]) for judge in judges]
        shown.add_row(row["model"], *means, *wins, f"{row['length']:.1f}", _percent(row["ended"]))
    return shown


def _wins(judged: dict[str, Any]) -> str:
    if "win_rate" not in judged:
        return "-"
    low, high = judged["win_interval"]
    return f"{_percent(judged['win_rate'])} ({_percent(low)} to {_percent(high)})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _range(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}"


def write(
    out: Path, prompts: Sequence[tuple[Turn, ...]], found: Sequence[Answers], rows: Sequence[dict[str, Any]]
) -> Path:
    """OUT/answers.jsonl (a row per prompt), OUT/compare.json (the summary) and OUT/compare.html: the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, prompt in enumerate(prompts):
        answers = [
            {"model": each.name, "response": each.answers[i].text, "length": each.answers[i].tokens}
            | {"ended": each.answers[i].ended}
            | {judge: numbers[i] for judge, numbers in each.scores.items()}
            for each in found
        ]
        lines.append({"row": i, "messages": list(prompt), "answers": answers})
    replace_text(out / "answers.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    replace_text(out / "compare.json", json.dumps(list(rows), indent=1))
    replace_text(out / "compare.html", comparison_page(rows, lines))
    return out / "compare.html"
