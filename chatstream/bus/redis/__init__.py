"""A bus through a Redis server; needs redis-py, so nothing imports it but when its URL is set.

`redis_bus` (claims and cancels) stands on `keys`, `server`, `scripts`; `visitor` only looks.
"""
