"""examples/judge_over_http.py against a server on loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from examples.judge_over_http import judge
from tristage.answering.scorers import Calls, score_texts
from tristage.errors import UserError


class Server(ThreadingHTTPServer):
    """Rates an answer by its number of words, or says that it cannot; fails as often as `failures` says."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.headers: list[Any] = []
        self.failures = 0


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = question["messages"][0]["content"].rpartition("Answer: ")[2]
        assert self.path == "/v1/chat/completions" and question["model"] == "tiny"
        if self.server.failures:
            self.server.failures -= 1
            self.send_error(503)
            return
        self.server.asked.append(answer)
        reply = f"{len(answer.split())}/10" if answer else "I cannot say"
        body = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    monkeypatch.setenv("JUDGE_URL", f"http://127.0.0.1:{made.server_port}/v1/")
    monkeypatch.setenv("JUDGE_MODEL", "tiny")
    monkeypatch.setenv("JUDGE_CACHE", str(tmp_path / "judge.sqlite"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield made
    made.shutdown()
    made.server_close()


def test_the_judge_scores_each_response_and_asks_nothing_twice(server: Server) -> None:
    found = score_texts(judge, ["p"] * 4, ["one two", "", "one", "one two"], "judge")
    assert found.scores.tolist() == pytest.approx([0.2, 0, 0.1, 0.2])
    assert found.extra["unreadable"].tolist() == [0, 1, 0, 0]
    assert sorted(server.asked) == ["", "one", "one two"]
    again = score_texts(judge, ["p", "another"], ["one", "one"], "judge")
    assert again.scores.tolist() == pytest.approx([0.1, 0.1]) and len(server.asked) == 4  # another prompt is asked


def test_what_was_answered_before_a_failure_is_kept(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("examples.judge_over_http.AT_ONCE", 1)
    monkeypatch.setattr("tristage.answering.scorers.time.sleep", lambda seconds: None)
    server.failures = 1
    found = score_texts(judge, ["p"] * 2, ["one", "one two"], "judge", calls=Calls(60, retries=1))
    assert found.scores.tolist() == pytest.approx([0.1, 0.2])
    server.failures = 9
    with pytest.raises(UserError, match=r"judge failed 2 times on 1 responses \(HTTPError: HTTP Error 503"):
        score_texts(judge, ["p"], ["three words here"], "judge", calls=Calls(60, retries=1))
