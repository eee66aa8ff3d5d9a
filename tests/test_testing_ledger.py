"""The fake world that keeps books: what is an error in it, and what is none."""

from __future__ import annotations

import pytest
from anyio import Event
from anyio.lowlevel import checkpoint
from helpers import Boom
from worlds import three_times

from pysagas import (
    CompensationFailed,
    Parallel,
    Saga,
    SagaScope,
    Step,
    StepState,
    current_effect,
    outcome_of,
    saga,
)
from pysagas.testing import EffectsLedger, FaultKind, LedgerError, Trial, explore

pytestmark = pytest.mark.anyio


async def boom():
    raise Boom


async def failing(*parts, **options):
    """Carries out parts, and then fails; gives what the saga raised."""
    try:
        await Saga([*parts, Step(boom)], **options)()
    except Exception as error:
        return error


# --- by hand -----------------------------------------------------------------------------------


def test_what_was_made_stands_until_it_is_taken_back():
    """The snapshot has the names, sorted; the history has all that happened."""
    ledger = EffectsLedger()
    ledger.make("hotel")
    ledger.make("flight")
    assert ledger.snapshot() == ("flight", "hotel")

    assert ledger.take_back("flight") is True
    assert ledger.snapshot() == ("hotel",)
    assert ledger.history == ["make hotel", "make flight", "take back flight"]


def test_a_ledger_error_fails_a_test():
    """It is an assertion that did not hold."""
    assert issubclass(LedgerError, AssertionError)


def test_what_is_made_twice():
    """A second effect of a name is an error, with how to write what may be repeated."""
    ledger = EffectsLedger()
    ledger.make("hotel", key="1")

    message = r"^'hotel' is made twice; a request that may be repeated is told by its key: make\(name, "
    for key in (None, "2"):
        with pytest.raises(LedgerError, match=message):
            ledger.make("hotel", key=key)
    ledger.make("flight")
    with pytest.raises(LedgerError, match="'flight' is made twice"):
        ledger.make("flight")


def test_what_is_made_twice_with_one_key():
    """The same request changes nothing."""
    ledger = EffectsLedger()
    ledger.make("hotel", key="1")
    ledger.make("hotel", key="1")

    assert ledger.history == ["make hotel"]


def test_what_is_taken_back_twice():
    """A second time is an error, with how to write what may be repeated."""
    ledger = EffectsLedger()
    ledger.make("hotel")
    ledger.take_back("hotel", key="1")

    message = r"^'hotel' is taken back twice; a request .* by its key: take_back\(name, "
    for key in (None, "2"):
        with pytest.raises(LedgerError, match=message):
            ledger.take_back("hotel", key=key)
    assert ledger.history == ["make hotel", "take back hotel"]


def test_what_is_taken_back_twice_with_one_key():
    """The same request changes nothing."""
    ledger = EffectsLedger()
    ledger.make("hotel")

    assert ledger.take_back("hotel", key="1") is True
    assert ledger.take_back("hotel", key="1") is False


def test_what_was_never_made_may_be_taken_back():
    """Nobody may know how far an action came; but once only, here too."""
    ledger = EffectsLedger()

    assert ledger.take_back("hotel", key="1") is False
    assert ledger.take_back("hotel", key="1") is False
    assert ledger.history == []
    with pytest.raises(LedgerError, match="'hotel' is taken back twice"):
        ledger.take_back("hotel")


async def test_what_was_never_made_may_be_taken_back_at_each_place_once():
    """A loop that tries again what has failed takes back nothing, each time at a place of its own."""
    ledger = EffectsLedger()
    hotel = ledger.step("hotel")
    missing = 2

    async def book():
        nonlocal missing
        if missing:
            missing -= 1
            raise Boom
        await hotel.action()

    @saga
    async def booking(scope: SagaScope) -> None:
        for _ in range(2):
            with pytest.raises(Boom):
                await scope.step(book, compensation=hotel.compensation)
        await scope.step(book, compensation=hotel.compensation)

    outcome = await booking.run()
    assert [step.state for step in outcome.steps] == [
        StepState.COMPENSATED,
        StepState.COMPENSATED,
        StepState.COMPLETED,
    ]
    await outcome.rollback()
    assert ledger.history == ["make hotel", "take back hotel"]


async def test_what_comes_too_late_is_known_of_the_last_place():
    """It is the action that was taken back last which does not act any more."""
    ledger = EffectsLedger()
    late = []

    async def book():
        late.append(lambda: ledger.make("hotel"))
        raise Boom

    async def cancel():
        ledger.take_back("hotel", key=current_effect().key)
        if len(late) == 2:
            late[1]()

    @saga
    async def booking(scope: SagaScope) -> None:
        with pytest.raises(Boom):
            await scope.step(book, compensation=cancel)
        await scope.step(book, compensation=cancel)

    with pytest.raises(CompensationFailed) as info:
        await booking()
    assert [str(failure) for failure in info.value.failures] == [
        "'hotel' is made at (1,) after it was taken back: it came too late"
    ]


def test_the_order_in_which_effects_are_taken_back():
    """What was made later goes first."""
    ledger = EffectsLedger()
    for name in ("flight", "hotel", "car"):
        ledger.make(name)

    with pytest.raises(
        LedgerError, match="^'flight' is taken back while 'hotel', made after it, stands$"
    ):
        ledger.take_back("flight")
    assert ledger.snapshot() == ("car", "flight", "hotel")
    for name in ("car", "hotel", "flight"):
        assert ledger.take_back(name)
    assert ledger.snapshot() == ()


def test_what_was_taken_back_can_be_made_again():
    """By something else than the action that was taken back."""
    ledger = EffectsLedger()
    for number in range(2):
        ledger.make("hotel", key=f"{number}")
        assert ledger.take_back("hotel", key=f"-{number}")

    assert ledger.history == ["make hotel", "take back hotel"] * 2


# --- in sagas ----------------------------------------------------------------------------------


async def test_a_step_makes_its_effect_and_takes_it_back():
    """With its name, whatever it is called with; its action returns the name."""
    ledger = EffectsLedger()
    step = ledger.step("hotel")
    outcome = await Saga([step]).run(1, 2, three=3)

    assert step.name == "hotel"
    assert outcome.steps[0].result == "hotel"
    assert ledger.snapshot() == ("hotel",)
    await outcome.rollback()
    assert ledger.history == ["make hotel", "take back hotel"]


async def test_a_step_with_an_undo():
    """The same, taken back by what its action returned."""
    ledger = EffectsLedger()
    step = ledger.step("hotel", undo=True)
    assert (step.compensation, step.undo is None) == (None, False)

    assert isinstance(await failing(step), Boom)
    assert ledger.history == ["make hotel", "take back hotel"]


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 0), (0, 1), (1, 1)])
async def test_how_often_a_step_waits(before, after):
    """Before its effect and after it, as often as it is told; and once on its way back."""

    def trial():
        ledger = EffectsLedger()
        saga = Saga([ledger.step("hotel", checkpoints=(before, after))])
        return Trial(saga, state=ledger.snapshot)

    report = await explore(trial, only=lambda fault: fault.kind is FaultKind.CANCELLED)

    assert report.ok, report
    assert [str(result.plan) for result in report.results[1:]] == [
        *(f"hotel: cancelled at checkpoint {number}" for number in range(1, before + after + 1)),
        "taking back hotel: cancelled at checkpoint 1",
    ]


async def test_a_step_has_the_options_of_steps():
    """They are handed on."""
    step = EffectsLedger().step("hotel", shield=True, not_applied=Boom, timeout=3)

    assert (step.shield, step.not_applied, step.timeout) == (True, (Boom,), 3)


async def test_a_step_that_is_tried_again_is_one_request():
    """Its key is the same each time, so nothing is made twice."""
    ledger = EffectsLedger()
    step = ledger.step("hotel")
    lost = [Boom(), Boom()]

    async def action():
        await step.action()
        if lost:
            raise lost.pop()

    await Saga([Step(action, step.compensation, retry=three_times)])()
    assert ledger.history == ["make hotel"]


async def test_an_action_that_is_not_told_by_its_key():
    """Tried again, it is an effect made twice; the message says which step it was."""
    ledger = EffectsLedger()

    async def action():
        ledger.make("hotel")
        raise Boom

    with pytest.raises(LedgerError, match=r"'hotel' is made twice at \(0,\)"):
        await Saga([Step(action, retry=three_times)])()


async def test_an_effect_that_comes_too_late():
    """An action that was taken back does not act any more."""
    ledger = EffectsLedger()
    late = []

    async def action():
        key = current_effect().key
        late.append(lambda: ledger.make("hotel", key=key))
        raise Boom

    async def compensation():
        ledger.take_back("hotel", key=current_effect().key)
        # A request that was on its way: it arrives within the step whose action it was.
        late[0]()

    error = await failing(Step(action, compensation))

    assert isinstance(error, CompensationFailed)
    (failure,) = error.failures
    assert str(failure) == "'hotel' is made at (0,) after it was taken back: it came too late"


def takes_back(ledger, name):
    """A step that takes back what it did not make."""
    return Step(lambda: ledger.take_back(name, key="its own"))


async def test_the_order_within_a_saga():
    """What takes back something earlier, while its own effect or another stands, is found."""
    ledger = EffectsLedger()

    with pytest.raises(LedgerError) as info:
        await Saga([ledger.step("first"), ledger.step("second"), takes_back(ledger, "first")])()
    assert str(info.value).startswith(
        "'first' at (0,) is taken back while 'second' at (1,), made after it, stands"
    )
    assert ledger.snapshot() == ()


async def test_what_was_tried_in_vain_does_not_stand_in_the_way():
    """A later effect whose compensation failed is left; the earlier ones are taken back all the same."""
    ledger = EffectsLedger()
    second = ledger.step("second")
    error = await failing(ledger.step("first"), Step(second.action, boom), middleware=[ledger.watch])

    assert [type(failure) for failure in error.failures] == [Boom]
    assert ledger.snapshot() == ("second",)


async def test_what_is_in_doubt_and_cannot_be_undone_does_not_stand_in_the_way():
    """A later effect that has an undo alone is left when its answer is lost; the earlier one is taken back."""
    ledger = EffectsLedger()
    second = ledger.step("second", undo=True)

    async def lost():
        await second.action()
        raise Boom

    parts = [ledger.step("first"), Step(lost, undo=second.undo)]
    with pytest.raises(Boom) as info:
        await Saga(parts, middleware=[ledger.watch])()

    outcome = outcome_of(info.value)
    assert [step.state for step in outcome.steps] == [StepState.COMPENSATED, StepState.UNKNOWN]
    assert ledger.history == ["make first", "make second", "take back first"]


async def test_a_compensation_that_takes_back_what_came_before_its_own_is_found():
    """It is being tried, and yet its own effect stands: that is out of order."""
    ledger = EffectsLedger()
    second = ledger.step("second")

    async def wrong():
        ledger.take_back("first", key=current_effect().key)

    error = await failing(ledger.step("first"), Step(second.action, wrong), middleware=[ledger.watch])

    assert [str(failure) for failure in error.failures] == [
        "'first' at (0,) is taken back while 'second' at (1,), made after it, stands"
    ]
    # The failed one does not stand in the way of the first.
    assert ledger.snapshot() == ("second",)


async def test_without_watching_it_stands_in_the_way():
    """The ledger knows by `watch` alone what was tried."""
    ledger = EffectsLedger()
    second = ledger.step("second")
    error = await failing(ledger.step("first"), Step(second.action, boom))

    assert [type(failure) for failure in error.failures] == [Boom, LedgerError]
    assert "give the saga middleware=[ledger.watch]" in str(error.failures[1])


def members(ledger):
    """Two members of a group, of which the one made first is taken back first."""
    first_is_back = Event()
    first, second = ledger.step("first"), ledger.step("second", checkpoints=(2, 0))

    async def back_first():
        await first.compensation()
        first_is_back.set()

    async def back_second():
        await first_is_back.wait()
        await second.compensation()

    return Step(first.action, back_first), Step(second.action, back_second)


async def test_members_of_a_group_are_taken_back_in_any_order():
    """Between them there is none, if the ledger knows of the group."""
    ledger = EffectsLedger()
    error = await failing(Parallel(*members(ledger)), middleware=[ledger.watch])

    assert isinstance(error, Boom)
    assert ledger.history[-2:] == ["take back first", "take back second"]


async def test_sagas_in_a_group_are_taken_back_in_any_order():
    """It is the member that counts in which a step stands, however deep."""
    ledger = EffectsLedger()
    first, second = members(ledger)
    group = Parallel(Saga([first]), Saga([Saga([second])]))
    error = await failing(Saga([group]), middleware=[ledger.watch])

    assert isinstance(error, Boom)
    assert ledger.history[-2:] == ["take back first", "take back second"]


async def test_members_of_a_group_that_the_ledger_does_not_know():
    """Then the message says how it would."""
    ledger = EffectsLedger()

    async def out_of_order():
        ledger.take_back("first", key=current_effect().key)

    # Both are made before one of them is taken back, by the other.
    first, second = ledger.step("first", checkpoints=(0, 0)), ledger.step("second", checkpoints=(2, 0))
    error = await failing(Parallel(Step(first.action, lambda: None), Step(second.action, out_of_order)))

    assert isinstance(error, CompensationFailed)
    assert str(error.failures[0]) == (
        "'first' at (0, 0) is taken back while 'second' at (0, 1), made after it, stands; if they are "
        "members of a parallel group, give the saga middleware=[ledger.watch]"
    )


async def test_what_comes_after_a_group_goes_before_it():
    """The order holds between a member and a step behind the group."""
    ledger = EffectsLedger()
    group = Parallel(ledger.step("inside"))
    parts = [group, ledger.step("behind"), takes_back(ledger, "inside")]

    with pytest.raises(
        LedgerError, match=r"^'inside' at \(0, 0\) is taken back while 'behind' at \(1,\)"
    ):
        await Saga(parts, middleware=[ledger.watch])()


async def test_within_a_member_there_is_an_order():
    """A saga that is a member takes back its own steps one after the other."""
    ledger = EffectsLedger()
    inner = Saga([ledger.step("first"), ledger.step("second"), takes_back(ledger, "first")])

    with pytest.raises(ExceptionGroup) as info:
        await Saga([Parallel(inner)], middleware=[ledger.watch])()
    (error,) = info.value.exceptions
    # Who watches gets no hint how to.
    assert str(error) == (
        "'first' at (0, 0, 0) is taken back while 'second' at (0, 0, 1), made after it, stands"
    )


async def test_within_a_step_there_is_an_order():
    """A step that makes two effects takes them back in reverse, in a group too."""
    ledger = EffectsLedger()

    def both(*names):
        for name in names:
            ledger.make(name)

    def back(*names):
        for name in names:
            ledger.take_back(name)

    right = Step(lambda: both("flight", "hotel"), lambda: back("hotel", "flight"))
    assert isinstance(await failing(Parallel(right), middleware=[ledger.watch]), Boom)

    wrong = Step(lambda: both("car", "boat"), lambda: back("car", "boat"))
    error = await failing(Parallel(wrong))
    assert str(error.failures[0]).startswith(
        "'car' at (0, 0) is taken back while 'boat' at (0, 0), made after it, stands"
    )


async def test_two_runs_with_one_ledger():
    """A second run makes its own effects, and takes back those alone."""
    ledger = EffectsLedger()
    booking = Saga([ledger.step("hotel")])
    first = await booking.run()
    await first.rollback()
    second = await booking.run()

    assert ledger.snapshot() == ("hotel",)
    await second.rollback()
    assert ledger.history == ["make hotel", "take back hotel"] * 2


async def test_what_another_run_has_made_is_not_taken_back():
    """A run that is refused, since the effect stands, leaves it to the one that made it."""
    ledger = EffectsLedger()
    booking = Saga([ledger.step("hotel")])
    first = await booking.run()

    with pytest.raises(LedgerError, match="'hotel' is made twice"):
        await booking()
    assert ledger.history == ["make hotel"]
    await first.rollback()
    assert ledger.history == ["make hotel", "take back hotel"]


async def test_two_runs_at_the_same_time():
    """Runs have an order among themselves, too."""
    ledger = EffectsLedger()
    first = await Saga([ledger.step("hotel")]).run()
    second = await Saga([ledger.step("car")]).run()

    with pytest.raises(CompensationFailed, match=r"'hotel' at \(0,\) is taken back while 'car'"):
        await first.rollback()
    await second.rollback()
    assert ledger.snapshot() == ("hotel",)


async def test_members_of_the_groups_of_two_runs():
    """A group is one of its run: what stands at the same place of another run is no member of it."""
    ledger = EffectsLedger()

    def run(*names):
        group = Parallel(*(Step(len).bind("") if name is None else ledger.step(name) for name in names))
        return Saga([group], middleware=[ledger.watch]).run()

    first = await run("hotel", None)
    await run(None, "car")

    with pytest.raises(
        CompensationFailed, match=r"'hotel' at \(0, 0\) is taken back while 'car' at \(0, 1\)"
    ):
        await first.rollback()


async def test_a_run_and_what_was_there_before_it():
    """What stood before a run is none of its business; but it cannot go while the run's effects stand."""
    ledger = EffectsLedger()
    ledger.make("customer")
    outcome = await Saga([ledger.step("hotel")]).run()

    with pytest.raises(LedgerError, match="^'customer' is taken back while 'hotel' at .0,., made"):
        ledger.take_back("customer")
    await outcome.rollback()
    assert ledger.take_back("customer")


async def test_watching_changes_nothing():
    """As a middleware it lets everything through, with its result."""
    ledger = EffectsLedger()

    @saga(middleware=[ledger.watch])
    async def booking(scope: SagaScope) -> str:
        (name,) = await scope.parallel(ledger.step("hotel").bind())
        await checkpoint()
        return name

    assert await booking() == "hotel"
