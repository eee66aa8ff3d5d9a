"""What a saga is, in plain synchronous Python. It shares no code with the engine.

`Model` carries out a tree, and takes it back where that does not end well. It gives a history, in
which what runs `Together` may interleave; the state of each step; and what goes on to the caller.

Three things it asks: is this begun, how does it end, did a cancellation come from outside? `Run`, in
`choices.py`, answers by the faults that are planned and by what was the loop's choice (G15).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from trees import Commit, Ended, Event, History, Par, Part, Seq, Step, fork, holds, parts_of, steps_of

HOWS = ["done", "failed", "cancelled", "compensation failed", "quit"]


def goes_on(*hows: str) -> str:
    """G8: what goes on to the caller is the one that stands last in the list."""
    return max(hows, key=HOWS.index)


class Model(ABC):
    """One run of a saga as data or, with `functions`, as functions that call their parts on a scope."""

    def __init__(self, root: Seq, *, functions: bool, later: bool) -> None:
        self.root, self.functions, self.later = root, functions, later
        self.history: History = []
        self.state = {step.name: "NOT_STARTED" for step in steps_of(root)}
        self.committed = 0  # so many parts of the root

    def run(self) -> None:
        """Carries out the tree; with `later`, a run that succeeded is then taken back."""
        ended = self.carry_out(self.root, self.history)
        self.error = ended if ended.how != "done" else None
        rolled_back = self.error or (self.later and not self.committed)
        if rolled_back:
            ended = self.unwind(self.root, self.history, ended)
        self.goes_to_the_caller = ended.how
        failed = self.broken() or (self.error and self.committed)  # G11, G14
        self.saga_state = "FAILED" if failed else "COMPENSATED" if rolled_back else "COMPLETED"

    def carry_out(self, part: Part, line: History) -> Ended:
        """Carries out a part, and writes its events to a line of the history."""
        ended = Ended("failed", part)  # what a function raises by itself
        if isinstance(part, Step):
            ended = self.act(part, line)
        elif isinstance(part, Seq):
            ended = self.carry_out_in_order(part, line)
        elif isinstance(part, Par):
            ended = self.carry_out_together(part, line)
        return ended._replace(how=goes_on(ended.how, self.from_outside(part, "action", ended.how)))

    def act(self, step: Step, line: History) -> Ended:
        if not self.begins(step, "action"):
            return Ended("cancelled", step)
        line.append(Event("start", step.name))
        end = self.ends(step, "action", line)
        # G3: one that declared that it did nothing, did nothing; what did not return is in doubt.
        self.state[step.name] = {"done": "COMPLETED", "declined": "NOT_APPLIED"}.get(end, "UNKNOWN")
        return Ended("failed" if end == "declined" else end, step)

    def carry_out_in_order(self, seq: Seq, line: History) -> Ended:
        """G1: each part begins when the one before it is done."""
        for index, part in enumerate(seq.parts, 1):
            if isinstance(part, Commit):
                self.committed = index  # G14
            elif (ended := self.call(part, line)).how != "done":
                return ended
        return Ended("done", seq)

    def call(self, part: Part, line: History) -> Ended:
        ended = self.carry_out(part, line)
        if ended.how == "done" or not self.functions:
            return ended  # G4: all compensation is left to whoever called the whole
        # G2: a call is all or nothing, so its caller may catch what it raises.
        ended = self.unwind(part, line, ended)
        return Ended("done", part) if ended.how == "failed" and part.catch else ended

    def carry_out_together(self, group: Par, line: History) -> Ended:
        """G1: members run at the same time; G5: it is the group that fails, with those that failed."""
        ends = [self.carry_out(member, its_line) for member, its_line in fork(line, group)]
        # G4: where one fails, the others are cancelled; those did not fail.
        failed = tuple(ended for ended in ends if ended.how not in {"done", "cancelled"})
        return Ended(goes_on(*(ended.how for ended in failed or ends)), group, failed)

    def unwind(self, part: Part, line: History, ended: Ended) -> Ended:
        """Takes back what ended so; tells how it has ended then."""
        back = self.take_back(part, line)
        return ended._replace(how=goes_on(ended.how, back, self.from_outside(part, "back", ended.how)))

    def take_back(self, part: Part, line: History) -> str:
        """G7: takes back in reverse, one at a time; the members of a group together."""
        hows: list[str] = []
        if isinstance(part, Step):
            hows = [self.act_back(part, line)]
        elif isinstance(part, Seq):
            first = self.committed if part is self.root else 0  # G14
            hows = [self.take_back(inner, line) for inner in reversed(part.parts[first:])]
        elif isinstance(part, Par):
            hows = [self.take_back(member, its_line) for member, its_line in fork(line, part)]
        return goes_on("done", *hows)

    def act_back(self, step: Step, line: History) -> str:
        way = self.way_back(step)
        if way is None:
            return "done"
        if not self.begins(step, "back"):
            return "compensation failed"  # G2: nor is this taken back
        line.append(Event(way, step.name))
        end = self.ends(step, "back", line)
        self.state[step.name] = "COMPENSATED" if end == "done" else "COMPENSATION_FAILED"
        return end if end in {"done", "quit"} else "compensation failed"

    def way_back(self, step: Step) -> str | None:
        """G3: how a step is taken back; None where there is nothing to do."""
        state = self.state[step.name]
        if state == "COMPLETED" and step.undo:
            return "undo"
        return "compensate" if state in {"COMPLETED", "UNKNOWN"} and step.compensation else None

    def broken(self) -> set[str]:
        return {name for name, state in self.state.items() if state == "COMPENSATION_FAILED"}

    # What it asks.

    def begins(self, step: Step, phase: str) -> bool:
        """Tells whether an action or a way back is begun; G11: none where one failed in a saga that stops."""
        stops = (part for part in parts_of(self.root) if isinstance(part, Seq) and part.stop)
        return not any(holds(saga, {step.name}) and holds(saga, self.broken()) for saga in stops)

    @abstractmethod
    def ends(self, step: Step, phase: str, line: History) -> str:
        """Tells how that ends: "done", "failed", "declined", "cancelled", "quit"."""

    @abstractmethod
    def from_outside(self, part: Part, phase: str, how: str) -> str:
        """Tells what came over a part that ended so, from outside: "cancelled", or "done" for nothing."""
