"""The way of a record into the trace directory, which is opened when there is something to write."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardproof.parallel import piece
from shardproof.parallel.held import plain
from shardproof.parallel.piece import Piece
from shardproof.record.quiet import quietly
from shardproof.record.wanted import NAMELESS, Depth, Names
from shardproof.trace.folder.writer import Writer
from shardproof.trace.record import Record


class Out:
    """Writes what is wanted of one rank, and leaves out the rest."""

    def __init__(
        self,
        folder: Path,
        about: Mapping[str, object],
        depths: Mapping[str, Depth],
        names: Names,
        *,
        overwrite: bool,
    ) -> None:
        self._folder, self._about, self._overwrite = folder, about, overwrite
        self._depths, self._names = depths, names
        self._writer: Writer | None = None

    @property
    def opened(self) -> bool:
        """Whether anything was written."""
        return self._writer is not None

    def wants(self, stage: str, name: str) -> bool:
        """Whether a record of this stage and name would be written."""
        return stage in self._depths and (stage in NAMELESS or name in self._names)

    def add(  # noqa: PLR0913 (the fields of a record)
        self,
        step: int,
        stage: str,
        name: str,
        tensor: Tensor | None,
        *,
        part: str = "",
        call: int = 0,
        where: Piece | None = None,
        draws: int = 0,
        samples: Sequence[str] = (),
    ) -> None:
        """Write one tensor as it is now; None where there is none. `samples` are those of its micro-batch."""
        if not self.wants(stage, name) or (tensor is not None and tensor.is_meta):
            return
        with quietly():
            if isinstance(tensor, DTensor) and where is None:
                where = piece.of_tensor(tensor)
            record = Record(
                step=step,
                stage=stage,
                name=name,
                part=part,
                call=call,
                piece=where,
                missing=tensor is None,
                draws=draws,
                samples=tuple(samples) if stage == "batch" else (),
            )
            local = None if tensor is None else plain(tensor)
            along = local is not None and len(samples) > 0 and local.dim() > 0 and local.shape[0] == len(samples)
            # As it is: the writer makes it dense and real, and knows again what it has just seen.
            self._open().write(record, tensor, depth=self._depths[stage], samples=samples if along else None)

    def event(self, kind: str, **facts: object) -> None:
        """Write a fact that is no tensor."""
        self._open().event(kind, **facts)

    def flush(self) -> None:
        """Everything written so far can be read, whatever happens to the run."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Nothing more will be written."""
        if self._writer is not None:
            self._writer.close()

    def _open(self) -> Writer:
        if self._writer is None:
            rank, size = own_rank()
            self._writer = Writer(self._folder, rank, size, self._about, overwrite=self._overwrite)
        return self._writer


def own_rank() -> tuple[int, int]:
    """(rank, number of ranks): of the default process group, or as a launcher tells them, or a single process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
