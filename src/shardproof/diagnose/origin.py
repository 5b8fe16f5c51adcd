"""Its own error, or one it was handed: modules on one device, fed what the run itself fed them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardproof.compare.activations import Cell, best_fit, cells_of
from shardproof.compare.layouts import joined, split_dim
from shardproof.compare.measure import scale, wide
from shardproof.compare.nested import put
from shardproof.compare.verdict import Comparison, Verdict
from shardproof.diagnose.case import Case
from shardproof.parallel.names import ROOT

Fed = tuple[Cell, Tensor, int]
"""What the peers of a data rank showed as output, their input put together, and which call that was."""


def fed(name: str, case: Case) -> list[Fed]:
    """The inputs that the run gave to a module in the step of the first divergence; empty where they are not known."""
    again = case.again
    if again is None:
        return []
    step = case.first.step
    inputs = sorted({key for trace in again.ranks for key in trace.by_key if key[:3] == (step, "input", name)})
    outputs = [key for key in again.ranks[0].by_key if key[:3] == (step, "forward", name)]
    if len(inputs) != 1 or len(outputs) != 1:
        return []
    calls = case.reference.calls(step, len(case.reference.tensors(outputs[0])))
    given, problem = cells_of(inputs[0], again, calls=max(calls, 1))
    shown, other = cells_of(outputs[0], again, calls=max(calls, 1))
    if problem or other or len(given) != len(shown):
        return []
    whole = [
        (cell, together(source, _like(cell, case, outputs[0])), cell.call)
        for source, cell in zip(given, shown, strict=True)
    ]
    return [(cell, value, call) for cell, value, call in whole if value is not None]


def _like(cell: Cell, case: Case, key: tuple[int, str, str, str]) -> int:
    """Tokens (or whatever dim 1 counts) that a whole output of the cell's part of the batch has; 0 if unknown."""
    whole = case.reference.tensors(key)
    return whole[cell.call].shape[1] if cell.call < len(whole) and whole[cell.call].dim() > 2 else 0


def around(name: str) -> list[str]:
    """The module and those that hold it, from the inside out; last the model itself."""
    names = [name]
    while "." in names[-1]:
        names.append(names[-1].rpartition(".")[0])
    return names if names[-1] == ROOT else [*names, ROOT]


def together(cell: Cell, length: int) -> Tensor | None:
    """The one tensor that the peers' tensors make up."""
    tensors = list(cell.tensors)
    pieces = [record.piece for record in cell.records]
    if any(piece is not None for piece in pieces):
        first = pieces[0]
        if first is None:
            return None
        whole = torch.zeros(first.whole, dtype=tensors[0].dtype)
        for piece, tensor in zip(pieces, tensors, strict=True):
            if piece is None or piece.whole != first.whole or piece.pending:
                return None
            put(whole, piece, tensor)
        return whole
    same = all(t.shape == tensors[0].shape and torch.equal(t, tensors[0]) for t in tensors)
    if same or len(tensors) == 1:
        return tensors[0]
    if length and tensors[0].dim() > 1 and sum(t.shape[1] for t in tensors) == length:
        return torch.cat(tensors, 1)
    if len({t.shape for t in tensors}) == 1 and tensors[0].is_floating_point():
        # Copies that differ in their last bits only.
        near = max(float((wide(t) - wide(tensors[0])).abs().max()) for t in tensors)
        if near <= 1e-6 * scale(tensors[0]):
            return tensors[0]
    size = [*tensors[0].shape]
    size[-1] = sum(t.shape[-1] for t in tensors)
    dim = split_dim(tensors, tuple(size))
    return None if dim is None else joined(tensors, size[dim], dim)


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where the error of a step comes from."""

    own: tuple[str, ...]
    """Modules that give another output on one device, fed what this run fed them."""
    inherited: tuple[str, ...]
    """Modules that give the same: their error was handed to them."""


def of_outputs(case: Case) -> Origin:
    """Sort the modules whose outputs differ in the step of the first divergence."""
    own: list[str] = []
    inherited: list[str] = []
    wrong = [c for c in case.comparisons if c.step == case.first.step and c.stage == "forward"]
    for comparison in wrong:
        if comparison.verdict is Verdict.DIFFERENT:
            same = follows(comparison, case)
            if same is not None:
                (inherited if same else own).append(comparison.name)
    return Origin(own=tuple(dict.fromkeys(own)), inherited=tuple(dict.fromkeys(inherited)))


def follows(comparison: Comparison, case: Case) -> bool | None:
    """Whether a module's output is what one device makes of the run's own input; None where that cannot be told."""
    probe, shown = case.probe, fed(comparison.name, case)
    if probe is None or not shown:
        return None
    for cell, given, _ in shown:
        answer = probe.ask(comparison.name, given)
        if answer is None:
            return None
        # Noise grows with the size of what is computed.
        grown = max(scale(answer.output) / max(scale(cell.tensors[0]), 1e-300), 1.0)
        fit = best_fit(cell, answer.output, comparison.floor * min(grown, 1e3) * 4, (0, 1, 1))
        if fit is None:
            return None
        if fit.outcome.verdict is Verdict.DIFFERENT:
            return False
    return True


def senders(case: Case) -> Sequence[tuple[str, Tensor, Tensor]]:
    """Modules whose input gradient is not what one device makes of the run's own input and output gradient.

    (name, this run's gradient of the input summed over the peers, one device's), in the order of the backward pass.
    """
    again, probe, step = case.again, case.probe, case.first.step
    if again is None or probe is None:
        return []
    found = []
    names = [key[2] for key in again.ranks[0].by_key if key[:2] == (step, "input-gradient")]
    for name in dict.fromkeys(names):
        wrong = _sent(name, case)
        if wrong is not None:
            found.append((name, *wrong))
    return found


def _sent(name: str, case: Case) -> tuple[Tensor, Tensor] | None:
    again, probe, step = case.again, case.probe, case.first.step
    if again is None or probe is None:
        return None
    shown = fed(name, case)
    calls = 1
    sent, problem = cells_of((step, "input-gradient", name, ""), again, calls=calls)
    outgoing = [key for key in again.ranks[0].by_key if key[:3] == (step, "backward", name)]
    if problem or len(outgoing) != 1 or len(shown) != len(sent):
        return None
    incoming, other = cells_of(outgoing[0], again, calls=calls)
    if other or len(incoming) != len(sent):
        return None
    for (_, given, _), arriving, leaving in zip(shown, incoming, sent, strict=True):
        gradient = together(arriving, given.shape[1] if given.dim() > 2 else 0)
        answer = None if gradient is None else probe.ask(name, given, gradient)
        if answer is None or answer.input_gradient is None:
            return None
        want = answer.input_gradient
        floor = 1e-12 * scale(want) if want.dtype == torch.float64 else 1e-5 * scale(want)
        fit = best_fit(leaving, want, floor, (0, 1, 1))
        if fit is None:
            return None
        if fit.outcome.verdict is Verdict.DIFFERENT or "partial sums" in fit.layout:
            total = (
                torch.stack([wide(t) for t in leaving.tensors]).sum(0)
                if len({t.shape for t in leaving.tensors}) == 1
                else want
            )
            return total, want
    return None
