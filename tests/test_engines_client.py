"""The engine on Restate, as far as no server is needed: what it refuses, and what it says when nobody answers."""

from __future__ import annotations

import builtins
import json
import ssl
import sys
from datetime import timedelta

import anyio
import anyio.abc
import httpx
import pytest
import restate
from anyio import fail_after
from places import free_port

from pysagas import Bound, Parallel, Saga, SagaDefinitionError, SagaScope, Step, saga
from pysagas.durable import NotRecordable, OtherRun, SagaChanged
from pysagas.engines._attempt import _pause
from pysagas.engines.restate import EngineError, EngineUnavailable, RestateEngine

pytestmark = pytest.mark.anyio

ENOUGH = 20  # seconds


async def book(what: str) -> str:
    return f"booked {what}"


async def cancel(what: str) -> None: ...


trip = Saga([Step(book, cancel)], name="trip")
trip_2 = Saga([Step(book, cancel)], name="trip", version="2")


@saga(name="by function")
async def by_function(scope: SagaScope, what: str) -> None:
    await scope.step(book, what, compensation=cancel)


# --- making one -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sagas", "error", "message"),
    [
        ([trip, book], TypeError, "sagas must be sagas, and hold <function book"),
        (
            [trip, Saga([Step(book)], name="trip")],
            ValueError,
            "two sagas have the name 'trip' and the version None; a run finds its saga by both",
        ),
    ],
)
def test_sagas_that_cannot_be_told_apart_are_refused(sagas, error, message):
    """What is no saga, or has the name of another one, is refused before anything is served."""
    with pytest.raises(error, match=message):
        RestateEngine(sagas)


LIMITED = Saga([Step(book, cancel)], name="limited", rollback_timeout=3)


@pytest.mark.parametrize(
    "refused",
    [
        LIMITED,
        Saga([LIMITED]),
        Saga([Parallel(Step(book, cancel), Saga([LIMITED]))]),
        Saga([LIMITED.bind("x")]),
    ],
    ids=["itself", "inner", "in a group", "bound"],
)
def test_g10_a_limit_for_a_rollback_is_refused(refused):
    """What a replay could not keep is refused, wherever in a saga it stands (G10)."""
    with pytest.raises(SagaDefinitionError, match="rollback_timeout=3.*which Restate cannot keep"):
        RestateEngine([refused])


def test_a_policy_that_a_replay_could_not_keep_is_refused():
    """A policy for a step may limit its tries, and not their time."""
    with pytest.raises(ValueError, match="the policy of step 'book' has a max_duration"):
        RestateEngine([trip], retries={"book": restate.RunOptions(max_duration=timedelta(1))})


TWICE = restate.RunOptions(max_attempts=2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sagas": trip}, TypeError, "must be a list of sagas, not <Saga 'trip'>; put it in a list"),
        ({"name": ""}, ValueError, "name must be a letter, and then .*; not ''"),
        ({"name": "My Shop"}, ValueError, "as Restate names services; not 'My Shop'"),
        ({"name": None}, ValueError, "not None"),
        (
            {"ingress": "localhost:8080"},
            ValueError,
            "a URL like http://127.0.0.1:8080, not 'localhost:8080'",
        ),
        ({"ingress": None}, ValueError, "ingress must be a URL"),
        ({"longest_step": 5}, TypeError, "longest_step must be a timedelta above 0, not 5"),
        ({"retention": "30d"}, TypeError, "retention must be a timedelta above 0, not '30d'"),
        ({"retention": timedelta(0)}, TypeError, "retention must be a timedelta above 0"),
        ({"patience": timedelta(1)}, TypeError, "patience must be a number of seconds, not datetime"),
        ({"patience": True}, TypeError, "patience must be a number of seconds, not True"),
        (
            {"retries": {"book": 3}},
            TypeError,
            "policy of step 'book' must be restate.RunOptions, not 3",
        ),
        (
            {"retries": {"bock": TWICE}},
            ValueError,
            "a policy for 'bock', .*steps there: 'book', 'tell'",
        ),
    ],
)
def test_options_that_cannot_work_are_refused(options, error, message):
    """What the server, or the first call, would refuse is refused here, where it is written."""
    inner = Saga([trip, Step(book, name="tell").bind("x")], name="inner")
    with pytest.raises(error, match=message):
        RestateEngine(**{"sagas": [Saga([Parallel(inner)])], **options})


def test_a_policy_for_a_step_that_a_function_may_run():
    """What steps a function runs is not known before it does."""
    RestateEngine([by_function, Saga([Step(book)])], retries={"who knows": TWICE})
    RestateEngine([Saga([by_function], name="around")], retries={"who knows": TWICE})


@pytest.mark.parametrize("missing", ["httpx", "restate"])
def test_what_to_install(missing, monkeypatch):
    """Without Restate's library, or that for HTTP, it says what to install."""
    for name in [name for name in sys.modules if name.split(".")[0] in (missing, "restate")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("pysagas.engines._attempt", "pysagas.engines._worker"):
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def refuse(name, *rest):
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf'needs {missing}.*pip install "pysagas\[restate\]"'):
        RestateEngine([trip])


def test_it_says_who_it_is():
    """An engine shows its name and where its server is."""
    assert "<RestateEngine 'trips' at http://here:1>" == repr(
        RestateEngine([trip], name="trips", ingress="http://here:1/")
    )


def test_certificates_are_loaded_where_they_are_needed():
    """Loading them takes longer than a call: for a server that encrypts nothing it is not done."""
    assert RestateEngine([trip])._tls is False
    assert isinstance(RestateEngine([trip], ingress="https://here")._tls, ssl.SSLContext)


async def test_another_loop_than_asyncio_is_refused(anyio_backend_name):
    """A worker on Trio says that it has to run on asyncio; there it runs."""
    app = RestateEngine([trip]).app
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "http_version": "2", "method": "GET", "path": "/nowhere", "headers": []}
    if anyio_backend_name == "trio":
        with pytest.raises(EngineError, match="runs on asyncio"):
            await app(scope, receive, send)
    else:
        await app(scope, receive, send)
        assert 404 == sent[0]["status"]


# --- calling it -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"saga": book, "run_id": "1"}, TypeError, r"engine\.run: it takes a saga, not <function"),
        ({"saga": trip, "run_id": ""}, ValueError, "run_id must be a string that is not empty"),
        (
            {"saga": trip, "run_id": "1", "exceptions": 3},
            TypeError,
            "must be exception types, and hold 3",
        ),
        (
            {"saga": trip_2, "run_id": "1"},
            EngineError,
            "saga 'trip', version '2' is none of those given to <RestateEngine .*: 'by function', 'trip'",
        ),
        (
            {"saga": trip, "run_id": "1", "args": (print,)},
            NotRecordable,
            "its arguments cannot be recorded",
        ),
        ({"saga": trip, "run_id": "1", "args": ()}, TypeError, "cannot take these arguments|missing"),
    ],
)
async def test_a_call_that_cannot_work_is_refused_at_once(call, error, message):
    """What cannot work is refused before the server is asked: there is none here."""
    engine = RestateEngine([trip, by_function], ingress="http://127.0.0.1:1")
    call = dict(call)
    with pytest.raises(error, match=message):
        await engine.run(call.pop("saga"), *call.pop("args", ("x",)), **call)


async def test_a_server_that_does_not_answer():
    """Where nobody answers for so long, it says so, and that asking again is harmless."""
    engine = RestateEngine([trip], ingress=f"http://127.0.0.1:{free_port()}", patience=0.2)
    with fail_after(ENOUGH):
        with pytest.raises(
            EngineUnavailable, match="does not answer: ConnectError.*call again with the"
        ):
            await engine.run(trip, "x", run_id="1")
        with pytest.raises(EngineUnavailable):
            await engine.outcome("1")
        with pytest.raises(EngineUnavailable):
            await engine.cancel("1")


class Line:
    """What stands in for the way to a server: does the next of these things at each request."""

    def __init__(self, *doings):
        self.left = [*doings]
        self.timeouts = []

    def __call__(self, *, timeout, verify):
        self.timeouts.append(timeout.read)
        return self

    async def __aenter__(self):
        return self

    async def __aexit__(self, *error):
        pass

    async def request(self, method, url, **body):
        return await self.left.pop(0)()


async def drops():
    raise httpx.ReadError("gone")


async def drops_later():
    await anyio.sleep(0.05)
    await drops()


async def says_that_it_starts():
    return httpx.Response(503, content=b"starting")


async def answers():
    return httpx.Response(200, content=b"here")


async def test_a_server_that_was_there_until_now_is_waited_for_anew(monkeypatch):
    """Whoever waits for a run, for as long as that takes, has all his patience left when the server goes."""
    monkeypatch.setattr("pysagas.engines.restate.LONGEST_PAUSE", 0.02)
    monkeypatch.setattr("pysagas.engines.restate.FIRST_PAUSE", 0.0)
    for waits in (True, False):
        line = Line(drops_later, drops, answers)
        monkeypatch.setattr(httpx, "AsyncClient", line)
        engine = RestateEngine([trip], patience=0.01)
        if waits:
            assert b"here" == (await engine._ask("GET", "attach", waits=True)).content
        else:
            with pytest.raises(EngineUnavailable, match="does not answer: ReadError: gone"):
                await engine._ask("GET", "output")
        assert line.timeouts == [None if waits else 1.0]


async def test_a_server_that_is_starting_is_waited_for(monkeypatch):
    """What a proxy, or a server that is not ready, answers is no answer to what was asked."""
    monkeypatch.setattr("pysagas.engines.restate.FIRST_PAUSE", 0.0)
    monkeypatch.setattr(httpx, "AsyncClient", Line(says_that_it_starts, says_that_it_starts, answers))
    engine = RestateEngine([trip], patience=10)
    assert b"here" == (await engine._ask("GET", "output")).content
    engine = RestateEngine([trip], patience=-1)
    monkeypatch.setattr(httpx, "AsyncClient", Line(says_that_it_starts))
    with pytest.raises(EngineUnavailable, match="does not answer: 503 starting;"):
        await engine.cancel("1")


async def test_a_server_that_takes_a_call_and_says_nothing(monkeypatch):
    """Only an outcome may take as long as a run does; else no answer in time is none."""

    async def hold(stream):
        async with stream:
            await anyio.sleep_forever()

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        engine = RestateEngine([trip], ingress=f"http://127.0.0.1:{port}", patience=0.1)
        with fail_after(ENOUGH):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(listener.serve, hold)
                for call in (engine.outcome("1"), engine.cancel("1")):
                    with pytest.raises(EngineUnavailable, match="ReadTimeout"):
                        await call
                tasks.cancel_scope.cancel()


@pytest.mark.parametrize("run_id", [".", "..", "cut \udcff"])
async def test_a_run_id_that_cannot_stand_in_a_url_is_refused(run_id):
    """It would name another place on the server, or none."""
    engine = RestateEngine([trip], ingress="http://127.0.0.1:1")
    for call in (engine.run(trip, "x", run_id=run_id), engine.outcome(run_id), engine.cancel(run_id)):
        with pytest.raises(ValueError, match="run_id cannot be .*: it stands in the path of a URL"):
            await call


async def test_arguments_that_are_too_large_are_refused(monkeypatch):
    """What Restate would refuse, again and again, is refused before the run is started."""
    monkeypatch.setattr("pysagas.engines._limits.LARGEST_VALUE", 1000)
    engine = RestateEngine([trip], ingress="http://127.0.0.1:1")
    with pytest.raises(
        NotRecordable, match="what it is called with is 2,010 bytes, and on Restate at most 1,000"
    ):
        await engine.run(trip, "x" * 2001, run_id="1")


class Answers:
    """A server that gives the next of these answers to each request."""

    def __init__(self, engine, monkeypatch, *answers):
        self.left = [*answers]
        self.asked = []
        monkeypatch.setattr(engine, "_ask", self.ask)

    async def ask(self, method, path, content=b"{}", *, waits=False):
        self.asked.append(f"{method} {path}")
        status, body = self.left.pop(0)
        return httpx.Response(status, content=body if isinstance(body, bytes) else json.dumps(body))


async def test_what_the_server_refuses_is_said(monkeypatch):
    """An answer that is an error is raised, with what was asked and what the server says."""
    engine = RestateEngine([trip])
    Answers(engine, monkeypatch, (404, {"message": "service 'pysagas' not found"}))
    with pytest.raises(
        EngineError, match="trip' was not started: .* answers 404: service 'pysagas' not"
    ):
        await engine.run(trip, "x", run_id="1")
    Answers(engine, monkeypatch, (404, b""))
    with pytest.raises(EngineError, match="answers 404: nothing; is that its ingress, port 8080"):
        await engine.run(trip, "x", run_id="1")
    Answers(engine, monkeypatch, (404, {"message": "invocation not found"}))
    with pytest.raises(EngineError, match="^there is no run '1': .* answers 404: invocation not found"):
        await engine.outcome("1")
    Answers(engine, monkeypatch, (503, b"<html>"))
    with pytest.raises(EngineError, match="answers 503: <html>"):
        await engine.outcome("1")
    Answers(engine, monkeypatch, (470, b""), (500, b"no"))
    with pytest.raises(EngineError, match="run '1' cannot be cancelled: .* answers 500: no"):
        await engine.cancel("1")


async def test_a_run_that_no_worker_has_begun_is_cancelled_when_one_does(monkeypatch):
    """Cancelling waits for a worker; not for ever; and one that has ended stays as it is."""
    engine = RestateEngine([trip])
    server = Answers(engine, monkeypatch, (470, b""), (200, b""), (470, b""), (200, b"inv_1"))
    await engine.cancel("a/b c")
    assert [
        "GET restate/workflow/pysagas/a%2Fb%20c/output",
        "POST pysagas/a%2Fb%20c/cancel",
    ] * 2 == server.asked
    Answers(engine, monkeypatch, (200, {"state": "completed"}))
    await engine.cancel("1")
    Answers(engine, monkeypatch, (400, b"no"))
    with pytest.raises(EngineError, match="run '1': .* answers 400: no"):
        await engine.cancel("1")
    engine = RestateEngine([trip], patience=-1)
    Answers(engine, monkeypatch, (470, b""), (200, b""))
    with pytest.raises(EngineUnavailable, match="no worker has begun with it"):
        await engine.cancel("1")


async def test_d1_another_run_of_the_id_is_found_when_it_has_ended(monkeypatch):
    """Where no worker can tell with what a run was started, its end does (D1)."""
    engine = RestateEngine([trip, trip_2])
    other = json.dumps({"saga": "trip", "version": "2", "args": '[["x"],{}]'})
    accepted = (202, {"status": "PreviouslyAccepted"})
    ended = (200, {"call": other, "state": "completed", "value": "null", "error": None, "records": []})
    for known in ((200, b""), (500, b"no")):
        Answers(engine, monkeypatch, (200, b""), accepted, known, ended)
        engine._served.clear()
        with pytest.raises(OtherRun, match="run '1' is one of saga 'trip', version '2', not of 'trip'"):
            await engine.run(trip, "x", run_id="1")


async def test_the_outcome_of_a_saga_that_is_not_given(monkeypatch):
    """The outcome of a saga that this engine does not have cannot be read here; it says which it was."""
    engine = RestateEngine([trip])
    call = json.dumps({"saga": "other", "version": None, "args": "[[],{}]"})
    Answers(engine, monkeypatch, (200, {"call": call, "state": "completed"}))
    with pytest.raises(EngineError, match="run '1': saga 'other' is none of those given"):
        await engine.outcome("1")


async def test_a_run_that_completed_is_not_taken_back_later(monkeypatch):
    """What has completed on Restate is not taken back by `rollback`, which says so."""
    engine = RestateEngine([trip])
    call = json.dumps({"saga": "trip", "version": None, "args": '[["x"],{}]'})
    Answers(
        engine,
        monkeypatch,
        (200, {"call": call, "state": "completed", "value": "null", "error": None, "records": []}),
    )
    outcome = await engine.outcome("1")
    assert outcome is not None
    with pytest.raises(EngineError, match="run '1' has completed on Restate"):
        await outcome.rollback()


# --- the worker's side --------------------------------------------------------------------------------


def test_a_call_that_a_worker_cannot_read():
    """A saga that it does not have, and arguments that it cannot take, are told apart from what fails."""
    engine = RestateEngine([trip])

    def call(saga, args):
        return json.dumps({"saga": saga, "version": None, "args": args}).encode()

    assert (trip, ("x",), {}) == engine._read_call(call("trip", '[["x"],{}]'))
    with pytest.raises(SagaChanged, match="saga 'other' is none of those given"):
        engine._read_call(call("other", "[[],{}]"))
    with pytest.raises(NotRecordable, match="cannot be read"):
        engine._read_call(call("trip", "[[5],{}]"))
    with pytest.raises(TypeError):
        engine._read_call(call("trip", "[[],{}]"))


def test_pauses_between_tries():
    """The pause grows, up to a limit, until the tries are used up; some failures are not tried again."""
    options = restate.RunOptions(
        max_attempts=4,
        initial_retry_interval=timedelta(seconds=1),
        retry_interval_factor=3.0,
        max_retry_interval=timedelta(seconds=5),
    )
    error = OSError()
    assert [1.0, 3.0, 5.0] == [_pause(options, n, error).total_seconds() for n in (1, 2, 3)]
    assert _pause(options, 4, error) is None
    assert _pause(options, 1, restate.TerminalError("no")) is None
    assert _pause(options, 1, NotRecordable("no")) is None
    assert _pause(None, 1, error) is None
    assert [0.05, 0.1] == [_pause(restate.RunOptions(), n, error).total_seconds() for n in (1, 2)]
    assert isinstance(trip.bind("x"), Bound)
