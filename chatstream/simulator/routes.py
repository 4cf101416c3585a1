"""The routes: the chat API, the figures of what was asked there, the totals."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from chatstream.simulator.connection import Connection
from chatstream.simulator.exchange import Exchange, Wait
from chatstream.simulator.ledger import Ledger
from chatstream.simulator.plan import Plan, bad_key, ns, parse_chat
from chatstream.simulator.script import Script
from chatstream.simulator.wire import BadRequest, Request

_WHOLE_LIMIT = 64 << 20  # bytes of an answer that is not streamed, as it is built in one piece

_WAIT_S = 30.0  # default timeout of ?wait=

_WAITS = ("started", "headers", "delivered", "closed")


class Routes:
    """What is asked, and what is done about it. The loop's thread's.

    Args:
        ledger: Where the exchanges and their figures are kept.
        defaults: Gives the values for keys of ``simulate`` that a request leaves out.
        call_at: Has something called at an instant, for a connection.
        totals: Gives the server's own figures.
    """

    def __init__(
        self,
        ledger: Ledger,
        defaults: Callable[[], Mapping[str, Any]],
        call_at: Callable[[int, Connection | None, Callable[[], None]], None],
        totals: Callable[[], Mapping[str, object]],
    ) -> None:
        self.figure_connections = 0
        self._ledger = ledger
        self._defaults = defaults
        self._call_at = call_at
        self._totals = totals

    def serve(self, connection: Connection, request: Request) -> None:
        """Answers one request, now or later."""
        try:
            target = urlsplit(request.target)
            if request.method == "POST" and target.path.endswith("/chat/completions"):
                self._chat(connection, request, target.path)
            else:
                self._figures(connection, request.method, target.path, target.query)
        except BadRequest as bad:
            connection.respond(bad.status, bad.to_json())
        except ValueError:  # urlsplit
            connection.respond(400, BadRequest("The request's target is malformed.").to_json())

    def _chat(self, connection: Connection, request: Request, path: str) -> None:
        body, values = parse_chat(request.body)
        plan = Plan.parse({**self._defaults(), **values})
        exchange = self._exchange(connection, request, path, body, plan)
        if not exchange.stream and exchange.tokens * (plan.pad + 8) > _WHOLE_LIMIT:
            raise bad_key("tokens", "is too much for an answer in one piece")
        options = body.get("stream_options")
        usage = isinstance(options, dict) and options.get("include_usage") is True
        script = Script(plan, request, exchange, usage)
        self._ledger.add(exchange)
        connection.keep_alive = script.keep_alive
        single = plan.raw is not None
        connection.play(script.steps(), exchange, single=single, stamps=plan.stamp)

    def _exchange(
        self,
        connection: Connection,
        request: Request,
        path: str,
        body: dict[str, object],
        plan: Plan,
    ) -> Exchange:
        name = plan.id if plan.id is not None else f"req-{self._ledger.requests + 1}"
        tokens, ending = plan.ending()
        headers = {**request.headers}
        if "authorization" in headers:
            headers["authorization"] = "present"
        now_ns = connection.gone_ns or time.monotonic_ns()
        return Exchange(
            id=name,
            attempt=self._ledger.attempts(name) + 1,
            connection=connection.number,
            peer=connection.peer,
            path=path,
            headers=headers,
            body=body,
            stream=body.get("stream") is True,
            tokens=tokens,
            interval_ns=plan.interval_ns(),
            ending=ending,
            started_ns=now_ns,
            clock_ns=now_ns + ns(plan.queue),
        )

    def _figures(self, connection: Connection, method: str, path: str, query: str) -> None:
        if path == "/requests" or path == "/stats" or path.startswith("/requests/"):
            self._set_aside(connection)
        if (method, path) == ("GET", "/requests"):
            connection.respond(200, self._ledger.all())
        elif (method, path) == ("DELETE", "/requests"):
            connection.respond(200, {"forgotten": self._ledger.forget()})
        elif (method, path) == ("GET", "/stats"):
            connection.respond(200, self._stats())
        elif (method, path) == ("GET", "/v1/models"):
            model = {"id": "simulated", "object": "model", "created": 0, "owned_by": "chatstream"}
            connection.respond(200, {"object": "list", "data": [model]})
        elif method == "GET" and path.startswith("/requests/"):
            self._figure(connection, unquote(path.removeprefix("/requests/")), query)
        else:
            connection.respond(404, BadRequest(f"There is no {method} {path} here.").to_json())

    def _set_aside(self, connection: Connection) -> None:
        if not connection.figures_only:
            connection.figures_only = True
            self.figure_connections += 1

    def _figure(self, connection: Connection, name: str, query: str) -> None:
        fields = {key: values[-1] for key, values in parse_qs(query).items()}
        after_ns = _instant(fields, "after")
        if "wait" not in fields:
            connection.respond(*self._ledger.one(name, after_ns))
            return
        if fields["wait"] not in _WAITS:
            raise BadRequest(f"wait must be one of {', '.join(_WAITS)}", param="wait")
        count, timeout = _number(fields, "count", 1), _number(fields, "timeout", _WAIT_S)
        wait = Wait(connection, name, fields["wait"], math.ceil(count), after_ns)
        deadline_ns = time.monotonic_ns() + ns(timeout)
        self._call_at(deadline_ns, connection, lambda: self._ledger.answer(wait))
        self._ledger.wait(wait)

    def _stats(self) -> dict[str, object]:
        return {**self._ledger.stats(), **self._totals(), "cpu_seconds": time.process_time()}


def _number(fields: Mapping[str, str], key: str, default: float) -> float:
    try:
        value = float(fields.get(key, default))
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1e6:
        raise BadRequest(f"{key} must be a number from 0 to 1e6.", param=key)
    return value


def _instant(fields: Mapping[str, str], key: str) -> int | None:
    text = fields.get(key)
    if text is not None and not re.fullmatch(r"[0-9]{1,19}", text):
        raise BadRequest(f"{key} must be an instant in ns.", param=key)
    return None if text is None else int(text)
