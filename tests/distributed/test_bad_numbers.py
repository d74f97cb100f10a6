"""A loss or gradient that is not finite, on one rank, in one engine: no engine steps, on any rank, at any ZeRO stage.

Oracle: the run in which the bad step never was. Weights, moments and schedules must then be equal to the bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import step1_sft.train
import step3_ppo.train
import step3_ppo.update
from tests.helpers import tiny
from tests.helpers.ranks import run_ranks
from tristage import dist
from tristage.config import BatchPlan, OptimizerSettings
from tristage.data.collate import collate_sft
from tristage.engine import DTYPES, backward_mean, engine_config, full_state_dict, optimizer_steps, train_engine
from tristage.errors import UserError
from tristage.models.causal_lm import load_causal_lm
from tristage.models.tokenizer import load_tokenizer
from tristage.training.metrics import read_metrics

FP16_RUNS = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()
STAGES = (0, 1, 2, 3)
PLAN = BatchPlan.make(4, 2, 2)
ADAM = OptimizerSettings(learning_rate=1e-3, schedule="linear")
NEVER: list[str | None] = [None, None, None]
ALL_BAD: list[str | None] = [None, "loss", "gradient", None, "infinite", None]


def make(model: str, stage: int, precision: str = "float32") -> Any:
    config = engine_config({"zero_optimization": {"stage": stage}}, precision, PLAN, 1.0)
    if precision == "fp16":
        config["fp16"] |= {"initial_scale_power": 8, "hysteresis": 1}
    tokenizer = load_tokenizer(model)
    return train_engine(
        load_causal_lm(model, tokenizer, dtype=DTYPES[precision], engine_config=config), config, ADAM, 10
    )


def backward(engine: Any, tokenizer: Any, seed: int, bad: str | None) -> torch.Tensor:
    """A micro-batch's backward; what is `bad` is so on rank 1 alone."""
    examples = tiny.random_examples([(4, 5), (3, 7)], tokenizer, 10 * seed + dist.rank())
    batch = collate_sft(examples, tokenizer.pad_token_id)
    logprobs, _ = engine(batch.input_ids, batch.attention_mask, batch.loss_mask)
    loss = -logprobs.sum()
    here = bad if dist.rank() == 1 else None
    if here == "gradient":
        logprobs.register_hook(lambda gradient: gradient * torch.nan)
    factor = {"loss": torch.nan, "infinite": torch.inf, "overflow": 1e30}.get(str(here), 1.0)
    return backward_mean(engine, loss * factor, 24)


def run_steps(model: str, stage: int, precision: str, bad_steps: list[str | None], num: int) -> dict[str, Any]:
    """`num` engines that step together; the first has what is bad."""
    tokenizer = load_tokenizer(model)
    engines = [make(model, stage, precision) for _ in range(num)]
    reports = []
    seed = 0
    for bad in bad_steps:
        losses = [[backward(each, tokenizer, seed, bad if each is engines[0] else None)] for each in engines]
        reports.append(optimizer_steps(engines, losses))
        seed += bad is None
    return {
        "skipped": [[report.skipped for report in both] for both in reports],
        "bad": [[(report.bad_loss, report.bad_gradient) for report in both] for both in reports],
        "losses": [[len(report.losses) for report in both] for both in reports],
        "rates": [both[0].learning_rate for both in reports if not both[0].skipped],
        "scales": [[report.loss_scale for report in both] for both in reports],
        "weights": [{name: x.float().numpy() for name, x in full_state_dict(engine).items()} for engine in engines],
    }


def run_all(rank: int, model: str, runs: dict[str, tuple[int, str, list[str | None], int]]) -> dict[str, Any]:
    dist.init("cpu")
    return {name: run_steps(model, *run) for name, run in runs.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_model(tmp_path_factory.mktemp("bad"))


@pytest.fixture(scope="module")
def found(model: str) -> list[dict[str, Any]]:
    """Of each rank. Both engines start alike and see the same rows, so one is enough for what would have been."""
    runs: dict[str, tuple[int, str, list[str | None], int]] = {"bf16/never": (2, "bf16", NEVER, 1)}
    runs["bf16"] = (2, "bf16", [None, "gradient", None, None], 2)
    for stage in STAGES:
        runs[f"{stage}/never"] = (stage, "float32", NEVER, 1)
        runs[f"{stage}"] = (stage, "float32", ALL_BAD, 2)
        if FP16_RUNS:
            runs[f"{stage}/fp16/never"] = (stage, "fp16", NEVER, 1)
            runs[f"{stage}/fp16"] = (stage, "fp16", [None, "gradient", None, None], 2)
    return run_ranks(2, run_all, model, runs)


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name in ours:
        assert (ours[name] == theirs[name]).all(), name


@pytest.mark.parametrize("stage", STAGES)
def test_neither_engine_steps_on_any_rank_and_nothing_else_changes(stage: int, found: Any) -> None:
    for rank in range(2):
        run, never = found[rank][f"{stage}"], found[rank][f"{stage}/never"]
        assert run["skipped"] == [[bad is not None] * 2 for bad in ALL_BAD]
        assert run["bad"] == [[(bad in ("loss", "infinite"), bad == "gradient")] * 2 for bad in ALL_BAD]
        assert run["rates"] == never["rates"]  # a skipped step does not move the schedule
        assert run["losses"] == [[1, 1]] * len(ALL_BAD)
    for engine in range(2):
        assert_equal(found[0][f"{stage}"]["weights"][engine], found[0][f"{stage}/never"]["weights"][0])


@pytest.mark.skipif(not FP16_RUNS, reason="this CPU has no fp16 instructions")
@pytest.mark.parametrize("stage", STAGES)
def test_fp16_lowers_the_scale_of_the_engine_that_overflowed_and_both_skip(stage: int, found: Any) -> None:
    for rank in range(2):
        run = found[rank][f"{stage}/fp16"]
        assert run["skipped"] == [[False] * 2, [True] * 2, [False] * 2, [False] * 2]
        assert run["bad"] == [[(False, False)] * 2] * 4  # how a loss scale finds its place is no fault
        assert run["scales"] == [[256, 256], [128, 256], [128, 256], [128, 256]]
    # The second engine's own scale never changed: it goes on as if the step had not been.
    assert_equal(found[0][f"{stage}/fp16"]["weights"][1], found[0][f"{stage}/fp16/never"]["weights"][0])


def test_bf16_skips_too(found: Any) -> None:
    assert found[0]["bf16"]["skipped"] == [[False] * 2, [True] * 2, [False] * 2, [False] * 2]
    assert found[0]["bf16"]["bad"][1] == [(False, True)] * 2
    assert_equal(found[0]["bf16"]["weights"][0], found[0]["bf16/never"]["weights"][0])


# ---- whole runs -----------------------------------------------------------------------------------------------------


def bad_backwards(calls: set[int]) -> Any:
    """The named backwards of a run (0-based) get a loss of nan on rank 1."""
    count = iter(range(10**6))

    def backward_mean_sometimes(engine: Any, loss_sum: torch.Tensor, global_count: float) -> torch.Tensor:
        bad = next(count) in calls and dist.rank() == 1
        return backward_mean(engine, loss_sum * torch.nan if bad else loss_sum, global_count)

    return backward_mean_sometimes


def run_sft(rank: int, argv: list[str], calls: set[int]) -> str:
    with mock.patch.object(step1_sft.train, "backward_mean", bad_backwards(calls)):
        try:
            step1_sft.train.main(argv)
        except UserError as error:
            return str(error)
    return ""


def nan_scores(iterations: set[int]) -> Any:
    """The reward model says nan of rank 1's first response in some iterations."""
    sample, score, draws = step3_ppo.train.sample_responses, step3_ppo.train.score_responses, [0]

    def sample_and_note(*arguments: Any) -> Any:
        draws.append(arguments[-1])
        return sample(*arguments)

    def score_sometimes_nan(*arguments: Any) -> Any:
        own = score(*arguments)
        if draws[-1] in iterations and dist.rank() == 1:
            own.scores[0] = torch.nan
        return own

    return mock.patch.multiple(step3_ppo.train, sample_responses=sample_and_note, score_responses=score_sometimes_nan)


def run_ppo(rank: int, argv: list[str], iterations: set[int], calls: set[int]) -> str:
    with (
        nan_scores(iterations),
        mock.patch.object(step3_ppo.update, "backward_mean", bad_backwards(calls)),
    ):
        try:
            step3_ppo.train.main(argv)
        except UserError as error:
            return str(error)
    return ""


def run_runs(rank: int, jobs: list[tuple[str, list[Any]]]) -> list[str]:
    return [{"sft": run_sft, "ppo": run_ppo}[step](rank, *arguments) for step, arguments in jobs]


@pytest.fixture(scope="module")
def runs(model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    folder = tmp_path_factory.mktemp("runs")
    rows = tiny.write_rows(folder / "rows")
    scorer = tiny.write_reward_model(folder / "scorer", model)

    def sft(name: str) -> list[str]:
        tiny.sft_config(folder / name, model, rows["sft"])
        return ["--config", str(folder / name / "sft.yaml"), "max_steps=8", "max_bad_steps=3"]

    def ppo(name: str) -> list[str]:
        tiny.ppo_config(folder / name, model, scorer, rows["prompts"], 2)
        return [
            "--config",
            str(folder / name / "ppo.yaml"),
            "iterations=3",
            "ppo.epochs=1",
            "ppo.adaptive_kl_target=1.0",
        ]

    # Two micro-batches a step and rank: backwards 4 and 5 are the third step's. A minibatch of PPO has 4, of actor and
    # critic in turn, an iteration 8: the 13th is in the second minibatch of iteration 3, for one was left out.
    jobs = [
        ("sft", [sft("once"), {4}]),
        ("sft", [sft("often"), set(range(6, 99))]),
        ("sft", [[*sft("never_well"), "max_bad_steps=99"], set(range(99))]),
        ("ppo", [ppo("ppo"), {2}, {12}]),
    ]
    return folder, run_ranks(2, run_runs, jobs, timeout=400)


def health(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "health.jsonl").read_text().splitlines()]


def test_a_bad_step_is_skipped_counted_and_its_rows_are_kept(runs: Any) -> None:
    folder, said = runs
    assert [said[0][0], said[1][0]] == ["", ""]
    output = folder / "once/sft"
    lines = [line for line in read_metrics(output / "metrics.jsonl") if line["split"] == "train"]
    assert [line["optimizer/skipped"] for line in lines] == [0, 0, 1, 0, 0, 0, 0, 0]
    assert health(output) == [{"step": 3, "bad": "loss", "ranks": [1], "in_a_row": 1}]
    (kept,) = (output / "bad_batches").iterdir()
    assert kept.name == "step_000003_rank1.jsonl"
    (batch,) = map(json.loads, kept.read_text().splitlines())
    assert batch["loss"] == "nan" and len(batch["rows"]) == 2 and all("sft.jsonl:" in row for row in batch["rows"])
    assert (output / "final/config.json").is_file()


def test_the_run_stops_after_too_many_with_a_checkpoint(runs: Any) -> None:
    folder, said = runs
    output = folder / "often/sft"
    for rank in range(2):
        assert "stopped at step 6: 3 steps in a row" in said[rank][1] and "bad_batches" in said[rank][1]
    assert [line["in_a_row"] for line in health(output)] == [1, 2, 3]
    assert (output / "checkpoints/latest").read_text() == "step_000006"
    state = json.loads((output / "checkpoints/step_000006/state.json").read_text())
    assert state["control"]["health"] == [3, 3, 3]
    assert not (output / "final").exists()


def test_a_run_without_a_single_good_step_does_not_end_well(runs: Any) -> None:
    folder, said = runs
    for rank in range(2):
        assert "every optimizer step was skipped" in said[rank][2]
    assert not (folder / "never_well/sft/final").exists()


def test_ppo_leaves_out_an_iteration_with_a_bad_score_and_both_engines_skip_a_bad_minibatch(runs: Any) -> None:
    folder, said = runs
    assert [said[0][3], said[1][3]] == ["", ""]
    output = folder / "ppo/ppo"
    lines = [line for line in read_metrics(output / "metrics.jsonl") if line["split"] == "train"]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert "policy/loss" not in lines[1]  # nothing was trained in iteration 2
    assert lines[2]["policy/skipped"] == lines[2]["value/skipped"] == 0.5  # one of two minibatches
    assert lines[2]["objective/kl_coef"] > 0  # the controllers never saw the bad score
    assert [(line["step"], line["bad"]) for line in health(output)] == [(2, "score"), (3, "loss")]
    rows = [json.loads(line) for file in (output / "bad_batches").iterdir() for line in file.read_text().splitlines()]
    assert rows and all("prompts.jsonl:" in row for batch in rows for row in batch["rows"])
