"""Plans drawn by Hypothesis: they can happen, and shrink to the fewest faults that do the harm."""

from __future__ import annotations

import sys

import anyio
import pytest
from hypothesis import HealthCheck, find, given, settings
from hypothesis.errors import NoSuchExample
from worlds import Lab

from pysagas import Commit, Saga, Step
from pysagas.testing import CannotExplore, FaultKind, Plan, explore, fault_plans, virtual_time

on_both = pytest.mark.parametrize("backend", ["asyncio", "trio"])

few = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
enough = settings(max_examples=500, deadline=None, derandomize=True, database=None)


def order(world):
    """Right, whatever happens."""
    return Saga([world.step("a"), world.step("b"), Commit(), world.step("c")])


def fragile(world):
    """Wrong where its way back is repeated, and its second step was never done."""

    async def back():
        world.log.append("-a")
        world.standing.discard("a")
        if world.log.count("-a") == 2 and "b" not in world.log:
            world.standing.add("harm")

    return Saga([Step(world.action("a"), back), world.step("b")])


@on_both
def test_drawn_plans_can_happen(backend):
    """Each fault of a drawn plan is met, however many there are; and a saga that is right survives."""
    lab = Lab(order)
    lengths = set()

    @few
    @given(plan=fault_plans(Lab(order), backend=backend))
    def check(plan):
        lengths.add(len(plan.faults))
        report = anyio.run(explore, lab, [plan], backend=backend)
        assert report.ok, report
        (result,) = report.results
        assert result.reached

    check()
    assert {1, 2, 3} <= lengths <= {0, 1, 2, 3}


def test_most_is_the_most():
    """No plan has more faults than it is told."""

    @few
    @given(plan=fault_plans(Lab(order), most=1))
    def check(plan):
        assert len(plan.faults) <= 1

    check()
    assert (
        len(
            find(
                fault_plans(Lab(order), most=5), lambda plan: len(plan.faults) > 4, settings=enough
            ).faults
        )
        == 5
    )


def test_the_smallest_plan_has_no_fault():
    """Everything shrinks to the run that is only taken back."""
    assert find(fault_plans(Lab(order)), lambda plan: True, settings=enough) == Plan()


def test_a_plan_that_fails_shrinks_to_the_faults_that_do_the_harm():
    """The fewest, at the earliest places, so that a person reads no more than is needed."""
    lab = Lab(fragile)

    def harmful(plan):
        return not anyio.run(explore, lab, [plan]).ok

    plan = find(fault_plans(Lab(fragile)), harmful, settings=enough)

    assert str(plan) == "a: fails before its effect, then taking back a: runs twice"


def test_only_chooses_among_the_faults():
    """Among those that come second, too."""

    def twice(fault):
        return fault.kind is FaultKind.RUNS_TWICE

    @few
    @given(plan=fault_plans(Lab(order), only=twice))
    def check(plan):
        assert all(map(twice, plan.faults))

    check()
    with pytest.raises(NoSuchExample):
        find(
            fault_plans(Lab(order), only=twice),
            lambda plan: any(fault.kind is FaultKind.CANCELLED for fault in plan.faults),
            settings=few,
        )


def test_a_plan_to_which_nothing_can_be_added():
    """Where no fault can follow, the plan is what it is."""

    def last(fault):
        return str(fault) == "taking back c: runs twice"

    strategy = fault_plans(Lab(order), only=last, most=3)
    plan = find(strategy, lambda plan: bool(plan.faults), settings=enough)

    assert (str(plan), plan.commits) == ("taking back c: runs twice", 1)
    with pytest.raises(NoSuchExample):
        find(strategy, lambda plan: len(plan.faults) > 1, settings=few)


def test_each_run_is_made_once():
    """What can follow a plan is learned when it is first drawn."""
    lab = Lab(order)

    @few
    @given(plan=fault_plans(lab, most=1, only=lambda fault: fault.place.name == "a"))
    def check(plan):
        pass

    check()
    # Two for each of the two commits that may be passed, and one look at the state.
    assert len(lab.worlds) == 5


def test_backend_options_are_those_of_anyio():
    """A loop with a clock of its own serves for all runs."""

    async def patient(attempt):
        await anyio.sleep(3600)
        return await attempt()

    lab = Lab(lambda world: Saga([world.step("a", retry=patient)]))
    strategy = fault_plans(lab, backend="trio", backend_options=virtual_time())

    assert len(find(strategy, lambda plan: len(plan.faults) == 2, settings=enough).faults) == 2


def test_the_saga_is_not_run_before_a_plan_is_drawn():
    """A strategy can be made where tests are collected; what is wrong is said when it is used."""
    strategy = fault_plans(Lab(lambda world: Saga()))

    with pytest.raises(CannotExplore, match="has no steps"):
        find(strategy, lambda plan: True, settings=few)


@pytest.mark.parametrize("most", [0, -1])
def test_a_plan_has_at_least_one_fault(most):
    """Fewer are refused at once."""
    with pytest.raises(ValueError, match=f"most must be at least 1, not {most}"):
        fault_plans(Lab(order), most=most)


def test_what_makes_no_trial_is_refused():
    """At once, too."""
    with pytest.raises(TypeError, match="trial must be a function that makes a Trial"):
        fault_plans(3)


def test_without_hypothesis(monkeypatch):
    """It says what is missing, and how to get it."""
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ImportError, match=r'which is not installed: pip install "pysagas\[testing\]"'):
        fault_plans(Lab(order))
