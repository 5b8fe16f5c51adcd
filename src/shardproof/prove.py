"""Plant faults in runs that agreed with the reference, one at a time, and see which of them the check would catch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shardproof.compare.verdict import Comparison, Verdict
from shardproof.errors import RankError, ShardproofError, UsageError
from shardproof.ranks.forked import ForkedRanks
from shardproof.report import spelling
from shardproof.report.data import Planted, Proof, Run
from shardproof.report.progress import Silent
from shardproof.session import Done, Session
from shardproof.train.faults.facts import Facts
from shardproof.train.faults.fault import Fault
from shardproof.train.faults.table import FAULTS
from shardproof.train.run import Variant

ENDED = "not tried: an earlier fault ended the ranks, and those of torchrun cannot be started anew"


@dataclass
class Task:
    """The faults that are still to be planted under one strategy, and what became of the others."""

    run: Run
    right: Done
    facts: Facts
    waiting: list[Fault]
    planted: list[Planted] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass
class Prover:
    """All strategies of a check: `add` each that agrees, then `work` until nothing is `unfinished`."""

    session: Session
    _tasks: list[Task] = field(default_factory=list)

    def add(self, run: Run) -> None:
        """Find the faults that fit the run that was just checked; one that diverges proves itself."""
        right = self.session.last
        if not run.ok or right is None:
            return
        facts = self._facts(right)
        task = Task(run=run, right=right, facts=facts, waiting=[])
        for kind in FAULTS:
            fit: Sequence[Fault] | str = kind.plan(facts)
            if isinstance(fit, str):
                task.left_out[kind.name] = fit
            else:
                task.waiting.extend(fit)
        self._tasks.append(task)

    @property
    def unfinished(self) -> bool:
        """Whether there are faults that have not been planted."""
        return any(task.waiting for task in self._tasks)

    @property
    def proofs(self) -> tuple[Proof, ...]:
        """What was found, one for each strategy that agreed."""
        return tuple(
            Proof(strategy=task.run.strategy, planted=tuple(task.planted), left_out=task.left_out)
            for task in self._tasks
        )

    def work(self) -> None:
        """Plant what is waiting, until all is done or the ranks are lost: a fault that ends them is caught by that."""
        session = self.session
        progress, session.progress = session.progress, Silent()
        # What user code prints was shown once, by the run without a fault.
        shown, session.ranks.on_output = session.ranks.on_output, lambda _line: None
        try:
            for task in self._tasks:
                total = len(task.planted) + len(task.waiting)
                while task.waiting:
                    fault = task.waiting[0]
                    progress.starting(f"{task.run.strategy}: fault {len(task.planted) + 1} of {total}: {fault.name}")
                    outcome = self._plant(fault, task)
                    task.waiting.pop(0)
                    if isinstance(outcome, str):
                        task.left_out.setdefault(fault.name, outcome)
                    else:
                        task.planted.append(outcome)
                    if isinstance(outcome, Planted) and outcome.stopped:
                        self._lost()
                        return
        finally:
            session.progress, session.ranks.on_output = progress, shown

    def _lost(self) -> None:
        if isinstance(self.session.ranks, ForkedRanks):
            return
        for task in self._tasks:
            task.left_out.update({fault.name: ENDED for fault in task.waiting})
            task.waiting.clear()

    def _plant(self, fault: Fault, task: Task) -> Planted | str:
        """What became of one fault; why it could not be planted where it was never at work."""
        known: dict[str, Any] = {"fault": fault.name, "place": fault.place}
        try:
            run, planted = self._run(fault, task, steps=fault.steps)
            # What does not show at once may show later on.
            if not _catches(run) and fault.steps is not None and fault.steps < task.facts.steps:
                run, planted = self._run(fault, task, steps=None)
        except RankError as error:
            return Planted(**known, caught=True, stopped=True, reason=f"the run stopped: {_line(error)}")
        except ShardproofError as error:
            return Planted(**known, caught=True, reason=f"the check ended: {_line(error)}")
        if _catches(run):
            return Planted(**known, caught=True, **_seen(run))
        hidden = fault.reason(task.facts)
        if not planted and not hidden:
            return f"could not be planted at {fault.place}: the run never came by there"
        return Planted(**known, caught=False, reason=hidden or _unseen(fault, task.run, run))

    def _run(self, fault: Fault, task: Task, *, steps: int | None) -> tuple[Run, int]:
        # A reference that was fed parts has them numbered over all steps.
        steps = None if task.right.trusted.by_parts else steps
        run = self.session.check(task.right.layout, Variant(fault=fault, steps=steps), right=task.right)
        done = self.session.last
        if done is None:
            raise UsageError("a run that was checked is not known")
        for path in self.session.worker.folder.glob(f"{done.name}[.-]*"):
            path.unlink()
        return run, sum(summary.planted for summary in done.summaries.values())

    def _facts(self, right: Done) -> Facts:
        worker, layout = self.session.worker, right.layout
        known = Facts(
            run=right.name,
            parallelism=layout,
            steps=worker.steps,
            microbatches=worker.experiment.microbatches,
            seed=worker.experiment.seed,
            max_grad_norm=worker.experiment.max_grad_norm,
            batch_split_over_tp=right.reads.split_over_tp,
            reads=tuple(right.summaries[rank].reads for rank in range(layout.world_size)),
            pieces=tuple(right.summaries[rank].pieces for rank in range(layout.world_size)),
        )
        during = f"planning the faults of {layout.strategy}"
        trusted = right.trusted
        found: Facts = self.session.ranks.call("facts", known, trusted.name, trusted.floors, ranks=[0], during=during)[
            0
        ]
        return found


def _catches(run: Run) -> bool:
    return bool(run.findings) or bool(run.verdicts[Verdict.DIFFERENT])


def _seen(run: Run) -> dict[str, Any]:
    if run.findings:
        found = run.findings[0]
        return {"cause": found.cause, "stage": found.stage, "where": found.where, "step": found.step}
    first = next(c for c in run.comparisons if c.verdict is Verdict.DIFFERENT)
    return {"cause": "unexplained", "stage": first.stage, "where": first.name, "step": first.step}


def _unseen(fault: Fault, right: Run, run: Run) -> str:
    """Why nothing was seen, where mathematics is no reason: nobody looked, or rounding is larger."""
    own = [c for c in right.comparisons if c.stage == fault.stage]
    if own and all(c.verdict is Verdict.NOT_CHECKED for c in own):
        return f"no {fault.stage} tensor is checked here: {own[0].reason}"
    if not own:
        return f"this run shows no {fault.stage} tensor"
    worst = _worst([c for c in run.comparisons if c.stage == fault.stage]) or run.worst
    if worst is None:
        return "every tensor that is compared has the very same bits"
    where = spelling.tensor(worst.stage, worst.name, worst.part)
    return f"the difference lies inside the noise floor: at most {spelling.floors(worst.floors)} ({where})"


def _worst(comparisons: Sequence[Comparison]) -> Comparison | None:
    moved = [c for c in comparisons if c.verdict is Verdict.ROUNDING]
    return max(moved, key=lambda c: c.floors, default=None)


def _line(error: Exception) -> str:
    return str(error).splitlines()[0]
