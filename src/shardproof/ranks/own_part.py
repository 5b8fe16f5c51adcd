"""The part of a call that runs in the leading process itself."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable

from shardproof.ranks.stacks import of_frame, trimmed
from shardproof.ranks.told import Told


class OwnPart:
    """One thread, always the same (device meshes remember theirs), so that the leader can listen meanwhile.

    The thread may be stuck in a collective for ever when another rank has failed: the leader then raises without it.
    """

    def __init__(self, perform: Callable[[bytes], bytes]) -> None:
        self._perform = perform
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._said: queue.SimpleQueue[bytes | Told] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="shardproof rank 0", daemon=True)
        self._thread.start()

    def send(self, message: bytes) -> None:
        """Starts on a call, without waiting."""
        self._messages.put(message)

    def close(self) -> None:
        """Ends the thread after what it is doing."""
        self._messages.put(None)

    def tell(self, event: object) -> None:
        """Run by the part itself, in any thread: hands an event to the leader."""
        self._said.put(Told(0, event))

    def next(self, wait_s: float) -> bytes | Told | None:
        """The next event, or the answer; None where there is nothing within `wait_s` seconds."""
        try:
            return self._said.get(timeout=wait_s)
        except queue.Empty:
            return None

    def stack(self) -> str:
        """Where the thread stands."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return trimmed(of_frame(frame))

    def _run(self) -> None:
        while (message := self._messages.get()) is not None:
            self._said.put(self._perform(message))
