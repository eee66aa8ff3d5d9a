"""Nothing is lost, whoever interrupts, however often, wherever the saga stands (G6, G8, G9)."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
import trio
from anyio import (
    CancelScope,
    Event,
    create_task_group,
    fail_after,
    from_thread,
    get_cancelled_exc_class,
    move_on_after,
    sleep_forever,
)
from anyio.lowlevel import checkpoint
from conftest import ASYNCIO
from helpers import (
    GROUPED,
    SEQUENCES,
    TRIO,
    AsyncioTimeout,
    Boom,
    Crash,
    Interruption,
    TaskCancel,
    World,
    all_blocked,
    as_data,
    cancel_other_tasks,
    checked_world,
    every_way,
    interrupted,
    leaf_errors,
    never_awaited,
    rounds,
    states,
)

from pysagas import (
    CompensationFailed,
    Parallel,
    Saga,
    SagaScope,
    SagaState,
    Step,
    open_saga,
    outcome_of,
    saga,
)

pytestmark = pytest.mark.anyio

on_asyncio_only = pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
on_trio_only = pytest.mark.parametrize("anyio_backend", TRIO, indirect=True)

# AnyIO wraps the coroutine of a task in another one: cancelled before its first line, the inner one is
# left behind, and Python says so.

LOOPS: list[Any] = [pytest.param(asyncio.new_event_loop, id="asyncio")]
for _backend in ASYNCIO:
    _options = _backend.values[0][1]
    if "loop_factory" in _options:
        LOOPS.append(pytest.param(_options["loop_factory"], id="eager"))
    if "use_uvloop" in _options:
        import uvloop

        LOOPS.append(pytest.param(uvloop.new_event_loop, id="uvloop"))

on_each_loop = pytest.mark.parametrize("loop_factory", LOOPS)


def run(loop_factory: Any, main: Any) -> list[dict[str, Any]]:
    """As `asyncio.run`; gives what was left for the loop's exception handler."""
    unhandled: list[dict[str, Any]] = []
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.get_loop().set_exception_handler(lambda loop, context: unhandled.append(context))
        runner.run(main)
    gc.collect()
    return unhandled


world = pytest.fixture(checked_world)

Work = Callable[[], Awaitable[object]]


# --- every place of an interruption, in every way ------------------------------------------------


def sequence(world: World) -> Work:
    return Saga([world.step("a"), world.step("b"), world.step("c")])


def failing_sequence(world: World) -> Work:
    return Saga([world.step("a"), world.step("b"), world.step("c", after=Boom())])


def failing_short_way(world: World) -> Work:
    """Steps written inline on a scope: an exception takes back its own step at once."""

    @saga
    async def function(scope: SagaScope) -> None:
        for name in "ab":
            action, compensation = world.functions(name)
            await scope.step(action, compensation=compensation)
        action, compensation = world.functions("c", after=Boom())
        await scope.step(action, compensation=compensation)

    return function


def group(world: World) -> Work:
    return Saga([world.step("a"), Parallel(world.member("b"), world.member("c"))])


def limited_group(world: World) -> Work:
    members = [world.member(name) for name in "bcd"]
    return Saga([world.step("a"), Parallel(*members, limit=2)])


def failing_group(world: World) -> Work:
    async def both_have_begun() -> None:
        await world.begun("b").wait()
        await world.begun("d").wait()

    failing = world.member("c", before=both_have_begun, after=Boom())
    group = Parallel(world.member("b"), failing, world.member("d"), on_failure="finish")
    return Saga([world.step("a"), group])


def group_then_failure(world: World) -> Work:
    group = Parallel(*(world.member(name) for name in "bcd"), limit=2)
    return Saga([world.step("a"), group, world.step("e", after=Boom())])


def nested_groups(world: World) -> Work:
    def inner(number: int, *names: str) -> Parallel:
        return Parallel(*(world.step(n, lane=f"out.{number}/in{number}.{n}") for n in names))

    return Saga([world.step("a"), Parallel(inner(1, "b", "c"), inner(2, "d", "e"))])


def nested_groups_then_failure(world: World) -> Work:
    return Saga([nested_groups(world), world.step("f", after=Boom())])


def sagas_in_a_group(world: World) -> Work:
    def inner(number: int, *names: str) -> Saga[..., None]:
        return Saga([world.step(n, lane=f"out.{number}") for n in names])

    return Saga([world.step("a"), Parallel(inner(1, "b", "c"), inner(2, "d", "e"))])


def functions_in_a_group(world: World) -> Work:
    def inner(number: int, *names: str) -> Any:
        @saga
        async def branch(scope: SagaScope) -> None:
            for name in names:
                await scope.step(world.step(name, lane=f"out.{number}"))

        return branch

    return Saga([world.step("a"), Parallel(inner(1, "b", "c"), inner(2, "d", "e"))])


def save_point(world: World) -> Work:
    @saga
    async def function(scope: SagaScope) -> None:
        await scope.step(world.step("a"))
        with contextlib.suppress(Boom):
            async with scope.nested() as nested:
                await nested.step(world.step("b"))
                await nested.step(world.step("c", after=Boom()))
        await scope.step(world.step("d", before=checkpoint))

    return function


def block(world: World) -> Work:
    async def body() -> None:
        async with open_saga() as scope:
            await scope.step(world.step("a"))
            await scope.step(world.step("b"))
            raise Boom

    return body


# Which saga; the moments at which it is interrupted; whether the saga had failed already by then:
# so that a scope finds nothing more to cancel, and the failure goes on.
PLACES = [
    (sequence, "c", False),
    (sequence, "c -b", False),
    (sequence, "c -b -a", False),
    (sequence, "c -c -c -c", False),
    (sequence, "c -c -b -a", False),
    (failing_sequence, "-c", True),
    (failing_sequence, "-a", True),
    (failing_sequence, "-c -b -a", True),
    (failing_sequence, "-b -b -b", True),
    (failing_short_way, "c", False),
    (failing_short_way, "-c", True),
    (failing_short_way, "-c -b -a", True),
    (group, "b", False),
    (group, "b -b -c", False),
    (group, "c -c -b -a", False),
    (limited_group, "b", False),
    (limited_group, "d -d -b -a", False),
    (failing_group, "b", False),
    (failing_group, "d -b -a", False),
    (failing_group, "-b -d", True),
    (failing_group, "-a -a", True),
    (group_then_failure, "-e -b -c -a", True),
    (group_then_failure, "-d -d -d", True),
    (nested_groups, "e -b -d -a", False),
    (nested_groups_then_failure, "-b -e -c -d", True),
    (nested_groups_then_failure, "-f -e -a", True),
    (sagas_in_a_group, "c -c -e -b", False),
    (sagas_in_a_group, "e -d -a", False),
    (functions_in_a_group, "c", False),
    (functions_in_a_group, "e -e -d -a", False),
    (save_point, "c", False),
    (save_point, "-c", True),
    (save_point, "-b -b", True),
    (save_point, "d -d -a", False),
    (block, "b", False),
    (block, "-b -a", True),
]


@pytest.mark.parametrize(
    ("build", "moments", "had_failed"),
    PLACES,
    ids=[f"{build.__name__}@{moments.replace(' ', ',')}" for build, moments, _ in PLACES],
)
@every_way
async def test_g8_g9_nothing_is_lost(
    way: Interruption,
    build: Callable[[World], Work],
    moments: str,
    had_failed: bool,
    world: World,
) -> None:
    """Whatever is interrupted, how and how often: all is taken back, and the cancellation goes on."""
    raised = await interrupted(way, world, moments, build(world))
    assert world.done == []
    assert len(set(moments.split()) - set(world.order)) == 0
    if way.native or not had_failed:
        assert isinstance(raised, get_cancelled_exc_class())
    elif build is save_point:
        # Its function caught the failure, and the scope was cancelled: `d` met that.
        assert isinstance(raised, get_cancelled_exc_class())
    else:
        assert raised is not None
        assert [Boom] == [type(error) for error in leaf_errors(raised)]


@pytest.mark.parametrize("shape", [*SEQUENCES, *GROUPED], ids=lambda shape: shape.__name__)
@every_way
async def test_g8_g9_nothing_is_lost_in_any_shape(way: Interruption, shape: Any, world: World) -> None:
    """A saga interrupted in its action and in each compensation is taken back in reverse order."""
    steps = [world.step(name, lane="out.1") for name in "abc"]
    raised = await interrupted(way, world, "c -c -b -a", lambda: shape(*steps))
    assert isinstance(raised, get_cancelled_exc_class())
    assert world.log == ["a", "b", "-c", "-b", "-a"]


@pytest.mark.parametrize("moments", ["-c", "-c -b -a", "-b -b -b"])
@pytest.mark.parametrize("shape", [*SEQUENCES, *GROUPED], ids=lambda shape: shape.__name__)
@on_asyncio_only
async def test_g8_g9_a_failure_that_yields_to_a_cancellation_is_its_context(
    shape: Any, moments: str, world: World
) -> None:
    """`task.cancel()` during the rollback of a failure: CancelledError, with the failure as context."""
    boom = Boom()
    steps = [world.step("a"), world.step("b"), world.step("c", after=boom)]
    raised = await interrupted(TaskCancel(), world, moments, lambda: shape(*steps))
    assert isinstance(raised, asyncio.CancelledError)
    assert world.log == ["a", "b", "c", "-c", "-b", "-a"]
    contexts = []
    error: BaseException | None = raised
    while error is not None:
        contexts += leaf_errors(error)
        error = error.__context__
    assert boom in contexts


@pytest.mark.parametrize("moments", ["c", "c -c", "c -b -a"])
@every_way
async def test_g8_a_compensation_that_fails_goes_over_a_cancellation(
    way: Interruption, moments: str, world: World
) -> None:
    """A cancelled saga whose rollback fails raises CompensationFailed, and the task is not cancelled."""
    crash = Crash()
    steps = [world.step("a"), world.step("b", back=crash), world.step("c")]
    raised = await interrupted(way, world, moments, lambda: as_data(*steps))
    assert isinstance(raised, CompensationFailed)
    assert raised.failures == (crash,)
    assert isinstance(raised.error, get_cancelled_exc_class())
    assert states(raised.outcome) == {
        "a": "COMPENSATED",
        "b": "COMPENSATION_FAILED",
        "c": "COMPENSATED",
    }


@on_asyncio_only
async def test_g8_a_compensation_that_fails_at_the_moment_of_a_cancellation(world: World) -> None:
    """The task is cancelled in the very step of the loop in which a compensation fails."""
    crash = Crash()

    async def cancel_and_fail() -> None:
        await checkpoint()
        task.cancel()
        raise crash

    steps = [world.step("a"), world.step("b", back=cancel_and_fail), world.step("c", after=Boom())]
    task = asyncio.create_task(as_data(*steps))
    await asyncio.wait([task])
    assert not task.cancelled()
    failed = task.exception()
    assert isinstance(failed, CompensationFailed)
    assert failed.failures == (crash,)
    assert world.log == ["a", "b", "c", "-c", "-a"]


@on_asyncio_only
async def test_g8_asyncio_timeout(world: World) -> None:
    """`asyncio.timeout` rolls the saga back, and raises TimeoutError after that."""
    steps = [world.step("a"), world.step("b")]
    raised = await interrupted(AsyncioTimeout(), world, "b -b -a", lambda: as_data(*steps))
    assert isinstance(raised, asyncio.CancelledError)
    assert world.log == ["a", "-b", "-a"]


@on_asyncio_only
async def test_g8_asyncio_timeout_raises_timeout_error(world: World) -> None:
    """The task whose `asyncio.timeout` passed in a saga goes on, as it does without a saga."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await Saga([world.step("a"), world.step("b", before=sleep_forever)])()
    assert world.log == ["a", "-b", "-a"]
    assert asyncio.current_task().cancelling() == 0


@on_asyncio_only
async def test_g8_wait_for(world: World) -> None:
    """`asyncio.wait_for` rolls the saga back, and raises TimeoutError after that."""
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(Saga([world.step("a"), world.step("b", before=sleep_forever)])(), 0.01)
    assert world.log == ["a", "-b", "-a"]


async def test_g8_fail_after(world: World) -> None:
    """`anyio.fail_after` rolls the saga back, and raises TimeoutError after that."""
    with pytest.raises(TimeoutError), fail_after(0.01):
        await Saga([world.step("a"), world.step("b", before=sleep_forever)])()
    assert world.log == ["a", "-b", "-a"]


async def test_g8_move_on_after_without_a_saga_in_trouble(world: World) -> None:
    """A scope around a saga that was cancelled swallows its own cancellation, as ever."""
    with move_on_after(0.01) as scope:
        await Saga([world.step("a"), world.step("b", before=sleep_forever)])()
    assert scope.cancelled_caught
    assert world.log == ["a", "-b", "-a"]


async def test_g9_a_scope_that_expires_during_the_rollback(world: World) -> None:
    """A deadline that passes while a failed saga is rolled back changes nothing: the failure goes on."""

    async def until_expired() -> None:
        while not scope.cancel_called:
            await anyio.sleep(0.005)

    with pytest.raises(Boom), move_on_after(0.01) as scope:
        await Saga([world.step("a", back=until_expired), world.step("b", after=Boom())])()
    assert world.log == ["a", "b", "-b", "-a"]
    assert not scope.cancelled_caught


async def test_g9_several_scopes_one_after_the_other(world: World) -> None:
    """Scopes that are cancelled one after the other, from the inside out, interrupt no compensation."""
    scopes = [CancelScope() for _ in range(3)]

    def cancelling(scope: CancelScope) -> Work:
        async def cancel() -> None:
            scope.cancel()
            await rounds()

        return cancel

    with scopes[0], scopes[1], scopes[2]:
        steps = [world.step(str(i), back=cancelling(scopes[i])) for i in range(3)]
        await Saga([*steps, world.step("last", before=cancelling(scopes[2]))])()
    assert world.log == ["0", "1", "2", "-last", "-2", "-1", "-0"]
    assert [scope.cancelled_caught for scope in scopes] == [True, False, False]


@on_asyncio_only
async def test_g8_g9_a_native_cancellation_after_that_of_a_scope(world: World) -> None:
    """A scope swallows its own cancellation, not the `task.cancel()` that came during the rollback."""
    scope = CancelScope()

    async def run() -> None:
        with scope:
            await Saga([world.step("a"), world.step("b")])()
        await checkpoint()  # pragma: no cover - must not be reached

    world.moments = ("b", "-b")
    task = asyncio.create_task(run())
    await world.begun("b").wait()
    scope.cancel()
    await world.begun("-b").wait()
    task.cancel()
    await all_blocked()
    world.release("-b")
    await asyncio.wait([task])
    assert task.cancelled()
    assert world.log == ["a", "-b", "-a"]


@on_asyncio_only
@pytest.mark.parametrize("times", [1, 2, 3])
async def test_g8_the_task_is_still_cancelled_afterwards(times: int, world: World) -> None:
    """After the rollback `cancelling()` counts every cancellation, and the task ends cancelled."""
    counted = []

    async def run() -> None:
        try:
            await Saga([world.step("a"), world.step("b")])()
        finally:
            counted.append(asyncio.current_task().cancelling())

    world.moments = ("b", "-b")
    task = asyncio.create_task(run())
    await world.begun("b").wait()
    for _ in range(times):
        task.cancel("stop")
        await all_blocked()
    world.release("-b")
    with pytest.raises(asyncio.CancelledError):
        await task
    assert counted == [times]
    assert task.cancelled()


@on_asyncio_only
async def test_g8_cancelled_before_its_first_line(world: World) -> None:
    """A task that is cancelled before it begins has nothing to take back."""

    task = asyncio.Task(Saga([world.step("a", before=checkpoint)])())
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert world.log == []


# --- places between and inside of steps ----------------------------------------------------------


@pytest.mark.parametrize("shape", SEQUENCES, ids=lambda shape: shape.__name__)
async def test_g6_a_cancellation_between_steps_is_noticed_before_a_sync_action(
    shape: Any, world: World
) -> None:
    """A scope that is cancelled between two steps: a sync action is not begun any more."""
    begun = []

    async def cancel() -> None:
        scope.cancel()

    with CancelScope() as scope:
        await shape(world.step("a", after=cancel), Step(lambda: begun.append("b"), name="b"))
    assert scope.cancelled_caught
    assert begun == []
    assert world.log == ["a", "-a"]


@pytest.mark.parametrize("shape", SEQUENCES, ids=lambda shape: shape.__name__)
async def test_g6_a_step_is_a_checkpoint_exactly_where_its_action_is(shape: Any, world: World) -> None:
    """An async action without a checkpoint runs in a cancelled scope, the next checkpoint is the end."""

    async def cancel() -> None:
        scope.cancel()

    with CancelScope() as scope:
        await shape(world.step("a", after=cancel), world.step("b"), world.step("c", before=checkpoint))
    assert scope.cancelled_caught
    assert world.log == ["a", "b", "-c", "-b", "-a"]


async def test_g6_a_deadline_that_passes_between_two_steps(world: World) -> None:
    """Time that runs out while no step awaits anything cancels the next one that does."""

    async def until_late() -> None:
        while anyio.current_time() < scope.deadline:
            pass

    with move_on_after(0.01) as scope:
        await Saga([world.step("a", after=until_late), world.step("b", before=rounds)])()
    assert scope.cancelled_caught
    assert world.log == ["a", "-b", "-a"]


async def test_g8_an_action_that_cancels_the_scope_around_it(world: World) -> None:
    """An action may cancel the scope that its own saga runs in."""

    async def cancel() -> None:
        scope.cancel()
        await checkpoint()

    with CancelScope() as scope:
        await Saga([world.step("a"), world.step("b", after=cancel)])()
    assert scope.cancelled_caught
    assert world.log == ["a", "b", "-b", "-a"]


@on_asyncio_only
async def test_g8_an_action_that_cancels_its_own_task(world: World) -> None:
    """An action may cancel the task that it runs in."""

    async def cancel() -> None:
        asyncio.current_task().cancel()
        await checkpoint()

    task = asyncio.create_task(as_data(world.step("a"), world.step("b", after=cancel)))
    await asyncio.wait([task])
    assert task.cancelled()
    assert world.log == ["a", "b", "-b", "-a"]


@on_asyncio_only
async def test_g8_cancelled_in_a_last_action_that_does_not_wait(world: World) -> None:
    """A cancellation that no step has noticed does not undo a saga that has completed."""

    async def cancel() -> None:
        asyncio.current_task().cancel()

    async def run() -> None:
        outcomes.append(await Saga([world.step("a", after=cancel)]).run())
        await checkpoint()

    outcomes: list[Any] = []
    task = asyncio.create_task(run())
    await asyncio.wait([task])
    assert task.cancelled()
    assert [outcome.state for outcome in outcomes] == [SagaState.COMPLETED]
    assert world.log == ["a"]


async def swallowing() -> None:
    with contextlib.suppress(get_cancelled_exc_class()):
        await sleep_forever()


async def test_g8_an_action_that_swallows_the_cancellation_of_a_scope(world: World) -> None:
    """A scope's cancellation is a state: swallowed by one action, it meets the next one."""
    with CancelScope() as scope:
        scope.cancel()
        await Saga([world.step("a", before=swallowing), world.step("b", before=checkpoint)])()
    assert scope.cancelled_caught
    assert world.log == ["a", "-b", "-a"]


async def test_g8_a_last_action_that_swallows_the_cancellation(world: World) -> None:
    """Where the last action swallows it, the saga has completed."""
    with CancelScope() as scope:
        scope.cancel()
        outcome = await Saga([world.step("a", before=swallowing)]).run()
    assert outcome.state is SagaState.COMPLETED
    assert world.log == ["a"]


@on_asyncio_only
async def test_g8_an_action_that_swallows_a_native_cancellation(world: World) -> None:
    """A native cancellation that an action swallows is gone, as it is without a saga."""
    task = asyncio.create_task(as_data(world.step("a", before=swallowing), world.step("b")))
    await world.begun("a").wait()
    task.cancel()
    await asyncio.wait([task])
    assert not task.cancelled()
    assert task.cancelling() == 1
    assert world.log == ["a", "b"]


async def test_g4_a_member_that_swallows_its_cancellation_has_completed(world: World) -> None:
    """A member that swallows the cancellation from its sibling's failure is taken back as completed."""
    results = []
    action, _ = world.functions("b", before=swallowing, lane="group.b")

    async def undo(result: str) -> None:
        results.append(result)
        await world.take_back("b")

    async def after_b() -> None:
        await world.begun("b").wait()

    group = Parallel(Step(action, undo=undo, name="b"), world.member("c", before=after_b, after=Boom()))
    with pytest.raises(ExceptionGroup) as caught:
        await Saga([group])()
    assert [Boom] == [type(error) for error in leaf_errors(caught.value)]
    assert results == ["result of b"]
    assert world.done == []


@on_asyncio_only
@pytest.mark.parametrize("shape", [*SEQUENCES, *GROUPED], ids=lambda shape: shape.__name__)
async def test_g4_g8_awaiting_a_cancelled_future(shape: Any, world: World) -> None:
    """A future that is cancelled cancels who awaits it, though nobody cancelled his task."""

    async def await_it() -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    with pytest.raises(asyncio.CancelledError):
        await shape(world.step("a"), world.step("b", before=await_it))
    assert world.log == ["a", "-b", "-a"]
    assert asyncio.current_task().cancelling() == 0


@on_asyncio_only
@pytest.mark.parametrize("on_failure", ["cancel", "finish"])
@pytest.mark.parametrize("limit", [None, 2])
async def test_g4_a_member_that_awaits_a_cancelled_future(
    on_failure: Any, limit: int | None, world: World
) -> None:
    """Such a member makes its group fail, not return: the siblings are cancelled and taken back."""

    async def await_it() -> None:
        await world.begun("c").wait()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    group = Parallel(
        world.member("b", before=await_it),
        world.member("c", before=sleep_forever),
        world.member("d"),
        limit=limit,
        on_failure=on_failure,
    )
    with pytest.raises(asyncio.CancelledError):
        await Saga([world.step("a"), group])()
    assert world.done == []
    assert ("d" in world.order) is (limit is None)


@on_asyncio_only
async def test_g8_a_cancellation_that_yields_to_a_failed_rollback_is_its_context(world: World) -> None:
    """A task that is cancelled while its rollback fails: CompensationFailed goes on, with the rest in it."""
    boom = Boom()
    world.moments = ("-a",)
    steps = [world.step("a", back=Crash()), world.step("b", after=boom)]
    task = asyncio.create_task(Saga(steps)())
    await world.begun("-a").wait()
    task.cancel()
    await all_blocked()
    world.release("-a")
    await asyncio.wait([task])
    error = task.exception()
    assert isinstance(error, CompensationFailed)
    assert error.error is boom
    contexts = [error.__context__]
    while contexts[-1] is not None:
        contexts.append(contexts[-1].__context__)
    assert [asyncio.CancelledError] == [
        type(context) for context in contexts if isinstance(context, asyncio.CancelledError)
    ]


@on_asyncio_only
async def test_g13_a_members_own_cancellation_goes_on_as_it_is(world: World) -> None:
    """Where a member was cancelled by itself, that very exception is what the caller gets."""
    own = asyncio.CancelledError("own")
    with pytest.raises(asyncio.CancelledError) as caught:
        await Saga([Parallel(world.member("a", before=own))])()
    assert caught.value is own


@never_awaited
@on_asyncio_only
async def test_g4_members_cancelled_one_by_one_before_their_first_line(world: World) -> None:
    """Members whose tasks somebody cancels before they begin: the group does not return normally."""
    this = asyncio.current_task()

    async def cancel_members() -> None:
        asyncio.get_running_loop().call_soon(lambda: cancel_other_tasks(but=known))

    known = tuple(asyncio.all_tasks())
    assert this in known
    with pytest.raises(asyncio.CancelledError):
        await Saga(
            [world.step("a", after=cancel_members), Parallel(world.member("b"), world.member("c"))]
        )()
    gc.collect()
    assert world.log == ["a", "-a"]


@on_asyncio_only
@pytest.mark.parametrize("cancel_first", [True, False])
@pytest.mark.parametrize("on_failure", ["cancel", "finish"])
@pytest.mark.parametrize("limit", [None, 1])
async def test_g8_a_group_cancelled_at_the_moment_a_member_fails(
    cancel_first: bool, on_failure: Any, limit: int | None, world: World
) -> None:
    """A task cancelled in the step of the loop in which a member fails is cancelled, not only failed."""
    boom = Boom()

    async def fail() -> None:
        await checkpoint()
        loop = asyncio.get_running_loop()
        if cancel_first:
            task.cancel()
        else:
            loop.call_soon(task.cancel)
        raise boom

    group = Parallel(
        world.member("b", after=fail), world.member("c"), limit=limit, on_failure=on_failure
    )
    task = asyncio.create_task(as_data(world.step("a"), group))
    await asyncio.wait([task])
    assert task.cancelled()
    assert world.done == []


async def test_g8_a_scope_cancelled_at_the_moment_a_member_fails(world: World) -> None:
    """The cancellation of the scope goes over the failure, on every loop; the failure is its context."""
    boom = Boom()
    raised: list[BaseException] = []

    async def fail() -> None:
        await checkpoint()
        scope.cancel()
        raise boom

    group = Parallel(world.member("b", after=fail), world.member("c", before=sleep_forever))
    with CancelScope() as scope:
        try:
            await Saga([world.step("a"), group])()
        except BaseException as error:
            raised.append(error)
            raise
    assert scope.cancelled_caught
    assert isinstance(raised[0], get_cancelled_exc_class())
    assert isinstance(raised[0].__context__, ExceptionGroup)
    assert raised[0].__context__.exceptions == (boom,)
    assert world.done == []


@pytest.mark.parametrize("shape", SEQUENCES, ids=lambda shape: shape.__name__)
async def test_g5_an_action_that_raises_a_group_of_its_own(shape: Any, world: World) -> None:
    """A group that an action raises is the step's own exception, and goes on untouched."""
    group = ExceptionGroup("mine", [Boom(), OSError()])
    with pytest.raises(ExceptionGroup) as caught:
        await shape(world.step("a"), world.step("b", after=group))
    assert caught.value is group
    assert world.log == ["a", "b", "-b", "-a"]


async def test_g5_an_action_with_a_task_group_of_its_own(world: World) -> None:
    """An action may hold a task group, whose tasks fail while the saga is cancelled."""

    async def work() -> None:
        async with create_task_group() as tasks:
            tasks.start_soon(sleep_forever)
            tasks.start_soon(fail_when_cancelled)

    async def fail_when_cancelled() -> None:
        try:
            await sleep_forever()
        finally:
            raise Boom

    with pytest.raises(BaseException) as caught, CancelScope() as scope:  # noqa: PT012
        scope.cancel()
        await Saga([world.step("a"), world.step("b", before=work)])()
    assert Boom in [type(error) for error in leaf_errors(caught.value)]
    assert world.log == ["a", "-b", "-a"]


async def test_g9_a_compensation_may_use_scopes_and_tasks_of_its_own(world: World) -> None:
    """In a cancelled scope a compensation can wait, time out, and start tasks."""
    did = []

    async def back() -> None:
        with move_on_after(0.001) as limit:
            await sleep_forever()
        did.append(limit.cancelled_caught)
        async with create_task_group() as tasks:
            tasks.start_soon(rounds)
            tasks.start_soon(rounds)
        did.append("tasks")

    with CancelScope() as scope:
        scope.cancel()
        await Saga([world.step("a", back=back), world.step("b", before=checkpoint)])()
    assert did == [True, "tasks"]
    assert world.log == ["a", "-b", "-a"]


@pytest.mark.parametrize("in_group", [False, True], ids=["sequence", "group"])
@every_way
async def test_g8_a_saga_in_the_clean_up_of_a_generator_that_is_closed(
    way: Interruption, in_group: bool, world: World
) -> None:
    """While a GeneratorExit is handled around it, a saga is cancelled and rolled back as anywhere."""
    parts: list[Any] = [world.member("b"), world.member("c")]

    async def numbers() -> Any:
        try:
            yield 1
        finally:
            await Saga([world.step("a"), *([Parallel(*parts)] if in_group else parts)])()

    async def work() -> None:
        closing = numbers()
        await anext(closing)
        await closing.aclose()

    raised = await interrupted(way, world, "c -c -a", work)
    assert isinstance(raised, get_cancelled_exc_class())
    assert world.done == []


@never_awaited
@on_asyncio_only
async def test_g9_a_block_in_a_generator_that_is_closed_while_all_is_cancelled(
    world: World,
) -> None:
    """The unwinding after `aclose` is started again too, where its task is gone before its first line."""
    known = asyncio.all_tasks()

    async def numbers() -> Any:
        async with open_saga() as scope:
            await scope.step(world.step("a"))
            yield 1

    closing = numbers()
    await anext(closing)
    loop = asyncio.get_running_loop()
    loop.call_soon(lambda: cancel_other_tasks(but=tuple(known)))
    await closing.aclose()
    assert world.log == ["a", "-a"]
    gc.collect()


@never_awaited
@on_each_loop
@pytest.mark.parametrize("in_group", [False, True], ids=["sequence", "group"])
def test_g9_cancel_all_in_the_clean_up_of_a_generator_that_is_closed(
    loop_factory: Any, in_group: bool, world: World
) -> None:
    """There too: all tasks are cancelled before the unwinding's first line, and nothing is lost."""

    async def cancel_all() -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: cancel_other_tasks(but=(known[0],)))

    async def numbers() -> Any:
        try:
            yield 1
        finally:
            members = [world.member("b"), world.member("c")]
            parts: list[Any] = [Parallel(*members)] if in_group else members
            last = world.step("d", before=cancel_all, after=Boom())
            await Saga([world.step("a"), *parts, last])()

    async def work() -> None:
        closing = numbers()
        await anext(closing)
        await closing.aclose()

    async def main() -> None:
        known.append(asyncio.current_task())
        task = asyncio.create_task(work())
        await asyncio.wait([task])
        assert task.cancelled()

    known: list[asyncio.Task[Any] | None] = []
    run(loop_factory, main())
    assert world.done == []


# --- shield and blocking ------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("moments", ["b", "b b b", "b b -b -a"])
@pytest.mark.parametrize("in_group", [False, True])
async def test_g6_shield_waits_for_the_action(
    way: Interruption, moments: str, in_group: bool, world: World
) -> None:
    """A shielded action runs to its end whatever comes, and is taken back with its result known."""
    results = []
    action, _ = world.functions("b", lane="group.b")

    async def undo(result: str) -> None:
        results.append(result)
        await world.take_back("b")

    shielded: Any = Step(action, undo=undo, name="b", shield=True)
    part = Parallel(shielded) if in_group else shielded
    raised = await interrupted(way, world, moments, lambda: as_data(world.step("a"), part))
    assert isinstance(raised, get_cancelled_exc_class())
    assert results == ["result of b"]
    assert world.log == ["a", "b", "-b", "-a"]


@every_way
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("in_group", [False, True])
async def test_g6_blocking_waits_for_the_thread(
    way: Interruption, times: int, in_group: bool, world: World
) -> None:
    """A thread is waited for under every cancellation, and its work taken back with the result."""
    go_on = threading.Event()
    log: list[str] = []

    def action() -> str:
        from_thread.run_sync(world.begun("b").set)
        assert go_on.wait(10)
        log.append("b")
        return "result"

    def undo(result: str) -> None:
        assert threading.current_thread() is not threading.main_thread()
        log.append(f"-{result}")

    step: Any = Step(action, undo=undo, name="b", blocking=True)
    part = Parallel(step) if in_group else step
    moments = " ".join(["b"] * times)

    async def work() -> None:
        await as_data(world.step("a"), part)

    async with create_task_group() as tasks:

        async def release() -> None:
            await world._released["b"].wait()
            go_on.set()

        tasks.start_soon(release)
        raised = await interrupted(way, world, moments, work)
    assert isinstance(raised, get_cancelled_exc_class())
    assert log == ["b", "-result"]
    assert world.log == ["a", "-a"]


@every_way
async def test_g6_g9_a_blocking_compensation_is_waited_for(way: Interruption, world: World) -> None:
    """A compensation in a thread is not abandoned when the saga is cancelled meanwhile."""
    go_on = threading.Event()
    log = []

    def compensation() -> None:
        from_thread.run_sync(world.begun("-b").set)
        assert go_on.wait(10)
        log.append("-b")

    async def fail() -> None:
        raise Boom

    steps = [
        world.step("a"),
        Step(lambda: log.append("b"), compensation, name="b", blocking=True),
        Step(fail, name="c"),
    ]
    async with create_task_group() as tasks:

        async def release() -> None:
            await world._released["-b"].wait()
            go_on.set()

        tasks.start_soon(release)
        raised = await interrupted(way, world, "-b -b", lambda: as_data(*steps))
    assert isinstance(raised, asyncio.CancelledError if way.native else Boom)
    assert log == ["b", "-b"]
    assert world.log == ["a", "-a"]


@every_way
@pytest.mark.parametrize("in_group", [False, True])
async def test_g8_g13_a_shielded_action_that_fails_after_a_cancellation(
    way: Interruption, in_group: bool, world: World
) -> None:
    """The cancellation goes on; what the action raised meanwhile is its context, and in the outcome."""
    boom = Boom()
    step: Any = world.member("b", shield=True, before=boom)
    raised = await interrupted(
        way,
        world,
        "b",
        lambda: as_data(world.step("a"), Parallel(step) if in_group else step),
    )
    assert isinstance(raised, get_cancelled_exc_class())
    outcome = outcome_of(raised)
    assert outcome is not None
    assert [report.error for report in outcome.steps] == [None, boom]
    assert world.log == ["a", "-b", "-a"]


async def test_g6_a_cancellation_already_delivered_is_noticed_before_a_shielded_action(
    world: World,
) -> None:
    """What need not begin does not: in a cancelled scope a shielded or blocking action is not begun."""
    began: list[str] = []
    with CancelScope() as scope:
        scope.cancel()
        await Saga([world.step("a", shield=True)])()
    assert scope.cancelled_caught
    with CancelScope() as scope:
        scope.cancel()
        await Saga([Step(lambda: began.append("b"), blocking=True)])()
    assert scope.cancelled_caught
    assert (world.log, began) == ([], [])


async def test_g6_a_timeout_within_a_shield_counts(world: World) -> None:
    """A shield keeps the outside away, not the step's own timeout."""
    with pytest.raises(TimeoutError):
        await Saga(
            [world.step("a"), world.step("b", before=sleep_forever, shield=True, timeout=0.01)]
        )()
    assert world.log == ["a", "-b", "-a"]


# --- who goes over whom -------------------------------------------------------------------------

STARTED_BY = {
    "failure": Boom,
    "cancellation": None,
    "KeyboardInterrupt": KeyboardInterrupt,
    "SystemExit": SystemExit,
}
COMPENSATION = {
    "returns": None,
    "fails": Crash,
    "KeyboardInterrupt": KeyboardInterrupt,
    "SystemExit": SystemExit,
}
# What started the rollback, what the compensation does → what goes on, and where the one that
# yields is found.
PRIORITY = [
    ("failure", "returns", "start", "-"),
    ("failure", "fails", "CompensationFailed", "error"),
    ("failure", "KeyboardInterrupt", "compensation", "cause.error"),
    ("failure", "SystemExit", "compensation", "cause.error"),
    ("cancellation", "returns", "start", "-"),
    ("cancellation", "fails", "CompensationFailed", "error"),
    ("cancellation", "KeyboardInterrupt", "compensation", "cause.error"),
    ("cancellation", "SystemExit", "compensation", "cause.error"),
    ("KeyboardInterrupt", "returns", "start", "-"),
    ("KeyboardInterrupt", "fails", "start", "cause"),
    ("KeyboardInterrupt", "SystemExit", "start", "cause"),
    ("SystemExit", "returns", "start", "-"),
    ("SystemExit", "fails", "start", "cause"),
    ("SystemExit", "KeyboardInterrupt", "start", "cause"),
]


@pytest.mark.parametrize("in_group", [False, True], ids=["sequence", "group"])
@pytest.mark.parametrize(("started_by", "compensation", "goes_on", "yields"), PRIORITY)
async def test_g8_priority(
    in_group: bool,
    started_by: str,
    compensation: str,
    goes_on: str,
    yields: str,
    world: World,
) -> None:
    """KeyboardInterrupt and SystemExit over CompensationFailed over cancellation over failure."""
    scope = CancelScope()
    start_type, back_type = STARTED_BY[started_by], COMPENSATION[compensation]
    start = start_type("start") if start_type else None
    back = back_type("back") if back_type else None

    async def begin() -> None:
        if start is not None:
            raise start
        scope.cancel()
        await checkpoint()

    first: Any = world.member("b", back=back)
    last = world.step("c", before=begin)
    parts = [world.step("a"), Parallel(first) if in_group else first, last]
    raised: list[BaseException] = []
    with scope:
        try:
            await Saga(parts)()
        except get_cancelled_exc_class() as error:
            raised.append(error)
            raise
        except BaseException as error:
            raised.append(error)
    (error,) = raised
    begun = start if start is not None else outcome_of(error).steps[2].error
    assert begun is not None
    if goes_on == "start":
        assert error is begun
    elif goes_on == "compensation":
        assert error is back
    else:
        assert isinstance(error, CompensationFailed)
    if back is None:
        assert not isinstance(error.__cause__, CompensationFailed)
    else:
        failed = error if yields == "error" else error.__cause__
        assert isinstance(failed, CompensationFailed)
        assert failed.error is begun
        assert failed.failures == (back,)
        assert isinstance(failed.__cause__, BaseExceptionGroup)
        assert failed.__cause__.exceptions == (begun, back)
        assert failed.outcome is outcome_of(error)
    outcome = outcome_of(error)
    assert outcome is not None
    assert outcome.error is error
    assert outcome.state is (SagaState.COMPENSATED if back is None else SagaState.FAILED)
    assert world.done == ([] if back is None else ["b"])


@on_asyncio_only
@pytest.mark.parametrize(
    ("start", "back", "expected"),
    [
        (Boom, None, asyncio.CancelledError),
        (Boom, Crash, CompensationFailed),
        (KeyboardInterrupt, None, KeyboardInterrupt),
        (KeyboardInterrupt, Crash, KeyboardInterrupt),
        (SystemExit, None, SystemExit),
        (Boom, SystemExit, SystemExit),
    ],
)
async def test_g8_priority_with_a_late_cancellation(
    start: type[BaseException],
    back: type[BaseException] | None,
    expected: type[BaseException],
    world: World,
) -> None:
    """The same where `task.cancel()` comes during the rollback."""
    error = start("start")

    async def run() -> None:
        try:
            await Saga(
                [
                    world.step("a"),
                    world.step("b", back=back and back("back")),
                    world.step("c", after=error),
                ]
            )()
        except BaseException as raised:
            caught.append(raised)

    caught: list[BaseException] = []
    world.moments = ("-c",)
    task = asyncio.create_task(run())
    await world.begun("-c").wait()
    task.cancel()
    await all_blocked()
    world.release("-c")
    await asyncio.wait([task])
    assert task.exception() is None
    assert [expected] == [type(raised) for raised in caught]
    if expected is asyncio.CancelledError:
        assert caught[0].__context__ is error
    assert world.done == ([] if back is None else ["b"])


@pytest.mark.parametrize("order", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("on_failure", ["cancel", "finish"])
async def test_g8_an_order_to_quit_in_a_member(
    order: type[BaseException], limit: int | None, on_failure: Any, world: World
) -> None:
    """A member's KeyboardInterrupt comes out as it is, wrapped in nothing, when all is taken back."""
    quitting = order("member")

    async def when_begun() -> None:
        await world.begun("c").wait()
        raise quitting

    group = Parallel(
        world.member("b", before=when_begun),
        world.member("c", before=sleep_forever),
        limit=limit,
        on_failure=on_failure,
    )
    with pytest.raises(order) as caught:
        await Saga([world.step("a"), group])()
    assert caught.value is quitting
    assert world.done == []
    assert states(outcome_of(quitting)) == dict.fromkeys("abc", "COMPENSATED")


async def test_g8_g13_a_members_failure_beside_an_order_to_quit_is_its_context(
    world: World,
) -> None:
    """A failure that yields to a sibling's SystemExit is found in the context of that."""
    quitting, boom = SystemExit(3), Boom()

    async def when_begun() -> None:
        await world.begun("b").wait()

    async def fail_when_cancelled() -> None:
        try:
            await sleep_forever()
        finally:
            raise boom

    group = Parallel(
        world.member("b", before=fail_when_cancelled),
        world.member("c", before=when_begun, after=quitting),
    )
    with pytest.raises(SystemExit) as caught:
        await Saga([group])()
    assert caught.value is quitting
    assert boom in leaf_errors(caught.value.__context__)
    assert world.done == []


async def test_g8_g13_what_yields_is_not_lost_where_the_caller_handles_something(
    world: World,
) -> None:
    """A saga that is run while its caller handles an exception: what yielded is still in the context."""
    quitting, boom = SystemExit(3), Boom()

    async def when_begun() -> None:
        await world.begun("b").wait()

    async def fail_when_cancelled() -> None:
        try:
            await sleep_forever()
        finally:
            raise boom

    group = Parallel(
        world.member("b", before=fail_when_cancelled),
        world.member("c", before=when_begun, after=quitting),
    )
    with pytest.raises(SystemExit) as caught:
        try:
            raise Crash
        except Crash:
            await Saga([group])()
    assert caught.value is quitting
    assert boom in leaf_errors(caught.value.__context__)


@pytest.mark.parametrize("shape", SEQUENCES, ids=lambda shape: shape.__name__)
@pytest.mark.parametrize("order", [KeyboardInterrupt, SystemExit])
async def test_g8_an_order_to_quit_in_a_compensation_does_not_stop_the_others(
    order: type[BaseException], shape: Any, world: World
) -> None:
    """What a compensation raises, even to quit, leaves no other one out."""
    quitting = order("compensation")
    steps = [world.step("a"), world.step("b", back=quitting), world.step("c", after=Boom())]
    with pytest.raises(order) as caught:
        await shape(*steps)
    assert caught.value is quitting
    assert world.log == ["a", "b", "c", "-c", "-a"]


# --- the end of the loop ------------------------------------------------------------------------


@on_each_loop
def test_g8_the_end_of_asyncio_run(loop_factory: Any, world: World) -> None:
    """A task that is pending when `asyncio.run` ends is rolled back, and nothing is left over."""

    async def main() -> None:
        group = Parallel(world.member("b"), world.member("c", before=sleep_forever))
        tasks.append(asyncio.create_task(Saga([world.step("a"), group])()))
        await world.begun("c").wait()

    tasks: list[asyncio.Task[None]] = []
    assert run(loop_factory, main()) == []
    assert tasks[0].cancelled()
    assert world.done == []


@on_each_loop
def test_g9_cancel_all_during_the_rollback_cuts_at_most_the_running_compensation(
    loop_factory: Any, world: World
) -> None:
    """The end of `asyncio.run` in mid-rollback: the compensation that runs is cut, the others run."""

    async def main() -> None:
        steps = [
            world.step("a"),
            world.step("b"),
            world.step("c", back=sleep_forever),
            world.step("d", after=Boom()),
        ]
        tasks.append(asyncio.create_task(Saga(steps)()))
        await world.begun("-c").wait()

    tasks: list[asyncio.Task[None]] = []
    (context,) = run(loop_factory, main())
    failed = context["exception"]
    assert isinstance(failed, CompensationFailed)
    assert isinstance(failed.error, Boom)
    assert [asyncio.CancelledError] == [type(error) for error in failed.failures]
    assert states(failed.outcome) == {
        "a": "COMPENSATED",
        "b": "COMPENSATED",
        "c": "COMPENSATION_FAILED",
        "d": "COMPENSATED",
    }
    assert world.log == ["a", "b", "c", "d", "-d", "-b", "-a"]


@on_each_loop
@pytest.mark.parametrize("limit", [None, 2])
def test_g9_cancel_all_during_the_rollback_of_a_group(
    limit: int | None, loop_factory: Any, world: World
) -> None:
    """The same in a group: its members that wait for their turn, and the steps before it, are run."""

    async def main() -> None:
        members = [world.member(name, back=back) for name, back in backs.items()]
        steps = [
            world.step("a"),
            Parallel(*members, limit=limit),
            world.step("e", after=Boom()),
        ]
        tasks.append(asyncio.create_task(Saga(steps)()))
        await world.begun("-c").wait()

    backs = {"b": rounds, "c": sleep_forever, "d": rounds}
    if limit is not None:
        backs["b"] = sleep_forever
    tasks: list[asyncio.Task[None]] = []
    (context,) = run(loop_factory, main())
    failed = context["exception"]
    assert isinstance(failed, CompensationFailed)
    found = states(failed.outcome)
    assert found.pop("c") == "COMPENSATION_FAILED"
    if limit is not None:
        assert found.pop("b") == "COMPENSATION_FAILED"
        assert found == dict.fromkeys("ade", "COMPENSATED")
    assert found["a"] == found["e"] == "COMPENSATED"
    # What had not begun by then was run all the same.
    assert "COMPLETED" not in found.values()


@never_awaited
@on_each_loop
@pytest.mark.parametrize("shape", [*SEQUENCES, *GROUPED], ids=lambda shape: shape.__name__)
def test_g9_cancel_all_before_the_rollback_has_begun(
    loop_factory: Any, shape: Any, world: World
) -> None:
    """The unwinding's task, cancelled before its first line, is started again: nothing is lost."""

    async def cancel_all() -> None:
        this = asyncio.current_task()
        asyncio.get_running_loop().call_soon(lambda: cancel_other_tasks(but=(known[0], this)))

    async def main() -> None:
        known.append(asyncio.current_task())
        last = world.step("c", before=cancel_all, after=Boom())
        with pytest.raises((Boom, ExceptionGroup)):
            await shape(world.step("a"), world.step("b"), last)

    known: list[asyncio.Task[Any] | None] = []
    run(loop_factory, main())
    assert world.log == ["a", "b", "c", "-c", "-b", "-a"]


@never_awaited
@on_each_loop
@pytest.mark.parametrize("limit", [None, 2])
def test_g9_cancel_all_before_the_rollback_of_a_group_has_begun(
    loop_factory: Any, limit: int | None, world: World
) -> None:
    """The same for the tasks that take back a group's members: all are cancelled but the one that waits."""

    async def cancel_all() -> None:
        asyncio.get_running_loop().call_soon(lambda: cancel_other_tasks(but=(known[0],)))

    async def main() -> None:
        known.append(asyncio.current_task())
        group = Parallel(*map(world.member, "bcd"), limit=limit)
        last = world.step("e", back=cancel_all, after=Boom())
        with pytest.raises(Boom):
            await as_data(world.step("a"), group, last)

    known: list[asyncio.Task[Any] | None] = []
    run(loop_factory, main())
    backs = [moment for moment in world.order if moment.startswith("-")]
    assert backs == ["-e", "-b", "-c", "-d", "-a"]
    assert world.done == []


# --- Ctrl-C -------------------------------------------------------------------------------------

SCRIPT = """
import sys

import anyio
from pysagas import Parallel, Saga, Step


def say(*words):
    print(*words, flush=True)


async def act(name):
    say(name)


async def hang(name):
    say(name)
    await anyio.sleep(20)


async def back(name):
    say(f"begin -{name}")
    await anyio.sleep(BACK_SECONDS)
    say(f"-{name}")


main = Saga(
    [
        Step(act, back).bind("a"),
        Parallel(Step(act, back).bind("b")),
        Step(hang, back).bind("c"),
    ]
)

try:
    RUN
except KeyboardInterrupt as error:
    say("KeyboardInterrupt", type(error.__cause__).__name__)
except BaseException as error:
    say(type(error).__name__)
"""
RUNNERS = {
    "asyncio": "import asyncio; asyncio.run(main())",
    "uvloop": "import uvloop; uvloop.run(main())",
    "anyio": "anyio.run(main)",
    "trio": "import trio; trio.run(main)",
}

on_posix = pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to a process")


def interrupt_process(runner: str, seconds: float, moments: list[str]) -> list[str]:
    """Runs the script, sends SIGINT at each of the lines, and gives all lines."""
    script = SCRIPT.replace("RUN", RUNNERS[runner]).replace("BACK_SECONDS", str(seconds))
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={key: value for key, value in os.environ.items() if not key.startswith("COV")},
    )
    lines: list[str] = []
    with process:
        for line in process.stdout:
            lines.append(line.strip())
            if moments and lines[-1] == moments[0]:
                moments = moments[1:]
                process.send_signal(signal.SIGINT)
    return lines


@on_posix
@pytest.mark.parametrize("runner", RUNNERS)
def test_g8_ctrl_c_rolls_back(runner: str) -> None:
    """A Ctrl-C rolls the saga back; KeyboardInterrupt comes out afterwards."""
    lines = interrupt_process(runner, 0, ["c"])
    assert lines[:3] == ["a", "b", "c"]
    assert [line for line in lines if line.startswith("-")] == ["-c", "-b", "-a"]
    assert lines[-1].startswith("KeyboardInterrupt")


@on_posix
@pytest.mark.parametrize("runner", RUNNERS)
def test_g9_a_second_ctrl_c_cuts_at_most_the_running_compensation(runner: str) -> None:
    """A second Ctrl-C, in mid-rollback, cuts at most one compensation; the others run."""
    lines = interrupt_process(runner, 0.3, ["c", "begin -c"])
    ended = [line for line in lines if line.startswith("-")]
    assert ended[-2:] == ["-b", "-a"]
    assert [line for line in lines if line.startswith("begin")] == [
        "begin -c",
        "begin -b",
        "begin -a",
    ]
    assert lines[-1].startswith("KeyboardInterrupt")


# --- closed in the middle -----------------------------------------------------------------------


class Suspended:
    """Awaited, it waits for nobody: for coroutines that no loop runs."""

    def __await__(self) -> Any:
        yield


async def suspend() -> None:
    await Suspended()


def parts_in_doubt(world: World) -> list[Step[..., str]]:
    return [world.step("a"), world.step("b"), world.step("c", before=suspend)]


@pytest.mark.parametrize("by", ["close", "garbage collection"])
@pytest.mark.parametrize("shape", SEQUENCES, ids=lambda shape: shape.__name__)
def test_generator_exit_warns_and_names_the_steps(by: str, shape: Any, world: World) -> None:
    """A coroutine that is closed in mid-saga can await nothing: a ResourceWarning names what is left."""
    coroutine = shape(*parts_in_doubt(world))
    coroutine.send(None)
    with pytest.warns(ResourceWarning, match="not taken back: c, b, a"):
        if by == "close":
            coroutine.close()
        else:
            del coroutine
            gc.collect()
    assert world.log == ["a", "b"]


@pytest.mark.parametrize("shape", [*SEQUENCES, *GROUPED], ids=lambda shape: shape.__name__)
async def test_generator_exit_of_an_action(shape: Any, world: World) -> None:
    """An action that raises it looks like one that is closed: it goes on as it is, and nothing is awaited."""
    with pytest.warns(ResourceWarning, match="not taken back: b, a"), pytest.raises(GeneratorExit):
        await shape(world.member("a"), world.member("b", before=GeneratorExit()))
    assert world.order == ["a", "b"]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("shape", SEQUENCES, ids=lambda shape: shape.__name__)
async def test_g10_generator_exit_of_a_compensation(shape: Any, together: bool, world: World) -> None:
    """A compensation that raises it has failed, as with any exception; the others run."""
    parts = [world.member("a"), world.member("b", back=GeneratorExit()), world.member("c")]
    with pytest.raises(CompensationFailed) as caught:
        await shape(*([Parallel(*parts)] if together else parts), world.step("d", after=Boom()))
    assert [type(error) for error in caught.value.failures] == [GeneratorExit]
    assert world.done == ["b"]


def test_generator_exit_with_nothing_to_take_back_is_silent() -> None:
    """Nothing is said where nothing is left."""
    coroutine = Saga([Step(suspend)])()
    coroutine.send(None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        coroutine.close()
    assert caught == []


async def never_ends() -> None:
    await asyncio.get_running_loop().create_future()


def close_in_the_middle(loop_factory: Any, work: Any, begun: Event, *, closed: bool) -> list[str]:
    """Runs a saga until an event, closes its coroutines as a collector would; gives the warnings."""

    async def main() -> None:
        tasks.append(asyncio.create_task(work()))
        await begun.wait()
        await asyncio.sleep(0)

    tasks: list[asyncio.Task[Any]] = []
    loop = loop_factory()
    loop.set_exception_handler(lambda loop, context: None)
    loop.run_until_complete(main())
    others = asyncio.all_tasks(loop) - set(tasks)
    if closed:
        loop.close()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # What waits for nobody first.
        for task in [*others, *tasks]:
            # A task group of AnyIO awaits in spite of it, which Python calls a RuntimeError.
            with contextlib.suppress(RuntimeError):
                task.get_coro().close()
        if not closed:
            loop.close()
    return [str(one.message) for one in caught if "not taken back" in str(one.message)]


# What is caught by a rollback that goes wrong cannot be stopped by a signal.
in_a_killable_process = pytest.mark.timeout(30, method="thread")


@in_a_killable_process
@pytest.mark.parametrize("closed", [False, True], ids=["open loop", "closed loop"])
@pytest.mark.parametrize("limit", [None, 1])
@on_each_loop
def test_generator_exit_within_a_group(
    loop_factory: Any, limit: int | None, closed: bool, world: World
) -> None:
    """A saga that is closed while a group runs: it ends at once, and the warning names all that is left."""
    group = Parallel(world.member("b", before=never_ends), world.member("c"), limit=limit)

    async def work() -> None:
        await as_data(world.step("a"), group)

    messages = close_in_the_middle(loop_factory, work, world.begun("b"), closed=closed)
    left = "b, a" if limit == 1 else "c, b, a"
    assert len(messages) == 1
    assert f"not taken back: {left}" in messages[0]


@in_a_killable_process
@pytest.mark.parametrize("closed", [False, True], ids=["open loop", "closed loop"])
@pytest.mark.parametrize("shielded", [False, True], ids=["group", "shielded"])
@on_each_loop
def test_generator_exit_within_a_call_is_no_failure(
    loop_factory: Any, shielded: bool, closed: bool, world: World
) -> None:
    """A function that catches what its calls raise does not go on where its coroutine is closed."""

    async def hang() -> None:
        world.begun("hang").set()
        await never_ends()

    @saga
    async def function(scope: SagaScope) -> None:
        try:
            await scope.step(Step(hang, shield=True) if shielded else Parallel(Step(hang)))
        except Exception as error:  # pragma: no cover - must not be reached
            caught.append(error)

    caught: list[Exception] = []
    assert close_in_the_middle(loop_factory, function, world.begun("hang"), closed=closed) == []
    assert caught == []


@in_a_killable_process
@pytest.mark.parametrize("closed", [False, True], ids=["open loop", "closed loop"])
@pytest.mark.parametrize("with_middleware", [False, True])
@pytest.mark.parametrize("in_group", [False, True])
@on_each_loop
def test_generator_exit_within_a_rollback(
    loop_factory: Any, in_group: bool, with_middleware: bool, closed: bool, world: World
) -> None:
    """A loop that is dropped in mid-rollback: it ends at once, and the warning names what is left."""

    async def middleware(effect: Any, call_next: Any) -> object:
        return await call_next()

    part: Any = world.member("b", back=never_ends)
    if in_group:
        part = Parallel(part, world.member("d"), limit=1)
    parts = [world.step("a"), part, world.step("c", after=Boom())]

    async def work() -> None:
        try:
            await as_data(*parts, middleware=[middleware] if with_middleware else [])
        except Exception as error:  # pragma: no cover - must not be reached
            caught.append(error)

    caught: list[Exception] = []
    messages = close_in_the_middle(loop_factory, work, world.begun("-b"), closed=closed)
    assert caught == []
    assert len(messages) == 1
    assert f"not taken back: {'d, a' if in_group else 'a'}" in messages[0]
    assert world.order[-1] == "-b"


@pytest.mark.parametrize("shape", SEQUENCES, ids=lambda shape: shape.__name__)
def test_a_failure_where_no_event_loop_runs(shape: Any, world: World) -> None:
    """A rollback that cannot run at all says so, and warns of what is left: it does not spin."""
    coroutine = shape(*parts_in_doubt(world))
    coroutine.send(None)
    with (
        pytest.warns(ResourceWarning, match="not taken back"),
        pytest.raises(Exception, match="async") as caught,  # noqa: PT011
    ):
        coroutine.throw(Boom())
    assert not isinstance(caught.value, Boom)
    assert world.log == ["a", "b"]


# --- many at once -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run_loop",
    [
        *(pytest.param(lambda main, f=p.values[0]: run(f, main()), id=p.id) for p in LOOPS),
        pytest.param(trio.run, id="trio"),
    ],
)
def test_one_definition_is_run_by_a_thousand_overlapping_tasks(run_loop: Any) -> None:
    """Runs share nothing but the definition: each takes back its own, and nothing else."""
    all_in: Any = None
    begun = 0
    effects: dict[int, list[str]] = {number: [] for number in range(1000)}

    async def first(number: int) -> int:
        nonlocal all_in, begun
        all_in = all_in or Event()
        effects[number].append("first")
        begun += 1
        if begun == 1000:
            all_in.set()
        await all_in.wait()
        return number

    async def second(number: int) -> None:
        effects[number].append("second")
        if number % 2:
            raise Boom(number)

    def undo(result: int) -> None:
        effects[result].append("-first")

    def back(number: int) -> None:
        effects[number].append("-second")

    definition = Saga([Step(first, undo=undo), Parallel(Step(second, back))], exceptions=Boom)
    reached: dict[int, SagaState] = {}

    async def one(number: int) -> None:
        reached[number] = (await definition.run(number)).state

    async def main() -> None:
        async with create_task_group() as tasks:
            for number in range(1000):
                tasks.start_soon(one, number)

    run_loop(main)
    for number in range(1000):
        failed = number % 2
        assert reached[number] is (SagaState.COMPENSATED if failed else SagaState.COMPLETED)
        taken_back = ["-second", "-first"] if failed else []
        assert effects[number] == ["first", "second", *taken_back]


# --- the behaviour tables of the peers (research/python-peers.md, section 3) ---------------------
# One test a row. Cancellation rows: two steps have completed, the third one waits.


async def fails(shape: Any, *parts: Any) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        await shape(*parts)
    return caught.value


async def test_row_success_and_later_steps_not_run(world: World) -> None:
    """Steps run in order; after a failure the later ones do not."""
    await as_data(world.step("a"), world.step("b"))
    await fails(as_data, world.step("c", before=Boom()), world.step("d"))
    assert world.log == ["a", "b", "-c"]


@pytest.mark.parametrize("shape", SEQUENCES, ids=lambda shape: shape.__name__)
async def test_row_completed_steps_undone_in_reverse(shape: Any, world: World) -> None:
    """After a failure the completed steps are taken back in reverse, the caller gets the original."""
    boom = Boom()
    assert await fails(shape, *map(world.step, "abc"), world.step("d", before=boom)) is boom
    assert world.log == ["a", "b", "c", "-d", "-c", "-b", "-a"]


@pytest.mark.parametrize(
    ("how", "runs"), [({}, True), ({"not_applied": Boom}, False), ({"not_applied": OSError}, True)]
)
async def test_row_failed_steps_own_compensation(how: dict[str, Any], runs: bool, world: World) -> None:
    """G3: the failed step is in doubt, so it is compensated, unless its failure is declared."""
    await fails(as_data, world.step("a"), world.step("b", before=Boom(), **how))
    assert world.log == (["a", "-b", "-a"] if runs else ["a", "-a"])


@pytest.mark.parametrize("shape", SEQUENCES, ids=lambda shape: shape.__name__)
async def test_row_compensation_fails(shape: Any, world: World) -> None:
    """G11: the others still run, and both errors are reported."""
    boom, crash = Boom(), Crash()
    steps = [world.step("a"), world.step("b", back=crash), world.step("c", after=boom)]
    error = await fails(shape, *steps)
    assert isinstance(error, CompensationFailed)
    assert (error.error, error.failures) == (boom, (crash,))
    assert world.log == ["a", "b", "c", "-c", "-a"]


@pytest.mark.parametrize("moments", ["c", "c -b", "c -a", "c c", "c -b -b"])
@pytest.mark.parametrize("in_group", [False, True], ids=["sequence", "group"])
@every_way
async def test_rows_cancellation(way: Interruption, in_group: bool, moments: str, world: World) -> None:
    """Under each kind of cancellation, once or twice: 2 of 2 compensations finish."""
    parts: list[Any] = [world.member("a"), world.member("b")]
    if in_group:
        parts = [Parallel(*parts)]
    waits = world.step("c")
    raised = await interrupted(way, world, moments, lambda: as_data(*parts, waits))
    assert isinstance(raised, get_cancelled_exc_class())
    assert sorted(world.log) == ["-a", "-b", "-c", "a", "b"]
    assert world.done == []


@pytest.mark.parametrize("in_group", [False, True], ids=["sequence", "group"])
@on_asyncio_only
async def test_row_failure_then_one_cancel_in_compensation(in_group: bool, world: World) -> None:
    """A failure, then one `task.cancel()` in a compensation: 3 of 3 finish."""
    parts: list[Any] = [world.member("a"), world.member("b"), world.member("c")]
    if in_group:
        parts = [Parallel(*parts)]
    boom = world.step("d", after=Boom())
    raised = await interrupted(TaskCancel(), world, "-b", lambda: as_data(*parts, boom))
    assert isinstance(raised, asyncio.CancelledError)
    assert [name for name in world.log if name in ("-a", "-b", "-c")] != []
    assert world.done == []


@pytest.mark.parametrize("in_group", [False, True], ids=["sequence", "group"])
async def test_row_sync_functions(in_group: bool) -> None:
    """Sync actions and compensations are called as they are, inline."""
    log: list[str] = []
    threads: set[threading.Thread] = set()

    def sync(name: str) -> Step[[], None]:
        def action() -> None:
            threads.add(threading.current_thread())
            log.append(name)

        return Step(action, lambda: log.append(f"-{name}"))

    def fail() -> None:
        raise Boom

    parts: list[Any] = [sync("a"), sync("b")]
    if in_group:
        parts = [Parallel(*parts)]
    with pytest.raises(Boom):
        await Saga([*parts, Step(fail)])()
    assert log == ["a", "b", *(["-a", "-b"] if in_group else ["-b", "-a"])]
    assert threads == {threading.current_thread()}


async def test_row_same_object_run_again() -> None:
    """A definition can be run again, after a success and after a failure."""
    log: list[str] = []

    async def action(fail: bool) -> None:
        log.append("a")
        if fail:
            raise Boom

    definition = Saga([Step(action, lambda fail: log.append("-a"))], exceptions=Boom)
    reached = [(await definition.run(fail)).state.name for fail in (False, True, True, False)]
    assert reached == ["COMPLETED", "COMPENSATED", "COMPENSATED", "COMPLETED"]
    assert log == ["a", "a", "-a", "a", "-a", "a"]


async def test_row_same_object_two_overlapping_runs() -> None:
    """X fails while Y runs: X undoes X's steps with X's data, and Y's stay."""
    log: list[str] = []
    y_waits, x_failed = Event(), Event()

    async def first(run: str) -> str:
        log.append(run)
        return run

    async def second(run: str) -> None:
        if run == "x":
            await y_waits.wait()
            raise Boom
        y_waits.set()
        await x_failed.wait()

    definition = Saga([Step(first, undo=lambda run: log.append(f"-{run}")), Step(second)])

    async def x() -> None:
        with pytest.raises(Boom):
            await definition("x")
        x_failed.set()

    async with create_task_group() as tasks:
        tasks.start_soon(x)
        tasks.start_soon(definition, "y")
    assert sorted(log) == ["-x", "x", "y"]


async def test_row_result_handed_to_its_undo() -> None:
    """An undo gets what its action returned."""
    got = []

    async def action() -> object:
        return thing

    thing = object()
    await fails(as_data, Step(action, undo=got.append), Step(action, undo=got.append), boom_step())
    assert got == [thing, thing]


def boom_step(error: BaseException | None = None) -> Step[..., None]:
    async def fail() -> None:
        raise error or Boom()

    return Step(fail, name="boom")


async def test_rows_parallel_sibling_is_cancelled_and_awaited(world: World) -> None:
    """G4: the sibling of a failed member is cancelled, and its clean-up ends before any compensation."""

    async def with_clean_up() -> None:
        try:
            await sleep_forever()
        finally:
            with CancelScope(shield=True):
                await rounds()
            world.order.append("cleaned up")

    async def when_begun() -> None:
        await world.begun("b").wait()

    group = Parallel(
        world.member("b", before=with_clean_up), world.member("c", before=when_begun, after=Boom())
    )
    await fails(as_data, world.step("a"), group)
    assert world.order == ["a", "b", "c", "cleaned up", "-b", "-c", "-a"]


async def test_row_parallel_order_of_compensations(world: World) -> None:
    """G7, G15: the members of a group are taken back at the same time, entered in the order given."""
    group = Parallel(*(world.member(name) for name in "bcd"))
    await fails(as_data, world.step("a"), group, boom_step())
    assert world.order == ["a", "b", "c", "d", "-b", "-c", "-d", "-a"]
    # Together: the first one has not ended when the last one begins.
    assert world.log[4:] != []


async def test_rows_parallel_two_members_fail(world: World) -> None:
    """G5: both are in the group; the failed members' own compensations run."""
    errors = [Boom("b"), Boom("c")]
    both = Event()

    async def first() -> None:
        with CancelScope(shield=True):
            await both.wait()

    async def second() -> None:
        both.set()

    group = Parallel(
        world.member("b", before=first, after=errors[0]),
        world.member("c", before=second, after=errors[1]),
        on_failure="finish",
    )
    error = await fails(as_data, group)
    assert isinstance(error, ExceptionGroup)
    assert error.exceptions == tuple(errors)
    assert world.done == []


async def test_rows_parallel_compensation_fails(world: World) -> None:
    """G11: the other compensations of the group run to their end, and no error is lost."""
    boom, crash = Boom(), Crash()
    group = Parallel(world.member("b", back=crash), world.member("c"), world.member("d"))
    error = await fails(as_data, world.step("a"), group, boom_step(boom))
    assert isinstance(error, CompensationFailed)
    assert (error.error, error.failures) == (boom, (crash,))
    assert world.done == ["b"]


async def test_rows_parallel_retries_and_timeouts_per_step(world: World) -> None:
    """A member's retry and timeout are its own."""
    tries = []

    async def flaky() -> None:
        tries.append(1)
        if len(tries) < 3:
            raise Boom

    async def retry(attempt: Callable[[], Awaitable[Any]]) -> Any:
        while True:
            with contextlib.suppress(Boom):
                return await attempt()

    await as_data(Parallel(Step(flaky, retry=retry), world.member("b")))
    assert len(tries) == 3
    error = await fails(
        as_data, Parallel(world.member("c", before=sleep_forever, timeout=0.01), world.member("d"))
    )
    assert isinstance(error, ExceptionGroup)
    assert [TimeoutError] == [type(leaf) for leaf in error.exceptions]
    assert "-c" in world.log
