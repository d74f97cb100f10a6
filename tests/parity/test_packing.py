"""A packed example says and learns what it does alone, whatever stands before it in its sequence.

One process, plain modules, no DeepSpeed engine.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from step1_sft.train import check_packing
from tests.helpers import tiny
from tristage.batches import SFTBatch
from tristage.data.collate import collate_packed, collate_sft
from tristage.data.tokenize import Example
from tristage.errors import UserError
from tristage.models import loading
from tristage.models.causal_lm import CausalLM, load_causal_lm
from tristage.models.loading import check_packable
from tristage.models.tokenizer import load_tokenizer

PACKABLE = ("llama", "gpt2", "opt", "llama_untied", "qwen2", "gpt_neox", "gemma2")
LENGTHS = [(9, 4), (3, 1), (1, 30), (14, 9), (0, 6), (5, 6)]  # prompt, answer; no prompt: a block of text
PACKS = ((0, 1, 5), (2,), None, (3, 4, 1))  # 28, 31 and 33 tokens in 33 columns, and a filler


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("models")
    return {family: tiny.write_model(base / family, family, gain=3.0) for family in (*PACKABLE, "bloom")}


def opened(path: str) -> tuple[CausalLM, list[Example], int]:
    """(the policy, examples for it, its pad id)."""
    tokenizer = load_tokenizer(path)
    examples = tiny.random_examples(LENGTHS, tokenizer, seed=2)
    examples[3] = Example(examples[3].ids, 14, also_trained=((4, 7),))  # an earlier answer
    return load_causal_lm(path, tokenizer, dtype=torch.float32).train(), examples, tokenizer.pad_token_id


def packed(examples: list[Example], pad_id: int) -> SFTBatch:
    return collate_packed([members and [examples[row] for row in members] for members in PACKS], pad_id)


def logprobs_of(policy: CausalLM, batch: SFTBatch, with_positions: bool = True) -> torch.Tensor:
    """[trained tokens], row after row."""
    positions = batch.position_ids if with_positions else None
    found, _ = policy(batch.input_ids, batch.attention_mask, batch.loss_mask, position_ids=positions)
    return found[batch.loss_mask[:, 1:]]


def gradients_of(policy: CausalLM, logprobs: torch.Tensor) -> dict[str, torch.Tensor]:
    policy.zero_grad()
    (-logprobs.sum()).backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", PACKABLE)
def test_packed_examples_have_the_logprobs_and_the_gradient_of_examples_alone(
    family: str, folders: dict[str, str]
) -> None:
    policy, examples, pad_id = opened(folders[family])
    rows = [row for members in PACKS if members for row in members]
    alone = torch.cat([logprobs_of(policy, collate_sft([examples[row]], pad_id)) for row in rows])
    together = logprobs_of(policy, packed(examples, pad_id))
    # An example without a prompt trains all but its first token; one has 3 earlier tokens more.
    assert together.shape == alone.shape == (4 + 1 + 6 + 30 + (9 + 3) + 5 + 1,)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert alone.std() > 0.1  # not a uniform model, which would forgive any mistake
    expected, found = gradients_of(policy, alone), gradients_of(policy, together)
    assert found.keys() == expected.keys() and len(found) > 5
    for name, gradient in expected.items():
        scale = max(gradient.abs().max().item(), 1.0)
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("family", PACKABLE)
@torch.no_grad()
def test_without_positions_packed_examples_would_see_each_other(family: str, folders: dict[str, str]) -> None:
    """So the test above would notice. The first example of a sequence has nothing before it either way."""
    policy, examples, pad_id = opened(folders[family])
    batch = packed(examples, pad_id)
    apart = logprobs_of(policy, batch) - logprobs_of(policy, batch, with_positions=False)
    first, later = apart[:4], apart[4:11]  # of the first pack
    assert first.abs().max() < 1e-5
    assert later.abs().max() > 0.1


@torch.no_grad()
def test_positions_alone_do_not_keep_examples_apart(folders: dict[str, str]) -> None:
    """With a mask beside them attention goes across: the policy must not give transformers one."""
    policy, examples, pad_id = opened(folders["llama"])
    batch = packed(examples, pad_id)
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    across = policy.model(**inputs, attention_mask=batch.attention_mask.long()).logits.log_softmax(-1)
    found = across[:, :-1].gather(2, batch.input_ids[:, 1:, None])[..., 0][batch.loss_mask[:, 1:]]
    assert (found - logprobs_of(policy, batch))[4:11].abs().max() > 0.1


@pytest.mark.parametrize("family", PACKABLE)
def test_families_with_positions_are_packable(family: str, folders: dict[str, str]) -> None:
    assert check_packable(folders[family]) is None


def test_a_family_without_positions_is_refused(folders: dict[str, str]) -> None:
    with pytest.raises(UserError) as error:
        check_packable(folders["bloom"])
    assert str(error.value) == (
        f"{folders['bloom']}: a bloom model takes no position_ids, so packed rows would see each other; "
        "set `packing: false`"
    )


@pytest.mark.parametrize("noticed", [False, True])
def test_step_1_stops_at_a_model_that_sees_across_packed_rows(
    noticed: bool, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With eager attention OPT's own mask ignores positions; without ours it is such a model."""
    policy, examples, pad_id = opened(folders["opt"])
    policy.model.config._attn_implementation = "eager"
    settings = tiny.sft_config(tmp_path, folders["opt"], "unused.jsonl")
    if noticed:
        monkeypatch.setattr(loading, "MASK_WITHOUT_POSITIONS", ())
    refused = pytest.raises(UserError, match="this model attends across rows; set `packing: false`")
    with refused if noticed else contextlib.nullcontext():
        check_packing(policy, examples[:3], settings, pad_id, torch.device("cpu"))
