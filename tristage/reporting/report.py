"""One self-contained HTML file of a run, of several runs of one step, or of the runs of a pipeline.

    tristage report RUN... [--out FILE] [--watch [SECONDS]]
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from tristage.errors import UserError
from tristage.reporting.charts import Figure, constant, curves, frontier, histograms, phases
from tristage.reporting.verdict import number, signed, verdict
from tristage.runs.record import STEPS, Run, is_run, names_apart, runs_in
from tristage.storage.durable import replace_text

HERE = Path(__file__).parent
HEALTH_LINES = 200  # of a run that are shown
SAMPLES = 500  # of a run that are shown, of each kind
# Held-out metrics of a table of several runs.
MEASURES = {
    "sft/loss": "loss per answer token",
    "reward_model/accuracy": "accuracy",
    "dpo/accuracy": "accuracy",
    "objective/score": "score",
    "objective/grade": "grade",
    "objective/kl": "KL, nats per response",
    "rollout/length": "length, tokens",
}
TEXT = 4000  # characters of a prompt or response that are shown


def write_report(folders: Sequence[Path], out: Path | None = None, reload: int | None = None) -> tuple[Path, list[str]]:
    """Write the page: (its path, the verdict as lines of text).

    One folder that is a run or holds runs gets report.html inside; several, which must be runs of one step, are laid
    over each other in `out`, by default ./report.html. With `reload` the page reads itself again after as many seconds.

    Raises:
        UserError: a folder is not a run and holds none, or the runs are of different steps.
    """
    sections = sections_of(folders)
    inside = folders[0] if len(folders) == 1 else Path()
    out = inside / "report.html" if out is None else out
    title = folders[0].resolve().name if len(folders) == 1 else f"{len(folders)} runs: {_title(sections[0][0])}"
    replace_text(out, page(title, sections, reload))
    return out, verdict_lines(sections)


def announce(folder: Path) -> None:
    """Write a folder's page and print its verdict. A run that has done its work does not fail by this."""
    try:
        path, lines = write_report([folder])
    except Exception as error:  # whatever a file of the run holds
        print(f"warning: {folder / 'report.html'} is not written ({error}); try `tristage report {folder}`", flush=True)
        return
    print("\n".join([*lines, f"report: {path}"]), flush=True)


def watch(folders: Sequence[Path], out: Path | None, seconds: int) -> None:
    """Write the page again every so many seconds until all runs have finished, or Ctrl-C. Raises UserError at first."""
    page_reads = seconds
    try:
        while True:
            going = any(not run.finished for runs in sections_of(folders) for run in runs)
            path, lines = write_report(folders, out, page_reads if going else None)
            print(f"{time.strftime('%H:%M:%S')} {path}", *(lines if not going else lines[:1]), sep="\n", flush=True)
            if not going:
                return
            time.sleep(seconds)
    except KeyboardInterrupt:
        return


def sections_of(folders: Sequence[Path]) -> list[list[Run]]:
    """The runs of each section of a page. Raises UserError, see write_report."""
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder; give the output folder of a run")
    if len(folders) == 1:
        runs = runs_in(folders[0])
        if not runs:
            raise UserError(
                f"{folders[0]}: is not a run and holds none (no config.yaml or metrics.jsonl in it or in its folders); "
                "give the output folder of a run, or the folder that holds the runs of a pipeline"
            )
        # Nothing says which step a run without a word is of; it comes last.
        return sorted(([run] for run in runs), key=lambda section: section[0].step or "unknown")
    several = [Run(folder, name) for folder, name in zip(folders, names_apart(folders), strict=True)]
    for run in several:
        if not is_run(run.folder):
            raise UserError(f"{run.folder}: is not a run (it has no config.yaml or metrics.jsonl)")
        if run.step != several[0].step:
            raise UserError(
                f"{several[0].folder} and {run.folder} are runs of different steps ({several[0].step} and {run.step}); "
                "compare runs of one step, or give the folder that holds both for a page with a section for each"
            )
    return [several]


def verdict_lines(sections: Sequence[Sequence[Run]]) -> list[str]:
    """The headline and the first reason of each run, for a terminal."""
    lines = []
    for runs in sections:
        for run in runs:
            head, *reasons = verdict(run)
            lines.append(f"{_title(run)}: {head.text}")
            lines += [f"  {reason.text}" for reason in reasons[:1] if reason.kind not in ("note", "worry")]
            lines += [f"  worry: {worry.text}" for worry in reasons if worry.kind == "worry"]
    return lines


def _title(run: Run) -> str:
    return STEPS.get(run.step or "", "A run that has written no metrics")


def page(title: str, sections: Sequence[Sequence[Run]], reload: int | None = None) -> str:
    """The whole HTML."""
    from plotly.offline import get_plotlyjs  # a launch does not pay for it

    figures: list[Figure] = []
    samples: list[dict[str, Any]] = []
    shown = [_section(number, runs, figures, samples) for number, runs in enumerate(sections)]
    return rendered(
        "page.html",
        title=title,
        written=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        reload=reload,
        sections=shown,
        plotly=Markup(get_plotlyjs()),
        data=script_json({"figures": figures, "samples": samples, "reload": reload}),
    )


def rendered(template: str, folder: Path = HERE, **values: Any) -> str:
    """A page from a template of `folder`, with base.html of this one around it; all `values` but Markup are escaped."""
    loader = FileSystemLoader([folder, HERE])
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)

    def asset(name: str) -> Markup:
        return Markup(loader.get_source(environment, name)[0])

    return environment.get_template(template).render(asset=asset, **values)


def script_json(value: Any) -> Markup:
    """JSON that cannot end the script element that it stands in, whatever texts it holds."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII
    return Markup(text.replace("<", "\\u003c"))


def _section(
    number: int, runs: Sequence[Run], figures: list[Figure], samples: list[dict[str, Any]]
) -> dict[str, Any]:
    """What the template shows of runs of one step; their figures and samples are added to those of the page."""

    def numbered(figure: Figure) -> Figure:
        figures.append({key: figure[key] for key in ("x", "traces")})
        return {key: figure[key] for key in ("title", "meaning", "says")} | {"number": len(figures) - 1}

    one = runs[0] if len(runs) == 1 else None
    first = [*frontier(runs), *(histograms(one) if one else ())]
    of_run = {"held-out prompts": _before_and_after(one), "rollouts": _rollouts(one)} if one else {}
    of_run = {name: items for name, items in of_run.items() if items}
    if of_run:
        samples.append(of_run)
    return {
        "id": f"run-{number}",
        "title": _title(runs[0]),
        "runs": [_run(run) for run in runs],
        "results": [] if one else results(runs),
        "differences": differences(runs),
        "first_figures": [numbered(figure) for figure in first],
        "phases": phases(one) if one else [],
        "samples": str(len(samples) - 1) if of_run else None,
        "curves": [
            (
                group,
                [numbered(figure) for figure in some if constant(figure) is None],
                ", ".join(text for figure in some if (text := constant(figure))),
            )
            for group, some in curves(runs).items()
        ],
    }


def _run(run: Run) -> dict[str, Any]:
    where = "finished" if run.finished else f"not finished, last step {run.last_step}"
    health = [_health_line(line) for line in run.health]
    return {
        "name": run.name,
        "folder": str(run.folder),
        "where": f"{where}, {run.last_step} steps" if run.finished else where,
        "verdict": verdict(run),
        "health": health[:HEALTH_LINES],
        "more_health": max(0, len(health) - HEALTH_LINES),
        "profile": [row for row in run.profile if {"name", "calls", "self_seconds", "device_seconds"} <= row.keys()],
        "settings": yaml.safe_dump(run.settings, sort_keys=False, allow_unicode=True),
        "environment": json.dumps(run.environment, indent=2, ensure_ascii=False),
    }


def _health_line(line: dict[str, Any]) -> dict[str, Any]:
    if "alarm" in line:
        said = {key: line.get(key, "") for key in ("seen", "why", "fix")}
        return {"step": line["step"], "what": line["alarm"], **said}
    seen = f"a {line.get('bad')} was not finite on ranks {line.get('ranks')}"
    fix = "look at the rows in bad_batches/; lower the learning rate, or use bf16 or float32"
    return {"step": line["step"], "what": "skipped step", "seen": seen, "why": "no weight changed", "fix": fix}


def _before_and_after(run: Run) -> list[dict[str, Any]]:
    """Each held-out prompt with its first and its last response."""
    by_row: dict[Any, list[dict[str, Any]]] = {}
    for sample in run.samples:
        if sample.get("split", "heldout") == "heldout":
            by_row.setdefault(sample.get("row", sample.get("prompt")), []).append(sample)
    found = []
    for answers in list(by_row.values())[:SAMPLES]:
        ends = [answers[0]] if len(answers) == 1 else [answers[0], answers[-1]]
        pairs = [(f"step {answer['step']}", _answer(answer)) for answer in ends]
        found.append({"prompt": _cut(answers[0].get("prompt")), "answers": pairs})
    return found


def _rollouts(run: Run) -> list[dict[str, Any]]:
    """Responses that training itself sampled, the newest first."""
    own = [sample for sample in run.samples if sample.get("split") == "train"]
    return [
        {"prompt": _cut(sample.get("prompt")), "answers": [(f"iteration {sample['step']}", _answer(sample))]}
        for sample in reversed(own[-SAMPLES:])
    ]


def _answer(sample: dict[str, Any]) -> dict[str, Any]:
    kept = {key: sample[key] for key in ("score", "grade", "kl", "length", "ended", "scores") if key in sample}
    return {"response": _cut(sample.get("response"))} | kept


def _cut(text: Any) -> str:
    text = str(text)
    return text if len(text) <= TEXT else text[:TEXT] + " [...]"


def results(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(measure, "before to after" of each run, then its change over runs) of the held-out measures that runs have."""
    found = []
    for metric, title in MEASURES.items():
        ends = [
            (series.values[0], series.last) if (series := run.heldout(metric)) and len(series.values) > 1 else None
            for run in runs
        ]
        known = [after - before for before, after in filter(None, ends)]
        if known:
            cells = ["-" if pair is None else f"{number(pair[0])} to {number(pair[1])}" for pair in ends]
            spread = f", deviation {number(float(np.std(known, ddof=1)))}" if len(known) > 1 else ""
            found.append((title, [*cells, f"{signed(float(np.mean(known)))}{spread}"]))
    return found


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run) of those that differ; "-" where a run does not have it."""
    flat = [dict(_flat(run.settings)) for run in runs]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    table = [(key, [str(values.get(key, "-")) for values in flat]) for key in keys]
    return [(key, values) for key, values in table if len(set(values)) > 1]


def _flat(values: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict | list) and value:
            yield from _flat(value if isinstance(value, dict) else dict(enumerate(value)), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
