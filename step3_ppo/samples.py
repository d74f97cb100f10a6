"""Responses as a person reads them: text, score by part, KL, length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from step3_ppo.rewards import decode
from step3_ppo.rollout import Responses


def samples_of(found: Responses, tokenizer: Any, split: str, rows: Sequence[int]) -> list[dict[str, Any]]:
    """An entry of samples.jsonl for each of `rows`, without its step; `kl` in nats, `length` in tokens."""
    sequences, mask = found.sequences, found.sequences.response_mask
    prompts = decode(tokenizer, sequences.input_ids[:, : sequences.prompt_columns], sequences.prompt_mask, rows)
    responses = decode(tokenizer, sequences.responses, mask, rows)
    columns = {"score": found.scores, "kl": found.kl, "length": mask.sum(dim=1), "ended": sequences.ended}
    numbers = {name: column.tolist() for name, column in columns.items()}
    terms = {name: term.tolist() for name, term in found.terms.items()}
    return [
        {"split": split, "row": row, "prompt": prompt, "response": response}
        | {name: column[row] for name, column in numbers.items()}
        | {"scores": {name: term[row] for name, term in terms.items()}}
        for row, prompt, response in zip(rows, prompts, responses, strict=True)
    ]
