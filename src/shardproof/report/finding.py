"""The first divergence of a run, for a person: where, by how much, why, and what to change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.text import Text

from shardproof.compare.verdict import Comparison, Sample, Verdict
from shardproof.diagnose.finding import Finding, Hypothesis
from shardproof.report import spelling
from shardproof.report.data import Run
from shardproof.report.lines import INDENT, LABEL_WIDTH, columns, heading, item, labelled

SAMPLES = 6
"""Values shown side by side: enough to see a factor or a shift."""

TRIED = 8
"""Hypotheses that are listed."""

FOLLOWING = 3
"""Later findings of the same run that are named: most of them follow from the first."""


def first(run: Run) -> Finding | None:
    """The first divergence of `run`; made from the first different tensor where no finding explains it."""
    if run.findings:
        return run.findings[0]
    different = next((c for c in run.comparisons if c.verdict is Verdict.DIFFERENT), None)
    if different is None:
        return None
    return Finding(
        cause="unexplained",
        stage=different.stage,
        where=different.name,
        axis=None,
        factor=different.ratio,
        ranks=different.ranks,
        step=different.step,
        evidence=different.reason or "the values differ, and no cause was looked for",
        fix="",
        comparison=different,
    )


def place(finding: Finding) -> str:
    """`step 0, gradient of blocks.0.norm.weight`."""
    return f"{spelling.step(finding.step)}, {spelling.tensor(finding.stage, finding.where)}"


def why(finding: Finding) -> str:
    """`grad-not-summed over tp, factor 0.5`."""
    over = f" over {finding.axis}" if finding.axis else ""
    by = f", factor {spelling.factor(finding.factor)}" if finding.factor is not None else ""
    return f"{finding.cause}{over}{by}"


def brief(run: Run, finding: Finding, width: int) -> Iterator[Text]:
    """One entry of a list: where `run` leaves the reference, and why."""
    who = f", {spelling.of_ranks(finding.ranks)}" if finding.ranks else ""
    yield from item(f"{run.strategy}: {place(finding)}{who}: {why(finding)}", width)


def full(run: Run, finding: Finding, reference: str, width: int) -> Iterator[Text]:
    """Everything that is known about the first divergence of `run`."""
    yield from heading(f"first divergence of {run.strategy} from {reference}", style="bold red")
    yield Text()
    compared = finding.comparison
    yield from labelled("cause", finding.cause, width, style="bold")
    yield from labelled("stage", f"{finding.stage}, {spelling.step(finding.step)}", width)
    yield from labelled("where", where(finding, compared), width, style="bold")
    yield from labelled("ranks", who(finding, run), width)
    if finding.axis:
        yield from labelled("axis", finding.axis, width)
    if finding.factor is not None:
        yield from labelled("factor", f"{spelling.factor(finding.factor)} (got / want)", width)
    if compared is not None:
        yield from _sizes(compared, finding, reference, width)
    yield Text()
    if finding.evidence:
        yield from labelled("evidence", finding.evidence, width)
    for number, hypothesis in enumerate(finding.tried[:TRIED]):
        yield from labelled("" if number else "tried", tried(hypothesis), width)
    if finding.fix:
        yield from labelled("fix", finding.fix, width, style="bold green")
    yield from _following(run, width)


def tried(hypothesis: Hypothesis) -> str:
    """`a combination of 12 contributions: holds, 0.8 floors left`."""
    if hypothesis.holds:
        left = f", {spelling.floors(hypothesis.residual)} left" if hypothesis.residual else ""
        return f"{hypothesis.name}: holds{left}"
    left = f", {spelling.floors(hypothesis.residual)} left" if math.isfinite(hypothesis.residual) else ""
    return f"{hypothesis.name}: no{left}"


def where(finding: Finding, compared: Comparison | None) -> str:
    """`blocks.0.norm.weight, shape [64]`."""
    if compared is None or finding.where not in (compared.name, f"{compared.name}{compared.part}"):
        return finding.where
    named = spelling.with_part(compared.name, compared.part)
    return f"{named}, shape {_index(compared.shape)}" if compared.shape else named


def who(finding: Finding, run: Run) -> str:
    """`0,2 of 4 (dp_shard 2 x tp 2)`."""
    world = math.prod(run.degrees.values())
    mesh = f"{world} ({spelling.degrees(run.degrees)})" if world > 1 else "1"
    if not finding.ranks:
        return f"not known, of {mesh}"
    listed = "all" if len(set(finding.ranks)) == world > 1 else spelling.ranks(finding.ranks)
    return f"{spelling.ranks(finding.ranks)}: all of {mesh}" if listed == "all" else f"{listed} of {mesh}"


def _sizes(compared: Comparison, finding: Finding, reference: str, width: int) -> Iterator[Text]:
    if compared.layout:
        yield from labelled("layout", compared.layout, width)
    yield from labelled("difference", difference(compared), width)
    if compared.ratio is not None and finding.factor is None:
        yield from labelled("", f"the same factor everywhere: {spelling.factor(compared.ratio)}", width)
    if compared.reason and compared.reason not in finding.evidence:
        yield from labelled("", compared.reason, width)
    if compared.samples:
        yield from _side_by_side(shown(compared), against(finding.stage, reference))


def shown(compared: Comparison) -> list[Sample]:
    """The elements that differ most, rank by rank."""
    # Stable, so that the worst elements stay first on each rank.
    return sorted(compared.samples[:SAMPLES], key=lambda sample: sample.rank)


def against(stage: str, reference: str) -> str:
    """What values of a stage are held against."""
    # What a rank read is held against the other ranks of its group, not against the reference.
    return "its peer" if stage == "batch" else reference


def difference(compared: Comparison) -> str:
    """`0.1134, where rounding moves 8.3e-17: 1.4e+15 floors`."""
    error, floor = spelling.number(compared.error), spelling.number(compared.floor, 2)
    if math.isnan(compared.error):
        return f"NaN, where rounding moves {floor}"
    if compared.floor == 0:
        return f"{error}, where rounding moves nothing at all"
    return f"{error}, where rounding moves {floor}: {spelling.floors(compared.floors)}"


def side_by_side(samples: Sequence[Sample], against: str) -> list[tuple[str, str, str, str]]:
    """Rank, index, got and want of each sample under their heads, with digits enough to tell the two apart."""
    digits = spelling.digits_apart((sample.got, sample.want) for sample in samples)
    rows = [("rank", "index", "got", f"want ({against})")]
    rows += [
        (
            str(sample.rank),
            _index(sample.index),
            spelling.number(sample.got, digits),
            spelling.number(sample.want, digits),
        )
        for sample in samples
    ]
    return rows


def _side_by_side(samples: Sequence[Sample], against: str) -> Iterator[Text]:
    for position, line in enumerate(columns(side_by_side(samples, against), right=frozenset({0, 2, 3}))):
        lead = f"{INDENT}{'values' if position == 0 else '':<{LABEL_WIDTH}}"
        yield Text.assemble((lead, "dim"), (line, "dim" if position == 0 else ""))


def _index(numbers: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, numbers))}]"


def _following(run: Run, width: int) -> Iterator[Text]:
    later = run.findings[1:]
    if not later:
        return
    yield Text()
    yield from labelled("later", f"{spelling.count(len(later), 'finding')} that may follow from this one", width)
    for finding in later[:FOLLOWING]:
        yield from labelled("", f"{place(finding)}: {why(finding)}", width)
    if len(later) > FOLLOWING:
        yield from labelled("", f"and {len(later) - FOLLOWING} more", width)
