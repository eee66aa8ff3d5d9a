"""What was recorded of a run, held against the model: it is one of the histories that it allows.

`Seen` reads from the record what was the loop's choice, for the model to go by. Then the record must
be the model's history, up to what runs together; and what a group promises about those who run
together, which the model does not tell, must hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from choices import Run
from trees import (
    CANCELS,
    Ended,
    Event,
    History,
    Par,
    Part,
    Raise,
    Seq,
    Step,
    inner_parts,
    parts_of,
    steps_of,
)

BEGINS = {"start": "action", "undo": "back", "compensate": "back"}
NO_ENDS = {"start", "undo", "compensate", "again", "tick", "first", "second", "removed", *CANCELS}


class Seen:
    """A record of events, and what it says of the loop's choices."""

    def __init__(
        self, events: list[Event], *, failed: bool, given_up: frozenset[Part] = frozenset()
    ) -> None:
        """Reads the record; `failed` tells whether the run did not end well."""
        self.events = events
        self.failed = failed
        # Parts after which a branch gave up, and those after which it may have.
        self.given_up = given_up
        self.guessed: set[Part] = set()
        # Where an action and a way back of each step begin, and end at last.
        self.begin: dict[tuple[str, str], int] = {}
        self.end: dict[tuple[str, str], int] = {}
        # What each attempt at an action ended with, and after how many checkpoints.
        self.attempts: dict[str, list[tuple[str, int]]] = {}
        phases: dict[str, str] = {}
        passed: dict[str, int] = {}
        for index, (what, step) in enumerate(events):
            if what in BEGINS:
                phases[step] = BEGINS[what]
                assert (step, phases[step]) not in self.begin, f"{what} of {step}: more than once"
                self.begin[step, phases[step]] = index
            if what in BEGINS or what == "again":
                passed[step] = 0
            elif what == "tick":
                passed[step] += 1
            elif what not in NO_ENDS:
                self.end[step, phases[step]] = index
                if phases[step] == "action":
                    self.attempts.setdefault(step, []).append((what, passed[step]))
        assert self.begin.keys() == self.end.keys(), "an action or a compensation was left behind"

    def begins(self, step: Step, phase: str) -> bool:
        return (step.name, phase) in self.begin

    def interrupts(self, step: Step, attempt: int, checkpoint: int | None) -> bool:
        ended, ticks = self.attempts[step.name][attempt]
        return ended == "cancelled" and checkpoint in {None, ticks}

    def notices(self, group: Par) -> bool:
        """A group did if the run failed, and nothing was begun after it."""
        last = max(
            self.end[step.name, "action"] for step in steps_of(group) if self.begins(step, "action")
        )
        return self.failed and not any(what == "start" for what, _ in self.events[last:])

    def gives_up(self, part: Part, owed: list[str]) -> bool:
        """A guess: what is taken back next may be so for this reason, or for another one."""
        *_, last = steps_of(part)
        if isinstance(part, Par) or last.style in {"shield", "blocking"}:
            self.guessed |= {part for name in owed if (name, "back") in self.begin}
        return part in self.given_up


def read(events: list[Event], make: Callable[[Seen], Run], *, failed: bool) -> Run:
    """Gives the model's run with the history that was recorded.

    Where the record does not show by itself what the loop's choice was, all of them are tried.
    """
    waiting: list[frozenset[Part]] = [frozenset()]
    tried = set(waiting)
    wrong: AssertionError | None = None
    for given_up in waiting:
        seen = Seen(events, failed=failed, given_up=given_up)
        model = make(seen)
        try:
            model.run()
            check(model, seen)
        except AssertionError as error:
            wrong = wrong or error
            more = {given_up | {part} for part in seen.guessed} - tried
            waiting.extend(more)
            tried |= more
        else:
            return model
    assert wrong is not None
    raise wrong


def fits(history: History, events: list[Event]) -> bool:
    """G15: tells whether events are a history, of which some may interleave."""
    place = 0
    for entry in history:
        if isinstance(entry, Event):
            if place == len(events) or events[place] != entry:
                return False
            place += 1
        else:
            count = sum(map(length, entry.lines))
            part = events[place : place + count]
            place += count
            for line in entry.lines:
                names = set(names_in(line))
                if not fits(line, [event for event in part if event.step in names]):
                    return False
    return place == len(events)


def length(history: History) -> int:
    return sum(1 if isinstance(entry, Event) else sum(map(length, entry.lines)) for entry in history)


def names_in(history: History) -> Iterator[str]:
    for entry in history:
        if isinstance(entry, Event):
            yield entry.step
        else:
            for line in entry.lines:
                yield from names_in(line)


def check(model: Run, seen: Seen) -> None:
    """Fails where a record is none of the histories that the model allows."""
    assert fits(model.history, seen.events), f"not a history of this saga: {model.history}"
    for part in parts_of(model.root):
        if isinstance(part, Par):
            Members(part, seen, model).check()
        elif isinstance(part, Seq) and part.stop:
            # Not of threads: the loop knows of what they do only later.
            names = {step.name for step in steps_of(part) if step.style != "blocking"}
            begun = max((seen.begin.get((name, "back"), -1) for name in names), default=-1)
            for name in names & model.broken():
                assert begun < seen.end[name, "back"], "G11: goes back after the stop"


class Members:
    """The members of one group, and when they ran."""

    def __init__(self, group: Par, seen: Seen, model: Run) -> None:
        self.group = group
        self.seen = seen
        self.model = model

    def check(self) -> None:
        group = self.group
        first = [first_step(member) for member in group.members]
        self.check_entry(first, "action")
        self.check_limit([self.span(steps_of(member), "action") for member in group.members])
        self.check_together(first[: group.limit], "action")
        self.check_stop()
        left = [list(self.left_to(member)) for member in group.members]
        last = [self.last_begun(member) for member in group.members]
        self.check_entry(last, "back")
        spans = [self.span(steps, "back") for steps in left]
        self.check_limit(spans)
        going_back = [
            member
            for member in group.members
            if any(
                self.seen.begins(step, "back") or self.model.way_back(step) for step in steps_of(member)
            )
        ]
        if len(going_back) <= (group.limit or len(going_back)):
            self.check_together(last, "back")

    def span(self, steps: Iterable[Step], phase: str) -> tuple[int, int] | None:
        """Gives the places of the first and last event of steps, going forward or back."""
        keys = [(step.name, phase) for step in steps if self.seen.begins(step, phase)]
        if not keys:
            return None
        return min(self.seen.begin[key] for key in keys), max(self.seen.end[key] for key in keys)

    def check_entry(self, steps: list[Step | None], phase: str) -> None:
        """G15: members that begin with a step at once are entered in the order given."""
        entries = [self.seen.begin[s.name, phase] for s in steps if s and self.seen.begins(s, phase)]
        assert entries == sorted(entries), "G15: not in the order given"

    def check_limit(self, spans: list[tuple[int, int] | None]) -> None:
        """G1: no more than `limit` at once."""
        known = [span for span in spans if span is not None]
        for begin, _ in known:
            active = sum(first <= begin <= last for first, last in known)
            assert active <= (self.group.limit or active), f"G1: {active} at once"

    def check_together(self, steps: list[Step | None], phase: str) -> None:
        """G1, G7: what runs at the same time has begun before any of it has come past a checkpoint."""
        known = [step for step in steps if step and self.seen.begins(step, phase)]
        for step in known:
            end = self.seen.end[step.name, phase]
            whole = self.seen.events[end].what in {"done", "back done"}
            if whole and sum(step.back_pace if phase == "back" else step.pace):
                assert all(self.seen.begin[other.name, phase] < end for other in known), (
                    "not at the same time"
                )

    def check_stop(self) -> None:
        """G4: when a member has failed, none starts any more; with "cancel" the others are stopped at once."""
        events = self.seen.events
        for failing in self.group.members:
            last = self.last_of(failing)
            if last is None or not ended_badly(last, self.seen):
                continue
            failure = self.seen.end[last.name, "action"]
            for member in self.group.members:
                first = first_step(member)
                if first is not None and self.seen.begins(first, "action"):
                    assert self.seen.begin[first.name, "action"] <= failure, (
                        "G4: started after a failure"
                    )
                at_once = not self.group.finish or events[failure].what == "quit"
                if isinstance(member, Step) and member.style == "async" and at_once:
                    until = self.seen.begin.get((member.name, "back"), len(events))
                    ticks = events[failure:until].count(Event("tick", member.name))
                    assert ticks <= 1, "G4: went on after a failure"

    def last_of(self, part: Part) -> Step | None:
        """Gives the step whose failure is that of a member in the same instant; None where it is not."""
        while isinstance(part, Seq) and not self.model.functions:
            begun = [inner for inner in part.parts if self.span(steps_of(inner), "action")]
            if not begun:
                return None
            part = begun[-1]
        return part if isinstance(part, Step) and part.style in {"async", "sync"} else None

    def left_to(self, part: Part) -> Iterator[Step]:
        """Gives the steps that the group takes back; a function's calls take themselves back."""
        if isinstance(part, Step):
            yield part
        elif isinstance(part, Par) or not self.model.functions:
            for inner in inner_parts(part):
                yield from self.left_to(inner)

    def last_begun(self, part: Part) -> Step | None:
        """Gives the step with which taking back a member begins at once; None where it does not."""
        while isinstance(part, Seq) and not self.model.functions:
            begun = [inner for inner in part.parts if self.span(steps_of(inner), "back")]
            if not begun:
                return None
            part = begun[-1]
        at_once = isinstance(part, Step) and part.style != "blocking"
        return part if at_once and self.seen.begins(part, "back") else None


def first_step(part: Part) -> Step | None:
    """Gives the step with which a member begins at once; None where it begins with something else."""
    while isinstance(part, Seq):
        part = part.parts[0]
    return part if isinstance(part, Step) and part.style in {"async", "sync"} else None


def ended_badly(step: Step, seen: Seen) -> bool:
    """Tells whether an action failed, for good."""
    if not seen.begins(step, "action"):
        return False
    return seen.events[seen.end[step.name, "action"]].what in {
        "failed",
        "declined",
        "quit",
        "timed out",
    }


def paths(part: Part, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Step]]:
    """Gives each step with its path."""
    if isinstance(part, Step):
        yield path, part
    for index, inner in enumerate(inner_parts(part)):
        yield from paths(inner, (*path, index))


def holds_group(part: Part) -> bool:
    """Tells whether members may interleave, so that the loop has a choice."""
    return any(isinstance(inner, Par) for inner in parts_of(part))


def group_name(group: Par) -> str:
    """Gives a group the name of what it begins with."""
    return f"group of {next((step.name for step in steps_of(group)), 'nothing')}"


def explains(
    error: BaseException | None,
    ended: Ended,
    raised: Callable[[Step | Raise, BaseException | None], bool],
    *,
    functions: bool,
) -> bool:
    """G5: tells whether this is the failure that the model says, given what each action raised."""
    error = getattr(error, "error", error)  # of a function's CompensationFailed
    group = ended.reason
    if isinstance(group, Step | Raise):
        return raised(group, error)
    assert isinstance(group, Par)
    if not isinstance(error, ExceptionGroup) or repr(group_name(group)) not in str(error):
        return False
    left = list(error.exceptions)
    for member in ended.members:
        if left and explains(left[0], member, raised, functions=functions):
            del left[0]
        else:
            # Over its failure goes a cancellation, if it is cancelled while it is failing (G8):
            # possible where it does not end in the instant in which it fails. The call of a function
            # is taken back first, which takes time.
            assert len(ended.members) > 1, "G5: the failure is missing"
            at_once = isinstance(member.reason, Step) and member.reason.style in {"async", "sync"}
            late = functions and member.reason not in group.members
            assert not (group.finish or (at_once and not late)), "G5: a failure is missing"
    return not left
