"""What the routes refuse with: status, sentence, and the codes with what each of them means."""

from __future__ import annotations

from collections.abc import Mapping

Table = Mapping[int, tuple[str, Mapping[str, str]]]
"""By status: a sentence, and the codes with what each means."""

BEFORE: Table = {
    400: (
        "The request is not what it should be, or the provider rejected it.",
        {
            "bad_json": "the body is no JSON object, or broke off",
            "bad_messages": "messages is not a non-empty list of objects with a role",
            "bad_id": "sessionId or streamId has another form",
            "bad_number": "max_tokens or n is no whole number from 1 on, or too high",
            "model_not_allowed": "the model is none of those that may be asked",
            "upstream_rejected": "the provider rejected the request; its message",
        },
    ),
    401: ("The caller has no name.", {"unauthenticated": "log in first"}),
    409: (
        "The name is taken.",
        {"conflict": "the stream, or where so set the session, is live in some worker"},
    ),
    413: ("The body is too long.", {"too_large": "nothing of it was used"}),
    415: (
        "The body does not say that it is JSON.",
        {"unsupported_media_type": "send Content-Type: application/json"},
    ),
    429: (
        "The caller has as many answers running as it may, or the provider limits this service.",
        {
            "too_many_streams": "stop one of them first, or wait; with Retry-After",
            "upstream_rate_limited": "with the provider's Retry-After, if it gave one",
        },
    ),
    502: (
        "The provider failed.",
        {
            "upstream_connect": "no connection: name, address, TLS, proxy",
            "upstream_unreachable": "the provider closed without an answer",
            "upstream_error": "the provider failed (5xx)",
            "upstream_auth": "the provider refused the service's key (401, 403)",
            "upstream_not_stream": "a 200 that is no event stream, an encoded body, a redirect",
            "upstream_idle": "headers, and then nothing for too long",
            "upstream_truncated": "headers, and then the end",
            "event_too_large": "the first event has more than 1 MiB",
        },
    ),
    503: (
        "No room, or the worker is going away.",
        {
            "busy": "every slot is taken, or descriptors ran out; with Retry-After",
            "shutting_down": "the service is restarting",
        },
    ),
    504: (
        "It took too long.",
        {
            "upstream_timeout": "the provider sent no headers in time",
            "deadline": "the stream's deadline passed",
            "unconfirmed": "the session has streams in four workers, and all of them hang",
        },
    ),
}
"""Status, sentence and reasons of the refusals of a stream, before its first byte."""

AFTER = (
    *(reason for reason in BEFORE[502][1]),
    "upstream_timeout",
    "upstream_rate_limited",
    "upstream_rejected",
    "busy",
    "deadline",
    "shutting_down",
)
"""The codes that an `event: error` can have. With headers that come late, nearly all refusals."""

OPENAI_BEFORE: Table = {
    **BEFORE,
    400: (
        BEFORE[400][0],
        {
            **BEFORE[400][1],
            "bad_id": "X-Session-Id or X-Stream-Id has another form",
            "bad_stream": "stream is neither true nor false",
        },
    ),
    502: (
        BEFORE[502][0],
        {
            **BEFORE[502][1],
            "upstream_not_json": "for an answer in one piece: a 200 that is no JSON, or encoded",
            "answer_too_large": "an answer in one piece has more than 16 MiB",
        },
    ),
}
"""The same of OpenAI's route for an answer."""

OPENAI_MODELS: Table = {
    400: ("The provider rejected it.", {"upstream_rejected": "with its message"}),
    401: BEFORE[401],
    404: ("There is no list.", {"no_models": "the provider's address is not OpenAI's"}),
    429: (
        "The provider is limiting this service's rate.",
        {"upstream_rate_limited": BEFORE[429][1]["upstream_rate_limited"]},
    ),
    502: (
        "The provider failed.",
        {
            reason: OPENAI_BEFORE[502][1][reason]
            for reason in (
                "upstream_connect",
                "upstream_unreachable",
                "upstream_error",
                "upstream_auth",
                "upstream_not_json",
            )
        },
    ),
    503: ("Others ask for it.", {"busy": "two are being answered; with Retry-After"}),
    504: ("It took too long.", {"upstream_timeout": "or is too long"}),
}
"""The same of OpenAI's route for the models."""

FORBIDDEN = ("They are others'.", {"forbidden": "only an admin may"})
"""403, of the routes for who watches."""

AWAY = {"bus_unavailable": "the other workers cannot be reached; with Retry-After"}
"""503, of what asks the other workers."""
