"""`tristage chat --web` in a real browser: answers stream, scores and colours show, votes become preference rows."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import uvicorn

from tests.helpers import tiny
from tristage.answering import web
from tristage.answering.chat import Chat
from tristage.answering.models import Judge, Speaker
from tristage.cli.main import main as tristage
from tristage.config.settings import SourceSettings
from tristage.data.rows import RankingRow, read_row
from tristage.data.sources import open_source
from tristage.errors import UserError
from tristage.rollout import SamplingConfig

Visit = Callable[..., Any]


class Site(NamedTuple):
    address: str
    arena: web.Arena
    votes: Path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server with two models and a reward model."""
    folder = tmp_path_factory.mktemp("chat")
    rows = tiny.write_rows(folder / "rows")
    tiny.teach(tiny.write_model(folder / "sft"), rows["sft"])
    tiny.write_model(folder / "other", seed=3, gain=2.0)
    judge = Judge(tiny.write_reward_model(folder / "scorer", str(folder / "sft")))
    speakers = [Speaker(str(folder / name)) for name in ("sft", "other")]
    chat = Chat(speakers, judge, SamplingConfig(12, 1.0, 1.0, 0), seed=5)
    opened = web.open_port(0)
    port, votes = opened.getsockname()[1], folder / "votes.jsonl"
    arena = web.Arena(chat, web.Votes(votes), random.Random(0))
    server = uvicorn.Server(uvicorn.Config(web.application(arena, port), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield Site(f"http://127.0.0.1:{port}", arena, votes)
    server.should_exit = True
    thread.join(10)


def say(view: Any, text: str) -> Any:
    """Ask, and wait for the end of the answers: the last turn."""
    view.wait_for_load_state("networkidle")  # it has begun a conversation
    count = view.locator(".turn").count()
    view.get_by_label("Your turn").fill(text)
    view.get_by_label("Your turn").press("Enter")
    view.wait_for_function(f"document.querySelectorAll('.turn').length > {count}")
    view.wait_for_function("document.getElementById('stop').disabled")
    return view.locator(".turn").last


def test_answers_of_all_models_stream_with_scores_and_colours(visit: Visit, site: Site) -> None:
    view = visit(site.address)
    turn = say(view, "Name two fruits.")
    titles = turn.locator(".side h3").all_inner_texts()
    assert [title.partition(",")[0] for title in titles] == ["sft", "other"]
    assert all("score" in title for title in titles)
    shown = turn.locator(".side p").all_inner_texts()
    assert shown == [each.answer.text for each in site.arena.chat.all] and shown[0] != shown[1]
    view.get_by_label("Colour tokens by score").check()
    tokens = turn.locator(".token")
    assert tokens.count() > 2 and tokens.first.get_attribute("title") is not None
    say(view, "Name two birds.")
    assert [len(each.turns) for each in site.arena.chat.all] == [4, 4]
    view.get_by_role("button", name="New conversation").click()
    view.wait_for_function("document.querySelectorAll('.turn').length == 0")
    assert [each.turns for each in site.arena.chat.all] == [[], []]


def test_blind_votes_become_rows_that_step_2_reads(visit: Visit, site: Site, capsys: Any) -> None:
    view = visit(site.address)
    view.get_by_label("Vote without names").check()
    turn = say(view, "Name two fruits.")
    assert turn.locator(".side h3").all_inner_texts()[0].startswith("A") and "score" not in turn.inner_text()
    assert not any(name in turn.inner_text() for name in ("sft", "other"))
    assert view.get_by_role("button", name="Send").is_disabled()  # vote first
    first, second = turn.locator(".side p").all_inner_texts()
    view.get_by_role("button", name="B is better").press("Enter")
    turn.get_by_text("You chose B is better").wait_for()
    assert "score" in turn.inner_text() and "A was" in turn.inner_text()
    again = say(view, "Name two birds.")
    third, fourth = again.locator(".side p").all_inner_texts()
    view.get_by_role("button", name="A is better").click()
    again.get_by_text("You chose A is better").wait_for()
    say(view, "Name two tools.")
    view.get_by_role("button", name="Tie").click()
    view.get_by_text("You chose Tie").wait_for()

    lines = [json.loads(line) for line in site.votes.read_text().splitlines()]
    assert [(line["chosen"], line["rejected"]) for line in lines] == [(second, first), (third, fourth)]
    asked = {"role": "user", "content": "Name two fruits."}
    goes_on = [asked, {"role": "assistant", "content": second}, {"role": "user", "content": "Name two birds."}]
    assert [line["prompt"] for line in lines] == [[asked], goes_on]
    source = SourceSettings.model_validate({"path": str(site.votes)})
    rows = [read_row(place, source, "ranking") for place in open_source(source).rows()]
    assert all(isinstance(row, RankingRow) for row in rows) and len(rows) == 2
    assert [row.answers[row.ranks.index(0)] for row in rows if isinstance(row, RankingRow)] == [second, third]

    table = view.locator("#tally tbody tr").all_inner_texts()
    assert len(table) == 2 and all(" %" in row for row in table)
    tally = {row["model"]: row for row in site.arena.votes.tally()}
    assert sum(row["wins"] for row in tally.values()) == sum(row["losses"] for row in tally.values()) == 2
    assert [row["ties"] for row in tally.values()] == [1, 1]
    view.reload()
    assert view.locator("#tally tbody tr").all_inner_texts() == table  # read again from the file


def test_step_2_trains_on_votes(site: Site, tmp_path: Path, capsys: Any) -> None:
    """`tristage data check` reads the rows as the reward model's step would."""
    if not site.votes.is_file():
        site.arena.votes.add([{"role": "user", "content": "Q"}], [("a", "fig."), ("b", "owl.")], "a")
    rows = tiny.write_rows(tmp_path / "rows")
    model = tiny.write_model(tmp_path / "model")
    tiny.reward_model_config(tmp_path, model, rows["preference"] if "preference" in rows else rows["ranking"])
    (config,) = tmp_path.glob("*.yaml")
    words = ["data", "check", str(config), f"data.train={site.votes}", f"data.heldout={site.votes}"]
    code = tristage([*words, "data.heldout_overlap=allow", "--step", "step2_reward_model"])
    printed = capsys.readouterr().out
    assert code == 0, printed


@pytest.mark.parametrize("width", (390, 1280))
def test_the_page_fits_and_has_labels(visit: Visit, site: Site, width: int) -> None:
    view = visit(site.address, width, "dark" if width == 390 else "light")
    say(view, "Name two fruits and a very long word " + "x" * 300)
    assert view.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert view.locator("h1").count() == 1 and view.get_by_label("Your turn").is_visible()


def test_a_refused_question_is_told_and_can_be_asked_again(site: Site, visit: Visit, monkeypatch: Any) -> None:
    def refuses(*arguments: Any, **options: Any) -> Iterator[None]:
        raise UserError("the dialogue: refused")
        yield

    view = visit(site.address)
    with monkeypatch.context() as patch:
        patch.setattr(site.arena.chat, "ask", refuses)
        view.get_by_label("Your turn").fill("Name two fruits.")
        view.get_by_role("button", name="Send").click()
        view.get_by_role("alert").get_by_text("the dialogue: refused").wait_for()
    assert view.get_by_label("Your turn").input_value() == "Name two fruits."
    say(view, "Name two fruits.")
    assert view.locator(".turn").count() == 1


# -- who may ask ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers, code",
    [
        ({}, 200),
        ({"Origin": "{own}"}, 200),
        ({"Host": "evil.example"}, 403),  # a name that was made to lead to 127.0.0.1
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_only_the_page_of_this_server_may_ask(site: Site, headers: dict[str, str], code: int) -> None:
    sent = {name: value.format(own=site.address) for name, value in headers.items()}
    body = json.dumps({"blind": False}).encode()
    request = urllib.request.Request(f"{site.address}/new", body, {"Content-Type": "application/json", **sent})
    try:
        with urllib.request.urlopen(request) as answer:
            assert answer.status == code
    except urllib.error.HTTPError as error:
        assert error.code == code


def test_a_port_in_use_is_one_sentence(site: Site, capsys: Any) -> None:
    port = site.address.rpartition(":")[2]
    assert tristage(["chat", "/nowhere", "--web", "--port", port]) == 2
    printed = capsys.readouterr().err
    assert f"--port {port}: cannot be opened on 127.0.0.1" in printed and printed.count("\n") == 1


def test_without_fastapi_web_says_what_to_install_before_a_model_loads(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(web.importlib.util, "find_spec", lambda name: None)
    assert tristage(["chat", "/nowhere", "--web"]) == 2
    assert capsys.readouterr().err == "error: --web needs FastAPI and uvicorn: pip install 'tristage[web]'\n"


def test_the_server_listens_on_this_machine_alone() -> None:
    with web.open_port(0) as opened:
        assert opened.getsockname()[0] == "127.0.0.1" and opened.family == socket.AF_INET
