"""One thread that owns the database, and writes in batches: what queued up during the last commit.

A commit waits for the disk, whatever is in it. So there is no timer and no size: while one batch is
being written, the next one gathers. Whoever waits for its rows waits for the batch that they are in,
and all who do are woken by one call into the event loop.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import anyio
from anyio.lowlevel import current_token

from ._errors import JournalError

__all__ = ["Writer"]

T = TypeVar("T")

Connect = Callable[[], sqlite3.Connection]
Close = Callable[[sqlite3.Connection], None]

INSERT = "INSERT INTO events (run, seq, kind, path, name, data, at) VALUES (?, ?, ?, ?, ?, ?, ?)"
Row = tuple[int, int, str, str, str, bytes, float]


class _Job(Generic[T]):
    """A function to be called with the connection, within the batch's transaction."""

    __slots__ = ("error", "reads", "result", "work")

    def __init__(self, work: Callable[[sqlite3.Connection], T], *, reads: bool) -> None:
        self.work = work
        self.reads = reads
        self.result: T | None = None
        self.error: BaseException | None = None


class _Batch:
    """What is written by one commit."""

    __slots__ = ("done", "error", "jobs", "rows", "waiting")

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.jobs: list[_Job[Any]] = []
        # Why it was not written.
        self.error: BaseException | None = None
        # These two are of the event loop: made on the thread, an event could not be waited for.
        self.done = False
        self.waiting: anyio.Event | None = None

    def finish(self) -> None:
        """Wakes all who wait; called in the event loop."""
        self.done = True
        if self.waiting is not None:
            self.waiting.set()


class Writer:
    """Writes rows and calls functions on a thread of its own; used by one event loop."""

    def __init__(self, connect: Connect, close: Close, place: str) -> None:
        """Makes one that is not running yet.

        Args:
            connect: Opens the database; called on the thread.
            close: Closes it; called on the thread.
            place: How messages name the journal.
        """
        self._connect = connect
        self._close = close
        self._place = place
        self._next = _Batch()
        self._last = self._next
        self._wanted = threading.Condition()
        self._closing = False
        # The runs of which rows could not be written, and why. What comes after a gap is not written.
        self._lost: dict[int, BaseException] = {}
        self._thread = threading.Thread(target=self._work, name="pysagas journal", daemon=True)
        # asyncio and Trio each have one function that a foreign thread may call.
        native: Any = current_token().native_token
        self._in_loop: Callable[..., object] = (
            native.call_soon_threadsafe
            if hasattr(native, "call_soon_threadsafe")
            else native.run_sync_soon
        )
        self._loop: object = native

    async def start(self) -> None:
        """Starts the thread, which opens the database.

        Raises:
            JournalError: That is not possible.
        """
        self._thread.start()
        with anyio.CancelScope(shield=True):
            await self.call(_nothing)

    async def stop(self) -> None:
        """Writes what is left, and ends the thread, which closes the database."""
        with self._wanted:
            self._closing = True
            self._wanted.notify()
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._thread.join)

    def append(self, row: Row) -> None:
        """Takes a row for the next batch.

        Raises:
            JournalError: An earlier one of its run could not be written.
        """
        self.check(row[0])
        with self._wanted:
            self._last = self._next
            self._last.rows.append(row)
            self._wanted.notify()

    async def flush(self) -> None:
        """Waits until every row that was taken is on disk.

        Cancellation leaves the rows to be written all the same.

        Raises:
            JournalError: The last of them could not be written.
        """
        await self._written(self._last)

    def check(self, run: int) -> None:
        """Makes sure that no row of a run was lost, of those that have been waited for.

        Raises:
            JournalError: One was.
        """
        if run in self._lost:
            raise self._failure(self._lost[run])

    def forget(self, run: int) -> None:
        """Takes up a run as it is on disk, whatever was lost of it."""
        self._lost.pop(run, None)

    async def call(self, work: Callable[[sqlite3.Connection], T], *, reads: bool = False) -> T:
        """Calls a function with the connection, after all rows that were taken; gives its result.

        It may write. What it raises undoes nothing, so it checks before it writes.

        Args:
            work: The function.
            reads: Whether it only reads: who looks on must not keep other processes from writing.

        Raises:
            BaseException: What it raised.
            JournalError: The batch could not be written; or this is another event loop than that of
                the writer.
        """
        if current_token().native_token is not self._loop:
            # Nobody would be woken here. All that is done with a run begins with such a call.
            raise JournalError(
                f"{self._place} was opened in another event loop than this one; open it, with "
                "`async with`, in the event loop that uses it"
            )
        job = _Job(work, reads=reads)
        with self._wanted:
            self._check_open()
            batch = self._last = self._next
            batch.jobs.append(job)
            self._wanted.notify()
        await self._written(batch)
        if job.error is not None:
            raise job.error
        return cast("T", job.result)

    def _check_open(self) -> None:
        if self._closing:
            raise JournalError(f"{self._place} is closed")

    async def _written(self, batch: _Batch) -> None:
        if not batch.done and (batch.rows or batch.jobs):
            if batch.waiting is None:
                batch.waiting = anyio.Event()
            await batch.waiting.wait()
        if batch.error is not None:
            raise self._failure(batch.error)

    def _failure(self, cause: BaseException) -> JournalError:
        error = JournalError(
            f"{self._place} cannot be written: {cause}; when that is mended, recover() goes on from what "
            "it holds"
        )
        error.__cause__ = cause
        return error

    # --- on the thread --------------------------------------------------------------------------

    def _work(self) -> None:
        connection: sqlite3.Connection | None = None
        failed: BaseException | None = None
        try:
            connection = self._connect()
        except BaseException as error:
            failed = error
        while True:
            with self._wanted:
                while not (self._next.rows or self._next.jobs or self._closing):
                    self._wanted.wait()
                batch, self._next = self._next, _Batch()
            if not (batch.rows or batch.jobs):
                break
            if connection is None:
                batch.error = failed
            else:
                batch.rows = [row for row in batch.rows if row[0] not in self._lost]
                _write(connection, batch)
                if batch.error is not None:
                    for row in batch.rows:
                        self._lost.setdefault(row[0], batch.error)
            self._wake(batch)
        if connection is not None:
            self._close(connection)

    def _wake(self, batch: _Batch) -> None:
        try:
            self._in_loop(batch.finish)
        except RuntimeError:
            pass  # the event loop has ended: nobody waits any more


def _nothing(_: sqlite3.Connection) -> None:
    """Fails where there is no connection."""


def _write(connection: sqlite3.Connection, batch: _Batch) -> None:
    """Writes a batch whole, or not at all."""
    try:
        reads = not batch.rows and all(job.reads for job in batch.jobs)
        connection.execute("BEGIN" if reads else "BEGIN IMMEDIATE")
        try:
            if batch.rows:
                connection.executemany(INSERT, batch.rows)
            for job in batch.jobs:
                try:
                    job.result = job.work(connection)
                except sqlite3.Error:
                    raise
                except BaseException as error:
                    job.error = error
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
    except BaseException as error:
        batch.error = error
