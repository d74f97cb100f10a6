"""The words of the documentation: one table of idioms, and what to say instead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
# Where the rule holds; code joins by its folder ("tristage/**/*.py").
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "configs/**/README.md", "step*/README.md")
PAGES += ("tests/README.md",)

UNITS = "GPU|node|rank|host|response|answer|prompt|token|row|step|iteration|epoch|rollout|parameter|second|file|run"
COUNTED = "GiB|MiB|bytes?|tokens?|nats|rows?|steps?|seconds?|ms|responses?|answers?|lines?|copies|times|mean|ranks?"
# What is not to be said (a regular expression) -> what to say.
IDIOMS = {
    r"mend(s|ed|ing)?": "fix",
    r"besides?": "next to, also",
    r"(?<!there )(?:is|are|was|were) no(?! longer)": "is not a",
    r"(?:stands?|stood|standing) still": "makes no progress",
    r"signs? of life": "heartbeat",
    r"laws?": "distribution",
    r"fore(?:tells?|told)": "predict",
    r"for want of": "to save, for lack of",
    r"for ever": "forever",
    r"so many-th": "every N-th",
    rf"(?<!which )(?:{COUNTED}) an? (?:{UNITS})": "per",
}


def paragraphs(page: str) -> Iterator[str]:
    """The prose: without fenced blocks (commands, printed output), code in backticks and words that are quoted."""
    page = re.sub(r"^ *```.*?^ *```", "", page, flags=re.MULTILINE | re.DOTALL)
    for paragraph in re.split(r"\n\s*\n", re.sub(r"`[^`\n]*`|\"[^\"\n]*\"", "", page)):
        yield " ".join(paragraph.split())


def idioms(page: str) -> Iterator[str]:
    for paragraph in paragraphs(page):
        for idiom, instead in IDIOMS.items():
            for match in re.finditer(rf"\b(?:{idiom})\b", paragraph, flags=re.IGNORECASE):
                yield f"{match[0]!r}: say {instead!r}"


@pytest.mark.parametrize(
    ("page", "found"),
    [
        ("Mend it beside\nthat.", ["Mend", "beside"]),
        ("This is no tensor; there is no such file; it is no longer so.", ["is no"]),
        ("21 GiB a GPU, one row\nan iteration, 21 GiB per GPU\n\n## Rows\n\nA row", ["GiB a GPU", "row an iteration"]),
        ("It says which rows a step reads: 8 rows a step.", ["rows a step"]),
        ('Not "GiB a GPU", nor `mend`.\n```\nnats an answer\n```\nAmendments, lawful.', []),
    ],
)
def test_idioms_are_seen(page: str, found: list[str]) -> None:
    assert [line.split("'")[1] for line in idioms(page)] == found


@pytest.mark.parametrize("page", sorted(path for pattern in PAGES for path in REPO.glob(pattern)), ids=str)
def test_a_page_is_plain_english(page: Path) -> None:
    assert list(idioms(page.read_text(encoding="utf-8"))) == []
