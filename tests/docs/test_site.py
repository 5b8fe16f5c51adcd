"""The site is complete, its links lead somewhere, and it fetches nothing; it is built where zensical is installed."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from blocks import DOCS, PAGES, ROOT
from markdown_it import MarkdownIt

import shardproof as sp

NAMES = tuple(sorted({*sp.__all__} - {"__version__"}))

FETCHES = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src", "object": "data"}
"""Tag -> the attribute that makes a browser fetch something."""


def settings() -> dict[str, object]:
    return dict(yaml.safe_load((ROOT / "mkdocs.yml").read_text()))


def listed(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [path for entry in entries for path in listed(entry)]  # type: ignore[attr-defined]


def test_every_page_is_listed_once_and_everything_listed_is_a_page() -> None:
    assert sorted(listed(settings()["nav"])) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


REFERENCE = [
    path
    for page in sorted((DOCS / "reference").glob("*.md"))
    for path in re.findall(r"^::: shardproof\.([\w.]+)$", page.read_text(), re.MULTILINE)
]
"""Where mkdocstrings is told to look: the public name, or its home where a module has the same name."""


def test_every_public_name_is_in_the_reference_once() -> None:
    assert sorted(path.rpartition(".")[2] for path in REFERENCE) == list(NAMES)
    for path in REFERENCE:
        home, _, name = path.rpartition(".")
        module = Path(sp.__file__).parent / name
        if home:
            # Not held against `sp.NAME`: that is the module, once a test has imported it.
            assert getattr(importlib.import_module(f"shardproof.{home}"), name).__module__ == f"shardproof.{home}"
        else:
            assert not module.exists(), f"{name} is a module as well: give the home of the name"
            assert not module.with_suffix(".py").exists(), f"{name} is a module as well: give the home of the name"


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_has_a_docstring_that_says_something(name: str) -> None:
    said = (getattr(sp, name).__doc__ or "").strip()
    assert len(said.split()) >= 4, said


def anchors(page: Path) -> set[str]:
    tokens = MarkdownIt().parse(page.read_text())
    titles = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("page", [*PAGES, "examples/README.md"])
def test_links_lead_to_pages_and_to_their_headings(page: str) -> None:
    here = ROOT / page
    text = re.sub(r"^```.*?^```$", "", here.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (here.parent / path).resolve() if path else here
        assert there.exists(), f"{page} links to {target}"
        if page.startswith("docs/"):
            assert there.is_relative_to(DOCS), f"{page} links to {target}, which is not part of the site"
        if anchor:
            assert anchor in anchors(there), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_links_out_of_the_docs_are_to_the_threads_of_causes(page: str) -> None:
    for url in re.findall(r"https?://[^\s)\"'`>]+", (ROOT / page).read_text()):
        thread = re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+", url)
        assert thread is not None, f"{page}: {url}"
        assert page.startswith("docs/causes/"), f"{page}: {url}"


class Fetched(HTMLParser):
    """Collects what a browser fetches for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        url = dict(attributes).get(FETCHES.get(tag, ""))
        if url and dict(attributes).get("rel") != "canonical":
            self.urls.append(url)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it, of a copy."""
    if find_spec("zensical") is None:
        pytest.skip("the extra `docs` is not installed; `make docs` installs it")
    folder = tmp_path_factory.mktemp("site")
    for name in ("docs", "src"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "mkdocs.yml").write_text((ROOT / "mkdocs.yml").read_text())
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def test_the_site_fetches_nothing_from_a_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        parser = Fetched()
        parser.feed(page.read_text())
        assert parser.urls
        assert not [url for url in parser.urls if re.match(r"(https?:)?//", url)], page
    for style in site.rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", style.read_text()), style


def test_every_public_name_is_in_the_site_with_what_it_takes(site: Path) -> None:
    built = "\n".join(page.read_text() for page in (site / "reference").glob("*.html"))
    for path in REFERENCE:
        assert f'id="shardproof.{path}"' in built, path
    for argument in ("overwrite", "layout_a", "data_axes", "timeout_s"):
        assert argument in re.sub(r"<[^>]+>", "", built), argument
