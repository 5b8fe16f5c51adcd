"""What ranks do together around a checkpoint: agree that none of them failed, over a process group of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from shardproof.errors import CheckpointError

T = TypeVar("T")

PATIENCE = timedelta(hours=1)
"""How long ranks wait for the slowest writer, and so for one that is lost without a word, as with its cable."""

SHOWN = 3
"""Ranks whose errors are told."""

_own: dict[str, Any] = {}
"""The process group for checkpoints, and the default group it was made beside."""


def own_group() -> dist.ProcessGroup | None:
    """A gloo group of all ranks, made once per default process group; None where there is none.

    A collective at its first call: gloo works beside NCCL, and a thread that writes in the background must not use
    the group that training uses. Raises `CheckpointError` where it cannot be made.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    world = dist.group.WORLD
    if _own.get("world") is not world:
        try:
            _own["group"] = dist.new_group(backend="gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"checkpoints need a gloo process group beside {dist.get_backend()}'s, which cannot be made: {error}"
            ) from error
        _own["world"] = world
    group: dist.ProcessGroup = _own["group"]
    return group


def rank_of(group: dist.ProcessGroup | None) -> int:
    """This rank in `group`; 0 without one."""
    return 0 if group is None else dist.get_rank(group)


def together(work: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """What `work` returns on this rank, once it is known to have worked on all of them.

    Raises `CheckpointError` on every rank where it failed on any, and what it raised itself without a group.
    """
    result: T | None = None
    failed: Exception | None = None
    try:
        result = work()
    # Whatever happens here, the others wait for word of it.
    except Exception as error:  # noqa: BLE001
        failed = error
    if group is not None:
        told: list[str | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(told, None if failed is None else said(failed), group=group)
        failures = {rank: text for rank, text in enumerate(told) if text is not None}
        if failures:
            raise CheckpointError(listed(failures)) from failed
    if failed is not None:
        raise failed if isinstance(failed, CheckpointError) else CheckpointError(said(failed)) from failed
    return result  # type: ignore[return-value]  # it worked


def from_first(work: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """What `work` returns on the first rank, which alone does it, handed to all. Raises `CheckpointError` on all."""
    first = together(work if rank_of(group) == 0 else lambda: None, group)
    if group is None:
        return first  # type: ignore[return-value]  # the only rank is the first
    box: list[Any] = [first]
    dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
    result: T = box[0]
    return result


def said(error: BaseException) -> str:
    """An error in one text: a CheckpointError has said all that there is to say."""
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def listed(failures: Mapping[int, str]) -> str:
    """What ranks said, each text once."""
    ranks: dict[str, list[int]] = {}
    for rank, text in failures.items():
        ranks.setdefault(text, []).append(rank)
    if len(ranks) == 1:
        text, every = next(iter(ranks.items()))
        return text if len(every) > 1 or every == [0] else f"rank {every[0]}: {text}"
    shown = [f"rank {every[0]}: {text}" for text, every in list(ranks.items())[:SHOWN]]
    rest = len(ranks) - len(shown)
    return "\n".join([*shown, f"and {rest} more"] if rest else shown)
