"""How actions ended: written for whoever keeps a run, and read again where it is replayed."""

from __future__ import annotations

import json
from typing import Any, Final, NamedTuple

from pysagas import Effect, StepInHand, StepState

from ._annotations import return_type
from ._codec import Codec, as_bytes, as_text, decode_error, encode_error, encode_result
from ._errors import NotRecordable, SagaChanged
from ._events import Event, EventKind

__all__ = ["Ended", "Ends", "undo_is_lost"]

# Each step asks for these; in Python 3.11 a member of an enum is slow to find.
COMPLETED: Final = StepState.COMPLETED
DONE: Final = EventKind.DONE

Written = tuple[EventKind, bytes]


class Ended(NamedTuple):
    """How an action ended when it ran.

    Attributes:
        state: In which state that left its step.
        result: What it had returned, for an undo; None where it had not.
        value: What its caller was given.
        error: What it raised; None where it did not.
        is_lost: Whether it had returned what could not be recorded.
    """

    state: StepState
    result: Any
    value: Any
    error: BaseException | None
    is_lost: bool


def undo_is_lost(effect: Effect) -> NotRecordable:
    """Makes the error for a compensation that nobody can run any more."""
    return NotRecordable(
        f"step {effect.name!r} at {effect.path} returned what could not be recorded, and its undo has not "
        "ended: take it back by hand, or give the step a compensation, which takes its arguments"
    )


class Ends:
    """Writes how the actions of one saga's run end, and reads that again."""

    __slots__ = ("_codec", "_saga")

    def __init__(self, codec: Codec, saga: str) -> None:
        """Makes one.

        Args:
            codec: For results.
            saga: The name of the saga, for messages.
        """
        self._codec = codec
        self._saga = saga

    def returned(self, effect: Effect, step: StepInHand, answer: object) -> Written:
        """Writes what the caller of an action is given, which mostly is what the action returned.

        Raises:
            NotRecordable: It would not come back as it is.
        """
        if step.state is COMPLETED and answer is step.result:
            return DONE, self._encode(effect, step, answer)
        # A retry or a middleware has answered in its place, in whatever type.
        try:
            data, typed = self._encode(effect, step, answer), True
        except NotRecordable:
            data, typed = (
                encode_result(self._codec, answer, Any, self._answered, effect),
                False,
            )
        answered = {
            "state": step.state.value,
            "result": self._encode_result(effect, step),
            "answer": as_text(data),
            "typed": typed,
        }
        return EventKind.ANSWERED, json.dumps(answered).encode()

    def raised(self, effect: Effect, step: StepInHand, error: BaseException) -> list[Written]:
        """Writes what an action raised; an interruption is no failure, but may say how far it had come."""
        if isinstance(error, Exception):
            return [self.failed(effect, step, error)]
        result = self._encode_result(effect, step)
        if step.state is StepState.UNKNOWN or (result is None) == (step.state is COMPLETED):
            return []
        # A cancellation is no result; but the action had returned before, or this step is not in
        # doubt, and will not be compensated.
        cut_off = EventKind.CUT_OFF, step.state.value.encode()
        return [cut_off] if result is None else [(DONE, as_bytes(result)), cut_off]

    def failed(
        self, effect: Effect, step: StepInHand, error: BaseException, *, is_lost: bool = False
    ) -> Written:
        """Writes what an action failed by, and the state in which that left its step.

        What it had returned is written along, unless that `is_lost`.
        """
        result = None if is_lost else self._encode_result(effect, step)
        failure = {"state": step.state.value, "result": result, "error": encode_error(error)}
        return EventKind.FAILED, json.dumps(failure).encode()

    def without_result(self, event: Event) -> Event:
        """Gives an event in which what was returned is None."""
        nothing = self._codec.encode(None)
        if event.kind is DONE:
            return event._replace(data=nothing)
        if event.kind is EventKind.ANSWERED:
            answered = json.loads(event.data)
            result = None if answered["result"] is None else as_text(nothing)
            answered = {**answered, "result": result, "answer": as_text(nothing)}
            return event._replace(data=json.dumps(answered).encode())
        return event

    def read(self, effect: Effect, step: StepInHand, event: Event) -> Ended:
        """Reads how an action ended.

        Raises:
            SagaChanged: What it returned is not of the type that it returns now.
        """
        said = event.said()
        assert said is not None
        state, recorded, failure, answer, typed = said
        kind = return_type(step.action)
        result = None if recorded is None else self._decode(recorded, kind, effect)
        value = result if answer is None else self._decode(answer, kind if typed else Any, effect)
        error = None if failure is None else decode_error(failure)
        return Ended(state, result, value, error, recorded is None and state is COMPLETED)

    def _encode_result(self, effect: Effect, step: StepInHand) -> str | None:
        """Gives what an action returned; None where it did not, or that cannot be recorded."""
        if step.state is not COMPLETED:
            return None
        try:
            return as_text(self._encode(effect, step, step.result))
        except NotRecordable:
            return None

    def _encode(self, effect: Effect, step: StepInHand, result: object) -> bytes:
        return encode_result(self._codec, result, return_type(step.action), self._place, effect)

    def _place(self, effect: Effect) -> str:
        return f"step {effect.name!r} of saga {self._saga!r} at {effect.path}"

    def _answered(self, effect: Effect) -> str:
        return f"what was answered for step {effect.name!r} of saga {self._saga!r}"

    def _decode(self, data: bytes, kind: Any, effect: Effect) -> Any:
        try:
            return self._codec.decode(data, kind)
        except Exception as error:
            raise SagaChanged(
                f"the recorded result of {effect.name!r} at {effect.path}, "
                f"{data.decode(errors='replace')}, cannot be read as {kind!r}: {error}; has the type that "
                "the action returns changed since?"
            ) from error
