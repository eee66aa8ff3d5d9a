"""Progress as a tree on a terminal, and as lines elsewhere: what it shows, and that it always ends."""

from __future__ import annotations

import gc
import io
import re
import sys
import threading
import types

import anyio
import pyte
import pytest
from anyio.lowlevel import checkpoint
from helpers import GROUPED, SEQUENCES, Boom, Crash, World, checked_world, every_way, interrupted
from rich.console import Console
from rich.errors import LiveError
from rich.live import Live

from pysagas import (
    Commit,
    CompensationFailed,
    Effect,
    Parallel,
    Saga,
    SagaScope,
    SagaState,
    Step,
    open_saga,
    saga,
)
from pysagas.durable import SQLiteJournal
from pysagas.observe import _display
from pysagas.observe._tree import Run
from pysagas.observe.progress import show_progress

pytestmark = pytest.mark.anyio


class Terminal(io.TextIOBase):
    """A terminal: what is written to it, and what then is on its screen."""

    encoding = "utf-8"

    def __init__(self, width=60, height=24):
        self.written = []
        self.screen = pyte.HistoryScreen(width, height, history=5000)
        self._stream = pyte.Stream(self.screen)
        self._changed = threading.Condition()
        self.cursor_was_hidden = False
        # What happens instead of the next writing.
        self.instead = None

    def write(self, text):
        if self.instead is not None:
            self.instead()
        with self._changed:
            self.written.append(text)
            self._stream.feed(text.replace("\n", "\r\n"))
            # Whenever a program is killed, it leaves a terminal with a cursor.
            self.cursor_was_hidden |= self.screen.cursor.hidden
            self._changed.notify_all()
        return len(text)

    def isatty(self):
        return True

    @property
    def lines(self):
        """All that is to be read, what has moved out of sight included."""
        width = self.screen.columns
        rows = ["".join(row[x].data for x in range(width)) for row in self.screen.history.top]
        text = "\n".join(row.rstrip() for row in [*rows, *self.screen.display])
        return text.rstrip().split("\n")

    def wait_for(self, *lines):
        """Returns when the last lines are these; they come from another thread."""
        with self._changed:
            came = self._changed.wait_for(lambda: self.lines[-len(lines) :] == [*lines], 10)
        assert came, "\n".join(self.lines)

    def check_given_back(self):
        """The cursor, always to be seen, is at the start of a line, and nothing draws any more."""
        assert not self.cursor_was_hidden
        assert 0 == self.screen.cursor.x
        assert [] == painters()


def painters():
    return [thread for thread in threading.enumerate() if thread.name == "pysagas progress"]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Lets nothing but the test say what kind of terminal there is."""
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "LINES", "TTY_INTERACTIVE", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    # However busy the machine is.
    monkeypatch.setattr(_display, "_PATIENCE", 10)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def terminal():
    one = Terminal()
    yield one
    one.check_given_back()


@pytest.fixture
def console(terminal, clock):
    return console_of(terminal, clock)


def console_of(terminal, clock=None):
    return Console(
        file=terminal,
        force_terminal=True,
        color_system=None,
        width=terminal.screen.columns,
        height=terminal.screen.lines,
        get_time=clock,
    )


@pytest.fixture
def world():
    yield from checked_world()


@pytest.fixture
def paper(clock):
    """A file, no terminal; and the middleware that prints to it."""
    file = io.StringIO()
    file.middleware = [show_progress(Console(file=file, get_time=clock, width=40))]
    return file


async def nothing(*_):
    pass


# --- the tree -----------------------------------------------------------------------------------


async def test_the_tree_is_kept_up_to_date(terminal, console, clock):
    """What runs, what is done and what is being taken back is on the screen while it does."""

    async def book():
        terminal.wait_for("⠋ trip      running  0.00 s", "  ⠋ flight  running  0.00 s")
        clock.now += 1.25

    async def fail():
        terminal.wait_for(
            "⠹ trip      running  1.25 s",
            "  ✓ flight  done     1.25 s",
            "  ⠹ moon    running  0.00 s",
        )
        clock.now += 70
        raise Boom("full")

    async def cancel():
        terminal.wait_for(
            "⠹ trip      being taken back    1:11",
            "  ⠹ flight  being taken back  0.00 s",
            "  ✗ moon    failed              1:10  Boom('full')",
        )
        clock.now += 3600

    parts = [Step(book, cancel, name="flight"), Step(fail, name="moon", not_applied=Boom)]
    with pytest.raises(Boom):
        await Saga(parts, name="trip", middleware=[show_progress(console)]).run()

    assert [
        "↺ trip      taken back  1:01:11",
        "  ↺ flight  taken back  1:00:00",
        "  ✗ moon    failed         1:10  Boom('full')",
    ] == terminal.lines


async def test_what_holds_steps_is_shown_as_they_are(terminal, console, clock):
    """A group, or a saga in a saga, is being taken back while something in it is."""

    async def look():
        clock.now += 1

    async def fail():
        raise Boom

    async def stuck():
        raise Crash

    cars = Saga(
        [
            Step(nothing, name="mail"),
            Step(nothing, nothing, name="car"),
            Step(nothing, stuck, name="plate"),
        ],
        name="cars",
    )
    seats = Parallel(Step(nothing, look, name="aisle"), Step(nothing, name="menu"), name="seats")
    parts = [
        Step(nothing, nothing, name="a"),
        Parallel(cars, name="stay"),
        seats,
        Step(fail, nothing, name="moon"),
    ]

    with pytest.raises(CompensationFailed):
        await Saga(parts, name="trip", middleware=[show_progress(console)]).run()

    assert [
        "✗ trip         could not be taken back  1.00 s",
        "  ↺ a          taken back               0.00 s",
        "  ✗ stay       could not be taken back  0.00 s",
        "    ✗ cars     could not be taken back  0.00 s",
        "      ✓ mail   done                     0.00 s",
        "      ↺ car    taken back               0.00 s",
        "      ✗ plate  could not be taken back  0.00 s  Crash()",
        "  ↺ seats      taken back               0.00 s",
        "    ↺ aisle    taken back               1.00 s",
        "    ✓ menu     done                     0.00 s",
        "  ↺ moon       taken back               0.00 s  Boom()",
    ] == terminal.lines


async def test_a_group_in_the_middle_of_its_rollback(terminal, console):
    """While something in a group is to be taken back, the group is being taken back."""

    async def look():
        terminal.wait_for(
            "⠋ trip     being taken back  0.00 s",
            "  ⠋ g      being taken back  0.00 s",
            "    ⠋ s    being taken back  0.00 s",
            "      ⠋ a  being taken back  0.00 s",
            "      ↺ b  taken back        0.00 s",
            "  ✗ c      failed            0.00 s  Boom()",
        )

    async def fail():
        raise Boom

    inner = Saga([Step(nothing, look, name="a"), Step(nothing, nothing, name="b")], name="s")
    parts = [Parallel(inner, name="g"), Step(fail, name="c", not_applied=Boom)]
    with pytest.raises(Boom):
        await Saga(parts, name="trip", middleware=[show_progress(console)]).run()


async def test_between_two_compensations_a_group_is_not_done(clock):
    """Of a group that is half taken back the word is that, though nothing in it runs this moment."""
    words = []
    run = Run("r")

    async def watch(effect, call_next):
        token = object()
        run.begin(effect, token, effect.name, 0)
        if (1,) in run.nodes:
            words.append(run.word(run.nodes[1,]))
        error = None
        try:
            return await call_next()
        except BaseException as raised:
            error = raised
            raise
        finally:
            run.end(effect, run.open.pop(token), None, error, [], 0)
            if (1,) in run.nodes:
                words.append(run.word(run.nodes[1,]))

    async def fail():
        raise Boom

    inner = Saga([Step(nothing, nothing), Step(nothing, nothing)], name="s")
    with pytest.raises(Boom):
        await Saga([Step(nothing), inner, Step(fail)], middleware=[watch]).run()

    assert ["running", "done", "being taken back", "taken back"] == [*dict.fromkeys(words)]
    assert "taken back" == words[-1]


async def test_a_save_point_that_is_taken_back(terminal, console):
    """A nested scope has no effect of its own before it is taken back; then it has a line."""

    async def fail():
        raise Boom

    @saga(name="trip", middleware=[show_progress(console)])
    async def trip(scope: SagaScope):
        await scope.step(nothing, name="a")
        try:
            async with scope.nested() as nested:
                await nested.step(nothing, compensation=nothing, name="b")
                await nested.step(fail, compensation=nothing, name="c")
        except Boom:
            pass
        try:
            await scope.step(fail, compensation=nothing, name="d")
        except Boom:
            pass
        await scope.step(nothing, name="e")

    await trip.run()

    assert [
        "✓ trip      done        0.00 s",
        "  ✓ a       done        0.00 s",
        "  ↺ nested  taken back  0.00 s",
        "    ↺ b     taken back  0.00 s",
        "    ↺ c     taken back  0.00 s  Boom()",
        "  ↺ d       taken back  0.00 s  Boom()",
        "  ✓ e       done        0.00 s",
    ] == terminal.lines


async def test_a_compensation_that_fails_in_a_call(terminal, console):
    """A rollback of a part of the run ends as what it could not take back."""

    async def fail():
        raise Boom

    async def stuck():
        raise Crash

    @saga(name="trip", middleware=[show_progress(console)])
    async def trip(scope: SagaScope):
        async with scope.nested() as nested:
            await nested.step(nothing, compensation=stuck, name="b")
            await nested.step(fail, name="c")

    with pytest.raises(CompensationFailed):
        await trip.run()

    assert [
        "✗ trip      could not be taken back  0.00 s",
        "  ✗ nested  could not be taken back  0.00 s",
        "    ✗ b     could not be taken back  0.00 s  Crash()",
        "    ✗ c     failed                   0.00 s",
        "        in doubt: Boom()",
    ] == terminal.lines


async def test_a_saga_that_has_passed_its_commit_has_failed(terminal, console):
    """What stays done after a failure is shown as done, and the saga as failed."""

    async def fail():
        raise Boom

    parts = [Step(nothing, nothing, name="a"), Commit(), Step(fail, name="b", not_applied=Boom)]
    with pytest.raises(Boom):
        await Saga(parts, name="trip", middleware=[show_progress(console)]).run()

    assert [
        "✗ trip      failed  0.00 s",
        "  ✓ a       done    0.00 s",
        "  ✓ commit  done    0.00 s",
        "  ✗ b       failed  0.00 s  Boom()",
    ] == terminal.lines


async def test_a_step_that_is_retried_or_runs_in_a_thread_is_one_line(terminal, console):
    """Attempts have no line, and a step in a worker thread is shown like another."""
    attempts = []

    async def twice():
        attempts.append("tried")
        if len(attempts) < 2:
            raise Boom

    async def retry(attempt):
        try:
            return await attempt()
        except Boom:
            return await attempt()

    def block():
        terminal.wait_for(
            "⠋ trip       running  0.00 s",
            "  ✓ a        done     0.00 s",
            "  ⠋ blocked  running  0.00 s",
        )

    parts = [Step(twice, retry=retry, name="a"), Step(block, blocking=True, name="blocked")]
    await Saga(parts, name="trip", middleware=[show_progress(console)]).run()

    assert [
        "✓ trip       done  0.00 s",
        "  ✓ a        done  0.00 s",
        "  ✓ blocked  done  0.00 s",
    ] == terminal.lines


async def test_what_is_printed_meanwhile_stands_above(terminal, clock, monkeypatch):
    """An action may print: its lines come before the tree, and do not tear it."""
    monkeypatch.setattr(sys, "stdout", terminal)

    async def talk():
        terminal.wait_for("⠋ trip    running  0.00 s", "  ⠋ talk  running  0.00 s")
        print("hello")  # noqa: T201 - as actions do
        terminal.wait_for("hello", "⠋ trip    running  0.00 s", "  ⠋ talk  running  0.00 s")

    console = console_of(terminal, clock)
    await Saga([Step(talk)], name="trip", middleware=[show_progress(console)]).run()

    assert sys.stdout is terminal
    assert ["hello", "✓ trip    done  0.00 s", "  ✓ talk  done  0.00 s"] == terminal.lines


def closed_file():
    file = io.StringIO()
    file.close()
    return file


@pytest.mark.parametrize("stream", [io.StringIO, closed_file, lambda: None, object])
async def test_what_is_written_to_a_file_gets_there(stream, terminal, console, monkeypatch):
    """A stream that is no terminal is left alone, though the tree stands on one; or is none at all."""
    written = stream()
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.setattr(sys, "stdout", written)

    async def talk():
        assert sys.stdout is sys.stderr is written

    await Saga([Step(talk)], name="trip", middleware=[show_progress(console)]).run()

    assert ["✓ trip    done  0.00 s", "  ✓ talk  done  0.00 s"] == terminal.lines


async def test_without_a_console_it_goes_to_where_stdout_is(terminal, monkeypatch):
    """The console is that of the moment in which a run begins."""
    middleware = [show_progress()]
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    await Saga([Step(nothing)], name="first", middleware=middleware).run()
    assert sys.stdout.getvalue().startswith("first: running\n")

    monkeypatch.setattr(sys, "stdout", terminal)
    await Saga([Step(nothing)], name="second", middleware=middleware).run()
    assert 2 == len(terminal.lines)
    assert re.match("✓ second +done +0.0. s", terminal.lines[0])


async def test_a_run_that_is_taken_back_later_has_a_tree_of_its_own(terminal, console):
    """`Outcome.rollback` shows what it takes back."""
    parts = [Step(nothing, nothing, name="a"), Step(nothing, name="b")]
    outcome = await Saga(parts, name="trip", middleware=[show_progress(console)]).run()
    await outcome.rollback()

    assert [
        "✓ trip  done  0.00 s",
        "  ✓ a   done  0.00 s",
        "  ✓ b   done  0.00 s",
        "↺ trip  taken back  0.00 s",
        "  ↺ a   taken back  0.00 s",
    ] == terminal.lines


async def test_each_call_in_a_block_is_a_tree(terminal, console):
    """Nothing tells where a block begins and ends: each of its calls is shown by itself."""
    async with open_saga(middleware=[show_progress(console)]) as scope:
        await scope.step(nothing, name="a")
        await scope.parallel(Step(nothing, name="b"), name="g")

    assert [
        "✓ a  done  0.00 s",
        "✓ g    done  0.00 s",
        "  ✓ b  done  0.00 s",
    ] == terminal.lines


async def test_an_observer_of_an_inner_saga_begins_in_the_middle(terminal, console):
    """Of an inner saga that alone is observed, what it does is shown, and so is its rollback."""

    async def fail():
        raise Boom

    inner = Saga([Step(nothing, nothing, name="a")], name="inner", middleware=[show_progress(console)])
    with pytest.raises(Boom):
        await Saga([Step(nothing), inner, Step(fail)], name="outer").run()

    assert [
        "✓ inner  done  0.00 s",
        "  ✓ a    done  0.00 s",
        "↺ a  taken back  0.00 s",
    ] == terminal.lines


async def test_a_saga_that_is_observed_twice_is_shown_once(terminal, console):
    """Sagas in each other may share the middleware."""
    middleware = [show_progress(console)]
    inner = Saga([Step(nothing, name="a")], name="inner", middleware=middleware)
    await Saga([inner], name="outer", middleware=middleware).run()

    assert [
        "✓ outer    done  0.00 s",
        "  ✓ inner  done  0.00 s",
        "    ✓ a    done  0.00 s",
    ] == terminal.lines


@pytest.mark.parametrize("shape", [*SEQUENCES, *GROUPED])
async def test_every_shape_of_saga_is_shown(shape, world: World, terminal, console):
    """Sagas as data, as functions, as blocks, in sagas and in groups are shown alike."""
    middleware = [show_progress(console)] if shape.__name__ != "with_middleware" else None
    options = {"middleware": middleware} if middleware else {}
    with pytest.raises((Boom, ExceptionGroup)):
        await shape(world.step("a"), world.step("b", before=Boom()), **options)

    text = "\n".join(terminal.lines)
    if middleware:
        assert re.search(r"↺ a +taken back +\d", text)
        assert re.search(r"↺ b +taken back +\d", text)


# --- several at once ----------------------------------------------------------------------------


async def test_two_runs_at_once_have_a_tree_each(terminal, console):
    """The trees stand below each other; one that has ended stays, above that which goes on."""
    first_is_over = anyio.Event()

    async def first():
        first_runs.set()
        await second_runs.wait()
        terminal.wait_for(
            "⠋ trip one  running  0.00 s",
            "  ⠋ first   running  0.00 s",
            "⠋ trip two  running  0.00 s",
            "  ⠋ second  running  0.00 s",
        )

    async def second():
        second_runs.set()
        await first_is_over.wait()
        terminal.wait_for(
            "✓ trip one  done  0.00 s",
            "  ✓ first   done  0.00 s",
            "⠋ trip two  running  0.00 s",
            "  ⠋ second  running  0.00 s",
        )

    first_runs, second_runs = anyio.Event(), anyio.Event()
    middleware = [show_progress(console)]
    async with anyio.create_task_group() as tasks:

        async def run_first():
            await Saga([Step(first)], name="trip", middleware=middleware).run_with(run_id="one")
            first_is_over.set()

        tasks.start_soon(run_first)
        await first_runs.wait()
        await Saga([Step(second)], name="trip", middleware=middleware).run_with(run_id="two")

    assert [
        "✓ trip one  done  0.00 s",
        "  ✓ first   done  0.00 s",
        "✓ trip two  done  0.00 s",
        "  ✓ second  done  0.00 s",
    ] == terminal.lines


def test_runs_in_several_threads_share_it(terminal, console):
    """Runs in event loops of their own, in threads, do not get into each other's way."""
    together = threading.Barrier(4, timeout=10)
    middleware = [show_progress(console)]
    outcomes = []

    def run(name):
        async def meet():
            together.wait()

        async def main():
            for _ in range(5):
                whole = Saga([Step(meet), Step(nothing)], name=name, middleware=middleware)
                outcomes.append((await whole.run()).state)

        anyio.run(main)

    threads = [threading.Thread(target=run, args=(f"trip-{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [SagaState.COMPLETED] * 20 == outcomes
    assert 20 == sum("✓ trip-" in line for line in terminal.lines)
    assert 60 == len(terminal.lines)


async def test_more_runs_than_lines_are_counted(clock):
    """A terminal of a few lines shows the first runs, and how many more there are."""
    terminal = Terminal(height=5)
    everybody = 0

    async def wait():
        nonlocal everybody
        everybody += 1
        while everybody < 6:
            await checkpoint()
        if everybody == 6:
            everybody += 1
            terminal.wait_for(
                "⠋ 0 r0  running  0.00 s",
                "⠋ 1 r1  running  0.00 s",
                "⠋ 2 r2  running  0.00 s",
                "and 3 more sagas",
            )

    middleware = [show_progress(console_of(terminal, clock))]
    async with anyio.create_task_group() as tasks:
        for number in range(6):
            one = Saga([Step(wait)], name=str(number), middleware=middleware)
            tasks.start_soon(lambda one=one, number=number: one.run_with(run_id=f"r{number}"))
            await checkpoint()

    assert 12 == len(terminal.lines)
    terminal.check_given_back()


# --- more than there is room for ----------------------------------------------------------------


async def test_of_a_tall_tree_what_matters_is_shown(clock):
    """What runs, what has failed and the latest is to be seen, and the others are counted."""
    terminal = Terminal(width=50, height=9)

    async def fail():
        raise Boom

    async def look():
        terminal.wait_for(
            "⠋ loop     running  0.00 s",
            "  ✗ s-7    failed   0.00 s  Boom()",
            "  ✓ s-996  done     0.00 s",
            "  ✓ s-997  done     0.00 s",
            "  ✓ s-998  done     0.00 s",
            "  ✓ s-999  done     0.00 s",
            "  ⠋ look   running  0.00 s",
            "  and 995 more: 995 done",
        )

    @saga(name="loop", middleware=[show_progress(console_of(terminal, clock))])
    async def loop(scope: SagaScope):
        for number in range(1000):
            try:
                await scope.step(fail if number == 7 else nothing, name=f"s-{number}", not_applied=Boom)
            except Boom:
                pass
        await scope.step(look, name="look")

    await loop.run()

    assert 8 == len(terminal.lines)
    # It is drawn some times a second, not for each of 2,000 events.
    assert len(terminal.written) < 500
    terminal.check_given_back()


async def test_of_many_at_the_same_time_a_failure_is_shown_too(clock):
    """A wide group does not hide the failure in it, nor the group itself."""
    terminal = Terminal(height=8)
    all_run, all_end = anyio.Event(), anyio.Event()

    async def fail():
        await all_run.wait()
        raise Boom

    async def look():
        all_run.set()
        await anyio.to_thread.run_sync(
            terminal.wait_for,
            "⠋ trip        running  0.00 s",
            "  ⠋ parallel  running  0.00 s",
            "    ✗ bad     failed   0.00 s  Boom()",
            "    ⠋ w0      running  0.00 s",
            "    ⠋ w1      running  0.00 s",
            "    ⠋ w2      running  0.00 s",
            "  and 98 more: 98 running",
        )
        all_end.set()

    group = Parallel(
        Step(fail, name="bad", not_applied=Boom),
        *(Step(all_end.wait, name=f"w{number}") for number in range(100)),
        Step(look),
        on_failure="finish",
    )
    with pytest.raises(ExceptionGroup):
        await Saga([group], name="trip", middleware=[show_progress(console_of(terminal, clock))]).run()
    terminal.check_given_back()


def test_what_is_chosen_fits():
    """Whatever the room, no more lines are chosen than there are, and never none."""
    run = Run("r")
    for path in [(), *((one,) for one in range(50)), *((7, one, 3) for one in range(20))]:
        run.begin(Effect("action", "s", "r", "a", path), object(), "a", 0)
    for room in range(1, 90):
        nodes, rest = run.choose(room)
        assert nodes
        assert nodes[0].path == ()
        assert len(nodes) + bool(rest) <= room
        assert sorted(node.path for node in nodes) == [node.path for node in nodes]
    assert not rest


async def test_what_failed_and_why_is_readable_whole(clock):
    """At the end an error for which its line has no room stands below it, and none stands there twice."""
    terminal = Terminal(width=50, height=20)

    async def fail():
        raise Boom("there is no seat on flight 4711 to the moon, nor on any other")

    async def stuck():
        terminal.wait_for(
            "⠋ trip  being taken back  0.00 s",
            "  ⠋ a   being taken back  0.00 s",
            "  ✗ b   failed            0.00 s  Boom('there is …",
        )
        raise Crash("the counter is closed")

    parts = [Step(nothing, stuck, name="a"), Step(fail, name="b", not_applied=Boom)]
    whole = Saga(parts, name="trip", middleware=[show_progress(console_of(terminal, clock))])
    with pytest.raises(CompensationFailed):
        await whole.run()

    assert [
        "✗ trip  could not be taken back  0.00 s",
        "  ✗ a   could not be taken back  0.00 s",
        "      Crash('the counter is closed')",
        "  ✗ b   failed                   0.00 s",
        "      Boom('there is no seat on flight 4711 to the",
        "      moon, nor on any other')",
    ] == terminal.lines
    terminal.check_given_back()


async def test_what_no_step_has_said_stands_at_the_saga(paper):
    """Of a rollback that failed the saga says what started it and what failed, as far as no step did."""

    async def refuse(effect, call_next):
        if effect.kind == "rollback":
            raise Crash("no rollback today")
        return await call_next()

    async def fail():
        raise Boom("full")

    parts = [Step(nothing, nothing, name="a"), Step(fail, name="b", not_applied=Boom)]
    with pytest.raises(CompensationFailed):
        await Saga(parts, name="trip", middleware=[*paper.middleware, refuse]).run()

    text = paper.getvalue()
    assert 1 == text.count("Boom('full')")
    assert 1 == text.count("Crash('no rollback today')")
    assert "CompensationFailed" not in text
    assert r"\n" not in text


async def test_a_narrow_terminal_has_the_names(clock):
    """Where there is no room the end of a line is cut off, and a long name."""
    terminal = Terminal(width=32, height=10)
    parts = [Step(nothing, name="a very long name of a step"), Step(nothing, name="b")]
    await Saga(parts, name="trip", middleware=[show_progress(console_of(terminal, clock))]).run()

    assert [
        "✓ trip            done  0.00 s",
        "  ✓ a very long…  done  0.00 s",
        "  ✓ b             done  0.00 s",
    ] == terminal.lines
    terminal.check_given_back()


# --- names that may hold anything ---------------------------------------------------------------

HOSTILE = {
    "[red]x[/red]": "[red]x[/red]",
    "two\nlines": r"two\nlines",
    "\x1b[2Jgone": r"\x1b[2Jgone",
    "\r\x07": r"\r\x07",
    "\u202eabc": r"\u202eabc",
    "\udc80": r"\udc80",
    ":smile:": ":smile:",
    "汉字": "汉字",
    "long" * 100_000: f"{'long' * 59}l...",
}


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name[:12]))
async def test_a_name_is_shown_as_it_is_written(name, clock):
    """Markup, control characters and long names are text in one line, in a tree and as lines."""
    terminal = Terminal(width=600, height=10)
    file = io.StringIO()

    async def fail():
        raise Boom(name)

    for console in (console_of(terminal, clock), Console(file=file, get_time=clock)):
        whole = Saga(
            [Step(fail, name=name, not_applied=Boom)], name=name, middleware=[show_progress(console)]
        )
        with pytest.raises(Boom):
            await whole.run()

    shown = HOSTILE[name]
    error = repr(Boom(name))
    below = []
    if len(error) > 2000:
        error = f"{error[:1997]}..."
        below = [f"      {error[start : start + 594]}" for start in range(0, 2000, 594)]
    assert [
        f"↺ {shown}    taken back  0.00 s",
        f"  ✗ {shown}  failed      0.00 s" + ("" if below else f"  {error}"),
        *below,
    ] == [line.replace("汉 字 ", "汉字") for line in terminal.lines]
    assert [
        f"{shown}: running",
        f"  {shown}: failed in 0.00 s: {error}",
        f"{shown}: being taken back",
        f"{shown}: taken back in 0.00 s",
        "",
    ] == file.getvalue().split("\n")
    terminal.check_given_back()


async def test_a_terminal_that_knows_ascii_alone_gets_no_more(clock):
    """Marks, cuts and names are written in what the terminal can show."""
    terminal = Terminal(width=40)
    terminal.encoding = "ascii"

    async def fail():
        raise Boom("größer")

    async def look():
        terminal.wait_for(
            "| trip                running  0.00 s",
            "  + K\\xf6ln           done     0.00 s",
            "  + a name that is ~  done     0.00 s",
            "  | look              running  0.00 s",
        )

    parts = [Step(nothing, name="Köln"), Step(nothing, name="a name that is too long"), Step(look)]
    parts.append(Step(fail, not_applied=Boom))
    with pytest.raises(Boom):
        await Saga(parts, name="trip", middleware=[show_progress(console_of(terminal, clock))]).run()

    assert "".join(terminal.written).isascii()
    assert [
        "  x fail              failed      0.00 s",
        r"      Boom('gr\xf6\xdfer')",
    ] == terminal.lines[-2:]
    terminal.check_given_back()


# --- as lines -----------------------------------------------------------------------------------


async def test_without_a_terminal_there_are_lines(paper, clock):
    """A saga and a rollback have a line where they begin, and a step has one where it ends."""

    async def book():
        clock.now += 1.5

    async def fail():
        raise Boom("a long explanation, longer than a line of this paper")

    inner = Saga([Step(book, nothing, name="c")], name="inner")
    parts = [
        Step(book, book, name="a"),
        Parallel(Step(nothing, name="b"), name="g"),
        inner,
        Commit(),
        Step(fail, nothing, name="moon"),
    ]
    with pytest.raises(Boom):
        await Saga(parts, name="trip", middleware=paper.middleware).run()

    assert [
        "trip: running",
        "  a: done in 1.50 s",
        "  g: running",
        "    b: done in 0.00 s",
        "  inner: running",
        "    c: done in 1.50 s",
        "  inner: done in 1.50 s",
        "  commit: done in 0.00 s",
        "  moon: failed in 0.00 s: in doubt: Boom('a long explanation, longer than a line of this paper')",
        "trip: being taken back",
        "  moon: taken back in 0.00 s, after Boom('a long explanation, longer than a line of this paper')",
        "trip: failed in 3.00 s",
    ] == paper.getvalue().splitlines()


async def test_lines_of_runs_at_the_same_time_say_whose_they_are(paper):
    """Where several runs are under way, each line begins with the id of its run."""

    async def inside():
        await Saga([Step(nothing, name="b")], name="in", middleware=paper.middleware).run_with(
            run_id="two"
        )

    await Saga([Step(inside, name="a")], name="out", middleware=paper.middleware).run_with(run_id="one")

    assert [
        "out: running",
        "two: in: running",
        "two:   b: done in 0.00 s",
        "two: in: done in 0.00 s",
        "one:   a: done in 0.00 s",
        "one: out: done in 0.00 s",
    ] == paper.getvalue().splitlines()


async def test_a_dumb_terminal_gets_lines(clock, monkeypatch):
    """A terminal that understands no control codes is sent none."""
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    console = console_of(terminal, clock)
    await Saga([Step(nothing)], name="trip", middleware=[show_progress(console)]).run()

    assert ["trip: running", "  nothing: done in 0.00 s", "trip: done in 0.00 s"] == terminal.lines
    assert "\x1b" not in "".join(terminal.written)
    assert [] == painters()


# By rich itself, depending on its version: it says that something else is drawn, or it raises.
@pytest.mark.parametrize("refuses", [False, True])
async def test_where_something_else_is_drawn_lines_are_printed_above_it(
    refuses, terminal, console, monkeypatch
):
    """A console that shows a `Live` already keeps it, and progress is printed as lines."""
    set_live = console.set_live

    def refuse(live):
        raise LiveError("Only one live display may be active at once")

    with Live("something else", console=console, auto_refresh=False) as live:
        if refuses:
            monkeypatch.setattr(console, "set_live", refuse)
        await Saga([Step(nothing)], name="trip", middleware=[show_progress(console)]).run()
        monkeypatch.setattr(console, "set_live", set_live)
        live.refresh()
        assert [
            "trip: running",
            "  nothing: done in 0.00 s",
            "trip: done in 0.00 s",
            "something else",
        ] == terminal.lines
    terminal.cursor_was_hidden = False  # by that


# --- however it ends ----------------------------------------------------------------------------


@every_way
async def test_what_is_cancelled_ends(way, world: World, terminal, console):
    """However a run is cancelled, its tree says so."""
    trip = Saga(
        [world.step("a"), Parallel(world.member("b"), Step(world.functions("c")[0], name="c"))],
        name="trip",
        middleware=[show_progress(console)],
    )
    await interrupted(way, world, "c", trip.run)

    lines = [re.sub(r" +\d+\.\d\d s", "", line) for line in terminal.lines]
    assert [
        "↺ trip        taken back",
        "  ↺ a         taken back",
        "  ↺ parallel  taken back",
        "    ↺ b       taken back",
        "    ! c       interrupted  in doubt",
    ] == lines


@every_way
async def test_a_cancellation_in_the_rollback_is_no_end(way, world: World, terminal, console):
    """A cancellation that meets a compensation does not end the drawing before the rollback."""
    parts = [world.step("a"), world.step("b", before=Boom())]
    await interrupted(way, world, "-b", Saga(parts, middleware=[show_progress(console)]).run)

    assert 3 == len([line for line in terminal.lines if "taken back" in line])


@pytest.mark.parametrize("order", [KeyboardInterrupt, SystemExit])
async def test_an_order_to_quit_ends_it(order, world: World, terminal, console):
    """KeyboardInterrupt and SystemExit are shown as interruptions, and what they leave behind."""
    parts = [world.step("a", back=order()), Step(world.functions("b", before=order())[0], name="b")]
    with pytest.raises(order):
        await Saga(parts, name="trip", middleware=[show_progress(console)]).run()

    assert [
        "✗ trip  could not be taken back  0.00 s",
        "  ✗ a   could not be taken back  0.00 s",
        "  ! b   interrupted              0.00 s  in doubt",
    ] == terminal.lines
    world.done.clear()


def test_a_run_that_is_closed_gives_the_terminal_back(terminal, console):
    """A run whose coroutine is closed in the middle is drawn to its end, without a loop."""

    @types.coroutine
    def pause():
        yield

    async def act():
        await pause()

    run = Saga([Step(act, name="a")], name="trip", middleware=[show_progress(console)]).run()
    run.send(None)
    terminal.wait_for("⠋ trip  running  0.00 s", "  ⠋ a   running  0.00 s")
    run.close()

    assert [
        "! trip  interrupted  0.00 s",
        "  ! a   interrupted  0.00 s  in doubt",
    ] == terminal.lines


def test_a_run_that_nobody_ends_is_drawn_until_the_program_ends(terminal, console, monkeypatch):
    """At the end of the program the tree is whole, and the effects to come are harmless."""

    @types.coroutine
    def pause():
        yield

    async def act():
        await pause()

    at_exit = []
    monkeypatch.setattr("atexit.register", at_exit.append)
    run = Saga([Step(act, name="a")], name="trip", middleware=[show_progress(console)]).run()
    run.send(None)
    [close] = at_exit
    close()
    assert ["⠋ trip  running  0.00 s", "  ⠋ a   running  0.00 s"] == terminal.lines
    terminal.check_given_back()

    close()
    with pytest.raises(StopIteration):
        run.send(None)


def test_a_run_that_is_closed_while_it_is_drawn(terminal, console, monkeypatch):
    """The garbage collector may close a run in any thread: in the one that draws it, too."""

    @types.coroutine
    def pause():
        yield

    async def act():
        await pause()

    runs = []
    update = Live.update

    def close_one(live, *args, **kwargs):
        while runs:
            runs.pop().close()
        update(live, *args, **kwargs)

    run = Saga([Step(act, name="a")], name="trip", middleware=[show_progress(console)]).run()
    run.send(None)
    [painter] = painters()
    monkeypatch.setattr(Live, "update", close_one)
    runs.append(run)
    painter.join(10)

    assert 2 == len(terminal.lines)


async def test_a_ctrl_c_in_the_observer_ends_it(terminal, console, monkeypatch):
    """What is raised in the middle of writing an effect down does not leave it under way."""
    begin = Run.begin

    def interrupt(run, effect, *args):
        if effect.name == "b":
            raise KeyboardInterrupt
        return begin(run, effect, *args)

    monkeypatch.setattr(Run, "begin", interrupt)
    parts = [Step(nothing, nothing, name="a"), Step(nothing, name="b")]
    with pytest.raises(KeyboardInterrupt):
        await Saga(parts, name="trip", middleware=[show_progress(console)]).run()

    assert ["↺ trip  taken back  0.00 s", "  ↺ a   taken back  0.00 s"] == terminal.lines


async def test_a_stopped_terminal_does_not_stop_the_saga(clock, monkeypatch):
    """A run waits for its drawing, but not for ever: a terminal may be stopped with Ctrl-S."""
    monkeypatch.setattr(_display, "_PATIENCE", 0.01)
    goes_on = threading.Event()
    terminal = Terminal()
    terminal.instead = lambda: goes_on.wait(10)
    middleware = [show_progress(console_of(terminal, clock))]
    outcome = await Saga([Step(nothing)], name="trip", middleware=middleware).run()

    assert SagaState.COMPLETED is outcome.state
    [painter] = painters()
    monkeypatch.setattr(_display, "_PATIENCE", 1000)  # nobody waits again for what does not come
    await Saga([Step(nothing)], name="trip", middleware=middleware).run()
    goes_on.set()
    painter.join(10)
    assert ["✓ trip       done  0.00 s", "  ✓ nothing  done  0.00 s"] * 2 == terminal.lines
    terminal.check_given_back()


async def test_a_run_that_begins_while_the_last_is_leaving(clock, monkeypatch):
    """A run that begins when the drawing of the last one ends is drawn, too."""
    monkeypatch.setattr(_display, "_PATIENCE", 0.01)
    terminal = Terminal()
    stop = Live.stop
    leaving, goes_on = threading.Event(), threading.Event()

    def slow_stop(live):
        stop(live)
        leaving.set()
        goes_on.wait(10)

    monkeypatch.setattr(Live, "stop", slow_stop)
    middleware = [show_progress(console_of(terminal, clock))]

    async def act():
        goes_on.set()
        terminal.wait_for("⠋ two    running  0.00 s", "  ⠋ act  running  0.00 s")

    await Saga([Step(nothing)], name="one", middleware=middleware).run()
    assert leaving.wait(10)
    [painter] = painters()
    await Saga([Step(act)], name="two", middleware=middleware).run()
    painter.join(10)

    assert 4 == len(terminal.lines)
    terminal.check_given_back()


async def test_runs_that_end_at_once_are_all_shown(clock, monkeypatch):
    """Of more runs than are drawn at once, each has its tree when the last one has ended."""
    monkeypatch.setattr(_display, "_AT_ONCE", 2)
    terminal = Terminal()
    middleware = [show_progress(console_of(terminal, clock))]
    async with anyio.create_task_group() as tasks:
        for number in range(9):
            tasks.start_soon(Saga([Step(checkpoint)], name=f"trip-{number}", middleware=middleware).run)

    names = [line.split()[1] for line in terminal.lines if "trip-" in line]
    assert [f"trip-{number}" for number in range(9)] == sorted(names)
    terminal.check_given_back()


def test_a_run_without_nodes_is_shown_as_nothing(terminal, console, monkeypatch):
    """A Ctrl-C that meets a run before its first effect is written down does not end the progress."""
    middleware = [show_progress(console)]

    def interrupt(run, *args):
        raise KeyboardInterrupt

    whole = Saga([Step(nothing, name="a")], name="trip", middleware=middleware)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "begin", interrupt)
        with pytest.raises(KeyboardInterrupt):
            whole.run().send(None)
    assert [] == _display._tree(Run("r"), console, 5)
    with pytest.raises(StopIteration):
        whole.run().send(None)

    assert ["✓ trip  done  0.00 s", "  ✓ a   done  0.00 s"] == terminal.lines


@pytest.mark.parametrize("given", [True, False])
async def test_a_child_of_a_fork_begins_afresh(given, clock, monkeypatch):
    """It has neither the thread that draws nor what that has locked, and shows its own runs."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    held, goes_on = threading.Event(), threading.Event()
    painters_of_parent = []
    middleware = [show_progress(console_of(terminal, clock) if given else None)]

    async def fork():
        terminal.instead = lambda: (held.set(), goes_on.wait(10))
        await anyio.to_thread.run_sync(held.wait)
        terminal.instead = None
        assert sys.stdout is not terminal
        # As it is called in the child, in which the painter does not go on.
        _display._start_afresh()
        assert sys.stdout is terminal
        await Saga([Step(nothing)], name="of the child", middleware=middleware).run()
        assert any("of the child" in line for line in terminal.lines)
        painters_of_parent.extend(painters())
        goes_on.set()

    await Saga([Step(fork)], name="of the parent", middleware=middleware).run()
    [painter] = painters_of_parent
    painter.join(10)
    assert [] == painters()


@pytest.mark.parametrize("on_terminal", [True, False])
async def test_nothing_is_kept_of_a_run(on_terminal, clock):
    """After its end a run is held by nobody."""

    def known():
        gc.collect()
        return {id(one) for one in gc.get_objects() if isinstance(one, Run)}

    before = known()  # the reports of tests that have failed hold theirs
    terminal = Terminal()
    console = console_of(terminal, clock) if on_terminal else Console(file=io.StringIO())
    middleware = [show_progress(console)]

    async def fail():
        raise Boom

    with pytest.raises(Boom):
        await Saga([Step(nothing), Step(fail, nothing)], middleware=middleware).run()

    assert known() <= before
    assert [] == painters()


async def test_under_a_journal_what_runs_in_this_process_is_shown(tmp_path, terminal, console):
    """A run that is tried again shows what it takes back now; what is replayed has no line."""
    broken = [Crash()]

    async def back():
        for error in broken:
            raise error

    async def fail():
        raise Boom

    trip = Saga(
        [Step(nothing, back, name="a"), Step(nothing, name="b"), Step(fail, not_applied=Boom)],
        name="trip",
        middleware=[show_progress(console)],
    )
    async with SQLiteJournal(tmp_path / "sagas.db") as journal:
        with pytest.raises(CompensationFailed):
            await journal.run(trip, run_id="trip-42")
        broken.clear()
        with pytest.raises(Boom):
            await journal.retry(trip, "trip-42")

    assert ["↺ trip  taken back  0.00 s", "  ↺ a   taken back  0.00 s"] == [
        line.removesuffix("  Boom()") for line in terminal.lines[4:]
    ]


# --- errors of the console ----------------------------------------------------------------------


def closed():
    raise ValueError("I/O operation on closed file")


def broken_pipe():
    raise BrokenPipeError(32, "Broken pipe")


@pytest.fixture
def harmless(monkeypatch):
    """Keeps rich, which ends a program at a broken pipe, from closing the tests' own stdout."""

    def leave(console):
        console.quiet = True
        raise SystemExit(1)

    monkeypatch.setattr(Console, "on_broken_pipe", leave, raising=False)


@pytest.mark.parametrize("error", [closed, broken_pipe])
@pytest.mark.parametrize("on_terminal", [True, False])
@pytest.mark.parametrize("when", ["first", "later"])
async def test_an_error_of_the_console_is_logged_once(
    error, on_terminal, when, world: World, clock, caplog, harmless
):
    """The saga runs as if nothing had happened, and neither it nor the next one asks again."""
    terminal = Terminal()
    console = console_of(terminal, clock)
    if not on_terminal:
        console = Console(file=terminal, force_terminal=False)
    middleware = [show_progress(console)]
    if when == "first":
        terminal.instead = error

    async def break_it():
        terminal.instead = error

    parts = [world.step("a"), Step(break_it), world.step("b"), world.step("c", before=Boom())]
    with pytest.raises(Boom) as caught:
        await Saga(parts, middleware=middleware).run()
    written = len(terminal.written)
    terminal.instead = None
    outcome = await Saga([Step(nothing)], middleware=middleware).run()

    assert [] == world.done
    assert SagaState.COMPLETED is outcome.state
    assert written == len(terminal.written)
    [record] = caplog.records
    assert "the saga is not affected" in record.getMessage()
    assert isinstance(record.exc_info[1], ValueError | BrokenPipeError)
    assert caught.value is not record.exc_info[1]
    assert [] == painters()


async def test_an_order_to_quit_that_meets_a_line_goes_on(paper, monkeypatch):
    """A SystemExit that is not rich's own, as of a signal handler, is passed on as anywhere."""
    printed = []

    def leave(console, *args, **kwargs):
        printed.append(args)
        if len(printed) == 2:
            raise SystemExit(3)

    monkeypatch.setattr(Console, "print", leave)
    with pytest.raises(SystemExit) as caught:
        await Saga([Step(nothing, nothing)], name="trip", middleware=paper.middleware).run()

    assert 3 == caught.value.code
    assert len(printed) > 2


async def test_where_no_thread_can_be_started_nothing_is_shown(terminal, console, monkeypatch, caplog):
    """That is logged once, too."""

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    middleware = [show_progress(console)]
    for _ in range(2):
        await Saga([Step(nothing)], middleware=middleware).run()
    monkeypatch.undo()

    assert [""] == terminal.lines
    assert ["can't start new thread"] == [str(record.exc_info[1]) for record in caplog.records]


async def test_an_exception_that_cannot_be_shown_has_its_name(terminal, console):
    """A `__repr__` that raises is no reason to show nothing."""

    class Shy(Exception):
        def __repr__(self):
            raise ValueError

    async def fail():
        raise Shy

    with pytest.raises(Shy):
        await Saga(
            [Step(fail, not_applied=Shy)], name="trip", middleware=[show_progress(console)]
        ).run()

    assert "  ✗ fail  failed      0.00 s  Shy" == terminal.lines[-1]


def test_without_rich_it_says_what_to_install(monkeypatch):
    """The message of the ImportError names the extra."""
    monkeypatch.delitem(sys.modules, "pysagas.observe._display")
    monkeypatch.setitem(sys.modules, "rich.cells", None)
    with pytest.raises(ImportError, match=r'pip install "pysagas\[progress\]"'):
        show_progress()


def test_a_long_time_is_shown_as_a_clock_does():
    """Below a minute with hundredths, then in minutes, then in hours."""
    assert ["0.00 s", "59.99 s", "1:00", "59:59", "1:00:00", "25:01:01"] == [
        _display._time(seconds) for seconds in (0, 59.99, 60, 3599.9, 3600, 90061)
    ]
