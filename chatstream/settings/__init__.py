"""Every `CHATSTREAM_*` key, read once. Pure.

`table` has the keys with unit, default and check; `checks` what each kind of value takes.
"""
