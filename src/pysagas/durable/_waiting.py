"""How a task waits for a batch of the writer, on each event loop, and is woken.

What this must not know: what is in a batch.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

import anyio

if TYPE_CHECKING:
    from ._batch import Batch, Job

__all__ = ["OnAsyncio", "OnTrio"]


class OnAsyncio:
    """How a task waits for a batch on asyncio: for a future, with nothing around it.

    Each step of each run waits once; with `anyio.Event` that was a tenth of what a step costs.
    """

    __slots__ = ("_here", "_loop", "call_soon")

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        self._here: Callable[[], object] = import_module("asyncio").get_running_loop
        self.call_soon: Callable[..., object] = loop.call_soon_threadsafe

    def is_here(self) -> bool:
        return self._here() is self._loop

    def wait(self, batch: Batch, what: int | Job[Any, Any]) -> Awaitable[None]:
        future = self._loop.create_future()
        batch.waiting[future] = what
        return cast("Awaitable[None]", future)

    async def wait_shielded(self, batch: Batch, what: int | Job[Any, Any]) -> None:
        with anyio.CancelScope(shield=True):
            await self.wait(batch, what)

    def wake(self, future: Any, error: BaseException | None) -> None:
        if future.done():
            pass  # its task was cancelled
        elif error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


class _Woken:
    """What a task on Trio gets that is woken for no other reason than that it may go on.

    It stands for ``outcome.Value(None)``, which Trio would make anew for each: for it notes that it has been
    used, and that takes longer than all else that it is to wake a task.
    """

    __slots__ = ()

    def unwrap(self) -> None:
        pass


_WOKEN = _Woken()


class OnTrio:
    """The same on Trio: what waits is the task. One that refuses to be cancelled needs no scope."""

    __slots__ = ("_lowlevel", "_token", "call_soon", "wait", "wait_shielded")

    def __init__(self, token: Any) -> None:
        self._token = token
        self._lowlevel = lowlevel = import_module("trio.lowlevel")
        self.call_soon: Callable[..., object] = token.run_sync_soon
        # A KeyboardInterrupt after the task is noted down, and before it waits, would have it woken where it
        # waits for something else.
        protected: Callable[[Callable[..., Any]], Callable[..., Awaitable[None]]]
        protected = lowlevel.enable_ki_protection
        self.wait, self.wait_shielded = protected(self._wait), protected(self._wait_shielded)

    def is_here(self) -> bool:
        return self._lowlevel.current_trio_token() is self._token

    async def _wait(self, batch: Batch, what: int | Job[Any, Any]) -> None:
        lowlevel = self._lowlevel
        task = lowlevel.current_task()
        batch.waiting[task] = what
        await lowlevel.wait_task_rescheduled(partial(self._cancelled, batch, task))

    def _cancelled(self, batch: Batch, task: object, _: object) -> Any:
        waits_for: Batch | None = batch
        while waits_for is not None and waits_for.waiting.pop(task, None) is None:
            waits_for = waits_for.rest
        return self._lowlevel.Abort.SUCCEEDED

    async def _wait_shielded(self, batch: Batch, what: int | Job[Any, Any]) -> None:
        lowlevel = self._lowlevel
        batch.waiting[lowlevel.current_task()] = what
        await lowlevel.wait_task_rescheduled(self._not_cancelled)

    def _not_cancelled(self, _: object) -> Any:
        return self._lowlevel.Abort.FAILED

    def wake(self, task: Any, error: BaseException | None) -> None:
        woken = _WOKEN if error is None else import_module("outcome").Error(error)
        self._lowlevel.reschedule(task, woken)
