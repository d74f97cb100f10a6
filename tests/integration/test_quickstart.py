"""Command one, at a tenth of its size: launchers, three steps, table; then the same again, which does nothing."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.helpers.tiny import REPO
from tristage.training.metrics import read_metrics

TINY = {
    "step1_sft": {"epochs": 12, "evaluate_every": 0, "save_every": 0},
    "step2_reward_model": {"epochs": 12, "evaluate_every": 0, "save_every": 0},
    "step3_ppo": {"iterations": 12, "evaluate_every": 6, "save_every": 6},
}


def write_configs(folder: Path) -> None:
    """The quickstart's own configs with fewer steps."""
    folder.mkdir()
    for name, changes in TINY.items():
        text = (REPO / f"configs/quickstart/{name}.yaml").read_text()
        text = text.replace("../deepspeed/", f"{REPO}/configs/deepspeed/")
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(yaml.safe_load(text) | changes))


def run_quickstart(out: Path, configs: Path) -> str:
    environment = os.environ | {"CONFIGS": str(configs), "SIZE": "tiny", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", str(REPO / "launch/quickstart.sh"), str(out), "0"],
        cwd=out.parent, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    folder = tmp_path_factory.mktemp("quick start")  # a space in every path
    write_configs(folder / "configs")
    out = folder / "out"
    (folder / "shared_memory").write_text("\n".join(buffers()))
    return out, folder / "configs", run_quickstart(out, folder / "configs")


def buffers() -> set[str]:
    """What DeepSpeed's CPU op keeps in shared memory."""
    return {path.name for path in Path("/dev/shm").glob("deepspeed_allreduce_buffer*")}


def test_runs_leave_nothing_in_shared_memory(run):
    """DeepSpeed's CPU op would: 66 MiB a rank, until the machine restarts."""
    out, _, _ = run
    assert buffers() <= set((out.parent / "shared_memory").read_text().split("\n"))


def heldout(out: Path, step: str, metric: str) -> tuple[float, float]:
    """(before, after) training."""
    lines = [line[metric] for line in read_metrics(out / step / "metrics.jsonl") if line["split"] == "heldout"]
    return lines[0], lines[-1]


def test_every_step_learns(run):
    out, _, _ = run
    before, after = heldout(out, "step1_sft", "sft/loss")
    assert after < before - 1.0
    before, after = heldout(out, "step2_reward_model", "reward_model/accuracy")
    assert after > 0.55 and after > before
    before, after = heldout(out, "step3_ppo", "objective/score")
    assert after > before
    kl_before, kl_after = heldout(out, "step3_ppo", "objective/kl")
    assert abs(kl_before) < 1e-5 and 0.0 < kl_after < 20.0


def test_the_table_says_what_each_step_had_before_and_after(run):
    out, _, printed = run
    _, accuracy = heldout(out, "step2_reward_model", "reward_model/accuracy")
    _, gold = heldout(out, "step3_ppo", "objective/grade")
    for measure, number in (("accuracy on held-out pairs", accuracy), ("gold", gold)):
        (row,) = [line for line in printed.splitlines() if measure in line and "│" in line]
        assert re.search(rf"{number:.3f}\s*│\s*$", row), row
    assert "if the longer answer won" in printed and "before PPO:" in printed


def written(out: Path) -> dict[Path, int]:
    """When each file was written, but for the page of the whole, which is made of the others each time."""
    files = (path for path in out.rglob("*") if path.is_file() and path != out / "report.html")
    return {path: path.stat().st_mtime_ns for path in files}


def test_a_second_run_does_nothing_again(run):
    out, configs, first = run
    before = written(out)
    again = run_quickstart(out, configs)
    assert written(out) == before
    assert again.count("already finished") == 3
    assert again[again.index("What each step") :] == first[first.index("What each step") :]


def test_the_folders_open_with_transformers_alone(run):
    out, _, _ = run
    for folder, opener in (
        ("step1_sft/final", AutoModelForCausalLM),
        ("step2_reward_model/final", AutoModelForSequenceClassification),
        ("step3_ppo/final", AutoModelForCausalLM),
        ("step3_ppo/final_critic", AutoModelForSequenceClassification),
    ):
        opener.from_pretrained(out / folder)
        tokenizer = AutoTokenizer.from_pretrained(out / folder)
        assert "Assistant" in tokenizer.chat_template


def test_it_ends_with_its_verdict_and_the_path_of_its_report(run):
    out, _, printed = run
    *_, last = printed.splitlines()
    assert last == f"report: {out}/report.html"
    assert "Step 1: supervised fine-tuning: Better" in printed and "Step 3: PPO: " in printed
    page = (out / "report.html").read_text()
    assert page.count("<h2 ") == 3 and all((out / step / "report.html").is_file() for step in TINY)


def test_the_progress_is_followed_on_rank_zero_only(run):
    out, _, printed = run
    assert printed.count("step 3 is done") == 1
    assert len(re.findall(r"ends? the run at", printed)) == 3 and "iterations end the run at 12: " in printed
    assert re.search(r"ppo \d+/12 score \S+ kl \S+ .*left 0:00:\d\d", printed)
    assert list((out / "step3_ppo/tensorboard/heldout").glob("events*"))
