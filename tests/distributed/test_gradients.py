"""The gradient of an optimizer step does not depend on how its rows were dealt to ranks and micro-batches.

The oracle, and how gradients are read off an engine, are in tests/helpers/gradients.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from step1_sft.train import sft_step
from step2_reward_model.train import reward_model_step
from step3_ppo.rollout import Engines
from step3_ppo.update import ppo_update
from tests.helpers import tiny
from tests.helpers.gradients import (
    CLIP,
    CPU,
    LAYOUTS,
    ROWS,
    TEMPERATURE,
    TOLERANCE,
    Oracle,
    Step,
    policy_row,
    ranking_lengths,
    ranking_rows,
    row_values,
    sft_row,
    sft_rows,
    sgd,
    unpadded,
    worst_difference,
    write_models,
)
from tests.helpers.ranks import run_ranks
from tristage import dist, engine
from tristage.batches import Experience
from tristage.config import BatchPlan
from tristage.data.collate import collate_ranking, collate_sft, pick
from tristage.data.loader import deal
from tristage.models.causal_lm import load_causal_lm
from tristage.models.reward_model import load_reward_model
from tristage.models.tokenizer import load_tokenizer

CASES = ["sft", "sft_untied", "sft_last", "pairs", "best", "policy", "value"]


# ---- the oracle -----------------------------------------------------------------------------------------------------


def ranking_row(form: str) -> Callable[[Any, Any], tuple[torch.Tensor, int]]:
    def loss(model: Any, row: Any) -> tuple[torch.Tensor, int]:
        scores, ranks = torch.stack([row_values(model, answer.ids)[-1] for answer in row[0]]), row[1]
        if form == "best":
            return -torch.log_softmax(scores, 0)[ranks.index(0.0)], 1
        pairs = [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]
        return torch.stack([-F.logsigmoid(scores[i] - scores[j]) for i, j in pairs]).mean(), 1

    return loss


def value_row(experience: Experience) -> Callable[[Any, Any], tuple[torch.Tensor, int]]:
    def loss(model: Any, row: int) -> tuple[torch.Tensor, int]:
        ids, start, kept = unpadded(experience, row)
        values = row_values(model, ids)[start - 1 : -1]  # of the state before each response token
        old, returns = experience.values[row][kept].double(), experience.returns[row][kept].double()
        moved = old + (values - old).clamp(-CLIP, CLIP)
        return 0.5 * torch.maximum((values - returns) ** 2, (moved - returns) ** 2).sum(), len(values)

    return loss


# ---- what DeepSpeed makes of it -------------------------------------------------------------------------------------


def run_group(group: str, paths: dict[str, str], stage: int, micro_batch: int, clip: float = 0.0) -> dict[str, Any]:
    """One optimizer step of what `group` trains: {case: {"gradient", "loss", "norm"}}."""
    plan = BatchPlan.make(ROWS, micro_batch, dist.world_size())
    template = json.loads(Path(tiny.deepspeed_json(stage)).read_text())
    config = engine.engine_config(template, "float32", plan, clip)
    tokenizer = load_tokenizer(paths["gpt2"])
    if group.startswith("sft"):
        step = Step(load_causal_lm, paths["llama_untied" if group == "sft_untied" else "gpt2"], tokenizer, config)
        rows = sft_rows(tokenizer, group)
        dealt = deal(range(len(rows)), [len(row.ids) for row in rows], plan, dist.rank())
        metrics, _ = sft_step(step.engine, [collate_sft(pick(rows, m), tokenizer.pad_token_id) for m in dealt], CPU)
        return {group: step.result(metrics, "sft/loss", "optimizer/grad_norm")}
    if group == "ppo":
        actor = Step(load_causal_lm, paths["gpt2"], tokenizer, config)
        critic = Step(load_reward_model, paths["reward"], tokenizer, config)
        experience = torch.load(paths["experience"], weights_only=False)
        settings = tiny.ppo_config(
            Path(paths["settings"]) / str(dist.rank()), paths["gpt2"], paths["reward"], "unused", stage,
            f"rollout.prompts={ROWS}", f"rollout.temperature={TEMPERATURE}", f"ppo.minibatch={ROWS}",
            f"ppo.micro_batch={micro_batch}", "ppo.epochs=1", f"ppo.clip={CLIP}", f"ppo.value_clip={CLIP}",
        )  # fmt: skip
        metrics, _ = ppo_update(Engines(actor.engine, critic.engine, None, None), experience, 1, settings, plan)
        return {
            case: step.result(metrics, f"{case}/loss", f"{case}/grad_norm")
            for case, step in (("policy", actor), ("value", critic))
        }
    step = Step(load_reward_model, paths["reward"], tokenizer, config)
    rows = ranking_rows(tokenizer)
    dealt = deal(range(len(rows)), ranking_lengths(rows), plan, dist.rank())
    batches = [collate_ranking(pick(rows, m), tokenizer.pad_token_id) for m in dealt]
    metrics, _ = reward_model_step(step.engine, batches, group, CPU)
    return {group: step.result(metrics, "reward_model/loss", "optimizer/grad_norm")}


def run_all(rank: int, paths: dict[str, str], stages: list[int], micro_batches: list[int]) -> dict[Any, Any]:
    """{(case, stage, micro-batch): result}; "clipped" is "sft" with gradients clipped to half their norm."""
    found: dict[Any, Any] = {}

    def run(group: str, stage: int, micro_batch: int, clip: float = 0.0) -> None:
        for case, result in run_group(group, paths, stage, micro_batch, clip).items():
            found["clipped" if clip else case, stage, micro_batch] = result

    with mock.patch.object(engine.engines, "_adamw", sgd):
        dist.init("cpu")
        for stage in stages:
            for micro_batch in micro_batches:
                for group in ("sft", "sft_untied", "sft_last", "pairs", "best", "ppo"):
                    run(group, stage, micro_batch)
            run("sft", stage, micro_batches[0], found["sft", stage, micro_batches[0]]["norm"] / 2)
    return found


# ---- fixtures -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_models(tmp_path_factory.mktemp("gradients"))


@pytest.fixture(scope="module")
def oracles(paths: dict[str, str]) -> dict[str, Oracle]:
    tokenizer = load_tokenizer(paths["gpt2"])
    found = {}
    for case in ("sft", "sft_untied", "sft_last"):
        rows = sft_rows(tokenizer, case)
        path = paths["llama_untied" if case == "sft_untied" else "gpt2"]
        found[case] = Oracle(AutoModelForCausalLM, path, rows, [len(row.ids) for row in rows], sft_row)
    rows, scorer = ranking_rows(tokenizer), AutoModelForSequenceClassification
    for form in ("pairs", "best"):
        found[form] = Oracle(scorer, paths["reward"], rows, ranking_lengths(rows), ranking_row(form))
    experience = torch.load(paths["experience"], weights_only=False)
    lengths = experience.sequences.attention_mask.sum(dim=1).tolist()
    places = list(range(ROWS))
    found["policy"] = Oracle(AutoModelForCausalLM, paths["gpt2"], places, lengths, policy_row(experience))
    found["value"] = Oracle(scorer, paths["reward"], places, lengths, value_row(experience))
    return found


@pytest.fixture(scope="module")
def results(paths: dict[str, str]) -> dict[Any, Any]:
    """{(ranks, case, stage, micro-batch): result} of everything; two ranks start once for all their cases."""
    with tiny.one_rank():
        alone = run_all(0, paths, [0, 2], [8, 1])
    together = run_ranks(2, run_all, paths, [0, 1, 2, 3], [4, 2])[0]
    return {(1, *key): value for key, value in alone.items()} | {(2, *key): value for key, value in together.items()}


# ---- claims ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_the_float64_oracle_for_every_layout_and_zero_stage(
    case: str, results: dict[Any, Any], oracles: dict[str, Oracle]
) -> None:
    expected = oracles[case].gradient()
    own = {key: value for key, value in results.items() if key[1] == case}
    assert {(ranks, micro_batch) for ranks, _, _, micro_batch in own} == set(LAYOUTS)
    worst = {key: worst_difference(value["gradient"], expected) for key, value in own.items()}
    print(f"{case}: largest relative difference {max(worst.values()):.1e}")
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks, micro_batch", LAYOUTS[1:])
def test_the_mean_of_micro_batch_means_would_be_another_gradient(
    case: str, ranks: int, micro_batch: int, oracles: dict[str, Oracle]
) -> None:
    wrong = oracles[case].mean_of_means(ranks, micro_batch)
    assert worst_difference(wrong, oracles[case].gradient()) > 0.01


@pytest.mark.parametrize("case", CASES)
def test_reported_loss_and_gradient_norm_are_those_of_the_whole_step(
    case: str, results: dict[Any, Any], oracles: dict[str, Oracle]
) -> None:
    norm = sum((gradient**2).sum() for gradient in oracles[case].gradient().values()) ** 0.5
    for key, value in results.items():
        if key[1] == case:
            assert value["loss"] == pytest.approx(oracles[case].loss(), rel=1e-5), key
            assert value["norm"] == pytest.approx(norm, rel=1e-5), key


def test_clipping_divides_by_the_global_norm(results: dict[Any, Any], oracles: dict[str, Oracle]) -> None:
    expected = {name: gradient / 2 for name, gradient in oracles["sft"].gradient().items()}
    clipped = {key: value for key, value in results.items() if key[1] == "clipped"}
    assert len(clipped) == 6
    for key, value in clipped.items():
        assert worst_difference(value["gradient"], expected) < 10 * TOLERANCE, key
