"""What is tried, in words: trials, places, faults and plans. (That faults happen: test_testing_watched.)"""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError

import pytest
from hypothesis.vendor.pretty import pretty

from pysagas import Parallel, Saga, SagaError, Step, open_saga, saga
from pysagas.testing import CannotExplore, Fault, FaultKind, InjectedFailure, Place, Plan, Trial
from pysagas.testing._faults import possible_faults

ACTION = Place("action", (0,), "charge_card")
BACK = Place("compensation", (0,), "charge_card")
RETRIED = Place("action", (0,), "charge_card", retried=True)


class Declined(Exception):
    """By which a step says that it did nothing."""


# --- trials ------------------------------------------------------------------------------------


def nothing(): ...


def test_a_trial_says_what_saga_it_wants():
    """What is no saga is refused, with what to write for a block."""
    with pytest.raises(
        TypeError, match=r"saga must be a Saga, not <function nothing .*@saga async def"
    ):
        Trial(nothing, state=nothing)
    with pytest.raises(TypeError, match="saga must be a Saga, not <.*OpenSaga"):
        Trial(open_saga(), state=nothing)


@pytest.mark.parametrize("name", ["state", "failure"])
def test_a_trial_calls_for_its_state(name):
    """A state, or a failure, that cannot be called is refused."""
    with pytest.raises(TypeError, match=f"Trial: {name} must be callable, not 'done'"):
        Trial(Saga(), **{"state": nothing, name: "done"})


@pytest.mark.parametrize(
    ("args", "written"),
    [(5, "(5,)"), ("order-1", "('order-1',)"), (None, "(None,)"), (["a", 1], "('a', 1)"), ([], "()")],
)
def test_a_trial_wants_its_arguments_in_a_tuple(args, written):
    """What is not in a tuple is refused, with how to write it."""
    message = f"args must be a tuple, not {args!r}; write args={written}"
    with pytest.raises(TypeError, match=re.escape(message)):
        Trial(Saga(), args=args, state=nothing)


def test_a_trial_wants_its_keywords_in_a_dict():
    """Names without values are none."""
    with pytest.raises(TypeError, match=r"kwargs must be a dict of names and values, not \('a',\)"):
        Trial(Saga(), kwargs=("a",), state=nothing)


STEP = Step(nothing)


@pytest.mark.parametrize(
    ("given", "written"),
    [
        (STEP, "Saga([<Step 'nothing'>])"),
        (STEP.bind(), "Saga([<Step 'nothing'>.bind()])"),
        ([STEP], "Saga([...])"),
        ((STEP,), "Saga([...])"),
        (Parallel(STEP), "Saga([<Parallel 'parallel'>])"),
    ],
)
def test_parts_of_a_saga_are_no_saga(given, written):
    """They are refused, with how to make one of them."""
    with pytest.raises(TypeError, match=rf"saga must be a Saga, not .*; write {re.escape(written)}"):
        Trial(given, state=nothing)


NoArguments = type("NoArguments", (Exception,), {"__init__": lambda self: None})


@pytest.mark.parametrize(
    ("failure", "why"),
    [
        (KeyboardInterrupt, "is no Exception"),
        (lambda: ValueError(), "cannot be called with one: too many positional arguments"),
        (NoArguments, "cannot be called with one: too many positional arguments"),
    ],
)
def test_a_failure_is_made_from_a_message(failure, why):
    """What cannot make an Exception of one is refused, with how to write it."""
    with pytest.raises(TypeError, match=f"failure must make an Exception from a message, and .* {why}"):
        Trial(Saga(), state=nothing, failure=failure)


@pytest.mark.parametrize("failure", [Declined, OSError, lambda message: OSError(5, message)])
def test_a_failure_may_be_whatever_takes_a_message(failure):
    """Where nobody can tell what it takes, it is believed."""
    assert Trial(Saga(), state=nothing, failure=failure).failure is failure


def test_a_trial_has_a_state_and_a_saga():
    """The state is what nobody can leave out, and it is named."""
    with pytest.raises(TypeError, match="state"):
        Trial(Saga())
    with pytest.raises(TypeError):
        Trial(Saga(), (), {}, nothing)


def test_a_trial_is_frozen():
    """It is a value, with a failure of the library's by default."""
    trial = Trial(Saga(), state=nothing)

    assert (trial.args, trial.kwargs, trial.failure) == ((), {}, InjectedFailure)
    with pytest.raises(FrozenInstanceError):
        trial.args = (1,)


def test_a_saga_method_is_a_saga():
    """A method is tried as that of an instance."""

    class Agency:
        @saga
        async def book(self, scope): ...

    assert Trial(Agency().book, state=nothing).saga.name == "book"
    with pytest.raises(TypeError, match="saga must be a Saga, not <.*SagaMethod"):
        Trial(Agency.book, state=nothing)


def test_cannot_explore_is_an_error_of_the_library():
    """So whoever catches all of those catches it."""
    assert issubclass(CannotExplore, SagaError)


# --- words -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (Fault(ACTION, FaultKind.FAILS_BEFORE), "charge_card: fails before its effect"),
        (Fault(ACTION, FaultKind.FAILS_AFTER), "charge_card: fails after its effect"),
        (Fault(ACTION, FaultKind.RUNS_TWICE), "charge_card: runs twice"),
        (Fault(ACTION, FaultKind.CANCELLED, 2), "charge_card: cancelled at checkpoint 2"),
        (
            Fault(ACTION, FaultKind.CANCELLED_NATIVELY, 1),
            "charge_card: cancelled natively at checkpoint 1",
        ),
        (Fault(ACTION, FaultKind.DECLINES, error=Declined), "charge_card: declines with Declined"),
        (
            Fault(RETRIED, FaultKind.DECLINES, error=Declined, once=True),
            "charge_card: declines with once, Declined",
        ),
        (
            Fault(RETRIED, FaultKind.FAILS_BEFORE, once=True),
            "charge_card: fails once, before its effect",
        ),
        (Fault(RETRIED, FaultKind.FAILS_AFTER, once=True), "charge_card: fails once, after its effect"),
        (Fault(BACK, FaultKind.FAILS_BEFORE), "taking back charge_card: fails"),
        (Fault(BACK, FaultKind.FAILS_BEFORE, once=True), "taking back charge_card: fails once"),
        (Fault(BACK, FaultKind.RUNS_TWICE), "taking back charge_card: runs twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fault_in_words(fault, text):
    """A fault, and a plan of it, is a short sentence: the id of a test."""
    plan = Plan((fault,))

    assert str(fault) == str(plan) == plan.__name__ == text
    assert (repr(fault), repr(plan)) == (f"<Fault {text}>", f"<Plan {text}>")
    assert f"{fault.place}: {fault.what}" == text


def test_a_plan_in_words():
    """Several faults stand in their order; a plan of none says what is tried all the same."""
    one, two = Fault(ACTION, FaultKind.FAILS_AFTER), Fault(BACK, FaultKind.RUNS_TWICE)

    both = Plan((one, two), commits=1)
    assert str(both) == f"{one}, then {two}"
    assert str(Plan()) == "no fault, taken back at its end"
    assert str(Plan(commits=2)) == "no fault, taken back at its end (past commit 2)"


def test_a_plan_prints_itself_to_hypothesis():
    """What Hypothesis shows of a failing example is the sentence, not the fields."""
    assert pretty(Plan((Fault(ACTION, FaultKind.RUNS_TWICE),))) == "<Plan charge_card: runs twice>"


def test_a_place_is_known_by_where_it_is():
    """The shown name and the options of a step do not make it another place."""
    shown = Place("action", (0,), "charge_card", retried=True, declared=(Declined,), shown="x")

    assert shown == ACTION
    assert {shown} == {ACTION}
    assert str(shown) == "x"
    assert ACTION != BACK
    assert Place("action", (1,), "charge_card") != ACTION


# --- what can be made --------------------------------------------------------------------------


def kinds(*events, native=True):
    return [
        (fault.kind, fault.checkpoint, fault.once) for fault in possible_faults(events, native=native)
    ]


def test_what_can_be_made_where_an_action_begins():
    """It can fail there, and decline: once and always where it is tried again."""
    before = FaultKind.FAILS_BEFORE
    declared = Place("action", (0,), "a", retried=True, declared=(Declined,))

    assert kinds(("enter", ACTION, 1)) == [(before, None, False)]
    assert kinds(("enter", declared, 1)) == [
        (before, None, False),
        (FaultKind.DECLINES, None, False),
        (before, None, True),
        (FaultKind.DECLINES, None, True),
    ]
    assert kinds(("enter", ACTION, 2)) == []


def test_what_can_be_made_where_something_waits():
    """It can be cancelled at each checkpoint; natively where there is such a thing."""
    cancelled, natively = FaultKind.CANCELLED, FaultKind.CANCELLED_NATIVELY

    assert kinds(("checkpoint", BACK, 3)) == [(cancelled, 3, False), (natively, 3, False)]
    assert kinds(("checkpoint", ACTION, 1), native=False) == [(cancelled, 1, False)]


def test_what_can_be_made_where_something_ends():
    """An action can lose its answer there; everything can be called again, the first time."""
    twice = (FaultKind.RUNS_TWICE, None, False)

    assert kinds(("done", BACK, 1)) == [twice]
    assert kinds(("done", ACTION, 1)) == [(FaultKind.FAILS_AFTER, None, False), twice]
    assert kinds(("done", RETRIED, 1))[1] == (FaultKind.FAILS_AFTER, None, True)
    assert kinds(("done", ACTION, 2)) == []


@pytest.mark.parametrize("declared", [(Exception,), (Declined, InjectedFailure)], ids=repr)
def test_an_answer_cannot_be_lost_where_every_failure_declines(declared):
    """Where even an InjectedFailure says that nothing was done, it is not raised after the effect."""
    place = Place("action", (0,), "a", retried=True, declared=declared)

    assert kinds(("done", place, 1)) == [(FaultKind.RUNS_TWICE, None, False)]


def test_what_was_seen_twice_is_made_once():
    """The same thing is not tried twice."""
    assert len(kinds(("done", BACK, 1), ("done", BACK, 1))) == 1
