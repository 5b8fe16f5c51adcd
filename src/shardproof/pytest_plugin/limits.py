"""How long a test may take."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import pytest

DEFAULT_S = 120.0


def limit_s(item: pytest.Item) -> float | None:
    """pytest-timeout's limit where one is set (mark, flag, variable or ini), else ours; None where there is none."""
    config = item.config
    if config.getoption("usepdb", default=False) or config.getoption("ranks_pdb", default=None) is not None:
        return None  # somebody is looking at a prompt
    for said in (
        _marked(item),
        config.getoption("timeout", default=None),
        os.environ.get("PYTEST_TIMEOUT"),
        _ini(config, "timeout"),
        config.getoption("ranks_timeout", default=None),
        _ini(config, "ranks_timeout"),
    ):
        limit = _seconds(said)
        if limit is not None:
            return limit or None
    return DEFAULT_S


def _marked(item: pytest.Item) -> Any:
    mark = item.get_closest_marker("timeout")
    if mark is None:
        return None
    return mark.args[0] if mark.args else mark.kwargs.get("timeout")


def _ini(config: pytest.Config, name: str) -> Any:
    with suppress(ValueError):  # an option that no plugin has registered
        return config.getini(name)
    return None


def _seconds(said: Any) -> float | None:
    try:
        return float(said)
    except (TypeError, ValueError):
        return None
