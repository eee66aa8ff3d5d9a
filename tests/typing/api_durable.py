"""What type checkers infer for journals, and what they refuse. Read by them, never run."""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

from world import Flight, Trip, cancel_flight, reserve_flight

from pysagas import Outcome, Saga, SagaScope, Step, saga
from pysagas.durable import (
    Codec,
    Event,
    EventKind,
    Interrupted,
    Journal,
    JournalError,
    JSONCodec,
    MemoryJournal,
    RecordedError,
    Recovered,
    RecoveryReport,
    RunInfo,
    RunInProgress,
    RunInterrupted,
    RunState,
    SQLiteJournal,
)

booking = Saga([Step(reserve_flight, undo=cancel_flight)], name="booking", version="1")


@saga(name="book-trip", version="2")
async def book_trip(scope: SagaScope, trip: Trip) -> Flight:
    return await scope.step(reserve_flight, trip, undo=cancel_flight)


class OwnCodec:
    def encode(self, value: object) -> bytes:
        raise NotImplementedError

    def decode(self, data: bytes, kind: Any) -> Any:
        raise NotImplementedError


class HalfCodec:
    def encode(self, value: object) -> bytes:
        raise NotImplementedError


# --- opening ----------------------------------------------------------------------------------------


async def journals() -> None:
    async with SQLiteJournal("sagas.db") as journal:
        assert_type(journal, SQLiteJournal)
    SQLiteJournal(Path("sagas.db"), codec=OwnCodec(), synchronous="NORMAL", busy_timeout=5)
    memory = MemoryJournal(JSONCodec())
    assert_type(memory.in_next_process(), MemoryJournal)
    codec: Codec = OwnCodec()
    either: list[Journal] = [memory, journal, MemoryJournal(codec)]
    for one in either:
        assert_type(await one.run(book_trip, Trip(), run_id="1"), Outcome[Flight])


def refused_journals() -> None:
    SQLiteJournal()  # type: ignore[call-arg]
    SQLiteJournal(3)  # type: ignore[arg-type]
    SQLiteJournal("sagas.db", JSONCodec())  # type: ignore[call-arg]
    SQLiteJournal("sagas.db", synchronous="OFF")  # type: ignore[arg-type]
    SQLiteJournal("sagas.db", codec=HalfCodec())  # type: ignore[arg-type]
    MemoryJournal(HalfCodec())  # type: ignore[arg-type]
    Journal()  # type: ignore[abstract]


# --- runs -------------------------------------------------------------------------------------------


async def runs(journal: Journal) -> None:
    outcome = await journal.run(book_trip, Trip(), run_id="1", exceptions=(OSError,), on_crash="resume")
    assert_type(outcome, Outcome[Flight])
    assert_type(outcome.value, Flight)
    assert_type(await outcome.rollback(), Outcome[Flight])
    assert_type(await journal.run(booking, Trip(), run_id="2"), Outcome[None])
    assert_type(await journal.retry(book_trip, "1", exceptions=OSError), Outcome[Flight])


async def refused_runs(journal: Journal) -> None:
    await journal.run(book_trip, Trip())  # type: ignore[call-arg]
    await journal.run(book_trip, Trip(), run_id=3)  # type: ignore[arg-type]
    await journal.run(reserve_flight, Trip(), run_id="1")  # type: ignore[arg-type]
    await journal.run(book_trip, Trip(), run_id="1", on_crash="stop")  # type: ignore[arg-type]
    await journal.retry(book_trip)  # type: ignore[call-arg]
    journal.run(book_trip, Trip(), run_id="1")  # type: ignore[unused-coroutine]


# --- recovery ---------------------------------------------------------------------------------------


async def recovery(journal: Journal) -> None:
    report = await journal.recover([booking, book_trip], on_crash="resume", limit=10)
    assert_type(report, RecoveryReport)
    assert_type(report.ok, bool)
    assert_type(report.recovered, tuple[Recovered, ...])
    assert_type(report.in_progress, tuple[str, ...])
    for one in (*report.recovered, *report.failed, *report.left):
        assert_type(one.run_id, str)
        assert_type(one.saga, str)
        assert_type(one.state, RunState)
        assert_type(one.outcome, Outcome[Any] | None)
        assert_type(one.error, BaseException | None)
        one.state = RunState.FAILED  # type: ignore[misc]
    await journal.recover(saga for saga in (booking, book_trip))


async def refused_recovery(journal: Journal) -> None:
    await journal.recover()  # type: ignore[call-arg]
    await journal.recover(book_trip)  # type: ignore[arg-type]
    await journal.recover([reserve_flight])  # type: ignore[list-item]
    await journal.recover([book_trip], on_crash="stop")  # type: ignore[arg-type]
    await journal.recover([book_trip], "resume")  # type: ignore[call-arg]


# --- what is recorded ---------------------------------------------------------------------------------


async def records(journal: Journal) -> None:
    for info in await journal.runs(state=RunState.FAILED):
        assert_type(info, RunInfo)
        assert_type(info.version, str | None)
        assert_type(info.ended, float | None)
        assert_type(info.alive, bool)
    for event in await journal.history("1"):
        assert_type(event, Event)
        assert_type(event.kind, EventKind)
        assert_type(event.path, tuple[int, ...])
        assert_type(event.data, bytes)
    assert_type(await journal.prune(before=0.0), int)
    await journal.prune(0.0)  # type: ignore[call-arg]
    await journal.runs(state="failed")  # type: ignore[arg-type]


async def errors(journal: Journal) -> None:
    try:
        await journal.run(booking, Trip(), run_id="1")
    except RunInterrupted as error:
        assert_type(error.outcome, Outcome[Any] | None)
    except RunInProgress as error:
        journal_error: JournalError = error
        raise journal_error from None
    except RecordedError as error:
        assert_type(error.kind, str)
    except Interrupted as error:
        failure: Exception = error  # type: ignore[assignment]
        raise failure from None
