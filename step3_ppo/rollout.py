"""From prompts to experience: sample, score, shape rewards, estimate advantages.

P prompt columns, R response columns, B rows of this rank, N = ranks * B rows of the iteration. From `score_responses`
on everything is response-aligned, [B,R], with one mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from step3_ppo.config import PPOConfig, PPOSettings, RolloutSettings
from step3_ppo.engines import Engines
from step3_ppo.rewards import RewardTerm, function_scores, pooled, retokenized_scores
from tristage import dist
from tristage.algo.masking import correlation, masked_mean, masked_moments, masked_sum, whiten
from tristage.algo.ppo import (
    KLController,
    RunningMoments,
    explained_variance,
    gae,
    group_advantages,
    importance_ratio,
    kl_estimate,
    shaped_rewards,
)
from tristage.batches import Experience, PromptBatch, Sampled, Sequences
from tristage.data.collate import collate_prompts
from tristage.data.loader import WIDTH, fill
from tristage.data.store import Rows
from tristage.models.lora import adapters_off
from tristage.models.reward_model import last_token_scores
from tristage.models.rows import unknown_attention
from tristage.rollout import (
    PaddedRollout,
    RolloutBackend,
    SamplingConfig,
    SeededRequest,
    StaticRollout,
    VllmRollout,
    row_uniforms,
)


class NotFiniteError(Exception):
    """A score, log-probability or value of the rollout is not finite: what, and the rows of all ranks it is in."""

    def __init__(self, what: str, rows: list[int]) -> None:
        super().__init__(f"{what} of rows {rows}")
        self.what, self.rows = what, rows

    def batches(self, names: list[str]) -> list[dict[str, Any]]:
        """What health notes of it: `names` of all rows -> those that are not finite, on rank 0 alone."""
        return [{"rows": [names[row] for row in self.rows]}] if dist.is_main() else []


@dataclass
class Control:
    """What carries over from one iteration to the next in addition to the weights; part of every checkpoint."""

    kl: KLController
    scores: RunningMoments = field(default_factory=RunningMoments)  # of `ppo.scale_reward`
    terms: dict[str, RunningMoments] = field(default_factory=dict)  # of functions with `normalize`, by name

    @classmethod
    def of(cls, ppo: PPOSettings) -> Control:
        return cls(KLController(ppo.kl_coef, ppo.adaptive_kl_target, ppo.adaptive_kl_horizon))

    def state_dict(self) -> dict[str, Any]:
        terms = {name: moments.state_dict() for name, moments in self.terms.items()}
        return {"kl": self.kl.state_dict(), "scores": self.scores.state_dict(), "terms": terms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kl.load_state_dict(state["kl"])
        self.scores.load_state_dict(state["scores"])
        for name, moments in state.get("terms", {}).items():  # a checkpoint of before has none
            self.terms.setdefault(name, RunningMoments()).load_state_dict(moments)


@dataclass(frozen=True, eq=False)
class Responses:
    """This rank's sampled responses and what actor, reference and rewards say of them."""

    sequences: Sequences
    logprobs: torch.Tensor  # [B,R]
    ref_logprobs: torch.Tensor  # [B,R]
    entropy: torch.Tensor  # [B,R]
    values: list[torch.Tensor]  # with a value head [B,R] of the states before each token and [B] after the last
    terms: dict[str, torch.Tensor]  # [B] each part of the reward, by name
    scores: torch.Tensor  # [B] their weighted sum
    extra: dict[str, torch.Tensor]  # [B] more numbers of reward functions, by "function/name"; nan where there is none
    logprobs_from: Literal["sampler", "update", "forward"]  # see old_logprobs
    sampled_logprobs: torch.Tensor | None = None  # [B,R] as the backend gave them, where a forward gave `logprobs`

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Responses:
        """The same with `function` applied to every tensor."""
        sampled = None if self.sampled_logprobs is None else function(self.sampled_logprobs)
        return Responses(
            sequences=self.sequences.map(function),
            logprobs=function(self.logprobs),
            ref_logprobs=function(self.ref_logprobs),
            entropy=function(self.entropy),
            values=[function(x) for x in self.values],
            terms={name: function(term) for name, term in self.terms.items()},
            scores=function(self.scores),
            extra={name: function(numbers) for name, numbers in self.extra.items()},
            logprobs_from=self.logprobs_from,
            sampled_logprobs=sampled,
        )

    @property
    def kl(self) -> torch.Tensor:
        """[B] nats of each response: the sum over its tokens of log p - log p of the reference."""
        kl = kl_estimate(self.logprobs, self.ref_logprobs, "k1")
        return masked_sum(kl, self.sequences.response_mask, dim=1)


def make_rollouts(actor: Any, tokenizer: Any, settings: PPOConfig) -> RolloutBackend:
    """What samples responses from the actor. A collective."""
    rollout, backend = settings.rollout, settings.rollout.backend
    if backend == "vllm":
        return VllmRollout(
            actor,
            tokenizer,
            rollout.rows_at_once,
            rollout.stop_token_ids,
            path=settings.actor_path,
            max_tokens=settings.max_tokens,
            tensor_parallel=rollout.tensor_parallel,
            filtered=rollout.top_p < 1 or rollout.top_k > 0,
            trust_remote_code=settings.trust_remote_code,
        )
    if backend == "auto" and (why := unknown_attention(actor.module.model, settings.max_tokens)) is not None:
        dist.print0(f"rollout: transformers' generate samples (rollout.backend padded), since static cannot: {why}")
        backend = "padded"
    common = (actor, tokenizer, rollout.rows_at_once, rollout.gather_weights, rollout.stop_token_ids)
    return PaddedRollout(*common) if backend == "padded" else StaticRollout(*common, cuda_graphs=rollout.cuda_graphs)


def prompt_batch(
    rows: Rows,
    indices: Sequence[int],
    places: Sequence[int | None],
    settings: PPOConfig,
    tokenizer: Any,
    samples: int = 1,
) -> PromptBatch:
    """This rank's prompts, each `samples` times, left padded to max_prompt_tokens: all ranks have as many columns.

    `indices` are the prompts of all ranks, `places` those in `indices` that are this rank's (None: a filler).
    """
    wide = [place for place in places for _ in range(samples)]
    draws = [None if place is None else place * samples + i % samples for i, place in enumerate(wide)]
    examples = [None if place is None else rows[indices[place]] for place in wide]
    turns = None
    if settings.reward.own_tokenizer:
        turns = [None if place is None else rows.turns(indices[place]) for place in wide]
    labels = None
    if settings.reward.labels:
        labels = [{} if place is None else rows.labels(indices[place]) for place in wide]
    return collate_prompts(examples, draws, tokenizer.pad_token_id, settings.max_prompt_tokens, turns, labels)


@torch.no_grad()
def sample_responses(
    rollouts: RolloutBackend, prompts: PromptBatch, rollout: RolloutSettings, seed: int, draw: int
) -> Sampled:
    """Sample one response to each prompt of this rank. A collective.

    `draw` numbers the sampling: the same (seed, draw, draw_index) gives the same response on any number of ranks.
    """
    uniforms = row_uniforms(seed, draw, prompts.draw_index, rollout.max_response_tokens)
    request = SeededRequest(prompts.input_ids, prompts.attention_mask, uniforms)
    sampling = SamplingConfig(rollout.max_response_tokens, rollout.temperature, rollout.top_p, rollout.top_k)
    batch = rollouts.generate(request, sampling)
    sequences = Sequences(batch.input_ids, batch.attention_mask, rollouts.stop_ids, prompts.input_ids.shape[1])
    return Sampled(sequences, batch.logprobs, batch.entropy, batch.weights_version)


@torch.no_grad()
def score_responses(
    engines: Engines,
    tokenizer: Any,
    sampled: Sampled,
    prompts: PromptBatch,
    settings: PPOConfig,
    functions: list[RewardTerm],
) -> Responses:
    """Log-probabilities of actor and reference, and the reward's parts with their weighted sum. A collective."""
    sequences = sampled.sequences
    for engine in engines.present():
        engine.eval()
    values: list[torch.Tensor] = []
    origin = old_logprobs(settings, sampled)
    if origin == "forward":
        logprobs, entropy, *values = _score_policy(engines.actor, sequences, settings, with_entropy=True)
    else:
        assert sampled.entropy is not None
        logprobs, entropy = sampled.logprobs, sampled.entropy
    ref_logprobs = _reference_logprobs(engines, sequences, settings)
    terms = _model_term(engines, tokenizer, sequences, prompts, settings)
    extra: dict[str, torch.Tensor] = {}
    if functions:
        of_functions, extra = function_scores(functions, tokenizer, sequences, prompts)
        terms |= of_functions
    weights = {"model": settings.reward.weight} | {term.name: term.settings.weight for term in functions}
    scores = torch.stack([weights[name] * scores for name, scores in terms.items()]).sum(dim=0)
    sampled_logprobs = sampled.logprobs if origin == "forward" else None
    return Responses(sequences, logprobs, ref_logprobs, entropy, values, terms, scores, extra, origin, sampled_logprobs)


def old_logprobs(settings: PPOConfig, sampled: Sampled) -> Literal["sampler", "update", "forward"]:
    """Where the log-probabilities of the policy that sampled come from.

    sampler: the backend's own, from the logits that it sampled from. In float32 they are those of a training forward to
    2e-6, and cost nothing.
    update: those of the update's forward, whose ratio then is 1. An iteration of one optimizer step updates the weights
    that sampled. Rewards take the KL from the backend's.
    forward: one more forward of the actor. In bf16 and fp16 decoding rounds differently from training, which several
    steps would take for a change of the policy; and a value head's values come from it.
    """
    if sampled.entropy is None or settings.value_head is not None:
        return "forward"
    if settings.ppo.epochs == 1 and settings.ppo.minibatch == settings.responses:
        return "update"
    return "sampler" if settings.precision == "float32" else "forward"


def _model_term(
    engines: Engines, tokenizer: Any, sequences: Sequences, batch: PromptBatch, settings: PPOConfig
) -> dict[str, torch.Tensor]:
    """{"model": [B]}, or nothing without a reward model."""
    terms: dict[str, torch.Tensor] = {}
    if engines.reward_tokenizer is not None:
        terms["model"] = retokenized_scores(engines, tokenizer, sequences, batch, settings)
    elif engines.reward is not None or settings.reward.share_critic_trunk:

        def score(micro: Any) -> tuple[torch.Tensor]:
            if settings.reward.share_critic_trunk:
                values = engines.critic(micro.ids, micro.mask, start=True)
            else:
                values = engines.reward(micro.ids, micro.mask)
            return (pooled(values, micro.mask, micro.score_mask, settings.reward.score),)

        (terms["model"],) = _in_micro_batches(sequences, settings, score)
    return terms


@torch.no_grad()
def make_experience(
    engines: Engines, own: Responses, prompts: PromptBatch, settings: PPOConfig, control: Control
) -> tuple[Experience, dict[str, float]]:
    """The experience of an iteration, all N rows on every rank, and its metrics. A collective.

    1. Values of every state; 2. bring all ranks' rows together; 3. rewards; 4. advantages and returns; 5. the KL
    coefficient of the next iteration.

    Rows are token ids and a few numbers a token: gathering them is cheap, and makes minibatches, whitening and
    metrics the same for any number of ranks.

    Raises:
        NotFiniteError: on all ranks; `control` is as it was.
    """
    ppo = settings.ppo
    own_values, own_final = own.values or _values(engines.critic, own.sequences, settings)  # 1
    gather = rows_of_all_ranks(prompts)  # 2
    found = own.map(gather)
    values, final_values = gather(own_values), gather(own_final)
    sequences, logprobs, ref_logprobs, raw_scores = found.sequences, found.logprobs, found.ref_logprobs, found.scores
    mask = sequences.response_mask
    _check_finite(mask, score=raw_scores[:, None], logprob=logprobs, reference_logprob=ref_logprobs, value=values)
    scores = raw_scores + _normalized(found.terms, settings, control)  # 3
    scores = shape_scores(scores, sequences.ended, ppo, control)
    kl_coef = control.kl.coef if ppo.kl_in == "reward" else 0.0
    rewards = shaped_rewards(scores, logprobs, ref_logprobs, mask, kl_coef, ppo.reward_clip, ppo.kl_kind)
    group = gather(prompts.draw_index) // settings.rollout.samples
    after = torch.where(sequences.ended, 0.0, final_values) if ppo.bootstrap else None
    advantages, returns, moments = _advantages(rewards, values, after, mask, group, ppo)  # 4
    experience = Experience(
        sequences,
        logprobs,
        ref_logprobs,
        values,
        advantages,
        returns,
        control.kl.coef,
        own.logprobs_from == "update",
        found.sampled_logprobs,
    )
    clipped = torch.zeros_like(scores) if ppo.reward_clip is None else (scores.abs() > ppo.reward_clip).float()
    metrics = response_metrics(found) | {
        "objective/reward": masked_sum(rewards, mask, dim=1).mean(),
        "objective/score_clipfrac": clipped.mean(),
        "objective/kl_coef": torch.tensor(control.kl.coef, dtype=torch.float64),
        "advantages/mean": moments[0],
        "advantages/std": moments[1].sqrt(),
    }
    if ppo.advantage == "gae":
        metrics |= {
            "value/mean": masked_mean(values, mask),
            "value/return": masked_mean(returns, mask),
            "value/explained_variance": explained_variance(values, returns, mask),
        }
    if settings.rollout.weighs_tokens:
        metrics |= importance_metrics(experience, settings.rollout)
    control.kl.update(float(metrics["objective/kl"]), len(scores))  # 5
    return experience, {name: float(value) for name, value in metrics.items()}


def importance_metrics(experience: Experience, rollout: RolloutSettings) -> dict[str, torch.Tensor]:
    """The ratio of training's to the sampler's probabilities over real tokens, and how many of them are cut."""
    assert experience.sampled_logprobs is not None
    mask, ratio = experience.mask, importance_ratio(experience.logprobs, experience.sampled_logprobs)
    cut = ratio > rollout.importance_cap
    if rollout.importance_sampling == "mask":
        cut |= ratio < 1 / rollout.importance_cap
    return {
        "rollout/importance_mean": masked_mean(ratio, mask),
        "rollout/importance_max": ratio.masked_fill(~mask, 0.0).max(),
        "rollout/importance_cut": masked_mean(cut.float(), mask),
    }


def _check_finite(mask: torch.Tensor, **found: torch.Tensor) -> None:
    """mask [N,R], each of `found` [N,R] or [N,1]. Raises NotFiniteError for the first with nan or inf in the mask."""
    for what, numbers in found.items():
        broken = (~numbers.isfinite() & mask).any(dim=1)
        if broken.any():
            raise NotFiniteError(what, broken.nonzero().flatten().tolist())


def _normalized(terms: dict[str, torch.Tensor], settings: PPOConfig, control: Control) -> torch.Tensor | float:
    """[N]: what the functions with `normalize` change in the weighted sum; counts their scores in `control`."""
    change: torch.Tensor | float = 0.0
    for each in settings.reward.functions:
        if each.normalize:
            moments, scores = control.terms.setdefault(each.name, RunningMoments()), terms[each.name]
            moments.update(scores)
            change = change + each.weight * ((scores - moments.mean) / moments.std - scores)
    return change


def shape_scores(scores: torch.Tensor, ended: torch.Tensor, ppo: PPOSettings, control: Control) -> torch.Tensor:
    """scores [N], ended [N] bool -> [N]: less the penalty of a missing EOS, then over the running deviation."""
    scores = scores - ppo.missing_eos_penalty * (~ended).float()
    if ppo.scale_reward:
        control.scores.update(scores)
        scores = scores / control.scores.std
    return scores


def _values(critic: Any, sequences: Sequences, settings: PPOConfig) -> list[torch.Tensor]:
    """The critic's values of the states before each response token [B,R] and after the last one [B]; else 0."""
    if critic is None:
        nothing = torch.zeros(sequences.response_mask.shape, device=sequences.input_ids.device)
        return [nothing, nothing[:, 0]]

    def score(micro: Any) -> tuple[torch.Tensor, torch.Tensor]:
        values = critic(micro.ids, micro.mask)
        return micro.before_response(values), last_token_scores(values, micro.mask)

    return _in_micro_batches(sequences, settings, score)


def _advantages(
    rewards: torch.Tensor,
    values: torch.Tensor,
    after: torch.Tensor | None,
    mask: torch.Tensor,
    group: torch.Tensor,
    ppo: PPOSettings,
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """(advantages [N,R], returns [N,R], their mean and variance before any whitening)."""
    if ppo.advantage != "gae":
        one = group_advantages(masked_sum(rewards, mask, dim=1), group, ppo.advantage)  # one a response
        advantages = torch.where(mask, one.unsqueeze(1), 0.0)
        return advantages, torch.zeros_like(advantages), masked_moments(advantages, mask)
    advantages, returns = gae(values, rewards, mask, ppo.gamma, ppo.lam, after)
    mean, var = masked_moments(advantages, mask)
    return (whiten(advantages, mask, mean, var) if ppo.whiten else advantages), returns, (mean, var)


def rows_of_all_ranks(prompts: PromptBatch) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function [B,...] -> [N,...] that gathers, ordered by the numbers of the draws.

    In rank order a minibatch, and so the update, would hold other rows on another number of ranks.
    """
    order = dist.all_gather_rows(prompts.draw_index).argsort(stable=True)
    return lambda x: dist.all_gather_rows(x)[order]


def response_metrics(found: Responses) -> dict[str, torch.Tensor]:
    """Means over the responses of all ranks of what one looks at first."""
    sequences, mask = found.sequences, found.sequences.response_mask
    parts = {f"objective/score_{name}": term.mean() for name, term in found.terms.items()}
    extra = {f"reward/{name}": numbers[~numbers.isnan()] for name, numbers in found.extra.items()}
    return (parts if len(parts) > 1 else {}) | {name: known.mean() for name, known in extra.items() if len(known)} | {
        "objective/score": found.scores.mean(),
        "objective/score_std": found.scores.std(correction=0),
        "objective/score_length_correlation": correlation(found.scores, mask.sum(dim=1)),
        "objective/kl": found.kl.mean(),
        "objective/kl_per_token": masked_mean(kl_estimate(found.logprobs, found.ref_logprobs, "k1"), mask),
        "objective/entropy": masked_mean(found.entropy, mask),
        "rollout/length": mask.sum(dim=1).float().mean(),
        "rollout/eos_rate": sequences.ended.float().mean(),
        "rollout/commonest_share": _commonest_share(sequences),
    }


def _commonest_share(sequences: Sequences) -> torch.Tensor:
    """[] the share of the responses that are the commonest one, token by token."""
    tokens = torch.where(sequences.response_mask, sequences.responses, -1)
    _, counts = tokens.unique(dim=0, return_counts=True)
    return counts.max() / len(tokens)


def _score_policy(
    engine: Any, sequences: Sequences, settings: PPOConfig, with_entropy: bool = False
) -> list[torch.Tensor]:
    """(logprobs [B,R], entropy [B,R]) of the responses at the sampling temperature; with a value head, as `_values`,
    (values [B,R], after the last token [B]) as well."""

    def score(micro: Any) -> tuple[torch.Tensor, ...]:
        logprobs, entropy, *values = engine(
            micro.ids, micro.mask, micro.score_mask, settings.rollout.temperature, with_entropy
        )
        more = [found for x in values for found in (micro.before_response(x), last_token_scores(x, micro.mask))]
        return micro.align(logprobs), micro.align(entropy), *more

    # The actor's are micro-batches of training: the old log-probabilities come from the same forward as the new.
    return _in_micro_batches(sequences, settings, score, wide=not with_entropy)


def _reference_logprobs(engines: Engines, sequences: Sequences, settings: PPOConfig) -> torch.Tensor:
    """[B,R] of the reference; without an engine of its own it is the actor, its adapters off."""
    if engines.reference is not None:
        return _score_policy(engines.reference, sequences, settings)[0]
    with adapters_off(engines.actor.module):
        return _score_policy(engines.actor, sequences, settings)[0]


def _in_micro_batches(
    sequences: Sequences,
    settings: PPOConfig,
    score: Callable[[Any], tuple[torch.Tensor, ...]],
    wide: bool = True,
) -> list[torch.Tensor]:
    """Run `score` on micro-batches; its results [b,...] in the rows' order, [B,...].

    They are training's, or `wide`: with as many more rows as a forward without backward may have on the device.
    """
    lengths = sequences.attention_mask.sum(dim=1)
    # Responses to one prompt next to each other: they share its forward. Then rows of like length.
    samples = settings.rollout.samples if len(lengths) % settings.rollout.samples == 0 else 1
    longest = lengths.view(-1, samples).amax(dim=1).argsort(descending=True, stable=True)
    order = (longest[:, None] * samples + torch.arange(samples, device=longest.device)).flatten()
    found = [score(sequences.micro_batch(rows)) for rows in _split(order, lengths, settings, wide)]
    back = order.argsort()
    return [torch.cat(parts)[back] for parts in zip(*found, strict=True)]


def _split(order: torch.Tensor, lengths: torch.Tensor, settings: PPOConfig, wide: bool) -> Sequence[torch.Tensor]:
    """The micro-batches of forwards over rows `order`, as many on each rank."""
    width = WIDTH[order.device.type] if wide else 1
    if settings.ppo.micro_batch is not None:
        return order.split(width * settings.ppo.micro_batch)
    assert settings.ppo.micro_batch_tokens is not None
    rows, sizes, tokens = order.tolist(), lengths.tolist(), width * settings.ppo.micro_batch_tokens
    needed = dist.max_over_ranks({"forwards": float(len(fill(rows, sizes, tokens)))}, order.device)["forwards"]
    return [torch.tensor(part, device=order.device) for part in fill(rows, sizes, tokens, at_least=int(needed))]
