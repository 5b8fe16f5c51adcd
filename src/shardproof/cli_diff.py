"""`shardproof diff`: reads options, compares two recordings, and prints what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shardproof.cli_written import Annotate, Html, Json, Junit, Written
from shardproof.errors import UsageError
from shardproof.report import text
from shardproof.report.data import Report


def diff(  # noqa: PLR0913  (typer declares an option by a parameter)
    a: Annotated[Path, typer.Argument(metavar="A", help="The recording to trust: a directory of sp.record.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The recording to hold against it.")],
    map: Annotated[
        list[str] | None, typer.Option(metavar="RULE", help="Rename: 'model.layers.*=blocks.*'. Repeatable.")
    ] = None,
    noise: Annotated[
        list[Path] | None, typer.Option(metavar="PATH", help="A disturbed recording of A. Repeatable.")
    ] = None,
    layout_a: Annotated[
        str | None, typer.Option(metavar="DEGREES", help="How A was laid out: tp=2,dp_shard=2.")
    ] = None,
    layout_b: Annotated[str | None, typer.Option(metavar="DEGREES", help="How B was laid out.")] = None,
    json: Json = None,
    html: Html = None,
    junit: Junit = None,
    annotate: Annotate = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print every tensor, every finding.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the conclusion only.")] = False,
) -> Report:
    """Hold recording B against recording A, tensor by tensor, and explain the first divergence.

    A and B are directories that sp.record wrote: other world sizes, layouts, wrappers, frameworks and micro-batches
    are welcome. What has no partner is named, with rules that would make names meet.

    \b
    Examples:
      shardproof diff runs/single runs/tp2
      shardproof diff runs/old runs/new --map 'model.layers.*=blocks.*'
      shardproof diff runs/single runs/megatron --layout-b tp=4,dp_replicate=2
      shardproof diff runs/single runs/tp2 --noise runs/single-disturbed-1 --noise runs/single-disturbed-2

    \b
    Exit codes:
      0  nothing differs, as far as the last line says
      1  they diverge, or nothing of them could be compared
      2  wrong use, or a recording that cannot be read
    """
    if quiet and verbose:
        raise UsageError("--quiet and --verbose exclude each other; give one")
    written = Written(json=json, html=html, junit=junit, annotate=annotate)
    written.refuse()
    asked = Report(experiment=str(b), runs=(), ranks=0, steps=0, dtype="", device="", reference=str(a), recorded=True)
    with written.reporting(asked, {}):
        from shardproof.diff import diff as compare  # noqa: PLC0415  (loads torch)

        report = compare(a, b, map=map or (), noise=noise or (), layout_a=layout_a, layout_b=layout_b)
    console = written.console
    with written.printing():
        if quiet:
            console.print(text.conclusion(report, console.width), soft_wrap=True, highlight=False)
        else:
            text.render(report, console, verbose=verbose)
    written.write(report, {})
    return report
