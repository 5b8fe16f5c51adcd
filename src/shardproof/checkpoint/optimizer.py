"""An optimizer's state by canonical parameter name, whatever tensors it really steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shardproof.checkpoint.index import Index, Saved
from shardproof.checkpoint.placed import Placed, holds_nothing, is_whole
from shardproof.checkpoint.plain import decode, encode
from shardproof.checkpoint.portion import Portion
from shardproof.checkpoint.state import MODEL, OPTIMIZER, some
from shardproof.errors import CheckpointError
from shardproof.parallel import piece
from shardproof.parallel.held import plain

OWN_CHOICES = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""Entries of a param group that say how this machine computes a step, not which step: a checkpoint leaves them."""

ON_HOST = frozenset({"step", "mu_product"})
"""Counters that torch's optimizers keep on the CPU, unless the group is `capturable` or `fused`."""


@dataclass(frozen=True, slots=True)
class Collected:
    """What a checkpoint holds of an optimizer."""

    portions: dict[str, Portion] = field(default_factory=dict)

    about: dict[str, Any] | None = None
    """Kind and param groups, as JSON."""

    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    """{parameter: {entry: JSON}}: what is no tensor."""


def collect(optimizer: Optimizer | None, parameters: Sequence[Placed]) -> Collected:
    """What to save of `optimizer`. The portions share its memory.

    Raises `CheckpointError` for what no other layout could be given.
    """
    if optimizer is None:
        return Collected()
    names = _names(parameters)
    about = {"kind": _kind(optimizer), "groups": [_group(i, g, names) for i, g in enumerate(optimizer.param_groups)]}
    collected = Collected(about=about)
    for placed in parameters:
        state = optimizer.state.get(placed.held.leaf)
        if state is None or holds_nothing(placed.held):
            continue
        for entry, value in state.items():
            where = f"{OPTIMIZER}{placed.name}/{entry}"
            if isinstance(value, Tensor):
                collected.portions[where] = _portion(placed, value, where)
            else:
                collected.entries.setdefault(placed.name, {})[str(entry)] = encode(value, where)
    return collected


def _portion(placed: Placed, value: Tensor, where: str) -> Portion:
    held = placed.held
    if value.shape == held.leaf.shape:
        return placed.portion(value)
    if isinstance(value, DTensor):
        place = piece.of_tensor(value)
        if place.pending:
            raise CheckpointError(f"{where} is a partial sum over ranks, which no rank can save")
        return Portion(place, plain(value.detach()))
    if value.dim() == 0 or is_whole(held):
        return Portion(piece.whole(value.shape), plain(value.detach()))
    raise CheckpointError(_no_place(where, tuple(value.shape), placed))


def _no_place(where: str, shape: tuple[int, ...], placed: Placed) -> str:
    return (
        f"{where} has shape {shape}, and this rank holds {placed.held.piece.local_shape} of the parameter's "
        f"{placed.whole}: nothing says which part of the whole state that is. Use fully_shard (fsdp) or ddp with an "
        "optimizer whose state is not shaped like its parameters, or checkpoint without the optimizer"
    )


def _names(parameters: Iterable[Placed]) -> dict[int, list[str]]:
    """Identity of a leaf -> the names that it stands for."""
    names: dict[int, list[str]] = {}
    for placed in parameters:
        names.setdefault(id(placed.held.leaf), []).append(placed.name)
    return names


def _kind(optimizer: Optimizer) -> str:
    return type(optimizer).__qualname__


def _group(number: int, group: Mapping[str, Any], names: Mapping[int, list[str]]) -> dict[str, Any]:
    return {
        "parameters": _members(number, group, names),
        "options": {
            key: encode(value, f"param group {number}: {key}")
            for key, value in group.items()
            # torch's own names of parameters, where it was given any, are those of one layout.
            if key not in OWN_CHOICES and key not in ("params", "param_names")
        },
    }


def _members(number: int, group: Mapping[str, Any], names: Mapping[int, list[str]]) -> list[str]:
    members = []
    for parameter in group["params"]:
        if id(parameter) not in names:
            raise CheckpointError(
                f"the optimizer's param group {number} holds a parameter of shape {tuple(parameter.shape)} that is "
                "not the model's; build the optimizer from the laid-out model"
            )
        members.extend(names[id(parameter)])
    return sorted(members)


@dataclass(slots=True)
class Restoring:
    """Optimizer state that is about to be read, beside the live one until all of it has been."""

    optimizer: Optimizer

    groups: list[dict[str, Any]]
    """What the live param groups are to hold, but for their parameters."""

    state: dict[nn.Parameter, dict[str, Any]] = field(default_factory=dict)

    portions: dict[str, Portion] = field(default_factory=dict)
    """What to read, and into which tensors: the live ones where there are any."""

    def finish(self) -> None:
        """Hand everything that was read to the optimizer. Entries that were not saved are gone."""
        for group, saved in zip(self.optimizer.param_groups, self.groups, strict=True):
            for key, value in saved.items():
                live = group.get(key)
                if isinstance(live, Tensor) and isinstance(value, Tensor | float | int):
                    # Compiled and captured steps read the very tensor.
                    live.detach().copy_(torch.as_tensor(value))
                else:
                    group[key] = value
        self.optimizer.state.clear()
        for leaf, state in self.state.items():
            self.optimizer.state[leaf] = state


def restore(optimizer: Optimizer, parameters: Sequence[Placed], index: Index, where: str) -> Restoring:
    """Prepare to read the optimizer's state. Raises `CheckpointError` where another optimizer was saved."""
    about = index.optimizer
    if about is None:
        raise CheckpointError(f"{where} holds no optimizer; load it with optimizer=None, for the model alone")
    groups = _checked_groups(optimizer, _names(parameters), about, where)
    options = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    wanted = _wanted(index)
    unknown = wanted.keys() - {placed.name for placed in parameters}
    if unknown:
        raise CheckpointError(
            f"{where} holds optimizer state of {some(sorted(unknown))}, which the model does not have"
        )
    restoring = Restoring(optimizer, groups)
    numbers = about.get("state") or {}
    for placed in parameters:
        if holds_nothing(placed.held) or not (placed.name in wanted or placed.name in numbers):
            continue
        leaf = placed.held.leaf
        live = optimizer.state.get(leaf, {})
        state = restoring.state.setdefault(leaf, {})
        for entry, saved in wanted.get(placed.name, {}).items():
            key = f"{OPTIMIZER}{placed.name}/{entry}"
            if entry not in state:
                # FSDP's flat parameters share one state between several names.
                model = index.tensors.get(MODEL + placed.name)
                state[entry] = _live(placed, live.get(entry), saved, key)
                if state[entry] is None:
                    state[entry] = _new(placed, entry, saved, model, options.get(id(leaf), {}))
            portion = _portion(placed, state[entry], key)
            if portion.piece.whole != saved.shape:
                raise CheckpointError(
                    f"{where}: {key} has shape {saved.shape}, and this optimizer's has {portion.piece.whole}; "
                    "build the optimizer with the options that it was saved with"
                )
            restoring.portions[key] = portion
        for entry, value in numbers.get(placed.name, {}).items():
            state[entry] = decode(value)
    return restoring


def _wanted(index: Index) -> dict[str, dict[str, Saved]]:
    """{parameter: {entry: tensor}} of the optimizer state that was saved."""
    wanted: dict[str, dict[str, Saved]] = {}
    for key, saved in index.tensors.items():
        if key.startswith(OPTIMIZER):
            # No entry has a slash in its name, and a module might.
            name, _, entry = key.removeprefix(OPTIMIZER).rpartition("/")
            wanted.setdefault(name, {})[entry] = saved
    return wanted


def _live(placed: Placed, live: Any, saved: Saved, where: str) -> Tensor | None:
    """The live tensor of an entry, where it can take what was saved."""
    if isinstance(live, Tensor) and _portion(placed, live, where).piece.whole == saved.shape:
        return live
    return None


def _new(placed: Placed, entry: str, saved: Saved, model: Saved | None, options: Mapping[str, Any]) -> Tensor:
    """A tensor for an entry, made as the optimizer would have made it."""
    leaf = placed.held.leaf.detach()
    # Half-precision parameters have half-precision state, unless the optimizer keeps its own in another dtype.
    dtype = leaf.dtype if model is not None and saved.dtype == model.dtype else saved.dtype
    if saved.shape == placed.whole:
        return torch.zeros_like(leaf, dtype=dtype)
    if not saved.shape:
        on_host = entry in ON_HOST and not (options.get("capturable") or options.get("fused"))
        return torch.zeros((), dtype=saved.dtype, device=torch.device("cpu") if on_host else plain(leaf).device)
    if isinstance(leaf, DTensor) or is_whole(placed.held):
        return leaf.new_zeros(saved.shape, dtype=dtype)
    raise CheckpointError(_no_place(f"{OPTIMIZER}{placed.name}/{entry}", saved.shape, placed))


def _checked_groups(
    optimizer: Optimizer, names: Mapping[int, list[str]], about: Mapping[str, Any], where: str
) -> list[dict[str, Any]]:
    """The saved options of every group. Raises `CheckpointError` unless groups hold the same parameters."""
    kind, groups = about.get("kind"), about.get("groups")
    if kind != _kind(optimizer):
        raise CheckpointError(
            f"{where} holds the state of {kind}, and this optimizer is {_kind(optimizer)}; "
            "build the optimizer that was saved, or load with optimizer=None, for the model alone"
        )
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise CheckpointError(f"{where}: the index has no param groups; it is damaged, load an earlier checkpoint")
    if len(groups) != len(optimizer.param_groups):
        raise CheckpointError(
            f"{where} has {len(groups)} param groups, and this optimizer has {len(optimizer.param_groups)}; "
            "build the optimizer with the groups that were saved"
        )
    options = []
    for number, (live, saved) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        here, there = set(_members(number, live, names)), set(saved.get("parameters", ()))
        if here != there:
            only = [f"only here: {some(sorted(here - there))}"] if here - there else []
            only += [f"only in the checkpoint: {some(sorted(there - here))}"] if there - here else []
            raise CheckpointError(
                f"{where}: param group {number} holds other parameters than it did; {'; '.join(only)}. "
                "Build the optimizer with the groups that were saved"
            )
        options.append({key: decode(value) for key, value in saved.get("options", {}).items()})
    return options
