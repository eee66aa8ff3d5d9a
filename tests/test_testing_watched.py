"""Each fault happens where the user's own function is called, however the step is written."""

from __future__ import annotations

import re
from functools import partial

import pytest
from anyio import create_task_group
from anyio.lowlevel import checkpoint
from worlds import Lab, World, found, logs, native, three_times, without_native

from pysagas import (
    Commit,
    Parallel,
    Saga,
    SagaBuilder,
    SagaDefinitionError,
    SagaScope,
    Step,
    StepState,
    current_effect,
    saga,
)
from pysagas.testing import CannotExplore, FaultKind, InjectedFailure, explore
from pysagas.testing._watched import watched

pytestmark = pytest.mark.anyio

MADE = "a> a a<"
TAKEN_BACK = "-a> -a -a<"
WHOLE = f"{MADE} {TAKEN_BACK}"

# What every fault does to one step, with a checkpoint before its effect and one after it, and one
# on the way back.
FORWARD = {
    "a: fails before its effect": TAKEN_BACK,
    "a: fails after its effect": WHOLE,
    "a: runs twice": f"{MADE} {WHOLE}",
    "a: cancelled at checkpoint 1": f"a> {TAKEN_BACK}",
    "a: cancelled at checkpoint 2": f"a> a {TAKEN_BACK}",
}
BACK = {
    "no fault, taken back at its end": WHOLE,
    "taking back a: fails": MADE,
    "taking back a: runs twice": f"{WHOLE} {TAKEN_BACK}",
    "taking back a: cancelled at checkpoint 1": WHOLE,
}
EXPECTED = {**FORWARD, **BACK}

# Of a sync function, which cannot wait.
SYNC = {plan: log for plan, log in EXPECTED.items() if "checkpoint" not in plan}


def function_of(body, **options):
    """A saga as a function with this body."""

    @saga(**options)
    async def function(scope: SagaScope) -> None:
        await body(scope)

    return function


class Service:
    """A callable object, with methods."""

    def __init__(self, world: World) -> None:
        self.action, self.back = world.action("a"), world.back("a")

    async def __call__(self, *args: object) -> object:
        return await self.action()

    async def take_back(self, *args: object) -> None:
        await self.back()

    @saga
    async def order(self, scope: SagaScope) -> None:
        await scope.step(self.action, compensation=self.back)


class Proxy(Service):
    """A callable object whose call is not async, and gives an awaitable."""

    def __call__(self, *args: object) -> object:
        return self.action()


# --- async actions -----------------------------------------------------------------------------


def as_data(world):
    return Saga([world.step("a")])


def by_the_builder(world):
    return SagaBuilder.create("built").add_step(world.action("a"), world.back("a")).build()


def bound(world):
    return Saga([world.step("a").bind(1, two=2)])


def in_inner_sagas(world):
    return Saga([Saga([Saga([world.step("a")])])])


def in_a_group(world):
    return Saga([Parallel(world.step("a"))])


def in_a_limited_group(world):
    # With limit < members the engine takes the way by which many members share a task.
    return Saga([Parallel(Step(len, name="quick").bind(""), world.step("a"), limit=1)])


def in_a_saga_in_a_group(world):
    return Saga([Parallel(Saga([world.step("a")]))])


def with_a_name_of_its_own(world):
    return Saga([Step(world.action("other"), world.back("other"), name="a")])


def of_a_callable_object(world):
    service = Service(world)
    return Saga([Step(service, service.take_back, name="a")])


def of_a_proxy(world):
    return Saga([Step(Proxy(world), world.back("a"), name="a")])


def of_a_bound_method(world):
    return Saga([Step(Service(world).__call__, Service(world).take_back, name="a")])


def of_a_partial(world):
    return Saga([Step(partial(world.action("a"), 1), partial(world.back("a"), 2))])


def of_lambdas_that_give_coroutines(world):
    return Saga([Step(lambda: world.action("a")(), lambda: world.back("a")(), name="a")])


def taken_back_by_an_undo_too(world):
    # Of what is completed the undo is called, of what is in doubt the compensation.
    return Saga([Step(world.action("a"), world.back("a"), undo=world.back("a"))])


def with_a_timeout(world):
    return Saga([world.step("a", timeout=60, compensation_timeout=60)])


def with_middleware_of_its_own(world):
    async def middleware(effect, call_next):
        return await call_next()

    return Saga([world.step("a")], middleware=[middleware], exceptions=Exception)


def on_a_scope(world):
    step = world.step("a")
    return function_of(lambda scope: scope.step(step))


def on_a_scope_with_arguments(world):
    step = world.step("a")
    return function_of(lambda scope: scope.step(step, 1, two=2))


def on_a_scope_bound(world):
    step = world.step("a")
    return function_of(lambda scope: scope.step(step.bind(1)))


def inline(world):
    action, back = world.action("a"), world.back("a")
    return function_of(lambda scope: scope.step(action, 1, compensation=back))


def inline_of_an_object(world):
    service = Service(world)
    return function_of(lambda scope: scope.step(service, compensation=service.take_back, name="a"))


def inline_of_a_partial(world):
    action = partial(partial(world.action("a"), 1), 2)
    return function_of(lambda scope: scope.step(action, compensation=world.back("a")))


def inline_of_a_lambda(world):
    action, back = world.action("a"), world.back("a")
    return function_of(
        lambda scope: scope.step(lambda: action(), compensation=lambda: back(), name="a")
    )


def in_an_inner_function(world):
    return function_of(lambda scope: scope.step(inline(world)))


def in_an_inner_saga_on_a_scope(world):
    return function_of(lambda scope: scope.step(as_data(world)))


def in_a_function_in_data(world):
    return Saga([inline(world)])


def of_a_saga_method(world):
    return Service(world).order


def in_a_saga_method(world):
    return Saga([Service(world).order])


def in_a_nested_scope(world):
    async def body(scope):
        async with scope.nested() as nested, nested.nested() as inner:
            await inner.step(world.step("a"))

    return function_of(body)


def in_a_group_on_a_scope(world):
    return function_of(lambda scope: scope.parallel(world.step("a"), limit=3))


def in_a_group_as_a_step(world):
    return function_of(lambda scope: scope.step(Parallel(world.step("a").bind(1))))


@pytest.mark.parametrize(
    "build",
    [
        as_data,
        by_the_builder,
        bound,
        in_inner_sagas,
        in_a_group,
        in_a_saga_in_a_group,
        of_a_callable_object,
        of_a_proxy,
        of_a_bound_method,
        of_a_partial,
        of_lambdas_that_give_coroutines,
        taken_back_by_an_undo_too,
        with_a_timeout,
        with_middleware_of_its_own,
        on_a_scope,
        on_a_scope_with_arguments,
        on_a_scope_bound,
        inline,
        inline_of_an_object,
        inline_of_a_partial,
        inline_of_a_lambda,
        in_an_inner_function,
        in_an_inner_saga_on_a_scope,
        in_a_function_in_data,
        of_a_saga_method,
        in_a_saga_method,
        in_a_nested_scope,
        in_a_group_on_a_scope,
        in_a_group_as_a_step,
    ],
    ids=lambda build: build.__name__,
)
async def test_an_async_step_however_it_is_written(build):
    """Each fault comes at the same line of the user's functions, whatever stands around them."""
    seen = await logs(build)

    assert without_native(seen) == EXPECTED
    if native(seen):
        assert native(seen) == {plan: log for plan, log in EXPECTED.items() if "checkpoint" in plan}


async def test_the_name_is_that_of_the_step():
    """A place has the step's name, not the function's."""
    seen = await logs(with_a_name_of_its_own)

    assert set(without_native(seen)) == set(EXPECTED)
    assert seen["a: cancelled at checkpoint 1"] == "other> -other> -other -other<"


async def test_a_member_of_a_limited_group():
    """Where members share a task, each fault comes at the same line, too."""
    seen = without_native(await logs(in_a_limited_group))

    assert {plan: log for plan, log in seen.items() if "quick" not in plan} == EXPECTED
    assert seen["quick: fails before its effect"] == ""
    assert seen["quick: runs twice"] == WHOLE


async def test_a_shielded_action_runs_to_its_end():
    """It is cancelled where the others are, and ends all the same, as ``shield=True`` says."""
    seen = await logs(lambda world: Saga([world.step("a", shield=True)]))

    shielded = {plan: WHOLE if "cancelled" in plan else log for plan, log in EXPECTED.items()}
    assert without_native(seen) == shielded
    assert set(native(seen).values()) <= {WHOLE}


async def test_a_callable_whose_name_is_no_text():
    """What a callable object calls its name may be anything."""

    def build(world):
        service = Service(world)
        service.__name__ = 7
        service.__doc__ = service.__module__ = service.__qualname__ = 8
        return function_of(lambda scope: scope.step(service, compensation=service.take_back, name="a"))

    assert without_native(await logs(build)) == EXPECTED


def generator():
    yield  # pragma: no cover - it is refused


def three_arguments(a, b, c):
    raise AssertionError  # pragma: no cover - it is given two


async def noted(scope, function, *args):
    scope.on_rollback(function, *args)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda scope, world: scope.step(generator), "generator"),
        (lambda scope, world: scope.step(as_data(world).run), "independent run"),
        (lambda scope, world: scope.step(world.action, 1, 2), "cannot take these arguments"),
        (
            lambda scope, world: scope.step(len, "", compensation=world.state),
            "the compensation gets the action's arguments",
        ),
        (lambda scope, world: scope.step(world.action("a"), compensation=generator), "generator"),
        (lambda scope, world: scope.step(world.action("a"), blocking=True), "blocking"),
        (lambda scope, world: scope.step(len, "", not_applied=3), "not_applied"),
        (lambda scope, world: scope.step("a"), "'a'"),
        (
            lambda scope, world: scope.step(world.action("a"), compensate=len),
            "there is no option 'compensate'",
        ),
        (lambda scope, world: noted(scope, None), "on_rollback: None cannot be called with 0"),
        (lambda scope, world: noted(scope, world.step("a")), "on_rollback: .* cannot be called"),
        (lambda scope, world: noted(scope, three_arguments, 1, 2), "cannot be called with 2 arguments"),
    ],
)
async def test_what_the_engine_refuses_is_refused(call, words):
    """An inline step that cannot run is no more right because it is watched: it fails by the same words."""

    def build(world):
        return function_of(lambda scope: call(scope, world))

    with pytest.raises((SagaDefinitionError, TypeError), match=words) as refused:
        await build(World())()
    with pytest.raises(CannotExplore, match="fails without any fault") as info:
        await explore(Lab(build))

    cause = info.value.__cause__
    assert type(cause) is type(refused.value)
    assert re.sub("0x[0-9a-f]+", "0x", str(cause)) == re.sub("0x[0-9a-f]+", "0x", str(refused.value))


# --- sync actions ------------------------------------------------------------------------------


def sync(world):
    return Saga([Step(world.sync_action("a"), world.sync_back("a"))])


def in_a_thread(world):
    return Saga([Step(world.sync_action("a"), world.sync_back("a"), blocking=True)])


def sync_in_a_group(world):
    return Saga([Parallel(Step(world.sync_action("a"), world.sync_back("a")))])


def sync_inline(world):
    action, back = world.sync_action("a"), world.sync_back("a")
    return function_of(lambda scope: scope.step(action, compensation=back))


def in_a_thread_inline(world):
    action, back = world.sync_action("a"), world.sync_back("a")
    return function_of(lambda scope: scope.step(action, compensation=back, blocking=True))


@pytest.mark.parametrize(
    "build",
    [sync, in_a_thread, sync_in_a_group, sync_inline, in_a_thread_inline],
    ids=lambda build: build.__name__,
)
async def test_a_sync_step_however_it_is_written(build):
    """A sync function is the same, but for checkpoints, which it has none of; in a thread, too."""
    assert await logs(build) == SYNC


# --- undo, on_rollback, and no way back --------------------------------------------------------


def undone(world):
    return Saga([Step(world.action("a"), undo=world.back("a"))])


def undone_inline(world):
    action, back = world.action("a"), world.back("a")
    return function_of(lambda scope: scope.step(action, undo=back))


@pytest.mark.parametrize("build", [undone, undone_inline], ids=lambda build: build.__name__)
async def test_a_step_with_an_undo_alone_is_found(build):
    """An action in doubt cannot be undone: where it had its effect by then, that is left, and found."""
    lab = Lab(build)
    report = await explore(lab)

    expected = {
        plan: log.replace(TAKEN_BACK, "").strip() if plan in FORWARD and "twice" not in plan else log
        for plan, log in EXPECTED.items()
    }
    assert without_native(lab.logs(report)) == expected
    assert without_native(found(report)) == {
        "a: fails after its effect",
        "a: cancelled at checkpoint 2",
    }
    assert all(
        result.problem == "not taken back; in doubt, and not compensated: a"
        and result.left == ("'a' is left",)
        for result in report.failures
    )


@pytest.mark.parametrize("build", [undone, undone_inline], ids=lambda build: build.__name__)
async def test_an_undo_gets_what_the_action_returned(build):
    """What goes through the wrapped functions comes out as it was."""
    lab = Lab(build)
    await explore(lab, only=lambda fault: fault.kind is FaultKind.RUNS_TWICE)

    assert {given for world in lab.worlds for given in world.given} == {"result of a"}


async def test_arguments_are_handed_on():
    """Actions and compensations get what the saga was called with."""
    given = []

    def build(world):
        async def action(*args, **kwargs):
            world.make("a")
            given.append((args, kwargs))

        async def back(*args, **kwargs):
            world.remove("a")
            given.append((args, kwargs))

        return Saga([Step(action, back)])

    report = await explore(Lab(build, args=(1, 2), kwargs={"three": 3}))

    assert report.ok, report
    assert all(call == ((1, 2), {"three": 3}) for call in given)


async def test_what_is_called_on_rollback():
    """A function that was given to ``on_rollback`` is a place like another, with the same faults."""

    def build(world):
        async def body(scope):
            world.make("a")
            scope.on_rollback(partial(world.back("a"), 1), 2)
            await scope.step(len, "")

        return function_of(body)

    seen = await logs(build)

    assert {plan: log for plan, log in without_native(seen).items() if "len" not in plan} == {
        "no fault, taken back at its end": f"a {TAKEN_BACK}",
        "taking back back: fails": "a",
        "taking back back: runs twice": f"a {TAKEN_BACK} {TAKEN_BACK}",
        "taking back back: cancelled at checkpoint 1": f"a {TAKEN_BACK}",
    }


async def test_a_sync_method_is_called_on_rollback():
    """So is a method of a built-in, which is not async and takes no attributes."""

    def build(world):
        async def body(scope):
            world.make("a")
            scope.on_rollback(world.standing.discard, "a")
            await scope.step(len, "")

        return function_of(body)

    seen = await logs(build)

    assert {"taking back discard: fails", "taking back discard: runs twice"} <= set(seen)


async def test_a_step_that_cannot_be_taken_back():
    """What has no way back has no faults there; and with an effect, it is found."""
    lab = Lab(lambda world: Saga([Step(world.action("a"))]))
    report = await explore(lab)

    assert set(without_native(lab.logs(report))) == {*FORWARD, "no fault, taken back at its end"}
    assert "no fault, taken back at its end" in found(report)
    assert "a: fails before its effect" not in found(report)


# --- retries -----------------------------------------------------------------------------------


def retried(world):
    return Saga([world.step("a", retry=three_times, compensation_retry=three_times)])


def retried_inline(world):
    action, back = world.action("a"), world.back("a")
    options = {"retry": three_times, "compensation_retry": three_times}
    return function_of(lambda scope: scope.step(action, compensation=back, **options))


@pytest.mark.parametrize("build", [retried, retried_inline], ids=lambda build: build.__name__)
async def test_a_step_that_is_tried_again(build):
    """It fails at its first attempt, or at each of them."""
    seen = without_native(await logs(build))

    assert seen == {
        **EXPECTED,
        "a: fails once, before its effect": WHOLE,
        "a: fails before its effect": TAKEN_BACK,
        "a: fails once, after its effect": f"{MADE} {WHOLE}",
        "a: fails after its effect": f"{MADE} {MADE} {WHOLE}",
        "taking back a: fails once": WHOLE,
    }


async def test_what_a_retry_does_not_wait_for_is_not_tried_again():
    """The retry is the step's own: one that waits for something else lets a failure through."""

    async def patient(attempt):
        try:
            return await attempt()
        except KeyError:
            return await attempt()

    def build(world):
        return Saga([world.step("a", retry=patient)])

    injected, own = await logs(build), await logs(build, failure=KeyError)

    assert injected["a: fails once, before its effect"] == TAKEN_BACK
    assert own["a: fails once, before its effect"] == WHOLE
    assert own["a: fails after its effect"] == f"{MADE} {WHOLE}"


# --- steps that decline ------------------------------------------------------------------------


class SoldOut(Exception):
    """Says that nothing was done."""


class NoRoom(Exception):
    """Says the same, and wants arguments of its own."""

    def __init__(self, *, hotel, nights): ...


def declining(world):
    return Saga([world.step("a", not_applied=(SoldOut, NoRoom))])


def declining_inline(world):
    action, back = world.action("a"), world.back("a")
    return function_of(
        lambda scope: scope.step(action, compensation=back, not_applied=(SoldOut, NoRoom))
    )


@pytest.mark.parametrize("build", [declining, declining_inline], ids=lambda build: build.__name__)
async def test_a_step_that_declines(build):
    """It raises each of its ``not_applied`` types before its first line, and is not compensated."""
    seen = without_native(await logs(build))

    assert seen == {
        **EXPECTED,
        "a: declines with SoldOut": "",
        "a: declines with NoRoom": "",
    }


class OutOf(Exception):
    """Says the same, and takes its text from what it is given."""

    def __init__(self, item):
        super().__init__(item.name)


async def test_a_step_that_declines_with_what_cannot_be_made_of_a_message():
    """It is raised all the same, however its ``__init__`` fails."""
    seen = await logs(lambda world: Saga([world.step("a", not_applied=OutOf)]))

    assert seen["a: declines with OutOf"] == ""


async def test_a_step_whose_every_failure_declines():
    """A failure after its effect is declared to be impossible, and is not tried; all the rest is."""

    def build(world):
        return Saga([world.step("a", not_applied=Exception, retry=three_times)])

    seen = await logs(build)

    assert seen["a: fails before its effect"] == seen["a: declines with Exception"] == ""
    assert seen["a: runs twice"] == f"{MADE} {WHOLE}"
    assert not [plan for plan in seen if "after its effect" in plan]


async def test_a_step_that_is_told_in_words_that_it_never_declines():
    """``not_applied=None`` is the same as none at all, inline too."""

    def build(world):
        action, back = world.action("a"), world.back("a")
        return function_of(lambda scope: scope.step(action, compensation=back, not_applied=None))

    assert without_native(await logs(build)) == EXPECTED


async def test_one_type_by_which_a_step_declines():
    """``not_applied`` may be a single type, inline too."""

    def build(world):
        action, back = world.action("a"), world.back("a")
        return function_of(lambda scope: scope.step(action, compensation=back, not_applied=SoldOut))

    assert "a: declines with SoldOut" in await logs(build)


async def test_a_step_that_declines_once_and_is_tried_again():
    """With a retry, it declines at its first attempt, or at each."""
    seen = await logs(lambda world: Saga([world.step("a", not_applied=SoldOut, retry=three_times)]))

    assert seen["a: declines with once, SoldOut"] == WHOLE
    assert seen["a: declines with SoldOut"] == ""


async def test_a_lost_answer_is_no_way_of_declining():
    """After its effect a step does not fail with what says that it did nothing."""
    seen = await logs(lambda world: Saga([world.step("a", not_applied=SoldOut)]), failure=SoldOut)

    assert seen["a: fails before its effect"] == ""
    assert seen["a: fails after its effect"] == WHOLE


# --- commits -----------------------------------------------------------------------------------


def committing(world):
    return Saga([world.step("a"), Commit(), world.step("b"), Commit(), world.step("c")])


def committing_function(world):
    async def body(scope):
        await scope.step(world.step("a"))
        await scope.commit()
        await scope.step(world.step("b"))
        await scope.commit()
        await scope.step(world.step("c"))

    return function_of(body)


@pytest.mark.parametrize("build", [committing, committing_function], ids=lambda build: build.__name__)
async def test_a_saga_is_made_to_fail_before_each_commit_and_after_the_last(build):
    """What is taken back are the steps since the last commit; faults come with the commits before them."""
    lab = Lab(build)
    report = await explore(lab)
    assert report.ok, report
    seen = lab.logs(report)
    commits = {str(result.plan): result.plan.commits for result in report.results}

    up_to = "a> a a<"
    assert seen["no fault, taken back at its end"] == f"{up_to} -a> -a -a<"
    up_to += " b> b b<"
    assert seen["no fault, taken back at its end (past commit 1)"] == f"{up_to} -b> -b -b<"
    up_to += " c> c c<"
    assert seen["no fault, taken back at its end (past commit 2)"] == f"{up_to} -c> -c -c<"
    assert commits["a: runs twice"] == commits["taking back a: fails"] == 0
    assert commits["b: runs twice"] == commits["taking back b: fails"] == 1
    assert commits["c: runs twice"] == commits["taking back c: fails"] == 2
    assert seen["b: fails before its effect"] == "a> a a< -b> -b -b<"


# --- sagas that go on --------------------------------------------------------------------------


def going_another_way(world):
    async def body(scope):
        try:
            async with scope.nested() as nested:
                await nested.step(world.step("a"))
        except Exception:
            await scope.step(world.step("b"))
        await scope.step(world.step("c"))

    return function_of(body)


async def test_a_saga_that_catches_a_failure_and_goes_on():
    """What failed is taken back at once; and the run is made to fail at its end all the same."""
    seen = await logs(going_another_way)

    rest = "b> b b< c> c c< -c> -c -c< -b> -b -b<"
    assert seen["a: fails before its effect"] == f"{TAKEN_BACK} {rest}"
    assert seen["a: fails after its effect"] == f"{WHOLE} {rest}"
    # A cancellation is not caught: the saga ends.
    assert seen["a: cancelled at checkpoint 2"] == f"a> a {TAKEN_BACK}"
    assert "b: runs twice" not in seen


async def test_the_other_way_is_tried_in_pairs():
    """The steps that only a fault leads to have their faults as the second of a pair."""
    lab = Lab(going_another_way)
    report = await explore(lab, pairs=True)
    assert report.ok, report
    seen = lab.logs(report)

    plan = "a: fails before its effect, then b: fails after its effect"
    assert seen[plan] == f"{TAKEN_BACK} b> b b< -b> -b -b<"


async def test_steps_of_a_loop():
    """Steps that a loop calls with one name have places of their own."""

    def build(world):
        async def body(scope):
            for room in "xy":
                await scope.step(world.action(room), compensation=world.back(room), name="room")

        return function_of(body)

    seen = await logs(build)

    assert seen["room at 0: fails after its effect"] == "x> x x< -x> -x -x<"
    assert seen["room at 1: fails before its effect"] == "x> x x< -y> -y -y< -x> -x -x<"


# --- what stays as it was ----------------------------------------------------------------------


async def test_definitions_stay_what_they_were():
    """The watched saga has the names and options of the original."""

    async def middleware(effect, call_next): ...

    def build(world):
        inner = Saga([world.step("c")], name="inner", rollback_timeout=3)
        group = Parallel(world.step("b"), inner, name="both", limit=2, on_failure="finish")
        return Saga(
            [world.step("a", shield=True), group],
            name="whole",
            exceptions=(KeyError, OSError),
            rollback_timeout=60,
            on_compensation_failure="stop",
            middleware=[middleware],
            version="7",
        )

    original = build(World())
    rebuilt = watched(original)

    for option in (
        "name",
        "exceptions",
        "rollback_timeout",
        "on_compensation_failure",
        "version",
    ):
        assert getattr(rebuilt, option) == getattr(original, option)
    # The library's own stands innermost.
    assert rebuilt.middleware[:-1] == original.middleware == (middleware,)
    step, group = rebuilt.parts
    assert (step.name, step.shield, step.blocking) == ("a", True, False)
    assert (group.name, group.limit, group.on_failure) == ("both", 2, "finish")
    assert [part.name for part in group.parts] == ["b", "inner"]
    assert group.parts[1].rollback_timeout == 3


async def test_a_definition_used_twice_is_rebuilt_once():
    """So that two parts of one name are still known to be the same step."""
    step = World().step("a")
    rebuilt = watched(Saga([step, step.bind(1), step]))

    first, second, third = rebuilt.parts
    assert first is third is second.definition
    assert second.args == (1,)


async def test_the_value_of_a_saga_is_kept():
    """What steps, groups and inner sagas give is what a function gets."""
    values = []

    def build(world):
        @saga
        async def inner(scope):
            return await scope.step(world.step("a"))

        async def body(scope):
            assert repr(scope).startswith("<SagaScope of saga 'function'")
            assert isinstance(scope, SagaScope)
            assert scope.outcome is None
            one = await scope.step(inner)
            two = await scope.parallel(world.step("b").bind(), world.step("c").bind())
            values.append((one, *two))

        return function_of(body)

    await logs(build)

    assert set(values) == {("result of a", "result of b", "result of c")}


async def test_an_action_sees_the_effect_that_it_is():
    """``current_effect`` says in a watched function what it says in any."""
    seen = set()

    def build(world):
        async def action():
            effect = current_effect()
            seen.add((effect.kind, effect.name, effect.path))
            world.make("a")

        async def back():
            effect = current_effect()
            seen.add((effect.kind, effect.name, effect.path))
            world.remove("a")

        return Saga([Saga([Step(action, back)])])

    await logs(build)

    assert seen == {("action", "action", (0, 0)), ("compensation", "action", (0, 0))}


async def test_what_a_compensation_raises_of_its_own_is_found():
    """A way back that fails by itself is a problem, though no fault was made there."""

    def build(world):
        def back():
            raise LookupError("no such booking")

        return Saga([Step(world.action("a"), back)])

    report = await explore(Lab(build))

    assert "no fault, taken back at its end" in found(report)
    assert "taking back a failed: LookupError('no such booking')" in report
    assert "taking back a: fails" not in found(report)


async def test_an_awaitable_that_is_no_coroutine():
    """What an action gives is awaited whatever it is, and each time that it waits is a checkpoint."""

    class Booking:
        def __init__(self, world):
            self.world = world

        def __await__(self):
            yield from checkpoint().__await__()
            self.world.make("a")
            return "booked"

    results = []

    def build(world):
        async def body(scope):
            results.append(
                await scope.step(partial(Booking, world), compensation=world.back("a"), name="a")
            )

        return function_of(body)

    seen = await logs(build)

    assert seen["a: cancelled at checkpoint 1"] == TAKEN_BACK
    assert seen["a: runs twice"] == f"a a {TAKEN_BACK}"
    assert set(results) == {"booked"}


async def test_an_independent_run_within_an_action_is_not_looked_into():
    """Another saga that an action runs is that action's business: its waits are the action's."""

    def build(world):
        other = Saga([world.step("x")])

        async def act():
            await other()

        async def back():
            world.remove("x")

        return Saga([Step(act, back)])

    seen = without_native(await logs(build))

    assert {plan for plan in seen if "x" in plan.split(":")[0].split()} == set()
    assert seen["act: cancelled at checkpoint 1"] == "x> -x> -x -x< -x"
    assert seen["act: fails after its effect"] == "x> x x< -x"


async def test_steps_report_as_they_do_outside_of_an_exploration():
    """The outcome of a watched run says of each step what that of the original says."""

    def build(world):
        return Saga([world.step("a"), Step(world.action("b"))])

    report = await explore(Lab(build), only=lambda fault: fault.kind is FaultKind.FAILS_AFTER)

    result = next(one for one in report.failures if "b: fails after" in str(one.plan))
    assert [(step.name, step.path, step.state) for step in result.outcome.steps] == [
        ("a", (0,), StepState.COMPENSATED),
        ("b", (1,), StepState.UNKNOWN),
    ]
    assert result.outcome.steps[1].error is result.error


async def test_the_middleware_of_a_saga_runs_in_each_trial():
    """The saga's own middleware stays around its effects, as often as it is run."""
    kinds = []

    def build(world):
        async def middleware(effect, call_next):
            kinds.append(effect.kind)
            return await call_next()

        return Saga([world.step("a")], middleware=[middleware])

    lab = Lab(build)
    report = await explore(lab, only=lambda fault: fault.kind is FaultKind.FAILS_BEFORE)

    assert report.ok, report
    # Two to learn, one without a fault, and one for each of the two faults.
    assert kinds == ["saga", "action", "rollback", "compensation"] * 5


async def test_a_middleware_that_takes_back_its_own_work_is_right():
    """A run that is made to fail at its end fails for the saga's own middleware, too."""

    def build(world):
        async def locking(effect, call_next):
            if effect.kind != "saga":
                return await call_next()
            world.make("lock")
            try:
                return await call_next()
            except BaseException:
                world.remove("lock")
                raise

        return Saga([world.step("a")], middleware=[locking])

    seen = await logs(build)

    assert seen["no fault, taken back at its end"] == f"lock {MADE} -lock {TAKEN_BACK}"
    assert seen["a: runs twice"] == f"lock {MADE} {MADE} -lock {TAKEN_BACK}"
    # A step that fails by itself is taken back before anything around it hears of that.
    assert seen["a: fails after its effect"] == f"lock {WHOLE} -lock"


# --- calls that are not awaited ----------------------------------------------------------------


def a_step(world, scope):
    scope.step(world.action("forgotten"), compensation=world.back("forgotten"), name="forgotten")


def a_definition(world, scope):
    scope.step(world.step("forgotten").bind())


def a_function(world, scope):
    scope.step(world.action("forgotten"))


def a_group(world, scope):
    scope.parallel(world.step("b").bind())


def a_commit(world, scope):
    scope.commit()


@pytest.mark.parametrize(
    ("forget", "shown"),
    [
        (a_step, "scope.step of 'forgotten'"),
        (a_definition, "scope.step of 'forgotten'"),
        (a_function, "scope.step of 'forgotten'"),
        (a_group, "scope.parallel"),
        (a_commit, "scope.commit"),
    ],
)
@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
async def test_a_call_that_is_never_awaited_is_found(forget, shown, nested):
    """Nothing of it is done, and nothing else would tell."""

    def build(world):
        @saga(name="tested")
        async def tested(scope):
            await scope.step(world.step("a"))
            if nested:
                async with scope.nested() as inner:
                    forget(world, inner)
            else:
                forget(world, scope)

        return tested

    with pytest.raises(CannotExplore) as info:
        await explore(Lab(build))
    assert str(info.value) == (
        f"saga 'tested' calls {shown}, and never awaits it, so nothing of it is done; write `await` "
        "before it"
    )


async def test_a_call_that_is_never_awaited_where_a_fault_leads_is_found():
    """It is the problem of the plan that came there."""

    def build(world):
        @saga(name="tested")
        async def tested(scope):
            try:
                await scope.step(world.step("a"))
            except InjectedFailure:
                scope.step(world.step("b"))

        return tested

    report = await explore(Lab(build))

    assert found(report) == {"a: fails before its effect", "a: fails after its effect"}
    assert "saga 'tested' calls scope.step of 'b', and never awaits it" in report


async def test_a_call_may_be_awaited_later():
    """In a task, or from a variable."""

    def build(world):
        @saga
        async def tested(scope):
            call = scope.step(world.step("a"))
            await call
            async with create_task_group() as tasks:
                tasks.start_soon(lambda: scope.step(world.step("b")))

        return tested

    report = await explore(Lab(build))

    assert report.ok, report
