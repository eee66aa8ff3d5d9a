"""What is recorded comes back as what it was, or is refused, by name, where it stands (D5)."""

from __future__ import annotations

import json
import subprocess
import sys
import typing
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum
from functools import partial, wraps
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, Self, TypedDict
from uuid import UUID

import msgspec
import pytest
from mortal import Killed, MortalJournal

from pysagas import CompensationFailed, Outcome, Parallel, Saga, SagaScope, SagaState, Step, saga
from pysagas.durable import (
    Codec,
    JSONCodec,
    MemoryJournal,
    NotRecordable,
    RecordedError,
    Recovered,
    RunState,
    SagaChanged,
    _codec,
)
from pysagas.durable._annotations import return_type
from pysagas.durable._codec import (
    decode_arguments,
    decode_error,
    encode_arguments,
    encode_error,
    encode_result,
)

CODEC = JSONCodec()


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Level(IntEnum):
    LOW = 1


class Seat(msgspec.Struct):
    row: int
    letter: str


class Pair(NamedTuple):
    left: int
    right: Decimal


@dataclass(frozen=True)
class Leg:
    at: datetime
    price: Decimal


@dataclass
class Trip:
    id: UUID
    legs: tuple[Leg, ...]
    colour: Colour | None = None


NOON = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)
LEG = Leg(NOON, Decimal("10.50"))
TRIP = Trip(UUID(int=7), (LEG, LEG), Colour.BLUE)

VALUES: list[Any] = [
    pytest.param(TRIP, Trip, id="dataclass"),
    pytest.param([TRIP], list[Trip], id="list of dataclasses"),
    pytest.param({"a": LEG}, dict[str, Leg], id="dict of dataclasses"),
    pytest.param(TRIP, Trip | None, id="optional"),
    pytest.param(Colour.RED, Colour, id="enum"),
    pytest.param(Level.LOW, Level, id="int enum"),
    pytest.param(NOON, datetime, id="datetime"),
    pytest.param(datetime(2026, 3, 1), datetime, id="naive datetime"),
    pytest.param(date(2026, 3, 1), date, id="date"),
    pytest.param(time(12, 30), time, id="time"),
    pytest.param(timedelta(hours=1, microseconds=1), timedelta, id="timedelta"),
    pytest.param(Decimal("1.10"), Decimal, id="Decimal"),
    pytest.param(UUID(int=3), UUID, id="UUID"),
    pytest.param(Seat(4, "b"), Seat, id="struct"),
    pytest.param((1, "x", LEG), tuple[int, str, Leg], id="tuple"),
    pytest.param(Pair(1, Decimal("0.1")), Pair, id="named tuple"),
    pytest.param(frozenset({1, 2}), frozenset[int], id="frozenset"),
    pytest.param({1: "x"}, dict[int, str], id="dict of int"),
    pytest.param(None, None, id="None"),
    pytest.param(b"\x00\xff", bytes, id="bytes"),
    pytest.param(2**80, int, id="int"),
    pytest.param(0.1, float, id="float"),
    pytest.param({"a": [1, 2.5, "x", True, None]}, Any, id="plain"),
]


def shapes(value: Any, kind: Any) -> dict[str, Callable[[], Any]]:
    """Functions of each sort that give the value, and say what it is."""

    async def of_async() -> None:
        return value

    def of_sync() -> None:
        return value

    def of_awaitable() -> None:
        return of_async()

    def of_coroutine() -> None:
        return of_async()

    class Shop:
        def method(self) -> None:
            return value

        def __call__(self) -> None:
            return value

    def of_two(first: object, second: object) -> None:
        return value

    annotated = {
        of_async: kind,
        of_sync: kind,
        of_awaitable: Awaitable[kind],
        of_coroutine: Coroutine[Any, Any, kind],
        Shop.method: kind,
        Shop.__call__: kind,
        of_two: kind,
    }
    for function, returned in annotated.items():
        function.__annotations__["return"] = returned

    @wraps(of_sync, assigned=())
    def wrapped(*args: object) -> Any:
        return of_sync(*args)

    shop = Shop()
    return {
        "async": of_async,
        "sync": of_sync,
        "awaitable": of_awaitable,
        "coroutine": of_coroutine,
        "method": shop.method,
        "object": shop,
        "partial": partial(partial(of_two, 1), second=2),
        "partial of a method": partial(shop.method),
        "partial of an object": partial(shop),
        "wrapped": wrapped,
    }


SHAPES = list(shapes(None, None))


def same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


# --- results --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("value", "kind"), VALUES)
def test_d5_a_result_comes_back_as_it_was_by_the_return_annotation(value, kind, shape):
    """Of each sort of function, its return annotation tells what its result is (D5)."""
    returned = return_type(shapes(value, kind)[shape])

    back = CODEC.decode(encode_result(CODEC, value, returned, lambda: "here"), returned)

    assert same(back, value)


class Booking:
    """A class as an action."""

    def __init__(self, number: int) -> None: ...


@dataclass
class Unhashable:
    """An action that cannot be a key: it is asked each time."""

    number: int

    def __call__(self) -> Leg: ...


class Static:
    @staticmethod
    def static() -> Leg: ...

    @classmethod
    def of_class(cls) -> Leg: ...


def unresolvable() -> Missing: ...  # noqa: F821


def unannotated(): ...


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param(Trip, Trip, id="dataclass"),
        pytest.param(Booking, Booking, id="class"),
        pytest.param(Unhashable(1), Leg, id="unhashable"),
        pytest.param(partial(Unhashable(1)), Leg, id="partial of an unhashable"),
        pytest.param(Unhashable(1).__call__, Leg, id="method of an unhashable"),
        pytest.param(Static.static, Leg, id="static method"),
        pytest.param(Static().of_class, Leg, id="class method"),
        pytest.param(unresolvable, Any, id="unresolvable"),
        pytest.param(unannotated, Any, id="unannotated"),
        pytest.param(len, Any, id="builtin"),
        pytest.param([].append, Any, id="method of a builtin"),
        pytest.param([].__len__, Any, id="method of a builtin that has no weak reference"),
        pytest.param(partial(Trip), Trip, id="partial of a dataclass"),
        pytest.param(partial(partial(Booking), 1), Booking, id="partial of a partial of a class"),
    ],
)
def test_d5_what_an_action_says_that_it_returns(function, expected):
    """A class returns itself; what an annotation does not say, or cannot be resolved, is Any (D5)."""
    assert return_type(function) is expected
    assert return_type(function) is expected


@pytest.mark.parametrize("value", [1, "x", 2.5, True, None, [1], {"a": {"b": []}}])
def test_d5_plain_values_need_no_annotation(value):
    """What JSON knows comes back as it was without an annotation (D5)."""
    data = encode_result(CODEC, value, return_type(unannotated), lambda: "here")

    assert same(CODEC.decode(data, Any), value)


@pytest.mark.parametrize(
    "value",
    [object(), {object()}, [lambda: None], 1j, "\ud800"],
    ids=lambda value: type(value).__name__,
)
def test_d5_what_cannot_be_encoded_is_not_recordable(value):
    """The message names the value, the place, the cause, and what to give instead (D5)."""
    with pytest.raises(NotRecordable) as caught:
        encode_result(CODEC, value, Any, lambda: "step 'book' of saga 'trip' at (2,)")

    cause = caught.value.__cause__
    assert cause is not None
    assert str(caught.value) == (
        f"step 'book' of saga 'trip' at (2,) gave {value!r}, which cannot be recorded: {cause}; return "
        "plain values, dataclasses or msgspec structs, or give the journal, or the engine, a codec"
    )


@dataclass
class Measured:
    name: str | None
    value: float


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (float("nan"), float),
        (float("inf"), Any),
        ([1.5, None, -float("inf")], list[float | None]),
        ({"a": {"b": (1, float("nan"))}}, Any),
        ({1.5, float("inf")}, set[float]),
        (Measured(None, float("nan")), Measured),
    ],
)
def test_d5_a_number_that_json_does_not_have_is_not_recordable(value, kind):
    """Of NaN and the infinities the message says what is the matter, wherever in a value they are (D5)."""
    with pytest.raises(
        NotRecordable, match="recorded: it holds NaN or an infinity, and JSON has neith"
    ):
        encode_result(CODEC, value, kind, lambda: "here")
    with pytest.raises(
        NotRecordable, match="recorded: it holds NaN or an infinity, and JSON has neith"
    ):
        encode_arguments(CODEC, (value,), {}, None, "here")


def test_d5_what_only_reads_like_nothing_is_recordable():
    """A null in a value is no number that JSON does not have (D5)."""
    value = Measured(None, 1.5)

    assert CODEC.decode(encode_result(CODEC, value, Measured, lambda: "here"), Measured) == value
    assert encode_result(CODEC, [None, "null", {"a": None}], Any, lambda: "here")


@pytest.mark.parametrize(
    ("value", "back"),
    [
        (LEG, {"at": "2026-03-01T12:00:00.123456Z", "price": "10.50"}),
        (Seat(1, "a"), {"row": 1, "letter": "a"}),
        ((1, 2), [1, 2]),
        ([(1, 2)], [[1, 2]]),
        ({1: 2}, {"1": 2}),
        (Colour.RED, "red"),
        (Level.LOW, 1),
        (Decimal("1.5"), "1.5"),
        (b"x", "eA=="),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_d5_what_would_come_back_as_something_else_is_not_recordable(value, back):
    """Without an annotation, only what JSON knows is what it was (D5)."""
    with pytest.raises(NotRecordable) as caught:
        encode_result(CODEC, value, Any, lambda: "here")

    assert str(caught.value) == (
        f"here gave {value!r}, which would come back as {back!r}; it is annotated with no type: annotate "
        "it with the type that it has"
    )


@pytest.mark.parametrize(
    ("value", "kind", "back"),
    [
        (1, float, 1.0),
        ((1, 2), list[int], [1, 2]),
        (Level.LOW, int, 1),
        (Leg(NOON, Decimal(1)), dict[str, str], {"at": "2026-03-01T12:00:00.123456Z", "price": "1"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_d5_what_a_wrong_annotation_would_change_is_not_recordable(value, kind, back):
    """An annotation that makes something else of the value is named (D5)."""
    with pytest.raises(NotRecordable) as caught:
        encode_result(CODEC, value, kind, lambda: "here")

    assert str(caught.value) == (
        f"here gave {value!r}, which would come back as {back!r}; it is annotated with the type {kind!r}: "
        "annotate it with the type that it has"
    )


@pytest.mark.parametrize(
    ("value", "kind"),
    [(LEG, int), (None, Leg), ("x", Colour), (1, "no type")],
    ids=lambda value: type(value).__name__,
)
def test_d5_what_a_wrong_annotation_cannot_read_is_not_recordable(value, kind):
    """An annotation by which the value cannot be read is named, with what it said (D5)."""
    with pytest.raises(NotRecordable, match="cannot be read back: ") as caught:
        encode_result(CODEC, value, kind, lambda: "here")

    assert caught.value.__cause__ is None
    assert str(caught.value).startswith(f"here gave {value!r}, which cannot be read back: ")
    assert str(caught.value).endswith(
        f"; it is annotated with the type {kind!r}: annotate it with the type that it has"
    )


class PlainJSON:
    """A codec that knows NaN, and no types."""

    def encode(self, value: object) -> bytes:
        return json.dumps(value).encode()

    def decode(self, data: bytes, kind: Any) -> Any:
        return json.loads(data)


@pytest.mark.parametrize(
    ("codec", "value", "kind"),
    [(PlainJSON(), float("nan"), float), (CODEC, Decimal("NaN"), Decimal)],
    ids=lambda value: type(value).__name__,
)
def test_d5_not_a_number_is_recorded_though_it_does_not_equal_itself(codec, value, kind):
    """A NaN that comes back as one is as it was (D5)."""
    back = codec.decode(encode_result(codec, value, kind, lambda: "here"), kind)

    assert type(back) is kind
    assert back != back


# --- arguments ------------------------------------------------------------------------------------


def pay(trip: Trip, /, amount: Decimal, *tips: Decimal, at: datetime, note=None) -> None: ...


class Till:
    def pay(self, amount: Decimal, leg: Leg) -> None: ...


def came_back(function: Any, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    data = encode_arguments(CODEC, args, kwargs, function, "here")
    return decode_arguments(CODEC, data, function, "here")


def test_d5_arguments_come_back_by_the_annotations_of_their_parameters():
    """Positional ones, those of ``*args``, keyword-only ones, and those without annotation (D5)."""
    args = (TRIP, Decimal("1.0"), Decimal("0.1"), Decimal("0.2"))
    kwargs = {"at": NOON, "note": ["plain"]}

    assert came_back(pay, *args, **kwargs) == (args, kwargs)
    assert came_back(pay, TRIP, amount=Decimal(1), at=NOON) == (
        (TRIP,),
        {"amount": Decimal(1), "at": NOON},
    )


class Options(TypedDict):
    at: datetime


def rest(leg: Leg, /, **options: Decimal) -> None: ...
def rest_of_options(
    *args: typing.Unpack[tuple[int, str]], **options: typing.Unpack[Options]
) -> None: ...


def test_d5_keyword_arguments_come_back_by_the_annotation_of_the_rest():
    """Those of ``**options`` are what that is annotated with, also where a name is that of another (D5)."""
    call = ((LEG,), {"tip": Decimal(1), "options": Decimal(2), "leg": Decimal(3), "return": Decimal(4)})

    assert came_back(rest, *call[0], **call[1]) == call
    assert came_back(rest_of_options, 1, "x", at=NOON) == ((1, "x"), {"at": NOON})


@pytest.mark.parametrize("function", [Till().pay, partial(Till.pay, None), partial(Till().pay)])
def test_d5_arguments_of_a_method_or_partial_are_those_that_are_left_to_give(function):
    """What is bound already is skipped (D5)."""
    assert came_back(function, Decimal(1), LEG) == ((Decimal(1), LEG), {})


def test_d5_arguments_of_a_dataclass_as_an_action():
    """The fields of a dataclass tell what it is made of (D5)."""
    assert came_back(Leg, NOON, price=Decimal(2)) == ((NOON,), {"price": Decimal(2)})


def test_d5_arguments_that_nobody_annotates_are_plain():
    """Where there is no function to ask, arguments are what JSON knows (D5)."""
    assert came_back(None, 1, ["x"], a=None) == ((1, ["x"]), {"a": None})
    with pytest.raises(NotRecordable):
        came_back(None, LEG)


def test_d5_more_arguments_than_parameters_are_plain():
    """What a function does not take is for the call to refuse, not for the codec (D5)."""
    assert came_back(unannotated, 1, a=2) == ((1,), {"a": 2})


def test_d5_arguments_that_cannot_be_encoded_are_not_recordable():
    """The message says where, why, and what to give instead (D5)."""
    with pytest.raises(NotRecordable) as caught:
        encode_arguments(CODEC, (object(),), {}, unannotated, "journal.run of saga 's'")

    cause = caught.value.__cause__
    assert cause is not None
    assert str(caught.value) == (
        f"journal.run of saga 's': its arguments cannot be recorded: {cause}; give plain values, "
        "dataclasses or msgspec structs, or give the journal, or the engine, a codec"
    )


def test_d5_arguments_that_would_come_back_as_something_else_are_not_recordable():
    """The message shows what they are and what they would be (D5)."""
    with pytest.raises(NotRecordable) as caught:
        encode_arguments(CODEC, ((1, 2),), {"a": Decimal(1)}, unannotated, "journal.run of saga 's'")

    assert str(caught.value) == (
        "journal.run of saga 's': its arguments ((1, 2),), {'a': Decimal('1')} would come back as "
        "([1, 2],), {'a': '1'}; annotate the parameters with the types that they have"
    )


def test_d5_recorded_arguments_whose_type_has_changed_are_not_readable():
    """The message shows what is recorded, and asks whether a type has changed (D5)."""

    def before(amount: str) -> None: ...

    def after(amount: Decimal) -> None: ...

    data = encode_arguments(CODEC, ("dear",), {}, before, "here")
    with pytest.raises(NotRecordable) as caught:
        decode_arguments(CODEC, data, after, "run 'r' of saga 's'")

    assert str(caught.value) == (
        "run 'r' of saga 's': its recorded arguments [[\"dear\"],{}] cannot be read: "
        f"{caught.value.__cause__}; has the type of a parameter changed since?"
    )


class Unkeyed:
    """An action that cannot be a key, with arguments."""

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, amount: Decimal) -> None: ...


def test_d5_arguments_of_an_action_that_cannot_be_a_key():
    """Whose annotations cannot be kept is asked each time, and as good (D5)."""
    assert ((Decimal("1.5"),), {}) == came_back(Unkeyed(), Decimal("1.5"))


class Counting:
    """A codec that counts what it reads."""

    def __init__(self, plain: tuple[type, ...] | None) -> None:
        self.read = 0
        if plain is not None:
            self.plain = plain

    def encode(self, value: object) -> bytes:
        return CODEC.encode(value)

    def decode(self, data: bytes, kind: Any) -> Any:
        self.read += 1
        return CODEC.decode(data, kind)


def test_d5_what_is_plain_need_not_be_read_back():
    """A codec may say which types come back for certain; whatever else is tried, and each type of another codec (D5)."""

    def pay(to: str, amount: int) -> None: ...

    def label(text: str | None) -> None: ...

    def weigh(grams: float) -> None: ...

    def tried(codec: Counting, function: Any, *args: Any) -> int:
        before = codec.read
        encode_arguments(codec, args, {}, function, "here")
        return codec.read - before

    ours = Counting(JSONCodec.plain)
    assert (0, 0) == (tried(ours, pay, "ada", 7), tried(ours, None, None, True))
    assert 0 < tried(ours, weigh, 1.5)
    assert 0 < tried(ours, label, "fragile")  # of one of several types
    assert 0 < tried(Counting(None), pay, "ada", 7)
    with pytest.raises(
        NotRecordable, match="are not what its parameters are annotated with: Expected `str`, got `int`"
    ):
        tried(ours, pay, 7, "ada")
    for value, kind, reads in (
        ("x", str, 0),
        (None, type(None), 0),
        (1, Any, 0),
        (True, int, 1),
        (1.5, Any, 1),
    ):
        codec = Counting(JSONCodec.plain)
        with suppress(NotRecordable):
            encode_result(codec, value, kind, lambda: "here")
        assert reads == codec.read, value


# --- codecs ---------------------------------------------------------------------------------------


class ComplexNumbers:
    """A codec that knows one type more."""

    def encode(self, value: object) -> bytes:
        return msgspec.json.encode(value, enc_hook=lambda number: [number.real, number.imag])

    def decode(self, data: bytes, kind: Any) -> Any:
        return msgspec.json.decode(data, type=kind, dec_hook=lambda _, parts: complex(*parts))


def test_d5_a_codec_can_be_given_that_knows_more():
    """What the default refuses, another codec may record (D5)."""
    codec: Codec = ComplexNumbers()

    def turn(by: complex) -> None: ...

    assert codec.decode(encode_result(codec, 1 + 2j, complex, lambda: "here"), complex) == 1 + 2j
    data = encode_arguments(codec, (1j,), {"by": 2j}, turn, "here")
    assert decode_arguments(codec, data, turn, "here") == ((1j,), {"by": 2j})


def test_d5_without_msgspec_a_journal_says_what_to_install(monkeypatch):
    """The core needs no msgspec; who makes a journal without it is told (D5)."""
    monkeypatch.setitem(sys.modules, "msgspec", None)
    monkeypatch.setitem(sys.modules, "msgspec.json", None)

    with pytest.raises(ImportError) as caught:
        MemoryJournal()

    assert str(caught.value) == (
        'a journal needs msgspec, which is not installed: pip install "pysagas[durable]"'
    )
    assert isinstance(caught.value.__cause__, ImportError)
    MemoryJournal(PlainJSON())


def test_d5_a_type_is_made_ready_to_read_once(monkeypatch):
    """A decoder is built once for a type, since that costs more than what it does (D5)."""
    made: list[Any] = []
    monkeypatch.setattr(msgspec.json, "Decoder", lambda kind: made.append(kind) or DECODER(kind))
    codec = JSONCodec()

    assert [codec.decode(b'["1"]', list[Decimal]) for _ in range(3)] == [[Decimal(1)]] * 3
    assert made == [list[Decimal]]


DECODER = msgspec.json.Decoder


# --- exceptions -----------------------------------------------------------------------------------


class Refused(Exception):
    made: ClassVar[list[Refused]] = []

    def __init__(self, code: int, *, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason
        self.made.append(self)

    class Kindly(Exception):
        pass


class Demanding(Exception):
    def __new__(cls, *, code: int) -> Self:
        return super().__new__(cls, code)

    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")


class Forgetful(Exception):
    def __new__(cls, *args: object) -> Self:
        return super().__new__(cls)


def remade(error: BaseException) -> BaseException:
    return decode_error(json.loads(json.dumps(encode_error(error))))


def test_d5_an_exception_comes_back_without_its_init_being_called():
    """Its type, arguments, fields and notes are as they were, whatever its ``__init__`` wants (D5)."""
    error = Refused(402, reason="no money")
    error.add_note("in the morning")
    error.add_note("and again")
    Refused.made.clear()

    back = remade(error)

    assert Refused.made == []
    assert type(back) is Refused
    assert (back.args, str(back)) == (("402: no money",), "402: no money")
    assert vars(back) == {
        "code": 402,
        "reason": "no money",
        "__notes__": ["in the morning", "and again"],
    }


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no"),
        Forgetful("what its __new__ does not take"),
        KeyError("key"),
        ZeroDivisionError(),
        FileNotFoundError(2, "no such file"),
        Refused.Kindly("inner", 1, None, [2.5, {"a": True}]),
        SystemExit("told to"),
        KeyboardInterrupt(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_d5_an_exception_comes_back_as_its_type_with_its_arguments(error):
    """Builtin exceptions, nested classes, and those that are no Exception (D5)."""
    back = remade(error)

    assert type(back) is type(error)
    assert (back.args, str(back), vars(back)) == (error.args, str(error), vars(error))


def test_d5_fields_of_an_exception_that_json_would_change_are_left_out():
    """Better a field that is missing than one that is something else (D5)."""
    error = ValueError("no")
    error.plain, error.pair, error.thing, error.numbers = "x", (1, 2), object(), {1: 2}

    assert vars(remade(error)) == {"plain": "x"}


def test_d5_a_group_of_exceptions_comes_back_with_all_that_is_in_it():
    """Groups in groups, each with its notes; an ExceptionGroup where it was one (D5)."""
    inner = ExceptionGroup("inner", [Refused(1, reason="x"), ValueError(object())])
    inner.add_note("inside")
    error = ExceptionGroup("outer", [inner, KeyError("k")])
    error.add_note("outside")

    back = remade(error)

    assert type(back) is ExceptionGroup
    assert (back.message, back.__notes__) == ("outer", ["outside"])
    group, key = back.exceptions
    assert type(group) is ExceptionGroup
    assert (group.message, group.__notes__) == ("inner", ["inside"])
    assert [type(one) for one in group.exceptions] == [Refused, ValueError]
    assert (type(key), key.args) == (KeyError, ("k",))


def test_d5_a_group_that_is_no_exception_comes_back_as_one_that_is_none():
    """An order to stop within a group is still no Exception (D5)."""
    back = remade(BaseExceptionGroup("stop", [KeyboardInterrupt(), ValueError()]))

    assert type(back) is BaseExceptionGroup
    assert [type(one) for one in back.exceptions] == [KeyboardInterrupt, ValueError]


def local_error() -> Exception:
    class Local(Exception):
        pass

    return Local("only here")


def with_odd_arguments() -> Exception:
    error = UnicodeDecodeError("utf-8", b"?", 0, 1, "bad")
    error.args = (object,)
    return error


class Refusal(Exception):
    """Has an argument that is not plain, a field that is, and one that is not."""

    def __init__(self, price: Decimal) -> None:
        super().__init__("too dear", price)
        self.code, self.response = 402, object()


@pytest.mark.parametrize(
    "value",
    [Decimal("9.5"), object, (1, 2), {1: 2}, {"a": Decimal(1)}, Level.LOW, float("nan")],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("kind", [Refusal, ValueError, KeyError, OSError])
def test_d3_an_exception_of_what_is_not_plain_is_of_its_type_and_says_what_it_said(kind, value):
    """So a saga that catches it by its type goes the same way again (D3)."""
    error = kind(value)
    for _ in range(2):  # as it comes from a recovery, it may be recorded again
        back = remade(error)

        assert (type(back), str(back), repr(back)) == (kind, str(error), repr(error))
        assert not hasattr(back, "__notes__")
        error = back


def test_d3_of_an_exception_what_is_plain_comes_back():
    """Arguments and fields that are plain are what they were; other fields are missing (D3)."""
    back = remade(Refusal(Decimal(9)))

    assert (back.args[0], str(back.args[1]), back.code) == ("too dear", "9", 402)
    assert not hasattr(back, "response")


@pytest.mark.parametrize("value", [b"\x00\xff", {"a": 1}, {"bytes": "x"}, {"text": "x", "repr": "y"}])
def test_d3_an_argument_of_an_exception_is_taken_for_nothing_else(value):
    """What reads like the record of something else comes back as it was (D3)."""
    assert remade(ValueError(value)).args == (value,)


class NotFound(FileNotFoundError):
    """With a constructor of its own."""

    def __init__(self, name: str) -> None:
        super().__init__(2, "not here", name)
        self.extra = True


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "no such file", "a.txt"),
        OSError(18, "cross-device", "a", None, "b"),
        NotFound("a.txt"),
        ConnectionResetError(104, "reset"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        UnicodeEncodeError("ascii", "ä", 0, 1, "bad"),
        StopIteration(3),
        SystemExit(4),
        Demanding(code=3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_d3_an_exception_comes_back_with_what_it_keeps_in_c(error):
    """Numbers, files and places that are no fields of Python are as they were (D3)."""
    names = "errno strerror filename filename2 encoding object start end reason value code extra"
    back = remade(error)

    assert type(back) is type(error)
    assert (back.args, str(back)) == (error.args, str(error))
    assert [getattr(back, name, None) for name in names.split()] == [
        getattr(error, name, None) for name in names.split()
    ]


class Several(ExceptionGroup):
    """A group with a field."""

    code = 0


class Wordy(Exception):
    """Says what it has in a field."""

    def __init__(self, thing: object) -> None:
        self.thing = thing

    def __str__(self) -> str:
        return f"there was {self.thing}"


def test_d3_an_exception_whose_text_is_lost_has_it_in_a_note():
    """What it said is told in any case, where it can no longer say it itself (D3)."""
    error = Wordy(Decimal(5))
    error.add_note("later")
    back = remade(error)

    assert (type(back), back.__notes__) == (Wordy, ["there was 5", "later"])


def test_d3_a_group_of_a_class_of_its_own_comes_back_as_that():
    """A subclass of ExceptionGroup is made again like other classes, with its fields (D3)."""
    error = Several("some", [ValueError("no"), Refusal(Decimal(1))])
    error.code = 7
    back = remade(error)

    assert (type(back), back.message, back.code) == (Several, "some", 7)
    assert [type(one) for one in back.exceptions] == [ValueError, Refusal]


def test_d3_a_group_whose_class_is_not_there_comes_back_as_a_plain_one():
    """Of a group that cannot be made again, what is in it is not lost (D3)."""
    recorded = encode_error(Several("some", [ValueError("no")]))
    recorded["type"] = "nowhere:Several"
    back = decode_error(recorded)

    assert type(back) is ExceptionGroup
    assert [type(one) for one in back.exceptions] == [ValueError]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (local_error(), f"{__name__}:local_error.<locals>.Local"),
        (with_odd_arguments(), "builtins:UnicodeDecodeError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_d5_an_exception_that_cannot_be_made_again_is_named(error, kind):
    """Classes that cannot be found, and those that want what JSON does not know (D5)."""
    error.add_note("noted")

    back = remade(error)

    assert type(back) is RecordedError
    assert (back.kind, str(back), back.__notes__) == (kind, f"{kind}: {error}", ["noted"])


@pytest.mark.parametrize(
    "kind", ["json:loads", "json:JSONDecoder", "json:Missing", "json:decoder.Missing.inner", "json", ""]
)
def test_d5_what_is_not_the_class_of_an_exception_is_not_made(kind):
    """A name that now means something else, or nothing, is only told (D5)."""
    recorded = {"type": kind, "text": "what it said", "notes": [], "args": [], "fields": {}}

    back = decode_error(recorded)

    assert (type(back), back.kind, str(back)) == (RecordedError, kind, f"{kind}: what it said")


def test_d5_nothing_is_imported_for_a_recorded_exception(monkeypatch, tmp_path):
    """A journal does not import what its file names, though it could be imported (D5)."""
    (tmp_path / "never_to_be_imported.py").write_text("class Oops(Exception): ...")
    monkeypatch.syspath_prepend(tmp_path)
    kind = "never_to_be_imported:Oops"

    back = decode_error({"type": kind, "text": "x", "notes": [], "args": ["x"], "fields": {}})

    assert (type(back), back.kind) == (RecordedError, kind)
    assert "never_to_be_imported" not in sys.modules


PROGRAM = """
import json, sys
from pysagas.durable._codec import decode_error, encode_error

class Declined(Exception): ...

def main():
    if sys.argv[1:]:
        print(type(decode_error(json.loads(sys.argv[1]))) is Declined)
    else:
        print(json.dumps(encode_error(Declined("no"))))

if __name__ == "__main__":
    main()
"""


def test_d5_an_exception_of_a_program_is_known_where_that_is_imported_and_the_other_way_round(tmp_path):
    """What is `__main__` in one process is the module ``shop`` in the next one (D5)."""
    (tmp_path / "shop.py").write_text(PROGRAM)
    ways = [["shop.py"], ["-m", "shop"], ["-c", "import shop; shop.main()"]]

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    recorded = {run(*way) for way in ways}
    assert [json.loads(one)["type"] for one in recorded] == ["shop:Declined"]
    assert ["True\n"] * 3 == [run(*way, *recorded) for way in ways]


def test_d5_a_module_of_the_name_of_the_program_is_not_taken_for_it(monkeypatch):
    """The script ``json.py``, or what the package json installs as a program, is not the package (D5)."""
    program = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", program)
    program.__file__ = "/somewhere/json.py"
    recorded = encode_error(json.JSONDecodeError("no", "doc", 0))

    assert _codec._class_of("json:JSONDecodeError") is json.JSONDecodeError
    assert _codec._class_of("json:NotThere") is None
    assert recorded["type"] == "json.decoder:JSONDecodeError"


def test_d5_the_names_of_the_module_are_what_it_offers():
    """All that it lists is there (D5)."""
    assert all(hasattr(_codec, name) for name in _codec.__all__)


# --- through a journal ----------------------------------------------------------------------------


async def after_a_crash(whole: Saga[..., Any], dies_at: int, *args: Any, **kwargs: Any) -> Recovered:
    """Runs a saga in a process that dies at a boundary, and goes on with it in the next."""
    first = MortalJournal()
    first.dies_at = dies_at
    with pytest.raises((Killed, CompensationFailed, BaseExceptionGroup)):
        await first.run(whole, *args, run_id="r", **kwargs)
    report = await first.next_process().recover([whole], on_crash="resume")
    assert report.ok, report
    (recovered,) = report.recovered
    return recovered


@pytest.mark.anyio
@pytest.mark.parametrize("shape", SHAPES)
async def test_d5_a_result_comes_back_from_the_journal_of_a_process_that_died(shape):
    """An action that is not run again gives what it gave, whatever its sort (D5)."""
    action = Step(shapes(TRIP, Trip)[shape])
    seen: list[Any] = []

    @saga(name="s")
    async def whole(scope: SagaScope) -> Trip:
        result = await scope.step(action)
        seen.append(result)
        await scope.step(Step(lambda: None, name="next"))
        return result

    recovered = await after_a_crash(whole, 3)

    assert recovered.state is RunState.COMPLETED
    assert same(recovered.outcome.value, TRIP)
    original, replayed = seen
    assert original is TRIP
    assert replayed is not TRIP
    assert same(replayed, TRIP)


@pytest.mark.anyio
async def test_d5_an_ended_run_gives_its_value_as_what_it_was():
    """A second call of the same id gives the value that the first gave, by the saga's annotation (D5)."""

    @saga
    async def whole(scope: SagaScope, leg: Leg) -> tuple[Leg, ...]:
        return (leg, leg)

    journal = MemoryJournal()
    first = await journal.run(whole, LEG, run_id="r")
    second = await journal.run(whole, LEG, run_id="r")

    assert first.value == second.value == (LEG, LEG)


class Thing:
    """What no codec knows."""


@pytest.mark.anyio
@pytest.mark.parametrize("given", [Thing(), LEG, (1, 2)], ids=["unknown", "dataclass", "tuple"])
async def test_d5_what_is_not_recordable_rolls_back_with_the_real_object_in_hand(given):
    """That step fails, by name; its undo gets the very object, and what was before is undone (D5)."""
    undone: list[Any] = []
    action = Step(lambda: given, undo=undone.append, name="book")
    whole = Saga([Step(lambda: "a", undo=undone.append, name="first"), action], name="trip")
    journal = MemoryJournal()

    with pytest.raises(NotRecordable) as caught:
        await journal.run(whole, run_id="r")

    assert str(caught.value).startswith(f"step 'book' of saga 'trip' at (1,) gave {given!r}, which ")
    assert len(undone) == 2
    assert undone[0] is given
    assert undone[1] == "a"
    assert [info.state for info in await journal.runs()] == [RunState.COMPENSATED]


@pytest.mark.anyio
async def test_d5_a_saga_whose_value_is_not_recordable_is_rolled_back():
    """The value of the saga is a value like others (D5)."""
    undone: list[Any] = []

    @saga(name="trip")
    async def whole(scope: SagaScope) -> int:
        await scope.step(Step(lambda: "a", undo=undone.append))
        return Thing()

    journal = MemoryJournal()
    with pytest.raises(NotRecordable, match=r"^saga 'trip' gave <.*Thing object .*>, which cannot be"):
        await journal.run(whole, run_id="r")

    assert undone == ["a"]
    assert [info.state for info in await journal.runs()] == [RunState.COMPENSATED]


@pytest.mark.anyio
async def test_d5_arguments_that_are_not_recordable_run_nothing():
    """Nothing has run, and nothing is in the journal (D5)."""
    journal = MemoryJournal()
    begun: list[Any] = []
    whole = Saga([Step(begun.append, name="a")], name="trip")

    with pytest.raises(NotRecordable, match=r"^journal\.run of saga 'trip': its arguments "):
        await journal.run(whole, LEG, run_id="r")

    assert (begun, await journal.runs()) == ([], [])


class Agency:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    @saga
    async def book(self, scope: SagaScope, leg: Leg, *more: Leg, at: datetime) -> None:
        await scope.step(Step(self.take), (leg, *more), at)

    def take(self, legs: tuple[Leg, ...], at: datetime) -> None:
        self.seen.append((legs, at))


def function_saga(agency: Agency) -> Saga[..., Any]:
    @saga
    async def whole(scope: SagaScope, leg: Leg, *more: Leg, at: datetime) -> None:
        await scope.step(Step(agency.take), (leg, *more), at)

    return whole


@pytest.mark.anyio
@pytest.mark.parametrize(
    "build", [function_saga, lambda agency: agency.book], ids=["function", "method"]
)
async def test_d5_arguments_of_a_run_come_back_by_the_function_of_its_saga(build):
    """The scope, and self, are not among the arguments (D5)."""
    agency = Agency()

    await after_a_crash(build(agency), 0, LEG, LEG, at=NOON)

    assert agency.seen == [((LEG, LEG), NOON)]


@pytest.mark.anyio
@pytest.mark.parametrize("place", ["sequence", "group", "inner saga", "function"])
async def test_d5_arguments_of_a_run_come_back_by_the_first_step_that_takes_them(place):
    """Of a saga that is data, steps bound already are skipped; groups and inner sagas are seen (D5)."""
    seen: list[Leg] = []

    def bound(leg: str) -> None: ...

    def take(leg: Leg) -> None:
        seen.append(leg)

    def later(leg: Any) -> None: ...

    @saga
    async def function(scope: SagaScope, leg: Leg) -> None:
        await scope.step(Step(take), leg)

    first = Step(bound).bind("x")
    parts = {
        "sequence": [first, Step(take)],
        "group": [Parallel(Step(bound, name="other").bind("y"), Step(take))],
        "inner saga": [Saga([Step(bound).bind("z")]), Saga([first, Saga([Step(take)])])],
        "function": [first, function],
    }
    whole = Saga([*parts[place], Step(later)], name="s")

    await after_a_crash(whole, 0, LEG)

    assert seen == [LEG]


@pytest.mark.anyio
async def test_d5_a_saga_of_bound_steps_has_no_arguments_to_ask_for():
    """Where each step is bound, nobody is to ask, and there is nothing to be asked (D5)."""
    seen: list[Any] = []
    whole = Saga([Step(seen.append).bind(LEG)], name="s")

    await after_a_crash(whole, 0)

    assert seen == [LEG]


@pytest.mark.anyio
async def test_d5_a_run_whose_parameter_has_changed_its_type_is_left_as_it_was():
    """`recover` reports it, with the question whether a type has changed (D5)."""

    def before(amount: str) -> None: ...

    def after(amount: Decimal) -> None: ...

    first = MortalJournal()
    first.dies_at = 0
    with pytest.raises((Killed, CompensationFailed)):
        await first.run(Saga([Step(before, name="a")], name="s"), "dear", run_id="r")

    report = await first.next_process().recover([Saga([Step(after, name="a")], name="s")])

    (left,) = report.left
    assert isinstance(left.error, NotRecordable)
    assert "has the type of a parameter changed since?" in str(left.error)
    assert left.state is RunState.RUNNING


@pytest.mark.anyio
async def test_d5_a_run_whose_result_has_changed_its_type_is_left_as_it_was():
    """A recorded result that cannot be read as what the action returns now is no result (D5)."""

    def before() -> str:
        return "dear"

    def after() -> Decimal: ...

    def of(action: Any) -> Saga[..., Any]:
        return Saga([Step(action, name="a"), Step(lambda: None, name="b")], name="s")

    first = MortalJournal()
    first.dies_at = 3
    with pytest.raises((Killed, CompensationFailed)):
        await first.run(of(before), run_id="r")

    report = await first.next_process().recover([of(after)])

    (left,) = report.left
    assert isinstance(left.error, SagaChanged)
    assert "has the type that the action returns changed since?" in str(left.error)


@pytest.mark.anyio
async def test_d5_a_journal_records_with_the_codec_that_it_was_given():
    """Results, arguments and the value of a saga (D5)."""

    def turn(number: complex) -> complex:
        return number * 1j

    @saga
    async def whole(scope: SagaScope, number: complex) -> complex:
        return await scope.step(Step(turn), number)

    journal = MemoryJournal(ComplexNumbers())
    outcomes: list[Outcome[complex]] = [
        await journal.run(whole, 1 + 2j, run_id="r"),
        await journal.run(whole, 1 + 2j, run_id="r"),
    ]

    assert [outcome.value for outcome in outcomes] == [-2 + 1j, -2 + 1j]


@pytest.mark.anyio
async def test_d5_a_recorded_failure_is_raised_again_as_what_it_was():
    """A second call of the same id raises what the first did, its fields in it (D5)."""

    def refuse() -> None:
        raise Refused(402, reason="no money")

    whole = Saga([Step(refuse)], name="s")
    journal = MemoryJournal()
    for _ in range(2):
        with pytest.raises(Refused) as caught:
            await journal.run(whole, run_id="r")
        assert (caught.value.code, caught.value.reason) == (402, "no money")
    outcome = await journal.run(whole, run_id="r", exceptions=Refused)

    assert outcome.state is SagaState.COMPENSATED
    assert type(outcome.error) is type(outcome.steps[0].error) is Refused


class Unspeakable(Exception):
    """Cannot say what it is."""

    def __str__(self) -> str:
        raise AttributeError("no text")


def test_d5_an_exception_that_cannot_say_what_it_is_is_recorded_all_the_same():
    """Where its text cannot be made, an exception is recorded with the reason for that (D5)."""
    recorded = encode_error(Unspeakable(object()))

    assert recorded["text"] == "<its text cannot be made: AttributeError('no text')>"
    assert type(decode_error(recorded)) is Unspeakable


class Detached:
    """Cannot even be shown, as an object of a database whose session is over."""

    def __repr__(self) -> str:
        raise RuntimeError("detached")


def test_d5_what_cannot_be_shown_is_refused_as_clearly():
    """A value whose `repr` raises is not recordable, and no other failure (D5)."""
    with pytest.raises(NotRecordable, match="here gave <its text cannot be made: .*detached"):
        encode_result(CODEC, Detached(), Any, lambda: "here")
    with pytest.raises(NotRecordable, match="its arguments cannot be recorded"):
        encode_arguments(CODEC, (Detached(),), {}, None, "here")


@pytest.mark.parametrize("notes", [None, 5, [b"x", "kept"]])
def test_d5_an_exception_with_odd_attributes_is_recorded_all_the_same(notes):
    """Notes that are none, and fields whose names are no text, are left out (D5)."""
    error = ValueError("x")
    error.__notes__ = notes
    vars(error)[5] = "five"  # type: ignore[index]

    back = decode_error(json.loads(json.dumps(encode_error(error))))

    assert (type(back), str(back)) == (ValueError, "x")
    assert getattr(back, "__notes__", []) == (["kept"] if isinstance(notes, list) else [])


def test_d5_a_function_that_does_not_say_what_it_takes_takes_plain_values():
    """Some functions that are written in C have no signature: their arguments are plain (D5)."""
    codec = JSONCodec()
    data = encode_arguments(codec, (1, "x"), {}, min, "here")

    assert decode_arguments(codec, data, min, "here") == ((1, "x"), {})
    assert decode_arguments(codec, data, [].__contains__, "here") == ((1, "x"), {})


def test_d5_arguments_that_would_come_back_as_an_equal_of_another_type_are_not_recordable():
    """What is equal is not the same: an enum that would come back as a number is refused (D5)."""
    with pytest.raises(NotRecordable, match="would come back as"):
        encode_arguments(JSONCodec(), (Level.LOW,), {}, None, "here")


@pytest.mark.parametrize("kind", [Awaitable, typing.Awaitable, typing.Coroutine])
def test_d5_an_awaitable_of_something_says_nothing_of_the_result(kind):
    """A function that is annotated with a bare awaitable may return anything (D5)."""

    def function():
        raise AssertionError  # pragma: no cover - it is only asked

    function.__annotations__["return"] = kind

    assert return_type(function) is Any
