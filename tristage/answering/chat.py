"""A conversation in a terminal with one or several models, which answer side by side.

    tristage chat MODEL [MODEL ...] [--reward-model MODEL]

/new starts again, /tokens shows the reward model's value at each token, /quit or Ctrl-D ends; Ctrl-C stops an answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from tristage.answering.models import Answer, Judge, Speaker, unique_names
from tristage.data.rows import Turn
from tristage.errors import UserError
from tristage.rollout import SamplingConfig

SIDE_BY_SIDE = 50  # columns that a model needs
HELP = "/new starts again, /tokens shows values of tokens, /quit ends, Ctrl-C stops an answer"
NOTHING = Answer("", 0, False)


@dataclass
class Conversation:
    """One model and the dialogue that it has seen: what you said and what it answered."""

    speaker: Speaker
    name: str
    turns: list[Turn] = field(default_factory=list)
    answer: Answer = NOTHING

    def said(self) -> None:
        """The answer becomes part of the dialogue."""
        self.turns.append({"role": "assistant", "content": self.answer.text})


class Chat:
    """The state of a conversation, whatever shows it."""

    def __init__(self, speakers: Sequence[Speaker], judge: Judge | None, sampling: SamplingConfig, seed: int) -> None:
        names = unique_names([speaker.name for speaker in speakers])
        self.all = [Conversation(speaker, name) for speaker, name in zip(speakers, names, strict=True)]
        self.judge, self.sampling, self.seed, self.asked = judge, sampling, seed, 0

    def restart(self) -> None:
        for each in self.all:
            each.turns.clear()

    def ask(self, text: str) -> Generator[None, None, None]:
        """Give all models your turn; each step, one more token of every answer that goes on."""
        self.asked += 1
        for each in self.all:
            each.turns.append({"role": "user", "content": text})
            each.answer = NOTHING
        try:
            streams = [
                each.speaker.stream(each.turns, self.sampling, self.seed, self.asked - 1) for each in self.all
            ]
            going = list(zip(self.all, streams, strict=True))
            while going:
                for pair in list(going):
                    each, stream = pair
                    answer = next(stream, None)
                    if answer is None:
                        going.remove(pair)
                    else:
                        each.answer = answer
                yield
        except UserError:
            for each in self.all:
                each.turns.pop()
            raise
        finally:  # also where it was stopped
            for each in self.all:
                if each.turns and each.turns[-1]["role"] == "user":
                    each.said()

    def scores(self) -> list[float] | None:
        """Of each model's last answer."""
        if self.judge is None:
            return None
        return self.judge.scores([each.turns[:-1] for each in self.all], [each.answer for each in self.all])


def run(chat: Chat, console: Console, lines: Iterable[str]) -> None:
    """Answer line after line; commands start with "/"."""
    with_tokens = False
    console.print(HELP, style="dim", markup=False)
    for line in lines:
        text = line.strip()
        if text == "/quit":
            return
        if text == "/new":
            chat.restart()
            console.print("a new conversation", style="dim")
        elif text == "/tokens":
            with_tokens = not with_tokens
            console.print(f"values of tokens {'on' if with_tokens else 'off'}", style="dim")
        elif text.startswith("/"):
            console.print(HELP, style="dim", markup=False)
        elif text:
            try:
                _answer(chat, console, text, with_tokens)
            except UserError as error:
                console.print(f"not answered: {error}", markup=False, highlight=False)


def _answer(chat: Chat, console: Console, text: str, with_tokens: bool) -> None:
    with contextlib.suppress(KeyboardInterrupt):  # the answers so far are kept
        if len(chat.all) > 1 and console.is_terminal and console.width >= SIDE_BY_SIDE * len(chat.all):
            _side_by_side(chat, console, text)
        else:
            _one_after_another(chat, console, text)
    scores = chat.scores()
    if scores is None:
        return
    for each, score in zip(chat.all, scores, strict=True):
        console.print(f"{each.name}: score {score:.3f}", style="bold", markup=False, highlight=False)
        if with_tokens and chat.judge is not None:
            console.print(coloured(chat.judge.token_values(each.turns[:-1], each.answer), console))


def _side_by_side(chat: Chat, console: Console, text: str) -> None:
    width = console.width // len(chat.all)

    def picture() -> Columns:
        panels = [Panel(Text(each.answer.text), title=Text(each.name), width=width - 1) for each in chat.all]
        return Columns(panels, padding=(0, 1, 0, 0))

    live = Live(console=console, get_renderable=picture, refresh_per_second=12)
    with live, contextlib.closing(chat.ask(text)) as steps:
        for _ in steps:
            pass


def _one_after_another(chat: Chat, console: Console, text: str) -> None:
    """The first model's answer as it comes, the others' below it when all have ended."""
    shown = 0
    first, *others = chat.all
    if others:
        console.print(f"{first.name}: ", style="bold", end="", markup=False)
    with contextlib.closing(chat.ask(text)) as steps:
        for _ in steps:
            console.out(first.answer.text[shown:], end="", highlight=False)
            shown = len(first.answer.text)
    console.print()
    for each in others:
        console.print(f"{each.name}: ", style="bold", end="", markup=False)
        console.out(each.answer.text, highlight=False)


def coloured(values: Sequence[tuple[str, float]], console: Console) -> Text:
    """Tokens on red where the value is low, on green where it is high; with numbers where there is no colour."""
    if console.color_system is None:
        return Text(" ".join(f"{token.strip() or repr(token)}[{value:.2f}]" for token, value in values))
    low, high = min(value for _, value in values), max(value for _, value in values)
    text = Text()
    for token, value in values:
        share = (value - low) / (high - low) if high > low else 0.5
        red, green = (round(70 + 130 * part) for part in (1 - share, share))
        text.append(token, style=f"white on rgb({red},{green},70)")
    text.append(f"  {low:.2f} red to {high:.2f} green", style="dim")
    return text


def keyboard(console: Console) -> Iterator[str]:
    """Lines as they are typed (or piped), until Ctrl-D."""
    while True:
        try:
            yield input("you> " if console.is_terminal else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print()
