"""How a run stands, in the words of the command."""

from __future__ import annotations

from enum import StrEnum

from pysagas.durable import RunInfo, RunState

__all__ = ["State", "saga_of", "state_of"]


class State(StrEnum):
    """How a run stands. A running one whose process is dead is said to be interrupted."""

    RUNNING = "running"
    INTERRUPTED = "interrupted"
    COMPLETED = "completed"
    COMPENSATED = "compensated"
    FAILED = "failed"


def state_of(info: RunInfo) -> State:
    if info.state is RunState.RUNNING and not info.alive:
        return State.INTERRUPTED
    return State(info.state.value)


def saga_of(info: RunInfo) -> str:
    return info.saga if info.version is None else f"{info.saga}, version {info.version}"
