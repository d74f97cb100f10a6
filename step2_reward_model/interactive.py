"""Answers that are typed in, scored and sorted: how a reward model is got to know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from step2_reward_model.config import RewardModelConfig
from tristage import dist
from tristage.data.collate import collate_sft
from tristage.data.rows import RankingRow, Unusable
from tristage.data.tokenize import Policy, encode
from tristage.errors import UserError
from tristage.models.reward_model import last_token_scores


def score_typed(
    engine: Any, settings: RewardModelConfig, tokenizer: Any, device: torch.device, lines: Iterator[str]
) -> None:
    """A prompt, its answers, a blank line: prints the answers' scores, best first. Then the next, until `lines` end.

    A line is one prompt or answer; they are rendered with the model's chat template, as in training.
    """
    while prompt := _ask("prompt", lines):
        answers = list(iter(lambda: _ask("answer (blank: score them)", lines), ""))
        try:
            found = scores(engine, settings, tokenizer, device, prompt, answers) if answers else []
        except (UserError, Unusable) as reason:
            print(f"not scored: {reason}", flush=True)
            continue
        for score, answer in sorted(zip(found, answers, strict=True), key=lambda pair: -pair[0]):
            print(f"{score:9.3f}  {answer}", flush=True)


@torch.no_grad()
def scores(
    engine: Any, settings: RewardModelConfig, tokenizer: Any, device: torch.device, prompt: str, answers: list[str]
) -> list[float]:
    """One score an answer. Raises UserError or Unusable: one that can't be rendered, or is too long."""
    turns = ({"role": "user", "content": prompt},)
    ranks = tuple(map(float, range(len(answers))))  # of no meaning: a ranking row is how answers share a prompt
    policy = Policy("ranking", settings.max_tokens, settings.data.too_long)
    (found,) = encode([RankingRow(turns, tuple(answers), ranks, "what you typed")], tokenizer, policy)
    if isinstance(found, Exception):
        raise found
    item, _ = found
    assert isinstance(item, tuple)
    batch = collate_sft(item[0], tokenizer.pad_token_id).to(device)
    engine.eval()
    return last_token_scores(engine(batch.input_ids, batch.attention_mask), batch.attention_mask).tolist()


def check_alone() -> None:
    """Raises UserError on several ranks, which can't share a keyboard."""
    if dist.world_size() > 1:
        raise UserError("--interactive: several ranks can't share a keyboard; run it without the launcher")


def _ask(what: str, lines: Iterator[str]) -> str:
    print(f"{what}> ", end="", flush=True)
    return next(lines, "").strip()
