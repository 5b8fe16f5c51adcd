"""Notes every collective that this process calls, whoever calls it: user code, FSDP, DTensor, DDP's native reducer."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardproof.ranks.failure import is_user_code
from shardproof.ranks.journal import Journal, Spot

if TYPE_CHECKING:
    from torch import Tensor

_SHOWN_TENSORS = 4
_ENTRY = str(Path(__file__).with_name("answer.py"))
"""Where this room calls the target. A rank that was forked has the stack of its parent below that."""


@dataclass(frozen=True, slots=True)
class _Operator:
    """What to say of an operator of torch's `c10d` namespace. Numbers are positions among its arguments."""

    name: str
    """Of the function in `torch.distributed`."""
    tensors: int | None = None
    reduction: int | None = None
    root: int | None = None
    even: bool = True
    """Whether all ranks bring tensors of the same size."""
    alike: bool = False
    """Whether even of the same shape, as torch's own debug mode wants it: a flat buffer may receive a broadcast."""


_OPERATORS = {
    "allreduce_": _Operator("all_reduce", 0, reduction=2, alike=True),
    "allreduce_coalesced_": _Operator("all_reduce_coalesced", 0, reduction=2, alike=True),
    "broadcast_": _Operator("broadcast", 0, root=2),
    "reduce_": _Operator("reduce", 0, reduction=2, root=3),
    "allgather_": _Operator("all_gather", 1, even=False),
    "_allgather_base_": _Operator("all_gather_into_tensor", 1),
    "allgather_coalesced_": _Operator("all_gather_coalesced", 1, even=False),
    "allgather_into_tensor_coalesced_": _Operator("all_gather_into_tensor_coalesced", 1),
    "reduce_scatter_": _Operator("reduce_scatter", 0, reduction=3, even=False),
    "_reduce_scatter_base_": _Operator("reduce_scatter_tensor", 1, reduction=3),
    "reduce_scatter_tensor_coalesced_": _Operator("reduce_scatter_tensor_coalesced", 1, reduction=3),
    "gather_": _Operator("gather", 1, root=3, even=False),
    "scatter_": _Operator("scatter", 0, root=3, even=False),
    "alltoall_": _Operator("all_to_all", 1, even=False),
    "alltoall_base_": _Operator("all_to_all_single", 1, even=False),
    "barrier": _Operator("barrier"),
}
"""Collectives; sending from one rank to another is none."""

_libraries: list[object] = []
"""Torch takes back what is registered when its library object goes. A process that a rank forks has it already."""
_listening: list[Journal] = []
"""The journal of this process, alone."""


@cache
def own_journal() -> Journal:
    """The journal of this process, where it is one of a launch: kept from the first time that it is asked for."""
    journal = Journal()
    overhear(journal)
    return journal


def overhear(journal: Journal) -> None:
    """From now on `journal` gets every collective of this process, and no other does: about 20 us a collective.

    Each goes through torch's dispatcher. What is registered here for a key that all of them pass, whatever their
    device and whoever calls them, hands the call on to what was there.
    """
    import torch  # noqa: PLC0415  (the room must be importable without torch)

    _listening[:] = [journal]
    if _libraries:
        return
    library = torch.library.Library("c10d", "IMPL")  # type: ignore[no-untyped-call]
    _libraries.append(library)
    for name, about in _OPERATORS.items():
        packet = getattr(torch.ops.c10d, name, None)
        if packet is not None:
            kernel = _noting(packet.default, about)
            library.impl(name, kernel, "BackendSelect", with_keyset=True)  # type: ignore[no-untyped-call]


def _noting(operator: Any, about: _Operator) -> Callable[..., Any]:
    import torch  # noqa: PLC0415  (the room must be importable without torch)

    key = torch._C.DispatchKey.BackendSelect
    at = [argument.name for argument in operator._schema.arguments].index("process_group")

    def note_and_call(keyset: Any, *args: Any) -> Any:
        # Whoever looks on must not break what is looked at.
        with contextlib.suppress(Exception):
            _note(about, args[at], args, _listening[0])
        return operator.redispatch(keyset.remove(key), *args)

    # A compiled model calls collectives as well, and Dynamo would compile what they call in Python.
    kernel: Callable[..., Any] = torch.compiler.disable(note_and_call)  # type: ignore[no-untyped-call]
    return kernel


def _note(about: _Operator, boxed: Any, args: Sequence[Any], journal: Journal) -> None:
    import torch.distributed as dist  # noqa: PLC0415  (the room must be importable without torch)

    group = dist.ProcessGroup.unbox(boxed)
    ranks = dist.get_process_group_ranks(group)
    if len(ranks) < 2:
        return
    shapes, kinds, counts = [], [], []
    for tensor in _tensors(args[about.tensors]) if about.tensors is not None else ():
        kind = str(tensor.dtype).removeprefix("torch.")
        shapes.append(f"{kind} {list(tensor.shape)}")
        kinds.append(kind)
        counts.append(str(tensor.numel()))
    parts = []
    if about.reduction is not None:
        parts.append(_reduction(args[about.reduction]))
    if about.root is not None:
        parts.append(f"{'to' if about.name in {'gather', 'reduce'} else 'from'} rank {ranks[args[about.root]]}")
    how = " ".join(parts)
    if shapes:
        more = f" and {len(shapes) - _SHOWN_TENSORS} more" if len(shapes) > _SHOWN_TENSORS else ""
        parts.append(f"of {', '.join(shapes[:_SHOWN_TENSORS])}{more}")
    sizes = " ".join((*kinds, *counts))
    same = f"{about.name} {how} {shapes if about.alike else sizes if about.even else kinds[:1]}"
    handled = sys.exc_info()[1]
    if handled is not None:
        # As in a `finally:` that waits for the others: the exception is the cause, and has not been raised yet.
        parts.append(f"while it handles {type(handled).__name__}: {handled}")
    described = group.group_desc or ""
    axis = described.removeprefix("mesh_") if described.startswith("mesh_") else ""
    journal.note(group.group_name, axis, ranks, (about.name, " ".join(parts), same, sizes), user_spot(sys._getframe(1)))


def _tensors(argument: Any) -> Iterator[Tensor]:
    """The tensors of an argument, which is one, a list of them or a list of lists."""
    if isinstance(argument, list | tuple):
        for part in argument:
            yield from _tensors(part)
    else:
        yield argument


def _reduction(boxed: Any) -> str:
    """`SUM`, out of torch's box for C++ objects, which answers methods of the object alone."""
    from torch.distributed import ReduceOp  # noqa: PLC0415  (the room must be importable without torch)

    return str(ReduceOp.RedOpType(boxed.op()).name)


def user_spot(frame: Any) -> Spot | None:
    """The innermost line of the user's own code, from `frame` outwards; what has called shardproof is none."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _ENTRY:
            return None
        if _is_user_code(code.co_filename):
            return Spot(code.co_filename, frame.f_lineno or 0, code.co_name)
        frame = frame.f_back
    return None


_is_user_code = cache(is_user_code)
