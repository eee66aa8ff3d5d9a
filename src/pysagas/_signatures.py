"""What a callable can take, and whether it is async: asked before anything runs.

`inspect.signature` costs some 10 µs a function, too much for a step that is written inline and
checked at every call. So the ordinary cases, functions and methods, are read off the code object;
everything else goes the long way. A callable whose signature nobody knows (some are written in C)
is taken to accept anything: its own error will tell.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from types import CoroutineType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, TypeGuard

__all__ = [
    "CO_ASYNC_GENERATOR",
    "call_problem",
    "compensation_problem",
    "fits",
    "has_coroutine_code",
    "is_async",
    "is_awaitable",
    "is_coroutine_function",
    "is_generator",
    "name_of",
    "takes",
    "takes_positional",
]

if TYPE_CHECKING:
    from inspect import Signature

Function = Callable[..., object]

# Flags of code objects, as the documentation of `inspect` names them. That module takes longer to
# import than AnyIO; it is imported where something has to be read that is not on the code object.
CO_VARARGS = 0x04
CO_GENERATOR = 0x20
CO_COROUTINE = 0x80
CO_ASYNC_GENERATOR = 0x200

_GENERATOR = CO_GENERATOR | CO_ASYNC_GENERATOR


def is_awaitable(value: object) -> TypeGuard[Awaitable[Any]]:
    """Tells whether a value can be awaited."""
    return value.__class__ is CoroutineType or (value is not None and isinstance(value, Awaitable))


def is_coroutine_function(function: Function) -> bool:
    """Tells whether calling it certainly gives a coroutine."""
    from inspect import iscoroutinefunction  # noqa: PLC0415 - see above

    if iscoroutinefunction(function):  # sees through functools.partial and methods
        return True
    # Of the type: a proxy object would make a remote call of a look at its attributes.
    return iscoroutinefunction(
        getattr(type(function), "__call__", None)  # noqa: B004 - the method itself is wanted
    )


def is_async(function: Function) -> bool:
    """Tells whether it is async as far as its author says, seen through ``functools.wraps``."""
    seen: Any = function
    while not is_coroutine_function(seen):
        inner = (
            seen.func if isinstance(seen, partial) else getattr(seen, "__dict__", {}).get("__wrapped__")
        )
        if inner is None:
            return False
        seen = inner
    return True


def is_generator(function: Function) -> bool:
    """Tells whether calling it only makes a generator, of which nothing has run."""
    from inspect import isasyncgenfunction, isgeneratorfunction  # noqa: PLC0415 - see above

    return isgeneratorfunction(function) or isasyncgenfunction(function)


def fits(action: Function, compensation: Function | None, undo: Function | None, count: int) -> bool:
    """Tells whether a step's functions can take what they will get.

    Asked at each call of a step that is written inline, so the ordinary case is read off here: plain
    functions with just as many parameters as there are arguments.
    """
    return (
        _fits(action, count)
        and (compensation is None or _fits(compensation, count))
        and (undo is None or _fits(undo, 1))
    )


def _fits(function: Function, count: int) -> bool:
    if function.__class__ is FunctionType:
        code = function.__code__
        if code.co_argcount == count and not (code.co_kwonlyargcount or code.co_flags & _GENERATOR):
            return True
    return takes(function, count) and not is_generator(function)


def has_coroutine_code(function: Function) -> bool:
    """Tells quickly whether it is an ``async def`` function or method; others may be async too."""
    code = getattr(function, "__code__", None)
    return code is not None and bool(code.co_flags & CO_COROUTINE)


def name_of(function: object) -> str:
    """Gives the name by which a person knows a callable."""
    while isinstance(function, partial):
        function = function.func
    name = getattr(function, "__name__", None)
    return name if isinstance(name, str) else type(function).__name__


def takes(function: Function, count: int) -> bool:
    """Tells whether it can be called with so many positional arguments and nothing else."""
    target: Any = function
    wanted = count
    if not isinstance(target, FunctionType | type) and not hasattr(target, "__signature__"):
        # Of an object with a method ``__call__``, such as a middleware, that is what is called.
        bound = target if type(target) is MethodType else getattr(target, "__call__", None)  # noqa: B004
        if type(bound) is MethodType:
            target = bound.__func__
            wanted += 1
        elif type(bound) is FunctionType:  # a static method, which `inspect` takes for one of an object
            target = bound
    if type(target) is FunctionType:
        code = target.__code__
        if wanted > code.co_argcount:
            if not code.co_flags & CO_VARARGS:
                return False
        elif wanted < code.co_argcount - len(target.__defaults__ or ()):
            return False
        return not code.co_kwonlyargcount or code.co_kwonlyargcount == len(target.__kwdefaults__ or ())
    return callable(target) and call_problem(function, (None,) * count, {}) is None


def _signature(function: Function) -> Signature | None:
    from inspect import signature  # noqa: PLC0415 - see above

    try:
        # What it takes itself: a decorator may well add or take away arguments of what it wraps.
        return signature(function, follow_wrapped=False)
    except Exception:  # nobody knows it; or asking ran code of the object's own, which failed
        return None


def takes_positional(function: Function) -> bool:
    """Tells whether it can be given a positional argument at all."""
    known = _signature(function)
    return known is None or any(
        parameter.kind not in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD)
        for parameter in known.parameters.values()
    )


def call_problem(
    function: Function, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> str | None:
    """Says why it cannot be called so; None where it can, or where nobody knows."""
    known = _signature(function)
    if known is None:
        return None
    try:
        known.bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return None


def compensation_problem(action: Function, compensation: Function) -> str | None:
    """Says why a compensation cannot take what its action takes; None where it can.

    Two calls are tried: the shortest and the longest that the action accepts. Names are not
    compared, since most calls are positional; a call by keyword is checked when it is made. An
    action with ``*args`` or ``**kwargs`` says nothing about its calls, which are checked then too.
    """
    if _same_shape(action, compensation):
        return None
    known = _signature(action)
    if known is None:
        return None
    shortest: tuple[list[object], dict[str, object]] = ([], {})
    longest: tuple[list[object], dict[str, object]] = ([], {})
    for name, parameter in known.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            return None
        for positional, keyword in (
            [longest] if parameter.default is not parameter.empty else [shortest, longest]
        ):
            if parameter.kind is parameter.KEYWORD_ONLY:
                keyword[name] = None
            else:
                positional.append(None)
    for positional, keyword in (shortest, longest):
        problem = call_problem(compensation, tuple(positional), keyword)
        if problem is not None:
            return f"{name_of(action)}{known}, but {name_of(compensation)}: {problem}"
    return None


def _same_shape(first: object, second: object) -> bool:
    if type(first) is not FunctionType or type(second) is not FunctionType:
        return False
    one, other = first.__code__, second.__code__
    return (
        one.co_argcount == other.co_argcount
        and not one.co_kwonlyargcount
        and not other.co_kwonlyargcount
        and len(first.__defaults__ or ()) == len(second.__defaults__ or ())
    )
