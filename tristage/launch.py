"""What a launcher works out before it starts ranks; called by launch/common.sh.

    python -m tristage.launch FOLDER MODULE CONFIG [key=value ...] -- [deepspeed launcher options]

writes the arguments of `deepspeed` (FOLDER/command, each ended by a NUL), the path of the log (FOLDER/log),
the port where ranks on this machine alone will meet (FOLDER/port) and, for ranks on other nodes, the variables that
they need (FOLDER/env, which DeepSpeed reads) and the nodes' names (FOLDER/nodes). FOLDER/launcher says whose it is, and
what killed runs left is removed (leftovers). DeepSpeed hands arguments and
variables to other nodes in the text of a shell command, through pdsh and ssh, with quotes around some of them: here
arguments that a shell would change travel as base64 (`run.entry_point` restores them), and variables are escaped.
"""

from __future__ import annotations

import base64
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from tristage import leftovers
from tristage.errors import UserError

ENCODED = "base64:"
SAFE = re.compile(r"[\w@+=:,./-]*", re.ASCII)  # the same before and after pdsh (%h is its own) and any shell
PASSED = re.compile(
    r"(NCCL|PYTHON|UCX|MV2)\w*|(GLOO|TORCH|HF|TRANSFORMERS|TRISTAGE|OMP|MKL|XDG_CACHE)_\w+|\w+_(proxy|PROXY)"
    r"|LD_LIBRARY_PATH|CUDA_HOME|DS_ACCELERATOR|TOKENIZERS_PARALLELISM|CUBLAS_WORKSPACE_CONFIG",
    re.ASCII,
)
# Any user of a machine can read the command lines on it, where DeepSpeed puts variables.
SECRET = re.compile(r"TOKEN(?!IZERS)|SECRET|PASSWORD|CREDENTIAL|_KEY$", re.IGNORECASE)
HOST_LINE = re.compile(r"(\S+)\s+slots=(\d+)(\s+#.*)?")
DEFAULT_HOSTFILE = "/job/hostfile"  # DeepSpeed's, taken where it is there
VALUED = {"--hostfile": "-H", "--include": "-i", "--exclude": "-e", "--num_nodes": "", "--master_port": ""}
VALUED |= {"--num_gpus": "", "--num_accelerators": "", "--master_addr": "", "--ssh_port": "", "--launcher": ""}
# DeepSpeed's ways to other nodes that can start a module: in the text of a shell command, and without one.
SHELL, MPI = ("pdsh",), ("openmpi", "impi")
FROM_OPENMPI = {"RANK": "RANK", "LOCAL_RANK": "LOCAL_RANK", "WORLD_SIZE": "SIZE", "LOCAL_SIZE": "LOCAL_SIZE"}


def main(argv: list[str]) -> int:
    """Exit code 2 and one sentence for what a user must mend."""
    folder, module, config, *rest = argv
    settings, options = split_words(rest)
    leftovers.sign(Path(folder), launcher=os.getppid())
    leftovers.remove(Path(folder).parent)
    try:
        prepare(Path(folder), [module, "--config", config, *settings], options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """What stands before the last `--` of a launcher's call, key=value ..., and what after it, options."""
    end = len(words) - 1 - words[::-1].index("--")
    return words[:end], words[end + 1 :]


def prepare(folder: Path, words: list[str], options: list[str]) -> None:
    """Write `folder`/command, /log and, for several nodes, /nodes and /env, else /port.

    `words`: MODULE --config CONFIG [key=value ...].

    Raises:
        UserError: a hostfile or filter that names no nodes, a node that ssh does not reach, a variable that cannot
            travel, a port that is taken.
    """
    nodes = read_nodes(options)
    by_hand = "--no_ssh" in options  # on each node, with --node_rank
    if nodes and not by_hand:
        check_reachable(nodes, option(options, "--hostfile"), option(options, "--ssh_port"))
        launcher = check_launcher(options)
        check_paths(options)
        (folder / "nodes").write_text("".join(f"{node}\n" for node in nodes))
        (folder / "env").touch(mode=0o600)
        first = next(iter(nodes))
        address = option(options, "--master_addr") or own_address_of(first, option(options, "--ssh_port"))
        if launcher in SHELL:
            (folder / "env").write_text(environment_file(dict(os.environ)))
            if address and option(options, "--master_addr") is None:
                options = [*options, "--master_addr", address]  # else DeepSpeed takes the first that the node lists
        else:
            address = address or first
            meeting = {"MASTER_ADDR": address, "MASTER_PORT": option(options, "--master_port") or "29500"}
            (folder / "env").write_text(environment_file(dict(os.environ), meeting))
    else:
        if (port := option(options, "--master_port")) is None:
            port = "29500" if by_hand else free_port()  # all nodes must know it
            options = [*options, "--master_port", port]
            if not by_hand:
                (folder / "port_picked").touch()  # dist renames it to port_taken if it is, and common.sh starts again
        if not by_hand:
            check_port(port)
        (folder / "port").write_text(port)
    sent = [encode(word) for word in words] if nodes else words
    (folder / "command").write_text("".join(f"{word}\0" for word in [*options, "--module", *sent]))
    output = output_of(words[2:])
    (folder / "log").write_text(str(output / "logs/launch.log") if output else "")


# -- nodes -------------------------------------------------------------------------------------------------


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


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def check_port(port: str) -> None:
    """Ranks can meet there, on this machine. Raises UserError."""
    number = int(port) if port.isdecimal() else 0
    if not 0 < number < 2**16:
        raise UserError(f"--master_port {port}: not a port; give a number from 1024 to 65535, or leave it out")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
        except OSError as error:
            raise UserError(
                f"--master_port {port} of this machine cannot be used ({error.strerror}); give another, or none"
            ) from None


def read_nodes(options: Sequence[str]) -> dict[str, list[int]]:
    """The slots of each node that the options leave, in the hostfile's order; {} without --hostfile.

    Raises:
        UserError: no such file, a line that is not `HOST slots=N`, a filter that names what is not there.
    """
    file = option(options, "--hostfile") or DEFAULT_HOSTFILE
    if file == DEFAULT_HOSTFILE and not os.path.isfile(file):
        return {}
    if not os.path.isfile(file):
        raise UserError(f"{file}: no such hostfile; give one with a line `HOST slots=N` for each node")
    nodes: dict[str, list[int]] = {}
    for number, line in enumerate(Path(file).read_text().splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = HOST_LINE.fullmatch(line)
        if not match or match[1] in nodes or not SAFE.fullmatch(match[1]) or match[1].startswith("-"):
            raise UserError(f"{file}:{number}: {line!r} is not `HOST slots=N`, or HOST is there twice; mend that line")
        nodes[match[1]] = list(range(int(match[2])))
    include, exclude = option(options, "--include"), option(options, "--exclude")
    for text in filter(None, (include, exclude)):
        for node, slots in _filter(text).items():
            if node not in nodes or not set(slots) <= set(nodes[node]):
                raise UserError(f"{text}: {file} has no such node or slot as {node}; it has {', '.join(nodes)}")
    if include:
        kept = _filter(include)
        nodes = {node: kept[node] or slots for node, slots in nodes.items() if node in kept}
    if exclude:
        dropped = _filter(exclude)
        nodes = {
            node: [slot for slot in slots if node not in dropped or (dropped[node] and slot not in dropped[node])]
            for node, slots in nodes.items()
        }
    nodes = {node: slots for node, slots in nodes.items() if slots}
    if limit := option(options, "--num_nodes"):
        nodes = dict(list(nodes.items())[: count_of(limit)])
    if count := option(options, "--num_gpus") or option(options, "--num_accelerators"):
        nodes = {node: list(range(count_of(count))) for node in nodes}
    if not nodes:
        raise UserError(f"{file}: no node is left; add lines `HOST slots=N`, or change --include or --exclude")
    return nodes


def _filter(text: str) -> dict[str, list[int]]:
    """`a@b:0,2` -> {"a": [], "b": [0, 2]}."""
    parts = (part.partition(":") for part in text.split("@"))
    try:
        return {node: [int(slot) for slot in slots.split(",") if slot] for node, _, slots in parts}
    except ValueError:
        raise UserError(f"{text}: not a choice of nodes; write NODE or NODE:SLOT,SLOT with @ between nodes") from None


def check_reachable(nodes: Sequence[str] | dict[str, list[int]], hostfile: str | None, port: str | None) -> None:
    """Every node answers to ssh without a password. DeepSpeed looks at the first alone.

    Raises:
        UserError: the first that does not, and why ssh says so.
    """

    def ask(node: str) -> str | None:
        done = over_ssh(node, port, "true")
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1] if done.returncode else None

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, nodes))
    for node, why in zip(nodes, answers, strict=True):
        if why is not None:
            raise UserError(
                f"{hostfile}: node {node} does not answer to ssh ({why}); mend `ssh {node} true`, which must need "
                "no password, or leave the node out (--exclude)"
            )


def over_ssh(node: str, port: str | None, command: str) -> subprocess.CompletedProcess[str]:
    """`command` on `node`, where ssh needs no password."""
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", *(["-p", port] if port else [])]
    return subprocess.run([*ssh, node, command], stdin=subprocess.DEVNULL, capture_output=True, text=True)


def own_address_of(node: str, port: str | None) -> str | None:
    """The address that the hostfile's name `node` has, if it is one of the node's own interfaces.

    None where it is not (address translation, a name that only ssh knows): other nodes might not reach it.
    """
    try:
        named = {str(item[4][0]) for item in socket.getaddrinfo(node, None, socket.AF_INET)}
    except OSError:
        return None
    own = over_ssh(node, port, "hostname -I").stdout.split()
    return next((address for address in own if address in named), None)


# -- what travels ------------------------------------------------------------------------------------------


def encode(word: str) -> str:
    """`word`, or base64 of it where a shell would read something else."""
    if SAFE.fullmatch(word) and word and not word.startswith(ENCODED):
        return word
    return ENCODED + base64.urlsafe_b64encode(word.encode()).decode()


def decode(word: str) -> str:
    """The word that `encode` was given."""
    if not word.startswith(ENCODED):
        return word
    return base64.urlsafe_b64decode(word.removeprefix(ENCODED)).decode()


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


def adopt_rank_of_mpirun() -> None:
    """Open MPI's names for a rank's place, as those that torch reads, where DeepSpeed's launcher has left them out."""
    if "RANK" not in os.environ and "MASTER_ADDR" in os.environ and "OMPI_COMM_WORLD_RANK" in os.environ:
        os.environ.update({name: os.environ[f"OMPI_COMM_WORLD_{theirs}"] for name, theirs in FROM_OPENMPI.items()})


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


# -- folders -----------------------------------------------------------------------------------------------


def output_of(words: Sequence[str]) -> Path | None:
    """The run's folder by `words` (CONFIG, key=value ...); None where they do not say, which the step will."""
    given = [word.removeprefix("output=") for word in words[1:] if word.startswith("output=")]
    try:
        found = yaml.safe_load(given[-1]) if given else yaml.safe_load(Path(words[0]).read_text())["output"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
    return Path(found) if isinstance(found, str) else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
