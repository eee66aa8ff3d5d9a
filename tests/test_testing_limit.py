"""What waits for ever is cut off, in real time, and named."""

from __future__ import annotations

import math
import time
from threading import Event as ThreadEvent

import anyio
import pytest
from hypothesis import given
from worlds import Lab, found, without_native

from pysagas import Parallel, Saga, Step, saga
from pysagas.testing import CannotExplore, Trial, explore, fault_plans, faults, virtual_time
from pysagas.testing._limit import Limit

pytestmark = pytest.mark.anyio

SOON = 0.4
virtual = pytest.mark.parametrize("anyio_backend", [("trio", virtual_time())], ids=["virtual"])


def waiting_back(world, **options):
    """A compensation that waits for what only the action does."""
    done, act = anyio.Event(), world.action("a")

    async def put():
        await act()
        done.set()

    async def back():
        await done.wait()
        world.remove("a")

    return Step(put, back, name="put", **options)


async def patiently(attempt):
    """A retry that waits for ever when the first attempt fails."""
    try:
        return await attempt()
    except Exception:
        await anyio.sleep_forever()


BEFORE = {"put: fails before its effect", *(f"put: cancelled at checkpoint {n}" for n in (1, 2))}


async def test_a_compensation_that_waits_for_ever_is_found():
    """It is cut off inside the engine's shields, and what went wrong is that it was still waiting."""
    report = await explore(Lab(lambda world: Saga([waiting_back(world)])), timeout=SOON)

    assert without_native(found(report)) == BEFORE
    assert {result.problem for result in report.failures} == {
        "taking back put: still waiting after 0.4 s"
    }


@virtual
async def test_virtual_time_does_not_count():
    """Where the clock jumps, an hour is no time; and what waits for ever has as much as elsewhere."""

    async def an_hour(attempt):
        await anyio.sleep(3600)
        return await attempt()

    def build(world):
        return Saga([waiting_back(world, retry=an_hour)])

    report = await explore(Lab(build), timeout=SOON)

    assert "put: fails before its effect" in found(report)
    assert "no fault, taken back at its end" not in found(report)


@pytest.mark.parametrize("options", [{}, {"shield": True}], ids=str)
async def test_an_action_that_waits_for_ever(options):
    """Where that needs no fault, there is nothing to explore; a shield keeps nobody waiting."""

    def build(world):
        async def put():
            world.make("a")
            await anyio.sleep_forever()

        return Saga([Step(put, world.back("a"), **options)])

    with pytest.raises(CannotExplore, match="without any fault: put: still waiting after 0.4 s"):
        await explore(Lab(build), timeout=SOON)


async def test_a_function_that_waits_for_ever_between_its_steps():
    """No step is to blame then."""

    def build(world):
        @saga
        async def tested(scope):
            await scope.step(world.step("a"))
            await anyio.sleep_forever()

        return tested

    with pytest.raises(CannotExplore, match="without any fault: the run: still waiting after 0.4 s"):
        await explore(Lab(build), timeout=SOON)


async def test_a_retry_that_waits_for_ever():
    """What it tries again is named, on the way there and back."""

    def build(world):
        step = world.step("a", retry=patiently, compensation_retry=patiently)
        return Saga([Parallel(step, world.step("b"))])

    report = await explore(Lab(build), timeout=SOON)

    problems = {str(result.plan): result.problem for result in report.failures}
    assert problems["a: fails before its effect"] == "a: still waiting after 0.4 s"
    assert problems["taking back a: fails"] == "taking back a: still waiting after 0.4 s"


async def test_what_waits_at_the_same_time_is_named_together():
    """In a group there may be several."""

    def build(world):
        async def back():
            await anyio.sleep_forever()

        return Saga([Parallel(Step(world.action("a"), back), Step(world.action("b"), back))])

    with pytest.raises(CannotExplore, match="taking back a, taking back b: still waiting after"):
        await explore(Lab(build), timeout=SOON)


async def test_nothing_more_is_called_of_what_was_cut_off():
    """A saga that tries again for ever comes to no further effect."""

    def build(world):
        @saga
        async def tested(scope):
            with pytest.raises(BaseException):  # noqa: B017, PT011 - as a careless saga catches it
                await scope.step(waiting(world))
            await scope.step(world.step("b"))

        return tested

    def waiting(world):
        async def put():
            world.make("a")
            await anyio.sleep_forever()

        return Step(put, world.back("a"))

    lab = Lab(build)
    with pytest.raises(CannotExplore, match="put: still waiting"):
        await explore(lab, timeout=SOON)
    assert str(lab.worlds[-1]) == "a"


def test_faults_and_plans_have_a_limit_too():
    """The saga is run to make them."""

    def trial():
        return Trial(Saga([Step(anyio.sleep_forever)]), state=list)

    with pytest.raises(CannotExplore, match="still waiting"):
        faults(trial, timeout=SOON)
    with pytest.raises(CannotExplore, match="still waiting"):
        given(fault_plans(trial, timeout=SOON))(lambda plan: None)()


@pytest.mark.parametrize("seconds", [0, -1, math.nan, "1", None, True])
async def test_a_limit_is_a_number_of_seconds(seconds):
    """Anything else is refused before the saga is run."""
    lab = Lab(lambda world: Saga([world.step("a")]))
    with pytest.raises(ValueError, match=r"explore: timeout must be seconds, more than 0, not "):
        await explore(lab, timeout=seconds)
    assert lab.worlds == []


async def test_no_limit_at_all():
    """Infinity is a number of seconds."""
    report = await explore(Lab(lambda world: Saga([world.step("a")])), timeout=math.inf)

    assert report.ok, report


def test_a_loop_that_has_just_ended():
    """Who would have cut off its last run is too late, and says nothing."""
    limit = Limit(SOON)
    called = ThreadEvent()

    block = limit.on(called.set)

    async def leave():
        block.__enter__()

    anyio.run(leave)
    with limit:
        while limit._current is not None:
            time.sleep(0)
    assert not called.is_set()
