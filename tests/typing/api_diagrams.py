"""What type checkers infer for drawings and what they are made of, and what they refuse. Never run."""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from typing import Literal, assert_type

from world import Flight, Trip, cancel_flight, reserve_flight

from pysagas import CallNext, Effect, Outcome, Ran, Saga, SagaScope, Step, TreeNode, note_time, saga
from pysagas.diagrams import Timeline, mermaid, timeline

booking = Saga([Step(reserve_flight, undo=cancel_flight)])


@saga
async def book_trip(scope: SagaScope, trip: Trip) -> Flight:
    return await scope.step(reserve_flight, trip, undo=cancel_flight)


async def drawn(trip: Trip) -> None:
    outcome = await book_trip.run(trip)
    assert_type(mermaid(outcome), str)
    assert_type(mermaid(booking), str)
    assert_type(mermaid(book_trip), str)
    assert_type(timeline(outcome), Timeline)
    assert_type(timeline(outcome).mermaid(), str)
    assert_type(outcome.times, tuple[Ran, ...])
    assert_type(outcome.tree, tuple[TreeNode, ...])
    assert_type(booking.tree, tuple[TreeNode, ...])


def ran(ran: Ran, node: TreeNode) -> None:
    assert_type(ran.path, tuple[int, ...])
    assert_type(ran.kind, Literal["action", "compensation"])
    assert_type(ran.began, float)
    assert_type(ran.ended, float | None)
    assert_type(ran.took, str)
    assert_type(node.kind, Literal["step", "commit", "saga", "scope", "group", "part"])
    assert_type(node.name, str)
    assert_type(node.path, tuple[int, ...])
    assert_type(node.compensation, str | None)
    assert_type(node.undo, str | None)
    assert_type(node.passed, bool)


async def watch(effect: Effect, call_next: CallNext) -> object:
    result = await call_next()
    note_time(effect, 0, 1.5)
    return result


def refused(outcome: Outcome[int]) -> None:
    mermaid("trip")  # type: ignore[arg-type]
    timeline(booking)  # type: ignore[arg-type]
    note_time("a", 0.0, 1.0)  # type: ignore[arg-type]
    outcome.times = ()  # type: ignore[misc]
