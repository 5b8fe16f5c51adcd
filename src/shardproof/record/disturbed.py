"""A run whose parameters start one unit in the last place away: what it differs by is the noise of the arithmetic."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from shardproof.parallel.held import Held
from shardproof.record.quiet import quietly
from shardproof.train.disturb import Disturbance


def disturb_(parameters: Iterable[Held], seed: int) -> None:
    """Move every floating parameter in place. Ranks that hold the same piece of the same parameter move it alike."""
    with quietly():
        for held in parameters:
            local = held.local(held.leaf)
            if not local.is_floating_point() or not local.numel():
                continue
            # Of its own for every piece: ranks that draw for more or for less before it still agree on a replica.
            place = f"{held.name} {held.piece.offset} {held.piece.stretch}"
            local.copy_(Disturbance(zlib.crc32(place.encode(), seed & 0xFFFFFFFF)).tensor(local))
