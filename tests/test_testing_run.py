"""One run of a trial: how its faults are made, and how the state is read."""

from __future__ import annotations

from functools import partial
from threading import current_thread, main_thread

import pytest
from anyio import CancelScope
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint
from conftest import ASYNCIO
from helpers import TRIO
from helpers import on_asyncio as on_asyncio_loop
from worlds import Lab, World, found, logs

from pysagas import Commit, Parallel, Saga, Step, saga
from pysagas.testing import (
    CannotExplore,
    Fault,
    FaultKind,
    InjectedFailure,
    Place,
    Plan,
    Trial,
    explore,
)
from pysagas.testing import _process as process_module
from pysagas.testing._run import TrialRun
from pysagas.testing._watched import watched

pytestmark = pytest.mark.anyio

on_asyncio = pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
on_trio = pytest.mark.parametrize("anyio_backend", TRIO, indirect=True)

A = Place("action", (0,), "a")
BACK = Place("compensation", (0,), "a")


class Odd(BaseException):
    """What nobody has heard of."""


def one_step(world):
    return Saga([world.step("a")])


async def run(build, *faults):
    """Runs a saga once, with these faults."""
    world = World()
    original = build(world)
    trial_run = TrialRun(Trial(original, state=world.state), watched(original), Plan(tuple(faults)))
    await trial_run.go()
    return trial_run, world


# --- failures ----------------------------------------------------------------------------------


async def test_a_failure_says_what_it_is():
    """What is raised is an InjectedFailure, by default, with the fault in words."""
    fault = Fault(A, FaultKind.FAILS_AFTER)
    trial_run, _ = await run(one_step, fault)

    assert type(trial_run.error) is InjectedFailure
    assert str(trial_run.error) == "a: fails after its effect"
    assert trial_run.happened == {fault: trial_run.error}


async def test_a_failure_of_the_trial_is_made_for_each_run():
    """The trial's own failure is raised instead, made from the fault in words."""
    made = []

    def failure(message):
        made.append(message)
        return KeyError(message)

    await logs(one_step, failure=failure)

    assert made == ["a: fails before its effect", "a: fails after its effect", "taking back a: fails"]


async def test_a_failure_that_is_no_exception_is_a_problem():
    """What cannot be raised did not happen."""
    report = await explore(Lab(one_step, failure=lambda message: message))

    assert not report.ok
    assert "the saga's report has TypeError" in report


async def test_a_run_that_comes_to_its_end_is_made_to_fail_there():
    """So it is taken back; what it looked like at its end is kept."""
    trial_run, world = await run(one_step)

    assert trial_run.error is trial_run.ended
    assert (trial_run.before, trial_run.at_end, trial_run.after) == (set(), {"a"}, set())
    assert str(world) == "a> a a< -a> -a -a<"


async def test_what_was_seen_of_a_run():
    """Beginning, checkpoints and end of each function, in their order, each time counted."""
    trial_run, _ = await run(one_step, Fault(A, FaultKind.RUNS_TWICE))

    action = [(event, number) for event, place, number in trial_run.events if place == A]
    assert action == [
        ("enter", 1),
        ("checkpoint", 1),
        ("checkpoint", 2),
        ("done", 1),
        ("checkpoint", 3),
        ("checkpoint", 4),
        ("done", 2),
    ]
    assert trial_run.last_fault == 4


# --- cancellations -----------------------------------------------------------------------------


@on_asyncio
async def test_a_native_cancellation_comes_again_when_the_rollback_begins(monkeypatch):
    """The task of the run is cancelled twice: by somebody impatient."""
    cancelled = []
    original = process_module.native_cancel

    def counting():
        cancel = original()

        def cancel_and_count():
            cancelled.append(str(world))
            cancel()

        return cancel_and_count

    monkeypatch.setattr(process_module, "native_cancel", counting)
    world = World()
    saga = Saga([world.step("a"), world.step("b")])

    async def go(*faults):
        world.log.clear()
        cancelled.clear()
        trial_run = TrialRun(Trial(saga, state=world.state), watched(saga), Plan(faults))
        await trial_run.go()
        return cancelled

    b = Place("action", (1,), "b")
    assert await go(Fault(b, FaultKind.CANCELLED_NATIVELY, 1)) == [
        "a> a a< b>",
        "a> a a< b>",
    ]
    assert str(world) == "a> a a< b> -b> -b -b< -a> -a -a<"
    # In a rollback that has begun there is no second time.
    assert await go(Fault(BACK, FaultKind.CANCELLED_NATIVELY, 1)) == [
        "a> a a< b> b b< -b> -b -b< -a>",
    ]
    # A scope is cancelled without the task.
    assert await go(Fault(b, FaultKind.CANCELLED, 1)) == []


async def test_a_cancelled_action_may_clean_up():
    """It is cancelled once at its checkpoint; what it waits for after that is not cut off."""

    def build(world):
        async def cleaning():
            try:
                await checkpoint()
                world.make("a")
            finally:
                with CancelScope(shield=True):
                    await checkpoint()
                    await checkpoint()
                world.log.append("cleaned")

        return Saga([Step(cleaning, world.back("a"), name="a")])

    seen = await logs(build)

    for kind in ("cancelled", "cancelled natively") if on_asyncio_loop() else ("cancelled",):
        assert seen[f"a: {kind} at checkpoint 1"] == "cleaned -a> -a -a<"


@on_asyncio
async def test_a_native_cancellation_of_a_member_is_that_of_the_run():
    """A group's member waits in a task of its own; who is cancelled is the run."""
    lab = Lab(lambda world: Saga([Parallel(world.step("a"), world.step("b"))]))
    report = await explore(lab)

    assert report.ok, report
    seen = lab.logs(report)["a: cancelled natively at checkpoint 1"]
    assert "a>" in seen
    assert "-a<" in seen
    assert "a<" not in seen.split()


@on_trio
async def test_a_plan_of_asyncio_on_trio():
    """Where there is no native cancellation, the list is refused, with how to make another."""
    fault = Fault(A, FaultKind.CANCELLED_NATIVELY, 2)

    for given in (fault, Plan((fault,))):
        with pytest.raises(
            CannotExplore, match=r'a: cancelled natively .*faults\(trial, backend="trio"\)'
        ):
            await explore(Lab(one_step), [given])


async def test_a_cancellation_that_nobody_met_is_met_at_the_end():
    """An action that shields its wait goes on; the run does not end as if nothing had been."""

    def build(world):
        async def shielded():
            world.log.append("a>")
            await cancel_shielded_checkpoint()
            world.make("a")

        return Saga([Step(shielded, world.back("a"), name="a")])

    seen = await logs(build)

    assert seen["a: cancelled at checkpoint 1"] == "a> a -a> -a -a<"


async def test_a_cancellation_is_met_at_a_commit():
    """There too: what is behind a commit cannot be taken back."""

    def build(world):
        async def shielded():
            await cancel_shielded_checkpoint()
            world.make("a")

        return Saga([Step(shielded, world.back("a"), name="a"), Commit(), world.step("b")])

    seen = await logs(build)

    assert seen["a: cancelled at checkpoint 1"] == "a -a> -a -a<"


# --- the state ---------------------------------------------------------------------------------


async def test_a_live_state_is_copied():
    """A state that is what the saga goes on to change is compared as it was."""

    class Row(list):
        """Mutable, and nested in the state."""

    rows = []

    def trial():
        state = {"rows": [Row([1])]}
        rows.append(state)

        async def add():
            await checkpoint()
            state["rows"][0].append(2)

        return Trial(Saga([Step(add)]), state=lambda: state)

    report = await explore(trial)

    assert "no fault, taken back at its end" in found(report)
    assert "rows: was [[1]], is [[1, 2]]" in report


async def test_an_async_state_is_awaited():
    """A state may have to be asked for, also past a commit."""

    def build(world):
        return Saga([world.step("a"), Commit(), world.step("b")])

    def trial():
        world = World()

        async def state():
            await checkpoint()
            return sorted(world.standing)

        return Trial(build(world), state=state)

    report = await explore(trial)
    assert report.ok, report

    report = await explore(trial, pairs=True)
    assert report.ok, report


async def test_a_state_that_cannot_be_copied():
    """It is refused, with what it should return."""
    with pytest.raises(CannotExplore, match=r"state cannot be copied: TypeError.*return plain values"):
        await explore(Lab(one_step, state=lambda: (number for number in range(3))))


async def test_a_state_that_cannot_be_copied_any_more():
    """So is one that can be copied only until the saga has run; not taken for a failure of it."""

    class Uncopied:
        def __deepcopy__(self, memo):
            raise NotImplementedError("no copy")

    def trial():
        world = World()
        return Trial(one_step(world), state=lambda: Uncopied() if world.standing else 0)

    with pytest.raises(
        CannotExplore, match="^the trial's state cannot be copied: NotImplementedError.'no copy'"
    ):
        await explore(trial)


async def test_what_the_state_raises_goes_through():
    """A state that fails is the caller's to mend; its exception is not changed."""

    def broken():
        raise LookupError("no such table")

    with pytest.raises(LookupError, match="no such table"):
        await explore(Lab(one_step, state=broken))


class LastLook:
    """A state that does something else when all is over: that is the fifth look of an exploration."""

    def __init__(self, then):
        self.then = then
        self.lab = Lab(one_step, state=self)
        self.looks = 0

    async def __call__(self):
        self.looks += 1
        if self.looks == 5:
            await self.then()
        return self.lab.worlds[-1].state()


@pytest.mark.parametrize("error", [LookupError("no such table"), Odd("closed")], ids=repr)
async def test_what_the_state_raises_when_all_is_over_goes_through(error):
    """As it is, in no group."""

    async def fail():
        raise error

    look = LastLook(fail)
    with pytest.raises(type(error)) as info:
        await explore(look.lab)
    assert info.value is error
    assert str(look.lab.worlds[-1]) == "a> a a< -a> -a -a<"


async def test_the_last_look_can_be_cancelled():
    """It is no part of the run."""

    async def wait():
        scope.cancel()
        await checkpoint()

    look = LastLook(wait)
    with CancelScope() as scope:
        await explore(look.lab)
    assert scope.cancelled_caught
    assert look.looks == 5


# While the places are learned, and in the run of a fault.
@pytest.mark.parametrize("number", [2, 6])
@pytest.mark.parametrize("when", [{"a", "b"}, {"a", "b", "c"}], ids=["at a commit", "at the end"])
@pytest.mark.parametrize("error", [LookupError("no such table"), Odd("closed")], ids=repr)
async def test_what_the_state_raises_in_the_middle_goes_through(number, when, error):
    """It is not taken for a failure of the saga, at a commit or at the end; not even if it comes once."""
    to_raise = [error]

    def build(world):
        return Saga(
            [world.step("a"), Step(len).bind(""), world.step("b"), Commit(), world.step("c")],
        )

    def trial():
        made = lab()

        async def state():
            await checkpoint()
            if to_raise and len(lab.worlds) >= number and lab.worlds[-1].standing == when:
                raise to_raise.pop()
            return made.state()

        return Trial(made.saga, state=state)

    lab = Lab(build)
    with pytest.raises(type(error)) as info:
        await explore(trial)
    assert info.value is error


# While the places are learned; without a fault; and where the process is to be killed, later on.
@pytest.mark.parametrize("number", [2, 4, 5])
async def test_what_is_neither_a_failure_nor_a_cancellation_goes_through(number):
    """What a fake raises to stop everything comes out as it is, in no group."""
    odd = Odd("enough")

    def build(world):
        async def stopping():
            await checkpoint()
            world.make("a")
            if len(lab.worlds) == number:
                raise odd

        return Saga([Step(stopping, world.back("a"), name="a")])

    lab = Lab(build)
    with pytest.raises(Odd) as info:
        await explore(lab, kills=True, only=lambda fault: fault.kind is FaultKind.KILLED_AFTER)

    assert info.value is odd
    assert len(lab.worlds) == number
    # It was an interruption for the saga, and is taken back.
    assert str(lab.worlds[-1]) == "a -a> -a -a<"


async def test_what_the_trial_raises_goes_through():
    """So is a trial that fails."""
    with pytest.raises(ZeroDivisionError):
        await explore(lambda: 1 / 0)


# --- threads -----------------------------------------------------------------------------------


async def test_faults_are_made_in_the_thread():
    """What runs in a worker thread fails there, and is called again there."""
    threads = set()

    def build(world):
        def action():
            threads.add(current_thread() is main_thread())
            world.make("a")

        return Saga([Step(action, partial(world.remove, "a"), blocking=True, name="a")])

    seen = await logs(build)

    assert threads == {False}
    assert seen["a: runs twice"] == "a a -a"
    assert seen["a: fails before its effect"] == "-a"


@on_asyncio
async def test_a_native_cancellation_comes_again_when_a_rollback_begins_in_a_thread():
    """The task of the run is cancelled from the worker thread; what runs in there comes to its end."""

    def build(world):
        async def wait():
            world.log.append("wait>")
            await checkpoint()

        booking = Step(world.sync_action("a"), world.sync_back("a"), blocking=True)
        return Saga([booking, Step(wait)])

    lab = Lab(build)
    fault = Fault(Place("action", (1,), "wait"), FaultKind.CANCELLED_NATIVELY, 1)
    report = await explore(lab, [fault])

    assert report.ok, report
    assert lab.logs(report) == {str(fault): "a> a a< wait> -a> -a -a<"}
    assert (await explore(lab)).ok


# --- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exceptions", "args", "run_id", "middleware", "self"])
async def test_an_argument_may_have_any_name(name):
    """Keyword arguments of a trial are those of its saga, and of nothing else."""
    given = []

    def build(world):
        def action(**kwargs):
            given.append(kwargs)
            world.make("a")

        def back(**kwargs):
            given.append(kwargs)
            world.remove("a")

        return Saga([Step(action, back)])

    report = await explore(Lab(build, kwargs={name: 5}))

    assert report.ok, report
    assert all(kwargs == {name: 5} for kwargs in given)


async def test_an_argument_of_a_function_may_be_called_exceptions():
    """A type that is given by that name is not one that the run expects."""

    def build(world):
        @saga
        async def order(scope, *, exceptions):
            assert exceptions is LookupError
            await scope.step(world.step("a"))

        return order

    report = await explore(Lab(build, kwargs={"exceptions": LookupError}))
    assert report.ok, report
