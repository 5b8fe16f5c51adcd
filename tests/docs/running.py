"""Runs what a page shows, in processes that are forked from one that has loaded torch already."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import shardproof

TIME_LIMIT_S = 120

SOURCE = str(Path(shardproof.__file__).resolve().parents[1])
"""Absolute, as commands run elsewhere; and first, so that it is this shardproof."""

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["loaded"])


@dataclass(frozen=True, kw_only=True)
class Done:
    """What became of a command."""

    code: int | None
    """Its exit code; None if it did not end in time."""
    output: str
    errors: str


def run(command: str, folder: Path) -> Done:
    """Run one shell line in `folder`: `shardproof`, `pytest`, `python FILE` or `torchrun --nproc-per-node N`."""
    words = shlex.split(command, comments=True)
    environment: dict[str, str] = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    if words[0] != "torchrun":
        return _ended([_start(words, folder, environment)], folder)
    # torchrun's own start, and a fresh interpreter for every rank, would take ten times as long as what they run.
    assert words[1] == "--nproc-per-node", command
    ranks, port = int(words[2]), _free_port()
    told = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    each = [told | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    started = [
        _start(["python", *words[3:]], folder, environment | {name: str(value) for name, value in own.items()}, rank)
        for rank, own in enumerate(each)
    ]
    return _ended(started, folder)


def _start(words: Sequence[str], folder: Path, environment: Mapping[str, str], rank: int = 0):  # type: ignore[no-untyped-def]
    process = FORKED.Process(target=_work, args=(list(words), str(folder), dict(environment), rank))
    before = dict(os.environ)
    # Read when the server starts, which loads torch, and by whatever interpreter a command starts.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([SOURCE, str(Path(__file__).parent), before.get("PYTHONPATH", "")])
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return process


def _ended(processes, folder: Path) -> Done:  # type: ignore[no-untyped-def]
    codes = []
    for process in processes:
        process.join(TIME_LIMIT_S)
        codes.append(process.exitcode)
        if process.exitcode is None:
            process.kill()
            process.join()
    texts = [[(folder / f".{rank}.{name}").read_text() for rank in range(len(codes))] for name in ("out", "err")]
    # Of what lies in its folder a page shows the name alone.
    output, errors = ("".join(text).replace(f"{folder}/", "") for text in texts)
    return Done(code=None if None in codes else max(codes, key=abs), output=output, errors=errors)


def _work(words: list[str], folder: str, environment: dict[str, str], rank: int) -> None:
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f".{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        del os.environ[name]  # what the tests around this one were told
    os.environ.update(environment)
    sys.path.insert(0, folder)
    program, *arguments = words
    if program == "python" and arguments[0] != "-m":
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
        return
    module, arguments = (arguments[1], arguments[2:]) if program == "python" else (program, arguments)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])
