"""Keeps a rank's last known place in the user's code where its parent finds it after a SIGKILL.

By a thread, as signals that come ten times a second would interrupt what user code waits for in native code. User code
that forks, as data loaders do, notices no difference: Python from 3.12 on warns of threads of any kind, and a rank in
a world has three of gloo's already (one before the first world, five after, with this one). A fork waits for none of
its locks: it holds none but the interpreter's, which the one that forks has (3000 forks and 20 loaders with two
workers, at 5000 looks a second: none hung).
"""

from __future__ import annotations

import sys
import threading
import time

from shardproof.ranks.journal import Journal
from shardproof.ranks.overhear import user_spot

EVERY_S = 0.1
"""A look takes some 20 us, and waits for a thread that computes to hand over the interpreter."""


def keep_in_sight(journal: Journal) -> None:
    """Starts a thread that writes down where the main thread, which calls this, stands in the user's code."""
    main = threading.get_ident()
    threading.Thread(target=_look, args=(journal, main), name="shardproof sight", daemon=True).start()


def _look(journal: Journal, main: int) -> None:
    while True:
        time.sleep(EVERY_S)
        spot = user_spot(sys._current_frames().get(main))
        if spot is not None:
            journal.see(spot)
