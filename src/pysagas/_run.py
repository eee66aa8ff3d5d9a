"""A run from its start to its end: what is taken back, and what goes on to the caller."""

from __future__ import annotations

import warnings
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from ._attempts import UNKNOWN
from ._effects import through
from ._errors import (
    AlreadyCommitted,
    CompensationFailed,
    ScopeBusy,
    add_note,
    leaves,
)
from ._log import (
    COMPENSATED,
    Record,
    Run,
    Sequence,
    must_take_back,
    pending_names,
    records,
)
from ._outcome import Outcome, SagaState, attach_outcome
from ._rollback import roll_back
from ._shelter import weightiest

__all__ = ["conclude", "run_whole", "verdict"]

T = TypeVar("T")
Path = tuple[int, ...]

# How many names a note lists before it counts the rest.
_LISTED_NAMES = 10


def verdict(
    run: Run,
    path: Path,
    error: BaseException | None,
    late: BaseException | None,
) -> BaseException | None:
    """Chooses what goes on to the caller when something has been taken back.

    An order to quit goes over a failed compensation, that over a cancellation, and that over a
    failure. What yields is the cause or context of what goes on.

    Args:
        run: The run.
        path: What has been taken back, of which the failures count.
        error: What started the rollback.
        late: The interruption that arrived meanwhile.
    """
    failures = run.failures_in(path)
    failed: CompensationFailed | None = None
    if failures:
        if isinstance(error, CompensationFailed) and error.failures == tuple(failures):
            failed = error
        else:
            # A failure reported before, which now stands for what started all this.
            again = run.reported if error is run.reported else None
            started = error if again is None else again.error
            now = Outcome(run, SagaState.FAILED, None, started)
            _ = now.steps
            failed = CompensationFailed(run.saga, started, failures, now)
        run.reported = failed
    quitting = weightiest(error, *failures, late)
    chosen: BaseException | None
    if isinstance(quitting, KeyboardInterrupt | SystemExit):
        chosen = quitting
        if failed is not None:
            quitting.__cause__ = failed
    else:
        chosen = failed or late or error
    if chosen is not None and chosen is not error and chosen is not failed and error is not None:
        chosen.__context__ = error
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
        error = run.reported  # a function that caught this and returned has failed all the same
        if error is None:
            return Outcome(run, SagaState.COMPLETED, value, None, _WholeRollback(root))
    if isinstance(error, GeneratorExit):
        left = list(pending_names(root))
        if left:
            warnings.warn(
                f"saga {run.saga!r} was closed in the middle, where it could not await anything; "
                f"not taken back: {', '.join(left)}",
                ResourceWarning,
                stacklevel=2,
            )
        raise error
    late = None
    if must_take_back(root) or (root.middleware and root.entries):
        late = await roll_back(root, 0, root.name, root.path)
    chosen = verdict(run, root.path, error, late)
    assert chosen is not None
    restored = not run.failures and not root.committed
    outcome: Outcome[Any] = Outcome(
        run, SagaState.COMPENSATED if restored else SagaState.FAILED, None, chosen
    )
    run.ended = outcome
    add_note(chosen, _what_happened(root, error))
    for raised in (chosen, run.reported):
        if raised is not None:
            attach_outcome(raised, outcome)
    if run.reported is not None:
        run.reported.outcome = outcome
    if restored and chosen is error and is_expected(error, expected):
        return outcome
    try:
        raise chosen
    finally:
        del chosen, error, late


def is_expected(error: BaseException, expected: tuple[type[Exception], ...]) -> bool:
    """Tells whether a caller named this failure; a group counts if every leaf does."""
    return all(isinstance(leaf, expected) for leaf in leaves(error))


def _what_happened(root: Sequence, error: BaseException) -> str:
    """Writes the note that a failed run adds to its exception."""
    causes = list(leaves(error))
    failed: list[str] = []
    taken_back: list[str] = []
    in_doubt: list[str] = []
    for entry in reversed(root.entries):
        for record in (entry,) if isinstance(entry, Record) else records(entry):
            if record.state is COMPENSATED:
                taken_back.append(record.name)
            elif record.state is UNKNOWN:
                in_doubt.append(record.name)
            if record.error is not None and any(record.error is cause for cause in causes):
                failed.append(record.name)
    where = f" in step {_listed(failed)}" if failed else ""
    return (
        f"saga {root.run.saga!r} failed{where}; rolled back: {_listed(taken_back)}; "
        f"in doubt: {_listed(in_doubt)}"
    )


def _listed(names: list[str]) -> str:
    if not names:
        return "nothing"
    more = len(names) - _LISTED_NAMES
    shown = ", ".join(map(repr, names[:_LISTED_NAMES]))
    return shown if more <= 0 else f"{shown} and {more} more"


async def run_whole(
    root: Sequence,
    forward: Callable[[], Awaitable[T]],
    expected: tuple[type[Exception], ...],
) -> Outcome[T]:
    """Runs a saga from its start to its end, as an effect.

    Raises:
        BaseException: What goes on to the caller.
    """
    if not root.middleware:
        return await _run(root, forward, expected)
    inner: Outcome[T] | None = None

    async def run() -> T:
        nonlocal inner
        try:
            inner = await _run(root, forward, ())
        except BaseException:
            inner = root.run.ended
            raise
        return inner.value

    error: BaseException | None = None
    value: Any = None
    try:
        value = await through(root.middleware, root.effect("saga", root.name, root.path), run)
    except GeneratorExit:
        raise
    except BaseException as raised:
        error = raised
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
        raise error
    finally:
        del error


async def _run(
    root: Sequence, forward: Callable[[], Awaitable[T]], expected: tuple[type[Exception], ...]
) -> Outcome[T]:
    error: BaseException | None = None
    value: Any = None
    try:
        value = await forward()
    except BaseException as raised:
        error = raised
    try:
        return await conclude(root, value, error, expected)
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
        if must_take_back(root) or root.middleware:
            late = await roll_back(root, 0, root.name, root.path)
        chosen = verdict(run, root.path, None, late)
        state = SagaState.FAILED if run.failures else SagaState.COMPENSATED
        self._later = Outcome(run, state, None, chosen if run.failures else None)
        if run.reported is not None:
            run.reported.outcome = self._later
        if chosen is None:
            return self._later
        attach_outcome(chosen, self._later)
        raise chosen
