"""Takes the pictures of the pages that docs/html-report.md shows: `python docs/screenshots.py [NAME ...]`.

Needs the extra `dev`, chromium and chromedriver. Every picture is a report of an experiment in `examples/`, made anew.
"""

from __future__ import annotations

import argparse
import base64
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import shardproof as sp
from shardproof.spec.loading import load

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"

sys.path.insert(0, str(ROOT / "tests" / "report"))
from browser import Page, opened  # noqa: E402 (the tests' own browser)


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One picture."""

    experiment: str
    strategies: tuple[str, ...]
    at: str = ""
    """The tensor that is open, as the page's address names it."""
    width: int = 1120
    height: int = 900
    dark: bool = False
    top: str = "body"
    """The element that the picture begins with."""


MLP = "examples/composer_mlp.py"
LOGS = ("ddp", "fsdp", "tp_fsdp")
GPT = ("ddp", "fsdp", "hsdp", "tp", "tp_fsdp")

SHOTS = {
    "mixed-inputs": Shot(experiment=f"{MLP}:mixed_inputs", strategies=LOGS, height=1000),
    "mixed-inputs-tensor": Shot(
        experiment=f"{MLP}:mixed_inputs",
        strategies=LOGS,
        at="#step=0&stage=batch&name=batch&part=[0]&in=tp_fsdp",
        top="#map",
        height=1420,
    ),
    "sharded-batch": Shot(experiment=f"{MLP}:sharded_batch", strategies=LOGS, height=1100, dark=True),
    "sharded-batch-tensor": Shot(
        experiment=f"{MLP}:sharded_batch",
        strategies=LOGS,
        at="#step=0&stage=gradient&name=2.weight&part=&in=tp_fsdp",
        top="#map",
        height=1420,
        dark=True,
    ),
    "gpt": Shot(experiment="examples/gpt.py", strategies=GPT, height=1000),
    "gpt-tensor": Shot(
        experiment="examples/gpt.py",
        strategies=GPT,
        at="#step=0&stage=gradient&name=blocks.1.attn.v_proj.weight&part=&in=tp_fsdp",
        width=1280,
        height=1000,
        top="#map",
    ),
    "telephone": Shot(experiment=f"{MLP}:sharded_batch", strategies=LOGS, width=400, height=1180),
}


def take(page: Page, shot: Shot, report: Path, to: Path) -> None:
    """Write one picture, and stop where the browser has anything to complain about."""
    page.open(report, shot.at, width=shot.width, height=shot.height, dark=shot.dark)
    # All of the open tensor, which scrolls by itself in a window.
    page.js("document.getElementById('detail').style.maxHeight = 'none'")
    page.js("window.scrollTo(0, document.querySelector(arguments[0]).offsetTop - 16)", shot.top)
    page.settled()
    if complaints := page.complaints():
        raise SystemExit(f"{to.name}: {complaints}")
    picture = page.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
    to.write_bytes(base64.b64decode(picture))
    print(f"{to.relative_to(ROOT)}: {to.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Check each experiment once, and take the pictures that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SHOTS)}; all, if left out")
    wanted = {name: SHOTS[name] for name in parser.parse_args().names or SHOTS}
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        reports: dict[tuple[str, tuple[str, ...]], Path] = {}
        for shot in wanted.values():
            made = (shot.experiment, shot.strategies)
            if made not in reports:
                reports[made] = Path(folder) / f"{len(reports)}.html"
                report = sp.check(load(str(ROOT / shot.experiment)), strategies=shot.strategies, ranks=4)
                named(report, shot.experiment).to_html(reports[made])
        with opened(Path(folder) / "browser") as page:
            for name, shot in wanted.items():
                take(page, shot, reports[shot.experiment, shot.strategies], IMAGES / f"{name}.png")


def named(report: sp.Report, experiment: str) -> sp.Report:
    """As the command names it: Python knows only the experiment itself."""
    return replace(report, experiment=experiment)


if __name__ == "__main__":
    main()
