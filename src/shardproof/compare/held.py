"""The parts of one tensor that ranks hold, each with its places in the whole and what the reference has there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardproof.compare import activations, parameters
from shardproof.compare.nested import inner_pieces
from shardproof.compare.view import Key, Observed, Reference


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one rank holds of a tensor."""

    rank: int
    got: Tensor
    want: Tensor
    """The reference's elements in the same places."""
    places: Tensor
    """Flat index into the whole of each element, in order."""
    shape: tuple[int, ...]
    """Of the whole."""


def parts_held(key: Key, observed: Observed, reference: Reference) -> list[Part]:
    """Every rank's part; empty where shapes and metadata alone do not say where the parts lie."""
    if key[1] == "batch":
        return list(_of_batch(key, observed))
    if key[1] in ("forward", "backward"):
        return list(_of_activation(key, observed, reference))
    return list(_of_parameter(key, observed, reference))


def _places(shape: Sequence[int]) -> Tensor:
    """A tensor of `shape` whose elements are their own flat indices."""
    return torch.arange(math.prod(shape)).reshape(tuple(shape))


def _of_batch(key: Key, observed: Observed) -> Iterator[Part]:
    """Data ranks one after the other, each held against the first of its tensor-parallel group."""
    shown = {(rank, r.call): tensor for rank, r, tensor in observed.held(key) if tensor is not None}
    peers = 1 if observed.batch_split_over_tp else observed.parallelism.tp
    firsts = [at for at in sorted(shown) if at[0] % peers == 0]
    wholes = [shown[at] for at in firsts]
    if not wholes or any(not t.dim() or t.shape[1:] != wholes[0].shape[1:] for t in wholes):
        return
    shape = (sum(tensor.shape[0] for tensor in wholes), *wholes[0].shape[1:])
    slots = dict(zip(firsts, torch.split(_places(shape), [tensor.shape[0] for tensor in wholes]), strict=True))
    for (rank, call), tensor in shown.items():
        first = (rank - rank % peers, call)
        if first in slots and shown[first].shape == tensor.shape:
            places = slots[first].reshape(-1)
            yield Part(rank=rank, got=tensor, want=shown[first], places=places, shape=shape)


def _of_activation(key: Key, observed: Observed, reference: Reference) -> Iterator[Part]:
    wholes = reference.tensors(key)
    if not wholes or reference.parts:
        return
    shape = tuple(wholes[0].shape)
    factors: dict[tuple[int, int], float] = {}
    if key[1] == "backward":
        same_step = [other for other in reference.trace.by_key if other[:2] == key[:2]]
        factors = activations.backward_factors(same_step, observed, reference)
    for one in activations.aligned(key, observed, reference):
        if one.cell.call:
            # Of a module that is called several times a batch, its first call.
            continue
        own = next((p for p in activations.parts_of(_places(shape), one.place) if p.shape == one.part.shape), None)
        if own is not None:
            want = one.want * factors.get((key[0], one.cell.microbatch), 1.0)
            yield Part(rank=one.rank, got=one.got, want=want, places=one.take(own).reshape(-1), shape=shape)


def _of_parameter(key: Key, observed: Observed, reference: Reference) -> Iterator[Part]:
    wholes = reference.tensors(key)
    held = [(rank, record, tensor) for rank, record, tensor in observed.held(key) if tensor is not None]
    if not wholes or not held:
        return
    want, shape = wholes[0], tuple(wholes[0].shape)
    if any(r.piece is None or tuple(r.piece.whole) != shape for _, r, _ in held) or inner_pieces(held, shape, observed):
        return
    index = _places(shape)

    def part(rank: int, got: Tensor, take: Callable[[Tensor], Tensor]) -> Part:
        return Part(rank=rank, got=got, want=take(want), places=take(index).reshape(-1), shape=shape)

    if not any(r.piece is not None and parameters.is_by_hand(r.piece) for _, r, _ in held):
        for rank, piece, tensor in parameters.summed(held):
            yield part(rank, tensor, piece.take)
        return
    if key[1] != "initial-state":
        # Where plain pieces lie is told by their initial values, as in the comparison itself.
        parameters.compare((-1, "initial-state", key[2], ""), observed, reference)
    tensors = {rank: tensor for rank, _, tensor in held}
    for data_rank in range(observed.parallelism.dp):
        peers = [rank for rank in observed.tp_peers(data_rank) if rank in tensors]
        pieces = [tensors[rank] for rank in peers]
        floor = reference.floor(key)
        placed = parameters.placed_by_hand(key[2], data_rank, pieces, want, floor, observed) if pieces else ""
        if isinstance(placed, str):
            return
        for rank, got, own, there in zip(peers, pieces, placed.take(want), placed.take(index), strict=True):
            yield Part(rank=rank, got=got, want=own, places=there.reshape(-1), shape=shape)
