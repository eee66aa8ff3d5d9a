"""What sagas do, as OpenTelemetry spans and metrics. Needs the extra ``opentelemetry``."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

from pysagas import CallNext, Effect, Middleware, SagaState, StepState, observer

from ._state import state_of

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import Span, TracerProvider

__all__ = ["trace_effects"]

# In seconds. The SDK's own boundaries are meant for milliseconds.
_BOUNDARIES = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 300.0)

_NOT_TAKEN_BACK = (SagaState.FAILED, StepState.COMPENSATION_FAILED)


def trace_effects(
    *,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
) -> Middleware:
    """Makes a middleware that has a span for each effect, and measures how long it takes.

    The span is the current one while the effect runs, in worker threads too: spans that an action
    makes are its children. It has the run's id, the path, the idempotency key and the state as
    attributes, and the exception where the effect failed. What is interrupted, by a cancellation or
    a Ctrl-C, is no error, unless something could not be taken back. What an action gets and returns
    is not recorded. As an `observer` it cannot harm the saga.

    The metrics: ``pysagas.effect.duration``, a histogram in seconds, and ``pysagas.rollbacks``.

    Args:
        tracer_provider: Who makes the spans; None: the global one.
        meter_provider: Who makes the metrics; None: the global one.

    Raises:
        ImportError: opentelemetry-api is not installed.

    Example:
        ::

            book_trip = Saga([...], name="trip", middleware=[trace_effects()])
    """
    try:
        from opentelemetry import metrics, trace  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ImportError(
            "trace_effects needs opentelemetry-api, which is not installed: "
            'pip install "pysagas[opentelemetry]"'
        ) from error
    tracer = trace.get_tracer("pysagas", tracer_provider=tracer_provider)
    meter = metrics.get_meter("pysagas", meter_provider=meter_provider)
    durations = meter.create_histogram(
        "pysagas.effect.duration",
        unit="s",
        description="How long sagas, their steps and what takes them back took.",
        explicit_bucket_boundaries_advisory=_BOUNDARIES,
    )
    rollbacks = meter.create_counter(
        "pysagas.rollbacks",
        unit="{rollback}",
        description="How often a saga, or a call in one, was taken back.",
    )

    def end(
        span: Span,
        effect: Effect,
        call_next: CallNext,
        duration: float,
        error: BaseException | None = None,
    ) -> None:
        state = state_of(effect, call_next, error)
        how: dict[str, str] = {"pysagas.ended": "completed"}
        if error is not None:
            failed = isinstance(error, Exception)
            how = {
                "pysagas.ended": "failed" if failed else "interrupted",
                "error.type": type(error).__qualname__,
            }
            if failed or state in _NOT_TAKEN_BACK:
                span.record_exception(error)
                span.set_status(trace.StatusCode.ERROR, f"{type(error).__name__}: {error}")
        span.set_attributes(how)
        if state is not None:
            span.set_attribute("pysagas.state", state.value)
        durations.record(duration, {**_what(effect), **how})

    async def trace_effect(effect: Effect, call_next: CallNext) -> object:
        if effect.kind == "rollback":
            rollbacks.add(1, {"pysagas.saga": effect.saga})
        with tracer.start_as_current_span(
            "commit" if effect.kind == "commit" else f"{effect.kind} {effect.name}",
            attributes={**_what(effect), **_which(effect)},
            # Not left to it: whether it takes a cancellation for an error depends on its version.
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            begun = perf_counter()
            try:
                result = await call_next()
            except BaseException as error:
                end(span, effect, call_next, perf_counter() - begun, error)
                raise
            end(span, effect, call_next, perf_counter() - begun)
            return result

    return observer(trace_effect)


def _what(effect: Effect) -> dict[str, str]:
    """Gives what is the same in every run, so that it can tell the series of a metric apart."""
    return {"pysagas.kind": effect.kind, "pysagas.saga": effect.saga, "pysagas.name": effect.name}


def _which(effect: Effect) -> dict[str, str | int]:
    """Gives what this effect, of this run, has for itself."""
    which: dict[str, str | int] = {
        "pysagas.run_id": effect.run_id,
        "pysagas.path": ".".join(map(str, effect.path)),
        "pysagas.carried_on": effect.carried_on,
    }
    if effect.kind in ("action", "compensation"):
        which["pysagas.key"] = effect.key
    if effect.action_key is not None:
        which["pysagas.action_key"] = effect.action_key
    return which
