"""Attempts at a run on an imitation of Restate: at each moment at which one may end, the next goes on from there."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import suppress
from datetime import timedelta
from typing import Any

import anyio
import pytest
import restate
from conftest import WITHOUT_DEBUG
from imitation import Disconnected, Imitation, OtherHistory, imitate

from pysagas import Commit, Parallel, Saga, SagaDefinitionError, SagaScope, Step, saga
from pysagas.durable import EventKind, RunState, SagaChanged
from pysagas.engines._requests import read

ON_ASYNCIO = [parameter for parameter in WITHOUT_DEBUG if parameter.values[0][0] == "asyncio"]

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.parametrize("anyio_backend", ON_ASYNCIO, indirect=True),
]


@pytest.fixture(autouse=True)
def imitated(monkeypatch):
    imitate(monkeypatch)


class Refused(Exception):
    """What a failing step raises."""


class Shop:
    """What steps change."""

    def __init__(self) -> None:
        self.begun: Counter[str] = Counter()
        self.there: set[str] = set()
        self.order: list[str] = []

    def step(self, name: str, pace: int = 1, *, fails: bool = False, **options: Any) -> Step[..., str]:
        async def act() -> str:
            self.begun[name] += 1
            for _ in range(pace):
                await asyncio.sleep(0)
            self.there.add(name)
            self.order.append(name)
            for _ in range(pace):
                await asyncio.sleep(0)
            if fails:
                raise Refused(name)
            return name

        async def back() -> None:
            self.begun[f"-{name}"] += 1
            await asyncio.sleep(0)
            self.there.discard(name)
            self.order.append(f"-{name}")

        return Step(act, back, name=name, **options)


def sequence(shop: Shop) -> Saga[..., Any]:
    inner = Saga([shop.step("b"), shop.step("c")], name="inner")
    return Saga([shop.step("a"), inner, Commit(), shop.step("d")], name="s")


def groups(shop: Shop) -> Saga[..., Any]:
    """Members that end in another order than they began, and a group within one."""
    inner = Saga([shop.step("b", 3), Parallel(shop.step("c", 2), shop.step("d", 1))], name="inner")
    return Saga([Parallel(shop.step("a", 5), inner, shop.step("e")), shop.step("f")], name="s")


def taken_back(shop: Shop) -> Saga[..., Any]:
    group = Parallel(Saga([shop.step("b", 2), shop.step("c")], name="inner"), shop.step("d"))
    return Saga([shop.step("a"), group, shop.step("e", fails=True)], name="s")


def group_fails(shop: Shop) -> Saga[..., Any]:
    """One member fails while the others are at a step, which they finish."""
    slow = Saga([shop.step("b", 4), shop.step("never")], name="inner")
    return Saga([shop.step("a"), Parallel(slow, shop.step("c", fails=True))], name="s")


def function(shop: Shop) -> Saga[..., Any]:
    """A function that catches what is taken back, and goes another way."""

    @saga(name="s")
    async def detour(scope: SagaScope) -> list[str]:
        went = [await scope.step(shop.step("a"))]
        with suppress(ExceptionGroup):
            await scope.parallel(shop.step("b", 3).bind(), shop.step("c", fails=True).bind())
        with suppress(Refused):
            async with scope.nested() as inner:
                await inner.step(shop.step("d"))
                await inner.step(shop.step("e", fails=True))
        went += await scope.parallel(shop.step("f", 2).bind(), shop.step("g").bind(), limit=1)
        return [*went, await scope.step(shop.step("h"))]

    return detour


SHAPES = [sequence, groups, taken_back, group_fails, function]


@pytest.mark.parametrize("shape", SHAPES)
async def test_d3_an_attempt_may_end_at_any_moment(anyio_backend, shape):
    """Wherever an attempt ends, the next one finds the same history, and runs nothing again that is recorded; D3."""
    shop = Shop()
    clean = Imitation(shape(shop))
    told = await clean.run()
    moments = len(clean.order)
    assert moments >= 4
    for moment in range(1, moments):
        again = Shop()
        server = Imitation(shape(again), ends_at={moment})
        ended = await server.run()
        assert (ended.state, ended.value, again.there) == (told.state, told.value, shop.there), moment
        assert ended.error is None or told.error is not None
        # What was under way runs again; what was recorded does not.
        recorded = Counter(name.split()[1] for name in server.names)
        assert again.begun.keys() == shop.begun.keys()
        for name, times in again.begun.items():
            assert times <= 1 + (recorded[name.lstrip("-")] > 0), (moment, name)
        assert sum(again.begun.values()) <= sum(shop.begun.values()) + 3, moment


@pytest.mark.parametrize("shape", SHAPES)
async def test_d3_each_moment_ends_an_attempt(anyio_backend, shape):
    """A worker that dies after everything that it has recorded comes to the end all the same; D3."""
    shop, again = Shop(), Shop()
    clean = Imitation(shape(shop))
    told = await clean.run()
    server = Imitation(shape(again), ends_at=set(range(1, len(clean.order))))
    ended = await server.run()

    assert (ended.state, ended.value, again.there) == (told.state, told.value, shop.there)
    assert sorted(server.names) == sorted(clean.names)
    assert server.ends_at == set()


@pytest.mark.parametrize("shape", [sequence, groups, function])
async def test_a_run_may_be_cancelled_at_any_moment(anyio_backend, shape):
    """What is under way then ends, and is recorded; nothing else begins, and all is taken back."""
    clean = Imitation(shape(Shop()))
    await clean.run()
    for moment in range(len(clean.order)):
        shop = Shop()
        server = Imitation(shape(shop), cancelled_at=moment)
        ended = await server.run()
        committed = any(b'"committed"' in record for record in server.records)
        assert "_attempt:Cancelled" in json.dumps(ended.error), moment
        if not committed:
            assert (ended.state, shop.there) == (RunState.COMPENSATED, set()), moment
        # And each attempt that follows finds the cancellation where it was.
        for end in range(moment + 1, len(server.order)):
            again = Shop()
            other = Imitation(shape(again), cancelled_at=moment, ends_at={end})
            assert (await other.run()).state is ended.state
            assert again.there == shop.there, (moment, end)


async def test_d3_what_was_done_in_an_attempt_is_not_asked_back(anyio_backend):
    """The records of a run are those that were made; an attempt that only recalls has the same."""
    shop = Shop()
    server = Imitation(groups(shop))
    await server.run()
    made = server.records
    await server.attempt()

    assert server.records == made
    assert sum(shop.begun.values()) == 6
    kinds = [event.kind for record in made for event in read(record)]
    assert Counter(kinds) == {EventKind.STARTED: 6, EventKind.DONE: 6}


async def test_d4_another_history_ends_the_attempt(anyio_backend):
    """What a branch finds, alone or in a group, ends the attempt, and nothing is taken back; D4."""
    shop = Shop()

    def group(first: Step[..., Any], pace: int = 1) -> Parallel[..., Any]:
        return Parallel(first, Saga([shop.step("c", pace)], name="inner"))

    server = Imitation(Saga([shop.step("a"), group(shop.step("b"))], name="s"))
    await server.run()
    for changed in ([shop.step("z")], [shop.step("a"), group(shop.step("z"))]):
        server.saga = Saga(changed, name="s")
        with pytest.raises(OtherHistory, match="action z .* comes in the place of action [ab] "):
            await server.attempt()

    async def number() -> int:
        return 1

    server.saga = Saga([Step(number, name="a")], name="s")
    with pytest.raises(SagaChanged, match="the recorded result of 'a' at"):
        await server.attempt()
    # And at once, though a step is under way, which takes for ever.
    server.saga = Saga([shop.step("a"), group(Step(number, name="b"), 10**9)], name="s")
    server.values.pop(2)
    server.order.remove(2)
    with anyio.fail_after(20), pytest.raises(SagaChanged, match="the recorded result of 'b' at"):
        await server.attempt()
    assert not any(name.startswith("-") for name in shop.begun)


@pytest.mark.parametrize("in_a_group", [False, True])
async def test_a_branch_that_is_cut_off_ends_the_attempt(anyio_backend, in_a_group):
    """A time limit of asyncio's is told, at once, and for what it is; the step is not taken for one in doubt."""
    shop = Shop()

    @saga(name="limited")
    async def limited(scope: SagaScope) -> None:
        async with asyncio.timeout(0.01):
            await scope.step(shop.step("a", 10**9))

    whole = Saga([Parallel(limited, shop.step("b"))], name="s") if in_a_group else limited
    said = (
        r"saga 'limited' was cancelled while it waited for action 'a' at \(.*0,?\), by asyncio.timeout"
    )
    with anyio.fail_after(20), pytest.raises(SagaDefinitionError, match=said):
        await Imitation(whole).attempt()
    assert "-a" not in shop.begun


async def test_a_member_that_is_cut_off_after_a_sibling_has_failed_ends_the_attempt(anyio_backend):
    """A sibling's failure lets the step at which it is come to its end; whoever cancels its task is told."""
    shop = Shop()
    inner = Saga([shop.step("b", 10**9)], name="inner")
    whole = Saga([Parallel(shop.step("a", fails=True), inner)], name="s")
    attempt = asyncio.ensure_future(Imitation(whole).attempt())

    def members() -> list[asyncio.Task[Any]]:
        return [task for task in asyncio.all_tasks() if "_forward" in task.get_name()]

    with anyio.fail_after(20):
        while len(members()) < 2:
            await asyncio.sleep(0)
        while len(members()) > 1:  # until the one that fails has ended
            await asyncio.sleep(0)
        for _ in range(5):  # and the failure has reached the other
            await asyncio.sleep(0)
        [member] = members()
        member.cancel()
        with pytest.raises(SagaDefinitionError, match="was cancelled while it waited for action 'b'"):
            await attempt
    assert not any(name.startswith("-") for name in shop.begun)


async def test_a_worker_that_is_stopped_waits_for_what_it_does(anyio_backend):
    """The task of the handler is cancelled: an action in a thread ends first, and others are cut off."""
    release = anyio.Event()
    began = asyncio.Event()
    ends: list[str] = []

    async def long() -> None:
        began.set()
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await release.wait()
            ends.append("long")

    server = Imitation(Saga([Parallel(Step(long, name="long"), Shop().step("b"))], name="s"))
    attempt = asyncio.ensure_future(server.attempt())
    await began.wait()
    attempt.cancel()
    await asyncio.sleep(0.01)
    assert not attempt.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await attempt

    assert ends == ["long"]


class Stop(BaseException):
    """An order of somebody's own."""


async def stops(*_: object) -> None:
    raise Stop("now")


async def interrupts(*_: object) -> None:
    raise KeyboardInterrupt


async def raises_a_group(*_: object) -> None:
    raise BaseExceptionGroup("both", [ValueError(1), SystemExit(2)])


async def cancels_itself(*_: object) -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("act", [stops, interrupts, raises_a_group, cancels_itself])
async def test_g8_whatever_an_action_raises_its_run_is_taken_back(anyio_backend, act, grouped):
    """No exception of a step is an order to the worker, and none leaves Restate without an answer; G8, G13."""
    shop = Shop()
    last = Parallel(Step(act, name="last"), shop.step("b")) if grouped else Step(act, name="last")
    whole = Saga([shop.step("a"), last], name="s")
    server = Imitation(whole)
    with anyio.fail_after(20):
        ended = await server.run()
        again = await Imitation(
            whole, names=server.names, values=server.values, order=server.order
        ).run()
    assert (ended.state, shop.there) == (RunState.COMPENSATED, set())
    assert (again.state, (again.error or {})["type"]) == (ended.state, (ended.error or {})["type"])


@pytest.mark.parametrize("back", [stops, interrupts, raises_a_group, cancels_itself])
async def test_g11_whatever_a_compensation_raises_the_others_run(anyio_backend, back):
    """It is recorded as a compensation that failed, and what came before is taken back; G11."""
    shop = Shop()
    parts = [shop.step("a"), Step(shop.step("b").action, back, name="b"), shop.step("c", fails=True)]
    with anyio.fail_after(20):
        ended = await Imitation(Saga(parts, name="s")).run()
    assert (ended.state, shop.there) == (RunState.FAILED, {"b"})


@pytest.mark.parametrize("pace", [1, 20])
@pytest.mark.parametrize("in_a_group", [False, True])
async def test_a_call_that_outlives_its_saga_is_taken_back_before_the_run_ends(
    anyio_backend, pace, in_a_group
):
    """`asyncio.gather` lets a failing function go while a step of it is under way: the attempt waits for it."""
    shop = Shop()
    tasks: list[asyncio.Future[Any]] = []

    async def look() -> None:
        await asyncio.sleep(0)
        raise Refused("look")

    @saga(name="gathers")
    async def gathers(scope: SagaScope) -> None:
        await scope.step(shop.step("a"))
        slow = shop.step("slow", pace)
        tasks.append(asyncio.ensure_future(scope.step(Parallel(slow) if in_a_group else slow)))
        await asyncio.gather(tasks[0], look())

    server = Imitation(gathers)
    with anyio.fail_after(20):
        ended = await server.run()
    assert all(task.done() for task in tasks)
    assert shop.there == set()
    assert shop.order.count("-slow") == shop.order.count("slow") == 1
    assert (ended.error or {})["text"] == "look"


@pytest.mark.parametrize("stops_at_once", [False, True])
@pytest.mark.parametrize(("depth", "other"), [(3, 0), (6, 2), (1, 8), (14, 2)])
async def test_d3_a_rollback_of_groups_in_groups_is_replayed_as_it_was(
    anyio_backend, depth, other, stops_at_once
):
    """However deep groups stand in each other, a replay asks for what the attempt before it asked for; D3."""
    shop = Shop()

    async def back_fails() -> None:
        for _ in range(200):
            await asyncio.sleep(0)
        raise OSError("q stays")

    def deep(name: str, levels: int) -> Any:
        part: Any = shop.step(name)
        for _ in range(levels):
            part = Parallel(part)
        return part

    q = Saga([Step(shop.step("q").action, back_fails, name="q")], name="inner")
    group = Parallel(deep("d", depth), deep("e", other), q)
    policy = "stop" if stops_at_once else "continue"
    whole = Saga([group, shop.step("z", fails=True)], name="s", on_compensation_failure=policy)
    server = Imitation(whole)
    ended = await server.run()
    asked, begun = list(server.names), dict(shop.begun)
    again = await server.attempt()

    assert (again.state, server.names, shop.begun) == (ended.state, asked, begun)
    assert ended.state is RunState.FAILED
    assert server.asked == len(asked)


async def test_a_result_that_is_too_large_fails_its_step(anyio_backend, monkeypatch):
    """What Restate would refuse, again and again, is no result; its undo still has it."""
    monkeypatch.setattr("pysagas.engines._requests.LARGEST", 1000)
    shop = Shop()
    undone: list[int] = []

    async def large() -> str:
        return "x" * 2000

    async def undo(result: str) -> None:
        undone.append(len(result))

    ended = await Imitation(Saga([shop.step("a"), Step(large, undo=undo)], name="s")).run()
    assert (ended.state, shop.there, undone) == (RunState.COMPENSATED, set(), [2000])
    assert "gave a result of 2," in (ended.error or {})["text"]
    assert "and Restate takes 1,000: keep it elsewhere" in (ended.error or {})["text"]


async def test_a_value_that_is_too_large_takes_its_run_back(anyio_backend, monkeypatch):
    """What a saga returns is told in one message: what would not fit is refused while it can be taken back."""
    monkeypatch.setattr("pysagas.engines._limits.LARGEST_VALUE", 1000)
    shop = Shop()

    @saga(name="s")
    async def whole(scope: SagaScope) -> str:
        await scope.step(shop.step("a"))
        return "x" * 2000

    ended = await Imitation(whole).run()
    assert (ended.state, shop.there) == (RunState.COMPENSATED, set())
    assert (
        "saga 's': its value is 2,002 bytes, and on Restate at most 1,000"
        in (ended.error or {})["text"]
    )


async def test_what_the_library_raises_otherwise_ends_the_attempt(anyio_backend, monkeypatch):
    """An error of Restate's that is no cancellation is no failure of a step."""
    shop = Shop()

    async def broken(*futures: Any) -> Any:
        raise restate.TerminalError("out of order", 503)

    monkeypatch.setattr(restate, "wait_completed", broken)
    for whole in (
        Saga([shop.step("a")], name="s"),
        Saga([Parallel(shop.step("a"), shop.step("b"), limit=2)], name="s"),
    ):
        with pytest.raises(restate.TerminalError, match="out of order"):
            await Imitation(whole).attempt()
    assert shop.begun == {}


async def test_pauses_between_tries_are_recorded(anyio_backend):
    """A policy's tries, and its pauses, are asked for one after the other, and recalled; G3."""
    policy = restate.RunOptions(
        max_attempts=3, initial_retry_interval=timedelta(seconds=1), retry_interval_factor=3.0
    )
    shop = Shop()
    names = []
    for whole in (
        Saga([shop.step("a", fails=True)], name="s"),
        Saga([Parallel(shop.step("a", fails=True))], name="s"),
    ):
        server = Imitation(whole, {"retries": {"a": policy}}, ends_at={1, 2, 4})
        ended = await server.run()
        assert ended.state is RunState.COMPENSATED
        names.append([name.replace("[0.0]", "[0]") for name in server.names])

    assert shop.begun["a"] == 6
    assert names == 2 * [
        [
            "action a [0]",
            "before attempt 2 [0], 1.0 s",
            "action a [0] attempt 2",
            "before attempt 3 [0], 3.0 s",
            "action a [0] attempt 3",
            "compensation a [0]",
        ]
    ]


async def test_an_action_that_begins_too_late_does_nothing(anyio_backend, monkeypatch):
    """What the library begins when the attempt has ended is not done: the next attempt does it."""
    shop = Shop()

    async def gone(*futures: Any) -> Any:
        raise Disconnected

    server = Imitation(Saga([Parallel(shop.step("a"), shop.step("b"))], name="s"))
    with monkeypatch.context() as patch:
        patch.setattr(restate, "gather", gone)
        with pytest.raises(Disconnected):
            await server.attempt()  # and then the library begins both
    assert shop.begun == {}

    assert (await server.run()).state is RunState.COMPLETED
    assert shop.begun == {"a": 1, "b": 1}
