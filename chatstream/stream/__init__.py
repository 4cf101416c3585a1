"""What a stream is, and its two movers. No foreign library.

Begin in `stream`. `forms` is how a client gets an answer, `outcome` how one ended, `sides` the
contracts with upstream, client and server; `iterable` and `detached` move its bytes; `transcript`
is what was sent as text, `tally` as a number of tokens.
"""
