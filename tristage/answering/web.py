"""`tristage chat --web`: the conversation as a page on this machine, with blind votes that step 2 can train on.

Without votes every model answers, by name. With votes two models answer without their names, in random order; the
answer that a person prefers goes on as the dialogue, and the pair is a row of the votes file. The server listens on the
loopback interface and refuses requests that another page makes the browser send.
"""

from __future__ import annotations

import importlib.util
import json
import random
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tristage.answering.chat import Chat
from tristage.answering.models import Answer
from tristage.data.rows import Turn
from tristage.errors import UserError
from tristage.intervals import wilson_interval
from tristage.reporting.report import rendered
from tristage.runs.record import lines_of
from tristage.storage.durable import append_json

HOST = "127.0.0.1"
HERE = Path(__file__).parent
CHOICES = ("a", "b", "tie")


def open_port(port: int) -> socket.socket:
    """A socket that listens on the loopback interface. Raises UserError: the port is in use, a package is missing."""
    if any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn")):
        raise UserError("--web needs FastAPI and uvicorn: pip install 'tristage[web]'")
    opened = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((HOST, port))
    except OSError as error:
        opened.close()
        raise UserError(f"--port {port}: cannot be opened on {HOST} ({error.strerror}); give another one") from None
    return opened


class Votes:
    """Preferences of a person: FILE has a row per choice, FILE with .ties before its ending one per tie."""

    def __init__(self, file: Path) -> None:
        self.file, self.ties = file, file.with_suffix(f".ties{file.suffix}")

    def add(self, prompt: Sequence[Turn], answers: Sequence[tuple[str, str]], choice: str) -> None:
        """`answers`: (model, text) of a and b. Raises UserError: the file cannot be written."""
        (first, one), (second, other) = answers
        if choice == "tie":
            append_json(self.ties, [{"prompt": list(prompt), "responses": [one, other], "models": [first, second]}])
            return
        chosen, rejected = ((first, one), (second, other)) if choice == "a" else ((second, other), (first, one))
        row = {"prompt": list(prompt), "chosen": chosen[1], "rejected": rejected[1]}
        append_json(self.file, [row | {"chosen_model": chosen[0], "rejected_model": rejected[0]}])

    def tally(self) -> list[dict[str, Any]]:
        """Per model: wins, losses, ties, and its share of the decided votes with the 95 % interval."""
        wins, losses, ties = ({}, {}, {})  # type: tuple[dict[str, int], dict[str, int], dict[str, int]]
        for line in lines_of(self.file):
            if "chosen_model" in line and "rejected_model" in line:
                wins[line["chosen_model"]] = wins.get(line["chosen_model"], 0) + 1
                losses[line["rejected_model"]] = losses.get(line["rejected_model"], 0) + 1
        for line in lines_of(self.ties):
            for name in line.get("models", ()):
                ties[name] = ties.get(name, 0) + 1
        found = []
        for name in sorted({*wins, *losses, *ties}):
            won, lost = wins.get(name, 0), losses.get(name, 0)
            low, high = wilson_interval(won, won + lost)
            share = won / (won + lost) if won + lost else None
            counts = {"model": name, "wins": won, "losses": lost, "ties": ties.get(name, 0)}
            found.append(counts | {"share": share, "low": low, "high": high})
        return found


class Arena:
    """What the page asks for: questions, votes, a new conversation."""

    def __init__(self, chat: Chat, votes: Votes, draws: random.Random) -> None:
        self.chat, self.votes, self.draws = chat, votes, draws
        self.blind = False
        self.dialogue: list[Turn] = []  # with votes: what has been said and preferred so far
        self.pair: list[int] | None = None  # with votes: the models behind a and b of an answer to vote on
        self.busy = threading.Lock()

    def restart(self, blind: bool) -> None:
        """A new conversation. Raises UserError: votes need two models."""
        if blind and len(self.chat.all) < 2:
            raise UserError("votes need two models or more")
        self.chat.restart()
        self.blind, self.dialogue, self.pair = blind, [], None

    def ask(self, text: str) -> Iterator[dict[str, Any]]:
        """The answers as they grow, then once more with scores. Raises UserError: vote first, or not answered."""
        if self.pair is not None:
            raise UserError("vote on these answers first")
        shown = list(self.chat.all)
        if self.blind:
            pair = self.draws.sample(range(len(shown)), 2)
            shown = [self.chat.all[place] for place in pair]
            for each in shown:
                each.turns = list(self.dialogue)
        names = ["A", "B"] if self.blind else [each.name for each in shown]
        everyone, self.chat.all = self.chat.all, shown
        try:
            for _ in self.chat.ask(text):
                yield {"answers": [_shown(name, each.answer) for name, each in zip(names, shown, strict=True)]}
            answers = [_shown(name, each.answer) for name, each in zip(names, shown, strict=True)]
            if self.blind:
                self.pair = pair
            elif self.chat.judge is not None and (scores := self.chat.scores()) is not None:
                for answer, each, score in zip(answers, shown, scores, strict=True):
                    answer["score"] = score
                    answer["tokens"] = self.chat.judge.token_values(each.turns[:-1], each.answer)
            yield {"answers": answers, "vote": self.blind}
        finally:
            self.chat.all = everyone

    def vote(self, choice: str) -> dict[str, Any]:
        """Keep a choice; the dialogue goes on with the preferred answer (of a tie, with a). Raises UserError."""
        if self.pair is None:
            raise UserError("there are no answers to vote on")
        if choice not in CHOICES:
            raise UserError(f"a vote is one of {', '.join(CHOICES)}")
        both = [self.chat.all[place] for place in self.pair]
        prompt = both[0].turns[:-1]
        self.votes.add(prompt, [(each.name, each.answer.text) for each in both], choice)
        self.dialogue = list(both[1 if choice == "b" else 0].turns)
        self.pair = None
        scores = {}
        if self.chat.judge is not None:
            found = self.chat.judge.scores([prompt, prompt], [each.answer for each in both])
            scores = {"scores": found}
        return {"names": [each.name for each in both], "tally": self.votes.tally(), **scores}


def _shown(name: str, answer: Answer) -> dict[str, Any]:
    return {"name": name, "text": answer.text, "length": answer.tokens, "ended": answer.ended}


def page(chat: Chat, tally: Sequence[dict[str, Any]]) -> str:
    """The HTML of the page."""
    models, judge = [each.name for each in chat.all], None if chat.judge is None else chat.judge.name
    return rendered("web.html", HERE, models=models, judge=judge, tally=tally)


def application(arena: Arena, port: int) -> Any:
    """The FastAPI application."""
    from fastapi import FastAPI, Request  # an extra
    from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    hosts = {f"{HOST}:{port}", f"localhost:{port}"}

    @app.middleware("http")
    async def only_this_page(request: Request, forward: Any) -> Any:
        origin = request.headers.get("origin")
        if request.headers.get("host") not in hosts or (origin and origin.partition("://")[2] not in hosts):
            return JSONResponse({"error": "only the page of this server may ask"}, 403)
        return await forward(request)

    @app.exception_handler(UserError)
    async def told(request: Request, error: UserError) -> Any:
        return JSONResponse({"error": str(error)}, 400)

    @app.get("/", response_class=HTMLResponse)
    def show() -> str:
        return page(arena.chat, arena.votes.tally())

    @app.post("/new")
    def new(body: dict[str, Any]) -> dict[str, Any]:
        with arena.busy:
            arena.restart(bool(body.get("blind")))
        return {}

    @app.post("/vote")
    def vote(body: dict[str, Any]) -> dict[str, Any]:
        with arena.busy:
            return arena.vote(str(body.get("choice")))

    @app.post("/ask")
    def ask(body: dict[str, Any]) -> Any:
        text = str(body.get("text", "")).strip()
        if not text:
            raise UserError("there is no text")
        if not arena.busy.acquire(blocking=False):
            raise UserError("the models still answer")

        def lines() -> Iterator[str]:
            try:
                for step in arena.ask(text):
                    yield json.dumps(step) + "\n"
            except UserError as error:
                yield json.dumps({"error": str(error)}) + "\n"
            finally:
                arena.busy.release()

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    return app


def serve(chat: Chat, votes: Path, opened: socket.socket, seed: int) -> None:
    """Serve the page until Ctrl-C."""
    port = opened.getsockname()[1]
    app = application(Arena(chat, Votes(votes), random.Random(seed)), port)
    import uvicorn

    print(f"open http://{HOST}:{port} in a browser; Ctrl-C ends", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[opened])
