"""Random rollouts at ZeRO-3: ranks end at different tokens, have empty responses or nothing but fillers; none waits."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import tiny
from tests.helpers.ranks import run_ranks
from tristage import dist
from tristage.config import BatchPlan
from tristage.data.collate import collate_prompts
from tristage.engine import engine_config, frozen_engine
from tristage.models.causal_lm import load_causal_lm
from tristage.models.tokenizer import load_tokenizer
from tristage.rollout import PaddedRollout, SamplingConfig, SeededRequest, StaticRollout

TOKENS = 6  # of a response at most
PROMPT = 8


def ends(rng: random.Random, rows: int, eos: float) -> tuple[list[int], torch.Tensor]:
    """(tokens of each response, uniforms [rows, TOKENS] that give them); TOKENS + 1: no EOS, 1: EOS alone."""
    lengths = [rng.choice([1, 1, 2, 3, 4, 5, TOKENS, TOKENS + 1]) for _ in range(rows)]
    uniforms = 0.5 + 0.5 * torch.tensor([[rng.random() for _ in range(TOKENS)] for _ in range(rows)])
    for row, length in enumerate(lengths):
        if length <= TOKENS:
            uniforms[row, length - 1] = eos
    return [min(length, TOKENS) for length in lengths], uniforms.double()


def roll_out(rank: int, path: str, rollouts: int) -> list[dict[str, Any]]:
    dist.init("cpu")
    tokenizer = load_tokenizer(path)
    template = json.loads(Path(tiny.deepspeed_json(3)).read_text())
    template["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    config = engine_config(template, "float32", BatchPlan.make(2, 1, 2))
    engine = frozen_engine(load_causal_lm(path, tokenizer, dtype=torch.float32, engine_config=config), config)
    # An untrained model gives all tokens about the same chance: this number falls in the middle of the EOS's.
    eos = (tokenizer.eos_token_id + 0.5) / len(tokenizer)
    together, found = random.Random(0), []
    for number in range(rollouts):
        rows, rows_at_once = together.randint(1, 4), together.randint(1, 4)
        gather = together.choice(["auto", "never"])
        backend = together.choice([PaddedRollout, StaticRollout])
        idle = together.choice([None, None, 0, 1])  # a rank with fillers alone
        rng = random.Random(2 * number + rank)
        lengths, uniforms = ends(rng, rows, eos)
        sizes = [(rng.randint(1, PROMPT - 1), 1) for _ in range(rows)]
        examples: list[Any] = [None] * rows if idle == rank else list(tiny.random_examples(sizes, tokenizer, number))
        draws = [None if idle == rank else row for row in range(rows)]
        batch = collate_prompts(examples, draws, tokenizer.pad_token_id, PROMPT)
        sampler = backend(engine, tokenizer, rows_at_once, gather)
        request = SeededRequest(batch.input_ids, batch.attention_mask, uniforms)
        made = sampler.generate(request, SamplingConfig(TOKENS, 1.0, 1.0, 0))
        assert made.attention_mask[:, PROMPT:].sum(dim=1).tolist() == lengths, number
        with torch.no_grad():  # the next collective after it
            engine(made.input_ids, made.attention_mask, made.attention_mask.bool())
        found.append({"lengths": lengths, "way": (gather, backend.name), "idle": idle})
    return found


@pytest.mark.parametrize("rollouts", [50, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.long])])
def test_random_rollouts_end_on_every_rank(rollouts: int, tmp_path: Path) -> None:
    first, second = run_ranks(2, roll_out, tiny.write_model(tmp_path / "model", "llama_untied"), rollouts, timeout=900)
    assert len(first) == len(second) == rollouts
    pairs = list(zip(first, second, strict=True))
    apart = sum(max(one["lengths"]) != max(other["lengths"]) for one, other in pairs)
    only_eos = sum(set(one["lengths"]) == {1} and max(other["lengths"]) > 1 for one, other in pairs)
    for way in itertools.product(("auto", "never"), ("padded", "static")):
        assert sum(one["way"] == way for one in first) > 0.1 * rollouts
    print(f"{rollouts} rollouts: {apart} whose ranks ended apart, {only_eos} with a rank of empty responses alone")
    assert apart > 0.3 * rollouts and only_eos > 0
    assert sum(one["idle"] is not None for one in first) > 0.3 * rollouts
