"""The streams of one app in one process. Wiring: no socket, no JSON, no foreign library.

Begin in `service`. `hooks` is what an app says for itself, `registry` which streams live here,
`neighbours` the other workers, `lifetime` the way from a process's first stream to its last,
`lookout` the look at all clients, `advice` what an operator should know.
"""
