"""A policy that answers dialogues and a reward model that scores them, from model folders."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tristage.algo.masking import response_mask
from tristage.data.collate import collate_prompts, collate_sft
from tristage.data.rows import PromptRow, Turn
from tristage.data.tokenize import EncodingRules, Example, encode, encode_sampled
from tristage.errors import UserError
from tristage.models.causal_lm import load_causal_lm
from tristage.models.loading import max_positions
from tristage.models.reward_model import last_token_scores, load_reward_model
from tristage.models.tokenizer import generation_stop_ids, has_template, load_tokenizer
from tristage.rollout import SamplingConfig, choose, generate_padded, row_uniforms

DRAW = 0  # row_uniforms' number of an iteration
ROWS_AT_ONCE = 32
UNLIMITED = 1_000_000  # tokens, of a model that reads any number
Dialogue = Sequence[Turn]


@dataclass(frozen=True)
class Answer:
    """A response, its tokens, and whether it ended by itself."""

    text: str
    tokens: int
    ended: bool


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """The GPU in bf16 if there is one, else the CPU in float32."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


def check_folder(path: str, what: str) -> None:
    """Raises UserError: there is no such folder, or it is not a model."""
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
        if os.path.isfile(os.path.join(path, "adapter_config.json")):
            raise UserError(f"{path}: is an adapter; merge it into its model (`tristage merge`) and give that folder")
        final = f", such as {path}/final" if os.path.isdir(os.path.join(path, "final")) else ""
        raise UserError(f"{path}: is not a model (it has no config.json); give the folder of a {what}{final}")
    if not os.path.isdir(path) and (path.startswith((".", "/", "~")) or path.count("/") != 1):
        raise UserError(f"{path}: there is no such folder; give the folder of a {what}")


class Speaker:
    """A language model that answers with its folder's own template.

    Args:
        template: the text of a chat template, for a folder without one.

    Raises:
        UserError: it is not a model, cannot be opened, or has no chat template.
    """

    def __init__(self, path: str, template: str | None = None, trust_remote_code: bool = False) -> None:
        check_folder(path, "language model")
        if template is None and not has_template(path, trust_remote_code):
            raise UserError(
                f"{path}: has no chat template, so how a dialogue is written is not known; give --template FILE, "
                "or a folder that step 1 has exported"
            )
        self.path, self.name = path, name_of(path)
        self.device, dtype = device_and_dtype()
        self.tokenizer = load_tokenizer(path, template, trust_remote_code)
        wrapper = load_causal_lm(path, self.tokenizer, dtype=dtype, trust_remote_code=trust_remote_code)
        self.model: Any = wrapper.model.to(self.device).eval()
        self.stop_ids = tuple(dict.fromkeys([int(self.tokenizer.eos_token_id), *generation_stop_ids(path)]))
        self.positions = max_positions(self.model.config) or UNLIMITED

    def limited(self, sampling: SamplingConfig) -> SamplingConfig:
        """The same, with answers of at most half of the tokens that the model reads."""
        return dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, self.positions // 2))

    def prompt(self, turns: Dialogue, room: int) -> Example:
        """The tokens of a dialogue whose next turn is the answer; its oldest are cut to leave `room` for that.

        Raises:
            UserError: the template refuses the dialogue.
        """
        rules = EncodingRules("prompt", self.positions - room, "truncate_left")
        (found,) = encode([PromptRow(tuple(turns), "the dialogue")], self.tokenizer, rules)
        if isinstance(found, Exception):
            raise UserError(str(found))
        assert isinstance(found[0], Example)
        return found[0]

    @torch.no_grad()
    def stream(self, turns: Dialogue, sampling: SamplingConfig, seed: int, row: int = 0) -> Iterator[Answer]:
        """The answer as it grows, a token at a time: the whole of it so far each time."""
        sampling = self.limited(sampling)
        uniforms = row_uniforms(seed, DRAW, torch.tensor([row]), sampling.max_new_tokens).to(self.device)
        example = self.prompt(turns, sampling.max_new_tokens)
        ids, cache = torch.tensor([example.ids], device=self.device), None
        sampled: list[int] = []
        for count in range(sampling.max_new_tokens):
            out = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
            token = choose(out.logits[:, -1], uniforms[:, count], sampling).tokens
            ids, cache = token[:, None], out.past_key_values
            sampled.append(int(token))
            ended = sampled[-1] in self.stop_ids
            yield Answer(self.text(sampled), len(sampled), ended)
            if ended:
                return

    @torch.no_grad()
    def answers(self, dialogues: Sequence[Dialogue], sampling: SamplingConfig, seed: int) -> list[Answer]:
        """An answer to each dialogue; the random numbers of a row are the same for every model."""
        found: list[Answer] = []
        sampling = self.limited(sampling)
        for start in range(0, len(dialogues), ROWS_AT_ONCE):
            rows = range(start, min(start + ROWS_AT_ONCE, len(dialogues)))
            examples = [self.prompt(dialogues[row], sampling.max_new_tokens) for row in rows]
            width, pad = max(len(example.ids) for example in examples), self.tokenizer.pad_token_id
            batch = collate_prompts(examples, list(rows), pad, width).to(self.device)
            uniforms = row_uniforms(seed, DRAW, batch.draw_index.cpu(), sampling.max_new_tokens)
            tokens, _, _ = generate_padded(
                self.model, batch.input_ids, batch.attention_mask, uniforms, sampling, self.stop_ids, pad
            )
            mask = response_mask(tokens, self.stop_ids)
            for row, real in zip(tokens, mask, strict=True):
                kept = row[real].tolist()
                found.append(Answer(self.text(kept), len(kept), kept[-1] in self.stop_ids))
        return found

    def text(self, tokens: list[int]) -> str:
        """Tokens as text; bytes that are not a character yet are left out."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).rstrip("\ufffd").strip()


class Judge:
    """A reward model that reads a dialogue and an answer in its own tokens and template.

    Raises:
        UserError: it is not a reward model, or cannot be opened.
    """

    def __init__(self, path: str, trust_remote_code: bool = False) -> None:
        check_folder(path, "reward model")
        self.path, self.name = path, name_of(path)
        self.device, dtype = device_and_dtype()
        self.tokenizer = load_tokenizer(path, None, trust_remote_code)
        self.model = load_reward_model(path, self.tokenizer, dtype=dtype, trust_remote_code=trust_remote_code)
        self.model.to(self.device).eval()
        self.limit = max_positions(self.model.model.config)

    @torch.no_grad()
    def scores(self, dialogues: Sequence[Dialogue], answers: Sequence[Answer]) -> list[float]:
        """One number per answer: the value at its last token."""
        examples = [self._example(turns, answer) for turns, answer in zip(dialogues, answers, strict=True)]
        found: list[float] = []
        for start in range(0, len(examples), ROWS_AT_ONCE):
            batch = collate_sft(examples[start : start + ROWS_AT_ONCE], self.tokenizer.pad_token_id).to(self.device)
            values = self.model(batch.input_ids, batch.attention_mask)
            found += last_token_scores(values, batch.attention_mask).tolist()
        return found

    @torch.no_grad()
    def token_values(self, turns: Dialogue, answer: Answer) -> list[tuple[str, float]]:
        """(token, value) along the answer; the last value is the score."""
        example = self._example(turns, answer)
        ids = torch.tensor([example.ids], device=self.device)
        values = self.model(ids, torch.ones_like(ids, dtype=torch.bool))[0].tolist()
        own = range(example.prompt_length, len(example.ids))
        return [(str(self.tokenizer.decode([example.ids[i]])), values[i]) for i in own]

    def _example(self, turns: Dialogue, answer: Answer) -> Example:
        return encode_sampled(turns, answer.text, answer.ended, self.tokenizer, self.limit)


def name_of(path: str) -> str:
    """A short name: of OUT/final it is OUT's."""
    folder = Path(os.path.abspath(path))
    return f"{folder.parent.name}/{folder.name}" if folder.name.startswith("final") else folder.name


def unique_names(names: Sequence[str]) -> list[str]:
    """The names with a number where one comes twice."""
    return [name if names.count(name) == 1 else f"{name} ({names[:i].count(name) + 1})" for i, name in enumerate(names)]
