"""A config loads as written, and whatever is wrong with it is one sentence: the file, the key, the fix."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

from step1_sft.config import SFTConfig
from step2_reward_model.config import RewardModelConfig
from step3_ppo.config import PPOConfig
from tests.helpers.tiny import ppo_values, write_yaml
from tristage import dist, engine
from tristage.config import (
    BatchPlan,
    OptimizerSettings,
    load_config,
    read_deepspeed_json,
    require_folder_or_hub_id,
    world_size_from_environment,
)
from tristage.engine import engines, schedule_factor
from tristage.errors import UserError
from tristage.training import setup

SFT: dict[str, Any] = {
    "model": "some/model",
    "output": "out",
    "data": {"train": "rows.jsonl"},
    "global_batch": 8,
    "micro_batch": 2,
    "optimizer": {"learning_rate": 1e-3},
    "deepspeed": "zero.json",
}


@pytest.fixture
def sft_yaml(tmp_path: Path) -> str:
    return write_yaml(tmp_path / "sft.yaml", SFT)


def load_sft(path: str, *words: str) -> SFTConfig:
    return load_config(SFTConfig, ["--config", path, *words])


def error_of(path: str, *words: str, settings_class: type = SFTConfig) -> str:
    """The message that loading ends with: one line, not pydantic's report."""
    with pytest.raises(UserError) as caught:
        load_config(settings_class, ["--config", path, *words])
    message = str(caught.value)
    assert "\n" not in message and "pydantic" not in message
    return message


# -- what a config and its overrides give ------------------------------------------------------------------


def test_yaml_values_and_defaults_arrive_typed(sft_yaml):
    settings = load_sft(sft_yaml)
    assert (settings.model, settings.global_batch, settings.optimizer.learning_rate) == ("some/model", 8, 1e-3)
    assert (settings.data.heldout, settings.epochs, settings.optimizer.betas) == ((), 1.0, (0.9, 0.95))


def test_overrides_win_and_dots_reach_into_groups(sft_yaml):
    settings = load_sft(sft_yaml, "global_batch=16", "optimizer.learning_rate=0.5", "data.heldout=other.jsonl")
    assert (settings.global_batch, settings.optimizer.learning_rate) == (16, 0.5)
    assert [source.path for source in settings.data.heldout + settings.data.train] == ["other.jsonl", "rows.jsonl"]


def test_an_override_makes_a_group_that_the_file_leaves_out(tmp_path):
    path = write_yaml(tmp_path / "sft.yaml", {key: SFT[key] for key in SFT if key != "optimizer"})
    assert load_sft(path, "optimizer.learning_rate=2e-4").optimizer.learning_rate == 2e-4


def test_of_two_overrides_of_a_key_the_later_wins(sft_yaml):
    assert load_sft(sft_yaml, "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001", "1E-5"])
def test_scientific_notation_is_a_number(sft_yaml, tmp_path, text):
    assert load_sft(sft_yaml, f"optimizer.learning_rate={text}").optimizer.learning_rate == 1e-5
    path = tmp_path / "text.yaml"
    path.write_text(yaml.safe_dump(SFT).replace("0.001", text))
    assert load_sft(str(path)).optimizer.learning_rate == 1e-5


def test_override_values_are_yaml_and_may_hold_spaces_and_equal_signs(sft_yaml):
    settings = load_sft(
        sft_yaml, "optimizer.betas=[0.8, 0.9]", "data.heldout=null", "output=a b=c", "gradient_checkpointing=true"
    )
    assert settings.optimizer.betas == (0.8, 0.9)
    assert (settings.data.heldout, settings.output, settings.gradient_checkpointing) == ((), "a b=c", True)


def test_a_source_is_a_path_or_a_group_of_settings_or_a_list_of_both(sft_yaml):
    one = load_sft(sft_yaml, "data.train={path: a.csv, weight: 2, columns: {prompt: q.0, responses: [a, b]}}")
    assert (one.data.train[0].path, one.data.train[0].weight) == ("a.csv", 2)
    assert one.data.train[0].columns == {"prompt": "q.0", "responses": ("a", "b")}
    two = load_sft(sft_yaml, "data.train=[a.csv, {preset: b.yaml, split: test}]")
    assert [(source.path, source.preset, source.split) for source in two.data.train] == [
        ("a.csv", None, "train"),
        (None, "b.yaml", "test"),
    ]


@pytest.mark.parametrize("shares", ["2,4,4", "[2, 4, 4]"])
def test_data_split_is_three_shares(sft_yaml, shares):
    assert load_sft(sft_yaml, f"data.data_split={shares}").data.data_split == (2, 4, 4)


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("data.data_split=2,4", "key `data.data_split`: give three shares, for steps 1, 2 and 3, such as 2,4,4"),
        ("data.data_split=0,0,0", "key `data.data_split`: give three shares"),
        ("data.train=[]", "key `data.train`: "),
        ("data.train={path: a.csv, colums: {}}", "did you mean `data.train.columns`?"),
        ("data.train={path: a.csv, weight: 0}", "key `data.train.0.weight`: "),
        ("data.too_long=truncate", "key `data.too_long`: "),
    ],
)
def test_a_wrong_source_is_one_sentence(sft_yaml, override, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        load_sft(sft_yaml, override)


@pytest.mark.parametrize("words", [["--local_rank=1"], ["--local_rank", "1"], ["--local-rank=1"]])
def test_the_launchers_local_rank_is_accepted_and_ignored(sft_yaml, words):
    assert load_config(SFTConfig, [*words, "--config", sft_yaml, "seed=3"]).seed == 3


def test_the_config_may_come_with_an_equal_sign_and_after_overrides(sft_yaml):
    assert load_config(SFTConfig, ["seed=3", f"--config={sft_yaml}"]).seed == 3


def test_settings_know_their_file_and_its_folder(sft_yaml, tmp_path):
    settings = load_sft(sft_yaml)
    assert (settings.file, settings.folder) == (sft_yaml, tmp_path)


@pytest.mark.parametrize("read", [lambda s: s, lambda s: s.optimizer, lambda s: s.data])
def test_settings_are_frozen(sft_yaml, read):
    group = read(load_sft(sft_yaml))
    name = next(iter(type(group).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(group, name, getattr(group, name))


# -- what is wrong with a config ---------------------------------------------------------------------------


def test_an_unknown_key_names_the_file_the_key_and_the_nearest_one(sft_yaml):
    assert error_of(sft_yaml, "learning_rat=1") == (
        f"{sft_yaml}: unknown key `learning_rat`; did you mean `optimizer.learning_rate`?"
    )
    assert error_of(sft_yaml, "optimizer.warmup=1") == (
        f"{sft_yaml}: unknown key `optimizer.warmup`; did you mean `optimizer.warmup_steps`?"
    )


def test_an_unknown_key_like_no_other_is_to_be_removed(sft_yaml):
    assert error_of(sft_yaml, "zzzz=1") == f"{sft_yaml}: unknown key `zzzz`; remove it"


def test_a_key_of_another_step_is_unknown(sft_yaml):
    assert load_config(RewardModelConfig, ["--config", sft_yaml, "loss=best"]).loss == "best"
    assert "unknown key `loss`" in error_of(sft_yaml, "loss=best")


@pytest.mark.parametrize("key", ["model", "output", "global_batch", "deepspeed", "data", "optimizer"])
def test_a_missing_key_is_named(tmp_path, key):
    path = write_yaml(tmp_path / "sft.yaml", {name: value for name, value in SFT.items() if name != key})
    assert error_of(path) == f"{path}: key `{key}` is missing; add it"


def test_a_missing_key_of_a_group_is_named_with_its_group(tmp_path):
    path = write_yaml(tmp_path / "sft.yaml", SFT | {"data": {"split_seed": 1}})
    assert error_of(path) == f"{path}: key `data.train` is missing; add it"


@pytest.mark.parametrize(
    "word, key, wanted, now",
    [
        ("epochs=many", "epochs", "give a number", '"many"'),
        ("global_batch=0", "global_batch", "give a number above 0", "0"),
        ("global_batch=2.5", "global_batch", "give a whole number", "2.5"),
        ("model=[a]", "model", "write text", '["a"]'),
        ("optimizer=7", "optimizer", "write a group of settings, `key: value` lines", "7"),
        ("optimizer.learning_rate=-1e-5", "optimizer.learning_rate", "give a number above 0", '"-1e-5"'),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate", "give a finite number", "NaN"),
        ("optimizer.schedule=step", "optimizer.schedule", "'cosine', 'linear' or 'constant'", '"step"'),
        ("data.heldout_fraction=1", "data.heldout_fraction", "give a number below 1", "1"),
        ("device=gpu", "device", "'auto', 'cpu' or 'cuda'", '"gpu"'),
        ("resume=yes", "resume", "write text", "true"),
        ("seed=-1", "seed", "give 0 or more", "-1"),
        ("liger_kernel=maybe", "liger_kernel", "write true or false", '"maybe"'),
        ("optimizer.betas=0.9", "optimizer.betas", "write a list", "0.9"),
        ("optimizer.betas=[0.1, 0.2, 0.3]", "optimizer.betas", "give a list of at most 2", "[0.1, 0.2, 0.3]"),
        ("data.train=3", "data.train.0", "write a group of settings", "3"),
        ("data.train={path: a, columns: {prompt: 3}}", "data.train.0.columns.prompt", "write text", "3"),
    ],
)
def test_a_wrong_type_or_value_names_file_key_range_and_what_it_is_now(sft_yaml, word, key, wanted, now):
    message = error_of(sft_yaml, word)
    assert message.startswith(f"{sft_yaml}: key `{key}`: ")
    assert wanted in message and message.endswith(f"got {now}")


def test_a_pair_with_one_number_misses_its_second(sft_yaml):
    assert error_of(sft_yaml, "optimizer.betas=[0.9]") == f"{sft_yaml}: key `optimizer.betas.1` is missing; add it"


def test_a_missing_file_is_named():
    assert error_of("no/such.yaml") == "no/such.yaml: no such config file; give the path of a YAML file after --config"


def test_a_folder_is_no_config(tmp_path):
    assert error_of(str(tmp_path)).startswith(f"{tmp_path}: no such config file")


@pytest.mark.parametrize(
    "argv, word",
    [
        ([], None),
        (["seed=1"], None),
        (["--config"], "--config"),
        (["--config", "a.yaml", "seed"], "seed"),
        (["--config", "a.yaml", "--seed=1"], "--seed=1"),
    ],
)
def test_arguments_that_are_not_understood_say_what_to_write(argv, word):
    with pytest.raises(UserError) as caught:
        load_config(SFTConfig, argv)
    start = f"argument {word!r} is not understood" if word else "no config given"
    assert str(caught.value) == f"{start}; write --config FILE key=value ..."


def test_broken_yaml_is_named_with_its_line(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("model: a\noutput: b\ndata: {train: c\nepochs: 1\n")
    assert error_of(str(path)).startswith(f"{path}:4: not valid YAML (")
    assert error_of(str(path)).endswith("fix that line")


@pytest.mark.parametrize("content", [b"model: caf\xe9\n", b"model: a\x00b\n"])
def test_a_file_that_is_no_text_is_one_sentence(tmp_path, content):
    path = tmp_path / "binary.yaml"
    path.write_bytes(content)
    assert error_of(str(path)).startswith(f"{path}: not valid YAML (")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words\n"])
def test_a_yaml_file_without_keys_holds_no_settings(tmp_path, text):
    path = tmp_path / "list.yaml"
    path.write_text(text)
    assert error_of(str(path)) == f"{path}: holds no settings; write `key: value` lines"


def test_an_override_into_a_single_value_is_refused(sft_yaml):
    assert error_of(sft_yaml, "model.path=x") == (
        "argument model.path=x: `model` is a single value, not a group of settings"
    )


def test_an_override_that_is_no_yaml_is_to_be_quoted(sft_yaml):
    assert error_of(sft_yaml, "data.train=[a") == "argument 'data.train=[a': the value is not valid YAML; quote it"


# -- batches -----------------------------------------------------------------------------------------------


def test_batch_plan_divides_exactly():
    plan = BatchPlan.make(global_batch=64, micro_batch=4, world_size=2)
    assert plan == BatchPlan(64, 4, 2, accumulation=8)
    assert str(plan) == "64 rows per step = micro-batch 4 x accumulation 8 x ranks 2"


@pytest.mark.parametrize("global_batch, fit", [(10, 8), (15, 8), (17, 16), (3, 8)])
def test_batches_that_do_not_divide_say_the_numbers_and_one_that_does(global_batch, fit):
    with pytest.raises(UserError) as caught:
        BatchPlan.make(global_batch, micro_batch=4, world_size=2, keys="a.yaml: global_batch, micro_batch")
    assert str(caught.value) == (
        f"a.yaml: global_batch, micro_batch: {global_batch} rows don't divide into micro-batches of 4 on 2 ranks "
        f"(4 x 2 = 8); use for instance {fit} rows per step"
    )
    assert BatchPlan.make(fit, 4, 2).accumulation == fit // 8


def test_the_world_size_is_that_of_the_launch(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert world_size_from_environment() == 1
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert world_size_from_environment() == 6


# -- DeepSpeed JSON ----------------------------------------------------------------------------------------


def write_json(path: Path, values: object) -> Path:
    path.write_text(json.dumps(values))
    return path


def json_error(path: Path, settings: SFTConfig) -> str:
    with pytest.raises(UserError) as caught:
        read_deepspeed_json(str(path), settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("part", ["offload_optimizer", "offload_param"])
def test_offloading_to_nvme_which_no_checkpoint_holds_is_for_frozen_models(tmp_path, sft_yaml, part, monkeypatch):
    nvme = {"stage": 3, part: {"device": "nvme", "nvme_path": "/a"}}
    file, plan = write_json(tmp_path / "zero.json", {"zero_optimization": nvme}), BatchPlan.make(1, 1, 1)
    monkeypatch.setattr(engines, "_has_async_io", lambda: True)
    settings = load_sft(sft_yaml)
    with pytest.raises(UserError, match=f"{part} to nvme is for frozen models only: checkpoints don't hold"):
        setup.trained_config(settings, str(file), "deepspeed", plan)
    assert setup.frozen_config(settings, str(file), "reward.deepspeed", plan)["zero_optimization"][part] == nvme[part]


def test_a_json_is_looked_up_here_and_then_beside_the_yaml(tmp_path, monkeypatch):
    here, beside = tmp_path / "here", tmp_path / "beside"
    here.mkdir()
    settings = load_sft(write_yaml(beside / "sft.yaml", SFT))
    monkeypatch.chdir(here)
    write_json(beside / "zero.json", {"zero_optimization": {"stage": 1}})
    assert read_deepspeed_json("zero.json", settings) == {"zero_optimization": {"stage": 1}}
    write_json(here / "zero.json", {"zero_optimization": {"stage": 2}})
    assert read_deepspeed_json("zero.json", settings) == {"zero_optimization": {"stage": 2}}


def test_a_json_that_is_nowhere_names_the_key(sft_yaml, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        read_deepspeed_json("no.json", load_sft(sft_yaml), "actor.deepspeed")
    assert str(caught.value) == (
        f"{sft_yaml}: key `actor.deepspeed`: no file no.json, here or next to the config; "
        "give its path, or a name that tristage ships: zero0, zero1, zero2, zero2_offload, zero3, zero3_offload"
    )


@pytest.mark.parametrize(
    "zero, sentence",
    [
        ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "`{Z}offload_optimizer.device` does nothing at stage 0"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "`{Z}offload_param.device` does nothing at stage 2; remove"),
        ({"stage": 2, "zero_hpz_partition_size": 2}, "`{Z}zero_hpz_partition_size` does nothing at stage 2; "),
        ({"stage": 2, "zero_quantized_gradients": True}, "`{Z}zero_quantized_gradients` does nothing at stage 2; "),
        ({"stage": 1, "zero_quantized_weights": True}, "`{Z}zero_quantized_weights` does nothing at stage 1; re"),
        ({"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/a"}}, "{Z}offload_optimizer to nvme need"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "{Z}offload_param to nvme needs stage 3 and an `nvme_p"),
        ({"stage": 3, "offload_param": "cpu"}, "{Z}offload_param is 'cpu'; write {\"device\": \"cpu\"}"),
        ({"stage": 3, "zero_hpz_partition_size": "2"}, "{Z}zero_hpz_partition_size is '2', which does not divide 4"),
        ({"stage": 3, "zero_hpz_partition_size": 3}, "{Z}zero_hpz_partition_size is 3, which does not divide 4 "),
    ],
)
def test_what_deepspeed_would_pass_over_is_refused(sft_yaml, tmp_path, monkeypatch, zero, sentence):
    monkeypatch.setenv("WORLD_SIZE", "4")
    path = write_json(tmp_path / "zero.json", {"zero_optimization": zero})
    assert json_error(path, load_sft(sft_yaml)).startswith(f"{path}: {sentence.replace('{Z}', 'zero_optimization.')}")


@pytest.mark.parametrize(
    "zero",
    [
        {"stage": 0, "offload_optimizer": {"device": "none"}, "offload_param": None, "zero_hpz_partition_size": 1},
        {"stage": 1, "offload_optimizer": {"device": "cpu"}, "zero_quantized_weights": False},
        {"stage": 3, "zero_hpz_partition_size": 2, "zero_quantized_weights": True, "offload_param": {"device": "cpu"}},
    ],
)
def test_what_a_stage_heeds_and_what_is_off_is_accepted(sft_yaml, tmp_path, monkeypatch, zero):
    monkeypatch.setenv("WORLD_SIZE", "4")
    path = write_json(tmp_path / "zero.json", {"zero_optimization": zero})
    assert read_deepspeed_json(str(path), load_sft(sft_yaml)) == {"zero_optimization": zero}


def support_error(zero, has_gpu):
    with pytest.raises(UserError) as caught:
        engine.check_zero_support({"zero_optimization": {"stage": 3} | zero}, has_gpu, "a.yaml: key `deepspeed`")
    return str(caught.value)


@pytest.mark.parametrize("name", ["weights", "nontrainable_weights", "gradients"])
def test_quantised_communication_wants_a_gpu(name):
    zero = {f"zero_quantized_{name}": True}
    where = f"a.yaml: key `deepspeed`: zero_optimization.zero_quantized_{name}"
    assert support_error(zero, has_gpu=False) == f"{where} has kernels for GPUs only; remove it"
    engine.check_zero_support({"zero_optimization": zero}, True, "")


@pytest.mark.parametrize("name", ["offload_optimizer", "offload_param"])
def test_offload_to_disk_wants_libaio(name, monkeypatch):
    zero = {name: {"device": "nvme", "nvme_path": "/a"}}
    monkeypatch.setattr(engines, "_has_async_io", lambda: False)
    where = f"a.yaml: key `deepspeed`: zero_optimization.{name} to nvme needs the library libaio"
    assert support_error(zero, has_gpu=True).startswith(where)
    monkeypatch.setattr(engines, "_has_async_io", lambda: True)
    engine.check_zero_support({"zero_optimization": zero}, False, "")
    engine.check_zero_support({"zero_optimization": {name: {"device": "cpu"}}}, False, "")


def test_broken_json_is_named_with_its_line(sft_yaml, tmp_path):
    path = tmp_path / "zero.json"
    path.write_text('{\n  "zero_optimization": {"stage": 1},\n}\n')
    message = json_error(path, load_sft(sft_yaml))
    assert message.startswith(f"{path}:") and "not valid JSON" in message
    assert message.removeprefix(f"{path}:")[0] in "23"  # pythons differ in which of the two lines they blame


@pytest.mark.parametrize("values", [[], 3, {"zero_optimization": True}])
def test_a_json_that_is_no_object_of_objects_is_refused(sft_yaml, tmp_path, values):
    path = write_json(tmp_path / "zero.json", values)
    assert json_error(path, load_sft(sft_yaml)).startswith(f"{path}: holds no settings of ZeRO; write ")


@pytest.mark.parametrize("stage", [4, -1, "2", None])
def test_a_zero_stage_that_does_not_exist_is_refused(sft_yaml, tmp_path, stage):
    path = write_json(tmp_path / "zero.json", {"zero_optimization": {"stage": stage}})
    assert json_error(path, load_sft(sft_yaml)) == f"{path}: zero_optimization.stage is {stage!r}; use 0, 1, 2 or 3"


# -- model folders -----------------------------------------------------------------------------------------


def test_a_model_folder_and_a_hub_id_are_accepted(sft_yaml, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "out" / "final"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    settings = load_sft(sft_yaml)
    for path in (str(folder), "out/final", "facebook/opt-1.3b"):
        assert require_folder_or_hub_id(path, settings, "model") is None


@pytest.mark.parametrize("path", ["./model", "/no/such/model", "~/model", "model", "a/b/c", "out/fine"])
def test_a_model_that_is_neither_folder_nor_hub_id_names_the_key(sft_yaml, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()  # out/fine would be a hub id, but for this folder of ours
    with pytest.raises(UserError) as caught:
        require_folder_or_hub_id(path, load_sft(sft_yaml), "actor.model")
    assert str(caught.value) == (
        f"{sft_yaml}: key `actor.model`: there is no folder {path}; "
        "give a Hugging Face folder, or run the step that writes it first"
    )


def test_a_folder_that_holds_no_model_is_refused(sft_yaml, tmp_path):
    with pytest.raises(UserError, match=f"{sft_yaml}: key `model`: {tmp_path} has no config.json; give a model folder"):
        require_folder_or_hub_id(str(tmp_path), load_sft(sft_yaml), "model")


# -- PPOConfig ---------------------------------------------------------------------------------------------


@pytest.fixture
def ppo_yaml(tmp_path: Path) -> str:
    return write_yaml(tmp_path / "ppo.yaml", ppo_values(tmp_path / "out", "sft/final", "rm/final", "prompts.jsonl"))


def load_ppo(path: str, *words: str) -> PPOConfig:
    return load_config(PPOConfig, ["--config", path, *words])


def test_critic_starts_from_the_reward_model_and_reference_from_the_actor(ppo_yaml):
    settings = load_ppo(ppo_yaml)
    assert (settings.actor_path, settings.reward.model) == ("sft/final", "rm/final")
    assert (settings.critic_path, settings.reference_path) == ("rm/final", "sft/final")


def test_critic_and_reference_can_start_elsewhere(ppo_yaml):
    settings = load_ppo(ppo_yaml, "critic.model=c", "reference.model=r")
    assert (settings.critic_path, settings.reference_path) == ("c", "r")
    assert (settings.actor_path, settings.reward.model) == ("sft/final", "rm/final")


@pytest.mark.parametrize("key, step", [("actor.model", 1), ("reward.model", 2)])
def test_ppo_needs_the_folders_of_steps_1_and_2(ppo_yaml, key, step):
    message = error_of(ppo_yaml, f"{key}=null", settings_class=PPOConfig)
    assert message.startswith(f"{ppo_yaml}: key `{key}` is missing; give step {step}'s final folder")


def test_prompts_are_whole_minibatches(ppo_yaml):
    message = error_of(ppo_yaml, "rollout.prompts=20", "ppo.minibatch=8", settings_class=PPOConfig)
    assert message == (
        f"{ppo_yaml}: rollout.prompts 20 is not a multiple of ppo.minibatch 8; change one of them"
    )


def test_total_steps_counts_iterations_epochs_and_minibatches(ppo_yaml):
    words = ["iterations=5", "ppo.epochs=3", "rollout.prompts=32", "ppo.minibatch=8"]
    assert load_ppo(ppo_yaml, *words).total_steps == 5 * 3 * 4


def test_max_tokens_is_prompt_and_response(ppo_yaml):
    assert load_ppo(ppo_yaml, "max_prompt_tokens=30", "rollout.max_response_tokens=12").max_tokens == 42


def test_the_plan_of_ppo_is_that_of_its_minibatches(ppo_yaml):
    settings = load_ppo(ppo_yaml, "rollout.prompts=24", "ppo.minibatch=12", "ppo.micro_batch=2")
    assert settings.plan(3) == BatchPlan(12, 2, 3, accumulation=2)


def test_the_plan_of_ppo_refuses_ranks_that_do_not_divide(ppo_yaml):
    settings = load_ppo(ppo_yaml)  # 16 prompts, minibatch 8, micro-batch 2
    with pytest.raises(UserError, match=f"^{ppo_yaml}: rollout.prompts 16 is not a multiple of 3 ranks; change it or"):
        settings.plan(3)
    with pytest.raises(UserError, match=rf"^{ppo_yaml}: ppo.minibatch, ppo.micro_batch: 8 rows .* \(2 x 8 = 16\)"):
        settings.plan(8)


# -- schedules ---------------------------------------------------------------------------------------------


def factors(schedule: str, warmup_steps: int, total_steps: int) -> list[float]:
    settings = OptimizerSettings(learning_rate=1.0, schedule=schedule, warmup_steps=warmup_steps)
    return [schedule_factor(step, total_steps, settings) for step in range(total_steps + 2)]


def test_warmup_climbs_in_even_steps_from_the_first():
    assert factors("constant", 3, 5) == [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1]


def test_linear_falls_to_0_one_step_after_the_last():
    assert factors("linear", 0, 4) == [1, 3 / 4, 2 / 4, 1 / 4, 0, 0]


def test_cosine_falls_to_0_one_step_after_the_last():
    half = math.sqrt(0.5)
    assert factors("cosine", 0, 4) == pytest.approx([1, (1 + half) / 2, 1 / 2, (1 - half) / 2, 0, 0], abs=1e-12)


def test_a_schedule_starts_at_its_peak_after_the_warmup():
    assert factors("linear", 1, 5) == [1 / 2, 1, 3 / 4, 2 / 4, 1 / 4, 0, 0]
    assert factors("cosine", 2, 4) == pytest.approx([1 / 3, 2 / 3, 1, 1 / 2, 0, 0], abs=1e-12)


def test_a_warmup_longer_than_the_run_still_gives_factors():
    assert factors("cosine", 3, 2) == [1 / 4, 2 / 4, 3 / 4, 1]


# -- devices -----------------------------------------------------------------------------------------------


def machine(monkeypatch: pytest.MonkeyPatch, num_gpus: int, local_rank: int = 0, accelerator: str = "") -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("DS_ACCELERATOR", accelerator)


@pytest.mark.parametrize(
    "device, num_gpus, local_rank, accelerator",
    [
        ("auto", 0, 5, ""),
        ("cpu", 0, 5, ""),
        ("auto", 2, 1, ""),
        ("cuda", 2, 1, ""),
        ("cpu", 2, 1, "cpu"),
        ("auto", 2, 5, "cpu"),  # on the CPU there may be more ranks than GPUs
    ],
)
def test_a_device_that_the_machine_has_is_accepted(monkeypatch, device, num_gpus, local_rank, accelerator):
    machine(monkeypatch, num_gpus, local_rank, accelerator)
    assert dist.check_device(device, "a.yaml") is None


@pytest.mark.parametrize(
    "device, num_gpus, local_rank, message",
    [
        ("cuda", 0, 0, "key `device` is cuda but this machine shows no GPU; use `device: auto` or `cpu`"),
        ("cpu", 1, 0, "key `device` is cpu on a machine with GPUs; set DS_ACCELERATOR=cpu to force it"),
        ("auto", 2, 2, "this node has to run 3 ranks but shows 2 GPUs; lower --num_gpus"),
        ("cuda", 2, 2, "this node has to run 3 ranks but shows 2 GPUs; lower --num_gpus"),
    ],
)
def test_a_device_that_the_machine_has_not_is_refused(monkeypatch, device, num_gpus, local_rank, message):
    machine(monkeypatch, num_gpus, local_rank)
    with pytest.raises(UserError) as caught:
        dist.check_device(device, "a.yaml")
    assert str(caught.value) == f"a.yaml: {message}"


def test_step_3_has_the_epsilon_of_ppo_unless_told_otherwise(tmp_path):
    values = ppo_values(tmp_path, "actor", "reward", "prompts.jsonl")
    del values["actor"]["optimizer"]["eps"]
    settings = PPOConfig.model_validate(values)
    assert settings.actor.optimizer.eps == 1e-5
    assert OptimizerSettings(learning_rate=1.0).eps == 1e-8
