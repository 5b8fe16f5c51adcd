"""Python's search for garbage, put off where very many objects are made and all of them stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Nothing is looked through inside, where Python would do so after every few hundred new objects."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextmanager
def set_aside() -> Iterator[None]:
    """What is there already is not looked through again inside: searches go over what is new."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
