"""Sagas, and the three ways to write one: as data, with the builder, as a function."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import subprocess
import sys
from pathlib import Path

import anyio
import pytest
import trio
from anyio import CancelScope, Event, create_task_group, sleep_forever

import pysagas
import sagas
from pysagas import (
    Commit,
    CompensationFailed,
    Parallel,
    Saga,
    SagaBuilder,
    SagaDefinitionError,
    SagaError,
    SagaMethod,
    SagaScope,
    SagaState,
    ScopeBusy,
    Step,
    StepState,
    outcome_of,
    saga,
)

pytestmark = pytest.mark.anyio

SEED = Path(__file__).parent / "seed"
SEED_OUTPUT = {"simple_example": "[40, 50]\n", "failure_example": "[10, 20]\n"}


class Boom(Exception):
    """What steps raise."""


class World:
    """Steps that write to a log what they do, with what arguments."""

    def __init__(self):
        self.log = []

    def act(self, name, *, fails=None):
        async def act(*args, **kwargs):
            self.log.append((name, *args, *kwargs.items()))
            if fails is not None:
                raise fails
            return name

        return act

    def step(self, name, *, fails=None, **options):
        return Step(self.act(name, fails=fails), self.act(f"-{name}"), name=name, **options)

    @property
    def names(self):
        return [name for name, *_ in self.log]


@pytest.fixture
def world():
    return World()


# --- the seed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", SEED_OUTPUT)
def test_the_seed_s_examples_run_as_they_stand(example):
    """Both examples of the seed print what it says they do, under the import name `sagas`."""
    ran = subprocess.run(
        [sys.executable, "-W", "error", SEED / f"{example}.py"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (SEED_OUTPUT[example], "", 0) == (ran.stdout, ran.stderr, ran.returncode)


@pytest.mark.parametrize("example", SEED_OUTPUT)
def test_the_seed_s_examples_run_with_pysagas(example):
    """Both examples of the seed do the same under the import name `pysagas`."""
    source = (SEED / f"{example}.py").read_text()
    changed = source.replace("from sagas import", "from pysagas import")
    assert source != changed

    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(changed, "<seed>", "exec"), {"__name__": "__main__"})

    assert SEED_OUTPUT[example] == output.getvalue()


def test_the_seed_s_names_are_ours():
    """The import name `sagas` hands on four names of this library, and no more."""
    assert ["Saga", "SagaBuilder", "SagaException", "Step"] == sagas.__all__
    assert pysagas.Saga is sagas.Saga
    assert pysagas.SagaBuilder is sagas.SagaBuilder
    assert pysagas.Step is sagas.Step
    assert SagaError is sagas.SagaException


async def test_the_seed_s_steps_that_started_are_compensated(world):
    """Each step that started is compensated, the one that raised included, and no other (seed)."""
    trip = (
        SagaBuilder.create()
        .add_step(world.act("one"), world.act("-one"))
        .add_step(world.act("two", fails=Boom()), world.act("-two"))
        .add_step(world.act("three"), world.act("-three"))
        .build()
    )
    outcome = await trip.run(exceptions=(OSError, Boom))

    assert ["one", "two", "-two", "-one"] == world.names
    assert SagaState.COMPENSATED is outcome.state


async def test_release_0_0_3_s_parameters(world):
    """`run` takes the seed's `executor` and `exceptions`, None included; `Saga` takes no steps too."""
    outcome = await Saga().run(executor=None, exceptions=None)
    assert (SagaState.COMPLETED, None, ()) == (outcome.state, outcome.value, outcome.steps)

    outcome = await Saga([Step(world.act("one"))]).run(executor=object(), exceptions=())
    assert SagaState.COMPLETED is outcome.state
    assert [("one",)] == world.log

    assert SagaState.COMPLETED is (await SagaBuilder.create().build().run()).state


async def test_seed_s_exceptions_in_parentheses(world):
    """`exceptions=(OSError)`, which is no tuple, is one exception type (seed)."""
    failing = Saga([world.step("one", fails=OSError())])

    outcome = await failing.run(exceptions=(OSError))  # noqa: UP034

    assert SagaState.COMPENSATED is outcome.state


@pytest.mark.parametrize("run", [asyncio.run, anyio.run, trio.run], ids=["asyncio", "anyio", "trio"])
def test_run_by_every_loop(run, world):
    """A saga's run can be given to asyncio.run, anyio.run or trio.run."""
    trip = Saga([world.step("one").bind(1), Parallel(world.step("two").bind(2))])
    outcome = run(trip.run()) if run is asyncio.run else run(trip.run)

    assert SagaState.COMPLETED is outcome.state
    assert [("one", 1), ("two", 2)] == world.log


def test_run_by_trio_with_arguments(world):
    """trio.run hands arguments on; options go by functools.partial."""
    failing = Saga([world.step("one"), world.step("two", fails=Boom())])
    outcome = trio.run(functools.partial(failing.run, exceptions=Boom), 1, 2)

    assert [("one", 1, 2), ("two", 1, 2), ("-two", 1, 2), ("-one", 1, 2)] == world.log
    assert SagaState.COMPENSATED is outcome.state


# --- as data ----------------------------------------------------------------------------------------


async def test_arguments_of_the_run_go_everywhere(world):
    """Each action and compensation gets the run's arguments, at any depth; a bound one its own (G3)."""
    trip = Saga(
        [
            world.step("one"),
            world.step("two").bind("own", key="own"),
            Parallel(world.step("three"), Parallel(world.step("four")).bind("group's")),
            Saga([world.step("five")]),
            Saga([world.step("six"), world.step("seven").bind()]).bind("saga's"),
            world.step("last", fails=Boom()),
        ]
    )
    with pytest.raises(Boom):
        await trip.run(1, key=2)

    run = (1, ("key", 2))
    forward = [
        ("one", *run),
        ("two", "own", ("key", "own")),
        ("three", *run),
        ("four", "group's"),
        ("five", *run),
        ("six", "saga's"),
        ("seven",),
        ("last", *run),
    ]
    assert sorted(forward) == sorted(world.log[:8])
    assert sorted((f"-{name}", *rest) for name, *rest in forward) == sorted(world.log[8:])


async def test_parts_run_in_order_and_go_back_in_reverse(world):
    """Parts run one after the other, and what was done is taken back in reverse (G1, G7)."""
    trip = Saga(
        [
            world.step("one"),
            Saga([world.step("two"), world.step("three")]),
            Parallel(Saga([world.step("four"), world.step("five")])),
            world.step("six", fails=Boom()),
            world.step("seven"),
        ]
    )
    with pytest.raises(Boom):
        await trip.run()

    assert "one two three four five six -six -five -four -three -two -one".split() == world.names


async def test_value_of_data_is_none(world):
    """A saga as data has no value; the results are in the outcome's steps."""
    trip = Saga([world.step("one"), Parallel(world.step("two"))])

    assert await trip() is None
    outcome = await trip.run()
    assert outcome.value is None
    assert ["one", "two"] == [step.result for step in outcome.steps]


async def test_steps_may_come_from_any_iterable(world):
    """Steps are taken from any iterable, once, and a list that changes later changes nothing."""
    parts = [world.step("one")]
    trip = Saga(parts)
    parts.append(world.step("two"))
    generated = Saga(world.step(name) for name in ("three", "four"))
    await trip.run()
    await generated.run()
    await generated.run()

    assert ["one", "three", "four", "three", "four"] == world.names


async def test_commit_of_data(world):
    """What stands before a commit is not taken back; what stands after it is, and the run FAILED (G14)."""
    trip = Saga([world.step("one"), Commit(), world.step("two"), world.step("three", fails=Boom())])
    with pytest.raises(Boom) as raised:
        await trip.run(exceptions=Boom)

    assert ["one", "two", "three", "-three", "-two"] == world.names
    outcome = outcome_of(raised.value)
    assert SagaState.FAILED is outcome.state
    assert [StepState.COMPLETED, StepState.COMPENSATED, StepState.COMPENSATED] == [
        step.state for step in outcome.steps
    ]


# --- run and call -----------------------------------------------------------------------------------


async def test_call_gives_the_value_and_run_the_outcome():
    """Calling a saga gives its function's value, running it an outcome that has it."""

    @saga
    async def add(scope: SagaScope, x, *, y=1):
        return x + y

    assert 3 == await add(2)
    assert 5 == await add(2, y=3)
    outcome = await add.run(2, y=3)
    assert (SagaState.COMPLETED, 5) == (outcome.state, outcome.value)


async def test_expected_failures_of_definition_and_run(world):
    """`run` returns where the definition or the call names the failure, and raises otherwise (G12)."""
    trip = Saga([world.step("one", fails=KeyError())], exceptions=LookupError)
    assert SagaState.COMPENSATED is (await trip.run()).state
    assert SagaState.COMPENSATED is (await trip.run(exceptions=OSError)).state

    trip = Saga([world.step("one", fails=OSError())], exceptions=LookupError)
    with pytest.raises(OSError):
        await trip.run()
    outcome = await trip.run(exceptions=(Boom, OSError))
    assert (SagaState.COMPENSATED, OSError) == (outcome.state, type(outcome.error))


async def test_expected_failures_of_a_call(world):
    """A call raises expected failures too, since it has no value to give (G12)."""
    trip = Saga([world.step("one", fails=KeyError())], exceptions=KeyError)
    with pytest.raises(KeyError) as raised:
        await trip()

    assert ["one", "-one"] == world.names
    assert SagaState.COMPENSATED is outcome_of(raised.value).state


async def test_expected_failures_of_groups(world):
    """A group's failure is expected only if each of its leaves is (G12)."""
    both = Saga(
        [Parallel(world.step("one", fails=OSError()), Parallel(world.step("two", fails=KeyError())))]
    )
    one = Saga([Parallel(Parallel(world.step("one", fails=OSError()), world.step("two")))])
    with pytest.raises(ExceptionGroup):
        await one.run(exceptions=KeyError)

    assert SagaState.COMPENSATED is (await one.run(exceptions=OSError)).state
    assert SagaState.COMPENSATED is (await both.run(exceptions=(OSError, KeyError))).state


@pytest.mark.parametrize("exceptions", [3, [OSError], (OSError, 3), KeyboardInterrupt])
async def test_refused_exceptions(exceptions, world):
    """Exceptions that are none are refused before anything runs, with the call's name."""
    with pytest.raises(SagaDefinitionError, match="<Saga 'trip'>.run: exceptions"):
        await Saga([world.step("one")], name="trip").run(exceptions=exceptions)

    assert [] == world.log


@pytest.mark.parametrize("call", [lambda trip: trip, lambda trip: trip.run], ids=["call", "run"])
async def test_wrong_arguments_of_data(call, world):
    """Arguments that an action or a compensation cannot take are a TypeError; nothing runs."""

    async def two(x, y): ...

    trip = Saga([world.step("one"), Parallel(Saga([Step(two, name="pay")]))], name="trip")

    with pytest.raises(TypeError, match=r"<Saga 'trip'>.*\(1\): the action of step 'pay' cannot take"):
        await call(trip)(1)
    with pytest.raises(TypeError, match="missing a required argument: 'y'"):
        await call(trip)(1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):
        await call(trip)(1, 2, z=3)
    assert [] == world.log
    await call(trip)(1, 2)
    await call(trip)(x=1, y=2)
    assert 2 == len(world.log)


@pytest.mark.parametrize("call", [lambda trip: trip, lambda trip: trip.run], ids=["call", "run"])
async def test_wrong_arguments_of_a_function(call):
    """Arguments that the function cannot take are a TypeError that names the saga; nothing runs."""

    @saga
    async def trip(scope: SagaScope, x, *, key): ...

    with pytest.raises(
        TypeError, match=r"the function of saga 'trip' cannot take these: missing a req"
    ):
        await call(trip)(1)
    with pytest.raises(TypeError, match="too many positional arguments"):
        await call(trip)(1, 2, key=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        await call(trip)(1, key=2, other=3)


async def test_parameters_named_as_run_s_are_reached_by_bind(world):
    """A parameter named `exceptions` or `executor` is reached by a call, or by bind."""

    @saga
    async def trip(scope: SagaScope, *, exceptions, executor):
        return exceptions, executor

    assert (1, 2) == await trip(exceptions=1, executor=2)
    outcome = await Saga([trip.bind(exceptions=1, executor=2)]).run()
    assert SagaState.COMPLETED is outcome.state


async def test_a_missing_await_is_found():
    """What a saga's call and run give is a coroutine, which Python warns of when it is forgotten."""
    trip = Saga([])
    for coroutine in (trip(), trip.run()):
        assert asyncio.iscoroutine(coroutine)
        await coroutine


async def test_runs_of_one_saga_at_the_same_time(world):
    """A saga is run any number of times, also at the same time; a failure of one is its own."""
    together = Event()
    begun = []

    @saga
    async def trip(scope: SagaScope, x):
        await scope.step(world.act("one"), x, compensation=world.act("-one"))
        begun.append(x)
        if len(begun) == 3:
            together.set()
        await together.wait()
        if x == 1:
            raise Boom
        return x

    results = {}

    async def run(x):
        results[x] = await trip.run(x, exceptions=Boom)

    async with create_task_group() as tasks:
        for x in range(3):
            tasks.start_soon(run, x)

    assert [("-one", 1)] == [entry for entry in world.log if entry[0] == "-one"]
    assert [0, 2] == [results[x].value for x in (0, 2)]
    assert SagaState.COMPENSATED is results[1].state


# --- as a function ----------------------------------------------------------------------------------


async def test_function_with_and_without_options(world):
    """@saga is used bare, with empty parentheses, and with options."""

    @saga
    async def bare(scope: SagaScope):
        return 1

    @saga()
    async def empty(scope: SagaScope):
        return 2

    @saga(
        name="other", exceptions=Boom, rollback_timeout=3, on_compensation_failure="stop", middleware=()
    )
    async def full(scope: SagaScope):
        raise Boom

    assert [1, 2] == [await bare(), await empty()]
    assert ["bare", "empty", "other"] == [bare.name, empty.name, full.name]
    assert (3, "stop", (Boom,), ()) == (
        full.rollback_timeout,
        full.on_compensation_failure,
        full.exceptions,
        full.middleware,
    )
    assert SagaState.COMPENSATED is (await full.run()).state
    assert isinstance(bare, Saga)


def test_unknown_option_of_the_decorator():
    """An option that @saga does not have is a TypeError, at once."""
    with pytest.raises(TypeError, match="@saga got unexpected options: retries"):
        saga(retries=3)


@pytest.mark.parametrize("on", ["function", "method", "annotated", "named", "local"])
async def test_a_function_saga_is_rolled_back(on, world):
    """What a function raises takes back what it did, on methods as on functions."""

    async def body(scope, x):
        await scope.step(world.act("one"), x, compensation=world.act("-one"))
        await scope.step(world.act("two"), x, undo=world.act("-two"))
        raise Boom

    class Agency:
        async def book(self, scope: SagaScope, x):
            assert isinstance(self, Agency)
            await body(scope, x)

        @staticmethod
        @saga
        async def annotated(on: SagaScope, x):
            await body(on, x)

        @staticmethod
        @saga
        async def named(scope, x):
            await body(scope, x)

    Agency.booking = saga(Agency.book)
    trip = {
        "function": saga(body),
        "method": Agency().booking,
        "annotated": Agency.annotated,
        "named": Agency.named,
        "local": saga(name="local")(body),
    }[on]
    with pytest.raises(Boom):
        await trip(3)

    assert [("one", 3), ("two", 3), ("-two", "two"), ("-one", 3)] == world.log


class Agency:
    """A class whose methods are sagas."""

    def __init__(self, name):
        self.name = name

    @saga
    async def bare(self, scope: SagaScope, x, *, key=None):
        """Books."""
        return self.name, x, key

    @saga(name="options", exceptions=Boom)
    async def with_options(self, scope: SagaScope):
        raise Boom(self.name)

    @saga
    async def inner(self, scope: SagaScope, x):
        return await scope.step(self.bare, x, key="inner")


class Branch(Agency):
    """Inherits the sagas."""

    @saga
    async def bare(self, scope: SagaScope, x, *, key=None):
        return "branch", await scope.step(super().bare, x, key=key)


async def test_methods():
    """A method that is a saga is one of its instance: it is called, run, bound, and a step of others."""
    agency = Agency("agency")

    assert ("agency", 1, 2) == await agency.bare(1, key=2)
    assert ("agency", 1, None) == (await agency.bare.run(1)).value
    assert ("agency", 1, "inner") == await agency.inner(1)
    assert isinstance(agency.bare, Saga)
    assert "bare" == agency.bare.name
    outcome = await agency.with_options.run()
    assert ("options", SagaState.COMPENSATED) == (outcome.saga, outcome.state)
    assert "agency" == str(outcome.error)
    assert SagaState.COMPLETED is (await Saga([agency.bare.bind(1)]).run()).state


async def test_methods_are_inherited_and_overridden():
    """A saga method is inherited, overridden and reached by super, as a method is."""
    assert ("branch", ("branch name", 1, None)) == await Branch("branch name").bare(1)
    assert ("branch", ("branch name", 1, "inner")) == await Branch("branch name").inner(1)


async def test_methods_check_their_arguments():
    """Wrong arguments of a saga method are a TypeError, and nothing runs."""
    with pytest.raises(TypeError, match="the function of saga 'bare' cannot take these"):
        await Agency("agency").bare()


async def test_a_method_of_the_class():
    """Reached from its class, a saga method is no saga yet, and is called with its instance."""
    assert isinstance(Agency.bare, SagaMethod)
    assert Agency.bare is Agency.bare
    assert ("agency", 1, 2) == await Agency.bare(Agency("agency"), 1, key=2)


# Without an annotation, and with a name that says nothing.
async def of_a_module(first, number):
    return 2 * number


async def test_a_function_of_a_module_may_name_its_scope_as_it_likes():
    """Only what stands in a class body is taken for a method: a function of a module is a saga."""
    assert 6 == await saga(of_a_module)(3)


class Traced:
    """A decorator written as a class: what it gives has the function's names, and no code."""

    def __init__(self, function):
        functools.update_wrapper(self, function)
        self.function = function

    async def __call__(self, *args):
        return await self.function(*args)


class Desk:
    """A class that holds a saga which is no method."""

    @saga
    @Traced
    async def book(first, number):  # noqa: N805 - it is bound to no instance
        return 2 * number


async def test_an_object_in_a_class_body_is_no_method():
    """An object that stands for a function is bound to no instance, so its saga takes the scope first."""
    assert 6 == await Desk.book(3)
    assert 6 == await Desk().book(3)


def test_refused_class_method():
    """`@saga` above `@classmethod` is refused where it stands, since that gives nothing to call yet."""
    with pytest.raises(SagaDefinitionError, match="it must be an async function"):

        class Wrong:
            @saga
            @classmethod
            async def trip(cls, scope): ...


def test_refused_option_of_a_method():
    """An option that cannot work is refused where the method is decorated."""
    with pytest.raises(SagaDefinitionError, match="exceptions must be"):

        class Wrong:
            @saga(exceptions=3)
            async def trip(self, scope): ...


async def test_function_as_a_part_of_another(world):
    """A function saga is a part of data and of functions: its work is taken back with the whole."""

    @saga
    async def inner(scope: SagaScope, x):
        await scope.step(world.act("inner"), x, compensation=world.act("-inner"))
        return 2 * x

    @saga
    async def outer(scope: SagaScope, x):
        assert 2 * x == await scope.step(inner, x)
        assert (2 * x, 6) == await scope.parallel(inner.bind(x), inner.bind(3))
        raise Boom

    with pytest.raises(Boom):
        await outer(1)
    assert 3 == world.names.count("inner") == world.names.count("-inner")

    world.log.clear()
    with pytest.raises(Boom):
        await Saga([inner, Parallel(inner), world.step("last", fails=Boom())]).run(4)
    assert ["inner", "inner", "last", "-last", "-inner", "-inner"] == world.names


async def test_commit_in_a_part_of_another_is_an_error(world):
    """A commit in a nested scope, in an inner saga or in a group is an error; nothing is passed (G14)."""

    @saga
    async def inner(scope: SagaScope):
        await scope.commit()

    @saga
    async def nested(scope: SagaScope):
        async with scope.nested() as part:
            await part.commit()

    @saga
    async def in_group(scope: SagaScope):
        await scope.parallel(inner.bind())

    @saga
    async def holds(scope: SagaScope):
        await scope.step(Saga([Commit()]))

    for trip in (Saga([world.step("one"), inner]), Saga([Parallel(inner)]), nested, in_group, holds):
        with pytest.raises((SagaDefinitionError, ExceptionGroup)) as raised:
            await trip.run()
        error = raised.value
        while isinstance(error, ExceptionGroup):
            (error,) = error.exceptions
        assert isinstance(error, SagaDefinitionError)
        assert "outermost sequence" in str(error)
        assert SagaState.COMPENSATED is outcome_of(raised.value).state
    assert ["one", "-one"] == world.names


async def test_commit_of_a_function(world):
    """A function passes its commit on its scope: what was before it stays (G14)."""

    @saga
    async def trip(scope: SagaScope):
        await scope.step(world.step("one"))
        await scope.commit()
        await scope.step(world.step("two"))
        raise Boom

    with pytest.raises(Boom) as raised:
        await trip.run(exceptions=Boom)

    assert ["one", "two", "-two"] == world.names
    assert SagaState.FAILED is outcome_of(raised.value).state


async def test_cancelled_saga_is_rolled_back(world):
    """A saga that is cancelled is rolled back, and the cancellation goes on (G8)."""

    async def cancelling():
        scope.cancel()
        await sleep_forever()

    for trip in (
        Saga([world.step("one"), Step(cancelling)]),
        Saga([world.step("one"), Saga([Parallel(Step(cancelling))])]),
    ):
        world.log.clear()
        with CancelScope() as scope:
            await trip.run(exceptions=Exception)
        assert scope.cancelled_caught
        assert ["one", "-one"] == world.names


async def test_a_function_that_forgets_a_task_in_its_scope(world):
    """A function that ends while a call on its scope is under way in another task fails (G2)."""
    begun, go_on = Event(), Event()

    async def slow():
        begun.set()
        await go_on.wait()

    async with create_task_group() as tasks:

        @saga(name="trip")
        async def trip(scope: SagaScope):
            await scope.step(world.step("one"))

            async def forgotten():
                with contextlib.suppress(Exception):
                    await scope.step(slow)

            tasks.start_soon(forgotten)
            await begun.wait()

        with pytest.raises(ScopeBusy, match="the scope of saga 'trip' ended while its step was under"):
            await trip()
        go_on.set()

    assert ["one", "-one"] == world.names


async def test_function_that_catches_a_failed_rollback(world):
    """A function that goes on after CompensationFailed has failed all the same (G2)."""

    @saga
    async def trip(scope: SagaScope):
        with contextlib.suppress(CompensationFailed):
            await scope.step(
                world.act("one", fails=Boom()), compensation=world.act("-one", fails=OSError())
            )
        return "value"

    with pytest.raises(CompensationFailed) as raised:
        await trip()

    assert SagaState.FAILED is raised.value.outcome.state


# --- the builder ------------------------------------------------------------------------------------


async def test_builder(world):
    """The builder builds what the list of parts would be."""
    builder = (
        SagaBuilder.create("trip", exceptions=Boom, rollback_timeout=3, on_compensation_failure="stop")
        .add_step(world.act("one"), world.act("-one"), name="one", not_applied=OSError)
        .add_step(world.step("two"))
        .add_step(world.step("three").bind("own"))
        .add_parallel(
            world.step("four"), world.step("five"), name="group", limit=1, on_failure="finish"
        )
        .add_saga(Saga([world.step("six")]))
        .add_saga(Saga([world.step("seven")]).bind())
        .add_step(world.act("eight"), undo=world.act("-eight"), name="eight")
    )
    trip = builder.build()
    outcome = await trip.run("run")

    assert ("group", 1, "finish") == (trip.parts[3].name, trip.parts[3].limit, trip.parts[3].on_failure)
    assert trip.parts[6].undo is not None
    assert ("trip", (Boom,), 3, "stop") == (
        trip.name,
        trip.exceptions,
        trip.rollback_timeout,
        trip.on_compensation_failure,
    )
    assert [
        ("one", "run"),
        ("two", "run"),
        ("three", "own"),
        ("four", "run"),
        ("five", "run"),
        ("six", "run"),
        ("seven",),
        ("eight", "run"),
    ] == world.log
    assert [(0,), (1,), (2,), (3, 0), (3, 1), (4, 0), (5, 0), (6,)] == [
        step.path for step in outcome.steps
    ]


async def test_builder_builds_copies(world):
    """A builder that goes on does not change what it has built."""
    builder = SagaBuilder.create().add_step(world.act("one"))
    first = builder.build()
    second = builder.add_step(world.act("two")).build()
    await first.run()
    assert ["one"] == world.names

    await second.run()
    assert ["one", "one", "two"] == world.names
    assert first is not second


async def test_builder_s_commit(world):
    """The builder's commit is one: what was before it stays done (G14)."""
    trip = (
        SagaBuilder.create()
        .add_step(world.step("one"))
        .add_commit()
        .add_step(world.step("two", fails=Boom()))
        .build()
    )
    with pytest.raises(Boom):
        await trip.run()

    assert ["one", "two", "-two"] == world.names
    with pytest.raises(SagaDefinitionError, match="holds a commit"):
        SagaBuilder.create().add_saga(trip)


def test_builder_keeps_its_parts_when_a_call_is_refused(world):
    """A refused part is not in the saga; the builder can go on."""
    builder = SagaBuilder.create().add_step(world.act("one"))
    with pytest.raises(SagaDefinitionError):
        builder.add_step(3)

    assert 1 == len(builder.build().parts)


@pytest.mark.parametrize("options", [{}, {"timeout": 60}, {"not_applied": OSError}], ids=repr)
async def test_every_step_is_a_checkpoint_only_where_its_action_is(options, world):
    """A saga of async actions without checkpoints has none either (G6)."""
    with CancelScope() as scope:
        scope.cancel()
        await Saga([world.step("one", **options), world.step("two", **options)]).run()
        world.log.append(("went on",))

    assert ["one", "two", "went on"] == world.names
