"""PPO whose rollouts vLLM samples, on a CPU: in an environment of its own (install.sh), for it needs other versions.

`test_what_follows_passes_with_vllm` runs the others there; in the tests' own environment they are skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import step3_ppo.train
import tristage.rollout.vllm
from step3_ppo.rollout import make_experience, sample_responses, score_responses
from tests.helpers import tiny
from tests.helpers.faults import Ranks
from tests.helpers.ppo_run import Run
from tests.helpers.ranks import run_ranks
from tristage import dist
from tristage.batches import PromptBatch, Sampled
from tristage.errors import UserError

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
ENVIRONMENT = Path(os.environ.get("TRISTAGE_VLLM_ENV", CACHE / "tristage/vllm"))
INSIDE = importlib.util.find_spec("vllm") is not None
inside = pytest.mark.skipif(not INSIDE, reason="run by test_what_follows_passes_with_vllm in vLLM's environment")
TOLERANCE = 1e-4
LORA = ("actor.lora={rank: 4, alpha: 8, targets: [all-linear]}", "reference=null")
WAYS: dict[str, tuple[int, tuple[str, ...]]] = {
    "zero2": (2, ()),
    "zero3": (3, ()),
    "zero2, tensor parallel": (2, ("rollout.tensor_parallel=2",)),
    "zero3, lora": (3, LORA),
}


@pytest.mark.slow
@pytest.mark.skipif(INSIDE, reason="this is vLLM's environment")
def test_what_follows_passes_with_vllm() -> None:
    if not (ENVIRONMENT / "complete").is_file():
        pytest.skip(f"{ENVIRONMENT} holds no vLLM: bash tests/vllm/install.sh")
    variables = os.environ | {
        "PYTHONPATH": str(tiny.REPO),
        "TORCH_EXTENSIONS_DIR": str(ENVIRONMENT / "extensions"),
        "TORCHDYNAMO_DISABLE": "1",  # vLLM compiles a few small functions: a minute
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [str(ENVIRONMENT / "bin/python"), "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, cwd=tiny.REPO, env=variables, capture_output=True, text=True, timeout=1200)
    print(done.stdout[-6000:], done.stderr[-3000:])
    assert done.returncode == 0 and "passed" in done.stdout


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm")
    rows = tiny.write_rows(folder / "rows")
    model = tiny.teach(tiny.write_model(folder / "model", gain=1.5), rows["sft"], steps=20)
    tiny.write_reward_model(folder / "reward", model)
    return folder


def config(base: Path, folder: Path, stage: int) -> str:
    models = str(base / "model"), str(base / "reward")
    return str(tiny.ppo_config(folder, *models, str(base / "rows/prompts.jsonl"), stage).file)


def overrides(*words: str) -> tuple[str, ...]:
    return ("rollout.backend=vllm", "rollout.temperature=0.8", *words)


def sample(run: Run, prompts: PromptBatch, iteration: int) -> tuple[Sampled, float]:
    """What vLLM samples, and how far its log-probabilities are from those of training's forward."""
    settings = run.settings
    run.rollouts.sync_weights(iteration - 1)
    sampled = sample_responses(run.rollouts, prompts, settings.rollout, settings.seed, iteration)
    own = score_responses(run.engines, run.tokenizer, sampled, prompts, settings, run.ppo.inputs.functions)
    difference = (own.logprobs - sampled.logprobs).abs() * sampled.sequences.response_mask
    run.update(make_experience(run.engines, own, prompts, settings, run.ppo.control)[0], iteration)
    return sampled, float(difference.max())


def two_iterations(rank: int, file: str, words: tuple[str, ...]) -> dict[str, Any]:
    """On a rank: two iterations, each with what vLLM sampled; then a push that leaves a layer as it was."""
    run = Run(file, *words)
    before = torch.random.get_rng_state(), torch.get_num_threads()
    found = [sample(run, run.batch(iteration), iteration) for iteration in (1, 2)]
    result: dict[str, Any] = {"difference": [difference for _, difference in found]}
    result["responses"] = [sampled.sequences.responses.tolist() for sampled, _ in found]
    result["length"] = [float(sampled.sequences.response_mask.sum(dim=1).float().mean()) for sampled, _ in found]
    result["version"] = [sampled.weights_version for sampled, _ in found]
    result["state"] = torch.equal(before[0], torch.random.get_rng_state()) and torch.get_num_threads() == before[1]

    counted = tristage.rollout.vllm._counted
    with mock.patch.object(tristage.rollout.vllm, "_counted", lambda weights, sums: scaled(counted(weights, sums))):
        try:
            run.rollouts.sync_weights(2)
        except UserError as error:
            result["refused"] = str(error)
    dist.barrier()
    return result


def scaled(weights: Any) -> Any:
    """vLLM gets other numbers in one layer than were counted."""
    return ((name, x * 1.01 if "layers.1.mlp.down" in name else x) for name, x in weights)


@pytest.fixture(scope="module")
def ways(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    found = {}
    for name, (stage, words) in WAYS.items():
        file = config(base, tmp_path_factory.mktemp("way"), stage)
        found[name] = run_ranks(2, two_iterations, file, overrides(*words), timeout=300)
    return found


@inside
@pytest.mark.parametrize("name", WAYS)
def test_log_probabilities_are_training_s_before_and_after_an_update(name: str, ways: dict[str, Any]) -> None:
    for own in ways[name]:
        assert max(own["difference"]) < TOLERANCE and own["version"] == [0, 1] and own["state"]
    first, second = (own["responses"] for own in ways[name])
    assert first != second and 1 < ways[name][0]["length"][0] <= 12


@inside
def test_ranks_that_share_an_engine_sample_what_ranks_with_their_own_do(ways: dict[str, Any]) -> None:
    """And ZeRO-3 what ZeRO-2 does."""
    for rank in range(2):
        expected = ways["zero2"][rank]["responses"][0]
        for name in ("zero3", "zero2, tensor parallel"):
            assert ways[name][rank]["responses"][0] == expected


@inside
@pytest.mark.parametrize("name", WAYS)
def test_a_layer_that_was_not_pushed_as_it_is_is_refused_on_every_rank(name: str, ways: dict[str, Any]) -> None:
    for own in ways[name]:
        assert own["refused"].startswith("vLLM's copy of the weights differs from the actor's after it was pushed (la")
        assert own["refused"].endswith("set rollout.backend to static or padded")


@inside
def test_a_run_logs_the_ratio_and_exports_what_it_trained(base: Path, tmp_path: Path) -> None:
    argv = ["--config", config(base, tmp_path, 2), *overrides("iterations=2", "rollout.importance_cap=1.5")]
    ranks = Ranks(2, step3_ppo.train.main, argv, tmp_path / "log")
    assert ranks.codes() == [0, 0], (tmp_path / "log").read_text()
    lines = [json.loads(line) for line in (tmp_path / "ppo/metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["split"] == "train"]
    assert len(train) == 2
    for line in train:
        assert line["rollout/importance_mean"] == pytest.approx(1, abs=1e-4)
        assert line["rollout/importance_max"] == pytest.approx(1, abs=1e-3) and line["rollout/importance_cut"] == 0
    assert (tmp_path / "ppo/final/model.safetensors").is_file()


# ---- one rank -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run whose top_k is on, which needs vLLM's raw log-probabilities; its folder lists another stop id."""
    generation = base / "model/generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": list(range(150)), "top_k": 1, "repetition_penalty": 9.0}))
    words = ("rollout.temperature=1", "rollout.top_k=40", "rollout.stop_token_ids=[7]")
    with tiny.one_rank():
        yield Run(config(base, tmp_path_factory.mktemp("one"), 0), *overrides(*words))
    generation.unlink()


@inside
def test_a_filter_leaves_log_probabilities_those_of_the_whole_distribution(one: Run) -> None:
    sampled, difference = sample(one, one.batch(), 1)
    assert difference < TOLERANCE
    ids, mask = sampled.sequences.responses, sampled.sequences.response_mask
    ended = torch.isin(ids, torch.tensor(one.rollouts.stop_ids)) & mask
    assert ended.any() and torch.equal(mask.sum(dim=1) < 12, ended[:, :-1].any(dim=1))  # at no other id


@inside
def test_a_response_does_not_depend_on_its_neighbours(one: Run) -> None:
    settings, prompts = one.settings, one.batch()
    one.rollouts.sync_weights(0)

    def responses(rows: torch.Tensor) -> list[list[int]]:
        fields = (prompts.input_ids, prompts.attention_mask, prompts.draw_index, prompts.is_real)
        batch = PromptBatch(*(field[rows] for field in fields))
        return sample_responses(one.rollouts, batch, settings.rollout, 0, 5).sequences.responses.tolist()  # type: ignore

    together = responses(torch.arange(16))
    assert [responses(torch.tensor([row]))[0] for row in (0, 7, 15)] == [together[row] for row in (0, 7, 15)]
    assert len({tuple(row) for row in together}) > 8


@inside
def test_what_vllm_cannot_open_is_one_sentence(one: Run, base: Path) -> None:
    rollouts: Any = one.rollouts
    with pytest.raises(UserError, match="vLLM .* cannot open .*; set rollout.backend to static or padded"):
        rollouts._open(rollouts._options(44) | {"model": str(base / "nothing")})
