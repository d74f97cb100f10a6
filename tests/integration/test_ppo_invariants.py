"""What must hold in every iteration of PPO, checked through step 3's own functions on tiny models."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import step3_ppo.rollout
from step3_ppo.config import PPOConfig
from step3_ppo.rollout import rows_of_all_ranks
from tests.helpers import tiny
from tests.helpers.ppo_run import ODD, RESPONSE, Run
from tests.helpers.ranks import run_ranks
from tristage.batches import Experience
from tristage.errors import UserError


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, str]]:
    """{pad is EOS: YAML file}; the process is a group of one rank meanwhile."""
    folder = tmp_path_factory.mktemp("ppo")
    rows = tiny.write_rows(folder / "rows")
    actor = tiny.teach(tiny.write_model(folder / "actor"), rows["sft"])
    scorer = tiny.write_reward_model(folder / "scorer", actor)
    found = {}
    for pad_is_eos in (False, True):
        if pad_is_eos:
            actor = tiny.copy_with_pad_as_eos(actor, folder / "actor_pad_is_eos")
            scorer = tiny.copy_with_pad_as_eos(scorer, folder / "scorer_pad_is_eos")
        tiny.ppo_config(folder / str(pad_is_eos), actor, scorer, rows["prompts"])
        found[pad_is_eos] = str(folder / str(pad_is_eos) / "ppo.yaml")
    with tiny.one_rank():
        yield found


@pytest.fixture(scope="module")
def fresh(configs: dict[bool, str]) -> Run:
    """A run whose weights no test changes."""
    return Run(configs[False])


# ---- the first iteration --------------------------------------------------------------------------------------------


def test_before_the_first_update_the_ratio_is_one_and_the_kl_zero(configs: dict[bool, str]) -> None:
    run = Run(configs[False], "ppo.epochs=1", "ppo.minibatch=16", "ppo.clip=0.001", "rollout.temperature=0.8")
    experience, metrics = run.experience()
    run.check(experience)
    assert abs(metrics["objective/kl"]) < 1e-5 and abs(metrics["objective/kl_per_token"]) < 1e-6
    torch.testing.assert_close(experience.logprobs, experience.ref_logprobs, rtol=0, atol=1e-5)
    metrics = run.update(experience)  # one step, so every ratio is of the weights that sampled
    assert metrics["policy/ratio"] == 1 and metrics["policy/approx_kl"] == 0
    assert metrics["policy/clipfrac"] == metrics["value/clipfrac"] == 0
    assert run.experience(2)[1]["objective/kl"] != 0


def test_with_half_precision_single_tokens_may_round_and_not_all(fresh: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A logit of 20 has steps of 0.125 in bf16."""
    experience, _ = fresh.experience()
    logprobs = experience.logprobs.clone()
    logprobs[0, 0] += 0.3
    one = dataclasses.replace(experience, logprobs=logprobs)
    every = dataclasses.replace(experience, logprobs=experience.logprobs + 0.3)
    for precision, refused in (("float32", (one, every)), ("bf16", (every,)), ("fp16", (every,))):
        monkeypatch.setattr(fresh, "settings", fresh.settings.model_copy(update={"precision": precision}))
        for changed in refused:
            with pytest.raises(UserError, match="log-ratio is .* both should be 0"):
                fresh.check(changed)
    fresh.check(one)


def test_dropout_left_on_fails_the_first_check(configs: dict[bool, str]) -> None:
    run = Run(configs[False])
    run.engines.actor.module.model.model.norm = torch.nn.Sequential(
        run.engines.actor.module.model.model.norm, torch.nn.Dropout(0.1)
    )
    experience, _ = run.experience()
    with pytest.raises(UserError, match="log-ratio is .* both should be 0"):
        run.check(experience)


def test_scoring_at_another_temperature_fails_the_first_check(fresh: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    score = step3_ppo.rollout._score_policy
    warmer = fresh.settings.model_copy(
        update={"rollout": fresh.settings.rollout.model_copy(update={"temperature": 1.1})}
    )

    def score_warmer(engine: Any, sequences: Any, _: PPOConfig, *arguments: Any, **options: Any) -> Any:
        return score(engine, sequences, warmer, *arguments, **options)

    monkeypatch.setattr(step3_ppo.rollout, "_score_policy", score_warmer)
    monkeypatch.setattr(step3_ppo.rollout, "old_logprobs", lambda *_: "forward")
    experience, metrics = fresh.experience()
    assert abs(metrics["objective/kl"]) < 1e-5  # actor and reference are wrong alike
    with pytest.raises(UserError, match="static differ from the training forward's by .*rollout.backend to padded"):
        fresh.check(experience)


def test_another_reference_than_the_actor_fails_the_first_check(configs: dict[bool, str]) -> None:
    run = Run(configs[False])
    with torch.no_grad():
        run.engines.reference.module.model.model.norm.weight.mul_(1.1)
    experience, _ = run.experience()
    with pytest.raises(UserError, match="KL to the reference"):
        run.check(experience)


def test_log_probabilities_that_are_not_numbers_fail_the_first_check(configs: dict[bool, str]) -> None:
    run = Run(configs[False])
    experience, _ = run.experience()
    with torch.no_grad():
        run.engines.actor.module.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="before the first update"):
        run.check(experience)


# ---- rewards and advantages -----------------------------------------------------------------------------------------


@torch.no_grad()
def scores_one_by_one(run: Run, experience: Experience) -> torch.Tensor:
    """transformers' own reward model on each unpadded dialogue: its number at the last token."""
    model = AutoModelForSequenceClassification.from_pretrained(run.settings.reward.model, dtype=torch.float32).eval()
    sequences = experience.sequences
    dialogues = [ids[mask] for ids, mask in zip(sequences.input_ids, sequences.attention_mask, strict=True)]
    return torch.stack([model.score(model.model(ids[None]).last_hidden_state)[0, -1, 0] for ids in dialogues])


@pytest.mark.parametrize("pad_is_eos", (False, True))
def test_the_score_lands_on_the_eos_token(pad_is_eos: bool, configs: dict[bool, str]) -> None:
    """Without KL and with lambda 1, returns are the discounted score: whole on the last real token, half before it."""
    run = Run(configs[pad_is_eos], "ppo.kl_coef=0", "ppo.gamma=0.5", "ppo.lam=1", "ppo.reward_clip=1.0")
    assert (run.tokenizer.pad_token_id == run.tokenizer.eos_token_id) is pad_is_eos
    experience, metrics = run.experience()
    scores = scores_one_by_one(run, experience)
    assert metrics["objective/score"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert metrics["objective/score_clipfrac"] == pytest.approx((scores.abs() > 1).float().mean().item())
    ended = 0
    for row, score in enumerate(scores.clamp(-1, 1).tolist()):
        length = int(experience.mask[row].sum())
        expected = [score * 0.5 ** (length - 1 - t) for t in range(length)] + [0.0] * (RESPONSE - length)
        assert experience.returns[row].tolist() == pytest.approx(expected, abs=1e-5)
        responses = experience.sequences.responses[row].tolist()
        if run.tokenizer.eos_token_id in responses:
            assert responses.index(run.tokenizer.eos_token_id) == length - 1
            ended += 1
    assert ended == round(metrics["rollout/eos_rate"] * len(scores)) > 0


def test_a_stop_token_counts_as_an_ending_in_score_penalty_rate_and_bootstrap(configs: dict[bool, str]) -> None:
    """Without KL and with lambda 1 and gamma 1, a return is the score, less the penalty where nothing ended it."""
    plain = Run(configs[False]).experience()[0].sequences
    common = int(plain.responses[plain.response_mask & (plain.responses != plain.stop_ids[0])].mode().values)
    words = ["ppo.kl_coef=0", "ppo.lam=1", "ppo.gamma=1", "ppo.missing_eos_penalty=2", "ppo.reward_clip=null"]
    run = Run(configs[False], *words, "ppo.bootstrap=true", f"rollout.stop_token_ids=[{common}]")
    experience, metrics = run.experience()
    sequences, scores = experience.sequences, scores_one_by_one(run, experience)
    ended = 0
    for row, score in enumerate(scores.tolist()):
        ids = sequences.responses[row][sequences.response_mask[row]].tolist()
        ends = [place for place, id in enumerate(ids) if id in (common, run.tokenizer.eos_token_id)]
        assert ends in ([], [len(ids) - 1])
        ended += bool(ends)
        if ends:  # the return holds neither a penalty nor the value of a last state
            assert float(experience.returns[row][len(ids) - 1]) == pytest.approx(score, abs=1e-5)
        else:
            assert float(experience.returns[row][len(ids) - 1]) != pytest.approx(score, abs=0.1)
    assert metrics["rollout/eos_rate"] == pytest.approx(ended / len(scores)) and ended > plain.ended.sum()
    assert any(common in sequences.responses[row].tolist() for row in range(len(scores)))


def test_the_kl_penalty_is_on_every_real_token(configs: dict[bool, str]) -> None:
    run = Run(configs[False], "ppo.kl_coef=0.3", "ppo.gamma=1.0", "ppo.lam=1", "ppo.epochs=1")
    run.update(run.experience()[0])
    experience, metrics = run.experience(2)
    kl = (experience.logprobs - experience.ref_logprobs) * experience.mask
    scores = scores_one_by_one(run, experience).clamp(-5, 5)
    to_come = kl.flip(1).cumsum(1).flip(1)  # of this token and those after it
    expected = (scores.unsqueeze(1) - 0.3 * to_come) * experience.mask
    torch.testing.assert_close(experience.returns, expected, rtol=0, atol=2e-5)
    assert metrics["objective/kl"] == pytest.approx(kl.sum(1).mean().item(), abs=1e-5)
    assert kl.abs().sum() > 0.01


def test_values_are_those_of_the_state_before_each_token(fresh: Run) -> None:
    experience, _ = fresh.experience()
    model, sequences = fresh.engines.critic.module.model, experience.sequences
    with torch.no_grad():
        for row in range(4):
            ids = sequences.input_ids[row][sequences.attention_mask[row]][None]
            start = int(sequences.prompt_mask[row].sum())
            values = model.score(model.model(ids).last_hidden_state)[0, start - 1 : -1, 0]
            torch.testing.assert_close(experience.values[row][experience.mask[row]], values, rtol=0, atol=1e-5)


def test_experience_does_not_depend_on_the_micro_batch(fresh: Run, configs: dict[bool, str]) -> None:
    expected, _ = fresh.experience()
    found, _ = Run(configs[False], "ppo.micro_batch=8", "rollout.rows_at_once=3").experience()
    assert torch.equal(found.sequences.input_ids, expected.sequences.input_ids)
    assert torch.equal(found.mask, expected.mask)
    for name in ("logprobs", "ref_logprobs", "values", "advantages", "returns"):
        ours, theirs = getattr(found, name)[found.mask], getattr(expected, name)[found.mask]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


# ---- awkward responses ----------------------------------------------------------------------------------------------


def answer_with(run: Run, monkeypatch: pytest.MonkeyPatch, lengths: list[int]) -> None:
    """Rollouts whose row b has lengths[b % n] tokens, the last one EOS; a length above RESPONSE has no EOS at all."""
    generate, eos, pad = run.rollouts.generate, run.tokenizer.eos_token_id, run.tokenizer.pad_token_id

    def generate_lengths(request: Any, sampling: Any) -> Any:
        batch = generate(request, sampling)
        start = batch.input_ids.shape[1] - RESPONSE
        for row in range(len(batch.input_ids)):
            length = lengths[row % len(lengths)]
            ids = [10 + (row + t) % 50 for t in range(length - 1)] + [eos] if length else []
            kept = min(length, RESPONSE)
            batch.input_ids[row, start:] = torch.tensor((ids + [pad] * RESPONSE)[:RESPONSE])
            batch.attention_mask[row, start:] = torch.arange(RESPONSE) < kept
        batch.logprobs = batch.entropy = None  # not sampled: the actor's forward says what these tokens are worth
        return batch

    monkeypatch.setattr(run.rollouts, "generate", generate_lengths)


@pytest.mark.parametrize("pad_is_eos", (False, True))
@pytest.mark.parametrize("lengths", [[1], [RESPONSE + 1], [1, RESPONSE, RESPONSE + 1, 2]])
def test_shortest_and_longest_responses_survive_an_iteration(
    lengths: list[int], pad_is_eos: bool, configs: dict[bool, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(configs[pad_is_eos])
    answer_with(run, monkeypatch, lengths)
    experience, metrics = run.experience()
    kept = [min(length, RESPONSE) for length in lengths]
    assert metrics["rollout/length"] == pytest.approx(sum(kept) / len(kept))
    assert metrics["rollout/eos_rate"] == pytest.approx(sum(n <= RESPONSE for n in lengths) / len(lengths))
    run.check(experience)
    metrics |= run.update(experience)
    assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values()), metrics
    assert metrics["policy/grad_norm"] > 0 and metrics["value/grad_norm"] > 0
    for engine in (run.engines.actor, run.engines.critic):
        assert all(parameter.isfinite().all() for parameter in engine.module.parameters())
    again, _ = run.experience(2)
    assert not torch.equal(again.logprobs, again.ref_logprobs)


def test_one_response_token_is_enough_for_a_run(configs: dict[bool, str]) -> None:
    run = Run(configs[False], "rollout.max_response_tokens=1")
    experience, metrics = run.experience()
    assert experience.mask.all() and experience.mask.shape == (16, 1)
    run.check(experience)
    metrics |= run.update(experience)
    assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values()), metrics


# ---- where the old log-probabilities come from ----------------------------------------------------------------------


@pytest.mark.parametrize("words, origin", [
    ([], "sampler"),
    (["ppo.epochs=1", "ppo.minibatch=16"], "update"),
    (["precision=bf16"], "forward"),
    (["precision=bf16", "ppo.epochs=1", "ppo.minibatch=16"], "update"),
    (["rollout.backend=padded"], "sampler"),
    (["critic=null", "value_head.coef=0.1"], "forward"),
])  # fmt: skip
def test_old_logprobs_cost_a_forward_only_where_they_must(
    words: list[str], origin: str, configs: dict[bool, str]
) -> None:
    run = Run(configs[False], *words)
    forwards = []
    hook = run.engines.actor.module.register_forward_pre_hook(lambda *_: forwards.append(1))
    experience, _ = run.experience()
    hook.remove()
    assert (len(forwards) > 0) is (origin == "forward")
    assert experience.updates_once is (origin == "update")
    if origin == "update":
        assert run.update(experience)["policy/ratio"] == 1


@pytest.mark.parametrize("steps", [["ppo.epochs=2"], ["ppo.epochs=1", "ppo.minibatch=16"]])
def test_training_is_the_same_wherever_they_come_from(
    steps: list[str], configs: dict[bool, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for forward in (False, True):
        if forward:
            monkeypatch.setattr(step3_ppo.rollout, "old_logprobs", lambda *_: "forward")
        run = Run(configs[False], *steps)
        metrics = []
        for iteration in (1, 2):
            experience, made = run.experience(iteration)
            metrics.append(made | run.update(experience, iteration))
        weights = torch.cat([p.detach().flatten() for p in run.engines.actor.module.parameters()])
        found.append((metrics, experience, weights))
    (own, ours, here), (theirs, expected, there) = found
    assert torch.equal(ours.sequences.input_ids, expected.sequences.input_ids)
    torch.testing.assert_close(ours.logprobs, expected.logprobs, rtol=0, atol=2e-5)
    for one, other in zip(own, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=2e-5)
    # Adam divides the gradient by its size: where that is rounding alone, one step may go either way.
    assert ((here - there).abs() > 1e-5).float().mean() < 0.01


# ---- micro-batches by tokens ----------------------------------------------------------------------------------------


def test_micro_batches_by_tokens_train_the_same(configs: dict[bool, str]) -> None:
    found = []
    for words in (["ppo.micro_batch=4"], ["ppo.micro_batch=null", "ppo.micro_batch_tokens=90"]):
        run = Run(configs[False], *words)
        sizes = []
        hook = run.engines.actor.module.register_forward_pre_hook(lambda _, args, to=sizes: to.append(len(args[0])))
        experience, metrics = run.experience()
        metrics |= run.update(experience)
        hook.remove()
        found.append((metrics, set(sizes)))
    (rows, same), (tokens, several) = found
    assert same == {4} and len(several) > 1
    assert tokens == pytest.approx(rows, rel=1e-3, abs=1e-5)


# ---- epochs ---------------------------------------------------------------------------------------------------------


def test_the_second_epoch_sees_other_ratios_than_one(configs: dict[bool, str]) -> None:
    found = {}
    for epochs in (1, 2):
        run = Run(configs[False], f"ppo.epochs={epochs}", "ppo.minibatch=16")
        found[epochs] = run.update(run.experience()[0])
    assert found[1]["policy/approx_kl"] < 1e-9  # its one step starts from the weights that sampled
    assert found[2]["policy/approx_kl"] > 1e-6
    assert abs(found[2]["policy/ratio"] - 1) > 1e-6


# ---- two ranks ------------------------------------------------------------------------------------------------------


def on_two_ranks(rank: int, config: str) -> dict[str, Any]:
    run = Run(config, *ODD)
    experience, metrics = run.experience()
    run.check(experience)
    evaluated = run.evaluate()
    own = rows_of_all_ranks(run.batch())(torch.full((len(run.batch().draw_index),), rank))
    return {
        "advantages": experience.advantages.numpy(),
        "mask": experience.mask.numpy(),
        "rank_of_row": own.numpy(),
        "metrics": evaluated.metrics,
        "samples": evaluated.samples,
        "update": run.update(experience),
    }


@pytest.fixture(scope="module")
def two_ranks(configs: dict[bool, str]) -> list[dict[str, Any]]:
    return run_ranks(2, on_two_ranks, configs[False], timeout=150)


def test_advantages_are_white_over_the_real_tokens_of_all_ranks(
    two_ranks: list[dict[str, Any]], fresh: Run
) -> None:
    first, second = two_ranks
    assert (first["advantages"] == second["advantages"]).all()
    advantages, mask = first["advantages"].astype("float64"), first["mask"]
    assert advantages[mask].mean() == pytest.approx(0, abs=1e-6)
    assert advantages[mask].var() == pytest.approx(1, abs=1e-5)
    assert (advantages[~mask] == 0).all() and (~mask).any()
    by_rank = [advantages[first["rank_of_row"] == rank][mask[first["rank_of_row"] == rank]] for rank in (0, 1)]
    assert [len(own) > 0 for own in by_rank] == [True, True]
    assert max(abs(own.mean()) for own in by_rank) > 0.01  # whitening on each rank would be something else
    alone, _ = fresh.experience()
    torch.testing.assert_close(torch.from_numpy(first["advantages"]), alone.advantages, rtol=0, atol=2e-5)


def test_every_heldout_prompt_counts_once_on_any_number_of_ranks(
    two_ranks: list[dict[str, Any]], configs: dict[bool, str]
) -> None:
    run = Run(configs[False], *ODD)
    assert len(run.ppo.inputs.heldout) == 7
    own = run.evaluate()
    found = two_ranks[0]
    prompts = [sample["prompt"] for sample in found["samples"]]
    assert len(prompts) == len(set(prompts)) == len(run.ppo.inputs.heldout)
    assert [sample["response"] for sample in own.samples] == [sample["response"] for sample in found["samples"]]
    assert found["metrics"] == pytest.approx(own.metrics, rel=1e-5, abs=1e-6)
    scores = torch.tensor([sample["score"] for sample in found["samples"]])
    assert found["metrics"]["objective/score"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert found["metrics"]["objective/score_std"] == pytest.approx(scores.std(correction=0).item(), abs=1e-5)


def test_all_ranks_report_the_same_update(two_ranks: list[dict[str, Any]]) -> None:
    assert two_ranks[0]["update"] == two_ranks[1]["update"]
