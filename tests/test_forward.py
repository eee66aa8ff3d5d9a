"""Going forward: sequences and groups, their limits, their failures (G1, G3, G4, G5, G12, G15)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from typing import Any

import pytest
from anyio import Event, create_task_group, move_on_after, sleep, sleep_forever
from anyio.lowlevel import checkpoint
from helpers import (
    GROUPED,
    SEQUENCES,
    Boom,
    Crash,
    World,
    all_blocked,
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
    MiddlewareError,
    Parallel,
    Saga,
    SagaBuilder,
    SagaScope,
    SagaState,
    Step,
    current_effect,
    outcome_of,
    saga,
)

pytestmark = pytest.mark.anyio

world = pytest.fixture(checked_world)


async def watch(effect: Effect, call_next: CallNext) -> object:
    """A middleware that changes nothing: with it, everything goes the long way."""
    return await call_next()


both_ways = pytest.mark.parametrize("middleware", [(), (watch,)], ids=["plain", "middleware"])
any_shape = pytest.mark.parametrize("shape", SEQUENCES, ids=lambda shape: shape.__name__)


# --- sequences ----------------------------------------------------------------------------------


@any_shape
async def test_g1_g15_steps_run_in_order(shape: Any, world: World) -> None:
    """Each step begins when the one before has ended."""
    await shape(*(world.step(name, before=rounds, after=rounds) for name in "abcde"))
    assert world.order == world.log == list("abcde")


async def test_g1_a_saga_without_steps() -> None:
    """It completes, and so does one inside of another."""
    assert (await Saga().run()).state is SagaState.COMPLETED
    assert (await Saga([Saga(), Parallel(Saga())]).run()).steps == ()


async def test_arguments_of_the_run_and_of_bound_parts() -> None:
    """Every action and compensation gets the arguments of the run; a bound part its own."""
    got: list[Any] = []

    def action(*args: Any, **kwargs: Any) -> None:
        got.append((args, kwargs))

    def back(*args: Any, **kwargs: Any) -> None:
        got.append(("back", args, kwargs))

    async def async_action(*args: Any, **kwargs: Any) -> None:
        got.append((args, kwargs))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise Boom

    plain, bound = Step(action, back), Step(action, back).bind("own", key="own")
    simple = Step(async_action, back)
    definition = Saga(
        [
            plain,
            bound,
            simple,
            Parallel(simple, plain, simple.bind("member")),
            Parallel(simple).bind("group"),
            Saga([simple]).bind("saga", key="saga"),
            Step(fail),
        ]
    )
    run, own = (("run",), {"key": 1}), (("own",), {"key": "own"})
    others = [(("member",), {}), (("group",), {}), (("saga",), {"key": "saga"})]
    with pytest.raises(Boom):
        await definition.run("run", key=1)
    assert got[:8] == [run, own, run, run, run, *others]
    expected = [("back", *call) for call in [run, own, run, run, run, *others]]
    assert sorted(map(repr, got[8:])) == sorted(map(repr, expected))


class Callable_:
    """A callable object, sync."""

    def __call__(self) -> str:
        return "called"


class AsyncCallable:
    """A callable object, async."""

    async def __call__(self) -> str:
        await checkpoint()
        return "called"


async def called() -> str:
    await checkpoint()
    return "called"


async def with_argument(argument: str) -> str:
    await checkpoint()
    return argument


class Awaitable_:
    def __await__(self) -> Any:
        return called().__await__()


class Owner:
    async def method(self) -> str:
        return await called()

    def sync_method(self) -> str:
        return "called"


ACTIONS: dict[str, Callable[[], Any]] = {
    "async function": called,
    "sync function": lambda: "called",
    "lambda that returns a coroutine": lambda: called(),
    "function that returns an awaitable": lambda: Awaitable_(),
    "callable object": Callable_(),
    "async callable object": AsyncCallable(),
    "partial of an async function": partial(with_argument, "called"),
    "partial of a sync function": partial(str, "called"),
    "async method": Owner().method,
    "sync method": Owner().sync_method,
    "class": type("made", (str,), {"__new__": lambda cls: "called"}),
}


@both_ways
@pytest.mark.parametrize("kind", ACTIONS)
async def test_actions_of_any_kind(kind: str, middleware: Any) -> None:
    """An action is called as it is, in a sequence, in a group, and on a scope; awaited where it can be."""
    action = ACTIONS[kind]

    @saga(middleware=middleware)
    async def function(scope: SagaScope) -> None:
        assert await scope.step(action) == "called"
        assert await scope.step(action, name="named") == "called"
        assert await scope.parallel(Step(action).bind()) == ("called",)

    await function()
    step: Any = Step(action)
    outcome = await Saga([step, Parallel(step, step)], middleware=middleware).run()
    assert [report.result for report in outcome.steps] == ["called"] * 3


@any_shape
@pytest.mark.parametrize("kind", ["async", "sync", "lambda"])
async def test_g5_a_steps_failure_is_its_own_exception(shape: Any, kind: str, world: World) -> None:
    """The exception comes out untouched: the same object, no cause, no context, with one note."""
    boom = Boom("mine")

    async def fail_async() -> None:
        raise boom

    def fail() -> None:
        raise boom

    action = {"async": fail_async, "sync": fail, "lambda": lambda: fail_async()}[kind]
    with pytest.raises(Boom) as caught:
        await shape(world.step("a"), Step(action, name="b"))
    assert caught.value is boom
    assert (boom.__cause__, boom.__context__, boom.args) == (None, None, ("mine",))
    assert len(boom.__notes__) == 1


async def test_g5_the_note(world: World) -> None:
    """It names the saga and the failed step, what was rolled back, and what is in doubt."""
    boom = Boom()

    async def unknown() -> None:
        raise boom

    with pytest.raises(Boom):
        await Saga(
            [
                world.step("flight"),
                Saga([world.step("hotel")]),
                Step(unknown, undo=print, name="card"),
            ],
            name="trip",
        )()
    assert boom.__notes__ == [
        "saga 'trip' failed in step 'card'; rolled back: 'hotel', 'flight'; in doubt: 'card'"
    ]


@pytest.mark.parametrize(
    ("count", "listed"),
    [
        (10, "'s1', 's0'; in doubt: 'fail'"),
        (11, "'s2', 's1' and 1 more; in doubt: 'fail'"),
        (15, "'s6', 's5' and 5 more; in doubt: 'fail'"),
    ],
)
async def test_g5_the_note_of_a_long_saga_counts(count: int, listed: str) -> None:
    """A note lists ten names, and counts the others."""
    boom = Boom()

    def fail() -> None:
        raise boom

    async def action() -> None:
        pass

    steps = [Step(action, nothing, name=f"s{number}") for number in range(count)]
    with pytest.raises(Boom):
        await Saga([*steps, Step(fail)])()
    assert f"rolled back: 's{count - 1}', 's{count - 2}'" in boom.__notes__[0]
    assert boom.__notes__[0].endswith(listed)


async def test_g5_the_note_where_no_step_failed() -> None:
    """A failure of the function's own names no step."""

    @saga(name="trip")
    async def function(scope: SagaScope) -> None:
        await scope.step(nothing, compensation=nothing)
        raise Boom

    with pytest.raises(Boom) as caught:
        await function()
    assert caught.value.__notes__ == ["saga 'trip' failed; rolled back: 'nothing'; in doubt: nothing"]


async def test_g5_the_note_names_no_step_whose_failure_was_caught(world: World) -> None:
    """Only the step that raised what ended the saga is said to have failed."""

    @saga(name="trip")
    async def function(scope: SagaScope) -> None:
        with suppress(Boom):
            await scope.step(world.step("hotel", after=Boom()))
        await scope.step(world.step("flight", after=Boom()))

    with pytest.raises(Boom) as caught:
        await function()
    assert "failed in step 'flight'; rolled back: 'flight', 'hotel'" in caught.value.__notes__[0]


async def test_g13_the_failure_is_in_the_report(world: World) -> None:
    """A step's report has what its action raised, and no result."""
    boom = Boom()
    with pytest.raises(Boom):
        await Saga([world.step("a"), world.step("b", before=boom)])()
    outcome = outcome_of(boom)
    assert outcome is not None
    assert [(report.result, report.error) for report in outcome.steps] == [
        ("result of a", None),
        (None, boom),
    ]


@pytest.mark.parametrize("in_group", [False, True])
@pytest.mark.parametrize(
    ("error", "state"),
    [
        (Boom(), "NOT_APPLIED"),
        (KeyError(), "NOT_APPLIED"),
        (OSError(), "COMPENSATED"),
        (ExceptionGroup("g", [Boom()]), "COMPENSATED"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"timeout": 100}, {"shield": True}], ids=str)
@both_ways
async def test_g3_not_applied(
    options: dict[str, Any],
    error: Exception,
    state: str,
    in_group: bool,
    middleware: Any,
    world: World,
) -> None:
    """A declared failure did nothing, and is not compensated; any other one is; a group never counts."""
    step: Any = world.member("b", before=error, not_applied=(Boom, LookupError), **options)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        await Saga([world.step("a"), Parallel(step) if in_group else step], middleware=middleware)()
    assert states(outcome_of(caught.value)) == {"a": "COMPENSATED", "b": state}
    assert ("-b" in world.log) is (state == "COMPENSATED")


# --- groups -------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("limit", [None, 1, 2, 3, 7, 100])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
async def test_g1_members_run_at_the_same_time(count: int, limit: int | None, middleware: Any) -> None:
    """A group of none, one, or many: `limit` run at once, entered in order, results in order."""
    running, most, entered = 0, 0, []

    async def member(number: int) -> int:
        nonlocal running, most
        entered.append(number)
        running += 1
        most = max(most, running)
        for _ in range(count - number):
            await checkpoint()
        running -= 1
        return number * 10

    @saga(middleware=middleware)
    async def function(scope: SagaScope) -> tuple[int, ...]:
        return await scope.parallel(*(Step(member).bind(n) for n in range(count)), limit=limit)

    assert await function() == tuple(number * 10 for number in range(count))
    assert entered == list(range(count))
    assert most == min(count, limit or count)


async def test_g1_the_next_member_starts_as_soon_as_one_ends() -> None:
    """With a limit a slow member holds up no more than its own place."""
    slow, log = Event(), []

    async def first() -> None:
        await slow.wait()
        log.append("slow")

    async def quick(number: int) -> None:
        await checkpoint()
        log.append(number)

    async def last() -> None:
        log.append("last")
        slow.set()

    quicks = [Step(quick).bind(number) for number in range(5)]
    await Saga([Parallel(Step(first), *quicks, Step(last), limit=2)])()
    assert log == [0, 1, 2, 3, 4, "last", "slow"]


color: ContextVar[str] = ContextVar("color", default="white")


@both_ways
@pytest.mark.parametrize("limit", [None, 1, 2])
async def test_g1_each_member_has_a_fresh_copy_of_the_context(
    limit: int | None, middleware: Any
) -> None:
    """A member sees the context variables of the task that runs the saga, not what others changed."""
    seen: list[str] = []

    async def member(name: str) -> None:
        seen.append(color.get())
        color.set(name)
        await checkpoint()
        assert color.get() == name

    token = color.set("red")
    try:
        members = (Step(member).bind(name) for name in "abcd")
        await Saga([Parallel(*members, limit=limit)], middleware=middleware)()
        assert color.get() == "red"
    finally:
        color.reset(token)
    assert seen == ["red"] * 4


@pytest.mark.parametrize("limit", [None, 1])
async def test_g1_members_may_use_scopes_and_tasks_of_their_own(limit: int | None) -> None:
    """Time limits and task groups work in members as they do in any task."""

    async def times_out() -> bool:
        with move_on_after(0.001) as scope:
            await sleep_forever()
        return scope.cancelled_caught

    async def starts_tasks() -> int:
        done = []

        async def task() -> None:
            await checkpoint()
            done.append(1)

        async with create_task_group() as tasks:
            tasks.start_soon(task)
            tasks.start_soon(task)
        return len(done)

    outcome = await Saga([Parallel(Step(times_out), Step(starts_tasks), limit=limit)]).run()
    assert [report.result for report in outcome.steps] == [True, 2]


@both_ways
@pytest.mark.parametrize("on_failure", ["cancel", "finish"])
@pytest.mark.parametrize("limit", [1, 2])
async def test_g4_with_a_limit_no_member_starts_after_a_failure(
    on_failure: Any, limit: int, middleware: Any, world: World
) -> None:
    """Members that wait for their turn when another one fails never start, and are not compensated."""
    members = [world.member("b", after=Boom()), *(world.member(name) for name in "cdef")]
    with pytest.raises(ExceptionGroup) as caught:
        await Saga([Parallel(*members, limit=limit, on_failure=on_failure)], middleware=middleware)()
    started = [name for name in world.order if not name.startswith("-")]
    assert started == ["b"]
    assert states(outcome_of(caught.value)) == {
        "b": "COMPENSATED",
        **dict.fromkeys("cdef", "NOT_STARTED"),
    }


@both_ways
@pytest.mark.parametrize("on_failure", ["cancel", "finish"])
async def test_g4_without_a_limit_no_member_starts_after_a_failure(
    on_failure: Any, middleware: Any, world: World
) -> None:
    """Where the first member fails before its first checkpoint, those after it never start."""

    def fail() -> None:
        raise Boom

    members = [Step(fail, name="b"), *(world.member(name) for name in "cd")]
    with pytest.raises(ExceptionGroup) as caught:
        await Saga([Parallel(*members, on_failure=on_failure)], middleware=middleware)()
    assert world.order == []
    assert states(outcome_of(caught.value)) == {
        "b": "UNKNOWN",
        **dict.fromkeys("cd", "NOT_STARTED"),
    }


@pytest.mark.parametrize("limit", [None, 2, 3])
async def test_g4_cancel_stops_the_siblings_at_once(limit: int | None, world: World) -> None:
    """Siblings are cancelled where they wait; they are in doubt, so they are compensated."""

    async def when_both_run() -> None:
        await world.begun("b").wait()

    members = [
        world.member("b", before=sleep_forever),
        world.member("c", before=when_both_run, after=Boom()),
    ]
    with pytest.raises(ExceptionGroup) as caught:
        await Saga([world.step("a"), Parallel(*members, limit=limit)])()
    assert world.order == ["a", "b", "c", "-b", "-c", "-a"]
    assert world.done == []
    reports = {report.name: report for report in outcome_of(caught.value).steps}
    assert reports["b"].result is None


@pytest.mark.parametrize("limit", [None, 2, 3])
async def test_g4_finish_lets_those_in_flight_end(limit: int | None, world: World) -> None:
    """With "finish" the siblings in flight run to their end, and are taken back with the result known."""
    results: list[str] = []
    may_end = Event()

    async def end_late() -> None:
        await may_end.wait()
        await rounds()

    async def when_both_run() -> None:
        await world.begun("b").wait()
        may_end.set()

    action, _ = world.functions("b", before=end_late, lane="group.b")

    async def undo(result: str) -> None:
        results.append(result)
        await world.take_back("b")

    group = Parallel(
        Step(action, undo=undo, name="b"),
        world.member("c", before=when_both_run, after=Boom()),
        limit=limit,
        on_failure="finish",
    )
    with pytest.raises(ExceptionGroup) as caught:
        await Saga([world.step("a"), group])()
    assert [Boom] == [type(error) for error in caught.value.exceptions]
    assert results == ["result of b"]
    assert world.log[:3] == ["a", "c", "b"]
    assert world.done == []


@pytest.mark.parametrize("on_failure", ["cancel", "finish"])
async def test_g4_all_have_stopped_before_the_first_compensation(on_failure: Any, world: World) -> None:
    """No compensation of the group begins while a member still cleans up."""

    async def slow() -> None:
        await world.begun("c").wait()
        try:
            await rounds()
        finally:
            with move_on_after(1, shield=True):
                await rounds()
            world.order.append("b has stopped")

    async def when_b_runs() -> None:
        await world.begun("b").wait()

    group = Parallel(
        world.member("b", before=slow),
        world.member("c", before=when_b_runs, after=Boom()),
        on_failure=on_failure,
    )
    with pytest.raises(ExceptionGroup):
        await Saga([group])()
    assert world.order == ["b", "c", "b has stopped", "-b", "-c"]


async def test_g4_a_function_branch_takes_its_own_failed_call_back_at_once(world: World) -> None:
    """A branch may catch its failure and go another way, while its siblings go on undisturbed."""

    @saga
    async def branch(scope: SagaScope) -> str:
        try:
            await scope.step(world.step("b", lane="g.1", after=Boom()))
        except Boom:
            await scope.step(world.step("c", lane="g.1"))
        return "another way"

    @saga
    async def function(scope: SagaScope) -> tuple[Any, ...]:
        return await scope.parallel(branch.bind(), world.step("d", lane="g.2", before=rounds).bind())

    assert await function() == ("another way", "result of d")
    assert sorted(world.log) == ["-b", "b", "c", "d"]


async def test_g4_members_as_data_leave_all_compensation_to_the_group(world: World) -> None:
    """A saga as data in a group is taken back only when all members have stopped."""

    async def clean_up_late() -> None:
        try:
            await sleep_forever()
        finally:
            with move_on_after(1, shield=True):
                await rounds()
            world.order.append("d has stopped")

    async def when_d_runs() -> None:
        await world.begun("d").wait()

    data = Saga(
        [
            world.step("b", lane="g.1"),
            world.step("c", lane="g.1", before=when_d_runs, after=Boom()),
        ]
    )
    with pytest.raises(ExceptionGroup):
        await Saga([Parallel(data, world.step("d", lane="g.2", before=clean_up_late))])()
    assert world.order[3] == "d has stopped"
    assert set(world.order[:3]) == set("bcd")
    assert world.done == []


@both_ways
@pytest.mark.parametrize("limit", [None, 1, 5])
async def test_g5_the_groups_exception(limit: int | None, middleware: Any, world: World) -> None:
    """One failed member makes an ExceptionGroup too; its message names group, saga, and how many."""
    boom = Boom()
    group = Parallel(world.member("b"), world.member("c", after=boom), name="rooms", limit=limit)
    with pytest.raises(ExceptionGroup) as caught:
        await Saga([group], name="trip", middleware=middleware)()
    assert caught.value.exceptions == (boom,)
    assert caught.value.message == "group 'rooms' of saga 'trip': 1 of 2 members failed"
    assert caught.value.__notes__[0].startswith("saga 'trip' failed in step 'c'; rolled back: ")


@pytest.mark.parametrize("order", [KeyboardInterrupt, SystemExit])
async def test_g8_an_order_to_quit_as_a_groups_only_failure_comes_alone(
    order: type[BaseException], world: World
) -> None:
    """There is no other failure that would be its context."""
    quitting = order()
    with pytest.raises(order) as caught:
        await Saga([Parallel(world.member("a"), world.member("b", after=quitting))])()
    assert caught.value is quitting
    assert (quitting.__cause__, quitting.__context__) == (None, None)


async def test_g5_failures_in_the_order_of_the_members(world: World) -> None:
    """Whatever order they fail in, they are listed as the members are."""
    errors = [Boom("b"), Crash("c"), Boom("d")]
    go_on = [Event(), Event(), Event()]

    def waiting(number: int) -> Callable[[], Awaitable[None]]:
        async def wait() -> None:
            await go_on[number].wait()
            if number:
                go_on[number - 1].set()

        return wait

    members = [
        world.member(name, before=waiting(number), after=errors[number])
        for number, name in enumerate("bcd")
    ]
    go_on[2].set()
    with pytest.raises(ExceptionGroup) as caught:
        await Saga([Parallel(*members, on_failure="finish")])()
    assert caught.value.exceptions == tuple(errors)
    assert "3 of 3 members failed" in caught.value.message


async def test_g5_a_group_in_a_group_fails_as_a_group_in_a_group(world: World) -> None:
    """The tree of exceptions is the tree of groups, with the steps' own exceptions as its leaves."""
    boom = Boom()
    inner = Parallel(world.step("b", lane="out.1/in.b", after=boom), name="inner")
    with pytest.raises(ExceptionGroup) as caught:
        await Saga([Parallel(inner, name="outer")], name="trip")()
    assert caught.value.message == "group 'outer' of saga 'trip': 1 of 1 members failed"
    (below,) = caught.value.exceptions
    assert isinstance(below, ExceptionGroup)
    assert below.message == "group 'inner' of saga 'trip': 1 of 1 members failed"
    assert below.exceptions == (boom,)


async def test_g15_members_are_entered_in_the_order_given(world: World) -> None:
    """On every loop, before any first checkpoint: members of nested groups too."""
    inner = Parallel(*(world.step(name, lane=f"out.1/in.{name}") for name in "bc"))
    members = [world.member(name, "out") for name in "defgh"]
    await Saga([world.step("a"), Parallel(*members), Parallel(inner)])()
    assert world.order == ["a", *"defgh", "b", "c"]


async def test_g15_many_members_are_entered_in_order() -> None:
    """With a limit, many members cost no recursion, and are entered in order."""
    entered: list[int] = []

    async def member(number: int) -> None:
        entered.append(number)
        await checkpoint()

    await Saga([Parallel(*map(Step(member).bind, range(2_000)), limit=50)])()
    assert entered == list(range(2_000))


# --- sagas in groups in sagas -------------------------------------------------------------------


def tree(world: World, fails: str) -> Saga[..., None]:
    """a, then a group of [b, (c ∥ d), e] and f, then g; one of them fails."""

    def step(name: str, lane: str = "", **how: Any) -> Step[..., Any]:
        return world.step(name, lane=lane, after=Boom(name) if name == fails else None, **how)

    innermost = Parallel(step("c", "out.1/in.c"), step("d", "out.1/in.d"), name="inner")
    member = Saga([step("b", "out.1"), innermost, step("e", "out.1")], name="member")
    group = Parallel(member, step("f", "out.2"), name="outer")
    return Saga([step("a"), group, step("g")], name="tree")


@pytest.mark.parametrize(
    ("fails", "depth"),
    [("a", 0), ("b", 1), ("c", 2), ("d", 2), ("e", 1), ("f", 1), ("g", 0)],
)
async def test_a_saga_in_a_group_in_a_saga(fails: str, depth: int, world: World) -> None:
    """Wherever in the tree a step fails: all is taken back, and the leaf comes out in its groups."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        await tree(world, fails)()
    error: BaseException = caught.value
    for _ in range(depth):
        assert isinstance(error, ExceptionGroup)
        (error,) = error.exceptions
    assert isinstance(error, Boom)
    assert str(error) == fails
    assert world.done == []
    found = states(outcome_of(caught.value))
    assert list(found) == list("abcdefg")
    assert set(found.values()) <= {"COMPENSATED", "NOT_STARTED"}
    assert found[fails] == "COMPENSATED"


async def test_a_tree_that_succeeds(world: World) -> None:
    """Without a failure everything is done once."""
    outcome = await tree(world, "nothing").run()
    assert outcome.state is SagaState.COMPLETED
    assert sorted(world.log) == list("abcdefg")
    assert [report.path for report in outcome.steps] == [
        (0,),
        (1, 0, 0),
        (1, 0, 1, 0),
        (1, 0, 1, 1),
        (1, 0, 2),
        (1, 1),
        (2,),
    ]


async def test_a_group_inside_of_a_limited_group(world: World) -> None:
    """A limit counts the direct members: an inner group runs in its place."""
    most, running = 0, 0

    async def count() -> None:
        nonlocal most, running
        running += 1
        most = max(most, running)
        await rounds()
        running -= 1

    def inner(number: int) -> Parallel:
        return Parallel(
            *(world.step(f"{number}{name}", before=count, lane=f"o.{number}/i.{name}") for name in "ab")
        )

    await Saga([Parallel(*map(inner, range(4)), limit=2)])()
    assert most == 4


# --- expected failures --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "expected", "honoured"),
    [
        (Boom(), (Boom,), True),
        (Boom(), Boom, True),
        (Boom(), Exception, True),
        (Boom(), (OSError, Boom), True),
        (Boom(), OSError, False),
        (Boom(), (), False),
        (ExceptionGroup("g", [Boom(), OSError()]), (Boom, OSError), True),
        (ExceptionGroup("g", [Boom(), ExceptionGroup("h", [Boom()])]), Boom, True),
        (ExceptionGroup("g", [Boom(), OSError()]), Boom, False),
        (ExceptionGroup("g", [Boom()]), OSError, False),
    ],
)
@pytest.mark.parametrize("where", ["definition", "run"])
@both_ways
async def test_g12_expected_failures(
    where: str,
    raised: Exception,
    expected: Any,
    honoured: bool,
    middleware: Any,
    world: World,
) -> None:
    """An expected failure gives a COMPENSATED outcome; of a group every leaf must be expected."""
    own, at_run = (expected, ()) if where == "definition" else ((), expected)
    definition = Saga(
        [world.step("a"), world.step("b", after=raised)], exceptions=own, middleware=middleware
    )
    if honoured:
        outcome = await definition.run(exceptions=at_run)
        assert outcome.state is SagaState.COMPENSATED
        assert outcome.error is raised
        with pytest.raises(type(raised)):
            _ = outcome.value
    else:
        with pytest.raises(type(raised)) as caught:
            await definition.run(exceptions=at_run)
        assert caught.value is raised
    assert world.done == []


async def test_g12_calling_a_saga_raises_what_is_expected_too(world: World) -> None:
    """`await saga()` has no outcome to give, so it raises."""
    with pytest.raises(Boom):
        await Saga([world.step("a", after=Boom())], exceptions=Boom)()


async def test_g12_a_groups_failure(world: World) -> None:
    """The ExceptionGroup of a parallel group is expected if all its leaves are."""
    group = Parallel(world.member("a", after=Boom()), world.member("b"))
    outcome = await Saga([group]).run(exceptions=Boom)
    assert outcome.state is SagaState.COMPENSATED
    assert [Boom] == [type(leaf) for leaf in leaf_errors(outcome.error)]


async def test_g12_not_honoured_where_a_compensation_failed(world: World) -> None:
    """What could not be taken back is raised, whatever the caller expects, CompensationFailed included."""
    steps = [world.step("a", back=Crash()), world.step("b", after=Boom())]
    with pytest.raises(CompensationFailed):
        await Saga(steps, exceptions=(Exception, CompensationFailed)).run(exceptions=Exception)


async def test_g12_not_honoured_past_a_commit(world: World) -> None:
    """A failure after the commit is raised, whatever the caller expects."""
    definition = (
        SagaBuilder.create(exceptions=Boom).add_commit().add_step(world.step("a", after=Boom())).build()
    )
    with pytest.raises(Boom) as caught:
        await definition.run()
    outcome = outcome_of(caught.value)
    assert outcome is not None
    assert outcome.state is SagaState.FAILED


async def test_g12_the_exceptions_of_an_inner_saga_do_not_count(world: World) -> None:
    """An inner saga is a part of the outer one, which decides."""
    inner = Saga([world.step("a", after=Boom())], exceptions=Boom)
    with pytest.raises(Boom):
        await Saga([inner]).run()


# --- middleware ---------------------------------------------------------------------------------


async def test_effects_of_a_run(world: World) -> None:
    """With middleware, each effect goes through it: with its kind, its name, and its path."""
    seen: list[tuple[str, str, tuple[int, ...]]] = []

    async def note(effect: Effect, call_next: CallNext) -> object:
        seen.append((effect.kind, effect.name, effect.path))
        return await call_next()

    definition = (
        SagaBuilder.create("outer", middleware=[note])
        .add_step(world.step("a"))
        .add_commit()
        .add_parallel(world.member("b"), name="group")
        .add_saga(Saga([world.step("c")], name="inner"))
        .add_step(world.step("d", after=Boom()))
        .build()
    )
    with pytest.raises(Boom):
        await definition()
    assert seen == [
        ("saga", "outer", ()),
        ("action", "a", (0,)),
        ("commit", "commit", (1,)),
        ("group", "group", (2,)),
        ("action", "b", (2, 0)),
        ("saga", "inner", (3,)),
        ("action", "c", (3, 0)),
        ("action", "d", (4,)),
        ("rollback", "outer", ()),
        ("compensation", "d", (4,)),
        ("compensation", "c", (3, 0)),
        ("compensation", "b", (2, 0)),
    ]


def on_effect(kind: str, name: str, does: Callable[..., Awaitable[object]]) -> Any:
    async def middleware(effect: Effect, call_next: CallNext) -> object:
        if (effect.kind, effect.name) == (kind, name):
            return await does(call_next)
        return await call_next()

    return middleware


async def raises_before(call_next: CallNext) -> object:
    raise Crash("before")


async def raises_after(call_next: CallNext) -> object:
    await call_next()
    raise Crash("after")


async def answers(call_next: CallNext) -> object:
    return "answer"


@pytest.mark.parametrize("in_group", [False, True])
@pytest.mark.parametrize(
    ("does", "state", "began"),
    [(raises_before, "NOT_STARTED", False), (raises_after, "COMPENSATED", True)],
)
async def test_a_middleware_that_fails_at_an_action(
    does: Any, state: str, began: bool, in_group: bool, world: World
) -> None:
    """Before the action it leaves the step NOT_STARTED; after it, it is the failure of a completed step."""
    step: Any = world.member("b")
    with pytest.raises((Crash, ExceptionGroup)) as caught:
        await Saga(
            [world.step("a"), Parallel(step) if in_group else step],
            middleware=[on_effect("action", "b", does)],
        )()
    outcome = outcome_of(caught.value)
    assert states(outcome) == {"a": "COMPENSATED", "b": state}
    assert ("b" in world.order) is began
    assert world.done == []


@pytest.mark.parametrize("in_group", [False, True])
async def test_a_middleware_that_answers_in_the_actions_place(in_group: bool, world: World) -> None:
    """The step is completed with that value, and is taken back with it."""
    results: list[str] = []
    action, _ = world.functions("a")
    step: Any = Step(action, undo=results.append, name="a")

    def fail() -> None:
        raise Boom

    with pytest.raises(Boom):
        await Saga(
            [Parallel(step) if in_group else step, Step(fail)],
            middleware=[on_effect("action", "a", answers)],
        )()
    assert results == ["answer"]
    assert world.log == []


async def test_a_middleware_that_fails_at_a_commit(world: World) -> None:
    """A commit that did not go through commits nothing: all is taken back."""
    definition = (
        SagaBuilder.create(middleware=[on_effect("commit", "commit", raises_before)])
        .add_step(world.step("a"))
        .add_commit()
        .build()
    )
    with pytest.raises(Crash) as caught:
        await definition()
    assert world.done == []
    assert outcome_of(caught.value).state is SagaState.COMPENSATED


async def test_g14_a_middleware_that_forgets_a_commit(world: World) -> None:
    """A commit that did not happen is an error: nothing may go on as if it had."""
    definition = (
        SagaBuilder.create(middleware=[on_effect("commit", "commit", answers)])
        .add_step(world.step("a"))
        .add_commit()
        .add_step(world.step("never"))
        .build()
    )
    with pytest.raises(MiddlewareError, match="commit"):
        await definition()
    assert world.log == ["a", "-a"]


async def test_g14_a_middleware_that_forgets_a_commit_before_anything_else(world: World) -> None:
    """Also where there was nothing before it that could be committed."""
    parts = [Commit(), world.step("never")]
    with pytest.raises(MiddlewareError, match="commit"):
        await Saga(parts, middleware=[on_effect("commit", "commit", answers)])()
    assert world.log == []


@pytest.mark.parametrize("kind", ["group", "saga"])
async def test_a_middleware_that_swallows_the_failure_of_a_part(kind: str, world: World) -> None:
    """What is half done must go back: the failure goes on."""

    async def swallows(call_next: CallNext) -> object:
        with suppress(Boom, ExceptionGroup):
            await call_next()
        return "fine"

    step = world.step("b", after=Boom())
    part: Any = Parallel(step, name="part") if kind == "group" else Saga([step], name="part")
    with pytest.raises((Boom, ExceptionGroup)):
        await Saga([world.step("a"), part], middleware=[on_effect(kind, "part", swallows)])()
    assert world.done == []


@pytest.mark.parametrize("kind", ["group", "saga"])
@pytest.mark.parametrize("does", [raises_before, raises_after])
async def test_a_middleware_that_fails_at_a_group_or_a_saga(kind: str, does: Any, world: World) -> None:
    """The part is taken back, as far as it was done."""
    part: Any = (
        Parallel(world.step("b"), name="part")
        if kind == "group"
        else Saga([world.step("b")], name="part")
    )
    with pytest.raises(Crash):
        await Saga([world.step("a"), part], middleware=[on_effect(kind, "part", does)])()
    assert world.done == []


@pytest.mark.parametrize("expected", [(), Crash])
async def test_a_middleware_that_fails_after_the_whole_saga(expected: Any, world: World) -> None:
    """What it raises after a completed saga is a failure like any other: all is taken back."""
    definition = Saga(
        [world.step("a")], name="trip", middleware=[on_effect("saga", "trip", raises_after)]
    )
    if expected:
        outcome = await definition.run(exceptions=expected)
        assert outcome.state is SagaState.COMPENSATED
    else:
        with pytest.raises(Crash):
            await definition.run()
    assert world.log == ["a", "-a"]


async def test_a_middleware_that_replaces_the_error_of_a_saga(world: World) -> None:
    """The saga has been taken back by then, once; the other error carries the outcome."""

    async def replaces(call_next: CallNext) -> object:
        try:
            return await call_next()
        except Boom as error:
            raise Crash from error

    with pytest.raises(Crash) as caught:
        await Saga(
            [world.step("a"), world.step("b", after=Boom())],
            name="trip",
            middleware=[on_effect("saga", "trip", replaces)],
        )()
    assert world.log == ["a", "b", "-b", "-a"]
    assert outcome_of(caught.value).state is SagaState.COMPENSATED


@pytest.mark.parametrize("expected", [(), Boom])
async def test_a_middleware_that_swallows_the_error_of_a_saga(expected: Any, world: World) -> None:
    """Swallowing it does not change what happened: it is raised, or expected, all the same."""

    async def swallows(call_next: CallNext) -> object:
        try:
            return await call_next()
        except Boom:
            return "fine"

    definition = Saga(
        [world.step("a", after=Boom())], name="trip", middleware=[on_effect("saga", "trip", swallows)]
    )
    if expected:
        assert (await definition.run(exceptions=expected)).state is SagaState.COMPENSATED
    else:
        with pytest.raises(Boom):
            await definition.run()
    assert world.done == []


async def test_a_middleware_that_does_not_run_the_saga(world: World) -> None:
    """It answers in the saga's place: a completed run in which nothing was done."""
    outcome = await Saga(
        [world.step("a")], name="trip", middleware=[on_effect("saga", "trip", answers)]
    ).run()
    assert (outcome.state, outcome.value) == (SagaState.COMPLETED, "answer")
    assert world.log == []


async def test_the_middleware_of_the_outer_saga_is_outside_of_the_inner_ones(world: World) -> None:
    """Middleware is inherited: the parent's around the saga's own."""
    seen: list[str] = []

    def note(who: str) -> Any:
        async def middleware(effect: Effect, call_next: CallNext) -> object:
            if effect.kind == "action":
                seen.append(f"{who}:{effect.name}")
            return await call_next()

        return middleware

    inner = Saga([world.step("b")], middleware=[note("inner")])
    await Saga([world.step("a"), inner], middleware=[note("1"), note("2")])()
    assert seen == ["1:a", "2:a", "1:b", "2:b", "inner:b"]


# --- where the code stands ----------------------------------------------------------------------


@both_ways
async def test_current_effect_in_every_place(middleware: Any) -> None:
    """Actions and compensations can ask for their effect: its kind, name, and path."""
    seen: list[tuple[str, str, tuple[int, ...]]] = []

    async def look() -> None:
        effect = current_effect()
        assert effect is not None
        seen.append((effect.kind, effect.name, effect.path))

    def step(name: str) -> Step[[], None]:
        return Step(look, look, name=name)

    async def fail() -> None:
        raise Boom

    definition = Saga(
        [
            step("a"),
            Parallel(step("b"), Saga([step("c")])),
            Saga([step("d"), Parallel(step("e"), limit=1)]),
            Step(fail),
        ],
        middleware=middleware,
    )
    assert current_effect() is None
    with pytest.raises(Boom):
        await definition()
    assert current_effect() is None
    places = {"a": (0,), "b": (1, 0), "c": (1, 1, 0), "d": (2, 0), "e": (2, 1, 0)}
    forward = [(name, path) for kind, name, path in seen if kind == "action"]
    assert forward == list(places.items())
    back = {name: path for kind, name, path in seen if kind == "compensation"}
    assert back == places


@pytest.mark.parametrize("shape", [*SEQUENCES, *GROUPED], ids=lambda shape: shape.__name__)
async def test_timeouts_and_retries(shape: Any, world: World) -> None:
    """A step's timeout ends each attempt, its retry begins another; then it is in doubt."""
    tries: list[int] = []

    async def slow() -> None:
        tries.append(1)
        await sleep(10)

    async def retry(attempt: Callable[[], Awaitable[Any]]) -> Any:
        try:
            return await attempt()
        except TimeoutError:
            return await attempt()

    with pytest.raises((TimeoutError, ExceptionGroup)) as caught:
        await shape(
            world.step("a", lane="out.1"),
            world.step("b", lane="out.1", before=slow, after=all_blocked, timeout=0.01),
        )
    assert [TimeoutError] == [type(error) for error in leaf_errors(caught.value)]
    assert world.log == ["a", "-b", "-a"]
    tries.clear()
    retried: Any = Step(slow, timeout=0.01, retry=retry)
    with pytest.raises((TimeoutError, ExceptionGroup)):
        await as_data(retried)
    assert len(tries) == 2
