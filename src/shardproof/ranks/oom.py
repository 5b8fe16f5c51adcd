"""Whether the kernel has ended processes for lack of memory, so that a SIGKILL can be told from another."""

from __future__ import annotations

from pathlib import Path

_COUNTERS = (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat"))
"""Of the container (cgroup 2), and of the machine."""


def kills() -> dict[str, int]:
    """How often it has happened, by the counters that can be read here: none on other systems."""
    found = {}
    for path in _COUNTERS:
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition(" ")
            if name == "oom_kill" and value.strip().isdecimal():
                found[str(path)] = int(value)
    return found


def grown(before: dict[str, int], after: dict[str, int]) -> str:
    """That it has happened between two looks, in words; nothing where it has not, or nobody can know."""
    path = next((path for path, count in after.items() if count > before.get(path, count)), None)
    if path is None:
        return ""
    return (
        f"out of memory: the kernel has ended a process for lack of it (oom_kill in {path}); "
        "use fewer ranks, smaller batches or a smaller model, or a machine with more"
    )


def told(before: dict[str, int], after: dict[str, int]) -> str:
    """What the counters say of a SIGKILL between two looks."""
    if found := grown(before, after):
        return found
    if after:
        return "killed by hand or by another program; the kernel counts no process that it ended for lack of memory"
    return "out of memory, or killed by hand"
