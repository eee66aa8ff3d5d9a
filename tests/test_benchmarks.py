"""The benchmarks do the work they are said to measure. Nothing here looks at a time."""

import importlib
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

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
