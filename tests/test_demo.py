"""The demo: every option on both backends, every exit status, and Ctrl-C for real."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import runpy
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import anyio
import anyio.lowlevel
import pyte
import pytest

import pysagas
from pysagas import Saga, Step, StepState, _cli, _demo
from pysagas._demo import _command, _order, _shop

BEFORE_COMMIT = _demo.STEPS[:-1]
GROUP = _demo.STEPS[2:5]
RESTORED = "Restored: the tables, the files and the endpoint are what they were before."

PUBLIC = ("pysagas", "pysagas.durable", "pysagas.observe.progress")

MEMORY = Path("/dev/shm")

on_both = pytest.mark.parametrize("backend", ["asyncio", "trio"])
on_posix = pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals to send")


@pytest.fixture(autouse=True)
def in_memory(monkeypatch):
    """Puts temporary databases where a commit does not wait for a disk, if there is such a place."""
    place = str(MEMORY) if MEMORY.is_dir() else tempfile.gettempdir()
    monkeypatch.setattr("tempfile.tempdir", place)
    monkeypatch.setenv("TMPDIR", place)


@pytest.fixture
def demo(capsys):
    """Runs the demo in this process, faster than for an audience; gives status and output."""

    def run(*arguments):
        status = _demo.main(["--pace", "0.01", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert err == ""
        return status, out

    return run


@pytest.fixture
def refused(capsys):
    """Runs the demo with a command line that cannot work; gives what it says."""

    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            _demo.main([*map(str, arguments)])
        out, err = capsys.readouterr()
        assert (caught.value.code, out) == (64, "")
        return err

    return run


def names(out, word):
    """The steps of the lines that say `word`, in their order."""
    return re.findall(rf"^ *\d+\.\d\d s  {word}  +(\S+)", out, re.MULTILINE)


def steps(out, word):
    return [name for name in names(out, word) if name in _demo.STEPS]


def columns(out, label):
    """What stood in a row of the table, before and after."""
    (row,) = re.findall(rf"^{label} .*$", out, re.MULTILINE)
    return tuple(re.split(r"  +", row)[1:])


# --- a run that completes -----------------------------------------------------------------------


@on_both
def test_default_run_places_the_order(demo, backend):
    """A run with no fault starts and ends each step once, and shows what it changed."""
    status, out = demo("--backend", backend)
    assert status == 0
    assert steps(out, "start") == list(_demo.STEPS)
    assert sorted(steps(out, "done")) == sorted(_demo.STEPS)
    assert names(out, "committed") == ["commit"]
    assert "Completed: the order is placed." in out
    assert columns(out, "stock") == ("lamp 5", "lamp 4")
    assert columns(out, "accounts") == ("ada 100", "ada 60")
    before, after = columns(out, "shipments")
    order, state = after.split()
    assert (before, state) == ("-", "confirmed")
    assert columns(out, "warehouse") == ("-", order)
    assert columns(out, "invoices") == ("-", f"{order}.txt: 1 lamp for ada, 40")


def test_steps_are_those_of_the_saga():
    """The names that the options offer are the names of the saga's steps, in their order."""
    _, outcome = place({})
    assert tuple(report.name for report in outcome.steps) == _demo.STEPS


def test_module_runs_as_a_program(monkeypatch, capsys):
    """``python -m pysagas`` hands its exit status on; importing the module runs nothing."""
    monkeypatch.delitem(sys.modules, "pysagas.__main__", raising=False)
    monkeypatch.setattr(sys, "argv", ["pysagas", "--pace", "0.01", "--fail", "book-courier"])
    importlib.import_module("pysagas.__main__")
    assert capsys.readouterr().out == ""
    monkeypatch.delitem(sys.modules, "pysagas.__main__")  # runpy warns of a module that is there
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("pysagas", run_name="__main__")
    assert caught.value.code == 1


@pytest.mark.parametrize("path", sorted(Path(_demo.__file__).parent.glob("*.py")), ids=lambda p: p.stem)
def test_module_imports_only_the_core(path):
    """The demo needs anyio, the standard library, rich for its tree, and public names of pysagas."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module in PUBLIC:
            public = importlib.import_module(node.module).__all__
            assert {alias.name for alias in node.names} <= set(public)
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert (path.parent / f"{node.module}.py").exists()
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert imported - {"anyio", "rich"} <= sys.stdlib_module_names


# --- failures -----------------------------------------------------------------------------------


@on_both
@pytest.mark.parametrize("step", BEFORE_COMMIT)
def test_failed_step_is_taken_back(demo, backend, step):
    """Each step before the commit may fail after its work: all that started is compensated."""
    status, out = demo("--fail", step, "--backend", backend)
    assert status == 1
    assert steps(out, "failed") == [step]
    assert sorted(steps(out, "compensated")) == sorted(steps(out, "start"))
    assert f"{step} (ToldToFail: after its work was done)" in out
    assert "Not completed (compensated): ToldToFail: after its work was done." in out
    assert RESTORED in out
    for row in ("stock", "accounts", "shipments", "applied", "invoices", "warehouse"):
        before, after = columns(out, row)
        assert before == after


@on_both
def test_failure_after_the_commit(demo, backend):
    """A failed confirmation is taken back, what was committed stays, and that is said plainly."""
    status, out = demo("--fail", "confirm", "--backend", backend)
    assert status == 2
    assert steps(out, "compensated") == ["confirm"]
    assert "Not completed (failed): ToldToFail" in out
    assert f"passed its commit, so this stays done: {', '.join(BEFORE_COMMIT)}." in out
    assert "NOT RESTORED: stock, accounts, shipments, applied, invoices, warehouse differ" in out
    assert columns(out, "shipments")[1].endswith(" booked")


@on_both
@pytest.mark.parametrize(
    ("step", "differ"),
    [
        ("reserve-stock", "stock, applied"),
        ("charge-account", "accounts, applied"),
        ("book-courier", "shipments"),
        ("write-invoice", "invoices"),
        ("notify-warehouse", "warehouse"),
    ],
)
def test_failed_compensation_is_reported(demo, backend, step, differ):
    """With one compensation that fails the others run, and exactly that step's work is left."""
    status, out = demo("--fail-compensation", step, "--backend", backend)
    assert status == 2
    assert steps(out, "failed") == ["notify-warehouse"]
    assert steps(out, "NOT compensated") == [step]
    assert sorted(steps(out, "compensated")) == sorted(set(BEFORE_COMMIT) - {step})
    assert (
        f"The compensation of {step} did not end: ToldToFail: before anything was taken back."
    ) in out
    assert f"NOT RESTORED: {differ} differ from before." in out


def test_failed_compensation_after_the_commit(demo):
    """The compensation of ``confirm`` is reached by the failure of ``confirm``."""
    status, out = demo("--fail-compensation", "confirm")
    assert status == 2
    assert steps(out, "failed") == steps(out, "NOT compensated") == ["confirm"]
    assert columns(out, "shipments")[1].endswith(" confirmed")


@pytest.mark.parametrize("how", [("--fail", "reserve-stock"), ("--cancel-after", "0")])
def test_failed_compensation_that_is_never_reached(demo, how):
    """Where something else is asked to end the saga, no further failure is added."""
    status, out = demo("--fail-compensation", "charge-account", *how)
    assert status == 1
    assert steps(out, "start") == steps(out, "compensated") == ["reserve-stock"]


def test_restored_though_a_compensation_failed(capsys):
    """Where the saga cannot tell, the status is 2 even if nothing differs."""

    async def act():
        raise ValueError("no")

    async def compensate():
        raise ValueError("done, and failed")

    outcomes = []

    async def run():
        with pytest.raises(pysagas.CompensationFailed) as caught:
            await Saga([Step(act, compensate)]).run()
        outcomes.append(caught.value.outcome)

    anyio.run(run)
    assert _command.conclude(outcomes[0], {"stock": []}, {"stock": []}) == 2
    out = capsys.readouterr().out
    assert RESTORED in out
    assert "But the saga could not know" in out


# --- cancellation -------------------------------------------------------------------------------


@on_both
@pytest.mark.parametrize("after", [0, 0.02, 0.05, 0.08, 0.11])
def test_cancelled_after_some_time(capsys, backend, after):
    """Whenever the saga is cancelled before its commit, everything is what it was."""
    status = _demo.main(["--pace", "0.03", "--cancel-after", str(after), "--backend", backend])
    out = capsys.readouterr().out
    came_through = bool(names(out, "committed"))  # on a slow machine
    assert status in ({0, 2} if came_through else {1})
    assert came_through or "Not completed (compensated): cut off." in out
    assert came_through or RESTORED in out


@on_both
@pytest.mark.parametrize("pause", range(1, 13))
def test_cancelled_at_each_pause(demo, monkeypatch, backend, pause):
    """Cancelled before or after the work of any step, the saga takes back what it must."""
    scopes = []
    pauses = iter(range(1, 1000))

    def move_on_after(_):
        scopes.append(anyio.CancelScope())
        return scopes[0]

    async def sleep(_):
        if next(pauses) == pause:
            scopes[0].cancel()
        await anyio.lowlevel.checkpoint()

    monkeypatch.setattr(anyio, "sleep", sleep)
    monkeypatch.setattr(anyio, "move_on_after", move_on_after)
    status, out = demo("--backend", backend)
    if pause <= 10:
        assert status == 1
        assert sorted(steps(out, "compensated")) == sorted(steps(out, "start"))
        assert RESTORED in out
    else:
        assert status == 2
        assert steps(out, "cut off") == steps(out, "compensated") == ["confirm"]
        assert "passed its commit" in out


def test_cancelled_too_late(demo):
    """A cancellation that comes after the end changes nothing."""
    status, _ = demo("--cancel-after", "60")
    assert status == 0


@on_both
def test_cancelled_request_cannot_overtake(monkeypatch, tmp_path, backend):
    """A request that is cancelled on its way is handled before the one that takes it back."""
    go_on = Event()
    handle = _shop.WarehouseRequest.do_POST

    def do_POST(self):
        go_on.wait(10)
        handle(self)

    monkeypatch.setattr(_shop.WarehouseRequest, "do_POST", do_POST)

    async def cancelled_and_taken_back():
        with anyio.move_on_after(0.05) as scope:
            await _order.request(shop, "POST", "/orders/1")
        assert scope.cancelled_caught
        go_on.set()
        await _order.request(shop, "DELETE", "/orders/1")

    with _demo.open_shop(tmp_path / "shop.db") as (database, invoices, port):
        shop = _demo.Shop(database, invoices, port, 0, None, None)
        anyio.run(cancelled_and_taken_back, backend=backend)
        assert _demo.look(shop)["warehouse"] == []


# --- actions that run twice, endpoints that fail ------------------------------------------------


def place(changes, *middleware, **faults):
    """Runs the demo's saga in a shop of its own; gives the state at the end and the outcome."""
    outcomes = []
    with _demo.open_shop(None) as (database, invoices, port):
        options = {"pace": 0, "fail": None, "fail_compensation": None} | faults
        shop = _demo.Shop(database, invoices, port, **options)
        before = _demo.look(shop)

        async def run():
            saga = Saga(_demo.ORDER, middleware=middleware)
            outcomes.append(await saga.run(shop, _demo.Order("1", **changes), exceptions=Exception))

        anyio.run(run)
        after = _demo.look(shop)
    return (before, after), outcomes[0]


async def twice(effect, call_next):
    await call_next()
    if effect.kind in {"action", "compensation"}:
        await call_next()


def test_each_step_can_run_twice():
    """Actions and compensations are idempotent: run twice, they change what they change once."""
    (_, once), _ = place({})
    (before, after), outcome = place({}, twice)
    assert outcome.error is None
    assert {name: after[name] for name in after if name != "applied"} == {
        name: once[name] for name in once if name != "applied"
    }
    (before, after), outcome = place({}, twice, fail="notify-warehouse")
    assert outcome.error is not None
    assert before == after


@pytest.mark.parametrize(
    ("changes", "refusing"),
    [({"quantity": 6}, "reserve-stock"), ({"price": 101}, "charge-account")],
)
def test_refused_by_the_database(changes, refusing):
    """What the shop does not have is not sold, and a step that changed nothing not compensated."""
    (before, after), outcome = place(changes)
    states = {report.name: report.state for report in outcome.steps}
    assert states[refusing] is StepState.NOT_APPLIED
    assert isinstance(outcome.error, sqlite3.IntegrityError)
    assert before == after


@on_both
def test_endpoint_that_refuses(tmp_path, backend):
    """An answer other than success is an error that says what was asked and what came."""
    with _demo.open_shop(tmp_path / "shop.db") as (database, invoices, port):
        shop = _demo.Shop(database, invoices, port, 0, None, None)
        with pytest.raises(ConnectionError, match=r"^PUT /orders/1: HTTP/1.0 501 "):
            anyio.run(_order.request, shop, "PUT", "/orders/1", backend=backend)


def test_endpoint_bears_clients_that_hang_up(tmp_path, capfd):
    """A client that resets its connection disturbs nobody."""
    with _demo.open_shop(tmp_path / "shop.db") as (database, invoices, port):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        shop = _demo.Shop(database, invoices, port, 0, None, None)
        assert _demo.look(shop)["warehouse"] == []
    assert capfd.readouterr().err == ""


def test_an_error_that_is_no_outcome_goes_on(monkeypatch, demo):
    """A defect of the demo itself is not taken for a failed order."""

    async def run(*args, **kwargs):
        raise RuntimeError("defect")

    monkeypatch.setattr(_command, "Saga", lambda *args, **kwargs: SimpleNamespace(run=run))
    with pytest.raises(RuntimeError, match="defect"):
        demo()


def test_interrupted_before_the_saga(monkeypatch, demo):
    """Where Ctrl-C leaves no report, what is there is checked all the same."""

    def run(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(anyio, "run", run)
    status, out = demo()
    assert status == 1
    assert "The run was ended before it could report." in out
    assert RESTORED in out


# --- the database -------------------------------------------------------------------------------


@on_both
def test_database_is_kept(demo, tmp_path, backend):
    """A new database is made, and goes on from run to run, until there is no money left."""
    database = tmp_path / "shop.db"
    for before, after in (("ada 100", "ada 60"), ("ada 60", "ada 20")):
        status, out = demo("--database", database, "--backend", backend)
        assert status == 0
        assert columns(out, "accounts") == (before, after)
    status, out = demo("--database", database, "--backend", backend)
    assert status == 1
    assert steps(out, "failed") == ["charge-account"]
    assert steps(out, "compensated") == ["reserve-stock"]
    assert "IntegrityError: CHECK constraint failed" in out
    assert RESTORED in out
    with closing(sqlite3.connect(database)) as connection:
        orders = [row[0] for row in connection.execute("SELECT order_id FROM shipments")]
    files = [path.stem for path in (tmp_path / "shop.db-invoices").iterdir()]
    assert len(orders) == 2
    assert sorted(files) == sorted(orders)


def test_temporary_database_is_removed(demo, tmp_path, monkeypatch):
    """Without a path nothing is left on the disk."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    demo()
    assert list(tmp_path.iterdir()) == []


def test_database_named_memory_is_a_file(demo, tmp_path, monkeypatch):
    """A name that SQLite reads in its own way is a file's name here."""
    monkeypatch.chdir(tmp_path)
    status, _ = demo("--database", ":memory:")
    assert status == 0
    assert (tmp_path / ":memory:").stat().st_size


def test_empty_file_is_a_new_database(demo, tmp_path):
    """A file with nothing in it, as ``mktemp`` makes it, is a shop that is new."""
    database = tmp_path / "shop.db"
    database.touch()
    status, _ = demo("--database", database)
    assert status == 0


def test_text_file_is_refused(refused, tmp_path):
    """A file that is no database is refused, and stays as it is."""
    file = tmp_path / "letter.txt"
    file.write_text("Dear Ada, " * 100)
    assert f"{file} cannot be used as the shop's database: file is not a database" in refused(
        "--database", file
    )
    assert file.read_text() == "Dear Ada, " * 100
    assert list(tmp_path.iterdir()) == [file]


def test_foreign_database_is_refused(refused, tmp_path):
    """The database of another program is refused, and stays as it is."""
    file = tmp_path / "other.db"
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("CREATE TABLE stock (item TEXT)")
    content = file.read_bytes()
    assert f"{file} is the database of something else" in refused("--database", file)
    assert file.read_bytes() == content
    assert list(tmp_path.iterdir()) == [file]


def test_database_that_cannot_be_opened_is_refused(refused, tmp_path):
    """A directory, and a file in a directory that is not there, are refused."""
    for path in (tmp_path, tmp_path / "nowhere" / "shop.db"):
        assert "unable to open database file" in refused("--database", path)


def test_locked_database_is_refused(refused, demo, tmp_path):
    """A database that another program is writing is refused before anything has run."""
    file = tmp_path / "shop.db"
    demo("--database", file)
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        assert "database is locked" in refused("--database", file)


# --- the journal --------------------------------------------------------------------------------


@pytest.fixture
def command(capsys):
    """Runs ``pysagas`` on a journal, in this process; gives status and output."""

    def run(journal, name, *arguments):
        status = _cli.main([name, "--journal", str(journal), *arguments])
        out, err = capsys.readouterr()
        assert err == ""
        return status, out

    return run


def states(command, journal):
    _, out = command(journal, "list", "--json")
    return [run["state"] for run in json.loads(out)]


def crashed(*arguments):
    """Runs the demo in a process that kills itself; gives what it said."""
    ended = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-m",
            "pysagas",
            "--pace",
            "0",
            *map(str, arguments),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (-signal.SIGKILL, "")
    return ended.stdout


@on_both
def test_journaled_run_says_and_does_the_same(demo, command, tmp_path, backend):
    """With a journal the order is placed in the same way, and recorded."""
    journal = tmp_path / "sagas.db"
    status, out = demo("--journal", journal, "--backend", backend)
    assert status == 0
    # Members of the group wait for the disk, and go on in any order.
    assert sorted(steps(out, "start")) == sorted(steps(out, "done")) == sorted(_demo.STEPS)
    assert columns(out, "stock") == ("lamp 5", "lamp 4")
    assert states(command, journal) == ["completed"]
    assert (tmp_path / "shop.db").exists()


@on_both
@pytest.mark.parametrize("step", BEFORE_COMMIT)
def test_journaled_failure_is_taken_back(demo, command, tmp_path, backend, step):
    """With a journal a failed step is taken back as without."""
    journal = tmp_path / "sagas.db"
    status, out = demo("--journal", journal, "--backend", backend, "--fail", step)
    assert status == 1
    assert sorted(steps(out, "compensated")) == sorted(steps(out, "start"))
    assert RESTORED in out
    assert states(command, journal) == ["compensated"]


@on_both
def test_cancelled_with_a_journal(demo, command, monkeypatch, tmp_path, backend):
    """Cancelled in a step, the run is taken back, and the journal knows it."""
    scopes = []
    pauses = iter(range(1, 1000))

    def move_on_after(_):
        scopes.append(anyio.CancelScope())
        return scopes[0]

    async def sleep(_):
        if next(pauses) == 4:
            scopes[0].cancel()
        await anyio.lowlevel.checkpoint()

    monkeypatch.setattr(anyio, "sleep", sleep)
    monkeypatch.setattr(anyio, "move_on_after", move_on_after)
    status, out = demo("--journal", tmp_path / "sagas.db", "--backend", backend)
    assert status == 1
    assert steps(out, "compensated") == ["charge-account", "reserve-stock"]
    assert RESTORED in out
    assert states(command, tmp_path / "sagas.db") == ["compensated"]


@on_posix
@on_both
@pytest.mark.parametrize("step", _demo.STEPS)
def test_killed_and_recovered(demo, command, tmp_path, backend, step):
    """Killed in any step, the run is listed and recovered: taken back, or past its commit completed."""
    journal, on_backend = tmp_path / "sagas.db", ("--backend", backend)
    out = crashed("--journal", journal, "--crash", step, *on_backend)
    assert f"Killed: the work of {step} is done, and that is not recorded." in out
    assert f"pysagas recover --journal {journal} --app pysagas.demo:app" in out
    assert states(command, journal) == ["interrupted"]
    status, out = demo("--journal", journal, "--look")
    assert status == 2
    assert "Since before the last run, these have changed: " in out

    status, out = command(journal, "recover", "--app", "pysagas.demo:app", *on_backend)

    assert status == 0
    if step in BEFORE_COMMIT:
        assert steps(out, "start") == steps(out, "done") == []
        assert step in steps(out, "compensated")
        assert states(command, journal) == ["compensated"]
        status, out = demo("--journal", journal, "--look")
        assert status == 0
        assert RESTORED in out
    else:
        assert steps(out, "start") == steps(out, "done") == ["confirm"]
        assert states(command, journal) == ["completed"]
        status, out = demo("--journal", journal, "--look")
        assert columns(out, "shipments")[1].endswith(" confirmed")


@on_posix
def test_killed_and_resumed(demo, command, tmp_path):
    """A killed run can be carried on to its end instead: nothing is done twice."""
    journal = tmp_path / "sagas.db"
    crashed("--journal", journal, "--crash", "charge-account")
    status, out = command(journal, "recover", "--app", "pysagas.demo:app", "--on-crash", "resume")
    assert status == 0
    assert sorted(steps(out, "done")) == sorted(_demo.STEPS[1:])
    assert states(command, journal) == ["completed"]
    _, out = demo("--journal", journal, "--look")
    assert columns(out, "accounts") == ("ada 100", "ada 60")


@on_posix
def test_next_run_recovers_first(demo, command, tmp_path):
    """The demo takes back what an earlier one left unfinished, before it does anything else."""
    journal = tmp_path / "sagas.db"
    for _ in range(2):  # so that two runs of one shop are unfinished at a time
        crashed("--journal", journal, "--crash", "reserve-stock")
    status, out = demo("--journal", journal)
    assert status == 0
    (recovered,) = re.findall(r"^Recovered first: order [0-9a-f]{8}, compensated\.$", out, re.MULTILINE)
    assert out.index("rolled back") < out.index(recovered) < out.index("done")
    assert columns(out, "stock") == ("lamp 5", "lamp 4")
    assert states(command, journal) == ["compensated", "compensated", "completed"]


def test_two_runs_of_one_shop_are_recovered(command, tmp_path, monkeypatch):
    """A shop that two runs need is opened once."""
    opened = []
    real = _order.open_shop
    monkeypatch.setattr(_order, "open_shop", lambda path: opened.append(path) or real(path))

    async def two_runs():
        with _demo.app() as [saga]:
            for number in ("1", "2"):
                await saga.run(str(tmp_path / "shop.db"), _demo.Order(number))

    anyio.run(two_runs)
    assert opened == [tmp_path / "shop.db"]


@pytest.mark.parametrize("step", ["reserve-stock", "charge-account"])
def test_failed_run_is_tried_again(demo, command, tmp_path, step):
    """What a compensation left undone is taken back by another try, which has no fault to obey."""
    journal = tmp_path / "sagas.db"
    status, out = demo("--journal", journal, "--fail-compensation", step)
    assert status == 2
    _, out = command(journal, "list", "--json")
    [run] = json.loads(out)
    assert run["state"] == "failed"
    status, out = command(journal, "retry", run["run_id"], "--app", "pysagas.demo:app")
    assert status == 0
    assert steps(out, "compensated") == [step]
    assert demo("--journal", journal, "--look")[0] == 0


@on_posix
def test_killed_with_sigkill(monkeypatch, demo, tmp_path):
    """The process is killed as no other process could do it harder."""
    killed = []

    def kill(*given):
        killed.append(given)
        raise ConnectionError("killed")

    monkeypatch.setattr(os, "kill", kill)
    demo("--journal", tmp_path / "sagas.db", "--crash", "confirm")
    assert killed == [(os.getpid(), signal.SIGKILL)]


def test_foreign_journal_is_refused(refused, tmp_path):
    """A file that is no journal is refused, and stays as it is."""
    file = tmp_path / "letter.txt"
    file.write_text("Dear Ada, " * 100)
    assert "file is not a database" in refused("--journal", file)
    assert file.read_text() == "Dear Ada, " * 100


def test_missing_msgspec(refused, monkeypatch, tmp_path):
    """Without msgspec a journal is refused with what to install; nothing else needs it."""
    monkeypatch.setitem(sys.modules, "msgspec", None)
    monkeypatch.setitem(sys.modules, "msgspec.json", None)
    message = refused("--journal", tmp_path / "sagas.db")
    assert 'pip install "pysagas[durable]"' in message
    assert "msgspec" in message


# --- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--fail", "--fail-compensation", "--crash"])
@pytest.mark.parametrize("value", ["pack", "", "delivery"])
def test_unknown_step_is_refused(refused, option, value):
    """A step that does not exist is answered with the list of those that do."""
    message = refused(option, value)
    assert all(step in message for step in _demo.STEPS)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--cancel-after", "-1"),
        ("--cancel-after", "nan"),
        ("--cancel-after", "inf"),
        ("--cancel-after", "soon"),
        ("--cancel-after",),
        ("--pace", "-0.1"),
        ("--backend", "curio"),
        ("--crash", "confirm"),
        ("--look",),
        ("--look", "--journal", "nowhere/sagas.db"),
        ("--fai", "confirm"),
        ("--loud",),
        ("now",),
    ],
)
def test_bad_usage_is_refused(refused, arguments):
    """Whatever else is wrong on the command line ends with status 64 and the usage."""
    message = refused(*arguments)
    assert message.startswith("usage: python -m pysagas ")
    assert arguments[0] in message.splitlines()[-1]


def test_missing_trio(refused, monkeypatch):
    """Without Trio its backend is refused with what to install."""
    monkeypatch.setitem(sys.modules, "trio", None)
    assert 'pip install "pysagas[trio]"' in refused("--backend", "trio")


def test_help(capsys):
    """The help has every option, every step and every exit status."""
    with pytest.raises(SystemExit) as caught:
        _demo.main(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("--journal PATH", "--crash STEP", "--look", "--database PATH"):
        assert part in text
    for part in ("--fail STEP", "--fail-compensation STEP", "--cancel-after SECONDS", "--backend"):
        assert part in text
    assert all(step in text for step in _demo.STEPS)
    assert "0 completed, 1 rolled back, 2 not restored" in text
    assert "64 bad usage" in text


# --- on a terminal ------------------------------------------------------------------------------


def what_comes(file):
    """What is written to a terminal; nothing where nobody has it open any more."""
    try:
        return file.read(65536)
    except OSError:  # as Linux says that
        return b""


def on_terminal(*arguments):
    """Runs the demo as a program on a terminal; gives the exit status and the screen."""
    here, its = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "pysagas", *map(str, arguments)],
        stdin=its,
        stdout=its,
        stderr=its,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "200", "LINES": "50", "PYTHONUTF8": "1"},
    ) as process:
        os.close(its)
        with os.fdopen(here, "rb", buffering=0) as file:
            written = b"".join(iter(partial(what_comes, file), b""))
    screen = pyte.Screen(200, 50)
    pyte.ByteStream(screen).feed(written)
    return process.returncode, screen


def drawn(screen):
    """The lines of the tree, without their times."""
    lines = "\n".join(line.rstrip() for line in screen.display).partition("\n\n")[0].splitlines()
    return [re.sub(r"  +\d+\.\d\d s", "", line) for line in lines]


@on_posix
@on_both
def test_on_a_terminal_there_is_a_tree(backend):
    """Where rich is installed and there is a terminal, what happens is drawn as a tree."""
    status, screen = on_terminal(
        "--pace", "0.01", "--fail-compensation", "write-invoice", "--backend", backend
    )
    assert status == 2
    assert not screen.cursor.hidden
    assert [line[:36].rstrip() for line in drawn(screen)] == [
        "✗ order                 could not be",
        "  ↺ reserve-stock       taken back",
        "  ↺ charge-account      taken back",
        "  ✗ delivery            could not be",
        "    ↺ book-courier      taken back",
        "    ✗ write-invoice     could not be",
        "    ↺ notify-warehouse  taken back",
    ]
    assert "NOT RESTORED: invoices differ from before." in "\n".join(screen.display)


@on_posix
def test_a_process_that_kills_itself_leaves_a_cursor(tmp_path):
    """After ``--crash`` the tree stands as it was, with what to try now below it."""
    journal = tmp_path / "sagas.db"
    status, screen = on_terminal("--journal", journal, "--crash", "charge-account", "--pace", "1")
    assert status == -signal.SIGKILL
    assert not screen.cursor.hidden
    _, reserve, charge = drawn(screen)
    assert reserve == "  ✓ reserve-stock   done"
    assert re.fullmatch(r"  . charge-account  running", charge)
    assert screen.display[4].startswith("Killed: the work of charge-account is done")
    assert screen.display[8].rstrip().endswith("--look")
    assert (screen.cursor.y, screen.cursor.x) == (9, 0)


def test_nothing_is_drawn_below_the_tree(monkeypatch, tmp_path):
    """From the last words of a process that kills itself on, no thread can draw the tree over them."""
    taken = []

    def see_whether_it_is_taken(*_):
        with ThreadPoolExecutor() as another_thread:
            taken.append(not another_thread.submit(_order.DRAWING.acquire, blocking=False).result())

    monkeypatch.setattr(os, "kill", see_whether_it_is_taken)
    _order.be_killed(SimpleNamespace(journal=tmp_path / "sagas.db"), "confirm")
    assert taken == [True]
    _order.Terminal(SimpleNamespace(write=see_whether_it_is_taken)).write("the tree")
    assert taken == [True, True]


def test_the_tree_is_drawn_on_what_stdout_is(monkeypatch, capsys):
    """The tree goes to where the demo's other lines go, above them."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert _demo.main(["--pace", "0.01"]) == 0
    tree, _, rest = capsys.readouterr().out.rpartition("\x1b[?25h")
    assert re.search(r"✓ order .* ✓ confirm ", re.sub(r"\s|\x1b\[[\d;]*m", " ", tree))
    assert "Completed: the order is placed." in rest


@pytest.mark.parametrize("missing", [True, False])
def test_without_rich_or_terminal_there_are_lines(monkeypatch, capsys, missing):
    """Without one of the two the demo prints what it always did."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: missing)
    monkeypatch.setattr(_order, "find_spec", lambda name: None if missing else name)
    assert _demo.main(["--pace", "0.01"]) == 0
    assert steps(capsys.readouterr().out, "start") == list(_demo.STEPS)


# --- Ctrl-C, for real ---------------------------------------------------------------------------


def interrupted(*interruptions, arguments=(), pause=0.05):
    """Runs the demo as a program, with a Ctrl-C whenever it has printed one of the given lines.

    `pause` lets the program fall asleep after the line; it sleeps long enough not to reach the next.
    """
    waiting = list(interruptions)
    lines = []
    # Met in the middle of its own code, a loop may leave a coroutine that nobody awaits.
    strict = ["-X", "dev", "-W", "error"] if pause else ["-W", "ignore:coroutine:RuntimeWarning"]
    command = [sys.executable, *strict, "-m", "pysagas", "--pace", "0.2"]
    with subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if waiting and waiting[0] in " ".join(line.split()):
                time.sleep(pause)
                process.send_signal(signal.SIGINT)
                waiting.pop(0)
        err = process.stderr.read()
    assert waiting == []
    return process.returncode, "".join(lines), err


def not_ended(out):
    return re.findall(r"The compensation of (\S+) did not end: cut off", out)


@on_posix
@on_both
@pytest.mark.parametrize("moment", ["start reserve-stock", "start notify-warehouse"])
def test_ctrl_c_restores(backend, moment):
    """One Ctrl-C in the middle takes back everything that started."""
    status, out, err = interrupted(moment, arguments=("--backend", backend))
    assert (status, err) == (1, "")
    assert sorted(steps(out, "compensated")) == sorted(steps(out, "start"))
    assert RESTORED in out


@on_posix
@on_both
def test_ctrl_c_in_the_rollback_of_a_failure(backend):
    """A first Ctrl-C that meets a rollback does not disturb it."""
    status, out, err = interrupted(
        "take back charge-account", arguments=("--backend", backend, "--fail", "charge-account")
    )
    assert (status, err) == (1, "")
    assert steps(out, "compensated") == ["charge-account", "reserve-stock"]
    assert RESTORED in out


@on_posix
def test_second_ctrl_c_cuts_one_compensation_on_asyncio():
    """A second Ctrl-C costs the compensation that runs, which is named; the others run."""
    status, out, err = interrupted("done charge-account", "take back charge-account")
    assert (status, err) == (2, "")
    assert not_ended(out) == ["charge-account"]
    assert sorted(steps(out, "compensated")) == sorted([*GROUP, "reserve-stock"])
    assert "NOT RESTORED: accounts, applied differ from before." in out


@on_posix
def test_second_ctrl_c_cuts_nothing_on_trio():
    """Trio gives a second Ctrl-C to the main task, which only waits for the rollback."""
    status, out, err = interrupted(
        "start charge-account", "take back charge-account", arguments=("--backend", "trio")
    )
    assert (status, err) == (1, "")
    assert steps(out, "compensated") == ["charge-account", "reserve-stock"]
    assert RESTORED in out


@on_posix
@on_both
def test_second_ctrl_c_in_running_code(backend):
    """Where a second Ctrl-C meets the code of a compensation, only that one is cut."""
    status, out, err = interrupted(
        "start charge-account",
        "take back charge-account",
        arguments=("--backend", backend),
        pause=0,
    )
    assert (status in {1, 2}, err) == (True, "")
    cut = not_ended(out)
    assert cut in ([], ["charge-account"])
    assert status == (2 if cut else 1)


@on_posix
@on_both
def test_second_ctrl_c_after_the_run(backend):
    """A second Ctrl-C that comes when all is over does not hide how it ended."""
    status, out, err = interrupted(
        "start reserve-stock", "before after", arguments=("--backend", backend), pause=0
    )
    assert (status, err) == (1, "")
    assert RESTORED in out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@on_posix
def test_second_ctrl_c_in_a_group_on_asyncio():
    """The members of a group are compensated at the same time, and so are cut together."""
    status, out, err = interrupted("done book-courier", "take back notify-warehouse")
    assert (status, err) == (2, "")
    assert not_ended(out) == list(GROUP)
    assert steps(out, "compensated") == ["charge-account", "reserve-stock"]
    assert "NOT RESTORED: shipments, invoices, warehouse differ from before." in out


@on_posix
def test_third_ctrl_c_ends_the_program():
    """A third Ctrl-C stops the rollback; what is left undone is found and said."""
    status, out, err = interrupted(
        "done charge-account", "take back charge-account", "take back reserve-stock"
    )
    assert (status, err) == (2, "")
    assert "The run was ended before it could report." in out
    assert "NOT RESTORED: stock, accounts, applied differ from before." in out
