"""Journals: a run id names one run, for good; what died is recovered, what failed is tried again."""

from __future__ import annotations

import asyncio
import gc
import math
import re
import time
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from copy import copy
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
from anyio import CancelScope, Event, create_task_group, fail_after, get_cancelled_exc_class
from anyio.lowlevel import checkpoint
from conftest import ASYNCIO
from mortal import Boom, Killed, Shop

from pysagas import (
    AlreadyCommitted,
    Commit,
    CompensationFailed,
    Effect,
    Parallel,
    Saga,
    SagaError,
    SagaScope,
    SagaState,
    ScopeBusy,
    Step,
    StepState,
    current_effect,
    outcome_of,
    saga,
)
from pysagas._cli._steps import step_lines
from pysagas.durable import (
    EventKind,
    JournalError,
    MemoryJournal,
    NotRecordable,
    OtherRun,
    Recovered,
    RecoveryReport,
    RunInProgress,
    RunInterrupted,
    RunState,
    SagaChanged,
    SQLiteJournal,
)
from pysagas.durable._codec import encode_error
from pysagas.durable._journal import _is_for_all
from pysagas.durable._middleware import RunMiddleware
from pysagas.durable._storage import Ending

ENOUGH = 30  # seconds, within which what hangs is found to hang

pytestmark = pytest.mark.anyio


class Disk:
    """Where journals are kept from one process to the next, and a shop beside it."""

    def __init__(self, kind: str, tmp_path: Any) -> None:
        self.kind = kind
        self.path = tmp_path / "sagas.db"
        self.memory = MemoryJournal()
        self.dead = False
        self.journal_fails = False
        # The shop asks this one whether the process is dead.
        self.shop = Shop(self)  # type: ignore[arg-type]

    @asynccontextmanager
    async def process(self) -> AsyncIterator[Any]:
        """A process that has the journal open."""
        self.dead = False
        if self.kind == "memory":
            dead = self.memory.in_next_process()
            self.memory = MemoryJournal()
            for name in ("_runs", "_key_of", "_keys"):  # and nothing of what `kill` has put there
                setattr(self.memory, name, getattr(dead, name))
            yield self.memory
        else:
            async with SQLiteJournal(self.path) as journal:
                yield journal

    def kill(self, journal: Any) -> None:
        """From here on, nothing of this process reaches the disk, nor the shop."""

        def dead(*args: object) -> None:
            raise Killed

        self.dead = True
        for name in ("_append", "_flush", "_end", "_reopen", "_release"):
            setattr(journal, name, dead)

    async def killed(self, whole: Saga[..., Any], moment: str, *args: Any, run_id: str = "r") -> None:
        """A process that dies when the step of this name has begun."""
        async with self.process() as journal:
            self.shop.moments[moment] = partial(self.kill, journal)
            with pytest.raises((Killed, CompensationFailed, BaseExceptionGroup)):
                await journal.run(whole, *args, run_id=run_id)
        assert self.dead


@pytest.fixture(params=["memory", "sqlite"])
def disk(request, tmp_path):
    return Disk(request.param, tmp_path)


@pytest.fixture
async def journal(disk):
    async with disk.process() as journal:
        yield journal


@pytest.fixture
def shop(disk):
    return disk.shop


def number_saga(shop: Shop) -> Saga[..., Any]:
    @saga(name="s")
    async def whole(scope: SagaScope, number: int) -> int:
        await scope.step(shop.step("a"))
        return number * 2

    return whole


# --- once (D1) --------------------------------------------------------------------------------------


async def test_d1_a_second_call_gives_the_recorded_outcome(journal, shop):
    """A run that has completed is not run again: its value, state and steps are recorded (D1)."""
    whole = number_saga(shop)
    first = await journal.run(whole, 21, run_id="r")
    second = await journal.run(whole, 21, run_id="r")

    assert (42, SagaState.COMPLETED, "s", "r") == (
        second.value,
        second.state,
        second.saga,
        second.run_id,
    )
    assert first.steps == second.steps
    assert {"a": 1} == shop.begun


async def test_d1_a_step_for_which_somebody_answered_is_recalled_as_it_was(journal, shop):
    """A failure that a retry answered for is in the recorded outcome what it was in the first (D1)."""

    async def fallback(attempt: Any) -> int:
        with pytest.raises(Boom):
            await attempt()
        return 7

    async def stub(effect: Any, call_next: Any) -> object:
        if effect.name == "stub":
            return "stub"
        result = await call_next()
        return f"changed {result}" if effect.name == "c" else result

    step = shop.step("a", fails=Boom("a"), retry=fallback, not_applied=Boom)
    parts = [Parallel(step, shop.step("b")), shop.step("c"), shop.step("stub")]
    whole = Saga(parts, name="s", middleware=[stub])
    first = await journal.run(whole, run_id="r")
    second = await journal.run(whole, run_id="r")
    lines = step_lines(await journal.history("r"), running=False)

    assert [StepState.NOT_APPLIED, *3 * [StepState.COMPLETED]] == [step.state for step in second.steps]
    assert [(step.state, step.result) for step in first.steps] == [
        (step.state, step.result) for step in second.steps
    ]
    assert {("a", "not applied"), ("b", "completed"), ("c", "completed")} <= {
        (line.name, line.state) for line in lines
    }


async def test_d5_what_somebody_answers_has_to_be_recordable(journal, shop):
    """What a middleware gives in place of a result is refused as a result is, and the step taken back (D5)."""

    async def wraps(effect: Any, call_next: Any) -> object:
        result = await call_next()
        return object() if effect.kind == "action" else result

    whole = Saga([shop.step("a")], name="s", middleware=[wraps])
    with pytest.raises(
        NotRecordable, match="^what was answered for step 'a' of saga 's' gave <object "
    ):
        await journal.run(whole, run_id="r")

    assert ["a", "-a"] == shop.log


async def test_d1_a_recorded_outcome_has_the_tree_of_the_first(disk, shop):
    """An outcome from the journal shows groups, inner sagas and commits where the first did (D1)."""
    inner = Saga([shop.step("c")], name="inner")
    whole = Saga([Parallel(shop.step("a"), inner, name="both"), Commit(), shop.step("d")], name="s")
    by_function = number_saga(shop)
    async with disk.process() as journal:
        first = await journal.run(whole, run_id="r")
        await journal.run(by_function, 1, run_id="f")
    async with disk.process() as journal:
        second = await journal.run(whole, run_id="r")
        of_function = await journal.run(by_function, 1, run_id="f")

    assert first.tree == second.tree
    assert ["saga", "group", "step", "saga", "step", "commit", "step"] == [
        node.kind for node in second.tree
    ]
    # The journal knows when what ran, too, and the first does not, as nobody has looked at a clock.
    lines = [re.sub(r" +[\d.]+ \w?s$", "", line) for line in str(second).splitlines()]
    assert str(first).splitlines() == lines != str(second).splitlines()
    assert ["saga", "step"] == [node.kind for node in of_function.tree]


async def test_d1_a_recorded_outcome_takes_the_run_back_as_the_first_does(disk, shop):
    """In another process, too, a run that has completed is taken back by its outcome (D1)."""
    whole = number_saga(shop)
    async with disk.process() as journal:
        await journal.run(whole, 21, run_id="r")
    async with disk.process() as journal:
        outcome = await journal.run(whole, 21, run_id="r")
        taken_back = await outcome.rollback()
        again = await journal.run(whole, 21, run_id="r")

    assert ["a", "-a"] == shop.log
    assert SagaState.COMPENSATED is taken_back.state is again.state
    assert [StepState.COMPENSATED] == [step.state for step in taken_back.steps]
    assert None is taken_back.error is again.error


async def test_d1_two_outcomes_of_one_run_take_it_back_once(disk, shop):
    """Whichever outcome of a run takes it back, the others say what came of it, and do nothing (D1)."""
    whole = number_saga(shop)
    async with disk.process() as journal:
        live = await journal.run(whole, 21, run_id="r")
        recalled = [await journal.run(whole, 21, run_id="r") for _ in range(2)]
        outcomes = [await one.rollback() for one in (recalled[0], live, recalled[0], recalled[1])]

    assert ["a", "-a"] == shop.log
    assert {SagaState.COMPENSATED} == {outcome.state for outcome in outcomes}
    assert {StepState.COMPENSATED} == {step.state for one in outcomes for step in one.steps}


async def test_d1_an_outcome_does_not_take_back_what_has_ended_otherwise(journal, shop):
    """A run that was taken back, and could not be, is tried again by retry, and by no outcome (D1, D8)."""
    failing = ["a"]
    whole = Saga([shop.step("a", back_fails=lambda: bool(failing))], name="s")
    live = await journal.run(whole, run_id="r")
    recalled = await journal.run(whole, run_id="r")
    with pytest.raises(CompensationFailed):
        await live.rollback()
    with pytest.raises(JournalError, match="run 'r' is failed, and not completed any more"):
        await recalled.rollback()

    assert ["a"] == shop.log


@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
@pytest.mark.parametrize("is_recalled", [False, True])
async def test_d8_a_later_rollback_that_is_cancelled_as_it_begins_is_carried_out(
    is_recalled, journal, shop
):
    """``task.cancel()`` while the run is opened again comes after its rollback, which is whole (D8, G9)."""
    whole = number_saga(shop)
    outcome = await journal.run(whole, 21, run_id="r")
    if is_recalled:
        outcome = await journal.run(whole, 21, run_id="r")
    reopen = journal._reopen

    async def cancelled(*args: Any) -> None:
        current = asyncio.current_task()
        assert current is not None
        current.cancel()
        await reopen(*args)

    journal._reopen = cancelled
    task = asyncio.ensure_future(outcome.rollback())
    await asyncio.wait([task])

    assert task.cancelled()
    assert ["a", "-a"] == shop.log
    assert [RunState.COMPENSATED] == [info.state for info in await journal.runs()]


async def test_d1_a_recorded_outcome_that_has_passed_its_commit_stays(disk, shop):
    """Past its commit a run is taken back by no outcome, the recorded one included (D1)."""
    whole = Saga([shop.step("a"), Commit()], name="s")
    async with disk.process() as journal:
        await journal.run(whole, run_id="r")
    async with disk.process() as journal:
        outcome = await journal.run(whole, run_id="r")
        with pytest.raises(AlreadyCommitted, match="run 'r' of saga 's' has passed its commit"):
            await outcome.rollback()
        assert [RunState.COMPLETED] == [info.state for info in await journal.runs()]

    assert {"a"} == shop.there


async def test_d1_a_saga_that_has_changed_takes_back_no_recorded_outcome(disk, shop):
    """A completed run whose saga is another one now stays as it was, completed (D1, D4)."""
    async with disk.process() as journal:
        await journal.run(Saga([shop.step("a")], name="s"), run_id="r")
    async with disk.process() as journal:
        outcome = await journal.run(Saga([shop.step("b")], name="s"), run_id="r")
        with pytest.raises(SagaChanged):
            await outcome.rollback()
        assert [RunState.COMPLETED] == [info.state for info in await journal.runs()]

    assert {"a"} == shop.there


async def test_d1_the_next_process_gives_the_recorded_outcome(disk, shop):
    """The next process knows it too (D1)."""
    whole = number_saga(shop)
    for _ in range(2):
        async with disk.process() as journal:
            assert 42 == (await journal.run(whole, 21, run_id="r")).value

    assert {"a": 1} == shop.begun


async def test_d1_a_second_call_raises_the_recorded_error(journal, shop):
    """A run that was taken back raises what it raised, with its outcome (D1)."""
    whole = Saga([shop.step("a"), shop.step("b", fails=Boom("b"), not_applied=Boom)], name="s")
    raised = []
    for _ in range(2):
        with pytest.raises(Boom, match="^b") as caught:
            await journal.run(whole, run_id="r")
        raised.append(caught.value)
    outcomes = list(map(outcome_of, raised))

    assert {"a": 1, "b": 1} == shop.begun
    assert [SagaState.COMPENSATED] * 2 == [outcome.state for outcome in outcomes]
    assert [("a", "COMPENSATED"), ("b", "NOT_APPLIED")] == [
        (step.name, step.state.name) for step in outcomes[1].steps
    ]
    assert type(outcomes[1].steps[1].error) is Boom


@pytest.mark.parametrize("where", ["definition", "call", "calls"])
async def test_d1_a_second_call_honours_the_expected_failures(where, journal, shop):
    """A failure that the caller expects is an outcome, the second time too; a group by its leaves (D1)."""
    expected = {"definition": (), "call": Boom, "calls": (OSError, Boom)}[where]
    whole = Saga(
        [Parallel(shop.step("a", fails=Boom("a")))],
        name="s",
        exceptions=Boom if where == "definition" else (),
    )
    outcomes = [await journal.run(whole, run_id="r", exceptions=expected) for _ in range(2)]

    assert [SagaState.COMPENSATED] * 2 == [outcome.state for outcome in outcomes]
    assert isinstance(outcomes[1].error, ExceptionGroup)
    if where != "definition":
        for unexpected in ((), None, OSError):
            with pytest.raises(ExceptionGroup):
                await journal.run(whole, run_id="r", exceptions=unexpected)


async def test_d1_a_failed_run_is_not_an_expected_failure(journal, shop):
    """What could not be taken back is raised as CompensationFailed, the second time too (D1)."""
    whole = Saga([shop.step("a", back_fails=lambda: True), shop.step("b", fails=Boom("b"))], name="s")
    for _ in range(2):
        with pytest.raises(CompensationFailed) as caught:
            await journal.run(whole, run_id="r", exceptions=Exception)
        outcome = caught.value.outcome
        assert (SagaState.FAILED, ["-a"]) == (
            outcome.state,
            [str(one) for one in caught.value.failures],
        )
        assert outcome.error is caught.value
        assert isinstance(caught.value.error, Boom)
        assert {"a": StepState.COMPENSATION_FAILED, "b": StepState.COMPENSATED} == {
            step.name: step.state for step in outcome.steps
        }

    assert {"a": 1, "b": 1} == shop.begun


async def test_d1_a_failure_past_the_commit_is_raised_again(journal, shop):
    """A run that failed past its commit is FAILED, and raises what it raised (D1)."""
    whole = Saga([shop.step("a"), Commit(), shop.step("b", fails=Boom("b"))], name="s")
    for _ in range(2):
        with pytest.raises(Boom) as caught:
            await journal.run(whole, run_id="r", exceptions=Boom)
        assert SagaState.FAILED is outcome_of(caught.value).state


async def test_d1_a_run_in_progress_is_refused(journal, shop):
    """A second call while the first is under way is refused; other ids are not (D1)."""
    refused = []

    async def again() -> None:
        for run_id in ("r", "other"):
            try:
                await journal.run(number_saga(shop), 1, run_id=run_id)
            except RunInProgress as error:
                refused.append(str(error))

    whole = Saga([Step(again, again, name="again")], name="s")
    await journal.run(whole, run_id="r")

    assert ["run 'r' is under way in this process"] == refused


async def test_d1_other_arguments_are_another_run(journal, shop):
    """An id belongs to one call: another saga, or other arguments, are refused and nothing runs (D1)."""
    await journal.run(number_saga(shop), 1, run_id="r")
    with pytest.raises(OtherRun, match=r"recorded are \[\[1\],\{\}\], given \[\[2\],\{\}\]"):
        await journal.run(number_saga(shop), 2, run_id="r")
    with pytest.raises(OtherRun, match="given .*number"):
        await journal.run(number_saga(shop), number=1, run_id="r")
    with pytest.raises(OtherRun, match="is one of saga 's', not of 'other'"):
        await journal.run(Saga([shop.step("b")], name="other"), 1, run_id="r")

    assert {"a": 1} == shop.begun


async def takes_anything(*args: Any, **options: Any) -> None:
    """An action that names none of its parameters."""


async def takes_a_set(numbers: set[int]) -> None:
    """An action whose argument is written in whatever order."""


@pytest.mark.parametrize(
    ("action", "first", "second"),
    [
        (takes_anything, lambda run: run(a=1, b=2), lambda run: run(b=2, a=1)),
        (takes_anything, lambda run: run({"a": 1, "b": 2}), lambda run: run({"b": 2, "a": 1})),
        # In a set, these two stand in the order in which they came.
        (takes_a_set, lambda run: run({*[0, 8]}), lambda run: run({*[8, 0]})),
    ],
    ids=["keywords", "dict", "set"],
)
async def test_d1_equal_arguments_are_one_call_in_whatever_order(action, first, second, disk):
    """Keywords, dicts and sets are equal, however they come to be written (D1)."""
    whole = Saga([Step(action, name="a")], name="s")
    async with disk.process() as journal:
        run = partial(journal.run, whole, run_id="r")
        steps = [(await call(run)).steps for call in (first, second)]
        (info,) = await journal.runs()
        written = [event.kind for event in await journal.history("r")]

    assert steps[0] == steps[1]
    assert (RunState.COMPLETED, [EventKind.STARTED, EventKind.DONE]) == (info.state, written)


@pytest.mark.parametrize(
    "call",
    [
        lambda run: run({2, 1, 0}),
        lambda run: run({True, 2}),
        lambda run: run(numbers={1, 2}),
    ],
)
async def test_d1_other_values_are_other_arguments(call, journal):
    """Another set, and another way to give the same one, are not the same call (D1)."""
    whole = Saga([Step(takes_a_set, name="a")], name="s")
    await journal.run(whole, {1, 2}, run_id="r")
    with pytest.raises((OtherRun, NotRecordable)):
        await call(partial(journal.run, whole, run_id="r"))


async def test_d1_arguments_of_other_types_are_other_arguments(journal):
    """What was recorded for parameters that have changed since is another call (D1)."""
    await journal.run(Saga([Step(takes_a_set, name="a")], name="s"), {1, 2}, run_id="r")

    async def changed(numbers: dict[str, int]) -> None:
        raise AssertionError  # pragma: no cover - it does not run

    with pytest.raises(OtherRun):
        await journal.run(Saga([Step(changed, name="a")], name="s"), {"a": 1}, run_id="r")


async def test_d1_a_run_that_is_pruned_while_it_is_compared_was_another(journal, shop):
    """Whoever asks for a run while it is being forgotten is told how it stood then (D1)."""
    await journal.run(number_saga(shop), 1, run_id="r")

    async def none(run_id: str) -> None:
        assert 1 == await journal.prune(before=time.time() + 1)

    journal._stored = none
    with pytest.raises(OtherRun):
        await journal.run(number_saga(shop), 2, run_id="r")


async def test_d1_a_call_after_the_process_died_takes_the_run_back(disk, shop):
    """A call with the id of a run whose process died does what ``recover`` does (D1)."""
    whole = Saga([shop.step("a"), shop.step("b")], name="s")
    await disk.killed(whole, "b")
    async with disk.process() as journal:
        for _ in range(2):
            with pytest.raises(RunInterrupted, match="the process of run 'r' died") as caught:
                await journal.run(whole, run_id="r")
            outcome = caught.value.outcome
            assert SagaState.COMPENSATED is outcome.state
            assert {"a", "b"} == {step.name for step in outcome.steps}

    assert (set(), {"a": 1, "b": 1}) == (shop.there, shop.begun)


@pytest.mark.parametrize("recovered", [True, False])
async def test_d1_a_step_that_stays_in_doubt_is_told(disk, shop, recovered):
    """An undo alone cannot ask what came of its action: whoever recovers the run hears of it (D1, G3)."""
    steps = [
        shop.step("a"),
        shop.step("tell", compensation=False),
        shop.step("b", undo=True, compensation=False),
    ]
    await disk.killed(Saga(steps, name="s"), "b")
    async with disk.process() as journal:
        if recovered:
            report = await journal.recover([Saga(steps, name="s")])
            [ended] = report.recovered
            assert (False, (ended,), ("b",)) == (
                report.ok,
                report.in_doubt,
                tuple(step.name for step in ended.in_doubt),
            )
            error = ended.error
        else:
            with pytest.raises(RunInterrupted) as caught:
                await journal.run(Saga(steps, name="s"), run_id="r")
            error = caught.value
    assert str(error) == (
        "the process of run 'r' died, and the run has been taken back; but nobody knows what came of 'b' at "
        "(2,): somebody has to look"
    )


async def test_what_has_nothing_to_be_taken_back_is_nobodys_business(disk, shop):
    """A step without compensation and undo leaves nobody anything to do, wherever its process died."""
    whole = Saga([shop.step("a"), shop.step("tell", compensation=False)], name="s")
    await disk.killed(whole, "tell")
    async with disk.process() as journal:
        report = await journal.recover([whole])
    assert (True, ()) == (report.ok, report.in_doubt)
    outcome = report.recovered[0].outcome
    assert outcome is not None
    assert ["tell"] == [step.name for step in outcome.in_doubt]


async def test_one_saga_is_no_list_of_sagas(journal, shop):
    """Who gives `recover` a saga is told to put it in a list."""
    with pytest.raises(TypeError, match="must be a list of sagas, not <Saga 's'>; put it in a list"):
        await journal.recover(Saga([shop.step("a")], name="s"))


async def test_d1_a_call_after_the_process_died_goes_on_if_told_to(disk, shop):
    """With ``on_crash="resume"`` it goes on (D1)."""
    whole = Saga([shop.step("a"), shop.step("b")], name="s")
    await disk.killed(whole, "b")
    async with disk.process() as journal:
        outcome = await journal.run(whole, run_id="r", on_crash="resume")

    assert (SagaState.COMPLETED, {"a", "b"}) == (outcome.state, shop.there)


# --- what is refused before anything is recorded ------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"run_id": ""}, ValueError, "run_id must be a string that is not empty, not ''"),
        ({"run_id": 3}, ValueError, "not 3"),
        ({"exceptions": 3}, TypeError, "must be exception types, and hold 3"),
        ({"exceptions": KeyboardInterrupt}, TypeError, "exception types"),
        ({"on_crash": "give up"}, ValueError, "on_crash must be .* not 'give up'"),
        ({"unknown": 3}, TypeError, "unknown"),
    ],
)
async def test_d1_a_call_that_cannot_work_is_not_recorded(call, error, message, journal, shop):
    """A wrong option is refused with its name, and there is no such run (D1)."""
    with pytest.raises(error, match=message):
        await journal.run(number_saga(shop), 1, **{"run_id": "r", **call})

    assert [] == await journal.runs()
    assert 2 == (await journal.run(number_saga(shop), 1, run_id="r")).value


async def test_text_that_no_file_can_hold_is_refused(journal, shop):
    """Lone surrogates, as in the name of a file that is no UTF-8, are refused with what has them (D1)."""
    saga, bad = number_saga(shop), "cut \udcff"
    message = "run_id is no text that can be stored: .*surrogates not allowed"
    with pytest.raises(ValueError, match=f"journal.run of saga 's': {message}"):
        await journal.run(saga, 1, run_id=bad)
    with pytest.raises(ValueError, match="the name of the saga is no text that can be stored"):
        await journal.run(Saga([shop.step("a")], name=bad), run_id="r")
    with pytest.raises(ValueError, match=f"journal.retry of saga 's': {message}"):
        await journal.retry(saga, bad)
    for ask in (journal.info, journal.history):
        with pytest.raises(ValueError, match=f"journal.{ask.__name__}: {message}"):
            await ask(bad)
    assert [] == await journal.runs()
    await journal.run(saga, 1, run_id="Bestellung über 3 €")


async def test_what_is_no_saga_is_refused(journal):
    """A function that is no saga is refused by name."""
    with pytest.raises(TypeError, match="it takes a saga, not <function"):
        await journal.run(lambda: None, run_id="r")
    with pytest.raises(TypeError, match="it takes a saga, not None"):
        await journal.retry(None, "r")
    with pytest.raises(TypeError, match="must be a list of sagas, and holds 3"):
        await journal.recover([3])


@pytest.mark.parametrize(
    ("options", "word"), [({"limit": 0}, "limit"), ({"on_crash": "x"}, "on_crash")]
)
async def test_recover_refuses_what_cannot_work(options, word, journal):
    """A limit below 1 and an unknown way are refused."""
    with pytest.raises(ValueError, match=f"journal.recover: {word} must"):
        await journal.recover([], **options)


# --- recover ------------------------------------------------------------------------------------------


async def test_recover_finds_nothing(journal):
    """Where nothing is unfinished, the report is empty, and good."""
    report = await journal.recover([])

    assert (RecoveryReport(), True) == (report, report.ok)


async def test_recover_reports_each_run(disk, shop):
    """Each unfinished run is in the report where it belongs, in order, with its error."""
    rolled = Saga([shop.step("a"), shop.step("b")], name="rolled back")
    stuck = Saga([shop.step("c", back_fails=lambda: True), shop.step("d")], name="stuck")
    lost = Saga([shop.step("e")], name="lost")
    await disk.killed(rolled, "b", run_id="1")
    await disk.killed(stuck, "d", run_id="2")
    await disk.killed(lost, "e", run_id="3")
    await disk.killed(rolled, "a", run_id="4")
    async with disk.process() as journal:
        await journal.run(number_saga(shop), 1, run_id="ended")
        report = await journal.recover([rolled, stuck])
        states = {info.run_id: info.state for info in await journal.runs()}

    assert [("1", RunState.COMPENSATED), ("4", RunState.COMPENSATED)] == [
        (one.run_id, one.state) for one in report.recovered
    ]
    assert all(isinstance(one.error, RunInterrupted) for one in report.recovered)
    (failed,) = report.failed
    assert ("2", "stuck", CompensationFailed) == (failed.run_id, failed.saga, type(failed.error))
    assert SagaState.FAILED is failed.outcome.state
    (left,) = report.left
    assert ("3", None) == (left.run_id, left.outcome)
    assert "run '3' is one of saga 'lost', version None, which was not given" in str(left.error)
    assert "Given: rolled back, stuck" in str(left.error)
    assert ((), False) == (report.in_progress, report.ok)
    assert RunState.RUNNING is states["3"]
    assert "outcome" not in repr(failed)


async def test_recover_without_definitions_says_so(disk, shop):
    """With no sagas at all, the message says that none was given."""
    await disk.killed(number_saga(shop), "a", 1)
    async with disk.process() as journal:
        report = await journal.recover([])

    assert "Given: none" in str(report.left[0].error)


async def test_recover_refuses_two_sagas_of_one_name(journal, shop):
    """A run finds its saga by name and version, so no two may have the same; the same twice may."""
    one, other = number_saga(shop), number_saga(shop)
    with pytest.raises(ValueError, match="two sagas have the name 's' and the version None"):
        await journal.recover([one, other])

    assert (await journal.recover([one, one])).ok


async def test_recover_completes_runs_past_their_commit(disk, shop):
    """A run that has passed its commit is carried on to its end, and is in the report as completed."""
    whole = Saga([shop.step("a"), Commit(), shop.step("b")], name="s")
    await disk.killed(whole, "b")
    async with disk.process() as journal:
        (recovered,) = (await journal.recover([whole])).recovered

    assert (RunState.COMPLETED, None) == (recovered.state, recovered.error)
    assert SagaState.COMPLETED is recovered.outcome.state


async def test_recover_takes_expected_failures_for_recovered(disk, shop):
    """A failure that the saga's definition expects is an outcome, in a recovery as elsewhere."""
    whole = Saga([shop.step("a"), shop.step("b", fails=Boom("b"))], name="s", exceptions=Boom)
    await disk.killed(whole, "b")
    async with disk.process() as journal:
        (recovered,) = (await journal.recover([whole], on_crash="resume")).recovered

    assert (RunState.COMPENSATED, Boom) == (recovered.state, type(recovered.error))


async def test_recover_has_a_limit(disk, shop):
    """No more runs than told are recovered at once; and all are, in the end."""
    at_once = most = 0
    two = Event()

    async def act() -> None:
        shop.begin("a")

    async def back() -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        if at_once == 2:
            two.set()
        await two.wait()
        at_once -= 1

    whole = Saga([Step(act, back, name="a")], name="s")
    for number in range(5):
        await disk.killed(whole, "a", run_id=str(number))
    async with disk.process() as journal:
        report = await journal.recover([whole], limit=2)

    assert (5, 2) == (len(report.recovered), most)


async def test_recover_leaves_runs_that_are_under_way(journal, shop):
    """A run that this process has in hand is not touched, and is in the report by its id."""
    reports = []

    async def look() -> None:
        reports.append(await journal.recover([whole]))

    whole = Saga([Step(look, look, name="look")], name="s")
    await journal.run(whole, run_id="r")

    assert [RecoveryReport(in_progress=("r",))] == reports
    assert reports[0].ok


async def test_recover_leaves_what_cannot_be_called_as_it_was(disk, shop):
    """A saga that takes other arguments now is another saga: the run is left (D4)."""
    await disk.killed(number_saga(shop), "a", 1)

    @saga(name="s")
    async def changed(scope: SagaScope) -> None:
        raise AssertionError  # pragma: no cover - it cannot be called

    @saga(name="s")
    async def retyped(scope: SagaScope, number: list[int]) -> None:
        raise AssertionError  # pragma: no cover - it cannot be called

    async with disk.process() as journal:
        (one,) = (await journal.recover([changed])).left
        (other,) = (await journal.recover([retyped])).left
        assert RunState.RUNNING is (await journal.runs())[0].state

    assert isinstance(one.error, SagaChanged)
    assert "it cannot be called as it was" in str(one.error)
    assert isinstance(other.error, NotRecordable)
    assert "has the type of a parameter changed since?" in str(other.error)


async def test_recover_by_somebody_else_in_the_meantime(disk, shop):
    """A run that somebody else has ended meanwhile counts as recovered, without an outcome."""
    whole = number_saga(shop)
    await disk.killed(whole, "a", 1)
    async with disk.process() as journal:
        unfinished = await journal._unfinished()
        assert (await journal.recover([whole])).recovered[0].outcome is not None

        async def stale() -> Any:
            return unfinished

        journal._unfinished = stale
        report = await journal.recover([whole])

    assert (Recovered("r", "s", RunState.COMPENSATED),) == report.recovered


async def test_d8_a_result_that_the_journal_does_not_take_stops_the_run(disk, shop):
    """Where the last result cannot be recorded, the run is taken back; nobody is told otherwise (D8)."""
    whole = Saga([shop.step("a"), shop.step("b")], name="s")
    async with disk.process() as journal:
        append = journal._append

        def full(key: int, kind: EventKind, path: Any, name: str, data: bytes = b"") -> None:
            if (kind, name) == (EventKind.DONE, "b"):
                raise JournalError("full")
            append(key, kind, path, name, data)

        journal._append = full
        with pytest.raises(JournalError, match="full"):
            await journal.run(whole, run_id="r")
        assert set() == shop.there
        assert [(RunState.RUNNING, False)] == [
            (info.state, info.alive) for info in await journal.runs()
        ]
        kinds = [(event.kind, event.name) for event in await journal.history("r")]
    async with disk.process() as journal:
        assert (await journal.recover([whole])).ok

    assert [
        (EventKind.STARTED, "a"),
        (EventKind.DONE, "a"),
        (EventKind.STARTED, "b"),
        (EventKind.INTERRUPTED, "s"),
    ] == kinds
    assert set() == shop.there


@pytest.mark.parametrize("before", [(), (Commit(),)])
async def test_d8_the_error_of_a_journal_that_fails_does_not_grow_with_the_rollback(before, disk, shop):
    """Its traceback says where it failed, once, however many compensations are not recorded, or not run (D8)."""

    async def frames(steps: int) -> tuple[int, int]:
        parts = [*before, *(shop.step(f"{steps} {number}") for number in range(steps))]
        whole = Saga(parts, name="s")
        async with disk.process() as journal:
            append = journal._append

            def full(key: int, kind: EventKind, path: Any, name: str, data: bytes = b"") -> None:
                if (kind, path) == (EventKind.STARTED, (len(parts) - 1,)):
                    raise JournalError("full")
                append(key, kind, path, name, data)

            journal._append = full
            with pytest.raises(JournalError, match="full") as caught:
                await journal.run(whole, run_id=f"r{steps}")
        return len(caught.traceback), len(getattr(caught.value, "__notes__", ()))

    assert await frames(2) == await frames(20)


@pytest.mark.parametrize("committed", [True, False])
async def test_d8_what_a_recovery_would_carry_on_is_not_taken_back(committed, disk, shop):
    """Past its commit, or begun to be resumed, a run whose journal fails is left for recovery as it is (D8)."""
    parts = [shop.step("a"), *([Commit()] if committed else []), shop.step("b"), shop.step("c")]
    whole = Saga(parts, name="s")
    async with disk.process() as journal:
        append = journal._append

        def full(key: int, kind: EventKind, path: Any, name: str, data: bytes = b"") -> None:
            if (kind, name) == (EventKind.STARTED, "c"):
                raise JournalError("full")
            append(key, kind, path, name, data)

        journal._append = full
        with pytest.raises(JournalError, match="full"):
            await journal.run(whole, run_id="r", on_crash="rollback" if committed else "resume")
        assert {"a", "b"} == shop.there
    async with disk.process() as journal:
        assert (await journal.recover([whole], on_crash="resume")).ok

    assert ["a", "b", "c"] == shop.log


@pytest.mark.parametrize("committed", [True, False])
async def test_d8_a_rollback_of_what_would_be_carried_on_stops_where_it_is_not_recorded(
    committed, disk, shop
):
    """Of such a run nothing is taken back that recovery would not know of (D8)."""
    parts = [shop.step("a"), *([Commit()] if committed else []), shop.step("b")]
    whole = Saga([*parts, shop.step("c", fails=Boom("c"))], name="s")
    async with disk.process() as journal:
        append = journal._append

        def full(key: int, kind: EventKind, path: Any, name: str, data: bytes = b"") -> None:
            if (kind, name) == (EventKind.COMPENSATING, "b"):
                raise JournalError("full")
            append(key, kind, path, name, data)

        journal._append = full
        with pytest.raises(JournalError, match="full"):
            await journal.run(whole, run_id="r", on_crash="rollback" if committed else "resume")
        assert ["a", "b", "c", "-c"] == shop.log
    async with disk.process() as journal:
        await journal.recover([whole], on_crash="resume")

    assert ["a", "b", "c", "-c", "-b", *([] if committed else ["-a"])] == shop.log


async def test_d6_a_run_that_is_taken_back_later_is_in_hand(disk, shop):
    """While an outcome takes its run back, nobody else does, in this process either (D6)."""
    told: list[Any] = []

    async def ask() -> None:
        told.append((await journal.recover([whole])).in_progress)
        with pytest.raises(RunInProgress):
            await journal.run(whole, run_id="r")
        with pytest.raises(ScopeBusy):
            await outcome.rollback()

    whole = Saga([Step(lambda: None, ask, name="a"), shop.step("b")], name="s")
    async with disk.process() as journal:
        outcome = await journal.run(whole, run_id="r")
        later = await outcome.rollback()
        assert SagaState.COMPENSATED is later.state
        assert SagaState.COMPENSATED is (await outcome.rollback()).state

    assert [("r",)] == told
    assert ["b", "-b"] == shop.log


async def test_d8_an_outcome_takes_back_no_run_that_was_pruned(journal, shop):
    """Once its run is forgotten, an outcome can take nothing back: it says so, and does nothing (D8)."""
    whole = Saga([shop.step("a")], name="s")
    outcome = await journal.run(whole, run_id="r")
    await journal.prune(before=time.time() + 1)
    with pytest.raises(JournalError, match="pruned"):
        await outcome.rollback()

    assert ["a"] == shop.log


async def test_d8_what_a_recovery_would_carry_on_is_not_taken_back_by_a_later_failure(disk, shop):
    """Past its commit, a run of which a result was not recorded is left as it is, whatever fails then (D8)."""

    @saga(name="s")
    async def whole(scope: SagaScope) -> None:
        await scope.commit()
        await scope.step(shop.step("a"))
        if disk.journal_fails:
            raise Boom

    async with disk.process() as journal:
        append = journal._append

        def full(key: int, kind: EventKind, *event: Any) -> None:
            if kind is EventKind.DONE:
                raise JournalError("full")
            append(key, kind, *event)

        journal._append = full
        disk.journal_fails = True
        with pytest.raises(JournalError, match="full"):
            await journal.run(whole, run_id="r")
        assert ({"a"}, ["a"]) == (shop.there, shop.log)
        assert RunState.RUNNING is (await journal.info("r")).state
    async with disk.process() as journal:
        disk.journal_fails = False
        assert (await journal.recover([whole])).ok

    assert {"a"} == shop.there


async def test_d4_a_run_that_was_given_up_runs_nothing_more(disk, shop):
    """A function that catches `SagaChanged`, at the end of what was recorded, comes no further (D4)."""

    @saga(name="s")
    async def before(scope: SagaScope) -> None:
        await scope.step(Step(lambda: "one", None, name="a"))
        await scope.step(shop.step("b"))

    def number() -> int:
        raise AssertionError  # pragma: no cover - it is recorded

    @saga(name="s")
    async def after(scope: SagaScope) -> None:
        with suppress(SagaChanged):
            await scope.step(Step(number, None, name="a"))
        await scope.step(shop.step("c"))

    async with disk.process() as journal:
        append = journal._append

        def die_before_b(key: int, kind: EventKind, path: Any, name: str, data: bytes = b"") -> None:
            if name == "b":
                disk.kill(journal)
                raise Killed
            append(key, kind, path, name, data)

        journal._append = die_before_b
        with pytest.raises((Killed, CompensationFailed, BaseExceptionGroup)):
            await journal.run(before, run_id="r")
    async with disk.process() as journal:
        report = await journal.recover([after], on_crash="resume")

    assert "the recorded result of 'a'" in str(report.left[0].error)
    assert [] == shop.log


async def test_d8_nothing_is_recorded_of_a_run_after_it_was_taken_back_later(
    journal, shop, monkeypatch
):
    """Its number is forgotten then, as after any end (D8)."""
    made = []

    class Noted(RunMiddleware):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr("pysagas.durable._journal.RunMiddleware", Noted)
    outcome = await journal.run(Saga([shop.step("a")], name="s"), run_id="r")
    assert [True] == [one.recorder.is_closed for one in made]
    await outcome.rollback()

    assert [True] == [one.recorder.is_closed for one in made]
    assert "compensated" in [event.kind.value for event in await journal.history("r")]


@pytest.mark.parametrize("committed", [True, False])
async def test_d8_what_a_run_has_left_behind_does_no_harm_to_others(committed, disk, shop):
    """A step that outlives its run is taken back, and nothing of it recorded where nobody would look (D8)."""
    begun, go = Event(), Event()
    refused: list[str] = []

    @saga(name="left")
    async def left(scope: SagaScope) -> None:
        await scope.step(shop.step("a"))
        if committed:
            await scope.commit()
        tasks.start_soon(outlive, scope)
        await begun.wait()

    async def wait() -> None:
        begun.set()
        await go.wait()

    async def outlive(scope: SagaScope) -> None:
        with pytest.raises(JournalError, match="the run has ended"):
            await scope.step(Saga([shop.step("b"), Step(wait), shop.step("c")], name="inner"))
        refused.append("c")

    async with disk.process() as journal, create_task_group() as tasks:
        with pytest.raises(ScopeBusy):
            await journal.run(left, run_id="left")
        before = await journal.history("left")
        others = [
            Saga([shop.step(f"{name} {number}") for number in range(5)], name=name) for name in "xyz"
        ]
        go.set()
        async with create_task_group() as runs:
            for other in others:
                runs.start_soon(partial(journal.run, other, run_id=other.name))
        states = {info.run_id: info.state for info in await journal.runs()}
        assert before == await journal.history("left")
        writer = getattr(journal, "_writer", None)
        assert writer is None or (writer._numbers, writer._lost) == ({}, {})

    assert refused == ["c"]
    assert states == {"left": RunState.FAILED, **dict.fromkeys("xyz", RunState.COMPLETED)}
    assert {"b", "c"}.isdisjoint(shop.there)
    assert "b" in shop.log


async def test_d8_a_later_rollback_of_which_the_end_is_not_taken_is_recovered(disk, shop):
    """All is taken back, and the journal cannot say so: it lets go of the run, for whoever recovers it (D8)."""
    whole = Saga([shop.step("a"), shop.step("b")], name="s")
    async with disk.process() as journal:
        outcome = await journal.run(whole, run_id="r")
        end = journal._end

        async def full(*args: Any) -> None:
            journal._end = end
            raise JournalError("full")

        journal._end = full
        with pytest.raises(JournalError, match="full"):
            await outcome.rollback()
        assert [(RunState.RUNNING, False)] == [
            (info.state, info.alive) for info in await journal.runs()
        ]
        assert (await journal.recover([whole], on_crash="resume")).ok
        assert RunState.COMPENSATED is (await journal.info("r")).state
    assert set() == shop.there


async def test_d1_what_a_middleware_returns_in_place_of_a_failure_is_no_value(journal, shop):
    """A run that is taken back ends as it does without a journal, whoever swallows what it failed by (D1)."""

    async def swallow(effect: Effect, call_next: Any) -> object:
        try:
            return await call_next()
        except Boom:
            if effect.kind != "saga":
                raise
            return "swallowed"

    whole = Saga(
        [shop.step("a"), shop.step("b", fails=Boom("b"))],
        name="s",
        middleware=[swallow],
        exceptions=Boom,
    )
    outcome = await journal.run(whole, run_id="r")

    assert (SagaState.COMPENSATED, "Boom('b')") == (outcome.state, repr(outcome.error))
    assert RunState.COMPENSATED is (await journal.info("r")).state
    assert set() == shop.there


async def test_d8_a_later_rollback_that_the_journal_does_not_take_is_recovered(disk, shop):
    """A journal that fails while a completed run is taken back stops nothing; the rest is recovered (D8)."""
    whole = Saga([shop.step("a"), shop.step("b")], name="s")
    async with disk.process() as journal:
        outcome = await journal.run(whole, run_id="r")
        append = journal._append

        def full(key: int, kind: EventKind, *event: Any) -> None:
            if kind is EventKind.COMPENSATED:
                raise JournalError("full")
            append(key, kind, *event)

        journal._append = full
        assert SagaState.COMPENSATED is (await outcome.rollback()).state
        assert [(RunState.RUNNING, False)] == [
            (info.state, info.alive) for info in await journal.runs()
        ]
    assert set() == shop.there
    async with disk.process() as journal:
        assert (await journal.recover([whole])).ok
        assert [RunState.COMPENSATED] == [info.state for info in await journal.runs()]


async def test_a_value_whose_type_has_changed_cannot_be_recalled(journal, shop):
    """A saga that returns something else now does not give the recorded value as that (D4)."""
    await journal.run(number_saga(shop), 21, run_id="r")

    @saga(name="s")
    async def changed(scope: SagaScope, number: int) -> list[int]:
        raise AssertionError  # pragma: no cover - it has run already

    with pytest.raises(
        SagaChanged, match="the recorded value of run 'r' of saga 's', 42, cannot be read"
    ):
        await journal.run(changed, 21, run_id="r")


async def test_d1_a_step_that_was_cut_off_is_recalled_as_it_was(journal, shop):
    """The outcome of a run that was cancelled tells what had not begun, the second time too (D1)."""

    async def waits(attempt: Any) -> None:
        scope.cancel()
        await Event().wait()

    whole = Saga([shop.step("a"), shop.step("b", retry=waits)], name="s")
    with CancelScope() as scope:
        await journal.run(whole, run_id="r")
    with pytest.raises(RunInterrupted) as caught:
        await journal.run(whole, run_id="r")

    assert {"a": StepState.COMPENSATED, "b": StepState.NOT_STARTED} == {
        step.name: step.state for step in caught.value.outcome.steps
    }


async def test_d6_another_journal_of_the_process_does_not_take_a_run_in_hand(shop):
    """Two memory journals of the same runs know what the other has in hand (D6)."""
    refused = []
    journal = MemoryJournal()

    async def again() -> None:
        other = copy(journal)
        other._in_hand = set()
        with pytest.raises(RunInProgress, match="run 'r' is under way"):
            await other.run(whole, run_id="r")
        refused.append((await other.recover([whole])).in_progress)

    whole = Saga([Step(again, name="again")], name="s")
    await journal.run(whole, run_id="r")

    assert [("r",)] == refused


@pytest.mark.parametrize("again", [False, True])
async def test_recover_leaves_out_what_was_pruned_in_the_meantime(again, disk, shop):
    """A run that somebody else has ended and pruned is not run anew, nor another one of its name (D6)."""
    whole = number_saga(shop)
    await disk.killed(whole, "a", 1)
    async with disk.process() as journal:
        unfinished = await journal._unfinished()
        assert (await journal.recover([whole])).ok
        assert 1 == await journal.prune(before=time.time() + 1)
        if again:
            await journal.run(whole, 2, run_id="r")
        before = await journal.runs()

        async def stale() -> Any:
            return unfinished

        journal._unfinished = stale
        report = await journal.recover([whole])

        assert (RecoveryReport(), before) == (report, await journal.runs())
    assert {"a": 1 + again} == shop.begun


class Stopped(BaseException):
    """What is no Exception, and no order to stop either."""


@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
@pytest.mark.parametrize("kind", [Stopped, asyncio.CancelledError])
async def test_recover_goes_on_whatever_one_run_raises(kind, disk):
    """An action that raises a cancellation by itself harms no other run, and is in the report."""
    begun: list[int] = []

    async def act(number: int) -> None:
        begun.append(number)
        if len(begun) <= 3:
            disk.kill(journal)
            raise Boom
        if number == 0:
            raise kind

    whole = Saga([Step(act, name="a")], name="s")
    for number in range(3):
        async with disk.process() as journal:
            with pytest.raises((Killed, BaseExceptionGroup)):
                await journal.run(whole, number, run_id=str(number))
    async with disk.process() as journal:
        report = await journal.recover([whole], on_crash="resume")

    assert [("0", kind), ("1", type(None)), ("2", type(None))] == [
        (one.run_id, type(one.error)) for one in report.recovered
    ]
    assert [RunState.COMPENSATED, RunState.COMPLETED, RunState.COMPLETED] == [
        one.state for one in report.recovered
    ]
    assert ([0, 1, 2] * 2, (), ()) == (begun, report.left, report.in_progress)


async def test_an_order_to_stop_is_not_the_business_of_one_run():
    """Ctrl-C, an exit and the cancellation of a recovery end it, though one run alone raised them."""
    assert not _is_for_all(Boom())
    assert not _is_for_all(get_cancelled_exc_class().__new__(get_cancelled_exc_class()))
    assert _is_for_all(SystemExit())
    assert _is_for_all(BaseExceptionGroup("", [Boom(), KeyboardInterrupt()]))
    with CancelScope() as scope:
        scope.cancel()
        assert _is_for_all(Stopped())


# --- retry --------------------------------------------------------------------------------------------


def stuck_saga(shop: Shop, broken: list[str]) -> Saga[..., Any]:
    """Cannot take back what is broken."""
    steps = [shop.step(name, back_fails=lambda name=name: name in broken) for name in "abc"]
    return Saga([*steps, shop.step("d", fails=Boom("d"))], name="s")


@pytest.mark.parametrize("broken", [["a"], ["b"], ["c"], ["a", "b", "c"]], ids="".join)
async def test_retry_takes_back_what_could_not_be_taken_back(broken, disk, shop):
    """When its cause is mended, a FAILED run is taken back: each compensation that failed, and only it (D8)."""
    failing = list(broken)
    whole = stuck_saga(shop, failing)
    async with disk.process() as journal:
        with pytest.raises(CompensationFailed):
            await journal.run(whole, run_id="r")
        assert set(broken) == shop.there
    async with disk.process() as journal:
        with pytest.raises(CompensationFailed):
            await journal.retry(whole, "r")
        assert RunState.FAILED is (await journal.runs())[0].state
    failing.clear()
    async with disk.process() as journal:
        before = len(shop.log)
        with pytest.raises(Boom):
            await journal.retry(whole, "r")
        with pytest.raises(Boom) as caught:
            await journal.run(whole, run_id="r")
        kinds = [event.kind for event in await journal.history("r")]
        assert RunState.COMPENSATED is (await journal.runs())[0].state

    assert sorted(f"-{name}" for name in broken) == sorted(shop.log[before:])
    assert 2 == kinds.count(EventKind.RETRY)
    assert {StepState.COMPENSATED} == {step.state for step in outcome_of(caught.value).steps}
    assert dict.fromkeys("abcd", 1) == shop.begun


@pytest.mark.parametrize(
    "broken", [["nested"], ["before"], ["x"], ["y"], ["x", "nested"]], ids="-".join
)
async def test_retry_of_nested_rollbacks(broken, disk, shop):
    """The same for failures in a save-point, in a group, and beside what has been taken back (D8)."""
    failing = list(broken)

    def step(name: str, **options: Any) -> Step[..., str]:
        return shop.step(name, back_fails=lambda: name in failing, **options)

    @saga
    async def branch(scope: SagaScope) -> None:
        await scope.step(step("before"))
        async with scope.nested() as nested:
            await nested.step(step("nested"))
            await nested.step(step("last", fails=Boom("last")))

    whole = Saga(
        [shop.step("first"), Parallel(step("x"), branch, step("y"), on_failure="finish")], name="s"
    )
    async with disk.process() as journal:
        with pytest.raises(CompensationFailed):
            await journal.run(whole, run_id="r")
        assert set(broken) == shop.there
    failing.clear()
    async with disk.process() as journal:
        with fail_after(10), pytest.raises(ExceptionGroup):
            await journal.retry(whole, "r")

        assert RunState.COMPENSATED is (await journal.runs())[0].state
    assert set() == shop.there
    assert {1} == {
        shop.log.count(f"-{name}") for name in ("first", "x", "y", "before", "nested", "last")
    }


async def test_retry_past_a_commit_acts_under_other_keys(disk, shop):
    """What was taken back past the commit is done anew, under keys of its own (D8)."""
    keys: list[str] = []
    failing = ["c"]

    async def act() -> None:
        effect = current_effect()
        assert effect is not None
        keys.append(effect.key)

    async def back() -> None:
        effect = current_effect()
        assert effect is not None
        keys.append(f"-{effect.action_key}")

    async def fail() -> None:
        if failing:
            raise Boom

    whole = Saga([shop.step("a"), Commit(), Step(act, back, name="b"), Step(fail, name="c")], name="s")
    async with disk.process() as journal:
        with pytest.raises(Boom):
            await journal.run(whole, run_id="r")
    async with disk.process() as journal:
        with pytest.raises(Boom):
            await journal.retry(whole, "r")
        failing.clear()
        outcome = await journal.retry(whole, "r")

    assert SagaState.COMPLETED is outcome.state
    assert ["r/2/action", "-r/2/action", "r~1/2/action", "-r~1/2/action", "r~2/2/action"] == keys
    assert {"a": 1} == shop.begun


async def test_retry_goes_on_from_the_last_of_several_commits(disk, shop):
    """What was done before a later commit stays done, and is not done again (D8)."""
    failing = ["c"]

    @saga(name="s")
    async def whole(scope: SagaScope) -> None:
        for name in "ab":
            await scope.step(shop.step(name))
            await scope.commit()
        await scope.step(shop.step("c", fails=Boom("c") if failing else None))

    async with disk.process() as journal:
        with pytest.raises(Boom):
            await journal.run(whole, run_id="r")
        failing.clear()
        await journal.retry(whole, "r")

    assert {"a": 1, "b": 1, "c": 2} == shop.begun


async def test_retry_of_a_run_without_steps(disk, shop):
    """A run of which nothing is recorded but what could not be taken back is tried again (D8)."""
    failing = ["hook"]

    def hook() -> None:
        if failing:
            raise Boom("hook")
        shop.log.append("hook")

    @saga(name="s")
    async def whole(scope: SagaScope) -> None:
        scope.on_rollback(hook)
        raise Boom("s")

    async with disk.process() as journal:
        with pytest.raises(CompensationFailed):
            await journal.run(whole, run_id="r")
        failing.clear()
        with pytest.raises(Boom):
            await journal.retry(whole, "r")
        assert [RunState.COMPENSATED] == [info.state for info in await journal.runs()]

    assert ["hook"] == shop.log


async def test_retry_past_a_commit_first_takes_back_what_could_not_be(disk, shop):
    """A compensation that had failed past the commit is not forgotten: it comes before anything else (D8)."""
    failing = ["b"]
    parts = [
        shop.step("b", back_fails=lambda: "b" in failing),
        shop.step("c", fails=Boom("c")),
    ]
    whole = Saga([shop.step("a"), Commit(), *parts], name="s")
    async with disk.process() as journal:
        with pytest.raises(CompensationFailed):
            await journal.run(whole, run_id="r")
        with pytest.raises(CompensationFailed):
            await journal.retry(whole, "r")
        assert ["a", "b", "c", "-c"] == shop.log
        failing.clear()
        with pytest.raises(Boom):
            await journal.retry(whole, "r")
        assert [RunState.FAILED] == [info.state for info in await journal.runs()]

    assert ["a", "b", "c", "-c", "-b", "b", "c", "-c", "-b"] == shop.log


async def test_retry_of_a_member_that_failed_while_another_went_on(disk, shop):
    """What failed in a member is tried again, in its order, though its sibling went forward after that (D8)."""
    failing = ["stuck", "inner"]

    def step(name: str, **options: Any) -> Step[..., str]:
        return shop.step(name, back_fails=lambda: name in failing, **options)

    @saga
    async def branch(scope: SagaScope) -> None:
        async with scope.nested() as outer:
            await outer.step(step("first"))
            await outer.step(step("stuck"))
            async with outer.nested() as nested:
                await nested.step(step("inner"))
                await nested.step(step("last", fails=Boom("last")))

    slow = Saga([step("slow", pace=(99, 0)), step("slower", pace=(9, 0))])
    whole = Saga([Parallel(branch, slow, on_failure="finish")], name="s")
    async with disk.process() as journal:
        with pytest.raises(CompensationFailed):
            await journal.run(whole, run_id="r")
        assert {"stuck", "inner"} == shop.there
    before = len(shop.log)
    async with disk.process() as journal:
        with fail_after(ENOUGH), pytest.raises(CompensationFailed):
            await journal.retry(whole, "r")
        failing.clear()
        with fail_after(ENOUGH), pytest.raises(ExceptionGroup):
            await journal.retry(whole, "r")
        assert RunState.COMPENSATED is (await journal.runs())[0].state

    assert ["-inner", "-stuck"] == shop.log[before:]
    assert {1} == set(shop.begun.values())


async def test_d8_a_compensation_that_was_ended_is_in_doubt_and_is_tried_again(disk, shop):
    """What is no exception of the compensation's own leaves it in doubt: it is not recorded (D8)."""
    quits = [Killed()]

    async def back() -> None:
        if quits:
            raise quits.pop()
        shop.take("a")

    parts = [Step(lambda: shop.put("a"), back, name="a"), shop.step("b", fails=Boom("b"))]
    whole = Saga(parts, name="s")
    async with disk.process() as journal:
        with pytest.raises(CompensationFailed):
            await journal.run(whole, run_id="r")
        last = (await journal.history("r"))[-1]
        assert (EventKind.COMPENSATING, "a") == (last.kind, last.name)
        with pytest.raises(Boom):
            await journal.retry(whole, "r")

    assert set() == shop.there


async def test_retry_that_is_killed_is_recovered(disk, shop):
    """A retry is a run like others: killed in the middle, it is recovered (D8)."""
    failing = ["b"]
    whole = stuck_saga(shop, failing)
    async with disk.process() as journal:
        with pytest.raises(CompensationFailed):
            await journal.run(whole, run_id="r")
    failing.clear()
    async with disk.process() as journal:
        taking, shop.take = shop.take, lambda name: disk.kill(journal)
        with pytest.raises((CompensationFailed, Killed)):
            await journal.retry(whole, "r")
        shop.take = taking
    assert {"b"} == shop.there
    async with disk.process() as journal:
        assert (await journal.recover([whole])).ok

    assert (set(), 1) == (shop.there, shop.log.count("-a"))


async def test_retry_past_the_commit_goes_on_from_there(disk, shop):
    """A run that failed past its commit is carried on from it: what came after was taken back (D8)."""
    fails: list[BaseException] = [Boom("c")]

    async def act() -> str:
        shop.begin("c")
        if fails:
            raise fails.pop()
        shop.put("c")
        return "done"

    whole = Saga(
        [shop.step("a"), Commit(), shop.step("b"), Step(act, name="c", not_applied=Boom)], name="s"
    )
    async with disk.process() as journal:
        with pytest.raises(Boom):
            await journal.run(whole, run_id="r")
        assert {"a"} == shop.there
    async with disk.process() as journal:
        outcome = await journal.retry(whole, "r")
        again = await journal.run(whole, run_id="r")

    assert (SagaState.COMPLETED, SagaState.COMPLETED) == (outcome.state, again.state)
    assert ({"a", "b", "c"}, {"a": 1, "b": 2, "c": 2}) == (shop.there, shop.begun)


async def test_retry_is_for_failed_runs(journal, shop):
    """A run that has not failed, that there is not, or that is of another saga is refused."""
    whole = number_saga(shop)
    await journal.run(whole, 1, run_id="r")
    with pytest.raises(JournalError, match="run 'r' is completed; only a failed run"):
        await journal.retry(whole, "r")
    with pytest.raises(JournalError, match="run 'x' is not in the journal"):
        await journal.retry(whole, "x")
    failing = Saga([shop.step("b"), Commit(), shop.step("c", fails=Boom("c"))], name="failing")
    with pytest.raises(Boom):
        await journal.run(failing, run_id="f")
    with pytest.raises(SagaChanged, match="give the saga of its name and version"):
        await journal.retry(whole, "f")

    assert RunState.FAILED is (await journal.runs(state=RunState.FAILED))[0].state


async def test_retry_by_somebody_else_at_the_same_time(disk, shop):
    """Of two who try a run again, one is refused, and it is taken back once (D6)."""
    failing = ["b"]
    whole = stuck_saga(shop, failing)
    async with disk.process() as journal:
        with pytest.raises(CompensationFailed):
            await journal.run(whole, run_id="r")
        failing.clear()
        with pytest.raises(Boom):
            await journal.retry(whole, "r")
        (info,) = await journal.runs()
        key = 0 if disk.kind == "memory" else 1
        await journal._reopen(key, RunState.COMPENSATED)  # somebody has it in hand
        with pytest.raises(RunInProgress):
            await journal._reopen(key, RunState.COMPENSATED)
        assert RunState.COMPENSATED is info.state


async def test_retry_of_a_run_that_is_pruned_in_the_meantime(journal, shop):
    """A run that somebody else has taken back and pruned is not run anew by a retry (D6)."""
    failing = ["b"]
    whole = stuck_saga(shop, failing)
    with pytest.raises(CompensationFailed):
        await journal.run(whole, run_id="r")
    stored = await journal._stored("r")
    failing.clear()
    with pytest.raises(Boom):
        await journal.retry(whole, "r")
    assert 1 == await journal.prune(before=time.time() + 1)
    log = list(shop.log)

    async def stale(run_id: str) -> Any:
        return stored

    journal._stored = stale
    with pytest.raises(JournalError, match="run 'r' is not in the journal any more: .* was pruned"):
        await journal.retry(whole, "r")

    assert ([], log) == (await journal.runs(), shop.log)


async def test_retry_of_what_a_function_has_arranged_for_its_rollback(journal, shop):
    """What an ``on_rollback`` has done before a retry is in the outcome, though it never began (D1)."""
    failing = ["a"]

    @saga(name="s")
    async def whole(scope: SagaScope) -> None:
        scope.on_rollback(shop.take, "arranged")
        await scope.step(shop.step("a", back_fails=lambda: bool(failing)))
        await scope.step(shop.step("b", fails=Boom()))

    with pytest.raises(CompensationFailed):
        await journal.run(whole, run_id="r")
    failing.clear()
    steps = []
    for call in (partial(journal.retry, whole, "r"), partial(journal.run, whole, run_id="r")):
        with pytest.raises(Boom) as caught:
            await call()
        steps.append([(one.name, one.path, one.state) for one in outcome_of(caught.value).steps])

    assert steps[0] == steps[1]
    assert ("take", (0,), StepState.COMPENSATED) == steps[1][0]


# --- what is listed -----------------------------------------------------------------------------------


async def test_runs_and_history(disk, shop):
    """Runs are listed, the oldest first, with how they stand; a history with what happened (D1)."""
    before = time.time()
    whole = number_saga(shop)
    failing = Saga([shop.step("b", fails=Boom("b"))], name="failing", version="2")
    silent = Saga([shop.step("d", fails=Boom())], name="silent")
    await disk.killed(Saga([shop.step("c")], name="killed"), "c", run_id="dead")
    async with disk.process() as journal:
        await journal.run(whole, 1, run_id="1")
        for run_id, one in (("2", failing), ("3", silent)):
            with pytest.raises(Boom):
                await journal.run(one, run_id=run_id)
        infos = await journal.runs()
        compensated = await journal.runs(state=RunState.COMPENSATED)
        (ended,) = [info.ended for info in infos if info.run_id == "3"]
        late = await journal.runs(since=ended)
        events = await journal.history("1")
        for look in (journal.history, journal.info):
            with pytest.raises(JournalError, match="run 'none' is not in the journal"):
                await look("none")
        assert infos == [await journal.info(info.run_id) for info in infos]

    assert [
        ("dead", "killed", None, RunState.RUNNING, False),
        ("1", "s", None, RunState.COMPLETED, False),
        ("2", "failing", "2", RunState.COMPENSATED, False),
        ("3", "silent", None, RunState.COMPENSATED, False),
    ] == [(info.run_id, info.saga, info.version, info.state, info.alive) for info in infos]
    assert infos[2:] == compensated
    assert [None, None, "Boom: b", "Boom"] == [info.error for info in infos]
    for info in infos:
        assert before <= info.started <= (info.ended or info.started) <= time.time()
    assert (None, True) == (infos[0].ended, all(info.ended for info in infos[1:]))
    # What has not ended had not ended before, whenever that was.
    assert [infos[0], infos[-1]] == late
    assert [(EventKind.STARTED, (0,), "a", b""), (EventKind.DONE, (0,), "a", b'"result of a"')] == [
        event[:4] for event in events
    ]
    assert all(before <= event.at <= time.time() for event in events)


async def test_a_run_under_way_is_alive(journal, shop):
    """A run that a process has in hand is alive."""
    seen = []

    async def look() -> None:
        seen.extend(await journal.runs())

    await journal.run(Saga([Step(look, name="look")], name="s"), run_id="r")

    assert [(RunState.RUNNING, True)] == [(info.state, info.alive) for info in seen]


async def test_prune_forgets_what_has_ended_well(disk, shop):
    """What completed or was taken back before a time is forgotten; what failed or has not ended is not."""
    whole = number_saga(shop)
    await disk.killed(whole, "a", 1, run_id="dead")
    async with disk.process() as journal:
        await journal.run(whole, 1, run_id="old")
        with pytest.raises(Boom):
            await journal.run(Saga([shop.step("b", fails=Boom())], name="b"), run_id="taken back")
        with pytest.raises(Boom):
            await journal.run(Saga([Commit(), shop.step("b", fails=Boom())], name="b"), run_id="failed")
        assert 0 == await journal.prune(before=0)
        between = time.time()
        await journal.run(whole, 1, run_id="new")

        assert 2 == await journal.prune(before=between)
        assert ["dead", "failed", "new"] == [info.run_id for info in await journal.runs()]
        assert 2 == (await journal.run(whole, 1, run_id="old")).value
        with pytest.raises(JournalError):
            await journal.history("taken back")

    assert 4 == shop.begun["a"]


@pytest.mark.parametrize(
    "before", ["2020-01-01", None, True, math.nan, datetime(2020, 1, 1, tzinfo=UTC)]
)
async def test_pruning_before_what_is_no_number_is_refused(journal, shop, before):
    """SQLite would take a text for later than every number: nothing is forgotten, and it is said what to give."""
    await journal.run(Saga([shop.step("a")], name="s"), run_id="r")
    with pytest.raises(TypeError, match=r"before must be a number, .* of a datetime.*timestamp\(\)"):
        await journal.prune(before=before)
    assert ["r"] == [info.run_id for info in await journal.runs()]


async def test_runs_of_a_state_that_is_none_are_not_looked_for(journal):
    """The value of a state is not the state: no run would be found."""
    with pytest.raises(TypeError, match=r"state must be one of RunState.RUNNING, .* not 'completed'"):
        await journal.runs(state="completed")


@pytest.mark.parametrize("call", ["info", "history"])
async def test_a_run_id_that_is_no_string_is_refused(journal, call):
    """SQLite would refuse it in the midst of what others write."""
    with pytest.raises(TypeError, match=f"journal.{call}: run_id must be a string, not 5"):
        await getattr(journal, call)(5)


async def test_runs_since_what_is_no_number_are_not_looked_for(journal):
    """A time is a number of seconds, here too."""
    with pytest.raises(TypeError, match=r"journal.runs: since must be a number, .* not '2026'"):
        await journal.runs(since="2026")


# --- what is odd in names and in errors -------------------------------------------------------------


class Name(str):
    """A text of somebody's library."""

    __slots__ = ()


async def test_d3_names_may_be_of_a_subclass_of_str(journal, shop):
    """They are recorded as what they say; and other runs hear nothing of it (D3)."""
    step = Step(shop.step("a").action, shop.step("a").compensation, name=Name("a"))
    whole = Saga([Parallel(step, name=Name("group")), shop.step("b", fails=Boom("b"))], name=Name("s"))
    with pytest.raises(Boom):
        await journal.run(whole, run_id="r")
    assert {"a", "b", "group", "s"} == {event.name for event in await journal.history("r")}


async def test_d3_an_error_whose_text_is_no_text_takes_its_run_back(journal, shop):
    """A lone surrogate, as of a cut emoji or a file's name, is recorded with a backslash (D3)."""
    whole = Saga([shop.step("a"), shop.step("b", fails=Boom("cut \ud83d"))], name="s")
    with pytest.raises(Boom):
        await journal.run(whole, run_id="r")
    (rollback,) = (one for one in await journal.history("r") if one.kind is EventKind.ROLLBACK)
    assert (b"Boom: cut \\ud83d", set()) == (rollback.data, shop.there)
    with pytest.raises(Boom):
        await journal.run(whole, run_id="r")


# --- Outcome.rollback -----------------------------------------------------------------------------------


async def test_a_completed_run_is_taken_back_and_recorded(journal, shop):
    """``Outcome.rollback()`` takes a journaled run back, once, and the journal knows (D1)."""
    whole = Saga([shop.step("a", undo=True), shop.step("b")], name="s")
    outcome = await journal.run(whole, run_id="r")
    later = await outcome.rollback()
    again = await outcome.rollback()
    recalled = await journal.run(whole, run_id="r")

    assert later is again
    assert [SagaState.COMPLETED, SagaState.COMPENSATED, SagaState.COMPENSATED] == [
        outcome.state,
        later.state,
        recalled.state,
    ]
    assert (set(), RunState.COMPENSATED) == (shop.there, (await journal.runs())[0].state)
    assert {StepState.COMPENSATED} == {step.state for step in recalled.steps}
    with pytest.raises(SagaError, match="taken back"):
        _ = recalled.value


async def test_a_run_past_its_commit_cannot_be_taken_back(journal, shop):
    """``Outcome.rollback()`` after a commit is an error, and the run stays completed (D1)."""
    outcome = await journal.run(Saga([shop.step("a"), Commit()], name="s"), run_id="r")
    with pytest.raises(AlreadyCommitted):
        await outcome.rollback()

    assert RunState.COMPLETED is (await journal.runs())[0].state


@pytest.mark.parametrize("limited", [False, True])
async def test_a_run_that_could_not_be_taken_back_later_is_failed(limited, journal, shop):
    """A later rollback that fails, or has no time to begin, leaves the run FAILED, to be retried (D8)."""
    failing = ["a"]
    whole = Saga(
        [shop.step("a", back_fails=lambda: "a" in failing and not limited), shop.step("b")],
        name="s",
        rollback_timeout=0 if limited else None,
    )
    outcome = await journal.run(whole, run_id="r")
    with pytest.raises(CompensationFailed):
        await outcome.rollback()
    assert RunState.FAILED is (await journal.runs())[0].state
    failing.clear()
    unlimited = Saga([shop.step("a"), shop.step("b")], name="s")
    with pytest.raises(RunInterrupted):
        await journal.retry(unlimited, "r")

    assert (set(), RunState.COMPENSATED) == (shop.there, (await journal.runs())[0].state)


async def test_killed_in_the_middle_of_a_later_rollback(disk, shop):
    """A process that dies while it takes back a completed run is followed by one that ends that (D3)."""
    whole = Saga([shop.step("a"), shop.step("b"), shop.step("c")], name="s")
    async with disk.process() as journal:
        outcome = await journal.run(whole, run_id="r")
        taking = shop.take

        def take(name: str) -> None:
            taking(name)
            if name == "b":
                disk.kill(journal)

        shop.take = take
        with pytest.raises((Killed, CompensationFailed)):
            await outcome.rollback()
        shop.take = taking
    assert {"a"} == shop.there
    async with disk.process() as journal:
        report = await journal.recover([whole], on_crash="resume")

    assert (True, set(), 1) == (report.ok, shop.there, shop.log.count("-c"))
    assert [RunState.COMPENSATED] == [one.state for one in report.recovered]


async def test_a_run_that_was_pruned_is_not_taken_up_again(disk, shop):
    """No later run takes the place of one that was pruned, to which an outcome still points (D6)."""
    whole = number_saga(shop)
    async with disk.process() as journal:
        old = await journal.run(whole, 1, run_id="old")
        await journal.prune(before=time.time() + 1)
        await journal.run(whole, 2, run_id="new")
        before = await journal.history("new")
        with pytest.raises(SagaError):
            await old.rollback()
        with pytest.raises(JournalError, match="not in the journal any more: .* was pruned"):
            await journal._reopen(0 if disk.kind == "memory" else 1, RunState.FAILED)

        assert [RunState.COMPLETED] == [info.state for info in await journal.runs()]
        assert before == await journal.history("new")


# --- cancellation ---------------------------------------------------------------------------------------


async def test_a_cancelled_run_is_taken_back_and_recorded(journal, shop):
    """A cancelled run is COMPENSATED; who calls it again is told that it was taken back (D1)."""
    whole = Saga([shop.step("a"), shop.step("b", (5, 0))], name="s")
    with CancelScope() as scope:
        shop.moments["b"] = scope.cancel
        await journal.run(whole, run_id="r")

    assert scope.cancelled_caught
    assert (set(), RunState.COMPENSATED) == (shop.there, (await journal.runs())[0].state)
    with pytest.raises(RunInterrupted, match="run 'r' was cancelled, and the run has been taken back"):
        await journal.run(whole, run_id="r")


async def test_a_run_that_was_cancelled_past_its_commit_was_not_taken_back(journal, shop):
    """Who calls it again is told that it has failed, and what becomes of it (D1)."""
    whole = Saga([shop.step("a"), Commit(), shop.step("b", (5, 0))], name="s")
    with CancelScope() as scope:
        shop.moments["b"] = scope.cancel
        await journal.run(whole, run_id="r")
    with pytest.raises(
        RunInterrupted, match="run 'r' was cancelled, and it had passed its commit, .* retry goes on"
    ) as caught:
        await journal.run(whole, run_id="r")

    assert (RunState.FAILED, {"a"}) == ((await journal.runs())[0].state, shop.there)
    assert SagaState.FAILED is caught.value.outcome.state
    assert SagaState.COMPLETED is (await journal.retry(whole, "r")).state


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("elsewhere:Cancelled", "run 'r' was cancelled, and"),
        ("elsewhere:Stop", "run 'r' was ended by Stop, and"),
        (f"{__name__}:Stopped", "run 'r' was ended by Stopped, and"),
        ("pysagas.durable._errors:Interrupted", "the process of run 'r' died, and"),
    ],
)
@pytest.mark.parametrize("grouped", [False, True])
async def test_a_run_that_was_cut_off_says_by_what(kind, message, grouped, journal, shop):
    """Also by what this process does not know, as Trio's cancellation where there is no Trio (D1)."""
    whole = Saga([shop.step("a"), shop.step("b")], name="s")
    await journal.run(whole, run_id="r")
    error = {**encode_error(Stopped()), "type": kind}
    if grouped:
        error = {**encode_error(BaseExceptionGroup("", [Stopped()])), "errors": [error]}
    await journal._reopen(0 if isinstance(journal, MemoryJournal) else 1, RunState.COMPLETED)
    await journal._end(
        0 if isinstance(journal, MemoryJournal) else 1, Ending(RunState.COMPENSATED, b"", error)
    )
    with pytest.raises(RunInterrupted, match=f"^{message} the run has been taken back$"):
        await journal.run(whole, run_id="r")


@pytest.mark.parametrize("call", ["run", "recover"])
async def test_a_call_that_was_cancelled_before_it_began_leaves_nothing_in_hand(call, disk, shop):
    """Cancelled while the journal is asked, nothing has run, and another process may go on (D6)."""
    whole = number_saga(shop)
    if call == "recover":
        await disk.killed(whole, "a", 1)
    async with disk.process() as journal:
        with CancelScope() as scope:
            scope.cancel()
            if call == "run":
                await journal.run(whole, 1, run_id="r")
            else:
                await journal.recover([whole])
        infos = await journal.runs()
        assert not any(info.alive for info in infos)
        report = await journal.recover([whole])

        assert (True, ()) == (report.ok, report.in_progress)
    assert set() == shop.there


async def test_a_retry_that_was_cancelled_before_it_began_can_be_recovered(disk, shop):
    """Cancelled while the journal is asked, a retry leaves nothing in hand either (D8)."""
    failing = ["b"]
    whole = stuck_saga(shop, failing)
    async with disk.process() as journal:
        with pytest.raises(CompensationFailed):
            await journal.run(whole, run_id="r")
        failing.clear()
        reopen = journal._reopen

        async def cancelled(*args: Any) -> None:
            await reopen(*args)
            scope.cancel()
            await checkpoint()

        journal._reopen = cancelled
        with CancelScope() as scope:
            await journal.retry(whole, "r")
        assert [False] == [info.alive for info in await journal.runs()]
        # It was not on its way yet, so it failed as before; and can be tried again.
        assert ["r"] == [one.run_id for one in (await journal.recover([whole])).failed]
        with pytest.raises(Boom):
            journal._reopen = reopen
            await journal.retry(whole, "r")

    assert set() == shop.there


@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
@pytest.mark.parametrize("rounds", range(12))
async def test_a_call_that_is_cancelled_natively_leaves_nothing_in_hand(rounds, disk, shop):
    """The same for ``task.cancel()``, whenever it comes (D6)."""
    whole = number_saga(shop)
    async with disk.process() as journal:
        task = asyncio.ensure_future(journal.run(whole, 1, run_id="r"))
        for _ in range(rounds):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        infos = await journal.runs()
        assert not any(info.alive for info in infos)
        await journal.recover([whole])
        states = [info.state for info in await journal.runs()]

    assert {RunState.COMPENSATED, RunState.COMPLETED} >= set(states)
    assert shop.there == ({"a"} if RunState.COMPLETED in states else set())


async def test_a_cancelled_recovery_leaves_runs_that_can_be_recovered(disk, shop):
    """A recovery that is cancelled ends the rollbacks that it has begun, and loses no run (D3)."""
    whole = Saga([shop.step("a"), shop.step("b")], name="s")
    for number in range(3):
        await disk.killed(whole, "b", run_id=str(number))
    async with disk.process() as journal:
        with CancelScope() as scope:
            taking = shop.take

            def take(name: str) -> None:
                scope.cancel()
                taking(name)

            shop.take = take
            await journal.recover([whole], limit=1)
        assert scope.cancel_called
        states = [info.state for info in await journal.runs()]
        assert not any(info.alive for info in await journal.runs())
        assert (await journal.recover([whole])).ok
        later = [info.state for info in await journal.runs()]

    assert RunState.COMPENSATED is states[0]
    assert RunState.RUNNING in states
    assert [RunState.COMPENSATED] * 3 == later


async def cancelled_recovery(disk: Disk, shop: Shop, cancelled: Any) -> None:
    """Two runs are resumed, one after the other; the first is cancelled while its action waits."""
    waits = Event()
    begun = []

    async def act() -> None:
        begun.append("b")
        waits.set()
        await Event().wait()

    whole = Saga([shop.step("a"), Step(act, name="b")], name="s")
    for number in range(2):
        await disk.killed(whole, "a", run_id=str(number))
    async with disk.process() as journal:
        with fail_after(10):
            await cancelled(partial(journal.recover, [whole], on_crash="resume", limit=1), waits)
        states = [info.state for info in await journal.runs()]

    assert ([RunState.COMPENSATED, RunState.RUNNING], ["b"]) == (states, begun)


async def test_a_recovery_that_is_cancelled_is_no_failure_of_its_run(disk, shop):
    """Cancelled while an action waits, a recovery ends, and begins no other run (D3)."""

    async def cancelled(recover: Any, waits: Event) -> None:
        async with create_task_group() as tasks:
            tasks.start_soon(recover)
            await waits.wait()
            tasks.cancel_scope.cancel()

    await cancelled_recovery(disk, shop, cancelled)


@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
async def test_a_recovery_that_is_cancelled_natively_is_no_failure_of_its_run(disk, shop):
    """The same for ``task.cancel()`` (D3)."""

    async def cancelled(recover: Any, waits: Event) -> None:
        task = asyncio.ensure_future(recover())
        await waits.wait()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    await cancelled_recovery(disk, shop, cancelled)


async def test_runs_at_the_same_time_do_not_meet(journal, shop):
    """Many runs of one journal at the same time are each their own (D6)."""
    gate, all_begun = Event(), Event()
    begun: list[int] = []
    outcomes = {}

    async def wait(number: int) -> None:
        begun.append(number)
        if len(begun) == 20:
            all_begun.set()
        await gate.wait()

    @saga(name="s")
    async def whole(scope: SagaScope, number: int) -> int:
        await scope.step(wait, number)
        return number

    async def one(number: int) -> None:
        outcomes[number] = (await journal.run(whole, number, run_id=str(number))).value

    with fail_after(10):
        async with create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(one, number)
            await all_begun.wait()
            assert 20 == sum(info.alive for info in await journal.runs())
            gate.set()

    assert {number: number for number in range(20)} == outcomes


class Request:
    """What a run is about; it is given to nothing but this run."""

    async def book(self, number: int) -> int:
        return number

    async def cancel(self, number: int) -> None:
        raise AssertionError  # pragma: no cover - nothing is taken back

    def as_function(self) -> Saga[..., Any]:
        async def book(number: int) -> int:
            return await self.book(number)

        @saga(name="s")
        async def whole(scope: SagaScope, number: int) -> int:
            await scope.step(self.book, number, compensation=self.cancel)
            return await scope.step(book, number, compensation=self.cancel)

        return whole

    def as_data(self) -> Saga[..., Any]:
        return Saga([Step(self.book, self.cancel), Step(partial(self.book), self.cancel)], name="s")


@pytest.mark.parametrize("build", [Request.as_function, Request.as_data])
async def test_a_journal_keeps_nothing_alive_of_a_run_that_has_ended(journal, build):
    """Steps may be closures, and methods of what one request has brought: neither is kept for the next."""
    request = Request()
    whole = build(request)
    ended = await journal.run(whole, 1, run_id="r")
    assert ended.state is SagaState.COMPLETED
    alive = weakref.ref(request)

    del request, whole, ended
    gc.collect()

    assert alive() is None
