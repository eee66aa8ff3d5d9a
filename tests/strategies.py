"""The one place of Hypothesis strategies: trees, faults planned for them, and runs of both.

All draws are from short lists that are made once, the simplest first: a strategy that is built anew
for each example costs more than the run it is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from hypothesis import strategies as st
from trees import PLACES, Commit, Fault, Par, Part, Plan, Raise, Seq, Step, script, steps_of

__all__ = ["Trial", "safe_trials", "trials"]


@dataclass(frozen=True)
class Trial:
    """One run of a saga, and what is to go wrong in it."""

    tree: Seq
    # At most three faults: in an action, in an action or a way back, in a way back.
    plan: Plan
    # As functions that call their steps on a scope, some of which catch failures; else as data.
    functions: bool
    # How the caller calls: which failures it expects, through a middleware or not, and whether it
    # afterwards takes a run that succeeded back.
    expected: tuple[str, ...]
    watched: bool
    later: bool


# Whether a step has a compensation, an undo, a not_applied. One without any has no effect.
SAFE_WAYS = [
    (True, False, False),
    (True, True, False),
    (True, False, True),
    (False, True, True),
    (False, False, False),
]
WAYS = [*SAFE_WAYS, (False, True, False)]
STYLES = list(product(["async", "async", "shield", "sync", "blocking"], ["run", "own", "keywords"]))
# Whether an action, and a way back, has a time limit; whether each is tried twice.
LIMITS = [(False, False), (True, False), (False, True), (True, True)]
RETRIES = [(False, False), (False, False), (True, False), (False, True), (True, True)]
PACES = list(
    product(
        [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (3, 0, 2)],
        [(0, 0), (1, 0), (0, 1), (2, 1)],
    )
)
# stop, nested: a nested scope has no options.
KINDS_OF_SAGA = [(False, False), (True, False), (False, True)]
KINDS_OF_GROUP = list(product([None, 1, 2, 3], [False, True]))

booleans = st.booleans()
counts = {most: st.integers(1, most) for most in (3, 4)}
ways = {True: st.sampled_from(SAFE_WAYS), False: st.sampled_from(WAYS)}
styles = st.sampled_from(STYLES)
paces = st.sampled_from(PACES)
limits = st.sampled_from(LIMITS)
retries = st.sampled_from(RETRIES)
kinds_of_saga = st.sampled_from(KINDS_OF_SAGA)
kinds_of_group = st.sampled_from(KINDS_OF_GROUP)
part_kinds = st.sampled_from(["step", "step", "group", "group", "saga", "commit", "own", "step"])
member_kinds = st.sampled_from(["step", "step", "step", "saga", "group"])
expectations = st.sampled_from([(), ("fail",), ("fail", "decline")])
fault_counts = st.sampled_from([1, 2, 2, 3, 0])
phases = {
    1: st.just("action"),
    2: st.sampled_from(["action", "back", "back"]),
    3: st.just("back"),
}
choices = st.integers(0, 10_000)

# No deeper than this, and no more steps: beyond, there are only more of the same.
DEPTH = 3
MOST_STEPS = 10


@st.composite
def trials(
    draw: st.DrawFn,
    *,
    functions: bool | None = None,
    groups: bool = True,
    safe: bool = False,
) -> Trial:
    """Draws a tree and what is to go wrong; with `functions` None, as data or as functions.

    With `safe`, each step can be taken back when in doubt or is never in doubt, no compensation
    fails, and there is no commit: then any failure restores the initial state.
    """
    as_functions = draw(booleans) if functions is None else functions
    # In functions with groups, a commit can be passed or not as the loop likes: where a scope was
    # cancelled while a call that failed was taken back, who notices that first?
    commits = not safe and not (as_functions and groups)
    names = (f"step {number}" for number in range(1000))
    steps = 0
    threads = draw(booleans)

    def catch() -> bool:
        return as_functions and draw(booleans)

    def step() -> Step:
        nonlocal steps
        steps += 1
        compensation, undo, not_applied = draw(ways[safe])
        style, arguments = draw(styles)
        if style == "blocking" and not threads:
            style = "async"
        if safe and undo and not compensation and style == "async":
            style = "shield"
        pace, back_pace = draw(paces)
        timeout, back_timeout = draw(limits) if style in {"async", "shield"} else (False, False)
        retry, back_retry = draw(retries)
        can_go_back = compensation or undo
        return Step(
            next(names),
            compensation,
            undo,
            not_applied,
            style,
            arguments,
            (0, 0, 0) if style == "sync" else pace,
            back_pace,
            catch(),
            timeout,
            back_timeout and can_go_back,
            retry and style != "sync",
            back_retry and can_go_back,
        )

    def part(kind: str, depth: int) -> Part:
        if kind == "commit" and commits and not depth:
            return Commit()
        if kind == "own" and as_functions:
            # What a function does by itself: something that it tells to `on_rollback`, or a failure.
            return Step(next(names), style="noted") if draw(booleans) else Raise()
        if kind in {"step", "commit", "own"} or depth == DEPTH or steps >= MOST_STEPS:
            return step()
        inner = parts(depth + 1)
        if kind == "group" and groups:
            return Par(inner, *draw(kinds_of_group), catch())
        return Seq(inner, *draw(kinds_of_saga), catch())

    def parts(depth: int) -> tuple[Part, ...]:
        count = draw(counts[4 if depth == 1 else 3])
        return tuple(part(draw(member_kinds if depth else part_kinds), depth) for _ in range(count))

    # A call whose rollback ran out of time leaves what was not begun to the rollback of those around
    # it; where groups are called by functions, the record does not tell the one from the other.
    limited = not (as_functions and groups) and draw(booleans)
    tree = Seq(parts(0), draw(booleans), rollback_timeout=limited)
    # While a thread is at work, the clock of a test must not jump.
    hang = all(step.style != "blocking" for step in steps_of(tree))
    plan: list[Fault] = []
    for number in range(1, draw(fault_counts) + 1):
        listed = list(steps_of(tree))
        if listed:
            unlucky = listed[draw(choices) % len(listed)]
            faults = list(_faults(unlucky, draw(phases[number]), tree, hang=hang, safe=safe))
            kinds = sorted({(fault.kind, fault.once) for fault in faults})
            if kinds:
                kind = kinds[draw(choices) % len(kinds)]
                faults = [fault for fault in faults if (fault.kind, fault.once) == kind]
                plan.append(faults[draw(choices) % len(faults)])
    return Trial(
        tree,
        tuple(plan),
        as_functions,
        draw(expectations),
        watched=draw(booleans),
        later=draw(booleans),
    )


def _faults(step: Step, phase: str, tree: Seq, *, hang: bool, safe: bool) -> Iterator[Fault]:
    """Gives what can go wrong in one action or its way back."""
    action = phase == "action"
    # What may end otherwise than it should, for good, and in the first of two attempts.
    for_good = not safe or (action and (step.compensation or not step.undo))
    in_passing = (step.retry if action else step.back_retry) and (for_good or not action)
    limited = step.timeout if action else step.back_timeout
    for move in script(step, phase):
        if isinstance(move, int):
            for kind in ("scope", "native", "native twice"):
                yield Fault(step.name, phase, kind, move)
        elif move in PLACES:
            if action and step.not_applied and move == "before":
                yield Fault(step.name, phase, "decline", move)
                if step.retry:
                    yield Fault(step.name, phase, "decline", move, once=True)
            if for_good:
                yield Fault(step.name, phase, "fail", move)
                yield Fault(step.name, phase, "quit", move)
            if in_passing:
                yield Fault(step.name, phase, "fail", move, once=True)
            if hang and limited and for_good:
                yield Fault(step.name, phase, "hang", move)
            if hang and limited and in_passing:
                yield Fault(step.name, phase, "hang", move, once=True)
            if hang and not (safe or action or limited) and tree.rollback_timeout:
                # Only an async one can be cut off.
                yield from [Fault(step.name, phase, "hang", move)] * (step.style in {"async", "shield"})


def safe_trials(*, functions: bool | None = None) -> st.SearchStrategy[Trial]:
    """Draws what the law speaks of."""
    return trials(functions=functions, safe=True)
