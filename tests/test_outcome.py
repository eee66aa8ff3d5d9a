"""The report of a run: frozen, complete, and with the way back of a run that had succeeded."""

from __future__ import annotations

from dataclasses import dataclass

import anyio
import pytest
from anyio import CancelScope, Event, create_task_group
from anyio.lowlevel import checkpoint

from pysagas import (
    AlreadyCommitted,
    Commit,
    CompensationFailed,
    Outcome,
    Parallel,
    Ran,
    Saga,
    SagaError,
    SagaScope,
    SagaState,
    ScopeBusy,
    Step,
    StepReport,
    StepState,
    TreeNode,
    current_effect,
    open_saga,
    outcome_of,
    saga,
)

pytestmark = pytest.mark.anyio


def recorder():
    """Gives a log, and a maker of steps that write to it."""
    log = []

    def step(name, *, fails=None, back_fails=None, **options):
        def act():
            log.append(name)
            if fails is not None:
                raise fails
            return f"{name}'s result"

        def back():
            log.append(f"-{name}")
            if back_fails is not None:
                raise back_fails

        options.setdefault("compensation", back)
        return Step(act, name=name, **options)

    return log, step


async def outcome_of_failure(failing, error=Exception, **options):
    with pytest.raises(error) as raised:
        await failing.run(**options)
    outcome = outcome_of(raised.value)
    assert outcome is not None
    return outcome


# --- the records ------------------------------------------------------------------------------------


def test_enums_are_closed():
    """A run ends in one of three states, a step in one of six; there are no others (G13)."""
    assert {"COMPLETED": "completed", "COMPENSATED": "compensated", "FAILED": "failed"} == {
        state.name: state.value for state in SagaState
    }
    assert {
        "NOT_STARTED": "not started",
        "COMPLETED": "completed",
        "NOT_APPLIED": "not applied",
        "UNKNOWN": "unknown",
        "COMPENSATED": "compensated",
        "COMPENSATION_FAILED": "compensation failed",
    } == {state.name: state.value for state in StepState}


def test_step_report_is_a_frozen_value():
    """A step's report is compared by value and cannot be changed."""
    report = StepReport("pay", (0, 1), StepState.COMPLETED, result=3)

    assert StepReport("pay", (0, 1), StepState.COMPLETED, 3, None, None) == report
    with pytest.raises(AttributeError):
        report.state = StepState.UNKNOWN
    assert not hasattr(report, "__dict__")


async def test_outcome_is_frozen():
    """An outcome cannot be changed, added to, or taken from."""
    outcome = await Saga([]).run()

    for name in ("state", "error", "value", "steps", "in_doubt", "other"):
        with pytest.raises(AttributeError):
            setattr(outcome, name, None)
    for name in ("state", "error"):
        with pytest.raises(AttributeError):
            delattr(outcome, name)
    assert SagaState.COMPLETED is outcome.state


async def test_repr_names_saga_and_state():
    """An outcome shows the saga's name, its state, and its error."""
    outcome = await Saga([], name="trip").run()
    failed = await Saga([Step(fail)], name="trip").run(exceptions=OSError)

    assert "<Outcome of saga 'trip': COMPLETED>" == repr(outcome)
    assert "<Outcome of saga 'trip': COMPENSATED error=OSError('failed') in_doubt=1>" == repr(failed)
    assert "trip" == outcome.saga


def fail():
    raise OSError("failed")


async def test_str_is_the_tree_with_states_and_errors():
    """A printed outcome has a line for each place: its path, what it is, its state, what it raised."""
    log, step = recorder()

    @saga
    async def rent(scope: SagaScope):
        await scope.step(step("car"))
        async with scope.nested() as extras:
            await extras.step(step("child seat"))
        await scope.step(step("insurance", fails=OSError("no answer\nat all"), compensation=None))

    outcome = await outcome_of_failure(
        Saga(
            [
                step("flight", back_fails=KeyError("PS 101")),
                Parallel(step("seat"), Saga([step("room")], name="hotel"), name="bookings"),
                Parallel(step("weather", compensation=None)),
                rent,
                Saga([step("never")]),
                Commit(),
                rent,
            ],
            name="trip",
        ),
        CompensationFailed,
    )

    assert [
        "saga 'trip': failed, after OSError: no answer",
        "  0      flight               compensation failed  going back: KeyError: 'PS 101'",
        "  1      parallel 'bookings'",
        "  1.0      seat               compensated",
        "  1.1      saga 'hotel'",
        "  1.1.0      room             compensated",
        "  2      parallel",
        "  2.0      weather            completed",
        "  3      saga 'rent'",
        "  3.0      car                compensated",
        "  3.1      nested",
        "  3.1.0      child seat       compensated",
        "  3.2      insurance          unknown              OSError: no answer",
        "  4      saga",
        "  4.0      never              not started",
        "  5      commit               not passed",
        "  6      saga 'rent'          not started",
    ] == str(outcome).splitlines()


async def test_str_of_what_succeeded():
    """A printed outcome of a completed run says so, and which commit it has passed."""
    log, step = recorder()

    assert [
        "saga 'trip': completed",
        "  0  one     completed",
        "  1  commit  passed",
        "  2  two     completed",
    ] == str(await Saga([step("one"), Commit(), step("two")], name="trip").run()).splitlines()
    assert "saga 'nothing': completed" == str(await Saga([], name="nothing").run())


async def test_str_of_a_step_that_failed_both_ways():
    """What the action raised, and what its compensation did, stand in the line of the step."""
    log, step = recorder()
    outcome = await outcome_of_failure(
        Saga([step("pay", fails=OSError("there"), back_fails=ValueError("back"))]), CompensationFailed
    )

    assert [
        "saga 'saga': failed, after OSError: there",
        "  0  pay  compensation failed  OSError: there; going back: ValueError: back",
    ] == str(outcome).splitlines()


async def test_str_of_a_rollback_that_ran_out_of_time():
    """What failed in a rollback and belongs to no step has a line of its own."""
    log, step = recorder()
    outcome = await Saga(
        [step("one"), step("two", compensation=anyio.sleep_forever)], rollback_timeout=0.01
    ).run()
    with pytest.raises(CompensationFailed) as raised:
        await outcome.rollback()

    assert [
        "saga 'saga': failed",
        "  0  one  completed",
        "  1  two  compensation failed  going back: TimeoutError: cut off by rollback_timeout=0.01 s",
        "  going back: TimeoutError: the rollback of 'saga' did not end within 0.01 s; not begun: one",
    ] == str(raised.value.outcome).splitlines()


async def test_str_has_no_line_that_breaks():
    """Names and messages that hold line breaks or control codes are escaped, and spoil no column."""
    log, step = recorder()
    long = 100 * "x"
    outcome = await Saga(
        [step("two\nlines", fails=OSError("\x1b[2J"), compensation=None), step(long), step("short")],
        name="a\nb",
    ).run(exceptions=OSError)

    assert [
        "saga 'a\\nb': compensated, after OSError: \\x1b[2J",
        "  0  two\\nlines                                        unknown      OSError: \\x1b[2J",
        f"  1  {long}  not started",
        f"  2  {'short':48}  not started",
    ] == str(outcome).splitlines()


async def test_str_of_a_run_of_which_the_steps_alone_are_known():
    """Where a journal recalls a run, what holds its steps is shown without saying what it is."""

    class Recalled:
        saga_name = "trip"
        run_id = "1"

        def reports(self):
            return (
                StepReport("flight", (0,), StepState.COMPLETED),
                StepReport("seat", (1, 0), StepState.COMPLETED),
                StepReport("room", (1, 1, 0), StepState.COMPLETED),
                StepReport("breakfast", (1, 1, 1), StepState.COMPLETED),
            )

    outcome = Outcome(Recalled(), SagaState.COMPLETED, None, None)

    assert [
        "saga 'trip': completed",
        "  0      flight         completed",
        "  1      part",
        "  1.0      seat         completed",
        "  1.1      part",
        "  1.1.0      room       completed",
        "  1.1.1      breakfast  completed",
    ] == str(outcome).splitlines()
    assert TreeNode("part", "part", (1, 1)) in outcome.tree


class Timed:
    """A run whose times are known."""

    saga_name = "trip"
    run_id = "1"

    def __init__(self, *times):
        self.given = times

    def reports(self):
        return (
            StepReport("flight", (0,), StepState.COMPENSATED),
            StepReport("seat", (1, 0), StepState.COMPENSATION_FAILED, compensation_error=OSError("no")),
            StepReport("pay", (2,), StepState.UNKNOWN, error=ValueError("none")),
            StepReport("never", (3,), StepState.NOT_STARTED),
        )

    def times(self):
        return self.given


def test_times_are_told_since_the_first():
    """Times stand in the order in which they began, and count from there; each belongs to a step."""
    times = [
        Ran((1, 0), "compensation", 17.0, 19.0),
        Ran((9, 9), "action", 0.0, 1.0),  # of a place that is none any more
        Ran((1, 0), "action", 12.0, None),
        Ran((0,), "action", 10.0, 11.0),
    ]
    outcome = Outcome(Timed(*times), SagaState.COMPENSATED, None, None)

    assert (
        Ran((0,), "action", 0.0, 1.0),
        Ran((1, 0), "action", 2.0, None),
        Ran((1, 0), "compensation", 7.0, 9.0),
    ) == outcome.times
    assert outcome.times is outcome.times


def test_str_says_how_long_what_took():
    """Where times are known there is a column of them, for the way forward and the one back."""
    times = [
        Ran((0,), "action", 10.0, 10.0123),
        Ran((1, 0), "action", 11.0, None),
        Ran((1, 0), "action", 11.0, 12.2),
        Ran((2,), "action", 12.5, 12.5),
        Ran((1, 0), "compensation", 13.0, 13.004),
        Ran((0,), "compensation", 14.0, 74.0),
    ]

    assert [
        "saga 'trip': failed",
        "  0    flight  compensated          12.3 ms, back 1 min 00 s",
        "  1    part",
        "  1.0    seat  compensation failed  end unknown, 1.20 s, back 4.00 ms  going back: OSError: no",
        "  2    pay     unknown              0 s                                ValueError: none",
        "  3    never   not started",
    ] == str(Outcome(Timed(*times), SagaState.FAILED, None, None)).splitlines()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-1.0, "0 s"),
        (0.0, "0 s"),
        (2e-9, "2.00 ns"),
        (999.4e-9, "999 ns"),
        (999.6e-9, "1.00 µs"),
        (12.34e-6, "12.3 µs"),
        (0.0009996, "1.00 ms"),
        (0.25, "250 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1.00 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (125.4, "2 min 05 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (360_000.0, "100 h 00 min"),
        (None, "end unknown"),
    ],
)
def test_how_long_in_words(seconds, words):
    """How long something took is told in three digits, and beyond a minute in two units."""
    assert words == Ran((), "action", 0.0, seconds).took


async def test_the_tree_of_a_run():
    """An outcome tells what is at each place, and the names of what takes each step back."""

    def act(): ...
    def cancel(): ...
    def undo(result): ...
    def close(): ...

    @saga(name="trip")
    async def trip(scope: SagaScope):
        await scope.step(act, compensation=cancel, undo=undo, name="with options")
        await scope.step(act, compensation=cancel)
        await scope.parallel(Step(act, undo=undo, compensation_timeout=None), Step(act), name="two")
        async with scope.nested() as inner:
            inner.on_rollback(close)
        await scope.commit()

    tree = (await trip.run()).tree

    assert (
        TreeNode("saga", "trip", ()),
        TreeNode("step", "with options", (0,), "cancel", "undo"),
        TreeNode("step", "act", (1,), "cancel"),
        TreeNode("group", "two", (2,)),
        TreeNode("step", "act", (2, 0), undo="undo"),
        TreeNode("step", "act", (2, 1)),
        TreeNode("scope", "nested", (3,)),
        TreeNode("step", "close", (3, 0), "close"),
        TreeNode("commit", "commit", (4,), passed=True),
    ) == tree


async def test_the_tree_of_a_block():
    """The scope of `open_saga` is the saga of its run."""
    async with open_saga(name="trip") as scope:
        await scope.step(print)

    assert ["saga", "step"] == [node.kind for node in scope.outcome.tree]


async def test_the_tree_names_what_is_wrapped():
    """A compensation that is timed or tried again is known by its own name."""

    async def cancel(): ...

    tree = (await Saga([Step(print, cancel, compensation_timeout=5)]).run()).tree

    assert "cancel" == tree[1].compensation


async def test_a_commit_that_a_middleware_holds_up_is_not_passed():
    """A commit that was called and did not come about is not shown as passed."""

    async def refuse(effect, call_next):
        if effect.kind == "commit":
            raise OSError
        return await call_next()

    outcome = await outcome_of_failure(Saga([Step(print), Commit()], middleware=[refuse]))

    assert TreeNode("commit", "commit", (1,)) == outcome.tree[-1]


# --- state, value, error ----------------------------------------------------------------------------


async def test_completed():
    """A run that was carried out whole has its value and no error."""

    @saga
    async def trip(scope: SagaScope, x):
        return x + 1

    outcome = await trip.run(2)

    assert (SagaState.COMPLETED, 3, None) == (outcome.state, outcome.value, outcome.error)
    assert isinstance(outcome, Outcome)


async def test_value_raises_the_error():
    """Unless the run completed, asking for its value raises its error."""
    outcome = await Saga([Step(fail)]).run(exceptions=OSError)

    assert SagaState.COMPENSATED is outcome.state
    with pytest.raises(OSError, match="failed") as raised:
        _ = outcome.value
    assert raised.value is outcome.error


async def test_run_id_is_that_of_the_effects():
    """An outcome has the name of its run, which its effects have too; two runs have two."""
    seen = []
    trip = Saga([Step(lambda: seen.append(current_effect().run_id))])
    outcomes = [await trip.run(), await trip.run()]

    assert seen == [outcome.run_id for outcome in outcomes]
    assert 2 == len(set(seen))


async def test_failed():
    """A run that could not be taken back whole is FAILED, and its error says so (G11)."""
    log, step = recorder()
    error = OSError("back")
    outcome = await outcome_of_failure(
        Saga([step("one", back_fails=error), step("two", fails=ValueError())]), CompensationFailed
    )

    assert SagaState.FAILED is outcome.state
    assert isinstance(outcome.error, CompensationFailed)
    assert (error,) == outcome.error.failures
    with pytest.raises(CompensationFailed):
        _ = outcome.value
    assert ["one", "two", "-two", "-one"] == log


# --- steps ------------------------------------------------------------------------------------------


async def test_steps_in_every_state():
    """Each step is in exactly one state, with its result and its errors, in order of paths (G13)."""
    log, step = recorder()
    fault, refused, back_fault = OSError("fault"), KeyError("refused"), ValueError("back")

    both = Event()

    async def doubt():
        await both.wait()
        raise fault

    async def refuse():
        both.set()
        raise refused

    outcome = await outcome_of_failure(
        Saga(
            [
                step("kept", compensation=None),
                step("taken back"),
                step("stuck", back_fails=back_fault),
                Parallel(
                    Step(doubt, undo=print),
                    Step(refuse, not_applied=KeyError),
                    on_failure="finish",
                ),
                step("never"),
                Parallel(step("never in a group"), Saga([step("never in a saga")])),
            ],
        ),
        CompensationFailed,
    )

    assert (
        StepReport("kept", (0,), StepState.COMPLETED, "kept's result"),
        StepReport("taken back", (1,), StepState.COMPENSATED, "taken back's result"),
        StepReport(
            "stuck",
            (2,),
            StepState.COMPENSATION_FAILED,
            "stuck's result",
            compensation_error=back_fault,
        ),
        StepReport("doubt", (3, 0), StepState.UNKNOWN, error=fault),
        StepReport("refuse", (3, 1), StepState.NOT_APPLIED, error=refused),
        StepReport("never", (4,), StepState.NOT_STARTED),
        StepReport("never in a group", (5, 0), StepState.NOT_STARTED),
        StepReport("never in a saga", (5, 1, 0), StepState.NOT_STARTED),
    ) == outcome.steps
    assert outcome.steps[3:4] == outcome.in_doubt


async def test_members_that_never_started():
    """Members that a failed group did not come to are NOT_STARTED and never compensated (G1)."""
    log, step = recorder()
    outcome = await outcome_of_failure(
        Saga([Parallel(step("one", fails=OSError()), step("two"), step("three"), limit=1)])
    )

    assert [
        ((0, 0), StepState.COMPENSATED),
        ((0, 1), StepState.NOT_STARTED),
        ((0, 2), StepState.NOT_STARTED),
    ] == [(report.path, report.state) for report in outcome.steps]
    assert ["one", "-one"] == log


async def test_steps_that_data_never_came_to():
    """Of a saga as data all steps are reported; of a function only those that it called."""

    @saga
    async def inner(scope: SagaScope): ...

    outcome = await outcome_of_failure(
        Saga([Step(fail), Commit(), inner, Saga([]), Saga([Step(print), Parallel(inner)])])
    )

    assert [
        ("fail", (0,), StepState.UNKNOWN),
        ("inner", (2,), StepState.NOT_STARTED),
        ("print", (4, 0), StepState.NOT_STARTED),
        ("inner", (4, 1, 0), StepState.NOT_STARTED),
    ] == [(step.name, step.path, step.state) for step in outcome.steps if step.name != "saga"]


async def test_steps_are_made_once():
    """The report of the steps is made when first asked for, and kept."""
    outcome = await Saga([Step(print)]).run()

    assert outcome.steps is outcome.steps


async def test_completed_saga_has_nothing_in_doubt():
    """Nothing is in doubt in a run that completed, or that was taken back whole."""
    log, step = recorder()
    assert () == (await Saga([step("one")]).run()).in_doubt
    assert () == (await Saga([step("two", fails=OSError())]).run(exceptions=OSError)).in_doubt


# --- rollback ---------------------------------------------------------------------------------------


async def test_rollback_takes_back_a_completed_run():
    """A run that had succeeded is taken back on request, in reverse; the outcome is a new one."""
    log, step = recorder()
    outcome = await Saga([step("one"), Parallel(step("two")), step("three")]).run()
    later = await outcome.rollback()

    assert ["one", "two", "three", "-three", "-two", "-one"] == log
    assert SagaState.COMPENSATED is later.state
    assert later.error is None
    assert 3 * [StepState.COMPENSATED] == [report.state for report in later.steps]


async def test_rollback_does_not_change_the_outcome_before():
    """The outcome of before stays as it is, though nobody had looked at its steps."""
    log, step = recorder()
    outcome = await Saga([step("one")]).run()
    await outcome.rollback()

    assert SagaState.COMPLETED is outcome.state
    assert [StepState.COMPLETED] == [report.state for report in outcome.steps]
    assert outcome.value is None


async def test_a_run_that_was_taken_back_has_no_value():
    """The outcome of a rollback has no value to give, and says why."""

    @saga
    async def trip(scope: SagaScope):
        return "value"

    outcome = await trip.run()
    later = await outcome.rollback()

    with pytest.raises(
        SagaError, match="saga 'trip' was taken back by Outcome.rollback: it has no value"
    ):
        _ = later.value
    assert "value" == outcome.value


async def test_second_rollback_changes_nothing():
    """A second call of rollback, on either outcome, runs nothing and gives the same."""
    log, step = recorder()
    outcome = await Saga([step("one")]).run()
    later = await outcome.rollback()

    assert later is await outcome.rollback()
    assert later is await later.rollback()
    assert ["one", "-one"] == log


async def test_rollback_of_a_run_that_was_taken_back():
    """A run that failed was taken back already: rollback runs nothing."""
    log, step = recorder()
    outcome = await Saga([step("one", fails=OSError())]).run(exceptions=OSError)

    assert outcome is await outcome.rollback()
    assert ["one", "-one"] == log


async def test_rollback_of_nothing():
    """A run without anything to take back is COMPENSATED by asking."""
    outcome = await Saga([]).run()

    assert SagaState.COMPENSATED is (await outcome.rollback()).state


@pytest.mark.parametrize("way", ["data", "function", "block"])
async def test_rollback_after_a_commit_is_an_error(way):
    """What has passed its commit cannot be taken back: nothing runs, however often asked (G14)."""
    log, step = recorder()

    @saga(name="trip")
    async def function(scope: SagaScope):
        await scope.step(step("one"))
        await scope.commit()
        await scope.step(step("two"))

    if way == "data":
        outcome = await Saga([step("one"), Commit(), step("two")], name="trip").run()
    elif way == "function":
        outcome = await function.run()
    else:
        async with open_saga(name="trip") as scope:
            await scope.step(step("one"))
            await scope.commit()
            await scope.step(step("two"))
        outcome = scope.outcome

    for _ in range(2):
        with pytest.raises(AlreadyCommitted, match="saga 'trip' has passed its commit"):
            await outcome.rollback()
    assert ["one", "two"] == log
    assert [StepState.COMPLETED, StepState.COMPLETED] == [report.state for report in outcome.steps]


async def test_rollback_that_fails():
    """A rollback on request that fails raises CompensationFailed, whose outcome is the new one (G11)."""
    log, step = recorder()
    error = OSError("stuck")
    outcome = await Saga([step("one"), step("two", back_fails=error)], name="trip").run()
    with pytest.raises(
        CompensationFailed, match="saga 'trip' could not be taken back whole:"
    ) as raised:
        await outcome.rollback()

    later = raised.value.outcome
    assert (error,) == raised.value.failures
    assert raised.value.error is None
    assert (SagaState.FAILED, raised.value) == (later.state, later.error)
    assert [StepState.COMPENSATED, StepState.COMPENSATION_FAILED] == [
        report.state for report in later.steps
    ]
    assert later is outcome_of(raised.value)
    assert later is await outcome.rollback()
    assert ["one", "two", "-two", "-one"] == log


async def test_rollback_while_another_task_does_it():
    """Two tasks cannot take the same run back at the same time."""
    begun, go_on = Event(), Event()

    async def back():
        begun.set()
        await go_on.wait()

    outcome = await Saga([Step(print, back)], name="trip").run()
    results = []

    async def roll_back():
        results.append(await outcome.rollback())

    async with create_task_group() as tasks:
        tasks.start_soon(roll_back)
        await begun.wait()
        with pytest.raises(ScopeBusy, match="saga 'trip' is being taken back by another task"):
            await outcome.rollback()
        go_on.set()

    assert results == [await outcome.rollback()]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_rollback_that_could_not_run_can_be_asked_again(backend):
    """Where no event loop runs, nothing is taken back, and the run can be taken back later."""
    log, step = recorder()
    outcome = anyio.run(Saga([step("one")]).run, backend=backend)
    outside = outcome.rollback()
    with pytest.raises(RuntimeError):
        outside.send(None)
    assert ["one"] == log

    assert SagaState.COMPENSATED is anyio.run(outcome.rollback, backend=backend).state
    assert ["one", "-one"] == log


async def test_cancelled_rollback_runs_to_its_end():
    """A rollback on request is not interrupted; the cancellation goes on when it is over (G9)."""
    log, step = recorder()
    with CancelScope() as scope:

        async def cancelling():
            scope.cancel()
            await checkpoint()
            log.append("still there")

        outcome = await Saga([step("first"), Step(print, cancelling)]).run()
        log.clear()
        await outcome.rollback()
        await checkpoint()

    assert scope.cancelled_caught
    assert ["still there", "-first"] == log
    assert SagaState.COMPENSATED is (await outcome.rollback()).state


@pytest.mark.parametrize("way", ["function", "block"])
async def test_rollback_keeps_the_type_of_run(way):
    """Function sagas and blocks can be taken back as well."""
    log, step = recorder()

    @saga
    async def function(scope: SagaScope):
        await scope.step(step("one"))
        async with scope.nested() as inner:
            await inner.step(step("two"))
        scope.on_rollback(log.append, "-three")

    if way == "function":
        outcome = await function.run()
    else:
        async with open_saga() as scope:
            await scope.step(function)
        outcome = scope.outcome
    await outcome.rollback()

    assert ["one", "two", "-three", "-two", "-one"] == log


# --- outcome_of -------------------------------------------------------------------------------------


def test_outcome_of_other_exceptions():
    """An exception that no saga raised has no outcome."""
    assert outcome_of(ValueError()) is None


async def test_outcome_of_the_outermost_saga():
    """The outcome is that of the outermost saga that raised it."""
    other = Saga([Step(fail)], name="other")

    async def independent():
        await other()

    outcome = await outcome_of_failure(Saga([Saga([Step(independent)], name="inner")], name="outer"))

    assert "outer" == outcome.saga
    assert [("independent", (0, 0))] == [(step.name, step.path) for step in outcome.steps]


async def test_outcome_of_an_exception_that_is_raised_by_many_runs():
    """One exception object that several runs raise has the outcome of the last."""
    error = OSError()

    def act():
        raise error

    first = await outcome_of_failure(Saga([Step(act)], name="first"))
    second = await outcome_of_failure(Saga([Step(act)], name="second"))

    assert ["first", "second"] == [first.saga, second.saga]
    assert outcome_of(error) is second


async def test_outcome_of_an_exception_that_refuses_attributes():
    """A frozen exception class has an outcome too."""

    @dataclass(frozen=True)
    class Frozen(Exception):
        code: int

    def act():
        raise Frozen(3)

    outcome = await outcome_of_failure(Saga([Step(act)]), Frozen)

    assert 3 == outcome.error.code


async def test_failure_carries_a_note():
    """A step's failure comes out untouched, with a note: which saga, which step, what is left (G5)."""
    log, step = recorder()
    error = OSError("failed")
    outcome = await outcome_of_failure(
        Saga([step("one"), step("two", fails=error, compensation=None, undo=print)], name="trip")
    )

    assert outcome.error is error
    assert ["saga 'trip' failed in step 'two'; rolled back: 'one'; in doubt: 'two'"] == error.__notes__


async def test_note_counts_what_it_does_not_list():
    """A note lists ten names and counts the rest; with none it says: nothing (G5)."""
    log, step = recorder()
    error = OSError("failed")
    steps = [step(str(number)) for number in range(13)]
    await outcome_of_failure(Saga([*steps, Step(fail_with(error))], name="many"))

    names = ", ".join(repr(str(number)) for number in range(12, 2, -1))
    assert [
        f"saga 'many' failed in step 'act'; rolled back: {names} and 3 more; in doubt: 'act'"
    ] == error.__notes__

    error = OSError("failed")

    @saga(name="bare")
    async def bare(scope: SagaScope):
        raise error

    await outcome_of_failure(bare)

    assert ["saga 'bare' failed; rolled back: nothing; in doubt: nothing"] == error.__notes__


def fail_with(error):
    def act():
        raise error

    return act
