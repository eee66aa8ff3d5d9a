"""A process that is killed: it runs sagas, or recovers them, on a journal and a shop that outlive it.

``python crash_child.py JSON``, see `Orders`; started by ``test_durable_crash.py``, and no test itself. It
prints a line for each thing that its starter may wait for, and what came of it all as the last one.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import anyio
from anyio.lowlevel import checkpoint

from pysagas import Commit, Effect, Parallel, Saga, SagaScope, Step, current_effect, saga
from pysagas.durable import EventKind, SQLiteJournal

STOCK = 1000
SECONDS = 50
"""How long a process may take before it counts as hanging, and says where."""


class Refused(Exception):
    """What a failing step raises."""


@dataclass(frozen=True)
class Order:
    parcels: int


@dataclass(frozen=True)
class Receipt:
    """What an action returns: a price that no second call would give again."""

    name: str
    price: int


@dataclass
class Orders:
    """What the process is to do.

    `task` is ``run`` the sagas under their ids; ``recover`` them; or ``settle``: recover them, and ask
    for each one that the journal knows once more. `kill_at` is the number of the boundary at which the
    process kills itself; 0: nowhere. `hold_at` is the name of the boundary at which each run says so,
    and waits for a line from the starter, which is for all of them.
    """

    journal: str
    shop: str
    task: str
    saga: str = "sequence"
    run_ids: list[str] = field(default_factory=list)
    backend: str = "asyncio"
    seed: str = ""
    on_crash: str = "rollback"
    kill_at: int = 0
    hold_at: str = ""
    wait_for_start: bool = False

    def to_argument(self) -> str:
        return json.dumps(asdict(self))


def say(*words: object) -> None:
    """Writes a line at once: the next thing may be the end."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


# --- boundaries ---------------------------------------------------------------------------------


class Boundaries:
    """The moments between two things that happen, in the order in which this process comes to them."""

    def __init__(self, kill_at: int) -> None:
        self.kill_at = kill_at
        self.numbers = count(1)  # asked on two threads
        self.passed: list[str] = []

    def __call__(self, name: str) -> None:
        self.passed.append(name)
        if next(self.numbers) == self.kill_at:
            say("killed", name)
            os.kill(os.getpid(), signal.SIGKILL)


class WatchedJournal(SQLiteJournal):
    """A journal that tells when it comes to a boundary."""

    def __init__(self, path: str, at: Boundaries) -> None:
        super().__init__(path)
        self._at = at

    def _prepare(self, connection: sqlite3.Connection) -> None:
        def trace(statement: str) -> None:
            # An INSERT is a transaction by itself, where a batch has nothing but records.
            if statement.startswith(
                ("CREATE", "COMMIT", "INSERT INTO records", "INSERT INTO put", "PRAGMA user_version =")
            ):
                self._at(f"before {statement.split(maxsplit=1)[0]} of the journal")

        connection.set_trace_callback(trace)
        super()._prepare(connection)

    async def _claim(self, *args: Any, **options: Any) -> Any:
        claim = await super()._claim(*args, **options)
        self._at("run claimed")
        return claim

    def _append(self, key: int, kind: EventKind, *event: Any) -> None:
        super()._append(key, kind, *event)
        self._at(f"{kind.value} submitted")

    async def _flush(self, key: int) -> None:
        await super()._flush(key)
        self._at("batch on disk")

    async def _end(self, *args: Any) -> None:
        self._at("end not recorded")
        await super()._end(*args)
        self._at("end recorded")


# --- the shop -----------------------------------------------------------------------------------


def open_shop(path: str | Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, timeout=30)
    # A killed process loses nothing of what it has committed; only a power cut would.
    connection.execute("PRAGMA synchronous = OFF")
    return connection


def make_shop(path: str | Path) -> None:
    with closing(open_shop(path)) as connection:
        connection.executescript(
            f"""
            PRAGMA journal_mode = WAL;
            CREATE TABLE stock (pieces INTEGER NOT NULL);
            INSERT INTO stock VALUES ({STOCK});
            CREATE TABLE effects (
                key TEXT PRIMARY KEY, run_id TEXT, name TEXT, price INTEGER, standing INTEGER
            );
            CREATE TABLE attempts (
                id INTEGER PRIMARY KEY, moment TEXT, kind TEXT, run_id TEXT, path TEXT, name TEXT
            );
            """
        )


class Shop:
    """Actions and compensations: real, under idempotency keys, each attempt at one written down."""

    def __init__(self, path: str, at: Callable[[str], None], draws: random.Random) -> None:
        self.database = open_shop(path)
        self.at = at
        self.draws = draws
        self.hold_at = ""
        self.go_on: anyio.Event | None = None

    def write_down(self, moment: str, effect: Effect) -> None:
        self.database.execute(
            "INSERT INTO attempts (moment, kind, run_id, path, name) VALUES (?, ?, ?, ?, ?)",
            (moment, effect.kind, effect.run_id, ".".join(map(str, effect.path)), effect.name),
        )

    async def passes(self, moment: str, effect: Effect) -> None:
        """Comes to a boundary, after which others may go first."""
        name = f"{effect.kind} {effect.name} {moment}"
        self.at(name)
        if name == self.hold_at:
            say("holding", effect.run_id)
            await self.hold()
        await self.let_others(4)

    async def hold(self) -> None:
        if self.go_on is None:
            self.go_on = anyio.Event()
            await anyio.to_thread.run_sync(sys.stdin.readline)
            self.go_on.set()
        await self.go_on.wait()

    async def let_others(self, turns: int) -> None:
        """Lets others go first, as often as is drawn."""
        for _ in range(self.draws.randrange(turns)):
            await checkpoint()

    async def take(self, name: str, price: int | None = None) -> Receipt:
        effect = current_effect()
        assert effect is not None
        self.write_down("begun", effect)
        await self.passes("begun", effect)
        self.database.execute("BEGIN IMMEDIATE")
        price = self.draws.randrange(1, 10**6) if price is None else price
        self.database.execute(
            "INSERT INTO effects VALUES (?, ?, ?, ?, 1) ON CONFLICT DO NOTHING",
            (effect.key, effect.run_id, name, price),
        )
        taken = self.database.execute("SELECT changes()").fetchone()[0]
        self.database.execute("UPDATE stock SET pieces = pieces - ?", (taken,))
        (price,) = self.database.execute(
            "SELECT price FROM effects WHERE key = ?", (effect.key,)
        ).fetchone()
        self.write_down("made", effect)
        self.database.execute("COMMIT")
        await self.passes("made", effect)
        assert price is not None
        return Receipt(name, price)

    async def give_back(self, *_: object) -> None:
        effect = current_effect()
        assert effect is not None
        self.write_down("begun", effect)
        await self.passes("begun", effect)
        self.database.execute("BEGIN IMMEDIATE")
        given = self.database.execute(
            "UPDATE effects SET standing = 0 WHERE key = ? AND standing = 1", (effect.action_key,)
        ).rowcount
        self.database.execute("UPDATE stock SET pieces = pieces + ?", (given,))
        self.write_down("made", effect)
        self.database.execute("COMMIT")
        await self.passes("made", effect)

    async def watch(self, effect: Effect, call_next: Callable[[], Any]) -> object:
        """The middleware of each saga: stands between the journal and what runs."""
        self.at(f"{effect.kind} starts")
        result = await call_next()
        self.at(f"{effect.kind} ends")
        return result


# --- the sagas ----------------------------------------------------------------------------------


def sagas(shop: Shop) -> dict[str, Saga[..., Any]]:
    async def refuse(order: Order) -> None:
        shop.at("refusing")
        raise Refused("no")

    def part(name: str) -> Step[..., Receipt]:
        async def action(order: Order) -> Receipt:
            return await shop.take(name)

        return Step(action, shop.give_back, name=name)

    def called(name: str, price: int | None = None) -> tuple[Step[..., Receipt], str, int | None]:
        return Step(shop.take, shop.give_back, name=name), name, price

    branches = Parallel(
        part("b"),
        Saga([part("c"), Parallel(part("d"), part("e"), name="inner"), part("f")], name="branch"),
        Parallel(part("g"), Saga([part("h"), part("i")], name="twig"), name="other"),
        name="branches",
    )

    @saga(name="function", middleware=[shop.watch])
    async def function(scope: SagaScope, order: Order) -> int:
        total = 0
        for number in range(order.parcels):
            receipt = await scope.step(*called(f"parcel {number}"))
            total += receipt.price
            if receipt.price % 2:
                total += (await scope.step(*called(f"odd {number}"))).price
        first, second = await scope.parallel(
            Step(shop.take, shop.give_back, name="left").bind("left"),
            Step(shop.take, shop.give_back, name="right").bind("right"),
        )
        total += first.price + second.price
        await scope.step(*called("pay", total))
        return total

    @saga(name="detour", middleware=[shop.watch])
    async def detour(scope: SagaScope, order: Order) -> str:
        await scope.step(*called("a"))
        try:
            async with scope.nested() as nested:
                await nested.step(*called("b"))
                await nested.step(*called("c"))
                await nested.step(Step(refuse, shop.give_back), order)
        except Refused:
            await scope.step(*called("d"))
        await scope.step(*called("e"))
        return "by the other way"

    watched = {"middleware": [shop.watch]}
    return {
        "sequence": Saga([part(name) for name in "abcdef"], name="sequence", **watched),
        "parallel": Saga([part("a"), branches, part("j")], name="parallel", **watched),
        "function": function,
        "detour": detour,
        "commit": Saga(
            [part("a"), part("b"), Commit(), part("c"), Parallel(part("d"), part("e"))],
            name="commit",
            **watched,
        ),
        "rollback": Saga(
            [
                part("a"),
                Parallel(part("b"), part("c"), name="pair"),
                part("d"),
                Step(refuse, shop.give_back),
            ],
            name="rollback",
            **watched,
        ),
    }


# --- the process --------------------------------------------------------------------------------


async def run(
    journal: SQLiteJournal, shop: Shop, definition: Saga[..., Any], run_id: str, on_crash: Any
) -> str:
    await shop.let_others(10)
    try:
        outcome = await journal.run(definition, Order(parcels=3), run_id=run_id, on_crash=on_crash)
    except Exception as error:
        say("refused", run_id, type(error).__name__)
        return type(error).__name__
    return outcome.state.name


async def main(orders: Orders) -> None:
    at = Boundaries(orders.kill_at)
    shop = Shop(orders.shop, at, random.Random(orders.seed))
    shop.hold_at = orders.hold_at
    known = sagas(shop)
    results: dict[str, str] = {}
    report: dict[str, Any] = {"results": results}
    if orders.wait_for_start:
        say("ready")
        await anyio.to_thread.run_sync(sys.stdin.readline)
    say("begun")
    async with WatchedJournal(orders.journal, at) as journal:
        run_ids = orders.run_ids
        if orders.task != "run":
            recovery = await journal.recover(known.values(), on_crash=orders.on_crash)
            report |= {
                "recovered": sorted(one.run_id for one in recovery.recovered),
                "in_progress": sorted(recovery.in_progress),
                "trouble": [repr(one) for one in (*recovery.failed, *recovery.left)],
            }
            run_ids = []
        if orders.task == "settle":
            again = await journal.recover(known.values())
            report["trouble"] += [repr(one) for one in (again.recovered, again.in_progress) if one]
            run_ids = [info.run_id for info in await journal.runs()]

        async def note(run_id: str) -> None:
            results[run_id] = await run(journal, shop, known[orders.saga], run_id, orders.on_crash)

        async with anyio.create_task_group() as tasks:
            for run_id in run_ids:
                tasks.start_soon(note, run_id)
    shop.database.close()
    report["passed"] = at.passed
    say(json.dumps(report))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    given = Orders(**json.loads(sys.argv[1]))
    anyio.run(partial(main, given), backend=given.backend)
