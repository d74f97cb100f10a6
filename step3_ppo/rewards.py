"""What a response is worth: the reward model, in the actor's tokens or its own, Python functions, a weighted sum."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from step3_ppo.config import PPOConfig, RewardFunction
from step3_ppo.engines import Engines
from tristage import dist
from tristage.algo.masking import masked_mean
from tristage.answering.scorers import Calls, Scored, TextScorer, load_function, score_texts, takes_rows
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
from tristage.rollout import RolloutError

TAKEN = ("model", "std", "clipfrac")  # objective/score_<name> is the reward model's score, or of all scores


class RewardError(RolloutError):
    """A reward function failed on a rank; every rank raises it."""


class RewardTerm(NamedTuple):
    """A function of the reward."""

    settings: RewardFunction
    function: TextScorer

    @property
    def name(self) -> str:
        return self.settings.name


def load_functions(settings: PPOConfig) -> tuple[list[RewardTerm], TextScorer | None]:
    """The functions of `reward.functions`, and that of `grader`. Raises UserError: one is missing, or reads rows that
    `reward.labels` does not name.
    """
    file, labels = settings.file, settings.reward.labels
    terms = [
        RewardTerm(each, load_function(each.function, file, "reward.functions")) for each in settings.reward.functions
    ]
    grader = None if settings.grader is None else load_function(settings.grader, file, "grader")
    named = [(term.settings.function, term.function) for term in terms]
    named += [] if grader is None else [(str(settings.grader), grader)]
    reading = [name for name, function in named if takes_rows(function)]
    if reading and not labels:
        raise UserError(f"{file}: {reading[0]} reads `rows`; name the columns that it needs in `reward.labels`")
    if labels and not reading:
        raise UserError(f"{file}: key `reward.labels` has no effect: no function has a parameter `rows`; remove it")
    _check_names(settings, [term.name for term in terms])
    return terms, grader


def _check_names(settings: PPOConfig, names: list[str]) -> None:
    for name in names:
        if name in TAKEN:
            raise UserError(
                f"{settings.file}: key `reward.functions`: `{name}` names another number of the reward; "
                "rename the function"
            )
    if len(set(names)) < len(names):
        raise UserError(f"{settings.file}: key `reward.functions`: two functions are called alike; rename one of them")


def function_scores(
    terms: Sequence[RewardTerm], tokenizer: Any, sequences: Sequences, batch: PromptBatch
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """([B] of each function by its name, [B] of each extra number by "function/name"). A collective.

    Functions see real rows alone. A filler has 0, and nan for extra numbers, which count nowhere.

    Raises:
        RewardError: on every rank.
    """
    real = batch.is_real.nonzero().flatten()
    rows, count = real.tolist(), len(batch.is_real)
    prompts = decode(tokenizer, sequences.input_ids[:, : sequences.prompt_columns], sequences.prompt_mask, rows)
    responses = decode(tokenizer, sequences.responses, sequences.response_mask, rows)
    labels = None if batch.labels is None else [batch.labels[row] for row in rows]
    found: dict[str, Scored] = {}
    problem = None
    try:
        for term in terms if rows else ():
            calls = Calls(term.settings.timeout_seconds, term.settings.retries)
            name = f"reward function {term.name}"
            found[term.name] = score_texts(term.function, prompts, responses, name, labels, calls)
    except UserError as error:
        problem = str(error)
    extra = {f"{name}/{key}": numbers for name, scored in found.items() for key, numbers in scored.extra.items()}
    of_ranks = dist.gather_objects((problem, list(extra)))
    for rank, (failed, _) in enumerate(of_ranks):
        if failed is not None:
            raise RewardError(failed if len(of_ranks) == 1 else f"rank {rank}: {failed}")

    def spread(numbers: torch.Tensor | None, filler: float) -> torch.Tensor:
        whole = torch.full((count,), filler, device=real.device)
        return whole if numbers is None else whole.index_copy(0, real, numbers.to(real.device))

    names = dict.fromkeys(key for _, keys in of_ranks for key in keys)  # a rank of fillers has none of its own
    scores = {term.name: spread(found[term.name].scores if rows else None, 0.0) for term in terms}
    return scores, {name: spread(extra.get(name), math.nan) for name in names}


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
