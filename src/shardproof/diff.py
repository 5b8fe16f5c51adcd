"""`diff`: hold one recorded run against another, tensor by tensor, and explain the first divergence."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from shardproof.align.describe import described, dtypes, without_partner
from shardproof.align.kept import coarsest, compare_kept, of_weights, sketched_keys
from shardproof.align.names import Rule
from shardproof.align.pair import Pair, pair
from shardproof.align.side import Side
from shardproof.align.traces import Key, Only
from shardproof.align.whole import whole
from shardproof.compare.drawn import chosen, pictures
from shardproof.compare.estimated import Estimate
from shardproof.compare.floor import measured
from shardproof.compare.held import parts_held
from shardproof.compare.losses import NOT_CALLED, NOT_EACH
from shardproof.compare.measure import by_rank
from shardproof.compare.picture import Picture
from shardproof.compare.run import RANDOM, compare_run
from shardproof.compare.verdict import Comparison, Verdict
from shardproof.compare.view import Observed, Reference
from shardproof.diagnose.applied import check_applied
from shardproof.diagnose.at_once import at_once
from shardproof.diagnose.case import Case, Facts
from shardproof.diagnose.explain import explain, first_divergence, needs_numbers
from shardproof.diagnose.finding import Finding
from shardproof.diagnose.kept import families, size
from shardproof.diagnose.recorded import contributions
from shardproof.errors import StrategyError
from shardproof.report.data import Report, Run
from shardproof.report.spelling import apart
from shardproof.report.spelling import ranks as ranges
from shardproof.spec.parallelism import AXES, Parallelism
from shardproof.spec.stages import STAGES
from shardproof.spec.strategies import parse
from shardproof.trace.folder.reader import Recording, open_recording
from shardproof.trace.folder.uncollected import set_aside, uncollected
from shardproof.trace.trace import Trace
from shardproof.train.contributions import Contribution

Floors = Mapping[int, float]
"""Number of a record of the trusted run -> how far rounding alone moves its tensor."""

Known = dict[tuple[str, int], tuple[int, list[Tensor] | None]]
"""As `Observed.found`: where plain pieces lie, told by their first values and held to ever after."""

UNREAD = "the two runs did not read the same samples in this step, or in one before it"

UNKNOWN = "what {} read in this step is not all known, so that outputs and losses cannot be put together"

OF_SAMPLES = frozenset({"batch", "forward", "loss", "backward"})
"""Stages that depend on which samples were read by whom."""

REASONS = {
    NOT_CALLED: "this run shows no such tensor",
    NOT_EACH: "backward was not called once per micro-batch",
}
"""What a check of an experiment says, in the words of a recorded loop."""

NO_SUCH = "the reference has no such tensor"

NO_HARM = "differs, yet every gradient of the step is right: another order, another multiple, or never used"


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    map: Sequence[str] = (),
    noise: Sequence[str | os.PathLike[str]] = (),
    layout_a: str | Parallelism | None = None,
    layout_b: str | Parallelism | None = None,
) -> Report:
    """Hold the recording `b` against the recording `a`, which is trusted; the report is that of `check`.

    Both are directories that `sp.record` wrote. Records meet by name, step, stage and call, whatever the world sizes,
    wrappers, micro-batches and dtypes of the two runs; docs/recording.md says how.

    `map`: rules that rename, as `"model.layers.*=blocks.*"`, applied to both sides; the first that matches a name wins.
    `noise`: further recordings of `a`'s program, made with `record(..., disturb=seed)`, from which the noise floor is
    measured. Without them it is estimated (docs/noise-floor.md), and `report.estimated` is true.
    `layout_a`, `layout_b`: how a run was laid out (`"tp=2,dp_shard=2"`, `"ddp"`, a Parallelism), where its ranks did
    not write it down or wrote it wrong. Its degrees multiply to the ranks of the recording.

    A rank that is missing or was cut off is told in `report.warnings`, and what hangs on it is `not-checked`.
    `report.runs` has one run, called by the last part of the path of `b`.

    Raises `TraceError` where nothing of a recording can be read, it is of another version, or what its ranks hold does
    not fit together; `UsageError` for rules that match nothing or give two parameters one name, and for layouts that do
    not fit the ranks.
    """
    started = time.perf_counter()
    rules = [Rule.parse(text) for text in map]
    first, second = open_recording(Path(a)), open_recording(Path(b))
    disturbed = [open_recording(Path(path)) for path in noise]
    layouts = _declared(layout_a, first), _declared(layout_b, second)
    labels = apart(str(a), str(b))
    with uncollected():
        found = pair(first, second, rules=rules, layouts=layouts, labels=labels)
    drawn = [pair(one, second, rules=rules, layouts=layouts, labels=(str(one.path), labels[1])) for one in disturbed]
    with set_aside():
        compared = Compared.of(found, drawn)
        findings = compared.findings()
        kept = compared.pictures(findings)
    comparisons = compared.comparisons
    shown = [_of_ranks(c, found.got) for c in _in_words(comparisons, found)]
    time_s = time.perf_counter() - started
    run = Run(
        strategy=labels[1],
        degrees=dict(zip(AXES, found.got.layout.parallelism.degrees, strict=True)),
        comparisons=tuple(shown),
        findings=tuple(_finding_of_ranks(finding, found.got) for finding in findings),
        notes=tuple(_notes(found, shown)),
        pictures=tuple(_picture_of_ranks(picture, found.got) for picture in kept),
        time_s=time_s,
    )
    return Report(
        experiment=str(b),
        runs=(run,),
        ranks=second.world_size,
        steps=len(found.steps),
        dtype=dtypes(found.want, found.got),
        device=_device(second),
        reference=str(a),
        warnings=tuple(f"{one.path}: {problem}" for one in (first, second, *disturbed) for problem in one.problems),
        recorded=True,
        estimated=not drawn,
        time_s=time_s,
    )


def _notes(found: Pair, compared: Sequence[Comparison]) -> Iterator[str]:
    for side, facts in zip((found.want, found.got), found.told, strict=True):
        yield f"{side.label}: {described(side, facts, found.steps)}"
    yield from found.notes
    if not found.steps:
        shown = " and ".join(f"{side.label} shows {_steps_of(side)}" for side in (found.want, found.got))
        yield f"no step in common: {shown}; record the same steps of both"
        return
    yield from without_partner(compared, found.want.label, found.got.label)
    if found.suggested:
        yield "names would meet with " + " ".join(f"--map '{rule}'" for rule in found.suggested)


def _steps_of(side: Side) -> str:
    steps = {record.step for trace in side.traces for record in trace.records if record.step >= 0}
    return f"step{'s' if len(steps) > 1 else ''} {ranges(steps)}" if steps else "no step"


def _in_words(comparisons: Sequence[Comparison], found: Pair) -> Iterator[Comparison]:
    """With reasons that a reader of two recordings knows what to do with."""
    known = {key for trace in found.want.traces for key in trace.by_key}
    in_part = f"the ranks of {found.want.label} that can be read do not show all of it"
    for comparison in comparisons:
        lost = comparison.reason == NO_SUCH and comparison.key in known
        reason = in_part if lost else REASONS.get(comparison.reason, comparison.reason)
        yield replace(comparison, reason=reason)


def _device(recording: Recording) -> str:
    device = next((trace.header.get("device") for trace in recording.ranks.values()), None)
    return device if isinstance(device, str) else "cpu"


def _declared(layout: str | Parallelism | None, recording: Recording) -> Parallelism | None:
    return None if layout is None else parse(layout, recording.world_size)


@dataclass(kw_only=True)
class Compared:
    """Every tensor of two recordings held against each other, and what it takes to ask why."""

    found: Pair
    reference: Trace
    floors: Floors
    valued: frozenset[Key]
    """Keys of which both sides kept values."""
    alike: bool
    """Whether both drew the same random numbers, each rank its own."""
    known: Known = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)

    @classmethod
    def of(cls, found: Pair, drawn: Sequence[Pair]) -> Compared:
        """`drawn` are the disturbed runs of the trusted side, each paired with `found.got`."""
        rough = sketched_keys((found.want, found.got))
        held = whole(found.want, found.got, found.orders, rough)
        valued = frozenset({key for trace in (held, *found.got.traces) for key in trace.by_key} - rough)
        alike = _drew_alike(found.want, found.got)
        if drawn:
            made = cls(
                found=found,
                reference=held,
                floors=measured(held, [whole(one.want, one.got, one.orders, rough) for one in drawn]),
                valued=valued,
                alike=alike,
            )
            made._by_value(lambda _comparison: None)
        else:
            estimate = Estimate(held, eps=coarsest(found.got), kept=of_weights(found.got))
            made = cls(found=found, reference=held, floors=estimate, valued=valued, alike=alike)
            made._by_value(estimate.saw)
        made._by_sketch(rough)
        return made

    def _by_value(self, told: Callable[[Comparison], None]) -> None:
        """Step by step, as the number of micro-batches may change from one to the next."""
        random = False
        for step in sorted({key[0] for key in self.valued}):
            keys = {key for key in self.valued if key[0] == step}
            reference = self._reference(keys)
            # Loops seed every rank alike, and masks that repeat over data ranks are no wrong training.
            compared = compare_run(self._observed(keys, step), reference, repeats=True, told=told)
            if random:
                # What was drawn differently in one step has changed the weights of all later ones.
                compared = [_random(c) for c in compared]
            random = random or any(c.reason == RANDOM for c in compared)
            self.comparisons += [_read_alike(c, self.found) for c in _harmless(compared)]

    def _by_sketch(self, keys: Collection[Key]) -> None:
        """What at least one side kept no values of."""
        if not keys:
            return
        compared = compare_kept(self.found.want, self.found.got, keys, coarsest(self.found.want, self.found.got))
        by_step: dict[int, list[Comparison]] = {}
        for comparison in (*self.comparisons, *compared):
            by_step.setdefault(comparison.step, []).append(comparison)
        self.comparisons = [
            _read_alike(c, self.found)
            for step in sorted(by_step)
            for c in _harmless(sorted(by_step[step], key=lambda c: STAGES.index(c.stage)))
        ]

    def findings(self) -> list[Finding]:
        """The first divergence, explained; none where the two agree."""
        found, comparisons = self.found, self.comparisons
        first = first_divergence(comparisons)
        step = first.step if first is not None else next(iter(found.steps), 0)
        facts = _facts(found, step)
        finding = at_once(comparisons, facts)
        if first is None or not needs_numbers(comparisons, facts):
            return [] if finding is None else [finding]
        valued = first.key in self.valued
        case = Case(
            comparisons=comparisons,
            first=first,
            facts=facts,
            observed=self._observed(self.valued, step),
            reference=self._reference(self.valued),
            contribute=self._contributions,
            kept_size=None if valued else partial(size, found.want),
        )
        return [explain(case) if valued else explain(case, families(found.want, found.got))]

    def pictures(self, findings: Sequence[Finding]) -> tuple[Picture, ...]:
        """What the report keeps of a few tensors of which both sides have values."""
        about = [found.comparison.key for found in findings if found.comparison is not None]
        wanted = [c for c in chosen(self.comparisons, about) if c.key in self.valued]
        reference = self._reference(self.valued)
        by_step = {step: self._observed(self.valued, step) for step in {c.step for c in wanted}}
        return pictures(wanted, lambda c: parts_held(c.key, by_step[c.step], reference))

    def _contributions(self, step: int) -> list[Contribution]:
        keys = {key for key in self.valued if key[0] == step}
        reference = self._reference(keys)
        return contributions(self._observed(keys, step), reference, step)

    def _reference(self, keys: Collection[Key]) -> Reference:
        """Some keys of the trusted run. An estimate of floors has looked at the sizes of its tensors already."""
        trace = Only(self.reference, keys)
        if isinstance(self.floors, Estimate):
            return Reference(trace=trace, floors=self.floors, sizes=self.floors.size, learn=self.floors.learn)
        return Reference(trace=trace, floors=self.floors)

    def _observed(self, keys: Collection[Key], step: int) -> Observed:
        got = self.found.got
        return Observed(
            ranks=[Only(trace, keys, draws=not self.alike) for trace in got.traces],
            parallelism=got.layout.parallelism,
            microbatches=got.microbatches(step),
            samples=got.samples,
            found=self.known,
        )


def _facts(found: Pair, step: int) -> Facts:
    theirs, ours = found.told
    return Facts(
        parallelism=found.got.layout.parallelism,
        microbatches=found.got.microbatches(step),
        batch_split_over_tp=False,
        ties={place: told.ties for place, told in ours.items()},
        reference_ties=next((told.ties for told in theirs.values()), ()),
        strangers={place: told.strangers for place, told in ours.items()},
        left_behind={place: told.left_behind for place, told in ours.items()},
        misread=found.misread,
        not_applied=_not_applied(found),
    )


def _not_applied(found: Pair) -> Finding | None:
    """Whether the strategy that the run says it meant to use did nothing."""
    declared = next((told.declared for told in found.told[1].values() if told.declared), "")
    if not declared:
        return None
    try:
        meant = parse(declared, found.got.layout.parallelism.world_size)
    except StrategyError:
        return None
    if meant.world_size != found.got.layout.parallelism.world_size:
        return None
    pieces = [
        {r.name: r.piece for r in trace.records if r.stage == "gradient" and not r.part and r.piece is not None}
        for trace in found.got.traces
    ]
    return check_applied(pieces, {}, meant) if all(pieces) else None


def _harmless(compared: Sequence[Comparison]) -> list[Comparison]:
    """An output or loss that differs where every gradient of the step is right is no wrong training.

    A loop may call backward on a sum and divide later, and a framework may hand on its tokens in another order.
    """
    gradients = [c for c in compared if c.stage == "gradient" and c.verdict is not Verdict.NOT_CHECKED]
    if not gradients or any(c.verdict is Verdict.DIFFERENT for c in gradients):
        return list(compared)
    return [
        replace(c, verdict=Verdict.NOT_CHECKED, reason=NO_HARM)
        if c.stage in ("forward", "loss", "backward") and c.verdict is Verdict.DIFFERENT
        else c
        for c in compared
    ]


def _read_alike(comparison: Comparison, found: Pair) -> Comparison:
    """Nothing is said of steps in which the runs read other samples, except that they did."""
    if comparison.step in found.unread and comparison.stage != "batch":
        return replace(comparison, verdict=Verdict.NOT_CHECKED, reason=UNREAD)
    if comparison.step in found.partial and comparison.stage in OF_SAMPLES:
        reason = UNKNOWN.format(found.partial[comparison.step])
        return replace(comparison, verdict=Verdict.NOT_CHECKED, reason=reason)
    if comparison.verdict is Verdict.DIFFERENT and (without := found.got.without(comparison.key)):
        reason = f"what {found.got.named(without)} held of it cannot be read"
        return replace(comparison, verdict=Verdict.NOT_CHECKED, reason=reason)
    return comparison


def _random(comparison: Comparison) -> Comparison:
    if comparison.stage == "batch":
        return comparison
    return replace(comparison, verdict=Verdict.NOT_CHECKED, reason=RANDOM)


def _drew_alike(want: Side, got: Side) -> bool:
    """Whether the two sides have the same data ranks and TP peers, and each drew the same numbers for each output."""
    meshes = [(side.layout.parallelism.dp, side.layout.parallelism.tp) for side in (want, got)]
    if meshes[0] != meshes[1]:
        return False
    drawn = [
        [{(r.key, r.call): r.draws for r in trace.records if r.draws} for trace in side.traces] for side in (want, got)
    ]
    return drawn[0] == drawn[1]


def _of_ranks(comparison: Comparison, side: Side) -> Comparison:
    """With the ranks of the recording in the place of places on the mesh."""
    return replace(
        comparison,
        ranks=tuple(sorted(side.rank(place) for place in comparison.ranks)),
        samples=tuple(replace(sample, rank=side.rank(sample.rank)) for sample in comparison.samples),
        errors=by_rank((side.rank(place), error) for place, error in enumerate(comparison.errors) if error is not None),
    )


def _picture_of_ranks(picture: Picture, side: Side) -> Picture:
    return replace(
        picture,
        owners=tuple(tuple(sorted(map(side.rank, places))) for places in picture.owners),
        got=tuple(sorted((side.rank(place), values) for place, values in picture.got)),
    )


def _finding_of_ranks(finding: Finding, side: Side) -> Finding:
    compared = finding.comparison
    return replace(
        finding,
        ranks=tuple(sorted(side.rank(place) for place in finding.ranks)),
        comparison=None if compared is None else _of_ranks(compared, side),
    )


class _Module(ModuleType):
    """The public function and this module share a name: whichever of them `sp.diff` finds first can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Report:
        return diff(*args, **kwargs)


sys.modules[__name__].__class__ = _Module
