"""`shardproof show`: prints what a recording holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shardproof.errors import UsageError
from shardproof.spec.stages import STAGES


def show(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="The directory that was recorded to.")],
    rank: Annotated[int | None, typer.Option(min=0, metavar="N", help="Records of this rank.")] = None,
    name: Annotated[str | None, typer.Option(metavar="PATTERN", help="Names such as 'fc2*'.")] = None,
    step: Annotated[int | None, typer.Option(min=-1, metavar="N", help="Of this step; -1 is before the first.")] = None,
    stage: Annotated[str | None, typer.Option(metavar="STAGE", help="As gradient or forward.")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Sum up each tensor.")] = False,
) -> None:
    """Print what a recorded run holds: a summary, or the records that options choose.

    Of each record: its rank, step, stage, name, shape and dtype, where its piece lies in the whole, and its first
    values, or the range and mean where only a sketch or statistics were kept. --stats prints range, mean, root mean
    square, zeros, NaN and infinities instead.

    \b
    Examples:
      shardproof show runs/tp2
      shardproof show runs/tp2 --rank 3 --step 1 --stage gradient
      shardproof show runs/tp2 --name 'fc2*' --stats

    \b
    Exit codes:
      0  printed, even where the recording is cut off or lacks a rank: it says so
      2  wrong use, or nothing of the recording can be read
    """
    from shardproof.report import recorded  # noqa: PLC0415  (these load torch)
    from shardproof.trace.folder.line import KNOWN_STAGES  # noqa: PLC0415
    from shardproof.trace.folder.reader import open_recording  # noqa: PLC0415

    if stage is not None and stage not in KNOWN_STAGES:
        raise UsageError(f"--stage {stage}: there is no such stage; the stages are {', '.join(STAGES)}")
    recording = open_recording(trace)
    chosen = recorded.Chosen(rank=rank, name=name, step=step, stage=stage)
    if chosen == recorded.Chosen() and not stats:
        lines = recorded.summary(recording)
    else:
        lines = recorded.records(recording, chosen, stats=stats)
    console = Console()
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
