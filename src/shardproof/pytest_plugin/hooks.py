"""pytest's hooks, in pytest's own process. Thin: what they do stands in the other files."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from shardproof.errors import UsageError
from shardproof.pytest_plugin.limits import DEFAULT_S
from shardproof.pytest_plugin.marks import LAYOUT, LINES, WANTED, Wanted, variants, wanted

if TYPE_CHECKING:
    from shardproof.pytest_plugin.running import Running

T = TypeVar("T")

_RUNNING: pytest.StashKey[Running] = pytest.StashKey()
_TERMINAL = pytest.StashKey[Any]()
_LEFT = pytest.StashKey[dict[int, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options: all have a default that suits."""
    group = parser.getgroup("shardproof", "tests that run on several ranks")
    group.addoption("--ranks-timeout", type=float, metavar="S", help="seconds a test on ranks may take (0: no limit)")
    group.addoption("--ranks-pdb", type=int, metavar="RANK", help="debug on this rank: breakpoint() and failures")
    group.addoption("--ranks-device", choices=("auto", "cpu", "cuda"), default="auto", help="what ranks compute on")
    parser.addini("ranks_timeout", f"seconds a test on ranks may take (default {DEFAULT_S:g})", default=str(DEFAULT_S))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> Generator[None, T, T]:
    """Keeps the terminal for a debugger, before pytest begins to capture."""
    rank = getattr(early_config.known_args_namespace, "ranks_pdb", None)
    if rank is not None:
        from shardproof.pytest_plugin.prompt import Terminal  # noqa: PLC0415  (only where somebody debugs)

        early_config.stash[_TERMINAL] = Terminal(rank)
    return (yield)


def pytest_configure(config: pytest.Config) -> None:
    """Makes the marks known, also to --strict-markers."""
    for line in LINES:
        config.addinivalue_line("markers", line)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test once for each number of ranks and strategy in the lists of its mark."""
    found = variants(metafunc.definition)
    if found:
        metafunc.fixturenames.append(LAYOUT)
        ids = ["-".join(str(part) for part in one if part is not None) for one in found]
        metafunc.parametrize(LAYOUT, found, indirect=True, ids=ids)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notes which tests are ours."""
    for item in items:
        found = wanted(item)
        if found is not None:
            item.stash[WANTED] = found


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Forks the host while this process is still clean, where any test is ours."""
    config = session.config
    ours = any(isinstance(item.stash.get(WANTED, None), Wanted) for item in session.items)
    if not ours or config.option.collectonly or getattr(config.option, "setupplan", False):
        return
    from shardproof.pytest_plugin.running import Running  # noqa: PLC0415  (a run without such tests pays nothing)

    config.stash[_RUNNING] = Running(session, terminal=config.stash.get(_TERMINAL, None))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Runs a test that is ours on its ranks."""
    found = item.stash.get(WANTED, None)
    running = item.config.stash.get(_RUNNING, None)
    if found is None or (running is None and not isinstance(found, UsageError)):
        return None
    from shardproof.pytest_plugin.running import run  # noqa: PLC0415  (as above)

    run(item, nextitem, found, running)
    return True


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool | None:
    """Of pytest-timeout: the host keeps the time of our tests, knows where each rank stands, and loses only them."""
    return True if isinstance(item.stash.get(WANTED, None), Wanted) else None


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Ends the ranks, after the fixtures that they still hold."""
    running = session.config.stash.get(_RUNNING, None)
    if running is not None:
        session.config.stash[_LEFT] = running.finish()
        if session.config.stash[_LEFT] and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Shows fixtures that failed when they were torn down after the last test."""
    for rank, why in sorted(config.stash.get(_LEFT, {}).items()):
        terminalreporter.section(f"fixtures of rank {rank} failed at the end")
        terminalreporter.line(why)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leaves no process behind, however the session has ended."""
    running = config.stash.get(_RUNNING, None)
    if running is not None:
        running.close()
