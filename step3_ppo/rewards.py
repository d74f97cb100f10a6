"""What a response is worth: the reward model, in the actor's tokens or its own, Python functions, a weighted sum."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from step3_ppo.config import PPOConfig
from step3_ppo.engines import Engines
from tristage.algo.masking import masked_mean
from tristage.answering.scorers import TextScorer, load_function
from tristage.batches import PromptBatch, Sequences
from tristage.data.collate import collate_sft, pick
from tristage.data.loader import WIDTH
from tristage.data.rows import SFTRow
from tristage.data.store import Rows
from tristage.data.tokenize import EncodingRules, Example, encode, encode_sampled
from tristage.errors import UserError
from tristage.models.loading import max_positions
from tristage.models.reward_model import last_token_scores
from tristage.models.tokenizer import load_tokenizer

TAKEN = ("model", "std", "clipfrac")  # objective/score_<name> is the reward model's score, or of all scores


class RewardTerm(NamedTuple):
    """A function of the reward, by its name in the metrics."""

    name: str
    function: TextScorer
    weight: float


def load_grader(settings: PPOConfig) -> TextScorer | None:
    """The function that `grader` names, if any. Raises UserError."""
    return None if settings.grader is None else load_function(settings.grader, settings.file, "grader")


def load_reward_terms(settings: PPOConfig) -> list[RewardTerm]:
    """The functions of `reward.functions`. Raises UserError."""
    terms = []
    for each in settings.reward.functions:
        function = load_function(each.function, settings.file, "reward.functions")
        terms.append(RewardTerm(each.function.rpartition(":")[2], function, each.weight))
    names = [term.name for term in terms]
    for name in names:
        if name in TAKEN:
            raise UserError(
                f"{settings.file}: key `reward.functions`: `{name}` names another number of the reward; "
                "rename the function"
            )
    if len(set(names)) < len(names):
        raise UserError(f"{settings.file}: key `reward.functions`: two functions are called alike; rename one of them")
    return terms


def decode(tokenizer: Any, ids: torch.Tensor, mask: torch.Tensor, rows: Sequence[int] | None = None) -> list[str]:
    """ids [B,T], mask [B,T] -> the text of each row (or of some), without special tokens and outer white space."""
    texts = _decode_whole(tokenizer, ids, mask)
    return [texts[row].strip() for row in (range(len(ids)) if rows is None else rows)]


def _decode_whole(tokenizer: Any, ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
    kept = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
    return list(tokenizer.batch_decode(kept, skip_special_tokens=True))


def pooled(values: torch.Tensor, mask: torch.Tensor, answer_mask: torch.Tensor, how: str) -> torch.Tensor:
    """values, mask, answer_mask [b,T] -> [b]: a response's score, `how` of `reward.score`."""
    return last_token_scores(values, mask) if how == "last" else masked_mean(values, answer_mask, 1)


# -- a reward model with a tokenizer and template of its own (reward.own_tokenizer) ---------------------------


def retokenized_scores(
    engines: Engines, tokenizer: Any, sequences: Sequences, batch: PromptBatch, settings: PPOConfig
) -> torch.Tensor:
    """[B]: the prompts' turns and the decoded responses, rendered and scored as the reward model reads them.

    Every rank makes as many forwards; a filler's score is of no row and counts nowhere.
    """
    assert batch.turns is not None, "prompts without their turns"
    texts = _decode_whole(tokenizer, sequences.responses, sequences.response_mask)
    limit = max_positions(engines.reward.module.model.config)
    examples: list[Example | None] = [
        None if turns is None else encode_sampled(turns, text, ended, engines.reward_tokenizer, limit)
        for turns, text, ended in zip(batch.turns, texts, sequences.ended.tolist(), strict=True)
    ]
    device, scores = sequences.input_ids.device, []
    order = torch.tensor([0 if example is None else -len(example.ids) for example in examples]).argsort(stable=True)
    for micro in order.split(WIDTH[device.type] * settings.micro_rows):
        made = collate_sft(pick(examples, micro.tolist()), engines.reward_tokenizer.pad_token_id).to(device)
        values = engines.reward(made.input_ids, made.attention_mask)
        scores.append(pooled(values, made.attention_mask, made.loss_mask, settings.reward.score))
    return torch.cat(scores)[order.argsort().to(device)]


def check_turns(settings: PPOConfig, *sets: Rows) -> None:
    """With reward.own_tokenizer: one prompt of each sequence of roles is rendered for the reward model.

    Raises:
        UserError: its template refuses such a dialogue, or its tokenizer does not know its EOS.
    """
    if not settings.reward.own_tokenizer:
        return
    tried: dict[tuple[str, ...], SFTRow] = {}
    for rows in sets:
        for i in range(len(rows)):
            turns = rows.turns(i)
            where = f"reward.model ({settings.reward.model}), {rows.where(i)}"
            tried.setdefault(tuple(turn["role"] for turn in turns), SFTRow(turns, "answer", where))
    policy = EncodingRules("sft", sys.maxsize, train_on="last_answer")
    tokenizer = load_tokenizer(str(settings.reward.model), trust_remote_code=settings.trusts("reward"))
    for found in encode(list(tried.values()), tokenizer, policy):
        if isinstance(found, Exception):
            raise found
