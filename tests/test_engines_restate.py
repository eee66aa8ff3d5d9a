"""Sagas on Restate, the real server: guarantee by guarantee, and with workers and servers that are killed.

Without npm, which installs the server, these tests are skipped, unless ``PYSAGAS_ENGINES=required``.
``PYSAGAS_KILLS`` sets how many runs are killed at any time; ``PYSAGAS_SEED`` where.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from random import Random

import anyio
import places
import pytest
from conformance_page import PAGE, cells, rows
from places import SERVER, Missing, Restate, Server, restate, restate_server

from pysagas.engines.restate import EngineError, RestateEngine
from pysagas.testing.conformance import CHECKS, SAGAS, check
from pysagas.testing.conformance import _guarantees as guarantees
from pysagas.testing.conformance import _sagas as sagas
from pysagas.testing.conformance._stage import Run, Stage

KILLS = int(os.environ.get("PYSAGAS_KILLS", "4"))
SEED = os.environ.get("PYSAGAS_SEED", "2026")
ON_ASYNCIO = pytest.mark.parametrize("anyio_backend", [("asyncio", {"debug": True})], ids=["asyncio"])

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240 + 10 * KILLS)]


@pytest.fixture(scope="session")
def server() -> Iterator[Restate]:
    with ExitStack() as stack:
        try:
            started = stack.enter_context(restate())
        except Missing as reason:  # pragma: no cover - where there is no npm
            do_without(reason)
        yield started


def do_without(reason: Missing) -> None:
    if os.environ.get("PYSAGAS_ENGINES") == "required":
        raise reason
    pytest.skip(str(reason))


@pytest.fixture
def place(server: Restate) -> Restate:
    """The server with one worker."""
    server.workers.kill()
    server.workers.start()
    return server


@pytest.fixture
def stage(place: Restate, tmp_path) -> Stage:
    return Stage(place, tmp_path, [])


# --- guarantee by guarantee ------------------------------------------------------------------------


@ON_ASYNCIO
async def test_restate_is_as_the_page_says(anyio_backend, place):
    """Each guarantee holds on Restate, or does not in the way that is said; G1 to G15, D1 to D5."""
    table = rows(PAGE.read_text(encoding="utf-8"))

    report = await check(place)

    assert report.ok, report
    assert cells(report) == [row[table[0].index("Restate")] for row in table[1:]]


async def test_a_program_on_any_loop_starts_runs(anyio_backend, place):
    """Who starts a run, cancels it, and waits for it, may be on Trio; G1, G8, D1."""
    chosen = [one for one in CHECKS if one.guarantee in ("G1", "G8", "D1", "")]

    report = await check(place, chosen)

    assert report.ok, report


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_a_worker_on_trio_is_refused(anyio_backend):
    """Restate's library knows asyncio alone, and the worker says so."""
    with pytest.raises(EngineError, match="runs on asyncio"):
        await RestateEngine(SAGAS).app({"type": "http"}, None, None)


# --- killed ----------------------------------------------------------------------------------------


@ON_ASYNCIO
@pytest.mark.parametrize("kill", guarantees.KILLS)
async def test_a_server_that_is_killed_goes_on_where_it_was(anyio_backend, stage, place, kill):
    """Started again on its folder, it runs nothing again but what was in flight; who waits, waits; D3."""
    saga, faults, lines, in_flight = guarantees.KILLS[kill]
    run = stage(saga, **faults)
    async with run.running():
        for line in lines:
            await run.wait_for(line)
        await anyio.to_thread.run_sync(place.server.kill)
        await anyio.to_thread.run_sync(place.server.start)
        run.let_all_go()

    twice = {what for what in in_flight if run.begun[what] == 2}
    guarantees.expect_begun(run, twice, 2)
    if kill == "in a compensation":
        guarantees.expect_error(run.ending, sagas.Refused)
        guarantees.expect_taken_back(run, run.ending)
    else:
        assert run.ending.state == "completed", run.ending


@ON_ASYNCIO
@pytest.mark.parametrize("kill", guarantees.KILLS)
async def test_another_worker_carries_a_run_on(anyio_backend, stage, place, kill):
    """Of two workers behind one address, the one that has the run is killed, and nobody starts another; D3."""
    saga, faults, lines, in_flight = guarantees.KILLS[kill]
    run = stage(saga, **faults)
    async with run.running():
        for line in lines:
            await run.wait_for(line)
        # The only one: so it is this that has the run.
        [first] = place.workers.alive
        place.workers.start()
        place.workers.kill(first)
        run.let_all_go()

    guarantees.expect_begun(run, in_flight, 2)
    assert len(place.workers.alive) == 1
    assert run.ending.state == ("compensated" if kill == "in a compensation" else "completed")


@ON_ASYNCIO
async def test_two_callers_start_the_same_run(anyio_backend, stage, place):
    """Each has an engine of its own, and both get the outcome of the one run; D1."""
    run = stage(sagas.values, book_hotel="waits")
    endings = []

    async def call() -> None:
        engine = RestateEngine(SAGAS, ingress=place.server.ingress)
        outcome = await engine.run(sagas.values, run.order, run_id=run.run_id)
        endings.append(outcome.value)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call)
        tasks.start_soon(call)
        await run.wait_for("begin book hotel")
        run.let_go("book hotel")

    assert endings == [["flight", "hotel", "car"]] * 2
    guarantees.expect_begun(run, set(), 1)


@ON_ASYNCIO
async def test_a_cancelled_run_whose_worker_dies_is_taken_back(anyio_backend, stage, place):
    """That it was cancelled is recorded: the next worker takes it back; G8, D3."""
    run = stage(sagas.trip, book_hotel="waits")
    async with run.running():
        await run.wait_for("begin book hotel")
        await run.cancel()
        await place.kill()
        place.workers.start()
        run.let_go("book hotel")

    assert run.begun["book car"] == 0
    guarantees.expect_taken_back(run, run.ending)


@ON_ASYNCIO
async def test_a_run_can_be_cancelled_while_there_is_no_worker(anyio_backend, stage, place):
    """It is taken back when there is one; G8, D3."""
    run = stage(sagas.trip, book_hotel="waits")
    async with run.running():
        await run.wait_for("begin book hotel")
        await place.kill()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run.cancel)
            place.workers.start()
        run.let_go("book hotel")

    assert run.begun["book car"] == 0
    guarantees.expect_taken_back(run, run.ending)


# --- the server itself ------------------------------------------------------------------------------

# What npm does, as far as it matters: it puts the server below the folder that it is given.
NPM = """#!/bin/sh
while [ "$1" != --prefix ]; do shift; done
bin="$2/node_modules/@restatedev/restate-server-for-tests/bin"
mkdir -p "$bin"
echo "#!/bin/sh" > "$bin/restate-server"
"""


def npm_is(monkeypatch, tmp_path, script: str | None) -> None:
    """Puts another npm into its place, and the folder of builds elsewhere."""
    npm = None
    if script is not None:
        npm = tmp_path / "npm"
        npm.write_text(script)
        npm.chmod(0o700)
    monkeypatch.setattr(places.shutil, "which", lambda _: npm and str(npm))
    monkeypatch.setattr(places, "ROOT", tmp_path)


def test_the_server_is_installed_once(monkeypatch, tmp_path):
    """Whole, under the name of its version, with nothing beside it."""
    npm_is(monkeypatch, tmp_path, NPM)
    program = restate_server()
    npm_is(monkeypatch, tmp_path, None)

    assert program == restate_server()
    assert [SERVER.rpartition("/")[2]] == [path.name for path in (tmp_path / "build").iterdir()]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "npm is missing"),
        ("#!/bin/sh\necho no such registry; exit 1\n", "npm cannot install .*: no such registry"),
    ],
    ids=["no npm", "npm fails"],
)
def test_without_the_server_tests_are_skipped_or_fail(monkeypatch, tmp_path, script, reason):
    """They are skipped with the reason; where they are required they fail with it."""
    npm_is(monkeypatch, tmp_path, script)
    with pytest.raises(Missing, match=reason) as caught:
        restate_server()

    monkeypatch.delenv("PYSAGAS_ENGINES", raising=False)
    with pytest.raises(pytest.skip.Exception, match=reason):
        do_without(caught.value)
    monkeypatch.setenv("PYSAGAS_ENGINES", "required")
    with pytest.raises(Missing, match=reason):
        do_without(caught.value)


def test_a_server_that_does_not_start_says_why(tmp_path):
    """It is tried on other ports, and then its log is shown."""
    program = tmp_path / "server"
    program.write_text("#!/bin/sh\necho no room; exit 1\n")
    program.chmod(0o700)
    server = Server(program, tmp_path)
    ports = server.ports

    with pytest.raises(AssertionError, match="(no room\n){3}"):
        server.start()

    assert ports != server.ports
    server.has_started = True
    ports = server.ports
    with pytest.raises(AssertionError, match="no room"):
        server.start()
    assert ports == server.ports


def test_a_worker_that_does_not_start_says_why(tmp_path):
    """Its log is shown; nobody waits for it."""
    (tmp_path / "worker.log").write_text("no such saga")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()

    with pytest.raises(AssertionError, match="no such saga"):
        Server(tmp_path, tmp_path).register("http://127.0.0.1:1", dead)


# --- killed at any time ----------------------------------------------------------------------------

NAMES = "flight hotel car ticket opera museum bus m0 m1 m2 m3".split()
NAPS = {f"{kind}_{name}": "naps" for kind in ("book", "cancel") for name in NAMES}
# The sagas that a kill can meet in many places, each with faults, and how it ends with them.
ANY = [
    (sagas.trip, {}, "completed"),
    (sagas.trip, {"after_book_ticket": "fails"}, "compensated"),
    (sagas.nested, {}, "completed"),
    (sagas.nested, {"book_ticket": "fails"}, "compensated"),
    (sagas.nested, {"book_museum": "naps breaks"}, "compensated"),
    (sagas.detour, {"book_opera": "fails"}, "completed"),
    (sagas.limited, {"after_book_m2": "fails"}, "compensated"),
    (sagas.committed, {"book_ticket": "naps fails"}, "failed"),
]


@ON_ASYNCIO
async def test_runs_that_are_killed_at_any_time_end_as_they_should(anyio_backend, stage, place):
    """Whatever is killed, worker or server, and when: each run ends, and what stands is right; D3."""
    draws = Random(SEED)
    hit = 0
    for number in range(KILLS):
        chosen = [draws.choice(ANY) for _ in range(4)]
        runs = [stage(saga, **{**NAPS, **faults}) for saga, faults, _ in chosen]
        kills_server = draws.random() < 0.2
        async with anyio.create_task_group() as tasks:
            for run in runs:
                tasks.start_soon(end_of, run)
            await has_written(draws.choice(runs), draws.randrange(16))
            if kills_server:
                await anyio.to_thread.run_sync(place.server.kill)
                await anyio.to_thread.run_sync(place.server.start)
            else:
                await place.kill()
                place.workers.start()
        for run, (_, _, state) in zip(runs, chosen, strict=True):
            said = f"kill {number} of seed {SEED}: {run.run_id}: {run.events}"
            assert run.ending.state == state, said
            assert (run.standing == []) == (state == "compensated"), said
            assert max(run.begun.values()) <= 2, said
            assert all(len(keys) == 1 for keys in run.keys.values()), said
            hit += max(run.begun.values()) == 2
    # For who runs many: `nox -s engines` shows it.
    sys.stdout.write(f"{KILLS} kills; {hit} of {4 * KILLS} runs had something in flight\n")
    assert hit


async def has_written(run: Run, lines: int) -> None:
    """Waits until its steps have written so many lines, or it has ended."""
    while len(run.events) < lines and run.ending.state == "no outcome":
        await anyio.sleep(0.001)


async def end_of(run: Run) -> None:
    run.ending = await run.run()
