"""Under ZeRO-3 a model comes up partitioned: at no moment of its loading does a rank hold all parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
from deepspeed.runtime.zero import partition_parameters
from safetensors.torch import load_file
from torch import nn

from tests.helpers import tiny
from tests.helpers.ranks import run_ranks
from tristage import dist, engine
from tristage.config import BatchPlan
from tristage.models.causal_lm import load_causal_lm
from tristage.models.reward_model import load_reward_model
from tristage.models.tokenizer import load_tokenizer

LOADS: dict[str, Any] = {"policy": load_causal_lm, "reward": load_reward_model, "granite": load_reward_model}


def load_all(rank: int, folder: str) -> dict[str, Any]:
    """{model: {"peak", "numel", "shares": {name: (whole, own, kept whole)}, "weights"}} of this rank."""
    dist.init("cpu")
    template = json.loads(Path(tiny.deepspeed_json(3)).read_text())
    template["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    config = engine.engine_config(template, "float32", BatchPlan.make(2, 1, 2))
    return {name: load_one(name, f"{folder}/{name}", config) for name in LOADS}


def load_one(name: str, path: str, config: dict[str, Any]) -> dict[str, Any]:
    modules: list[nn.Module] = []  # every one that is made, as soon as it has its parameters
    peak = 0

    def note() -> None:
        nonlocal peak
        made = {id(p): p.numel() for module in modules for p in module.parameters(recurse=False)}
        peak = max(peak, sum(made.values()))  # a partitioned one has none

    def noting(function: Any) -> Any:
        def noted(context: Any, *module: nn.Module) -> Any:
            modules.extend(module)
            note()
            result = function(context, *module)
            note()
            return result

        return noted

    gathering, building = partition_parameters.GatheredParameters, partition_parameters.Init
    with (
        mock.patch.object(gathering, "__enter__", noting(gathering.__enter__)),
        mock.patch.object(building, "_post_init_method", noting(building._post_init_method)),
    ):
        model = LOADS[name](path, load_tokenizer(path), dtype=torch.float32, engine_config=config)
    shares = {key: (p.ds_numel, p.ds_tensor.numel(), p.numel()) for key, p in model.named_parameters()}
    weights = {}
    for key, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter):
            weights[key.removeprefix("model.")] = parameter.detach().numpy().copy()
    return {"peak": peak, "numel": sum(share[0] for share in shares.values()), "shares": shares, "weights": weights}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loading")
    tiny.write_reward_model(folder / "reward", tiny.write_model(folder / "policy", "llama_untied"))
    tiny.write_reward_model(folder / "granite", tiny.write_model(folder / "granite_policy", "granite"))
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(2, load_all, str(folder))


@pytest.mark.parametrize("name", LOADS)
def test_a_rank_holds_its_share_of_every_parameter_and_no_more(name: str, loaded: list[dict[str, Any]]) -> None:
    for rank in loaded:
        assert len(rank[name]["shares"]) > 10
        for key, (numel, own, whole) in rank[name]["shares"].items():
            assert (own, whole) == (-(-numel // 2), 0), key


@pytest.mark.parametrize("name", LOADS)
def test_at_no_moment_are_all_parameters_whole(name: str, loaded: list[dict[str, Any]]) -> None:
    for rank in loaded:
        largest = max(numel for numel, *_ in rank[name]["shares"].values())
        print(f"{name}: at most {rank[name]['peak']} of {rank[name]['numel']} whole, the largest has {largest}")
        assert largest <= rank[name]["peak"] < 0.25 * rank[name]["numel"]


@pytest.mark.parametrize("name", LOADS)
def test_gathered_weights_are_those_of_the_folder(name: str, loaded: list[dict[str, Any]], folder: Path) -> None:
    expected = load_file(folder / name / "model.safetensors")
    for rank in loaded:
        assert rank[name]["weights"].keys() == expected.keys()
        assert all(torch.equal(torch.from_numpy(rank[name]["weights"][key]), expected[key]) for key in expected)
