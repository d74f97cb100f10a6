"""A YAML that extends another says only what is its own; every value knows its file and line."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from step1_sft.config import SFTConfig
from step3_ppo.config import PPOConfig
from tristage.config import CONFIGS, load_config, read_deepspeed_json, read_values
from tristage.errors import UserError

BASE = """output: out
model: some/model
data:
  train: {preset: rm-static, split: test}
  heldout_limit: 9
  data_split: [2, 4, 4]
global_batch: 8
micro_batch: 2
optimizer: {learning_rate: 0.1, betas: [0.8, 0.9]}
lora: {rank: 4}
deepspeed: zero2
"""


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "bases" / "sft.yaml", BASE)


def load(file: Path, *words: str) -> SFTConfig:
    return load_config(SFTConfig, ["--config", str(file), *words])


def recipe(base: Path, text: str, name: str = "mine/sft.yaml") -> Path:
    return write(base.parents[1] / name, f"extends: ../bases/sft.yaml\n{text}")


def error_of(file: Path, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        load(file, *words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- what is inherited -------------------------------------------------------------------------------------


def test_a_value_of_the_file_wins_over_its_base_and_the_command_line_over_both(base):
    file = recipe(base, "micro_batch: 4\nglobal_batch: 16\n")
    settings = load(file, "global_batch=32")
    assert (settings.model, settings.micro_batch, settings.global_batch) == ("some/model", 4, 32)


def test_groups_merge_key_by_key(base):
    settings = load(recipe(base, "optimizer: {learning_rate: 0.5}\nlora: {alpha: 1}\n"))
    assert (settings.optimizer.learning_rate, settings.optimizer.betas) == (0.5, (0.8, 0.9))
    assert settings.lora is not None and (settings.lora.rank, settings.lora.alpha) == (4, 1)


def test_lists_and_sources_of_data_are_replaced_whole(base):
    settings = load(recipe(base, "data: {train: {path: a.jsonl}, data_split: [1, 1, 1]}\n"))
    (source,) = settings.data.train
    assert (source.path, source.preset, source.split) == ("a.jsonl", None, "train")
    assert (settings.data.data_split, settings.data.heldout_limit) == ((1, 1, 1), 9)


def test_null_takes_an_inherited_group_away(base):
    assert load(recipe(base, "lora: null\n")).lora is None


def test_a_base_can_extend_another(base):
    recipe(base, "micro_batch: 4\n", "middle/sft.yaml")
    file = write(base.parents[1] / "top" / "sft.yaml", "extends: ../middle/sft.yaml\nmodel: another/model\n")
    settings = load(file)
    assert (settings.model, settings.micro_batch, settings.global_batch) == ("another/model", 4, 8)
    assert settings.folders == (file.parent, base.parents[1] / "middle", base.parent)


def test_an_override_reaches_into_an_inherited_source_and_group(base):
    settings = load(recipe(base, "seed: 1\n"), "data.train.split=dev", "optimizer.eps=0.5", "lora.alpha=2")
    assert (settings.data.train[0].preset, settings.data.train[0].split) == ("rm-static", "dev")
    assert (settings.optimizer.eps, settings.optimizer.learning_rate) == (0.5, 0.1)
    assert settings.lora is not None and (settings.lora.rank, settings.lora.alpha) == (4, 2)


def test_a_file_that_a_base_names_is_found_beside_the_base(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(base.parent / "zero.json", '{"zero_optimization": {"stage": 1}}')
    settings = load(recipe(base, "deepspeed: zero.json\n"))
    assert read_deepspeed_json(settings.deepspeed, settings) == {"zero_optimization": {"stage": 1}}


def test_values_of_yaml_anchors_are_read(base):
    text = "seed: &n 3\nmax_tokens: *n\n<<: {epochs: 2}\n"
    settings = load(recipe(base, text))
    assert (settings.seed, settings.max_tokens, settings.epochs) == (3, 3, 2)


def test_unchecked_values_include_the_bases(base):
    values = read_values(recipe(base, "output: elsewhere\n"))
    assert (values["output"], values["model"], "extends" in values) == ("elsewhere", "some/model", False)


# -- places ------------------------------------------------------------------------------------------------


def test_every_value_knows_its_file_and_line(base):
    file = recipe(base, "seed: 1\noptimizer:\n  learning_rate: 0.5\n")
    places = load(file, "micro_batch=1", "optimizer.eps=0.1").places
    assert places["optimizer.learning_rate"] == f"{file}:4" and places["seed"] == f"{file}:2"
    assert re.fullmatch(r".*bases/sft.yaml:9", places["optimizer.betas"])
    assert places["micro_batch"] == places["optimizer.eps"] == "command line"
    assert "epochs" not in places


# -- what is wrong -----------------------------------------------------------------------------------------


def test_a_missing_base_names_file_and_line(tmp_path):
    file = write(tmp_path / "a.yaml", "seed: 1\nextends: no/such.yaml\n")
    assert error_of(file) == f"{file}:2: `extends: no/such.yaml`: no such file {tmp_path}/no/such.yaml; fix the path"


@pytest.mark.parametrize("value", ["[a.yaml, b.yaml]", "7", "{a: b}"])
def test_extends_is_one_path(tmp_path, value):
    file = write(tmp_path / "a.yaml", f"extends: {value}\n")
    assert error_of(file).startswith(f"{file}:1: `extends` is ") and error_of(file).endswith("one YAML file")


def test_a_file_that_extends_itself_is_refused(tmp_path):
    file = write(tmp_path / "a.yaml", "extends: a.yaml\n")
    assert error_of(file) == f"{file}:1: `extends: a.yaml` leads back to {file}; remove one `extends`"


def test_a_circle_is_refused_where_it_closes(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    write(one, "extends: two.yaml\n")
    write(two, "seed: 1\nextends: one.yaml\n")
    assert error_of(one) == f"{two}:2: `extends: one.yaml` leads back to {one}; remove one `extends`"


def test_a_wrong_key_of_a_base_names_the_base(base):
    base.write_text(BASE.replace("lora: {rank: 4}", "lora: {rang: 4}"))
    assert error_of(recipe(base, "seed: 1\n")).startswith(f"{os.path.normpath(base)}: unknown key `lora.rang`")
    own = recipe(base, "lora: null\nsede: 1\n")
    assert error_of(own).startswith(f"{own}: unknown key `sede`")


def test_broken_yaml_in_a_base_names_the_base(base):
    base.write_text("model: [a\n")
    assert re.match(rf"{re.escape(str(base))}:\d: not valid YAML", error_of(recipe(base, "seed: 1\n")))


def test_a_key_that_stands_twice_is_refused(base):
    file = recipe(base, "seed: 1\noptimizer:\n  eps: 1\n  eps: 2\n")
    assert error_of(file) == f"{file}:5: key `eps` is already on line 4; remove one"
    file = recipe(base, "seed: 1\nlora: {rank: 1, rank: 2}\n")
    assert error_of(file) == f"{file}:3: key `rank` is already on line 3; remove one"


# -- shipped files -----------------------------------------------------------------------------------------


def test_shipped_files_are_found_by_name_from_anywhere(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = load(recipe(base, "seed: 1\n"))
    assert settings.deepspeed == "zero2"
    assert read_deepspeed_json("zero2", settings)["zero_optimization"]["stage"] == 2


def test_a_file_of_that_name_in_the_working_folder_comes_first(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "zero2", '{"zero_optimization": {"stage": 0}}')
    assert read_deepspeed_json("zero2", load(recipe(base, "seed: 1\n")))["zero_optimization"]["stage"] == 0


def test_shipped_configs_are_extended_and_run_by_a_prefix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "extends: tristage:quickstart/step3_ppo.yaml\niterations: 3\n"
    settings = load_config(PPOConfig, ["--config", str(write(tmp_path / "a.yaml", text))])
    assert (settings.iterations, settings.ppo.micro_batch) == (3, 32)
    assert read_deepspeed_json(settings.actor.deepspeed, settings)["zero_optimization"]["stage"] == 2
    shipped = load_config(PPOConfig, ["--config", "tristage:quickstart/step3_ppo.yaml"])
    assert shipped.folder == CONFIGS / "quickstart"
