"""One run of a trial: makes its faults happen, and keeps what was seen."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from copy import deepcopy
from functools import partial
from inspect import isawaitable
from typing import Any

import anyio

from pysagas import CallNext, Effect, Outcome, Saga

from ._faults import (
    CannotExplore,
    Event,
    EventKind,
    Fault,
    FaultKind,
    InjectedFailure,
    Place,
    Plan,
    Trial,
)
from ._limit import Limit
from ._process import Process

__all__ = ["TrialRun"]


WHEN: dict[FaultKind, EventKind] = {
    FaultKind.FAILS_BEFORE: "enter",
    FaultKind.DECLINES: "enter",
    FaultKind.CANCELLED: "checkpoint",
    FaultKind.CANCELLED_NATIVELY: "checkpoint",
    FaultKind.FAILS_AFTER: "done",
    FaultKind.RUNS_TWICE: "done",
    FaultKind.KILLED_BEFORE: "enter",
    FaultKind.KILLED: "checkpoint",
    FaultKind.KILLED_AFTER: "done",
}


class Ended(Exception):
    """What a run is made to fail with that has come to its end, so that everything is taken back."""


class TrialRun:
    """One run of a trial: what is to go wrong in it, and what was seen."""

    def __init__(
        self,
        trial: Trial,
        saga: Saga[..., Any],
        plan: Plan,
        *,
        limit: Limit | None = None,
        look: bool = False,
    ) -> None:
        self.trial = trial
        self.saga = saga
        self.plan = plan
        self.events: list[Event] = []
        # How many events there were when the last of the faults first happened.
        self.last_fault = 0
        self.groups = 0
        # What was made to happen: the exception raised, if it was one.
        self.happened: dict[Fault, Exception | None] = {}
        # What happened in a process that was killed: of that the next one knows what was recorded.
        self.died: set[Fault] = set()
        self.at_commit = False
        self.ended: Exception | None = None
        # What was still waiting when its time was over.
        self.overdue: str | None = None
        # The one that is alive is the last.
        self.processes: list[Process] = []
        # The states: what a rollback has to restore, what was there when the run came to its end,
        # and what was there in the end.
        self.before: object = None
        self.at_end: object = None
        self.after: object = None
        # Where that is asked for: the state before and after each action; and, in their order, the
        # same of what takes it back, with the step's name.
        self.looks: dict[tuple[int, ...], tuple[object, object]] = {}
        self.looks_back: dict[tuple[int, ...], tuple[str, object, object]] = {}
        self._look_on_the_way = look
        self._limit = limit or Limit()
        # What is no part of the saga, and has to reach whoever explores: raised by the state; or
        # what a fake raises that is neither a failure nor a cancellation.
        self._escaped: BaseException | None = None
        # The commits that were passed.
        self._passed: set[tuple[int, ...]] = set()
        self._counts: dict[tuple[EventKind, Place], int] = {}

    @property
    def outcome(self) -> Outcome[Any] | None:
        """The saga's own report."""
        return self.processes[-1].outcome if self.processes else None

    @property
    def error(self) -> BaseException | None:
        """What the run ended with."""
        return self.processes[-1].error if self.processes else None

    @property
    def committed(self) -> int:
        """The first part of the saga that is behind its last commit."""
        return max((path[0] + 1 for path in self._passed), default=0)

    # What the watched functions tell.

    def meet(self, process: Process, event: EventKind, place: Place) -> bool:
        """Makes what is planned for this event; tells whether the function is to be called again."""
        number = self._counts[event, place] = self._counts.get((event, place), 0) + 1
        self.events.append((event, place, number))
        again = False
        for fault in self.plan.faults:
            if fault.place != place or WHEN[fault.kind] != event:
                continue
            if fault.kind.kills:
                if number == (fault.checkpoint or 1):
                    self._note(fault)
                    self.died.update(self.happened)
                    process.kill(str(fault))
                    if event == "checkpoint":
                        break  # it waits, and never comes back from that
                    process.check()
            elif event == "checkpoint":
                if fault.checkpoint == number:
                    self._cancel(process, fault)
            elif fault.kind is FaultKind.RUNS_TWICE:
                if number == 1:
                    self._note(fault)
                    again = True
            elif number == 1 or not fault.once:
                error = self._failure(fault)
                self._note(fault, error)
                raise error
        return again

    def _note(self, fault: Fault, error: Exception | None = None) -> None:
        if fault not in self.happened:
            self.last_fault = len(self.events)
        self.happened[fault] = error

    def _cancel(self, process: Process, fault: Fault) -> None:
        self._note(fault)
        if fault.kind is FaultKind.CANCELLED:
            process.cancel()
        else:
            process.again_at_rollback = fault.place.kind == "action"
            process.cancel_natively()

    def _failure(self, fault: Fault) -> Exception:
        if fault.error is not None:
            try:
                return fault.error(str(fault))
            except Exception:  # it wants other arguments: made without asking its __init__
                return fault.error.__new__(fault.error, str(fault))
        error = self.trial.failure(str(fault))
        if fault.kind is FaultKind.FAILS_AFTER and isinstance(error, fault.place.declared):
            # To raise it would say that nothing was done.
            return InjectedFailure(str(fault))
        return error

    async def around(self, effect: Effect, call_next: CallNext) -> object:
        """Ends the run where the plan says so."""
        if self._look_on_the_way and effect.kind in ("action", "compensation"):
            before = await self.snapshot()
            result = await call_next()
            after = await self.snapshot()
            if effect.kind == "action":
                self.looks[effect.path] = (before, after)
            else:
                self.looks_back[effect.path] = (effect.name, before, after)
            return result
        if effect.kind == "group":
            self.groups += 1
        elif effect.kind == "commit" and effect.path not in self._passed:
            if len(self._passed) == self.plan.commits:
                self.at_commit = True
                await self._end()
            result = await call_next()
            self._passed.add(effect.path)
            self.before = await self.snapshot()
            return result
        elif effect.kind == "saga" and not effect.path:
            await call_next()
            await self._end()
        return await call_next()

    async def _end(self) -> None:
        await anyio.lowlevel.checkpoint()  # a cancellation that nobody met is met here
        if self.ended is None:  # or a recovered run comes here again
            self.at_end = await self.snapshot()
        self.ended = Ended("made to fail at its end, to be taken back")
        raise self.ended

    def entered(self, place: Place) -> int:
        """Tells how often a place was entered."""
        return self._counts.get(("enter", place), 0)

    # The run itself.

    async def snapshot(self) -> object:
        """Reads the state, as a copy: the original may be what the saga goes on to change."""
        try:
            state = self.trial.state()
            if isawaitable(state):
                state = await state
        except Exception as error:
            self._escaped = error
            raise
        try:
            return deepcopy(state)
        except Exception as error:
            self._escaped = CannotExplore(
                f"the trial's state cannot be copied: {error!r}; let it return plain values"
            )
            raise self._escaped from error

    async def go(self, check: Callable[[object], object] | None = None) -> None:
        """Runs the saga, from one look at the state to another; the first one may be refused."""
        self.before = await self.snapshot()
        if check is not None:
            check(self.before)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._go)
        if self._escaped is not None:
            raise self._escaped

    async def _go(self) -> None:
        with self._limit.on(self._cut_off):
            async with anyio.create_task_group() as tasks:
                try:
                    calls = self._calls()
                    while not self.processes or (self.processes[-1].killed and not self.overdue):
                        process = Process(self)
                        self.processes.append(process)
                        tasks.start_soon(process.run, next(calls))
                        with anyio.CancelScope(shield=True):
                            await process.over.wait()
                    await self._look()
                finally:
                    for process in self.processes:
                        process.bury()

    def _calls(self) -> Iterator[Callable[[], Awaitable[Outcome[Any]]]]:
        """Gives what runs the saga in the first process, and in each that follows a killed one."""
        if not any(fault.kind.kills for fault in self.plan.faults):
            return iter([partial(self.saga.run_with, self.trial.args, self.trial.kwargs)])
        from ._killed import processes  # noqa: PLC0415 - needs a journal

        return processes(self.saga, self.trial)

    async def _look(self) -> None:
        """Looks at the state when all is over, and before anything of what was killed goes on."""
        self._escaped = self._escaped or self.processes[-1].stray
        if self._escaped is None and self.overdue is None:
            try:
                self.after = await self.snapshot()
            except anyio.get_cancelled_exc_class():
                raise
            except BaseException as error:
                self._escaped = error

    def _cut_off(self) -> None:
        """Ends a run whose time is over."""
        waiting = ", ".join(self.processes[-1].bury()) or "the run"
        self.overdue = f"{waiting}: still waiting after {self._limit.seconds:g} s"
