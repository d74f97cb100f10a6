"""One iteration of PPO agrees with DeepSpeed-Chat's formulas, and its preset has DeepSpeed-Chat's constants.

The formulas are written anew from their description, in float64 and with its slices: rows of P + R tokens, log-
probabilities and values [B,P+R-1] whose column t speaks of token t+1, responses from column P-1 on. Rows are those
where it does what it means to: prompts without padding, responses at their full length. There its slot for the score
(the column after the last token that is no padding, cut off at the row's end) is that of the last token, and its masks
are True on every response token. Two tests say how slot and masks differ on shorter rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from step3_ppo.config import PPOConfig
from step3_ppo.engines import Engines
from step3_ppo.rollout import Control, make_experience, sample_responses, score_responses
from step3_ppo.update import ppo_update
from tests.helpers import tiny
from tristage import dist
from tristage.algo.masking import response_mask
from tristage.algo.ppo import shaped_rewards
from tristage.batches import Experience, PromptBatch
from tristage.config import load_config, read_deepspeed_json
from tristage.data.sources import resolve_preset
from tristage.models.causal_lm import load_causal_lm
from tristage.models.reward_model import load_reward_model
from tristage.models.tokenizer import load_tokenizer

PRESET = tiny.REPO / "configs/presets/deepspeed_chat_ppo.yaml"
B, P, R = 6, 5, 7
CPU = torch.device("cpu")
TOLERANCE = 1e-6

# Its constants, which no option changes.
KL_CTL, CLIP_REWARD, CLIP_RANGE, CLIP_RANGE_VALUE, GAMMA, LAM = 0.1, 5.0, 0.2, 0.2, 1.0, 0.95


# ---- DeepSpeed-Chat's formulas --------------------------------------------------------------------------------------


def gather_logprobs(policy: Any, seq: Tensor) -> Tensor:
    """seq [B,P+R] -> [B,P+R-1]."""
    logits = policy(input_ids=seq, attention_mask=torch.ones_like(seq)).logits[:, :-1]
    return torch.log_softmax(logits, -1).gather(-1, seq[:, 1:, None])[..., 0]


def forward_value(model: Any, seq: Tensor) -> Tensor:
    """seq [B,P+R] -> [B,P+R]."""
    hidden = model.base_model(input_ids=seq, attention_mask=torch.ones_like(seq)).last_hidden_state
    return model.score(hidden)[..., 0]


def add_rewards(scores: Tensor, logp: Tensor, ref_logp: Tensor, action_mask: Tensor, start: int) -> Tensor:
    """Rewards [B,P+R-1]: the KL penalty, and the score in the last column of each row's slice start:end."""
    rewards = -KL_CTL * (logp - ref_logp)
    ends = start + action_mask[:, start:].sum(1) + 1
    for j in range(len(rewards)):
        rewards[j, start : ends[j]][-1] += scores[j].clamp(-CLIP_REWARD, CLIP_REWARD)
        rewards[j, ends[j] :] = 0
    return rewards


def advantages_and_returns(values: Tensor, rewards: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """(advantages [B,R], returns [B,R]), not whitened."""
    last, columns = torch.zeros(len(values), dtype=values.dtype), []
    length = rewards.shape[1]
    for t in reversed(range(start, length)):
        following = values[:, t + 1] if t < length - 1 else 0.0
        delta = rewards[:, t] + GAMMA * following - values[:, t]
        last = delta + GAMMA * LAM * last
        columns.append(last)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + values[:, start:]


def actor_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    ratio = ((logp - old_logp) * mask).exp()
    worse = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE))
    return (worse * mask).sum() / mask.sum()


def critic_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    clipped = values.clamp(old_values - CLIP_RANGE_VALUE, old_values + CLIP_RANGE_VALUE)
    return 0.5 * (torch.max((values - returns) ** 2, (clipped - returns) ** 2) * mask).sum() / mask.sum()


# ---- one iteration of each ------------------------------------------------------------------------------------------


class PlainEngine(nn.Module):
    """A module with what step 3 asks of an engine; its gradients stay where backward leaves them."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.device = module, CPU

    def forward(self, *arguments: Any) -> Any:
        return self.module(*arguments)

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()

    def step(self) -> None:
        pass

    def _take_model_step(self, lr_kwargs: None) -> None:
        pass

    def zero_optimization(self) -> bool:
        return False

    def fp16_enabled(self) -> bool:
        return False

    def get_lr(self) -> list[float]:
        return [0.0]

    def get_global_grad_norm(self) -> float:
        return 0.0

    def was_step_applied(self) -> bool:
        return True


@dataclasses.dataclass
class Iteration:
    """What both sides made of the same rows and weights; `theirs` by name, in float64."""

    ours: Experience
    metrics: dict[str, float]
    losses: dict[str, float]
    gradients: dict[str, dict[str, Tensor]]
    theirs: dict[str, Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Four different models; the actor and critic that the update finds have moved far enough for the clips to cut."""
    base = tmp_path_factory.mktemp("deepspeed_chat")
    found = {"actor": tiny.write_model(base / "actor", "gpt2", gain=2.0)}
    for name, seed in (("reward", 7), ("critic", 8)):
        found[name] = tiny.write_reward_model(base / name, found["actor"], seed)
    for name, auto, noise in (
        ("reference", AutoModelForCausalLM, 0.01), ("moved_actor", AutoModelForCausalLM, 0.02),
        ("moved_critic", AutoModelForSequenceClassification, 0.02),
    ):  # fmt: skip
        source = found["critic" if name == "moved_critic" else "actor"]
        found[name] = tiny.copy_model(source, base / name)
        model = auto.from_pretrained(source)
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
        model.save_pretrained(found[name])
    scorer = AutoModelForSequenceClassification.from_pretrained(found["reward"])
    with torch.no_grad():
        scorer.score.weight.mul_(8)  # scores on both sides of the clip
    scorer.save_pretrained(found["reward"])
    return found


@pytest.fixture(scope="module")
def settings() -> PPOConfig:
    words = [f"rollout.prompts={B}", f"ppo.minibatch={B}", "ppo.micro_batch=2", f"rollout.max_response_tokens={R}"]
    return load_config(PPOConfig, ["--config", str(PRESET), "precision=float32", *words])


@pytest.fixture(scope="module")
def iteration(folders: dict[str, str], settings: PPOConfig) -> Iterator[Iteration]:
    tokenizer = load_tokenizer(folders["actor"])
    ids = torch.randint(5, len(tokenizer), (B, P + R), generator=torch.Generator().manual_seed(1))
    with tiny.one_rank():
        yield run_both(folders, settings, tokenizer, ids)


def run_both(folders: dict[str, str], settings: PPOConfig, tokenizer: Any, ids: Tensor) -> Iteration:
    """Both sides in float64 (but for our log-softmax and values, which are float32 always)."""

    def engine(name: str) -> PlainEngine:
        load = load_reward_model if name in ("critic", "reward", "moved_critic") else load_causal_lm
        return PlainEngine(load(folders[name], tokenizer, dtype=torch.float64))

    engines = Engines(engine("actor"), engine("critic"), engine("reference"), engine("reward"))
    mask = torch.ones_like(ids).bool()  # without entropy the actor's forward gives the log-probabilities
    sampled = SimpleNamespace(input_ids=ids, attention_mask=mask, logprobs=None, entropy=None, weights_version=0)
    rollouts: Any = SimpleNamespace(generate=lambda request, sampling: sampled, stop_ids=(tokenizer.eos_token_id,))
    prompts = PromptBatch(ids[:, :P], sampled.attention_mask[:, :P], torch.arange(B), torch.ones(B).bool())
    sampled = sample_responses(rollouts, prompts, settings.rollout, settings.seed, 1)
    own = score_responses(engines, tokenizer, sampled, prompts, settings, [])
    ours, metrics = make_experience(engines, own, prompts, settings, Control.of(settings.ppo))
    moved = Engines(engine("moved_actor"), engine("moved_critic"), None, None)
    losses, _ = ppo_update(moved, ours, 1, settings, settings.plan(dist.world_size()))
    gradients = {
        name: {key: p.grad for key, p in trained.module.model.named_parameters() if p.grad is not None}
        for name, trained in (("actor", moved.actor), ("critic", moved.critic))
    }
    return Iteration(ours, metrics, losses, gradients, chat_iteration(folders, ids))


def chat_iteration(folders: dict[str, str], seq: Tensor) -> dict[str, Any]:
    def policy(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float64).eval()

    def scorer(name: str) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(folders[name], dtype=torch.float64).eval()

    start, action_mask = P - 1, torch.ones(B, P + R - 1).bool()  # nothing is padding
    with torch.no_grad():
        logp, ref_logp = gather_logprobs(policy("actor"), seq), gather_logprobs(policy("reference"), seq)
        values = forward_value(scorer("critic"), seq)[:, :-1]
        scores = forward_value(scorer("reward"), seq)[:, -1]  # before the first padding, and there is none
    rewards = add_rewards(scores, logp, ref_logp, action_mask, start)
    advantages, returns = advantages_and_returns(values, rewards, start)
    actor, critic, mask = policy("moved_actor"), scorer("moved_critic"), action_mask[:, start:]
    new_logp, new_values = gather_logprobs(actor, seq)[:, start:], forward_value(critic, seq)[:, :-1][:, start:]
    losses = {
        "actor": actor_loss(new_logp, logp[:, start:], advantages, mask),
        "critic": critic_loss(new_values, values[:, start:], returns, mask),
    }
    for loss in losses.values():
        loss.backward()
    return {
        "logprobs": logp[:, start:], "ref_logprobs": ref_logp[:, start:], "values": values[:, start:],
        "scores": scores, "rewards": rewards[:, start:], "advantages": advantages, "returns": returns,
        "ratio": (new_logp - logp[:, start:]).exp().detach(), "moved": (new_values - values[:, start:]).detach(),
        "losses": {name: loss.item() for name, loss in losses.items()},
        "gradients": {
            name: {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
            for name, model in (("actor", actor), ("critic", critic))
        },
    }  # fmt: skip


# ---- claims ---------------------------------------------------------------------------------------------------------


def test_the_rows_reach_every_clip(iteration: Iteration) -> None:
    theirs = iteration.theirs
    cut = theirs["scores"].abs() > CLIP_REWARD
    assert cut.any() and not cut.all()
    for far in ((theirs["ratio"] - 1).abs() > CLIP_RANGE, theirs["moved"].abs() > CLIP_RANGE_VALUE):
        assert far.any() and not far.all()
    assert (theirs["logprobs"] - theirs["ref_logprobs"]).abs().max() > 0.1
    assert iteration.metrics["objective/score_clipfrac"] == pytest.approx(cut.double().mean().item())


@pytest.mark.parametrize("name", ["logprobs", "ref_logprobs", "values", "advantages", "returns"])
def test_the_experience_is_deepspeed_chat_s(name: str, iteration: Iteration) -> None:
    torch.testing.assert_close(
        getattr(iteration.ours, name).double(), iteration.theirs[name], atol=TOLERANCE, rtol=TOLERANCE
    )


def test_scores_and_rewards_are_deepspeed_chat_s(iteration: Iteration, settings: PPOConfig) -> None:
    ours, theirs, ppo = iteration.ours, iteration.theirs, settings.ppo
    assert iteration.metrics["objective/score"] == pytest.approx(theirs["scores"].mean().item(), rel=TOLERANCE)
    rewards = shaped_rewards(
        theirs["scores"], ours.logprobs, ours.ref_logprobs, ours.mask, ppo.kl_coef, ppo.reward_clip, ppo.kl_kind
    )
    torch.testing.assert_close(rewards.double(), theirs["rewards"], atol=TOLERANCE, rtol=TOLERANCE)
    total = theirs["rewards"].sum(dim=1).mean().item()
    assert iteration.metrics["objective/reward"] == pytest.approx(total, abs=TOLERANCE)


@pytest.mark.parametrize("ours, theirs", [("policy", "actor"), ("value", "critic")])
def test_losses_and_their_gradients_are_deepspeed_chat_s(ours: str, theirs: str, iteration: Iteration) -> None:
    expected = iteration.theirs["losses"][theirs]
    assert iteration.losses[f"{ours}/loss"] == pytest.approx(expected, abs=TOLERANCE, rel=TOLERANCE)
    gradients = iteration.theirs["gradients"][theirs]
    assert gradients and gradients.keys() == iteration.gradients[theirs].keys()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (iteration.gradients[theirs][name] - gradient).abs().max() < TOLERANCE * largest, name


# ---- the slot of the score on shorter rows --------------------------------------------------------------------------


def score_slots(mask: Tensor) -> list[int]:
    """Response slots of the scores that DeepSpeed-Chat's slices give, from its mask of what is no padding."""
    nothing = torch.zeros(mask.shape[0], mask.shape[1] - 1)
    rewards = add_rewards(torch.ones(len(mask)), nothing, nothing, mask[:, 1:], P - 1)
    return rewards[:, P - 1 :].argmax(dim=1).tolist()


EOS, PAD, WORD = 1, 0, 9
# Responses of 3 and 1 tokens with their EOS, and one cut off at the limit; slots of the EOS or the last token.
LAST = [2, 0, R - 1]


def our_slots(ids: Tensor) -> list[int]:
    mask = response_mask(ids[:, P:], EOS)
    return shaped_rewards(torch.ones(3), torch.zeros(3, R), torch.zeros(3, R), mask, 0.0).argmax(dim=1).tolist()


def short_rows(pad: int) -> Tensor:
    ids = torch.full((3, P + R), WORD)
    for row, last in zip(ids[:2], LAST[:2], strict=True):
        row[P + last] = EOS
        row[P + last + 1 :] = pad
    return ids


def test_where_padding_is_eos_the_score_stands_on_the_eos_as_ours_but_its_losses_leave_that_slot_out() -> None:
    ids = short_rows(pad=EOS)
    mask = ids != EOS
    assert score_slots(mask) == our_slots(ids) == LAST
    for row, last in enumerate(LAST[:2]):
        assert not mask[row, P + last]
    assert mask[2, P:].all()


def test_where_padding_is_not_eos_the_score_stands_one_slot_later_and_outside_the_losses() -> None:
    ids = short_rows(pad=PAD)
    mask = ids != PAD
    assert score_slots(mask) == [LAST[0] + 1, LAST[1] + 1, LAST[2]] and our_slots(ids) == LAST
    for row, last in enumerate(LAST[:2]):
        assert mask[row, P + last] and not mask[row, P + last + 1]


# ---- the preset -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def preset() -> PPOConfig:
    return load_config(PPOConfig, ["--config", str(PRESET)])


def test_the_preset_has_deepspeed_chat_s_constants(preset: PPOConfig) -> None:
    ppo = preset.ppo
    assert (ppo.kl_coef, ppo.reward_clip) == (KL_CTL, CLIP_REWARD)
    assert (ppo.clip, ppo.value_clip) == (CLIP_RANGE, CLIP_RANGE_VALUE)
    assert (ppo.gamma, ppo.lam, ppo.epochs, ppo.advantage, ppo.whiten) == (GAMMA, LAM, 1, "gae", False)
    assert (ppo.kl_kind, ppo.kl_in, ppo.adaptive_kl_target, ppo.bootstrap) == ("k1", "reward", None, False)
    assert (ppo.value_loss, ppo.clip_high, ppo.dual_clip, ppo.target_kl, ppo.entropy_coef) == (
        "clipped", None, None, None, 0
    )  # fmt: skip
    assert (ppo.missing_eos_penalty, ppo.scale_reward, preset.reward.score) == (0, False, "last")
    assert preset.critic is not None and preset.ema is not None
    assert (preset.ema.decay, preset.ema.start, preset.pretraining) == (0.992, 0, None)
    rates = [preset.actor.optimizer.learning_rate, preset.critic.optimizer.learning_rate]
    assert rates == [9.65e-6, 5e-6]
    for optimizer in (preset.actor.optimizer, preset.critic.optimizer):
        assert (optimizer.schedule, optimizer.warmup_steps, optimizer.weight_decay) == ("cosine", 100, 0)
        assert (optimizer.betas, optimizer.eps, optimizer.clip_norm) == ((0.9, 0.95), 1e-8, 1)
    assert (preset.max_prompt_tokens, preset.rollout.max_response_tokens, preset.rollout.samples) == (256, 256, 1)
    assert (preset.rollout.temperature, preset.rollout.top_p, preset.rollout.top_k) == (1, 1, 0)
    assert (preset.data.data_split, preset.seed, preset.data.split_seed) == ((2, 4, 4), 1234, 1234)


def test_the_preset_is_one_step_an_iteration_of_four_rows_on_each_of_eight_ranks(preset: PPOConfig) -> None:
    plan = preset.plan(8)
    assert (plan.micro_batch, plan.accumulation, plan.global_batch) == (4, 1, preset.responses)
    assert preset.total_steps == preset.iterations


def test_the_files_that_the_preset_names_are_there(
    preset: PPOConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stages = [
        read_deepspeed_json(getattr(preset, name).deepspeed, preset)["zero_optimization"]["stage"]
        for name in ("actor", "critic", "reference", "reward")
    ]
    assert stages == [2, 2, 0, 0]
    sources = [resolve_preset(source, preset) for source in (*preset.data.train, *preset.data.heldout)]
    assert [(source.path, source.split) for source in sources] == [
        ("Dahoas/rm-static", "train"), ("Dahoas/rm-static", "test")
    ]  # fmt: skip


def test_the_preset_spells_out_every_setting_of_the_algorithm(preset: PPOConfig) -> None:
    unset = set(type(preset.ppo).model_fields) - preset.ppo.model_fields_set
    # of choices that it does not make
    assert unset == {"huber_delta", "adaptive_kl_horizon", "micro_batch_tokens"}
