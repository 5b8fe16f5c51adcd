"""The parameters of a laid-out model as this rank holds them, by canonical name.

Whoever needs to know where a parameter lies (the trace, the gradient norm, the check that a strategy was applied)
asks here, so that plain tensors, DTensors and FSDP's flat parameters are told apart in one place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._flat_param import FlatParameter, FlatParamHandle
from torch.distributed.fsdp._fully_shard._fsdp_param import ShardedState
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from shardproof.parallel import piece
from shardproof.parallel.names import canonical_modules, join
from shardproof.parallel.piece import Piece


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """One parameter as this rank holds it."""

    name: str
    """Canonical name."""

    leaf: nn.Parameter
    """The parameter that the optimizer sees; several names may share one (FSDP's flat parameters)."""

    piece: Piece
    """Where this rank's part of it lies."""

    window: tuple[int, int] | None = None
    """Which elements of the flattened leaf belong to this name, where the leaf holds more than one."""

    canonical: tuple[int, ...] | None = None
    """Shape of the parameter on one device, where it is known."""

    group: dist.ProcessGroup | None = None
    """The ranks among which FSDP's flat parameter is cut; None for anything else."""

    @property
    def split_by_hand(self) -> bool:
        """Whether a plain tensor smaller than the canonical one was made: tensor parallelism without DTensor."""
        if self.canonical is not None and self.piece.whole != self.canonical:
            return True
        return not self.piece.declared and self.piece.shape != self.piece.whole

    def local(self, tensor: Tensor) -> Tensor:
        """The plain local elements of `tensor`, which is shaped like the leaf: a value, gradient or optimizer state."""
        tensor = plain(tensor)
        if self.window is not None:
            tensor = tensor.reshape(-1)[self.window[0] : self.window[1]]
        return tensor.reshape(self.piece.local_shape) if self.piece.stretch is not None else tensor

    def piece_of(self, tensor: Tensor) -> Piece:
        """Where `tensor`, shaped like the leaf, lies: a gradient may be placed otherwise than its parameter."""
        return piece.of_tensor(tensor) if isinstance(tensor, DTensor) else self.piece


def plain(tensor: Tensor) -> Tensor:
    """The local tensor under a DTensor or an unfinished collective, without any communication of its own."""
    if isinstance(tensor, DTensor):
        tensor = tensor._local_tensor
    if isinstance(tensor, AsyncCollectiveTensor):
        tensor = tensor.wait()
    return tensor


def held_parameters(model: nn.Module, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Iterator[Held]:
    """Every parameter of `model` as this rank holds it, parents first, tied ones once, under their first name.

    `shapes` are the canonical shapes by name: they tell a plain tensor that is a part from one that is the whole.
    """
    shapes = shapes or {}
    modules = dict(canonical_modules(model))
    names = {id(module): name for name, module in modules.items()}
    flat = {held.name: held for held in _flat_parameters(model, names)}
    hidden = {id(held.leaf) for held in flat.values()}
    # FSDP keeps what stood at the other end of a tie; under tensor parallelism that is no longer the same object.
    tied = {name for group in _flat_ties(model, names) for name in group}
    sharded = _sharded_parameters(model)
    seen: set[int] = set()
    for prefix, module in modules.items():
        for attribute, parameter in _attributes(module):
            name = join(prefix, attribute)
            # After a forward pass without backward the root of FSDP2 still shows its gathered parameters, which the
            # optimizer knows nothing of.
            parameter = sharded.get((id(module), attribute), parameter)
            if name in flat:
                yield replace(flat[name], canonical=shapes.get(name))
            elif isinstance(parameter, nn.Parameter) and name not in tied and id(parameter) not in seen | hidden:
                seen.add(id(parameter))
                place = piece.of_tensor(parameter, shapes.get(name))
                yield Held(name=name, leaf=parameter, piece=place, canonical=shapes.get(name))


def ties(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups of canonical parameter names that stand for one and the same storage, sorted."""
    names: dict[int, str] = {}
    groups: dict[int, list[str]] = {}
    for prefix, module in canonical_modules(model):
        names[id(module)] = prefix
        for attribute, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, FlatParameter):
                groups.setdefault(id(parameter), []).append(join(prefix, attribute))
    found = {tuple(sorted(group)) for group in groups.values() if len(group) > 1}
    return tuple(sorted(found | _flat_ties(model, names)))


def _flat_ties(model: nn.Module, names: Mapping[int, str]) -> set[tuple[str, ...]]:
    """The ties that FSDP's flat parameters keep."""
    groups: dict[str, set[str]] = {}
    for handle in flat_handles(model):
        for shared in handle.flat_param._shared_param_infos:
            first = join(names.get(id(shared.prim_module), shared.prim_module_name), shared.prim_param_name)
            second = join(names.get(id(shared.module), shared.module_name), shared.param_name)
            groups.setdefault(first, {first}).add(second)
    return {tuple(sorted(group)) for group in groups.values()}


def _attributes(module: nn.Module) -> Iterator[tuple[str, object]]:
    """Parameters under their attribute names; FSDP with `use_orig_params=False` leaves plain tensors there."""
    for name, parameter in module._parameters.items():
        if parameter is not None and not isinstance(parameter, FlatParameter):
            yield name, parameter
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield name, value


def _sharded_parameters(model: nn.Module) -> dict[tuple[int, str], nn.Parameter]:
    """(id of the module, attribute) -> the shard that the optimizer steps, of every parameter that FSDP2 has gathered.

    Of the others the module shows the shard itself, and may show a new one of which FSDP2 learns in the next forward
    pass only: a model is sharded on the meta device and then filled, as transformers does it.
    """
    found: dict[tuple[int, str], nn.Parameter] = {}
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        for group in fsdp2_groups(module):
            for managed in group.fsdp_params:
                if managed.sharded_state is not ShardedState.UNSHARDED:
                    continue
                info = managed._module_info
                places = [(info.module, info.param_name)]
                places += zip(info.shared_modules, info.shared_param_names, strict=True)
                found |= {(id(owner), name): managed.sharded_param for owner, name in places}
    return found


def fsdp2_groups(module: FSDPModule) -> list[Any]:
    """What FSDP2 gathers at once of the parameters of `module`; none for one whose parameters others manage."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    # Before torch 2.13 there is one at most.
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def flat_handles(model: nn.Module) -> Iterator[FlatParamHandle]:
    """FSDP's handles on the flat parameters of `model`, one per unit."""
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel) and module._handle is not None:
            yield module._handle


def _flat_parameters(model: nn.Module, names: dict[int, str]) -> Iterator[Held]:
    """What FSDP's flat parameters hold, under the names that the parameters had before they were flattened."""
    for handle in flat_handles(model):
        flat = handle.flat_param
        originals = flat._params if handle._use_orig_params else None
        for index, info in enumerate(flat._param_infos):
            shard = flat._shard_param_infos[index]
            extension = flat._param_extensions[index]
            box = piece.of_spec(extension) if isinstance(extension, DTensorSpec) else piece.whole(flat._shapes[index])
            start, stop = 0, 0
            if shard.intra_param_start_idx is not None and shard.intra_param_end_idx is not None:
                start, stop = shard.intra_param_start_idx, shard.intra_param_end_idx + 1
            window = None
            if originals is None:
                begin = shard.offset_in_shard or 0
                window = (begin, begin + stop - start)
            yield Held(
                name=join(names.get(id(info.module), info.module_name), info.param_name),
                leaf=flat if originals is None else originals[index],
                piece=Piece(whole=box.whole, offset=box.offset, shape=box.shape, stretch=(start, stop)),
                window=window,
                group=handle.process_group if handle.uses_sharded_strategy else None,
            )


def scale_(tensors: list[Tensor], factor: Tensor | float) -> None:
    """Multiply tensors in place by one number, local part by local part."""
    local = [plain(tensor) for tensor in tensors]
    if local:
        torch._foreach_mul_(local, factor)


def settle_gradients(parameters: Iterable[Held]) -> None:
    """Bring DTensor gradients to the placements of their parameters, summing those that are still partial.

    Sequence parallelism leaves the gradient of a replicated norm as a partial sum until somebody asks for it; the
    optimizer would, but the norm comes first.
    """
    for held in parameters:
        grad, leaf = held.leaf.grad, held.leaf
        if isinstance(grad, DTensor) and isinstance(leaf, DTensor) and grad.placements != leaf.placements:
            leaf.grad = grad.redistribute(leaf.device_mesh, leaf.placements)
