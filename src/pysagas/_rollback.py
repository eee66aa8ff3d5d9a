"""The undo log of a run, and unwinding it.

The log is a tree that grows as the run goes forward. A `Sequence` holds, in the order in which they
started, the entries of one saga or nested scope: a `Record` for a step, a `Group`, or a `Sequence`.
An entry is in the log *before* its work starts, and stays there: the log is also what the outcome
reports from. A step's place in the tree is its path.

The rules of unwinding:

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

from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from inspect import isawaitable
from itertools import islice
from types import CoroutineType
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar
from uuid import uuid4

from anyio import CancelScope, current_time, get_cancelled_exc_class

from ._definitions import (
    COMPLETED,
    NOT_STARTED,
    UNKNOWN,
    Commit,
    Definition,
    Item,
    Parallel,
    settle,
)
from ._effects import Effect, EffectKind, Middleware, current_place, through
from ._errors import CompensationFailed, MiddlewareError, add_note
from ._outcome import Outcome, StepReport, StepState
from ._shelter import shelter, weightiest
from ._signatures import name_of

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "Entry",
    "Group",
    "KeywordRecord",
    "MemberPlace",
    "Record",
    "Run",
    "SagaDefinition",
    "Sequence",
    "must_take_back",
    "roll_back",
]

P = ParamSpec("P")
T_co = TypeVar("T_co", covariant=True)

COMPENSATED = StepState.COMPENSATED
COMPENSATION_FAILED = StepState.COMPENSATION_FAILED

# A plain dict, which nobody writes to: unpacking a read-only view of one costs three times as much.
NO_KEYWORDS: dict[str, Any] = {}


WayBack = tuple[Callable[..., object], tuple[Any, ...], dict[str, Any]]


class Failure(NamedTuple):
    """What a compensation raised, or a middleware around a rollback (then there is no record)."""

    path: tuple[int, ...]
    record: Record | None
    error: BaseException


class Run:
    """What all parts of one run share."""

    __slots__ = ("_run_id", "ended", "failures", "reported", "root", "saga")

    def __init__(self, saga: str, run_id: str | None) -> None:
        self.saga = saga
        self._run_id = run_id
        # What compensations raised, in the order in which they failed. Not empty means that the run
        # ends FAILED, whatever its function makes of it.
        self.failures: list[Failure] = []
        # The exception that last reported them.
        self.reported: CompensationFailed | None = None
        # How the run ended, if it failed.
        self.ended: Outcome[Any] | None = None
        self.root: Sequence

    @property
    def run_id(self) -> str:
        if self._run_id is None:
            self._run_id = str(uuid4())
        return self._run_id

    def failed_at(
        self, path: tuple[int, ...], error: BaseException, record: Record | None = None
    ) -> None:
        self.failures.append(Failure(path, record, error))

    def failures_in(self, path: tuple[int, ...]) -> list[BaseException]:
        """The failures at a path and below."""
        return [
            failure.error for failure in self.failures if failure.path[: len(path)] == path
        ]

    def reports(self) -> tuple[StepReport, ...]:
        failed = {id(failure.record): failure.error for failure in self.failures}
        return tuple(_reports(self.root, failed))


class Record:
    """One started step: whose action, how to take it back, and how far it came.

    `definition` is the `Step`, or, for a step written inline, just its action.
    """

    # One of these is kept for every step that a run has made: small is what matters here.
    __slots__ = ("args", "compensation", "definition", "error", "result", "state", "undo")

    kwargs: dict[str, Any] = NO_KEYWORDS

    def __init__(
        self,
        definition: Any,
        compensation: Callable[..., object] | None,
        undo: Callable[[Any], object] | None,
        args: tuple[Any, ...],
        state: StepState,
    ) -> None:
        self.definition = definition
        self.compensation = compensation
        self.undo = undo
        self.args = args
        self.state = state
        self.result: Any = None
        self.error: BaseException | None = None

    @property
    def name(self) -> str:
        definition = self.definition
        return definition.name if isinstance(definition, Definition) else name_of(definition)

    def way_back(self) -> WayBack | None:
        """The call that takes this step back; None where there is none, or nothing to take back."""
        state = self.state
        if state is COMPLETED:
            if self.undo is not None:
                return self.undo, (self.result,), NO_KEYWORDS
        elif state is not UNKNOWN:
            return None
        if self.compensation is None:
            return None
        return self.compensation, self.args, self.kwargs


class KeywordRecord(Record):
    """A record with keyword arguments, which are rare: so the others need no room for them."""

    __slots__ = ("kwargs",)

    kwargs: dict[str, Any]


class SagaDefinition(Definition[P, T_co]):
    """What the log needs to know of a saga; the saga itself is defined further down."""

    __slots__ = (
        "function",
        "items",
        "middleware",
        "on_compensation_failure",
        "rollback_timeout",
    )

    # Empty for a saga written as a function.
    items: tuple[Item, ...]
    function: Callable[..., Any] | None
    rollback_timeout: float | None
    on_compensation_failure: str
    middleware: tuple[Middleware, ...]

    async def forward(
        self, sequence: Sequence, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Carries out the saga, forward only, writing to `sequence`."""
        raise NotImplementedError  # pragma: no cover - abstract


class Sequence:
    """The log of one saga or nested scope: entries that go back in reverse.

    `saga` is None for a nested scope, and for the scope of `open_saga`.
    """

    __slots__ = (
        "committed",
        "ends_at",
        "entries",
        "halted",
        "middleware",
        "name",
        "parent",
        "path",
        "position",
        "rollback_timeout",
        "run",
        "saga",
        "saga_name",
        "stop_on_failure",
    )

    def __init__(
        self,
        run: Run,
        parent: Sequence | None,
        path: tuple[int, ...],
        saga: SagaDefinition[..., Any] | None,
        middleware: tuple[Middleware, ...],
    ) -> None:
        self.run = run
        self.parent = parent
        self.path = path
        self.saga = saga
        self.middleware = middleware
        self.entries: list[Entry] = []
        # Entries before this index were committed: they are not taken back.
        self.committed = 0
        # The index of the entry that is being taken back; None while going forward.
        self.position: int | None = None
        # Set once a compensation has failed and `stop_on_failure` is asked for.
        self.halted = False
        # The scope of the time limit of a rollback that is under way.
        self.ends_at: CancelScope | None = None
        # The smallest of the time limits of this saga and those around it.
        self.rollback_timeout = None if parent is None else parent.rollback_timeout
        self.stop_on_failure = False
        if saga is not None:
            self.name = self.saga_name = saga.name
            self.limit_rollback(saga.rollback_timeout)
            self.stop_on_failure = saga.on_compensation_failure == "stop"
        elif parent is not None:
            self.name = "nested"
            self.saga_name = parent.saga_name
        else:
            self.name = self.saga_name = run.saga

    def limit_rollback(self, seconds: float | None) -> None:
        if seconds is not None and (
            self.rollback_timeout is None or seconds < self.rollback_timeout
        ):
            self.rollback_timeout = seconds

    def begins_no_more(self) -> bool:
        """Tells whether unwinding has to stop here: a failure, or a time limit, of a saga around."""
        level: Sequence | None = self
        while level is not None:
            if level.halted or (level.ends_at is not None and level.ends_at.cancel_called):
                return True
            level = level.parent
        return False

    def _out_of_time(self) -> bool:
        level: Sequence | None = self
        while level is not None:
            if level.ends_at is not None and level.ends_at.cancel_called:
                return True
            level = level.parent
        return False

    def failed(self, record: Record, path: tuple[int, ...], error: BaseException) -> None:
        """Notes that a compensation failed."""
        if self._out_of_time() and isinstance(error, get_cancelled_exc_class()):
            timeout = TimeoutError(f"cut off by rollback_timeout={self.rollback_timeout} s")
            timeout.__cause__ = error
            error = timeout
        add_note(error, f"compensation of step {record.name!r} at {path} in saga {self.saga_name!r}")
        self.run.failed_at(path, error, record)
        level: Sequence | None = self
        while level is not None:
            level.halted = level.halted or level.stop_on_failure
            level = level.parent

    def effect(self, kind: EffectKind, name: str, path: tuple[int, ...]) -> Effect:
        return Effect(kind, self.saga_name, self.run.run_id, name, path)

    def current_effect(self) -> Effect | None:
        """The effect of the entry in hand, for code that runs inside it (see ``_effects.Place``)."""
        index = len(self.entries) - 1 if self.position is None else self.position
        entry = self.entries[index]
        if not isinstance(entry, Record):
            return None
        kind: EffectKind = "action" if self.position is None else "compensation"
        return self.effect(kind, entry.name, (*self.path, index))


class Group:
    """The log of one parallel group. A member that never started has None in its place."""

    __slots__ = ("definition", "members", "owner", "path")

    def __init__(self, definition: Parallel, owner: Sequence, path: tuple[int, ...]) -> None:
        self.definition = definition
        self.owner = owner
        self.path = path
        self.members: list[Entry | None] = [None] * len(definition.items)

    @property
    def name(self) -> str:
        return self.definition.name


class CommitMark:
    """The entry that a commit leaves, so that it has its number like every other call."""

    __slots__ = ()

    name = "commit"


Entry = Record | Sequence | Group | CommitMark


class MemberPlace:
    """The place of a step that is a member of a group (see ``_effects.Place``)."""

    __slots__ = ("group", "index", "kind")

    def __init__(self, group: Group, index: int, kind: EffectKind) -> None:
        self.group = group
        self.index = index
        self.kind: EffectKind = kind

    @property
    def path(self) -> tuple[int, ...]:
        return (*self.group.path, self.index)

    def current_effect(self) -> Effect:
        member = self.group.members[self.index]
        assert member is not None
        return self.group.owner.effect(self.kind, member.name, self.path)


# --- reading the log ----------------------------------------------------------------------------


def must_take_back(entry: Entry | None) -> bool:
    """Tells whether something in this entry is still to be taken back."""
    if isinstance(entry, Record):
        return entry.way_back() is not None
    if isinstance(entry, Sequence):
        return any(map(must_take_back, islice(entry.entries, entry.committed, None)))
    return isinstance(entry, Group) and any(map(must_take_back, entry.members))


def pending_names(entry: Entry | None) -> Iterator[str]:
    """Yields the names of the steps that are still to be taken back, the last one first."""
    if isinstance(entry, Record):
        if entry.way_back() is not None:
            yield entry.name
    elif isinstance(entry, Sequence | Group):
        parts = entry.members if isinstance(entry, Group) else entry.entries[entry.committed :]
        for part in reversed(parts):
            yield from pending_names(part)


def records(entry: Entry | None) -> Iterator[Record]:
    """Yields the records in this entry, in the order of their paths."""
    if isinstance(entry, Record):
        yield entry
    elif isinstance(entry, Sequence | Group):
        for part in entry.members if isinstance(entry, Group) else entry.entries:
            yield from records(part)


def _reports(node: Sequence | Group, failed: dict[int, BaseException]) -> Iterator[StepReport]:
    entries = node.members if isinstance(node, Group) else node.entries
    for index, entry in enumerate(entries):
        path = (*node.path, index)
        if isinstance(entry, Record):
            yield StepReport(
                name=entry.name,
                path=path,
                state=entry.state,
                result=entry.result,
                error=entry.error,
                compensation_error=failed.get(id(entry)),
            )
        elif isinstance(entry, Sequence | Group):
            yield from _reports(entry, failed)
        elif entry is None and isinstance(node, Group):
            yield from _not_started(node.definition.items[index].definition, path)
    if isinstance(node, Sequence) and node.saga is not None:
        for index, item in enumerate(node.saga.items[len(entries) :], start=len(entries)):
            yield from _not_started(item.definition, (*node.path, index))


def _not_started(
    definition: Definition[..., Any], path: tuple[int, ...]
) -> Iterator[StepReport]:
    if isinstance(definition, Parallel | SagaDefinition) and definition.items:
        for index, item in enumerate(definition.items):
            yield from _not_started(item.definition, (*path, index))
    elif not isinstance(definition, Commit | Parallel):
        # A step; or a saga as a function, whose steps nobody knows yet.
        yield StepReport(name=definition.name, path=path, state=NOT_STARTED)


# --- unwinding ----------------------------------------------------------------------------------


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
    ended = False
    asked = not sequence.middleware
    deadline: float | None = None

    async def unwound() -> None:
        nonlocal ended
        await _unwind(sequence, start)
        ended = True

    async def once() -> None:
        nonlocal asked, ended
        if asked:
            await unwound()
        else:
            asked = True
            effect = sequence.effect("rollback", name, path)
            await through(sequence.middleware, effect, unwound)
            if not ended:
                ended = True
                run.failed_at(path, _not_run(name, path))

    async def work() -> None:
        nonlocal deadline, ended
        current_place.set(sequence)
        try:
            if sequence.rollback_timeout is None:
                await once()
            else:
                # Reckoned once: unwinding that is started again gets no more time than it had.
                deadline = deadline or current_time() + sequence.rollback_timeout
                await _limited(sequence, start, deadline, once)
                ended = True
        except GeneratorExit:
            raise
        except BaseException as error:  # noqa: BLE001 - a middleware's; reported with the others
            if not isinstance(error, get_cancelled_exc_class()):
                run.failed_at(path, error)
                ended = ended or isinstance(error, Exception)
            # Where a cancellation cut the middleware off, the compensations still have to run.

    late: BaseException | None = None
    while not ended:
        # More than once only where the child was cancelled before its first line.
        late = weightiest(late, await shelter(work))
    return late


def _not_run(name: str, path: tuple[int, ...]) -> BaseException:
    return MiddlewareError(
        f"the rollback of {name!r} at {path} did not run: a middleware returned without call_next"
    )


async def _limited(
    sequence: Sequence, start: int, deadline: float, unwinding: Callable[[], Awaitable[None]]
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
        if scope.cancel_called and left:
            sequence.run.failed_at(sequence.path, _out_of_time(sequence, left))


def _out_of_time(sequence: Sequence, left: list[str]) -> BaseException:
    return TimeoutError(
        f"the rollback of {sequence.name!r} did not end within {sequence.rollback_timeout} s; not "
        f"begun: {', '.join(left)}"
    )


async def _unwind(sequence: Sequence, start: int) -> None:
    """Takes back the entries of a sequence from `start` on, in reverse."""
    entries = sequence.entries
    plain = not sequence.middleware
    first = max(start, sequence.committed)
    try:
        for index in range(len(entries) - 1, first - 1, -1):
            entry = entries[index]
            if isinstance(entry, Record):
                way = entry.way_back()
                if way is None:
                    continue
                if sequence.begins_no_more():
                    return
                sequence.position = index
                if not plain:
                    await _take_back_through(entry, way, sequence, (*sequence.path, index))
                    continue
                # As `_take_back`, written out: a call less for each step.
                entry.state = COMPENSATION_FAILED
                try:
                    result = way[0](*way[1], **way[2])
                    if result.__class__ is CoroutineType or isawaitable(result):
                        await result
                except GeneratorExit:
                    raise
                except BaseException as error:  # noqa: BLE001 - it must not stop the others
                    sequence.failed(entry, (*sequence.path, index), error)
                else:
                    entry.state = COMPENSATED
            elif must_take_back(entry):
                if sequence.begins_no_more():
                    return
                await _unwind_node(entry)
                current_place.set(sequence)
    finally:
        sequence.position = None


async def _unwind_node(entry: Entry | None) -> None:
    if isinstance(entry, Group):
        await _unwind_group(entry)
    elif isinstance(entry, Sequence):
        current_place.set(entry)
        around = entry.parent
        if entry.rollback_timeout is None or (
            around is not None and around.rollback_timeout == entry.rollback_timeout
        ):
            await _unwind(entry, 0)
        else:
            deadline = current_time() + entry.rollback_timeout
            await _limited(entry, 0, deadline, partial(_unwind, entry, 0))


async def _unwind_group(group: Group) -> None:
    """Takes back the members of a group, at the same time."""
    owner = group.owner
    waiting = deque(index for index, member in enumerate(group.members) if must_take_back(member))

    async def work() -> None:
        # Each task takes the next member that waits: so members are entered in the order given,
        # whatever the order in which a loop starts tasks.
        while waiting and not owner.begins_no_more():
            await _unwind_member(group, waiting.popleft())
            if not limited:
                return

    limit = group.definition.limit
    limited = limit is not None and limit < len(waiting)
    while waiting and not owner.begins_no_more():
        tasks = min(len(waiting), limit or len(waiting))
        late = await shelter(work, tasks=tasks, interrupted=owner.begins_no_more)
        if isinstance(late, KeyboardInterrupt | SystemExit):
            owner.run.failed_at(group.path, late)


async def _unwind_member(group: Group, index: int) -> None:
    member = group.members[index]
    if not isinstance(member, Record):
        await _unwind_node(member)
        return
    way = member.way_back()
    assert way is not None
    place = MemberPlace(group, index, "compensation")
    current_place.set(place)
    owner = group.owner
    if owner.middleware:
        await _take_back_through(member, way, owner, place.path)
        return
    member.state = COMPENSATION_FAILED
    try:
        await settle(way[0](*way[1], **way[2]))
    except GeneratorExit:
        raise
    except BaseException as error:  # noqa: BLE001 - it must not stop the others
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
        await through(sequence.middleware, effect, innermost)
    except GeneratorExit:
        raise
    except BaseException as error:  # noqa: BLE001 - it must not stop the others
        if record.state is not COMPENSATED:
            record.state = COMPENSATION_FAILED
        sequence.failed(record, path, error)
    else:
        if raised is not None:
            # A middleware swallowed it: what is not taken back is reported all the same.
            sequence.failed(record, path, raised)
        else:
            record.state = COMPENSATED
