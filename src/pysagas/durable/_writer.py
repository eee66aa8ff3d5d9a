"""One thread that owns the database, and writes in batches: what queued up during the last commit.

What a batch has of one run is one record.

A commit waits for the disk, whatever is in it. So there is no timer and no size: while one batch is
being written, the next one gathers. Whoever waits for its rows waits for the batch that they are in,
and all who do are woken by one call into the event loop.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Generic, TypeVar, cast

import anyio
from anyio.lowlevel import current_token

from ._errors import JournalError
from ._records import Record, Written, insert, is_of_statement

__all__ = ["Writer"]

T = TypeVar("T")

Connect = Callable[[], sqlite3.Connection]
Close = Callable[[sqlite3.Connection], None]
Encode = Callable[[list[Written]], str]


class _Job(Generic[T]):
    """A function to be called with the connection, within the batch's transaction."""

    __slots__ = ("error", "reads", "result", "work")

    def __init__(self, work: Callable[[sqlite3.Connection], T], *, reads: bool) -> None:
        self.work = work
        self.reads = reads
        self.result: T | None = None
        self.error: BaseException | None = None


class _Futures:
    """An event of asyncio, for one use: what waits is a future, and nothing is around it.

    Each step of each run waits once; with `anyio.Event` that was a tenth of what a step costs.
    """

    __slots__ = ("_loop", "_waiting")

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        self._waiting: list[Any] = []

    def wait(self) -> Any:
        future = self._loop.create_future()
        self._waiting.append(future)
        return future

    def set(self) -> None:
        for future in self._waiting:
            if not future.done():  # its task was cancelled
                future.set_result(None)


class _Batch:
    """What is written by one commit."""

    __slots__ = ("done", "error", "events", "jobs", "waiting")

    def __init__(self) -> None:
        # For each run the number of its first event here, and its events.
        self.events: dict[int, tuple[int, list[Written]]] = {}
        self.jobs: list[_Job[Any]] = []
        # Why it was not written.
        self.error: BaseException | None = None
        # These two are of the event loop: made on the thread, an event could not be waited for.
        self.done = False
        self.waiting: anyio.Event | _Futures | None = None

    def finish(self) -> None:
        """Wakes all who wait; called in the event loop."""
        self.done = True
        if self.waiting is not None:
            self.waiting.set()


class Writer:
    """Writes events and calls functions on a thread of its own; used by one event loop."""

    def __init__(self, connect: Connect, close: Close, encode: Encode, place: str) -> None:
        """Makes one that is not running yet.

        Args:
            connect: Opens the database; called on the thread.
            close: Closes it; called on the thread.
            encode: Gives the text of the events of a record; called on the thread.
            place: How messages name the journal.
        """
        self._connect = connect
        self._close = close
        self._encode = encode
        self._place = place
        self._next = _Batch()
        self._last = _Batch()
        self._last.done = True  # nothing was taken yet
        self._lock = threading.Lock()
        self._wanted = threading.Condition(self._lock)
        # Whether the thread waits for work: it is told once, and not of each event.
        self._waits = False
        self._closing = False
        # The runs of which events could not be written, and why. What comes after a gap is not written.
        self._lost: dict[int, BaseException] = {}
        self._thread = threading.Thread(target=self._work, name="pysagas journal", daemon=True)
        loop: Any = current_token().native_token
        on_asyncio = hasattr(loop, "call_soon_threadsafe")
        self._loop: object = loop
        self._event: Callable[[], anyio.Event | _Futures] = (
            partial(_Futures, loop) if on_asyncio else anyio.Event
        )
        # asyncio and Trio each have one function that a foreign thread may call.
        self._in_loop: Callable[..., object] = (
            loop.call_soon_threadsafe if on_asyncio else loop.run_sync_soon
        )

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
        with self._lock:
            self._closing = True
            self._tell()
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._thread.join)

    def append(self, run: int, number: int, event: Written) -> None:
        """Takes an event for the next batch.

        Args:
            run: The run that it is of.
            number: Its own, one more than that of the last event of its run.
            event: What is written of it.

        Raises:
            JournalError: An earlier one of its run could not be written.
        """
        if run in self._lost:
            self.check(run)
        with self._lock:
            batch = self._last = self._next
            if run in batch.events:
                batch.events[run][1].append(event)
            else:
                batch.events[run] = (number, [event])
            if self._waits:
                self._tell()

    async def flush(self, run: int) -> None:
        """Waits until every event that was taken is on disk.

        Cancellation leaves them to be written all the same.

        Args:
            run: Whose events are waited for.

        Raises:
            JournalError: The last of them, or an earlier one of the run, could not be written.
        """
        batch = self._last
        if not batch.done:
            await self._written(batch)
        if batch.error is not None:
            raise self._failure(batch.error)
        if run in self._lost:
            self.check(run)

    def check(self, run: int) -> None:
        """Makes sure that no event of a run was lost, of those that have been waited for.

        Raises:
            JournalError: One was.
        """
        if run in self._lost:
            raise self._failure(self._lost[run])

    def forget(self, run: int) -> None:
        """Takes up a run as it is on disk, whatever was lost of it."""
        self._lost.pop(run, None)

    async def call(self, work: Callable[[sqlite3.Connection], T], *, reads: bool = False) -> T:
        """Calls a function with the connection, after all events that were taken; gives its result.

        It may write. What it raises undoes nothing, so it checks before it writes.

        Args:
            work: The function.
            reads: Whether it only reads: who looks on must not keep other processes from writing.

        Raises:
            BaseException: What it raised.
            JournalError: SQLite refused what it asked; the batch could not be written; or this is
                another event loop than that of the writer.
        """
        if current_token().native_token is not self._loop:
            # Nobody would be woken here. All that is done with a run begins with such a call.
            raise JournalError(
                f"{self._place} was opened in another event loop than this one; open it, with "
                "`async with`, in the event loop that uses it"
            )
        job = _Job(work, reads=reads)
        with self._lock:
            self._check_open()
            batch = self._last = self._next
            batch.jobs.append(job)
            self._tell()
        await self._written(batch)
        if batch.error is not None:
            raise self._failure(batch.error)
        if isinstance(job.error, sqlite3.Error):
            raise JournalError(f"{self._place} cannot do that: {job.error}") from job.error
        if job.error is not None:
            raise job.error
        return cast("T", job.result)

    def _written(self, batch: _Batch) -> Awaitable[None]:
        """Gives what waits until a batch is written, or is known not to be."""
        if batch.waiting is None:
            batch.waiting = self._event()
        return batch.waiting.wait()

    def _tell(self) -> None:
        """Tells the thread that there is work; called with the lock held."""
        if self._waits:
            self._waits = False
            self._wanted.notify()

    def _check_open(self) -> None:
        if self._closing:
            raise JournalError(f"{self._place} is closed")

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
            with self._lock:
                while not (self._next.events or self._next.jobs or self._closing):
                    self._waits = True
                    self._wanted.wait()
                batch, self._next = self._next, _Batch()
            if not (batch.events or batch.jobs):
                break
            if connection is None:
                batch.error = failed
            else:
                _write(connection, batch, self._records(batch))
                if batch.error is not None:
                    for run in batch.events:
                        self._lost.setdefault(run, batch.error)
            self._wake(batch)
        if connection is not None:
            self._close(connection)

    def _records(self, batch: _Batch) -> list[Record]:
        """Gives what is to be written, without what comes after a gap."""
        records: list[Record] = []
        for run, (number, events) in batch.events.items():
            if run not in self._lost:
                try:
                    records.append((run, number, self._encode(events)))
                except Exception as error:
                    self._lost[run] = error  # by a name that is no text; the others can be written
        return records

    def _wake(self, batch: _Batch) -> None:
        try:
            self._in_loop(batch.finish)
        except RuntimeError:
            pass  # the event loop has ended: nobody waits any more


def _nothing(_: sqlite3.Connection) -> None:
    """Fails where there is no connection."""


def _write(connection: sqlite3.Connection, batch: _Batch, records: list[Record]) -> None:
    """Writes a batch whole, or not at all."""
    try:
        reads = not records and all(job.reads for job in batch.jobs)
        connection.execute("BEGIN" if reads else "BEGIN IMMEDIATE")
        try:
            insert(connection, records)
            for job in batch.jobs:
                try:
                    job.result = job.work(connection)
                except sqlite3.Error as error:
                    if not is_of_statement(error) or not connection.in_transaction:
                        raise
                    job.error = error
                except BaseException as error:
                    job.error = error
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
    except BaseException as error:
        batch.error = error
