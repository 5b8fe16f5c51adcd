"""Right inputs, wrong attention: positions that start anew on each rank, or arithmetic over split keys."""

from __future__ import annotations

import torch

from shardproof.compare.activations import aligned, best_fit
from shardproof.compare.measure import largest, wide
from shardproof.compare.verdict import Verdict
from shardproof.diagnose.case import Case, Diagnosis
from shardproof.diagnose.origin import around, fed, follows, senders
from shardproof.parallel.names import ROOT

POSITIONS_FIX = (
    "number positions by the rank's place in the sequence: offset each rank's positions by the tokens before it"
)
ATTENTION_FIX = (
    "merge partial attention over ranks with its log-sum-exp, forward and backward, and send each key and value the "
    "gradients of all queries"
)


def positions(case: Case) -> Diagnosis | None:
    """Every shard of the sequence is numbered from 0."""
    if case.facts.parallelism.tp == 1:
        return None
    shown = aligned(case.first.key, case.observed, case.reference)
    sliced = [one for one in shown if one.dim is not None and 0 <= one.dim < one.part.dim() - 1]
    floor = 6 * case.first.floor
    if sliced:
        starts = {one.cell.data_rank: one for one in reversed(sliced)}
        again = [
            one.got.shape == (first := starts[one.cell.data_rank]).want.shape
            and largest((one.got - first.want).abs()) <= floor
            for one in sliced
        ]
        if all(again) and case.fits("each rank's slice is that of the first rank", 0.0):
            return Diagnosis(
                cause="positions",
                axis="tp",
                evidence=f"every rank of a tp group shows the first slice of {case.first.name}: positions start anew "
                "on each rank",
                fix=POSITIONS_FIX,
            )
    return _restarted(case)


def _restarted(case: Case) -> Diagnosis | None:
    """One device gives what the run gives, once its own positions start anew after each slice."""
    probe, tp = case.probe, case.facts.parallelism.tp
    if probe is None:
        return None
    for name in around(case.first.name):
        shown = fed(name, case)
        if not shown:
            continue
        right = []
        for cell, given, _ in shown:
            length = given.shape[1] if given.dim() > 1 else 0
            with _RestartedPositions(length, tp) as mode:
                answer = probe.ask(name, given)
            if answer is None or not mode.used:
                break
            fit = best_fit(cell, answer.output, case.first.floor * 4, (0, 1, 1))
            right.append(fit is not None and fit.outcome.verdict is not Verdict.DIFFERENT)
        if right and all(right) and case.fits("positions that start anew on each rank", 0.0):
            return Diagnosis(
                cause="positions",
                axis="tp",
                evidence=f"with positions that start anew after each of {tp} slices of the sequence, one device gives "
                f"what this run gives in {name}",
                fix=POSITIONS_FIX,
            )
    return None


class _RestartedPositions(torch.overrides.TorchFunctionMode):
    """`torch.arange` over the whole sequence counts each slice from 0."""

    def __init__(self, length: int, parts: int) -> None:
        super().__init__()
        self.length, self.parts, self.used = length, parts, False

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        del types
        made = func(*args, **(kwargs or {}))
        if func is torch.arange and self.parts and made.shape == (self.length,) and self.length % self.parts == 0:
            self.used = True
            return made % (self.length // self.parts)
        return made


def _attends(name: str, case: Case) -> bool:
    shown = fed(name, case)
    return case.probe is not None and bool(shown) and case.probe.computes_attention(name, shown[0][1])


def forward(case: Case) -> Diagnosis | None:
    """A module that computes attention itself gives another output for the run's own, right input."""
    probe = case.probe
    if probe is None:
        return None
    if follows(case.first, case) is False and not _attends(case.first.name, case):
        # Fed its own input it gives another output, and computes no attention: the fault is its own.
        return None
    for name in around(case.first.name)[:2]:
        shown = fed(name, case)
        if name == ROOT or not shown or not probe.computes_attention(name, shown[0][1]):
            continue
        cell, given, _ = shown[0]
        answer = probe.ask(name, given)
        if answer is None or answer.output.dim() < 2:
            continue
        fit = best_fit(cell, answer.output, case.first.floor * 4, (0, 1, 1))
        if fit is None or fit.outcome.verdict is not Verdict.DIFFERENT:
            continue
        case.fits(f"{name} computes attention, and gives another output for its own input", 0.0)
        return Diagnosis(
            cause="attention-math",
            axis="tp" if case.facts.parallelism.tp > 1 else None,
            evidence=f"{name}, fed this run's own input, gives another output on one device: {fit.outcome.error:.3g} "
            "apart; no sum, bias, permutation or shift of positions explains it, and the module computes attention",
            fix=ATTENTION_FIX,
        )
    return None


def backward(case: Case) -> Diagnosis | None:
    """The forward pass is right, and attention sends back a wrong gradient."""
    probe = case.probe
    if probe is None or case.first.stage not in ("gradient", "backward"):
        return None
    for name, got, want in senders(case)[:1]:
        shown = fed(name, case)
        if not shown or not probe.computes_attention(name, shown[0][1]):
            return None
        far = largest((wide(got) - wide(want)).abs()) if got.shape == want.shape else float("inf")
        case.fits(f"{name} computes attention, and sends back another gradient", 0.0)
        return Diagnosis(
            cause="attention-math",
            axis="tp" if case.facts.parallelism.tp > 1 else None,
            evidence=f"the forward pass is right, and the gradient of {name}'s input is not what one device makes of "
            f"the run's own input and output gradient: {far:.3g} apart; the module computes attention",
            fix=ATTENTION_FIX,
        )
    return None
