"""Sagas, and the three ways to write one: as data, with the builder, as a function."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from functools import partial
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast, overload

from ._attempts import Retry
from ._checks import (
    Exceptions,
    OnCompensationFailure,
    OnFailure,
    check_middleware,
    check_name,
    check_saga_options,
    exception_types,
)
from ._definitions import (
    Bound,
    Commit,
    Definition,
    Parallel,
    Part,
    Step,
    check_parts,
    definition_of,
    is_part,
    parts_problem,
)
from ._effects import Middleware
from ._errors import SagaDefinitionError
from ._forward import carry_out_parts
from ._log import Run, SagaDefinition, Sequence, tree_of
from ._outcome import Outcome, TreeNode
from ._run import run_plain, run_through
from ._scope import SagaScope, call_function
from ._signatures import call_problem, is_async, name_of, takes_positional

__all__ = ["Saga", "SagaBuilder", "SagaMethod", "saga"]

P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
S = TypeVar("S")


class Saga(SagaDefinition[P, T_co]):
    """A unit of work that is carried out whole or taken back whole.

    A definition: immutable, and run any number of times, at the same time too. In another saga it
    is a part of that one. To call it in an action, ``await other(...)``, is something else: an
    independent run, of which the saga around knows nothing and takes nothing back.
    """

    __slots__ = ("exceptions", "version")

    exceptions: tuple[type[Exception], ...]
    version: str | None

    def __init__(
        self: Saga[..., None],
        steps: Iterable[Part] = (),
        *,
        name: str | None = None,
        exceptions: Exceptions = (),
        rollback_timeout: float | None = None,
        on_compensation_failure: OnCompensationFailure = "continue",
        middleware: tuple[Middleware, ...] | list[Middleware] = (),
        version: str | None = None,
    ) -> None:
        """Defines a saga as data: its parts are carried out one after the other.

        Each action and compensation is called with the arguments of the run; a bound part with its
        own. Its value is None; the results are in ``outcome.steps``.

        Args:
            steps: Steps, parallel groups, other sagas, and `Commit`.
            name: For reports and messages.
            exceptions: The failures that the caller expects: after one of these `run` returns a
                COMPENSATED outcome instead of raising, if the state was restored.
            rollback_timeout: Seconds that a rollback may take, from when all members have stopped;
                None: no limit. The smallest of those of the sagas around counts.
            on_compensation_failure: ``"continue"`` with the other compensations, or ``"stop"``: let
                those that run end, and begin no more.
            middleware: Around each effect of this saga, the outermost first.
            version: Recorded by a journal, which refuses to go on with a run of another version.

        Raises:
            SagaDefinitionError: Something of this cannot work.
        """
        place = f"Saga {name!r}" if name else "Saga"
        if isinstance(steps, Definition | Bound | str) or not isinstance(steps, Iterable):
            raise SagaDefinitionError(
                f"{place}: steps must be a list of Step, Parallel and Saga, not {steps!r}"
            )
        self._define(
            place,
            check_parts(place, steps, in_group=False, known="step"),
            None,
            name=name,
            exceptions=exceptions,
            rollback_timeout=rollback_timeout,
            on_compensation_failure=on_compensation_failure,
            middleware=middleware,
            version=version,
        )

    def _define(
        self,
        place: str,
        parts: tuple[Part, ...],
        function: Callable[..., Awaitable[Any]] | None,
        *,
        name: str | None,
        exceptions: Any,
        rollback_timeout: float | None,
        on_compensation_failure: str,
        middleware: tuple[Middleware, ...] | list[Middleware],
        version: str | None,
    ) -> None:
        check_saga_options(place, name, rollback_timeout, on_compensation_failure, middleware, version)
        put = partial(object.__setattr__, self)
        put("name", name or ("saga" if function is None else name_of(function)))
        put("parts", parts)
        put("function", function)
        put("exceptions", exception_types(f"{place}: exceptions", exceptions))
        put("rollback_timeout", rollback_timeout)
        put("on_compensation_failure", on_compensation_failure)
        put("middleware", tuple(middleware))
        put("version", version)
        put("_known_calls", set())

    @overload
    async def run(self, *args: P.args, **kwargs: P.kwargs) -> Outcome[T_co]: ...

    @overload
    async def run(
        self, *args: Any, exceptions: Exceptions | None, executor: object = None, **kwargs: Any
    ) -> Outcome[T_co]: ...

    # mypy: the parameters of the saga may have these names too; they are reached with `bind`.
    async def run(  # type: ignore[misc]
        self,
        *args: Any,
        exceptions: Exceptions | None = (),
        executor: object = None,
        **kwargs: Any,
    ) -> Outcome[T_co]:
        """Runs the saga, and reports.

        Whatever goes wrong, everything that may have happened is taken back before this returns or
        raises. That is not interrupted by cancellation: of a scope around, nor of the task.

        Args:
            *args: For the saga's function, or for each action and compensation.
            exceptions: Failures that are expected, besides those of the definition.
            executor: Ignored; release 0.0.3 took it.
            **kwargs: As `args`. (A parameter named ``exceptions`` or ``executor`` is reached with
                `bind`.)

        Returns:
            The outcome, COMPLETED; or COMPENSATED, where an expected failure was taken back.

        Raises:
            BaseException: The failure, or the cancellation, that ended the saga; see
                `outcome_of`. It carries a note of what was taken back and what is in doubt.
            CompensationFailed: Something could not be taken back.
            TypeError: The saga cannot be called with these arguments; nothing has run.
            SagaDefinitionError: `exceptions` holds something else; nothing has run.
        """
        del executor
        expected = self.exceptions
        if exceptions != ():
            expected += exception_types(f"{self!r}.run: exceptions", exceptions)
        self.check_call(args, kwargs, "{}.run")
        return await self._run(args, kwargs, expected)

    async def run_with(
        self,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        run_id: str | None = None,
        carried_on: int = 0,
        middleware: tuple[Middleware, ...] | list[Middleware] = (),
        exceptions: Exceptions | None = (),
    ) -> Outcome[T_co]:
        """Runs the saga as `run` does, for whoever runs it on behalf of others: a journal, an engine.

        Args:
            args: Positional arguments of the run.
            kwargs: Keyword arguments of the run.
            run_id: The name of the run; None: a random one.
            carried_on: How often it was carried on from its commit, for `Effect.key`.
            middleware: Around each effect, outside of the saga's own; the outermost first.
            exceptions: As for `run`.

        Returns:
            As for `run`.

        Raises:
            BaseException: As for `run`.
        """
        place = f"{self!r}.run_with"
        check_name(place, run_id, what="run_id")
        check_middleware(place, middleware)
        expected = self.exceptions
        if exceptions != ():
            expected += exception_types(f"{place}: exceptions", exceptions)
        kwargs = {} if kwargs is None else dict(kwargs)
        self.check_call(args, kwargs, "{}.run_with")
        return await self._run(args, kwargs, expected, run_id, carried_on, tuple(middleware))

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T_co:
        """Runs the saga, and gives its value.

        Raises:
            BaseException: As for `run`; an expected failure is raised too, since there is no value.
        """
        self.check_call(args, kwargs, "{}")
        outcome = await self._run(args, kwargs, ())
        return outcome.value

    def _run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        expected: tuple[type[Exception], ...],
        run_id: str | None = None,
        carried_on: int = 0,
        middleware: tuple[Middleware, ...] = (),
    ) -> Coroutine[Any, Any, Outcome[T_co]]:
        root = Sequence(
            Run(self.name, run_id, carried_on), None, (), self, middleware + self.middleware
        )
        if root.middleware:
            return run_through(root, args, kwargs, expected)
        return run_plain(root, args, kwargs, expected)

    def forward(
        self, sequence: Sequence, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Awaitable[Any]:
        """Carries out the saga, forward only, writing to `sequence`; for the library's own use."""
        if self.function is None:
            return carry_out_parts(sequence, args, kwargs)
        return call_function(sequence, self.function, args, kwargs)

    @property
    def tree(self) -> tuple[TreeNode, ...]:
        """All places in the saga, in the order of their paths: itself, groups, steps, commits.

        What holds others comes before them. The steps of a function are known only from the outcome
        of a run.
        """
        return tuple(tree_of(self))

    def holds_commit(self) -> bool:
        """Tells whether a `Commit` stands in it; what a function will do nobody knows."""
        return any(definition_of(part).holds_commit() for part in self.parts)

    def _call_problem(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> str | None:
        if self.function is None:
            return parts_problem(self.parts, args, kwargs)
        problem = call_problem(self.function, (None, *args), kwargs)
        return problem and f"the function of saga {self.name!r} cannot take these: {problem}"


def _from_function(
    function: Callable[..., Awaitable[T]],
    *,
    name: str | None = None,
    exceptions: Exceptions = (),
    rollback_timeout: float | None = None,
    on_compensation_failure: OnCompensationFailure = "continue",
    middleware: tuple[Middleware, ...] | list[Middleware] = (),
    version: str | None = None,
) -> Saga[..., T]:
    new = cast("Saga[..., T]", object.__new__(Saga))
    new._define(
        "@saga",
        (),
        function,
        name=name,
        exceptions=exceptions,
        rollback_timeout=rollback_timeout,
        on_compensation_failure=on_compensation_failure,
        middleware=middleware,
        version=version,
    )
    return new


class SagaMethod(Generic[S, P, T_co]):
    """A saga written as a method: bound to an instance, like any method, it is a `Saga`."""

    __slots__ = ("_function", "_options")

    def __init__(
        self, function: Callable[Concatenate[S, SagaScope, P], Awaitable[T_co]], options: Any
    ) -> None:
        """For the library's own use; write ``@saga``."""
        self._function = function
        self._options = options

    async def __call__(self, instance: S, /, *args: P.args, **kwargs: P.kwargs) -> T_co:
        """Calls the saga of an instance, as ``Class.method(instance, ...)`` does."""
        return await self.__get__(instance)(*args, **kwargs)

    @overload
    def __get__(self, instance: None, owner: type) -> SagaMethod[S, P, T_co]: ...

    @overload
    def __get__(self, instance: S, owner: type | None = None) -> Saga[P, T_co]: ...

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Gives the saga of an instance; from the class, the method itself."""
        if instance is None:
            return self
        bound = cast("Any", self._function).__get__(instance, owner)
        return _from_function(bound, **self._options)


class _SagaDecorator:
    """What ``@saga(...)`` with options gives."""

    __slots__ = ("_options",)

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options

    # The scope comes first in a function, and second in a method. The two overlap for a function of
    # two scopes, which nobody writes.
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, function: Callable[Concatenate[SagaScope, P], Awaitable[T]], /
    ) -> Saga[P, T]: ...

    @overload
    def __call__(
        self, function: Callable[Concatenate[S, SagaScope, P], Awaitable[T]], /
    ) -> SagaMethod[S, P, T]: ...

    def __call__(self, function: Any, /) -> Any:
        return _decorate(function, self._options)


@overload
def saga(  # type: ignore[overload-overlap]
    function: Callable[Concatenate[SagaScope, P], Awaitable[T]], /
) -> Saga[P, T]: ...


@overload
def saga(function: Callable[Concatenate[S, SagaScope, P], Awaitable[T]], /) -> SagaMethod[S, P, T]: ...


@overload
def saga(
    *,
    name: str | None = None,
    exceptions: Exceptions = (),
    rollback_timeout: float | None = None,
    on_compensation_failure: OnCompensationFailure = "continue",
    middleware: tuple[Middleware, ...] | list[Middleware] = (),
    version: str | None = None,
) -> _SagaDecorator: ...


def saga(function: Any = None, /, **options: Any) -> Any:
    """Makes a saga of an async function of ``(scope, *args)``, or of a method of ``(self, scope, *args)``.

    The function calls its steps on the scope. What it raises, or a cancellation, takes back all
    that it has done; what it returns is the saga's value.

    Args:
        function: The function. Left away where options are given: ``@saga(name="book-trip")``.
        **options: Those of `Saga`; the name is by default the function's.

    Raises:
        SagaDefinitionError: It is not an async function, takes no scope, or an option cannot work.
    """
    check = dict(options)
    exception_types("@saga: exceptions", check.pop("exceptions", ()))
    check_saga_options(
        "@saga",
        check.pop("name", None),
        check.pop("rollback_timeout", None),
        check.pop("on_compensation_failure", "continue"),
        check.pop("middleware", ()),
        check.pop("version", None),
    )
    if check:
        raise TypeError(f"@saga got unexpected options: {', '.join(check)}")
    return _SagaDecorator(options) if function is None else _decorate(function, options)


def _decorate(function: Any, options: dict[str, Any]) -> Saga[..., Any] | SagaMethod[Any, ..., Any]:
    place = f"@saga on {name_of(function)!r}"
    if isinstance(function, Definition) or not is_async(function):
        raise SagaDefinitionError(
            f"{place}: it must be an async function of (scope, *args), not {function!r}; write "
            "`async def`"
        )
    if _is_method(function):
        return SagaMethod(function, options)
    if not takes_positional(function):
        raise SagaDefinitionError(
            f"{place}: its first argument is the scope on which it calls its steps, and it takes "
            f"none; write `async def {name_of(function)}(scope, ...)`"
        )
    return _from_function(function, **options)


def _is_method(function: Any) -> bool:
    """Tells whether a function stands in a class body and takes an instance before the scope."""
    around = getattr(function, "__qualname__", "").rpartition(".")[0]
    code = getattr(function, "__code__", None)
    if not around or around.endswith("<locals>") or code is None:
        return False
    first = code.co_varnames[:1]
    return first != ("scope",) and "SagaScope" not in str(function.__annotations__.get(*first, ""))


class SagaBuilder:
    """Builds a saga as data, one call after the other."""

    __slots__ = ("_options", "_parts")

    def __init__(self, name: str | None = None, **saga_options: Any) -> None:
        """Starts with no parts; see `create`."""
        self._parts: list[Part] = []
        self._options: dict[str, Any] = {"name": name, **saga_options}
        Saga((), **self._options)  # so that an option which cannot work is refused here

    @classmethod
    def create(
        cls,
        name: str | None = None,
        *,
        exceptions: Exceptions = (),
        rollback_timeout: float | None = None,
        on_compensation_failure: OnCompensationFailure = "continue",
        middleware: tuple[Middleware, ...] | list[Middleware] = (),
        version: str | None = None,
    ) -> SagaBuilder:
        """Starts a builder. The options are those of `Saga`.

        Raises:
            SagaDefinitionError: An option cannot work.
        """
        return cls(
            name,
            exceptions=exceptions,
            rollback_timeout=rollback_timeout,
            on_compensation_failure=on_compensation_failure,
            middleware=middleware,
            version=version,
        )

    @overload
    def add_step(self, action: Step[..., Any] | Bound[Any], /) -> SagaBuilder: ...

    @overload
    def add_step(
        self,
        action: Callable[P, Awaitable[T]],
        compensation: Callable[P, object] | None = None,
        *,
        undo: Callable[[T], object] | None = None,
        name: str | None = None,
        not_applied: Exceptions = (),
        timeout: float | None = None,
        retry: Retry | None = None,
        compensation_timeout: float | None = None,
        compensation_retry: Retry | None = None,
        shield: bool = False,
        blocking: bool = False,
    ) -> SagaBuilder: ...

    @overload
    def add_step(
        self,
        action: Callable[P, T],
        compensation: Callable[P, object] | None = None,
        *,
        undo: Callable[[T], object] | None = None,
        name: str | None = None,
        not_applied: Exceptions = (),
        timeout: float | None = None,
        retry: Retry | None = None,
        compensation_timeout: float | None = None,
        compensation_retry: Retry | None = None,
        shield: bool = False,
        blocking: bool = False,
    ) -> SagaBuilder: ...

    def add_step(
        self, action: Any, compensation: Any = None, *, undo: Any = None, **options: Any
    ) -> SagaBuilder:
        """Adds a step: an action and how to take it back, with the options of `Step`; or a `Step`.

        Raises:
            SagaDefinitionError: The step cannot work.
        """
        if is_part(action):
            if compensation is not None or undo is not None or options:
                raise SagaDefinitionError(
                    f"add_step: {action!r} is defined already; give its compensation and its options "
                    "where it is built"
                )
            return self._add(action)
        return self._add(Step(action, compensation, undo=undo, **options))

    def add_parallel(
        self,
        *members: Part,
        name: str | None = None,
        limit: int | None = None,
        on_failure: OnFailure = "cancel",
    ) -> SagaBuilder:
        """Adds a group of members that run at the same time; see `Parallel`.

        Raises:
            SagaDefinitionError: The group cannot work.
        """
        return self._add(Parallel(*members, name=name, limit=limit, on_failure=on_failure))

    def add_saga(self, other: Saga[..., Any] | Bound[Any]) -> SagaBuilder:
        """Adds another saga, as a part of this one."""
        return self._add(other)

    def add_commit(self) -> SagaBuilder:
        """Adds the point of no return: what is done before it will not be compensated."""
        return self._add(Commit())

    def _add(self, part: Part) -> SagaBuilder:
        # Checked here, where the traceback shows the line that is wrong, and not only in `build`.
        check_parts("SagaBuilder", [part], in_group=False, known="part")
        self._parts.append(part)
        return self

    def build(self) -> Saga[..., None]:
        """Builds the saga. The builder can go on; what is built does not change."""
        return Saga(self._parts, **self._options)
