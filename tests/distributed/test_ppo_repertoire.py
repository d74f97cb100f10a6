"""What PPO may add to an optimizer step (other losses, text, an average of the weights) on any ranks and ZeRO stage.

Gradients are read off and compared as in helpers/gradients.py. All runs of two ranks share one pair of processes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from step1_sft.train import sft_step
from step3_ppo.config import PPOConfig
from step3_ppo.engines import Engines, build_engines
from step3_ppo.rollout import _score_policy
from step3_ppo.update import NOTHING_ELSE, ActorExtras, ppo_update
from tests.helpers import gradients, tiny
from tests.helpers.gradients import CLIP, CPU, ROWS, TEMPERATURE, TOLERANCE, Oracle, Step, worst_difference
from tests.helpers.ranks import run_ranks
from tristage import dist, engine
from tristage.batches import Experience, SFTBatch
from tristage.config import BatchPlan, OptimizerSettings
from tristage.data.collate import collate_sft, pick
from tristage.data.loader import deal
from tristage.engine.average import WeightAverage
from tristage.models.causal_lm import load_causal_lm
from tristage.models.reward_model import load_reward_model
from tristage.models.tokenizer import load_tokenizer
from tristage.storage.pieces import PieceReader, write_pieces
from tristage.training import setup

# (ranks, micro-batch) and the ZeRO stages that each runs at.
LAYOUTS = {(1, 4): (0,), (1, 1): (2,), (2, 4): (0, 3), (2, 2): (1, 2), (2, 1): (0, 3)}
CASES = ["policy", "pretraining", "value", "shared"]
CLIP_HIGH, DUAL_CLIP, ENTROPY_COEF, KL_COEF, HUBER_DELTA, MIX_COEF = 0.35, 1.3, 0.02, 0.15, 0.7, 27.8
VALUE_COEF, OLD_KL_COEF = 0.6, 0.4
POLICY = {"clip_high": CLIP_HIGH, "dual_clip": DUAL_CLIP, "entropy_coef": ENTROPY_COEF, "kl": KL_COEF}
# Blocks of text: one token and the ones that are trained, of such different numbers that a mean of means would show.
TEXT = [(1, n) for n in (3, 40, 8, 1, 21, 2, 63, 12)]

DECAY, START, SKIPPED, STEPS = 0.7, 2, 4, 6
# Name -> (ZeRO stage, precision, bytes below which ZeRO-3 keeps a parameter whole).
AVERAGED = {
    "zero0": (0, "float32", None),
    "zero1": (1, "float32", None),
    "zero2": (2, "float32", None),
    "zero3": (3, "float32", 1000),  # some of the parameters
    "zero3_none_whole": (3, "float32", 0),
    "zero2_bf16": (2, "bf16", None),
}
FLOAT32 = [name for name in AVERAGED if "bf16" not in name]


# ---- the oracle -----------------------------------------------------------------------------------------------------


def policy_row(experience: Experience, **options: float) -> Callable[[Any, int], tuple[torch.Tensor, int]]:
    """The loss of a row with some of POLICY's options: clips by hand, k3 to the reference, the exact entropy."""

    def loss(model: Any, row: int) -> tuple[torch.Tensor, int]:
        ids, start, kept = gradients.unpadded(experience, row)
        logits = model(torch.tensor([ids])).logits[0, start - 1 : -1] / TEMPERATURE
        every = torch.log_softmax(logits, -1)  # [n,V]
        logprobs = every[torch.arange(len(every)), ids[start:]]
        old, ref, advantages = (
            x[row][kept].double() for x in (experience.logprobs, experience.ref_logprobs, experience.advantages)
        )
        total = torch.zeros((), dtype=torch.float64)
        for t, advantage in enumerate(advantages.tolist()):
            ratio = (logprobs[t] - old[t]).exp()
            upper = 1 + options.get("clip_high", CLIP)
            gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, upper) * advantage)
            if advantage < 0 and "dual_clip" in options:
                gain = gain.clamp(min=options["dual_clip"] * advantage)
            r = (ref[t] - logprobs[t]).exp()
            entropy = -(every[t].exp() * every[t]).sum()
            total = total - gain + options.get("kl", 0.0) * (r - 1 - r.log())
            total = total - options.get("entropy_coef", 0.0) * entropy
        return total, len(advantages)

    return loss


def huber_row(experience: Experience) -> Callable[[Any, int], tuple[torch.Tensor, int]]:
    def loss(model: Any, row: int) -> tuple[torch.Tensor, int]:
        ids, start, kept = gradients.unpadded(experience, row)
        errors = gradients.row_values(model, ids)[start - 1 : -1] - experience.returns[row][kept].double()
        total = torch.zeros((), dtype=torch.float64)
        for error in errors:
            small = abs(error.item()) <= HUBER_DELTA
            total = total + (0.5 * error**2 if small else HUBER_DELTA * (error.abs() - 0.5 * HUBER_DELTA))
        return total, len(errors)

    return loss


def head_weights(width: int) -> torch.Tensor:
    """Of a value head: [1,H]. It starts at 0, which would hide what its loss does to the trunk."""
    return torch.randn(1, width, generator=torch.Generator().manual_seed(5)) * 0.3


class WithHead:
    """A policy of transformers' with the value head beside it."""

    @staticmethod
    def from_pretrained(path: str, dtype: torch.dtype) -> Any:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        model.value_head = torch.nn.Linear(model.config.hidden_size, 1, bias=False, dtype=dtype)
        model.value_head.weight.data.copy_(head_weights(model.config.hidden_size))
        return model


def shared_row(experience: Experience) -> Callable[[Any, int], tuple[torch.Tensor, int]]:
    """surrogate - OLD_KL_COEF KL(old, new) - VALUE_COEF value loss, negated; see docs/step3-ppo.md."""
    policy = gradients.policy_row(experience)

    def loss(model: Any, row: int) -> tuple[torch.Tensor, int]:
        surrogate, count = policy(model, row)
        ids, start, kept = gradients.unpadded(experience, row)
        logprobs = gradients.row_logprobs(model, ids, start, TEMPERATURE)
        ratio = (logprobs - experience.logprobs[row][kept].double()).exp()
        old_kl = (ratio - 1 - ratio.log()).sum()  # its mean over what the old policy samples is KL(old, new)
        hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0]
        values = model.value_head(hidden)[start - 1 : -1, 0]
        old, returns = experience.values[row][kept].double(), experience.returns[row][kept].double()
        moved = old + (values - old).clamp(-CLIP, CLIP)
        value = 0.5 * torch.maximum((values - returns) ** 2, (moved - returns) ** 2).sum()
        return surrogate + OLD_KL_COEF * old_kl + VALUE_COEF * value, count

    return loss


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return gradients.write_models(tmp_path_factory.mktemp("gradients"))


@pytest.fixture(scope="module")
def experience(paths: dict[str, str]) -> Experience:
    return torch.load(paths["experience"], weights_only=False)


def policy_oracle(paths: dict[str, str], experience: Experience, **options: float) -> Oracle:
    lengths = experience.sequences.attention_mask.sum(dim=1).tolist()
    row = policy_row(experience, **options)
    return Oracle(AutoModelForCausalLM, paths["gpt2"], list(range(ROWS)), lengths, row)


@pytest.fixture(scope="module")
def expected(paths: dict[str, str], experience: Experience) -> dict[str, dict[str, np.ndarray]]:
    """The gradient of each case in float64."""
    texts = tiny.random_examples(TEXT, load_tokenizer(paths["gpt2"]), seed=11)
    lengths = [len(text.ids) for text in texts]
    plain = policy_oracle(paths, experience).gradient()
    text = Oracle(AutoModelForCausalLM, paths["gpt2"], texts, lengths, gradients.sft_row).gradient()
    scorer, row = AutoModelForSequenceClassification, huber_row(experience)
    shared = Oracle(WithHead, paths["gpt2"], list(range(ROWS)), [1] * ROWS, shared_row(experience)).gradient()
    shared["value_head.weight"] = shared.pop("model.value_head.weight")
    return {
        "shared": shared,
        "policy": policy_oracle(paths, experience, **POLICY).gradient(),
        "pretraining": {name: plain[name] + MIX_COEF * text[name] for name in plain},
        "value": Oracle(scorer, paths["reward"], list(range(ROWS)), [1] * ROWS, row).gradient(),
    }


# ---- what the ranks run ---------------------------------------------------------------------------------------------


def settings_of(paths: dict[str, str], name: str, stage: int, *overrides: str) -> PPOConfig:
    folder = Path(paths["settings"]) / f"{name}_{dist.world_size()}_{dist.rank()}"
    return tiny.ppo_config(
        folder, paths["gpt2"], paths["reward"], "unused", stage, f"rollout.prompts={ROWS}",
        f"rollout.temperature={TEMPERATURE}", f"ppo.minibatch={ROWS}", f"ppo.clip={CLIP}", *overrides,
    )  # fmt: skip


def run_gradients(paths: dict[str, str], stage: int, micro_batch: int) -> dict[str, Any]:
    """{case: {"gradient", "loss", "norm"}}: one step of all the policy's options and Huber's loss, one with text."""
    experience = dataclasses.replace(torch.load(paths["experience"], weights_only=False), kl_coef=KL_COEF)
    tokenizer = load_tokenizer(paths["gpt2"])
    common = [f"ppo.micro_batch={micro_batch}", "ppo.epochs=1"]
    settings = settings_of(
        paths, "gradients", stage, *common, f"ppo.clip_high={CLIP_HIGH}", f"ppo.dual_clip={DUAL_CLIP}",
        f"ppo.entropy_coef={ENTROPY_COEF}", "ppo.kl_in=loss", "ppo.kl_kind=k3", "ppo.value_loss=huber",
        f"ppo.huber_delta={HUBER_DELTA}",
    )  # fmt: skip
    plan = settings.plan(dist.world_size())
    template = json.loads(Path(tiny.deepspeed_json(stage)).read_text())
    config = engine.engine_config(template, "float32", plan)
    actor, critic = (
        Step(load, paths[name], tokenizer, config)
        for load, name in ((load_causal_lm, "gpt2"), (load_reward_model, "reward"))
    )
    metrics, _ = ppo_update(Engines(actor.engine, critic.engine, None, None), experience, 1, settings, plan)
    found = {
        case: step.result(metrics, f"{case}/loss", f"{case}/grad_norm")
        for case, step in (("policy", actor), ("value", critic))
    }
    settings = settings_of(paths, "gradients", stage, *common)
    actor = Step(load_causal_lm, paths["gpt2"], tokenizer, config)
    asked: list[int] = []
    texts = tiny.random_examples(TEXT, tokenizer, seed=11)

    def blocks(number: int) -> list[SFTBatch]:
        asked.append(number)
        dealt = deal(range(len(texts)), [len(text.ids) for text in texts], plan, dist.rank())
        return [collate_sft(pick(texts, micro), tokenizer.pad_token_id) for micro in dealt]

    extras = ActorExtras(blocks, MIX_COEF)
    metrics, _ = ppo_update(Engines(actor.engine, None, None, None), experience, 1, settings, plan, extras)
    assert asked == [0] and "value/loss" not in metrics
    found["pretraining"] = actor.result(metrics, "policy/pretraining_loss", "policy/grad_norm")
    head = f"value_head={{coef: {VALUE_COEF}, old_policy_kl_coef: {OLD_KL_COEF}}}"
    settings = settings_of(paths, "gradients", stage, *common, "critic=null", head, f"ppo.value_clip={CLIP}")
    actor = Step(load_with_head, paths["gpt2"], tokenizer, config)
    metrics, _ = ppo_update(Engines(actor.engine, None, None, None), experience, 1, settings, plan)
    found["shared"] = actor.result(metrics, "value/loss", "policy/grad_norm")
    return found


def load_with_head(*arguments: Any, **options: Any) -> Any:
    model = load_causal_lm(*arguments, **options, value_head=True)
    model.value_head.weight.data.copy_(head_weights(model.value_head.in_features))
    return model


def weights_of(trained: Any) -> dict[str, np.ndarray]:
    """All weights, in float64, on rank 0."""
    return {name: weights.double().numpy().copy() for name, weights in engine.full_state_dict(trained).items()}


def text_batches(tokenizer: Any, plan: BatchPlan, step: int) -> list[SFTBatch]:
    rows = tiny.random_examples(gradients.SFT_LENGTHS, tokenizer, seed=step)
    dealt = deal(range(len(rows)), [len(row.ids) for row in rows], plan, dist.rank())
    return [collate_sft(pick(rows, micro), tokenizer.pad_token_id) for micro in dealt]


def run_average(paths: dict[str, str], name: str, averaged: bool) -> dict[str, Any]:
    """Some steps of SFT, the average in place for a while, then two more steps; without `averaged` the steps alone."""
    stage, precision, threshold = AVERAGED[name]
    plan = BatchPlan.make(ROWS, 2, dist.world_size())
    template = json.loads(Path(tiny.deepspeed_json(stage)).read_text())
    if threshold is not None:
        template["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    config = engine.engine_config(template, precision, plan)
    tokenizer = load_tokenizer(paths["gpt2"])
    model = load_causal_lm(paths["gpt2"], tokenizer, dtype=engine.DTYPES[precision], engine_config=config)
    optimizer = OptimizerSettings(learning_rate=1e-2, schedule="constant")
    trained = engine.train_engine(model, config, optimizer, total_steps=STEPS + 2)
    probe = collate_sft(tiny.random_examples(gradients.SFT_LENGTHS, tokenizer), tokenizer.pad_token_id)

    def said() -> np.ndarray:
        trained.eval()
        with torch.no_grad():
            return trained(probe.input_ids, probe.attention_mask, probe.loss_mask)[0].numpy().copy()

    found: dict[str, Any] = {"weights": [weights_of(trained)]}
    average = WeightAverage(trained, DECAY, START) if averaged else None
    for step in range(STEPS):
        sft_step(trained, text_batches(tokenizer, plan, step), CPU)
        found["weights"].append(weights_of(trained))
        if average is not None:
            average.update(step, skipped=step == SKIPPED)
    if average is not None:
        found |= {"before": (weights_of(trained), said()), "names": sorted(average.averages)}
        with average.in_place():
            found["inside"] = weights_of(trained), said()
        found["after"] = weights_of(trained), said()
        again = WeightAverage(trained, DECAY, START)
        kept = Path(paths["experience"]).parent / f"average_{name}"
        kept.mkdir(exist_ok=True)
        write_pieces(kept / f"rank{dist.rank()}.safetensors", average.pieces())
        dist.barrier()
        again.restore(PieceReader(kept, dist.world_size()))
        pairs = zip(again.pieces(), average.pieces(), strict=True)
        found["restored"] = all(torch.equal(ours.tensor, theirs.tensor) for ours, theirs in pairs)
    for step in (STEPS, STEPS + 1):
        sft_step(trained, text_batches(tokenizer, plan, step), CPU)
    return found | {"last": weights_of(trained)}


def run_warmup(paths: dict[str, str], stage: int) -> dict[str, Any]:
    """Three iterations of two steps; in the first only the critic learns."""
    settings = settings_of(paths, "warmup", stage, "ppo.epochs=2", "iterations=3", "critic.warmup_iterations=1")
    plan = settings.plan(dist.world_size())
    configs = setup.deepspeed_configs(settings, plan)
    configs = {name: configs[name] for name in ("actor", "critic")}
    engines = build_engines(settings, configs, load_tokenizer(paths["gpt2"]))
    experience = torch.load(paths["experience"], weights_only=False)
    steps: list[tuple[int, bool]] = []
    extras = ActorExtras(after_step=lambda number, skipped: steps.append((number, skipped)))
    found: dict[str, Any] = {"actor": [], "critic": [], "metrics": [], "steps": steps}
    for iteration in (0, 1, 2, 3):
        if iteration:
            found["metrics"].append(ppo_update(engines, experience, iteration, settings, plan, extras)[0])
        found["actor"].append(weights_of(engines.actor))
        found["critic"].append(weights_of(engines.critic))
    return found


def run_target_kl(paths: dict[str, str], stage: int) -> dict[str, Any]:
    """{case: (epochs, steps, KL)} where old log-probabilities are off by 0.5 in the rows of the last rank alone.

    k3 of 0.5 is exp(-0.5) - 1 + 0.5 = 0.107, so the KL is 0 on one rank, 0.107 on the other, in between over both.
    """
    found = {}
    for name, gap, target, rate in (("over", 0.5, 0.01, 1e-6), ("under", 0.5, 0.1, 1e-6), ("later", 0.0, 1e-4, 1e-3)):
        settings = settings_of(
            paths, "target", stage, "ppo.epochs=3", f"ppo.target_kl={target}",
            f"actor.optimizer.learning_rate={rate}", "actor.optimizer.warmup_steps=0",
        )  # fmt: skip
        plan = settings.plan(dist.world_size())
        config = setup.deepspeed_configs(settings, plan)["actor"]
        model = load_causal_lm(
            paths["gpt2"], load_tokenizer(paths["gpt2"]), dtype=torch.float32, engine_config=config
        )
        actor = engine.train_engine(model, config, settings.actor.optimizer, settings.total_steps)
        experience = torch.load(paths["experience"], weights_only=False)
        actor.eval()
        with torch.no_grad():
            logprobs, _ = _score_policy(actor, experience.sequences, settings)
        lengths = experience.sequences.attention_mask.sum(dim=1).tolist()
        last = [row for micro in deal(range(ROWS), lengths, plan, dist.world_size() - 1) for row in micro]
        logprobs[last] += gap
        experience = dataclasses.replace(experience, logprobs=logprobs)
        metrics, _ = ppo_update(Engines(actor, None, None, None), experience, 1, settings, plan, NOTHING_ELSE)
        found[name] = metrics["policy/epochs"], actor.global_steps, metrics["policy/approx_kl"]
    return found


def run_all(rank: int, paths: dict[str, str], gradient_runs: list[tuple[int, int]]) -> dict[str, Any]:
    dist.init("cpu")
    with mock.patch.object(engine.engines, "_adamw", gradients.sgd):
        found: dict[str, Any] = {"gradients": {key: run_gradients(paths, *key) for key in gradient_runs}}
    found["average"] = {name: run_average(paths, name, averaged=True) for name in AVERAGED}
    found["alone"] = {name: run_average(paths, name, averaged=False)["last"] for name in AVERAGED}
    stages = (0, 3) if dist.world_size() > 1 else (0,)
    found["warmup"] = {stage: run_warmup(paths, stage) for stage in stages}
    found["target_kl"] = {stage: run_target_kl(paths, stage) for stage in stages}
    return found


@pytest.fixture(scope="module")
def results(paths: dict[str, str]) -> dict[int, list[dict[str, Any]]]:
    """{ranks: what each rank found}."""

    def runs(ranks: int) -> list[tuple[int, int]]:
        return [(stage, micro) for (r, micro), stages in LAYOUTS.items() if r == ranks for stage in stages]

    with tiny.one_rank():
        alone = [run_all(0, paths, runs(1))]
    return {1: alone, 2: run_ranks(2, run_all, paths, runs(2), timeout=600)}


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_equals_the_float64_oracle_for_every_layout_and_zero_stage(
    case: str, results: dict[int, Any], expected: dict[str, Any]
) -> None:
    worst = {
        (ranks, *key): worst_difference(found[case]["gradient"], expected[case])
        for ranks in (1, 2)
        for key, found in results[ranks][0]["gradients"].items()
    }
    assert len(worst) == sum(map(len, LAYOUTS.values()))
    print(f"{case}: largest relative difference {max(worst.values()):.1e}")
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("case", CASES)
def test_the_norm_is_that_of_the_whole_gradient(case: str, results: dict[int, Any], expected: dict[str, Any]) -> None:
    norm = sum((gradient**2).sum() for gradient in expected[case].values()) ** 0.5
    for ranks in (1, 2):
        for key, found in results[ranks][0]["gradients"].items():
            assert found[case]["norm"] == pytest.approx(norm, rel=1e-5), (ranks, key)


def test_reported_losses_are_means_over_the_tokens_of_all_ranks(
    paths: dict[str, str], experience: Experience, results: dict[int, Any]
) -> None:
    texts = tiny.random_examples(TEXT, load_tokenizer(paths["gpt2"]), seed=11)
    oracles = {
        "policy": policy_oracle(paths, experience, **POLICY),
        "pretraining": Oracle(AutoModelForCausalLM, paths["gpt2"], texts, [1] * len(texts), gradients.sft_row),
    }
    for ranks in (1, 2):
        for key, found in results[ranks][0]["gradients"].items():
            for case, oracle in oracles.items():
                assert found[case]["loss"] == pytest.approx(oracle.loss(), rel=1e-5, abs=1e-6), (ranks, key, case)


@pytest.mark.parametrize("option", POLICY)
def test_without_any_one_option_the_gradient_would_be_another(
    option: str, paths: dict[str, str], experience: Experience, expected: dict[str, Any]
) -> None:
    others = {name: value for name, value in POLICY.items() if name != option}
    without = policy_oracle(paths, experience, **others).gradient()
    assert worst_difference(without, expected["policy"]) > 1000 * TOLERANCE


# ---- the moving average ---------------------------------------------------------------------------------------------


def recursion(weights: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """average <- DECAY average + (1 - DECAY) weights at each step but SKIPPED; before START the weights."""
    average = weights[0]
    for step, now in enumerate(weights[1:]):
        if step < START:
            average = now
        elif step != SKIPPED:
            average = {name: DECAY * average[name] + (1 - DECAY) * now[name] for name in now}
    return average


def largest(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    assert one.keys() == other.keys() and one
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


@pytest.mark.parametrize("ranks", (1, 2))
@pytest.mark.parametrize("name", AVERAGED)
def test_the_average_equals_a_float64_recursion_over_the_whole_weights(
    name: str, ranks: int, results: dict[int, Any]
) -> None:
    found = results[ranks][0]["average"][name]
    average = recursion(found["weights"])
    if name in FLOAT32:
        assert largest(found["inside"][0], average) < 1e-6
    else:
        for parameter, weights in found["inside"][0].items():  # in place it is rounded to bf16's 8 bits
            np.testing.assert_allclose(weights, average[parameter], rtol=2.0**-8, atol=1e-7)
    assert largest(found["weights"][-1], average) > 1e-3  # it is not the weights
    assert largest(found["weights"][START], average) > 1e-3  # nor those at its start
    assert largest(found["weights"][SKIPPED], found["weights"][SKIPPED + 1]) > 1e-3  # passing over counts


@pytest.mark.parametrize("ranks", (1, 2))
@pytest.mark.parametrize("name", FLOAT32)
def test_in_place_the_engine_answers_as_the_average_does(
    name: str, ranks: int, results: dict[int, Any], paths: dict[str, str]
) -> None:
    found = results[ranks][0]["average"][name]
    tokenizer = load_tokenizer(paths["gpt2"])
    model = load_causal_lm(paths["gpt2"], tokenizer, dtype=torch.float32)
    average = recursion(found["weights"])
    model.load_state_dict({name: torch.from_numpy(weights).float() for name, weights in average.items()})
    batch = collate_sft(tiny.random_examples(gradients.SFT_LENGTHS, tokenizer), tokenizer.pad_token_id)
    with torch.no_grad():
        expected = model(batch.input_ids, batch.attention_mask, batch.loss_mask)[0].numpy()
    for rank in range(ranks):
        own = results[ranks][rank]["average"][name]
        np.testing.assert_allclose(own["inside"][1], expected, atol=1e-4)
        assert np.abs(own["before"][1] - expected).max() > 0.01


@pytest.mark.parametrize("ranks", (1, 2))
@pytest.mark.parametrize("name", AVERAGED)
def test_afterwards_the_weights_are_back_bit_for_bit_and_training_goes_on(
    name: str, ranks: int, results: dict[int, Any]
) -> None:
    found = results[ranks][0]["average"][name]
    assert largest(found["before"][0], found["weights"][-1]) == 0
    assert largest(found["after"][0], found["before"][0]) == 0
    assert largest(found["last"], results[ranks][0]["alone"][name]) == 0
    assert largest(found["last"], found["after"][0]) > 1e-4
    for rank in range(ranks):
        own = results[ranks][rank]["average"][name]
        assert np.array_equal(own["after"][1], own["before"][1])


@pytest.mark.parametrize("name", AVERAGED)
def test_each_weight_is_averaged_once_over_the_ranks(name: str, results: dict[int, Any]) -> None:
    every = results[1][0]["average"][name]["names"]
    one, other = (results[2][rank]["average"][name]["names"] for rank in (0, 1))
    if name.startswith("zero3"):
        assert one == other == every  # a partition of each
    else:
        assert sorted(one + other) == every and abs(len(one) - len(other)) <= 1


@pytest.mark.parametrize("ranks", (1, 2))
@pytest.mark.parametrize("name", AVERAGED)
def test_a_rank_s_share_survives_its_state_dict(name: str, ranks: int, results: dict[int, Any]) -> None:
    assert all(results[ranks][rank]["average"][name]["restored"] for rank in range(ranks))


# ---- the critic's warm-up -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks, stage", [(1, 0), (2, 0), (2, 3)])
def test_while_the_critic_warms_up_the_actor_stands_still(ranks: int, stage: int, results: dict[int, Any]) -> None:
    found = results[ranks][0]["warmup"][stage]
    changed = {
        name: [largest(before, after) > 0 for before, after in zip(found[name][:-1], found[name][1:], strict=True)]
        for name in ("actor", "critic")
    }
    assert changed == {"actor": [False, True, True], "critic": [True, True, True]}
    warming, *others = found["metrics"]
    assert not any(name.startswith("policy/") and name != "policy/epochs" for name in warming)
    assert warming["policy/epochs"] == 2 and all("policy/loss" in metrics for metrics in others)
    assert found["steps"] == [(2, False), (3, False), (4, False), (5, False)]  # none of the warm-up


@pytest.mark.parametrize("ranks, stage", [(1, 0), (2, 0), (2, 3)])
def test_the_actor_s_schedule_starts_after_the_critic_s_warm_up_and_ends_with_the_run(
    ranks: int, stage: int, results: dict[int, Any]
) -> None:
    metrics = results[ranks][0]["warmup"][stage]["metrics"]
    settings = OptimizerSettings(**tiny.ADAM)

    def mean_rate(first: int, total: int) -> float:
        factors = [engine.schedule_factor(step, total, settings) for step in (first, first + 1)]
        return settings.learning_rate * sum(factors) / 2

    assert [m["value/learning_rate"] for m in metrics] == pytest.approx([mean_rate(k, 6) for k in (0, 2, 4)])
    assert [m["policy/learning_rate"] for m in metrics[1:]] == pytest.approx([mean_rate(k, 4) for k in (0, 2)])


# ---- the early stop -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", (0, 3))
def test_target_kl_is_compared_with_the_kl_over_all_ranks_and_stops_them_together(
    stage: int, results: dict[int, Any]
) -> None:
    ranks = [results[2][rank]["target_kl"][stage] for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    epochs = {name: found[0] for name, found in ranks[0].items()}
    # "over": one rank alone would go on. "under": one alone would stop. "later": the first epoch's KL is 0.
    assert epochs == {"over": 1, "under": 3, "later": 2}
    assert all(found[1] == found[0] for found in ranks[0].values())  # optimizer steps
    assert 0.01 < ranks[0]["under"][2] < 0.1 < np.expm1(-0.5) + 0.5


def test_target_kl_stops_one_rank_as_well(results: dict[int, Any]) -> None:
    found = results[1][0]["target_kl"][0]
    assert {name: epochs for name, (epochs, _, _) in found.items()} == {"over": 1, "under": 1, "later": 2}
