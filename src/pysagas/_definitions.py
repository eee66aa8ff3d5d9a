"""Steps and parallel groups as frozen data, checked when they are built.

Whatever can be found wrong with a definition is found here, before anything has run.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from types import CoroutineType, MethodType
from typing import Any, Generic, NoReturn, ParamSpec, TypeGuard, TypeVar, cast, overload

from ._attempts import Attempted, Retry, compose_attempts, compose_back
from ._checks import (
    Exceptions,
    OnFailure,
    check_blocking,
    check_callable,
    check_limit,
    check_name,
    check_retry,
    check_seconds,
    exception_types,
    shown_call,
)
from ._errors import SagaDefinitionError
from ._signatures import (
    call_problem,
    compensation_problem,
    fits,
    is_async,
    is_coroutine_function,
    name_of,
    takes,
)

__all__ = [
    "Bound",
    "Commit",
    "Definition",
    "Parallel",
    "Part",
    "Step",
    "check_parts",
    "definition_of",
    "is_part",
    "parts_problem",
]

P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Definition(Generic[P, T_co]):
    """A step, a parallel group or a saga: something that a saga can be made of. Immutable."""

    __slots__ = ("__weakref__", "_known_calls", "name")

    name: str
    # Shapes of calls (how many positional arguments, which names) that were checked and found good:
    # so that running a definition again does not read its signatures again.
    _known_calls: set[tuple[object, ...]]

    def __setattr__(self, name: str, value: object) -> NoReturn:
        """Refuses: definitions are immutable, so that many runs can share one."""
        raise AttributeError(
            f"{type(self).__name__} {self.name!r} is immutable: {name!r} cannot be set; build another one"
        )

    def __delattr__(self, name: str) -> NoReturn:
        """Refuses, as assignment does."""
        raise AttributeError(f"{type(self).__name__} {self.name!r} is immutable")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"

    def bind(self, *args: P.args, **kwargs: P.kwargs) -> Bound[T_co]:
        """Gives this definition its own arguments, in place of those of the saga that it is in.

        Raises:
            TypeError: It cannot be called with these arguments.
        """
        self.check_call(args, kwargs, "{}.bind")
        return Bound(self, args, kwargs)

    def check_call(self, args: tuple[object, ...], kwargs: Mapping[str, object], call: str) -> None:
        """Refuses arguments that something in this definition could not take.

        Args:
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.
            call: How the message names the call, with ``{}`` for this definition.

        Raises:
            TypeError: They do not fit; nothing has run.
        """
        shape = (len(args), *kwargs)
        if shape not in self._known_calls:
            problem = self._call_problem(args, kwargs)
            if problem is not None:
                raise TypeError(f"{call.format(repr(self))}{shown_call(args, kwargs)}: {problem}")
            self._known_calls.add(shape)

    def _call_problem(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> str | None:
        raise NotImplementedError  # pragma: no cover - abstract

    def holds_commit(self) -> bool:
        """Tells whether a `Commit` stands in it, at any depth."""
        return False


class Bound(Generic[T_co]):
    """A definition with its own arguments, as ``bind`` gives it."""

    __slots__ = ("args", "definition", "kwargs")

    definition: Definition[..., T_co]
    args: tuple[object, ...]
    kwargs: dict[str, object]

    def __init__(
        self,
        definition: Definition[..., T_co],
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> None:
        """For the library's own use; write ``definition.bind(...)``."""
        object.__setattr__(self, "definition", definition)
        object.__setattr__(self, "args", args)
        object.__setattr__(self, "kwargs", kwargs)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        """Refuses, as definitions do."""
        raise AttributeError(f"{self!r} is immutable: {name!r} cannot be set; bind again")

    def __delattr__(self, name: str) -> NoReturn:
        """Refuses, as definitions do."""
        raise AttributeError(f"{self!r} is immutable")

    def __repr__(self) -> str:
        return f"{self.definition!r}.bind{shown_call(self.args, self.kwargs)}"


class Step(Definition[P, T_co]):
    """One action and how to take it back.

    A **compensation** gets what the action got, so it can run even when nobody knows how far the
    action came. An **undo** gets what the action returned, so it runs only for a completed action.
    A step may have both: then a completed action is undone, one in doubt is compensated.

    All three are called as they are, async or not; a sync one runs inline.
    """

    __slots__ = (
        "action",
        "attempts",
        "blocking",
        "compensation",
        "compensation_retry",
        "compensation_timeout",
        "explicit_name",
        "known_async",
        "not_applied",
        "retry",
        "shield",
        "simple",
        "take_back",
        "take_undo",
        "timeout",
        "undo",
    )

    action: Callable[P, Any]
    compensation: Callable[P, object] | None
    undo: Callable[[Any], object] | None
    explicit_name: bool
    known_async: bool
    not_applied: tuple[type[Exception], ...]
    timeout: float | None
    retry: Retry | None
    compensation_timeout: float | None
    compensation_retry: Retry | None
    shield: bool
    blocking: bool
    # What the engine calls. `attempts` is None for an action that is called as it is; `take_back`
    # and `take_undo` are the user's own functions where there is nothing to wrap around them.
    attempts: Callable[[Attempted], Awaitable[Any]] | None
    take_back: Callable[..., object] | None
    take_undo: Callable[[Any], object] | None
    # An async action that is called as it is: the engine has a short way for it.
    simple: bool

    @overload
    def __init__(
        self,
        action: Callable[P, Awaitable[T_co]],
        compensation: Callable[P, object] | None = None,
        *,
        undo: Callable[[T_co], object] | None = None,
        name: str | None = None,
        not_applied: Exceptions = (),
        timeout: float | None = None,
        retry: Retry | None = None,
        compensation_timeout: float | None = None,
        compensation_retry: Retry | None = None,
        shield: bool = False,
        blocking: bool = False,
    ) -> None: ...

    @overload
    def __init__(
        self,
        action: Callable[P, T_co],
        compensation: Callable[P, object] | None = None,
        *,
        undo: Callable[[T_co], object] | None = None,
        name: str | None = None,
        not_applied: Exceptions = (),
        timeout: float | None = None,
        retry: Retry | None = None,
        compensation_timeout: float | None = None,
        compensation_retry: Retry | None = None,
        shield: bool = False,
        blocking: bool = False,
    ) -> None: ...

    def __init__(
        self,
        action: Callable[P, Any],
        compensation: Callable[P, object] | None = None,
        *,
        undo: Callable[[Any], object] | None = None,
        name: str | None = None,
        not_applied: Exceptions = (),
        timeout: float | None = None,
        retry: Retry | None = None,
        compensation_timeout: float | None = None,
        compensation_retry: Retry | None = None,
        shield: bool = False,
        blocking: bool = False,
    ) -> None:
        """Defines a step.

        Args:
            action: Does the work.
            compensation: Takes the action back; called with the action's arguments.
            undo: Takes the action back; called with the action's result.
            name: For reports and messages; by default the action's own.
            not_applied: Exception types by which the action says that it did nothing: after one of
                these (with `retry`: in every attempt) the step is not compensated. An exception
                group never counts, nor does the step's own timeout.
            timeout: Seconds for each attempt; then TimeoutError, and the step is in doubt. None: no
                limit.
            retry: Calls the action, perhaps several times, for instance a bound
                ``stamina.AsyncRetryingCaller`` or a ``tenacity.AsyncRetrying(reraise=True)``.
            compensation_timeout: As `timeout`, for the undo or compensation.
            compensation_retry: As `retry`, for the undo or compensation.
            shield: The async action, once begun, runs to its end whatever happens meanwhile, and is
                then taken back with its result known.
            blocking: The sync action, and its sync undo or compensation, run in a worker thread and
                are waited for.

        Raises:
            SagaDefinitionError: Something of this cannot work. The message says what, and what to
                write instead.
        """
        label = name or name_of(action)
        place = f"Step {label!r}"
        check_callable(place, "action", action)
        check_name(place, name)
        owner = getattr(action, "__self__", None) if isinstance(action, MethodType) else action
        if is_part(owner) or (isinstance(owner, type) and issubclass(owner, Definition)):
            raise SagaDefinitionError(
                f"{place}: the action is {action!r}, which would be an independent run, of which this "
                "saga takes nothing back; put the definition itself in the step's place"
            )
        if compensation is not None:
            check_callable(place, "compensation", compensation)
            problem = compensation_problem(action, compensation)
            if problem is not None:
                raise SagaDefinitionError(
                    f"{place}: the compensation gets the action's arguments, and cannot take them: "
                    f"{problem}; to get the action's result instead, write undo="
                )
        if undo is not None:
            check_callable(place, "undo", undo)
            if not takes(undo, 1):
                raise SagaDefinitionError(
                    f"{place}: undo {name_of(undo)!r} gets one argument, the action's result, and "
                    "cannot take it; to get the action's arguments instead, write compensation="
                )
        not_applied = exception_types(f"{place}: not_applied", not_applied)
        check_seconds(place, "timeout", timeout)
        check_seconds(place, "compensation_timeout", compensation_timeout)
        check_retry(place, "retry", retry)
        check_retry(place, "compensation_retry", compensation_retry)
        going_back = [
            (kind, function)
            for kind, function in (("compensation", compensation), ("undo", undo))
            if function is not None
        ]
        if blocking:
            check_blocking(place, action, going_back, timeout, compensation_timeout)
        elif timeout is not None and not is_async(action):
            raise SagaDefinitionError(
                f"{place}: timeout={timeout!r}, but the action is not an async function, and a sync "
                "call cannot be timed out; write it as `async def`, or leave timeout away"
            )
        if shield and not blocking and not is_async(action):
            raise SagaDefinitionError(
                f"{place}: shield=True, but the action is not an async function; a sync call is "
                "never interrupted (in a worker thread: blocking=True, which is shielded anyway)"
            )
        if compensation_timeout is not None:
            for kind, function in going_back:
                if not is_async(function):
                    raise SagaDefinitionError(
                        f"{place}: compensation_timeout={compensation_timeout!r}, but the {kind} is "
                        "not an async function, and a sync call cannot be timed out"
                    )
        if not going_back:
            for option, value in (
                ("compensation_timeout", compensation_timeout),
                ("compensation_retry", compensation_retry),
            ):
                if value is not None:
                    raise SagaDefinitionError(
                        f"{place}: {option} is given, but there is neither a compensation nor an undo"
                    )
        put = partial(object.__setattr__, self)
        put("action", action)
        put("compensation", compensation)
        put("undo", undo)
        put("name", label)
        put("explicit_name", name is not None)
        put("known_async", is_coroutine_function(action))
        put("not_applied", not_applied)
        put("timeout", timeout)
        put("retry", retry)
        put("compensation_timeout", compensation_timeout)
        put("compensation_retry", compensation_retry)
        put("shield", bool(shield))
        put("blocking", bool(blocking))
        put("_known_calls", set())
        put("attempts", compose_attempts(cast("Step[..., Any]", self)))
        put("take_back", compose_back(cast("Step[..., Any]", self), compensation))
        put("take_undo", compose_back(cast("Step[..., Any]", self), undo))
        put("simple", self.attempts is None and self.known_async)

    def _call_problem(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> str | None:
        if not kwargs and fits(self.action, self.compensation, None, len(args)):
            return None
        for kind, function in (("action", self.action), ("compensation", self.compensation)):
            problem = function and call_problem(function, args, kwargs)
            if problem is not None:
                return f"the {kind} of step {self.name!r} cannot take these arguments: {problem}"
        return None


class Commit(Definition[..., None]):
    """The point of no return in a saga built as data: what is done before it stays done."""

    __slots__ = ()

    def __init__(self) -> None:
        """Makes one; it has no options, and one can stand in any number of sagas."""
        object.__setattr__(self, "name", "commit")
        object.__setattr__(self, "_known_calls", set())

    def _call_problem(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> str | None:
        del args, kwargs
        return None

    def holds_commit(self) -> bool:
        """Yes."""
        return True


def is_part(value: object) -> TypeGuard[Part]:
    """Tells whether a saga can be made of it."""
    return isinstance(value, Definition | Bound)


Part = Definition[..., Any] | Bound[Any]


def definition_of(part: Part) -> Definition[..., Any]:
    """Gives the definition of a part, bound or not."""
    return part.definition if isinstance(part, Bound) else part


def check_parts(place: str, parts: Iterable[object], *, in_group: bool, known: str) -> tuple[Part, ...]:
    """Checks the parts of a sequence, or the members of a group."""
    checked: list[Part] = []
    named: dict[str, Definition[..., Any]] = {}
    for index, part in enumerate(parts):
        if not is_part(part):
            raise SagaDefinitionError(
                f"{place}: {known} {index} must be a Step, a Parallel, a Saga or a Commit, not "
                f"{part!r}{_hint(part)}"
            )
        definition = definition_of(part)
        if definition.holds_commit() and (in_group or not isinstance(definition, Commit)):
            raise SagaDefinitionError(
                f"{place}: {known} {index}, {definition!r}, holds a commit; a commit belongs to the "
                "outermost sequence, not into a group or an inner saga"
            )
        if not in_group and isinstance(definition, Step) and definition.explicit_name:
            other = named.setdefault(definition.name, definition)
            if other is not definition:
                raise SagaDefinitionError(
                    f"{place}: two different steps have the name {definition.name!r}; give one of "
                    "them another"
                )
        checked.append(part)
    return tuple(checked)


def _hint(part: object) -> str:
    """Says what to write instead of what is no part."""
    if isinstance(part, CoroutineType):
        part.close()
        return f"; it is called already: write Step({part.__name__}).bind(...)"
    if isinstance(part, type):
        return f"; write {part.__name__}(...)" if issubclass(part, Definition) else ""
    if isinstance(part, tuple | list):
        return "; write Step(action, compensation) for one step, and *members for several parts"
    return f"; write Step({name_of(part)})" if callable(part) else ""


def parts_problem(
    parts: tuple[Part, ...], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> str | None:
    """Says which of the parts could not be called with the arguments of the run."""
    for part in parts:
        if not isinstance(part, Bound):
            problem = part._call_problem(args, kwargs)
            if problem is not None:
                return problem
    return None


class Parallel(Definition[..., tuple[Any, ...]]):
    """Members that run at the same time, and are compensated together.

    Its value is a tuple of the members' values, in the order of the members.
    """

    __slots__ = ("limit", "on_failure", "parts")

    parts: tuple[Part, ...]
    limit: int | None
    on_failure: OnFailure

    def __init__(
        self,
        *members: Definition[..., Any] | Bound[Any],
        name: str | None = None,
        limit: int | None = None,
        on_failure: OnFailure = "cancel",
    ) -> None:
        """Defines a group.

        Args:
            *members: Steps, groups and sagas, bound or not.
            name: For reports and messages.
            limit: How many members run at once, in the rollback too; None: all of them.
            on_failure: What happens to the others when a member fails: ``"cancel"`` cancels them at
                once; ``"finish"`` lets those in flight run to their own end, so that their outcome
                is known. Under both none starts any more.

        Raises:
            SagaDefinitionError: Something of this cannot work.
        """
        check_name("Parallel", name)
        place = f"Parallel {name!r}" if name else "Parallel"
        check_limit(place, limit)
        if on_failure not in ("cancel", "finish"):
            raise SagaDefinitionError(
                f'{place}: on_failure must be "cancel" or "finish", not {on_failure!r}'
            )
        put = partial(object.__setattr__, self)
        put("name", name or "parallel")
        put("parts", check_parts(place, members, in_group=True, known="member"))
        put("limit", limit)
        put("on_failure", on_failure)
        put("_known_calls", set())

    def _call_problem(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> str | None:
        return parts_problem(self.parts, args, kwargs)
