"""What a saga is, in plain synchronous Python. It shares no code with the engine.

`Model` carries out a tree with the faults that are planned for it. What it gives is a history: the
events in their order, where what runs `Together` may interleave; the state of each step; and what is
raised. Each rule has its number in the design.

What is the loop's choice (G15) is asked of a `Loop`: of the members of groups, what still begins when
another one has failed, and at which checkpoint a cancellation is noticed. A tree without groups
leaves no choice: there the history is one list, the same on every loop.
"""

from __future__ import annotations

from typing import Protocol

from trees import (
    FAILURES,
    HOW,
    PLACES,
    RAN_OUT,
    Commit,
    Event,
    Fault,
    History,
    Par,
    Part,
    Plan,
    Raise,
    Seq,
    Step,
    Together,
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


class Stopped(Exception):
    """What goes up the tree: how something ended, and which part it was that ended so."""

    def __init__(self, how: str, reason: Part, members: list[Stopped] | None = None) -> None:
        self.how = how  # "failed", "cancelled", "quit"
        self.reason = reason
        self.members = members or []
        # Whether something was taken back on its way up, which takes time.
        self.late = False


class Model:
    """One run of a tree.

    With `functions`, its sagas are functions, which call the parts on a scope, and catch or not.
    """

    def __init__(self, root: Seq, plan: Plan, loop: Loop, *, functions: bool, later: bool) -> None:
        self.root = root
        self.plan = plan
        self.loop = loop
        self.functions = functions
        self.later = later
        self.state: dict[str, str] = {step.name: "NOT_STARTED" for step in steps_of(root)}
        self.history: History = []
        self.committed = 0
        self.error: Stopped | None = None
        self.scope_cancelled = False
        # Steps whose call alone was cancelled, by a scope around it.
        self.called_off: set[str] = set()
        # How many cancellations came to what goes forward, or came natively: nobody overlooks those.
        self.loud = 0
        self.rolled_back = False
        # Ways back that failed, and orders to quit, by step.
        self.broken: list[str] = []
        self.quits: list[str] = []
        # Sagas in which nothing more is taken back (G11); whether the time has run out (G10).
        self.halted: list[Seq] = []
        self.out_of_time = False
        # Rollbacks in which it ran out before all was begun.
        self.unfinished = 0
        # Members that did not begin or were cut short, for which there is no reason yet.
        self.unexplained: set[str] = set()
        # Likewise, with the sagas around: members that are not taken back.
        self.left: list[tuple[Seq, ...]] = []

    def run(self) -> None:
        """Carries out the tree; with `later`, a run that succeeded is then taken back."""
        try:
            self.carry_out(self.root, self.history, (), in_group=False)
        except Stopped as error:
            self.error = error
        if self.error is not None or (self.later and not self.committed):
            self.rolled_back = True
            self.unwind(self.root, self.history, (), in_group=False)
        assert not self.unexplained or self.loud or self.scope_cancelled, "cancelled without a reason"
        assert all(self.has_halted(around) for around in self.left), "not taken back"

    # Going forward.

    def carry_out(self, part: Part, line: History, around: tuple[Seq, ...], *, in_group: bool) -> None:
        """Carries out a part, and writes its events to a line of the history."""
        if isinstance(part, Step):
            self.act(part, line, in_group=in_group)
        elif isinstance(part, Seq):
            for index, inner in enumerate(part.parts):
                if isinstance(inner, Commit):
                    self.committed = index + 1  # G14
                else:
                    self.call(inner, line, (*around, part), in_group=in_group)
        elif isinstance(part, Par):
            self.carry_out_together(part, line, around, in_group=in_group)
        else:
            assert isinstance(part, Raise)
            raise Stopped("failed", part)

    def call(self, part: Part, line: History, around: tuple[Seq, ...], *, in_group: bool) -> None:
        """Carries out a part of a sequence."""
        try:
            self.carry_out(part, line, around, in_group=in_group)
            owed = [step.name for step in steps_of(part) if way_back(step, self.state[step.name])]
            if in_group and self.functions and self.loop.gives_up(part, owed):
                self.unexplained.update(owed)
                raise Stopped("cancelled", part)
        except Stopped as stopped:
            if not self.functions:
                raise  # G4: all compensation is left to whoever called the whole
            # G2: a call is all or nothing, so its caller may catch what it raises.
            stopped.late = True
            late = self.unwind(part, line, around, in_group=in_group)
            names = {step.name for step in steps_of(part)}
            broken = not names.isdisjoint(self.broken)
            # G8: an order to quit over a failed compensation, over cancellation, over failure. In a
            # group it is the group that is cancelled, and a branch at its next checkpoint.
            if not names.isdisjoint(self.quits):
                stopped.how = "quit"
            elif broken:
                stopped.how = "failed"
            elif late and not in_group:
                stopped.how = "cancelled"
            if stopped.how == "cancelled" and not late and self.was_called_off(part):
                return
            if broken or stopped.how != "failed" or not part.catch:
                raise

    def carry_out_together(
        self, group: Par, line: History, around: tuple[Seq, ...], *, in_group: bool
    ) -> None:
        """G1: members run at the same time; G4: when one has failed, none starts any more."""
        loud = self.loud
        stops: list[Stopped] = []
        together = Together([[] for _ in group.members])
        line.append(together)
        for member, its_line in zip(group.members, together.lines, strict=True):
            try:
                self.carry_out(member, its_line, around, in_group=True)
            except Stopped as stopped:
                stops.append(stopped)
        failures = [stopped for stopped in stops if stopped.how != "cancelled"]
        quits = [stopped for stopped in stops if stopped.how == "quit"]
        names = {step.name for step in steps_of(group)}
        if failures and (quits or not group.finish):
            self.unexplained -= names  # G4: the others were cancelled
        if failures:
            self.unexplained -= {name for name in names if self.state[name] == "NOT_STARTED"}
        # G8: an order to quit over a cancellation from outside, and that over failures.
        if quits:
            raise quits[0]
        if self.loud > loud or (
            self.scope_cancelled
            and (stops or (self.functions and not in_group and self.loop.notices(group)))
        ):
            raise Stopped("cancelled", group)
        if failures:
            raise Stopped("failed", group, failures)  # G5: a group, whatever their number
        if stops:
            raise stops[0]

    def act(self, step: Step, line: History, *, in_group: bool) -> None:
        """Carries out an action."""
        if step.style == "noted":
            self.state[step.name] = "COMPLETED"
            return
        if in_group and not self.loop.begins(step, "action"):
            self.unexplained.add(step.name)
            raise Stopped("cancelled", step)
        if not in_group and self.scope_cancelled and step.style != "async":
            raise Stopped("cancelled", step)  # G6: noticed before it
        ends, noticed = self.play(step, "action", "start", line, in_group=in_group)
        end = ends[-1]
        # G3: one that declared that it did nothing, in every attempt, did nothing; what did not
        # return is in doubt.
        nothing = step.not_applied and set(ends) == {"declined"}
        self.state[step.name] = (
            "COMPLETED" if end == "done" else "NOT_APPLIED" if nothing else "UNKNOWN"
        )
        if end == "quit":
            raise Stopped("quit", step)
        if noticed or end == "cancelled":
            raise Stopped("cancelled", step)
        if end != "done":
            raise Stopped("failed", step)

    def play(
        self, step: Step, phase: str, begin: str, line: History, *, in_group: bool
    ) -> tuple[list[str], bool]:
        """Carries out an action or a way back; tried twice if it fails and has a retry.

        Returns how the attempts ended, and whether a cancellation was noticed.
        """
        ends: list[str] = []
        noticed = False
        tries = 1 + (step.retry if phase == "action" else step.back_retry)
        while len(ends) < tries and (not ends or ends[-1] in FAILURES):
            line.append(Event("again" if ends else begin, step.name))
            end, noticed_now = self.attempt(step, phase, len(ends), line, in_group=in_group)
            noticed |= noticed_now
            ends.append(end)
            line.append(Event(end if phase == "action" else f"back {end}", step.name))
        if ends[-1] == "quit":
            self.quits.append(step.name)
        return ends, noticed

    def attempt(
        self, step: Step, phase: str, number: int, line: History, *, in_group: bool
    ) -> tuple[str, bool]:
        """Goes through a script; tells how that ended, and whether a cancellation was noticed."""
        noticed = False
        for move in script(step, phase):
            faults = [
                fault
                for fault in self.plan
                if fault[:2] == (step.name, phase) and fault.at == move and not (fault.once and number)
            ]
            end = "done"
            if isinstance(move, int):
                line.extend(Event(fault.kind, step.name) for fault in faults)
                noticed |= self.cancel(faults, phase) and not in_group
            elif move not in PLACES:
                line.append(Event(str(move), step.name))
                continue
            elif not faults:
                continue
            else:
                end = HOW[faults[0].kind]
                if end == "timed out" and phase == "back" and not step.back_timeout:
                    return RAN_OUT, noticed  # G10
            # At a checkpoint, and where it hangs, an action notices a cancellation; one that is
            # shielded is not cut short by it (G6), and neither is a way back (G9).
            if phase == "action" and end in {"done", "timed out"}:
                noticed |= self.scope_cancelled and not in_group
                checkpoint = move if isinstance(move, int) else None
                cut = self.loop.interrupts(step, number, checkpoint) if in_group else noticed
                if cut and step.style == "async":
                    if in_group:
                        self.unexplained.add(step.name)
                    return "cancelled", noticed
            if end != "done":
                return end, noticed
            line.append(Event("tick", step.name))
        return "done", noticed

    def cancel(self, faults: list[Fault], phase: str) -> bool:
        """Lets cancellations arrive; tells whether one is noticed where it arrives."""
        native = any(fault.kind != "scope" for fault in faults)
        self.scope_cancelled |= any(fault.kind == "scope" for fault in faults)
        self.called_off |= {fault.step for fault in faults if fault.kind == "call"}
        # G9: a scope that is cancelled during a rollback is not noticed by it.
        heard = native or (bool(faults) and phase == "action")
        self.loud += heard and not all(fault.kind == "call" for fault in faults)
        return heard

    def was_called_off(self, part: Part) -> bool:
        return isinstance(part, Step) and part.name in self.called_off and not self.scope_cancelled

    # Going back.

    def unwind(self, part: Part, line: History, around: tuple[Seq, ...], *, in_group: bool) -> bool:
        """Takes back a part, uninterrupted; tells whether a cancellation came meanwhile."""
        self.out_of_time = False
        loud = self.loud
        self.take_back(part, line, around, in_group=in_group)
        if self.out_of_time:
            # G10: what was not begun keeps its state, and that is reported.
            self.left.clear()
            kept = part.parts[self.committed :] if part is self.root else (part,)
            self.unfinished += any(
                way_back(step, self.state[step.name]) for inner in kept for step in steps_of(inner)
            )
        return self.loud > loud

    def take_back(self, part: Part, line: History, around: tuple[Seq, ...], *, in_group: bool) -> None:
        """G7: takes back in reverse, one at a time; the members of a group together."""
        if isinstance(part, Seq):
            first = self.committed if part is self.root else 0  # G14
            for inner in reversed(part.parts[first:]):
                self.take_back(inner, line, (*around, part), in_group=in_group)
        elif isinstance(part, Par):
            together = Together([[] for _ in part.members])
            line.append(together)
            for member, its_line in zip(part.members, together.lines, strict=True):
                self.take_back(member, its_line, around, in_group=True)
        elif isinstance(part, Step):
            way = way_back(part, self.state[part.name])
            if way is None:
                return
            if in_group and not self.loop.begins(part, "back"):
                self.left.append(around)
                return
            # In a group, what was begun before another one failed runs to its end.
            if not in_group and (self.out_of_time or self.has_halted(around)):
                return
            ends, _ = self.play(part, "back", way, line, in_group=in_group)
            self.state[part.name] = "COMPENSATED" if ends[-1] == "done" else "COMPENSATION_FAILED"
            if ends[-1] != "done":
                self.broken.append(part.name)
                self.out_of_time |= ends[-1] == RAN_OUT
                self.halted += [saga for saga in around if self.stops(saga)]

    def stops(self, saga: Seq) -> bool:
        """G11: tells whether a failed compensation stops others; a nested scope has no such option."""
        return saga.stop and not (self.functions and saga.nested)

    def has_halted(self, around: tuple[Seq, ...]) -> bool:
        return any(saga in self.halted for saga in around)

    # What is reported.

    @property
    def saga_state(self) -> str:
        """G11, G14: tells the one state that the run ends in."""
        if self.broken or (self.error and self.committed):
            return "FAILED"
        return "COMPENSATED" if self.rolled_back else "COMPLETED"

    @property
    def cancelled(self) -> bool:
        """Tells whether a cancellation was noticed, in time or too late to change anything."""
        return bool(self.loud) or (self.error is not None and self.error.how == "cancelled")

    @property
    def goes_to_the_caller(self) -> str:
        """G8: an order to quit over a failed compensation, over cancellation, over failure."""
        if self.quits:
            return "quit"
        if self.broken:
            return "compensation failed"
        return "cancelled" if self.cancelled else "failure" if self.error else "nothing"


def way_back(step: Step, state: str) -> str | None:
    """G3: how a step in this state is taken back; None where there is nothing to do."""
    if state == "COMPLETED" and step.undo:
        return "undo"
    return "compensate" if state in {"COMPLETED", "UNKNOWN"} and step.compensation else None
