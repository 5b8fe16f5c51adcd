"""`check_invariants`: inside anybody's training loop, whether ranks that should hold the same bits do.

No reference and no tolerance: replicas that differ in one bit are no replicas any more, and will drift apart. Ranks
exchange checksums, never tensors. What this cannot see is a fault that all replicas share, as a gradient that is twice
too large everywhere: that takes a reference, and so `shardproof.check`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes

from shardproof.errors import InvariantError, UsageError
from shardproof.parallel.held import Held, held_parameters, plain
from shardproof.parallel.names import canonical_buffers
from shardproof.parallel.piece import Piece
from shardproof.parallel.replicas import (
    Axes,
    Grid,
    buffer_axes,
    gradients_are_reduced,
    parameter_axes,
    pending_axes,
    whole_shapes,
)
from shardproof.spec.patterns import matches
from shardproof.trace.checksums import checksums
from shardproof.trace.leaves import leaves

KINDS = ("weight", "gradient", "optimizer state", "buffer", "batch")
"""What a violation may be of, in the order in which they are told."""

Label = tuple[str, str, str]
"""Kind, name, part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Violation:
    """A tensor that is not the same on ranks that should hold the same; or a batch that is, where it should not be."""

    kind: str
    """`weight`, `gradient`, `optimizer state`, `buffer` or `batch`."""

    name: str
    """Canonical name of the parameter or buffer, without any wrapper's prefix; `batch` for a batch."""

    part: str = ""
    """Which entry of an optimizer's state (`exp_avg`), which leaf of a batch (`[0]`)."""

    axis: str
    """The mesh axis on which the ranks lie."""

    ranks: tuple[int, ...]
    """Global ranks that hold something else than most of their peers; all of them where there is no majority."""

    same: bool = False
    """Whether the ranks hold the same where they should not: batches of data ranks."""

    def __str__(self) -> str:
        """`gradient of fc1.weight differs along dp_replicate: rank 2`."""
        what = "batch" if self.kind == "batch" else f"{self.kind} of {self.name}"
        part = f" [{self.part}]" if self.part and self.kind != "batch" else self.part
        said = "is the same" if self.same else "differs"
        number = "rank" if len(self.ranks) == 1 else "ranks"
        return f"{what}{part} {said} along {self.axis}: {number} {', '.join(map(str, self.ranks))}"


def check_invariants(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    mesh: DeviceMesh | None = None,
    batch: Any = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    ignore: Iterable[str] = (),
    data_axes: Iterable[str] | None = None,
    raises: bool = False,
) -> list[Violation]:
    """Compare what is replicated along the axes of `mesh`, bit by bit. All ranks of the mesh must call it alike.

    Looked at are the weights, the gradients, the optimizer's state, the buffers and this rank's `batch` (any nest of
    tensors; leave it out where data ranks rightly read the same). Gradients must be reduced: call it after the last
    backward pass of a step, or when they are set to None.

    `mesh` has named axes; None is one axis `dp` over all ranks. Axes whose names begin as one of
    `parallel.replicas.DATA_AXES` are data axes, unless `data_axes` lists them. DTensors and FSDP's flat parameters say
    where they lie. Any other tensor is taken for a replica along the data axes; along the others it is compared only
    where `shapes` has its shape, `{name: tuple(p.shape) for name, p in model.named_parameters()}` from before the model
    was laid out: without it, it may be a slice. Names that match a pattern of `ignore` (`blocks.*.experts.*.weight`)
    are left out. Floating buffers are not compared along data axes, as each rank may keep statistics of its own.

    Costs a pass over the tensors and one all_gather of 32 bytes a tensor; another one where a rank has more tensors
    than ever before, and one per axis where the mesh is not the whole world. Changes nothing and draws no random
    number. Returns the same list on every rank, empty where all is well; with `raises`, raises `InvariantError`
    instead of returning one that is not. Raises `UsageError` for a mesh that cannot be meant.
    """
    if not dist.is_initialized():
        raise UsageError("check_invariants compares ranks: call it after torch.distributed.init_process_group")
    grid = Grid(mesh, data_axes)
    if grid.size == 1:
        return []
    patterns = tuple(ignore)
    # Without dispatch modes: whoever counts the collectives of a step (as `check` does) counts the step's own.
    with torch.no_grad(), _disable_current_modes():
        rows = [
            row
            for row in _rows(model, optimizer, batch, grid, whole_shapes(shapes))
            if not any(matches(row.label[1], pattern) for pattern in patterns)
        ]
        tables = _gathered(_table(rows, grid.device), grid)
    found = _violations(tables, {_number(row.label): row.label for row in rows}, grid)
    if raises and found:
        raise InvariantError(found)
    return found


# What a rank tells.


@dataclass(frozen=True, slots=True)
class _Row:
    """One tensor of a rank."""

    label: Label
    place: tuple[object, ...]
    """Ranks with the same place hold the same elements."""
    axes: Axes
    """Along which axes that is so."""
    tensor: Tensor | None


def _rows(
    model: nn.Module, optimizer: Optimizer | None, batch: Any, grid: Grid, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[_Row]:
    reduced = gradients_are_reduced(model)
    for held in held_parameters(model, shapes):
        axes = parameter_axes(held, grid)
        yield _Row(("weight", held.name, ""), _place(held.piece), axes, held.local(held.leaf))
        grad = held.leaf.grad
        if reduced and held.leaf.requires_grad and (grad is None or grad.shape == held.leaf.shape):
            label = ("gradient", held.name, "")
            if grad is None:
                yield _Row(label, _place(held.piece), axes, None)
            else:
                yield _Row(label, _place(held.piece_of(grad)), axes & ~pending_axes(grad, grid), held.local(grad))
        # Of a parameter of which a rank holds nothing, its optimizer need not count steps either.
        if optimizer is not None and 0 not in held.piece.local_shape:
            yield from _state(held, optimizer, axes, grid)
    for name, buffer in canonical_buffers(model):
        if isinstance(buffer, Tensor):
            axes = buffer_axes(buffer, grid, shapes.get(name))
            yield _Row(("buffer", name, ""), (tuple(buffer.shape), tuple(plain(buffer).shape)), axes, plain(buffer))
    for path, leaf in leaves(batch):
        # The same place everywhere: a batch of another shape is another batch.
        yield _Row(("batch", "batch", path), (), grid.peers, plain(leaf))


def _state(held: Held, optimizer: Optimizer, axes: Axes, grid: Grid) -> Iterator[_Row]:
    for key, value in optimizer.state.get(held.leaf, {}).items():
        label = ("optimizer state", held.name, str(key))
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape == held.leaf.shape:
            yield _Row(label, _place(held.piece_of(value)), axes & ~pending_axes(value, grid), held.local(value))
        elif isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0):
            number = plain(value) if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            if key == "step":
                # Whatever part of a parameter a rank holds, it has stepped as often as the others.
                yield _Row(label, (), grid.every, number)
            else:
                yield _Row(label, _place(held.piece), axes, number)


def _place(piece: Piece) -> tuple[object, ...]:
    return (piece.whole, piece.offset, piece.shape, piece.stretch)


# What goes over the wire: a row of four numbers a tensor, below a header.

NAME, PLACE, AXES, SUM = range(4)
"""The columns: hashes of name and place, `kind << KIND_BITS | axes`, and the checksum."""

KIND_BITS = 32

_capacity: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], int]] = WeakKeyDictionary()
"""Group, ranks of the grid -> the most rows that any of these ranks ever had, which all of them know."""


def _table(rows: Sequence[_Row], device: torch.device) -> Tensor:
    """(rows, 4) on `device`."""
    said = [[_number(row.label), _number(row.place), KINDS.index(row.label[0]) << KIND_BITS | row.axes] for row in rows]
    nothing = torch.zeros(0)
    sums = checksums([nothing if row.tensor is None else row.tensor for row in rows], device)
    return torch.cat([torch.tensor(said, dtype=torch.int64).reshape(-1, 3).to(device), sums.unsqueeze(1)], dim=1)


def _number(value: object) -> int:
    # Not hash(): that of a text differs between processes.
    return int.from_bytes(blake2b(repr(value).encode(), digest_size=8).digest(), "big", signed=True)


def _gathered(table: Tensor, grid: Grid) -> dict[int, Tensor]:
    """Rank -> its table, on the CPU."""
    groups = grid.groups()
    known = _capacity.setdefault(groups[0], {})
    ranks = tuple(grid.ranks.flatten().tolist())
    while True:
        rows = known.get(ranks, 0)
        sent = table.new_zeros(1, rows + 1, 4)
        sent[0, 0, 0], sent[0, 0, 1] = len(table), grid.own
        sent[0, 1 : 1 + len(table)] = table[:rows]
        for group in groups:
            received = [torch.empty_like(sent) for _ in range(group.size())]
            dist.all_gather(received, sent, group=group)
            sent = torch.cat(received)
        sent = sent.cpu()
        counts = {int(own[0, 1]): int(own[0, 0]) for own in sent}
        most = max(counts.values())
        if most <= rows:
            return {int(own[0, 1]): own[1 : 1 + counts[int(own[0, 1])]] for own in sent}
        # All ranks see the same counts, so all of them gather again.
        known[ranks] = most


# What it means.


def _violations(tables: Mapping[int, Tensor], labels: Mapping[int, Label], grid: Grid) -> list[Violation]:
    """The same list on every rank, but for names that a rank does not know (those of another pipeline stage)."""
    ranks: list[int] = grid.ranks.flatten().tolist()
    names = torch.tensor(sorted({name for rank in ranks for name in tables[rank][:, NAME].tolist()}))
    # (ranks, names, 4), with a row of zeros, and so without axes, where a rank has no such tensor.
    aligned = torch.zeros(len(ranks), len(names), 4, dtype=torch.int64)
    for position, rank in enumerate(ranks):
        aligned[position, torch.searchsorted(names, tables[rank][:, NAME].contiguous())] = tables[rank]
    at = {rank: position for position, rank in enumerate(ranks)}
    found = []
    for axis, axis_name in enumerate(grid.names):
        lines = torch.tensor([[at[rank] for rank in line] for line in grid.lines(1 << axis)])
        if lines.shape[1] == 1:
            continue
        for column in _suspects(aligned, lines, axis).tolist():
            wrong = _odd_ones([aligned[line, column] for line in lines], axis)
            odd = tuple(sorted(ranks[int(lines[i, j])] for i, j in wrong))
            kind = KINDS[int(aligned[:, column, AXES].max()) >> KIND_BITS]
            _, name, part = labels.get(int(names[column]), (kind, "(not on this rank)", ""))
            found.append(Violation(kind=kind, name=name, part=part, axis=axis_name, ranks=odd))
    place = {label: position for position, label in enumerate(labels.values())}
    found.sort(key=lambda v: (KINDS.index(v.kind), place.get((v.kind, v.name, v.part), len(place))))
    return found + list(_read_twice(aligned, at, grid))


def _suspects(aligned: Tensor, lines: Tensor, axis: int) -> Tensor:
    """Columns in which, on some line, two ranks say the same place along `axis` and have different checksums."""
    told = aligned[lines]  # (lines, ranks of a line, names, 4)
    # Ranks that say nothing along this axis get places of their own.
    own = torch.arange(lines.shape[1]).reshape(1, -1, 1).expand(told.shape[:3])
    place = torch.where((told[..., AXES] >> axis & 1).bool(), told[..., PLACE], own)
    place, order = place.sort(dim=1)
    sums = told[..., SUM].gather(1, order)
    bad = (place[:, 1:] == place[:, :-1]) & (sums[:, 1:] != sums[:, :-1])
    return bad.flatten(0, 1).any(0).nonzero().flatten()


def _odd_ones(lines: Sequence[Tensor], axis: int) -> list[tuple[int, int]]:
    """(line, position) of the ranks that differ from the majority of those with the same place."""
    odd = []
    for i, line in enumerate(lines):
        places: dict[int, dict[int, int]] = {}
        for j, row in enumerate(line.tolist()):
            if row[AXES] >> axis & 1:
                places.setdefault(row[PLACE], {})[j] = row[SUM]
        for sums in places.values():
            most, count = Counter(sums.values()).most_common(1)[0]
            odd += [(i, j) for j, own in sums.items() if count < len(sums) and (own != most or 2 * count <= len(sums))]
    return odd


def _read_twice(aligned: Tensor, at: Mapping[int, int], grid: Grid) -> Iterator[Violation]:
    """Batches, all leaves of them, that several data ranks have read."""
    batch = aligned[:, (aligned[..., AXES].amax(0) >> KIND_BITS) == KINDS.index("batch"), SUM]
    if not batch.numel() or not grid.data:
        return
    twins: dict[str, set[int]] = {}
    for line in grid.lines(grid.data):
        read: dict[tuple[int, ...], list[int]] = {}
        for rank in line:
            read.setdefault(tuple(batch[at[rank]].tolist()), []).append(rank)
        for ranks in read.values():
            if len(ranks) > 1:
                twins.setdefault(grid.between(ranks), set()).update(ranks)
    for axis, among in twins.items():
        yield Violation(kind="batch", name="batch", axis=axis, ranks=tuple(sorted(among)), same=True)
