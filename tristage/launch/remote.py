"""What reaches other nodes: arguments and variables that pass through shells unchanged."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tristage.errors import UserError
from tristage.launch.options import option
from tristage.machine.arrival import SAFE, decode

PASSED = re.compile(
    r"(NCCL|PYTHON|UCX|MV2)\w*|(GLOO|TORCH|HF|TRANSFORMERS|TRISTAGE|OMP|MKL|XDG_CACHE)_\w+|\w+_(proxy|PROXY)"
    r"|LD_LIBRARY_PATH|CUDA_HOME|DS_ACCELERATOR|TOKENIZERS_PARALLELISM|CUBLAS_WORKSPACE_CONFIG",
    re.ASCII,
)
# Any user of a machine can read the command lines on it, where DeepSpeed puts variables.
SECRET = re.compile(r"TOKEN(?!IZERS)|SECRET|PASSWORD|CREDENTIAL|_KEY$", re.IGNORECASE)
# DeepSpeed's ways to other nodes that can start a module: in the text of a shell command, and without one.
SHELL, MPI = ("pdsh",), ("openmpi", "impi")


def words_of(words: Sequence[str]) -> list[str]:
    return [decode(word) for word in words]


def check_launcher(options: Sequence[str]) -> str:
    """The way to other nodes that the options choose.

    Raises:
        UserError: one that cannot start our ranks (DeepSpeed 0.19's runners for Slurm and MPICH lose `--module`, and
            MVAPICH's names for a rank's place are not read), or options that mpirun's runner does not take.
    """
    launcher = option(options, "--launcher") or "pdsh"
    if launcher not in (*SHELL, *MPI):
        raise UserError(
            f"--launcher {launcher} cannot start these ranks; use one of {', '.join((*SHELL, *MPI))}, or in a Slurm "
            "job launch/slurm/"
        )
    if launcher in MPI:
        for name in ("--include", "--exclude", "--num_nodes", "--num_gpus"):
            if option(options, name) is not None:
                raise UserError(f"--launcher {launcher} takes the whole hostfile; leave out {name}, or change the file")
    return launcher


def check_paths(options: Sequence[str]) -> None:
    """DeepSpeed puts these into the text of its shell command as they are. Raises UserError."""
    parts = {
        "the working folder": os.getcwd(),
        "the path of python": sys.executable,
        "--master_addr": option(options, "--master_addr") or "",
        "--master_port": option(options, "--master_port") or "",
    }
    for what, text in parts.items():
        if not SAFE.fullmatch(text):
            raise UserError(
                f"{what} is {text!r}: with --hostfile it may only hold letters, digits and @+=:,./-_, for DeepSpeed "
                "hands it to shells unquoted; use another"
            )


def environment_file(variables: dict[str, str], over_mpi: dict[str, str] | None = None) -> str:
    """Lines NAME=VALUE for DeepSpeed, which puts quotes around a value where it sees fit: escaped so that they hold.

    `over_mpi`: variables besides, where mpirun carries them. No shell reads them there, and those quotes would become
    part of a value: it may hold nothing special. The user's own .deepspeed_env follows, as it is: what it says wins,
    secrets included.

    Raises:
        UserError: a value that this way cannot carry, such as one with a line break or blanks around it.
    """
    own = user_lines(variables)
    theirs = {line.partition("=")[0].strip() for line in own}
    python_path = ":".join(filter(None, (os.getcwd(), variables.get("PYTHONPATH"))))
    passed = {name: value for name, value in variables.items() if PASSED.fullmatch(name)} | {"PYTHONPATH": python_path}
    carried = escaped if over_mpi is None else plain
    rest = "$PATH" if over_mpi is None else carried("PATH", variables.get("PATH", ""))
    lines = [f"{name}={carried(name, value)}" for name, value in (over_mpi or {}).items()]
    lines += [f"PATH={carried('PATH', os.path.dirname(sys.executable))}:{rest}"]  # ninja is there, for DeepSpeed's ops
    for name, value in sorted(passed.items()):
        if SECRET.search(name) or re.search(r"//[^/@]*:[^/@]*@", value):
            if name not in theirs:
                print(f"{name} holds a secret and stays on this node; name it in ~/.deepspeed_env to pass it on")
            continue
        lines.append(f"{name}={carried(name, value)}")
    return "".join(f"{line}\n" for line in lines + own)


def escaped(name: str, value: str) -> str:
    """`value` for the inside of the double quotes that DeepSpeed sets when it holds anything special."""
    if "\n" in value or "\0" in value or value != value.strip():
        raise UserError(f"variable {name} has a line break or blanks around it and cannot reach other nodes; unset it")
    return re.sub(r'([\\"$`])', r"\\\1", value).replace("%", "%%")


def plain(name: str, value: str) -> str:
    """`value`, which neither DeepSpeed nor mpirun changes. Raises UserError."""
    if not SAFE.fullmatch(value):
        raise UserError(
            f"variable {name} is {value!r}: over mpirun it may only hold letters, digits and @+=:,./-_; change it, or "
            "unset it"
        )
    return value


def user_lines(variables: dict[str, str]) -> list[str]:
    """The lines of the user's .deepspeed_env files, where DeepSpeed looks for them. Raises UserError."""
    name, lines = variables.get("DS_ENV_FILE", ".deepspeed_env"), []
    for file in dict.fromkeys(os.path.abspath(os.path.join(folder, name)) for folder in (os.path.expanduser("~"), ".")):
        if os.path.isfile(file):
            for number, line in enumerate(Path(file).read_text().splitlines(), start=1):
                if line.strip() and not line.strip().startswith("#"):
                    if not re.match(r"\s*[A-Za-z_]\w*\s*=", line):
                        raise UserError(f"{file}:{number}: not NAME=VALUE; mend that line")
                    lines.append(line)
    return lines
