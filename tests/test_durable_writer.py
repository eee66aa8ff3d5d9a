"""The thread that writes: what is in one commit, who waits for it, and what its failure takes along."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import trio
from anyio import create_task_group, fail_after, wait_all_tasks_blocked
from conftest import ASYNCIO
from helpers import TRIO

from pysagas.durable import JournalError
from pysagas.durable._batch import Batch, Job
from pysagas.durable._records import End, Many, prepare_put
from pysagas.durable._writer import FEW, Writer

pytestmark = pytest.mark.anyio

ENOUGH = 30  # seconds, within which what hangs is found to hang
TABLES = (
    "CREATE TABLE IF NOT EXISTS records (run, seq, events, PRIMARY KEY (run, seq))",
    "CREATE TABLE IF NOT EXISTS runs (id INTEGER PRIMARY KEY, state, value BLOB, error, ended, owner)",
)


class Disk:
    """A database, and what was done to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.statements: list[str] = []
        self.threads: set[str] = set()
        self.closed = 0
        self.woken = 0
        self.under_way = 0

    def connect(self) -> sqlite3.Connection:
        self.threads.add(threading.current_thread().name)
        connection = sqlite3.connect(self.path, timeout=0, isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")  # so that who looks keeps nobody from writing
        for table in TABLES:
            connection.execute(table)
        prepare_put(connection)
        connection.set_trace_callback(self.note)
        return connection

    def note(self, statement: str) -> None:
        if self.statements[-1:] != [statement]:  # it is told again of each that a trigger makes of it
            self.statements.append(statement)

    def close(self, connection: sqlite3.Connection) -> None:
        self.threads.add(threading.current_thread().name)
        connection.close()
        self.closed += 1

    def writer(self) -> Writer:
        writer = Writer(self.connect, self.close, encode, "journal here", lambda: self.under_way)
        call_soon = writer._loop.call_soon

        def count(*call: Any) -> None:
            self.woken += 1
            call_soon(*call)

        writer._loop.call_soon = count
        return writer

    def commits(self) -> int:
        """How many transactions there were; a statement that is in none is one by itself."""
        commits, within = 0, False
        for statement in self.statements:
            within = not within if statement.startswith(("BEGIN", "COMMIT", "ROLLBACK")) else within
            commits += not within and statement != "ROLLBACK"
        return commits

    def numbers(self) -> list[int]:
        """Which events there are, in the order in which they were written."""
        with closing(sqlite3.connect(self.path)) as connection:
            records = connection.execute("SELECT events FROM records ORDER BY rowid")
            return [number for (events,) in records for _, (number,), *_ in json.loads(events)]

    def records(self) -> int:
        """How many rows there are."""
        with closing(sqlite3.connect(self.path)) as connection:
            (number,) = connection.execute("SELECT count(*) FROM records").fetchone()
        return number


@pytest.fixture
def disk(tmp_path) -> Disk:
    return Disk(tmp_path / "rows.db")


@asynccontextmanager
async def running(disk: Disk) -> AsyncIterator[Writer]:
    """A writer whose first batch, in which it was opened, is not counted."""
    writer = disk.writer()
    await writer.start()
    disk.statements.clear()
    disk.woken = 0
    try:
        with fail_after(ENOUGH):
            yield writer
    finally:
        await writer.stop()


@asynccontextmanager
async def busy(writer: Writer) -> AsyncIterator[None]:
    """A batch is being written for the length of the block."""
    began, go = threading.Event(), threading.Event()

    def work(_: sqlite3.Connection) -> None:
        began.set()
        assert go.wait(ENOUGH)

    async with create_task_group() as tasks:
        tasks.start_soon(writer.call, work)
        await anyio.to_thread.run_sync(began.wait)
        try:
            yield
        finally:
            go.set()


REMEDY = "when that is mended, recover() goes on from what it holds"


def event(number: int) -> Any:
    """An event that is known again."""
    return ("started", (number,), "a", 0.0)


def encode(records: object) -> str:
    return json.dumps(records)


NO_TEXT: Any = ("started", (0,), "\ud800", 0.0)


async def strict(disk: Disk) -> Writer:
    """A writer that refuses names which are no text."""
    writer = disk.writer()
    writer._encode = lambda records: json.dumps(records, ensure_ascii=False).encode().decode()
    await writer.start()
    return writer


async def write(writer: Writer, function: Any) -> Any:
    """Calls a function that writes, which nothing cancels."""
    result, late = await writer.call_surely(lambda connection, _: [function(connection)], None)
    assert late is None
    return result


async def write_together(writer: Writer, work: Any, row: int, **options: bool) -> Any:
    """Calls it for this row and for those of others."""
    result, late = await writer.call_surely(work, row, together=True, **options)
    assert late is None
    return result


async def submit(
    writer: Writer, number: int, errors: list[JournalError] | None = None, run: int = 1
) -> None:
    writer.append(run, event(number))
    try:
        await writer.flush(run)
    except JournalError as error:
        assert errors is not None
        errors.append(error)


def insert(connection: sqlite3.Connection, number: int) -> int:
    connection.execute("INSERT INTO records VALUES (1, ?, ?)", (number, encode([event(number)])))
    return number


# --- batches ------------------------------------------------------------------------------------


async def test_d7_what_comes_while_a_batch_is_written_is_the_next_batch(disk):
    """Rows of many tasks that come during a commit are on disk by one commit, in their order (D7)."""
    async with running(disk) as writer:
        async with create_task_group() as tasks:
            async with busy(writer):
                for number in range(50):
                    writer.append(1, event(number))
                    tasks.start_soon(flush, writer, 1)
                await wait_all_tasks_blocked()
                assert disk.numbers() == []

        assert disk.numbers() == list(range(50))
        assert disk.commits() == 2  # that of the batch in whose time they came, and theirs


async def test_d7_waiters_are_woken_once_a_batch(disk):
    """However many wait for a batch, the thread calls into the event loop once for it (D7)."""
    async with running(disk) as writer:
        async with create_task_group() as tasks:
            async with busy(writer):
                for number in range(50):
                    tasks.start_soon(submit, writer, number)
                    tasks.start_soon(writer.call, len_of_nothing)
                await wait_all_tasks_blocked()
                assert disk.woken == 0

        assert disk.woken == 2


def len_of_nothing(_: sqlite3.Connection) -> int:
    return 0


async def test_d7_one_after_the_other_each_waits_for_its_own_commit(disk):
    """What is waited for one by one is not put off: there is a commit for each (D7)."""
    async with running(disk) as writer:
        for number in range(5):
            await submit(writer, number)
            assert disk.numbers() == list(range(number + 1))

        assert (disk.commits(), disk.woken) == (5, 5)


async def test_d7_a_flush_with_nothing_to_write_returns_at_once(disk):
    """Where nothing was taken since, a flush waits for nothing, and nothing is committed (D7)."""
    writer = disk.writer()
    await writer.flush(1)  # it does not even run
    async with running(disk) as writer:
        await writer.flush(1)
        await submit(writer, 0)
        commits = disk.commits()
        for _ in range(3):
            await writer.flush(1)

        assert disk.commits() == commits == 1


async def test_d7_a_cancelled_flush_leaves_its_rows_to_be_written(disk):
    """Who is cancelled while it waits takes back nothing: its rows are written with their batch (D7)."""
    async with running(disk) as writer:
        async with busy(writer), create_task_group() as tasks:
            tasks.start_soon(submit, writer, 0)
            await wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        await writer.flush(1)

        assert disk.numbers() == [0]


async def test_a_job_comes_after_the_rows_that_were_taken_before_it(disk):
    """A function finds the rows that were taken before it, in its transaction, and gives its result."""

    def count(connection: sqlite3.Connection) -> Any:
        assert connection.in_transaction
        return connection.execute("SELECT sum(json_array_length(events)) FROM records").fetchone()

    async with running(disk) as writer:
        writer.append(1, event(0))
        writer.append(1, event(1))
        assert await writer.call(count) == (2,)
        assert await write(writer, partial(insert, number=2)) == 2
        assert disk.numbers() == [0, 1, 2]


async def test_all_work_is_done_on_one_thread(disk):
    """The database is opened, used and closed on one thread, and that is not the event loop's."""
    async with running(disk) as writer:
        disk.threads.add(await writer.call(lambda _: threading.current_thread().name))

    assert disk.threads == {"pysagas journal"}
    assert disk.closed == 1


async def test_d7_what_a_batch_has_of_a_run_is_one_record(disk):
    """A run that does many things at once costs one row a commit, and its events keep their order (D7)."""
    async with running(disk) as writer:
        async with busy(writer):
            for number in range(4):
                writer.append(1, event(number))
                writer.append(2, event(number + 10))
        await writer.flush(1)
        await submit(writer, 4)

        assert disk.numbers() == [0, 1, 2, 3, 10, 11, 12, 13, 4]
        assert disk.records() == 3


async def test_d3_the_events_of_a_run_are_numbered_in_their_order(disk):
    """A record has the number of its first event; a run that is taken up goes on with the next one (D3)."""

    def places(connection: sqlite3.Connection) -> Any:
        return connection.execute("SELECT run, seq FROM records ORDER BY run, seq").fetchall()

    async with running(disk) as writer:
        for number in range(2):
            async with busy(writer):
                writer.append(1, event(number))
                writer.append(1, event(number))
                writer.append(2, event(number))
            await writer.flush(1)
        writer.forget(2, 7)
        await submit(writer, 7, run=2)
        writer.forget(3)
        await submit(writer, 8, run=3)

        assert await writer.call(places) == [(1, 0), (1, 2), (2, 0), (2, 1), (2, 7), (3, 0)]
        writer.forget(1)
        assert writer._numbers == {2: 8, 3: 1}


async def test_d2_an_event_in_which_ctrl_c_was_met_leaves_none_that_is_not_waited_for(disk):
    """A KeyboardInterrupt comes at any line; what is recorded of the run after it is waited for (D2)."""

    class Interrupting(dict):
        def __setitem__(self, run: int, batch: Any) -> None:
            writer._batch_of = dict(self)
            raise KeyboardInterrupt

    async with running(disk) as writer:
        async with busy(writer):
            writer._batch_of = Interrupting()
            with pytest.raises(KeyboardInterrupt):
                writer.append(1, event(0))
            writer.append(1, event(1))
            flushed = writer.flush(1)
            assert 1 in writer._batch_of
        await flushed

        assert disk.numbers() == [1]


@pytest.mark.parametrize("runs", [1, 2, 3, 4, FEW, FEW + 1, 63, 64, 150])
async def test_d7_however_many_runs_a_batch_has_all_are_written(disk, runs):
    """Of however many runs something is queued, none is left out, and none written twice (D7)."""
    async with running(disk) as writer:
        async with busy(writer):
            for run in range(runs):
                writer.append(run, event(run))
        for run in range(runs):
            await writer.flush(run)

        assert disk.numbers() == list(range(runs))


@pytest.mark.parametrize("large", [0, 60, 10_000])
async def test_d7_what_is_too_large_for_one_text_is_written_as_several(disk, large, monkeypatch):
    """Records of one batch that are long together are put by several statements, in one commit (D7)."""
    monkeypatch.setattr("pysagas.durable._writer.LARGE", large)
    async with running(disk) as writer:
        async with busy(writer):
            for run in range(7):
                writer.append(run, event(run))
        await writer.flush(0)

        assert disk.numbers() == list(range(7))
        assert disk.commits() == 2
        puts = sum(statement.startswith("INSERT") for statement in disk.statements)
    assert puts == (1 if large > 1000 else 7)


# --- halves -------------------------------------------------------------------------------------

MANY = FEW + 1
HALF = (MANY + 1) // 2


@asynccontextmanager
async def many_wait(disk: Disk, writer: Writer, wait: Any) -> AsyncIterator[list[tuple[int, int]]]:
    """So many runs wait that they are halved; gives who was woken, and how many records there were."""
    woken: list[tuple[int, int]] = []

    async def one(run: int) -> None:
        await wait(writer, run)
        woken.append((run, disk.records()))

    disk.under_way = MANY
    async with create_task_group() as tasks:
        async with busy(writer):
            for run in range(MANY):
                writer.append(run, event(run))
                tasks.start_soon(one, run)
            await wait_all_tasks_blocked()
            yield woken


async def flush(writer: Writer, run: int) -> None:
    await writer.flush(run)


def stopped_at_the_second_half(writer: Writer) -> tuple[threading.Event, threading.Event]:
    """Stops the thread before it writes what was left; gives when it has come there, and lets it go on."""
    reached, go_on = threading.Event(), threading.Event()
    encode_all = writer._encode

    def encode_or_stop(records: Any) -> str:
        if f"{HALF}/0" in records:
            reached.set()
            assert go_on.wait(ENOUGH)
        return encode_all(records)

    writer._encode = encode_or_stop
    return reached, go_on


async def test_d7_of_many_runs_half_is_written_and_goes_on_while_the_rest_is_written(disk):
    """So the event loop has something to do meanwhile; nobody is woken before its own is on disk (D7)."""
    async with running(disk) as writer:
        async with many_wait(disk, writer, flush) as woken:
            assert woken == []

        assert disk.numbers() == list(range(MANY))
        assert (disk.commits(), disk.woken) == (3, 3)
        assert sorted(run for run, _ in woken) == list(range(MANY))
        assert all(records >= (HALF if run < HALF else MANY) for run, records in woken)


@pytest.mark.parametrize(
    ("queued", "taken", "under_way", "size"),
    [
        (FEW, 0, FEW, FEW),
        (100, 0, 100, 50),
        (98, 2, 100, 50),
        (50, 50, 100, 50),
        (100, 50, 100, 50),  # those of the last batch have come back already
        (100, 50, 200, 75),
        (100, 150, 1000, 100),
        (100, 0, 0, 50),
    ],
)
async def test_d7_half_of_what_is_queued_and_of_what_is_to_come_is_taken(
    disk, queued, taken, under_way, size
):
    """Of the last batch no more is to come than there are runs that are not queued (D7)."""
    writer = disk.writer()
    disk.under_way = under_way
    writer._taken = taken
    for run in range(queued):
        writer.append(run, event(0))

    assert list(writer._take().events) == list(range(size))
    assert list(writer._next.events) == list(range(size, queued))


async def test_d7_what_was_left_once_for_the_next_batch_is_not_left_again(disk):
    """A function is called soon, though as many runs go on as there may be (D7)."""
    writer = disk.writer()
    disk.under_way = MANY
    for run in range(MANY):
        writer.append(run, event(0))
    writer._queue(Job(1), insert_all_of)

    assert not writer._take().groups
    for run in range(MANY):
        writer.append(run, event(1))
    batch = writer._take()
    assert (len(batch.events), len(batch.groups)) == (MANY, 1)


async def test_d7_what_is_left_comes_before_what_is_there_already():
    """A run that is collected while a batch is halved may have recorded something in the other half (D7)."""
    batch, rest = Batch(), Batch()
    batch.events = {1: [event(0)], 2: [event(5)]}
    last: Any = ("done", (0,), "a", 1.0)
    rest.events = {2: [last]}
    batch.leave(1, rest)

    assert (batch.events, rest.events) == ({1: [event(0)]}, {2: [event(5), last]})


async def test_d7_functions_come_after_all_events_of_both_halves(disk):
    """A function that is called after many events finds all of them, though they are two batches (D7)."""

    def count(connection: sqlite3.Connection) -> int:
        (number,) = connection.execute("SELECT count(*) FROM records").fetchone()
        return number

    counts = []

    async def call() -> None:
        counts.append(await writer.call(count))

    disk.under_way = MANY
    async with running(disk) as writer, create_task_group() as tasks:
        async with busy(writer):
            for run in range(MANY):
                writer.append(run, event(run))
            tasks.start_soon(call)
            await wait_all_tasks_blocked()

    assert counts == [MANY]


async def test_d7_many_calls_are_halved_too_and_each_has_its_own_result(disk):
    """Runs that begin at once begin as two halves, which then stay apart (D7)."""
    batches: list[list[int]] = []

    def double(connection: sqlite3.Connection, rows: list[int]) -> list[int]:
        batches.append(rows)
        return [2 * row for row in rows]

    results: dict[int, int] = {}

    async def call(row: int) -> None:
        results[row] = await write_together(writer, double, row)

    disk.under_way = MANY
    async with running(disk) as writer, create_task_group() as tasks:
        async with busy(writer):
            for row in range(MANY):
                tasks.start_soon(call, row)
            await wait_all_tasks_blocked()

    assert results == {row: 2 * row for row in range(MANY)}
    assert [len(rows) for rows in batches] == [HALF, MANY - HALF]


async def test_d7_a_flush_that_comes_when_half_is_written_waits_for_the_other_half(disk):
    """Whose events are in the half that is left waits for them, whenever it asks (D7)."""
    disk.under_way = MANY
    async with running(disk) as writer:
        _, go_on = stopped_at_the_second_half(writer)
        async with busy(writer):
            for run in range(MANY):
                writer.append(run, event(run))
        await writer.flush(0)
        assert disk.records() == HALF
        async with create_task_group() as tasks:
            tasks.start_soon(flush, writer, MANY - 1)
            await wait_all_tasks_blocked()
            assert disk.records() == HALF
            go_on.set()
        assert disk.records() == MANY


async def test_d7_who_waits_for_the_second_half_can_be_cancelled(disk):
    """A cancellation finds those that were left for another batch, and the events are written (D7)."""
    disk.under_way = MANY
    async with running(disk) as writer:
        reached, go_on = stopped_at_the_second_half(writer)
        cancelled = []

        async def wait(run: int) -> None:
            try:
                await writer.flush(run)
            except anyio.get_cancelled_exc_class():
                cancelled.append(run)
                raise

        async with create_task_group() as tasks:
            async with busy(writer):
                for run in range(MANY):
                    writer.append(run, event(run))
                    tasks.start_soon(wait, run)
                await wait_all_tasks_blocked()
            assert await anyio.to_thread.run_sync(reached.wait, ENOUGH)
            await wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        assert sorted(cancelled) == list(range(HALF, MANY))
        go_on.set()
        await writer.flush(MANY - 1)

        assert disk.numbers() == list(range(MANY))


async def test_d8_a_half_that_fails_is_told_to_those_who_wait_for_it(disk):
    """Where one of two halves cannot be written, those of the other go on (D7, D8)."""
    with closing(sqlite3.connect(disk.path)) as connection:
        connection.execute(TABLES[0])
        connection.execute("INSERT INTO records VALUES (?, 0, '')", (MANY - 1,))
        connection.commit()
    failed = []

    async def wait(writer: Writer, run: int) -> None:
        try:
            await writer.flush(run)
        except JournalError:
            failed.append(run)

    async with running(disk) as writer:
        async with many_wait(disk, writer, wait):
            pass

    assert sorted(failed) == list(range(HALF, MANY))


# --- calls together -----------------------------------------------------------------------------


async def call_all(writer: Writer, work: Any, rows: list[int]) -> dict[int, Any]:
    results: dict[int, Any] = {}

    async def call(row: int) -> None:
        try:
            results[row] = await write_together(writer, work, row)
        except (ValueError, JournalError) as error:
            results[row] = error

    async with create_task_group() as tasks, busy(writer):
        for row in rows:
            tasks.start_soon(call, row)
            await wait_all_tasks_blocked()
    return results


async def test_who_calls_the_same_function_is_served_by_one_call(disk):
    """All of a batch who call a function have it called once, with the row of each, in their order."""
    calls: list[list[int]] = []

    def put(connection: sqlite3.Connection, rows: list[int]) -> list[int]:
        calls.append(rows)
        return [insert(connection, row) for row in rows]

    async with running(disk) as writer:
        assert await call_all(writer, put, [3, 1, 2]) == {1: 1, 2: 2, 3: 3}
    assert calls == [[3, 1, 2]]


async def test_what_is_called_together_passes_nothing_that_stands_alone(disk):
    """Who calls for many joins the others behind the last one who calls alone."""
    calls: list[str] = []

    def named(name: str) -> Any:
        def call(_: sqlite3.Connection, rows: list[Any]) -> list[Any]:
            calls.append(f"{name} {rows}")
            return rows

        return call

    begin = named("begin")
    async with running(disk) as writer, create_task_group() as tasks, busy(writer):
        for row, (work, options) in enumerate(
            [
                (begin, {"together": True}),
                (begin, {"together": True}),
                (named("alone"), {}),
                (begin, {"together": True}),
                (named("other"), {"together": True}),
            ]
        ):
            tasks.start_soon(partial(writer.call_surely, work, row, **options))
            await wait_all_tasks_blocked()

    assert calls == ["begin [0, 1]", "alone [2]", "begin [3]", "other [4]"]


def fail_or_insert(fails: bool) -> Any:  # noqa: FBT001
    def put(connection: sqlite3.Connection, rows: list[int]) -> list[int]:
        if fails:
            raise sqlite3.OperationalError("disk I/O error")
        return insert_all_of(connection, rows)

    return put


async def knows_how_it_ended(call: asyncio.Future[Any], *, fails: bool) -> None:
    """A call of 5 that was cancelled natively has its result besides, or its error as the cause."""
    if fails:
        with pytest.raises(asyncio.CancelledError) as info:
            await call
        assert "disk I/O error" in str(info.value.__cause__)
    else:
        result, late = await call
        assert (result, type(late)) == (5, asyncio.CancelledError)


@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
@pytest.mark.parametrize("shield", [False, True])
@pytest.mark.parametrize("fails", [False, True])
async def test_a_call_is_waited_for_though_its_task_is_cancelled_natively_twice(disk, shield, fails):
    """Only then is it known what is on disk: its result, and the cancellation besides; or that over its error."""
    async with running(disk) as writer:
        async with busy(writer):
            call = asyncio.ensure_future(writer.call_surely(fail_or_insert(fails), 5, shield=shield))
            for _ in range(2):
                await wait_all_tasks_blocked()
                call.cancel()
            await wait_all_tasks_blocked()
            assert not call.done()
        await knows_how_it_ended(call, fails=fails)


@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancellation_that_comes_with_the_end_of_a_call_finds_it_over(disk, fails):
    """Cancelled natively in the moment in which its batch is told of, it knows how that ended."""
    async with running(disk) as writer:
        finish = writer._finish

        def cancel_and_finish(batch: Any) -> None:
            call.cancel()
            finish(batch)

        writer._finish = cancel_and_finish
        call = asyncio.ensure_future(writer.call_surely(fail_or_insert(fails), 5))
        await knows_how_it_ended(call, fails=fails)


@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
async def test_a_call_that_was_left_for_the_next_batch_is_waited_for_there(disk):
    """Cancelled natively when the batch in which it was has been written, it is found where it is now."""
    disk.under_way = MANY
    async with running(disk) as writer:
        reached, go_on = stopped_at_the_second_half(writer)
        async with busy(writer):
            for run in range(MANY):
                writer.append(run, event(run))
            call = asyncio.ensure_future(writer.call_surely(insert_all_of, 5000))
            await wait_all_tasks_blocked()
        assert await anyio.to_thread.run_sync(reached.wait, ENOUGH)
        await wait_all_tasks_blocked()
        call.cancel()
        await wait_all_tasks_blocked()
        assert not call.done()
        go_on.set()
        result, late = await call
        assert (result, type(late)) == (5000, asyncio.CancelledError)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("kind", [ValueError, sqlite3.IntegrityError])
async def test_what_cannot_be_done_for_all_is_done_for_each(disk, kind, beside):
    """Where the call for all raises, each has its own, and only the one is refused."""
    refused = kind("refused")
    if isinstance(refused, sqlite3.Error):
        refused.sqlite_errorcode = sqlite3.SQLITE_CONSTRAINT

    def put(connection: sqlite3.Connection, rows: list[int]) -> list[int]:
        if 2 in rows:
            raise refused
        return [insert(connection, row) for row in rows]

    async with running(disk) as writer:
        if beside:
            writer.append(7, event(7))
        results = await call_all(writer, put, [1, 2, 3])
        error = results.pop(2)
        assert results == {1: 1, 3: 3}
        assert refused in (error, error.__cause__)
        assert disk.numbers() == ([7] if beside else []) + [1, 3]


async def test_more_rows_than_one_statement_takes_are_refused_before_any_is_put():
    """Then each is put by itself; there are as many sizes of a statement as powers of two."""
    run_ids = [f"r{number}" for number in range(3)]
    many = Many("INSERT INTO runs (run_id) SELECT * FROM", 1, "WHERE column1 IS NOT NULL")
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute("CREATE TABLE runs (id INTEGER PRIMARY KEY AUTOINCREMENT, run_id)")
        assert many.execute(connection, [(run_id,) for run_id in run_ids]) == 3
        with pytest.raises(ValueError, match="5000 rows are too many for one statement"):
            many.execute(connection, [("x",)] * 5000)
        assert connection.execute("SELECT run_id FROM runs").fetchall() == [(x,) for x in run_ids]


async def test_d8_where_the_database_fails_a_call_for_all_is_not_tried_again(disk):
    """A disk that is full fails the batch; the function is not called once more for each (D8)."""
    calls = []

    def fail(connection: sqlite3.Connection, rows: list[int]) -> list[int]:
        calls.append(rows)
        raise sqlite3.OperationalError("disk I/O error")

    async with running(disk) as writer:
        results = await call_all(writer, fail, [1, 2])

    assert calls == [[1, 2]]
    assert {str(error) for error in results.values()} == {
        f"journal here cannot be written: disk I/O error; {REMEDY}"
    }


async def test_a_call_that_is_shielded_ends_though_its_scope_is_cancelled(disk):
    """It gives its result, and the cancellation comes at the next checkpoint."""
    results = []

    async def call() -> None:
        results.append(await write_together(writer, insert_all_of, 5, shield=True))
        await anyio.lowlevel.checkpoint()
        results.append(None)  # pragma: no cover - it is cancelled

    async with running(disk) as writer:
        async with create_task_group() as tasks:
            async with busy(writer):
                tasks.start_soon(call)
                await wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
                with anyio.CancelScope(shield=True):
                    await wait_all_tasks_blocked()

    assert results == [5]


def insert_all_of(connection: sqlite3.Connection, rows: list[int]) -> list[int]:
    return [insert(connection, row) for row in rows]


# --- ends ---------------------------------------------------------------------------------------


def ending(run: int, value: bytes = b"null") -> End:
    return End(run, "completed", value, None, 1.5)


async def end(writer: Writer, *ends: End, done: tuple[int, ...] = ()) -> dict[int, Exception | None]:
    """Ends runs by one batch, which has an event of some; gives for each what was raised."""
    raised: dict[int, Exception | None] = {}

    async def one(its: End) -> None:
        try:
            assert await writer.end(its) is None
        except JournalError as error:
            raised[its.run] = error
        else:
            raised[its.run] = None

    async with create_task_group() as tasks, busy(writer):
        for run in done:
            writer.append(run, event(run))
        for its in ends:
            tasks.start_soon(one, its)
            await wait_all_tasks_blocked()
    return raised


def begin_runs(disk: Disk, runs: int) -> None:
    with closing(sqlite3.connect(disk.path)) as connection:
        connection.execute(TABLES[1])
        rows = [(run,) for run in range(runs)]
        connection.executemany("INSERT INTO runs (id, state, owner) VALUES (?, 'running', 7)", rows)
        connection.commit()


def ended(disk: Disk) -> dict[int, tuple[Any, ...]]:
    with closing(sqlite3.connect(disk.path)) as connection:
        rows = connection.execute("SELECT id, state, value, error, ended, owner FROM runs ORDER BY id")
        return {run: its for run, *its in rows if its[0] != "running"}


async def test_d7_how_runs_end_is_written_with_the_last_of_what_they_did(disk):
    """By one statement, and so by one commit, in which the interpreter is let go of once (D7)."""
    begin_runs(disk, 4)
    text = '[1, "\u00e9\U0001f600"]'.encode()
    failed = End(3, "failed", b"", '{"type": "Boom"}', 1764338400.1234567)
    async with running(disk) as writer:
        raised = await end(writer, ending(1), ending(2, text), failed, done=(0, 1, 2))
        assert raised == {1: None, 2: None, 3: None}
        # The first is what keeps the thread busy meanwhile.
        assert [statement.split()[0] for statement in disk.statements] == ["BEGIN", "COMMIT", "INSERT"]

    assert ended(disk) == {
        1: ["completed", b"null", None, 1.5, None],
        2: ["completed", text, None, 1.5, None],
        3: ["failed", b"", '{"type": "Boom"}', 1764338400.1234567, None],
    }
    assert disk.numbers() == [0, 1, 2]


@pytest.mark.parametrize("beside", [True, False])
async def test_d7_a_run_ends_with_its_half(disk, beside):
    """Of many runs, those that are written first have their ends written too, and their events before (D7)."""
    begin_runs(disk, MANY)
    disk.under_way = MANY
    woken = []

    async def one(writer: Writer, run: int) -> None:
        assert await writer.end(ending(run)) is None
        woken.append((run, disk.records(), len(ended(disk))))
        if len(woken) == HALF:
            go_on.set()

    async with running(disk) as writer:
        go_on = threading.Event()
        encode_all, texts = writer._encode, []

        def encode_or_stop(records: Any) -> str:
            texts.append(records)
            if len(texts) == (3 if beside else 2):  # the first half is one text, or two
                assert go_on.wait(ENOUGH)
            return encode_all(records)

        writer._encode = encode_or_stop
        async with create_task_group() as tasks, busy(writer):
            for run in range(MANY):
                if beside:
                    writer.append(run, event(run))
                tasks.start_soon(one, writer, run)
            await wait_all_tasks_blocked()

    first, second = woken[:HALF], woken[HALF:]
    assert {(records, ends) for _, records, ends in first} == {(HALF * beside, HALF)}
    assert {(records, ends) for _, records, ends in second} == {(MANY * beside, MANY)}
    if beside:
        assert set(disk.numbers()[:HALF]) == {run for run, *_ in first}


async def test_d8_a_run_does_not_end_of_which_something_is_lost(disk):
    """What is on disk would be less than what happened; of other runs the end is written (D8)."""
    begin_runs(disk, 4)
    writer = await strict(disk)
    async with busy(writer):
        writer.append(1, NO_TEXT)
    raised = await end(writer, ending(1), ending(2))
    await writer.stop()

    assert "surrogates not allowed; when that is mended" in str(raised[1])
    assert (raised[2], ended(disk).keys()) == (None, {2})


@pytest.mark.parametrize(
    "value",
    [b"\xff\x00", b"a\x00b", b"\xef\xbf\xbd\xff", b"x" * 200, memoryview(b"ab")],
    ids=["no text", "NUL", "both", "large", "view"],
)
@pytest.mark.parametrize("beside", [True, False])
async def test_d5_what_a_saga_returned_may_be_any_bytes(disk, value, beside, monkeypatch):
    """What cannot be handed over as text is written by itself, by the same commit as the others (D5, D7)."""
    monkeypatch.setattr("pysagas.durable._writer.LARGE", 150)
    begin_runs(disk, 3)
    async with running(disk) as writer:
        raised = await end(writer, ending(1, value), ending(2), done=(1,) if beside else ())
        assert raised == {1: None, 2: None}
        assert disk.commits() == 2  # that of the batch in whose time they came, and theirs
        assert any(statement.startswith("INSERT INTO ended") for statement in disk.statements)

    assert ended(disk) == {
        1: ["completed", value, None, 1.5, None],
        2: ["completed", b"null", None, 1.5, None],
    }
    assert disk.numbers() == ([1] if beside else [])


async def test_d8_an_end_that_cannot_be_written_fails_alone(disk):
    """What is wrong with one end is no fault of the file; the others are written (D8)."""
    begin_runs(disk, 3)

    def allow(connection: sqlite3.Connection) -> None:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000)

    async with running(disk) as writer:
        await write(writer, allow)
        raised = await end(writer, ending(1, b"\xff" * 20_000), ending(2))

    assert "journal here cannot do that: string or blob too big" in str(raised[1])
    assert (raised[2], ended(disk).keys()) == (None, {2})


async def test_d8_ends_that_no_text_can_be_made_of_are_written_each_by_itself(disk):
    """Where the memory is short, for instance: the thread goes on (D8)."""
    begin_runs(disk, 3)
    writer = disk.writer()

    def no_memory(_: object) -> str:
        raise MemoryError

    writer._encode = no_memory
    await writer.start()
    assert await end(writer, ending(1), ending(2)) == {1: None, 2: None}
    await writer.stop()

    assert ended(disk).keys() == {1, 2}


# --- failures -----------------------------------------------------------------------------------


async def test_d7_a_batch_that_fails_is_not_written_at_all(disk):
    """One record that cannot be written leaves out its whole batch, and all who wait are told (D7, D8)."""
    errors: list[JournalError] = []
    async with running(disk) as writer:
        await submit(writer, 0)
        await write(writer, partial(insert, number=1))
        async with create_task_group() as tasks:
            async with busy(writer):
                for run in (1, 2, 3, 4, 5):  # that of the first is there already
                    tasks.start_soon(submit, writer, 2, errors, run)
                await wait_all_tasks_blocked()
        assert disk.numbers() == [0, 1]
        assert len(errors) == 5
        # Whoever asks again is told again, until something else was taken.
        with pytest.raises(JournalError) as caught:
            await writer.flush(1)
        writer.forget(1, 2)
        await submit(writer, 3)

        assert disk.numbers() == [0, 1, 3]
    reason = "UNIQUE constraint failed: records.run, records.seq"
    assert {str(error) for error in errors} == {f"journal here cannot be written: {reason}; {REMEDY}"}
    assert str(caught.value) == str(errors[0])
    assert isinstance(caught.value.__cause__, sqlite3.IntegrityError)


async def test_d7_a_job_that_raises_leaves_the_work_of_the_others(disk):
    """What a function raises comes out of its own call alone, and its batch is written (D7)."""
    error = ValueError("refused")
    caught = []

    def refuse(connection: sqlite3.Connection) -> None:
        raise error

    async def call() -> None:
        with pytest.raises(ValueError) as info:
            await write(writer, refuse)
        caught.append(info.value)

    async with running(disk) as writer:
        async with create_task_group() as tasks:
            async with busy(writer):
                tasks.start_soon(submit, writer, 0)
                await wait_all_tasks_blocked()
                tasks.start_soon(call)
                await wait_all_tasks_blocked()
                tasks.start_soon(write, writer, partial(insert, number=1))
                await wait_all_tasks_blocked()

        assert disk.numbers() == [0, 1]
        assert disk.commits() == 2
    assert caught == [error]


async def test_d8_a_job_in_which_the_database_fails_fails_its_batch(disk):
    """A database that fails in a function fails the batch, for nobody knows what is left of it (D8)."""

    def fill(connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA max_page_count = 1")
        connection.execute("CREATE TABLE more AS SELECT zeroblob(100000)")

    async with running(disk) as writer:
        writer.append(1, event(0))
        with pytest.raises(
            JournalError, match="journal here cannot be written: database or disk is full"
        ):
            await write(writer, fill)
        assert disk.numbers() == []


@pytest.mark.parametrize(
    ("statement", "values", "message"),
    [
        ("SELECT * FROM missing", (), "no such table: missing"),
        ("SELECT json_array_length('[')", (), "malformed JSON"),
        ("SELECT ?", (1j,), "Error binding parameter 1: type 'complex' is not supported"),
    ],
)
async def test_d8_a_job_that_asks_for_what_cannot_be_fails_alone(disk, statement, values, message):
    """What is wrong with one question is no fault of the file: what others wrote stays written (D8)."""
    async with running(disk) as writer:
        writer.append(1, event(0))
        with pytest.raises(JournalError, match=f"^journal here cannot do that: {re.escape(message)}$"):
            await writer.call(lambda connection: connection.execute(statement, values).fetchone())
        await writer.flush(1)
        assert disk.numbers() == [0]


async def test_d8_a_batch_that_the_database_has_rolled_back_is_not_rolled_back_again(disk):
    """Where SQLite has ended the transaction itself, the reason is told, and the next batch works (D8)."""
    again = "INSERT OR ROLLBACK INTO records SELECT * FROM records"
    async with running(disk) as writer:
        await submit(writer, 0)
        writer.append(1, event(1))
        with pytest.raises(JournalError, match="cannot be written: UNIQUE constraint failed"):
            await write(writer, lambda connection: connection.execute(again))
        assert "ROLLBACK" not in disk.statements
        writer.forget(1, 1)
        await submit(writer, 2)

        assert disk.numbers() == [0, 2]


async def test_d8_a_batch_that_cannot_begin_is_not_written(disk):
    """While somebody else writes for longer than is waited, batches fail; later ones are written (D8)."""
    async with running(disk) as writer:
        with closing(sqlite3.connect(disk.path, isolation_level=None)) as somebody:
            somebody.execute("BEGIN IMMEDIATE")
            errors: list[JournalError] = []
            await submit(writer, 0, errors)
            assert [str(error) for error in errors] == [
                f"journal here cannot be written: database is locked; {REMEDY}"
            ]
        writer.forget(1)
        await submit(writer, 1)

        assert disk.numbers() == [1]


async def test_d8_after_a_gap_nothing_of_that_run_is_written(disk):
    """What was lost of a run is a gap, after which its rows are refused; other runs go on (D8)."""
    async with running(disk) as writer:
        with closing(sqlite3.connect(disk.path, isolation_level=None)) as somebody:
            somebody.execute("BEGIN IMMEDIATE")
            writer.append(1, event(0))
            with pytest.raises(JournalError, match="database is locked"):
                await writer.flush(1)
            somebody.execute("ROLLBACK")
        for refused in (writer.check, lambda run: writer.append(run, event(1))):
            with pytest.raises(JournalError, match="database is locked; when that is mended"):
                refused(1)
        writer.append(2, event(7))
        await writer.flush(2)
        writer.check(2)

        assert disk.numbers() == [7]


async def test_d8_rows_that_were_taken_before_the_gap_was_known_are_dropped(disk):
    """Taken while an earlier batch of their run was failing, rows are not written after the gap (D8)."""
    async with running(disk) as writer:
        began, go = threading.Event(), threading.Event()

        def fail(_: sqlite3.Connection) -> None:
            began.set()
            assert go.wait(ENOUGH)
            raise sqlite3.OperationalError("disk I/O error")

        async def failing() -> None:
            writer.append(1, event(0))
            with pytest.raises(JournalError, match="disk I/O error"):
                await write(writer, fail)

        async with create_task_group() as tasks:
            tasks.start_soon(failing)
            await anyio.to_thread.run_sync(began.wait)
            writer.append(1, event(1))
            writer.append(2, event(7))
            go.set()
            await writer.flush(2)
        with pytest.raises(JournalError):
            await writer.flush(1)  # its batch was written, without what came after the gap

        assert disk.numbers() == [7]


async def test_d8_what_others_lose_later_says_nothing_of_a_run_that_is_written(disk):
    """Who asks late whether its events are on disk hears of them, and not of the last batch (D8)."""
    async with running(disk) as writer:
        await write(writer, partial(insert, number=5))
        writer.forget(1, 5)
        writer.append(2, event(0))
        await writer.call(len_of_nothing)
        writer.append(1, event(5))  # which is there already
        with pytest.raises(JournalError, match="UNIQUE"):
            await writer.flush(1)
        await writer.flush(2)


async def test_d8_events_that_cannot_be_written_down_are_a_gap_in_their_run_alone(disk):
    """A name that is no text stops its own run; what others have in the same batch is written (D8)."""
    writer = await strict(disk)
    async with busy(writer):
        writer.append(1, NO_TEXT)
        writer.append(2, event(7))
        writer.append(3, event(8))
    await writer.flush(2)
    with pytest.raises(
        JournalError, match="journal here cannot be written: 'utf-8' codec can't encode"
    ):
        await writer.flush(1)
    with pytest.raises(JournalError, match="surrogates not allowed; when that is mended"):
        writer.append(1, event(1))
    await writer.stop()

    with closing(sqlite3.connect(disk.path)) as connection:
        records = connection.execute("SELECT run, seq, events FROM records").fetchall()
    assert [(run, seq, json.loads(events)) for run, seq, events in records] == [
        (run, 0, [["started", [number], "a", 0.0]]) for run, number in ((2, 7), (3, 8))
    ]


async def test_d8_a_writer_that_cannot_connect_does_not_start(disk):
    """What opening raised is why it does not start; it can be stopped, and there is nothing to close (D8)."""
    disk.path.mkdir()
    writer = disk.writer()
    with pytest.raises(
        JournalError, match="journal here cannot be written: unable to open database file"
    ):
        await writer.start()
    # Nothing that is given to it is kept waiting.
    with pytest.raises(JournalError, match="unable to open database file"):
        await writer.call(len_of_nothing)
    writer.append(1, event(0))
    with pytest.raises(JournalError, match="unable to open database file"):
        await writer.flush(1)
    await writer.stop()

    assert disk.closed == 0


async def test_d8_a_batch_that_cannot_even_be_undone_ends_the_connection(disk):
    """What comes next would be put into its transaction, told as written, and be lost with it (D8)."""

    def refuse_ends(connection: sqlite3.Connection) -> None:
        ends = {("COMMIT",), ("ROLLBACK",)}
        connection.set_authorizer(
            lambda action, operation, *_: (
                sqlite3.SQLITE_DENY
                if action == sqlite3.SQLITE_TRANSACTION and (operation,) in ends
                else sqlite3.SQLITE_OK
            )
        )

    async with running(disk) as writer:
        await submit(writer, 0)
        for _ in range(2):
            with pytest.raises(JournalError, match="cannot be written: not authorized"):
                await write(writer, refuse_ends)
        writer.append(2, event(7))
        with pytest.raises(JournalError, match="cannot be written: not authorized"):
            await writer.flush(2)
        with closing(sqlite3.connect(disk.path, timeout=0)) as somebody:
            insert(somebody, 1)  # the file is free
            somebody.commit()

    assert (disk.numbers(), disk.closed) == ([0, 1], 1)


async def test_d8_why_a_batch_failed_does_not_keep_what_it_had(disk):
    """The reason is kept as long as its runs are; the frames in which it was raised are not (D8)."""

    def fail(_: sqlite3.Connection) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    async with running(disk) as writer:
        writer.append(1, event(0))
        with pytest.raises(JournalError):
            await write(writer, fail)

        assert writer._lost[1].__traceback__ is None


# --- interruptions at any place -----------------------------------------------------------------


class Rude:
    """What the thread is told by, and an interrupt that comes just before, or just after."""

    def __init__(self, told: Any, when: str) -> None:
        self.get = told.get
        self.told, self.when = told, when

    def put(self, item: None) -> None:
        if self.when == "before":
            self.when = ""
            raise KeyboardInterrupt
        self.told.put(item)
        if self.when == "after":
            self.when = ""
            raise KeyboardInterrupt


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_keyboard_interrupt_does_not_keep_the_thread_from_being_told(disk, when):
    """Wherever Ctrl-C comes while it is told of work, who comes next tells it."""
    async with running(disk) as writer:
        while not writer._waits:  # pragma: no cover - it may wait already
            await anyio.sleep(0)
        writer._wanted = Rude(writer._wanted, when)
        with pytest.raises(KeyboardInterrupt):
            writer.append(1, event(0))
        await submit(writer, 1)

        assert disk.numbers() == [0, 1]


@pytest.mark.parametrize("anyio_backend", TRIO, indirect=True)
@pytest.mark.parametrize("shielded", [False, True])
async def test_a_keyboard_interrupt_does_not_come_between_noting_a_task_and_its_wait(disk, shielded):
    """On Trio a task that is noted down and does not wait would be woken from something else."""
    protected = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(trio.lowlevel, name)

        def current_task(self) -> Any:
            protected.append(trio.lowlevel.currently_ki_protected())
            return trio.lowlevel.current_task()

    async with running(disk) as writer:
        writer._loop._lowlevel = Watched()
        writer.append(1, event(0))
        await writer.flush(1)
        _ = await writer.call_surely(insert_all_of, 5, shield=shielded)

    assert protected == [True, True]


async def test_a_run_that_is_collected_while_the_lock_is_held_does_not_wait_for_it(disk):
    """The garbage collector runs anywhere, and what it closes has something to record."""
    async with running(disk) as writer:
        with writer._lock:
            writer.append(1, event(0))
            writer._queue(Job(5), insert_all_of)
        await writer.flush(1)

        assert disk.numbers() == [0, 5]


# --- the end ------------------------------------------------------------------------------------


async def test_stop_writes_what_is_left(disk):
    """What was taken when it is stopped is written before the database is closed."""
    writer = disk.writer()
    await writer.start()
    async with create_task_group() as tasks:
        async with busy(writer):
            for number in range(3):
                writer.append(1, event(number))
            tasks.start_soon(writer.stop)
            await wait_all_tasks_blocked()
            assert disk.closed == 0

    assert disk.numbers() == [0, 1, 2]
    assert disk.closed == 1


async def test_stop_is_not_cut_off(disk):
    """Stopped in a cancelled scope, it writes what is left all the same."""
    writer = disk.writer()
    await writer.start()
    with anyio.CancelScope() as scope:
        scope.cancel()
        writer.append(1, event(0))
        await writer.stop()

    assert (disk.numbers(), disk.closed) == ([0], 1)


async def test_nothing_is_called_after_the_end(disk):
    """Once it is being stopped, a function is refused with the place of the journal."""
    async with running(disk) as writer:
        await submit(writer, 0)
    with pytest.raises(JournalError, match="^journal here is closed$"):
        await write(writer, partial(insert, number=1))
    await writer.flush(1)  # what was taken is on disk

    assert disk.numbers() == [0]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_what_is_left_is_written_when_its_event_loop_is_gone(disk, backend):
    """A writer that outlives its event loop has nobody to wake, and ends all the same."""
    began, go = threading.Event(), threading.Event()

    def work(_: sqlite3.Connection) -> None:
        began.set()
        assert go.wait(ENOUGH)

    async def leave() -> Writer:
        writer = disk.writer()
        await writer.start()
        async with create_task_group() as tasks:
            tasks.start_soon(writer.call, work)
            await anyio.to_thread.run_sync(began.wait)
            writer.append(1, event(0))
            tasks.cancel_scope.cancel()
        return writer

    writer = anyio.run(leave, backend=backend)
    go.set()
    anyio.run(writer.stop, backend=backend)

    assert (disk.numbers(), disk.closed) == ([0], 1)
