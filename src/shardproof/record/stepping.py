"""The optimizers that really step, without what a framework puts around them."""

from __future__ import annotations

from collections.abc import Iterable

from torch.optim import Optimizer

from shardproof.errors import UsageError


def stepping(given: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    """The torch optimizers inside of the given ones, as a loop has them. Raises `UsageError` for anything else."""
    if given is None:
        return []
    if isinstance(given, Optimizer) or not isinstance(given, Iterable):
        given = [given]
    return [_inner(one) for one in given]


def _inner(given: Optimizer) -> Optimizer:
    """Accelerate's wrapper has no hooks, Fabric's and Lightning's lend those of the inner one, who is told of a step.

    Not every optimizer around an optimizer is such a wrapper: one with hooks of its own takes steps of its own.
    """
    one: object = given
    while isinstance(inner := getattr(one, "optimizer", None), Optimizer) and _hooks(one) in (None, _hooks(inner)):
        one = inner
    if not isinstance(one, Optimizer) or _hooks(one) is None:
        raise UsageError(
            f"optimizer: {type(given).__name__} is no torch.optim.Optimizer; give the torch optimizer inside of it"
        )
    return one


def _hooks(optimizer: object) -> int | None:
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", None)
    return None if hooks is None else id(hooks)
