"""The part of a canonical tensor that a rank holds, in the words of torch's distributed checkpoint.

Distributed checkpoint plans, deduplicates and reshards in boxes. Whatever a rank holds (a plain tensor, a DTensor, a
stretch of FSDP's flat parameter) is handed to it here as boxes, through the protocol that torch itself uses for
DTensors (`torch.distributed._checkpointable`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from shardproof.parallel.piece import Piece

Ints = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """Some elements of a canonical tensor that are both a box in it and neighbours in a rank's memory."""

    offset: Ints
    """First index in the canonical tensor."""

    shape: Ints

    start: int
    """Where they start in the rank's flattened local tensor."""


@dataclass(frozen=True, eq=False)
class Portion:
    """The elements of a canonical tensor that this rank holds, and where they are in memory."""

    piece: Piece

    local: Tensor
    """Plain, of shape `piece.local_shape`. Loading writes into it."""

    writes: bool = True
    """Whether this rank may be the one that writes it; reading is not affected."""

    def boxes(self) -> Iterator[Box]:
        """The boxes that this rank holds. They do not overlap, and there are none where it holds nothing."""
        if self.piece.stretch is None:
            # A tensor without elements has to be found in a checkpoint too, so its one box is empty.
            if math.prod(self.piece.shape) or not math.prod(self.piece.whole):
                yield Box(self.piece.offset, self.piece.shape, 0)
            return
        for offset, shape, start in stretch_boxes(self.piece.shape, *self.piece.stretch):
            moved = tuple(base + at for base, at in zip(self.piece.offset, offset, strict=True))
            yield Box(moved, shape, start)

    def view(self, box: Box) -> Tensor:
        """The elements of a box, as a view of the local tensor."""
        if self.piece.stretch is None:
            return self.local
        return self.local.narrow(0, box.start, math.prod(box.shape)).view(box.shape)

    def size(self) -> torch.Size:
        """Shape of the canonical tensor. Distributed checkpoint compares it with the saved one."""
        return torch.Size(self.piece.whole)

    # The protocol of torch.distributed._checkpointable.

    def __create_write_items__(self, fqn: str, _object: object) -> list[WriteItem]:
        if not self.writes:
            return []
        properties = TensorProperties(dtype=self.local.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, box.offset),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=_chunk(box), properties=properties, size=self.size()),
            )
            for box in self.boxes()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(box) for box in self.boxes() if math.prod(box.shape)]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for box in self.boxes():
            if index.offset is not None and tuple(index.offset) == box.offset:
                return self.view(box)
        raise KeyError(f"{index.fqn} holds no box at {index.offset} on this rank")


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(box.offset), sizes=torch.Size(box.shape))


def stretch_boxes(shape: Ints, start: int, stop: int) -> Iterator[tuple[Ints, Ints, int]]:
    """(offset, shape, start in the stretch) of the boxes that tile a stretch of a row-major flattened box, in order.

    Part of a first row, whole rows, part of a last row; the parts of rows are cut in the same way. At most
    `2 * len(shape) - 1` boxes.
    """
    return _cut(shape, start, stop, 0)


def _cut(shape: Ints, start: int, stop: int, done: int) -> Iterator[tuple[Ints, Ints, int]]:
    if start >= stop:
        return
    if not shape:
        yield (), (), done
        return
    row = math.prod(shape[1:])
    first, into = divmod(start, row)
    last, beyond = divmod(stop, row)
    if into or first == last:
        end = beyond if first == last else row
        for offset, size, at in _cut(shape[1:], into, end, done):
            yield (first, *offset), (1, *size), at
        if first == last:
            return
        done += row - into
        first += 1
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:]), done
        done += (last - first) * row
    for offset, size, at in _cut(shape[1:], 0, beyond, done):
        yield (last, *offset), (1, *size), at
