"""A process in which a saga runs, until it ends or is killed.

A killed process does nothing more: its functions are not called, its journal takes nothing, and what
was waiting in one of them stays there, without coming to its `finally`, until all has been looked at.
Then it is *buried*: what still stands is cancelled, in its own task, and unwinds as it entered. (To
drop it instead would leave open its cancel scopes, and those of the engine around it.)
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol

import anyio

from pysagas import CallNext, Effect, Outcome, outcome_of

from ._faults import EventKind, Place
from ._watched import Killed, current_watcher

__all__ = ["Process", "native_cancel"]


class Run(Protocol):
    """Who is told what a process does, and makes faults of it."""

    def meet(self, process: Process, event: EventKind, place: Place) -> bool:
        """Makes what is planned for this event; tells whether the function is to be called again."""
        ...

    async def around(self, effect: Effect, call_next: CallNext) -> object:
        """Is around each effect."""
        ...


class Process:
    """Watches one process, and what came of it.

    Attributes:
        killed: What its functions raise once it has been killed.
        over: Set when it is killed, or has ended.
        again_at_rollback: Whether its task is to be cancelled once more, when the rollback begins.
        outcome: The saga's own report, once it has ended.
        error: What it ended with.
        stray: What it ended with that is neither a failure nor a cancellation.
        open: What is under way.
    """

    def __init__(self, run: Run) -> None:
        self.killed: Killed | None = None
        self.over = anyio.Event()
        self.again_at_rollback = False
        self.outcome: Outcome[Any] | None = None
        self.error: BaseException | None = None
        self.stray: BaseException | None = None
        self._run = run
        self._thread = threading.get_ident()
        self._scope = anyio.CancelScope()
        self._cancel_task: Callable[[], object] | None = None
        self._natively = False
        self._buried = anyio.Event()
        self.open: dict[anyio.CancelScope, Effect | Place] = {}

    async def run(self, call: Callable[[], Awaitable[Outcome[Any]]]) -> None:
        """Runs the saga, in a task of its own, which may be cancelled."""
        self._cancel_task = native_cancel()
        current_watcher.set(self)
        try:
            with self._scope:
                await self._call(call)
        except BaseException as error:
            if self.killed is not None:
                pass  # nobody hears of it
            elif isinstance(error, anyio.get_cancelled_exc_class()):
                # A native cancellation of ours has done its work, and this task ends here.
                if not self._natively:
                    raise
            elif not isinstance(error, Exception):
                self.stray = error
        finally:
            self.over.set()

    async def _call(self, call: Callable[[], Awaitable[Outcome[Any]]]) -> None:
        try:
            self.outcome = await call()
            self.error = self.outcome.error
        except BaseException as error:
            self.error = error
            # A run that was recovered tells it in another way.
            self.outcome = outcome_of(error) or getattr(error, "outcome", None)
            raise

    # What becomes of it.

    def cancel(self) -> None:
        """Cancels the scope around the run."""
        self._scope.cancel()

    def cancel_natively(self) -> None:
        """Cancels the task; only where there is such a thing."""
        assert self._cancel_task is not None
        self._natively = True
        self._in_its_loop(self._cancel_task)

    def kill(self, why: str) -> None:
        """Lets nothing more happen in it."""
        self.killed = Killed(why)
        self._in_its_loop(self.over.set)

    def bury(self) -> list[str]:
        """Ends all that is left of it; gives the names of what was under way."""
        kinds = {(one.kind == "compensation", one.name): None for one in self.open.values()}
        names = [f"taking back {name}" if back else name for back, name in kinds]
        self.killed = self.killed or Killed("cut off")
        self._buried.set()
        self._scope.cancel()
        for scope in self.open:
            scope.cancel()
        return names

    def _in_its_loop(self, function: Callable[[], object]) -> None:
        if threading.get_ident() == self._thread:
            function()
        else:
            anyio.from_thread.run_sync(function)

    # What the watched functions tell.

    def check(self) -> None:
        """Raises where it has been killed."""
        if self.killed is not None:
            raise self.killed

    def enter(self, place: Place) -> None:
        """A function is about to be called."""
        self.check()
        if place.kind == "compensation" and self.again_at_rollback:
            self.again_at_rollback = False
            self.cancel_natively()
        self._run.meet(self, "enter", place)

    def checkpoint(self, place: Place) -> None:
        """It is about to wait."""
        if self.killed is None:
            self._run.meet(self, "checkpoint", place)

    def done(self, place: Place) -> bool:
        """It has returned; tells whether it is to be called again."""
        self.check()
        return self._run.meet(self, "done", place)

    def under_way(self, what: Effect | Place) -> AbstractContextManager[object]:
        """Lets what runs here be cut off, whatever shields the engine has around it."""
        return _UnderWay(self, what)

    async def freeze(self) -> None:
        """Waits until the process is buried; cancellation comes to nobody here."""
        with anyio.CancelScope(shield=True):
            await self._buried.wait()

    async def around(self, effect: Effect, call_next: CallNext) -> object:
        """The innermost middleware of the saga."""
        self.check()
        if effect.kind in ("action", "compensation"):
            # With its retry, that may wait too. A shielded action is reached from inside of it alone.
            with self.under_way(effect):
                return await self._run.around(effect, call_next)
        return await self._run.around(effect, call_next)


class _UnderWay(AbstractContextManager[object]):
    """The block in which something is under way."""

    __slots__ = ("_process", "_scope", "_what")

    def __init__(self, process: Process, what: Effect | Place) -> None:
        self._process = process
        self._what = what
        self._scope = anyio.CancelScope()

    def __enter__(self) -> None:
        self._process.open[self._scope] = self._what
        self._scope.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        del self._process.open[self._scope]
        swallowed = self._scope.__exit__(kind, error, traceback)
        if swallowed:
            self._process.check()  # it was cut off
        return swallowed


def native_cancel() -> Callable[[], object] | None:
    """Gives what cancels the running task natively; None where there is no such thing."""
    import asyncio  # noqa: PLC0415 - only a trial cancels natively

    try:
        task = asyncio.current_task()
    except RuntimeError:
        return None
    return None if task is None else task.cancel
