"""Turns to text, through the tokenizer's own chat template, so that every step writes a dialogue the same way.

A rendered row is cut in two: the prompt, which ends where a rollout starts to sample, and the answer, which
ends with exactly one EOS. The EOS is part of the answer: that is how the model learns to stop.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from tristage.config import RunSettings, find_file
from tristage.data.rows import Turn
from tristage.errors import UserError

Tokenizer = Any  # a Hugging Face tokenizer
Span = tuple[int, int]  # start, stop

DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '\\n\\nAssistant: ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)

_GENERATION_TAG = re.compile(r"{%-?\s*generation\s*-?%}")
_REWRITES = (
    "{where}: the tokenizer's chat template writes earlier turns differently once others follow, so they can't be "
    "trained on; set `data.train_on: last_answer`, or give another `data.template`"
)


def read_template(settings: RunSettings) -> str | None:
    """The text of `data.template`. Raises UserError: no such file, or not Jinja."""
    if settings.data.template is None:
        return None
    return template_text(find_file(settings.data.template, settings, "data.template"))


def template_text(file: Path) -> str:
    """The text of a file with a Jinja template. Raises UserError: no such file, or not Jinja."""
    try:
        text = file.read_text(encoding="utf-8")
        # The tags that transformers adds, left out: here only the syntax matters.
        plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", text)
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{file}:{error.lineno}: not a Jinja template ({error.message}); fix that line") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); give a Jinja template") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason}); give a Jinja template") from None
    return text


def ensure_template(tokenizer: Tokenizer) -> bool:
    """Give a tokenizer without a chat template ours; it is then saved with the tokenizer. True where it had none.

    The template owns the special tokens, so it writes BOS in front where the tokenizer itself would have.
    """
    if tokenizer.chat_template is not None:
        return False
    bos = "{{ bos_token }}" if _puts_bos_in_front(tokenizer) else ""
    tokenizer.chat_template = bos + DEFAULT_TEMPLATE
    return True


def _puts_bos_in_front(tokenizer: Tokenizer) -> bool:
    first = tokenizer("a")["input_ids"][:1]
    first_of_text = tokenizer("a", add_special_tokens=False)["input_ids"][:1]
    return tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] != first_of_text


def render(
    tokenizer: Tokenizer, prompt: Sequence[Turn], response: str | None = None, *, where: str = "this row"
) -> tuple[str, str | None]:
    """(prompt text, answer text or None); `where` names the row in errors.

    With the default template, a user turn "Hi" and the response "Hello." give
    ("\\n\\nHuman: Hi\\n\\nAssistant:", " Hello.</s>").
    """
    prompt_text = _apply(tokenizer, list(prompt), where, add_generation_prompt=True)
    if response is None:
        return prompt_text, None
    eos = tokenizer.eos_token
    if eos is None:
        raise UserError(f"{where}: the tokenizer has no EOS token, set one: every answer has to end with it")
    if eos in response:
        raise UserError(f"{where}: the answer holds the EOS token {eos!r}, which would end it early; remove it")
    answer = _answer_text(tokenizer, prompt, prompt_text, response, where)
    if not answer.strip():
        raise UserError(f"{where}: the tokenizer's chat template leaves out the answer, give it another one")
    return prompt_text, answer + eos


def render_sampled(
    tokenizer: Tokenizer, prompt: Sequence[Turn], response: str, ended: bool, *, where: str
) -> tuple[str, str]:
    """(prompt text, answer text) of a response that another model sampled, which must not hold the EOS text.

    Its EOS is there only if it `ended` by itself; else the answer stops where the response does, before anything that
    the template writes after it. Unlike the answer of a row it may be empty.
    """
    prompt_text = _apply(tokenizer, list(prompt), where, add_generation_prompt=True)
    # White space around a response belongs to the template it was sampled under; but where it was cut off, to it.
    response = response.strip() if ended else response.lstrip()
    answer = _answer_text(tokenizer, prompt, prompt_text, response, where) if response else ""
    if ended:
        return prompt_text, answer + tokenizer.eos_token
    start = answer.rfind(response)
    return prompt_text, answer if start < 0 else answer[: start + len(response)]


def _answer_text(tokenizer: Tokenizer, prompt: Sequence[Turn], prompt_text: str, response: str, where: str) -> str:
    """What the template adds to `prompt_text` for the assistant's `response`, up to its EOS."""
    turns = [*prompt, {"role": "assistant", "content": response}]
    whole_text = _apply(tokenizer, turns, where, add_generation_prompt=False)
    if not whole_text.startswith(prompt_text):
        raise UserError(
            f"{where}: the tokenizer's chat template writes the prompt differently once an answer "
            "follows (it rewrites history, or its generation prompt is not how an answer starts); "
            "give the tokenizer another chat_template"
        )
    # The response holds no EOS, so the first one is the template's end of the answer. What a template writes
    # after it (ChatML: a newline) comes too late for a model that has stopped, and is cut.
    return whole_text[len(prompt_text) :].partition(tokenizer.eos_token)[0]


def earlier_answers(tokenizer: Tokenizer, prompt: Sequence[Turn], prompt_text: str, *, where: str) -> list[Span]:
    """Where the assistant's turns of `prompt`, each with its EOS, stand in `prompt_text`, its rendering.

    A template that marks them with {% generation %} is believed; of another, each turn is what is added to the
    dialogue before it. A turn that opens the dialogue has none before it, and is left out: it answers nothing.
    """
    answered = [i for i, turn in enumerate(prompt) if turn["role"] == "assistant"]
    if not answered:
        return []
    if _GENERATION_TAG.search(tokenizer.chat_template):
        (text,), (spans,) = render_jinja_template(
            conversations=[list(prompt)],
            chat_template=tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        found = [(text[:stop], start) for start, stop in spans]
    else:
        found = []
        for i in filter(None, answered):
            before = _apply(tokenizer, list(prompt[:i]), where, add_generation_prompt=True)
            after = _apply(tokenizer, list(prompt[: i + 1]), where, add_generation_prompt=False)
            if not after.startswith(before):
                raise UserError(_REWRITES.format(where=where))
            stop = after.find(tokenizer.eos_token, len(before))
            found.append((after if stop < 0 else after[:stop], len(before)))
    result = []
    for text, start in found:
        if not prompt_text.startswith(text):
            raise UserError(_REWRITES.format(where=where))
        ended = prompt_text.startswith(tokenizer.eos_token, len(text))
        result.append((start, len(text) + ended * len(tokenizer.eos_token)))
    return result


def _apply(tokenizer: Tokenizer, turns: list[Turn], where: str, add_generation_prompt: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt))
    except Exception as error:  # a template is a program: it may divide by zero as well as refuse
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        raise UserError(
            f"{where}: the tokenizer's chat template refuses this row ({kind}{error}), fix the row or "
            "give the tokenizer another chat_template"
        ) from error


def template_fingerprint(tokenizer: Tokenizer) -> str:
    """Equal for two tokenizers that write and split text alike: same template, same EOS, same vocabulary and merges."""
    parts = [tokenizer.chat_template, tokenizer.eos_token, sorted(tokenizer.get_vocab().items())]
    if getattr(tokenizer, "is_fast", False):
        core = json.loads(tokenizer.backend_tokenizer.to_str())
        # The model's own vocabulary again: Unigram's has scores, which decide where text is split.
        parts += [core["model"].get("merges"), core["model"]["vocab"], core["normalizer"], core["pre_tokenizer"]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
