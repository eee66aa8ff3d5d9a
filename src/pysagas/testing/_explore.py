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
from ._limit import LIMIT, Limit
from ._process import native_cancel
from ._progress import progress_on
from ._report import Report, Result
from ._run import TrialRun
from ._verdict import UNKNOWN, all_differences, judge, same, suspecting
from ._watched import watched

__all__ = ["Exploration", "Only", "explore", "faults"]

Only = Callable[[Fault], bool]


async def explore(
    trial: MakeTrial,
    faults: Iterable[Plan | Fault] | Plan | Fault | None = None,
    *,
    pairs: bool = False,
    kills: bool = False,
    only: Only | None = None,
    progress: bool | None = None,
    timeout: float = LIMIT,
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
        faults: What to try, one or several; by default everything.
        pairs: Tries each of them with every fault that can still follow it, too.
        kills: Lets the process be killed, too: before and after each effect, and at each
            checkpoint. It is acted, with a journal in memory: the run is recovered, and everything
            has to be taken back. For sagas that you give to `pysagas.durable`.
        only: Leaves out the faults for which it returns something false.
        progress: Whether to show how far it has come, on standard error, where it takes longer than
            a second. None: if that is a terminal.
        timeout: Seconds that one run may take, in real time. What still waits then is cut off, and
            is named as what is wrong with that run. (Only what waits: a sync function that does not
            return cannot be ended.)

    Returns:
        The report, for ``assert report.ok, report``.

    Raises:
        CannotExplore: The saga fails without a fault, has no steps, or goes another way each time;
            the state cannot be copied or compared, does not see what the saga does, or is shared
            between trials; or `only` leaves out everything.
        BaseException: What `trial` itself raises, or its `state`. A cancellation of this call lets
            the run that is under way take everything back, and goes on.
    """
    exploration = Exploration(trial, kills=kills, only=only, timeout=timeout)
    given = [faults] if isinstance(faults, Plan | Fault) else faults
    with exploration.limit:
        await exploration.learn()
        plans = exploration.plans() if given is None else list(map(exploration.plan_of, given))
        results: list[Result] = []
        with progress_on(exploration.saga, progress) as step:
            for number, plan in enumerate(plans):
                run = await exploration.run(plan)
                results.append(await exploration.located(exploration.judge(run)))
                step(len(results), len(plans) if not pairs else None)
                if not pairs or not plan.faults:
                    continue
                for second in exploration.following(run):
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
    timeout: float = LIMIT,
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
        timeout: As for `explore`.

    Raises:
        CannotExplore: As for `explore`.
    """
    exploration = Exploration(trial, kills=kills, only=only, timeout=timeout)
    check_no_loop("faults")

    async def learn() -> list[Plan]:
        with exploration.limit:
            await exploration.learn()
        return exploration.plans()

    return anyio.run(learn, backend=backend, backend_options=options_of(backend_options))


class Exploration:
    """Learns the places of a trial's saga, runs plans, and judges what came of them."""

    def __init__(
        self,
        trial: MakeTrial,
        *,
        kills: bool = False,
        only: Only | None = None,
        timeout: float = LIMIT,
    ) -> None:
        given: object = trial
        # A saga can be called, too: that would run it.
        if isinstance(given, Saga) or not callable(given):
            raise TypeError(
                f"explore: trial must be a function that makes a Trial, not {given!r}: it is called "
                "for each run, so that each has a world of its own; write def trial(): ... "
                "return Trial(saga, state=...), and explore(trial)"
            )
        chosen: object = only
        if chosen is not None and not callable(chosen):
            raise TypeError(
                f"explore: only must be a function of a Fault, not {chosen!r}; write "
                f"only=lambda fault: fault.place.name == {chosen!r}"
            )
        self.limit = Limit(timeout)
        self.saga = ""
        self.notes: tuple[str, ...] = ()
        self._make = trial
        self._only = only
        # The state in which each trial has to begin.
        self._first: list[object] = []
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

    async def run(self, plan: Plan, *, look: bool = False) -> TrialRun:
        """Runs the saga once, in a new world; to look at the state on its way costs more."""
        async with self._open() as trial:
            if self._rebuilt is None or self._rebuilt[0] is not trial.saga:
                self._rebuilt = (trial.saga, watched(trial.saga))
            run = TrialRun(trial, self._rebuilt[1], plan, limit=self.limit, look=look)
            await run.go(self._check_beginning)
            return run

    def _check_beginning(self, state: object) -> None:
        """Refuses a trial in which something is left of another one: no saga is to blame for that."""
        self._first = self._first or [state]
        if not same(self._first[0], state):
            raise CannotExplore(
                "trials begin in different states: is something shared between them? "
                f"{_first_difference(self._first[0], state)}; let each call of the trial's function "
                "make its own world, and its state leave out random ids"
            )

    async def learn(self) -> None:
        """Runs the saga without faults, as often as that takes."""
        self._native = native_cancel() is not None
        await self._check_state()
        while True:
            plan = Plan(commits=len(self._clean))
            run = await self._run_clean(plan)
            self._compare(run, await self._run_clean(plan))
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
            self._first = [one]
            if same(one, other):
                return
            if type(one) is not object and type(one).__eq__ is object.__eq__:
                raise CannotExplore(
                    f"the trial's state is {one!r}, whose class has no __eq__: so it would never look "
                    "restored; let it return vars(...) of that, or plain values"
                )
            raise CannotExplore(
                "the trial's state differs from itself though nothing has run in between: "
                f"{_first_difference(one, other)}; let it return values that are compared by ==, and leave "
                "out clocks and counters"
            )

    async def _run_clean(self, plan: Plan) -> TrialRun:
        """Runs the saga without a fault, and refuses what goes wrong by itself."""
        run = await self.run(plan)
        self.saga = run.saga.name
        if run.overdue is not None:
            raise CannotExplore(f"saga {self.saga!r} does not end without any fault: {run.overdue}")
        if isinstance(run.error, CannotExplore):
            raise run.error
        if run.ended is None:
            raise CannotExplore(
                f"saga {self.saga!r} fails without any fault: {run.error!r}"
            ) from run.error
        return run

    def _compare(self, run: TrialRun, again: TrialRun) -> None:
        """Refuses what goes another way each time."""
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
            given = Plan((given,), self._found(None).get(given, 0))
        if not isinstance(given, Plan):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"explore: faults must hold what faults() gives, not {given!r}")
        natively = [fault for fault in given.faults if fault.kind is FaultKind.CANCELLED_NATIVELY]
        if natively and not self._native:
            raise CannotExplore(
                f"{natively[0]}: there is no such thing on this loop; make the list for it: "
                'faults(trial, backend="trio")'
            )
        return given

    def _found(self, only: Only | None) -> dict[Fault, int]:
        """Gives each fault that is possible, with the number of commits before it."""
        found: dict[Fault, int] = {}
        for commits, run in enumerate(self._clean):
            for fault in self._possible(run.events, only):
                found.setdefault(fault, commits)
        return found

    def plans(self) -> list[Plan]:
        """Gives a plan for each fault: in the order of places, first of actions, then back."""
        found = self._found(self._only)
        if not found:
            raise CannotExplore(
                f"only={self._only!r} leaves out every fault, so nothing would be tried"
            )
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

    def following(self, run: TrialRun) -> list[Plan]:
        """Gives the plans of a run with one more fault, which it can still come to."""
        plan = run.plan
        later = self._possible(run.events[run.last_fault :], self._only)
        return [
            replace(plan, faults=(*plan.faults, fault)) for fault in later if fault not in plan.faults
        ]

    def judge(self, run: TrialRun) -> Result:
        """Says whether everything is as it should be after a run."""
        commits = run.plan.commits
        return judge(run, self._at_end[commits] if commits < len(self._at_end) else UNKNOWN)

    async def located(self, result: Result) -> Result:
        """Names who is to blame where nothing went wrong, and something is left all the same."""
        if result.plan.faults or not result.left or result.suspected:
            return result
        return suspecting(result, await self.run(result.plan, look=True))


def check_no_loop(name: str) -> None:
    """Refuses to start an event loop inside of one."""
    try:
        anyio.get_current_task()
    except RuntimeError:
        return
    raise RuntimeError(
        f"{name}: this runs the saga in an event loop of its own, and one is running here already; call "
        "it outside of async functions, or write `await explore(trial)`"
    )


def options_of(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Gives options as ``anyio.run`` wants them; a dict as it is, since it may be more than that."""
    return given if isinstance(given, dict) else dict(given or {})


def _checked(trial: object) -> Trial:
    if not isinstance(trial, Trial):
        raise TypeError(f"explore: trial must return a Trial, not {trial!r}")
    return trial


def _first_difference(one: object, other: object) -> str:
    return next(iter(all_differences(one, other)))
