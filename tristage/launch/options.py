"""What the words after a launcher ask for: settings, options of the `deepspeed` launcher, counts of ranks."""

from __future__ import annotations

from collections.abc import Sequence

from tristage.errors import UserError

VALUED = {"--hostfile": "-H", "--include": "-i", "--exclude": "-e", "--num_nodes": "", "--master_port": ""}
VALUED |= {"--num_gpus": "", "--num_accelerators": "", "--master_addr": "", "--ssh_port": "", "--launcher": ""}


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """What stands before the last `--` of a launcher's call, key=value ..., and what after it, options."""
    end = len(words) - 1 - words[::-1].index("--")
    return words[:end], words[end + 1 :]


def option(options: Sequence[str], name: str) -> str | None:
    """The value of a launcher option, `--name value`, `--name=value` or its short form; None where it is not given."""
    names = {name, VALUED[name]} - {""}
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


def ranks_asked(nodes: dict[str, list[int]], options: Sequence[str]) -> int | None:
    """Ranks by the hostfile's `nodes` or by a count in the options; None where neither says. Raises UserError."""
    if nodes:
        return sum(map(len, nodes.values()))
    count = option(options, "--num_gpus") or option(options, "--num_accelerators")
    return count_of(count) if count else None
