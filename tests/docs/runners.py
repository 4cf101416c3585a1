"""What is done with a block, by its language. One that has none here fails its test."""

from __future__ import annotations

import json
import linecache
import re
import subprocess
import textwrap
from collections.abc import Callable
from functools import partial

import jsonschema
from openapi_spec_validator import OpenAPIV31SpecValidator

from chatstream.web.openapi import document
from tests.conftest import PATIENCE, eventually, require, require_package
from tests.docs.blocks import ROOT, Block
from tests.docs.reader import Reader
from tests.docs.shell import commands, shows

PROGRAMS = ("curl", "git", "make")
"""What a console may need that Python's packages do not bring."""

MODULE = ROOT / "chatstream" / "web" / "page" / "chatstream.js"


def run(block: Block, reader: Reader) -> None:
    """Does what a block says. Raises, mostly AssertionError, where it does not hold."""
    reader.names["shown"] = block.text if not block.hidden else reader.names.get("shown", "")
    if name := block.options.get("file"):
        (reader.folder / name).write_text(block.text)
        return
    if "of" in block.options:
        part(block)
        return
    if block.language not in RUNNERS:
        raise AssertionError(f"{block.place}: nothing here runs {block.language or 'no language'}")
    RUNNERS[block.language](block, reader)


def python(block: Block, reader: Reader) -> None:
    """Is executed, after all Python before it on the page."""
    text = reader.here(block.text)
    source = "\n" * (block.line - 1) + text  # so that a traceback has the file's lines
    name = f"<{block.place}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), reader.names)


def console(block: Block, reader: Reader) -> None:
    """Each command is typed, and says what the page shows after it, if it shows something."""
    typed = commands(block.text)
    for program in PROGRAMS:
        if re.search(rf"\b{program} ", block.text):
            require(program)
    wanted = int(block.options.get("exit", 0))
    enter = 'cd "$CHECKOUT"; ' if block.options.get("in") == "checkout" else ""
    for number, (command, shown) in enumerate(typed, 1):
        if "background" in block.options and number == len(typed):
            reader.begin(f"{enter}{command}", block.options["background"])
            continue
        script = f"{enter}{reader.here(command)}\n" + ("cd - >/dev/null" if enter else "")
        code, said = reader.shell.type(_keeping_status(script) if enter else reader.here(command))
        assert code == wanted, f"{command} ended with {code}:\n{said}"
        expected = [reader.here(line) for line in shown]
        if any(line.strip() for line in shown):
            assert shows(expected, said), f"{command} said:\n{said}\nand not:\n" + "\n".join(
                expected
            )
        reader.names["said"] = said


def _keeping_status(script: str) -> str:
    body, _, leave = script.rpartition("\n")
    return f"{body}\n_code=$?; {leave}; (exit $_code)"


def bash(block: Block, reader: Reader) -> None:
    """Is typed as a whole."""
    code, said = reader.shell.type(reader.here(block.text))
    assert code == int(block.options.get("exit", 0)), said
    reader.names["said"] = said


_PACKAGE = re.compile(r"""\bfrom "((?:@[\w.-]+/)?\w[\w.-]*)(?:/[^":]*)?\"""")
"""The npm package of an import: no path, no address, nothing of Node's own."""


def js(block: Block, reader: Reader) -> None:
    """Is a module that Node runs."""
    require("node")
    text = reader.here(block.text)
    for name in _PACKAGE.findall(text):
        require_package(name)
    text = text.replace('"/api/chat/chatstream.js"', json.dumps(MODULE.as_uri()))
    file = reader.folder / f"block-{block.line}.mjs"
    file.write_text(text)
    done = subprocess.run(
        ["node", file], cwd=reader.folder, capture_output=True, text=True, timeout=3 * PATIENCE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    reader.names["said"] = done.stdout


def html(block: Block, reader: Reader) -> None:
    """Is a page of the service's origin, in a browser. The Python after it has `page`."""
    from tests.integration.browser import Chromium

    chromium = Chromium()
    reader.finally_(chromium.close)
    page = chromium.profile.new_page()
    address = f"{reader.url}/of-the-docs.html"
    page.route(address, lambda route: route.fulfill(body=block.text, content_type="text/html"))
    page.goto(address)
    reader.names["page"] = page


def json_(block: Block, reader: Reader) -> None:
    """Is JSON, by the schema that it names, or as the Python after it says of `value`."""
    value = json.loads(block.text)
    reader.names["value"] = value
    if block.checked:
        return
    api = document("/api/chat", max_body=1, openai_prefix="/v1")
    schema = {"$ref": f"#/components/schemas/{block.options['schema']}", **api}
    OpenAPIV31SpecValidator(api).validate()
    jsonschema.Draft202012Validator(schema).validate(value)


def part(block: Block) -> None:
    """Is a part, line by line, of the file that the option `of` names."""
    whole = (ROOT / block.options["of"]).read_text().splitlines()
    lines = textwrap.dedent(block.text).strip("\n").splitlines()
    for start in range(len(whole)):
        piece = "\n".join(whole[start : start + len(lines)])
        if textwrap.dedent(piece).splitlines() == lines:
            return
    raise AssertionError(f"{block.place} is no part of {block.options['of']}")


def text(block: Block, reader: Reader) -> None:
    """Is in the log, line by line, or as the Python after it says of `shown`."""
    if "log" in block.options:
        for line in filter(None, block.text.splitlines()):
            eventually(partial(reader.logged, line), f"{line}\nin\n{reader.log()}")
        return
    assert block.checked, f"{block.place}: nothing checks it"


RUNNERS: dict[str, Callable[[Block, Reader], None]] = {
    "python": python,
    "console": console,
    "bash": bash,
    "js": js,
    "html": html,
    "json": json_,
    "text": text,
}
