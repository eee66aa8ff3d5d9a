"""What can go wrong between a program and the engine that runs its sagas."""

from __future__ import annotations

from pysagas import SagaError

__all__ = ["EngineError", "EngineUnavailable"]


class EngineError(SagaError):
    """The engine refused what was asked of it, or cannot do it."""


class EngineUnavailable(EngineError):
    """The engine does not answer. Asking again, under the same run id, is harmless."""
