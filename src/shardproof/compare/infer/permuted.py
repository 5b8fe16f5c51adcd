"""Any places of a dim, each once: found one by one, by their marks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from shardproof.compare.infer.marks import longest, rows_like
from shardproof.compare.layouts import NEAREST_SIZE, nearest

MOST_RUNS = 64
"""Runs of neighbouring places that are followed one by one; where there are more, each place is sought by itself."""

MOST_STARTS = 16
"""Places from which a run is followed, where it could begin at several."""

SHORT = 4
"""Places that may follow one another by chance, where rounding makes many look alike."""

TOO_MANY = 8
"""Places by which a run may be too long."""

WINDOW = 8
"""Neighbours in the order of the first mark among which the nearest place is sought, where there are very many."""


def runs(marks: Tensor, held: Tensor, tolerance: float) -> list[tuple[int, int, int]] | None:
    """(place, length, other places where it could lie as well) of neighbouring places, each run as long as can be.

    None where there are too many runs, or where something is found nowhere.
    """
    found: list[tuple[int, int, int]] = []
    done = 0
    taken = torch.zeros(len(marks), dtype=torch.bool)
    while done < len(held):
        starts = rows_like(marks, held[done], tolerance)
        free = longest(marks, held[done:], starts[~taken[starts]], tolerance, MOST_STARTS)[:MOST_STARTS].tolist()
        if not free or len(found) == MOST_RUNS:
            return None
        lengths = [_followed(marks[start:], held[done:], tolerance) for start in free]
        length = max(lengths)
        # The nearest of those that go on equally long.
        best = [start for start, own in zip(free, lengths, strict=True) if own == length]
        apart = [float((marks[start : start + length] - held[done : done + length]).abs().max()) for start in best]
        place = best[apart.index(min(apart))]
        found.append((place, length, lengths.count(length) - 1))
        taken[place : place + length] = True
        done += length
    return _bordered(found, marks, held)


def _bordered(found: list[tuple[int, int, int]], marks: Tensor, held: Tensor) -> list[tuple[int, int, int]]:
    """The same runs, each border where both sides fit best: by chance a run may go on for a few places too many."""
    end = 0
    for number in range(len(found) - 1):
        (place, length, others), (following, rest, more) = found[number : number + 2]
        end += length
        most = min(length - 1, following, TOO_MANY)
        if most < 1:
            continue
        disputed = held[end - most : end]
        before = (marks[place + length - most : place + length] - disputed).abs().amax(1)
        after = (marks[following - most : following] - disputed).abs().amax(1)
        # What is given up is summed from the border backwards.
        gain = (before - after).flip(0).cumsum(0)
        back = int(gain.argmax()) + 1 if float(gain.max()) > 0 else 0
        found[number], found[number + 1] = (place, length - back, others), (following - back, rest + back, more)
        end -= back
    return found


def by_chance(found: Sequence[tuple[int, int, int]], marks: Tensor, held: Tensor, tolerance: float) -> bool:
    """Whether some run may be none: it is short, and some of its places look like others."""
    done = 0
    for _, length, _ in found:
        if length <= SHORT and any(len(rows_like(marks, row, tolerance)) > 1 for row in held[done : done + length]):
            return True
        done += length
    return False


def _followed(marks: Tensor, held: Tensor, tolerance: float) -> int:
    """For how many places they go on alike."""
    length = min(len(marks), len(held))
    apart = ((marks[:length] - held[:length]).abs() > tolerance).any(1).nonzero()
    return int(apart[0, 0]) if len(apart) else length


def candidates(marks: Tensor, held: Tensor, tolerance: float) -> Iterator[Tensor]:
    """Places in any order, each once, whose marks are those of a piece."""
    followed = runs(marks, held, tolerance)
    if followed is not None:
        yield torch.cat([torch.arange(place, place + length) for place, length, _ in followed])
        return
    index = nearest(held, marks) if max(len(held), len(marks)) <= NEAREST_SIZE else _nearest_of_many(held, marks)
    alike = bool(((marks[index] - held).abs() <= tolerance).all())
    if alike and _differ(index):
        yield index


def _nearest_of_many(held: Tensor, marks: Tensor) -> Tensor:
    """The nearest place among those that the first mark brings near."""
    order = marks[:, 0].argsort()
    at = torch.searchsorted(marks[order, 0].contiguous(), held[:, 0].contiguous())
    around = (at[:, None] + torch.arange(-WINDOW, WINDOW + 1)).clamp(0, len(marks) - 1)
    places = order[around]  # (held, window)
    best = torch.empty(len(held), dtype=torch.long)
    for start in range(0, len(held), NEAREST_SIZE):
        some = slice(start, start + NEAREST_SIZE)
        far = (marks[places[some]] - held[some, None]).abs().amax(-1)
        best[some] = places[some].gather(1, far.argmin(1, keepdim=True))[:, 0]
    return best


def twins(marks: Tensor, tolerance: float) -> bool:
    """Whether two places of the whole cannot be told apart."""
    ordered = marks[marks[:, 0].argsort()]
    return bool(((ordered[1:] - ordered[:-1]).abs() <= tolerance).all(1).any())


def named(index: Mapping[int, Tensor], size: int, dim: int) -> str:
    """The layout in words; empty if places are left out, or held by some ranks and not by all of their peers."""
    distinct = {tuple(sorted(places.tolist())) for places in index.values() if len(places)}
    counted = torch.cat([torch.tensor(places) for places in distinct]) if distinct else torch.empty(0)
    whole = len(counted) == size and _differ(counted)
    return f"permuted slices of dim {dim}" if whole else ""


def _differ(places: Tensor) -> bool:
    ordered = places.sort().values
    return not bool((ordered[1:] == ordered[:-1]).any())
