"""The most memory that this process has held, in bytes. Linux only."""

from __future__ import annotations

from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measurable() -> bool:
    """Whether this system tells."""
    return STATUS.exists() and CLEAR.exists()


def forget_peak() -> None:
    """Starts the high-water mark anew, from what is held now."""
    CLEAR.write_text("5")


def peak_bytes() -> int:
    """High-water mark of resident memory since `forget_peak`."""
    return _field("VmHWM")


def held_bytes() -> int:
    """Resident memory now."""
    return _field("VmRSS")


def _field(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {name}")
