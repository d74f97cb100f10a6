"""What the reference model says of the answers: asked batch by batch, or of all rows once before training.

    OUT/reference/<key>.npz      log-probabilities, keyed by the reference model, the rows and the precision
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from step2_dpo.config import DPOConfig
from tristage import dist
from tristage.batches import PreferenceBatch
from tristage.config import BatchPlan, require_folder_or_hub_id
from tristage.data.collate import collate_ranking, pick
from tristage.data.loader import evaluation_rows
from tristage.data.sets import fingerprint
from tristage.data.store import Rows
from tristage.data.template import read_template
from tristage.engine import free_weights, frozen_engine
from tristage.models.causal_lm import load_causal_lm
from tristage.models.kernels import check_kernels
from tristage.models.loading import check_model
from tristage.models.opening import check_vocabulary
from tristage.models.tokenizer import load_tokenizer, require_same_tokenizer
from tristage.storage.durable import explain_disk_errors
from tristage.training import setup

MicroBatch = Sequence[int | None]
Reference = Callable[[MicroBatch, PreferenceBatch], torch.Tensor | None]
"""(rows of a micro-batch, their batch) -> [N], the reference's log-probability of each answer; None where a loss
needs none."""


class References(NamedTuple):
    """One for the training rows, one for the held-out ones."""

    train: Reference
    heldout: Reference


def check_reference(settings: DPOConfig, plan: BatchPlan, tokenizer: Any) -> dict[str, Any] | None:
    """The reference's DeepSpeed config, after making sure that its folder is there and fits; None without one.

    Raises:
        UserError: ZeRO 1 or 2, which shard what a frozen model lacks; no such folder; another tokenizer.
    """
    if settings.reference is None:
        return None
    config = setup.frozen_config(settings, settings.reference.deepspeed, "reference.deepspeed", plan)
    path = settings.reference_path
    require_folder_or_hub_id(path, settings, "reference.model")
    trust: Any = {"trust_remote_code": settings.trust_remote_code}
    theirs = load_tokenizer(path, read_template(settings), **trust)
    require_same_tokenizer({f"model ({settings.model})": tokenizer, f"reference.model ({path})": theirs})
    model = check_model(path, settings.max_tokens, "policy", **trust)
    check_vocabulary(model, theirs)
    check_kernels(settings, path, model, **trust)
    return config


def answer_logprobs(engine: Any, batch: PreferenceBatch) -> torch.Tensor:
    """[N] float32: the log-probability of each answer, summed over its tokens and its EOS."""
    return engine(batch.input_ids, batch.attention_mask, batch.answer_mask)[0].sum(dim=1)


def no_reference(micro: MicroBatch, batch: PreferenceBatch) -> None:
    """SimPO's."""


def make_references(
    settings: DPOConfig,
    config: dict[str, Any] | None,
    tokenizer: Any,
    rows: Rows,
    heldout: Rows,
    device: torch.device,
) -> References:
    """What the loss needs of the reference: nothing, the model itself, or what it said of all rows. A collective."""
    if config is None:
        return References(no_reference, no_reference)
    if not settings.precompute_reference:
        asked = ask_reference(settings, config, tokenizer)
        return References(asked, asked)
    file = Path(settings.output) / "reference" / f"{_key(settings, [rows, heldout])}.npz"
    # Rank 0's file alone counts: nodes may share no disk.
    known = dist.gather_objects(_load(file) if dist.is_main() else None)[0]
    if known is None:
        dist.print0(f"asking the reference {settings.reference_path} about all answers, once")
        asked = ask_reference(settings, config, tokenizer)
        known = [know(asked, part, settings.micro_batch, tokenizer.pad_token_id, device) for part in (rows, heldout)]
        asked.free()
        if dist.is_main():
            _save(file, known)
        dist.barrier()
    return References(*known)


def ask_reference(settings: DPOConfig, config: dict[str, Any], tokenizer: Any) -> Asked:
    """Load the reference model into an engine of its own."""
    options = setup.loading(settings, settings.lora) | {"max_tokens": settings.max_tokens}
    model = load_causal_lm(settings.reference_path, tokenizer, engine_config=config, **options)
    return Asked(frozen_engine(model, config))


class Asked:
    """The reference model itself, asked about each batch."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    @torch.no_grad()
    def __call__(self, micro: MicroBatch, batch: PreferenceBatch) -> torch.Tensor:
        return answer_logprobs(self.engine, batch)

    def free(self) -> None:
        """Give the weights' memory back."""
        free_weights(self.engine)


class Known:
    """What the reference said of every answer of some rows: those of row i are logprobs[starts[i] : starts[i + 1]]."""

    def __init__(self, logprobs: np.ndarray, starts: np.ndarray) -> None:
        self.logprobs, self.starts = logprobs, starts

    def __call__(self, micro: MicroBatch, batch: PreferenceBatch) -> torch.Tensor:
        """[N], on the batch's device; 0 for the answers of a filler."""
        found = np.zeros(len(batch.prompt_index), np.float32)
        prompt_index = batch.prompt_index.cpu().numpy()
        for prompt, row in enumerate(micro):
            if row is not None:
                found[prompt_index == prompt] = self.logprobs[self.starts[row] : self.starts[row + 1]]
        return torch.from_numpy(found).to(batch.input_ids.device)


def know(asked: Reference, rows: Rows, micro_batch: int, pad_id: int, device: torch.device) -> Known:
    """Ask about every answer of `rows` once, over all ranks; all ranks then know all. A collective."""
    said: list[np.ndarray] = [np.zeros(0, np.float32)]
    of_row: list[np.ndarray] = [np.zeros(0, np.int64)]
    for micro in evaluation_rows(rows.lengths, micro_batch, dist.world_size(), dist.rank()):
        batch = collate_ranking(pick(rows, micro), pad_id)
        real = batch.is_real[batch.prompt_index]
        logprobs = asked(micro, batch.to(device))
        assert logprobs is not None
        said.append(logprobs.cpu()[real].numpy())
        of_row.append(np.array([-1 if row is None else row for row in micro])[batch.prompt_index[real].numpy()])
    parts = dist.gather_objects((np.concatenate(said), np.concatenate(of_row)))
    all_said, all_rows = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(all_rows, kind="stable")  # the answers of a row stay in their order
    return Known(all_said[order], np.searchsorted(all_rows[order], np.arange(len(rows) + 1)))


def _key(settings: DPOConfig, sets: Sequence[Rows]) -> str:
    """Of all that the numbers depend on. A folder's files are told by size and time: weights are large to read."""
    path = Path(settings.reference_path)
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else []
    known_by = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    quantize = settings.lora.quantize if settings.lora is not None else None
    parts = [settings.reference_path, known_by, fingerprint(sets), settings.precision, quantize]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _load(file: Path) -> list[Known] | None:
    if not file.is_file():
        return None
    with np.load(file) as stored:
        known = [Known(stored[f"{name}_logprobs"], stored[f"{name}_starts"]) for name in References._fields]
    dist.print0(f"what the reference said is in {file}")
    return known


def _save(file: Path, known: Sequence[Known]) -> None:
    """Renamed into place: a file of that name is whole."""
    partial = file.with_suffix(".partial.npz")
    arrays = {f"{name}_logprobs": side.logprobs for name, side in zip(References._fields, known, strict=True)}
    arrays |= {f"{name}_starts": side.starts for name, side in zip(References._fields, known, strict=True)}
    with explain_disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(partial, **arrays)  # type: ignore[arg-type]
        partial.replace(file)
