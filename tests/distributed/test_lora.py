"""The gradient of adapters and scalar head is that of W + alpha/rank B A written out, at every ZeRO stage and layout.

The oracle is transformers' own model in float64, one row at a time and without padding, whose weights are computed from
A and B. Gradients are read off an SGD step, as in helpers/gradients.py; the same step shows that the base stands still.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from step1_sft.train import sft_step
from step2_reward_model.train import reward_model_step
from tests.helpers import oracles, tiny
from tests.helpers.gradients import (
    CPU,
    ROWS,
    TOLERANCE,
    Step,
    ranking_lengths,
    ranking_rows,
    row_logprobs,
    sft_rows,
    sgd,
    worst_difference,
)
from tests.helpers.ranks import run_ranks
from tristage import dist, engine
from tristage.config import BatchPlan, LoraSettings
from tristage.data.collate import collate_ranking, collate_sft, pick
from tristage.data.loader import deal
from tristage.models.causal_lm import load_causal_lm
from tristage.models.reward_model import load_reward_model
from tristage.models.tokenizer import load_tokenizer

# case: kind, model, adapters, gradient checkpointing
CASES: dict[str, tuple[str, str, LoraSettings, bool]] = {
    "all": ("sft", "gpt2", LoraSettings(rank=4, alpha=8), False),
    "some": ("sft", "llama_untied", LoraSettings(rank=2, alpha=3, targets=("q_proj", "down_proj")), False),
    "recomputed": ("sft", "llama_untied", LoraSettings(rank=4, alpha=8), True),
    "reward": ("pairs", "gpt2", LoraSettings(rank=4, alpha=8), False),
}
ONE_RANK, TWO_RANKS = [(0, 8), (2, 1)], [(0, 4), (1, 2), (2, 2), (3, 2)]  # (stage, micro-batch)


def load(case: str, path: str, tokenizer: Any, **options: Any) -> Any:
    """The case's model with B that are not 0, the same everywhere."""
    kind, _, lora, checkpointing = CASES[case]
    options |= {"lora": lora, "lora_seed": 3, "gradient_checkpointing": checkpointing}
    if kind == "sft":
        model: Any = load_causal_lm(path, tokenizer, **options)
    else:
        model = load_reward_model(path, tokenizer, new_head_seed=7, **options)
    generator = torch.Generator().manual_seed(8)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def run_all(rank: int, paths: dict[str, str], layouts: list[tuple[int, int]]) -> dict[Any, Any]:
    """{(case, stage, micro-batch): {"gradient", "loss", "norm", "base_moved"}} of one optimizer step each."""
    dist.init("cpu")
    found = {}
    with mock.patch.object(engine.engines, "_adamw", sgd):
        for stage, micro_batch in layouts:
            for case in CASES:
                found[case, stage, micro_batch] = run_case(case, paths, stage, micro_batch)
    return found


def run_case(case: str, paths: dict[str, str], stage: int, micro_batch: int) -> dict[str, Any]:
    kind, name, *_ = CASES[case]
    plan = BatchPlan.make(ROWS, micro_batch, dist.world_size())
    config = engine.engine_config(json.loads(Path(tiny.deepspeed_json(stage)).read_text()), "float32", plan)
    tokenizer = load_tokenizer(paths[name])
    step = Step(lambda *given, **options: load(case, *given, **options), paths[name], tokenizer, config)
    trained = {name for name, parameter in step.engine.module.named_parameters() if parameter.requires_grad}
    if kind == "sft":
        rows = sft_rows(tokenizer, case)
        dealt = deal(range(len(rows)), [len(row.ids) for row in rows], plan, dist.rank())
        metrics, _ = sft_step(step.engine, [collate_sft(pick(rows, m), tokenizer.pad_token_id) for m in dealt], CPU)
        result = step.result(metrics, "sft/loss", "optimizer/grad_norm")
    else:
        ranked = ranking_rows(tokenizer)
        dealt = deal(range(len(ranked)), ranking_lengths(ranked), plan, dist.rank())
        batches = [collate_ranking(pick(ranked, m), tokenizer.pad_token_id) for m in dealt]
        metrics, _ = reward_model_step(step.engine, batches, "pairs", CPU)
        result = step.result(metrics, "reward_model/loss", "optimizer/grad_norm")
    moved = [name for name, gradient in result["gradient"].items() if name not in trained and gradient.any()]
    gradient = {name.removeprefix("model."): g for name, g in result["gradient"].items() if name in trained}
    return result | {"gradient": gradient, "base_moved": moved, "frozen": len(result["gradient"]) - len(gradient)}


# ---- the oracle -----------------------------------------------------------------------------------------------------


class Explicit:
    """A plain transformers model whose weights are given; called as the model is."""

    def __init__(self, model: Any, weights: dict[str, torch.Tensor]):
        self.model, self.weights = model.eval(), weights

    def __call__(self, ids: torch.Tensor) -> Any:
        return functional_call(self.model, self.weights, (ids,))


def sft_loss(model: Any, row: Any) -> tuple[torch.Tensor, int]:
    logprobs = row_logprobs(model, row.ids, row.prompt_length)
    return -logprobs.sum(), len(logprobs)


def pairs_loss(model: Any, row: Any) -> tuple[torch.Tensor, int]:
    scores, ranks = torch.stack([model(torch.tensor([answer.ids])).logits[0, 0] for answer in row[0]]), row[1]
    pairs = [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]
    return torch.stack([-F.logsigmoid(scores[i] - scores[j]) for i, j in pairs]).mean(), 1


def oracle(case: str, paths: dict[str, str]) -> tuple[dict[str, np.ndarray], float]:
    """(gradient by name, loss) of the step."""
    kind, name, lora, _ = CASES[case]
    tokenizer = load_tokenizer(paths[name])
    started = load(case, paths[name], tokenizer, dtype=torch.float32).model
    leaves = {name: p.detach().double().requires_grad_() for name, p in started.named_parameters() if p.requires_grad}
    if kind == "sft":
        plain = AutoModelForCausalLM.from_pretrained(paths[name], dtype=torch.float64)
        rows: list[Any] = sft_rows(tokenizer, case)
        loss: Callable[[Any, Any], tuple[torch.Tensor, int]] = sft_loss
    else:
        auto_class, pad = AutoModelForSequenceClassification, tokenizer.pad_token_id
        plain = auto_class.from_pretrained(paths[name], dtype=torch.float64, num_labels=1, pad_token_id=pad)
        rows, loss = ranking_rows(tokenizer), pairs_loss
    state = dict(plain.named_parameters())
    changes = oracles.lora_changes(leaves, lora.alpha / lora.rank, transposed=name == "gpt2")
    weights = {name: state[name].detach() + change for name, change in changes.items()}
    weights |= {name: leaf for name, leaf in leaves.items() if name.startswith("score.")}
    losses, counts = zip(*(loss(Explicit(plain, weights), row) for row in rows), strict=True)
    mean = torch.stack(losses).sum() / sum(counts)
    gradients = torch.autograd.grad(mean, list(leaves.values()))
    return {name: g.numpy() for name, g in zip(leaves, gradients, strict=True)}, mean.item()


# ---- claims ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("lora")
    return {name: tiny.write_model(folder / name, name, gain=1.5) for name in ("gpt2", "llama_untied")}


@pytest.fixture(scope="module")
def results(paths: dict[str, str]) -> dict[Any, Any]:
    """{(ranks, case, stage, micro-batch): result}; two ranks start once for all their cases."""
    with tiny.one_rank():
        alone = run_all(0, paths, ONE_RANK)
    together = run_ranks(2, run_all, paths, TWO_RANKS)[0]
    return {(1, *key): value for key, value in alone.items()} | {(2, *key): value for key, value in together.items()}


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_adapters_equal_the_float64_oracle_for_every_layout_and_zero_stage(
    case: str, results: dict[Any, Any], paths: dict[str, str]
) -> None:
    expected, loss = oracle(case, paths)
    norm = sum((gradient**2).sum() for gradient in expected.values()) ** 0.5
    own = {key: value for key, value in results.items() if key[1] == case}
    assert len(own) == len(ONE_RANK) + len(TWO_RANKS)
    for key, value in own.items():
        assert value["gradient"].keys() == expected.keys()
        assert worst_difference(value["gradient"], expected) < TOLERANCE, key
        assert value["loss"] == pytest.approx(loss, rel=1e-5), key
        assert value["norm"] == pytest.approx(norm, rel=1e-5), key


@pytest.mark.parametrize("case", CASES)
def test_a_step_leaves_the_base_weights_alone(case: str, results: dict[Any, Any]) -> None:
    for key, value in results.items():
        if key[1] == case:
            assert value["frozen"] > 10 and value["base_moved"] == [], key
