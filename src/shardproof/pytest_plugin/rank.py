"""A rank's side: runs tests of the session that it has inherited, and tells how they went."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import nullcontext, suppress
from typing import Any, TypeVar

import pytest
from _pytest.runner import runtestprotocol

from shardproof.pytest_plugin.guard import Guard
from shardproof.pytest_plugin.messages import Crew, Finished, Order, Reported, Stopped, Warned
from shardproof.pytest_plugin.prompt import Terminal
from shardproof.pytest_plugin.streams import Files, settle
from shardproof.pytest_plugin.world import World
from shardproof.ranks import noise
from shardproof.ranks.failure import only_waited
from shardproof.ranks.place import Place
from shardproof.ranks.safety import unsafe_fork

T = TypeVar("T")

ON_A_RANK = pytest.StashKey["RankSide"]()
"""On the configuration of a process that is a rank."""


class RankSide:
    """The target of the ranks' calls, and a plugin of the rank's own copy of pytest."""

    def __init__(
        self, session: pytest.Session, crew: Crew, port: int, files: dict[int, Files], terminal: Terminal | None
    ) -> None:
        self.crew = crew
        self.place: Place
        self._session, self._files, self._terminal = session, files, terminal
        self._guard = Guard()
        self._world = World(port, self._guard)
        self._tell: Callable[[object], None] | None = None
        self._failed = False
        self._settled = False

    def run(self, place: Place, order: Order) -> Finished:
        """Runs one test; everything about it is told while it runs."""
        self._settle(place)
        item = self._session.items[order.index]
        next_item = None if order.next_index is None else self._session.items[order.next_index]
        self._failed = False
        with nullcontext() if order.crew.alone else self._world.entered(place, order):
            # Fixtures that the last test has left behind for one that did not come.
            self._session._setupstate.teardown_exact(item)
            self._tell = place.tell
            try:
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=next_item)
            except pytest.exit.Exception as stop:
                place.tell(Stopped(str(stop)))
            finally:
                self._tell = None
        kept = self._world.kept
        if self._failed and not kept:
            # Others may wait for this rank in a collective.
            self._world.leave()
        return Finished(kept=kept, fit=not order.crew.alone or unsafe_fork(place.device_type) is None)

    def finish(self, place: Place) -> None:
        """Tears down the fixtures that are still alive."""
        self._session._setupstate.teardown_exact(None)

    def _settle(self, place: Place) -> None:
        if self._settled:
            return
        self._settled, self.place = True, place
        config = self._session.config
        settle(config, place.rank, self._files[place.rank], self._terminal)
        config.stash[ON_A_RANK] = self
        config.pluginmanager.register(self, "shardproof-rank")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        """Runs the three phases; nobody but us hears of their reports here."""
        noise.silence()  # here, as pytest has its own filters around a test
        runtestprotocol(item, log=False, nextitem=nextitem)
        return True

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Tells each report as soon as there is one: a rank may not live to see the next."""
        report = yield
        if self._tell is not None:
            self._failed |= report.failed
            data = item.config.hook.pytest_report_to_serializable(config=item.config, report=report)
            echo = report.failed and call.excinfo is not None and only_waited(call.excinfo.value)
            self._tell(Reported(report=data, failed=report.failed, echo=echo))
        return report

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any], request: Any) -> Generator[None, T, T]:
        """Notes where wider fixtures end and the test's own begin."""
        if fixturedef.scope == "function":
            self._guard.watch(request.node)
        elif not fixturedef.func.__module__.startswith("_pytest."):
            self._guard.alive.add(fixturedef)
        return (yield)

    @pytest.hookimpl
    def pytest_fixture_post_finalizer(self, fixturedef: pytest.FixtureDef[Any]) -> None:
        """A wider fixture is gone."""
        self._guard.alive.discard(fixturedef)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> None:
        """The last moment at which to look, for a test without fixtures."""
        self._guard.watch(item)

    def pytest_warning_recorded(
        self, warning_message: Any, when: str, nodeid: str, location: tuple[str, int, str] | None
    ) -> None:
        """Passes the warning on. pytest repeats those of the collection to every plugin that comes later."""
        if self._tell is None:
            return
        warned = Warned(
            category=warning_message.category,
            text=str(warning_message.message),
            filename=warning_message.filename,
            lineno=warning_message.lineno,
            when=when,
            nodeid=nodeid,
            location=location,
        )
        with suppress(Exception):  # a class that does not pickle: what it says is not worth the test
            self._tell(warned)
