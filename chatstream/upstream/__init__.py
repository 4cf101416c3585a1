"""Where an answer comes from. Imported after the fork only.

Begin in `provider`, the call and its judgement. `dialling` connects so that a stop reaches it,
`pool` keeps connections, `body` reads an answer from its socket, `faults` maps foreign exceptions,
`threads` runs calls; `fetch` and `models` ask small questions.
"""
