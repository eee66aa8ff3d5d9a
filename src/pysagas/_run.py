"""A run from its start to its end: what is taken back, and what goes on to the caller."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

from ._attempts import UNKNOWN
from ._effects import CallRest, current_place, reset_place
from ._errors import (
    AlreadyCommitted,
    CompensationFailed,
    ScopeBusy,
    add_note,
    give_context,
    leaves,
    orders_to_quit,
    raise_as_it_is,
)
from ._log import (
    COMPENSATED,
    Record,
    Sequence,
    must_take_back,
    pending_names,
    records,
)
from ._outcome import Outcome, SagaState, attach_outcome
from ._rollback import roll_back
from ._shelter import weightiest

__all__ = ["conclude", "run_plain", "run_through", "verdict"]

T = TypeVar("T")
Path = tuple[int, ...]

# How many names a note lists before it counts the rest.
_LISTED_NAMES = 10


def verdict(
    sequence: Sequence,
    path: Path,
    error: BaseException | None,
    late: BaseException | None,
) -> BaseException | None:
    """Chooses what goes on to the caller when something has been taken back.

    An order to quit goes over a failed compensation, that over a cancellation, and that over a
    failure. What yields is the cause or context of what goes on.

    Args:
        sequence: In whose log it stood.
        path: What has been taken back, of which the failures count.
        error: What started the rollback.
        late: The interruption that arrived meanwhile.
    """
    run = sequence.run
    failures = run.failures_in(path)
    failed: CompensationFailed | None = None
    if failures:
        if isinstance(error, CompensationFailed) and error.failures == tuple(failures):
            failed = error
        else:
            # A failure reported before, which now stands for what started all this.
            # (An order to quit carries it as its cause.)
            again = run.reported
            if again is not None and (
                error is again
                or (error is not None and orders_to_quit(error) and error.__cause__ is again)
            ):
                started = again.error
            else:
                started = error
            now = Outcome(sequence.root, SagaState.FAILED, None, started)
            _ = now.steps
            failed = CompensationFailed(run.saga, started, failures, now)
        run.reported = failed
    quitting = weightiest(error, *failures, late)
    chosen: BaseException | None
    if quitting is not None and orders_to_quit(quitting):
        chosen = quitting
        if failed is not None:
            quitting.__cause__ = failed
    else:
        chosen = failed or late or error
    if chosen is not None:
        if chosen is not failed:
            give_context(chosen, error)
        give_context(chosen, late)
    return chosen


async def conclude(
    root: Sequence, value: T, error: BaseException | None, expected: tuple[type[Exception], ...]
) -> Outcome[T]:
    """Ends a run, taking everything back if it failed.

    Raises:
        BaseException: What goes on to the caller; not what he expects, if the state was restored.
    """
    run = root.run
    if error is None:
        return Outcome(root, SagaState.COMPLETED, value, None, _WholeRollback(root))
    if isinstance(error, GeneratorExit):
        _warn_of_what_is_left(root)
        raise error
    late = None
    if must_take_back(root) or (root.middleware and root.entries):
        try:
            late = await roll_back(root, 0, root.name, root.path)
        except BaseException:
            _warn_of_what_is_left(root)
            raise
    chosen = verdict(root, root.path, error, late)
    assert chosen is not None
    restored = not (run.failures or root.committed or must_take_back(root))
    outcome: Outcome[Any] = Outcome(
        root, SagaState.COMPENSATED if restored else SagaState.FAILED, None, chosen
    )
    run.ended = outcome
    add_note(chosen, _what_happened(root, error))
    for raised in (chosen, run.reported):
        if raised is not None:
            attach_outcome(raised, outcome)
    if run.reported is not None:
        run.reported.settle(outcome, list(pending_names(root)))
    if restored and chosen is error and is_expected(error, expected):
        return outcome
    try:
        raise_as_it_is(chosen)
    finally:
        del chosen, error, late


def _warn_of_what_is_left(root: Sequence) -> None:
    left = list(pending_names(root))
    if left:
        warnings.warn(
            f"saga {root.run.saga!r} was closed in the middle, where it could not await anything; not "
            f"taken back: {', '.join(left)}",
            ResourceWarning,
            stacklevel=3,
        )


def is_expected(error: BaseException, expected: tuple[type[Exception], ...]) -> bool:
    """Tells whether a caller named this failure; a group counts if every leaf does."""
    return all(isinstance(leaf, expected) for leaf in leaves(error))


def _what_happened(root: Sequence, error: BaseException) -> str:
    """Writes the note that a failed run adds to its exception."""
    causes = set(map(id, leaves(error)))
    failed: list[Record] = []
    taken_back: list[Record] = []
    in_doubt: list[Record] = []
    for entry in reversed(root.entries):
        # Nearly all are records: what a generator for each costs shows in a long rollback.
        for record in (entry,) if isinstance(entry, Record) else records(entry):
            state = record.state
            if state is COMPENSATED:
                taken_back.append(record)
            elif state is UNKNOWN:
                in_doubt.append(record)
            if record.error is not None and id(record.error) in causes:
                failed.append(record)
    where = f" in step {_listed(failed)}" if failed else ""
    return (
        f"saga {root.run.saga!r} failed{where}; rolled back: {_listed(taken_back)}; "
        f"in doubt: {_listed(in_doubt)}"
    )


def _listed(those: list[Record]) -> str:
    if not those:
        return "nothing"
    shown = ", ".join(repr(record.name) for record in those[:_LISTED_NAMES])
    more = len(those) - _LISTED_NAMES
    return shown if more <= 0 else f"{shown} and {more} more"


async def run_plain(
    root: Sequence, args: tuple[Any, ...], kwargs: dict[str, Any], expected: tuple[type[Exception], ...]
) -> Outcome[Any]:
    """Runs a saga from its start to its end.

    Raises:
        BaseException: What goes on to the caller.
    """
    assert root.saga is not None
    error: BaseException | None = None
    value: Any = None
    token = current_place.set(root)
    try:
        value = await root.saga.forward(root, args, kwargs)
    except BaseException as raised:
        error = raised
    reset_place(token)
    if error is None:
        return Outcome(root, SagaState.COMPLETED, value, None, _WholeRollback(root))
    try:
        return await conclude(root, value, error, expected)
    finally:
        del error


async def run_through(
    root: Sequence, args: tuple[Any, ...], kwargs: dict[str, Any], expected: tuple[type[Exception], ...]
) -> Outcome[Any]:
    """Runs a saga from its start to its end as an effect, through its middleware.

    Raises:
        BaseException: What goes on to the caller.
    """
    inner: Outcome[Any] | None = None

    async def run() -> Any:
        nonlocal inner
        try:
            inner = await run_plain(root, args, kwargs, ())
        except BaseException:
            inner = root.run.ended
            raise
        return inner.value

    error: BaseException | None = None
    value: Any = None
    try:
        # As `through`, written out: all that the run waits for goes through here.
        middleware = root.middleware
        effect = root.effect("saga", root.name, root.path)
        rest = CallRest(middleware[1:], effect, run, None, root.saga)
        try:
            value = await middleware[0](effect, rest)
        finally:
            rest.ended = True
    except GeneratorExit:
        raise
    except BaseException as raised:
        error = raised
    if error is None and inner is not None and inner.error is None and inner.value is value:
        return inner
    if inner is None or inner.error is None:
        # Not run, or completed. What a middleware raises then is a failure like any other, and one
        # that returns a value has the last word on it.
        return await conclude(root, value, error, expected)
    if error is None or error is inner.error:
        # Swallowing the error does not change what happened.
        error = inner.error
        if inner.state is SagaState.COMPENSATED and is_expected(error, expected):
            return inner
    else:
        attach_outcome(error, inner)
    try:
        raise_as_it_is(error)
    finally:
        del error


class _WholeRollback:
    """Takes back a run that had succeeded, once."""

    __slots__ = ("_later", "_root", "_running")

    def __init__(self, root: Sequence) -> None:
        self._root = root
        self._running = False
        self._later: Outcome[Any] | None = None

    async def __call__(self) -> Outcome[Any]:
        if self._later is not None:
            return self._later
        root = self._root
        run = root.run
        if root.committed:
            raise AlreadyCommitted(
                f"saga {run.saga!r} has passed its commit: what was done before it stays done, so "
                "the run cannot be taken back"
            )
        if self._running:
            raise ScopeBusy(f"saga {run.saga!r} is being taken back by another task")
        self._running = True
        late = None
        try:
            if must_take_back(root) or root.middleware:
                late = await roll_back(root, 0, root.name, root.path)
        finally:
            self._running = False
        chosen = verdict(root, root.path, None, late)
        state = SagaState.FAILED if run.failures else SagaState.COMPENSATED
        self._later = Outcome(root, state, None, chosen if run.failures else None)
        if run.reported is not None:
            run.reported.settle(self._later, list(pending_names(root)))
        if chosen is None:
            return self._later
        attach_outcome(chosen, self._later)
        raise chosen
