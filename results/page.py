"""Writes the tables of docs/results.md from results/data: python -m results.page

Tables are between the lines `<!-- NAME -->` and `<!-- end -->`; the text around them is written by hand. A test
compares the page with the data. results.figures draws its pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from benchmarks.speed_page import filled, table
from results.jobs import REPO
from results.record import read, seed_interval

PAGE = REPO / "docs/results.md"
EXPERIMENTS = ("ablations", "peers", "sentiment", "arithmetic", "over_optimisation")


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and interval over seeds."""
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(*seed_interval(values), d=digits)


def about(found: dict[str, Any]) -> str:
    """Where, when and with what an experiment was run."""
    said = found["about"]
    versions = ", ".join(f"{name} {version}" for name, version in said["versions"].items())
    peer = said.get("versions_of_trl_ppo")
    other = "" if peer is None else f"; PPOTrainer: {', '.join(f'{name} {number}' for name, number in peer.items())}"
    cost = f"{said['seconds'] / 3600:.1f} hours of one core ({said['cpu_seconds'] / 3600:.1f} of CPU time)"
    seeds = f"seeds {said['seeds'][0]} to {said['seeds'][-1]}"
    when = f"{said['date']}, commit {said['commit']}"
    return f"`{said['command']}`: {seeds}, {cost}, {when}. {said['machine']}; {versions}{other}."


def ablations_table(policies: dict[str, Any]) -> str:
    baseline = policies["baseline"]
    rows = []
    for name, found in policies.items():
        difference = [mine - its for mine, its in zip(found["gold"], baseline["gold"], strict=True)]
        mean, low, high = seed_interval(difference)
        against = "" if found is baseline else f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
        if found is not baseline and (low > 0 or high < 0):
            against = f"**{against}**"
        rows.append([name, found["claim"], f"{fmean(found['gold']):.3f}", against, f"{fmean(found['KL']):.1f}"])
    return table(["what is changed", "claim that it tests", "gold", "against the baseline", "KL"], rows)


def peers_table(policies: dict[str, Any], peers: dict[str, Any]) -> str:
    rows = []
    for name, found in {
        "step 1 alone": policies["untrained"],
        "tristage": policies["baseline"],
        **peers,
        "DeepSpeed-Chat's formulas, sampled": policies["DeepSpeed-Chat's formulas"],
        "DeepSpeed-Chat as it is, greedy": policies["DeepSpeed-Chat as it is"],
    }.items():
        difference = [mine - its for mine, its in zip(found["gold"], policies["baseline"]["gold"], strict=True)]
        against = "" if name == "tristage" else "{:+.3f} ({:+.3f} to {:+.3f})".format(*seed_interval(difference))
        rows.append([name, spread(found["gold"]), against, spread(found["KL"], 1), f"{fmean(found['length']):.1f}"])
    return table(["", "gold", "against tristage", "KL", "tokens"], rows)


# -- real text ---------------------------------------------------------------------------------------------------------

JUDGES = ("Rotten Tomatoes", "VADER", "other reviews")


def over_seeds_and_prompts(seeds: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """[S][P], the same prompts for each seed -> (mean, low, high)."""
    return seed_interval([fmean(prompts) for prompts in seeds], [fmean(column) for column in zip(*seeds, strict=True)])


def sentiment_table(found: dict[str, Any]) -> str:
    rows = []
    for name, policy in found["policies"].items():
        grades = ["{:.2f} ({:.2f} to {:.2f})".format(*over_seeds_and_prompts(policy[judge])) for judge in JUDGES]
        tokens = sum(map(sum, policy["length"]))
        perplexity = math.exp(-sum(map(sum, policy["reference log-probability"])) / tokens)
        score, kl, length = (fmean(map(fmean, policy[measure])) for measure in ("score", "KL", "length"))
        distinct = fmean(policy["distinct-2"])
        means = [f"{score:.2f}", f"{kl:.1f}", f"{perplexity:.0f}", f"{distinct:.2f}", f"{length:.1f}"]
        rows.append([name, *grades, *means])
    return table(["", *JUDGES, "reward", "KL", "reference perplexity", "distinct-2", "tokens"], rows)


def reward_table(measures: dict[str, list[float]], seeds: Sequence[int]) -> str:
    rows = []
    for seed, *found in zip(seeds, *measures.values(), strict=True):
        accuracy, low, high, baseline, calibration, pairs = found
        right = f"{accuracy:.3f} ({low:.3f} to {high:.3f})"
        rows.append([str(seed), f"{pairs:.0f}", right, f"{baseline:.3f}", f"{calibration:.3f}"])
    return table(["seed", "held-out pairs", "right", "the longer one is", "calibration error"], rows)


def judges_table(judges: dict[str, Any]) -> str:
    keys = ("accuracy", "of favourable reviews", "of unfavourable reviews")
    rows = [[name, *(f"{found[key]:.2f}" for key in keys)] for name, found in judges.items()]
    return table(["judge", "accuracy", "mean of favourable reviews", "of unfavourable reviews"], rows)


def arithmetic_table(policies: dict[str, Any]) -> str:
    rows = []
    for name, found in policies.items():
        right = [spread(found[measure], 2) for measure in ("right", "right, greedy")]
        rows.append([name, *right, f"{fmean(found['only a number']):.2f}", spread(found["KL"], 2)])
    return table(["", "right, sampled", "right, greedy", "only a number", "KL"], rows)


# -- over-optimisation -------------------------------------------------------------------------------------------------


def over_optimisation_table(policies: dict[str, Any]) -> str:
    rows = []
    for name, found in policies.items():
        lost = [last - best for last, best in zip(found["gold"], found["best gold"], strict=True)]
        numbers = [f"{fmean(found['accuracy']):.3f}", spread(found["best gold"]), spread(found["gold"])]
        rows.append([name, *numbers, f"{fmean(lost):+.3f}", f"{fmean(found['KL']):.1f}"])
    return table(["reward model of", "its accuracy", "best gold on the way", "gold at the end", "lost", "KL"], rows)


def blocks() -> dict[str, str]:
    """The generated parts of the page, by name."""
    ablations, trl, sentiment, arithmetic, pushed = map(read, EXPERIMENTS)
    return {
        "about ablations": about(ablations),
        "ablations": ablations_table(ablations["policies"]),
        "about peers": about(trl),
        "peers": peers_table(ablations["policies"], trl["policies"]),
        "about sentiment": about(sentiment),
        "judges": judges_table(sentiment["judges"]),
        "sentiment": sentiment_table(sentiment),
        "reward models": reward_table(sentiment["reward_model"], sentiment["about"]["seeds"]),
        "about arithmetic": about(arithmetic),
        "arithmetic": arithmetic_table(arithmetic["policies"]),
        "about over optimisation": about(pushed),
        "over optimisation": over_optimisation_table(pushed["policies"]),
    }


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), blocks()), encoding="utf-8")


if __name__ == "__main__":
    main()
