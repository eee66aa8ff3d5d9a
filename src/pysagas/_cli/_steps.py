"""Reads a run's history as people ask about it: what became of each step?"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pysagas import StepState
from pysagas.durable import Event, EventKind, RunInfo

__all__ = [
    "CUT_STEP_COLUMNS",
    "STEP_COLUMNS",
    "StepLine",
    "error_text",
    "recorded_result",
    "step_lines",
    "step_rows",
]

# Begun, and no word of an end: so, if the process is dead, nobody knows.
OPEN = {EventKind.STARTED: "running", EventKind.COMPENSATING: "compensating"}
# What is no step: a line for each, since there may be several of one path.
MARKS = {
    EventKind.COMMITTED: ("commit", "passed"),
    EventKind.ROLLBACK: ("rollback", "begun"),
    EventKind.INTERRUPTED: ("interruption", "begun"),
    EventKind.RETRY: ("retry", "begun"),
}


@dataclass(slots=True)
class StepLine:
    """What the history says of one step; or of a commit, an interruption, a rollback, another try.

    Attributes:
        kind: Which of the five: step, commit, interruption, rollback, retry.
        path: The place in the tree of the run.
        name: Of the step.
        state: How it stands.
        started: When it began, in seconds since the epoch.
        last: When the last thing was recorded of it.
        result: What its action returned, as recorded; None where it did not.
        error: The last that it raised, in words; None where it did not.
        in_doubt: Whether it was begun, and nobody knows what came of it.
    """

    kind: str
    path: tuple[int, ...]
    name: str
    state: str
    started: float
    last: float
    result: bytes | None = None
    error: str | None = None
    in_doubt: bool = False


def step_lines(events: Iterable[Event], *, running: bool) -> list[StepLine]:
    """Gives a line for each step, in the order in which they began.

    Args:
        events: The history.
        running: Whether the run is under way, so that what has no end yet may still have one.
    """
    lines: dict[object, StepLine] = {}
    for event in events:
        kind, path, name, data, at = event
        if kind in MARKS:
            mark, state = MARKS[kind]
            cause = data.decode(errors="replace") or None
            lines[len(lines)] = StepLine(mark, path, name, state, at, at, error=cause)
            continue
        said = event.said()
        if said is None:
            continue
        line = lines.setdefault(path, StepLine("step", path, name, "", at, at))
        line.last = at
        if kind in OPEN:
            line.in_doubt = not running
            line.state = "unknown" if kind is EventKind.STARTED and not running else OPEN[kind]
        else:
            now, result = said.reported()
            line.state = now.value
            line.in_doubt = now is StepState.UNKNOWN
            if result is not None:
                line.result = result
            if said.error is not None:
                line.error = error_text(said.error)
        if kind is EventKind.STARTED:
            line.result = line.error = None
    return list(lines.values())


STEP_COLUMNS = ("PATH", "STEP", "STATE", "STARTED", "LAST", "RECORDED")
CUT_STEP_COLUMNS = ("STEP", "RECORDED")


def step_rows(info: RunInfo, lines: Iterable[StepLine]) -> list[tuple[str, ...]]:
    """Gives the cells of the table of a run's steps; times are seconds since it started."""
    return [
        (
            ".".join(map(str, line.path)) or "-",
            line.name if line.kind == "step" else f"({line.kind}) {line.name}",
            line.state,
            f"+{line.started - info.started:.2f} s",
            f"+{line.last - info.started:.2f} s",
            line.error or (line.result or b"-").decode(errors="replace"),
        )
        for line in lines
    ]


def error_text(recorded: dict[str, Any]) -> str:
    """Names a recorded exception."""
    name = recorded["type"].rpartition(":")[2]
    inner: Sequence[dict[str, Any]] = recorded.get("errors", ())
    text = "; ".join(map(error_text, inner)) or recorded["text"]
    return f"{name}: {text}" if text else name


def recorded_result(data: bytes) -> Any:
    """Reads a recorded result: JSON, or the text of what another codec wrote."""
    try:
        return json.loads(data)
    except ValueError:
        return data.decode(errors="replace")
