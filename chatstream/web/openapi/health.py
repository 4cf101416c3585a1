"""The routes for how the process is."""

from __future__ import annotations

from typing import Any

from chatstream.web.openapi.refusals import AWAY, BEFORE
from chatstream.web.openapi.responses import (
    answer,
    of_method,
    options,
    other_method,
    refused,
    with_retry,
)
from chatstream.web.openapi.schemas import exactly, flag


def health_paths(at: str) -> dict[str, Any]:
    """The routes for how the process is, and what they do. Argument as `document`'s."""
    found: dict[str, Any] = {}
    unready = {"shutting_down": BEFORE[503][1]["shutting_down"], **AWAY}
    for name, sentence in (("healthz", "It answers."), ("readyz", "New streams are welcome.")):
        operations = found[f"{at}/{name}"] = {}
        for method in ("get", "head"):
            responses = {
                "200": answer(sentence, exactly(ok=flag(True))),
                "405": other_method("GET, HEAD, OPTIONS"),
            }
            if name == "readyz":
                responses["503"] = with_retry(503, refused("They had better not come.", unready))
            operations[method] = {
                "operationId": f"{name}_{method}",
                "summary": sentence,
                "security": [],
                "responses": of_method(method, responses),
            }
        operations["options"] = options(name, "GET, HEAD, OPTIONS")
    return found
