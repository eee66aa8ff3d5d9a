"""The order: its steps, each followed by what takes it back, and the saga, as data and as a function."""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from threading import RLock
from typing import Any, TextIO, cast

import anyio

from pysagas import (
    CallNext,
    Commit,
    CompensationFailed,
    Effect,
    Middleware,
    Parallel,
    Saga,
    SagaScope,
    Step,
    current_effect,
    observer,
    saga,
)

from ._shop import Order, Shop, open_shop

__all__ = [
    "AFTER_COMMIT",
    "LAST_BEFORE_COMMIT",
    "ORDER",
    "STEPS",
    "app",
    "describe",
    "order_saga",
    "progress",
]

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

    It fails, or is killed, after its work, which is the harder case: all that the saga knows is
    that it raised, and all that a journal knows is that it started.
    """

    async def act(shop: Shop, order: Order) -> None:
        await anyio.sleep(shop.pace * takes / 2)
        await action(shop, order)
        if shop.crash == name:
            be_killed(shop, name)
        await anyio.sleep(shop.pace * takes / 2)
        if shop.fail == name:
            raise ToldToFail("after its work was done")

    async def compensate(shop: Shop, order: Order) -> None:
        await anyio.sleep(shop.pace)
        if shop.fail_compensation == name:
            raise ToldToFail("before anything was taken back")
        await compensation(shop, order)

    return Step(act, compensate, name=name, not_applied=not_applied)


def be_killed(shop: Shop, name: str) -> None:
    """Kills this process, as ``kill -9`` does: no exception, no compensation, no last word after it."""
    # Below the tree on a terminal, of which the last line is not ended; above it lines are wrapped.
    is_terminal = sys.stdout.isatty()
    out = sys.__stdout__ if is_terminal else sys.stdout
    with DRAWING:
        print("\n" if is_terminal else "", file=out)
        print(f"Killed: the work of {name} is done, and that is not recorded. Now try:\n", file=out)
        print(f"  pysagas list --journal {shop.journal}", file=out)
        print(f"  pysagas recover --journal {shop.journal} --app pysagas.demo:app", file=out)
        print(f"  pysagas demo --journal {shop.journal} --look", file=out, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


RESERVE = step("reserve-stock", reserve_stock, release_stock, not_applied=REFUSED)
CHARGE = step("charge-account", charge_account, refund_account, not_applied=REFUSED)
DELIVERY = (
    step("book-courier", book_courier, cancel_courier),
    step("write-invoice", write_invoice, delete_invoice, takes=1.5),
    step("notify-warehouse", notify_warehouse, recall_order, takes=2),
)
CONFIRM = step("confirm", confirm, withdraw_confirmation)

# As data: every step gets the same arguments.
ORDER = (RESERVE, CHARGE, Parallel(*DELIVERY, name="delivery"), Commit(), CONFIRM)

LAST_BEFORE_COMMIT, AFTER_COMMIT = "notify-warehouse", "confirm"
STEPS = (
    "reserve-stock",
    "charge-account",
    "book-courier",
    "write-invoice",
    LAST_BEFORE_COMMIT,
    AFTER_COMMIT,
)


def order_saga(shop_at: Callable[[str], Shop]) -> Saga[[str, Order], None]:
    """Makes the same saga as a function, for a journal.

    A journal records the arguments of a saga, as JSON. An open shop cannot be recorded, and its
    warehouse has another port in the next process; its path can. So that is the argument, and the
    function gets at the shop by itself, each time that it is called.

    Args:
        shop_at: Gives the shop at a path, open.
    """

    @saga(name="order", middleware=[progress()])
    async def place(scope: SagaScope, path: str, order: Order) -> None:
        shop = shop_at(path)
        await scope.step(RESERVE, shop, order)
        await scope.step(CHARGE, shop, order)
        await scope.parallel(*(part.bind(shop, order) for part in DELIVERY), name="delivery")
        await scope.commit()
        await scope.step(CONFIRM, shop, order)

    return place


@contextmanager
def app() -> Generator[list[Saga[..., Any]]]:
    """Gives what ``pysagas recover --app pysagas.demo:app`` goes on with.

    The shops are opened when a run first asks for them, and stay open until all is done.
    """
    with ExitStack() as stack:
        shops: dict[str, Shop] = {}

        def shop_at(path: str) -> Shop:
            if path not in shops:
                shops[path] = Shop(*stack.enter_context(open_shop(Path(path))))
            return shops[path]

        yield [order_saga(shop_at)]


# --- what it says meanwhile ---------------------------------------------------------------------

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
    """Makes the middleware that shows each effect as it happens: a tree, if there is a terminal."""
    if sys.stdout.isatty() and find_spec("rich") is not None:
        from rich.console import Console  # noqa: PLC0415 - an extra

        from pysagas.observe.progress import show_progress  # noqa: PLC0415 - needs the extra

        return show_progress(Console(file=cast("TextIO", Terminal(sys.stdout))))
    return lines()


# Held while the tree is drawn, which a thread does, and by who writes below it: drawn once more, the
# tree would be drawn over that.
DRAWING = RLock()


class Terminal:
    """What the tree is drawn on."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        with DRAWING:
            return self._file.write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


def lines() -> Middleware:
    """Makes the middleware that prints a line where an effect begins, and one where it ends."""
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
