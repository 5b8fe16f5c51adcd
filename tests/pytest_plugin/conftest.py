"""Runs pytest with the plugin in a process of its own."""

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest

PLUGIN = "shardproof.pytest_plugin"


def loaded() -> tuple[str, ...]:
    """What loads the plugin: nothing, unless shardproof is on the path without being installed."""
    return () if any(point.value == PLUGIN for point in entry_points(group="pytest11")) else ("-p", PLUGIN)


@pytest.fixture
def ready(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder in which warnings are errors and marks have to be known."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "src"), prepend=":")

    pytester.makeini("[pytest]\naddopts = --strict-markers\nfilterwarnings = error\nxfail_strict = true\n")
    return pytester


@pytest.fixture
def run(ready: pytest.Pytester) -> Callable[..., pytest.RunResult]:
    """Writes `files` (names without .py) and runs pytest on them with `arguments`."""

    def run(*arguments: str, **files: str) -> pytest.RunResult:
        if files:
            ready.makepyfile(**files)
        return ready.runpytest_subprocess(*loaded(), *arguments, timeout=100)

    return run


@pytest.fixture
def start(ready: pytest.Pytester) -> Callable[..., subprocess.Popen[str]]:
    """Likewise, without waiting for the end; `options` are Popen's."""

    def start(*arguments: str, files: dict[str, str], **options: object) -> subprocess.Popen[str]:
        ready.makepyfile(**files)
        return subprocess.Popen([sys.executable, "-m", "pytest", *loaded(), *arguments], text=True, **options)

    return start
