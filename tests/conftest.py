"""Every async test runs on every loop."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Iterator
from typing import Any

import pytest

BACKENDS: list[Any] = [
    pytest.param(("asyncio", {"debug": True}), id="asyncio"),
    pytest.param(("trio", {}), id="trio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
]
if sys.version_info >= (3, 12):

    def eager_loop() -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        loop.set_task_factory(asyncio.eager_task_factory)
        return loop

    BACKENDS.append(pytest.param(("asyncio", {"loop_factory": eager_loop}), id="eager"))

WITHOUT_DEBUG = [pytest.param(("asyncio", {}), id="asyncio"), *BACKENDS[1:]]
"""For tests that run thousands of sagas: asyncio's debug mode makes each of them five times slower.

Use: ``@pytest.mark.parametrize("anyio_backend", WITHOUT_DEBUG, indirect=True)``.
"""


@pytest.fixture(params=BACKENDS)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def collected() -> Iterator[None]:
    """Collects what a test leaves behind as part of it: what is said then is not said in another one."""
    yield
    gc.collect()


ASYNCIO = [parameter for parameter in BACKENDS if parameter.values[0][0] == "asyncio"]
"""For tests of what only asyncio has: `task.cancel()`, `asyncio.timeout`, ...

Use: ``@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)``.
"""


def pytest_collection_finish(session: pytest.Session) -> None:
    """Takes the collected tests, ten thousand of them, out of the garbage collector's sight.

    Each full collection went through them all, and those tests that collect garbage took seconds.
    """
    del session
    freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Does so again, now and then, with what tests have left: a collection is a pause in a timed test."""
    del item
    global tests_run  # noqa: PLW0603
    tests_run += 1
    if tests_run % 200 == 0:
        freeze()


tests_run = 0


def freeze() -> None:
    # As it is imported, Hypothesis asks the collector who refers to Trio's source of random numbers,
    # and the collector does not see what is frozen.
    if "hypothesis" in sys.modules:
        gc.collect()
        gc.freeze()
