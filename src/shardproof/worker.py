"""What the ranks of a check do, one method per piece of work. Each rank holds one Worker, inherited by the fork."""

from __future__ import annotations

import re
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from shardproof.compare.assemble import assemble
from shardproof.compare.drawn import pictures
from shardproof.compare.floor import Moved, moved
from shardproof.compare.held import Part, parts_held
from shardproof.compare.invariants import Seen, compare_invariants
from shardproof.compare.parameters import compare as compare_parameter
from shardproof.compare.picture import Picture
from shardproof.compare.run import compare_run
from shardproof.compare.told import told_by
from shardproof.compare.verdict import Comparison
from shardproof.compare.view import Observed, Reference
from shardproof.diagnose.blind import Counts, Lesson, counts_of, learn
from shardproof.diagnose.case import Case, Facts
from shardproof.diagnose.explain import explain, first_divergence
from shardproof.diagnose.finding import Finding
from shardproof.errors import ExperimentError, StrategyError, TraceError
from shardproof.parallel.data import GlobalBatches, Microbatch, cast, dataset_of
from shardproof.parallel.initial import default_dtype
from shardproof.parallel.seeding import seed_everything
from shardproof.ranks import Place
from shardproof.report.data import Shown
from shardproof.report.shown import shown_by
from shardproof.spec.experiment import Batch, Experiment
from shardproof.spec.parallelism import Parallelism
from shardproof.trace.file import TraceFile, save
from shardproof.trace.reads import digests
from shardproof.trace.transfer import receive_file, send_file
from shardproof.train.contributions import Contribution, contributions, restore
from shardproof.train.faults.facts import Facts as PlantingFacts
from shardproof.train.probe import Probe
from shardproof.train.run import Settings, Summary, TracedRun, Variant

SINGLE = Parallelism(strategy="single")

SHAPES = re.compile(
    r"shape '.*' is invalid for input of size|must match the size|shapes cannot be multiplied|same reduction dim"
    r"|size of tensor a|split_with_sizes|unflatten|divisible|[Ee]xpected size|[Gg]iven normalized_shape|heads"
)
"""What torch says where a tensor has not the shape that the model's code counts on."""

COUNTED_SAMPLES = 200_000
"""Samples of a data set that are read to know a user's batches by content; a larger one is not looked through."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """Where the reference finds the batches that a run under the user's own loader read."""

    name: str
    """Of the run."""

    sources: tuple[tuple[tuple[int, int], ...], ...]
    """Per step: (rank, micro-batch) pairs, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A run and the reference that it is held against: names of traces, and what is known beside them."""

    name: str
    """Of the run."""

    observed: Observed
    """The run, whose `ranks` are filled in where the traces are read."""

    unclipped: str | None = None
    """The run that shows a user's gradients of the first step before his own clipping."""

    trusted: str
    """Of the reference."""

    floors: Mapping[int, float]
    parts: Sequence[Sequence[tuple[int, int]]] = ()
    """Both as `Reference` has them."""


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One rank's part in a check. Everything it returns is plain data."""

    experiment: Experiment
    trusted: Experiment
    """What the reference trains; the experiment itself unless the user names another."""

    folder: Path
    """Where traces are written."""

    dtype: torch.dtype
    steps: int
    shuffle: bool

    @property
    def low_precision(self) -> bool:
        """Whether a run in float64 can tell how far this one's rounding reaches."""
        return self.dtype != torch.float64

    def run(self, place: Place, name: str, parallelism: Parallelism, variant: Variant) -> Summary:
        """Train under `parallelism` and write this rank's trace."""
        with place.world(name, parallelism.world_size):
            run = TracedRun(self.experiment, parallelism, place.rank, self._settings(place), variant)
            batches = run.read() if variant.replays is None else self._read_before(variant.replays, place.rank, run)
            if run.planting is not None:
                batches = run.planting.batches(batches, self._read_by)
            # A data set may draw at random, so that only what was read here can be replayed.
            with self._writing():
                torch.save([[part.batch for part in parts] for parts in batches], self._batches(name, place.rank))
            try:
                summary = run.train(batches)
            except (RuntimeError, ValueError) as error:
                if parallelism.tp > 1 and self.experiment.parallelize is None and _is_about_shapes(error):
                    raise _cannot_split(parallelism, error) from error
                raise
            with self._writing():
                run.save(self.trace(name, place.rank))
        return summary

    def reference(self, place: Place, name: str, replay: Replay | None, variant: Variant) -> Summary:
        """Train the reference in a world of its own, on what `replay` says was read or on the loader's own batches.

        Raises `ExperimentError` where the experiment is broken on one device already.
        """
        with place.world(name, 1):
            run = self._single(place, variant)
            summary = run.train(self._global_batches(place, replay))
            if summary.strangers:
                raise ExperimentError(
                    "Experiment.optimizer holds parameters that are not the model's "
                    f"({'; '.join(summary.strangers[:3])}); build it from the model that it is given"
                )
            _first_loss_is_a_number(run)
            with self._writing():
                run.save(self.trace(name, 0))
        return summary

    def draws(
        self, place: Place, name: str, replay: Replay | None, variants: Sequence[Variant], ranks: Sequence[int]
    ) -> dict[int, list[Moved]]:
        """Repeat the reference with rounding disturbed; how far each of its records moves, by number.

        `ranks` share the variants among them.
        """
        floors: dict[int, list[Moved]] = {}
        reference = TraceFile(self.trace(name, 0))
        numbers = {(record.key, record.call): number for number, record in enumerate(reference.records)}
        for variant in variants[ranks.index(place.rank) :: len(ranks)]:
            with place.world(f"{name}-draw", 1):
                run = self._single(place, variant)
                run.train(self._global_batches(place, replay))
            for record, tensor in run.recorder.entries:
                # Found by key: where values decide which module runs (routing), a draw may show more or fewer tensors.
                number = numbers.get((record.key, record.call))
                if tensor is None or number is None or reference.records[number].missing:
                    continue
                value = tensor.cpu()
                if record.stage == "backward":
                    value = value / run.template.loss_scale
                found = moved(value, reference.tensor(number), scaled=run.template.loss_scale != 1.0)
                if found is not None:
                    floors.setdefault(number, []).append(found)
            # Before the next is built: a recorded run holds every tensor of every step.
            del run
        return floors

    def content(self, place: Place) -> Counter[str] | None:
        """How often the data set holds each content; None where it is too large to look through."""
        del place
        data = dataset_of(self.experiment)
        if len(data) > COUNTED_SAMPLES:
            return None
        batches = GlobalBatches(replace(self.experiment, batch_size=1), data_ranks=1, microbatches=1)
        parts = batches.of_rank(0)
        found: Counter[str] = Counter()
        with default_dtype(self.dtype):
            for _ in range(len(data)):
                found.update(digests(cast(next(parts).batch, self.dtype, torch.device("cpu"))))
        return found

    def compare(self, place: Place, pair: Pair, ranks: Sequence[int]) -> list[Comparison]:
        """Hold a run's traces against the reference's. `ranks` share the steps among them."""
        share = ranks.index(place.rank), len(ranks)
        reference, run, unclipped = self._read(pair)
        found = compare_run(run, reference, exact=not self.low_precision, share=share)
        if unclipped is not None:
            again = compare_run(unclipped, reference, share=share)
            before = {c.key: c for c in again if c.stage == "gradient" and c.step == 0}
            found = [before.get(c.key, c) for c in found]
        return found

    def explain(
        self,
        place: Place,
        pair: Pair,
        again: str | None,
        compared: Sequence[Comparison],
        facts: Facts,
        sources: Sequence[Sequence[tuple[int, int]]],
    ) -> Finding | None:
        """Seek the cause of a run's first divergence, on this rank alone.

        `again` names the run that shows the inputs of every module; `sources` is `Replay.sources`.
        """
        first = first_divergence(compared)
        if first is None:
            return None
        reference, observed, unclipped = self._read(pair)
        for comparison in compared:
            if comparison.stage == "initial-state":
                # Where plain pieces lie is told by their initial values, as in the comparison itself.
                compare_parameter(comparison.key, observed, reference)
        with place.world(f"{pair.name}-cause", 1):
            run = self._single(place, Variant())
            step = max(first.step, 0)
            batches = {
                rank: torch.load(self._batches(pair.name, rank), weights_only=False) for rank, _ in sources[step]
            }
            tp = observed.parallelism.tp
            given = [
                (rank, m, len(digests(batches[rank][step][m])), batches[rank][step][m]) for rank, m in sources[step]
            ]
            known: dict[int, Sequence[Contribution]] = {}

            def contribute(at: int) -> Sequence[Contribution]:
                if at not in known:
                    known[at] = contributions(run, reference.trace, at, given, lambda rank: rank // tp)
                    restore(run, reference.trace, at)
                return known[at]

            restore(run, reference.trace, step)
            return explain(
                Case(
                    comparisons=compared,
                    first=first,
                    facts=facts,
                    observed=observed,
                    reference=reference,
                    unclipped=unclipped,
                    again=None if again is None else self._run(observed, again),
                    contribute=contribute,
                    probe=Probe(run),
                )
            )

    def pictures(self, place: Place, pair: Pair, chosen: Sequence[Comparison]) -> tuple[Picture, ...]:
        """What is to be kept of a few tensors (`compare.picture.chosen`) when the traces are gone.

        Of gradients of the first step that were looked at before a user's own clipping, that run's.
        """
        del place
        reference, run, unclipped = self._read(pair)
        before = unclipped or run

        def held(c: Comparison) -> list[Part]:
            return parts_held(c.key, before if c.stage == "gradient" and c.step == 0 else run, reference)

        return pictures(chosen, held)

    def invariants(
        self, place: Place, name: str, observed: Observed, shapes: Mapping[str, tuple[int, ...]]
    ) -> list[Seen]:
        """Hold the replicas of a run (`observed.ranks` is filled in here) against each other."""
        del place
        return compare_invariants(self._run(observed, name), shapes)

    def blind(self, place: Place, trusted: str, runs: Mapping[str, Parallelism]) -> tuple[Lesson, dict[str, Counts]]:
        """What the reference had to show, and what each part of the runs' batches counted."""
        del place
        counts = {
            name: counts_of([TraceFile(self.trace(name, rank)) for rank in range(layout.world_size)], layout.tp)
            for name, layout in runs.items()
        }
        return learn(TraceFile(self.trace(trusted, 0)), self.steps, self.dtype), counts

    def _read(self, pair: Pair) -> tuple[Reference, Observed, Observed | None]:
        """The reference, the run, and the run without a user's own clipping, where there is one."""
        trace = TraceFile(self.trace(pair.trusted, 0))
        reference = Reference(trace=trace, floors=pair.floors, parts=pair.parts)
        run = self._run(pair.observed, pair.name)
        return reference, run, None if pair.unclipped is None else self._run(pair.observed, pair.unclipped)

    def _run(self, observed: Observed, name: str) -> Observed:
        return replace(observed, ranks=self._traces(name, observed))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises `TraceError` where the disk does not take what a run shows, with the way out."""
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            # Torch's own writer raises a RuntimeError, whatever it was.
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise
            raise TraceError(
                f"{self.folder}: what a run showed cannot be written: {str(error).splitlines()[0]}; make room there, "
                "or set TMPDIR to a folder on another disk"
            ) from error

    def _traces(self, name: str, observed: Observed) -> list[TraceFile]:
        return [TraceFile(self.trace(name, rank)) for rank in range(observed.parallelism.world_size)]

    def assemble(self, place: Place, name: str, template: str, whole: str, observed: Observed) -> None:
        """Write the whole tensors of a run as the trace `whole`, shaped like the one-device run `template`."""
        del place
        run = replace(observed, ranks=self._traces(name, observed))
        save(self.trace(whole, 0), assemble(TraceFile(self.trace(template, 0)), run))

    def show(self, place: Place, name: str, ranks: Sequence[int]) -> dict[int, tuple[Shown, ...]]:
        """What the given ranks of a run held."""
        del place
        return {rank: shown_by(TraceFile(self.trace(name, rank))) for rank in ranks}

    def facts(self, place: Place, known: PlantingFacts, trusted: str, floors: Mapping[int, float]) -> PlantingFacts:
        """What `known` does not yet hold: what the traces of a run and of its reference say of planted faults."""
        del place
        ranks = [TraceFile(self.trace(known.run, rank)) for rank in range(known.parallelism.world_size)]
        return told_by(known, TraceFile(self.trace(trusted, 0)), floors, ranks)

    def gather(self, place: Place, name: str, size: int) -> None:
        """Bring the files that ranks below `size` wrote for a run to rank 0, which may be on another machine."""
        with place.world(f"{name}-gather", size):
            for rank in range(1, size):
                for path in (self.trace(name, rank), self._batches(name, rank)):
                    if place.rank == rank:
                        send_file(path)
                    elif place.rank == 0:
                        receive_file(path, rank)

    def trace(self, name: str, rank: int) -> Path:
        """Where the trace of a rank lies."""
        return self.folder / f"{name}.{rank}.safetensors"

    def _read_by(self, name: str, rank: int) -> list[list[Batch]] | None:
        """What a rank read in an earlier run; None where its file is on another machine."""
        path = self._batches(name, rank)
        # Written by our own ranks, with whatever types the user's batches have.
        return torch.load(path, weights_only=False) if path.exists() else None

    def _read_before(self, name: str, rank: int, run: TracedRun) -> list[list[Microbatch]]:
        """What a run read, once more: a user's loader may go on where it stood."""
        if self.experiment.batches is None:
            return run.read()
        # Written a moment ago by our own ranks, with whatever types the user's batches have.
        parts = torch.load(self._batches(name, rank), weights_only=False)
        return [[Microbatch(batch, 1 / len(step)) for batch in step] for step in parts[: run.steps]]

    def _batches(self, name: str, rank: int) -> Path:
        return self.folder / f"{name}.{rank}.batches"

    def _settings(self, place: Place) -> Settings:
        return Settings(device=place.device(), dtype=self.dtype, steps=self.steps, shuffle=self.shuffle)

    def _single(self, place: Place, variant: Variant) -> TracedRun:
        # The user's own layout, loader and step are what is under test; the reference uses none of them, unless it
        # is another experiment, whose step is then what is trusted.
        step = None if self.trusted is self.experiment else self.trusted.train_step
        alone = replace(self.trusted, parallelize=None, batches=None, train_step=step, microbatches=1)
        return TracedRun(alone, SINGLE, 0, self._settings(place), variant)

    def _global_batches(self, place: Place, replay: Replay | None) -> list[list[Microbatch]]:
        if replay is None:
            loader = GlobalBatches(
                replace(self.experiment, batches=None), data_ranks=1, microbatches=1, shuffle=self.shuffle
            )
            parts = loader.of_rank(0)
            # A data set that makes its tensors when asked makes them in the run's dtype, here as on every rank.
            with default_dtype(self.dtype):
                seed_everything(self.experiment.seed)
                return [[next(parts)] for _ in range(self.steps)]
        read = {}
        for rank, _ in {source for step in replay.sources for source in step}:
            if rank not in read:
                # Written a moment ago by our own ranks, with whatever types the user's batches have.
                read[rank] = torch.load(self._batches(replay.name, rank), weights_only=False)
        given = [[read[rank][step][m] for rank, m in sources] for step, sources in enumerate(replay.sources)]
        joined = [_joined(own, step) for step, own in enumerate(given)]
        if all(batch is not None for batch in joined):
            return [[Microbatch(batch, 1.0)] for batch in joined]
        # Padded to lengths of their own, they are fed to the one device as they are, one after the other.
        return [[Microbatch(part, len(digests(part)) / _samples(own)) for part in own] for own in given]


def _samples(parts: Sequence[Batch]) -> int:
    return sum(len(digests(part)) for part in parts)


def _joined(parts: list[Batch], step: int) -> Batch | None:
    """One batch out of several, along the first dim; None where their shapes do not allow it.

    Raises `ExperimentError` where they are not built alike.
    """
    flat = [tree_flatten(part) for part in parts]
    if any(spec != flat[0][1] for _, spec in flat):
        raise ExperimentError(f"Experiment.batches: the batches of step {step} are not built alike on all ranks")
    joined = []
    for leaves in zip(*(values for values, _ in flat), strict=True):
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            joined.append(leaves[0])
            continue
        if len({leaf.shape[1:] for leaf in leaves}) > 1 or not all(leaf.dim() for leaf in leaves):
            return None
        joined.append(torch.cat(list(leaves)))
    return tree_unflatten(joined, flat[0][1])


def _first_loss_is_a_number(run: TracedRun) -> None:
    for record, tensor in run.recorder.entries:
        if record.stage == "loss" and record.step == 0 and tensor is not None and not bool(tensor.isfinite().all()):
            raise ExperimentError(
                f"the loss is {tensor.item()} at step 0 on one device already; "
                "check the data, the initial weights and the loss"
            )


def _is_about_shapes(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    inside_forward = any(frame.name == "_call_impl" and "modules" in frame.filename for frame in frames)
    return inside_forward and SHAPES.search(str(error)) is not None


def _cannot_split(parallelism: Parallelism, error: BaseException) -> StrategyError:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename and "shardproof" not in frame.filename]
    at = f"{own[-1].filename}:{own[-1].lineno}" if own else "the model's forward"
    return StrategyError(
        f"{parallelism.strategy}: the model cannot run split over tp={parallelism.tp}: {at}: "
        f"{str(error).splitlines()[0]}; choose a tp that divides its heads and widths, or change the tp_plan"
    )
