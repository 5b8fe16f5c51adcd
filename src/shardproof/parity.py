"""`check`: train an experiment under every strategy, hold each run against one device, and report."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shardproof.errors import ParityError, RankError, StrategyError, UsageError
from shardproof.prove import Prover
from shardproof.ranks import Ranks, start
from shardproof.ranks.forked import ForkedRanks
from shardproof.ranks.launch import ranks_or_launched
from shardproof.ranks.scratch import home_of_sockets, scratch_folder
from shardproof.report.data import Report, Run
from shardproof.report.progress import Progress, Silent
from shardproof.session import Session
from shardproof.spec.experiment import Experiment
from shardproof.spec.parallelism import Parallelism
from shardproof.spec.strategies import fitting, parse
from shardproof.worker import Worker

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
"""What `dtype` takes; the torch dtypes themselves are taken too."""


def check(  # noqa: PLR0913 (one call is the whole interface; its names are those of the command line)
    experiment: Experiment,
    strategies: Sequence[str | Parallelism] | None = None,
    ranks: int | None = None,
    *,
    dtype: str | torch.dtype = "float64",
    device: str = "cpu",
    steps: int | None = None,
    reference: str | Parallelism | Experiment = "single",
    shuffle: bool = False,
    invariants: bool = False,
    timeout_s: float = 600.0,
    show: Sequence[int] = (),
    prove: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Train `experiment` under every strategy and hold each run, tensor by tensor, against one device.

    `strategies` are names (`ddp`), degrees (`tp=2,dp_shard=3`, which bring their own number of ranks) or
    `Parallelism`; all that fit `ranks` if None. `ranks` is the size of the launch under torchrun, else 4, if None.
    `reference` is what is trusted: `single`, another strategy, or another Experiment that is trained on one device
    instead. `show` lists ranks whose tensors the report should hold. `timeout_s` limits each piece of work. `prove`
    plants faults in every run that agrees, one at a time, and reports which of them this check would have caught; it
    changes no verdict. `invariants` trains no reference at all: it holds only what is replicated along a mesh axis
    against itself, bit by bit, which is quick and no proof of parity.

    Raises `UsageError` for wrong use or a broken experiment, `RankError` where a rank failed, died or hung. Under
    torchrun it returns None on every rank but the first.
    """
    if invariants and reference != "single":
        raise UsageError("invariants: replicas are held against each other, so leave reference out")
    if prove and invariants:
        raise UsageError("prove plants faults in a check against the reference, and invariants has none: choose one")
    ranks = ranks_or_launched(ranks)
    layouts, left_out = _layouts(experiment, strategies, ranks)
    if invariants and strategies is None:
        # One rank has no replicas.
        layouts = [layout for layout in layouts if layout.world_size > 1]
    trust = _trust(experiment, reference, ranks)
    size = max(layout.world_size for layout in (*layouts, *([trust] if trust else [])))
    bad = [rank for rank in show if not 0 <= rank < size]
    if bad:
        raise UsageError(f"show {bad[0]}: there are ranks 0 to {size - 1}")
    started = time.perf_counter()
    with scratch_folder() as folder, home_of_sockets(folder):
        worker = Worker(
            experiment=experiment,
            trusted=reference if isinstance(reference, Experiment) else experiment,
            folder=folder,
            dtype=_dtype(dtype),
            steps=_steps(experiment, steps),
            shuffle=shuffle,
        )
        session = Session(
            worker=worker, show=tuple(show), progress=progress or Silent(), trust=trust, invariants=invariants
        )
        work = _Work(
            session=session, pending=list(layouts), left_out=left_out, prove=prove, may_leave_out=strategies is None
        )
        while work.unfinished:
            with start(size, worker, timeout_s=timeout_s, device=device) as pool:
                if not pool.leader:
                    return None  # type: ignore[return-value]  # the leader's report is the only one
                work.go_on(pool)
    return Report(
        experiment=_name(experiment),
        runs=tuple(work.runs),
        ranks=size,
        steps=worker.steps,
        dtype=str(worker.dtype).removeprefix("torch."),
        device=device,
        reference=_said(reference, ranks, invariants=invariants),
        warnings=(*left_out, *(work.blind or ())),
        proofs=work.prover.proofs,
        time_s=time.perf_counter() - started,
    )


@dataclass(kw_only=True)
class _Work:
    """What a check still has to do, over as many pools of ranks as it takes."""

    session: Session
    pending: list[Parallelism]
    left_out: list[str]
    prove: bool
    may_leave_out: bool
    """Whether strategies were not asked for by name, so that they need not fit."""
    runs: list[Run] = field(default_factory=list)
    blind: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        self.prover = Prover(self.session)

    @property
    def unfinished(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self.pending or (self.runs and self.blind is None) or self.prover.unfinished)

    def go_on(self, pool: Ranks) -> None:
        """Work until all is done, or the pool is lost."""
        session = self.session
        session.use(pool)
        try:
            while self.pending:
                self.runs.append((session.check_invariants if session.invariants else session.check)(self.pending[0]))
                self.pending.pop(0)
                if self.prove:
                    self.prover.add(self.runs[-1])
            if self.blind is None:
                # Beside a divergence nobody asks what else could have been found.
                self.blind = session.blind_spots() if all(run.ok for run in self.runs) else ()
            self.prover.work()
        except RankError:
            # The run itself went through: what was found is worth more than the error of its repetition.
            if not session.repeating or not isinstance(pool, ForkedRanks):
                raise
            session.repeating = False
            session.once.add(self.pending[0])
        except StrategyError as error:
            # torchrun's ranks cannot be started anew.
            if not self.may_leave_out or not isinstance(pool, ForkedRanks):
                raise
            self.left_out.append(f"left out: {error}")
            self.pending.pop(0)


def assert_parity(experiment: Experiment, *args: Any, **options: Any) -> None:
    """`check`, and raise `ParityError` (an AssertionError whose text is the report) unless every strategy agrees.

    Takes the arguments of `check`, and raises what that raises. `ParityError.report` is the report as data. Warns where
    nothing was found, but no gradient and no updated weight could be compared either.
    """
    __tracebackhide__ = True  # pytest then shows the test's line and the report
    report = check(experiment, *args, **options)
    if report is None:
        return
    if not report.ok:
        raise ParityError(report)
    if not report.proven:
        warnings.warn(str(report).splitlines()[-1], stacklevel=2)


def _layouts(
    experiment: Experiment, strategies: Sequence[str | Parallelism] | None, ranks: int
) -> tuple[list[Parallelism], list[str]]:
    """The layouts to check; and, where none were named, why some of those that fit the ranks are left out."""
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
        raise StrategyError(f"ranks={ranks!r}: a number of ranks is a whole number of at least 1")
    if isinstance(strategies, str):
        raise StrategyError(f"strategies={strategies!r} is one text; give a sequence, as ({strategies!r},)")
    if strategies is not None:
        layouts = [parse(strategy, ranks) for strategy in strategies]
        if not layouts:
            raise StrategyError("no strategy to check; name at least one, as ddp")
        return layouts, []
    with_tp = bool(experiment.tp_plan) or experiment.parallelize is not None
    fit = [parse(name, ranks) for name in fitting(ranks, tp=with_tp)]
    left_out = [] if with_tp else ["left out: all strategies with tp, as Experiment.tp_plan is empty"]
    layouts = []
    for layout in fit:
        parts = layout.dp * experiment.microbatches
        if experiment.batches is None and experiment.batch_size % parts:
            left_out.append(
                f"left out: {layout.strategy}: batch_size {experiment.batch_size} does not divide into {parts} parts"
            )
        else:
            layouts.append(layout)
    return layouts, left_out


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _steps(experiment: Experiment, steps: int | None) -> int:
    steps = experiment.steps if steps is None else steps
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise UsageError(f"steps={steps!r}: a number of steps is a whole number of at least 1")
    return steps


def _trust(experiment: Experiment, reference: str | Experiment | Parallelism, ranks: int) -> Parallelism | None:
    """The layout to be trusted, None for one device."""
    if isinstance(reference, Experiment):
        return None
    layout = parse(reference, ranks)
    if layout.tp > 1 and not experiment.tp_plan and experiment.parallelize is None:
        raise StrategyError(f"reference {layout.strategy}: tensor parallelism needs Experiment.tp_plan or parallelize")
    return None if layout.world_size == 1 else layout


def _said(reference: str | Parallelism | Experiment, ranks: int, *, invariants: bool) -> str:
    if invariants:
        return "its replicas"
    if isinstance(reference, Experiment):
        return f"single, of {_name(reference)}"
    return parse(reference, ranks).strategy


def _name(experiment: Experiment) -> str:
    name = str(getattr(experiment.model, "__qualname__", None) or type(experiment.model).__name__)
    code = getattr(experiment.model, "__code__", None)
    # A lambda says where it stands, as its name says nothing.
    return f"{Path(code.co_filename).name}:{code.co_firstlineno}" if name.endswith("<lambda>") and code else name
