"""What type checkers infer for sagas, and what they refuse. Read by them, never run."""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, assert_type

from world import Car, Flight, Trip, cancel_flight, cancel_reservation, ping, rent_car, reserve_flight

from pysagas import (
    Bound,
    CallNext,
    Effect,
    Middleware,
    Outcome,
    Parallel,
    Saga,
    SagaBuilder,
    SagaError,
    SagaScope,
    SagaState,
    Step,
    StepReport,
    current_effect,
    observer,
    open_saga,
    outcome_of,
    saga,
)

# --- as a function ----------------------------------------------------------------------------------


@saga
async def book_trip(scope: SagaScope, trip: Trip, *, class_: str = "economy") -> Flight:
    return await scope.step(reserve_flight, trip, undo=cancel_flight)


@saga(
    name="cars",
    exceptions=(OSError, ValueError),
    rollback_timeout=30,
    on_compensation_failure="stop",
    middleware=[],
)
async def book_cars(scope: SagaScope, *trips: Trip) -> tuple[Car, ...]:
    return await scope.parallel(*map(Step(rent_car).bind, trips))


class Agency:
    @saga
    async def book(self, scope: SagaScope, trip: Trip) -> Flight:
        return await scope.step(book_trip, trip, class_="first")

    @saga(name="cars")
    async def cars(self, scope: SagaScope, trip: Trip) -> int:
        return len(await scope.step(book_cars, trip, trip))


async def functions(trip: Trip, agency: Agency) -> None:
    assert_type(await book_trip(trip), Flight)
    assert_type(await book_trip(trip, class_="first"), Flight)
    assert_type(await book_trip.run(trip), Outcome[Flight])
    assert_type(await book_trip.run(trip, class_="first"), Outcome[Flight])
    assert_type(await book_trip.run(trip, exceptions=OSError), Outcome[Flight])
    assert_type(await book_trip.run(trip, exceptions=(OSError, ValueError)), Outcome[Flight])
    assert_type((await book_trip.run(trip)).value, Flight)
    assert_type(await book_cars(trip, trip), tuple[Car, ...])
    assert_type((await book_cars.run()).value, tuple[Car, ...])
    assert_type(book_trip.bind(trip), Bound[Flight])
    assert_type(await agency.book(trip), Flight)
    assert_type((await agency.book.run(trip)).value, Flight)
    assert_type(agency.book.bind(trip), Bound[Flight])
    assert_type(await agency.cars(trip=trip), int)
    assert_type((await agency.cars.run(trip)).value, int)
    assert_type(await Agency.book(agency, trip), Flight)


async def refused_functions(trip: Trip, agency: Agency) -> None:
    await book_trip(3)  # type: ignore[arg-type]
    await book_trip()  # type: ignore[call-arg]
    await book_trip(trip, klass="first")  # type: ignore[call-arg]
    await book_trip.run(3)  # type: ignore[call-overload]
    await book_trip.run()  # type: ignore[call-overload]
    await book_trip.run(trip, exceptions=3)  # type: ignore[call-overload]
    await book_trip.run(trip, exceptions=KeyboardInterrupt)  # type: ignore[arg-type]
    book_trip.bind(3)  # type: ignore[arg-type]
    await agency.book(3)  # type: ignore[arg-type]
    await agency.book.run(3)  # type: ignore[call-overload]
    await agency.cars()  # type: ignore[call-arg]
    # What is awaited is a coroutine function, so a missing await is found.
    book_trip(trip)  # type: ignore[unused-coroutine]
    book_trip.run(trip)  # type: ignore[unused-coroutine]
    Agency.book(agency, trip)  # type: ignore[unused-coroutine]


@saga  # type: ignore[arg-type]
def not_async(scope: SagaScope) -> None: ...


@saga  # type: ignore[arg-type]
async def no_scope() -> None: ...


@saga(retries=3)  # type: ignore[call-overload, untyped-decorator]
async def no_such_option(scope: SagaScope) -> None: ...


# --- as data ----------------------------------------------------------------------------------------


async def as_data(trip: Trip) -> None:
    flight = Step(reserve_flight, cancel_reservation, undo=cancel_flight)
    trips = Saga(
        [flight, Parallel(Step(ping).bind(), Step(rent_car)), book_trip, flight.bind(trip)],
        name="trips",
        exceptions=OSError,
        rollback_timeout=3,
        on_compensation_failure="continue",
        middleware=(log_effects,),
    )
    assert_type(await trips(trip), None)
    outcome = await trips.run(trip)
    assert_type(outcome, Outcome[None])
    assert_type(await trips.run(executor=None, exceptions=None), Outcome[None])
    assert_type(trips.bind(trip), Bound[None])
    Saga([reserve_flight])  # type: ignore[list-item]
    Saga([], on_compensation_failure="later")  # type: ignore[arg-type]

    builder = SagaBuilder.create("trips", exceptions=(OSError,), middleware=[log_effects])
    assert_type(builder, SagaBuilder)
    built = (
        builder.add_step(reserve_flight, cancel_reservation, undo=cancel_flight, timeout=3)
        .add_step(flight)
        .add_step(flight.bind(trip))
        .add_step(lambda: 1, lambda: None)
        .add_parallel(flight, flight.bind(trip), limit=1, on_failure="finish", name="both")
        .add_saga(book_trip)
        .add_saga(book_trip.bind(trip))
        .add_commit()
        .build()
    )
    assert_type(await built(trip), None)
    assert_type((await built.run(trip)).value, None)
    builder.add_step(reserve_flight, cancel_flight)  # type: ignore[arg-type]
    builder.add_step(rent_car, undo=cancel_flight)  # type: ignore[arg-type]
    builder.add_step(flight, timeout=3)  # type: ignore[call-overload]


# --- open_saga, outcomes, effects -------------------------------------------------------------------


async def opened(trip: Trip) -> None:
    async with open_saga(name="block", exceptions=OSError, rollback_timeout=1) as scope:
        assert_type(scope, SagaScope)
        assert_type(await scope.step(reserve_flight, trip), Flight)
    assert_type(scope.outcome, Outcome[None] | None)


async def returns_a_value_from_within(trip: Trip) -> Flight:
    async with open_saga() as scope:
        return await scope.step(reserve_flight, trip)


async def outcomes(outcome: Outcome[Flight], error: Exception) -> None:
    assert_type(outcome.state, SagaState)
    assert_type(outcome.value, Flight)
    assert_type(outcome.error, BaseException | None)
    assert_type(outcome.steps, tuple[StepReport, ...])
    assert_type(outcome.in_doubt, tuple[StepReport, ...])
    assert_type(await outcome.rollback(), Outcome[Flight])
    assert_type(outcome_of(error), Outcome[object] | None)
    wider: Outcome[object] = outcome
    del wider
    outcome.value = Flight()  # type: ignore[misc]


async def log_effects(effect: Effect, call_next: CallNext) -> object:
    assert_type(effect.path, tuple[int, ...])
    assert_type(effect.key, str)
    assert_type(effect.action_key, str | None)
    if effect.kind == "actoin":  # type: ignore[comparison-overlap]
        raise SagaError
    effect.name = "other"  # type: ignore[misc]
    return await call_next()


async def call_next_takes_nothing(effect: Effect, call_next: CallNext) -> object:
    return await call_next(effect)  # type: ignore[call-arg]


async def one_argument(effect: Effect) -> object:
    return effect


class Counting:
    async def __call__(self, effect: Effect, call_next: Callable[[], Awaitable[Any]], /) -> object:
        return await call_next()


watched: Middleware = observer(log_effects)
counting: Middleware = Counting()
Saga([], middleware=[log_effects, watched, counting])
Saga([], middleware=[one_argument])  # type: ignore[list-item]
observer(one_argument)  # type: ignore[arg-type]
assert_type(current_effect(), Effect | None)
