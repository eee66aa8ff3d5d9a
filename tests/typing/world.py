"""The functions that the typing tests make sagas of. Read by type checkers, never run."""

from __future__ import annotations


class Trip:
    arrival: int


class Flight:
    arrival: int


class Hotel: ...


class Car:
    plate: str


async def reserve_flight(trip: Trip) -> Flight:
    raise NotImplementedError


async def cancel_reservation(trip: Trip) -> None: ...


async def cancel_flight(flight: Flight) -> None: ...


async def cancel_hotel_booking(hotel: Hotel) -> None: ...


def note_trip(trip: Trip) -> int:
    raise NotImplementedError


def forget_trip(trip: Trip) -> None: ...


def forget_number(number: int) -> None: ...


async def book_hotel(trip: Trip, arrival: int, *, stars: int = 3) -> Hotel:
    raise NotImplementedError


async def cancel_hotel(trip: Trip, arrival: int, *, stars: int = 3) -> None: ...


async def cancel_hotel_other_names(journey: Trip, day: int, *, stars: int = 3) -> None: ...


async def rent_car(trip: Trip) -> Car:
    raise NotImplementedError


async def ping() -> None: ...
