"""What a response is worth: the reward model, Python functions, or their weighted sum."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from step3_ppo.config import PPOConfig
from tristage import watchdog
from tristage.errors import UserError

TextScorer = Callable[[list[str], list[str]], list[float]]  # (prompts, responses) -> scores
TAKEN = ("model", "std", "clipfrac")  # objective/score_<name> is the reward model's score, or of all scores


class RewardTerm(NamedTuple):
    """A function of the reward, by its name in the metrics."""

    name: str
    function: TextScorer
    weight: float


def load_function(name: str, file: str, key: str) -> TextScorer:
    """The function that "package.module:function" names. Raises UserError when it cannot be imported."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"{file}: key `{key}`: {name} cannot be imported ({error}); write module:function") from None
    if not callable(found):
        raise UserError(f"{file}: key `{key}`: {name} is no function; write module:function")
    return found  # type: ignore[no-any-return]


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


def score_texts(
    function: TextScorer, prompts: list[str], responses: list[str], name: str
) -> torch.Tensor:
    """[B] float32 on the CPU. Raises UserError when the function fails or gives no finite number for a response."""
    try:
        with watchdog.doing(name):
            scores = [float(score) for score in function(prompts, responses)]
    except Exception as error:  # whatever a user's function raises
        raise UserError(f"{name} failed on {len(prompts)} responses ({type(error).__name__}: {error})") from error
    if len(scores) != len(responses) or not all(map(math.isfinite, scores)):
        raise UserError(f"{name} must give one finite number for each of {len(responses)} responses, gave {scores[:8]}")
    return torch.tensor(scores, dtype=torch.float32)


def decode(tokenizer: Any, ids: torch.Tensor, mask: torch.Tensor, rows: Sequence[int] | None = None) -> list[str]:
    """ids [B,T], mask [B,T] -> the text of each row (or of some), without special tokens and outer white space."""
    kept = [ids[row][mask[row]].tolist() for row in (range(len(ids)) if rows is None else rows)]
    return [text.strip() for text in tokenizer.batch_decode(kept, skip_special_tokens=True)]
