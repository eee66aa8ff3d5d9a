"""The primitive under G9: work that no cancellation of the waiting task reaches."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable
from typing import Any

import pytest
import trio
from anyio import CancelScope, Event, create_task_group, get_cancelled_exc_class, sleep_forever
from anyio.lowlevel import checkpoint
from conftest import ASYNCIO
from helpers import AnyIOScope, Boom, Interruption, all_blocked, every_way, never_awaited, rounds

from pysagas._shelter import call_sheltered, shelter, weightiest

pytestmark = pytest.mark.anyio

on_asyncio_only = pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)


BOOM, OTHER, INTERRUPT, EXIT = Boom(), Boom(), KeyboardInterrupt(), SystemExit()


@pytest.mark.parametrize(
    ("errors", "chosen"),
    [
        ((), None),
        ((None, None), None),
        ((BOOM,), BOOM),
        ((BOOM, None), BOOM),
        ((BOOM, OTHER), OTHER),
        ((INTERRUPT, OTHER), INTERRUPT),
        ((BOOM, None, EXIT, OTHER), EXIT),
        ((EXIT, INTERRUPT), EXIT),
    ],
)
def test_weightiest(errors: tuple[BaseException | None, ...], chosen: BaseException | None) -> None:
    """An order to quit goes on before anything else, else the last error that is there."""
    assert weightiest(*errors) is chosen


@pytest.mark.parametrize("tasks", [1, 3])
async def test_undisturbed_work_runs_once_a_child(tasks: int) -> None:
    """The work runs in each child, all at the same time, and nothing is handed back."""
    running, most = 0, 0

    async def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await rounds()
        running -= 1

    assert await shelter(work, tasks=tasks) is None
    assert (running, most) == (0, tasks)


class Held:
    """Work that waits to be let go, and notes that it came to its end."""

    def __init__(self) -> None:
        self.begun, self.go_on = Event(), Event()
        self.ended = 0

    async def __call__(self) -> None:
        self.begun.set()
        await self.go_on.wait()
        await rounds()
        self.ended += 1


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("tasks", [1, 2])
@every_way
async def test_g9_work_goes_on_however_often_the_caller_is_cancelled(
    way: Interruption, tasks: int, times: int
) -> None:
    """The work comes to its end; a native cancellation is handed back then, a scope's is kept away."""
    work = Held()
    returned: list[BaseException | None] = []

    async def caller() -> None:
        returned.append(await shelter(work, tasks=tasks))
        # What a shelter returns is the caller's to raise.
        if returned[0] is not None:
            raise returned[0]

    async def controller(cancel: Any) -> None:
        await work.begun.wait()
        for _ in range(times):
            cancel()
            await all_blocked()
        work.go_on.set()

    await way.run(caller, controller)
    assert work.ended == tasks
    assert [isinstance(late, get_cancelled_exc_class()) for late in returned] == [way.native]


async def test_g9_a_shelter_in_a_scope_that_was_cancelled_before() -> None:
    """It begins and ends as if the scope around it were not there."""
    with CancelScope() as scope:
        scope.cancel()
        work = Held()
        work.go_on.set()
        assert await shelter(work) is None
        assert work.ended == 1
        await checkpoint()
    assert scope.cancelled_caught


@on_asyncio_only
async def test_g9_a_native_cancellation_in_a_shelter_within_a_shelter() -> None:
    """A shelter in a child goes on when that child is cancelled by somebody who cancels all tasks."""
    work = Held()
    child: list[asyncio.Task[Any] | None] = []
    returned = []

    async def outer() -> None:
        child.append(asyncio.current_task())
        returned.append(await shelter(work, tasks=2))

    async with create_task_group() as tasks:
        tasks.start_soon(shelter, outer)
        await work.begun.wait()
        for _ in range(2):
            child[0].cancel()
            await all_blocked()
        work.go_on.set()
    assert work.ended == 2
    assert isinstance(returned[0], asyncio.CancelledError)


@never_awaited
@pytest.mark.parametrize("tasks", [1, 3])
@on_asyncio_only
async def test_g9_children_cancelled_before_their_first_line(tasks: int) -> None:
    """A child that is gone without a trace is not waited for: the caller sees that work is left."""
    begun = []
    known = asyncio.all_tasks()

    def cancel_children() -> None:
        for task in asyncio.all_tasks() - known:
            task.cancel()

    async def work() -> None:
        begun.append("child")

    asyncio.get_running_loop().call_soon(cancel_children)
    await shelter(work, tasks=tasks)
    assert begun == []
    # And then it can be tried again.
    assert await shelter(work, tasks=tasks) is None
    assert begun == ["child"] * tasks
    gc.collect()


@never_awaited
@on_asyncio_only
async def test_g9_caller_and_children_cancelled_before_their_first_line() -> None:
    """The same where the caller is cancelled too: that comes back to him."""
    known = asyncio.all_tasks()
    begun = []

    def cancel_all() -> None:
        for task in asyncio.all_tasks() - known:
            task.cancel()

    async def work() -> None:
        begun.append("child")

    async def caller() -> None:
        asyncio.get_running_loop().call_soon(cancel_all)
        late = await shelter(work)
        while not begun:
            late = weightiest(late, await shelter(work))
        raise late

    task = asyncio.create_task(caller())
    await asyncio.wait([task])
    assert task.cancelled()
    assert begun == ["child"]
    gc.collect()


@on_asyncio_only
async def test_g9_a_child_cancelled_in_its_work(  # noqa: D103
) -> None:
    """Work that lets its own cancellation out ends its child, and the shelter returns."""
    begun = Event()
    child: list[asyncio.Task[Any] | None] = []

    async def work() -> None:
        child.append(asyncio.current_task())
        begun.set()
        await sleep_forever()

    async with create_task_group() as tasks:
        tasks.start_soon(shelter, work)
        await begun.wait()
        child[0].cancel()


class Replacing:
    """Awaits something; the first cancellation that reaches it becomes another exception, as from a signal."""

    def __init__(self, awaitable: Awaitable[object], error: BaseException) -> None:
        self.awaitable = awaitable
        self.error = error

    def __await__(self) -> Any:
        iterator = self.awaitable.__await__()
        yielded = iterator.send(None)
        while True:
            try:
                try:
                    sent = yield yielded
                except asyncio.CancelledError as cancelled:
                    first, self.error = self.error, cancelled
                    yielded = iterator.throw(first)
                else:
                    yielded = iterator.send(sent)
            except StopIteration as stop:
                return stop.value


@pytest.mark.parametrize("order", [KeyboardInterrupt, SystemExit])
@on_asyncio_only
async def test_g9_an_order_to_quit_reaches_the_waiting_task(order: type[BaseException]) -> None:
    """KeyboardInterrupt in the task that waits does not stop the work, and is handed back."""
    work = Held()
    quitting = order()
    returned = []

    async def caller() -> None:
        returned.append(await Replacing(shelter(work), quitting))

    task = asyncio.create_task(caller())
    await work.begun.wait()
    task.cancel()
    await all_blocked()
    work.go_on.set()
    await task
    assert returned == [quitting]
    assert work.ended == 1


@on_asyncio_only
@pytest.mark.parametrize("order", [KeyboardInterrupt, SystemExit])
async def test_g8_g9_an_order_to_quit_goes_over_a_cancellation_that_comes_after_it(
    order: type[BaseException],
) -> None:
    """Of two interruptions of the task that waits, the order to quit is handed back."""
    work = Held()
    quitting = order()
    returned = []

    async def caller() -> None:
        returned.append(await Replacing(shelter(work), quitting))

    task = asyncio.create_task(caller())
    await work.begun.wait()
    for _ in range(2):
        task.cancel()
        await all_blocked()
    work.go_on.set()
    await task
    assert returned == [quitting]


async def test_call_sheltered_gives_the_result() -> None:
    """Undisturbed, it is as awaiting the function."""

    async def function() -> str:
        await rounds()
        return "result"

    assert await call_sheltered(function) == "result"


async def test_call_sheltered_raises_what_the_function_raised() -> None:
    """The function's exception comes out as it is, wrapped in no group."""
    boom = Boom()

    async def function() -> None:
        await rounds()
        raise boom

    with pytest.raises(Boom) as caught:
        await call_sheltered(function)
    assert caught.value is boom


@pytest.mark.parametrize("error", [None, Boom(), SystemExit()], ids=repr)
@on_asyncio_only
async def test_g6_call_sheltered_raises_a_late_cancellation(error: BaseException | None) -> None:
    """A cancellation goes over the function's failure, which is its context; not over an order to quit."""
    work = Held()
    raised: list[BaseException] = []

    async def function() -> None:
        await work()
        if error is not None:
            raise error

    async def caller() -> None:
        try:
            await call_sheltered(function)
        except BaseException as caught:
            raised.append(caught)

    task = asyncio.create_task(caller())
    await work.begun.wait()
    task.cancel()
    await all_blocked()
    work.go_on.set()
    await task
    assert work.ended == 1
    if isinstance(error, SystemExit):
        assert raised == [error]
    else:
        assert isinstance(raised[0], asyncio.CancelledError)
        assert raised[0].__context__ is error


@never_awaited
@on_asyncio_only
async def test_call_sheltered_whose_child_is_gone_before_its_first_line() -> None:
    """Where somebody cancels just the child, the caller is told that the call was cancelled."""
    known = asyncio.all_tasks()

    def cancel_child() -> None:
        (task,) = asyncio.all_tasks() - known
        task.cancel()

    async def function() -> None:
        raise AssertionError("it must not be called")  # pragma: no cover - must not be reached

    asyncio.get_running_loop().call_soon(cancel_child)
    with pytest.raises(asyncio.CancelledError):
        await call_sheltered(function)
    gc.collect()


def test_trio_keeps_a_native_scope_away() -> None:
    """A plain Trio program with Trio's own scopes is served as well."""
    ended = []

    async def work() -> None:
        await trio.sleep(0)
        ended.append("work")

    async def main() -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            assert await shelter(work) is None
            ended.append("shelter")
            await trio.lowlevel.checkpoint()
        assert scope.cancelled_caught

    trio.run(main)
    assert ended == ["work", "shelter"]


def test_the_ways_to_interrupt_do_interrupt() -> None:
    """The tests' own helper: unsheltered work is cut off (a test that cannot fail is a defect)."""
    work_ended = []

    async def main() -> None:
        async def work() -> None:
            await trio.sleep_forever()
            work_ended.append("work")  # pragma: no cover - must not be reached

        async def controller(cancel: Any) -> None:
            cancel()

        await AnyIOScope().run(work, controller)

    trio.run(main)
    assert work_ended == []
