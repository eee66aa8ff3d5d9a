"""The words in which tests speak of sagas: a tree, faults that are planned for it, what comes of it."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Step:
    """An action with an effect of two halves; one that cannot be taken back has no effect: it reads."""

    name: str
    compensation: bool = True
    undo: bool = False
    not_applied: bool = False
    # Or "sync", "shield", "blocking"; or "noted": done by a function itself, told to `on_rollback`.
    style: str = "async"
    arguments: str = "run"  # or "own", "keywords"
    # Checkpoints before the effect, between its halves, after it; and of the way back: before, after.
    pace: tuple[int, int, int] = (0, 0, 0)
    back_pace: tuple[int, int] = (0, 0)
    # The function that calls this catches its failure, and goes on.
    catch: bool = False
    # Whether there is a time limit for the action, and for the way back; whether each is tried twice.
    timeout: bool = False
    back_timeout: bool = False
    retry: bool = False
    back_retry: bool = False


@dataclass(frozen=True)
class Seq:
    """A saga; as a part of a function it may be a nested scope instead."""

    parts: tuple[Part, ...]
    stop: bool = False  # on_compensation_failure="stop"
    nested: bool = False
    catch: bool = False
    rollback_timeout: bool = False  # for the outermost


@dataclass(frozen=True)
class Par:
    """A group."""

    members: tuple[Part, ...]
    limit: int | None = None
    finish: bool = False
    catch: bool = False


@dataclass(frozen=True)
class Commit:
    """The point of no return."""


@dataclass(frozen=True)
class Raise:
    """A function fails by itself, between its calls."""

    catch: bool = False


Part = Step | Seq | Par | Commit | Raise


class Fault(NamedTuple):
    """What goes wrong: in the action of a step or in its way back, at a checkpoint or a place."""

    step: str
    phase: str  # "action", "back"
    # "fail", "decline", "quit", "hang"; or a cancellation: "scope", "native", "native twice", or
    # "call": of a scope around the call alone, so that the function goes on.
    kind: str
    at: int | str  # the number of a checkpoint for a cancellation; else "before", "halfway", "after"
    once: bool = False  # in the first attempt only


class Event(NamedTuple):
    """What was seen. An attempt at an action: start (or again), tick, first, second, and how it ended.

    Of a way back: undo or compensate (or again), tick, removed, and how it ended, with "back" before.
    """

    what: str
    step: str


class Together(NamedTuple):
    """Histories of which the events may interleave."""

    lines: list[History]


class Ended(NamedTuple):
    """How a part ended, and whose doing it was; of a group, the members that failed."""

    how: str  # "done", "failed", "cancelled", "compensation failed", "quit"
    reason: Part
    members: tuple[Ended, ...] = ()


History = list[Event | Together]
Plan = tuple[Fault, ...]
CANCELS = {"scope", "native", "native twice", "call"}
# Kinds of faults, and how what they meet ends. A time limit makes a failure of a hanging one.
HOW = {"fail": "failed", "decline": "declined", "quit": "quit", "hang": "timed out"}
FAILURES = {"failed", "declined", "timed out"}
RAN_OUT = "cut off"
PLACES = {"before", "halfway", "after"}


def script(step: Step, phase: str) -> Iterator[int | str]:
    """Gives what an action or its way back does: checkpoints by number, effects, places to fail."""
    if step.style == "noted" and phase == "action":
        return
    has_effect = step.compensation or step.undo
    paces = step.pace if phase == "action" else (*step.back_pace, 0)
    effects = ("first", "second", "") if phase == "action" else ("removed", "", "")
    places = ("before", "halfway", "after") if phase == "action" else ("before", "after", "")
    number = 0
    for pace, place, effect in zip(paces, places, effects, strict=True):
        yield from range(number, number + pace)
        number += pace
        if place:
            yield place
        if effect and has_effect:
            yield effect


def inner_parts(part: Part) -> tuple[Part, ...]:
    """Gives the direct parts, in order."""
    return part.parts if isinstance(part, Seq) else part.members if isinstance(part, Par) else ()


def steps_of(part: Part) -> Iterator[Step]:
    """Gives the steps, in the order of their paths."""
    if isinstance(part, Step):
        yield part
    for inner in inner_parts(part):
        yield from steps_of(inner)


def parts_of(part: Part) -> Iterator[Part]:
    """Gives a part, and all that is in it."""
    yield part
    for inner in inner_parts(part):
        yield from parts_of(inner)


def holds(part: Part, names: Container[str]) -> bool:
    """Tells whether one of these steps is in a part."""
    return any(step.name in names for step in steps_of(part))


def fork(line: History, group: Par) -> Iterator[tuple[Part, History]]:
    """Gives each member of a group a line of its own, beside those of the others."""
    together = Together([[] for _ in group.members])
    line.append(together)
    return zip(group.members, together.lines, strict=True)
