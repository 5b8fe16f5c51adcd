"""The whole model on the first rank, gathered piece by piece under any layout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardproof.checkpoint.placed import Declared, placed
from shardproof.checkpoint.portion import Box, Portion
from shardproof.checkpoint.save import finish_pending
from shardproof.checkpoint.state import BUFFER, MODEL, model_portions
from shardproof.checkpoint.together import own_group, rank_of, together
from shardproof.errors import CheckpointError
from shardproof.parallel.held import Held, ties


@dataclass(frozen=True, slots=True)
class _Move:
    """A box that the first rank takes from `source`."""

    name: str
    box: Box
    source: int
    """Its rank in the group."""


def whole_state(
    parameters: Iterable[Held], root: nn.Module, *, declared: Declared | None = None
) -> dict[str, Tensor] | None:
    """Whole parameters and persistent buffers by canonical name, in CPU memory, on the first rank; None elsewhere.

    What the plain model's `load_state_dict` takes: tied parameters are there under every name. A collective: all ranks
    of the default process group call it. Each element travels once, whatever is replicated.

    Raises `CheckpointError` on every rank.
    """
    finish_pending()
    group = own_group()
    rank = rank_of(group)
    portions = together(lambda: model_portions(root, placed(parameters, declared), rank=rank), group)
    shapes = {name: (portion.piece.whole, portion.local.dtype) for name, portion in portions.items()}
    held = {name: list(portion.boxes()) for name, portion in portions.items() if portion.writes}
    moves = _moves(held, shapes, group)
    whole = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()} if rank == 0 else {}
    for move in moves:
        _carry(move, portions[move.name], whole, group)
    if rank:
        return None
    state = {name.removeprefix(MODEL).removeprefix(BUFFER): tensor for name, tensor in whole.items()}
    for names in ties(root):
        first = next((name for name in names if name in state), None)
        if first is not None:
            state.update(dict.fromkeys(names, state[first]))
    return state


def _moves(
    held: dict[str, list[Box]],
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    group: dist.ProcessGroup | None,
) -> list[_Move]:
    """Each box from the first rank that holds it, in one order: the same list on every rank.

    Raises `CheckpointError`, on every rank, where ranks together do not hold a whole tensor.
    """
    everyone = [held]
    if group is not None:
        everyone = [{} for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(everyone, held, group=group)
    moves: list[_Move] = []
    for name, (shape, _) in shapes.items():
        sources: dict[tuple[int, ...], _Move] = {}
        for source, boxes in enumerate(everyone):
            for box in boxes.get(name, ()):
                sources.setdefault(box.offset, _Move(name, box, source))
        got, want = sum(math.prod(move.box.shape) for move in sources.values()), math.prod(shape)
        if got != want:
            raise CheckpointError(f"{name}: all ranks together hold {got} of {want} elements; declare how it is split")
        moves += sources.values()
    return moves


def _carry(move: _Move, portion: Portion, whole: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Bring one box into its whole tensor on the first rank, as bytes: gloo does not know every dtype."""
    rank = rank_of(group)
    box = tuple(slice(start, start + n) for start, n in zip(move.box.offset, move.box.shape, strict=True))
    if rank == move.source:
        own = portion.view(move.box).cpu().contiguous()
        if rank == 0:
            whole[move.name][box] = own
        else:
            dist.send(own.reshape(-1).view(torch.uint8), dst=dist.get_global_rank(_known(group), 0), group=group)
    elif rank == 0:
        got = torch.empty(move.box.shape, dtype=whole[move.name].dtype)
        source = dist.get_global_rank(_known(group), move.source)
        dist.recv(got.view(-1).view(torch.uint8), src=source, group=group)
        whole[move.name][box] = got


def _known(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if group is None:
        raise CheckpointError("a box lies on another rank, and there is no process group to bring it")
    return group
