"""Exploring with killed processes: what is not fit for a journal is found, and what is, is not."""

from __future__ import annotations

import gc
from typing import Any

import pytest
from anyio import create_task_group, fail_after
from anyio.lowlevel import checkpoint
from conftest import WITHOUT_DEBUG
from helpers import Boom
from worlds import three_times

from pysagas import CallNext, Effect, Parallel, Saga, SagaScope, Step, saga
from pysagas.testing import EffectsLedger, Fault, FaultKind, Plan, Trial, explore, faults

pytestmark = pytest.mark.anyio


def found(report: Any) -> set[str]:
    return {str(result.plan) for result in report.failures}


def kills(report: Any) -> set[FaultKind]:
    return {fault.kind for result in report.results for fault in result.plan.faults if fault.kind.kills}


@pytest.mark.parametrize("anyio_backend", WITHOUT_DEBUG, indirect=True)
async def test_a_right_saga_survives_being_killed_at_every_place():
    """D3: groups, branches that are ahead, caught failures, loops, a commit: all is taken back."""

    def trial() -> Trial:
        ledger = EffectsLedger()

        @saga
        async def branch(scope: SagaScope, number: int) -> int:
            for index in range(number):
                await scope.step(ledger.step(f"branch {number}.{index}"))
            return number

        async def fail() -> None:
            await checkpoint()
            raise Boom

        @saga(middleware=[ledger.watch])
        async def tested(scope: SagaScope) -> str:
            await scope.step(ledger.step("first"))
            group = [branch.bind(1), branch.bind(2), ledger.step("shielded", shield=True).bind()]
            assert (1, 2, "shielded") == await scope.parallel(*group)
            try:
                async with scope.nested() as extras:
                    await extras.step(ledger.step("extra"))
                    await extras.step(fail)
            except Boom:
                pass
            await scope.commit()
            await scope.step(ledger.step("last"))
            return "done"

        return Trial(tested, state=ledger.snapshot)

    report = await explore(trial, kills=True)

    assert report.ok, report
    assert {FaultKind.KILLED_BEFORE, FaultKind.KILLED, FaultKind.KILLED_AFTER} == kills(report)


async def test_a_process_is_killed_only_where_that_is_asked_for():
    """Who uses no journal is not told what a journal would need."""

    def trial() -> Trial:
        ledger = EffectsLedger()
        return Trial(Saga([ledger.step("one")]), state=ledger.snapshot)

    assert set() == kills(await explore(trial))


async def test_an_undo_alone_does_not_survive_a_process_that_is_killed_after_the_effect():
    """G3: what the action returned died with the process, so it stays in doubt."""

    def trial() -> Trial:
        ledger = EffectsLedger()
        return Trial(Saga([ledger.step("one", undo=True)]), state=ledger.snapshot)

    report = await explore(trial, kills=True, only=lambda fault: fault.kind.kills)

    assert {"one: killed after its effect", "one: killed at checkpoint 2"} == found(report)
    assert "in doubt, and not compensated: one" in report


async def test_a_compensation_that_is_not_idempotent_is_found():
    """D3: one whose process was killed before it was recorded as done runs again."""

    def trial() -> Trial:
        world = {"stock": 5}

        def take() -> int:
            world["stock"] = 4
            return 1

        def put_back(number: int) -> None:
            world["stock"] += number

        return Trial(Saga([Step(take, undo=put_back)]), state=lambda: world)

    report = await explore(trial, kills=True, only=lambda fault: fault.place.kind == "compensation")

    assert {
        "taking back take: killed after its effect",
        "taking back take: runs twice",
    } == found(report)


async def test_an_effect_between_the_steps_of_a_function_is_found():
    """D4: a replay runs it again."""

    def trial() -> Trial:
        ledger = EffectsLedger()
        world = {"mails": 0}

        def unsend() -> None:
            world["mails"] = max(0, world["mails"] - 1)

        @saga
        async def tested(scope: SagaScope) -> None:
            world["mails"] += 1
            scope.on_rollback(unsend)
            await scope.step(ledger.step("one"))

        return Trial(tested, state=lambda: (ledger.snapshot(), dict(world)))

    report = await explore(trial, kills=True)

    assert "one: killed before its effect" in found(report)
    assert "one: fails before its effect" not in found(report)


async def test_what_was_running_stays_where_it_was_when_its_process_is_killed():
    """A killed process does not come to its `finally`, and its siblings do nothing more."""

    def trial() -> Trial:
        ledger = EffectsLedger()
        cleaned_up: list[str] = []

        async def wait() -> None:
            try:
                for _ in range(5):
                    await checkpoint()
            finally:
                cleaned_up.append("finally")

        async def look() -> None:
            assert [] == cleaned_up

        group = Parallel(Step(wait, look), ledger.step("other", checkpoints=(1, 0)))
        return Trial(Saga([group]), state=ledger.snapshot)

    def only_then(fault: Fault) -> bool:
        return str(fault) == "other: killed at checkpoint 1"

    report = await explore(trial, kills=True, only=only_then)

    (killed,) = [result for result in report.results if result.plan.faults]
    assert killed.ok, report
    # Not so where the same is a mere failure: then the action comes to its end.
    (whole,) = [result for result in report.results if not result.plan.faults]
    assert "taking back wait failed: AssertionError" in str(whole)


async def test_a_process_may_be_killed_again_while_it_recovers():
    """D3: pairs of kills: the next process is killed as well, and a third one ends it."""

    def trial() -> Trial:
        ledger = EffectsLedger()
        saga = Saga([ledger.step("one"), ledger.step("two")], middleware=[ledger.watch])
        return Trial(saga, state=ledger.snapshot)

    def only_kills(fault: Fault) -> bool:
        return fault.kind.kills

    report = await explore(trial, pairs=True, kills=True, only=only_kills)

    assert report.ok, report
    assert {2} <= {len(result.plan.faults) for result in report.results}


def with_a_group() -> Trial:
    """One step after the other, and two at once."""
    ledger = EffectsLedger()
    group = Parallel(ledger.step("b", checkpoints=(1, 0)), ledger.step("c", checkpoints=(0, 0)))
    first = ledger.step("a", checkpoints=(0, 0))
    return Trial(Saga([first, group], middleware=[ledger.watch]), state=ledger.snapshot)


def as_a_function() -> Trial:
    """It goes another way where a step fails, and uses cancel scopes and tasks of its own."""
    ledger = EffectsLedger()

    async def put() -> None:
        with fail_after(5):
            async with create_task_group() as tasks:
                tasks.start_soon(checkpoint)
                ledger.make("put", key="put")

    async def remove() -> None:
        with fail_after(5):
            await checkpoint()
            ledger.take_back("put", key="put")

    @saga(middleware=[ledger.watch])
    async def tested(scope: SagaScope) -> None:
        try:
            await scope.step(put, compensation=remove)
        except Exception:
            await scope.step(ledger.step("instead"))
        await scope.commit()
        await scope.step(ledger.step("last", retry=three_times))

    return Trial(tested, state=ledger.snapshot)


@pytest.mark.parametrize("trial", [with_a_group, as_a_function])
@pytest.mark.parametrize("anyio_backend", WITHOUT_DEBUG, indirect=True)
async def test_a_right_saga_survives_every_fault_beside_a_kill(trial, capfd):
    """D3: what fails or is cancelled before the process is killed, in it or in the next one; and all is quiet."""
    report = await explore(trial, pairs=True, kills=True)

    assert report.ok, report
    both = [{fault.kind.kills for fault in result.plan.faults} for result in report.results]
    assert {True, False} in both
    gc.collect()
    assert ("", "") == capfd.readouterr()


async def test_what_only_a_kill_beside_a_failure_brings_about_is_found():
    """D3: a compensation that bears being repeated only where there is something to take back."""

    def trial() -> Trial:
        world = {"stock": 5, "asked": 0}

        def take() -> None:
            world["stock"] = 4

        def put_back() -> None:
            world["stock"] = 5 + (world["asked"] if world["stock"] == 5 else 0)
            world["asked"] = 1

        return Trial(Saga([Step(take, put_back)]), state=lambda: world["stock"])

    kinds = (FaultKind.FAILS_BEFORE, FaultKind.KILLED_AFTER)
    report = await explore(trial, pairs=True, kills=True, only=lambda fault: fault.kind in kinds)

    assert found(report) >= {
        "take: fails before its effect, then taking back take: killed after its effect"
    }
    assert "was 5, is 6" in report


async def test_what_was_killed_is_ended_when_all_has_been_looked_at():
    """It comes to its `finally` in its own task, after the verdict."""
    ended: list[str] = []
    looked: list[list[str]] = []

    def trial() -> Trial:
        ledger = EffectsLedger()

        async def wait() -> None:
            try:
                ledger.make("wait", key="wait")
                await checkpoint()
            finally:
                ended.append("finally")

        async def back() -> None:
            ledger.take_back("wait", key="wait")

        def look() -> object:
            looked.append(ended.copy())
            return ledger.snapshot()

        return Trial(Saga([Step(wait, back)]), state=look)

    def only_then(fault: Fault) -> bool:
        return str(fault) == "wait: killed at checkpoint 1"

    report = await explore(trial, kills=True, only=only_then)

    assert report.ok, report
    assert looked[-1] == ended[:-1]


async def test_results_and_arguments_need_not_be_recordable():
    """What is explored is the rollback; a real journal says itself what it cannot record."""

    def trial() -> Trial:
        world: set[object] = set()
        given = object()

        async def act(value: object) -> object:
            world.add(value)
            await checkpoint()
            return value

        async def back(value: object) -> None:
            world.discard(value)

        return Trial(Saga([Step(act, back)]), args=(given,), state=lambda: len(world))

    report = await explore(trial, kills=True)

    assert report.ok, report


async def test_a_process_that_ends_before_it_can_be_killed():
    """A kill that is planned after another fault has ended the run did not happen, and that is said."""
    report = await explore(_one, kills=True)
    plans = {str(result.plan): result.plan for result in report.results}
    (failing,) = plans["one: fails before its effect"].faults
    (never,) = plans["back: killed after its effect"].faults

    report = await explore(_one, [Plan((failing, never))], kills=True)

    assert "the planned fault did not happen: back: killed after its effect" in report


async def test_a_process_that_ends_as_expected_before_it_can_be_killed():
    """Where the saga expects the failure, its outcome is kept as any other."""

    def trial() -> Trial:
        ledger = EffectsLedger()
        saga = Saga([ledger.step("one"), ledger.step("back")], exceptions=Exception)
        return Trial(saga, state=ledger.snapshot)

    report = await explore(trial, kills=True)
    assert report.ok, report
    plans = {str(result.plan): result.plan for result in report.results}
    (failing,) = plans["one: fails before its effect"].faults
    (never,) = plans["back: killed after its effect"].faults

    report = await explore(trial, [Plan((failing, never))], kills=True)

    (result,) = report.failures
    assert "the planned fault did not happen: back: killed after its effect" == result.problem
    assert result.outcome is not None
    assert "one: fails before its effect" == str(result.error)
    assert result.outcome.error is result.error


async def test_a_middleware_that_tries_again_does_not_outlive_its_process():
    """D3: whatever is begun after the kill is killed as well, so nothing is done twice."""
    begun: list[str] = []

    async def stubborn(effect: Effect, call_next: CallNext) -> object:
        try:
            return await call_next()
        except BaseException:
            if effect.kind != "action":
                raise
            begun.append(effect.name)
            return await call_next()

    def trial() -> Trial:
        ledger = EffectsLedger()
        return Trial(Saga([ledger.step("one")], middleware=[stubborn]), state=ledger.snapshot)

    report = await explore(
        trial, kills=True, only=lambda fault: fault.kind.kills and fault.place.kind == "action"
    )

    assert report.ok, report
    assert {"one"} == set(begun)
    assert 4 == len([result for result in report.results if result.plan.faults])


def _one() -> Trial:
    ledger = EffectsLedger()
    return Trial(Saga([ledger.step("one"), ledger.step("back")]), state=ledger.snapshot)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_kills_are_among_the_faults_where_that_is_asked_for(backend):
    """`faults(kills=True)` lists them, with readable ids."""
    listed = {str(plan) for plan in faults(_one, kills=True, backend=backend)}

    assert {"one: killed before its effect", "taking back one: killed after its effect"} <= listed


async def test_parameters_that_a_journal_has_as_well_are_the_sagas():
    """A saga may be called with an argument by the name of one of the journal's own options."""

    def trial() -> Trial:
        ledger = EffectsLedger()

        @saga(middleware=[ledger.watch])
        async def tested(scope: SagaScope, *, run_id: int, exceptions: str, on_crash: str) -> None:
            assert (run_id, exceptions, on_crash) == (1, "none", "burn")
            await scope.step(ledger.step("a"))

        kwargs = {"run_id": 1, "exceptions": "none", "on_crash": "burn"}
        return Trial(tested, kwargs=kwargs, state=ledger.snapshot)

    report = await explore(trial, kills=True)

    assert report.ok, report
    assert kills(report)
