"""Python functions that score texts: (prompts, responses) -> scores, named "package.module:function"."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import torch

from tristage.dist import progress
from tristage.errors import UserError

TextScorer = Callable[[list[str], list[str]], list[float]]  # (prompts, responses) -> scores


def load_function(name: str, file: str, key: str) -> TextScorer:
    """The function that "package.module:function" names. Raises UserError when it cannot be imported."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a user's module raises, SystemExit included
        raise UserError(
            f"{file}: key `{key}`: {name} cannot be imported ({_in_one_line(error)}); write module:function"
        ) from error
    if not callable(found):
        raise UserError(f"{file}: key `{key}`: {name} is not a function; write module:function")
    return found  # type: ignore[no-any-return]


def score_texts(function: TextScorer, prompts: list[str], responses: list[str], name: str) -> torch.Tensor:
    """[B] float32 on the CPU; the function gets lists of its own, which it may change.

    Raises:
        UserError: it fails, or does not give one finite number for each response.
    """
    try:
        with progress.doing(name):
            scores = [float(score) for score in function(list(prompts), list(responses))]
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a user's function raises, SystemExit included
        raise UserError(f"{name} failed on {len(prompts)} responses ({_in_one_line(error)})") from error
    if len(scores) != len(responses) or not all(map(math.isfinite, scores)):
        raise UserError(f"{name} must give one finite number for each of {len(responses)} responses, gave {scores[:8]}")
    return torch.tensor(scores, dtype=torch.float32)


def _in_one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
