"""The built-in provider: an OpenAI-compatible chat API that is slow, silent or broken on request.

    python -m chatstream.simulator --port 9911

It serves the demo, the tests and the benchmark, so it measures as well as answers. One thread waits
on one epoll and one heap of timers; whatever epoll reports, hang-ups are stamped and acted upon
before anything else is done. What falls due is sent up to 1 ms late (epoll's unit), never early.

    POST .../chat/completions   the chat API; the body's "simulate" says how to behave: see `Plan`
    GET /requests               the figures of every request: `Exchange.figure`
    GET /requests/ID            of one: the newest that bears the name
        ?wait=W &timeout=S      answers when the request, which need not exist yet, is "started", at
        &count=N                its "headers", has N tokens "delivered", is "closed"; or after S s
        ?after=NS               adds "generated_after": how many tokens were made after an instant
    DELETE /requests            forgets the closed ones
    GET /stats                  totals; connections that only asked for figures are not counted
    GET /v1/models              one model

Every instant (``*_ns``) is `time.monotonic_ns`, so on one host it compares with the stamps of other
processes. A FIN counts as gone, as it does for most providers. (A client that closes a socket with
unread bytes sends a RST.) Linux only: epoll, eventfd. It needs no other part of the package.

`command` starts it. `server` waits, a `connection` speaks HTTP in the words of `wire`, and `routes`
say what can be asked. An `exchange` is one question and its figures, kept in the `ledger`; a `plan`
says how to answer, a `script` when, and `openai_chat` in which words.
"""

from __future__ import annotations

from chatstream.simulator.command import main
from chatstream.simulator.plan import Plan
from chatstream.simulator.server import Simulator

__all__ = ["Plan", "Simulator", "main"]
