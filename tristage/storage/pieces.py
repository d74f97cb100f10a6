"""Tensors as named pieces: every rank writes what it holds, and any number of ranks reads them back in any other cut.

    FOLDER/rank0.safetensors, FOLDER/rank1.safetensors, ...      flat tensors; the header says where each piece starts

The files are ordinary safetensors, written in a stream: no copy of the tensors is made, and the checksum comes with it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from tristage.errors import UserError
from tristage.storage import durable

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Piece:
    """A contiguous range of one flattened tensor."""

    name: str  # of the whole tensor
    start: int  # index of the first element in the whole tensor
    total: int  # elements of the whole tensor
    tensor: torch.Tensor  # [n]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.tensor.numel() * self.tensor.element_size()


def write_pieces(path: Path, pieces: Sequence[Piece]) -> durable.Entry:
    """Write one rank's pieces, with distinct names, and make them durable."""
    header: dict[str, Any] = {}
    end = 0
    for piece in pieces:
        header[piece.name] = {
            "dtype": DTYPES[piece.tensor.dtype],
            "shape": [piece.tensor.numel()],
            "data_offsets": [end, end + piece.size],
        }
        end += piece.size
    header["__metadata__"] = {"starts": json.dumps({piece.name: [piece.start, piece.total] for piece in pieces})}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with durable.writing(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for piece in pieces:
            flat = piece.tensor.detach().contiguous().cpu()
            file.write(flat.view(torch.uint8).numpy().data)
    return file.entry()


class PiecePlace(NamedTuple):
    """Where a piece is: elements [start, stop) of the whole tensor are in `file`."""

    start: int
    stop: int
    total: int
    file: Any


class PieceReader:
    """The pieces that `ranks` ranks wrote into a folder.

    Raises:
        UserError: a file is not safetensors. Nothing in such a file is ever executed.
    """

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder = folder
        self.places: dict[str, list[PiecePlace]] = {}
        for rank in range(ranks):
            path = folder / f"rank{rank}.safetensors"
            try:
                file = safe_open(path, "pt")
                starts = json.loads(file.metadata()["starts"])
            except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                raise UserError(f"{path}: cannot be read ({error}); use another checkpoint") from None
            for name, (start, total) in starts.items():
                stop = start + file.get_slice(name).get_shape()[0]
                self.places.setdefault(name, []).append(PiecePlace(start, stop, total, file))

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def total(self, name: str) -> int:
        """Elements of the whole tensor; 0 if it does not exist."""
        return self.places[name][0].total if name in self.places else 0

    @torch.no_grad()
    def read(self, name: str, start: int, into: torch.Tensor) -> None:
        """Fill `into` [n] with elements start, start + 1, ... of the whole tensor `name`.

        Raises:
            UserError: some are missing.
        """
        filled, stop = start, start + into.numel()
        for place in sorted(self.places.get(name, []), key=lambda place: place.start):
            first, last = max(filled, place.start), min(stop, place.stop)
            if first == filled and first < last:
                piece = place.file.get_slice(name)[first - place.start : last - place.start]
                into[first - start : last - start].copy_(piece)
                filled = last
        if filled < stop:
            raise UserError(f"{self.folder}: lacks {name}[{filled}:{stop}]; it is a checkpoint of another model")
