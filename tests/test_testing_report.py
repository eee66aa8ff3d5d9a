"""What an exploration says to a person: the differences, the order, the table, the counts."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from types import MappingProxyType

import pytest
from worlds import Lab, World

from pysagas import Saga, Step
from pysagas.testing import Fault, FaultKind, Place, Plan, Report, Result, explore
from pysagas.testing._report import differences

A = Place("action", (0,), "charge")
B = Place("action", (1, 2), "send the parcel")
BACK = Place("compensation", (0,), "charge")

AFTER = Fault(A, FaultKind.FAILS_AFTER)
TWICE = Fault(A, FaultKind.RUNS_TWICE)
OTHER = Fault(B, FaultKind.FAILS_BEFORE)
FAILING = Fault(BACK, FaultKind.FAILS_BEFORE)


@dataclass
class Order:
    """What a state may be made of."""

    number: int
    lines: list[str] = field(default_factory=list)
    seen: float = field(default=0.0, compare=False)


@dataclass
class Account:
    """One that is compared in its own way."""

    owner: str

    def __eq__(self, other):
        return self is other

    __hash__ = None

    def __repr__(self):
        return f"<Account of {self.owner}>"


# --- differences -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "lines"),
    [
        (1, 1, []),
        ({"a": [1]}, {"a": [1]}, []),
        (1, 2, ["was 1, is 2"]),
        ("x", None, ["was 'x', is None"]),
        ([1, 2], [1], ["was [1, 2], is [1]"]),
        ((), ((),), ["was (), is ((),)"]),
        # Of one type or not.
        ({"a": 1}, [1], ["was {'a': 1}, is [1]"]),
        ({1}, {1: 1}, ["was {1}, is {1: 1}"]),
        (Order(1), 1, ["was Order(number=1, lines=[], seen=0.0), is 1"]),
        # Mappings, by key.
        ({"stock": 5}, {"stock": 4}, ["stock: was 5, is 4"]),
        ({"a": 1, "b": 2}, {"b": 2}, ["a: was 1, is gone"]),
        ({}, {"a": 1}, ["a: was not there, is 1"]),
        (
            {"gone": 1, "both": 2},
            {"both": 3, "new": 4},
            ["gone: was 1, is gone", "both: was 2, is 3", "new: was not there, is 4"],
        ),
        ({"a": {"b": {3: 4}}}, {"a": {"b": {3: 5}}}, ["a['b'][3]: was 4, is 5"]),
        ({"order 1": 2}, {"order 1": 3}, ["['order 1']: was 2, is 3"]),
        ({7: 2}, {7: 3}, ["[7]: was 2, is 3"]),
        (MappingProxyType({"a": 1}), {"a": 2}, ["a: was 1, is 2"]),
        (OrderedDict(a=1), {"a": None}, ["a: was 1, is None"]),
        # Sets, by what is in them, in an order that does not depend on hashes.
        ({1, 2, 3}, {2, 4, 5}, ["1 is gone", "3 is gone", "4 is left", "5 is left"]),
        ({"s": {"x"}}, {"s": frozenset()}, ["s: 'x' is gone"]),
        ({"a": 1}.keys(), {"b"}, ["'a' is gone", "'b' is left"]),
        # Dataclasses, by field.
        (Order(1, ["x"]), Order(1, ["x", "y"]), ["lines: was ['x'], is ['x', 'y']"]),
        (
            {"orders": {7: Order(7)}},
            {"orders": {7: Order(8, ["z"])}},
            ["orders[7].number: was 7, is 8", "orders[7].lines: was [], is ['z']"],
        ),
        (
            {"a": Account("me")},
            {"a": Account("me")},
            ["a: was <Account of me>, is <Account of me>"],
        ),
        ({"a": Account("me")}, {"a": Account("you")}, ["a.owner: was 'me', is 'you'"]),
    ],
)
def test_differences(before, after, lines):
    """A line for each difference, with its place, as deep as there are keys and fields."""
    assert list(differences(before, after)) == lines


def test_a_class_is_not_taken_for_its_instances():
    """Types in a state are values like others."""
    assert list(differences({"kind": Order}, {"kind": Account})) == [
        f"kind: was {Order!r}, is {Account!r}"
    ]


# --- results -----------------------------------------------------------------------------------


def test_a_result_in_words():
    """One line where all is well; where not, what is wrong, and where."""
    assert str(Result(Plan((AFTER,)))) == "charge: fails after its effect: restored"
    assert str(Result(Plan((FAILING,)), reported=True)) == "taking back charge: fails: reported"
    result = Result(Plan((AFTER,)), problem="not taken back", left=("a: was 1, is 2", "b: was 0, is 1"))
    assert str(result) == (
        "charge: fails after its effect\n    not taken back\n      a: was 1, is 2\n      b: was 0, is 1"
    )
    assert (Result(Plan()).ok, result.ok) == (True, False)


# --- reports -----------------------------------------------------------------------------------


def bad(*faults, problem="not taken back", left=("x is left",), **more):
    return Result(Plan(faults), problem=problem, left=left, **more)


def good(*faults, **more):
    return Result(Plan(faults), **more)


def test_a_report_of_what_is_right():
    """The number of runs, and a table of the places."""
    report = Report(
        "order", (good(), good(AFTER), good(TWICE), good(OTHER), good(FAILING, reported=True))
    )

    assert report.ok is True
    assert report.failures == ()
    assert report.splitlines() == [
        "order: everything restored after 5 runs",
        "(in 1 of them a compensation was made to fail: that was reported)",
        "",
        "  charge              0            2 tried  ok",
        "  send the parcel     1.2          1 tried  ok",
        "  taking back charge  0            1 tried  ok",
    ]


def test_a_report_of_what_is_wrong():
    """What does the same harm stands together, the shortest first."""
    report = Report(
        "order",
        (
            bad(AFTER, left=("x is left", "y is left")),
            good(),
            bad(TWICE),
            bad(OTHER),
            good(FAILING),
            bad(FAILING, problem="the planned fault did not happen: it", left=()),
        ),
        ("Not checked: the moon",),
    )

    assert report.ok is False
    assert report.splitlines() == [
        "order: NOT RESTORED after 4 of 6 runs",
        "",
        "taking back charge: fails",
        "    the planned fault did not happen: it",
        "",
        "charge: runs twice",
        "send the parcel: fails before its effect",
        "    not taken back",
        "      x is left",
        "",
        "charge: fails after its effect",
        "    not taken back",
        "      x is left",
        "      y is left",
        "",
        "  charge              0            2 tried  2 NOT RESTORED",
        "  send the parcel     1.2          1 tried  1 NOT RESTORED",
        "  taking back charge  0            2 tried  1 NOT RESTORED",
        "",
        "Not checked: the moon",
    ]


def test_failures_are_sorted_by_what_is_shortest():
    """Fewer faults first, and then what left less; else in the order in which they were tried."""
    pair = bad(AFTER, TWICE, left=())
    much = bad(AFTER, left=("x", "y"))
    less, same = bad(TWICE), bad(OTHER)
    none = bad(left=("x", "y", "z"))

    report = Report("order", (pair, much, less, good(), same, none))
    assert report.failures == (none, less, same, much, pair)


def test_what_a_smaller_plan_does_is_not_shown_again():
    """A plan that holds a failing one is counted."""
    report = Report(
        "order",
        (
            bad(AFTER),
            good(TWICE),
            bad(TWICE, AFTER, left=("more",)),
            bad(AFTER, OTHER),
            bad(TWICE, OTHER),
        ),
    )

    text = report.splitlines()
    assert "charge: fails after its effect" in text
    assert "charge: runs twice, then send the parcel: fails before its effect" in text
    assert not any("then charge: fails after" in line for line in text)
    assert "2 more plans have one of these in them, and another fault besides." in text
    assert "  charge           0            6 tried  2 NOT RESTORED" in text


def test_what_goes_wrong_without_any_fault_stands_for_the_same_harm():
    """Where the harm is another one, the fault is shown beside it."""
    report = Report("order", (bad(), bad(AFTER), bad(TWICE, left=("something else",))))

    assert report.splitlines()[:9] == [
        "order: NOT RESTORED after 3 of 3 runs",
        "",
        "no fault, taken back at its end",
        "    not taken back",
        "      x is left",
        "",
        "charge: runs twice",
        "    not taken back",
        "      something else",
    ]
    assert "1 more run leaves just what is left without any fault." in report
    assert "another fault besides" not in report
    assert "  charge  0            2 tried  1 NOT RESTORED, 1 cannot be told" in report


def test_what_is_in_a_pair_as_well():
    """What a single fault does without one is told apart from what a pair does."""
    report = Report("order", (bad(), bad(AFTER), bad(TWICE), bad(AFTER, TWICE)))

    assert "2 more runs leave just what is left without any fault." in report
    assert "1 more plan has one of these in it, and another fault besides." in report


def test_what_was_not_tried_is_no_harm():
    """A fault that did not happen, and left nothing, has proved nothing."""
    missed = bad(AFTER, problem="the planned fault did not happen: it", left=(), tried=False)
    report = Report("order", (missed,))
    assert not report.ok
    assert report.splitlines()[0] == "order: NOT TRIED in 1 of 1 run"
    assert "  charge  0            1 tried  1 NOT TRIED" in report

    report = Report("order", (missed, bad(TWICE), good()))
    assert report.splitlines()[0] == "order: NOT RESTORED after 1, NOT TRIED in 1 of 3 runs"


def test_addresses_make_no_difference():
    """What differs only in where an object lies stands together."""
    report = Report(
        "order",
        tuple(
            bad(fault, problem=f"ended with <Odd at 0x7f{number}a>, by cancel scope 7{number}f")
            for number, fault in enumerate((AFTER, TWICE))
        ),
    )

    assert (
        "charge: fails after its effect\ncharge: runs twice\n    ended with <Odd at 0x7f0a>" in report
    )


def test_one_run_is_one_run():
    """There is a singular."""
    assert Report("order", (good(),)).startswith("order: everything restored after 1 run\n")


def test_a_long_report_is_cut_short():
    """Ten plans that do the same harm are shown, and ten kinds of harm; the rest is counted."""
    places = [Place("action", (number,), f"step {number}") for number in range(25)]
    same = [bad(Fault(place, FaultKind.FAILS_AFTER)) for place in places[:13]]
    different = [
        bad(Fault(place, FaultKind.FAILS_AFTER), left=(f"{place} is left", "and more"))
        for place in places[13:]
    ]
    report = Report("order", (*same, *different))

    text = report.splitlines()
    assert "step 9: fails after its effect" in text
    assert "step 10: fails after its effect" not in text
    assert "... and 3 more" in text
    assert "step 21: fails after its effect" in text
    assert "step 22: fails after its effect" not in text
    assert "... and 3 other ways: see report.failures" in text
    # In the table there is each of them.
    assert "  step 24  24           1 tried  1 NOT RESTORED" in text


def test_ten_are_not_cut_short():
    """What is just as long as a report may be is shown whole."""
    places = [Place("action", (number,), f"step {number}") for number in range(20)]
    same = [bad(Fault(place, FaultKind.FAILS_AFTER)) for place in places[:10]]
    different = [
        bad(Fault(place, FaultKind.FAILS_AFTER), left=(f"{place}", "and more"))
        for place in places[10:19]
    ]

    assert "..." not in Report("order", (*same, *different))


def test_second_faults_that_were_passed_by_are_counted():
    """So nobody takes them for tried."""
    report = Report("order", (good(AFTER, OTHER, reached=False), good(AFTER)))

    assert report.ok
    assert "(1 did not come to their second fault)" in report.splitlines()


def test_a_report_is_not_its_own_verdict():
    """A test that forgot ``.ok`` fails, whatever was found."""
    for report in (Report("order", (good(),)), Report("order", (bad(),)), Report("order", ())):
        with pytest.raises(
            TypeError, match=r"neither true nor false: write `assert report.ok, report`"
        ):
            bool(report)
        with pytest.raises(TypeError, match="neither true nor false"):
            assert report


def test_a_report_of_nothing_is_not_right():
    """Where nothing was tried nothing is proved."""
    report = Report("order", ())

    assert report.ok is False
    assert report.splitlines() == ["order: nothing was tried"]


def test_a_report_is_its_text():
    """It is a string, so that pytest shows it whole; in a list it is short."""
    report = Report("order", (bad(AFTER), good()))

    assert isinstance(report, str)
    assert str(report).startswith("order: NOT RESTORED after 1 of 2 runs\n")
    assert repr(report) == "<Report of order: 1 of 2 runs not restored>"
    assert (report.saga, len(report.results), report.notes) == ("order", 2, ())
    with pytest.raises(AssertionError, match=r"(?s)NOT RESTORED.*x is left.*charge  0"):
        assert report.ok, report


@pytest.mark.anyio
async def test_the_report_of_an_exploration(anyio_backend):
    """What `explore` finds is shown with the step, the fault, and what is left."""

    def build(world: World):
        return Saga([world.step("flight"), Step(world.action("hotel"), undo=world.back("hotel"))])

    report = await explore(Lab(build), only=lambda fault: fault.kind is FaultKind.FAILS_AFTER)

    assert report.splitlines() == [
        "saga: NOT RESTORED after 1 of 3 runs",
        "",
        "hotel: fails after its effect",
        "    not taken back; in doubt, and not compensated: hotel",
        "      'hotel' is left",
        "",
        "  flight  0            1 tried  ok",
        "  hotel   1            1 tried  1 NOT RESTORED",
    ]
    (result,) = report.failures
    assert result.outcome.in_doubt[0].name == "hotel"
    assert str(result.error) == "hotel: fails after its effect"
