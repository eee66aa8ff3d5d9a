"""A saga against a real database: run it, break it, interrupt it, and see everything restored.

``python -m pysagas`` places an order in a small shop: a SQLite file, a directory of invoices, and a
warehouse that is told of orders over HTTP. No transaction covers all three; the saga does.

Read it from the top: the shop, the steps, the saga, the printing, the command line. It uses nothing
of pysagas but its public names.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import signal
import sqlite3
import sys
import time
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from secrets import token_hex
from socketserver import TCPServer
from tempfile import TemporaryDirectory
from threading import Thread
from typing import NoReturn, cast

import anyio

from pysagas import (
    CallNext,
    Commit,
    CompensationFailed,
    Effect,
    Middleware,
    Outcome,
    Parallel,
    Saga,
    SagaState,
    Step,
    StepState,
    current_effect,
    observer,
    outcome_of,
)

__all__ = ["main"]

COMPLETED, ROLLED_BACK, NOT_RESTORED, BAD_USAGE = 0, 1, 2, 64

# --- the shop -----------------------------------------------------------------------------------

# Stands in the header of a shop's file, so that no other database is taken for one.
APPLICATION_ID = 0x73686F70

SCHEMA = (
    f"PRAGMA application_id = {APPLICATION_ID}",
    "CREATE TABLE stock (item TEXT PRIMARY KEY, quantity INTEGER CHECK (quantity >= 0))",
    "CREATE TABLE accounts (name TEXT PRIMARY KEY, balance INTEGER CHECK (balance >= 0))",
    "CREATE TABLE shipments (order_id TEXT PRIMARY KEY, state TEXT)",
    "CREATE TABLE applied (key TEXT PRIMARY KEY)",
    "INSERT INTO stock VALUES ('lamp', 5)",
    "INSERT INTO accounts VALUES ('ada', 100)",
)


@dataclass(frozen=True, slots=True)
class Order:
    """What is ordered, by whom, at what price."""

    id: str
    item: str = "lamp"
    quantity: int = 1
    customer: str = "ada"
    price: int = 40


@dataclass(frozen=True, slots=True)
class Shop:
    """Where everything is, and how the demo is to go.

    Attributes:
        database: The SQLite file.
        invoices: The directory of the invoices.
        port: The warehouse's, on 127.0.0.1.
        pace: Seconds that a step takes, and that a compensation waits before its work.
        fail: The step that is to fail.
        fail_compensation: The step whose compensation is to fail.
    """

    database: Path
    invoices: Path
    port: int
    pace: float
    fail: str | None
    fail_compensation: str | None

    @contextmanager
    def transaction(self) -> Generator[sqlite3.Connection]:
        """Opens the database: what the block executes is applied whole or not at all."""
        with closing(sqlite3.connect(self.database)) as connection, connection:
            yield connection


class Warehouse(TCPServer):
    """The HTTP endpoint: a set of the orders it was told of, for as long as the demo runs.

    It serves one request at a time, in the order in which clients connected. So the DELETE that
    takes back a POST cannot overtake it, even if the POST's client was cancelled and has gone.
    """

    def __init__(self) -> None:
        self.orders: set[str] = set()
        super().__init__(("127.0.0.1", 0), WarehouseRequest)

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing: a client that was cancelled has hung up."""


class WarehouseRequest(BaseHTTPRequestHandler):
    """``POST /orders/ID``, ``DELETE /orders/ID``, and GET for a list."""

    timeout = 5  # seconds, for a client that connects and says nothing

    @property
    def orders(self) -> set[str]:
        assert isinstance(self.server, Warehouse)
        return self.server.orders

    def do_POST(self) -> None:
        self.orders.add(self.path.rpartition("/")[2])
        self.answer(201)

    def do_DELETE(self) -> None:
        # Fine if it is not there: the compensation of a POST that never arrived must not fail.
        self.orders.discard(self.path.rpartition("/")[2])
        self.answer(204)

    def do_GET(self) -> None:
        self.answer(200, json.dumps(sorted(self.orders)).encode())

    def answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: the demo prints what happens."""


# --- the steps, each followed by what takes it back ---------------------------------------------
#
# A compensation gets what its action got, and nobody may know how far the action came. So each one
# does nothing where there is nothing to take back. A balance cannot tell whether it was changed:
# there, the action's idempotency key is written in the same transaction, and deleted with it.
#
# The transactions and the file take a millisecond and run inline. Slow ones would be sync functions
# and steps with `blocking=True`: in a thread, and waited for.


def action_key() -> str:
    """The idempotency key of the action: the same in the action and in its compensation."""
    effect = current_effect()
    assert effect is not None
    return effect.action_key or effect.key


def apply_once(shop: Shop, sql: str, *values: object) -> None:
    with shop.transaction() as database:
        if database.execute("INSERT OR IGNORE INTO applied VALUES (?)", [action_key()]).rowcount:
            database.execute(sql, values)


def take_back(shop: Shop, sql: str, *values: object) -> None:
    with shop.transaction() as database:
        if database.execute("DELETE FROM applied WHERE key = ?", [action_key()]).rowcount:
            database.execute(sql, values)


async def reserve_stock(shop: Shop, order: Order) -> None:
    sql = "UPDATE stock SET quantity = quantity - ? WHERE item = ?"
    apply_once(shop, sql, order.quantity, order.item)


async def release_stock(shop: Shop, order: Order) -> None:
    sql = "UPDATE stock SET quantity = quantity + ? WHERE item = ?"
    take_back(shop, sql, order.quantity, order.item)


async def charge_account(shop: Shop, order: Order) -> None:
    sql = "UPDATE accounts SET balance = balance - ? WHERE name = ?"
    apply_once(shop, sql, order.price * order.quantity, order.customer)


async def refund_account(shop: Shop, order: Order) -> None:
    sql = "UPDATE accounts SET balance = balance + ? WHERE name = ?"
    take_back(shop, sql, order.price * order.quantity, order.customer)


async def book_courier(shop: Shop, order: Order) -> None:
    with shop.transaction() as database:
        database.execute("INSERT OR REPLACE INTO shipments VALUES (?, 'booked')", [order.id])


async def cancel_courier(shop: Shop, order: Order) -> None:
    with shop.transaction() as database:
        database.execute("DELETE FROM shipments WHERE order_id = ?", [order.id])


def invoice(shop: Shop, order: Order) -> Path:
    return shop.invoices / f"{order.id}.txt"


async def write_invoice(shop: Shop, order: Order) -> None:
    total = order.price * order.quantity
    invoice(shop, order).write_text(f"{order.quantity} {order.item} for {order.customer}, {total}\n")


async def delete_invoice(shop: Shop, order: Order) -> None:
    invoice(shop, order).unlink(missing_ok=True)


async def notify_warehouse(shop: Shop, order: Order) -> None:
    await request(shop, "POST", f"/orders/{order.id}")


async def recall_order(shop: Shop, order: Order) -> None:
    await request(shop, "DELETE", f"/orders/{order.id}")


async def request(shop: Shop, method: str, path: str) -> None:
    """Sends an HTTP request. Where this is cancelled, the request may have arrived or not."""
    async with await anyio.connect_tcp("127.0.0.1", shop.port) as stream:
        await stream.send(f"{method} {path} HTTP/1.0\r\n\r\n".encode())
        answer = b"".join([chunk async for chunk in stream])
    status = answer.partition(b"\r\n")[0].decode()
    if " 20" not in status:
        raise ConnectionError(f"{method} {path}: {status or 'no answer'}")


async def confirm(shop: Shop, order: Order) -> None:
    with shop.transaction() as database:
        database.execute("UPDATE shipments SET state = 'confirmed' WHERE order_id = ?", [order.id])


async def withdraw_confirmation(shop: Shop, order: Order) -> None:
    with shop.transaction() as database:
        database.execute("UPDATE shipments SET state = 'booked' WHERE order_id = ?", [order.id])


# --- the saga -----------------------------------------------------------------------------------

Work = Callable[[Shop, Order], Awaitable[None]]

# What the database raises instead of letting a number fall below zero: then nothing was changed.
REFUSED = sqlite3.IntegrityError


class ToldToFail(Exception):
    """What ``--fail`` and ``--fail-compensation`` ask for."""


def step(
    name: str,
    action: Work,
    compensation: Work,
    *,
    takes: float = 1,
    not_applied: type[Exception] | tuple[type[Exception], ...] = (),
) -> Step[[Shop, Order], None]:
    """A `Step` that takes its time, to be interrupted in, and fails where it was told to.

    It fails after its work, which is the harder case: all that the saga knows is that it raised.
    """

    async def act(shop: Shop, order: Order) -> None:
        await anyio.sleep(shop.pace * takes / 2)
        await action(shop, order)
        await anyio.sleep(shop.pace * takes / 2)
        if shop.fail == name:
            raise ToldToFail("after its work was done")

    async def compensate(shop: Shop, order: Order) -> None:
        await anyio.sleep(shop.pace)
        if shop.fail_compensation == name:
            raise ToldToFail("before anything was taken back")
        await compensation(shop, order)

    return Step(act, compensate, name=name, not_applied=not_applied)


ORDER = (
    step("reserve-stock", reserve_stock, release_stock, not_applied=REFUSED),
    step("charge-account", charge_account, refund_account, not_applied=REFUSED),
    Parallel(
        step("book-courier", book_courier, cancel_courier),
        step("write-invoice", write_invoice, delete_invoice, takes=1.5),
        step("notify-warehouse", notify_warehouse, recall_order, takes=2),
        name="delivery",
    ),
    Commit(),
    step("confirm", confirm, withdraw_confirmation),
)

LAST_BEFORE_COMMIT, AFTER_COMMIT = "notify-warehouse", "confirm"
STEPS = (
    "reserve-stock",
    "charge-account",
    "book-courier",
    "write-invoice",
    LAST_BEFORE_COMMIT,
    AFTER_COMMIT,
)


async def place_order(
    shop: Shop, order: Order, cancel_after: float, outcomes: list[Outcome[object]]
) -> None:
    """Runs the saga, and leaves its outcome in `outcomes`, in whatever way the run ends."""
    saga = Saga(ORDER, name="order", middleware=[progress()])
    with anyio.move_on_after(cancel_after):
        try:
            # Every failure is expected here: taken back, it is an outcome like another.
            outcomes.append(await saga.run(shop, order, exceptions=Exception))
        except BaseException as error:
            outcome = outcome_of(error)
            if outcome is not None:
                outcomes.append(outcome)
            # A failure is in the outcome; a cancellation belongs to whoever cancelled.
            if outcome is None or not isinstance(error, Exception):
                raise


# --- the printing -------------------------------------------------------------------------------

State = Mapping[str, Sequence[str]]

# How each kind of effect begins, ends and fails.
WORDS = {
    "saga": ("start", "done", "failed"),
    "group": ("start", "done", "failed"),
    "action": ("start", "done", "failed"),
    "commit": ("commit", "committed", "failed"),
    "rollback": ("roll back", "rolled back", "failed"),
    "compensation": ("take back", "compensated", "NOT compensated"),
}


def progress() -> Middleware:
    """Makes the middleware that prints each effect as it happens."""
    begun = time.monotonic()

    def say(word: str, effect: Effect, reason: str = "") -> None:
        print(f"{time.monotonic() - begun:5.2f} s  {word:<15}  {effect.name}{reason}", flush=True)

    async def tell(effect: Effect, call_next: CallNext) -> object:
        begins, ends, fails = WORDS[effect.kind]
        try:
            say(begins, effect)
            result = await call_next()
        except Exception as error:
            say(fails, effect, f" ({describe(error)})")
            raise
        except BaseException:
            say("cut off", effect)
            raise
        say(ends, effect)
        return result

    return observer(tell)


def describe(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        return ", ".join(map(describe, group.exceptions))
    if isinstance(error, CompensationFailed) and error.error is not None:
        return describe(error.error)
    if isinstance(error, Exception):
        return f"{type(error).__name__}: {error}"
    return "cut off"


def look(shop: Shop) -> State:
    """Reads everything that the saga changes, from where it really is."""
    found: dict[str, list[str]] = {}
    with shop.transaction() as database:
        for table in ("stock", "accounts", "shipments", "applied"):
            rows = database.execute(f"SELECT * FROM {table} ORDER BY 1")  # noqa: S608 - ours
            found[table] = [" ".join(map(str, row)) for row in rows]
    files = sorted(shop.invoices.glob("*.txt"))
    found["invoices"] = [f"{file.name}: {file.read_text().strip()}" for file in files]
    with closing(http.client.HTTPConnection("127.0.0.1", shop.port, timeout=5)) as client:
        client.request("GET", "/orders")
        found["warehouse"] = json.loads(client.getresponse().read())
    return found


def show(before: State, after: State) -> None:
    width = max(len(row) for rows in before.values() for row in ("before", *rows))
    print(f"\n{'':9}  {'before':<{width}}  after")
    for name in before:
        label = name
        for left, right in zip_longest(before[name] or ["-"], after[name] or ["-"], fillvalue=""):
            print(f"{label:<9}  {left:<{width}}  {right}".rstrip())
            label = ""
    print()


def conclude(outcome: Outcome[object] | None, before: State, after: State) -> int:
    """Says how the run ended, checks that against what is there, and gives the exit status."""
    if outcome is None:
        print("The run was ended before it could report.")
    elif outcome.error is None:
        print("Completed: the order is placed.")
        return COMPLETED
    else:
        print(f"Not completed ({outcome.state.value}): {describe(outcome.error)}.")
        for report in outcome.steps:
            if report.state is StepState.COMPENSATION_FAILED:
                assert report.compensation_error is not None
                why = describe(report.compensation_error)
                print(f"The compensation of {report.name} did not end: {why}.")
        stays = [report.name for report in outcome.steps if report.state is StepState.COMPLETED]
        if stays:
            print(f"It had passed its commit, so this stays done: {', '.join(stays)}.")
            print("Only what came after the commit was to be taken back.")
    changed = [name for name in before if before[name] != after[name]]
    if changed:
        print(f"NOT RESTORED: {', '.join(changed)} differ from before.")
        return NOT_RESTORED
    print("Restored: the tables, the files and the endpoint are what they were before.")
    if outcome is not None and outcome.state is SagaState.FAILED:
        print("But the saga could not know: somebody would have had to look.")
        return NOT_RESTORED
    return ROLLED_BACK


# --- the command line ---------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser that ends with the status which sysexits.h has for a bad command line."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(BAD_USAGE, f"{self.prog}: error: {message}\n")


def seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError(text)
    return value


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m pysagas",
        description="Places an order in a small shop: a SQLite database, invoice files and an HTTP "
        "endpoint, changed by one saga. Break it with the options, or press Ctrl-C.",
        epilog=f"STEP is one of: {', '.join(STEPS)}. Exit status: {COMPLETED} completed, "
        f"{ROLLED_BACK} rolled back, {NOT_RESTORED} not restored (a compensation failed or was cut "
        f"off, or the commit had been passed), {BAD_USAGE} bad usage.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--fail", choices=STEPS, metavar="STEP", help="a step that fails, after its work was done")
    add(
        "--fail-compensation",
        choices=STEPS,
        metavar="STEP",
        help="a step whose compensation fails. Without --fail or --cancel-after there must be "
        f"something to roll back, so {LAST_BEFORE_COMMIT} fails too, the last step before the commit; "
        f"or {AFTER_COMMIT}, where that is STEP",
    )
    add("--cancel-after", type=seconds, metavar="SECONDS", help="cancel the saga from outside")
    add("--backend", choices=("asyncio", "trio"), default="asyncio", help="default: asyncio")
    add(
        "--database",
        type=Path,
        metavar="PATH",
        help="the shop's SQLite file, made if it is new; kept, as are the invoices, in the directory "
        "PATH-invoices. Default: a temporary one",
    )
    add(
        "--pace",
        type=seconds,
        default=0.12,
        metavar="SECONDS",
        help="what a step takes; with 2 there is time to press Ctrl-C. Default: 0.12",
    )
    return parser


class NotAShop(Exception):
    """The path given cannot be used as a shop's database; what was there is as it was."""


def make_tables(path: Path) -> None:
    """Makes the tables in a new file; leaves a shop's as they are, and refuses all else."""
    with closing(sqlite3.connect(path, timeout=1)) as database, database:
        # At once, so that a file that cannot be written is found here and not by the saga.
        database.execute("BEGIN IMMEDIATE")
        if not database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            for statement in SCHEMA:
                database.execute(statement)
        elif database.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise NotAShop(f"{path} is the database of something else")


@contextmanager
def open_shop(path: Path | None) -> Generator[tuple[Path, Path, int]]:
    """Opens the shop at `path`, or a temporary one, and its warehouse; closes them in the end.

    Yields:
        The database, the directory of the invoices, and the port of the warehouse.

    Raises:
        NotAShop: The path cannot be used.
    """
    with ExitStack() as stack:
        if path is None:
            path = Path(stack.enter_context(TemporaryDirectory(prefix="pysagas-"))) / "shop.db"
        path = path.absolute()  # so that :memory: is a file like any other
        invoices = path.with_name(f"{path.name}-invoices")
        try:
            make_tables(path)
            invoices.mkdir(exist_ok=True)
        except (OSError, sqlite3.Error) as error:
            raise NotAShop(f"{path} cannot be used as the shop's database: {error}") from error
        warehouse = stack.enter_context(Warehouse())
        # A daemon: Ctrl-C may come between any two lines here, and must not leave us waiting for it.
        Thread(target=warehouse.serve_forever, args=(0.02,), daemon=True).start()
        stack.callback(warehouse.shutdown)
        yield path, invoices, warehouse.server_address[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo.

    Args:
        arguments: Those of the command line; None: the process's own.

    Returns:
        The exit status: 0 completed, 1 rolled back, 2 not restored.

    Raises:
        SystemExit: With 64, for a command line that cannot work; with 0, for ``--help``.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.backend == "trio" and find_spec("trio") is None:
        parser.error('--backend trio needs Trio, which is not installed: pip install "pysagas[trio]"')
    fail, unrepairable = options.fail, options.fail_compensation
    cancel_after = math.inf if options.cancel_after is None else options.cancel_after
    if unrepairable is not None and fail is None and options.cancel_after is None:
        fail = AFTER_COMMIT if unrepairable == AFTER_COMMIT else LAST_BEFORE_COMMIT
    outcomes: list[Outcome[object]] = []
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    try:
        with open_shop(options.database) as (database, invoices, port):
            shop = Shop(database, invoices, port, options.pace, fail, unrepairable)
            before = look(shop)
            run = partial(place_order, shop, Order(token_hex(4)), cancel_after, outcomes)
            with suppress(KeyboardInterrupt):  # its outcome is there all the same
                anyio.run(run, backend=options.backend)
            # What is left takes a moment, and is what somebody impatient wants to know.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            after = look(shop)
            show(before, after)
            return conclude(outcomes[0] if outcomes else None, before, after)
    except NotAShop as error:
        parser.error(str(error))
    finally:
        signal.signal(signal.SIGINT, on_ctrl_c)
