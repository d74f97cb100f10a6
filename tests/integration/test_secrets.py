"""What a machine's environment and the command line hold of secrets appears in nothing that a run writes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import step1_sft.train
import step3_ppo.train
from tests.helpers import tiny
from tristage.data.store import cache_folder
from tristage.training.run import without_secret

PLANTED = {
    "HF_TOKEN": "hf_PLANTEDaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "WANDB_API_KEY": "PLANTEDbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
    "AWS_SECRET_ACCESS_KEY": "PLANTEDcccccccccccccccccccccccccccccccccc",
    "SOME_PASSWORD": "PLANTEDdddddddddd",
}


def files_with(folder: Path, secret: bytes) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret in path.read_bytes()]


def test_secrets_appear_in_nothing_that_runs_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = tiny.write_rows(tmp_path / "rows")
    actor = tiny.write_model(tmp_path / "actor")
    tiny.write_reward_model(tmp_path / "scorer", actor)
    for name, secret in PLANTED.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("TRISTAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["train.py", "mine.api_key=PLANTEDeeee", "seed=3"])
    tiny.sft_config(tmp_path, actor, rows["sft"])
    tiny.ppo_config(tmp_path, actor, str(tmp_path / "scorer"), rows["prompts"])
    with tiny.one_rank():
        step1_sft.train.main(["--config", str(tmp_path / "sft.yaml"), "max_steps=1"])
        step3_ppo.train.main(["--config", str(tmp_path / "ppo.yaml"), "iterations=1"])
    said = "".join(capfd.readouterr())
    assert cache_folder(None).is_relative_to(tmp_path)
    for step in ("sft", "ppo"):  # what could have held one is there
        for written in ("config.yaml", "environment.json", "metrics.jsonl", "final/config.json"):
            assert (tmp_path / step / written).is_file()
        for pattern in ("tensorboard/train/events*", "checkpoints/step_*"):
            assert list((tmp_path / step).glob(pattern))
        assert "seed=3" in (tmp_path / step / "environment.json").read_text()
        assert "mine.api_key=***" in (tmp_path / step / "environment.json").read_text()
    assert "PPO" in said and "PLANTED" not in said
    assert files_with(tmp_path, b"PLANTED") == []


@pytest.mark.parametrize(
    ("word", "written"),
    [
        ("hub_token=a", "hub_token=***"),
        ("TOKEN=a=b", "TOKEN=***"),
        ("a.secret=a", "a.secret=***"),
        ("db-password=a b", "db-password=***"),
        ("x.api_key=", "x.api_key=***"),
        ("aws_secret_access_key=a", "aws_secret_access_key=***"),
        ("max_tokens=64", "max_tokens=64"),
        ("rollout.max_response_tokens=4", "rollout.max_response_tokens=4"),
        ("data.train=secret.jsonl", "data.train=secret.jsonl"),
        ("--config", "--config"),
    ],
)
def test_a_value_with_the_name_of_a_secret_is_masked_in_the_command(word: str, written: str) -> None:
    assert without_secret(word) == written
