"""What counts as a problem after a run; and that a fault which did not happen is one."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

import pytest
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint
from conftest import ASYNCIO
from worlds import Lab, World, found, three_times, without_native

from pysagas import Commit, CompensationFailed, Parallel, Saga, SagaScope, Step, saga
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
from pysagas.testing._run import TrialRun
from pysagas.testing._verdict import UNKNOWN, all_differences, judge, same
from pysagas.testing._watched import watched

pytestmark = pytest.mark.anyio

on_asyncio = pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)

A = Place("action", (0,), "a")


def one_step(world):
    return Saga([world.step("a")])


def two_steps(world):
    return Saga([world.step("a"), world.step("b")])


async def problem_of(build, *faults, commits=0):
    """What is wrong after a run with these faults; None where nothing is."""
    report = await explore(Lab(build), [Plan(faults, commits)])
    (result,) = report.results
    assert report.ok == result.ok == (result.problem is None)
    return result.problem


# --- the fault that was planned is the fault that happened -------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        Fault(Place("action", (7,), "a"), FaultKind.FAILS_BEFORE),
        Fault(Place("action", (0,), "other"), FaultKind.FAILS_AFTER),
        Fault(Place("compensation", (0, 0), "a"), FaultKind.RUNS_TWICE),
        Fault(A, FaultKind.CANCELLED, 3),
        Fault(A, FaultKind.CANCELLED, 99),
        Fault(A, FaultKind.CANCELLED),
    ],
    ids=str,
)
async def test_a_fault_that_cannot_happen_is_a_problem(fault):
    """A place that there is not, or a checkpoint that is never reached, proves nothing."""
    assert await problem_of(one_step, fault) == f"the planned fault did not happen: {fault}"


async def test_a_fault_past_a_commit_that_is_not_passed_is_a_problem():
    """The run ends before it comes there."""
    fault = Fault(Place("action", (2,), "b"), FaultKind.FAILS_AFTER)

    def build(world):
        return Saga([world.step("a"), Commit(), world.step("b")])

    assert await problem_of(build, fault) == f"the planned fault did not happen: {fault}"
    assert await problem_of(build, fault, commits=1) is None


async def test_a_fault_that_did_not_happen_is_no_harm():
    """Nothing was left, so the verdict is that it was not tried; something may be left all the same."""
    fault = Fault(Place("action", (7,), "a"), FaultKind.FAILS_BEFORE)

    report = await explore(Lab(one_step), fault)
    assert not report.ok
    assert report.startswith("saga: NOT TRIED in 1 of 1 run\n")

    report = await explore(Lab(lambda world: Saga([Step(world.action("a"))])), fault)
    assert report.startswith("saga: NOT RESTORED after 1 of 1 run\n")
    assert "the planned fault did not happen: a: fails before its effect\n      'a' is left" in report


async def test_the_second_fault_has_to_happen_too():
    """In a saga without groups what comes second is certain."""
    first = Fault(A, FaultKind.FAILS_AFTER)
    second = Fault(Place("action", (1,), "b"), FaultKind.RUNS_TWICE)

    assert await problem_of(two_steps, first, second) == f"the planned fault did not happen: {second}"


async def test_the_second_fault_in_a_group_may_be_passed_by():
    """There the loop decides what comes second: it is counted, and is no problem."""
    first = Fault(Place("action", (0, 0), "a"), FaultKind.FAILS_AFTER)
    second = Fault(Place("action", (0, 1), "b"), FaultKind.CANCELLED, 99)

    def build(world):
        return Saga([Parallel(world.step("a"), world.step("b"))])

    report = await explore(Lab(build), [Plan((first, second))])
    assert report.ok, report
    assert not report.results[0].reached
    assert "(1 did not come to their second fault)" in report

    assert await problem_of(build, second) == f"the planned fault did not happen: {second}"


async def test_what_happened_elsewhere_is_a_problem():
    """By the saga's own report, the fault has to be at the place where it was planned."""
    world = World()
    saga = one_step(world)
    run = TrialRun(
        Trial(saga, state=world.state), watched(saga), Plan((Fault(A, FaultKind.FAILS_AFTER),))
    )
    await run.go()
    assert judge(run, UNKNOWN).ok

    elsewhere = Fault(Place("action", (3,), "a"), FaultKind.FAILS_AFTER)
    run.plan, run.happened = Plan((elsewhere,)), {elsewhere: run.error}
    assert judge(run, UNKNOWN).problem == (
        "a: fails after its effect: the saga's report has no such step at (3,), but None"
    )

    renamed = Fault(Place("action", (0,), "b"), FaultKind.FAILS_AFTER)
    run.plan, run.happened = Plan((renamed,)), {renamed: run.error}
    assert "the saga's report has no such step at (0,), but StepReport(name='a'" in str(
        judge(run, UNKNOWN)
    )


async def test_a_run_without_an_outcome_is_a_problem():
    """Nobody can say then what happened."""
    world = World()
    run = TrialRun(Trial(one_step(world), state=world.state), one_step(world), Plan())

    assert judge(run, UNKNOWN).problem == "the run ended without an outcome, by None"


async def test_a_failure_that_is_replaced_is_a_problem():
    """The saga's report has to have the very failure that was made; a retry may make another of it."""

    async def otherwise(attempt):
        try:
            return await attempt()
        except InjectedFailure:
            raise LookupError("no answer") from None

    report = await explore(Lab(lambda world: Saga([world.step("a", retry=otherwise)])))
    assert report.ok, report

    world = World()
    saga = one_step(world)
    fault = Fault(A, FaultKind.FAILS_AFTER)
    run = TrialRun(Trial(saga, state=world.state), watched(saga), Plan((fault,)))
    await run.go()
    run.happened[fault] = LookupError("another")
    assert judge(run, UNKNOWN).problem == (
        f"a: fails after its effect: the saga's report has {run.error!r} instead"
    )


def retrying(world):
    """A saga whose middleware tries each action three times, as a retry would."""

    async def middleware(effect, call_next):
        return await (three_times(call_next) if effect.kind == "action" else call_next())

    return Saga([world.step("a")], middleware=[middleware])


async def test_a_failure_that_a_middleware_tries_again_is_no_problem():
    """The report has what came of the last attempt, then, which may be another fault."""
    lab = Lab(retrying)
    report = await explore(lab, pairs=True)

    assert report.ok, report
    plan = "a: fails after its effect, then a: cancelled at checkpoint 3"
    assert lab.logs(report)[plan] == "a> a a< a> -a> -a -a<"


# --- cancellations arrive ----------------------------------------------------------------------


def swallowing(world, back=None):
    """A saga whose action goes on after its cancellation."""

    async def action():
        try:
            await checkpoint()
        except BaseException:
            world.log.append("swallowed")
        world.make("a")

    return Saga([Step(action, back, name="a")])


@on_asyncio
async def test_a_swallowed_native_cancellation_is_found():
    """An action that goes on after it lets the task live that was told to end."""
    problem = await problem_of(swallowing, Fault(A, FaultKind.CANCELLED_NATIVELY, 1))

    assert problem == "the cancellation was swallowed: the run went on to its end"


@on_asyncio
async def test_a_second_cancellation_does_not_hide_that_the_first_was_swallowed():
    """The one that comes when the rollback begins reaches the caller, and yet the first did not."""
    lab = Lab(lambda world: swallowing(world, world.back("a")))
    report = await explore(lab, only=lambda fault: fault.kind is FaultKind.CANCELLED_NATIVELY)

    assert found(report) == {"a: cancelled natively at checkpoint 1"}
    (result,) = report.failures
    assert result.problem == "the cancellation was swallowed: the run went on to its end"
    assert isinstance(result.error, asyncio.CancelledError)


@on_asyncio
async def test_a_native_cancellation_that_becomes_a_failure_is_found():
    """The report says what the caller got instead."""

    def build(world):
        async def converting():
            try:
                await checkpoint()
            except BaseException:
                raise LookupError("no answer") from None
            world.make("a")

        return Saga([Step(converting, name="a")])

    assert await problem_of(build, Fault(A, FaultKind.CANCELLED_NATIVELY, 1)) == (
        "the cancellation was swallowed: the run ended with LookupError('no answer')"
    )


async def test_a_cancellation_that_becomes_a_failure_is_found():
    """So is one that is taken for a failure of the service; a scope's, too."""

    def build(world):
        async def converting():
            try:
                await checkpoint()
            except BaseException:
                raise LookupError("no answer") from None
            world.make("a")

        return Saga([Step(converting, world.back("a"), name="a")])

    report = await explore(Lab(build))

    assert without_native(found(report)) == {"a: cancelled at checkpoint 1"}
    assert "the cancellation was swallowed: the run ended with LookupError('no answer')" in report


async def test_a_scope_that_is_cancelled_in_a_rollback_need_not_be_met():
    """The rollback is not interrupted, and nothing waits after it."""
    fault = Fault(Place("compensation", (0,), "a"), FaultKind.CANCELLED, 1)

    assert await problem_of(one_step, fault) is None


async def test_a_failed_compensation_goes_over_a_cancellation():
    """The caller gets CompensationFailed then, which is no swallowing."""
    cancelled = Fault(A, FaultKind.CANCELLED, 2)
    failing = Fault(Place("compensation", (0,), "a"), FaultKind.FAILS_BEFORE)

    assert await problem_of(one_step, cancelled, failing) is None


async def test_an_action_that_shields_its_wait_may_fail_after_a_cancellation():
    """The failure ends the run before anything could meet the cancellation: nothing swallowed it."""

    def build(world):
        async def shielded():
            await cancel_shielded_checkpoint()
            world.make("a")

        return Saga([Step(shielded, world.back("a"), name="a")])

    lab = Lab(build)
    only = (FaultKind.CANCELLED, FaultKind.FAILS_AFTER)
    report = await explore(lab, pairs=True, only=lambda fault: fault.kind in only)

    assert report.ok, report
    plan = "a: cancelled at checkpoint 1, then a: fails after its effect"
    assert lab.logs(report)[plan] == "a -a> -a -a<"


# --- whose that is -----------------------------------------------------------------------------


def nothing():
    """Takes nothing back."""


async def problem_without_a_fault(build, **options):
    report = await explore(Lab(build, **options))
    (result,) = [result for result in report.failures if not result.plan.faults]
    return result.problem


async def test_a_missing_compensation_is_located():
    """A step that completed, and that nothing takes back, is named."""

    def build(world):
        return Saga([Step(world.action("a"), name="a"), world.step("b")])

    assert await problem_without_a_fault(build) == (
        "not taken back; a completed, and has no compensation"
    )


async def test_several_missing_compensations_are_located():
    """Each of them; what is before a commit is not to be taken back."""

    def build(world):
        bare = [Step(world.action(name), name=name) for name in "abc"]
        return Saga([bare[0], Commit(), *bare[1:]])

    report = await explore(Lab(build))

    (result,) = [result for result in report.failures if result.plan == Plan(commits=1)]
    assert result.problem == "not taken back; b, c completed, and have no compensation"


async def test_a_compensation_that_leaves_something_is_located():
    """The last one after which the state is not what it was before the step."""

    def build(world):
        return Saga([world.step("a"), Step(world.action("b"), nothing, name="b"), world.step("c")])

    assert await problem_without_a_fault(build) == (
        "not taken back; what takes back b has left something"
    )


async def test_an_effect_outside_of_the_steps_is_located():
    """It is said after which step it came."""

    def build(world):
        @saga
        async def tested(scope):
            await scope.step(world.step("a"))
            world.make("b")
            await scope.step(world.step("c"))

        return tested

    assert await problem_without_a_fault(build) == (
        "not taken back; something that is no step has changed it after a"
    )


def in_a_group(world):
    return Saga([Parallel(world.step("a"), Step(world.action("b"), nothing, name="b"))])


def before_everything(world):
    @saga
    async def tested(scope):
        world.make("b")
        await scope.step(world.step("a"))

    return tested


def on_rollback(world):
    @saga
    async def tested(scope):
        await scope.step(world.step("a"))
        world.make("b")
        scope.on_rollback(nothing)

    return tested


@pytest.mark.parametrize("build", [in_a_group, before_everything, on_rollback])
async def test_where_nobody_can_tell_nobody_is_blamed(build):
    """Members change the state together; and what is no step has no place."""
    assert await problem_without_a_fault(build) == "not taken back"


# --- what is left ------------------------------------------------------------------------------


async def test_a_compensation_that_assumes_completion_is_found():
    """It takes back what was never done: after a failure before the effect, and a cancellation there."""

    def trial():
        counts = {"stock": 5}

        async def take():
            await checkpoint()
            counts["stock"] = 4

        async def put_back():
            counts["stock"] += 1

        return Trial(Saga([Step(take, put_back)]), state=lambda: counts)

    report = await explore(trial)

    assert without_native(found(report)) == {
        "take: fails before its effect",
        "take: cancelled at checkpoint 1",
        "taking back take: runs twice",
    }
    assert {result.left for result in report.failures} == {("stock: was 5, is 6",)}


async def test_a_compensation_that_is_not_idempotent_is_found():
    """Called again it fails; nothing is left, but somebody would have to look."""

    def build(world):
        cancelled = []

        def back():
            world.standing.discard("a")
            cancelled.append("a")
            if len(cancelled) > 1:
                raise LookupError("it is gone")

        return Saga([Step(world.action("a"), back)])

    report = await explore(Lab(build))

    assert found(report) == {"taking back a: runs twice"}
    assert report.failures[0].problem == "taking back a failed: LookupError('it is gone')"
    assert report.failures[0].left == ()


async def test_an_action_that_is_not_idempotent_is_found():
    """Done twice it leaves something else, though all of it is taken back."""

    def build(world):
        async def book():
            await checkpoint()
            world.make(f"booking {len(world.standing)}")

        async def cancel():
            world.standing.clear()

        return Saga([Step(book, cancel)])

    report = await explore(Lab(build))

    assert found(report) == {"book: runs twice"}
    (result,) = report.failures
    assert result.problem == "book: done twice, it leaves something else than done once"
    assert result.left == ("'booking 1' is left",)


async def test_an_action_that_is_tried_again_is_held_to_the_same():
    """An answer that was lost once, and a retry, is an action done twice."""

    def build(world):
        async def book():
            world.make(f"booking {len(world.standing)}")

        return Saga([Step(book, world.standing.clear, retry=three_times)])

    report = await explore(Lab(build))

    assert found(report) == {"book: runs twice", "book: fails once, after its effect"}


async def test_an_action_that_refuses_to_run_twice_is_right():
    """It fails then, and is taken back like any other."""

    def build(world):
        async def book():
            if "a" in world.standing:
                raise LookupError("booked already")
            world.make("a")

        return Saga([Step(book, world.back("a"))])

    report = await explore(Lab(build))

    assert report.ok, report


async def test_a_repeat_that_makes_a_later_step_fail_is_right():
    """Where the saga fails by itself then, there is no end to compare; all is taken back."""

    def build(world):
        async def book():
            world.make(f"booking {len(world.standing)}")

        async def pay():
            if len(world.standing) > 1:
                raise LookupError("booked twice")

        return Saga([Step(book, world.standing.clear), Step(pay)])

    assert await problem_of(build, Fault(Place("action", (0,), "book"), FaultKind.RUNS_TWICE)) is None


async def test_a_repeat_that_fails_is_not_compared():
    """An action that refuses the second request, and a saga that goes on without it, may end otherwise."""

    def build(world):
        async def book():
            if "a" in world.standing:
                raise LookupError("booked already")
            world.make("a")

        @saga
        async def order(scope: SagaScope) -> None:
            try:
                await scope.step(book, compensation=world.back("a"))
            except LookupError:
                await scope.step(world.step("b"))

        return order

    assert await problem_of(build, Fault(Place("action", (0,), "book"), FaultKind.RUNS_TWICE)) is None


async def test_what_differs_each_time_is_not_compared_after_a_repeat():
    """Where two runs without a fault end differently, so may one in which an action runs twice."""
    numbers = iter(range(10**6))

    def build(world):
        async def book():
            world.make(f"booking {next(numbers)}")

        return Saga([Step(book, world.standing.clear)])

    report = await explore(Lab(build))

    assert report.ok, report
    (note,) = report.notes
    assert note.startswith(
        "Not checked: whether what runs twice leaves what it leaves when it runs once, since two runs "
        "without a fault ended differently: 'booking 0' is gone"
    )
    assert note in report


async def test_an_effect_outside_of_every_step_is_found():
    """What no step has done no step takes back, whatever the fault."""

    def build(world):
        @saga
        async def order(scope: SagaScope) -> None:
            await scope.step(world.action("a"), compensation=world.back("a"))
            world.standing.add("outside")

        return order

    report = await explore(Lab(build))

    assert "no fault, taken back at its end" in found(report)
    assert "'outside' is left" in report


# --- what cannot be taken back is told ---------------------------------------------------------


async def test_a_compensation_that_is_made_to_fail_is_reported():
    """Not everything is restored then: that is right, if the caller is told."""
    report = await explore(Lab(two_steps), only=lambda fault: fault.place.kind == "compensation")

    assert report.ok, report
    assert {str(result.plan) for result in report.results if result.reported} == {
        "taking back a: fails",
        "taking back b: fails",
    }
    assert "(in 2 of them a compensation was made to fail: that was reported)" in report


async def test_a_failed_compensation_that_is_not_told_is_a_problem():
    """A middleware that makes another exception of it hides what has to be mended."""

    async def hiding(effect, call_next):
        try:
            return await call_next()
        except CompensationFailed:
            raise LookupError("nothing to see") from None

    def build(world):
        return Saga([world.step("a")], middleware=[hiding])

    failing = Fault(A, FaultKind.FAILS_AFTER)
    failing_too = Fault(Place("compensation", (0,), "a"), FaultKind.FAILS_BEFORE)
    assert await problem_of(build, failing, failing_too) == (
        "a compensation failed, but the caller got LookupError('nothing to see')"
    )


async def test_what_stops_at_a_failed_compensation_is_told_too():
    """With ``"stop"``, the failure is in the report, and the others are not asked."""
    lab = Lab(lambda world: Saga([world.step("a"), world.step("b")], on_compensation_failure="stop"))
    report = await explore(lab)

    assert report.ok, report
    assert lab.logs(report)["taking back b: fails"] == "a> a a< b> b b<"


# --- states ------------------------------------------------------------------------------------


class Odd:
    """What cannot be compared."""

    def __eq__(self, other):
        raise NotImplementedError("compared")

    __hash__ = None


class Vague:
    """What gives no answer when it is compared."""

    def __eq__(self, other):
        return self

    __hash__ = None

    def __bool__(self):
        raise ValueError("ambiguous")


@pytest.mark.parametrize("state", [Odd(), Vague()], ids=["fails", "gives no answer"])
def test_states_that_cannot_be_compared(state):
    """They are refused, with what they should be."""
    with pytest.raises(CannotExplore, match=r"cannot be compared by ==: .*return plain values") as info:
        same(state, state)
    assert isinstance(info.value.__cause__, NotImplementedError | ValueError)


class Row(dict):
    """A dict that is compared in its own way, by more than it shows."""

    version = 0

    def __eq__(self, other):
        return super().__eq__(other) and self.version == other.version

    __hash__ = None


def test_a_difference_that_does_not_show_is_a_difference():
    """Where two states differ there is a line that says so, though it may say the same of both."""
    one, other = OrderedDict(a=1, b=2), OrderedDict(b=2, a=1)
    assert list(all_differences(one, other)) == [f"was {one!r}, is {other!r}"]

    row = Row(a=1)
    row.version = 1
    assert list(all_differences(Row(a=1), row)) == ["was {'a': 1}, is {'a': 1}"]


async def test_an_order_that_is_not_restored_is_found():
    """Two dicts with the same items in another order may differ."""

    def trial():
        queue = OrderedDict(a=1, b=2)

        async def move():
            queue.move_to_end("a")

        async def leave():
            """Takes nothing back."""

        return Trial(Saga([Step(move, leave)]), state=lambda: queue)

    report = await explore(trial)

    assert found(report) >= {"no fault, taken back at its end", "move: fails after its effect"}
    assert "move: fails before its effect" not in found(report)
    assert f"was {OrderedDict(a=1, b=2)!r}, is {OrderedDict(b=2, a=1)!r}" in report


async def test_what_only_its_own_comparison_sees_is_found():
    """A state says by its own ``==`` whether it is restored."""

    def trial():
        row = Row(stock=5)

        async def touch():
            row.version += 1

        return Trial(Saga([Step(touch)]), state=lambda: row)

    report = await explore(trial)

    assert found(report) >= {"no fault, taken back at its end", "touch: fails after its effect"}
    assert "was {'stock': 5}, is {'stock': 5}" in report


def test_differences_are_asked_for_only_where_there_are_any():
    """Equal states have none, of whatever kind they are."""
    assert list(all_differences(1, 1.0)) == []
    assert list(all_differences(1, 2)) == ["was 1, is 2"]
