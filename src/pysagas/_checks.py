"""What is wrong with what was given: each check says what that was, where, and what to write instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from types import CoroutineType
from typing import Literal, cast

from ._errors import SagaDefinitionError
from ._signatures import is_async, is_awaitable, is_generator, name_of, takes

__all__ = [
    "Exceptions",
    "OnCompensationFailure",
    "OnFailure",
    "check_blocking",
    "check_callable",
    "check_limit",
    "check_middleware",
    "check_name",
    "check_retry",
    "check_saga_options",
    "check_seconds",
    "exception_types",
    "shown_call",
]

Exceptions = type[Exception] | tuple[type[Exception], ...]
OnFailure = Literal["cancel", "finish"]
OnCompensationFailure = Literal["continue", "stop"]


def check_callable(place: str, what: str, value: object) -> None:
    if not callable(value):
        given = repr(value)
        if is_awaitable(value):
            given = "a coroutine, which is called already; give the function, and its arguments apart"
        if isinstance(value, CoroutineType):
            value.close()
        raise SagaDefinitionError(
            f"{place}: the {what} must be a function, or another callable, not {given}"
        )
    if is_generator(value):
        raise SagaDefinitionError(
            f"{place}: the {what} {name_of(value)!r} is a generator function, and calling it runs "
            "nothing; write it without `yield`"
        )


def check_name(place: str, name: object, *, what: str = "name") -> None:
    """Refuses what is no name."""
    if name is not None and (not isinstance(name, str) or not name):
        raise SagaDefinitionError(f"{place}: {what} must be a non-empty string, not {name!r}")


def check_limit(place: str, limit: object) -> None:
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise SagaDefinitionError(
            f"{place}: limit must be a whole number of members, at least 1, or None for all at "
            f"once, not {limit!r}"
        )


def check_seconds(place: str, what: str, value: object) -> None:
    """Refuses what is no time in seconds."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= inf:
        raise SagaDefinitionError(
            f"{place}: {what} must be seconds, zero or more, or None for no limit, not {value!r}"
        )


def check_saga_options(
    place: str,
    name: object,
    rollback_timeout: object,
    on_compensation_failure: object,
    middleware: object,
    version: object = None,
) -> None:
    """Refuses options that no saga can have."""
    check_name(place, name)
    check_name(place, version, what="version")
    check_seconds(place, "rollback_timeout", rollback_timeout)
    if on_compensation_failure not in ("continue", "stop"):
        raise SagaDefinitionError(
            f'{place}: on_compensation_failure must be "continue" or "stop", not '
            f"{on_compensation_failure!r}"
        )
    check_middleware(place, middleware)


def check_middleware(place: str, middleware: object) -> None:
    if not isinstance(middleware, (tuple, list)):
        raise SagaDefinitionError(
            f"{place}: middleware must be a list or a tuple of callables, not {middleware!r}"
        )
    for one in cast("tuple[Callable[..., object], ...]", middleware):
        if not takes(one, 2):
            raise SagaDefinitionError(
                f"{place}: a middleware must be an async callable of (effect, call_next), not {one!r}"
            )


def exception_types(what: str, types: object) -> tuple[type[Exception], ...]:
    """Gives one exception type, or a tuple of them, as a tuple.

    Raises:
        SagaDefinitionError: Something else was given, or a type that is no failure.
    """
    if types is None:
        return ()
    listed = cast("tuple[object, ...]", types if isinstance(types, tuple) else (types,))
    for listed_type in listed:
        if not isinstance(listed_type, type) or not issubclass(listed_type, BaseException):
            raise SagaDefinitionError(
                f"{what} must be an exception type, or a tuple of them, not {types!r}"
            )
        if not issubclass(listed_type, Exception):
            raise SagaDefinitionError(
                f"{what}: {listed_type.__name__} is no failure but an order to stop (cancellation, "
                "KeyboardInterrupt, SystemExit), which always goes on to the caller; name subclasses "
                "of Exception"
            )
    return cast("tuple[type[Exception], ...]", listed)


def check_retry(place: str, what: str, retry: object) -> None:
    if retry is None:
        return
    remedy = (
        "write for instance stamina.AsyncRetryingCaller(attempts=3).on(OSError) or "
        "tenacity.AsyncRetrying(reraise=True, ...)"
    )
    if not callable(retry):
        raise SagaDefinitionError(
            f"{place}: {what} must be an async callable that awaits the function it is given, not "
            f"{retry!r}; {remedy}"
        )
    if not is_async(retry):
        raise SagaDefinitionError(
            f"{place}: {what} {retry!r} is not async; a sync retrier would call the async function "
            f"once and never retry; {remedy}"
        )
    if not takes(retry, 1):
        raise SagaDefinitionError(
            f"{place}: {what} {retry!r} cannot take one argument, the function to call; {remedy}"
        )


def check_blocking(
    place: str,
    action: Callable[..., object],
    going_back: list[tuple[str, Callable[..., object]]],
    timeout: float | None,
    compensation_timeout: float | None,
) -> None:
    if timeout is not None or (
        compensation_timeout is not None and not all(is_async(function) for _, function in going_back)
    ):
        raise SagaDefinitionError(
            f"{place}: blocking=True with a timeout; a thread cannot be timed out. Give the limit to "
            "what the function calls (a socket, a query), or write it as `async def`"
        )
    if is_async(action):
        raise SagaDefinitionError(
            f"{place}: blocking=True, but the action is async; it is for functions that block. "
            "To let an async action run to its end, write shield=True"
        )


def shown_call(args: tuple[object, ...], kwargs: Mapping[str, object]) -> str:
    shown = [*map(_shortened, args), *(f"{name}={_shortened(value)}" for name, value in kwargs.items())]
    return f"({', '.join(shown)})"


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
