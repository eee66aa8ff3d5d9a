"""Steps, groups and what is bound: what they accept, what they refuse, and what they compose."""

from __future__ import annotations

import contextlib
import threading
from functools import partial

import pytest
import stamina
import tenacity
from anyio import (
    CancelScope,
    Event,
    create_task_group,
    fail_after,
    from_thread,
    sleep_forever,
    to_thread,
)
from anyio.lowlevel import checkpoint

from pysagas import (
    Bound,
    Commit,
    CompensationFailed,
    Parallel,
    Saga,
    SagaBuilder,
    SagaDefinitionError,
    SagaScope,
    SagaState,
    Step,
    StepState,
    open_saga,
    outcome_of,
    saga,
)
from pysagas._attempts import _threads_back

pytestmark = pytest.mark.anyio


class Declined(Exception):
    """By which an action says that it did nothing."""


class Sync:
    """A sync function that counts how often it was called."""

    def __init__(self, *results):
        self.results = list(results)
        self.calls = []
        self.threads = []

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        self.threads.append(threading.get_ident())
        result = self.results.pop(0) if self.results else None
        if isinstance(result, BaseException):
            raise result
        return result


class Async(Sync):
    """The same, async."""

    async def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


def any_call(*args, **kwargs): ...


async def any_call_async(*args, **kwargs): ...


async def one(x): ...


def sync_one(x): ...


def two(x, y): ...


async def twice(attempt):
    """A retrier: tries twice."""
    with contextlib.suppress(Exception):
        return await attempt()
    return await attempt()


async def run_to_failure(step, *args, error=Exception, **kwargs):
    """Runs a saga that fails; gives the report of its first step, and what it raised."""
    with pytest.raises(error) as raised:
        await Saga([step]).run(*args, **kwargs)
    outcome = outcome_of(raised.value)
    assert outcome is not None
    return outcome.steps[0], raised.value


def fails_after(step, error=OSError):
    """A saga of a step that succeeds and one that fails, so that the first is taken back."""
    return Saga([step, Step(Sync(error("after")))])


# --- steps that are refused -------------------------------------------------------------------------


def coroutine():
    return any_call_async()


class Awaitable:
    """What can be awaited, and is no coroutine."""

    def __await__(self): ...


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((3,), {}, "Step 'int': the action must be a function, or another callable, not 3"),
        ((None,), {"name": "pay"}, "Step 'pay': the action must be a function"),
        ((one, "cancel"), {}, "Step 'one': the compensation must be a function, .* not 'cancel'"),
        ((one,), {"undo": 3}, "Step 'one': the undo must be a function, .* not 3"),
        ((one,), {"name": 3}, "Step 3: name must be a non-empty string, not 3"),
        ((one,), {"name": ""}, "Step 'one': name must be a non-empty string, not ''"),
        (
            (Saga([], name="trip"),),
            {},
            "the action is <Saga 'trip'>, which would be an independent run",
        ),
        (
            (sync_one, two),
            {},
            r"Step 'sync_one': the compensation gets the action's arguments, and .* write undo=",
        ),
        (
            (sync_one, two),
            {},
            r"cannot take them: sync_one\(x\), but two: missing a required argument: 'y'",
        ),
        ((two, sync_one), {}, "too many positional arguments"),
        (
            (one,),
            {"undo": two},
            "Step 'one': undo 'two' gets one argument, the action's result, .* write compensation=",
        ),
        ((one,), {"undo": lambda: None}, "undo '<lambda>' gets one argument"),
        (
            (one,),
            {"not_applied": 3},
            "Step 'one': not_applied must be an exception type, or a tuple of them, not 3",
        ),
        ((one,), {"not_applied": (OSError, "no")}, "not_applied must be an exception type"),
        ((one,), {"not_applied": [OSError]}, "not_applied must be an exception type"),
        ((one,), {"not_applied": OSError()}, "not_applied must be an exception type"),
        ((one,), {"not_applied": int}, "not_applied must be an exception type"),
        (
            (one,),
            {"not_applied": (OSError, KeyboardInterrupt)},
            "KeyboardInterrupt is no failure but an order to stop .* name subclasses of Exception",
        ),
        ((one,), {"not_applied": BaseException}, "BaseException is no failure"),
        ((one,), {"timeout": -1}, "Step 'one': timeout must be seconds, zero or more, .* not -1"),
        ((one,), {"timeout": "5"}, "timeout must be seconds, .* not '5'"),
        ((one,), {"timeout": float("nan")}, "timeout must be seconds, .* not nan"),
        ((one,), {"timeout": True}, "timeout must be seconds, .* not True"),
        (
            (one, one),
            {"compensation_timeout": -0.5},
            "compensation_timeout must be seconds, .* not -0.5",
        ),
        ((sync_one,), {"timeout": 5}, "timeout=5, but the action is not an async function"),
        ((sync_one,), {"shield": True}, "shield=True, but the action is not an async function"),
        (
            (one, sync_one),
            {"compensation_timeout": 5},
            "compensation_timeout=5, but the compensation is not an async function",
        ),
        (
            (one, one),
            {"compensation_timeout": 5, "undo": sync_one},
            "compensation_timeout=5, but the undo is not an async function",
        ),
        (
            (one,),
            {"compensation_timeout": 5},
            "compensation_timeout is given, but there is neither a compensation nor an undo",
        ),
        (
            (one,),
            {"compensation_retry": twice},
            "compensation_retry is given, but there is neither a compensation nor an undo",
        ),
        ((one,), {"blocking": True}, "blocking=True, but the action is async; .* write shield=True"),
        ((sync_one,), {"blocking": True, "timeout": 5}, "a thread cannot be timed out"),
        (
            (sync_one, sync_one),
            {"blocking": True, "compensation_timeout": 5},
            "a thread cannot be timed out",
        ),
        ((one,), {"retry": 3}, "retry must be an async callable .* not 3; write for instance stamina"),
        ((one,), {"retry": lambda attempt: attempt()}, "is not async; a sync retrier would call"),
        ((one,), {"retry": any_call}, "is not async"),
        (
            (one,),
            {"retry": stamina.RetryingCaller().on(OSError)},
            "is not async; a sync retrier would .* never retry; write for instance stamina",
        ),
        ((one,), {"retry": tenacity.Retrying(reraise=True)}, "is not async"),
        (
            (one,),
            {"retry": stamina.AsyncRetryingCaller()},
            "cannot take one argument, the function to call",
        ),
        ((one, one), {"compensation_retry": 3}, "compensation_retry must be an async callable"),
        ((one, one), {"compensation_retry": any_call}, "compensation_retry .* is not async"),
    ],
)
def test_refused_step(arguments, options, message):
    """A step that cannot work is refused when it is built, with what, where, and what to write."""
    with pytest.raises(SagaDefinitionError, match=message) as refused:
        Step(*arguments, **options)
    assert str(refused.value).startswith("Step ")


def yields(x):
    yield x  # pragma: no cover - never run: that is what is wrong with it


async def yields_async(x):
    yield x  # pragma: no cover - as above


@pytest.mark.parametrize("where", ["action", "compensation", "undo"])
@pytest.mark.parametrize("generator", [yields, yields_async, partial(yields, 1)])
def test_generator_function(where, generator):
    """A generator function, whose call runs nothing, is refused and told to be written without yield."""
    given = {"action": one, where: generator}

    with pytest.raises(
        SagaDefinitionError, match=f"the {where} '.*' is a generator function, .* `yield`"
    ):
        Step(given.pop("action"), **given)


@pytest.mark.parametrize("where", ["action", "compensation", "undo"])
def test_coroutine_instead_of_function(where):
    """A coroutine given for a function is refused, and closed, so that nothing warns of it."""
    given = {"action": one, where: coroutine()}

    with pytest.raises(SagaDefinitionError, match=f"the {where} must be .* not a coroutine, which is"):
        Step(given.pop("action"), **given)


def test_awaitable_instead_of_function():
    """An awaitable that is no coroutine is refused too."""

    with pytest.raises(SagaDefinitionError, match="the action must be a function"):
        Step(Awaitable())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": -1}, "timeout must be seconds"),
        ({"retry": any_call}, "is not async"),
        ({"undo": two}, "undo 'two' gets one argument"),
        ({"compensation": two}, "the compensation gets the action's arguments"),
        ({"not_applied": 3}, "not_applied must be"),
        ({"blocking": True}, "blocking=True, but the action is async"),
    ],
)
@pytest.mark.parametrize("middleware", [[], [lambda effect, call_next: call_next()]])
async def test_refused_step_of_a_scope(options, message, middleware):
    """A step of a scope is refused as any step is, and nothing has run."""

    calls = []

    async def action(x):
        calls.append(x)

    async with open_saga(middleware=middleware) as scope:
        with pytest.raises(SagaDefinitionError, match=message):
            await scope.step(action, 1, **options)
        await scope.step(action, 2)

    assert [2] == calls
    assert SagaState.COMPLETED is scope.outcome.state
    assert [(0,)] == [step.path for step in scope.outcome.steps]


async def test_refused_arguments_of_a_scope():
    """A scope refuses a call that cannot work; nothing has run, and the scope goes on (G2)."""
    ran = Sync()
    async with open_saga(name="trip") as scope:
        with pytest.raises(TypeError, match="missing a required argument"):
            await scope.step(one)
        with pytest.raises(TypeError, match="missing a required argument"):
            await scope.step(Step(one))
        with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
            await scope.step(Step(one), 1, y=3)
        with pytest.raises(SagaDefinitionError, match="must be a function"):
            await scope.step(3)
        with pytest.raises(TypeError, match="has its arguments already"):
            await scope.step(Step(ran).bind(1), 2)
        with pytest.raises(
            TypeError, match="there is no option 'no_such_option'; options are compensation, undo"
        ):
            await scope.step(ran, 1, no_such_option=True)
        with pytest.raises(SagaDefinitionError, match="must be a Step, a Parallel, a Saga or a Commit"):
            await scope.parallel(ran)
        with pytest.raises(TypeError, match="missing a required argument"):
            await scope.parallel(Step(ran), Step(one))
        with pytest.raises(SagaDefinitionError, match="limit must be"):
            await scope.parallel(Step(ran), limit=0)
        with pytest.raises(SagaDefinitionError, match="on_failure must be"):
            await scope.parallel(Step(ran), on_failure="wait")
        with pytest.raises(SagaDefinitionError, match="on_rollback"):
            scope.on_rollback(two, 1)
        with pytest.raises(SagaDefinitionError, match="on_rollback"):
            scope.on_rollback(3)
        assert [] == ran.calls
        await scope.step(ran)

    assert 1 == len(ran.calls)
    assert SagaState.COMPLETED is scope.outcome.state


# --- groups and sequences that are refused ----------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Parallel(one), r"Parallel: member 0 must be .*; write Step\(one\)"),
        (
            lambda: Parallel(Step(one), 3),
            "Parallel: member 1 must be a Step, a Parallel, a Saga or a Commit, not 3$",
        ),
        (lambda: Parallel(3, name="all"), "Parallel 'all': member 0"),
        (lambda: Parallel(name=3), "Parallel: name must be a non-empty string, not 3"),
        (lambda: Parallel(name=""), "Parallel: name must be a non-empty string, not ''"),
        (lambda: Parallel(limit=0), "Parallel: limit must be a whole number .* not 0"),
        (lambda: Parallel(limit=-3), "not -3"),
        (lambda: Parallel(limit=1.5), "not 1.5"),
        (lambda: Parallel(limit=True), "not True"),
        (lambda: Parallel(limit="2"), "not '2'"),
        (lambda: Parallel(on_failure="wait"), 'on_failure must be "cancel" or "finish", not \'wait\''),
        (lambda: Parallel(Commit()), "Parallel: member 0, <Commit 'commit'>, holds a commit"),
        (lambda: Parallel(Saga([Commit()])), "holds a commit; a commit belongs to the outermost"),
        (lambda: Parallel(Parallel(Saga([Saga([])]), Saga([Commit()]))), "holds a commit"),
        (lambda: Saga([Saga([Commit()])]), "Saga: step 0, <Saga 'saga'>, holds a commit"),
        (lambda: Saga([Step(one), Saga([Commit()]).bind()]), "Saga: step 1, <Saga 'saga'>, holds a"),
        (lambda: Saga([one]), r"Saga: step 0 must be .*; write Step\(one\)"),
        (lambda: Saga(Step(one)), "Saga: steps must be a list of Step, Parallel and Saga, not <Step"),
        (lambda: Saga(Step(one).bind(1)), "Saga: steps must be a list"),
        (lambda: Saga("steps"), "Saga: steps must be a list"),
        (lambda: Saga(3), "Saga: steps must be a list .* not 3"),
        (lambda: Saga([3], name="trip"), "Saga 'trip': step 0 must be"),
        (
            lambda: Saga([Step(one, name="pay"), Step(sync_one, name="pay")]),
            "two different steps have the name 'pay'; give one of them another",
        ),
        (
            lambda: Saga([Step(one, name="pay").bind(1), Step(one, name="pay")]),
            "two different steps have the name 'pay'",
        ),
        (lambda: Saga([], name=3), "Saga: name must be|name must be a non-empty string, not 3"),
        (lambda: Saga([], name=""), "name must be a non-empty string, not ''"),
        (lambda: Saga([], exceptions=3), "Saga: exceptions must be an exception type"),
        (lambda: Saga([], exceptions=KeyboardInterrupt), "KeyboardInterrupt is no failure"),
        (lambda: Saga([], rollback_timeout=-1), "rollback_timeout must be seconds, .* not -1"),
        (lambda: Saga([], rollback_timeout="3"), "rollback_timeout must be seconds"),
        (
            lambda: Saga([], on_compensation_failure="ignore"),
            'on_compensation_failure must be "continue" or "stop", not \'ignore\'',
        ),
        (lambda: Saga([], middleware=any_call), "middleware must be a list or a tuple"),
        (lambda: Saga([], middleware=[3]), r"a middleware must be .* \(effect, call_next\), not 3"),
        (lambda: Saga([], middleware=(one,)), r"a middleware must be an async callable of"),
        (lambda: SagaBuilder.create(""), "name must be"),
        (lambda: SagaBuilder.create(rollback_timeout=-1), "rollback_timeout must be"),
        (lambda: SagaBuilder.create().add_step(3), "the action must be a function"),
        (lambda: SagaBuilder.create().add_step(one, two), "the compensation gets the action's"),
        (
            lambda: SagaBuilder.create().add_step(Step(one), timeout=3),
            "add_step: <Step 'one'> is defined already; give its compensation and its options where",
        ),
        (lambda: SagaBuilder.create().add_step(Step(one), sync_one), "is defined already"),
        (lambda: SagaBuilder.create().add_step(Step(one), undo=sync_one), "is defined already"),
        (lambda: SagaBuilder.create().add_step(Step(one).bind(1), name="x"), "is defined already"),
        (lambda: SagaBuilder.create().add_parallel(one), "member 0 must be"),
        (lambda: SagaBuilder.create().add_parallel(Commit()), "holds a commit"),
        (
            lambda: SagaBuilder.create().add_saga(one),
            "must be a Step, a Parallel, a Saga or a Commit, not .*; write Step",
        ),
        (lambda: SagaBuilder.create().add_saga(Saga([Commit()])), "holds a commit"),
        (
            lambda: (
                SagaBuilder.create().add_step(one, name="pay").add_step(sync_one, name="pay").build()
            ),
            "two different steps have the name 'pay'",
        ),
        (lambda: Saga([], rollback_timeout=-1), "^Saga: rollback_timeout must be"),
        (lambda: Saga([], name="trip", middleware=3), "^Saga 'trip': middleware must be"),
        (lambda: open_saga(name=""), "name must be"),
        (lambda: open_saga(exceptions=3), "open_saga: exceptions must be"),
        (lambda: open_saga(name="block", exceptions=3), "open_saga 'block': exceptions"),
        (lambda: open_saga(rollback_timeout=-1), "open_saga: rollback_timeout must be"),
        (lambda: open_saga(on_compensation_failure="x"), "on_compensation_failure must be"),
        (lambda: open_saga(middleware=3), "middleware must be a list"),
        (lambda: saga(any_call), "@saga on 'any_call': it must be an async function of"),
        (lambda: saga(3), "@saga on 'int': it must be an async function"),
        (lambda: saga(Saga([])), "it must be an async function"),
        (lambda: saga(name=""), "@saga: name must be"),
        (lambda: saga(rollback_timeout=-1), "@saga: rollback_timeout must be"),
        (lambda: saga(on_compensation_failure="x"), "@saga: on_compensation_failure must be"),
        (lambda: saga(middleware=3), "@saga: middleware must be"),
        (lambda: saga(exceptions=3)(one), "@saga.*: exceptions must be an exception type"),
    ],
)
def test_refused_definition(build, message):
    """A group or saga that cannot work is refused when it is built (G14), and says what and where."""
    with pytest.raises(SagaDefinitionError, match=message):
        build()


def test_a_function_saga_needs_a_scope():
    """An async function that cannot take a scope is refused by @saga, and told what to write."""

    async def no_scope(): ...

    async def only_keywords(*, scope): ...

    for function in (no_scope, only_keywords, AsyncNothing()):
        with pytest.raises(SagaDefinitionError, match=r"its first argument is the scope .* write"):
            saga(function)


class AsyncNothing:
    async def __call__(self): ...


def test_one_step_may_stand_in_a_sequence_twice():
    """The same step, bound or not, may be in a sequence many times, and unnamed namesakes too."""
    step = Step(one, name="pay")
    Saga([step, step, step.bind(1)])
    Saga([Step(one), Step(one), Step(lambda: 1), Step(lambda: 2)])
    # Members of a group may have one name too: their paths tell them apart.
    Parallel(Step(one, name="pay"), Step(sync_one, name="pay"))


# --- what a definition is ---------------------------------------------------------------------------


def test_definitions_are_immutable():
    """Neither a step, a group, a saga nor a bound one can be changed, and the message says so."""
    step = Step(one)
    bound = step.bind(1)
    for definition in (step, Parallel(step), Saga([step]), Commit()):
        with pytest.raises(AttributeError, match="is immutable: 'name' cannot be set; build another"):
            definition.name = "other"
        with pytest.raises(AttributeError, match="is immutable"):
            del definition.name
        with pytest.raises(AttributeError):
            definition.other = 3
    with pytest.raises(AttributeError, match="is immutable: 'args' cannot be set; bind again"):
        bound.args = ()
    with pytest.raises(AttributeError, match="is immutable"):
        del bound.args


def test_reprs_name_the_definition():
    """Definitions show what they are and their name; a bound one its arguments, shortened."""
    step = Step(one, name="pay")

    assert "<Step 'pay'>" == repr(step)
    assert "<Step 'two'>" == repr(Step(partial(two, 1)))
    assert "<Parallel 'parallel'>" == repr(Parallel())
    assert "<Parallel 'all'>" == repr(Parallel(name="all"))
    assert "<Saga 'saga'>" == repr(Saga())
    assert "<Commit 'commit'>" == repr(Commit())
    assert "<Step 'pay'>.bind(1)" == repr(step.bind(1))
    assert "<Step 'two'>.bind(1, y='b')" == repr(Step(two).bind(1, y="b"))
    assert f"<Step 'pay'>.bind('{'x' * 56}...)" == repr(step.bind("x" * 100))


def test_step_keeps_what_it_was_given():
    """A step has its options as attributes, the exception types as a tuple."""
    step = Step(
        one,
        one,
        undo=one,
        not_applied=OSError,
        timeout=1,
        retry=twice,
        compensation_timeout=2,
        shield=True,
    )

    assert "one" == step.name
    assert (one, one, one) == (step.action, step.compensation, step.undo)
    assert (OSError,) == step.not_applied
    assert (1, 2, twice, None) == (
        step.timeout,
        step.compensation_timeout,
        step.retry,
        step.compensation_retry,
    )
    assert (True, False) == (step.shield, step.blocking)
    assert () == Step(one).not_applied
    assert () == Step(one, not_applied=None).not_applied


@pytest.mark.parametrize("seconds", [None, 0, 0.5, 3, float("inf")])
def test_accepted_timeouts(seconds):
    """Zero, fractions, infinity and None are all times that a step may have."""
    assert seconds == Step(one, one, timeout=seconds, compensation_timeout=seconds).timeout


@pytest.mark.parametrize(
    "options",
    [
        {"blocking": True, "compensation": sync_one},
        {"blocking": True, "compensation": one, "compensation_timeout": 3},
        {"blocking": True, "shield": True},
        {"blocking": True, "compensation": one, "undo": one, "compensation_timeout": 3},
    ],
)
def test_accepted_blocking(options):
    """Blocking goes with any compensation; an async one runs as always and may have a limit (G6)."""
    assert Step(sync_one, **options).blocking


async def test_a_class_may_be_an_action():
    """To call it makes the step's result; only sagas and steps are no actions."""

    class Ticket:
        @classmethod
        def issued(cls):
            return cls()

    async with open_saga() as scope:
        assert isinstance(await scope.step(Step(Ticket)), Ticket)
        assert isinstance(await scope.step(Step(Ticket.issued)), Ticket)


def test_bind_checks_its_arguments():
    """Binding arguments that a definition cannot take is a TypeError that names what cannot (G2)."""
    with pytest.raises(
        TypeError, match=r"<Step 'one'>\.bind\(\): the action of step 'one' cannot take"
    ):
        Step(one).bind()
    with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):
        Step(one).bind(1, z=2)
    with pytest.raises(TypeError, match="the action of step 'two' cannot take"):
        Parallel(Step(one), Step(two)).bind(1)
    with pytest.raises(TypeError, match="the action of step 'two' cannot take"):
        Saga([Parallel(Saga([Step(two)]))]).bind(1)

    @saga
    async def trip(scope, x): ...

    with pytest.raises(TypeError, match="the function of saga 'trip' cannot take these"):
        trip.bind()

    assert isinstance(trip.bind(1), Bound)
    assert isinstance(Saga([Step(two).bind(1, 2), Step(one), Commit()]).bind(1), Bound)
    assert isinstance(Commit().bind(1, 2), Bound)


def test_bind_checks_the_compensation_of_an_action_that_takes_anything():
    """An action with ``*args`` says nothing of its calls: each is checked against the compensation."""
    with pytest.raises(TypeError, match="the compensation of step 'any_call' cannot take"):
        Step(any_call, one).bind()
    with pytest.raises(TypeError, match="the compensation of step 'any_call' cannot take"):
        Step(any_call, one).bind(1, 2)
    assert (1,) == Step(any_call, one).bind(1).args


def test_bind_checks_names_for_the_compensation_too():
    """Keywords go to the action and to its compensation, so both must have the names."""
    step = Step(lambda x: None, lambda y: None)

    assert isinstance(step.bind(1), Bound)
    with pytest.raises(TypeError, match="the compensation of step '<lambda>' cannot take"):
        step.bind(x=1)
    # The same shape again, which was not remembered as good.
    with pytest.raises(TypeError, match="the compensation"):
        step.bind(x=1)
    assert isinstance(step.bind(2), Bound)


# --- how a step is taken back -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Sync, Async])
async def test_arguments_go_to_the_compensation_and_the_result_to_the_undo(kind):
    """A compensation gets what the action got, keywords included, and an undo what it returned (G3)."""
    action, compensation = kind("result"), kind()
    with pytest.raises(OSError):
        await fails_after(Step(action, compensation).bind(1, key=2)).run()
    assert [((1,), {"key": 2})] == compensation.calls

    action, compensation, undo = kind("result"), kind(), kind()
    with pytest.raises(OSError):
        await fails_after(Step(action, compensation, undo=undo).bind(1)).run()
    assert [(("result",), {})] == undo.calls
    assert [] == compensation.calls


async def test_step_in_doubt_is_compensated():
    """An action that raised may have had its effect: its compensation runs, its undo cannot (G3)."""
    compensation, undo = Sync(), Sync()
    step, error = await run_to_failure(
        Step(Sync(OSError("in doubt")), compensation, undo=undo), 1, error=OSError
    )

    assert [((1,), {})] == compensation.calls
    assert [] == undo.calls
    assert StepState.COMPENSATED is step.state
    assert error is step.error
    assert step.result is None


async def test_step_in_doubt_with_undo_alone_stays_unknown():
    """With an undo alone, a step in doubt stays UNKNOWN and is listed as in doubt (G3)."""
    undo = Sync()
    step, error = await run_to_failure(Step(Sync(OSError()), undo=undo), error=OSError)

    assert [] == undo.calls
    assert StepState.UNKNOWN is step.state
    assert (step,) == outcome_of(error).in_doubt


@pytest.mark.parametrize("shape", ["plain", "group", "keywords", "scope", "scope definition", "retry"])
@pytest.mark.parametrize("kind", [Sync, Async])
async def test_not_applied_is_not_compensated(shape, kind):
    """An action that raised a type of its `not_applied` did nothing and is not taken back (G3)."""
    compensation = Sync()
    options = {"retry": twice} if shape == "retry" else {}
    error = Declined()
    step = Step(kind(error, error), compensation, not_applied=(OSError, Declined), **options)
    if shape.startswith("scope"):

        @saga
        async def whole(scope: SagaScope):
            if shape == "scope":
                await scope.step(step.action, compensation=compensation, not_applied=Declined)
            await scope.step(step)
    else:
        whole = {
            "group": Saga([Parallel(step)]),
            "keywords": Saga([step.bind(key=1)]),
        }.get(shape, Saga([step]))

    with pytest.raises((Declined, ExceptionGroup)) as raised:
        await whole.run()

    assert [] == compensation.calls
    assert [StepState.NOT_APPLIED] == [step.state for step in outcome_of(raised.value).steps]
    assert SagaState.COMPENSATED is outcome_of(raised.value).state


async def test_other_failures_than_those_declared_are_in_doubt():
    """A failure that is not declared, and a subclass's sibling, leave the step in doubt (G3)."""
    compensation = Sync()
    step, _ = await run_to_failure(
        Step(Sync(KeyError()), compensation, not_applied=(Declined, IndexError)), error=KeyError
    )

    assert StepState.COMPENSATED is step.state
    assert 1 == len(compensation.calls)


@pytest.mark.parametrize("options", [{}, {"shield": True}])
@pytest.mark.parametrize("in_group", [False, True])
async def test_a_group_of_declared_failures_does_not_count(options, in_group):
    """An ExceptionGroup, even one of declared types, says nothing of what was not applied (G3)."""
    compensation = Sync()
    step = Step(
        Async(ExceptionGroup("both", [Declined(), Declined()])),
        compensation,
        not_applied=(Declined, ExceptionGroup),
        **options,
    )
    report, _ = await run_to_failure(Parallel(step) if in_group else step, error=ExceptionGroup)

    assert StepState.COMPENSATED is report.state
    assert 1 == len(compensation.calls)


# --- timeout ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"timeout": 60}, {"retry": twice}, {"shield": True}])
async def test_options_of_the_action_leave_its_arguments(options):
    """An action that is timed, retried or shielded gets just what it was given, keywords included."""
    action = Async()
    await Saga([Step(action, **options).bind(1, key=2)]).run()

    assert [((1,), {"key": 2})] == action.calls


async def test_own_timeout_is_never_not_applied():
    """A step that its own timeout cut off is in doubt, whatever it declares (G3)."""
    compensation = Sync()

    async def forever():
        await sleep_forever()

    step, error = await run_to_failure(
        Step(forever, compensation, timeout=0, not_applied=TimeoutError), error=TimeoutError
    )

    assert "step 'forever' did not end within 0 s" == str(error)
    assert error is step.error
    assert StepState.COMPENSATED is step.state
    assert [((), {})] == compensation.calls


async def test_step_that_timed_out_is_in_doubt():
    """A step that its timeout cut off is UNKNOWN: an undo alone cannot take it back (G3)."""
    undo = Sync()

    async def forever():
        await sleep_forever()

    step, _ = await run_to_failure(Step(forever, undo=undo, timeout=0), error=TimeoutError)

    assert StepState.UNKNOWN is step.state
    assert [] == undo.calls


async def test_attempt_that_times_out_after_one_that_succeeded():
    """An action that returned once stays completed, though a later attempt timed out (G3)."""
    undo = Sync()
    attempts = []

    async def slow_second():
        attempts.append(len(attempts))
        if len(attempts) == 2:
            await sleep_forever()
        return "result"

    async def once_more(attempt):
        await attempt()
        return await attempt()

    step, error = await run_to_failure(
        Step(slow_second, undo=undo, timeout=0.01, retry=once_more), error=TimeoutError
    )

    assert [(("result",), {})] == undo.calls
    assert error is step.error


async def test_timeout_of_the_action_itself_may_be_declared():
    """A TimeoutError that the action raises itself is one like any other (G3)."""
    step, _ = await run_to_failure(
        Step(Async(TimeoutError()), Sync(), timeout=60, not_applied=TimeoutError), error=TimeoutError
    )

    assert StepState.NOT_APPLIED is step.state


async def test_timeout_of_an_action_that_ends_in_time():
    """A step that ends within its timeout gives its result."""
    outcome = await Saga([Step(Async("result"), timeout=60)]).run()

    assert ["result"] == [step.result for step in outcome.steps]


async def test_timeout_is_for_each_attempt():
    """A retry after a timeout has the whole timeout again; the step is then completed."""
    attempts = []

    async def slow_first():
        attempts.append(len(attempts))
        if len(attempts) == 1:
            await sleep_forever()
        return "result"

    async def retry_at_once(attempt):
        with contextlib.suppress(TimeoutError):
            return await attempt()
        return await attempt()

    outcome = await Saga([Step(slow_first, timeout=0.01, retry=retry_at_once)]).run()

    assert [0, 1] == attempts
    assert [(StepState.COMPLETED, "result", None)] == [
        (step.state, step.result, step.error) for step in outcome.steps
    ]


async def test_cancellation_is_no_timeout():
    """A cancellation from outside goes on as such, whatever the step's timeout and retry."""
    compensation = Sync()
    with CancelScope() as scope:

        async def cancelled_in_it():
            scope.cancel()
            await sleep_forever()

        await Saga([Step(cancelled_in_it, compensation, timeout=60, retry=twice)]).run()

    assert scope.cancelled_caught
    assert 1 == len(compensation.calls)


# --- retry ------------------------------------------------------------------------------------------

RETRIERS = [
    pytest.param(
        stamina.AsyncRetryingCaller(attempts=3, wait_initial=0, wait_jitter=0).on(OSError), id="stamina"
    ),
    pytest.param(
        tenacity.AsyncRetrying(
            reraise=True,
            stop=tenacity.stop_after_attempt(3),
            retry=tenacity.retry_if_exception_type(OSError),
        ),
        id="tenacity",
    ),
]


@pytest.mark.parametrize("retry", RETRIERS)
@pytest.mark.parametrize("kind", [Sync, Async])
async def test_retry_by_others(retry, kind):
    """Stamina's and tenacity's async retriers repeat sync and async actions and compensations."""
    action = kind(OSError(1), OSError(2), "result")
    back = kind(OSError(3), OSError(4), None)
    saga = fails_after(Step(action, back, retry=retry, compensation_retry=retry), KeyError)
    with pytest.raises(KeyError) as raised:
        await saga.run(7)

    report = outcome_of(raised.value).steps[0]
    assert 3 * [((7,), {})] == action.calls
    assert 3 * [((7,), {})] == back.calls
    assert ("result", None, None) == (report.result, report.error, report.compensation_error)
    assert StepState.COMPENSATED is report.state


@pytest.mark.parametrize("retry", RETRIERS)
async def test_retry_that_gives_up(retry):
    """When every attempt failed, the last failure is the step's, and it is in doubt."""
    errors = OSError(1), OSError(2), OSError(3)
    compensation = Sync()
    step, error = await run_to_failure(Step(Sync(*errors), compensation, retry=retry), error=OSError)

    assert errors[2] is error
    assert error is step.error
    assert 1 == len(compensation.calls)


@pytest.mark.parametrize("retry", RETRIERS)
async def test_compensation_retry_that_gives_up(retry):
    """A compensation whose every attempt failed has failed, once."""
    errors = OSError(1), OSError(2), OSError(3)
    back = Sync(*errors)
    with pytest.raises(CompensationFailed) as raised:
        await fails_after(Step(Sync(), undo=back, compensation_retry=retry), KeyError).run()

    assert 3 == len(back.calls)
    assert (errors[2],) == raised.value.failures


@pytest.mark.parametrize(
    ("results", "state"),
    [
        ([Declined(), Declined()], StepState.NOT_APPLIED),
        ([Declined(), OSError()], StepState.COMPENSATED),
        ([OSError(), Declined()], StepState.COMPENSATED),
        ([OSError(), OSError()], StepState.COMPENSATED),
    ],
)
@pytest.mark.parametrize("options", [{}, {"shield": True}, {"timeout": 60}])
async def test_not_applied_in_every_attempt(results, state, options):
    """With a retry, nothing was done only if every attempt says so; the order does not matter (G3)."""
    compensation = Sync()
    step, error = await run_to_failure(
        Step(Async(*results), compensation, retry=twice, not_applied=Declined, **options),
        error=type(results[1]),
    )

    assert state is step.state
    assert results[1] is error
    assert (0 if state is StepState.NOT_APPLIED else 1) == len(compensation.calls)


@pytest.mark.parametrize("results", [[Declined(), "result"], [OSError(), "result"]])
async def test_attempt_that_succeeds_after_others(results):
    """A step of which one attempt succeeded is completed, whatever went before (G3)."""
    outcome = await Saga([Step(Sync(*results), retry=twice, not_applied=Declined)]).run()

    assert [(StepState.COMPLETED, "result", None)] == [
        (step.state, step.result, step.error) for step in outcome.steps
    ]


async def test_attempt_that_fails_after_one_that_succeeded():
    """An action that returned once stays completed, though a later attempt of it failed (G3)."""
    undo = Sync()

    async def once_more(attempt):
        await attempt()
        return await attempt()

    step, _ = await run_to_failure(
        Step(Sync("result", Declined()), undo=undo, retry=once_more, not_applied=Declined),
        error=Declined,
    )

    assert [(("result",), {})] == undo.calls
    assert StepState.COMPENSATED is step.state


async def test_retry_that_answers_in_the_action_s_place():
    """What a retrier returns without an attempt is the step's result, and what its undo gets."""

    async def cached(attempt):
        return "cached"

    action, undo = Async(), Sync()
    with pytest.raises(KeyError) as raised:
        await fails_after(Step(action, undo=undo, retry=cached), KeyError).run()

    assert [] == action.calls
    assert [(("cached",), {})] == undo.calls
    assert "cached" == outcome_of(raised.value).steps[0].result


@pytest.mark.parametrize(
    ("error", "state", "compensated"),
    [(OSError(), StepState.UNKNOWN, 1), (Declined(), StepState.NOT_APPLIED, 0)],
)
async def test_retry_that_answers_for_a_failed_action(error, state, compensated):
    """A value that a retrier gives when an attempt failed changes nothing of what happened (G3, G13)."""

    async def fallback(attempt):
        with contextlib.suppress(Exception):
            await attempt()
        return "fallback"

    compensation = Sync()
    step = Step(Async(error), compensation, retry=fallback, not_applied=Declined)
    async with open_saga() as scope:
        assert "fallback" == await scope.step(step)

    (report,) = scope.outcome.steps
    assert (state, error, None) == (report.state, report.error, report.result)
    await scope.outcome.rollback()
    assert compensated == len(compensation.calls)


async def test_retry_that_overlaps_its_attempts():
    """A retrier that begins an attempt while another one runs is told that it cannot (hedging)."""
    begun, refused = Event(), Event()
    compensation = Sync()

    async def act():
        begun.set()
        await refused.wait()
        return "result"

    async def hedge(attempt):
        results = []

        async def first():
            results.append(await attempt())

        async with create_task_group() as tasks:
            tasks.start_soon(first)
            await begun.wait()
            with pytest.raises(SagaDefinitionError, match="step 'act': an attempt was begun while"):
                await attempt()
            refused.set()
        return results[0]

    outcome = await Saga([Step(act, compensation, retry=hedge)]).run()

    assert [(StepState.COMPLETED, "result")] == [(step.state, step.result) for step in outcome.steps]


async def test_circuit_breaker_that_does_not_call():
    """A retrier that raises without calling leaves the step NOT_STARTED: there is nothing to undo."""

    async def open_circuit(attempt):
        raise Declined

    action, compensation = Async(), Sync()
    step, _ = await run_to_failure(Step(action, compensation, retry=open_circuit), error=Declined)

    assert StepState.NOT_STARTED is step.state
    assert [] == action.calls == compensation.calls


@pytest.mark.parametrize("retry", [partial(twice), *[parameter.values[0] for parameter in RETRIERS]])
def test_accepted_retriers(retry):
    """Any async callable that takes one function will do as a retrier, partials and objects too."""
    assert retry is Step(one, one, retry=retry, compensation_retry=retry).retry


# --- compensations with options ---------------------------------------------------------------------


async def test_compensation_timeout():
    """A compensation that does not end within its time has failed, and others still run (G10)."""

    async def forever(*args):
        await sleep_forever()

    first = Sync()
    with pytest.raises(CompensationFailed) as raised:
        await Saga(
            [
                Step(Sync(), first),
                Step(Sync(), forever, compensation_timeout=0, name="stuck"),
                Step(Sync(OSError())),
            ]
        ).run()

    (failure,) = raised.value.failures
    assert isinstance(failure, TimeoutError)
    assert "taking back step 'stuck' did not end within 0 s" == str(failure)
    assert 1 == len(first.calls)
    assert [StepState.COMPENSATED, StepState.COMPENSATION_FAILED, StepState.UNKNOWN] == [
        step.state for step in raised.value.outcome.steps
    ]


async def test_compensation_timeout_is_for_each_attempt():
    """With a retry, each attempt at a compensation has the whole timeout (G10)."""
    attempts = []

    async def slow_first(x):
        attempts.append(x)
        if len(attempts) == 1:
            await sleep_forever()

    with pytest.raises(KeyError) as raised:
        await fails_after(
            Step(Sync("result"), slow_first, compensation_timeout=0.01, compensation_retry=twice),
            KeyError,
        ).run(3)

    assert [3, 3] == attempts
    assert StepState.COMPENSATED is outcome_of(raised.value).steps[0].state


@pytest.mark.parametrize("options", [{"compensation_timeout": 60}, {"compensation_retry": twice}])
async def test_options_of_the_compensation_leave_its_arguments(options):
    """A compensation that is timed or retried gets just what the action got, keywords included (G3)."""
    back = Async()
    await run_to_failure(Step(Sync(OSError()), back, **options).bind(1, key=2))

    assert {"key": 2} == back.calls[0][1]
    assert all(call == ((1,), {"key": 2}) for call in back.calls)


async def test_options_of_the_compensation_are_the_undo_s_too():
    """An undo is retried and timed out as a compensation is."""
    undo = Async(OSError(), None)
    with pytest.raises(KeyError):
        await fails_after(
            Step(Sync("result"), undo=undo, compensation_timeout=60, compensation_retry=twice), KeyError
        ).run()

    assert 2 * [(("result",), {})] == undo.calls


# --- shield and blocking ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"retry": twice}, {"timeout": 60}])
async def test_shield_lets_the_action_end(options):
    """A shielded action that is cancelled runs to its end and is undone with its result (G6)."""
    undo = Sync()
    with CancelScope() as scope:

        async def cancelled_in_it():
            scope.cancel()
            await checkpoint()
            return "result"

        await Saga([Step(cancelled_in_it, undo=undo, shield=True, **options)]).run()

    assert scope.cancelled_caught
    assert [(("result",), {})] == undo.calls


async def test_shield_is_around_the_retries():
    """All attempts of a shielded step happen, though it is cancelled in the first one (G6)."""
    undo = Sync()
    attempts = []
    with CancelScope() as scope:

        async def cancelled_in_it():
            attempts.append(len(attempts))
            scope.cancel()
            await checkpoint()
            if len(attempts) == 1:
                raise OSError
            return "result"

        await Saga([Step(cancelled_in_it, undo=undo, shield=True, retry=twice)]).run()

    assert [0, 1] == attempts
    assert [(("result",), {})] == undo.calls


@pytest.mark.parametrize(
    ("error", "states"),
    [(OSError(), [StepState.COMPENSATED]), (Declined(), [StepState.NOT_APPLIED])],
)
async def test_shield_and_a_failing_action(error, states):
    """A shielded action's failure is the step's, untouched (G5)."""
    step, raised = await run_to_failure(
        Step(Async(error), Sync(), shield=True, not_applied=Declined), error=type(error)
    )

    assert error is raised
    assert states == [step.state]


@pytest.mark.parametrize("order", [KeyboardInterrupt, SystemExit])
async def test_shield_and_an_action_that_quits(order):
    """An order to quit goes over the cancellation that waited for the shielded action (G8)."""
    with pytest.raises(order), CancelScope() as scope:

        async def quits():
            scope.cancel()
            raise order

        await Saga([Step(quits, shield=True)]).run()


async def test_shield_has_a_timeout_of_its_own():
    """A shielded step's own timeout still ends it."""

    async def forever():
        await sleep_forever()

    _, error = await run_to_failure(Step(forever, shield=True, timeout=0), error=TimeoutError)

    assert "step 'forever' did not end within 0 s" == str(error)


@pytest.mark.parametrize(
    "options", [{"shield": True}, {"blocking": True}, {}], ids=["shield", "blocking", "inline"]
)
async def test_cancellation_delivered_before_the_action(options):
    """A cancellation that was delivered before a step is noticed before its action begins (G6)."""
    action = (Async if "shield" in options else Sync)()
    with CancelScope() as scope:
        scope.cancel()
        await Saga([Step(action, Sync(), **options)]).run()

    assert scope.cancelled_caught
    assert [] == action.calls


async def test_blocking_runs_in_a_worker_thread():
    """A blocking action and its sync ways back run in worker threads (G6)."""
    here = threading.get_ident()
    action, compensation, undo = Sync("result"), Sync(), Sync()
    with pytest.raises(KeyError):
        await Saga(
            [
                Step(action, undo=undo, blocking=True).bind(1, key=2),
                Step(Sync(OSError()), compensation, blocking=True, retry=skip).bind(3, key=4),
                Step(Sync(KeyError())),
            ]
        ).run()

    assert [((1,), {"key": 2})] == action.calls
    assert [(("result",), {})] == undo.calls
    assert here not in action.threads + undo.threads


async def skip(attempt):
    with contextlib.suppress(OSError):
        await attempt()


async def test_blocking_compensation_gets_the_arguments_in_a_thread():
    """A blocking step in doubt is compensated in a worker thread, keywords included (G3, G6)."""
    here = threading.get_ident()
    compensation = Sync()
    step, _ = await run_to_failure(
        Step(Sync(OSError()), compensation, blocking=True).bind(3, key=4), error=OSError
    )

    assert StepState.COMPENSATED is step.state
    assert [((3,), {"key": 4})] == compensation.calls
    assert here not in compensation.threads


async def test_blocking_with_an_async_compensation():
    """An async compensation of a blocking step runs on the loop, within its time (G6, G10)."""
    here = threading.get_ident()
    undo = Async()
    with pytest.raises(KeyError):
        await fails_after(
            Step(Sync("result"), undo=undo, blocking=True, compensation_timeout=60), KeyError
        ).run()

    assert [(("result",), {})] == undo.calls
    assert [here] == undo.threads


async def test_blocking_action_is_waited_for():
    """A blocking action that is cancelled is waited for, and undone with its result (G6)."""
    undo = Sync()
    with CancelScope() as scope:

        def cancelled_in_it():
            from_thread.run_sync(scope.cancel)
            return "result"

        await Saga([Step(cancelled_in_it, undo=undo, blocking=True)]).run()

    assert scope.cancelled_caught
    assert [(("result",), {})] == undo.calls


async def test_blocking_retries():
    """A blocking action and its compensation are retried, in threads (G6)."""
    action, undo = Sync(OSError(), "result"), Sync(OSError(), None)
    with pytest.raises(KeyError) as raised:
        await fails_after(
            Step(action, undo=undo, blocking=True, retry=twice, compensation_retry=twice), KeyError
        ).run()

    assert 2 == len(action.calls)
    assert 2 * [(("result",), {})] == undo.calls
    assert StepState.COMPENSATED is outcome_of(raised.value).steps[0].state


async def test_g6_blocking_steps_give_back_their_thread():
    """With one worker thread for all, blocking steps run one after the other, and give it back (G6)."""
    threads = to_thread.current_default_thread_limiter()
    usual, threads.total_tokens = threads.total_tokens, 1
    action = Sync()
    try:
        with fail_after(2):
            await Saga(3 * [Step(action, blocking=True)]).run()
    finally:
        threads.total_tokens = usual

    assert 3 == len(action.calls)
    assert 0 == threads.borrowed_tokens


async def test_g6_the_way_back_waits_for_no_thread_of_the_way_forward():
    """A blocking undo runs though every worker thread of the way forward is taken (G6)."""
    threads = to_thread.current_default_thread_limiter()
    undo = Sync()
    takers = []

    async def takes_all_threads():
        takers.extend(object() for _ in range(int(threads.available_tokens)))
        for taker in takers:
            threads.acquire_on_behalf_of_nowait(taker)
        raise KeyError

    try:
        with fail_after(2), pytest.raises(KeyError):
            await Saga([Step(Sync("result"), undo=undo, blocking=True), Step(takes_all_threads)]).run()
    finally:
        for taker in takers:
            threads.release_on_behalf_of(taker)

    assert [(("result",), {})] == undo.calls


async def test_ways_back_share_their_threads():
    """However many sagas go back at once, they have as many threads as the way forward, and no more."""
    threads = to_thread.current_default_thread_limiter()
    assert _threads_back() is _threads_back()
    assert threads.total_tokens == _threads_back().total_tokens
    assert threads is not _threads_back()


@pytest.mark.parametrize("make", [any_call_async, lambda: Awaitable()])
async def test_blocking_function_that_returns_an_awaitable(make):
    """A blocking function that turns out to be async is told so, and its coroutine is closed."""
    made = make()
    _, error = await run_to_failure(Step(lambda: made, blocking=True, name="late"), error=TypeError)

    assert str(error).startswith("step 'late' has blocking=True, but '<lambda>' returned an awaitable")
    assert getattr(made, "cr_frame", None) is None


async def test_blocking_undo_that_returns_an_awaitable():
    """The same on the way back: the failure names the step and the function."""
    failing = fails_after(Step(Sync(), undo=lambda _: any_call_async(), blocking=True, name="late"))
    with pytest.raises(CompensationFailed, match="step 'late' has blocking=True, but '<lambda>'"):
        await failing.run()


# --- groups: what only their definition decides ------------------------------------------------------


async def test_an_empty_group_is_an_empty_tuple():
    """A group of no members, with or without a limit, gives an empty tuple."""
    async with open_saga() as scope:
        assert () == await scope.parallel()
        assert () == await scope.parallel(limit=3)
        assert () == await scope.step(Parallel())
    await Saga([Parallel(), Parallel(limit=1)]).run()


@pytest.mark.parametrize("limit", [None, 1, 2, 3, 10])
async def test_a_group_gives_its_members_values_in_their_order(limit):
    """A group's value is the tuple of its members' values, whatever ended first (G1)."""
    last = Event()

    async def wait_for_last(x):
        if limit is None or limit > 2:
            await last.wait()
        return x

    async def be_last(x):
        last.set()
        return x

    async with open_saga() as scope:
        values = await scope.parallel(
            Step(wait_for_last).bind(1),
            Step(Sync(2)),
            Step(be_last).bind(x=3),
            limit=limit,
        )

    assert (1, 2, 3) == values


async def test_definitions_run_many_times_at_once():
    """One definition runs many times, also at the same time, and the runs know nothing of each other."""
    meet = Event()
    outcomes = {}

    async def wait(x):
        if x == 2:
            meet.set()
        await meet.wait()
        if x == 2:
            raise Declined
        return x

    trip = Saga([Step(wait), Parallel(Step(Sync("member")))], exceptions=Declined)

    async def run(x):
        outcomes[x] = await trip.run(x)

    async with create_task_group() as tasks:
        for x in range(3):
            tasks.start_soon(run, x)

    assert [SagaState.COMPLETED, SagaState.COMPLETED, SagaState.COMPENSATED] == [
        outcomes[x].state for x in range(3)
    ]
    assert [0, 1, None] == [outcomes[x].steps[0].result for x in range(3)]


async def test_what_would_be_an_independent_run_is_no_step():
    """A saga's own call, or its class, as an action would be a run that nothing takes back."""
    inner = Saga([], name="inner")
    for action in (inner, inner.run, Commit, Saga):
        with pytest.raises(SagaDefinitionError, match="would be an independent run"):
            Step(action)
    async with open_saga() as scope:
        with pytest.raises(SagaDefinitionError, match="would be an independent run"):
            await scope.step(inner.run)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Commit, r"; write Commit\(\.\.\.\)"),
        (int, "not <class 'int'>$"),
        ((one, one), r"; write Step\(action, compensation\) for one step"),
        ([Step(one)], "members for several parts"),
        (one, r"; write Step\(one\)"),
    ],
)
def test_what_to_write_instead_of_what_is_no_part(part, message):
    """What is no part of a saga is refused with what was probably meant."""
    with pytest.raises(SagaDefinitionError, match=message):
        Saga([part])


def test_a_coroutine_is_no_part():
    """A coroutine in the place of a step is closed, and the message says what to write."""
    with pytest.raises(SagaDefinitionError, match=r"called already: write Step\(one\)\.bind"):
        Saga([one(1)])
