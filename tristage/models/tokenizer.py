"""Tokenizers: one pad, one terminator, one chat template, checked to agree between folders."""

from __future__ import annotations

import functools

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from tristage import dist
from tristage.data import hub
from tristage.data.template import ensure_template, render, template_fingerprint
from tristage.data.trial import refuse_endless
from tristage.errors import UserError
from tristage.models.opening import cannot_open


def load_tokenizer(
    path: str, template: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder or id, with a pad token and a chat template (`template`, when given).

    A missing pad, or one that is the EOS, becomes the tokenizer's unknown token when that is another one
    (as is usual for Llama 2); else pad stays EOS. Either is safe: padding is known by length, never by id.

    Raises:
        UserError: no tokenizer there, it has no EOS token, or a chat template that does not end.
    """
    hub.prepare(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise cannot_open(path, "tokenizer", error) from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no EOS token; set `eos_token` in its tokenizer_config.json")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        unknown = tokenizer.unk_token_id
        usable = unknown is not None and unknown != tokenizer.eos_token_id
        tokenizer.pad_token = tokenizer.unk_token if usable else tokenizer.eos_token
    if template is not None:
        tokenizer.chat_template = template
    if ensure_template(tokenizer):
        _say_default(path, *render(tokenizer, [{"role": "user", "content": "QUESTION"}], "ANSWER"))
    refuse_endless(tokenizer, path if template is None else "data.template")
    return tokenizer


@functools.cache  # a step loads the tokenizer of a folder several times
def _say_default(path: str, prompt: str, answer: str) -> None:
    dist.print0(
        f"{path}: no chat template, so dialogues are written as {prompt + answer!r}; `data.template` gives another one"
    )


def has_template(path: str, trust_remote_code: bool = False) -> bool:
    """Whether a folder or id brings a chat template. Raises UserError: no tokenizer there."""
    hub.prepare(path)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code).chat_template is not None
    except (OSError, ValueError, KeyError) as error:
        raise cannot_open(path, "tokenizer", error) from None


def generation_stop_ids(path: str) -> list[int]:
    """Tokens at which a model folder's or id's own generation_config.json ends a response; [] where there is none."""
    try:
        ids = GenerationConfig.from_pretrained(path).eos_token_id
    except (OSError, ValueError):
        return []
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]


SAME_TOKENIZER = "train both steps from models with the same tokenizer"  # the default fix


def require_same_tokenizer(
    tokenizers: dict[str, PreTrainedTokenizerBase], fixes: dict[str, str] | None = None
) -> None:
    """Check that the folders of a step agree on vocabulary, template and terminator.

    Args:
        tokenizers: name of each folder in messages -> its tokenizer.
        fixes: the same names -> the fix if that one differs, where it is not SAME_TOKENIZER.

    Raises:
        UserError: names the two that differ, and in what.
    """
    (first, reference), *others = tokenizers.items()
    for name, tokenizer in others:
        if template_fingerprint(tokenizer) == template_fingerprint(reference):
            continue
        if tokenizer.chat_template != reference.chat_template:
            what = "chat template"
        elif tokenizer.eos_token != reference.eos_token:
            what = f"EOS token ({reference.eos_token!r} and {tokenizer.eos_token!r})"
        else:
            what = "vocabulary"
        raise UserError(f"{first} and {name} disagree on the {what}; {(fixes or {}).get(name, SAME_TOKENIZER)}")
