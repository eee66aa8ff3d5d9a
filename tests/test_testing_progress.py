"""How far an exploration has come: shown where somebody waits for it, and nowhere else."""

from __future__ import annotations

import io
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from worlds import Lab

from pysagas import Saga
from pysagas.testing import _explore, _progress, explore
from pysagas.testing._progress import PACE, PATIENCE, progress_on


class Terminal(io.StringIO):
    """A stream that says whether it is a terminal."""

    def __init__(self, *, tty: bool) -> None:
        super().__init__()
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty


class Clock:
    """Time that is told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def stderr_is(stream, monkeypatch):
    # For this module alone: pytest puts its own in place of `sys.stderr`.
    monkeypatch.setattr(_progress, "sys", SimpleNamespace(stderr=stream))


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def terminal(monkeypatch):
    terminal = Terminal(tty=True)
    stderr_is(terminal, monkeypatch)
    # What rich looks at: a terminal of a known kind.
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return terminal


@pytest.fixture
def plain(terminal, monkeypatch):
    """A terminal, and no rich."""
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    return terminal


def test_who_waits_long_is_told(plain, clock):
    """After a second, on one line that is written over and wiped away in the end."""
    with progress_on("order", None, clock=clock) as advance:
        clock.now += PATIENCE
        advance(30, 400)
        assert plain.getvalue() == "\rexploring order: 30 of 400 runs"
        clock.now += PACE
        advance(31, 9)
        assert plain.getvalue().endswith("\rexploring order: 31 of 9 runs  ")
    assert plain.getvalue().endswith("\r" + " " * len("exploring order: 30 of 400 runs") + "\r")


def test_what_is_not_known_yet(plain, clock):
    """How many there are may not be known."""
    with progress_on("order", None, clock=clock) as advance:
        clock.now += 60
        advance(1, None)
    assert "exploring order: 1 of ? runs" in plain.getvalue()


def test_what_is_soon_done_shows_nothing(plain, clock):
    """Who need not wait is not bothered."""
    with progress_on("order", None, clock=clock) as advance:
        for number in range(20):
            clock.now += PATIENCE / 25
            advance(number, 20)
    assert plain.getvalue() == ""


def test_it_is_not_said_too_often(plain, clock):
    """A line at most every fifth of a second."""
    with progress_on("order", None, clock=clock) as advance:
        clock.now += PATIENCE
        for number in range(10):
            advance(number, 10)
            clock.now += PACE / 2.5
    assert plain.getvalue().count("exploring") == 4


def test_a_stream_that_is_no_terminal_gets_nothing(monkeypatch, clock):
    """A log is no place for it, unless it is asked for."""
    stream = Terminal(tty=False)
    stderr_is(stream, monkeypatch)
    monkeypatch.setitem(sys.modules, "rich.progress", None)

    with progress_on("order", None, clock=clock) as advance:
        clock.now += 60
        advance(1, 2)
    assert stream.getvalue() == ""

    with progress_on("order", True, clock=clock) as advance:
        clock.now += 60
        advance(1, 2)
    assert "exploring order: 1 of 2 runs" in stream.getvalue()


def test_it_can_be_turned_off(plain, clock):
    """On a terminal too."""
    with progress_on("order", False, clock=clock) as advance:
        clock.now += 60
        advance(1, 2)
    assert plain.getvalue() == ""


@pytest.mark.parametrize("wanted", [None, True, False])
def test_who_has_no_standard_error_is_told_nothing(monkeypatch, clock, wanted):
    """A program without a console has none."""
    stderr_is(None, monkeypatch)

    with progress_on("order", wanted, clock=clock) as advance:
        clock.now += 60
        advance(1, 2)


def test_it_is_wiped_away_after_a_failure(plain, clock):
    """What went wrong is not written beside it."""
    with pytest.raises(LookupError), progress_on("order", None, clock=clock) as advance:
        clock.now += 60
        advance(1, 2)
        raise LookupError
    assert plain.getvalue().endswith(" \r")


def test_with_rich_there_is_a_bar(terminal, clock):
    """Where rich is installed, it draws."""
    with progress_on("order", None, clock=clock) as advance:
        clock.now += 60
        advance(1, None)
        clock.now += 60
        advance(2, 4)
    text = terminal.getvalue()
    assert "exploring order" in text
    assert "50%" in text
    assert "runs" not in text


def test_a_bar_is_not_even_made_for_what_is_soon_done(terminal, clock):
    """Nothing is written, nor begun."""
    with progress_on("order", True, clock=clock) as advance:
        advance(1, 2)
    assert terminal.getvalue() == ""


# --- in an exploration -------------------------------------------------------------------------


@pytest.fixture
def told(monkeypatch):
    """What an exploration tells: name, what was asked for, and each step."""
    told = []

    @contextmanager
    def progress_on(name, wanted):
        told.append((name, wanted))
        yield lambda done, total: told.append((done, total))
        told.append("done")

    monkeypatch.setattr(_explore, "progress_on", progress_on)
    return told


def build(world):
    return Saga([world.step("a")], name="order")


@pytest.mark.anyio
async def test_each_run_is_told(anyio_backend, told):
    """With the number of all, which is known from the beginning."""
    report = await explore(Lab(build), progress=False)

    count = len(report.results)
    assert told == [("order", False), *((done, count) for done in range(1, count + 1)), "done"]


@pytest.mark.anyio
async def test_each_pair_is_told(anyio_backend, told):
    """With an estimate that comes true in the end."""
    report = await explore(Lab(build), pairs=True)

    (name, *steps, end) = told
    assert (name, end) == (("order", None), "done")
    assert [done for done, _ in steps] == list(range(1, len(report.results) + 1))
    assert steps[0] == (1, None)
    assert {total for _, total in steps} > {None}
    totals = [total for _, total in steps if total is not None]
    assert totals[-1] <= len(report.results) * 2
    assert all(done <= total for done, total in steps if total is not None)


@pytest.mark.anyio
async def test_an_exploration_writes_nothing_by_itself(anyio_backend, capsys):
    """Under pytest standard error is no terminal."""
    report = await explore(Lab(build))

    assert report.ok, report
    assert capsys.readouterr() == ("", "")
