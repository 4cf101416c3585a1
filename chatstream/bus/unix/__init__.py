"""A bus of one host: a directory of sockets and record locks.

`unix_bus` (claims, cancels, answers) has a `membership` (its seat, taken anew where it is lost) and
`names` (the bytes it holds). They stand on `seat`, `directory`, `record_locks`, `locked_places`,
`early_cancels`; `visitor` only looks.
"""
