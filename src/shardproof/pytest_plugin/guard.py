"""What a test may change on a rank, and how it is put back."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest


class Guard:
    """Looks at the state of the process before a test's own fixtures are made, and puts it back after they are gone.

    Fixtures of wider scopes are made before and torn down after that: what they change lasts as long as they do.
    """

    def __init__(self) -> None:
        self.alive: set[pytest.FixtureDef[Any]] = set()
        """Fixtures of the user's with a wider scope than a test's, which are set up at present."""
        self._watched: pytest.Item | None = None
        self._made: list[Any] = []

    def watch(self, item: pytest.Item) -> None:
        """To be called before anything of the test's own is made; the second call for a test does nothing."""
        if self._watched is item:
            return
        self._watched = item
        put_back, groups = _state(), _groups()

        def end() -> None:
            self._watched = None
            put_back()
            self._made = [group for group in reversed(_groups()) if group not in groups]

        # Finalizers run last in, first out: this one after those of all fixtures of the test.
        item.addfinalizer(end)

    def leave_groups(self) -> None:
        """Leaves the process groups that the last test has made. To be called when all ranks have ended it."""
        import torch.distributed as dist  # noqa: PLC0415  (pytest's own process must not load it)

        for group in self._made:
            if group in _groups():
                dist.destroy_process_group(group)
        self._made = []


def _state() -> Callable[[], None]:
    """Looks at everything; the result puts it back."""
    parts = (_environment(), _folder(), _generators(), _torch())

    def put_back() -> None:
        for part in reversed(parts):
            part()

    return put_back


def _environment() -> Callable[[], None]:
    before = dict(os.environ)

    def put_back() -> None:
        ours = "PYTEST_CURRENT_TEST"  # pytest's, which changes it while it tears down
        for name in set(os.environ) - set(before) - {ours}:
            del os.environ[name]
        for name, value in before.items():
            if name != ours and os.environ.get(name) != value:
                os.environ[name] = value

    return put_back


def _folder() -> Callable[[], None]:
    before = os.getcwd()
    return lambda: os.chdir(before)


def _generators() -> Callable[[], None]:
    import torch  # noqa: PLC0415  (pytest's own process must not load it)

    python, on_cpu = random.getstate(), torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    numpy = sys.modules.get("numpy")
    of_numpy = numpy.random.get_state() if numpy else None

    def put_back() -> None:
        random.setstate(python)
        torch.set_rng_state(on_cpu)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu)
        if numpy:
            numpy.random.set_state(of_numpy)

    return put_back


def _torch() -> Callable[[], None]:
    import torch  # noqa: PLC0415  (as above)

    dtype, grad, threads = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    device = torch.get_default_device()
    precision = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    anomaly = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    cudnn = {name: getattr(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")}

    def put_back() -> None:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if torch.get_default_device() != device:
            torch.set_default_device(device if device.type != "cpu" else None)
        if torch.get_float32_matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic, warn_only=only_warns)
        torch.set_anomaly_enabled(*anomaly)
        for name, value in cudnn.items():
            setattr(torch.backends.cudnn, name, value)

    return put_back


def _groups() -> list[Any]:
    """All process groups that this rank is in, oldest first."""
    from torch.distributed import distributed_c10d  # noqa: PLC0415  (as above)

    return list(distributed_c10d._world.pg_map)
