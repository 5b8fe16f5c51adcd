"""Runs `shardproof`, torchrun and pytest in forks of one process that has loaded torch: each would take seconds."""

from __future__ import annotations

import gc
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn


@dataclass(frozen=True)
class Ended:
    """A command that is over."""

    exit_code: int
    at: float
    """time.time()"""


class Commands:
    """The process that forks."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, program: str, *arguments: str, scratch: Path, said: Path, env: dict[str, str]) -> int:
        """Starts one of `PROGRAMS`, in a session of its own, and returns its pid. One at a time."""
        task = {"program": program, "arguments": arguments, "scratch": str(scratch), "said": str(said), "env": env}
        _in(self._server).write(json.dumps(task) + "\n")
        _in(self._server).flush()
        return int(_out(self._server).readline())

    def wait(self) -> Ended:
        """Waits for the command that was started last."""
        return Ended(**json.loads(_out(self._server).readline()))

    def close(self) -> None:
        """Ends the process that forks."""
        self._server.communicate()


def _in(server: subprocess.Popen[str]) -> IO[str]:
    assert server.stdin
    return server.stdin


def _out(server: subprocess.Popen[str]) -> IO[str]:
    assert server.stdout
    return server.stdout


def _serve() -> None:
    import shardproof.parity
    import shardproof.trainer.trainer
    from shardproof.ranks.preload import preload

    assert shardproof.parity
    preload()
    # What is loaded stays: a command that looks for garbage, as pytest does in the end, need not look here.
    gc.freeze()
    for line in sys.stdin:
        task = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _run(task)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"exit_code": os.waitstatus_to_exitcode(status), "at": time.time()}), flush=True)


def _run(task: dict[str, object]) -> NoReturn:
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    said = os.open(str(task["said"]), os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND)
    for descriptor, source in ((0, nothing), (1, said), (2, said)):
        os.dup2(source, descriptor)
    os.environ.update(task["env"], TMPDIR=str(task["scratch"]))
    tempfile.tempdir = None
    if "LARGEST_FILE" in os.environ:
        # What is written beyond that raises an error, as on a full disk.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LARGEST_FILE"]),) * 2)
    code = 99  # of what nobody expects
    try:
        PROGRAMS[str(task["program"])](task["arguments"])
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except Exception:  # noqa: BLE001  (as an interpreter of its own ends)
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _shardproof(arguments: Sequence[str]) -> None:
    from shardproof.cli import main

    sys.argv = ["shardproof", *arguments]
    main()


def _pytest(arguments: Sequence[str]) -> None:
    import pytest

    raise SystemExit(int(pytest.main(list(arguments))))


def _torchrun(arguments: Sequence[str]) -> None:
    """Torchrun's agent, with workers that it forks instead of starting new interpreters: ranks, and what they run."""
    from torch.distributed import run
    from torch.distributed.launcher.api import elastic_launch

    own = ["--nproc-per-node", arguments[0], "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    config, _, _ = run.config_from_args(run.parse_args([*own, "program"]))
    config.start_method = "fork"
    elastic_launch(config, _worker)(arguments[1:])


def _worker(arguments: Sequence[str]) -> None:
    # An interpreter of its own would not have the agent's handlers.
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if arguments[0] == "shardproof":
            _shardproof(arguments[1:])
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")
    except Exception:  # noqa: BLE001  (likewise)
        traceback.print_exc()
        sys.exit(1)


def _run_torchrun(arguments: Sequence[str]) -> None:
    from torch.distributed import run

    run.main(list(arguments))


PROGRAMS = {"shardproof": _shardproof, "pytest": _pytest, "torchrun": _torchrun, "run": _run_torchrun}
"""`run` is torchrun as it is."""


if __name__ == "__main__":
    _serve()
