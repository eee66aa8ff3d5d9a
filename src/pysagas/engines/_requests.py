"""What a branch of a run waits for: that something is done and recorded, or that a time is over.

An action runs in a task that Restate's library starts for it, in a copy of the context of its branch. So
what it sets in context variables is seen by itself alone, when it runs as when it is recalled. What came
of it is recorded in the form of a journal's events.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine, Generator
from contextvars import Context, copy_context
from datetime import timedelta
from types import coroutine
from typing import TYPE_CHECKING, Any, TypeVar, cast

import restate
from restate.exceptions import SdkInternalBaseException
from restate.serde import BytesSerde

from pysagas import CallNext, Effect
from pysagas.durable._codec import encode_error
from pysagas.durable._ends import Ends, undo_is_lost
from pysagas.durable._errors import NotRecordable
from pysagas.durable._events import Event, EventKind, Path
from pysagas.durable._records import Events, written

from ._limits import LARGEST, as_utf8

if TYPE_CHECKING:
    from ._attempt import Attempt

__all__ = ["Pause", "Request", "Work", "read", "without_results", "write"]

T = TypeVar("T")
Order = tuple[Path, str, int]

RAW: restate.RunOptions[bytes] = restate.RunOptions(serde=BytesSerde())
BEGINS = {"action": EventKind.STARTED, "compensation": EventKind.COMPENSATING}
EVENTS = Events()


def write(*events: Event) -> bytes:
    """Gives the bytes of what has happened."""
    return EVENTS.encode([written(*event) for event in events]).encode()


def read(data: bytes) -> list[Event]:
    """Gives what has happened."""
    return EVENTS.decode(data.decode())


def without_results(records: list[bytes], ends: Ends) -> list[bytes]:
    """Gives records in which each result is None."""
    return [write(*map(ends.without_result, read(record))) for record in records]


class Request:
    """What a parked branch waits for."""

    __slots__ = ("branch", "is_kept", "kept", "order", "record")

    # Done when it is recorded; made when its branch parks.
    kept: asyncio.Future[None]

    def __init__(self, branch: Path, order: Order) -> None:
        self.branch = branch
        # Whether it is recorded, and its branch may go on.
        self.is_kept = False
        # Among those that are new: by their paths.
        self.order = order
        # What is recorded of it; None while nothing is, and for a pause.
        self.record: bytes | None = None

    @property
    def place(self) -> str:
        return ".".join(map(str, self.order[0]))

    def ask(self, context: restate.WorkflowContext) -> restate.RestateDurableFuture[Any]:
        """Asks Restate for it."""
        raise NotImplementedError  # pragma: no cover - abstract


class Pause(Request):
    """The time between two tries of an action."""

    __slots__ = ("length",)

    def __init__(self, branch: Path, order: Order, length: timedelta) -> None:
        super().__init__(branch, order)
        self.length = length

    def ask(self, context: restate.WorkflowContext) -> restate.RestateDurableFuture[Any]:
        return context.sleep(self.length, name=f"before attempt {self.order[2] + 1} [{self.place}]")


class Work(Request):
    """An action, or a compensation, that is to be done once."""

    # An object, and no closures: what is alive while a step waits is what the garbage collector goes
    # through, again and again.
    __slots__ = ("_attempt", "_call_next", "_context", "effect", "raised", "ran", "value")

    def __init__(
        self, attempt: Attempt, branch: Path, effect: Effect, call_next: CallNext, number: int
    ) -> None:
        super().__init__(branch, (effect.path, effect.kind, number))
        self._attempt = attempt
        self._call_next = call_next
        self._context = copy_context()
        self.effect = effect
        # Whether it was done in this attempt; else it is recalled. And what it returned, or raised.
        self.ran = False
        self.value: object = None
        self.raised: BaseException | None = None

    def ask(self, context: restate.WorkflowContext) -> restate.RestateDurableFuture[Any]:
        _, kind, number = self.order
        again = f" attempt {number}" if number > 1 else ""
        name = f"{kind} {self.effect.name} [{self.place}]{again}"
        return context.run_typed(as_utf8(name), self.run, RAW)

    async def run(self) -> bytes:
        """Does it; called by Restate's library, where nothing is recorded."""
        attempt = self._attempt
        task = asyncio.current_task()
        assert task is not None
        if attempt.abandoned is not None:
            raise asyncio.CancelledError
        attempt.acting.add(task)
        try:
            began = time.time()
            kind, data = await _in_context(self._context, self._act())
            self.ran = True
            self.record = self._write(began, kind, data)
            if len(self.record) > LARGEST and self.effect.kind == "action":
                kind, data = self._too_large(len(self.record))
                self.record = self._write(began, kind, data)
            return self.record
        finally:
            attempt.acting.discard(task)

    def _write(self, began: float, kind: EventKind, data: bytes) -> bytes:
        path, name = self.effect.path, as_utf8(self.effect.name)
        return write(
            Event(BEGINS[self.effect.kind], path, name, at=began),
            Event(kind, path, name, data, time.time()),
        )

    def _too_large(self, size: int) -> tuple[EventKind, bytes]:
        """Fails a step whose result Restate would not take; an undo in this attempt still has it."""
        effect, step = self.effect, self._call_next.step
        assert step is not None
        error = NotRecordable(
            f"step {effect.name!r} of saga {effect.saga!r} at {effect.path} gave a result of {size:,} bytes, "
            f"and Restate takes {LARGEST:,}: keep it elsewhere, and return its name"
        )
        self.raised = error
        return self._attempt.ends.failed(effect, step, error, is_lost=True)

    async def _act(self) -> tuple[EventKind, bytes]:
        attempt, effect, step = self._attempt, self.effect, self._call_next.step
        assert step is not None
        try:
            if effect.kind == "action":
                self.value = await self._call_next()
                return attempt.ends.returned(effect, step, self.value)
            if effect.path in attempt.lost:
                raise undo_is_lost(effect)
            self.value = await self._call_next()
        except BaseException as error:
            if not self._is_its_own(error):
                raise
            self.raised = error
            if effect.kind == "action":
                return attempt.ends.failed(effect, step, error)
            return EventKind.NOT_COMPENSATED, json.dumps(encode_error(error)).encode()
        return EventKind.COMPENSATED, b""

    def _is_its_own(self, error: BaseException) -> bool:
        """Tells whether a step has raised it by itself; then its run fails by it, whatever it is.

        A SystemExit or KeyboardInterrupt is no order to this worker: it would be one to the next worker,
        too. A cancellation may be that of a future that was awaited, or of the action's own task; who
        ends the worker cancels the task of the handler as well.
        """
        if not isinstance(error, asyncio.CancelledError):
            return not isinstance(error, GeneratorExit | SdkInternalBaseException)
        task = asyncio.current_task()
        assert task is not None
        attempt = self._attempt
        return attempt.abandoned is None and not (task.cancelling() and attempt.is_stopped)


@coroutine
def _in_context(context: Context, inner: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
    """Awaits a coroutine in a context, within the task that awaits this."""
    run = context.run
    try:
        yielded = run(inner.send, None)
        while True:
            try:
                yield yielded
            except BaseException as error:
                yielded = run(inner.throw, error)
            else:
                yielded = run(inner.send, None)
    except StopIteration as ended:
        return cast("T", ended.value)
