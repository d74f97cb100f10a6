"""Text to ids.

The prompt and the answer are tokenised apart and joined, so that the ids of a prompt in training are exactly
those that a rollout starts from (tokenised together, a pair could merge across the border). Special tokens
come from the template alone. A row that is too long is dropped whole and counted, in every step alike: a cut
answer would have no EOS, a cut prompt would be another prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tristage.data.rows import PromptRow, RankingRow, SFTRow
from tristage.data.template import Tokenizer, render
from tristage.errors import UserError

_TEXTS_A_CALL = 1024  # a list is fast, but a whole set at once would hold all its encodings in memory


@dataclass(frozen=True)
class Example:
    """One tokenised row: a prompt, and its answer if it has one."""

    ids: list[int]
    prompt_length: int  # ids[:prompt_length] is the prompt, the rest is the answer with its EOS


RankedExamples = tuple[list[Example], tuple[float, ...]]  # the answers of one prompt and their ranks


def tokenize_prompt(tokenizer: Tokenizer, row: PromptRow) -> Example:
    return _tokenize_prompts(tokenizer, [row])[0]


def tokenize_sft(tokenizer: Tokenizer, row: SFTRow) -> Example:
    return _tokenize_answers(tokenizer, [row])[0]


def tokenize_ranking(tokenizer: Tokenizer, row: RankingRow) -> list[Example]:
    return _tokenize_answers(tokenizer, _one_row_an_answer(row))


def encode_sft(
    rows: Sequence[SFTRow], tokenizer: Tokenizer, max_tokens: int
) -> tuple[list[Example], Counter[str]]:
    return _drop_long(_tokenize_answers(tokenizer, rows), max_tokens)


def encode_prompts(
    rows: Sequence[PromptRow], tokenizer: Tokenizer, max_prompt_tokens: int
) -> tuple[list[Example], Counter[str]]:
    return _drop_long(_tokenize_prompts(tokenizer, rows), max_prompt_tokens)


def encode_ranking(
    rows: Sequence[RankingRow], tokenizer: Tokenizer, max_tokens: int
) -> tuple[list[RankedExamples], Counter[str]]:
    """One over-long answer drops its whole row: the others' ranks would mean something else without it."""
    singles = [single for row in rows for single in _one_row_an_answer(row)]
    answers = iter(_tokenize_answers(tokenizer, singles))
    kept: list[RankedExamples] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        examples = [next(answers) for _ in row.answers]
        if max(len(example.ids) for example in examples) <= max_tokens:
            kept.append((examples, row.ranks))
        else:
            dropped[_too_long(max_tokens)] += 1
    return kept, dropped


def _drop_long(examples: list[Example], max_tokens: int) -> tuple[list[Example], Counter[str]]:
    kept = [example for example in examples if len(example.ids) <= max_tokens]
    dropped = Counter({_too_long(max_tokens): len(examples) - len(kept)})
    return kept, +dropped  # + removes a zero count


def _too_long(max_tokens: int) -> str:
    return f"longer than {max_tokens} tokens"


def _one_row_an_answer(row: RankingRow) -> list[SFTRow]:
    return [SFTRow(row.prompt, answer, row.where) for answer in row.answers]


def _tokenize_prompts(tokenizer: Tokenizer, rows: Sequence[PromptRow]) -> list[Example]:
    texts = [render(tokenizer, row.prompt, where=row.where)[0] for row in rows]
    return [Example(ids, prompt_length=len(ids)) for ids in _to_ids(tokenizer, texts)]


def _tokenize_answers(tokenizer: Tokenizer, rows: Sequence[SFTRow]) -> list[Example]:
    rendered = [render(tokenizer, row.prompt, row.response, where=row.where) for row in rows]
    prompts = _to_ids(tokenizer, [prompt for prompt, _ in rendered])
    answers = _to_ids(tokenizer, [answer for _, answer in rendered])
    for row, answer in zip(rows, answers, strict=True):
        if answer[-1] != tokenizer.eos_token_id or answer.count(tokenizer.eos_token_id) != 1:
            raise UserError(
                f"{row.where}: the tokenizer does not end this answer with exactly one EOS id, "
                f"make sure that {tokenizer.eos_token!r} is a special token of its own"
            )
    return [Example(prompt + answer, len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]


def _to_ids(tokenizer: Tokenizer, texts: Sequence[str | None]) -> list[list[int]]:
    ids: list[list[int]] = []
    for start in range(0, len(texts), _TEXTS_A_CALL):
        chunk = list(texts[start : start + _TEXTS_A_CALL])
        encoded = tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids += encoded["input_ids"]
    return ids
