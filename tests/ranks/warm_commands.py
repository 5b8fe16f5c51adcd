"""Runs `shardproof` commands in forks of one process that has loaded torch, as an import for each would take longer."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
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

    def start(self, *arguments: str, scratch: Path, said: Path, env: dict[str, str]) -> int:
        """Starts a command, in a session of its own, and returns its pid. One at a time."""
        task = {"arguments": arguments, "scratch": str(scratch), "said": str(said), "env": env}
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
    sys.argv = ["shardproof", *task["arguments"]]
    from shardproof.cli import main

    code = 99  # of what nobody expects
    try:
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
