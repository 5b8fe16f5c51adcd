"""Written-down tensor operations, and the running of them again with as few tensors alive as possible.

An operation names the storages that it reads and writes instead of the tensors, so that views need no operations of
their own: a tensor is a storage and a geometry.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from shardproof.errors import ExperimentError
from shardproof.parallel.initial import default_dtype

Storages = dict[int, torch.UntypedStorage]
"""Number of a storage -> its bytes."""


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor as a storage and a geometry."""

    storage: int
    nbytes: int
    """Of the whole storage."""
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    conj: bool = False
    neg: bool = False

    @property
    def covers(self) -> bool:
        """Whether the tensor is all of its storage, each element once."""
        expected, elements = 1, 1
        for stride, size in sorted(zip(self.stride, self.size, strict=True)):
            if size != 1 and stride != expected:
                return False
            expected *= size
            elements *= size
        return elements * self.dtype.itemsize == self.nbytes

    def view(self, storage: torch.UntypedStorage) -> Tensor:
        """The tensor on real bytes."""
        tensor = torch.empty(0, dtype=self.dtype, device=storage.device)
        tensor.set_(storage, self.offset, self.size, self.stride)
        if self.conj:
            tensor = torch.conj(tensor)
        return torch._neg_view(tensor) if self.neg else tensor


@dataclass(frozen=True, slots=True)
class Draw:
    """That an operation draws random numbers, and from what."""

    stream: int
    """Number of the generator; 0 is torch's own."""

    start: Tensor | int | None = None
    """Where the generator was set before: to a state, or back to where it was after the operation of that number."""


@dataclass(frozen=True, slots=True)
class Op:
    """One operation, with a `Ref` wherever it was given a tensor."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    reads: frozenset[int]
    """Storages whose values it depends on, those that it changes only in part or in place included."""

    writes: frozenset[int]
    clears: frozenset[int]
    """Those of `writes` of which nothing from before is left."""

    outputs: tuple[Ref | None, ...]
    """What it returns, flattened; None for what is no tensor, or one that it was given."""

    dtype: torch.dtype
    """The default floating dtype at the time."""

    draw: Draw | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """An operation that has to run."""

    number: int
    op: Op
    only_draws: bool
    """Nobody reads what it writes: it runs for the sake of those who draw after it."""


def choose(ops: Sequence[Op], wanted: Collection[int], *, drawn: int = 0, cached: Mapping[int, int]) -> list[Chosen]:
    """The operations behind the storages `wanted`, in order, and every draw from operation `drawn` on.

    `cached` are storages whose value after the operation of that number is known. With `drawn` beyond the end, only
    what the values themselves need is returned.
    """
    live, chosen = set(wanted), []
    for number in reversed(range(len(ops))):
        op = ops[number]
        # Known as it was after this operation.
        live -= {storage for storage in live if cached.get(storage) == number}
        if not live and number < drawn:
            break
        needed = bool(live & op.writes)
        drawing = op.draw is not None and number >= drawn
        # One that draws by what it reads has to read it even if nobody wants the result.
        needed = needed or (drawing and bool(op.reads & op.writes))
        if needed or drawing:
            if needed:
                live -= op.clears
            live |= op.reads
            chosen.append(Chosen(number, op, not needed))
    return chosen[::-1]


def early(chosen: Sequence[Chosen]) -> list[Chosen]:
    """The same operations, each that draws nothing as soon after what it depends on as possible.

    What a constructor does to all parameters at its end (a cast, a factor) is then done to each by itself, so that
    one after the other can be let go of. Draws keep their order, as their stream is shared.
    """
    slot_of: dict[int, int] = {}
    keyed = []
    drawn = 0
    for index, item in enumerate(chosen):
        touched = item.op.reads | (frozenset() if item.only_draws else item.op.writes)
        before = [slot_of[storage] for storage in touched if storage in slot_of]
        if item.op.draw is not None:
            drawn += 1
        slot = drawn if item.op.draw is not None or not before else max(before)
        for storage in touched:
            # What reads a storage may not be overtaken by who writes it later.
            slot_of[storage] = max(slot, slot_of.get(storage, 0))
        keyed.append((slot, index, item))
    return [item for _, _, item in sorted(keyed, key=lambda entry: entry[:2])]


class Machine:
    """Runs operations on real tensors on the CPU, and keeps the storages that they made."""

    def __init__(self, saves: Collection[int]) -> None:
        """`saves` are the numbers of the draws to whose end a generator is set back later."""
        self.values: Storages = {}
        self.peak_bytes = 0
        self._saves, self._saved = saves, dict[int, Tensor]()
        self._generators = {0: torch.default_generator}

    def run(self, item: Chosen) -> None:
        """Run one operation; what it only draws is dropped at once."""
        op, kwargs = item.op, dict(item.op.kwargs)
        made: dict[int, torch.UntypedStorage] = {}

        def real(ref: Ref) -> Tensor:
            storages = made if item.only_draws and ref.storage in op.writes else self.values
            if ref.storage not in storages:
                storages[ref.storage] = _bytes(ref)
            return ref.view(storages[ref.storage])

        args, kwargs = tree_map_only(Ref, real, (op.args, kwargs))
        generator = None
        if op.draw is not None:
            generator = self._set(op.draw)
            if kwargs.get("generator") is not None:
                kwargs["generator"] = generator
        with torch.no_grad(), default_dtype(op.dtype):
            results = tree_flatten(op.func(*args, **kwargs))[0]
        if generator is not None and item.number in self._saves:
            self._saved[item.number] = generator.get_state()
        given = {storage.data_ptr() for storage in (self.values | made).values()}
        temporary = sum(storage.nbytes() for storage in made.values())
        for ref, result in zip(op.outputs, results, strict=True):
            if ref is None:
                continue
            if item.only_draws:
                temporary += ref.nbytes
            elif ref.storage in self.values:
                ref.view(self.values[ref.storage]).copy_(result)
            else:
                self.values[ref.storage] = _storage(ref, result, given)
        self.peak_bytes = max(self.peak_bytes, temporary + sum(value.nbytes() for value in self.values.values()))

    def _set(self, draw: Draw) -> torch.Generator:
        generator = self._generators.setdefault(draw.stream, torch.Generator())
        if isinstance(draw.start, Tensor):
            generator.set_state(draw.start)
        elif draw.start is not None:
            generator.set_state(self._saved[draw.start])
        return generator


def _bytes(ref: Ref) -> torch.UntypedStorage:
    return torch.empty(ref.nbytes, dtype=torch.uint8, device="cpu").untyped_storage()


def _storage(ref: Ref, result: Tensor, given: Collection[int]) -> torch.UntypedStorage:
    """The bytes of a result that lies as `ref` says; copied where a kernel laid it out otherwise."""
    if tuple(result.shape) != ref.size or result.dtype != ref.dtype:
        raise ExperimentError(
            f"the model cannot be built on the meta device: a {ref.dtype} tensor of shape {ref.size} became "
            f"{result.dtype} of shape {tuple(result.shape)} with its values; use init_device='cpu'"
        )
    storage = result.untyped_storage()
    alike = (tuple(result.stride()), result.storage_offset(), storage.nbytes()) == (ref.stride, ref.offset, ref.nbytes)
    flags = (result.is_conj(), result.is_neg()) == (ref.conj, ref.neg)
    if alike and flags and storage.data_ptr() not in given:
        return storage
    storage = _bytes(ref)
    ref.view(storage).copy_(result)
    return storage


def replay(machine: Machine, order: Sequence[Chosen], kept: Collection[int]) -> Iterator[int]:
    """Run operations in order; yield each of the storages `kept` when its value is final, and then let go of it."""
    last: dict[int, int] = {}
    for index, item in enumerate(order):
        for storage in item.op.reads | item.op.writes:
            last[storage] = index
    ends: dict[int, list[int]] = {}
    for storage, index in last.items():
        ends.setdefault(index, []).append(storage)
    for index, item in enumerate(order):
        machine.run(item)
        for storage in ends.get(index, ()):
            if storage in machine.values:
                if storage in kept:
                    yield storage
                del machine.values[storage]
