"""Make one trace of whole tensors out of a sharded run's, so that another strategy than `single` can be the reference.

A run on one device is the template: it says which tensors there are and how large each is as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from shardproof.compare.activations import Cell, cells_of, parts_of
from shardproof.compare.layouts import joined, split_dim
from shardproof.compare.losses import combined
from shardproof.compare.nested import put
from shardproof.compare.parameters import summed
from shardproof.compare.view import Key, Observed
from shardproof.trace.record import Record
from shardproof.trace.trace import Trace


def assemble(template: Trace, observed: Observed) -> Iterator[tuple[Record, Tensor | None]]:
    """The template's records with the run's values; without a tensor where the run's do not make up a whole."""
    seen: dict[Key, list[Tensor | None]] = {}
    for number, record in enumerate(template.records):
        key = record.key
        if record.missing or record.stage == "batch":
            yield record, None if record.missing else template.tensor(number)
            continue
        if key not in seen:
            wholes = [template.tensor(n) for n in template.by_key[key]]
            seen[key] = _wholes(key, wholes, observed)
        whole = seen[key].pop(0) if seen[key] else None
        yield (record if whole is not None else replace(record, unknown=True)), whole


def _wholes(key: Key, wholes: list[Tensor], observed: Observed) -> list[Tensor | None]:
    stage = key[1]
    if stage == "loss":
        value = combined(key, observed)
        return [None if value is None else value.to(wholes[0].dtype)]
    if stage in ("forward", "backward"):
        return _activations(key, wholes, observed)
    return [_parameter(key, wholes[0], observed)]


def _parameter(key: Key, like: Tensor, observed: Observed) -> Tensor | None:
    whole = torch.full_like(like, float("nan")) if like.is_floating_point() else torch.zeros_like(like)
    held = [entry for entry in observed.held(key) if entry[2] is not None]
    for rank, piece, tensor in summed(held):
        if piece.whole != tuple(like.shape):
            return None
        if not piece.declared and piece.shape != piece.whole:
            tensors = {r: t for r, _, t in held if t is not None}
            peers = observed.tp_peers(observed.parallelism.coordinates(rank)["dp"])
            pieces = [tensors[peer] for peer in peers if peer in tensors]
            dim = split_dim(pieces, piece.whole)
            return None if dim is None else joined(pieces, piece.whole[dim], dim)
        put(whole, piece, tensor)
    # A place that no rank filled is NaN still, and then there is no whole.
    return None if whole.is_floating_point() and bool(whole.isnan().any()) else whole


def _activations(key: Key, wholes: list[Tensor], observed: Observed) -> list[Tensor | None]:
    cells, problem = cells_of(key, observed, calls=len(wholes))
    if problem:
        return []
    made: list[Tensor | None] = []
    for call, like in enumerate(wholes):
        whole = torch.zeros_like(like)
        filled = [_fill(cell, whole, key, observed) for cell in cells if cell.call == call]
        made.append(whole if all(filled) else None)
    return made


def _fill(cell: Cell, whole: Tensor, key: Key, observed: Observed) -> bool:
    """Put a cell's values into its part of `whole`; whether they fit."""
    part = observed.part(key[0], cell.data_rank, cell.microbatch)
    for place in parts_of(whole, part):
        values = _joined(cell, tuple(place.shape))
        if values is None:
            continue
        # What does not depend on the samples is the same in every part, but its gradients add up.
        place.copy_(place + values if key[1] == "backward" and place.shape == whole.shape else values)
        return True
    return False


def _joined(cell: Cell, shape: tuple[int, ...]) -> Tensor | None:
    tensors = list(cell.tensors)
    if any(record.piece is not None for record in cell.records):
        whole = torch.zeros(shape, dtype=tensors[0].dtype)
        for record, tensor in zip(cell.records, tensors, strict=True):
            if record.piece is None or record.piece.whole != shape or record.piece.pending:
                return None
            put(whole, record.piece, tensor)
        return whole
    if all(tuple(tensor.shape) == shape for tensor in tensors):
        return tensors[0]
    dim = split_dim(tensors, shape)
    return None if dim is None else joined(tensors, shape[dim], dim)
