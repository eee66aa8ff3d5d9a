"""What is promised, each time as a run and what has to come of it. See docs/reference/guarantees.md."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import anyio

from pysagas import CompensationFailed
from pysagas.durable import NotRecordable, OtherRun, RunInProgress, SagaChanged

from . import _sagas as sagas
from ._sagas import Broken, Class, Receipt, Refused, Ticket
from ._stage import Ending, Run, Stage, expect

# Seconds after which what has not happened is believed not to: a run goes on, a step is cut off.
_LONG_ENOUGH = 0.5


def _back(*names: str) -> list[str]:
    return [f"cancel {name}" for name in names]


def _there(*names: str) -> list[str]:
    return [f"book {name}" for name in names]


def expect_error(ending: Ending, kind: type[Exception], text: str = "") -> None:
    """Checks what a run ended with."""
    if not isinstance(ending.error, kind) or text not in str(ending.error):
        raise AssertionError(
            f"it ended with {ending.error!r}, and should with a {kind.__name__} {text}"
        )


def expect_taken_back(run: Run, ending: Ending) -> None:
    """Checks that nothing is left."""
    expect(run.standing, [], "what is left")
    expect(ending.state, "compensated", "its state")


# --- going forward ------------------------------------------------------------------------------


async def in_order(stage: Stage) -> None:
    """Checks the order of steps."""
    run = stage(sagas.trip)
    ending = await run.run()
    expect(run.done, _there("flight", "hotel", "car", "ticket"), "the steps")
    expect(ending.state, "completed", "its state")
    expect(set(ending.states.values()), {"completed"}, "the states of the steps")


async def results(stage: Stage) -> None:
    """Checks the results of steps and members."""
    ending = await stage(sagas.values).run()
    expect(ending.value, ["flight", "hotel", "car"], "the results")


async def at_the_same_time(stage: Stage) -> None:
    """Checks that each member waits for what only another one's end can bring."""
    run = stage(sagas.finishing, book_hotel="waits", book_car="waits")
    async with run.running():
        await run.wait_for("begin book hotel")
        await run.wait_for("begin book car")
        run.let_all_go()
    expect(run.ending.state, "completed", "its state")


async def limit(stage: Stage) -> None:
    """Checks that a group with a limit begins a member where another one ends."""
    run = stage(sagas.limited, **{f"book_m{number}": "waits" for number in range(4)})
    async with run.running():
        await run.wait_for("begin book m0")
        await run.wait_for("begin book m1")
        expect(dict(run.begun), {"book m0": 1, "book m1": 1}, "the members that have begun")
        run.let_go("book m1")
        await run.wait_for("begin book m2")
        expect(run.begun["book m3"], 0, "how often the fourth has begun")
        run.let_all_go()
    expect(run.ending.state, "completed", "its state")


async def caught(stage: Stage) -> None:
    """Checks that a function can catch a failure, which is taken back by then."""
    run = stage(sagas.detour, book_opera="fails")
    expect((await run.run()).value, "by the other way", "its value")
    there = _there("flight", "hotel")
    expect(run.done, [*there, *_back("opera", "hotel"), *_there("car", "ticket")], "the steps")


async def caught_and_failed(stage: Stage) -> None:
    """Checks that a caught failure that cannot be taken back fails the saga."""
    run = stage(sagas.detour, book_opera="fails", cancel_hotel="breaks")
    ending = await run.run()
    expect_error(ending, CompensationFailed)
    expect(ending.state, "failed", "its state")
    expect(run.standing, ["hotel"], "what is left")
    expect(run.begun["book car"], 0, "how often it went on")


# --- how a step is taken back -------------------------------------------------------------------


async def undo(stage: Stage) -> None:
    """Checks that what has returned is taken back by its undo, with its result."""
    run = stage(sagas.of_its_own, book_ticket="fails")
    ending = await run.run()
    expect_error(ending, Refused, "book ticket")
    expect(run.standing, [], "what is left")
    wanted = f"done cancel room a room by {run.run_id}/0/action {run.run_id}/0/compensation"
    lines = anyio.Path(run.order.log)
    expect(
        wanted in (await lines.read_text(encoding="utf-8")).splitlines(), True, f"whether {wanted!r}"
    )


async def in_doubt(stage: Stage) -> None:
    """Checks that what is in doubt is compensated, or stays unknown."""
    run = stage(sagas.of_its_own, after_book_room="fails")
    ending = await run.run()
    expect(run.done, [*_there("room"), *_back("room")], "the steps")
    expect(ending.states["room"], "compensated", "the state of a step with a compensation")
    run = stage(sagas.of_its_own, after_book_table="fails")
    ending = await run.run()
    expect(ending.states["table"], "unknown", "the state of a step with an undo alone")
    expect(run.standing, ["table"], "what is left")
    doubtful = [] if ending.outcome is None else [step.name for step in ending.outcome.in_doubt]
    expect(doubtful, ["table"], "what is in doubt")


async def not_applied(stage: Stage) -> None:
    """Checks that a step which says that it did nothing is not taken back."""
    run = stage(sagas.of_its_own, book_opera="declines")
    ending = await run.run()
    expect(run.done, [*_there("room", "table"), *_back("table", "room")], "the steps")
    expect(ending.states["opera"], "not applied", "the state of the step")


# --- groups ------------------------------------------------------------------------------------


async def finish(stage: Stage) -> None:
    """Checks that with "finish" those in flight come to their own end before anything goes back."""
    run = stage(sagas.finishing, book_hotel="waits", book_car="fails")
    async with run.running():
        await run.wait_for("begin book hotel")
        await run.wait_for("begin book car")
        run.let_go("book hotel")
    expect(run.events.count("cut book hotel"), 0, "how often a member was cut off")
    expect(run.done[:2], _there("flight", "hotel"), "what was made")
    expect_taken_back(run, run.ending)


async def siblings_are_cut(stage: Stage) -> None:
    """Checks that a failure cuts the siblings off, and that they are in doubt."""
    run = stage(sagas.pair, book_hotel="waits", book_car="waits fails")
    async with run.running():
        await run.wait_for("begin book hotel")
        await run.wait_for("begin book opera")
        run.let_go("book car")
        await run.wait_for("cut book hotel")
    expect(run.begun["cancel hotel"], 1, "how often what was cut off was taken back")
    expect_taken_back(run, run.ending)


async def siblings_finish(stage: Stage) -> None:
    """Checks that siblings come to their end, where nothing in flight can be cut off."""
    run = stage(sagas.pair, book_hotel="waits", book_car="fails")
    async with run.running():
        await run.wait_for("begin book hotel")
        await run.wait_for("begin book car")
        await anyio.sleep(_LONG_ENOUGH)
        run.let_go("book hotel")
    expect(run.events.count("cut book hotel"), 0, "how often a member was cut off")
    expect("book hotel" in run.done, True, "whether the sibling has come to its end")
    expect_taken_back(run, run.ending)


async def entered_in_order(stage: Stage) -> None:
    """Checks the order in which members are entered. When their actions begin is the loop's choice."""
    run = stage(sagas.in_order)
    expect((await run.run()).value, None, "its value")
    entered = [line for line in run.events if line.startswith("begin member")]
    expect(
        entered, [f"begin member m{number}" for number in range(4)], "the members as they were entered"
    )


# --- what the caller gets -----------------------------------------------------------------------


async def own_exception(stage: Stage) -> None:
    """Checks that a step's own exception comes out, with a note."""
    ending = await stage(sagas.trip, book_car="breaks").run()
    expect_error(ending, Broken, "book car")
    notes = "\n".join(getattr(ending.error, "__notes__", ()))
    expect("car" in notes and "trip" in notes, True, f"whether saga and step are named in {notes!r}")


async def group_exception(stage: Stage) -> None:
    """Checks that a group's failures come out as a group, each of its own type."""
    run = stage(sagas.finishing, book_hotel="waits fails", book_car="waits breaks")
    async with run.running():
        await run.wait_for("begin book hotel")
        await run.wait_for("begin book car")
        run.let_all_go()
    expect_error(run.ending, ExceptionGroup, "the group")
    error: Any = run.ending.error
    expect(
        sorted([type(one).__name__ for one in error.exceptions]), ["Broken", "Refused"], "the failures"
    )
    single: Any = (await stage(sagas.finishing, book_car="breaks").run()).error
    expect(type(single).__name__, "ExceptionGroup", "the failure of one member")


async def expected(stage: Stage) -> None:
    """Checks that an expected failure is swallowed, if nothing is left of the run."""
    run = stage(sagas.trip, book_car="fails")
    ending = await run.run(exceptions=Refused)
    expect(repr(ending.error), "None", "what was raised")
    expect_taken_back(run, ending)
    run = stage(sagas.trip, book_car="fails", cancel_hotel="breaks")
    expect_error(await run.run(exceptions=Refused), CompensationFailed)
    expect_error(await stage(sagas.trip, book_car="breaks").run(exceptions=Refused), Broken)


async def states(stage: Stage) -> None:
    """Checks that each step ends in the state that fits, in a run where all six are met."""
    faults = {"book_opera": "waits declines", "after_book_table": "fails", "cancel_hotel": "breaks"}
    run = stage(sagas.all_states, **faults)
    async with run.running():
        await run.wait_for("done book table")
        run.let_go("book opera")
    wanted = {
        "bus": "completed",
        "flight": "compensated",
        "hotel": "compensation failed",
        "opera": "not applied",
        "table": "unknown",
        "ticket": "not started",
    }
    expect(run.ending.states, wanted, "the states of the steps")


async def commit(stage: Stage) -> None:
    """Checks that what was done before a commit stays, and that the failure is raised."""
    run = stage(sagas.committed, book_ticket="fails")
    ending = await run.run(exceptions=Refused)
    expect_error(ending, Refused)
    expect(ending.state, "failed", "its state")
    expect(run.standing, ["flight"], "what is left")
    expect(ending.states["hotel"], "compensated", "the state of what came after the commit")


# --- cancelling ---------------------------------------------------------------------------------


async def _cancelled_in_hotel(run: Run) -> None:
    async with run.running():
        await run.wait_for("begin book hotel")
        await run.cancel()
        run.let_go("book hotel")


async def waited_for(stage: Stage) -> None:
    """Checks that shielded and blocking steps come to their end though the run is cancelled."""
    for saga in (sagas.shielded, sagas.blocking):
        run = stage(saga, book_hotel="waits")
        await _cancelled_in_hotel(run)
        expect("book hotel" in run.done, True, "whether the step has come to its end")
        expect(run.begun["book ticket"], 0, "how often it went on")
        expect_taken_back(run, run.ending)


async def cancelled(stage: Stage) -> None:
    """Checks that a run that is cancelled is taken back, and begins nothing more."""
    run = stage(sagas.trip, book_hotel="waits")
    async with run.running():
        await run.wait_for("begin book hotel")
        await run.cancel()
        if run.lacks("cut"):
            run.let_go("book hotel")
    expect(run.begun["book car"], 0, "how often it went on")
    expect(run.begun["cancel hotel"], 1, "how often the step in flight was taken back")
    expect(run.ending.error is not None, True, "whether the caller is told")
    expect_taken_back(run, run.ending)


async def cut_off(stage: Stage) -> None:
    """Checks that a step in flight is cut off when the run is cancelled."""
    run = stage(sagas.trip, book_hotel="waits")
    async with run.running():
        await run.wait_for("begin book hotel")
        await run.cancel()
    expect("cut book hotel" in run.events, True, "whether the step was cut off")


async def not_cut_off(stage: Stage) -> None:
    """Checks that a step in flight comes to its end, where nothing can be cut off."""
    run = stage(sagas.trip, book_hotel="waits")
    async with run.running():
        await run.wait_for("begin book hotel")
        await run.cancel()
        await anyio.sleep(_LONG_ENOUGH)
        run.let_go("book hotel")
    expect("cut book hotel" in run.events, False, "whether the step was cut off")
    expect("book hotel" in run.done, True, "whether the step has come to its end")


async def cancelled_again(stage: Stage) -> None:
    """Checks that a run that is being taken back is not to be cancelled."""
    run = stage(sagas.trip, book_car="fails", cancel_hotel="waits")
    async with run.running():
        await run.wait_for("begin cancel hotel")
        await run.cancel()
        await run.cancel()
        run.let_go("cancel hotel")
    expect(run.done[-3:], _back("car", "hotel", "flight"), "what was taken back")
    expect([line for line in run.events if line.startswith("cut")], [], "what was cut off")
    expect_taken_back(run, run.ending)


# --- taking back --------------------------------------------------------------------------------


async def in_reverse(stage: Stage) -> None:
    """Checks the order of a rollback, of groups and of the members' own steps."""
    run = stage(sagas.nested, book_ticket="fails", cancel_hotel="waits", cancel_museum="waits")
    async with run.running():
        await run.wait_for("begin cancel hotel")
        await run.wait_for("begin cancel museum")  # at the same time
        run.let_go("cancel museum")
        await run.wait_for("done cancel car")
        run.let_go("cancel hotel")
    back = [place for place in run.done if place.startswith("cancel")]
    expect(back[0], "cancel ticket", "what was taken back first")
    expect(back[-1], "cancel flight", "what was taken back last")
    branch = [place for place in back if place in _back("car", "opera", "museum", "bus")]
    expect((branch[0], branch[-1]), ("cancel bus", "cancel car"), "the ends of a member's rollback")
    expect_taken_back(run, run.ending)


async def step_timeout(stage: Stage) -> None:
    """Checks that a step that takes too long has failed, and is in doubt."""
    run = stage(sagas.hurried, book_hotel="hangs")
    ending = await run.run()
    expect_error(ending, TimeoutError)
    expect(run.begun["cancel hotel"], 1, "how often it was taken back")
    expect_taken_back(run, ending)


async def compensation_timeout(stage: Stage) -> None:
    """Checks that a compensation that takes too long has failed, and that the others run."""
    run = stage(sagas.hurrying, book_ticket="fails", cancel_hotel="hangs")
    ending = await run.run()
    expect_error(ending, CompensationFailed)
    expect(ending.states["hotel"], "compensation failed", "the state of its step")
    expect(run.standing, ["hotel"], "what is left")


async def rollback_timeout(stage: Stage) -> None:
    """Checks that a rollback that takes too long ends, and says what is left."""
    run = stage(sagas.rushed, book_ticket="fails", cancel_hotel="hangs")
    ending = await run.run()
    expect_error(ending, CompensationFailed)
    expect(ending.states["hotel"], "compensation failed", "the state of the step that was cut off")
    expect(ending.states["flight"], "completed", "the state of the step that was not begun")


async def rollback_timeout_is_refused(stage: Stage) -> None:
    """Checks that a saga with a limit for its rollback is refused with words, and has not run."""
    run = stage(sagas.rushed, book_ticket="fails")
    expect_error(await run.run(), Exception, "rollback_timeout")
    expect(run.events, [], "what has run")


async def failing_compensations(stage: Stage) -> None:
    """Checks that compensations that fail stop no others, and that all are told."""
    faults = {"book_ticket": "fails", "cancel_car": "breaks", "cancel_flight": "fails"}
    run = stage(sagas.trip, **faults)
    ending = await run.run()
    expect_error(ending, CompensationFailed)
    error: Any = ending.error
    expect(repr(error.error), repr(Refused("book ticket")), "what started the rollback")
    wanted = [Broken("cancel car"), Refused("cancel flight")]
    expect(list(map(repr, error.failures)), list(map(repr, wanted)), "what failed in it")
    expect(run.standing, ["flight", "car"], "what is left")
    expect(ending.state, "failed", "its state")


async def own_loop(stage: Stage) -> None:
    """Checks that steps run on the loop of the caller."""
    here = anyio.get_cancelled_exc_class().__module__.partition(".")[0]
    expect((await stage(sagas.loop).run()).value, here, "the loop of a step")


async def other_loop(stage: Stage) -> None:
    """Checks that steps run on asyncio, whatever the caller's loop is."""
    expect((await stage(sagas.loop).run()).value, "asyncio", "the loop of a step")


# --- with a journal -----------------------------------------------------------------------------


async def recalled(stage: Stage) -> None:
    """Checks that a run that has completed gives its outcome again, and does nothing."""
    run = stage(sagas.detour, book_opera="fails")
    first = await run.run()
    before = run.events
    again = await run.run()
    expect(again.value, first.value, "its value")
    expect(again.states, first.states, "the states of the steps")
    expect(run.events, before, "what the steps did")


async def recalled_failure(stage: Stage) -> None:
    """Checks that a run that has failed raises its error again, and does nothing."""
    for faults in ({"book_car": "breaks"}, {"book_car": "fails", "cancel_hotel": "breaks"}):
        run = stage(sagas.trip, **faults)
        first = await run.run()
        before = run.events
        again = await run.run()
        expect(type(again.error).__name__, type(first.error).__name__, "the type of its error")
        expect(str(again.error), str(first.error), "its text")
        expect(again.state, first.state, "its state")
        expect(again.states, first.states, "the states of the steps")
        expect(run.events, before, "what the steps did")


async def started_twice(stage: Stage) -> None:
    """Checks that a run that is started twice at the same time happens once."""
    run = stage(sagas.trip, book_hotel="waits")
    async with run.running():
        await run.wait_for("begin book hotel")
        endings: list[Ending] = []

        async def again() -> None:
            endings.append(await run.run())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(again)
            await anyio.lowlevel.checkpoint()
            run.let_go("book hotel")
    expect(set(run.begun.values()), {1}, "how often each step has run")
    expect(run.ending.state, "completed", "the state of the first")
    if endings[0].state != "completed":
        expect_error(endings[0], RunInProgress)


async def other_call(stage: Stage) -> None:
    """Checks that an id is for one saga and one set of arguments."""
    run = stage(sagas.trip)
    await run.run()
    before = run.events
    dearer = replace(run.order, price=run.order.price + 1)
    expect_error(await run.run_as(sagas.trip, dearer), OtherRun)
    expect_error(await run.run_as(sagas.nested, run.order), OtherRun)
    expect(run.events, before, "what the steps did")


async def no_memory(stage: Stage) -> None:
    """Checks that the same id runs the saga again, where nothing is remembered."""
    run = stage(sagas.trip)
    await run.run()
    await run.run()
    expect(set(run.begun.values()), {2}, "how often each step has run")


async def forgotten(stage: Stage) -> None:
    """Checks that a killed process leaves what it made, where nothing is remembered."""
    run = stage(sagas.trip, book_hotel="waits")
    await run.kill_at("begin book hotel", on_crash="rollback")
    run.let_all_go()
    expect(run.standing, ["flight"], "what is left")
    await run.run()
    expect(run.begun["book flight"], 2, "how often a step has run that had ended before")


# Each place of a kill: the saga, its faults, the lines that are waited for; and what was in flight.
KILLS: dict[str, tuple[Any, dict[str, str], tuple[str, ...], set[str]]] = {
    "in an action": (sagas.trip, {"book_hotel": "waits"}, ("begin book hotel",), {"book hotel"}),
    "after its effect": (
        sagas.trip,
        {"after_book_hotel": "waits"},
        ("done book hotel",),
        {"book hotel"},
    ),
    "in a group": (
        sagas.nested,
        {"book_hotel": "waits", "book_opera": "waits", "book_museum": "waits"},
        ("begin book hotel", "begin book opera", "begin book museum"),
        {"book hotel", "book opera", "book museum"},
    ),
    "in a compensation": (
        sagas.trip,
        {"book_ticket": "fails", "cancel_hotel": "waits"},
        ("begin cancel hotel",),
        {"cancel hotel"},
    ),
}


def expect_begun(run: Run, in_flight: set[str], times: int) -> None:
    """Checks that what was in flight was begun so often, and all else once; each under one key."""
    wanted = {place: times if place in in_flight else 1 for place in run.begun}
    expect(dict(run.begun), wanted, "how often each was begun")
    keys = run.keys
    expect([place for place in keys if len(keys[place]) > 1], [], "what has changed its key")
    expect(len(set[str]().union(*keys.values())), len(keys), "the number of keys")


async def goes_on(stage: Stage, kill: str, times: int = 1) -> None:
    """Checks that a run that is killed there, once or twice, goes on, and runs nothing again but that."""
    saga, faults, lines, in_flight = KILLS[kill]
    run = stage(saga, **faults)
    for time in range(times):
        await run.kill_at(*lines, on_crash="resume", times=time + 1)
    run.let_all_go()
    ending = await run.run(on_crash="resume")
    expect_begun(run, in_flight, times + 1)
    if kill == "in a compensation":
        expect_error(ending, Refused, "book ticket")
        expect_taken_back(run, ending)
    else:
        expect(ending.state, "completed", f"its state, with {ending.error!r}")


async def goes_back(stage: Stage, kill: str) -> None:
    """Checks that a run that is killed there is taken back, and makes nothing more."""
    saga, faults, lines, _ = KILLS[kill]
    run = stage(saga, **faults)
    await run.kill_at(*lines, on_crash="rollback")
    await _goes_back(run, set())


async def goes_back_killed_again(stage: Stage) -> None:
    """Checks it for one that is killed again while it is being taken back."""
    run = stage(sagas.trip, book_hotel="waits", cancel_flight="waits")
    for line in ("begin book hotel", "begin cancel flight"):
        await run.kill_at(line, on_crash="rollback")
    await _goes_back(run, {"cancel flight"})


async def _goes_back(run: Run, again: set[str]) -> None:
    made = {place for place in run.begun if place.startswith("book")}
    run.let_all_go()
    ending = await run.run(on_crash="rollback")
    expect(
        {place for place in run.begun if place.startswith("book")}, made, "the actions that have begun"
    )
    expect_begun(run, again, 2)
    expect(ending.error is not None, True, "whether the caller is told")
    expect_taken_back(run, ending)


async def goes_on_all_the_same(stage: Stage) -> None:
    """Checks that a killed run goes on, though its rollback was asked for, where that is all there is."""
    run = stage(sagas.trip, book_hotel="waits")
    await run.kill_at("begin book hotel", on_crash="rollback")
    run.let_all_go()
    ending = await run.run(on_crash="rollback")
    expect(ending.state, "completed", "its state")


async def _until_changed(stage: Stage) -> Run:
    run = stage(sagas.changing, book_hotel="waits")
    await run.kill_at("begin book hotel", on_crash="resume")
    run.let_go("book hotel", "change")
    return run


async def _changed_back(run: Run, before: list[str]) -> None:
    expect(run.events, before, "what the steps did")
    run.order.gate("change").unlink()
    expect((await run.run()).value, "with a hotel", "its value")
    expect_begun(run, {"book hotel"}, 2)


async def changed(stage: Stage) -> None:
    """Checks that a changed saga is refused, and that the run goes on once it is as it was."""
    run = await _until_changed(stage)
    before = run.events
    expect_error(await run.run(), SagaChanged)
    await _changed_back(run, before)


async def changed_waits(stage: Stage) -> None:
    """Checks that nothing of a run with a changed saga runs until it is as it was."""
    run = await _until_changed(stage)
    before = run.events
    with anyio.move_on_after(_LONG_ENOUGH) as scope:
        await run.run()
    expect(scope.cancelled_caught, True, "whether it waits")
    await _changed_back(run, before)


async def rich_types(stage: Stage) -> None:
    """Checks that arguments and results of many types come through a kill as what they were."""
    run = stage(sagas.rich, book_hotel="waits")
    await run.kill_at("begin book hotel", on_crash="resume")
    run.let_go("book hotel")
    ticket = (await run.run(on_crash="resume")).value
    expect(type(ticket), Ticket, "the type of the result")
    assert isinstance(ticket, Ticket)
    wanted = (run.order.leaves, run.order.leaves.date(), run.order.price, Class.FIRST, (3, 4))
    found = (ticket.leaves, ticket.day, ticket.price, ticket.seat, ticket.rows)
    expect(found, wanted, "the result")
    expect(ticket.receipt, Receipt("ticket", f"{run.run_id}/0/action"), "what stands in the result")
    expect(run.begun["book ticket"], 1, "how often the step has run")


async def not_recordable(stage: Stage) -> None:
    """Checks that a result which cannot be recorded fails its step; the undo gets the object itself."""
    run = stage(sagas.unwritable)
    ending = await run.run()
    expect_error(ending, NotRecordable)
    expect(run.done, [*_there("flight", "thing"), *_back("thing", "flight")], "the steps")
    expect_taken_back(run, ending)


async def any_object(stage: Stage) -> None:
    """Checks that any object may be a result, where nothing is recorded."""
    expect((await stage(sagas.unwritable).run()).state, "completed", "its state")
