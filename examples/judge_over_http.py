"""A reward that a language model behind an OpenAI-compatible HTTP server gives, such as vLLM on the same machine.

    JUDGE_URL=http://127.0.0.1:8000/v1 JUDGE_MODEL=judge bash launch/step3_ppo.sh config.yaml \\
        "reward.functions=[{function: 'examples.judge_over_http:judge', timeout_seconds: 120, retries: 5}]"

Each rank sends its responses, a few at a time. What the judge said of a prompt and its response is kept in an SQLite
file, $JUDGE_CACHE, by default judge.sqlite: a run that starts again asks nothing twice, and ranks may share the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import urllib.request
from concurrent.futures import ThreadPoolExecutor

QUESTION = """Rate the answer to the message below from 0 (useless) to 10 (perfect). Reply with the number alone.

Message: {prompt}

Answer: {response}"""
AT_ONCE = 8
SECONDS = 30  # that one request may take


def judge(prompts: list[str], responses: list[str]) -> tuple[list[float], dict[str, list[float | None]]]:
    """A score from 0 to 1 of each response; and the share of replies that had no number, which score 0."""
    questions = [QUESTION.format(prompt=p, response=r) for p, r in zip(prompts, responses, strict=True)]
    with Cache(os.environ.get("JUDGE_CACHE", "judge.sqlite")) as cache, ThreadPoolExecutor(AT_ONCE) as pool:
        known = {question: cache.get(question) for question in questions}
        missing = [question for question, reply in known.items() if reply is None]
        for question, reply in zip(missing, pool.map(ask, missing), strict=True):
            cache.put(question, reply)  # one by one: a failure loses none of the replies before it
            known[question] = reply
    numbers = [re.search(r"\d+(\.\d+)?", str(known[question])) for question in questions]
    scores = [0.0 if number is None else min(float(number[0]), 10.0) / 10 for number in numbers]
    return scores, {"unreadable": [float(number is None) for number in numbers]}


def ask(question: str) -> str:
    """The judge's reply. Raises OSError: no server, an error of it, or no reply in time."""
    body = {
        "model": os.environ["JUDGE_MODEL"],
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 8,
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('JUDGE_KEY', 'none')}"}
    url = f"{os.environ['JUDGE_URL'].rstrip('/')}/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=SECONDS) as found:
        return str(json.load(found)["choices"][0]["message"]["content"])


class Cache:
    """Replies by question and judge, in an SQLite file."""

    def __init__(self, path: str) -> None:
        self.base = sqlite3.connect(path, timeout=60, isolation_level=None)
        self.base.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT)")

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *error: object) -> None:
        self.base.close()

    def get(self, question: str) -> str | None:
        row = self.base.execute("SELECT reply FROM replies WHERE key = ?", (key_of(question),)).fetchone()
        return None if row is None else str(row[0])

    def put(self, question: str, reply: str) -> None:
        self.base.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key_of(question), reply))


def key_of(question: str) -> str:
    return hashlib.sha256(f"{os.environ['JUDGE_MODEL']}\n{question}".encode()).hexdigest()
