"""The import name of release 0.0.3; everything here is `pysagas`."""

from pysagas import Saga, SagaBuilder, Step
from pysagas import SagaError as SagaException

__all__ = ["Saga", "SagaBuilder", "SagaException", "Step"]
