"""The scope in hand: calls that are all or nothing, save-points, commit, misuse (G2, G7, G14)."""

from __future__ import annotations

import gc
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from contextvars import ContextVar
from typing import Any

import pytest
from anyio import (
    CancelScope,
    Event,
    create_task_group,
    fail_after,
    get_cancelled_exc_class,
    sleep_forever,
    wait_all_tasks_blocked,
)
from anyio.lowlevel import checkpoint
from helpers import (
    SEQUENCES,
    Boom,
    Crash,
    World,
    as_data,
    checked_world,
    leaf_errors,
    nothing,
    rounds,
    states,
)

from pysagas import (
    CallNext,
    Commit,
    CompensationFailed,
    Effect,
    Parallel,
    Saga,
    SagaBuilder,
    SagaDefinitionError,
    SagaScope,
    SagaState,
    ScopeBusy,
    ScopeClosed,
    Step,
    current_effect,
    open_saga,
    outcome_of,
    saga,
)

pytestmark = pytest.mark.anyio

world = pytest.fixture(checked_world)

Body = Callable[[SagaScope], Awaitable[object]]


async def watch(effect: Effect, call_next: CallNext) -> object:
    """A middleware that changes nothing: with it, everything goes the long way."""
    return await call_next()


both_ways = pytest.mark.parametrize("middleware", [(), (watch,)], ids=["plain", "middleware"])


# --- where a scope comes from -------------------------------------------------------------------


async def in_function(body: Body, **options: Any) -> None:
    @saga(**options)
    async def function(scope: SagaScope) -> None:
        await body(scope)

    await function()


async def in_block(body: Body, **options: Any) -> None:
    async with open_saga(**options) as scope:
        await body(scope)


async def in_nested(body: Body, **options: Any) -> None:
    async with open_saga(**options) as scope, scope.nested() as nested:
        await body(nested)


async def in_part(body: Body, **options: Any) -> None:
    @saga
    async def part(scope: SagaScope) -> None:
        await body(scope)

    await Saga([part], **options)()


in_any_scope = pytest.mark.parametrize(
    "in_scope", [in_function, in_block, in_nested, in_part], ids=lambda f: f.__name__
)


# Ways to call work on a scope: what they call fails, or waits, or is cancelled.
async def inline(scope: SagaScope, world: World, name: str, **how: Any) -> object:
    action, compensation = world.functions(name, **how)
    return await scope.step(action, compensation=compensation)


async def inline_with_options(scope: SagaScope, world: World, name: str, **how: Any) -> object:
    action, compensation = world.functions(name, **how)
    return await scope.step(action, compensation=compensation, name=name, shield=True)


async def defined(scope: SagaScope, world: World, name: str, **how: Any) -> object:
    return await scope.step(world.step(name, **how))


async def bound(scope: SagaScope, world: World, name: str, **how: Any) -> object:
    return await scope.step(world.step(name, **how).bind("argument"))


async def as_member(scope: SagaScope, world: World, name: str, **how: Any) -> object:
    return await scope.parallel(world.step(name, **how).bind())


async def as_group(scope: SagaScope, world: World, name: str, **how: Any) -> object:
    return await scope.step(Parallel(world.step(name, **how)))


async def as_saga(scope: SagaScope, world: World, name: str, **how: Any) -> object:
    return await scope.step(Saga([world.step(name, **how)]))


async def as_save_point(scope: SagaScope, world: World, name: str, **how: Any) -> object:
    async with scope.nested() as nested:
        return await nested.step(world.step(name, **how))


CALLS = [inline, inline_with_options, defined, bound, as_member, as_group, as_saga, as_save_point]

by_any_call = pytest.mark.parametrize("call", CALLS, ids=lambda f: f.__name__)


# --- all or nothing -----------------------------------------------------------------------------


@in_any_scope
@by_any_call
@both_ways
async def test_g2_a_call_raises_with_its_work_taken_back(
    in_scope: Any, call: Any, middleware: Any, world: World
) -> None:
    """A call that raises has been taken back by then, so the caller may go another way."""

    async def body(scope: SagaScope) -> None:
        await call(scope, world, "a")
        with pytest.raises((Boom, ExceptionGroup)):
            await call(scope, world, "b", after=Boom())
        assert world.log == ["a", "b", "-b"]
        await call(scope, world, "c")

    await in_scope(body, middleware=middleware)
    assert world.log == ["a", "b", "-b", "c"]


@in_any_scope
@by_any_call
@both_ways
async def test_g2_a_call_returns_with_its_work_recorded(
    in_scope: Any, call: Any, middleware: Any, world: World
) -> None:
    """A call that returned is taken back when the saga fails later, whatever failed in between."""

    async def body(scope: SagaScope) -> None:
        await call(scope, world, "a")
        with suppress(Boom, ExceptionGroup):
            await call(scope, world, "b", before=Boom())
        await call(scope, world, "c")
        raise Boom

    with pytest.raises(Boom) as caught:
        await in_scope(body, middleware=middleware)
    assert world.log == ["a", "-b", "c", "-c", "-a"]
    assert set(states(outcome_of(caught.value)).values()) == {"COMPENSATED"}


@in_any_scope
@by_any_call
@both_ways
async def test_g2_a_call_that_cannot_be_taken_back(
    in_scope: Any, call: Any, middleware: Any, world: World
) -> None:
    """It raises CompensationFailed, the scope refuses further work, and the saga ends FAILED."""
    boom, crash = Boom(), Crash()

    async def body(scope: SagaScope) -> None:
        await call(scope, world, "a")
        with pytest.raises(CompensationFailed) as failed:
            await call(scope, world, "b", after=boom, back=crash)
        assert failed.value.failures == (crash,)
        assert failed.value.outcome.state is SagaState.FAILED
        for again in CALLS:
            with pytest.raises(ScopeClosed, match="could not be taken back"):
                await again(scope, world, "never")
        # Swallowed: the saga has failed all the same.

    with pytest.raises(CompensationFailed) as caught:
        await in_scope(body, middleware=middleware)
    # Not what an assertion above may have raised: that would be here.
    assert caught.value.error is not None
    assert leaf_errors(caught.value.error) == [boom]
    assert caught.value.failures == (crash,)
    assert world.log == ["a", "b", "-a"]
    outcome = outcome_of(caught.value)
    assert outcome is not None
    assert outcome.state is SagaState.FAILED
    assert states(outcome) == {"a": "COMPENSATED", "b": "COMPENSATION_FAILED"}


@in_any_scope
@by_any_call
async def test_g2_g8_a_cancelled_call_is_taken_back(in_scope: Any, call: Any, world: World) -> None:
    """A scope within the function that is cancelled ends the call alone: it is taken back, the saga goes on."""

    async def cancel() -> None:
        limit.cancel()
        await checkpoint()

    async def body(scope: SagaScope) -> None:
        nonlocal limit
        await call(scope, world, "a")
        with CancelScope() as limit:
            await call(scope, world, "b", after=cancel)
        assert limit.cancelled_caught
        await call(scope, world, "c")

    limit = CancelScope()
    await in_scope(body)
    assert world.log == ["a", "b", "-b", "c"]


async def test_g2_another_failure_after_a_failed_rollback(world: World) -> None:
    """A function that catches CompensationFailed and raises another error: both come out."""
    boom, other, crash = Boom(), Boom("other"), Crash()

    @saga
    async def function(scope: SagaScope) -> None:
        try:
            await scope.step(world.step("a", after=boom, back=crash))
        except CompensationFailed as error:
            raise other from error

    with pytest.raises(CompensationFailed) as caught:
        await function()
    assert caught.value.failures == (crash,)
    assert caught.value.error is other
    assert isinstance(other.__cause__, CompensationFailed)
    assert other.__cause__.error is boom


async def test_g2_swallowed_in_an_inner_function(world: World) -> None:
    """An inner saga whose function swallowed CompensationFailed fails in the outer one, too."""
    went_on = []

    @saga
    async def inner(scope: SagaScope) -> None:
        with suppress(CompensationFailed):
            await scope.step(world.step("b", after=Boom(), back=Crash()))

    @saga
    async def outer(scope: SagaScope) -> None:
        await scope.step(world.step("a"))
        await scope.step(inner)
        went_on.append("outer")  # pragma: no cover - must not be reached

    with pytest.raises(CompensationFailed):
        await outer()
    assert went_on == []
    assert world.log == ["a", "b", "-a"]


async def test_g2_swallowed_in_a_nested_scope(world: World) -> None:
    """A block that swallowed CompensationFailed raises it at its end, with what had started it all."""
    went_on = []
    boom = Boom()

    @saga
    async def function(scope: SagaScope) -> None:
        await scope.step(world.step("a"))
        async with scope.nested() as nested:
            with suppress(CompensationFailed):
                await nested.step(world.step("b", after=boom, back=Crash()))
        went_on.append("function")  # pragma: no cover - must not be reached

    with pytest.raises(CompensationFailed) as caught:
        await function()
    assert caught.value.error is boom
    assert went_on == []
    assert world.log == ["a", "b", "-a"]


async def test_g2_in_a_loop_with_an_if(world: World) -> None:
    """A function may retry on its own, take branches, and loop."""

    @saga
    async def function(scope: SagaScope) -> str:
        for number in range(3):
            with suppress(Boom):
                return await scope.step(
                    world.step(f"try {number}", after=None if number == 2 else Boom())
                )
        raise AssertionError  # pragma: no cover - must not be reached

    outcome = await function.run()
    assert outcome.value == "result of try 2"
    assert list(states(outcome).values()) == ["COMPENSATED", "COMPENSATED", "COMPLETED"]
    assert world.done == ["try 2"]


# --- values -------------------------------------------------------------------------------------


@both_ways
async def test_calls_give_values(middleware: Any) -> None:
    """`step` gives what the action, the function, or the group returned; `parallel` a tuple."""

    async def double(number: int) -> int:
        return 2 * number

    def increment(number: int, *, by: int = 1) -> int:
        return number + by

    @saga
    async def inner(scope: SagaScope, number: int) -> int:
        return await scope.step(double, number)

    @saga(middleware=middleware)
    async def function(scope: SagaScope, number: int) -> int:
        assert await scope.step(double, 2) == 4
        assert await scope.step(increment, 2) == 3
        assert await scope.step(Step(increment), 2, by=5) == 7
        assert await scope.step(Step(increment).bind(2, by=6)) == 8
        assert await scope.step(inner, 4) == 8
        assert await scope.step(Saga([Step(double)]), 4) is None
        assert await scope.step(Parallel(Step(double), Step(increment)), 4) == (8, 5)
        assert await scope.parallel(Step(double).bind(5), inner.bind(6)) == (10, 12)
        assert await scope.parallel() == ()
        async with scope.nested() as nested:
            return await nested.step(double, number)

    assert await function(8) == 16
    assert (await function.run(9)).value == 18


async def test_a_step_written_inline_is_an_effect_like_another() -> None:
    """Middleware is around a step that asks for nothing, and around its compensation."""
    seen: list[tuple[str, str]] = []

    async def noting(effect: Effect, call_next: CallNext) -> object:
        seen.append((effect.kind, effect.name))
        return await call_next()

    async with open_saga(name="trip", exceptions=Boom, middleware=[noting]) as scope:
        await scope.step(nothing, compensation=rounds)
        raise Boom
    assert seen == [("action", "nothing"), ("rollback", "trip"), ("compensation", "nothing")]


async def test_g5_g13_a_step_written_inline_that_fails_is_reported() -> None:
    """Its exception is in its report, and the note says that it failed."""
    boom = Boom()

    async def fail() -> None:
        raise boom

    @saga
    async def function(scope: SagaScope) -> None:
        await scope.step(fail)

    with pytest.raises(Boom):
        await function()
    outcome = outcome_of(boom)
    assert outcome is not None
    assert outcome.steps[0].error is boom
    assert "failed in step 'fail'" in boom.__notes__[0]


async def test_g6_a_cancellation_is_noticed_before_a_sync_action_written_inline(world: World) -> None:
    """A scope that was cancelled meanwhile: the sync action is not begun, so nothing of it goes back."""
    begun: list[str] = []

    with CancelScope() as around:
        async with open_saga() as scope:
            await scope.step(world.step("a"))
            around.cancel()
            await scope.step(begun.append, "b", compensation=begun.append)
    assert around.cancelled_caught
    assert begun == []
    assert states(scope.outcome) == {"a": "COMPENSATED", "append": "NOT_STARTED"}


async def test_g5_a_group_on_a_scope_has_the_name_that_it_was_given(world: World) -> None:
    """Its failure names it, as that of a group as data does."""
    with pytest.raises(ExceptionGroup, match="group 'bookings' of saga 'trip'"):
        async with open_saga(name="trip") as scope:
            await scope.parallel(world.step("a", after=Boom()).bind(), name="bookings")


async def test_names_of_options_are_names_of_arguments_too() -> None:
    """A definition gets its keyword arguments, though an action's step has options of these names."""
    got: list[object] = []

    def action(*, compensation: str, undo: str, name: str) -> None:
        got.extend((compensation, undo, name))

    async with open_saga() as scope:
        await scope.step(Step(action), compensation="a", undo="b", name="c")
    assert got == ["a", "b", "c"]


async def test_a_nameless_block_is_called_saga() -> None:
    """Reports and messages have a name for every saga."""
    async with open_saga() as scope:
        await scope.step(nothing)
    assert scope.outcome is not None
    assert scope.outcome.saga == "saga"


async def test_undo_gets_the_result_and_compensation_the_arguments() -> None:
    """Of a step written inline as of any other."""
    got: list[object] = []

    async def action(one: int, two: int) -> str:
        return f"{one}-{two}"

    async with open_saga(exceptions=Boom) as scope:
        await scope.step(action, 1, 2, compensation=lambda one, two: got.append((one, two)))
        await scope.step(action, 3, 4, undo=got.append)
        raise Boom
    assert got == ["3-4", (1, 2)]


@pytest.mark.parametrize("error", [Boom(), OSError()], ids=repr)
async def test_g3_not_applied_written_inline(error: Exception, world: World) -> None:
    """`not_applied` on a call of `step`: a declared failure takes nothing back."""
    action, compensation = world.functions("a", before=error)
    with pytest.raises(type(error)) as caught:
        await in_function(lambda scope: scope.step(action, compensation=compensation, not_applied=Boom))
    state = "NOT_APPLIED" if isinstance(error, Boom) else "COMPENSATED"
    assert states(outcome_of(caught.value)) == {"a": state}


# --- save-points --------------------------------------------------------------------------------


@in_any_scope
async def test_g2_only_the_save_point_is_rolled_back(in_scope: Any, world: World) -> None:
    """An exception that leaves the block takes back what the block has done, in reverse, and goes on."""
    boom = Boom()

    async def body(scope: SagaScope) -> None:
        await scope.step(world.step("a"))
        with pytest.raises(Boom) as caught:  # noqa: PT012
            async with scope.nested() as nested:
                await nested.step(world.step("b"))
                await nested.parallel(world.member("c").bind(), world.member("d").bind())
                raise boom
        assert caught.value is boom
        assert world.done == ["a"]
        await scope.step(world.step("e"))

    await in_scope(body)
    assert world.order == ["a", "b", "c", "d", "-c", "-d", "-b", "e"]


async def test_save_points_in_save_points(world: World) -> None:
    """The innermost one is rolled back alone; then those around it, as far as the exception gets."""

    @saga
    async def function(scope: SagaScope) -> None:
        await scope.step(world.step("a"))
        with suppress(Boom):
            async with scope.nested() as one:
                await one.step(world.step("b"))
                async with one.nested() as two:
                    await two.step(world.step("c"))
                    with suppress(Boom):
                        async with two.nested() as three:
                            await three.step(world.step("d"))
                            raise Boom
                    await two.step(world.step("e"))
                    raise Boom
        await scope.step(world.step("f"))

    outcome = await function.run()
    assert world.log == ["a", "b", "c", "d", "-d", "e", "-e", "-c", "-b", "f"]
    assert [report.path for report in outcome.steps] == [
        (0,),
        (1, 0),
        (1, 1, 0),
        (1, 1, 1, 0),
        (1, 1, 2),
        (2,),
    ]


async def test_a_save_point_that_ended_well_goes_back_with_the_saga(world: World) -> None:
    """What a block has done stays recorded, and is taken back in its turn."""

    async def body(scope: SagaScope) -> None:
        await scope.step(world.step("a"))
        async with scope.nested() as nested:
            await nested.step(world.step("b"))
            await nested.step(world.step("c"))
        await scope.step(world.step("d", after=Boom()))

    with pytest.raises(Boom):
        await in_function(body)
    assert world.log == ["a", "b", "c", "d", "-d", "-c", "-b", "-a"]


async def test_g2_a_save_point_that_cannot_be_taken_back(world: World) -> None:
    """The end of the block raises CompensationFailed, and the scope around takes no more work."""
    boom, crash = Boom(), Crash()

    @saga
    async def function(scope: SagaScope) -> None:
        await scope.step(world.step("a"))
        with pytest.raises(CompensationFailed) as failed:
            async with scope.nested() as nested:
                await nested.step(world.step("b", back=crash))
                raise boom
        assert (failed.value.error, failed.value.failures) == (boom, (crash,))
        with pytest.raises(ScopeClosed):
            await scope.step(world.step("c"))

    with pytest.raises(CompensationFailed) as caught:
        await function()
    assert caught.value.error is boom
    assert world.log == ["a", "b", "-a"]


# --- commit -------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("in_scope", [in_function, in_block], ids=lambda f: f.__name__)
async def test_g14_commit(in_scope: Any, middleware: Any, world: World) -> None:
    """Earlier work stays, later work is taken back; the saga ends FAILED, and raises."""
    boom = Boom()

    async def body(scope: SagaScope) -> None:
        await scope.step(world.step("a"))
        await scope.commit()
        await scope.step(world.step("b"))
        await scope.commit()
        await scope.step(world.step("c"))
        raise boom

    with pytest.raises(Boom) as caught:
        await in_scope(body, middleware=middleware, exceptions=Boom)
    assert caught.value is boom
    assert world.log == ["a", "b", "c", "-c"]
    outcome = outcome_of(boom)
    assert outcome is not None
    assert outcome.state is SagaState.FAILED
    assert [report.path for report in outcome.steps] == [(0,), (2,), (4,)]


async def test_g14_a_commit_belongs_to_the_outermost_sequence(world: World) -> None:
    """In a nested scope, an inner saga, or a branch, it is refused, and commits nothing."""
    refused: list[BaseException] = []

    async def try_to(scope: SagaScope) -> None:
        with pytest.raises(SagaDefinitionError, match="outermost") as caught:
            await scope.commit()
        refused.append(caught.value)
        # The scope can be used further.
        await scope.step(nothing)

    @saga
    async def part(scope: SagaScope) -> None:
        await try_to(scope)

    @saga
    async def function(scope: SagaScope) -> None:
        await scope.step(world.step("a"))
        async with scope.nested() as nested:
            await try_to(nested)
        await scope.step(part)
        await scope.parallel(part.bind())
        raise Boom

    with pytest.raises(Boom):
        await function()
    assert len(refused) == 3
    assert world.log == ["a", "-a"]


async def test_g14_a_saga_with_a_commit_in_it_is_no_part_of_a_function(world: World) -> None:
    """A definition that holds a commit is refused by `step` and `parallel` before anything has run."""
    with_commit = SagaBuilder.create().add_step(world.step("a")).add_commit().build()
    async with open_saga() as scope:
        for call in (
            lambda: scope.step(with_commit),
            lambda: scope.parallel(with_commit.bind()),
            lambda: scope.step(Commit()),
        ):
            with pytest.raises(SagaDefinitionError, match="commit"):
                await call()
    assert world.order == []


# --- on_rollback --------------------------------------------------------------------------------


async def test_g7_on_rollback_takes_its_turn(world: World) -> None:
    """Functions given to `on_rollback` are called among the compensations, sync or async, with arguments."""

    async def later(*args: object) -> None:
        await checkpoint()
        world.log.append(f"async {args}")

    async def body(scope: SagaScope) -> None:
        await scope.step(world.step("a"))
        scope.on_rollback(later, 1, 2)
        await scope.step(world.step("b"))
        scope.on_rollback(world.log.append, "sync")
        async with scope.nested() as nested:
            nested.on_rollback(world.log.append, "nested")
        raise Boom

    with pytest.raises(Boom) as caught:
        await in_function(body)
    assert world.log == ["a", "b", "nested", "sync", "-b", "async (1, 2)", "-a"]
    outcome = outcome_of(caught.value)
    assert outcome is not None
    assert [report.name for report in outcome.steps] == ["a", "later", "b", "append", "append"]


async def test_on_rollback_that_is_not_needed(world: World) -> None:
    """A saga that succeeds calls none of them."""

    async def body(scope: SagaScope) -> None:
        scope.on_rollback(world.log.append, "never")

    await in_function(body)
    assert world.log == []


async def test_g11_on_rollback_that_fails() -> None:
    """It is a compensation like any other."""
    crash = Crash()

    def fail() -> None:
        raise crash

    async def body(scope: SagaScope) -> None:
        scope.on_rollback(fail)
        raise Boom

    with pytest.raises(CompensationFailed) as caught:
        await in_function(body)
    assert caught.value.failures == (crash,)


@pytest.mark.parametrize(("function", "args"), [("no function", ()), (nothing, (1,)), (None, ())])
async def test_on_rollback_refuses_what_it_could_not_call(function: Any, args: Any) -> None:
    """At once, where the mistake is, not when the rollback comes."""
    async with open_saga() as scope:
        with pytest.raises(SagaDefinitionError, match="on_rollback"):
            scope.on_rollback(function, *args)


# --- misuse -------------------------------------------------------------------------------------


def calls_on(scope: SagaScope) -> dict[str, Callable[[], Awaitable[object]]]:
    async def enter_nested() -> None:
        async with scope.nested():
            raise AssertionError  # pragma: no cover - must not be reached

    async def on_rollback() -> None:
        scope.on_rollback(nothing)

    return {
        "step": lambda: scope.step(nothing),
        "step of a definition": lambda: scope.step(Step(nothing)),
        "parallel": lambda: scope.parallel(Step(nothing).bind()),
        "nested": enter_nested,
        "commit": scope.commit,
        "on_rollback": on_rollback,
    }


@in_any_scope
@pytest.mark.parametrize("fails", [False, True])
async def test_a_scope_used_after_its_block(in_scope: Any, fails: bool) -> None:
    """Every call is refused, with a message that says so, and nothing has run."""
    kept: list[SagaScope] = []

    async def body(scope: SagaScope) -> None:
        kept.append(scope)
        if fails:
            raise Boom

    with suppress(Boom):
        await in_scope(body)
    for name, call in calls_on(kept[0]).items():
        with pytest.raises(ScopeClosed, match=rf"scope\.{name.split()[0]} on .* ended"):
            await call()


@in_any_scope
async def test_a_scope_used_while_a_nested_one_is_open(in_scope: Any, world: World) -> None:
    """Every call on the outer one is refused; afterwards it works again."""

    async def body(scope: SagaScope) -> None:
        async with scope.nested() as nested:
            for call in calls_on(scope).values():
                with pytest.raises(ScopeBusy, match="nested scope is open"):
                    await call()
            await nested.step(world.step("a"))
        await scope.step(world.step("b"))

    await in_scope(body)
    assert world.log == ["a", "b"]


@in_any_scope
@by_any_call
async def test_a_scope_used_by_two_tasks_at_once(in_scope: Any, call: Any, world: World) -> None:
    """While a call is under way every other call is refused; the first one is not disturbed."""

    async def body(scope: SagaScope) -> None:
        async def refused() -> None:
            for other in calls_on(scope).values():
                with pytest.raises(ScopeBusy, match=r"has not ended yet|nested scope is open"):
                    await other()

        await call(scope, world, "a", before=refused)
        await call(scope, world, "b")

    await in_scope(body)
    assert world.log == ["a", "b"]


@in_any_scope
@pytest.mark.parametrize("call", [inline, defined, as_member], ids=lambda f: f.__name__)
@pytest.mark.parametrize("action_fails", [False, True])
async def test_g7_a_scope_that_ends_while_another_task_uses_it(
    in_scope: Any, call: Any, action_fails: bool, world: World
) -> None:
    """The saga fails with ScopeBusy; the call of the other task is taken back when it ends."""
    ended = Event()
    late: list[BaseException] = []

    async def other(scope: SagaScope) -> None:
        try:
            await call(scope, world, "b", before=ended.wait, after=Boom() if action_fails else None)
        except Exception as error:
            late.append(error)

    async def body(scope: SagaScope) -> None:
        await scope.step(world.step("a"))
        tasks.start_soon(other, scope)
        await world.begun("b").wait()

    world.left = {"b"}
    async with create_task_group() as tasks:
        with pytest.raises(ScopeBusy, match="another task"):
            await in_scope(body)
        ended.set()
    assert len(late) == 1
    expected = (Boom, ExceptionGroup) if action_fails else ScopeClosed
    assert isinstance(late[0], expected)
    assert world.done == []


async def test_a_scope_used_while_it_commits() -> None:
    """A commit is a call like another: while it is under way every other call is refused."""
    scopes: list[SagaScope] = []
    refused: list[str] = []

    async def meddles(effect: Effect, call_next: CallNext) -> object:
        assert effect.kind == "commit"
        for call in calls_on(scopes[0]).values():
            with pytest.raises(ScopeBusy, match="its commit has not ended yet"):
                await call()
            refused.append("a call")
        return await call_next()

    async with open_saga(middleware=[meddles]) as scope:
        scopes.append(scope)
        await scope.commit()
    assert len(refused) == len(calls_on(scopes[0]))


async def test_g7_a_scope_that_ends_under_a_call_that_follows_a_save_point(world: World) -> None:
    """The call of another task is left to that task, also where a nested scope was open before."""
    ended = Event()

    async def other(scope: SagaScope) -> None:
        with pytest.raises(ScopeClosed, match="'c' of saga 'function' ended after its scope"):
            await scope.step(world.step("c", before=ended.wait))

    @saga
    async def function(scope: SagaScope) -> None:
        await scope.step(world.step("a"))
        async with scope.nested() as nested:
            await nested.step(world.step("b"))
        tasks.start_soon(other, scope)
        await world.begun("c").wait()

    world.left = {"c"}
    async with create_task_group() as tasks:
        with pytest.raises(ScopeBusy, match="another task") as caught:
            await function.run(exceptions=ScopeBusy)
        assert world.order == ["a", "b", "c", "-b", "-a"]
        outcome = outcome_of(caught.value)
        assert outcome is not None
        assert outcome.state is SagaState.FAILED  # c is still to be taken back
        ended.set()
    assert world.done == []


async def test_g12_misuse_of_a_block_is_no_expected_failure() -> None:
    """A block that ends under another task's call raises ScopeBusy, whatever failures are expected."""
    begun, ended = Event(), Event()

    async def action() -> None:
        begun.set()
        await ended.wait()

    async def other(scope: SagaScope) -> None:
        with pytest.raises(ScopeClosed):
            await scope.step(action)

    async with create_task_group() as tasks:
        with pytest.raises(ScopeBusy):
            async with open_saga(exceptions=Exception) as scope:
                tasks.start_soon(other, scope)
                await begun.wait()
        ended.set()


async def test_g7_a_failure_that_leaves_a_save_point_goes_over_its_misuse(world: World) -> None:
    """What left the block is raised, though another task's call on it was still under way."""
    ended = Event()

    async def other(scope: SagaScope) -> None:
        with pytest.raises(ScopeClosed, match="'a' of saga 'function' ended after its scope"):
            await inline(scope, world, "a", before=ended.wait)

    @saga
    async def function(scope: SagaScope) -> None:
        async with scope.nested() as nested:
            tasks.start_soon(other, nested)
            await world.begun("a").wait()
            raise Boom

    async with create_task_group() as tasks:
        with pytest.raises(Boom):
            await function()
        ended.set()
    assert world.done == []


async def test_g7_nothing_new_starts_once_the_rollback_has_begun(world: World) -> None:
    """A compensation that calls a step on the scope is refused."""
    refused: list[BaseException] = []

    @saga
    async def function(scope: SagaScope) -> None:
        async def back() -> None:
            try:
                await scope.step(world.step("never"))
            except ScopeClosed as error:
                refused.append(error)

        await scope.step(world.step("a", back=back))
        raise Boom

    with pytest.raises(Boom):
        await function()
    assert len(refused) == 1
    assert world.log == ["a", "-a"]


async def test_g7_nothing_new_starts_while_a_call_is_taken_back(world: World) -> None:
    """The same in the rollback of one call: the scope is busy."""
    refused: list[BaseException] = []

    @saga
    async def function(scope: SagaScope) -> None:
        async def back() -> None:
            try:
                await scope.step(world.step("never"))
            except ScopeBusy as error:
                refused.append(error)

        with suppress(Boom):
            await scope.step(world.step("a", after=Boom(), back=back))

    await function()
    assert len(refused) == 1
    assert world.log == ["a", "-a"]


async def no_arguments() -> None:
    raise AssertionError  # pragma: no cover - must not be reached


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s.step("no function"), SagaDefinitionError, "must be a function"),
        (lambda s: s.step(no_arguments, 1), TypeError, "no_arguments"),
        (
            lambda s: s.step(no_arguments, compensation=lambda a: None),
            SagaDefinitionError,
            "compensation",
        ),
        (lambda s: s.step(no_arguments, undo=lambda: None), SagaDefinitionError, "undo"),
        (lambda s: s.step(no_arguments, timeout=-1), SagaDefinitionError, "timeout"),
        (lambda s: s.step(no_arguments, unknown=1), TypeError, "unknown"),
        (lambda s: s.step(Step(no_arguments), 1), TypeError, "no_arguments"),
        (lambda s: s.step(Step(no_arguments).bind(), 1), TypeError, "has its arguments already"),
        (lambda s: s.step(Step(no_arguments).bind(), x=1), TypeError, "has its arguments already"),
        (lambda s: s.step(Step(no_arguments), undo=print), TypeError, "undo"),
        (lambda s: s.step(Step(no_arguments), compensation=print), TypeError, "compensation"),
        (lambda s: s.parallel(no_arguments), SagaDefinitionError, "must be a Step"),
        (lambda s: s.parallel(limit=0), SagaDefinitionError, "limit"),
        (lambda s: s.parallel(on_failure="x"), SagaDefinitionError, "on_failure"),
    ],
)
@in_any_scope
async def test_a_call_that_cannot_work(
    in_scope: Any, call: Any, error: type[Exception], message: str, world: World
) -> None:
    """It is refused before anything has run, and the scope can be used further."""

    async def body(scope: SagaScope) -> None:
        await scope.step(world.step("a"))
        with pytest.raises(error, match=message):
            await call(scope)
        await scope.step(world.step("b"))

    await in_scope(body)
    assert world.log == ["a", "b"]


async def test_the_repr_of_a_scope() -> None:
    """It names the saga and the place."""
    async with open_saga(name="trip") as scope, scope.nested() as nested:
        assert repr(scope) == "<SagaScope of saga 'trip' at ()>"
        assert repr(nested) == "<SagaScope of saga 'trip' at (0,)>"


# --- open_saga ----------------------------------------------------------------------------------


@both_ways
async def test_open_saga_completes(middleware: Any, world: World) -> None:
    """After a block that ended well the outcome is COMPLETED, and can still be taken back."""
    async with open_saga(name="trip", middleware=middleware) as scope:
        assert scope.outcome is None
        assert await scope.step(world.step("a")) == "result of a"
    assert scope.outcome is not None
    assert (scope.outcome.state, scope.outcome.saga) == (SagaState.COMPLETED, "trip")
    await scope.outcome.rollback()
    assert world.log == ["a", "-a"]


async def test_open_saga_raises_what_left_the_block(world: World) -> None:
    """The exception goes on untouched, and the outcome says what was taken back."""
    boom = Boom()
    with pytest.raises(Boom) as caught:  # noqa: PT012
        async with open_saga() as scope:
            await scope.step(world.step("a"))
            raise boom
    assert caught.value is boom
    assert (boom.__cause__, boom.__context__) == (None, None)
    assert scope.outcome is outcome_of(boom)
    assert scope.outcome.state is SagaState.COMPENSATED
    assert world.log == ["a", "-a"]


@pytest.mark.parametrize(
    ("expected", "goes_on"), [(Boom, False), (Exception, False), (OSError, True), ((), True)]
)
async def test_g12_open_saga_with_expected_failures(expected: Any, goes_on: bool, world: World) -> None:
    """An expected failure goes no further than the block, if the state was restored."""

    async def block() -> SagaScope:
        async with open_saga(exceptions=expected) as scope:
            await scope.step(world.step("a", after=Boom()))
            raise AssertionError  # pragma: no cover - must not be reached
        return scope

    if goes_on:
        with pytest.raises(Boom):
            await block()
    else:
        scope = await block()
        assert scope.outcome is not None
        assert scope.outcome.state is SagaState.COMPENSATED
    assert world.done == []


async def test_g11_g12_open_saga_that_cannot_be_taken_back(world: World) -> None:
    """CompensationFailed is raised, whatever is expected."""
    with pytest.raises(CompensationFailed) as caught:  # noqa: PT012
        async with open_saga(exceptions=Exception) as scope:
            await scope.step(world.step("a", back=Crash()))
            raise Boom
    assert scope.outcome is caught.value.outcome
    assert scope.outcome.state is SagaState.FAILED


async def test_g2_open_saga_that_swallowed_a_failed_rollback(world: World) -> None:
    """The block's end raises CompensationFailed, though the block swallowed it, expected or not."""
    with pytest.raises(CompensationFailed):  # noqa: PT012
        async with open_saga(exceptions=Exception) as scope:
            with suppress(CompensationFailed):
                await scope.step(world.step("a", after=Boom(), back=Crash()))
    assert scope.outcome is not None
    assert scope.outcome.state is SagaState.FAILED


async def test_open_saga_is_entered_once() -> None:
    """A second time is refused."""
    block = open_saga()
    async with block:
        with pytest.raises(ScopeClosed, match="once"):
            await block.__aenter__()
    with pytest.raises(ScopeClosed, match="once"):
        await block.__aenter__()


@pytest.mark.parametrize(
    "options",
    [
        {"name": ""},
        {"exceptions": BaseException},
        {"exceptions": "Boom"},
        {"rollback_timeout": -1},
        {"on_compensation_failure": "x"},
        {"middleware": nothing},
        {"middleware": [1]},
    ],
    ids=["name", "type", "string", "negative", "word", "function", "number"],
)
def test_open_saga_refuses_options_that_cannot_work(options: dict[str, Any]) -> None:
    """At once, with a message that names open_saga."""
    with pytest.raises(SagaDefinitionError, match="open_saga"):
        open_saga(**options)


@pytest.mark.parametrize("options", [{"on_compensation_failure": "stop"}, {"rollback_timeout": 0.02}])
async def test_g10_g11_open_saga_with_a_policy(options: Any, world: World) -> None:
    """Its limits and its policy are those of a saga."""
    world.left = {"a"}
    back = sleep_forever if "rollback_timeout" in options else Crash()
    with pytest.raises(CompensationFailed) as caught:  # noqa: PT012
        async with open_saga(**options) as scope:
            await scope.step(world.step("a"))
            await scope.step(world.step("b", back=back))
            raise Boom
    assert states(outcome_of(caught.value)) == {"a": "COMPLETED", "b": "COMPENSATION_FAILED"}


@pytest.mark.parametrize("fails", [False, True])
async def test_open_saga_ended_by_another_task_than_began_it(fails: bool, world: World) -> None:
    """As fixtures and some frameworks do: the block holds nothing that belongs to one task."""
    block = open_saga()
    scopes: list[SagaScope] = []

    async def begin() -> None:
        scopes.append(await block.__aenter__())

    async def use() -> None:
        await scopes[0].step(world.step("a"))

    async def end() -> None:
        error = Boom() if fails else None
        suppressed = await block.__aexit__(error and Boom, error, None)
        assert not suppressed

    for task in (begin, use, end):
        async with create_task_group() as tasks:
            tasks.start_soon(task)
    assert world.log == (["a", "-a"] if fails else ["a"])
    assert scopes[0].outcome is not None


@asynccontextmanager
async def transaction(world: World, **options: Any) -> AsyncIterator[SagaScope]:
    """What a user builds around `open_saga`."""
    async with open_saga(**options) as scope:
        await scope.step(world.step("set up"))
        yield scope


@pytest.mark.parametrize("fails", [False, True])
async def test_open_saga_in_an_async_context_manager(fails: bool, world: World) -> None:
    """The block of the context manager is the block of the saga."""
    with suppress(Boom):
        async with transaction(world) as scope:
            await scope.step(world.step("a", after=Boom() if fails else None))
    assert world.done == ([] if fails else ["set up", "a"])


async def test_g12_an_expected_failure_in_an_async_context_manager(world: World) -> None:
    """It goes no further there, either."""
    async with transaction(world, exceptions=Boom):
        raise Boom
    assert world.done == []


async def test_open_saga_in_an_exit_stack(world: World) -> None:
    """Entered through an AsyncExitStack it is rolled back as the stack unwinds."""
    with pytest.raises(Boom):  # noqa: PT012
        async with AsyncExitStack() as stack:
            scope = await stack.enter_async_context(open_saga())
            await scope.step(world.step("a"))
            raise Boom
    assert world.log == ["a", "-a"]


async def generator(world: World, **options: Any) -> AsyncIterator[int]:
    async with open_saga(**options) as scope:
        await scope.step(world.step("a"))
        yield 1
        await scope.step(world.step("b"))
        yield 2


async def generator_of_a_transaction(world: World, **options: Any) -> AsyncIterator[int]:
    async with transaction(world, **options) as scope:
        await scope.step(world.step("a"))
        yield 1
        await scope.step(world.step("b"))
        yield 2


GENERATORS = [generator, generator_of_a_transaction]


@pytest.mark.parametrize("make", GENERATORS, ids=lambda f: f.__name__)
async def test_open_saga_in_an_async_generator_that_ends(make: Any, world: World) -> None:
    """A generator that is run to its end completes its saga."""
    assert [number async for number in make(world)] == [1, 2]
    assert world.done[-2:] == ["a", "b"]


@pytest.mark.parametrize("expected", [(), Exception])
@pytest.mark.parametrize("make", GENERATORS, ids=lambda f: f.__name__)
async def test_open_saga_in_an_async_generator_that_is_closed(
    make: Any, expected: Any, world: World
) -> None:
    """`aclose` takes everything back, since awaiting works there."""
    async with aclosing(make(world, exceptions=expected)) as numbers:
        assert await anext(numbers) == 1
    assert world.log[-2:] == ["-a", "-set up"] or world.log == ["a", "-a"]
    assert world.done == []


async def test_an_async_generator_that_is_closed_does_not_go_on_after_its_block(world: World) -> None:
    """The GeneratorExit that ends the block ends the generator."""
    went_on: list[str] = []

    async def numbers() -> AsyncIterator[int]:
        async with open_saga() as scope:
            await scope.step(world.step("a"))
            yield 1
        went_on.append("after the block")  # pragma: no cover - must not be reached

    async with aclosing(numbers()) as some:
        assert await anext(some) == 1
    assert world.log == ["a", "-a"]
    assert went_on == []


@pytest.mark.parametrize("nested", [False, True])
async def test_g11_an_async_generator_that_is_closed_and_cannot_be_taken_back(
    nested: bool, world: World
) -> None:
    """`aclose` raises CompensationFailed then, which says that closing the generator started it."""

    async def numbers() -> AsyncIterator[int]:
        async with AsyncExitStack() as stack:
            scope = await stack.enter_async_context(open_saga())
            if nested:
                scope = await stack.enter_async_context(scope.nested())
            await scope.step(world.step("a", back=Crash()))
            yield 1

    one = numbers()
    assert await anext(one) == 1
    with pytest.raises(CompensationFailed) as caught:
        await one.aclose()
    assert isinstance(caught.value.error, ScopeClosed)
    assert str(caught.value.error) == "the async generator around the saga was closed"


class Suspended:
    def __await__(self) -> Any:
        yield


async def suspend() -> None:
    await Suspended()


async def with_block(world: World) -> None:
    async with open_saga() as scope:
        await scope.step(world.step("a"))
        await suspend()


async def with_context_manager(world: World) -> None:
    async with transaction(world) as scope:
        await scope.step(world.step("a"))
        await suspend()


async def with_exit_stack(world: World) -> None:
    async with AsyncExitStack() as stack:
        scope = await stack.enter_async_context(open_saga())
        await scope.step(world.step("a"))
        await suspend()


async def with_save_point(world: World) -> None:
    async with open_saga() as scope, scope.nested() as nested:
        await nested.step(world.step("a"))
        await suspend()


async def in_a_step(world: World) -> None:
    async with open_saga() as scope:
        await scope.step(world.step("a", after=suspend))


async def in_a_generator_that_awaits(world: World) -> None:
    async def numbers() -> AsyncIterator[int]:
        async with open_saga() as scope:
            await scope.step(world.step("a"))
            await suspend()
            yield 1  # pragma: no cover - must not be reached

    await anext(numbers())


COROUTINES = [with_block, with_context_manager, with_exit_stack, with_save_point, in_a_step]


def warnings_of_closing(coroutine: Any) -> list[str]:
    coroutine.send(None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        coroutine.close()
        gc.collect()
    return [str(one.message) for one in caught if one.category is ResourceWarning]


@pytest.mark.parametrize("make", [*COROUTINES, in_a_generator_that_awaits], ids=lambda f: f.__name__)
def test_a_coroutine_that_is_closed_in_a_block_of_open_saga(make: Any, world: World) -> None:
    """It cannot await: a ResourceWarning names what is left, and GeneratorExit goes on."""
    messages = warnings_of_closing(make(world))
    assert len(messages) == 1
    assert "not taken back: a" in messages[0]
    assert "-a" not in world.order


@pytest.mark.parametrize("make", COROUTINES, ids=lambda f: f.__name__)
async def test_a_coroutine_that_is_closed_while_a_loop_runs(make: Any, world: World) -> None:
    """The same where there is a loop, which would take what is awaited: nothing is."""
    messages = warnings_of_closing(make(world))
    assert len(messages) == 1
    assert "not taken back: a" in messages[0]
    assert "-a" not in world.order


def test_an_async_generator_that_is_closed_where_no_loop_runs(world: World) -> None:
    """It ends without an error, and a ResourceWarning names what is left."""

    async def numbers() -> AsyncIterator[int]:
        async with open_saga() as scope:
            await scope.step(world.step("a"))
            yield 1

    one: Any = numbers()
    with pytest.raises(StopIteration):
        anext(one).send(None)
    with pytest.warns(ResourceWarning, match="not taken back: a"), pytest.raises(StopIteration):
        one.aclose().send(None)


def test_a_function_that_is_closed_may_still_note_what_is_to_be_taken_back(world: World) -> None:
    """In its clean-up, since its step has ended with it; the warning names that, too."""

    def left_over() -> None: ...

    @saga
    async def function(scope: SagaScope) -> None:
        try:
            await scope.step(world.step("a", before=suspend))
        finally:
            scope.on_rollback(left_over)

    coroutine = function()
    coroutine.send(None)
    with pytest.warns(ResourceWarning, match="not taken back: left_over, a"):
        coroutine.close()


class Falsy(Exception):
    """As an exception with a length of zero."""

    def __bool__(self) -> bool:
        return False  # pragma: no cover - nobody asks


@pytest.mark.parametrize("shape", SEQUENCES, ids=lambda shape: shape.__name__)
async def test_g2_an_exception_that_counts_as_false_is_a_failure(shape: Any, world: World) -> None:
    """Whatever an exception's class says of its truth, it goes on, and all is taken back."""
    error = Falsy()
    with pytest.raises(Falsy) as caught:
        await shape(world.step("a"), world.step("b", after=error))
    assert caught.value is error
    assert world.log == ["a", "b", "-b", "-a"]


async def test_open_saga_around_a_task_group(world: World) -> None:
    """A saga's block may hold a task group, whose failure takes the saga back."""
    with pytest.raises(ExceptionGroup):  # noqa: PT012
        async with open_saga() as scope:
            await scope.step(world.step("a"))
            async with create_task_group() as tasks:
                tasks.start_soon(as_data, world.step("b", lane="g.1", after=Boom()))
    assert world.done == []


# --- function sagas in groups -------------------------------------------------------------------


async def test_function_sagas_in_a_group(world: World) -> None:
    """Each branch has a scope of its own; a failure of one takes back all of them."""

    @saga
    async def branch(scope: SagaScope, number: int) -> int:
        await scope.step(world.step(f"{number}a", lane=f"g.{number}"))
        await rounds()
        await scope.step(
            world.step(f"{number}b", lane=f"g.{number}", after=Boom() if number == 2 else None)
        )
        return number

    @saga
    async def function(scope: SagaScope, *numbers: int) -> tuple[int, ...]:
        await scope.step(world.step(f"first of {numbers}"))
        return await scope.parallel(*map(branch.bind, numbers))

    assert await function(0, 1) == (0, 1)
    with pytest.raises(ExceptionGroup):
        await function(2, 3)
    assert sorted(world.done) == ["0a", "0b", "1a", "1b", "first of (0, 1)"]


async def test_g4_a_branch_cannot_catch_its_groups_cancellation_for_good(world: World) -> None:
    """A branch that is cancelled because its sibling failed unwinds, and the group fails."""

    @saga
    async def waits(scope: SagaScope) -> None:
        with suppress(Boom):
            await scope.step(world.step("a", lane="g.1", before=sleep_forever))

    async def when_a_waits() -> None:
        await world.begun("a").wait()

    @saga
    async def function(scope: SagaScope) -> None:
        failing = world.step("b", lane="g.2", before=when_a_waits, after=Boom())
        await scope.parallel(waits.bind(), failing.bind())

    with pytest.raises(ExceptionGroup) as caught:
        await function()
    assert [Boom] == [type(error) for error in caught.value.exceptions]
    assert world.done == []


# --- context variables --------------------------------------------------------------------------

user: ContextVar[str] = ContextVar("user", default="nobody")


@pytest.mark.parametrize("in_scope", [in_function, in_block], ids=lambda f: f.__name__)
async def test_compensations_see_the_context_as_the_saga_left_it(in_scope: Any) -> None:
    """Not what members changed; but what the function, or an action in its task, has set last."""
    seen: list[tuple[str, str]] = []

    def step(name: str, sets: str | None = None) -> Step[[], None]:
        async def action() -> None:
            seen.append((name, user.get()))
            if sets:
                user.set(sets)

        return Step(action, lambda: seen.append((f"-{name}", user.get())), name=name)

    async def body(scope: SagaScope) -> None:
        user.set("function")
        await scope.step(step("a", sets="action"))
        await scope.parallel(step("b", sets="member").bind(), step("c").bind())
        await scope.step(step("d"))
        user.set("last")
        raise Boom

    with pytest.raises(Boom):
        await in_scope(body)
    assert seen[:4] == [("a", "function"), ("b", "action"), ("c", "action"), ("d", "action")]
    assert seen[4] == ("-d", "last")
    assert sorted(seen[5:7]) == [("-b", "last"), ("-c", "last")]
    assert seen[7] == ("-a", "last")


async def test_compensations_change_no_context_of_the_saga() -> None:
    """What a compensation sets is not seen by the function that goes on."""
    user.set("function")

    def back() -> None:
        user.set("compensation")

    async def fail() -> None:
        raise Boom

    async with open_saga() as scope:
        with suppress(Boom):
            await scope.step(fail, compensation=back)
        assert user.get() == "function"


@both_ways
async def test_current_effect_between_the_calls(middleware: Any) -> None:
    """A function's own code runs inside of no action: there is no effect there."""

    async def body(scope: SagaScope) -> None:
        assert current_effect() is None
        await scope.step(nothing)
        assert current_effect() is None
        async with scope.nested() as nested:
            await nested.step(nothing)
            assert current_effect() is None
        assert current_effect() is None

    await in_function(body, middleware=middleware)
    await in_block(body, middleware=middleware)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("call", [inline, defined, as_save_point], ids=lambda f: f.__name__)
async def test_a_block_within_an_action_leaves_that_action_its_effect(
    call: Any, fails: bool, world: World
) -> None:
    """A saga of its own inside of an action: after each of its calls the effect is the action's again."""
    names: list[str] = []

    async def note() -> None:
        effect = current_effect()
        assert effect is not None
        names.append(effect.name)

    async def action() -> None:
        async with open_saga() as scope:
            await note()
            with suppress(Boom):
                await call(scope, world, "a", before=note, after=Boom() if fails else None)
            await note()

    await Saga([Step(action)])()
    assert names == ["action", "a", "action"]


async def test_a_cancelled_block_is_taken_back(world: World) -> None:
    """G8: a scope around a block of open_saga is cancelled between two calls."""
    with CancelScope() as scope_around:
        async with open_saga() as scope:
            await scope.step(world.step("a"))
            scope_around.cancel()
            await checkpoint()
    assert scope_around.cancelled_caught
    assert world.log == ["a", "-a"]
    assert scope.outcome is not None
    assert isinstance(scope.outcome.error, get_cancelled_exc_class())


async def test_g8_a_save_point_in_an_async_generator_that_is_closed(world: World) -> None:
    """A save-point that ends because its generator is closed is taken back there, and nothing is lost."""

    async def generator(scope: SagaScope) -> AsyncIterator[int]:
        async with scope.nested() as extras:
            await extras.step(world.step("a"))
            yield 1

    @saga
    async def function(scope: SagaScope) -> None:
        async with aclosing(generator(scope)) as numbers:
            async for _ in numbers:
                break
        assert world.log == ["a", "-a"]
        await scope.step(world.step("b"))

    outcome = await function.run()
    assert states(outcome) == {"a": "COMPENSATED", "b": "COMPLETED"}


async def test_g7_a_save_point_that_is_open_when_its_saga_ends(world: World) -> None:
    """A save-point that nobody ended is taken back with the rest, and takes no more calls."""
    inner: list[SagaScope] = []

    @saga
    async def function(scope: SagaScope) -> None:
        inner.append(await scope.nested().__aenter__())
        await inner[0].step(world.step("a"))
        raise Boom

    with pytest.raises(Boom) as caught:
        await function()
    outcome = outcome_of(caught.value)
    assert outcome is not None
    assert states(outcome) == {"a": "COMPENSATED"}
    with pytest.raises(ScopeClosed):
        await inner[0].step(world.step("b"))


async def test_g7_a_save_point_that_ends_after_its_saga(world: World) -> None:
    """The block of a save-point that outlives its saga is told that it came too late."""
    held: list[Any] = []

    @saga
    async def function(scope: SagaScope) -> None:
        held.append(scope.nested())
        extras = await held[0].__aenter__()
        await extras.step(world.step("a"))

    with pytest.raises(ScopeBusy):
        await function()
    with pytest.raises(ScopeClosed, match="'nested' of saga 'function' ended after its scope"):
        await held[0].__aexit__(None, None, None)


async def test_a_call_that_ends_as_the_rollback_begins_is_taken_back_once() -> None:
    """It takes itself back, as it outlived its scope; the rollback, which had begun before, leaves it alone."""
    go, late, done = Event(), Event(), Event()
    taken_back: list[str] = []

    async def watch(effect: Effect, call_next: CallNext) -> object:
        if effect.kind == "rollback" and not effect.path:
            go.set()
            await late.wait()
            try:
                return await call_next()
            finally:
                done.set()
        if effect.kind == "compensation":
            taken_back.append(effect.name)
            if not late.is_set():
                late.set()
                await done.wait()
        return await call_next()

    async def slow() -> None:
        await go.wait()

    def nothing() -> None: ...

    async def call(scope: SagaScope) -> None:
        with pytest.raises(ScopeClosed, match="it was taken back"):
            await scope.step(slow, compensation=nothing)

    @saga(middleware=[watch])
    async def function(scope: SagaScope) -> None:
        tasks.start_soon(call, scope)
        await wait_all_tasks_blocked()
        raise Boom

    with fail_after(10):
        async with create_task_group() as tasks:
            with pytest.raises(Boom):
                await function.run()
    assert taken_back == ["slow"]
