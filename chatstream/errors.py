"""The exception tree.

    ChatStreamError
     ├── ConfigError            a setting is wrong; raised at start-up
     ├── RequestTimeout         a client does not send the rest of its request; an OSError too
     ├── StreamAborted          we ended it: the stream has a recorded cause
     └── StreamError            a stream that cannot be, or went wrong; has a code and a status
          ├── Refused           the caller's request: 400, 401, 403, 404, 405, 409, 413, 415, 429
          ├── Busy              this worker has no room: 503
          ├── Unconfirmed       the worker that has the stream does not answer: 504
          ├── BusUnavailable    which worker has the stream cannot be found out: 503
          ├── Ended             a deadline or a shutdown of ours, told to the client: 504, 503
          └── UpstreamError     they broke it: the provider, or the way to it: 502, 504, 429, 400

Exceptions of requests, urllib3, ssl and socket are mapped to this tree in
`chatstream.upstream.faults`, with `__cause__` kept.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator


class ChatStreamError(Exception):
    """Base of everything chatstream raises."""


class ConfigError(ChatStreamError):
    """A setting has a wrong value. The message names the key and says what to set."""


class RequestTimeout(ChatStreamError, ConnectionResetError):
    """A client did not go on with its request. It has been told: 408.

    Raised where an app reads a body from one of our workers. To gunicorn, and to whoever knows of
    OSErrors only, it is a connection that was reset.
    """

    def __init__(self) -> None:
        super().__init__(errno.ECONNRESET, "The client does not go on with its request.")


class StreamAborted(ChatStreamError):
    """The stream was aborted by us; the cause is recorded on the stream."""


class StreamError(ChatStreamError):
    """A stream that could not start or went wrong.

    Attributes:
        code: The word for machines, as in `failed: <code>` and in the JSON and SSE errors.
        status: The HTTP status where no byte has been sent yet.
        type: The `type` of the SSE error event, in the manner of OpenAI's errors.
        message: A sentence for people. Never holds a key or the text of a provider's 401.
        retry_after: Value for a `Retry-After` header, or None.
        detail: What the log may say beyond the code; not for clients.
    """

    code = "error"
    status = 500
    type = "service_error"
    detail = ""

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        status: int | None = None,
        retry_after: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.code
        self.status = status or self.status
        self.retry_after = retry_after


class Refused(StreamError):
    """The caller's request cannot be served as it is."""

    code = "bad_request"
    status = 400


def conflict(what: str) -> Refused:
    """The refusal of a stream whose name is taken."""
    sentences = {
        "stream": "A stream with this streamId is live.",
        "session": "This session has a live stream. Cancel it first.",
    }
    return Refused(sentences[what], code="conflict", status=409)


def too_many(limit: int) -> Refused:
    """The refusal of one stream more than an owner may have."""
    answers = "1 answer" if limit == 1 else f"{limit} answers"
    return Refused(
        f"You have {answers} running. Stop one of them first, or wait.",
        code="too_many_streams",
        status=429,
        retry_after="1",
    )


class Busy(StreamError):
    """No stream slot, thread or descriptor is free in this worker."""

    code = "busy"
    status = 503

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_after="1")


class Unconfirmed(StreamError):
    """The worker that has the stream does not answer. When it does again, it will stop it."""

    code = "unconfirmed"
    status = 504

    def __init__(self) -> None:
        super().__init__("The worker that has this stream does not answer. Please try again.")


class BusUnavailable(StreamError):
    """Whether another worker has the stream cannot be found out now."""

    code = "bus_unavailable"
    status = 503

    def __init__(self) -> None:
        super().__init__("The other workers cannot be reached. Please try again.", retry_after="1")


class Ended(StreamError):
    """We ended the stream, and the client is told so (a deadline, a shutdown)."""


def shutting_down() -> Ended:
    """The word for a stream whose worker ends."""
    return Ended(
        "The service is restarting. Please ask again.",
        code="shutting_down",
        status=503,
        retry_after="1",
    )


class UpstreamError(StreamError):
    """The provider, or the way to it, failed. The codes are listed in docs/wire.md."""

    code = "upstream_error"
    status = 502
    type = "upstream_error"


class ProviderEvent(UpstreamError):
    """The provider said inside its answer that it failed; its own words tell the client."""

    code = "upstream_error"


def headers_late() -> UpstreamError:
    """The word for a provider that has not answered in time."""
    return UpstreamError(
        "The provider did not answer in time.", code="upstream_timeout", status=504
    )


def idle() -> UpstreamError:
    """The word for a provider that is silent in the middle of its answer."""
    return UpstreamError("The provider stopped in the middle of its answer.", code="upstream_idle")


def not_whole() -> UpstreamError:
    """The word for an answer that ended too early."""
    return UpstreamError(
        "The provider's answer ended before it was whole.", code="upstream_truncated"
    )


def out_of_descriptors(error: BaseException) -> bool:
    """Whether `error` says that the process, or the machine, has no descriptor left."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


@contextlib.contextmanager
def busy_without_descriptors() -> Iterator[None]:
    """Turns a lack of descriptors into Busy."""
    try:
        yield
    except OSError as error:
        if out_of_descriptors(error):
            raise Busy("This worker has no free descriptor. Please try again.") from error
        raise
