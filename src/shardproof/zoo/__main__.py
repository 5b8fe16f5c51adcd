"""`python -m shardproof.zoo NAME ...`, without the command line's table: one line an entry."""

from __future__ import annotations

import sys

from shardproof.zoo.run import BugResult, ControlResult, run_zoo
from shardproof.zoo.setting import Setting
from shardproof.zoo.table import chosen


def _tell(result: BugResult | ControlResult) -> None:
    if isinstance(result, ControlResult):
        print("ok  " if result.ok else "FAIL", result.name, result.error, "" if result.ok else result.report)
        return
    first = result.finding
    marks = "".join(
        mark if yes else "-" for mark, yes in (("D", result.detected), ("L", result.located), ("C", result.cause_first))
    )
    said = (
        ""
        if first is None
        else f"{first.cause} @ {first.stage} {first.where} step {first.step} axis {first.axis} factor {first.factor} ranks {first.ranks}"
    )
    print(marks, result.name, f"[{result.cause}]", said or result.error, f"{result.time_s:.1f} s")


if __name__ == "__main__":
    run_zoo(*chosen(tuple(sys.argv[1:])), Setting(), told=_tell)
