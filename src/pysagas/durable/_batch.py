"""What is written by one commit, and how: the events of runs, how they end, and functions that are called.

What this must not know: threads, and event loops.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Generic, NamedTuple, TypeVar

from ._records import End, Written, end_run, is_of_statement, put

__all__ = ["Batch", "Job", "Work", "write"]

Row = TypeVar("Row")
T = TypeVar("T")

Work = Callable[[sqlite3.Connection, list[Row]], Sequence[T]]
"""Gives a result for each row."""


class Job(Generic[Row, T]):
    """One of the rows that a function is to be called with, within the batch's transaction."""

    __slots__ = ("error", "result", "row")

    def __init__(self, row: Row) -> None:
        self.row = row
        self.result: T | None = None
        self.error: BaseException | None = None


class _Group(NamedTuple):
    """A function, and the rows that it is to be called with."""

    work: Work[Any, Any]
    jobs: list[Job[Any, Any]]


class Batch:
    """What is written by one commit."""

    __slots__ = (
        "ends",
        "error",
        "events",
        "groups",
        "is_over",
        "left",
        "reads",
        "rest",
        "waiting",
        "was_left",
    )

    def __init__(self) -> None:
        # For each run of which there is something its events; and how runs end, after those.
        self.events: dict[int, list[Written]] = {}
        self.ends: list[Job[End, None]] = []
        # What is to be called after that, in this order; and whether all of it only reads.
        self.groups: list[_Group] = []
        self.reads = True
        # The batch to which something of this one was left, for the next commit: what there is of these
        # runs, these jobs. And whether functions were left to this one.
        self.rest: Batch | None = None
        self.left: set[int | Job[Any, Any]] = set()
        self.was_left = False
        # Why it was not written.
        self.error: BaseException | None = None
        # Of the event loop: who waits, for the events of a run, or for a job; whether all were told.
        self.waiting: dict[Any, int | Job[Any, Any]] = {}
        self.is_over = False

    def add_end(self, job: Job[End, None]) -> None:
        """Adds how a run ends."""
        self.events.setdefault(job.row.run, [])
        self.ends.append(job)

    def add(self, work: Work[Row, T], job: Job[Row, T], *, together: bool, reads: bool) -> None:
        """Adds a function and its row; or the row alone, to the last function, where that is the same."""
        # Who looks on must not keep other processes from writing.
        self.reads = self.reads and reads
        if together and self.groups and self.groups[-1].work == work:
            self.groups[-1].jobs.append(job)
        else:
            self.groups.append(_Group(work, [job]))

    def size(self) -> int:
        """Gives of how many runs there is something here that can be written without the others'."""
        if self.events or len(self.groups) != 1:
            return len(self.events)
        return len(self.groups[0].jobs)

    def leave(self, size: int, rest: Batch) -> None:
        """Leaves all but so much for another batch; functions come after all runs."""
        self.rest = rest
        if not self.events:
            ((work, jobs),) = self.groups
            self.groups = [_Group(work, jobs[:size])]
            rest.groups = [_Group(work, jobs[size:])]
        else:
            for run in list(self.events)[size:]:
                # A run that is collected just now may have recorded something there already.
                rest.events[run] = self.events.pop(run) + rest.events.get(run, [])
            rest.ends = [job for job in self.ends if job.row.run not in self.events]
            self.ends = [job for job in self.ends if job.row.run in self.events]
            self.groups, rest.groups = [], self.groups
        self.left.update(rest.events, rest.ends, *(group.jobs for group in rest.groups))
        rest.was_left = bool(rest.groups)
        rest.reads = self.reads
        self.reads = self.reads or not self.groups


def write(
    connection: sqlite3.Connection,
    batch: Batch,
    texts: Sequence[tuple[str, str]],
    alone: Sequence[Job[End, None]],
) -> None:
    """Writes a batch whole, or not at all.

    Args:
        connection: To the database.
        batch: Which.
        texts: What there is of runs, as `put` takes it.
        alone: How runs end of which that is not among it.
    """
    groups = [*(_Group(_end_alone, [job]) for job in alone), *batch.groups]
    try:
        # One statement is a transaction by itself.
        if len(texts) == 1 and not groups:
            put(connection, *texts[0])
            return
        if not texts and len(groups) == 1:
            (group,) = groups
            if len(group.jobs) > 1 and _do_at_once(connection, group):
                return
        connection.execute("BEGIN" if batch.reads and not texts else "BEGIN IMMEDIATE")
        for text in texts:
            put(connection, *text)
        for group in groups:
            _do(connection, group)
        connection.execute("COMMIT")
    except BaseException as error:
        batch.error = error
        if connection.in_transaction:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")


def _end_alone(connection: sqlite3.Connection, rows: list[End]) -> list[None]:
    for row in rows:
        end_run(connection, row)
    return [None] * len(rows)


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
