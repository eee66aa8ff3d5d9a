"""The contenders: one class each, which says how its users would do the work of a case.

Every contender makes the same calls: `size` actions, and, where the run fails, one failing action
and `size` compensations. What a class returns from `sequence` and `group` does that once, from start
to end; what it does before it returns is prepared, and not measured. None: it cannot do that.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import tarfile
import tempfile
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from anyio import CancelScope, CapacityLimiter, create_task_group
from anyio.lowlevel import checkpoint

import pysagas

ARGUMENT = 0
SEED_VERSION = "0.0.3"

Go = Callable[[], Awaitable[object]]
Action = Callable[[int], Coroutine[Any, Any, int]]
Compensation = Callable[[int], Coroutine[Any, Any, None]]


class Failed(Exception):
    """What the failing action raises."""


@dataclass(frozen=True, slots=True)
class Work:
    """What the contenders call. Actions return their argument."""

    action: Action
    compensation: Compensation
    fail: Compensation


async def _action(argument: int) -> int:
    return argument


async def _compensation(argument: int) -> None:
    pass


async def _fail(argument: int) -> None:
    raise Failed


async def _waiting_action(argument: int) -> int:
    await checkpoint()
    return argument


async def _waiting_compensation(argument: int) -> None:
    await checkpoint()


async def _waiting_fail(argument: int) -> None:
    await checkpoint()
    raise Failed


NO_OP = Work(_action, _compensation, _fail)
ONE_CHECKPOINT = Work(_waiting_action, _waiting_compensation, _waiting_fail)


class Contender:
    """A way to carry out steps and to take them back."""

    name: ClassVar[str]
    loops: ClassVar[tuple[str, ...]] = ("asyncio", "trio")

    def missing(self) -> str | None:
        """Says why it cannot take part here; None where it can."""
        return None

    def sequence(self, work: Work, size: int, *, fails: bool) -> Go | None:
        """Does `size` steps, one after the other."""
        return None

    def group(self, work: Work, size: int, *, fails: bool, limit: int | None = None) -> Go | None:
        """Does `size` steps at the same time, `limit` of them at once."""
        return None


# --- ours ---------------------------------------------------------------------------------------


class PysagasData(Contender):
    """A saga as data, built once, run many times."""

    name = "pysagas, data"

    def sequence(self, work: Work, size: int, *, fails: bool) -> Go:
        definition = self._sequence(work, size, fails)
        return partial(_run, definition)

    def group(self, work: Work, size: int, *, fails: bool, limit: int | None = None) -> Go:
        definition = self._group(work, size, fails, limit)
        return partial(_run, definition)

    @staticmethod
    def _sequence(work: Work, size: int, fails: bool) -> pysagas.Saga[..., None]:
        steps = [pysagas.Step(work.action, work.compensation) for _ in range(size)]
        return pysagas.Saga([*steps, pysagas.Step(work.fail)] if fails else steps)

    @staticmethod
    def _group(work: Work, size: int, fails: bool, limit: int | None) -> pysagas.Saga[..., None]:
        members = [pysagas.Step(work.action, work.compensation) for _ in range(size)]
        together = pysagas.Parallel(*members, limit=limit)
        return pysagas.Saga([together, pysagas.Step(work.fail)] if fails else [together])


class PysagasBuilt(PysagasData):
    """A saga as data, built anew for each run."""

    name = "pysagas, data, built each time"

    def sequence(self, work: Work, size: int, *, fails: bool) -> Go:
        async def go() -> None:
            await _run(self._sequence(work, size, fails))

        return go

    def group(self, work: Work, size: int, *, fails: bool, limit: int | None = None) -> Go:
        async def go() -> None:
            await _run(self._group(work, size, fails, limit))

        return go


class PysagasRepeated(PysagasData):
    """A saga as data that holds one step many times: a million definitions would fill the memory."""

    name = "pysagas, data, one step repeated"

    @staticmethod
    def _sequence(work: Work, size: int, fails: bool) -> pysagas.Saga[..., None]:
        steps = [pysagas.Step(work.action, work.compensation)] * size
        return pysagas.Saga([*steps, pysagas.Step(work.fail)] if fails else steps)


class PysagasFunction(Contender):
    """A saga as a function, which calls its steps on a scope; a group's members are bound anew."""

    name = "pysagas, function"

    def sequence(self, work: Work, size: int, *, fails: bool) -> Go:
        action, compensation, fail = work.action, work.compensation, work.fail

        @pysagas.saga
        async def steps(scope: pysagas.SagaScope, argument: int) -> None:
            for _ in range(size):
                await scope.step(action, argument, compensation=compensation)
            if fails:
                await scope.step(fail, argument)

        return partial(_run, steps)

    def group(self, work: Work, size: int, *, fails: bool, limit: int | None = None) -> Go:
        fail = work.fail
        member = pysagas.Step(work.action, work.compensation)

        @pysagas.saga
        async def members(scope: pysagas.SagaScope, argument: int) -> None:
            await scope.parallel(*(member.bind(argument) for _ in range(size)), limit=limit)
            if fails:
                await scope.step(fail, argument)

        return partial(_run, members)


async def _run(definition: pysagas.Saga[..., None]) -> None:
    try:
        await definition.run(ARGUMENT)
    except Failed:
        pass


# --- by hand ------------------------------------------------------------------------------------


class ExitStack(Contender):
    """The standard library's `AsyncExitStack`: what a careful user reaches for first."""

    name = "AsyncExitStack"

    def sequence(self, work: Work, size: int, *, fails: bool) -> Go:
        action, compensation, fail = work.action, work.compensation, work.fail

        async def go() -> None:
            try:
                async with AsyncExitStack() as stack:
                    for _ in range(size):
                        await action(ARGUMENT)
                        stack.push_async_callback(compensation, ARGUMENT)
                    if fails:
                        await fail(ARGUMENT)
                    stack.pop_all()
            except Failed:
                pass

        return go


class UndoList(Contender):
    """A list of what to call, gone through in a shielded child task: the shortest that is correct."""

    name = "undo list, shielded child"

    def sequence(self, work: Work, size: int, *, fails: bool) -> Go:
        action, compensation, fail = work.action, work.compensation, work.fail

        async def unwind(undo: list[tuple[Compensation, int]]) -> None:
            with CancelScope(shield=True):
                for take_back, argument in reversed(undo):
                    await take_back(argument)

        async def go() -> None:
            undo: list[tuple[Compensation, int]] = []
            try:
                for _ in range(size):
                    await action(ARGUMENT)
                    undo.append((compensation, ARGUMENT))
                if fails:
                    await fail(ARGUMENT)
            except Failed:
                with CancelScope(shield=True):
                    async with create_task_group() as tasks:
                        tasks.start_soon(unwind, undo)

        return go

    def group(self, work: Work, size: int, *, fails: bool, limit: int | None = None) -> Go | None:
        if limit is not None:
            return None
        action, compensation, fail = work.action, work.compensation, work.fail

        async def go() -> None:
            undo: list[tuple[Compensation, int]] = []

            async def member(argument: int) -> None:
                await action(argument)
                undo.append((compensation, argument))

            try:
                async with create_task_group() as tasks:
                    for _ in range(size):
                        tasks.start_soon(member, ARGUMENT)
                if fails:
                    await fail(ARGUMENT)
            except Failed:
                with CancelScope(shield=True):
                    async with create_task_group() as tasks:
                        for take_back, argument in reversed(undo):
                            tasks.start_soon(take_back, argument)

        return go


class BareTaskGroup(Contender):
    """An AnyIO task group for the actions, and another one for the compensations; no bookkeeping."""

    name = "AnyIO task group"

    def group(self, work: Work, size: int, *, fails: bool, limit: int | None = None) -> Go | None:
        if limit is not None:
            return None
        action, compensation, fail = work.action, work.compensation, work.fail

        async def go() -> None:
            try:
                async with create_task_group() as tasks:
                    for _ in range(size):
                        tasks.start_soon(action, ARGUMENT)
                if fails:
                    await fail(ARGUMENT)
            except Failed:
                async with create_task_group() as tasks:
                    for _ in range(size):
                        tasks.start_soon(compensation, ARGUMENT)

        return go


class LimitedTaskGroup(Contender):
    """An AnyIO task group whose tasks wait for a `CapacityLimiter`; no bookkeeping."""

    name = "AnyIO task group, CapacityLimiter"

    def group(self, work: Work, size: int, *, fails: bool, limit: int | None = None) -> Go | None:
        if limit is None:
            return None
        action, compensation, fail = work.action, work.compensation, work.fail

        async def go() -> None:
            limiter = CapacityLimiter(limit)

            async def limited(function: Action | Compensation) -> None:
                async with limiter:
                    await function(ARGUMENT)

            try:
                async with create_task_group() as tasks:
                    for _ in range(size):
                        tasks.start_soon(limited, action)
                if fails:
                    await fail(ARGUMENT)
            except Failed:
                async with create_task_group() as tasks:
                    for _ in range(size):
                        tasks.start_soon(limited, compensation)

        return go


# --- other libraries ----------------------------------------------------------------------------


def _without(distribution: str) -> str | None:
    try:
        version(distribution)
    except PackageNotFoundError:
        return f"{distribution} is not installed"
    return None


def _keep_quiet(logger: str) -> None:
    """Has nothing printed. The library still pays for what it logs, as it would in a program."""
    logging.getLogger(logger).addHandler(logging.NullHandler())


class SimpleSaga(Contender):
    """simple-saga; its compensations get the action's result."""

    name = "simple-saga"

    def missing(self) -> str | None:
        return _without("simple-saga")

    def sequence(self, work: Work, size: int, *, fails: bool) -> Go:
        from simple_saga import Saga  # noqa: PLC0415 - it may not be installed

        _keep_quiet("simple_saga")
        action, compensation, fail = work.action, work.compensation, work.fail

        async def go() -> None:
            try:
                async with Saga() as steps:
                    for _ in range(size):
                        await steps.step(action, compensation, action_args=(ARGUMENT,))
                    if fails:
                        await steps.step(fail, compensation, action_args=(ARGUMENT,))
            except Failed:
                pass

        return go


class Sagah(Contender):
    """Sagah; its functions take no arguments."""

    name = "sagah"

    def missing(self) -> str | None:
        return _without("sagah")

    def sequence(self, work: Work, size: int, *, fails: bool) -> Go:
        from sagah import Saga, SagaFailed  # noqa: PLC0415 - it may not be installed

        _keep_quiet("sagah")
        action, compensation, fail = work.action, work.compensation, work.fail

        async def go() -> None:
            try:
                with Saga() as steps:
                    for _ in range(size):
                        await steps.action(partial(action, ARGUMENT), partial(compensation, ARGUMENT))
                    if fails:
                        await steps.action(partial(fail, ARGUMENT), partial(compensation, ARGUMENT))
            except SagaFailed:
                pass

        return go


class Seed(Contender):
    """pysagas 0.0.3, whose steps all run at the same time. It compensates the failed one as well.

    Its wheel holds no code; the sdist does. The package is called `sagas`, as a part of this project
    is, so it is loaded from the sdist under another name.
    """

    name = f"pysagas {SEED_VERSION}"
    loops = ("asyncio",)

    def __init__(self, sdist: Path | None = None) -> None:
        self._sdist = sdist

    def missing(self) -> str | None:
        if self._sdist is None:
            return f"give its sdist as --seed pysagas-{SEED_VERSION}.tar.gz (see README.md)"
        return None

    def group(self, work: Work, size: int, *, fails: bool, limit: int | None = None) -> Go | None:
        if limit is not None:
            return None
        assert self._sdist is not None
        seed: Any = _load_seed(self._sdist)
        builder = seed.SagaBuilder.create()
        for _ in range(size):
            builder.add_step(work.action, work.compensation)
        if fails:
            builder.add_step(work.fail, _compensation)
        definition = builder.build()

        async def go() -> None:
            await definition.run(ARGUMENT, exceptions=(Failed,))

        return go


def _load_seed(sdist: Path) -> ModuleType:
    name = "sagas_of_the_seed"
    if name not in sys.modules:
        with tempfile.TemporaryDirectory() as folder, tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
            package = Path(folder, f"pysagas-{SEED_VERSION}", "sagas")
            spec = importlib.util.spec_from_file_location(name, package / "__init__.py")
            assert spec is not None
            assert spec.loader is not None
            sys.modules[name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    return sys.modules[name]


def contenders(seed: Path | None = None) -> list[Contender]:
    """All of them; see `Contender.missing`."""
    return [
        ExitStack(),
        BareTaskGroup(),
        LimitedTaskGroup(),
        UndoList(),
        PysagasData(),
        PysagasBuilt(),
        PysagasFunction(),
        SimpleSaga(),
        Sagah(),
        Seed(seed),
    ]
