"""What the engine's tests share: a ledger of effects, shapes of sagas, and ways to interrupt them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import trio
from anyio import (
    CancelScope,
    Event,
    create_task_group,
    fail_after,
    get_cancelled_exc_class,
    wait_all_tasks_blocked,
)
from anyio.lowlevel import checkpoint
from conftest import ASYNCIO, BACKENDS

from pysagas import Outcome, Parallel, Saga, SagaScope, Step, open_saga, saga

Script = Callable[[], Awaitable[object]] | BaseException | None

# Of a task that is cancelled before its first line asyncio throws away what it was to run, and so does AnyIO:
# which is said when it is collected.
never_awaited = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")

TRIO = [parameter for parameter in BACKENDS if parameter.values[0][0] == "trio"]


class Boom(Exception):
    """What an action raises."""


class Crash(Exception):
    """What a compensation raises."""


# --- the ledger ---------------------------------------------------------------------------------


class World:
    """A ledger of effects.

    `log` holds the name of each effect as it is made, and ``-name`` as it is taken back; `done` what
    was made and not taken back. What should not be is kept in `problems`, since an assertion that
    failed in a compensation would be one more failed compensation: an effect made twice, taken
    back twice, taken back before a later one, or while another is being taken back.

    `lane` exempts members of a group from the order among themselves: ``"group.member"``, and
    ``"outer.1/inner.2"`` for a group in a group.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.done: list[str] = []
        self.problems: list[str] = []
        # Beginnings, forward and back (as ``-name``), in their order.
        self.order: list[str] = []
        # Where steps wait to be interrupted: see `interrupted`.
        self.moments: tuple[str, ...] = ()
        # What may be left as it is while earlier effects are taken back: its saga was told to stop.
        self.left: set[str] = set()
        self._begun: defaultdict[str, Event] = defaultdict(Event)
        self._released: defaultdict[str, Event] = defaultdict(Event)
        self._lanes: dict[str, str] = {}
        self._clock = 0
        self._times: dict[str, int] = {}
        self._going_back: list[str] = []

    def begun(self, moment: str) -> Event:
        """Set when the step of this name begins; for ``-name``, when its compensation does."""
        return self._begun[moment]

    def release(self, moment: str) -> None:
        """Lets the step that waits at this moment go on."""
        self._released[moment].set()

    def _tick(self, what: str) -> None:
        self._clock += 1
        self._times[what] = self._clock

    def _together(self, one: str, other: str) -> bool:
        lanes = zip(self._lanes[one].split("/"), self._lanes[other].split("/"), strict=False)
        for mine, its in lanes:
            group, _, member = mine.partition(".")
            other_group, _, other_member = its.partition(".")
            if group != other_group or not group:
                return False
            if member != other_member:
                return True
        return False

    async def _wait(self, moment: str) -> None:
        self.order.append(moment)
        self._begun[moment].set()
        if moment in self.moments:
            await self._released[moment].wait()

    async def act(self, name: str, before: Script = None, after: Script = None) -> str:
        if name in self._times:
            self.problems.append(f"{name} was begun twice")
        self._tick(name)
        await self._wait(name)
        await play(before)
        self.log.append(name)
        self.done.append(name)
        self._tick(f"{name} done")
        await play(after)
        return f"result of {name}"

    async def take_back(self, name: str, script: Script = None) -> None:
        back = f"-{name}"
        if name not in self._times:
            self.problems.append(f"{name} was taken back, and had never begun")
        if back in self._times:
            self.problems.append(f"{name} was taken back twice")
        mine = self._times.get(f"{name} done", self._times.get(name, 0))
        for other in self.done:
            if (
                self._times[other] > mine
                and f"-{other}" not in self._times
                and other not in self.left
                and not self._together(name, other)
            ):
                self.problems.append(f"{name} was taken back before {other}")
        for other in self._going_back:
            if not self._together(name, other):
                self.problems.append(f"{name} was taken back at the same time as {other}")
        self._tick(back)
        self._going_back.append(name)
        try:
            await self._wait(back)
            await play(script if script is not None else rounds)
            self.log.append(back)
            if name in self.done:
                self.done.remove(name)
        finally:
            self._going_back.remove(name)

    def functions(
        self,
        name: str,
        *,
        before: Script = None,
        after: Script = None,
        back: Script = None,
        lane: str = "",
    ) -> tuple[Callable[..., Awaitable[str]], Callable[..., Awaitable[None]]]:
        """An action and what takes it back.

        Args:
            name: Of the effect.
            before: Awaited, or raised, by the action before its effect.
            after: The same after it.
            back: The same by the compensation, before it takes the effect back.
            lane: See the class.
        """
        self._lanes[name] = lane

        async def action(*args: object) -> str:
            return await self.act(name, before, after)

        async def compensation(*args: object) -> None:
            await self.take_back(name, back)

        action.__name__ = action.__qualname__ = name
        return action, compensation

    def step(self, name: str, **how: Any) -> Step[..., str]:
        """A step with a compensation; options that `functions` does not know are the step's own."""
        known = {key: how.pop(key) for key in ("before", "after", "back", "lane") if key in how}
        action, compensation = self.functions(name, **known)
        return Step(action, compensation, name=name, **how)

    def member(self, name: str, group: str = "group", **how: Any) -> Step[..., str]:
        """A step that is a member of a group."""
        return self.step(name, lane=f"{group}.{name}", **how)


def checked_world() -> Iterator[World]:
    """The body of the fixture ``world``: what the ledger found wrong fails the test."""
    world = World()
    yield world
    assert world.problems == []


# --- what steps do ------------------------------------------------------------------------------


async def play(script: Script) -> None:
    if isinstance(script, BaseException):
        raise script
    if script is not None:
        await script()


async def rounds() -> None:
    """A few checkpoints: what is cut off at one of them does not go unnoticed."""
    for _ in range(3):
        await checkpoint()


async def nothing() -> None:
    """For a compensation without a checkpoint."""


def states(outcome: Outcome[Any] | None) -> dict[str, str]:
    """The state of each step, by name."""
    assert outcome is not None
    return {report.name: report.state.name for report in outcome.steps}


def leaf_errors(error: BaseException) -> list[BaseException]:
    """The exceptions in a group, at any depth."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in leaf_errors(part)]
    return [error]


def on_asyncio() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


# --- shapes -------------------------------------------------------------------------------------


async def as_data(*parts: Any, **options: Any) -> Any:
    await Saga(parts, **options)()


async def as_function(*parts: Any, **options: Any) -> Any:
    @saga(**options)
    async def function(scope: SagaScope) -> None:
        for part in parts:
            await scope.step(part)

    await function()


async def as_block(*parts: Any, **options: Any) -> Any:
    async with open_saga(**options) as scope:
        for part in parts:
            await scope.step(part)


async def as_save_point(*parts: Any, **options: Any) -> Any:
    async with open_saga(**options) as scope, scope.nested() as nested:
        for part in parts:
            await nested.step(part)


async def as_inner_saga(*parts: Any, **options: Any) -> Any:
    await Saga([Saga(parts)], **options)()


async def in_a_group(*parts: Any, **options: Any) -> Any:
    await Saga([Parallel(Saga(parts))], **options)()


async def in_a_limited_group(*parts: Any, **options: Any) -> Any:
    quick = Step(nothing, nothing)
    await Saga([Parallel(quick, Saga(parts), limit=1)], **options)()


async def with_middleware(*parts: Any, **options: Any) -> Any:
    async def middleware(effect: Any, call_next: Any) -> object:
        return await call_next()

    await Saga(parts, middleware=[middleware], **options)()


SEQUENCES = [
    as_data,
    as_function,
    as_block,
    as_save_point,
    as_inner_saga,
    with_middleware,
]
"""Ways to carry out parts one after the other, whose exceptions come out as they are."""

GROUPED = [in_a_group, in_a_limited_group]
"""The same in a member of a group, whose failures come out in an ExceptionGroup."""


# --- interruptions ------------------------------------------------------------------------------


async def all_blocked() -> None:
    """Returns when every other task waits for something.

    AnyIO's own does this on asyncio by sleeping 0.1 s a time.
    """
    if not on_asyncio():
        await wait_all_tasks_blocked()
        return
    this = asyncio.current_task()
    quiet = 0
    for _ in range(10_000):
        await asyncio.sleep(0)
        waiters = [task._fut_waiter for task in asyncio.all_tasks() if task is not this]
        quiet = 0 if any(waiter is None or waiter.done() for waiter in waiters) else quiet + 1
        if quiet == 3:
            return
    raise AssertionError("some task never waits")  # pragma: no cover


class Interruption:
    """A way to cancel work."""

    # Natively: a cancellation is an event of the task, not the state of a scope around it.
    native = False

    async def run(self, work: Callable[[], Awaitable[object]], controller: Any) -> None:
        """Awaits `work()` while ``controller(cancel)`` runs beside it."""
        raise NotImplementedError  # pragma: no cover - abstract


class AnyIOScope(Interruption):
    scope_type: Any = CancelScope

    async def run(self, work: Callable[[], Awaitable[object]], controller: Any) -> None:
        async with create_task_group() as tasks:
            with self.scope_type() as scope:
                tasks.start_soon(controller, scope.cancel)
                await work()


class TrioScope(AnyIOScope):
    scope_type = trio.CancelScope


class TaskCancel(Interruption):
    native = True

    async def run(self, work: Callable[[], Awaitable[object]], controller: Any) -> None:
        calls = 0

        def cancel() -> None:
            nonlocal calls
            calls += task.cancel()

        ended: list[str] = []

        async def noting() -> None:
            try:
                await work()
                ended.append("returned")
            except asyncio.CancelledError:
                ended.append("cancelled")
                raise

        task = asyncio.create_task(noting())
        await controller(cancel)
        await asyncio.wait([task])
        # Whatever the engine caught meanwhile, nothing was taken off the task's count.
        assert task.cancelling() == calls
        assert task.cancelled() == (ended == ["cancelled"])


class AsyncioTimeout(Interruption):
    native = True

    async def run(self, work: Callable[[], Awaitable[object]], controller: Any) -> None:
        expired = False

        async def limited() -> None:
            nonlocal limit
            async with asyncio.timeout(None) as limit:
                entered.set()
                await work()

        def cancel() -> None:
            # It cancels but once.
            if limit is not None and not expired:
                limit.reschedule(asyncio.get_running_loop().time())

        limit: asyncio.Timeout | None = None
        entered = asyncio.Event()
        task = asyncio.create_task(limited())
        await entered.wait()

        def cancel_once() -> None:
            nonlocal expired
            cancel()
            expired = True

        await controller(cancel_once)
        await asyncio.wait([task])
        task.exception()


WAYS = [
    *(
        pytest.param(*parameter.values, AnyIOScope(), id=f"anyio_scope-{parameter.id}")
        for parameter in BACKENDS
    ),
    *(
        pytest.param(*parameter.values, TrioScope(), id=f"trio_scope-{parameter.id}")
        for parameter in TRIO
    ),
    *(
        pytest.param(*parameter.values, TaskCancel(), id=f"task_cancel-{parameter.id}")
        for parameter in ASYNCIO
    ),
]
"""Parameters ``anyio_backend, way`` (the first one indirect): each way to cancel, on each loop."""

every_way = pytest.mark.parametrize(("anyio_backend", "way"), WAYS, indirect=["anyio_backend"])


async def interrupted(
    way: Interruption,
    world: World,
    moments: str,
    work: Callable[[], Awaitable[object]],
) -> BaseException | None:
    """Carries out `work`, and interrupts it at each of the moments.

    Args:
        way: How.
        world: Whose steps wait at the moments until they have been interrupted there.
        moments: Names of steps, ``-name`` for their compensations, with spaces between. One that
            stands there twice is interrupted twice.
        work: What to carry out.

    Returns:
        What `work` raised.
    """
    listed = tuple(moments.split())
    world.moments = listed
    raised: list[BaseException] = []

    async def watched() -> None:
        try:
            await work()
        except get_cancelled_exc_class() as error:
            raised.append(error)
            raise
        except BaseException as error:
            raised.append(error)

    async def controller(cancel: Callable[[], object]) -> None:
        for index, moment in enumerate(listed):
            with fail_after(2):
                await world.begun(moment).wait()
            cancel()
            await all_blocked()
            if moment not in listed[index + 1 :]:
                world.release(moment)

    await way.run(watched, controller)
    return raised[0] if raised else None


def cancel_other_tasks(*, but: tuple[asyncio.Task[Any] | None, ...] = ()) -> None:
    """Cancels all tasks there are, as the end of ``asyncio.run`` does."""
    for task in asyncio.all_tasks():
        if task not in but:
            task.cancel()
