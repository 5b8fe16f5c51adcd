"""Noise floors of tensors of which only sketches or statistics were kept: 2-norms, from norms alone.

The model of rounding is that of `compare.estimated` with less to go by: no elements, so that what Adam makes of single
noisy gradients is taken from how many such there are among normally distributed ones.
"""

from __future__ import annotations

import math
from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass, field

from shardproof.compare.verdict import Comparison, Verdict
from shardproof.compare.view import Key

FORWARD = 4.0
"""Units in the last place by which a value moves, times the square root of the outputs before it."""

BACKWARD = 6.0
"""The same of a gradient, counted over all outputs of the step."""

DRIFT = 4.0
"""By how much more than the weights, each in units of its own size, what is computed from them moves."""

FLIPPED = 2.0
"""Times its largest movement by which an optimizer that divides by the gradient's size may move a noisy element."""


@dataclass(kw_only=True)
class Norms:
    """Floors from the reference's norms, which are told first; asked in causal order, and told what was found."""

    eps: float
    """Of the coarsest dtype in which modules computed."""
    _norms: dict[Key, float] = field(default_factory=dict)
    _floors: dict[Key, float] = field(default_factory=dict)
    _modules: dict[tuple[int, str, str], float] = field(default_factory=lambda: defaultdict(float))
    """Step, stage and module -> the largest norm among its parameters."""
    _outputs: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    """Step -> outputs asked for so far."""
    _drift: float = 0.0
    """The largest share of its norm by which a weight was apart and right, when the last step was over."""
    _next_drift: float = 0.0
    _step: int = -1

    def begin(self, step: int) -> None:
        """From here on it is about this step: what the one before left apart counts."""
        if step != self._step:
            self._step, self._drift, self._next_drift = step, max(self._drift, self._next_drift), 0.0

    def copy(self) -> Norms:
        """The same, to be told and asked without a trace."""
        return deepcopy(self)

    def know(self, key: Key, norm: float) -> None:
        """The reference's tensor has this 2-norm. NaN and infinities have no floor."""
        step, stage, name, _ = key
        self._norms[key] = norm
        at = (step, stage, name.rpartition(".")[0])
        if math.isfinite(norm):
            self._modules[at] = max(self._modules[at], norm)

    def floor(self, key: Key, *, moved: float = math.inf) -> float:
        """How far rounding may move the tensor of a key; `moved` is the norm of what the step did to a weight."""
        step, stage, name, _ = key
        self.begin(step)
        norm = self._norms.get(key, 0.0)
        found = self._of(step, stage, name, norm, moved) if math.isfinite(norm) else 0.0
        self._floors[key] = found
        return found

    def saw(self, found: Comparison) -> None:
        """Take in how far apart a weight was found, where that was rounding."""
        norm = self._norms.get(found.key, 0.0)
        if found.stage == "update" and found.verdict is Verdict.ROUNDING and norm > 0 and math.isfinite(found.error):
            self._next_drift = max(self._next_drift, found.error / norm)

    def _of(self, step: int, stage: str, name: str, norm: float, moved: float) -> float:
        share = self.eps + DRIFT * self._drift
        if stage == "forward":
            self._outputs[step] += 1
            return FORWARD * math.sqrt(self._outputs[step]) * share * norm
        depth = BACKWARD * math.sqrt(2 * self._outputs[step] + 1)
        if stage in ("gradient", "grad-norm"):
            # A bias may have a gradient that is zero in mathematics, and then it is as noisy as its weight's.
            return depth * share * max(norm, self._modules[step, stage, name.rpartition(".")[0]])
        if stage == "optimizer-state":
            return 2 * self._noise(step, name, depth * share) * norm
        if stage == "update":
            noisy = FLIPPED * math.sqrt(min(self._noise(step, name, depth * share), 1.0))
            return (2 * self.eps + self._drift) * norm + min(moved, norm) * noisy
        return depth * share * norm if stage in ("backward", "loss", "buffer") else 0.0

    def _noise(self, step: int, name: str, default: float) -> float:
        """Share of a gradient's norm that is rounding."""
        for key in ((step, "grad-norm", name, "clipped"), (step, "gradient", name, "")):
            norm = self._norms.get(key, 0.0)
            if norm > 0 and key in self._floors:
                return self._floors[key] / norm
        return default
