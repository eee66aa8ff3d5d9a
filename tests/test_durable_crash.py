"""Processes that are really killed, and others that recover what they left; also two at once.

Each *case* is a chain of processes on one journal and one shop: the first runs sagas and is killed, the
next recover and are killed too, the last one is let live. Then a judge reads the shop and the journal.
Cases are drawn from a seed: ``PYSAGAS_SEED`` sets it, ``PYSAGAS_KILLS`` how many kills there are to be.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, count
from pathlib import Path
from random import Random
from typing import Any

import anyio
import crash_child
import pytest
from crash_child import STOCK, Orders, make_shop
from histories import make_writable

from pysagas.durable import Event, EventKind, RunInfo, RunState, SQLiteJournal

SEED = os.environ.get("PYSAGAS_SEED", "2026")
KILLS = int(os.environ.get("PYSAGAS_KILLS", "30"))
BACKENDS = ("asyncio", "trio")
# What stands in the shop after a run that completed; None where that depends on what was drawn.
COMPLETE: dict[str, set[str] | None] = {
    "sequence": set("abcdef"),
    "parallel": set("abcdefghij"),
    "function": None,
    "detour": set("ade"),
    "commit": set("abcde"),
    "rollback": {"what it never comes to"},
}
# Where members of groups stand: they are taken back in any order among each other.
GROUPS = {
    "sequence": (),
    "parallel": ("1", "1.1.1", "1.2"),
    "function": ("3", "4", "5", "6"),  # the group comes after as many steps as were drawn
    "detour": (),
    "commit": ("4",),
    "rollback": ("1",),
}

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL"),
    pytest.mark.timeout(60 + 10 * KILLS),
]


# --- processes ----------------------------------------------------------------------------------


class Process:
    """A child, and the lines that it prints."""

    def __init__(self, orders: Orders) -> None:
        # None of them measures itself: what they run is measured by the tests of one process.
        env = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
        self.popen = subprocess.Popen(
            [sys.executable, "-W", "error", crash_child.__file__, orders.to_argument()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )

    def line(self) -> list[str]:
        """Waits for the next line."""
        return self.popen.stdout.readline().split()

    def go(self) -> None:
        """Lets it go on from where it waits."""
        self.popen.stdin.write("go\n")
        self.popen.stdin.flush()

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def ended(self) -> list[str]:
        """Waits for its end; gives the lines that are left."""
        # Not by `communicate`, which knows nothing of what `readline` has read ahead.
        lines, err = self.popen.stdout.readlines(), self.popen.stderr.read()
        self.popen.wait()
        assert err == ""
        return [line.strip() for line in lines]

    def report(self) -> dict[str, Any]:
        """Waits for its end, which must be a good one; gives its report."""
        last = self.ended()[-1]
        assert self.popen.returncode == 0
        return json.loads(last)


@contextmanager
def process(orders: Orders) -> Iterator[Process]:
    """Starts a child; whatever comes, none is left."""
    child = Process(orders)
    with child.popen:
        try:
            yield child
        finally:
            child.popen.kill()


# --- cases --------------------------------------------------------------------------------------


@dataclass
class Case:
    """Files of its own, and what happened to the processes on them."""

    folder: Path
    saga: str
    run_ids: list[str] = field(default_factory=list)
    backend: str = "asyncio"
    story: list[str] = field(default_factory=list)
    # Where processes were killed, and how each one went about it.
    kills: list[str] = field(default_factory=list)
    resumed: bool = False
    last: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        make_shop(self.folder / "shop.db")

    def orders(self, task: str, **more: Any) -> Orders:
        return Orders(
            journal=str(self.folder / "journal.db"),
            shop=str(self.folder / "shop.db"),
            task=task,
            saga=self.saga,
            run_ids=self.run_ids,
            **{"backend": self.backend, **more},
        )


def rehearse(folder: Path, saga: str) -> tuple[int, float]:
    """Runs a saga undisturbed; gives how many boundaries there are, and how many seconds it takes."""
    case = Case(folder, saga, ["only"])
    with process(case.orders("run", seed="rehearsal")) as child:
        assert child.line() == ["begun"]
        begun = time.perf_counter()
        report = child.report()
        seconds = time.perf_counter() - begun
    assert report["results"] == {"only": "Refused" if saga == "rollback" else "COMPLETED"}
    judge(case)
    return len(report["passed"]), seconds


def play(folder: Path, saga: str, number: int, boundaries: int, seconds: float) -> Case:
    """Plays one case: processes that are to be killed, and one that is let live."""
    draws = Random(f"{SEED}/{saga}/{number}")
    case = Case(folder, saga, [f"run-{n}" for n in range(draws.choice((1, 1, 2, 3)))])
    for place in range(draws.choice((1, 2, 2, 3))):
        task = "run" if place == 0 else draws.choice(("run", "recover", "recover"))
        on_crash = draws.choice(("rollback", "rollback", "resume"))
        case.backend = BACKENDS[(number + place) % 2]
        case.resumed |= on_crash == "resume" and place > 0
        if draws.random() < 0.7:
            # A later process comes to fewer boundaries, as it replays what is recorded.
            kill_at = draws.randint(1, boundaries * (1 + len(case.run_ids)) // 2 // (1 + place))
            delay = None
        else:
            kill_at, delay = 0, draws.random() * seconds
        how = f"{task}, {on_crash}, {case.backend}"
        seed = f"{number}/{place}"
        with process(case.orders(task, on_crash=on_crash, kill_at=kill_at, seed=seed)) as child:
            assert child.line() == ["begun"], case.story
            if delay is not None:
                with suppress(subprocess.TimeoutExpired):
                    child.popen.wait(delay)
                child.popen.kill()
            last = child.ended()[-1:] or [""]
        where = last[0].removeprefix("killed ") if delay is None else "at any moment"
        killed = child.popen.returncode == -signal.SIGKILL
        assert killed or child.popen.returncode == 0, case.story
        case.kills += [where] * killed
        case.story.append(f"{how}, to be killed {kill_at or delay}: {where if killed else 'ended'}")
    case.backend = BACKENDS[number % 2]
    on_crash = draws.choice(("rollback", "resume"))
    case.resumed |= on_crash == "resume"
    with process(case.orders("settle", on_crash=on_crash)) as child:
        case.last = child.report()
    case.story.append(f"settle, {on_crash}, {case.backend}")
    return case


# --- the judge ----------------------------------------------------------------------------------


async def read_journal(path: Path) -> list[tuple[RunInfo, list[Event]]]:
    async with SQLiteJournal(path) as journal:
        return [(info, await journal.history(info.run_id)) for info in await journal.runs()]


def apart(saga: str, one: str, other: str) -> bool:
    """Tells whether two paths are in different members of a group."""
    common = os.path.commonprefix([one.split("."), other.split(".")])
    return ".".join(common) in GROUPS[saga]


@dataclass
class Attempts:
    """What the shop wrote down of one run, by path: the places in its log where attempts began and acted."""

    begun: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    made: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    def of(self, moment: str, kind: str, path: str) -> list[int]:
        return getattr(self, moment).get((kind, path), [])


def problems_of_run(
    case: Case, info: RunInfo, events: list[Event], shop: sqlite3.Connection
) -> list[str]:
    """Holds what happened in a run against what is recorded of it."""
    found: list[str] = []

    def must(holds: object, *what: object) -> None:
        found.extend([f"{info.run_id}: {' '.join(map(str, what))}"] * (not holds))

    attempts = Attempts()
    for number, moment, kind, path in shop.execute(
        "SELECT id, moment, kind, path FROM attempts WHERE run_id = ? ORDER BY id", (info.run_id,)
    ):
        getattr(attempts, moment).setdefault((kind, path), []).append(number)
    rows = shop.execute(
        "SELECT key, name, price, standing FROM effects WHERE run_id = ?", (info.run_id,)
    ).fetchall()
    effects = {key: standing for key, _, _, standing in rows}
    standing = {name: price for _, name, price, stands in rows if stands}
    kinds: dict[str, list[EventKind]] = {}
    for event in events:
        kinds.setdefault(".".join(map(str, event.path)), []).append(event.kind)
    committed = EventKind.COMMITTED in [event.kind for event in events]

    # What ran, and what is recorded.
    for kind, path in attempts.begun:
        must(path in kinds, kind, path, "ran, and nothing is recorded of it")
    for path, its in kinds.items():
        is_step = its[0] is EventKind.STARTED
        started, tried = its.count(EventKind.STARTED), its.count(EventKind.COMPENSATING)
        ended = [i for i, kind in enumerate(its) if kind in (EventKind.DONE, EventKind.FAILED)]
        made = attempts.of("made", "action", path)
        taken_back = attempts.of("made", "compensation", path)
        begun = attempts.of("begun", "action", path)
        effect = effects.get(f"{info.run_id}/{path}/action")
        must(len(begun) <= started, path, "ran more often than it was started", its)
        must(len(made) <= started, path, "had its effect more often than it was started", its)
        must(case.resumed or committed or started <= 1, path, "was started again", its)
        must(len(ended) <= 1, path, "ended twice", its)
        must(
            EventKind.STARTED not in its[ended[0] :] if ended else True, path, "was started again", its
        )
        if EventKind.DONE in its:
            must(effect is not None, path, "is recorded as done, and had no effect")
            must(made if started > 1 else len(made) == 1, path, "did not run once", its, made)
        must(len(attempts.of("begun", "compensation", path)) <= tried, path, "taken back unrecorded")
        must(its.count(EventKind.COMPENSATED) <= 1, path, "was taken back twice", its)
        must(EventKind.NOT_COMPENSATED not in its, path, "could not be taken back", its)
        if EventKind.COMPENSATED in its:
            must(its[-1] is not EventKind.COMPENSATING, path, "was taken back again", its)
            must(not effect, path, "is recorded as taken back, and stands")
            must(taken_back if tried > 1 else len(taken_back) == 1, path, "not taken back once", its)
        elif is_step:
            must(info.state is RunState.COMPLETED, path, "was started, and not taken back", its)
            must(effect, path, "was started, and does not stand", its)

    # Later effects are taken back first.
    for one, other in combinations([path for kind, path in attempts.begun if kind == "action"], 2):
        first, second = (
            attempts.of("made", "compensation", one),
            attempts.of("made", "compensation", other),
        )
        if first and second and not apart(case.saga, one, other):
            went_on = first[0] < attempts.of("begun", "action", other)[0]
            must(second[0] < first[0] or went_on, one, "was taken back before", other)

    # All, or nothing.
    must(not info.alive and info.ended is not None, "has not ended", info)
    if info.state is RunState.COMPENSATED:
        must(standing == {}, "is taken back, and stands:", standing)
        must(not committed, "is taken back, past its commit")
    else:
        must(info.state is RunState.COMPLETED, "is", info.state)
        complete = COMPLETE[case.saga]
        must(complete is None or set(standing) == complete, "completed, and stands:", standing)
        must(
            case.saga != "function" or sum(standing.values()) == 2 * standing["pay"],
            "paid what it had not bought",
            standing,
        )
    return found


def problems(case: Case) -> list[str]:
    """Says what is wrong in the shop, or in the journal, or between the two."""
    found: list[str] = []
    with closing(crash_child.open_shop(case.folder / "shop.db")) as shop:
        runs = anyio.run(read_journal, case.folder / "journal.db")
        for info, events in runs:
            found += problems_of_run(case, info, events, shop)
        known = {info.run_id for info, _ in runs}
        unknown = {run_id for (run_id,) in shop.execute("SELECT run_id FROM attempts")} - known
        found += [f"{run_id}: ran, and is not in the journal" for run_id in unknown]
        (pieces,) = shop.execute("SELECT pieces FROM stock").fetchone()
        (stands,) = shop.execute("SELECT count(*) FROM effects WHERE standing").fetchone()
        found += [f"the stock is {pieces}, with {stands} taken"] * (pieces + stands != STOCK)
    found += case.last.get("trouble", [])
    answers = {
        RunState.COMPLETED: ("COMPLETED",),
        RunState.COMPENSATED: ("RunInterrupted", "Refused"),
    }
    asked_again = case.last.get("results", {})
    found += [
        f"{info.run_id}: is {info.state}, and was {asked_again[info.run_id]} when asked again"
        for info, _ in runs
        if info.run_id in asked_again and asked_again[info.run_id] not in answers.get(info.state, ())
    ]
    return found


def judge(case: Case) -> None:
    found = problems(case)
    assert not found, "\n".join([f"PYSAGAS_SEED={SEED}", f"{case.saga}", *case.story, *found])


# --- killed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("saga", COMPLETE)
def test_killed_runs_are_restored_or_completed(tmp_path, saga):
    """Killed once, or again while it is recovered: all or nothing, each recorded action once."""
    share = -(-KILLS // len(COMPLETE))
    boundaries, seconds = rehearse(tmp_path / "rehearsal", saga)
    kills: Counter[str] = Counter()
    states: Counter[str] = Counter()
    numbers = count()
    with ThreadPoolExecutor(2) as two_at_once:
        while kills.total() < share:
            batch = [next(numbers), next(numbers)]
            played = partial(played_case, tmp_path, saga, boundaries=boundaries, seconds=seconds)
            for case in two_at_once.map(played, batch):
                judge(case)
                kills.update(case.kills)
                states.update(case.last["results"].values())
    # Shown by `-rP`.
    sys.stdout.write(f"{json.dumps({'saga': saga, 'ends': states, 'kills': kills})}\n")
    assert kills.total() >= share


def played_case(folder: Path, saga: str, number: int, *, boundaries: int, seconds: float) -> Case:
    return play(folder / f"case-{number}", saga, number, boundaries, seconds)


# --- two at once, and a living owner -------------------------------------------------------------

IN_HAND = [
    pytest.param("sequence", "action c made", BACKENDS, id="forward"),
    pytest.param("rollback", "compensation d begun", BACKENDS[::-1], id="back"),
]


@pytest.fixture(params=BACKENDS)
def backends(request):
    """The loop of the first process, and that of the others."""
    (others,) = {*BACKENDS} - {request.param}
    return request.param, others


@contextmanager
def holding(case: Case, backend: str, hold_at: str) -> Iterator[Process]:
    """A process that lives, and has all runs of the case in hand."""
    with process(case.orders("run", backend=backend, hold_at=hold_at)) as owner:
        assert owner.line() == ["begun"]
        held = sorted(owner.line() for _ in case.run_ids)
        assert held == [["holding", run_id] for run_id in case.run_ids]
        yield owner


def recover(case: Case, backend: str) -> dict[str, Any]:
    with process(case.orders("recover", backend=backend)) as other:
        return other.report()


@pytest.mark.parametrize(("saga", "hold_at", "backends"), IN_HAND)
def test_a_run_of_a_living_process_is_not_touched(tmp_path, saga, hold_at, backends):
    """Recover leaves it alone, a second start is told so, and its owner goes on undisturbed."""
    ours, others = backends
    case = Case(tmp_path / "case", saga, ["run-0", "run-1"])
    with holding(case, ours, hold_at) as owner:
        report = recover(case, others)
        assert (report["recovered"], report["trouble"]) == ([], [])
        assert report["in_progress"] == case.run_ids
        with process(case.orders("run", backend=others)) as other:
            assert other.report()["results"] == dict.fromkeys(case.run_ids, "RunInProgress")
        owner.go()
        case.last = owner.report()
    judge(case)


def test_a_process_that_is_stopped_is_not_taken_for_dead(tmp_path, backends):
    """However long a process does nothing: its runs are its own."""
    ours, others = backends
    case = Case(tmp_path / "case", "sequence", ["run-0"])
    with holding(case, ours, "action c made") as owner:
        owner.popen.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(owner.popen.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        report = recover(case, others)
        assert (report["recovered"], report["in_progress"]) == ([], ["run-0"])
        owner.popen.send_signal(signal.SIGCONT)
        owner.go()
        case.last = owner.report()
    assert case.last["results"] == {"run-0": "COMPLETED"}
    judge(case)


@pytest.mark.parametrize(("saga", "hold_at", "backends"), IN_HAND)
def test_runs_are_recovered_as_soon_as_their_process_is_dead(tmp_path, saga, hold_at, backends):
    """No heartbeat has to be missed first: a killed owner lets go at once."""
    ours, others = backends
    case = Case(tmp_path / "case", saga, ["run-0", "run-1"])
    with holding(case, ours, hold_at) as owner:
        assert recover(case, others)["in_progress"] == case.run_ids
        owner.kill()
        case.last = recover(case, others)
    assert (case.last["recovered"], case.last["in_progress"]) == (case.run_ids, [])
    judge(case)


def test_a_run_started_in_two_processes_at_once_runs_in_one(tmp_path, backends):
    """Whichever comes first has it; the other is told, and does nothing."""
    case = Case(tmp_path / "case", "sequence", [f"run-{n}" for n in range(8)])
    with ExitStack() as stack:
        both = [
            stack.enter_context(
                process(
                    case.orders(
                        "run",
                        backend=backend,
                        seed=backend,
                        hold_at="action c made",
                        wait_for_start=True,
                    )
                )
            )
            for backend in backends
        ]
        for child in both:
            assert child.line() == ["ready"]
        for child in both:
            child.go()
        for child in both:
            assert child.line() == ["begun"]
        said = [[child.line() for _ in case.run_ids] for child in both]
        for run_id in case.run_ids:
            assert sorted(line for lines in said for line in lines if run_id in line) == [
                ["holding", run_id],
                ["refused", run_id, "RunInProgress"],
            ]
        for child, lines in zip(both, said, strict=True):
            if "holding" in str(lines):
                child.go()
        reports = [child.report()["results"] for child in both]
    for run_id in case.run_ids:
        assert {report[run_id] for report in reports} == {"COMPLETED", "RunInProgress"}
    judge(case)


def test_dead_runs_are_recovered_once_by_two_that_recover_at_once(tmp_path, backends):
    """Each run is taken back by one of the two; none is left, and none is taken back twice."""
    case = Case(tmp_path / "case", "parallel", [f"run-{n}" for n in range(8)])
    with holding(case, backends[0], "action f begun") as owner:
        owner.kill()
    with ExitStack() as stack:
        both = [
            stack.enter_context(
                process(case.orders("recover", backend=backend, seed=backend, wait_for_start=True))
            )
            for backend in backends
        ]
        for child in both:
            assert child.line() == ["ready"]
        for child in both:
            child.go()
        reports = [child.report() for child in both]
    assert {run_id for report in reports for run_id in report["recovered"]} == {*case.run_ids}
    assert [trouble for report in reports for trouble in report["trouble"]] == []
    judge(case)


# --- the judge is no rubber stamp -----------------------------------------------------------------

DOCTORED = {
    "an action that ran twice": (
        "shop",
        "INSERT INTO attempts (moment, kind, run_id, path) VALUES ('begun', 'action', 'only', '2')",
        "2 ran more often than it was started",
    ),
    "an effect made twice": (
        "shop",
        "INSERT INTO attempts (moment, kind, run_id, path) VALUES ('made', 'action', 'only', '2')",
        "2 had its effect more often than it was started",
    ),
    "a lost effect": (
        "shop",
        "DELETE FROM effects WHERE key = 'only/2/action'",
        "2 is recorded as done, and had no effect",
    ),
    "a lost piece": ("shop", "UPDATE stock SET pieces = pieces - 1", "the stock is"),
    "an effect that nobody intended": (
        "journal",
        "DELETE FROM events WHERE path = '2'",
        "action 2 ran, and nothing is recorded of it",
    ),
    "a run that nobody knows": ("journal", "DELETE FROM runs", "only: ran, and is not in the journal"),
    "a run without an end": (
        "journal",
        "UPDATE runs SET state = 'running', ended = NULL",
        "has not ended",
    ),
    "a failed run": ("journal", "UPDATE runs SET state = 'failed'", "is RunState.FAILED"),
    "the other end": (
        "journal",
        "UPDATE runs SET state = iif(state = 'completed', 'compensated', 'completed')",
        "stands:",
    ),
    "a second result": (
        "journal",
        "INSERT INTO events SELECT run, 99, kind, path, name, data, at FROM events WHERE seq = 5",
        "ended twice",
    ),
}
DOCTORED_ROLLBACK = {
    "a compensation that ran twice": (
        "shop",
        "INSERT INTO attempts (moment, kind, run_id, path) VALUES ('made', 'compensation', 'only', '2')",
        "2 not taken back once",
    ),
    "a compensation that nobody intended": (
        "shop",
        "INSERT INTO attempts (moment, kind, run_id, path) VALUES ('begun', 'compensation', 'only', '2')",
        "2 taken back unrecorded",
    ),
    "a compensation without effect": (
        "shop",
        "UPDATE effects SET standing = 1 WHERE key = 'only/2/action'",
        "2 is recorded as taken back, and stands",
    ),
    "a compensation that is missing": (
        "journal",
        "DELETE FROM events WHERE path = '2' AND kind LIKE 'compensat%'",
        "2 was started, and not taken back",
    ),
    "a wrong order": (
        "shop",
        "UPDATE attempts SET id = 1000 - id WHERE kind = 'compensation'",
        "0 was taken back before 2",
    ),
}


@pytest.mark.parametrize(
    ("saga", "doctored"),
    [("sequence", DOCTORED), ("rollback", DOCTORED | DOCTORED_ROLLBACK)],
    ids=["completed", "taken back"],
)
def test_the_judge_finds_what_is_wrong(tmp_path, saga, doctored):
    """Each thing that must not be is found, in the shop or in the journal."""
    rehearse(tmp_path / "true", saga)
    for what, (file, statement, finding) in doctored.items():
        case = Case(tmp_path / what, saga)
        shutil.copytree(tmp_path / "true", case.folder, dirs_exist_ok=True)
        with closing(crash_child.open_shop(case.folder / f"{file}.db")) as database:
            if "events" in statement:
                make_writable(database)
            database.execute(statement)
        assert [found for found in problems(case) if finding in found], what


def test_a_killed_run_that_nobody_recovers_is_found(tmp_path):
    """A kill really leaves something to recover."""
    case = Case(tmp_path / "case", "sequence", ["only"])
    with holding(case, "asyncio", "action c made") as owner:
        owner.kill()
    assert [found for found in problems(case) if "has not ended" in found]
