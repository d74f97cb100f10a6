"""Every recipe of configs/ is one whose step accepts it, that fits the GPUs it is for, and that trains.

Nothing of the models is here: plans read config.json files with the published dimensions, and a small random network of
the same architecture takes the steps, at the recipe's ZeRO stages, adapters and checkpointing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import tiny
from tests.helpers.published import MILLIONS, PUBLISHED, shrunk, write_config
from tests.helpers.ranks import run_ranks
from tests.helpers.recipes import STEP_YAMLS, name_of, ranks_of
from tristage.cli import main as cli
from tristage.config import load_config
from tristage.models.sizes import model_shape
from tristage.models.tokenizer import load_tokenizer
from tristage.planning.plan import start_of
from tristage.training.metrics import read_metrics

RECIPES = {file.parent.name: file.parent for file in STEP_YAMLS}
OWN = ("quickstart", "imdb-sentiment", "arithmetic")  # whose models a command makes; tests of their own train them
PLANNED = [file for file in STEP_YAMLS if file.parent.name not in OWN]
# One of each architecture; adapters with a shared reference; ZeRO 0, 2 and 3.
QUICK = ("bloom-1.1b", "llama-2-7b", "opt-1.3b-one-gpu", "qwen3-1.7b")
SLOW = tuple(name for name in RECIPES if name not in (*QUICK, *OWN))
ORDER = ("step1_sft", "step2_reward_model", "step2_dpo", "step3_ppo")


def model_keys(settings: Any) -> dict[str, str]:
    """Key of each model that a config names -> that model."""
    if hasattr(settings, "actor"):
        return {"actor.model": settings.actor.model, "reward.model": settings.reward.model}
    return {"model": settings.model}


def load(file: Path) -> Any:
    return load_config(cli.settings_class(str(file), None), ["--config", str(file)])


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Id of a published model -> a folder with its config.json."""
    folder = tmp_path_factory.mktemp("published")
    return {name: write_config(folder / name.replace("/", "--"), name) for name in PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_dimensions_give_the_published_number_of_parameters(configs, name):
    assert model_shape(configs[name]).parameters / 1e6 == pytest.approx(MILLIONS[name], abs=1)


@pytest.mark.parametrize("file", PLANNED, ids=name_of)
def test_a_recipe_fits_the_gpus_that_it_is_for(configs, file, capsys):
    settings = load(file)
    models = [f"{key}={configs[start_of(model, settings, key)]}" for key, model in model_keys(settings).items()]
    memory = ["--gpus", str(ranks_of(file)), "--gpu-memory", "80", "--host-memory", "1500"]
    assert cli.main(["plan", str(file), *memory, *models]) == 0
    assert re.search(r"^fits: [\d.]+ of 80.00 GiB per GPU", capsys.readouterr().out, flags=re.M)


def test_every_recipe_has_the_steps_of_the_pipeline():
    pipeline = {"step1_sft.yaml", "step2_reward_model.yaml", "step3_ppo.yaml"}
    for name, folder in RECIPES.items():
        without = {"step2_reward_model.yaml"} if name == "arithmetic" else set()  # a rule is its reward
        assert pipeline - without <= {file.name for file in folder.iterdir()}


# -- training ----------------------------------------------------------------------------------------------

SMALL = {
    **{"precision": "float32", "device": "cpu", "data.data_split": "null", "data.heldout": "null", "data.limit": 24},
    **{"data.heldout_limit": 4, "evaluate_every": 0, "save_every": 0},
}
SMALL_TRAINING = SMALL | {"max_tokens": 64, "global_batch": 4, "micro_batch": 2, "max_steps": 2}
SMALL_PPO = SMALL | {
    **{"max_prompt_tokens": 32, "iterations": 1, "rollout.prompts": 8, "rollout.rows_at_once": 4},
    **{"rollout.max_response_tokens": 8, "ppo.minibatch": 4, "ppo.micro_batch": 2},
}
ROWS = {"step1_sft": "sft", "step3_ppo": "prompts"}


def train_recipes(rank: int, folder: str, names: tuple[str, ...]) -> None:
    """The steps of each recipe, chained through folders as its YAMLs are."""
    from step1_sft.train import main as sft
    from step2_dpo.train import main as dpo
    from step2_reward_model.train import main as reward_model
    from step3_ppo.train import main as ppo

    for name in names:
        for step, main in zip(ORDER, (sft, reward_model, dpo, ppo), strict=True):
            file = RECIPES[name] / f"{step}.yaml"
            if file.is_file():
                main(["--config", str(file), *small_settings(file, Path(folder))])


def small_settings(file: Path, folder: Path) -> list[str]:
    """Overrides that leave a recipe its ZeRO JSONs, optimizers, adapters, checkpointing and losses."""
    settings, out = load(file), folder / file.parent.name
    small = SMALL_PPO if file.stem == "step3_ppo" else SMALL_TRAINING
    values = small | {"output": out / file.stem, "data.train": folder / f"rows/{ROWS.get(file.stem, 'ranking')}.jsonl"}
    for key, model in model_keys(settings).items():
        written = re.fullmatch(r"output/[^/]+/(step\w+/final)", model)
        values[key] = out / written[1] if written else folder / "models" / model.replace("/", "--")
    if getattr(settings, "lora", None) is not None:
        values["lora.rank"] = 4
    if file.stem == "step3_ppo" and settings.actor.lora is not None:
        values["actor.lora.rank"] = 4
    return [f"{key}={value}" for key, value in values.items()]


def write_models(folder: Path, names: tuple[str, ...]) -> None:
    tiny.write_rows(folder / "rows")
    tokenizer_of = tiny.write_model(folder / "tokenizer")
    for name in names:
        for file in sorted(RECIPES[name].glob("step*.yaml")):
            for model in model_keys(load(file)).values():
                target = folder / "models" / model.replace("/", "--")
                if model in PUBLISHED and not target.exists():
                    torch.manual_seed(0)
                    AutoModelForCausalLM.from_config(shrunk(model, tokenizer_of)).save_pretrained(target)
                    load_tokenizer(tokenizer_of).save_pretrained(target)


def check_trained(folder: Path, name: str) -> None:
    for step in ORDER:
        if (RECIPES[name] / f"{step}.yaml").is_file():
            lines = [line for line in read_metrics(folder / name / step / "metrics.jsonl") if line["split"] == "train"]
            steps = 1 if step == "step3_ppo" else 2
            assert [line["step"] for line in lines] == list(range(1, steps + 1))
            assert (folder / name / step / "final/model.safetensors").is_file()
    assert lines[-1]["objective/kl"] == pytest.approx(0.0, abs=1e-4)  # of the untouched actor
    adapted = (folder / name / "step3_ppo/final_adapter").is_dir()
    assert adapted == (load(RECIPES[name] / "step3_ppo.yaml").actor.lora is not None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    write_models(folder, QUICK)
    run_ranks(2, train_recipes, str(folder), QUICK, timeout=600)
    return folder


@pytest.mark.parametrize("name", QUICK)
def test_a_recipe_trains(trained, name):
    check_trained(trained, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_the_other_recipes_train(tmp_path, name):
    write_models(tmp_path, (name,))
    run_ranks(2, train_recipes, str(tmp_path), (name,), timeout=600)
    check_trained(tmp_path, name)
