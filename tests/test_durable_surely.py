"""What is waited for to its end: whatever comes meanwhile is told afterwards, and nothing is lost of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

import anyio
import pytest
from anyio import wait_all_tasks_blocked
from conftest import ASYNCIO
from helpers import cancel_other_tasks, never_awaited

from pysagas.durable._surely import surely

pytestmark = [pytest.mark.anyio, never_awaited, pytest.mark.usefixtures("collected")]

on_asyncio_only = pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)


class Work:
    """What is done elsewhere, and how often it was waited for."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.over = anyio.Event()
        self.waits = 0
        self.failure = failure

    async def wait(self) -> None:
        self.waits += 1
        await self.over.wait()
        if self.failure is not None:
            raise self.failure


@pytest.mark.parametrize("failure", [None, ValueError("no")])
async def test_what_nobody_cuts_off_ends_as_it_ends(failure):
    """Without an interruption there is none to tell, and a failure goes on as it is."""
    work = Work(failure)
    work.over.set()
    if failure is None:
        assert await surely(work.wait) is None
    else:
        with pytest.raises(ValueError) as info:
            await surely(work.wait)
        assert info.value is failure


@pytest.mark.parametrize("failure", [None, ValueError("no")])
@on_asyncio_only
async def test_what_is_cut_off_again_and_again_is_waited_for(failure):
    """Native cancellations do not reach who waits; the last is told, with a failure as its cause."""
    work = Work(failure)
    waiting = asyncio.ensure_future(surely(work.wait))
    for _ in range(3):
        await wait_all_tasks_blocked()
        waiting.cancel()
    await wait_all_tasks_blocked()
    assert not waiting.done()
    work.over.set()
    if failure is None:
        assert isinstance(await waiting, asyncio.CancelledError)
    else:
        with pytest.raises(asyncio.CancelledError) as info:
            await waiting
        assert info.value.__cause__ is failure
    assert work.waits == 1


@on_asyncio_only
async def test_what_is_cut_off_by_who_cancels_all_there_are_is_waited_for_anew():
    """Where the task that waits is cancelled too, another one does."""
    work = Work()
    others = asyncio.all_tasks()
    waiting = asyncio.ensure_future(surely(work.wait))
    for _ in range(2):
        await wait_all_tasks_blocked()
        cancel_other_tasks(but=tuple(others))
    await wait_all_tasks_blocked()
    assert not waiting.done()
    work.over.set()

    assert isinstance(await waiting, asyncio.CancelledError)
    assert work.waits > 1  # one may have been cancelled before it had begun


@on_asyncio_only
async def test_what_is_cut_off_before_it_has_begun_is_begun():
    """A task that is cancelled before its first line leaves no trace; another one is made."""
    work = Work()
    work.over.set()
    others = asyncio.all_tasks()
    waiting = asyncio.ensure_future(surely(work.wait))
    await asyncio.sleep(0)
    (waiter,) = asyncio.all_tasks() - others - {waiting}
    waiter.cancel()
    late = await waiting

    has_begun = work.waits > 1  # an eager one had
    assert isinstance(late, asyncio.CancelledError) if has_begun else late is None


@on_asyncio_only
async def test_what_comes_in_the_moment_of_the_end_is_told():
    """A native cancellation that comes when nothing is left to wait for is not lost."""
    loop = asyncio.get_running_loop()

    async def wait() -> None:
        # So that it comes behind the two that the end of this wakes.
        loop.call_soon(lambda: loop.call_soon(waiting.cancel))

    waiting = asyncio.ensure_future(surely(wait))
    # An eager task is over before that comes.
    expected = type(None) if waiting.done() else asyncio.CancelledError

    assert type(await waiting) is expected


@on_asyncio_only
async def test_one_that_is_closed_ends():
    """Nobody can wait in a coroutine that is closed; what it waited for goes on without it."""
    work = Work()
    waiting = surely(work.wait)
    waiting.send(None)
    await wait_all_tasks_blocked()
    with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
        waiting.close()  # a task group does not let go of its tasks at once
    waiting.close()
    work.over.set()
    await wait_all_tasks_blocked()

    assert work.waits == 1


def test_without_an_event_loop_nothing_is_waited_for():
    """A coroutine that the garbage collector resumes when its event loop has ended does not try for ever."""
    with pytest.raises(anyio.NoEventLoopError):
        surely(Work.wait).send(None)


async def test_a_scope_that_is_cancelled_is_noticed_afterwards():
    """A cancelled scope cuts nothing off, and what waits has nothing to tell of it."""
    work = Work()
    told: list[object] = []

    async def call() -> None:
        told.append(await surely(work.wait))
        await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call)
        await wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await wait_all_tasks_blocked()
            work.over.set()
    assert told == [None]


async def test_a_keyboard_interrupt_is_told_afterwards(monkeypatch):
    """It comes out as it is, in no group, when what was waited for is over."""
    work = Work()
    event = anyio.Event

    class Rude:
        """An event whose waiter is interrupted once."""

        def __init__(self) -> None:
            self.event = event()
            self.set: Callable[[], None] = self.event.set
            self.is_set: Callable[[], bool] = self.event.is_set

        async def wait(self) -> None:
            if not work.over.is_set():
                work.over.set()
                raise KeyboardInterrupt
            await self.event.wait()

    monkeypatch.setattr(anyio, "Event", Rude)
    late = await surely(partial(work.wait))

    assert isinstance(late, KeyboardInterrupt)
    assert work.waits == 1
