"""A hook of MkDocs: the pages' links work on a plain git host, and in the site as well.

A link that leads out of docs/, such as ../bench/RESULTS.md, is to a file that the site has not. It
gets a copy, and the link leads there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]

_OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what pages link to outside of docs/, and what that links to in turn."""
    pages = [Path(str(file.abs_src_path)) for file in files.documentation_pages()]
    wanted = {match[1] for page in pages for match in _OUTSIDE.finditer(page.read_text())}
    seen: set[str] = set()
    while wanted - seen:
        name = (wanted - seen).pop()
        seen.add(name)
        files.append(File.generated(config, _called(name), abs_src_path=str(ROOT / name)))
        if name.endswith(".md"):
            wanted |= {link for link in _links(ROOT / name) if not link.startswith("docs/")}
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A page of docs/ links to the copies; a copy links to the pages where they are now."""
    if page.file.generated_by is None:
        return _OUTSIDE.sub(lambda match: f"]({_called(match[1])}", markdown)
    markdown = _LINK.sub(lambda match: f"]({_file(match[1], page.file.src_uri)}", markdown)
    return re.sub(r"\]\((?:\.\./)*docs/", "](" + "../" * page.file.src_uri.count("/"), markdown)


def _file(link: str, source: str) -> str:
    """A link as a site can have it: one to a folder is to its README."""
    is_folder = (ROOT / source).parent.joinpath(link).is_dir()
    return f"{link.rstrip('/')}/README.md" if is_folder else link


def _called(name: str) -> str:
    """What a copy is called: a README would be the site's first page."""
    return "about.md" if name == "README.md" else name


def _links(page: Path) -> set[str]:
    """Names, from the checkout's root, of the files that a page outside docs/ links to."""
    folder = page.parent.relative_to(ROOT).as_posix()
    source = page.relative_to(ROOT).as_posix()
    found = [_file(link, source) for link in _LINK.findall(page.read_text())]
    return {posixpath.normpath(posixpath.join(folder, name)) for name in found}
