"""One run of a trial: makes its faults happen, and keeps what was seen."""

from __future__ import annotations

import threading
from collections.abc import Callable
from copy import deepcopy
from inspect import isawaitable
from typing import Any

import anyio

from pysagas import CallNext, Effect, Outcome, Saga, outcome_of

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
from ._watched import Killed, current_watcher

__all__ = ["TrialRun", "native_cancel"]

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

    def __init__(self, trial: Trial, saga: Saga[..., Any], plan: Plan) -> None:
        self.trial = trial
        self.saga = saga
        self.plan = plan
        self.events: list[Event] = []
        # How many events there were when the last of the faults first happened.
        self.last_fault = 0
        self.groups = 0
        # What was made to happen: the exception raised, if it was one.
        self.happened: dict[Fault, Exception | None] = {}
        self.killed: Killed | None = None
        self.frozen: list[object] = []
        self.at_commit = False
        self.again_at_rollback = False
        self.natively = False
        self.ended: Exception | None = None
        # What is no part of the saga, and has to reach whoever explores: raised by the state; or
        # what a fake raises that is neither a failure nor a cancellation.
        self._escaped: BaseException | None = None
        self._thread = threading.get_ident()
        self.outcome: Outcome[Any] | None = None
        self.error: BaseException | None = None
        # The states: what a rollback has to restore, what was there when the run came to its end,
        # and what was there in the end.
        self.before: object = None
        self.at_end: object = None
        self.after: object = None
        # The commits that were passed.
        self._passed: set[tuple[int, ...]] = set()
        self._counts: dict[tuple[EventKind, Place], int] = {}
        self._scope = anyio.CancelScope()
        self._cancel_task: Callable[[], object] = self._scope.cancel

    # What the watched functions tell.

    def enter(self, place: Place) -> None:
        if place.kind == "compensation" and self.again_at_rollback:
            self.again_at_rollback = False
            if threading.get_ident() == self._thread:
                self._cancel_task()
            else:
                anyio.from_thread.run_sync(self._cancel_task)
        self._meet("enter", place)

    def checkpoint(self, place: Place) -> None:
        self._meet("checkpoint", place)

    def done(self, place: Place) -> bool:
        return self._meet("done", place)

    def _meet(self, event: EventKind, place: Place) -> bool:
        """Makes what is planned for this event; tells whether the function is to be called again."""
        if self.killed is not None:
            raise self.killed
        number = self._counts[event, place] = self._counts.get((event, place), 0) + 1
        self.events.append((event, place, number))
        again = False
        for fault in self.plan.faults:
            if fault.place != place or WHEN[fault.kind] != event:
                continue
            if fault.kind.kills:
                if number == (fault.checkpoint or 1):
                    self._note(fault)
                    self.killed = Killed(str(fault))
                    raise self.killed
            elif event == "checkpoint":
                if fault.checkpoint == number:
                    self._cancel(fault)
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

    def _cancel(self, fault: Fault) -> None:
        self._note(fault)
        if fault.kind is FaultKind.CANCELLED:
            self._scope.cancel()
            return
        self.natively = True
        self.again_at_rollback = fault.place.kind == "action"
        self._cancel_task()

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
        """The innermost middleware: ends the run where the plan says so."""
        if self.killed is not None:
            raise self.killed
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

    async def go(self) -> None:
        """Runs the saga, from one look at the state to another."""
        self.before = await self.snapshot()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._host)
        if self._escaped is not None:
            raise self._escaped
        self.after = await self.snapshot()

    async def _host(self) -> None:
        """Runs the saga, in a task that may be cancelled."""
        self._cancel_task = native_cancel() or self._scope.cancel
        token = current_watcher.set(self)
        try:
            with self._scope:
                await self._call()
        except BaseException as error:
            if isinstance(error, anyio.get_cancelled_exc_class()):
                # A native cancellation of ours has done its work, and this task ends here.
                if not self.natively:
                    raise
            elif not isinstance(error, Exception):
                self._escaped = error
        finally:
            current_watcher.reset(token)

    async def _call(self) -> None:
        try:
            if any(fault.kind.kills for fault in self.plan.faults):
                from ._killed import run_killed  # noqa: PLC0415 - needs a journal

                self.outcome, self.error = await run_killed(self)
                return
            self.outcome = await self.saga.run_with(self.trial.args, self.trial.kwargs)
            self.error = self.outcome.error
        except BaseException as error:
            self.error = error
            self.outcome = outcome_of(error)
            raise


def native_cancel() -> Callable[[], object] | None:
    """Gives what cancels the running task natively; None where there is no such thing."""
    import asyncio  # noqa: PLC0415 - only a trial cancels natively

    try:
        task = asyncio.current_task()
    except RuntimeError:
        return None
    return None if task is None else task.cancel
