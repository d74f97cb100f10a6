"""A user's command measures the exported model: its numbers become metrics, its failures cost only those."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import tiny
from tristage.config import load_config
from tristage.config.settings import EvalCommandSettings
from tristage.engine import frozen_engine
from tristage.errors import UserError
from tristage.models.causal_lm import load_causal_lm
from tristage.training import eval_command, setup
from tristage.training.eval_command import EvalCommand, check_eval_command
from tristage.training.metrics import RunLog, read_metrics

# Prints what it found in the folder, and fails where it would be taken for a rank of the run.
MEASURE = """
import json, os, sys
from pathlib import Path
assert "RANK" not in os.environ and "MASTER_ADDR" not in os.environ
config = json.loads(Path(sys.argv[1], "config.json").read_text())
print("loading")
tasks = {"a": {"acc,none": 0.25, "alias": "A"}}
print(json.dumps({"layers": config["num_hidden_layers"], "tasks": tasks, "bad": float("nan")}))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """make(source, **settings) -> (EvalCommand, its RunLog), for a small model in this process."""
    folder = tmp_path_factory.mktemp("eval")
    model = tiny.write_model(folder / "model")
    config = tiny.sft_config(folder, model, tiny.write_rows(folder / "rows")["sft"])
    with tiny.one_rank():
        _, engine_config, tokenizer = setup.check_training(config)
        loaded = load_causal_lm(model, tokenizer, engine_config=engine_config, **setup.loading(config))
        engine = frozen_engine(loaded, engine_config)

        def make(output: Path, source: str, **settings: Any) -> EvalCommand:
            (output / "logs").mkdir(parents=True)
            (output / "program.py").write_text(source)
            given = EvalCommandSettings(command=f"{sys.executable} {output}/program.py {{model}}", **settings)
            own = config.model_copy(update={"output": str(output), "eval_command": given})
            log = RunLog(output, "sft", 3, 0)
            return EvalCommand(own, engine, tokenizer, torch.device("cpu"), log)

        yield make


def test_numbers_become_metrics_at_the_steps_that_are_due(run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    command = run(tmp_path / "out", MEASURE, every=2)
    with command.log as log:
        for step in (1, 2, 3):
            command.after(step)
        assert log.heldout_of(3) == {"eval/layers": 2.0, "eval/tasks/a/acc,none": 0.25}
    assert read_metrics(tmp_path / "out/metrics.jsonl") == [
        {"step": step, "split": "heldout", "eval/layers": 2.0, "eval/tasks/a/acc,none": 0.25} for step in (2, 3)
    ]
    assert not (tmp_path / "out/eval_model").exists()
    assert (tmp_path / "out/logs/eval_command.log").read_text().count("loading\n") == 2


@pytest.mark.parametrize(
    "source, why",
    [
        ("print('{}'); raise SystemExit(3)", "ended with exit code 3"),
        ("print('accuracy 0.5')", "printed no JSON object in its last line"),
        ("print('[1]')", "printed no JSON object in its last line"),
        ("", "printed no JSON object in its last line"),
    ],
)
def test_a_command_that_fails_is_a_warning(run: Any, tmp_path: Path, source: str, why: str, capfd: Any) -> None:
    command = run(tmp_path / "out", source)
    with command.log:
        command.after(3)
    assert f"warning: step 3: eval_command {why}; its numbers are missing; see {tmp_path}" in capfd.readouterr().out
    assert read_metrics(tmp_path / "out/metrics.jsonl") == []


def test_a_command_that_hangs_is_stopped_with_its_children(
    run: Any, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    monkeypatch.setattr(eval_command, "POLL_SECONDS", 0.05)
    child = f"import time, pathlib; time.sleep(3); pathlib.Path('{tmp_path}/late').touch()"
    source = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    command = run(tmp_path / "out", source, timeout_seconds=1.0)
    begun = time.monotonic()
    with command.log:
        command.after(3)
    assert time.monotonic() - begun < 2.5
    assert "eval_command was stopped before its end" in capfd.readouterr().out
    time.sleep(max(0.0, 3.5 - (time.monotonic() - begun)))
    assert not (tmp_path / "late").exists()


def test_the_best_checkpoint_may_be_chosen_by_its_numbers(tmp_path: Path) -> None:
    with RunLog(tmp_path, "sft", 4, 0) as log:
        log.write(2, "heldout", {"sft/loss": 1.0})
        log.write(2, "heldout", {"eval/acc": 0.5})
        assert log.heldout_of(2) == {"sft/loss": 1.0, "eval/acc": 0.5}


def test_a_command_is_checked_before_anything_loads(tmp_path: Path) -> None:
    config = tiny.sft_config(tmp_path, tiny.write_model(tmp_path / "model"), tiny.write_rows(tmp_path / "rows")["sft"])
    file = ["--config", str(tmp_path / "sft.yaml")]

    def given(command: str) -> Any:
        return load_config(type(config), [*file, "eval_command=" + json.dumps({"command": command})])

    with pytest.raises(UserError, match="eval_command.command.*write {model} where the exported folder goes"):
        given("lm_eval --tasks x")
    with pytest.raises(UserError, match="eval_command.command.*is not a command line"):
        given("lm_eval '{model}")
    with pytest.raises(UserError, match="eval_command.command.*there is no program no-such-program"):
        check_eval_command(given("no-such-program {model}"))
    check_eval_command(given(f"{sys.executable} {{model}}"))
