"""What sagas do, as lines of the standard ``logging``: text for people, ``extra`` for programs."""

from __future__ import annotations

import logging
from time import perf_counter
from typing import Final, Literal

from pysagas import CallNext, Effect, EffectKind, Middleware, SagaState, StepState, observer

from ._state import one_line, state_of

__all__ = ["log_effects"]

Event = Literal["begun", "completed", "failed", "interrupted"]

_EVENTS: Final[tuple[Event, ...]] = ("begun", "completed", "failed", "interrupted")

# For each of the events. What goes by plan is for who looks closely; a failure need be no harm, as the
# saga may go another way, or is taken back; what could not be taken back, somebody has to look at.
_LEVELS: Final[dict[EffectKind, tuple[int, int, int, int]]] = {
    "saga": (logging.INFO, logging.INFO, logging.WARNING, logging.WARNING),
    "group": (logging.DEBUG, logging.DEBUG, logging.WARNING, logging.INFO),
    "action": (logging.DEBUG, logging.INFO, logging.WARNING, logging.INFO),
    "commit": (logging.DEBUG, logging.INFO, logging.WARNING, logging.INFO),
    "rollback": (logging.INFO, logging.WARNING, logging.ERROR, logging.ERROR),
    "compensation": (logging.DEBUG, logging.INFO, logging.ERROR, logging.ERROR),
}


def log_effects(logger: logging.Logger | None = None) -> Middleware:
    """Makes a middleware that logs each effect: a line when it begins, and one when it ends.

    Each line has what it says as ``extra``, under names that begin with ``pysagas_``. What an action
    gets and returns is not logged; the exception that it raises is. As an `observer` it cannot harm
    the saga.

    Levels: INFO for what is done, DEBUG for what begins, WARNING for what fails and for a rollback,
    ERROR where something could not be taken back.

    Args:
        logger: Where to; None: the logger ``pysagas``.

    Example:
        ::

            logging.basicConfig(level=logging.INFO)
            book_trip = Saga([...], name="trip", middleware=[log_effects()])
    """
    target = logging.getLogger("pysagas") if logger is None else logger

    async def log_effect(effect: Effect, call_next: CallNext) -> object:
        _log(target, effect, "begun")
        begun = perf_counter()
        try:
            result = await call_next()
        except BaseException as error:
            event: Event = "failed" if isinstance(error, Exception) else "interrupted"
            state = state_of(effect, call_next, error)
            _log(target, effect, event, perf_counter() - begun, state, error)
            raise
        _log(target, effect, "completed", perf_counter() - begun, state_of(effect, call_next, None))
        return result

    return observer(log_effect)


def _log(
    logger: logging.Logger,
    effect: Effect,
    event: Event,
    duration: float | None = None,
    state: StepState | SagaState | None = None,
    error: BaseException | None = None,
) -> None:
    level = logging.ERROR if state is SagaState.FAILED else _LEVELS[effect.kind][_EVENTS.index(event)]
    if not logger.isEnabledFor(level):
        return
    is_step = effect.kind in ("action", "compensation")
    what = "commit" if effect.kind == "commit" else f"{effect.kind} {one_line(effect.name)}"
    text = event if duration is None else f"{event} in {duration:.3f} s"
    raised = None
    if error is not None:
        raised = one_line(repr(error))
        text += f": {raised}" if state is None else f" ({state.value}): {raised}"
    # Each name in each line: a format that asks for one is an error in a line without it.
    extra = {
        "pysagas_event": event,
        "pysagas_kind": effect.kind,
        "pysagas_saga": effect.saga,
        "pysagas_run_id": effect.run_id,
        "pysagas_name": effect.name,
        "pysagas_path": ".".join(map(str, effect.path)),
        "pysagas_key": effect.key if is_step else None,
        "pysagas_action_key": effect.action_key,
        "pysagas_carried_on": effect.carried_on,
        "pysagas_duration": duration,
        "pysagas_state": None if state is None else state.value,
        "pysagas_error": raised,
    }
    logger.log(level, "%s: %s %s", one_line(effect.run_id), what, text, extra=extra)
