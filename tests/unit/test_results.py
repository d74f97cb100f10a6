"""The experiments' own code: intervals, jobs, comparisons of reruns, and that the page says what the data say."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import results.record
from results import ablations, arithmetic, check, jobs, over_optimisation, page, sentiment, sentiment_data
from results.assets import Review
from results.jobs import Job, evaluate_job, run_job
from results.record import rounded, seed_interval, student_t
from results.small_head import init_head
from results.without_eos import mask_without_eos
from step2_dpo.config import DPOConfig
from step2_reward_model.config import RewardModelConfig
from step3_ppo.config import PPOConfig
from tristage.config import load_config

REPO = Path(__file__).parents[2]
STALE = "run python -m results.page and python -m results.figures"
CONFIGS: dict[str, Any] = {
    "step3_ppo": PPOConfig,
    "step2_dpo": DPOConfig,
    "step2_reward_model": RewardModelConfig,
    "results": PPOConfig,
}


# -- numbers -----------------------------------------------------------------------------------------------


def test_students_t_is_that_of_its_distribution() -> None:
    # One degree of freedom is a Cauchy distribution; with two, P(|T| < t) = t / sqrt(2 + t^2).
    for share in (0.95, 0.99):
        assert student_t(1, share) == pytest.approx(math.tan(math.pi * share / 2), rel=1e-4)
        t = student_t(2, share)
        assert t / math.sqrt(2 + t * t) == pytest.approx(share, abs=1e-4)
        values = [student_t(freedom, share) for freedom in range(1, 12)]
        assert values == sorted(values, reverse=True) and values[-1] == values[-2]
    assert student_t(4, 0.95) == 2.776 and student_t(4, 0.99) == 4.604


def test_an_interval_over_seeds_is_students() -> None:
    # Mean 2, deviation 1, t of two degrees 4.303: 2 +- 4.303 / sqrt(3).
    assert seed_interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)))
    # Four prompts of deviation 2 that the seeds share: variances 1/3 + 4/4.
    mean, low, high = seed_interval([1.0, 2.0, 3.0], [0.0, 2.0, 2.0, 2 + math.sqrt(12)])
    prompts = torch.tensor([0.0, 2.0, 2.0, 2 + math.sqrt(12)]).double().var().item() / 4
    assert mean == 2 and high - mean == pytest.approx(4.303 * math.sqrt(1 / 3 + prompts)) == mean - low


def test_published_numbers_keep_five_digits() -> None:
    assert rounded({"a": [1.23456789, 3], "b": (12345678.0, "x")}) == {"a": [1.2346, 3], "b": [12346000.0, "x"]}


def published(gold: list[float], grades: list[list[float]]) -> dict[str, Any]:
    policy = {"claim": "words", "gold": gold, "grades": grades, "curves": {"gold": [[0.1]] * len(gold)}}
    return {"about": {}, "policies": {"PPO": policy}}


def test_a_rerun_is_compared_with_the_published_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = published([0.90, 0.92, 0.94], [[0.4, 0.6], [0.5, 0.7], [0.6, 0.8]])
    # Deviation 0.02, t of two degrees 9.925, a rerun of one seed: 0.92 +- 9.925 * 0.02 * sqrt(1/3 + 1).
    gold, grades = check.compare(ours, published([0.80], [[0.6, 0.6]]))
    half = 9.925 * 0.02 * math.sqrt(4 / 3)
    assert (gold.name, gold.low, gold.high) == ("PPO: gold", pytest.approx(0.92 - half), pytest.approx(0.92 + half))
    assert gold.agrees and grades.published == pytest.approx(0.6) and grades.agrees
    monkeypatch.setattr(check, "read", lambda experiment: ours)
    for value, code in ((0.92 - half + 0.01, 0), (0.92 - half - 0.01, 1)):
        (tmp_path / "rerun.json").write_text(json.dumps(published([value], [[0.6, 0.6]])))
        assert check.main(["ablations", str(tmp_path / "rerun.json")]) == code
    (tmp_path / "rerun.json").write_text(json.dumps({"policies": {"another": {"gold": [1.0]}}}))
    with pytest.raises(SystemExit, match="has no number that ablations has"):
        check.main(["ablations", str(tmp_path / "rerun.json")])


# -- the page ----------------------------------------------------------------------------------------------


def test_the_page_has_the_numbers_of_the_data() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text, page.blocks()) == text, STALE
    assert set(re.findall(r"<!-- ([a-z0-9 ]+) -->", text)) - {"end"} == set(page.blocks())


def test_every_figure_is_there_and_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = pytest.importorskip("results.figures", reason="matplotlib is not installed (bash results/install.sh)")
    text = page.PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"pictures/(results_\w+)\.svg", text)) == set(figures.FIGURES)
    for path in figures.draw(tmp_path):  # from data that this run reads
        kept = (figures.PICTURES / path.name).read_text(encoding="utf-8")
        assert path.read_text(encoding="utf-8").count("<path") == kept.count("<path") > 20, STALE


def test_all_that_is_published_says_where_it_is_from() -> None:
    for file in sorted(results.record.DATA.glob("*.json")):
        about = json.loads(file.read_text())["about"]
        assert len(about["seeds"]) >= 3 and about["cpu_seconds"] > 0 and re.fullmatch(r"[0-9a-f]{12}", about["commit"])
        assert about["command"].startswith(f"python -m results.{file.stem} ")
        assert {"torch", "deepspeed"} <= set(about["versions"])


# -- jobs --------------------------------------------------------------------------------------------------


def test_a_job_is_run_once_and_its_cost_is_kept(tmp_path: Path) -> None:
    script = f"open({str(tmp_path / 'count')!r}, 'a').write('x'); sum(range(10**6))"
    job = Job(tmp_path / "job", (sys.executable, "-c", script))
    for _ in range(2):
        run_job(job)
    assert (tmp_path / "count").read_text() == "x"
    found = jobs.cost(tmp_path.glob("**/job.json"))
    assert 0 < found["cpu_seconds"] and 0 < found["seconds"]


def test_jobs_at_once_meet_at_ports_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = tmp_path / "deepspeed"
    launcher.write_text('#!/bin/sh\necho "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setattr(jobs, "LAUNCHER", (str(launcher),))
    for name in ("one", "other"):
        run_job(Job(tmp_path / name, (str(launcher), "--num_gpus", "1")))
    said = [(tmp_path / name / "job.log").read_text().split() for name in ("one", "other")]
    assert [[words[0], *words[2:]] for words in said] == [["--master_port", "--num_gpus", "1"]] * 2


def test_a_job_that_fails_shows_its_log_and_is_run_again(tmp_path: Path) -> None:
    job = Job(tmp_path / "job", (sys.executable, "-c", "import sys; print('why it failed'); sys.exit(3)"))
    for _ in range(2):
        with pytest.raises(SystemExit, match="(?s)exit code 3 of .*why it failed"):
            run_job(job)
    assert not job.record.exists()


def all_jobs(out: Path) -> list[Job]:
    found = list(ablations.jobs_of(0, out / "quickstart"))
    for make in (over_optimisation.reward_job, over_optimisation.policy_job):
        found += [make(pairs, out / "quickstart/seed0", 0) for pairs in over_optimisation.PAIRS]
    out = out / "sentiment"
    found += [sentiment.reward_job(out, 0), *(sentiment.method_job(out, 0, method) for method in sentiment.METHODS)]
    found += [sentiment.evaluation_job(out, 0, sentiment.METHODS), sentiment.draws_job(out)]
    out = out / "arithmetic"
    found += [arithmetic.method_job(out, 0, name) for name in arithmetic.METHODS]
    return [*found, *arithmetic.evaluation_jobs(out, 0, tuple(arithmetic.METHODS))]


def test_every_run_has_settings_that_load(tmp_path: Path) -> None:
    """A setting that is renamed must not be found out an hour into an experiment."""
    outputs = [job.output for job in all_jobs(tmp_path)]
    assert len(set(outputs)) == len(outputs)
    loaded = 0
    for job in all_jobs(tmp_path):
        config = next((word for word in job.command if word.endswith(".yaml")), None)
        name = next((name for name in CONFIGS if any(word.startswith(f"{name}.") for word in job.command)), None)
        if config is None or name is None:
            continue
        if "results.small_head" in job.command:
            name = "step2_reward_model"
        words = [word for word in job.command[job.command.index(config) + 1 :] if "=" in word]
        load_config(CONFIGS[name], ["--config", config, *words])
        policies = job.output / "policies.json"
        for own in json.loads(policies.read_text()).values() if policies.is_file() else ():
            load_config(PPOConfig, ["--config", config, *words, *own])
        loaded += 1
    assert loaded > 40


EXPERIMENTS = re.findall(r"^python -m results\.(\w+) (output\S+.*)$", page.PAGE.read_text(encoding="utf-8"), flags=re.M)


@pytest.mark.parametrize("name, words", EXPERIMENTS, ids=[name for name, _ in EXPERIMENTS])
def test_a_command_of_the_page_runs_its_jobs_and_publishes(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, published, started = importlib.import_module(f"results.{name}"), [], []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "run_jobs", lambda jobs, at_once=1: started.extend(jobs))
    monkeypatch.setattr(module, "record", lambda *args: {"given": len(args)})
    monkeypatch.setattr(module, "publish", lambda *args: published.append(args))
    monkeypatch.setattr(module, "versions_in", lambda *args: {}, raising=False)
    module.main(words.split())
    assert [args[0] for args in published] == [name] and len(started) >= 10
    assert len({job.output for job in started}) == len(started)


def test_the_page_has_the_command_of_each_experiment() -> None:
    assert [name for name, _ in EXPERIMENTS] == list(page.EXPERIMENTS)


def test_policies_are_written_for_the_evaluation(tmp_path: Path) -> None:
    job = evaluate_job(ablations.RECIPE / "step3_ppo.yaml", tmp_path / "out", {"a": ["actor.model=x"]}, ["seed=1"])
    assert json.loads((tmp_path / "out/policies.json").read_text()) == {"a": ["actor.model=x"]}
    assert job.command[:5] == ("deepspeed", "--num_gpus", "1", "--module", "results.evaluate")
    assert job.command[-2:] == (f"output={tmp_path}/out", "seed=1")


# -- what the ablations change -----------------------------------------------------------------------------


def test_the_mask_of_the_ablation_leaves_out_the_last_token_alone() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    sequences = SimpleNamespace(responses=torch.tensor([[5, 9, 9], [5, 6, 7]]), response_mask=mask, stop_ids=(9,))
    found = mask_without_eos(SimpleNamespace(sequences=sequences))  # type: ignore[arg-type]
    assert found.tolist() == [[True, False, False], [True, True, True]]


def test_the_head_of_the_ablation_has_the_deviation_of_transformers() -> None:
    heads = [torch.nn.Linear(4096, 1, bias=False) for _ in range(2)]
    for head in heads:
        init_head(head, 3, None)
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert heads[0].weight.std().item() == pytest.approx(0.02, rel=0.1)


# -- data --------------------------------------------------------------------------------------------------


def reviews(count: int) -> list[Review]:
    sentence = "This {} film number {} goes on for quite a while and then some more. "
    return [Review(sentence.format("good" if i % 2 else "bad", i) * 5, bool(i % 2)) for i in range(count)]


def test_parts_of_the_reviews_do_not_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentiment_data, "PARTS", {"sft": 20, "pairs": 40, "prompts": 12})
    monkeypatch.setattr(sentiment_data, "JUDGE", 30)
    monkeypatch.setattr(sentiment_data, "HELDOUT", 16)
    parts = sentiment_data.split_reviews(reviews(130))
    assert {name: len(part) for name, part in parts.items()} == {
        "sft": 20, "pairs": 40, "prompts": 12, "judge": 30, "heldout": 16
    }  # fmt: skip
    texts = [review.text for part in parts.values() for review in part]
    assert len(set(texts)) == len(texts)
    sentiment_data.write_data(tmp_path, parts)
    rows = {path.name: [json.loads(line) for line in path.open()] for path in tmp_path.iterdir()}
    assert all("good" in row["chosen"] and "bad" in row["rejected"] for row in rows["preference.train.jsonl"])
    assert all(row["prompt"].startswith("Review: This") and row["response"] for row in rows["sft.train.jsonl"])
    held = {row["prompt"] for row in rows["prompts.heldout.jsonl"]}
    assert held.isdisjoint(row["prompt"] for row in rows["prompts.train.jsonl"]) and len(held) == 12


def test_best_of_n_takes_the_response_that_the_reward_model_prefers() -> None:
    draws = [[{"score": score, "kl": 0}, {"score": -score, "kl": 0}] for score in (3, 1, 4, 2)]
    assert [sample["score"] for sample in sentiment.best_of(draws)] == [4, -1]
    assert {sample["kl"] for sample in sentiment.best_of(draws)} == {math.log(4) - 3 / 4}
    assert [sample["score"] for sample in sentiment.best_of(draws[:2])] == [3, -1]


def test_the_rule_of_the_arithmetic_takes_the_last_number() -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed (bash results/install.sh)")
    from results.arithmetic_rules import correct

    row = {"answer": "-12", "metadata": {"source_dataset": "chain_sum"}}
    responses = ["-12", "it is -12", "-12 or 7", "12", ""]
    scores, extra = correct([""] * 5, responses, [row] * 5)
    assert scores == [1, 1, 0, 0, 0] and extra["only_a_number"] == [1, 0, 0, 1, 0]
