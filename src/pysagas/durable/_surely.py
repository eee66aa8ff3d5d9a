"""What has to be awaited to its end, though somebody cancels the task that awaits it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio

__all__ = ["surely"]


async def surely(work: Callable[[], Awaitable[object]]) -> BaseException | None:
    """Calls a function and waits until it has ended, whatever cancels its caller.

    It runs in a task of its own, which a native cancellation of this one (`asyncio.Task.cancel`, which no
    shield keeps away) does not cut off.

    Returns:
        The cancellation that came meanwhile, for its caller to raise when it may.

    Raises:
        BaseException: What the function raised.
    """
    failure: BaseException | None = None

    async def shielded() -> None:
        nonlocal failure
        try:
            with anyio.CancelScope(shield=True):
                await work()
        except BaseException as error:
            failure = error

    late: BaseException | None = None
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(shielded)
    except anyio.get_cancelled_exc_class() as error:
        late = error
    if failure is not None:
        raise failure
    return late
