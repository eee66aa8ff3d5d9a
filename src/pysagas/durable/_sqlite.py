"""The journal in a file: SQLite in WAL mode, each commit on disk before anything goes on.

What stands in it, ``_records`` says; ``sqlite3 sagas.db 'SELECT * FROM events'`` reads it. A run belongs
to an *owner*, the journal object of one process, which holds a lock for as long as that lives (see
``_locks``). A journal that is closed while runs of it still act keeps the lock for as long as they do.
Who finds an unfinished run tries its owner's lock: no heartbeat and no time-out, and nobody who is
merely slow is taken for dead.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Awaitable, Iterable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, cast
from uuid import uuid4

import anyio

from ._codec import Codec
from ._errors import JournalError, OtherRun, RunInProgress
from ._events import Event, EventKind, RunInfo, RunState, interruption
from ._journal import Journal
from ._locks import is_locked, make_file, take_lock
from ._memory import in_words, not_so_any_more, other_run
from ._records import (
    BEGIN_RUNS,
    OLDEST,
    End,
    Events,
    insert,
    is_journal,
    is_of_statement,
    next_number,
    prepare,
    prepare_put,
    written,
)
from ._storage import Claim, Ending, RunGone, Stored
from ._surely import surely
from ._writer import Writer

__all__ = ["SQLiteJournal"]


class SQLiteJournal(Journal):
    """A journal in an SQLite file. Several processes may share it; each opens its own.

    ::

        async with SQLiteJournal("sagas.db") as journal:
            report = await journal.recover([book_trip])
            outcome = await journal.run(book_trip, trip, run_id="order-42")
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        codec: Codec | None = None,
        synchronous: Literal["FULL", "NORMAL"] = "FULL",
        busy_timeout: float = 10.0,
    ) -> None:
        """Names the file; it is opened, and made if it is new, by ``async with``.

        Args:
            path: The file. It is made with mode 0600, since it holds the arguments and the results
                of sagas. Beside it stand SQLite's ``-wal`` and ``-shm``, and a small file for each
                process that has it open.
            codec: Writes arguments and results; by default JSON.
            synchronous: ``"FULL"``: what is recorded survives a power cut, as far as the disk keeps
                its promises. ``"NORMAL"``: it survives a killed process, and a power cut may lose
                the last moments. Then an effect may be forgotten.
            busy_timeout: Seconds to wait for another process that writes.

        Raises:
            ImportError: msgspec is not installed, and no codec is given.
            ValueError: The path is ``":memory:"``, or another option cannot work.
        """
        super().__init__(codec)
        if os.fspath(path) in (":memory:", ""):
            raise ValueError(
                f"SQLiteJournal: {os.fspath(path)!r} names no file, and a journal has to outlive its "
                "process; for tests there is MemoryJournal()"
            )
        if synchronous not in ("FULL", "NORMAL"):
            raise ValueError(
                f'SQLiteJournal: synchronous must be "FULL" or "NORMAL", not {synchronous!r}'
            )
        # Resolved, since the owners' files stand beside it, whatever the way by which it is reached.
        self._path = Path(path).resolve()
        self._synchronous = synchronous
        self._busy_timeout = busy_timeout
        self._writer: Writer | None = None
        self._last_writer: Writer | None = None
        self._token = ""
        self._owner = 0
        self._lock: sqlite3.Connection | None = None
        # Whether the file is closed, and the lock is only there for runs that still act. The lock
        # goes when both are over, on whichever thread that is.
        self._closed = False
        self._letting_go = threading.Lock()
        self._events_in = Events()
        # The runs that are still to be let go, as that was not possible, by key: each with what is still to be
        # recorded of it, where it was taken back meanwhile. And those of which that is being tried.
        self._owed: dict[int, _Owed] = {}
        self._tried: dict[int, _Owed] = {}
        self._is_opening = False

    def __repr__(self) -> str:
        return f"<SQLiteJournal {self._path}>"

    # --- opening and closing ------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Opens the file.

        Raises:
            JournalError: It cannot be opened: it is no journal, is of a newer format, cannot be
                written or is locked; or runs of its last opening are still under way.
        """
        if self._writer is not None or self._is_opening:
            raise JournalError(f"journal {self._path} is open already")
        if self._last_writer is not None and self._last_writer.is_running:
            # Nobody has waited for it; and it would drop the lock that is taken now.
            raise JournalError(
                f"journal {self._path} is still being closed; open another SQLiteJournal"
            )
        if self._in_hand:
            # They belong to the owner that it was then, whom it would not be any more.
            raise JournalError(
                f"journal {self._path} cannot be opened again: it was closed while runs were under way, "
                f"and these still are: {', '.join(sorted(map(repr, self._in_hand)))}; wait for them, or "
                "open another SQLiteJournal"
            )
        writer = Writer(
            self._connect,
            self._close,
            self._events_in.encode,
            f"journal {self._path}",
            under_way=lambda: len(self._in_hand),
        )
        # One that was opened twice at once would lose its lock, by which its runs are known to be alive.
        self._is_opening = True
        try:
            await writer.start()
        except BaseException as error:
            self._last_writer = writer
            await writer.stop()
            cause = error.__cause__
            raise (cause if isinstance(cause, JournalError) else error) from None
        finally:
            self._is_opening = False
        self._writer = self._last_writer = writer
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the file.

        Runs that are under way can record nothing more, and are taken back. Until that is over no
        other process takes them up.
        """
        writer = self._open()
        self._writer = None
        await writer.stop()

    def _open(self) -> Writer:
        if self._writer is None:
            raise JournalError(f"journal {self._path} is not open: use it within `async with`")
        return self._writer

    def _connect(self) -> sqlite3.Connection:
        """Opens the file, and makes its tables if it is new; on the writer's thread."""
        problem = f"journal {self._path} cannot be opened"
        if sqlite3.sqlite_version_info < OLDEST:
            raise JournalError(
                f"{problem}: it needs SQLite {'.'.join(map(str, OLDEST))} or newer, and this Python has "
                f"{sqlite3.sqlite_version}"
            )
        try:
            make_file(self._path)
            connection = sqlite3.connect(
                self._path, timeout=self._busy_timeout, isolation_level=None, check_same_thread=False
            )
        except (OSError, sqlite3.Error) as error:
            raise JournalError(f"{problem}: {error}") from error
        try:
            self._prepare(connection)
        except BaseException as error:
            connection.close()
            self._drop_lock()
            if isinstance(error, sqlite3.Error):
                raise JournalError(f"{problem}: {error}") from error
            raise
        return connection

    def _close(self, connection: sqlite3.Connection) -> None:
        """Lets go of all runs, of the lock and of the file; on the writer's thread."""
        with suppress(sqlite3.Error):
            for key in self._settle(connection, [*self._tried.values(), *self._owed.values()]):
                self._strike_off(key)
        if not self._in_hand:
            with suppress(sqlite3.Error):  # the lock says the same, and goes in any case
                connection.execute("UPDATE runs SET owner = NULL WHERE owner = ?", (self._owner,))
                connection.execute("DELETE FROM owners WHERE id = ?", (self._owner,))
        connection.close()
        self._closed = True
        self._let_go()

    def _let_go(self) -> None:
        with self._letting_go:
            if self._closed and not self._in_hand:
                self._drop_lock()

    def _drop_lock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None
            self._lock_path(self._token).unlink(missing_ok=True)

    def _prepare(self, connection: sqlite3.Connection) -> None:
        is_journal(connection, self._path)  # before anything is changed
        self._use_wal(connection)
        connection.execute(f"PRAGMA synchronous = {self._synchronous}")
        # The log grows once and is written over, which is faster than to make it anew.
        connection.execute("PRAGMA journal_size_limit = -1")
        self._closed = False
        while self._lock is None:
            self._token = uuid4().hex
            self._lock = take_lock(self._lock_path(self._token))
        connection.execute("BEGIN IMMEDIATE")
        prepare(connection, self._path, lambda token: is_locked(self._lock_path(token)))
        self._owner = cast(
            "int",
            connection.execute(
                "INSERT INTO owners (token, host, pid, started) VALUES (?, ?, ?, ?)",
                (self._token, socket.gethostname(), os.getpid(), time.time()),
            ).lastrowid,
        )
        connection.execute("COMMIT")
        prepare_put(connection)

    def _use_wal(self, connection: sqlite3.Connection) -> None:
        """Switches to WAL mode, and waits its turn where others open the file at the same time.

        SQLite does not wait by itself: of two connections that switch at once, each holds what the
        other needs, so it tells one of them at once that the file is locked.
        """
        deadline = time.monotonic() + self._busy_timeout
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline:
                    raise
                time.sleep(0.005)
            else:
                return

    def _lock_path(self, token: str) -> Path:
        return self._path.with_name(f"{self._path.name}-owner-{token}")

    # --- storage ------------------------------------------------------------------------------------

    async def _claim(
        self,
        run_id: str,
        saga: str,
        version: str | None,
        args: bytes,
        now: float,
        *,
        create: bool = False,
    ) -> Claim:
        writer = self._open()
        wanted = _Wanted(run_id, saga, version, args, now)
        if self._owed:
            await self._pay()

        def find(connection: sqlite3.Connection, _: object) -> list[Claim]:
            return [self._find(connection, wanted)]

        if create:
            claim, late = await writer.call_surely(self._begin, wanted, together=True)
        else:
            claim, late = await writer.call_surely(find, wanted)
        if claim.ending is None:
            self._strike_off(claim.key)  # it was let go first
            if late is not None:
                # It was taken for nobody. What has not begun, and was cancelled, no recovery is to begin.
                await self._release(claim.key, interruption(saga, now) if claim.is_new else None)
        if late is not None:
            raise late
        return claim

    def _begin(self, connection: sqlite3.Connection, calls: list[_Wanted]) -> list[Claim]:
        """Begins runs that all are new; of a single one, finds out whether it is."""
        if len(calls) == 1:
            return [self._begin_or_find(connection, calls[0])]
        owner = self._owner
        rows = [
            (run_id, saga, version, args, "running", owner, now)
            for run_id, saga, version, args, now in calls
        ]
        # By AUTOINCREMENT each id is one more than the last.
        first = cast("int", BEGIN_RUNS.execute(connection, rows)) - len(rows) + 1
        return [Claim(first + index, is_new=True) for index in range(len(rows))]

    def _begin_or_find(self, connection: sqlite3.Connection, wanted: _Wanted) -> Claim:
        run_id, saga, version, args, now = wanted
        new = connection.execute(
            "INSERT INTO runs (run_id, saga, version, args, state, owner, started) "
            "VALUES (?, ?, ?, ?, 'running', ?, ?) ON CONFLICT DO NOTHING",
            (run_id, saga, version, args, self._owner, now),
        )
        if new.rowcount:
            return Claim(cast("int", new.lastrowid), is_new=True)
        return self._find(connection, wanted)

    def _find(self, connection: sqlite3.Connection, wanted: _Wanted) -> Claim:
        """Takes a run into hand that is there, or gives how it ended."""
        run_id, saga, _, args, _ = wanted
        row = connection.execute(
            "SELECT id, saga, version, args, state, owner, value, error FROM runs WHERE run_id = ?",
            (run_id,),
        ).fetchone()
        if row is None:
            raise RunGone(f"run {run_id!r}")
        key, its_saga, its_version, its_args, state, owner, value, error = row
        stored = Stored(run_id, its_saga, its_version, its_args, RunState(state), key)
        problem = other_run(stored, saga, args)
        if problem is not None:
            raise OtherRun(problem)
        if stored.state is not RunState.RUNNING:
            return Claim(
                key, Ending(stored.state, value or b"", None if error is None else json.loads(error))
            )
        if owner not in (None, self._owner) and self._is_alive(connection, owner):
            raise RunInProgress(f"run {run_id!r} is under way in another process, which lives")
        # Asked again last: it may just have been put back.
        owed = self._owed.get(key) or self._tried.get(key) or self._owed.get(key)
        if owed is not None:
            _let_go_of(connection, owed)
        connection.execute("UPDATE runs SET owner = ? WHERE id = ?", (self._owner, key))
        return Claim(key)

    def _is_alive(self, connection: sqlite3.Connection, owner: int) -> bool:
        """Tells whether an owner's process lives; forgets one that does not."""
        row = connection.execute("SELECT token FROM owners WHERE id = ?", (owner,)).fetchone()
        return row is not None and is_locked(self._lock_path(row[0]))

    async def _release(self, key: int, last: Event | None = None) -> None:
        record = None if last is None else self._events_in.encode([written(*last)])
        # Or a recovery that resumes would carry on what has been taken back.
        self._owed[key] = _Owed(self._owner, key, record)
        if self._writer is None:
            await self._pay_by_itself(key)
        else:
            with suppress(JournalError):
                await self._pay(key)

    async def _pay(self, in_hand: int | None = None) -> None:
        """Lets go of all runs of which that is owed, and nobody tries it already.

        Args:
            in_hand: The key of the one that is in hand until then.

        Raises:
            JournalError: It is not possible; then it is owed still.
        """
        writer = self._open()
        # The thread, which looks for a run here and there, has to find it in one of the two.
        tried = dict(self._owed)
        self._tried |= tried
        self._owed.clear()
        settled: set[int] = set()
        try:
            settled, late = await writer.call_surely(
                lambda connection, _: [self._settle(connection, tried.values(), in_hand)],
                None,
                shield=True,
            )
        finally:
            for key, owed in tried.items():
                # It may have been taken up meanwhile, and be owed anew.
                if self._tried.get(key) is owed:
                    if key in settled:
                        writer.forget(key)  # not before: what is queued of it still comes after a gap
                    else:
                        self._owed.setdefault(key, owed)
                    del self._tried[key]
        if late is not None:
            raise late

    async def _pay_by_itself(self, key: int) -> None:
        """Lets go of the runs of which that is owed when the journal is closed already, and nobody else would."""

        def settle() -> None:
            assert self._last_writer is not None
            self._last_writer.wait_for_end()  # what it has of these runs comes before
            with suppress(sqlite3.Error):  # then nobody knows of it, as where closing cannot record it
                for settled in self._settle_in_file([*self._owed.values()], key):
                    self._strike_off(settled)

        late = await surely(partial(anyio.to_thread.run_sync, settle))
        if late is not None:
            raise late

    def _settle_in_file(self, owed: list[_Owed], in_hand: int) -> set[int]:
        """As `_settle`, by a connection of its own.

        A file that is gone is not made anew; and in another one that stands there now the runs are none of ours.
        """
        settled = {one.key for one in owed}
        if self._path.exists():
            address = f"{self._path.as_uri()}?mode=rw"
            with closing(
                sqlite3.connect(address, uri=True, timeout=self._busy_timeout, isolation_level=None)
            ) as connection:
                connection.execute(f"PRAGMA synchronous = {self._synchronous}")
                connection.execute("BEGIN IMMEDIATE")
                ours = connection.execute(
                    "SELECT 1 FROM owners WHERE (id, token) = (?, ?)", (self._owner, self._token)
                ).fetchone()
                if ours:
                    settled = self._settle(connection, owed, in_hand)
                connection.execute("COMMIT")
        return settled

    def _settle(
        self, connection: sqlite3.Connection, owed: Iterable[_Owed], in_hand: int | None = None
    ) -> set[int]:
        """Lets go of runs; on the writer's thread.

        Not of those that were taken into hand again meanwhile: whoever did that has let them go first.

        Args:
            connection: To the file.
            owed: What is to be let go.
            in_hand: The key of the run that is just being let go, and is in hand until then.

        Returns:
            The keys of those that have been let go. They are struck off when that is on disk, and not before.
        """
        settled: set[int] = set()
        for one in owed:
            if one.key != in_hand:
                row = connection.execute("SELECT run_id FROM runs WHERE id = ?", (one.key,)).fetchone()
                if row is not None and row[0] in self._in_hand:
                    continue
            _let_go_of(connection, one)
            settled.add(one.key)
        return settled

    def _strike_off(self, key: int) -> None:
        """Notes that a run is let go."""
        self._owed.pop(key, None)
        self._tried.pop(key, None)

    async def _load(self, key: int) -> list[Event]:
        def load(connection: sqlite3.Connection) -> tuple[list[Any], list[Any]]:
            unfinished = connection.execute(
                "SELECT id FROM runs WHERE id = ? AND state = 'running'", (key,)
            ).fetchall()
            return unfinished, connection.execute(
                "SELECT seq, events FROM records WHERE run = ? ORDER BY seq", (key,)
            ).fetchall()

        unfinished, records = await self._open().call(load)
        events: list[Event] = []
        next_number = 0
        for number, record in records:
            these = self._events_in.decode(record)
            events += these
            next_number = number + len(these)
        # Of one that has ended nothing more is recorded.
        self._open().forget(key, next_number if unfinished else 0)
        return events

    def _append(
        self, key: int, kind: EventKind, path: tuple[int, ...], name: str, data: bytes = b"", /
    ) -> None:
        (self._writer or self._open()).append(key, written(kind, path, name, data, time.time()))

    def _flush(self, key: int) -> Awaitable[None]:
        # What was taken just before it was closed is written all the same, and that has to be known.
        return (self._last_writer or self._open()).flush(key)

    async def _end(self, key: int, ending: Ending) -> None:
        error = None if ending.error is None else json.dumps(ending.error)
        writer = self._open()
        late = await writer.end(End(key, ending.state.value, ending.value, error, time.time()))
        writer.forget(key)
        if late is not None:
            raise late

    async def _reopen(self, key: int, was: RunState) -> None:
        def reopen(connection: sqlite3.Connection, _: object) -> list[int]:
            taken = connection.execute(
                "UPDATE runs SET state = ?, value = NULL, error = NULL, ended = NULL, owner = ? "
                "WHERE id = ? AND state = ?",
                (RunState.RUNNING.value, self._owner, key, was.value),
            ).rowcount
            if not taken:
                row = connection.execute(
                    "SELECT run_id, state FROM runs WHERE id = ?", (key,)
                ).fetchone()
                if row is None:
                    raise RunGone("this run")
                raise not_so_any_more(row[0], RunState(row[1]), was)
            return [next_number(connection, key)]

        number, late = await self._open().call_surely(reopen, None)
        self._open().forget(key, number)
        if late is not None:
            raise late

    async def _unfinished(self) -> list[Stored]:
        def unfinished(connection: sqlite3.Connection) -> list[Stored]:
            return [
                Stored(run_id, saga, version, args, RunState.RUNNING, key)
                for run_id, saga, version, args, key in connection.execute(
                    "SELECT run_id, saga, version, args, id FROM runs WHERE state = 'running' ORDER BY id"
                )
            ]

        return await self._open().call(unfinished)

    async def _stored(self, run_id: str) -> Stored | None:
        def stored(connection: sqlite3.Connection) -> Stored | None:
            row = connection.execute(
                "SELECT run_id, saga, version, args, state, id FROM runs WHERE run_id = ?", (run_id,)
            ).fetchone()
            if row is None:
                return None
            known, saga, version, args, state, key = row
            return Stored(known, saga, version, args, RunState(state), key)

        return await self._open().call(stored)

    async def _list(self, since: float = -math.inf, run_id: str | None = None) -> list[RunInfo]:
        which = "ended IS NULL OR ended >= ?" if run_id is None else "run_id = ?"

        def listed(connection: sqlite3.Connection) -> list[RunInfo]:
            alive = {
                owner: owner == self._owner or is_locked(self._lock_path(token))
                for owner, token in connection.execute(
                    "SELECT id, token FROM owners WHERE id IN (SELECT owner FROM runs)"
                ).fetchall()
            }
            return [
                RunInfo(
                    its_id,
                    saga,
                    version,
                    RunState(state),
                    started,
                    ended,
                    None if error is None else in_words(json.loads(error)),
                    alive.get(owner, False),
                )
                for its_id, saga, version, state, started, ended, error, owner in connection.execute(
                    "SELECT run_id, saga, version, state, started, ended, error, owner FROM runs "  # noqa: S608
                    f"WHERE {which} ORDER BY id",
                    (since if run_id is None else run_id,),
                )
            ]

        return await self._open().call(listed)

    async def _events(self, run_id: str) -> list[Event]:
        decode = self._events_in.decode

        def events(connection: sqlite3.Connection) -> list[Event]:
            row = connection.execute("SELECT id FROM runs WHERE run_id = ?", (run_id,)).fetchone()
            if row is None:
                raise JournalError(f"run {run_id!r} is not in the journal {self._path}")
            records = connection.execute("SELECT events FROM records WHERE run = ? ORDER BY seq", row)
            return [event for (record,) in records for event in decode(record)]

        return await self._open().call(events)

    async def _prune(self, before: float) -> int:
        def prune(connection: sqlite3.Connection, _: object) -> list[int]:
            ended = "state IN ('completed', 'compensated') AND ended < ?"
            connection.execute(
                f"DELETE FROM records WHERE run IN (SELECT id FROM runs WHERE {ended})",  # noqa: S608
                (before,),
            )
            pruned = connection.execute(f"DELETE FROM runs WHERE {ended}", (before,)).rowcount  # noqa: S608
            # And the owners whose process is dead, with their files.
            for owner, token in connection.execute(
                "SELECT id, token FROM owners WHERE id NOT IN "
                "(SELECT owner FROM runs WHERE owner IS NOT NULL)"
            ).fetchall():
                if owner != self._owner and not is_locked(self._lock_path(token)):
                    connection.execute("DELETE FROM owners WHERE id = ?", (owner,))
            # And the files of those that were killed before they were recorded, or forgotten.
            known = {token for (token,) in connection.execute("SELECT token FROM owners")}
            prefix = self._lock_path("").name
            with suppress(OSError):  # a directory that may not be listed is cleaned by somebody else
                for path in self._path.parent.iterdir():
                    if path.name.startswith(prefix) and path.name.removeprefix(prefix) not in known:
                        is_locked(path)
            return [pruned]

        count, late = await self._open().call_surely(prune, None)
        if late is not None:
            raise late
        return count


class _Wanted(NamedTuple):
    """A run that is to be taken into hand."""

    run_id: str
    saga: str
    version: str | None
    args: bytes
    now: float


class _Owed(NamedTuple):
    """A run that is to be let go: by which owner, and what is to be recorded before."""

    owner: int
    key: int
    record: str | None


def _number_after(connection: sqlite3.Connection, key: int) -> int | None:
    try:
        return next_number(connection, key)
    except sqlite3.Error as error:
        if not is_of_statement(error):
            raise
        return None


def _let_go_of(connection: sqlite3.Connection, owed: _Owed) -> None:
    # It may be late: then somebody else may have the run by now.
    its = connection.execute("SELECT owner FROM runs WHERE id = ?", (owed.key,)).fetchone()
    if its == (owed.owner,):
        # What stands after a record that is damaged, nobody would read.
        if owed.record is not None and (number := _number_after(connection, owed.key)) is not None:
            insert(connection, [(owed.key, number, owed.record)])
        connection.execute("UPDATE runs SET owner = NULL WHERE id = ?", (owed.key,))
