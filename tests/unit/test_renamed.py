"""A renamed setting is refused by a sentence with its new name; older checkpoints are compared by new names."""

from __future__ import annotations

from typing import Any

import pytest

from step2_reward_model.config import RewardModelConfig
from step3_ppo.config import PPOConfig
from tests.helpers.tiny import ppo_values, write_yaml
from tristage.config import STEPS, load_config, settings_class
from tristage.config.describe import settings_of
from tristage.config.renamed import RENAMED, new_name
from tristage.errors import UserError
from tristage.runs import changes

KEYS = {setting.key for step in STEPS for setting in settings_of(settings_class("", step))}


@pytest.mark.parametrize("old, new", RENAMED.items())
def test_a_step_has_the_new_name_and_not_the_old(old, new):
    assert new in KEYS and old not in KEYS


def test_an_old_name_is_refused_with_the_new_one(tmp_path):
    config = write_yaml(tmp_path / "step3_ppo.yaml", ppo_values(tmp_path, "actor", "reward", "prompts.jsonl"))
    with pytest.raises(UserError) as caught:
        load_config(PPOConfig, ["--config", config, "ppo.kl_target=6"])
    assert str(caught.value) == f"{config}: key `ppo.kl_target` was renamed; write `ppo.adaptive_kl_target`"


def test_a_name_is_only_given_where_the_step_has_it():
    known: dict[str, Any] = {"ppo.adaptive_kl_target": None, "keep_every_n_steps": None}
    assert new_name("ppo.kl_target", known) == "ppo.adaptive_kl_target"
    assert new_name("normalize_rows", known) is None and new_name("seed", known) is None
    assert "normalize_prompts" in RewardModelConfig.model_fields


def test_a_checkpoint_of_before_is_compared_by_the_new_names(tmp_path):
    config = write_yaml(tmp_path / "step3_ppo.yaml", ppo_values(tmp_path, "actor", "reward", "prompts.jsonl"))
    settings = load_config(PPOConfig, ["--config", config])
    old = {new: old for old, new in RENAMED.items()}
    before = {old.get(key, key): value for key, value in changes._flat(settings.model_dump(mode="json"))}
    assert "keep_every" in before and "rollout.gather" in before
    assert changes.changed_settings(before, settings) == ({}, {})
    _, changed = changes.changed_settings(before | {"ppo.kl_horizon": 7}, settings)
    assert changed == {"ppo.adaptive_kl_horizon": "7 -> 10000.0"}


def test_a_setting_that_is_newer_than_a_checkpoint_was_at_its_default_there(tmp_path):
    config = write_yaml(tmp_path / "step3_ppo.yaml", ppo_values(tmp_path, "actor", "reward", "prompts.jsonl"))
    settings = load_config(PPOConfig, ["--config", config])
    before = {key: value for key, value in changes._flat(settings.model_dump(mode="json")) if key != "max_bad_steps"}
    del before["rollout.stop_token_ids"], before["data.max_row_bytes"]
    assert changes.changed_settings(before, settings) == ({}, {})
    given = load_config(PPOConfig, ["--config", config, "rollout.stop_token_ids=[3]"])
    assert changes.changed_settings(before, given) == ({}, {"rollout.stop_token_ids": "None -> [3]"})
