"""A bus through a Redis server; needs redis-py, so nothing imports it but when its URL is set.

From the ground up, each on those before it: `keys` (what is called what), `server`, `scripts`,
`entries` (what stands in Redis), `mail`, `listener` (its thread), `redis_bus` (claims and cancels),
`visitor`, which only looks.
"""
