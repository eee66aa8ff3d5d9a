"""The exceptions, sorted by who must act.

- The caller wrote something that cannot work: `SagaDefinitionError`, `ScopeClosed`, `ScopeBusy`,
  `AlreadyCommitted`, `MiddlewareError`. Nothing has run because of the refused call.
- Somebody must mend what could not be taken back: `CompensationFailed`.

A step's own failure is none of these: it reaches the caller as the exception that the step raised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, cast

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ._outcome import Outcome

__all__ = [
    "AlreadyCommitted",
    "CompensationFailed",
    "MiddlewareError",
    "SagaDefinitionError",
    "SagaError",
    "ScopeBusy",
    "ScopeClosed",
]

# More lines than these in one message hide what matters; the rest is counted.
_LISTED_FAILURES = 20
_LISTED_REASONS = 3


class SagaError(Exception):
    """Base of every exception that this library itself raises."""


class SagaDefinitionError(SagaError, ValueError):
    """A saga, a group or a step is written in a way that cannot work; nothing has run."""


class ScopeClosed(SagaError, RuntimeError):
    """Forward work was asked of a scope that has ended, or whose rollback has begun or failed."""


class ScopeBusy(SagaError, RuntimeError):
    """A scope was used while a call on it, or a scope nested in it, was still open."""


class AlreadyCommitted(SagaError, RuntimeError):
    """A run that has passed its commit was asked to take itself back; nothing has run."""


class MiddlewareError(SagaError, RuntimeError):
    """A middleware used ``call_next`` in a way that its effect does not allow."""


class CompensationFailed(SagaError):
    """A rollback could not take everything back; somebody has to look.

    It is a plain exception, so that ``except*`` can name it. Its ``__cause__`` is a group of `error`
    and `failures`, so that a traceback shows each of them.

    Attributes:
        error: What started the rollback; None where `Outcome.rollback` did.
        failures: What the failed compensations raised, in the order in which they failed. Each
            carries a note that names its step. A rollback that was cut off by its time limit, or
            kept from running by a middleware, adds an exception that says so.
        outcome: The report of the run, with the state of each step. Within a saga's function it is
            the state of things at the moment of the failure; once the saga has ended, the final one.
    """

    error: BaseException | None
    failures: tuple[BaseException, ...]
    outcome: Outcome[object]
    args: tuple[Any, ...]
    __cause__: BaseException | None

    def __init__(
        self,
        saga: str,
        error: BaseException | None,
        failures: Sequence[BaseException],
        outcome: Outcome[object],
    ) -> None:
        self.error = error
        self.failures = tuple(failures)
        super().__init__("\n".join(_message_lines(saga, error, self.failures)))
        self.settle(outcome)
        exceptions = self.failures if error is None else (error, *self.failures)
        if exceptions:
            self.__cause__ = BaseExceptionGroup(
                f"the rollback of saga {saga!r}: what started it, and what failed in it", exceptions
            )

    def settle(self, outcome: Outcome[object], not_begun: Sequence[str] = ()) -> None:
        """Gives the report of the run; for the library's own use.

        Args:
            outcome: The report.
            not_begun: The names of the steps that are still to be taken back, which was not even
                begun; the message ends with them.
        """
        self.outcome = outcome
        # What a time limit cut off is named by its own error.
        if not_begun and f"; not begun: {', '.join(not_begun)}" not in self.args[0]:
            self.args = (
                f"{self.args[0]}\n  not even begun: {_listed(list(map(repr, not_begun)), _LISTED_FAILURES)}",
            )


def _message_lines(
    saga: str, error: BaseException | None, failures: tuple[BaseException, ...]
) -> Iterator[str]:
    reason = "" if error is None else f" after {describe_each(error)}"
    yield f"saga {saga!r} could not be taken back whole{reason}:"
    for failure in failures[:_LISTED_FAILURES]:
        place = next(
            (note for note in reversed(notes_of(failure)) if note.startswith("compensation of")), ""
        )
        yield f"  {place + ': ' if place else ''}{describe(failure)}"
    if len(failures) > _LISTED_FAILURES:
        yield f"  ... and {len(failures) - _LISTED_FAILURES} more (see .failures)"


def describe_each(error: BaseException) -> str:
    """Describes an exception; of a group those in it, since their number does not say what happened."""
    return _listed([describe(leaf) for leaf in leaves(error)], _LISTED_REASONS, "; ")


def _listed(texts: Sequence[str], most: int, comma: str = ", ") -> str:
    shown = comma.join(texts[:most])
    return shown if len(texts) <= most else f"{shown} and {len(texts) - most} more"


def describe(error: BaseException) -> str:
    """Gives an exception as its type and the first line of its message."""
    try:
        text = str(error).partition("\n")[0]
    except Exception:  # a broken __str__ must not cost the rollback
        text = ""
    return f"{type(error).__name__}: {printable(text)}" if text else type(error).__name__


def printable(text: str) -> str:
    """Keeps a name or a message, which may hold anything, from moving the cursor or ending its line."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def add_note(error: BaseException, note: str) -> None:
    """Adds a PEP 678 note, once.

    One exception object may be raised by many runs (a module-level constant): the same note is not
    added twice, and an exception that refuses new attributes goes without.
    """
    try:
        if note not in notes_of(error):
            error.add_note(note)
    except Exception:  # noqa: S110 - a frozen exception class, say, must not cost the rollback
        pass


def notes_of(error: BaseException) -> list[str]:
    """Gives the PEP 678 notes of an exception, as far as it lets itself be asked."""
    try:
        return list(map(str, error.__notes__))
    except Exception:  # no notes, or a class with attributes of its own mind
        return []


def without_cancellation(error: BaseException, cancelled: type[BaseException]) -> BaseException | None:
    """Gives what is left of an exception when its cancellations are taken out; None for nothing.

    A task group, or a Trio nursery, within a cancelled task may raise a group that holds both.
    """
    if isinstance(error, cancelled):
        return None
    if isinstance(error, BaseExceptionGroup):
        return cast("BaseExceptionGroup[BaseException]", error).split(cancelled)[1]
    return error


def give_context(error: BaseException, earlier: BaseException | None) -> None:
    """Puts what yields at the end of the contexts of what goes on, so that a traceback shows it."""
    if earlier is None:
        return
    # The two may have a context in common, what was being handled when all this began: then what
    # yields goes before it.
    shared = set(map(id, _contexts(earlier)))
    if id(error) in shared:
        return
    last = error
    for context in _contexts(error):
        if id(context) in shared:
            break
        last = context
    BaseException.__setattr__(last, "__context__", earlier)  # it may be a frozen dataclass


def raise_as_it_is(error: BaseException) -> NoReturn:
    """Raises an exception with the context that it has.

    ``raise`` sets the context to what is being handled at that moment, further out, and what yielded
    would be lost.
    """
    context = error.__context__
    try:
        raise error
    finally:
        # Not an assignment: an exception class may be a frozen dataclass.
        BaseException.__setattr__(error, "__context__", context)
        del context, error  # the traceback holds this frame


def _contexts(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__context__


def was_closed(error: BaseException, before: BaseException | None) -> bool:
    """Tells whether it comes from a coroutine that is being closed, where nothing can be awaited.

    A task group around the await turns the GeneratorExit into an error of its own, with the
    GeneratorExit as context.

    Args:
        error: What came out of the task group.
        before: What was being handled when the task group was entered: in the clean-up of an async
            generator that may be a GeneratorExit, and yet awaiting works there.
    """
    for cause in _contexts(error):
        if cause is before:
            break
        if isinstance(cause, GeneratorExit):
            return True
    return False


def orders_to_quit(error: BaseException | None) -> bool:
    """Tells whether it is, or holds, a KeyboardInterrupt or a SystemExit."""
    return error is not None and any(
        isinstance(leaf, KeyboardInterrupt | SystemExit) for leaf in leaves(error)
    )


def leaves(error: BaseException) -> Iterator[BaseException]:
    """Yields the exceptions in an exception group, or the one that is none."""
    if isinstance(error, BaseExceptionGroup):
        for part in cast("BaseExceptionGroup[BaseException]", error).exceptions:
            yield from leaves(part)
    else:
        yield error
