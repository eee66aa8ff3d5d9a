"""The outermost middleware of one run under a journal: what is recorded is given, all else recorded.

An action that is recorded gives its result, or raises its failure, and nothing is run; what stands
in doubt runs again, or is taken back. What is new is recorded before it happens, and its result
after. When which of that may happen is the business of `Replay`.

What this must not know: how events are stored.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import anyio

from pysagas import CallNext, Effect, StepInHand, StepState

from ._codec import Codec, decode_error, encode_error, encode_result, return_type, text_of
from ._errors import Interrupted, JournalError, NotRecordable, SagaChanged
from ._events import Event, EventKind, Path
from ._replay import Replay

__all__ = ["Recorder", "RunMiddleware"]


class Recorder(Protocol):
    """Where the events of one run go."""

    def append(self, event: Event) -> None:
        """Takes an event, to be written with the next batch."""
        ...

    async def flush(self) -> None:
        """Waits until all that was appended is on disk.

        Raises:
            JournalError: It could not be written.
        """
        ...

    async def reopen(self) -> None:
        """Takes up a run again that had ended, to be taken back."""
        ...


class RunMiddleware:
    """The outermost middleware of one run."""

    def __init__(
        self,
        recorder: Recorder,
        codec: Codec,
        saga: str,
        replay: Replay,
        settled: set[Path],
        *,
        value_type: Any,
    ) -> None:
        self._recorder = recorder
        self._codec = codec
        self._saga = saga
        self.replay = replay
        # What was taken back before the run was tried again, and stands in no order with the rest.
        self._settled = settled
        self._value_type = value_type
        # What the saga returned, in bytes.
        self.value = b""
        # Why nothing more is recorded, though the run goes on.
        self.broken: JournalError | None = None
        self.ended = False
        # Whether it was taken up again after that, to be taken back.
        self.reopened = False
        # The last exception of an action, for people.
        self._last_error = ""

    async def __call__(self, effect: Effect, call_next: CallNext) -> object:
        """Replays an effect, or runs and records it."""
        return await self.replay.carry_out(effect, partial(self._handle, effect, call_next))

    async def _handle(self, effect: Effect, call_next: CallNext) -> object:
        match effect.kind:
            case "action":
                assert call_next.step is not None
                return await self._action(effect, call_next, call_next.step)
            case "compensation":
                return await self._compensation(effect, call_next)
            case "rollback":
                return await self._rollback(effect, call_next)
            case "commit":
                return await self._commit(effect, call_next)
            case _:
                return await self._whole(effect, call_next)

    async def _whole(self, effect: Effect, call_next: CallNext) -> object:
        """A saga, or a group."""
        try:
            result = await call_next()
        except Exception:
            self.replay.check_over(effect)
            raise
        if effect.kind == "group":
            self.replay.check_over(effect, but=EventKind.JOINED)
            if not await self.replay.meet(effect):
                await self.replay.go_forward(effect)
                self._append(EventKind.JOINED, effect)
        self.replay.check_over(effect)
        if not effect.path:
            self.replay.check_completed()
            if self.broken is not None:
                raise self.broken  # what is on disk is not what the caller would be told
            place = f"saga {self._saga!r}"
            self.value = encode_result(self._codec, result, self._value_type, place)
        return result

    # --- actions and commits -----------------------------------------------------------------------

    async def _action(self, effect: Effect, call_next: CallNext, step: StepInHand) -> object:
        events = await self.replay.meet(effect)
        last = events[-1] if events else None
        if last is not None and last.kind in (EventKind.DONE, EventKind.FAILED):
            return self._recall(effect, step, last)
        if last is not None and len(events) > 1 and events[-2].kind is EventKind.DONE:
            result = self._recall(effect, step, events[-2])
            await self.replay.go_forward(effect)
            return result
        try:
            await self.replay.go_forward(effect)
        except BaseException as error:
            if last is not None:
                started = last.kind is EventKind.STARTED
                state = StepState.UNKNOWN if started else StepState(last.data.decode())
                step.recall(state, error=error)
            raise
        if last is not None and last.kind is EventKind.STARTED:
            # It runs again; and whatever comes of that, it may have had its effect before.
            step.recall(StepState.UNKNOWN, error=self._in_doubt())
        return await self._run_action(effect, call_next, step)

    def _in_doubt(self) -> Interrupted:
        return Interrupted("the process died while this action was running")

    def _recall(self, effect: Effect, step: StepInHand, event: Event) -> object:
        """Gives the recorded result of an action, or raises what it raised."""
        kind = return_type(step.action)
        if event.kind is EventKind.DONE:
            result = self._decode(event.data, kind, effect)
            step.recall(StepState.COMPLETED, result=result)
            return result
        data = json.loads(event.data)
        error = decode_error(data["error"])
        result = None
        if data["result"] is not None:
            result = self._decode(data["result"].encode("latin-1"), kind, effect)
        step.recall(StepState(data["state"]), result=result, error=error)
        raise error

    def _decode(self, data: bytes, kind: Any, effect: Effect) -> Any:
        try:
            return self._codec.decode(data, kind)
        except Exception as error:
            changed = SagaChanged(
                f"the recorded result of {effect.name!r} at {effect.path}, "
                f"{data.decode(errors='replace')}, cannot be read as {kind!r}: {error}; has the type that "
                "the action returns changed since?"
            )
            changed.__cause__ = error
            self.replay.abandon(changed)

    async def _run_action(self, effect: Effect, call_next: CallNext, step: StepInHand) -> object:
        try:
            await self._record(EventKind.STARTED, effect)
            result = await call_next()
        except BaseException as error:
            self._last_error = f"{type(error).__name__}: {text_of(error)}"
            with suppress(NotRecordable):  # then it stays in doubt
                done = step.state is StepState.COMPLETED
                result = self._encode(effect, step, step.result) if done else b""
                if isinstance(error, Exception):
                    failure = {
                        "state": step.state.value,
                        # Text, whatever the codec: each byte is a character.
                        "result": result.decode("latin-1") if done else None,
                        "error": encode_error(error),
                    }
                    self._append(EventKind.FAILED, effect, json.dumps(failure).encode())
                elif step.state is not StepState.UNKNOWN:
                    # A cancellation is no result; but the action had returned before, or this step
                    # is not in doubt, and will not be compensated.
                    if done:
                        self._append(EventKind.DONE, effect, result)
                    self._append(EventKind.CUT_OFF, effect, step.state.value.encode())
            raise
        self._append(EventKind.DONE, effect, self._encode(effect, step, result))
        return result

    def _encode(self, effect: Effect, step: StepInHand, result: object) -> bytes:
        place = f"step {effect.name!r} of saga {self._saga!r} at {effect.path}"
        return encode_result(self._codec, result, return_type(step.action), place)

    async def _commit(self, effect: Effect, call_next: CallNext) -> object:
        late: BaseException | None = None
        if not await self.replay.meet(effect):
            await self.replay.go_forward(effect)
            late = await self._record_surely(EventKind.COMMITTED, effect)
        result = await call_next()
        if late is not None:
            raise late
        return result

    # --- the way back --------------------------------------------------------------------------------

    async def _rollback(self, effect: Effect, call_next: CallNext) -> object:
        if not await self.replay.meet(effect):
            await self.replay.park(effect, forward=False)
            if self.ended and not self.reopened:
                with anyio.CancelScope(shield=True):  # from the time limit of the rollback
                    await self._recorder.reopen()
                self.reopened = True
            self._append(EventKind.ROLLBACK, effect, self._last_error.encode())
        return await call_next()

    async def _compensation(self, effect: Effect, call_next: CallNext) -> object:
        if effect.path in self._settled:
            return None
        for last in (await self.replay.meet(effect))[-1:]:
            if last.kind is EventKind.COMPENSATED:
                return None
            if last.kind is EventKind.NOT_COMPENSATED:
                raise decode_error(json.loads(last.data))
        # Not begun; or in doubt, and then it runs again.
        await self.replay.park(effect, forward=False)
        with suppress(JournalError):  # it has to run, recorded or not; recovery will run it again
            await self._record(EventKind.COMPENSATING, effect)
        try:
            result = await call_next()
        except BaseException as error:
            if isinstance(error, Exception):
                data = json.dumps(encode_error(error)).encode()
                self._append(EventKind.NOT_COMPENSATED, effect, data)
            raise
        self._append(EventKind.COMPENSATED, effect)
        return result

    # --- recording -----------------------------------------------------------------------------------

    def _append(self, kind: EventKind, effect: Effect, data: bytes = b"") -> None:
        if self.broken is None:
            try:
                self._recorder.append(Event(kind, effect.path, effect.name, data, time.time()))
            except JournalError as error:
                # It has happened, recorded or not. What follows will not.
                self.broken = error

    async def _record(self, kind: EventKind, effect: Effect) -> None:
        """Records what is about to happen; when this returns, it is on disk, and all before it."""
        self._append(kind, effect)
        await self._flush()

    async def _flush(self) -> None:
        try:
            if self.broken is None:
                await self._recorder.flush()
        except JournalError as error:
            # What was lost leaves a gap, after which nothing can be recorded any more.
            self.broken = error
        if self.broken is not None:
            raise self.broken

    async def _record_surely(self, kind: EventKind, effect: Effect) -> BaseException | None:
        """As `_record`, but not cut off: a commit of which only the journal knows would be a lie.

        Returns:
            A native cancellation that came meanwhile.
        """
        late: BaseException | None = None
        self._append(kind, effect)
        written = False
        with anyio.CancelScope(shield=True):
            while not written:
                try:
                    await self._flush()
                    written = True
                except anyio.get_cancelled_exc_class() as error:
                    late = error
        return late
