"""How a step starts and ends: user errors to one sentence, the run's folder, random seeds."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import yaml

from tristage import dist
from tristage.checkpoint import Checkpoint, find_checkpoint, save_checkpoint
from tristage.config import RunSettings
from tristage.dist import progress, watchdog
from tristage.errors import UserError
from tristage.machine.arrival import adopt_rank_of_mpirun, decode
from tristage.models.quiet import quiet_libraries
from tristage.reporting.report import announce
from tristage.runs.finished import NAME as FINISHED
from tristage.runs.finished import clear_finished, require_finished, write_finished
from tristage.runs.inputs import model_fingerprints, named_models, source_fingerprints
from tristage.storage import lock
from tristage.storage.durable import explain_disk_errors
from tristage.storage.pieces import Piece
from tristage.training import preflight
from tristage.training.eval_command import check_eval_command
from tristage.training.health import Health
from tristage.training.metrics import RunLog, is_due
from tristage.training.trackers import check_trackers

EXIT_USER_ERROR = 2
SECRET = re.compile(r"(^|[._-])(token|secret|password|passwd|credentials?|(api|access|secret)[_-]?key)$", re.IGNORECASE)
PACKAGES = (
    *("tristage", "torch", "deepspeed", "transformers", "datasets", "accelerate", "peft", "numpy"),
    *("bitsandbytes", "liger-kernel", "vllm"),  # only if a setting needs them
)


T = TypeVar("T")


class Preempted(Exception):
    """A signal ended the run after a step, its checkpoint written."""

    def __init__(self, step: int) -> None:
        where = f"after step {step}, its checkpoint written" if step else "before step 1"
        super().__init__(f"stopped by a signal {where}; start again to resume")


def entry_point(main: Callable[[list[str]], None]) -> None:
    """Run a step's main(argv). A UserError becomes one sentence from rank 0 and exit code 2, Preempted exit code 75."""
    code = 0
    quiet_libraries()
    if dist.rank() != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  what libraries print, rank 0 prints too
    sys.argv[1:] = map(decode, sys.argv[1:])
    adopt_rank_of_mpirun()
    with watchdog.listening():
        try:
            try:
                main(sys.argv[1:])
            finally:
                lock.release()
        except UserError as error:
            watchdog.leave("failed")
            if dist.rank() != 0:
                # Usually rank 0 meets the same error, prints it, and the launcher ends this rank. After this wait the
                # error is this rank's alone, so it prints it.
                time.sleep(watchdog.LAUNCHER_GRACE_SECONDS)
            print(f"error: {error}{dist.node_suffix()}", file=sys.stderr, flush=True)
            sys.exit(EXIT_USER_ERROR)
        except Preempted as stopped:
            dist.print0(stopped)
            watchdog.tell_launcher()
            code = watchdog.EXIT_PREEMPTED
        except Exception:
            peer_lost = watchdog.lost_a_peer()
            watchdog.leave("failed")
            if not peer_lost:
                raise
            time.sleep(watchdog.LAUNCHER_GRACE_SECONDS)
            os._exit(watchdog.EXIT_STALLED)  # leaving the process group of a lost rank may hang
        watchdog.leave("done")
        dist.shutdown()  # not after an error: the others may be stuck in a collective, and the launcher ends them
    if code:
        sys.exit(code)


@dataclass
class Saver:
    """Writes a run's checkpoints when they are due, and ends the run after one if a signal asked a rank to stop."""

    settings: RunSettings
    device: torch.device
    engines: dict[str, Any]
    health: Health
    log: RunLog
    own: Callable[[], list[Piece]] | None = None  # this rank's tensors in addition to the engines'

    def __post_init__(self) -> None:
        self.saved = self.log.first  # the newest checkpoint's step

    def evaluates(self, step: int) -> bool:
        """Whether the model is evaluated after `step`: every evaluate_every steps, and at the end."""
        return self.log.is_last(step) or is_due(self.settings.evaluate_every, step)

    def after(self, step: int, control: dict[str, Any] | None = None) -> None:
        """Write checkpoint `step` if it is due, the last, or the run must stop. A collective.

        Raises:
            Preempted: on every rank, if a signal reached one of them and this is not the last step.
            UserError: on every rank, after too many steps in a row with numbers that are not finite, or an alarm of
                `health.stop_on`.
        """
        last = self.log.is_last(step)
        if not last:
            self.stop_if_asked(step, control)
            self._stop_at_alarm(step, control)
        if last or self.health.must_stop or is_due(self.settings.save_every, step):
            self._save(step, control)
        self.health.check(step)

    def stop_if_asked(self, step: int, control: dict[str, Any] | None = None) -> None:
        """If a signal reached any rank: checkpoint `step`, unless it exists, and raise Preempted. A collective."""
        if dist.max_over_ranks({"stop": float(watchdog.stop_requested())}, self.device)["stop"] == 0:
            return
        if step > self.saved:
            self._save(step, control)
        raise Preempted(step)

    def _stop_at_alarm(self, step: int, control: dict[str, Any] | None) -> None:
        if not self.settings.health.stop_on:
            return
        why = dist.gather_objects(None if self.log.alarms is None else self.log.alarms.stops)[0]
        if why is not None:
            self._save(step, control)
            raise UserError(f"{self.settings.output}: {why}; the checkpoint is written: start again to go on")

    @contextlib.contextmanager
    def checkpoint_on(self, step: int, control: dict[str, Any] | None, error: type[UserError]) -> Iterator[None]:
        """Write the checkpoint of `step`, if there is none, before an `error` that every rank raises ends the block."""
        try:
            yield
        except error as raised:
            if step > self.saved:
                self._save(step, control)
            kept = f"the checkpoint of step {step} is written: start again to resume" if step else "no step is done"
            raise error(f"{raised}; {kept}") from raised

    def _save(self, step: int, control: dict[str, Any] | None) -> None:
        state = (control or {}) | {"health": self.health.state()}
        with progress.phase("save"), progress.telling(f"writing the checkpoint of step {step}"):
            own = self.own() if self.own else None
            save_checkpoint(self.settings, step, self.engines, state, own, self.log.heldout_of(step))
        self.saved = step


def start(settings: RunSettings, data_fingerprint: str) -> tuple[torch.device, Checkpoint | None]:
    """Join the process group, lock the run's folder, find the checkpoint to continue from, seed, and write config.yaml
    and environment.json: (this rank's device, the checkpoint or None).

    Raises:
        UserError: another run writes to the folder; a rank's versions or data differ from rank 0's, as when a node has
            an older copy of a file; a model's run has not finished; checkpoints are damaged, or of another run.
    """
    patience = watchdog.SLOW_PHASE_FACTOR * settings.watchdog_seconds
    # the watchdog, whose message says more, must act before the process group does
    device = dist.init(settings.device, patience + 60 if patience else 1800)
    on_main(lambda: check_eval_command(settings))
    on_main(lambda: check_trackers(settings.trackers, settings.file))
    preflight.check(settings, device)
    on_main(lambda: _take_lock(settings))
    others = dist.gather_objects((platform.node(), data_fingerprint))
    for rank, (node, fingerprint) in enumerate(others):
        if fingerprint != others[0][1]:
            raise UserError(
                f"{settings.file}: rank {rank} on {node} has other data than rank 0 on {others[0][0]}; "
                "give all nodes the same files and library versions"
            )
    inputs = on_main(lambda: _inputs(settings, data_fingerprint))
    found = find_checkpoint(settings, data_fingerprint, inputs["models"])
    random.seed(settings.seed)
    torch.manual_seed(settings.seed)
    np.random.seed(settings.seed)
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    on_main(lambda: _write_start(settings, _environment(device) | inputs | trusted_code(settings)))
    logs = Path(settings.output) / "logs"
    with explain_disk_errors(logs):
        logs.mkdir(parents=True, exist_ok=True)  # on a node that has another disk
        watchdog.watch(logs, settings.watchdog_seconds, dist.rank(), dist.world_size())
    return device, found


def on_main(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and return its result on every rank. A collective. Raises its UserError on every rank."""
    result, problem = None, None
    if dist.is_main():
        try:
            result = action()
        except UserError as error:
            problem = str(error)
    result, problem = dist.gather_objects((result, problem))[0]
    if problem is not None:
        raise UserError(problem)
    return result  # type: ignore[return-value]


def _take_lock(settings: RunSettings) -> None:
    with explain_disk_errors(Path(settings.output) / lock.NAME):
        lock.take(Path(settings.output))


def _inputs(settings: RunSettings, data_fingerprint: str) -> dict[str, Any]:
    """Fingerprints of what the run reads: its rows, its models, the files that the rows come from."""
    for key, path in named_models(settings).items():
        require_finished(path, settings, key)
    return {
        "data": data_fingerprint,
        "models": model_fingerprints(settings),
        "sources": source_fingerprints(settings),
    }


def _write_start(settings: RunSettings, environment: dict[str, Any]) -> None:
    """Write config.yaml and environment.json; remove what an earlier run left and does not hold for this one."""
    output = Path(settings.output)
    with explain_disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        clear_finished(output)
        origin = f"# Resolved from {settings.file} and overrides; relative deepspeed paths start from its folder.\n"
        values = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
        (output / "config.yaml").write_text(origin + values)
        (output / "environment.json").write_text(json.dumps(environment, indent=2))
        (output / "logs").mkdir(exist_ok=True)
        for old in (output / "logs").glob("rank_*.json"):  # an earlier run's, of ranks that may not come back
            old.unlink()


def finish(settings: RunSettings, exported: Sequence[Path]) -> None:
    """Write finished.json, with the folders that save_model wrote on rank 0, and then the report.

    Raises:
        UserError: on rank 0, it cannot be written.
    """
    if dist.is_main():
        output = Path(settings.output)
        with explain_disk_errors(output / FINISHED):
            environment = json.loads((output / "environment.json").read_text())
            write_finished(settings, {name: environment[name] for name in ("data", "models", "sources")}, exported)
        announce(output)


def _environment(device: torch.device) -> dict[str, object]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "command": [without_secret(word) for word in sys.argv],
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "ranks": dist.world_size(),
        "device": f"{device.type} ({name})",
        "python": platform.python_version(),
        "versions": {package: preflight.installed(package) for package in PACKAGES},
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def trusted_code(settings: RunSettings) -> dict[str, bool]:
    """Each key that lets code of a model folder run, and its value; printed where one does."""
    values = {"trust_remote_code": settings.trust_remote_code}
    for spec in settings.engine_specs():
        if spec.own_tokenizer:
            values[spec.key("trust_remote_code")] = spec.trust_remote_code
    for key in (key for key, value in values.items() if value):
        dist.print0(f"warning: {key}: Python code from model folders runs with your rights")
    return values


def without_secret(word: str) -> str:
    """A word of the command line; of `key=value` with a name such as hub_token or api_key, the name alone."""
    name, equals, _ = word.partition("=")
    return f"{name}=***" if equals and SECRET.search(name) else word
