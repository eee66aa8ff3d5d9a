"""The one door: effects, middleware around them, and observers that harm nobody."""

from __future__ import annotations

import contextlib
import logging
import threading
import types
from contextvars import ContextVar, copy_context

import pytest
from anyio import CancelScope, Event, create_task_group, to_thread
from anyio.lowlevel import checkpoint

from pysagas import (
    Commit,
    CompensationFailed,
    Effect,
    MiddlewareError,
    Parallel,
    Saga,
    SagaBuilder,
    SagaDefinitionError,
    SagaScope,
    SagaState,
    Step,
    StepState,
    current_effect,
    note_time,
    observer,
    open_saga,
    outcome_of,
    saga,
)
from pysagas._effects import through

pytestmark = pytest.mark.anyio

KINDS = ["saga", "group", "action", "rollback", "compensation", "commit"]


class Boom(Exception):
    """What steps raise."""


class Fault(Exception):
    """What middleware raises."""


class Recorder:
    """A middleware that writes down each effect, and how it ended."""

    def __init__(self, name="", log=None):
        self.name = name
        self.effects = []
        self.ends = {}
        self.log = [] if log is None else log

    async def __call__(self, effect, call_next):
        self.effects.append(effect)
        self.log.append((self.name, effect.kind, effect.path))
        try:
            result = await call_next()
        except BaseException as error:
            self.ends[effect.kind, effect.path] = error
            raise
        self.ends[effect.kind, effect.path] = result
        self.log.append((self.name, f"/{effect.kind}", effect.path))
        return result

    @property
    def seen(self):
        return [(effect.kind, effect.name, effect.path) for effect in self.effects]

    def paths(self, kind):
        return [effect.path for effect in self.effects if effect.kind == kind]


def before(kind, *, error=Fault, name=None):
    """A middleware that raises before the effects of a kind."""

    async def middleware(effect, call_next):
        if effect.kind == kind and name in (None, effect.name):
            raise error(f"before {kind}")
        return await call_next()

    return middleware


def after(kind, *, error=Fault, name=None):
    """A middleware that raises after the effects of a kind."""

    async def middleware(effect, call_next):
        result = await call_next()
        if effect.kind == kind and name in (None, effect.name):
            raise error(f"after {kind}")
        return result

    return middleware


def instead(kind, value=None, *, name=None):
    """A middleware that returns a value instead of running the effects of a kind."""

    async def middleware(effect, call_next):
        if effect.kind == kind and name in (None, effect.name):
            return value
        return await call_next()

    return middleware


def swallowing(kind, value=None):
    """A middleware that returns a value for the effects of a kind that fail."""

    async def middleware(effect, call_next):
        try:
            return await call_next()
        except Exception:
            if effect.kind != kind:
                raise
            return value

    return middleware


class World:
    """Steps that write to a log what they do."""

    def __init__(self):
        self.log = []

    def step(self, name, *, fails=0, back_fails=0, result=None, **options):
        state = {"fails": fails, "back_fails": back_fails}

        async def act(*args):
            self.log.append(name)
            state["fails"] -= 1
            if state["fails"] >= 0:
                raise Boom(name)
            return result or f"{name}'s result"

        async def back(*args):
            self.log.append(f"-{name}")
            state["back_fails"] -= 1
            if state["back_fails"] >= 0:
                raise Boom(f"-{name}")

        options.setdefault("compensation", back)
        return Step(act, name=name, **options)

    def undone(self, name, **options):
        """A step that is taken back by an undo."""

        async def undo(result):
            self.log.append(f"-{name}: {result}")

        return self.step(name, compensation=None, undo=undo, **options)


async def failure_of(failing, *args, error=BaseException):
    with pytest.raises(error) as raised:
        await failing.run(*args)
    outcome = outcome_of(raised.value)
    assert outcome is not None
    return raised.value, outcome


# --- effects ----------------------------------------------------------------------------------------


def test_effect_is_a_frozen_value():
    """An effect is compared by value and cannot be changed."""
    effect = Effect("action", "trip", "order-42", "pay", (1, 2))

    assert Effect("action", "trip", "order-42", "pay", (1, 2)) == effect
    assert 1 == len({effect, Effect("action", "trip", "order-42", "pay", (1, 2))})
    with pytest.raises(AttributeError):
        effect.name = "other"
    assert not hasattr(effect, "__dict__")


def test_keys_tell_effects_apart():
    """A key is made of run id, path and kind: another in any of them has another key."""
    effects = [
        Effect(kind, "trip", run_id, "pay", path)
        for kind in KINDS
        for run_id in ("order-42", "order-4")
        for path in ((), (0,), (1, 2), (12,), (1, 2, 0))
    ]

    assert len(effects) == len({effect.key for effect in effects})
    assert "order-42/1.2/action" == Effect("action", "trip", "order-42", "pay", (1, 2)).key
    # Names do not matter: a step that is renamed is the same step.
    assert (
        Effect("action", "trip", "order-42", "pay", (1,)).key
        == Effect("action", "journey", "order-42", "charge", (1,)).key
    )


def test_action_key_is_for_compensations():
    """A compensation knows the key of its action; nothing else has an action key."""
    action = Effect("action", "trip", "order-42", "pay", (1, 2))
    compensation = Effect("compensation", "trip", "order-42", "pay", (1, 2))

    assert action.key == compensation.action_key
    assert action.key != compensation.key
    for kind in set(KINDS) - {"compensation"}:
        assert Effect(kind, "trip", "order-42", "pay", (1, 2)).action_key is None


async def test_effects_of_a_run_that_completes():
    """Each saga, group, action and commit is an effect with its name and its place."""
    world, recorder = World(), Recorder()
    await Saga(
        [
            world.step("one"),
            Parallel(
                world.step("two"), Saga([world.step("three")], name="member"), name="all", limit=1
            ),
            Saga([Parallel(world.step("four"))], name="inner"),
            Commit(),
            world.step("five"),
        ],
        name="outer",
        middleware=[recorder],
    ).run()

    assert [
        ("saga", "outer", ()),
        ("action", "one", (0,)),
        ("group", "all", (1,)),
        ("action", "two", (1, 0)),
        ("saga", "member", (1, 1)),
        ("action", "three", (1, 1, 0)),
        ("saga", "inner", (2,)),
        ("group", "parallel", (2, 0)),
        ("action", "four", (2, 0, 0)),
        ("commit", "commit", (3,)),
        ("action", "five", (4,)),
    ] == recorder.seen


async def test_effects_of_a_run_that_fails():
    """The rollback and each compensation are effects; what is not taken back has none."""
    world, recorder = World(), Recorder()
    error, _ = await failure_of(
        Saga(
            [
                world.step("one"),
                world.step("not taken back", compensation=None),
                Parallel(world.step("two"), name="all"),
                world.step("three", fails=1),
                world.step("never"),
            ],
            name="outer",
            middleware=[recorder],
        ),
    )

    assert [
        ("saga", "outer", ()),
        ("action", "one", (0,)),
        ("action", "not taken back", (1,)),
        ("group", "all", (2,)),
        ("action", "two", (2, 0)),
        ("action", "three", (3,)),
        ("rollback", "outer", ()),
        ("compensation", "three", (3,)),
        ("compensation", "two", (2, 0)),
        ("compensation", "one", (0,)),
    ] == recorder.seen
    assert error is recorder.ends["action", (3,)]
    assert error is recorder.ends["saga", ()]


async def test_results_go_through_middleware():
    """A middleware gets what an action returned, a group's tuple, and a saga's value."""
    world, recorder = World(), Recorder()

    @saga(middleware=[recorder])
    async def trip(scope: SagaScope):
        await scope.step(world.step("one"))
        await scope.parallel(world.step("two"), world.step("three"))
        return "value"

    assert "value" == await trip()
    assert {
        ("action", (0,)): "one's result",
        ("action", (1, 0)): "two's result",
        ("action", (1, 1)): "three's result",
        ("group", (1,)): ("two's result", "three's result"),
        ("saga", ()): "value",
    } == recorder.ends


async def test_what_a_compensation_returns_goes_through_middleware():
    """A middleware gets what a compensation returned: a journal may keep the receipt of a refund."""
    world, recorder = World(), Recorder()
    refund = world.step("charge", compensation=lambda: "receipt")
    await failure_of(Saga([refund, world.step("two", fails=1)], middleware=[recorder]))

    assert "receipt" == recorder.ends["compensation", (0,)]


async def test_saga_and_run_id_of_effects():
    """An effect names the innermost saga it is part of, and a run has one id of its own."""
    world, recorder = World(), Recorder()

    @saga
    async def inner(scope: SagaScope):
        async with scope.nested() as nested:
            await nested.step(world.step("one"))

    outer = Saga([inner, Parallel(world.step("two"))], name="outer", middleware=[recorder])
    await outer.run()
    await outer.run()

    names = {effect.path: effect.saga for effect in recorder.effects}
    assert {
        (): "outer",
        (0,): "inner",
        (0, 0, 0): "inner",
        (1,): "outer",
        (1, 0): "outer",
    } == names
    ids = [effect.run_id for effect in recorder.effects]
    half = len(ids) // 2
    assert 2 == len(set(ids))
    assert 1 == len(set(ids[:half])) == len(set(ids[half:]))
    assert all(ids)


async def test_paths_of_a_function():
    """Each call takes its scope's next number, whether it fails, is caught, or stands in a loop."""
    world, recorder = World(), Recorder()

    @saga(middleware=[recorder])
    async def trip(scope: SagaScope):
        await scope.step(world.step("one"))  # 0
        with contextlib.suppress(Boom):
            await scope.step(world.step("two", fails=1))  # 1
        for number in range(2):
            await scope.step(world.step(f"three {number}"))  # 2, 3
        with contextlib.suppress(ExceptionGroup):
            await scope.parallel(world.step("four"), world.step("five", fails=1), limit=1)  # 4
        async with scope.nested() as nested:  # 5
            await nested.step(world.step("six"))
            async with nested.nested() as deeper:
                await deeper.step(world.step("seven"))
            await nested.step(world.step("eight"))
        with contextlib.suppress(Boom):
            async with scope.nested() as nested:  # 6
                await nested.step(world.step("nine"))
                raise Boom
        await scope.commit()  # 7
        scope.on_rollback(world.log.append, "-ten")  # 8
        await scope.step(Saga([world.step("eleven")]))  # 9
        await scope.step(world.step("twelve"))  # 10

    await trip.run()

    assert [
        ("one", (0,)),
        ("two", (1,)),
        ("three 0", (2,)),
        ("three 1", (3,)),
        ("four", (4, 0)),
        ("five", (4, 1)),
        ("six", (5, 0)),
        ("seven", (5, 1, 0)),
        ("eight", (5, 2)),
        ("nine", (6, 0)),
        ("eleven", (9, 0)),
        ("twelve", (10,)),
    ] == [(name, path) for kind, name, path in recorder.seen if kind == "action"]
    assert [(4,)] == recorder.paths("group")
    assert [(7,)] == recorder.paths("commit")
    assert [(1,), (4, 1), (4, 0), (6, 0)] == sorted(
        recorder.paths("compensation"), key=[(1,), (4, 1), (4, 0), (6, 0)].index
    )
    assert [("two", (1,)), ("parallel", (4,)), ("nested", (6,))] == [
        (name, path) for kind, name, path in recorder.seen if kind == "rollback"
    ]


async def test_on_rollback_is_a_compensation():
    """What `on_rollback` was given is a compensation at its own place; it has no action effect."""
    recorder = Recorder()
    called = []

    @saga(middleware=[recorder])
    async def trip(scope: SagaScope):
        scope.on_rollback(called.append, 3)
        raise Boom

    await failure_of(trip)

    assert [3] == called
    assert [
        ("saga", "trip", ()),
        ("rollback", "trip", ()),
        ("compensation", "append", (0,)),
    ] == recorder.seen


async def test_retries_share_one_effect():
    """A middleware is called once for a step with a retry, and all attempts have one path."""
    recorder = Recorder()
    paths = []

    async def act():
        paths.append(current_effect())
        if len(paths) < 3:
            raise Boom

    async def thrice(attempt):
        for _ in range(2):
            with contextlib.suppress(Boom):
                await attempt()
        return await attempt()

    await Saga([Step(act, retry=thrice)], middleware=[recorder]).run()

    assert [("saga", "saga", ()), ("action", "act", (0,))] == recorder.seen
    assert 3 * [recorder.effects[1]] == paths


async def test_block_is_no_effect():
    """The block of `open_saga` makes no "saga" effect; everything within it is one."""
    world, recorder = World(), Recorder()
    with pytest.raises(Boom):
        async with open_saga(name="block", middleware=[recorder]) as scope:
            await scope.step(world.step("one"))
            raise Boom

    assert [
        ("action", "one", (0,)),
        ("rollback", "block", ()),
        ("compensation", "one", (0,)),
    ] == recorder.seen


async def test_a_rollback_is_an_effect_where_something_was_begun():
    """A rollback is told to middleware even if no step had a way back; not where no step was begun."""
    world, recorder = World(), Recorder()
    no_way_back = world.step("one", compensation=None, fails=1)
    await failure_of(Saga([no_way_back], middleware=[recorder]))
    assert [()] == recorder.paths("rollback")

    outcome = await Saga([world.step("two", compensation=None)], middleware=[recorder]).run()
    await outcome.rollback()
    assert 2 * [()] == recorder.paths("rollback")

    @saga(middleware=[recorder])
    async def fails_at_once(scope: SagaScope):
        raise Boom

    await failure_of(fails_at_once)
    assert 2 * [()] == recorder.paths("rollback")


async def test_rollback_of_a_completed_run_is_an_effect():
    """`Outcome.rollback` is a rollback effect like another."""
    world, recorder = World(), Recorder()
    outcome = await Saga([world.step("one")], name="trip", middleware=[recorder]).run()
    await outcome.rollback()

    assert [
        ("saga", "trip", ()),
        ("action", "one", (0,)),
        ("rollback", "trip", ()),
        ("compensation", "one", (0,)),
    ] == recorder.seen


# --- the order of middleware ------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["data", "function", "builder", "decorated", "method"])
async def test_middleware_is_called_outermost_first(way):
    """The first middleware of a list is the outermost (section 5's order)."""
    log = []
    world = World()
    middleware = [Recorder("a", log), Recorder("b", log)]
    step = world.step("one")

    async def body(scope: SagaScope):
        await scope.step(step)

    class Agency:
        @saga(middleware=middleware)
        async def trip(self, scope: SagaScope):
            await body(scope)

    whole = {
        "data": lambda: Saga([step], middleware=middleware),
        "builder": lambda: SagaBuilder.create(middleware=middleware).add_step(step).build(),
        "function": lambda: saga(middleware=tuple(middleware))(body),
        "decorated": lambda: saga(middleware=middleware)(body),
        "method": lambda: Agency().trip,
    }[way]()
    await whole.run()

    assert [
        ("a", "saga", ()),
        ("b", "saga", ()),
        ("a", "action", (0,)),
        ("b", "action", (0,)),
        ("b", "/action", (0,)),
        ("a", "/action", (0,)),
        ("b", "/saga", ()),
        ("a", "/saga", ()),
    ] == log


@pytest.mark.parametrize("way", ["data", "function", "block", "group"])
async def test_the_parent_s_middleware_is_around_that_of_an_inner_saga(way):
    """An inner saga's effects go through the parent's middleware, then through its own."""
    log = []
    world = World()
    outer, inner = [Recorder("outer", log)], [Recorder("inner", log)]
    part = Saga([world.step("one")], name="part", middleware=inner)

    @saga(middleware=outer)
    async def function(scope: SagaScope):
        await scope.step(part)

    if way == "block":
        async with open_saga(middleware=outer) as scope:
            await scope.step(part)
    elif way == "group":
        await Saga([Parallel(part)], middleware=outer).run()
    else:
        await (function if way == "function" else Saga([part], middleware=outer)).run()

    path = (0, 0) if way == "group" else (0,)
    inside = [
        ("outer", "saga", path),
        ("inner", "saga", path),
        ("outer", "action", (*path, 0)),
        ("inner", "action", (*path, 0)),
        ("inner", "/action", (*path, 0)),
        ("outer", "/action", (*path, 0)),
        ("inner", "/saga", path),
        ("outer", "/saga", path),
    ]
    assert inside == [entry for entry in log if entry[2][: len(path)] == path]


async def test_compensations_of_an_inner_saga_go_through_its_middleware_too():
    """Going back, an inner saga's compensations go through the same middleware as its actions."""
    log = []
    world = World()
    inner = Recorder("inner", log)
    await failure_of(
        Saga(
            [Saga([world.step("one")], middleware=[inner]), world.step("two", fails=1)],
            middleware=[Recorder("outer", log)],
        )
    )

    assert [("outer", "compensation", (0, 0)), ("inner", "compensation", (0, 0))] == [
        entry for entry in log if entry[1] == "compensation" and entry[2] == (0, 0)
    ]
    assert ["saga", "action", "compensation"] == [effect.kind for effect in inner.effects]


async def test_a_nested_scope_has_the_middleware_of_its_saga():
    """What happens in a nested scope goes through the middleware around it."""
    world, recorder = World(), Recorder()

    @saga(middleware=[recorder])
    async def trip(scope: SagaScope):
        async with scope.nested() as nested:
            await nested.step(world.step("one"))

    await trip.run()

    assert ("action", "one", (0, 0)) in recorder.seen


@pytest.mark.parametrize(
    "options", [{"shield": True}, {"timeout": 60}, {"shield": True, "timeout": 60}], ids=repr
)
async def test_middleware_is_outside_of_shield_retry_and_timeout(options):
    """A middleware is around shield, retry and timeout: it sees a step's last result alone."""
    world, recorder = World(), Recorder()

    async def twice(attempt):
        with contextlib.suppress(Boom):
            return await attempt()
        return await attempt()

    step = world.step("one", fails=1, retry=twice, **options)
    await Saga([step], middleware=[recorder]).run()

    assert ["one", "one"] == world.log
    assert "one's result" == recorder.ends["action", (0,)]


# --- middleware that interferes ---------------------------------------------------------------------


@pytest.mark.parametrize("place", ["data", "group", "scope"])
async def test_raising_before_an_action(place):
    """A middleware that raises before an action leaves its step NOT_STARTED, and fails the saga."""
    world = World()
    middleware = [before("action", name="two")]
    one, two = world.step("one"), world.step("two")

    @saga(middleware=middleware)
    async def function(scope: SagaScope):
        await scope.step(one)
        await scope.step(two)

    whole = {
        "data": Saga([one, two], middleware=middleware),
        "group": Saga([one, Parallel(two)], middleware=middleware),
        "scope": function,
    }[place]
    error, outcome = await failure_of(whole)

    assert ["one", "-one"] == world.log
    assert [StepState.COMPENSATED, StepState.NOT_STARTED] == [step.state for step in outcome.steps]
    assert SagaState.COMPENSATED is outcome.state
    (fault,) = error.exceptions if place == "group" else [error]
    assert isinstance(fault, Fault)
    assert isinstance(fault, Fault)
    assert outcome.steps[1].error is None


@pytest.mark.parametrize("place", ["data", "group", "scope"])
async def test_raising_after_an_action(place):
    """What a middleware raises after an action is the failure of a completed step, which is undone."""
    world = World()
    middleware = [after("action", name="one")]
    one = world.undone("one", not_applied=Fault)

    @saga(middleware=middleware)
    async def function(scope: SagaScope):
        await scope.step(one)

    whole = {
        "data": Saga([one], middleware=middleware),
        "group": Saga([Parallel(one)], middleware=middleware),
        "scope": function,
    }[place]
    error, outcome = await failure_of(whole)

    assert ["one", "-one: one's result"] == world.log
    (step,) = outcome.steps
    assert StepState.COMPENSATED is step.state
    assert "one's result" == step.result
    assert step.error is None


async def test_changing_a_result():
    """A middleware may give another result to the caller; the undo gets the action's own."""
    world = World()

    async def double(effect, call_next):
        result = await call_next()
        return 2 * result if effect.kind == "action" else result

    @saga(middleware=[double])
    async def trip(scope: SagaScope):
        assert 6 == await scope.step(world.undone("one", result=3))
        assert (8,) == await scope.parallel(world.undone("two", result=4))
        raise Boom

    await failure_of(trip, error=Boom)

    assert ["one", "two", "-two: 4", "-one: 3"] == world.log


@pytest.mark.parametrize("place", ["data", "group", "scope"])
async def test_answering_in_an_action_s_place(place):
    """Returning without call_next completes the step with the value: what is undone is that."""
    world = World()
    middleware = [instead("action", "answer", name="one")]
    one, two = world.undone("one"), world.step("two", fails=1)

    @saga(middleware=middleware)
    async def function(scope: SagaScope):
        assert "answer" == await scope.step(one)
        await scope.step(two)

    whole = {
        "data": Saga([one, two], middleware=middleware),
        "group": Saga([Parallel(one), two], middleware=middleware),
        "scope": function,
    }[place]
    _, outcome = await failure_of(whole, error=Boom)

    assert ["two", "-two", "-one: answer"] == world.log
    assert "answer" == outcome.steps[0].result
    assert StepState.COMPENSATED is outcome.steps[0].state


async def test_answering_for_an_action_with_keywords():
    """A step that got keyword arguments is answered for as any other."""
    step = Step(lambda *, key: key).bind(key="value")
    outcome = await Saga([step], middleware=[instead("action", "answer")]).run()

    assert (StepState.COMPLETED, "answer") == (outcome.steps[0].state, outcome.steps[0].result)


async def test_swallowing_an_action_s_failure():
    """A middleware may swallow an action's failure; the step that may have acted stays in doubt (G13)."""
    world = World()
    compensated, in_doubt = world.step("one", fails=1), world.undone("two", fails=1)
    outcome = await Saga([compensated, in_doubt], middleware=[swallowing("action")]).run()

    assert SagaState.COMPLETED is outcome.state
    assert [StepState.UNKNOWN, StepState.UNKNOWN] == [step.state for step in outcome.steps]
    assert 2 == len(outcome.in_doubt)

    later = await outcome.rollback()
    assert ["one", "two", "-one"] == world.log
    assert [StepState.COMPENSATED, StepState.UNKNOWN] == [step.state for step in later.steps]


async def test_raising_around_a_group():
    """A group whose middleware raises before never ran; after, it is taken back."""
    world = World()
    _, outcome = await failure_of(
        Saga([world.step("one"), Parallel(world.step("two"))], middleware=[before("group")]),
        error=Fault,
    )
    assert ["one", "-one"] == world.log
    assert [StepState.COMPENSATED, StepState.NOT_STARTED] == [step.state for step in outcome.steps]

    world = World()
    _, outcome = await failure_of(
        Saga([world.step("one"), Parallel(world.step("two"))], middleware=[after("group")]), error=Fault
    )
    assert ["one", "two", "-two", "-one"] == world.log
    assert SagaState.COMPENSATED is outcome.state


async def test_answering_in_a_group_s_place():
    """A group that a middleware answers for has not run, and its value is the answer."""
    world = World()

    @saga(middleware=[instead("group", ("answer",))])
    async def trip(scope: SagaScope):
        return await scope.parallel(world.step("one"))

    outcome = await trip.run()

    assert ("answer",) == outcome.value
    assert [] == world.log
    assert [StepState.NOT_STARTED] == [step.state for step in outcome.steps]


async def test_raising_before_a_saga():
    """A saga whose middleware raises first has not run; it is COMPENSATED, since nothing happened."""
    world = World()
    _, outcome = await failure_of(Saga([world.step("one")], middleware=[before("saga")]), error=Fault)

    assert [] == world.log
    assert SagaState.COMPENSATED is outcome.state
    assert [StepState.NOT_STARTED] == [step.state for step in outcome.steps]


async def test_raising_after_a_saga():
    """What a middleware raises when a saga has completed takes the saga back."""
    world = World()
    recorder = Recorder()
    error, outcome = await failure_of(
        Saga([world.step("one")], middleware=[after("saga"), recorder]), error=Fault
    )

    assert ["one", "-one"] == world.log
    assert (SagaState.COMPENSATED, error) == (outcome.state, outcome.error)
    assert [()] == recorder.paths("rollback")


async def test_expected_failure_of_a_middleware():
    """What a middleware raises may be an expected failure as any other (G12)."""
    world = World()
    for middleware in (before("saga"), after("saga"), before("action"), after("action")):
        outcome = await Saga([world.step("one")], middleware=[middleware]).run(exceptions=Fault)
        assert SagaState.COMPENSATED is outcome.state
        assert isinstance(outcome.error, Fault)


async def test_answering_in_a_saga_s_place():
    """A saga that a middleware answers for has not run, and its value is the answer."""

    @saga(middleware=[instead("saga", "answer")])
    async def trip(scope: SagaScope): ...

    outcome = await trip.run()
    assert (SagaState.COMPLETED, "answer") == (outcome.state, outcome.value)


async def test_changing_a_saga_s_value():
    """A middleware has the last word on a saga's value; the outcome can still be rolled back."""
    world = World()

    async def change(effect, call_next):
        return f"changed {await call_next()}" if effect.kind == "saga" else await call_next()

    @saga(middleware=[change])
    async def trip(scope: SagaScope):
        await scope.step(world.step("one"))
        return "value"

    outcome = await trip.run()
    assert "changed value" == outcome.value
    await outcome.rollback()
    assert ["one", "-one"] == world.log


@pytest.mark.parametrize("expected", [(), Boom])
async def test_the_saga_effect_sees_the_final_error(expected):
    """The "saga" effect sees what the caller would see, after the rollback, expected or not."""
    world, recorder = World(), Recorder()
    trip = Saga([world.step("one"), world.step("two", fails=1)], middleware=[recorder])
    with contextlib.suppress(Boom):
        await trip.run(exceptions=expected)

    error = recorder.ends["saga", ()]
    assert isinstance(error, Boom)
    assert SagaState.COMPENSATED is outcome_of(error).state
    assert ("compensation", "one", (0,)) == recorder.seen[-1]


async def test_the_saga_effect_sees_a_failed_rollback():
    """Where the rollback failed, the "saga" effect sees CompensationFailed (G8)."""
    world, recorder = World(), Recorder()
    error, _ = await failure_of(
        Saga([world.step("one", fails=1, back_fails=1)], middleware=[recorder]),
        error=CompensationFailed,
    )

    assert error is recorder.ends["saga", ()]


@pytest.mark.parametrize("back_fails", [0, 1])
async def test_swallowing_a_saga_s_error_does_not_change_its_state(back_fails):
    """A middleware that swallows the saga's error does not make it succeed."""
    world = World()
    trip = Saga(
        [world.step("one", fails=1, back_fails=back_fails)], middleware=[swallowing("saga", "value")]
    )
    error, outcome = await failure_of(trip, error=CompensationFailed if back_fails else Boom)

    assert (SagaState.FAILED if back_fails else SagaState.COMPENSATED) is outcome.state
    assert error is outcome.error


async def test_swallowing_an_expected_error():
    """A swallowed failure that the caller expected gives the COMPENSATED outcome (G12)."""
    world = World()
    trip = Saga([world.step("one", fails=1)], middleware=[swallowing("saga")])
    outcome = await trip.run(exceptions=Boom)

    assert SagaState.COMPENSATED is outcome.state
    assert isinstance(outcome.error, Boom)


@pytest.mark.parametrize("way", ["data", "function", "group"])
async def test_swallowing_an_inner_saga_s_error_does_not_change_its_state(way):
    """Half of an inner saga never passes for the whole, though a middleware swallows its error (G2)."""
    world = World()
    middleware = [swallowing("saga")]
    part = Saga([world.step("one"), world.step("two", fails=1)])

    @saga(middleware=middleware)
    async def function(scope: SagaScope):
        await scope.step(part)

    whole = {
        "data": Saga([part], middleware=middleware),
        "function": function,
        "group": Saga([Parallel(part)], middleware=middleware),
    }[way]
    outcome = None
    with contextlib.suppress(Boom, ExceptionGroup):
        outcome = await whole.run()

    # Either the run failed, or the inner saga was taken back: what is left of it is all or nothing.
    assert ["one", "two", "-two", "-one"] == world.log
    assert outcome is None or SagaState.COMPLETED is outcome.state


async def test_replacing_a_saga_s_error():
    """A middleware may raise another error in a saga's place: its state is what it was."""
    world = World()

    async def replace(effect, call_next):
        try:
            return await call_next()
        except Boom as error:
            raise (Fault if effect.kind == "saga" else Boom) from error

    trip = Saga([world.step("one", fails=1)], middleware=[replace])
    error, outcome = await failure_of(trip, error=Fault)

    assert SagaState.COMPENSATED is outcome.state
    assert ["one", "-one"] == world.log
    assert isinstance(error.__cause__, Boom)


async def test_raising_before_a_commit():
    """A commit that a middleware refuses was not passed: everything is taken back."""
    world = World()
    _, outcome = await failure_of(
        Saga([world.step("one"), Commit(), world.step("two")], middleware=[before("commit")]),
        error=Fault,
    )

    assert ["one", "-one"] == world.log
    assert SagaState.COMPENSATED is outcome.state


async def test_raising_after_a_commit():
    """What a middleware raises after the commit fails the saga past it (G14)."""
    world = World()
    _, outcome = await failure_of(
        Saga([world.step("one"), Commit(), world.step("two")], middleware=[after("commit")]),
        error=Fault,
    )

    assert ["one"] == world.log
    assert SagaState.FAILED is outcome.state


async def test_answering_in_a_commit_s_place():
    """A commit cannot be answered for: without call_next it was not passed, and the saga fails (G14)."""
    world = World()
    error, outcome = await failure_of(
        Saga(
            [world.step("one"), Commit(), world.step("two")],
            name="trip",
            middleware=[instead("commit")],
        ),
        error=MiddlewareError,
    )

    assert "the commit of saga 'trip' at (1,) did not happen" in str(error)
    assert ["one", "-one"] == world.log
    assert SagaState.COMPENSATED is outcome.state


@pytest.mark.parametrize("raising", [before, after])
async def test_raising_around_a_rollback(raising):
    """What a middleware raises around a rollback is a failure of it, and every compensation runs (G11)."""
    world = World()
    error, outcome = await failure_of(
        Saga([world.step("one"), world.step("two", fails=1)], middleware=[raising("rollback")]),
        error=CompensationFailed,
    )

    assert SagaState.FAILED is outcome.state
    assert isinstance(error.error, Boom)
    assert [Fault] == [type(failure) for failure in error.failures]
    assert ["one", "two", "-two", "-one"] == world.log


async def test_a_rollback_that_is_not_let_run_runs_all_the_same():
    """A rollback cannot be answered for: it runs without the middleware, which is reported."""
    world = World()
    error, outcome = await failure_of(
        Saga([world.step("one", fails=1)], name="trip", middleware=[instead("rollback")]),
        error=CompensationFailed,
    )

    assert ["one", "-one"] == world.log
    assert SagaState.FAILED is outcome.state
    (failure,) = error.failures
    assert isinstance(failure, MiddlewareError)
    assert "around the rollback of 'trip' at () returned without call_next" in str(failure)
    assert [StepState.COMPENSATED] == [step.state for step in outcome.steps]


@pytest.mark.parametrize("shape", [Saga, Parallel])
async def test_raising_before_a_compensation(shape):
    """A compensation that a middleware kept from running has failed; the others run (G11)."""
    world = World()
    error, outcome = await failure_of(
        Saga(
            [world.step("one"), _of(shape, world.step("two")), world.step("three", fails=1)],
            middleware=[before("compensation", name="two")],
        ),
        error=CompensationFailed,
    )

    assert ["one", "two", "three", "-three", "-one"] == world.log
    assert [Fault] == [type(failure) for failure in error.failures]
    assert [StepState.COMPENSATED, StepState.COMPENSATION_FAILED, StepState.COMPENSATED] == [
        step.state for step in outcome.steps
    ]


def _of(shape, step):
    return Parallel(step) if shape is Parallel else Saga([step])


async def test_raising_after_a_compensation():
    """What a middleware raises after a compensation is reported; the step was taken back (G13)."""
    world = World()
    error, outcome = await failure_of(
        Saga([world.step("one", fails=1)], middleware=[after("compensation")]), error=CompensationFailed
    )

    assert ["one", "-one"] == world.log
    assert [Fault] == [type(failure) for failure in error.failures]
    assert SagaState.FAILED is outcome.state
    assert [StepState.COMPENSATED] == [step.state for step in outcome.steps]
    assert isinstance(outcome.steps[0].compensation_error, Fault)


async def test_answering_in_a_compensation_s_place():
    """A compensation that a middleware answers for is done."""
    world = World()
    _, outcome = await failure_of(
        Saga([world.step("one", fails=1)], middleware=[instead("compensation")]), error=Boom
    )

    assert ["one"] == world.log
    assert SagaState.COMPENSATED is outcome.state
    assert [StepState.COMPENSATED] == [step.state for step in outcome.steps]


async def test_swallowing_a_compensation_s_failure():
    """A compensation's failure is reported though a middleware swallows it (G13)."""
    world = World()
    error, outcome = await failure_of(
        Saga([world.step("one", fails=1, back_fails=1)], middleware=[swallowing("compensation")]),
        error=CompensationFailed,
    )

    assert ["-one"] == [str(failure) for failure in error.failures]
    assert [StepState.COMPENSATION_FAILED] == [step.state for step in outcome.steps]


# --- call_next --------------------------------------------------------------------------------------


def calling_twice(kind, errors):
    """A middleware that calls call_next a second time where the first call failed, or anyway."""

    async def middleware(effect, call_next):
        if effect.kind != kind:
            return await call_next()
        with contextlib.suppress(Boom, ExceptionGroup):
            await call_next()
        try:
            return await call_next()
        except MiddlewareError as error:
            errors.append(str(error))
            raise

    return middleware


async def test_second_call_of_an_action():
    """A second, sequential call runs an action again; its last result counts."""
    world = World()
    results = iter([1, 2])

    async def act():
        return next(results)

    undone = []
    await failure_of(
        Saga(
            [Step(act, undo=undone.append), world.step("two", fails=9)],
            middleware=[calling_twice("action", [])],
        ),
        error=Boom,
    )

    assert [2] == undone
    assert ["two", "two", "-two"] == world.log


async def test_second_call_of_an_action_that_had_failed():
    """A middleware that retries an action makes its step completed."""
    world = World()
    outcome = await Saga([world.step("one", fails=1)], middleware=[calling_twice("action", [])]).run()

    assert ["one", "one"] == world.log
    assert [(StepState.COMPLETED, "one's result", None)] == [
        (step.state, step.result, step.error) for step in outcome.steps
    ]


async def test_second_call_that_fails_after_a_first_that_succeeded():
    """An action that returned once stays completed, and is undone with what it returned (G3)."""
    results = iter([1, Boom()])
    undone = []

    async def act():
        result = next(results)
        if isinstance(result, Exception):
            raise result
        return result

    await failure_of(
        Saga(
            [Step(act, undo=undone.append, not_applied=Boom)], middleware=[calling_twice("action", [])]
        ),
        error=Boom,
    )

    assert [1] == undone


async def test_second_call_of_a_compensation():
    """A second, sequential call runs a compensation again; one that then succeeds has succeeded."""
    world = World()
    _, outcome = await failure_of(
        Saga(
            [world.step("one", fails=1, back_fails=1)], middleware=[calling_twice("compensation", [])]
        ),
        error=Boom,
    )

    assert ["one", "-one", "-one"] == world.log
    assert [StepState.COMPENSATED] == [step.state for step in outcome.steps]


async def test_second_call_of_a_compensation_that_fails_after_one_that_succeeded():
    """A compensation that fails the second time is reported, though the step was taken back (G13)."""
    calls = []

    async def back():
        calls.append(len(calls))
        if len(calls) == 2:
            raise Boom

    async def act():
        raise Fault

    error, outcome = await failure_of(
        Saga([Step(act, back)], middleware=[calling_twice("compensation", [])]),
        error=CompensationFailed,
    )

    assert [0, 1] == calls
    assert [Boom] == [type(failure) for failure in error.failures]
    assert SagaState.FAILED is outcome.state


@pytest.mark.parametrize("kind", ["saga", "group", "rollback", "commit"])
async def test_second_call_of_anything_else_is_refused(kind):
    """A saga, a group, a rollback and a commit cannot run twice: the second call is a MiddlewareError."""
    world = World()
    errors = []
    fails = 1 if kind == "rollback" else 0
    whole = Saga(
        [Parallel(world.step("one")), Commit(), world.step("two", fails=fails)],
        middleware=[calling_twice(kind, errors)],
    )
    with contextlib.suppress(MiddlewareError, CompensationFailed):
        await whole.run()

    (message,) = errors
    assert f"call_next of the effect {kind} " in message
    assert "was called a second time; only actions and compensations can be repeated" in message
    assert 1 == world.log.count("one")
    assert world.log.count("-two") <= 1


async def test_concurrent_call_is_refused():
    """A second call while the first runs is a MiddlewareError, even for an action."""
    begun, go_on = Event(), Event()
    errors = []
    calls = []

    async def act():
        calls.append(1)
        begun.set()
        await go_on.wait()
        return "result"

    async def both(effect, call_next):
        if effect.kind != "action":
            return await call_next()
        results = []

        async def first():
            results.append(await call_next())

        async with create_task_group() as tasks:
            tasks.start_soon(first)
            await begun.wait()
            with pytest.raises(MiddlewareError, match="while an earlier call was running") as raised:
                await call_next()
            errors.append(raised.value)
            go_on.set()
        return results[0]

    outcome = await Saga([Step(act)], middleware=[both]).run()

    assert 1 == len(errors) == len(calls)
    assert ["result"] == [step.result for step in outcome.steps]


async def test_late_call_is_refused():
    """A call when the middleware has ended is a MiddlewareError, and runs nothing."""
    world = World()
    kept = []

    async def keep(effect, call_next):
        kept.append(call_next)
        return None

    await Saga([world.step("one")], middleware=[keep]).run()
    with pytest.raises(
        MiddlewareError,
        match=r"call_next of the effect saga 'saga' at \(\) was called after its middleware had ended",
    ):
        await kept[0]()

    assert [] == world.log


async def test_through_an_empty_chain():
    """Without middleware the innermost is what runs."""

    async def innermost():
        return 3

    assert 3 == await through((), Effect("action", "trip", "", "pay", ()), innermost)


# --- observers --------------------------------------------------------------------------------------


class Raise:
    """Ways for an observer to misbehave, each by its name."""

    @staticmethod
    async def before(call_next):
        raise Fault("before")

    @staticmethod
    async def after(call_next):
        await call_next()
        raise Fault("after")

    @staticmethod
    async def always(call_next):
        try:
            return await call_next()
        finally:
            raise Fault("always")

    @staticmethod
    async def swallow(call_next):
        with contextlib.suppress(BaseException):
            await call_next()
        return "swallowed"

    @staticmethod
    async def replace(call_next):
        try:
            await call_next()
        except BaseException:
            raise Fault("replaced") from None
        return "replaced"

    @staticmethod
    async def ignore(call_next):
        return "ignored"

    @staticmethod
    async def in_a_task(call_next):
        async with create_task_group() as tasks:
            tasks.start_soon(call_next)
        return "from a task"

    @staticmethod
    async def twice(call_next):
        await call_next()
        with contextlib.suppress(MiddlewareError):
            await call_next()
        return "twice"

    @staticmethod
    async def at_once(call_next):
        async def call():
            with contextlib.suppress(MiddlewareError):
                await call_next()

        async with create_task_group() as tasks:
            tasks.start_soon(call)
            tasks.start_soon(call)
        return "at once"


MISBEHAVIOUR = {name: way.__func__ for name, way in vars(Raise).items() if name[0] != "_"}


def scenario(middleware):
    """A saga that meets every kind of effect, and can be made to fail in each way."""
    world = World()

    async def run(*, fails=0, back_fails=0):
        @saga(name="trip", middleware=middleware)
        async def trip(scope: SagaScope):
            first = await scope.step(world.undone("one"))
            await scope.commit()
            second = await scope.parallel(world.step("two"), Saga([world.step("three")]), limit=1)
            third = await scope.step(world.step("four", fails=fails, back_fails=back_fails))
            return first, second, third

        try:
            outcome = await trip.run()
        except Exception as error:
            outcome = outcome_of(error)
            assert outcome.error is error
        return (
            outcome.state,
            outcome.value if outcome.error is None else repr(outcome.error),
            [
                (step.name, step.path, step.state, step.result, repr(step.error))
                for step in outcome.steps
            ],
            world.log,
        )

    return run


@pytest.mark.parametrize(
    "ends", [{}, {"fails": 1}, {"fails": 1, "back_fails": 1}], ids=["ok", "fails", "stuck"]
)
@pytest.mark.parametrize("kind", [*KINDS, "all"])
@pytest.mark.parametrize("how", MISBEHAVIOUR)
async def test_an_observer_harms_nobody(how, kind, ends, caplog):
    """Whatever an observer does at whatever effect, the run is the one that it would be without it."""
    caplog.set_level(logging.CRITICAL, "pysagas")

    async def misbehave(effect, call_next):
        if kind in (effect.kind, "all"):
            return await MISBEHAVIOUR[how](call_next)
        return await call_next()

    expected = await scenario([])(**ends)

    assert expected == await scenario([observer(misbehave)])(**ends)


async def test_an_observer_s_error_is_logged(caplog):
    """An observer's own error is logged, with the effect, and the traceback (logger `pysagas`)."""
    world = World()
    watching = before("action")
    outcome = await Saga([world.step("one")], middleware=[observer(watching)]).run()

    assert SagaState.COMPLETED is outcome.state
    (record,) = caplog.records
    assert ("pysagas", "WARNING") == (record.name, record.levelname)
    assert "failed on effect action 'one' at (0,); the saga is not affected" in record.getMessage()
    assert repr(watching) in record.getMessage()
    assert isinstance(record.exc_info[1], Fault)


async def test_a_log_that_fails_harms_no_saga(caplog):
    """Where even that an observer failed cannot be logged, the saga goes on as without it."""

    def broken(record: object) -> bool:
        raise ZeroDivisionError

    async def watching(effect, call_next):
        raise Boom

    logger = logging.getLogger("pysagas")
    logger.addFilter(broken)
    try:
        outcome = await Saga([World().step("one")], middleware=[observer(watching)]).run()
    finally:
        logger.removeFilter(broken)

    assert SagaState.COMPLETED is outcome.state


async def test_a_failure_that_an_observer_lets_through_is_not_logged(caplog):
    """A step's own failure is none of the observer's: nothing is logged."""
    world, recorder = World(), Recorder()
    await failure_of(Saga([world.step("one", fails=1)], middleware=[observer(recorder)]), error=Boom)

    assert [] == caplog.records
    assert isinstance(recorder.ends["saga", ()], Boom)


async def test_an_observer_sees_what_a_middleware_sees():
    """An observer is called around every effect, in its place in the chain."""
    world, log = World(), []
    await Saga(
        [world.step("one")],
        middleware=[Recorder("a", log), observer(Recorder("b", log)), Recorder("c", log)],
    ).run()

    assert ["a", "b", "c", "c", "b", "a"] == [name for name, _, path in log if path == (0,)]


async def test_an_observer_may_be_any_callable():
    """An observer keeps its function's name, and wraps objects that have none."""

    log = []

    async def watch(effect, call_next):
        log.append("function")
        return await call_next()

    class Watch:
        __slots__ = ()

        async def __call__(self, effect, call_next):
            log.append("object")
            return await call_next()

    assert "watch" == observer(watch).__name__
    await Saga([], middleware=[observer(watch), observer(Watch())]).run()
    assert ["function", "object"] == log


async def test_an_observer_passes_cancellation_on():
    """A cancellation that arrives in an observer goes on as anywhere; the saga is rolled back (G8)."""
    world = World()
    with CancelScope() as scope:

        async def cancelling(effect, call_next):
            if effect.name == "two" and effect.kind == "action":
                scope.cancel()
                await checkpoint()
            return await call_next()

        await Saga([world.step("one"), world.step("two")], middleware=[observer(cancelling)]).run()

    assert scope.cancelled_caught
    assert ["one", "-one"] == world.log


async def test_an_observer_cannot_swallow_a_cancellation():
    """A cancellation of the effect goes on though an observer swallows it (G8)."""
    world = World()
    with CancelScope() as scope:

        async def cancelled():
            scope.cancel()
            await checkpoint()

        async def swallow(effect, call_next):
            with contextlib.suppress(BaseException):
                await call_next()

        await Saga([world.step("one"), Step(cancelled)], middleware=[observer(swallow)]).run()

    assert scope.cancelled_caught
    assert ["one", "-one"] == world.log


async def test_an_observer_calls_once():
    """An observer's second call is refused, to it alone: an action runs once (it only watches)."""
    world, refused = World(), []

    @saga(middleware=[observer(calling_twice("action", refused))])
    async def trip(scope: SagaScope):
        return await scope.step(world.step("one"))

    assert "one's result" == await trip()
    assert ["one"] == world.log
    assert ["an observer awaits call_next once: it only watches"] == refused


def test_an_observer_is_callable():
    """What is not callable is refused as an observer, at once."""
    with pytest.raises(SagaDefinitionError, match=r"observer: it takes an async callable .* not 3"):
        observer(3)


# --- current_effect ---------------------------------------------------------------------------------


def test_no_current_effect_outside():
    """Outside of any saga there is no current effect."""
    assert current_effect() is None


class Witness:
    """Steps that write down the current effect, in their action and on their way back."""

    def __init__(self):
        self.seen = []
        self.threads = set()

    def note(self, name):
        self.threads.add(threading.get_ident())
        effect = current_effect()
        assert effect is not None
        self.seen.append((name, effect.kind, effect.saga, effect.name, effect.path))

    def step(self, name, *, fails=False, sync=False, **options):
        def act(*args):
            self.note(name)
            if fails:
                raise Boom

        def back(*args):
            self.note(f"-{name}")

        async def act_async(*args):
            await checkpoint()
            act()

        async def back_async(*args):
            await checkpoint()
            back()

        sync = sync or "blocking" in options
        return Step(act if sync else act_async, back if sync else back_async, name=name, **options)


@pytest.fixture(params=[True, False], ids=["with middleware", "without"])
def middleware(request):
    async def transparent(effect, call_next):
        return await call_next()

    return [transparent, observer(transparent)] if request.param else []


@pytest.mark.parametrize("sync", [True, False])
async def test_current_effect_of_data(middleware, sync):
    """In actions and compensations of data the effect is the step's, and its key the same twice."""
    witness = Witness()
    inner = Saga([witness.step("two", sync=sync)], name="inner")
    await failure_of(
        Saga(
            [witness.step("one", sync=sync), inner, witness.step("three", sync=sync, fails=True)],
            name="outer",
            middleware=middleware,
        ),
        1,
        error=Boom,
    )

    assert [
        ("one", "action", "outer", "one", (0,)),
        ("two", "action", "inner", "two", (1, 0)),
        ("three", "action", "outer", "three", (2,)),
        ("-three", "compensation", "outer", "three", (2,)),
        ("-two", "compensation", "inner", "two", (1, 0)),
        ("-one", "compensation", "outer", "one", (0,)),
    ] == witness.seen


@pytest.mark.parametrize("limit", [None, 1, 2])
async def test_current_effect_of_groups(middleware, limit):
    """In members of groups, limited or not, each sees its own effect, and so going back."""
    witness = Witness()

    @saga
    async def function(scope: SagaScope):
        await scope.step(witness.step("four"))

    members = Parallel(
        witness.step("one"),
        witness.step("two", sync=True),
        Saga([witness.step("three")], name="data"),
        function,
        Parallel(witness.step("five"), name="group in a group"),
        limit=limit,
    )
    await failure_of(
        Saga([members, witness.step("last", fails=True)], name="outer", middleware=middleware),
        error=Boom,
    )

    actions = [
        ("five", "action", "outer", "five", (0, 4, 0)),
        ("four", "action", "function", "four", (0, 3, 0)),
        ("last", "action", "outer", "last", (1,)),
        ("one", "action", "outer", "one", (0, 0)),
        ("three", "action", "data", "three", (0, 2, 0)),
        ("two", "action", "outer", "two", (0, 1)),
    ]
    compensations = [(f"-{name}", "compensation", *rest) for name, _, *rest in actions]
    assert sorted([*actions, *compensations]) == sorted(witness.seen)


async def test_current_effect_of_a_function(middleware):
    """In the steps of a function, its nested scopes and its inner sagas, each has its own effect."""
    witness = Witness()

    @saga(middleware=middleware)
    async def inner(scope: SagaScope):
        assert current_effect() is None
        await scope.step(witness.step("inner"))
        assert current_effect() is None

    @saga(middleware=middleware)
    async def outer(scope: SagaScope):
        assert current_effect() is None
        await scope.step(lambda: witness.note("one"), compensation=lambda: witness.note("-one"))
        assert current_effect() is None
        await scope.step(witness.step("two"))
        async with scope.nested() as nested:
            assert current_effect() is None
            await nested.step(witness.step("three"))
        await scope.step(inner)
        with contextlib.suppress(Boom):
            await scope.step(witness.step("caught", fails=True))
        assert current_effect() is None
        scope.on_rollback(witness.note, "-called")
        with contextlib.suppress(ExceptionGroup):
            await scope.parallel(witness.step("member", fails=True))
        assert current_effect() is None
        raise Boom

    await failure_of(outer, error=Boom)
    assert current_effect() is None

    assert [
        ("one", "action", "outer", "<lambda>", (0,)),
        ("two", "action", "outer", "two", (1,)),
        ("three", "action", "outer", "three", (2, 0)),
        ("inner", "action", "inner", "inner", (3, 0)),
        ("caught", "action", "outer", "caught", (4,)),
        ("-caught", "compensation", "outer", "caught", (4,)),
        ("member", "action", "outer", "member", (6, 0)),
        ("-member", "compensation", "outer", "member", (6, 0)),
        ("-called", "compensation", "outer", "note", (5,)),
        ("-inner", "compensation", "inner", "inner", (3, 0)),
        ("-three", "compensation", "outer", "three", (2, 0)),
        ("-two", "compensation", "outer", "two", (1,)),
        ("-one", "compensation", "outer", "<lambda>", (0,)),
    ] == witness.seen


async def test_current_effect_in_a_block(middleware):
    """Within `open_saga` the steps have their effects, and the block itself has none."""
    witness = Witness()
    with pytest.raises(Boom):
        async with open_saga(name="block", middleware=middleware) as scope:
            assert current_effect() is None
            await scope.step(witness.step("one"))
            assert current_effect() is None
            await scope.parallel(witness.step("two"))
            assert current_effect() is None
            raise Boom
    assert current_effect() is None

    assert [
        ("one", "action", "block", "one", (0,)),
        ("two", "action", "block", "two", (1, 0)),
        ("-two", "compensation", "block", "two", (1, 0)),
        ("-one", "compensation", "block", "one", (0,)),
    ] == witness.seen


@pytest.mark.parametrize("options", [{"blocking": True}, {"shield": True}, {"timeout": 60}])
@pytest.mark.parametrize("in_group", [False, True])
async def test_current_effect_in_threads_and_children(middleware, options, in_group):
    """In worker threads, and under shield and timeout, the effect is the same as without (G6)."""
    witness = Witness()
    step = witness.step("one", **options)
    await failure_of(
        Saga([Parallel(step) if in_group else step, Step(fail)], name="outer", middleware=middleware),
        error=Boom,
    )

    path = (0, 0) if in_group else (0,)
    assert [
        ("one", "action", "outer", "one", path),
        ("-one", "compensation", "outer", "one", path),
    ] == witness.seen
    assert ("blocking" in options) == (threading.get_ident() not in witness.threads)


def fail():
    raise Boom


async def test_current_effect_in_a_thread_of_the_action_s_own(middleware):
    """A thread that the action starts itself sees the action's effect."""
    witness = Witness()

    async def act():
        await to_thread.run_sync(witness.note, "one")

    await Saga([Step(act)], name="outer", middleware=middleware).run()

    assert [("one", "action", "outer", "act", (0,))] == witness.seen


async def test_current_effect_is_the_one_that_middleware_gets():
    """The effect on request equals the one that the middleware was given: same id, same key."""
    recorder = Recorder()
    seen = []

    async def act():
        seen.append(current_effect())

    async def back():
        seen.append(current_effect())

    await failure_of(
        Saga([Step(act, back), Parallel(Step(act, back)), Step(fail)], middleware=[recorder]),
        error=Boom,
    )

    given = [effect for effect in recorder.effects if effect.kind in ("action", "compensation")]
    assert given[:2] + given[3:] == seen
    assert seen[0].key == seen[3].action_key
    assert 4 == len({effect.key for effect in seen})


async def test_current_effect_has_one_random_run_id():
    """Without a run id, all effects of a run share a random one, and two runs do not."""
    seen = []

    async def act():
        seen.append(current_effect())

    twice = Saga([Step(act), Parallel(Step(act), Saga([Step(act)]))])
    await twice.run()
    await twice.run()

    assert 1 == len({effect.run_id for effect in seen[:3]})
    assert 6 == len({effect.key for effect in seen})


async def test_current_effect_in_middleware():
    """Around a rollback, a group, a commit or a saga no action is under way: there is no effect."""
    seen = {}

    async def look(effect, call_next):
        early = current_effect()
        try:
            return await call_next()
        finally:
            seen.setdefault(effect.kind, []).extend((early, current_effect()))

    async def act(): ...

    await failure_of(
        Saga(
            [Step(act, act), Parallel(Step(act, act)), Commit(), Step(act, act), Step(fail)],
            middleware=[look],
        ),
        error=Boom,
    )
    outcome = await Saga([], middleware=[look]).run()
    await outcome.rollback()
    outcome = await Saga([Step(act)], middleware=[look]).run()
    await outcome.rollback()

    for kind in ("saga", "group", "rollback", "commit"):
        assert {None} == set(seen[kind]), kind


async def test_current_effect_of_an_independent_run():
    """A saga that is called in an action is a run of its own, with its own effects."""
    seen = []

    async def act():
        seen.append(current_effect())

    other = Saga([Step(act)], name="other")

    async def call():
        seen.append(current_effect())
        await other()
        seen.append(current_effect())

    await Saga([Step(call)], name="outer").run()

    assert ["outer", "other", "outer"] == [effect.saga for effect in seen]
    assert seen[0] == seen[2]
    assert seen[0].run_id != seen[1].run_id


def test_a_run_that_is_closed_in_another_context():
    """A run may be closed from another context than it ran in; that leaves no effect behind."""
    seen = []

    @types.coroutine
    def suspend():
        yield

    async def act():
        seen.append(current_effect())
        await suspend()

    async def no_way_back(scope):
        await scope.step(act)

    for trip in (Saga([Step(act)]), Saga([Saga([Step(act)])]), saga(no_way_back)):
        run = trip.run()
        copy_context().run(run.send, None)
        run.close()
        assert current_effect() is None

    assert [(0,), (0, 0), (0,)] == [effect.path for effect in seen]


# --- context variables ------------------------------------------------------------------------------

VARIABLE: ContextVar[str] = ContextVar("VARIABLE", default="none")


def setting(kind, value):
    """A middleware that sets a context variable around the effects of a kind."""

    async def middleware(effect, call_next):
        if effect.kind != kind:
            return await call_next()
        token = VARIABLE.set(value)
        try:
            return await call_next()
        finally:
            VARIABLE.reset(token)

    return middleware


@pytest.mark.parametrize(
    "options",
    [{}, {"shield": True}, {"timeout": 60}, {"blocking": True}, {"in_group": True}, {"limit": 1}],
)
@pytest.mark.parametrize("kind", ["saga", "action", "group"])
async def test_context_variables_of_middleware_reach_the_action(kind, options):
    """What a middleware sets is seen by the actions inside, in groups and in threads too."""
    seen = []

    def look(*args):
        seen.append(VARIABLE.get())

    async def look_async(*args):
        await checkpoint()
        look()

    options = dict(options)
    limit = options.pop("limit", None)
    grouped = options.pop("in_group", False) or limit is not None
    act = look if "blocking" in options else look_async
    steps = [Step(act, **options), Step(act, **options)]
    await Saga(
        [Parallel(*steps, limit=limit)] if grouped or kind == "group" else steps,
        middleware=[setting(kind, "set")],
    ).run()

    assert ["set", "set"] == seen
    assert "none" == VARIABLE.get()


@pytest.mark.parametrize("options", [{}, {"blocking": True}, {"in_group": True}])
@pytest.mark.parametrize("kind", ["saga", "rollback", "compensation"])
async def test_context_variables_of_middleware_reach_the_compensation(kind, options):
    """What a middleware sets around a rollback or a compensation is seen by the compensations."""
    seen = []

    def look(*args):
        seen.append(VARIABLE.get())

    options = dict(options)
    grouped = options.pop("in_group", False)
    step = Step(lambda: None, look, **options)
    await failure_of(
        Saga([Parallel(step) if grouped else step, Step(fail)], middleware=[setting(kind, "set")]),
        error=Boom,
    )

    assert ["set"] == seen


@pytest.mark.parametrize("limit", [None, 1, 2])
async def test_members_have_contexts_of_their_own(limit):
    """What one member sets, no other member and nobody later sees (G1)."""
    seen = []

    async def change(x):
        seen.append(VARIABLE.get())
        VARIABLE.set(str(x))
        await checkpoint()
        seen.append(VARIABLE.get())

    async def back(x):
        seen.append(VARIABLE.get())

    await failure_of(
        Saga([Parallel(*map(Step(change, back).bind, range(3)), limit=limit), Step(fail)]), error=Boom
    )

    assert ["0", "1", "2", *6 * ["none"]] == sorted(seen)
    assert "none" == VARIABLE.get()


# --- times --------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [False, True])
async def test_whoever_has_a_clock_notes_times(grouped):
    """A middleware tells when an effect ran, by whatever clock, and the outcome has it."""
    now = 100.0

    async def watch(effect, call_next):
        nonlocal now
        began = now
        try:
            return await call_next()
        finally:
            now += 10
            note_time(effect, began, now)

    steps = [Step(checkpoint, checkpoint), Step(fail)]
    _, outcome = await failure_of(
        Saga([Parallel(*steps)] if grouped else steps, middleware=[watch]), error=Exception
    )

    first, second = ((0, 0), (0, 1)) if grouped else ((0,), (1,))
    assert {(first, "action"), (second, "action"), (first, "compensation")} == {
        (ran.path, ran.kind) for ran in outcome.times
    }
    assert 0 == outcome.times[0].began
    assert {10.0} <= {ran.ended - ran.began for ran in outcome.times}


async def test_times_that_are_none_of_a_run_are_not_noted():
    """What is noted of another run, of a place that is none, or outside of any run, changes nothing."""
    note_time(Effect("action", "s", "r", "a", (0,)), 1.0, 2.0)
    around = []

    async def watch(effect, call_next):
        if effect.kind == "action":
            note_time(around[0], 1.0, 2.0)
            note_time(effect._replace(path=(7,)), 1.0, 2.0)
            note_time(effect._replace(kind="saga", path=()), 1.0, 2.0)
            note_time(effect._replace(kind="rollback"), 1.0, 2.0)
        return await call_next()

    inner = Saga([Step(checkpoint)], middleware=[watch])
    outcomes = []

    async def act():
        around.append(current_effect())
        outcomes.append(await inner.run())

    outcomes.append(await Saga([Step(act)]).run())

    assert [(), ()] == [outcome.times for outcome in outcomes]
