"""Pictures of tensors: which of them are worth one, and what they hold."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from shardproof.compare.held import Part
from shardproof.compare.measure import MULTIPLE, distance
from shardproof.compare.picture import CELLS, ELEMENTS, KEPT, LARGEST_SETS, RANKS, WINDOW, Picture
from shardproof.compare.stream import wide
from shardproof.compare.verdict import Comparison, Verdict
from shardproof.compare.view import Key


def chosen(comparisons: Sequence[Comparison], found: Iterable[Key] = ()) -> list[Comparison]:
    """The tensors worth a picture, most wanted first, more than `KEPT` as some cannot be had.

    What findings are about; the first that differs of each step and stage, and the furthest; then one of each layout
    and shape; then what comes next to being different.
    """
    by_key = {c.key: c for c in comparisons}
    looked = [c for c in comparisons if c.stage not in ("loss", "grad-norm")]
    wrong = [c for c in looked if c.verdict is Verdict.DIFFERENT]
    order = [by_key[key] for key in found if key in by_key]
    order += {(c.step, c.stage): c for c in reversed(wrong)}.values()
    order += sorted(wrong, key=_far)[: KEPT // 2]
    agree = [c for c in looked if c.verdict in (Verdict.EQUAL, Verdict.ROUNDING)]
    # Of each layout the first gradient, where there is one: what most want to see. The last one said stays.
    of_layout = [c for c in reversed(agree) if c.stage != "gradient"]
    of_layout += [c for c in reversed(agree) if c.stage == "gradient"]
    order += {(c.layout, c.shape): c for c in of_layout}.values()
    order += sorted((c for c in agree if c.verdict is Verdict.ROUNDING), key=_far)[:KEPT]
    order += agree[: 2 * KEPT]
    return list({c.key: c for c in order}.values())[: 4 * KEPT]


def pictures(found: Sequence[Comparison], held: Callable[[Comparison], Sequence[Part]]) -> tuple[Picture, ...]:
    """Pictures of `found`, in that order, until `KEPT` or `ELEMENTS` are reached; those that cannot be had left out.

    `held` gives the parts of a tensor (`compare.held.parts_held`).
    """
    kept: list[Picture] = []
    left = ELEMENTS
    for comparison in found:
        if len(kept) == KEPT:
            break
        # A guess that costs nothing: every rank may hold all of it.
        if math.prod(comparison.shape) > left:
            continue
        parts = held(comparison)
        size = sum(part.got.numel() for part in parts)
        if not size or size > left or any(part.got.shape != part.want.shape for part in parts):
            continue
        left -= size
        picture = _picture(comparison, parts)
        if picture is not None:
            kept.append(picture)
    return tuple(kept)


def _far(comparison: Comparison) -> float:
    return -math.inf if math.isnan(comparison.error) else -comparison.floors


def _picture(comparison: Comparison, parts: Sequence[Part]) -> Picture | None:
    """None where these parts are not what the verdict is about: ranks whose values only add up to it."""
    shape = parts[0].shape
    split = _fold(shape)
    rows, columns = math.prod(shape[:split]), math.prod(shape[split:])
    down, across = max(1, -(-rows // CELLS)), max(1, -(-columns // CELLS))
    cells = -(-rows // down), -(-columns // across)
    heat = torch.zeros(cells[0] * cells[1], dtype=torch.float64)
    ranks = sorted({part.rank for part in parts})
    held_by = torch.zeros(len(heat), len(ranks), dtype=torch.bool)
    worst, at, anywhere = 0.0, 0, False
    for part in parts:
        row, column = part.places // columns, part.places % columns
        cell = (row // down) * cells[1] + column // across
        far = torch.nan_to_num(distance(part.got, part.want).reshape(-1), nan=math.inf)
        heat.scatter_reduce_(0, cell, far, "amax")
        held_by[cell, ranks.index(part.rank)] = True
        here = float(far.max()) if far.numel() else 0.0
        if far.numel() and (here > worst or not anywhere):
            worst, at, anywhere = here, int(part.places[int(far.argmax())]), True
    if not _agrees(worst, comparison):
        return None
    owners, held = _owners(held_by, ranks)
    first, window = _window(at, rows, columns)
    want, got = _values(parts, comparison.ranks, columns, first, window)
    return Picture(
        key=comparison.key,
        shape=shape,
        split=split,
        cells=cells,
        owners=owners,
        held=held,
        heat=array("d", heat.tolist() if worst else ()),
        first=first,
        window=window,
        want=want,
        got=got,
    )


def _fold(shape: Sequence[int]) -> int:
    """Where to cut the dims so that rows and columns are as near to each other as can be."""
    if len(shape) < 2:
        return 0
    return min(range(1, len(shape)), key=lambda cut: abs(math.log(_ratio(shape, cut))))


def _ratio(shape: Sequence[int], cut: int) -> float:
    return max(math.prod(shape[:cut]), 1) / max(math.prod(shape[cut:]), 1)


def _agrees(worst: float, comparison: Comparison) -> bool:
    """Whether the largest difference seen here is the verdict's own. It may have been told by chunks of float32."""
    if not math.isfinite(comparison.error):
        return not math.isfinite(worst) or comparison.error == math.inf
    if comparison.verdict is Verdict.DIFFERENT:
        return abs(worst - comparison.error) <= 1e-3 * comparison.error
    return worst <= max(MULTIPLE * comparison.floor, comparison.error * (1 + 1e-3))


def _owners(held_by: Tensor, ranks: Sequence[int]) -> tuple[tuple[tuple[int, ...], ...], bytes]:
    """Sets of ranks, and which of them each cell belongs to; nothing where there are too many to tell apart.

    `held_by` says of each cell and rank whether one holds any of the other: `[cells, ranks]`.
    """
    rows = [row.tobytes() for row in held_by.numpy()]
    numbers = {row: number for number, row in enumerate(dict.fromkeys(rows))}
    if len(numbers) > LARGEST_SETS:
        return (), b""
    sets = (tuple(rank for rank, holds in zip(ranks, row, strict=True) if holds) for row in numbers)
    return tuple(sets), bytes(numbers[row] for row in rows)


def _window(at: int, rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """First row and column, and how many, around the element at a flat index."""
    down, across = min(rows, WINDOW), min(columns, WINDOW)
    row, column = divmod(at, max(columns, 1))
    first = (
        min(max(row - down // 2, 0), rows - down),
        min(max(column - across // 2, 0), columns - across),
    )
    return first, (down, across)


def _values(
    parts: Sequence[Part], wrong: Sequence[int], columns: int, first: tuple[int, int], window: tuple[int, int]
) -> tuple[tuple[float, ...], tuple[tuple[int, tuple[float | None, ...]], ...]]:
    """What the reference and the ranks have in the window."""
    count = window[0] * window[1]
    want = [math.nan] * count
    got: dict[int, list[float | None]] = {}
    for part in sorted(parts, key=lambda part: (part.rank not in wrong, part.rank)):
        if part.rank not in got and len(got) == RANKS:
            continue
        for place, theirs, ours in _inside(part, columns, first, window):
            want[place] = ours
            got.setdefault(part.rank, [None] * count)[place] = theirs
    return tuple(want), tuple((rank, tuple(values)) for rank, values in sorted(got.items()))


def _inside(
    part: Part, columns: int, first: tuple[int, int], window: tuple[int, int]
) -> Iterator[tuple[int, float, float]]:
    """(place in the window, got, want) of a part's elements that lie in the window."""
    row, column = part.places // columns - first[0], part.places % columns - first[1]
    inside = ((row >= 0) & (row < window[0]) & (column >= 0) & (column < window[1])).nonzero().reshape(-1)
    places = (row[inside] * window[1] + column[inside]).tolist()
    got, want = (wide(tensor).reshape(-1)[inside].tolist() for tensor in (part.got, part.want))
    return zip(places, got, want, strict=True)
