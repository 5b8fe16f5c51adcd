"""A tensor-parallel plan: from names and patterns to one torch ParallelStyle per module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from shardproof.errors import ExperimentError, StrategyError
from shardproof.parallel.names import join
from shardproof.spec.patterns import select
from shardproof.spec.strategies import suggest


class ReplicateParallel(ParallelStyle):
    """Parameters kept whole on every `tp` rank, as DTensors, so that their gradients are known to be replicated."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(_module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
            return tuple(
                DTensor.from_local(value, mesh, (Replicate(),), run_check=False)
                if isinstance(value, Tensor) and not isinstance(value, DTensor)
                else value
                for value in inputs
            )

        def leave(_module: nn.Module, output: Any, _mesh: DeviceMesh) -> Any:
            return output.redistribute(placements=(Replicate(),)).to_local() if isinstance(output, DTensor) else output

        return distribute_module(module, device_mesh, None, partial(enter), partial(leave))  # type: ignore[arg-type]


STYLES: dict[str, Callable[[nn.Module], ParallelStyle]] = {
    "colwise": lambda _module: ColwiseParallel(),
    "colwise_gather": lambda _module: ColwiseParallel(output_layouts=Replicate()),
    # An embedding's input is token ids, the same on every rank; a linear layer's is split by the layer before it.
    "rowwise": lambda module: (
        RowwiseParallel(input_layouts=Replicate()) if isinstance(module, nn.Embedding) else RowwiseParallel()
    ),
    "rowwise_split_input": lambda _module: RowwiseParallel(input_layouts=Replicate()),
    "sequence": lambda _module: SequenceParallel(),
    "replicate": lambda _module: ReplicateParallel(),
}
"""Name in a `tp_plan` -> the torch style for a module. Megatron-LM section 3 (arXiv:1909.08053) names the first two."""


def resolve(model: nn.Module, plan: Mapping[str, str | ParallelStyle]) -> dict[str, ParallelStyle]:
    """One style per module name; a later pattern wins where several match, as the more special one.

    Raises `PatternError` where a pattern matches nothing, `ExperimentError` for a style that does not exist.
    """
    modules = dict(model.named_modules())
    styles: dict[str, ParallelStyle] = {}
    for pattern, style in plan.items():
        # The root has no name; torch's parallelize_module writes it as the empty pattern.
        for name in [""] if not pattern else select(modules, pattern, field="tp_plan"):
            styles[name] = _style(style, modules[name], pattern)
    return styles


def _style(style: str | ParallelStyle, module: nn.Module, pattern: str) -> ParallelStyle:
    if isinstance(style, ParallelStyle):
        # Styles keep what they learn of a module; each module gets its own.
        return copy.copy(style)
    if not isinstance(style, str):
        raise ExperimentError(f"tp_plan: {pattern!r} is {style!r}; give a name or a torch ParallelStyle")
    if style.replace("-", "_") not in STYLES:
        raise ExperimentError(f"tp_plan: {pattern!r} is {style!r}, which is no style; {suggest(style, STYLES)}")
    return STYLES[style.replace("-", "_")](module)


def apply(model: nn.Module, plan: Mapping[str, str | ParallelStyle], mesh: DeviceMesh) -> None:
    """Split `model` over `mesh` (the `tp` axis) in place, keeping tied parameters tied.

    Raises `StrategyError` where torch refuses a style, or where tied parameters would be cut in different ways.
    """
    tied = _tied(model)
    for name, style in resolve(model, plan).items():
        module = model.get_submodule(name)
        try:
            parallelize_module(module, mesh, style)
        except (NotImplementedError, ValueError, RuntimeError) as error:
            raise StrategyError(
                f"tp_plan: {name!r} ({type(module).__name__}) cannot be {type(style).__name__} "
                f"over tp={mesh.size()}: {error}"
            ) from error
    for group in tied:
        _tie(model, group)


def _tied(model: nn.Module) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                groups.setdefault(id(parameter), []).append(join(prefix, name))
    return [group for group in groups.values() if len(group) > 1]


def _tie(model: nn.Module, names: list[str]) -> None:
    """Torch distributes each module by itself and so cuts a tie; mend it where both ends lie alike."""
    first = model.get_parameter(names[0])
    for name in names[1:]:
        other = model.get_parameter(name)
        if other is first:
            continue
        if _placed(first) != _placed(other):
            raise StrategyError(
                f"tp_plan: {names[0]} and {name} are tied but laid out differently "
                f"({_placed(first)} against {_placed(other)}); give both the same dim"
            )
        prefix, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(prefix), attribute, first)


def _placed(parameter: Tensor) -> str:
    return str(parameter.placements) if isinstance(parameter, DTensor) else "not split"


def splits_batch(plan: Mapping[str, str | ParallelStyle]) -> bool:
    """Whether the plan itself says that some module's input arrives split over `tp` along the batch dim."""
    for style in plan.values():
        layouts: Any = getattr(style, "input_layouts", None)
        for layout in layouts if isinstance(layouts, tuple | list) else (layouts,):
            if getattr(layout, "dim", None) == 0:
                return True
    return False
