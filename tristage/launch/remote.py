"""What is sent to other nodes: variables, in a form that shells leave unchanged, and the launcher that sends them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tristage.errors import UserError
from tristage.launch.options import option
from tristage.machine.arrival import SAFE

FORWARDED_VARIABLES = re.compile(
    r"(NCCL|PYTHON|UCX|MV2)\w*|(GLOO|TORCH|HF|TRANSFORMERS|TRISTAGE|OMP|MKL|XDG_CACHE)_\w+|\w+_(proxy|PROXY)"
    r"|LD_LIBRARY_PATH|CUDA_HOME|DS_ACCELERATOR|TOKENIZERS_PARALLELISM|CUBLAS_WORKSPACE_CONFIG",
    re.ASCII,
)
# Any user of a machine can read its command lines, and DeepSpeed puts variables there.
SECRET = re.compile(r"TOKEN(?!IZERS)|SECRET|PASSWORD|CREDENTIAL|_KEY$", re.IGNORECASE)
# DeepSpeed launchers that support --module: those that go through a shell, and those that do not.
SHELL_LAUNCHERS, MPI_LAUNCHERS = ("pdsh",), ("openmpi", "impi")


def check_launcher(options: Sequence[str]) -> str:
    """The multi-node launcher that --launcher selects.

    Raises:
        UserError: it cannot start these ranks (DeepSpeed 0.19's runners for Slurm and MPICH drop `--module`, and
            MVAPICH's rank variables are not read), or mpirun's runner does not take an option.
    """
    launcher = option(options, "--launcher") or "pdsh"
    supported = (*SHELL_LAUNCHERS, *MPI_LAUNCHERS)
    if launcher not in supported:
        raise UserError(
            f"--launcher {launcher} cannot start these ranks; use one of {', '.join(supported)}, or in a Slurm "
            "job launch/slurm/"
        )
    if launcher in MPI_LAUNCHERS:
        for name in ("--include", "--exclude", "--num_nodes", "--num_gpus"):
            if option(options, name) is not None:
                raise UserError(f"--launcher {launcher} takes the entire hostfile; leave out {name}, or edit the file")
    return launcher


def check_paths(options: Sequence[str]) -> None:
    """Check what DeepSpeed puts into its shell command unquoted. Raises UserError."""
    parts = {
        "the working folder": os.getcwd(),
        "the path of python": sys.executable,
        "--master_addr": option(options, "--master_addr") or "",
        "--master_port": option(options, "--master_port") or "",
    }
    for what, text in parts.items():
        if not SAFE.fullmatch(text):
            raise UserError(
                f"{what} is {text!r}: with --hostfile it may only hold letters, digits and @+=:,./-_, since DeepSpeed "
                "passes it to shells unquoted; use another"
            )


def environment_file(variables: dict[str, str], over_mpi: dict[str, str] | None = None) -> str:
    """Lines NAME=VALUE for DeepSpeed, which quotes some values: escaped so that every value arrives unchanged.

    `over_mpi`: additional variables, if mpirun sends them. No shell reads them there, and DeepSpeed's quotes would
    become part of a value, so it may hold no special characters. The user's own .deepspeed_env comes last and
    unchanged: it wins, and may hold secrets.

    Raises:
        UserError: a value that cannot be sent, such as one with a line break or blanks around it.
    """
    own = user_lines(variables)
    theirs = {line.partition("=")[0].strip() for line in own}
    python_path = ":".join(filter(None, (os.getcwd(), variables.get("PYTHONPATH"))))
    sent = {name: value for name, value in variables.items() if FORWARDED_VARIABLES.fullmatch(name)}
    sent["PYTHONPATH"] = python_path
    protect = escape_for_pdsh if over_mpi is None else require_plain
    rest = "$PATH" if over_mpi is None else protect("PATH", variables.get("PATH", ""))
    lines = [f"{name}={protect(name, value)}" for name, value in (over_mpi or {}).items()]
    lines += [f"PATH={protect('PATH', os.path.dirname(sys.executable))}:{rest}"]  # it holds ninja, for DeepSpeed's ops
    for name, value in sorted(sent.items()):
        if SECRET.search(name) or re.search(r"//[^/@]*:[^/@]*@", value):
            if name not in theirs:
                print(f"{name} holds a secret and stays on this node; name it in ~/.deepspeed_env to pass it on")
            continue
        lines.append(f"{name}={protect(name, value)}")
    return "".join(f"{line}\n" for line in lines + own)


def escape_for_pdsh(name: str, value: str) -> str:
    """`value`, escaped for the double quotes that DeepSpeed puts around special characters. Raises UserError."""
    if "\n" in value or "\0" in value or value != value.strip():
        raise UserError(f"variable {name} has a line break or blanks around it and cannot reach other nodes; unset it")
    return re.sub(r'([\\"$`])', r"\\\1", value).replace("%", "%%")


def require_plain(name: str, value: str) -> str:
    """`value`, if neither DeepSpeed nor mpirun changes it. Raises UserError."""
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
                        raise UserError(f"{file}:{number}: not NAME=VALUE; fix that line")
                    lines.append(line)
    return lines
