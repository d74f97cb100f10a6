"""A made-up instruction task whose answers a rule can grade: "Name four fruits." -> "fig, pear, plum, kiwi."

Three parts, top to bottom:

  1. prompts          8 kinds x 4 counts (word or digit) x 12 verbs x 6 kinds of politeness: 4,608 different ones
  2. the rule         `gold(prompt, response)` in [0, 1], the number that the whole pipeline is meant to raise
  3. the generator    demonstrations, preference pairs, rankings and prompts as rows, from random.Random objects

Answers come from one mixed-quality distribution (`draw_answer`), in demonstrations as in pairs and rankings: about
half are right, the others are short, long, repetitive or off topic. Fine-tuning imitates that mix; doing better takes
a reward model and PPO. One item too many costs what one too few costs, so "the longer answer wins" is not a shortcut.

Left out on purpose: system prompts, dialogues, free text. Each would cost minutes of training and test nothing new.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass

KINDS: dict[str, tuple[str, ...]] = {
    kind: tuple(items.split())
    for kind, items in {
        "fruits": "apple banana cherry fig grape kiwi lemon mango peach pear plum quince",
        "animals": "bear cat cow dog fox goat horse lion sheep tiger wolf zebra",
        "birds": "crow dove eagle falcon finch gull heron owl robin sparrow swan wren",
        "trees": "ash beech birch cedar elm fir maple oak pine spruce willow yew",
        "flowers": "daisy iris lily lotus orchid pansy peony poppy rose snowdrop tulip violet",
        "colors": "black blue brown green grey orange pink purple red teal white yellow",
        "tools": "axe chisel drill file hammer pliers rake saw shovel spade trowel wrench",
        "countries": "Brazil Chile Cuba Egypt France India Italy Japan Kenya Norway Peru Spain",
    }.items()
}
COUNTS: dict[str, int] = {"two": 2, "three": 3, "four": 4, "five": 5, "2": 2, "3": 3, "4": 4, "5": 5}
KIND_OF: dict[str, str] = {item: kind for kind, items in KINDS.items() for item in items}

VERBS = ("Name", "List", "Give", "Write", "Find", "Pick", "State", "Suggest", "Choose", "Mention", "Type", "Show")
POLITENESS = ("{}.", "{}, please.", "{}, thanks.", "Please {}.", "Hello, {}.", "Now {}.")

REPEAT_COST = 0.10
OFF_TOPIC_COST = 0.10
NO_FULL_STOP_COST = 0.10

FLAW_WEIGHTS = (0.45, 0.45, 0.10)  # of no flaw, one and two in an answer
MIN_GAP = 0.15  # answers whose gold differs by less than this are a tie to the labeller and never compared
LABEL_SCALE = 0.12  # of the labeller's logistic noise, in units of gold


# ---- prompts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """The kind and count that a prompt asks for."""

    kind: str
    count: int


def draw_prompt(rng: random.Random) -> str:
    """One prompt, for example "Please list 3 birds."."""
    polite, verb = rng.choice(POLITENESS), rng.choice(VERBS)
    verb = verb if polite.startswith("{") else verb.lower()
    return polite.format(f"{verb} {rng.choice(list(COUNTS))} {rng.choice(list(KINDS))}")


def draw_prompts(num: int, rng: random.Random) -> list[str]:
    """`num` different prompts, in the order in which they were drawn."""
    prompts: dict[str, None] = {}
    while len(prompts) < num:
        prompts[draw_prompt(rng)] = None
    return list(prompts)


def parse_prompt(prompt: str) -> Request:
    """The request behind a prompt, bare or in its chat template: its one kind and its one count."""
    words = re.findall(r"\w+", prompt)
    kinds = [word for word in words if word in KINDS]
    counts = [COUNTS[word] for word in words if word in COUNTS]
    if len(kinds) != 1 or len(counts) != 1:
        raise ValueError(f"not a prompt of this task (one kind and one count): {prompt!r}")
    return Request(kinds[0], counts[0])


# ---- the rule -------------------------------------------------------------------------------------------------------


def gold(prompt: str, response: str) -> float:
    """The grade of a response, in [0, 1].

    The response loses its surrounding white space and its final full stop and is split at commas. With n items asked
    for and t pieces given:

        valid      different pieces that are items of the right kind
        surplus    max(t - n, 0)
        gold     = (min(valid, n) - surplus) / n
                   - 0.10 for each repeat of an earlier piece
                   - 0.10 for each different piece that is not an item of the right kind
                   - 0.10 if the final full stop is missing
                   and 0 where that is negative.

    A repeated or off-topic piece is not valid either, so in an answer of the right length it costs 1/n on top.
    "Name four fruits." graded:

        "fig, pear, plum, kiwi."         4/4           = 1.00
        "fig, pear, plum."               3/4           = 0.75     one too few
        "fig, pear, plum, kiwi, peach."  (4 - 1)/4     = 0.75     one too many costs the same
        "fig, pear, plum, fig."          3/4 - 0.10    = 0.65
        "fig, pear, plum, dog."          3/4 - 0.10    = 0.65
        "fig, pear, plum, kiwi"          4/4 - 0.10    = 0.90
    """
    request = parse_prompt(prompt)
    text = response.strip()
    if not text:
        return 0.0
    pieces = [piece.strip() for piece in text.removesuffix(".").split(",")]
    different = set(pieces)
    off_topic = sum(KIND_OF.get(piece) != request.kind for piece in different)
    surplus = max(len(pieces) - request.count, 0)
    grade = (min(len(different) - off_topic, request.count) - surplus) / request.count
    grade -= REPEAT_COST * (len(pieces) - len(different))
    grade -= OFF_TOPIC_COST * off_topic
    grade -= NO_FULL_STOP_COST * (not text.endswith("."))
    return max(grade, 0.0)


def gold_scores(prompts: list[str], responses: list[str]) -> list[float]:
    """The grade of every response: the signature of any grader in this project."""
    return [gold(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


# ---- the generator --------------------------------------------------------------------------------------------------


def draw_answer(prompt: str, rng: random.Random) -> str:
    """An answer of mixed quality: often right, otherwise with one flaw or, seldom, two."""
    request = parse_prompt(prompt)
    items = _walk(KINDS[request.kind], None, request.count, rng)
    num_flaws = rng.choices((0, 1, 2), weights=FLAW_WEIGHTS)[0]
    for flaw in rng.sample(("length", "repeat", "off_topic"), num_flaws):
        _spoil(items, flaw, request, rng)
    return ", ".join(items) + "."


def _walk(items: tuple[str, ...], first: str | None, num: int, rng: random.Random) -> list[str]:
    """`num` items, each one or two places further round the list than the last, from `first` (None: anywhere) on.

    This habit of the answerers, which the rule neither asks for nor rewards, is what makes the task quick to learn:
    what may follow an item depends on that item alone.
    """
    place = items.index(first) if first else rng.randrange(len(items))
    walk = [items[place]]
    while len(walk) < num:
        place = (place + rng.choice((1, 2))) % len(items)
        walk.append(items[place])
    return walk


def _spoil(items: list[str], flaw: str, request: Request, rng: random.Random) -> None:
    """Put one flaw into `items`, in place."""
    if flaw == "length":
        change = rng.choice((1, 2))
        if rng.random() < 0.5:
            items += _walk(KINDS[KIND_OF[items[-1]]], items[-1], change + 1, rng)[1:]
        else:
            del items[max(len(items) - change, 1) :]
    elif flaw == "repeat":  # one item is repeated until the end
        place = rng.randrange(max(len(items) - 1, 1))
        items[place + 1 :] = [items[place]] * (len(items) - place - 1)
    else:
        # The strangers share one kind: an answer that drifts off, rather than random words.
        kind = rng.choice([kind for kind in KINDS if kind != request.kind])
        num_strangers = rng.randint(1, len(items))
        items[len(items) - num_strangers :] = _walk(KINDS[kind], None, num_strangers, rng)


def draw_comparable(prompt: str, most: int, rng: random.Random) -> list[str]:
    """Two to `most` answers to one prompt whose gold differs by at least MIN_GAP between any two.

    Fewer than `most` when so many different grades don't turn up: an answer of two items can only have a few.
    """
    answers: list[str] = []
    draws = 0
    while len(answers) < 2 or (len(answers) < most and draws < 8 * most):
        answer = draw_answer(prompt, rng)
        draws += 1
        if all(abs(gold(prompt, answer) - gold(prompt, other)) >= MIN_GAP for other in answers):
            answers.append(answer)
    return answers


def rank(prompt: str, answers: list[str], rng: random.Random, scale: float) -> list[int]:
    """The rank of each answer, 0 = best, as a labeller gives it.

    The labeller sorts by gold + scale * Gumbel noise (the Plackett-Luce model), so of two answers that differ by d the
    worse one wins with probability 1 / (1 + exp(d / scale)). scale = 0 ranks by gold itself.
    """
    noise = [-math.log(-math.log(1.0 - rng.random() + 1e-12)) if scale else 0.0 for _ in answers]
    seen = [gold(prompt, answer) + scale * extra for answer, extra in zip(answers, noise, strict=True)]
    order = sorted(range(len(answers)), key=lambda index: -seen[index])
    return [order.index(index) for index in range(len(answers))]


def make_demonstrations(prompts: list[str], num: int, rng: random.Random) -> list[dict]:
    """SFT rows {"prompt", "response"}; prompts are used again if `num` exceeds them."""
    return [{"prompt": prompt, "response": draw_answer(prompt, rng)} for prompt in _cycle(prompts, num, rng)]


def make_preferences(prompts: list[str], num: int, rng: random.Random, scale: float = LABEL_SCALE) -> list[dict]:
    """Pairs {"prompt", "chosen", "rejected"}, labelled as in `rank`."""
    rows = []
    for prompt in _cycle(prompts, num, rng):
        answers = draw_comparable(prompt, 2, rng)
        best = rank(prompt, answers, rng, scale).index(0)
        rows.append({"prompt": prompt, "chosen": answers[best], "rejected": answers[1 - best]})
    return rows


def make_rankings(prompts: list[str], num: int, rng: random.Random, scale: float = LABEL_SCALE) -> list[dict]:
    """Rankings {"prompt", "responses": 2 to 4 answers, "ranks": 0 = best}, labelled as in `rank`."""
    rows = []
    for prompt in _cycle(prompts, num, rng):
        answers = draw_comparable(prompt, 4, rng)
        rows.append({"prompt": prompt, "responses": answers, "ranks": rank(prompt, answers, rng, scale)})
    return rows


def _cycle(prompts: list[str], num: int, rng: random.Random) -> list[str]:
    """`num` prompts: shuffled passes over `prompts`, the last one cut off."""
    drawn: list[str] = []
    while len(drawn) < num:
        drawn.extend(rng.sample(prompts, len(prompts)))
    return drawn[:num]


# ---- the data set ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """How many rows each file gets."""

    train_prompts: int
    """Different prompts that training rows are made from."""
    heldout_prompts: int
    """Different prompts that held-out rows are made from; none of them is a training prompt."""
    sft: int
    """Training demonstrations."""
    preference: int
    """Training pairs."""
    ranking: int
    """Training rankings."""
    prompts: int
    """Training prompts for PPO."""
    heldout: int
    """Rows of each held-out file."""


SIZES = {
    "small": Sizes(4000, 600, sft=8000, preference=12000, ranking=3000, prompts=4000, heldout=500),
    "tiny": Sizes(700, 100, sft=600, preference=600, ranking=300, prompts=400, heldout=50),
}


def make_data(sizes: Sizes, seed: int) -> dict[str, list[dict]]:
    """Every file's rows by name, "sft.train" to "prompts.heldout".

    Prompts are divided first, so a held-out prompt is in no training file of any sort. Held-out pairs and rankings are
    labelled without noise, so that a reward model's accuracy on them is its agreement with the rule.
    """
    prompts = draw_prompts(sizes.train_prompts + sizes.heldout_prompts, random.Random(f"{seed}/prompts"))
    data: dict[str, list[dict]] = {}
    for split, own in (("train", prompts[: sizes.train_prompts]), ("heldout", prompts[sizes.train_prompts :])):
        train = split == "train"
        scale = LABEL_SCALE if train else 0.0
        num = sizes if train else Sizes(0, 0, *[sizes.heldout] * 5)
        rngs = {name: random.Random(f"{seed}/{split}/{name}") for name in ("sft", "preference", "ranking", "rollout")}
        data[f"sft.{split}"] = make_demonstrations(own, num.sft, rngs["sft"])
        data[f"preference.{split}"] = make_preferences(own, num.preference, rngs["preference"], scale)
        data[f"ranking.{split}"] = make_rankings(own, num.ranking, rngs["ranking"], scale)
        data[f"prompts.{split}"] = [{"prompt": prompt} for prompt in _cycle(own, num.prompts, rngs["rollout"])]
    return data
