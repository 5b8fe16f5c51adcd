"""What reports say of each cause, and where it was seen: the parts of docs/causes that are made from the zoo.

    python benchmarks/cause_reports.py [CAUSE...]

A page names the entry whose report it shows in its first mark. Takes about a second a page.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from shardproof.diagnose.finding import CAUSES
from shardproof.parity import check
from shardproof.report import finding
from shardproof.report.text import WIDTH
from shardproof.zoo.entry import Bug
from shardproof.zoo.setting import Setting
from shardproof.zoo.table import BUGS

PAGES = Path(__file__).resolve().parents[1] / "docs" / "causes"

END = "<!-- end of what it made -->"
REPORT = re.compile(rf"(<!-- made by benchmarks/cause_reports\.py of (\w+) -->\n).*?({END})", re.DOTALL)
THREADS = re.compile(rf"(<!-- threads, made by benchmarks/cause_reports\.py -->\n).*?({END})", re.DOTALL)

OWNERS = {
    "Megatron-LM": "NVIDIA/Megatron-LM",
    "TransformerEngine": "NVIDIA/TransformerEngine",
    "transformers": "huggingface/transformers",
    "DeepSpeed": "deepspeedai/DeepSpeed",
    "sglang": "sgl-project/sglang",
    "pytorch": "pytorch/pytorch",
}
"""Repositories that sources name without their owner; others without one get no link."""

THREAD = re.compile(r"(?:(?P<repository>[\w.-]+(?:/[\w.-]+)?) )?(?P<pull>PR )?#(?P<number>\d+)")


def report(bug: Bug) -> list[str]:
    """The lines about the first divergence, as `shardproof check` prints them."""
    setting = Setting()
    options = dict(bug.options)
    if bug.trusted is not None:
        options["reference"] = bug.trusted(setting)
    checked = check(bug.build(setting), (setting.layout(bug.layout),), **options)
    (run,) = checked.runs
    return [line.plain for line in finding.full(run, run.findings[0], checked.reference, WIDTH)][1:]


def shown(bug: Bug) -> str:
    """The part of a page that shows what a report says of `bug`."""
    lines = "\n".join(report(bug))
    return (
        f"`shardproof zoo {bug.name} --verbose`, which is: {bug.summary}\n\n"
        "<!-- not run: made by benchmarks/cause_reports.py, and compared with a new report by `tests/docs` -->\n"
        f"```text\n{lines}\n```\n"
    )


def threads(bugs: Sequence[Bug]) -> Iterator[str]:
    """The rows of a page's table: an entry of the zoo, what it does, and where that was seen."""
    if not bugs:
        yield "Nowhere: no entry of the zoo has it as its true cause."
        return
    yield "| entry of the zoo | what it does | threads |"
    yield "|---|---|---|"
    for bug in bugs:
        yield f"| `{bug.name}` | {bug.summary.replace('|', '/')} | {linked(bug.source)} |"


def linked(source: str) -> str:
    """`pytorch/pytorch #1, PR #2` with links; a number belongs to the last repository named before it."""
    last = ""

    def link(match: re.Match[str]) -> str:
        nonlocal last
        named = match["repository"]
        if named:
            last = OWNERS.get(named, named if "/" in named else "")
        if not last:
            return match[0]
        return f"[{match[0]}](https://github.com/{last}/{'pull' if match['pull'] else 'issues'}/{match['number']})"

    return THREAD.sub(link, source)


def write(cause: str) -> None:
    """Write both parts of the page of `cause`."""
    path = PAGES / f"{cause}.md"
    text = path.read_text()
    found = REPORT.search(text)
    if found is None:
        raise SystemExit(f"{path}: no mark names the entry whose report is to be shown")
    (bug,) = (bug for bug in BUGS if bug.name == found[2])
    rows = "\n".join(threads([bug for bug in BUGS if bug.cause == cause])) + "\n"
    text = REPORT.sub(lambda match: f"{match[1]}\n{shown(bug)}\n{match[3]}", text)
    text = THREADS.sub(lambda match: f"{match[1]}\n{rows}\n{match[2]}", text)
    path.write_text(text)


if __name__ == "__main__":
    for name in sys.argv[1:] or CAUSES:
        print(name, file=sys.stderr)
        write(name)
