"""What type checkers infer for steps, and what they refuse. Read by them, never run.

A mistake that is accepted shows as an ignore comment that is not needed, which is an error.
"""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, assert_type

import stamina
import tenacity
from world import (
    Car,
    Flight,
    Hotel,
    Trip,
    book_hotel,
    cancel_flight,
    cancel_hotel,
    cancel_hotel_booking,
    cancel_hotel_other_names,
    cancel_reservation,
    forget_number,
    forget_trip,
    note_trip,
    ping,
    rent_car,
    reserve_flight,
)

from pysagas import Bound, Parallel, Retry, Saga, SagaScope, Step


class SoldOut(Exception): ...


# --- Step(...) --------------------------------------------------------------------------------------


def steps_as_data(trip: Trip) -> None:
    flight = Step(reserve_flight, cancel_reservation, undo=cancel_flight)
    bound = flight.bind(trip)
    assert_type(bound, Bound[Flight])
    assert_type(flight.bind(trip=trip), Bound[Flight])
    assert_type(Step(note_trip, forget_trip, undo=forget_number).bind(trip), Bound[int])
    assert_type(Step(book_hotel, cancel_hotel).bind(trip, 3, stars=5), Bound[Hotel])
    assert_type(Step(rent_car, lambda trip: None).bind(trip), Bound[Car])
    assert_type(Step(ping).bind(), Bound[None])
    Step(
        reserve_flight,
        cancel_reservation,
        name="flight",
        not_applied=SoldOut,
        timeout=5,
        retry=None,
        compensation_timeout=1.5,
        compensation_retry=None,
        shield=True,
        blocking=False,
    )
    Step(reserve_flight, not_applied=(SoldOut, OSError))
    Step(lambda: 1, lambda: None)


def refused_steps_as_data(trip: Trip, hotel: Hotel) -> None:
    flight = Step(reserve_flight)
    flight.bind(hotel)  # type: ignore[arg-type]
    flight.bind()  # type: ignore[call-arg]
    flight.bind(trip, trip)  # type: ignore[call-arg]
    flight.bind(journey=trip)  # type: ignore[call-arg]
    Step(book_hotel).bind(trip, 3, stars="5")  # type: ignore[arg-type]
    Step(3)  # type: ignore[call-overload]
    # An undo that gets something else, a compensation with other parameters, or with other names:
    # keywords go to both.
    Step(reserve_flight, undo=cancel_hotel_booking)  # type: ignore[arg-type]
    Step(reserve_flight, cancel_flight)  # type: ignore[arg-type]
    Step(book_hotel, cancel_hotel_other_names)  # type: ignore[arg-type]
    Step(note_trip, undo=cancel_flight)  # type: ignore[arg-type]
    Step(ping, not_applied=KeyboardInterrupt)  # type: ignore[arg-type]
    Step(ping, timeout="5")  # type: ignore[call-overload]
    Step(ping, timeuot=5)  # type: ignore[call-overload]


def retriers() -> None:
    retrying: Retry = stamina.AsyncRetryingCaller(attempts=5).on(OSError)
    Step(ping, retry=retrying)
    Step(ping, retry=tenacity.AsyncRetrying(reraise=True))
    Step(ping, retry=stamina.RetryingCaller().on(OSError))  # type: ignore[call-overload]


async def own_retrier(attempt: Callable[[], Awaitable[Any]]) -> object:
    return await attempt()


Step(ping, retry=own_retrier, compensation_retry=own_retrier)


# --- scope.step -------------------------------------------------------------------------------------


async def calls(scope: SagaScope, trip: Trip, other: Saga[[Trip], Car]) -> None:
    assert_type(await scope.step(reserve_flight, trip), Flight)
    assert_type(await scope.step(note_trip, trip), int)
    assert_type(await scope.step(ping), None)
    assert_type(
        await scope.step(
            reserve_flight, trip, compensation=cancel_reservation, undo=cancel_flight, name="flight"
        ),
        Flight,
    )
    assert_type(await scope.step(note_trip, trip, compensation=forget_trip, undo=forget_number), int)
    assert_type(await scope.step(rent_car, trip, undo=lambda car: car.plate), Car)
    assert_type(
        await scope.step(
            rent_car,
            trip,
            not_applied=SoldOut,
            timeout=5,
            retry=own_retrier,
            compensation=lambda trip: None,
            compensation_timeout=1,
            compensation_retry=own_retrier,
            shield=True,
            blocking=False,
        ),
        Car,
    )
    # Definitions, with keywords.
    hotel = Step(book_hotel, cancel_hotel)
    assert_type(await scope.step(hotel, trip, 3, stars=5), Hotel)
    assert_type(await scope.step(hotel.bind(trip, 3)), Hotel)
    assert_type(await scope.step(Step(note_trip), trip=trip), int)
    assert_type(await scope.step(other, trip), Car)
    assert_type(await scope.step(other.bind(trip)), Car)
    assert_type(await scope.step(Parallel(hotel.bind(trip, 3))), tuple[Any, ...])


async def refused_calls(scope: SagaScope, trip: Trip, other: Saga[[Trip], Car]) -> None:
    await scope.step(reserve_flight, 3)  # type: ignore[arg-type]
    await scope.step(reserve_flight)  # type: ignore[arg-type, call-arg]
    await scope.step(reserve_flight, trip, trip)  # type: ignore[arg-type, call-arg]
    await scope.step(note_trip, 3)  # type: ignore[arg-type]
    await scope.step(reserve_flight, trip, undo=cancel_hotel_booking)  # type: ignore[misc]
    await scope.step(reserve_flight, trip, compensation=cancel_flight)  # type: ignore[arg-type]
    await scope.step(note_trip, trip, undo=cancel_flight)  # type: ignore[arg-type]
    await scope.step(reserve_flight, trip, timeuot=5)  # type: ignore[call-overload]
    await scope.step(reserve_flight, trip=trip)  # type: ignore[call-overload]
    await scope.step(Step(book_hotel), trip)  # type: ignore[call-overload]
    await scope.step(Step(book_hotel), trip, "3")  # type: ignore[call-overload]
    await scope.step(other, 3)  # type: ignore[arg-type]
    await scope.step(3)  # type: ignore[call-overload]
    # What is awaited is a coroutine function, so a missing await is found.
    scope.step(ping)  # type: ignore[unused-coroutine]
    scope.commit()  # type: ignore[unused-coroutine]
    scope.parallel(Step(ping).bind())  # type: ignore[unused-coroutine]


async def the_rest_of_a_scope(scope: SagaScope, trip: Trip) -> None:
    async with scope.nested() as extras:
        assert_type(extras, SagaScope)
    assert_type(await scope.commit(), None)
    scope.on_rollback(forget_trip, trip)
    scope.on_rollback(ping)
    scope.on_rollback(forget_trip, 3)  # type: ignore[arg-type]
    scope.on_rollback(forget_trip)  # type: ignore[arg-type]


# --- parallel ---------------------------------------------------------------------------------------


async def groups(scope: SagaScope, trip: Trip, many: list[Trip], other: Saga[[Trip], str]) -> None:
    flight = Step(reserve_flight).bind(trip)
    hotel = Step(book_hotel).bind(trip, 3)
    number = Step(note_trip).bind(trip)
    assert_type(await scope.parallel(flight), tuple[Flight])
    assert_type(await scope.parallel(flight, hotel), tuple[Flight, Hotel])
    assert_type(
        await scope.parallel(flight, hotel, number, name="all", limit=2, on_failure="finish"),
        tuple[Flight, Hotel, int],
    )
    assert_type(
        await scope.parallel(flight, hotel, number, other.bind(trip)), tuple[Flight, Hotel, int, str]
    )
    assert_type(
        await scope.parallel(flight, hotel, number, flight, hotel),
        tuple[Flight, Hotel, int, Flight, Hotel],
    )
    assert_type(
        await scope.parallel(flight, hotel, number, flight, hotel, number),
        tuple[Flight, Hotel, int, Flight, Hotel, int],
    )
    assert_type(
        await scope.parallel(flight, hotel, number, flight, hotel, number, flight),
        tuple[Flight, Hotel, int, Flight, Hotel, int, Flight],
    )
    assert_type(
        await scope.parallel(flight, hotel, number, flight, hotel, number, flight, hotel),
        tuple[Flight, Hotel, int, Flight, Hotel, int, Flight, Hotel],
    )
    car = Step(rent_car)
    assert_type(await scope.parallel(*map(car.bind, many), limit=20), tuple[Car, ...])
    assert_type(await scope.parallel(*[car.bind(one) for one in many]), tuple[Car, ...])


async def refused_groups(scope: SagaScope, trip: Trip) -> None:
    flight = Step(reserve_flight).bind(trip)
    await scope.parallel(flight, limit="2")  # type: ignore[call-overload]
    await scope.parallel(flight, on_failure="wait")  # type: ignore[call-overload]
    await scope.parallel(reserve_flight(trip))  # type: ignore[call-overload]
    Parallel(reserve_flight)  # type: ignore[arg-type]
    Parallel(flight, on_failure="wait")  # type: ignore[arg-type]
