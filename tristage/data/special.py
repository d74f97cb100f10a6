"""Special tokens come from the template alone: where the contents of a row spell one out, it stays plain text.

A tokenizer reads "<eos>" as its special token wherever it is written, also in what a user has typed. So before a row
is rendered, `hide` puts a stand-in, one private character, where its contents have the text of a special token. In the
rendered text all special tokens are then the template's own. `encode_hidden` turns such a text into ids with a twin of
the tokenizer that knows the special tokens under other names only, so that it cuts their text like any other.
Rows that spell no special token take the ordinary way and keep the ids they always had.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import tokenizers

from tristage.data.rows import PromptRow, RankingRow, Row, SFTRow, TextRow, Turn
from tristage.errors import UserError

STAND_IN, TEMPLATES_OWN = 0x108000, 0x10C000  # private characters that no font and no data set is known to use
HIDDEN = re.compile(f"[{chr(STAND_IN)}-{chr(TEMPLATES_OWN - 1)}]")
_PRIVATE = f"[{chr(STAND_IN)}-{chr(0x10FFFD)}]"


class _Specials:
    """The special tokens of one tokenizer, numbered; a stand-in is STAND_IN plus that number."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokens = [token for token in tokenizer.added_tokens_decoder.values() if token.special and token.content]
        self.number = {token.content: number for number, token in enumerate(self.tokens)}
        longest_first = sorted(self.number, key=len, reverse=True)
        self.pattern = re.compile("|".join([*map(re.escape, longest_first), _PRIVATE]))
        self.starts = {name[:3] for name in self.number}
        self._tokenizer = tokenizer

    def found(self, text: str) -> list[str]:
        """All matches of `pattern`, for which most texts need not be searched: hundreds of names are slow to find."""
        if any(start in text for start in self.starts) or not text.isascii() and re.search(_PRIVATE, text):
            return self.pattern.findall(text)
        return []

    @functools.cached_property
    def twin(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """A tokenizer that knows special tokens as TEMPLATES_OWN + number only; its ids of these -> the true ones."""
        twin = tokenizers.Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
        twin.no_truncation()
        twin.no_padding()
        twin.encode_special_tokens = True
        names = [chr(TEMPLATES_OWN + number) for number in range(len(self.tokens))]
        twin.add_tokens(
            [
                tokenizers.AddedToken(name, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False)
                for name, token in zip(names, self.tokens, strict=True)
            ]
        )
        ids = self._tokenizer.convert_tokens_to_ids([token.content for token in self.tokens])
        return twin, dict(zip((int(twin.token_to_id(name) or 0) for name in names), ids, strict=True))

    @functools.cache  # noqa: B019  (one of these lives as long as its tokenizer)
    def is_text(self, name: str) -> bool:
        """Whether the tokenizer can write the text of a special token without using any special token but unknown."""
        if not self._tokenizer.is_fast:
            return False
        twin, _ = self.twin
        found = {token for text in (name, f" {name} ") for token in twin.encode(text, add_special_tokens=False).ids}
        return not found & set(self._tokenizer.all_special_ids) - {self._tokenizer.unk_token_id}


@functools.lru_cache(maxsize=8)
def _specials(tokenizer: Any) -> _Specials:
    return _Specials(tokenizer)


def spelled_in(row: Row, tokenizer: Any) -> list[str]:
    """The special tokens whose text is in the contents of a row, each once."""
    specials = _specials(tokenizer)
    return sorted({name for text in _contents(row) for name in specials.found(text)})


def _contents(row: Row) -> Iterator[str]:
    if isinstance(row, TextRow):
        yield row.text
        return
    yield from (turn["content"] for turn in row.prompt)
    if not isinstance(row, PromptRow):
        yield from row.answers if isinstance(row, RankingRow) else (row.response,)


def hide(row: Row, tokenizer: Any) -> Row:
    """`row` with a stand-in for each special token that its contents spell out.

    An answer with EOS in it stays as it is: that one is refused when it is rendered.

    Raises:
        UserError: the tokenizer has no other way to write that text than its special token.
    """
    if not spelled_in(row, tokenizer):
        return row
    if isinstance(row, TextRow):
        return dataclasses.replace(row, text=_hidden(row.text, tokenizer, row.where))
    row = dataclasses.replace(row, prompt=hide_turns(row.prompt, tokenizer, row.where))
    if isinstance(row, PromptRow):
        return row
    eos = tokenizer.eos_token or ""
    answers = row.answers if isinstance(row, RankingRow) else (row.response,)
    texts = tuple(text if eos in text else _hidden(text, tokenizer, row.where) for text in answers)
    if isinstance(row, SFTRow):
        return dataclasses.replace(row, response=texts[0])
    return dataclasses.replace(row, answers=texts)


def hide_turns(turns: Sequence[Turn], tokenizer: Any, where: str) -> tuple[Turn, ...]:
    """As hide, of a dialogue."""
    return tuple({**turn, "content": _hidden(turn["content"], tokenizer, where)} for turn in turns)


def _hidden(text: str, tokenizer: Any, where: str) -> str:
    specials = _specials(tokenizer)

    def stand_in(match: re.Match[str]) -> str:
        name = match[0]
        if name not in specials.number:
            raise UserError(f"{where}: has the private character U+{ord(name):X}, remove it")
        if not specials.is_text(name):
            raise UserError(
                f"{where}: has the text {name!r}, which this tokenizer can't tell from its special token; remove it"
            )
        return chr(STAND_IN + specials.number[name])

    return specials.pattern.sub(stand_in, text)


def encode_hidden(text: str, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of a rendered text with stand-ins, and the characters of `text` that each id is for."""
    specials = _specials(tokenizer)
    pieces: list[str] = []
    places: list[tuple[int, int]] = []  # of each character of the pieces, in `text`
    at = 0
    for match in [*specials.pattern.finditer(text), None]:
        start, stop = match.span() if match else (len(text), len(text))
        pieces.append(text[at:start])
        places += ((place, place + 1) for place in range(at, start))
        if match:
            own = match[0] in specials.number  # else it is a stand-in
            spelled = "" if own else specials.tokens[ord(match[0]) - STAND_IN].content
            pieces.append(spelled or chr(TEMPLATES_OWN + specials.number[match[0]]))
            places += [(start, stop)] * len(pieces[-1])
        at = stop
    twin, true_ids = specials.twin
    encoding = twin.encode("".join(pieces), add_special_tokens=False)
    spans = [(places[start][0], places[stop - 1][1]) if stop > start else (0, 0) for start, stop in encoding.offsets]
    return [true_ids.get(token, token) for token in encoding.ids], spans
