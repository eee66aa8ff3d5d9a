"""The journal in a file: what is on disk and when, whose a run is, and what happens when the file fails."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import socket
import sqlite3
import stat
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import create_task_group, fail_after, wait_all_tasks_blocked
from conftest import ASYNCIO
from helpers import cancel_other_tasks, never_awaited
from histories import make_writable
from mortal import Boom, Shop

from pysagas import (
    Commit,
    CompensationFailed,
    Parallel,
    Saga,
    SagaScope,
    SagaState,
    Step,
    StepState,
    saga,
)
from pysagas.durable import (
    Event,
    EventKind,
    JournalError,
    OtherRun,
    RunInfo,
    RunInProgress,
    RunInterrupted,
    RunState,
    SQLiteJournal,
    _locks,
    _records,
    _sqlite,
)

pytestmark = pytest.mark.anyio

ENOUGH = 30  # seconds, within which what hangs is found to hang
LATER = 1e12  # seconds since the epoch
MANY = "x" * 100_000  # more than a page of the file


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "sagas.db"


# --- helpers ------------------------------------------------------------------------------------


def abc(shop: Shop, **options: Any) -> Saga[..., Any]:
    return Saga([shop.step("a"), shop.step("b", **options), shop.step("c")], name="s")


def stuck(shop: Shop, back_fails: Callable[[], bool] = lambda: True) -> Saga[..., Any]:
    """A run that cannot be taken back while `back_fails` says so."""
    parts = [shop.step("a", back_fails=back_fails), shop.step("b", fails=Boom("b"))]
    return Saga(parts, name="stuck")


async def on_connection(journal: SQLiteJournal, work: Callable[[sqlite3.Connection], Any]) -> Any:
    """Calls a function with the connection that the journal writes by, on its thread."""
    return await journal._open().call(work)


def read(path: Path, query: str) -> list[Any]:
    """What another connection sees, with the words of its first column alone where there is one."""
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute(query).fetchall()
    return [row[0] if len(row) == 1 else row for row in rows]


def write(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def kinds(path: Path) -> list[Any]:
    return read(path, "SELECT kind, name FROM events ORDER BY run, seq")


def owner_files(path: Path) -> list[Path]:
    return sorted(path.parent.glob("sagas.db-owner-*"))


def let_die(path: Path, events: int, token: str = "dead") -> None:  # noqa: S107
    """Leaves the runs as a killed process does, that had recorded so many events of each."""
    path.with_name(f"{path.name}-owner-{token}").touch()
    write(
        path,
        f"INSERT INTO owners VALUES (77, '{token}', 'here', 1, 0)",
        "UPDATE runs SET state = 'running', owner = 77, ended = NULL, value = NULL, error = NULL",
    )
    with closing(sqlite3.connect(path)) as connection, connection:
        make_writable(connection)
        connection.execute("DELETE FROM events WHERE seq >= ?", (events,))


@asynccontextmanager
async def under_way(
    journal: SQLiteJournal, shop: Shop, run_id: str = "r"
) -> AsyncIterator[Saga[..., Any]]:
    """A run of steps a, pause and b, which is in its pause for the length of the block."""
    began, go = anyio.Event(), anyio.Event()

    async def pause() -> None:
        began.set()
        await go.wait()

    whole = Saga([shop.step("a"), Step(pause, None, name="pause"), shop.step("b")], name="s")
    async with create_task_group() as tasks:
        tasks.start_soon(partial(journal.run, whole, run_id=run_id, exceptions=JournalError))
        with fail_after(ENOUGH):
            await began.wait()
        try:
            yield whole
        finally:
            go.set()


async def recovered_by_another(path: Path, whole: Saga[..., Any]) -> RunInfo:
    """Opens the file anew, recovers the one run, and tells how it stands."""
    async with SQLiteJournal(path) as journal:
        report = await journal.recover([whole])
        assert report.ok
        assert [one.run_id for one in report.recovered] == ["r"]
        (info,) = await journal.runs()
    return info


async def opened_once(path: Path, **options: Any) -> None:
    async with SQLiteJournal(path, **options):
        pass


# --- the file -----------------------------------------------------------------------------------


async def test_d7_the_files_are_for_their_owner_alone(path):
    """The journal, its log and the file with the lock have mode 0600, whatever the umask (D7)."""
    before = os.umask(0)
    try:
        async with SQLiteJournal(path) as journal:
            await journal.run(abc(Shop()), run_id="r")
            modes = {
                file.name.partition("-")[2][:5]: stat.S_IMODE(file.stat().st_mode)
                for file in path.parent.iterdir()
            }
    finally:
        os.umask(before)

    assert modes == {"": 0o600, "wal": 0o600, "shm": 0o600, "owner": 0o600}


@pytest.mark.parametrize(("synchronous", "level"), [("FULL", 2), ("NORMAL", 1)])
async def test_d7_the_log_is_written_ahead_and_synchronised_as_told(path, synchronous, level):
    """The connection that writes is in WAL mode, and waits for the disk as it was told (D7)."""
    async with SQLiteJournal(path, synchronous=synchronous) as journal:

        def settings(connection):
            names = ("journal_mode", "synchronous", "journal_size_limit")
            return [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names]

        assert await on_connection(journal, settings) == ["wal", level, -1]


async def test_d7_each_commit_is_synchronised_by_default(path):
    """Nobody loses an effect to a power cut who has not asked to be faster (D7)."""
    async with SQLiteJournal(path) as journal:
        found = await on_connection(journal, lambda c: c.execute("PRAGMA synchronous").fetchone())

    assert found == (2,)


async def test_the_file_has_three_tables_and_says_that_it_is_a_journal(path):
    """The tables, their columns and the header are the format, and a change of it shows here."""
    async with SQLiteJournal(path) as journal:
        await journal.run(abc(Shop()), run_id="r")
        owners = read(path, "SELECT id, host, pid FROM owners")

    assert owners == [(1, socket.gethostname(), os.getpid())]
    columns = "SELECT group_concat(name, ' ') FROM pragma_table_info"
    tables = read(
        path,
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%' ORDER BY name",
    )
    assert {table: read(path, f"{columns}('{table}')") for table in tables} == {
        "owners": ["id token host pid started"],
        "records": ["run seq events"],
        "runs": ["id run_id saga version args state owner started ended value error"],
    }
    assert read(path, f"{columns}('events')") == ["run seq kind path name data at"]
    assert read(path, "PRAGMA user_version") == [2]
    assert read(path, "PRAGMA application_id") == [0x70736A31]
    assert read(path, "SELECT seq, kind, path, name, data FROM events WHERE seq < 2") == [
        (0, "started", "0", "a", ""),
        (1, "done", "0", "a", '"result of a"'),
    ]
    assert read(path, "SELECT run_id, saga, version, args, state, owner, value, error FROM runs") == [
        ("r", "s", None, b"[[],{}]", "completed", None, b"null", None)
    ]


FORMAT_1 = """
CREATE TABLE owners (id INTEGER PRIMARY KEY, token TEXT, host TEXT, pid INTEGER, started REAL);
CREATE TABLE runs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL UNIQUE, saga TEXT NOT NULL, version TEXT,
    args BLOB NOT NULL, state TEXT NOT NULL, owner INTEGER, started REAL NOT NULL, ended REAL, value BLOB,
    error TEXT
);
CREATE INDEX runs_by_state ON runs (state);
CREATE TABLE events (
    run INTEGER NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL, path TEXT NOT NULL, name TEXT NOT NULL,
    data BLOB NOT NULL, at REAL NOT NULL, PRIMARY KEY (run, seq)
) WITHOUT ROWID;
PRAGMA application_id = 0x70736A31;
PRAGMA user_version = 1;
INSERT INTO runs (run_id, saga, args, state, started) VALUES ('r', 's', '[[],{}]', 'running', 1.5);
INSERT INTO events VALUES
    (1, 0, 'started', '0', 'a', x'', 2.5),
    (1, 1, 'done', '0', 'a', CAST('"result of ä"' AS BLOB), 3.5),
    (1, 2, 'started', '1', 'b', x'', 4.5),
    (1, 3, 'interrupted', '', 's', x'ff00', 4.5);
"""


async def test_a_file_of_an_older_format_becomes_one_of_this(path):
    """A journal with an event in each row is taken over when it is opened, with what is unfinished in it."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(FORMAT_1)
    shop = Shop()
    async with SQLiteJournal(path) as journal:
        events = await journal.history("r")
        report = await journal.recover([abc(shop)])
    async with SQLiteJournal(path):  # a second time there is nothing to do
        pass

    assert events == [
        Event(EventKind.STARTED, (0,), "a", b"", 2.5),
        Event(EventKind.DONE, (0,), "a", '"result of ä"'.encode(), 3.5),
        Event(EventKind.STARTED, (1,), "b", b"", 4.5),
        Event(EventKind.INTERRUPTED, (), "s", b"\xff\x00", 4.5),
    ]
    assert [one.state for one in report.recovered] == [RunState.COMPENSATED]
    assert shop.log == ["-b", "-a"]
    new = path.with_name("new.db")
    async with SQLiteJournal(new):
        pass
    schema = (
        "SELECT sql FROM sqlite_master WHERE name IN ('events', 'records', 'unfinished') ORDER BY 1"
    )
    assert read(path, schema) == read(new, schema)
    assert read(path, "PRAGMA user_version") == [2]


async def test_d6_a_file_of_an_older_format_is_not_changed_under_a_living_process(path):
    """A process that has it open would not find its tables any more: it is let end first (D6)."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(FORMAT_1)
        connection.execute("INSERT INTO owners (token, pid) VALUES ('dead', 1), ('alive', 77)")
        connection.commit()
    lock = _locks.take_lock(path.with_name("sagas.db-owner-alive"))
    assert lock is not None
    with pytest.raises(JournalError, match="has format 1, of an older .*, and process 77 has it open"):
        async with SQLiteJournal(path):
            raise AssertionError  # pragma: no cover - must not be reached
    assert read(path, "PRAGMA user_version") == [1]
    lock.close()
    async with SQLiteJournal(path) as journal:
        assert 4 == len(await journal.history("r"))


class Bytes:
    """A codec whose bytes are no text."""

    def encode(self, value: object) -> bytes:
        return b"\xff" + repr(value).encode()

    def decode(self, data: bytes, kind: Any) -> Any:
        return ast.literal_eval(data[1:].decode())


async def test_what_a_codec_writes_need_be_no_text(path):
    """Results in bytes that are no UTF-8 are kept, and come back (D5)."""
    shop = Shop()
    whole = abc(shop)
    async with SQLiteJournal(path, codec=Bytes()) as journal:
        await journal.run(whole, run_id="r")
    let_die(path, 3)
    async with SQLiteJournal(path, codec=Bytes()) as journal:
        await journal.recover([whole], on_crash="resume")
        data = [event.data for event in await journal.history("r") if event.kind is EventKind.DONE]

    assert data == [b"\xff'result of %c'" % letter for letter in b"abc"]


async def test_without_msgspec_records_are_the_same(monkeypatch):
    """Who has a codec of his own needs no msgspec: the same text is written, and read, without it."""
    events = [
        Event(EventKind.STARTED, (0, 12), "a", b"", 1764200000.25),
        Event(EventKind.DONE, (0, 12), "a", '"ä"'.encode(), 1764200000.5),
        Event(EventKind.DONE, (), "", b"\xff", 0.0),
    ]
    one = _records.Events()
    monkeypatch.setitem(sys.modules, "msgspec.json", None)
    other = _records.Events()
    text = one.encode([_records.written(*event) for event in events])

    assert json.loads(text) == json.loads(other.encode([_records.written(*event) for event in events]))
    assert one.decode(text) == other.decode(text) == events


async def test_the_history_can_be_read_by_any_tool_for_sqlite(path):
    """The view has a row for each event, with its place in dots, whatever record it is in."""
    inner = Saga([Step(lambda: None, name="a"), Step(lambda: 1, name="b")], name="inner")
    async with SQLiteJournal(path) as journal:
        await journal.run(Saga([Parallel(inner, name="group")], name="s"), run_id="r")
        (ended,) = await journal.runs()

    assert read(path, "SELECT seq, kind, path, name, data FROM events") == [
        (0, "started", "0.0.0", "a", ""),
        (1, "done", "0.0.0", "a", "null"),
        (2, "started", "0.0.1", "b", ""),
        (3, "done", "0.0.1", "b", "1"),
        (4, "joined", "0.0", "inner", ""),
        (5, "joined", "0", "group", ""),
    ]
    times = read(path, "SELECT at FROM events")
    assert ended.started <= min(times) <= max(times) <= ended.ended


# --- when it is on disk ---------------------------------------------------------------------------


async def test_d2_an_intent_is_on_disk_before_its_action_runs(path):
    """Inside an action another connection sees that it has started, and how those before it ended (D2)."""
    shop = Shop()
    seen: dict[str, Any] = {}
    for name in "abc":
        shop.moments[name] = lambda name=name: seen.setdefault(name, kinds(path))
    async with SQLiteJournal(path) as journal:
        await journal.run(abc(shop), run_id="r")

    a, b = [("started", "a"), ("done", "a")], [("started", "b"), ("done", "b")]
    assert seen == {"a": a[:1], "b": [*a, b[0]], "c": [*a, *b, ("started", "c")]}
    assert kinds(path) == [*a, *b, ("started", "c"), ("done", "c")]


async def test_d2_the_intent_of_a_compensation_is_on_disk_before_it_runs(path):
    """Inside a compensation another connection sees that it has started (D2)."""
    seen = []
    shop = Shop()
    whole = Saga(
        [
            Step(lambda: None, lambda: seen.extend(kinds(path)[-1:]), name="seen"),
            shop.step("b", fails=Boom("b")),
        ]
    )
    async with SQLiteJournal(path) as journal:
        await journal.run(whole, run_id="r", exceptions=Boom)

    assert seen == [("compensating", "seen")]


async def test_d1_an_ended_run_is_recalled_from_the_file(path):
    """A second call gives what the first gave, also after the file was closed, and runs nothing (D1)."""
    shop = Shop()
    async with SQLiteJournal(path) as journal:
        await journal.run(abc(shop), run_id="r")
        with pytest.raises(Boom):
            await journal.run(abc(shop, fails=Boom("b")), run_id="bad")
        log = list(shop.log)
    async with SQLiteJournal(path) as journal:
        outcome = await journal.run(abc(shop), run_id="r")
        with pytest.raises(Boom, match="^b\n"):
            await journal.run(abc(shop), run_id="bad")
        with pytest.raises(OtherRun, match=r"run 'r' is one of saga 's', not of 'stuck'"):
            await journal.run(stuck(shop), run_id="r")

    assert outcome.state is SagaState.COMPLETED
    assert [(step.state, step.result) for step in outcome.steps] == [
        (StepState.COMPLETED, f"result of {name}") for name in "abc"
    ]
    assert shop.log == log


# --- whose a run is -------------------------------------------------------------------------------


async def test_d6_a_run_that_another_journal_has_in_hand_is_refused(path):
    """Of two journals on one file, one has the run, and the other neither runs nor recovers it (D6)."""
    shop = Shop()
    async with SQLiteJournal(path) as one, SQLiteJournal(path) as other:
        async with under_way(one, shop) as whole:
            with pytest.raises(RunInProgress, match="run 'r' is under way in another process"):
                await other.run(whole, run_id="r")
            with pytest.raises(RunInProgress, match="run 'r' is under way in this process"):
                await one.run(whole, run_id="r")
            report = await other.recover([whole])
            assert (report.in_progress, report.recovered, report.ok) == (("r",), (), True)
            assert [info.alive for info in await one.runs()] == [True]
            assert [info.alive for info in await other.runs()] == [True]
        assert [info.alive for info in await other.runs()] == [False]
        assert (await other.run(whole, run_id="r")).state is SagaState.COMPLETED

    assert shop.log == ["a", "b"]


async def test_d6_a_run_is_free_when_the_lock_of_its_owner_is(path):
    """What tells a living owner from a dead one is its lock, and nothing else (D6)."""
    shop = Shop()
    async with SQLiteJournal(path) as dying, SQLiteJournal(path) as other:
        async with under_way(dying, shop) as whole:

            def die(_):
                dying._lock.close()
                dying._lock = None

            await on_connection(dying, die)
            assert [info.alive for info in await other.runs()] == [False]
            (one,) = (await other.recover([whole])).recovered
            assert (one.state, shop.there) == (RunState.COMPENSATED, set())
            # Whoever died does nothing more.
            write(
                path, "CREATE TRIGGER t BEFORE INSERT ON records BEGIN SELECT RAISE(ABORT, 'dead'); END"
            )
        assert owner_files(path) == [other._lock_path(other._token)]


@pytest.mark.parametrize("token", ["dead", "gone", None])
async def test_d6_a_run_of_a_dead_owner_is_taken_over(path, token):
    """Whether the dead owner's file is still there, or its row, its run is taken over (D6)."""
    shop = Shop()
    whole = abc(shop)
    async with SQLiteJournal(path) as journal:
        await journal.run(whole, run_id="r")
    let_die(path, 3)
    (file,) = owner_files(path)
    if token != "dead":
        file.unlink()
    if token is None:
        write(path, "DELETE FROM owners")
    async with SQLiteJournal(path) as journal:
        assert [info.alive for info in await journal.runs()] == [False]
        with pytest.raises(RunInterrupted):
            await journal.run(whole, run_id="r")

    assert owner_files(path) == []
    assert shop.log == ["a", "b", "c", "-b", "-a"]  # it had died before c, as far as anybody knows


async def test_d6_numbers_of_events_go_on_after_a_takeover(path):
    """Who takes a run over numbers its events on from the last that is recorded (D6)."""
    shop = Shop()
    whole = abc(shop)
    async with SQLiteJournal(path) as journal:
        await journal.run(whole, run_id="r")
    let_die(path, 3)
    async with SQLiteJournal(path) as journal:
        report = await journal.recover([whole], on_crash="resume")

    assert [one.state for one in report.recovered] == [RunState.COMPLETED]
    assert read(path, "SELECT seq, kind, name FROM events ORDER BY seq") == [
        (0, "started", "a"),
        (1, "done", "a"),
        (2, "started", "b"),
        (3, "started", "b"),
        (4, "done", "b"),
        (5, "started", "c"),
        (6, "done", "c"),
    ]


async def test_d6_a_run_that_died_before_its_first_event_is_taken_over(path):
    """A run of which nothing but its start is recorded ends compensated, with nothing done (D6)."""
    shop = Shop()
    whole = abc(shop)
    async with SQLiteJournal(path) as journal:
        await journal.run(whole, run_id="r")
    let_die(path, 0)
    shop.log.clear()
    info = await recovered_by_another(path, whole)

    assert (info.state, shop.log) == (RunState.COMPENSATED, [])


async def test_d6_an_owner_goes_when_its_journal_is_closed(path):
    """While a journal is open it has one row and one file with a lock; closed, it has neither (D6)."""
    async with SQLiteJournal(path) as one:
        async with SQLiteJournal(path) as other:
            tokens = sorted([one._token, other._token])
            assert sorted(read(path, "SELECT token FROM owners")) == tokens
            assert owner_files(path) == [path.with_name(f"sagas.db-owner-{token}") for token in tokens]
        assert read(path, "SELECT token FROM owners") == [one._token]
        assert owner_files(path) == [one._lock_path(one._token)]

    assert read(path, "SELECT count(*) FROM owners") == [0]
    assert [file.name for file in path.parent.iterdir()] == ["sagas.db"]


async def test_d6_a_journal_may_be_opened_again(path):
    """One journal object may be opened again after it was closed, as another owner (D6)."""
    shop = Shop()
    journal = SQLiteJournal(path)
    async with journal:
        await journal.run(abc(shop), run_id="r")
        token = journal._token
    async with journal:
        assert journal._token != token
        assert (await journal.run(abc(shop), run_id="r")).state is SagaState.COMPLETED

    assert shop.log == ["a", "b", "c"]


async def test_d6_a_run_that_outlives_its_journal_is_nobody_elses(path):
    """Until a run has ended, the lock stays that says that it acts, though its journal is closed (D6)."""
    shop = Shop()
    journal = SQLiteJournal(path)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(journal)
        async with under_way(journal, shop) as whole, SQLiteJournal(path) as other:
            await stack.aclose()
            assert [info.alive for info in await other.runs()] == [True]
            assert (await other.recover([whole])).in_progress == ("r",)
            assert shop.log == ["a"]
        assert shop.log == ["a", "-a"]
        assert owner_files(path) == []

    info = await recovered_by_another(path, whole)
    assert (info.state, shop.there) == (RunState.COMPENSATED, set())


async def test_d6_the_last_run_that_outlives_its_journal_gives_up_the_lock(path):
    """Of two runs that outlive their journal, the first that ends leaves the lock to the other (D6)."""
    shop = Shop()
    journal = SQLiteJournal(path)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(journal)
        async with under_way(journal, shop):
            async with under_way(journal, shop, "r2"):
                await stack.aclose()
            assert owner_files(path) == [journal._lock_path(journal._token)]
        assert owner_files(path) == []


async def test_d6_a_journal_is_not_opened_again_while_its_runs_act(path):
    """As another owner it would take its own runs for those of a dead process (D6)."""
    shop = Shop()
    journal = SQLiteJournal(path)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(journal)
        async with under_way(journal, shop) as whole:
            await stack.aclose()
            with pytest.raises(JournalError, match=r"cannot be opened again: .* still are: 'r'; wait"):
                await journal.__aenter__()
    async with journal:
        assert [one.run_id for one in (await journal.recover([whole])).recovered] == ["r"]


# --- lists ----------------------------------------------------------------------------------------


async def test_runs_are_listed_with_how_they_stand(path):
    """A list tells of each run how it stands, what it ended with, and whether it is in hand."""
    shop = Shop()
    async with SQLiteJournal(path) as journal:
        await journal.run(Saga([shop.step("x")], name="v", version="2"), run_id="done")
        await journal.run(abc(shop, fails=Boom("b")), run_id="back", exceptions=Boom)
        await journal.run(abc(shop, fails=Boom()), run_id="mute", exceptions=Boom)
        with pytest.raises(Exception, match="stuck"):
            await journal.run(stuck(shop), run_id="stuck")
        async with under_way(journal, shop):
            listed = await journal.runs()
            running = await journal.runs(state=RunState.RUNNING)

    assert [(run.run_id, run.saga, run.version, run.state, run.alive) for run in listed] == [
        ("done", "v", "2", RunState.COMPLETED, False),
        ("back", "s", None, RunState.COMPENSATED, False),
        ("mute", "s", None, RunState.COMPENSATED, False),
        ("stuck", "stuck", None, RunState.FAILED, False),
        ("r", "s", None, RunState.RUNNING, True),
    ]
    assert [run.error for run in listed[:3]] == [None, "Boom: b", "Boom"]
    assert listed[3].error.startswith("CompensationFailed: ")
    assert all(run.started <= run.ended for run in listed[:-1])
    assert (listed[-1].ended, listed[-1].error) == (None, None)
    assert running == listed[-1:]


async def test_a_history_gives_the_events_in_their_order(path):
    """What is recorded of a run is read by its id; a run that is not there is an error that says so."""
    async with SQLiteJournal(path) as journal:
        await journal.run(Saga([Saga([Shop().step("a")])], name="s"), run_id="r")
        events = await journal.history("r")
        with pytest.raises(JournalError, match=r"run 'other' is not in the journal .*sagas\.db$"):
            await journal.history("other")

    assert [(event.kind, event.path, event.name, event.data) for event in events] == [
        (EventKind.STARTED, (0, 0), "a", b""),
        (EventKind.DONE, (0, 0), "a", b'"result of a"'),
    ]
    assert 0 < events[0].at <= events[1].at


async def test_prune_forgets_what_has_ended_well(path):
    """Runs that completed or were taken back go, with their events; the others stay, as does the lock."""
    shop = Shop()
    async with SQLiteJournal(path) as journal, SQLiteJournal(path) as other:
        await journal.run(abc(shop), run_id="done")
        await journal.run(abc(shop, fails=Boom("b")), run_id="back", exceptions=Boom)
        with pytest.raises(Exception, match="stuck"):
            await journal.run(stuck(shop), run_id="stuck")
        async with under_way(journal, shop):
            assert await journal.prune(before=0) == 0
            assert len(await journal.runs()) == 4
            assert await journal.prune(before=LATER) == 2
            assert [run.run_id for run in await journal.runs()] == ["stuck", "r"]
        assert read(path, "SELECT DISTINCT run_id FROM runs JOIN events ON run = id ORDER BY 1") == [
            "r",
            "stuck",
        ]
        assert read(path, "SELECT count(*) FROM events WHERE run NOT IN (SELECT id FROM runs)") == [0]
        assert len(owner_files(path)) == 2

        assert await other.prune(before=LATER) == 1
        await journal.run(abc(shop), run_id="done")
        assert shop.log[-3:] == ["a", "b", "c"]  # forgotten, it has run anew


async def test_d6_prune_forgets_owners_that_are_dead(path):
    """An owner that is dead goes, with its file, once nothing is left of its runs (D6)."""
    whole = abc(Shop())
    async with SQLiteJournal(path) as journal:
        await journal.run(whole, run_id="r")
    let_die(path, 3)
    async with SQLiteJournal(path) as one, SQLiteJournal(path) as other:
        living = {one._token, other._token}
        await one.prune(before=LATER)
        assert set(read(path, "SELECT token FROM owners")) == {*living, "dead"}
        await one.recover([whole])
        await one.prune(before=LATER)
        assert set(read(path, "SELECT token FROM owners")) == living
        assert len(owner_files(path)) == 2


async def test_d6_prune_removes_files_of_processes_that_died_while_they_opened(path):
    """A file that is nobody's goes; one with a lock stays, and whatever else stands beside it (D6)."""
    (path.parent / "sagas.db-copy").touch()
    (path.parent / "sagas.db-owner-stray").touch()
    (path.parent / "sagas.db-owner-folder").mkdir()
    opening = path.parent / "sagas.db-owner-opening"
    async with SQLiteJournal(path) as journal, SQLiteJournal(path) as other:
        with closing(_locks.take_lock(opening)):
            assert await journal.prune(before=0) == 0
        names = {file.name.removeprefix("sagas.db-") for file in path.parent.iterdir()}
        owners = {f"owner-{one._token}" for one in (journal, other)}

    assert names == {"sagas.db", "wal", "shm", "copy", "owner-folder", "owner-opening", *owners}


async def test_d6_prune_of_a_journal_whose_directory_may_not_be_listed(path, monkeypatch):
    """What stands beside the journal is no reason to fail."""

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    async with SQLiteJournal(path) as journal:
        await journal.run(abc(Shop()), run_id="r")
        monkeypatch.setattr(Path, "iterdir", refuse)
        assert await journal.prune(before=LATER) == 1
        monkeypatch.undo()


async def test_d6_a_dead_owner_whose_file_cannot_be_removed_is_dead(path, monkeypatch):
    """That a file cannot be removed, as on Windows while it is open, says nothing of its owner (D6)."""
    whole = abc(Shop())
    async with SQLiteJournal(path) as journal:
        await journal.run(whole, run_id="r")
    let_die(path, 3)

    def refuse(*args, **options):
        raise PermissionError(13, "it is being used by another process")

    async with SQLiteJournal(path) as journal:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", refuse)
            report = await journal.recover([whole])

    assert [one.run_id for one in report.recovered] == ["r"]
    assert owner_files(path) == [path.with_name("sagas.db-owner-dead")]


def a_broken_file(file: Path) -> None:
    file.write_text("no database\n" * 100)


@pytest.mark.parametrize("make", [Path.mkdir, a_broken_file])
async def test_d6_an_owner_of_whom_nobody_can_tell_counts_as_alive(make, path):
    """Where the lock cannot be asked, that run is left alone, and no other has to do with it (D6)."""
    shop = Shop()
    whole = abc(shop)
    async with SQLiteJournal(path) as journal:
        await journal.run(whole, run_id="r")
    let_die(path, 3)
    (file,) = owner_files(path)
    file.unlink()
    make(file)
    async with SQLiteJournal(path) as journal:
        async with create_task_group() as tasks:
            for number in range(3):  # in the same batch
                tasks.start_soon(partial(journal.run, whole, run_id=str(number)))
            report = await journal.recover([whole])
        assert report.in_progress[0] == "r"
        assert report.ok
        alive = {info.run_id: info.alive for info in await journal.runs()}
        assert alive == {"r": True, "0": False, "1": False, "2": False}
        assert await journal.prune(before=LATER) == 3
    assert file.exists()


# --- opened while somebody cleans up --------------------------------------------------------------


async def opened_between(path: Path, monkeypatch: Any, moment: str, come: Any) -> list[str]:
    """Opens the journal while somebody comes when its lock's file was just made, or locked."""
    seen: list[str] = []
    before = getattr(_locks, moment)

    def step(file: Path) -> Any:
        result = before(file)
        if "-owner-" in file.name:
            seen.append(file.name)
            if len(seen) == 1:
                come(file)
        return result

    monkeypatch.setattr(_locks, moment, step)
    async with SQLiteJournal(path) as journal:
        mine = journal._lock_path(journal._token)
        assert mine.name == seen[-1]
        assert _locks.is_locked(mine)
    return seen


@pytest.mark.parametrize("moment", ["make_file", "_locked"])
async def test_d6_an_owner_whose_file_was_removed_takes_another(moment, path, monkeypatch):
    """Cleaned up before it is locked, or before it is known to be, a file is no lock of anybody (D6)."""
    seen = await opened_between(path, monkeypatch, moment, Path.unlink)

    assert len(set(seen)) == 2
    assert owner_files(path) == []


async def test_d6_an_owner_whose_file_is_locked_by_others_takes_another(path, monkeypatch):
    """Who cleans up holds the lock while he does; the file is his (D6)."""
    locks = []
    seen = await opened_between(
        path, monkeypatch, "make_file", lambda file: locks.append(_locks._locked(file))
    )
    locks.pop().close()

    assert len(set(seen)) == 2
    assert owner_files(path) == [path.with_name(seen[0])]


async def test_d8_a_lock_that_cannot_be_opened_opens_no_journal(path, monkeypatch):
    """Where the lock's file is there, and cannot be opened, the journal says so and is not opened (D8)."""

    def to_folder(file: Path) -> None:
        file.unlink()
        file.mkdir()

    with pytest.raises(JournalError, match=r"sagas\.db cannot be opened: unable to open database file"):
        await opened_between(path, monkeypatch, "make_file", to_folder)


# --- tried again ----------------------------------------------------------------------------------


async def test_d8_a_failed_run_is_tried_again(path):
    """A run that could not be taken back is listed as failed, and taken back by `retry` (D8)."""
    broken = [True]
    seen: list[Any] = []
    shop = Shop()

    def back_fails() -> bool:
        seen.append(read(path, "SELECT state, ended, error FROM runs"))
        return broken[0]

    whole = stuck(shop, back_fails)
    async with SQLiteJournal(path) as journal:
        with pytest.raises(Exception, match="stuck"):
            await journal.run(whole, run_id="r")
        assert shop.there == {"a"}
        broken[0] = False
    async with SQLiteJournal(path) as journal:
        (failed,) = await journal.runs(state=RunState.FAILED)
        assert (await journal.recover([whole])).recovered == ()
        with pytest.raises(Boom, match="^b\n"):
            await journal.retry(whole, failed.run_id)
        (info,) = await journal.runs()
        with pytest.raises(
            JournalError, match="run 'r' is compensated; only a failed run can be tried"
        ):
            await journal.retry(whole, "r")
        with pytest.raises(JournalError, match="run 'other' is not in the journal; only a failed run"):
            await journal.retry(whole, "other")

    assert (info.state, shop.there) == (RunState.COMPENSATED, set())
    numbers = read(path, "SELECT seq FROM events ORDER BY seq")
    assert numbers == list(range(len(numbers)))
    assert seen == [[("running", None, None)]] * 2  # while it is tried, it has not ended
    assert ("retry", "stuck") in kinds(path)


async def test_a_completed_run_is_opened_again_by_its_rollback(path):
    """`Outcome.rollback` of a run that is recorded as completed is recorded too, and ends it anew."""
    shop = Shop()
    async with SQLiteJournal(path) as journal:
        outcome = await journal.run(abc(shop), run_id="r")
        await outcome.rollback()
        (info,) = await journal.runs()

    assert (info.state, info.alive, shop.there) == (RunState.COMPENSATED, False, set())
    numbers = read(path, "SELECT seq FROM events ORDER BY seq")
    assert numbers == list(range(13))
    assert read(path, "SELECT owner, value, ended IS NULL FROM runs") == [(None, b"", 0)]


async def test_d6_the_way_to_the_file_makes_no_difference(path, tmp_path):
    """By whatever link two journals come to a file, they know each other's owners (D6)."""
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link.db"
    link.symlink_to(path)
    shop = Shop()
    async with SQLiteJournal(path) as journal, SQLiteJournal(link) as other:
        async with under_way(journal, shop) as whole:
            report = await other.recover([whole])
            assert report.in_progress == ("r",)
            assert [True] == [info.alive for info in await other.runs()]


READER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
print(connection.execute("SELECT count(*) FROM runs").fetchone()[0])
connection.close()
"""


async def test_d6_another_journal_in_the_process_drops_no_locks(path):
    """A process keeps its locks on the file when it opens it again; the log is not taken from it (D6)."""
    whole = Saga([Step(lambda: None, name="a")], name="s")
    async with SQLiteJournal(path) as journal:
        await journal.run(whole, run_id="1")
        await opened_once(path)
        # Whoever closes last deletes the log: so this one must not believe to be the last.
        ran = await anyio.run_process([sys.executable, "-c", READER, str(path)])
        assert ran.stdout.split() == [b"1"]
        assert Path(f"{path}-wal").exists()
        await journal.run(whole, run_id="2")

    assert read(path, "SELECT run_id FROM runs") == ["1", "2"]


@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
async def test_an_opening_that_is_cancelled_natively_leaves_nothing_open(path):
    """``task.cancel()`` while the file is opened closes it again, and its lock is gone."""
    task = asyncio.ensure_future(opened_once(path))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    threads = [thread for thread in threading.enumerate() if thread.name == "pysagas journal"]
    for thread in threads:
        await asyncio.to_thread(thread.join)  # pragma: no cover - it may have ended already

    assert task.cancelled()
    assert owner_files(path) == []


@asynccontextmanager
async def thread_held(journal: SQLiteJournal) -> AsyncIterator[None]:
    """The journal's thread is at work for the length of the block: what comes is the next batch."""
    at_work, go = threading.Event(), threading.Event()

    def hold(_: sqlite3.Connection) -> None:
        at_work.set()
        assert go.wait(ENOUGH)

    holding = asyncio.ensure_future(on_connection(journal, hold))
    await asyncio.to_thread(at_work.wait)
    try:
        yield
    finally:
        go.set()
        await holding


@asynccontextmanager
async def thread_held_when(journal: SQLiteJournal, reached: asyncio.Event) -> AsyncIterator[None]:
    """The same, from when the journal's thread is given what is meant to wait."""
    encode_or_write, go = journal._open()._texts, threading.Event()

    def hold(batch: Any) -> Any:
        if reached.is_set():
            assert go.wait(ENOUGH)
        return encode_or_write(batch)

    journal._open()._texts = hold
    await reached.wait()
    try:
        yield
    finally:
        go.set()


def held_at_a_commit(journal: SQLiteJournal) -> tuple[threading.Event, threading.Event]:
    """Stops the thread before it writes the commit of a saga; gives when it is there, and lets it go on."""
    at_work, go = threading.Event(), threading.Event()
    writer = journal._open()
    encode = writer._encode

    def slow(records: Any) -> str:
        events = records.values() if isinstance(records, dict) else ()
        if any(kind == "committed" for its in events for kind, *_ in its):
            at_work.set()
            assert go.wait(ENOUGH)
        return encode(records)

    writer._encode = slow
    return at_work, go


async def cancelled_twice(task: asyncio.Future[Any]) -> None:
    """Cancels a task natively, and again when it has dealt with that; it goes on all the same."""
    for _ in range(2):
        await wait_all_tasks_blocked()
        task.cancel()
    await wait_all_tasks_blocked()
    assert not task.done()


@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
async def test_d6_an_end_that_is_cancelled_natively_is_in_hand_until_it_is_recorded(path):
    """Who asks again at once must not find the run unfinished, and take it back (D1, D6)."""
    shop = Shop()
    begun, go = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        begun.set()
        await go.wait()

    whole = Saga([shop.step("a"), Step(wait)], name="s")
    async with SQLiteJournal(path) as journal:
        first = asyncio.ensure_future(journal.run(whole, run_id="r"))
        await begun.wait()
        async with thread_held(journal):
            go.set()
            await cancelled_twice(first)
            with pytest.raises(RunInProgress):
                await journal.run(whole, run_id="r")
        with pytest.raises(asyncio.CancelledError):
            await first
        assert (await journal.run(whole, run_id="r")).state is SagaState.COMPLETED

    assert (shop.there, read(path, "SELECT state FROM runs")) == ({"a"}, ["completed"])


@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
async def test_g8_a_failed_compensation_goes_over_a_cancellation_that_comes_with_the_end(path):
    """Cancelled natively while it is recorded that something could not be taken back, a run says that (G8)."""
    begun, go = asyncio.Event(), asyncio.Event()

    async def fail() -> None:
        raise Boom

    async def wait_and_fail() -> None:
        begun.set()
        await go.wait()
        raise Boom

    whole = Saga([Step(fail, wait_and_fail)], name="s")
    async with SQLiteJournal(path) as journal:
        run = asyncio.ensure_future(journal.run(whole, run_id="r"))
        await begun.wait()
        async with thread_held(journal):
            go.set()
            await cancelled_twice(run)
        with pytest.raises(CompensationFailed) as caught:
            await run

    assert isinstance(caught.value.__context__, asyncio.CancelledError)
    assert read(path, "SELECT state FROM runs") == ["failed"]


@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
async def test_g14_a_cancellation_goes_over_what_could_not_be_recorded_of_a_later_rollback(path):
    """One that came while the run was taken up again is not lost where its end cannot be written (G14)."""
    shop = Shop()
    async with SQLiteJournal(path) as journal:
        outcome = await journal.run(abc(shop), run_id="r")
        end, reopen = journal._end, journal._reopen
        reached = asyncio.Event()

        async def full(*_: Any) -> None:
            journal._end = end
            raise JournalError("full")

        async def told(*args: Any) -> None:
            reached.set()
            await reopen(*args)

        journal._end, journal._reopen = full, told
        later = asyncio.ensure_future(outcome.rollback())
        async with thread_held_when(journal, reached):
            await cancelled_twice(later)
        with pytest.raises(asyncio.CancelledError) as caught:
            await later

    assert "full" in str(caught.value.__cause__)
    assert shop.there == set()


@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
async def test_d6_a_beginning_that_is_cancelled_natively_is_in_hand_until_it_is_let_go(path):
    """Who asks again at once must not have the run taken out of its hands (D6)."""
    shop = Shop()
    async with SQLiteJournal(path) as journal:
        async with thread_held(journal):
            first = asyncio.ensure_future(journal.run(abc(shop), run_id="r"))
            await cancelled_twice(first)
            with pytest.raises(RunInProgress):
                await journal.run(abc(shop), run_id="r")
        with pytest.raises(asyncio.CancelledError):
            await first
        assert read(path, "SELECT state, owner FROM runs") == [("running", None)]
        # What was cancelled before it had begun is not begun by who goes on with it, either.
        with pytest.raises(RunInterrupted):
            await journal.run(abc(shop), run_id="r", on_crash="resume")
    assert shop.log == []


@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
async def test_d6_a_cancellation_goes_over_what_a_call_is_refused_for(path):
    """Whose call is cancelled while it is compared with the first one is cancelled, and gets no outcome (D1)."""

    async def act(a: int, b: int) -> None:
        pass

    whole = Saga([Step(act)], name="s")
    async with SQLiteJournal(path) as journal:
        await journal.run(whole, a=1, b=2, run_id="r")
        async with thread_held(journal):
            again = asyncio.ensure_future(journal.run(whole, b=2, a=1, run_id="r"))
            await cancelled_twice(again)
        with pytest.raises(asyncio.CancelledError):
            await again
        assert (await journal.run(whole, b=2, a=1, run_id="r")).state is SagaState.COMPLETED


@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
@never_awaited
@pytest.mark.usefixtures("collected")
async def test_d8_a_commit_that_all_tasks_are_cancelled_in_is_waited_for(path):
    """Who cancels all tasks there are cancels those that wait for it too; it is not taken for failed (D8, G14)."""
    others = asyncio.all_tasks()
    shop = Shop()
    async with SQLiteJournal(path) as journal:
        at_work, go = held_at_a_commit(journal)
        whole = Saga([shop.step("a"), Commit(), shop.step("b")], name="s")
        run = asyncio.ensure_future(journal.run(whole, run_id="r"))
        assert await anyio.to_thread.run_sync(at_work.wait, ENOUGH)
        for _ in range(2):
            await wait_all_tasks_blocked()
            cancel_other_tasks(but=tuple(others))
        await wait_all_tasks_blocked()
        assert not run.done()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await run

    assert shop.there == {"a"}
    assert ("compensating", "a") not in kinds(path)


async def test_d8_what_is_taken_back_when_the_journal_is_closed_is_recorded(path):
    """Or a recovery that resumes would carry on a run of which the beginning is gone (D8)."""
    shop = Shop()
    journal = SQLiteJournal(path)
    await journal.__aenter__()

    async def close() -> None:
        await journal.__aexit__(None, None, None)

    whole = Saga([shop.step("a"), Step(close, None, name="close"), shop.step("b")], name="s")
    with pytest.raises(JournalError, match="not open"):
        await journal.run(whole, run_id="r")
    assert (journal._owed, journal._lock) == ({}, None)
    async with SQLiteJournal(path) as another:
        report = await another.recover([whole], on_crash="resume")

    assert [one.state for one in report.recovered] == [RunState.COMPENSATED]
    assert (shop.there, "b" in shop.log) == (set(), False)


@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
async def test_d8_a_cancellation_waits_for_what_is_recorded_after_the_closing(path):
    """Cancelled natively, a run that is taken back then is in hand until that is on disk (D8, G14)."""
    shop = Shop()
    journal = SQLiteJournal(path)
    await journal.__aenter__()
    at_work, go = threading.Event(), threading.Event()
    settle = journal._settle

    def slow(*args: Any) -> set[int]:
        at_work.set()
        assert go.wait(ENOUGH)
        return settle(*args)

    async def close() -> None:
        await journal.__aexit__(None, None, None)
        journal._settle = slow

    whole = Saga([shop.step("a"), Step(close, None, name="close"), shop.step("b")], name="s")
    run = asyncio.ensure_future(journal.run(whole, run_id="r"))
    assert await anyio.to_thread.run_sync(at_work.wait, ENOUGH)
    run.cancel()
    await wait_all_tasks_blocked()
    assert (run.done(), journal._in_hand) == (False, {"r"})
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await run

    assert (journal._owed, journal._lock, shop.there) == ({}, None, set())
    assert ("interrupted", "s") in kinds(path)


async def test_d8_what_a_closed_journal_has_to_write_yet_comes_first(path):
    """A run that is taken back when the journal is closed does not take the place of its own last events (D8)."""
    shop, began, go = Shop(), threading.Event(), threading.Event()
    journal = SQLiteJournal(path)
    await journal.__aenter__()

    def work(_: sqlite3.Connection) -> None:
        began.set()
        assert go.wait(ENOUGH)

    async def hold_the_thread() -> None:
        tasks.start_soon(journal._open().call, work)
        await anyio.to_thread.run_sync(began.wait, ENOUGH)

    @saga(name="s")
    async def whole(scope: SagaScope) -> None:
        await scope.step(hold_the_thread, compensation=lambda: shop.take("x"), name="x")
        tasks.start_soon(journal.__aexit__, None, None, None)
        while journal._writer is not None:
            await anyio.lowlevel.checkpoint()
        await scope.step(shop.step("b"))

    async def run() -> None:
        with pytest.raises(JournalError, match="not open"):
            await journal.run(whole, run_id="r")

    async with create_task_group() as tasks, create_task_group() as runs:
        runs.start_soon(run)
        await anyio.to_thread.run_sync(began.wait, ENOUGH)
        while not shop.log:
            await anyio.lowlevel.checkpoint()
        await wait_all_tasks_blocked()
        assert shop.log == ["-x"]
        go.set()

    assert kinds(path) == [("started", "x"), ("done", "x"), ("interrupted", "s")]


async def test_d8_a_closed_journal_knows_another_file_in_its_place(path):
    """A run that ends when its file was replaced is none of those that are in the new one (D8)."""
    shop = Shop()
    journal = SQLiteJournal(path)
    await journal.__aenter__()

    async def replace() -> None:
        await journal.__aexit__(None, None, None)
        for file in path.parent.iterdir():
            if "-owner-" not in file.name:
                file.unlink()
        new = await stack.enter_async_context(SQLiteJournal(path))
        await new._claim("other", "s", None, b"[[],{}]", 0.0, create=True)

    whole = Saga([shop.step("a"), Step(replace, None, name="replace"), shop.step("b")], name="s")
    async with AsyncExitStack() as stack:
        with pytest.raises(JournalError, match="not open"):
            await journal.run(whole, run_id="r")
        assert (journal._owed, kinds(path)) == ({}, [])
        assert read(path, "SELECT owner FROM runs") == [1]


async def test_d1_an_outcome_takes_back_no_other_run_of_its_id(path):
    """Where its run was pruned, and another one of that id was taken back, nothing was taken back of it (D1)."""
    shop = Shop()
    async with SQLiteJournal(path) as journal:
        outcome = await journal.run(abc(shop), run_id="r")
        await journal.prune(before=LATER)
        later = await (await journal.run(abc(shop), run_id="r")).rollback()
        assert later.state is SagaState.COMPENSATED
        with pytest.raises(JournalError, match="pruned"):
            await outcome.rollback()


async def test_d7_the_end_of_a_run_does_not_ask_all_others(path):
    """Whatever statistics of the file somebody has made: of few runs, they plan a look at each of many (D7)."""
    shop = Shop()
    whole = abc(shop)
    async with SQLiteJournal(path) as journal:
        await journal.run(whole, run_id="r")
        write(path, "ANALYZE")
        rows = "WITH RECURSIVE n (n) AS (VALUES (1) UNION ALL SELECT n + 1 FROM n WHERE n < 5000)"
        write(
            path,
            f"{rows} INSERT INTO runs (run_id, saga, args, state, started) "
            "SELECT 'other ' || n, 's', '[[],{}]', 'completed', 0 FROM n",
        )
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1

    async with SQLiteJournal(path) as journal:
        await on_connection(journal, lambda c: c.set_progress_handler(count, 1000))
        await journal.run(whole, run_id="r2")
        assert steps < 5


async def test_d8_a_closed_journal_makes_no_new_file(path):
    """Where its file is gone when a run of it ends, there is nothing to record that in (D8)."""
    shop = Shop()
    journal = SQLiteJournal(path)
    await journal.__aenter__()

    async def close_and_remove() -> None:
        await journal.__aexit__(None, None, None)
        path.unlink()

    whole = Saga([shop.step("a"), Step(close_and_remove, None, name="close"), shop.step("b")], name="s")
    with pytest.raises(JournalError, match="not open"):
        await journal.run(whole, run_id="r")

    assert (shop.there, path.exists(), journal._lock) == (set(), False, None)


@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
async def test_d8_what_is_owed_anew_is_not_struck_off_with_what_was_owed_before(path):
    """A run that was taken up and let go again, while its first letting go was tried, is owed still (D8)."""
    async with SQLiteJournal(path) as journal:
        claim = await journal._claim("r", "s", None, b"[[],{}]", 0.0, create=True)
        async with thread_held(journal):
            release = asyncio.ensure_future(journal._release(claim.key))
            await wait_all_tasks_blocked()
            anew = journal._tried[claim.key]._replace(record="[]")
            journal._strike_off(claim.key)
            journal._tried[claim.key] = anew
        await release
        assert journal._tried == {claim.key: anew}
        del journal._tried[claim.key]


@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
@pytest.mark.parametrize("fails", [False, True])
async def test_d8_a_cancellation_goes_over_a_journal_that_fails(path, fails):
    """Where both come at once the run is let go as after any failure, and the cancellation goes on (D8, G8)."""
    shop = Shop()
    begun, go = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        begun.set()
        await go.wait()
        if fails:
            raise Boom("wait")

    whole = Saga([shop.step("a"), Step(wait)], name="s", exceptions=Boom)

    def full(_: sqlite3.Connection) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    async with SQLiteJournal(path) as journal:
        task = asyncio.ensure_future(journal.run(whole, run_id="r"))
        await begun.wait()
        async with thread_held(journal):
            lost = asyncio.ensure_future(on_connection(journal, full))
            go.set()
            await cancelled_twice(task)
        with pytest.raises(JournalError, match="disk is full"):
            await lost
        with pytest.raises(asyncio.CancelledError):
            await task

        assert read(path, "SELECT state, owner FROM runs") == [("running", None)]
        assert kinds(path)[-1] == ("interrupted", "s")
    assert shop.there == set()


@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
async def test_d8_a_later_rollback_that_is_refused_and_cancelled_takes_nothing_back(path):
    """Where a run cannot be opened again, nothing of it is taken back, though a cancellation tells so (D8)."""
    shop = Shop()

    async def refuse(*_: object) -> None:
        raise asyncio.CancelledError from JournalError("refused")

    async with SQLiteJournal(path) as journal:
        outcome = await journal.run(abc(shop), run_id="r")
        journal._reopen = refuse
        with pytest.raises(asyncio.CancelledError):
            await outcome.rollback()
    assert shop.there == {"a", "b", "c"}


@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
async def test_d6_a_release_is_waited_for_though_it_is_cancelled_natively(path):
    """Or nobody would know whether it is owed still (D6)."""
    async with SQLiteJournal(path) as journal:
        claim = await journal._claim("r", "s", None, b"[[],{}]", 0.0, create=True)
        async with thread_held(journal):
            release = asyncio.ensure_future(journal._release(claim.key))
            await cancelled_twice(release)
        with pytest.raises(asyncio.CancelledError):
            await release

        assert (journal._owed, read(path, "SELECT owner FROM runs")) == ({}, [None])


@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
async def test_d6_retry_and_prune_are_waited_for_though_they_are_cancelled_natively(path):
    """What they write is written when they end, and the cancellation comes after (D6)."""
    shop = Shop()
    async with SQLiteJournal(path) as journal:
        with pytest.raises(CompensationFailed):
            await journal.run(stuck(shop), run_id="stuck")
        await journal.run(abc(shop), run_id="r")
        reopens, held = asyncio.Event(), asyncio.Event()
        reopen = journal._reopen

        async def reopen_then(key: int, was: RunState) -> None:
            reopens.set()
            await held.wait()
            await reopen(key, was)

        journal._reopen = reopen_then
        again = asyncio.ensure_future(journal.retry(stuck(shop), "stuck"))
        await reopens.wait()
        async with thread_held(journal):
            prune = asyncio.ensure_future(journal.prune(before=LATER))
            held.set()
            await cancelled_twice(again)
            await cancelled_twice(prune)
        for task in (again, prune):
            with pytest.raises(asyncio.CancelledError):
                await task

    assert read(path, "SELECT run_id, state, owner FROM runs") == [("stuck", "running", None)]


@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
async def test_d6_closing_is_waited_for_though_it_is_cancelled_natively(path):
    """Or the journal could be opened again before it has dropped its lock, and lose that (D6)."""
    journal = SQLiteJournal(path)
    await journal.__aenter__()
    async with thread_held(journal):
        closing_ = asyncio.ensure_future(journal.__aexit__(None, None, None))
        await cancelled_twice(closing_)
        with pytest.raises(JournalError, match="is still being closed; open another SQLiteJournal"):
            await journal.__aenter__()
    with pytest.raises(asyncio.CancelledError):
        await closing_

    assert owner_files(path) == []
    async with journal:
        assert journal._lock is not None


# --- a journal that fails -------------------------------------------------------------------------


async def test_d8_what_many_owe_is_paid_once(path, monkeypatch):
    """Runs that could not be let go are, by the next that begins, each once; nothing is kept of them (D8)."""
    shop = Shop()
    let_go = []

    def counted(connection: sqlite3.Connection, owed: Any) -> None:
        let_go.append(owed.key)
        release(connection, owed)

    release = _sqlite._let_go_of
    monkeypatch.setattr(_sqlite, "_let_go_of", counted)
    begun, go = 0, anyio.Event()

    async def wait() -> None:
        nonlocal begun
        begun += 1
        await go.wait()

    whole = Saga([Step(wait), shop.step("never")], name="s")

    async def fails(run_id: str) -> None:
        with pytest.raises(JournalError, match="database is locked"):
            await journal.run(whole, run_id=run_id)

    with closing(sqlite3.connect(path, isolation_level=None)) as somebody:
        async with SQLiteJournal(path, busy_timeout=0) as journal:
            async with create_task_group() as tasks:
                for number in range(20):
                    tasks.start_soon(fails, f"r{number}")
                while begun < 20:
                    await anyio.sleep(0.001)
                somebody.execute("BEGIN IMMEDIATE")
                go.set()
            assert (len(journal._owed), let_go) == (20, [])
            somebody.execute("ROLLBACK")
            async with create_task_group() as tasks:
                for number in range(5):
                    tasks.start_soon(partial(journal.run, abc(shop), run_id=f"new {number}"))
            assert sorted(let_go) == list(range(1, 21))
            assert (journal._owed, journal._tried) == ({}, {})
            assert journal._writer is not None
            assert (journal._writer._numbers, journal._writer._lost) == ({}, {})
            async with SQLiteJournal(path) as another:
                assert len((await another.recover([whole])).recovered) == 20
    assert shop.there == {"a", "b", "c"}


async def test_a_run_that_is_recalled_leaves_nothing_behind(path):
    """The journal keeps nothing of a run that has ended, however often that is asked for."""
    shop = Shop()
    async with SQLiteJournal(path) as journal:
        for _ in range(2):
            await journal.run(abc(shop), run_id="r")

        assert journal._writer is not None
        assert (journal._writer._numbers, journal._in_hand) == ({}, set())


async def test_d8_a_full_disk_takes_the_run_back(path):
    """The disk is full: the run is taken back, what was recorded stays, and is recovered later (D8)."""
    shop = Shop()
    whole = Saga(
        [shop.step("a"), Step(lambda: MANY, None, name="many"), shop.step("c")],
        name="s",
    )
    async with SQLiteJournal(path) as journal:

        def fill(connection):
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            connection.execute(f"PRAGMA max_page_count = {pages}")

        await on_connection(journal, fill)
        with pytest.raises(JournalError) as caught:
            await journal.run(whole, run_id="r")
        assert str(caught.value) == (
            f"journal {path} cannot be written: database or disk is full; when that is mended, recover() "
            "goes on from what it holds"
        )
        assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
        assert shop.log == ["a", "-a"]
        (info,) = await journal.runs()
        assert (info.state, info.alive) == (RunState.RUNNING, False)

    taken_back = ("interrupted", "s")
    assert kinds(path) == [("started", "a"), ("done", "a"), ("started", "many"), taken_back]
    info = await recovered_by_another(path, whole)
    assert (info.state, shop.there) == (RunState.COMPENSATED, set())


async def test_d8_a_full_disk_lets_no_run_begin(path):
    """The disk is full: a run of which not even the start can be recorded does nothing (D8)."""
    shop = Shop()
    whole = Saga([Step(shop.put, None, name="put")], name="s")
    async with SQLiteJournal(path) as journal:
        pages = "PRAGMA max_page_count = 1"
        await on_connection(journal, lambda connection: connection.execute(pages))
        with pytest.raises(JournalError, match="database or disk is full"):
            await journal.run(whole, MANY, run_id="r")
        assert await journal.runs() == []

    assert shop.log == []


async def test_d8_a_locked_file_takes_the_run_back(path):
    """Somebody else writes for too long: the run is taken back, and recovered when the file is free (D8)."""
    shop = Shop()
    whole = abc(shop)
    with closing(sqlite3.connect(path, isolation_level=None)) as somebody:
        async with SQLiteJournal(path, busy_timeout=0) as journal:
            shop.moments["b"] = lambda: somebody.execute("BEGIN IMMEDIATE")
            with pytest.raises(
                JournalError,
                match=r"sagas\.db cannot be written: database is locked; when that is mended",
            ):
                await journal.run(whole, run_id="r")
            assert shop.log == ["a", "b", "-b", "-a"]
        # It cannot say that it is gone; but its lock is.
        assert owner_files(path) == []
        with pytest.raises(JournalError, match=r"sagas\.db cannot be opened: database is locked$"):
            await opened_once(path, busy_timeout=0)
        assert owner_files(path) == []
        somebody.execute("ROLLBACK")

    assert kinds(path) == [("started", "a"), ("done", "a"), ("started", "b")]
    assert len(read(path, "SELECT token FROM owners")) == 1
    info = await recovered_by_another(path, whole)
    assert (info.state, shop.there) == (RunState.COMPENSATED, set())
    async with SQLiteJournal(path) as journal:
        await journal.prune(before=LATER)
        assert read(path, "SELECT token FROM owners") == [journal._token]


class Switching(sqlite3.Connection):
    """A connection that finds another one which switches to WAL mode at the same time."""

    tries: list[int] = []  # what each try at it ends with

    def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        if "journal_mode = WAL" in sql and self.tries:
            error = sqlite3.OperationalError("met somebody")
            error.sqlite_errorcode = self.tries.pop(0)
            raise error
        return super().execute(sql, *parameters)


@pytest.fixture
def tries(monkeypatch):
    connect = partial(sqlite3.connect, factory=Switching)
    monkeypatch.setattr("pysagas.durable._sqlite.sqlite3.connect", connect)
    monkeypatch.setattr(Switching, "tries", tries := [])
    return tries


async def test_d8_a_file_that_others_open_at_the_same_time_is_waited_for(path, tries):
    """SQLite waits for nobody where two switch to WAL mode at once; the journal tries again (D8)."""
    tries += [sqlite3.SQLITE_BUSY, sqlite3.SQLITE_BUSY]
    await opened_once(path)

    assert tries == []


@pytest.mark.parametrize(
    ("code", "busy_timeout"), [(sqlite3.SQLITE_BUSY, 0), (sqlite3.SQLITE_IOERR, ENOUGH)]
)
async def test_d8_a_file_that_cannot_be_switched_is_not_opened(path, tries, code, busy_timeout):
    """It is waited for no longer than is told, and for nothing but others (D8)."""
    tries += [code, code]
    with pytest.raises(JournalError, match=r"sagas\.db cannot be opened: met somebody$"):
        await opened_once(path, busy_timeout=busy_timeout)

    assert (tries, owner_files(path)) == ([code], [])


@pytest.mark.parametrize("closed", [True, False])
async def test_d8_what_was_taken_back_unrecorded_is_not_carried_on(closed, path):
    """That a run was taken back is recorded as soon as that is possible: no recovery resumes it (D8)."""
    shop = Shop()
    whole = abc(shop)
    with closing(sqlite3.connect(path, isolation_level=None)) as somebody:
        async with SQLiteJournal(path, busy_timeout=0) as journal:
            shop.moments["b"] = lambda: somebody.execute("BEGIN IMMEDIATE")
            with pytest.raises(JournalError, match="database is locked"):
                await journal.run(whole, run_id="r")
            somebody.execute("ROLLBACK")
            assert closed or (await journal.recover([whole], on_crash="resume")).ok
        async with SQLiteJournal(path) as journal:
            assert (await journal.recover([whole], on_crash="resume")).ok
            (info,) = await journal.runs()

    assert (info.state, shop.there) == (RunState.COMPENSATED, set())
    assert shop.begun == {"a": 1, "b": 1}


async def test_d6_a_run_that_is_in_hand_again_is_not_let_go_for_what_was_owed(path):
    """What could not be recorded of a run is, when it is taken up again; and not once more under its feet (D6, D8)."""
    log: list[str] = []
    began, go = anyio.Event(), anyio.Event()

    async def act() -> None:
        log.append("b")
        if len(log) == 1:
            somebody.execute("BEGIN IMMEDIATE")
        else:
            began.set()
            await go.wait()

    whole = Saga([Step(act, name="b"), Step(lambda: None, name="c")], name="s")
    with closing(sqlite3.connect(path, isolation_level=None)) as somebody:
        async with SQLiteJournal(path, busy_timeout=0) as journal:
            with pytest.raises(JournalError, match="database is locked"):
                await journal.run(whole, run_id="r", on_crash="resume")
            somebody.execute("ROLLBACK")
            owed = dict(journal._owed)
            assert len(owed) == 1
            async with create_task_group() as tasks:
                tasks.start_soon(partial(journal.run, whole, run_id="r", on_crash="resume"))
                await began.wait()
                assert journal._owed == {}
                journal._owed = owed  # as a claim has it that was made just before
                await journal.run(Saga([Step(lambda: None)], name="other"), run_id="other")
                async with SQLiteJournal(path) as another:
                    assert (await another.recover([whole], on_crash="resume")).in_progress == ("r",)
                go.set()
            (info, _) = await journal.runs()

    assert (info.state, log) == (RunState.COMPLETED, ["b", "b"])


async def test_d8_a_record_that_is_damaged_keeps_nobody_else_from_anything(path):
    """A run whose record cannot be read cannot be gone on with, and says so; other runs go on (D8)."""
    shop = Shop()
    with closing(sqlite3.connect(path, isolation_level=None)) as somebody:
        async with SQLiteJournal(path, busy_timeout=0) as journal:
            shop.moments["b"] = lambda: somebody.execute("BEGIN IMMEDIATE")
            with pytest.raises(JournalError, match="database is locked"):
                await journal.run(abc(shop), run_id="r")
            somebody.execute("ROLLBACK")
            somebody.execute("UPDATE records SET events = '[['")
            await journal.run(abc(shop), run_id="other")
            with pytest.raises(JournalError, match="a record cannot be read: .*: '\\[\\['"):
                await journal.history("r")
            report = await journal.recover([abc(shop)])
            assert "a record cannot be read" in str(report.left[0].error)
            assert ["running", "completed"] == [info.state.value for info in await journal.runs()]
            assert journal._owed == {}


async def test_d8_a_disk_that_fails_as_a_run_is_let_go_is_no_damaged_record():
    """That the number of the next event cannot be read says something against the record, or against the disk (D8)."""

    class Failing:
        def execute(self, *_: object) -> None:
            raise sqlite3.OperationalError("disk I/O error")

    broken: Any = Failing()
    with pytest.raises(sqlite3.OperationalError, match="disk I/O error"):
        _sqlite._number_after(broken, 1)


async def test_d6_a_journal_that_is_being_opened_is_not_opened_again(path):
    """Of two who open one journal at once the second is refused, and the first keeps its lock (D6)."""
    journal = SQLiteJournal(path)
    refused: list[JournalError] = []

    async def open_it() -> None:
        try:
            await journal.__aenter__()
        except JournalError as error:
            refused.append(error)

    async with create_task_group() as tasks:
        tasks.start_soon(open_it)
        tasks.start_soon(open_it)
    assert [str(error) for error in refused] == [f"journal {path} is open already"]
    assert _locks.is_locked(journal._lock_path(journal._token))
    await journal.__aexit__(None, None, None)


async def test_d8_an_end_that_could_not_be_recorded_is_not_reported(path):
    """A run that was taken back, of which the file does not know, has not ended for whoever recovers (D8)."""
    shop = Shop()
    whole = abc(shop)
    async with SQLiteJournal(path) as journal:
        claim = await journal._claim("r", "s", None, b"[[],{}]", 0.0, create=True)
        journal._append(claim.key, EventKind.STARTED, (0,), "a")
        await journal._flush(claim.key)
    with closing(sqlite3.connect(path, isolation_level=None)) as somebody:
        async with SQLiteJournal(path, busy_timeout=0) as journal:
            end = journal._end

            async def locked(key: int, ending: Any) -> None:
                somebody.execute("BEGIN IMMEDIATE")
                await end(key, ending)

            journal._end = locked
            report = await journal.recover([whole])
            somebody.execute("ROLLBACK")
    (left,) = report.left
    assert (report.ok, left.state) == (False, RunState.RUNNING)
    assert "database is locked" in str(left.error)
    info = await recovered_by_another(path, whole)
    assert info.state is RunState.COMPENSATED


async def test_d8_what_could_not_be_committed_is_still_to_be_recorded(path):
    """That a run was taken back is forgotten when it is on disk, and not when it was only written (D8)."""
    shop = Shop()
    whole = abc(shop)
    with closing(sqlite3.connect(path, isolation_level=None)) as somebody:
        async with SQLiteJournal(path, busy_timeout=0) as journal:
            shop.moments["b"] = lambda: somebody.execute("BEGIN IMMEDIATE")
            with pytest.raises(JournalError, match="database is locked"):
                await journal.run(whole, run_id="r")
            somebody.execute("ROLLBACK")

            begun, go = threading.Event(), threading.Event()

            def work(_: sqlite3.Connection) -> None:
                begun.set()
                assert go.wait(ENOUGH)

            def full(_: sqlite3.Connection) -> None:
                raise sqlite3.OperationalError("database or disk is full")

            async def fails() -> None:
                with pytest.raises(JournalError, match="disk is full"):
                    await on_connection(journal, full)

            async with create_task_group() as tasks:
                # While this one is at work, the next batch gathers: a release, and what makes it fail.
                tasks.start_soon(on_connection, journal, work)
                await anyio.to_thread.run_sync(begun.wait)
                tasks.start_soon(journal._release, 0)
                await anyio.wait_all_tasks_blocked()
                tasks.start_soon(fails)
                await anyio.wait_all_tasks_blocked()
                go.set()
            await journal._release(0)  # of no run: what is owed goes with it
        assert kinds(path)[-1] == ("interrupted", "s")
    info = await recovered_by_another(path, whole)

    assert (info.state, shop.there) == (RunState.COMPENSATED, set())


async def test_d8_what_was_taken_back_in_a_cancelled_scope_is_not_carried_on(path):
    """A cancellation does not keep it from being recorded that a run was taken back (D8)."""
    shop = Shop()
    whole = abc(shop)
    with closing(sqlite3.connect(path, isolation_level=None)) as somebody:
        async with SQLiteJournal(path, busy_timeout=0) as journal:
            with anyio.CancelScope() as scope:

                def lock() -> None:
                    somebody.execute("BEGIN IMMEDIATE")
                    scope.cancel()

                shop.moments["b"] = lock
                await journal.run(whole, run_id="r")
            somebody.execute("ROLLBACK")
            assert shop.log == ["a", "-b", "-a"]
            await journal.recover([whole], on_crash="resume")
            (info,) = await journal.runs()

    assert (info.state, shop.there) == (RunState.COMPENSATED, set())


async def test_d6_a_journal_that_is_opened_again_touches_no_run_that_is_another_ones_now(path):
    """What it could not record when it was closed is of no interest once somebody else had the run (D6)."""
    shop = Shop()
    journal = SQLiteJournal(path)
    await journal.__aenter__()

    async def close() -> None:
        await journal.__aexit__(None, None, None)

    whole = Saga([shop.step("a"), Step(close, None, name="close"), shop.step("c")], name="s")
    with pytest.raises(JournalError, match="is not open"):
        await journal.run(whole, run_id="r")
    info = await recovered_by_another(path, whole)
    assert info.state is RunState.COMPENSATED
    before = kinds(path)
    async with journal:
        await journal.run(Saga([shop.step("z")], name="z"), run_id="other")

    assert read(path, "SELECT state FROM runs WHERE run_id = 'r'") == ["compensated"]
    assert kinds(path)[: len(before)] == before


async def test_d8_a_journal_that_is_closed_while_a_commit_is_written(path):
    """A commit that is on disk is passed, whatever becomes of the journal just then (D8)."""
    shop = Shop()
    whole = Saga([shop.step("a"), Commit(), shop.step("c")], name="s")
    journal = SQLiteJournal(path)
    await journal.__aenter__()
    flush = journal._flush

    async def closing_after(key: int) -> None:
        await flush(key)
        if ("committed", "commit") in kinds(path):
            await journal.__aexit__(None, None, None)

    journal._flush = closing_after
    with pytest.raises(JournalError, match="is not open"):
        await journal.run(whole, run_id="r")
    assert shop.log == ["a"]
    info = await recovered_by_another(path, whole)

    assert (info.state, shop.log) == (RunState.COMPLETED, ["a", "c"])


async def test_d8_what_is_queued_behind_a_gap_is_not_written_when_its_run_is_let_go(path):
    """A run that lost an event and is let go leaves no later one on disk, or it would look like another saga (D8)."""
    async with SQLiteJournal(path, busy_timeout=0) as journal:
        claim = await journal._claim("r", "s", None, b"[[],{}]", 0.0, create=True)
        writer = journal._writer
        assert writer is not None
        begun, go_on, failed, take_more = (threading.Event() for _ in range(4))
        encode, call_soon = writer._encode, writer._loop.call_soon

        def held(records: Any) -> str:
            begun.set()
            assert go_on.wait(ENOUGH)
            return encode(records)

        def held_after(*call: Any) -> None:
            failed.set()
            assert take_more.wait(ENOUGH)
            call_soon(*call)

        with closing(sqlite3.connect(path, isolation_level=None)) as somebody:
            somebody.execute("BEGIN IMMEDIATE")
            writer._encode, writer._loop.call_soon = held, held_after
            journal._append(claim.key, EventKind.STARTED, (0,), "a")
            assert await anyio.to_thread.run_sync(begun.wait, ENOUGH)
            journal._append(claim.key, EventKind.STARTED, (1,), "b")
            go_on.set()
            assert await anyio.to_thread.run_sync(failed.wait, ENOUGH)
            somebody.execute("ROLLBACK")
            async with create_task_group() as tasks:
                tasks.start_soon(journal._release, claim.key)
                await wait_all_tasks_blocked()
                take_more.set()
    assert kinds(path) == []


async def test_d8_a_commit_that_was_taken_just_before_the_journal_was_closed_is_passed(path):
    """It is written all the same: nothing of what was before it is taken back, and recovery goes on (D8)."""
    shop = Shop()
    whole = Saga([shop.step("a"), Commit(), shop.step("c")], name="s")
    journal = SQLiteJournal(path)
    await journal.__aenter__()
    append = journal._append

    async with create_task_group() as tasks:

        def closed_after(key: int, kind: EventKind, *event: Any) -> None:
            append(key, kind, *event)
            if kind is EventKind.COMMITTED:
                writer, journal._writer = journal._writer, None
                assert writer is not None
                tasks.start_soon(writer.stop)

        journal._append = closed_after
        with pytest.raises(JournalError, match="is not open"):
            await journal.run(whole, run_id="r")
    assert shop.log == ["a"]
    info = await recovered_by_another(path, whole)

    assert (info.state, shop.log) == (RunState.COMPLETED, ["a", "c"])


@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
@pytest.mark.parametrize("how", ["the journal is closed", "what comes after it is lost"])
async def test_d8_a_cancellation_while_a_commit_is_written_takes_nothing_back(path, how):
    """A native cancellation does not make a commit be asked for again, when it may look as if it had failed (D8, G14)."""
    shop = Shop()
    whole = Saga([shop.step("a"), Commit(), shop.step("c")], name="s")
    journal = SQLiteJournal(path)
    await journal.__aenter__()
    at_work, go = held_at_a_commit(journal)

    def full(_: sqlite3.Connection) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    async def lose_what_comes_next() -> None:
        with pytest.raises(JournalError, match="disk is full"):
            await on_connection(journal, full)

    run = asyncio.ensure_future(journal.run(whole, run_id="r"))
    assert await anyio.to_thread.run_sync(at_work.wait, ENOUGH)
    closed = how == "the journal is closed"
    other = journal.__aexit__(None, None, None) if closed else lose_what_comes_next()
    beside = asyncio.ensure_future(other)
    await wait_all_tasks_blocked()
    run.cancel()
    await wait_all_tasks_blocked()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await run
    await beside
    if not closed:
        await journal.__aexit__(None, None, None)
    assert shop.log == ["a"]
    assert ("committed", "commit") in kinds(path)


async def test_d6_who_looks_on_needs_no_lock(path):
    """While another process writes, runs and histories can be read: and so reading keeps nobody waiting (D6)."""
    async with SQLiteJournal(path, busy_timeout=0) as journal:
        await journal.run(abc(Shop()), run_id="r")
        with closing(sqlite3.connect(path, isolation_level=None)) as somebody:
            somebody.execute("BEGIN IMMEDIATE")
            (info,) = await journal.runs()
            assert 6 == len(await journal.history(info.run_id))
            somebody.execute("ROLLBACK")


async def test_d8_a_locked_file_leaves_a_run_past_its_commit_to_recovery(path):
    """Past its commit nothing is taken back; that the run is let go need not be recorded (D8)."""
    shop = Shop()
    whole = Saga([shop.step("a"), Commit(), shop.step("b"), shop.step("c")], name="s")
    with closing(sqlite3.connect(path, isolation_level=None)) as somebody:
        async with SQLiteJournal(path, busy_timeout=0) as journal:
            shop.moments["b"] = lambda: somebody.execute("BEGIN IMMEDIATE")
            with pytest.raises(JournalError, match="database is locked"):
                await journal.run(whole, run_id="r")
            assert shop.there == {"a", "b"}
        somebody.execute("ROLLBACK")
    info = await recovered_by_another(path, whole)

    assert (info.state, shop.there) == (RunState.COMPLETED, {"a", "b", "c"})


async def test_d8_a_release_of_sqlite_that_is_too_old_is_refused(path, monkeypatch):
    """Whoever has an SQLite that lacks something is told so, and no file is made (D8)."""
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 32, 3))
    monkeypatch.setattr(sqlite3, "sqlite_version", "3.32.3")
    with pytest.raises(
        JournalError, match="it needs SQLite 3.33.0 or newer, and this Python has 3.32.3"
    ):
        await SQLiteJournal(path).__aenter__()
    assert not path.exists()


async def test_d8_a_file_that_became_read_only_takes_the_run_back(path):
    """The file cannot be written any more: the run is taken back, and recovered when it can (D8)."""
    shop = Shop()
    whole = abc(shop)
    async with SQLiteJournal(path) as journal:

        async def protect():
            await on_connection(journal, lambda c: c.execute("PRAGMA query_only = ON"))

        steps = [shop.step("a"), Step(protect, None, name="b"), shop.step("c")]
        with pytest.raises(JournalError, match="attempt to write a readonly database"):
            await journal.run(Saga(steps, name="s"), run_id="r")
        assert shop.log == ["a", "-a"]

    assert kinds(path)[:3] == [("started", "a"), ("done", "a"), ("started", "b")]
    info = await recovered_by_another(path, whole)
    assert (info.state, shop.there) == (RunState.COMPENSATED, set())


async def test_d8_a_result_that_was_lost_stops_the_run(path):
    """A batch that nobody waited for is lost: the run is taken back, not recorded past the gap (D8)."""
    shop = Shop()
    with closing(sqlite3.connect(path, isolation_level=None)) as somebody:
        async with SQLiteJournal(path, busy_timeout=0) as journal:
            append = journal._append

            def append_and_lock(key: int, kind: EventKind, *event: Any) -> None:
                if kind is EventKind.DONE:
                    somebody.execute("BEGIN IMMEDIATE")
                append(key, kind, *event)

            journal._append = append_and_lock

            @saga(name="s")
            async def whole(scope: SagaScope) -> None:
                await scope.step(shop.step("a"))
                with pytest.raises(JournalError, match="database is locked"):
                    await journal._flush(1)
                somebody.execute("ROLLBACK")
                await scope.step(shop.step("b"))

            with fail_after(ENOUGH), pytest.raises(JournalError, match="database is locked"):
                await journal.run(whole, run_id="r")
            assert shop.log == ["a", "-a"]

    assert kinds(path) == [("started", "a"), ("interrupted", "s")]
    info = await recovered_by_another(path, whole)
    assert (info.state, shop.there) == (RunState.COMPENSATED, set())


@pytest.mark.parametrize("committed", [False, True])
async def test_d8_an_end_that_cannot_be_recorded_takes_the_run_back(committed, path):
    """Where the journal fails at the very end, nobody is told that the run completed (D8)."""
    shop = Shop()
    parts = [shop.step("a"), *([Commit()] if committed else []), shop.step("b")]
    whole = Saga(parts, name="s")
    with closing(sqlite3.connect(path, isolation_level=None)) as somebody:
        async with SQLiteJournal(path, busy_timeout=0) as journal:
            end = journal._end

            async def failing(key: int, ending: Any) -> None:
                somebody.execute("BEGIN IMMEDIATE")
                try:
                    await end(key, ending)
                finally:
                    somebody.execute("ROLLBACK")

            journal._end = failing
            with pytest.raises(JournalError, match="database is locked"):
                await journal.run(whole, run_id="r")
            assert shop.there == ({"a", "b"} if committed else set())
            assert [False] == [info.alive for info in await journal.runs()]
    info = await recovered_by_another(path, whole)

    assert info.state is (RunState.COMPLETED if committed else RunState.COMPENSATED)
    assert shop.there == ({"a", "b"} if committed else set())


@pytest.mark.parametrize("expected", [(), Boom])
async def test_d8_an_end_that_cannot_be_recorded_of_a_run_that_failed(expected, path):
    """The same for a run that was taken back: the journal's failure is raised, after the run's own (D8)."""
    shop = Shop()
    whole = Saga([shop.step("a"), shop.step("b", fails=Boom("b"))], name="s")
    async with SQLiteJournal(path) as journal:

        async def failing(key: int, ending: Any) -> None:
            raise JournalError("no end")

        journal._end = failing
        with pytest.raises(JournalError, match="no end") as caught:
            await journal.run(whole, run_id="r", exceptions=expected)
        assert shop.there == set()
        assert expected or isinstance(caught.value.__context__, Boom)
        with anyio.CancelScope() as scope:
            shop.moments["a"] = scope.cancel
            await journal.run(whole, run_id="cancelled")
        assert scope.cancelled_caught


async def test_d8_a_journal_that_is_closed_in_the_middle_of_a_run_takes_it_back(path):
    """Closed while a run is under way, a journal takes it back; what was recorded is there, and that too (D8)."""
    shop = Shop()
    journal = SQLiteJournal(path)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(journal)
        async with under_way(journal, shop) as whole:
            await stack.aclose()
        assert shop.log == ["a", "-a"]

    assert kinds(path) == [
        ("started", "a"),
        ("done", "a"),
        ("started", "pause"),
        ("interrupted", "s"),
    ]
    info = await recovered_by_another(path, whole)
    assert (info.state, shop.there) == (RunState.COMPENSATED, set())


async def test_d8_a_run_says_why_it_was_taken_back_when_its_journal_is_closed(path):
    """What a run raises whose journal was closed names the file, and what to do (D8)."""
    shop = Shop()
    journal = SQLiteJournal(path)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(journal)
        whole = Saga([shop.step("a"), Step(stack.aclose, None, name="close"), shop.step("c")], name="s")
        with pytest.raises(JournalError, match=r"sagas\.db is not open: use it within `async with`\n"):
            await journal.run(whole, run_id="r")

    assert shop.log == ["a", "-a"]


# --- files and options that cannot work -----------------------------------------------------------


def a_directory(path: Path) -> None:
    path.mkdir()


def no_directory(path: Path) -> None:
    path.parent.rmdir()


def a_text(path: Path) -> None:
    path.write_text("to do: buy milk\n" * 100)


def of_something_else(path: Path) -> None:
    write(path, "CREATE TABLE customers (id)")


def of_a_newer_release(path: Path) -> None:
    anyio.run(opened_once, path)
    write(path, "PRAGMA user_version = 3")


def cut_short(path: Path) -> None:
    anyio.run(opened_once, path)
    with path.open("r+b") as file:
        file.truncate(3000)


def with_a_broken_page(path: Path) -> None:
    anyio.run(opened_once, path)
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 4096)


def without_its_tables(path: Path) -> None:
    anyio.run(opened_once, path)
    write(path, "DROP TABLE owners")


BAD_FILES = {
    a_directory: "cannot be opened: unable to open database file",
    no_directory: "cannot be opened: .*No such file or directory",
    a_text: "cannot be opened: file is not a database",
    of_something_else: "is the database of something else, and no journal; it was left as it is",
    of_a_newer_release: "has format 3, of a newer release of pysagas; .* knows formats up to 2: upgrade it",
    cut_short: "cannot be opened: database disk image is malformed",
    with_a_broken_page: "cannot be opened: database disk image is malformed",
    without_its_tables: "cannot be opened: no such table: owners",
}


@pytest.fixture(params=BAD_FILES, ids=lambda make: make.__name__)
def bad_file(request, tmp_path) -> tuple[Path, str]:
    folder = tmp_path / "folder"
    folder.mkdir()
    request.param(folder / "sagas.db")
    return folder / "sagas.db", BAD_FILES[request.param]


async def test_d8_a_file_that_is_no_journal_is_refused_and_left_as_it_is(bad_file):
    """What cannot be opened is refused with its place and the reason, and nothing is left behind (D8)."""
    path, reason = bad_file
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(JournalError, match=reason) as caught:
        await opened_once(path)

    assert str(path) in str(caught.value)
    assert caught.value.__suppress_context__
    assert (path.read_bytes() if path.is_file() else None) == before
    assert owner_files(path) == []


async def test_d8_a_file_that_may_not_be_written_is_refused(path, monkeypatch):
    """What the operating system says of a file that may not be written is told, with its place (D8)."""

    def refuse(*args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(
        JournalError, match=r"journal .*sagas\.db cannot be opened: .*Permission denied"
    ):
        await opened_once(path)


async def test_d8_a_journal_beside_which_no_lock_can_be_made_is_refused(tmp_path):
    """Where there can be no file with a lock, the journal is not opened, and says why (D8)."""
    path = tmp_path / ("x" * 230)  # with what is added for the lock, it is longer than a name may be
    with pytest.raises(JournalError, match=r"journal .*xxx cannot be .*: .*too long"):
        await opened_once(path)


async def test_d8_a_refused_file_is_opened_once_it_is_mended(path):
    """A journal that could not be opened may be opened later (D8)."""
    of_something_else(path)
    journal = SQLiteJournal(path)
    with pytest.raises(JournalError, match="something else"):
        await journal.__aenter__()
    path.unlink()
    async with journal:
        assert await journal.runs() == []


@pytest.mark.parametrize("path", [":memory:", ""])
async def test_a_journal_without_a_file_is_refused(path):
    """A path that names no file is refused, with what to use instead."""
    with pytest.raises(ValueError, match=f"'{path}' names no file.*for tests there is MemoryJournal"):
        SQLiteJournal(path)


async def test_a_synchronous_that_promises_nothing_is_refused(path):
    """Only the two levels that keep promises are taken."""
    with pytest.raises(ValueError, match='synchronous must be "FULL" or "NORMAL", not \'OFF\''):
        SQLiteJournal(path, synchronous="OFF")


async def test_a_journal_that_is_open_cannot_be_opened(path):
    """Opened twice, a journal says so, and stays open."""
    async with SQLiteJournal(path) as journal:
        with pytest.raises(JournalError, match=r"journal .*sagas\.db is open already"):
            await journal.__aenter__()
        assert await journal.runs() == []


async def test_a_journal_that_is_not_open_cannot_be_used(path):
    """Used before `async with`, or after it, a journal says what is missing; no file is made."""
    shop = Shop()
    journal = SQLiteJournal(path)
    with pytest.raises(JournalError, match=r"sagas\.db is not open: use it within `async with`"):
        await journal.run(abc(shop), run_id="r")
    assert not path.exists()
    async with journal:
        pass
    with pytest.raises(JournalError, match=r"sagas\.db is not open: use it within `async with`"):
        await journal.runs()
    with pytest.raises(JournalError, match="is not open"):
        await journal.__aexit__(None, None, None)

    assert shop.log == []


@pytest.mark.parametrize("other", ["asyncio", "trio"])
def test_a_journal_of_another_event_loop_is_refused(path, anyio_backend, other):
    """Used in another event loop than that in which it was opened, a journal says so; it can be closed."""
    backend, options = anyio_backend
    shop = Shop()
    journal = SQLiteJournal(path)

    async def use() -> None:
        with fail_after(ENOUGH):
            with pytest.raises(JournalError, match=r"sagas\.db was opened in another event loop"):
                await journal.run(abc(shop), run_id="r")
            with pytest.raises(JournalError, match="in the event loop that uses it$"):
                await journal.runs()
            await journal.__aexit__(None, None, None)

    anyio.run(journal.__aenter__, backend=backend, backend_options=options)
    anyio.run(use, backend=other)
    assert (shop.log, owner_files(path)) == ([], [])


async def test_a_journal_shows_its_file(path, monkeypatch):
    """Its repr is the whole path, also of one that was given from where the process stands."""
    monkeypatch.chdir(path.parent)

    assert repr(SQLiteJournal("sagas.db")) == f"<SQLiteJournal {path}>"
