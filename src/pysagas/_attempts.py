"""One attempt at an action, and what a step asks to have wrapped around its calls.

Composed once, when the step is built: outermost shield or thread, then retry, then timeout, then the
call. A step that asks for none of it is called as it is, and costs nothing extra.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Final, Protocol

from anyio import move_on_after
from anyio.lowlevel import RunVar, checkpoint_if_cancelled

from ._errors import SagaDefinitionError, orders_to_quit
from ._outcome import StepState
from ._shelter import call_sheltered
from ._signatures import is_async, is_awaitable, name_of

if TYPE_CHECKING:
    from anyio import CapacityLimiter

    from ._definitions import Step

__all__ = ["Attempted", "Retry", "attempt", "compose_attempts", "compose_back", "settle"]

COMPLETED: Final = StepState.COMPLETED
NOT_APPLIED: Final = StepState.NOT_APPLIED
NOT_STARTED: Final = StepState.NOT_STARTED
UNKNOWN: Final = StepState.UNKNOWN

# As many as AnyIO and Trio allow for the way forward, unless told otherwise.
_THREADS_BACK = 40
_limiter_back: RunVar[CapacityLimiter] = RunVar("pysagas_threads_back")


class Retry(Protocol):
    """What ``retry=`` takes: it awaits the function that it is given, perhaps several times."""

    async def __call__(self, attempt: Callable[[], Awaitable[Any]], /) -> Any:
        """Returns what an attempt returned, or raises."""
        ...


class Attempted(Protocol):
    """The record of a step, as far as an attempt at its action writes to it."""

    state: StepState
    result: Any
    error: BaseException | None

    @property
    def args(self) -> tuple[Any, ...]: ...

    @property
    def kwargs(self) -> Mapping[str, Any]: ...


async def settle(value: object) -> object:
    """Gives a value, or what it gives when awaited."""
    return await value if is_awaitable(value) else value


async def attempt(record: Attempted, step: Step[..., Any]) -> Any:
    """Tries a step's action once, and writes to its record how that went.

    A later attempt can only add to what may have happened: an action that once returned stays
    completed, one that was once in doubt stays in doubt until it returns.
    """
    if not step.known_async and not step.blocking:
        await checkpoint_if_cancelled()
    before = record.state
    if before is UNKNOWN and record.error is None:
        raise SagaDefinitionError(
            f"step {step.name!r}: an attempt was begun while another one runs; a retrier that makes "
            "them at the same time (hedging) cannot be told which of them took effect"
        )
    record.state = UNKNOWN
    record.error = None
    limit = None
    result = None
    try:
        if step.timeout is not None:
            with move_on_after(step.timeout) as limit:
                result = await settle(step.action(*record.args, **record.kwargs))
        elif step.blocking:
            result = await _in_thread(step, step.action, record.args, record.kwargs, _one_thread())
        else:
            result = step.action(*record.args, **record.kwargs)
            if is_awaitable(result):
                result = await result
    except BaseException as error:
        record.error = error
        if before is COMPLETED:
            record.state = COMPLETED
        elif (
            before is not UNKNOWN
            and isinstance(error, step.not_applied)
            and not isinstance(error, BaseExceptionGroup)
        ):
            record.state = NOT_APPLIED
        raise
    if limit is not None and limit.cancelled_caught:
        # Raised outside of the block above: the step's own timeout never counts as not_applied.
        record.error = TimeoutError(f"step {step.name!r} did not end within {step.timeout} s")
        record.state = COMPLETED if before is COMPLETED else UNKNOWN
        raise record.error
    record.result = result
    record.state = COMPLETED
    return result


def compose_attempts(step: Step[..., Any]) -> Callable[[Attempted], Awaitable[Any]] | None:
    """Wraps shield or thread, then retry, around the attempts; None where there is nothing to wrap."""
    retry = step.retry
    sheltered = step.shield or step.blocking
    if not sheltered and retry is None and step.timeout is None:
        return None

    async def tried(record: Attempted) -> Any:
        if retry is None:
            return await attempt(record, step)

        async def again() -> Any:
            return await attempt(record, step)

        result = await retry(again)
        if record.state is NOT_STARTED:
            # It answered in the action's place, as a middleware may. Where an attempt was made and
            # failed, the step stays what that made of it, whatever the caller is given.
            record.result = result
            record.state = COMPLETED
        return result

    if not sheltered:
        return tried

    async def to_its_end(record: Attempted) -> Any:
        from anyio import to_thread  # noqa: PLC0415 - few steps need threads

        threads = to_thread.current_default_thread_limiter()
        await checkpoint_if_cancelled()
        if step.blocking:
            # Waited for here, where a cancellation still finds nothing begun.
            await threads.acquire_on_behalf_of(record)
        try:
            result = await call_sheltered(partial(tried, record))
        except BaseException as error:
            if not isinstance(error, GeneratorExit) and not orders_to_quit(error):
                await checkpoint_if_cancelled()
            raise
        finally:
            if step.blocking:
                threads.release_on_behalf_of(record)
        # A scope that was cancelled meanwhile is noticed now, as a native cancellation is: the step
        # has ended, and is taken back with its result known.
        await checkpoint_if_cancelled()
        return result

    return to_its_end


def compose_back(
    step: Step[..., Any], function: Callable[..., object] | None
) -> Callable[..., object] | None:
    """Wraps thread, retry and timeout around an undo or a compensation."""
    if function is None:
        return None
    limit = step.compensation_timeout
    retry = step.compensation_retry
    threaded = step.blocking and not is_async(function)
    if limit is None and retry is None and not threaded:
        return function

    async def once(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
        if threaded:
            return await _in_thread(step, function, args, kwargs, _threads_back())
        if limit is None:
            return await settle(function(*args, **kwargs))
        with move_on_after(limit) as scope:
            return await settle(function(*args, **kwargs))
        # Unreachable unless the scope swallowed its own cancellation.
        assert scope.cancelled_caught
        raise TimeoutError(f"taking back step {step.name!r} did not end within {limit} s")

    async def taken_back(*args: Any, **kwargs: Any) -> object:
        attempt_once = partial(once, args, kwargs)
        trying = attempt_once if retry is None else partial(retry, attempt_once)
        # A thread goes on when the task that waits for it is cancelled: so somebody must wait who
        # is not cancelled.
        return await (call_sheltered(trying) if threaded else trying())

    return taken_back


def _one_thread() -> CapacityLimiter:
    """For an action: its thread has been waited for already, where that could be cancelled."""
    from anyio import CapacityLimiter  # noqa: PLC0415 - few steps need threads

    return CapacityLimiter(1)


def _threads_back() -> CapacityLimiter:
    """For the way back: a number of threads of its own, so that it never waits for the way forward."""
    from anyio import CapacityLimiter  # noqa: PLC0415 - few steps need threads

    try:
        return _limiter_back.get()
    except LookupError:
        limiter = CapacityLimiter(_THREADS_BACK)
        _limiter_back.set(limiter)
        return limiter


async def _in_thread(
    step: Step[..., Any],
    function: Callable[..., object],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    limiter: CapacityLimiter,
) -> object:
    from anyio import to_thread  # noqa: PLC0415 - few steps need threads

    def call() -> list[object]:
        # Boxed: Trio refuses an awaitable from a thread with a message that names neither step nor
        # function.
        return [function(*args, **kwargs)]

    (result,) = await to_thread.run_sync(call, limiter=limiter)
    if is_awaitable(result):
        if isinstance(result, CoroutineType):
            result.close()
        raise TypeError(
            f"step {step.name!r} has blocking=True, but {name_of(function)!r} returned an awaitable; "
            "leave blocking away for async functions"
        )
    return result
