"""Random masks that should be alike and are not, or should differ and do not.

Told from outputs alone: what a module that drew numbers set to zero. Peers that dropped other elements of one and the
same input agree in all that both kept; data ranks that draw from the same stream dropped the same elements of others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from shardproof.compare.view import Key, Observed
from shardproof.trace.record import Record
from shardproof.trace.trace import Trace

TP_DIFFER = "ranks of one tensor-parallel group dropped different elements of the same input"
DP_ALIKE = "data ranks drew the same random numbers, and dropped the same elements of different samples"

FEWEST = 4
"""Elements that have to agree before it counts."""


def misdrawn(observed: Observed, *, repeats: bool = False) -> tuple[Key, str, tuple[int, ...]] | None:
    """(key, what is wrong, ranks) of the first module whose random mask is wrong; None where none is.

    `repeats` says that masks of data ranks may be alike.
    """
    calls: dict[tuple[Key, int], dict[int, tuple[Record, Tensor]]] = defaultdict(dict)
    for rank, trace in enumerate(observed.ranks):
        for number, record in _drawing(trace):
            calls[record.key, record.call][rank] = (record, trace.tensor(number))
    for (key, _), shown in sorted(calls.items(), key=lambda item: (item[0][0][0], item[0][1])):
        found = _between_peers(shown, observed)
        if found is None and not repeats:
            found = _between_data_ranks(shown, observed)
        if found is not None:
            return (key, *found)
    return None


def _drawing(trace: Trace) -> Iterator[tuple[int, Record]]:
    """Outputs before which, since the output before, numbers were drawn."""
    known: dict[int, int] = {}
    for number, record in enumerate(trace.records):
        if record.stage != "forward" or record.missing:
            continue
        if record.draws and record.draws != known.get(record.step, 0):
            yield number, record
        known[record.step] = record.draws


def _between_peers(
    shown: Mapping[int, tuple[Record, Tensor]], observed: Observed
) -> tuple[str, tuple[int, ...]] | None:
    for rank, (_, tensor) in shown.items():
        first = rank - observed.parallelism.coordinates(rank)["tp"]
        if first == rank or first not in shown or observed.batch_split_over_tp:
            continue
        other = shown[first][1]
        if tensor.shape != other.shape:
            continue
        kept, theirs = tensor != 0, other != 0
        both = kept & theirs
        same = torch.equal(tensor[both], other[both])
        if same and int(both.sum()) >= FEWEST and int((kept != theirs).sum()) >= FEWEST:
            return TP_DIFFER, (first, rank)
    return None


def _between_data_ranks(
    shown: Mapping[int, tuple[Record, Tensor]], observed: Observed
) -> tuple[str, tuple[int, ...]] | None:
    ranks = [rank for rank in shown if observed.parallelism.coordinates(rank)["tp"] == 0]
    tensors = [shown[rank][1] for rank in ranks]
    if len(ranks) < 2 or len({tensor.shape for tensor in tensors}) > 1:
        return None
    kept = tensors[0] != 0
    masked = int(kept.sum()) >= 2 * FEWEST and int((~kept).sum()) >= 2 * FEWEST
    if masked and all(torch.equal(t != 0, kept) for t in tensors) and not torch.equal(tensors[0], tensors[1]):
        return DP_ALIKE, tuple(ranks)
    return None
