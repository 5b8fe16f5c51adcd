"""Keeps a rank's last known place in the user's code where its parent finds it after a SIGKILL."""

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
