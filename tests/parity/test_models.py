"""The policy and the reward model say what transformers' own models say, whatever stands beside a row in its batch.

One process, plain modules, no DeepSpeed engine.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.helpers import tiny
from tristage.batches import MicroBatch, Sequences
from tristage.data.collate import collate_prompts, collate_sft
from tristage.data.tokenize import Example
from tristage.errors import UserError
from tristage.models.causal_lm import CausalLM, load_causal_lm
from tristage.models.reward_model import RewardModel, last_token_scores, load_reward_model
from tristage.models.tokenizer import load_tokenizer

QUICKSTART = ("llama", "opt", "gpt2")
FAMILIES = (*QUICKSTART, *tiny.FAMILIES)
LENGTHS = [(9, 4), (3, 1), (1, 30), (14, 9), (5, 6)]  # prompt, answer


class Folders:
    """Model folders, written when first asked for: `folders("opt", pad_is_eos=True)`."""

    def __init__(self, base: Path):
        self.base = base

    def __call__(self, family: str, pad_is_eos: bool = False) -> str:
        folder = self.base / f"{family}_{pad_is_eos}"
        if folder.is_dir():
            return str(folder)
        if pad_is_eos:  # the same weights
            tiny.copy_with_pad_as_eos(self(family), folder)
        else:
            tiny.write_model(folder, family, gain=3.0)
        return str(folder)

    def reward(self, family: str, pad_is_eos: bool = False) -> str:
        folder = self.base / f"reward_{family}_{pad_is_eos}"
        if not folder.is_dir():
            tiny.write_reward_model(folder, self(family, pad_is_eos))
        return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("models"))


def open_policy(path: str, **options: Any) -> CausalLM:
    return load_causal_lm(path, load_tokenizer(path), dtype=torch.float32, **options)


def open_scorer(path: str, **options: Any) -> RewardModel:
    return load_reward_model(path, load_tokenizer(path), dtype=torch.float32, **options)


def rows_of(path: str) -> list[Example]:
    return tiny.random_examples(LENGTHS, load_tokenizer(path), seed=2)


def pad(rows: list[Example], pad_id: int, side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, attention mask, answer mask), each [B,T]."""
    batch = collate_sft(rows, pad_id)
    if side == "right":
        return batch.input_ids, batch.attention_mask, batch.loss_mask
    left = collate_prompts(rows, range(len(rows)), pad_id)
    columns = torch.arange(left.input_ids.shape[1])
    answers = torch.tensor([len(row.ids) - row.prompt_length for row in rows])
    return left.input_ids, left.attention_mask, columns >= len(columns) - answers[:, None]


def alone(row: Example) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return pad([row], 0, "right")


def answers(x: torch.Tensor, wanted: torch.Tensor) -> list[torch.Tensor]:
    """[B,T-1] -> each row's values at its answer tokens; also checks that there is nothing elsewhere."""
    assert torch.equal(x[~wanted[:, 1:]], torch.zeros_like(x[~wanted[:, 1:]]))
    return [row[keep] for row, keep in zip(x, wanted[:, 1:], strict=True)]


# ---- the policy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", (1.0, 0.6))
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logprobs_and_entropy_are_those_of_transformers_own_logits(
    family: str, temperature: float, folders: Folders
) -> None:
    path = folders(family)
    policy, theirs = open_policy(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    assert policy.plain_head is (family not in ("gemma2", "granite"))
    ids, mask, wanted = pad(rows_of(path), policy.model.config.eos_token_id, "right")
    logprobs, entropy = policy(ids, mask, wanted, temperature, with_entropy=True)
    spread = []
    for row, example in enumerate(rows_of(path)):
        expected = torch.log_softmax(theirs(torch.tensor([example.ids])).logits[0].double() / temperature, -1)
        places = torch.arange(example.prompt_length, len(example.ids))
        own = expected[places - 1, torch.tensor(example.ids)[places]]
        torch.testing.assert_close(logprobs[row, places - 1].double(), own, rtol=0, atol=2e-5)
        expected_entropy = -(expected.exp() * expected).sum(-1)[places - 1]
        torch.testing.assert_close(entropy[row, places - 1].double(), expected_entropy, rtol=0, atol=2e-5)
        spread.append(own)
    assert torch.cat(spread).std() > 0.1  # not a uniform model, which would forgive any shift


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_policy_rows_do_not_depend_on_their_neighbours_or_padding(family: str, folders: Folders) -> None:
    path = folders(family)
    policy, rows = open_policy(path), rows_of(path)
    single = [[answers(x, alone(row)[2])[0] for x in policy(*alone(row), with_entropy=True)] for row in rows]
    for side in ("right", "left"):
        ids, mask, wanted = pad(rows, policy.model.config.eos_token_id, side)
        for which, found in enumerate(policy(ids, mask, wanted, with_entropy=True)):
            for row, values in enumerate(answers(found, wanted)):
                torch.testing.assert_close(values, single[row][which], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", QUICKSTART)
@torch.no_grad()
def test_pad_that_is_eos_changes_no_number(family: str, folders: Folders) -> None:
    """EOS in the middle of a prompt included: masks come from lengths."""
    found = []
    for pad_is_eos in (False, True):
        path = folders(family, pad_is_eos)
        tokenizer = load_tokenizer(path)
        assert (tokenizer.pad_token_id == tokenizer.eos_token_id) is pad_is_eos
        rows = [dataclasses.replace(row, ids=[*row.ids]) for row in rows_of(folders(family))]
        rows[0].ids[3] = tokenizer.eos_token_id  # a turn's end
        for side in ("right", "left"):
            ids, mask, wanted = pad(rows, tokenizer.pad_token_id, side)
            scores = last_token_scores(open_scorer(folders.reward(family, pad_is_eos))(ids, mask), mask)
            logprobs = torch.cat(answers(open_policy(path)(ids, mask, wanted)[0], wanted))
            found.append(torch.cat([logprobs, scores]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_temperature_of_one_half_squares_the_odds(folders: Folders) -> None:
    policy = open_policy(folders("llama"))
    ids = torch.tensor([[5, 9, 7], [5, 9, 8]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    wanted = torch.tensor([[False, False, True]] * 2)
    odds = {t: policy(ids, mask, wanted, t)[0][:, 1].diff() for t in (1.0, 0.5)}
    torch.testing.assert_close(odds[0.5], 2 * odds[1.0])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(family: str, folders: Folders) -> None:
    for load, path in ((open_policy, folders(family)), (open_scorer, folders.reward(family))):
        found = []
        for checkpointing in (False, True):
            model = load(path, gradient_checkpointing=checkpointing).train()
            ids, mask, wanted = pad(rows_of(path), 0, "right")
            total = model(ids, mask, wanted)[0].sum() if load is open_policy else (model(ids, mask) * mask).sum()
            total.backward()
            found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert found[0].keys() == found[1].keys() and len(found[0]) > 5
        for name, gradient in found[0].items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-6 * max(scale, 1.0))


def test_dropout_is_off_although_the_config_has_it_on(tmp_path: Path) -> None:
    path = tiny.write_model(tmp_path, "gpt2", gain=4.0)
    config = AutoConfig.from_pretrained(path)
    config.update({"resid_pdrop": 0.1, "attn_pdrop": 0.1, "embd_pdrop": 0.1})
    config.save_pretrained(path)
    ids, mask, wanted = pad(rows_of(path), 0, "right")
    theirs = AutoModelForCausalLM.from_pretrained(path).train()
    assert not torch.equal(theirs(ids).logits, theirs(ids).logits)  # it would drop
    policy, scorer = open_policy(path).train(), open_scorer(path, new_head_seed=0).train()
    assert torch.equal(policy(ids, mask, wanted)[0], policy(ids, mask, wanted)[0])
    assert torch.equal(scorer(ids, mask), scorer(ids, mask))


# ---- the shift ------------------------------------------------------------------------------------------------------


class Echo(torch.nn.Module):
    """Says of position t: log-probability and value 10 * ids[t] + 1, so that every slot tells where it comes from."""

    def logprobs(self, micro: MicroBatch) -> torch.Tensor:
        return (10 * micro.ids + 1)[:, :-1].float()

    def values(self, micro: MicroBatch) -> torch.Tensor:
        return (10 * micro.ids + 1).float()


def test_the_number_of_a_response_token_comes_from_the_position_before_it() -> None:
    """Prompt 5 6, response 7 2(EOS): token 7 is predicted where 6 stands, EOS where 7 stands."""
    whole = torch.ones(1, 4, dtype=torch.bool)
    sequences = Sequences(torch.tensor([[5, 6, 7, 2]]), whole, stop_ids=(2,), prompt_columns=2)
    micro = sequences.micro_batch(torch.tensor([0]))
    assert micro.score_mask.tolist() == [[False, False, True, True]]
    assert micro.align(Echo().logprobs(micro)).tolist() == [[61, 71]]
    assert micro.before_response(Echo().values(micro)).tolist() == [[61, 71]]
    assert sequences.ended.tolist() == [True]


def test_responses_of_length_one_and_of_full_length_keep_their_slots() -> None:
    """Pad is EOS (2). Row 0: a long prompt, EOS at once. Row 1: a short prompt, three tokens and no EOS."""
    sequences = Sequences(
        torch.tensor([[3, 4, 5, 2, 2, 2], [2, 2, 6, 7, 8, 9]]),
        torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]).bool(), stop_ids=(2,), prompt_columns=3,
    )  # fmt: skip
    assert sequences.ended.tolist() == [True, False]
    for rows, logprobs, columns in (
        ([0, 1], [[51, 21, 21], [61, 71, 81]], 6),
        ([0], [[51, 0, 0]], 4),  # trimmed on the right, padded back
        ([1], [[61, 71, 81]], 4),  # trimmed on the left
        ([1, 0], [[61, 71, 81], [51, 21, 21]], 6),
    ):
        micro = sequences.micro_batch(torch.tensor(rows))
        assert micro.ids.shape[1] == columns
        assert micro.align(Echo().logprobs(micro)).tolist() == logprobs
        assert micro.before_response(Echo().values(micro)).tolist() == logprobs
        assert torch.equal(micro.score_mask.sum(dim=1), sequences.response_mask[rows].sum(dim=1))


@torch.no_grad()
def test_aligned_logprobs_and_values_do_not_depend_on_the_micro_batch(folders: Folders) -> None:
    path = folders("llama")
    tokenizer, rows = load_tokenizer(path), rows_of(path)
    prompts = collate_prompts([Example(row.ids[: row.prompt_length], 0) for row in rows], range(len(rows)), 0)
    responses = collate_sft([Example(row.ids[row.prompt_length :], 0) for row in rows], tokenizer.pad_token_id)
    sequences = Sequences(
        torch.cat([prompts.input_ids, responses.input_ids], 1),
        torch.cat([prompts.attention_mask, responses.attention_mask], 1), (tokenizer.eos_token_id,),
        prompts.input_ids.shape[1],
    )  # fmt: skip
    policy, critic = open_policy(path), open_scorer(folders.reward("llama"))
    for row, example in enumerate(rows):
        own = policy(*alone(example))[0][0, example.prompt_length - 1 :]
        own_values = critic(*alone(example)[:2])[0, example.prompt_length - 1 : -1]
        for others in ([row], [row, (row + 1) % 5], [row, *range(5)]):
            micro = sequences.micro_batch(torch.tensor(others))
            logprobs = micro.align(policy(micro.ids, micro.mask, micro.score_mask)[0])
            values = micro.before_response(critic(micro.ids, micro.mask))
            assert logprobs.shape == values.shape == (len(others), sequences.response_mask.shape[1])
            kept = sequences.response_mask[row]
            torch.testing.assert_close(logprobs[0][kept], own, rtol=0, atol=1e-5)
            torch.testing.assert_close(values[0][kept], own_values, rtol=0, atol=1e-5)
            assert logprobs[0][~kept].eq(0).all()


# ---- reward model and critic ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_new_head_is_normal_with_variance_one_over_h_plus_one(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(tiny.write_model(tmp_path, "gpt2"))
    config.update({"n_embd": 4096, "n_inner": 8, "n_layer": 0, "n_head": 1})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    heads = [open_scorer(str(tmp_path), new_head_seed=seed).model.score.weight[0] for seed in (0, 1, 0)]
    for head in heads:
        scaled = head * 4097**0.5
        assert abs(scaled.mean()) < 4 / 64  # four standard errors of 4096 draws
        assert abs(scaled.std() - 1) < 4 / (2 * 4096) ** 0.5
        assert 0.66 < (scaled.abs() < 1).float().mean() < 0.71
    assert torch.equal(heads[0], heads[2]) and not torch.equal(heads[0], heads[1])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_values_are_the_head_at_every_position_whatever_the_padding(family: str, folders: Folders) -> None:
    path = folders.reward(family)
    scorer, rows = open_scorer(path), rows_of(path)
    theirs = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    expected = [theirs.score(theirs.base_model(torch.tensor([row.ids])).last_hidden_state)[0, :, 0] for row in rows]
    for side in ("right", "left"):
        ids, mask, _ = pad(rows, theirs.config.eos_token_id, side)
        values = scorer(ids, mask)
        assert values.dtype == torch.float32
        scores = last_token_scores(values, mask)
        for row, own in enumerate(expected):
            torch.testing.assert_close(values[row][mask[row]], own, rtol=0, atol=2e-5)
            torch.testing.assert_close(scores[row], own[-1], rtol=0, atol=2e-5)
    assert torch.cat(expected).std() > 0.1


def test_the_score_stands_at_the_last_real_token() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 3)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 0]]).bool()
    assert last_token_scores(values, mask).tolist() == [2.0, 4.0, 1.0]


@pytest.mark.parametrize("pad_is_eos", (False, True))
@pytest.mark.parametrize("family", QUICKSTART)
@torch.no_grad()
def test_other_tools_open_the_reward_folder_and_get_the_same_scores(
    family: str, pad_is_eos: bool, folders: Folders
) -> None:
    path = folders.reward(family, pad_is_eos)
    scorer, rows = open_scorer(path), rows_of(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert model.config.num_labels == 1
    ids, mask, _ = pad(rows, tokenizer.pad_token_id, "right")
    scores = last_token_scores(scorer(ids, mask), mask)
    if pad_is_eos:  # transformers finds the end by `id != pad`, which would pass over EOS; a row has no padding
        theirs = torch.cat([model(torch.tensor([row.ids])).logits for row in rows])
        with pytest.raises(ValueError, match="padding token"):
            model(ids, attention_mask=mask.long())
    else:
        theirs = model(ids, attention_mask=mask.long()).logits
    torch.testing.assert_close(theirs[:, 0], scores, rtol=0, atol=1e-5)


def test_a_language_model_is_no_trained_reward_model(folders: Folders) -> None:
    path = folders("llama")
    with pytest.raises(UserError, match="holds no reward model") as error:
        open_scorer(path)
    assert path in str(error.value) and "final folder" in str(error.value)


def test_rows_longer_than_the_models_positions_are_refused(folders: Folders) -> None:
    for load in (open_policy, open_scorer):
        with pytest.raises(UserError, match="128 positions"):
            load(folders("gpt2"), max_tokens=129)
