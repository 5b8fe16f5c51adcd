"""How a trainer that owns its loop takes turns with others: it trains in a thread, and waits at a gate after a step."""

from __future__ import annotations

import threading
from abc import abstractmethod

from shardproof.ranks import Place
from trainers.contestant import Contestant
from trainers.task import Task


class Closed(BaseException):
    """Ends a training that nobody will let go on; no Exception, which a library may take for its own."""


class GatedLoop(Contestant):
    """`train` runs the library's own loop without end and calls `gate` after each optimizer step."""

    def __init__(self, task: Task, place: Place) -> None:
        super().__init__(task, place)
        self._left = 0
        self._open, self._shut = threading.Semaphore(0), threading.Semaphore(0)
        self._closing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    @abstractmethod
    def train(self) -> None:
        """The library's loop."""

    def gate(self) -> None:
        """To be called on the loop's thread after each optimizer step: returns when there are steps to do."""
        self._left -= 1
        if self._left <= 0:
            self._shut.release()
            self._wait()

    def steps(self, count: int) -> None:
        self._left = count
        self._open.release()
        if self._thread.ident is None:
            self._thread.start()
        self._shut.acquire()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._closing = True
        self._open.release()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._wait()
            self.train()
        except Closed:
            pass
        except BaseException as error:  # noqa: BLE001  (handed to whoever waits for the steps)
            self._error = error
        else:
            self._error = RuntimeError(f"{type(self).__name__} ended by itself before its steps were over")
        self._shut.release()

    def _wait(self) -> None:
        self._open.acquire()
        if self._closing:
            raise Closed
