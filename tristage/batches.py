"""The typed tensors that flow from the data into the steps.

B rows, N answers (all those of one prompt together), T columns, P prompt columns. Every mask is bool and True
on a real token; masks are made from lengths and travel with the ids, they are never rebuilt from ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.nn import functional

BatchType = TypeVar("BatchType", bound="_Batch")


class _Batch:
    """Base of every batch."""

    def to(self: BatchType, device: torch.device | str) -> BatchType:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # every subclass below is a dataclass
        values = {field.name: getattr(self, field.name) for field in fields}
        return type(self)(
            **{name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in values.items()}
        )


@dataclass(frozen=True, eq=False)
class SFTBatch(_Batch):
    """Prompts with their answers, right padded."""

    input_ids: torch.Tensor  # [B,T] long
    attention_mask: torch.Tensor  # [B,T] bool
    loss_mask: torch.Tensor  # [B,T] bool, True on answers and their EOS; all False in a filler row
    position_ids: torch.Tensor | None = None  # [B,T] long where rows are packed: 0 where an example starts


@dataclass(frozen=True, eq=False)
class PreferenceBatch(_Batch):
    """Prompts with several ranked answers each, one answer per row, right padded."""

    input_ids: torch.Tensor  # [N,T] long
    attention_mask: torch.Tensor  # [N,T] bool
    answer_mask: torch.Tensor  # [N,T] bool, True on the answer and its EOS
    prompt_index: torch.Tensor  # [N] long, the prompt of each answer: 0..prompts-1, ascending
    ranks: torch.Tensor  # [N] float32, 0 is the best answer
    is_real: torch.Tensor  # [prompts] bool, False for a filler prompt


@dataclass(frozen=True, eq=False)
class PromptBatch(_Batch):
    """Prompts to answer, left padded so that every response starts in the same column."""

    input_ids: torch.Tensor  # [B,P] long
    attention_mask: torch.Tensor  # [B,P] bool
    draw_index: torch.Tensor  # [B] long, the response's number among the iteration's of all ranks; -1 in a filler row
    is_real: torch.Tensor  # [B] bool, False for a filler row
    turns: Sequence[Sequence[dict[str, str]] | None] | None = None  # [B] roles and texts of each prompt, if requested
    labels: Sequence[dict[str, Any]] | None = None  # [B] each prompt's other columns, if requested; {} in a filler row


def trim_columns(mask: torch.Tensor) -> slice:
    """The smallest range of columns of `mask` [B,T] that holds every real token of every row.

    [[0,1,1,0],      columns 1 and 2 hold all the real tokens: slice(1, 3), and
     [0,0,1,0]]      `input_ids[:, trim_columns(mask)]` cuts what is padding in every row.
    """
    real_columns = mask.any(dim=0).nonzero().flatten().tolist()
    assert real_columns, "a batch without a single real token"
    return slice(real_columns[0], real_columns[-1] + 1)


@dataclass(frozen=True, eq=False)
class Sequences:
    """Prompts with their sampled responses: left-padded prompt, response up to its first stop id, padding."""

    input_ids: torch.Tensor  # [B,P+R] long
    attention_mask: torch.Tensor  # [B,P+R] bool
    stop_ids: tuple[int, ...]  # what ends a response: EOS, and `rollout.stop_token_ids`
    prompt_columns: int  # P

    @property
    def response_mask(self) -> torch.Tensor:
        """[B,R] bool, True up to and including the first stop id."""
        return self.attention_mask[:, self.prompt_columns :]

    @property
    def prompt_mask(self) -> torch.Tensor:
        """[B,P] bool."""
        return self.attention_mask[:, : self.prompt_columns]

    @property
    def responses(self) -> torch.Tensor:
        """[B,R] long."""
        return self.input_ids[:, self.prompt_columns :]

    @property
    def ended(self) -> torch.Tensor:
        """[B] bool, True where the response has a stop id: it was not cut off."""
        stop_ids = torch.tensor(self.stop_ids, device=self.responses.device)
        return (torch.isin(self.responses, stop_ids) & self.response_mask).any(dim=1)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Sequences:
        """The same with `function` applied to both tensors."""
        return dataclasses.replace(
            self, input_ids=function(self.input_ids), attention_mask=function(self.attention_mask)
        )

    def micro_batch(self, rows: torch.Tensor) -> MicroBatch:
        """Some rows, without the columns that are padding in all of them."""
        columns = trim_columns(self.attention_mask[rows])
        mask = self.attention_mask[rows][:, columns]
        return MicroBatch(
            self.input_ids[rows][:, columns], mask, self.prompt_columns - columns.start, self.response_mask.shape[1]
        )


@dataclass(frozen=True, eq=False)
class Sampled:
    """One rank's sampled responses, and what the backend that sampled them says of its own distribution."""

    sequences: Sequences
    logprobs: torch.Tensor  # [B,R] float32 at the sampling temperature, before top_p and top_k; 0 outside the mask
    entropy: torch.Tensor | None  # [B,R] of the same; None where the backend does not give it
    weights_version: int  # iterations of training behind the weights that sampled


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Rows of `Sequences` with T <= P+R columns left, and the offsets to map results back to [b,R]."""

    ids: torch.Tensor  # [b,T] long
    mask: torch.Tensor  # [b,T] bool
    prompt_columns: int
    response_columns: int  # R of the `Sequences`, to which `align` pads

    @property
    def score_mask(self) -> torch.Tensor:
        """[b,T] bool, True on response tokens."""
        columns = torch.arange(self.mask.shape[1], device=self.mask.device)
        return self.mask & (columns >= self.prompt_columns)

    def align(self, x: torch.Tensor) -> torch.Tensor:
        """x [b,T-1], whose column t belongs to token t+1 -> [b,R]."""
        response = x[:, self.prompt_columns - 1 :]
        return functional.pad(response, (0, self.response_columns - response.shape[1]))

    def before_response(self, values: torch.Tensor) -> torch.Tensor:
        """values [b,T] of the states that end in each token -> [b,R]: of the state before each response token."""
        return self.align(values[:, :-1])


@dataclass(frozen=True, eq=False)
class Experience:
    """One iteration's scored rollout, all N rows of all ranks; everything [N,R] is response-aligned."""

    sequences: Sequences
    logprobs: torch.Tensor  # [N,R] of the policy that sampled
    ref_logprobs: torch.Tensor  # [N,R]
    values: torch.Tensor  # [N,R] of the state before each token
    advantages: torch.Tensor  # [N,R] whitened over all rows
    returns: torch.Tensor  # [N,R]
    kl_coef: float = 0.0  # of this iteration
    updates_once: bool = False  # by the weights that sampled: the update's forward gives their log-probabilities too
    sampled_logprobs: torch.Tensor | None = None  # [N,R] as the backend gave them, where `logprobs` are not those

    @property
    def mask(self) -> torch.Tensor:
        """[N,R] bool."""
        return self.sequences.response_mask
