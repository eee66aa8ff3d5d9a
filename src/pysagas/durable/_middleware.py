"""The outermost middleware of one run under a journal: what is recorded is given, all else recorded.

An action that is recorded gives its result, or raises its failure, and nothing is run; what stands
in doubt runs again, or is taken back. What is new is recorded before it happens, and its result
after. When which of that may happen is the business of `Replay`.

What this must not know: how events are stored.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable
from contextlib import suppress
from functools import partial
from typing import Any, Final, NoReturn

import anyio
import anyio.lowlevel

from pysagas import CallNext, Effect, Saga, StepInHand, StepState

from ._codec import (
    Codec,
    decode_error,
    encode_error,
    encode_result,
    text_of,
)
from ._ends import Ends, undo_is_lost
from ._errors import Interrupted, JournalError, SagaChanged
from ._events import Event, EventKind, Path, interruption, relevant
from ._recalled import value_type
from ._replay import Replay
from ._storage import Storage
from ._surely import surely

__all__ = ["RunMiddleware"]

# Each step asks for these; in Python 3.11 a member of an enum is slow to find.
DONE: Final = EventKind.DONE
STARTED: Final = EventKind.STARTED

ENDED = {EventKind.DONE, EventKind.ANSWERED, EventKind.FAILED}


class _Over:
    """Where the events of a run go that has ended, or was let go."""

    def _append(self, *event: object) -> None:
        """Forgets it: in the journal the run has ended, and what it does yet, nobody would take up."""

    def _flush(self, _: int) -> NoReturn:
        raise JournalError(
            "the run has ended, so nothing of it is recorded, and nothing more may begin"
        )


_OVER: Final = _Over()


class Recorder:
    """Records what happens in one run, for as long as that is possible."""

    __slots__ = ("_goes_to", "_key", "_storage", "broken")

    def __init__(self, storage: Storage, key: int) -> None:
        """Makes the one of a run: where its events go, and by which key that knows it."""
        self._storage = storage
        self._key = key
        # The same, or nothing where the run has ended: a task that it has left behind may go on.
        self._goes_to: Storage | _Over = storage
        # Why nothing more is recorded, though the run goes on.
        self.broken: JournalError | None = None

    def append(self, kind: EventKind, path: Path, name: str, data: bytes = b"") -> None:
        """Takes an event; it has happened, recorded or not."""
        if self.broken is None:
            try:
                self._goes_to._append(self._key, kind, path, name, data)
            except JournalError as error:
                self.broken = error  # what follows will not

    def flush(self) -> Awaitable[None]:
        """Gives what waits until all that was taken is on disk.

        Raises:
            JournalError: Something of it could not be written.
        """
        if self.broken is not None:
            raise self.broken
        return self._goes_to._flush(self._key)

    def close(self) -> None:
        """Records nothing more, as the run ends, or is let go."""
        self._goes_to = _OVER

    def open_again(self) -> None:
        """Records what happens from now on."""
        self._goes_to = self._storage

    @property
    def is_closed(self) -> bool:
        return self._goes_to is not self._storage


class RunMiddleware:
    """The outermost middleware of one run."""

    __slots__ = (
        "_codec",
        "_cut_short",
        "_ends",
        "_last_error",
        "_lost",
        "_resume",
        "_saga",
        "_settled",
        "_taken_back",
        "carried_on",
        "committed",
        "recorder",
        "reopened",
        "replay",
        "value",
    )

    def __init__(
        self,
        storage: Storage,
        key: int,
        codec: Codec,
        saga: Saga[..., Any],
        events: list[Event],
        *,
        recovering: bool,
        resume: bool,
    ) -> None:
        """Makes the one of a run.

        Args:
            storage: Where its events go.
            key: By which that knows the run.
            codec: For results.
            saga: Whose run it is.
            events: What is recorded of it.
            recovering: Whether it had begun in another process.
            resume: Whether it goes on after the replay, or is taken back.
        """
        # What the replay records goes there too; it does not know this, or only the garbage collector would
        # ever free the two.
        self.recorder = Recorder(storage, key)
        self._codec = codec
        self._saga = saga
        self._ends = Ends(codec, saga.name)
        # And what was taken back before the run was tried again, which stands in no order with the rest.
        history, self._settled, self.carried_on = relevant(events)
        self._resume = resume
        # Whether the run has passed its commit, as far as that is met.
        self.committed = False
        # Whether the whole of it is taken back: what a middleware returns then is not its value.
        self._taken_back = False
        # The groups of which a member was interrupted, or cancelled.
        self._cut_short: frozenset[Path] = frozenset()
        # Where an action returned what could not be recorded, and only an undo takes it back.
        self._lost: frozenset[Path] = frozenset()
        note_interruption = partial(self.recorder.append, EventKind.INTERRUPTED, (), saga.name)
        self.replay = Replay(
            saga.name, history, note_interruption, recovering=recovering, resume=resume
        )
        # What the saga returned, in bytes.
        self.value = b""
        # Whether it was taken up again after its end, to be taken back.
        self.reopened = False
        # The last exception of an action, for people.
        self._last_error = ""
        self.replay.start()

    # One coroutine less around each effect than with `async def`: all that a run awaits goes through here.
    # (Type checkers do not agree on what that gives.)
    def __call__(self, effect: Effect, call_next: CallNext) -> Any:
        """Replays an effect, or runs and records it."""
        replay = self.replay
        if effect.kind == "action" and replay.is_plain:
            assert call_next.step is not None
            return self._run_action(effect, call_next, call_next.step)
        if replay.abandoned is not None:
            # Anew: the traceback of one, and what the engine notes on it, would grow with each effect.
            raise type(replay.abandoned)(*replay.abandoned.args)
        if replay.is_member(effect):
            return self._member(effect, call_next)
        return self._handle(effect, call_next)

    async def _member(self, effect: Effect, call_next: CallNext) -> object:
        replay = self.replay
        with replay.branch(effect.path):
            try:
                return await self._handle(effect, call_next)
            except GeneratorExit:
                raise
            except BaseException as error:
                if not isinstance(error, Exception):
                    self._cut_short |= {effect.path[:-1]}
                if not await replay.leave(effect):
                    self.recorder.append(EventKind.LEFT, effect.path, effect.name)
                raise

    def _handle(self, effect: Effect, call_next: CallNext) -> Awaitable[object]:
        match effect.kind:
            case "action":
                assert call_next.step is not None
                act = self._run_action if self.replay.is_clear else self._replay_action
                return act(effect, call_next, call_next.step)
            case "compensation":
                return self._compensation(effect, call_next)
            case "rollback":
                return self._rollback(effect, call_next)
            case "commit":
                return self._commit(effect, call_next)
            case _:
                return self._whole(effect, call_next)

    async def _whole(self, effect: Effect, call_next: CallNext) -> object:
        """A saga, or a group."""
        replay = self.replay
        is_group = effect.kind == "group"
        if is_group:
            replay.open_group(effect.path)
        try:
            result = await call_next()
        except Exception as error:
            if replay.abandoned is not None:
                raise
            replay.check_over(effect)
            if is_group and replay.stopped is not None and effect.path in self._cut_short:
                # It is chance whether a member was interrupted, or cancelled since another one failed
                # first; a function that catches the failure must not go on in one recovery only.
                raise replay.stopped from error
            if is_group and not replay.is_member(effect):
                # Whoever called it may go another way, and in a replay must not be cancelled before.
                with suppress(Interrupted):  # sticky: what comes next meets it too
                    await self._end(effect, EventKind.BROKEN)
            raise
        replay.check_over(effect)
        if is_group or replay.is_member(effect):
            await self._end(effect, EventKind.JOINED)
        if not effect.path and not self._taken_back:
            replay.check_completed()
            if self.recorder.broken is not None:
                raise self.recorder.broken  # what is on disk is not what the caller would be told
            place = f"saga {self._saga.name!r}"
            self.value = encode_result(self._codec, result, value_type(self._saga), lambda: place)
        return result

    async def _end(self, effect: Effect, how: EventKind) -> None:
        if not await self.replay.end(effect, how):
            self.recorder.append(how, effect.path, effect.name)

    @property
    def goes_on(self) -> bool:
        """Whether a recovery would carry the run on: then nothing may be taken back unrecorded."""
        return self._resume or self.committed

    def interruption(self) -> Event:
        """Gives what is to be recorded of a run that was taken back while nothing could be recorded."""
        return interruption(self._saga.name, time.time())

    # --- actions and commits -----------------------------------------------------------------------

    async def _replay_action(self, effect: Effect, call_next: CallNext, step: StepInHand) -> object:
        events = await self.replay.meet(effect)
        last = events[-1] if events else None
        if last is not None and last.kind in ENDED:
            return self._recall(effect, step, last)
        if last is not None and len(events) > 1 and events[-2].kind is DONE:
            result = self._recall(effect, step, events[-2])
            await self.replay.go_forward(effect)
            # This time nothing cuts it off, and what comes after it is recorded.
            self.recorder.append(DONE, effect.path, effect.name, events[-2].data)
            return result
        try:
            await self.replay.go_forward(effect)
        except BaseException as error:
            if last is not None:
                said = last.said()
                assert said is not None
                step.recall(said.state, error=error)
            raise
        if last is not None and last.kind is STARTED:
            # It runs again; and whatever comes of that, it may have had its effect before.
            step.recall(StepState.UNKNOWN, error=self._in_doubt())
        return await self._run_action(effect, call_next, step)

    def _in_doubt(self) -> Interrupted:
        return Interrupted("the process died while this action was running")

    def _recall(self, effect: Effect, step: StepInHand, event: Event) -> object:
        """Gives the recorded result of an action, or raises what it raised."""
        try:
            ended = self._ends.read(effect, step, event)
        except SagaChanged as changed:
            self.replay.abandon(changed)
        state = self._recall_lost(effect, step) if ended.is_lost else ended.state
        step.recall(state, result=ended.result, error=ended.error)
        if ended.error is not None:
            raise ended.error
        return ended.value

    def _recall_lost(self, effect: Effect, step: StepInHand) -> StepState:
        """Says how a step stands whose action returned what could not be recorded.

        While that process lived its undo could take it. Now the step is in doubt; but where its undo
        alone was recorded, that has to be met.
        """
        undone = effect.path in self._settled or self.replay.is_recorded("compensation", effect.path)
        # A rollback that had begun, of the step or of what is around it, has to be met as well; and it
        # comes only where something is to be taken back.
        around = range(len(effect.path) + 1)
        undone = undone or any(
            self.replay.is_recorded("rollback", effect.path[:depth]) for depth in around
        )
        if step.compensation is not None or not undone:
            return StepState.UNKNOWN
        self._lost |= {effect.path}
        return StepState.COMPLETED

    async def _run_action(self, effect: Effect, call_next: CallNext, step: StepInHand) -> object:
        recorder = self.recorder
        try:
            recorder.append(STARTED, effect.path, effect.name)
            # As `_flush`, written out: that would be one coroutine more for each step.
            try:
                await recorder.flush()
            except JournalError as error:
                self._break(error)
            answer = await call_next()
            kind, data = self._ends.returned(effect, step, answer)
        except BaseException as error:
            self._last_error = f"{type(error).__name__}: {text_of(error)}"
            for kind, data in self._ends.raised(effect, step, error):
                recorder.append(kind, effect.path, effect.name, data)
            raise
        recorder.append(kind, effect.path, effect.name, data)
        return answer

    async def _commit(self, effect: Effect, call_next: CallNext) -> object:
        late: BaseException | None = None
        if not await self.replay.meet(effect):
            await self.replay.go_forward(effect)
            self.recorder.append(EventKind.COMMITTED, effect.path, effect.name)
            # Not cut off, as a commit of which only the journal knows would be a lie.
            late = await surely(self._flush)
        self.committed = True
        result = await call_next()
        if late is not None:
            raise late
        return result

    # --- the way back --------------------------------------------------------------------------------

    async def _rollback(self, effect: Effect, call_next: CallNext) -> object:
        if not effect.path:
            self._taken_back = True
        if not await self.replay.meet(effect):
            await self.replay.park(effect, forward=False)
            self.recorder.append(
                EventKind.ROLLBACK,
                effect.path,
                effect.name,
                self._last_error.encode(errors="backslashreplace"),
            )
        return await call_next()

    async def _compensation(self, effect: Effect, call_next: CallNext) -> object:
        if effect.path in self._settled:
            return None
        for last in (await self.replay.meet(effect))[-1:]:
            if last.kind is EventKind.COMPENSATED:
                return None
            if last.kind is EventKind.NOT_COMPENSATED:
                # Those beside it had begun, and do so again before this one stops others.
                await anyio.lowlevel.cancel_shielded_checkpoint()
                raise decode_error(json.loads(last.data))
        # Not begun; or in doubt, and then it runs again.
        await self.replay.park(effect, forward=False)
        if effect.path in self._lost:
            raise undo_is_lost(effect)
        # It has to run, recorded or not; the next recovery will run it again. (What has failed for good is
        # not asked again: it would raise the same error, whose traceback grows each time.)
        if self.recorder.broken is None or self.goes_on:
            try:
                self.recorder.append(EventKind.COMPENSATING, effect.path, effect.name)
                await self._flush()
            except JournalError:
                if self.replay.abandoned is not None:
                    raise
        try:
            result = await call_next()
        except BaseException as error:
            if isinstance(error, Exception):
                data = json.dumps(encode_error(error)).encode()
                self.recorder.append(EventKind.NOT_COMPENSATED, effect.path, effect.name, data)
            raise
        self.recorder.append(EventKind.COMPENSATED, effect.path, effect.name)
        return result

    async def _flush(self) -> None:
        """Waits until all that was recorded is on disk: before anything happens that it speaks of."""
        try:
            await self.recorder.flush()
        except JournalError as error:
            self._break(error)

    def _break(self, error: JournalError) -> NoReturn:
        """Records nothing more: what was lost leaves a gap, after which nothing can be."""
        if not self.recorder.is_closed:
            self.recorder.broken = error
            if self.goes_on:
                self.replay.abandon(error)
        raise error
