"""What is replayed: killed at any boundary, and killed again there, a run ends as it should (D3, D4)."""

from __future__ import annotations

import asyncio
import os
import re
import types
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import pytest
from anyio import CancelScope, create_task_group, fail_after, move_on_after
from anyio.lowlevel import checkpoint
from conftest import ASYNCIO, BACKENDS, WITHOUT_DEBUG
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mortal import Boom, Killed, MortalJournal, Shop, problems_of

from pysagas import (
    Commit,
    CompensationFailed,
    Effect,
    Outcome,
    Parallel,
    Saga,
    SagaScope,
    SagaState,
    Step,
    StepState,
    current_effect,
    saga,
)
from pysagas.durable import (
    Event,
    EventKind,
    Interrupted,
    MemoryJournal,
    NotRecordable,
    RecordedError,
    RecoveryReport,
    RunInterrupted,
    RunState,
    SagaChanged,
)
from pysagas.durable._codec import JSONCodec
from pysagas.durable._middleware import RunMiddleware
from pysagas.durable._replay import Replay

DEEP = os.environ.get("PYSAGAS_PROFILE") == "deep"
# Of two deaths in a row, of which we take each how many-th first and second; in a deep test, all.
EVERY = 1 if DEEP else 8
ENOUGH = 30  # seconds, within which what hangs is found to hang

Build = Callable[[Shop], Saga[..., Any]]


# --- shapes -------------------------------------------------------------------------------------


def sequence(shop: Shop) -> Saga[..., Any]:
    return Saga([shop.step("a"), shop.step("b", undo=True), shop.step("c")], name="s")


def failing_sequence(shop: Shop) -> Saga[..., Any]:
    parts = [shop.step("a"), shop.step("b", undo=True), shop.step("c", fails=Boom("c"))]
    return Saga(parts, name="s")


def inner_sagas(shop: Shop) -> Saga[..., Any]:
    inner = Saga([shop.step("b"), Saga([shop.step("c")])])
    return Saga([shop.step("a"), inner, shop.step("d", fails=Boom("d"))], name="s")


def group_with_limit(shop: Shop) -> Saga[..., Any]:
    members = [
        shop.step("b", (4, 1)),
        Saga([shop.step("c"), shop.step("d", undo=True)]),
        shop.step("e", (0, 3), shield=True),
    ]
    return Saga([shop.step("a"), Parallel(*members, limit=2), shop.step("f")], name="s")


def one_behind(shop: Shop) -> Saga[..., Any]:
    """One branch in doubt, and another that is two steps ahead."""
    ahead = Saga([shop.step("b"), shop.step("c"), shop.step("d"), shop.step("e")])
    return Saga([Parallel(shop.step("a", (14, 1)), ahead), shop.step("f")], name="s")


def failing_group(shop: Shop, on_failure: Any = "cancel") -> Saga[..., Any]:
    members = [
        shop.step("b", (9, 9)),
        Saga([shop.step("c"), shop.step("d", fails=Boom("d"))]),
        shop.step("e", (0, 5), shield=True),
    ]
    return Saga([shop.step("a"), Parallel(*members, on_failure=on_failure)], name="s")


def failing_group_that_finishes(shop: Shop) -> Saga[..., Any]:
    return failing_group(shop, "finish")


def group_in_a_group(shop: Shop) -> Saga[..., Any]:
    inner = Parallel(shop.step("b"), shop.step("c", (3, 0)), name="inner")
    outer = Parallel(Saga([inner, shop.step("d")]), shop.step("e", (2, 2)), name="outer")
    return Saga([outer, shop.step("f", fails=Boom("f"))], name="s")


def failing_before_others_begin(shop: Shop) -> Saga[..., Any]:
    """A member fails so soon that in a replay, which is faster, the others would not begin."""
    fails = [shop.step(name, (0, 0), fails=Boom(name)) for name in "bc"]
    late = Parallel(shop.step("d", (0, 0)), Parallel(shop.step("e", (0, 0))))
    return Saga([shop.step("a", (0, 0)), Parallel(*fails, late)], name="s")


def passing_commit(shop: Shop) -> Saga[..., Any]:
    return Saga([shop.step("a"), Commit(), shop.step("b"), shop.step("c")], name="s")


def failing_past_commit(shop: Shop) -> Saga[..., Any]:
    parts = [shop.step("a"), Commit(), shop.step("b"), shop.step("c", fails=Boom("c"))]
    return Saga(parts, name="s")


def function(shop: Shop, *, fails: bool = False) -> Saga[..., Any]:
    """A loop, an if, a failure that is caught, a nested scope."""

    @saga(name="s")
    async def whole(scope: SagaScope) -> str:
        for turn in range(2):
            result = await scope.step(shop.step(f"turn {turn}", undo=True))
        if result == "result of turn 1":  # pragma: no branch - a replay must come by here as well
            try:
                await scope.step(shop.step("refused", fails=Boom("refused")))
            except Boom:
                scope.on_rollback(shop.take, "noted")
        try:
            async with scope.nested() as nested:
                await nested.step(shop.step("extra"))
                await nested.step(shop.step("too much", fails=Boom("too much")))
        except Boom:
            await scope.step(shop.step("instead", fails=Boom("instead") if fails else None))
        return "value"

    return whole


def failing_function(shop: Shop) -> Saga[..., Any]:
    return function(shop, fails=True)


def branches(shop: Shop, *, fails: bool = False) -> Saga[..., Any]:
    """Members that are functions, one of which takes another way than it began."""

    @saga
    async def detour(scope: SagaScope, number: int) -> int:
        try:
            async with scope.nested() as nested:
                await nested.step(shop.step("nested"))
                await nested.step(shop.step("caught", fails=Boom("caught")))
        except Boom:
            await scope.step(shop.step("instead"))
        return number

    @saga
    async def straight(scope: SagaScope) -> None:
        await scope.step(shop.step("straight", (6, 1)))

    @saga(name="s")
    async def whole(scope: SagaScope) -> str:
        results = await scope.parallel(detour.bind(1), straight.bind(), shop.step("member").bind())
        assert results == (1, None, "result of member")
        await scope.step(shop.step("last", fails=Boom("last") if fails else None))
        return "value"

    return whole


def failing_branches(shop: Shop) -> Saga[..., Any]:
    return branches(shop, fails=True)


def committing_function(shop: Shop) -> Saga[..., Any]:
    @saga(name="s")
    async def whole(scope: SagaScope) -> None:
        await scope.step(shop.step("a"))
        await scope.commit()
        for name in "bc":
            try:
                await scope.step(shop.step(name, fails=Boom(name) if name == "b" else None))
            except Boom:
                await scope.step(shop.step("d"))

    return whole


def with_time_limit(shop: Shop) -> Saga[..., Any]:
    """A time limit of the function's own cuts a step off, and it goes another way."""

    @saga(name="s")
    async def whole(scope: SagaScope) -> None:
        await scope.step(shop.step("a"))
        with move_on_after(0):
            await scope.step(shop.step("too slow"))
        await scope.step(shop.step("b"))

    return whole


def member_that_takes_itself_back(shop: Shop) -> Saga[..., Any]:
    """While one member takes itself back another ends well, and the third must not take its place."""

    @saga
    async def failing(scope: SagaScope) -> None:
        await scope.step(shop.step("b", fails=Boom("b")))

    @saga(name="s")
    async def whole(scope: SagaScope) -> None:
        members = [shop.step("a", (9, 0)).bind(), failing.bind(), shop.step("never").bind()]
        try:
            await scope.parallel(*members, limit=2, on_failure="finish")
        except ExceptionGroup:
            await scope.step(shop.step("c"))

    return whole


def caught_group(shop: Shop) -> Saga[..., Any]:
    """A member fails, the others are cancelled, and the function goes on."""

    @saga(name="s")
    async def whole(scope: SagaScope) -> None:
        async with scope.nested() as nested:
            await nested.step(shop.step("a"))
            late = [shop.step(name, (9, 9)) for name in "bc"]
            fails = shop.step("d", fails=Boom("d"))
            with suppress(ExceptionGroup):
                await nested.parallel(late[0].bind(), fails.bind(), late[1].bind())
        await scope.step(shop.step("e"))

    return whole


def caught_as_a_sibling_fails(shop: Shop) -> Saga[..., Any]:
    """A function catches its group's failure at the moment at which a sibling of the function fails."""
    broken = anyio.Event()

    async def tells(effect: Any, call_next: Any) -> object:
        try:
            return await call_next()
        finally:
            if effect.kind == "group":
                broken.set()

    async def waits(effect: Any, call_next: Any) -> object:
        result = await call_next()
        if effect.kind == "action" and not shop.journal.dead:
            await broken.wait()
            raise Boom("sibling")
        return result

    @saga(middleware=[tells])
    async def catches(scope: SagaScope) -> None:
        members = [shop.step("a").bind(), shop.step("b", fails=Boom("b")).bind()]
        with suppress(ExceptionGroup):
            await scope.parallel(*members, on_failure="finish")

    sibling = Saga([shop.step("c")], middleware=[waits])
    return Saga([Parallel(sibling, catches)], name="s")


def cut_off_before_its_first_effect(shop: Shop) -> Saga[..., Any]:
    """Of a member that was cancelled before it did anything nothing is recorded but that it left."""

    @saga
    async def idle(scope: SagaScope) -> None:
        await anyio.Event().wait()

    @saga(name="s")
    async def whole(scope: SagaScope) -> None:
        with suppress(ExceptionGroup):
            await scope.parallel(shop.step("a", fails=Boom("a")).bind(), idle.bind())
        await scope.step(shop.step("b"))

    return whole


SHAPES: list[Build] = [
    cut_off_before_its_first_effect,
    member_that_takes_itself_back,
    caught_group,
    caught_as_a_sibling_fails,
    sequence,
    failing_sequence,
    inner_sagas,
    group_with_limit,
    one_behind,
    failing_group,
    failing_group_that_finishes,
    group_in_a_group,
    failing_before_others_begin,
    passing_commit,
    failing_past_commit,
    function,
    failing_function,
    branches,
    failing_branches,
    committing_function,
    with_time_limit,
]


# --- lives and deaths -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Death:
    """When a process dies, and whether it loses what it did not wait for; never, for None."""

    at: int | None = None
    loses: bool = False


async def first_life(shop: Shop, whole: Saga[..., Any]) -> None:
    """The process in which the run starts."""
    try:
        await shop.journal.run(whole, run_id="r", exceptions=Exception)
    except (CompensationFailed, Boom, Killed, BaseExceptionGroup):
        pass  # where it died, what comes out is of no interest; and a failure past the commit is raised


async def recover(shop: Shop, whole: Saga[..., Any], on_crash: Any) -> RecoveryReport:
    """A process that recovers; where it dies of that, its report is of no interest."""
    return await shop.journal.recover([whole], on_crash=on_crash)


async def lived(build: Build, deaths: tuple[Death, ...], on_crash: Any, prepare: Any) -> Shop:
    """One process after the other, each killed as told, and one that is let live."""
    shop = Shop()
    whole = build(shop)
    first, *later = deaths
    with fail_after(ENOUGH):
        shop.journal.dies_at, shop.journal.loses = first.at, first.loses
        await prepare(shop, whole)
        for death in later:
            shop.journal = shop.journal.next_process(death.at, loses=death.loses)
            await recover(shop, whole, on_crash)
        if not shop.journal.dead and not later:
            return shop
        last = shop.journal
        shop.journal = last.next_process()
        report = await recover(shop, whole, on_crash)
    assert (report.left, report.in_progress) == ((), ())
    shop.journal.at_stake = last.at_stake
    shop.journal.dead = last.dead
    return shop


async def state_of(shop: Shop) -> RunState:
    (info,) = await shop.journal.runs()
    return info.state


async def check(shop: Shop, clean: Shop, note: str) -> None:
    """Either all is as it was before the run; or the run has ended as it does undisturbed."""
    state = await state_of(shop)
    expected = set() if state is RunState.COMPENSATED else clean.there
    states = {RunState.COMPENSATED, await state_of(clean)}
    events = [(event.kind.value, event.path, event.name) for event in shop.journal.events()]
    found = (shop.there, state in states, problems_of(shop, shop.journal.events()))
    assert found == (expected, True, []), (note, state, shop.log, events)


async def deaths_of(build: Build, on_crash: Any, prepare: Any, before: tuple[Death, ...], check: Any):
    """Kills one more process at each of its boundaries, with and without what it did not wait for.

    Yields each death of which there is another process to be killed.
    """
    every = EVERY if before else 1
    at = before[0].at % every if before else 0
    while True:
        death = Death(at)
        shop = await lived(build, (*before, death), on_crash, prepare)
        if not shop.journal.dead:
            return
        await check(shop, (*before, death))
        yield death
        if shop.journal.at_stake:
            death = Death(at, loses=True)
            await check(await lived(build, (*before, death), on_crash, prepare), (*before, death))
            yield death
        at += every


def checked_against(clean: Shop, build: Build, on_crash: str) -> Any:
    async def checked(shop: Shop, deaths: tuple[Death, ...]) -> None:
        await check(shop, clean, f"{build.__name__}, {on_crash}, {deaths}")

    return checked


@pytest.mark.anyio
@pytest.mark.parametrize("on_crash", ["rollback", "resume"])
@pytest.mark.parametrize("build", SHAPES, ids=lambda build: build.__name__)
@pytest.mark.parametrize("anyio_backend", WITHOUT_DEBUG, indirect=True)
async def test_d3_killed_at_any_boundary(build, on_crash):
    """Wherever a process dies, the next one leaves all as it was before, or completes it (D3)."""
    clean = await lived(build, (Death(),), on_crash, first_life)
    checked = checked_against(clean, build, on_crash)
    deaths = [death async for death in deaths_of(build, on_crash, first_life, (), checked)]

    assert len(deaths) >= clean.journal.passed > 9


# The two loops share the first deaths: what is recorded is much the same on all of them.
@pytest.mark.anyio
@pytest.mark.parametrize(
    ("anyio_backend", "parity"),
    [
        pytest.param(*BACKENDS[2].values, 0, id="uvloop"),
        pytest.param(*BACKENDS[1].values, 1, id="trio"),
    ],
    indirect=["anyio_backend"],
)
@pytest.mark.parametrize("on_crash", ["rollback", "resume"])
@pytest.mark.parametrize("build", SHAPES, ids=lambda build: build.__name__)
async def test_d3_killed_at_any_boundary_and_again_at_any_of_the_recovery(build, on_crash, parity):
    """Where the process that recovers dies in its turn, wherever, the one after it does the same (D3)."""
    clean = await lived(build, (Death(),), on_crash, first_life)
    checked = checked_against(clean, build, on_crash)
    count = 0
    for at in range(parity * EVERY, clean.journal.passed, 2 * EVERY):
        async for _ in deaths_of(build, on_crash, first_life, (Death(at),), checked):
            count += 1

    assert count


def test_what_a_journal_and_a_shop_say_against_each_other_is_found():
    """The judge of the tests of this file finds what it is for."""
    shop = Shop()
    shop.begun["a"], shop.there, shop.keys = 3, {"a"}, {"a": {"1", "2"}}
    kinds = [EventKind.STARTED, EventKind.DONE, EventKind.STARTED, *2 * [EventKind.COMPENSATED]]

    assert [
        "a was taken back 2 times",
        "a began again, though its end was recorded",
        "a began 3 times, and 2 beginnings were recorded",
        "a has several keys",
        "a was taken back, and stands",
    ] == problems_of(shop, [Event(kind, (0,), "a") for kind in kinds])


# --- taken back later, tried again ----------------------------------------------------------------


async def life_with_a_later_rollback(shop: Shop, whole: Saga[..., Any]) -> None:
    """The process in which a run completes, and is taken back after that."""
    try:
        outcome = await shop.journal.run(whole, run_id="r")
        await outcome.rollback()
    except (Killed, CompensationFailed, BaseExceptionGroup):
        pass


@pytest.mark.anyio
@pytest.mark.parametrize("on_crash", ["rollback", "resume"])
@pytest.mark.parametrize(
    "build", [sequence, group_with_limit, function, branches], ids=lambda build: build.__name__
)
@pytest.mark.parametrize("anyio_backend", WITHOUT_DEBUG, indirect=True)
async def test_d3_killed_at_any_boundary_of_a_later_rollback(build, on_crash):
    """A process that dies while a completed run is taken back leaves the rest to the next one (D3)."""
    clean = await lived(build, (Death(),), on_crash, first_life)
    checked = checked_against(clean, build, on_crash)
    again = []

    async def checked_again(shop: Shop, deaths: tuple[Death, ...]) -> None:
        await checked(shop, deaths)
        again.append(await state_of(shop))

    prepare = life_with_a_later_rollback
    first = [death async for death in deaths_of(build, on_crash, prepare, (), checked_again)]
    # Once its rollback has begun, a run is not resumed.
    assert ({*again}, again[-1]) == ({RunState.COMPLETED, RunState.COMPENSATED}, RunState.COMPENSATED)
    twice = [
        one
        for death in first[clean.journal.passed :: EVERY]
        async for one in deaths_of(build, on_crash, prepare, (death,), checked)
    ]
    assert twice


class Stuck:
    """Compensations that fail until that is mended."""

    def __init__(self, build: Callable[[Shop, Callable[[], bool]], Saga[..., Any]]) -> None:
        self.build = build
        self.__name__ = build.__name__

    def __call__(self, shop: Shop) -> Saga[..., Any]:
        self.broken = True
        self.whole = self.build(shop, lambda: self.broken)
        return self.whole

    async def life(self, shop: Shop, whole: Saga[..., Any]) -> None:
        """The process in which a run fails for good, and is tried again when that is mended."""
        await first_life(shop, whole)
        self.broken = False
        if not shop.journal.dead:
            await self.try_again(shop)

    async def try_again(self, shop: Shop) -> None:
        try:
            await shop.journal.retry(self.whole, "r", exceptions=Exception)
        except (Killed, CompensationFailed, BaseExceptionGroup):
            assert shop.journal.dead

    def checked_against(self, clean: Shop) -> Any:
        checked = checked_against(clean, self, "rollback")

        async def checked_at_last(shop: Shop, deaths: tuple[Death, ...]) -> None:
            if await state_of(shop) is RunState.FAILED:
                # It died before it was tried again at all, or before it was mended.
                shop.journal = shop.journal.next_process()
                await self.try_again(shop)
            await checked(shop, deaths)

        return checked_at_last


def stuck_sequence(shop: Shop, broken: Callable[[], bool]) -> Saga[..., Any]:
    parts = [shop.step("a"), shop.step("b", back_fails=broken), shop.step("c", fails=Boom("c"))]
    return Saga(parts, name="s")


def stuck_group(shop: Shop, broken: Callable[[], bool]) -> Saga[..., Any]:
    members = [
        Saga([shop.step("b"), shop.step("c", back_fails=broken)]),
        shop.step("d", (2, 2), back_fails=broken),
        shop.step("e"),
    ]
    return Saga([shop.step("a"), Parallel(*members), shop.step("f", fails=Boom("f"))], name="s")


def stuck_function(shop: Shop, broken: Callable[[], bool]) -> Saga[..., Any]:
    @saga(name="s")
    async def whole(scope: SagaScope) -> None:
        await scope.step(shop.step("a"))
        async with scope.nested() as nested:
            await nested.step(shop.step("b", back_fails=broken))
            await nested.step(shop.step("c", fails=Boom("c")))

    return whole


@pytest.mark.anyio
@pytest.mark.parametrize(
    "build", [stuck_sequence, stuck_group, stuck_function], ids=lambda build: build.__name__
)
@pytest.mark.parametrize("anyio_backend", WITHOUT_DEBUG, indirect=True)
async def test_d3_killed_at_any_boundary_of_a_run_that_is_tried_again(build):
    """A process that dies while it tries a failed run again leaves the rest to the next one (D3)."""
    stuck = Stuck(build)
    clean = await lived(stuck, (Death(),), "rollback", stuck.life)
    assert (RunState.COMPENSATED, set()) == (await state_of(clean), clean.there)
    checked = stuck.checked_against(clean)
    first = [death async for death in deaths_of(stuck, "rollback", stuck.life, (), checked)]
    assert len(first) >= clean.journal.passed
    twice = [
        one
        for death in first[::EVERY]
        async for one in deaths_of(stuck, "rollback", stuck.life, (death,), checked)
    ]
    assert twice


# --- cancelled, and then killed -------------------------------------------------------------------


def cancel_in_sequence(shop: Shop) -> Saga[..., Any]:
    return Saga([shop.step("a"), shop.step("b", undo=True), shop.step("told", (3, 3))], name="s")


def cancel_in_group(shop: Shop) -> Saga[..., Any]:
    ahead = Saga([shop.step("b"), shop.step("c")])
    slow = shop.step("told", (12, 9))
    return Saga([shop.step("a"), Parallel(ahead, slow, shop.step("d", shield=True))], name="s")


def cancel_in_function(shop: Shop) -> Saga[..., Any]:
    @saga(name="s")
    async def whole(scope: SagaScope) -> None:
        await scope.step(shop.step("a"))
        async with scope.nested() as nested:
            await nested.step(shop.step("b"))
            await nested.step(shop.step("told", (3, 3)))

    return whole


def cancel_past_commit(shop: Shop) -> Saga[..., Any]:
    return Saga([shop.step("a"), Commit(), shop.step("b"), shop.step("told", (3, 3))], name="s")


CANCELLED = [cancel_in_sequence, cancel_in_group, cancel_in_function, cancel_past_commit]


async def cancelled_by_a_scope(shop: Shop, whole: Saga[..., Any]) -> None:
    with CancelScope() as scope:
        shop.moments["told"] = scope.cancel
        await first_life(shop, whole)


async def cancelled_natively(shop: Shop, whole: Saga[..., Any]) -> None:
    task = asyncio.ensure_future(first_life(shop, whole))
    shop.moments["told"] = task.cancel
    await asyncio.wait([task])
    assert task.cancelled() or task.result() is None


async def killed_after_a_cancellation(build: Build, on_crash: str, way: Any) -> None:
    clean = await lived(build, (Death(),), on_crash, way)
    whole = await lived(build, (Death(),), on_crash, first_life)
    count = 0

    async def checked(shop: Shop, deaths: tuple[Death, ...]) -> None:
        # Killed before the rollback was on disk, it may be gone on with, as if never cancelled.
        began = any(event.kind is EventKind.ROLLBACK for event in shop.journal.events())
        went_on = (await state_of(shop)) is RunState.COMPLETED
        assert not (began and went_on)
        await check(shop, whole if went_on else clean, f"{build.__name__}, {on_crash}, {deaths}")

    async for _ in deaths_of(build, on_crash, way, (), checked):
        count += 1

    assert count >= clean.journal.passed > 9


@pytest.mark.anyio
@pytest.mark.parametrize("on_crash", ["rollback", "resume"])
@pytest.mark.parametrize("build", CANCELLED, ids=lambda build: build.__name__)
@pytest.mark.parametrize("anyio_backend", WITHOUT_DEBUG, indirect=True)
async def test_d3_killed_in_a_rollback_that_a_scope_had_begun(build, on_crash):
    """A rollback that a cancelled scope began is ended by the next process, under either (D3)."""
    await killed_after_a_cancellation(build, on_crash, cancelled_by_a_scope)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
@pytest.mark.parametrize("on_crash", ["rollback", "resume"])
@pytest.mark.parametrize("build", CANCELLED, ids=lambda build: build.__name__)
async def test_d3_killed_in_a_rollback_that_a_native_cancellation_had_begun(build, on_crash):
    """A rollback that ``task.cancel()`` began is ended by the next process, under either (D3)."""
    await killed_after_a_cancellation(build, on_crash, cancelled_natively)


# --- drawn ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leaf:
    name: str
    pace: tuple[int, int]
    undo: bool
    shield: bool


@dataclass(frozen=True)
class Seq:
    parts: tuple[Any, ...]
    nested: bool
    catch: bool


@dataclass(frozen=True)
class Par:
    parts: tuple[Any, ...]
    limit: int | None
    finish: bool
    catch: bool


@dataclass(frozen=True)
class Case:
    tree: Seq
    functions: bool
    commit_at: int | None
    failing: int | None
    deaths: tuple[Death, ...]
    on_crash: str


def leaves_of(part: Any) -> list[Leaf]:
    return [part] if isinstance(part, Leaf) else [leaf for one in part.parts for leaf in leaves_of(one)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    names = (f"step {number}" for number in range(100))
    paces = st.tuples(st.integers(0, 5), st.integers(0, 3))
    booleans = st.booleans()

    def part(depth: int) -> Any:
        kind = draw(st.sampled_from(["step", "step", "seq", "par"] if depth < 3 else ["step"]))
        if kind == "step":
            return Leaf(next(names), draw(paces), draw(booleans), draw(st.sampled_from([False, True])))
        parts = tuple(part(depth + 1) for _ in range(draw(st.integers(1, 3))))
        if kind == "seq":
            return Seq(parts, draw(booleans), draw(booleans))
        return Par(parts, draw(st.sampled_from([None, 1, 2])), draw(booleans), draw(booleans))

    tree = Seq(tuple(part(1) for _ in range(draw(st.integers(1, 4)))), nested=False, catch=False)
    deaths = st.lists(st.builds(Death, st.integers(0, 40), booleans), min_size=1, max_size=3)
    return Case(
        tree,
        draw(booleans),
        draw(st.sampled_from([None, None, 0, 1, 2])),
        draw(st.sampled_from([None, *range(len(leaves_of(tree)))])),
        tuple(draw(deaths)),
        draw(st.sampled_from(["rollback", "resume"])),
    )


def drawn_saga(case: Case, shop: Shop) -> Saga[..., Any]:
    leaves = leaves_of(case.tree)
    failing = None if case.failing is None else leaves[case.failing].name

    def step(leaf: Leaf) -> Step[..., Any]:
        fails = Boom(leaf.name) if leaf.name == failing else None
        return shop.step(leaf.name, leaf.pace, undo=leaf.undo, shield=leaf.shield, fails=fails)

    def as_data(part: Any) -> Any:
        if isinstance(part, Leaf):
            return step(part)
        inner = map(as_data, part.parts)
        if isinstance(part, Seq):
            return Saga(inner)
        return Parallel(*inner, limit=part.limit, on_failure="finish" if part.finish else "cancel")

    def as_member(part: Any) -> Any:
        if isinstance(part, Leaf):
            return step(part).bind()

        @saga
        async def branch(scope: SagaScope) -> None:
            await carry_out(part, scope)

        return branch.bind()

    async def carry_out(part: Any, scope: SagaScope) -> None:
        try:
            if isinstance(part, Leaf):
                await scope.step(step(part))
            elif isinstance(part, Par):
                policy: Any = "finish" if part.finish else "cancel"
                await scope.parallel(*map(as_member, part.parts), limit=part.limit, on_failure=policy)
            elif part.nested:
                async with scope.nested() as nested:
                    for one in part.parts:
                        await carry_out(one, nested)
            else:
                for one in part.parts:
                    await carry_out(one, scope)
        except (Boom, ExceptionGroup):
            if isinstance(part, Leaf) or not part.catch:
                raise

    if case.functions:

        @saga(name="s")
        async def whole(scope: SagaScope) -> None:
            for index, part in enumerate(case.tree.parts):
                if index == case.commit_at:
                    await scope.commit()
                await carry_out(part, scope)

        return whole
    parts = [as_data(part) for part in case.tree.parts]
    if case.commit_at is not None:
        parts.insert(case.commit_at, Commit())
    return Saga(parts, name="s")


@pytest.mark.parametrize("backend", WITHOUT_DEBUG)
@settings(
    max_examples=int(os.environ.get("PYSAGAS_EXAMPLES", "2000")) if DEEP else 100,
    derandomize=not DEEP,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@pytest.mark.timeout(0 if DEEP else 120)
@given(case=cases())
def test_d3_any_saga_killed_any_number_of_times(backend, case):
    """Whatever a saga is made of, and wherever it is killed, it ends as before, or as undisturbed (D3)."""

    async def killed() -> None:
        build = partial(drawn_saga, case)
        clean = await lived(build, (Death(),), case.on_crash, first_life)
        shop = await lived(build, case.deaths, case.on_crash, first_life)
        await check(shop, clean, f"{case}")

    name, options = backend
    anyio.run(killed, backend=name, backend_options=options)


# --- helpers for single runs ------------------------------------------------------------------------


async def killed_at(shop: Shop, whole: Saga[..., Any], moment: str) -> None:
    """Lets the first process die when the step of this name has begun."""

    def die() -> None:
        shop.journal.dead = True

    shop.moments[moment] = die
    await first_life(shop, whole)
    assert shop.journal.dead
    shop.journal = shop.journal.next_process()


def names_of(shop: Shop, *kinds: EventKind) -> list[str]:
    return [event.name for event in shop.journal.events() if event.kind in kinds]


def report_of(outcome: Outcome[Any] | None, name: str) -> Any:
    assert outcome is not None
    (report,) = [one for one in outcome.steps if one.name == name]
    return report


# --- interrupted ------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_d3_interrupted_is_sticky_and_cannot_be_swallowed():
    """Each later call raises Interrupted again, and who swallows them all is taken back (D3)."""
    shop = Shop()
    seen = []

    @saga(name="s")
    async def stubborn(scope: SagaScope) -> str:
        await scope.step(shop.step("a"))
        for name in "bc":
            try:
                await scope.step(shop.step(name))
            except BaseException as error:
                seen.append(type(error))
        try:
            await scope.parallel(shop.step("d").bind())
        except BaseException as error:
            seen.append(type(error))
        return "done all the same"

    await killed_at(shop, stubborn, "b")
    seen.clear()
    report = await shop.journal.recover([stubborn])

    assert [Interrupted, Interrupted, BaseExceptionGroup] == seen
    (recovered,) = report.recovered
    assert (RunState.COMPENSATED, RunInterrupted) == (recovered.state, type(recovered.error))
    assert (set(), {"a": 1, "b": 1}) == (shop.there, shop.begun)


@pytest.mark.anyio
async def test_d3_interrupted_passes_an_except_exception():
    """``except Exception`` does not take an interruption for a failure (D3)."""
    shop = Shop()
    caught = []

    @saga(name="s")
    async def careful(scope: SagaScope) -> None:
        try:
            await scope.step(shop.step("a"))
        except Exception as error:
            caught.append(error)

    await killed_at(shop, careful, "a")
    assert caught  # what died could not be taken back by the dead
    caught.clear()
    report = await shop.journal.recover([careful])

    assert ([], True, set()) == (caught, report.ok, shop.there)


@pytest.mark.anyio
async def test_d3_a_failure_in_place_of_an_interruption_is_a_failure():
    """A function that makes a failure of its own of an interruption fails with that (D3)."""
    shop = Shop()

    @saga(name="s")
    async def translating(scope: SagaScope) -> None:
        try:
            await scope.step(shop.step("a"))
        except BaseException:
            raise Boom("translated") from None

    await killed_at(shop, translating, "a")
    report = await shop.journal.recover([translating])

    assert [("r", RunState.COMPENSATED, Boom)] == [
        (one.run_id, one.state, type(one.error)) for one in report.recovered
    ]
    assert set() == shop.there


@pytest.mark.anyio
async def test_d3_a_function_that_had_nothing_left_to_do_is_taken_back():
    """A run that was killed after its last effect goes back, or is completed when told to go on (D3)."""
    for on_crash, there in (("rollback", set()), ("resume", {"a"})):
        shop = Shop()
        whole = Saga([shop.step("a")], name="s")
        shop.journal.dies_at = 3  # STARTED, its flush, DONE, and then the end
        await first_life(shop, whole)
        assert [EventKind.STARTED, EventKind.DONE] == [one.kind for one in shop.journal.events()]
        shop.journal = shop.journal.next_process()
        await shop.journal.recover([whole], on_crash=on_crash)

        assert there == shop.there


@pytest.mark.anyio
async def test_d3_a_function_that_returns_after_its_cancellation_is_taken_back_again():
    """Where a cancellation outside of all effects began the rollback, the replay of it ends too (D3)."""
    shop = Shop()
    waits = True

    @saga(name="s")
    async def whole(scope: SagaScope) -> None:
        await scope.step(shop.step("a"))
        await scope.step(shop.step("b"))
        if waits:
            cancelling.cancel()
            await checkpoint()

    shop.journal.dies_at = 8  # in the middle of the rollback
    with CancelScope() as cancelling:
        await first_life(shop, whole)
    assert shop.journal.dead
    assert ["b"] == names_of(shop, EventKind.COMPENSATING)
    waits = False
    shop.journal = shop.journal.next_process()
    report = await shop.journal.recover([whole], on_crash="resume")

    assert (True, set(), RunState.COMPENSATED) == (report.ok, shop.there, await state_of(shop))


# --- in doubt ---------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_d3_an_action_in_doubt_goes_back_as_g3_says():
    """In doubt, a compensation runs; an undo alone cannot, and the step is listed (D3, G3)."""
    shop = Shop()
    members = [
        shop.step("with compensation", (9, 9)),
        shop.step("with undo alone", (9, 9), undo=True, compensation=False),
        shop.step("with both", (9, 9), undo=True),
        shop.step("with neither", (9, 9), compensation=False),
        shop.step("last", (0, 9)),
    ]
    whole = Saga([shop.step("done", undo=True, compensation=False), Parallel(*members)], name="s")
    await killed_at(shop, whole, "last")
    (recovered,) = (await shop.journal.recover([whole])).recovered

    outcome = recovered.outcome
    assert outcome is not None
    assert {"with undo alone", "with neither"} == {report.name for report in outcome.in_doubt}
    assert (SagaState.COMPENSATED, StepState.COMPENSATED) == (
        outcome.state,
        report_of(outcome, "done").state,
    )
    assert {"with compensation", "with both", "last", "done"} == set(
        names_of(shop, EventKind.COMPENSATED)
    )


@pytest.mark.anyio
async def test_d3_a_compensation_in_doubt_runs_again():
    """A compensation of which the end is not recorded runs again; one that is does not (D3)."""
    shop = Shop()
    taken_back = []

    async def back() -> None:
        taken_back.append("b")
        if len(taken_back) == 1:
            shop.journal.dead = True

    async def nothing() -> None:
        pass

    whole = Saga(
        [
            shop.step("a"),
            Step(nothing, back, name="b"),
            shop.step("c"),
            shop.step("d", fails=Boom("d")),
        ],
        name="s",
    )
    await first_life(shop, whole)
    assert ["d", "c", "b"] == names_of(shop, EventKind.COMPENSATING)
    shop.journal = shop.journal.next_process()
    report = await shop.journal.recover([whole])

    assert (["b", "b"], True, ["d", "c", "b", "a"]) == (
        taken_back,
        report.ok,
        names_of(shop, EventKind.COMPENSATED),
    )
    assert 1 == shop.log.count("-c")


@pytest.mark.anyio
async def test_d3_resume_runs_an_action_in_doubt_again_under_the_same_key():
    """Going on, an action in doubt runs again, and a service knows it by its key (D3)."""
    shop = Shop()
    whole = Saga([shop.step("a"), shop.step("b"), shop.step("c")], name="s")
    await killed_at(shop, whole, "b")
    report = await shop.journal.recover([whole], on_crash="resume")

    assert [RunState.COMPLETED] == [one.state for one in report.recovered]
    assert {"a": 1, "b": 2, "c": 1} == shop.begun
    assert {"a": {"r/0/action"}, "b": {"r/1/action"}, "c": {"r/2/action"}} == shop.keys


@pytest.mark.anyio
async def test_d3_an_action_that_was_once_in_doubt_stays_so():
    """Run again, an action that declares to have done nothing may have had its effect before (D3)."""
    shop = Shop()
    whole = Saga([shop.step("a", (0, 0), fails=Boom("a"), not_applied=Boom)], name="s")
    await killed_at(shop, whole, "a")
    shop.there.add("a")  # it had, before the process died
    report = await shop.journal.recover([whole], on_crash="resume")

    assert (True, set(), ["a"]) == (report.ok, shop.there, names_of(shop, EventKind.COMPENSATED))


# --- failures, recorded -------------------------------------------------------------------------------


class Declined(Exception):
    """Cannot be made by its ``args`` alone."""

    made = 0

    def __init__(self, card: str, *, amount: int) -> None:
        super().__init__(f"{card} was declined")
        Declined.made += 1
        self.amount = amount


class Unwritable(Exception):
    """Has arguments that no JSON can hold."""


@pytest.mark.anyio
async def test_d3_a_recorded_failure_comes_back_as_what_it_was():
    """Replayed, a failure has its type, its text and its fields, and its class was not called (D3)."""
    shop = Shop()
    caught = []

    @saga(name="s")
    async def whole(scope: SagaScope) -> None:
        error = Declined("visa", amount=3)
        error.add_note("try another")
        for name, fails in (("a", error), ("b", Unwritable(object()))):
            try:
                await scope.step(shop.step(name, fails=fails, not_applied=Exception))
            except Exception as failure:
                caught.append(failure)
        await scope.step(shop.step("c"))

    await killed_at(shop, whole, "c")
    caught.clear()
    made = Declined.made
    await shop.journal.recover([whole])
    again, other = caught

    assert made + 1 == Declined.made  # by the function, and not by the replay
    assert (Declined, "visa was declined", 3) == (type(again), str(again), again.amount)
    assert "try another" in again.__notes__
    assert Unwritable is type(other)
    assert str(other).startswith("<object object at")


@pytest.mark.anyio
async def test_d3_the_state_in_which_a_failure_left_its_step_is_recorded():
    """A step that did nothing is not compensated after a replay, one in doubt is, one done is undone (D3)."""
    shop = Shop()

    async def fails_late(effect, call_next):
        result = await call_next()
        if effect.name == "completed" and effect.kind == "action":
            raise Boom("late")
        return result

    @saga(name="s", middleware=[fails_late])
    async def whole(scope: SagaScope) -> None:
        steps = [
            shop.step("not applied", fails=Boom("1"), not_applied=Boom),
            shop.step("in doubt", fails=Boom("2")),
            shop.step("completed", undo=True, compensation=False),
        ]
        await scope.parallel(*(step.bind() for step in steps), on_failure="finish")

    shop.journal.dies_at = 12  # three times: STARTED, its flush, FAILED; and the rollback's beginning
    await first_life(shop, whole)
    assert 3 == len(names_of(shop, EventKind.FAILED))
    assert [] == names_of(shop, EventKind.COMPENSATED)
    shop.journal = shop.journal.next_process()
    (recovered,) = (await shop.journal.recover([whole])).recovered
    states = {step.name: step.state for step in recovered.outcome.steps}

    assert {
        "not applied": StepState.NOT_APPLIED,
        "in doubt": StepState.COMPENSATED,
        "completed": StepState.COMPENSATED,
    } == states


@pytest.mark.anyio
async def test_d3_a_cancellation_is_never_recorded_as_a_result():
    """What was cut off stays in doubt; what had returned is done; what had not begun is neither (D3)."""
    shop = Shop()
    told = anyio.Event()

    async def returned_and_then_waits(effect, call_next):
        result = await call_next()
        if effect.name == "returned" and effect.kind == "action":
            told.set()
            await anyio.Event().wait()
        return result

    async def waits(attempt):
        await anyio.Event().wait()

    members = [
        shop.step("not begun", retry=waits),
        shop.step("in doubt", (10_000, 0)),
        shop.step("returned"),
    ]
    whole = Saga([Parallel(*members)], name="s", middleware=[returned_and_then_waits])
    async with create_task_group() as tasks:
        tasks.start_soon(first_life, shop, whole)
        with fail_after(ENOUGH):
            await told.wait()
        tasks.cancel_scope.cancel()
    kinds: dict[str, list[EventKind]] = {}
    for event in shop.journal.events():
        if event.kind not in (EventKind.COMPENSATING, EventKind.COMPENSATED):
            kinds.setdefault(event.name, []).append(event.kind)

    assert {
        "not begun": [EventKind.STARTED, EventKind.CUT_OFF, EventKind.LEFT],
        "in doubt": [EventKind.STARTED, EventKind.LEFT],
        "returned": [EventKind.STARTED, EventKind.DONE, EventKind.CUT_OFF, EventKind.LEFT],
        "s": [EventKind.ROLLBACK],
    } == kinds


@pytest.mark.anyio
@pytest.mark.parametrize(("on_crash", "there"), [("rollback", set()), ("resume", {"a", "b"})])
async def test_d3_a_step_that_was_cut_off_before_it_began_runs_when_gone_on_with(on_crash, there):
    """Killed before the rollback was on disk, a step that had not begun is run by ``resume`` (D3)."""
    shop = Shop()
    told = anyio.Event()
    patient = False

    async def waits(attempt):
        if patient:
            return await attempt()
        told.set()
        await anyio.Event().wait()

    whole = Saga([shop.step("a"), shop.step("b", retry=waits)], name="s")
    shop.journal.dies_at = 6  # STARTED, its flush, DONE, STARTED, its flush, CUT_OFF; then the rollback
    async with create_task_group() as tasks:
        tasks.start_soon(first_life, shop, whole)
        with fail_after(ENOUGH):
            await told.wait()
        tasks.cancel_scope.cancel()
    assert EventKind.CUT_OFF is shop.journal.events()[-1].kind
    patient = True
    shop.journal = shop.journal.next_process()
    report = await shop.journal.recover([whole], on_crash=on_crash)

    assert (True, there) == (report.ok, shop.there)


class CancelsAtCommit(MortalJournal):
    """Calls something while the commit is being written."""

    cancel: Any

    async def _flush(self, key: int) -> None:
        if self.events()[-1].kind is EventKind.COMMITTED:
            cancel, self.cancel = self.cancel, bool
            cancel()
        await super()._flush(key)


def cancel_while_committing(shop: Shop, cancel: Callable[[], object]) -> None:
    shop.journal = CancelsAtCommit()
    shop.journal.cancel = cancel


@pytest.mark.anyio
async def test_d3_a_commit_that_is_being_written_is_not_cut_off_by_a_scope():
    """Cancelled while its commit is written, a run has passed it, for itself as for its journal (D3)."""
    shop = Shop()
    with CancelScope() as scope:
        cancel_while_committing(shop, scope.cancel)
        await first_life(shop, passing_commit(shop))

    assert (RunState.FAILED, {"a"}) == (await state_of(shop), shop.there)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
async def test_d3_a_commit_that_is_being_written_is_not_cut_off_natively():
    """The same for ``task.cancel()``, which no shield keeps away; and it is not lost (D3)."""
    shop = Shop()
    # Before the task is there: an eager one begins at once.
    cancel_while_committing(shop, lambda: task.cancel())  # noqa: PLW0108
    task = asyncio.ensure_future(first_life(shop, passing_commit(shop)))
    await asyncio.wait([task])

    assert task.cancelled()
    assert (RunState.FAILED, {"a"}) == (await state_of(shop), shop.there)


def cancelled_in_replay(shop: Shop, cancel: Callable[[], object]) -> Saga[..., Any]:
    """One branch is ahead, and cancels all while it is replayed; another waits for it."""

    @saga
    async def ahead(scope: SagaScope) -> None:
        await scope.step(shop.step("b"))
        cancel()
        await scope.step(shop.step("c"))
        await scope.step(shop.step("d"))
        await scope.step(shop.step("e"))

    @saga
    async def behind(scope: SagaScope) -> None:
        await scope.step(shop.step("a", (4, 0)))
        await scope.step(shop.step("f", (20, 0)))

    return Saga([Parallel(ahead, behind), shop.step("z")], name="s")


async def check_replayed_whole(shop: Shop, begun: Any) -> None:
    assert (RunState.COMPENSATED, set()) == (await state_of(shop), shop.there)
    assert begun == shop.begun
    assert [] == problems_of(shop, shop.journal.events())


async def killed_while_behind(shop: Shop) -> Any:
    await killed_at(shop, cancelled_in_replay(shop, bool), "e")
    assert {"a", "b", "c", "d"} == set(names_of(shop, EventKind.DONE))
    return shop.begun.copy()


@pytest.mark.anyio
@pytest.mark.parametrize("on_crash", ["rollback", "resume"])
async def test_d3_a_cancelled_scope_does_not_cut_a_replay_short(on_crash):
    """A scope that is cancelled in the middle of a replay is noticed when the history is used up (D3)."""
    shop = Shop()
    begun = await killed_while_behind(shop)
    with CancelScope() as scope:
        await shop.journal.run(cancelled_in_replay(shop, scope.cancel), run_id="r", on_crash=on_crash)

    assert scope.cancelled_caught
    await check_replayed_whole(shop, begun)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
@pytest.mark.parametrize("on_crash", ["rollback", "resume"])
async def test_d3_a_native_cancellation_does_not_cut_a_replay_short(on_crash):
    """The same for ``task.cancel()`` (D3)."""
    shop = Shop()
    begun = await killed_while_behind(shop)
    changed = cancelled_in_replay(shop, lambda: task.cancel())
    task = asyncio.ensure_future(shop.journal.run(changed, run_id="r", on_crash=on_crash))
    await asyncio.wait([task])

    assert task.cancelled()
    await check_replayed_whole(shop, begun)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
@pytest.mark.parametrize("last", [True, False])
async def test_d3_a_native_cancellation_of_a_member_that_waits_for_its_turn_is_not_lost(last):
    """A member whose task is cancelled while it waits for its turn in a replay notices it after (D3)."""
    shop = Shop()
    tasks: list[Any] = []

    @saga
    async def ahead(scope: SagaScope) -> None:
        await scope.step(shop.step("b"))
        for task in tasks:
            task.cancel()
        await scope.step(shop.step("c"))

    @saga
    async def behind(scope: SagaScope) -> None:
        if replaying:
            tasks.append(asyncio.current_task())
        await scope.step(shop.step("a", (9, 0)))

    parts = [Parallel(behind, ahead), *([] if last else [shop.step("z", (9, 9))])]
    whole = Saga(parts, name="s")
    replaying = False
    if last:
        shop.journal.dies_at = 12  # the last of them: before the end
        await first_life(shop, whole)
        assert EventKind.JOINED is shop.journal.events()[-1].kind
        shop.journal = shop.journal.next_process()
    else:
        await killed_at(shop, whole, "z")
    replaying = True
    begun = shop.begun.copy()
    with pytest.raises(asyncio.CancelledError):
        await shop.journal.run(whole, run_id="r", on_crash="resume")

    assert (RunState.COMPENSATED, set(), begun) == (await state_of(shop), shop.there, shop.begun)


# --- answered by somebody else, and not recordable ------------------------------------------------


async def fallback(attempt: Callable[[], Any]) -> object:
    try:
        return await attempt()
    except Boom:
        return 7


async def fallback_around(effect: Any, call_next: Any) -> object:
    return await fallback(call_next) if effect.kind == "action" else await call_next()


@pytest.mark.anyio
@pytest.mark.parametrize("moment", ["c", "d"])
@pytest.mark.parametrize("by", ["retry", "middleware"])
async def test_d3_a_step_for_which_somebody_answered_is_what_it_was(by, moment):
    """A failure that a retry or a middleware answers for leaves its step as it was, in a replay too (D3)."""
    shop = Shop()
    answers = []

    @saga(name="s", middleware=[fallback_around] if by == "middleware" else ())
    async def whole(scope: SagaScope) -> None:
        retry = fallback if by == "retry" else None
        await scope.step(shop.step("a"))
        for name, options in (("declined", {"not_applied": Boom}), ("in doubt", {})):
            step = shop.step(name, fails=Boom(name), retry=retry, **options)
            answers.append(await scope.step(step))
        await scope.step(shop.step("c", back_fails=lambda: shop.moments.pop("back", bool)() or False))
        await scope.step(shop.step("d", fails=Boom("d")))

    await killed_at(shop, whole, moment)
    await shop.journal.recover([whole])

    assert {7} == set(answers)
    assert RunState.COMPENSATED is await state_of(shop)
    # What was declined had done something all the same: that is what it is told not to be asked.
    assert {"declined"} == shop.there
    assert [] == problems_of(shop, shop.journal.events())


@pytest.mark.anyio
async def test_d3_an_undo_gets_what_the_action_returned_whatever_its_caller_was_given():
    """A middleware that changes results changes none for an undo, in a replay as in life (D3)."""
    shop = Shop()

    async def changes(effect: Any, call_next: Any) -> object:
        result = await call_next()
        return f"changed {result}" if effect.kind == "action" else result

    parts = [shop.step("a", undo=True), shop.step("b")]
    whole = Saga(parts, name="s", middleware=[changes])
    await killed_at(shop, whole, "b")
    await shop.journal.recover([whole])

    assert (RunState.COMPENSATED, set()) == (await state_of(shop), shop.there)


class Opaque:
    """What cannot be recorded."""


def opaque_result(shop: Shop, *, both: bool, back_fails: Callable[[], bool] = bool) -> Saga[..., Any]:
    """A step that returns what cannot be recorded, and one before it."""

    async def act() -> Opaque:
        shop.begin("b")
        shop.put("b")
        return Opaque()

    async def undo(result: Opaque) -> None:
        assert type(result) is Opaque
        shop.take("b")

    async def back() -> None:
        shop.take("b")

    opaque = Step(act, back if both else None, undo=undo, name="b")
    return Saga([shop.step("a", back_fails=back_fails), opaque], name="s")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("both", "dies_at", "log"),
    [
        (False, 10, ["a", "b", "-b", "-a"]),
        (True, 10, ["a", "b", "-b", "-a"]),
        # Before that was recorded: with a compensation it can be asked again.
        (True, 9, ["a", "b", "-b", "-b", "-a"]),
    ],
)
async def test_d5_what_is_not_recordable_is_taken_back_once(both, dies_at, log):
    """Killed after its undo, a step whose result is not recorded is not met again (D5)."""
    shop = Shop()
    whole = opaque_result(shop, both=both)
    shop.journal.dies_at = dies_at
    await first_life(shop, whole)
    assert ["a", "b", "-b"] == shop.log
    shop.journal = shop.journal.next_process()
    (recovered,) = (await shop.journal.recover([whole])).recovered

    assert NotRecordable is type(recovered.error)
    assert log == shop.log


@pytest.mark.anyio
async def test_d5_what_is_not_recordable_is_not_taken_back_again_by_a_retry():
    """A run that failed beside such a step is tried again without it (D5, D8)."""
    shop, broken = Shop(), [True]
    whole = opaque_result(shop, both=False, back_fails=lambda: bool(broken))
    await first_life(shop, whole)
    broken.clear()
    with pytest.raises(NotRecordable):
        await shop.journal.retry(whole, "r")

    assert (RunState.COMPENSATED, ["a", "b", "-b", "-a"]) == (await state_of(shop), shop.log)


@pytest.mark.anyio
async def test_d5_an_undo_in_doubt_of_what_was_not_recordable_is_left_to_people():
    """Killed within its undo, nobody has the result any more: the run is FAILED, and says so (D5)."""
    shop = Shop()
    whole = opaque_result(shop, both=False)
    shop.journal.dies_at = 9  # before its undo is recorded
    await first_life(shop, whole)
    shop.journal = shop.journal.next_process()
    (failed,) = (await shop.journal.recover([whole])).failed

    assert "take it back by hand" in str(failed.error)
    assert RunState.FAILED is await state_of(shop)


# --- the order of replay ------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("on_crash", ["rollback", "resume"])
async def test_d3_nothing_runs_before_all_history_is_replayed(on_crash):
    """A branch in doubt waits for another that is ahead, before it runs or goes back (D3)."""
    shop = Shop()
    seen = []

    @saga
    async def ahead(scope: SagaScope) -> None:
        for name in "bcde":
            await scope.step(shop.step(name))
            seen.append(name)

    whole = Saga([Parallel(shop.step("a", (20, 0)), ahead)], name="s")
    await killed_at(shop, whole, "e")
    seen.clear()
    shop.moments["a"] = lambda: seen.append("a runs")
    shop.journal.next_process()
    before = len(shop.log)
    await shop.journal.recover([whole], on_crash=on_crash)

    assert ["b", "c", "d"] == seen[:3]
    assert set(shop.log[before:]) & {"b", "c", "d"} == set()
    assert ("a runs" in seen) == (on_crash == "resume")


@pytest.mark.anyio
async def test_d3_current_effect_is_there_in_a_recovery_too():
    """A compensation that recovers knows its effect and its action's key (D3)."""
    shop = Shop()
    keys = []

    async def back() -> None:
        effect = current_effect()
        keys.append((effect.key, effect.action_key))

    async def action() -> None:
        shop.begin("a")

    whole = Saga([Step(action, back, name="a")], name="s")
    await killed_at(shop, whole, "a")
    await shop.journal.recover([whole])

    assert [("r/0/compensation", "r/0/action")] == keys


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
async def test_d3_a_native_cancellation_in_the_replay_of_a_group_is_not_lost():
    """Whenever a recovery is cancelled, it ends cancelled, and the run can be recovered after (D3)."""
    turns = 0
    while await cancelled_after(turns):
        turns += 1

    assert turns > 9


async def cancelled_after(turns: int) -> bool:
    """Cancels a recovery when the loop has gone round so often; tells whether it was still going on."""
    shop = Shop()

    @saga
    async def branch(scope: SagaScope) -> None:
        await scope.step(shop.step("b"))
        await checkpoint()
        await scope.step(shop.step("c"))

    parts = [Parallel(branch, shop.step("d")), shop.step("e"), shop.step("f")]
    whole = Saga(parts, name="s")
    await killed_at(shop, whole, "f")
    task = asyncio.ensure_future(shop.journal.recover([whole]))
    for _ in range(turns):
        await asyncio.sleep(0)
    going_on = not task.done()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled() is going_on
    shop.journal = shop.journal.next_process()
    await shop.journal.recover([whole])
    assert (RunState.COMPENSATED, set()) == (await state_of(shop), shop.there)
    return going_on


def replay_of(*events: Event) -> Replay:
    replay = Replay("s", [*events], bool, recovering=True, resume=False)
    replay.open_group((0,))
    replay.start()
    return replay


def effect_at(kind: Any, *path: int) -> Effect:
    return Effect(kind, "s", "r", "x", path)


@pytest.mark.anyio
async def test_d3_a_compensation_that_was_passed_over_is_not_tried_in_its_place():
    """What a failed compensation kept from being tried is not tried in a replay, where another might be (D3)."""
    replay = replay_of(Event(EventKind.LEFT, (0, 0), "member"))
    with pytest.raises(RecordedError, match="it was not tried, since another compensation had failed"):
        await replay.park(effect_at("compensation", 0, 0, 1), forward=False)


@pytest.mark.anyio
async def test_d3_a_member_that_was_cut_off_is_interrupted_when_nobody_else_comes():
    """As long as a sibling goes on, it may be that which cut the member off, and does so again (D3)."""
    replay = replay_of(Event(EventKind.LEFT, (0, 0), "member"))
    ended: list[BaseException] = []

    async def parked() -> None:
        with replay.branch((0, 0)):
            try:
                await replay.park(effect_at("action", 0, 0, 0), forward=True)
            except Interrupted as error:
                ended.append(error)

    with fail_after(ENOUGH):
        async with create_task_group() as tasks:
            with replay.branch((0, 1)):
                tasks.start_soon(parked)
                for _ in range(200):
                    await checkpoint()
                assert [] == ended

    assert 1 == len(ended)


@pytest.mark.anyio
async def test_d3_a_member_that_did_nothing_and_does_not_come_is_not_waited_for():
    """That a member had begun is recorded nowhere before its first effect: so it need not begin again (D3)."""
    replay = replay_of(Event(EventKind.LEFT, (0, 0), "idle"))
    with fail_after(ENOUGH), replay.branch((0, 1)), pytest.raises(Interrupted):
        await replay.park(effect_at("action", 0, 1, 0), forward=True)


@pytest.mark.anyio
async def test_d3_a_member_may_come_further_than_it_had_before_its_group_broke():
    """What cut a member off comes again: until then it may begin what it had not come to (D3)."""
    replay = replay_of(Event(EventKind.BROKEN, (0,), "group"))
    with replay.branch((0, 1)):
        assert [] == await replay.meet(effect_at("action", 0, 1, 0))


@pytest.mark.anyio
async def test_d4_a_run_that_is_given_up_lets_nothing_go_on():
    """Who was waiting is told why the run is given up, and so is whoever ends after that (D4)."""
    replay = replay_of(Event(EventKind.STARTED, (0, 0), "a"), Event(EventKind.STARTED, (0, 1), "b"))
    reason = SagaChanged("another one")
    told: list[BaseException] = []

    async def parked() -> None:
        with replay.branch((0, 1)):
            try:
                await replay.park(effect_at("action", 0, 1), forward=True)
            except SagaChanged as error:
                told.append(error)

    with fail_after(ENOUGH):
        async with create_task_group() as tasks:
            with replay.branch((0, 0)):
                tasks.start_soon(parked)
                while not replay._parked:
                    await checkpoint()
                with pytest.raises(SagaChanged):
                    replay.abandon(reason)
    with pytest.raises(SagaChanged):
        replay.check_over(effect_at("group", 0))

    assert [reason] == told


@types.coroutine
def suspended():
    yield


def test_d3_a_member_whose_task_is_thrown_away_waits_for_nothing():
    """A coroutine that is closed may not wait: its member leaves no mark (D3)."""
    journal = MemoryJournal()
    appended: list[Any] = []
    journal._append = lambda *event: appended.append(event)
    middleware = RunMiddleware(
        journal, 1, JSONCodec(), Saga([], name="s"), [], recovering=False, resume=False
    )
    middleware.replay.open_group((0,))
    coroutine = middleware(effect_at("saga", 0, 0), suspended)
    coroutine.send(None)
    coroutine.close()

    assert [] == appended


# --- another saga (D4) --------------------------------------------------------------------------------


async def a_text() -> str:
    return "text"


async def a_number() -> int:
    return 3  # pragma: no cover - it is met where the other was recorded


def with_result(action: Any) -> Build:
    async def back() -> None:
        pass

    return lambda shop: Saga([shop.step("a"), Step(action, back, name="b"), shop.step("c")], name="s")


def of_names(names: str, **options: Any) -> Build:
    return lambda shop: Saga([shop.step(name) for name in names], name="s", **options)


def grouped(names: str) -> Build:
    return lambda shop: Saga([Parallel(*map(shop.step, names)), shop.step("z")], name="s")


def beside(names: str) -> Build:
    """One branch stays behind, in its first step, while another goes through these."""
    return lambda shop: Saga([Parallel(shop.step("a", (30, 0)), Saga(map(shop.step, names)))], name="s")


def calling(*names: str) -> Build:
    def build(shop: Shop) -> Saga[..., Any]:
        @saga(name="s")
        async def whole(scope: SagaScope) -> None:
            for name in names:
                await (scope.commit() if name == "commit" else scope.step(shop.step(name)))

        return whole

    return build


CHANGES = {
    "renamed": (of_names("abc"), of_names("axc"), "c", "'b' at (1,) (started), but 'x' is there now"),
    "removed": (of_names("abc"), of_names("ac"), "c", "recorded is 'b'"),
    "removed at the end": (of_names("abc"), of_names("ab"), "c", "ends without it"),
    "removed by a function": (calling(*"abc"), calling(*"ab"), "c", "ends without it"),
    "added": (of_names("abc"), of_names("xabc"), "c", "'x' is there now"),
    "added as a commit": (calling(*"abc"), calling("commit", *"abc"), "c", "commit 'commit' at (0,)"),
    "reordered": (of_names("abc"), of_names("bac"), "c", "'b' is there now"),
    "a group in place of a step": (of_names("abc"), grouped("ab"), "c", "recorded is 'a' at (0,)"),
    "a step in place of a group": (grouped("ab"), of_names("az"), "z", "recorded is 'a' at (0, 0)"),
    "fewer members": (grouped("abc"), grouped("ab"), "z", "recorded is 'c' at (0, 2)"),
    "reordered members": (grouped("ab"), grouped("ba"), "z", "is there now"),
    "renamed beside one in doubt": (beside("bcd"), beside("bxd"), "d", "'x' is there now"),
    "another result": (with_result(a_text), with_result(a_number), "c", "cannot be read as"),
}


@pytest.mark.anyio
@pytest.mark.parametrize("on_crash", ["rollback", "resume"])
@pytest.mark.parametrize("change", CHANGES)
async def test_d4_another_saga_is_refused_and_nothing_is_touched(change, on_crash):
    """A replay that meets another saga says so, runs nothing, and leaves the run as it was (D4)."""
    build, changed, moment, message = CHANGES[change]
    shop = Shop()
    whole = build(shop)
    await killed_at(shop, whole, moment)
    events, log = list(shop.journal.events()), list(shop.log)
    with fail_after(ENOUGH):
        report = await shop.journal.recover([changed(shop)], on_crash=on_crash)
        (left,) = report.left
        assert isinstance(left.error, SagaChanged), left.error
        with pytest.raises(SagaChanged, match=re.escape(message)):
            await shop.journal.run(changed(shop), run_id="r", on_crash=on_crash)

    assert (events, log) == (shop.journal.events(), shop.log)
    assert (RunState.RUNNING, False) == (await state_of(shop), report.ok)
    # And with the saga as it was, it is recovered.
    assert (await shop.journal.recover([whole], on_crash=on_crash)).ok
    assert (await state_of(shop), bool(shop.there)) == {
        "rollback": (RunState.COMPENSATED, False),
        "resume": (RunState.COMPLETED, True),
    }[on_crash]


@pytest.mark.anyio
async def test_d4_more_members_are_more_work():
    """A group that has got another member is not the recorded one, where it had ended (D4)."""
    shop = Shop()
    await killed_at(shop, grouped("ab")(shop), "z")
    with fail_after(ENOUGH):
        report = await shop.journal.recover([grouped("abc")(shop)])

    assert SagaChanged is type(report.left[0].error)
    assert {"a", "b"} == shop.there


@pytest.mark.anyio
async def test_d4_a_change_is_no_failure_that_was_expected():
    """`SagaChanged` is raised whatever failures of the saga are expected, and the run is as it was (D4)."""
    shop = Shop()
    enabled = True

    @saga(name="s", exceptions=Exception)
    async def whole(scope: SagaScope) -> None:
        if enabled:
            await scope.step(shop.step("a"))
            await scope.step(shop.step("b"))

    await killed_at(shop, whole, "b")
    enabled = False
    (left,) = (await shop.journal.recover([whole])).left

    assert SagaChanged is type(left.error)
    assert (RunState.RUNNING, {"a"}) == (await state_of(shop), shop.there)


@pytest.mark.anyio
async def test_d4_a_failed_run_whose_saga_has_changed_stays_failed():
    """A retry with another saga touches nothing, and the run can be tried again with the right one (D4)."""
    shop, broken = Shop(), [True]
    parts = [shop.step("a", back_fails=lambda: bool(broken)), shop.step("b", fails=Boom("b"))]
    whole = Saga(parts, name="s")
    await first_life(shop, whole)
    with pytest.raises(SagaChanged):
        await shop.journal.retry(Saga([shop.step("z")], name="s"), "r")
    assert (RunState.FAILED, {"a"}) == (await state_of(shop), shop.there)
    broken.clear()
    with pytest.raises(Boom):
        await shop.journal.retry(whole, "r")

    assert (RunState.COMPENSATED, set()) == (await state_of(shop), shop.there)


@pytest.mark.anyio
@pytest.mark.parametrize("caught", [True, False])
async def test_d5_killed_at_any_boundary_after_a_result_that_cannot_be_recorded(caught):
    """Where only an undo had it, the run ends all the same, and says what is left (D3, D5)."""

    def build(shop: Shop) -> Saga[..., Any]:
        async def action() -> object:
            shop.begin("a")
            shop.put("a")
            return object()

        async def undo(result: object) -> None:
            shop.take("a")

        @saga(name="s")
        async def whole(scope: SagaScope) -> None:
            try:
                await scope.step(Step(action, undo=undo, name="a"))
            except NotRecordable:
                if not caught:
                    raise
            await scope.step(shop.step("b"))

        return whole

    clean = Shop()
    with suppress(NotRecordable):
        await clean.journal.run(build(clean), run_id="r")
    assert clean.journal.passed > 5
    for boundary in range(clean.journal.passed):
        shop = Shop(MortalJournal().next_process(boundary))
        with suppress(Killed, CompensationFailed, NotRecordable, BaseExceptionGroup):
            await shop.journal.run(build(shop), run_id="r")
        assert shop.journal.dead
        next_one = Shop(shop.journal.next_process())
        next_one.there = shop.there
        with fail_after(5):
            report = await next_one.journal.recover([build(next_one)])
        assert not report.left, (boundary, report)
        left = {step.name for one in report.recovered for step in one.in_doubt}
        assert next_one.there <= left | {"a"} if report.failed else next_one.there <= left, boundary


def losing(*lost: str, group: bool) -> Build:
    """A saga that fails, some steps of which have no compensation."""

    def build(shop: Shop) -> Saga[..., Any]:
        steps = [shop.step(name, compensation=name not in lost) for name in "abc"]
        return Saga(
            [*([Parallel(*steps)] if group else steps), shop.step("d", fails=Boom("d"))], name="s"
        )

    return build


@pytest.mark.anyio
@pytest.mark.parametrize("group", [False, True])
async def test_d4_a_lost_compensation_is_found_where_it_was_recorded(group):
    """A step without the compensation that is recorded is refused, before anything goes back (D4)."""
    shops = [Shop() for _ in range(40)]
    for at, one in enumerate(shops):
        one.journal.dies_at = at
        await first_life(one, losing(group=group)(one))
    # The first of them that died when c had been taken back.
    shop = next(one for one in shops if "c" in names_of(one, EventKind.COMPENSATED))
    failing, lossy = losing(group=group)(shop), losing("c", group=group)(shop)
    shop.journal = shop.journal.next_process()
    log = list(shop.log)
    with fail_after(ENOUGH):
        report = await shop.journal.recover([lossy])

    assert SagaChanged is type(report.left[0].error)
    assert log == shop.log
    assert (await shop.journal.recover([failing])).ok
    assert (set(), RunState.COMPENSATED) == (shop.there, await state_of(shop))


@pytest.mark.anyio
async def test_d4_another_version_is_another_saga():
    """A run goes on with the saga of its version alone (D4)."""
    shop = Shop()
    old, new = of_names("ab", version="1")(shop), of_names("ab", version="2")(shop)
    await killed_at(shop, old, "b")
    report = await shop.journal.recover([new])

    assert "only these versions were given: ['2']" in str(report.left[0].error)
    with pytest.raises(SagaChanged, match="version '1', not of 's', version '2'"):
        await shop.journal.run(new, run_id="r")
    assert {"a", "b"} & shop.there == shop.there != set()
    assert (await shop.journal.recover([new, old])).ok
