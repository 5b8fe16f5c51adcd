"""Time to say what went wrong, in a process that its launcher is about to end for it."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType

from shardproof.ranks.sigterm import by_default

LAST_WORDS_S = 3.0
"""How long a process outlives a SIGTERM at most. Launchers wait for 30 s before they send a SIGKILL."""
_EXIT_CODE = 128 + signal.SIGTERM
"""As shells have it, of a process that did not get to end by itself."""


class LastWords:
    """From `begin` to `end` a SIGTERM ends this process only `LAST_WORDS_S` later, also while it waits in native code.

    A launcher that has lost a process sends SIGTERM to all others of its machine within a tenth of a second: in the
    middle of the collective that is about to raise, or of the message that would have named the lost one.
    """

    def __init__(self) -> None:
        self.told_at: float | None = None
        """When the SIGTERM came (time.monotonic)."""
        self._pipe: tuple[int, int] | None = None
        """Where it is read and written, from `begin` to `end`."""
        self._before = -1

    def begin(self) -> None:
        """Does nothing outside the main thread, and where somebody else handles SIGTERM."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        if self._pipe is not None or not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return
        # Python runs handlers between two lines of Python; the number of the signal it writes down at once.
        self._pipe = reading, writing = os.pipe()
        os.set_blocking(writing, False)
        self._before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._handle)
        threading.Thread(target=self._listen, args=(reading,), name="shardproof last words", daemon=True).start()
        _begun.append(self)

    def end(self) -> None:
        """A SIGTERM ends this process at once again; so does one that came meanwhile."""
        if (pipe := self._let_go()) is None:
            return
        # The thread reads the end of the pipe, and closes its own side.
        os.close(pipe[1])
        if self.told_at is not None:
            by_default()

    def let_go_in_a_child(self) -> None:
        """A forked child has the handler, and would write down its own signals for its parent."""
        for descriptor in self._let_go() or ():
            os.close(descriptor)

    def _let_go(self) -> tuple[int, int] | None:
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            _begun.remove(self)
            signal.set_wakeup_fd(self._before)
            if self._ours():
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return pipe

    def _ours(self) -> bool:
        """Whether it is still this object that handles SIGTERM, and not user code that came later."""
        return signal.getsignal(signal.SIGTERM) == self._handle

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Once more: whoever else has taken the place of the pipe, as asyncio does, keeps it from being written to.
        pipe = self._pipe
        if self.told_at is None and pipe is not None:
            with suppress(OSError):
                os.write(pipe[1], bytes([number]))

    def _listen(self, reading: int) -> None:
        while got := os.read(reading, 1):
            # Other signals are written down as well.
            if got[0] == signal.SIGTERM and self._ours():
                self.told_at = time.monotonic()
                time.sleep(LAST_WORDS_S)
                if self._pipe is not None:
                    os._exit(_EXIT_CODE)
        os.close(reading)


_begun: list[LastWords] = []


def _in_a_child() -> None:
    for of_parent in tuple(_begun):
        of_parent.let_go_in_a_child()


os.register_at_fork(after_in_child=_in_a_child)
