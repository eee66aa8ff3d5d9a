"""Running what must not be interrupted, on every loop with one spelling.

A lone ``CancelScope(shield=True)`` keeps AnyIO and Trio scopes away, but not ``task.cancel()``: that
raises in whatever the task awaits, shield or not, and the work behind the await is lost. So the
work goes into child tasks that nobody else holds, and the caller only waits for them:

- the group's scope is shielded, so no scope around it reaches the children;
- a cancellation of the waiting task is caught where it waits, *inside* the group: let out, it
  would make the group cancel its children. It is handed back when the work is over;
- a child can still be reached by whoever cancels all tasks there are (the end of ``asyncio.run``).
  One that has begun catches that by itself. One that had not begun is gone without a trace, and
  the group then cancels its own scope: `shelter` returns, and the caller sees that work is left.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

from anyio import Event, create_task_group, get_cancelled_exc_class

from ._errors import give_context, leaves, orders_to_quit, was_closed

__all__ = ["call_sheltered", "shelter", "weightiest"]

T = TypeVar("T")


def weightiest(*errors: BaseException | None) -> BaseException | None:
    """Chooses what goes on: an order to quit before anything else, else the last that is there.

    The last, because a scope swallows its own cancellation: were the first one kept, a native
    cancellation that came after a scope's would be lost with it.
    """
    chosen = None
    for error in errors:
        if orders_to_quit(error):
            return error
        if error is not None:
            chosen = error
    return chosen


async def shelter(work: Callable[[], Awaitable[object]], *, tasks: int = 1) -> BaseException | None:
    """Runs `work` in child tasks that no cancellation of the calling task reaches.

    Args:
        work: Called once in each child. It must not raise: it stores what it has to say.
        tasks: How many children. Where there are several, each has to shield itself too: if one is
            cancelled before its first line, the group cancels the others.

    Returns:
        The interruption that arrived meanwhile (a cancellation, KeyboardInterrupt), for the caller
        to raise when it has done what it must; None where none came. Children that began have
        ended; some may never have begun.
    """
    late: BaseException | None = None
    running = tasks
    all_ended = Event()
    before = sys.exception()

    async def child() -> None:
        nonlocal running
        try:
            await work()
        finally:
            running -= 1
            if not running:
                all_ended.set()

    try:
        async with create_task_group() as group:
            group.cancel_scope.shield = True
            for _ in range(tasks):
                group.start_soon(child)
            while running:
                try:
                    await all_ended.wait()
                except BaseException as error:
                    if isinstance(error, GeneratorExit) or group.cancel_scope.cancel_called:
                        raise
                    late = weightiest(late, error)
    except BaseException as error:
        if was_closed(error, before):
            raise GeneratorExit from error
        late = weightiest(late, *leaves(error))
    finally:
        del before
    return late


async def call_sheltered(function: Callable[[], Awaitable[T]]) -> T:
    """Awaits `function()` to its end, whatever happens to the calling task meanwhile.

    Raises:
        BaseException: What the function raised; or, over that, the interruption that arrived
            meanwhile, with the function's own exception as its context.
    """
    ended: list[T] = []
    failed: list[BaseException] = []

    async def work() -> None:
        try:
            ended.append(await function())
        except BaseException as error:
            failed.append(error)

    late = await shelter(work)
    error = weightiest(*failed, late)
    if error is None:
        if not ended:
            # The child was cancelled before its first line, by somebody who cancelled no other task.
            raise get_cancelled_exc_class()
        return ended[0]
    if failed and error is not failed[0]:
        give_context(error, failed[0])
    try:
        raise error
    finally:
        del error, late
        failed.clear()
