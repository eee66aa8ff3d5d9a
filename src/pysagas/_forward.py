"""Going forward: steps, groups and sagas are carried out, and written to the log as they start.

What is here only goes forward. What fails stays in the log as it is, and the exception goes on: so
members of a group, and the parts of a saga built as data, leave all compensation to whoever called
them. Whoever may catch the exception and go another way (a call on a scope, see ``_scope``) takes its
own entry back before it raises; the end of a run (see ``_run``) takes back the whole.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextvars import Context, copy_context
from functools import partial
from typing import Any

from anyio import create_task_group, get_cancelled_exc_class
from anyio.lowlevel import checkpoint_if_cancelled

from ._attempts import COMPLETED, NOT_APPLIED, NOT_STARTED, UNKNOWN, attempt
from ._definitions import Bound, Commit, Definition, Parallel, Step
from ._effects import CallRest, Effect, Middleware, current_place, through
from ._errors import (
    MiddlewareError,
    give_context,
    leaves,
    orders_to_quit,
    raise_as_it_is,
    was_closed,
    without_cancellation,
)
from ._log import (
    CommitMark,
    Entry,
    Group,
    KeywordRecord,
    MemberPlace,
    Record,
    SagaDefinition,
    Sequence,
)
from ._shelter import weightiest

__all__ = [
    "carry_out",
    "carry_out_commit",
    "carry_out_parts",
    "new_entry",
    "note_failure",
]

Path = tuple[int, ...]


def new_entry(
    definition: Definition[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    owner: Sequence,
    path: Path,
) -> Record | Group | Sequence:
    """Makes the entry for a part of a saga, for the log, before anything of it runs."""
    if isinstance(definition, Step):
        if not kwargs:
            return Record(definition, definition.take_back, definition.take_undo, args, NOT_STARTED)
        record = KeywordRecord(
            definition, definition.take_back, definition.take_undo, args, NOT_STARTED
        )
        record.kwargs = kwargs
        return record
    if isinstance(definition, Parallel):
        return Group(definition, path)
    assert isinstance(definition, SagaDefinition)
    return Sequence(owner.run, owner, path, definition, owner.middleware + definition.middleware)


async def carry_out(
    entry: Record | Group | Sequence,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    owner: Sequence,
    path: Path,
) -> Any:
    """Carries out an entry that is in the log, forward only."""
    if isinstance(entry, Record):
        return await _carry_out_step(entry, owner, path)
    if isinstance(entry, Group):
        if not owner.middleware:
            return await _carry_out_members(entry, owner, args, kwargs)
        members = partial(_carry_out_members, entry, owner, args, kwargs)
        effect = owner.effect("group", entry.name, path)
        return await _through_whole(owner.middleware, effect, members, entry.definition)
    assert entry.saga is not None
    if not entry.middleware:
        return await entry.saga.forward(entry, args, kwargs)
    forward = partial(entry.saga.forward, entry, args, kwargs)
    effect = entry.effect("saga", entry.name, path)
    return await _through_whole(entry.middleware, effect, forward, entry.saga)


async def _through_whole(
    middleware: tuple[Middleware, ...],
    effect: Effect,
    forward: Callable[[], Awaitable[Any]],
    definition: Definition[..., Any],
) -> Any:
    """Carries out a group or an inner saga as an effect: swallowing its failure does not undo it.

    What is half done must go back, and it is the failure that makes it go back.
    """
    failed: list[BaseException] = []

    async def watched() -> Any:
        try:
            return await forward()
        except BaseException as error:
            failed.append(error)
            raise

    result = await through(middleware, effect, watched, definition=definition)
    if not failed:
        return result
    try:
        raise failed[0]
    finally:
        failed.clear()


async def _carry_out_step(record: Record, owner: Sequence, path: Path) -> Any:
    step: Step[..., Any] = record.definition
    act: Callable[[], Awaitable[Any]] = (
        partial(attempt, record, step) if step.attempts is None else partial(step.attempts, record)
    )
    middleware = owner.middleware
    if not middleware:
        return await act()
    # As `through`, written out: that would be one coroutine more for each step.
    effect = owner.effect("action", step.name, path)
    rest = CallRest(middleware[1:], effect, act, record, None)
    try:
        result = await middleware[0](effect, rest)
    finally:
        rest.ended = True
    if record.state is NOT_STARTED:
        # A middleware answered in the action's place.
        record.state = COMPLETED
        record.result = result
    return result


def note_failure(entry: Entry, error: BaseException) -> None:
    """Writes to a record what its action raised, where the short way left that out."""
    if isinstance(entry, Record) and entry.state is UNKNOWN and entry.error is None:
        entry.error = error
        step = entry.definition
        if (
            isinstance(step, Step)
            and isinstance(error, step.not_applied)
            and not isinstance(error, BaseExceptionGroup)
        ):
            entry.state = NOT_APPLIED


# --- sequences ----------------------------------------------------------------------------------


async def carry_out_parts(sequence: Sequence, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Carries out the parts of a saga built as data, one after the other."""
    assert sequence.saga is not None
    entries = sequence.entries
    append = entries.append
    plain = not sequence.middleware
    try:
        for part in sequence.saga.parts:
            if isinstance(part, Bound):
                definition, its_args, its_kwargs = part.definition, part.args, part.kwargs
            else:
                definition, its_args, its_kwargs = part, args, kwargs
            if isinstance(definition, Step) and not its_kwargs:
                record = Record(
                    definition, definition.take_back, definition.take_undo, its_args, NOT_STARTED
                )
                append(record)
                if plain and definition.simple:
                    # As `_carry_out_step` and `attempt`, written out for the step that asks for
                    # nothing: the long way costs three times as much as the step itself.
                    record.state = UNKNOWN
                    record.result = await definition.action(*its_args)
                    record.state = COMPLETED
                else:
                    await _carry_out_step(record, sequence, (*sequence.path, len(entries) - 1))
            elif isinstance(definition, Commit):
                await carry_out_commit(sequence)
            else:
                path = (*sequence.path, len(entries))
                entry = new_entry(definition, its_args, its_kwargs, sequence, path)
                append(entry)
                await carry_out(entry, its_args, its_kwargs, sequence, path)
    except BaseException as error:
        for last in entries[-1:]:  # none, if a signal came before the first
            note_failure(last, error)
        raise


async def carry_out_commit(sequence: Sequence) -> None:
    """Passes the point of no return of the outermost sequence."""
    index = len(sequence.entries)
    sequence.entries.append(CommitMark())

    async def commit() -> None:
        sequence.committed = index + 1

    if not sequence.middleware:
        await commit()
        return
    effect = sequence.effect("commit", CommitMark.name, (*sequence.path, index))
    await through(sequence.middleware, effect, commit)
    if sequence.committed <= index:
        raise MiddlewareError(
            f"the commit of saga {sequence.saga_name!r} at {effect.path} did not happen: a middleware "
            "returned without call_next"
        )


# --- groups -------------------------------------------------------------------------------------


class _InContext(Awaitable[None]):
    """Awaits a coroutine in a context of its own, within the task that awaits this.

    A new task would do the same for some 20 µs: this is what makes ten thousand members cost no
    more than the hundred tasks that take them.
    """

    __slots__ = ("_context", "_coroutine")

    def __init__(self, context: Context, coroutine: Coroutine[Any, Any, None]) -> None:
        self._context = context
        self._coroutine = coroutine

    def __await__(self) -> Generator[Any, Any, None]:
        run, coroutine = self._context.run, self._coroutine
        try:
            yielded = run(coroutine.send, None)
            while True:
                try:
                    sent = yield yielded
                except BaseException as error:
                    yielded = run(coroutine.throw, error)
                else:
                    yielded = run(coroutine.send, sent)
        except StopIteration:
            return


async def _carry_out_members(
    group: Group, owner: Sequence, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Carries out the members of a group, at the same time.

    No member ends by an exception that goes through the task group: each leaves what it raised in
    `failures`. A task group would lose some of them: on asyncio a native cancellation together with
    a member's failure, a member that awaits a cancelled future, and SystemExit would stop the loop;
    on Trio the siblings' cancellations come out as well.
    """
    definition = group.definition
    count = len(definition.parts)
    plain = not owner.middleware
    results: list[Any] = [None] * count
    failures: dict[int, BaseException] = {}
    cancelled: list[BaseException] = []
    cancelled_class = get_cancelled_exc_class()
    ended = 0
    stopped = False
    feed = iter(range(count))

    # Trio starts a batch of tasks in any order. That each takes the next member from one iterator is
    # what enters the members in the order given.
    async def member(index: int | None = None) -> None:
        nonlocal ended, stopped
        if index is None:
            if stopped:
                return
            index = next(feed)
        part = definition.parts[index]
        try:
            if isinstance(part, Bound):
                step, its_args, its_kwargs = part.definition, part.args, part.kwargs
            else:
                step, its_args, its_kwargs = part, args, kwargs
            if plain and isinstance(step, Step) and step.simple and not its_kwargs:
                # As `_carry_out_member`, written out for the step that asks for nothing.
                current_place.set(MemberPlace(owner, group, index, "action"))
                record = Record(step, step.take_back, step.take_undo, its_args, UNKNOWN)
                group.members[index] = record
                try:
                    record.result = results[index] = await step.action(*its_args)
                except BaseException as error:
                    note_failure(record, error)
                    raise
                record.state = COMPLETED
            else:
                results[index] = await _carry_out_member(
                    group, owner, index, step, its_args, its_kwargs
                )
            ended += 1
        except GeneratorExit:
            raise
        except BaseException as error:
            # In the same instant, so that no further member starts.
            stopped = True
            failure = without_cancellation(error, cancelled_class)
            if failure is None:
                cancelled.append(error)
            else:
                failures[index] = failure
            if definition.on_failure == "cancel" or not isinstance(error, Exception):
                tasks.cancel_scope.cancel()

    async def take_many() -> None:
        for index in feed:
            if stopped:
                return
            await _InContext(copy_context(), member(index))

    limit = definition.limit or count
    outside: BaseException | None = None
    before = sys.exception()
    try:
        async with create_task_group() as tasks:
            for _ in range(min(count, limit)):
                tasks.start_soon(take_many if limit < count else member)
    except BaseException as error:
        if was_closed(error, before):
            raise GeneratorExit from error
        outside = weightiest(*leaves(error))
    if outside is None:
        if ended == count:
            return tuple(results)
        # A cancellation that arrives together with a failure may not have been noticed yet; which
        # of the two goes on must not depend on the loop.
        try:
            await checkpoint_if_cancelled()
        except cancelled_class as error:
            outside = error
    chosen = _group_error(group, owner, failures, outside, cancelled)
    try:
        if chosen.__context__ is not None:
            # What yields to it must not be lost where the caller is handling something else.
            raise_as_it_is(chosen)
        raise chosen
    finally:
        # An exception whose traceback holds this frame must not be held by it.
        del before, outside, chosen
        failures.clear()
        cancelled.clear()


def _group_error(
    group: Group,
    owner: Sequence,
    failures: dict[int, BaseException],
    outside: BaseException | None,
    cancelled: list[BaseException],
) -> BaseException:
    """Chooses what a failed group raises: an order to quit, cancellation from outside, failures."""
    errors = [failures[index] for index in sorted(failures)]
    together: BaseException | None = None
    if errors:
        together = BaseExceptionGroup(
            f"group {group.name!r} of saga {owner.saga_name!r}: {len(errors)} of "
            f"{len(group.members)} members failed",
            errors,
        )
    quitting = next(filter(orders_to_quit, errors), None)
    if quitting is not None:
        if len(errors) > 1:
            give_context(quitting, together)
        return quitting
    if outside is not None:
        give_context(outside, together)
        return outside
    if together is not None:
        return together
    # A member was cancelled by itself: it awaited a cancelled future, or somebody cancelled its
    # task; where that was before its first line, there is not even an exception.
    return cancelled[0] if cancelled else get_cancelled_exc_class()()


def _carry_out_member(
    group: Group,
    owner: Sequence,
    index: int,
    definition: Definition[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Awaitable[Any]:
    path = (*group.path, index)
    entry = new_entry(definition, args, kwargs, owner, path)
    group.members[index] = entry
    if isinstance(entry, Record):
        current_place.set(MemberPlace(owner, group, index, "action"))
        return _carry_out_step(entry, owner, path)
    if isinstance(entry, Sequence):
        current_place.set(entry)
    return carry_out(entry, args, kwargs, owner, path)
