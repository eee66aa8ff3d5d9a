"""How values become bytes, and come back as what they were."""

from __future__ import annotations

import builtins
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

from pysagas import Bound, CompensationFailed, Step

from ._annotations import ParameterTypes, parameter_types
from ._errors import NotRecordable, RecordedError

__all__ = [
    "Codec",
    "JSONCodec",
    "as_bytes",
    "as_text",
    "decode_arguments",
    "decode_error",
    "encode_arguments",
    "encode_error",
    "encode_result",
    "function_of",
    "same_arguments",
    "text_of",
]

_Call = tuple[tuple[Any, ...], Mapping[str, Any]]
# What the arguments of a run are written as; made once, since a journal asks for it with each run.
_CALL = tuple[list[Any], dict[str, Any]]
# Where there is nobody to ask what arguments are, they are what JSON knows.
_PLAIN = ParameterTypes((), Any, {}, Any)


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

    # Types whose values come back as they were, if they can be written at all; a codec of the user's own
    # need not say so of any.
    plain: ClassVar[tuple[type, ...]] = (str, int, bool, type(None))

    def __init__(self) -> None:
        """Makes one.

        Raises:
            ImportError: msgspec is not installed.
        """
        try:
            from msgspec import to_builtins  # noqa: PLC0415 - an extra
            from msgspec.json import Decoder, Encoder  # noqa: PLC0415
        except ImportError as error:
            raise ImportError(
                'a journal needs msgspec, which is not installed: pip install "pysagas[durable]"'
            ) from error
        self._encode = Encoder(decimal_format="string").encode
        self._decoder: Callable[[Any], Any] = lru_cache(maxsize=1000)(Decoder)
        self._to_builtins = to_builtins

    def encode(self, value: object) -> bytes:
        """Gives the bytes of a value.

        Raises:
            ValueError: It holds a number that JSON does not have.
        """
        data = self._encode(value)
        if type(value) in self.plain:
            return data
        # msgspec writes null for them, which reads as if nothing had been there.
        if b"null" in data and _holds_no_number(self._to_builtins(value)):
            raise ValueError("it holds NaN or an infinity, and JSON has neither")
        return data

    def decode(self, data: bytes, kind: Any) -> Any:
        """Gives the value back."""
        return self._decoder(kind).decode(data)


def _holds_no_number(value: object) -> bool:
    """Tells whether there is a NaN or an infinity in a value that is made of builtins."""
    if isinstance(value, float):
        return not math.isfinite(value)
    inner: Iterable[object] = ()
    if isinstance(value, dict):
        inner = cast("dict[object, object]", value).values()
    elif isinstance(value, list | tuple):
        inner = cast("Iterable[object]", value)
    return any(map(_holds_no_number, inner))


# --- whom to ask for types ------------------------------------------------------------------------


def function_of(part: Any) -> Callable[..., Any] | None:
    """Gives the function whose annotations tell what a saga's arguments are; None where there is none."""
    if isinstance(part, Step):
        return cast("Step[..., Any]", part).action
    function = getattr(part, "function", None)
    if function is not None:
        return partial(function, None)  # without the scope
    parts: Sequence[Any] = getattr(part, "parts", ())
    for inner in parts:
        found = None if isinstance(inner, Bound) else function_of(inner)
        if found is not None:
            return found
    return None


# --- values -------------------------------------------------------------------------------------


def encode_result(
    codec: Codec, value: object, kind: Any, place: Callable[..., str], *where: object
) -> bytes:
    """Gives the bytes of a value that will come back equal.

    Args:
        codec: By which they are written.
        value: The value.
        kind: The type by which they will be read.
        place: Says for the message what gave the value; most values need none.
        *where: What that is called with.

    Raises:
        NotRecordable: They would not.
    """
    try:
        data = codec.encode(value)
    except Exception as error:
        raise NotRecordable(
            f"{place(*where)} gave {text_of(value, repr)}, which cannot be recorded: {error}; return plain "
            "values, dataclasses or msgspec structs, or give the journal, or the engine, a codec"
        ) from error
    if _is_plain(codec, value, kind):
        return data
    try:
        back = codec.decode(data, kind)
        same = type(back) is type(value) and bool(back == value or value != value)  # noqa: PLR0124 - NaN
        problem = f"would come back as {text_of(back, repr)}"
    except Exception as error:
        same, problem = False, f"cannot be read back: {error}"
    if not same:
        shown = "no type" if kind is Any else f"the type {kind!r}"
        raise NotRecordable(
            f"{place(*where)} gave {text_of(value, repr)}, which {problem}; it is annotated with {shown}: "
            "annotate it with the type that it has"
        )
    return data


def _is_plain(codec: Codec, value: object, kind: Any) -> bool:
    """Tells whether a value comes back as it is, which then need not be tried."""
    its = type(value)
    return (kind is its or kind is Any) and its in getattr(codec, "plain", ())


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
            "msgspec structs, or give the journal, or the engine, a codec"
        ) from error
    types = _types_of(function).by_position()
    if not kwargs and all(map(_is_plain, repeat(codec), args, types)):
        return data
    try:
        back = _read_arguments(codec, data, function)
    except Exception as error:
        raise NotRecordable(
            f"{place}: its arguments {_shown(args, kwargs)} are not what its parameters are annotated "
            f"with: {error}"
        ) from error
    if not _are_same((args, kwargs), back):
        raise NotRecordable(
            f"{place}: its arguments {_shown(args, kwargs)} would come back as {_shown(*back)}; "
            "annotate the parameters with the types that they have"
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
    try:
        return _read_arguments(codec, data, function)
    except Exception as error:
        raise NotRecordable(
            f"{place}: its recorded arguments {data.decode(errors='replace')} cannot be read: {error}; "
            "has the type of a parameter changed since?"
        ) from error


def _shown(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    return f"{text_of(args, repr)}, {text_of(dict(kwargs), repr)}"


def _read_arguments(codec: Codec, data: bytes, function: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    positional, named = codec.decode(data, _CALL)
    types = _types_of(function)
    return (
        tuple(_typed(codec, value, kind) for value, kind in zip(positional, types.by_position())),  # noqa: B905
        {
            name: _typed(codec, value, types.named.get(name, types.rest_named))
            for name, value in named.items()
        },
    )


def same_arguments(
    codec: Codec, data: bytes, args: tuple[Any, ...], kwargs: Mapping[str, Any], function: Any
) -> bool:
    """Tells whether recorded arguments are those that are given, though their bytes are others."""
    try:
        return _are_same((args, kwargs), decode_arguments(codec, data, function, ""))
    except NotRecordable:  # they were of other types
        return False


def _are_same(call: _Call, other: _Call) -> bool:
    (args, kwargs), (other_args, other_kwargs) = call, other
    if len(args) != len(other_args) or kwargs.keys() != other_kwargs.keys():
        return False
    pairs = chain(zip(args, other_args), ((kwargs[name], other_kwargs[name]) for name in kwargs))  # noqa: B905
    return all(type(one) is type(another) and one == another for one, another in pairs)


def _types_of(function: Callable[..., Any] | None) -> ParameterTypes:
    return _PLAIN if function is None else parameter_types(function)


def _typed(codec: Codec, value: object, kind: Any) -> Any:
    return value if kind is Any or type(value) is kind else codec.decode(codec.encode(value), kind)


def as_text(data: bytes) -> str:
    """Gives bytes as text for JSON, whatever the codec: each byte is a character."""
    return data.decode("latin-1")


def as_bytes(text: str) -> bytes:
    """Gives the bytes back."""
    return text.encode("latin-1")


# --- exceptions ---------------------------------------------------------------------------------


def encode_error(error: BaseException) -> dict[str, Any]:
    """Gives what is recorded of an exception: enough to make it again, or at least to name it."""
    kind = type(error)
    recorded: dict[str, Any] = {
        "type": f"{_module_of(kind)}:{kind.__qualname__}",
        "is_exception": isinstance(error, Exception),
        "text": text_of(error),
        "notes": [note for note in _notes(error) if isinstance(note, str)],
        # A field that is missing is better than one that is something else.
        "fields": {
            name: value
            for name, value in cast("dict[object, object]", vars(error)).items()
            if isinstance(name, str) and not name.startswith("__") and _comes_back(value)
        },
    }
    if isinstance(error, CompensationFailed):
        if error.error is not None:
            recorded["started_by"] = encode_error(error.error)
        # In their order, each with the note that names its step.
        recorded["failures"] = [encode_error(failure) for failure in error.failures]
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        recorded["text"] = group.message
        recorded["errors"] = [encode_error(one) for one in group.exceptions]
    else:
        # Of an OSError, `args` leave out the file.
        args = _builtin(kind).__reduce__(error)[1]
        recorded["args"] = [_encode_argument(one) for one in cast("tuple[Any, ...]", args)]
    return recorded


def _notes(error: BaseException) -> Iterable[object]:
    notes: object = getattr(error, "__notes__", ())
    return cast("list[object]", notes) if isinstance(notes, list) else ()


def text_of(value: object, say: Callable[[Any], str] = str) -> str:
    """Gives what an exception, or another value, says, if it can say it."""
    try:
        return say(value)
    except Exception as failure:
        return f"<its text cannot be made: {failure!r}>"


def _builtin(kind: type[BaseException]) -> type[BaseException]:
    """Gives the builtin class that makes what is underneath an exception, in C."""
    mro: tuple[Any, ...] = kind.__mro__
    return cast(
        "type[BaseException]", next(base for base in mro if getattr(builtins, base.__name__, 0) is base)
    )


def _comes_back(value: object) -> bool:
    try:
        back = json.loads(json.dumps(value))
    except Exception:
        return False
    return type(back) is type(value) and bool(back == value)


class _Said(str):
    """Stands for an argument of an exception that is not plain, and says what that said."""

    __slots__ = ("shown",)
    shown: str

    def __repr__(self) -> str:
        return self.shown


def _encode_argument(value: object) -> Any:
    """Gives a plain value as it is; anything else as an object of JSON, which says what it is."""
    if type(value) is bytes:
        return {"bytes": value.decode("latin-1")}  # each byte is a character
    if not _comes_back(value):
        return {"text": text_of(value), "repr": text_of(value, repr)}
    return value if type(value) is not dict else {"dict": cast("object", value)}


def _decode_argument(recorded: Any) -> Any:
    if not isinstance(recorded, dict):
        return recorded
    value = cast("dict[str, Any]", recorded)
    if "dict" in value:
        return value["dict"]
    if "bytes" in value:
        return value["bytes"].encode("latin-1")
    said = _Said(value["text"])
    said.shown = value["repr"]
    return said


def decode_error(recorded: Mapping[str, Any]) -> BaseException:
    """Makes a recorded exception again, without calling its ``__init__``.

    Only of a class that is loaded: a journal does not import what its file names. Where that is not
    possible, a `RecordedError` stands for it; for a group, a builtin one. Arguments that are not
    plain are strings that say what was there, and fields that are not plain are missing.
    """
    error = _rebuilt(recorded)
    if error is None:
        error = RecordedError(f"{recorded['type']}: {recorded['text']}")
        error.kind = recorded["type"]
    elif "errors" not in recorded and text_of(error) != recorded["text"]:
        error.add_note(recorded["text"])  # its text is made of what is missing
    for note in recorded["notes"]:
        error.add_note(note)
    return error


def _rebuilt(recorded: Mapping[str, Any]) -> BaseException | None:
    kind = _class_of(recorded["type"])
    if "errors" in recorded:
        errors = [decode_error(one) for one in recorded["errors"]]
        group = _made(kind, [recorded["text"], errors], recorded["fields"])
        return BaseExceptionGroup(recorded["text"], errors) if group is None else group
    return _made(kind, [_decode_argument(one) for one in recorded["args"]], recorded["fields"])


# The file of a program is `__main__` where it is run, and has a name of its own where it is imported: by
# the command, by a worker, by the next version of the program. Recorded is what it has everywhere.
def _name_of_main() -> str:
    main = sys.modules["__main__"]
    spec = main.__spec__  # where it is run by `python -m`
    return Path(getattr(main, "__file__", "__main__")).stem if spec is None else spec.name


def _module_of(kind: type) -> str:
    return _name_of_main() if kind.__module__ == "__main__" else kind.__module__


def _class_of(recorded: str) -> Any:
    """Finds a recorded class, if it is loaded; gives None where it is not."""
    module, _, name = recorded.partition(":")
    places = [module] if module != _name_of_main() else ["__main__", module]
    for place in places:
        kind: Any = sys.modules.get(place)
        for part in name.split("."):
            kind = getattr(kind, part, None)
        if kind is not None:
            return kind
    return None


def _made(kind: Any, args: list[Any], fields: Mapping[str, Any]) -> BaseException | None:
    if not inspect.isclass(kind) or not issubclass(kind, BaseException):
        return None
    builtin: Any = _builtin(kind)
    try:
        error: BaseException = builtin.__new__(kind, *args)
        builtin.__init__(error, *args)
        vars(error).update(fields)
    except Exception:
        return None
    return error
