"""What the model asks: what actions meet, and what the loop chooses.

`Run` answers by the plan: there are failures, tried once more where there is a retry, cancellations,
and what hangs until its time runs out. What is the loop's choice (G15) it asks of a `Loop`: of the
members of groups, what still begins when another one has failed, and at which checkpoint a
cancellation is noticed. A tree without groups leaves no choice: there the history is one list, the
same on every loop. What is not begun, and what is cut short, must have a reason.
"""

from __future__ import annotations

from typing import Protocol

from model import Model
from trees import (
    FAILURES,
    HOW,
    PLACES,
    RAN_OUT,
    Ended,
    Event,
    Fault,
    History,
    Par,
    Part,
    Plan,
    Seq,
    Step,
    holds,
    parts_of,
    script,
    steps_of,
)


class Loop(Protocol):
    """What is the loop's choice. Where there is no group, there is none, and nobody asks."""

    def begins(self, step: Step, phase: str) -> bool:
        """Tells whether an action or a way back is begun, where it need not be."""
        ...

    def interrupts(self, step: Step, attempt: int, checkpoint: int | None) -> bool:
        """Tells whether an attempt at an action notices a cancellation there; None: where it hangs."""
        ...

    def notices(self, group: Par) -> bool:
        """Tells whether a group notices a cancelled scope, though each of its members was done."""
        ...

    def gives_up(self, part: Part, owed: list[str]) -> bool:
        """Tells whether a branch of a group notices a cancellation when it has carried out a part.

        What is then to be taken back is `owed`.
        """
        ...


class Run(Model):
    """One run of a tree with faults that are planned, on a loop."""

    def __init__(self, root: Seq, plan: Plan, loop: Loop, *, functions: bool, later: bool) -> None:
        super().__init__(root, functions=functions, later=later)
        self.plan = plan
        self.loop = loop
        # What is in groups; and what functions call there: between calls they notice a cancellation.
        self.grouped = {
            inner
            for group in parts_of(root)
            if isinstance(group, Par)
            for member in group.members
            for inner in parts_of(member)
        }
        self.called = {
            part
            for branch in self.grouped
            if functions and isinstance(branch, Seq)
            for part in branch.parts
        }
        self.scope_cancelled = False
        # Steps, outside of groups, of which the action noticed a cancellation.
        self.noticed: set[str] = set()
        # Steps at which one came to what goes forward, or came natively: nobody overlooks those.
        self.loud: set[str] = set()
        # Steps whose call alone was cancelled, by a scope around it.
        self.called_off: set[str] = set()
        # Steps out of which an order to quit came.
        self.quits: set[str] = set()
        # Whether the time has run out; rollbacks in which it did before all was begun (G10).
        self.out_of_time = False
        self.unfinished = 0
        # Members that did not begin or were cut short, for which there is no reason yet.
        self.unexplained: set[str] = set()
        # Likewise, steps that are not taken back.
        self.left: list[Step] = []

    def run(self) -> None:
        super().run()
        assert not self.unexplained or self.loud or self.scope_cancelled, "cancelled without a reason"
        for step in self.left:
            assert not super().begins(step, "back"), "not taken back"

    @property
    def cancelled(self) -> bool:
        """Tells whether a cancellation was noticed, in time or too late to change anything."""
        return bool(self.loud) or (self.error is not None and self.error.how == "cancelled")

    # What is begun.

    def begins(self, step: Step, phase: str) -> bool:
        if step in self.grouped:
            # What was begun before another one failed runs to its end.
            begun = self.loop.begins(step, phase)
        elif phase == "action":
            begun = step.style == "async" or not self.scope_cancelled  # G6: noticed before it
        else:
            begun = super().begins(step, phase) and not self.out_of_time
        if not begun and phase == "back":
            self.left.append(step)
        elif not begun and step in self.grouped:
            self.unexplained.add(step.name)
        return begun

    def act(self, step: Step, line: History) -> Ended:
        if step.style != "noted":
            return super().act(step, line)
        # A function has done it by itself.
        self.state[step.name] = "COMPLETED"
        return Ended("done", step)

    def carry_out_together(self, group: Par, line: History) -> Ended:
        ended = super().carry_out_together(group, line)
        if ended.members:
            # G4: the others were cancelled, or at least did not begin.
            names = {step.name for step in steps_of(group)}
            cancels = ended.how == "quit" or not group.finish
            self.unexplained -= {name for name in names if cancels or self.state[name] == "NOT_STARTED"}
        return ended

    def unwind(self, part: Part, line: History, ended: Ended) -> Ended:
        self.out_of_time = False
        before = len(self.left)
        ended = super().unwind(part, line, ended)
        if self.out_of_time:
            # G10: what was not begun keeps its state, and that is reported.
            self.unfinished += len(self.left) > before
            del self.left[before:]
        return ended

    # What comes from outside.

    def from_outside(self, part: Part, phase: str, how: str) -> str:
        if phase == "back":
            # In a group it is the group that is cancelled, and a branch at its next checkpoint.
            noticed = holds(part, self.loud) and part not in self.grouped
        else:
            noticed = (
                (isinstance(part, Step) and part.name in self.noticed)
                or (isinstance(part, Par) and self.notices(part, how))
                or (part in self.called and how == "done" and self.gives_up(part))
            )
        return "cancelled" if noticed else "done"

    def notices(self, group: Par, how: str) -> bool:
        if holds(group, self.loud) or not self.scope_cancelled:
            return holds(group, self.loud)
        asked = self.functions and group not in self.grouped
        return how != "done" or (asked and self.loop.notices(group))

    def gives_up(self, part: Part) -> bool:
        owed = [step.name for step in steps_of(part) if self.way_back(step)]
        gives_up = self.loop.gives_up(part, owed)
        if gives_up:
            self.unexplained.update(owed)
        return gives_up

    def call(self, part: Part, line: History) -> Ended:
        """A function goes on when only the scope around one of its calls was cancelled."""
        ended = super().call(part, line)
        alone = isinstance(part, Step) and part.name in self.called_off - self.loud
        goes_on = alone and ended.how == "cancelled" and not self.scope_cancelled
        return Ended("done", part) if goes_on else ended

    # What an action meets.

    def ends(self, step: Step, phase: str, line: History) -> str:
        """Tries an action or a way back; twice, if it fails and has a retry."""
        ends: list[str] = []
        tries = 1 + (step.retry if phase == "action" else step.back_retry)
        while len(ends) < tries and (not ends or ends[-1] in FAILURES):
            if ends:
                line.append(Event("again", step.name))
            ends.append(self.attempt(step, phase, len(ends), line))
            line.append(Event(ends[-1] if phase == "action" else f"back {ends[-1]}", step.name))
        if ends[-1] == "quit":
            self.quits.add(step.name)
        if step.not_applied and set(ends) == {"declined"}:
            return "declined"  # G3: in every attempt
        return "failed" if ends[-1] in {*FAILURES, RAN_OUT} else ends[-1]

    def attempt(self, step: Step, phase: str, number: int, line: History) -> str:
        """Goes through a script; tells how that ended."""
        for move in script(step, phase):
            faults = [
                fault
                for fault in self.plan
                if fault[:2] == (step.name, phase) and fault.at == move and not (fault.once and number)
            ]
            end = "done"
            if isinstance(move, int):
                line.extend(Event(fault.kind, step.name) for fault in faults)
                self.cancel(step, phase, faults)
            elif move not in PLACES:
                line.append(Event(str(move), step.name))
                continue
            elif not faults:
                continue
            else:
                end = HOW[faults[0].kind]
                if end == "timed out" and phase == "back" and not step.back_timeout:
                    self.out_of_time = True  # G10
                    return RAN_OUT
            # At a checkpoint, and where it hangs, an action notices a cancellation; one that is
            # shielded is not cut short by it (G6), and neither is a way back (G9).
            if phase == "action" and end in {"done", "timed out"}:
                cut = self.interrupts(step, number, move if isinstance(move, int) else None)
                if cut and step.style == "async":
                    return "cancelled"
            if end != "done":
                return end
            line.append(Event("tick", step.name))
        return "done"

    def cancel(self, step: Step, phase: str, faults: list[Fault]) -> None:
        """Lets cancellations arrive."""
        kinds = {fault.kind for fault in faults}
        self.scope_cancelled |= "scope" in kinds
        if "call" in kinds:
            self.called_off.add(step.name)
        # G9: a scope that is cancelled during a rollback is not noticed by it.
        if (kinds and phase == "action") or kinds - {"scope"}:
            if phase == "action" and step not in self.grouped:
                self.noticed.add(step.name)
            if kinds != {"call"}:
                self.loud.add(step.name)

    def interrupts(self, step: Step, number: int, checkpoint: int | None) -> bool:
        """Tells whether an action notices a cancellation there."""
        if step not in self.grouped:
            if self.scope_cancelled:
                self.noticed.add(step.name)
            return step.name in self.noticed
        cut = self.loop.interrupts(step, number, checkpoint)
        if cut and step.style == "async":
            self.unexplained.add(step.name)
        return cut
