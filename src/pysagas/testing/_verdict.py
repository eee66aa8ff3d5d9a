"""Whether everything is as it should be after a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from anyio import get_cancelled_exc_class

from pysagas import CompensationFailed, Outcome, SagaState, StepReport, StepState

from ._faults import CannotExplore, Fault, FaultKind
from ._report import Result, differences
from ._run import TrialRun

__all__ = ["UNKNOWN", "all_differences", "judge", "same", "suspecting"]

UNKNOWN = object()


def judge(run: TrialRun, once: object) -> Result:
    """Says whether everything is as it should be after a run.

    Args:
        run: What was seen.
        once: The state in which a run without a fault comes to its end; UNKNOWN where that is not
            the same each time.
    """
    result = Result(run.plan, outcome=run.outcome, error=run.error)
    if run.overdue is not None:
        return replace(result, problem=run.overdue)
    if isinstance(run.error, CannotExplore):
        return replace(result, problem=str(run.error))
    missed = [fault for fault in run.plan.faults if fault not in run.happened]
    if missed:
        # What comes second in a group is the loop's choice; the first fault must happen.
        if len(missed) == len(run.plan.faults) or not run.groups:
            left = tuple(all_differences(run.before, run.after))
            passed_by = f"the planned fault did not happen: {missed[0]}"
            return replace(result, problem=passed_by, left=left, tried=bool(left))
        result = replace(result, reached=False)
    outcome = run.outcome
    if outcome is None:
        return replace(result, problem=f"the run ended without an outcome, by {run.error!r}")
    reports = {report.path: report for report in outcome.steps}
    for fault, error in run.happened.items():
        report = reports.get(fault.place.path)
        problem = _evidence(run, fault, error, report) or _swallowed(run, fault)
        if problem is not None:
            return replace(result, problem=problem)
    failed = [report for report in outcome.steps if report.state is StepState.COMPENSATION_FAILED]
    planned = {
        fault.place.path: error
        for fault, error in run.happened.items()
        if fault.place.kind == "compensation" and error is not None
    }
    if any(report.path in planned for report in failed):
        # Not everything can be restored then; but that has to be told.
        told = run.error.failures if isinstance(run.error, CompensationFailed) else ()
        named = any(report.compensation_error in told for report in failed if report.path in planned)
        if outcome.state is not SagaState.FAILED or not named:
            return replace(result, problem=f"a compensation failed, but the caller got {run.error!r}")
        return replace(result, reported=True, outcome=None, error=None)
    left = tuple(all_differences(run.before, run.after))
    if failed:
        problem = f"taking back {failed[0].name} failed: {failed[0].compensation_error!r}"
        return replace(result, problem=problem, left=left)
    if left:
        return _not_taken_back(result, run, outcome, left)
    if run.ended is not None and _only_repeated(run, reports):
        left = () if once is UNKNOWN else tuple(all_differences(once, run.at_end))
        if left:
            names = ", ".join(str(fault.place) for fault in run.happened)
            problem = f"{names}: done twice, it leaves something else than done once"
            return replace(result, problem=problem, left=left)
    # Of what is as it should be, nothing is kept: there may be many thousands.
    return replace(result, outcome=None, error=None)


def same(one: Any, other: Any) -> bool:
    """Compares two states.

    Raises:
        CannotExplore: They cannot be compared.
    """
    try:
        return bool(one == other)
    except Exception as error:
        raise CannotExplore(
            f"the trial's states cannot be compared by ==: {error!r}; let it return plain values"
        ) from error


def all_differences(one: object, other: object) -> Iterator[str]:
    """Says where two states differ, if they do."""
    if not same(one, other):
        # They may differ in something that is not shown, such as an order.
        yield from list(differences(one, other)) or [f"was {one!r}, is {other!r}"]


def _evidence(
    run: TrialRun, fault: Fault, error: Exception | None, report: StepReport | None
) -> str | None:
    """Says why a fault cannot have happened where it was planned, by the saga's own report."""
    place = fault.place
    if report is None or report.name != place.name:
        return f"{fault}: the saga's report has no such step at {place.path}, but {report}"
    reported = report.error if place.kind == "action" else report.compensation_error
    again = run.entered(place) > 1  # a retry, or a middleware, has tried once more
    # Another process reads it from the journal, which may have less of it; or is in doubt, without it.
    as_made = reported is not None if fault in run.died else reported is error
    if error is not None and not as_made and not again:
        return f"{fault}: the saga's report has {reported!r} instead"
    return None


def _swallowed(run: TrialRun, fault: Fault) -> str | None:
    """Says that a cancellation did not reach the caller."""
    if fault in run.died:
        return None  # so did who was cancelled
    forward = fault.place.kind == "action"
    if fault.kind is FaultKind.CANCELLED:
        # A scope that is cancelled during a rollback does not interrupt it, and need not be met;
        # nor is it where another fault ends the run first, in an action that shields itself.
        to_be_met = forward and not any(run.happened.values())
    else:
        to_be_met = fault.kind is FaultKind.CANCELLED_NATIVELY
    expected = (get_cancelled_exc_class(), CompensationFailed)
    # One that has come to its end has swallowed it, whatever the second one did.
    went_on = forward and run.ended is not None
    if to_be_met and (went_on or not isinstance(run.error, expected)):
        how = "went on to its end" if went_on else f"ended with {run.error!r}"
        return f"the cancellation was swallowed: the run {how}"
    return None


def _only_repeated(run: TrialRun, reports: dict[tuple[int, ...], StepReport]) -> bool:
    """Tells whether all that went wrong is that actions were done again, and then were done."""
    return bool(run.happened) and all(
        fault.place.kind == "action"
        and (fault.kind is FaultKind.RUNS_TWICE or fault.once)
        and reports[fault.place.path].error is None
        for fault in run.happened
    )


def _not_taken_back(
    result: Result, run: TrialRun, outcome: Outcome[Any], left: tuple[str, ...]
) -> Result:
    """Says what is left, and whose that may be."""
    doubts = [step.name for step in outcome.in_doubt]
    # All has been taken back that can be, so these have nothing to be taken back by.
    bare = [
        step.name
        for step in outcome.steps
        if step.state is StepState.COMPLETED and step.path[0] >= run.committed
    ]
    whose: list[str] = []
    if doubts:
        whose.append(f"in doubt, and not compensated: {', '.join(doubts)}")
    if bare:
        has = "has" if len(bare) == 1 else "have"
        whose.append(f"{', '.join(bare)} completed, and {has} no compensation")
    problem = "; ".join(["not taken back", *whose])
    return replace(result, problem=problem, left=left, suspected=bool(whose))


def suspecting(result: Result, run: TrialRun) -> Result:
    """Adds who was the first to leave something, as well as that can be told.

    Args:
        result: Of a run without a fault.
        run: The same again, with a look at the state before and after each call.
    """
    for path, (name, begun, ended) in run.looks_back.items():
        if run.groups or path not in run.looks:
            break  # members change the state together; and nobody knows what `on_rollback` is for
        before, after = run.looks[path]
        if not same(after, begun):
            whose = f"something that is no step has changed it after {name}"
        elif not same(before, ended):
            whose = f"what takes back {name} has left something"
        else:
            continue
        return replace(result, problem=f"{result.problem}; {whose}", suspected=True)
    return result
