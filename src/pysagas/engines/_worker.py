"""The worker's side of Restate: the handlers of the workflow that an engine is.

Restate's library evaluates the annotations of handlers, so its names are imported here.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import timedelta
from typing import Any, cast

import anyio
import restate
from restate.serde import BytesSerde

from pysagas import Saga
from pysagas.durable import Codec, RunState
from pysagas.durable._codec import as_text

from ._attempt import Attempt, Retries
from ._errors import EngineError
from ._limits import LARGEST, as_utf8
from ._requests import without_results

__all__ = ["ASGIApp", "make_app"]

ASGIApp = Callable[
    [
        MutableMapping[str, Any],
        Callable[[], Awaitable[MutableMapping[str, Any]]],
        Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ],
    Awaitable[None],
]
ReadCall = Callable[[bytes], tuple[Saga[..., Any], tuple[Any, ...], dict[str, Any]]]

RAW = BytesSerde()

# For ever: with what the server does by itself a run stops for good after 70 attempts, and attempts are
# used up while no worker is there.
POLICY = restate.InvocationRetryPolicy(
    initial_interval=timedelta(milliseconds=200),
    exponentiation_factor=2.0,
    max_interval=timedelta(seconds=10),
    max_attempts=2_000_000_000,
)


def make_app(
    name: str,
    read_call: ReadCall,
    codec: Codec,
    retries: Retries,
    policy: restate.InvocationRetryPolicy | None,
    longest_step: timedelta,
    retention: timedelta,
) -> ASGIApp:
    """Makes the ASGI application; the arguments are those of the engine.

    Args:
        name: Of the workflow.
        read_call: Gives the saga of a call, and its arguments; raises where there is none such.
        codec: For results.
        retries: How often steps are tried.
        policy: For attempts; None: for ever.
        longest_step: The server takes a step that is longer for one that hangs.
        retention: How long the server remembers outcomes.
    """
    workflow = restate.Workflow(
        name,
        inactivity_timeout=longest_step,
        abort_timeout=longest_step,
        invocation_retry_policy=POLICY if policy is None else policy,
    )
    # The runs that have an attempt in this process.
    under_way: dict[str, anyio.Event] = {}

    @workflow.main(name="run", input_serde=RAW, output_serde=RAW, workflow_retention=retention)
    async def run(context: restate.WorkflowContext, call: bytes) -> bytes:
        run_id = context.key()
        # The server may have given an attempt up, and begun this one, while an action of that one still
        # runs here.
        while run_id in under_way:
            await under_way[run_id].wait()
        ended = under_way[run_id] = anyio.Event()
        try:
            return await _attempt(context, call, read_call, codec, retries)
        finally:
            del under_way[run_id]
            ended.set()

    @workflow.handler(name="call", input_serde=RAW, output_serde=RAW)
    async def call_of_run(context: restate.WorkflowSharedContext, nothing: bytes) -> bytes:
        del nothing
        given = await context.get("call", RAW)
        return b"" if given is None else given

    @workflow.handler(name="check", input_serde=RAW, output_serde=RAW)
    async def check(context: restate.WorkflowSharedContext, call: bytes) -> bytes:
        del context
        try:
            read_call(call)
        except Exception as error:
            raise restate.TerminalError(str(error)) from error
        return b""

    @workflow.handler(name="cancel", input_serde=RAW, output_serde=RAW)
    async def cancel(context: restate.WorkflowSharedContext, nothing: bytes) -> bytes:
        del nothing
        invocation = await context.get("id", RAW)
        if invocation is None:
            return b""
        context.cancel_invocation(invocation.decode())
        return invocation

    del run, call_of_run, check, cancel  # the workflow has them
    return _on_asyncio(cast("ASGIApp", restate.app([workflow])))


async def _attempt(
    context: restate.WorkflowContext, call: bytes, read_call: ReadCall, codec: Codec, retries: Retries
) -> bytes:
    """Makes an attempt at a run; gives its outcome, or raises it where it failed."""
    context.set("call", call, RAW)
    context.set("id", context.request().id.encode(), RAW)
    # What this worker cannot read, another one may: this attempt ends, and the next one may be there.
    saga, args, kwargs = read_call(call)
    attempt = Attempt(context, saga, context.key(), codec, retries)
    ending = await attempt.carry_out(args, kwargs)
    told: dict[str, Any] = {
        "call": as_text(call),
        "state": ending.state.value,
        "value": as_text(ending.value),
        "error": ending.error,
        "records": [record.decode() for record in attempt.records],
    }
    outcome = json.dumps(told)
    if len(outcome) > LARGEST:
        # The results of all steps are more than Restate would take at once: all else is told.
        records = without_results(attempt.records, attempt.ends)
        outcome = json.dumps({**told, "records": [record.decode() for record in records]})
    if ending.state is RunState.COMPLETED:
        return outcome.encode()
    assert ending.error is not None
    # So that it is shown as failed to whoever looks at the server.
    said = as_utf8(f"{ending.error['type'].rpartition(':')[2]}: {ending.error['text']}")
    raise restate.TerminalError(said, 500, metadata={"outcome": outcome})


def _on_asyncio(app: ASGIApp) -> ASGIApp:
    """Refuses another event loop, which would fail somewhere within Restate's library."""

    async def serve(
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        try:
            asyncio.get_running_loop()
        except RuntimeError as error:
            raise EngineError(
                "a worker for Restate runs on asyncio, as Restate's library does; tell the ASGI server so"
            ) from error
        await app(scope, receive, send)

    return serve
