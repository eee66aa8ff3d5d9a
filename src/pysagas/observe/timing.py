"""When actions and compensations ran, for the outcome of their run."""

from __future__ import annotations

from anyio import current_time

from pysagas import CallNext, Effect, Middleware, note_time, observer

__all__ = ["record_times"]


def record_times() -> Middleware:
    """Makes a middleware that notes when each action and each compensation ran.

    `Outcome.times` has it then, ``str(outcome)`` says how long each took, and
    ``pysagas.diagrams.timeline`` draws it. The clock is the event loop's, so virtual ones work. What
    fails, or is cut off, has an end like any other; retries are within the time of their action. As an
    `observer` it cannot harm the saga.

    Each run has its own times: those of a run that an action starts are in that one's outcome.

    Example:
        ::

            book_trip = Saga([...], name="trip", middleware=[record_times()])
    """
    return observer(_record)


async def _record(effect: Effect, call_next: CallNext) -> object:
    if effect.kind not in ("action", "compensation"):
        return await call_next()
    began = current_time()
    try:
        result = await call_next()
    except BaseException as error:
        # Of a coroutine that is closed, or collected, there may be no loop left to ask.
        if not isinstance(error, GeneratorExit):
            note_time(effect, began, current_time())
        raise
    note_time(effect, began, current_time())
    return result
