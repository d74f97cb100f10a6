"""Reference log-probabilities: computed per batch, or for all rows once before training and cached.

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
from tristage.data.loader import evaluation_batches
from tristage.data.sets import fingerprint
from tristage.data.store import Rows
from tristage.data.template import read_template
from tristage.engine import free_weights, frozen_engine
from tristage.models.causal_lm import load_causal_lm
from tristage.models.tokenizer import load_tokenizer, require_same_tokenizer
from tristage.storage.durable import explain_disk_errors
from tristage.training import setup

RowNumbers = Sequence[int | None]
Reference = Callable[[RowNumbers, PreferenceBatch], torch.Tensor | None]
"""(rows of a micro-batch, their batch) -> [N], the reference's log-probability of each answer; None if the loss needs
none."""


class References(NamedTuple):
    """One for the training rows, one for the held-out ones."""

    train: Reference
    heldout: Reference


def check_reference(settings: DPOConfig, plan: BatchPlan, tokenizer: Any) -> dict[str, Any] | None:
    """The reference's DeepSpeed config, after checking that its folder exists and fits; None without a reference.

    Raises:
        UserError: ZeRO 1 or 2, which shard what a frozen model does not have; no such folder; another tokenizer.
    """
    _, *references = settings.engine_specs()
    if not references:
        return None
    (spec,) = references
    require_folder_or_hub_id(spec.path, settings, spec.path_key)
    theirs = load_tokenizer(spec.path, read_template(settings), spec.trust_remote_code)
    require_same_tokenizer({f"model ({settings.model})": tokenizer, f"reference.model ({spec.path})": theirs})
    setup.check_spec(settings, spec, theirs)
    return setup.frozen_config(settings, spec.deepspeed, spec.key("deepspeed"), plan)


def answer_logprobs(engine: Any, batch: PreferenceBatch) -> torch.Tensor:
    """[N] float32: the log-probability of each answer, summed over its tokens and its EOS."""
    return engine(batch.input_ids, batch.attention_mask, batch.answer_mask)[0].sum(dim=1)


def no_reference(micro: RowNumbers, batch: PreferenceBatch) -> None:
    """SimPO has no reference: always None."""


def make_references(
    settings: DPOConfig,
    config: dict[str, Any] | None,
    tokenizer: Any,
    rows: Rows,
    heldout: Rows,
    device: torch.device,
) -> References:
    """The reference that the loss needs: none, the model itself, or its precomputed log-probabilities. A collective."""
    if config is None:
        return References(no_reference, no_reference)
    if not settings.precompute_reference:
        live = load_reference(settings, config, tokenizer)
        return References(live, live)
    file = Path(settings.output) / "reference" / f"{_key(settings, [rows, heldout])}.npz"
    # Only rank 0's file is used: nodes may share no disk.
    cached = dist.gather_objects(_load(file) if dist.is_main() else None)[0]
    if cached is None:
        dist.print0(f"computing the log-probabilities of the reference {settings.reference_path} for all answers, once")
        live, pad_id = load_reference(settings, config, tokenizer), tokenizer.pad_token_id
        cached = [precompute(live, part, settings.micro_batch, pad_id, device) for part in (rows, heldout)]
        live.free()
        if dist.is_main():
            _save(file, cached)
        dist.barrier()
    return References(*cached)


def load_reference(settings: DPOConfig, config: dict[str, Any], tokenizer: Any) -> LiveReference:
    """Load the reference model into an engine of its own."""
    _, spec = settings.engine_specs()
    options = setup.loading(settings, spec.quantize) | {"max_tokens": spec.tokens}
    model = load_causal_lm(spec.path, tokenizer, engine_config=config, **options)
    return LiveReference(frozen_engine(model, config))


class LiveReference:
    """The reference model itself: a forward per batch."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    @torch.no_grad()
    def __call__(self, micro: RowNumbers, batch: PreferenceBatch) -> torch.Tensor:
        return answer_logprobs(self.engine, batch)

    def free(self) -> None:
        """Free the weights' memory."""
        free_weights(self.engine)


class PrecomputedReference:
    """The reference's log-probabilities of all answers: those of row i are logprobs[starts[i] : starts[i + 1]]."""

    def __init__(self, logprobs: np.ndarray, starts: np.ndarray) -> None:
        self.logprobs, self.starts = logprobs, starts

    def __call__(self, micro: RowNumbers, batch: PreferenceBatch) -> torch.Tensor:
        """[N], on the batch's device; 0 for the answers of a filler."""
        values = np.zeros(len(batch.prompt_index), np.float32)
        prompt_index = batch.prompt_index.cpu().numpy()
        for prompt, row in enumerate(micro):
            if row is not None:
                values[prompt_index == prompt] = self.logprobs[self.starts[row] : self.starts[row + 1]]
        return torch.from_numpy(values).to(batch.input_ids.device)


def precompute(
    reference: Reference, rows: Rows, micro_batch: int, pad_id: int, device: torch.device
) -> PrecomputedReference:
    """Every answer of `rows` once, divided over the ranks; every rank gets all results. A collective."""
    own: list[np.ndarray] = [np.zeros(0, np.float32)]
    of_row: list[np.ndarray] = [np.zeros(0, np.int64)]
    for micro in evaluation_batches(rows.lengths, micro_batch, dist.world_size(), dist.rank(), device.type):
        batch = collate_ranking(pick(rows, micro), pad_id)
        real = batch.is_real[batch.prompt_index]
        logprobs = reference(micro, batch.to(device))
        assert logprobs is not None
        own.append(logprobs.cpu()[real].numpy())
        of_row.append(np.array([-1 if row is None else row for row in micro])[batch.prompt_index[real].numpy()])
    parts = dist.gather_objects((np.concatenate(own), np.concatenate(of_row)))
    all_logprobs, all_rows = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(all_rows, kind="stable")  # the answers of a row stay in their order
    return PrecomputedReference(all_logprobs[order], np.searchsorted(all_rows[order], np.arange(len(rows) + 1)))


def _key(settings: DPOConfig, sets: Sequence[Rows]) -> str:
    """A hash of all that the numbers depend on. Of a folder's files, size and time: weights are large to read."""
    path = Path(settings.reference_path)
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else []
    identity = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    quantize = settings.lora.quantize if settings.lora is not None else None
    parts = [settings.reference_path, identity, fingerprint(sets), settings.precision, quantize]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _load(file: Path) -> list[PrecomputedReference] | None:
    if not file.is_file():
        return None
    with np.load(file) as stored:
        pairs = [(stored[f"{name}_logprobs"], stored[f"{name}_starts"]) for name in References._fields]
    dist.print0(f"read the reference's log-probabilities from {file}")
    return [PrecomputedReference(*pair) for pair in pairs]


def _save(file: Path, cached: Sequence[PrecomputedReference]) -> None:
    """Written as a partial file and renamed, so that the file is always complete."""
    partial = file.with_suffix(".partial.npz")
    arrays = {f"{name}_logprobs": side.logprobs for name, side in zip(References._fields, cached, strict=True)}
    arrays |= {f"{name}_starts": side.starts for name, side in zip(References._fields, cached, strict=True)}
    with explain_disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(partial, **arrays)  # type: ignore[arg-type]
        partial.replace(file)
