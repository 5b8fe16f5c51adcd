"""Nine numbers that sum up a tensor, and that combine over the pieces of a whole: no place needed, and no sign told."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor

from shardproof.parallel.piece import Piece
from shardproof.trace.sketch import sketch

CHUNK = {"cpu": 2**20, "cuda": 2**24}
"""Elements that all passes read before the next ones are touched, by kind of device: a CPU keeps them in its cache.
Fewer would keep them closer, and let threads wait for each other more often. Whole rows of the last dim, as in a
sketch: what is summed beside one has the same sums."""

ROW = 2**10
"""Elements whose squares are summed in their own dtype; sums of rows are added in float64."""

SHORT = 4 * ROW
"""Elements up to which fewer calls are worth more than fewer nanoseconds an element."""

LANES = 2**6
"""Words of eight flags each that are added as one: 256 flags would run over into the next byte."""

SLACK, TINY = 1e-3, 1e-300
"""Rounding of sums that no reader should take for a lie: as a share, and of squares that underflow."""

COUNTS = ("count", "zeros", "nans", "infs")
"""The fields that are whole numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """What a tensor holds, over all its elements. `zeros`, `nans` and `infs` are counts; the rest is of the finite
    elements alone, and 0 where there are none. A complex tensor counts as pairs of reals."""

    count: int = 0
    """Elements."""
    zeros: int = 0
    nans: int = 0
    infs: int = 0
    """Infinities of either sign."""
    min: float = 0.0
    max: float = 0.0
    sum: float = 0.0
    square_sum: float = 0.0
    """Sum of squares: the squared 2-norm."""
    absmax: float = 0.0
    """max|x|."""

    @property
    def finite(self) -> int:
        """Elements that are neither NaN nor infinite."""
        return self.count - self.nans - self.infs

    @property
    def norm(self) -> float:
        """The 2-norm of the finite elements."""
        return math.sqrt(self.square_sum)

    def to_dict(self) -> dict[str, int | float]:
        """Plain data for JSON. A sum that is beyond float64 is infinite there, which JSON itself has no word for."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: object) -> Stats:
        """The stats that `to_dict` gave. Raises `ValueError` for anything that no tensor can have."""
        if not isinstance(plain, Mapping) or plain.keys() != _NAMES.keys():
            raise ValueError(f"stats are the fields {', '.join(_NAMES)}, not {_short(plain)}")
        made = {name: _count(name, plain[name]) if name in COUNTS else _real(name, plain[name]) for name in _NAMES}
        found = cls(**made)  # type: ignore[arg-type]
        problem = found._problem()
        if problem:
            raise ValueError(f"no tensor has these stats: {problem}")
        return found

    def _problem(self) -> str:
        if self.zeros > self.finite or self.finite < 0:
            return f"{self.zeros} zeros, {self.nans} NaN and {self.infs} infinite of {self.count} elements"
        if not self.finite and any((self.min, self.max, self.sum, self.square_sum, self.absmax)):
            return "values, though no element is finite"
        if self.min > self.max or self.absmax != max(abs(self.min), abs(self.max)):
            return f"min {self.min}, max {self.max}, absmax {self.absmax}"
        # Rounding aside: the largest square is in the sum, and no square is larger; and as much for |sum|.
        largest, count = self.absmax, self.finite - self.zeros
        square = largest * largest
        if not square * (1 - SLACK) <= self.square_sum <= count * square * (1 + SLACK) + TINY:
            return f"square_sum {self.square_sum} of {count} elements of at most {largest}"
        if abs(self.sum) > count * largest * (1 + SLACK):
            return f"sum {self.sum} of {count} elements of at most {largest}"
        if (self.zeros == self.finite) != (self.absmax == 0):
            return f"absmax {self.absmax} with {self.zeros} zeros of {self.finite} finite elements"
        return ""


def combined(parts: Iterable[Stats]) -> Stats:
    """The stats of a whole, of which `parts` are the stats of disjoint pieces."""
    parts = list(parts)
    if len(parts) == 1:
        return parts[0]
    # Without a finite element the extremes are no numbers of the tensor.
    finite = [part for part in parts if part.finite]
    return Stats(
        count=sum(part.count for part in parts),
        zeros=sum(part.zeros for part in parts),
        nans=sum(part.nans for part in parts),
        infs=sum(part.infs for part in parts),
        min=min((part.min for part in finite), default=0.0),
        max=max((part.max for part in finite), default=0.0),
        sum=float(sum(part.sum for part in finite)),
        square_sum=float(sum(part.square_sum for part in finite)),
        absmax=max((part.absmax for part in finite), default=0.0),
    )


@torch.no_grad()
def stats_of(tensor: Tensor) -> Stats:
    """The stats of a plain tensor of any dtype; sparse ones count as dense. Waits for the tensor's device.

    Chunks are summed in the tensor's dtype, but in float32 at least and whole numbers in float64, and the sums of the
    chunks in float64: sum is right to 1e-6 of sum|x|, square_sum to 1e-5 of itself, for float32 and less; to 1e-13 for
    float64.
    """
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    tensor = tensor.resolve_neg()
    if tensor.device.type != "cpu":
        return _elsewhere(tensor)
    return combined([_of_chunk(chunk) for chunk in _chunks(tensor)])


@torch.no_grad()
def sketch_and_stats(
    tensor: Tensor, piece: Piece | None = None, samples: Sequence[str] | None = None
) -> tuple[Tensor, Stats]:
    """Both numbers of a plain tensor, as `sketch` and `stats_of` give them, sums perhaps rounded otherwise: on a CPU
    in one pass over memory."""
    if tensor.device.type != "cpu" or not tensor.is_floating_point():
        return sketch(tensor, piece, samples), stats_of(tensor)
    found: list[Stats] = []
    rows = sketch(tensor, piece, samples, beside=lambda chunk: found.append(_of_chunk(chunk.reshape(-1))))
    return rows, combined(found) if found else stats_of(tensor)


@torch.no_grad()
def has_sum(tensor: Tensor, total: float) -> bool:
    """Whether the sum that `stats_of` would find in a real tensor on a CPU is still `total`, bit by bit."""
    return float(sum(chunk.sum().item() for chunk in _chunks(tensor.detach()))) == total


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """All elements, flat, in chunks of a dtype that can be summed."""
    most = CHUNK.get(tensor.device.type, CHUNK["cpu"])
    wide = torch.float64
    if tensor.is_floating_point():
        wide = tensor.dtype if tensor.dtype in (torch.float32, torch.float64) else torch.float32
    last = tensor.shape[-1] if tensor.dim() else 1
    each = most // last * last if 0 < last <= most else most
    for flat in _flat(tensor, most):
        for start in range(0, flat.shape[0], each):
            yield flat[start : start + each].to(wide)


def _flat(tensor: Tensor, most: int) -> Iterator[Tensor]:
    """Flat views of all elements, or copies of at most `most` where there is no view; in no order that matters."""
    # A transposed tensor is contiguous in another order of its dims.
    tensor = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    if tensor.is_contiguous() or tensor.numel() <= most or not tensor.dim():
        yield tensor.reshape(-1)
        return
    rows = max(most * tensor.shape[0] // tensor.numel(), 1)
    for start in range(0, tensor.shape[0], rows):
        part = tensor[start : start + rows]
        if part.shape[0] == 1:
            yield from _flat(part[0], most)
        else:
            yield part.reshape(-1)


def _of_chunk(values: Tensor) -> Stats:
    """Five passes, each vectorised (`aminmax` and `count_nonzero` are not, and take longer than all of these); a chunk
    with NaN, infinities or sums that overflow is read once more, in float64."""
    if not values.numel():
        return Stats()
    total, squares = values.sum().item(), _square_sum(values)
    if math.isfinite(total) and math.isfinite(squares):
        least, most = values.amin().item(), values.amax().item()
        # Squares of small numbers underflow.
        if not squares > 1e-30 and values.dtype == torch.float32 and (least or most):
            squares = float(values.double().square().sum())
        return Stats(
            count=values.numel(),
            zeros=_zeros(values) if least <= 0 <= most else 0,
            min=least,
            max=most,
            sum=total,
            square_sum=squares,
            absmax=max(abs(least), abs(most)),
        )
    return _of_numbers(values.numel(), _numbers(values))


def _square_sum(values: Tensor) -> float:
    if values.numel() < SHORT:
        return float(values.dot(values))
    whole = values.numel() - values.numel() % ROW
    rest, norms = values[whole:], torch.linalg.vector_norm(values[:whole].view(-1, ROW), dim=1).double()
    return float(norms.dot(norms)) + float(rest.dot(rest))


def _zeros(values: Tensor) -> int:
    """How many elements are 0: one byte says so of each, and the bytes are added eight at a time."""
    if values.numel() < SHORT:
        return values.numel() - int(values.count_nonzero())
    whole = values.numel() - values.numel() % (8 * LANES)
    lanes = values[:whole].bool().view(torch.int64).view(LANES, -1).sum(0)
    return values.numel() - int(lanes.view(torch.uint8).sum()) - int(values[whole:].count_nonzero())


def _elsewhere(tensor: Tensor) -> Stats:
    """On another device: the same passes over every chunk, and one wait for all of them."""
    found = [(chunk.numel(), _numbers(chunk)) for chunk in _chunks(tensor) if chunk.numel()]
    if not found:
        return Stats()
    rows = torch.stack([numbers for _, numbers in found]).cpu()
    return combined(_of_numbers(count, row) for (count, _), row in zip(found, rows, strict=True))


def _numbers(values: Tensor) -> Tensor:
    """zeros, nans, infs, min, max, sum and square_sum in float64, shape (7,), where values need not be finite."""
    nans, infs = values.isnan().sum(), values.isinf().sum()
    finite = values.isfinite()
    least = torch.where(finite, values, math.inf).amin()
    most = torch.where(finite, values, -math.inf).amax()
    kept = torch.where(finite, values, 0.0).to(torch.float64)
    found = ((values == 0).sum(), nans, infs, least, most, kept.sum(), kept.square().sum())
    return torch.stack([number.to(torch.float64) for number in found])


def _of_numbers(count: int, numbers: Tensor) -> Stats:
    zeros, nans, infs, least, most, total, squares = numbers.tolist()
    if count == nans + infs:
        least = most = 0.0
    return Stats(
        count=count,
        zeros=int(zeros),
        nans=int(nans),
        infs=int(infs),
        min=least,
        max=most,
        sum=total,
        square_sum=squares,
        absmax=max(abs(least), abs(most)),
    )


_NAMES = dict.fromkeys(field.name for field in fields(Stats))


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"{name} is a count, not {_short(value)}")
    return value


def _real(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is a number, not {_short(value)}")
    # Sums of numbers near the end of float64 may be infinite, and then NaN; single elements are finite.
    limited = name not in ("sum", "square_sum")
    if isinstance(value, int) and abs(value) > 2**1023:
        raise ValueError(f"{name} is beyond float64")
    if limited and not math.isfinite(value):
        raise ValueError(f"{name} is of finite elements, and {value}")
    return float(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."
