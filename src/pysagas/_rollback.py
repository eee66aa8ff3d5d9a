"""Unwinding the undo log.

The rules:

- What may have happened is taken back, the last entry first, one at a time. The members of a group
  are taken back together, each member's own entries in reverse.
- An entry is taken back once. Its state says whether that was begun: COMPENSATION_FAILED is written
  before the call, COMPENSATED after it. So whatever cuts the call off leaves the truth behind, and
  unwinding can be started again at any time: it passes over what is done.
- Nothing that a compensation raises stops the others, unless the saga asked for that.
- All of it runs in a shelter (see ``_shelter``). The only cancellations that reach it are its own
  time limits, and those of somebody who cancels all tasks there are, which cut one compensation.

What this module must not know: how anything goes forward.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from types import CoroutineType
from typing import Any

from anyio import CancelScope, current_time, get_cancelled_exc_class

from ._attempts import settle
from ._effects import Effect, current_place, through
from ._errors import MiddlewareError, orders_to_quit
from ._log import (
    COMPENSATED,
    COMPENSATION_FAILED,
    Entry,
    Group,
    MemberPlace,
    Record,
    Sequence,
    WayBack,
    must_take_back,
    pending_names,
)
from ._shelter import shelter, weightiest
from ._signatures import is_awaitable

__all__ = ["roll_back"]


async def roll_back(
    sequence: Sequence, start: int, name: str, path: tuple[int, ...]
) -> BaseException | None:
    """Takes back the entries of `sequence` from `start` on, uninterrupted.

    What fails is noted in the run.

    Args:
        sequence: Whose entries.
        start: The first entry to take back; the last one is always the last of the sequence.
        name: What is taken back, for its effect.
        path: The path of that.

    Returns:
        The interruption that arrived meanwhile, for the caller to raise; None where none came.
    """
    run = sequence.run
    # Now, and not when unwinding begins: a call that is in flight takes back what it began, and may come
    # to that in between.
    last = len(sequence.entries) - 1 - sequence.in_flight
    ended = False
    asked = not sequence.middleware
    deadline: float | None = None

    async def unwound() -> None:
        nonlocal ended
        await _unwind(sequence, start, last)
        ended = True

    async def once() -> None:
        nonlocal asked
        if not asked:
            asked = True
            effect = sequence.effect("rollback", name, path)
            await through(sequence.middleware, effect, unwound)
            if not ended:
                run.failed_at(path, _not_run(effect))
        if not ended:
            await unwound()

    async def work() -> None:
        nonlocal deadline, ended
        direct = asked
        current_place.set(sequence)
        try:
            if sequence.rollback_timeout is None:
                await once()
            else:
                # Reckoned once: unwinding that is started again gets no more time than it had.
                if deadline is None:
                    deadline = current_time() + sequence.rollback_timeout
                await _limited(sequence, start, deadline, once, name, path)
                ended = True
        except GeneratorExit:
            raise
        except BaseException as error:
            # A middleware's, since compensations keep theirs to themselves. It is reported with the
            # others; and whatever it is, the compensations still have to run.
            if not isinstance(error, get_cancelled_exc_class()):
                run.failed_at(path, error)
                ended = ended or direct

    late: BaseException | None = None
    while not ended:
        # More than once where the child was cancelled before its first line, or a middleware failed.
        late = weightiest(late, await shelter(work))
        if isinstance(late, Exception):
            # Neither cancellation nor an order to quit: there is no event loop to run in.
            if isinstance(sys.exception(), GeneratorExit):
                raise GeneratorExit from late
            raise late
    return late


def _not_run(effect: Effect) -> BaseException:
    return MiddlewareError(
        f"a middleware around the rollback of {effect.name!r} at {effect.path} returned without "
        "call_next; the rollback was run without it"
    )


async def _limited(
    sequence: Sequence,
    start: int,
    deadline: float,
    unwinding: Callable[[], Awaitable[None]],
    name: str,
    path: tuple[int, ...],
) -> None:
    """Unwinds a sequence until a deadline; what is not begun by then is not begun any more."""
    scope = CancelScope(deadline=deadline)
    try:
        with scope:
            sequence.ends_at = scope
            await unwinding()
    finally:
        sequence.ends_at = None
        first = max(start, sequence.committed)
        left = [name for entry in sequence.entries[first:] for name in pending_names(entry)]
        if left and current_time() >= deadline:
            error = TimeoutError(
                f"the rollback of {name!r} did not end within {sequence.rollback_timeout} s; not "
                f"begun: {', '.join(left)}"
            )
            sequence.run.failed_at(path, error)


async def _unwind(sequence: Sequence, start: int, last: int) -> None:
    """Takes back the entries of a sequence from `last` to `start`."""
    entries = sequence.entries
    plain = not sequence.middleware
    watch = sequence.may_end_early()
    first = max(start, sequence.committed)
    try:
        for index in range(last, first - 1, -1):
            entry = entries[index]
            if isinstance(entry, Record):
                way = entry.way_back()
                if way is None:
                    continue
                if watch and sequence.begins_no_more():
                    return
                sequence.position = index
                if not plain:
                    await _take_back_through(entry, way, sequence, (*sequence.path, index))
                    continue
                # As `_take_back`, written out: a call less for each step.
                entry.state = COMPENSATION_FAILED
                try:
                    result: Any = way[0](*way[1], **way[2])
                    if result.__class__ is CoroutineType or is_awaitable(result):
                        await result
                except BaseException as error:
                    sequence.failed(entry, (*sequence.path, index), error)
                    if isinstance(error, GeneratorExit):
                        raise
                else:
                    entry.state = COMPENSATED
            elif must_take_back(entry):
                if sequence.begins_no_more():
                    return
                await _unwind_node(entry, sequence)
                current_place.set(sequence)
    finally:
        sequence.position = None


async def _unwind_node(entry: Entry | None, owner: Sequence) -> None:
    if isinstance(entry, Group):
        await _unwind_group(entry, owner)
    else:
        assert isinstance(entry, Sequence)
        current_place.set(entry)
        last = len(entry.entries) - 1 - entry.in_flight
        if entry.rollback_timeout in (None, owner.rollback_timeout):
            await _unwind(entry, 0, last)
        else:
            deadline = current_time() + entry.rollback_timeout
            await _limited(entry, 0, deadline, partial(_unwind, entry, 0, last), entry.name, entry.path)


async def _unwind_group(group: Group, owner: Sequence) -> None:
    """Takes back the members of a group, at the same time."""
    waiting = deque(index for index, member in enumerate(group.members) if must_take_back(member))

    async def work() -> None:
        # Each task takes the next member that waits: so members are entered in the order given,
        # whatever the order in which a loop starts tasks.
        # A scope of its own keeps it from that of the group, which is cancelled if another task is
        # cancelled before its first line; what ends it is the time limit alone.
        with CancelScope(shield=True, deadline=owner.deadline()):
            while waiting and not owner.begins_no_more():
                await _unwind_member(group, waiting.popleft(), owner)
                if not limited:
                    return

    limit = group.definition.limit
    limited = limit is not None and limit < len(waiting)
    while waiting and not owner.begins_no_more():
        tasks = min(len(waiting), limit or len(waiting))
        late = await shelter(work, tasks=tasks)
        if orders_to_quit(late) or isinstance(late, Exception):
            assert late is not None
            owner.run.failed_at(group.path, late)
        if isinstance(late, Exception):
            return  # no tasks can be started: what is left is reported, not asked for ever


async def _unwind_member(group: Group, index: int, owner: Sequence) -> None:
    member = group.members[index]
    if not isinstance(member, Record):
        await _unwind_node(member, owner)
        return
    way = member.way_back()
    assert way is not None
    place = MemberPlace(owner, group, index, "compensation")
    current_place.set(place)
    if owner.middleware:
        await _take_back_through(member, way, owner, place.path)
        return
    member.state = COMPENSATION_FAILED
    try:
        result: Any = way[0](*way[1], **way[2])
        if is_awaitable(result):
            await result
    except BaseException as error:
        owner.failed(member, place.path, error)
    else:
        member.state = COMPENSATED


async def _take_back_through(
    record: Record, way: WayBack, sequence: Sequence, path: tuple[int, ...]
) -> None:
    """Takes back one step, as an effect."""
    raised: BaseException | None = None

    async def innermost() -> object:
        nonlocal raised
        record.state = COMPENSATION_FAILED
        try:
            result = await settle(way[0](*way[1], **way[2]))
        except BaseException as error:
            raised = error
            raise
        record.state = COMPENSATED
        raised = None
        return result

    try:
        effect = sequence.effect("compensation", record.name, path)
        await through(sequence.middleware, effect, innermost, record)
    except BaseException as error:
        if record.state is not COMPENSATED:
            record.state = COMPENSATION_FAILED
        sequence.failed(record, path, error)
    else:
        if raised is not None:
            # A middleware swallowed it: what is not taken back is reported all the same.
            sequence.failed(record, path, raised)
        else:
            record.state = COMPENSATED
