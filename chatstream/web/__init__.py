"""The only Flask, with `cli`: mounts, routes, who asks, the page, the standalone app.

Begin in `extension`. `blueprint` says which routes there are, `routing` how one is entered.

Routes: `chat`, `sessions`, `health`, `metrics`; `openai_chat`, `openai_models`; `page`.
A request: `caller`, `tokens`, `cors` (who asks), `request` (what it says), `payload`.
An answer: `stream_response`, `replies`, `openai_replies`; `openapi` describes them all.
`standalone` is the app of `gunicorn wsgi:app`.
"""
