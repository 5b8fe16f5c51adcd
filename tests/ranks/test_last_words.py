"""A process that is asked to end while it is about to say what went wrong."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

_STUCK = (
    "libc = ctypes.CDLL(None); lock = ctypes.create_string_buffer(64); [libc.pthread_mutex_lock(lock) for _ in '12']"
)
"""A wait in native code that no signal interrupts."""


def ended(program: str) -> subprocess.CompletedProcess[str]:
    beginning = (
        "import ctypes, os, signal, sys, threading, time\n"
        "from shardproof.ranks.last_words import LastWords\n"
        "kill = lambda: os.kill(os.getpid(), signal.SIGTERM)\n"
        "words = LastWords()\n"
        "words.begin()\n"
    )
    program = beginning + program
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)


def test_it_says_it_and_ends_with_its_own_exit_code() -> None:
    done = ended("kill(); time.sleep(0.2); print('rank 1 is gone'); sys.exit(3)")
    assert (done.stdout, done.returncode) == ("rank 1 is gone\n", 3)


@pytest.mark.parametrize("program", ["time.sleep(50)", _STUCK])
def test_it_ends_soon_all_the_same(program: str) -> None:
    done = ended(f"threading.Timer(0.5, kill).start(); {program}")
    assert done.returncode == 128 + signal.SIGTERM


def test_it_ends_at_once_where_there_was_nothing_to_say() -> None:
    done = ended("kill(); time.sleep(0.2); words.end(); print('goes on')")
    assert (done.stdout, done.returncode) == ("", -signal.SIGTERM)


def test_after_the_end_a_sigterm_is_what_it_was() -> None:
    done = ended(
        "words.end(); print(signal.getsignal(signal.SIGTERM).name, signal.set_wakeup_fd(-1), flush=True); kill()"
    )
    assert (done.stdout, done.returncode) == ("SIG_DFL -1\n", -signal.SIGTERM)


def test_a_child_is_ended_by_its_own_sigterm_alone() -> None:
    done = ended(
        "child = os.fork()\n"
        "if not child: kill(); time.sleep(50)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)\n"
        "time.sleep(0.2)\n"
        "print(words.told_at)\n"
    )
    assert done.stdout.splitlines() == [str(-signal.SIGTERM), "None"]


def test_who_handles_sigterm_otherwise_goes_on() -> None:
    program = "signal.signal(signal.SIGTERM, lambda *_: print('saved')); {}kill(); time.sleep(4); print('done')"
    for begin in ("", "LastWords().begin(); "):
        done = ended(program.format(begin))
        assert (done.stdout, done.returncode) == ("saved\ndone\n", 0)
