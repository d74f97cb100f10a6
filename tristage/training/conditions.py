"""The health monitor's conditions: what each looks at, when it holds, why that matters, what to change.

A condition turns a line of metrics, and what came before, into a number that is compared with its threshold in
`health`. Thresholds are such that healthy runs of any size stay clear of them, and a sick one does not for long.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Metrics = Mapping[str, float]
WINDOW = 50  # values of a metric that are remembered
ENOUGH = 10  # of them before a median means something
START = 3  # iterations that are the start
GUESS = 0.7  # a pair's ranking loss before training: log 2
LOSSES = ("sft/loss", "reward_model/loss", "dpo/loss")


class History:
    """What a condition may look back on, of the lines before the present one."""

    def __init__(self, same_start: bool) -> None:
        self.same_start = same_start  # the actor starts as its own reference
        self.recent: dict[str, deque[float]] = {}  # the newest values of each metric, training or held out
        self.first: dict[str, list[float]] = {}  # its first few
        self.best: dict[str, float] = {}  # its highest
        self.lowest: dict[str, float] = {}

    def add(self, split: str, metrics: Metrics) -> None:
        for name, value in metrics.items():
            key = name if split == "train" else f"heldout {name}"
            self.recent.setdefault(key, deque(maxlen=WINDOW)).append(value)
            if len(self.first.setdefault(key, [])) < START:
                self.first[key].append(value)
            self.best[key] = max(value, self.best.get(key, value))
            self.lowest[key] = min(value, self.lowest.get(key, value))

    def median(self, name: str) -> float | None:
        values = self.recent.get(name, ())
        return statistics.median(values) if len(values) >= ENOUGH else None

    def start(self, name: str) -> float | None:
        values = self.first.get(name, ())
        return statistics.fmean(values) if len(values) == START else None

    def mean_with(self, name: str, value: float, count: int) -> float | None:
        """The mean of the newest `count` values, `value` included."""
        values = [*self.recent.get(name, ()), value][-count:]
        return statistics.fmean(values) if len(values) == count else None


@dataclass(frozen=True)
class Condition:
    """One thing that can be wrong with a run."""

    name: str
    split: Literal["train", "heldout"]
    value: Callable[[Metrics, History, int], float | None]  # of a line and its step; None: nothing to say
    seen: str  # with {value} and {limit}
    why: str
    fix: str
    patience: int = 1  # lines in a row
    below: bool = False  # it holds where the value is at most the limit

    def holds(self, value: float, limit: float) -> bool:
        return value <= limit if self.below else value > limit


def metric(name: str) -> Callable[[Metrics, History, int], float | None]:
    """The metric itself."""
    return lambda line, history, step: line.get(name)


def _kl_at_start(line: Metrics, history: History, step: int) -> float | None:
    kl = line.get("objective/kl_per_token")
    return abs(kl) if step == 0 and history.same_start and kl is not None else None


def _negative_kl(line: Metrics, history: History, step: int) -> float | None:
    # One iteration's mean may be below 0 by chance: near the reference its deviation is sqrt(2 KL / responses).
    mean = history.mean_with("objective/kl", line["objective/kl"], 5) if "objective/kl" in line else None
    return None if mean is None else -mean


def _cut_more_than_before(line: Metrics, history: History, step: int) -> float | None:
    ended, start = line.get("rollout/eos_rate"), history.start("rollout/eos_rate")
    return None if ended is None or start is None or ended > start - 0.25 else 1 - ended


def _length_hacking(line: Metrics, history: History, step: int) -> float | None:
    name, length = "objective/score_length_correlation", line.get("rollout/length")
    start = history.start("rollout/length")
    if name not in line or length is None or start is None or length < 1.25 * start:
        return None
    return history.mean_with(name, line[name], 10)


def _entropy_left(line: Metrics, history: History, step: int) -> float | None:
    entropy, start = line.get("objective/entropy"), history.start("objective/entropy")
    return None if entropy is None or not start else entropy / start


def _explained(line: Metrics, history: History, step: int) -> float | None:
    # A critic that starts from a reward model, or from a new head, may take some iterations to become any use.
    if step <= 30 or "value/explained_variance" not in line:
        return None
    return history.mean_with("value/explained_variance", line["value/explained_variance"], 10)


def _spike(line: Metrics, history: History, step: int) -> float | None:
    found = []
    for name in ("optimizer/grad_norm", "policy/grad_norm", "value/grad_norm"):
        usual = history.median(name)
        if name in line and usual:
            found.append(line[name] / usual)
    return max(found, default=None)


def _loss_over_usual(line: Metrics, history: History, step: int) -> float | None:
    for name in LOSSES:
        usual = [value for value in (history.median(name), history.start(name)) if value is not None]
        if name in line and usual:
            recent = history.mean_with(name, line[name], 5)
            # Of a loss near 0 a few hard rows are many times the median.
            floor = 0.2 if name == "sft/loss" else GUESS
            return None if recent is None else recent / max(min(usual), floor)
    return None


def _loss_scale(line: Metrics, history: History, step: int) -> float | None:
    scales = [value for name, value in line.items() if name.endswith("/loss_scale")]
    return min(scales, default=None)


def _over_lowest(line: Metrics, history: History, step: int) -> float | None:
    for name in LOSSES:
        lowest = history.lowest.get(f"heldout {name}")
        if name in line and lowest:
            return line[name] / lowest
    return None


def _grade_fell(line: Metrics, history: History, step: int) -> float | None:
    """How far the grade's win rate is below its best, where that is more than chance and the score's is at its best."""
    score, grade, high = (
        line.get(f"objective/{name}") for name in ("win_rate", "grade_win_rate", "grade_win_rate_high")
    )
    best = history.best.get("heldout objective/grade_win_rate")
    if score is None or grade is None or high is None or best is None:
        return None
    rises = score >= history.best.get("heldout objective/win_rate", score) - 0.02
    return best - grade if rises and high < best else None


CONDITIONS: Sequence[Condition] = (
    Condition(
        "ratio_not_one",
        "train",
        metric("policy/first_ratio_error"),
        "the ratios of the first update of an iteration differ from 1 by {value} on average, over {limit}",
        "sampling and training compute different probabilities for the same tokens, so PPO's clip acts on noise",
        "set rollout.backend=padded and compare; use float32 to see whether it is rounding",
    ),
    Condition(
        "kl_not_zero",
        "heldout",
        _kl_at_start,
        "before training the KL to a reference of the same weights is {value} nats per token, over {limit}",
        "actor and reference compute different probabilities, so the KL penalty pulls to a wrong place",
        "check that both have the same precision, template and attention; see rollout.top_p and top_k",
    ),
    Condition(
        "kl_negative",
        "train",
        _negative_kl,
        "the KL to the reference is {value} nats per response below 0 (mean of 5 iterations), more than {limit}",
        "a KL cannot be negative: responses are not samples of the distribution that is scored",
        "set rollout.top_p=1 and rollout.top_k=0, and check the temperature",
    ),
    Condition(
        "kl_runaway",
        "train",
        metric("objective/kl"),
        "the KL to the reference is {value} nats per response, over {limit}",
        "the policy has left what the reward model was trained on, and its score means little there",
        "raise ppo.kl_coef, set ppo.adaptive_kl_target, or lower actor.optimizer.learning_rate",
        patience=3,
    ),
    Condition(
        "kl_per_token_high",
        "train",
        metric("objective/kl_per_token"),
        "the KL to the reference is {value} nats per token, over {limit}",
        "hardly anything of the reference's language is left",
        "raise ppo.kl_coef, set ppo.adaptive_kl_target, or lower actor.optimizer.learning_rate",
        patience=3,
    ),
    Condition(
        "eos_rate_low",
        "train",
        metric("rollout/eos_rate"),
        "only {value} of the responses end by themselves, below {limit}",
        "the score is that of cut-off text, and rollouts cost as much as they can",
        "train step 1 with the same template, name the right rollout.stop_token_ids, or set ppo.missing_eos_penalty",
        patience=3,
        below=True,
    ),
    Condition(
        "empty_responses",
        "train",
        metric("rollout/length"),
        "responses have {value} tokens on average, fewer than {limit}",
        "the policy answers with nothing, which the reward does not punish enough",
        "look at samples.jsonl; check the reward of an empty response; raise ppo.kl_coef",
        patience=3,
        below=True,
    ),
    Condition(
        "at_limit",
        "train",
        _cut_more_than_before,
        "{value} of the responses are cut at the token limit, over {limit} and more than at the start",
        "the reward pays for length, or the policy forgets how to end",
        "set ppo.missing_eos_penalty, raise rollout.max_response_tokens, or train a reward model against length",
        patience=3,
    ),
    Condition(
        "score_follows_length",
        "train",
        _length_hacking,
        "score and length correlate with {value}, over {limit}, and responses have grown by a quarter",
        "the policy may be rewarded for length alone",
        "compare before and after in the report; add a reward function against length, or a better reward model",
    ),
    Condition(
        "entropy_collapse",
        "train",
        _entropy_left,
        "the entropy per token is {value} of that at the start, below {limit}",
        "the policy hardly tries anything new, and learns nothing more",
        "raise ppo.kl_coef, set ppo.entropy_coef, or lower actor.optimizer.learning_rate",
        patience=3,
        below=True,
    ),
    Condition(
        "value_useless",
        "train",
        _explained,
        "the critic explains {value} of the returns' variance, below {limit} (mean of 10 iterations)",
        "its advantages are noisier than without a critic",
        "raise critic.optimizer.learning_rate or ppo.epochs, set critic.warmup_iterations, or use ppo.advantage rloo",
        below=True,
    ),
    Condition(
        "clipping",
        "train",
        metric("policy/clipfrac"),
        "{value} of the tokens are outside the policy's clip, over {limit}",
        "updates are too large for what was sampled, and much of the gradient is cut",
        "lower actor.optimizer.learning_rate or ppo.epochs, or set ppo.target_kl",
        patience=3,
    ),
    Condition(
        "gradient_spike",
        "train",
        _spike,
        "a gradient norm is {value} times its median, over {limit}",
        "one batch moves the weights far, even clipped, and Adam remembers it",
        "look at the rows of that step; lower the learning rate or clip_norm",
    ),
    Condition(
        "loss_rises",
        "train",
        _loss_over_usual,
        "the loss of the last 5 steps is {value} times what it was (at the start, or in 50 steps), over {limit}",
        "training has become unstable, or the data has changed",
        "lower the learning rate, lengthen the warm-up, or look at the rows of these steps",
    ),
    Condition(
        "loss_scale_floor",
        "train",
        _loss_scale,
        "fp16's loss scale is {value}, as low as {limit}",
        "gradients overflow whatever the scale, and steps are skipped",
        "use precision bf16 or float32, or lower the learning rate",
        below=True,
    ),
    Condition(
        "identical_responses",
        "train",
        metric("rollout/commonest_share"),
        "{value} of the responses are the same one, over {limit}",
        "the policy answers every prompt alike: it has collapsed, or prompts are cut to the same text",
        "look at samples.jsonl; raise ppo.kl_coef or rollout.temperature",
        patience=3,
    ),
    Condition(
        "constant_score",
        "train",
        metric("objective/score_std"),
        "every response of an iteration has the same score: its deviation is {value}",
        "there is nothing to learn from it",
        "check the reward model or reward function, and ppo.reward_clip",
        below=True,
    ),
    Condition(
        "score_up_grade_down",
        "heldout",
        _grade_fell,
        "the grade's win rate is {value} below its best, over {limit}, while the score's is at its best",
        "the policy exploits the reward model: what it gains is not what the grader calls good",
        "stop here and take the checkpoint with the best grade (keep_best); raise ppo.kl_coef",
        patience=2,
    ),
    Condition(
        "overfitting",
        "heldout",
        _over_lowest,
        "held-out loss is {value} times its lowest, over {limit}",
        "the model learns the training rows by heart",
        "train for fewer epochs, with a lower learning rate or more rows; keep the best checkpoint (keep_best)",
        patience=2,
    ),
    Condition(
        "slow_rank",
        "train",
        metric("time/rank_spread"),
        "the slowest rank's rollout takes {value} times the median rank's, over {limit}",
        "all ranks wait for it at every iteration",
        "look at that node's GPU clocks, other processes and network; leave it out (--exclude)",
        patience=10,
    ),
)
