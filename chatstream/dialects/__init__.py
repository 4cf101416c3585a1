"""How providers speak. Pure: no I/O, no threads, no clocks.

`base` is what every dialect has to know; `openai_chat` is one; `sse` turns bytes into whole events
and back; `estimate` says about how many tokens a text is.
"""
