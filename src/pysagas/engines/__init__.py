"""Running sagas on systems that carry them on when a machine is gone, an adapter each.

`pysagas.engines.restate` runs them on Restate. The sagas are those that run in memory and with a
journal.
"""
