"""Which engines each step's settings describe, and what building, planning and checks read of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers import tiny
from tristage.config import RunSettings, named_paths
from tristage.planning.formulas import GIB, Machine
from tristage.planning.plan import engines_of
from tristage.runs.inputs import named_models
from tristage.training.setup import deepspeed_configs

LORA, QLORA = "lora={rank: 2}", "lora={rank: 2, quantize: nf4}"
BY_RULE = "reward={functions: [{function: 'tests.helpers.rewards:constant'}]}"
GROUPS = ("ppo.advantage=rloo", "rollout.samples=2")
STEPS: dict[str, Any] = {
    "sft": tiny.sft_config,
    "reward": tiny.reward_model_config,
    "dpo": tiny.dpo_config,
    "ppo": lambda folder, model, rows, *rest: tiny.ppo_config(folder, model, f"{folder}/reward", rows, *rest),
}
# (step, overrides, {engine: (the key that names its model, what its folder holds)})
ACTOR, REFERENCE = ("actor.model", "policy"), ("actor.model", "policy")
REWARD, CRITIC = ("reward.model", "reward_model"), ("reward.model", "reward_model")
CASES: list[tuple[str, list[str], dict[str, tuple[str, str]]]] = [
    ("sft", [], {"model": ("model", "policy")}),
    ("reward", [], {"model": ("model", "new_reward_model")}),
    ("dpo", ["loss=simpo", "beta=2", "gamma=1"], {"model": ("model", "policy")}),
    ("dpo", [], {"model": ("model", "policy"), "reference": ("model", "policy")}),
    ("dpo", ["reference.model=r"], {"model": ("model", "policy"), "reference": ("reference.model", "policy")}),
    ("ppo", [], {"actor": ACTOR, "critic": CRITIC, "reference": REFERENCE, "reward": REWARD}),
    (
        "ppo",
        ["critic.model=c", "reference.model=r"],
        {
            "actor": ACTOR,
            "critic": ("critic.model", "reward_model"),
            "reference": ("reference.model", "policy"),
            "reward": REWARD,
        },
    ),
    ("ppo", [BY_RULE], {"actor": ACTOR, "critic": ("actor.model", "new_reward_model"), "reference": REFERENCE}),
    ("ppo", [*GROUPS, "critic=null", f"actor.{LORA}", "reference=null"], {"actor": ACTOR, "reward": REWARD}),
    (
        "ppo",
        [f"critic.{LORA}", "reward={model: r, share_critic_trunk: true}"],
        {"actor": ACTOR, "critic": CRITIC, "reference": REFERENCE},
    ),
    (
        "ppo",
        ["reward.own_tokenizer=true"],
        {"actor": ACTOR, "critic": ("actor.model", "new_reward_model"), "reference": REFERENCE, "reward": REWARD},
    ),
]


def settings_of(folder: Path, step: str, *words: str, model: str = "model") -> RunSettings:
    settings: RunSettings = STEPS[step](folder, model, "rows.jsonl", 0, *words)
    return settings


@pytest.mark.parametrize("step, words, expected", CASES)
def test_the_engines_of_a_run(tmp_path: Path, step: str, words: list[str], expected: dict[str, Any]) -> None:
    settings = settings_of(tmp_path, step, *words)
    specs = settings.engine_specs()
    assert {spec.name: (spec.path_key, spec.holds) for spec in specs} == expected
    assert [spec.name for spec in specs if spec.frozen] == [n for n in expected if n in ("reference", "reward")]
    assert list(deepspeed_configs(settings, settings.plan(1))) == list(expected)
    keys = {key for key, _ in expected.values()}
    assert set(named_models(settings)) == keys
    assert dict(named_paths(settings)).keys() == keys | {spec.key("deepspeed") for spec in specs}


def test_an_engine_has_the_settings_of_its_group(tmp_path: Path) -> None:
    words = [f"actor.{QLORA}", "critic.gradient_checkpointing=true", "ema={decay: 0.9}", "ppo.entropy_coef=0.1"]
    words += ["trust_remote_code=true", "reward.own_tokenizer=true"]
    actor, critic, reference, reward = settings_of(tmp_path, "ppo", *words).engine_specs()
    assert (actor.averaged, actor.entropy, actor.rows, actor.tokens, actor.scored) == (True, True, 2, 44, 12)
    assert [spec.gradient_checkpointing for spec in (actor, critic)] == [False, True]
    assert [spec.quantize for spec in (actor, critic, reference, reward)] == ["nf4", None, "nf4", None]
    assert reference.lora is None and actor.key("lora.targets") == "actor.lora.targets"
    assert [spec.trust_remote_code for spec in (actor, critic, reference, reward)] == [True, True, True, False]
    assert (actor.positions, reward.positions) == (44, 1)  # rows of other tokens are cut


@pytest.mark.parametrize("step", ["dpo", "ppo"])
def test_the_plan_of_qlora_counts_the_reference_in_4_bits_too(tmp_path: Path, step: str) -> None:
    """It is stored like the policy that it is compared with."""
    model, prefix = tiny.write_model(tmp_path / "model"), "" if step == "dpo" else "actor."
    words = [BY_RULE] if step == "ppo" else []
    machine = Machine(1, 1, 8 * GIB, 8 * GIB, True)
    weights = {}
    for lora in (LORA, QLORA):
        settings = settings_of(tmp_path, step, *words, f"{prefix}{lora}", model=model)
        weights[lora] = {engine.name: engine.weights for engine in engines_of(settings, machine)}
    assert weights[QLORA]["reference"] < weights[LORA]["reference"]
