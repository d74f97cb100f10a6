"""Who says whether an answer is favourable: three judges that neither the reward model nor a policy has seen.

`Rotten Tomatoes` is a classifier of words, trained on sentences of another site. `VADER` is a lexicon with rules
(Hutto and Gilbert 2014). `other reviews` is the same classifier trained on the half of IMDB that no step reads.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from results.assets import Review, read_reviews
from results.sentiment_data import excerpt, split_reviews

WORDS = 18  # of a review that a judge reads: as many as 24 tokens have
EXCERPTS = 3  # of each review


class Judges:
    """Trained when made, in about a minute."""

    def __init__(self) -> None:
        reviews, rng = split_reviews(read_reviews("imdb")), random.Random(2)
        self.heldout = _excerpts(reviews["heldout"], rng)
        self.classifiers = {
            "Rotten Tomatoes": _classifier(read_reviews("rotten_tomatoes")),
            "other reviews": _classifier(_excerpts(reviews["judge"], rng)),
        }
        self.vader = SentimentIntensityAnalyzer()

    def grade(self, texts: Sequence[str]) -> dict[str, list[float]]:
        """Judge -> a number of each text from 0, unfavourable, to 1."""
        found = {name: made.predict_proba(list(texts))[:, 1].tolist() for name, made in self.classifiers.items()}
        return found | {"VADER": [(self.vader.polarity_scores(text)["compound"] + 1) / 2 for text in texts]}

    def accuracy(self) -> dict[str, dict[str, float]]:
        """Judge -> on excerpts of the held-out reviews: share on the right side of 0.5, and mean of either kind."""
        positive = np.array([review.positive for review in self.heldout])
        return {
            name: {
                "accuracy": float(((np.array(grades) > 0.5) == positive).mean()),
                "of favourable reviews": float(np.array(grades)[positive].mean()),
                "of unfavourable reviews": float(np.array(grades)[~positive].mean()),
            }
            for name, grades in self.grade([review.text for review in self.heldout]).items()
        }


def distinct_2(texts: Sequence[str]) -> float:
    """Different pairs of words over all pairs of words (Li et al. 2016): near 0 if all answers are alike."""
    pairs = [pair for text in texts for pair in pairwise(text.lower().split())]
    return len(set(pairs)) / max(len(pairs), 1)


def _excerpts(reviews: Sequence[Review], rng: random.Random) -> list[Review]:
    """Some words of each review, a few times."""
    return [
        Review(" ".join(excerpt(review, rng).split()[:WORDS]), review.positive)
        for review in reviews
        for _ in range(EXCERPTS)
    ]


def _classifier(reviews: Sequence[Review]) -> Pipeline:
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    made = make_pipeline(words, LogisticRegression(C=3.0, max_iter=1000))
    return made.fit([review.text for review in reviews], [review.positive for review in reviews])


def main() -> None:
    for name, found in Judges().accuracy().items():
        print(name, {key: round(value, 3) for key, value in found.items()})


if __name__ == "__main__":
    main()
