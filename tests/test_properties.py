"""Drawn sagas, drawn faults: the engine does what the model says, on every loop.

The profile is "default" (the same examples each time), or what ``PYSAGAS_PROFILE`` says: "deep"
draws new ones, ``PYSAGAS_EXAMPLES`` of them for each test and loop.
"""

from __future__ import annotations

import asyncio
import os
import selectors
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Any

import anyio
import pytest
import trio.testing
from choices import Run
from conftest import WITHOUT_DEBUG
from hypothesis import HealthCheck, example, given, settings
from reading import explains, group_name, holds_group, paths, read
from strategies import Trial, safe_trials, trials
from trees import CANCELS, HOW, Commit, Event, Fault, Par, Part, Raise, Seq, Step, script, steps_of

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
    pytest.mark.parametrize("backend", WITHOUT_DEBUG),
]

PAYLOAD = ("payload",)


class Boom(Exception):
    """A failure."""


class Declined(Exception):
    """A failure by which an action says that it did nothing."""


class Quit(KeyboardInterrupt):
    """An order to quit."""


KINDS: dict[str, type[BaseException]] = {
    "fail": Boom,
    "decline": Declined,
    "quit": Quit,
    "hang": TimeoutError,
}
ENDED = {KINDS[kind]: HOW[kind] for kind in ("fail", "decline", "quit")}


class Jumping(selectors.DefaultSelector):
    """Instead of waiting for a timer, it sets the clock to it."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(timeout and 0)
        if not ready and timeout:
            self.now += timeout
        return ready


class VirtualTime(asyncio.SelectorEventLoop):
    """An event loop in which time passes only while nothing else can happen.

    What another thread does is not seen, so nobody may wait for one while a timer is set.
    """

    def __init__(self) -> None:
        self._jumping = Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def virtual_time(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Gives the options of a backend another clock."""
    if name == "trio":
        return {"clock": trio.testing.MockClock(autojump_threshold=0)}
    eager = "loop_factory" in options

    def loop_factory() -> asyncio.AbstractEventLoop:
        loop = VirtualTime()
        if eager:
            loop.set_task_factory(asyncio.eager_task_factory)
        return loop

    return {**options, "loop_factory": loop_factory}


# Whoever hangs has a time limit less than any other; then comes that of the rollback. So no two end
# in the same instant, and only what hangs runs into one.
ROLLBACK_LIMIT = 500
LONG = 1000


async def twice(attempt: Any) -> object:
    """Tries once more."""
    try:
        return await attempt()
    except Exception:
        return await attempt()


class World:
    """What the steps of one trial change, and all that was seen of it."""

    def __init__(self, trial: Trial, backend: tuple[str, dict[str, Any]]) -> None:
        self.backend, self.options = backend
        self.trial = trial
        # Only asyncio has native cancellation; elsewhere a scope does it. uvloop has no other clock.
        instead = {} if self.backend == "asyncio" else {"native": "scope", "native twice": "scope"}
        if "use_uvloop" in self.options:
            instead["hang"] = "fail"
        self.plan = tuple(
            fault._replace(kind=instead.get(fault.kind, fault.kind)) for fault in trial.plan
        )
        hanging = [fault[:2] for fault in self.plan if fault.kind == "hang"]
        self.seconds = {key: 4.0**index for index, key in enumerate(hanging)}
        if hanging:
            self.options = virtual_time(self.backend, self.options)
        self.attempts: Counter[tuple[str, str]] = Counter()
        self.cells: set[tuple[str, str]] = set()
        self.events: list[Event] = []
        # What each action and each way back was called with, and what it raised.
        self.calls: dict[tuple[str, str], tuple[Any, ...]] = {}
        self.raised: dict[tuple[str, str], BaseException] = {}
        # What functions raised by themselves.
        self.own: list[BaseException] = []
        # What the caller got: the last outcome, or the exception; and what went past its scope.
        self.outcome: Outcome[Any] | None = None
        self.error: BaseException | None = None
        self.left: BaseException | None = None
        # The outcome of a run that succeeded, and then was taken back.
        self.before: Outcome[Any] | None = None
        self.completed = False
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
        self.completed = self.outcome.state is SagaState.COMPLETED
        if self.completed and await self._is_to_be_taken_back():
            if Commit() in self.trial.tree.parts:
                with pytest.raises(pysagas.AlreadyCommitted):
                    await self.outcome.rollback()
            else:
                self.before = before = self.outcome
                self.outcome = await before.rollback()
                assert self.outcome is await before.rollback()

    async def _is_to_be_taken_back(self) -> bool:
        return self.trial.later

    # The tree as data.

    def _data(self, part: Part, middleware: Any = ()) -> Any:
        if isinstance(part, Seq):
            return Saga(
                map(self._data, part.parts),
                name="tested",
                middleware=middleware,
                **saga_options(part),
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
        if step.style in {"shield", "blocking"}:
            options[step.style] = True
        if step.timeout:
            options["timeout"] = self._limit(step, "action")
        if step.back_timeout:
            options["compensation_timeout"] = self._limit(step, "back")
        if step.retry:
            options["retry"] = twice
        if step.back_retry:
            options["compensation_retry"] = twice
        return options

    def _limit(self, step: Step, phase: str) -> float:
        return self.seconds.get((step.name, phase), LONG)

    # The tree as functions.

    def _function(self, seq: Seq, middleware: Any = ()) -> Any:
        @pysagas.saga(
            name="tested",
            middleware=middleware,
            **saga_options(seq),
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
            if isinstance(part, Raise):
                self.own.append(Boom("of the function itself"))
                raise self.own[-1]
            try:
                result = await self._call_part(scope, part)
            except CompensationFailed:
                with pytest.raises(pysagas.ScopeClosed):
                    await scope.step(result_of, part)
                raise
            except (Boom, Declined, TimeoutError, ExceptionGroup):
                if not part.catch:
                    raise
            else:
                assert result == value(part)

    async def _call_part(self, scope: pysagas.SagaScope, part: Part) -> object:
        if isinstance(part, Step):
            if part.style == "noted":
                self.cells |= {(part.name, "first"), (part.name, "second")}
                scope.on_rollback(self._back(part, "compensate"), *PAYLOAD)
                return result_of(part)
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
        if step.style == "blocking" or (
            step.style == "sync" and (way == "action" or step.back_pace == (0, 0))
        ):

            def function(*args: Any, **kwargs: Any) -> object:
                for _ in self._begin(step, way, args, kwargs):
                    assert step.style == "blocking"
                return result_of(step)
        else:

            async def function(*args: Any, **kwargs: Any) -> object:
                for hangs in (moves := self._begin(step, way, args, kwargs)):
                    began = anyio.current_time()
                    try:
                        await (anyio.sleep_forever() if hangs else anyio.lowlevel.checkpoint())
                    except BaseException as error:
                        phase = "action" if way == "action" else "back"
                        limited = step.timeout if way == "action" else step.back_timeout
                        late = anyio.current_time() - began >= self._limit(step, phase)
                        try:
                            moves.throw(TimeoutError() if limited and late else error)
                        except TimeoutError:
                            raise error from None  # it is the time limit that makes one of it
                return result_of(step)

        function.__name__ = step.name
        return function

    def _begin(self, step: Step, way: str, args: Any, kwargs: Any) -> Iterator[bool]:
        """Goes through a step's script, and writes down what happens.

        Yields at a checkpoint; True to hang there.
        """
        phase = "action" if way == "action" else "back"
        once = not self.attempts[step.name, phase]
        self.attempts[step.name, phase] += 1
        self._saw(("start" if way == "action" else way) if once else "again", step)
        self.calls[step.name, phase] = (way, args, kwargs)
        try:
            for move in script(step, phase):
                faults = [
                    fault
                    for fault in self.plan
                    if fault[:2] == (step.name, phase) and fault.at == move and (once or not fault.once)
                ]
                if isinstance(move, int):
                    for fault in faults:
                        self._saw(fault.kind, step)
                        for kind in fault.kind.split():
                            self._cancel({"twice": "native"}.get(kind, kind), step)
                    yield False
                    self._saw("tick", step)
                elif faults:
                    if faults[0].kind == "hang":
                        yield True
                    raise KINDS[faults[0].kind](f"{step.name}, {phase}: {move}")
                elif move == "removed":
                    self.cells -= {(step.name, "first"), (step.name, "second")}
                    self._saw(move, step)
                elif move in {"first", "second"}:
                    self.cells.add((step.name, move))
                    self._saw(move, step)
        except BaseException as error:
            how = ENDED.get(type(error), "cancelled")
            if isinstance(error, TimeoutError):
                how = "timed out"
            elif phase == "back" and how == "cancelled":
                how = "cut off"
            self._saw(how if phase == "action" else f"back {how}", step)
            self.raised[step.name, phase] = error
            raise
        self._saw("done" if phase == "action" else "back done", step)
        self.raised.pop((step.name, phase), None)

    def _cancel(self, kind: str, step: Step) -> None:
        if step.style == "blocking":
            anyio.from_thread.run_sync(self.cancel[kind])
        else:
            self.cancel[kind]()

    def _saw(self, what: str, step: Step) -> None:
        self.events.append(Event(what, step.name))


async def watch(effect: pysagas.Effect, call_next: pysagas.CallNext) -> object:
    return await call_next()


def saga_options(seq: Seq) -> dict[str, Any]:
    return {
        "on_compensation_failure": "stop" if seq.stop else "continue",
        "rollback_timeout": ROLLBACK_LIMIT if seq.rollback_timeout else None,
    }


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
    model = read(
        world.events,
        partial(Run, trial.tree, world.plan, functions=trial.functions, later=trial.later),
        failed=not world.completed,
    )
    if len(world.plan) == 1 and world.plan[0].phase == "action" and not world.own:
        fault = world.plan[0]
        what = HOW.get(fault.kind, fault.kind)
        assert Event(what, fault.step) in world.events, "the planned fault did not happen"
    check_caller(world, model)
    check_report(world, model)
    check_calls(world)
    check_cells(world, model)


def is_from(world: World, error: BaseException | None, step: str, phase: str) -> bool:
    """Tells whether an exception is what an action or a way back raised, or its time limit did."""
    raised = world.raised.get((step, phase))
    ended = [what for what, name in world.events if name == step]
    if isinstance(raised, TimeoutError) or (phase == "back" and ended[-1:] == ["back cut off"]):
        return type(error) is TimeoutError
    return error is raised


def check_caller(world: World, model: Run) -> None:
    """G5, G8, G10, G11, G12: what the caller gets."""
    kind, got, outcome = model.goes_to_the_caller, world.error, world.outcome
    if kind == "done":
        assert got is None
        assert outcome is not None
        assert outcome.error is None
        assert outcome.state.name == model.saga_state
        return

    def raised(part: Step | Raise, error: BaseException | None) -> bool:
        if isinstance(part, Raise):
            return any(error is own for own in world.own)
        return is_from(world, error, part.name, "action")

    if kind == "failed":
        if got is None:
            assert outcome is not None
            got = outcome.error
        assert got is not None
        assert model.error is not None
        kinds = tuple(KINDS[kind] for kind in world.trial.expected)
        restored = model.saga_state == "COMPENSATED"
        swallowed = restored and all(isinstance(leaf, kinds) for leaf in leaves(got))
        assert (world.error is None) == swallowed
        assert explains(got, model.error, raised, functions=model.functions)
    assert got is not None
    if kind == "quit":
        assert any(
            got is world.raised.get((step, phase))
            for step in model.quits
            for phase in ("action", "back")
        )
    seen = {what for what, _ in world.events}
    native = not seen.isdisjoint({"native", "native twice"})
    if kind == "cancelled":
        assert isinstance(got, world.cancelled_class)
        # A scope swallows its own cancellation; a native one goes on.
        assert world.left is (got if native else None)
    if model.cancelled and kind == "compensation failed":
        # What yields is the cause or context of what goes on.
        assert any(isinstance(error, world.cancelled_class) for error in chain(got))
    final = outcome_of(got) if world.error is not None else outcome
    assert final is not None
    assert final.state.name == model.saga_state
    assert final.error is (got if model.error or model.broken() else None)
    if model.broken():
        failed = got if kind == "compensation failed" else got.__cause__
        assert isinstance(failed, CompensationFailed)
        check_failures(world, model, failed)
        assert failed.outcome is final
        started = failed.error
        if model.error is None:
            assert started is None
        elif CANCELS.isdisjoint(seen) and not (
            model.quits or (model.functions and holds_group(model.root))
        ):
            # In a group, a branch that was cancelled and could not be taken back is a failure too.
            assert explains(started, model.error, raised, functions=model.functions)
        assert isinstance(failed.__cause__, BaseExceptionGroup)
        parts = failed.failures if started is None else (started, *failed.failures)
        assert failed.__cause__.exceptions[: len(parts)] == parts
    if model.error:
        check_note("\n".join(got.__notes__), final)
    world.outcome = final


def check_failures(world: World, model: Run, failed: CompensationFailed) -> None:
    """G10, G11: each failed compensation, in their order, and that time had run out if it had."""
    ends = {step: index for index, (_, step) in enumerate(world.events)}
    out_of_time = [error for error in failed.failures if "; not begun:" in str(error)]
    assert len(out_of_time) == model.unfinished
    assert all(type(error) is TimeoutError for error in out_of_time)
    failures = [error for error in failed.failures if error not in out_of_time]
    assert all(str(error) in str(failed) for error in failures)
    # A thread has failed before the loop knows of it.
    threads = {step.name for step in steps_of(model.root) if step.style == "blocking"}
    for step in threads.intersection(model.broken()):
        failures.remove(next(error for error in failures if is_from(world, error, step, "back")))
    ordered = sorted(model.broken() - threads, key=ends.__getitem__)
    assert len(failures) == len(ordered)
    assert all(map(partial(is_from, world), failures, ordered, repeat("back")))


def check_note(note: str, outcome: Outcome[Any]) -> None:
    """G5: which saga, what was rolled back, what is in doubt; the first of a long list."""
    assert "'tested'" in note
    for state in (StepState.COMPENSATED, StepState.UNKNOWN):
        names = [repr(report.name) for report in outcome.steps if report.state is state]
        assert sum(name in note for name in names) >= min(len(names), 5)


def check_report(world: World, model: Run) -> None:
    """G13: each step ends in one state, and no exception is lost."""
    assert world.outcome is not None
    known = {step.name: (path, step) for path, step in paths(model.root)}
    reports = [report for report in world.outcome.steps if report.name in known]
    assert [report.path for report in reports] == sorted(report.path for report in reports)
    reported = {report.name for report in reports}
    begun = {step for what, step in world.events if what == "start"}
    assert reported >= (begun if model.functions else known.keys())
    assert len(reported) == len(reports)
    for report in reports:
        path, step = known[report.name]
        assert report.path == path
        assert report.state.name == model.state[step.name]
        done = Event("done", step.name) in world.events
        assert report.result == (result_of(step) if done else None)
        assert is_from(world, report.error, step.name, "action")
        assert is_from(world, report.compensation_error, step.name, "back")
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


def check_calls(world: World) -> None:
    """G3: a compensation gets what the action got, an undo what it returned."""
    for step in steps_of(world.trial.tree):
        for way, *called in (world.calls[key] for key in world.calls if key[0] == step.name):
            wanted = ((result_of(step),), {}) if way == "undo" else arguments(step)
            assert tuple(called) == wanted


def check_cells(world: World, model: Run) -> None:
    """G13: the states tell the truth about the effects."""
    for step in steps_of(model.root):
        left = {half for name, half in world.cells if name == step.name}
        state = model.state[step.name]
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


# Found by a deep run: an order to quit that comes out of a branch's way back cancels the other
# members, though those in flight may finish when a member fails.
QUIT_IN_BRANCH = Trial(
    Seq((Par((Seq((Step("failing"),)), Step("slow", pace=(3, 0, 2))), finish=True),)),
    (Fault("failing", "action", "fail", "before"), Fault("failing", "back", "quit", "before")),
    functions=True,
    expected=(),
    watched=False,
    later=False,
)


# G3: an attempt that was in doubt leaves the step in doubt, though the next one did nothing.
FAILED_THEN_DECLINED = Trial(
    Seq((Step("twice", not_applied=True, retry=True),)),
    (
        Fault("twice", "action", "fail", "before", once=True),
        Fault("twice", "action", "decline", "before"),
    ),
    functions=False,
    expected=(),
    watched=False,
    later=False,
)


def timed_out(phase: str, *, once: bool, limited: bool = True) -> Trial:
    """G3, G10: a step hangs, in its action or its way back; another one stands before it."""
    slow = Step(
        "slow", not_applied=True, timeout=True, back_timeout=limited, back_retry=True, retry=True
    )
    plan = (Fault("slow", "action", "fail", "after"), Fault("slow", phase, "hang", "before", once))
    return Trial(
        Seq((Step("first"), slow), rollback_timeout=True),
        plan[phase == "action" :],
        functions=False,
        expected=(),
        watched=False,
        later=False,
    )


# An order to quit cancels the others at once, under "finish" too.
QUIT_IN_GROUP = Trial(
    Seq((Par((Step("quitting", pace=(1, 0, 0)), Step("slow", pace=(9, 0, 0))), finish=True),)),
    (Fault("quitting", "action", "quit", "before"),),
    functions=False,
    expected=(),
    watched=False,
    later=False,
)


def outlived(branch: Seq) -> Trial:
    """Drawn seldom: a shielded call in a branch outlives the failure of another member.

    It is taken back when it has ended, while the third member still goes on.
    """
    failing, slow = Step("failing", pace=(5, 0, 0)), Step("slow", style="shield", pace=(30, 0, 0))
    plan = (Fault("failing", "action", "fail", "before"),)
    tree = Seq((Par((branch, failing, slow)),))
    return Trial(tree, plan, functions=True, expected=(), watched=False, later=False)


HELD = Step("held", style="shield", pace=(9, 0, 0))

# Drawn seldom: a shielded member fails when its group has been cancelled for another one's failure.
FAILED_LATE = Trial(
    Seq(
        (Par((Par((Step("held", style="shield", pace=(9, 0, 0)),)), Step("failing", pace=(5, 0, 0)))),)
    ),
    (Fault("held", "action", "fail", "after"), Fault("failing", "action", "fail", "before")),
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
@example(trial=FAILED_THEN_DECLINED)
@example(trial=timed_out("action", once=False))
@example(trial=timed_out("action", once=True))
@example(trial=timed_out("back", once=False))
@example(trial=timed_out("back", once=True))
@example(trial=timed_out("back", once=False, limited=False))
@example(trial=scope_cancelled_before(Step("sync", style="sync")))
@example(trial=scope_cancelled_before(Step("sync", style="sync", arguments="own")))
def test_without_groups_the_events_are_the_same_on_every_loop(backend: Any, trial: Trial) -> None:
    """G1, G2, G3, G7, G11, G14, G15: a sequence leaves no choice, so the model predicts each event."""
    agrees(World(trial, backend).run())


@PROFILE
@given(trial=trials(functions=False))
@example(trial=TWO_FAILURES)
@example(trial=CANCELLED_AND_FAILING)
@example(trial=FAILED_LATE)
@example(trial=QUIT_IN_GROUP)
def test_a_saga_as_data_agrees_with_the_model(backend: Any, trial: Trial) -> None:
    """G1 to G15: once it is known how each action ended, the model says all the rest."""
    agrees(World(trial, backend).run())


@PROFILE
@given(trial=trials(functions=True))
@example(trial=scope_cancelled_before(Par((Step("in a group"),))))
@example(trial=QUIT_IN_BRANCH)
@example(trial=outlived(Seq((HELD,))))
@example(trial=outlived(Seq((Seq((Step("done"), replace(HELD, compensation=False))),))))
def test_a_saga_as_functions_agrees_with_the_model(backend: Any, trial: Trial) -> None:
    """G2: each call is all or nothing, caught or not; all else is as for data."""
    agrees(World(trial, backend).run())
