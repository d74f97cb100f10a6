"""The device that ranks will use, and the small op that DeepSpeed compiles if it is the CPU.

A killed build leaves a file `lock`, on which every later run would hang. So builds happen here, one at a time, in a
folder that belongs to this checkout (TORCH_EXTENSIONS_DIR).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from filelock import FileLock

from tristage.errors import UserError
from tristage.machine.devices import may_have_gpu

STALE_LOCK_SECONDS = 300.0  # ranks hold a lock for a moment when they load the op
OP = "deepspeed_shm_comm.so"
BUILD = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as B; B().load(verbose=False)"


def num_gpus() -> int:
    """GPUs that torch sees on this machine; 0 if DS_ACCELERATOR=cpu.

    Torch runs in a separate process, since importing it takes seconds and memory; it also prints why torch cannot use
    a GPU that the machine has. On a machine without a GPU it is not started.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not may_have_gpu():
        return 0
    printed = subprocess.run([sys.executable, "-m", "tristage.dist.gpu"], stdout=subprocess.PIPE, text=True).stdout
    return int(printed.strip() or 0)


def extensions_folder() -> Path:
    """Where torch keeps compiled ops."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions")


def stale_locks(folder: Path, seconds: float = STALE_LOCK_SECONDS) -> list[Path]:
    """Locks older than `seconds`, left by a build that was killed."""
    return [lock for lock in folder.rglob("lock") if time.time() - lock.stat().st_mtime > seconds]


def build_cpu_op() -> None:
    """Compile DeepSpeed's CPU communication op, unless it exists.

    Raises:
        UserError: the folder cannot be written, or the op does not compile.
    """
    folder = extensions_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".builder").touch()
    except OSError:
        raise UserError(f"{folder} cannot be written; set TORCH_EXTENSIONS_DIR to a writable folder") from None
    with FileLock(folder / ".builder"):
        built = any(folder.rglob(OP))
        # Whoever holds the lock is the only builder: without the op, any `lock` is left over.
        for lock in stale_locks(folder, STALE_LOCK_SECONDS if built else -1.0):
            lock.unlink(missing_ok=True)
        if built:
            return
        print("compiling DeepSpeed's CPU communication op (about a minute, once)", flush=True)
        with (folder / "build.log").open("w+") as log:
            environment = os.environ | {"DS_ACCELERATOR": "cpu"}
            done = subprocess.run([sys.executable, "-c", BUILD], env=environment, stdout=log, stderr=log)
            if done.returncode:
                log.seek(0)
                print("".join(log.readlines()[-20:]), end="", file=sys.stderr)
                raise UserError("DeepSpeed's CPU op did not compile; install a C++ compiler (g++)")


def main() -> int:
    """`python -m tristage.launch.cpu_op` prints the device that ranks will use, gpu or cpu, ready for them."""
    with contextlib.redirect_stdout(sys.stderr):
        device = "gpu" if num_gpus() else "cpu"
        try:
            if device == "cpu":
                build_cpu_op()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    print(device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
