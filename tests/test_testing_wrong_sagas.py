"""Sagas written wrong, in the ways in which people get them wrong: `explore` finds each, and names the place."""

from __future__ import annotations

import http.client
import shutil
from collections.abc import Callable
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from anyio.lowlevel import checkpoint
from conftest import WITHOUT_DEBUG
from helpers import on_asyncio

from pysagas import Parallel, Saga, SagaScope, Step, _demo, saga
from pysagas.testing import FaultKind, Report, Trial, explore

pytestmark = pytest.mark.anyio


class Shop:
    """A small world: what a shop's services keep."""

    def __init__(self) -> None:
        self.stock = {"lamp": 5}
        self.price = {"lamp": 40}
        self.charged: dict[str, int] = {}
        self.bookings: set[str] = set()

    def state(self) -> dict[str, Any]:
        return vars(self)

    def trial(self, tested: Saga[..., Any]) -> Trial:
        return Trial(tested, state=self.state)


async def charge(shop: Shop) -> None:
    """The right one of the steps here: idempotent, and taken back whatever happened."""
    await checkpoint()
    shop.charged["order"] = 40
    await checkpoint()


async def refund(shop: Shop) -> None:
    shop.charged.pop("order", None)


def found(report: Report) -> set[str]:
    """Gives the faults that alone do harm, as a person reads them."""
    return {str(result.plan) for result in report.failures}


# --- sagas as data --------------------------------------------------------------------------------


async def test_a_compensation_that_assumes_completion():
    """It puts back what was never taken."""

    def trial() -> Trial:
        shop = Shop()

        async def take_from_stock() -> None:
            await checkpoint()
            shop.stock["lamp"] -= 1

        async def put_back() -> None:
            shop.stock["lamp"] += 1

        return shop.trial(Saga([Step(take_from_stock, put_back)]))

    report = await explore(trial)

    assert {"take_from_stock: fails before its effect"} <= found(report)
    assert {"take_from_stock: cancelled at checkpoint 1"} <= found(report)
    assert "stock['lamp']: was 5, is 6" in str(report)


async def test_an_undo_that_is_not_idempotent():
    """Asked twice, it gives back twice."""

    def trial() -> Trial:
        shop = Shop()

        async def take_from_stock() -> int:
            before = shop.stock["lamp"]
            shop.stock["lamp"] = 4
            return before - 4

        async def put_back(number: int) -> None:
            shop.stock["lamp"] += number

        saga = Saga(
            [Step(partial(charge, shop), partial(refund, shop)), Step(take_from_stock, undo=put_back)]
        )
        return shop.trial(saga)

    report = await explore(trial)

    assert {"taking back take_from_stock: runs twice"} <= found(report)
    # And an undo cannot run for an action whose answer is lost.
    lost = next(one for one in report.failures if one.plan.faults[0].kind is FaultKind.FAILS_AFTER)
    assert lost.plan.faults[0].place.name == "take_from_stock"
    assert "in doubt, and not compensated: take_from_stock" in str(lost)
    assert not any("charge" in plan for plan in found(report))


async def test_an_effect_before_the_checkpoint():
    """It acts, waits, and only then notes that it has acted: what comes in between loses the effect."""

    def trial() -> Trial:
        shop = Shop()
        noted = []

        async def book() -> None:
            shop.bookings.add("room 7")
            await checkpoint()
            noted.append("room 7")

        async def cancel() -> None:
            for room in noted:
                shop.bookings.discard(room)

        return shop.trial(Saga([Step(book, cancel)]))

    report = await explore(trial)

    cancelled = {plan for plan in found(report) if "checkpoint" in plan}
    assert {"book: cancelled at checkpoint 1"} <= cancelled
    assert cancelled == found(report)
    assert "bookings: 'room 7' is left" in str(report)


async def test_compensating_by_a_value_read_too_late():
    """It puts back the price that it finds, which a later step has changed."""

    def trial() -> Trial:
        shop = Shop()
        old: dict[str, int] = {}

        async def set_price() -> None:
            await checkpoint()
            old.update(shop.price)
            shop.price["lamp"] = 30
            await checkpoint()

        async def reset_price() -> None:
            shop.price.update(old)

        async def round_prices() -> None:
            old.update({item: price // 20 * 20 for item, price in shop.price.items()})
            shop.price.update(old)
            await checkpoint()

        async def leave_rounded() -> None:
            await checkpoint()

        return shop.trial(Saga([Step(set_price, reset_price), Step(round_prices, leave_rounded)]))

    report = await explore(trial)

    assert "no fault, taken back at its end" in found(report)
    assert any(plan.startswith("round_prices") for plan in found(report))
    assert not {"set_price: fails after its effect"} & found(report)
    assert "price['lamp']: was 40, is 20" in str(report)


async def test_a_sibling_whose_effect_is_not_taken_back():
    """One member's compensation is thought to take back its sibling's effect as well; it may not run."""

    class NoRooms(Exception):
        """Declines: nothing was booked."""

    def trial() -> Trial:
        shop = Shop()

        async def book_room() -> None:
            await checkpoint()
            shop.bookings.add("room")

        async def cancel_both() -> None:
            shop.bookings.difference_update({"room", "breakfast"})

        async def book_breakfast() -> None:
            shop.bookings.add("breakfast")
            await checkpoint()

        group = Parallel(Step(book_breakfast), Step(book_room, cancel_both, not_applied=NoRooms))
        return shop.trial(Saga([group]))

    report = await explore(trial)

    assert {"book_room: declines with NoRooms"} == found(report)
    assert "bookings: 'breakfast' is left" in str(report)


# --- sagas as functions ---------------------------------------------------------------------------


async def test_an_effect_outside_of_every_step():
    """A function that acts between its steps, where nothing takes that back."""

    def trial() -> Trial:
        shop = Shop()

        @saga
        async def order(scope: SagaScope) -> None:
            await scope.step(charge, shop, compensation=refund)
            shop.bookings.add("courier")

        return shop.trial(order)

    report = await explore(trial)

    assert "no fault, taken back at its end" in found(report)
    assert "bookings: 'courier' is left" in str(report)


async def test_an_action_that_swallows_its_cancellation():
    """It takes a cancellation for a failure of the service, and goes on."""

    def trial() -> Trial:
        shop = Shop()

        async def book() -> None:
            try:
                await checkpoint()
            except BaseException:
                pass
            shop.bookings.add("room")

        async def cancel() -> None:
            shop.bookings.discard("room")

        return shop.trial(Saga([Step(book, cancel)]))

    report = await explore(trial)

    # A cancelled scope is met at the run's next checkpoint; a task is cancelled once.
    natively = {"book: cancelled natively at checkpoint 1"} if on_asyncio() else set()
    assert found(report) == natively
    assert all("the cancellation was swallowed" in str(result) for result in report.failures)


async def test_a_loop_that_takes_back_the_wrong_one():
    """Closures over the variable of a loop: each compensation takes back the last one."""

    def trial() -> Trial:
        shop = Shop()

        @saga
        async def order(scope: SagaScope) -> None:
            for room in ("one", "two"):

                async def book() -> None:
                    shop.bookings.add(room)
                    await checkpoint()

                async def cancel() -> None:
                    shop.bookings.discard(room)

                await scope.step(book, compensation=cancel)

        return shop.trial(order)

    report = await explore(trial)

    assert "no fault, taken back at its end" in found(report)
    assert "bookings: 'one' is left" in str(report)
    assert {"book at 1: fails after its effect", "book at 1: cancelled at checkpoint 1"} <= found(
        report
    )
    assert not {"book at 0: fails after its effect", "book at 0: cancelled at checkpoint 1"} & found(
        report
    )


async def test_what_is_done_twice_when_it_is_tried_again():
    """A retry of an action that is not idempotent: the answer was lost, and the card is charged again."""

    async def three_times(attempt: Callable[[], Any]) -> Any:
        for _ in range(2):
            try:
                return await attempt()
            except Exception:
                continue
        return await attempt()

    def trial() -> Trial:
        shop = Shop()
        key = []

        async def charge_again() -> str:
            key.append(len(key))
            shop.charged[f"charge {len(key)}"] = 40
            return f"charge {len(key)}"

        async def refund_all() -> None:
            shop.charged.clear()

        return shop.trial(Saga([Step(charge_again, refund_all, retry=three_times)]))

    report = await explore(trial)

    assert {
        "charge_again: fails once, after its effect",
        "charge_again: runs twice",
    } == found(report)
    assert "charged['charge 2']: was not there, is 40" in str(report)


# --- and a right one -------------------------------------------------------------------------------


@pytest.mark.parametrize("anyio_backend", WITHOUT_DEBUG, indirect=True)
async def test_the_demo_is_right(tmp_path: Path):
    """The order that ``python -m pysagas`` places survives every fault, past its commit too."""
    with _demo.open_shop(tmp_path / "shop.db") as (empty, _, port):
        number = count()

        def trial() -> Trial:
            database = tmp_path / f"{next(number)}.db"
            shutil.copy(empty, database)
            shop = _demo.Shop(database, tmp_path / f"{database}-invoices", port, 0, None, None)
            shop.invoices.mkdir()
            with closing(http.client.HTTPConnection("127.0.0.1", port)) as warehouse:
                warehouse.request("DELETE", "/orders/1")  # what the last run left, past its commit
                warehouse.getresponse().read()

            def state() -> dict[str, Any]:
                # Without the keys of what was applied: they are those of the run, new in each.
                return {**_demo.look(shop), "applied": None}

            return Trial(Saga(_demo.ORDER, name="order"), (shop, _demo.Order("1")), state=state)

        report = await explore(trial)

    assert report.ok, report
    assert {result.plan.commits for result in report.results} == {0, 1}
    tried = {fault.place.name for result in report.results for fault in result.plan.faults}
    assert tried == set(_demo.STEPS)
    assert report.notes == ()
