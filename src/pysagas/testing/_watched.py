"""A saga whose every action and compensation can be watched, and made to go wrong.

Faults have to happen where the user's own function is called: what a middleware raises around it is
the failure of a step that never started, or of one that has completed, and it is the steps in
doubt that go wrong in practice. So the definitions are rebuilt with each function wrapped; for a
saga as a function, the scope that it is given does so at each call. All else stays as it was: the
engine runs the same tree with the same options.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from contextvars import ContextVar
from functools import partial
from inspect import CORO_CREATED, getcoroutinestate, isawaitable, iscoroutinefunction, signature
from types import TracebackType
from typing import Any, Protocol, cast

from pysagas import (
    Bound,
    CallNext,
    Effect,
    Parallel,
    Saga,
    SagaDefinitionError,
    SagaScope,
    Step,
    current_effect,
    saga,
)

from ._faults import CannotExplore, Place

__all__ = ["Watcher", "current_watcher", "watched"]

Function = Callable[..., Any]
# A call on a scope, in words.
_Call = tuple[str, Coroutine[Any, Any, Any]]

OPTIONS = {*signature(Step).parameters}


class Watcher(Protocol):
    """Who watches one process. Each method may raise: that is the fault."""

    @property
    def killed(self) -> Killed | None:
        """What stands for the end of the process, once that has come."""
        ...

    def check(self) -> None:
        """Raises that."""
        ...

    def enter(self, place: Place) -> None:
        """A function is about to be called."""
        ...

    def checkpoint(self, place: Place) -> None:
        """It is about to wait."""
        ...

    def done(self, place: Place) -> bool:
        """It has returned; tells whether it is to be called again."""
        ...

    def under_way(self, what: Effect | Place) -> AbstractContextManager[object]:
        """Lets what runs here be cut off."""
        ...

    async def freeze(self) -> None:
        """Keeps what runs here as it is, until all has been looked at."""
        ...

    async def around(self, effect: Effect, call_next: CallNext) -> object:
        """The innermost middleware of the saga."""
        ...


class Killed(BaseException):
    """Ends what is left of a process that was killed, or cut off."""


# Of the process that is under way: the rebuilt definitions are used for many. Worker threads and
# child tasks see it too.
current_watcher: ContextVar[Watcher] = ContextVar("pysagas_watcher")


async def _around(effect: Effect, call_next: CallNext) -> object:
    return await current_watcher.get().around(effect, call_next)


def watched(original: Saga[..., Any]) -> Saga[..., Any]:
    """Rebuilds a saga, so that `current_watcher` sees and changes how it runs."""
    return _Rebuilding().saga(original, (_around,))


class _Watching(Awaitable[Any]):
    """Awaits what a function returned; whenever that waits, the watcher is told first."""

    __slots__ = ("_awaitable", "_place")

    def __init__(self, awaitable: Awaitable[Any], place: Place) -> None:
        self._awaitable = awaitable
        self._place = place

    def __await__(self) -> Generator[Any, Any, Any]:
        watcher = current_watcher.get()
        inner = self._awaitable.__await__()
        try:
            yielded = inner.send(None)
            while True:
                watcher.checkpoint(self._place)
                sent: Any = None
                error: BaseException | None = None
                try:
                    sent = yield yielded
                except BaseException as raised:
                    error = raised
                if watcher.killed is not None:
                    # Does not come to its `finally`; and what it waited for has to let go of it later.
                    yield from watcher.freeze().__await__()
                yielded = inner.send(sent) if error is None else inner.throw(error)
        except StopIteration as stop:
            return stop.value


class _Rebuilding:
    """Rebuilds the definitions of one saga; the same one is rebuilt once."""

    def __init__(self) -> None:
        # By identity, with the original so that its identity stays its own.
        self._known: dict[int, tuple[object, Any]] = {}

    def part(self, original: Any) -> Any:
        """Rebuilds what a saga can be made of; gives anything else as it is."""
        if isinstance(original, Bound):
            bound = cast("Bound[Any]", original)  # type: ignore[redundant-cast]  # for pyright
            return self.part(bound.definition).bind(*bound.args, **bound.kwargs)
        known = self._known.get(id(original))
        if known is None:
            known = (original, self._rebuild(original))
            if known[1] is not original:
                self._known[id(original)] = known
        return known[1]

    def _rebuild(self, original: Any) -> Any:
        rebuilders: dict[Any, Callable[[Any], Any]] = {
            Step: self.step,
            Parallel: self._group,
            Saga: self.saga,
        }
        for kind, rebuild in rebuilders.items():
            if isinstance(original, kind):
                return rebuild(original)
        return original

    def _group(self, group: Parallel) -> Parallel:
        return Parallel(
            *map(self.part, group.parts),
            name=group.name,
            limit=group.limit,
            on_failure=group.on_failure,
        )

    def saga(self, original: Saga[..., Any], around: tuple[Any, ...] = ()) -> Saga[..., Any]:
        options: dict[str, Any] = {
            "name": original.name,
            "exceptions": original.exceptions,
            "rollback_timeout": original.rollback_timeout,
            "on_compensation_failure": original.on_compensation_failure,
            # Innermost, so that what ends the run there is a failure for the saga's own.
            "middleware": (*original.middleware, *around),
            "version": original.version,
        }
        function = original.function
        if function is None:
            return Saga(map(self.part, original.parts), **options)

        async def run(scope: SagaScope, *args: Any, **kwargs: Any) -> Any:
            seen = _Scope(scope, self, [])
            result = await function(seen, *args, **kwargs)
            seen.check_awaited(original.name)
            return result

        rebuilt: Saga[..., Any] = saga(**options)(run)
        return rebuilt

    def step(self, step: Step[..., Any]) -> Step[..., Any]:
        return Step(
            self.function(step.action, "action", step.name, step.retry, step.not_applied),
            self.function(step.compensation, "compensation", step.name, step.compensation_retry),
            undo=self.function(step.undo, "compensation", step.name, step.compensation_retry),
            name=step.name if step.explicit_name else None,
            not_applied=step.not_applied,
            timeout=step.timeout,
            retry=step.retry,
            compensation_timeout=step.compensation_timeout,
            compensation_retry=step.compensation_retry,
            shield=step.shield,
            blocking=step.blocking,
        )

    def function(
        self,
        original: Function | None,
        kind: Any,
        name: str,
        retry: object = None,
        declared: tuple[type[Exception], ...] = (),
    ) -> Any:
        """Wraps an action, a compensation or an undo; sync or async as it is."""
        if original is None:
            return None
        function = original

        def here() -> Place:
            effect = current_effect()
            assert effect is not None
            return Place(kind, effect.path, effect.name, retry is not None, declared)

        async def to_its_end(value: Any, place: Place, args: Any, kwargs: Any) -> Any:
            watcher = current_watcher.get()
            while True:
                with watcher.under_way(place):
                    result = await _Watching(value, place)
                if not watcher.done(place):
                    return result
                value = function(*args, **kwargs)

        def call(*args: Any, **kwargs: Any) -> Any:
            watcher, place = current_watcher.get(), here()
            watcher.enter(place)
            while True:
                result = function(*args, **kwargs)
                if isawaitable(result):
                    return to_its_end(result, place, args, kwargs)
                if not watcher.done(place):
                    return result

        async def call_async(*args: Any, **kwargs: Any) -> Any:
            place = here()
            current_watcher.get().enter(place)
            return await to_its_end(function(*args, **kwargs), place, args, kwargs)

        wrapper = call_async if _is_async(function) else call
        # Not update_wrapper: of what it copies, only these matter, and they may be of any type.
        wrapper.__dict__["__wrapped__"] = function
        wrapper.__name__ = name
        return wrapper


def _is_async(function: Function) -> bool:
    return iscoroutinefunction(function) or iscoroutinefunction(
        getattr(type(function), "__call__", None)  # noqa: B004 - the method itself is wanted
    )


def _name_of(function: Any) -> str:
    while isinstance(function, partial):
        function = cast("Any", function.func)
    return str(getattr(function, "__name__", type(function).__name__))


class _Scope(SagaScope):
    """A scope that hands each call on to the real one, rebuilt."""

    __slots__ = ("_calls", "_real", "_rebuilding")

    def __init__(self, real: SagaScope, rebuilding: _Rebuilding, calls: list[_Call]) -> None:
        # Those on nested scopes as well.
        self._calls = calls
        self._real = real
        self._rebuilding = rebuilding
        self.outcome = None

    def __repr__(self) -> str:
        return repr(self._real)

    def check_awaited(self, saga: str) -> None:
        """Refuses a function that has ended without having awaited all that it called.

        Raises:
            CannotExplore: It did not; nothing has run of such a call.
        """
        forgotten = [
            (what, call) for what, call in self._calls if getcoroutinestate(call) == CORO_CREATED
        ]
        for _, call in forgotten:
            call.close()
        for what, _ in forgotten:
            raise CannotExplore(
                f"saga {saga!r} calls {what}, and never awaits it, so nothing of it is done; write "
                "`await` before it"
            )

    def _called(self, what: str, call: Coroutine[Any, Any, Any]) -> Coroutine[Any, Any, Any]:
        self._calls.append((what, call))
        return call

    def step(self, action: Any, /, *args: Any, **options: Any) -> Any:  # type: ignore[override]
        part = getattr(action, "definition", action)
        name = options.get("name") or getattr(part, "name", None) or _name_of(part)
        return self._called(f"scope.step of {name!r}", self._step(action, *args, **options))

    async def _step(self, action: Any, /, *args: Any, **options: Any) -> Any:
        real = cast("Any", self._real)
        # An option that there is not is the engine's to refuse, like a definition with options.
        if not callable(action) or isinstance(action, Saga) or not options.keys() <= OPTIONS:
            return await real.step(self._rebuilding.part(action), *args, **options)
        compensation = options.pop("compensation", None)
        undo = options.pop("undo", None)
        # Of the functions as they are given, so that what the engine refuses is refused.
        step: Step[..., Any] = Step(action, compensation, undo=undo, **options)
        step.check_call(args, {}, "scope.step: {}")
        return await real.step(self._rebuilding.step(step), *args)

    def parallel(self, *members: Any, **options: Any) -> Any:
        return self._called("scope.parallel", self._parallel(*members, **options))

    async def _parallel(self, *members: Any, **options: Any) -> Any:
        real = cast("Any", self._real)
        return await real.parallel(*map(self._rebuilding.part, members), **options)

    def nested(self) -> AbstractAsyncContextManager[SagaScope]:
        return _Nested(self._real.nested(), self._rebuilding, self._calls)

    def commit(self) -> Any:
        return self._called("scope.commit", self._real.commit())

    def on_rollback(self, function: Any, *args: Any) -> None:  # type: ignore[override]
        wrapped = self._rebuilding.function(function, "compensation", _name_of(function))
        try:
            Step(function).check_call(args, {}, "on_rollback: {}")
        except (SagaDefinitionError, TypeError):
            wrapped = function  # for the engine to refuse: what wraps it takes anything
        self._real.on_rollback(wrapped, *args)


class _Nested(AbstractAsyncContextManager[SagaScope]):
    """The block of a nested scope."""

    def __init__(
        self,
        real: AbstractAsyncContextManager[SagaScope],
        rebuilding: _Rebuilding,
        calls: list[_Call],
    ) -> None:
        self._calls = calls
        self._real = real
        self._rebuilding = rebuilding

    async def __aenter__(self) -> SagaScope:
        return _Scope(await self._real.__aenter__(), self._rebuilding, self._calls)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return await self._real.__aexit__(kind, error, traceback)
