"""Single gradients that are wrong when backward is over, and clipping by the wrong norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from shardproof.spec.parallelism import AXES
from shardproof.train.faults.facts import CLEAR, Facts
from shardproof.train.faults.fault import Fault, Scene


def scale_own(gradient: Tensor, factor: float) -> None:
    """Multiply the local elements of one parameter's gradient, which may lie among others', in place."""
    if gradient.numel():
        gradient.mul_(factor)


@dataclass(frozen=True, kw_only=True)
class OneGradient(Fault):
    """A factor on the gradient of one parameter."""

    stage = "gradient"

    parameter: str

    @property
    def place(self) -> str:
        """The gradient."""
        return f"gradient of {self.parameter}"

    def reason(self, facts: Facts) -> str:
        """No gradient to speak of."""
        floors = facts.gradients.get(self.parameter, 0.0)
        return "" if floors > CLEAR else f"the gradient of {self.parameter} is zero, or no more than round-off"

    def gradients(self, scene: Scene) -> None:
        """Scale what this rank holds of it."""
        held = scene.parameters.get(self.parameter)
        if held is not None and held.leaf.grad is not None:
            scale_own(held.local(held.leaf.grad), self.factor_on(scene))
            scene.planted += 1

    def factor_on(self, scene: Scene) -> float:
        """The factor, on this rank."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ScaledSubset(OneGradient):
    """One gradient times the size of an axis: reduced once too often, or counted by every rank."""

    name = "grad-scale-subset"

    axis: str
    factor: float

    @classmethod
    def plan(cls, facts: Facts) -> Sequence[Self] | str:
        """One, for the innermost axis in use."""
        axes = [axis for axis in reversed(AXES) if getattr(facts.parallelism, axis) > 1]
        if not axes or not facts.trained():
            return "there is one rank" if not axes else "no parameter of the reference has a gradient"
        parameter = facts.pick(facts.clear(facts.trained()), cls.name)
        return [cls(parameter=parameter, axis=axes[0], factor=getattr(facts.parallelism, axes[0]))]

    @property
    def place(self) -> str:
        """The gradient, and the factor."""
        return f"gradient of {self.parameter}, times {self.factor:g} ({self.axis})"

    def factor_on(self, scene: Scene) -> float:
        """The same on all ranks."""
        del scene
        return self.factor


@dataclass(frozen=True, kw_only=True)
class PartialOverTp(OneGradient):
    """A replicated parameter's gradient that nobody summed: each tp rank has a part, and the parts add up."""

    name = "grad-not-summed"

    @classmethod
    def plan(cls, facts: Facts) -> Sequence[Self] | str:
        """One parameter that is whole on every tp rank."""
        if facts.parallelism.tp == 1:
            return "there is one tp rank"
        names = [name for name in facts.whole_over_tp() if name in facts.gradients]
        if not names:
            return "no trained parameter is replicated over tp"
        return [cls(parameter=facts.pick(facts.clear(names), cls.name))]

    @property
    def place(self) -> str:
        """The gradient, and the axis."""
        return f"gradient of {self.parameter}, over tp"

    def factor_on(self, scene: Scene) -> float:
        """Unequal shares, as no two ranks see the same tokens: 1/3 and 2/3 on two ranks."""
        return share(scene)


@dataclass(frozen=True, kw_only=True)
class WrongNorm(Fault):
    """Gradients clipped by the norm of one shard, taken for the norm of all."""

    name = "clip-by-local-norm"
    stage = "grad-norm"

    factors: tuple[float, ...]
    """[step]: by how much the coefficient is too large."""

    @classmethod
    def plan(cls, facts: Facts) -> Sequence[Self] | str:
        """Where gradients are clipped."""
        limit, ranks = facts.max_grad_norm, facts.parallelism.world_size
        if limit is None:
            return "max_grad_norm is not set"
        if ranks == 1:
            return "there is one rank"
        # What one of as many equal shards has of the norm.
        own = ranks**0.5
        if not facts.norms:
            return [cls(factors=(own,) * facts.steps)]
        return [cls(factors=tuple(_coefficient(n / own, limit) / _coefficient(n, limit) for n in facts.norms))]

    @property
    def place(self) -> str:
        """All gradients."""
        return "all gradients, clipped"

    @property
    def steps(self) -> int | None:
        """Until the first step that is clipped."""
        return next((step + 1 for step, factor in enumerate(self.factors) if factor != 1), None)

    def reason(self, facts: Facts) -> str:
        """Nothing is clipped."""
        if any(factor != 1 for factor in self.factors):
            return ""
        return f"no gradient norm reaches max_grad_norm {facts.max_grad_norm:g} (the largest is {max(facts.norms):.3g})"

    def before_optimizer(self, scene: Scene) -> None:
        """Scale every gradient once."""
        factor = self.factors[scene.step] if scene.step < len(self.factors) else 1.0
        for held in scene.parameters.values():
            if held.leaf.grad is not None:
                scale_own(held.local(held.leaf.grad), factor)
                scene.planted += 1


def share(scene: Scene) -> float:
    """What a tp rank holds of a sum that nobody summed; the shares of a group add up to 1."""
    tp = scene.parallelism.tp
    return 2 * (scene.at["tp"] + 1) / (tp * (tp + 1))


def _coefficient(norm: float, limit: float) -> float:
    return min(limit / (norm + 1e-6), 1.0)
