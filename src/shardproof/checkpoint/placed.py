"""Where each parameter lies in its canonical tensor, those that were split by hand included."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardproof.checkpoint.portion import Portion
from shardproof.errors import CheckpointError
from shardproof.parallel.held import Held, plain
from shardproof.parallel.piece import Piece
from shardproof.spec.patterns import matches


@dataclass(frozen=True, slots=True)
class Declared:
    """Hand-written tensor parallelism, as `Experiment.placements` declares it."""

    placements: Mapping[str, Mapping[str, int]]
    """{parameter name pattern: {axis: dim}}."""

    mesh: DeviceMesh


@dataclass(frozen=True, slots=True)
class Placed:
    """A parameter as this rank holds it, with its place in the canonical tensor known."""

    held: Held

    whole: tuple[int, ...]
    """Shape of the canonical tensor."""

    moved: tuple[int, ...] | None
    """First index, per dim, of what was split off by hand and is a whole to everybody else."""

    @property
    def name(self) -> str:
        """Canonical name."""
        return self.held.name

    def portion(self, tensor: Tensor) -> Portion:
        """This rank's portion of `tensor`, which is shaped like the leaf: the parameter or its optimizer state.

        Raises `CheckpointError` for a sum that is still partial.
        """
        place = self.held.piece_of(tensor)
        if place.pending:
            raise CheckpointError(
                f"{self.name} is a partial sum over ranks {place.pending[0][1]}, which no rank can save; "
                "redistribute it before it becomes a parameter"
            )
        return Portion(self.moved_piece(place), self.held.local(tensor.detach()))

    def moved_piece(self, place: Piece) -> Piece:
        """The piece in the canonical tensor."""
        if self.moved is None:
            return place
        offset = tuple(base + at for base, at in zip(self.moved, place.offset, strict=True))
        return replace(place, whole=self.whole, offset=offset, declared=True)


def placed(parameters: Iterable[Held], declared: Declared | None) -> list[Placed]:
    """The parameters with their places. Raises `CheckpointError` where one was split by hand, nobody knows how."""
    return [_placed(held, declared) for held in parameters]


def _placed(held: Held, declared: Declared | None) -> Placed:
    if not held.split_by_hand or held.canonical is None:
        return Placed(held, held.piece.whole, None)
    canonical = held.canonical
    own = held.piece.whole if held.piece.whole != canonical else held.piece.shape
    axes = None if declared is None else _axes(held.name, declared)
    if declared is None or axes is None or len(own) != len(canonical):
        raise CheckpointError(
            f"{held.name} was split by hand: this rank holds {own} of {canonical}, and nothing says which part; "
            f'declare it, as Experiment(placements={{"{held.name}": {{"tp": 0}}}}), or make it a DTensor'
        )
    size, offset = list(own), [0] * len(own)
    for axis, dim in axes.items():
        if not -len(own) <= dim < len(own):
            raise CheckpointError(f"placements: {held.name} has {len(own)} dims, and {axis} is to split dim {dim}")
        # Axes from the outermost in: what an inner one splits is a part of what the outer one left.
        offset[dim] += declared.mesh[axis].get_local_rank() * own[dim]
        size[dim] *= declared.mesh[axis].size()
    if tuple(size) != canonical:
        raise CheckpointError(
            f"placements: {held.name} is {own} on this rank, which {dict(axes)} makes {tuple(size)} in all, "
            f"and the canonical shape is {canonical}; only even splits along one axis per dim can be declared"
        )
    return Placed(held, canonical, tuple(offset))


def _axes(name: str, declared: Declared) -> Mapping[str, int] | None:
    found = None
    for pattern, axes in declared.placements.items():
        if matches(name, pattern):
            # A later pattern is the more special one, as in a tensor-parallel plan.
            found = axes
    return found


def holds_nothing(held: Held) -> bool:
    """Whether FSDP's flat parameter leaves this rank none of it: then there is no optimizer state for it either."""
    return held.piece.stretch is not None and held.piece.stretch[0] == held.piece.stretch[1]


def is_whole(held: Held) -> bool:
    """Whether this rank holds all of it as a plain tensor."""
    return held.piece.stretch is None and held.piece.shape == held.piece.whole and plain(held.leaf) is held.leaf
