"""The exploration as a whole: what it tries, what it refuses, and that it can be stopped."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from functools import partial
from types import MappingProxyType

import anyio
import pytest
from anyio import CancelScope, Event, create_task_group, sleep_forever
from anyio.lowlevel import checkpoint
from conftest import ASYNCIO, WITHOUT_DEBUG
from helpers import on_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worlds import Lab, World, found, three_times, without_native

from pysagas import Commit, Parallel, Saga, SagaScope, Step, saga
from pysagas.testing import (
    CannotExplore,
    EffectsLedger,
    Fault,
    FaultKind,
    Place,
    Plan,
    Trial,
    explore,
    fault_plans,
    faults,
)

pytestmark = pytest.mark.anyio


def one_step(world):
    return Saga([world.step("a")], name="order")


def two_steps(world):
    return Saga([world.step("a"), world.step("b")], name="order")


def texts(report):
    return [str(result.plan) for result in report.results]


# --- what is tried -----------------------------------------------------------------------------


async def test_everything_is_tried_in_the_order_of_places():
    """First no fault, then the actions, each from its beginning to its end, then what takes back."""
    report = await explore(Lab(two_steps))

    assert report.ok, report
    assert report.saga == "order"
    plans = without_native(dict.fromkeys(texts(report)))
    assert list(plans) == [
        "no fault, taken back at its end",
        *(
            f"{name}: {what}"
            for name in "ab"
            for what in (
                "fails before its effect",
                "fails after its effect",
                "runs twice",
                "cancelled at checkpoint 1",
                "cancelled at checkpoint 2",
            )
        ),
        *(
            f"taking back {name}: {what}"
            for name in "ab"
            for what in ("fails", "runs twice", "cancelled at checkpoint 1")
        ),
    ]


async def test_natively_is_tried_where_there_is_such_a_thing(anyio_backend):
    """On asyncio each cancellation is tried both ways; on Trio there is one."""
    report = await explore(Lab(one_step))

    natively = [text for text in texts(report) if "natively" in text]
    assert len(natively) == (3 if on_asyncio() else 0)


async def test_every_place_of_a_large_saga_is_tried():
    """In groups, inner sagas and nested scopes, data and functions, past a commit too."""

    def build(world):
        @saga
        async def inner(scope: SagaScope) -> None:
            await scope.step(world.step("in a function"))
            async with scope.nested() as nested:
                await nested.step(world.action("x"), compensation=world.back("x"), name="nested")
            await scope.parallel(world.step("in parallel").bind(), Saga([world.step("deep")]))

        group = Parallel(world.step("left"), Saga([world.step("right"), inner]))
        return Saga([world.step("first"), group, Commit(), world.step("last")])

    report = await explore(Lab(build))

    assert report.ok, report
    names = {"in a function", "nested", "in parallel", "deep", "left", "right", "first", "last"}
    for kind in ("action", "compensation"):
        places = {
            fault.place.name
            for result in report.results
            for fault in result.plan.faults
            if fault.place.kind == kind
        }
        assert places == names


async def test_only_leaves_out_the_others():
    """What a person does not want to bear is not tried; no fault at all is always tried."""
    lab = Lab(two_steps)
    report = await explore(lab, only=lambda fault: fault.kind is FaultKind.RUNS_TWICE)

    assert texts(report) == [
        "no fault, taken back at its end",
        "a: runs twice",
        "b: runs twice",
        "taking back a: runs twice",
        "taking back b: runs twice",
    ]
    # Each run has a world of its own: these five, two to learn, one to look at the state.
    assert len(lab.worlds) == 8

    with pytest.raises(CannotExplore, match=r"only=.* leaves out every fault"):
        await explore(Lab(two_steps), only=lambda fault: False)
    with pytest.raises(
        TypeError, match=r"only must be a function of a Fault, not 'a'; write only=lambda"
    ):
        await explore(lab, only="a")


async def test_faults_that_are_given_are_tried_in_their_order():
    """Plans and faults alike; those that are not known, too."""
    place = Place("action", (0,), "a")
    one, other = Fault(place, FaultKind.FAILS_AFTER), Fault(place, FaultKind.RUNS_TWICE)
    report = await explore(Lab(one_step), [other, Plan((one,)), Plan()])

    assert texts(report) == [str(other), str(one), "no fault, taken back at its end"]
    assert report.ok, report


async def test_a_fault_from_behind_a_commit_is_tried_there():
    """Which commits a run has to pass to come to a fault is known of the fault itself."""

    def build(world):
        return Saga([world.step("a"), Commit(), world.step("b"), Commit(), world.step("c")])

    def only(fault):
        return fault.kind is FaultKind.RUNS_TWICE

    known = await explore(Lab(build), only=only)
    plans = [result.plan for result in known.results if result.plan.faults]
    assert {plan.commits for plan in plans} == {0, 1, 2}

    lab = Lab(build)
    report = await explore(lab, [fault for plan in plans for fault in plan.faults])

    assert report.ok, report
    assert [result.plan for result in report.results] == plans
    assert lab.logs(report)["b: runs twice"] == "a> a a< b> b b< b> b b< -b> -b -b<"


async def test_no_faults_prove_nothing():
    """An exploration that has tried nothing is not right."""
    report = await explore(Lab(one_step), [])

    assert report.results == ()
    assert not report.ok
    assert report.splitlines()[0] == "order: nothing was tried"


async def test_a_generator_of_faults_is_taken():
    """Whatever gives plans will do."""
    report = await explore(Lab(one_step), (Plan() for _ in range(2)))

    assert len(report.results) == 2


@pytest.mark.parametrize("given", ["a: runs twice", 3, None, Place("action", (0,), "a")], ids=repr)
async def test_what_is_no_fault_is_refused(given):
    """A text, or a place, is no fault."""
    with pytest.raises(TypeError, match=r"faults must hold what faults\(\) gives, not "):
        await explore(Lab(one_step), [given])


async def test_a_single_fault_is_taken():
    """And a single plan: nobody has to put it in a list."""
    fault = Fault(Place("action", (0,), "a"), FaultKind.RUNS_TWICE)

    assert texts(await explore(Lab(one_step), fault)) == ["a: runs twice"]
    assert texts(await explore(Lab(one_step), Plan((fault,)))) == ["a: runs twice"]


# --- pairs -------------------------------------------------------------------------------------


def with_tombstones(world):
    """A cancelled order is noted where there is no order, so that a late one is refused.

    Right by itself; but a compensation that is called twice where nothing had happened finds its
    own note, and takes that for the order.
    """
    notes = set()

    async def order():
        await checkpoint()
        if "order" not in notes:
            notes.add("order")
            world.make("order")

    async def cancel():
        if "order" in notes:
            notes.discard("order")
            world.remove("order")
            if world.log.count("order") < world.log.count("-order"):
                world.standing.add("refund for nothing")
        else:
            notes.add("order")

    return Saga([Step(order, cancel)])


async def test_what_only_two_faults_bring_about_is_found_in_pairs():
    """Each fault alone does no harm; both do, and the report names them."""
    singles = await explore(Lab(with_tombstones))
    assert singles.ok, singles

    report = await explore(Lab(with_tombstones), pairs=True)

    twice = "taking back order: runs twice"
    assert without_native(found(report)) == {
        f"order: fails before its effect, then {twice}",
        f"order: cancelled at checkpoint 1, then {twice}",
    }
    assert f"order: fails before its effect, then {twice}" in report
    assert "'refund for nothing' is left" in report


async def test_smaller_plans_stand_for_those_that_contain_them():
    """What one fault does alone is not listed again with each other fault besides."""

    def build(world):
        async def put_back():
            world.log.append("back")
            world.standing.discard("a")
            if world.log.count("back") > 1:
                world.standing.add("one too many")

        return Saga([Step(world.action("a"), put_back), world.step("b")])

    report = await explore(Lab(build), pairs=True)

    alone = "taking back a: runs twice"
    assert alone in report.splitlines()
    larger = [plan for plan in found(report) if plan != alone]
    assert larger
    assert all(alone in plan for plan in larger)
    assert not any(plan in report for plan in larger)
    assert f"{len(larger)} more plans have one of these in them, and another fault besides." in report


async def test_a_pair_is_two_faults_that_both_happen():
    """The second is one that the run with the first can still come to, and never the first again."""
    lab = Lab(two_steps)
    report = await explore(lab, pairs=True)

    assert report.ok, report
    assert all(result.reached for result in report.results)
    plans = [result.plan for result in report.results]
    assert len(set(plans)) == len(plans)
    pairs = [plan.faults for plan in plans if len(plan.faults) == 2]
    assert len(pairs) > 40
    assert all(one != other for one, other in pairs)
    # After a failure before its effect, the action is not done any more.
    assert not any(
        one.kind is FaultKind.FAILS_BEFORE and one.place == other.place for one, other in pairs
    )
    # But what runs twice waits as often again.
    again = "a: runs twice, then a: cancelled at checkpoint 4"
    assert lab.logs(report)[again] == "a> a a< a> a -a> -a -a<"


async def test_what_comes_between_two_attempts_is_paired():
    """A fault that happens at each attempt is followed by what comes after the first one."""
    lab = Lab(lambda world: Saga([world.step("a", retry=three_times)]))
    report = await explore(lab, pairs=True)

    assert report.ok, report
    # The first attempt has two checkpoints.
    plan = "a: fails after its effect, then a: cancelled at checkpoint 3"
    assert lab.logs(report)[plan] == "a> a a< a> -a> -a -a<"


async def test_pairs_of_given_faults():
    """Given faults are paired with whatever can follow them."""
    fault = Fault(Place("action", (1,), "b"), FaultKind.FAILS_AFTER)
    lab = Lab(two_steps)
    report = await explore(
        lab, [fault], pairs=True, only=lambda fault: fault.kind is not fault.kind.CANCELLED
    )

    assert texts(report)[0] == str(fault)
    assert {text.split(", then ")[0] for text in texts(report)} == {str(fault)}
    assert not any("cancelled at" in text for text in texts(report))
    assert f"{fault}, then taking back a: fails" in texts(report)


async def test_pairs_past_a_commit():
    """Both faults come behind the commit."""

    def build(world):
        return Saga([world.step("a"), Commit(), world.step("b")])

    lab = Lab(build)
    report = await explore(lab, pairs=True)

    assert report.ok, report
    plan = "b: fails after its effect, then taking back b: runs twice"
    assert lab.logs(report)[plan] == "a> a a< b> b b< -b> -b -b< -b> -b -b<"


# --- what makes trials -------------------------------------------------------------------------


async def test_an_async_function_makes_trials():
    """A world may have to be waited for."""

    async def trial():
        await checkpoint()
        return lab()

    lab = Lab(one_step)
    report = await explore(trial)

    assert report.ok, report


async def test_a_context_manager_makes_trials_and_is_closed_each_time():
    """What a world opens is closed after its run, before the next one begins."""
    events = []

    @asynccontextmanager
    async def trial():
        assert events.count("open") == events.count("close")
        events.append("open")
        try:
            yield lab()
        finally:
            await checkpoint()
            events.append("close")

    lab = Lab(one_step)
    report = await explore(trial)

    assert report.ok, report
    assert events.count("open") == events.count("close") == len(report.results) + 3


the_same: Saga[[World], None] = Saga(
    [Step(lambda world: world.make("a"), lambda world: world.remove("a"), name="a")]
)


async def test_a_saga_may_be_the_same_each_time():
    """It is a definition; what each run has for itself is what it is called with."""
    worlds = []

    def trial():
        worlds.append(World())
        return Trial(the_same, args=(worlds[-1],), state=worlds[-1].state)

    report = await explore(trial)

    assert report.ok, report
    assert str(worlds[-1]) == "a -a -a"


async def test_a_trial_itself_is_refused():
    """It would be one world for all runs."""
    with pytest.raises(TypeError, match="trial must be a function that makes a Trial, not Trial"):
        await explore(Lab(one_step)())


async def test_a_saga_itself_is_refused():
    """Before it runs: it can be called, as a trial can."""
    world = World()
    with pytest.raises(TypeError, match=r"not <Saga 'order'>: .*; write def trial\(\)"):
        await explore(one_step(world))
    assert world.log == []


async def test_what_makes_no_trial_is_refused():
    """A function that gives the saga instead, or nothing."""
    with pytest.raises(TypeError, match="trial must return a Trial, not <Saga 'order'>"):
        await explore(lambda: one_step(World()))
    with pytest.raises(TypeError, match="trial must return a Trial, not None"):
        await explore(lambda: None)

    @asynccontextmanager
    async def nothing():
        yield 3

    with pytest.raises(TypeError, match="trial must return a Trial, not 3"):
        await explore(nothing)


# --- what cannot be explored -------------------------------------------------------------------


async def refused(trial) -> str:
    with pytest.raises(CannotExplore) as info:
        await explore(trial)
    return str(info.value)


async def test_a_saga_without_steps():
    """There is nothing to go wrong; a function that calls no step says so, too."""

    def idle(world):
        @saga
        async def idle(scope):
            world.standing.add("something")

        return idle

    assert await refused(Lab(lambda world: Saga(name="empty"))) == (
        "saga 'empty' has no steps, so there is nothing to go wrong"
    )
    assert "saga 'idle' has no steps" in await refused(Lab(idle))


async def test_a_saga_that_fails_by_itself():
    """Its own failure is shown, and is the cause."""

    def build(world):
        def broken():
            raise LookupError("no such customer")

        return Saga([world.step("a"), Step(broken)], name="order")

    with pytest.raises(CannotExplore) as info:
        await explore(Lab(build))

    assert str(info.value) == "saga 'order' fails without any fault: LookupError('no such customer')"
    assert isinstance(info.value.__cause__, LookupError)


async def test_a_saga_that_cannot_be_called_so():
    """A trial with other arguments than the saga takes is one that fails by itself."""

    def build(world):
        @saga
        async def order(scope, number): ...

        return order

    assert "fails without any fault: TypeError" in await refused(Lab(build))


async def test_a_saga_that_fails_the_second_time():
    """Both of the runs without a fault have to succeed."""
    worlds = []

    def build(world):
        worlds.append(world)

        def every_other():
            if len(worlds) == 3:
                raise LookupError("gone")

        return Saga([world.step("a"), Step(every_other)])

    assert "fails without any fault: LookupError('gone')" in await refused(Lab(build))


async def test_a_saga_that_goes_another_way_each_time():
    """The places that only one run came to are named."""
    ways = iter(range(10**6))

    def build(world):
        @saga(name="order")
        async def order(scope):
            way = next(ways)
            await scope.step(world.action("a"), compensation=world.back("a"), name=f"way {way}")

        return order

    assert await refused(Lab(build)) == (
        "saga 'order' goes another way each time, so its faults cannot be planned; only one of two "
        "runs without a fault came to: taking back way 0 at (0,), taking back way 1 at (0,), way 0 at "
        "(0,), way 1 at (0,)"
    )


async def test_a_state_that_never_changes():
    """It would look restored whatever happened."""
    message = await refused(Lab(one_step, state=lambda: 0))

    assert message == (
        "the trial's state is the same before saga 'order' and after its steps, so it would look "
        "restored whatever happened; let it return what the saga changes"
    )


async def test_a_state_that_changes_past_a_commit_only():
    """That is enough: something can be seen."""

    def build(world):
        return Saga([Step(len).bind(""), Commit(), world.step("a")])

    report = await explore(Lab(build))
    assert report.ok, report


@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (object, "was <object object at"),
        (partial(float, "nan"), "was nan, is nan"),
        (lambda: {"at": object()}, "at: was <object object at"),
    ],
)
async def test_a_state_that_differs_from_itself(make, shown):
    """What is not compared by its value would never look restored."""
    message = await refused(Lab(one_step, state=make))

    assert message.startswith(
        f"the trial's state differs from itself though nothing has run in between: {shown}"
    )
    assert message.endswith("values that are compared by ==, and leave out clocks and counters")


async def test_a_state_that_is_an_object_without_eq():
    """It is told from a copy of itself, so it would never look restored."""
    message = await refused(Lab(one_step, state=World))

    assert "whose class has no __eq__" in message
    assert "let it return vars(...) of that" in message


async def test_trials_that_share_their_world():
    """No saga is to blame for what another trial has left."""
    shared = World()

    def trial():
        return Trial(Saga([Step(shared.action("a"))], name="order"), state=shared.state)

    assert await refused(trial) == (
        "trials begin in different states: is something shared between them? 'a' is left; let each call "
        "of the trial's function make its own world, and its state leave out random ids"
    )
    same = Lab(lambda world: Saga([Step(world.action("a"))]))()
    assert "trials begin in different states" in await refused(lambda: same)


async def test_a_state_with_a_clock():
    """A counter in the state is shown."""
    ticks = iter(range(10**6))

    assert "in between: ticks: was 0, is 1;" in await refused(
        Lab(one_step, state=lambda: {"ticks": next(ticks)})
    )


async def test_a_state_that_cannot_be_compared():
    """Its own exception is shown."""

    class Odd:
        def __eq__(self, other):
            raise NotImplementedError("compared")

        __hash__ = None

    assert "cannot be compared by ==: NotImplementedError('compared')" in await refused(
        Lab(one_step, state=Odd)
    )


async def test_checkpoints_that_are_not_certain_are_left_out():
    """How often something waits may depend on more than the saga; what both runs did is tried."""
    worlds = []

    def build(world):
        worlds.append(world)
        more = 5 if len(worlds) == 2 else 1

        async def waiting():
            for _ in range(more):
                await checkpoint()
            world.make("a")

        return Saga([Step(waiting, world.back("a"), name="a")])

    report = await explore(Lab(build))

    assert report.ok, report
    plans = without_native(set(texts(report)))
    assert {plan for plan in plans if plan.startswith("a: cancelled")} == {
        "a: cancelled at checkpoint 1"
    }


# --- being stopped -----------------------------------------------------------------------------


class Stuck:
    """Trials of a saga, one of which waits in its action until it is cancelled."""

    def __init__(self, number: int, **hooks) -> None:
        self.number = number
        self.waits = Event()
        self.lab = Lab(self.build)
        self.events: list[str] = []

    def build(self, world: World):
        async def action():
            world.make("a")
            if len(self.lab.worlds) == self.number:
                self.waits.set()
                await sleep_forever()
            await checkpoint()

        return Saga([Step(action, world.back("a"), name="a")])

    @asynccontextmanager
    async def trial(self):
        self.events.append("open")
        try:
            yield self.lab()
        finally:
            self.events.append("close")

    def check(self) -> None:
        assert len(self.lab.worlds) == self.number
        assert str(self.lab.worlds[-1]) == "a -a> -a -a<"
        assert self.lab.worlds[-1].standing == set()
        assert self.events == ["open", "close"] * self.number


# In the first run to learn, and in one of a fault.
@pytest.mark.parametrize("number", [2, 6])
async def test_a_cancelled_exploration_takes_back_the_run_under_way(number):
    """A scope around it: the run under way is taken back, its world is closed, and no other begins."""
    stuck = Stuck(number)
    ended = []

    async def exploring():
        with CancelScope() as scope:
            tasks.start_soon(cancelling, scope)
            await explore(stuck.trial)
            ended.append("not cancelled")  # pragma: no cover - what must not happen
        ended.append(scope.cancelled_caught)

    async def cancelling(scope):
        await stuck.waits.wait()
        scope.cancel()

    async with create_task_group() as tasks:
        tasks.start_soon(exploring)

    assert ended == [True]
    stuck.check()


@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
@pytest.mark.parametrize("number", [2, 6])
async def test_a_natively_cancelled_exploration_takes_back_the_run_under_way(number):
    """So does ``task.cancel()`` of who explores, and the task ends cancelled."""
    stuck = Stuck(number)
    task = asyncio.ensure_future(explore(stuck.trial))
    await stuck.waits.wait()
    task.cancel()
    await asyncio.wait([task])

    assert task.cancelled()
    stuck.check()


@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
async def test_a_cancellation_from_outside_is_not_taken_for_the_planned_one():
    """Where the run was cancelled natively by plan, one from outside goes on all the same."""
    waits, go_on = Event(), Event()

    def build(world):
        async def back():
            world.log.append("-a>")
            if len(lab.worlds) == 4:
                waits.set()
                await go_on.wait()
            world.remove("a")

        return Saga([Step(world.action("a"), back)])

    lab = Lab(build)
    place = Place("action", (0,), "a")
    plan = Plan((Fault(place, FaultKind.CANCELLED_NATIVELY, 2),))
    task = asyncio.ensure_future(explore(lab, [plan, plan]))
    await waits.wait()
    task.cancel()
    for _ in range(10):
        await checkpoint()
    assert not task.done()
    go_on.set()
    await asyncio.wait([task])

    assert task.cancelled()
    assert len(lab.worlds) == 4
    assert str(lab.worlds[-1]) == "a> a -a> -a"


# --- faults ------------------------------------------------------------------------------------


def test_faults_are_what_explore_would_try():
    """The same plans in the same order, on the loop that is asked for."""
    for backend in ("asyncio", "trio"):
        plans = faults(Lab(two_steps), backend=backend)
        report = anyio.run(explore, Lab(two_steps), backend=backend)

        assert [result.plan for result in report.results] == plans
    assert not any("natively" in str(plan) for plan in plans)


def test_faults_are_chosen_by_only():
    """As by `explore`."""
    plans = faults(Lab(one_step), only=lambda fault: fault.place.kind == "compensation")

    assert {fault.place.kind for plan in plans for fault in plan.faults} == {"compensation"}


def test_faults_refuse_what_explore_refuses():
    """A saga that cannot be explored fails where the tests are collected."""
    with pytest.raises(CannotExplore, match="has no steps"):
        faults(Lab(lambda world: Saga()))
    with pytest.raises(TypeError, match="must be a function that makes a Trial"):
        faults(None)


def test_backend_options_are_those_of_anyio():
    """They reach the loop."""
    used = []

    def loop_factory():
        used.append(asyncio.new_event_loop())
        return used[-1]

    assert faults(Lab(one_step), backend_options={"loop_factory": loop_factory})
    assert len(used) == 1


@pytest.mark.anyio
async def test_faults_are_not_listed_inside_of_a_loop():
    """That is said with what to write instead; and so it is where Hypothesis draws plans."""
    with pytest.raises(RuntimeError, match=r"faults: .*already; .* or write `await explore\(trial\)`"):
        faults(Lab(one_step))
    with pytest.raises(
        RuntimeError, match=r"fault_plans: this runs the saga in an event loop of its own"
    ):
        given(fault_plans(Lab(one_step)))(lambda plan: None)()


def test_options_of_the_backend_may_be_any_mapping():
    """They are made a dict, as anyio wants them."""
    assert faults(Lab(one_step), backend_options=MappingProxyType({"debug": True}))


def test_ids_are_readable_in_pytest():
    """A plan's id is its sentence; steps of one name are told apart by their path."""

    def build(world):
        return Saga(
            [
                world.step("charge_card"),
                Saga([Step(world.action("x"), world.back("x"), name="pay")]),
                Saga([Step(world.action("y"), world.back("y"), name="pay")]),
            ]
        )

    plans = faults(Lab(build))
    mark = pytest.mark.parametrize("fault", plans).mark
    ids = [plan.__name__ for plan in mark.args[1]]

    assert "charge_card: cancelled at checkpoint 2" in ids
    assert "taking back charge_card: fails" in ids
    assert {"pay at 1.0: runs twice", "pay at 2.0: runs twice"} <= set(ids)
    assert "taking back pay at 2.0: cancelled at checkpoint 1" in ids
    assert len(set(ids)) == len(ids)


PLANS = faults(Lab(one_step))


@pytest.mark.parametrize("fault", PLANS)
async def test_each_fault_as_a_test_of_its_own(fault, request):
    """A list of faults goes into ``parametrize``, and each of them into `explore`."""
    assert f"{fault}" in request.node.name
    if on_asyncio() or "natively" not in str(fault):
        report = await explore(Lab(one_step), [fault])
        assert report.ok, report
        assert texts(report) == [str(fault)]


# --- the law -----------------------------------------------------------------------------------


@st.composite
def sagas(draw, depth=2):
    """Draws how to build a saga of a ledger's steps that is right by construction.

    Every step has a compensation, so whatever happens can be taken back; each effect is made and
    taken back by its key, so it can be asked for twice.
    """
    numbers = iter(range(10**6))

    def step():
        name = f"{next(numbers)}"
        options = draw(
            st.fixed_dictionaries(
                {},
                optional={
                    "shield": st.just(True),
                    "retry": st.just(three_times),
                    "compensation_retry": st.just(three_times),
                    "not_applied": st.just(LookupError),
                    "checkpoints": st.tuples(st.integers(0, 2), st.integers(0, 2)),
                },
            )
        )
        return lambda ledger: ledger.step(name, **options)

    def parts(depth, least=1):
        return [part(depth) for _ in range(draw(st.integers(least, 2)))]

    def part(depth):
        kind = draw(st.sampled_from(["step", "group", "saga", "function"][: 4 if depth else 1]))
        if kind == "step":
            return step()
        inner = parts(depth - 1)
        limit = draw(st.sampled_from([None, 1]))
        on_failure = draw(st.sampled_from(["cancel", "finish"]))
        stop = draw(st.sampled_from(["continue", "stop"]))
        if kind == "group":
            return lambda ledger: Parallel(
                *(build(ledger) for build in inner), limit=limit, on_failure=on_failure
            )
        if kind == "saga":
            return lambda ledger: Saga([build(ledger) for build in inner], on_compensation_failure=stop)
        return partial(function, inner, catches=draw(st.booleans()))

    def function(inner, ledger, *, catches):
        made = [build(ledger) for build in inner]

        @saga
        async def calls(scope: SagaScope) -> None:
            for one in made[1:]:
                await scope.step(one)
            try:
                async with scope.nested() as nested:
                    await nested.step(made[0])
            except Exception:
                if not catches:
                    raise

        return calls

    top = parts(depth)
    if draw(st.booleans()):
        top.append(lambda ledger: Commit())
        top += parts(1, least=0)
    return lambda ledger: Saga([build(ledger) for build in top], middleware=[ledger.watch])


@pytest.mark.parametrize("backend", WITHOUT_DEBUG)
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(build=sagas())
def test_a_saga_that_is_right_survives_every_fault(backend, build):
    """The engine's own law: whatever goes wrong, everything that happened is taken back."""
    name, options = backend

    def trial():
        ledger = EffectsLedger()
        return Trial(build(ledger), state=ledger.snapshot, failure=OSError)

    report = anyio.run(explore, trial, backend=name, backend_options=options)

    assert report.ok, report
    assert all(result.reached for result in report.results)
