"""Joining the process group and leaving it: devices, and the store at which the ranks meet."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import os
import platform
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as torch_dist
from tristage.errors import UserError
from tristage.storage.free_space import ranks_here
from tristage.machine.arrival import free_port
from tristage.dist.collectives import is_main, local_rank, print0, rank



SECONDS_TO_NAME_MISSING, SECONDS_TO_READ = 30.0, 5.0
LOOPBACK = "127.0.0.1"
EXIT_PORT_TAKEN = 2  # as of any port that is taken; the launcher knows this case by a file


def check_device(device: str, where: str) -> None:
    """Refuse a device that this machine does not have, before anything is set up.

    Raises:
        UserError: there is no GPU for `cuda`, or `cpu` was set on a GPU machine without DS_ACCELERATOR, from which
            DeepSpeed picks its device.
    """
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise UserError(f"{where}: key `device` is cuda but this machine shows no GPU; use `device: auto` or `cpu`")
    if device == "cpu" and has_gpu and os.environ.get("DS_ACCELERATOR") != "cpu":
        raise UserError(f"{where}: key `device` is cpu on a machine with GPUs; set DS_ACCELERATOR=cpu to force it")
    if uses_gpu(device) and local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"{where}: this node has to run {local_rank() + 1} ranks but shows {torch.cuda.device_count()} GPUs; "
            "lower --num_gpus"
        )


def uses_gpu(device: str) -> bool:
    """Whether the setting `device` means a GPU on this machine."""
    return torch.cuda.is_available() and device != "cpu" and os.environ.get("DS_ACCELERATOR") != "cpu"


def current_device() -> torch.device:
    """This rank's device, after `init`."""
    use_gpu = torch_dist.is_initialized() and torch_dist.get_backend() == "nccl"
    return torch.device("cuda", local_rank()) if use_gpu else torch.device("cpu")


def init(device: str = "auto", timeout_seconds: float = 1800) -> torch.device:
    """Join the process group that the deepspeed launcher describes (alone: a group of one); this rank's device.

    Raises:
        UserError: the port where the ranks meet is in use; a rank did not join; ranks would use different backends
            and wait for each other until the timeout.
    """
    use_gpu = uses_gpu(device)
    backend = "nccl" if use_gpu else "gloo"
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    if not torch_dist.is_initialized():
        limit, ranks = timedelta(seconds=timeout_seconds), int(os.environ["WORLD_SIZE"])
        if _on_one_machine():
            _stay_on_loopback()
        # the store of torchrun's agent outlives a restart of the ranks
        attempt = f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        store = torch_dist.PrefixStore(attempt, _store(ranks, limit))
        _rendezvous(store, ranks, backend, timeout_seconds)
        if use_gpu:
            torch.cuda.set_device(local_rank())
        torch_dist.init_process_group(backend, store=store, rank=rank(), world_size=ranks, timeout=limit)
    return torch.device("cuda", local_rank()) if use_gpu else torch.device("cpu")


def _on_one_machine() -> bool:
    """Whether all ranks of this run are on this machine."""
    return ranks_here() == int(os.environ["WORLD_SIZE"])


def _stay_on_loopback() -> None:
    """Have gloo and NCCL listen on loopback, unless the user named an interface."""
    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if "NCCL_SOCKET_FAMILY" not in os.environ:  # NCCL does not take the IPv6 address of loopback
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")


def _store(ranks: int, limit: timedelta) -> torch_dist.TCPStore:
    """The store at which the ranks meet. Rank 0 serves it, except under torchrun, whose agent does.

    Raises:
        UserError: the port is in use, or rank 0 cannot be reached.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if _on_one_machine() and not of_agent:
        address = LOOPBACK
    serves = is_main() and not of_agent
    try:
        socket_of_store = _listen(address, port) if serves else None
        return torch_dist.TCPStore(
            address, port, ranks, serves, limit, wait_for_workers=False, master_listen_fd=socket_of_store
        )
    except (OSError, torch_dist.DistNetworkError) as error:
        raise UserError(_rendezvous_error(error, address, port)) from None


def _listen(address: str, port: int) -> int | None:
    """The descriptor of a socket for the store that listens on the interface with `address`, and on no other.

    Left to itself, torch listens on all: anyone on any network could set keys. That remains, and is reported, where
    this node cannot tell the interface: `address` is translated on the way here, or names loopback on this node alone.
    """
    family, *_, (here, *_) = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    names_loopback = ipaddress.ip_address(here).is_loopback and address not in (here, "localhost")
    try:
        if not names_loopback:
            return socket.create_server((here, port), family=family, backlog=socket.SOMAXCONN).detach()
    except OSError as error:
        if error.errno == errno.EADDRINUSE and _launcher_picks_again():
            print(f"port {port} was taken before the ranks met; picking another", flush=True)
            sys.exit(EXIT_PORT_TAKEN)
        if error.errno != errno.EADDRNOTAVAIL:
            raise
    print0(
        f"{address} is not the address of an interface of {platform.node()}: rank 0 listens on all of them; "
        "give one that is as --master_addr"
    )
    return None


def _launcher_picks_again() -> bool:
    """Whether the launcher picked the port, and not the user; if so, have it pick another (launch/supervise.py)."""
    mark = Path(os.environ.get("PYTHON_TRISTAGE_RUN", ""))
    try:
        (mark / "port_picked").rename(mark / "port_taken")
    except OSError:
        return False
    return True


def _rendezvous_error(error: Exception, address: str, port: int) -> str:
    if getattr(error, "errno", None) == errno.EADDRINUSE or "EADDRINUSE" in str(error):
        fix = "give another as --master_port, or none"
        return f"port {port} of {platform.node()}, where the ranks are to meet, is in use; {fix}"
    if isinstance(error, OSError) and not isinstance(error, socket.gaierror):
        return f"{platform.node()} cannot listen at {address}:{port} ({error.strerror}); give another --master_port"
    return (
        f"{platform.node()} cannot reach rank 0 at {address}:{port}; see whether rank 0 ended with an error, whether "
        "a firewall is between them, or give its address as --master_addr"
    )


def _rendezvous(store: torch_dist.Store, ranks: int, backend: str, timeout_seconds: float) -> None:
    """Rank 0 compares every rank's backend and publishes the verdict; until all have arrived it prints who is missing."""
    store.set(f"joins/{rank()}", json.dumps([platform.node(), backend]))
    missing = set(range(ranks))
    if is_main():
        until = time.monotonic() + timeout_seconds
        while missing and time.monotonic() < until:
            try:
                store.wait([f"joins/{other}" for other in missing], timedelta(seconds=SECONDS_TO_NAME_MISSING))
                missing = set()
            except torch_dist.DistStoreError:
                missing = {other for other in missing if not store.check([f"joins/{other}"])}
                print0(f"waiting for {_listed(missing)} to join")
        store.set("verdict", _verdict(store, ranks, missing))
    if problem := store.get("verdict").decode():
        store.set(f"read/{rank()}", "")
        if is_main():  # the store ends with this process: wait until all have read it
            with contextlib.suppress(torch_dist.DistStoreError):
                readers = [f"read/{other}" for other in range(ranks) if other not in missing]
                store.wait(readers, timedelta(seconds=SECONDS_TO_READ))
        raise UserError(problem)


def _verdict(store: torch_dist.Store, ranks: int, missing: set[int]) -> str:
    """Why the ranks cannot join; empty if they can."""
    if missing:
        return f"{_listed(missing)} did not join; see what they, or the launchers of their nodes, printed"
    joins = [json.loads(store.get(f"joins/{other}")) for other in range(ranks)]
    for other, (node, backend) in enumerate(joins):
        if backend != joins[0][1]:
            return (
                f"rank {other} on {node} would use backend {backend}, rank 0 on {joins[0][0]} {joins[0][1]}: one of "
                "them sees a GPU and the other does not; compare `nvidia-smi` and DS_ACCELERATOR on both"
            )
    return ""


def _listed(ranks: set[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"


def shutdown() -> None:
    """Leave the process group; safe to call twice.

    DeepSpeed's CPU op never removes its buffer in shared memory: 66 MiB per rank and run, until reboot.
    """
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        buffer = Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank()}")
        buffer.unlink(missing_ok=True)
