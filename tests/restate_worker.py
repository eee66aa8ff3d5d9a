"""A worker that serves the sagas of the conformance suite to Restate; started by ``places.py``.

``python restate_worker.py INGRESS SOCKET``: the socket is one that it inherits, and listens already.
"""

from __future__ import annotations

import asyncio
import sys
from datetime import timedelta
from typing import Any

import restate
import restate.server
from hypercorn.asyncio import serve
from hypercorn.config import Config

from pysagas.engines.restate import RestateEngine
from pysagas.testing.conformance import SAGAS


async def main(ingress: str, socket: str) -> None:
    # An attempt begins at once when a worker is there again: tests should not wait.
    policy = restate.InvocationRetryPolicy(
        initial_interval=timedelta(milliseconds=50), exponentiation_factor=1.0, max_attempts=1_000_000
    )
    app: Any = RestateEngine(SAGAS, ingress=ingress, invocation_retry_policy=policy).app
    config = Config()
    config.bind = [f"fd://{socket}"]
    config.loglevel = "ERROR"
    stop = asyncio.Event()
    # The library of Restate takes SIGTERM for itself.
    restate.server.install_shutdown_hook(asyncio.get_running_loop(), stop.set)
    await serve(app, config, shutdown_trigger=stop.wait)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
