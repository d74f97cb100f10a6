"""A launcher: check the config, choose the device, start the ranks, start them again if they fail.

    python -m tristage.launch step1_sft.train CONFIG [key=value ...] [--cpu N | --num-gpus N | --hostfile F]
        [--dry-run] [--max-restarts N] [other options of the deepspeed launcher]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from tristage.errors import UserError
from tristage.launch import cpu_op
from tristage.launch.check_config import check_config
from tristage.launch.dry_run import show
from tristage.launch.options import PLACES, Words, option, parse_words
from tristage.launch.supervise import Supervisor

MOST_PICKS = 5  # of a port that other processes keep taking
FINAL = (0, 2, 75)  # success, a user error, a signal: another start would not help
USAGE = (
    "usage: bash launch/{step}.sh CONFIG [key=value ...] [--hostfile F | --num-gpus N | --cpu N] [--dry-run] "
    "[--max-restarts N] [deepspeed launcher options]"
)


def main(argv: list[str]) -> int:
    """The exit code of the last start; 2 and one sentence for what the user must fix."""
    module, *rest = argv
    if not rest or rest[0].startswith("-"):
        print(USAGE.format(step=module.removesuffix(".train")), file=sys.stderr)
        return 2
    try:
        return launch_step(module, rest[0], rest[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def launch_step(module: str, config: str, words: Sequence[str]) -> int:
    """Launch a step by the words after a launcher; its exit code. Raises UserError before anything starts."""
    given = parse_words(words)
    step_words = [module, "--config", config, *given.settings]
    settings = check_config(step_words, given.options)
    options = choose_device(given)
    if given.dry_run:
        show(settings, step_words, options)
        return 0
    restart, pick = 0, 1
    while True:
        supervisor = Supervisor()
        code = supervisor.run(step_words, options)
        if supervisor.port_taken and not supervisor.stopped_by and pick < MOST_PICKS:
            pick += 1
            continue
        if code in FINAL or supervisor.stopped_by or restart == given.restarts:
            return code
        restart += 1
        print(f"exit code {code}: restart {restart} of at most {given.restarts}", file=sys.stderr, flush=True)


def choose_device(given: Words) -> list[str]:
    """The launcher options, with two CPU ranks if there is no GPU and no count; sets the environment to match."""
    if not given.cpu and cpu_op.num_gpus():
        return given.options
    if not given.dry_run:
        cpu_op.build_cpu_op()
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if any(option(given.options, name) is not None for name in PLACES):
        return given.options
    return [*given.options, "--num_gpus", "2"]
