"""`tristage chat` and `tristage compare`: their options, and what they check before a model loads."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from tristage.errors import UserError


def _answering_arguments(command: argparse.ArgumentParser, max_tokens: int) -> None:
    command.add_argument("models", nargs="+", metavar="MODEL", help="folder of a model, such as OUT/final")
    command.add_argument("--reward-model", metavar="MODEL", help="scores each answer")
    command.add_argument("--template", type=Path, metavar="FILE", help="Jinja chat template, for folders without one")
    command.add_argument("--temperature", type=float, default=1.0)
    command.add_argument("--top-p", type=float, default=1.0)
    most = f"of an answer ({max_tokens}); at most half of what a model reads"
    command.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N", help=most)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--trust-remote-code", action="store_true", help="run Python code that model folders bring")


def chat_arguments(chat: argparse.ArgumentParser) -> None:
    """The options of `tristage chat`."""
    _answering_arguments(chat, 512)
    chat.add_argument("--web", action="store_true", help="as a page in a browser, with blind votes")
    chat.add_argument("--port", type=int, default=8765, help="of --web, on this machine alone (8765)")
    chat.add_argument("--votes", type=Path, default=Path("votes.jsonl"), help="preference rows of --web (votes.jsonl)")


def compare_arguments(compare: argparse.ArgumentParser) -> None:
    """The options of `tristage compare`."""
    _answering_arguments(compare, 256)
    compare.add_argument("--prompts", required=True, metavar="FILE", help="rows with a prompt, as for step 3")
    compare.add_argument("--grader", metavar="module:function", help="(prompts, responses) -> scores")
    compare.add_argument("--limit", type=int, metavar="N", help="use the first N prompts")
    compare.add_argument("--out", type=Path, default=Path("comparison"), help="folder of the results (comparison)")


def chat(arguments: argparse.Namespace) -> int:
    """tristage chat. Raises UserError."""
    sampling, template = _sampling(arguments)
    from tristage.answering import chat as terminal
    from tristage.answering.models import Judge, Speaker

    opened = None
    if arguments.web:
        from tristage.answering import web  # before models load: the port may be in use

        opened = web.open_port(arguments.port)
    trust = arguments.trust_remote_code
    speakers = [Speaker(path, template, trust) for path in arguments.models]
    judge = None if arguments.reward_model is None else Judge(arguments.reward_model, trust)
    conversation = terminal.Chat(speakers, judge, sampling, arguments.seed)
    if opened is not None:
        web.serve(conversation, arguments.votes, opened, arguments.seed)
        return 0
    console = Console(highlight=False)
    terminal.run(conversation, console, terminal.keyboard(console))
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """tristage compare. Raises UserError."""
    if len(arguments.models) < 2:
        raise UserError("give two models or more to compare")
    sampling, template = _sampling(arguments)
    from tristage.answering import compare as comparison
    from tristage.answering.models import Judge, check_folder
    from tristage.answering.scorers import load_function, takes_rows

    for path in arguments.models:
        check_folder(path, "language model")
    trust, prompts = arguments.trust_remote_code, comparison.read_prompts(arguments.prompts, arguments.limit)
    grader = None if arguments.grader is None else load_function(arguments.grader, "tristage compare", "--grader")
    if grader is not None and takes_rows(grader):
        raise UserError(f"--grader {arguments.grader} reads `rows`, which compare has not; give one without")
    judge = None if arguments.reward_model is None else Judge(arguments.reward_model, trust)
    options = {"template": template, "trust_remote_code": trust}
    found = comparison.compare(arguments.models, prompts, sampling, arguments.seed, judge, grader, **options)
    rows = comparison.summary(found)
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(comparison.table(rows))
    print(f"answers and page: {comparison.write(arguments.out, prompts, found, rows)}", flush=True)
    return 0


def _sampling(arguments: argparse.Namespace) -> tuple[Any, str | None]:
    """How answers are sampled, and the text of a template that was given; what both need before anything is loaded."""
    for name, value, fine in (
        ("temperature", arguments.temperature, arguments.temperature > 0),
        ("top-p", arguments.top_p, 0 < arguments.top_p <= 1),
        ("max-tokens", arguments.max_tokens, arguments.max_tokens > 0),
        ("seed", arguments.seed, arguments.seed >= 0),
    ):
        if not fine:
            raise UserError(f"--{name} {value:g} is out of range")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from tristage.data.template import template_text
    from tristage.models.quiet import quiet_libraries
    from tristage.rollout import SamplingConfig  # imported here: torch takes seconds

    quiet_libraries()
    sampling = SamplingConfig(arguments.max_tokens, arguments.temperature, arguments.top_p, 0)
    return sampling, None if arguments.template is None else template_text(arguments.template)
