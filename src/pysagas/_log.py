"""The undo log of a run: what was started, and how far it came.

The log is a tree that grows as the run goes forward. A `Sequence` holds, in the order in which they
started, the entries of one saga or nested scope: a `Record` for a step, a `Group`, or a `Sequence`.
An entry is in the log *before* its work starts, and stays there: the log is also what the outcome
reports from. A step's place in the tree is its path.

What this module must not know: how anything goes forward, or back.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from itertools import islice
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar, cast

from anyio import CancelScope, current_time, get_cancelled_exc_class

from ._attempts import COMPLETED, NOT_STARTED, UNKNOWN
from ._definitions import Commit, Definition, Parallel, Part, Step, definition_of
from ._effects import Effect, EffectKind, Middleware
from ._errors import CompensationFailed, add_note, without_cancellation
from ._outcome import Outcome, Ran, StepReport, StepState, TreeNode
from ._signatures import name_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = [
    "COMPENSATED",
    "COMPENSATION_FAILED",
    "NO_KEYWORDS",
    "CommitMark",
    "Entry",
    "Group",
    "KeywordRecord",
    "MemberPlace",
    "Record",
    "Run",
    "SagaDefinition",
    "Sequence",
    "WayBack",
    "must_take_back",
    "pending_names",
    "records",
    "tree_of",
]

P = ParamSpec("P")
T_co = TypeVar("T_co", covariant=True)

COMPENSATED = StepState.COMPENSATED
COMPENSATION_FAILED = StepState.COMPENSATION_FAILED

# A plain dict, which nobody writes to: unpacking a read-only view of one costs three times as much.
NO_KEYWORDS: dict[str, Any] = {}


WayBack = tuple[Callable[..., object], tuple[Any, ...], dict[str, Any]]

# As `Effect(...)` does, in half the time: the function that a NamedTuple has for that is one of Python's.
_effect: Callable[[tuple[Any, ...]], Effect] = partial(
    tuple.__new__,  # pyright: ignore[reportUnknownMemberType]
    Effect,
)


class Failure(NamedTuple):
    """What a compensation raised, or a middleware around a rollback (then there is no record)."""

    path: tuple[int, ...]
    record: Record | None
    error: BaseException


class Run:
    """What all parts of one run share.

    It does not know its log: a run that succeeded is to be freed when nobody holds it, without
    waiting for the garbage collector.
    """

    __slots__ = ("_run_id", "carried_on", "ended", "failures", "reported", "saga", "times")

    saga: str
    carried_on: int

    def __init__(self, saga: str, run_id: str | None, carried_on: int = 0) -> None:
        self.saga = saga
        self._run_id = run_id
        self.carried_on = carried_on
        # What compensations raised, in the order in which they failed. Not empty means that the run
        # ends FAILED, whatever its function makes of it.
        self.failures: list[Failure] = []
        # The exception that last reported them.
        self.reported: CompensationFailed | None = None
        # How the run ended, if it failed.
        self.ended: Outcome[Any] | None = None
        # When its actions and compensations ran, where a middleware has noted that.
        self.times: list[Ran] | None = None

    @property
    def run_id(self) -> str:
        """The name of the run; a random one is made when it is first asked for."""
        if self._run_id is None:
            from uuid import uuid4  # noqa: PLC0415 - few runs are asked for it

            self._run_id = str(uuid4())
        return self._run_id

    def failed_at(
        self, path: tuple[int, ...], error: BaseException, record: Record | None = None
    ) -> None:
        """Notes that a compensation, or a middleware around a rollback, failed."""
        self.failures.append(Failure(path, record, error))

    def failures_in(self, path: tuple[int, ...]) -> list[BaseException]:
        """The failures at a path and below."""
        return [failure.error for failure in self.failures if failure.path[: len(path)] == path]


class Record:
    """One started step: whose action, how to take it back, and how far it came.

    `definition` is the `Step`, or, for a step written inline, just its action.
    """

    # One of these is kept for every step that a run has made: small is what matters here.
    __slots__ = ("args", "compensation", "definition", "error", "result", "state", "undo")

    definition: Any
    compensation: Callable[..., object] | None
    undo: Callable[[Any], object] | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = NO_KEYWORDS
    state: StepState

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

    # As a middleware sees it, see ``_effects.StepInHand``.

    @property
    def action(self) -> Callable[..., Any]:
        definition = self.definition
        action: Callable[..., Any] = definition.action if isinstance(definition, Step) else definition
        return action

    def recall(
        self, state: StepState, *, result: object = None, error: BaseException | None = None
    ) -> None:
        self.state = state
        self.result = result
        self.error = error

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
        "middleware",
        "on_compensation_failure",
        "parts",
        "rollback_timeout",
    )

    # Empty for a saga written as a function.
    parts: tuple[Part, ...]
    function: Callable[..., Any] | None
    rollback_timeout: float | None
    on_compensation_failure: str
    middleware: tuple[Middleware, ...]

    def forward(
        self, sequence: Sequence, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Awaitable[Any]:
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
        "in_flight",
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

    run: Run
    parent: Sequence | None
    path: tuple[int, ...]
    saga: SagaDefinition[..., Any] | None
    middleware: tuple[Middleware, ...]
    committed: int
    in_flight: bool
    halted: bool
    stop_on_failure: bool
    name: str
    saga_name: str

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
        # Whether another task still carries out the last entry, though this has ended: then that
        # task's call takes it back.
        self.in_flight = False
        # The index of the entry that is being taken back; None while going forward.
        self.position: int | None = None
        # Set once a compensation has failed and `stop_on_failure` is asked for.
        self.halted = False
        # The scope of the time limit of a rollback that is under way.
        self.ends_at: CancelScope | None = None
        # The smallest of the time limits of this saga and those around it.
        self.rollback_timeout: float | None = None if parent is None else parent.rollback_timeout
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
        """Sets the time limit of a rollback, unless one around it is smaller."""
        if seconds is not None and (self.rollback_timeout is None or seconds < self.rollback_timeout):
            self.rollback_timeout = seconds

    @property
    def root(self) -> Sequence:
        """The log of the whole run."""
        level = self
        while level.parent is not None:
            level = level.parent
        return level

    @property
    def run_id(self) -> str:
        """The name of the run."""
        return self.run.run_id

    def reports(self) -> tuple[StepReport, ...]:
        """Reports on each step, for the outcome."""
        failed = {id(failure.record): failure.error for failure in self.run.failures}
        return tuple(_reports(self, failed))

    def tree(self) -> Iterator[TreeNode]:
        """Yields what is at each path, for the outcome."""
        return (_node(path, place, self) for path, place in _places(self))

    def times(self) -> Iterable[Ran]:
        """Gives the times that were noted, for the outcome."""
        return self.run.times or ()

    def note_time(self, effect: Effect, began: float, ended: float) -> None:
        """Notes when an effect of this run ran (see ``_effects.note_time``)."""
        run = self.run
        if effect.run_id == run.run_id:
            if run.times is None:
                run.times = []
            forward = effect.kind == "action"
            run.times.append(Ran(effect.path, "action" if forward else "compensation", began, ended))

    def may_end_early(self) -> bool:
        """Tells whether `begins_no_more` can ever come true, for this saga and those around it."""
        level: Sequence | None = self
        while level is not None:
            if level.stop_on_failure or level.rollback_timeout is not None:
                return True
            level = level.parent
        return False

    def begins_no_more(self) -> bool:
        """Tells whether unwinding has to stop here: a failure, or a time limit, of a saga around."""
        level: Sequence | None = self
        while level is not None:
            if level.halted or level.is_out_of_time():
                return True
            level = level.parent
        return False

    def halted_at(self, path: tuple[int, ...]) -> tuple[int, ...]:
        """Gives the path of the innermost saga around that begins no more; else the one given."""
        level: Sequence | None = self
        while level is not None:
            if level.halted:
                return level.path
            level = level.parent
        return path

    def deadline(self) -> float:
        """The time at which the rollback under way has to end; infinity where there is no limit."""
        deadline = inf
        level: Sequence | None = self
        while level is not None:
            if level.ends_at is not None:
                deadline = min(deadline, level.ends_at.deadline)
            level = level.parent
        return deadline

    def is_out_of_time(self) -> bool:
        """Tells whether the time limit of the rollback under way has passed.

        The clock is asked too: while sync compensations follow each other, asyncio does not come to
        cancel the scope.
        """
        scope = self.ends_at
        return scope is not None and (scope.cancel_called or current_time() >= scope.deadline)

    def failed(self, record: Record, path: tuple[int, ...], error: BaseException) -> None:
        """Notes that a compensation failed."""
        level: Sequence | None = self
        while level is not None:
            if (
                level.is_out_of_time()
                and without_cancellation(error, get_cancelled_exc_class()) is None
            ):
                late = TimeoutError(f"cut off by rollback_timeout={level.rollback_timeout} s")
                late.__cause__ = error
                error = late
            level.halted = level.stop_on_failure
            level = level.parent
        self.run.failed_at(path, error, record)
        add_note(error, f"compensation of step {record.name!r} at {path} in saga {self.saga_name!r}")

    def effect(self, kind: EffectKind, name: str, path: tuple[int, ...]) -> Effect:
        """Makes an effect of this saga."""
        run = self.run
        return _effect((kind, self.saga_name, run.run_id, name, path, run.carried_on))

    def current_effect(self) -> Effect | None:
        """The effect of the entry in hand, for code that runs inside it (see ``_effects.Place``)."""
        if self.position is not None:
            entry = self.entries[self.position]
            assert isinstance(entry, Record)
            return self.effect("compensation", entry.name, (*self.path, self.position))
        last = self.entries[-1] if self.entries else None
        if isinstance(last, Sequence):
            return last.current_effect()  # its steps run in the same context
        if isinstance(last, Record) and last.state is UNKNOWN and last.error is None:
            return self.effect("action", last.name, (*self.path, len(self.entries) - 1))
        return None


class Group:
    """The log of one parallel group. A member that never started has None in its place."""

    __slots__ = ("definition", "members", "path")

    def __init__(self, definition: Parallel, path: tuple[int, ...]) -> None:
        self.definition = definition
        self.path = path
        self.members: list[Entry | None] = [None] * len(definition.parts)

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

    __slots__ = ("group", "index", "kind", "owner")

    def __init__(self, owner: Sequence, group: Group, index: int, kind: EffectKind) -> None:
        self.owner = owner
        self.group = group
        self.index = index
        self.kind: EffectKind = kind

    @property
    def path(self) -> tuple[int, ...]:
        return (*self.group.path, self.index)

    def current_effect(self) -> Effect:
        member = self.group.members[self.index]
        assert member is not None
        return self.owner.effect(self.kind, member.name, self.path)

    def note_time(self, effect: Effect, began: float, ended: float) -> None:
        self.owner.note_time(effect, began, ended)


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


def tree_of(saga: SagaDefinition[..., Any]) -> Iterator[TreeNode]:
    """Yields what is at each path of a saga, of which nothing has run."""
    return (_node(path, place, None) for path, place in _places_ahead(saga, ()))


def _reports(log: Sequence, failed: dict[int, BaseException]) -> Iterator[StepReport]:
    for path, place in _places(log):
        if isinstance(place, Record):
            yield StepReport(
                name=place.name,
                path=path,
                state=place.state,
                result=place.result,
                error=place.error,
                compensation_error=failed.get(id(place)),
            )
        # A step; or a saga as a function, whose steps nobody knows yet.
        elif isinstance(place, Step) or (
            isinstance(place, SagaDefinition) and place.function is not None
        ):
            yield StepReport(name=place.name, path=path, state=NOT_STARTED)


def _places(node: Sequence | Group) -> Iterator[tuple[tuple[int, ...], Entry | Definition[..., Any]]]:
    """Yields each entry with its path, and where nothing was started the definition."""
    yield node.path, node
    entries = node.members if isinstance(node, Group) else node.entries
    for index, entry in enumerate(entries):
        if isinstance(entry, Sequence | Group):
            yield from _places(entry)
        elif entry is not None:
            yield (*node.path, index), entry
        else:
            assert isinstance(node, Group)  # in a sequence every entry was started
            yield from _places_ahead(definition_of(node.definition.parts[index]), (*node.path, index))
    if isinstance(node, Sequence) and node.saga is not None:
        for index, part in enumerate(node.saga.parts[len(entries) :], start=len(entries)):
            yield from _places_ahead(definition_of(part), (*node.path, index))


def _places_ahead(
    definition: Definition[..., Any], path: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], Definition[..., Any]]]:
    yield path, definition
    if isinstance(definition, Parallel | SagaDefinition):
        for index, part in enumerate(definition.parts):
            yield from _places_ahead(definition_of(part), (*path, index))


def _node(path: tuple[int, ...], place: Entry | Definition[..., Any], log: Sequence | None) -> TreeNode:
    if isinstance(place, Record | Step):
        # The step's own functions: a record may hold them wrapped.
        definition: object = place.definition if isinstance(place, Record) else place
        own = cast("Step[..., Any]", definition) if isinstance(definition, Step) else place
        compensation = None if own.compensation is None else name_of(own.compensation)
        undo = None if own.undo is None else name_of(own.undo)
        return TreeNode("step", place.name, path, compensation, undo)
    if isinstance(place, CommitMark | Commit):
        # Commits stand in the outermost sequence alone.
        passed = log is not None and path[-1] < log.committed
        return TreeNode("commit", place.name, path, passed=passed)
    if isinstance(place, Group | Parallel):
        return TreeNode("group", place.name, path)
    nested = isinstance(place, Sequence) and place.saga is None and place.parent is not None
    return TreeNode("scope" if nested else "saga", place.name, path)
