"""The rules of the house, executable: which package may import what, and how long a function gets.

A new file has to be named nowhere here but in its package's docstring.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import requires
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "chatstream"


def name_of(path: Path) -> str:
    """A module's name within the package; a package inside it goes by its own."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


class Room(NamedTuple):
    """What a package may import: rooms further down the list, and foreign libraries."""

    rooms: str = ""
    foreign: str = ""


STONES = "dialects sockets settings errors"

HOUSE = {
    "web": Room("", "flask werkzeug flask_cors"),  # no rooms named: all that are below it
    "cli": Room(
        f"service bus workers upstream stream simulator {STONES}",
        "flask werkzeug click rich gunicorn requests",
    ),
    "testing": Room(f"service workers telemetry stream simulator {STONES}", "pytest werkzeug"),
    "service": Room(f"bus workers upstream telemetry stream {STONES}"),
    "bus": Room("workers sockets settings errors", "redis"),
    "workers": Room("telemetry stream sockets settings errors", "gunicorn gevent"),
    "upstream": Room(f"stream {STONES}", "requests urllib3"),
    "telemetry": Room(
        f"stream {STONES}", "blinker opentelemetry pythonjsonlogger prometheus_client"
    ),
    "stream": Room("dialects sockets errors"),
    "dialects": Room("errors"),
    "sockets": Room("errors", "gevent"),
    "settings": Room("errors"),
    "errors": Room(),
    "simulator": Room(),
}
"""From the roof down. `__init__` (the front door) and `__main__` stand before it."""

ONE_ROOM = {
    "click": "cli cli.doctor",
    "flask_cors": "web.cors",
    "gevent": "sockets.native workers.gevent",
    "opentelemetry": "telemetry.tracing",
    "pythonjsonlogger": "telemetry.log_format",
    "requests": "upstream cli.doctor",
    "rich": "cli.terminal",
}
"""Of libraries that only some of a room's files may import: which."""

PURE = (
    *("dialects", "settings", "web.openapi", "errors", "bus.messages", "sockets.framing"),
    *("workers.arrival", "stream.outcome", "stream.transcript", "stream.tally"),
)
"""Packages and modules that do no I/O."""

DISTRIBUTIONS = {
    "flask_cors": "flask-cors",
    "opentelemetry": "opentelemetry-api",
    "pythonjsonlogger": "python-json-logger",
}
"""What is installed for a library that has another name."""

LONGEST = 40
"""Lines of a function's body, its docstring apart."""

LONGEST_FILE = 400

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`, which no program executes."""
    for node in ast.iter_child_nodes(tree):
        if not is_type_checking(node):
            yield node
            yield from run_time_nodes(node)


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """The whole names of what these nodes import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def siblings(module: str) -> set[str]:
    """The modules of this package that a module imports, for its types too."""
    tree = MODULES[module]
    names = {name.removeprefix("chatstream.") for name in imported(ast.walk(tree))}
    found = names & set(MODULES)
    # A package that only lies on the way to one of its files is not what is meant.
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def room_of(module: str) -> str:
    return module.partition(".")[0]


def within(module: str, places: str) -> bool:
    """Whether a module is one of these, or lies in one of them."""
    return any(f"{module}.".startswith(f"{place}.") for place in places.split())


def circle(arrows: Mapping[str, set[str]]) -> set[str]:
    """What is left when all that needs nothing has been peeled off, again and again."""
    left = dict(arrows)
    while free := [name for name, needs in left.items() if not needs & set(left)]:
        for name in free:
            del left[name]
    return set(left)


def test_the_root_is_the_house() -> None:
    """Fourteen entries beside the front door: a new one is a decision, and has a rule."""
    entries = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("_")}
    assert entries - {"py"} == set(HOUSE)


@pytest.mark.parametrize("room", HOUSE)
def test_imports_go_down_the_list(room: str) -> None:
    """A room imports only rooms further down, and of these what its row says."""
    below = list(HOUSE)[list(HOUSE).index(room) + 1 :]
    granted = HOUSE[room].rooms.split() or (below if room == "web" else [])
    assert set(granted) <= set(below)
    inside = [name for name in MODULES if room_of(name) == room]
    needs = {name: {room_of(other) for other in siblings(name)} for name in inside}
    assert {name: each for name, each in needs.items() if each - {room, *granted}} == {}


def test_there_is_no_circle_of_files() -> None:
    """Imports for types count: a reader follows them too."""
    assert circle({module: siblings(module) - {module} for module in MODULES}) == set()


def test_the_imports_are_seen() -> None:
    """The rules above would pass on nothing: here is what they have to see."""
    assert {"stream.stream", "sockets.loop", "upstream.provider"} <= siblings("service.service")
    assert {"bus.redis.redis_bus", "bus.unix.unix_bus"} <= siblings("bus")  # within functions
    assert "sockets.client" in siblings("sockets.loop")
    assert circle({"a": {"b"}, "b": {"a"}, "c": {"a"}, "d": set()}) == {"a", "b", "c"}


def test_a_foreign_library_has_its_room() -> None:
    """It is imported where the house has a room for it, and no other is imported at all."""
    known = set(sys.stdlib_module_names) | {"chatstream"}
    strangers = set()
    for module, tree in MODULES.items():
        foreign = {name.partition(".")[0] for name in imported(run_time_nodes(tree))} - known
        # Beside the rooms stands `__main__`, which serves the standalone app.
        room = HOUSE.get(room_of(module), Room("", "flask"))
        strangers |= {(module, name) for name in foreign - set(room.foreign.split())}
        strangers |= {
            (module, name) for name in foreign if not within(module, ONE_ROOM.get(name, module))
        }
    assert strangers == set()


def test_each_foreign_library_is_asked_for() -> None:
    """By us, and not only by another: requests takes an urllib3 with which no stream begins."""
    asked = {re.match(r"[\w-]+", line)[0] for line in requires("chatstream") or ()}  # type: ignore[index]
    named = {
        DISTRIBUTIONS.get(name, name) for room in HOUSE.values() for name in room.foreign.split()
    }
    assert named - asked == {"werkzeug", "click", "blinker"}  # Flask's, as it needs them


def test_the_call_is_imported_after_the_fork() -> None:
    """requests and urllib3 come with `upstream`, which nobody else imports at its top."""
    early = [
        module
        for module, tree in MODULES.items()
        if not within(module, "upstream cli")
        if any(within(name, "chatstream.upstream") for name in imported(at_the_top(tree)))
    ]
    assert early == []


def at_the_top(tree: ast.Module) -> Iterator[ast.AST]:
    return (node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))


def test_what_is_pure_does_no_io() -> None:
    """It imports neither sockets nor threads nor clocks."""
    impure = {"socket", "_socket", "select", "threading", "_thread", "time", "os", "ssl"}
    pure = [name for name in MODULES if within(name, " ".join(PURE))]
    assert {name for name in PURE if name not in pure} == set()
    for name in pure:
        needs = {each.partition(".")[0] for each in imported(run_time_nodes(MODULES[name]))}
        assert needs & impure == set(), name


@pytest.mark.parametrize("package", [name for name in MODULES if FILES[name].stem == "__init__"])
def test_a_package_names_its_files(package: str) -> None:
    """Its docstring has each file and folder beside it: the table of contents."""
    said = ast.get_docstring(MODULES[package]) or ""
    beside = {path.stem for path in FILES[package].parent.iterdir() if path.suffix in (".py", "")}
    if package != "__init__":  # the front door's are drawn in ARCHITECTURE.md
        names = {name for name in beside if not name.startswith("__")}
        assert {name for name in names if not re.search(rf"\b{name}\b", said)} == set()


def test_the_page_has_every_room() -> None:
    """ARCHITECTURE.md draws the house, in the order of the list."""
    page = (PACKAGE.parent / "ARCHITECTURE.md").read_text().partition("## A request")[0]
    assert re.findall(r"^  (\w+)(?:/|\.py) ", page, re.MULTILINE) == list(HOUSE)


def test_nothing_lies_deep() -> None:
    """Two folders below `chatstream/` at most, and no file is longer than a reader's patience."""
    deep = [name for name, path in FILES.items() if len(path.relative_to(PACKAGE).parts) > 3]
    lines = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    assert (deep, {name: n for name, n in lines.items() if n > LONGEST_FILE}) == ([], {})


def functions(tree: ast.AST) -> Iterator[_Function]:
    return (node for node in ast.walk(tree) if isinstance(node, _Function))


def lines_of(function: _Function) -> int:
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_functions_are_short() -> None:
    """A function fits on a screen."""
    lengths = {
        f"{module}.{function.name}": lines_of(function)
        for module, tree in MODULES.items()
        for function in functions(tree)
    }
    assert {name: n for name, n in lengths.items() if n > LONGEST} == {}


def test_everything_is_annotated() -> None:
    """Modules say what they are for; every parameter and return has its type."""
    assert [name for name, tree in MODULES.items() if not ast.get_docstring(tree)] == []
    all_of_them = [(module, f) for module, tree in MODULES.items() for f in functions(tree)]
    bare = [
        f"{module}.{function.name}({argument.arg})"
        for module, function in all_of_them
        for argument in [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        if argument.annotation is None and argument.arg not in ("self", "cls")
    ]
    assert bare == []
    assert [f"{module}.{f.name}" for module, f in all_of_them if f.returns is None] == []


def test_rooms_that_are_not_built() -> None:
    """Each module is named for what it knows."""
    vague = {"utils", "helpers", "common", "manager", "constants"}
    assert [name for name in MODULES if name.rpartition(".")[2] in vague] == []
