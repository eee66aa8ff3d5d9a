"""What is tried: a trial to run, the places in it, and the faults that can be made there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import Enum
from inspect import signature
from typing import Any, Literal

from pysagas import Bound, Parallel, Saga, SagaError, Step

__all__ = [
    "CannotExplore",
    "Event",
    "Fault",
    "FaultKind",
    "InjectedFailure",
    "MakeTrial",
    "Place",
    "Plan",
    "Trial",
    "possible_faults",
]


class CannotExplore(SagaError):
    """A trial cannot be explored: the saga, or the state that its trial reads, does not allow it."""


class InjectedFailure(Exception):
    """The failure that is put in place of an action's or a compensation's own, unless a trial has another."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One run to be tried: a saga, what it is called with, and how to see what it changes.

    Attributes:
        saga: The saga, as data or as a function.
        args: What it is called with.
        kwargs: What it is called with by keyword.
        state: Reads all that the saga may change, from where it really is: called without
            arguments, async or not. What it returns is copied, compared by ``==`` and, where it
            differs, shown; so dicts, lists, sets, dataclasses of plain values serve best.
        failure: Makes the exception that a step is made to fail with, from a message. It matters
            where the saga treats one exception unlike another: a retry that waits for it, an
            ``except``.
    """

    saga: Saga[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    state: Callable[[], object] = field(kw_only=True)
    failure: Callable[[str], Exception] = field(default=InjectedFailure, kw_only=True)

    def __post_init__(self) -> None:
        """Refuses what cannot be tried.

        Raises:
            TypeError: The saga is none, the state cannot be called, or a failure cannot be made.
        """
        saga: object = self.saga
        if isinstance(saga, Step | Parallel | Bound | list | tuple):
            shown = "[...]" if isinstance(saga, list | tuple) else f"[{saga!r}]"
            raise TypeError(f"Trial: saga must be a Saga, not {saga!r}; write Saga({shown})")
        if not isinstance(saga, Saga):
            raise TypeError(
                f"Trial: saga must be a Saga, not {saga!r}; a block of open_saga is explored as a "
                "function: @saga async def trial(scope): ..."
            )
        for name in ("state", "failure"):
            if not callable(getattr(self, name)):
                raise TypeError(f"Trial: {name} must be callable, not {getattr(self, name)!r}")
        problem = _failure_problem(self.failure)
        if problem is not None:
            raise TypeError(
                f"Trial: failure must make an Exception from a message, and {self.failure!r} {problem}; "
                "write failure=NoAnswer, or failure=lambda message: NoAnswer(503, message)"
            )
        given: Any = self.args
        if not isinstance(given, tuple):
            written = f"{(*given,)!r}" if isinstance(given, list) else f"({given!r},)"
            raise TypeError(f"Trial: args must be a tuple, not {given!r}; write args={written}")
        kwargs: object = self.kwargs
        if not isinstance(kwargs, Mapping):
            raise TypeError(f"Trial: kwargs must be a dict of names and values, not {kwargs!r}")


def _failure_problem(failure: Any) -> str | None:
    if isinstance(failure, type) and not issubclass(failure, Exception):
        return "is no Exception"
    try:
        signature(failure).bind("message")
    except TypeError as error:
        return f"cannot be called with one: {error}"
    except ValueError:
        pass  # written in C, and says nothing of what it takes
    return None


MakeTrial = Callable[[], Trial | Awaitable[Trial] | AbstractAsyncContextManager[Trial]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a fault can be made: an action, or what takes it back.

    Attributes:
        kind: Which of the two.
        path: The step's place in the tree of the run.
        name: The step's name.
        retried: Whether it has a retry.
        declared: The step's ``not_applied`` types.
        shown: The name by which a person knows it; with the path, where several have one name.
    """

    kind: Literal["action", "compensation"]
    path: tuple[int, ...]
    name: str
    retried: bool = field(default=False, compare=False, repr=False)
    declared: tuple[type[Exception], ...] = field(default=(), compare=False, repr=False)
    shown: str = field(default="", compare=False, repr=False)

    def __str__(self) -> str:
        name = self.shown or self.name
        return name if self.kind == "action" else f"taking back {name}"


class FaultKind(Enum):
    """What goes wrong at a place."""

    FAILS_BEFORE = "fails before its effect"
    """It raises before its first line: nobody can know that it did nothing."""
    DECLINES = "declines"
    """It raises one of the step's ``not_applied`` types, before its first line."""
    CANCELLED = "cancelled"
    """The cancel scope around the run is cancelled while it waits at a checkpoint."""
    CANCELLED_NATIVELY = "cancelled natively"
    """The run's task is cancelled while it waits at a checkpoint, and again when the rollback begins.

    By ``task.cancel()``, on asyncio. Trio has nothing like it.
    """
    FAILS_AFTER = "fails after its effect"
    """It does all that it does, and then raises: the answer was lost."""
    RUNS_TWICE = "runs twice"
    """It is called a second time when it has ended, as by a service that answers no sooner."""
    KILLED_BEFORE = "killed before its effect"
    """The process is killed when it has been recorded as begun; then the run is recovered."""
    KILLED = "killed"
    """The process is killed while it waits at a checkpoint; then the run is recovered."""
    KILLED_AFTER = "killed after its effect"
    """The process is killed before its result is recorded; then the run is recovered."""

    @property
    def kills(self) -> bool:
        """Whether it ends the process."""
        return self in (FaultKind.KILLED_BEFORE, FaultKind.KILLED, FaultKind.KILLED_AFTER)


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        place: Where.
        kind: What.
        checkpoint: At which of its checkpoints, counted from 1; None for what is no cancellation. A
            checkpoint is where the coroutine really waits, for however short a time.
        error: What it declines with; None for the other kinds.
        once: At the first attempt only; otherwise at each.
    """

    place: Place
    kind: FaultKind
    checkpoint: int | None = None
    error: type[Exception] | None = None
    once: bool = False

    @property
    def what(self) -> str:
        """What goes wrong, in words."""
        once = "once, " if self.once else ""
        match self.kind:
            case FaultKind.CANCELLED | FaultKind.CANCELLED_NATIVELY | FaultKind.KILLED:
                return f"{self.kind.value} at checkpoint {self.checkpoint}"
            case FaultKind.DECLINES:
                assert self.error is not None
                return f"declines with {once}{self.error.__name__}"
            case FaultKind.FAILS_BEFORE if self.place.kind == "compensation":
                return "fails once" if self.once else "fails"
            case FaultKind.FAILS_BEFORE | FaultKind.FAILS_AFTER:
                return str(self.kind.value).replace("fails ", f"fails {once}")
            case _:
                return str(self.kind.value)

    def __str__(self) -> str:
        return f"{self.place}: {self.what}"

    def __repr__(self) -> str:
        return f"<Fault {self}>"


@dataclass(frozen=True, slots=True)
class Plan:
    """The faults of one run; a run that gets through them is made to fail at its end.

    So each run ends in a rollback.

    Attributes:
        faults: In the order in which they are met.
        commits: How many commits the run may pass. It is made to fail at the next one, or at its end.
    """

    faults: tuple[Fault, ...] = ()
    commits: int = 0

    @property
    def __name__(self) -> str:  # pytest takes the id of a parameter from here
        return str(self)

    def __str__(self) -> str:
        what = ", then ".join(map(str, self.faults)) or "no fault, taken back at its end"
        return f"{what} (past commit {self.commits})" if self.commits and not self.faults else what

    def __repr__(self) -> str:
        return f"<Plan {self}>"

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:  # asked by Hypothesis, as by IPython
        printer.text(repr(self))


EventKind = Literal["enter", "checkpoint", "done"]
# What was seen of a place: entered, at its n-th checkpoint, done.
Event = tuple[EventKind, Place, int]


def possible_faults(events: Iterable[Event], *, native: bool, kills: bool = False) -> Iterator[Fault]:
    """Gives each fault that could be made where something was seen of a place, once.

    Args:
        events: What was seen of a run, in its order.
        native: Whether tasks can be cancelled natively.
        kills: Whether the process may be killed.
    """
    for event, place, number in dict.fromkeys(events):
        repeats = (False, True) if place.retried else (False,)
        forward = place.kind == "action"
        if event == "enter" and number == 1:
            if kills:
                yield Fault(place, FaultKind.KILLED_BEFORE)
            for once in repeats:
                yield Fault(place, FaultKind.FAILS_BEFORE, once=once)
                for error in place.declared:
                    yield Fault(place, FaultKind.DECLINES, error=error, once=once)
        elif event == "checkpoint":
            yield Fault(place, FaultKind.CANCELLED, number)
            if native:
                yield Fault(place, FaultKind.CANCELLED_NATIVELY, number)
            if kills:
                yield Fault(place, FaultKind.KILLED, number)
        elif event == "done" and number == 1:
            # Where every failure is declared to mean that nothing was done, none can mean this.
            if forward and not issubclass(InjectedFailure, place.declared):
                for once in repeats:
                    yield Fault(place, FaultKind.FAILS_AFTER, once=once)
            yield Fault(place, FaultKind.RUNS_TWICE)
            if kills:
                yield Fault(place, FaultKind.KILLED_AFTER)
