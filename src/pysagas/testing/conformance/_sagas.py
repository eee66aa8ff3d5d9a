"""The sagas of the checks. Constants of a module: any process can import them.

Their steps write what they do to a file, whose path travels as an argument together with what is to
go wrong. So the process that runs a saga, and the one that checks what came of it, may be different
ones; and the file outlives the first.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any
from uuid import UUID

import anyio

from pysagas import Commit, Effect, Parallel, Saga, SagaScope, Step, current_effect, saga

__all__ = [
    "SAGAS",
    "Broken",
    "Class",
    "Declined",
    "Order",
    "Receipt",
    "Refused",
    "all_states",
    "blocking",
    "changing",
    "committed",
    "detour",
    "finishing",
    "hurried",
    "hurrying",
    "in_order",
    "limited",
    "loop",
    "nested",
    "of_its_own",
    "pair",
    "rich",
    "rushed",
    "shielded",
    "trip",
    "unwritable",
    "values",
]

# Seconds between two looks for a file: nothing else is common to two processes on every system.
_LOOK = 0.005
# Seconds that a step takes which takes a while.
_NAP = 0.01


class Refused(Exception):
    """What a step raises that is to fail."""


class Broken(Exception):
    """What a step raises that is to fail otherwise."""


class Declined(Exception):
    """By this a step says that it did nothing."""


class Class(Enum):
    """Of a flight."""

    ECONOMY = "economy"
    FIRST = "first"


@dataclass(frozen=True)
class Order:
    """What every saga of the checks is called with.

    Attributes:
        log: The path of the file to which the steps write.
        faults: What is to go wrong: the place, ``"book hotel"``, ``"cancel hotel"``, or, when its
            effect is made, ``"after book hotel"``; and what: ``"fails"``, ``"breaks"`` (with another
            exception), ``"declines"``, ``"waits"`` until it is let go on, ``"naps"``, ``"hangs"``. Several, one
            after the other, with a space between.
        leaves: A value that JSON has no type for.
        price: Another one.
    """

    log: str
    faults: dict[str, str] = field(default_factory=dict[str, str])
    leaves: datetime = datetime(2026, 11, 23, 12, 30, tzinfo=UTC)
    price: Decimal = Decimal("99.90")

    def write(self, *words: str) -> None:
        """Adds a line to the file, at once: the next thing may be the end of the process."""
        file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(file, (" ".join(words) + "\n").encode())
        finally:
            os.close(file)

    def gate(self, place: str) -> Path:
        """The file for which a step waits."""
        return Path(f"{self.log}.{place.replace(' ', '-')}")

    def faults_at(self, place: str) -> list[str]:
        """What is to go wrong at a place, in its order."""
        return self.faults.get(place, "").split()


@dataclass(frozen=True)
class Receipt:
    """What an action returns."""

    name: str
    key: str


@dataclass(frozen=True)
class Ticket:
    """A result of many types."""

    leaves: datetime
    day: date
    price: Decimal
    seat: Class
    number: UUID
    receipt: Receipt
    rows: tuple[int, ...]
    meals: dict[str, list[str]]


_FAULTS: dict[str, type[Exception]] = {"fails": Refused, "breaks": Broken, "declines": Declined}


async def _meet(order: Order, place: str) -> None:
    for fault in order.faults_at(place):
        if fault == "waits":
            gate = order.gate(place)
            while not gate.exists():  # noqa: ASYNC110 - another process makes it
                await anyio.sleep(_LOOK)
        elif fault == "naps":
            await anyio.sleep(_NAP)
        elif fault == "hangs":
            await anyio.sleep_forever()
        else:
            raise _FAULTS[fault](place)


def _here() -> tuple[Effect, str]:
    effect = current_effect()
    assert effect is not None
    return effect, f"{'book' if effect.kind == 'action' else 'cancel'} {effect.name}"


async def _carry_out(order: Order, make: Callable[[str], Awaitable[Any]] | None = None) -> Any:
    effect, place = _here()
    order.write("begin", place, effect.key)
    try:
        await _meet(order, place)
        made = None if make is None else await make(effect.key)
        order.write("done", place, effect.key)
        await _meet(order, f"after {place}")
    except anyio.get_cancelled_exc_class():
        order.write("cut", place, effect.key)
        raise
    return made


async def book(order: Order) -> Receipt:
    """The action of most steps."""

    async def make(key: str) -> Receipt:
        return Receipt(_here()[0].name, key)

    made: Receipt = await _carry_out(order, make)
    return made


async def cancel(order: Order) -> None:
    """The compensation of most steps."""
    await _carry_out(order)


def book_in_thread(order: Order) -> str:
    """An action for a worker thread."""
    effect, place = _here()
    order.write("begin", place, effect.key)
    while "waits" in order.faults_at(place) and not order.gate(place).exists():
        time.sleep(_LOOK)
    order.write("done", place, effect.key)
    return "by a thread"


def cancel_in_thread(order: Order) -> None:
    """Its compensation."""
    effect, place = _here()
    order.write("done", place, effect.key)


def _step(name: str, **options: Any) -> Step[..., Receipt]:
    return Step(book, cancel, name=name, **options)


@dataclass(frozen=True)
class Stay:
    """What a step returns whose undo has to know where it writes."""

    order: Order
    name: str


async def stay(order: Order) -> Stay:
    """The action of steps with an undo."""

    async def make(key: str) -> Stay:
        return Stay(order, f"a room by {key}")

    made: Stay = await _carry_out(order, make)
    return made


async def leave(made: Stay) -> None:
    """Their undo."""
    effect, place = _here()
    made.order.write("done", place, made.name, effect.key)


_flight, _ticket = _step("flight"), _step("ticket")

trip = Saga([_flight, _step("hotel"), _step("car"), _ticket], name="trip")
"""Steps in order."""


@saga
async def values(scope: SagaScope, order: Order) -> list[str]:
    """Gives the results of its steps, those of a group in the order of its members."""
    first = await scope.step(_flight, order)
    others = await scope.parallel(*(_step(name).bind(order) for name in ("hotel", "car")))
    return [first.name, *(other.name for other in others)]


limited = Saga([Parallel(*map(_step, ("m0", "m1", "m2", "m3")), limit=2, name="group")], name="limited")
"""Two members at once."""


@saga
async def member(scope: SagaScope, order: Order, name: str) -> None:
    """Tells when it is entered."""
    order.write("begin", "member", name)
    await scope.step(_step(name), order)


@saga
async def in_order(scope: SagaScope, order: Order) -> None:
    """Has members that tell when they are entered."""
    await scope.parallel(*(member.bind(order, f"m{number}") for number in range(4)), name="group")


@saga
async def detour(scope: SagaScope, order: Order) -> str:
    """Catches what a save-point raises, and goes another way."""
    await scope.step(_flight, order)
    try:
        async with scope.nested() as extras:
            await extras.step(_step("hotel"), order)
            await extras.step(_step("opera"), order)
    except Refused:
        await scope.step(_step("car"), order)
        await scope.step(_ticket, order)
        return "by the other way"
    return "as planned"


of_its_own = Saga(
    [
        Step(stay, cancel, undo=leave, name="room"),
        Step(stay, undo=leave, name="table"),
        _step("opera", not_applied=Declined),
        _ticket,
    ],
    name="of_its_own",
)
"""Each step is taken back in a way of its own."""

pair = Saga(
    [_flight, Parallel(_step("hotel"), _step("car"), _step("opera"), name="group")], name="pair"
)
"""A group whose members are cut off when one fails."""

finishing = Saga(
    [
        _flight,
        Parallel(_step("hotel"), _step("car"), limit=None, name="the group", on_failure="finish"),
    ],
    name="finishing",
)
"""A group whose members come to their own end."""

blocking = Saga(
    [_flight, Step(book_in_thread, cancel_in_thread, name="hotel", blocking=True), _ticket],
    name="blocking",
)
"""A step in a worker thread."""

shielded = Saga([_flight, _step("hotel", shield=True), _ticket], name="shielded")
"""A step that is not cut off."""

nested = Saga(
    [
        _flight,
        Parallel(
            _step("hotel"),
            Saga(
                [_step("car"), Parallel(_step("opera"), _step("museum")), _step("bus")], name="branch"
            ),
            name="group",
        ),
        _ticket,
    ],
    name="nested",
)
"""Groups in sagas in groups."""

hurried = Saga([_flight, _step("hotel", timeout=0.05)], name="hurried")
"""A step with a time limit."""

hurrying = Saga([_flight, _step("hotel", compensation_timeout=0.05), _ticket], name="hurrying")
"""A compensation with a time limit."""

rushed = Saga([_flight, _step("hotel"), _ticket], name="rushed", rollback_timeout=0.05)
"""A rollback with a time limit."""

all_states = Saga(
    [
        _step("bus"),
        Commit(),
        _flight,
        _step("hotel"),
        Parallel(
            _step("opera", not_applied=Declined),
            Step(stay, undo=leave, name="table"),
            name="group",
            on_failure="finish",
        ),
        _ticket,
    ],
    name="all_states",
)
"""Its steps can end in every state."""

committed = Saga([_flight, Commit(), _step("hotel"), _ticket], name="committed")
"""With a point of no return."""


async def which_loop(order: Order) -> str:
    """An action that tells on which loop it runs."""
    del order
    return anyio.get_cancelled_exc_class().__module__.partition(".")[0]


@saga
async def loop(scope: SagaScope, order: Order) -> str:
    """Gives the loop on which its step ran."""
    return await scope.step(which_loop, order)


@saga
async def changing(scope: SagaScope, order: Order) -> str:
    """Is another one while there is a file: as if somebody had changed it between two processes."""
    await scope.step(_flight, order)
    other = order.gate("change").exists()
    await scope.step(_step("hostel" if other else "hotel"), order)
    await scope.step(_ticket, order)
    return "with a hotel"


async def print_ticket(order: Order) -> Ticket:
    """An action whose result has many types."""

    async def make(key: str) -> Ticket:
        number = UUID("12345678-1234-5678-1234-567812345678")
        meals = {"vegan": ["soup", "rice"]}
        receipt = Receipt("ticket", key)
        day = order.leaves.date()
        return Ticket(order.leaves, day, order.price, Class.FIRST, number, receipt, (3, 4), meals)

    made: Ticket = await _carry_out(order, make)
    return made


@saga
async def rich(scope: SagaScope, order: Order) -> Ticket:
    """Gives a result of many types, once another step has ended."""
    ticket = await scope.step(Step(print_ticket, cancel, name="ticket"), order)
    await scope.step(_step("hotel"), order)
    return ticket


class Unwritable:
    """What no codec can write."""

    def __init__(self, order: Order) -> None:
        self.order = order


async def make_unwritable(order: Order) -> Unwritable:
    """An action whose result cannot be recorded."""

    async def make(_key: str) -> Unwritable:
        return Unwritable(order)

    made: Unwritable = await _carry_out(order, make)
    return made


async def unmake(made: Unwritable) -> None:
    """Takes it back; it has to be the object itself."""
    effect, place = _here()
    made.order.write("done", place, type(made).__name__, effect.key)


unwritable = Saga([_flight, Step(make_unwritable, undo=unmake, name="thing")], name="unwritable")
"""With a result that cannot be recorded."""

SAGAS: tuple[Saga[..., Any], ...] = (
    all_states,
    blocking,
    changing,
    committed,
    detour,
    finishing,
    hurried,
    hurrying,
    in_order,
    limited,
    loop,
    nested,
    of_its_own,
    pair,
    rich,
    shielded,
    trip,
    unwritable,
    values,
)
"""What a worker has to know, but for `rushed`, which not every engine accepts."""
