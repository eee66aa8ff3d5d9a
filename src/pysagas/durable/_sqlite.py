"""The journal in a file: SQLite in WAL mode, each commit on disk before anything goes on.

Three tables, see ``SCHEMA``; ``sqlite3 sagas.db 'SELECT * FROM events'`` reads them. A run belongs
to an *owner*, the journal object of one process. An owner holds an exclusive lock, for as long as
its process lives, on a file of its own beside the journal; the kernel drops it when the process
dies, however that happens. A journal that is closed while runs of it still act keeps the lock for
as long as they do. Who finds an unfinished run tries its owner's lock: no heartbeat and no
time-out, and nobody who is merely slow is taken for dead. The lock is one of SQLite's own, which
works wherever the journal itself does.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, cast
from uuid import uuid4

import anyio

from ._codec import Codec
from ._errors import JournalError, OtherRun, RunInProgress
from ._events import Event, EventKind, RunInfo, RunState
from ._journal import Journal
from ._memory import in_words, not_so_any_more, other_run
from ._storage import Claim, Ending, RunGone, Stored
from ._writer import INSERT, Row, Writer

__all__ = ["SQLiteJournal"]

# In the header of the file, so that no other database is taken for a journal.
APPLICATION_ID = 0x70736A31
FORMAT = 1

SCHEMA = (
    """CREATE TABLE owners (
        id INTEGER PRIMARY KEY,
        token TEXT NOT NULL UNIQUE,   -- names the file with its lock: JOURNAL-owner-TOKEN
        host TEXT NOT NULL,
        pid INTEGER NOT NULL,
        started REAL NOT NULL         -- seconds since the epoch, here as everywhere
    )""",
    """CREATE TABLE runs (
        id INTEGER PRIMARY KEY AUTOINCREMENT,   -- never that of a run that was pruned
        run_id TEXT NOT NULL UNIQUE,
        saga TEXT NOT NULL,
        version TEXT,
        args BLOB NOT NULL,           -- [[positional, ...], {name: value, ...}], as JSON
        state TEXT NOT NULL,          -- running, completed, compensated, failed
        owner INTEGER REFERENCES owners (id),   -- NULL once it has ended
        started REAL NOT NULL,
        ended REAL,
        value BLOB,                   -- what the saga returned
        error TEXT                    -- what it raised, as JSON
    )""",
    "CREATE INDEX runs_by_state ON runs (state)",
    """CREATE TABLE events (
        run INTEGER NOT NULL REFERENCES runs (id),
        seq INTEGER NOT NULL,         -- the order in which they happened
        kind TEXT NOT NULL,
        path TEXT NOT NULL,           -- 0.2.1
        name TEXT NOT NULL,
        data BLOB NOT NULL,
        at REAL NOT NULL,
        PRIMARY KEY (run, seq)
    ) WITHOUT ROWID""",
)


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
        self._last_writer: Writer
        self._token = ""
        self._owner = 0
        self._lock: sqlite3.Connection | None = None
        # Whether the file is closed, and the lock is only there for runs that still act. The lock
        # goes when both are over, on whichever thread that is.
        self._closed = False
        self._letting_go = threading.Lock()
        self._next_seq: dict[int, int] = {}
        # What is still to be recorded of runs that were taken back while that was not possible.
        self._owed: list[Callable[[sqlite3.Connection], None]] = []

    def __repr__(self) -> str:
        return f"<SQLiteJournal {self._path}>"

    # --- opening and closing ------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Opens the file.

        Raises:
            JournalError: It cannot be opened: it is no journal, is of a newer format, cannot be
                written or is locked; or runs of its last opening are still under way.
        """
        if self._writer is not None:
            raise JournalError(f"journal {self._path} is open already")
        if self._in_hand:
            # They belong to the owner that it was then, whom it would not be any more.
            raise JournalError(
                f"journal {self._path} cannot be opened again: it was closed while runs were under way, "
                f"and these still are: {', '.join(sorted(map(repr, self._in_hand)))}; wait for them, or "
                "open another SQLiteJournal"
            )
        writer = Writer(self._connect, self._close, f"journal {self._path}")
        try:
            await writer.start()
        except BaseException as error:
            await writer.stop()
            cause = error.__cause__
            raise (cause if isinstance(cause, JournalError) else error) from None
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
        try:
            _make_file(self._path)
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
            _settle(connection, tuple(self._owed))
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
        self._check_format(connection)
        self._use_wal(connection)
        connection.execute(f"PRAGMA synchronous = {self._synchronous}")
        # The log grows once and is written over, which is faster than to make it anew.
        connection.execute("PRAGMA journal_size_limit = -1")
        self._closed = False
        while self._lock is None:
            self._token = uuid4().hex
            self._lock = _take_lock(self._lock_path(self._token))
        connection.execute("BEGIN IMMEDIATE")
        if not self._check_format(connection):
            for statement in SCHEMA:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {FORMAT}")
        self._owner = cast(
            "int",
            connection.execute(
                "INSERT INTO owners (token, host, pid, started) VALUES (?, ?, ?, ?)",
                (self._token, socket.gethostname(), os.getpid(), time.time()),
            ).lastrowid,
        )
        connection.execute("COMMIT")

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

    def _check_format(self, connection: sqlite3.Connection) -> bool:
        """Tells whether the file is a journal already, and not a new one.

        Raises:
            JournalError: It is something else.
        """
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if not tables:
            return False
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION_ID:
            raise JournalError(
                f"{self._path} is the database of something else, and no journal; it was left as it is"
            )
        if version > FORMAT:
            raise JournalError(
                f"journal {self._path} has format {version}, of a newer release of pysagas; this one "
                f"knows formats up to {FORMAT}: upgrade it. The journal was left as it is"
            )
        return True

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
        def claim(connection: sqlite3.Connection) -> Claim:
            _settle(connection, owed)
            row = connection.execute(
                "SELECT id, saga, version, args, state, owner, value, error FROM runs WHERE run_id = ?",
                (run_id,),
            ).fetchone()
            if row is None:
                if not create:
                    raise RunGone(f"run {run_id!r}")
                new = connection.execute(
                    "INSERT INTO runs (run_id, saga, version, args, state, owner, started) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (run_id, saga, version, args, RunState.RUNNING.value, self._owner, now),
                ).lastrowid
                return Claim(cast("int", new), is_new=True)
            key, its_saga, its_version, its_args, state, owner, value, error = row
            stored = Stored(run_id, its_saga, its_version, its_args, RunState(state))
            problem = other_run(stored, saga, args)
            if problem is not None:
                raise OtherRun(problem)
            if stored.state is not RunState.RUNNING:
                ending = Ending(
                    stored.state, value or b"", None if error is None else json.loads(error)
                )
                return Claim(key, ending)
            if owner not in (None, self._owner) and self._is_alive(connection, owner):
                raise RunInProgress(f"run {run_id!r} is under way in another process, which lives")
            connection.execute("UPDATE runs SET owner = ? WHERE id = ?", (self._owner, key))
            return Claim(key)

        writer = self._open()
        owed = tuple(self._owed)
        try:
            return await writer.call(claim)
        except anyio.get_cancelled_exc_class():
            # It may have been taken all the same, for nobody.
            with anyio.CancelScope(shield=True), suppress(JournalError):
                await writer.call(
                    lambda connection: connection.execute(
                        "UPDATE runs SET owner = NULL WHERE run_id = ? AND owner = ?",
                        (run_id, self._owner),
                    )
                )
            raise

    def _is_alive(self, connection: sqlite3.Connection, owner: int) -> bool:
        """Tells whether an owner's process lives; forgets one that does not."""
        row = connection.execute("SELECT token FROM owners WHERE id = ?", (owner,)).fetchone()
        return row is not None and _is_locked(self._lock_path(row[0]))

    async def _release(self, key: int, last: Event | None = None) -> None:
        owner = self._owner

        def release(connection: sqlite3.Connection) -> None:
            # It may be late: then somebody else may have the run by now.
            its = connection.execute("SELECT owner FROM runs WHERE id = ?", (key,)).fetchone()
            if its == (owner,):
                if last is not None:
                    connection.execute(INSERT, _row(key, _next_seq(connection, key), last))
                connection.execute("UPDATE runs SET owner = NULL WHERE id = ?", (key,))

        self._next_seq.pop(key, None)
        # Or a recovery that resumes would carry on what has been taken back.
        self._owed.append(release)
        owed = tuple(self._owed)
        with suppress(JournalError), anyio.CancelScope(shield=True):
            self._open().forget(key)
            await self._open().call(partial(_settle, owed=owed))
            # Not before it is on disk: a second time each of them finds nothing to do.
            self._owed = [one for one in self._owed if one not in owed]

    async def _load(self, key: int) -> list[Event]:
        def load(connection: sqlite3.Connection) -> list[Any]:
            return connection.execute(
                "SELECT seq, kind, path, name, data, at FROM events WHERE run = ? ORDER BY seq", (key,)
            ).fetchall()

        rows = await self._open().call(load, reads=True)
        self._open().forget(key)
        self._next_seq[key] = rows[-1][0] + 1 if rows else 0
        return [_event(*row[1:]) for row in rows]

    def _append(self, key: int, event: Event) -> None:
        seq = self._next_seq.get(key, 0)
        self._next_seq[key] = seq + 1
        self._open().append(_row(key, seq, event))

    async def _flush(self) -> None:
        await self._open().flush()

    def _check_whole(self, key: int) -> None:
        # Of the writer that has flushed, though the journal may have been closed meanwhile.
        self._last_writer.check(key)

    async def _end(self, key: int, ending: Ending) -> None:
        error = None if ending.error is None else json.dumps(ending.error)
        writer = self._open()

        def end(connection: sqlite3.Connection) -> None:
            writer.check(key)
            connection.execute(
                "UPDATE runs SET state = ?, value = ?, error = ?, ended = ?, owner = NULL WHERE id = ?",
                (ending.state.value, ending.value, error, time.time(), key),
            )

        self._next_seq.pop(key, None)
        await writer.call(end)

    async def _reopen(self, key: int, was: RunState) -> None:
        def reopen(connection: sqlite3.Connection) -> int:
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
            return _next_seq(connection, key)

        next_seq = await self._open().call(reopen)
        self._open().forget(key)
        self._next_seq[key] = next_seq

    async def _unfinished(self) -> list[Stored]:
        def unfinished(connection: sqlite3.Connection) -> list[Stored]:
            return [
                Stored(run_id, saga, version, args, RunState.RUNNING)
                for run_id, saga, version, args in connection.execute(
                    "SELECT run_id, saga, version, args FROM runs WHERE state = ? ORDER BY id",
                    (RunState.RUNNING.value,),
                )
            ]

        return await self._open().call(unfinished, reads=True)

    async def _stored(self, run_id: str) -> Stored | None:
        def stored(connection: sqlite3.Connection) -> Stored | None:
            row = connection.execute(
                "SELECT run_id, saga, version, args, state FROM runs WHERE run_id = ?", (run_id,)
            ).fetchone()
            if row is None:
                return None
            known, saga, version, args, state = row
            return Stored(known, saga, version, args, RunState(state))

        return await self._open().call(stored, reads=True)

    async def _list(self, since: float = -math.inf, run_id: str | None = None) -> list[RunInfo]:
        which = "ended IS NULL OR ended >= ?" if run_id is None else "run_id = ?"

        def listed(connection: sqlite3.Connection) -> list[RunInfo]:
            alive = {
                owner: owner == self._owner or _is_locked(self._lock_path(token))
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

        return await self._open().call(listed, reads=True)

    async def _events(self, run_id: str) -> list[Event]:
        def events(connection: sqlite3.Connection) -> list[Event]:
            row = connection.execute("SELECT id FROM runs WHERE run_id = ?", (run_id,)).fetchone()
            if row is None:
                raise JournalError(f"run {run_id!r} is not in the journal {self._path}")
            return [
                _event(*event)
                for event in connection.execute(
                    "SELECT kind, path, name, data, at FROM events WHERE run = ? ORDER BY seq", row
                )
            ]

        return await self._open().call(events, reads=True)

    async def _prune(self, before: float) -> int:
        def prune(connection: sqlite3.Connection) -> int:
            ended = "state IN ('completed', 'compensated') AND ended < ?"
            connection.execute(
                f"DELETE FROM events WHERE run IN (SELECT id FROM runs WHERE {ended})",  # noqa: S608
                (before,),
            )
            pruned = connection.execute(f"DELETE FROM runs WHERE {ended}", (before,)).rowcount  # noqa: S608
            # And the owners whose process is dead, with their files.
            for owner, token in connection.execute(
                "SELECT id, token FROM owners WHERE id NOT IN "
                "(SELECT owner FROM runs WHERE owner IS NOT NULL)"
            ).fetchall():
                if owner != self._owner and not _is_locked(self._lock_path(token)):
                    connection.execute("DELETE FROM owners WHERE id = ?", (owner,))
            # And the files of those that were killed before they were recorded, or forgotten.
            known = {token for (token,) in connection.execute("SELECT token FROM owners")}
            prefix = self._lock_path("").name
            with suppress(OSError):  # a directory that may not be listed is cleaned by somebody else
                for path in self._path.parent.iterdir():
                    if path.name.startswith(prefix) and path.name.removeprefix(prefix) not in known:
                        _is_locked(path)
            return pruned

        return await self._open().call(prune)


def _settle(
    connection: sqlite3.Connection, owed: Iterable[Callable[[sqlite3.Connection], None]]
) -> None:
    """Lets go of runs; of those, too, of which that could not be recorded before."""
    for release in owed:
        release(connection)


def _next_seq(connection: sqlite3.Connection, key: int) -> int:
    query = "SELECT coalesce(max(seq) + 1, 0) FROM events WHERE run = ?"
    (seq,) = connection.execute(query, (key,)).fetchone()
    return cast("int", seq)


def _row(key: int, seq: int, event: Event) -> Row:
    path = ".".join(map(str, event.path))
    return (key, seq, event.kind.value, path, event.name, event.data, event.at)


def _event(kind: str, path: str, name: str, data: bytes, at: float) -> Event:
    steps = tuple(map(int, path.split("."))) if path else ()
    return Event(EventKind(kind), steps, name, data, at)


# --- locks ------------------------------------------------------------------------------------------


def _make_file(path: Path) -> None:
    """Makes a file that nobody else can read, not even for a moment, if it is not there.

    One that is there is not touched: to close it would drop all locks that this process has on it,
    those of another journal on the same file too.
    """
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))


def _locked(path: Path) -> sqlite3.Connection:
    """Locks an owner's file, for as long as the connection, or the process, lives.

    Raises:
        sqlite3.Error: Somebody else has the lock; or the file is not there, or cannot be opened.
    """
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode=rw",  # which makes no file
        uri=True,
        timeout=0,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        # No second file beside this one; nothing is ever written to it.
        connection.execute("PRAGMA journal_mode = MEMORY")
        connection.execute("BEGIN EXCLUSIVE")
    except BaseException:
        connection.close()
        raise
    return connection


def _take_lock(path: Path) -> sqlite3.Connection | None:
    """Makes an owner's file, and locks it; gives None where somebody who cleans up came between.

    To him, a file that is made and not yet locked is one of a process that was killed at that moment,
    and he removes it with its lock in hand. So here either the lock is refused, or the file is gone
    once it is locked.
    """
    _make_file(path)
    try:
        connection = _locked(path)
    except sqlite3.OperationalError as error:
        if path.exists() and error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
            raise
        return None
    if path.exists():
        return connection
    connection.close()
    return None


def _is_locked(path: Path) -> bool:
    """Tells whether an owner lives; removes the file of one that does not."""
    try:
        if not path.exists():
            return False
        with closing(_locked(path)), suppress(PermissionError):  # Windows keeps what somebody has open
            path.unlink(missing_ok=True)
    except (OSError, sqlite3.Error):
        # Somebody has the lock. Or the file cannot be opened: no file descriptors are left, it is
        # another user's. Then nobody can tell, and to take the run of a process that lives is worse
        # than to leave that of a dead one; and other runs have nothing to do with it.
        return True
    return False
