"""A run that has ended, as it is recorded: its outcome is given again, without anything being run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Literal, TypeVar, cast

from pysagas import (
    CompensationFailed,
    Outcome,
    Ran,
    Saga,
    SagaState,
    StepReport,
    StepState,
    TreeNode,
    attach_outcome,
)

from ._annotations import return_type
from ._codec import Codec, decode_error
from ._errors import Interrupted, RecordedError, RunInterrupted, SagaChanged
from ._events import BACK, Event, EventKind, relevant
from ._storage import Ending

__all__ = [
    "Recorded",
    "Reported",
    "compensated",
    "exception_types",
    "leaves",
    "left_in_doubt",
    "recalled",
    "taken_back",
    "value_type",
]

T = TypeVar("T")
AnySaga = Saga[..., Any]


class Recorded:
    """A run that has ended, as its outcome needs it; of a function the steps alone may be known."""

    def __init__(
        self,
        saga: str,
        run_id: str,
        reports: Callable[[], tuple[StepReport, ...]],
        tree: Callable[[], Iterable[TreeNode]] | None = None,
        times: Callable[[], Iterable[Ran]] | None = None,
    ) -> None:
        self.saga_name = saga
        self.run_id = run_id
        self.reports = reports
        self.tree = tree
        self.times = times


class Reported:
    """The run of an outcome, for another outcome of it."""

    __slots__ = ("_outcome",)

    def __init__(self, outcome: Outcome[Any]) -> None:
        self._outcome = outcome

    @property
    def saga_name(self) -> str:
        return self._outcome.saga

    @property
    def run_id(self) -> str:
        return self._outcome.run_id

    def reports(self) -> tuple[StepReport, ...]:
        return self._outcome.steps

    def tree(self) -> Iterable[TreeNode]:
        return self._outcome.tree

    def times(self) -> Iterable[Ran]:
        return self._outcome.times


def recalled(
    ending: Ending,
    events: Iterable[Event],
    codec: Codec,
    saga: Saga[..., T],
    run_id: str,
    exceptions: Any,
    take_back: Callable[[], Awaitable[Outcome[T]]],
) -> Outcome[T]:
    """Gives the outcome of a run that has ended, or raises what it raised.

    Args:
        ending: How it ended.
        events: What is recorded of it.
        codec: For results.
        saga: Its saga.
        run_id: Its name.
        exceptions: As for `Saga.run`.
        take_back: Takes it back, if it completed.
    """
    events = list(events)
    reports = _with_unreached(_reports(events, codec), saga)
    times = _times(events)
    run = Recorded(saga.name, run_id, lambda: reports, _tree_of(saga, events), lambda: times)
    state = SagaState[ending.state.name]
    if state is SagaState.COMPLETED:
        return Outcome(run, state, _value(ending.value, codec, saga, run_id), None, take_back)
    if ending.error is None:
        return compensated(saga.name, run_id, events, codec)
    error = decode_error(ending.error)
    outcome: Outcome[Any] = Outcome(run, state, None, error)
    if state is SagaState.FAILED and ending.error["type"].endswith(":CompensationFailed"):
        failures = [decode_error(failure) for failure in ending.error.get("failures", ())]
        began = ending.error.get("started_by")
        started_by = None if began is None else decode_error(began)
        error = CompensationFailed(saga.name, started_by, failures, outcome)
        outcome = Outcome(run, state, None, error)
        error.outcome = outcome
    if not ending.error["is_exception"]:
        raise taken_back(run_id, outcome) from None
    attach_outcome(error, outcome)
    expected = (*saga.exceptions, *exception_types(exceptions))
    if state is SagaState.COMPENSATED and all(isinstance(leaf, expected) for leaf in leaves(error)):
        return outcome
    raise error


def _tree_of(saga: AnySaga, events: Iterable[Event]) -> Callable[[], Iterable[TreeNode]] | None:
    """Gives the tree of a run, as its definition says; None where that is a function."""
    if saga.function is not None:
        return None
    commits = {event.path for event in events if event.kind is EventKind.COMMITTED}
    return lambda: (node._replace(passed=node.path in commits) for node in saga.tree)


def compensated(saga: str, run_id: str, events: Iterable[Event], codec: Codec) -> Outcome[Any]:
    """Gives the outcome of a run that was taken back by `Outcome.rollback`."""
    events = list(events)
    reports, times = _reports(events, codec), _times(events)
    run = Recorded(saga, run_id, lambda: reports, times=lambda: times)
    return Outcome(run, SagaState.COMPENSATED, None, None)


def _value(data: bytes, codec: Codec, saga: AnySaga, run_id: str) -> Any:
    kind = value_type(saga)
    try:
        return codec.decode(data, kind)
    except Exception as error:
        raise SagaChanged(
            f"the recorded value of run {run_id!r} of saga {saga.name!r}, "
            f"{data.decode(errors='replace')}, cannot be read as {kind!r}: {error}; has the type that "
            "the saga returns changed since?"
        ) from error


def taken_back(run_id: str, outcome: Outcome[Any] | None) -> RunInterrupted:
    """Makes the error of a run that was cut off: its process died, or it was cancelled."""
    cause = _why_cut_off(run_id, None if outcome is None else outcome.error)
    what = "the run has been taken back"
    if outcome is not None and outcome.state is SagaState.FAILED:
        what = "it had passed its commit, and what came after that was taken back; retry goes on from there"
        if any(step.state is StepState.COMPENSATION_FAILED for step in outcome.steps):
            what = "not everything could be taken back: its outcome says what is left"
    in_doubt = left_in_doubt(outcome)
    if in_doubt:
        steps = ", ".join(f"{step.name!r} at {step.path}" for step in in_doubt)
        what += f"; but nobody knows what came of {steps}: somebody has to look"
    error = RunInterrupted(f"{cause}, and {what}")
    error.outcome = outcome
    return error


def left_in_doubt(outcome: Outcome[Any] | None) -> tuple[StepReport, ...]:
    """Gives the steps of a run that had something to be taken back, and of which nobody knows whether."""
    if outcome is None or not outcome.in_doubt:
        return ()
    owed = {
        node.path for node in outcome.tree if node.undo is not None or node.compensation is not None
    }
    return tuple(step for step in outcome.in_doubt if step.path in owed)


def _why_cut_off(run_id: str, error: BaseException | None) -> str:
    cuts = [] if error is None else [leaf for leaf in leaves(error) if not isinstance(leaf, Exception)]
    if error is None or any(isinstance(leaf, Interrupted) for leaf in cuts):
        return f"the process of run {run_id!r} died"
    # What asyncio raises is unknown to a process that runs on Trio, and the other way round.
    names = {leaf.kind.rpartition(":")[2] for leaf in leaves(error) if isinstance(leaf, RecordedError)}
    names |= {type(leaf).__name__ for leaf in cuts}
    if names & {"CancelledError", "Cancelled"}:
        return f"run {run_id!r} was cancelled"
    return f"run {run_id!r} was ended by {', '.join(sorted(names))}"


def leaves(error: BaseException) -> Iterable[BaseException]:
    """Gives the exceptions in a group, in whatever depth; of any other, itself."""
    if isinstance(error, BaseExceptionGroup):
        for one in cast("BaseExceptionGroup[BaseException]", error).exceptions:
            yield from leaves(one)
    else:
        yield error


def exception_types(exceptions: Any) -> tuple[type[BaseException], ...]:
    """Gives what was given as one type, several, or none."""
    if exceptions is None:
        return ()
    return tuple(exceptions) if hasattr(exceptions, "__iter__") else (exceptions,)


def value_type(saga: AnySaga) -> Any:
    """Gives the type of what a saga returns."""
    return type(None) if saga.function is None else return_type(saga.function)


def _reports(events: Iterable[Event], codec: Codec) -> tuple[StepReport, ...]:
    """Gives the reports of the steps of a run that has ended, from its history."""
    events = list(events)
    reports: dict[tuple[int, ...], StepReport] = {}
    history, settled, _ = relevant(events)
    for event in history:
        said = event.said()
        if said is None:
            continue
        known = reports.get(event.path, StepReport(event.name, event.path, StepState.UNKNOWN))
        state, result = said.reported()
        known = known._replace(state=state)
        if result is not None:
            known = known._replace(result=codec.decode(result, Any))
        if said.error is not None:
            error = decode_error(said.error)
            if event.kind in BACK:
                known = known._replace(compensation_error=error)
            else:
                known = known._replace(error=error)
        reports[event.path] = known
    names = {event.path: event.name for event in events}
    for path in settled:
        # The function of an `on_rollback` has not begun anywhere in the history.
        known = reports.get(path, StepReport(names[path], path, StepState.UNKNOWN))
        reports[path] = known._replace(state=StepState.COMPENSATED)
    return tuple(reports[path] for path in sorted(reports))


def _with_unreached(reports: tuple[StepReport, ...], saga: AnySaga) -> tuple[StepReport, ...]:
    """Adds the steps that the run has never come to, as far as the definition tells them."""
    known = {report.path: report for report in reports}
    for node in saga.tree:
        if node.kind == "step" and node.path not in known:
            known[node.path] = StepReport(node.name, node.path, StepState.NOT_STARTED)
    return tuple(known[path] for path in sorted(known))


# What ends what began: an action, or a compensation. An action that was cut off where it had returned
# has two ends, of which the first counts.
_BEGINS: dict[EventKind, Literal["action", "compensation"]] = {
    EventKind.STARTED: "action",
    EventKind.COMPENSATING: "compensation",
}
_ENDS = {
    EventKind.DONE,
    EventKind.ANSWERED,
    EventKind.FAILED,
    EventKind.CUT_OFF,
    EventKind.COMPENSATED,
    EventKind.NOT_COMPENSATED,
}


def _times(events: Iterable[Event]) -> list[Ran]:
    """Gives when actions and compensations ran, those of earlier tries too."""
    times: list[Ran] = []
    open_at: dict[tuple[int, ...], int] = {}
    for event in events:
        if event.kind in _BEGINS:
            open_at[event.path] = len(times)
            times.append(Ran(event.path, _BEGINS[event.kind], event.at, None))
        elif event.kind in _ENDS and event.path in open_at:
            index = open_at.pop(event.path)
            times[index] = times[index]._replace(ended=event.at)
    return times
