"""One thread that owns the database, and writes in batches: what queued up during the last commit.

What a batch has of one run is one record.

A commit waits for the disk, whatever is in it. So there is no timer: while one batch is being written,
the next one gathers. Whoever waits for its rows waits for the batch that they are in, and all who do are
woken by one call into the event loop. Where many wait, it is half of them that a batch has: see `_take`.

The thread shares the interpreter with the event loop, and each call of SQLite lets go of it. A loop that
is busy gives it back when it has nothing more to do, or after 5 ms. So a batch is one call, where that is
possible; then it is written while the loop goes on, and not after.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar, cast

import anyio
from anyio.lowlevel import current_token

from ._batch import Batch, Job, Work, write
from ._errors import JournalError
from ._records import LARGE, NOTHING, End, Written
from ._surely import surely
from ._waiting import OnAsyncio, OnTrio

__all__ = ["Writer"]

Row = TypeVar("Row")
T = TypeVar("T")

Connect = Callable[[], sqlite3.Connection]
Close = Callable[[sqlite3.Connection], None]
Encode = Callable[[object], str]

_Records = dict[str, list[Written]]
"""Events, by the run that they are of and the number of the first, as `put` takes them."""

FEW = 32
"""Of so few runs, what is queued is not halved: the event loop is done with them before the disk is."""


class Writer:
    """Writes events and calls functions on a thread of its own; used by one event loop."""

    def __init__(
        self, connect: Connect, close: Close, encode: Encode, place: str, under_way: Callable[[], int]
    ) -> None:
        """Makes one that is not running yet.

        Args:
            connect: Opens the database; called on the thread.
            close: Closes it; called on the thread.
            encode: Gives the text of events and of ends, for `put`; called on the thread.
            place: How messages name the journal.
            under_way: Gives how many runs are under way; called on the thread.
        """
        self._under_way = under_way
        self._connect = connect
        self._close = close
        self._encode = encode
        self._place = place
        self._next = Batch()
        # For each run that has any, the number of the next event that the thread comes to.
        self._numbers: dict[int, int] = {}
        # For each run of which an event is not on disk yet, the batch that has the last one. (What comes in a
        # later one, of others, says nothing of this run.)
        self._batch_of: dict[int, Batch] = {}
        # The size of the batch that was taken last.
        self._taken = 0
        # What is told here may be so by the garbage collector, which closes a run that nobody holds: at any
        # place, also where this thread has the lock.
        self._lock = threading.RLock()
        self._wanted: SimpleQueue[None] = SimpleQueue()
        # Whether the thread waits for work: it is told once, and not of each event.
        self._waits = False
        self._closing = False
        # The runs of which events could not be written, and why. What comes after a gap is not written.
        self._lost: dict[int, BaseException] = {}
        self._thread = threading.Thread(target=self._work, name="pysagas journal", daemon=True)
        loop: Any = current_token().native_token
        on_asyncio = hasattr(loop, "call_soon_threadsafe")
        self._loop: OnAsyncio | OnTrio = OnAsyncio(loop) if on_asyncio else OnTrio(loop)

    async def start(self) -> None:
        """Starts the thread, which opens the database.

        Raises:
            JournalError: That is not possible.
        """
        self._thread.start()
        _, late = await self.call_surely(_nothing, None, shield=True)
        if late is not None:
            raise late

    async def stop(self) -> None:
        """Writes what is left, and ends the thread, which closes the database.

        No cancellation cuts that off.
        """
        with self._lock:
            self._closing = True
            self._tell()

        late = await surely(partial(anyio.to_thread.run_sync, self.wait_for_end))
        if late is not None:
            raise late

    def wait_for_end(self) -> None:
        """Waits until all is written, and the database closed; for another thread than that of the event loop."""
        self._thread.join()

    @property
    def is_running(self) -> bool:
        """Whether the thread has not ended."""
        return self._thread.is_alive()

    def append(self, run: int, event: Written) -> None:
        """Takes an event for the next batch.

        Args:
            run: The run that it is of.
            event: What is written of it.

        Raises:
            JournalError: An earlier one of its run could not be written.
        """
        if run in self._lost:
            self.check(run)
        with self._lock:
            batch = self._next
            if run in batch.events:
                batch.events[run].append(event)
            else:
                # In this order: a KeyboardInterrupt between must leave nothing that is not waited for.
                self._batch_of[run] = batch
                batch.events[run] = [event]
            if self._waits:
                self._tell()

    def flush(self, run: int) -> Awaitable[None]:
        """Gives what waits until every event that was taken of a run is on disk.

        It is to be awaited at once, by the task that has asked. Cancellation leaves the events to be
        written all the same.

        Args:
            run: Whose events are waited for.

        Raises:
            JournalError: One of them could not be written, or an earlier one of the run.
        """
        batch = self._batch_of.get(run)
        if batch is not None:
            return self._loop.wait(batch, run)
        self.check(run)
        return _DONE

    def check(self, run: int) -> None:
        """Makes sure that no event of a run was lost, as far as is known.

        Raises:
            JournalError: One was.
        """
        if run in self._lost:
            raise self._failure(self._lost[run])

    def forget(self, run: int, next_number: int = 0) -> None:
        """Takes up a run as it is on disk, whatever was lost of it: when all of its events were taken.

        Args:
            run: Which.
            next_number: That of its next event.
        """
        self._lost.pop(run, None)
        if next_number:
            self._numbers[run] = next_number
        else:
            self._numbers.pop(run, None)

    async def call(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Calls a function that reads with the connection, after all events that were taken.

        Raises:
            BaseException: What it raised.
            JournalError: SQLite refused what it asked; the batch could not be written; or this is
                another event loop than that of the writer.
        """
        job: Job[None, T] = Job(None)

        def read(connection: sqlite3.Connection, _: list[None]) -> list[T]:
            return [work(connection)]

        await self._loop.wait(self._queue(job, read, reads=True), job)
        return self._result(job)

    async def call_surely(
        self,
        work: Work[Row, T],
        row: Row,
        *,
        together: bool = False,
        shield: bool = False,
    ) -> tuple[T, BaseException | None]:
        """Calls a function that writes, after all events that were taken; waits for that, whatever comes.

        What it raises undoes nothing, so it checks before it writes.

        Args:
            work: The function.
            row: What it is to be called with.
            together: Whether it is called once for all of a batch who call it. Then, for several rows, it
                is one statement at most, which is carried out whole or not at all. Where it raises, it is
                called for each row alone.
            shield: Whether a cancellation of a scope is left for later.

        Returns:
            Its result for this row; and the interruption that came meanwhile, for the caller to raise.

        Raises:
            BaseException: As for `call`; or, over that, the interruption that came meanwhile, with the other
                as its cause.
        """
        job: Job[Row, T] = Job(row)
        return await self._surely(self._queue(job, work, together=together), job, shield=shield)

    async def end(self, end: End) -> BaseException | None:
        """Writes how a run ends, after all events of it that were taken; waits for that, whatever comes.

        Returns:
            The interruption that came meanwhile, for the caller to raise.

        Raises:
            JournalError: It cannot be written, or an event of the run could not be.
            BaseException: Over that, the interruption that came meanwhile, with the other as its cause.
        """
        job: Job[End, None] = Job(end)
        with self._lock:
            batch = self._batch_of[end.run] = self._open_batch()
            batch.add_end(job)
            self._tell()
        _, late = await self._surely(batch, job, shield=True)
        return late

    async def _surely(
        self, batch: Batch, job: Job[Any, T], *, shield: bool
    ) -> tuple[T, BaseException | None]:
        late: BaseException | None = None
        try:
            try:
                await (self._loop.wait_shielded if shield else self._loop.wait)(batch, job)
            except (GeneratorExit, JournalError):
                raise
            except BaseException as error:
                late = error
                # Until then nobody else may begin anything with the run.
                late = await surely(partial(self._over, batch, job)) or late
            return self._result(job), late
        except Exception as error:
            if late is None:
                raise
            raise late from error

    async def _over(self, batch: Batch, job: Job[Any, Any]) -> None:
        """Waits until a job is done that its caller has left."""
        while job in batch.left:
            assert batch.rest is not None
            batch = batch.rest
        if not batch.is_over:
            await self._loop.wait_shielded(batch, job)
        elif (error := self._error_of(batch, job)) is not None:
            raise error

    def _queue(
        self, job: Job[Row, T], work: Work[Row, T], *, reads: bool = False, together: bool = False
    ) -> Batch:
        with self._lock:
            batch = self._open_batch()
            batch.add(work, job, together=together, reads=reads)
            self._tell()
        return batch

    def _open_batch(self) -> Batch:
        """Gives the batch that takes what is waited for; called with the lock held."""
        if not self._is_here():
            # Nobody would be woken here. All that is done with a run begins with such a call.
            raise JournalError(
                f"{self._place} was opened in another event loop than this one; open it, with "
                "`async with`, in the event loop that uses it"
            )
        if self._closing:
            raise JournalError(f"{self._place} is closed")
        return self._next

    def _result(self, job: Job[Any, T]) -> T:
        if isinstance(job.error, sqlite3.Error):
            raise JournalError(f"{self._place} cannot do that: {job.error}") from job.error
        if job.error is not None:
            raise job.error
        return cast("T", job.result)

    def _is_here(self) -> bool:
        try:
            return self._loop.is_here()
        except RuntimeError:
            return False  # this is not even an event loop of that kind

    def _tell(self) -> None:
        """Tells the thread that there is work; called with the lock held."""
        if self._waits:
            # In this order: where a KeyboardInterrupt comes between, it is told once too often.
            self._wanted.put(None)
            self._waits = False

    def _failure(self, cause: BaseException) -> JournalError:
        error = JournalError(
            f"{self._place} cannot be written: {cause}; when that is mended, recover() goes on from what "
            "it holds"
        )
        error.__cause__ = cause
        return error

    def _error_of(self, batch: Batch, what: int | Job[Any, Any]) -> JournalError | None:
        """Gives why what was waited for is not on disk."""
        cause = self._lost.get(what) if isinstance(what, int) else batch.error
        return None if cause is None else self._failure(cause)

    def _finish(self, batch: Batch) -> None:
        """Wakes all who wait for a batch; but for what was left to another one they go on waiting."""
        batch_of, left, wake = self._batch_of, batch.left, self._loop.wake
        for run in batch.events:
            if batch_of.get(run) is batch:
                del batch_of[run]
        well = batch.error is None and not self._lost
        for waiter, what in batch.waiting.items():
            if left and what in left:
                assert batch.rest is not None
                batch.rest.waiting[waiter] = what
            else:
                wake(waiter, None if well else self._error_of(batch, what))
        batch.waiting.clear()
        batch.is_over = True
        for what in left:
            if isinstance(what, int) and batch_of[what] is batch:
                assert batch.rest is not None
                batch_of[what] = batch.rest

    # --- on the thread --------------------------------------------------------------------------

    def _work(self) -> None:
        connection: sqlite3.Connection | None = None
        failed: BaseException | None = None
        try:
            connection = self._connect()
        except BaseException as error:
            failed = error
        while True:
            batch = self._wait_for_work()
            if batch is None:
                break
            if connection is None or failed is not None:
                batch.error = failed
            else:
                texts, alone = self._texts(batch)
                write(connection, batch, texts, alone)
                if connection.in_transaction:
                    # It cannot even be undone. What came next would be put into it, and be lost with it.
                    connection.close()
                    failed = batch.error
            if batch.error is not None:
                batch.error.__traceback__ = None  # which holds what was to be written
                for run in batch.events:
                    self._lost.setdefault(run, batch.error)
            self._wake(batch)
        if connection is not None:
            self._close(connection)

    def _wait_for_work(self) -> Batch | None:
        """Gives what is to be written; None where there is nothing more."""
        while True:
            with self._lock:
                if self._next.events or self._next.groups:
                    return self._take()
                if self._closing:
                    return None
                self._waits = True
            self._wanted.get()

    def _take(self) -> Batch:
        """Gives what is to be written now; called with the lock held.

        If all that is queued were written at once, all who wait would go on at once, and what they do next
        would be queued at once: the event loop and the disk would wait for each other in turn. So where
        more is queued than will come of what the event loop has been given back, half of both is taken.
        Then it has the one half to go on with while the other is written. Functions come after all runs, so
        they are left for later; but not twice, or they would be for as long as enough runs go on.
        """
        batch, self._next = self._next, Batch()
        queued = batch.size()
        to_come = min(self._taken, max(self._under_way() - queued, 0))
        half = (queued + to_come + 1) // 2
        if queued > max(half, FEW) and not batch.was_left:
            batch.leave(half, self._next)
        self._taken = batch.size()
        return batch

    def _texts(self, batch: Batch) -> tuple[list[tuple[str, str]], list[Job[End, None]]]:
        """Gives what is to be written of runs as text, and how runs end of which that is no text."""
        texts = [(text, NOTHING) for text in self._encoded(self._records(batch))]
        ends, alone = self._ends(batch)
        if ends:
            events, _ = texts.pop() if texts else (NOTHING, NOTHING)
            texts.append((events, ends))
        return texts, alone

    def _records(self, batch: Batch) -> _Records:
        """Gives the events that are to be written, without what comes after a gap."""
        numbers, lost = self._numbers, self._lost
        records: _Records = {}
        for run, events in batch.events.items():
            if events and run not in lost:
                number = numbers.get(run, 0)
                numbers[run] = number + len(events)
                records[f"{run}/{number}"] = events
        return records

    def _encoded(self, records: _Records) -> list[str]:
        """Gives records as text: most often one, with all of them.

        One of which a name is no text is left out, and lost.
        """
        if not records:
            return []
        try:
            text = self._encode(records)
        except Exception as error:
            if len(records) == 1:
                (its,) = records
                self._lost[int(its.partition("/")[0])] = error
                return []
        else:
            if len(text) <= LARGE or len(records) == 1:
                return [text]
        both = [*records.items()]
        half = len(both) // 2
        return [*self._encoded(dict(both[:half])), *self._encoded(dict(both[half:]))]

    def _ends(self, batch: Batch) -> tuple[str, list[Job[End, None]]]:
        """Gives how runs end as text, but for those of which something is lost; and which are no such text."""
        rows: list[tuple[object, ...]] = []
        jobs: list[Job[End, None]] = []
        alone: list[Job[End, None]] = []
        for job in batch.ends:
            run, state, value, error, at = job.row
            if run in self._lost:
                job.error = self._failure(self._lost[run])
                continue
            as_text = _as_text(value)
            if as_text is None:
                alone.append(job)
            else:
                rows.append((run, state, as_text, error, at))
                jobs.append(job)
        try:
            text = self._encode(rows) if rows else ""
        except Exception:
            return "", [*alone, *jobs]
        return (text, alone) if len(text) <= LARGE else ("", [*alone, *jobs])

    def _wake(self, batch: Batch) -> None:
        try:
            self._loop.call_soon(self._finish, batch)
        except RuntimeError:
            pass  # the event loop has ended: nobody waits any more


def _as_text(value: bytes) -> str | None:
    """Gives bytes as the text by which SQLite gets them; None for what it would not get so.

    A codec may write what it likes, as far as SQLite takes it.
    """
    try:
        text = value.decode()
    except (AttributeError, UnicodeDecodeError):
        return None
    # Of a text that comes by way of JSON SQLite takes what stands before the first NUL.
    return None if "\0" in text else text


class _Done(Awaitable[None]):
    """What is waited for is there."""

    __slots__ = ()

    def __await__(self) -> Generator[None]:
        yield from ()


_DONE = _Done()


def _nothing(_: sqlite3.Connection, rows: list[None]) -> list[None]:
    """Fails where there is no connection."""
    return rows
