"""How our routes are entered: they take every method, and whatever the rest of a path is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flask.blueprints import BlueprintSetupState
from werkzeug.routing import BaseConverter


class _Anything(BaseConverter):
    """The rest of a path, whatever is in it: a malformed id is for the view to answer."""

    regex = r"[\s\S]*"
    part_isolating = False


def add_routes(
    state: BlueprintSetupState, routes: Iterable[tuple[str, str, Callable[..., Any]]]
) -> None:
    """Enters routes that take every method; Blueprint.add_url_rule insists on a list of them.

    Args:
        state: The blueprint's, in its app.
        routes: The rule, as the app knows it, the endpoint's name and the view of each.
    """
    app = state.app
    app.url_map.converters["chatstream_anything"] = _Anything
    for path, name, view in routes:
        endpoint = f"{state.name}.{name}"
        rule = app.url_rule_class(path, endpoint=endpoint, strict_slashes=True, merge_slashes=False)
        app.url_map.add(rule)
        app.view_functions[endpoint] = view
