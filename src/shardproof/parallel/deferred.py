"""Build a model without storage, and fill what a rank holds of it with the values that it has on one device.

A model that is too large for one rank's memory cannot be built and then cut. Here its constructor runs on tensors
without storage while every operation on them is written down (`recording`). Once the model is laid out, each rank runs
the operations again on the CPU, in an order that lets go of each whole tensor early (`replay`), and copies out what it
holds of a parameter as soon as its value is final. Random numbers are drawn for whole tensors, in the order of the
constructor, so that every rank sees the one stream and the values are those of `initial.build`, bit for bit. A rank
needs memory for its shards and about the largest single tensor.

    model, recipe = build_deferred(experiment, dtype)
    shapes = {held.name: tuple(held.leaf.shape) for held in held_parameters(model)}
    laid_out = lay_out(model, experiment, mesh, parallelism)
    recipe.fill(laid_out, held_parameters(laid_out, shapes), device)
    optimizer = experiment.optimizer(laid_out)

DistributedDataParallel and FSDP's flat parameters read values when they wrap a model: where `fills_first` says so,
`fill` comes before `lay_out`, on the model itself, and every rank holds the whole model for a while.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten

from shardproof.errors import ExperimentError, StrategyError
from shardproof.parallel import initial, piece
from shardproof.parallel.held import Held, flat_handles, plain
from shardproof.parallel.names import canonical_modules, join
from shardproof.parallel.recording import WAY_OUT, Above, Below, Recorder
from shardproof.parallel.replay import Machine, Op, Ref, choose, early, replay
from shardproof.spec.experiment import Experiment
from shardproof.spec.parallelism import Parallelism


def fills_first(parallelism: Parallelism) -> bool:
    """Whether a layout needs the values themselves, so that `fill` comes before it: DDP and FSDP's flat parameters."""
    replicated = parallelism.dp_replicate > 1 and parallelism.dp_shard == parallelism.tp == 1
    return replicated or parallelism.flat_parameters


def build_deferred(experiment: Experiment, dtype: torch.dtype) -> tuple[nn.Module, Recipe]:
    """The whole model on the meta device, in `dtype`, and how to fill it.

    The values will be those of `initial.build(experiment, dtype, device)` under `initial.default_dtype(dtype)`. NumPy's
    and Python's random numbers are drawn here, torch's in `Recipe.fill`. A value that the constructor asks for, as
    with `.item()`, is computed on the spot, with everything that is drawn before it where it is random.

    Raises `ExperimentError` as `initial.build` does, and where the constructor does what cannot be written down: the
    message names the operation and the line.
    """
    recorder = Recorder()
    with initial.default_dtype(dtype), Below(recorder), Above(recorder):
        model = initial.build(experiment, dtype, torch.device("cpu"))
    with _identities_kept():
        model._apply(lambda tensor: tensor if tensor.is_meta else recorder.adopt(tensor))  # type: ignore[no-untyped-call]
    tensors = {name: tensor for name, _, _, tensor in _named(model)}
    refs: dict[str, Ref] = {}
    for name, tensor in tensors.items():
        ref = recorder.ref(tensor)
        if ref is not None:
            refs[name] = ref
    _refuse_hidden(model, {id(tensor) for tensor in tensors.values()}, recorder)
    return model, Recipe(recorder.ops, refs, recorder.saves)


class Recipe:
    """How to give a model that was built without storage its values."""

    def __init__(self, ops: list[Op], refs: Mapping[str, Ref], saves: Iterable[int]) -> None:
        self.peak_bytes = 0
        """The most bytes of whole tensors that were alive at a time in `fill`, a kernel's own scratch space aside."""
        self._ops, self._refs, self._saves = ops, dict(refs), frozenset(saves)

    def fill(self, root: nn.Module, parameters: Iterable[Held], device: torch.device) -> None:
        """Give every tensor of `root` storage on `device`, and the values of its part of the whole.

        `parameters` are those of `root` as this rank holds them; parameters stay the objects that they are. `root` is
        the laid-out model, or the model itself where it is laid out afterwards. Raises `StrategyError` for a layout
        whose parts cannot be told without values, `ExperimentError` for a parameter that the model was built without.
        """
        parameters = list(parameters)
        self._check(root, parameters)
        _give_storage(root, device)
        targets: dict[int, list[tuple[Ref, Tensor, piece.Piece]]] = {}
        for held in parameters:
            ref = self._refs[held.name]
            targets.setdefault(ref.storage, []).append((ref, held.local(held.leaf.detach()), held.piece))
        seen = {id(held.leaf) for held in parameters}
        for name, module, attribute, tensor in _named(root):
            if isinstance(tensor, nn.Parameter) or id(tensor) in seen or name not in self._refs:
                continue
            seen.add(id(tensor))
            if tensor.is_meta:
                tensor = torch.empty_like(tensor, device="cpu")
                setattr(module, attribute, tensor)
            ref = self._refs[name]
            targets.setdefault(ref.storage, []).append((ref, plain(tensor), piece.of_tensor(tensor)))
        machine = Machine(self._saves)
        with torch.device("cpu"), torch.no_grad():
            order = early(choose(self._ops, set(targets), drawn=0, cached={}))
            for storage in replay(machine, order, set(targets)):
                for ref, local, place in targets[storage]:
                    local.copy_(place.take(ref.view(machine.values[storage])))
        self.peak_bytes = machine.peak_bytes

    def _check(self, root: nn.Module, parameters: Iterable[Held]) -> None:
        wraps_values = any(isinstance(module, DistributedDataParallel) for module in root.modules())
        if wraps_values or next(flat_handles(root), None) is not None:
            raise StrategyError(
                "DistributedDataParallel and FullyShardedDataParallel need a model's values when they wrap it; "
                f"fill the model before it is laid out, or {WAY_OUT}"
            )
        for held in parameters:
            if held.name not in self._refs:
                raise ExperimentError(
                    f"{held.name} is not among the parameters that Experiment.model built, so nobody knows its "
                    f"initial values; {WAY_OUT}"
                )
            whole = self._refs[held.name].size
            if held.split_by_hand or held.piece.whole != whole:
                raise StrategyError(
                    f"{held.name} has shape {held.piece.shape} of {whole} and does not say which part it is; "
                    f"make it a DTensor, or {WAY_OUT}"
                )


def _give_storage(root: nn.Module, device: torch.device) -> None:
    """Empty storage for what is meta. FSDP and recurrent layers take note of it, as they do of `to_empty`."""
    # A buffer that stands in two places stays one.
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def real(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor.to(device)
        if id(tensor) not in made:
            made[id(tensor)] = (tensor, torch.empty_like(tensor, device=device))
        return made[id(tensor)][1]

    with _identities_kept():
        root._apply(real)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _identities_kept() -> Iterator[None]:
    """Inside, parameters that move to another device stay the objects that they are, tied ones tied."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every tensor that a module holds by name: (name, module, attribute, tensor), those without registration last."""
    for prefix, module in canonical_modules(model):
        for held in (module._parameters, module._buffers, vars(module)):
            for attribute, tensor in held.items():
                if isinstance(tensor, Tensor):
                    yield join(prefix, attribute), module, attribute, tensor


def _refuse_hidden(model: nn.Module, known: set[int], recorder: Recorder) -> None:
    """Tensors in a module's lists and dicts would stay without values."""
    for prefix, module in canonical_modules(model):
        for attribute, value in vars(module).items():
            if attribute in ("_parameters", "_buffers", "_modules"):
                continue
            for leaf in tree_flatten(value)[0]:
                if isinstance(leaf, Tensor) and id(leaf) not in known and recorder.ref(leaf) is not None:
                    raise ExperimentError(
                        f"{join(prefix, attribute)} holds a tensor in a {type(value).__name__}, where it cannot be "
                        f"given values later; register it as a buffer, or {WAY_OUT}"
                    )
