"""What is known of a callable before it is called."""

from __future__ import annotations

from functools import partial, wraps

import pytest

from pysagas._signatures import (
    call_problem,
    compensation_problem,
    fits,
    has_coroutine_code,
    is_async,
    is_coroutine_function,
    name_of,
    takes,
    takes_positional,
)


async def async_function(x): ...


def sync_function(x): ...


def two(x, y): ...


def one_or_two(x, y=0): ...


def any_number(*args): ...


def at_least_one(x, *args): ...


def keyword_needed(x, *, key): ...


def keyword_offered(x, *, key=None): ...


def nothing(): ...


class Service:
    async def start(self, x): ...

    def stop(self, x): ...

    @classmethod
    def make(cls, x): ...

    @staticmethod
    def help(x): ...


class AsyncCallable:
    async def __call__(self, x): ...


class SyncCallable:
    def __call__(self, x): ...


class MadeBySomethingElse:
    @classmethod
    def __call__(cls, one: object) -> None: ...


class CallsNobody:
    @staticmethod
    def __call__(one: object, other: object) -> None: ...


class Unreadable:
    """Its signature cannot be read."""

    __signature__ = "none"
    __name__ = 3

    def __call__(self, x): ...


@wraps(async_function)
def wrapped_async(*args, **kwargs): ...


@wraps(sync_function)
def wrapped_sync(*args, **kwargs): ...


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (async_function, True),
        (sync_function, False),
        (Service().start, True),
        (Service().stop, False),
        (partial(async_function, 1), True),
        (AsyncCallable(), True),
        (SyncCallable(), False),
        (AsyncCallable, False),
        (len, False),
        (lambda: async_function(1), False),
    ],
)
def test_is_coroutine_function(function, expected):
    """Whether a call certainly gives a coroutine is known for functions, methods and objects."""
    assert expected is is_coroutine_function(function)
    assert expected is is_async(function)


def test_is_async_sees_through_wraps():
    """A wrapper is as async as what it wraps, through partials too."""
    assert not is_coroutine_function(wrapped_async)
    assert is_async(wrapped_async)
    assert is_async(partial(partial(wrapped_async, 1)))
    assert not is_async(wrapped_sync)
    assert is_async(partial(AsyncCallable()))


def test_has_coroutine_code():
    """The quick look knows async functions and methods, and says no to all else."""
    assert has_coroutine_code(async_function)
    assert has_coroutine_code(Service().start)
    assert not has_coroutine_code(sync_function)
    assert not has_coroutine_code(AsyncCallable())
    assert not has_coroutine_code(len)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (sync_function, "sync_function"),
        (Service().stop, "stop"),
        (partial(partial(two, 1), 2), "two"),
        (len, "len"),
        (Service, "Service"),
        (SyncCallable(), "SyncCallable"),
        (Unreadable(), "Unreadable"),
        (3, "int"),
    ],
)
def test_name_of(function, expected):
    """A callable has the name that a person knows it by, and an object that of its class."""
    assert expected == name_of(function)


@pytest.mark.parametrize(
    ("function", "counts"),
    [
        (nothing, {0}),
        (sync_function, {1}),
        (async_function, {1}),
        (two, {2}),
        (one_or_two, {1, 2}),
        (any_number, {0, 1, 2, 3}),
        (at_least_one, {1, 2, 3}),
        (keyword_needed, set()),
        (keyword_offered, {1}),
        (Service().start, {1}),
        (Service().make, {1}),
        (Service.help, {1}),
        (Service.stop, {2}),
        (SyncCallable(), {1}),
        (partial(two, 1), {1}),
        (partial(keyword_needed, key=1), {1}),
        (len, {1}),
        (Unreadable(), {0, 1, 2, 3}),
        (max, {0, 1, 2, 3}),
        (MadeBySomethingElse, {0}),
        (MadeBySomethingElse(), {1}),
        (CallsNobody(), {2}),
        (3, set()),
    ],
)
def test_takes(function, counts):
    """Which numbers of arguments a callable takes is known; where it is not, any number will do."""
    assert counts == {count for count in range(4) if takes(function, count)}


def test_takes_positional():
    """Whether a function has room for a scope is known; where it is not, it is taken to have."""
    assert [True, True, True] == [*map(takes_positional, (keyword_needed, any_number, Unreadable()))]
    assert not takes_positional(nothing)
    assert not takes_positional(lambda *, key, **more: None)


def generator(x):
    yield x  # pragma: no cover - never run


async def async_generator(x):
    yield x  # pragma: no cover - never run


@pytest.mark.parametrize(
    ("functions", "count", "expected"),
    [
        ((two, None, None), 2, True),
        ((two, None, None), 1, False),
        ((one_or_two, None, None), 1, True),
        ((two, two, sync_function), 2, True),
        ((two, any_number, len), 2, True),
        ((two, sync_function, None), 2, False),
        ((two, None, two), 2, False),
        ((keyword_offered, None, None), 1, True),
        ((keyword_needed, None, None), 1, False),
        ((sync_function, keyword_needed, None), 1, False),
        ((generator, None, None), 1, False),
        ((async_generator, None, None), 1, False),
        ((sync_function, generator, None), 1, False),
        ((sync_function, None, partial(generator)), 1, False),
        ((3, None, None), 1, False),
    ],
)
def test_fits(functions, count, expected):
    """A step fits if its action and compensation take so many arguments, its undo one, and none yields."""
    assert expected is fits(*functions, count)


def test_call_problem():
    """What is wrong with a call is said in Python's own words."""
    assert call_problem(two, (1,), {"y": 2}) is None
    assert "missing a required argument: 'y'" == call_problem(two, (1,), {})
    assert "too many positional arguments" == call_problem(two, (1, 2, 3), {})
    assert "got an unexpected keyword argument 'z'" == call_problem(two, (1, 2), {"z": 3})
    assert call_problem(Unreadable(), (1, 2), {"z": 3}) is None


@pytest.mark.parametrize(
    ("action", "compensation"),
    [
        (two, two),
        (two, lambda a, b: None),
        (two, any_number),
        (two, one_or_two),
        (one_or_two, lambda a, b=None: None),
        (one_or_two, any_number),
        (keyword_offered, keyword_offered),
        (keyword_offered, lambda x, *, key="other": None),
        (keyword_needed, lambda x, key: None),
        (any_number, nothing),
        (lambda **kwargs: None, nothing),
        (Unreadable(), nothing),
        (two, Unreadable()),
        (Service().start, sync_function),
        (sync_function, Service().stop),
        (nothing, nothing),
    ],
)
def test_compensation_that_fits(action, compensation):
    """A compensation that can take all that its action takes has no problem."""
    assert compensation_problem(action, compensation) is None


@pytest.mark.parametrize(
    ("action", "compensation", "problem"),
    [
        (two, nothing, "too many positional arguments"),
        (two, sync_function, "too many positional arguments"),
        (sync_function, two, "missing a required argument: 'y'"),
        # The shortest call fits, the longest does not; and the other way round.
        (one_or_two, sync_function, "too many positional arguments"),
        (one_or_two, two, "missing a required argument: 'y'"),
        (keyword_offered, sync_function, "got an unexpected keyword argument 'key'"),
        (keyword_needed, sync_function, "got an unexpected keyword argument 'key'"),
        (nothing, keyword_needed, "missing a required"),
        (two, Service().start, "too many positional arguments"),
        (Service().start, two, "missing a required argument: 'y'"),
        (sync_function, keyword_needed, "missing a required"),
    ],
)
def test_compensation_that_does_not_fit(action, compensation, problem):
    """A compensation that cannot take a call that its action takes is told from one that can."""
    said = compensation_problem(action, compensation)
    assert said is not None
    assert problem in said
    assert name_of(action) in said
    assert name_of(compensation) in said


def test_a_decorated_function_is_what_it_takes_itself():
    """A decorator may add or take away arguments, so what it wraps does not say what it takes."""

    @wraps(two)
    def anything(*args): ...

    @wraps(two)
    def only_one(x): ...

    assert takes(anything, 1)
    assert takes(only_one, 1)
    assert not takes(only_one, 2)
    assert compensation_problem(nothing, anything) is None
    assert compensation_problem(anything, nothing) is None
    assert compensation_problem(nothing, only_one) is not None
    assert call_problem(only_one, (1,), {}) is None
    assert call_problem(only_one, (1, 2), {}) is not None
