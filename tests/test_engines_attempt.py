"""A worker for Restate in this very process, on the real server: attempts, their ends, and what they replay."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from datetime import date, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import anyio
import httpx
import pytest
import restate
from conftest import ASYNCIO
from hypercorn.asyncio import serve
from hypercorn.config import Config
from places import Missing, Server, free_port, restate_server
from test_engines_restate import do_without

from pysagas import (
    CallNext,
    Commit,
    CompensationFailed,
    Effect,
    Parallel,
    Saga,
    SagaDefinitionError,
    SagaScope,
    SagaState,
    Step,
    current_effect,
    outcome_of,
    saga,
)
from pysagas.durable import NotRecordable, OtherRun, RunInterrupted
from pysagas.engines import _attempt
from pysagas.engines.restate import EngineError, RestateEngine

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.timeout(120),
    pytest.mark.parametrize("anyio_backend", ASYNCIO[:1], indirect=True),
    # What a worker leaves when it is stopped while the server still talks to it is hypercorn's.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

POLICY = restate.InvocationRetryPolicy(
    initial_interval=timedelta(milliseconds=50), exponentiation_factor=1.0, max_attempts=1_000_000
)
ENOUGH = 60  # seconds


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    try:
        program = restate_server()
    except Missing as reason:  # pragma: no cover - where there is no npm
        do_without(reason)
    with TemporaryDirectory(prefix="pysagas-restate-") as folder:
        server = Server(program, Path(folder))
        server.start()
        yield server
        server.kill()


class Place:
    """A worker's address, and an engine with a name that nobody else has."""

    def __init__(self, server: Server, sagas, **options) -> None:
        self.server = server
        self.port = free_port()
        self.name = f"test-{uuid4().hex}"
        self.options = options
        self.engine = self.make(sagas)

    def make(self, sagas) -> RestateEngine:
        return RestateEngine(
            sagas,
            name=self.name,
            ingress=self.server.ingress,
            invocation_retry_policy=POLICY,
            **self.options,
        )

    def register(self) -> None:
        body = {"uri": f"http://127.0.0.1:{self.port}", "force": True}
        answer = httpx.post(f"{self.server.admin}/deployments", json=body, timeout=20)
        assert answer.is_success, answer.text

    @asynccontextmanager
    async def worker(self, engine: RestateEngine | None = None) -> AsyncGenerator[RestateEngine]:
        engine = engine or self.engine
        config = Config()
        config.bind = [f"127.0.0.1:{self.port}"]
        config.loglevel = "CRITICAL"
        config.graceful_timeout = 0.1
        stop = asyncio.Event()
        task = asyncio.ensure_future(serve(engine.app, config, shutdown_trigger=stop.wait))
        try:
            with anyio.fail_after(ENOUGH):
                while True:
                    with suppress(OSError):
                        stream = await anyio.connect_tcp("127.0.0.1", self.port)
                        await stream.aclose()
                        break
                    await anyio.sleep(0.01)
                await anyio.to_thread.run_sync(self.register)
                yield engine
        finally:
            stop.set()
            # Hypercorn does not expect that tasks which it has cancelled take their time; nor that the
            # server has something more to say of a stream which it has just closed: a KeyError.
            try:
                await asyncio.wait_for(task, 1)
            except* (asyncio.CancelledError, asyncio.InvalidStateError, TimeoutError, KeyError):
                pass

    async def restart_server(self) -> None:
        await anyio.to_thread.run_sync(self.server.kill)
        await anyio.to_thread.run_sync(self.server.start)


class Shop:
    """What steps change, and gates for which they wait."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.reached: dict[str, asyncio.Event] = {}
        self.gates: dict[str, asyncio.Event] = {}

    def step(self, name, *, fails=None, back_fails=None, gate=False, **options):
        async def act(order: str) -> str:
            self.log.append(name)
            if gate:
                self.reached.setdefault(name, asyncio.Event()).set()
                await self.gates.setdefault(name, asyncio.Event()).wait()
            if fails is not None:
                raise fails
            return f"{order} {name}"

        async def back(order: str) -> None:
            self.log.append(f"-{name}")
            if back_fails is not None:
                raise back_fails

        return Step(act, back, name=name, **options)

    async def wait_for(self, name) -> None:
        await self.reached.setdefault(name, asyncio.Event()).wait()

    def let_go(self, name) -> None:
        self.gates.setdefault(name, asyncio.Event()).set()


async def ended(call):
    """The outcome of a run, whatever it raised."""
    try:
        return await call
    except (Exception, BaseExceptionGroup) as error:
        outcome = outcome_of(error) or getattr(error, "outcome", None)
        assert outcome is not None, repr(error)
        return outcome


def states(outcome):
    return {step.name: step.state.value for step in outcome.steps}


# --- ends -------------------------------------------------------------------------------------------


async def test_every_shape(anyio_backend, server):
    """Sequences, groups with and without a limit, sagas in sagas, functions and commits run there as in memory."""
    shop = Shop()
    inner = Saga([shop.step("c"), shop.step("d")], name="inner")

    @saga(name="function")
    async def function(scope: SagaScope, order: str) -> list[str]:
        first = await scope.step(shop.step("f"), order)
        try:
            async with scope.nested() as nested:
                await nested.step(shop.step("g"), order)
                await nested.step(shop.step("h", fails=ValueError("h")), order)
        except ValueError:
            first += "!"
        await scope.commit()
        members = [shop.step(f"m{n}").bind(order) for n in range(4)]
        return [first, *await scope.parallel(*members, limit=2)]

    data = Saga(
        [shop.step("a"), Parallel(shop.step("b"), inner, name="both"), Commit(), shop.step("e")],
        name="data",
    )
    place = Place(server, [data, function])
    async with place.worker() as engine:
        outcome = await engine.run(data, "x", run_id="1")
        assert (outcome.state, set(states(outcome).values())) == (SagaState.COMPLETED, {"completed"})
        assert [ran.path for ran in outcome.times][0] == (0,)
        assert {"passed": True}.items() <= {"passed": outcome.tree[-2].passed}.items()
        outcome = await engine.run(function, "y", run_id="2")
        assert outcome.value == ["y f!", "y m0", "y m1", "y m2", "y m3"]
        assert states(outcome)["g"] == "compensated"


@pytest.mark.parametrize("grouped", [False, True])
async def test_what_an_action_does_by_itself_ends_its_run_and_not_the_worker(
    anyio_backend, server, grouped
):
    """An action that quits, or awaits what was cancelled, fails its run, which is taken back; G8."""

    async def quits(order: str) -> None:
        raise SystemExit(3)

    async def waits(order: str) -> None:
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    shop = Shop()
    sagas = []
    for action in (quits, waits):
        last = Step(action, name="last")
        parts = [shop.step("a"), Parallel(last, shop.step("b")) if grouped else last]
        sagas.append(Saga(parts, name=action.__name__))
    place = Place(server, sagas)
    async with place.worker() as engine:
        for one in sagas:
            with pytest.raises(RunInterrupted) as caught:
                await engine.run(one, "x", run_id=one.name)
            assert states(caught.value.outcome)["a"] == "compensated"
    assert shop.log.count("-a") == 2


@pytest.mark.parametrize("error", [OSError("no answer"), SystemExit(4), asyncio.CancelledError()])
async def test_a_compensation_that_fails(anyio_backend, server, error):
    """What it raises, whatever that is, does not stop the others, and is told; G11."""
    shop = Shop()
    parts = [shop.step("a"), shop.step("b", back_fails=error), shop.step("c", fails=ValueError("c"))]
    whole = Saga(parts, name="whole")
    async with Place(server, [whole]).worker() as engine:
        with pytest.raises((CompensationFailed, RunInterrupted)) as caught:
            await engine.run(whole, "x", run_id="1")
    assert "be taken back" in str(caught.value)
    assert states(caught.value.outcome) == {
        "a": "compensated",
        "b": "compensation failed",
        "c": "compensated",
    }


async def test_names_and_errors_that_are_no_text(anyio_backend, server):
    """A lone surrogate, as of a file's name, stands with a backslash where Restate has it."""
    shop = Shop()

    async def fails(order: str) -> None:
        raise ValueError("file \udcff")

    good = shop.step("a")
    whole = Saga([Step(good.action, good.compensation, name="a \udcff"), Step(fails)], name="whole")
    async with Place(server, [whole]).worker() as engine:
        with pytest.raises(ValueError, match="file \udcff"), anyio.fail_after(ENOUGH):
            await engine.run(whole, "x", run_id="1")
    assert shop.log == ["a", "-a"]


@pytest.mark.parametrize("fails", [False, True])
async def test_an_outcome_with_more_than_restate_takes(anyio_backend, server, monkeypatch, fails):
    """Results that are too large together are left out of the outcome: the end is told all the same."""
    monkeypatch.setattr("pysagas.engines._worker.LARGEST", 1000)
    shop = Shop()

    async def large(order: str) -> str:
        return order * 2000

    end = Step(large, name="z") if not fails else shop.step("z", fails=OSError("z"))

    async def answer(effect: Effect, call_next: CallNext) -> object:
        return await call_next() if effect.name != "answered" else [await call_next()]

    answered = Saga([Step(large, name="answered")], name="inner", middleware=[answer])
    whole = Saga([Step(large), answered, end], name="whole")
    async with Place(server, [whole]).worker() as engine:
        if fails:
            with pytest.raises(OSError, match="z"):
                await engine.run(whole, "x", run_id="1")
        else:
            outcome = await engine.run(whole, "x", run_id="1")
            assert outcome.state is SagaState.COMPLETED
            assert [(step.state.value, step.result) for step in outcome.steps] == [
                ("completed", None)
            ] * 3


async def test_g10_a_limit_for_a_rollback_is_refused_where_a_function_has_it(anyio_backend, server):
    """A saga that a function calls is refused when it is met, and the run is taken back; G10."""
    shop = Shop()

    @saga(name="function")
    async def function(scope: SagaScope, order: str) -> None:
        await scope.step(shop.step("a"), order)
        await scope.step(Saga([shop.step("b")], rollback_timeout=3), order)

    async with Place(server, [function]).worker() as engine:
        with pytest.raises(SagaDefinitionError, match="which Restate cannot keep"):
            await engine.run(function, "x", run_id="1")
    assert shop.log == ["a", "-a"]


async def test_a_cancelled_run_begins_nothing_more(anyio_backend, server):
    """What is in flight ends; what a function swallows comes again; and all is taken back; G8."""
    shop = Shop()

    @saga(name="swallows")
    async def swallows(scope: SagaScope, order: str) -> None:
        with suppress(BaseException):
            await scope.parallel(shop.step("a", gate=True).bind(order), shop.step("b").bind(order))
            await scope.step(shop.step("never"), order)

    async with Place(server, [swallows]).worker() as engine:
        await engine.submit(swallows, "x", run_id="1")
        await shop.wait_for("a")
        assert await engine.outcome("1") is None
        await engine.cancel("1")
        await engine.cancel("1")
        await anyio.sleep(0.2)  # nobody can tell when the worker has heard of it
        shop.let_go("a")
        with pytest.raises(
            RunInterrupted, match="run '1' was cancelled, and the run has been taken back"
        ):
            await engine.run(swallows, "x", run_id="1")
    assert sorted(shop.log) == ["-a", "-b", "a", "b"]


async def test_a_branch_that_waits_for_no_step_is_told(anyio_backend, server, monkeypatch, caplog):
    """Somebody is told which code holds a run up by waiting for what is no step."""
    monkeypatch.setattr(_attempt, "LONG", 0.05)
    shop = Shop()
    told = asyncio.Event()
    monkeypatch.setattr(_attempt.logger, "handlers", [])

    @saga(name="waits")
    async def waits(scope: SagaScope, order: str) -> None:
        await scope.step(shop.step("a"), order)
        while not any("waits for something that is no step" in text for text in caplog.messages):
            await anyio.sleep(0.01)
        told.set()

    async with Place(server, [waits]).worker() as engine:
        await engine.run(waits, "x", run_id="1")
    assert told.is_set()


@pytest.mark.parametrize("in_a_group", [False, True])
async def test_a_time_limit_around_steps_ends_the_attempt(anyio_backend, server, in_a_group, caplog):
    """What no replay could keep is told, and no failure of the run: it goes on where it keeps none."""
    shop = Shop()
    limits: list[float | None] = [0.05, None]
    tries: list[str] = []

    async def act(order: str) -> str:
        tries.append(order)
        if len(tries) == 1:
            await anyio.sleep_forever()
        return order

    @saga(name="inner")
    async def inner(scope: SagaScope, order: str) -> str:
        async with asyncio.timeout(limits.pop(0)):
            return await scope.step(Step(act, lambda order: shop.log.append("-act"), name="act"), order)

    @saga(name="limited")
    async def limited(scope: SagaScope, order: str) -> str:
        if not in_a_group:
            return await scope.step(inner, order)
        got, _ = await scope.parallel(inner.bind(order), shop.step("b").bind(order))
        return got

    async with Place(server, [limited]).worker() as engine:
        outcome = await engine.run(limited, "x", run_id="1")
    assert (outcome.value, tries) == ("x", ["x", "x"])
    assert "-act" not in shop.log
    assert "was cancelled while it waited for action 'act' at" in caplog.text
    assert "by asyncio.timeout or the like: a replay could not keep such a limit" in caplog.text


async def test_an_action_has_the_context_of_its_branch_and_keeps_its_own(anyio_backend, server):
    """What was set before is seen by an action and by what it calls; what it sets is its own affair."""
    number: ContextVar[int] = ContextVar("number", default=0)
    seen: list[int] = []

    async def act() -> None:
        await anyio.sleep(0)
        seen.append(number.get())
        number.set(-1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(note)

    async def note() -> None:
        seen.append(number.get())

    @saga(name="branch")
    async def branch(scope: SagaScope, mine: int) -> None:
        number.set(mine)
        await scope.step(act)
        await scope.step(act)

    @saga(name="whole")
    async def whole(scope: SagaScope) -> None:
        number.set(1)
        await scope.step(act)
        await scope.parallel(branch.bind(2))
        await scope.step(act)

    async with Place(server, [whole]).worker() as engine:
        await engine.run(whole, run_id="1")
    assert seen == [1, -1, 2, -1, 2, -1, 1, -1]


# --- tries ------------------------------------------------------------------------------------------


class Nothing(Exception):
    """By this a step says that it did nothing."""


async def test_a_policy_for_a_step(anyio_backend, server):
    """A step with one of Restate's policies is tried again, durably; a failure that is terminal is not; G3."""
    tries: dict[str, int] = {}

    def flaky(name, *errors):
        async def act(order: str) -> str:
            tries[name] = tries.get(name, 0) + 1
            if tries[name] <= len(errors):
                raise errors[tries[name] - 1]
            effect = current_effect()
            assert effect is not None
            return effect.key

        return Saga([Step(act, lambda order: None, name=name, not_applied=Nothing)], name=name)

    sagas = {
        "second": flaky("second", OSError("1")),
        "never": flaky("never", OSError("1"), OSError("2"), OSError("3")),
        "terminal": flaky("terminal", restate.TerminalError("no")),
        "in doubt": flaky("in doubt", OSError("1"), Nothing(), Nothing()),
        "nothing": flaky("nothing", Nothing(), Nothing(), Nothing()),
    }
    policy = restate.RunOptions(max_attempts=3, initial_retry_interval=timedelta(milliseconds=10))
    place = Place(server, sagas.values(), retries=dict.fromkeys(sagas, policy))
    async with place.worker() as engine:
        found = {
            name: states(await ended(engine.run(one, "x", run_id=name))) for name, one in sagas.items()
        }
    assert tries == {"second": 2, "never": 3, "terminal": 1, "in doubt": 3, "nothing": 3}
    assert {name: state[name] for name, state in found.items()} == {
        "second": "completed",
        "never": "compensated",
        "terminal": "compensated",
        "in doubt": "compensated",
        "nothing": "not applied",
    }


# --- replays ----------------------------------------------------------------------------------------


async def test_d3_what_is_recorded_is_given_and_not_run_again(anyio_backend, server):
    """After the server was killed and is there again: results, failures, ways back, tries, commits; D3."""
    shop = Shop()
    kept: list[object] = []

    async def lost(order: str) -> object:
        shop.log.append("lost")
        return kept  # what is not recordable: no type says what it is

    async def undo_lost(result: object) -> None:
        shop.log.append(f"undo lost {result is kept}")

    async def tried(order: str) -> str:
        shop.log.append("tried")
        if shop.log.count("tried") < 2:
            raise OSError("once")
        return "tried"

    @saga(name="long")
    async def long(scope: SagaScope, order: str) -> list[str]:
        got = [await scope.step(shop.step("a"), order)]
        try:
            await scope.step(shop.step("b", fails=ValueError("b")), order)
        except ValueError as error:
            got.append(str(error))
        got.append(await scope.step(Step(tried, name="tried"), order))
        for step in (
            Step(lost, undo=undo_lost, name="lost"),
            Step(lost, lambda order: shop.log.append("-lost"), undo=undo_lost, name="lost too"),
        ):
            try:
                await scope.step(step, order)
            except NotRecordable:
                got.append(step.name)
        await scope.commit()
        await scope.step(shop.step("gate", gate=True), order)
        got += await scope.parallel(shop.step("c").bind(order), shop.step("d").bind(order))
        return got

    lost.__annotations__["return"] = date
    policy = restate.RunOptions(max_attempts=2, initial_retry_interval=timedelta(milliseconds=10))
    place = Place(server, [long], retries={"tried": policy})
    async with place.worker() as engine:
        await engine.submit(long, "x", run_id="1")
        await shop.wait_for("gate")
        await place.restart_server()
        shop.let_go("gate")
        outcome = await engine.run(long, "x", run_id="1")
    assert outcome.value == ["x a", "b", "tried", "lost", "lost too", "x c", "x d"]
    once = [what for what in shop.log if what != "gate"]
    assert sorted(once) == sorted(
        ["a", "b", "-b", "tried", "tried", "lost", "undo lost True"]
        + ["lost", "undo lost True", "c", "d"]
    )


async def test_d3_a_rollback_goes_on_where_it_was(anyio_backend, server):
    """After the server was killed in a compensation, what had failed there has failed, and the rest runs; D3."""
    shop = Shop()
    waiting = asyncio.Event()
    go_on = asyncio.Event()

    async def back(order: str) -> None:
        shop.log.append("-gate")
        waiting.set()
        await go_on.wait()

    async def act(order: str) -> str:
        return order

    whole = Saga(
        [
            shop.step("a"),
            Step(act, back, name="gate"),
            shop.step("b", back_fails=OSError("no answer")),
            shop.step("c", fails=ValueError("c")),
        ],
        name="whole",
    )
    place = Place(server, [whole])
    async with place.worker() as engine:
        await engine.submit(whole, "x", run_id="1")
        await waiting.wait()
        await place.restart_server()
        go_on.set()
        with pytest.raises(CompensationFailed) as caught:
            await engine.run(whole, "x", run_id="1")
    assert [str(error) for error in caught.value.failures] == ["no answer"]
    assert isinstance(caught.value.error, ValueError)
    assert [shop.log.count(what) for what in ("a", "b", "c", "-c", "-b", "-a")] == [1] * 6


async def test_d3_an_undo_in_doubt_of_what_was_not_recordable_is_left_to_people(anyio_backend, server):
    """Where only its undo takes it back, and the attempt ended in that, nobody has the result any more; D3, D5."""
    kept: list[object] = []
    waiting, go_on = asyncio.Event(), asyncio.Event()

    async def lost(order: str) -> date:
        return kept  # type: ignore[return-value]

    async def undo(result: object) -> None:
        assert result is kept
        waiting.set()
        await go_on.wait()

    whole = Saga([Step(lost, undo=undo, name="lost")], name="whole")
    place = Place(server, [whole])
    async with place.worker() as engine:
        await engine.submit(whole, "x", run_id="1")
        await waiting.wait()
        await place.restart_server()
        go_on.set()
        with pytest.raises(CompensationFailed, match="take it back by hand"):
            await engine.run(whole, "x", run_id="1")


async def test_an_attempt_waits_for_the_one_before_it(anyio_backend, server):
    """A thread cannot be cut off: the next attempt begins when what runs in it has ended."""
    running, go_on = threading.Event(), threading.Event()
    most = [0, 0]

    def work(order: str) -> str:
        most[0] += 1
        most[1] = max(most)
        running.set()
        assert go_on.wait(ENOUGH)
        most[0] -= 1
        return order

    whole = Saga([Step(work, lambda order: None, name="work", blocking=True)], name="whole")
    place = Place(server, [whole])
    async with place.worker() as engine:
        await engine.submit(whole, "x", run_id="1")
        await anyio.to_thread.run_sync(running.wait)
        await place.restart_server()
        await anyio.sleep(0.3)  # the server begins another attempt, which can be seen by nobody
        go_on.set()
        outcome = await engine.run(whole, "x", run_id="1")
    assert (outcome.state, most[1]) == (SagaState.COMPLETED, 1)


async def test_d4_a_changed_saga_waits_until_it_is_as_it_was(anyio_backend, server):
    """Nothing is touched by a worker whose saga returns something else, or that has no such saga; D4."""
    shop = Shop()
    whole = Saga([shop.step("a"), shop.step("gate", gate=True)], name="whole")

    async def other(order: str) -> date:
        raise AssertionError

    changed = Saga([Step(other, name="a"), Step(other, name="gate")], name="whole")
    place = Place(server, [whole])
    async with place.worker() as engine:
        await engine.submit(whole, "x", run_id="1")
        await shop.wait_for("gate")
        sagas = engine._sagas
        for others, problem in (
            ({("whole", None): changed}, "cannot be read as"),
            ({}, "saga 'whole' is none of those given to"),
        ):
            engine._sagas = others  # as another worker's, from the next attempt on
            await place.restart_server()
            while problem not in await anyio.to_thread.run_sync(last_failure, place):
                await anyio.sleep(0.05)
        engine._sagas = sagas
        shop.let_go("gate")
        outcome = await engine.run(whole, "x", run_id="1")
    assert outcome.state is SagaState.COMPLETED
    assert shop.log == ["a", "gate", "gate"]


def last_failure(place: Place) -> str:
    """Why the last attempt at a run did not succeed, as the server shows it."""
    query = f"select last_failure from sys_invocation where target_service_name = '{place.name}'"
    answer = httpx.post(
        f"{place.server.admin}/query", json={"query": query}, headers={"accept": "application/json"}
    )
    return "".join(row.get("last_failure") or "" for row in answer.json().get("rows", ()))


async def test_d1_an_id_belongs_to_one_call(anyio_backend, server):
    """While a run is under way, the same call waits for it, and another one is refused; D1."""
    shop = Shop()
    whole = Saga([shop.step("a", gate=True)], name="whole")
    async with Place(server, [whole]).worker() as engine:
        await engine.submit(whole, "x", run_id="1")
        await shop.wait_for("a")
        with pytest.raises(OtherRun, match=r'has other arguments: recorded are \[\["x"\],{}\], given'):
            await engine.submit(whole, "y", run_id="1")
        await engine.submit(whole, "x", run_id="1")
        shop.let_go("a")
        assert (await engine.run(whole, "x", run_id="1")).state is SagaState.COMPLETED
        # Nobody has begun such a run: there is nothing to cancel, and nothing to tell.
        for what in ("call", "cancel"):
            answer = await engine._ask("POST", f"{engine._key('nobody')}/{what}")
            assert (answer.status_code, answer.content) == (200, b"")
    assert shop.log == ["a"]


async def test_a_saga_that_no_worker_knows(anyio_backend, server):
    """That no worker has its saga is said before the run is started, and its id may be used when one has."""
    shop = Shop()
    known, unknown = Saga([shop.step("a")], name="known"), Saga([shop.step("b")], name="unknown")
    place = Place(server, [known])
    async with place.worker():
        with pytest.raises(EngineError, match="saga 'unknown' is none of those given to"):
            await place.make([known, unknown]).run(unknown, "x", run_id="1")
    assert shop.log == []
    async with place.worker(place.make([known, unknown])) as engine:
        outcome = await engine.run(unknown, "x", run_id="1")
    assert outcome.state is SagaState.COMPLETED


async def test_a_run_waits_for_a_worker_that_knows_its_saga(anyio_backend, server, monkeypatch):
    """A worker that is behind loses no run that reaches it: the next one has it."""
    shop = Shop()
    known, unknown = Saga([shop.step("a")], name="known"), Saga([shop.step("b")], name="unknown")
    place = Place(server, [known])
    client = place.make([known, unknown])
    client._served.add(("unknown", None))  # as it was told by another worker
    async with place.worker():
        await client.submit(unknown, "x", run_id="1")
        with anyio.move_on_after(1):
            await client.run(unknown, "x", run_id="1")
        assert await client.outcome("1") is None
    async with place.worker(client):
        outcome = await client.run(unknown, "x", run_id="1")
    assert outcome.state is SagaState.COMPLETED
