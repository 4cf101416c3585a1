"""The site: it builds without a warning, and nothing in it comes from elsewhere. README's links."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, ROOT, anchor

EXTERNAL = re.compile(r"(https?:)?//")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make docs` builds it."""
    return built(tmp_path_factory.mktemp("site"), ROOT / "mkdocs.yml")


def built(folder: Path, config: Path) -> Path:
    """Builds. Fails with what MkDocs says where that warns of something."""
    mkdocs = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(
        [*mkdocs, "--config-file", str(config), "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


class Loaded(HTMLParser):
    """What a browser loads by itself for a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        kept = given.get("rel") not in ("canonical", "alternate", "prev", "next")
        name = "href" if tag == "link" and kept else "src"
        self.addresses += [given[name] or ""] if name in given else []


def pages_of(site: Path) -> Iterator[tuple[str, str]]:
    for file in site.rglob("*.html"):
        yield file.relative_to(site).as_posix(), file.read_text()


def test_it_has_every_page(site: Path) -> None:
    """Each page of docs/ is there, and a copy of what they link to besides."""
    names = {name for name, _ in pages_of(site)}
    assert {f"{page.stem}.html" for page in PAGES if page.name != "README.md"} <= names
    assert {"ARCHITECTURE.html", "bench/RESULTS.html"} <= names
    assert (site / "examples" / "testing" / "app.py").exists()


def test_nothing_comes_from_elsewhere(site: Path) -> None:
    """No page has its reader's browser ask another host: no fonts, no scripts, no images."""
    loaded = {name: Loaded(html).addresses for name, html in pages_of(site)}
    assert len(loaded["index.html"]) > 3  # else nothing was looked at
    foreign = {n: [a for a in found if EXTERNAL.match(a)] for n, found in loaded.items()}
    assert {name: found for name, found in foreign.items() if found} == {}
    styles = "".join(file.read_text() for file in site.rglob("*.css"))
    assert re.findall(r"(?:url\(|@import\s+)[\"']?(?:https?:)?//[^)]*", styles) == []


@pytest.mark.parametrize(
    "fault", ["[x](none.md)", "[x](start.md#none)", "[x](/start.md)", "![x](charts/none.svg)"]
)
def test_a_dead_link_is_found(tmp_path: Path, fault: str) -> None:
    """The build fails for a link to no page, to no heading, from the host's root, to no image."""
    config = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")
    rest = config[2].partition("\nexclude_docs:")[2]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "start.md").write_text("# Start\n")
    (tmp_path / "docs" / "index.md").write_text(f"# First\n\n{fault}\n")
    settings = config[0] + "\nexclude_docs:" + rest.replace("docs/hooks", str(ROOT / "docs/hooks"))
    (tmp_path / "mkdocs.yml").write_text(settings)
    with pytest.raises(AssertionError, match="WARNING"):
        built(tmp_path / "site", tmp_path / "mkdocs.yml")


def headings(page: Path) -> set[str]:
    """The anchors that a plain git host gives a page's headings."""
    return {anchor(title) for title in re.findall(r"^#{1,6} (.+)$", page.read_text(), re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_work_on_a_plain_git_host(page: Path) -> None:
    """Relative ones lead to a file of the checkout, and to a heading of it."""
    links = re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text())
    for path, heading in links:
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert target.is_relative_to(ROOT), path
        if heading:
            assert heading in headings(target), f"{path}#{heading}"
