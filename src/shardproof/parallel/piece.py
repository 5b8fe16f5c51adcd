"""Where a rank's piece of a tensor lies in the whole: a box, and a stretch of the flattened box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor.placement_types import Partial, _StridedShard


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Which elements of a whole tensor a rank holds."""

    whole: tuple[int, ...]
    """Shape of the canonical tensor."""

    offset: tuple[int, ...]
    """First index of the box, per dim."""

    shape: tuple[int, ...]
    """Extent of the box, per dim; 0 where the rank holds nothing."""

    stretch: tuple[int, int] | None = None
    """Start and end in the flattened box, where the rank holds only that (FSDP's flat parameters)."""

    pending: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """(`reduce_op` or `norm2`, global ranks) of the reductions that the piece lacks: it is a partial sum, mean ..."""

    declared: bool = True
    """Whether the layout is known from metadata; a plain tensor's is only assumed to be the whole."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the tensor that the rank holds."""
        return self.shape if self.stretch is None else (self.stretch[1] - self.stretch[0],)

    def as_real(self) -> Piece:
        """The same piece of a complex tensor that is seen as pairs of reals, along a new last dim."""
        stretch = None if self.stretch is None else (2 * self.stretch[0], 2 * self.stretch[1])
        whole, offset, shape = (*self.whole, 2), (*self.offset, 0), (*self.shape, 2)
        return replace(self, whole=whole, offset=offset, shape=shape, stretch=stretch)

    def take(self, whole: Tensor) -> Tensor:
        """The same elements of a whole tensor, shaped as the rank holds them."""
        box = whole
        for dim, (start, length) in enumerate(zip(self.offset, self.shape, strict=True)):
            box = box.narrow(dim, start, length)
        if self.stretch is None:
            return box
        return box.reshape(-1)[self.stretch[0] : self.stretch[1]]

    def index(self, local: tuple[int, ...]) -> tuple[int, ...]:
        """Index into the whole of the element at index `local` of the piece."""
        if self.stretch is not None:
            flat, rest = local[0] + self.stretch[0], []
            for size in reversed(self.shape):
                flat, at = divmod(flat, size)
                rest.append(at)
            local = tuple(reversed(rest))
        return tuple(start + at for start, at in zip(self.offset, local, strict=True))


def whole(shape: Sequence[int]) -> Piece:
    """The piece of a rank that holds a plain tensor, taken for the whole."""
    shape = tuple(shape)
    return Piece(whole=shape, offset=(0,) * len(shape), shape=shape, declared=False)


def of_spec(spec: DTensorSpec) -> Piece:
    """The piece that this rank holds under a DTensor's mesh and placements."""
    mesh, placements, shape = spec.mesh, spec.placements, tuple(spec.shape)
    coordinate = mesh.get_coordinate()
    offset, extent = [0] * len(shape), list(shape)
    if coordinate is None:
        return Piece(whole=shape, offset=tuple(offset), shape=(0,) * len(shape))
    for axis in _order(placements):
        placement = placements[axis]
        dim = placement.dim  # type: ignore[attr-defined]
        # Chunks as torch.chunk makes them: rounded up, so that the last ones may be short or empty.
        chunk = -(-extent[dim] // mesh.size(axis))
        start = min(coordinate[axis] * chunk, extent[dim])
        offset[dim] += start
        extent[dim] = min(chunk, extent[dim] - start)
    pending = tuple(
        (_reduction(placement), tuple(_peers(spec, axis)))
        for axis, placement in enumerate(placements)
        if isinstance(placement, Partial)
    )
    return Piece(whole=shape, offset=tuple(offset), shape=tuple(extent), pending=pending)


def of_tensor(tensor: Tensor, canonical: Sequence[int] | None = None) -> Piece:
    """The piece that a tensor says it is: from a DTensor's placements, or the whole for a plain tensor.

    A plain tensor whose shape is not the `canonical` one is a part of it; which part, only its values can tell.
    """
    if isinstance(tensor, DTensor):
        return of_spec(tensor._spec)
    shape = tuple(tensor.shape)
    if canonical is None or tuple(canonical) == shape:
        return whole(shape)
    return Piece(whole=tuple(canonical), offset=(0,) * len(shape), shape=shape, declared=False)


def _order(placements: Sequence[object]) -> list[int]:
    """Mesh axes in the order in which they cut: a strided shard cuts what later axes have already cut."""
    order: list[int] = []
    for axis in reversed(range(len(placements))):
        placement = placements[axis]
        if isinstance(placement, _StridedShard):
            order.append(axis)
        elif isinstance(placement, Shard):
            order.insert(0, axis)
    return order


def _reduction(placement: Partial) -> str:
    """`reduce_op`, or `norm2` for what still has to be summed by its squares, as the norm of sharded gradients."""
    order = getattr(placement, "norm_type", None)
    return str(placement.reduce_op) if order is None else f"norm{order:g}"


def _peers(spec: DTensorSpec, axis: int) -> list[int]:
    mesh = spec.mesh
    coordinate = list(mesh.get_coordinate() or ())
    index: list[int | slice] = list(coordinate)
    index[axis] = slice(None)
    return [int(rank) for rank in mesh.mesh[tuple(index)].tolist()]
