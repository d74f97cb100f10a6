"""Rows laid end to end: the layout against brute force, and every result and gradient against the padded forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import tiny
from tristage.config import LoraSettings
from tristage.data.collate import collate_packed, collate_prompts, collate_sft
from tristage.data.tokenize import Example
from tristage.models import rows as rows_module
from tristage.models.causal_lm import load_causal_lm
from tristage.models.reward_model import load_reward_model
from tristage.models.rows import Rows, share_beginnings, unknown_attention
from tristage.models.tokenizer import load_tokenizer

Forward = Callable[[], dict[str, torch.Tensor]]
LENGTHS = [(9, 4), (3, 1), (1, 30), (14, 9), (5, 6)]  # prompt, answer
UNKNOWN = ("gemma2", "bloom")
FAMILIES = ("llama", "opt", "gpt2", *tiny.FAMILIES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    base = tmp_path_factory.mktemp("rows")

    def make(family: str) -> str:
        if not (base / family).is_dir():
            tiny.write_model(base / family, family, gain=3.0)
        return str(base / family)

    return make


# ---- rows that begin alike ------------------------------------------------------------------------------------------


def test_rows_join_the_leader_that_they_have_most_in_common_with() -> None:
    head, one, other = tuple(range(10)), tuple(range(50, 70)), tuple(range(70, 90))
    rows = [head + one + (1,), head + other + (2,), head + one + (3, 4), head + other, (5,) * 12, head + other + (2,)]
    found = share_beginnings(rows)
    assert found[4] == (4, 0)
    assert {found[0], found[2]} == {(0, 0), (0, 30)}
    assert found[3] == (3, 0) and found[1] == (3, 30) and found[5] == (3, 30)


def test_few_tokens_in_common_are_not_shared() -> None:
    assert share_beginnings([(1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 3, 4, 5, 6, 7, 9)]) == [(0, 0), (1, 0)]
    assert share_beginnings([(7,)]) == [(0, 0)]


def test_what_is_shared_is_what_rows_begin_with() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        heads = [tuple(rng.integers(0, 2, 12).tolist()) for _ in range(3)]
        rows = [heads[rng.integers(3)][: rng.integers(1, 13)] + tuple(rng.integers(0, 2, 3).tolist()) for _ in range(6)]
        for number, (leader, common) in enumerate(share_beginnings(rows)):
            assert rows[number][:common] == rows[leader][:common]
            assert common == 0 if leader == number else common >= rows_module.SHARED_TOKENS


# ---- results and gradients ------------------------------------------------------------------------------------------


def answers_to_few_prompts(tokenizer: Any) -> list[Example]:
    """Seven rows, of which three and two begin with the same prompt and two are the same."""
    (long, short), tails = (tiny.random_examples([(20, 1), (11, 1)], tokenizer, 5), tiny.random_examples(
        [(1, n) for n in (4, 1, 9, 3, 6)], tokenizer, 6))  # fmt: skip
    prompts = [long.ids[:20], long.ids[:20], long.ids[:20], short.ids[:11], short.ids[:11]]
    rows = [Example([*p, *tail.ids[1:]], len(p)) for p, tail in zip(prompts, tails, strict=True)]
    return [*rows, rows[1], *tiny.random_examples([(3, 12)], tokenizer, 7)]


def batch_of(examples: list[Example], pad_id: int, side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = collate_sft(examples, pad_id)
    if side == "right":
        return made.input_ids, made.attention_mask, made.loss_mask
    left = collate_prompts(examples, range(len(examples)), pad_id)
    answers = torch.tensor([len(example.ids) - example.prompt_length for example in examples])
    columns = torch.arange(left.input_ids.shape[1])
    return left.input_ids, left.attention_mask, columns >= len(columns) - answers[:, None]


def both(forward: Forward, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Results and gradients, padded and end to end; also makes sure that they were computed in these ways."""
    found, shapes = [], []
    hook = model.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    for worthwhile in (-1, 10):
        monkeypatch.setattr(rows_module, "WORTHWHILE", worthwhile)
        model.zero_grad()
        results = forward()
        sum((x.float() * torch.arange(x.numel()).view_as(x).sin()).sum() for x in results.values()).backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append({name: x.detach() for name, x in results.items()} | grads)
    hook.remove()
    assert shapes[0] > 1 and shapes[-1] == 1
    return found


def assert_close(found: list[dict[str, torch.Tensor]], tolerance: float = 1e-5) -> None:
    padded, flat = found
    assert padded.keys() == flat.keys()
    for name, expected in padded.items():
        scale = float(expected.abs().max()) + 1.0
        assert (flat[name] - expected).abs().max() < tolerance * scale, name


def policy_forward(model: Any, ids: torch.Tensor, mask: torch.Tensor, wanted: torch.Tensor) -> Forward:
    def forward() -> dict[str, torch.Tensor]:
        logprobs, entropy, *values = model(ids, mask, wanted, 0.7, with_entropy=True)
        spread = {"values": values[0] * mask} if values else {}
        return {"logprobs": logprobs, "entropy": entropy} | spread

    return forward


def reward_forward(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> Forward:
    def forward() -> dict[str, torch.Tensor]:
        return {"values": model(ids, mask) * mask}

    return forward


@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in UNKNOWN])
def test_a_policy_computes_the_same_end_to_end(
    family: str, side: str, folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder(family)
    tokenizer = load_tokenizer(path)
    model = load_causal_lm(path, tokenizer, dtype=torch.float32)
    for examples in (tiny.random_examples(LENGTHS, tokenizer, seed=2), answers_to_few_prompts(tokenizer)):
        batch = batch_of(examples, tokenizer.pad_token_id, side)
        assert_close(both(policy_forward(model, *batch), model, monkeypatch))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in UNKNOWN])
def test_a_reward_model_computes_the_same_end_to_end(
    family: str, folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder(family)
    tokenizer = load_tokenizer(path)
    model = load_reward_model(path, tokenizer, dtype=torch.float32, new_head_seed=0)
    for examples in (tiny.random_examples(LENGTHS, tokenizer, seed=2), answers_to_few_prompts(tokenizer)):
        ids, mask, _ = batch_of(examples, tokenizer.pad_token_id, "right")
        assert_close(both(reward_forward(model, ids, mask), model, monkeypatch))


@pytest.mark.parametrize("options", ["value_head", "gradient_checkpointing", "lora"])
def test_options_compute_the_same_end_to_end(options: str, folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder("llama")
    tokenizer = load_tokenizer(path)
    chosen = {options: LoraSettings(rank=4) if options == "lora" else True}
    model = load_causal_lm(path, tokenizer, dtype=torch.float32, **chosen)
    model.train()
    batch = batch_of(answers_to_few_prompts(tokenizer), tokenizer.pad_token_id, "right")
    assert_close(both(policy_forward(model, *batch), model, monkeypatch))


def test_bf16_rounds_no_worse_end_to_end(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder("llama")
    tokenizer = load_tokenizer(path)
    batch = batch_of(answers_to_few_prompts(tokenizer), tokenizer.pad_token_id, "right")
    exact = load_causal_lm(path, tokenizer, dtype=torch.float32)
    expected = policy_forward(exact, *batch)()["logprobs"]
    model = load_causal_lm(path, tokenizer, dtype=torch.bfloat16)
    padded, flat = (found["logprobs"] for found in both(policy_forward(model, *batch), model, monkeypatch))
    assert (flat - expected).abs().mean() < 1.5 * (padded - expected).abs().mean() + 1e-3


def test_packed_examples_have_what_they_have_alone(folder: Any) -> None:
    """SFT's packing: several examples in a row, positions start again at each."""
    path = folder("opt")
    tokenizer = load_tokenizer(path)
    model = load_causal_lm(path, tokenizer, dtype=torch.float32)
    examples = tiny.random_examples(LENGTHS, tokenizer, seed=2)
    packed = collate_packed([examples[:3], examples[3:]], tokenizer.pad_token_id)
    found, _ = model(packed.input_ids, packed.attention_mask, packed.loss_mask, position_ids=packed.position_ids)
    alone = []
    for example in examples:
        one = collate_sft([example], tokenizer.pad_token_id)
        logprobs, _ = model(one.input_ids, one.attention_mask, one.loss_mask)
        alone.append(logprobs[one.loss_mask[:, 1:]])
    torch.testing.assert_close(found[packed.loss_mask[:, 1:]], torch.cat(alone), rtol=0, atol=1e-5)


# ---- when ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_do_not_attend_through_our_function_stay_padded(family: str, folder: Any) -> None:
    path = folder(family)
    tokenizer = load_tokenizer(path)
    model = load_causal_lm(path, tokenizer, dtype=torch.float32)
    ids, mask, _ = batch_of(tiny.random_examples(LENGTHS, tokenizer, seed=2), tokenizer.pad_token_id, "right")
    assert (Rows.of(model.model, ids, mask).place is None) is (family in UNKNOWN)
    assert (unknown_attention(model.model, 64) is not None) is (family in UNKNOWN)


def test_rows_stay_padded_where_it_does_not_pay_or_attention_is_another(folder: Any) -> None:
    path = folder("llama")
    tokenizer = load_tokenizer(path)
    model = load_causal_lm(path, tokenizer, dtype=torch.float32).model
    ids, mask, _ = batch_of(tiny.random_examples([(9, 9)] * 3, tokenizer, seed=2), tokenizer.pad_token_id, "right")
    assert Rows.of(model, ids, mask).place is None
    ids, mask, _ = batch_of(answers_to_few_prompts(tokenizer), tokenizer.pad_token_id, "right")
    flat = Rows.of(model, ids, mask)
    beginnings = {tuple(ids[row, : end + 1].tolist()) for row in range(len(ids)) for end in range(int(mask[row].sum()))}
    assert flat.inputs["input_ids"].shape[1] == len(beginnings) < int(mask.sum())
    model.config._attn_implementation = "eager"
    assert Rows.of(model, ids, mask).place is None

