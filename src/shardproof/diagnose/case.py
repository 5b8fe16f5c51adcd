"""Everything that is known of a run that went wrong: what the families of causes are asked about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from shardproof.compare.measure import MULTIPLE, scale
from shardproof.compare.reads import Misread
from shardproof.compare.shares import Share, shares
from shardproof.compare.verdict import Comparison, Verdict
from shardproof.compare.view import Key, Observed, Reference
from shardproof.diagnose.finding import Finding, Hypothesis
from shardproof.spec.parallelism import Parallelism
from shardproof.train.contributions import Contribution
from shardproof.train.probe import Probe


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What is known of a run beside its traces."""

    parallelism: Parallelism
    microbatches: int
    batch_split_over_tp: bool
    ties: Mapping[int, tuple[tuple[str, ...], ...]]
    """Rank -> groups of names that share one storage."""
    reference_ties: tuple[tuple[str, ...], ...]
    strangers: Mapping[int, tuple[str, ...]]
    """Rank -> what the optimizer holds that is not the model's."""
    left_behind: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Rank -> trainable parameters that the optimizer does not hold."""
    misread: Misread | None = None
    not_applied: Finding | None = None


@dataclass(kw_only=True)
class Case:
    """A run that differs from its reference, and the means to ask why."""

    comparisons: Sequence[Comparison]
    first: Comparison
    """What the finding is about: the first wrong tensor, in causal order."""
    facts: Facts
    observed: Observed
    reference: Reference
    unclipped: Observed | None = None
    """The first step of a user's own clipping step, run again without its clipping."""
    again: Observed | None = None
    """The same run once more, as far as the step of the first divergence, with the inputs of every module."""
    contribute: Callable[[int], Sequence[Contribution]] = lambda _step: ()
    """Step -> what each part of its batch contributes to the gradients, on one device."""
    probe: Probe | None = None
    """The model on one device, with the weights of the step of the first divergence."""
    kept_size: Callable[[Key], float | None] | None = None
    """How large the reference's tensor is, in the unit of its floor, where no values were kept; None for not known."""
    tried: list[Hypothesis] = field(default_factory=list)
    """What was held against the numbers, in order, with what it left unexplained."""

    @cached_property
    def stage(self) -> list[Comparison]:
        """The comparisons of the first divergence's step and stage about which something can be said."""
        at = (self.first.step, self.first.stage)
        return [c for c in self.comparisons if (c.step, c.stage) == at and c.verdict is not Verdict.NOT_CHECKED]

    @cached_property
    def wrong(self) -> list[Comparison]:
        """Those of them that differ."""
        return [c for c in self.stage if c.verdict is Verdict.DIFFERENT]

    @cached_property
    def contributions(self) -> Sequence[Contribution]:
        """What each part of the batch of the first divergence's step contributes."""
        return self.contribute(self.first.step)

    def shares(self, of: Comparison | Key) -> list[Share]:
        """What each rank holds of a tensor, and where."""
        key = of.key if isinstance(of, Comparison) else of
        before_clipping = self.unclipped is not None and key[0] == 0 and key[1] == "gradient"
        observed = self.unclipped if before_clipping and self.unclipped is not None else self.observed
        return shares(key, observed, self.reference)

    def size(self, key: Key) -> float | None:
        """How large the reference's tensor is, in the unit of its floor; None where that is not known."""
        if self.kept_size is not None:
            return self.kept_size(key)
        return max((scale(whole) for whole in self.reference.tensors(key)), default=None)

    def fits(self, name: str, residual: float, *, limit: float = MULTIPLE) -> bool:
        """Whether a hypothesis that leaves `residual` (in noise floors) unexplained holds; it is remembered."""
        # Written so that NaN fails.
        holds = residual <= limit
        self.tried.append(Hypothesis(name=name, residual=residual, holds=holds))
        return holds


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What a family makes of a case."""

    cause: str
    evidence: str
    fix: str
    axis: str | None = None
    factor: float | None = None
    at: Comparison | None = None
    """Another tensor than the first wrong one, where that only showed the fault."""
    stage: str | None = None
    """Another stage than that of the tensor."""
    where: str | None = None
    """Another place than the tensor's name."""
    ranks: tuple[int, ...] = ()
    """Other ranks than those whose piece differs."""
