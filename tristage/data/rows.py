"""Raw rows to typed text.

A row is read by its columns, the richest layout first (see `LAYOUTS`), and is also converted for simpler steps: a
ranking row gives a demonstration (its best answer) and a prompt. Columns that no layout reads are listed in
`Row.unused`, so that they can be counted; a column without which the rest means something else (an image, tools, a
label that says "bad answer") is refused. What a user can fix (broken JSON, a missing column, an empty answer) is an
error that names the row. Known defects of published sets (see `Unusable`) are dropped and counted, in every step alike,
so that all steps see the same rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tristage.config import Kind, SourceSettings
from tristage.data.sources import EXTRA_CELLS_KEY, SourceRow, load_json
from tristage.errors import UserError

Turn = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

_LARGEST_RANK = 1e300  # "not below" also finds nan, and integers that no float holds
ROLES = ("system", "user", "assistant")
DIALOGUE_START = "\n\nHuman:"
_DIALOGUE_MARKER = re.compile(r"\n\n(Human|Assistant):")
_DIALOGUE_ROLES = {"Human": "user", "Assistant": "assistant"}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")

# Columns that change the meaning of a row; see _refuse_what_changes_the_meaning.
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_TOOLS = ("tools", "functions", "tool_calls", "function_call")
_LABELS = ("label", "kto_tag")
_BAD = (False, "false", "False")
_EMPTY: tuple[object, ...] = (None, "", "[]", "null", [], {})
_READ_IN_MESSAGES = {"role", "content", "from", "value"}

# What columns are often called elsewhere, to guess a `columns` setting from.
_NEEDED = {"sft": ("prompt", "response"), "ranking": ("prompt", "chosen", "rejected"), "prompt": ("prompt",)}
_OTHER_NAMES = {
    "prompt": ("question", "query", "instruction", "problem", "input", "user", "human"),
    "response": ("answer", "completion", "output", "solution", "reply", "target", "assistant"),
    "chosen": ("chosen_response", "preferred", "accepted", "better"),
    "rejected": ("rejected_response", "dispreferred", "worse"),
    "text": ("content", "document", "body"),
}


@dataclass(frozen=True)
class PromptRow:
    """A dialogue whose next turn is the assistant's."""

    prompt: tuple[Turn, ...]
    where: str  # "file:line" or "file[index]"
    labels: dict[str, Any] = field(default_factory=dict, compare=False)  # other columns, for reward functions
    unused: tuple[str, ...] = field(default=(), compare=False)  # columns of the raw row that were not read


@dataclass(frozen=True)
class SFTRow:
    """A prompt and the answer to imitate."""

    prompt: tuple[Turn, ...]
    response: str
    where: str
    unused: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class RankingRow:
    """A prompt and two or more answers, ranks[i] of answers[i]; 0 is best."""

    prompt: tuple[Turn, ...]
    answers: tuple[str, ...]
    ranks: tuple[float, ...]  # one per answer, the lowest is the best
    where: str
    unused: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class TextRow:
    """A document of plain text, for the pretraining mix."""

    text: str
    where: str
    unused: tuple[str, ...] = field(default=(), compare=False)


Row = PromptRow | SFTRow | RankingRow | TextRow


class Unusable(Exception):
    """The row is well formed but teaches nothing or cannot be split; the message is the reason to count."""


def read_row(place: SourceRow, source: SourceSettings, kind: Kind, labels: Sequence[str] = ()) -> Row:
    """One raw row as the type that `kind` needs; a PromptRow with the columns `labels`.

    Raises:
        UserError: malformed; names the place, the column and the fix.
        Unusable: nothing to learn from.
    """
    where, payload = place
    if isinstance(payload, UserError):
        raise payload
    raw = load_json(payload, where) if isinstance(payload, bytes) else payload
    if not isinstance(raw, dict):
        raise UserError(f"{where}: a row must be an object with named columns, found {_type_name(raw)}")
    if EXTRA_CELLS_KEY in raw:
        raise UserError(f"{where}: more cells than the first line names columns; quote the cell that was cut in two")
    whole = raw
    if source.columns:
        raw = {ours: _pick(raw, theirs, where) for ours, theirs in source.columns.items()}
    for rule in source.clean:
        for column in rule.columns:
            if column in raw:
                raw = raw | {column: _clean(raw[column], rule.pattern, rule.replacement)}
    if source.best_first and isinstance(raw.get("responses"), list) and not {"ranks", "scores"} & set(raw):
        raw = raw | {"ranks": list(range(len(raw["responses"])))}
    _refuse_what_changes_the_meaning(raw, where)
    row, used = _parse(raw, where, kind)
    row = _convert(row, kind, raw)
    if isinstance(row, SFTRow):
        _refuse_bad_answer(raw, where)
    if isinstance(row, PromptRow) and labels:
        row, used = dataclasses.replace(row, labels=_labels(whole | raw, labels, where)), used.union(labels)
    return dataclasses.replace(row, unused=tuple(_unused(raw, used)))


def _labels(raw: dict[str, Any], names: Sequence[str], where: str) -> dict[str, Any]:
    """The columns `names`. Raises UserError: the row lacks one, or JSON cannot hold it."""
    for name in names:
        if name not in raw:
            raise UserError(
                f"{where}: `reward.labels` names {name!r}, but the row has the columns {sorted(raw)}; correct it"
            )
    found = {name: raw[name] for name in names}
    try:
        json.dumps(found)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where}: `reward.labels` names a column that JSON cannot hold ({error}); leave it out"
        ) from error
    return found


def prompt_hash(row: Row) -> int:
    """63 bits that rows with the same prompt share; of a text row, of the whole text."""
    return _hash(row.text if isinstance(row, TextRow) else row.prompt)


def row_hash(row: Row) -> int:
    """63 bits that rows with the same content share, wherever they are."""
    if isinstance(row, SFTRow):
        return _hash([row.prompt, row.response])
    if isinstance(row, RankingRow):
        return _hash([row.prompt, row.answers, row.ranks])
    return prompt_hash(row)


def _hash(content: object) -> int:
    digest = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # Arrow's int64 has a sign


def _pick(raw: dict[str, Any], path: str | tuple[str, ...], where: str) -> Any:
    """The value at "a.b.0" inside `raw`; of several paths, the list of their values."""
    if not isinstance(path, str):
        return [_pick(raw, each, where) for each in path]
    value: Any = raw
    for part in path.split("."):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, ValueError, TypeError):
            there = f"the columns {sorted(raw)}" if part == path.split(".")[0] else f"no {part!r} inside"
            raise UserError(f"{where}: `columns` names {path!r}, but the row has {there}; correct it") from None
    return value


def _clean(value: Any, pattern: str, replacement: str) -> Any:
    if isinstance(value, str):
        return re.sub(pattern, replacement, value)
    return [_clean(each, pattern, replacement) for each in value] if isinstance(value, list) else value


def _refuse_what_changes_the_meaning(raw: dict[str, Any], where: str) -> None:
    """Raises UserError for a row that shows images or offers tools: without them its texts mean something else."""
    for names, what in ((_MEDIA, "images, video and audio are"), (_TOOLS, "tools are")):
        for name in names:
            if raw.get(name) not in _EMPTY:
                raise UserError(
                    f"{where}: `{name}` is set, and {what} not supported; remove the row, or set `columns` "
                    "to the columns to read, which leaves this one out"
                )


def _refuse_bad_answer(raw: dict[str, Any], where: str) -> None:
    """Raises UserError for an answer that the row itself labels as bad (the layout of KTO)."""
    for name in _LABELS:
        if name in raw and raw[name] in _BAD:
            raise UserError(
                f"{where}: `{name}` is {raw[name]!r}: a bad answer (as for KTO), which must not be learned; "
                "remove such rows, or set `on_bad_row: skip` to train on the others"
            )


def _unused(raw: dict[str, Any], used: set[str]) -> Iterator[str]:
    """Names of the columns of `raw` that were not read, and of keys of its messages."""
    for name, value in raw.items():
        if name not in used:
            if value not in _EMPTY and not (name in _LABELS and value in (True, *_BAD)):
                yield name
        elif isinstance(value, list):
            messages = [message for message in value if isinstance(message, dict)]
            keys = {key for message in messages for key in message if message[key] not in _EMPTY}
            yield from (f"{name}[].{key}" for key in sorted(keys - _READ_IN_MESSAGES))


def _parse(raw: dict[str, Any], where: str, kind: Kind) -> tuple[Row, set[str]]:
    """The row in its own layout, and the columns that were read."""
    for columns, parse in LAYOUTS:
        if all(column in raw for column in columns):
            row = parse(raw, where)
            used = {*columns} | ({"input", "history"} if "instruction" in columns else set())
            if not isinstance(row, TextRow) and raw.get("system") and row.prompt[0]["role"] != "system":
                system = {"role": "system", "content": _text(raw["system"], "system", where)}
                row, used = dataclasses.replace(row, prompt=(system, *row.prompt)), used | {"system"}
            return row, used
    understood = "; ".join(" + ".join(columns) for columns, _ in LAYOUTS)
    fix = _guess(raw, kind) or f"rename them to one of: {understood}"
    raise UserError(f"{where}: the columns {sorted(raw)} are not understood, {fix}")


def _guess(raw: dict[str, Any], kind: Kind) -> str:
    """The setting that would probably make `raw` readable, from what its columns are called; "" for no idea."""
    names = {name.lower(): name for name in raw}
    columns: dict[str, str | None] = {}
    for ours in _NEEDED.get(kind, ("text",)):
        columns[ours] = next((names[name] for name in (ours, *_OTHER_NAMES[ours]) if name in names), None)
    if None in columns.values():
        dialogues = (name for name, value in raw.items() if name != "messages" and _is_dialogue(value))
        columns = {"messages": next(dialogues, None)} if kind == "sft" else {"": None}
    columns |= {"system": names["system"]} if "system" in names else {}
    if None in columns.values() or all(ours == theirs for ours, theirs in columns.items()):
        return ""
    pairs = ", ".join(f"{ours}: {theirs}" for ours, theirs in columns.items())
    return f"set `columns: {{{pairs}}}` next to the `path` of this source, if that is what they hold"


def _is_dialogue(value: object) -> bool:
    """Whether `value` is a list of messages that starts with a user or system turn."""
    if not isinstance(value, list) or len(value) < 2 or not isinstance(value[0], dict):
        return False
    return value[0].get("role", value[0].get("from")) in ("system", "user", "human")


def _convert(row: Row, kind: Kind, raw: dict[str, Any]) -> Row:
    """`row` as the simpler type that `kind` needs."""
    if kind == "text" and isinstance(row, TextRow):
        return row
    if kind == "prompt" and not isinstance(row, TextRow):
        return PromptRow(row.prompt, row.where)
    if kind == "ranking" and isinstance(row, RankingRow):
        return row
    if kind == "sft" and isinstance(row, SFTRow):
        return row
    if kind == "sft" and isinstance(row, RankingRow):
        best = row.ranks.index(min(row.ranks))
        return SFTRow(row.prompt, row.answers[best], row.where)
    needed = {
        "ranking": "ranked answers (prompt + chosen + rejected, or responses with ranks, scores or `best_first: true`)",
        "sft": "an answer (prompt + response)",
        "prompt": "a prompt",
        "text": "plain text (text)",
    }
    kinds = {TextRow: "plain text", SFTRow: "a prompt and one answer", RankingRow: "ranked answers"}
    actual = kinds.get(type(row), "a prompt")
    guess = _guess(raw, kind)
    fix = f"; {guess}" if guess else ""
    raise UserError(f"{row.where}: this step needs {needed[kind]} in every row, found only {actual}{fix}")


def _parse_pair(raw: dict[str, Any], where: str, column: str = "prompt") -> RankingRow:
    if _is_dialogue(raw["chosen"]) and _is_dialogue(raw["rejected"]):
        return _parse_dialogue_pair(raw, where)  # they hold the prompt too
    return _pair(_prompt(raw[column], where, column), raw, where)


def _pair(prompt: tuple[Turn, ...], raw: dict[str, Any], where: str) -> RankingRow:
    answers = (_answer(raw["chosen"], "chosen", where), _answer(raw["rejected"], "rejected", where))
    return _ranking_row(prompt, answers, (0.0, 1.0), where)


def _parse_ranked(raw: dict[str, Any], where: str) -> RankingRow:
    """`ranks`: the lowest is the best; or `scores`: the highest is."""
    column = "ranks" if "ranks" in raw else "scores"
    responses, numbers = raw["responses"], raw[column]
    if not isinstance(responses, list) or not isinstance(numbers, list) or len(responses) != len(numbers):
        raise UserError(f"{where}: `responses` and `{column}` must be two lists of the same length")
    if len(responses) < 2:
        raise UserError(f"{where}: `responses` has {len(responses)} answer, give 2 or remove the row")
    best = "0 = best" if column == "ranks" else "highest = best"
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) < _LARGEST_RANK:
            raise UserError(f"{where}: `{column}` must be finite numbers ({best}), found {number!r}")
    answers = tuple(_answer(answer, f"responses[{i}]", where) for i, answer in enumerate(responses))
    if column == "scores":
        numbers = [sorted(set(numbers), reverse=True).index(number) for number in numbers]
    return _ranking_row(_prompt(raw["prompt"], where), answers, tuple(map(float, numbers)), where)


def _parse_dialogue_pair(raw: dict[str, Any], where: str) -> RankingRow:
    """Two complete dialogues, message lists or the text of Anthropic's HH set; their common prefix is the prompt."""
    fix = _guess(raw, "ranking") or "add a `prompt` column"
    chosen, rejected = (_whole_dialogue(raw[column], column, where, fix) for column in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("dialogues differ before the last turn")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Unusable("dialogue does not end with an answer")
    if any(not turn["content"].strip() for turn in (*chosen, rejected[-1])):
        raise Unusable("dialogue with an empty turn")
    return _ranking_row(chosen[:-1], (chosen[-1]["content"], rejected[-1]["content"]), (0.0, 1.0), where)


def _whole_dialogue(value: object, column: str, where: str, fix: str) -> tuple[Turn, ...]:
    if isinstance(value, list):
        turns = _turns(value, column, where)
        if len(turns) < 2:
            raise UserError(f"{where}: `{column}` without a `prompt` column must hold the prompt's turns too")
        return turns
    text = _text(value, column, where)
    if not text.startswith(DIALOGUE_START):
        raise UserError(
            f"{where}: `{column}` without a `prompt` column must be a complete dialogue "
            f"that starts with {DIALOGUE_START!r}, {fix}"
        )
    return _dialogue_turns(text)


def _parse_demonstration(raw: dict[str, Any], where: str) -> SFTRow:
    return SFTRow(_prompt(raw["prompt"], where), _answer(raw["response"], "response", where), where)


def _parse_instruction(raw: dict[str, Any], where: str) -> SFTRow | RankingRow:
    """Alpaca's columns. An `output` that is a list holds ranked answers, best first (LLaMA-Factory's ranked sets)."""
    prompt = _instruction(raw, where)
    if not isinstance(raw["output"], list):
        return SFTRow(prompt, _answer(raw["output"], "output", where), where)
    answers = tuple(_text(answer, f"output[{i}]", where) for i, answer in enumerate(raw["output"]))
    if len(answers) < 2:
        raise UserError(f"{where}: `output` is a list of {len(answers)}, give two ranked answers or one text")
    return _ranking_row(prompt, answers, tuple(map(float, range(len(answers)))), where)


def _instruction(raw: dict[str, Any], where: str) -> tuple[Turn, ...]:
    """`input` adds to the instruction, `history` holds earlier [instruction, output] pairs."""
    instruction = _text(raw["instruction"], "instruction", where)
    extra = raw.get("input")
    if extra is not None and not isinstance(extra, str):
        raise UserError(f"{where}: `input` must be text, found {_type_name(extra)}")
    turns = [{"role": "user", "content": f"{instruction}\n{extra}" if extra and extra.strip() else instruction}]
    history = raw.get("history") or []
    if not isinstance(history, list):
        raise UserError(f"{where}: `history` must be a list of pairs, found {_type_name(history)}")
    for i, pair in reversed(list(enumerate(history))):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise UserError(f"{where}: `history[{i}]` must be a pair of an instruction and its output")
        texts = [_text(text, f"history[{i}]", where) for text in pair]
        turns = [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}, *turns]
    return tuple(turns)


def _demonstration(messages: object, column: str, where: str) -> SFTRow:
    turns = _turns(messages, column, where)
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise UserError(f"{where}: `{column}` must hold a prompt and end with an assistant turn")
    return SFTRow(turns[:-1], turns[-1]["content"], where)


def _parse_text(raw: dict[str, Any], where: str) -> TextRow:
    return TextRow(_text(raw["text"], "text", where), where)


def _parse_prompt(raw: dict[str, Any], where: str) -> PromptRow:
    return PromptRow(_prompt(raw["prompt"], where), where)


LAYOUTS: tuple[tuple[tuple[str, ...], Callable[[dict[str, Any], str], Row]], ...] = (
    (("prompt", "chosen", "rejected"), _parse_pair),
    (("prompt", "responses", "ranks"), _parse_ranked),
    (("prompt", "responses", "scores"), _parse_ranked),
    (("conversations", "chosen", "rejected"), lambda raw, where: _parse_pair(raw, where, "conversations")),
    (("messages", "chosen", "rejected"), lambda raw, where: _parse_pair(raw, where, "messages")),
    (("instruction", "chosen", "rejected"), lambda raw, where: _pair(_instruction(raw, where), raw, where)),
    (("chosen", "rejected"), _parse_dialogue_pair),
    (("prompt", "response"), _parse_demonstration),
    (("prompt", "completion"), lambda raw, where: _parse_demonstration(raw | {"response": raw["completion"]}, where)),
    (("messages",), lambda raw, where: _demonstration(raw["messages"], "messages", where)),
    (("conversations",), lambda raw, where: _demonstration(raw["conversations"], "conversations", where)),
    (("instruction", "output"), _parse_instruction),
    (("prompt",), _parse_prompt),
    (("text",), _parse_text),
)


def _ranking_row(
    prompt: tuple[Turn, ...], answers: tuple[str, ...], ranks: tuple[float, ...], where: str
) -> RankingRow:
    if len(set(answers)) == 1:
        raise Unusable("identical answers")
    if len(set(ranks)) == 1:
        raise Unusable("all answers ranked equal")
    return RankingRow(prompt, answers, ranks, where)


def _prompt(value: object, where: str, column: str = "prompt") -> tuple[Turn, ...]:
    """Messages, a dialogue in the HH layout (an open "Assistant:" at its end is cut), or one user turn."""
    if isinstance(value, list):
        turns = _turns(value, column, where)
        if not turns or turns[-1]["role"] != "user":
            raise UserError(f"{where}: `{column}` as a list of messages must end with a user turn")
        return turns
    text = _text(value, column, where)
    if text.lstrip().startswith("Human:") and "\n\nAssistant:" in text:
        text = "\n\n" + text.lstrip()  # a dialogue that lost the blank line before its first turn
    if not text.startswith(DIALOGUE_START):
        return ({"role": "user", "content": text},)
    turns = _dialogue_turns(text)
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
        turns = turns[:-1]
    if any(not turn["content"].strip() for turn in turns):
        raise Unusable("dialogue with an empty turn")
    if turns[-1]["role"] == "assistant":
        raise Unusable("prompt that ends with an answer")
    return turns


def _dialogue_turns(text: str) -> tuple[Turn, ...]:
    """Exactly one space after each marker belongs to the layout, all other whitespace to the turn."""
    _, *parts = _DIALOGUE_MARKER.split(text)
    return tuple(
        {"role": _DIALOGUE_ROLES[speaker], "content": content.removeprefix(" ")}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    )


def _answer(value: object, column: str, where: str) -> str:
    """Text, one assistant message, or a list of one."""
    if not isinstance(value, (list, dict)):
        return _text(value, column, where)
    turns = _turns(value if isinstance(value, list) else [value], column, where)
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise UserError(f"{where}: `{column}` as a list of messages must hold one assistant turn")
    return turns[0]["content"]


def _turns(value: object, column: str, where: str) -> tuple[Turn, ...]:
    if not isinstance(value, list):
        raise UserError(f"{where}: `{column}` must be a list of messages, found {_type_name(value)}")
    return tuple(_turn(message, f"{column}[{i}]", where) for i, message in enumerate(value))


def _turn(message: object, name: str, where: str) -> Turn:
    """A message in OpenAI's layout (role, content) or ShareGPT's (from, value)."""
    if not isinstance(message, dict):
        raise UserError(f"{where}: `{name}` must be an object with a role and a content, found {_type_name(message)}")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    role = _SHAREGPT_ROLES.get(str(role), role)
    calls = next((key for key in _TOOLS if message.get(key) not in _EMPTY), None)
    if role in _TOOL_ROLES or calls:
        found = f"the role {role!r}" if role in _TOOL_ROLES else f"`{calls}`"
        raise UserError(f"{where}: `{name}` has {found}, and tools are not supported; remove the row")
    if role not in ROLES:
        raise UserError(f"{where}: `{name}` has the role {role!r}, it must be one of {', '.join(ROLES)}; correct it")
    return {"role": role, "content": _content(content, f"{name}.content", where)}


def _content(value: object, name: str, where: str) -> str:
    """Text, or a list of parts {"type": "text", "text": ...}, which are joined."""
    if isinstance(value, list) and value and all(isinstance(part, dict) and "type" in part for part in value):
        for i, part in enumerate(value):
            if part["type"] != "text":
                raise UserError(
                    f"{where}: `{name}[{i}]` is of type {part['type']!r}, and only text is supported; remove the row"
                )
            if not isinstance(part.get("text"), str):
                raise UserError(f"{where}: `{name}[{i}].text` must be text, found {_type_name(part.get('text'))}")
        value = "".join(part["text"] for part in value)
    return _text(value, name, where)


def _text(value: object, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: `{name}` must be text, found {_type_name(value)}")
    if not value.strip():
        raise UserError(f"{where}: `{name}` is empty, fill it or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: `{name}` has half a surrogate pair at {error.start}, remove it") from error
    return value


def _type_name(value: object) -> str:
    return "null" if value is None else type(value).__name__
