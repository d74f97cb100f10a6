"""TensorBoard's event files."""

from __future__ import annotations

import contextlib
import html
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SAMPLE_COLUMNS = ("prompt", "response", "score", "grade", "kl", "length")


class Board:
    """A writer per split, in FOLDER/train and FOLDER/heldout: a metric has one tag, and its curves share a chart.

    One that cannot be written is given up with a warning: metrics.jsonl has its numbers. A thread of TensorBoard's
    writes. Its error would be printed with a traceback by threading.excepthook, and is raised again by later calls.
    """

    def __init__(self, folder: Path, purge_step: int):
        self.folder, self.purge_step, self.given_up = folder, purge_step, False
        self.writers: dict[str, SummaryWriter] = {}
        self.hook = threading.excepthook
        threading.excepthook = self._on_thread_error
        for split in ("train", "heldout"):
            self._writer(split)

    def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """One point of each metric."""
        with self._giving_up():
            if not self.given_up:
                for name, value in metrics.items():
                    self.writers[split].add_scalar(name, value, step)

    def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """A table of texts and numbers for each split."""
        with self._giving_up():
            for split, writer in () if self.given_up else self.writers.items():
                own = [sample for sample in samples if sample.get("split", "heldout") == split]
                if own:
                    writer.add_text("samples", as_table(own), step)

    def close(self) -> None:
        with self._giving_up():
            for writer in () if self.given_up else self.writers.values():
                writer.close()
        threading.excepthook = self.hook

    def _writer(self, split: str) -> None:
        from torch.utils.tensorboard import SummaryWriter  # rank 0 alone needs it

        with self._giving_up():
            if not self.given_up:
                self.writers[split] = SummaryWriter(str(self.folder / split), purge_step=self.purge_step)

    def _on_thread_error(self, arguments: threading.ExceptHookArgs) -> None:
        if not type(arguments.thread).__module__.startswith("tensorboard."):
            self.hook(arguments)

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever TensorBoard's thread met
            self.given_up = True
            print(f"warning: {self.folder}: {error}; no more is written for TensorBoard in this run", flush=True)


def as_table(samples: Sequence[Mapping[str, Any]]) -> str:
    """Samples as a table of Markdown, whatever their texts hold."""
    columns = [name for name in SAMPLE_COLUMNS if any(name in sample for sample in samples)]
    rows = [columns, ["---"] * len(columns)]
    rows += [[_cell(sample.get(name, "")) for name in columns] for sample in samples]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return html.escape(str(value)).replace("|", "&#124;").replace("\n", "<br>")
