"""Verdicts say what the numbers hold and no more; a page is made of whatever a run has left."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.runs import write_lines, write_ppo, write_run, write_samples
from tristage.cli.main import main as tristage
from tristage.reporting import report
from tristage.reporting.charts import constant, curves, frontier, histograms, phases, thinned
from tristage.reporting.report import differences, page, results, write_report
from tristage.reporting.verdict import change, verdict
from tristage.runs.record import Run, Series, names_apart, runs_in

RISEN, FALLEN, SAME = (list(np.linspace(0, 1, 40) + shift) for shift in (1.0, -1.0, 0.0))
NOISE = list(np.linspace(0, 1, 40) + np.tile((0.3, -0.3), 20))


def texts(run: Path) -> list[str]:
    return [sentence.text for sentence in verdict(Run(run))]


# -- verdicts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scores, grades, kind, head",
    [
        (RISEN, RISEN, "better", "Better: both the score and the independent grade rose."),
        (RISEN, FALLEN, "worse", "Worse, though the score rose: the independent grade fell."),
        (RISEN, NOISE, "unclear", "The score rose and the independent grade did not clearly change."),
        (NOISE, NOISE, "unclear", "No clear change of the score or the independent grade."),
        (FALLEN, FALLEN, "worse", "Worse: both the score and the independent grade fell."),
        (NOISE, RISEN, "better", "Better by the independent grade; the score did not clearly change."),
        (RISEN, None, "better", "Better by the reward that it was trained on; no independent judge was asked"),
        (FALLEN, None, "worse", "Worse: the score fell."),
        (NOISE, None, "unclear", "No clear change of the score."),
    ],
)
def test_the_headline_of_ppo(tmp_path: Path, scores: Any, grades: Any, kind: str, head: str) -> None:
    run = write_ppo(tmp_path / "run", [SAME, scores], [SAME, grades] if grades else [])
    first = verdict(Run(run))[0]
    assert first.kind == kind and first.text.startswith(head)


def test_the_change_of_ppo_has_numbers_interval_and_kl(tmp_path: Path) -> None:
    run = write_ppo(tmp_path / "run", [SAME, RISEN], [SAME, NOISE])
    found = texts(run)
    assert found[1] == (
        "Held-out score, by the reward that was trained on, rose from 0.5 to 1.5, a difference of +1 "
        "(95 % interval +1 to +1, 40 prompts)."
    )
    assert found[2].startswith("Held-out grade, by rules:grade, which training never saw, went from 0.5 to 0.5")
    assert found[2].endswith(": no clear change.")
    assert "KL to the reference is 0.5 nats per response." in found
    assert "Responses went from 10 to 11 tokens." in found


def test_the_interval_is_of_paired_differences(tmp_path: Path) -> None:
    """Prompts differ far more than training changed them: unpaired intervals would hide it."""
    before = np.linspace(-50, 50, 40)
    found = change(Run(write_ppo(tmp_path / "run", [before, before + NOISE])), "score", "objective/score")
    assert found is not None and found.kind == "better" and found.high - found.low < 0.4


def test_without_the_numbers_of_each_prompt_nothing_is_claimed(tmp_path: Path) -> None:
    run = write_ppo(tmp_path / "run", [SAME, RISEN])
    (run / "heldout.jsonl").unlink()
    sentences = verdict(Run(run))
    assert sentences[0].kind == "unclear" and "not known: the run kept means alone" in sentences[0].text
    assert "went from 0.5 to 1.5 (no interval" in sentences[1].text


def test_an_earlier_evaluation_that_was_clearly_better_is_named(tmp_path: Path) -> None:
    run = write_ppo(tmp_path / "run", [SAME, RISEN, NOISE])
    assert texts(run)[-1].startswith("The score was clearly higher at iteration 5 (1.5) than at the end; its che")
    (run / "checkpoints/step_000005").mkdir(parents=True)
    assert texts(run)[-1].endswith("its checkpoint is kept.")
    slightly = write_ppo(tmp_path / "other", [SAME, RISEN, list(np.array(RISEN) - 0.1 * np.tile((1, -0.9), 20))])
    assert not any("clearly higher" in text for text in texts(slightly))


def test_one_evaluation_is_nothing_to_judge(tmp_path: Path) -> None:
    run = write_ppo(tmp_path / "run", [SAME], finished=False)
    assert texts(run) == [
        "Nothing to judge yet: the held-out score was not measured both before and after training.",
        "The run has not finished; its last step is 2.",
    ]


def test_sft_is_judged_by_held_out_loss(tmp_path: Path) -> None:
    def run(name: str, *losses: float) -> list[str]:
        heldout = [{"step": 10 * place, "sft/loss": loss} for place, loss in enumerate(losses)]
        return texts(write_run(tmp_path / name, "step1_sft", [{"step": 1, "sft/loss": 2.5}], heldout))

    assert run("better", 3.0, 2.0) == [
        "Better: it predicts the held-out answers better than before.",
        "Held-out loss per answer token went from 3 to 2 nats (perplexity 20.1 to 7.39).",
        "Training loss at the end is 2.5.",
    ]
    assert run("worse", 2.0, 3.0)[0].startswith("Worse")
    assert "lowest at step 10 (2) and is 2.2 now: the run overfits" in run("over", 3.0, 2.0, 2.2)[2]
    assert not any("overfits" in text for text in run("level", 3.0, 2.0, 2.01))


@pytest.mark.parametrize("step, group", [("step2_reward_model", "reward_model"), ("step2_dpo", "dpo")])
def test_pairs_are_judged_against_a_rule_of_length(tmp_path: Path, step: str, group: str) -> None:
    def head(accuracy: float, baseline: float, pairs: int = 400) -> str:
        numbers = {"accuracy": accuracy, "length_baseline": baseline, "pairs": pairs, "loss": 0.5}
        heldout = [{"step": at} | {f"{group}/{name}": value for name, value in numbers.items()} for at in (0, 9)]
        return texts(write_run(tmp_path / "run", step, [], heldout))[0]

    assert head(0.7, 0.55).startswith("Better than a rule of length")
    assert head(0.7, 0.31).startswith("Not clearly better")  # the shorter answer wins in 69 %
    assert head(0.7, 0.66).startswith("Not clearly better")
    assert head(0.7, 0.66, pairs=40_000).startswith("Better")
    assert head(0.5, 0.7).startswith("Worse")
    assert "70.0 % (95 % interval 65.3 % to 74.3 %, 400 pairs)" in (head(0.7, 0.55) and texts(tmp_path / "run")[1])


def test_worries_are_alarms_and_skipped_steps(tmp_path: Path) -> None:
    run = write_ppo(tmp_path / "run", [SAME, RISEN])
    alarm = {"alarm": "kl_runaway", "seen": "KL is 80 nats", "why": "it forgets", "fix": "raise ppo.kl_coef"}
    bad = {"step": 2, "bad": "loss", "ranks": [1], "in_a_row": 1}
    write_lines(run / "health.jsonl", [{"step": 1, **alarm}, bad, {"step": 4, **alarm}])
    worries = [sentence.text for sentence in verdict(Run(run)) if sentence.kind == "worry"]
    assert worries == [
        "kl_runaway, first at step 1, 2 times: KL is 80 nats; to change: raise ppo.kl_coef.",
        "Steps skipped because a number was not finite: 1, the first is step 2.",
    ]


# -- figures ----------------------------------------------------------------------------------------------------


def test_a_long_curve_keeps_its_spikes() -> None:
    values = [0.0] * 100_000
    values[77_123], values[5] = 9.0, -9.0
    found = thinned(Series(list(range(100_000)), values))
    assert len(found.values) <= 2000 and max(found.values) == 9.0 and min(found.values) == -9.0
    assert found.steps == sorted(found.steps) and found.steps[found.values.index(9.0)] == 77_123


def test_training_and_held_out_share_a_figure_and_constants_are_told(tmp_path: Path) -> None:
    train = [{"step": step, "sft/loss": 3.0 - step, "optimizer/skipped": 0.0} for step in (1, 2)]
    heldout = [{"step": step, "sft/loss": 3.0 - step} for step in (0, 2)]
    found = curves([Run(write_run(tmp_path / "run", "step1_sft", train, heldout))])
    assert list(found) == ["sft", "optimizer"]
    assert [(trace["name"], trace["y"]) for trace in found["sft"][0]["traces"]] == [
        ("training", [2.0, 1.0]),
        ("held out", [3.0, 1.0]),
    ]
    assert found["sft"][0]["says"] == "sft/loss: training from 2 to 1; held out from 3 to 1"
    assert constant(found["sft"][0]) is None and constant(found["optimizer"][0]) == "optimizer/skipped 0"


def test_the_frontier_pairs_kl_and_score_of_the_same_step(tmp_path: Path) -> None:
    run = Run(write_ppo(tmp_path / "run", [SAME, RISEN], [SAME, NOISE]))
    (found,) = frontier([run])
    score, grade = found["traces"]
    assert (score["x"], score["y"], score["text"]) == ([0.0, 0.5], [0.5, 1.5], ["step 0", "step 5"])
    assert grade["y"] == [0.5, 0.5]
    both = frontier([run, run])  # apart, since colours are of runs
    assert [(figure["title"], len(figure["traces"])) for figure in both] == [
        ("Score against KL", 2),
        ("Grade against KL", 2),
    ]


def test_histograms_count_every_prompt(tmp_path: Path) -> None:
    found = histograms(Run(write_ppo(tmp_path / "run", [SAME, NOISE, RISEN])))
    assert [figure["title"] for figure in found] == ["Score", "Length, tokens"]
    assert [sum(trace["y"]) for trace in found[0]["traces"]] == [40, 40]
    assert found[0]["meaning"] == "mean 0.5 before, 1.5 after"


def test_phases_are_shares_of_the_whole(tmp_path: Path) -> None:
    assert phases(Run(write_ppo(tmp_path / "run", [SAME]))) == [("update", 0.75), ("rollout", 0.25)]


# -- pages ------------------------------------------------------------------------------------------------------


def embedded(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_texts_of_a_run_cannot_leave_their_place(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    run = write_ppo(tmp_path / "run", [SAME, RISEN], grader=evil)
    write_samples(run, [(evil, evil, "fine")])
    write_lines(run / "health.jsonl", [{"step": 1, "alarm": evil, "seen": evil, "why": evil, "fix": evil}])
    html = page("title", [[Run(run)]])
    assert evil not in html and "<img" not in html
    assert embedded(html)["samples"][0]["held-out prompts"][0]["prompt"] == evil  # shown as it is


def test_samples_are_before_and_after_and_of_rollouts(tmp_path: Path) -> None:
    run = write_ppo(tmp_path / "run", [SAME, RISEN])
    write_samples(run, [("Q1", "old", "new"), ("Q2", "a", "b")])
    (found,) = embedded(page("title", [[Run(run)]]))["samples"]
    first = found["held-out prompts"][0]
    assert [(when, answer["response"], answer["score"]) for when, answer in first["answers"]] == [
        ("step 0", "old", 0.0),
        ("step 5", "new", 5.0),
    ]
    assert [item["answers"][0][0] for item in found["rollouts"]] == ["iteration 2"]


@pytest.mark.parametrize("broken", ["empty", "cut line", "no numbers", "damaged files", "binary"])
def test_a_broken_run_has_a_page(tmp_path: Path, broken: str) -> None:
    run = write_ppo(tmp_path / "run", [SAME, RISEN])
    write_samples(run, [("Q", "a", "b")])
    if broken == "empty":
        for file in run.iterdir():
            file.unlink()
        (run / "config.yaml").touch()
    elif broken == "cut line":
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"step": 9, "split": "tra')
    elif broken == "no numbers":
        write_lines(run / "samples.jsonl", [{"step": 0, "prompt": "Q", "response": "a", "score": float("nan")}])
        lines = [{"step": 1, "split": "train", "objective/score": None, "objective/kl": float("nan")}, {"step": "x"}]
        write_lines(run / "metrics.jsonl", lines)
    elif broken == "damaged files":
        for name in ("config.yaml", "environment.json", "finished.json", "heldout.jsonl", "samples.jsonl"):
            (run / name).write_text("{: not ]")
    else:
        (run / "metrics.jsonl").write_bytes(b"\xff\xfe\x00" * 50)
    out, lines = write_report([run])
    assert out == run / "report.html" and "<h2" in out.read_text() and lines


def test_a_run_of_100000_steps_takes_seconds_and_fits(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, "step1_sft")
    names = [f"optimizer/number_{i}" for i in range(20)] + ["sft/loss"]
    values = np.random.default_rng(0).random((500, len(names))).tolist()
    with open(run / "metrics.jsonl", "w") as file:
        for step in range(1, 100_001):
            numbers = dict(zip(names, values[step % 500], strict=True))
            file.write(json.dumps({"step": step, "split": "train"} | numbers) + "\n")
    begun = time.process_time()
    out, _ = write_report([run])
    assert time.process_time() - begun < 30 and out.stat().st_size < 20e6


def test_a_folder_of_runs_is_one_page_with_a_section_each(tmp_path: Path) -> None:
    write_ppo(tmp_path / "step3_ppo", [SAME, RISEN])
    write_run(tmp_path / "step1_sft", "step1_sft", [], [{"step": at, "sft/loss": 3.0 - at} for at in (0, 1)])
    (tmp_path / "data").mkdir()
    assert [run.step for run in runs_in(tmp_path)] == ["step1_sft", "step3_ppo"]
    out, lines = write_report([tmp_path])
    assert out == tmp_path / "report.html"
    assert re.findall(r'<h2 id="[^"]*">([^<]*)<', out.read_text()) == ["Step 1: supervised fine-tuning", "Step 3: PPO"]
    assert [line for line in lines if not line.startswith(" ")] == [
        "Step 1: supervised fine-tuning: Better: it predicts the held-out answers better than before.",
        "Step 3: PPO: Better by the reward that it was trained on; no independent judge was asked (set `grader`).",
    ]


def test_runs_of_one_step_are_laid_over_each_other_with_what_differs(tmp_path: Path) -> None:
    runs = [write_ppo(tmp_path / name, [SAME, RISEN], ppo={"kl_coef": kl}) for name, kl in (("a", 0.1), ("b", 0.2))]
    assert differences([Run(run) for run in runs]) == [("ppo.kl_coef", ["0.1", "0.2"])]
    other = write_ppo(tmp_path / "c", [SAME], data={"train": [{"path": "x"}]})
    assert ("data.train.0.path", ["-", "x"]) in differences([Run(runs[0]), Run(other)])
    out, _ = write_report(runs, tmp_path / "both.html")
    names = {trace["name"] for figure in embedded(out.read_text())["figures"] for trace in figure["traces"]}
    assert {"a, training", "a, held out", "b, training", "b, held out", "a", "b"} == names


def test_names_tell_folders_apart(tmp_path: Path) -> None:
    def names(*folders: str) -> list[str]:
        return names_apart([tmp_path / folder for folder in folders])

    assert names("x/seed0/ppo", "x/seed1/ppo") == ["seed0", "seed1"]
    assert names("a", "b") == ["a", "b"] and names("x/a/ppo", "x/b/dpo") == ["a/ppo", "b/dpo"]
    assert names("a", "a") != names("a", "b") and len(set(names("a", "a"))) == 2


def test_several_runs_have_a_table_of_results_with_their_spread(tmp_path: Path) -> None:
    runs = [write_ppo(tmp_path / f"seed{up - 1}/ppo", [SAME, [x + up for x in SAME]]) for up in (1, 2)]
    table = dict(results([Run(run) for run in runs]))
    assert table["score"] == ["0.5 to 1.5", "0.5 to 2.5", "+1.5, deviation 0.707"]
    assert table["KL, nats per response"] == ["0 to 0.5", "0 to 0.5", "+0.5, deviation 0"]
    html = write_report(runs, tmp_path / "both.html")[0].read_text()
    assert "<title>2 runs: Step 3: PPO" in html and '<th scope="col">seed1</th>' in html


def test_wrong_folders_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sft = write_run(tmp_path / "sft", "step1_sft", [{"step": 1, "sft/loss": 1.0}])
    ppo = write_ppo(tmp_path / "ppo", [SAME])
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([tmp_path / "none"], "there is no such folder"),
        ([tmp_path / "empty"], "is not a run and holds none"),
        ([sft, tmp_path / "empty"], "is not a run"),
        ([sft, ppo], "are runs of different steps (step1_sft and step3_ppo)"),
        ([sft, "--watch", "0"], "give a number of seconds above 0"),
    ):
        assert tristage(["report", *map(str, words)]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1


def test_the_command_prints_verdict_and_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_ppo(tmp_path / "run", [SAME, RISEN])
    assert tristage(["report", str(run), "--out", str(tmp_path / "x.html")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("Step 3: PPO: Better by the reward") and printed[-1] == f"report: {tmp_path}/x.html"


def test_watching_ends_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_ppo(tmp_path / "run", [SAME], finished=False)
    pages = []

    def sleep(seconds: float) -> None:
        pages.append((run / "report.html").read_text())
        if len(pages) == 2:
            write_ppo(run, [SAME, RISEN])

    monkeypatch.setattr(report.time, "sleep", sleep)
    report.watch([run], None, 7)
    assert len(pages) == 2 and all(embedded(html)["reload"] == 7 for html in pages)
    assert embedded((run / "report.html").read_text())["reload"] is None


def test_a_page_that_fails_is_a_warning_to_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.announce(tmp_path)  # not a run
    printed = capsys.readouterr().out
    assert printed.startswith(f"warning: {tmp_path}/report.html is not written (") and printed.count("\n") == 1
    run = write_ppo(tmp_path / "run", [SAME, RISEN])
    report.announce(run)
    assert capsys.readouterr().out.endswith(f"report: {run}/report.html\n")
