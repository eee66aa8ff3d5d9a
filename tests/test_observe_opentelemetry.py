"""Effects as spans, nested as they ran, and as metrics: by the SDK's exporters into memory."""

from __future__ import annotations

import sys
import threading
import types

import pytest
from anyio import Event
from helpers import GROUPED, SEQUENCES, Boom, Crash, World, checked_world, every_way, interrupted
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import StatusCode

from pysagas import (
    CompensationFailed,
    Parallel,
    Saga,
    SagaScope,
    SagaState,
    Step,
    current_effect,
    open_saga,
    saga,
)
from pysagas.durable import SQLiteJournal
from pysagas.observe.opentelemetry import trace_effects

pytestmark = pytest.mark.anyio


class Counting(IdGenerator):
    """Numbers as ids: spans are in the order in which they began, however fast that was."""

    def __init__(self):
        self._last = 0
        self._lock = threading.Lock()

    def generate_span_id(self):
        with self._lock:
            self._last += 1
            return self._last

    generate_trace_id = generate_span_id


class Telemetry:
    """The SDK, into memory, and the middleware that tells it."""

    def __init__(self):
        self.provider = TracerProvider(id_generator=Counting(), shutdown_on_exit=False)
        self._exporter = InMemorySpanExporter()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._reader = InMemoryMetricReader()
        self._meters = MeterProvider([self._reader], shutdown_on_exit=False)
        # A user's own.
        self.tracer = self.provider.get_tracer("user")
        self.middleware = [trace_effects(tracer_provider=self.provider, meter_provider=self._meters)]

    @property
    def spans(self):
        """Those that have ended, in the order in which they began."""
        return sorted(self._exporter.get_finished_spans(), key=lambda span: span.context.span_id)

    def span(self, name):
        [span] = [span for span in self.spans if span.name == name]
        return span

    @property
    def tree(self):
        """The names of the spans, each with those inside it."""
        nodes = {span.context.span_id: (span.name, []) for span in self.spans}
        roots = []
        for span in self.spans:
            # A span whose parent has not ended is an error here.
            inside = nodes[span.parent.span_id][1] if span.parent else roots
            inside.append(nodes[span.context.span_id])
        return [tidy(node) for node in roots]

    def ended(self, name):
        """How a span ended: in which state, and whether that is an error."""
        span = self.span(name)
        assert (span.status.status_code is StatusCode.ERROR) == bool(span.events)
        return (
            span.attributes["pysagas.ended"],
            span.attributes.get("pysagas.state"),
            span.attributes.get("error.type"),
            span.status.status_code.name,
        )

    def points(self, name):
        data = self._reader.get_metrics_data()
        return [
            point
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]

    def close(self):
        self.provider.shutdown()
        self._meters.shutdown()


def tidy(node):
    name, inside = node
    return {name: [tidy(one) for one in inside]} if inside else name


@pytest.fixture
def telemetry():
    telemetry = Telemetry()
    yield telemetry
    telemetry.close()


@pytest.fixture
def world():
    yield from checked_world()


async def nothing():
    pass


def no_span():
    return trace.get_current_span() is trace.INVALID_SPAN


# --- spans --------------------------------------------------------------------------------------


async def test_spans_are_nested_as_effects_ran(world: World, telemetry):
    """Each effect is a span in that of the effect around it; members of a group are siblings."""
    trip = Saga(
        [
            world.step("flight"),
            Parallel(world.member("hotel"), world.member("car"), name="stay"),
            world.step("moon", before=Boom()),
        ],
        name="trip",
        middleware=telemetry.middleware,
    )

    with pytest.raises(Boom):
        await trip.run()

    assert [
        {
            "saga trip": [
                "action flight",
                {"group stay": ["action hotel", "action car"]},
                "action moon",
                {
                    "rollback trip": [
                        "compensation moon",
                        "compensation hotel",
                        "compensation car",
                        "compensation flight",
                    ]
                },
            ]
        }
    ] == telemetry.tree
    assert no_span()


async def test_a_function_and_the_sagas_in_it(world: World, telemetry):
    """A failed call has its rollback where it ran; nested sagas, commits and own spans are inside."""
    inner = Saga([world.step("b")], name="inner")

    @saga(name="outer", middleware=telemetry.middleware)
    async def outer(scope: SagaScope):
        with telemetry.tracer.start_as_current_span("mine"):
            await scope.step(inner)
        try:
            await scope.step(world.step("c", before=Boom()))
        except Boom:
            await scope.step(world.step("d"))
        await scope.commit()

    with telemetry.tracer.start_as_current_span("request"):
        await outer()

    assert [
        {
            "request": [
                {
                    "saga outer": [
                        {"mine": [{"saga inner": ["action b"]}]},
                        "action c",
                        {"rollback c": ["compensation c"]},
                        "action d",
                        "commit",
                    ]
                }
            ]
        }
    ] == telemetry.tree


@pytest.mark.parametrize("shape", [one for one in SEQUENCES if one.__name__ != "with_middleware"])
async def test_every_shape_of_saga_is_traced(shape, world: World, telemetry):
    """Sagas as data, as functions, as blocks and in sagas are traced alike, step by step."""
    with telemetry.tracer.start_as_current_span("around"), pytest.raises(Boom):
        await shape(world.step("a"), world.step("b", before=Boom()), middleware=telemetry.middleware)

    assert ("completed", "completed", None, "UNSET") == telemetry.ended("action a")
    assert ("failed", "unknown", "Boom", "ERROR") == telemetry.ended("action b")
    assert ("completed", "compensated", None, "UNSET") == telemetry.ended("compensation a")
    assert 1 == len(telemetry.tree)


@pytest.mark.parametrize("shape", GROUPED)
async def test_what_a_group_holds_is_traced(shape, world: World, telemetry):
    """A saga in a member of a group has its span in that of the group, limited or not."""
    with pytest.raises(ExceptionGroup):
        await shape(world.step("a"), world.step("b", before=Boom()), middleware=telemetry.middleware)

    [whole] = telemetry.tree
    [group] = [one for one in whole["saga saga"] if "group parallel" in one]
    assert {"saga saga": ["action a", "action b"]} in group["group parallel"]
    assert ("failed", None, "ExceptionGroup", "ERROR") == telemetry.ended("group parallel")


async def test_attributes_say_what_and_where(telemetry):
    """A span has the run, the path, and the keys that services were given."""
    keys = {}

    async def act():
        keys["act"] = current_effect().key

    async def back():
        keys["back"] = current_effect().key

    async def fail():
        raise Boom

    parts = [Step(act, back, name="a"), Step(fail, name="b", not_applied=Boom)]
    with pytest.raises(Boom):
        await Saga([Saga(parts, name="in")], name="out", middleware=telemetry.middleware).run_with(
            run_id="r"
        )

    assert {
        "pysagas.kind": "compensation",
        "pysagas.saga": "in",
        "pysagas.name": "a",
        "pysagas.run_id": "r",
        "pysagas.path": "0.0",
        "pysagas.carried_on": 0,
        "pysagas.key": keys["back"],
        "pysagas.action_key": keys["act"],
        "pysagas.ended": "completed",
        "pysagas.state": "compensated",
    } == telemetry.span("compensation a").attributes
    assert {
        "pysagas.kind": "saga",
        "pysagas.saga": "out",
        "pysagas.name": "out",
        "pysagas.run_id": "r",
        "pysagas.path": "",
        "pysagas.carried_on": 0,
        "pysagas.ended": "failed",
        "pysagas.state": "compensated",
        "error.type": "Boom",
    } == telemetry.span("saga out").attributes
    assert keys["act"] == telemetry.span("action a").attributes["pysagas.key"]
    assert ("failed", "not applied", "Boom", "ERROR") == telemetry.ended("action b")


async def test_errors_are_recorded(world: World, telemetry):
    """What an action, or a compensation, raised stands in its span."""
    parts = [world.step("a", back=Crash("stuck")), world.step("b", before=Boom("full"))]

    with pytest.raises(CompensationFailed):
        await Saga(parts, name="s", middleware=telemetry.middleware).run()

    [event] = telemetry.span("action b").events
    assert ("exception", "full") == (event.name, event.attributes["exception.message"])
    assert "Boom: full" == telemetry.span("action b").status.description
    [event] = telemetry.span("compensation a").events
    assert "stuck" == event.attributes["exception.message"]
    assert ("failed", "compensation failed", "Crash", "ERROR") == telemetry.ended("compensation a")
    assert ("failed", "failed", "CompensationFailed", "ERROR") == telemetry.ended("saga s")


async def test_the_state_is_that_of_the_run(telemetry):
    """What an inner saga ends with has no state yet, even if it is the failure of another run."""

    async def fail():
        raise Boom

    async def call():
        await Saga([Step(fail, nothing)], name="other").run()

    inner = Saga([Step(nothing, nothing), Step(call, not_applied=Boom)], name="inner")
    with pytest.raises(Boom):
        await Saga([inner], name="outer", middleware=telemetry.middleware).run()

    assert ("failed", None, "Boom", "ERROR") == telemetry.ended("saga inner")
    assert ("failed", "compensated", "Boom", "ERROR") == telemetry.ended("saga outer")


async def test_a_retried_step_is_one_span(telemetry):
    """Attempts have no spans of their own: what they do is in the span of their step."""
    attempts = []

    async def act():
        attempts.append("tried")
        with telemetry.tracer.start_as_current_span(f"attempt {len(attempts)}"):
            if len(attempts) < 2:
                raise Boom

    async def retry(attempt):
        while True:
            try:
                return await attempt()
            except Boom:
                pass

    await Saga([Step(act, retry=retry, name="a")], name="s", middleware=telemetry.middleware).run()

    assert [{"saga s": [{"action a": ["attempt 1", "attempt 2"]}]}] == telemetry.tree
    assert ("completed", "completed", None, "UNSET") == telemetry.ended("action a")


async def test_a_completed_run_that_is_taken_back_later(world: World, telemetry):
    """A rollback on request has its span where it was asked for."""
    outcome = await Saga([world.step("a")], name="s", middleware=telemetry.middleware).run()

    with telemetry.tracer.start_as_current_span("refund"):
        await outcome.rollback()

    assert [
        {"saga s": ["action a"]},
        {"refund": [{"rollback s": ["compensation a"]}]},
    ] == telemetry.tree


# --- the current span ---------------------------------------------------------------------------


def own_spans(telemetry, name, **how):
    """A step whose action and compensation have spans of their own."""

    async def act():
        with telemetry.tracer.start_as_current_span(f"in {name}"):
            pass

    async def back():
        with telemetry.tracer.start_as_current_span(f"back in {name}"):
            pass

    return Step(act, back, name=name, **how)


def own_spans_in_threads(telemetry, name, **how):
    """The same, in worker threads."""
    here = threading.get_ident()

    def act():
        assert threading.get_ident() != here
        with telemetry.tracer.start_as_current_span(f"in {name}"):
            pass

    def back():
        assert threading.get_ident() != here
        with telemetry.tracer.start_as_current_span(f"back in {name}"):
            pass

    return Step(act, back, name=name, blocking=True, **how)


@pytest.mark.parametrize("limit", [None, 2])
async def test_spans_of_actions_and_compensations_are_inside_theirs(limit, telemetry):
    """Inside an action the span is the current one: inline, shielded, in threads and in groups."""
    parts = [
        own_spans(telemetry, "a"),
        own_spans(telemetry, "b", shield=True),
        own_spans_in_threads(telemetry, "c"),
        Parallel(
            own_spans(telemetry, "d"),
            own_spans_in_threads(telemetry, "e"),
            Saga([own_spans_in_threads(telemetry, "f")]),
            limit=limit,
        ),
    ]
    outcome = await Saga(parts, name="s", middleware=telemetry.middleware).run()
    assert no_span()
    await outcome.rollback()
    assert no_span()

    parents = {span.context.span_id: span.name for span in telemetry.spans}
    inside = {span.name: parents[span.parent.span_id] for span in telemetry.spans if "in " in span.name}
    expected = {f"in {name}": f"action {name}" for name in "abcdef"}
    expected |= {f"back in {name}": f"compensation {name}" for name in "abcdef"}
    assert expected == inside


async def test_members_that_take_turns_keep_to_their_own_spans(telemetry):
    """Members that run at the same time do not see each other's spans."""
    first, second = Event(), Event()

    async def one():
        with telemetry.tracer.start_as_current_span("in one"):
            first.set()
            await second.wait()
        with telemetry.tracer.start_as_current_span("again in one"):
            pass

    async def other():
        await first.wait()
        with telemetry.tracer.start_as_current_span("in other"):
            second.set()

    group = Parallel(Step(one), Step(other), name="g")
    await Saga([group], name="s", middleware=telemetry.middleware).run()

    assert [
        {
            "saga s": [
                {
                    "group g": [
                        {"action one": ["in one", "again in one"]},
                        {"action other": ["in other"]},
                    ]
                }
            ]
        }
    ] == telemetry.tree


# --- however it ends ----------------------------------------------------------------------------


@every_way
async def test_what_is_cancelled_ends_its_span(way, world: World, telemetry):
    """A cancellation, of whatever kind, ends all spans that it cuts off; of itself it is no error."""
    trip = Saga(
        [world.step("a"), Parallel(world.member("b"), world.member("c"), name="g")],
        name="trip",
        middleware=telemetry.middleware,
    )

    async def run():
        try:
            await trip.run()
        finally:
            assert no_span()

    await interrupted(way, world, "c", run)

    assert [] == world.done
    cancelled = telemetry.span("action c").attributes["error.type"]
    assert cancelled in ("Cancelled", "CancelledError")
    assert ("interrupted", "unknown", cancelled, "UNSET") == telemetry.ended("action c")
    assert ("interrupted", None, cancelled, "UNSET") == telemetry.ended("group g")
    assert ("interrupted", "compensated", cancelled, "UNSET") == telemetry.ended("saga trip")
    assert ("completed", "compensated", None, "UNSET") == telemetry.ended("compensation c")
    assert 1 == len(telemetry.tree)


@pytest.mark.parametrize("order", [KeyboardInterrupt, SystemExit])
async def test_an_order_to_quit_ends_its_span(order, world: World, telemetry):
    """KeyboardInterrupt and SystemExit end the spans, too, and what is taken back has its own."""
    parts = [world.step("a"), world.step("b", before=order())]

    with pytest.raises(order):
        await Saga(parts, name="s", middleware=telemetry.middleware).run()

    assert ("interrupted", "unknown", order.__name__, "UNSET") == telemetry.ended("action b")
    assert ("interrupted", "compensated", order.__name__, "UNSET") == telemetry.ended("saga s")
    assert ("completed", None, None, "UNSET") == telemetry.ended("rollback s")
    assert no_span()


async def test_a_compensation_that_is_cut_off_is_an_error(world: World, telemetry):
    """A compensation that did not end is an error, whatever ended it."""
    parts = [world.step("a", back=KeyboardInterrupt()), world.step("b", before=Boom())]

    with pytest.raises(KeyboardInterrupt):
        await Saga(parts, name="s", middleware=telemetry.middleware).run()

    failed = ("interrupted", "compensation failed", "KeyboardInterrupt", "ERROR")
    assert failed == telemetry.ended("compensation a")
    assert ("interrupted", "failed", "KeyboardInterrupt", "ERROR") == telemetry.ended("saga s")


def test_a_run_that_is_closed_ends_its_spans(telemetry):
    """A run whose coroutine is closed in the middle leaves no span open."""

    @types.coroutine
    def pause():
        yield

    async def act():
        await pause()

    run = Saga([Step(act, name="a")], name="s", middleware=telemetry.middleware).run()
    run.send(None)
    run.close()

    assert [{"saga s": ["action a"]}] == telemetry.tree
    assert ("interrupted", "unknown", "GeneratorExit", "UNSET") == telemetry.ended("action a")
    assert no_span()


class Broken(SpanProcessor):
    """A processor that raises where a span begins, or where it ends."""

    def __init__(self, where):
        self._where = where
        self.calls = 0

    def on_start(self, span, parent_context=None):
        self._raise("start")

    def on_end(self, span):
        self._raise("end")

    def _raise(self, where):
        if where == self._where:
            self.calls += 1
            raise Crash(where)


@pytest.mark.parametrize("where", ["start", "end"])
async def test_a_tracer_that_fails_harms_nobody(where, world: World, telemetry, caplog):
    """What the tracer raises is reported by the observer; result and exception are the true ones."""
    broken = Broken(where)
    telemetry.provider.add_span_processor(broken)
    boom = Boom()
    outcome = await Saga([world.step("a")], middleware=telemetry.middleware).run()
    with pytest.raises(Boom) as caught:
        await Saga([world.step("b", before=boom)], middleware=telemetry.middleware).run()

    assert SagaState.COMPLETED is outcome.state
    assert boom is caught.value
    assert ["a"] == world.done
    # Two of the first run, four of the second.
    assert 6 == broken.calls == len(caplog.records)
    assert all("the saga is not affected" in record.getMessage() for record in caplog.records)
    assert no_span()


# --- metrics ------------------------------------------------------------------------------------


async def test_durations_are_measured(world: World, telemetry):
    """Each effect adds to a histogram, in seconds, told apart by what it was and how it ended."""
    for name in "ab":
        parts = [Step(nothing, nothing), world.step(name, before=Boom())]
        with pytest.raises(Boom):
            await Saga(parts, name="s", middleware=telemetry.middleware).run()

    points = telemetry.points("pysagas.effect.duration")
    series = {
        tuple(
            point.attributes.get(name)
            for name in ("pysagas.kind", "pysagas.name", "pysagas.ended", "error.type")
        ): point.count
        for point in points
    }
    assert {
        ("saga", "s", "failed", "Boom"): 2,
        ("action", "nothing", "completed", None): 2,
        ("action", "a", "failed", "Boom"): 1,
        ("action", "b", "failed", "Boom"): 1,
        ("rollback", "s", "completed", None): 2,
        ("compensation", "a", "completed", None): 1,
        ("compensation", "b", "completed", None): 1,
        ("compensation", "nothing", "completed", None): 2,
    } == series
    assert {"s"} == {point.attributes["pysagas.saga"] for point in points}
    # Nothing that would make a series of its own for each run.
    assert not any("pysagas.run_id" in point.attributes for point in points)
    assert all(0 < point.sum < 60 for point in points)
    # The SDK's own, meant for milliseconds, begin with 0.
    assert all(0 < point.explicit_bounds[0] < 0.01 for point in points)


async def test_rollbacks_are_counted(world: World, telemetry):
    """Each rollback counts, of a whole saga or of a call in it."""

    @saga(name="s", middleware=telemetry.middleware)
    async def function(scope: SagaScope):
        try:
            await scope.step(world.step("a", before=Boom()))
        except Boom:
            await scope.step(world.step("b", before=Boom()))

    with pytest.raises(Boom):
        await function()
    await Saga([Step(nothing)], name="t", middleware=telemetry.middleware).run()

    [point] = telemetry.points("pysagas.rollbacks")
    rollbacks = [span for span in telemetry.spans if span.name.startswith("rollback")]
    assert {"pysagas.saga": "s"} == point.attributes
    assert len(rollbacks) == point.value > 1


# --- with and without ---------------------------------------------------------------------------


async def test_without_an_sdk_nothing_is_recorded_and_nothing_lost(world: World):
    """Where the program has set up no SDK, the saga runs as it would without."""
    async with open_saga(middleware=[trace_effects()]) as scope:
        await scope.step(world.step("a"))

    assert ["a"] == world.done


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    """Without opentelemetry-api the module is imported, and its function says what it needs."""
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ImportError) as caught:
        trace_effects()

    assert (
        "trace_effects needs opentelemetry-api, which is not installed: "
        'pip install "pysagas[opentelemetry]"'
    ) == str(caught.value)


async def test_under_a_journal_what_is_replayed_has_no_span(tmp_path, telemetry):
    """A run that is tried again has spans of what runs in this process, under the id that it had."""
    broken = [Crash()]

    async def act():
        pass

    async def back():
        for error in broken:
            raise error

    async def fail():
        raise Boom

    trip = Saga(
        [Step(act, back, name="a"), Step(act, name="b"), Step(fail, name="c", not_applied=Boom)],
        name="trip",
        middleware=telemetry.middleware,
    )
    async with SQLiteJournal(tmp_path / "sagas.db") as journal:
        with pytest.raises(CompensationFailed):
            await journal.run(trip, run_id="trip-42")
        broken.clear()
        with pytest.raises(Boom):
            await journal.retry(trip, "trip-42")

    assert [
        {
            "saga trip": [
                "action a",
                "action b",
                "action c",
                {"rollback trip": ["compensation a"]},
            ]
        },
        {"saga trip": [{"rollback trip": ["compensation a"]}]},
    ] == telemetry.tree
    assert {"trip-42"} == {span.attributes["pysagas.run_id"] for span in telemetry.spans}
