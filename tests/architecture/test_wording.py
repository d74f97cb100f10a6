"""The words of documentation and code: one table of idioms, and what to say instead."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
# Where the rule holds. Of a Python file its strings, docstrings among them, and its comments are read.
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "configs/**/README.md", "step*/README.md")
PAGES += ("tests/README.md",)
CODE = ("tristage/**/*.py", "step*/*.py", "benchmarks/*.py")

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


def prose(source: str) -> str:
    """The strings and comments of Python code, each a paragraph; comments on lines in a row are one, too."""
    comments: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, text = token.start[0], token.string.lstrip("# ")
            comments[line] = f"{comments.pop(line - 1, '')} {text}"
    return "\n\n".join([*strings(ast.parse(source)), *comments.values()])


def strings(node: ast.AST) -> Iterator[str]:
    """Every string of a tree; an f-string with `{}` for its values."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    else:
        for child in ast.iter_child_nodes(node):
            yield from strings(child)


def test_strings_and_comments_of_code_are_read() -> None:
    source = "mend = 1  # it is no\n# tensor\nsay(f'{mend} GiB a GPU' ' beside')\n\ndef f():\n    'Waits for ever.'\n"
    assert [line.split("'")[1] for line in idioms(prose(source))] == ["beside", "GiB a GPU", "for ever", "is no"]


@pytest.mark.parametrize("page", sorted(path for pattern in PAGES for path in REPO.glob(pattern)), ids=str)
def test_a_page_is_plain_english(page: Path) -> None:
    assert list(idioms(page.read_text(encoding="utf-8"))) == []


def test_code_is_plain_english() -> None:
    files = {str(path.relative_to(REPO)): path for pattern in CODE for path in REPO.glob(pattern)}
    said = {name: list(idioms(prose(path.read_text(encoding="utf-8")))) for name, path in sorted(files.items())}
    assert len(files) > 100 and {name: found for name, found in said.items() if found} == {}
