"""Effects as log lines: one where each begins, one where it ends, however it ends."""

from __future__ import annotations

import logging
import re
import types

import pytest
from helpers import GROUPED, SEQUENCES, Boom, Crash, World, checked_world, every_way, interrupted
from mortal import Killed, MortalJournal

from pysagas import (
    CompensationFailed,
    Parallel,
    Saga,
    SagaScope,
    SagaState,
    Step,
    current_effect,
    open_saga,
    saga,
)
from pysagas.durable import SQLiteJournal
from pysagas.observe.logging import log_effects

pytestmark = pytest.mark.anyio

DEBUG, INFO, WARNING, ERROR = logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR


class Lines(logging.Handler):
    """A handler that keeps records, and the middleware that writes to it."""

    def __init__(self):
        super().__init__()
        self.records = []
        # One that no other test can get by its name.
        self.logger = logging.Logger("of this test", DEBUG)  # noqa: LOG001
        self.logger.addHandler(self)
        self.middleware = [log_effects(self.logger)]

    def emit(self, record):
        self.records.append(record)

    @property
    def texts(self):
        """The lines, without what differs from run to run."""
        return [
            re.sub(r" in \d+\.\d{3} s", "", record.getMessage().partition(": ")[2])
            for record in self.records
        ]

    @property
    def events(self):
        return [self.event(record) for record in self.records]

    @staticmethod
    def event(record):
        return f"{record.pysagas_kind} {record.pysagas_name} {record.pysagas_event}"

    @property
    def levels(self):
        return {self.event(record): record.levelno for record in self.records}

    def check_all_ended(self):
        """Every effect that has begun has ended, once."""
        open_effects = []
        for record in self.records:
            effect = (record.pysagas_kind, record.pysagas_path)
            if record.pysagas_event == "begun":
                open_effects.append(effect)
            else:
                open_effects.remove(effect)
        assert [] == open_effects


@pytest.fixture
def lines():
    return Lines()


@pytest.fixture
def world():
    yield from checked_world()


async def nothing():
    pass


# --- the lines ----------------------------------------------------------------------------------


async def test_a_line_where_each_effect_begins_and_one_where_it_ends(world: World, lines):
    """Each effect has a line when it begins, and one when it ends, in the order in which they ran."""
    trip = Saga(
        [
            world.step("flight"),
            Parallel(world.member("hotel"), name="stay"),
            world.step("moon", before=Boom("full")),
        ],
        name="trip",
        middleware=lines.middleware,
    )

    with pytest.raises(Boom):
        await trip.run()

    assert [
        "saga trip begun",
        "action flight begun",
        "action flight completed",
        "group stay begun",
        "action hotel begun",
        "action hotel completed",
        "group stay completed",
        "action moon begun",
        "action moon failed (unknown): Boom('full')",
        "rollback trip begun",
        "compensation moon begun",
        "compensation moon completed",
        "compensation hotel begun",
        "compensation hotel completed",
        "compensation flight begun",
        "compensation flight completed",
        "rollback trip completed",
        "saga trip failed (compensated): Boom('full')",
    ] == lines.texts
    wholes = [record for record in lines.records if record.pysagas_kind in ("group", "rollback")]
    assert [None] * 4 == [record.pysagas_state for record in wholes]


async def test_a_line_begins_with_the_run(lines):
    """Each line begins with the run's id, and one that ends an effect says how long that took."""
    await Saga([Step(nothing)], name="s", middleware=lines.middleware).run_with(run_id="run-7")

    assert "run-7: action nothing begun" == lines.records[1].getMessage()
    assert re.fullmatch(
        r"run-7: action nothing completed in \d+\.\d{3} s", lines.records[2].getMessage()
    )


async def test_an_error_of_several_lines_stays_in_one(world: World, lines):
    """What an exception shows in several lines is one line in the log."""

    class Wordy(Exception):
        def __repr__(self):
            return "Wordy:\n  one\n  two"

    with pytest.raises(Wordy):
        await Saga([world.step("a", before=Wordy())], middleware=lines.middleware).run()

    assert "action a failed (unknown): Wordy: one two" in lines.texts


async def test_a_name_cannot_make_a_line_of_its_own(lines):
    """Whatever stands in a name or a run id, a line of the log stays one, and moves no cursor."""
    await Saga([Step(nothing, name="a\nb\x1b[2J")], middleware=lines.middleware).run_with(run_id="r\r1")

    assert r"r 1: action a b\x1b[2J begun" in [record.getMessage() for record in lines.records]


@pytest.mark.parametrize("shape", [one for one in SEQUENCES if one.__name__ != "with_middleware"])
async def test_every_shape_of_saga_is_logged(shape, world: World, lines):
    """Sagas as data, as functions, as blocks and in sagas are logged alike, step by step."""
    with pytest.raises(Boom):
        await shape(world.step("a"), world.step("b", before=Boom()), middleware=lines.middleware)

    steps = [event for event in lines.events if event.split()[1] in "ab"]
    assert ["action a begun", "action a completed", "action b begun", "action b failed"] == steps[:4]
    assert {"compensation a completed", "compensation b completed"} <= set(steps)
    lines.check_all_ended()


@pytest.mark.parametrize("shape", GROUPED)
async def test_what_a_group_holds_is_logged(shape, world: World, lines):
    """A saga in a member of a group is logged, and all that begins ends."""
    with pytest.raises(ExceptionGroup):
        await shape(world.step("a"), world.step("b", before=Boom()), middleware=lines.middleware)

    assert "action b failed" in lines.events
    assert "compensation a completed" in lines.events
    assert WARNING == lines.levels["group parallel failed"]
    lines.check_all_ended()


async def test_a_retried_step_is_one_effect(lines):
    """Attempts are not logged: a step that is tried again has two lines."""
    attempts = []

    async def act():
        attempts.append("tried")
        if len(attempts) < 3:
            raise Boom

    async def retry(attempt):
        while True:
            try:
                return await attempt()
            except Boom:
                pass

    await Saga([Step(act, retry=retry, name="a")], name="s", middleware=lines.middleware).run()

    assert ["tried"] * 3 == attempts
    assert ["action a begun", "action a completed"] == lines.events[1:-1]


# --- the levels ---------------------------------------------------------------------------------


async def test_levels_of_what_goes_by_plan(lines):
    """A completed run says at INFO what is done, and at DEBUG what begins."""
    group = Parallel(Step(nothing, name="b"), name="g")

    @saga(name="s", middleware=lines.middleware)
    async def whole(scope: SagaScope):
        await scope.step(nothing, name="a")
        await scope.parallel(group)
        await scope.commit()

    await whole.run()

    levels = {text: record.levelno for text, record in zip(lines.texts, lines.records, strict=True)}
    assert {
        "saga s begun": INFO,
        "action a begun": DEBUG,
        "action a completed": INFO,
        "group parallel begun": DEBUG,
        "group g begun": DEBUG,
        "action b begun": DEBUG,
        "action b completed": INFO,
        "group g completed": DEBUG,
        "group parallel completed": DEBUG,
        "commit begun": DEBUG,
        "commit completed": INFO,
        "saga s completed": INFO,
    } == levels


async def test_levels_of_a_failure_that_is_taken_back(world: World, lines):
    """A failure and its rollback are warnings, and what is taken back is information."""
    parts = [world.step("a"), world.step("b", before=Boom())]

    with pytest.raises(Boom):
        await Saga(parts, name="s", middleware=lines.middleware).run()

    expected = {
        "action a completed": INFO,
        "action b failed": WARNING,
        "rollback s begun": INFO,
        "compensation b begun": DEBUG,
        "compensation b completed": INFO,
        "rollback s completed": WARNING,
        "saga s failed": WARNING,
    }
    assert expected == {event: lines.levels[event] for event in expected}


async def test_levels_of_what_could_not_be_taken_back(world: World, lines):
    """A compensation that fails is an error, and so is the end of a saga that it leaves half done."""
    parts = [world.step("a", back=Crash()), world.step("b", before=Boom())]

    with pytest.raises(CompensationFailed):
        await Saga(parts, name="s", middleware=lines.middleware).run()

    assert ERROR == lines.levels["compensation a failed"]
    assert "compensation a failed (compensation failed): Crash()" in lines.texts
    assert ERROR == lines.levels["saga s failed"]
    assert "failed" == lines.records[-1].pysagas_state


# Those of the action and of the saga.
@pytest.mark.parametrize(("level", "failures"), [(ERROR, 0), (WARNING, 2)])
async def test_what_nobody_listens_to_is_not_made(level, failures, world: World, lines):
    """Below the logger's level no line is made, and an exception is not asked how it looks."""
    looked = []

    class Shy(Exception):
        def __repr__(self):
            looked.append(self)
            return "Shy"

    lines.logger.setLevel(level)
    with pytest.raises(Shy):
        await Saga([world.step("a", before=Shy())], middleware=lines.middleware).run()

    assert failures == len(looked)
    assert failures == len([event for event in lines.events if event.endswith("failed")])


# --- the extra ----------------------------------------------------------------------------------


async def test_each_line_says_what_it_says_for_programs_too(lines):
    """The extra of a line names the effect, how it ended, and the keys that services were given."""
    keys = {}

    async def act():
        keys["act"] = current_effect().key

    async def back():
        keys["back"] = current_effect().key

    async def fail():
        raise Boom

    parts = [Step(act, back, name="a"), Step(fail, name="b", not_applied=Boom)]
    with pytest.raises(Boom):
        await Saga([Saga(parts, name="in")], name="out", middleware=lines.middleware).run_with(
            run_id="r"
        )

    found = {lines.event(record): record for record in lines.records}
    expected = {
        "pysagas_event": "completed",
        "pysagas_kind": "compensation",
        "pysagas_saga": "in",
        "pysagas_run_id": "r",
        "pysagas_name": "a",
        "pysagas_path": "0.0",
        "pysagas_key": keys["back"],
        "pysagas_action_key": keys["act"],
        "pysagas_carried_on": 0,
        "pysagas_state": "compensated",
        "pysagas_error": None,
    }
    assert expected == {name: getattr(found["compensation a completed"], name) for name in expected}
    expected = {
        "pysagas_key": "r/0.1/action",
        "pysagas_action_key": None,
        "pysagas_state": "not applied",
        "pysagas_error": "Boom()",
    }
    assert expected == {name: getattr(found["action b failed"], name) for name in expected}
    assert keys["act"] == found["action a begun"].pysagas_key
    assert None is found["saga out begun"].pysagas_key
    assert "" == found["saga out begun"].pysagas_path
    assert None is found["action a begun"].pysagas_duration
    assert 0 <= found["action a completed"].pysagas_duration < 60


async def test_a_format_may_use_every_name(lines):
    """Each line has each name, so that a format which asks for one fits them all."""
    with pytest.raises(Boom):
        async with open_saga(middleware=lines.middleware) as scope:
            await scope.step(nothing, compensation=nothing)
            raise Boom

    names = [{name for name in vars(record) if name.startswith("pysagas_")} for record in lines.records]
    assert 6 == len(names)
    assert 12 == len(names[0])
    assert all(names[0] == others for others in names)


async def test_the_state_is_that_of_the_run(lines):
    """What an inner saga ends with has no state yet, even if it is the failure of another run."""

    async def fail():
        raise Boom

    async def call():
        await Saga([Step(fail, nothing)], name="other").run()

    inner = Saga([Step(nothing, nothing), Step(call, not_applied=Boom)], name="inner")
    with pytest.raises(Boom):
        await Saga([inner], name="outer", middleware=lines.middleware).run()

    ends = {lines.event(record): record.pysagas_state for record in lines.records}
    assert None is ends["saga inner failed"]
    assert "compensated" == ends["saga outer failed"]


async def test_the_logger_is_that_of_the_library_unless_another_is_given(caplog):
    """Without a logger of one's own the lines go to the one that is named pysagas."""
    caplog.set_level(INFO, "pysagas")

    await Saga([Step(nothing)], name="s", middleware=[log_effects()]).run()

    assert ["pysagas"] * 3 == [record.name for record in caplog.records]
    assert "completed" == caplog.records[-1].pysagas_state


# --- however it ends ----------------------------------------------------------------------------


@every_way
async def test_what_is_cancelled_ends_as_interrupted(way, world: World, lines):
    """A cancellation, of whatever kind, ends the lines of all that it cuts off; nothing is lost."""
    trip = Saga(
        [world.step("a"), Parallel(world.member("b"), world.member("c"))],
        name="trip",
        middleware=lines.middleware,
    )

    await interrupted(way, world, "c", trip.run)

    assert [] == world.done
    expected = {
        "action b completed": INFO,
        "action c interrupted": INFO,
        "group parallel interrupted": INFO,
        "compensation c completed": INFO,
        "rollback trip completed": WARNING,
        "saga trip interrupted": WARNING,
    }
    assert expected == {event: lines.levels[event] for event in expected}
    assert "compensated" == lines.records[-1].pysagas_state
    lines.check_all_ended()


@pytest.mark.parametrize("order", [KeyboardInterrupt, SystemExit])
async def test_an_order_to_quit_ends_as_interrupted(order, world: World, lines):
    """KeyboardInterrupt and SystemExit end the lines, too, and what is taken back is logged."""
    parts = [world.step("a"), world.step("b", before=order("now"))]

    with pytest.raises(order):
        await Saga(parts, name="s", middleware=lines.middleware).run()

    assert f"action b interrupted (unknown): {order.__name__}('now')" in lines.texts
    assert f"saga s interrupted (compensated): {order.__name__}('now')" == lines.texts[-1]
    assert WARNING == lines.records[-1].levelno
    lines.check_all_ended()


async def test_a_compensation_that_is_cut_off_is_an_error(world: World, lines):
    """A compensation that did not end is an error, whatever ended it."""
    parts = [world.step("a", back=KeyboardInterrupt()), world.step("b", before=Boom())]

    with pytest.raises(KeyboardInterrupt):
        await Saga(parts, name="s", middleware=lines.middleware).run()

    assert ERROR == lines.levels["compensation a interrupted"]
    assert ERROR == lines.levels["saga s interrupted"]


def test_a_run_that_is_closed_ends_its_lines(lines):
    """A run whose coroutine is closed in the middle leaves no line open."""

    @types.coroutine
    def pause():
        yield

    async def act():
        await pause()

    run = Saga([Step(act, name="a")], name="s", middleware=lines.middleware).run()
    run.send(None)
    run.close()

    assert ["action a interrupted", "saga s interrupted"] == lines.events[2:]


async def test_a_logger_that_fails_harms_nobody(world: World, lines, caplog):
    """What the logger raises is reported by the observer, and the saga runs as if it were not there."""

    def broken(record):
        raise Crash("disk full")

    lines.logger.addFilter(broken)
    outcome = await Saga([world.step("a")], middleware=lines.middleware).run()

    assert SagaState.COMPLETED is outcome.state
    assert ["a"] == world.done
    assert 2 == len(caplog.records)
    assert all("the saga is not affected" in record.getMessage() for record in caplog.records)


async def test_a_logger_that_fails_at_the_end_harms_nobody(world: World, lines, caplog):
    """A failure to log how an effect ended changes neither its result nor its exception."""

    def broken(record):
        if record.pysagas_event != "begun":
            raise Crash("disk full")
        return True

    lines.logger.addFilter(broken)
    boom = Boom()
    with pytest.raises(Boom) as caught:
        await Saga([world.step("a"), world.step("b", before=boom)], middleware=lines.middleware).run()

    assert boom is caught.value
    assert [] == world.done
    assert 6 == len(lines.records)
    assert 6 == len(caplog.records)


# --- under a journal ----------------------------------------------------------------------------


async def test_under_a_journal_what_is_replayed_is_not_logged_again(tmp_path, lines):
    """A run that is tried again logs what runs in this process, under the id that it had."""
    broken = [Crash()]

    async def act():
        pass

    async def back():
        for error in broken:
            raise error

    async def fail():
        raise Boom

    trip = Saga(
        [Step(act, back, name="a"), Step(act, name="b"), Step(fail, name="c", not_applied=Boom)],
        name="trip",
        middleware=lines.middleware,
    )
    async with SQLiteJournal(tmp_path / "sagas.db") as journal:
        with pytest.raises(CompensationFailed):
            await journal.run(trip, run_id="trip-42")
        assert "action b completed" in lines.events
        lines.check_all_ended()
        lines.records.clear()
        broken.clear()
        with pytest.raises(Boom):
            await journal.retry(trip, "trip-42")

    assert [
        "saga trip begun",
        "rollback trip begun",
        "compensation a begun",
        "compensation a completed",
        "rollback trip completed",
        "saga trip failed",
    ] == lines.events
    assert {"trip-42"} == {record.pysagas_run_id for record in lines.records}


@pytest.mark.parametrize("on_crash", ["rollback", "resume"])
async def test_a_recovery_logs_what_runs_in_it(on_crash, lines):
    """After a crash the next process logs what it does itself: the rollback, or the rest of the run."""
    journal = MortalJournal()
    alive = []

    async def act():
        pass

    async def die():
        if not alive:
            journal.dead = True
            raise Killed

    trip = Saga(
        [Step(act, nothing, name="a"), Step(die, nothing, name="b")],
        name="trip",
        middleware=lines.middleware,
    )
    with pytest.raises(Killed):
        await journal.run(trip, run_id="trip-42")
    lines.records.clear()
    alive.append("again")
    report = await journal.next_process().recover([trip], on_crash=on_crash)

    assert report.ok
    lines.check_all_ended()
    assert {
        "rollback": [
            "saga trip begun",
            "rollback trip begun",
            "compensation b completed",
            "compensation a completed",
            "rollback trip completed",
            "saga trip interrupted",
        ],
        "resume": ["saga trip begun", "action b completed", "saga trip completed"],
    }[on_crash] == [
        event
        for record, event in zip(lines.records, lines.events, strict=True)
        if record.levelno > DEBUG
    ]
    assert {"trip-42"} == {record.pysagas_run_id for record in lines.records}
