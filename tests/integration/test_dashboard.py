"""deploy/: the rules and the dashboard are valid, and about figures that there are."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import eventually, require
from tests.integration.conftest import Fleet
from tests.integration.processes import ROOT
from tests.integration.test_metrics import (
    TWO,
    Scrape,
    cancelled,
    completed,
    failed,
    scrape,
)

PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = PROMETHEUS / "rules.yml"
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy/grafana/chatstream.json").read_text())

OF_PROMETHEUS = {"job", "instance"}
"""Labels that a scrape gets from who scrapes."""


def expressions() -> list[str]:
    """The dashboard's, with Grafana's variables as Grafana would fill them in."""
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    assert found
    filled = [re.sub(r"\$__(rate_interval|range)", "5m", expr) for expr in found]
    return [re.sub(r"\$(job|instance)", ".*", expr) for expr in filled]


def of_the_rules() -> list[str]:
    """Expressions of the rules. Of their YAML only what they use: an indented block, or a line."""
    text = RULES.read_text()
    blocks = re.findall(r"^ +expr: (?:>-\n((?: {10}.*\n)+)|(.*)\n)", text, re.MULTILINE)
    return [" ".join((block or line).split()) for block, line in blocks]


def promtool(*arguments: str) -> str:
    require("promtool")
    run = subprocess.run(
        ["promtool", *arguments],
        cwd=PROMETHEUS,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_the_rules_are_valid() -> None:
    assert f"{len(of_the_rules())} rules found" in promtool("check", "rules", str(RULES))


def test_the_rules_do_what_they_say() -> None:
    """Each fires on what it is for, and on nothing else: see rules_test.yml."""
    assert "SUCCESS" in promtool("test", "rules", "rules_test.yml")
    alerts = set(re.findall(r"^ +- alert: (\w+)$", RULES.read_text(), re.MULTILINE))
    tested = (PROMETHEUS / "rules_test.yml").read_text()
    fired = re.findall(r"alertname: (\w+)\n +exp_alerts:\n", tested)
    silent = re.findall(r"alertname: (\w+)\n +exp_alerts: \[\]\n", tested)
    assert len(alerts) == 8
    assert alerts == set(fired) == set(silent)


def test_the_dashboards_expressions_are_valid(tmp_path: Path) -> None:
    """Each of them, as Prometheus reads it."""
    rules = [
        {"record": f"dashboard:{number}", "expr": expr} for number, expr in enumerate(expressions())
    ]
    file = tmp_path / "dashboard.yml"  # JSON is YAML
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", str(file))


def test_a_wrong_expression_would_be_found(tmp_path: Path) -> None:
    """The check above sees something."""
    require("promtool")
    rules = [{"record": "dashboard:0", "expr": "sum(rate(chatstream_outcomes_total)"}]
    file = tmp_path / "dashboard.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    with pytest.raises(AssertionError):
        promtool("check", "rules", str(file))


def test_the_dashboard_can_be_imported() -> None:
    """Its data source is a variable everywhere, and panels do not overlap."""
    names = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert names == {"datasource", "job", "instance"}
    text = json.dumps(DASHBOARD)
    assert set(re.findall(r'"uid": "(.*?)"', text)) == {"${datasource}", "chatstream"}
    assert DASHBOARD["uid"] == "chatstream"
    assert "id" not in DASHBOARD  # it would be another instance's
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert all(panel["title"] and panel["description"] for panel in panels)


@pytest.fixture
def shown(rigs: Callable[..., Fleet]) -> Iterator[Scrape]:
    """What a service shows after streams of every kind."""
    fleet = rigs("fleet", "gthread", **TWO)
    fleet.ready()
    for scene in (completed, failed, cancelled):
        scene(fleet, fleet.worker())
    wanted = {"completed", "failed", "aborted"}

    def figures() -> Scrape | None:
        now = scrape(fleet.server)
        return now if all(now("outcomes_total", kind=kind) for kind in wanted) else None

    yield eventually(figures, "an outcome of each kind")  # type: ignore[misc]
    fleet.check_leaks()


def test_every_figure_that_is_asked_for_is_shown(shown: Scrape) -> None:
    """Of the dashboard and of the rules: by this name, and with these labels."""
    used = expressions() + of_the_rules()
    for expr in used:
        names = re.findall(r"\bchatstream_\w+", expr)
        assert names, expr
        assert set(names) <= shown.names, expr
        for name, selector in re.findall(r"\b(chatstream_\w+)(\{.*?\})?", expr):
            selected = set(re.findall(r"(\w+)(?:=~|!~|!=|=)\"", selector))
            assert selected - OF_PROMETHEUS <= shown.labels(name), expr
        grouped = re.findall(r"by \(([\w, ]+)\)", expr)
        wanted = {label for group in grouped for label in group.split(", ")} - OF_PROMETHEUS
        assert all(wanted <= shown.labels(name) for name in names), expr
    for bound in re.findall(r'le="([\d.]+)"', " ".join(used)):
        assert shown("stop_seconds_bucket", le=bound) > 0
        assert shown("cancel_seconds_bucket", le=bound) > 0


def test_every_value_of_a_label_that_is_asked_for_is_one(shown: Scrape) -> None:
    """What an alert looks for is counted under that word."""
    used = " ".join(expressions() + of_the_rules())
    for name in re.findall(r'kind="(\w+)"', used):
        assert shown("outcomes_total", kind=name) > 0
    answers = {
        word for words in re.findall(r'answer=~?"([\w|]+)"', used) for word in words.split("|")
    }
    assert answers == {"unconfirmed", "bus_unavailable"}
    for answer in answers:
        assert shown.has("cancels_total", answer=answer)


def test_every_figure_is_on_the_dashboard(shown: Scrape) -> None:
    """Nothing is counted that nobody would see."""
    stems = {
        re.sub(r"_(bucket|count|sum)$", "", name)
        for name in shown.names
        if name.startswith("chatstream_")
    }
    seen = {
        re.sub(r"_(bucket|count|sum)$", "", name)
        for name in re.findall(r"\bchatstream_\w+", " ".join(expressions()))
    }
    assert stems == seen
