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
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from queue import SimpleQueue
from typing import Any, Generic, NamedTuple, TypeVar, cast

import anyio
from anyio.lowlevel import current_token

from ._errors import JournalError
from ._records import LARGE, Written, insert_all, is_of_statement
from ._surely import surely

__all__ = ["Writer"]

Row = TypeVar("Row")
T = TypeVar("T")

Connect = Callable[[], sqlite3.Connection]
Close = Callable[[sqlite3.Connection], None]
Encode = Callable[[object], str]
Work = Callable[[sqlite3.Connection, list[Row]], Sequence[T]]
"""Gives a result for each row."""

_Records = dict[str, list[Written]]
"""Events, by the run that they are of and the number of the first, as `insert_all` takes them."""

FEW = 32
"""Of so few runs, what is queued is not halved: the event loop is done with them before the disk is."""


class _Job(Generic[Row, T]):
    """One of the rows that a function is to be called with, within the batch's transaction."""

    __slots__ = ("error", "result", "row")

    def __init__(self, row: Row) -> None:
        self.row = row
        self.result: T | None = None
        self.error: BaseException | None = None


class _OnAsyncio:
    """How a task waits for a batch on asyncio: for a future, with nothing around it.

    Each step of each run waits once; with `anyio.Event` that was a tenth of what a step costs.
    """

    __slots__ = ("_here", "_loop", "call_soon")

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        self._here: Callable[[], object] = import_module("asyncio").get_running_loop
        self.call_soon: Callable[..., object] = loop.call_soon_threadsafe

    def is_here(self) -> bool:
        return self._here() is self._loop

    def wait(self, batch: _Batch, what: int | _Job[Any, Any]) -> Awaitable[None]:
        future = self._loop.create_future()
        batch.waiting[future] = what
        return cast("Awaitable[None]", future)

    async def wait_shielded(self, batch: _Batch, what: int | _Job[Any, Any]) -> None:
        with anyio.CancelScope(shield=True):
            await self.wait(batch, what)

    def wake(self, future: Any, error: BaseException | None) -> None:
        if future.done():
            pass  # its task was cancelled
        elif error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


class _Woken:
    """What a task on Trio gets that is woken for no other reason than that it may go on.

    It stands for ``outcome.Value(None)``, which Trio would make anew for each: for it notes that it has been
    used, and that takes longer than all else that it is to wake a task.
    """

    __slots__ = ()

    def unwrap(self) -> None:
        pass


_WOKEN = _Woken()


class _OnTrio:
    """The same on Trio: what waits is the task. One that refuses to be cancelled needs no scope."""

    __slots__ = ("_lowlevel", "_token", "call_soon", "wait", "wait_shielded")

    def __init__(self, token: Any) -> None:
        self._token = token
        self._lowlevel = lowlevel = import_module("trio.lowlevel")
        self.call_soon: Callable[..., object] = token.run_sync_soon
        # A KeyboardInterrupt after the task is noted down, and before it waits, would have it woken where it
        # waits for something else.
        protected: Callable[[Callable[..., Any]], Callable[..., Awaitable[None]]]
        protected = lowlevel.enable_ki_protection
        self.wait, self.wait_shielded = protected(self._wait), protected(self._wait_shielded)

    def is_here(self) -> bool:
        return self._lowlevel.current_trio_token() is self._token

    async def _wait(self, batch: _Batch, what: int | _Job[Any, Any]) -> None:
        lowlevel = self._lowlevel
        task = lowlevel.current_task()
        batch.waiting[task] = what
        await lowlevel.wait_task_rescheduled(partial(self._cancelled, batch, task))

    def _cancelled(self, batch: _Batch, task: object, _: object) -> Any:
        waits_for: _Batch | None = batch
        while waits_for is not None and waits_for.waiting.pop(task, None) is None:
            waits_for = waits_for.rest
        return self._lowlevel.Abort.SUCCEEDED

    async def _wait_shielded(self, batch: _Batch, what: int | _Job[Any, Any]) -> None:
        lowlevel = self._lowlevel
        batch.waiting[lowlevel.current_task()] = what
        await lowlevel.wait_task_rescheduled(self._not_cancelled)

    def _not_cancelled(self, _: object) -> Any:
        return self._lowlevel.Abort.FAILED

    def wake(self, task: Any, error: BaseException | None) -> None:
        woken = _WOKEN if error is None else import_module("outcome").Error(error)
        self._lowlevel.reschedule(task, woken)


class _Group(NamedTuple):
    """A function, and the rows that it is to be called with."""

    work: Work[Any, Any]
    jobs: list[_Job[Any, Any]]
    may_grow: bool


class _Batch:
    """What is written by one commit."""

    __slots__ = ("error", "events", "groups", "is_over", "left", "reads", "rest", "waiting", "was_left")

    def __init__(self) -> None:
        # For each run its events.
        self.events: dict[int, list[Written]] = {}
        # What is to be called after that, in this order; and whether all of it only reads.
        self.groups: list[_Group] = []
        self.reads = True
        # The batch to which something of this one was left, for the next commit: the events of these runs,
        # these jobs. And whether jobs were left to this one.
        self.rest: _Batch | None = None
        self.left: set[int | _Job[Any, Any]] = set()
        self.was_left = False
        # Why it was not written.
        self.error: BaseException | None = None
        # Of the event loop: who waits, for the events of a run, or for a job; whether all were told.
        self.waiting: dict[Any, int | _Job[Any, Any]] = {}
        self.is_over = False

    def add(self, work: Work[Row, T], job: _Job[Row, T], *, may_grow: bool, first: bool) -> None:
        """Adds a job: to those with the same function, unless it would pass one that stands alone.

        What stands `first` comes before the other functions that it may pass.
        """
        place = len(self.groups)
        while place and self.groups[place - 1].may_grow:
            place -= 1
            if self.groups[place].work == work:
                self.groups[place].jobs.append(job)
                return
        self.groups.insert(place if first else len(self.groups), _Group(work, [job], may_grow))

    def size(self) -> int:
        """Gives of how many runs there is something here that can be written without the others'."""
        if self.events or len(self.groups) != 1:
            return len(self.events)
        return len(self.groups[0].jobs)

    def leave(self, size: int, rest: _Batch) -> None:
        """Leaves all but so much for another batch; jobs come after all events."""
        self.rest = rest
        if not self.events:
            ((work, jobs, may_grow),) = self.groups
            self.groups = [_Group(work, jobs[:size], may_grow)]
            rest.groups = [_Group(work, jobs[size:], may_grow)]
        else:
            for run in list(self.events)[size:]:
                # A run that is collected just now may have recorded something there already.
                rest.events[run] = self.events.pop(run) + rest.events.get(run, [])
            self.groups, rest.groups = [], self.groups
        self.left.update(rest.events, *(group.jobs for group in rest.groups))
        rest.was_left = bool(rest.groups)
        rest.reads = self.reads
        self.reads = self.reads or not self.groups


class Writer:
    """Writes events and calls functions on a thread of its own; used by one event loop."""

    def __init__(
        self, connect: Connect, close: Close, encode: Encode, place: str, under_way: Callable[[], int]
    ) -> None:
        """Makes one that is not running yet.

        Args:
            connect: Opens the database; called on the thread.
            close: Closes it; called on the thread.
            encode: Gives the text of records, for `insert_all`; called on the thread.
            place: How messages name the journal.
            under_way: Gives how many runs are under way; called on the thread.
        """
        self._under_way = under_way
        self._connect = connect
        self._close = close
        self._encode = encode
        self._place = place
        self._next = _Batch()
        # For each run that has any, the number of the next event that the thread comes to.
        self._numbers: dict[int, int] = {}
        # For each run of which an event is not on disk yet, the batch that has the last one. (What comes in a
        # later one, of others, says nothing of this run.)
        self._batch_of: dict[int, _Batch] = {}
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
        self._loop: _OnAsyncio | _OnTrio = _OnAsyncio(loop) if on_asyncio else _OnTrio(loop)

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

        async def join() -> None:
            await anyio.to_thread.run_sync(self._thread.join)

        late: BaseException | None = None
        with anyio.CancelScope(shield=True):
            late = await surely(join)
        if late is not None:
            raise late

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
                batch.events[run] = [event]
                self._batch_of[run] = batch
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
        batch, job = self._queue(lambda connection, _: [work(connection)], None, reads=True)
        await self._loop.wait(batch, job)
        return self._result(job)

    async def call_surely(
        self,
        work: Work[Row, T],
        row: Row,
        *,
        together: bool = False,
        first: bool = False,
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
            first: Whether that comes before the other functions that are called so.
            shield: Whether a cancellation of a scope is left for later.

        Returns:
            Its result for this row; and the interruption that came meanwhile, for the caller to raise.

        Raises:
            BaseException: As for `call`; or, over that, the interruption that came meanwhile, with the other
                as its cause.
        """
        batch, job = self._queue(work, row, together=together, first=first)
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

    async def _over(self, batch: _Batch, job: _Job[Any, Any]) -> None:
        """Waits until a job is done that its caller has left."""
        while job in batch.left:
            assert batch.rest is not None
            batch = batch.rest
        if not batch.is_over:
            await self._loop.wait_shielded(batch, job)
        elif (error := self._error_of(batch, job)) is not None:
            raise error

    def _queue(
        self,
        work: Work[Row, T],
        row: Row,
        *,
        reads: bool = False,
        together: bool = False,
        first: bool = False,
    ) -> tuple[_Batch, _Job[Row, T]]:
        if not self._is_here():
            # Nobody would be woken here. All that is done with a run begins with such a call.
            raise JournalError(
                f"{self._place} was opened in another event loop than this one; open it, with "
                "`async with`, in the event loop that uses it"
            )
        job: _Job[Row, T] = _Job(row)
        with self._lock:
            if self._closing:
                raise JournalError(f"{self._place} is closed")
            batch = self._next
            batch.add(work, job, may_grow=together, first=first)
            # Who looks on must not keep other processes from writing.
            batch.reads = batch.reads and reads
            self._tell()
        return batch, job

    def _result(self, job: _Job[Any, T]) -> T:
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

    def _error_of(self, batch: _Batch, what: int | _Job[Any, Any]) -> JournalError | None:
        """Gives why what was waited for is not on disk."""
        cause = self._lost.get(what) if isinstance(what, int) else batch.error
        return None if cause is None else self._failure(cause)

    def _finish(self, batch: _Batch) -> None:
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
                _write(connection, batch, self._texts(self._records(batch)))
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

    def _wait_for_work(self) -> _Batch | None:
        """Gives what is to be written; None where there is nothing more."""
        while True:
            with self._lock:
                if self._next.events or self._next.groups:
                    return self._take()
                if self._closing:
                    return None
                self._waits = True
            self._wanted.get()

    def _take(self) -> _Batch:
        """Gives what is to be written now; called with the lock held.

        If all that is queued were written at once, all who wait would go on at once, and what they do next
        would be queued at once: the event loop and the disk would wait for each other in turn. So where
        more is queued than will come of what the event loop has been given back, half of both is taken.
        Then it has the one half to go on with while the other is written. Jobs come after all events, so
        they are left for later; but not twice, or they would be for as long as enough runs go on.
        """
        batch, self._next = self._next, _Batch()
        queued = batch.size()
        to_come = min(self._taken, max(self._under_way() - queued, 0))
        half = (queued + to_come + 1) // 2
        if queued > max(half, FEW) and not batch.was_left:
            batch.leave(half, self._next)
        self._taken = batch.size()
        return batch

    def _records(self, batch: _Batch) -> _Records:
        """Gives what is to be written, without what comes after a gap."""
        numbers, lost = self._numbers, self._lost
        records: _Records = {}
        for run, events in batch.events.items():
            if run not in lost:
                number = numbers.get(run, 0)
                numbers[run] = number + len(events)
                records[f"{run}/{number}"] = events
        return records

    def _texts(self, records: _Records) -> list[str]:
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
        return [*self._texts(dict(both[:half])), *self._texts(dict(both[half:]))]

    def _wake(self, batch: _Batch) -> None:
        try:
            self._loop.call_soon(self._finish, batch)
        except RuntimeError:
            pass  # the event loop has ended: nobody waits any more


class _Done(Awaitable[None]):
    """What is waited for is there."""

    __slots__ = ()

    def __await__(self) -> Generator[None]:
        yield from ()


_DONE = _Done()


def _nothing(_: sqlite3.Connection, rows: list[None]) -> list[None]:
    """Fails where there is no connection."""
    return rows


def _write(connection: sqlite3.Connection, batch: _Batch, texts: list[str]) -> None:
    """Writes a batch whole, or not at all."""
    try:
        # One statement is a transaction by itself.
        if len(texts) == 1 and not batch.groups:
            insert_all(connection, texts[0])
            return
        if not texts and len(batch.groups) == 1:
            (group,) = batch.groups
            if len(group.jobs) > 1 and _do_at_once(connection, group):
                return
        connection.execute("BEGIN" if batch.reads and not texts else "BEGIN IMMEDIATE")
        for text in texts:
            insert_all(connection, text)
        for group in batch.groups:
            _do(connection, group)
        connection.execute("COMMIT")
    except BaseException as error:
        batch.error = error
        if connection.in_transaction:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")


def _do(connection: sqlite3.Connection, group: _Group) -> None:
    if len(group.jobs) > 1 and _do_at_once(connection, group):
        return
    for job in group.jobs:
        try:
            (job.result,) = group.work(connection, [job.row])
        except BaseException as error:
            if isinstance(error, sqlite3.Error) and not (
                is_of_statement(error) and connection.in_transaction
            ):
                raise
            job.error = error


def _do_at_once(connection: sqlite3.Connection, group: _Group) -> bool:
    """Tells whether it could be done for all of them; if not, nothing is."""
    try:
        results = group.work(connection, [job.row for job in group.jobs])
    except Exception as error:
        if isinstance(error, sqlite3.Error) and not is_of_statement(error):
            raise
        return False
    for job, result in zip(group.jobs, results, strict=True):
        job.result = result
    return True
