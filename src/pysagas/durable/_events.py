"""What a journal keeps of a run: an ordered history of its effects."""

from __future__ import annotations

import json
from collections.abc import Iterable
from enum import Enum
from typing import Any, NamedTuple

from pysagas import StepState

from ._codec import as_bytes

__all__ = [
    "BACK",
    "BAD_ENDS",
    "FROM_COMMIT",
    "Event",
    "EventKind",
    "Path",
    "Relevant",
    "RunInfo",
    "RunState",
    "Said",
    "below",
    "interruption",
    "relevant",
]

Path = tuple[int, ...]


class EventKind(Enum):
    """What happened. The values stand in the journal's file."""

    STARTED = "started"
    """An action is about to run."""
    DONE = "done"
    """It returned; the data is its result."""
    ANSWERED = "answered"
    """Its caller was given something else than it returned, by a retry or a middleware; the data is the
    state in which that left the step, its result, and the answer."""
    FAILED = "failed"
    """It raised; the data is the state in which that left the step, and the exception."""
    CUT_OFF = "cut off"
    """It was cancelled where it had done nothing, or had returned; the data is the state of the step."""
    JOINED = "joined"
    """All members of a group have ended well, and no cancellation cut that off; or all of a member."""
    BROKEN = "broken"
    """A group has failed, and no cancellation cut that off; its caller may go another way."""
    LEFT = "left"
    """A member of a group has ended otherwise: it failed, or was cancelled."""
    INTERRUPTED = "interrupted"
    """A recovery has come to the end of what was recorded, and from there takes the run back."""
    COMMITTED = "committed"
    """The point of no return was passed."""
    ROLLBACK = "rollback"
    """A rollback begins; the data is the last exception before it, for people."""
    COMPENSATING = "compensating"
    """A compensation is about to run."""
    COMPENSATED = "compensated"
    """It returned."""
    NOT_COMPENSATED = "not compensated"
    """It raised; the data is the exception."""
    RETRY = "retry"
    """A failed run is tried again, from what then still holds of its history: the data says from where."""


FROM_COMMIT = b"from its commit"
"""The data of a retry that carries a run on from its commit, when all that came after is taken back."""

BACK = {EventKind.COMPENSATING, EventKind.COMPENSATED, EventKind.NOT_COMPENSATED}
BAD_ENDS = {EventKind.LEFT, EventKind.BROKEN}
BACKWARD = {*BACK, *BAD_ENDS, EventKind.ROLLBACK, EventKind.INTERRUPTED}


class RunState(Enum):
    """How a run stands. The values stand in the journal's file."""

    RUNNING = "running"
    """Not ended: it runs somewhere, or its process died."""
    COMPLETED = "completed"
    """Carried out whole."""
    COMPENSATED = "compensated"
    """Everything was taken back."""
    FAILED = "failed"
    """Not everything was taken back: somebody has to look, and then `retry` it."""


class Said(NamedTuple):
    """What an event says of its step.

    Attributes:
        state: How the step stands.
        result: What its action returned, as recorded; None where it did not, or that is not recorded.
        error: What the action raised, or its compensation, as recorded; None where it did not.
        answer: What its caller was given in place of the result, as recorded; None for the result.
        typed: Whether the answer is of the type that the action returns.
    """

    state: StepState
    result: bytes | None = None
    error: dict[str, Any] | None = None
    answer: bytes | None = None
    typed: bool = True

    def reported(self) -> tuple[StepState, bytes | None]:
        """Gives state and result for a report: what was answered, and never run, is completed by that."""
        if self.state is StepState.NOT_STARTED and self.answer is not None:
            return StepState.COMPLETED, self.answer
        return self.state, self.result


class Event(NamedTuple):
    """One thing that happened in a run.

    Attributes:
        kind: What.
        path: The place in the tree of the run.
        name: Of the step, or of what is taken back.
        data: What the kind says; empty for the others.
        at: When, in seconds since the epoch.
    """

    kind: EventKind
    path: tuple[int, ...]
    name: str
    data: bytes = b""
    at: float = 0.0

    def said(self) -> Said | None:
        """Reads what it says of a step; None for what is no event of an action or a compensation."""
        match self.kind:
            case EventKind.STARTED:
                return Said(StepState.UNKNOWN)
            case EventKind.DONE:
                return Said(StepState.COMPLETED, self.data)
            case EventKind.ANSWERED | EventKind.FAILED:
                end = json.loads(self.data)
                result, answer = (
                    None if end.get(name) is None else as_bytes(end[name])
                    for name in ("result", "answer")
                )
                state = StepState(end["state"])
                return Said(state, result, end.get("error"), answer, end.get("typed", True))
            case EventKind.CUT_OFF:
                return Said(StepState(self.data.decode()))
            case EventKind.COMPENSATED:
                return Said(StepState.COMPENSATED)
            case EventKind.COMPENSATING:
                return Said(StepState.COMPENSATION_FAILED)
            case EventKind.NOT_COMPENSATED:
                return Said(StepState.COMPENSATION_FAILED, error=json.loads(self.data))
            case _:
                return None


class RunInfo(NamedTuple):
    """What a journal knows of a run, without its history.

    Attributes:
        run_id: The name of the run.
        saga: The name of its saga.
        version: The version of its saga; None where it has none.
        state: How it stands.
        started: When it started, in seconds since the epoch.
        ended: When it ended; None for one that has not.
        error: What it ended with, in words; None for one that completed, or has not ended.
        alive: Whether a process that lives has it in hand.
    """

    run_id: str
    saga: str
    version: str | None
    state: RunState
    started: float
    ended: float | None
    error: str | None
    alive: bool


class Relevant(NamedTuple):
    """What of a history still holds.

    Attributes:
        history: The events that are to be replayed.
        settled: The places that were taken back after one that could not be: that one is tried again
            before them, so they are met out of their order.
        carried_on: How often the run was carried on from its commit.
    """

    history: list[Event]
    settled: set[Path]
    carried_on: int


def relevant(events: Iterable[Event]) -> Relevant:
    """Gives what of a history still holds: all of it, unless the run was tried again.

    One that failed in its rollback goes on with that: what could not be taken back counts as not
    tried. One that is carried on from its commit begins anew there, since what came after was taken
    back.
    """
    history: list[Event] = []
    settled: set[Path] = set()
    carried_on = 0
    for event in events:
        if event.kind is not EventKind.RETRY:
            history.append(event)
        elif event.data == FROM_COMMIT:
            carried_on += 1
            commits = [i for i, known in enumerate(history) if known.kind is EventKind.COMMITTED]
            del history[commits[-1] + 1 :]
            settled &= {known.path for known in history}
        else:
            history = _to_retry(history, settled)
    return Relevant(history, settled, carried_on)


def _to_retry(history: list[Event], settled: set[Path]) -> list[Event]:
    """Leaves out what could not be taken back, and all that was taken back after it."""
    done = {event.path for event in history if event.kind is EventKind.COMPENSATED}
    if all(event.path in done for event in history if event.kind in BACK):
        return history
    # Past the last thing that went forward there is no order to keep: what was taken back there is
    # settled, and the rest is tried anew.
    forward = [index for index, event in enumerate(history) if event.kind not in BACKWARD]
    last = forward[-1] if forward else -1
    settled |= {event.path for event in history[last + 1 :] if event.kind is EventKind.COMPENSATED}
    kept: list[Event] = []
    # The places of the rollbacks that have begun, and of those in which something failed.
    begun: list[Path] = []
    failed: list[Path] = []
    for event in history[: last + 1]:
        path = event.path
        if event.kind is EventKind.ROLLBACK:
            begun.append(path)
            # One around a rollback that failed came of that.
            if any(below(other, path) for other in failed):
                failed.append(path)
                continue
        elif event.kind in BAD_ENDS and any(below(other, path) for other in failed):
            continue  # so did this
        elif event.kind in BACK:
            if path not in done:
                failed.append(next(place for place in reversed(begun) if below(path, place)))
                continue
            if any(below(path, place) for place in failed):
                settled.add(path)
                continue
        kept.append(event)
    # A member of a group may have begun before that, and ended after it.
    kept = [event for event in kept if event.kind not in BACK or event.path not in settled]
    return [*kept, Event(EventKind.INTERRUPTED, (), "retry")]


def interruption(saga: str, at: float) -> Event:
    """Makes the event that has a run taken back from there, whoever goes on with it."""
    return Event(EventKind.INTERRUPTED, (), saga, b"", at)


def below(path: Path, place: Path) -> bool:
    """Tells whether a path is that of a place, or of something in it."""
    return path[: len(place)] == place
