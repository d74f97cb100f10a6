"""Which DeepSpeed engines a run has: one description for building, planning and every check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # settings.py describes its engines with these classes
    from tristage.config.settings import LoraSettings, OptimizerSettings

Holds = Literal["policy", "reward_model", "new_reward_model"]  # the last: either of them, to make a scorer of


@dataclass(frozen=True)
class EngineSpec:
    """One engine: the model that it starts from, how DeepSpeed shards it, and whether it learns."""

    name: str  # "model", "actor", "critic", "reference" or "reward"
    prefix: str  # of its keys: "", "actor." and so on
    path: str  # folder or id of the model
    path_key: str  # the key that names it, which is another engine's where this one has no `model` of its own
    holds: Holds  # what the folder must hold
    deepspeed: str  # the DeepSpeed JSON
    tokens: int  # of the longest row
    rows: int  # of a forward on one rank
    scored: int  # tokens of a row whose logits are asked for
    optimizer: OptimizerSettings | None = None  # None: frozen
    gradient_checkpointing: bool = False
    lora: LoraSettings | None = None
    quantize: Literal["nf4"] | None = None  # of a frozen model too: the reference is stored like the policy
    value_head: bool = False  # a second head, on a policy
    entropy: bool = False  # a term of the loss
    averaged: bool = False  # a moving average of its weights is kept
    freed_before_training: bool = False
    own_tokenizer: bool = False  # its rows are cut to what the model can read
    trust_remote_code: bool = False

    @property
    def frozen(self) -> bool:
        return self.optimizer is None

    @property
    def scalar_head(self) -> bool:
        return self.holds != "policy"

    @property
    def positions(self) -> int:
        """Tokens that the model must be able to read."""
        return 1 if self.own_tokenizer else self.tokens

    def key(self, name: str) -> str:
        """The dotted key of one of its settings."""
        return self.prefix + name


@dataclass(frozen=True)
class RolloutSpec:
    """How a run samples from its first engine."""

    rows: int  # of an iteration, over all ranks
    rows_at_once: int  # that one rank decodes
    tokens: int  # of a row, prompt and response
    gather_weights: Literal["auto", "never"]
