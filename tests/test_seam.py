"""What a journal or an engine needs of the core: the step in hand, and running on behalf of others."""

from __future__ import annotations

import pytest
from helpers import Boom

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
    Step,
    StepState,
    observer,
    outcome_of,
    saga,
)

pytestmark = pytest.mark.anyio


# --- the step in hand -----------------------------------------------------------------------------


async def test_the_definition_of_what_holds_steps_can_be_seen():
    """A middleware, an observer too, sees the group and the saga that an effect carries out."""
    seen: dict[tuple[str, tuple[int, ...]], object] = {}

    @observer
    async def look(effect: Effect, call_next: CallNext) -> None:
        seen[effect.kind, effect.path] = call_next.definition
        await call_next()

    inner = Saga([Step(len)], name="inner")
    group = Parallel(inner, limit=1)
    whole = Saga([group, Commit()], middleware=[look])
    await whole.run("")

    assert {
        ("saga", ()): whole,
        ("group", (0,)): group,
        ("saga", (0, 0)): inner,
        ("action", (0, 0, 0)): None,
        ("commit", (1,)): None,
    } == seen


async def test_the_step_in_hand_says_how_far_it_has_come():
    """A middleware sees the step of an action and of its compensation: function, arguments, state, result."""
    seen: list[tuple[object, ...]] = []

    async def charge(amount: int, *, currency: str) -> str:
        return f"{amount} {currency}"

    async def refund(amount: int, *, currency: str) -> None:
        raise Boom

    async def look(effect: Effect, call_next: CallNext) -> object:
        step = call_next.step
        if step is None:
            return await call_next()
        before = step.state
        try:
            return await call_next()
        finally:
            seen.append((effect.kind, step.action, step.args, dict(step.kwargs), before, step.state))
            assert "3 euros" == step.result

    part = Step(charge, refund).bind(3, currency="euros")
    outcome = await Saga([part], middleware=[look]).run()
    with pytest.raises(CompensationFailed):
        await outcome.rollback()

    call = (charge, (3,), {"currency": "euros"})
    assert [
        ("action", *call, StepState.NOT_STARTED, StepState.COMPLETED),
        ("compensation", *call, StepState.COMPLETED, StepState.COMPENSATION_FAILED),
    ] == seen


async def test_only_steps_are_in_hand():
    """For a saga, a group, a rollback and a commit there is no step; for `on_rollback` it is the function."""
    seen: dict[str, object] = {}

    def clean_up() -> None:
        pass

    async def look(effect: Effect, call_next: CallNext) -> object:
        step = call_next.step
        seen[effect.kind, effect.path] = None if step is None else step.action
        return await call_next()

    @saga(middleware=[look])
    async def function(scope: SagaScope) -> None:
        await scope.commit()
        scope.on_rollback(clean_up)
        await scope.parallel(Step(clean_up).bind())
        raise Boom

    with pytest.raises(Boom):
        await function()

    assert {
        ("saga", ()): None,
        ("commit", (0,)): None,
        ("group", (2,)): None,
        ("action", (2, 0)): clean_up,
        ("rollback", ()): None,
        ("compensation", (1,)): clean_up,
    } == seen


@pytest.mark.parametrize("through_observer", [False, True])
@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (StepState.COMPLETED, ["undo 7"]),
        (StepState.UNKNOWN, ["compensate 1"]),
        (StepState.NOT_APPLIED, []),
        (StepState.NOT_STARTED, []),
    ],
)
async def test_a_step_is_taken_back_by_what_is_recalled_of_it(state, expected, through_observer):
    """G3: an action that ran in another process is undone, compensated or let be, as it is recalled."""
    done: list[str] = []
    boom = Boom()

    async def act(number: int) -> int:
        raise AssertionError  # pragma: no cover - it is recalled, or not started

    async def remember(effect: Effect, call_next: CallNext) -> object:
        if effect.kind == "action":
            assert call_next.step is not None
            call_next.step.recall(state, result=7, error=boom)
            raise boom
        return await call_next()

    @observer
    async def watch(effect: Effect, call_next: CallNext) -> object:
        assert (call_next.step is None) == (effect.kind not in ("action", "compensation"))
        return await call_next()

    step = Step(
        act,
        lambda number: done.append(f"compensate {number}"),
        undo=lambda result: done.append(f"undo {result}"),
    )
    middleware = [watch, remember] if through_observer else [remember]
    with pytest.raises(Boom) as caught:
        await Saga([step], middleware=middleware)(1)

    assert boom is caught.value
    assert expected == done
    outcome = outcome_of(boom)
    assert outcome is not None
    (report,) = outcome.steps
    assert boom is report.error


# --- running on behalf of others ------------------------------------------------------------------


async def test_run_with_runs_under_a_name_and_through_an_outer_middleware():
    """A journal or an engine gives a run its id, and stands around the saga's own middleware."""
    seen: list[tuple[str, str]] = []

    def note(name: str):
        async def middleware(effect: Effect, call_next: CallNext) -> object:
            seen.append((name, effect.run_id))
            return await call_next()

        return middleware

    @saga(middleware=[note("inner")])
    async def double(scope: SagaScope, number: int, *, times: int) -> int:
        return number * times

    outcome = await double.run_with((3,), {"times": 2}, run_id="order-42", middleware=[note("outer")])

    assert 6 == outcome.value
    assert "order-42" == outcome.run_id
    assert [("outer", "order-42"), ("inner", "order-42")] == seen


async def test_run_with_expects_what_the_saga_and_the_caller_expect():
    """`exceptions=` of a saga, and of the call, are honoured as `run` honours them."""

    @saga(exceptions=KeyError)
    async def fails(scope: SagaScope, error: Exception) -> None:
        raise error

    assert SagaState.COMPENSATED is (await fails.run_with((KeyError(),))).state
    assert SagaState.COMPENSATED is (await fails.run_with((OSError(),), exceptions=OSError)).state
    with pytest.raises(OSError):
        await fails.run_with((OSError(),))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"run_id": ""}, "run_id must be a non-empty string"),
        ({"run_id": 42}, "run_id must be a non-empty string"),
        ({"middleware": print}, "middleware must be a list"),
        ({"exceptions": "Boom"}, "exceptions must be an exception type"),
    ],
    ids=["empty", "number", "function", "string"],
)
async def test_run_with_refuses_what_cannot_work(options, words):
    """The message says of which call, and nothing has run."""
    with pytest.raises(SagaDefinitionError, match=f"^<Saga 'trip'>.run_with: {words}"):
        await Saga([Step(print)], name="trip").run_with((), **options)


async def test_run_with_checks_the_arguments():
    """As `run` does."""
    with pytest.raises(TypeError, match=r"^<Saga 'trip'>.run_with\(1, 2\): "):
        await Saga([Step(lambda one: None, name="one")], name="trip").run_with((1, 2))


@pytest.mark.parametrize("version", ["", 2], ids=["empty", "number"])
def test_a_version_is_a_string(version):
    """Whatever kind of saga it is, and before anything has run."""

    async def function(scope: SagaScope) -> None: ...

    for build in (
        lambda: Saga([], version=version),
        lambda: saga(version=version),
        lambda: saga(version=version)(function),
        lambda: SagaBuilder.create(version=version),
    ):
        with pytest.raises(SagaDefinitionError, match="^@?[Ss]aga: version must be a non-empty string"):
            build()


def test_a_saga_has_its_version():
    """For a journal, which refuses to go on with a run of another one."""

    @saga(version="2")
    async def function(scope: SagaScope) -> None: ...

    assert ["2", "3", "4", None] == [
        function.version,
        Saga([], version="3").version,
        SagaBuilder.create(version="4").build().version,
        Saga([]).version,
    ]


async def test_the_keys_of_a_run_that_is_carried_on_are_others():
    """Where a run is carried on from its commit its effects have keys of their own."""
    keys: list[str] = []

    async def note(effect: Effect, call_next: CallNext) -> object:
        keys.append(effect.key)
        return await call_next()

    whole = Saga([Step(lambda: None, name="a")], name="s", middleware=[note])
    await whole.run_with(run_id="r")
    await whole.run_with(run_id="r", carried_on=2)

    assert ["r//saga", "r/0/action", "r~2//saga", "r~2/0/action"] == keys
