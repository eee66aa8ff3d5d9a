"""What functions say of the values that they take and give: the types by which those are read back."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import lru_cache, partial
from itertools import chain, repeat
from types import FunctionType, MethodType
from typing import Any, NamedTuple
from weakref import ref

__all__ = ["ParameterTypes", "parameter_types", "return_type"]


class ParameterTypes(NamedTuple):
    """The types of a function's parameters; Any for those that have none."""

    positional: tuple[Any, ...]
    rest: Any
    named: Mapping[str, Any]
    rest_named: Any

    def by_position(self) -> Iterable[Any]:
        """Gives the types of arguments by position, without an end."""
        return chain(self.positional, repeat(self.rest))


class _Given(NamedTuple):
    """What of a function's parameters has its argument already: how many by position, and which by name."""

    positions: int = 0
    names: tuple[str, ...] = ()


_NOTHING = _Given()

# Both ask for the same few functions again and again, and reading annotations is slow. What is kept
# is found by a weak reference: an action may be a closure, or a method of an object, that a request
# made for itself, and everything it refers to would be kept with it. Two weak references to one
# function are the same, and equal as long as it lives.
_Function = ref[Any]


def return_type(function: Callable[..., Any]) -> Any:
    """Gives the type that a function says it returns; Any where it does not say."""
    if type(function) is not FunctionType:
        function = _taken_apart(function)[0]
    try:
        return _return_type(ref(function))
    except TypeError:  # it has no hash, or no weak reference, so it is asked each time
        return _return_type.__wrapped__(lambda: function)


def parameter_types(function: Callable[..., Any]) -> ParameterTypes:
    """Gives the types of the parameters that are left to give."""
    given = _NOTHING
    if type(function) is not FunctionType:
        function, given = _taken_apart(function)
    try:
        return _parameter_types(ref(function), given)
    except TypeError:
        return _parameter_types.__wrapped__(lambda: function, given)


def _taken_apart(function: Any) -> tuple[Any, _Given]:
    """Gives the function or class that carries the annotations of something callable, and what it has."""
    given = _NOTHING
    while type(function) is not FunctionType:
        if isinstance(function, partial):
            names = dict.fromkeys((*given.names, *function.keywords))
            given = _Given(given.positions + len(function.args), tuple(names))
            function = function.func
        elif isinstance(function, MethodType):
            given = given._replace(positions=given.positions + 1)
            function = function.__func__
        elif inspect.isroutine(function) or inspect.isclass(function):
            break
        else:  # an object with a method for being called
            given = given._replace(positions=given.positions + 1)
            function = type(function).__call__
    return function, given


@lru_cache(maxsize=10_000)
def _return_type(function: _Function) -> Any:
    made = function()
    if inspect.isclass(made):
        return made
    kind = _hints(made).get("return", Any)
    # A sync function that returns a coroutine says so.
    origin = typing.get_origin(kind) or kind
    if inspect.isclass(origin) and issubclass(origin, Awaitable):
        return (Any, *typing.get_args(kind))[-1]
    return type(None) if kind is None else kind


@lru_cache(maxsize=10_000)
def _parameter_types(function: _Function, given: _Given) -> ParameterTypes:
    made = function()
    hints = _hints(made)
    positional: list[Any] = []
    named: dict[str, Any] = {}
    rest: Any = Any
    rest_named: Any = Any
    for parameter in _left_to_give(made, given):
        kind = hints.get(parameter.name, Any)
        unpacked = typing.get_origin(kind) is typing.Unpack
        if parameter.kind is parameter.VAR_POSITIONAL:
            rest = Any if unpacked else kind
        elif parameter.kind is not parameter.VAR_KEYWORD:
            if parameter.kind is not parameter.KEYWORD_ONLY:
                positional.append(kind)
            if parameter.kind is not parameter.POSITIONAL_ONLY:
                named[parameter.name] = kind
        elif unpacked:  # **options: Unpack[Options], a TypedDict
            named.update(typing.get_type_hints(typing.get_args(kind)[0]))
        else:
            rest_named = kind
    return ParameterTypes(tuple(positional), rest, named, rest_named)


def _left_to_give(function: Any, given: _Given) -> Iterable[inspect.Parameter]:
    # `inspect` knows how arguments fill parameters; it need not see the arguments.
    filled = partial(function, *[None] * given.positions, **dict.fromkeys(given.names))
    try:
        return inspect.signature(filled).parameters.values()
    except ValueError:  # some of those written in C do not say
        return ()


def _hints(function: Any) -> Mapping[str, Any]:
    """Gives the resolved annotations of a function; of what cannot be resolved, none."""
    try:
        return typing.get_type_hints(inspect.unwrap(function))
    except Exception:
        return {}
