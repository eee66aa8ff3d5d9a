"""Drawn sagas, drawn faults: the engine does what the model says, on every loop.

The profile is "default" (the same examples each time), or what ``PYSAGAS_PROFILE`` says: "deep"
draws new ones, ``PYSAGAS_EXAMPLES`` of them for each test and loop.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import anyio
import pytest
from conftest import BACKENDS
from hypothesis import HealthCheck, example, given, settings
from model import (
    Commit,
    Event,
    Fault,
    Par,
    Part,
    Reading,
    Seq,
    Step,
    group_name,
    holds_group,
    paths,
    predict,
    script,
    steps_of,
)
from strategies import Trial, safe_trials, trials

import pysagas
from pysagas import CompensationFailed, Outcome, Parallel, Saga, SagaState, StepState, outcome_of

PROFILES = {
    "default": settings(
        max_examples=200,
        deadline=None,
        derandomize=True,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    ),
    "deep": settings(
        max_examples=int(os.environ.get("PYSAGAS_EXAMPLES", "2000")),
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    ),
}
NAME = os.environ.get("PYSAGAS_PROFILE", "default")
PROFILE = PROFILES[NAME]

pytestmark = [
    pytest.mark.timeout({"default": 120, "deep": 0}[NAME]),
    pytest.mark.parametrize("backend", BACKENDS),
]

PAYLOAD = ("payload",)


class Boom(Exception):
    """A failure."""


class Declined(Exception):
    """A failure by which an action says that it did nothing."""


class Quit(KeyboardInterrupt):
    """An order to quit."""


KINDS: dict[str, type[BaseException]] = {"fail": Boom, "decline": Declined, "quit": Quit}
HOW = {Boom: "failed", Declined: "declined", Quit: "quit"}


class World:
    """What the steps of one trial change, and all that was seen of it."""

    def __init__(self, trial: Trial, backend: tuple[str, dict[str, Any]]) -> None:
        self.backend, self.options = backend
        self.trial = trial
        # Only asyncio has native cancellation; elsewhere a scope does it.
        self.plan = tuple(
            fault._replace(kind="scope")
            if fault.kind in {"native", "native twice"} and self.backend != "asyncio"
            else fault
            for fault in trial.plan
        )
        self.cells: set[tuple[str, str]] = set()
        self.events: list[Event] = []
        # What each action and each way back was called with, and what it raised.
        self.calls: dict[tuple[str, str], tuple[Any, ...]] = {}
        self.raised: dict[tuple[str, str], BaseException] = {}
        # What the caller got: the last outcome, or the exception; and what went past its scope.
        self.outcome: Outcome[Any] | None = None
        self.error: BaseException | None = None
        self.left: BaseException | None = None
        # The outcome of a run that succeeded, and then was taken back.
        self.before: Outcome[Any] | None = None
        self.cancel: dict[str, Any] = {}

    def run(self) -> World:
        anyio.run(self._main, backend=self.backend, backend_options=self.options)
        return self

    async def _main(self) -> None:
        self.cancelled_class = anyio.get_cancelled_exc_class()
        try:
            with anyio.CancelScope() as scope:
                self.cancel["scope"] = self.cancel["native"] = scope.cancel
                if self.backend == "asyncio":
                    task = asyncio.current_task()
                    assert task is not None
                    self.cancel["native"] = task.cancel
                try:
                    await self._call()
                except BaseException as error:
                    self.error = error
                    raise
        except BaseException as error:
            self.left = error

    async def _call(self) -> None:
        trial = self.trial
        expected: Any = tuple(KINDS[kind] for kind in trial.expected)
        watching = [watch] if trial.watched else []
        root: Any = (
            self._function(trial.tree, watching)
            if trial.functions
            else self._data(trial.tree, watching)
        )
        self.outcome = await root.run(*PAYLOAD, exceptions=expected)
        if trial.later and self.outcome.state is SagaState.COMPLETED:
            if Commit() in trial.tree.parts:
                with pytest.raises(pysagas.AlreadyCommitted):
                    await self.outcome.rollback()
            else:
                self.before = before = self.outcome
                self.outcome = await before.rollback()
                assert self.outcome is await before.rollback()

    # The tree as data.

    def _data(self, part: Part, middleware: Any = ()) -> Any:
        if isinstance(part, Seq):
            return Saga(
                map(self._data, part.parts),
                name="tested",
                on_compensation_failure="stop" if part.stop else "continue",
                middleware=middleware,
            )
        if isinstance(part, Par):
            return Parallel(*map(self._data, part.members), **group_options(part))
        if isinstance(part, Commit):
            return pysagas.Commit()
        return self._step(part)

    def _step(self, step: Step) -> Any:
        definition = pysagas.Step(
            self._callable(step, "action"), self._back(step, "compensate"), **self._options(step)
        )
        args, kwargs = arguments(step)
        return definition if step.arguments == "run" else definition.bind(*args, **kwargs)

    def _options(self, step: Step) -> dict[str, Any]:
        options: dict[str, Any] = {"undo": self._back(step, "undo")}
        if step.not_applied:
            options["not_applied"] = Declined
        if step.style == "shield":
            options["shield"] = True
        return options

    # The tree as functions.

    def _function(self, seq: Seq, middleware: Any = ()) -> Any:
        @pysagas.saga(
            name="tested",
            on_compensation_failure="stop" if seq.stop else "continue",
            middleware=middleware,
        )
        async def function(scope: pysagas.SagaScope, *args: Any) -> object:
            assert args == PAYLOAD
            await self._calls(scope, seq)
            return value(seq)

        return function

    async def _calls(self, scope: pysagas.SagaScope, seq: Seq) -> None:
        for part in seq.parts:
            if isinstance(part, Commit):
                await scope.commit()
                continue
            try:
                result = await self._call_part(scope, part)
            except CompensationFailed:
                with pytest.raises(pysagas.ScopeClosed):
                    await scope.step(result_of, part)
                raise
            except (Boom, Declined, ExceptionGroup):
                if not part.catch:
                    raise
            else:
                assert result == value(part)

    async def _call_part(self, scope: pysagas.SagaScope, part: Part) -> object:
        if isinstance(part, Step):
            if part.arguments != "run":
                return await scope.step(self._step(part))
            return await scope.step(
                self._callable(part, "action"),
                *PAYLOAD,
                compensation=self._back(part, "compensate"),
                **self._options(part),
            )
        if isinstance(part, Par):
            return await scope.parallel(*map(self._member, part.members), **group_options(part))
        assert isinstance(part, Seq)
        if part.nested:
            async with scope.nested() as inner:
                await self._calls(inner, part)
            return value(part)
        return await scope.step(self._function(part), *PAYLOAD)

    def _member(self, part: Part) -> Any:
        if isinstance(part, Step):
            step = self._step(part)
            return step.bind(*PAYLOAD) if part.arguments == "run" else step
        if isinstance(part, Par):
            return Parallel(*map(self._member, part.members), **group_options(part)).bind()
        assert isinstance(part, Seq)
        return self._function(part).bind(*PAYLOAD)

    # What the steps do.

    def _back(self, step: Step, way: str) -> Any:
        return (
            self._callable(step, way)
            if getattr(step, {"undo": "undo", "compensate": "compensation"}[way])
            else None
        )

    def _callable(self, step: Step, way: str) -> Any:
        """Makes an action or a way back; each has its step's name, so that the step has it too."""
        if step.style == "sync" and (way == "action" or step.back_pace == (0, 0)):

            def function(*args: Any, **kwargs: Any) -> object:
                begun = self._begin(step, way, args, kwargs)
                assert list(begun) == []
                return result_of(step)
        else:

            async def function(*args: Any, **kwargs: Any) -> object:
                for _ in (moves := self._begin(step, way, args, kwargs)):
                    try:
                        await anyio.lowlevel.checkpoint()
                    except BaseException as error:
                        moves.throw(error)
                return result_of(step)

        function.__name__ = step.name
        return function

    def _begin(self, step: Step, way: str, args: Any, kwargs: Any) -> Iterator[None]:
        """Goes through a step's script, and writes down what happens; yields at a checkpoint."""
        phase = "action" if way == "action" else "back"
        self._saw("start" if way == "action" else way, step)
        self.calls[step.name, phase] = (way, args, kwargs)
        try:
            for move in script(step, phase):
                faults = [
                    fault for fault in self.plan if fault[:2] == (step.name, phase) and fault.at == move
                ]
                if isinstance(move, int):
                    for fault in faults:
                        self._saw(fault.kind, step)
                        for kind in {"native twice": ("native", "native")}.get(
                            fault.kind, (fault.kind,)
                        ):
                            self.cancel[kind]()
                    yield
                    self._saw("tick", step)
                elif faults:
                    raise KINDS[faults[0].kind](f"{step.name}, {phase}: {move}")
                elif move == "removed":
                    self.cells -= {(step.name, "first"), (step.name, "second")}
                    self._saw(move, step)
                elif move in {"first", "second"}:
                    self.cells.add((step.name, move))
                    self._saw(move, step)
        except BaseException as error:
            how = HOW.get(type(error), "cancelled")
            self._saw(how if phase == "action" else f"back {how}", step)
            self.raised[step.name, phase] = error
            raise
        self._saw("done" if phase == "action" else "back done", step)

    def _saw(self, what: str, step: Step) -> None:
        self.events.append(Event(what, step.name))


async def watch(effect: pysagas.Effect, call_next: pysagas.CallNext) -> object:
    return await call_next()


def group_options(group: Par) -> dict[str, Any]:
    return {
        "name": group_name(group),
        "limit": group.limit,
        "on_failure": "finish" if group.finish else "cancel",
    }


def arguments(step: Step) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Gives what a step's action, and so its compensation, is called with."""
    return {
        "run": (PAYLOAD, {}),
        "own": ((step.name,), {}),
        "keywords": ((step.name,), {"key": step.name}),
    }[step.arguments]


def result_of(step: Step) -> object:
    return ("result of", step.name)


def value(part: Part) -> object:
    """Gives what a call in a function returns."""
    if isinstance(part, Step):
        return result_of(part)
    return tuple(map(value, part.members)) if isinstance(part, Par) else ("value of", part)


# --- what is checked ------------------------------------------------------------------------------


def agrees(world: World) -> None:
    """Fails where a run is not what the model says."""
    trial = world.trial
    tree = trial.tree
    reading = Reading(
        tree,
        world.events,
        functions=trial.functions,
        later=trial.later,
        noticed=isinstance(world.error, world.cancelled_class),
    )
    reading.check()
    if not holds_group(tree):
        assert world.events == predict(tree, world.plan, functions=trial.functions, later=trial.later)
    if len(world.plan) == 1 and world.plan[0].phase == "action":
        fault = world.plan[0]
        what = HOW[KINDS[fault.kind]] if fault.kind in KINDS else fault.kind
        assert Event(what, fault.step) in world.events, "the planned fault did not happen"
    check_caller(world, reading)
    check_report(world, reading)
    check_calls(world, reading)
    check_cells(world, reading)


def check_caller(world: World, reading: Reading) -> None:
    """G5, G8, G11, G12: what the caller gets."""
    kind, got, outcome = reading.goes_to_the_caller, world.error, world.outcome
    tree = world.trial.tree
    if kind == "nothing":
        assert got is None
        assert outcome is not None
        assert outcome.error is None
        assert outcome.state.name == reading.saga_state
        return
    forward = {step: error for (step, phase), error in world.raised.items() if phase == "action"}
    backward = [world.raised[step, "back"] for step in reading.broken]
    if kind == "failure":
        if got is None:
            assert outcome is not None
            got = outcome.error
        assert got is not None
        kinds = tuple(KINDS[kind] for kind in world.trial.expected)
        restored = reading.saga_state == "COMPENSATED"
        swallowed = restored and all(isinstance(leaf, kinds) for leaf in leaves(got))
        assert (world.error is None) == swallowed
        assert reading.explains(got, tree, forward)
    assert got is not None
    if kind == "quit":
        assert any(
            got is world.raised.get((step, phase))
            for step in reading.quits
            for phase in ("action", "back")
        )
    if kind == "cancelled":
        assert isinstance(got, world.cancelled_class)
        # A scope swallows its own cancellation; a native one goes on.
        native = reading.native and world.cancelled_class is asyncio.CancelledError
        assert world.left is (got if native else None)
    if reading.cancelled and kind == "compensation failed":
        # What yields is the cause or context of what goes on.
        assert any(isinstance(error, world.cancelled_class) for error in chain(got))
    final = outcome_of(got) if world.error is not None else outcome
    assert final is not None
    assert final.state.name == reading.saga_state
    assert final.error is (got if reading.failed or backward else None)
    if backward:
        failed = got if kind == "compensation failed" else got.__cause__
        assert isinstance(failed, CompensationFailed)
        assert failed.failures == tuple(backward)
        assert all(str(error) in str(failed) for error in backward)
        assert failed.outcome is final
        started = failed.error
        if not reading.failed:
            assert started is None
        elif not (reading.disturbed or reading.quits or (reading.functions and holds_group(tree))):
            # In a group, a branch that was cancelled and could not be taken back is a failure too.
            assert reading.explains(started, tree, forward)
        assert isinstance(failed.__cause__, BaseExceptionGroup)
        parts = backward if started is None else [started, *backward]
        assert list(failed.__cause__.exceptions[: len(parts)]) == parts
    if reading.failed:
        check_note("\n".join(got.__notes__), final)
    world.outcome = final


def check_note(note: str, outcome: Outcome[Any]) -> None:
    """G5: which saga, what was rolled back, what is in doubt; the first of a long list."""
    assert "'tested'" in note
    for state in (StepState.COMPENSATED, StepState.UNKNOWN):
        names = [repr(report.name) for report in outcome.steps if report.state is state]
        assert sum(name in note for name in names) >= min(len(names), 5)


def check_report(world: World, reading: Reading) -> None:
    """G13: each step ends in one state, and no exception is lost."""
    assert world.outcome is not None
    known = {step.name: (path, step) for path, step in paths(world.trial.tree)}
    reports = [report for report in world.outcome.steps if report.name in known]
    assert [report.path for report in reports] == sorted(report.path for report in reports)
    reported = {report.name for report in reports}
    assert reported >= (reading.start if world.trial.functions else known).keys()
    assert len(reported) == len(reports)
    for report in reports:
        path, step = known[report.name]
        assert report.path == path
        assert report.state.name == reading.state(step.name)
        assert report.result == (result_of(step) if reading.how(step.name) == "done" else None)
        assert report.error is world.raised.get((step.name, "action"))
        assert report.compensation_error is world.raised.get((step.name, "back"))
    unknown = [report for report in reports if report.state.name == "UNKNOWN"]
    assert list(world.outcome.in_doubt) == unknown
    if world.before is not None:
        assert {step.state.name for step in world.before.steps} <= {
            "COMPLETED",
            "COMPENSATED",
            "NOT_APPLIED",
            "UNKNOWN",
            "NOT_STARTED",
        }


def check_calls(world: World, reading: Reading) -> None:
    """G3: a compensation gets what the action got, an undo what it returned."""
    for step in steps_of(world.trial.tree):
        for way, *called in (world.calls[key] for key in world.calls if key[0] == step.name):
            wanted = ((result_of(step),), {}) if way == "undo" else arguments(step)
            assert tuple(called) == wanted


def check_cells(world: World, reading: Reading) -> None:
    """G13: the states tell the truth about the effects."""
    for step in steps_of(world.trial.tree):
        left = {half for name, half in world.cells if name == step.name}
        state = reading.state(step.name)
        if state == "COMPLETED" and (step.compensation or step.undo):
            assert left == {"first", "second"}
        elif state in {"NOT_STARTED", "NOT_APPLIED", "COMPENSATED"}:
            assert not left


def leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from leaves(part)
    else:
        yield error


def chain(error: BaseException) -> list[BaseException]:
    """Gives an exception with its causes and contexts, and what groups of them hold."""
    found = [error]
    for known in found:
        for other in (known.__cause__, known.__context__, *getattr(known, "exceptions", ())):
            if other is not None and all(other is not one for one in found):
                found.append(other)
    return found


# --- the laws -------------------------------------------------------------------------------------

# Drawn seldom: two members that fail, in another order than theirs, one of them as expected.
TWO_FAILURES = Trial(
    Seq((Par((Step("late", pace=(1, 0, 0)), Step("soon", not_applied=True)), finish=True),)),
    (Fault("late", "action", "fail", "before"), Fault("soon", "action", "decline", "before")),
    functions=False,
    expected=("fail",),
    watched=False,
    later=False,
)


# Drawn seldom: a member fails in the instant in which the group is cancelled from outside.
CANCELLED_AND_FAILING = Trial(
    Seq((Par((Step("cancelling", pace=(1, 0, 0)), Step("failing"))),)),
    (Fault("cancelling", "action", "scope", 0), Fault("failing", "action", "fail", "after")),
    functions=False,
    expected=(),
    watched=False,
    later=False,
)

# An order to quit that comes out of a shielded action goes over the cancellation that it outlived.
QUIT_IN_SHIELD = Trial(
    Seq((Step("shielded", style="shield", pace=(1, 0, 0)),)),
    (Fault("shielded", "action", "scope", 0), Fault("shielded", "action", "quit", "after")),
    functions=False,
    expected=(),
    watched=False,
    later=False,
)

# A native cancellation that comes during a rollback which then fails yields, and is not lost.
CANCELLED_AND_FAILED = Trial(
    Seq((Step("failing", back_pace=(1, 0)),)),
    (
        Fault("failing", "action", "fail", "after"),
        Fault("failing", "back", "native", 0),
        Fault("failing", "back", "fail", "before"),
    ),
    functions=False,
    expected=(),
    watched=False,
    later=False,
)


def scope_cancelled_before(part: Part) -> Trial:
    """Drawn seldom: a scope is cancelled while a call that fails is taken back, and a part follows."""
    first = Step("first", back_pace=(1, 0), catch=True)
    plan = (Fault("first", "action", "fail", "after"), Fault("first", "back", "scope", 0))
    return Trial(Seq((first, part)), plan, functions=True, expected=(), watched=False, later=False)


@PROFILE
@given(trial=safe_trials())
def test_any_failure_restores_the_initial_state(backend: Any, trial: Trial) -> None:
    """The law: whatever goes wrong, wherever, nothing of what was done is left."""
    world = World(trial, backend).run()
    outcome = world.outcome if world.error is None else outcome_of(world.error)
    assert outcome is not None
    kept = {step.name for step in outcome.steps if step.state is StepState.COMPLETED}
    if outcome.state is not SagaState.COMPLETED:
        assert outcome.state is SagaState.COMPENSATED
        kept = set()
    effective = [step for step in steps_of(trial.tree) if step.compensation or step.undo]
    assert not {step.name for step in outcome.in_doubt} & {step.name for step in effective}
    assert world.cells == {
        (step.name, half) for step in effective if step.name in kept for half in ("first", "second")
    }


@PROFILE
@given(trial=trials(groups=False))
@example(trial=QUIT_IN_SHIELD)
@example(trial=CANCELLED_AND_FAILED)
@example(trial=replace(CANCELLED_AND_FAILED, functions=True))
@example(trial=scope_cancelled_before(Step("sync", style="sync")))
@example(trial=scope_cancelled_before(Step("sync", style="sync", arguments="own")))
def test_without_groups_the_events_are_the_same_on_every_loop(backend: Any, trial: Trial) -> None:
    """G1, G2, G3, G7, G11, G14, G15: a sequence leaves no choice, so the model predicts each event."""
    agrees(World(trial, backend).run())


@PROFILE
@given(trial=trials(functions=False))
@example(trial=TWO_FAILURES)
@example(trial=CANCELLED_AND_FAILING)
def test_a_saga_as_data_agrees_with_the_model(backend: Any, trial: Trial) -> None:
    """G1 to G15: once it is known how each action ended, the model says all the rest."""
    agrees(World(trial, backend).run())


@PROFILE
@given(trial=trials(functions=True))
@example(trial=scope_cancelled_before(Par((Step("in a group"),))))
def test_a_saga_as_functions_agrees_with_the_model(backend: Any, trial: Trial) -> None:
    """G2: each call is all or nothing, caught or not; all else is as for data."""
    agrees(World(trial, backend).run())
