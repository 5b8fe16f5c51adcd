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
    seen = (("D", result.detected), ("L", result.located), ("C", result.cause_first))
    first, said = result.finding, result.error
    if first is not None:
        said = f"{first.cause} @ {first.stage} {first.where}, step {first.step}, axis {first.axis}, ranks {first.ranks}"
        said += f", factor {first.factor}: {first.evidence}"
    print("".join(mark if yes else "-" for mark, yes in seen), result.name, f"[{result.cause}]", said)


if __name__ == "__main__":
    run_zoo(*chosen(tuple(sys.argv[1:])), Setting(), told=_tell)
