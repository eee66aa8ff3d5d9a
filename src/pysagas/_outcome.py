"""What a run leaves behind: a frozen report of what happened, step by step."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from enum import Enum
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

from ._errors import CompensationFailed, SagaError, describe, describe_each, leaves, printable

__all__ = [
    "Outcome",
    "Ran",
    "SagaState",
    "StepReport",
    "StepState",
    "TreeNode",
    "attach_outcome",
    "outcome_of",
]

T_co = TypeVar("T_co", covariant=True)

_ATTRIBUTE = "__pysagas_outcome__"

# Columns are made as wide as what stands in them, but for one long name they are not.
_WIDEST_COLUMN = 48


class SagaState(Enum):
    """How a run ended. Closed: there will be no others."""

    COMPLETED = "completed"
    """Carried out whole."""
    COMPENSATED = "compensated"
    """Everything was taken back (but see `Outcome.in_doubt` for steps that could not be asked)."""
    FAILED = "failed"
    """Not everything was taken back: a compensation failed or did not run, or a commit was passed."""


class StepState(Enum):
    """How a step ended. Closed: there will be no others.

    An action that is still running counts as UNKNOWN: should the process stop here, that is what
    it would be.
    """

    NOT_STARTED = "not started"
    """Its action was never called."""
    COMPLETED = "completed"
    """Its action returned, and was not taken back."""
    NOT_APPLIED = "not applied"
    """Its action raised one of the step's ``not_applied`` types: it did nothing."""
    UNKNOWN = "unknown"
    """Its action was started and did not return: it may have taken effect, or not, or in part."""
    COMPENSATED = "compensated"
    """Its undo or compensation returned."""
    COMPENSATION_FAILED = "compensation failed"
    """Its undo or compensation was begun, and did not return."""


class StepReport(NamedTuple):
    """What happened to one step.

    Attributes:
        name: The step's name, or its action's.
        path: Its place in the tree of the run, the same in every run.
        state: How it ended.
        result: What its action returned; None where it did not.
        error: What its action raised; None where it did not.
        compensation_error: What its undo or compensation raised; None where it did not.
    """

    name: str
    path: tuple[int, ...]
    state: StepState
    result: object = None
    error: BaseException | None = None
    compensation_error: BaseException | None = None


class TreeNode(NamedTuple):
    """A place in the tree of a saga, or of a run: a step, or what holds steps.

    Attributes:
        kind: A step; a commit; or what holds others: a saga, a nested scope, a parallel group. A
            "part" holds others too: what it is, a journal that recalls the run does not say.
        name: Its name.
        path: Its place, the same in every run; that of a step is that of its report.
        compensation: The name of a step's compensation; None where it has none.
        undo: The name of a step's undo; None where it has none.
        passed: Of a commit, whether the run has passed it.
    """

    kind: Literal["step", "commit", "saga", "scope", "group", "part"]
    name: str
    path: tuple[int, ...]
    compensation: str | None = None
    undo: str | None = None
    passed: bool = False


class Ran(NamedTuple):
    """A stretch of time in which an action, or a compensation, ran.

    Attributes:
        path: The place of the step in the tree of the run.
        kind: Whether it went forward, or back: an undo is a compensation here, too.
        began: When it began, in seconds since the first of them in its run.
        ended: When it ended, by whatever. None where a journal recalls it and knows of no end: its
            process died, or it was cut off in doubt.
    """

    path: tuple[int, ...]
    kind: Literal["action", "compensation"]
    began: float
    ended: float | None

    @property
    def took(self) -> str:
        """How long that was, for people, in three digits: ``12.3 ms``, ``1.20 s``, ``2 min 05 s``."""
        if self.ended is None:
            return "end unknown"
        seconds = self.ended - self.began
        if seconds <= 0:  # a clock of the wall may have been set back meanwhile
            return "0 s"
        for units, unit in ((1e9, "ns"), (1e6, "µs"), (1e3, "ms")):
            if seconds * units < 999.5:
                return f"{seconds * units:#.3g} {unit}".replace(". ", " ")
        if seconds < 59.95:
            return f"{seconds:#.3g} s"
        minutes, seconds = divmod(round(seconds), 60)
        if minutes < 60:
            return f"{minutes} min {seconds:02} s"
        return f"{minutes // 60} h {minutes % 60:02} min"


_set = object.__setattr__


class _Ended(Protocol):
    """What an outcome asks of the run that it reports on."""

    @property
    def saga_name(self) -> str: ...

    @property
    def run_id(self) -> str: ...

    def reports(self) -> tuple[StepReport, ...]:
        """Reports on each step."""
        ...


class Outcome(Generic[T_co]):
    """The report of one run. It does not change; `rollback` gives a new one.

    Attributes:
        state: How the run ended.
        error: What ended it, the exception that the caller got; None for a completed run.
    """

    __slots__ = ("__weakref__", "_rollback", "_run", "_steps", "_times", "_value", "error", "state")

    state: SagaState
    error: BaseException | None
    _run: _Ended
    _steps: tuple[StepReport, ...] | None
    _times: tuple[Ran, ...]  # made together with the steps, and not there before
    _value: T_co
    _rollback: Callable[[], Awaitable[Outcome[T_co]]] | None

    def __init__(
        self,
        run: _Ended,
        state: SagaState,
        value: T_co,
        error: BaseException | None,
        rollback: Callable[[], Awaitable[Outcome[T_co]]] | None = None,
    ) -> None:
        _set(self, "state", state)
        _set(self, "error", error)
        _set(self, "_run", run)
        _set(self, "_steps", None)
        _set(self, "_value", value)
        _set(self, "_rollback", rollback)

    def __setattr__(self, name: str, value: object) -> None:
        """Refuses: an outcome is frozen."""
        raise AttributeError(f"an Outcome is frozen: {name!r} cannot be set")

    def __delattr__(self, name: str) -> None:
        """Refuses, as assignment does."""
        raise AttributeError(f"an Outcome is frozen: {name!r} cannot be deleted")

    @property
    def saga(self) -> str:
        """The name of the saga that ran."""
        return self._run.saga_name

    @property
    def run_id(self) -> str:
        """The name of this run: the caller's, or a random one."""
        return self._run.run_id

    @property
    def value(self) -> T_co:
        """What the saga returned; None for a saga built as data.

        Raises:
            BaseException: `error`, where the run did not complete.
            SagaError: The run was taken back by `rollback`.
        """
        if self.error is not None:
            raise self.error
        if self.state is not SagaState.COMPLETED:
            raise SagaError(f"saga {self.saga!r} was taken back by Outcome.rollback: it has no value")
        return self._value

    @property
    def steps(self) -> tuple[StepReport, ...]:
        """A report for each step, in the order of their paths.

        Steps of a saga built as data that were never reached are listed too. A function's steps
        are known only once it has called them. Made when first asked for, so that a run which
        nobody asks about does not pay for it.
        """
        steps = self._steps
        if steps is None:
            steps = self._run.reports()
            _set(self, "_times", _times(self._run, steps))
            _set(self, "_steps", steps)
        return steps

    @property
    def times(self) -> tuple[Ran, ...]:
        """When actions and compensations ran, in the order in which they began.

        Empty where nobody has looked at a clock: the middleware
        ``pysagas.observe.timing.record_times`` does, and a journal has done it for the runs that it
        recalls. An effect that ran several times is there as often.
        """
        _ = self.steps  # one look at the run, so that the two fit
        return self._times

    @property
    def tree(self) -> tuple[TreeNode, ...]:
        """All places in the run, in the order of their paths: the saga itself, groups, steps, commits.

        What holds others comes before them. Steps and what else was never reached is there as it is
        in `steps`.
        """
        make: Callable[[], Iterable[TreeNode]] | None = getattr(self._run, "tree", None)
        if make is None:  # a journal recalls the steps alone
            return tuple(_tree_of_steps(self.saga, self.steps))
        return tuple(make())

    @property
    def in_doubt(self) -> tuple[StepReport, ...]:
        """The steps that are UNKNOWN: started, not returned, and not taken back.

        A step that has neither a compensation nor an undo is listed too, since it may have had an
        effect, though nothing of it was to be taken back.
        """
        return tuple(step for step in self.steps if step.state is StepState.UNKNOWN)

    async def rollback(self) -> Outcome[T_co]:
        """Takes back a run that had succeeded.

        A second call changes nothing and gives the same outcome as the first; so does a call on a
        run that had not succeeded. Like every rollback it is not interrupted by cancellation, which
        is raised when it is over.

        Returns:
            A new outcome, COMPENSATED. This one stays as it is.

        Raises:
            CompensationFailed: Something could not be taken back. Its ``outcome`` is the new one.
            AlreadyCommitted: The run passed a commit; nothing has run.
            ScopeBusy: Another task is taking this run back at this moment.
        """
        if self._rollback is None:
            return self
        _ = self.steps  # the report of before, while it can still be made
        return await self._rollback()

    def __str__(self) -> str:
        """Gives the tree of the run, a line for each place.

        In it: the path, the name, the state, how long it took where that is known, what was raised.
        """
        return "\n".join(_lines(self))

    def __repr__(self) -> str:
        error = "" if self.error is None else f" error={self.error!r}"
        doubts = len(self.in_doubt)
        in_doubt = f" in_doubt={doubts}" if doubts else ""
        return f"<Outcome of saga {self.saga!r}: {self.state.name}{error}{in_doubt}>"


def _times(run: _Ended, steps: Iterable[StepReport]) -> tuple[Ran, ...]:
    """Gives when steps ran, as their run knows it, in order and since the first of them."""
    make: Callable[[], Iterable[Ran]] | None = getattr(run, "times", None)
    times = [] if make is None else list(make())
    if not times:
        return ()
    # A journal knows of some that are no part any more of a run that was tried again.
    known = {step.path for step in steps}
    ordered = sorted((ran for ran in times if ran.path in known), key=lambda ran: ran.began)
    return tuple(
        ran._replace(
            began=ran.began - ordered[0].began,
            ended=None if ran.ended is None else ran.ended - ordered[0].began,
        )
        for ran in ordered
    )


def _tree_of_steps(saga: str, steps: Iterable[StepReport]) -> Iterator[TreeNode]:
    yield TreeNode("saga", saga, ())
    around: set[tuple[int, ...]] = set()
    for step in steps:
        for depth in range(1, len(step.path)):
            path = step.path[:depth]
            if path not in around:
                around.add(path)
                yield TreeNode("part", "part", path)
        yield TreeNode("step", step.name, step.path)


def _lines(outcome: Outcome[object]) -> Iterator[str]:
    error = outcome.error
    # What could not be taken back stands beside its steps: here is what began it all.
    began = error.error if isinstance(error, CompensationFailed) else error
    after = "" if began is None else f", after {describe_each(began)}"
    yield f"saga {outcome.saga!r}: {outcome.state.value}{after}"
    reports = {step.path: step for step in outcome.steps}
    took = _took(outcome.times)
    rows: list[list[str]] = []
    for node in outcome.tree[1:]:
        state, errors = _state_and_errors(node, reports.get(node.path))
        path = ".".join(map(str, node.path))
        label = "  " * (len(node.path) - 1) + _label(node)
        rows.append([path, label, state, *([took.get(node.path, "")] if took else []), errors])
    widths = [min(_WIDEST_COLUMN, max(map(len, column))) for column in [*zip(*rows, strict=True)][:-1]]
    for *cells, errors in rows:
        columns = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        yield "  ".join(["", *columns, errors]).rstrip()
    if isinstance(error, CompensationFailed):
        # What failed beside the compensations: a time limit, or a middleware around the rollback.
        known = {id(report.compensation_error) for report in reports.values()}
        for failure in error.failures:
            if id(failure) not in known:
                yield f"  going back: {describe(failure)}"


def _label(node: TreeNode) -> str:
    if node.kind in ("saga", "group"):
        kind = "parallel" if node.kind == "group" else "saga"
        return kind if node.name == kind else f"{kind} {node.name!r}"
    return printable(node.name)


def _took(times: Iterable[Ran]) -> dict[tuple[int, ...], str]:
    """Says for each step how long its action took, and taking it back."""
    words: dict[tuple[int, ...], str] = {}
    for ran in times:
        took = ran.took if ran.kind == "action" else f"back {ran.took}"
        words[ran.path] = f"{words[ran.path]}, {took}" if ran.path in words else took
    return words


def _state_and_errors(node: TreeNode, report: StepReport | None) -> tuple[str, str]:
    if report is None:
        return ("passed" if node.passed else "not passed") if node.kind == "commit" else "", ""
    errors = [] if report.error is None else [describe(report.error)]
    if report.compensation_error is not None:
        errors.append(f"going back: {describe(report.compensation_error)}")
    return report.state.value, "; ".join(errors)


def attach_outcome(error: BaseException, outcome: Outcome[object]) -> None:
    """Lets `outcome_of` find the outcome from the exception that is about to be raised."""
    # To the leaves too: `except*` makes a new group of them, and keeps no attributes of this one.
    for one in (error, *leaves(error)):
        # Not setattr: an exception class may be a frozen dataclass.
        BaseException.__setattr__(one, _ATTRIBUTE, outcome)


def outcome_of(error: BaseException) -> Outcome[object] | None:
    """Gives the outcome of the saga that raised `error`, the outermost one that did.

    A group that ``except*`` made of a saga's failure is known by what it holds.

    Returns:
        The outcome; None where no saga raised it.
    """
    for one in (error, *leaves(error)):
        outcome: Outcome[object] | None = one.__dict__.get(_ATTRIBUTE)
        if outcome is not None:
            return outcome
    return None
