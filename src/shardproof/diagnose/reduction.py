"""Gradients as combinations of contributions: the coefficients name what went wrong with their reduction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from shardproof.compare.measure import MULTIPLE
from shardproof.compare.verdict import Comparison
from shardproof.diagnose.case import Case, Diagnosis
from shardproof.diagnose.coefficients import Fitted, fitted, mixed_pieces
from shardproof.diagnose.factors import axes_of, axis_name
from shardproof.diagnose.sums import COMBINATION, DATA, not_reduced_fix
from shardproof.spec.parallelism import AXES

TENSORS = 6
"""Other wrong gradients that are looked at, where a part of them alone fits."""

RELATIVE = 1e-8
"""Of the error: what a combination may leave unexplained beyond rounding, as its basis was rounded otherwise."""


def combined(case: Case) -> Diagnosis | None:
    """The gradients are another combination of the right contributions than they should be."""
    for wrong in _sets(case):
        found = fitted(case, wrong)
        if found is None:
            continue
        size = max((c.error / c.floor for c in wrong if c.floor > 0 and math.isfinite(c.error)), default=0.0)
        limit = max(MULTIPLE, RELATIVE * size)
        if case.fits(f"{COMBINATION} {len(found.parts)} contributions", found.residual, limit=limit):
            others = [c for c in case.wrong if c not in wrong][:TENSORS]
            elsewhere = (mixed(replace(case, first=other)) for other in others)
            pattern = _Pattern.of(case, found)
            return next((d for d in elsewhere if d is not None), None) or pattern.diagnosis() or pattern.as_it_is()
    return None


def mixed(case: Case) -> Diagnosis | None:
    """Pieces that different ranks hold were added up as if they were copies of one."""
    found = mixed_pieces(case)
    if found is None:
        return None
    sources = {rank: {other for other, c in columns if abs(c) > 1e-6} for rank, columns in found.items()}
    if all(len(others) == 1 for others in sources.values()):
        other = {rank: next(iter(others)) for rank, others in sources.items()}
        places = {share.rank: share.place for share in case.shares(case.first)}
        if all(places[rank] == places[held] for rank, held in other.items()):
            return None
        moved = [
            f"rank {rank} holds that of rank {held}" for rank, held in other.items() if places[rank] != places[held]
        ]
        return Diagnosis(
            cause="layout-permuted",
            axis="tp" if case.facts.parallelism.tp > 1 else "dp",
            evidence=f"of {case.first.name} {'; '.join(moved[:4])}: right gradients of other ranks' pieces",
            fix="hand every rank the gradient of its own piece: cut and gather gradients in the order of the pieces",
        )
    if any(not others for others in sources.values()):
        return None
    said = []
    for rank, columns in list(found.items())[:4]:
        others = sorted({other for other, c in columns if abs(c) > 1e-6})
        said.append(f"rank {rank} holds a mix of the pieces of ranks {', '.join(map(str, others))}")
    return Diagnosis(
        cause="wrong-group",
        axis="tp" if case.facts.parallelism.tp > 1 else "dp",
        evidence=f"{'; '.join(said)} of {case.first.name}: pieces that lie in different places were reduced with each "
        "other",
        fix="reduce each shard over the ranks that hold the same shard, and over no others: the group of a mesh axis, "
        "as mesh['dp'] or mesh['dp_replicate']",
    )


def _sets(case: Case) -> list[list[Comparison]]:
    """All wrong gradients; those of the first one's module; the first alone."""
    prefix = case.first.name.rpartition(".")[0]
    module = [c for c in case.wrong if c.name.rpartition(".")[0] == prefix]
    sets = [list(case.wrong), module, [case.first]]
    if case.probe is None:
        # From recordings alone, of some gradients the contributions are known and of others they are not.
        known = {name for part in case.contributions for name in part.gradients}
        sets.insert(1, [c for c in case.wrong if c.name in known])
        sets = [s for s in sets if s]
    return [s for number, s in enumerate(sets) if s not in sets[:number]]


@dataclass(frozen=True, kw_only=True)
class _Pattern:
    """The coefficients of every rank as a table: readers of data down, micro-batches across."""

    case: Case
    found: Fitted
    readers: list[int]
    microbatches: list[int]
    tables: dict[int, Tensor]
    """Rank -> `(readers, microbatches)`, NaN where a reader has no such part."""
    expected: Tensor
    """The same for the right shares."""
    tolerance: Tensor

    @classmethod
    def of(cls, case: Case, found: Fitted) -> _Pattern:
        readers = sorted({part.reader for part in found.parts})
        microbatches = sorted({part.microbatch for part in found.parts})

        def table(values: Tensor) -> Tensor:
            made = torch.full((len(readers), len(microbatches)), math.nan, dtype=torch.float64)
            for part, value in zip(found.parts, values, strict=True):
                made[readers.index(part.reader), microbatches.index(part.microbatch)] = value
            return made

        return cls(
            case=case,
            found=found,
            readers=readers,
            microbatches=microbatches,
            tables={rank: table(values) for rank, values in found.of_rank.items()},
            expected=table(found.expected),
            tolerance=table(found.tolerance),
        )

    def diagnosis(self) -> Diagnosis | None:
        """The cause that the table names."""
        support = {
            (rank, m): frozenset(
                reader for d, reader in enumerate(self.readers) if not self._zero(table[d, m], self.tolerance[d, m])
            )
            for rank, table in self.tables.items()
            for m in range(len(self.microbatches))
        }
        everybody = {
            m: frozenset(r for d, r in enumerate(self.readers) if not math.isnan(float(self.expected[d, m])))
            for m in range(len(self.microbatches))
        }
        full = {key: found == everybody[key[1]] for key, found in support.items()}
        empty = {key: not found for key, found in support.items()}
        if all(full[key] or empty[key] for key in support):
            return self._agreeing()
        axes = self._group_axes(support, everybody)
        if any(axes[key] is None for key in support if not full[key] and not empty[key]):
            return self._wrong_group(support)
        partly = [key for key in support if not full[key] and not empty[key]]
        if any(full[key] for key in support):
            behind = {rank for rank, _ in partly}
            if all((rank, m) in partly or empty[rank, m] for rank in behind for m in range(len(self.microbatches))):
                return self._some_ranks(axes[partly[0]] or (), sorted(behind))
            return self._partly(partly)
        return self._own_group(axes[partly[0]] or ())

    def as_it_is(self) -> Diagnosis:
        """The coefficients alone, where they follow no rule that has a name."""
        said = []
        for rank, table in list(self.tables.items())[:4]:
            values = [0.0 if abs(float(v)) <= 1e-9 else float(v) for v in table.flatten() if not math.isnan(float(v))]
            said.append(f"rank {rank}: {', '.join(f'{value:.4g}' for value in values[:8])}")
        return Diagnosis(
            cause="unexplained",
            evidence=f"{self._whose()} are combinations of what the parts of the batch contribute, of which they hold, "
            f"times the right share, by reader and micro-batch: {'; '.join(said)}",
            fix="look at how each rank weights and reduces these gradients",
        )

    # Every rank holds something of everybody.

    def _agreeing(self) -> Diagnosis | None:
        tables = list(self.tables.values())
        agree = all(self._equal(table, tables[0]) for table in tables)
        mean = self._mean_of_means(tables) if agree else None
        if mean is not None:
            return mean
        columns = [self._column_values(table) for table in tables]
        if any(values is None for values in columns):
            # Shares that depend on the data rank, and follow no rule that is known here.
            return None
        known = torch.stack([values for values in columns if values is not None])  # (ranks, microbatches)
        spread = self._largest_tolerance() * 4
        if bool(((known - known[:1]).abs() > spread).any()):
            return None
        weights = known[0]
        if bool(((weights - weights[0]).abs() <= spread).all()):
            return self._one_factor(float(weights[0]))
        return self._misweighted(weights, spread)

    def _one_factor(self, factor: float) -> Diagnosis | None:
        if abs(factor - 1) <= self._largest_tolerance() * 4:
            return None
        everything = len(self.found.names) == len(self.case.stage)
        return Diagnosis(
            cause="grad-scale" if everything else "grad-scale-subset",
            axis=axes_of(factor, self.case.facts.parallelism, self.case.facts.microbatches),
            factor=factor,
            evidence=f"{self._whose()} are {factor:.6g} times the right combination of contributions",
            fix="scale once: divide by the number of data ranks and of micro-batches, and by nothing else",
        )

    def _misweighted(self, weights: Tensor, spread: float) -> Diagnosis:
        lost = [m for m, w in zip(self.microbatches, weights, strict=True) if abs(float(w)) <= spread]
        shown = [0.0 if abs(float(w)) <= spread else float(w) for w in weights]
        said = f"micro-batches {', '.join(f'{w:.4g}' for w in shown)} times their right share"
        ratios = weights[1:] / weights[:-1]
        if lost:
            said += f": nothing of micro-batch {', '.join(map(str, lost))} (of {len(weights)}) is left"
        elif len(ratios) > 1 and bool(((ratios - ratios[0]).abs() <= 10 * spread * ratios.abs()).all()):
            said += f": each counts {float(ratios[0]):.4g} times as much as the one before, as what is scaled again at "
            said += "every micro-batch"
        return Diagnosis(
            cause="microbatch-misweighted",
            axis="micro-batch",
            evidence=f"all ranks agree, and {self._whose()} count {said}",
            fix="add every micro-batch's gradient once, with its share of the batch: scale losses before backward, or "
            "the sum once at the end; zero_grad before the first, synchronise with the last",
        )

    def _mean_of_means(self, tables: Sequence[Tensor]) -> Diagnosis | None:
        """Equal shares where the parts count unequally."""
        counts = self.expected
        known = torch.where(counts.isnan(), 0.0, counts)
        if self._close(counts, known.sum() / (~counts.isnan()).sum()):
            return None
        raw = tables[0] * counts
        rows, columns = known.sum(1, keepdim=True), known.sum(0, keepdim=True)
        rules = {
            "each part's own mean counts alike": (
                "dp" if len(self.readers) > 1 else "micro-batch",
                torch.ones_like(counts),
            ),
            "each rank's own mean counts alike": ("dp", counts / rows),
            "each micro-batch's own mean counts alike": ("micro-batch", counts / columns),
        }
        for rule, (axis, shape) in rules.items():
            scaled = raw / shape
            if self._close(scaled, scaled.nanmean()) and float(scaled.nanmean()) > 0:
                low, high = float(known[known > 0].min()), float(known.max())
                data = "dp_replicate" if self.case.facts.parallelism.dp_replicate > 1 else "dp_shard"
                name = axis_name(DATA, self.case.facts.parallelism) or data if axis == "dp" else axis
                return Diagnosis(
                    cause="mean-of-means",
                    axis=name,
                    evidence=f"{rule}, though the parts hold {low:.3g} to {high:.3g} of what the loss counts: "
                    f"{self._whose()} are the mean of means",
                    fix="divide by the count of the whole batch: return sp.LossSum(total, count), or sum losses and "
                    "counts over ranks and micro-batches and divide once",
                )
        return None

    # A rank holds more of some than of others.

    def _own_group(self, axes: Sequence[str]) -> Diagnosis:
        """Every rank holds the contributions of a group of its own."""
        missing = [a for a in DATA if a not in axes and getattr(self.case.facts.parallelism, a) > 1]
        name = axis_name(missing, self.case.facts.parallelism) or "dp"
        tables = list(self.tables.values())
        held = [torch.where(table.isnan(), 0.0, table) for table in tables]
        kept = all(
            bool(
                ((table - 1).abs() <= self._largest_tolerance() * 4)[table.abs() > self._largest_tolerance() * 4].all()
            )
            for table in held
        )
        own = f"of the ranks along {axis_name(axes, self.case.facts.parallelism)}" if axes else "it read itself"
        if kept:
            return Diagnosis(
                cause="grad-not-summed",
                axis=name,
                evidence=f"each rank holds the share of the samples {own} alone, already divided for the whole batch, "
                f"in {self._whose()}; only their sum over {name} is the reference's",
                fix=f"sum this gradient over {name}: the division for the whole batch was done, the reduction was not",
            )
        return Diagnosis(
            cause="grad-not-reduced",
            axis=name,
            evidence=f"each rank holds the gradients of the samples {own} alone, and nothing of the other ranks "
            f"along {name}, in {self._whose()}",
            fix=not_reduced_fix(name),
        )

    def _some_ranks(self, axes: Sequence[str], behind: Sequence[int]) -> Diagnosis:
        """Some ranks hold what everybody's samples give, and others only their own, in every micro-batch."""
        missing = [a for a in DATA if a not in axes and getattr(self.case.facts.parallelism, a) > 1]
        name = axis_name(missing, self.case.facts.parallelism) or "dp"
        right = sorted(set(self.tables) - set(behind))
        return Diagnosis(
            cause="grad-not-reduced",
            axis=name,
            evidence=f"in {self._whose()} rank {', '.join(map(str, right))} holds the reduction over {name}, and rank "
            f"{', '.join(map(str, behind))} nothing but the gradients of its own samples: it was not given the result",
            fix="use all_reduce and not reduce, so that every data rank gets the reduced gradient",
            ranks=tuple(behind),
        )

    def _partly(self, partly: Sequence[tuple[int, int]]) -> Diagnosis:
        local = sorted({self.microbatches[m] for _, m in partly})
        shared = [m for m in self.microbatches if m not in local]
        return Diagnosis(
            cause="grad-partly-reduced",
            axis="micro-batch",
            evidence=f"in {self._whose()} micro-batch {', '.join(map(str, shared))} was reduced over the data ranks, "
            f"and of micro-batch {', '.join(map(str, local))} each rank holds its own alone",
            fix="accumulate without synchronisation and synchronise in the last micro-batch, so that all that was "
            "accumulated is reduced: no_sync for all but the last",
        )

    def _wrong_group(self, support: dict[tuple[int, int], frozenset[int]]) -> Diagnosis:
        said = "; ".join(
            f"rank {rank} holds those of {', '.join(map(str, sorted(found))) or 'nobody'}"
            for (rank, m), found in list(support.items())
            if m == 0
        )
        return Diagnosis(
            cause="wrong-group",
            axis=axis_name(DATA, self.case.facts.parallelism) or None,
            evidence=f"{self._whose()} are made from the samples of the wrong ranks: {said}",
            fix="reduce over the process group of the data axes, mesh['dp'].get_group(), and see that every data rank "
            "is in it, once",
        )

    # Measures.

    def _group_axes(
        self, support: dict[tuple[int, int], frozenset[int]], everybody: dict[int, frozenset[int]]
    ) -> dict[tuple[int, int], tuple[str, ...] | None]:
        """(rank, micro-batch) -> the data axes along which it was reduced; None where the readers are no such group."""
        parallelism = self.case.facts.parallelism
        split = self.case.facts.batch_split_over_tp
        axes = [a for a in DATA if getattr(parallelism, a) > 1]
        sets = [chosen for size in range(len(axes)) for chosen in combinations(axes, size)]
        found: dict[tuple[int, int], tuple[str, ...] | None] = {}
        for (rank, m), readers in support.items():
            at = parallelism.coordinates(rank)
            found[rank, m] = None
            for chosen in sets:
                same = [a for a in AXES if a not in chosen and (a != "tp" or split)]
                group = {r for r in everybody[m] if all(parallelism.coordinates(r)[a] == at[a] for a in same)}
                if readers == group:
                    found[rank, m] = chosen
                    break
        return found

    def _column_values(self, table: Tensor) -> Tensor | None:
        """One weight per micro-batch, where all readers have the same; else None."""
        middle = table.nanmean(0)
        far = torch.where(table.isnan(), 0.0, (table - middle).abs())
        return middle if bool((far <= self._largest_tolerance() * 4).all()) else None

    def _equal(self, one: Tensor, two: Tensor) -> bool:
        return self._close(one, two)

    def _close(self, one: Tensor, two: Tensor) -> bool:
        far = torch.where(one.isnan(), 0.0, (one - two).abs())
        size = float(torch.as_tensor(two).abs().nan_to_num(0.0).max())
        return bool((far <= self._largest_tolerance() * 4 * size).all())

    def _zero(self, value: Tensor, tolerance: Tensor) -> bool:
        return not abs(float(value)) > 4 * float(tolerance)

    def _largest_tolerance(self) -> float:
        return float(torch.where(self.tolerance.isnan(), 0.0, self.tolerance).max())

    def _whose(self) -> str:
        wrong, every = len(self.found.names), len(self.case.stage)
        if wrong == every:
            return f"all {wrong} gradients"
        names = ", ".join(self.found.names[:3]) + (", ..." if wrong > 3 else "")
        return f"{wrong} of {every} gradients ({names})"
