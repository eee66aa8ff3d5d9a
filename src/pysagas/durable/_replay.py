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

from collections import Counter
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from itertools import takewhile
from typing import NoReturn

import anyio
import anyio.lowlevel

from pysagas import Effect

from ._errors import Interrupted, SagaChanged
from ._events import BACK, Event, EventKind, Path, below

__all__ = ["Replay"]

FORWARD = {
    EventKind.STARTED,
    EventKind.DONE,
    EventKind.FAILED,
    EventKind.CUT_OFF,
    EventKind.JOINED,
    EventKind.COMMITTED,
}
# By which of its effects an event is met.
MET_BY = {
    **dict.fromkeys(FORWARD - {EventKind.COMMITTED}, "action"),
    **dict.fromkeys(BACK, "compensation"),
    EventKind.JOINED: "group",
    EventKind.COMMITTED: "commit",
    EventKind.ROLLBACK: "rollback",
}
MEMBERS = {"action", "saga", "group"}

# How often the event loop goes round before a standstill is believed. Members of a group need one or
# two to come, and one to go.
ROUNDS = 20


class Replay:
    """The history of one run, and how far it has been met; of a run that is new there is none."""

    def __init__(self, saga: str, history: list[Event], *, recovering: bool, resume: bool) -> None:
        """Starts at the beginning.

        Args:
            saga: Its name, for messages.
            history: What holds of what is recorded.
            recovering: Whether the run had begun in another process.
            resume: Whether it goes on after the replay, or is taken back.
        """
        self._saga = saga
        self._history = history
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
        # The members that have begun. In each group, how many of them are held back before they fail.
        self._begun: set[Path] = set()
        self._held: Counter[Path] = Counter()
        # Who waits for an effect to be met; for one that is held back to fail.
        self._met: list[anyio.Event] = []
        self._released: list[anyio.Event] = []
        # Who waits: for its turn, by index; for the end of the history, by path.
        self._turns: dict[int, list[anyio.Event]] = {}
        self._parked: dict[tuple[str, Path], anyio.Event] = {}
        # What every forward effect raises from now on: the run is to be taken back.
        self.interrupted: Interrupted | None = None
        # What every effect raises from now on, compensations included: nothing more is to happen.
        self.abandoned: BaseException | None = None
        # A native cancellation that came during the replay, to be raised at its end.
        self._late: BaseException | None = None
        if recovering:
            self._moved_on()

    # --- for the middleware ----------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether all of the history has been met."""
        return self._cursor == len(self._history)

    async def carry_out(self, effect: Effect, work: Callable[[], Awaitable[object]]) -> object:
        """Does the work of an effect; with respect to the others, where it is a member of a group."""
        if self.abandoned is not None:
            raise self.abandoned
        path = effect.path
        if effect.kind == "group":
            self._groups.add(path)
        if self.is_over or not path or path[:-1] not in self._groups or effect.kind not in MEMBERS:
            return await work()
        self._ticks += 1
        self._branches.add(path)
        self._begun.add(path)
        try:
            result = await work()
        except BaseException:
            await self._hold_back(effect)
            raise
        else:
            await self._let_fail(effect)
            return result
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
        for index in indexes:
            if self._history[index].name != effect.name:
                self._refuse(self._history[index], f"{effect.name!r} is there now")
        self._check_place(effect, indexes[0] if indexes else len(self._history))
        for index in indexes:
            await self._turn(index, effect)
        return [self._history[index] for index in indexes]

    async def park(self, effect: Effect, *, forward: bool) -> None:
        """Waits until all history is replayed; for forward work, or until it is interrupted.

        Raises:
            Interrupted: Forward work must not start, or be started again.
        """
        key = (effect.kind, effect.path)
        place = effect.path if forward else None
        self._wake_if_rolled_back()
        while not self.is_over:
            waiting = self._parked[key] = anyio.Event()
            try:
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

    def check_over(self, effect: Effect, *, but: EventKind | None = None) -> None:
        """Refuses to end something of which there is history left."""
        if self.abandoned is not None:
            raise self.abandoned
        for event in self._left():
            if event.kind in FORWARD - {but} and below(event.path, effect.path):
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
        self.abandoned = error
        self._wake([event for events in self._turns.values() for event in events])
        self._wake([*self._parked.values(), *self._met, *self._released])
        raise error

    # --- how -------------------------------------------------------------------------------------

    def _left(self) -> list[Event]:
        return self._history[self._cursor :]

    async def _turn(self, index: int, effect: Effect) -> None:
        """Waits for an event's turn, and takes it."""
        while self._cursor < index and self.abandoned is None:
            self._wake_if_rolled_back()
            await self._wait_shielded(self._turns.setdefault(index, []), effect)
        if self.abandoned is not None:
            raise self.abandoned
        self._cursor = index + 1
        self._moved_on()

    async def _hold_back(self, effect: Effect) -> None:
        """Lets the others of a group come where they had come, before one of them fails.

        After a failure none begins, and those under way may be cancelled; and a replay is faster
        than what it replays.
        """
        group = effect.path[:-1]
        self._held[group] += 1
        while self._awaited(group):
            await self._wait_shielded(self._met, effect)
        self._held[group] -= 1
        self._wake(self._released)

    async def _let_fail(self, effect: Effect) -> None:
        """Lets one fail that is held back, before another one ends well and the next takes its place."""
        group = effect.path[:-1]
        while self._held[group] and self._awaited(group) <= self._begun:
            await self._wait_shielded(self._released, effect)

    def _awaited(self, group: Path) -> set[Path]:
        """Gives the members of a group of which something is about to come that has not been met."""
        awaited: set[Path] = set()
        if self.abandoned is None:
            for event in takewhile(lambda event: event.kind in FORWARD, self._left()):
                if below(event.path, group) and (MET_BY[event.kind], event.path) in self._known:
                    awaited.add(event.path[: len(group) + 1])
        return awaited

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
        self._refuse(self._history[self._cursor], "nothing comes to it any more")

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
        if not self.is_over:
            turn = self._turns.pop(self._cursor, None)
            if turn is not None:
                self._wake(turn)
            elif self._history[self._cursor].kind is EventKind.ROLLBACK:
                self._wake_parked()
            return
        committed = any(event.kind is EventKind.COMMITTED for event in self._history)
        if not self._resume and not committed:
            self._interrupt()
        self._wake_parked()

    def _wake_if_rolled_back(self) -> None:
        for event in self._left()[:1]:
            if event.kind is EventKind.ROLLBACK:
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
        self.abandon(
            SagaChanged(
                f"saga {self._saga!r} is not the one that was recorded: recorded is {recorded.name!r} "
                f"at {recorded.path} ({recorded.kind.value}), but {met}; the run is as it was: "
                "recover it with the saga as it was, and give a changed saga another version"
            )
        )

    def _check_place(self, effect: Effect, index: int) -> None:
        """Refuses an effect while history is left that comes before it, in the same branch."""
        kinds = FORWARD if effect.kind in ("action", "group", "commit") else FORWARD | BACK
        if index < len(self._history):
            kinds = FORWARD | BACK
        for event in self._history[self._cursor : index]:
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
        """Tells whether the history has come to a rollback of this place, after which nothing began."""
        event, *later = self._left()
        return (
            event.kind is EventKind.ROLLBACK
            and below(path, event.path)
            and not any(
                other.kind is EventKind.STARTED and not below(other.path, event.path) for other in later
            )
        )
