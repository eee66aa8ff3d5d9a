"""Measures what a journal costs: ``python benchmarks/durable.py``.

Beside the raw limits, which are SQLite's own: WAL, ``synchronous = FULL``, with one row and with 100
rows a commit, measured in the same process, in the same rounds, on the same disk. And beside DBOS, on SQLite
too, where it is installed.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Literal

import anyio
from report import _middle, _number, _spread, _table, publish
from run import LOOPS, environment

from pysagas import Parallel, Saga, Step
from pysagas.durable import RunState, SQLiteJournal

PAYLOAD = b"x" * 100
Synchronous = Literal["FULL", "NORMAL"]
FAST_DISK = 5_000
"""Raw commits a second, from which on the disk is as fast as the goals say: 0.15 ms an fsync."""


async def action(argument: int) -> int:
    return argument


async def compensation(argument: int) -> None:
    pass


def sequence(steps: int) -> Saga[..., None]:
    return Saga([Step(action, compensation, name=f"step {n}") for n in range(steps)], name="sequence")


def group(steps: int) -> Saga[..., None]:
    members = [Step(action, compensation, name=f"step {n}") for n in range(steps)]
    return Saga([Parallel(*members)], name="group")


@dataclass(frozen=True, slots=True)
class Case:
    """So many runs at once of a saga of so many steps."""

    runs: int
    steps: int
    rows_a_commit: int
    """Of the raw limit that it is held against."""
    grouped: bool = False
    goal: float | None = None
    """The ratio to the raw limit that is to be reached."""
    goal_a_second: int | None = None
    """Steps a second to be reached, where an fsync takes 0.15 ms."""

    @property
    def label(self) -> str:
        runs = "1 saga" if self.runs == 1 else f"{self.runs:,} sagas at once"
        return f"{runs}, {'a group of ' if self.grouped else ''}{self.steps} steps"

    @property
    def saga(self) -> Saga[..., None]:
        return group(self.steps) if self.grouped else sequence(self.steps)


CASES = (
    Case(1, 100, 1, goal=0.4, goal_a_second=2_000),
    Case(100, 10, 100, goal=0.15, goal_a_second=15_000),
    Case(1_000, 10, 100),
    Case(4, 50, 100, grouped=True),
)
QUICK = (Case(1, 20, 1), Case(20, 5, 100), Case(2, 5, 100, grouped=True))


@dataclass(slots=True)
class Row:
    """What was measured of one contender in one case."""

    loop: str
    case: str
    contender: str
    steps_a_second: list[float]
    limit: str
    rows_a_second: list[float]
    """Of the raw limit, in the same rounds."""
    goal: float | None = None
    goal_a_second: int | None = None

    @property
    def ratios(self) -> list[float]:
        return [
            steps / rows for steps, rows in zip(self.steps_a_second, self.rows_a_second, strict=True)
        ]


@dataclass(slots=True)
class Recovery:
    loop: str
    runs: int
    seconds: float


@dataclass(slots=True)
class Results:
    environment: dict[str, str]
    fsync_us: float = 0.0
    rows: list[Row] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)
    bytes_a_step: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


Go = Callable[[], Awaitable[None]]
"""Does a case once."""


# --- the raw limits -------------------------------------------------------------------------------


class Raw:
    """Rows as the journal's, appended to a table with nothing around it."""

    def __init__(self, path: Path, synchronous: str) -> None:
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.connection.execute("PRAGMA journal_mode = WAL")
        self.connection.execute(f"PRAGMA synchronous = {synchronous}")
        self.connection.execute(
            "CREATE TABLE events (run INTEGER, seq INTEGER, kind TEXT, path TEXT, name TEXT, data BLOB, "
            "at REAL)"
        )

    def rows_a_second(self, rows_a_commit: int, commits: int) -> float:
        rows = [(1, number, "done", "0.1", "step 1", PAYLOAD, 0.5) for number in range(rows_a_commit)]
        begun = time.perf_counter()
        for _ in range(commits):
            self.connection.execute("BEGIN IMMEDIATE")
            self.connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            self.connection.execute("COMMIT")
        return rows_a_commit * commits / (time.perf_counter() - begun)


@contextmanager
def raw(folder: Path, synchronous: Synchronous = "FULL") -> Iterator[Raw]:
    limits = Raw(folder / f"raw-{synchronous}.db", synchronous)
    with closing(limits.connection):
        yield limits


def fsync_us(folder: Path, times: int) -> float:
    """Measures how long the disk takes to keep 200 bytes that are appended to a file."""
    took = []
    with (folder / "fsync").open("wb", buffering=0) as file:
        for _ in range(times):
            file.write(PAYLOAD * 2)
            begun = time.perf_counter()
            os.fsync(file.fileno())
            took.append((time.perf_counter() - begun) * 1e6)
    return median(took)


# --- the contenders -------------------------------------------------------------------------------


async def all_at_once(run: Callable[[str], Awaitable[None]], run_ids: Sequence[str]) -> None:
    """Starts a task for each, by what the loop itself has for that, and waits for all of them.

    What starts the tasks is the user's, and not what is measured. A task of AnyIO's is no small part of what
    a short run costs; and those of DBOS are started by asyncio too.
    """
    if "asyncio" in anyio.get_cancelled_exc_class().__module__:
        import asyncio  # noqa: PLC0415 - whoever has the one loop need not have the other

        await asyncio.gather(*map(run, run_ids))
    else:
        import trio  # noqa: PLC0415 - as above

        async with trio.open_nursery() as nursery:
            for run_id in run_ids:
                nursery.start_soon(run, run_id)


@asynccontextmanager
async def ours(folder: Path, synchronous: Synchronous = "FULL") -> AsyncIterator[Callable[[Case], Go]]:
    """A journal of ours, which stays open: its log grows once."""
    number = 0
    path = folder / f"journal-{synchronous}.db"
    async with SQLiteJournal(path, synchronous=synchronous) as journal:

        def prepare(case: Case) -> Go:
            saga = case.saga

            async def run(run_id: str) -> None:
                await journal.run(saga, 1, run_id=run_id)

            async def go() -> None:
                nonlocal number
                first = number + 1
                number += case.runs
                await all_at_once(run, [f"run-{n}" for n in range(first, number + 1)])

            return go

        yield prepare


@asynccontextmanager
async def dbos(folder: Path) -> AsyncIterator[Callable[[Case], Go]]:
    """DBOS, with one workflow for each run and one of its steps for each of ours."""
    import asyncio  # noqa: PLC0415 - it knows no other loop

    from dbos import DBOS  # noqa: PLC0415 - it may be missing

    DBOS(
        config={
            "name": "durable",
            "system_database_url": f"sqlite:///{folder / 'dbos.db'}",
            "log_level": "ERROR",
            "run_admin_server": False,
        }
    )

    @DBOS.workflow()
    async def one_after_the_other(steps: int) -> None:
        for number in range(steps):
            await DBOS.run_step_async({"name": f"step {number}"}, action, 1)

    @DBOS.workflow()
    async def at_once(steps: int) -> None:
        await asyncio.gather(
            *(DBOS.run_step_async({"name": f"step {number}"}, action, 1) for number in range(steps))
        )

    DBOS.launch()
    try:

        def prepare(case: Case) -> Go:
            workflow = at_once if case.grouped else one_after_the_other

            async def go() -> None:
                await asyncio.gather(*(workflow(case.steps) for _ in range(case.runs)))

            return go

        yield prepare
    finally:
        DBOS.destroy()


def missing(package: str) -> str | None:
    try:
        version(package)
    except PackageNotFoundError:
        return f"{package} is not installed"
    return None


# --- rounds ---------------------------------------------------------------------------------------


async def measure(
    loop: str,
    name: str,
    prepare: Callable[[Case], Go],
    limits: Raw,
    cases: Sequence[Case],
    repeats: int,
    commits: int,
) -> list[Row]:
    """Measures cases in turn, each beside its raw limit, before it and after it.

    `commits` is how many of the limit are measured; of those with 100 rows a tenth.
    """
    rows = [
        Row(
            loop,
            case.label,
            name,
            [],
            f"{case.rows_a_commit} a commit",
            [],
            case.goal if name == "pysagas" else None,
            case.goal_a_second if name == "pysagas" else None,
        )
        for case in cases
    ]
    goes = [prepare(case) for case in cases]
    for repeat in range(-1, repeats):
        for case, go, row in zip(cases, goes, rows, strict=True):
            of_limit = case.rows_a_commit, commits if case.rows_a_commit == 1 else commits // 10
            gc.collect()
            before = limits.rows_a_second(*of_limit)
            begun = time.perf_counter()
            await go()
            seconds = time.perf_counter() - begun
            after = limits.rows_a_second(*of_limit)
            if repeat >= 0:  # the first round makes files grow and fills caches
                row.steps_a_second.append(case.runs * case.steps / seconds)
                row.rows_a_second.append(2 / (1 / before + 1 / after))
    return rows


# --- recovery and size ----------------------------------------------------------------------------


async def leave(path: str, runs: int) -> None:
    """Leaves as many runs behind as are told, each half done: this process kills itself."""
    under_way = 0

    async def wait(argument: int) -> int:
        nonlocal under_way
        under_way += 1
        if under_way == runs:
            os.kill(os.getpid(), signal.SIGKILL)
        await anyio.sleep_forever()
        return argument

    saga = half_done(wait)
    async with SQLiteJournal(path) as journal, anyio.create_task_group() as tasks:
        for number in range(runs):
            tasks.start_soon(partial(journal.run, saga, 1, run_id=f"run-{number}"))


def half_done(last: Callable[[int], Awaitable[int]]) -> Saga[..., None]:
    steps = [Step(action, compensation, name=f"step {number}") for number in range(4)]
    return Saga([*steps, Step(last, compensation, name="last")], name="left")


async def recover(path: Path, runs: int) -> float:
    """Takes back what was left; gives how many seconds that took, opening the journal included."""
    gc.collect()
    begun = time.perf_counter()
    async with SQLiteJournal(path) as journal:
        report = await journal.recover([half_done(action)])
        seconds = time.perf_counter() - begun
        assert [one.state for one in report.recovered] == [RunState.COMPENSATED] * runs
        assert report.ok
    return seconds


def measure_recovery(loop: str, folder: Path, runs: int) -> Recovery:
    path = folder / f"left-{len(list(folder.iterdir()))}.db"
    left = subprocess.run(
        [sys.executable, __file__, "--leave", str(path), str(runs), "--backend", loop], check=False
    )
    assert left.returncode == -signal.SIGKILL
    return Recovery(loop, runs, anyio.run(recover, path, runs, backend=loop))


async def bytes_a_step(folder: Path, case: Case) -> float:
    """Gives what the closed file holds for each step, the run around it included."""
    (folder / "size").mkdir()
    async with ours(folder / "size") as prepare:
        await prepare(case)()
    return sum(file.stat().st_size for file in (folder / "size").iterdir()) / case.runs / case.steps


# --- the report -----------------------------------------------------------------------------------

DOUBTS = """\
- Steps do nothing: what is seen is the journal alone. One call over a network hides most of it.
- An *fsync* is what a commit waits for; how long it takes is a property of this disk, and of who
  else is using it. Each ratio is of one round, to the raw limit that was measured just before and
  just after. On a slow disk both wait for it, which makes the ratios better than they are on a fast
  one: the goals are for an fsync of 0.15 ms, and are judged only where the raw limit reaches
  5,000 commits a second. NORMAL does not wait for the disk, neither in the journal nor in the raw limit: it
  shows what is left of both on the fastest of disks.
- The raw limit counts rows, ours counts steps, each of which is two events: its start, before it runs,
  and its result. Those of one run that are in the same commit share a row.
"""


def to_markdown(results: Results) -> str:
    about = {
        **results.environment,
        "fsync of 200 bytes appended to a file, median": f"{results.fsync_us:.0f} µs",
    }
    parts = ["# Results of the journal", "", *_table(["what", "value"], about.items()), "", DOUBTS]
    parts += [f"- Left out: {name}: {reason}." for name, reason in results.skipped.items()]
    parts += ["", "## Steps a second", "", *_speeds(results.rows)]
    parts += ["", "## Recovery", "", *_recoveries(results.recoveries)]
    parts += ["", "## Size", ""]
    parts += [
        f"{label}: {size:.0f} bytes a step in the closed file, what is recorded of the run included."
        for label, size in results.bytes_a_step.items()
    ]
    return "\n".join(parts).rstrip() + "\n"


def _commits_a_second(rows: Sequence[Row], loop: str) -> float:
    return max(
        median(row.rows_a_second)
        for row in rows
        if (row.loop, row.contender, row.limit) == (loop, "pysagas", "1 a commit")
    )


def _speeds(rows: Sequence[Row]) -> list[str]:
    return _table(
        ["loop", "case", "who", "steps/s", "raw limit, rows/s", "ratio", "middle half", "goal", "met"],
        (
            [
                row.loop,
                row.case,
                row.contender,
                f"{median(row.steps_a_second):,.0f}",
                f"{median(row.rows_a_second):,.0f} ({row.limit})",
                _number(median(row.ratios)),
                _spread(row.ratios),
                _goal(row),
                _met(row, _commits_a_second(rows, row.loop)),
            ]
            for row in rows
        ),
    )


def _goal(row: Row) -> str:
    if row.goal is None:
        return ""
    return f"≥ {row.goal}" + ("" if row.goal_a_second is None else f"; {row.goal_a_second:,}/s")


def _met(row: Row, commits_a_second: float) -> str:
    if row.goal is None:
        return ""
    if commits_a_second < FAST_DISK:
        return "not judged: a slow disk"
    ratio = _verdict(round(median(row.ratios), 2), _middle(row.ratios)[1], row.goal)
    if row.goal_a_second is None:
        return ratio
    speeds = row.steps_a_second
    return f"{ratio}; {_verdict(median(speeds), _middle(speeds)[1], row.goal_a_second)}"


def _verdict(measured: float, third_quartile: float, goal: float) -> str:
    if measured >= goal:
        return "yes"
    return "unclear" if third_quartile >= goal else "**no**"


def _recoveries(recoveries: Sequence[Recovery]) -> list[str]:
    return _table(
        ["loop", "unfinished runs", "seconds", "ms a run", "against the fewest, a run"],
        (
            [
                one.loop,
                f"{one.runs:,}",
                f"{one.seconds:.2f}",
                _number(one.seconds / one.runs * 1e3),
                f"x{_number(one.seconds / one.runs / _fewest(recoveries, one.loop))}",
            ]
            for one in recoveries
        ),
    )


def _fewest(recoveries: Sequence[Recovery], loop: str) -> float:
    """Gives the seconds a run of the smallest recoveries on a loop."""
    of_loop = [one for one in recoveries if one.loop == loop]
    fewest = min(one.runs for one in of_loop)
    return median(one.seconds / one.runs for one in of_loop if one.runs == fewest)


# --- the runner -----------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less of everything: a few seconds")
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds; by default 31")
    parser.add_argument("--backend", choices=LOOPS, help="only on this loop")
    parser.add_argument("--folder", type=Path, help="where the files are made: on the disk to measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw rows there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--leave", nargs=2, metavar=("FILE", "N"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


async def on_loop(loop: str, options: argparse.Namespace, folder: Path, results: Results) -> None:
    cases = QUICK if options.quick else CASES
    repeats = options.repeats or (2 if options.quick else 31)
    commits = 20 if options.quick else 200

    def add(rows: list[Row]) -> None:
        results.rows += rows
        for row in rows:
            print(
                f"{loop:8} {row.contender:8} {row.case:45} {median(row.steps_a_second):9,.0f} steps/s "
                f"x{median(row.ratios):.3f} of {median(row.rows_a_second):,.0f}",
                flush=True,
            )

    with raw(folder) as limits:
        async with ours(folder) as prepare:
            add(await measure(loop, "pysagas", prepare, limits, cases, repeats, commits))
        # Without waiting for the disk: what is left is what the processor has to do.
        with raw(folder, "NORMAL") as no_wait:
            async with ours(folder, "NORMAL") as prepare:
                name = "pysagas, NORMAL"
                add(await measure(loop, name, prepare, no_wait, cases[:2], repeats, commits))
        if loop == "asyncio" and "DBOS" not in results.skipped:
            # After ours, not between: its threads ask the database even when there is nothing to do.
            async with dbos(folder) as prepare:
                add(await measure(loop, "DBOS", prepare, limits, cases[:2], min(repeats, 3), commits))
    if not results.bytes_a_step:
        largest = max(cases, key=lambda case: case.runs)
        results.bytes_a_step[largest.label] = await bytes_a_step(folder, largest)


def main(arguments: Sequence[str] | None = None) -> Results:
    options = parse(arguments)
    results = Results(environment())
    if options.leave:
        path, runs = options.leave
        anyio.run(leave, path, int(runs), backend=options.backend)
    results.environment["SQLite"] = sqlite3.sqlite_version
    for package in ("msgspec", "dbos"):
        results.environment[package] = missing(package) or version(package)
    reason = missing("dbos")
    if reason is not None:
        results.skipped["DBOS"] = reason
    for loop in LOOPS:
        if options.backend in (None, loop):
            with tempfile.TemporaryDirectory(dir=options.folder) as name:
                folder = Path(name)
                results.fsync_us = results.fsync_us or fsync_us(folder, 50 if options.quick else 500)
                anyio.run(partial(on_loop, loop, options, folder, results), backend=loop)
                for runs in (10, 20, 10) if options.quick else (1_000, 10_000, 1_000):
                    results.recoveries.append(measure_recovery(loop, folder, runs))
    publish(to_markdown(results), results, options)
    return results


if __name__ == "__main__":
    main()
