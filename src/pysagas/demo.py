"""The sagas of the demo, for ``pysagas recover --app pysagas.demo:app``."""

from ._demo import app

__all__ = ["app"]
