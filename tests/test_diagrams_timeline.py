"""Who ran when: as a table for a terminal, and as a Mermaid Gantt chart.

The golden files are whole tables and charts. ``nox -s pictures`` has Mermaid draw the charts.
"""

from __future__ import annotations

import re
import sys
from io import StringIO

import pytest
from drawing import GOLDEN, HOSTILE, Clock
from helpers import Boom
from rich.console import Console

from pysagas import (
    Commit,
    Outcome,
    Parallel,
    Ran,
    Saga,
    SagaScope,
    SagaState,
    Step,
    StepReport,
    StepState,
    TreeNode,
    outcome_of,
    saga,
)
from pysagas.diagrams import Timeline, timeline
from pysagas.observe import timing
from pysagas.observe.timing import record_times

pytestmark = pytest.mark.anyio


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "current_time", clock)
    return clock


class Run:
    """A run of which steps and times are known: names, states, and when they ran."""

    saga_name = "trip"
    run_id = "1"

    def __init__(self, *steps, state=SagaState.COMPENSATED):
        self._steps = steps
        self.outcome = Outcome(self, state, None, None)

    def reports(self):
        return tuple(
            StepReport(name, (index,), state) for index, (name, state, *_) in enumerate(self._steps)
        )

    def times(self):
        for index, (_, _, *times) in enumerate(self._steps):
            for kind, began, ended in times:
                yield Ran((index,), kind, began, ended)


def trip(clock, **charge):
    """A saga with one of everything."""

    @saga
    async def rent(scope: SagaScope):
        await scope.step(clock.step("car", 0.25))
        async with scope.nested() as extras:
            await extras.step(clock.step("child seat", 0.125))

    return Saga(
        [
            clock.step("flight", 1.5, 0.25),
            Parallel(
                clock.step("seat", 0.25, 0.125),
                Saga([clock.step("room", 2.0, 1.0), clock.step("breakfast", 0.03125)], name="hotel"),
                name="bookings",
            ),
            rent,
            Parallel(clock.step("weather", 0.0, 0.0)),
            clock.step("charge", 0.5, **charge),
            Commit(),
            clock.step("send"),
        ],
        name="trip",
        middleware=[record_times()],
    )


async def ended(runnable):
    """The outcome of a run, however it ended."""
    try:
        return await runnable.run()
    except Exception as error:
        return outcome_of(error)


async def pictures(clock):
    """Each timeline that is kept, by the name of its files."""

    def long(took, back, steps, name):
        parts = [clock.step(f"step {number}", took(number), back(number)) for number in range(steps)]
        return Saga([*parts, clock.step("last", fails=Boom())], name=name, middleware=[record_times()])

    hostile = [clock.step(name, 0.00025, 0.000125) for name in HOSTILE]
    return {
        "completed": timeline(await ended(trip(clock))),
        "compensated": timeline(await ended(trip(clock, fails=Boom()))),
        "compensation-failed": timeline(await ended(trip(clock, fails=Boom(), back_fails=Boom()))),
        "hostile": timeline(
            await ended(Saga(hostile, name='end "] %% <i>: ; #\n', middleware=[record_times()]))
        ),
        "hundred": timeline(
            await ended(long(lambda number: number, lambda number: number / 4, 99, "hundred"))
        ),
        "hours": timeline(
            await ended(long(lambda number: 3000.0 * number, lambda number: 3.0, 9, "hours"))
        ),
        "microseconds": timeline(
            Run(
                ("one", StepState.COMPLETED, ("action", 0.0, 3e-6)),
                ("two", StepState.COMPLETED, ("action", 3e-6, 9e-6)),
                ("three", StepState.COMPLETED, ("action", 9e-6, 9.5e-6)),
                state=SagaState.COMPLETED,
            ).outcome
        ),
        "instant": timeline(
            Run(
                ("one", StepState.COMPENSATED, ("action", 1.0, 1.0), ("compensation", 1.0, 1.0)),
                ("two", StepState.NOT_APPLIED, ("action", 1.0, 1.0)),
            ).outcome
        ),
        "recovered": timeline(
            Run(
                ("once", StepState.COMPENSATED, ("action", 0, 9), ("compensation", 150, 154)),
                (
                    "died, died again",
                    StepState.COMPENSATION_FAILED,
                    ("action", 9, None),
                    ("action", 90, 99.5),
                    ("compensation", 112, None),
                    ("compensation", 140, 150),
                ),
                ("in doubt", StepState.UNKNOWN, ("action", 99.5, None)),
                ("on rollback", StepState.COMPENSATED, ("compensation", 101, 112)),
                state=SagaState.FAILED,
            ).outcome
        ),
    }


async def test_timelines_are_as_they_were(clock):
    """Timelines of every kind are what their golden files say, on every loop."""
    drawn = await pictures(clock)

    kept = {f"timeline-{name}.{kind}" for name in drawn for kind in ("mmd", "txt")}
    assert kept == {path.name for path in GOLDEN.glob("timeline-*")}
    for name, picture in drawn.items():
        table = (GOLDEN / f"timeline-{name}.txt").read_text(encoding="utf-8")
        chart = (GOLDEN / f"timeline-{name}.mmd").read_text(encoding="utf-8")
        assert (table, chart) == (f"{picture}\n", picture.mermaid())


# --- the table ----------------------------------------------------------------------------------


def printed(picture, width, **options):
    """What rich prints of a timeline, in a terminal of this width."""
    text = StringIO()
    console = Console(file=text, width=width, color_system=None, **options)
    console.print(picture)
    return [line.rstrip() for line in text.getvalue().splitlines()]


async def test_the_table_has_the_width_of_the_terminal(clock):
    """Bars get what room there is; where there is little, names are cut, and bars are still there."""
    picture = timeline(await ended(trip(clock)))

    assert "\n".join(printed(picture, 100)) == str(picture)
    for width in (68, 80, 100, 200):
        lines = printed(picture, width)
        assert 18 == len(lines)  # a line for each place: nothing is wrapped
        assert width - 1 <= max(map(len, lines)) <= width
        assert 9 == sum("█" in line for line in lines[:-1])
        assert all("completed" in line for line in lines if "█" in line and "0." in line)
    assert "parallel: booki…" in "\n".join(printed(picture, 68))
    assert "parallel: bookings" in "\n".join(printed(picture, 70))
    assert 18 == len(printed(picture, 30))


async def test_the_bars_cover_the_run(clock):
    """The first bar begins where the column does, the last one ends at its end, or beside it."""
    lines = printed(timeline(await ended(trip(clock, fails=Boom()))), 120)
    flight = next(line for line in lines if "flight" in line)
    bars = flight[lines[1].index("0 to") :]

    assert bars.startswith("█")
    assert bars.endswith("░")
    assert len(bars) == 120 - lines[1].index("0 to")


def test_what_is_short_has_a_bar_too():
    """Each stretch has a cell of its own, if it takes no time at all, or is at the very end."""
    run = Run(
        ("long", StepState.COMPENSATED, ("action", 0, 1), ("compensation", 1, 1)),
        ("short", StepState.COMPENSATED, ("action", 1, 1), ("compensation", 1, 1)),
        ("both", StepState.COMPENSATED, ("action", 0.5, 0.5), ("compensation", 0.5, 0.5)),
    )
    lines = printed(timeline(run.outcome), 80)

    assert lines[2].endswith("█░")
    assert lines[3].endswith(" █░")
    assert " █░" in lines[4]
    assert len(lines[2]) == len(lines[3])


def test_more_bars_than_cells():
    """An action that was tried again more often than there are cells keeps to its line."""
    tries = [("action", number, number) for number in range(200)]
    lines = printed(timeline(Run(("again", StepState.UNKNOWN, *tries)).outcome), 80)

    assert 4 == len(lines)
    assert 80 == len(lines[2])
    assert lines[2].endswith(40 * "█")


async def test_colours_say_it_too(clock):
    """On a terminal the bars have colours: green forward, red where that failed, blue back."""
    text = StringIO()
    console = Console(file=text, width=100, color_system="standard", force_terminal=True)
    console.print(timeline(await ended(trip(clock, fails=Boom()))))

    assert "\x1b[32m█" in text.getvalue()
    assert "\x1b[31mx" in text.getvalue()
    assert "\x1b[34m░" in text.getvalue()


@pytest.mark.parametrize("name", [*HOSTILE, "[bold]x[/bold]", "[/]", ":smile:"])
def test_a_name_is_shown_as_it_is(name):
    """Nothing in a name is taken for rich's markup, moves the cursor, or breaks a line."""
    picture = timeline(Run((name, StepState.COMPLETED, ("action", 0, 1))).outcome)
    lines = str(picture).splitlines()

    assert 4 == len(lines)
    assert all(line.isprintable() for line in lines)
    if len(name) <= 40 and name.isprintable():
        assert f"0  {name}  " in lines[2]


def test_a_saga_is_shown_as_it_is():
    """The name of a saga, in the table's first line and in the chart's title, keeps to its line."""
    run = Run(("a", StepState.COMPLETED, ("action", 0, 1)))
    run.saga_name = "two\nlines: [b]"

    assert "saga two↵lines: [b]: compensated" == str(timeline(run.outcome)).splitlines()[0]
    assert (
        "  title two↵lines#58; #91;b#93;, compensated, in 1.00 s\n" in timeline(run.outcome).mermaid()
    )


def test_without_rich_the_chart_is_there(monkeypatch):
    """Without rich a timeline says what to install when it is asked for text; the chart needs none."""
    monkeypatch.setitem(sys.modules, "rich.console", None)
    picture = timeline(Run(("a", StepState.COMPLETED, ("action", 0, 1))).outcome)

    with pytest.raises(ImportError, match=r'pip install "pysagas\[progress\]"; its mermaid\(\) does'):
        str(picture)
    assert picture.mermaid().startswith("gantt\n")


def test_repr_names_the_saga_and_how_long_it_took():
    """A timeline in a debugger is one line."""
    run = Run(("a", StepState.COMPLETED, ("action", 0, 1.5)))

    assert "<Timeline of saga 'trip': 1.50 s>" == repr(timeline(run.outcome))


# --- the chart ----------------------------------------------------------------------------------


def tasks(picture):
    """The tasks of a chart: what it says, its mark, when it begins and ends."""
    return re.findall(r"^    ([^:]*) :(crit, |done, |)(\d+), (\d+)$", picture.mermaid(), re.MULTILINE)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_cannot_leave_its_task(name):
    """Whatever a name holds, its line is a path, letters, digits, codes, and the times behind a colon."""
    picture = timeline(Run((name, StepState.COMPLETED, ("action", 0, 1))).outcome)
    [(text, *rest)] = tasks(picture)

    assert ["", "0", "1000000"] == rest
    assert re.fullmatch(r"0 (?:[\w\s↵…\ufffd.,()-]|#\d+;)+, 1\.00 s", text)
    assert 8 == picture.mermaid().count("\n")


@pytest.mark.parametrize(
    ("span", "axis", "ticks", "end"),
    [
        (0.0, "µs", 1, 0),
        (1e-9, "µs", 1, 0),
        (4e-6, "µs", 1, 4000),
        (4.9e-3, "µs", 1000, 4_900_000),
        (5.1e-3, "ms", 1, 5100),
        (0.5, "ms", 100, 500_000),
        (4.9, "ms", 1000, 4_900_000),
        (7.0, "s", 1, 7000),
        (7.5, "s", 2, 7500),
        (290.0, "s", 50, 290_000),
        (330.0, "min", 1, 5500),
        (30 * 3600, "h", 5, 30_000),
        (40 * 86400, "h", 200, 960_000),
    ],
)
def test_the_axis_counts_what_there_are_several_of(span, axis, ticks, end):
    """From microseconds to weeks, an axis has up to seven ticks, at round numbers of a fitting unit."""
    picture = timeline(Run(("a", StepState.COMPLETED, ("action", 0, span))).outcome)

    assert f"  axisFormat %s {axis}\n  tickInterval {ticks * 1000}millisecond\n" in picture.mermaid()
    assert max(end, 1) == int(tasks(picture)[0][3])
    assert span <= 1e-9 or end / 1000 / ticks <= 7


def test_every_task_can_be_seen():
    """A task that took no time, or of which the end is unknown, is a sliver of the whole chart."""
    run = Run(
        ("a", StepState.COMPLETED, ("action", 0, 0)),
        ("b", StepState.UNKNOWN, ("action", 0, None)),
        ("c", StepState.COMPLETED, ("action", 0, 3)),
    )

    assert [
        ("0 a, 0 s", "", "0", "10000"),
        ("1 b, end unknown", "", "0", "10000"),
        ("2 c, 3.00 s", "", "0", "3000000"),
    ] == tasks(timeline(run.outcome))


async def test_what_goes_wrong_is_marked_and_said(clock):
    """What failed is marked, and says so in a word; what was taken back is told from what was done."""
    picture = timeline(await ended(trip(clock, fails=Boom(), back_fails=Boom())))
    marks = {(text.split(", ")[0], mark): text for text, mark, *_ in tasks(picture)}

    assert "4 charge, failed, 500 ms" in marks.values()
    assert ("0 flight", "") in marks
    assert ("0 flight", "done, ") in marks
    failed = [text for (_, mark), text in marks.items() if mark == "crit, "]
    assert ["4 charge, failed, 500 ms"] == failed
    chart = picture.mermaid()
    forward, back = chart.split("  section ")[1:]
    assert forward.startswith("forward\n")
    assert back.startswith("taken back\n")
    assert "4 charge, failed, 500 ms :crit" in back


def test_what_was_not_taken_back_has_no_section():
    """A run that only went forward has no section for the way back, nor the other way round."""
    forward = Run(("a", StepState.COMPLETED, ("action", 0, 1)))
    back = Run(("a", StepState.COMPENSATED, ("compensation", 0, 1)))

    assert ["forward"] == re.findall(r"section (.*)", timeline(forward.outcome).mermaid())
    assert ["taken back"] == re.findall(r"section (.*)", timeline(back.outcome).mermaid())


# --- what it is given ---------------------------------------------------------------------------


async def test_an_outcome_without_times():
    """An outcome that holds no times is refused, in words that say what to write."""
    outcome = await Saga([Step(lambda: None)], name="trip").run()

    with pytest.raises(ValueError, match=r"'trip'.* no times.*middleware=\[record_times\(\)\]"):
        timeline(outcome)


@pytest.mark.parametrize("wrong", [None, "trip", Saga([]), TreeNode("step", "a", (0,)), Outcome])
def test_what_has_no_timeline(wrong):
    """Anything but an outcome is refused, and shown."""
    with pytest.raises(TypeError, match="timeline shows an Outcome, not ") as raised:
        timeline(wrong)
    assert repr(wrong) in str(raised.value)


def test_what_it_gives():
    """What comes of it has a type to name."""
    assert Timeline is type(timeline(Run(("a", StepState.COMPLETED, ("action", 0, 1))).outcome))
