"""A bus of one host: a directory of sockets and record locks.

`unix_bus` (claims, cancels, answers) stands on `names`, `seat`, `directory`, `record_locks`,
`locked_places`, `early_cancels`; `visitor` only looks.
"""
