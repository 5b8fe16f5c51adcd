"""What a rank says in the middle of a call."""

from __future__ import annotations

import os
import pickle
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection


@dataclass(frozen=True, slots=True)
class Told:
    """An event that a rank has passed to `Place.tell`."""

    rank: int
    event: object


class Voice:
    """The rank's end of the pipe, on which several threads may speak: events first, the answer last."""

    def __init__(self, rank: int, connection: Connection) -> None:
        self._rank, self._connection = rank, connection
        self._lock = threading.Lock()
        self._in_call = False
        self._pid = os.getpid()

    def hear(self) -> bytes:
        """Waits for the next call. Raises `EOFError` or `OSError` where the caller is gone."""
        message = self._connection.recv_bytes()
        with self._lock:
            self._in_call = True
        return message

    def tell(self, event: object) -> None:
        """Sends an event. Between two calls nobody listens, and it does nothing."""
        if os.getpid() != self._pid:
            return  # a child of the rank, as a data loader's worker, has a copy of this object: it has no part here
        message = pickle.dumps(Told(self._rank, event))
        with self._lock:
            if self._in_call:
                self._connection.send_bytes(message)

    def answer(self, message: bytes) -> None:
        """Ends the call. What a thread tells after this belongs to no call and is dropped."""
        with self._lock:
            self._in_call = False
            self._connection.send_bytes(message)
