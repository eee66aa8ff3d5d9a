"""Time that passes at once."""

from __future__ import annotations

import sys

import anyio
import pytest
from worlds import Lab

from pysagas import Saga
from pysagas.testing import explore, faults, virtual_time

HOUR = 3600


async def patient(attempt):
    await anyio.sleep(HOUR)
    return await attempt()


def test_waiting_takes_no_time():
    """An hour that a step waits is over at once, and has passed."""

    async def main():
        begun = anyio.current_time()
        await anyio.sleep(HOUR)
        return anyio.current_time() - begun

    waited = anyio.run(main, backend="trio", backend_options=virtual_time())
    assert HOUR <= waited < HOUR + 1


def test_a_patient_saga_is_explored_at_once():
    """Retries that wait, and limits, cost nothing: all runs share one clock."""
    lab = Lab(lambda world: Saga([world.step("a", retry=patient)]))
    report = anyio.run(explore, lab, backend="trio", backend_options=virtual_time())

    assert report.ok, report


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", [("trio", virtual_time())], ids=["virtual"])
async def test_as_the_backend_of_a_test(anyio_backend):
    """With AnyIO's plugin it is what the fixture gives."""
    with pytest.raises(TimeoutError):
        with anyio.fail_after(HOUR):
            await anyio.sleep_forever()


def test_a_threshold_for_what_really_takes_time():
    """It is that of the clock; zero where nothing is said."""
    assert virtual_time()["clock"].autojump_threshold == 0
    assert virtual_time(threshold=0.5)["clock"].autojump_threshold == 0.5


def test_each_run_has_a_clock_of_its_own():
    """What one run has waited is not on the next one's clock."""
    assert virtual_time()["clock"] is not virtual_time()["clock"]


def test_without_trio(monkeypatch):
    """It says what is missing, and how to get it."""
    monkeypatch.setitem(sys.modules, "trio.testing", None)
    with pytest.raises(ImportError, match=r'which is not installed: pip install "pysagas\[trio\]"'):
        virtual_time()


def test_asyncio_has_no_such_clock():
    """It would pass over these options, and really wait."""
    with pytest.raises(ValueError, match=r"virtual_time\(\) is a clock of Trio, and asyncio has none"):
        anyio.run(anyio.sleep, 0, backend_options=virtual_time())
    with pytest.raises(ValueError, match=r'give it with backend="trio"'):
        faults(Lab(lambda world: Saga([world.step("a")])), backend_options=virtual_time())
