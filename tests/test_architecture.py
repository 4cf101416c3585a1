"""The rules of the house, executable: who imports whom, and how long a function gets."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "chatstream"


def name_of(path: Path) -> str:
    """A module's name within the package; a package inside it goes by its own."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}

FLOORS = [
    {"simulator.wire", "simulator.exchange"},
    {"simulator.plan"},
    {"simulator.script"},
    {"simulator.connection"},
    {"simulator.ledger"},
    {"simulator.server"},
    {"simulator.command"},
    {"simulator", "simulator.__main__"},
    {"openapi.refusals"},
    {"openapi.schemas"},
    {"openapi.responses"},
    {"openapi.chat", "openapi.watching"},
    {"openapi.openai"},
    {"openapi"},
    {
        "errors",
        "sse",
        "framing",
        "outcome",
        "native",
        "liveness",
        "slots",
        "call_threads",
        "signals",
    },
    {
        "transcript",
        "metrics.shared",
        "config",
        "loop",
        "server",
        "faults",
        "bus.base",
        "bus.record_locks",
        "bus.scripts",
    },
    {"bus.places", "tally", "ending"},
    {"stream", "bus.local", "bus.early", "bus.directory", "bus.locked_places", "bus.redis"},
    {"announcing", "lookout"},
    {"registry", "tracing", "logs", "completions", "body", "connections", "bus.seat", "detached"},
    {"bus.unix", "iterable", "upstream"},
    {"bus", "fetch", "reading", "answering", "tokens", "cors"},
    {"asking"},
    {
        "metrics.figures",
        "openai",
        "page",
        "watching",
        "cli.answer",
        "cli.interrupt",
        "cli.terminal",
        "cli.doctor.check",
    },
    {"views", "metrics", "cli.chat", "cli.sessions"},
    {"cli.doctor.settings", "cli.doctor.provider", "cli.doctor.server", "cli.doctor.bus"},
    {"cli.doctor"},
    {"cli"},
    {"advice"},
    {"service"},
    {"extension"},
    {"standalone"},
    {"__main__"},
    {"workers.arrival"},
    {"workers.limits", "workers.exchange"},
    {"workers", "workers.gthread", "workers.gevent", "workers.log"},
    {"testing.provider"},
    {"testing.browser"},
    {"testing.live"},
    {"testing"},
    {"__init__"},
]
"""From the ground up. A module imports from floors below its own only."""

ROOMS = {
    "flask": {
        *("extension", "views", "openai", "reading", "answering", "cli", "page", "standalone"),
        *("tokens", "cors", "watching", "metrics.figures"),
    },
    "flask_cors": {"cors"},
    "werkzeug": {"extension", "views", "openai", "reading", "answering", "cli", "testing.live"},
    "blinker": {"announcing", "signals"},
    "click": {"cli"},
    "pytest": {"testing"},
    "rich": {"cli.terminal"},
    "requests": {"upstream", "connections", "faults", "fetch", "cli.doctor.provider"},
    "urllib3": {"upstream", "connections", "body", "faults"},
    "redis": {"bus.redis"},
    "opentelemetry": {"tracing"},
    "pythonjsonlogger": {"logs"},
    "prometheus_client": {"metrics.shared", "metrics.figures"},
    "gevent": {"native", "workers.gevent"},
    "gunicorn": {
        "workers.exchange",
        "workers.gthread",
        "workers.gevent",
        "workers.log",
        "cli.doctor.server",
    },
}
"""Who may import which foreign library."""

DISTRIBUTIONS = {
    "flask_cors": "flask-cors",
    "opentelemetry": "opentelemetry-api",
    "pythonjsonlogger": "python-json-logger",
}
"""What is installed for a library that has another name."""

LONGEST = 40
"""Lines of a function's body, its docstring apart."""

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`, which no program executes."""
    for node in ast.iter_child_nodes(tree):
        if not is_type_checking(node):
            yield node
            yield from run_time_nodes(node)


def imported(tree: ast.AST) -> Iterator[str]:
    """The whole names of what a module imports, wherever in it."""
    for node in run_time_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def siblings(tree: ast.AST) -> set[str]:
    """The modules of this package that a module imports."""
    names = {name.removeprefix("chatstream.") for name in imported(tree)}
    return names & set(MODULES)


def floor(module: str) -> int:
    return next(number for number, modules in enumerate(FLOORS) if module in modules)


def test_every_module_has_its_floor() -> None:
    """A new module has to say where it stands; a lost one is taken off."""
    assert set().union(*FLOORS) == set(MODULES)
    assert sum(map(len, FLOORS)) == len(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module: str) -> None:
    """No module imports from its own floor or from above: so there are no cycles either."""
    assert [name for name in siblings(MODULES[module]) if floor(name) >= floor(module)] == []


def test_there_are_no_cycles() -> None:
    """Peeling off what imports nothing that is left takes every module off."""
    left = {module: siblings(tree) - {module} for module, tree in MODULES.items()}
    while free := [module for module, needs in left.items() if not needs & set(left)]:
        for module in free:
            del left[module]
    assert left == {}


def test_the_imports_are_seen() -> None:
    """The rules above would pass on nothing: here is what they have to see."""
    assert {"native", "sse", "errors", "outcome"} <= siblings(MODULES["stream"])
    assert {"views", "cli", "service", "tokens"} <= siblings(MODULES["extension"])
    assert {"registry", "loop", "upstream"} <= siblings(MODULES["service"])
    assert "simulator" in siblings(MODULES["cli"])
    assert {"bus", "bus.base", "bus.local"} <= siblings(MODULES["service"])
    assert {"bus.base", "bus.directory", "bus.early"} <= siblings(MODULES["bus.seat"])
    assert {"bus.unix", "bus.redis"} <= siblings(MODULES["bus"])  # redis within functions
    assert {"simulator.plan", "simulator.ledger"} <= siblings(MODULES["simulator.server"])
    assert "service" not in siblings(MODULES["views"])  # under TYPE_CHECKING only


def test_the_simulator_stands_alone() -> None:
    """It imports nothing else of the package; the command and the tests' provider import it."""
    inside = {module for module in MODULES if module.partition(".")[0] == "simulator"}
    assert set().union(*(siblings(MODULES[module]) for module in inside)) <= inside
    users = {module for module in set(MODULES) - inside if siblings(MODULES[module]) & inside}
    assert users == {"cli", "testing.provider"}


def test_a_bus_knows_neither_streams_nor_http() -> None:
    """What carries a stop knows names and answers; whose they are is for who receives them."""
    inside = {module for module in MODULES if module.partition(".")[0] == "bus"}
    needs = set().union(*(siblings(MODULES[module]) for module in inside)) - inside
    assert needs == {"config", "errors", "loop", "native", "server"}
    assert siblings(MODULES["bus.base"]) == set()


@pytest.mark.parametrize("module", MODULES)
def test_one_foreign_library_one_room(module: str) -> None:
    """Each foreign library is imported where the house has a room for it, and no other at all."""
    known = set(sys.stdlib_module_names) | {"chatstream"}
    foreign = {name.partition(".")[0] for name in imported(MODULES[module])} - known
    assert foreign <= set(ROOMS)
    assert [name for name in foreign if module not in ROOMS[name]] == []


def test_each_foreign_library_is_asked_for() -> None:
    """By us, and not only by another: requests takes an urllib3 with which no stream begins."""
    asked = {re.match(r"[\w-]+", line)[0] for line in requires("chatstream") or ()}  # type: ignore[index]
    named = {DISTRIBUTIONS.get(room, room) for room in ROOMS}
    assert named - asked == {"werkzeug", "click", "blinker"}  # Flask's, as it needs them


@pytest.mark.parametrize(
    "module",
    [
        "sse",
        "framing",
        "outcome",
        "transcript",
        "tally",
        "config",
        "errors",
        "openapi",
        "openapi.chat",
        "openapi.openai",
        "openapi.refusals",
        "openapi.responses",
        "openapi.schemas",
        "openapi.watching",
        "bus.base",
        "workers.arrival",
    ],
)
def test_the_pure_cores_do_no_io(module: str) -> None:
    """What is pure imports neither sockets nor threads nor clocks."""
    impure = {"socket", "_socket", "select", "threading", "_thread", "time", "os", "ssl"}
    assert {name.partition(".")[0] for name in imported(MODULES[module])} & impure == set()


def functions(tree: ast.AST) -> Iterator[_Function]:
    return (node for node in ast.walk(tree) if isinstance(node, _Function))


def lines_of(function: _Function) -> int:
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module: str) -> None:
    """A function fits on a screen."""
    long = {f.name: lines_of(f) for f in functions(MODULES[module]) if lines_of(f) > LONGEST}
    assert long == {}


@pytest.mark.parametrize("module", MODULES)
def test_every_module_and_public_function_is_annotated(module: str) -> None:
    """Modules say what they are for; every parameter and return has its type."""
    assert ast.get_docstring(MODULES[module])
    bare = [
        f"{function.name}({argument.arg})"
        for function in functions(MODULES[module])
        for argument in [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        if argument.annotation is None and argument.arg not in ("self", "cls")
    ]
    assert bare == []
    assert [f.name for f in functions(MODULES[module]) if f.returns is None] == []


@pytest.mark.parametrize("module", MODULES)
def test_the_page_has_every_room(module: str) -> None:
    """ARCHITECTURE.md names each, among the rooms; but what stands alone, or belongs to one."""
    page = (PACKAGE.parent / "ARCHITECTURE.md").read_text().partition("## A request")[0]
    package, _, name = module.rpartition(".")
    if package not in ("simulator", "cli.doctor") and not module.endswith("__"):
        assert re.search(rf"\b{name}\b", page)


@pytest.mark.parametrize("word", ["utils", "helpers", "common", "manager", "models", "constants"])
def test_rooms_that_are_not_built(word: str) -> None:
    """Each module is named for what it knows."""
    assert word not in MODULES
