"""A chat template is a program that came with a model: tried on short dialogues before a row is rendered.

The trial is a separate process, since nothing in this one can stop a loop in a template or bound what it allocates.
It is forked, which takes 20 ms, while a new process would import transformers for seconds; it only runs Jinja and ends,
so it does not need this process's threads. If it hangs nonetheless, the template passes.

This bounds time and memory for short dialogues of all roles, but not what a template does with some rows only: it may
multiply a long content a thousand times, or wait for a certain word.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import signal
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn

from transformers.utils.chat_template_utils import render_jinja_template

from tristage.errors import UserError

MEMORY, CPU_SECONDS = 2**30, 5
SECONDS = 60.0  # by the clock, after which a trial that got no processor is given up
_TURNS = [{"role": role, "content": "Hi"} for role in ("system", "user", "assistant", "user", "assistant")]
_DIALOGUES = (_TURNS[1:2], _TURNS[1:3], _TURNS[:2], _TURNS)


def refuse_endless(tokenizer: Any, name: str) -> None:
    """Raises UserError for a chat template that takes more than CPU_SECONDS or MEMORY for short dialogues."""
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    if not _ends(tokenizer.chat_template, special, MEMORY, CPU_SECONDS):
        raise UserError(
            f"{name}: the chat template takes more than {CPU_SECONDS} seconds or {MEMORY >> 20} MiB for a short "
            "dialogue; fix it, or give another `data.template`"
        )


@functools.lru_cache(maxsize=16)  # the folders of a step share a template
def _ends(template: str, special: str, memory: int, cpu_seconds: int) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of a fork in a process with threads
        child = os.fork()
    if child == 0:
        _render_dialogues(template, json.loads(special), memory, cpu_seconds)
    deadline = time.monotonic() + SECONDS
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(ended[1]) == 0


def _render_dialogues(template: str, special: dict[str, Any], memory: int, cpu_seconds: int) -> NoReturn:
    """Exit with 0 unless one takes too much; over `cpu_seconds` the kernel ends this process."""
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
        with contextlib.suppress(OSError):  # no /proc outside Linux
            memory += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        for turns in _DIALOGUES:
            for prompt in (False, True):
                try:
                    render_jinja_template([turns], chat_template=template, add_generation_prompt=prompt, **special)
                except (MemoryError, OverflowError, RecursionError):
                    raise
                except Exception:  # it refuses such a dialogue, and will be reported for a row that is one
                    continue
        code = 0
    finally:
        os._exit(code)
