"""What type checkers infer for ready-made observers, and what they refuse. Read by them, never run."""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

import logging
from typing import assert_type

from opentelemetry.metrics import get_meter_provider
from opentelemetry.trace import get_tracer_provider
from rich.console import Console
from world import Trip, cancel_flight, reserve_flight

from pysagas import Middleware, Saga, SagaScope, Step, open_saga, saga
from pysagas.observe.logging import log_effects
from pysagas.observe.opentelemetry import trace_effects
from pysagas.observe.progress import show_progress
from pysagas.observe.timing import record_times

watched = [log_effects(), trace_effects()]
booking = Saga([Step(reserve_flight, undo=cancel_flight)], middleware=watched)
open_saga(middleware=watched)


@saga(middleware=[log_effects()])
async def book_trip(scope: SagaScope, trip: Trip) -> None:
    await scope.step(reserve_flight, trip, undo=cancel_flight)


def middleware() -> None:
    assert_type(log_effects(), Middleware)
    assert_type(log_effects(logging.getLogger("trips")), Middleware)
    assert_type(trace_effects(), Middleware)
    trace_effects(tracer_provider=get_tracer_provider(), meter_provider=get_meter_provider())
    assert_type(record_times(), Middleware)
    assert_type(show_progress(), Middleware)
    assert_type(show_progress(Console(stderr=True)), Middleware)


def refused() -> None:
    show_progress("stderr")  # type: ignore[arg-type]
    log_effects("trips")  # type: ignore[arg-type]
    trace_effects(get_tracer_provider())  # type: ignore[call-arg]
    trace_effects(tracer_provider=get_meter_provider())  # type: ignore[arg-type]
    Saga([Step(reserve_flight)], middleware=[log_effects])  # type: ignore[list-item]
