"""Whether a run made its model better, in words: by which judge, with which interval, at what KL; then worries.

Intervals are 95 % over held-out prompts (paired differences, bootstrap) or pairs (Wilson), never over seeds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tristage.intervals import bootstrap_interval, wilson_interval
from tristage.runs.record import Run, Series

Kind = Literal["better", "worse", "unclear", "note", "worry"]
OVERFIT = 1.01  # held-out loss over its lowest


@dataclass(frozen=True)
class Sentence:
    """One statement of a verdict."""

    kind: Kind
    text: str


@dataclass(frozen=True)
class Change:
    """A held-out number before and after training, with the interval of the difference where each prompt is known."""

    before: float
    after: float
    low: float = math.nan
    high: float = math.nan
    prompts: int = 0

    @property
    def kind(self) -> Kind:
        """Whether the number rose ("better"), fell ("worse"), or neither for certain."""
        if math.isnan(self.low) or self.low <= 0 <= self.high:
            return "unclear"
        return "better" if self.low > 0 else "worse"

    def text(self, what: str) -> str:
        verb = {"better": "rose", "worse": "fell", "unclear": "went"}[self.kind]
        change = f"{what} {verb} from {number(self.before)} to {number(self.after)}"
        if not self.prompts:
            return f"{change} (no interval: the numbers of each prompt are not in heldout.jsonl)."
        interval = f"95 % interval {signed(self.low)} to {signed(self.high)}, {self.prompts} prompts"
        unclear = ": no clear change" if self.kind == "unclear" else ""
        return f"{change}, a difference of {signed(self.after - self.before)} ({interval}){unclear}."


def number(value: float) -> str:
    """Three significant digits, no exponent where people expect none, and 0 for what is rounding."""
    if abs(value) < 1e-6:
        return "0"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.2g}"


def signed(value: float) -> str:
    return ("+" if value >= 0 else "-") + number(abs(value))


def verdict(run: Run) -> list[Sentence]:
    """The headline, then what it rests on, then worries. It says no more than the run's numbers do."""
    judged = {
        "step1_sft": _sft,
        "step2_reward_model": _reward_model,
        "step2_dpo": _dpo,
        "step3_ppo": _ppo,
    }.get(run.step or "", _nothing)(run)
    return [*judged, *_worries(run)]


def _nothing(run: Run) -> list[Sentence]:
    return [Sentence("unclear", "Nothing to judge yet: the run has written no metrics.")]


def _missing(what: str) -> list[Sentence]:
    return [Sentence("unclear", f"Nothing to judge yet: {what} was not measured both before and after training.")]


def _ends(series: Series | None) -> tuple[float, float] | None:
    """The first and the last value, where they are of two evaluations."""
    if series is None or len(series.values) < 2:
        return None
    return series.values[0], series.values[-1]


# -- steps 1 and 2 ---------------------------------------------------------------------------------------------


def _sft(run: Run) -> list[Sentence]:
    loss = run.heldout("sft/loss")
    ends = _ends(loss)
    if loss is None or ends is None:
        return _missing("held-out loss")
    before, after = ends
    kind: Kind = "better" if after < before else "worse"
    head = "Better: it predicts" if after < before else "Worse: it does not predict"
    sentences = [
        Sentence(kind, f"{head} the held-out answers better than before."),
        Sentence(
            kind,
            f"Held-out loss per answer token went from {number(before)} to {number(after)} nats "
            f"(perplexity {number(math.exp(min(before, 50)))} to {number(math.exp(min(after, 50)))}).",
        ),
        *_overfits(loss, "Held-out loss"),
    ]
    train = run.train("sft/loss")
    if train is not None and after < before:
        recent = float(np.mean(train.values[-max(1, len(train.values) // 20) :]))
        sentences.append(Sentence("note", f"Training loss at the end is {number(recent)}."))
    return sentences


def _overfits(loss: Series, what: str) -> list[Sentence]:
    lowest = int(np.argmin(loss.values))
    if loss.last <= OVERFIT * loss.values[lowest]:
        return []
    then, now = number(loss.values[lowest]), number(loss.last)
    text = f"{what} was lowest at step {loss.steps[lowest]} ({then}) and is {now} now: the run overfits"
    return [Sentence("worry", f"{text}. Train for fewer epochs, or set `keep_best`.")]


def _reward_model(run: Run) -> list[Sentence]:
    return _pairs(run, "reward_model", "the preferred answer gets the higher score")


def _dpo(run: Run) -> list[Sentence]:
    sentences = _pairs(run, "dpo", "the preferred answer gets the higher implicit reward")
    chosen = _ends(run.heldout("dpo/chosen_logprob"))
    if chosen is not None and chosen[1] < chosen[0]:
        text = f"The log-probability of preferred answers fell from {number(chosen[0])} to {number(chosen[1])}"
        sentences.append(Sentence("note", f"{text}; with DPO that is common, and far down it is a sign of drift."))
    return sentences


def _pairs(run: Run, group: str, meaning: str) -> list[Sentence]:
    accuracy, baseline = run.heldout(f"{group}/accuracy"), run.heldout(f"{group}/length_baseline")
    if accuracy is None or baseline is None or run.last_step == 0:
        return _missing("held-out accuracy")
    rule = max(baseline.last, 1 - baseline.last)
    which = "longer" if baseline.last >= 0.5 else "shorter"
    share = f"On held-out pairs {meaning} in {percent(accuracy.last)}"
    compared = f"always choosing the {which} answer is right in {percent(rule)}"
    pairs = run.heldout(f"{group}/pairs")
    if pairs is None:
        kind: Kind = "unclear"
        sentence = f"{share}; {compared} (no interval: the number of pairs is not in metrics.jsonl)."
    else:
        low, high = wilson_interval(accuracy.last * pairs.last, int(pairs.last))
        kind = "better" if low > rule else "worse" if high < rule else "unclear"
        interval = f"95 % interval {percent(low)} to {percent(high)}, {int(pairs.last)} pairs"
        sentence = f"{share} ({interval}); {compared}."
    head = {
        "better": "Better than a rule of length: it has learned to tell answers apart.",
        "worse": "Worse than a rule of length.",
        "unclear": "Not clearly better than a rule of length.",
    }[kind]
    loss = run.heldout(f"{group}/loss")
    overfits = [] if loss is None or len(loss.values) < 2 else _overfits(loss, "Held-out loss")
    return [Sentence(kind, head), Sentence(kind, sentence), *overfits]


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# -- step 3 ----------------------------------------------------------------------------------------------------


def _ppo(run: Run) -> list[Sentence]:
    score = change(run, "score", "objective/score")
    if score is None:
        return _missing("the held-out score")
    grade = change(run, "grade", "objective/grade")
    judges = [("Held-out score, by the reward that was trained on,", score, "By score", "objective/win_rate")]
    if grade is not None:
        what = f"Held-out grade, by {run.settings.get('grader') or 'the grader'}, which training never saw,"
        judges.append((what, grade, "By grade", "objective/grade_win_rate"))
    sentences = [_headline(score, grade)]
    for what, found, by, wins in judges:
        sentences.append(Sentence(found.kind, found.text(what)))
        sentences += _win_rate(run, by, wins)
    return sentences + list(_at_what_kl(run)) + list(_best(run, "grade" if grade is not None else "score"))


def change(run: Run, column: str, metric: str) -> Change | None:
    """From the first held-out evaluation to the last; None if there are not two."""
    ends = _ends(run.heldout(metric))
    if ends is None:
        return None
    steps = sorted(run.rows)
    before, after = (run.rows[step].get(column) for step in (steps[0], steps[-1])) if steps else (None, None)
    gaps = _gaps(before, after)
    if gaps is None or len(steps) < 2:
        return Change(*ends)
    return Change(*ends, *bootstrap_interval(gaps), prompts=len(gaps))


def _gaps(before: list[float | None] | None, after: list[float | None] | None) -> list[float] | None:
    """after - before per prompt; None where they are not the same prompts, or a number is missing."""
    if not before or not after or len(before) != len(after):
        return None
    gaps = [new - old for old, new in zip(before, after, strict=True) if old is not None and new is not None]
    return gaps if len(gaps) == len(before) else None


# (score, grade) -> headline; the grade, which was not trained on, decides.
HEADLINES: dict[tuple[Kind, Kind], str] = {
    ("better", "better"): "Better: both the score and the independent grade rose.",
    ("unclear", "better"): "Better by the independent grade; the score did not clearly change.",
    ("worse", "better"): "Better by the independent grade, though the score fell.",
    ("better", "unclear"): "The score rose and the independent grade did not clearly change.",
    ("unclear", "unclear"): "No clear change of the score or the independent grade.",
    ("worse", "unclear"): "The score fell and the independent grade did not clearly change.",
    ("better", "worse"): "Worse, though the score rose: the independent grade fell. The policy exploits the reward.",
    ("unclear", "worse"): "Worse: the independent grade fell.",
    ("worse", "worse"): "Worse: both the score and the independent grade fell.",
}
WITHOUT_GRADE: dict[Kind, str] = {
    "better": "Better by the reward that it was trained on; no independent judge was asked (set `grader`).",
    "unclear": "No clear change of the score.",
    "worse": "Worse: the score fell.",
}


def _headline(score: Change, grade: Change | None) -> Sentence:
    if not score.prompts:
        return Sentence("unclear", "Whether a change is more than chance is not known: the run kept means alone.")
    if grade is None:
        return Sentence(score.kind, WITHOUT_GRADE[score.kind])
    return Sentence(grade.kind, HEADLINES[score.kind, grade.kind])


def _win_rate(run: Run, by: str, name: str) -> Iterator[Sentence]:
    rate, low, high = (run.heldout(f"{name}{end}") for end in ("", "_low", "_high"))
    if rate is not None and low is not None and high is not None:
        share = f"{percent(rate.last)} of prompts (95 % interval {percent(low.last)} to {percent(high.last)})"
        yield Sentence("note", f"{by}, it beats the response from before training on {share}.")


def _at_what_kl(run: Run) -> Iterator[Sentence]:
    kl, length = run.heldout("objective/kl"), _ends(run.heldout("rollout/length"))
    if kl is not None:
        yield Sentence("note", f"KL to the reference is {number(kl.last)} nats per response.")
    if length is not None:
        yield Sentence("note", f"Responses went from {number(length[0])} to {number(length[1])} tokens.")


def _best(run: Run, column: str) -> Iterator[Sentence]:
    """Where an earlier evaluation is clearly better than the last."""
    series = run.heldout(f"objective/{column}")
    if series is None:
        return
    best = series.steps[int(np.argmax(series.values))]
    gaps = _gaps(run.rows.get(series.steps[-1], {}).get(column), run.rows.get(best, {}).get(column))
    if best == series.steps[-1] or gaps is None or bootstrap_interval(gaps)[0] <= 0:
        return
    kept = "its checkpoint is kept" if best in run.checkpoints else "its checkpoint was not kept: set `keep_best`"
    value = number(max(series.values))
    yield Sentence("worry", f"The {column} was clearly higher at iteration {best} ({value}) than at the end; {kept}.")


# -- any step --------------------------------------------------------------------------------------------------


def _worries(run: Run) -> Iterator[Sentence]:
    alarms = [line for line in run.health if "alarm" in line]
    times = Counter(str(line["alarm"]) for line in alarms)
    for name, count in times.items():
        first = next(line for line in alarms if line["alarm"] == name)
        again = f", {count} times" if count > 1 else ""
        text = f"{first.get('seen', '')}; to change: {first.get('fix', '')}"
        yield Sentence("worry", f"{name}, first at step {first['step']}{again}: {text}.")
    bad = [line for line in run.health if "bad" in line]
    if bad:
        first_bad = bad[0]["step"]
        text = f"Steps skipped because a number was not finite: {len(bad)}, the first is step {first_bad}."
        yield Sentence("worry", text)
    if not run.finished:
        yield Sentence("worry", f"The run has not finished; its last step is {run.last_step}.")
