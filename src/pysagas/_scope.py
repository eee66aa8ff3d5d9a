"""The running saga in hand: a scope, on which a function calls its steps.

Each call is all or nothing: it returns with its work in the log, or raises with it already taken
back, since its caller may catch the exception and go another way.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from types import CoroutineType, FunctionType, MethodType, TracebackType
from typing import Any, ParamSpec, TypeVar, TypeVarTuple, Unpack, overload

from anyio.lowlevel import checkpoint_if_cancelled

from ._attempts import COMPLETED, NOT_STARTED, UNKNOWN, Retry
from ._checks import Exceptions, OnCompensationFailure, OnFailure, check_saga_options, exception_types
from ._definitions import Bound, Definition, Parallel, Step, is_part
from ._effects import Middleware, current_place, reset_place
from ._errors import SagaDefinitionError, ScopeBusy, ScopeClosed, raise_as_it_is
from ._forward import carry_out, carry_out_commit, new_entry, note_failure
from ._log import (
    NO_KEYWORDS,
    Record,
    Run,
    Sequence,
    must_take_back,
)
from ._outcome import Outcome
from ._rollback import roll_back
from ._run import conclude, verdict
from ._signatures import CO_ASYNC_GENERATOR, fits, has_coroutine_code, is_awaitable, takes

__all__ = ["SagaScope", "open_saga"]

P = ParamSpec("P")
T = TypeVar("T")
T1 = TypeVar("T1")
T2 = TypeVar("T2")
T3 = TypeVar("T3")
T4 = TypeVar("T4")
T5 = TypeVar("T5")
T6 = TypeVar("T6")
T7 = TypeVar("T7")
T8 = TypeVar("T8")
Ts = TypeVarTuple("Ts")

_UNSET: Any = object()

_STEP_OPTIONS = {
    "name",
    "not_applied",
    "timeout",
    "retry",
    "compensation_timeout",
    "compensation_retry",
    "shield",
    "blocking",
}

_GENERATOR_CLOSED = "the async generator around the saga was closed"

_CALLED = {"step": "scope.step: {}", "parallel": "scope.parallel: {}"}


class SagaScope:
    """The running saga in hand.

    Made by the library: a saga's function gets one, `open_saga` and `nested` yield one. It is used
    by one task at a time, within its block.

    Attributes:
        outcome: The report of the run, once a scope of `open_saga` has ended; None before, and for
            other scopes.
    """

    __slots__ = ("__weakref__", "_closed", "_in_use", "_nested", "_sequence", "_sets_place", "outcome")

    outcome: Outcome[None] | None

    def __init__(self, sequence: Sequence, *, sets_place: bool = False) -> None:
        """For the library's own use."""
        self._sequence = sequence
        # Whether each call has to say where it stands: a block of `open_saga` has no context of its
        # own in which that could be said once.
        self._sets_place = sets_place
        # Why no more forward work is taken; None while it is.
        self._closed: str | None = None
        # The call that is under way; None where there is none.
        self._in_use: str | None = None
        # The nested scope that is open; None where there is none.
        self._nested: SagaScope | None = None
        self.outcome = None

    def __repr__(self) -> str:
        return f"<SagaScope of saga {self._sequence.saga_name!r} at {self._sequence.path}>"

    # --- the calls -----------------------------------------------------------------------------

    @overload
    async def step(self, definition: Definition[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...

    @overload
    async def step(self, definition: Bound[T], /) -> T: ...

    @overload
    async def step(
        self,
        action: Callable[[Unpack[Ts]], Awaitable[T]],
        /,
        *args: *Ts,
        compensation: Callable[[Unpack[Ts]], object] | None = None,
        undo: Callable[[T], object] | None = None,
        name: str | None = None,
        not_applied: Exceptions = (),
        timeout: float | None = None,
        retry: Retry | None = None,
        compensation_timeout: float | None = None,
        compensation_retry: Retry | None = None,
        shield: bool = False,
        blocking: bool = False,
    ) -> T: ...

    @overload
    async def step(
        self,
        action: Callable[[Unpack[Ts]], T],
        /,
        *args: *Ts,
        compensation: Callable[[Unpack[Ts]], object] | None = None,
        undo: Callable[[T], object] | None = None,
        name: str | None = None,
        not_applied: Exceptions = (),
        timeout: float | None = None,
        retry: Retry | None = None,
        compensation_timeout: float | None = None,
        compensation_retry: Retry | None = None,
        shield: bool = False,
        blocking: bool = False,
    ) -> T: ...

    # mypy does not see that `*args: Any` takes `*args: *Ts`.
    async def step(  # type: ignore[misc]
        self,
        action: Any,
        /,
        *args: Any,
        compensation: Any = _UNSET,
        undo: Any = _UNSET,
        **options: Any,
    ) -> Any:
        """Carries out one step: an action, or a definition (a Step, a group, another saga).

        An action gets the positional arguments. A definition gets the keyword arguments too; for an
        action with keywords, write ``scope.step(Step(action, ...), *args, **kwargs)``.

        Args:
            action: What to carry out.
            *args: Its arguments.
            compensation: Takes the action back; called with the same arguments.
            undo: Takes the action back; called with what it returned.
            **options: Those of `Step`.

        Returns:
            What the action returned.

        Raises:
            BaseException: What the action raised. It has been taken back by then, as far as that is
                possible (see `Step`); a cancellation is raised when that is done.
            CompensationFailed: It could not be taken back. The scope takes no more forward work.
            SagaDefinitionError, TypeError: The call cannot work; nothing has run.
            ScopeClosed, ScopeBusy: The scope cannot be used now; nothing has run.
        """
        if self._in_use is not None or self._closed is not None:
            self._refuse("step")
        sequence = self._sequence
        if action.__class__ is not FunctionType and is_part(action):
            if compensation is not _UNSET:
                options["compensation"] = compensation
            if undo is not _UNSET:
                options["undo"] = undo
            return await self._carry_out(action, args, options, "step")
        if compensation is _UNSET:
            compensation = None
        if undo is _UNSET:
            undo = None
        if (
            options
            or sequence.middleware
            or not fits(action, compensation, undo, len(args))
            or (action.__class__ is MethodType and isinstance(action.__self__, Definition))
        ):
            # Built as a Step, which has a say on everything that is wrong with it.
            unknown = options.keys() - _STEP_OPTIONS
            if unknown:
                raise TypeError(
                    f"scope.step: there is no option {', '.join(map(repr, sorted(unknown)))}; options "
                    f"are compensation, undo, {', '.join(sorted(_STEP_OPTIONS))}. Keyword arguments of "
                    "the action itself: scope.step(Step(action, ...), *args, **kwargs)"
                )
            step: Step[..., Any] = Step(action, compensation, undo=undo, **options)
            return await self._carry_out(step, args, NO_KEYWORDS, "step")
        # The short way, for a step that asks for nothing: as `_carry_out` and `attempt`.
        record = Record(action, compensation, undo, args, NOT_STARTED)
        entries = sequence.entries
        index = len(entries)
        entries.append(record)
        self._in_use = "step"
        token = current_place.set(sequence) if self._sets_place else None
        try:
            if not has_coroutine_code(action):
                await checkpoint_if_cancelled()
            record.state = UNKNOWN
            result: Any = action(*args)
            if result.__class__ is CoroutineType or is_awaitable(result):
                result = await result
            record.result = result
            record.state = COMPLETED
        except BaseException as error:
            note_failure(record, error)
            reset_place(token)
            await self._take_back(index, error)
            raise
        reset_place(token)
        self._in_use = None
        if self._closed is not None:
            await self._take_back(index, self._too_late(record.name))
        return result

    @overload
    async def parallel(
        self,
        m1: Bound[T1],
        /,
        *,
        name: str | None = None,
        limit: int | None = None,
        on_failure: OnFailure = "cancel",
    ) -> tuple[T1]: ...

    @overload
    async def parallel(
        self,
        m1: Bound[T1],
        m2: Bound[T2],
        /,
        *,
        name: str | None = None,
        limit: int | None = None,
        on_failure: OnFailure = "cancel",
    ) -> tuple[T1, T2]: ...

    @overload
    async def parallel(
        self,
        m1: Bound[T1],
        m2: Bound[T2],
        m3: Bound[T3],
        /,
        *,
        name: str | None = None,
        limit: int | None = None,
        on_failure: OnFailure = "cancel",
    ) -> tuple[T1, T2, T3]: ...

    @overload
    async def parallel(
        self,
        m1: Bound[T1],
        m2: Bound[T2],
        m3: Bound[T3],
        m4: Bound[T4],
        /,
        *,
        name: str | None = None,
        limit: int | None = None,
        on_failure: OnFailure = "cancel",
    ) -> tuple[T1, T2, T3, T4]: ...

    @overload
    async def parallel(
        self,
        m1: Bound[T1],
        m2: Bound[T2],
        m3: Bound[T3],
        m4: Bound[T4],
        m5: Bound[T5],
        /,
        *,
        name: str | None = None,
        limit: int | None = None,
        on_failure: OnFailure = "cancel",
    ) -> tuple[T1, T2, T3, T4, T5]: ...

    @overload
    async def parallel(
        self,
        m1: Bound[T1],
        m2: Bound[T2],
        m3: Bound[T3],
        m4: Bound[T4],
        m5: Bound[T5],
        m6: Bound[T6],
        /,
        *,
        name: str | None = None,
        limit: int | None = None,
        on_failure: OnFailure = "cancel",
    ) -> tuple[T1, T2, T3, T4, T5, T6]: ...

    @overload
    async def parallel(
        self,
        m1: Bound[T1],
        m2: Bound[T2],
        m3: Bound[T3],
        m4: Bound[T4],
        m5: Bound[T5],
        m6: Bound[T6],
        m7: Bound[T7],
        /,
        *,
        name: str | None = None,
        limit: int | None = None,
        on_failure: OnFailure = "cancel",
    ) -> tuple[T1, T2, T3, T4, T5, T6, T7]: ...

    @overload
    async def parallel(
        self,
        m1: Bound[T1],
        m2: Bound[T2],
        m3: Bound[T3],
        m4: Bound[T4],
        m5: Bound[T5],
        m6: Bound[T6],
        m7: Bound[T7],
        m8: Bound[T8],
        /,
        *,
        name: str | None = None,
        limit: int | None = None,
        on_failure: OnFailure = "cancel",
    ) -> tuple[T1, T2, T3, T4, T5, T6, T7, T8]: ...

    @overload
    async def parallel(
        self,
        *members: Bound[T],
        name: str | None = None,
        limit: int | None = None,
        on_failure: OnFailure = "cancel",
    ) -> tuple[T, ...]: ...

    async def parallel(
        self,
        *members: Any,
        name: str | None = None,
        limit: int | None = None,
        on_failure: OnFailure = "cancel",
    ) -> tuple[Any, ...]:
        """Carries out members at the same time.

        Args:
            *members: Bound steps, groups and sagas. A member that is not bound gets no arguments.
            name: For reports and messages.
            limit: How many members run at once; None: all of them.
            on_failure: As for `Parallel`.

        Returns:
            What the members returned, in their order.

        Raises:
            ExceptionGroup: Members failed. All have stopped, and what they did has been taken back.
            CompensationFailed: That could not be taken back. The scope takes no more forward work.
            SagaDefinitionError, TypeError: The call cannot work; nothing has run.
            ScopeClosed, ScopeBusy: The scope cannot be used now; nothing has run.
        """
        self._claim("parallel")
        group = Parallel(*members, name=name, limit=limit, on_failure=on_failure)
        result: tuple[Any, ...] = await self._carry_out(group, (), NO_KEYWORDS, "parallel")
        return result

    def nested(self) -> AbstractAsyncContextManager[SagaScope]:
        """Opens a save-point: a part of the saga that is rolled back on its own.

        The block gets a scope of its own; until it ends, this one takes no calls. An exception that
        leaves the block takes back what the block has done, and goes on.

        Raises:
            CompensationFailed: At the end of the block: it could not be taken back. The scope takes
                no more forward work.
            ScopeClosed, ScopeBusy: The scope cannot be used now; nothing has run.
        """
        return _Nested(self)

    async def commit(self) -> None:
        """Passes the point of no return: what was done before it will not be compensated.

        Raises:
            SagaDefinitionError: This is a nested scope, or the saga is a part of another one; a
                commit belongs to the outermost sequence. Nothing has run.
            ScopeClosed, ScopeBusy: The scope cannot be used now; nothing has run.
        """
        self._claim("commit")
        sequence = self._sequence
        if sequence.parent is not None:
            raise SagaDefinitionError(
                f"commit was called in saga {sequence.saga_name!r} at {sequence.path}, within "
                f"another one or within a nested scope; it belongs to the outermost sequence, that "
                f"of saga {sequence.run.saga!r}"
            )
        self._in_use = "commit"
        try:
            await carry_out_commit(sequence)
        finally:
            self._in_use = None

    def on_rollback(self, function: Callable[[Unpack[Ts]], object], *args: *Ts) -> None:
        """Has a function called when the saga is rolled back, in its turn among the compensations.

        Only for what is done by something that cannot be called through `step`: between the work
        and this call, a cancellation or an exception loses it.

        Args:
            function: Sync or async.
            *args: Its arguments.

        Raises:
            SagaDefinitionError: It cannot be called so.
            ScopeClosed, ScopeBusy: The scope cannot be used now.
        """
        self._claim("on_rollback")
        if not takes(function, len(args)):
            raise SagaDefinitionError(
                f"on_rollback: {function!r} cannot be called with {len(args)} arguments"
            )
        self._sequence.entries.append(Record(function, function, None, args, COMPLETED))

    # --- what they share -----------------------------------------------------------------------

    def _claim(self, call: str) -> None:
        if self._in_use is not None or self._closed is not None:
            self._refuse(call)

    def _refuse(self, call: str) -> None:
        where = f"scope.{call} on the scope of saga {self._sequence.saga_name!r}"
        if self._closed is not None:
            raise ScopeClosed(f"{where}: {self._closed}; calls belong into the block of the scope")
        if self._in_use == "nested":
            raise ScopeBusy(f"{where}: a nested scope is open; call it on that one, or end it first")
        raise ScopeBusy(
            f"{where}: its {self._in_use} has not ended yet; for work at the same time use "
            "scope.parallel, whose members may be sagas with scopes of their own"
        )

    async def _carry_out(
        self,
        part: Definition[..., Any] | Bound[Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        call: str,
    ) -> Any:
        sequence = self._sequence
        if isinstance(part, Bound):
            if args or kwargs:
                raise TypeError(
                    f"scope.{call}: {part!r} has its arguments already, and was given others"
                )
            definition, args, kwargs = part.definition, part.args, part.kwargs
        else:
            definition = part
            definition.check_call(args, kwargs, _CALLED[call])
        if definition.holds_commit():
            raise SagaDefinitionError(
                f"scope.{call}: {definition!r} holds a commit, which belongs to the outermost "
                "sequence; call `await scope.commit()` in the outermost function"
            )
        index = len(sequence.entries)
        path = (*sequence.path, index)
        entry = new_entry(definition, args, kwargs, sequence, path)
        sequence.entries.append(entry)
        self._in_use = call
        token = current_place.set(sequence) if self._sets_place else None
        try:
            result = await carry_out(entry, args, kwargs, sequence, path)
        except BaseException as error:
            reset_place(token)
            await self._take_back(index, error)
            raise
        reset_place(token)
        self._in_use = None
        if self._closed is not None:
            await self._take_back(index, self._too_late(entry.name))
        return result

    def _too_late(self, name: str) -> ScopeClosed:
        return ScopeClosed(
            f"{name!r} of saga {self._sequence.saga_name!r} ended after its scope had; it was taken "
            "back"
        )

    async def _take_back(self, index: int, error: BaseException) -> None:
        """Takes one entry back; returns for `error` itself to be raised."""
        if isinstance(error, GeneratorExit):
            self._in_use = None
            return  # nothing can be awaited any more; the end of the run says what that leaves
        sequence = self._sequence
        entry = sequence.entries[index]
        path = (*sequence.path, index)
        late = None
        sequence.in_flight = False
        if must_take_back(entry):
            late = await roll_back(sequence, index, entry.name, path)
        if must_take_back(entry):
            # What failed elsewhere kept this from being taken back: that is this call's failure too,
            # else its caller would go another way while it stands.
            path = sequence.halted_at(path)
        chosen = verdict(sequence, path, error, late)
        self._in_use = None
        if sequence.run.failures_in(path):
            self._closed = "something in it could not be taken back, so it ends failed"
        assert chosen is not None
        if chosen is not error:
            raise_as_it_is(chosen)
        if isinstance(error, ScopeClosed):
            raise error

    def _end(self, how: str) -> BaseException | None:
        """Closes the scope; says what is wrong with that."""
        wrong: BaseException | None = None
        if self._in_use is not None:
            if self._nested is None:
                self._sequence.in_flight = True
            else:
                self._nested._end(how)  # only a call that is running is left to its own task
            wrong = ScopeBusy(
                f"the scope of saga {self._sequence.saga_name!r} ended while its {self._in_use} was "
                "under way in another task; wait for that task within the scope's block"
            )
        elif self._closed is not None:
            wrong = self._sequence.run.reported
        self._closed = how
        return wrong


async def call_function(
    sequence: Sequence,
    function: Callable[..., Awaitable[T]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> T:
    """Carries out a saga written as a function, forward only."""
    scope = SagaScope(sequence)
    try:
        value = await function(scope, *args, **kwargs)
    except BaseException:
        scope._end("its saga has ended")
        raise
    wrong = scope._end("its saga has ended")
    if wrong is not None:
        raise wrong
    return value


class _Nested(AbstractAsyncContextManager[SagaScope]):
    """A save-point in a scope."""

    __slots__ = ("_around", "_index", "_scope")

    def __init__(self, around: SagaScope) -> None:
        self._around = around

    async def __aenter__(self) -> SagaScope:
        around = self._around
        around._claim("nested")
        sequence = around._sequence
        self._index = len(sequence.entries)
        inner = Sequence(
            sequence.run, sequence, (*sequence.path, self._index), None, sequence.middleware
        )
        sequence.entries.append(inner)
        around._in_use = "nested"
        self._scope = around._nested = SagaScope(inner, sets_place=around._sets_place)
        return self._scope

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        wrong = self._scope._end("its block has ended")
        around = self._around
        around._nested = None
        if isinstance(error, GeneratorExit) and _thrown_at_yield(error):
            try:
                await around._take_back(self._index, ScopeClosed(_GENERATOR_CLOSED))
            except ScopeClosed:
                return  # all is taken back, and the generator's own GeneratorExit goes on
        if around._closed is not None:
            wrong = around._too_late("nested")  # ended after the scope around it
        cause = wrong if error is None else error
        if cause is None:
            around._in_use = None
            return
        await around._take_back(self._index, cause)
        if error is None:
            raise cause


def open_saga(
    *,
    name: str | None = None,
    exceptions: Exceptions = (),
    rollback_timeout: float | None = None,
    on_compensation_failure: OnCompensationFailure = "continue",
    middleware: tuple[Middleware, ...] | list[Middleware] = (),
) -> AbstractAsyncContextManager[SagaScope]:
    """Opens a saga for the length of a block, for use inside a function that exists already.

    It holds no cancel scope and no task group between calls, so it works in async context managers,
    async generators and fixtures, even where another task ends them than began them. An exception
    that leaves the block takes everything back, and goes on.

    Args:
        name: For reports and messages.
        exceptions: Failures that are expected: one of these that leaves the block goes no further,
            if the state was restored; ``scope.outcome`` then is COMPENSATED.
        rollback_timeout: Seconds that a rollback may take; None: no limit.
        on_compensation_failure: ``"continue"`` with the others, or ``"stop"``.
        middleware: Around each effect. The block itself is no effect: a "saga" effect is not made.

    Raises:
        SagaDefinitionError: An option cannot work.
        CompensationFailed: At the end of the block: something could not be taken back.
    """
    place = f"open_saga {name!r}" if name else "open_saga"
    check_saga_options(place, name, rollback_timeout, on_compensation_failure, middleware)
    run = Run(name or "saga", None)
    root = Sequence(run, None, (), None, tuple(middleware))
    root.limit_rollback(rollback_timeout)
    root.stop_on_failure = on_compensation_failure == "stop"
    return _OpenSaga(root, exception_types(f"{place}: exceptions", exceptions))


class _OpenSaga(AbstractAsyncContextManager[SagaScope]):
    """The block of `open_saga`."""

    __slots__ = ("_expected", "_root", "_scope")

    def __init__(self, root: Sequence, expected: tuple[type[Exception], ...]) -> None:
        self._root = root
        self._expected = expected
        self._scope: SagaScope | None = None

    async def __aenter__(self) -> SagaScope:
        if self._scope is not None:
            raise ScopeClosed(f"saga {self._root.run.saga!r}: a block of open_saga is entered once")
        self._scope = SagaScope(self._root, sets_place=True)
        return self._scope

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        scope = self._scope
        assert scope is not None
        wrong = scope._end("its block has ended")
        cause = wrong if error is None else error
        if isinstance(error, GeneratorExit) and _thrown_at_yield(error):
            # `aclose` of an async generator, where awaiting works: so this is an end like another.
            cause = ScopeClosed(_GENERATOR_CLOSED)
        expected = self._expected if cause is error else ()
        try:
            scope.outcome = await conclude(self._root, None, cause, expected)
        except BaseException as raised:
            scope.outcome = self._root.run.ended
            if raised is cause and error is not None:
                return False  # what came into the block goes on; of a generator, its own GeneratorExit
            raise
        return error is not None


def _thrown_at_yield(error: GeneratorExit) -> bool:
    """Tells whether it was thrown into an async generator that was suspended at a ``yield``.

    GeneratorExit reaches a block in two ways. In a coroutine that is closed or collected nothing can
    be awaited any more. In an async generator that is closed by ``aclose`` awaiting works, and event
    loops close the collected ones so. The frame in which it appeared tells the two apart.
    """
    flags = 0
    traceback = error.__traceback__
    while traceback is not None:
        flags = traceback.tb_frame.f_code.co_flags
        traceback = traceback.tb_next
    return bool(flags & CO_ASYNC_GENERATOR)
