"""Every fault, at every place: run the saga once to learn its places, then once for each fault."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from inspect import isawaitable
from typing import Any, cast

import anyio

from pysagas import Saga

from ._faults import (
    CannotExplore,
    Event,
    Fault,
    FaultKind,
    MakeTrial,
    Place,
    Plan,
    Trial,
    possible_faults,
)
from ._progress import progress_on
from ._report import Report, Result
from ._run import TrialRun, native_cancel
from ._verdict import UNKNOWN, all_differences, judge, same
from ._watched import watched

__all__ = ["Exploration", "Only", "explore", "faults"]

Only = Callable[[Fault], bool]


async def explore(
    trial: MakeTrial,
    faults: Iterable[Plan | Fault] | None = None,
    *,
    pairs: bool = False,
    kills: bool = False,
    only: Only | None = None,
    progress: bool | None = None,
) -> Report:
    """Tries every fault at every place of a saga, and checks that everything is taken back.

    The saga is run a few times without a fault, to learn its places; then once for each fault. A
    run that gets through its fault is made to fail at its end, or at its next commit: so each one
    ends in a rollback, after which the state must be the initial one; or, past a commit, what it
    was at the commit. What runs twice must leave what it leaves when it runs once. Where a
    compensation is made to fail, exactly that must have been reported. And the fault that happened
    must be the one that was planned, at the place where it was planned.

    Works on the loop it is called on. In a test that is not async: ``anyio.run(explore, trial)``.

    Args:
        trial: Called anew for each run, for a fresh world each time. A function, or an async one,
            or one that gives an async context manager of the trial, to close what it opened.
        faults: What to try; by default everything.
        pairs: Tries each of them with every fault that can still follow it, too.
        kills: Lets the process be killed, too: before and after each effect, and at each
            checkpoint. It is acted, with a journal in memory: the run is recovered, and everything
            has to be taken back. For sagas that you give to `pysagas.durable`.
        only: Leaves out the faults for which it returns something false.
        progress: Whether to show how far it has come, on standard error, where it takes longer than
            a second. None: if that is a terminal.

    Returns:
        The report: ``assert report.ok, report``.

    Raises:
        CannotExplore: The saga fails without a fault, has no steps, or goes another way each time;
            or the state cannot be copied or compared, or does not see what the saga does.
        BaseException: What `trial` itself raises, or its `state`. A cancellation of this call lets
            the run that is under way take everything back, and goes on.
    """
    exploration = Exploration(trial, kills=kills)
    await exploration.learn()
    plans = exploration.plans(only) if faults is None else list(map(exploration.plan_of, faults))
    results: list[Result] = []
    with progress_on(exploration.saga, progress) as step:
        for number, plan in enumerate(plans):
            run = await exploration.run(plan)
            result = exploration.judge(run)
            results.append(result)
            step(len(results), len(plans) if not pairs else None)
            if not pairs or not plan.faults:
                continue
            for second in exploration.following(run, only):
                results.append(exploration.judge(await exploration.run(second)))
                step(len(results), len(results) * len(plans) // (number + 1))
    return Report(exploration.saga, tuple(results), exploration.notes)


def faults(
    trial: MakeTrial,
    *,
    kills: bool = False,
    only: Only | None = None,
    backend: str = "asyncio",
    backend_options: Mapping[str, Any] | None = None,
) -> list[Plan]:
    """Gives all that `explore` would try, for ``pytest.mark.parametrize``.

    Each has a readable id, ``charge_card: cancelled at checkpoint 2``, and goes to `explore`:
    ``report = await explore(trial, [fault])``.

    Args:
        trial: As for `explore`.
        kills: As for `explore`.
        only: As for `explore`.
        backend: Where the saga is run to learn its places: the loop on which the tests will run,
            since one may wait where another does not.
        backend_options: As for ``anyio.run``.

    Raises:
        CannotExplore: As for `explore`.
    """

    async def learn() -> list[Plan]:
        exploration = Exploration(trial, kills=kills)
        await exploration.learn()
        return exploration.plans(only)

    return anyio.run(learn, backend=backend, backend_options=dict(backend_options or {}))


class Exploration:
    """Learns the places of a trial's saga, runs plans, and judges what came of them."""

    def __init__(self, trial: MakeTrial, *, kills: bool = False) -> None:
        if not callable(trial):  # pyright: ignore[reportUnnecessaryComparison]
            raise TypeError(
                f"explore: trial must be a function that makes a Trial, not {trial!r}: it is called "
                "for each run, so that each has a world of its own"
            )
        self.saga = ""
        self.notes: tuple[str, ...] = ()
        self._make = trial
        self._native = False
        self._kills = kills
        # A run without a fault for each commit that it may pass, and the state in which it came to
        # its end, if that is the same each time.
        self._clean: list[TrialRun] = []
        self._at_end: list[object] = []
        self._shown: dict[Place, Place] = {}
        self._rebuilt: tuple[Saga[..., Any], Saga[..., Any]] | None = None

    @asynccontextmanager
    async def _open(self) -> AsyncGenerator[Trial]:
        made: Any = self._make()
        if isinstance(made, AbstractAsyncContextManager):
            async with cast("AbstractAsyncContextManager[object]", made) as trial:
                yield _checked(trial)
        else:
            yield _checked(await made if isawaitable(made) else made)

    async def run(self, plan: Plan) -> TrialRun:
        """Runs the saga once, in a new world."""
        async with self._open() as trial:
            if self._rebuilt is None or self._rebuilt[0] is not trial.saga:
                self._rebuilt = (trial.saga, watched(trial.saga))
            run = TrialRun(trial, self._rebuilt[1], plan)
            await run.go()
            return run

    async def learn(self) -> None:
        """Runs the saga without faults, as often as that takes."""
        self._native = native_cancel() is not None
        await self._check_state()
        while True:
            plan = Plan(commits=len(self._clean))
            run, again = await self.run(plan), await self.run(plan)
            self.saga = run.saga.name
            self._compare(run, again)
            self._clean.append(run)
            if not run.at_commit:
                break
        if not any(place.kind == "action" for run in self._clean for _, place, _ in run.events):
            raise CannotExplore(f"saga {self.saga!r} has no steps, so there is nothing to go wrong")
        if all(same(run.before, run.at_end) for run in self._clean):
            raise CannotExplore(
                f"the trial's state is the same before saga {self.saga!r} and after its steps, so it "
                "would look restored whatever happened; let it return what the saga changes"
            )
        self._name_places()

    async def _check_state(self) -> None:
        async with self._open() as trial:
            looks = TrialRun(trial, trial.saga, Plan())
            one, other = await looks.snapshot(), await looks.snapshot()
            if not same(one, other):
                raise CannotExplore(
                    "the trial's state differs from itself though nothing has run in between: "
                    f"{_first_difference(one, other)}; let it return values that are compared by ==, and leave "
                    "out clocks and counters"
                )

    def _compare(self, run: TrialRun, again: TrialRun) -> None:
        """Refuses what fails by itself, or goes another way each time."""
        for one in (run, again):
            if one.ended is None:
                raise CannotExplore(
                    f"saga {self.saga!r} fails without any fault: {one.error!r}"
                ) from one.error
        entered, other = ({place for _, place, _ in one.events} for one in (run, again))
        if entered != other:
            only = ", ".join(f"{place} at {place.path}" for place in sorted(entered ^ other, key=str))
            raise CannotExplore(
                f"saga {self.saga!r} goes another way each time, so its faults cannot be planned; only "
                f"one of two runs without a fault came to: {only}"
            )
        # How often something waits may depend on more than the saga: what both did is certain.
        certain = set(again.events)
        run.events = [event for event in run.events if event in certain]
        self._at_end.append(run.at_end if same(run.at_end, again.at_end) else UNKNOWN)
        if self._at_end[-1] is UNKNOWN:
            note = (
                "Not checked: whether what runs twice leaves what it leaves when it runs once, since "
                f"two runs without a fault ended differently: {_first_difference(run.at_end, again.at_end)}"
            )
            self.notes = (note,)

    def _name_places(self) -> None:
        places = {place for run in self._clean for _, place, _ in run.events}
        for place in places:
            alike = {other.path for other in places if other.name == place.name}
            where = f" at {'.'.join(map(str, place.path))}" if len(alike) > 1 else ""
            self._shown[place] = replace(place, shown=place.name + where)

    def _possible(self, events: Iterable[Event], only: Only | None) -> list[Fault]:
        known: list[Event] = [
            (event, self._shown.get(place, place), number) for event, place, number in events
        ]
        found = possible_faults(known, native=self._native, kills=self._kills)
        return [fault for fault in found if only is None or only(fault)]

    def plan_of(self, given: Plan | Fault) -> Plan:
        """Gives the plan of a single fault; a plan as it is."""
        if isinstance(given, Fault):
            return Plan((given,), self._found(None).get(given, 0))
        if isinstance(given, Plan):  # pyright: ignore[reportUnnecessaryIsInstance]
            return given
        raise TypeError(f"explore: faults must hold what faults() gives, not {given!r}")

    def _found(self, only: Only | None) -> dict[Fault, int]:
        """Gives each fault that is possible, with the number of commits before it."""
        found: dict[Fault, int] = {}
        for commits, run in enumerate(self._clean):
            for fault in self._possible(run.events, only):
                found.setdefault(fault, commits)
        return found

    def plans(self, only: Only | None) -> list[Plan]:
        """Gives a plan for each fault: in the order of places, first of actions, then back."""
        found = self._found(only)
        order = list(FaultKind)
        ordered = sorted(
            found,
            key=lambda fault: (
                fault.place.kind,
                fault.place.path,
                fault.checkpoint or 0,
                order.index(fault.kind),
            ),
        )
        return [
            *(Plan(commits=commits) for commits in range(len(self._clean))),
            *(Plan((fault,), found[fault]) for fault in ordered),
        ]

    def following(self, run: TrialRun, only: Only | None) -> list[Plan]:
        """Gives the plans of a run with one more fault, which it can still come to."""
        plan = run.plan
        later = self._possible(run.events[run.last_fault :], only)
        return [
            replace(plan, faults=(*plan.faults, fault)) for fault in later if fault not in plan.faults
        ]

    def judge(self, run: TrialRun) -> Result:
        """Says whether everything is as it should be after a run."""
        commits = run.plan.commits
        return judge(run, self._at_end[commits] if commits < len(self._at_end) else UNKNOWN)


def _checked(trial: object) -> Trial:
    if not isinstance(trial, Trial):
        raise TypeError(f"explore: trial must return a Trial, not {trial!r}")
    return trial


def _first_difference(one: object, other: object) -> str:
    return next(iter(all_differences(one, other)))
