"""The command: what each says, in text and JSON, and with which status it ends."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import tomllib
from contextlib import closing
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from histories import make_writable

import pysagas as core
from pysagas import Parallel, Saga, Step, _cli
from pysagas._cli import _print, _steps, _watch
from pysagas.diagrams import mermaid
from pysagas.durable import Event, EventKind, SQLiteJournal

ROOT = Path(__file__).parent.parent

SHOP = """
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from pysagas import Commit, Saga, Step

hook = None


async def reserve(item: str) -> dict[str, int]:
    print("reserve", item)
    return {"left": 4}


async def release(item: str) -> None:
    print("release", item)
    if Path("broken").exists():
        raise ConnectionError("no answer")


async def ship(item: str) -> None:
    if item in ("piano", "organ"):
        raise ValueError("too heavy")
    if hook is not None:
        hook()


async def call_back(item: str) -> None:
    pass


order = Saga([Step(reserve, release), Step(ship, call_back)], name="order")
second = Saga([Step(reserve, release)], name="order", version="2")
changed = Saga([Step(call_back, release), Step(ship, call_back)], name="order")
gift = Saga([Step(reserve, release), Commit(), Step(ship, call_back)], name="gift")
parcel = Saga([Step(reserve, release), Step(ship, undo=call_back)], name="parcel")

listed = [order, second, gift]
paired = (order, second)
empty = []
mixed = [order, 5]
twice = [order, changed]
number = 5


def function():
    return listed


async def asynchronous():
    return order


@contextmanager
def managed():
    print("opened")
    yield listed
    print("closed")


@asynccontextmanager
async def managed_async():
    print("opened")
    yield listed
    print("closed")


class Container:
    sagas = [order]


def needs(something):
    raise AssertionError


def broken():
    raise OSError("no database")
"""


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A directory to stand in, with a module `shop` of sagas; gives the module."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("PYSAGAS_JOURNAL", raising=False)
    (tmp_path / "shop.py").write_text(SHOP)
    sys.path.insert(0, str(tmp_path))
    importlib.invalidate_caches()
    before = set(sys.modules)
    yield importlib.import_module("shop")
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) in map(str, tmp_path.rglob("*.py")):
            del sys.modules[name]


@pytest.fixture
def pysagas(capsys):
    """Runs a command line that works; gives status and output."""

    def run(*arguments, status=0):
        capsys.readouterr()
        ended = _cli.main([*map(str, arguments)])
        out, err = capsys.readouterr()
        assert (ended, err) == (status, "")
        return out

    return run


@pytest.fixture
def refused(capsys):
    """Runs a command line that cannot work; gives what it says."""

    def run(*arguments):
        status = _cli.main([*map(str, arguments)])
        out, err = capsys.readouterr()
        assert (status, out) == (64, "")
        return " ".join(err.split())

    return run


def run_sagas(path, *calls):
    """Runs sagas with a journal; each call is a saga, its argument and the run id."""

    async def main():
        async with SQLiteJournal(path) as journal:
            for saga, item, run_id in calls:
                try:
                    await journal.run(saga, item, run_id=run_id)
                except Exception:
                    pass

    anyio.run(main)


def crashed(shop, path, *calls):
    """Runs sagas, and makes the journal as it would be had the process died in the last one's step.

    That is a copy, taken in that step: its owner's lock is beside the original.
    """
    original = Path("original.db")

    def copy():
        with closing(sqlite3.connect(original)) as source, closing(sqlite3.connect(path)) as target:
            source.backup(target)

    run_sagas(original, *calls[:-1])
    shop.hook = copy
    run_sagas(original, calls[-1])
    shop.hook = None


@pytest.fixture
def journal(shop):
    """A journal with a run in each state that a run can be left in."""
    Path("broken").touch()
    crashed(
        shop,
        "sagas.db",
        (shop.order, "lamp", "order-1"),
        (shop.order, "piano", "order-2"),
        (shop.order, "lamp", "order-3"),
    )
    Path("broken").unlink()
    run_sagas("sagas.db", (shop.order, "piano", "order-4"), (shop.second, "lamp", "order-5"))
    return "sagas.db"


def run_json(*arguments, status=0):
    """Runs a command as a program of its own; gives its stdout."""
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, *arguments, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == status
    return ended.stdout


PROGRAM = "import sys; from pysagas._cli import main; sys.exit(main())"


def normal(text):
    """Text with all times made equal."""
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "2026-11-23 05:30:12", text)
    return re.sub(r"\+\d+\.\d\d s", "+0.00 s", text)


def standing(journal):
    """The state of each run."""

    async def main():
        async with SQLiteJournal(journal) as opened:
            return {run.run_id: run.state.value for run in await opened.runs()}

    return anyio.run(main)


# --- list ---------------------------------------------------------------------------------------


def test_list(journal, pysagas):
    """Each run is a line, the newest last; nothing is cut off where the output is no terminal."""
    assert normal(pysagas("list", "--journal", journal)) == (
        "RUN      SAGA              STATE        STARTED              ENDED                ERROR\n"
        "order-1  order             completed    2026-11-23 05:30:12  2026-11-23 05:30:12  -\n"
        "order-2  order             failed       2026-11-23 05:30:12  2026-11-23 05:30:12  "
        "CompensationFailed: saga 'order' could not be taken back whole after ValueError: too heavy:   "
        "compensation of step 'reserve' at (0,) in saga 'order': ConnectionError: no answer\n"
        "order-3  order             interrupted  2026-11-23 05:30:12  -                    -\n"
        "order-4  order             compensated  2026-11-23 05:30:12  2026-11-23 05:30:12  "
        "ValueError: too heavy\n"
        "order-5  order, version 2  completed    2026-11-23 05:30:12  2026-11-23 05:30:12  -\n"
    )


def test_list_of_one_state(journal, pysagas):
    """The runs of a state, and a sentence where there are none."""
    for state, ids in (
        ("completed", ["order-1", "order-5"]),
        ("failed", ["order-2"]),
        ("interrupted", ["order-3"]),
        ("compensated", ["order-4"]),
        ("running", []),
    ):
        listed = json.loads(pysagas("list", "--journal", journal, "--state", state, "--json"))
        assert [run["run_id"] for run in listed] == ids
    assert pysagas("list", "--journal", journal, "--state", "running") == "No runs that are running.\n"


def test_list_for_programs(journal, pysagas):
    """JSON has the same keys for each run, and times with their zone."""
    runs = json.loads(pysagas("list", "--journal", journal, "--json"))
    keys = ["run_id", "saga", "version", "state", "started", "ended", "error"]
    assert all(list(run) == keys for run in runs)
    assert runs[4]["version"] == "2"
    assert (runs[2]["ended"], runs[2]["error"]) == (None, None)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", runs[0]["started"])


def test_list_of_an_empty_journal(shop, pysagas):
    """A journal with no runs is one."""
    run_sagas("sagas.db")
    assert pysagas("list", "--journal", "sagas.db") == "No runs.\n"
    assert json.loads(pysagas("list", "--journal", "sagas.db", "--json")) == []


def test_list_in_a_terminal(journal, pysagas, monkeypatch):
    """A terminal gets colours, and no line that it would have to wrap."""
    run_sagas(journal, (sys.modules["shop"].order, "lamp", "order-" + "6" * 100))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for width in (40, 80, 120, 300):
        monkeypatch.setenv("COLUMNS", str(width))
        out = pysagas("list", "--journal", journal)
        lines = re.sub(r"\x1b\[[0-9;]*m", "", out).splitlines()
        assert "\x1b[3" in out
        assert len(lines) == 7
        assert all(len(line) <= width for line in lines)
        assert ("…" in lines[-1]) == (width < 300)
    assert lines[-1].startswith("order-" + "6" * 100)


def test_names_that_move_the_cursor(shop, capsys):
    """Whatever stands in a name is printed as text: no control codes, no markup."""
    _print.print_table(("A", "B"), [("[bold]x[/]\x1b[2J\n", "日本")], cut=())
    _print.say("one\x07\ntwo")
    assert capsys.readouterr().out == "A                B\n[bold]x[/] [2J   日本\none \ntwo\n"


# --- show ---------------------------------------------------------------------------------------


def test_show_of_an_interrupted_run(journal, pysagas):
    """The steps of a run, what they gave, and what is in doubt."""
    assert normal(pysagas("show", "order-3", "--journal", journal)) == (
        "run      order-3\n"
        "saga     order\n"
        "state    interrupted: its process died; `pysagas recover` goes on from here\n"
        "started  2026-11-23 05:30:12\n"
        "ended    -\n"
        "\n"
        "PATH  STEP     STATE      STARTED  LAST     RECORDED\n"
        '0     reserve  completed  +0.00 s  +0.00 s  {"left":4}\n'
        "1     ship     unknown    +0.00 s  +0.00 s  -\n"
        "\n"
        "IN DOUBT (begun, and nobody knows what came of it): ship\n"
    )


def test_show_of_a_failed_run(journal, pysagas):
    """What was raised, by the step, by its compensation, and before each rollback."""
    assert normal(pysagas("show", "order-2", "--journal", journal)) == (
        "run      order-2\n"
        "saga     order\n"
        "state    failed: mend the cause, then `pysagas retry` it\n"
        "started  2026-11-23 05:30:12\n"
        "ended    2026-11-23 05:30:12\n"
        "error    CompensationFailed: saga 'order' could not be taken back whole after ValueError: too "
        "heavy:\n"
        "  compensation of step 'reserve' at (0,) in saga 'order': ConnectionError: no answer\n"
        "\n"
        "PATH  STEP              STATE                STARTED  LAST     RECORDED\n"
        "0     reserve           compensation failed  +0.00 s  +0.00 s  ConnectionError: no answer\n"
        "1     ship              compensated          +0.00 s  +0.00 s  ValueError: too heavy\n"
        "-     (rollback) order  begun                +0.00 s  +0.00 s  ValueError: too heavy\n"
    )


def test_show_for_programs(journal, pysagas):
    """JSON has the run's keys, and those of each step."""
    shown = json.loads(pysagas("show", "order-3", "--journal", journal, "--json"))
    steps = shown.pop("steps")
    listed = json.loads(pysagas("list", "--journal", journal, "--json"))
    assert shown == listed[2]
    times = {"started": steps[0].pop("started"), "last": steps[0].pop("last")}
    assert times["started"] <= times["last"]
    assert steps[0] == {
        "kind": "step",
        "path": [0],
        "name": "reserve",
        "state": "completed",
        "result": {"left": 4},
        "error": None,
        "in_doubt": False,
    }
    assert (steps[1]["state"], steps[1]["in_doubt"], steps[1]["result"]) == ("unknown", True, None)


@pytest.mark.usefixtures("shop")
def test_show_of_a_run_without_steps(pysagas):
    """A run that recorded nothing, as its process died at once, has no table."""

    async def claimed():
        async with SQLiteJournal("sagas.db") as journal:
            await journal._claim("order-1", "order", None, b'[["lamp"],{}]', 1.0, create=True)

    anyio.run(claimed)
    assert "PATH" not in pysagas("show", "order-1", "--journal", "sagas.db")


def test_show_of_an_unknown_run(journal, refused):
    """A run that is not there is bad usage."""
    message = refused("show", "order-9", "--journal", journal)
    assert "Invalid value for RUN: run 'order-9' is not in the journal" in message


STARTED = Event(EventKind.STARTED, (0,), "a", b"", 1.0)
DONE = Event(EventKind.DONE, (0,), "a", b"\xffx", 2.0)
COMPENSATING = Event(EventKind.COMPENSATING, (0,), "a", b"", 3.0)


def failed(state, result=None, **error):
    recorded = {"type": "shop:Boom", "text": "", **error}
    data = json.dumps({"state": state, "result": result, "error": recorded}).encode()
    return Event(EventKind.FAILED, (0,), "a", data, 2.0)


@pytest.mark.parametrize(
    ("events", "running", "state", "in_doubt", "result", "error"),
    [
        ([STARTED], True, "running", False, None, None),
        ([STARTED], False, "unknown", True, None, None),
        ([STARTED, DONE], False, "completed", False, b"\xffx", None),
        ([STARTED, DONE, COMPENSATING], True, "compensating", False, b"\xffx", None),
        ([STARTED, DONE, COMPENSATING], False, "compensating", True, b"\xffx", None),
        ([STARTED, failed("unknown")], False, "unknown", True, None, "Boom"),
        ([STARTED, failed("not applied", text="no")], False, "not applied", False, None, "Boom: no"),
        ([STARTED, failed("completed", "5")], False, "completed", False, b"5", "Boom"),
        (
            [STARTED, failed("unknown", text="two", errors=[{"type": "m:A", "text": "x"}] * 2)],
            False,
            "unknown",
            True,
            None,
            "Boom: A: x; A: x",
        ),
        ([STARTED, failed("completed", "5"), STARTED], False, "unknown", True, None, None),
    ],
)
def test_what_a_history_says_of_a_step(events, running, state, in_doubt, result, error):
    """The last event tells the state; an action or compensation without an end may be in doubt."""
    [line] = _steps.step_lines(events, running=running)
    assert (line.kind, line.state, line.in_doubt) == ("step", state, in_doubt)
    assert (line.result, line.error) == (result, error)
    assert (line.started, line.last) == (events[0].at, events[-1].at)


def test_what_a_history_says_beside_steps():
    """Commits, rollbacks and tries have lines of their own, though they share a path with a step."""
    events = [
        STARTED,
        Event(EventKind.COMMITTED, (1,), "commit"),
        Event(EventKind.ROLLBACK, (0,), "a", b"Boom: no"),
        Event(EventKind.RETRY, (), "order"),
        Event(EventKind.ROLLBACK, (0,), "a"),
    ]
    assert [
        (line.kind, line.state, line.error) for line in _steps.step_lines(events, running=False)
    ] == [
        ("step", "unknown", None),
        ("commit", "passed", None),
        ("rollback", "begun", "Boom: no"),
        ("retry", "begun", None),
        ("rollback", "begun", None),
    ]


def test_results_of_another_codec():
    """What is no JSON is shown as text."""
    assert _steps.recorded_result(b'{"a": 1}') == {"a": 1}
    assert _steps.recorded_result(b"\xffx") == "\ufffdx"


# --- graph --------------------------------------------------------------------------------------


def test_graph_of_a_definition(shop, pysagas):
    """A saga of an app is drawn as `mermaid` draws it; what the app prints goes elsewhere."""
    assert pysagas("graph", "--app", "shop:order") == mermaid(shop.order)
    assert pysagas("graph", "--app", "shop:listed", "--saga", "gift") == mermaid(shop.gift)


def test_graph_of_a_run(journal, pysagas, capsys):
    """A run is drawn from its history; with its saga, what takes steps back is there too."""
    drawn = pysagas("graph", "order-3", "--journal", journal)
    assert drawn.splitlines()[:6] == [
        "flowchart TB",
        '  n(["order<br/>interrupted"]):::interrupted',
        '  n_0["reserve<br/>completed"]:::completed',
        '  n_1["ship<br/>unknown"]:::unknown',
        "  n --> n_0",
        "  n_0 --> n_1",
    ]
    status = _cli.main(["graph", "order-3", "--journal", journal, "--app", "shop:managed"])
    out, err = capsys.readouterr()
    assert (status, err) == (0, "opened\nclosed\n")
    assert '  n_1_back(["compensation: call_back"]):::back' in out.splitlines()


def test_graph_of_a_run_that_is_under_way(shop, pysagas):
    """What runs is drawn as running, and what has not begun is there where the saga is known."""
    living = Living(shop, "sagas.db", (shop.order, "lamp", "order-1"))
    drawn = pysagas("graph", "order-1", "--journal", "sagas.db")
    living.end()
    assert '  n(["order<br/>running"]):::running' in drawn
    assert '  n_1["ship<br/>running"]:::running' in drawn

    run_sagas("sagas.db", (shop.gift, "organ", "order-2"))
    drawn = pysagas("graph", "order-2", "--journal", "sagas.db")
    assert '  n_1{{"commit"}}:::commit' in drawn

    run_sagas("sagas.db", (Saga([Step(shop.ship), Step(shop.reserve)], name="s"), "piano", "order-3"))
    Path("saga_s.py").write_text(
        "from pysagas import Commit, Saga, Step\nimport shop\n"
        "s = Saga([Step(shop.ship), Commit(), Step(shop.reserve)], name='s')\n"
    )
    drawn = pysagas("graph", "order-3", "--journal", "sagas.db", "--app", "saga_s:s")
    assert '  n_1{{"commit<br/>not passed"}}:::not_started' in drawn
    assert '  n_2["reserve<br/>not started"]:::not_started' in drawn


def test_graph_of_a_run_with_groups(shop, pysagas):
    """What is around steps is a box, with its name where the history has it."""
    group = Parallel(Saga([Step(shop.reserve), Step(shop.release)], name="inner"), name="both")
    run_sagas("sagas.db", (Saga([group], name="s"), "lamp", "order-1"))
    drawn = pysagas("graph", "order-1", "--journal", "sagas.db")
    assert '  subgraph n_0["both"]' in drawn
    assert '    subgraph n_0_0["inner"]' in drawn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a run, or an app whose saga is to be drawn"),
        (("nobody", "--journal", "sagas.db"), "run 'nobody' is not in the journal"),
        (("order-1",), "a run is in a journal: which one?"),
        (("order-1", "--journal", "sagas.db", "--saga", "order"), "a run knows its saga"),
        (("--app", "shop:missing"), "'shop' has no 'missing'"),
        (("--app", "shop:listed"), "shop:listed has 3 sagas"),
        (
            ("--app", "shop:listed", "--saga", "x"),
            "has no sagas of that name; there are order, order (2)",
        ),
        (
            ("order-5", "--journal", "sagas.db", "--app", "shop:order"),
            "run 'order-5' is one of order, version 2, which is not in shop:order",
        ),
    ],
)
def test_graph_refuses(arguments, message, journal, refused):
    """What is to be drawn must be there, and be one thing."""
    assert message in refused("graph", *arguments).replace("│ ", "").replace(" │", "")


# --- watch --------------------------------------------------------------------------------------


@pytest.fixture
def between_looks(monkeypatch):
    """Gives what sets what happens between the looks of a watch; after the last comes Ctrl-C."""

    def set_looks(*happens):
        left = [*happens]

        async def sleep(seconds):
            if not left:
                raise KeyboardInterrupt
            await anyio.to_thread.run_sync(left.pop(0))

        monkeypatch.setattr(_watch, "sleep", sleep)

    return set_looks


@pytest.fixture
def in_terminal(pysagas, monkeypatch):
    """Runs a command line in a terminal; gives what it shows, without the codes."""

    def run(*arguments, lines=8, **options):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setenv("LINES", str(lines))
        out = pysagas(*arguments, **options)
        assert out.endswith("\x1b[?25h")  # the cursor is there again
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out)

    return run


def without_prints(text):
    """Text without what the shop prints."""
    return re.sub(r"(reserve|release) \w+\n", "", text)


class Living:
    """A run in another thread, and there in another journal on the file, that waits in `ship`."""

    def __init__(self, shop, path, call):
        arrived = threading.Event()
        self.may_go_on = threading.Event()

        def wait():
            arrived.set()
            assert self.may_go_on.wait(20)

        shop.hook = wait
        self.thread = threading.Thread(target=run_sagas, args=(path, call))
        self.thread.start()
        assert arrived.wait(20)

    def end(self):
        self.may_go_on.set()
        self.thread.join()


def test_watch(journal, shop, pysagas, between_looks):
    """What is under way when it begins, and each run that begins or ends from then on, is a line."""
    started = []
    between_looks(
        lambda: started.append(Living(shop, journal, (shop.order, "lamp", "order-6"))),
        lambda: started[0].end(),
        lambda: run_sagas(journal, (shop.order, "piano", "order-7")),
        bool,
    )
    out = without_prints(pysagas("watch", "--journal", journal, status=130))
    assert normal(out) == (
        "2026-11-23 05:30:12  order-3  order  interrupted\n"
        "2026-11-23 05:30:12  order-6  order  running\n"
        "2026-11-23 05:30:12  order-6  order  completed\n"
        "2026-11-23 05:30:12  order-7  order  compensated: ValueError: too heavy\n"
    )


def test_watch_on_a_terminal(journal, shop, in_terminal, between_looks):
    """A terminal has a table: what has ended meanwhile, and with what; what is under way, and where."""
    living = Living(shop, journal, (shop.order, "lamp", "order-6"))
    between_looks(
        lambda: run_sagas(journal, (shop.order, "piano", "order-7")),
        living.end,
        lambda: run_sagas(journal, *[(shop.order, "lamp", f"more-{n}") for n in range(4)]),
    )
    shown = normal(without_prints(in_terminal("watch", "--journal", journal, status=130)))
    _, *tables = re.split(r"RUN +SAGA +STATE +STARTED +FOR +DONE +NOW", shown)
    looks = [
        [re.sub(" +", " ", re.sub(r"2026-.* s ", "", row)).strip() for row in rows.strip().split("\n")]
        for rows in tables
    ]
    in_doubt, under_way = "order-3 order interrupted 1 in doubt: ship", "order-6 order running 1 ship"
    failed, done = "order-7 order compensated 0 ValueError: too heavy", "order-6 order completed 2 -"
    different = [look for before, look in zip([[], *looks], looks) if look != before]
    assert different == [
        [in_doubt, under_way],
        [failed, in_doubt, under_way],
        [failed, done, in_doubt],
        [*(f"more-{n} order completed 2 -" for n in range(4)), in_doubt],
    ]


def test_watch_where_nothing_happens(shop, in_terminal, between_looks):
    """Where nothing is under way, it says so, and waits."""
    run_sagas("sagas.db", (shop.order, "lamp", "order-1"))
    between_looks()
    assert "No run is under way." in in_terminal("watch", "--journal", "sagas.db", status=130)


def test_watch_where_there_is_no_room(shop, journal, in_terminal, between_looks):
    """What a terminal has no room for is counted; it is what began last."""
    living = Living(shop, journal, (shop.order, "lamp", "order-6"))
    between_looks()
    out = in_terminal("watch", "--journal", journal, status=130, lines=4)
    living.end()
    assert "order-3" in out
    assert "order-6" not in out
    assert "and 1 more that are under way" in out


def test_watch_of_a_run(shop, pysagas, between_looks):
    """One run is shown step by step, until it has ended; the status tells whether it ended well."""
    Path("broken").touch()
    living = Living(shop, "sagas.db", (shop.order, "lamp", "order-1"))
    between_looks(bool, living.end)
    assert normal(pysagas("watch", "order-1", "--journal", "sagas.db")) == (
        '+0.00 s  0  reserve  completed  {"left":4}\n'
        "+0.00 s  1  ship  running  -\n"
        "+0.00 s  1  ship  completed  null\n"
        "order-1  order  completed\n"
    )
    run_sagas("sagas.db", (shop.order, "piano", "order-2"))
    out = pysagas("watch", "order-2", "--journal", "sagas.db", status=1)
    assert "reserve  compensation failed  ConnectionError: no answer\n" in out
    assert "\norder-2  order  failed: CompensationFailed: " in out


def test_watch_of_a_run_on_a_terminal(journal, in_terminal):
    """A terminal has the table of its steps; one whose process has died has ended, in a way."""
    out = in_terminal("watch", "order-3", "--journal", journal, status=1)
    assert "order-3  order  interrupted" in out
    assert "PATH  STEP" in out
    assert re.search(r"1 +ship +unknown", out)


def test_watch_of_a_long_run_shows_what_matters(journal, shop, in_terminal):
    """Where there is no room for all steps, what went wrong stays, and the rest is counted."""
    Path("broken").touch()
    steps = [Step(shop.reserve, shop.release, name="broken")]
    steps += [Step(shop.reserve, shop.call_back, name=f"step {n}") for n in range(20)]
    run_sagas(journal, (Saga([*steps, Step(shop.ship)], name="long"), "piano", "order-6"))
    out = in_terminal("watch", "order-6", "--journal", journal, lines=8, status=1)
    assert re.search(r"0 +broken +compensation failed .* ConnectionError: no answer", out)
    assert "and 19 more steps" in out


def test_watch_of_a_run_that_is_pruned(shop, between_looks, capsys):
    """A run that is forgotten meanwhile is said to be gone."""
    living = Living(shop, "sagas.db", (shop.order, "lamp", "order-1"))

    async def prune():
        async with SQLiteJournal("sagas.db") as journal:
            assert await journal.prune(before=time.time() + 60) == 1

    between_looks(lambda: (living.end(), anyio.run(prune)), bool)
    assert _cli.main(["watch", "order-1", "--journal", "sagas.db"]) == 64
    assert "run 'order-1' is not in the journal" in capsys.readouterr().err


def test_watch_refuses(journal, refused):
    """A run that is not there, and a pause that is none, are bad usage."""
    assert "run 'nobody' is not in the journal" in refused("watch", "nobody", "--journal", journal)
    assert "--every" in refused("watch", "--every", "0", "--journal", journal)


def test_a_step_that_was_cut_off_stands_as_that_left_it():
    """A step that did nothing before its cancellation is not in doubt."""
    events = [
        Event(EventKind.STARTED, (0,), "a"),
        Event(EventKind.CUT_OFF, (0,), "a", b"not started"),
    ]
    (line,) = _steps.step_lines(events, running=False)
    assert (line.state, line.in_doubt) == ("not started", False)


def test_watch_names_what_is_taken_back():
    """A compensation that is under way is named as such."""
    events = [
        Event(EventKind.STARTED, (0,), "a"),
        Event(EventKind.DONE, (0,), "a", b"1"),
        Event(EventKind.JOINED, (1,), "parallel"),
        Event(EventKind.COMPENSATING, (0,), "a"),
    ]
    assert [*_watch._now(_steps.step_lines(events, running=True))] == ["taking back a"]


# --- recover ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_recover(journal, pysagas, backend):
    """A run whose process died is taken back, on either loop; then nothing is left."""
    out = pysagas("recover", "--journal", journal, "--app", "shop:listed", "--backend", backend)
    assert out == "release lamp\nRUN      SAGA   NOW          ERROR\norder-3  order  compensated  -\n"
    assert standing(journal)["order-3"] == "compensated"
    out = pysagas("recover", "--journal", journal, "--app", "shop:listed")
    assert out == "Nothing to recover.\n"


def test_recover_going_on(journal, pysagas):
    """A run can be gone on with instead; what the app prints is not in the JSON."""
    capture = (
        "recover",
        "--journal",
        journal,
        "--app",
        "shop:listed",
        "--on-crash",
        "resume",
        "--json",
    )
    assert json.loads(pysagas(*capture)) == {
        "ok": True,
        "recovered": [
            {"run_id": "order-3", "saga": "order", "state": "completed", "error": None, "in_doubt": []}
        ],
        "failed": [],
        "left": [],
        "in_progress": [],
    }


def test_recover_for_programs_keeps_stdout_clean(journal, capsys):
    """What the app prints goes to stderr, so that stdout is JSON alone."""
    assert _cli.main(["recover", "--journal", journal, "--app", "shop:managed", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["ok"]
    assert err == "opened\nrelease lamp\nclosed\n"


def test_recover_without_the_saga(journal, pysagas):
    """A run whose saga is not given is left as it was, and that is something to do."""
    arguments = ("recover", "--journal", journal, "--app", "shop:gift")
    out = pysagas(*arguments, status=1)
    assert out.startswith(
        "RUN      SAGA   NOW             ERROR\norder-3  order  left as it was  run 'order-3'"
    )
    found = json.loads(pysagas(*arguments, "--json", status=1))
    assert not found["ok"]
    [left] = found["left"]
    assert left["state"] == "interrupted"
    assert "which was not given" in left["error"]


@pytest.mark.parametrize("as_json", [False, True])
def test_recover_of_a_step_that_stays_in_doubt(shop, pysagas, as_json):
    """A step that had something to be taken back, and could not be asked, is for somebody to look at."""
    crashed(shop, "sagas.db", (shop.parcel, "lamp", "parcel-1"))
    recover = ("recover", "--journal", "sagas.db", "--app", "shop:parcel")
    if as_json:
        found = json.loads(run_json(*recover, status=1))
        assert (False, ["ship"]) == (found["ok"], found["recovered"][0]["in_doubt"])
    else:
        out = pysagas(*recover, status=1)
        assert "parcel-1  parcel  compensated  -\n" in out
        assert out.endswith(
            "IN DOUBT in run parcel-1: ship. Look whether it happened; nobody took it back.\n"
        )
    out = pysagas("show", "parcel-1", "--journal", "sagas.db")
    assert "state    compensated: all was taken back, but for what is in doubt\n" in out
    assert out.endswith("IN DOUBT (begun, and nobody knows what came of it): ship\n")


def test_recover_that_fails(journal, pysagas):
    """A run that cannot be taken back has failed, and the remedy is said."""
    Path("broken").touch()
    out = pysagas("recover", "--journal", journal, "--app", "shop:order", status=1)
    assert "order-3  order  failed  saga 'order' could not be taken back whole" in out
    assert out.endswith(
        "Mend what made them fail, then try each again: pysagas retry RUN --app MODULE:NAME\n"
    )


def test_recover_of_a_failure_that_is_on_record(shop, pysagas):
    """A run that had failed before its process died ends with that failure, which is told."""
    run_sagas("sagas.db", (shop.order, "piano", "order-1"))
    with closing(sqlite3.connect("sagas.db")) as connection, connection:
        # As it was before the last thing, and the end, were recorded.
        make_writable(connection)
        connection.execute("DELETE FROM events WHERE kind = 'compensated' AND name = 'reserve'")
        connection.execute("UPDATE runs SET state = 'running', error = NULL, ended = NULL")
    out = pysagas("recover", "--journal", "sagas.db", "--app", "shop:order")
    assert out.startswith("release piano\n")
    assert out.endswith("order-1  order  compensated  ValueError: too heavy\n")


def test_run_that_a_living_process_has(shop, pysagas):
    """A run in the hands of a living process is listed as running, and is not touched."""
    said = {}

    def look():
        for name, arguments in {
            "list": ["list"],
            "show": ["show", "order-1"],
            "text": ["recover", "--app", "shop:order"],
            "json": ["recover", "--app", "shop:order", "--json"],
        }.items():
            said[name] = pysagas(*arguments, "--journal", "sagas.db")

    async def hook(item: str) -> None:
        await anyio.to_thread.run_sync(look)

    async def main():
        step = core.Step(hook, shop.call_back)
        saga = core.Saga([step], name="order")
        async with SQLiteJournal("sagas.db") as journal:
            await journal.run(saga, "lamp", run_id="order-1")

    anyio.run(main)
    assert " running " in said["list"]
    assert "state    running, in a process that lives\n" in said["show"]
    assert "0     hook  running  " in said["show"]
    assert "IN DOUBT" not in said["show"]
    assert said["text"] == "RUN      SAGA  NOW          ERROR\norder-1  -     in progress  -\n"
    assert json.loads(said["json"])["in_progress"] == ["order-1"]


# --- retry --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_retry(journal, pysagas, backend):
    """With the cause mended, what could not be taken back is."""
    out = pysagas(
        "retry", "order-2", "--journal", journal, "--app", "shop:listed", "--backend", backend
    )
    assert out == (
        "release piano\nRUN      SAGA   NOW          ERROR\norder-2  order  compensated  ValueError: too heavy\n"
    )
    assert standing(journal)["order-2"] == "compensated"


def test_retry_that_fails_again(journal, pysagas, capsys):
    """With the cause not mended, the run has failed again, and that is something to do."""
    Path("broken").touch()
    arguments = ("retry", "order-2", "--journal", journal, "--app", "shop:order")
    assert "order-2  order  failed  CompensationFailed: " in pysagas(*arguments, status=1)
    found = json.loads(run_json(*arguments, status=1))
    assert (found["state"], found["run_id"]) == ("failed", "order-2")
    assert _cli.main([*arguments, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"] == found["error"]


def test_retry_past_the_commit(shop, pysagas, monkeypatch):
    """A run that failed past its commit is carried on from there, to its end."""
    run_sagas("sagas.db", (shop.gift, "piano", "gift-1"))
    assert standing("sagas.db") == {"gift-1": "failed"}

    async def ship(item: str) -> None:
        pass

    parts = [core.Step(shop.reserve, shop.release), core.Commit(), core.Step(ship, shop.call_back)]
    monkeypatch.setattr(shop, "gift", core.Saga(parts, name="gift"))
    out = pysagas("retry", "gift-1", "--journal", "sagas.db", "--app", "shop:gift")
    assert out == "RUN     SAGA  NOW        ERROR\ngift-1  gift  completed  -\n"


def test_retry_with_a_changed_saga(journal, pysagas):
    """What the journal refuses is said, and is something to do."""
    out = pysagas("retry", "order-2", "--journal", journal, "--app", "shop:changed", status=1)
    assert "saga 'order' is not the one that was recorded" in out


@pytest.mark.parametrize(
    ("run", "app", "message"),
    [
        ("order-1", "shop:order", "for RUN: run 'order-1' is completed, and not failed"),
        ("order-3", "shop:order", "for RUN: run 'order-3' is interrupted, and not failed"),
        ("order-9", "shop:order", "for RUN: run 'order-9' is not in the journal"),
        ("order-2", "shop:gift", "for --app: run 'order-2' is one of order, which is not in shop:gift"),
        (
            "order-2",
            "shop:second",
            "for --app: run 'order-2' is one of order, which is not in shop:sec",
        ),
    ],
)
def test_retry_that_makes_no_sense(journal, refused, run, app, message):
    """Only a failed run can be tried again, by its own saga; nothing has run otherwise."""
    before = standing(journal)
    assert f"Invalid value {message}" in refused("retry", run, "--journal", journal, "--app", app)
    assert standing(journal) == before


# --- prune --------------------------------------------------------------------------------------


def test_prune(journal, pysagas):
    """Runs that ended well are forgotten once they are old enough; the others never."""
    assert pysagas("prune", "--journal", journal, "--older-than", "30d") == "Forgot 0 runs.\n"
    assert len(standing(journal)) == 5
    assert pysagas("prune", "--journal", journal, "--older-than", "0s") == "Forgot 3 runs.\n"
    assert standing(journal) == {"order-2": "failed", "order-3": "running"}


def test_prune_before_a_time(journal, pysagas):
    """A time can be given instead of an age; with a zone, or that of this place."""
    at = f"{time.gmtime().tm_year + 1}-01-02"
    assert pysagas("prune", "--journal", journal, "--before", "2020-01-01T12:00") == "Forgot 0 runs.\n"
    found = json.loads(
        pysagas("prune", "--journal", journal, "--before", f"{at}T12:00+01:00", "--json")
    )
    assert found == {"pruned": 3, "before": f"{at}T11:00:00.000+00:00"}


def test_prune_of_one_run(shop, pysagas):
    """One run is no runs."""
    run_sagas("sagas.db", (shop.order, "lamp", "order-1"))
    assert pysagas("prune", "--journal", "sagas.db", "--older-than", "0.0s") == "Forgot 1 run.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--older-than or --before: give one of the two"),
        (["--older-than", "1d", "--before", "2026-01-01"], "give one of the two"),
        (["--older-than", "a week"], "--older-than: 'a week' is no age; write a number and one of"),
        (["--older-than", "-1d"], "'-1d' is no age"),
        (["--older-than", "30"], "'30' is no age"),
        (["--before", "yesterday"], "--before: 'yesterday' is no time; write 2026-11-23 or"),
        (["--before", "0001-01-01"], "is no time"),
    ],
)
def test_prune_of_what(journal, refused, arguments, message):
    """What is to be forgotten is told by an age or a time, or nothing is."""
    assert message in refused("prune", "--journal", journal, *arguments)
    assert len(standing(journal)) == 5


# --- the app ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "listed",
        "paired",
        "order",
        "function",
        "asynchronous",
        "managed",
        "managed_async",
        "Container.sagas",
    ],
)
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_what_an_app_can_be(journal, pysagas, name, backend):
    """A saga, a list of them, or a function that gives one of these, or a context manager of it."""
    out = pysagas("recover", "--journal", journal, "--app", f"shop:{name}", "--backend", backend)
    assert "order-3  order  compensated  -\n" in out
    if name.startswith("managed"):
        assert out.startswith("opened\nrelease lamp\nclosed\n")


@pytest.mark.parametrize(
    ("app", "message"),
    [
        ("shop", "it must be module:name, such as shop.sagas:SAGAS, not 'shop'"),
        (":order", "it must be module:name"),
        ("shop:", "it must be module:name"),
        ("nowhere:order", "there is no module 'nowhere', in {here} or among what is installed"),
        ("nowhere.deep:order", "there is no module 'nowhere', in "),
        ("shop.deep:order", "there is no module 'shop.deep', in "),
        (
            "needy:order",
            "importing 'needy' raised ModuleNotFoundError: No module named 'nowhere' ({here}",
        ),
        (
            "wrong:order",
            "importing 'wrong' raised ZeroDivisionError: division by zero ({here}/wrong.py, line 2)",
        ),
        ("leaving:order", "importing 'leaving' raised SystemExit: 3 ("),
        ("garbled:order", "importing 'garbled' raised SyntaxError: "),
        ("shop:nothing", "'shop' has no 'nothing'; sagas there: changed, gift, order, parcel, second"),
        ("shop:Container.nothing", "'shop' has no 'Container.nothing' "),
        (
            "shop:number",
            "must be a saga, a list of sagas, or a function that gives one of these; it leads to 5",
        ),
        ("shop:mixed", "it leads to 5"),
        ("shop:empty", "shop:empty is empty: there must be a saga in it"),
        ("shop:twice", "shop:twice has two sagas of the name 'order' and the version None"),
        (
            "shop:needs",
            "shop:needs: calling it raised TypeError: needs() missing 1 required positional",
        ),
        ("shop:broken", "shop:broken: calling it raised OSError: no database ({here}/shop.py, line "),
    ],
)
def test_what_an_app_cannot_be(journal, refused, app, message):
    """Each way in which an app can be wrong has its message, and nothing is recovered."""
    Path("needy.py").write_text("import nowhere\n")
    Path("wrong.py").write_text("\n1 / 0\n")
    Path("leaving.py").write_text("raise SystemExit(3)\n")
    Path("garbled.py").write_text("def\n")
    said = refused("recover", "--journal", journal, "--app", app) + " "
    assert "Invalid value for --app: " in said
    assert message.format(here=Path.cwd()) in said
    assert standing(journal)["order-3"] == "running"


def test_app_in_the_current_directory(journal):
    """The directory that one stands in is looked into, though the command is installed elsewhere."""
    found = json.loads(run_json("recover", "--journal", journal, "--app", "shop:order"))
    assert found["ok"]
    assert standing(journal)["order-3"] == "compensated"


def test_app_when_the_directory_is_known_already(journal, pysagas, monkeypatch):
    """A directory is not put onto the path twice."""
    before = list(sys.path)
    pysagas("recover", "--journal", journal, "--app", "shop:order")
    assert sys.path == before
    monkeypatch.setattr(sys, "path", [one for one in before if one != str(Path.cwd())])
    pysagas("recover", "--journal", journal, "--app", "shop:order")
    assert sys.path == before


# --- the journal, and the rest of the command line -----------------------------------------------

COMMANDS = {
    "list": [],
    "show": ["order-1"],
    "recover": ["--app", "shop:order"],
    "retry": ["order-2", "--app", "shop:order"],
    "prune": ["--older-than", "0s"],
}
each_command = pytest.mark.parametrize(
    "arguments", [[name, *more] for name, more in COMMANDS.items()], ids=list(COMMANDS)
)


@each_command
def test_missing_journal(shop, refused, arguments):
    """A journal that is not there is an error, and is not made; nor is one that was not named."""
    message = refused(*arguments, "--journal", "sagas.db")
    assert "file 'sagas.db' does not exist" in message.lower()
    assert not Path("sagas.db").exists()
    assert "Missing option '--journal'" in refused(*arguments)


@each_command
def test_journal_that_is_none(shop, refused, arguments):
    """A directory, and a file that is something else, are refused and left as they are."""
    Path("letter.txt").write_text("Dear Ada, " * 100)
    assert "is a directory" in refused(*arguments, "--journal", ".")
    message = refused(*arguments, "--journal", "letter.txt")
    assert "Invalid value for --journal: journal " in message
    assert "file is not a database" in message
    assert Path("letter.txt").read_text() == "Dear Ada, " * 100


def test_journal_from_the_environment(journal, pysagas, monkeypatch):
    """The journal can be named once for all commands."""
    monkeypatch.setenv("PYSAGAS_JOURNAL", journal)
    assert "order-1" in pysagas("list")


def test_missing_trio(journal, refused, monkeypatch):
    """Without Trio its backend is refused with what to install."""
    monkeypatch.setitem(sys.modules, "trio", None)
    arguments = ("recover", "--journal", journal, "--app", "shop:order", "--backend", "trio")
    assert 'pip install "pysagas[trio]"' in refused(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [["list", "--state", "odd"], ["list", "--loud"], ["show"], ["fly"], ["recover"], ["list", "more"]],
)
def test_bad_usage(journal, refused, monkeypatch, arguments):
    """Whatever else is wrong on the command line ends with status 64 and the usage."""
    monkeypatch.setenv("PYSAGAS_JOURNAL", journal)
    assert refused(*arguments).startswith("Usage: pysagas ")


def test_no_command(pysagas):
    """No command at all is answered with the list of them."""
    out = pysagas()
    assert out == pysagas("--help")
    assert all(f"\n  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)])
def test_help(pysagas, arguments):
    """The help of the command, and of each, has the exit statuses."""
    text = " ".join(pysagas(*arguments, "--help").split())
    assert "Exit status: 0 fine; 1 something is left to do" in text
    assert "64 bad usage" in text


@pytest.mark.parametrize("missing", ["typer", "rich", "msgspec"])
def test_without_the_extra(monkeypatch, capsys, missing):
    """Without what the extra brings, there is one line that says how to get it."""
    monkeypatch.setitem(sys.modules, missing, None)
    assert _cli.main(["list"]) == 64
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f'pysagas: the command needs {missing}, not installed here: pip install "pysagas[cli]"\n'
    )


def test_arguments_of_the_process(journal, pysagas, capsys, monkeypatch):
    """Called without arguments, as the installed script does it, it takes those of the process."""
    monkeypatch.setattr(sys, "argv", ["pysagas", "list", "--journal", journal])
    assert _cli.main() == 0
    assert "order-1" in capsys.readouterr().out


def test_script():
    """The command that is installed is this one, and its extra has what it asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"pysagas": "pysagas._cli:main"}
    extra = [re.match(r"\w+", one)[0] for one in project["optional-dependencies"]["cli"]]
    assert sorted(extra) == sorted(_cli.NEEDED)


def test_ctrl_c(journal, monkeypatch, capsys):
    """Ctrl-C ends the command with the status that shells have for it."""

    async def runs(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(SQLiteJournal, "runs", runs)
    monkeypatch.setattr("pysagas._cli._commands.SQLiteJournal.runs", runs)
    assert _cli.main(["list", "--journal", journal]) == 130


# --- the demo -----------------------------------------------------------------------------------


def test_demo(pysagas, capsys):
    """``pysagas demo`` is the demo, with its options and its exit statuses."""
    assert "Completed: the order is placed." in pysagas("demo", "--pace", "0")
    pysagas("demo", "--pace", "0", "--fail", "confirm", status=2)
    with pytest.raises(SystemExit) as caught:
        _cli.main(["demo", "--help"])
    assert caught.value.code == 0
    assert "usage: pysagas demo " in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        _cli.main(["demo", "--crash", "confirm"])
    assert caught.value.code == 64


def shell_blocks(text):
    """The commands of a document's part, each with the text that follows it as its output."""
    found = re.findall(r"```sh\n(.*?)```\n(?:\n[^`]*)?```text\n(.*?)```", text, re.DOTALL)
    return [(shlex.split(command), output) for command, output in found]


def same_each_time(text):
    """Output without what is another each time: run ids, times, and the order of what runs at once."""
    text = re.sub(r"\b[0-9a-f]{8}\b", "e25d1bcb", text)
    return re.sub(r"^ *\d+\.\d\d s", " 0.00 s", normal(text), flags=re.MULTILINE)


@pytest.mark.skipif(sys.platform == "win32", reason="nobody can be killed like that")
def test_readme_shows_what_happens(tmp_path):
    """The commands of "Survive a crash", run as they stand there, say what stands there."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    part = readme.partition("\n## Survive a crash\n")[2].partition("\n## ")[0]
    blocks = shell_blocks(part)
    assert [command[1] for command, _ in blocks] == ["demo", "list", "recover", "demo"]
    for command, output in blocks:
        assert command[0] == ".venv/bin/pysagas"
        ended = subprocess.run(
            [sys.executable, "-W", "error", "-c", PROGRAM, *command[1:]],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env=os.environ | {"TERM": "dumb"},
        )
        assert ended.returncode == (-signal.SIGKILL if "--crash" in command else 0)
        assert same_each_time(ended.stdout) == same_each_time(output)
        assert ended.stderr == ""


@pytest.mark.parametrize("command", [("list",), ("recover", "--app", "shop:order")])
def test_an_empty_file_is_not_made_a_journal(shop, refused, command):
    """No command makes a journal, of a file that happens to be there neither."""
    Path("empty.db").touch()
    said = refused(*command, "--journal", "empty.db")
    assert "Invalid value for --journal: empty.db is empty, and no journal" in said
    assert Path("empty.db").stat().st_size == 0
