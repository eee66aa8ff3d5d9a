"""Watching sagas: ready-made observers, a module each, imported by who uses it.

`pysagas.observe.logging` writes lines of the standard ``logging``; `pysagas.observe.opentelemetry`
makes spans and metrics; `pysagas.observe.progress` draws a tree on the terminal;
`pysagas.observe.timing` lets outcomes tell how long what took.
"""
