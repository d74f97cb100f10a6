"""Text to ids.

The prompt and the answer are tokenised apart and joined, so that the ids of a prompt in training are exactly
those that a rollout starts from (tokenised together, a pair could merge across the border). Special tokens
come from the template alone (see special.py). Rows over the token limit are treated alike (`data.too_long`) in
every step.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tristage.config import Kind
from tristage.data.rows import PromptRow, RankingRow, Row, SFTRow, TextRow, Turn, Unusable
from tristage.data.special import HIDDEN, encode_hidden, hide, hide_turns
from tristage.data.template import Span, Tokenizer, earlier_answers, render, render_sampled
from tristage.errors import UserError


@dataclass(frozen=True)
class Example:
    """One tokenised row: a prompt, and its answer if it has one."""

    ids: list[int]
    prompt_length: int  # ids[:prompt_length] is the prompt, the rest is the answer with its EOS
    also_trained: tuple[Span, ...] = ()  # places in the prompt that SFT learns too: earlier answers


RankedExamples = tuple[list[Example], tuple[float, ...]]  # the answers of one prompt and their ranks
Item = Example | RankedExamples


@dataclass(frozen=True)
class EncodingRules:
    """How rows become tokens: part of the cache key of a tokenised set."""

    kind: Kind
    max_tokens: int
    too_long: Literal["drop", "truncate_left", "truncate_right"] = "drop"
    train_on: Literal["answers", "last_answer", "everything"] = "answers"
    labels: tuple[str, ...] = ()  # columns of a row of kind "prompt" that are kept as they are, for reward functions


@dataclass(frozen=True)
class _Text:
    """One text to tokenise: a prompt with its answer, or a document."""

    prompt: str
    answer: str | None
    earlier: list[Span]  # characters of `prompt`
    where: str


def encode(
    rows: Sequence[Row], tokenizer: Tokenizer, rules: EncodingRules
) -> list[tuple[Item, int] | UserError | Unusable]:
    """For each row: (its item, its length before it was cut to the limit), or why it has none.

    The length of a ranked item is that of its longest answer.
    """
    rendered: list[list[_Text] | UserError] = []
    for row in rows:
        try:
            rendered.append(_texts(row, tokenizer, rules))
        except UserError as error:
            rendered.append(error)
    texts = [text for found in rendered if not isinstance(found, UserError) for text in found]
    examples = iter(_tokenize(texts, tokenizer, rules))
    results: list[tuple[Item, int] | UserError | Unusable] = []
    for row, found in zip(rows, rendered, strict=True):
        if isinstance(found, UserError):
            results.append(found)
            continue
        own = [next(examples) for _ in found]
        problems = [example for example in own if isinstance(example, UserError)]
        whole = [example for example in own if isinstance(example, Example)]
        results.append(problems[0] if problems else _fit(row, whole, tokenizer, rules))
    return results


def encode_sampled(
    prompt: Sequence[Turn], response: str, ended: bool, tokenizer: Tokenizer, max_tokens: int | None
) -> Example:
    """A prompt and a response sampled by another model, in the tokens of this one; see render_sampled.

    Beyond `max_tokens` the oldest tokens are cut, except a BOS. The answer always has a token: if nothing is left of it
    (only white space, cut off), the prompt's last.

    Raises:
        UserError: the template refuses the dialogue.
    """
    # Text such as '</s>' that the model merely spelled must not be parsed as a special token.
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special.add(tokenizer.eos_token)
    spelled = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
    while (shorter := spelled.sub("", response)) != response:
        response = shorter
    where = "a sampled response"
    try:
        turns = hide_turns(prompt, tokenizer, where)
    except UserError:  # this tokenizer cannot spell them as plain text, and a rollout can't be refused
        turns = tuple({**turn, "content": spelled.sub("", turn["content"])} for turn in prompt)
    texts = render_sampled(tokenizer, turns, response, ended, where=where)
    (prompt_ids, _), (answer_ids, _) = _to_ids(tokenizer, list(texts), False)
    ids = prompt_ids + answer_ids
    return _cut_left(Example(ids, min(len(prompt_ids), len(ids) - 1)), tokenizer, max_tokens)


def _cut_left(example: Example, tokenizer: Tokenizer, max_tokens: int | None) -> Example:
    excess = len(example.ids) - (max_tokens or len(example.ids))
    if excess <= 0:
        return example
    kept = _leading_bos(example, tokenizer)
    return Example(example.ids[:kept] + example.ids[kept + excess :], max(example.prompt_length - excess, kept))


def _leading_bos(example: Example, tokenizer: Tokenizer) -> int:
    return int(tokenizer.bos_token_id is not None and example.ids[:1] == [tokenizer.bos_token_id])


def _texts(row: Row, tokenizer: Tokenizer, rules: EncodingRules) -> list[_Text]:
    row = hide(row, tokenizer)
    if isinstance(row, TextRow):
        return [_Text(row.text, None, [], row.where)]
    if isinstance(row, PromptRow):
        return [_Text(render(tokenizer, row.prompt, where=row.where)[0], None, [], row.where)]
    answers = row.answers if isinstance(row, RankingRow) else (row.response,)
    texts = []
    for answer in answers:
        prompt, ended = render(tokenizer, row.prompt, answer, where=row.where)
        earlier = []
        if isinstance(row, SFTRow) and rules.train_on == "answers":
            earlier = earlier_answers(tokenizer, row.prompt, prompt, where=row.where)
        texts.append(_Text(prompt, ended, earlier, row.where))
    return texts


def _tokenize(texts: Sequence[_Text], tokenizer: Tokenizer, rules: EncodingRules) -> list[Example | UserError]:
    if not texts:
        return []
    with_spans = [text.where for text in texts if text.earlier]
    if with_spans and not tokenizer.is_fast:
        raise UserError(
            f"{with_spans[0]}: this tokenizer can't tell where earlier answers are; set `data.train_on: last_answer`"
        )
    prompts = _to_ids(tokenizer, [text.prompt for text in texts], bool(with_spans))
    answers = _to_ids(tokenizer, [text.answer or "" for text in texts], False)
    eos = tokenizer.eos_token_id
    found: list[Example | UserError] = []
    for text, (prompt, places), (answer, _) in zip(texts, prompts, answers, strict=True):
        if rules.kind == "text":
            found.append(Example([*prompt, eos], 0))
        elif text.answer is not None and (answer[-1] != eos or answer.count(eos) != 1):
            found.append(
                UserError(
                    f"{text.where}: the tokenizer does not end this answer with exactly one EOS id, "
                    f"make sure that {tokenizer.eos_token!r} is a special token of its own"
                )
            )
        else:
            earlier = [_token_span(span, places) for span in text.earlier]
            if rules.train_on == "everything" and text.answer is not None:
                earlier = [(0, len(prompt))]
            found.append(Example(prompt + answer, len(prompt), tuple(earlier)))
    return found


def _to_ids(tokenizer: Tokenizer, texts: list[str], with_places: bool) -> list[tuple[list[int], list[Span]]]:
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=with_places,
        verbose=False,
    )
    places = encoded["offset_mapping"] if with_places else [[]] * len(texts)
    found = list(zip(encoded["input_ids"], places, strict=True))
    for i, text in enumerate(texts):
        if HIDDEN.search(text):
            found[i] = encode_hidden(text, tokenizer)
    return found


def _token_span(characters: Span, places: list[Span]) -> Span:
    """The tokens that lie entirely within some characters."""
    inside = [
        i for i, (start, stop) in enumerate(places) if characters[0] <= start and stop <= characters[1] and stop > start
    ]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


# -- the token limit ---------------------------------------------------------------------------------------


def _fit(
    row: Row, examples: list[Example], tokenizer: Tokenizer, rules: EncodingRules
) -> tuple[Item, int] | Unusable:
    """The row's item within the limit. All answers of a prompt get the same cut, so that they still share it."""
    longest = max(len(example.ids) for example in examples)
    if longest > rules.max_tokens and rules.kind != "text":
        try:
            cut = _CUTS[rules.too_long]
            examples = [cut(example, longest - rules.max_tokens, tokenizer, rules) for example in examples]
        except Unusable as reason:
            return reason
        if isinstance(row, RankingRow) and all(example.ids == examples[0].ids for example in examples):
            return Unusable("answers that are the same once truncated")
    return ((examples, row.ranks) if isinstance(row, RankingRow) else examples[0]), longest


def _drop(example: Example, excess: int, tokenizer: Tokenizer, rules: EncodingRules) -> Example:
    raise Unusable(f"longer than {rules.max_tokens} tokens")


def _truncate_left(example: Example, excess: int, tokenizer: Tokenizer, rules: EncodingRules) -> Example:
    """Cut the oldest tokens of the prompt, except a BOS; drop the row if no prompt would be left."""
    kept = _leading_bos(example, tokenizer)
    if example.prompt_length - excess <= kept:
        raise Unusable(f"answer alone longer than {rules.max_tokens - 1 - kept} tokens")
    spans = ((max(start - excess, kept), stop - excess) for start, stop in example.also_trained)
    return dataclasses.replace(
        example,
        ids=example.ids[:kept] + example.ids[kept + excess :],
        prompt_length=example.prompt_length - excess,
        also_trained=tuple((start, stop) for start, stop in spans if stop > start),
    )


def _truncate_right(example: Example, excess: int, tokenizer: Tokenizer, rules: EncodingRules) -> Example:
    """Cut the end of the answer, which then has no EOS; drop the row if the prompt leaves no room for one."""
    if example.prompt_length >= rules.max_tokens:
        room = int(rules.kind != "prompt")
        raise Unusable(f"prompt alone longer than {rules.max_tokens - room} tokens")
    return dataclasses.replace(example, ids=example.ids[: rules.max_tokens])


_CUTS = {"drop": _drop, "truncate_left": _truncate_left, "truncate_right": _truncate_right}
