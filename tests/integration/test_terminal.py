"""A launcher in a real terminal: a live display that ends well, and a log with the plain lines."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from pathlib import Path

import pytest

from tests.helpers import tiny

REPO = Path(__file__).parents[2]


def in_a_terminal(words: list[str], columns: int = 90) -> bytes:
    """What a command writes to a terminal of this width until it ends."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=REPO)
    os.close(theirs)
    written = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while data := os.read(ours, 65536):
            written += data
    os.close(ours)
    assert child.wait(60) == 0, written.decode(errors="replace")
    return written


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("terminal")
    tiny.sft_config(folder, tiny.write_model(folder / "model"), tiny.write_rows(folder / "rows")["sft"])
    return folder


def test_a_launcher_draws_the_run_and_hands_the_terminal_back(folder: Path) -> None:
    words = ["bash", "launch/step1_sft.sh", str(folder / "sft.yaml"), "--cpu", "2", f"output={folder}/out", "epochs=3"]
    written = in_a_terminal(words)
    text = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", written).decode()
    total = len((folder / "out/metrics.jsonl").read_text().splitlines()) - 2  # held out before and after
    assert re.search(rf"sft ━+ +{total}/{total} done", text) and "held out at" in text and "loss" in text
    assert f"report: {folder}/out/report.html" in text.replace("\r\n", "")
    assert written.rstrip().endswith(b"\x1b[?25h")  # the cursor is shown again
    assert not re.search(r"sft \d+/\d+ loss", text)  # the display has these lines
    log = (folder / "out/logs/launch.log").read_text()
    assert re.search(rf"sft {total}/{total} loss \S+ .*left 0:00:00", log) and "\x1b" not in log
