"""Unwinding: its order, its limits, its failures, and what is reported of it (G7, G10, G11, G13)."""

from __future__ import annotations

import asyncio
import gc
import inspect
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from anyio import (
    CancelScope,
    Event,
    current_time,
    from_thread,
    get_cancelled_exc_class,
    sleep,
    sleep_forever,
)
from anyio.lowlevel import checkpoint
from conftest import ASYNCIO
from helpers import (
    GROUPED,
    SEQUENCES,
    Boom,
    Crash,
    World,
    all_blocked,
    as_data,
    as_function,
    cancel_other_tasks,
    checked_world,
    leaf_errors,
    never_awaited,
    nothing,
    rounds,
    states,
)
from trio.testing import MockClock

from pysagas import (
    AlreadyCommitted,
    CallNext,
    Commit,
    CompensationFailed,
    Effect,
    MiddlewareError,
    Outcome,
    Parallel,
    Saga,
    SagaBuilder,
    SagaScope,
    SagaState,
    ScopeBusy,
    ScopeClosed,
    Step,
    StepState,
    open_saga,
    outcome_of,
    saga,
)

pytestmark = pytest.mark.anyio

on_asyncio_only = pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)

world = pytest.fixture(checked_world)

Middleware = Callable[[Effect, CallNext], Awaitable[object]]


async def watch(effect: Effect, call_next: CallNext) -> object:
    """A middleware that changes nothing: with it, everything goes the long way."""
    return await call_next()


both_ways = pytest.mark.parametrize("middleware", [(), (watch,)], ids=["plain", "middleware"])


async def failed(part: Awaitable[object]) -> CompensationFailed:
    """The CompensationFailed that a run raises."""
    with pytest.raises(CompensationFailed) as caught:
        await part
    return caught.value


# --- order --------------------------------------------------------------------------------------


@both_ways
async def test_g7_reverse_order_one_at_a_time(middleware: Any, world: World) -> None:
    """Steps are taken back last one first, each after the one before has ended."""
    steps = [*map(world.step, "abcd"), world.step("e", after=Boom())]
    with pytest.raises(Boom):
        await Saga(steps, middleware=middleware)()
    assert world.log[5:] == ["-e", "-d", "-c", "-b", "-a"]
    assert world.order[5:] == ["-e", "-d", "-c", "-b", "-a"]


@both_ways
@pytest.mark.parametrize("limit", [None, 1, 2, 3, 4, 5])
async def test_g1_g7_members_are_taken_back_together(
    limit: int | None, middleware: Any, world: World
) -> None:
    """A group's compensations run at the same time, `limit` at once, entered in the order given."""
    running, most = 0, 0

    async def back() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await rounds()
        running -= 1

    group = Parallel(*(world.member(name, back=back) for name in "bcde"), limit=limit)
    with pytest.raises(Boom):
        await Saga([world.step("a"), group, world.step("f", after=Boom())], middleware=middleware)()
    assert most == min(limit or 4, 4)
    assert world.order[6:] == ["-f", "-b", "-c", "-d", "-e", "-a"]
    assert world.done == []


@both_ways
async def test_g7_a_members_own_steps_go_back_in_reverse(middleware: Any, world: World) -> None:
    """Two members that are sagas are taken back at the same time, each in reverse."""
    met = Event()

    async def wait_for_the_other() -> None:
        await met.wait()

    async def meet() -> None:
        met.set()
        await checkpoint()

    one = Saga([world.step("b", lane="g.1"), world.step("c", lane="g.1", back=wait_for_the_other)])
    two = Saga([world.step("d", lane="g.2", back=meet), world.step("e", lane="g.2")])
    with pytest.raises(Boom):
        await Saga(
            [world.step("a"), Parallel(one, two), world.step("f", after=Boom())],
            middleware=middleware,
        )()
    back = [moment for moment in world.log if moment.startswith("-")]
    assert back[0] == "-f"
    assert back[-1] == "-a"
    assert back.index("-c") < back.index("-b")
    assert back.index("-e") < back.index("-d")
    # `c` waited until `d` was being taken back: so they went back at the same time.
    assert met.is_set()


@both_ways
async def test_g7_groups_in_groups(middleware: Any, world: World) -> None:
    """A group in a group, with a saga in it, goes back as a tree."""
    inner = Parallel(
        world.step("c", lane="g.2/h.c"),
        Saga([world.step("d", lane="g.2/h.x"), world.step("e", lane="g.2/h.x")]),
    )
    outer = Parallel(world.member("b", "g"), inner)
    with pytest.raises(Boom):
        await Saga([world.step("a"), outer, world.step("f", after=Boom())], middleware=middleware)()
    assert world.done == []
    assert sorted(world.log[6:]) == ["-a", "-b", "-c", "-d", "-e", "-f"]


async def test_g3_what_takes_a_step_back(world: World) -> None:
    """A completed step goes back by `undo`, else by `compensation`; one in doubt by `compensation` only."""
    log: list[str] = []

    def step(name: str, *, undo: bool, compensation: bool, fails: bool = False) -> Step[..., Any]:
        async def action() -> str:
            if fails:
                raise Boom
            return f"result {name}"

        return Step(
            action,
            (lambda: log.append(f"compensation {name}")) if compensation else None,
            undo=(lambda result: log.append(f"undo {result}")) if undo else None,
            name=name,
        )

    with pytest.raises(Boom) as caught:
        await Saga(
            [
                step("none", undo=False, compensation=False),
                step("undo", undo=True, compensation=False),
                step("back", undo=False, compensation=True),
                step("both", undo=True, compensation=True),
                Parallel(
                    step("m-none", undo=False, compensation=False),
                    step("m-undo", undo=True, compensation=False),
                ),
                step("fails", undo=True, compensation=True, fails=True),
            ]
        )()
    assert log == [
        "compensation fails",
        "undo result m-undo",
        "undo result both",
        "compensation back",
        "undo result undo",
    ]
    outcome = outcome_of(caught.value)
    assert outcome is not None
    assert outcome.in_doubt == ()
    assert states(outcome)["none"] == states(outcome)["m-none"] == "COMPLETED"


@pytest.mark.parametrize("in_group", [False, True])
async def test_g3_in_doubt_with_an_undo_alone(in_group: bool) -> None:
    """A step in doubt that has an undo only stays UNKNOWN, and is listed."""
    undone: list[object] = []

    async def action() -> None:
        raise Boom

    step: Any = Step(action, undo=undone.append, name="charge")
    with pytest.raises((Boom, ExceptionGroup)) as caught:
        await Saga([Parallel(step) if in_group else step])()
    outcome = outcome_of(caught.value)
    assert outcome is not None
    assert [report.name for report in outcome.in_doubt] == ["charge"]
    assert outcome.state is SagaState.COMPENSATED
    assert "in doubt: 'charge'" in caught.value.__notes__[0]
    assert undone == []


@pytest.mark.parametrize(
    "kind", ["sync", "async", "returns a coroutine", "returns an awaitable", "callable object"]
)
@pytest.mark.parametrize("in_group", [False, True])
@both_ways
async def test_compensations_of_any_kind_are_called(kind: str, in_group: bool, middleware: Any) -> None:
    """A compensation is called as it is, and what it returns is awaited where it can be."""
    log: list[str] = []

    async def back_async() -> None:
        await checkpoint()
        log.append("back")

    class Back:
        async def __call__(self) -> None:
            await back_async()

    class Later:
        def __await__(self) -> Any:
            return back_async().__await__()

    back: Any = {
        "sync": lambda: log.append("back"),
        "async": back_async,
        "returns a coroutine": lambda: back_async(),
        "returns an awaitable": Later,
        "callable object": Back(),
    }[kind]

    async def fail() -> None:
        raise Boom

    step: Any = Step(nothing, back)
    with pytest.raises(Boom):
        await Saga([Parallel(step) if in_group else step, Step(fail)], middleware=middleware)()
    assert log == ["back"]


# --- states -------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("in_group", [False, True])
async def test_g3_a_compensation_gets_the_keywords_too(in_group: bool, middleware: Any) -> None:
    """What the action got by keyword its compensation gets by keyword."""
    got: list[tuple[int, str]] = []

    async def back(number: int, *, key: str) -> None:
        got.append((number, key))

    async def action(number: int, *, key: str) -> None:
        pass

    part: Any = Step(action, back).bind(1, key="value")
    with pytest.raises(Boom):
        async with open_saga(middleware=middleware) as scope:
            await scope.step(Parallel(part) if in_group else part)
            raise Boom
    assert got == [(1, "value")]


@both_ways
async def test_g13_each_step_ends_in_one_state(middleware: Any, world: World) -> None:
    """The outcome lists every step of a saga as data, those never reached included, with its state."""
    crash, boom = Crash(), Boom()

    async def declines() -> None:
        raise OSError

    async def fails() -> None:
        raise boom

    group = Parallel(
        world.member("b"), Step(declines, nothing, not_applied=OSError, name="c"), name="group"
    )
    steps = Saga(
        [
            world.step("a", back=crash),
            Saga([world.step("nested")]),
            Parallel(Step(fails, name="fails")),
            Saga([world.step("never")]),
            Parallel(world.member("never member"), Parallel()),
            saga(lone),
        ],
        middleware=middleware,
    )
    error = await failed(steps())
    reports = {report.name: report for report in error.outcome.steps}
    assert {name: report.state.name for name, report in reports.items()} == {
        "a": "COMPENSATION_FAILED",
        "nested": "COMPENSATED",
        "fails": "UNKNOWN",
        "never": "NOT_STARTED",
        "never member": "NOT_STARTED",
        "lone": "NOT_STARTED",
    }
    assert [report.path for report in error.outcome.steps] == [
        (0,),
        (1, 0),
        (2, 0),
        (3, 0),
        (4, 0),
        (5,),
    ]
    assert reports["a"].compensation_error is crash
    assert reports["a"].result == "result of a"
    assert reports["fails"].error is boom

    with pytest.raises(ExceptionGroup) as caught:
        await Saga([group], middleware=middleware)()
    assert states(outcome_of(caught.value)) == {"b": "COMPENSATED", "c": "NOT_APPLIED"}


async def test_g13_a_saga_without_steps_is_never_reported_as_a_step() -> None:
    """An empty saga has no steps to report, whether it was reached or not."""

    def fail() -> None:
        raise Boom

    empty = Saga([], name="empty")
    with pytest.raises(Boom) as caught:
        await Saga([empty, Step(fail, name="a"), empty])()
    assert states(outcome_of(caught.value)) == {"a": "UNKNOWN"}


async def lone(scope: SagaScope) -> None:
    raise AssertionError  # pragma: no cover - must not be reached


@both_ways
async def test_g13_members_that_never_started(middleware: Any, world: World) -> None:
    """A member that never started is reported NOT_STARTED, and never compensated."""
    group = Parallel(world.member("a"), world.member("b", after=Boom()), world.member("c"), limit=1)
    with pytest.raises(ExceptionGroup) as caught:
        await Saga([group], middleware=middleware)()
    assert states(outcome_of(caught.value)) == {
        "a": "COMPENSATED",
        "b": "COMPENSATED",
        "c": "NOT_STARTED",
    }
    assert world.order == ["a", "b", "-a", "-b"]


# --- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SEQUENCES, ids=lambda shape: shape.__name__)
async def test_g11_a_compensation_that_fails_does_not_stop_the_others(shape: Any, world: World) -> None:
    """All compensations run; one CompensationFailed carries what started it and all that failed."""
    boom, crashes = Boom("why"), [Crash("first"), Crash("second")]
    steps = [
        world.step("a"),
        world.step("b", back=crashes[1]),
        world.step("c"),
        world.step("d", back=crashes[0]),
        world.step("e", after=boom),
    ]
    error = await failed(shape(*steps))
    assert world.log[5:] == ["-e", "-c", "-a"]
    assert error.error is boom
    assert error.failures == tuple(crashes)
    assert error.outcome is outcome_of(error)
    assert error.outcome.state is SagaState.FAILED
    assert error.outcome.error is error
    assert isinstance(error, Exception)
    cause = error.__cause__
    assert isinstance(cause, ExceptionGroup)
    assert cause.exceptions == (boom, *crashes)


async def test_g11_the_message_and_the_traceback_list_every_failure(world: World) -> None:
    """The message names each step that could not be taken back; the traceback shows each exception."""
    steps = [
        world.step("hotel", back=Crash("no answer\nfrom the hotel")),
        Parallel(world.member("car", back=Crash())),
        world.step("card", after=Boom("declined")),
    ]
    error = await failed(Saga(steps, name="trip")())
    assert str(error).splitlines() == [
        "saga 'trip' could not be taken back whole after Boom: declined:",
        "  compensation of step 'car' at (1, 0) in saga 'trip': Crash",
        "  compensation of step 'hotel' at (0,) in saga 'trip': Crash: no answer",
    ]
    shown = "".join(traceback.format_exception(error))
    for text in ("Boom: declined", "Crash: no answer", "from the hotel", "compensation of step 'car'"):
        assert text in shown


async def test_g11_a_long_list_of_failures_is_counted(world: World) -> None:
    """A message lists some twenty failures, and counts the others."""

    def back(number: int) -> None:
        raise Crash(number)

    def fail() -> None:
        raise Boom

    steps: list[Any] = [Step(lambda number: None, back).bind(number) for number in range(30)]
    error = await failed(Saga([*steps, Step(fail)])())
    assert len(error.failures) == 30
    assert str(error).splitlines()[-1] == "  ... and 10 more (see .failures)"


async def test_g11_except_star_can_name_it(world: World) -> None:
    """A CompensationFailed is a plain exception, so that `except*` finds it in a group."""
    found = []
    try:
        try:
            await as_data(world.step("a", back=Crash()), world.step("b", after=Boom()))
        except CompensationFailed as error:
            raise ExceptionGroup("around", [error]) from None
    except* CompensationFailed as group:
        found += group.exceptions
    assert [type(error) for error in found] == [CompensationFailed]


@both_ways
@pytest.mark.parametrize("limit", [None, 1])
async def test_g11_in_a_group_the_others_run_to_their_end(
    limit: int | None, middleware: Any, world: World
) -> None:
    """A member's compensation that fails cuts no other one off."""
    crashes = [Crash("b"), Crash("d")]
    group = Parallel(
        world.member("b", back=crashes[0]),
        world.member("c"),
        world.member("d", back=crashes[1]),
        world.member("e"),
        limit=limit,
    )
    error = await failed(
        Saga([world.step("a"), group, world.step("f", after=Boom())], middleware=middleware)()
    )
    assert set(error.failures) == set(crashes)
    assert world.done == ["b", "d"]
    assert states(error.outcome) == {
        "a": "COMPENSATED",
        "b": "COMPENSATION_FAILED",
        "c": "COMPENSATED",
        "d": "COMPENSATION_FAILED",
        "e": "COMPENSATED",
        "f": "COMPENSATED",
    }


@pytest.mark.parametrize("in_group", [False, True])
async def test_g11_failures_of_one_run_come_out_in_one_exception(in_group: bool, world: World) -> None:
    """A failure that a call on a scope reported, and those of the run's end, are reported together."""
    boom, crashes = Boom(), [Crash("b"), Crash("a")]

    @saga
    async def function(scope: SagaScope) -> None:
        await scope.step(world.step("a", back=crashes[1]))
        last = world.member("b", after=boom, back=crashes[0])
        if in_group:
            await scope.parallel(last.bind())
        else:
            await scope.step(last)

    error = await failed(function())
    assert error.failures == tuple(crashes)
    if in_group:
        assert isinstance(error.error, ExceptionGroup)
        assert error.error.exceptions == (boom,)
    else:
        assert error.error is boom
    assert states(error.outcome) == dict.fromkeys("ab", "COMPENSATION_FAILED")


async def test_g11_failures_in_function_branches_of_a_group(world: World) -> None:
    """What the branches of a group could not take back comes out in one exception, with the group's error."""
    boom, crashes = Boom("first branch"), {"b": Crash("b"), "c": Crash("c"), "a": Crash("a")}

    def branch(name: str, error: BaseException | None) -> Saga[[], None]:
        @saga(name=f"branch {name}")
        async def function(scope: SagaScope) -> None:
            await scope.step(world.member(name, back=crashes[name], after=error))

        return function

    group = Parallel(branch("b", None), branch("c", boom))
    error = await failed(Saga([world.step("a", back=crashes["a"]), group])())
    assert sorted(map(str, error.failures)) == ["a", "b", "c"]
    assert boom in all_below(error)
    assert set(crashes.values()) <= set(all_below(error))


def all_below(error: BaseException | None) -> list[BaseException]:
    """Every exception that is reached from one: members of groups, causes, and contexts."""
    found: dict[int, BaseException] = {}
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in found:
            continue
        found[id(one)] = one
        waiting += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions
        if isinstance(one, CompensationFailed):
            waiting += [one.error, *one.failures]
    return list(found.values())


async def test_g11_notes_on_failures_name_their_step(world: World) -> None:
    """Each failure carries a note with its step, its place, and its saga."""
    inner = Saga([world.step("c", back=Crash())], name="inner")
    error = await failed(
        Saga([world.step("a"), Parallel(inner), world.step("d", after=Boom())], name="outer")()
    )
    (failure,) = error.failures
    assert failure.__notes__ == ["compensation of step 'c' at (1, 0, 0) in saga 'inner'"]


@both_ways
async def test_g11_stop_begins_no_more(middleware: Any, world: World) -> None:
    """With "stop", nothing more is begun after a failure; what was not begun keeps its state."""
    crash = Crash()
    steps = [
        world.step("a"),
        Parallel(world.member("b")),
        world.step("c", back=crash),
        world.step("d", after=Boom()),
    ]
    error = await failed(Saga(steps, on_compensation_failure="stop", middleware=middleware)())
    assert error.failures == (crash,)
    assert states(error.outcome) == {
        "a": "COMPLETED",
        "b": "COMPLETED",
        "c": "COMPENSATION_FAILED",
        "d": "COMPENSATED",
    }
    assert world.log[4:] == ["-d"]


@both_ways
@pytest.mark.parametrize("limit", [None, 2])
async def test_g11_stop_lets_running_compensations_end(
    limit: int | None, middleware: Any, world: World
) -> None:
    """In a group, those that run when one fails run to their end; waiting ones are not begun."""

    async def crash_when_c_runs() -> None:
        await world.begun("-c").wait()
        raise Crash

    group = Parallel(
        world.member("b", back=crash_when_c_runs),
        world.member("c"),
        world.member("d"),
        limit=limit,
    )
    error = await failed(
        Saga(
            [world.step("a"), group, world.step("e", after=Boom())],
            on_compensation_failure="stop",
            middleware=middleware,
        )()
    )
    assert states(error.outcome) == {
        "a": "COMPLETED",
        "b": "COMPENSATION_FAILED",
        "c": "COMPENSATED",
        "d": "COMPENSATED" if limit is None else "COMPLETED",
        "e": "COMPENSATED",
    }


@pytest.mark.parametrize(
    ("outer_policy", "inner_policy", "expected"),
    [
        ("continue", "continue", {"a": "COMPENSATED", "b": "COMPENSATED"}),
        ("continue", "stop", {"a": "COMPENSATED", "b": "COMPLETED"}),
        ("stop", "continue", {"a": "COMPLETED", "b": "COMPLETED"}),
        ("stop", "stop", {"a": "COMPLETED", "b": "COMPLETED"}),
    ],
)
@pytest.mark.parametrize("in_group", [False, True])
async def test_g11_the_policy_of_an_inner_saga_is_for_its_own_steps(
    outer_policy: Any, inner_policy: Any, in_group: bool, expected: dict[str, str], world: World
) -> None:
    """An inner saga that stops leaves the outer one going on; an outer one that stops stops all."""
    world.left = {"b"}
    inner: Any = Saga(
        [world.step("b"), world.step("c", back=Crash())], on_compensation_failure=inner_policy
    )
    error = await failed(
        Saga(
            [
                world.step("a"),
                Parallel(inner) if in_group else inner,
                world.step("d", after=Boom()),
            ],
            on_compensation_failure=outer_policy,
        )()
    )
    assert states(error.outcome) == {
        **expected,
        "c": "COMPENSATION_FAILED",
        "d": "COMPENSATED",
    }


async def test_g11_stop_with_two_sagas_side_by_side(world: World) -> None:
    """One member that stops does not keep its sibling from being taken back."""
    world.left = {"b"}
    stopping = Saga(
        [world.step("b", lane="g.1"), world.step("c", lane="g.1", back=Crash())],
        on_compensation_failure="stop",
    )
    other = Saga([world.step("d", lane="g.2"), world.step("e", lane="g.2")])
    error = await failed(
        Saga([world.step("a"), Parallel(stopping, other), world.step("f", after=Boom())])()
    )
    assert states(error.outcome) == {
        "a": "COMPENSATED",
        "b": "COMPLETED",
        "c": "COMPENSATION_FAILED",
        "d": "COMPENSATED",
        "e": "COMPENSATED",
        "f": "COMPENSATED",
    }


@pytest.mark.parametrize("order", [KeyboardInterrupt, SystemExit])
async def test_g8_g11_an_order_to_quit_in_a_failed_call_keeps_what_started_it(
    order: type[BaseException], world: World
) -> None:
    """A compensation that quits: the report says that the step's failure started it all, not that order."""
    boom, quitting = Boom(), order()

    @saga
    async def function(scope: SagaScope) -> None:
        await scope.step(world.step("a"))
        await scope.step(world.step("b", after=boom, back=quitting))

    with pytest.raises(order):
        await function()
    assert isinstance(quitting.__cause__, CompensationFailed)
    assert quitting.__cause__.error is boom


@pytest.mark.parametrize("order", [KeyboardInterrupt, SystemExit])
async def test_g8_g11_an_order_to_quit_after_a_failed_rollback_started_its_own(
    order: type[BaseException], world: World
) -> None:
    """An order to quit that comes later, from elsewhere, is what started the rollback of the rest."""
    quitting = order()

    @saga
    async def function(scope: SagaScope) -> None:
        await scope.step(world.step("a"))
        with pytest.raises(CompensationFailed):
            await scope.step(world.step("b", after=Boom(), back=Crash()))
        raise quitting

    with pytest.raises(order):
        await function()
    assert isinstance(quitting.__cause__, CompensationFailed)
    assert quitting.__cause__.error is quitting


async def test_g11_stop_after_a_failed_call_on_a_scope(world: World) -> None:
    """With "stop", a call whose work could not be taken back leaves the earlier steps as they are."""

    @saga(on_compensation_failure="stop")
    async def function(scope: SagaScope) -> None:
        await scope.step(world.step("a"))
        await scope.step(world.step("b", after=Boom(), back=Crash()))

    error = await failed(function())
    assert states(error.outcome) == {"a": "COMPLETED", "b": "COMPENSATION_FAILED"}


async def test_g2_stop_keeps_a_siblings_call_from_being_taken_back(world: World) -> None:
    """With "stop", a call that nothing takes back any more raises what a failed rollback raises."""
    stopped = Event()
    raised: list[BaseException] = []

    @saga
    async def first(scope: SagaScope) -> None:
        try:
            await scope.step(world.step("b", lane="g.1", after=Boom(), back=Crash()))
        finally:
            stopped.set()

    @saga
    async def second(scope: SagaScope) -> None:
        await stopped.wait()
        try:
            await scope.step(world.step("c", lane="g.2", after=Boom()))
        except Boom:
            await scope.step(world.step("d", lane="g.2"))
        except CompensationFailed as error:
            raised.append(error)
            with pytest.raises(ScopeClosed):
                await scope.step(world.step("d", lane="g.2"))
            raise

    @saga(on_compensation_failure="stop")
    async def function(scope: SagaScope) -> None:
        await scope.step(world.step("a"))
        await scope.parallel(first, second, on_failure="finish")

    error = await failed(function())
    assert states(error.outcome) == {"a": "COMPLETED", "b": "COMPENSATION_FAILED", "c": "UNKNOWN"}
    assert "not even begun: 'c', 'a'" in str(error)
    (call,) = raised
    assert isinstance(call, CompensationFailed)
    assert isinstance(call.error, Boom)
    assert [str(failure) for failure in call.failures] == [str(failure) for failure in error.failures]


async def test_g11_one_exception_object_raised_again_and_again(world: World) -> None:
    """A constant exception that many compensations raise is reported for each, its notes once each."""
    crash = Crash("constant")
    for _ in range(2):
        fresh = World()
        error = await failed(
            as_data(
                fresh.step("a", back=crash), fresh.step("b", back=crash), fresh.step("c", after=Boom())
            )
        )
        assert error.failures == (crash, crash)
    assert len(crash.__notes__) == len(set(crash.__notes__)) == 2


# --- time limits --------------------------------------------------------------------------------


@both_ways
async def test_g10_compensation_timeout(middleware: Any, world: World) -> None:
    """One compensation that takes too long is cut off, and reported; the others run."""
    steps = [
        world.step("a"),
        world.step("b", back=sleep_forever, compensation_timeout=0.01),
        world.step("c", after=Boom()),
    ]
    error = await failed(Saga(steps, middleware=middleware)())
    assert [TimeoutError] == [type(failure) for failure in error.failures]
    assert "0.01" in str(error.failures[0])
    assert states(error.outcome) == {
        "a": "COMPENSATED",
        "b": "COMPENSATION_FAILED",
        "c": "COMPENSATED",
    }


@both_ways
@pytest.mark.parametrize("shape", [as_data, as_function])
async def test_g10_rollback_timeout(shape: Any, middleware: Any, world: World) -> None:
    """The compensation that runs when the time is up is cut off; what is not begun keeps its state."""
    boom = Boom()
    steps = [
        world.step("a"),
        Parallel(world.member("b")),
        world.step("c", back=sleep_forever),
        world.step("d"),
    ]

    def fail() -> None:
        raise boom

    error = await failed(
        shape(
            *steps,
            Step(fail, name="e"),
            name="trip",
            rollback_timeout=0.1,
            middleware=middleware,
        )
    )
    assert states(error.outcome) == {
        "a": "COMPLETED",
        "b": "COMPLETED",
        "c": "COMPENSATION_FAILED",
        "d": "COMPENSATED",
        "e": "UNKNOWN",
    }
    assert error.outcome.state is SagaState.FAILED
    assert error.error is boom
    assert [TimeoutError, TimeoutError] == [type(failure) for failure in error.failures]
    cut, left = error.failures
    assert "cut off by rollback_timeout=0.1 s" in str(cut)
    assert isinstance(cut.__cause__, get_cancelled_exc_class())
    assert str(left).startswith("the rollback of 'trip' did not end within 0.1 s; not begun: ")
    assert sorted(str(left).rpartition(": ")[2].split(", ")) == ["a", "b"]


@both_ways
@pytest.mark.parametrize("limit", [None, 2])
async def test_g10_rollback_timeout_in_a_group(
    limit: int | None, middleware: Any, world: World
) -> None:
    """In a group every running compensation is cut off, and no waiting one begun."""
    group = Parallel(
        world.member("b", back=sleep_forever),
        world.member("c", back=sleep_forever),
        world.member("d", back=sleep_forever),
        limit=limit,
    )
    error = await failed(
        Saga(
            [world.step("a"), group, world.step("e", after=Boom())],
            rollback_timeout=0.1,
            middleware=middleware,
        )()
    )
    assert states(error.outcome) == {
        "a": "COMPLETED",
        "b": "COMPENSATION_FAILED",
        "c": "COMPENSATION_FAILED",
        "d": "COMPENSATION_FAILED" if limit is None else "COMPLETED",
        "e": "COMPENSATED",
    }


async def test_g10_a_rollback_timeout_that_is_not_reached(world: World) -> None:
    """A limit that is not reached changes nothing."""
    with pytest.raises(Boom):
        await as_data(
            world.step("a"),
            Parallel(world.member("b")),
            world.step("c", after=Boom()),
            rollback_timeout=100,
        )
    assert world.done == []


@both_ways
async def test_g10_no_time_at_all(middleware: Any, world: World) -> None:
    """With a limit of 0 every compensation is cut at its first checkpoint, and all is reported."""
    error = await failed(
        Saga(
            [world.step("a"), world.step("b"), world.step("c", after=Boom())],
            rollback_timeout=0,
            middleware=middleware,
        )()
    )
    assert error.outcome.state is SagaState.FAILED
    found = set(states(error.outcome).values())
    assert found <= {"COMPLETED", "UNKNOWN", "COMPENSATION_FAILED"}
    assert world.done == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("outer_limit", "inner_limit", "expected"),
    [
        # The inner limit is for the inner saga: the outer one goes on.
        (None, 0.4, {"a": "COMPENSATED", "b": "COMPLETED"}),
        (100, 0.4, {"a": "COMPENSATED", "b": "COMPLETED"}),
        # The smaller one is that of the outer saga: its time is up for all.
        (0.4, None, {"a": "COMPLETED", "b": "COMPLETED"}),
        (0.4, 100, {"a": "COMPLETED", "b": "COMPLETED"}),
        (0.4, 0.4, {"a": "COMPLETED", "b": "COMPLETED"}),
    ],
)
@pytest.mark.parametrize("in_group", [False, True])
async def test_g10_the_smallest_limit_of_those_around_counts(
    outer_limit: float | None,
    inner_limit: float | None,
    in_group: bool,
    expected: dict[str, str],
    world: World,
) -> None:
    """The limit of an inner saga counts for its steps, where that around it is not smaller."""
    world.left = {"b"}
    inner: Any = Saga(
        [world.step("b"), world.step("c", back=sleep_forever)], rollback_timeout=inner_limit
    )
    error = await failed(
        Saga(
            [
                world.step("a"),
                Parallel(inner) if in_group else inner,
                world.step("d", after=Boom()),
            ],
            rollback_timeout=outer_limit,
        )()
    )
    assert states(error.outcome) == {
        **expected,
        "c": "COMPENSATION_FAILED",
        "d": "COMPENSATED",
    }
    assert any("0.4" in str(failure) for failure in error.failures)


@both_ways
async def test_g7_g10_an_inner_saga_with_a_limit_is_taken_back_whole(
    middleware: Any, world: World
) -> None:
    """A limit that is not reached leaves nothing out, from the last step of the inner saga to its first."""
    inner = Saga([world.step("b"), world.step("c")], rollback_timeout=100)
    with pytest.raises(Boom):
        await Saga([world.step("a"), inner, world.step("d", after=Boom())], middleware=middleware)()
    assert world.log == ["a", "b", "c", "d", "-d", "-c", "-b", "-a"]


async def test_g10_the_limit_of_an_inner_saga_names_all_that_it_leaves(world: World) -> None:
    """What an inner saga had no time for is named, its first step too; the outer one goes on."""
    inner = Saga([world.step("b"), world.step("c")], name="inner", rollback_timeout=0)
    world.left = {"b", "c"}
    error = await failed(as_data(world.step("a"), inner, world.step("d", after=Boom())))
    assert ["the rollback of 'inner' did not end within 0 s; not begun: b, c"] == [
        str(failure) for failure in error.failures
    ]
    assert world.done == ["b", "c"]


@pytest.mark.parametrize("own", [None, 100])
async def test_g10_the_limit_of_an_inner_function_saga(own: float | None, world: World) -> None:
    """A function's failed call is taken back at once, under the smallest limit around it."""

    @saga(rollback_timeout=own)
    async def inner(scope: SagaScope) -> None:
        await scope.step(world.step("b", after=Boom(), back=sleep_forever))

    @saga(rollback_timeout=0.1)
    async def outer(scope: SagaScope) -> None:
        await scope.step(world.step("a"))
        await scope.step(inner)

    error = await failed(outer())
    assert states(error.outcome)["b"] == "COMPENSATION_FAILED"
    # The unwinding that follows has a limit of its own.
    assert states(error.outcome)["a"] == "COMPENSATED"


async def test_g10_a_limit_ends_with_its_rollback(world: World) -> None:
    """That the time of one failed call is over does not keep a later one from being taken back."""

    def until_that_time_is_over() -> None:
        end = current_time() + 0.2
        while current_time() <= end:
            pass

    @saga
    async def inner(scope: SagaScope) -> None:
        with suppress(Boom):
            await scope.step(world.step("b", after=Boom(), back=nothing))

    @saga(rollback_timeout=0.2)
    async def outer(scope: SagaScope) -> None:
        with suppress(Boom):
            await scope.step(world.step("a", after=Boom(), back=nothing))
        await scope.step(until_that_time_is_over)
        await scope.step(inner)

    await outer()
    assert world.log == ["a", "-a", "b", "-b"]


async def test_g10_the_limit_runs_from_when_all_members_have_stopped(world: World) -> None:
    """The time that members take to stop is not the rollback's."""

    async def slow_clean_up() -> None:
        try:
            await sleep_forever()
        finally:
            with CancelScope(shield=True):
                await sleep(0.05)

    async def when_begun() -> None:
        await world.begun("b").wait()

    group = Parallel(
        world.member("b", before=slow_clean_up), world.member("c", before=when_begun, after=Boom())
    )
    with pytest.raises(ExceptionGroup):
        await Saga([world.step("a"), group], rollback_timeout=0.04)()
    assert world.done == []


async def test_g10_the_rollback_s_limit_cuts_a_compensation_with_a_longer_one(world: World) -> None:
    """A compensation that may take its time is cut off when that of the whole rollback is up."""
    error = await failed(
        as_data(
            world.step("a", back=sleep_forever, compensation_timeout=1000),
            world.step("b", after=Boom()),
            rollback_timeout=0.1,
        )
    )
    assert states(error.outcome) == {"a": "COMPENSATION_FAILED", "b": "COMPENSATED"}


async def test_g10_the_limit_of_a_saga_around_reaches_the_groups_of_an_inner_one(world: World) -> None:
    """Members of a group, however deep, are cut off when the time of the outermost saga is up."""
    inner = Saga([Parallel(world.member("b", back=sleep_forever))])
    error = await failed(
        as_data(world.step("a"), inner, world.step("c", after=Boom()), rollback_timeout=0.1)
    )
    assert states(error.outcome) == {
        "a": "COMPLETED",
        "b": "COMPENSATION_FAILED",
        "c": "COMPENSATED",
    }


@both_ways
async def test_g10_the_clock_counts_for_sync_compensations_too(middleware: Any, world: World) -> None:
    """A compensation that never awaits lets no loop cancel anything; yet none begins after it."""

    def slow() -> None:
        end = current_time() + 0.1
        while current_time() <= end:
            pass

    steps = [Step(nothing, lambda: None, name="a"), Step(nothing, slow, name="b")]
    failing = Saga(
        [*steps, world.step("c", after=Boom(), back=nothing)],
        rollback_timeout=0.1,
        middleware=middleware,
    )
    error = await failed(failing())
    assert states(error.outcome) == {"a": "COMPLETED", "b": "COMPENSATED", "c": "COMPENSATED"}


async def test_g10_a_time_limit_inside_of_a_compensation_is_its_own_failure(world: World) -> None:
    """A compensation's own TimeoutError is told from that of the saga."""
    own = TimeoutError("mine")
    error = await failed(
        as_data(world.step("a", back=own), world.step("b", after=Boom()), rollback_timeout=100)
    )
    assert error.failures == (own,)


@pytest.mark.parametrize("order", [KeyboardInterrupt, SystemExit])
async def test_g8_g10_an_order_to_quit_when_the_time_is_up(
    order: type[BaseException], world: World
) -> None:
    """A compensation that answers its time limit by quitting: that goes on, with all that failed."""
    quitting = order()

    async def quit_when_cancelled() -> None:
        try:
            await sleep_forever()
        finally:
            raise quitting

    with pytest.raises(order) as caught:
        await as_data(
            world.step("a", back=quit_when_cancelled),
            world.step("b", after=Boom()),
            rollback_timeout=0.01,
        )
    assert caught.value is quitting
    assert isinstance(quitting.__cause__, CompensationFailed)
    assert quitting in quitting.__cause__.failures


@pytest.mark.parametrize(
    "anyio_backend",
    [pytest.param(("trio", {"clock": MockClock(autojump_threshold=0)}), id="trio-mock_clock")],
    indirect=True,
)
async def test_g10_limits_are_seconds(world: World) -> None:
    """On a clock of its own: an unwinding with a limit of 60 s ends after 60 s, not before or later."""

    async def fifty_seconds() -> None:
        await sleep(50)

    begun = current_time()
    error = await failed(
        as_data(
            world.step("a", back=fifty_seconds),
            world.step("b", back=fifty_seconds),
            world.step("c", after=Boom()),
            rollback_timeout=60,
        )
    )
    assert current_time() - begun == pytest.approx(60)
    assert states(error.outcome) == {
        "a": "COMPENSATION_FAILED",
        "b": "COMPENSATED",
        "c": "COMPENSATED",
    }


@pytest.mark.parametrize(
    "anyio_backend",
    [pytest.param(("trio", {"clock": MockClock()}), id="trio-mock_clock")],
    indirect=True,
)
async def test_g10_what_a_limit_leaves_is_reported_at_the_very_moment(world: World) -> None:
    """On a clock that stands still, with a limit of 0: the time is up, and all that is left is named."""
    error = await failed(
        as_data(*map(world.step, "ab"), world.step("c", after=Boom()), rollback_timeout=0)
    )
    assert world.log == ["a", "b", "c"]
    (left,) = error.failures
    assert str(left).endswith("not begun: a, b, c")


async def test_g10_a_limit_that_leaves_nothing_is_reported_once(world: World) -> None:
    """Where the last compensation is cut off, that is all there is to report."""
    error = await failed(
        as_data(
            world.step("a", back=sleep_forever),
            world.step("b", after=Boom()),
            rollback_timeout=0.1,
        )
    )
    assert ["cut off by rollback_timeout=0.1 s"] == [str(failure) for failure in error.failures]


async def test_g10_g14_a_limit_leaves_only_what_was_to_be_taken_back(world: World) -> None:
    """What was committed is not among the steps that a time limit leaves behind."""
    steps = [world.step("a"), Commit(), world.step("b"), world.step("c", after=Boom())]
    error = await failed(as_data(*steps, rollback_timeout=0))
    assert str(error.failures[-1]).endswith("not begun: b, c")


@both_ways
@pytest.mark.parametrize("nested", [False, True])
async def test_g2_g10_a_call_that_no_time_was_left_to_take_back(
    nested: bool, middleware: Any, world: World
) -> None:
    """It raises CompensationFailed, which names its work alone, and its saga fails, though it is caught."""
    boom = Boom()
    told: list[BaseException] = []

    @saga(rollback_timeout=0, middleware=middleware)
    async def function(scope: SagaScope) -> None:
        await scope.step(world.step("a"))
        try:
            if nested:
                async with scope.nested() as save_point:
                    await save_point.step(world.step("b"))
                    raise boom
            await scope.step(world.step("b", after=boom))
        except Exception as error:
            told.append(error)

    with suppress(CompensationFailed):
        await function()
    assert [(CompensationFailed, boom, "not begun: b")] == [
        (type(error), getattr(error, "error", None), str(error)[-12:]) for error in told
    ]


# --- started again ------------------------------------------------------------------------------


@never_awaited
@on_asyncio_only
@both_ways
@pytest.mark.parametrize("limit", [None, 100])
async def test_g9_unwinding_is_started_again(
    limit: float | None, middleware: Any, world: World
) -> None:
    """All tasks but the caller's are cancelled before the unwinding's first line: it starts again."""
    known = asyncio.all_tasks()

    async def cancel_children() -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: cancel_other_tasks(but=tuple(known)))

    steps = [world.step("a"), world.step("b"), world.step("c", before=cancel_children, after=Boom())]
    with pytest.raises(Boom):
        await Saga(steps, rollback_timeout=limit, middleware=middleware)()
    assert world.log == ["a", "b", "c", "-c", "-b", "-a"]
    gc.collect()


@on_asyncio_only
@both_ways
@pytest.mark.parametrize("limit", [None, 100])
async def test_g9_a_cancelled_unwinding_task_cuts_one_compensation(
    limit: float | None, middleware: Any, world: World
) -> None:
    """Whoever cancels the task that unwinds cuts the compensation that runs, and no other one."""

    async def cancel_this_task() -> None:
        task = asyncio.current_task()
        task.cancel()
        await checkpoint()

    steps = [*map(world.step, "ab"), world.step("c", back=cancel_this_task), world.step("d")]
    error = await failed(
        Saga([*steps, world.step("e", after=Boom())], rollback_timeout=limit, middleware=middleware)()
    )
    assert [asyncio.CancelledError] == [type(failure) for failure in error.failures]
    assert world.log[5:] == ["-e", "-d", "-b", "-a"]
    assert asyncio.current_task().cancelling() == 0


@never_awaited
@on_asyncio_only
async def test_g9_a_member_is_not_cut_where_another_task_ends_before_its_first_line(
    world: World,
) -> None:
    """Whoever cancels a task that has not begun cuts no compensation that has; its own one still runs."""

    async def cancel_who_has_not_begun() -> None:
        for task in asyncio.all_tasks():
            if inspect.getcoroutinestate(task.get_coro()) == inspect.CORO_CREATED:
                task.cancel()
        await rounds()

    group = Parallel(world.member("a", back=cancel_who_has_not_begun), world.member("b"))
    with pytest.raises(Boom):
        await Saga([group, world.step("c", after=Boom())])()
    assert world.done == []
    gc.collect()


@on_asyncio_only
async def test_g6_g9_a_cancelled_unwinding_task_waits_for_a_thread(world: World) -> None:
    """Whoever cancels the task that unwinds, while it waits for a blocking undo, does not go ahead of it."""
    unwinding: list[asyncio.Task[Any]] = []

    async def note_the_task() -> None:
        unwinding.append(asyncio.current_task())

    def undo(_: object) -> None:
        from_thread.run_sync(unwinding[0].cancel)
        from_thread.run(all_blocked)
        world.log.append("undone")

    steps = [world.step("a"), Step(lambda: 1, undo=undo, blocking=True)]
    await failed(as_data(*steps, world.step("b", after=Boom(), back=note_the_task)))
    assert world.log == ["a", "b", "-b", "undone", "-a"]


@on_asyncio_only
@both_ways
async def test_g9_a_cancelled_unwinding_task_that_waits_for_a_group(
    middleware: Any, world: World
) -> None:
    """The unwinding's task, cancelled while it waits for a group, waits on: no compensation is cut."""

    async def cancel_the_waiting_task() -> None:
        for task in asyncio.all_tasks() - known - {asyncio.current_task()}:
            task.cancel()
        await rounds()

    known = asyncio.all_tasks()
    group = Parallel(world.member("b", back=cancel_the_waiting_task))
    with pytest.raises(Boom):
        await Saga([world.step("a"), group, world.step("c", after=Boom())], middleware=middleware)()
    assert world.done == []


@on_asyncio_only
@pytest.mark.parametrize("order", [KeyboardInterrupt, SystemExit])
async def test_g8_a_middleware_that_quits_in_the_rollback(
    order: type[BaseException], world: World
) -> None:
    """A middleware around the rollback that raises an order to quit leaves no compensation out."""
    quitting = order()

    async def quits(effect: Effect, call_next: CallNext) -> object:
        if effect.kind == "rollback":
            raise quitting
        return await call_next()

    with pytest.raises(order) as caught:
        await Saga([world.step("a"), world.step("b", after=Boom())], middleware=[quits])()
    assert caught.value is quitting
    assert world.done == []


class Replacing:
    """Awaits something; a cancellation that reaches it becomes another exception: as from a signal."""

    def __init__(self, awaitable: Awaitable[object], error: BaseException) -> None:
        self.awaitable = awaitable
        self.error = error

    def __await__(self) -> Any:
        iterator = self.awaitable.__await__()
        yielded = iterator.send(None)
        while True:
            try:
                try:
                    sent = yield yielded
                except asyncio.CancelledError:
                    yielded = iterator.throw(self.error)
                else:
                    yielded = iterator.send(sent)
            except StopIteration as stop:
                return stop.value


@on_asyncio_only
@pytest.mark.parametrize("order", [KeyboardInterrupt, SystemExit])
async def test_g8_g13_an_order_to_quit_in_the_task_that_waits_for_a_group(
    order: type[BaseException], world: World
) -> None:
    """A KeyboardInterrupt in the unwinding's own task cuts no compensation off, and is not lost."""
    quitting = order()
    loop = asyncio.get_running_loop()
    before = loop.get_task_factory()
    unwinding: list[asyncio.Task[Any]] = []

    async def interruptible(coroutine: Any) -> Any:
        return await Replacing(coroutine, quitting)

    def make_task(loop: Any, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        loop.set_task_factory(before)
        task = asyncio.Task(interruptible(coroutine), loop=loop, **options)
        unwinding.append(task)
        return task

    async def the_next_task_is_the_unwinding() -> None:
        loop.set_task_factory(make_task)

    async def interrupt() -> None:
        await rounds()
        unwinding[0].cancel()
        await rounds()

    group = Parallel(world.member("b", back=interrupt), world.member("c", back=interrupt))
    last = world.step("d", before=the_next_task_is_the_unwinding, after=Boom())
    with pytest.raises(order) as caught:
        await Saga([world.step("a"), group, last])()
    assert caught.value is quitting
    assert world.done == []


@on_asyncio_only
@pytest.mark.parametrize("order", [KeyboardInterrupt, SystemExit])
async def test_g8_an_order_to_quit_during_a_rollback_that_fails(
    order: type[BaseException], world: World
) -> None:
    """It goes on, over the CompensationFailed, which is its cause."""
    quitting = order()
    world.moments = ("-a",)
    steps = [world.step("a", back=Crash()), world.step("b", after=Boom())]

    async def caller() -> None:
        with pytest.raises(order) as caught:
            await Replacing(Saga(steps)(), quitting)
        assert caught.value is quitting

    task = asyncio.create_task(caller())
    await world.begun("-a").wait()
    task.cancel()
    await all_blocked()
    world.release("-a")
    await task
    assert isinstance(quitting.__cause__, CompensationFailed)


# --- middleware around rollbacks and compensations -----------------------------------------------


def meddling(kind: str, name: str, meddle: Middleware) -> Middleware:
    """A middleware that meddles with one effect."""

    async def middleware(effect: Effect, call_next: CallNext) -> object:
        if (effect.kind, effect.name) == (kind, name):
            return await meddle(effect, call_next)
        return await call_next()

    return middleware


async def raises_before(effect: Effect, call_next: CallNext) -> object:
    raise Crash("before")


async def raises_after(effect: Effect, call_next: CallNext) -> object:
    await call_next()
    raise Crash("after")


async def answers(effect: Effect, call_next: CallNext) -> object:
    return "answer"


async def swallows(effect: Effect, call_next: CallNext) -> object:
    with suppress(Crash):
        await call_next()
    return None


async def retries(effect: Effect, call_next: CallNext) -> object:
    with suppress(Crash):
        return await call_next()
    return await call_next()


# The meddling; whether the compensation itself fails; the state of the step; what is reported.
MEDDLING = [
    (raises_before, False, "COMPENSATION_FAILED", ["before"]),
    (raises_after, False, "COMPENSATED", ["after"]),
    (answers, False, "COMPENSATED", []),
    (swallows, False, "COMPENSATED", []),
    (swallows, True, "COMPENSATION_FAILED", ["back"]),
]


@pytest.mark.parametrize("in_group", [False, True])
@pytest.mark.parametrize(("meddle", "fails", "state", "reported"), MEDDLING)
async def test_a_middleware_around_a_compensation(
    meddle: Middleware,
    fails: bool,
    state: str,
    reported: list[str],
    in_group: bool,
    world: World,
) -> None:
    """Whatever a middleware does to one compensation, the others run, and the truth is reported."""
    world.left = {"b"}  # where the middleware does not call it
    step: Any = world.member("b", back=Crash("back") if fails else None)
    with pytest.raises((Boom, CompensationFailed)) as caught:
        await Saga(
            [
                world.step("a"),
                Parallel(step) if in_group else step,
                world.step("c", after=Boom()),
            ],
            middleware=[meddling("compensation", "b", meddle)],
        )()
    error = caught.value
    assert states(outcome_of(error)) == {"a": "COMPENSATED", "b": state, "c": "COMPENSATED"}
    failures = error.failures if isinstance(error, CompensationFailed) else ()
    assert [str(failure) for failure in failures] == reported


async def test_a_middleware_may_try_a_compensation_again() -> None:
    """A second, sequential call of a compensation is allowed: the last one counts."""
    tries = []

    async def back() -> None:
        tries.append("try")
        if len(tries) == 1:
            raise Crash

    async def fail() -> None:
        raise Boom

    with pytest.raises(Boom) as caught:
        await Saga(
            [Step(nothing, back, name="a"), Step(fail, name="b")],
            middleware=[meddling("compensation", "a", retries)],
        )()
    assert tries == ["try", "try"]
    assert states(outcome_of(caught.value))["a"] == "COMPENSATED"


@pytest.mark.parametrize(
    ("meddle", "failure"),
    [(raises_before, Crash), (raises_after, Crash), (answers, MiddlewareError)],
)
@pytest.mark.parametrize("limit", [None, 100])
async def test_a_middleware_around_a_rollback_cannot_lose_it(
    meddle: Middleware, failure: type[Exception], limit: float | None, world: World
) -> None:
    """A middleware around the rollback that fails, or forgets it, is reported; all is taken back."""
    error = await failed(
        Saga(
            [world.step("a"), world.step("b", after=Boom())],
            name="trip",
            rollback_timeout=limit,
            middleware=[meddling("rollback", "trip", meddle)],
        )()
    )
    assert [failure] == [type(one) for one in error.failures]
    assert world.done == []
    assert states(error.outcome) == dict.fromkeys("ab", "COMPENSATED")


@on_asyncio_only
async def test_g9_a_middleware_around_a_rollback_that_is_cancelled(world: World) -> None:
    """A cancellation that cuts off a middleware before the rollback does not cut off the rollback."""

    async def cancelled(effect: Effect, call_next: CallNext) -> object:
        asyncio.current_task().cancel()
        await checkpoint()
        return await call_next()  # pragma: no cover - must not be reached

    with pytest.raises(Boom):
        await Saga(
            [world.step("a"), world.step("b", after=Boom())],
            name="trip",
            middleware=[meddling("rollback", "trip", cancelled)],
        )()
    assert world.done == []


# --- taking back a run that had succeeded --------------------------------------------------------


@both_ways
async def test_outcome_rollback_takes_back_a_run_that_had_succeeded(
    middleware: Any, world: World
) -> None:
    """`Outcome.rollback` unwinds a completed run, and gives a new outcome; a second call changes nothing."""
    group = Parallel(world.member("b"), world.member("c"))
    outcome = await Saga([world.step("a"), group], middleware=middleware).run()
    after = await outcome.rollback()
    assert world.done == []
    assert (outcome.state, after.state) == (SagaState.COMPLETED, SagaState.COMPENSATED)
    assert set(states(outcome).values()) == {"COMPLETED"}
    assert set(states(after).values()) == {"COMPENSATED"}
    assert await outcome.rollback() is after
    assert await after.rollback() is after


async def test_outcome_rollback_of_a_run_with_nothing_to_take_back() -> None:
    """A run of steps without a way back is COMPENSATED at once."""
    outcome = await Saga([Step(nothing)]).run()
    assert (await outcome.rollback()).state is SagaState.COMPENSATED


async def test_g11_outcome_rollback_that_fails(world: World) -> None:
    """It raises CompensationFailed, whose outcome is the new one; nothing had started the rollback."""
    crash = Crash()
    outcome = await Saga([world.step("a", back=crash), world.step("b")]).run()
    error = await failed(outcome.rollback())
    assert (error.error, error.failures) == (None, (crash,))
    assert isinstance(error.__cause__, ExceptionGroup)
    assert error.__cause__.exceptions == (crash,)
    assert error.outcome.state is SagaState.FAILED
    assert outcome_of(error) is error.outcome
    assert await outcome.rollback() is error.outcome
    assert str(error).startswith("saga 'saga' could not be taken back whole:")


async def test_g14_outcome_rollback_after_a_commit(world: World) -> None:
    """A run that passed its commit cannot be taken back, and nothing runs."""
    outcome = await SagaBuilder.create().add_step(world.step("a")).add_commit().build().run()
    with pytest.raises(AlreadyCommitted):
        await outcome.rollback()
    assert world.log == ["a"]


async def test_outcome_rollback_by_two_tasks_at_once(world: World) -> None:
    """The second task is refused while the first one is at it."""
    refused: list[BaseException] = []

    async def again() -> None:
        try:
            await outcome.rollback()
        except ScopeBusy as error:
            refused.append(error)

    outcome = await Saga([world.step("a", back=again)]).run()
    await outcome.rollback()
    assert len(refused) == 1
    assert world.log == ["a", "-a"]


async def test_g9_outcome_rollback_is_not_interrupted(world: World) -> None:
    """It runs to its end in a scope that is cancelled, which is noticed afterwards."""
    outcome = await Saga([world.step("a"), world.step("b")]).run()
    with CancelScope() as scope:
        scope.cancel()
        after = await outcome.rollback()
        await checkpoint()
    assert scope.cancelled_caught
    assert world.log == ["a", "b", "-b", "-a"]
    assert after.state is SagaState.COMPENSATED


@on_asyncio_only
async def test_g8_outcome_rollback_raises_a_late_cancellation(world: World) -> None:
    """A `task.cancel()` that came meanwhile is raised when all is taken back."""
    outcome = await Saga([world.step("a"), world.step("b")]).run()

    async def take_back() -> None:
        await outcome.rollback()

    world.moments = ("-b",)
    task = asyncio.create_task(take_back())
    await world.begun("-b").wait()
    task.cancel()
    world.release("-b")
    await asyncio.wait([task])
    assert task.cancelled()
    assert world.log == ["a", "b", "-b", "-a"]
    after = await outcome.rollback()
    assert (after.state, after.error) == (SagaState.COMPENSATED, None)


# --- committed ----------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("limit", [None, 100])
async def test_g14_what_was_committed_stays(limit: float | None, middleware: Any, world: World) -> None:
    """A failure after the commit takes the later work back, and only that; the saga ends FAILED."""
    boom = Boom()
    definition = (
        SagaBuilder.create(rollback_timeout=limit, middleware=middleware)
        .add_step(world.step("a"))
        .add_commit()
        .add_step(world.step("b"))
        .add_step(world.step("c", after=boom))
        .build()
    )
    with pytest.raises(Boom) as caught:
        await definition.run(exceptions=Boom)
    assert caught.value is boom
    assert world.log == ["a", "b", "c", "-c", "-b"]
    outcome = outcome_of(boom)
    assert outcome is not None
    assert outcome.state is SagaState.FAILED
    assert states(outcome) == {"a": "COMPLETED", "b": "COMPENSATED", "c": "COMPENSATED"}


# --- what compensations see ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SEQUENCES, *GROUPED], ids=lambda shape: shape.__name__)
async def test_no_exception_is_lost(shape: Any, world: World) -> None:
    """G13: whatever actions and compensations raise is reached from what comes out, in any shape."""
    boom, crashes = Boom(), [Crash("a"), Crash("b")]
    with pytest.raises(Exception) as caught:  # noqa: PT011
        await shape(
            world.step("a", back=crashes[0], lane="g.1"),
            world.step("b", back=crashes[1], lane="g.1"),
            world.step("c", after=boom, lane="g.1"),
        )
    found = all_below(caught.value)
    assert boom in found
    assert set(crashes) <= set(found)
    outcome = outcome_of(caught.value)
    assert outcome is not None
    reports = {report.name: report for report in outcome.steps}
    assert reports["c"].error is boom
    assert [reports[name].compensation_error for name in "ab"] == crashes
    assert [leaf_errors(caught.value)] == [[caught.value]]


async def test_states_while_the_rollback_runs(world: World) -> None:
    """A compensation that has begun and not returned counts as COMPENSATION_FAILED, whoever looks."""
    seen: list[dict[str, str]] = []

    @saga
    async def function(scope: SagaScope) -> None:
        await scope.step(world.step("a"))
        try:
            await scope.step(world.step("b", after=Boom(), back=Crash()))
        except CompensationFailed as error:
            seen.append(states(error.outcome))
            raise

    error = await failed(function())
    assert seen == [{"a": "COMPLETED", "b": "COMPENSATION_FAILED"}]
    assert states(error.outcome) == {"a": "COMPENSATED", "b": "COMPENSATION_FAILED"}


async def test_g11_the_report_of_a_failed_call_is_of_that_moment(world: World) -> None:
    """What a function is told when a call could not be taken back stays as it was; the end has its own."""
    boom = Boom()
    told: list[Outcome[object]] = []

    @saga
    async def function(scope: SagaScope) -> None:
        await scope.step(world.step("a"))
        with pytest.raises(CompensationFailed) as caught:
            await scope.step(world.step("b", after=boom, back=Crash()))
        told.append(caught.value.outcome)

    error = await failed(function())
    assert (told[0].state, told[0].error) == (SagaState.FAILED, boom)
    assert states(told[0]) == {"a": "COMPLETED", "b": "COMPENSATION_FAILED"}
    assert states(error.outcome) == {"a": "COMPENSATED", "b": "COMPENSATION_FAILED"}


async def test_a_compensation_that_opens_a_saga_of_its_own(world: World) -> None:
    """A compensation may run another saga, which is an independent run."""
    other = World()

    async def another() -> None:
        with pytest.raises(Boom):
            await as_data(other.step("x"), other.step("y", after=Boom()))

    with pytest.raises(Boom):
        await as_data(world.step("a", back=another), world.step("b", after=Boom()))
    assert other.log == ["x", "y", "-y", "-x"]
    assert world.log == ["a", "b", "-b", "-a"]


async def test_a_rollback_of_ten_thousand_steps() -> None:
    """Unwinding is iterative: a long saga overflows no stack."""
    taken_back: list[int] = []

    async def action(number: int) -> int:
        return number

    async def fail() -> None:
        raise Boom

    step: Any = Step(action, undo=taken_back.append)
    async with open_saga(exceptions=Boom) as scope:
        for number in range(10_000):
            await scope.step(step, number)
        await scope.step(fail)
    assert taken_back == list(range(9_999, -1, -1))
    assert scope.outcome is not None
    assert scope.outcome.state is SagaState.COMPENSATED
    assert {report.state for report in scope.outcome.steps[:-1]} == {StepState.COMPENSATED}


@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
async def test_g10_g11_a_group_for_which_no_task_can_be_started(world: World) -> None:
    """Where a loop starts no tasks any more, what is left is reported, not asked for without end."""
    loop = asyncio.get_running_loop()
    usual = loop.get_task_factory()

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no more tasks")

    with pytest.raises(CompensationFailed) as caught:
        try:
            await Saga(
                [
                    Parallel(world.member("a"), world.member("b")),
                    Step(nothing, lambda: loop.set_task_factory(broken), name="last"),
                    world.step("c", after=Boom()),
                ]
            ).run()
        finally:
            loop.set_task_factory(usual)
    assert "no more tasks" in str(caught.value)
    assert {"a": "COMPLETED", "b": "COMPLETED"}.items() <= states(caught.value.outcome).items()
    assert caught.value.outcome.state is SagaState.FAILED
    world.left = {"a", "b"}


@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
async def test_g9_cancel_all_while_members_wait_to_be_taken_back(world: World) -> None:
    """Members that had not begun when all tasks were cancelled are taken back, and cut no others."""
    known = asyncio.all_tasks()

    async def back() -> None:
        for task in asyncio.all_tasks() - known:
            task.cancel()
        await checkpoint()

    one = Saga([world.member("a"), world.member("b")])
    other = Saga([world.member("d"), world.member("e")])
    task = asyncio.create_task(
        Saga([Parallel(Step(nothing, back, name="first"), one, other), world.step("c", after=Boom())])()
    )
    with suppress(asyncio.CancelledError):
        await asyncio.wait([task])
    error = task.exception() if not task.cancelled() else None
    assert isinstance(error, CompensationFailed)
    reports = [(step.name, step.state.name) for step in error.outcome.steps]
    assert reports == [
        ("first", "COMPENSATION_FAILED"),
        ("a", "COMPENSATED"),
        ("b", "COMPENSATED"),
        ("d", "COMPENSATED"),
        ("e", "COMPENSATED"),
        ("c", "COMPENSATED"),
    ]
    gc.collect()
