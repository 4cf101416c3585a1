"""Who is told. It listens: no stream waits for it, and what it raises ends none.

`signals` is what an app can listen to, `announcer` who tells them, with the log's lines;
`log_format` how lines look, `tracing` a span for each stream, `metrics` figures for Prometheus.
"""
