"""A session with tests on ranks, in pytest's own process."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

import pytest

from shardproof.errors import UsageError
from shardproof.pytest_plugin.host import Host
from shardproof.pytest_plugin.limits import limit_s
from shardproof.pytest_plugin.marks import WANTED, Wanted
from shardproof.pytest_plugin.merge import failed, labelled, merged
from shardproof.pytest_plugin.messages import Crew, Order, Ran, Warned
from shardproof.ranks.output import flush
from shardproof.ranks.safety import refuse_unsafe_fork

if TYPE_CHECKING:
    from shardproof.pytest_plugin.prompt import Terminal


class Running:
    """Which test comes where, and the host that runs them."""

    def __init__(self, session: pytest.Session, terminal: Terminal | None) -> None:
        config = session.config
        self._numbers = {item: number for number, item in enumerate(session.items)}
        self._items = session.items
        self._in_order = not hasattr(config, "workerinput")  # a worker of pytest-xdist is told of one test at a time
        # Made now and inherited, so that all ranks put their folders into the one that pytest cleans up.
        factory = getattr(config, "_tmp_path_factory", None)
        if factory is not None:
            factory.getbasetemp()
        self._host: Host | None = None
        self._why = ""
        try:
            if "torch" in sys.modules:
                refuse_unsafe_fork("cuda" if config.option.ranks_device != "cpu" else "cpu")
            self._host = Host(session, config.option.ranks_device, terminal)
        except (UsageError, OSError) as error:
            self._why = f"no ranks can be started: {error}"

    def run(self, item: pytest.Item, nextitem: pytest.Item | None, crew: Crew, limit: float | None) -> Ran:
        """Runs `item`. Raises `UsageError` where it cannot be."""
        if self._host is None:
            raise UsageError(self._why)
        order = Order(index=self._numbers[item], next_index=self._next(item, nextitem, crew), crew=crew, limit_s=limit)
        return self._host.run(order)

    def finish(self) -> dict[int, str]:
        """Tears down what fixtures ranks still hold, and ends them; rank -> what went wrong."""
        errors = self._host.finish() if self._host else {}
        self.close()
        return errors

    def close(self) -> None:
        """Ends the host and its ranks."""
        if self._host:
            self._host.close()

    def _next(self, item: pytest.Item, nextitem: pytest.Item | None, crew: Crew) -> int | None:
        later = self._items[self._numbers[item] + 1 :] if self._in_order else [nextitem] if nextitem else []
        return next((self._numbers[one] for one in later if _crew(one) == crew), None)


def run(item: pytest.Item, nextitem: pytest.Item | None, found: Wanted | UsageError, running: Running | None) -> None:
    """The protocol of a test that is ours, with the hooks that pytest's own calls."""
    hook = item.ihook
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    ran = Ran()
    try:
        if isinstance(found, UsageError) or running is None:
            raise found if isinstance(found, UsageError) else UsageError("there are no ranks")
        limit = limit_s(item)
        flush()
        ran = running.run(item, nextitem, found.crew, limit)
        _show(item.config, ran, found.crew.size)
        reports = merged(item, ran, size=found.crew.size, limit_s=limit)
        _point_to_debugger(item.config, reports)
    except UsageError as error:
        reports = failed(item, str(error))
    _warn(item.config, ran)
    for report in reports:
        hook.pytest_runtest_logreport(report=report)
    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    if ran.stopped is not None:
        pytest.exit(ran.stopped)


def _crew(item: pytest.Item) -> Crew | None:
    found = item.stash.get(WANTED, None)
    return found.crew if isinstance(found, Wanted) else None


def _show(config: pytest.Config, ran: Ran, size: int) -> None:
    """What ranks printed, where nothing is captured (-s) or pytest itself writes on them (--setup-show)."""
    if config.option.capture == "no" or getattr(config.option, "setupshow", False):
        for line in labelled(ran.output, size):
            print(line)
        sys.stdout.flush()
        ran.output = {}


def _point_to_debugger(config: pytest.Config, reports: list[pytest.TestReport]) -> None:
    """--pdb looks at exceptions of pytest's own process, and here there is none."""
    if config.getoption("usepdb", default=False) and config.option.ranks_pdb is None:
        for report in reports:
            if report.failed:
                report.sections = [*report.sections, ("--pdb", "a test on ranks is debugged with --ranks-pdb RANK")]


def _warn(config: pytest.Config, ran: Ran) -> None:
    """Each warning once, however many ranks gave it."""
    seen: dict[Any, Warned] = {}
    for warned in (one for of_rank in ran.warned.values() for one in of_rank):
        seen.setdefault((warned.category, warned.text, warned.filename, warned.lineno), warned)
    for warned in seen.values():
        message = warnings.WarningMessage(warned.text, warned.category, warned.filename, warned.lineno)
        config.hook.pytest_warning_recorded.call_historic(
            kwargs={
                "warning_message": message,
                "nodeid": warned.nodeid,
                "when": warned.when,
                "location": warned.location,
            }
        )
