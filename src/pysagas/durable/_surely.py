"""What has to be awaited to its end, though somebody cancels the task that awaits it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio

__all__ = ["surely"]


async def surely(wait: Callable[[], Awaitable[object]]) -> BaseException | None:
    """Waits for what is done elsewhere until that is over, whatever cancels its caller.

    It waits in a task of its own, which a native cancellation of this one (`asyncio.Task.cancel`, which no
    shield keeps away) does not cut off. Where that task is cancelled too, as by who cancels all there are,
    another one waits.

    Args:
        wait: Called again where it was cut off.

    Returns:
        The interruption that came meanwhile, a cancellation or KeyboardInterrupt, for its caller to raise
        when it may. A scope that was cancelled is noticed afterwards.

    Raises:
        BaseException: What the function raised; where an interruption came too, that, with the other as its
            cause.
        GeneratorExit: This coroutine is closed, so that it cannot wait.
        Exception: There is no event loop (any more) in which it could.
    """
    failure: BaseException | None = None
    late: BaseException | None = None
    is_over = is_closed = False

    async def waited(told: anyio.Event) -> None:
        nonlocal failure, late, is_over
        try:
            with anyio.CancelScope(shield=True):
                await wait()
            is_over = True
        except anyio.get_cancelled_exc_class() as error:
            late = error
        except BaseException as error:
            failure = error
            is_over = True
        finally:
            told.set()

    while not is_over:
        told = anyio.Event()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.cancel_scope.shield = True
                tasks.start_soon(waited, told)
                while not told.is_set():
                    try:
                        await told.wait()
                    except GeneratorExit:
                        is_closed = True
                        raise
                    except BaseException as error:
                        # The group cancels itself where its task was cancelled before it had begun.
                        if tasks.cancel_scope.cancel_called:
                            raise
                        late = error
        except BaseException as error:
            # The group may have made something else of it, as it cannot wait for its task either.
            if is_closed:
                raise GeneratorExit from error
            if isinstance(error, GeneratorExit | Exception):
                raise
            late = error
    if failure is None:
        return late
    try:
        if late is None:
            raise failure
        raise late from failure
    finally:
        del failure, late
