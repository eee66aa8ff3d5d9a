"""What type checkers infer for trials and explorations, and what they refuse. Read by them, never run."""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Literal, assert_type

from hypothesis import given
from hypothesis.strategies import SearchStrategy
from world import Flight, Trip, cancel_flight, note_trip, reserve_flight

from pysagas import Effect, Outcome, Saga, SagaScope, Step, open_saga, saga
from pysagas.testing import (
    CannotExplore,
    EffectsLedger,
    Fault,
    FaultKind,
    InjectedFailure,
    LedgerError,
    Place,
    Plan,
    Report,
    Result,
    Trial,
    explore,
    fault_plans,
    faults,
    virtual_time,
)
from pysagas.testing.conformance import (
    CHECKS,
    SAGAS,
    Ability,
    Check,
    CheckResult,
    ConformanceReport,
    Harness,
    OnCrash,
    Order,
    check,
)

booking = Saga([Step(reserve_flight, undo=cancel_flight)])


@saga
async def book_trip(scope: SagaScope, trip: Trip, *, class_: str = "economy") -> Flight:
    return await scope.step(reserve_flight, trip, undo=cancel_flight)


# --- trials -----------------------------------------------------------------------------------------


def read() -> dict[str, int]:
    return {}


async def read_later() -> list[str]:
    return []


def trial() -> Trial:
    Trial(booking, (Trip(),), state=read_later)
    Trial(saga=book_trip, args=(Trip(),), kwargs={"class_": "first"}, state=read, failure=OSError)
    return Trial(booking, args=(Trip(),), state=read, failure=lambda text: ValueError(text))


async def later() -> Trial:
    return trial()


@asynccontextmanager
async def opened() -> AsyncGenerator[Trial]:
    yield trial()


def refused_trials() -> None:
    Trial(booking)  # type: ignore[call-arg]
    Trial(reserve_flight, state=read)  # type: ignore[arg-type]
    Trial(open_saga(), state=read)  # type: ignore[arg-type]
    Trial(booking, Trip(), state=read)  # type: ignore[arg-type]
    Trial(booking, (), {}, read)  # type: ignore[call-arg]
    Trial(booking, state={})  # type: ignore[arg-type]
    Trial(booking, state=note_trip)  # type: ignore[arg-type]
    Trial(booking, state=read, failure=OSError())  # type: ignore[arg-type]
    Trial(booking, state=read, failure=KeyboardInterrupt)  # type: ignore[arg-type]
    trial().state = read  # type: ignore[misc]


# --- explorations -----------------------------------------------------------------------------------


def chosen(fault: Fault) -> bool:
    return fault.kind is not FaultKind.RUNS_TWICE


async def explorations() -> None:
    report = await explore(trial)
    assert_type(report, Report)
    assert_type(await explore(later, pairs=True, only=chosen, progress=False), Report)
    await explore(opened, [Plan(), Fault(Place("action", (0,), "a"), FaultKind.FAILS_AFTER)])
    await explore(trial, (plan for plan in faults(trial)), progress=None)
    # A report is its text.
    text: str = report
    assert_type(report.ok, bool)
    assert report.ok, report
    assert_type(report.saga, str)
    assert_type(report.notes, tuple[str, ...])
    assert_type(report.results, tuple[Result, ...])
    assert_type(report.failures, tuple[Result, ...])
    for result in report.failures:
        assert_type(result.plan, Plan)
        assert_type(result.ok, bool)
        assert_type(result.problem, str | None)
        assert_type(result.left, tuple[str, ...])
        assert_type(result.outcome, Outcome[Any] | None)
        assert_type(result.error, BaseException | None)
        assert_type(result.reported, bool)
        assert_type(result.reached, bool)
        result.problem = text  # type: ignore[misc]


def read_trial(name: str) -> Trial:
    raise LookupError(name)


async def refused_explorations() -> None:
    await explore(trial())  # type: ignore[arg-type]
    await explore(booking)  # type: ignore[arg-type]
    await explore(read_trial)  # type: ignore[arg-type]
    await explore(read)  # type: ignore[arg-type]
    await explore(trial, ["a: runs twice"])  # type: ignore[list-item]
    await explore(trial, [], True)  # type: ignore[call-arg]
    await explore(trial, only="a")  # type: ignore[arg-type]
    explore(trial)  # type: ignore[unused-coroutine]


# --- faults -----------------------------------------------------------------------------------------


def lists() -> None:
    plans = faults(trial, only=chosen, backend="trio", backend_options=virtual_time())
    assert_type(plans, list[Plan])
    for plan in plans:
        assert_type(plan.__name__, str)
        assert_type(plan.commits, int)
        assert_type(plan.faults, tuple[Fault, ...])
        for fault in plan.faults:
            assert_type(fault.what, str)
            assert_type(fault.kind, FaultKind)
            assert_type(fault.checkpoint, int | None)
            assert_type(fault.error, type[Exception] | None)
            assert_type(fault.once, bool)
            assert_type(fault.place.kind, Literal["action", "compensation"])
            assert_type(fault.place.path, tuple[int, ...])
            assert_type(fault.place.name, str)
            fault.once = True  # type: ignore[misc]
    faults(later)
    faults(opened)
    faults(trial, pairs=True)  # type: ignore[call-arg]
    Place("rollback", (0,), "a")  # type: ignore[arg-type]
    Fault(plans[0], FaultKind.DECLINES)  # type: ignore[arg-type]
    Plan(plans[0].faults[0])  # type: ignore[arg-type]


assert_type(fault_plans(trial, most=3, only=chosen), SearchStrategy[Plan])


@given(plan=fault_plans(opened))
def drawn(plan: Plan) -> None: ...


fault_plans(trial, most="3")  # type: ignore[arg-type]

# --- the ledger, and time ---------------------------------------------------------------------------


async def ledger() -> None:
    ledger = EffectsLedger()
    assert_type(ledger.snapshot(), tuple[str, ...])
    assert_type(ledger.history, list[str])
    assert_type(ledger.take_back("flight", key="1"), bool)
    ledger.make("flight", key=None)
    assert_type(ledger.step("flight", checkpoints=(0, 2), undo=True, shield=True), Step[..., str])
    watching = Saga([ledger.step("flight")], middleware=[ledger.watch])
    Trial(watching, state=ledger.snapshot)
    ledger.make("flight", "1")  # type: ignore[call-arg]
    ledger.step("flight", checkpoints=2)  # type: ignore[arg-type]
    ledger.step(3)  # type: ignore[arg-type]


def errors(effect: Effect) -> None:
    wrong: AssertionError = LedgerError(effect.name)
    injected: Exception = InjectedFailure("a: fails before its effect")
    refused: Exception = CannotExplore("has no steps")
    del wrong, injected, refused


assert_type(virtual_time(threshold=0.1), dict[str, Any])
virtual_time(0.1)  # type: ignore[call-arg]


# --- conformance ------------------------------------------------------------------------------------


class InMemory(Harness):
    name = "memory"
    lacks: Mapping[Ability, str] = {"journal": "nothing is recorded"}

    async def run(
        self,
        saga: Saga[..., Any],
        order: Order,
        *,
        run_id: str,
        exceptions: Any = (),
        on_crash: OnCrash = "rollback",
    ) -> Outcome[Any]:
        return await saga.run(order, exceptions=exceptions)

    async def cancel(self, run_id: str) -> None: ...

    async def start(
        self, saga: Saga[..., Any], order: Order, *, run_id: str, on_crash: OnCrash = "rollback"
    ) -> None: ...

    async def kill(self) -> None: ...


async def conformance() -> None:
    report = await check(InMemory(), [one for one in CHECKS if one.guarantee == "G1"])
    assert_type(report, ConformanceReport)
    assert_type(report.results, tuple[CheckResult, ...])
    assert_type(report.results[0].check, Check)
    assert_type(await CHECKS[0](InMemory()), CheckResult)
    assert_type(SAGAS, tuple[Saga[..., Any], ...])
    Harness()  # type: ignore[abstract]
