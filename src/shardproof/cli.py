"""The command line: reads options, calls `check`, the trainer, the zoo or `show`, prints, and sets the exit code.

Nothing here imports torch before it is needed: `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from shardproof import cli_diff, cli_show, cli_train
from shardproof.cli_written import Annotate, Html, Json, Junit, Written
from shardproof.errors import ShardproofError, UsageError
from shardproof.ranks.launch import Launch, ranks_or_launched
from shardproof.ranks.noise import silence_native
from shardproof.ranks.once import first_to_say
from shardproof.report import file, schemas, show, text
from shardproof.report.data import Report
from shardproof.report.places import Place
from shardproof.report.places import places as places_of
from shardproof.report.progress import progress_on
from shardproof.report.spelling import printable
from shardproof.spec.loading import load
from shardproof.spec.parallelism import Parallelism
from shardproof.spec.strategies import parse
from shardproof.zoo.setting import Setting
from shardproof.zoo.setting import grid as axes

DIVERGED = 1
"""Exit code where a strategy does not compute the same training as the reference."""

BROKEN = 2
"""Exit code of an unexpected exception too: Python's own 1 would read as a divergence."""

LINES = "\n\t"
"""What lays out the text of an error, and is printed as it is."""

FIRST_WORDS_S = 0.5
"""How long processes of a launch that have nothing to add leave to the one that says what is wrong."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""

app = typer.Typer(
    help="Train a PyTorch model under any parallel layout, and prove that every layout computes the same training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of `shardproof` and of `python -m shardproof`."""
    try:
        app(prog_name="shardproof")
    except SystemExit as ended:
        _leave(ended)
    except Exception as error:
        traceback.print_exc()
        raise SystemExit(BROKEN) from error


def _leave(ended: SystemExit) -> NoReturn:
    """End with this exit code, at once where torchrun started the process.

    There an interpreter that shuts down sometimes aborts in torch's threads ("terminate called without an active
    exception", torch 2.13 with gloo), and torchrun takes a finished check for a crash. Forked ranks end likewise.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys() or not isinstance(ended.code, int | None):
        raise ended
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended.code or 0)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        typer.echo(f"shardproof {version('shardproof')}")
    except PackageNotFoundError:
        typer.echo("shardproof (run from its sources, not installed)")
    raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    del version


@app.command("check", short_help="Prove parity, or find the first tensor that is wrong.", no_args_is_help=True)
def _check(  # noqa: PLR0913  (typer declares an option by a parameter)
    experiment: Annotated[
        str, typer.Argument(metavar="EXPERIMENT", help="file.py, file.py:name or package.module:name.")
    ],
    strategies: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Names: ddp,tp_fsdp.", show_default="all that fit"),
    ] = None,
    strategy: Annotated[
        list[str] | None, typer.Option(metavar="DEGREES", help="Or degrees: tp=2,dp_shard=3. Repeatable.")
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, metavar="N", help="Ranks, if not 4 or torchrun's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, metavar="N", help="Steps, if not the experiment's.")] = None,
    dtype: Annotated[
        Literal["float64", "float32", "bfloat16"], typer.Option(metavar="DTYPE", help="Or float32, bfloat16.")
    ] = "float64",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(metavar="DEVICE", help="Or cuda.")] = "cpu",
    reference: Annotated[str, typer.Option(metavar="NAME", help="The strategy to trust.")] = "single",
    shuffle: Annotated[bool, typer.Option("--shuffle/--no-shuffle", help="The order of the data.")] = False,
    invariants: Annotated[
        bool, typer.Option("--invariants", help="Replicas against each other; no reference.")
    ] = False,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Wait this long for an answer.")] = 600.0,
    json: Json = None,
    html: Html = None,
    junit: Junit = None,
    annotate: Annotate = False,
    show_ranks: Annotated[
        list[int] | None,
        typer.Option("--show", min=0, metavar="RANK", help="Print what this rank held. Repeatable."),
    ] = None,
    prove: Annotated[bool, typer.Option("--prove", help="Plant faults; say which this check catches.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print every tensor, every finding.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the conclusion only.")] = False,
) -> None:
    """Train EXPERIMENT on one device and under each strategy, and compare every tensor of every step.

    Prints proof of parity, or the first tensor that is wrong: where, on which ranks, why, and what to change.

    \b
    Examples:
      shardproof check train.py
      shardproof check train.py:decoder --strategies ddp,fsdp,tp_fsdp --ranks 8
      shardproof check train.py --strategy tp=2,dp_shard=3 --show 0 --show 2
      shardproof check my_package.experiments:mlp --dtype bfloat16 --json out.json

    \b
    Exit codes:
      0  parity: every strategy computes the same training
      1  divergence
      2  wrong use, or a broken experiment
      3  a rank crashed or hung

    --prove changes none of them: a planted fault that is missed is no divergence.
    """
    with _exit_codes():
        # Whatever is wrong with the options is said before torch is loaded and anything is trained.
        ranks = ranks_or_launched(ranks)
        if Launch.of(os.environ) is not None:
            silence_native()
        wanted = _wanted(strategies, strategy or (), ranks)
        _refuse(both=quiet and verbose, timeout_s=timeout)
        written = Written(json=json, html=html, junit=junit, annotate=annotate)
        written.refuse()
        asked = Report(
            experiment=experiment, runs=(), ranks=ranks, steps=0, dtype=dtype, device=device, reference=reference
        )
        places: dict[str, Place] = {}
        progress = progress_on(Console(stderr=True), quiet=quiet)
        with written.reporting(asked, places):
            loaded = load(experiment)
            if annotate:
                places |= places_of(loaded)
            try:
                from shardproof.parity import check  # noqa: PLC0415  (loads torch)

                report = check(
                    loaded,
                    strategies=wanted,
                    ranks=ranks,
                    dtype=dtype,
                    device=device,
                    steps=steps,
                    reference=reference,
                    shuffle=shuffle,
                    invariants=invariants,
                    timeout_s=timeout,
                    show=tuple(show_ranks or ()),
                    prove=prove,
                    progress=progress,
                )
            finally:
                progress.close()
        if report is None:
            # Under torchrun every rank runs this command, and the leader alone has a report: the others end silently.
            return
        report = replace(report, experiment=experiment)
        with written.printing():
            _print(report, show_ranks or (), written.console, quiet=quiet, verbose=verbose)
        written.write(report, places)
        if not report.ok:
            raise typer.Exit(DIVERGED)


@app.command("diff", short_help="Two recorded runs of anybody's training loop.", no_args_is_help=True)
@wraps(cli_diff.diff)
def _diff(**options: Any) -> None:
    with _exit_codes():
        report = cli_diff.diff(**options)
        if not report.ok:
            raise typer.Exit(DIVERGED)


@app.command("train", short_help="Train for real, under any strategy.", no_args_is_help=True)
@wraps(cli_train.train)
def _train(**options: Any) -> None:
    with _exit_codes():
        cli_train.train(**options)


@app.command("export", short_help="A checkpoint's weights as one safetensors file.", no_args_is_help=True)
@wraps(cli_train.export)
def _export(**options: Any) -> None:
    with _exit_codes():
        cli_train.export(**options)


@app.command("show", short_help="Print what was recorded of a run.", no_args_is_help=True)
@wraps(cli_show.show)
def _show(**options: Any) -> None:
    with _exit_codes():
        cli_show.show(**options)


@app.command("schema", short_help="Print the JSON Schema of what is written as JSON.")
def _schema(
    name: Annotated[str, typer.Argument(metavar="[report|zoo]", help="Reports of check and diff; or of the zoo.")] = (
        "report"
    ),
) -> None:
    """Print the JSON Schema (2020-12) of the files that --json writes.

    \b
    Examples:
      shardproof schema
      shardproof schema zoo
    """
    with _exit_codes():
        typer.echo(schemas.text(name), nl=False)


@app.command("zoo", short_help="Check known bugs, and right code that looks like them.")
def _zoo(  # noqa: PLR0913  (typer declares an option by a parameter)
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAMES", help="Entries or causes; wildcards.", show_default="all")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of weights, data and random draws.")] = 0,
    width: Annotated[int, typer.Option(metavar="N", help="Features of an attention head; even.")] = 4,
    dp: Annotated[int, typer.Option(metavar="N", help="Ranks of layouts with one data axis.")] = 4,
    tp: Annotated[int, typer.Option(metavar="N", help="Ranks of layouts with tp alone.")] = 4,
    grid: Annotated[str, typer.Option(metavar="DPxTP", help="Ranks of layouts with two axes.")] = "2x2",
    microbatches: Annotated[int, typer.Option(metavar="N", help="Of entries that have several.")] = 3,
    json: Annotated[Path | None, typer.Option(metavar="PATH", help="Write the results as JSON.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="List entries, causes and sources; run nothing.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print every finding in full.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the conclusion only.")] = False,
) -> None:
    """Check known bugs of parallel training, and right code that looks like them.

    Each bug names the public thread or project that it was seen in. Prints whether it is detected, located and named,
    what was found instead where it is not, and the false alarms on right code.

    \b
    Examples:
      shardproof zoo
      shardproof zoo 'ddp_*' mean-of-means --verbose
      shardproof zoo --seed 5 --width 6 --dp 3 --tp 2 --grid 3x2 --json zoo.json
      shardproof zoo --list

    \b
    Exit codes:
      0  every bug is detected, and no right code raises a false alarm
      1  a bug goes undetected, or right code raises a false alarm
      2  wrong use
    """
    with _exit_codes():
        _refuse(both=quiet and verbose)
        if json is not None:
            file.check(json)
        if Launch.of(os.environ) is not None:
            raise UsageError("zoo: starts its own ranks, more or fewer for each entry; run it without torchrun")
        setting = Setting(seed=seed, width=width, dp=dp, tp=tp, grid=axes(grid), microbatches=microbatches)
        # These load torch.
        from shardproof.zoo.json import write  # noqa: PLC0415
        from shardproof.zoo.run import run_zoo  # noqa: PLC0415
        from shardproof.zoo.table import chosen  # noqa: PLC0415
        from shardproof.zoo.text import conclusion, listing, outcome, view  # noqa: PLC0415

        bugs, controls = chosen(names or ())
        console = Console()
        if listed:
            _lines(listing(bugs, controls), console)
            return
        progress = progress_on(Console(stderr=True), quiet=quiet)
        done, entries = count(1), len(bugs) + len(controls)
        try:
            report = run_zoo(
                bugs,
                controls,
                setting,
                told=lambda result: progress.message(f"{next(done)} of {entries}: {outcome(result)}"),
            )
        finally:
            progress.close()
        shown = [conclusion(report)] if quiet else view(report, console.width, verbose=verbose)
        _lines(shown, console)
        if json is not None:
            write(report, json)
        if not report.ok:
            raise typer.Exit(DIVERGED)


def _lines(lines: Iterable[Text], console: Console) -> None:
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)


def _refuse(*, both: bool, timeout_s: float = 1.0) -> None:
    """Raises `UsageError` for options that cannot be meant; `both` is whether quiet and verbose are asked for."""
    if both:
        raise UsageError("--quiet and --verbose exclude each other; give one")
    if not timeout_s > 0:
        raise UsageError(f"--timeout {timeout_s:g}: give a number of seconds above 0")


def _print(report: Report, show_ranks: Sequence[int], console: Console, *, quiet: bool, verbose: bool) -> None:
    """What ranks held first, because the conclusion is to be the last thing on the screen."""
    for rank in show_ranks:
        show.show(report, rank, console)
    if quiet:
        console.print(text.conclusion(report, console.width), soft_wrap=True, highlight=False)
    else:
        text.render(report, console, verbose=verbose)


def _wanted(names: str | None, degrees: Sequence[str], ranks: int) -> list[Parallelism] | None:
    """The strategies of both options, each once; None, which is every one that fits, where neither is given."""
    listed = [] if names is None else [name.strip() for name in names.split(",") if name.strip()]
    if names is not None and not listed:
        raise UsageError(f"--strategies {names!r}: holds no name; leave it out to check every strategy that fits")
    for name in listed:
        if "=" in name:
            raise UsageError(f"--strategies {names}: takes names; write --strategy {names} for degrees")
    texts = dict.fromkeys([*listed, *degrees])
    return list(dict.fromkeys(parse(text, ranks) for text in texts)) or None


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turns errors raised on purpose into a message on stderr and an exit code, without a traceback of ours."""
    try:
        yield
    except ShardproofError as error:
        if first_to_say(str(error)):
            typer.echo(f"error: {printable(str(error), keep=LINES)}", err=True)
        else:
            # When a process ends with an error, torchrun ends the others, that one too which is about to say it.
            time.sleep(FIRST_WORDS_S)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
