"""The tests' own ledger finds what it is there to find: a test that cannot fail is a defect."""

from __future__ import annotations

import pytest
from anyio import create_task_group
from helpers import World, nothing

pytestmark = pytest.mark.anyio


def a_world(**lanes: str) -> World:
    world = World()
    for name in "abc":
        world.functions(name, lane=lanes.get(name, ""))
    return world


async def test_nothing_is_wrong() -> None:
    """Effects that are taken back in reverse order are right."""
    world = a_world()
    for name in "abc":
        await world.act(name)
    for name in "cba":
        await world.take_back(name)
    assert (world.problems, world.done) == ([], [])


async def test_an_effect_made_twice() -> None:
    """It is found."""
    world = a_world()
    await world.act("a")
    await world.act("a")
    assert world.problems == ["a was begun twice"]


async def test_an_effect_taken_back_twice() -> None:
    """It is found."""
    world = a_world()
    await world.act("a")
    await world.take_back("a")
    await world.take_back("a")
    assert world.problems == ["a was taken back twice"]


async def test_an_effect_taken_back_that_never_was() -> None:
    """It is found."""
    world = a_world()
    await world.take_back("a")
    assert world.problems == ["a was taken back, and had never begun"]


@pytest.mark.parametrize(
    ("lane_of_a", "lane_of_b", "wrong"),
    [
        ("", "", True),
        ("g.1", "", True),
        ("g.1", "h.1", True),
        ("g.1", "g.1", True),
        ("g.1/h.1", "g.1/i.1", True),
        ("g.1", "g.2", False),
        ("g.1/h.1", "g.1/h.2", False),
        ("g.1/h.1", "g.2/h.1", False),
    ],
)
async def test_the_order_of_taking_back(lane_of_a: str, lane_of_b: str, wrong: bool) -> None:
    """An earlier effect goes back after a later one, unless they are members of one group."""
    world = a_world(a=lane_of_a, b=lane_of_b)
    await world.act("a")
    await world.act("b")
    await world.take_back("a", nothing)
    await world.take_back("b", nothing)
    assert world.problems == (["a was taken back before b"] if wrong else [])


@pytest.mark.parametrize(("lane", "wrong"), [("", True), ("g", False)])
async def test_effects_taken_back_at_the_same_time(lane: str, wrong: bool) -> None:
    """It is found, unless they are members of one group."""
    world = a_world(**({"a": f"{lane}.a", "b": f"{lane}.b"} if lane else {}))
    await world.act("a")
    await world.act("b")

    async def meanwhile() -> None:
        await world.take_back("a", nothing)

    async with create_task_group() as tasks:
        tasks.start_soon(world.take_back, "b", meanwhile)
    assert world.problems == (["a was taken back at the same time as b"] if wrong else [])
