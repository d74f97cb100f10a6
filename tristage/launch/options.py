"""Parses the words after a launcher: settings, options of the `deepspeed` launcher, counts of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tristage.errors import UserError

# Options of the `deepspeed` launcher that are read here -> their short form.
OPTIONS_WITH_VALUE = {"--hostfile": "-H", "--include": "-i", "--exclude": "-e", "--num_nodes": "", "--master_port": ""}
OPTIONS_WITH_VALUE |= dict.fromkeys(
    ("--num_gpus", "--num_accelerators", "--master_addr", "--ssh_port", "--launcher", "--node_rank"), ""
)
PLACES = ("--num_gpus", "--num_accelerators", "--hostfile", "--include", "--exclude")


class Words(NamedTuple):
    """The words after CONFIG, sorted."""

    settings: list[str]
    """key=value, and stray words, which the step refuses."""
    options: list[str]
    """For the `deepspeed` launcher."""
    restarts: int
    """--max-restarts N."""
    dry_run: bool
    cpu: bool
    """--cpu N, which is also in `options` as --num_gpus N."""


def parse_words(words: Sequence[str]) -> Words:
    """Sort the words after CONFIG; options may come before, between and after settings.

    A word after an option is its value unless it is another option or a key=value: the options of the `deepspeed`
    launcher are not listed here.

    Raises:
        UserError: --max-restarts without a number.
    """
    settings: list[str] = []
    options: list[str] = []
    restarts: list[str] = []
    dry_run = cpu = False
    value_goes_to: list[str] | None = None  # the value of an option is the next word
    for word in words:
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            (settings if value_goes_to is None or equals else value_goes_to).append(word)
            value_goes_to = None
        elif name == "--dry-run":
            dry_run, value_goes_to = True, None
        elif name == "--max-restarts":
            restarts = [value] if equals else []
            value_goes_to = None if equals else restarts
        else:
            cpu |= name == "--cpu"
            options.append(("--num_gpus" if name in ("--cpu", "--num-gpus") else name) + equals + value)
            value_goes_to = None if equals else options
    if any(word.partition("=")[0] == "--max-restarts" for word in words) and not "".join(restarts).isdecimal():
        raise UserError("--max-restarts needs a number")
    return Words(settings, options, int("".join(restarts) or 0), dry_run, cpu)


def option(options: Sequence[str], name: str) -> str | None:
    """The value of a launcher option, `--name value`, `--name=value` or its short form; None if it is not given."""
    names = {name, OPTIONS_WITH_VALUE[name]} - {""}
    for place, word in enumerate(options):
        head, equals, value = word.partition("=")
        if head in names:
            return value if equals else next(iter(options[place + 1 :]), "")
    return None


def count_of(text: str) -> int:
    """A count in a launcher option. Raises UserError."""
    if not text.isdecimal():
        raise UserError(f"{text!r} is not a number of nodes or ranks; write for instance --num-gpus 2")
    return int(text)


def requested_ranks(nodes: dict[str, list[int]], options: Sequence[str]) -> int | None:
    """Ranks by the hostfile's `nodes` or by a count in the options; None if neither is given. Raises UserError."""
    if nodes:
        return sum(map(len, nodes.values()))
    count = option(options, "--num_gpus") or option(options, "--num_accelerators")
    return count_of(count) if count else None
