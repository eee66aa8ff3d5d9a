"""Processes that die, acted in one: a journal that dies at a boundary, and a shop that outlives it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from anyio.lowlevel import checkpoint

from pysagas import Step, current_effect
from pysagas.durable import Event, EventKind, MemoryJournal, RunState


class Killed(BaseException):
    """The process dies here; whatever it still does, nobody sees."""


class Boom(Exception):
    """What an action raises."""


class MortalJournal(MemoryJournal):
    """Dies at a boundary: before an event is taken, before what was taken is on disk, before an end.

    Boundaries are counted from 0. What was taken and not yet waited for is on disk at the death, or,
    with `loses`, is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dies_at: int | None = None
        self.loses = False
        self.passed = 0
        self.dead = False
        # Whether something was taken, and not yet waited for, at the death.
        self.at_stake = False
        # For each run, how many of its events are on disk in any case.
        self._safe: Counter[int] = Counter()

    def next_process(self, dies_at: int | None = None, *, loses: bool = False) -> MortalJournal:
        """The same runs in the next process, which dies at the boundary."""
        journal = self.in_next_process()
        journal.dead = journal.at_stake = False
        journal.dies_at, journal.loses, journal.passed = dies_at, loses, 0
        journal._safe = Counter({key: len(run.events) for key, run in self._runs.items()})
        return journal

    def _pass(self) -> None:
        if self.dead:
            raise Killed
        if self.passed == self.dies_at:
            self.dead = True
            for key, run in self._runs.items():
                self.at_stake |= len(run.events) > self._safe[key]
                if self.loses:
                    del run.events[self._safe[key] :]
            raise Killed
        self.passed += 1

    def _append(self, key: int, *event: Any) -> None:
        self._pass()
        super()._append(key, *event)

    async def _flush(self, key: int) -> None:
        self._pass()
        taken = {key: len(run.events) for key, run in self._runs.items()}
        await super()._flush(key)
        if self.dead:
            raise Killed
        self._safe |= Counter(taken)

    async def _end(self, key: int, ending: Any) -> None:
        self._pass()
        await super()._end(key, ending)

    async def _reopen(self, key: int, was: RunState) -> None:
        self._pass()
        await super()._reopen(key, was)

    async def _release(self, key: int, last: Event | None = None) -> None:
        if not self.dead:
            await super()._release(key, last)

    def events(self) -> list[Event]:
        """What is on disk of the one run."""
        (run,) = self._runs.values()
        return run.events


class Shop:
    """What steps change. It sees nothing of what a process does after its death."""

    def __init__(self, journal: MortalJournal | None = None) -> None:
        self.journal = MortalJournal() if journal is None else journal
        # What stands in it.
        self.there: set[str] = set()
        # What was done, and ``-name`` for what was taken back.
        self.log: list[str] = []
        # How often each action began, and under which keys.
        self.begun: Counter[str] = Counter()
        self.keys: dict[str, set[str]] = {}
        # Called once, by the step of that name, when it has begun.
        self.moments: dict[str, Callable[[], object]] = {}

    def begin(self, name: str) -> None:
        # Its start was written just before: a process that is dead does not come here.
        effect = current_effect()
        assert effect is not None
        self.begun[name] += 1
        self.keys.setdefault(name, set()).add(effect.key)
        self.moments.pop(name, bool)()

    def put(self, name: str) -> None:
        if not self.journal.dead:
            self.there.add(name)
            self.log.append(name)

    def take(self, name: str) -> None:
        if not self.journal.dead:
            self.there.discard(name)
            self.log.append(f"-{name}")

    def step(
        self,
        name: str,
        pace: tuple[int, int] = (1, 1),
        *,
        fails: BaseException | None = None,
        back_fails: Callable[[], bool] = bool,
        undo: bool = False,
        compensation: bool = True,
        **options: Any,
    ) -> Step[..., str]:
        """A step with an effect, between checkpoints.

        Args:
            name: Of the step and of its effect.
            pace: Checkpoints before the effect, and after it.
            fails: Raised when all is done.
            back_fails: Says whether the way back fails.
            undo: Whether it has one.
            compensation: Whether it has one.
            **options: Of `Step`.
        """

        async def action(*args: object) -> str:
            self.begin(name)
            for _ in range(pace[0]):
                await checkpoint()
            self.put(name)
            for _ in range(pace[1]):
                await checkpoint()
            if fails is not None:
                raise fails
            return f"result of {name}"

        async def back(*args: object) -> None:
            await checkpoint()
            if back_fails():
                raise Boom(f"-{name}")
            self.take(name)
            await checkpoint()

        async def undone(result: str) -> None:
            assert result == f"result of {name}"
            await back()

        return Step(
            action,
            back if compensation else None,
            undo=undone if undo else None,
            name=name,
            **options,
        )


def problems_of(shop: Shop, events: Iterable[Event]) -> list[str]:
    """What an ended run's journal and shop say against each other."""
    history = list(events)
    started = Counter(event.name for event in history if event.kind is EventKind.STARTED)
    compensated = Counter(event.name for event in history if event.kind is EventKind.COMPENSATED)
    ended: set[str] = set()
    problems = [
        f"{name} was taken back {times} times" for name, times in compensated.items() if times > 1
    ]
    for event in history:
        if event.kind is EventKind.STARTED and event.name in ended:
            problems.append(f"{event.name} began again, though its end was recorded")
        if event.kind in (EventKind.DONE, EventKind.FAILED):
            ended.add(event.name)
    problems += [
        f"{name} began {times} times, and {started[name]} beginnings were recorded"
        for name, times in shop.begun.items()
        if times > started[name]
    ]
    problems += [f"{name} has several keys" for name, keys in shop.keys.items() if len(keys) > 1]
    problems += [f"{name} was taken back, and stands" for name in sorted({*compensated} & shop.there)]
    return problems
