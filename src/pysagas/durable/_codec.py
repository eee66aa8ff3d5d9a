"""How values become bytes, and come back as what they were."""

from __future__ import annotations

import inspect
import json
import sys
import typing
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import lru_cache, partial
from itertools import chain, repeat
from typing import Any, NamedTuple, Protocol, cast

from ._errors import NotRecordable, RecordedError

__all__ = [
    "Codec",
    "JSONCodec",
    "decode_arguments",
    "decode_error",
    "encode_arguments",
    "encode_error",
    "encode_result",
    "return_type",
    "text_of",
]


class Codec(Protocol):
    """Writes values for a journal, and reads them."""

    def encode(self, value: object) -> bytes:
        """Gives the bytes of a value.

        Raises:
            Exception: It cannot be written.
        """
        ...

    def decode(self, data: bytes, kind: Any) -> Any:
        """Gives the value back.

        Args:
            data: What `encode` gave.
            kind: Its type, as annotated; `typing.Any` where nothing is known.

        Raises:
            Exception: It cannot be read as that type.
        """
        ...


class JSONCodec:
    """JSON, by msgspec: plain values, dataclasses, enums, datetimes, Decimals, UUIDs, structs."""

    def __init__(self) -> None:
        """Makes one.

        Raises:
            ImportError: msgspec is not installed.
        """
        try:
            from msgspec.json import Decoder, Encoder  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise ImportError(
                'a journal needs msgspec, which is not installed: pip install "pysagas[durable]"'
            ) from error
        self._encode = Encoder(decimal_format="string").encode
        self._decoder: Callable[[Any], Any] = lru_cache(maxsize=1000)(Decoder)

    def encode(self, value: object) -> bytes:
        """Gives the bytes of a value."""
        return self._encode(value)

    def decode(self, data: bytes, kind: Any) -> Any:
        """Gives the value back."""
        return self._decoder(kind).decode(data)


# --- types --------------------------------------------------------------------------------------


def _hints(function: Any) -> Mapping[str, Any]:
    """Gives the resolved annotations of a function; of what cannot be resolved, none."""
    while isinstance(function, partial):
        function = cast("Any", function.func)
    if not inspect.isroutine(function) and not inspect.isclass(function):
        function = type(function).__call__
    function = inspect.unwrap(getattr(function, "__func__", function))
    try:
        return typing.get_type_hints(function)
    except Exception:
        return {}


@lru_cache(maxsize=10_000)
def _return_type(function: Any) -> Any:
    if inspect.isclass(function):
        return function
    kind = _hints(function).get("return", Any)
    # A sync function that returns a coroutine says so.
    origin = typing.get_origin(kind) or kind
    if inspect.isclass(origin) and issubclass(origin, Awaitable):
        return (Any, *typing.get_args(kind))[-1]
    return type(None) if kind is None else kind


def return_type(function: Callable[..., Any]) -> Any:
    """Gives the type that a function says it returns; Any where it does not say."""
    return _once_for_each(_return_type, function)


def _once_for_each(cached: Any, function: Any) -> Any:
    try:
        return cached(function)
    except TypeError:  # it cannot be hashed, so it is asked each time
        return cached.__wrapped__(function)


# --- values -------------------------------------------------------------------------------------


def encode_result(codec: Codec, value: object, kind: Any, place: str) -> bytes:
    """Gives the bytes of a value that will come back equal.

    Raises:
        NotRecordable: They would not.
    """
    try:
        data = codec.encode(value)
    except Exception as error:
        raise NotRecordable(
            f"{place} gave {value!r}, which cannot be recorded: {error}; return plain values, "
            "dataclasses or msgspec structs, or give the journal a codec"
        ) from error
    try:
        back = codec.decode(data, kind)
        same = type(back) is type(value) and bool(back == value or value != value)  # noqa: PLR0124 - NaN
        problem = f"would come back as {back!r}"
    except Exception as error:
        same, problem = False, f"cannot be read back: {error}"
    if not same:
        shown = "no type" if kind is Any else f"the type {kind!r}"
        raise NotRecordable(
            f"{place} gave {value!r}, which {problem}; it is annotated with {shown}: annotate it with "
            "the type that it has"
        )
    return data


def encode_arguments(
    codec: Codec, args: tuple[Any, ...], kwargs: Mapping[str, Any], function: Any, place: str
) -> bytes:
    """Gives the bytes of the arguments of a run.

    Raises:
        NotRecordable: They would not come back as they were.
    """
    try:
        data = codec.encode([args, kwargs])
    except Exception as error:
        raise NotRecordable(
            f"{place}: its arguments cannot be recorded: {error}; give plain values, dataclasses or "
            "msgspec structs, or give the journal a codec"
        ) from error
    back = decode_arguments(codec, data, function, place)
    pairs = [*zip(args, back[0], strict=True), *((kwargs[name], back[1][name]) for name in kwargs)]
    if any(type(one) is not type(other) or one != other for one, other in pairs):
        raise NotRecordable(
            f"{place}: its arguments {args!r}, {dict(kwargs)!r} would come back as {back[0]!r}, "
            f"{back[1]!r}; annotate the parameters with the types that they have"
        )
    return data


def decode_arguments(
    codec: Codec, data: bytes, function: Any, place: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Gives the arguments back.

    Args:
        codec: By which they were written.
        data: What was written.
        function: Whose annotations tell their types; None where there is nobody to ask.
        place: For the message.

    Raises:
        NotRecordable: They cannot be read as what they are annotated with.
    """
    positional, named = codec.decode(data, tuple[list[Any], dict[str, Any]])
    types: _ParameterTypes = _once_for_each(_parameter_types, function)
    by_position = chain(types.positional, repeat(types.rest))
    try:
        return (
            tuple(_typed(codec, value, kind) for value, kind in zip(positional, by_position)),  # noqa: B905
            {name: _typed(codec, value, types.named.get(name, Any)) for name, value in named.items()},
        )
    except Exception as error:
        raise NotRecordable(
            f"{place}: its recorded arguments {data.decode(errors='replace')} cannot be read: {error}; "
            "has the type of a parameter changed since?"
        ) from error


class _ParameterTypes(NamedTuple):
    """The types of a function's parameters; Any for those that have none."""

    positional: tuple[Any, ...]
    rest: Any
    named: Mapping[str, Any]


@lru_cache(maxsize=10_000)
def _parameter_types(function: Any) -> _ParameterTypes:
    hints = _hints(function)
    positional: list[Any] = []
    rest: Any = Any
    for parameter in _parameters(function):
        kind = hints.get(parameter.name, Any)
        if parameter.kind is parameter.VAR_POSITIONAL:
            rest = kind
        elif parameter.kind is not parameter.KEYWORD_ONLY:
            positional.append(kind)
    return _ParameterTypes(tuple(positional), rest, hints)


def _parameters(function: Any) -> Iterable[inspect.Parameter]:
    try:
        return () if function is None else inspect.signature(function).parameters.values()
    except ValueError:  # some of those written in C do not say
        return ()


def _typed(codec: Codec, value: object, kind: Any) -> Any:
    return value if kind is Any else codec.decode(codec.encode(value), kind)


# --- exceptions ---------------------------------------------------------------------------------


def encode_error(error: BaseException) -> dict[str, Any]:
    """Gives what is recorded of an exception: enough to make it again, or at least to name it."""
    kind = type(error)
    recorded: dict[str, Any] = {
        "type": f"{kind.__module__}:{kind.__qualname__}",
        "text": text_of(error),
        "notes": list(getattr(error, "__notes__", ())),
    }
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        recorded["text"] = group.message
        recorded["errors"] = [encode_error(one) for one in group.exceptions]
        return recorded
    fields = {
        name: value
        for name, value in vars(error).items()
        if not name.startswith("__") and _comes_back(value)
    }
    if all(_comes_back(value) for value in error.args):
        recorded["args"] = list(error.args)
        recorded["fields"] = fields
    return recorded


def text_of(error: BaseException) -> str:
    """Gives what an exception says, if it can say it."""
    try:
        return str(error)
    except Exception as failure:
        return f"<its text cannot be made: {failure!r}>"


def _comes_back(value: object) -> bool:
    try:
        back = json.loads(json.dumps(value))
    except Exception:
        return False
    return type(back) is type(value) and bool(back == value)


def decode_error(recorded: Mapping[str, Any]) -> BaseException:
    """Makes a recorded exception again, without calling its ``__init__``.

    Only of a class that is loaded: a journal does not import what its file names. Where that is not
    possible, a `RecordedError` stands for it.
    """
    error = _rebuilt(recorded)
    if error is None:
        error = RecordedError(f"{recorded['type']}: {recorded['text']}")
        error.kind = recorded["type"]
    for note in recorded["notes"]:
        error.add_note(note)
    return error


def _rebuilt(recorded: Mapping[str, Any]) -> BaseException | None:
    if "errors" in recorded:
        errors = [decode_error(one) for one in recorded["errors"]]
        return BaseExceptionGroup(recorded["text"], errors)
    module, _, name = recorded["type"].partition(":")
    kind: Any = sys.modules.get(module)
    for part in name.split("."):
        kind = getattr(kind, part, None)
    if "args" not in recorded or not inspect.isclass(kind) or not issubclass(kind, BaseException):
        return None
    try:
        error = kind.__new__(kind, *recorded["args"])
        error.args = tuple(recorded["args"])
        vars(error).update(recorded["fields"])
    except Exception:
        return None
    return error
