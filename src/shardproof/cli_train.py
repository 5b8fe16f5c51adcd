"""`shardproof train` and `shardproof export`: reads options, trains, and prints what came of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

from shardproof.errors import RankLost, UsageError
from shardproof.ranks.launch import Launch, ranks_or_launched
from shardproof.report import file
from shardproof.spec.loading import load_for_training
from shardproof.spec.strategies import parse
from shardproof.spec.training import Training, changed
from shardproof.trainer.fit import Fit


def train(  # noqa: PLR0913  (typer declares an option by a parameter)
    experiment: Annotated[
        str, typer.Argument(metavar="EXPERIMENT", help="file.py, file.py:name or package.module:name.")
    ],
    strategy: Annotated[str, typer.Option(metavar="STRATEGY", help="Or degrees: tp=2,dp_shard=2.")] = "single",
    ranks: Annotated[int | None, typer.Option(min=1, metavar="N", help="Ranks, if not 4 or torchrun's.")] = None,
    max_duration: Annotated[str | None, typer.Option(metavar="TIME", help="2ep, 500ba, 100000sp or 1h.")] = None,
    eval_interval: Annotated[str | None, typer.Option(metavar="TIME", help="How often to evaluate.")] = None,
    precision: Annotated[
        Literal["fp64", "fp32", "bf16", "fp16"] | None, typer.Option(metavar="NAME", help="fp64, fp32, bf16, fp16.")
    ] = None,
    save_folder: Annotated[Path | None, typer.Option(metavar="PATH", help="Where checkpoints go.")] = None,
    save_interval: Annotated[str | None, typer.Option(metavar="TIME", help="How often to save.")] = None,
    keep: Annotated[int | None, typer.Option(min=1, metavar="N", help="Checkpoints to keep.")] = None,
    save_async: Annotated[bool | None, typer.Option("--save-async", help="Write while training goes on.")] = None,
    load_path: Annotated[
        str | None, typer.Option(metavar="PATH", help="A checkpoint or .safetensors to start from.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="From the newest checkpoint, if any.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, metavar="N", help="In place of the experiment's.")] = None,
    device: Annotated[Literal["cpu", "cuda"] | None, typer.Option(metavar="DEVICE", help="Or cuda.")] = None,
    compile: Annotated[bool | None, typer.Option("--compile", help="torch.compile the units.")] = None,
    activation_checkpointing: Annotated[
        bool | None, typer.Option("--activation-checkpointing", help="Of the fsdp_units.")
    ] = None,
    meta: Annotated[bool, typer.Option("--meta", help="Build on meta, fill shard by shard.")] = False,
    workers: Annotated[int | None, typer.Option(min=0, metavar="N", help="Readers of data per rank.")] = None,
    shuffle: Annotated[bool | None, typer.Option("--shuffle/--no-shuffle", help="The order of the data.")] = None,
    check_every: Annotated[int | None, typer.Option(min=1, metavar="N", help="Compare replicas every N steps.")] = None,
    check_action: Annotated[
        Literal["stop", "warn"] | None, typer.Option(metavar="ACTION", help="Then stop, or warn.")
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="PATH", help="Log values as JSON lines.")] = None,
    tensorboard: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Log to TensorBoard.")] = None,
    export: Annotated[Path | None, typer.Option(metavar="PATH", help="Write the weights as .safetensors.")] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Silence this long is a hang.")] = 600.0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the last line only.")] = False,
) -> None:
    """Train EXPERIMENT under a strategy, by the very step that `check` proves.

    How to train it (duration, evaluation, metrics, schedule ...) is what its file says in `training =
    shardproof.Training(...)`; options replace single fields of that.

    \b
    Examples:
      shardproof train examples/digits.py --strategy tp_fsdp --ranks 4
      shardproof train train.py --strategy fsdp --save-folder runs/a --resume
      torchrun --nproc-per-node 8 -m shardproof train train.py --strategy fsdp

    \b
    Exit codes:
      0  trained to the end, or saved and ended after SIGTERM
      1  --check-every found replicas that differ
      2  wrong use, a broken experiment, a checkpoint that cannot be read or written
      3  a rank crashed, hung, or was lost
    """
    loaded, training = load_for_training(experiment)
    training = changed(
        training,
        _given(  # type: ignore[arg-type]  # names and types are those of Changes
            max_duration=max_duration,
            eval_interval=eval_interval,
            precision=precision,
            save_folder=save_folder,
            save_interval=save_interval,
            keep=keep,
            save_async=save_async,
            load_path="auto" if resume else load_path,
            seed=seed,
            device=device,
            compile=compile,
            activation_checkpointing=activation_checkpointing,
            init_device="meta" if meta else None,
            workers=workers,
            shuffle=shuffle,
            check_every=check_every,
            check_action=check_action,
        ),
    )
    if resume and load_path is not None:
        raise UsageError(
            "--resume takes the newest checkpoint of --save-folder, --load-path names one; give one option"
        )
    for path in (json, export):
        if path is not None:
            file.check(path)
    training = _with_loggers(training, json, tensorboard, quiet=quiet)
    launch = Launch.of(os.environ)
    parse(strategy, ranks_or_launched(ranks))
    from shardproof.trainer.trainer import Trainer  # noqa: PLC0415  (loads torch)

    try:
        with Trainer(loaded, strategy, training, ranks=ranks, timeout_s=timeout, quiet=quiet) as trainer:
            fit = trainer.fit()
            if export is not None:
                trainer.export(export)
    except RankLost as lost:
        if launch is not None and launch.local_rank:
            raise typer.Exit(lost.exit_code) from None  # all ranks of this host have lost it: the first one says so
        raise
    if launch is None or launch.rank == 0:
        Console().print(Text(conclusion(fit, strategy)), soft_wrap=True, highlight=False)


def conclusion(fit: Fit, strategy: str) -> str:
    """`tp_fsdp: 460 steps, 20 epochs in 12.3 s; loss 0.0123; eval loss 0.08, accuracy 0.98; saved runs/step-00460`."""
    epochs = f"{fit.epoch} epoch{'' if fit.epoch == 1 else 's'}"
    parts = [f"{fit.step} steps, {epochs} in {fit.elapsed_s:.1f} s"]
    if fit.stop_reason != "max_duration":
        parts[0] += f", ended by {fit.stop_reason}"
    if fit.loss is not None:
        parts.append(f"loss {fit.loss:.6g}")
    if fit.results:
        parts.append("eval " + ", ".join(f"{name} {value:.6g}" for name, value in fit.results.items()))
    if fit.checkpoint is not None:
        parts.append(f"saved {fit.checkpoint}")
    return f"{strategy}: " + "; ".join(parts)


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a folder of them.")],
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The .safetensors file to write.")],
) -> None:
    """Write the whole weights of a checkpoint, of any layout, to one safetensors file. Starts no ranks."""
    file.check(path)
    from shardproof.checkpoint import folder  # noqa: PLC0415  (these load torch)
    from shardproof.checkpoint.export import export as write  # noqa: PLC0415

    found = folder.resolve(checkpoint)
    write(found, path)
    typer.echo(f"{found} written to {path}")


def _given(**options: Any) -> Mapping[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _with_loggers(training: Training, json: Path | None, tensorboard: Path | None, *, quiet: bool) -> Training:
    from shardproof.trainer.loggers.console import ConsoleLogger  # noqa: PLC0415  (--help needs none of them)
    from shardproof.trainer.loggers.json_lines import JSONLinesLogger  # noqa: PLC0415

    loggers = [logger for logger in training.loggers if not (quiet and isinstance(logger, ConsoleLogger))]
    if not quiet and not any(isinstance(logger, ConsoleLogger) for logger in loggers):
        loggers.insert(0, ConsoleLogger())
    if json is not None:
        loggers.append(JSONLinesLogger(json))
    if tensorboard is not None:
        from shardproof.trainer.loggers.tensorboard import TensorBoardLogger  # noqa: PLC0415

        loggers.append(TensorBoardLogger(tensorboard))
    return changed(training, {"loggers": tuple(loggers)})
