"""The `tristage` command.

    tristage train STEP CONFIG [key=value ...] [launcher options]         as launch/STEP.sh, for an installed wheel
    tristage config CONFIG [key=value ...]                                the resolved config: each value, and its place
    tristage settings STEP [KEY]                                          every setting: type, default, meaning
    tristage data show CONFIG [key=value ...] [--rows 3] [--heldout]      rows as the step will see them
    tristage data check CONFIG [key=value ...]                            all problems of the data
    tristage plan CONFIG [key=value ...] [--gpus 8] [--gpu-memory 80]     the memory that it needs, and what fits
    tristage merge BASE ADAPTER OUT                                       a LoRA adapter into the model it is for
    tristage report RUN... [--out FILE] [--watch [SECONDS]]               a page of a run, of several, or of a pipeline
    tristage chat MODEL [MODEL ...] [--reward-model MODEL]                a conversation, side by side with several
    tristage compare MODEL MODEL [...] --prompts FILE                     answers to the same prompts, win rates, a page
    tristage doctor [CONFIG] [key=value ...] [--ranks N]                  problems that would stop a run

CONFIG is a step's YAML; its name or --step selects the step.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from tristage import __version__
from tristage.cli import answers
from tristage.cli.show_settings import config_lines, setting_lines
from tristage.config import deepspeed_keys, load_config
from tristage.config.steps import STEPS, settings_class
from tristage.errors import UserError
from tristage.launch import main as launcher


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 1 for problems found, or a plan that does not fit; 2 for a user error."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["train"] and words[1:2] and words[1] in STEPS:
        return launcher.main([f"{words[1]}.train", *words[2:]])  # it has options that argparse does not know
    parser = argparse.ArgumentParser("tristage", description="RLHF in three steps on DeepSpeed.")
    parser.add_argument("--version", action="version", version=f"tristage {__version__}")
    subcommands = parser.add_subparsers(dest="subcommand")
    train = subcommands.add_parser("train", help="launch a step: options, ranks, logs, signals, restarts")
    train.add_argument("step", choices=STEPS, help="followed by CONFIG [key=value ...] [launcher options]")
    _config_arguments(subcommands.add_parser("config", help="print a resolved config and where each value is from"))
    _settings_arguments(subcommands.add_parser("settings", help="list the settings of a step: type, default, meaning"))
    _merge_arguments(subcommands.add_parser("merge", help="write a model with a LoRA adapter merged"))
    _data_arguments(subcommands.add_parser("data", help="show or check the rows that a step will train on"))
    _plan_arguments(subcommands.add_parser("plan", help="the memory that a step needs, before it is started"))
    _report_arguments(subcommands.add_parser("report", help="write a page about a run, several runs or a pipeline"))
    answers.chat_arguments(subcommands.add_parser("chat", help="talk with a model, or with several at once"))
    answers.compare_arguments(subcommands.add_parser("compare", help="compare models on the same prompts"))
    _doctor_arguments(subcommands.add_parser("doctor", help="check this machine, or a config on it, for problems"))
    arguments, rest = parser.parse_known_args(argv)
    if arguments.subcommand is None and not rest:
        parser.print_help()
        return 0
    takes_settings = hasattr(arguments, "settings")
    if unknown := [word for word in rest if not takes_settings or "=" not in word or word.startswith("-")]:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    if takes_settings:
        arguments.settings += rest
    try:
        return RUN[arguments.subcommand](arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _merge_arguments(merge: argparse.ArgumentParser) -> None:
    merge.add_argument("base", help="folder or id of the model that the adapter was trained on")
    merge.add_argument("adapter", help="folder of the adapter, such as OUT/final_adapter")
    merge.add_argument("out", help="folder to write: weights, config, tokenizer")


def _data_arguments(data: argparse.ArgumentParser) -> None:
    commands = data.add_subparsers(required=True, dest="command")
    helps = {"show": "print rows as the step will see them", "check": "read all rows and list what is wrong"}
    for name, does in helps.items():
        command = commands.add_parser(name, help=does)
        _config_arguments(command)
        if name == "show":
            command.add_argument("--rows", type=int, default=3, help="how many")
            command.add_argument("--heldout", action="store_true", help="rows of the held-out set")


def _config_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", help="a step's YAML")
    command.add_argument("settings", nargs="*", metavar="key=value", help="as for the step itself")
    command.add_argument("--step", choices=STEPS, help="the step, if the YAML's name does not have it")


def _settings_arguments(settings: argparse.ArgumentParser) -> None:
    settings.add_argument("step", choices=STEPS)
    settings.add_argument("key", nargs="?", help="one setting or group, by its key or the last part of it")


def _plan_arguments(plan: argparse.ArgumentParser) -> None:
    _config_arguments(plan)
    plan.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs of all nodes together (8)")
    plan.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of one node (8)")
    plan.add_argument("--gpu-memory", type=float, default=80, metavar="GiB", help="of one GPU (80)")
    plan.add_argument("--host-memory", type=float, metavar="GiB", help="of one node; not checked unless given")


def _report_arguments(report: argparse.ArgumentParser) -> None:
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or one that holds runs")
    report.add_argument("--out", type=Path, metavar="FILE", help="RUN/report.html; of several runs report.html")
    again = "write it again every N seconds until the runs end (10)"
    report.add_argument("--watch", nargs="?", const=10, type=int, metavar="N", help=again)


def _doctor_arguments(doctor: argparse.ArgumentParser) -> None:
    doctor.add_argument("config", nargs="?", help="a step's YAML; also check the files it names")
    doctor.add_argument("settings", nargs="*", metavar="key=value", help="as for the step itself")
    doctor.add_argument("--step", choices=STEPS, help="the step, if the YAML's name does not have it")
    doctor.add_argument("--ranks", type=int, help="ranks of the run; default: this machine's GPUs, or 2")
    doctor.add_argument("--deepspeed", action="store_true", help="instead: every key that a DeepSpeed JSON can hold")


def _config(arguments: argparse.Namespace) -> int:
    words = ["--config", arguments.config, *arguments.settings]
    settings = load_config(settings_class(arguments.config, arguments.step), words)
    print("\n".join(config_lines(settings)), flush=True)
    return 0


def _settings(arguments: argparse.Namespace) -> int:
    print("\n".join(setting_lines(settings_class("", arguments.step), arguments.key)), flush=True)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    if arguments.deepspeed:
        for key, verdict, stages, says in deepspeed_keys.rows():
            print(f"{key:<58}  {verdict:<7}  {stages:<7}  {says}")
        return 0
    settings = None
    if arguments.config is not None:
        words = ["--config", arguments.config, *arguments.settings]
        settings = load_config(settings_class(arguments.config, arguments.step), words)
    from tristage.cli import doctor  # imported here: torch takes seconds
    from tristage.models.quiet import quiet_libraries

    quiet_libraries()
    findings = []
    for finding in doctor.examine(settings, arguments.ranks or doctor.default_ranks()):
        print(finding, flush=True)
        findings.append(finding)
    stops = sum(finding.level == "stop" for finding in findings)
    print(f"{stops} to fix before a run" if stops else "nothing would stop a run")
    return int(stops > 0)


def _report(arguments: argparse.Namespace) -> int:
    from tristage.reporting.report import watch, write_report  # imported here: jinja2 takes time

    if arguments.watch is not None:
        if arguments.watch < 1:
            raise UserError(f"--watch {arguments.watch}: give a number of seconds above 0")
        watch(arguments.runs, arguments.out, arguments.watch)
        return 0
    out, lines = write_report(arguments.runs, arguments.out)
    print("\n".join([*lines, f"report: {out}"]), flush=True)
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from tristage.models.quiet import quiet_libraries
    from tristage.models.saving import merge_adapter  # imported here: torch takes seconds

    quiet_libraries()
    merge_adapter(arguments.base, arguments.adapter, arguments.out)
    print(f"{arguments.base} with {arguments.adapter} is in {arguments.out}")
    return 0


def _data(arguments: argparse.Namespace) -> int:
    words = ["--config", arguments.config, *arguments.settings]
    settings = load_config(settings_class(arguments.config, arguments.step), words)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing here needs a GPU, and DeepSpeed would announce its choice
    # Imported here: transformers takes seconds, and a wrong config should be reported at once.
    from tristage.cli import inspect_data as inspect
    from tristage.data.template import read_template
    from tristage.models.quiet import quiet_libraries
    from tristage.models.tokenizer import load_tokenizer

    quiet_libraries()
    tokenizer = load_tokenizer(settings.tokenizer_path, read_template(settings), settings.trust_remote_code)
    console = _console()
    if arguments.command == "show":
        inspect.show(settings, tokenizer, arguments.rows, arguments.heldout, console)
        return 0
    problems = inspect.check(settings, tokenizer, console)
    for problem in problems:
        console.print(f"to fix: {problem}", style="bold red")
    if not problems:
        console.print("nothing to fix")
    return int(bool(problems))


def _plan(arguments: argparse.Namespace) -> int:
    words = ["--config", arguments.config, *arguments.settings]
    settings = load_config(settings_class(arguments.config, arguments.step), words)
    for name in ("gpus", "gpus_per_node", "gpu_memory", "host_memory"):
        if (value := getattr(arguments, name)) is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value:g}: give a number above 0")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from tristage.models.quiet import quiet_libraries
    from tristage.planning import formulas as memory  # imported here: torch takes seconds
    from tristage.planning import report

    quiet_libraries()
    machine = memory.Machine(
        arguments.gpus,
        arguments.gpus_per_node,
        arguments.gpu_memory * memory.GIB,
        None if arguments.host_memory is None else arguments.host_memory * memory.GIB,
        cpu=settings.device == "cpu",
    )
    return 0 if report.report(settings, machine, _console()) else 1


RUN = {"config": _config, "settings": _settings, "data": _data, "plan": _plan, "merge": _merge, "doctor": _doctor}
RUN |= {"report": _report, "chat": answers.chat, "compare": answers.compare}


def _console() -> Console:
    width = None if sys.stdout.isatty() else 160  # a pipe has no width, and 80 columns would cut file names
    return Console(markup=False, highlight=False, soft_wrap=True, width=width)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
