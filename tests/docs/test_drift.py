"""What the pages list is what the code has: settings, reasons."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import pytest

from chatstream.settings.table import Settings, known_keys
from chatstream.web import openapi
from chatstream.web.openapi import refusals
from docs.hooks import settings
from tests.docs.blocks import PAGES, ROOT

WORDS = "\n".join(page.read_text() for page in PAGES)


def test_the_settings_are_the_codes() -> None:
    """The table is what `make docs` would write now."""
    page = settings.PAGE.read_text()
    assert settings.renewed(page) == page


def test_the_table_has_every_setting_and_its_default() -> None:
    """A row a field, in their order."""
    rows = re.findall(r"^\| `CHATSTREAM_(\w+)` \| (\S*) ?\| (.+) \|$", settings.table(), re.M)
    fields = dataclasses.fields(Settings)
    assert [name for name, _, _ in rows] == [field.name.upper() for field in fields]
    assert set(settings.MORE) <= {field.name for field in fields}
    shown = {name: default.strip("`") for name, default, _ in rows}
    assert (shown["URL_PREFIX"], shown["DRAIN"], shown["DETACH"]) == ("/api/chat", "25", "1")
    assert (shown["PAGE"], shown["TOKENS"], shown["MAX_BODY"]) == ("", "", "1048576")


def test_a_page_without_a_place_for_the_table_is_a_fault() -> None:
    """Nothing is written into nowhere."""
    with pytest.raises(ValueError, match="one place"):
        settings.renewed("# Settings\n")


def test_the_keys_that_pages_name_are_known() -> None:
    """No page speaks of a setting that nobody reads; and each setting is on the settings' page."""
    named = set(re.findall(r"CHATSTREAM_[A-Z_]*[A-Z]", WORDS))
    assert named - known_keys() == set()
    assert known_keys() - set(re.findall(r"CHATSTREAM_[A-Z_]+", settings.PAGE.read_text())) == set()


@pytest.mark.parametrize(
    ("page", "table"),
    [("wire.md", refusals.BEFORE), ("openai.md", refusals.OPENAI_BEFORE)],
    ids=["wire", "openai"],
)
def test_every_reason_has_its_row(
    page: str, table: Mapping[int, tuple[str, Mapping[str, str]]]
) -> None:
    """With its status. What OpenAI's route has in common with the chat's is on that one's page."""
    places = {"wire.md", page}
    rows = "\n".join((ROOT / "docs" / name).read_text() for name in sorted(places))
    found = {
        (int(status), reason)
        for statuses, reasons in re.findall(r"^\| ([\d, ]+) \| (`[^|]+`) \|", rows, re.MULTILINE)
        for status in statuses.split(", ")
        for reason in re.findall(r"`(\w+)`", reasons)
    }
    wanted = {(status, reason) for status, (_, reasons) in table.items() for reason in reasons}
    assert wanted - found == set()


def test_every_route_is_spoken_of() -> None:
    """Each path that openapi.json has, as the pages write it."""
    paths = openapi.document("/api/chat", max_body=1, openai_prefix="/v1", health="/")["paths"]
    assert len(paths) > 7
    assert [path for path in paths if re.sub(r"{(\w+)}", r"<\1>", path) not in WORDS] == []


def test_the_tests_that_pages_name_are_there() -> None:
    """What is promised is shown by a file of tests."""
    named = set(re.findall(r"\btest_\w+\.py\b", WORDS)) - {"test_app.py"}
    assert len(named) > 10
    assert named - {file.name for file in (ROOT / "tests").rglob("test_*.py")} == set()


@pytest.mark.parametrize("interface", ["StreamOptions", "StreamError", "Answer"])
def test_what_the_module_has_is_on_its_page(interface: str) -> None:
    """Each option and each member that chatstream.d.ts declares."""
    types = (ROOT / "chatstream" / "web" / "page" / "chatstream.d.ts").read_text()
    body = re.split(rf"(?:interface|class) {interface} .*{{\n", types)[1].partition("\n}")[0]
    names = set(re.findall(r"^  (?:readonly )?(\w+)\??(?:: |\()", body, re.MULTILINE))
    assert len(names - {"constructor"}) > 3
    page = (ROOT / "docs" / "browser.md").read_text()
    left_out = {name for name in names if not re.search(rf"\b{name}\b", page)}
    assert left_out - {"constructor", "name"} == set()
