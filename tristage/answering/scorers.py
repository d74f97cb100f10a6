"""Python functions that score texts, named "package.module:function".

    def score(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]

`rows` may be left out. A function may return (scores, {name: numbers}) for more numbers of each response to look at.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from tristage.dist import progress
from tristage.errors import UserError

TextScorer = Callable[..., Any]  # see the module


class Calls(NamedTuple):
    """How a function that may fail or hang is called."""

    timeout_seconds: float | None = None
    retries: int = 0  # after the first call; 1, 2, 4, ... seconds apart


ONE_CALL = Calls()


class Scored(NamedTuple):
    """What a function says of B responses."""

    scores: torch.Tensor  # [B] float32
    extra: dict[str, torch.Tensor]  # name -> [B] float32, nan where it gave None


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


def takes_rows(function: TextScorer) -> bool:
    """Whether it has a parameter `rows`."""
    try:
        return "rows" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # built in
        return False


def score_texts(
    function: TextScorer,
    prompts: list[str],
    responses: list[str],
    name: str,
    rows: Sequence[dict[str, Any]] | None = None,
    calls: Calls = ONE_CALL,
) -> Scored:
    """What the function says of B responses; its arguments are its own, it may change them.

    Raises:
        UserError: every call failed or took too long, or it does not give one finite number for each response.
    """
    given = {"rows": rows} if rows is not None and takes_rows(function) else {}

    def call() -> Any:
        return function(list(prompts), list(responses), **copy.deepcopy(given))

    with progress.doing(name):
        for attempt in range(calls.retries + 1):
            try:
                found = call() if calls.timeout_seconds is None else _within(calls.timeout_seconds, call)
                break
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # whatever a user's function raises, SystemExit included
                if attempt == calls.retries:
                    times = f" {attempt + 1} times" if attempt else ""
                    raise UserError(
                        f"{name} failed{times} on {len(prompts)} responses ({_in_one_line(error)})"
                    ) from error
                time.sleep(2**attempt)
    return _read(found, len(responses), name)


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """What `call` returns or raises. Raises TimeoutError after `seconds`; its thread is left behind."""
    answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def answer() -> None:
        try:
            answers.put((True, call()))
        except BaseException as error:
            answers.put((False, error))

    threading.Thread(target=answer, daemon=True).start()
    try:
        returned, found = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds:g} s") from None
    if returned:
        return found
    raise found


def _read(found: Any, count: int, name: str) -> Scored:
    with_extra = isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)
    scores, extra = found if with_extra else (found, {})
    values = _numbers(scores, name)
    if len(values) != count or not all(map(math.isfinite, values)):
        raise UserError(f"{name} must give one finite number for each of {count} responses, gave {values[:8]}")
    more = {}
    for key, numbers in extra.items():
        read = _numbers(numbers, f"{name}: {key}", none=math.nan)
        if len(read) != count or any(map(math.isinf, read)):
            raise UserError(
                f"{name} must give a number or None as `{key}` for each of {count} responses, gave {read[:8]}"
            )
        more[str(key)] = torch.tensor(read, dtype=torch.float32)
    return Scored(torch.tensor(values, dtype=torch.float32), more)


def _numbers(values: Any, name: str, none: Any = None) -> list[float]:
    """`values` as floats, each None as `none`. Raises UserError."""
    try:
        return [float(none if value is None else value) for value in values]
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} gave what is not a list of numbers ({_in_one_line(error)})") from error


def _in_one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
