"""A made-up instruction task whose answers a rule can grade: "Name four fruits, but not apple." -> "fig, pear, plum, kiwi."

Three parts, top to bottom:

  1. prompts          16 kinds x 4 counts (word or digit) x phrasings x politeness x an optional excluded item
  2. the rule         `gold(prompt, response)` in [0, 1], the number that the whole pipeline is meant to raise
  3. the generator    demonstrations, preference pairs, rankings and prompts as rows, from explicit random.Random objects

Answers come from one mixed-quality distribution (`draw_answer`), in demonstrations as in pairs and rankings: about half
are right, the others are short, long, repetitive, off topic, or name the excluded item. Fine-tuning imitates that mix,
mean gold 0.70 to 0.75; doing better takes a reward model and PPO. One item too many costs what one too few costs, so
"the longer answer wins" is no shortcut.

Left out on purpose: no system prompt, no multi-turn, no free text. Each would cost minutes of training and test nothing new.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass

KINDS: dict[str, tuple[str, ...]] = {
    kind: tuple(items.split())
    for kind, items in {
        "fruits": "apple pear plum fig cherry grape lemon mango peach banana",
        "animals": "dog cat horse cow goat sheep lion tiger bear wolf",
        "birds": "robin crow owl eagle swan heron sparrow finch falcon gull",
        "trees": "oak elm ash birch maple pine cedar willow beech spruce",
        "flowers": "rose tulip lily daisy iris violet poppy orchid lotus peony",
        "colors": "red blue green yellow purple brown black white pink grey",
        "metals": "iron copper zinc tin lead silver gold nickel cobalt titanium",
        "tools": "hammer saw drill pliers wrench chisel file axe shovel rake",
        "sports": "tennis soccer hockey golf rugby cricket boxing rowing judo fencing",
        "countries": "France Spain Italy Norway Japan Peru Kenya Egypt India Cuba",
    }.items()
}
COUNTS: dict[str, int] = {"two": 2, "three": 3, "four": 4, "five": 5, "2": 2, "3": 3, "4": 4, "5": 5}
KIND_OF: dict[str, str] = {item: kind for kind, items in KINDS.items() for item in items}

VERBS = ("Name", "List", "Give", "Write", "Find", "Pick", "State", "Suggest", "Choose", "Mention", "Type", "Show")
POLITENESS = ("{}", "{}, please", "Please {}")
OPENERS = ("{}, starting with {}.", "{}, beginning with {}.", "{}, first {}.")

REPEAT_COST = 0.10
OFF_TOPIC_COST = 0.10
OPENER_COST = 0.25
NO_FULL_STOP_COST = 0.10

OPENER_SHARE = 0.5  # of prompts; the others name no excluded item
FLAW_WEIGHTS = (0.53, 0.36, 0.11)  # of no flaw, one and two in an answer
MIN_GAP = 0.09  # answers whose gold differs by less than this are a tie to the labeller and never compared
LABEL_SCALE = 0.16  # of the labeller's logistic noise, in units of gold


# ---- prompts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What a prompt asks for."""

    kind: str
    count: int
    opener: str | None


def draw_prompt(rng: random.Random) -> str:
    """One prompt, for example "Please list 3 birds, except owl."."""
    kind = rng.choice(list(KINDS))
    polite = rng.choice(POLITENESS)
    verb = rng.choice(VERBS)
    sentence = polite.format(f"{verb if polite.startswith('{') else verb.lower()} {rng.choice(list(COUNTS))} {kind}")
    if rng.random() < OPENER_SHARE:
        return rng.choice(OPENERS).format(sentence, rng.choice(KINDS[kind]))
    return f"{sentence}."


def draw_prompts(num: int, rng: random.Random) -> list[str]:
    """`num` different prompts, in the order in which they were drawn."""
    prompts: dict[str, None] = {}
    while len(prompts) < num:
        prompts[draw_prompt(rng)] = None
    return list(prompts)


def parse_prompt(prompt: str) -> Request:
    """The request behind a prompt: its one kind, its one count and the item it excludes, if any."""
    words = re.findall(r"\w+", prompt)
    kinds = [word for word in words if word in KINDS]
    counts = [COUNTS[word] for word in words if word in COUNTS]
    openers = [word for word in words if word in KIND_OF]
    if len(kinds) != 1 or len(counts) != 1 or len(openers) > 1:
        raise ValueError(f"not a prompt of this task (one kind, one count, at most one excluded item): {prompt!r}")
    return Request(kinds[0], counts[0], openers[0] if openers else None)


# ---- the rule -------------------------------------------------------------------------------------------------------


def gold(prompt: str, response: str) -> float:
    """The grade of a response, in [0, 1].

    The response loses its surrounding white space and its final full stop and is split at commas; a piece that is no item
    of the task (empty, two words, a word that nobody knows) is off topic. With n items asked for and t pieces given:

        valid      different items of the right kind, the excluded one not counted
        surplus    max(t - n, 0)
        gold     = (min(valid, n) - surplus) / n
                   - 0.10 for each repeat of an earlier piece
                   - 0.10 for each piece that is off topic
                   - 0.25 if the excluded item is named
                   - 0.10 if the final full stop is missing
                   and 0 where that is negative.

    A repeated, off-topic or excluded item also does not count as valid, so in an answer of the right length it costs 1/n on
    top. "Name four fruits, but not apple." graded:

        "fig, pear, plum, kiwi."         4/4                 = 1.00
        "fig, pear, plum."               3/4                 = 0.75     one too few
        "fig, pear, plum, kiwi, peach."  (4 - 1)/4           = 0.75     one too many costs the same
        "fig, pear, plum, fig."          3/4 - 0.10          = 0.65
        "fig, pear, plum, dog."          3/4 - 0.10          = 0.65
        "fig, pear, plum, apple."        3/4 - 0.25          = 0.50
        "fig, pear, plum, kiwi"          4/4 - 0.10          = 0.90
    """
    request = parse_prompt(prompt)
    text = response.strip()
    if not text:
        return 0.0
    pieces = [piece.strip() for piece in text.removesuffix(".").split(",")]
    different = set(pieces)
    off_topic = sum(KIND_OF.get(piece) != request.kind for piece in different)
    wrong_opener = request.opener is not None and pieces[0] != request.opener
    num_valid = len(different) - off_topic
    surplus = max(len(pieces) - request.count, 0)
    grade = (min(num_valid, request.count) - surplus) / request.count
    grade -= REPEAT_COST * (len(pieces) - len(different))
    grade -= OFF_TOPIC_COST * off_topic
    grade -= OPENER_COST * wrong_opener
    grade -= NO_FULL_STOP_COST * (not text.endswith("."))
    return max(grade, 0.0)


def gold_scores(prompts: list[str], responses: list[str]) -> list[float]:
    """The grade of every response: the signature of any grader in this project."""
    return [gold(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


# ---- the generator --------------------------------------------------------------------------------------------------


def draw_answer(prompt: str, rng: random.Random) -> str:
    """An answer of mixed quality: right in about half of the draws, otherwise with one flaw or, seldom, two."""
    request = parse_prompt(prompt)
    first = request.opener or rng.choice(KINDS[request.kind])
    others = [item for item in KINDS[request.kind] if item != first]
    items = _in_order([first, *rng.sample(others, request.count - 1)])
    num_flaws = rng.choices((0, 1, 2), weights=FLAW_WEIGHTS)[0]
    flaws = ["length", "repeat", "off_topic"] + ["opener"] * (request.opener is not None)
    for flaw in rng.sample(flaws, num_flaws):
        _spoil(items, flaw, request, rng)
    return ", ".join(items) + "."


def _spoil(items: list[str], flaw: str, request: Request, rng: random.Random) -> None:
    """Put one flaw into `items`, in place."""
    place = rng.randrange(len(items))
    unused = [item for item in KINDS[request.kind] if item not in items]
    if flaw == "length":
        change = rng.choice((1, 1, 2))
        if rng.random() < 0.5:
            items[:] = _in_order(items + rng.sample(unused, change))
        else:
            del items[max(len(items) - change, 1) :]
    elif flaw == "repeat":
        items[place] = items[place - 1] if place else items[min(1, len(items) - 1)]
    elif flaw == "opener":
        items[0] = rng.choice(unused)
        items[:] = _in_order(items)
    else:
        # The strangers share one kind: an answer that drifts off, rather than random words.
        kind = rng.choice([kind for kind in KINDS if kind != request.kind])
        num_strangers = rng.randint(1, len(items))
        items[len(items) - num_strangers :] = _in_order(rng.sample(KINDS[kind], num_strangers))


def _in_order(items: list[str]) -> list[str]:
    """`items` in alphabetical order from the first one on, wrapping round: fig apple pear -> fig pear apple."""
    return sorted(items, key=lambda item: (item < items[0], item))


def draw_comparable(prompt: str, num: int, rng: random.Random) -> list[str]:
    """`num` answers to one prompt, in random order, whose gold differs by at least MIN_GAP between any two."""
    while True:
        answers: list[str] = []
        for _ in range(8 * num):
            answer = draw_answer(prompt, rng)
            if all(abs(gold(prompt, answer) - gold(prompt, other)) >= MIN_GAP for other in answers):
                answers.append(answer)
            if len(answers) == num:
                rng.shuffle(answers)
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
    """SFT rows {"prompt", "response"}; prompts come round again when `num` exceeds them."""
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
    """Rankings {"prompt", "responses": 3 or 4 answers, "ranks": 0 = best}, labelled as in `rank`."""
    rows = []
    for prompt in _cycle(prompts, num, rng):
        answers = draw_comparable(prompt, rng.choice((3, 4)), rng)
        rows.append({"prompt": prompt, "responses": answers, "ranks": rank(prompt, answers, rng, scale)})
    return rows


def _cycle(prompts: list[str], num: int, rng: random.Random) -> list[str]:
    """`num` prompts: whole shuffled passes over `prompts`, the last one cut off."""
    drawn: list[str] = []
    while len(drawn) < num:
        drawn.extend(rng.sample(prompts, len(prompts)))
    return drawn[:num]


# ---- the whole data set ---------------------------------------------------------------------------------------------


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
    "small": Sizes(7000, 1000, sft=6000, preference=12000, ranking=3000, prompts=4000, heldout=500),
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
