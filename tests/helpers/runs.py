"""Folders as a run leaves them, made without running anything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

CONFIGS: dict[str, dict[str, Any]] = {
    "step1_sft": {"model": "base", "packing": False, "optimizer": {"learning_rate": 1e-5}, "seed": 0},
    "step2_reward_model": {"model": "sft", "normalize": True, "optimizer": {"learning_rate": 1e-5}, "seed": 0},
    "step2_dpo": {"model": "sft", "beta": 0.1, "optimizer": {"learning_rate": 1e-5}, "seed": 0},
    "step3_ppo": {"actor": {"model": "sft"}, "ppo": {"kl_coef": 0.05}, "grader": "rules:grade", "seed": 0},
}


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_run(
    folder: Path,
    step: str,
    train: Sequence[Mapping[str, Any]] = (),
    heldout: Sequence[Mapping[str, Any]] = (),
    finished: bool = True,
    **settings: Any,
) -> Path:
    """A run of `step` with these metrics, each with its "step"."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIGS[step] | settings))
    (folder / "environment.json").write_text(json.dumps({"command": ["train.py"], "ranks": 2}))
    rows = [{"split": "train", **row} for row in train] + [{"split": "heldout", **row} for row in heldout]
    write_lines(folder / "metrics.jsonl", sorted(rows, key=lambda row: row["step"]))
    if finished:
        ended = {"step": step, "settings": {}, "models": {}, "sources": {}, "folders": {}}
        (folder / "finished.json").write_text(json.dumps(ended))
    return folder


def write_ppo(
    folder: Path, scores: Sequence[Sequence[float]], grades: Sequence[Sequence[float]] = (), **more: Any
) -> Path:
    """A run of step 3 from the scores, and any grades, of each held-out prompt at each evaluation."""
    heldout, rows = [], []
    for place, of_step in enumerate(scores):
        step = 5 * place
        columns = {"score": list(of_step)} | ({"grade": list(grades[place])} if grades else {})
        columns |= {"length": [10 + place] * len(of_step), "kl": [0.5 * place] * len(of_step)}
        rows.append({"step": step, **columns})
        means = {f"objective/{name}": sum(values) / len(values) for name, values in columns.items() if name != "length"}
        heldout.append({"step": step, **means, "rollout/length": 10.0 + place})
    train = [{"step": step, "objective/score": 0.1 * step, "time/rollout": 1.0, "time/update": 3.0} for step in (1, 2)]
    write_run(folder, "step3_ppo", train, heldout, **more)
    write_lines(folder / "heldout.jsonl", rows)
    return folder


def write_samples(folder: Path, texts: Sequence[tuple[str, str, str]]) -> None:
    """samples.jsonl of (prompt, response before, response after) of held-out prompts; the first also as a rollout's."""
    samples = []
    for row, (prompt, before, after) in enumerate(texts):
        for step, response in ((0, before), (5, after)):
            numbers = {"score": float(row + step), "kl": 0.1 * step, "length": 4 + row, "ended": True}
            texts_of = {"prompt": prompt, "response": response}
            samples.append({"step": step, "split": "heldout", "row": row} | texts_of | numbers)
    samples.append(samples[0] | {"step": 2, "split": "train"})
    write_lines(folder / "samples.jsonl", samples)
