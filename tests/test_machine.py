"""A live scope, driven call by call, is at each moment what the model says.

Hypothesis draws what a saga's function does next: a step, a group, a nested scope or an inner saga
that it enters and leaves, a commit, work told to `on_rollback`, a failure of its own. The function
runs in an event loop in another thread, and waits for each of these commands. After each one the
tree of what it has done so far is given to the model, which says the state of each step, and what
is left in the world; at the end it says what goes on to the caller, and what `Outcome.rollback` does.
"""

from __future__ import annotations

import math
import queue
from dataclasses import replace
from functools import partial
from typing import Any

import anyio
import anyio.from_thread
import pytest
from choices import Run
from conftest import WITHOUT_DEBUG
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)
from reading import read
from strategies import Trial, expectations, trials
from test_properties import NAME, PROFILE, World, agrees, check_cells
from trees import CANCELS, Commit, Fault, Part, Seq, Step, inner_parts, steps_of

import pysagas

pytestmark = pytest.mark.timeout({"default": 120, "deep": 0}[NAME])

booleans = st.booleans()


class LiveWorld(World):
    """A world in which a saga without parts asks what to do next, until it is told to return."""

    def __init__(self, trial: Trial, backend: tuple[str, dict[str, Any]]) -> None:
        super().__init__(trial, backend)
        # How many sagas and scopes are open when a command is waited for; None when all is over.
        self.replies: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.scopes: list[pysagas.SagaScope] = []

    async def live(self) -> None:
        send, self.commands = anyio.create_memory_object_stream[Any](math.inf)
        self.send = send.send_nowait
        try:
            with send, self.commands:
                await self._main()
        finally:
            self.replies.put(None)

    async def _next(self) -> Any:
        self.replies.put(len(self.scopes))
        return await self.commands.receive()

    async def _calls(self, scope: pysagas.SagaScope, seq: Seq) -> None:
        if seq.parts:
            await super()._calls(scope, seq)
            return
        self.scopes.append(scope)
        try:
            while (part := await self._next()) is not None:
                with anyio.CancelScope() as around:
                    self.cancel["call"] = around.cancel
                    await super()._calls(scope, Seq((part,)))
        finally:
            self.scopes.pop()

    async def _is_to_be_taken_back(self) -> bool:
        return bool(await self._next())


class Machine(RuleBasedStateMachine):
    """Has done what is drawn, and compares."""

    backend: tuple[str, dict[str, Any]]

    def __init__(self) -> None:
        super().__init__()
        self.stack = anyio.from_thread.start_blocking_portal(*self.backend)
        self.portal = self.stack.__enter__()
        # How many sagas and scopes are open; None where no run is under way.
        self.depth: int | None = None

    # How far a run comes can be the loop's choice, and what is drawn must not depend on that: so
    # each rule can always be drawn, and one that is out of place does nothing.

    @initialize(stop=booleans, expected=expectations, watched=booleans)
    def start(self, stop: bool, expected: tuple[str, ...], watched: bool) -> None:
        trial = Trial(Seq((), stop), (), True, expected, watched, later=False)
        # The outermost saga, and those open in it, the innermost last: each with its parts so far.
        self.open: list[tuple[Seq, list[Part]]] = [(trial.tree, [])]
        self.calls = 0
        self.world = LiveWorld(trial, self.backend)
        self.run = self.portal.start_task_soon(self.world.live)
        self.depth = self.world.replies.get()

    @rule(stop=booleans, expected=expectations, watched=booleans)
    def start_again(self, stop: bool, expected: tuple[str, ...], watched: bool) -> None:
        if self.depth is None:
            self.start(stop, expected, watched)

    # What the function does next.

    @rule(trial=trials(functions=True), called_off=booleans)
    def call(self, trial: Trial, called_off: bool) -> None:
        """Carries out a part; with `called_off`, a cancelled step is cancelled by a scope of its own."""
        if not self.depth:
            return
        self.calls += 1
        part = renamed(trial.tree.parts[0], f"{self.calls}: ")
        names = {step.name for step in steps_of(part)}
        plan = [fault._replace(step=f"{self.calls}: {fault.step}") for fault in trial.plan]
        alone = isinstance(part, Step) and called_off
        self.world.plan += tuple(
            self.adapted(fault, alone=alone) for fault in plan if fault.step in names
        )
        self.do(part)

    def adapted(self, fault: Fault, *, alone: bool) -> Fault:
        """Leaves out what a function would notice while it waits for a command, and what takes time."""
        action = fault.phase == "action"
        native = fault.kind in CANCELS and self.world.backend == "asyncio"
        if action and alone and fault.kind in CANCELS:
            return fault._replace(kind="call")
        if action and fault.kind in CANCELS:
            return fault if native else fault._replace(kind="scope")
        if fault.kind == "hang" or (fault.kind in CANCELS and not (native and fault.kind != "scope")):
            return fault._replace(kind="fail", at="before")
        return fault

    @rule(nested=booleans, catch=booleans, stop=booleans)
    def enter(self, nested: bool, catch: bool, stop: bool) -> None:
        """Opens a nested scope, or an inner saga."""
        if self.depth:
            # A nested scope has no options.
            seq = Seq((), stop and not nested, nested, catch)
            self.open.append((seq, []))
            self.tell(seq)
            self.done()

    @rule()
    def leave(self) -> None:
        """Returns from the innermost scope or saga that is open."""
        if self.depth:
            self.tell(None)
            self.done()

    @rule()
    def commit(self) -> None:
        if self.depth == 1:
            self.do(Commit())

    @rule(later=booleans)
    def end(self, later: bool) -> None:
        """Takes the run that succeeded back, or leaves it."""
        if self.depth == 0:
            self.world.trial = replace(self.world.trial, later=later)
            self.tell(later)
            self.done()

    def teardown(self) -> None:
        try:
            while self.depth is not None:
                self.tell(None)
                self.done()
        finally:
            # Where a comparison failed, something still runs.
            self.portal.call(self.portal.stop, True)
            self.stack.__exit__(None, None, None)

    # What has come of it.

    def tell(self, command: object) -> None:
        self.portal.call(self.world.send, command)

    def do(self, part: Part) -> None:
        self.open[-1][1].append(part)
        self.tell(part)
        self.done()

    def done(self) -> None:
        """Waits for what was begun, and compares."""
        self.depth = self.world.replies.get()
        while len(self.open) > max(self.depth or 0, 1):
            seq, parts = self.open.pop()
            self.open[-1][1].append(replace(seq, parts=tuple(parts)))
        tree: Seq | None = None
        for seq, parts in reversed(self.open):
            tree = replace(seq, parts=(*parts, tree) if tree else tuple(parts))
        assert tree is not None
        world = self.world
        world.trial = replace(world.trial, tree=tree)
        if self.depth is None:
            self.run.result()
            agrees(world)
            return
        make = partial(Run, tree, world.plan, functions=True, later=False)
        model = read(world.events, make, failed=False)
        assert model.error is None, "the function goes on"
        check_cells(world, model)
        for scope in world.scopes[:1]:
            for report in scope._sequence.root.reports():
                # A saga as a function that was not begun is reported too; its steps are unknown.
                known = model.state.get(report.name, "NOT_STARTED")
                assert report.state.name == known


def renamed(part: Part, prefix: str) -> Part:
    """Gives the steps of a part names that no other part has."""
    if isinstance(part, Step):
        return replace(part, name=prefix + part.name)
    inner = tuple(renamed(one, prefix) for one in inner_parts(part))
    return replace(
        part, **({"parts": inner} if isinstance(part, Seq) else {"members": inner} if inner else {})
    )


@pytest.mark.parametrize("backend", WITHOUT_DEBUG)
def test_a_live_scope_is_at_each_moment_what_the_model_says(backend: Any) -> None:
    """G2, G7, G13, G14: after each call, caught or not, states and effects are as the model has them."""
    driven = type("Driven", (Machine,), {"backend": backend})
    settled = settings(PROFILE, max_examples=PROFILE.max_examples // 4 or 1, stateful_step_count=20)
    run_state_machine_as_test(driven, settings=settled)


@pytest.mark.parametrize("backend", WITHOUT_DEBUG)
def test_a_function_goes_on_after_a_call_that_was_cut_off(backend: Any) -> None:
    """G2, G8: a call that is cancelled by a scope of its own, or fails, is taken back; the next one is made."""
    machine = type("Driven", (Machine,), {"backend": backend})()
    machine.start(False, (), False)
    step = Step("a", pace=(1, 0, 0), back_pace=(1, 0), catch=True)
    for phase, kind, at in (
        ("action", "scope", 0),
        ("action", "hang", "before"),
        ("back", "scope", 0),
    ):
        plan = (Fault("a", phase, kind, at),)
        trial = Trial(Seq((step,)), plan, True, (), False, later=False)
        machine.call(trial, called_off=True)
    states = {report.state.name for report in machine.world.scopes[0]._sequence.root.reports()}
    machine.teardown()

    assert {"COMPENSATED", "COMPLETED"} == states
