"""The history of one run, replayed: what was recorded is met again, in the order in which it happened.

The rules. The history is a list of events; a cursor says how far it is replayed.

- An effect that is recorded takes its events in their turn: it waits until the cursor has come to
  them. So branches meet as they met.
- An effect whose history ends *parks*, until all of the history has been replayed: a group may hold
  one branch in doubt and another that is two steps ahead. Only then does anything run. So as long
  as a replay can still find out that this is another saga, nothing has been touched.
- Where all branches wait, and the next event is in none of them, the saga is another one.
- When all is replayed, parked branches go on, or are interrupted: then the engine's own rollback
  takes over, whose compensations are effects like others, replayed or run.
- Where the history says that a rollback began, what is parked below it was cancelled then, and is
  interrupted now; unless the history shows that forward work went on later, so that whatever
  cancelled it (a failed sibling, a time limit in the saga) will come again by itself.
- A cancellation from outside does not cut a replay short, which would lose the steps that were not
  yet met: it is kept until the branch has used up its history.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import NoReturn

import anyio
import anyio.lowlevel

from pysagas import Effect

from ._errors import Interrupted, RecordedError, SagaChanged
from ._events import BACK, BAD_ENDS, Event, EventKind, Path, below

__all__ = ["Replay"]

ENDS = {EventKind.JOINED, EventKind.BROKEN, EventKind.LEFT}
ACTION = {
    EventKind.STARTED,
    EventKind.DONE,
    EventKind.ANSWERED,
    EventKind.FAILED,
    EventKind.CUT_OFF,
}
FORWARD = {*ACTION, *ENDS, EventKind.COMMITTED}
# By which of its effects an event is met; or by the end of a group, or of a member of one.
MET_BY = {
    **dict.fromkeys(ACTION, "action"),
    **dict.fromkeys(BACK, "compensation"),
    **dict.fromkeys(ENDS, "end"),
    EventKind.COMMITTED: "commit",
    EventKind.ROLLBACK: "rollback",
    EventKind.INTERRUPTED: "",
}
MEMBERS = {"action", "saga", "group"}

# What may be due to a cancellation, which is not recorded itself.
CUTS_OFF = {EventKind.LEFT, EventKind.ROLLBACK}

# How often the event loop goes round before a standstill is believed. Members of a group need one or
# two to come, and one to go.
ROUNDS = 20


class Replay:
    """The history of one run, and how far it has been met; of a run that is new there is none."""

    __slots__ = (
        "_branches",
        "_cursor",
        "_groups",
        "_history",
        "_known",
        "_late",
        "_met",
        "_note_interruption",
        "_parked",
        "_recovering",
        "_resume",
        "_saga",
        "_ticks",
        "_turns",
        "_waiting",
        "abandoned",
        "interrupted",
        "stopped",
    )

    def __init__(
        self,
        saga: str,
        history: list[Event],
        note_interruption: Callable[[], None],
        *,
        recovering: bool,
        resume: bool,
    ) -> None:
        """Starts at the beginning.

        Args:
            saga: Its name, for messages.
            history: What holds of what is recorded.
            note_interruption: Records that the run is taken back from here.
            recovering: Whether the run had begun in another process.
            resume: Whether it goes on after the replay, or is taken back.
        """
        self._saga = saga
        self._history = history
        self._note_interruption = note_interruption
        self._resume = resume
        self._cursor = 0
        # For each effect, where its events stand in the history.
        self._known: dict[tuple[str, Path], list[int]] = {}
        for index, event in enumerate(history):
            self._known.setdefault((MET_BY[event.kind], event.path), []).append(index)
        self._groups: set[Path] = set()
        # The run itself, and the members that are under way; and what waits in them (on the way back
        # that may be several), each with the place where a cancellation may end that, or None.
        self._branches: set[Path] = {()}
        self._waiting: dict[Path, list[Path | None]] = {}
        # Counts what happens, so that a standstill is noticed.
        self._ticks = 0
        # Who waits: for any effect to be met, or any turn to be taken; for its turn, by index; for the
        # end of the history, by path.
        self._met: list[anyio.Event] = []
        self._turns: dict[int, list[anyio.Event]] = {}
        self._parked: dict[tuple[str, Path], anyio.Event] = {}
        # What every forward effect raises from now on: the run is to be taken back.
        self.interrupted: Interrupted | None = None
        # The same, once a recovery has come to the end of the history: then nothing goes forward.
        self.stopped: Interrupted | None = None
        # What every effect raises from now on, compensations included: nothing more is to happen.
        self.abandoned: BaseException | None = None
        # A native cancellation that came during the replay, to be raised at its end.
        self._late: BaseException | None = None
        self._recovering = recovering

    # --- for the middleware ----------------------------------------------------------------------

    def start(self) -> None:
        """Begins; a run that had begun, and of which nothing is recorded, is interrupted at once."""
        if self._recovering:
            self._moved_on()

    @property
    def is_over(self) -> bool:
        """Whether all of the history has been met."""
        return self._cursor == len(self._history)

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to mind for an action: as for `is_clear`, and there is no group either."""
        return self.is_clear and self.abandoned is None and not self._groups

    @property
    def is_clear(self) -> bool:
        """Whether an action may run at once: nothing is recorded of it, and nothing keeps it back."""
        return self._cursor == len(self._history) and self.interrupted is None and self._late is None

    def is_recorded(self, kind: str, path: Path) -> bool:
        """Tells whether the history has something of an effect that has not been met yet."""
        return (kind, path) in self._known

    def is_member(self, effect: Effect) -> bool:
        """Tells whether an effect is a whole member of a group."""
        return bool(self._groups) and effect.path[:-1] in self._groups and effect.kind in MEMBERS

    def open_group(self, path: Path) -> None:
        """Notes that what is just below a place runs at the same time."""
        self._groups.add(path)

    @contextmanager
    def branch(self, path: Path) -> Generator[None]:
        """Notes that a member of a group is under way."""
        self._ticks += 1
        self._branches.add(path)
        try:
            yield
        finally:
            self._ticks += 1
            self._branches.discard(path)
            self._wake_if_rolled_back()

    async def meet(self, effect: Effect) -> list[Event]:
        """Takes the events of an effect, each in its turn, and gives them."""
        if self.is_over:
            return []
        indexes = self._known.pop((effect.kind, effect.path), [])
        self._wake(self._met)
        return await self._take(indexes, effect)

    async def end(self, effect: Effect, how: EventKind) -> bool:
        """Waits until a group, or a member of one, may end; tells whether that is recorded.

        Raises:
            Interrupted: It may not.
        """
        indexes = self._known.get(("end", effect.path), [])
        recorded = any(self._history[index].kind is how for index in indexes)
        if recorded:
            del self._known["end", effect.path]
            self._wake(self._met)
            await self._take(indexes, effect)
        else:
            # If it was cut off where nothing was left to do, what did that comes here again.
            await self.go_forward(effect)
        return recorded

    async def leave(self, effect: Effect) -> bool:
        """Waits until a member that did not end well may leave its group; tells whether that is recorded.

        After that no other one begins, and those under way may be cancelled; but a replay is faster
        than what it replays. So first the others come where they had come.
        """
        group = effect.path[:-1]
        indexes = self._known.pop(("end", effect.path), [])
        if not indexes:
            await self._come_to(self._end_of_members(group), effect)
            return self.abandoned is not None
        (index,) = indexes
        recorded = self._history[index]
        if recorded.kind is EventKind.JOINED and self.abandoned is None:
            self._give_up(self._changed(recorded, f"{effect.name!r} does not end well now"))
        await self._come_to(index, effect)
        while self.abandoned is None and self._is_awaited(group, index):
            await self._wait_shielded(self._met, effect)
        if self.abandoned is None:
            self._take_turn(index)
        return True

    async def park(self, effect: Effect, *, forward: bool) -> None:
        """Waits until all history is replayed; for forward work, or until it is interrupted.

        Raises:
            Interrupted: Forward work must not start, or be started again.
            RecordedError: A compensation was not tried, since another one had failed.
        """
        key = (effect.kind, effect.path)
        place = effect.path if forward else None
        self._wake_if_rolled_back()
        while not (self.is_over or (forward and self.stopped is not None)):
            waiting = self._parked[key] = anyio.Event()
            try:
                if not forward and effect.kind == "compensation" and self._was_passed_over(effect.path):
                    raise RecordedError("it was not tried, since another compensation had failed")
                if forward and self._was_rolled_back(effect.path) and await self._is_quiet(effect):
                    self._interrupt()
                    break
                await self._wait(waiting, effect, place)
            finally:
                del self._parked[key]
            if self.abandoned is not None:
                raise self.abandoned
        if forward and self.interrupted is not None:
            raise self.interrupted

    async def go_forward(self, effect: Effect) -> None:
        """Waits until forward work may run.

        Raises:
            Interrupted: It may not.
        """
        await self.park(effect, forward=True)
        if self._late is not None:
            raise self._late

    def check_over(self, effect: Effect) -> None:
        """Refuses to end something of which there is history left."""
        if self.abandoned is not None:
            raise self.abandoned
        self._pass_over_the_unbegun()
        for event in self._left():
            own_end = event.path == effect.path and event.kind in ENDS
            if event.kind in FORWARD and below(event.path, effect.path) and not own_end:
                self._refuse(event, f"{effect.kind} {effect.name!r} at {effect.path} ends without it")

    def check_completed(self) -> None:
        """Makes sure that the run may end well.

        Raises:
            BaseException: It was interrupted, or cancelled, and nobody has noticed.
        """
        if self._left():
            self._interrupt()  # it was cancelled where it had nothing more to do
        if self.interrupted is not None:
            raise self.interrupted  # or somebody has swallowed it
        if self._late is not None:
            raise self._late

    def abandon(self, error: BaseException) -> NoReturn:
        """Lets nothing more happen in this run; raises the error wherever something would."""
        self._give_up(error)
        raise error

    # --- how -------------------------------------------------------------------------------------

    def _left(self) -> list[Event]:
        return self._history[self._cursor :]

    def _give_up(self, error: BaseException) -> None:
        self.abandoned = error
        self._wake([event for events in self._turns.values() for event in events])
        self._wake([*self._parked.values(), *self._met])

    async def _take(self, indexes: list[int], effect: Effect) -> list[Event]:
        """Takes the events of an effect, each in its turn."""
        for index in indexes:
            if self._history[index].name != effect.name:
                self._refuse(self._history[index], f"{effect.name!r} is there now")
        self._check_place(effect, indexes[0] if indexes else len(self._history))
        for index in indexes:
            await self._come_to(index, effect)
            if self.abandoned is not None:
                raise self.abandoned
            self._take_turn(index)
        return [self._history[index] for index in indexes]

    async def _come_to(self, index: int, effect: Effect) -> None:
        """Waits for an event's turn, or until the run is given up."""
        while self._cursor < index and self.abandoned is None:
            self._wake_if_rolled_back()
            await self._wait_shielded(self._turns.setdefault(index, []), effect)

    def _take_turn(self, index: int) -> None:
        self._cursor = index + 1
        self._moved_on()

    def _end_of_members(self, group: Path) -> int:
        """Gives the index after the last event that is left in the members of a group."""
        end = self._cursor
        for index, event in self._until_taken_back(group, self._cursor):
            if below(event.path, group) and event.path != group:
                end = index + 1
        return end

    def _is_awaited(self, group: Path, index: int) -> bool:
        """Tells whether a member had already begun what comes next in it, and has not been met there."""
        seen: set[Path] = set()
        for _, event in self._until_taken_back(group, index + 1):
            member = event.path[: len(group) + 1]
            if below(event.path, group) and event.path != group and member not in seen:
                seen.add(member)
                is_ahead = event.kind in ACTION or event.kind is EventKind.JOINED
                if is_ahead and self.is_recorded(MET_BY[event.kind], event.path):
                    return True
        return False

    def _until_taken_back(self, group: Path, start: int) -> Iterator[tuple[int, Event]]:
        """Gives what follows an index, until the group itself is taken back, or what is around it."""
        for index in range(start, len(self._history)):
            event = self._history[index]
            if event.kind is EventKind.ROLLBACK and below(group, event.path):
                return
            yield index, event

    async def _wait_shielded(self, events: list[anyio.Event], effect: Effect) -> None:
        """Waits until the next time that these are woken; a native cancellation is kept for later."""
        event = anyio.Event()
        events.append(event)
        with anyio.CancelScope(shield=True):
            try:
                await self._wait(event, effect, None)
            except anyio.get_cancelled_exc_class() as error:
                self._late = error  # no shield keeps it away

    def _wake(self, events: list[anyio.Event]) -> None:
        for event in events:
            event.set()
        events.clear()

    async def _wait(self, event: anyio.Event, effect: Effect, place: Path | None) -> None:
        """Waits; or finds that all of the run waits, and for somebody who is not there any more."""
        with self._counted(effect, place):
            await self._watch()
            await event.wait()

    @contextmanager
    def _counted(self, effect: Effect, place: Path | None) -> Generator[None]:
        """Notes that a branch waits."""
        branch = max((one for one in self._branches if below(effect.path, one)), key=len)
        places = self._waiting.setdefault(branch, [])
        places.append(place)
        self._ticks += 1
        try:
            yield
        finally:
            places.remove(place)

    def _is_waiting(self, branch: Path) -> bool:
        """Tells whether a branch waits, or has members that are under way."""
        return bool(self._waiting.get(branch)) or any(
            below(other, branch) and other != branch for other in self._branches
        )

    async def _watch(self) -> None:
        """Gives the others of the run time to come, and refuses the saga if nobody does."""
        ticks, cursor = self._ticks, self._cursor
        for _ in range(ROUNDS):
            if (ticks, cursor) != (self._ticks, self._cursor) or not self._stands_still():
                return
            await anyio.lowlevel.checkpoint()
        if not self._pass_over_the_unbegun():
            self._refuse(self._history[self._cursor], "nothing comes to it any more")

    def _pass_over_the_unbegun(self) -> bool:
        """Takes the turns of members that were cut off before they did anything, and do not begin now.

        That they had begun is recorded nowhere, since it does nothing.
        """
        passed = False
        while not self.is_over:
            event = self._history[self._cursor]
            if event.kind is not EventKind.LEFT or event.path in self._branches:
                break
            self._known.pop(("end", event.path))
            self._take_turn(self._cursor)
            passed = True
        return passed

    def _stands_still(self) -> bool:
        """Tells whether each branch waits, for its turn, for its members, or parked out of the way.

        One that is parked on the way to the next event may yet be cancelled by the saga itself.
        """
        coming = self._history[self._cursor].path
        places = [place for waiting in self._waiting.values() for place in waiting if place is not None]
        return all(map(self._is_waiting, self._branches)) and all(
            self._apart(place, coming) for place in places
        )

    def _moved_on(self) -> None:
        """Wakes who was waiting for the cursor to come here."""
        self._wake(self._turns.pop(self._cursor, []))
        if self.is_over:
            self._wake_parked()
            committed = any(event.kind is EventKind.COMMITTED for event in self._history)
            if not self._resume and not committed and self.stopped is None:
                self._stop()
                self._note_interruption()
        elif self._history[self._cursor].kind is EventKind.INTERRUPTED:
            self._stop()
            self._take_turn(self._cursor)
        else:
            self._wake_if_rolled_back()

    def _stop(self) -> None:
        """Lets nothing go forward any more: where it has not been, it is interrupted."""
        self._interrupt()
        self.stopped = self.interrupted
        self._wake_parked()

    def _wake_if_rolled_back(self) -> None:
        if not self.is_over and self._history[self._cursor].kind in CUTS_OFF:
            self._wake_parked()

    def _wake_parked(self) -> None:
        for event in self._parked.values():
            event.set()

    def _interrupt(self) -> None:
        if self.interrupted is None:
            self.interrupted = Interrupted(
                f"the process of this run of saga {self._saga!r} had died; it is taken back"
            )

    def _refuse(self, recorded: Event, met: str) -> NoReturn:
        """Gives the run up: nothing has been touched, and nothing will be."""
        self.abandon(self._changed(recorded, met))

    def _changed(self, recorded: Event, met: str) -> SagaChanged:
        return SagaChanged(
            f"saga {self._saga!r} is not the one that was recorded: recorded is {recorded.name!r} "
            f"at {recorded.path} ({recorded.kind.value}), but {met}; the run is as it was: "
            "recover it with the saga as it was, and give a changed saga another version"
        )

    def _check_place(self, effect: Effect, index: int) -> None:
        """Refuses an effect while history is left that comes before it, in the same branch."""
        kinds = FORWARD if effect.kind in ("action", "group", "commit") else FORWARD | BACK
        if index < len(self._history):
            kinds = FORWARD | BACK
        for event in self._history[self._cursor : index]:
            if event.kind in BAD_ENDS and below(effect.path, event.path):
                continue  # it was cut off before it came here
            if event.kind in kinds and not self._apart(effect.path, event.path):
                met = f"{effect.kind} {effect.name!r} at {effect.path} comes in its place"
                self._refuse(event, met)

    def _apart(self, one: Path, other: Path) -> bool:
        """Tells whether two places are in different members of a group."""
        for common, (left, right) in enumerate(zip(one, other, strict=False)):
            if left != right:
                return one[:common] in self._groups
        return False

    async def _is_quiet(self, effect: Effect) -> bool:
        """Tells whether all of the run waits; a sibling that still fails will cancel this one itself."""
        with self._counted(effect, effect.path):
            ticks = self._ticks
            for _ in range(ROUNDS):
                await anyio.lowlevel.checkpoint()
                if ticks != self._ticks:
                    ticks = self._ticks
                    await anyio.lowlevel.checkpoint()
                if not all(map(self._is_waiting, self._branches)):
                    return False
        return True

    def _was_rolled_back(self, path: Path) -> bool:
        """Tells whether the history has come to where this place was cut off, after which nothing began."""
        event, *later = self._left()
        if event.kind not in CUTS_OFF or not below(path, event.path):
            return False
        around = event.path[:-1] if event.kind is EventKind.LEFT else event.path
        return not any(
            other.kind is EventKind.STARTED and not below(other.path, around) for other in later
        )

    def _was_passed_over(self, path: Path) -> bool:
        """Tells whether the history has come to the end of what would have taken this place back."""
        event = self._history[self._cursor]
        return event.kind in CUTS_OFF and below(path, event.path)
