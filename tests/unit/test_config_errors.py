"""All that is wrong with a config is said at once, a line per key, in our own words, with the key that was meant."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from step1_sft.config import SFTConfig
from step2_dpo.config import DPOConfig
from step2_reward_model.config import RewardModelConfig
from step3_ppo.config import PPOConfig
from tests.helpers.tiny import ppo_values, write_yaml
from tristage.config import RunSettings, load_config
from tristage.config.problems import OTHER_TOOLS, all_keys, explain, guess
from tristage.errors import UserError
from tristage.launch import check_config

STEPS: tuple[type[RunSettings], ...] = (SFTConfig, RewardModelConfig, DPOConfig, PPOConfig)


@pytest.mark.parametrize(
    "step, key, meant",
    [
        (SFTConfig, "batch_size", "global_batch"),
        (PPOConfig, "batch_size", "ppo.minibatch"),
        (SFTConfig, "lr", "optimizer.learning_rate"),
        (SFTConfig, "optimizer.lr", "optimizer.learning_rate"),
        (PPOConfig, "critic.optimizer.lr", "critic.optimizer.learning_rate"),
        (SFTConfig, "per_device_train_batch_size", "micro_batch"),
        (PPOConfig, "per_device_train_batch_size", "ppo.micro_batch"),
        (SFTConfig, "num_train_epochs", "epochs"),
        (PPOConfig, "num_train_epochs", "iterations"),
        (SFTConfig, "max_seq_length", "max_tokens"),
        (PPOConfig, "kl_coef", "ppo.kl_coef"),
        (PPOConfig, "init_kl_coef", "ppo.kl_coef"),
        (PPOConfig, "ppo.cliprange", "ppo.clip"),
        (PPOConfig, "optimizer", "actor.optimizer"),
        (PPOConfig, "rollout.max_new_tokens", "rollout.max_response_tokens"),
        (DPOConfig, "loss_type", "loss"),
        (SFTConfig, "learning_rat", "optimizer.learning_rate"),
        (SFTConfig, "optimizer.warmup", "optimizer.warmup_steps"),
        (SFTConfig, "data.train.0.colums", "data.train.columns"),
        (SFTConfig, "watchdog", None),
        (SFTConfig, "logging_steps", None),
        (SFTConfig, "dropout", None),
    ],
)
def test_the_guess_is_what_another_tool_or_a_typing_error_means(
    step: type[RunSettings], key: str, meant: str | None
) -> None:
    assert guess(key, all_keys(step)) == meant


def test_the_table_of_other_tools_names_keys_that_exist() -> None:
    known = [f".{key}" for step in STEPS for key in all_keys(step)]
    ours = {name for names in OTHER_TOOLS.values() for name in names}
    assert {name for name in ours if not any(key.endswith(f".{name}") for key in known)} == set()


def test_no_name_of_another_tool_is_a_key_of_ours_already() -> None:
    leaves = {key.rpartition(".")[2] for step in STEPS for key in all_keys(step)}
    assert not leaves & set(OTHER_TOOLS)


def wrong_lines(path: str, step: type[RunSettings], *words: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(step, ["--config", path, *words])
    return str(caught.value).splitlines()


def test_all_wrong_keys_are_reported_at_once_a_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = ppo_values(tmp_path / "out", "sft", "rm", "prompts.jsonl")
    path = write_yaml(tmp_path / "step3_ppo.yaml", values)
    words = ["ppo.kl_coeff=1", "iterations=many", "lr=1", "rollout.top_p=2", "data.train=null"]
    lines = wrong_lines(path, PPOConfig, *words)
    assert all(line.startswith(f"{path}: ") for line in lines)
    assert {line.removeprefix(f"{path}: ") for line in lines} == {
        "unknown key `ppo.kl_coeff`; did you mean `ppo.kl_coef`?",
        'key `iterations`: give a whole number; got "many"',
        "unknown key `lr`; did you mean `actor.optimizer.learning_rate`?",
        "key `rollout.top_p`: give 1 or less; got 2",
        "key `data.train`: give a list of at least 1; got []",
    }
    assert check_config.main(["step3_ppo.train", path, *words]) == 2
    assert capsys.readouterr().err.count(path) == 5


BAD: tuple[Any, ...] = (None, "", "x", -1, 2.5, [], {}, [1], {"a": 1}, float("nan"), [[]])


@pytest.mark.parametrize("step", STEPS)
def test_no_wrong_value_is_answered_in_the_words_of_pydantic(step: type[RunSettings]) -> None:
    theirs = re.compile("Input should|Field required|instance of|valid (number|string|integer)")
    for key in all_keys(step):
        named = 0
        for bad in BAD:
            values: Any = bad
            for part in reversed(key.split(".")):
                values = {part: values}
            with pytest.raises(ValidationError) as caught:
                step.model_validate(values)
            lines = list(explain(caught.value, step).values())
            assert not theirs.search("\n".join(lines)), lines
            named += any(key.rpartition(".")[2] in line for line in lines)
        assert named, key
