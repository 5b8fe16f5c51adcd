"""A check in progress: run a strategy on the ranks, see to a reference that read the same, compare, explain."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from shardproof.compare.drawn import chosen
from shardproof.compare.floor import Moved, floor_of
from shardproof.compare.picture import Picture
from shardproof.compare.reads import Reads, digest_of, understand
from shardproof.compare.split import sharded_over
from shardproof.compare.verdict import Comparison
from shardproof.compare.view import Observed
from shardproof.diagnose.applied import check_applied
from shardproof.diagnose.at_once import at_once
from shardproof.diagnose.blind import Lived, blind_spots
from shardproof.diagnose.case import Facts
from shardproof.diagnose.explain import first_divergence, needs_numbers
from shardproof.diagnose.finding import Finding
from shardproof.diagnose.invariants import explain_invariants
from shardproof.errors import StrategyError, UsageError
from shardproof.parallel.mesh import axis_of
from shardproof.parallel.plan import splits_batch
from shardproof.ranks import Ranks
from shardproof.ranks.forked import ForkedRanks
from shardproof.report.data import Run
from shardproof.report.progress import Progress
from shardproof.spec.parallelism import AXES, Parallelism
from shardproof.train.run import Summary, Variant
from shardproof.worker import Pair, Replay, Worker

DRAWS = 4
"""Disturbed runs of the reference from which the noise floor is taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trusted:
    """A finished reference run."""

    name: str
    summary: Summary
    floors: Mapping[int, float]
    """Number of a record -> how far rounding alone moves its tensor."""

    @property
    def by_parts(self) -> bool:
        """Whether it was fed the parts of each batch one after the other, as they do not join into one."""
        return any(len(step) > 1 for step in self.summary.reads)


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """A run that has been checked."""

    name: str
    layout: Parallelism
    summaries: Mapping[int, Summary]
    reads: Reads
    trusted: Trusted


@dataclass
class Session:
    """What a check has done so far, and the ranks that do the work."""

    worker: Worker
    show: tuple[int, ...]
    progress: Progress
    trust: Parallelism | None = None
    """The layout to be trusted instead of one device."""
    invariants: bool = False
    """Nothing is trusted: replicas are held against each other."""
    last: Done | None = None
    """The run that was checked last."""
    repeating: bool = False
    """Whether a run is being repeated, to look for a cause or behind a user's own clipping."""
    once: set[Parallelism] = field(default_factory=set)
    """Layouts whose code cannot be run twice in one process: their causes are sought without that."""
    _ranks: Ranks | None = None
    _runs: int = 0
    _trusted: dict[str, Trusted] = field(default_factory=dict)
    """Digest of what was read -> the reference that read just that."""
    _content: Counter[str] | None = None
    _lived: dict[str, tuple[Parallelism, Reads, str]] = field(default_factory=dict)
    """Name of a run -> its layout, what it read, and the reference that it was held against."""
    _trusted_layout: bool = False

    def use(self, ranks: Ranks) -> None:
        """Work on these ranks from now on.

        Where the loader is shardproof's own, what will be read is known, so the reference is trained at once: a broken
        experiment then shows on one device, before anything is laid out.
        """
        self._ranks = ranks
        ranks.on_output = self.progress.message
        if self.invariants:
            return
        if self.worker.experiment.batches is None and not self._trusted:
            self._reference("reference", None)
        if self.trust is not None and not self._trusted_layout:
            self._trust(self.trust)

    @property
    def ranks(self) -> Ranks:
        """The ranks in use."""
        if self._ranks is None:
            raise UsageError("there are no ranks to work on; call use() first")
        return self._ranks

    def check(self, layout: Parallelism, variant: Variant | None = None, *, right: Done | None = None) -> Run:
        """Train under one layout, compare with the reference, explain.

        `variant` plants a fault, and `right` is the run without it: both are held against the same reference.
        """
        self._runs += 1
        # Degrees are written with = and , which have no place in a file name.
        name = f"run{self._runs}"
        started = time.perf_counter()
        experiment = self.worker.experiment
        self.progress.starting(f"training under {layout}")
        summaries = self._train(name, layout, variant or Variant())
        reads = self._understood(summaries, layout)
        trusted = self._trusted_for(name, reads, variant, right)
        if variant is None:
            self._lived[name] = (layout, reads, trusted.name)
        self.progress.starting(f"comparing {layout.strategy} with the reference")
        pair = Pair(
            name=name,
            observed=self._observed(layout, reads),
            unclipped=self._unclipped(name, layout, variant),
            trusted=trusted.name,
            floors=trusted.floors,
            parts=self._parts(layout, reads) if trusted.by_parts else (),
        )
        compared = self._compared(pair)
        if self._clips_exactly(compared, trusted):
            # Without torch's epsilon, which is as right: the reference is to do the same.
            replay = Replay(name=name, sources=reads.sources)
            trusted = self._reference(f"{name}-exact", replay, exact_clipping=True)
            pair = replace(pair, trusted=trusted.name, floors=trusted.floors)
            compared = self._compared(pair)
        collectives = by_axis(summaries[0].collectives, layout)
        pieces = [summaries[rank].pieces for rank in range(layout.world_size)]
        facts = Facts(
            parallelism=layout,
            microbatches=experiment.microbatches,
            batch_split_over_tp=reads.split_over_tp,
            ties={rank: summary.ties for rank, summary in summaries.items()},
            reference_ties=trusted.summary.ties,
            strangers={rank: summary.strangers for rank, summary in summaries.items()},
            left_behind={rank: summary.left_behind for rank, summary in summaries.items()},
            misread=reads.misread,
            not_applied=check_applied(pieces, collectives, layout),
        )
        findings = [found] if (found := at_once(compared, facts)) is not None else []
        if needs_numbers(compared, facts):
            self.progress.starting(f"seeking the cause of the divergence of {layout.strategy}")
            # A planted fault is known: what the run fed its modules need not be looked into.
            once = variant is not None or layout in self.once
            again = None if once else self._again(name, layout, compared)
            arguments = pair, again, compared, facts, reads.sources
            during = f"the search for the cause in {layout.strategy}"
            findings = [self.ranks.call("explain", *arguments, ranks=[0], during=during)[0]]
        shown = tuple(rank for rank in self.show if rank < layout.world_size)
        run = Run(
            strategy=layout.strategy,
            degrees=dict(zip(AXES, layout.degrees, strict=True)),
            comparisons=tuple(compared),
            findings=tuple(findings),
            sharded=sharded_over(pieces, layout),
            collectives=collectives,
            notes=self._notes(reads),
            pictures=self._pictures(pair, compared, findings) if variant is None else (),
            shown=self.ranks.call("show", name, shown, ranks=[0])[0] if shown else {},
            time_s=time.perf_counter() - started,
        )
        if variant is None:
            self.progress.finished(run)
        self.last = Done(name=name, layout=layout, summaries=summaries, reads=reads, trusted=trusted)
        return run

    def blind_spots(self) -> tuple[str, ...]:
        """What the experiment cannot show under the layouts that were checked."""
        if not self._lived:
            return ()
        *_, (_, _, trusted) = self._lived.values()
        layouts = {name: layout for name, (layout, _, _) in self._lived.items()}
        lesson, counts = self.ranks.call("blind", trusted, layouts, ranks=[0], during="looking for blind spots")[0]
        experiment = self.worker.experiment
        return blind_spots(
            lesson,
            [Lived(parallelism=at, reads=reads, counts=counts[name]) for name, (at, reads, _) in self._lived.items()],
            microbatches=experiment.microbatches,
            own_layout=experiment.parallelize is not None,
            own_step=experiment.train_step is not None,
            max_grad_norm=experiment.max_grad_norm,
        )

    def check_invariants(self, layout: Parallelism) -> Run:
        """Train under one layout and hold what is replicated against itself, without any reference."""
        self._runs += 1
        name = f"run{self._runs}"
        started = time.perf_counter()
        self.progress.starting(f"training under {layout}")
        summaries = self._train(name, layout, Variant())
        reads = self._understood(summaries, layout)
        self.progress.starting(f"comparing the replicas of {layout.strategy}")
        during = f"the comparison of {layout.strategy}"
        observed, shapes = self._observed(layout, reads), summaries[0].shapes
        seen = self.ranks.call("invariants", name, observed, shapes, ranks=[0], during=during)[0]
        collectives = by_axis(summaries[0].collectives, layout)
        pieces = [summaries[rank].pieces for rank in range(layout.world_size)]
        shown = tuple(rank for rank in self.show if rank < layout.world_size)
        run = Run(
            strategy=layout.strategy,
            degrees=dict(zip(AXES, layout.degrees, strict=True)),
            comparisons=tuple(one.comparison for one in seen),
            findings=tuple(
                explain_invariants(
                    seen,
                    collectives=collectives if summaries[0].counted else None,
                    misread=reads.misread,
                    not_applied=check_applied(pieces, collectives, layout),
                )
            ),
            sharded=sharded_over(pieces, layout),
            collectives=collectives,
            notes=self._notes(reads),
            shown=self.ranks.call("show", name, shown, ranks=[0])[0] if shown else {},
            invariants=True,
            time_s=time.perf_counter() - started,
        )
        self.progress.finished(run)
        return run

    def _clips_exactly(self, compared: Sequence[Comparison], trusted: Trusted) -> bool:
        """Whether a user's own step clips by the norm as it is, to which torch adds a millionth."""
        experiment, first = self.worker.experiment, first_divergence(compared)
        if experiment.train_step is None or experiment.max_grad_norm is None or trusted.by_parts:
            return False
        if first is None or first.stage != "grad-norm" or first.ratio is None:
            return False
        wrong = [c for c in compared if (c.step, c.stage) == (first.step, "grad-norm") and c.verdict == "different"]
        off = first.ratio - 1
        # As far as a millionth of any norm of 0.001 or more goes, and the same for all.
        return 0 < off <= 1e-3 and all(c.ratio is not None and abs(c.ratio - first.ratio) <= 0.1 * off for c in wrong)

    def _compared(self, pair: Pair) -> list[Comparison]:
        """What `Worker.compare` says of a run, in causal order."""
        # torchrun's ranks need not see each other's files. Where a layout is found from values, one step tells the
        # next where a piece lies, so that one rank looks at all of them.
        shared = isinstance(self.ranks, ForkedRanks) and self.worker.experiment.parallelize is None
        ranks = tuple(range(min(self.ranks.size, self.worker.steps))) if shared else (0,)
        during = f"the comparison of {pair.observed.parallelism.strategy}"
        said = self.ranks.call("compare", pair, ranks, ranks=ranks, during=during)
        return sorted((c for found in said.values() for c in found), key=lambda c: c.step)

    def _train(self, name: str, layout: Parallelism, variant: Variant) -> dict[int, Summary]:
        ranks = range(layout.world_size)
        summaries = self.ranks.call("run", name, layout, variant, ranks=ranks, during=layout.strategy)
        if any(not self.worker.trace(name, rank).exists() for rank in ranks):
            self.ranks.call("gather", name, layout.world_size, ranks=ranks, during=f"gathering {layout.strategy}")
        return summaries

    def _understood(self, summaries: Mapping[int, Summary], layout: Parallelism) -> Reads:
        experiment = self.worker.experiment
        if experiment.batches is not None and self._content is None:
            self._content = self.ranks.call("content", ranks=[0], during="reading the data set")[0]
        return understand(
            [summaries[rank].reads for rank in range(layout.world_size)],
            layout,
            may_split=splits_batch(experiment.tp_plan),
            # Shardproof's own loader knows what it reads; only a user's is looked into.
            data=self._content,
        )

    def _observed(self, layout: Parallelism, reads: Reads) -> Observed:
        return Observed(
            ranks=(),
            parallelism=layout,
            microbatches=self.worker.experiment.microbatches,
            batch_split_over_tp=reads.split_over_tp,
            samples=reads.samples,
            placements=self.worker.experiment.placements or {},
        )

    def _trust(self, layout: Parallelism) -> None:
        """Train under `layout` and let its values take the place of one device's."""
        self.progress.starting(f"training the reference under {layout}")
        summaries = self._train("trusted", layout, Variant())
        reads = self._understood(summaries, layout)
        single = self._reference_for("trusted", reads)
        if single.by_parts:
            raise StrategyError(
                f"reference {layout.strategy}: batches whose parts have shapes that do not join into one cannot be "
                "assembled; use the reference 'single'"
            )
        whole, during = "trusted-whole", f"assembling {layout.strategy}"
        observed = self._observed(layout, reads)
        self.ranks.call("assemble", "trusted", single.name, whole, observed, ranks=[0], during=during)
        self._trusted[digest_of(reads)] = replace(single, name=whole)
        self._trusted_layout = True

    def _reference_for(self, name: str, reads: Reads) -> Trusted:
        known = self._trusted.get(digest_of(reads))
        if known is None and self._trusted_layout and self.trust is not None:
            raise StrategyError(
                f"reference {self.trust.strategy}: it read other samples than the strategy to be checked, so that "
                "their tensors have nothing in common; use the reference 'single', which replays what was read"
            )
        return known or self._reference(f"{name}-reference", Replay(name=name, sources=reads.sources))

    def _reference(self, name: str, replay: Replay | None, *, exact_clipping: bool = False) -> Trusted:
        self.progress.starting("training the reference on one device")
        summary = self.ranks.call(
            "reference", name, replay, Variant(exact_clipping=exact_clipping), ranks=[0], during="the reference"
        )[0]
        variants = [Variant(draw=draw, exact_clipping=exact_clipping) for draw in range(DRAWS)]
        if self.worker.low_precision:
            variants.append(Variant(widened=True, exact_clipping=exact_clipping))
        self.progress.starting("measuring the noise floor")
        # torchrun's ranks need not see each other's files, and the draws are held against the reference's.
        ranks = tuple(range(self.ranks.size)) if isinstance(self.ranks, ForkedRanks) else (0,)
        drawn = self.ranks.call("draws", name, replay, variants, ranks, ranks=ranks, during="the noise floor")
        moved: dict[int, list[Moved]] = {}
        for found in drawn.values():
            for number, moves in found.items():
                moved.setdefault(number, []).extend(moves)
        floors = {number: floor_of(moves) for number, moves in moved.items()}
        trusted = Trusted(name=name, summary=summary, floors=floors)
        if not trusted.by_parts and not exact_clipping:
            # Another run that read the same samples can use it; parts are cut anew under every layout.
            own = understand([summary.reads], Parallelism(), may_split=False, data=None)
            self._trusted[digest_of(own)] = trusted
        return trusted

    def _parts(self, layout: Parallelism, reads: Reads) -> tuple[tuple[tuple[int, int], ...], ...]:
        if reads.split_over_tp:
            raise StrategyError(
                f"{layout.strategy}: the batch is split over tp, and its parts have shapes that do not join into one "
                "batch; pad all samples to one length for the check"
            )
        return tuple(tuple((rank // layout.tp, m) for rank, m in step) for step in reads.sources)

    def _pictures(self, pair: Pair, compared: Sequence[Comparison], findings: Sequence[Finding]) -> tuple[Picture, ...]:
        """What is kept of a few tensors: the traces do not outlive the check."""
        about = [found.comparison.key for found in findings if found.comparison is not None]
        during = f"keeping values of {pair.observed.parallelism.strategy}"
        kept: tuple[Picture, ...] = self.ranks.call(
            "pictures", pair, chosen(compared, about), ranks=[0], during=during
        )[0]
        return kept

    def _notes(self, reads: Reads) -> tuple[str, ...]:
        read, wanted = len(reads.batches[0]), self.worker.experiment.batch_size
        notes = [reads.note] if reads.note else []
        if read != wanted:
            notes.append(f"the data ranks read {read} samples in the first step; batch_size is {wanted}")
        return tuple(notes)

    def _again(self, name: str, layout: Parallelism, compared: Sequence[Comparison]) -> str | None:
        """Repeat a run up to its first divergence, with the inputs of all modules; None where that tells nothing."""
        first = first_divergence(compared)
        if first is None or first.step < 0:
            return None
        again = f"{name}-again"
        self.repeating = True
        self._train(again, layout, Variant(inputs=True, steps=first.step + 1, replays=name))
        self.repeating = False
        return again

    def _trusted_for(self, name: str, reads: Reads, variant: Variant | None, right: Done | None) -> Trusted:
        """The reference for a run; for a fault, that of the run without it, unless a user's own loader is at fault."""
        fault = None if variant is None else variant.fault
        if fault is None or right is None:
            return self._reference_for(name, reads)
        own_loader = self.worker.experiment.batches is None
        # Samples that are known to be misread are a finding already: no reference need read them too.
        if own_loader or not fault.in_loader or reads.misread is not None:
            return right.trusted
        return self._reference_for(name, reads)

    def _unclipped(self, name: str, layout: Parallelism, variant: Variant | None) -> str | None:
        """Run a user's own clipping step once more with an unreachable limit, to see its gradients before clipping."""
        experiment = self.worker.experiment
        if experiment.train_step is None or experiment.max_grad_norm is None or layout in self.once:
            return None
        again = f"{name}-unclipped"
        once_more = Variant(replays=name) if variant is None else variant
        self.repeating = variant is None
        self._train(again, layout, replace(once_more, unclipped=True))
        self.repeating = False
        return again


def by_axis(counted: Mapping[tuple[str, tuple[int, ...]], int], layout: Parallelism) -> dict[str, dict[str, int]]:
    """Mesh axis -> collective -> how often, as rank 0 saw it."""
    found: dict[str, dict[str, int]] = {}
    for (collective, ranks), count in counted.items():
        axis = axis_of(frozenset(ranks), layout, 0) if ranks else "other"
        if axis != "self":
            found.setdefault(axis, {})[collective] = count
    return found
