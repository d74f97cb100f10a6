"""Finished is one fact: OUT/finished.json, written last, of this run's settings and inputs, and of what it exported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from step1_sft.config import SFTConfig
from tests.helpers.tiny import REPO, dpo_config, sft_config, write_model
from tristage.errors import UserError
from tristage.launch import check_config, dry_run
from tristage.runs import finished
from tristage.runs.finished import clear_finished, has_finished, is_finished, require_finished
from tristage.runs.inputs import model_fingerprints, source_fingerprints
from tristage.training import run


class Run:
    """A run in tmp_path/sft that has finished, with a model and rows that a test may change."""

    def __init__(self, folder: Path):
        self.folder, self.output = folder, folder / "sft"
        self.model = Path(write_model(folder / "model"))
        (folder / "rows.jsonl").write_text('{"prompt": "p", "response": "r"}\n')
        self.final = shutil.copytree(self.model, self.output / "final")
        self.finish(self.settings())

    def settings(self, *overrides: str) -> SFTConfig:
        return sft_config(self.folder, str(self.model), str(self.folder / "rows.jsonl"), 0, *overrides)

    def finish(self, settings: SFTConfig) -> None:
        inputs = {"models": model_fingerprints(settings), "sources": source_fingerprints(settings)}
        (self.output / "environment.json").write_text(json.dumps({"data": "d"} | inputs))
        (self.output / "config.yaml").touch()
        run.finish(settings, [self.final])


@pytest.fixture
def done(tmp_path: Path) -> Run:
    return Run(tmp_path)


def edit(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"more": 1}))


# -- the launcher's question -------------------------------------------------------------------------------


def test_a_run_with_the_same_settings_is_finished_and_what_has_no_effect_may_differ(done):
    assert is_finished(done.settings()) and has_finished(done.output)
    assert is_finished(done.settings("save_every=3", "micro_batch=1", "keep_last=5", "watchdog_seconds=1"))


@pytest.mark.parametrize("left", ["final", "finished.json"])
def test_without_the_fact_or_what_it_is_about_a_run_is_not_finished(done, left):
    """A run that was killed in its export has final/ at most; one whose export was removed exports again."""
    for path in (done.final, done.output / "finished.json"):
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not is_finished(done.settings()) and not has_finished(done.output)


def test_a_damaged_fact_is_none(done):
    for text in ("", "{}", "[]", '{"step": 1'):
        (done.output / "finished.json").write_text(text)
        assert not is_finished(done.settings())


def test_resume_never_asks_for_a_new_run(done):
    assert not is_finished(done.settings("resume=never"))


def test_other_settings_are_named_with_what_to_do(done):
    with pytest.raises(UserError) as told:
        is_finished(done.settings("seed=1", "optimizer.learning_rate=0.5", "keep_last=5"))
    sentence = "optimizer.learning_rate: 0.001 -> 0.5, seed: 0 -> 1; put that back, train again with resume=never"
    assert sentence in str(told.value) and "resume_changed=true" in str(told.value)
    assert "keep_last" not in str(told.value)
    assert not is_finished(done.settings("seed=1", "resume_changed=true"))
    assert is_finished(done.settings("resume_changed=true"))


def test_another_step_in_the_same_folder_is_not_this_one(done):
    other = dpo_config(done.folder, str(done.model), str(done.folder / "rows.jsonl"), 0, f"output={done.output}")
    with pytest.raises(UserError, match="the step: step1_sft -> step2_dpo; put that back"):
        is_finished(other)


def test_other_rows_or_another_model_under_the_same_name_are_seen(done):
    edit(done.model / "config.json")
    with pytest.raises(UserError, match=rf"another run: model \({done.model}\): its content is not the same; put"):
        is_finished(done.settings())
    assert is_finished(done.settings(), models=False)  # it may be written anew before the step starts
    (done.folder / "rows.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"another run: data.train\[0\]: its content is not the same; put"):
        is_finished(done.settings(), models=False)


def test_inputs_that_are_gone_do_not_make_a_run_unfinished(done):
    shutil.rmtree(done.model)
    (done.folder / "rows.jsonl").unlink()
    assert is_finished(done.settings())


def test_an_export_that_was_changed_is_not_taken_for_what_the_run_wrote(done):
    edit(done.final / "config.json")
    with pytest.raises(UserError, match="final: has been changed since its run wrote it; remove it to export it again"):
        is_finished(done.settings())


WITHOUT_TORCH = (
    "import sys; sys.modules['torch'] = None; from tristage.runs import finished; sys.exit(finished.main(sys.argv[1:]))"
)


def ask(done: Run, *words: str, first: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITHOUT_TORCH, *first, "step1_sft.train", str(done.folder / "sft.yaml"), *words]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60)


def test_the_question_needs_no_torch_and_its_exit_code_is_the_answer(done):
    asked = ask(done, "--num_gpus", "4", "save_every=1", "--cpu")
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, "", "")
    assert ask(done, "resume=never").returncode == finished.EXIT_NOT_FINISHED
    other = ask(done, "seed=1")
    assert other.returncode == 2 and other.stderr.startswith(f"error: {done.output}: has finished as another run: seed")
    edit(done.model / "config.json")
    assert (ask(done).returncode, ask(done, first=("--models-later",)).returncode) == (2, 0)


def test_a_dry_run_says_the_same(done, capsys):
    for words, state in {
        (): "(finished)",
        ("seed=1",): "(cannot be continued: ",
        ("resume=never",): "(new run)",
    }.items():
        dry_run.show(done.settings(*words), ["step1_sft.train", *words], ["--num_gpus=2"])
        assert f"output: {done.output} {state}" in capsys.readouterr().out


# -- a run's start and end ---------------------------------------------------------------------------------


def test_a_run_that_starts_is_not_finished(done):
    run._write_start(done.settings(), {})
    assert not (done.output / "finished.json").exists()
    clear_finished(done.output)  # twice is fine


def test_it_is_written_atomically_synced_and_after_every_export(done, monkeypatch):
    settings, calls = done.settings(), []
    monkeypatch.setattr(run, "announce", lambda output: calls.append("report"))
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *words, name=name, real=real: calls.append(name) or real(*words))
    run.finish(settings, [done.final])
    assert calls == ["fsync", "replace", "fsync", "report"]
    values = json.loads((done.output / "finished.json").read_text())
    assert (values["step"], values["data"], list(values["folders"])) == ("step1_sft", "d", ["final"])


def test_a_folder_of_an_earlier_run_is_not_one_of_this_run(done):
    """final_critic of a run with a critic, after one without."""
    shutil.copytree(done.model, done.output / "final_critic")
    with pytest.raises(UserError, match="final_critic: is not what its run exported last"):
        require_finished(str(done.output / "final_critic"), done.settings(), "critic.model")


def test_other_ranks_write_nothing(done, monkeypatch):
    (done.output / "finished.json").unlink()
    monkeypatch.setenv("RANK", "1")
    run.finish(done.settings(), [])
    assert not (done.output / "finished.json").exists()


# -- the next step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("slash", ["", "/"])
def test_the_next_step_starts_from_what_a_run_wrote_to_its_end(done, slash):
    settings, path = done.settings(), f"{done.final}{slash}"
    require_finished(path, settings, "model")
    edit(done.final / "config.json")
    with pytest.raises(UserError, match="sft.yaml: key `model`: .*final/?: is not what its run exported last; start"):
        require_finished(path, settings, "model")
    (done.output / "finished.json").unlink()
    with pytest.raises(UserError, match="key `model`: .*: its run has not finished .*sft has no finished.json.; start"):
        require_finished(path, settings, "model")


def test_a_folder_that_is_not_of_a_run_is_taken_as_it_is(done):
    copy = shutil.copytree(done.final, done.folder / "final")
    (done.output / "finished.json").unlink()
    for path in (str(copy), str(done.model), "owner/name", str(done.output / "checkpoints")):
        assert require_finished(path, done.settings(), "model") is None


def test_launcher_and_ranks_both_ask(done):
    (done.output / "finished.json").unlink()
    settings = done.settings(f"model={done.final}", f"output={done.folder}/next")
    with pytest.raises(UserError, match="its run has not finished"):
        check_config.check_named(settings, models=True, data=False)
    check_config.check_named(settings, models=False, data=False)
    with pytest.raises(UserError, match="its run has not finished"):
        run._inputs(settings, "data")


def test_what_rank_0_meets_all_ranks_meet(tmp_path):
    from tests.helpers.ranks import run_ranks

    assert run_ranks(2, meet, str(tmp_path)) == [("all", "wrong")] * 2


def meet(rank: int, folder: str) -> tuple[str, str]:
    from tristage import dist

    dist.init("cpu")

    def wrong() -> None:
        raise UserError("wrong")

    said = run.on_main(lambda: "all" if dist.is_main() else "one")
    try:
        run.on_main(wrong)
    except UserError as error:
        return said, str(error)
    return said, ""
