"""The benchmarks do the work they are said to measure. Nothing here looks at a time."""

import importlib
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from places import Missing, restate_server

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(FOLDER))

contenders = importlib.import_module("contenders")
run = importlib.import_module("run")

SIZE = 7
WORKS = ["sequence", "group", "limited"]
PRESENT = [
    pytest.param(
        contender,
        id=contender.name,
        marks=pytest.mark.skipif(contender.missing() is not None, reason=str(contender.missing())),
    )
    for contender in contenders.contenders()
]


def counting(calls):
    async def action(argument):
        calls["action"] += 1
        return argument

    async def compensation(argument):
        assert argument == contenders.ARGUMENT
        calls["compensation"] += 1

    async def fail(argument):
        calls["fail"] += 1
        raise contenders.Failed

    return contenders.Work(action, compensation, fail)


def prepared(contender, shape, work, *, fails):
    if shape == "sequence":
        return contender.sequence(work, SIZE, fails=fails)
    return contender.group(work, SIZE, fails=fails, limit=3 if shape == "limited" else None)


@pytest.mark.anyio
@pytest.mark.parametrize("contender", PRESENT)
async def test_a_contender_does_each_of_its_works_and_takes_it_back(contender):
    done = []
    for shape in WORKS:
        for fails in (False, True):
            calls = Counter()
            go = prepared(contender, shape, counting(calls), fails=fails)
            if go is not None:
                await go()
                await go()  # what is prepared can be run again
                each = ("action", "compensation") if fails else ("action",)
                expected = {**dict.fromkeys(each, 2 * SIZE), **({"fail": 2} if fails else {})}
                assert calls == expected, shape
                done.append(shape)
    assert done


def test_every_shape_has_its_baseline_and_ours():
    names = [parameter.values[0].name for parameter in PRESENT]
    assert len(set(names)) == len(names)
    for case in run.cases(quick=True):
        assert {case.baseline, *run.OURS} <= set(names)


@pytest.mark.parametrize("backend", run.LOOPS)
def test_the_runner_measures_reports_and_writes_its_rows(backend, tmp_path, capsys):
    run.main(
        ["--quick", "--repeats", "1", "--only", "sequence success 10", "--backend", backend]
        + ["--json", str(tmp_path / "rows.json"), "--markdown", str(tmp_path / "report.md")]
    )
    written = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    rows = {row["contender"]: row for row in written["rows"] if row["case"] == "sequence success 10"}
    assert {contenders.ExitStack.name, *run.OURS} <= set(rows)
    assert all(row["loop"] == backend and len(row["ratios"]) == 1 for row in rows.values())
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "## Goals" in report
    assert written["environment"]["Python"] in report
    assert report in capsys.readouterr().out
    assert "Skipped: pysagas 0.0.3" in report


def test_the_runner_measures_memory_without_any_time(capsys):
    rows = run.main(["--quick", "--only", "memory", "--backend", "asyncio"]).rows
    assert {row.contender for row in rows} >= {contenders.ExitStack.name, *run.OURS}
    assert all(row.unit == "B" and row.values[0] > 0 for row in rows)
    assert "Memory held for rollback" in capsys.readouterr().out


exploration = importlib.import_module("exploration")


@pytest.mark.parametrize("case", exploration.CASES)
def test_each_exploration_that_is_measured_explores_something(case):
    """The sagas whose exploration is measured have the steps that they are said to have."""
    trial = exploration.CASES[case][0]()
    places = {part.name for part in trial.saga.parts}

    assert len(places) in (1, 6, 10, 30)


def test_exploration_is_measured_by_real_explorations(monkeypatch):
    """A measured exploration reports on each fault of its saga, and restores them."""
    small = {"2 steps": (lambda: exploration.trial_of(2), False, 1.0)}
    monkeypatch.setattr(exploration, "CASES", small)

    seconds, report = exploration.measure("2 steps", "asyncio")

    assert seconds > 0
    assert report.ok
    assert {fault.place.name for result in report.results for fault in result.plan.faults} == {
        "step 0",
        "step 1",
    }


def test_exploration_prints_a_table(monkeypatch, capsys):
    """The script prints a row for each case and loop."""
    small = {"1 step": (lambda: exploration.trial_of(1, group=1), False, 1.0)}
    monkeypatch.setattr(exploration, "CASES", small)
    monkeypatch.setattr(sys, "argv", ["exploration.py", "--repeats", "1"])

    exploration.main()

    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == ["asyncio", "trio"]


durable = importlib.import_module("durable")
JOURNAL_CASES = [durable.Case(1, 4, 1), durable.Case(3, 2, 100), durable.Case(2, 3, 100, grouped=True)]


@pytest.mark.anyio
@pytest.mark.parametrize("case", JOURNAL_CASES, ids=lambda case: case.label)
async def test_the_journal_is_measured_by_runs_that_it_records(tmp_path, case):
    """What is measured leaves all its runs in the file, each step with its start and its result."""
    async with durable.ours(tmp_path) as prepare:
        go = prepare(case)
        await go()
        await go()  # what is prepared can be run again

    async with durable.SQLiteJournal(tmp_path / "journal-FULL.db") as journal:
        runs = await journal.runs(state=durable.RunState.COMPLETED)
        assert len(runs) == 2 * case.runs
        for run_id in (info.run_id for info in runs):
            kinds = Counter(event.kind.value for event in await journal.history(run_id))
            joined = {"joined": 1} if case.grouped else {}
            assert kinds == {"started": case.steps, "done": case.steps, **joined}


@pytest.mark.anyio
async def test_the_journal_is_measured_beside_rows_that_are_written(tmp_path):
    """The raw limit writes the rows it counts, and each round has a speed of ours and one of it."""
    with durable.raw(tmp_path) as limits:
        assert limits.rows_a_second(7, 3) > 0
        ((written,),) = limits.connection.execute("SELECT count(*) FROM events")
        assert written == 21
        async with durable.ours(tmp_path) as prepare:
            rows = await durable.measure("a loop", "pysagas", prepare, limits, JOURNAL_CASES, 2, 10)
    assert [row.case for row in rows] == [case.label for case in JOURNAL_CASES]
    assert all(len(row.ratios) == 2 for row in rows)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("backend", run.LOOPS)
def test_recovery_is_measured_on_runs_that_a_killed_process_left(
    tmp_path, backend, capsys, monkeypatch
):
    """The script recovers what it left, and reports everything that it measured."""
    monkeypatch.setattr(durable, "missing", "{} is away".format)
    results = durable.main(
        ["--quick", "--repeats", "1", "--backend", backend, "--folder", str(tmp_path)]
        + ["--json", str(tmp_path / "rows.json"), "--markdown", str(tmp_path / "report.md")]
    )

    assert [one.runs for one in results.recoveries] == [10, 20, 10]
    assert all(one.seconds > 0 for one in results.recoveries)
    assert all(size > 0 for size in results.bytes_a_step.values())
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Left out: DBOS: dbos is away" in report
    assert report in capsys.readouterr().out
    assert json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["fsync_us"] > 0


def test_goals_of_the_journal_are_judged():
    """A goal is met, missed, or unclear where only the upper quartile reaches it."""
    row = durable.Row("trio", "case", "pysagas", [100.0, 300.0, 300.0], "1 a commit", [1000.0] * 3)
    verdicts = []
    for goal in (None, 0.3, 0.31, 0.9):
        row.goal = goal
        verdicts.append(durable._met(row, 6_000))
    assert verdicts == ["", "yes", "**no**", "**no**"]
    row.goal, row.goal_a_second, row.steps_a_second = 0.3, 250, [100.0, 240.0, 400.0]
    assert durable._met(row, 6_000) == "unclear; unclear"
    assert durable._met(row, 4_000) == "not judged: a slow disk"
    assert durable._goal(row) == "≥ 0.3; 250/s"


engines = importlib.import_module("engines")


@pytest.fixture(scope="module")
def server():
    """The program of a server of Restate."""
    try:
        return restate_server()
    except Missing as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("case", [*engines.CASES, *engines.QUICK], ids=str)
def test_the_shapes_of_an_engine_have_the_steps_that_are_counted(case):
    """A saga of a shape is named by it, and has as many steps, in a group or not."""
    shape = case.shape
    tree = list(shape.saga().tree)
    assert sum(node.kind == "step" for node in tree) == shape.steps
    assert any(node.kind == "group" for node in tree) == shape.grouped
    assert len({one.shape.name for one in engines.CASES}) == len(engines.CASES)


@pytest.mark.timeout(120)
def test_an_engine_is_measured_on_its_server(server, tmp_path, capsys):
    """Everybody does all steps of each case, on the real server, and a report says how fast."""
    results = engines.main(
        ["--quick", "--repeats", "1", "--server", str(server)]
        + ["--json", str(tmp_path / "rows.json"), "--markdown", str(tmp_path / "report.md")]
    )

    rows = [(row.case, row.takes, row.contender) for row in results.rows]
    assert rows == [
        (case.label, "1 ms" if case.shape.waits else "nothing", contender)
        for case in engines.QUICK
        for contender in engines.CONTENDERS
    ]
    assert all(len(row.seconds) == 1 and row.seconds[0] > 0 for row in results.rows)
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| server | restate-server " in report
    assert report in capsys.readouterr().out
    assert json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["rows"]


def test_without_a_server_no_engine_is_measured(tmp_path, monkeypatch, capsys):
    """Where there is no server, or a library is missing, it says what to install."""
    monkeypatch.setattr(engines, "BUILD", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert engines.main([]) is None
    assert "Left out: there is no restate-server: npm install" in capsys.readouterr().out
    assert engines.main(["--server", str(tmp_path / "gone")]) is None
    assert f"Left out: there is no {tmp_path / 'gone'}: npm install" in capsys.readouterr().out
    monkeypatch.setattr(engines, "LIBRARIES", ("no-such-library",))
    assert engines.main([]) is None
    assert "Left out: no-such-library is not installed: pip install" in capsys.readouterr().out


def test_goals_of_an_engine_are_judged():
    """A goal is met, missed, or unclear where only the lower quartile reaches it."""
    row = engines.Row("case", "nothing", "who", [2.0] * 3, 4, [1.0, 1.3, 1.3])
    verdicts = []
    for goal in (None, 1.3, 1.15, 1.14):
        row.goal = goal
        verdicts.append(engines._met(row))
    assert verdicts == ["", "yes", "unclear", "**no**"]
    assert row.steps_a_second == 2
