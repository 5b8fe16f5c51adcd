"""Write down what a model's constructor does to tensors, on tensors without storage.

Below the constructor every tensor lies on the meta device. The constructor itself is told that they lie on the CPU:
torch's own initialisers, and many a user's, do nothing at all to a tensor that says it is meta.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from shardproof.errors import ExperimentError
from shardproof.parallel.generators import Streams
from shardproof.parallel.replay import Chosen, Draw, Machine, Op, Ref, choose

META = torch.device("meta")
WAY_OUT = "use init_device='cpu'"

OVERWRITES = frozenset(
    {
        *("bernoulli_", "cauchy_", "copy_", "exponential_", "fill_", "geometric_"),
        *("log_normal_", "normal_", "random_", "uniform_", "zero_"),
    }
)
"""Operations that do not look at what stood in the tensor that they change."""

RESIZES = frozenset(("resize_", "resize_as_", "set_"))

_OWN = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
_DEVICE: Any = torch.Tensor.device.__get__
_IS_META: Any = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]
_IS_CPU: Any = torch.Tensor.is_cpu.__get__  # type: ignore[attr-defined]
_VALUES: tuple[Any, ...] = (Tensor.tolist, Tensor.numpy, Tensor.__array__)


class Recorder:
    """The operations so far, and which storage without bytes stands for which number."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.saves: set[int] = set()
        self._numbers: dict[int, int] = {}
        # Held, so that no address is used twice.
        self._storages: list[torch.UntypedStorage] = []
        self._streams = Streams()
        self._machine, self._reached = Machine(self.saves), 0
        self._cached: dict[int, int] = {}
        self.paused = False
        """Whether operations are run as they are."""

    def ref(self, tensor: Tensor) -> Ref | None:
        """What stands for a recorded tensor; None for one that was not recorded."""
        if tensor.layout != torch.strided:
            return None
        storage = tensor.untyped_storage()
        number = self._numbers.get(storage._cdata)
        return None if number is None else self._of(tensor, number, storage)

    def adopt(self, tensor: Tensor) -> Tensor:
        """A tensor without storage that stands for a real one, which is kept as it is now."""
        constant = tensor.detach().clone()
        found = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
        ref = self._fresh(found)
        made = frozenset((ref.storage,))
        self.ops.append(
            Op(
                func=torch.ops.aten.clone.default,
                args=(constant,),
                kwargs={},
                reads=frozenset(),
                writes=made,
                clears=made,
                outputs=(ref,),
                dtype=torch.get_default_dtype(),
            )
        )
        return found

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One operation of the constructor: run it without values, and write it down if it makes or changes any."""
        schema = func._schema
        tensors = _tensors(args, kwargs)
        recorded = [tensor for tensor in tensors if self.ref(tensor) is not None]
        makes = any(argument.name == "device" for argument in schema.arguments)
        draws = torch.Tag.nondeterministic_seeded in func.tags
        self._check_devices(func, kwargs, tensors)
        device = kwargs.get("device")
        if device == META or (device is None and not recorded and any(tensor.is_meta for tensor in tensors)):
            # The user's own tensors without values stay what they are, and draw nothing.
            return func(*args, **kwargs)
        if func is torch.ops.aten.lift_fresh.default and not recorded:
            return self.adopt(args[0])
        if not recorded and tensors and not draws and not makes:
            return func(*args, **kwargs)
        if recorded and _asks_for_values(func, args):
            return self._from_values(func, args, kwargs)
        return self._recorded(func, args, kwargs, makes=makes, draws=draws)

    def value(self, tensor: Tensor) -> Tensor:
        """The values that a tensor has at this point of the constructor, computed now."""
        ref = self.ref(tensor)
        if ref is None:
            return tensor
        order = choose(self.ops, {ref.storage}, drawn=len(self.ops), cached={})
        if all(item.op.draw is None for item in order):
            # Nothing random is behind it: what was drawn before need not be drawn now.
            machine = Machine(())
            for item in order:
                machine.run(item)
            return ref.view(machine.values[ref.storage]).clone()
        order = choose(self.ops, {ref.storage}, drawn=self._reached, cached=self._cached)
        if self._gone(order):
            self._forget()
            order = choose(self.ops, {ref.storage}, drawn=0, cached={})
        with self._streams.aside():
            for item in order:
                self._machine.run(item)
        self._reached = len(self.ops)
        # What this value needed is what the next one is likely to need: rejection sampling asks again and again.
        needed = [item for item in order if not item.only_draws]
        self._cached |= {storage: item.number for item in needed for storage in item.op.writes}
        recent = {ref.storage}.union(*(item.op.reads | item.op.writes for item in needed))
        self._cached = {storage: number for storage, number in self._cached.items() if storage in recent}
        self._machine.values = {s: value for s, value in self._machine.values.items() if s in recent}
        return ref.view(self._machine.values[ref.storage]).clone()

    def _gone(self, order: Sequence[Chosen]) -> bool:
        """Whether operations need what was drawn, or what stood in a storage, before the last value was asked for."""
        return any(
            (item.op.draw is not None and item.number < self._reached)
            or any(item.number <= self._cached.get(storage, -1) for storage in item.op.writes if not item.only_draws)
            for item in order
        )

    def _forget(self) -> None:
        """Compute the next random value from the very beginning."""
        self._machine, self._reached, self._cached = Machine(self.saves), 0, {}

    def _check_devices(self, func: Any, kwargs: Mapping[str, Any], tensors: Sequence[Tensor]) -> None:
        devices = [kwargs.get("device"), *(tensor.device for tensor in tensors)]
        for device in devices:
            if device is not None and device.type not in ("cpu", "meta"):
                raise _refusal(func, f"puts a tensor on {device}, where other values are drawn than on the CPU")
        if any(tensor.layout != torch.strided for tensor in tensors):
            raise _refusal(func, "uses a sparse tensor")

    def _recorded(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, makes: bool, draws: bool) -> Any:
        if func is torch.ops.aten.set_.source_Tensor and self.ref(args[1]) is not None:
            # Points at other values and changes none.
            return func(*args, **kwargs)
        changed = _changed(func, args, kwargs)
        self._check_tensors(func, _tensors(args, kwargs), changed)
        if makes and (kwargs.get("device") is not None or not _tensors(args)):
            kwargs = kwargs | {"device": torch.device("cpu")}
        arguments, named = tree_map_only(Tensor, self._argument, (args, kwargs))
        reads, writes, clears = self._effects(func, changed, arguments, named)
        try:
            result = _without_values(func, args, kwargs)
        except NotImplementedError:
            if draws or changed:
                raise _refusal(func, "cannot be run without values") from None
            return self._from_values(func, args, kwargs)
        outputs = tuple(
            self._fresh(leaf) if isinstance(leaf, Tensor) and self.ref(leaf) is None else None
            for leaf in tree_flatten(result)[0]
        )
        made = frozenset(ref.storage for ref in outputs if ref is not None)
        # What is neither made nor changed is a view.
        if made or changed:
            generator = kwargs.get("generator")
            self.ops.append(
                Op(
                    func=func,
                    args=arguments,
                    kwargs=named,
                    reads=reads,
                    writes=writes | made,
                    clears=clears | made,
                    outputs=outputs,
                    dtype=torch.get_default_dtype(),
                    draw=self._draw(generator) if draws else None,
                )
            )
            if draws:
                self._streams.after(generator, len(self.ops) - 1)
        return result

    def _check_tensors(self, func: Any, tensors: Sequence[Tensor], changed: Sequence[Tensor]) -> None:
        name = _name(func)
        if name in RESIZES:
            raise _refusal(func, "gives a tensor another storage")
        if any(self.ref(tensor) is None for tensor in changed):
            raise _refusal(func, "changes a tensor that was made elsewhere")
        takes_shape_alone = name.endswith("_like") or name.startswith("new_")
        if not takes_shape_alone and any(tensor.is_meta and self.ref(tensor) is None for tensor in tensors):
            raise _refusal(func, "reads a tensor that was made on the meta device and has no values")

    def _effects(
        self, func: Any, changed: Sequence[Tensor], arguments: tuple[Any, ...], named: Mapping[str, Any]
    ) -> tuple[frozenset[int], frozenset[int], frozenset[int]]:
        """The storages that an operation reads, those that it writes, and those that it overwrites as a whole."""
        targets = [ref for tensor in changed if (ref := self.ref(tensor)) is not None]
        reads = _storages((arguments, named))
        writes = frozenset(ref.storage for ref in targets)
        if _name(func) not in OVERWRITES or writes & _storages((arguments[1:], named)):
            return reads, writes, frozenset()
        return reads - writes, writes, frozenset(ref.storage for ref in targets if ref.covers)

    def _draw(self, generator: torch.Generator | None) -> Draw:
        draw = self._streams.before(generator)
        if isinstance(draw.start, int):
            self.saves.add(draw.start)
            # Values may have been computed past that point without a look back.
            self._forget()
        return draw

    def _from_values(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = tree_map_only(Tensor, self.value, (args, kwargs))
        with torch.no_grad():
            return tree_map_only(Tensor, self.adopt, func(*args, **kwargs))

    def _argument(self, tensor: Tensor) -> Ref | Tensor:
        ref = self.ref(tensor)
        return tensor.detach().clone() if ref is None else ref

    def _fresh(self, tensor: Tensor) -> Ref:
        storage = tensor.untyped_storage()
        number = self._numbers.setdefault(storage._cdata, len(self._numbers))
        if number == len(self._storages):
            self._storages.append(storage)
        return self._of(tensor, number, storage)

    @staticmethod
    def _of(tensor: Tensor, number: int, storage: torch.UntypedStorage) -> Ref:
        return Ref(
            storage=number,
            nbytes=storage.nbytes(),
            dtype=tensor.dtype,
            size=tuple(tensor.shape),
            stride=tuple(tensor.stride()),
            offset=int(tensor.storage_offset()),
            conj=tensor.is_conj(),
            neg=tensor.is_neg(),
        )


class Below(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands every operation to the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._recorder.paused:
            return func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            return self._recorder.run(func, args, dict(kwargs or {}))


class Above(TorchFunctionMode):
    """Answers for the tensors that are recorded: they lie on the CPU, and their values can be had."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensor = args[0] if args and isinstance(args[0], Tensor) else None
        if tensor is None or self._recorder.ref(tensor) is None:
            return func(*args, **kwargs)
        if func in (_DEVICE, _IS_META, _IS_CPU):
            return torch.device("cpu") if func == _DEVICE else func == _IS_CPU
        if func in _VALUES:
            return self._values(func, tensor, args[1:], kwargs)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1]
            index = tuple(self._tensor(part, None) for part in index) if isinstance(index, tuple) else index
            args = (tensor, self._tensor(index, None), *(self._tensor(value, tensor.dtype) for value in args[2:]))
        if func is Tensor.cpu:
            return tensor
        if func is Tensor.to:
            # A tensor that is there already is returned as it is, not copied.
            args = (tensor, *(None if _names_cpu(value) else value for value in args[1:]))
            kwargs = {name: None if _names_cpu(value) else value for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _tensor(self, value: object, dtype: torch.dtype | None) -> object:
        """Numbers that torch would make a tensor of on the device of another one, where they would be lost."""
        if isinstance(value, list) or (dtype is not None and isinstance(value, int | float | complex)):
            self._recorder.paused = True
            try:
                return self._recorder.adopt(torch.tensor(value, dtype=dtype))
            finally:
                self._recorder.paused = False
        return value

    def _values(self, func: Any, tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._recorder.paused = True
        try:
            values = func(self._recorder.value(tensor), *args, **kwargs)
        finally:
            self._recorder.paused = False
        if func is not Tensor.tolist:
            # What is written there would not reach the tensor.
            values.flags.writeable = False
        return values


def _names_cpu(value: object) -> bool:
    return isinstance(value, str | torch.device) and torch.device(value).type == "cpu"


def _tensors(*trees: object) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(trees)[0] if isinstance(leaf, Tensor)]


def _storages(tree: object) -> frozenset[int]:
    return frozenset(leaf.storage for leaf in tree_flatten(tree)[0] if isinstance(leaf, Ref))


def _name(func: Any) -> str:
    name: str = func._schema.name
    return name.removeprefix("aten::")


def _without_values(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The result on the meta device."""

    def bare(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return tensor
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)

    bare_args, named = tree_map_only(Tensor, bare, (args, dict(kwargs)))
    if named.get("device") is not None:
        named["device"] = META
    if named.get("generator") is not None:
        if named["generator"].device.type != "cpu":
            raise _refusal(func, f"draws from a generator on {named['generator'].device}")
        # Meta kernels refuse a generator of the CPU, and draw nothing.
        named["generator"] = None
    return func(*bare_args, **named)


def _asks_for_values(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the shape or the value of what comes back depends on the values that go in."""
    if torch.Tag.data_dependent_output in func.tags:
        return True
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    if func is torch.ops.aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return True


def _changed(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes to."""
    found: list[Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]
    return found


def _refusal(func: object, what: str) -> ExperimentError:
    return ExperimentError(f"the model cannot be built on the meta device: {func}{_place()} {what}; {WAY_OUT}")


def _place() -> str:
    """`, called at file:line,`: the innermost line that is neither torch's nor ours."""
    frame = sys._getframe()
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_OWN):
            return f", called at {frame.f_code.co_filename}:{frame.f_lineno},"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
