"""Two hosts on this machine, for root: each with its own network, process ids, name, shared memory and sshd.

    with two_hosts(folder) as (first, second):
        first.start("bash", "launch/step1_sft.sh", ..., "--hostfile", str(folder / "hostfile"))

They share the file system but for `folder`/cache, /run and /dev/shm. A host is the process tree under its sshd, which
is process 1 there: `kill` ends all of it, and everything is removed when the Python process exits, network included.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.tiny import REPO

NEEDED = {"ip": "iproute2", "sshd": "openssh-server", "ssh-keygen": "openssh-client", "pdsh": "pdsh"}
INTERFACE = "tristage0"
PATH = "/usr/sbin:/sbin:" + os.environ["PATH"]

# What a host does first; sshd stays as its process 1. $1: its name, $2: the folder.
INIT = """set -e
hostname "$1"
mount -t tmpfs none /dev/shm
mount -t tmpfs none /run
mount -t tmpfs none "$2/cache"
mkdir /run/sshd
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/ssh_config" /etc/ssh/ssh_config
ip link set lo up
exec "$(command -v sshd)" -D -e -f "$2/sshd_config" -h "$2/host_key_$1" 2>"$2/sshd_$1.log"
"""


def why_not() -> str:
    """Why two hosts cannot be made here; empty when they can."""
    if os.geteuid() != 0:
        return "two hosts need root"
    missing = [package for command, package in NEEDED.items() if not shutil.which(command, path=PATH)]
    if missing:
        return f"two hosts need the packages {', '.join(missing)}"
    done = subprocess.run(["unshare", "-n", "-u", "-p", "-m", "--fork", "true"], capture_output=True, text=True)
    return f"two hosts need namespaces: {done.stderr.strip()}" if done.returncode else ""


def _die_with_us() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Host:
    """One of the two."""

    def __init__(self, folder: Path, name: str, address: str) -> None:
        self.folder, self.name, self.address = folder, name, address
        command = ["unshare", "-n", "-u", "-p", "-m", "--fork", "--kill-child", "--mount-proc"]
        self.process = subprocess.Popen(
            [*command, "sh", "-c", INIT, "init", name, str(folder)],
            env={"PATH": PATH, "HOME": os.environ.get("HOME", "/root")},
            stdin=subprocess.DEVNULL,
            preexec_fn=_die_with_us,
        )
        _until(lambda: bool(psutil.Process(self.process.pid).children()), f"host {name} did not start")
        self.init = psutil.Process(self.process.pid).children()[0]

    def command(self, *words: str) -> list[str]:
        return ["nsenter", "-t", str(self.init.pid), "-n", "-u", "-p", "-m", "--wd=" + os.getcwd(), *words]

    def do(self, *words: str) -> str:
        done = subprocess.run(
            self.command(*words), env=os.environ | {"PATH": PATH}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, *words: str, log: Path, cwd: Path = REPO, **variables: str) -> subprocess.Popen[Any]:
        """Start a command in this host, its output to `log`."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TRISTAGE_CACHE")
        environment = {name: value for name, value in os.environ.items() if name not in names}
        command = self.command(*words)
        command[command.index("--wd=" + os.getcwd())] = f"--wd={cwd}"
        with log.open("w") as file:
            return subprocess.Popen(command, env=environment | variables, stdout=file, stderr=subprocess.STDOUT)

    def processes(self) -> list[str]:
        """Commands of all processes of this host but its sshd."""
        with contextlib.suppress(psutil.NoSuchProcess):
            inside = os.readlink(f"/proc/{self.init.pid}/ns/pid")
            ours = [text for pid, text in _commands() if _pid_namespace(pid) == inside]
            return [text for text in ours if not text.startswith("sshd:")]
        return []

    def link(self, state: str) -> None:
        self.do("ip", "link", "set", INTERFACE, state)

    def kill(self) -> None:
        """End the host and every process on it, as when its power goes."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.init.kill()
        self.process.kill()
        self.process.wait()


def _pid_namespace(pid: int) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/pid")
    return ""


def _commands() -> Iterator[tuple[int, str]]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                yield process.pid, " ".join(process.cmdline())


def _until(true: Any, otherwise: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, otherwise
        time.sleep(0.05)


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """node-a and node-b, which reach each other over ssh by key; `folder`/hostfile names them with a slot each."""
    (folder / "cache").mkdir()
    addresses = {"node-a": "10.213.0.1", "node-b": "10.213.0.2"}
    _write_ssh(folder, addresses)
    (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in addresses))
    hosts: list[Host] = []
    try:
        for name, address in addresses.items():
            hosts.append(Host(folder, name, address))
        first, second = hosts
        ends = [["name", INTERFACE, "netns", str(host.init.pid)] for host in hosts]
        command = ["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]]
        subprocess.run(command, env={"PATH": PATH}, check=True)
        for host in hosts:
            host.do("ip", "address", "add", f"{host.address}/24", "dev", INTERFACE)
            host.link("up")
        for host in hosts:
            _until(lambda host=host: _answers(first, host), f"no ssh to {host.name}; see {folder}/sshd_{host.name}.log")
        yield first, second
    finally:
        for host in hosts:
            host.kill()


def _answers(first: Host, host: Host) -> bool:
    return subprocess.run(first.command("ssh", host.name, "true"), capture_output=True).returncode == 0


def _write_ssh(folder: Path, addresses: dict[str, str]) -> None:
    for key in ("id", *(f"host_key_{name}" for name in addresses)):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{a} {name}\n" for name, a in addresses.items()))
    known = [f"{name} {(folder / f'host_key_{name}.pub').read_text()}" for name in addresses]
    (folder / "known_hosts").write_text("".join(known))
    (folder / "ssh_config").write_text(
        f'Host *\n  IdentityFile "{folder}/id"\n  UserKnownHostsFile "{folder}/known_hosts"\n'
        "  StrictHostKeyChecking yes\n  BatchMode yes\n  ConnectTimeout 5\n  LogLevel ERROR\n"
    )
    (folder / "sshd_config").write_text(
        f"Port 22\nAuthorizedKeysFile {folder}/id.pub\nStrictModes no\nPermitRootLogin prohibit-password\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\nPidFile none\nMaxStartups 100\n"
    )
