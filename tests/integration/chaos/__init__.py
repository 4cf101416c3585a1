"""Many streams through everything that can befall them, from a seed; then the invariants.

`plan` decides, `stage` is where it happens, `visit` is one client, `run` carries a plan out, and
`judge` says what must be true, by the `evidence` of the logs and the provider.
"""
