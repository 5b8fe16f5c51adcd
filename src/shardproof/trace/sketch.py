"""Linear sketches: 256 numbers that stand for a tensor, and that add up over its pieces however it is cut.

Each number is the sum of all elements, each under a random sign. The signs of an element follow from its index in the
canonical tensor alone, so that every rank sketches what it holds and nobody gathers anything: the sketches of the
pieces of a whole add up to the sketch of the whole, replicas agree, and partial sums add up as the tensors do.

The canonical tensor is read row-major, in rows of at most `WIDEST` elements (`_Cut`). The sign of element j of row r in
number (p, q) is s_p(j) e_p(r) f_q(r): a product, so that a sketch is two thin matrix products, of which the first reads
the tensor and the second a 16th to an 8th as much. The two signs of a row, and not one, keep a difference that lies in
one column from moving only 16 of the numbers. docs/sketches.md says how good the estimates are.
"""

from __future__ import annotations

import hashlib
import math
import platform
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from shardproof.parallel import piece as pieces
from shardproof.parallel.piece import Piece

SIDE = 16
"""A sketch has the shape (SIDE, SIDE)."""

WIDEST = 128
"""Elements of a row at most: shorter rows would make more work of the second product, longer ones leave a tensor with
fewer rows, and so with worse estimates."""

NARROWEST = 16
"""Elements of a row at least, where the tensor is small."""

TRAILING = 64
"""Trailing dims of the canonical tensor are taken together until they hold so many elements; rows are cut from these,
so that a slice along an earlier dim keeps whole rows."""

CHUNK = {"cpu": 2**20, "cuda": 2**24}
"""Elements multiplied at once, by kind of device: on a CPU what is read in another dtype must stay in its caches."""

KEPT_BYTES = 2**26
"""Bytes of row signs that are kept for the next tensor of the same shape."""

ROW_SEED = 0x243F6A8885A308D3
"""Where the counter of rows starts: digits of pi. A change of a seed, or of anything above but CHUNK and KEPT_BYTES,
makes sketches that have nothing in common with older ones."""

LONG = 2**16
"""Elements from which on oneDNN is quicker than MKL."""

ONEDNN: Callable[..., Tensor] | None = None
"""x @ w.t() by oneDNN on x86, which `torch.mm` keeps for lower precisions. Its name is torch's own business: without it
`mm` does the same."""

if torch._C._has_mkldnn and platform.machine() in ("x86_64", "AMD64"):
    ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)

COLUMN_SEED = 20_439
"""Where the counter of columns starts: of the numbers below 60000, the one under which constant rows, of any length
that there is, are estimated best, within 8.3%. All rows share these signs, so that chance would not average out."""


@torch.no_grad()
def sketch(
    tensor: Tensor,
    piece: Piece | None = None,
    samples: Sequence[str] | None = None,
    *,
    beside: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """The sketch of a plain local tensor, shape (16, 16): float64 for float64 (and complex128), else float32.

    `piece` says where the tensor lies in the whole; left out, it is the whole. What is pending is not waited for: the
    sketches of partial sums add up. Complex tensors are read as pairs of reals, sparse ones as dense.

    `samples` are digests of the samples along dim 0 of the whole (as `trace.reads.digests` makes them), each of which
    owns equally many rows there, one after the other. The signs of a row then follow from its sample's digest and not
    from its index, so that the sketches of the parts of a batch add up to that of the batch, in whatever order.

    `beside` is called with each chunk of elements, in the dtype that is multiplied, while a CPU has them in its cache;
    not at all where they are not read in their own order.

    NaN shows in all numbers, an infinity as infinity or NaN. Runs on the tensor's device, and does not wait for it.

    Raises `ValueError` where tensor, piece and samples do not fit each other.
    """
    tensor = tensor.detach()
    piece = piece if piece is not None else pieces.whole(tensor.shape)
    if tuple(tensor.shape) != piece.local_shape:
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} against a piece of {piece.local_shape}; is it local?"
        )
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor, piece = torch.view_as_real(tensor.resolve_conj()), piece.as_real()
        if piece.stretch is not None:
            tensor = tensor.reshape(-1)
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    total = torch.zeros(SIDE, SIDE, dtype=torch.float64, device=tensor.device)
    kind = tensor.device.type
    # Under autocast the products would be of half precision.
    off = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
    with off:
        blocks = list(_blocks(tensor.resolve_neg(), piece, samples))
        for block in blocks:
            block.add_to(total, dtype, beside if len(blocks) == 1 and block.values.is_contiguous() else None)
    return total.to(dtype)


def norm(of: Tensor) -> float:
    """The estimated 2-norm of the tensor that a sketch stands for; NaN or infinite where that holds such elements."""
    return float(of.to(torch.float64).square().mean().sqrt())


@dataclass(frozen=True, slots=True)
class _Cut:
    """How a canonical tensor is read as rows: by its shape alone."""

    lead: tuple[int, ...]
    """The dims over which rows are counted; with samples, the first of these is the sample."""
    trailing: tuple[int, ...]
    """The dims that are cut into rows, taken together."""
    width: int
    """Elements of a row; the last one of the trailing dims may be shorter."""

    @property
    def columns(self) -> int:
        """Elements of the trailing dims together."""
        return math.prod(self.trailing)

    @property
    def even(self) -> bool:
        """Whether all rows are equally long."""
        return self.columns % self.width == 0

    @property
    def rows(self) -> int:
        """Rows that the trailing dims make."""
        return -(-self.columns // self.width)


@lru_cache(4096)
def _cut(shape: tuple[int, ...], *, by_sample: bool) -> _Cut:
    first = len(shape)
    while first > by_sample and math.prod(shape[first:]) < TRAILING:
        first -= 1
    columns = math.prod(shape[first:])
    widest = WIDEST
    if not by_sample:
        # About as many rows as columns. How many samples there are is another matter in every run.
        widest = min(WIDEST, max(NARROWEST, 2 ** round(math.log2(max(math.prod(shape), 1)) / 2)))
    return _Cut(lead=shape[:first], trailing=shape[first:], width=_width(columns, widest, alone=first == 0))


def _width(columns: int, widest: int, *, alone: bool) -> int:
    """The length of rows: one that divides `columns`, and what tensor parallelism makes of them, if there is one."""
    if columns <= widest:
        return max(columns, 1)
    if alone:
        return widest
    width = columns
    while width > widest and width % 2 == 0:
        width //= 2
    if width <= widest:
        return width
    power = columns & -columns
    return power if power >= NARROWEST else widest


@dataclass(frozen=True, slots=True)
class _Block:
    """Some columns of some rows of a tensor, two-dimensional, and which rows of the canonical tensor they make."""

    values: Tensor
    """Shape (lead, columns): whole rows after each other, or a part of one."""
    cut: _Cut
    whole: tuple[int, ...]
    """The lead dims of the whole ..."""
    offset: tuple[int, ...]
    """... where the block begins in them ..."""
    shape: tuple[int, ...]
    """... and how far it reaches."""
    column: int
    """First column."""
    samples: tuple[str, ...] | None
    """Digests of the samples of the whole, where signs follow them."""

    def add_to(self, total: Tensor, dtype: torch.dtype, beside: Callable[[Tensor], object] | None) -> None:
        """Add the sketch of the block, chunk by chunk, each of which `beside` is shown."""
        width = self.cut.width
        start = self.column % width
        across = min(self.values.shape[1], width - start) if start or self.values.shape[1] < width else width
        chunk = CHUNK.get(self.values.device.type, CHUNK["cpu"])
        columns = min(self.values.shape[1], max(chunk // across, 1) * across)
        down = max(chunk // columns, 1)
        signs = _column_signs(self.values.device, dtype)[:, start : start + across].contiguous()
        for left in range(0, self.values.shape[1], columns):
            part = self.values[:, left : left + columns]
            first, count = (self.column + left) // width, part.shape[1] // across
            for top in range(0, part.shape[0], down):
                some = part[top : top + down].to(dtype)
                over, under = self._row_signs((top, min(top + down, self.values.shape[0])), (first, count))
                found = _product(some.reshape(-1, across), signs).mul_(over)
                total += _product(found.t(), under.to(dtype).t())
                if beside is not None:
                    beside(some)

    def _row_signs(self, lead: tuple[int, int], rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """e and f, each of shape (n, 16), of n rows: `rows` (first, count) of each of the `lead` (from, to)."""
        device = self.values.device
        # All modules of a pass show the same samples, and all layers the same shapes.
        place = (self.whole, self.offset, self.shape, self.cut.rows, lead, rows)
        key = (place, self.samples, device, _stream(device))
        kept = _KEPT.get(key)
        if kept is not None:
            return kept[0], kept[1]
        made = _signs(self._numbers(lead, rows))
        _KEPT.put(key, made)
        return made

    def _numbers(self, lead: tuple[int, int], rows: tuple[int, int]) -> Tensor:
        """One counter a row, int64."""
        device = self.values.device
        rest = torch.arange(*lead, device=device, dtype=torch.int64)
        at = torch.zeros_like(rest)
        stride = 1
        sample: Tensor | None = None
        for dim in reversed(range(len(self.whole))):
            here = rest % self.shape[dim] + self.offset[dim]
            rest = rest // self.shape[dim]
            if dim == 0 and self.samples is not None:
                sample = _digests(self.samples, device)[here]
            else:
                at = at + here * stride
                stride *= self.whole[dim]
        at = at[:, None] * self.cut.rows + torch.arange(rows[0], rows[0] + rows[1], device=device, dtype=torch.int64)
        at = at * _GOLDEN + _signed(ROW_SEED)
        return (at if sample is None else at + sample[:, None]).reshape(-1)


def _blocks(tensor: Tensor, piece: Piece, samples: Sequence[str] | None) -> Iterator[_Block]:
    """The piece as blocks, of which each is whole rows or a part of one."""
    if not tensor.numel():
        return
    if samples is None:
        cut = _cut(piece.whole, by_sample=False)
        if piece.shape == piece.whole and piece.stretch is None and tensor.is_contiguous() and cut.even:
            # Most tensors: nothing has to be cut.
            flat, origin = tensor.reshape(-1, cut.columns), (0,) * len(cut.lead)
            yield _Block(flat, cut=cut, whole=cut.lead, offset=origin, shape=cut.lead, column=0, samples=None)
            return
        parts = _boxes(tensor, piece)
        whole = piece.whole
    else:
        whole = _of_samples(piece, samples)
        cut = _cut(whole, by_sample=True)
        parts = _of_batch(tensor, piece, whole)
    lead = len(cut.lead)
    for values, offset in parts:
        for flat, start in _spans(values, lead, cut.trailing, offset[lead:]):
            ends = (-start % cut.width, (start + flat.shape[1]) // cut.width * cut.width - start)
            # A part of a row, whole rows, a part of a row: what of these there is.
            edges = sorted({0, *(end for end in ends if 0 < end < flat.shape[1]), flat.shape[1]})
            for left, right in pairwise(edges):
                yield _Block(
                    values=flat[:, left:right],
                    cut=cut,
                    whole=whole[:lead],
                    offset=offset[:lead],
                    shape=tuple(values.shape[:lead]),
                    column=start + left,
                    samples=None if samples is None else tuple(samples),
                )


Box = tuple[Tensor, tuple[int, ...]]
"""Values, and the index of the first of them in the canonical tensor."""


def _boxes(tensor: Tensor, piece: Piece) -> Iterator[Box]:
    if piece.stretch is None:
        yield tensor, piece.offset
        return
    flat = tensor.reshape(-1)
    for offset, shape in _boxes_of_stretch(piece.shape, *piece.stretch):
        values, flat = flat[: math.prod(shape)].reshape(shape), flat[math.prod(shape) :]
        yield values, tuple(a + b for a, b in zip(piece.offset, offset, strict=True))


def _boxes_of_stretch(
    shape: tuple[int, ...], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, shape) of the boxes that make up elements `start` to `stop` of a flattened box, in their order."""
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    each = math.prod(shape[1:])
    (first, skipped), (last, left) = divmod(start, each), divmod(stop, each)
    if first == last or skipped:
        end = left if first == last else each
        for offset, inner in _boxes_of_stretch(shape[1:], skipped, end):
            yield (first, *offset), (1, *inner)
        first += 1
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if left and first <= last:
        for offset, inner in _boxes_of_stretch(shape[1:], 0, left):
            yield (last, *offset), (1, *inner)


def _of_samples(piece: Piece, samples: Sequence[str]) -> tuple[int, ...]:
    """The whole with its dim 0 seen as (samples, rows of each)."""
    rows = piece.whole[0] if piece.whole else 0
    if piece.stretch is not None or not piece.whole or not samples or rows % len(samples):
        raise ValueError(f"{len(samples)} samples do not share out dim 0 of {piece.whole}, stretch {piece.stretch}")
    return (len(samples), rows // len(samples), *piece.whole[1:])


def _of_batch(tensor: Tensor, piece: Piece, whole: tuple[int, ...]) -> Iterator[Box]:
    """Boxes of whole samples, or of a part of one, with dim 0 as two dims."""
    rows = tensor
    for offset, shape in _boxes_of_stretch(whole[:2], piece.offset[0], piece.offset[0] + piece.shape[0]):
        values, rows = rows[: math.prod(shape)], rows[math.prod(shape) :]
        yield values.reshape(*shape, *values.shape[1:]), (*offset, *piece.offset[1:])


def _spans(
    values: Tensor, lead: int, trailing: tuple[int, ...], offset: tuple[int, ...]
) -> Iterator[tuple[Tensor, int]]:
    """The values as (lead, columns) and their first column: at once where the columns follow each other."""
    extent = values.shape[lead:]
    first = next((dim for dim, size in enumerate(extent) if size > 1), len(extent))
    if all(extent[dim] == trailing[dim] for dim in range(first + 1, len(extent))):
        strides = [*accumulate(reversed(trailing), int.__mul__, initial=1)][-2::-1] if trailing else []
        start = sum(at * stride for at, stride in zip(offset, strides, strict=True))
        yield values.reshape(math.prod(values.shape[:lead]), math.prod(extent)), start
        return
    for at in range(extent[first]):
        inner = (*offset[:first], offset[first] + at, *offset[first + 1 :])
        yield from _spans(values.narrow(lead + first, at, 1), lead, trailing, inner)


# Signs.

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
"""2**64 over the golden ratio, as a signed number: the step of splitmix64."""


def _signed(number: int) -> int:
    """The same 64 bits as a signed number."""
    return (number + 2**63) % 2**64 - 2**63


def _mixed(state: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), on int64 that wraps around."""
    state = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB)
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left."""
    return torch.bitwise_and(state >> bits, 2 ** (64 - bits) - 1)


def _signs(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Two sets of 16 signs for each number, each of shape (numbers, 16), as int8: kept ones take little room so."""
    signs = _bits(_mixed(numbers), 2 * SIDE)
    return signs[:, :SIDE].contiguous(), signs[:, SIDE:].contiguous()


def _bits(numbers: Tensor, count: int) -> Tensor:
    """`count` signs for each of the hashed numbers, shape (numbers, count), int8: eight at a time from a table."""
    device = numbers.device
    places = torch.arange(0, count, 8, device=device, dtype=torch.int64)
    which = (numbers[:, None] >> places) & 255
    return _bytes(device).index_select(0, which.reshape(-1)).reshape(numbers.shape[0], count)


def _bytes(device: torch.device) -> Tensor:
    """The eight signs of every byte, shape (256, 8), int8."""
    key = ("bytes", device, _stream(device))
    found = _KEPT.get(key)
    if found is None:
        every = torch.arange(256, device=device, dtype=torch.int64)[:, None]
        table = (every >> torch.arange(8, device=device, dtype=torch.int64)) & 1
        found = ((table * 2 - 1).to(torch.int8),)
        _KEPT.put(key, found)
    return found[0]


def _column_signs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """s, shape (16, WIDEST)."""
    key = ("columns", dtype, device, _stream(device))
    found = _KEPT.get(key)
    if found is None:
        numbers = torch.arange(WIDEST, device=device, dtype=torch.int64) * _GOLDEN + _signed(COLUMN_SEED)
        found = (_bits(_mixed(numbers), SIDE).t().to(dtype).contiguous(),)
        _KEPT.put(key, found)
    return found[0]


def _digests(samples: tuple[str, ...], device: torch.device) -> Tensor:
    """A number of 64 bits for every sample, from its digest."""
    key = ("digests", samples, device, _stream(device))
    found = _KEPT.get(key)
    if found is None:
        hashed = (hashlib.blake2b(sample.encode(), digest_size=8).digest() for sample in samples)
        numbers = [int.from_bytes(digest, "little", signed=True) for digest in hashed]
        found = (torch.tensor(numbers, dtype=torch.int64, device="cpu").to(device, non_blocking=True),)
        _KEPT.put(key, found)
    return found[0]


def _stream(device: torch.device) -> int:
    """What is made on one stream of a device is used on no other: no stream waits for another's work."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


class _Kept:
    """Signs that were made lately, up to a number of bytes. Backward hooks run on threads of their own."""

    def __init__(self, bytes_: int) -> None:
        self._most = bytes_
        self._bytes = 0
        self._found: OrderedDict[object, tuple[Tensor, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: object) -> tuple[Tensor, ...] | None:
        with self._lock:
            if key in self._found:
                self._found.move_to_end(key)
            return self._found.get(key)

    def put(self, key: object, made: tuple[Tensor, ...]) -> None:
        with self._lock:
            if key in self._found:
                return
            self._found[key] = made
            self._bytes += _size(made)
            while self._bytes > self._most and len(self._found) > 1:
                _, oldest = self._found.popitem(last=False)
                self._bytes -= _size(oldest)


def _size(made: tuple[Tensor, ...]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in made)


_KEPT = _Kept(KEPT_BYTES)


# Products.


def _product(values: Tensor, signs: Tensor) -> Tensor:
    """values @ signs.t() with all digits of `values`, whatever precision of products the user's program asked for."""
    if values.dtype == torch.float64:
        return torch.mm(values, signs.t())
    if _all_digits(values.device):
        return _of_all_digits(values, signs)
    # Eight bits at a time: each part, and each sign, is a bfloat16 and a TF32, and the products are summed in float32.
    result, rest = None, values
    for _ in range(3):
        some = (rest.view(torch.int32) & -(2**16)).view(torch.float32)
        rest = rest - some
        result = torch.mm(some, signs.t()) if result is None else result.add_(torch.mm(some, signs.t()))
    return result if result is not None else torch.mm(values, signs.t())


def _of_all_digits(values: Tensor, signs: Tensor) -> Tensor:
    """The product in float32. With few columns oneDNN is twice as quick as MKL, where there are enough rows."""
    long = values.device.type == "cpu" and values.shape[0] > values.shape[1] and values.numel() >= LONG
    # Of strided matrices it has only a plain loop, a thousand times slower.
    dense = values.is_contiguous() and signs.is_contiguous()
    if ONEDNN is None or not (long and dense and torch.backends.mkldnn.enabled):
        return torch.mm(values, signs.t())
    made: Tensor = ONEDNN(values, signs, None, "none", [], "")
    return made


def _all_digits(device: torch.device) -> bool:
    """Whether float32 matrices are multiplied as such, and not as TF32 or bfloat16."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return str(backend.matmul.fp32_precision) in ("ieee", "none")
