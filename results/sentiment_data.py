"""Data of configs/imdb-sentiment: openings of reviews to continue, and pairs whose labels are the writers' own.

    python -m results.sentiment_data output/imdb-sentiment

Half of the reviews train (the model, the reward model, the policy), in parts that do not overlap. Of the other half
most train a judge, and the rest are held out. A pair is an excerpt of a favourable review over one of an unfavourable
review: nobody but the two writers has labelled anything.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from results.assets import Review, read_reviews, write_rows, write_smollm2

BEGINNING = "Review:"
# A review has no turns: what the roles say stands in one line.
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] if loop.first else ' ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
OPENING_WORDS, EXCERPT_WORDS = 6, 40  # an excerpt is longer than any row keeps of it
TRAIN, PARTS = 12_500, {"sft": 4_000, "pairs": 6_000, "prompts": 2_500}
JUDGE, HELDOUT = 11_500, 1_000
EXCERPTS = 2  # of each review, for pairs
REWARD_LAYERS = 6  # of 30: the reward model and the critic are a cut model, which two cores can train


def main(argv: list[str]) -> None:
    out = Path(argv[0])
    write_smollm2(out / "model", TEMPLATE)
    write_smollm2(out / "model_cut", TEMPLATE, REWARD_LAYERS)
    write_data(out / "data", split_reviews(read_reviews("imdb")))


def split_reviews(reviews: Sequence[Review]) -> dict[str, list[Review]]:
    """Part -> its reviews: sft, pairs, prompts, judge, heldout."""
    shuffled = list(reviews)
    random.Random(0).shuffle(shuffled)
    found, start = {}, 0
    for name, size in (*PARTS.items(), ("judge", JUDGE), ("heldout", HELDOUT)):
        found[name], start = shuffled[start : start + size], start + size
    return found


def write_data(folder: Path, parts: dict[str, list[Review]]) -> None:
    rng, heldout = random.Random(1), parts["heldout"]
    files = {
        "sft.train": demonstrations(parts["sft"]),
        "sft.heldout": demonstrations(heldout[: HELDOUT // 4]),
        "preference.train": pairs(parts["pairs"], rng),
        "preference.heldout": pairs(heldout, rng),
        "prompts.train": prompts(parts["prompts"]),
        "prompts.heldout": prompts(heldout[HELDOUT // 4 :]),
    }
    write_rows(folder, files)


def demonstrations(reviews: Sequence[Review]) -> Iterator[dict[str, str]]:
    """The beginning of each review as the prompt, what follows as the answer."""
    for review in reviews:
        words = review.text.split()
        response = " ".join(words[OPENING_WORDS:EXCERPT_WORDS])
        if response:
            yield {"prompt": f"{BEGINNING} {' '.join(words[:OPENING_WORDS])}", "response": response}


def prompts(reviews: Sequence[Review]) -> Iterator[dict[str, str]]:
    seen = set()
    for row in demonstrations(reviews):
        if row["prompt"] not in seen:
            seen.add(row["prompt"])
            yield {"prompt": row["prompt"]}


def pairs(reviews: Sequence[Review], rng: random.Random) -> Iterator[dict[str, str]]:
    """Excerpts that begin with a sentence, one of each kind of review."""
    good, bad = (
        [excerpt(review, rng) for review in reviews if review.positive is kind for _ in range(EXCERPTS)]
        for kind in (True, False)
    )
    rng.shuffle(good)
    rng.shuffle(bad)
    for chosen, rejected in zip(good, bad, strict=False):
        yield {"prompt": BEGINNING, "chosen": chosen, "rejected": rejected}


def excerpt(review: Review, rng: random.Random) -> str:
    """EXCERPT_WORDS words from the start of a sentence, or the end of the review where it is shorter."""
    words = review.text.split()
    starts = [0, *(i + 1 for i, word in enumerate(words) if re.search(r"[.!?][\"')]*$", word))]
    whole = [start for start in starts if start + EXCERPT_WORDS <= len(words)]
    start = rng.choice(whole) if whole else 0
    return " ".join(words[start : start + EXCERPT_WORDS])


if __name__ == "__main__":
    main(sys.argv[1:])
