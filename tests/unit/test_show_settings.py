"""`tristage config` prints a config that loads again, with places; `tristage settings` says what can be set."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from step3_ppo.config import PPOConfig
from tristage import __version__
from tristage.cli import main as cli
from tristage.config import STEPS, load_config, settings_class
from tristage.config.describe import settings_of

REPO = Path(__file__).parents[2]
RECIPE = "configs/opt-66b/step3_ppo.yaml"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(list(words))
    return code, *capsys.readouterr()


# -- tristage config ---------------------------------------------------------------------------------------


def place_in(out: str, line: str) -> str:
    (found,) = (each.rpartition("#") for each in out.splitlines() if each.rpartition("#")[0].strip() == line)
    return found[2].strip()


def test_a_resolved_config_says_where_each_value_is_from(capsys):
    code, out, _ = run(capsys, "config", RECIPE, "ppo.clip=0.1", "data.heldout.split=dev")
    assert code == 0
    assert place_in(out, "clip: 0.1") == "command line"
    assert place_in(out, "# seed: 0") == place_in(out, "# kl_kind: k1") == "default"
    assert place_in(out, "kl_coef: 0.1").startswith("configs/bases/step3_ppo.yaml:")
    line = next(number for number, text in enumerate(Path(RECIPE).read_text().split("\n"), 1) if "iterations" in text)
    assert place_in(out, "iterations: 119") == f"{RECIPE}:{line}"
    both = place_in(out, "heldout: [{preset: rm-static, split: dev}]")
    assert both.startswith("command line, configs/bases/step3_ppo.yaml:")


def test_a_resolved_config_is_a_config_of_the_same_settings(capsys, tmp_path):
    words = [RECIPE, "grader=a.b:c", "ema={}", "critic.lora=null"]
    _, out, _ = run(capsys, "config", *words)
    (tmp_path / "step3_ppo.yaml").write_text(out)
    again = load_config(PPOConfig, ["--config", str(tmp_path / "step3_ppo.yaml")])
    first = load_config(PPOConfig, ["--config", *words])
    assert again.model_dump() == first.model_dump()
    assert again.model_dump(exclude_unset=True) == first.model_dump(exclude_unset=True)


def test_a_wrong_config_is_one_sentence(capsys):
    code, out, err = run(capsys, "config", RECIPE, "sede=1")
    assert (code, out) == (2, "") and err == f"error: {RECIPE}: unknown key `sede`; did you mean `seed`?\n"


# -- tristage settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
def test_every_setting_is_listed_with_type_default_and_sentence(capsys, step):
    code, out, _ = run(capsys, "settings", step)
    assert code == 0
    lines = out.splitlines()
    for setting in settings_of(settings_class("", step)):
        at = next(number for number, line in enumerate(lines) if line.startswith(f"{setting.key}  ("))
        assert setting.kind in lines[at] and setting.default in lines[at] or setting.default == "required"
        assert lines[at + 1] == f"    {setting.sentence}" and setting.sentence.endswith(".")


@pytest.mark.parametrize(
    "key, first",
    [
        ("ppo.clip", "ppo.clip  (number > 0, < 1; default 0.2)"),
        ("clip", "ppo.clip  (number > 0, < 1; default 0.2)"),
        ("reference", "reference  (group or null; default null)"),
        ("data.train.0.limit", "data.train.N.limit  (integer > 0 or null; default null)"),
        ("kl_kind", "ppo.kl_kind  (k1 | k2 | k3; default k1)"),
        ("actor.optimizer.betas", "actor.optimizer.betas  (list of 2 numbers; default [0.9, 0.95])"),
        ("data.heldout", "data.heldout  (path, source or list of them; default [])"),
        ("iterations", "iterations  (integer > 0; required)"),
        ("critic.optimizer", "critic.optimizer  (group)"),
    ],
)
def test_a_setting_is_found_by_its_key_or_the_last_part(capsys, key, first):
    code, out, _ = run(capsys, "settings", "step3_ppo", key)
    assert (code, out.splitlines()[0]) == (0, first)


def test_a_group_is_listed_with_what_is_inside(capsys):
    _, out, _ = run(capsys, "settings", "step3_ppo", "ema")
    assert [line.split()[0] for line in out.splitlines()[::2]] == ["ema", "ema.decay", "ema.start"]


def test_a_setting_that_does_not_exist_is_guessed(capsys):
    assert run(capsys, "settings", "step3_ppo", "ppo.klip") == (
        2,
        "",
        "error: no setting `ppo.klip`; did you mean `ppo.clip`?\n",
    )
    assert run(capsys, "settings", "step1_sft", "zzzz")[2] == "error: no setting `zzzz`; leave it out to list all\n"


# -- the command -------------------------------------------------------------------------------------------


def test_the_command_alone_prints_help(capsys):
    code, out, _ = run(capsys)
    assert code == 0 and out.startswith("usage: tristage") and "settings" in out


def test_the_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert (caught.value.code, capsys.readouterr().out) == (0, f"tristage {__version__}\n")


WITHOUT_TORCH = """
import sys
from tristage.cli.main import main
assert main(["config", "configs/opt-66b/step3_ppo.yaml"]) == main(["settings", "step3_ppo"]) == 0
heavy = {"torch", "transformers", "deepspeed", "datasets"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy else 0)
"""


def test_both_import_no_torch():
    ran = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_a_reader_that_stops_early_is_no_error():
    command = f"{sys.executable} -m tristage.cli.main settings step3_ppo | head -1"
    ran = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_train_hands_its_words_to_the_launcher(monkeypatch):
    seen = []
    monkeypatch.setattr(cli.launcher, "main", lambda words: seen.append(words) or 75)
    assert cli.main(["train", "step3_ppo", "a.yaml", "seed=1", "--hostfile", "hosts", "--max-restarts=2"]) == 75
    assert seen == [["step3_ppo.train", "a.yaml", "seed=1", "--hostfile", "hosts", "--max-restarts=2"]]
    with pytest.raises(SystemExit):
        cli.main(["train", "step9"])
