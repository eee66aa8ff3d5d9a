"""The exceptions: whose they are, and what they say."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

import pytest
from anyio import sleep_forever

from pysagas import (
    AlreadyCommitted,
    Commit,
    CompensationFailed,
    MiddlewareError,
    Saga,
    SagaDefinitionError,
    SagaError,
    SagaState,
    ScopeBusy,
    ScopeClosed,
    Step,
)
from pysagas._errors import (
    add_note,
    describe,
    give_context,
    leaves,
    notes_of,
    orders_to_quit,
    was_closed,
    without_cancellation,
)

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (SagaDefinitionError, ValueError),
        (ScopeClosed, RuntimeError),
        (ScopeBusy, RuntimeError),
        (AlreadyCommitted, RuntimeError),
        (MiddlewareError, RuntimeError),
        (CompensationFailed, Exception),
    ],
)
def test_hierarchy(error, builtin):
    """Every exception of the library is a SagaError, and of the built-in kind that it resembles."""
    assert issubclass(error, SagaError)
    assert issubclass(error, builtin)
    assert issubclass(SagaError, Exception)
    assert not issubclass(error, BaseExceptionGroup)


def failed(error, *failures):
    return CompensationFailed("trip", error, failures, None)


def test_compensation_failed_lists_failures():
    """The message of CompensationFailed names the saga, what began it, and each failure (G11)."""
    one = OSError("no route")
    one.add_note("something else")
    one.add_note("compensation of step 'hotel' at (1,) in saga 'trip'")
    error = failed(ValueError("first line\nsecond line"), one, KeyError())

    assert (
        "saga 'trip' could not be taken back whole after ValueError: first line:\n"
        "  compensation of step 'hotel' at (1,) in saga 'trip': OSError: no route\n"
        "  KeyError"
    ) == str(error)


def test_compensation_failed_moves_no_cursor():
    """Control characters in what was raised are shown, and not sent to the terminal."""
    assert r"after ValueError: one\rtwo\x1b[2J" in str(failed(ValueError("one\rtwo\x1b[2J"), OSError()))


def test_compensation_failed_names_the_place_of_last():
    """An exception that was raised by compensations before is listed with its last place."""
    error = OSError("no route")
    error.add_note("compensation of step 'car' at (0,) in saga 'other'")
    error.add_note("compensation of step 'hotel' at (1,) in saga 'trip'")

    assert "step 'hotel' at (1,) in saga 'trip': OSError" in str(failed(None, error))
    assert "'car'" not in str(failed(None, error))


def test_compensation_failed_attributes():
    """CompensationFailed has what began it, the failures as a tuple, and the outcome (G11)."""
    cause = ValueError()
    one, two = OSError(), KeyError()
    outcome = object()
    error = CompensationFailed("trip", cause, [one, two], outcome)

    assert cause is error.error
    assert (one, two) == error.failures
    assert outcome is error.outcome


def test_compensation_failed_cause_is_a_group():
    """Its cause is a group of what began it and of all failures, so a traceback shows each (G11)."""
    cause = ValueError("began it")
    error = failed(cause, OSError("one"), KeyboardInterrupt("two"))

    assert isinstance(error.__cause__, BaseExceptionGroup)
    assert (cause, *error.failures) == error.__cause__.exceptions
    shown = "".join(traceback.format_exception(error))
    assert all(
        text in shown for text in ("ValueError: began it", "OSError: one", "KeyboardInterrupt: two")
    )


def test_compensation_failed_without_an_error():
    """A rollback that was asked for has no error that began it (G11)."""
    error = failed(None, OSError("one"))

    assert error.error is None
    assert "saga 'trip' could not be taken back whole:\n  OSError: one" == str(error)
    assert error.failures == error.__cause__.exceptions


def test_compensation_failed_names_the_errors_in_a_group():
    """After a group had failed, the message names the errors in it, three of them at most (G11)."""
    group = ExceptionGroup("two", [ValueError("a"), ExceptionGroup("inner", [KeyError("b")])])
    many = ExceptionGroup("many", [OSError(number) for number in range(5)])

    assert "saga 'trip' could not be taken back whole after ValueError: a; KeyError: 'b':" == str(
        failed(group)
    )
    assert "after OSError: 0; OSError: 1; OSError: 2 and 2 more:" in str(failed(many))


async def test_compensation_failed_names_what_was_not_even_begun():
    """At the end of the run the message names the steps that nobody has tried to take back (G11)."""

    def fail_too():
        raise OSError("no answer")

    async def trip(count):
        names = [Step(print, print, name=f"s{number}") for number in range(count)]
        steps = [*names, Step(print, fail_too, name="hotel"), Step(fail_too, name="card")]
        return await raised_by(Saga(steps, name="trip", on_compensation_failure="stop").run())

    error = await trip(2)

    assert [
        "saga 'trip' could not be taken back whole after OSError: no answer:",
        "  compensation of step 'hotel' at (2,) in saga 'trip': OSError: no answer",
        "  not even begun: 's1', 's0'",
    ] == str(error).splitlines()
    assert str(await trip(23)).endswith("'s4', 's3' and 3 more")
    assert "not even begun" not in str(await trip(0))


async def test_compensation_failed_on_request_names_what_was_not_even_begun():
    """A run that is taken back on request tells what is left too (G11)."""

    def fail():
        raise OSError

    steps = [Step(print, print, name="flight"), Step(print, fail)]
    outcome = await Saga(steps, on_compensation_failure="stop").run()

    assert "  not even begun: 'flight'" == str(await raised_by(outcome.rollback())).splitlines()[-1]


async def test_compensation_failed_by_a_time_limit_names_it_once():
    """What a time limit has cut off is named by its own error, and not once more (G10, G11)."""
    steps = [Step(print, print, name="flight"), Step(print, sleep_forever, name="hotel")]
    outcome = await Saga(steps, name="trip", rollback_timeout=0.01).run()

    assert [
        "saga 'trip' could not be taken back whole:",
        "TimeoutError: cut off by rollback_timeout=0.01 s",
        "  TimeoutError: the rollback of 'trip' did not end within 0.01 s; not begun: flight",
    ] == [
        line.removeprefix("  compensation of step 'hotel' at (1,) in saga 'trip': ")
        for line in str(await raised_by(outcome.rollback())).splitlines()
    ]


async def test_compensation_failed_does_not_name_what_was_committed():
    """What stays as it is because a commit was passed is not left to mend (G11, G14)."""

    def fail():
        raise OSError

    steps = [Step(print, print, name="flight"), Commit(), Step(print, fail), Step(fail)]
    error = await raised_by(Saga(steps, on_compensation_failure="stop").run())

    assert "flight" not in str(error)


async def test_a_traceback_says_it_once():
    """A traceback shows each failure, and beside it a note and a line of the message; no more (G11)."""

    def fail():
        raise ValueError("declined")

    def fail_too():
        raise OSError("no answer")

    steps = [Step(print, print, name="flight"), Step(print, fail_too, name="hotel"), Step(fail)]
    error = await raised_by(Saga(steps, name="trip", on_compensation_failure="stop").run())
    shown = "".join(traceback.format_exception(error))

    assert 2 == shown.count("OSError: no answer")
    assert 2 == shown.count("compensation of step 'hotel'")
    assert 2 == shown.count("ValueError: declined")
    assert 1 == shown.count("'flight'")
    assert [
        "saga 'trip' could not be taken back whole after ValueError: declined:",
        "  compensation of step 'hotel' at (1,) in saga 'trip': OSError: no answer",
        "  not even begun: 'flight'",
        "saga 'trip' failed in step 'fail'; rolled back: nothing; in doubt: 'fail'",
    ] == shown.partition("CompensationFailed: ")[2].splitlines()


async def raised_by(awaitable):
    with pytest.raises(CompensationFailed) as raised:
        await awaitable
    return raised.value


def test_compensation_failed_without_failures():
    """With nothing to show there is no cause."""
    assert failed(None).__cause__ is None


def test_compensation_failed_counts_what_it_does_not_list():
    """Beyond twenty, failures are counted in the message; all of them are in `failures` (G11)."""
    failures = [OSError(str(number)) for number in range(23)]
    error = failed(None, *failures)

    lines = str(error).splitlines()
    assert 22 == len(lines)
    assert "  OSError: 19" == lines[-2]
    assert "  ... and 3 more (see .failures)" == lines[-1]
    assert tuple(failures) == error.failures
    assert "  OSError: 19" == str(failed(None, *failures[:20])).splitlines()[-1]


async def test_compensation_failed_can_be_named_by_except_star():
    """A failed rollback comes out as a plain exception, which `except*` can name (G11)."""

    def fail():
        raise ValueError("action")

    def fail_too():
        raise OSError("compensation")

    caught = []
    try:
        await Saga([Step(fail, fail_too)], name="trip").run()
    except* CompensationFailed as group:
        caught.extend(group.exceptions)

    (error,) = caught
    assert isinstance(error.error, ValueError)
    assert ["OSError: compensation"] == [describe(failure) for failure in error.failures]
    assert SagaState.FAILED is error.outcome.state
    assert (
        "saga 'trip' could not be taken back whole after ValueError: action:\n"
        "  compensation of step 'fail' at (0,) in saga 'trip': OSError: compensation"
    ) == str(error)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("text"), "ValueError: text"),
        (ValueError(), "ValueError"),
        (ValueError("one\ntwo"), "ValueError: one"),
    ],
)
def test_describe(error, expected):
    """An exception is given as its type and the first line of its message."""
    assert expected == describe(error)


def test_add_note_once():
    """One exception that many runs raise does not collect the same note many times."""
    error = ValueError()
    add_note(error, "a")
    add_note(error, "b")
    add_note(error, "a")

    assert ["a", "b"] == error.__notes__


def test_add_note_to_an_exception_that_refuses():
    """An exception that cannot be written to goes without a note."""

    @dataclass(frozen=True)
    class Frozen(Exception):
        code: int

        def add_note(self, note):
            raise AttributeError("frozen")

    error = Frozen(3)
    add_note(error, "a")

    assert not hasattr(error, "__notes__")


class Hostile(Exception):
    """An exception that cannot be asked for anything."""

    def __str__(self):
        raise RuntimeError("no text")

    def __getattribute__(self, name):
        raise RuntimeError("no attributes")


def test_hostile_exceptions():
    """An exception that raises when it is looked at is described by its type, and goes without notes."""
    error = Hostile()
    add_note(error, "a")

    assert "Hostile" == describe(error)
    assert [] == notes_of(error)
    assert "saga 'trip' could not be taken back whole:\n  Hostile" == str(failed(None, error))


def test_notes_of():
    """Notes are given as texts, whatever somebody has put there; without notes there are none."""
    error = ValueError()
    assert [] == notes_of(error)

    error.__notes__ = ["a", 3]
    assert ["a", "3"] == notes_of(error)

    error.__notes__ = 3
    assert [] == notes_of(error)


def test_without_cancellation():
    """What is left without its cancellations: nothing of one, the rest of a group, all of another."""
    one, two = ValueError(), KeyError()
    group = BaseExceptionGroup("", [one, BaseExceptionGroup("", [Cancelled(), two]), Cancelled()])

    assert without_cancellation(Cancelled(), Cancelled) is None
    assert without_cancellation(BaseExceptionGroup("", [Cancelled()]), Cancelled) is None
    assert one is without_cancellation(one, Cancelled)
    assert [one, two] == list(leaves(without_cancellation(group, Cancelled)))


class Cancelled(BaseException):
    """Stands for a loop's own."""


def test_was_closed():
    """An error that came of a GeneratorExit, however far back, is from a coroutine that is closed."""
    error = ValueError()
    assert not was_closed(error, None)
    assert was_closed(GeneratorExit(), None)

    error.__context__ = KeyError()
    assert not was_closed(error, None)
    error.__context__.__context__ = GeneratorExit()
    assert was_closed(error, None)
    assert not was_closed(error, error.__context__.__context__)


def test_contexts_that_go_round():
    """Exceptions whose contexts are a circle, as users can make them, do not keep a rollback for ever."""
    first, second, third = ValueError(), OSError(), KeyError()
    first.__context__, second.__context__ = second, first

    assert not was_closed(first, None)
    give_context(third, first)
    assert third.__context__ is first


def test_orders_to_quit():
    """KeyboardInterrupt and SystemExit are orders to quit, in a group too; nothing else is (G8)."""
    assert orders_to_quit(KeyboardInterrupt())
    assert orders_to_quit(
        BaseExceptionGroup("", [ValueError(), BaseExceptionGroup("", [SystemExit()])])
    )
    assert not orders_to_quit(ExceptionGroup("", [ValueError()]))
    assert not orders_to_quit(Cancelled())
    assert not orders_to_quit(None)


def test_leaves():
    """Groups are taken apart down to the exceptions in them."""
    one, two, three = ValueError(), KeyError(), OSError()
    group = ExceptionGroup("outer", [one, ExceptionGroup("inner", [two, three])])

    assert [one, two, three] == list(leaves(group))
    assert [one] == list(leaves(one))


def test_give_context():
    """What yields goes to the end of the contexts, once, and before what the two have in common."""
    outer, first, second, third = KeyError(), ValueError(), OSError(), TypeError()
    first.__context__ = outer
    second.__context__ = outer
    give_context(second, first)
    assert [second, first, outer] == [second, second.__context__, second.__context__.__context__]

    give_context(second, first)
    give_context(second, outer)
    give_context(outer, second)
    assert outer.__context__ is None  # else the contexts would go round for ever
    give_context(second, None)
    assert [first, outer, None] == [second.__context__, first.__context__, outer.__context__]

    give_context(second, third)
    assert outer.__context__ is third
