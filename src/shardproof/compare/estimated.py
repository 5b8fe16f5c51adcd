"""Noise floors without a disturbed run: what rounding may do to each tensor of a recording, from the recording itself.

A finished recording of somebody's loop cannot be trained again. A model of rounding takes the place of the measurement
(docs/noise-floor.md says how it was calibrated, and what it misses that a measured floor shows):

- A run rounds in units of the coarsest dtype in which its modules computed: under autocast to bfloat16 a gradient in
  float32 carries bfloat16's noise.
- Errors grow with the number of modules that a value went through, as a random walk does.
- The unit of a gradient is not its own size alone. That of an attention key's bias is zero in mathematics; what is
  computed is the rounding of a sum over all tokens of output gradients that are not zero.
- An optimizer divides by what it has seen. Where a gradient is noise, Adam moves a weight by as much as anywhere, and
  in either direction.
- Weights that two right runs have brought to different places make everything differ that follows. How far apart they
  are is not estimated but told, step by step, by what was compared before.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from shardproof.compare.measure import MULTIPLE, scale
from shardproof.compare.stream import chunks, wide
from shardproof.compare.verdict import Comparison, Verdict
from shardproof.compare.view import Key
from shardproof.parallel.names import ROOT
from shardproof.trace.trace import Trace

FORWARD = 4.0
"""Units in the last place by which a value moves, times the square root of the modules before it."""

BACKWARD = 6.0
"""The same of a gradient, counted over the modules of the forward pass and those behind it in the backward pass."""

COARSE = 0.2
"""By how much less that is in 8 to 11 bits: sums are kept in float32, and what is rounded once more mostly falls back
onto the same number."""

DRIFT = 4.0
"""By how much more than the weights themselves, each in units of its own size, activations and gradients move."""

BESIDE = 0.1
"""Share of the output gradients of the modules beside one that may enter its own and cancel there, as in a softmax."""

OUTPUT = 0.25
"""Share of the largest output that a loss, which may be far smaller, is off with."""

KINK = 0.25
"""Share of the largest output gradient that one moves by when its output falls to the other side of a ReLU's kink,
in the unit of floors: six of them are more than all of it."""

NEAR = 0.25
"""Share of an output's floor by which most of its elements move at most."""

NORMALISED = 0.25
"""By how much less than its floor a gradient is off at the one element of all that is closest to zero."""

FITS = 0.1
"""Of the largest element: so much may be left of a bias's gradient when the sum of its outputs' is taken out."""

NOISE = 0.5
"""Share of an element that its floor may have before the element is taken for noise."""


@dataclass(frozen=True, slots=True)
class _Shown:
    """What the records of a key are like."""

    size: float
    """The largest element."""
    eps: float
    """Of the dtype; 0 for whole numbers."""
    numel: int
    """Of all records together."""


@dataclass(slots=True)
class _Drift:
    """How far apart a parameter was when a step was over."""

    most: float = 0.0
    """Of any element."""
    typical: float = 0.0
    """Root mean square, without the elements whose gradients were noise: what those do, nothing depends on."""
    limit: float = math.inf
    """What the most of those others can be."""
    evenness: float = 1.0
    """Root mean square of theirs over the most."""
    all_typical: float = 0.0
    """Root mean square of all elements."""
    all_evenness: float = 1.0


@dataclass(slots=True)
class _Step:
    """One step of the reference."""

    forward: dict[str, int] = field(default_factory=dict)
    """Module -> how many outputs came before its own."""
    backward: dict[str, int] = field(default_factory=dict)
    keys: dict[str, list[Key]] = field(default_factory=lambda: defaultdict(list))
    """Stage -> its keys, in the order of the records."""


class Estimate(Mapping[int, float]):
    """Number of a record of the reference -> its noise floor, in the tensor's own unit, made when it is asked for.

    Fits `Reference.floors`. To be asked in causal order, and told in between what was found (`saw`), as `compare_run`
    does: floors of a later step rest on how far apart the weights were found before it. What was asked once stays.
    """

    def __init__(self, reference: Trace, *, eps: float = 0.0, kept: float = 0.0) -> None:
        """`eps`: one unit in the last place of 1 where products are rounded more coarsely than any tensor shows, as
        2**-10 for TF32. `kept`: the same of the dtype in which the other run keeps its weights."""
        self._trace, self._least_eps, self._kept = reference, eps, kept
        self._floors: dict[Key, float] = {}
        self._shown: dict[Key, _Shown] = {}
        self._drifts: dict[str, _Drift] = {}
        self._by_step: dict[int, float] = {}
        self._grown: dict[int, float] = defaultdict(lambda: 1.0)
        """Step -> what `_growth` is from it on."""
        self._kinked: dict[int, float] = {}
        """Step -> share of its size by which an output gradient is off that comes after one with a kink."""
        self._smooth: dict[Key, float] = {}
        self._flipped: dict[tuple[int, str], int] = {}
        self._units: dict[int, float | None] = {}
        self._relative: dict[tuple[str, str], tuple[float, float]] = {}

    # As a mapping.

    def __getitem__(self, number: int) -> float:
        return self.floor(self._trace.records[number].key)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self._trace.records)))

    def __len__(self) -> int:
        return len(self._trace.records)

    # What is asked and told.

    def floor(self, key: Key) -> float:
        """How far rounding alone may move this tensor; 0 where nothing is known of it, or it holds whole numbers."""
        if key not in self._floors:
            shown = self._of(key)
            self._floors[key] = 0.0 if shown is None or shown.eps == 0 else self._estimated(key, shown)
        return self._floors[key]

    def size(self, key: Key) -> float | None:
        """The largest element of what a key shows; None where it shows nothing."""
        shown = self._of(key)
        return None if shown is None else shown.size

    def learn(self, key: Key, tensor: Tensor, size: float) -> None:
        """Take in the largest element of what a key shows, its only tensor: it need not be looked for then."""
        self._shown.setdefault(key, _shown(tensor, size))

    def saw(self, found: Comparison) -> None:
        """Take in how far apart a tensor was found: what is right and yet apart is so from here on."""
        if found.verdict not in (Verdict.EQUAL, Verdict.ROUNDING):
            return
        if found.stage in ("forward", "backward") and found.floor > 0:
            # A model that makes more of rounding than others do will do so again.
            later = found.step + 1
            self._grown[later] = max(self._grown[later], self._growth(found.step) * found.floors)
        if found.stage != "update":
            return
        drift = self._drifts.setdefault(found.name, _Drift())
        drift.most = found.error
        drift.typical = min(found.error, MULTIPLE * drift.limit) * drift.evenness
        drift.all_typical = found.error * drift.all_evenness
        # Asked for again by the next step.
        self._by_step.pop(found.step + 1, None)

    # One floor.

    def _estimated(self, key: Key, shown: _Shown) -> float:
        step, stage, name, part = key
        match stage:
            case "forward":
                return self._rounding(step, self._steps[step].forward[name]) * shown.size + self._own_drift(key)
            case "loss":
                return 0.0 if part == "count" else self._rounding(step) * self._loss_size(key, shown)
            case "backward":
                return self._backward(key, shown)
            case "gradient":
                return self._gradient(key, shown)
            case "grad-norm" if part == "clipped":
                whole = self._of((step, "gradient", name, ""))
                norm = self._rounding(step, backward=True)
                own = self.floor((step, "gradient", name, "")) if whole else norm * shown.size
                return own * (shown.size / whole.size if whole and whole.size else 1.0) + norm * shown.size
            case "grad-norm":
                return self._rounding(step, backward=True) * shown.size
            case "optimizer-state":
                return self._state(key, shown)
            case "update" | "checkpoint":
                return self._update((step, "update", name, part), shown)
            case "buffer":
                return self._rounding(step) * max(shown.size, self._buffers(key))
        return 0.0

    def _backward(self, key: Key, shown: _Shown) -> float:
        step, _, name, _ = key
        before = self._steps[step].backward[name]
        rounding = self._rounding(step, before, backward=True) * max(shown.size, BESIDE * self._siblings(key))
        self._smooth[key] = rounding
        flips, behind = self._flips(step, name), self._kinked.get(step, 0.0)
        if flips:
            # What comes next in the backward pass has this as one of the many terms of its sums.
            width = self._width(key)
            terms = width / max(1.0, flips * width / shown.numel)
            self._kinked[step] = max(behind, KINK * 2 / math.sqrt(terms))
        return max(rounding, (KINK if flips else behind) * shown.size)

    def _rounding(self, step: int, before: int | None = None, *, backward: bool = False) -> float:
        """How far a value of size 1 may move in a step, after `before` modules (all of them if None)."""
        modules = len(self._steps[step].forward) + (len(self._steps[step].backward) if backward else 0)
        if before is not None:
            modules = before + (len(self._steps[step].forward) if backward else 0)
        eps = self._eps(step)
        factor = (BACKWARD if backward else FORWARD) * (COARSE if eps > 1e-4 else 1.0)
        return self._growth(step) * (factor * eps * math.sqrt(1 + modules) + DRIFT * self._drifted(step))

    def _growth(self, step: int) -> float:
        """By how much rounding was seen to grow more than the model of it says, in the steps before; at least 1."""
        return max((grown for at, grown in self._grown.items() if at <= step), default=1.0)

    def _eps(self, step: int) -> float:
        """Of the coarsest dtype that a module computed in."""
        keys = self._steps[step].keys
        stages = ("forward", "backward", "gradient", "update")
        found = next((f for stage in stages if (f := [s.eps for k in keys[stage] if (s := self._of(k))])), [])
        return max([*found, self._least_eps], default=0.0)

    def _drifted(self, step: int) -> float:
        """How far the weights that go into a step are apart, each in units of its size, all together."""
        if step not in self._by_step:
            squares = 0.0
            for name, drift in self._drifts.items():
                size = self._weight_size(step, name)
                squares += (drift.typical / size) ** 2 if size > 0 else 0.0
            self._by_step[step] = math.sqrt(squares)
        return self._by_step[step]

    def _weight_size(self, step: int, name: str) -> float:
        """What a parameter's drift is to be seen against: itself; for a vector, which is added, what it is added to."""
        own = self._of(self._before((step, "update", name, "")))
        size = own.size if own else 0.0
        output = self._module_output(step, "forward", name)
        return max(size, output.size) if output and own and self._is_vector(own, output) else size

    def _own_drift(self, key: Key) -> float:
        """By how much an output is off for its own module's weights, noise included."""
        step, _, name, _ = key
        shown, far = self._of(key), 0.0
        for owner, drift in self._drifts.items():
            own = self._of(self._before((step, "update", owner, "")))
            if owner.rpartition(".")[0] != ("" if name == ROOT else name) or shown is None or own is None:
                continue
            if self._is_vector(own, shown):
                far += drift.most
            elif own.size > 0:
                # An embedding shows its elements as they are, a product a sum of many.
                shown_as_is = shown.size <= own.size
                far += (drift.most if shown_as_is else DRIFT * drift.all_typical) * shown.size / own.size
        return far

    def _loss_size(self, key: Key, shown: _Shown) -> float:
        """Of a loss, or of the outputs that it is the small difference of."""
        step, _, _, part = key
        output = self._of((step, "forward", ROOT, "")) or self._last_output(step)
        count = self._of((step, "loss", ROOT, "count")) if part == "total" else None
        terms = math.sqrt(count.size) if count else 1.0
        return max(shown.size, OUTPUT * output.size * terms if output else 0.0)

    def _last_output(self, step: int) -> _Shown | None:
        keys = self._steps[step].keys["forward"]
        return self._of(keys[-1]) if keys else None

    def _siblings(self, key: Key) -> float:
        """The largest output gradient of the modules beside this one: what a softmax or a norm made it of."""
        step, stage, name, _ = key
        parent = name.rpartition(".")[0]
        if not parent:
            return 0.0
        sizes = [
            shown.size
            for other in self._steps[step].keys[stage]
            if other[2].rpartition(".")[0] == parent and (shown := self._of(other))
        ]
        return max(sizes, default=0.0)

    def _gradient(self, key: Key, shown: _Shown) -> float:
        step, _, name, _ = key
        output = self._module_output(step, "backward", name)
        module = name.rpartition(".")[0]
        before = self._steps[step].backward.get(module)
        rounding = self._rounding(step, before, backward=True)
        unit = self._unit(step)
        if output is None or unit is None:
            return rounding * max(shown.size, self._cousins(key))
        size = shown.size
        if self._is_vector(shown, output) or self._is_row(key):
            # A sum over rows, which may cancel.
            size = max(size, math.sqrt(output.numel / shown.numel) * output.size * unit)
        spread = max(
            (
                self._smooth_floor(k) / s.size
                for k in self._output_keys(step, "backward", module)
                if (s := self._of(k)) and s.size
            ),
            default=0.0,
        )
        # Each flip adds or drops a row of the sum.
        rows = output.numel / max(shown.numel if self._is_vector(shown, output) else math.sqrt(shown.numel), 1.0)
        flipped = KINK * math.sqrt(self._flips(step, module or ROOT) / max(rows, 1.0))
        return max(rounding, spread, min(flipped, KINK)) * size

    def _smooth_floor(self, key: Key) -> float:
        """Of an output gradient, as if its module were followed by no kink."""
        floor = self.floor(key)
        return self._smooth.get(key, floor)

    def _width(self, key: Key) -> int:
        """Elements of a row of an output."""
        tensor = self._tensor(key)
        return tensor.shape[-1] if tensor is not None and tensor.dim() else 1

    def _flips(self, step: int, module: str) -> int:
        """Outputs so close to zero that rounding may bring them to the other side, where what follows has a kink there,
        as a ReLU has; 0 where there is none: seen by gradients that are 0 where the outputs are negative."""
        if (step, module) not in self._flipped:
            self._flipped[step, module] = self._flips_of(step, module)
        return self._flipped[step, module]

    def _flips_of(self, step: int, module: str) -> int:
        near = negative = dead = alive = 0
        for key in self._output_keys(step, "forward", module):
            back = (step, "backward", *key[2:])
            window = NEAR * self.floor(key)
            for output, gradient in zip(self._in_order(key), self._in_order(back), strict=False):
                if output.shape != gradient.shape:
                    return 0
                for _, (one, other) in chunks(output, gradient):
                    below = one < 0
                    negative += int(below.sum())
                    dead += int((below & (other == 0)).sum())
                    alive += int((~below & (other != 0)).sum())
                    near += int((one.abs() <= window).sum())
        return near if negative and dead == negative and alive else 0

    def _in_order(self, key: Key) -> list[Tensor]:
        numbers = sorted(self._trace.by_key.get(key, ()), key=lambda number: self._trace.records[number].call)
        return [self._trace.tensor(n) for n in numbers if not self._trace.records[n].missing]

    def _unit(self, step: int) -> float | None:
        """By how much gradients of parameters are smaller than those of outputs say: a loss may be scaled, or be a sum
        that is divided in the end. Told by a bias, whose gradient is a sum of its outputs'; None where there is none.
        """
        if step not in self._units:
            found = (self._unit_of(key) for key in self._steps[step].keys["gradient"])
            self._units[step] = next((unit for unit in found if unit is not None), None)
        return self._units[step]

    def _unit_of(self, key: Key) -> float | None:
        step, _, name, _ = key
        gradient = self._tensor(key)
        if gradient is None or gradient.dim() != 1:
            return None
        rows = torch.zeros(gradient.shape, dtype=torch.float64)
        for output in self._output_keys(step, "backward", name.rpartition(".")[0]):
            for number in self._trace.by_key[output]:
                if self._trace.records[number].missing:
                    continue
                tensor = self._trace.tensor(number)
                if not tensor.dim() or tensor.shape[-1] != len(gradient):
                    return None
                rows += tensor.reshape(-1, len(gradient)).sum(0, dtype=torch.float64)
        square = float(rows @ rows)
        if not square > 0:
            return None
        unit = float(rows @ wide(gradient)) / square
        left = scale(wide(gradient) - unit * rows)
        return abs(unit) if left <= FITS * scale(gradient) else None

    def _cousins(self, key: Key) -> float:
        """The largest gradient of a vector of the same name in the modules beside this one."""
        step, stage, name, _ = key
        module, _, last = name.rpartition(".")
        parent = module.rpartition(".")[0]
        sizes = [
            shown.size
            for other in self._steps[step].keys[stage]
            if other[2].rpartition(".")[2] == last
            and other[2].rpartition(".")[0].rpartition(".")[0] == parent
            and (shown := self._of(other))
        ]
        return max(sizes, default=0.0)

    def _state(self, key: Key, shown: _Shown) -> float:
        """A moment of gradients: as far off as those are, or their squares."""
        step, _, name, part = key
        gradient = self._gradient_key(step, name)
        seen = self._of(gradient) if gradient else None
        if shown.numel == 1 and shown.size == round(shown.size) and (seen is None or seen.numel > 1):
            # A number of steps.
            return shown.eps * shown.size
        if gradient is None or seen is None:
            return self._rounding(step, backward=True) * shown.size
        noise, size = self._relative.get((name, part), (0.0, 0.0))
        noise, size = max(noise, self.floor(gradient)), max(size, seen.size)
        self._relative[name, part] = noise, size
        relative = noise / size if size > 0 else 1.0
        if self._is_square(key):
            relative = 2 * relative + relative**2
        return max(relative, self._eps(step) * COARSE) * shown.size

    def _update(self, key: Key, shown: _Shown) -> float:
        """How far apart it was before, and how far apart the step itself may take it."""
        step, _, name, _ = key
        drift = self._drifts.setdefault(name, _Drift())
        eps = max(shown.eps, self._kept)
        last = shown.size * eps
        old = self._tensor(self._before(key))
        gradient = self._gradient_key(step, name)
        states = [k for k in self._steps[step].keys["optimizer-state"] if k[2] == name]
        alike = [k for k in states if old is not None and (t := self._tensor(k)) is not None and t.shape == old.shape]
        normalised = any(self._is_square(k) for k in alike)
        moment = next((k for k in alike if not self._is_square(k)), gradient)
        new, base = self._tensor(key), None if moment is None else self._tensor(moment)
        drift.limit, drift.evenness, drift.all_evenness = drift.most + last, 1.0, 1.0
        if moment is None or old is None or new is None or base is None or not new.shape == old.shape == base.shape:
            return drift.most + last
        noise = self.floor(moment)
        moved = _moved(new, old, base, noise, eps, normalised=normalised)
        far, most = moved.far, moved.told
        if normalised:
            # Divided by its own size, a gradient of noise moves a weight as far as any other, one way or the other.
            cap = 2 * (moved.update if scale(base) > noise else self._largest_update(step))
            far, most = min(far, cap), min(most, cap)
        drift.limit = drift.most / MULTIPLE + most + last
        drift.evenness, drift.all_evenness = moved.evenness, moved.all_evenness
        return drift.most + far + last

    def _largest_update(self, step: int) -> float:
        """Of any parameter in a step."""
        most = 0.0
        for key in self._steps[step].keys["update"]:
            new, old = self._tensor(key), self._tensor(self._before(key))
            if new is not None and old is not None and new.shape == old.shape:
                for _, (one, other) in chunks(new, old):
                    most = max(most, scale(wide(one) - wide(other)))
        return most

    def _buffers(self, key: Key) -> float:
        step, stage, name, _ = key
        module = name.rpartition(".")[0]
        beside = [k for k in self._steps[step].keys[stage] if k[2].rpartition(".")[0] == module]
        return max((s.size for k in beside if (s := self._of(k)) and s.eps > 0), default=0.0)

    # What the reference holds.

    def _gradient_key(self, step: int, name: str) -> Key | None:
        clipped, plain = (step, "grad-norm", name, "clipped"), (step, "gradient", name, "")
        return next((key for key in (clipped, plain) if self._of(key)), None)

    def _before(self, key: Key) -> Key:
        """The same parameter when the step began."""
        step, stage, name, part = key
        earlier = (step - 1, stage, name, part)
        return earlier if earlier in self._trace.by_key else (-1, "initial-state", name, part)

    def _module_output(self, step: int, stage: str, parameter: str) -> _Shown | None:
        """The outputs of the module that owns a parameter, or their gradients, all together."""
        shown = [s for k in self._output_keys(step, stage, parameter.rpartition(".")[0]) if (s := self._of(k))]
        if not shown:
            return None
        return _Shown(max(s.size for s in shown), max(s.eps for s in shown), sum(s.numel for s in shown))

    def _output_keys(self, step: int, stage: str, module: str) -> list[Key]:
        return [key for key in self._steps[step].keys[stage] if key[2] == (module or ROOT)]

    def _is_vector(self, parameter: _Shown, output: _Shown) -> bool:
        """Whether a parameter is a row that every row of an output holds once, as a bias or the scale of a norm."""
        return parameter.numel <= output.numel and parameter.numel in self._widths.get(output.numel, ())

    def _is_row(self, key: Key) -> bool:
        """Whether a tensor has no two dims, so that its gradient is a sum over much of an output."""
        tensor = self._tensor(key)
        return tensor is not None and tensor.dim() < 2

    @cached_property
    def _widths(self) -> dict[int, set[int]]:
        """Elements of the outputs of a module -> widths of their rows."""
        found: dict[int, set[int]] = defaultdict(set)
        for step in self._steps.values():
            for stage in ("forward", "backward"):
                for key in step.keys[stage]:
                    numbers = self._trace.by_key[key]
                    tensors = [self._trace.tensor(n) for n in numbers if not self._trace.records[n].missing]
                    # A channel of an image lies in dim 1.
                    found[sum(t.numel() for t in tensors)].update(
                        d for t in tensors for d in (*t.shape[-1:], *t.shape[1:2])
                    )
        return found

    def _is_square(self, key: Key) -> bool:
        """Whether a state is nowhere negative: a second moment, or the largest of one."""
        tensor = self._tensor(key)
        return tensor is not None and tensor.dim() > 0 and tensor.numel() > 0 and float(tensor.amin()) >= 0

    def _tensor(self, key: Key) -> Tensor | None:
        for number in self._trace.by_key.get(key, ()):
            if not self._trace.records[number].missing:
                return self._trace.tensor(number)
        return None

    def _of(self, key: Key) -> _Shown | None:
        """What a key shows; None where it shows no tensor."""
        if key not in self._shown:
            numbers = self._trace.by_key.get(key, ())
            tensors = (self._trace.tensor(n) for n in numbers if not self._trace.records[n].missing)
            seen = [_shown(tensor, scale(tensor)) for tensor in tensors]
            if not seen:
                return None
            self._shown[key] = _Shown(max(s.size for s in seen), max(s.eps for s in seen), sum(s.numel for s in seen))
        return self._shown[key]

    @cached_property
    def _steps(self) -> dict[int, _Step]:
        found: dict[int, _Step] = defaultdict(_Step)
        for key in self._trace.by_key:
            step = found[key[0]]
            step.keys[key[1]].append(key)
            if key[1] in ("forward", "backward"):
                order = step.forward if key[1] == "forward" else step.backward
                order.setdefault(key[2], len(order))
        return found


def _shown(tensor: Tensor, size: float) -> _Shown:
    return _Shown(size, torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0, tensor.numel())


class _Moved(NamedTuple):
    """By how much an update may be off."""

    far: float
    """Any element."""
    told: float
    """Any of those that are not noise."""
    evenness: float
    """Root mean square of those over the largest."""
    all_evenness: float
    """The same of all elements."""
    update: float
    """The largest element of the update itself."""


def _moved(new: Tensor, old: Tensor, base: Tensor, noise: float, eps: float, *, normalised: bool) -> _Moved:
    """Where `base`, of which an update is made, is off by `noise`: an element by as many times itself."""
    far = told = update = squares = all_squares = 0.0
    noise *= NORMALISED if normalised else 1.0
    for _, (after, before, moment) in chunks(new, old, base):
        step = (wide(after) - wide(before)).abs()
        here = float(step.max())
        update = max(update, here)
        # What it was rounded to is no part of what it was made of.
        step = (step - eps * wide(before).abs()).clamp(min=0.0)
        share = noise / wide(moment).abs()
        moved = torch.where(step > 0, step * share, 0.0).nan_to_num(posinf=0.0)
        if normalised:
            moved = moved.clamp(max=2 * here)
        far = max(far, float(moved.max()))
        all_squares += float(moved.square().sum())
        moved = torch.where(share < NOISE, moved, 0.0)
        told = max(told, float(moved.max()))
        squares += float(moved.square().sum())
    return _Moved(far, told, _evenness(squares, told, new.numel()), _evenness(all_squares, far, new.numel()), update)


def _evenness(squares: float, most: float, numel: int) -> float:
    return math.sqrt(squares / numel) / most if most > 0 else 1.0
