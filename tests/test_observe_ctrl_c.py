"""Observers of a program that gets a real Ctrl-C: whatever they have begun ends, and is true."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pyte
import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")

WIDTH, HEIGHT = 160, 50

# Three steps, of which the third waits to be interrupted; what takes them back says so to a file.
PROGRAM = """
import logging, sys
import anyio
from pysagas import Parallel, Saga, Step

which, backend, pace = sys.argv[1], sys.argv[2], float(sys.argv[3])
done = []
# It reports what the run raised after a second Ctrl-C, at length.
logging.getLogger("asyncio").disabled = True

async def book(what):
    done.append(what)
    if what == "car":
        if which == "trace":  # whoever is interrupted before it is in its span has none
            print("car waits", flush=True)
        await anyio.sleep_forever()

async def cancel(what):
    await anyio.sleep(pace)
    done.remove(what)

def at_end(): pass

if which == "progress":
    from pysagas.observe.progress import show_progress
    middleware = show_progress()
elif which == "log":
    from pysagas.observe.logging import log_effects
    logging.basicConfig(level=logging.DEBUG, format="%(message)s", stream=sys.stdout)
    middleware = log_effects()
else:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from pysagas.observe.opentelemetry import trace_effects
    exporter, provider, begun = InMemorySpanExporter(), TracerProvider(), []
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace = trace_effects(tracer_provider=provider)

    async def middleware(effect, call_next):
        print("begun", effect.kind, effect.name, flush=True)
        begun.append(effect.kind + " " + effect.name)
        return await trace(effect, call_next)

    def at_end():
        spans = exporter.get_finished_spans()
        assert sorted(begun) == sorted(span.name for span in spans), spans
        for span in spans:
            about = span.attributes
            how = about["pysagas.ended"], about.get("pysagas.state", "-"), span.status.status_code.name
            print(span.name, *how)

steps = {what: Step(book, cancel, name=what).bind(what) for what in ("flight", "hotel", "car")}
parts = [steps["flight"], Parallel(steps["hotel"], steps["car"], name="stay")]
try:
    anyio.run(Saga(parts, name="trip", middleware=[middleware]).run, backend=backend)
except KeyboardInterrupt:
    at_end()
    print("left:", *done)
    sys.exit(130)
"""


class Run:
    """A program on a pseudo-terminal, and what it has written there."""

    def __init__(self, *arguments):
        here, its = os.openpty()
        self._file = os.fdopen(here, "rb", buffering=0)
        self.written = b""
        self._process = subprocess.Popen(
            [sys.executable, "-X", "dev", "-W", "error", "-c", PROGRAM, *arguments],
            stdin=its,
            stdout=its,
            stderr=its,
            start_new_session=True,
            env=os.environ
            | {"TERM": "xterm", "COLUMNS": str(WIDTH), "LINES": str(HEIGHT), "PYTHONUTF8": "1"},
        )
        os.close(its)

    def close(self):
        self._process.kill()
        self._process.wait()
        self._file.close()

    def interrupt(self):
        self._process.send_signal(signal.SIGINT)

    def terminate(self):
        self._process.terminate()

    def read_until(self, pattern):
        """Reads until the screen shows this."""
        while not re.search(pattern, self.text):
            assert self._read(), self.text

    def end(self):
        """Reads what is left, and gives the exit status."""
        while self._read():
            pass
        return self._process.wait(10)

    def _read(self):
        try:
            data = self._file.read(65536)
        except OSError:  # as Linux says that nobody has it open any more
            return False
        self.written += data
        return bool(data)

    @property
    def screen(self):
        screen = pyte.Screen(WIDTH, HEIGHT)
        pyte.ByteStream(screen).feed(self.written)
        return screen

    @property
    def text(self):
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()


@pytest.fixture
def start():
    running = []

    def start(*arguments):
        running.append(Run(*arguments))
        return running[-1]

    yield start
    for one in running:
        one.close()


on_both = pytest.mark.parametrize("backend", ["asyncio", "trio"])


@on_both
def test_a_tree_ends_with_what_was_taken_back(backend, start):
    """After a Ctrl-C the tree shows the rollback, the cursor is there, and the status is right."""
    run = start("progress", backend, "0.3")
    run.read_until("car +running")
    run.interrupt()
    run.read_until("hotel +being taken back")
    assert 130 == run.end(), run.text

    assert [
        "↺ trip       taken back",
        "  ↺ flight   taken back",
        "  ↺ stay     taken back",
        "    ↺ hotel  taken back",
        "    ↺ car    taken back",
        "left:",
    ] == re.sub(r" +\d+\.\d\d s", "", run.text).splitlines()
    assert not run.screen.cursor.hidden


@on_both
def test_a_second_ctrl_c_leaves_the_terminal_as_it_was(backend, start):
    """Whatever a second Ctrl-C costs, the cursor is there, and the tree says what was not taken back."""
    run = start("progress", backend, "0.5")
    run.read_until("car +running")
    run.interrupt()
    run.read_until("hotel +being taken back")
    run.interrupt()
    assert 130 == run.end(), run.text

    lost = re.findall(r"^ +✗ (\w+) +could not be taken back", run.text, re.MULTILINE)
    assert not run.screen.cursor.hidden
    # asyncio gives it to what runs; Trio to the main task, which only waits.
    steps = ["hotel", "car"] if backend == "asyncio" else []
    assert steps == [name for name in lost if name != "stay"], run.text
    assert ["left:", *steps] == run.text.splitlines()[-1].split()


@on_both
def test_a_program_that_is_killed_leaves_a_cursor(backend, start):
    """What SIGTERM ends in the middle of a drawing has hidden nothing."""
    run = start("progress", backend, "0")
    run.read_until("car +running")
    run.terminate()
    assert -signal.SIGTERM == run.end()
    assert not run.screen.cursor.hidden


@on_both
def test_lines_of_a_log_end(backend, start):
    """After a Ctrl-C each line that says that an effect has begun has one that says how it ended."""
    run = start("log", backend, "0")
    run.read_until("action car begun")
    run.interrupt()
    assert 130 == run.end(), run.text

    lines = [line.partition(": ")[2] for line in run.text.splitlines()]
    ended = [re.sub(r" (completed|failed|interrupted)\b.*", "", line) for line in lines]
    begun = [line.removesuffix(" begun") for line in lines if line.endswith(" begun")]
    assert 9 == len(begun)
    for effect in begun:
        assert 2 == sum(one in (effect, f"{effect} begun") for one in ended), run.text
    assert any(re.match(r"action car interrupted in .* \(unknown\): ", line) for line in lines)
    assert any(re.match(r"saga trip interrupted in .* \(compensated\): ", line) for line in lines)
    assert "left:" == run.text.splitlines()[-1]


@on_both
def test_spans_of_a_trace_end(backend, start):
    """After a Ctrl-C each span that has begun has ended, as interrupted where it was."""
    run = start("trace", backend, "0")
    run.read_until("car waits")
    run.interrupt()
    assert 130 == run.end(), run.text

    assert {
        "action flight completed completed UNSET",
        "action hotel completed completed UNSET",
        "action car interrupted unknown UNSET",
        "group stay interrupted - UNSET",
        "compensation car completed compensated UNSET",
        "compensation hotel completed compensated UNSET",
        "compensation flight completed compensated UNSET",
        "rollback trip completed - UNSET",
        "saga trip interrupted compensated UNSET",
        "left:",
    } <= set(run.text.splitlines())
