"""Processes are told apart for good."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.helpers.faults import wait_until
from tristage.machine.processes import has_ended, own_id, process_id


def test_a_process_number_that_is_reused_is_another_process() -> None:
    this = own_id()
    assert not has_ended(this)
    assert has_ended(this._replace(started=this.started - 1))
    assert not has_ended(this._replace(machine="elsewhere", started=0))


def test_a_zombie_has_ended_and_a_name_may_hold_anything(tmp_path: Path) -> None:
    program = shutil.copy("/bin/sleep", tmp_path / "a ) S 1 (")
    child = subprocess.Popen([program, "600"])
    wait_until(lambda: Path(f"/proc/{child.pid}/comm").read_text() == "a ) S 1 (\n")
    process = process_id(child.pid)
    assert process is not None and process.pid == child.pid and not has_ended(process)
    assert process.started >= own_id().started
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # nobody has asked yet how it ended
    assert has_ended(process) and process_id(child.pid) is None
    child.wait()
    assert has_ended(process)
