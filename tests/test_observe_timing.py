"""Times of a run: when its actions and compensations ran, for its outcome."""

from __future__ import annotations

from types import SimpleNamespace

import anyio
import pytest
from anyio import Event, create_task_group
from anyio.lowlevel import checkpoint
from drawing import Clock
from helpers import GROUPED, SEQUENCES, Boom, World, checked_world, every_way, interrupted

from pysagas import (
    Commit,
    CompensationFailed,
    Parallel,
    Ran,
    Saga,
    SagaScope,
    Step,
    StepState,
    open_saga,
    outcome_of,
    saga,
)
from pysagas.durable import Event as Recorded
from pysagas.durable import EventKind, MemoryJournal
from pysagas.durable._recalled import _times
from pysagas.observe import timing
from pysagas.observe.timing import record_times
from pysagas.testing import virtual_time

pytestmark = pytest.mark.anyio


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "current_time", clock)
    return clock


@pytest.fixture
def world():
    yield from checked_world()


async def failed(runnable):
    """The outcome of a run that raises."""
    with pytest.raises(Exception) as raised:
        await runnable.run()
    return outcome_of(raised.value)


def by_name(outcome):
    """The times of an outcome, as kinds and names in their order."""
    names = {step.path: step.name for step in outcome.steps}
    return [f"{'-' * (ran.kind == 'compensation')}{names[ran.path]}" for ran in outcome.times]


# --- what is noted ------------------------------------------------------------------------------


async def test_when_each_action_and_each_compensation_ran(clock):
    """An outcome says when each action and each compensation ran, since the first of them began."""
    parts = [
        clock.step("flight"),
        Parallel(clock.step("seat", 2), Saga([clock.step("room", 4)], name="hotel")),
        clock.step("charge", 8, fails=Boom()),
        Commit(),
        clock.step("never"),
    ]

    outcome = await failed(Saga(parts, middleware=[record_times()]))

    assert (
        Ran((0,), "action", 0.0, 1.0),
        Ran((1, 0), "action", 1.0, 3.0),
        Ran((1, 1, 0), "action", 3.0, 7.0),
        Ran((2,), "action", 7.0, 15.0),
        Ran((2,), "compensation", 15.0, 15.5),
    ) == outcome.times[:5]
    # What members of a group do at the same time has no order among themselves.
    assert {((1, 0), 0.5), ((1, 1, 0), 0.5)} == {
        (ran.path, ran.ended - ran.began) for ran in outcome.times[5:7]
    }
    assert (Ran((0,), "compensation", 16.5, 17.0),) == outcome.times[7:]


async def test_without_it_there_are_no_times():
    """A run that nobody times has none."""
    outcome = await Saga([Step(checkpoint)]).run()

    assert () == outcome.times


async def test_nothing_ran():
    """A run of nothing has no times, whoever looks."""
    assert () == (await Saga([Commit()], middleware=[record_times()]).run()).times


async def test_what_is_no_step_has_no_times(clock):
    """Sagas, groups, commits and rollbacks are not noted: what is in them is."""
    parts = [Parallel(Saga([clock.step("a")])), Commit(), clock.step("b", fails=Boom())]

    outcome = await failed(Saga(parts, middleware=[record_times()]))

    assert ["a", "b", "-b"] == by_name(outcome)


@pytest.mark.parametrize("shape", [one for one in SEQUENCES if one.__name__ != "with_middleware"])
async def test_every_shape_of_saga_is_timed(shape, world: World):
    """Sagas as data, as functions, as blocks and in sagas have times, forward and back."""
    with pytest.raises(Boom) as raised:
        await shape(world.step("a"), world.step("b", before=Boom()), middleware=[record_times()])

    outcome = outcome_of(raised.value)
    assert ["a", "b", "-b", "-a"] == by_name(outcome)
    assert all(ran.began <= ran.ended for ran in outcome.times)
    assert 0 == outcome.times[0].began


@pytest.mark.parametrize("shape", GROUPED)
async def test_what_a_group_holds_is_timed(shape, world: World):
    """A saga in a member of a group has times, in its own place."""
    with pytest.raises(ExceptionGroup) as raised:
        await shape(world.step("a"), world.step("b", before=Boom()), middleware=[record_times()])

    times = by_name(outcome_of(raised.value))
    assert ["a", "b", "-b", "-a"] == [name for name in times if "nothing" not in name]


async def test_members_of_a_group_at_the_same_time(clock):
    """Members that run at the same time have times that overlap."""
    begun = Event()

    async def first():
        await begun.wait()
        clock.now += 2

    async def second():
        clock.now += 1
        begun.set()
        await checkpoint()

    group = Parallel(Step(first), Step(second))
    times = (await Saga([group], middleware=[record_times()]).run()).times

    assert {(0, 0), (0, 1)} == {ran.path for ran in times}
    assert [0.0, 0.0] == [ran.began for ran in times]
    assert 3.0 == max(ran.ended for ran in times)


async def test_what_is_called_on_rollback(clock):
    """A function that a rollback is to call has the time of a compensation, and none forward."""

    @saga(middleware=[record_times()])
    async def function(scope: SagaScope):
        await scope.step(clock.step("a"))
        scope.on_rollback(clock.step("b").action)
        raise Boom

    outcome = await failed(function)

    assert [((0,), "action"), ((1,), "compensation"), ((0,), "compensation")] == [
        (ran.path, ran.kind) for ran in outcome.times
    ]


async def test_a_block_that_passes_a_commit(clock):
    """A block has times before and after its commit; the block around it has its own."""
    async with open_saga(middleware=[record_times()]) as around:
        await around.step(clock.step("outer"))
        async with open_saga(middleware=[record_times()]) as scope:
            await scope.step(clock.step("a"))
            await scope.commit()
            await scope.step(clock.step("b"))

    assert ["a", "b"] == by_name(scope.outcome)
    assert ["outer"] == by_name(around.outcome)


async def test_another_run_within_an_action_has_its_own_times(clock):
    """A saga that an action runs is another run: each outcome has the times of its own."""
    inner = Saga([clock.step("inner")], middleware=[record_times()])
    outcomes = []

    async def act():
        outcomes.append(await inner.run())
        clock.now += 1

    outcome = await Saga([clock.step("a"), Step(act)], middleware=[record_times()]).run()

    assert (Ran((0,), "action", 0.0, 1.0), Ran((1,), "action", 1.0, 3.0)) == outcome.times
    assert (Ran((0,), "action", 0.0, 1.0),) == outcomes[0].times


async def test_attempts_are_one(clock):
    """What a retry does is within the time of its action."""
    attempts = []

    def act():
        clock.now += 1
        attempts.append(1)
        if len(attempts) < 3:
            raise Boom

    async def again(attempt):
        for _ in range(2):
            try:
                await attempt()
            except Boom:
                clock.now += 10
        return await attempt()

    outcome = await Saga([Step(act, retry=again)], middleware=[record_times()]).run()

    assert (Ran((0,), "action", 0.0, 23.0),) == outcome.times


async def test_an_action_that_runs_twice_has_two_times(clock):
    """What a middleware runs twice has been there twice."""

    async def twice(effect, call_next):
        if effect.kind == "action":
            await call_next()
            clock.now += 1
        return await call_next()

    outcome = await Saga([clock.step("a")], middleware=[twice, record_times()]).run()

    assert (Ran((0,), "action", 0.0, 1.0), Ran((0,), "action", 2.0, 3.0)) == outcome.times


async def test_what_stands_further_in_is_in_the_time(clock):
    """What a middleware that stands after it does is within the time; what one before it does is not."""

    async def slow(effect, call_next):
        clock.now += effect.kind == "action"
        return await call_next()

    outcome = await Saga([clock.step("a")], middleware=[slow, record_times(), slow]).run()

    assert (Ran((0,), "action", 0.0, 2.0),) == outcome.times


# --- however it ends ----------------------------------------------------------------------------


@every_way
async def test_what_is_cancelled_has_an_end(way, world: World):
    """A cancellation, of whatever kind, ends the time of what it cuts off."""
    outcomes = []

    async def work():
        try:
            await trip.run()
        except BaseException as error:
            outcomes.append(outcome_of(error))
            raise

    trip = Saga(
        [world.step("a"), Parallel(world.member("b"), world.member("c"))],
        middleware=[record_times()],
    )

    await interrupted(way, world, "c", work)

    names = by_name(outcomes[0])
    assert ["a", "b", "c"] == names[:3]
    assert {"-b", "-c"} == set(names[3:5])
    assert ["-a"] == names[5:]
    assert all(ran.began <= ran.ended for ran in outcomes[0].times)


@every_way
async def test_a_rollback_that_is_interrupted_has_all_its_times(way, world: World):
    """What is taken back while somebody cancels has its times."""
    outcomes = []

    async def work():
        try:
            await Saga(
                [world.step("a"), world.step("b", before=Boom())], middleware=[record_times()]
            ).run()
        except BaseException as error:
            outcomes.append(outcome_of(error))
            raise

    await interrupted(way, world, "-b", work)

    assert ["a", "b", "-b", "-a"] == by_name(outcomes[0])


async def test_a_compensation_that_fails_has_an_end(clock):
    """A compensation that raises has its time; the others have theirs."""
    parts = [clock.step("a"), clock.step("b", back_fails=Boom()), clock.step("c", fails=Boom())]

    outcome = await failed(Saga(parts, middleware=[record_times()]))

    assert (
        Ran((2,), "compensation", 3.0, 3.5),
        Ran((1,), "compensation", 3.5, 4.0),
        Ran((0,), "compensation", 4.0, 4.5),
    ) == outcome.times[3:]


async def test_a_run_that_had_succeeded_is_taken_back(clock):
    """The outcome of a rollback has the times of both ways; that of before has not changed."""
    outcome = await Saga([clock.step("a")], middleware=[record_times()]).run()

    later = await outcome.rollback()

    assert (Ran((0,), "action", 0.0, 1.0),) == outcome.times
    assert (*outcome.times, Ran((0,), "compensation", 1.0, 1.5)) == later.times


async def test_an_outcome_in_the_middle_of_a_run(clock):
    """What is reported while the run goes on has the times until then."""
    reported = []

    @saga(middleware=[record_times()])
    async def function(scope: SagaScope):
        await scope.step(clock.step("a"))
        try:
            await scope.step(clock.step("b", fails=Boom(), back_fails=Boom()))
        except CompensationFailed as error:
            reported.append(error.outcome)
            raise

    outcome = await failed(function)

    assert ["a", "b", "-b"] == by_name(reported[0])
    assert ["a", "b", "-b", "-a"] == by_name(outcome)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_run_that_is_closed_asks_no_clock(clock, caplog, monkeypatch):
    """Where a run is closed in the middle there may be no clock left, and nobody is troubled."""

    async def act():
        await anyio.sleep_forever()

    run = Saga([Step(act)], middleware=[record_times()]).run()
    run.send(None)
    monkeypatch.setattr(timing, "current_time", None)
    run.close()

    assert [] == caplog.records


async def test_times_may_be_noted_while_a_task_outlives_its_scope(clock):
    """What ends after its saga has is in no outcome of before, and breaks nothing."""
    begun, over = Event(), Event()

    async def act():
        begun.set()
        await over.wait()
        clock.now += 1

    async def late(scope):
        with pytest.raises(Exception, match="ended after its scope"):
            await scope.step(Step(act, name="late"))

    @saga(middleware=[record_times()])
    async def function(scope: SagaScope):
        await scope.step(clock.step("a"))
        tasks.start_soon(late, scope)
        await begun.wait()

    async with create_task_group() as tasks:
        outcome = await failed(function)
        assert ["a", "-a"] == by_name(outcome)
        over.set()

    assert ["a", "-a"] == by_name(outcome)


# --- clocks -------------------------------------------------------------------------------------


def test_the_clock_is_that_of_the_loop():
    """A virtual clock's hours are hours in the outcome."""
    step = Step(lambda: anyio.sleep(3600), name="sleep")
    trip = Saga([step, step], middleware=[record_times()])

    outcome = anyio.run(trip.run, backend="trio", backend_options=virtual_time())

    assert (
        Ran((0,), "action", 0.0, 3600.0),
        Ran((1,), "action", 3600.0, 7200.0),
    ) == outcome.times


async def test_a_clock_that_fails_harms_nobody(monkeypatch, caplog):
    """What the clock raises is reported by the observer, and the saga runs as if it were not there."""

    def broken():
        raise RuntimeError("no time")

    monkeypatch.setattr(timing, "current_time", broken)

    outcome = await Saga([Step(checkpoint)], middleware=[record_times()]).run()

    assert [StepState.COMPLETED] == [step.state for step in outcome.steps]
    assert () == outcome.times
    assert ["pysagas"] == [record.name for record in caplog.records]


# --- with a journal -----------------------------------------------------------------------------


async def test_a_run_under_a_journal_is_timed(clock):
    """What a journal runs is timed like anything else, and its rollback."""
    whole = Saga([clock.step("a")], name="s", middleware=[record_times()])

    outcome = await MemoryJournal().run(whole, run_id="r")
    later = await outcome.rollback()

    assert (Ran((0,), "action", 0.0, 1.0),) == outcome.times
    assert (*outcome.times, Ran((0,), "compensation", 1.0, 1.5)) == later.times


@pytest.fixture
def wall(clock, monkeypatch):
    """The clock of the journal."""
    monkeypatch.setattr("pysagas.durable._memory.time", SimpleNamespace(time=clock))
    return clock


async def test_d1_a_recalled_run_has_the_times_that_were_recorded(wall):
    """A journal recalls when what ran, though nobody else has looked at a clock (D1)."""
    journal = MemoryJournal()
    whole = Saga([wall.step("a"), wall.step("b")], name="s")
    await journal.run(whole, run_id="r")

    recalled = await journal.run(whole, run_id="r")
    taken_back = await recalled.rollback()
    again = await recalled.rollback()

    assert (Ran((0,), "action", 0.0, 1.0), Ran((1,), "action", 1.0, 2.0)) == recalled.times
    assert () == taken_back.times  # nobody looked
    assert (
        *recalled.times,
        Ran((1,), "compensation", 2.0, 2.5),
        Ran((0,), "compensation", 2.5, 3.0),
    ) == again.times


async def test_d1_a_recalled_run_that_failed_has_its_times(wall):
    """The outcome of a recalled failure has the times of both ways (D1)."""
    journal = MemoryJournal()
    whole = Saga([wall.step("a"), wall.step("b", fails=Boom())], name="s")
    outcomes = []
    for _ in range(2):
        with pytest.raises(Exception) as raised:
            await journal.run(whole, run_id="r")
        outcomes.append(outcome_of(raised.value))

    live, recalled = outcomes
    assert () == live.times
    assert ["a", "b", "-b", "-a"] == by_name(recalled)
    assert all(ran.ended is not None for ran in recalled.times)


def test_what_has_no_end_in_a_journal():
    """What was running when its process died has no end; when it ran again, that is another time."""

    def event(kind, path, at):
        return Recorded(kind, path, "name", b"", at)

    times = _times(
        [
            event(EventKind.STARTED, (0,), 1.0),
            event(EventKind.DONE, (0,), 2.0),
            event(EventKind.CUT_OFF, (0,), 3.0),
            event(EventKind.STARTED, (1,), 3.0),
            event(EventKind.STARTED, (1,), 103.0),
            event(EventKind.FAILED, (1,), 104.0),
            event(EventKind.STARTED, (2, 0), 105.0),
            event(EventKind.STARTED, (2, 1), 106.0),
            event(EventKind.ANSWERED, (2, 1), 107.0),
            event(EventKind.ROLLBACK, (), 108.0),
            event(EventKind.COMPENSATING, (0,), 109.0),
            event(EventKind.COMPENSATING, (0,), 110.0),
            event(EventKind.NOT_COMPENSATED, (0,), 111.0),
            event(EventKind.COMPENSATING, (0,), 112.0),
            event(EventKind.COMPENSATED, (0,), 113.0),
        ]
    )

    assert [
        Ran((0,), "action", 1.0, 2.0),
        Ran((1,), "action", 3.0, None),
        Ran((1,), "action", 103.0, 104.0),
        Ran((2, 0), "action", 105.0, None),
        Ran((2, 1), "action", 106.0, 107.0),
        Ran((0,), "compensation", 109.0, None),
        Ran((0,), "compensation", 110.0, 111.0),
        Ran((0,), "compensation", 112.0, 113.0),
    ] == times
