"""What a saga is, in plain synchronous Python. It shares no code with the engine.

First the words: a tree of parts, faults that are planned for it, events that are seen. Then the
rules, each with the number that it has in the design:

- `predict` carries out a tree without groups, where nobody has a choice: these events, on every loop.
- `Reading` reads what happened to any tree. How members interleave, and so what a cancellation
  meets, is the loop's choice (G15); but once it is known how each action ended, all the rest is
  determined: what is taken back, how, in which (partial) order, each state, and what is raised.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

# --- a tree, faults, events -----------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """An action with an effect of two halves; one that cannot be taken back has no effect: it reads."""

    name: str
    compensation: bool = True
    undo: bool = False
    not_applied: bool = False
    style: str = "async"  # or "sync", "shield"
    arguments: str = "run"  # or "own", "keywords"
    # Checkpoints before the effect, between its halves, after it; and of the way back: before, after.
    pace: tuple[int, int, int] = (0, 0, 0)
    back_pace: tuple[int, int] = (0, 0)
    # The function that calls this catches its failure, and goes on.
    catch: bool = False


@dataclass(frozen=True)
class Seq:
    """A saga; as a part of a function it may be a nested scope instead."""

    parts: tuple[Part, ...]
    stop: bool = False  # on_compensation_failure="stop"
    nested: bool = False
    catch: bool = False


@dataclass(frozen=True)
class Par:
    """A group."""

    members: tuple[Part, ...]
    limit: int | None = None
    finish: bool = False
    catch: bool = False


@dataclass(frozen=True)
class Commit:
    """The point of no return."""


Part = Step | Seq | Par | Commit


class Fault(NamedTuple):
    """What goes wrong: in the action of a step or in its way back, at a checkpoint or a place."""

    step: str
    phase: str  # "action", "back"
    kind: str  # "fail", "decline", "quit"; or a cancellation: "scope", "native", "native twice"
    at: int | str  # the number of a checkpoint for a cancellation; else "before", "halfway", "after"


class Event(NamedTuple):
    """What was seen. An action: start, tick, first, second, and how it ended. Its way back likewise."""

    what: str
    step: str


Plan = tuple[Fault, ...]
ENDS = {"done", "failed", "declined", "quit", "cancelled"}
BEGINS_BACK = {"undo", "compensate"}
ENDS_BACK = {"back done", "back failed", "back quit", "back cancelled"}
CANCELS = {"scope", "native", "native twice"}


def script(step: Step, phase: str) -> Iterator[int | str]:
    """Gives what an action or its way back does: checkpoints by number, effects, places to fail."""
    count = iter(range(100))
    if phase == "back":
        before, after = step.back_pace
        yield from (next(count) for _ in range(before))
        yield from ("before", "removed")
        yield from (next(count) for _ in range(after))
        yield "after"
        return
    effects = ("first", "second") if step.compensation or step.undo else ("", "")
    for pace, place, effect in zip(
        step.pace, ("before", "halfway", "after"), (*effects, ""), strict=True
    ):
        yield from (next(count) for _ in range(pace))
        yield place
        if effect:
            yield effect


def steps_of(part: Part) -> Iterator[Step]:
    """Gives the steps, in the order of their paths."""
    if isinstance(part, Step):
        yield part
    else:
        for inner in inner_parts(part):
            yield from steps_of(inner)


def inner_parts(part: Part) -> tuple[Part, ...]:
    """Gives the direct parts, in order."""
    return part.parts if isinstance(part, Seq) else part.members if isinstance(part, Par) else ()


def paths(part: Part, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Step]]:
    """Gives each step with its path."""
    if isinstance(part, Step):
        yield path, part
    for index, inner in enumerate(inner_parts(part)):
        yield from paths(inner, (*path, index))


def holds_group(part: Part) -> bool:
    """Tells whether members may interleave, so that the loop has a choice."""
    return isinstance(part, Par) or any(map(holds_group, inner_parts(part)))


def way_back(step: Step, end: str) -> str | None:
    """G3: how a step whose action ended so is taken back; None where there is nothing to do."""
    if end == "done" and step.undo:
        return "undo"
    if end in {"done", "failed", "quit", "cancelled"} and step.compensation:
        return "compensate"
    return None


# --- a tree without groups: everything is determined ------------------------------------------------


class _Stopped(Exception):
    """What goes up the tree: failed, declined, quit, cancelled."""


def predict(tree: Seq, plan: Plan, *, functions: bool, later: bool) -> list[Event]:
    """Carries out a tree without groups, and gives the events.

    With `functions`, those who are to catch do so. With `later`, a run that succeeded is taken back.
    """
    seen: list[Event] = []
    started: list[tuple[Step, str, tuple[Seq, ...]]] = []  # step, how it ended, sagas around it
    halted: set[int] = set()
    committed = broken = scope_cancelled = False

    def play(step: Step, phase: str) -> str | None:
        """Goes through a script; tells how that was stopped, if it was."""
        nonlocal scope_cancelled
        noticed = None
        shielded = phase == "back" or step.style == "shield"
        for move in script(step, phase):
            faults = [fault for fault in plan if fault[:2] == (step.name, phase) and fault.at == move]
            if isinstance(move, int):
                seen.extend(Event(fault.kind, step.name) for fault in faults)
                scope_cancelled |= any(fault.kind == "scope" for fault in faults)
                native = any(fault.kind != "scope" for fault in faults)
                # G9: a scope that is cancelled during a rollback is not noticed by it.
                if native or (scope_cancelled and phase == "action"):
                    noticed = "cancelled"
                if noticed and not shielded:
                    seen.append(Event("cancelled", step.name))
                    return noticed
                seen.append(Event("tick", step.name))
            elif faults:
                how = {"fail": "failed", "decline": "declined", "quit": "quit"}[faults[0].kind]
                seen.append(Event(how if phase == "action" else f"back {how}", step.name))
                return how if how == "quit" else noticed or how
            elif move in {"first", "second", "removed"}:
                seen.append(Event(str(move), step.name))
        seen.append(Event("done" if phase == "action" else "back done", step.name))
        return noticed

    def carry_out(part: Part, around: tuple[Seq, ...]) -> None:
        nonlocal committed
        if isinstance(part, Step):
            if scope_cancelled and part.style != "async":
                raise _Stopped("cancelled")  # G6: noticed before it
            seen.append(Event("start", part.name))
            stopped = play(part, "action")
            started.append((part, seen[-1].what, around))
            if stopped is not None:
                raise _Stopped(stopped)
        elif isinstance(part, Commit):
            committed = True
            started.clear()
        else:
            assert isinstance(part, Seq)
            for inner in part.parts:
                mark = len(started)
                try:
                    carry_out(inner, (*around, part))
                except _Stopped as error:
                    # A data saga ends here as well, so when its entries are taken back is the same.
                    (how,) = error.args
                    late = take_back(mark)
                    caught = functions and not isinstance(inner, Commit) and inner.catch
                    if late or broken or not caught or how not in {"failed", "declined"}:
                        raise _Stopped("cancelled" if late and how != "quit" else how) from None

    def take_back(mark: int) -> bool:
        """G7: in reverse order, one at a time. Tells whether a cancellation came."""
        nonlocal broken
        late = False
        while len(started) > mark:
            step, end, around = started.pop()
            way = way_back(step, end)
            if way is None or not halted.isdisjoint(map(id, around)):
                continue
            seen.append(Event(way, step.name))
            late = (play(step, "back") == "cancelled") | late
            if seen[-1].what != "back done":
                broken = True
                # G11: what was to stop, stops.
                halted.update(id(saga) for saga in around if stops(saga, functions=functions))
        return late

    try:
        carry_out(tree, ())
    except _Stopped:
        take_back(0)
    else:
        if later and not committed:
            take_back(0)
    return seen


def stops(saga: Seq, *, functions: bool) -> bool:
    """Tells whether a failed compensation stops the rollback; a nested scope has no such option."""
    return saga.stop and not (functions and saga.nested)


# --- any tree: how the actions ended determines the rest ---------------------------------------------


class Reading:
    """What happened to a tree, and what therefore must have happened, and must not."""

    def __init__(
        self, tree: Seq, events: list[Event], *, functions: bool, later: bool, noticed: bool
    ) -> None:
        """Reads the events.

        A cancelled scope does not interrupt a rollback. Whether a function that goes on after one
        notices it, at a checkpoint, can be the loop's choice: `noticed` tells what was seen.
        """
        self.tree = tree
        self.functions = functions
        self.in_groups = set(parts_in_groups(tree))
        self.start: dict[str, int] = {}
        self.end: dict[str, int] = {}
        self.begin_back: dict[str, int] = {}
        self.end_back: dict[str, int] = {}
        for index, (what, step) in enumerate(events):
            for whats, places in (
                ({"start"}, self.start),
                (ENDS, self.end),
                (BEGINS_BACK, self.begin_back),
                (ENDS_BACK, self.end_back),
            ):
                if what in whats:
                    assert step not in places, f"{what} of {step}: more than once"
                    places[step] = index
        assert self.start.keys() == self.end.keys(), "an action was left behind"
        assert self.begin_back.keys() == self.end_back.keys(), "a compensation was left behind"
        # A scope that is cancelled during a rollback: G9.
        self.events = [
            Event("quiet", step) if what == "scope" and self.end[step] < index else Event(what, step)
            for index, (what, step) in enumerate(events)
        ]
        quiet = any(what == "quiet" for what, _ in self.events)
        loud = any(what in CANCELS for what, _ in self.events)
        self.disturbed = loud or quiet
        self.cancelled = loud or (quiet and functions and noticed)
        self.native = any(what in CANCELS - {"scope"} for what, _ in events)
        self.broken = [step for what, step in events if what in ENDS_BACK - {"back done"}]
        self.quits = [step for what, step in events if what in {"quit", "back quit"}]
        # The part that ended the run. One in which a cancellation arrives does so, shielded or not.
        stopped = len(tree.parts)
        for index, part in reversed(list(enumerate(tree.parts))):
            if not self.goes_on(part) or self.was_cancelled(part):
                stopped = index
        if self.cancelled and not loud and stopped == len(tree.parts):
            stopped -= 1  # a group noticed it, though each of its actions was done
        self.failed = stopped < len(tree.parts)
        passed = [index for index, part in enumerate(tree.parts[:stopped]) if part == Commit()]
        self.committed = bool(passed)
        self.rolled_back = self.failed or (later and not self.committed)
        # What is to be taken back: all of a failed run (G14: after its commit), and (G2) each call
        # that failed, though its caller went on.
        self.owed: set[str] = set()
        for index, part in enumerate(tree.parts):
            self._find_owed(part, owed=self.rolled_back and index >= max(passed, default=0))

    def _find_owed(self, part: Part, *, owed: bool) -> None:
        owed = owed or self.caught(part)
        if isinstance(part, Step) and owed:
            self.owed.add(part.name)
        for inner in inner_parts(part):
            self._find_owed(inner, owed=owed)

    # How it went.

    def how(self, step: str) -> str:
        """Tells how an action ended; "never" for one that did not start."""
        return self.events[self.end[step]].what if step in self.end else "never"

    def happened(self, part: Part, whats: set[str], *, back: bool) -> bool:
        """Tells whether something happened in the actions of a part, or on its way back too."""
        names = {step.name for step in steps_of(part)}
        return any(
            what in whats and step in names and (back or index <= self.end[step])
            for index, (what, step) in enumerate(self.events)
        )

    def span(self, steps: Iterable[Step], *, back: bool = False) -> tuple[int, int] | None:
        """Gives the places of the first and last event of steps, going forward or back."""
        first, last = (self.begin_back, self.end_back) if back else (self.start, self.end)
        names = [step.name for step in steps if step.name in first]
        return (
            (min(map(first.__getitem__, names)), max(map(last.__getitem__, names))) if names else None
        )

    def ended(self, part: Part) -> str:
        """Tells how a part ended: "done", "failed", "cancelled" (or between two steps), "never"."""
        if isinstance(part, Step):
            how = self.how(part.name)
            return "failed" if how in {"declined", "quit"} else how
        if isinstance(part, Par):
            ends = {self.ended(member) for member in part.members}
            return "failed" if "failed" in ends else ends.pop() if len(ends) == 1 else "cancelled"
        for index, inner in enumerate(inner_parts(part)):
            if not self.goes_on(inner):
                end = self.ended(inner)
                return "cancelled" if end == "never" and index else end
        return "done"

    def caught(self, part: Part) -> bool:
        """G2: tells whether this is a call that failed, was taken back, and whose caller went on.

        A cancellation that comes while it is taken back goes on instead, except in a branch of a
        group: there it is the group that is cancelled, and the branch at its next checkpoint.
        """
        return (
            self.functions
            and not isinstance(part, Commit)
            and part.catch
            and self.ended(part) == "failed"
            and not self.happened(part, {"quit", "back quit", "back failed"}, back=True)
            and not self.happened(part, CANCELS, back=part not in self.in_groups)
        )

    def was_cancelled(self, part: Part) -> bool:
        """Tells whether a cancellation came in its actions, or while a call in it was taken back."""
        names = {step.name for step in steps_of(part)} - {step.name for step in self._uncaught(part)}
        return self.happened(part, CANCELS, back=False) or any(
            what in CANCELS and step in names for what, step in self.events
        )

    def goes_on(self, part: Part) -> bool:
        return self.ended(part) == "done" or self.caught(part)

    def due(self, step: Step) -> str | None:
        """Tells how a step is to be taken back; None where it is not."""
        return way_back(step, self.how(step.name)) if step.name in self.owed else None

    # What therefore must be.

    def check(self) -> None:
        """Fails where the events are not those of a saga."""
        self._check_forward(self.tree, disturbed=self.disturbed)
        self._check_back(self.tree)
        if not self.functions:
            last = max([-1, *self.end.values()])
            assert all(last < begun for begun in self.begin_back.values()), (
                "G7: started after the rollback began"
            )
        for step in steps_of(self.tree):
            self._check_way_back(step)

    def _check_way_back(self, step: Step) -> None:
        """G3, G11: each step is taken back in its one right way, if it is to be, and not otherwise."""
        way = self.due(step)
        begun = self.begin_back.get(step.name)
        halts = [
            self.end_back[name]
            for saga in sagas_around(self.tree, step)
            if stops(saga, functions=self.functions)
            for name in {inner.name for inner in steps_of(saga)}.intersection(self.broken)
        ]
        if begun is None:
            assert way is None or halts, f"{step.name} is not taken back"
        else:
            assert self.events[begun].what == way, f"{step.name} is taken back in the wrong way"
            assert all(begun < halt for halt in halts), f"{step.name} goes back after the stop"

    def _check_forward(self, part: Part, *, disturbed: bool) -> None:
        """G1, G4: what is `disturbed` may be cancelled, as from outside; what is not has no choice."""
        end = self.ended(part)
        assert disturbed or end != "cancelled", f"{part} was cancelled without a reason"
        if end == "never":
            return
        if isinstance(part, Step):
            assert part.style == "async" or end != "cancelled", "G6: cut short"
        elif isinstance(part, Seq):
            for first, second in combinations(part.parts, 2):
                one, other = self.span(steps_of(first)), self.span(steps_of(second))
                if other is not None:
                    assert self.goes_on(first), f"G1: {second} after {first} had ended it"
                    assert one is None or one[1] < other[0], f"G1: {second} before the end of {first}"
            for inner in part.parts:
                self._check_forward(inner, disturbed=disturbed)
        elif isinstance(part, Par):
            shaken = end == "failed" and (not part.finish or self.happened(part, {"quit"}, back=False))
            for member in part.members:
                assert end == "failed" or disturbed or self.ended(member) == "done", "G1: left out"
                self._check_forward(member, disturbed=disturbed or shaken)
            self._check_entry([first_step(member) for member in part.members], self.start)
            self._check_limit(part.limit, [self.span(steps_of(member)) for member in part.members])
            self._check_together(
                [first_step(member) for member in part.members[: part.limit]], back=False
            )
            self._check_stop(part)

    def _check_entry(self, steps: list[Step | None], places: dict[str, int]) -> None:
        """G15: members that begin with a step at once are entered in the order given."""
        entries = [places[step.name] for step in steps if step is not None and step.name in places]
        assert entries == sorted(entries), "G15: not in the order given"

    def _check_limit(self, limit: int | None, spans: list[tuple[int, int] | None]) -> None:
        """G1: no more than `limit` at once."""
        known = [span for span in spans if span is not None]
        for begin, _ in known:
            active = sum(first <= begin <= last for first, last in known)
            assert limit is None or active <= limit, f"G1: {active} at once, not {limit}"

    def _check_together(self, steps: list[Step | None], *, back: bool) -> None:
        """G1, G7: what runs at the same time has begun before any of it has come past a checkpoint."""
        begin, end = (self.begin_back, self.end_back) if back else (self.start, self.end)
        known = [step for step in steps if step is not None and step.name in begin]
        for step in known:
            whole = self.events[end[step.name]].what in {"done", "back done"}
            if whole and sum(step.back_pace if back else step.pace):
                assert all(begin[other.name] < end[step.name] for other in known), (
                    "not at the same time"
                )

    def _check_stop(self, group: Par) -> None:
        """G4: when a member has failed, none starts any more; with "cancel" the others are stopped at once."""
        for failing in group.members:
            last = failing if isinstance(failing, Step) else self._last_of(failing)
            if last is None or last.style == "shield" or self.ended(failing) != "failed":
                continue
            failure = self.end[last.name]
            for member in group.members:
                first = first_step(member)
                if first is not None and first.name in self.start:
                    assert self.start[first.name] <= failure, "G4: started after a failure"
                if isinstance(member, Step) and member.style == "async" and not group.finish:
                    ticks = self.events[failure:].count(Event("tick", member.name))
                    back = self.events[self.begin_back.get(member.name, len(self.events)) :]
                    ticks -= back.count(Event("tick", member.name))
                    assert ticks <= 1, "G4: went on after a failure"

    def _last_of(self, part: Part) -> Step | None:
        """Gives the step whose failure is that of a saga in the same instant; None where it is not."""
        if self.functions or not isinstance(part, Seq):
            return part if isinstance(part, Step) else None
        return self._last_of(next((p for p in part.parts if not self.goes_on(p)), part.parts[-1]))

    def _check_back(self, part: Part) -> None:
        """G7: in reverse order, one at a time; a group's members together, when all have stopped."""
        if isinstance(part, Seq):
            for first, second in combinations(part.parts, 2):
                if self.caught(first):
                    before = self.span(steps_of(first), back=True)
                    after = self.span(steps_of(second))
                    assert None in (before, after) or before[1] < after[0], "G2: not taken back first"
                else:
                    before = self.span(steps_of(second), back=True)
                    after = self.span(self._uncaught(first), back=True)
                    assert None in (before, after) or before[1] < after[0], "G7: not in reverse order"
        elif isinstance(part, Par):
            _, stopped = self.span(steps_of(part)) or (0, 0)
            for step in self._left_to(part):
                assert self.begin_back.get(step.name, len(self.events)) > stopped, "G4: still running"
            entered = [self._last_begun(member) for member in part.members]
            self._check_entry(entered, self.begin_back)
            spans = [self.span(self._left_to(member), back=True) for member in part.members]
            self._check_limit(part.limit, spans)
            going_back = sum(any(map(self.due, steps_of(member))) for member in part.members)
            if part.limit is None or going_back <= part.limit:
                self._check_together(entered, back=True)
        for inner in inner_parts(part):
            self._check_back(inner)

    def _uncaught(self, part: Part) -> Iterator[Step]:
        """Gives the steps that are not taken back before the part is."""
        if isinstance(part, Step):
            yield part
        for inner in inner_parts(part):
            if not self.caught(inner):
                yield from self._uncaught(inner)

    def _left_to(self, part: Part) -> Iterator[Step]:
        """Gives the steps that the group around takes back; a function's calls take themselves back."""
        if isinstance(part, Step):
            yield part
        elif isinstance(part, Par) or not self.functions:
            for inner in inner_parts(part):
                yield from self._left_to(inner)

    def _last_begun(self, part: Part) -> Step | None:
        """Gives the step with which taking back a member begins at once; None where it does not."""
        if isinstance(part, Seq) and not self.functions:
            begun = [inner for inner in part.parts if self.span(steps_of(inner), back=True)]
            return self._last_begun(begun[-1]) if begun else None
        return part if isinstance(part, Step) and part.name in self.begin_back else None

    # What is reported.

    def state(self, step: str) -> str:
        """G13: tells the one state that a step ends in."""
        if step in self.end_back:
            return (
                "COMPENSATED"
                if self.events[self.end_back[step]].what == "back done"
                else "COMPENSATION_FAILED"
            )
        return STATES.get(self.how(step), "UNKNOWN")

    @property
    def saga_state(self) -> str:
        """G11, G14: tells the one state that the run ends in."""
        if self.broken or (self.failed and self.committed):
            return "FAILED"
        return "COMPENSATED" if self.rolled_back else "COMPLETED"

    @property
    def goes_to_the_caller(self) -> str:
        """G8: an order to quit over a failed compensation, over cancellation, over failure."""
        if self.quits:
            return "quit"
        if self.broken:
            return "compensation failed"
        return "cancelled" if self.cancelled else "failure" if self.failed else "nothing"

    def explains(
        self, error: BaseException | None, part: Part, raised: dict[str, BaseException]
    ) -> bool:
        """G5: tells whether this is the failure of that part, given what each action raised."""
        error = getattr(error, "error", error)  # of a function's CompensationFailed
        if isinstance(part, Step):
            return error is raised[part.name]
        if isinstance(part, Seq):
            return self.explains(error, next(p for p in part.parts if not self.goes_on(p)), raised)
        if not isinstance(error, ExceptionGroup) or repr(group_name(part)) not in str(error):
            return False
        left = list(error.exceptions)
        failed = [member for member in part.members if self.ended(member) == "failed"]
        for member in failed:
            if left and self.explains(left[0], member, raised):
                del left[0]
            else:
                # Over its failure goes a cancellation, if it is cancelled while it is failing (G8):
                # possible where it does not end in the instant in which it fails.
                last = self._last_of(member)
                at_once = last is not None and last.style != "shield"
                assert len(failed) > 1, "G5: the failure is missing"
                assert not (part.finish or at_once), "G5: a failure is missing"
        return not left


STATES = {"never": "NOT_STARTED", "done": "COMPLETED", "declined": "NOT_APPLIED"}


def first_step(part: Part) -> Step | None:
    """Gives the step with which a member begins at once; None where it begins with something else."""
    while isinstance(part, Seq):
        part = part.parts[0]
    return part if isinstance(part, Step) and part.style != "shield" else None


def parts_in_groups(part: Part, *, inside: bool = False) -> Iterator[Part]:
    """Gives the parts that a group runs."""
    for inner in inner_parts(part):
        if inside or isinstance(part, Par):
            yield inner
        yield from parts_in_groups(inner, inside=inside or isinstance(part, Par))


def sagas_around(part: Part, step: Step) -> Iterator[Seq]:
    """Gives the sagas that a step is in."""
    if step in steps_of(part):
        if isinstance(part, Seq):
            yield part
        for inner in inner_parts(part):
            yield from sagas_around(inner, step)


def group_name(group: Par) -> str:
    """Gives a group the name of what it begins with."""
    return f"group of {next(steps_of(group)).name}"
