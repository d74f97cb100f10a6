"""Scores answers typed at a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from step2_reward_model.config import RewardModelConfig
from tristage import dist
from tristage.data.collate import collate_sft
from tristage.data.rows import RankingRow, Unusable
from tristage.data.tokenize import EncodingRules, encode
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
            results = scores(engine, settings, tokenizer, device, prompt, answers) if answers else []
        except (UserError, Unusable) as reason:
            print(f"not scored: {reason}", flush=True)
            continue
        for score, answer in sorted(zip(results, answers, strict=True), key=lambda pair: -pair[0]):
            print(f"{score:9.3f}  {answer}", flush=True)


@torch.no_grad()
def scores(
    engine: Any, settings: RewardModelConfig, tokenizer: Any, device: torch.device, prompt: str, answers: list[str]
) -> list[float]:
    """One score per answer. Raises UserError or Unusable: an answer cannot be rendered, or is too long."""
    turns = ({"role": "user", "content": prompt},)
    ranks = tuple(map(float, range(len(answers))))  # meaningless: a ranking row is how answers share a prompt
    rules = EncodingRules("ranking", settings.max_tokens, settings.data.too_long)
    (encoded,) = encode([RankingRow(turns, tuple(answers), ranks, "what you typed")], tokenizer, rules)
    if isinstance(encoded, Exception):
        raise encoded
    item, _ = encoded
    assert isinstance(item, tuple)
    batch = collate_sft(item[0], tokenizer.pad_token_id).to(device)
    engine.eval()
    return last_token_scores(engine(batch.input_ids, batch.attention_mask), batch.attention_mask).tolist()


def require_one_rank() -> None:
    """Raises UserError on several ranks, which cannot share a keyboard."""
    if dist.world_size() > 1:
        raise UserError("--interactive runs on one rank; start it without the launcher")


def _ask(what: str, lines: Iterator[str]) -> str:
    print(f"{what}> ", end="", flush=True)
    return next(lines, "").strip()
