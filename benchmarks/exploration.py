"""What a proof costs: ``python benchmarks/exploration.py`` explores sagas of fakes that wait once before their effect, and once after it.

The goals: every fault of a saga of 30 steps in under two seconds, every pair of 10 steps in under ten.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from statistics import median

import anyio

from pysagas import Parallel, Saga
from pysagas.testing import EffectsLedger, Report, Trial, explore


def trial_of(steps: int, *, group: int = 0) -> Trial:
    """A saga of so many steps, and a group of `group` members besides."""
    ledger = EffectsLedger()
    parts = [ledger.step(f"step {number}") for number in range(steps)]
    members = Parallel(*(ledger.step(f"member {number}") for number in range(group)))
    return Trial(
        Saga([*parts, members] if group else parts, name="measured", middleware=[ledger.watch]),
        state=ledger.snapshot,
    )


CASES = {
    "30 steps, each fault": (partial(trial_of, 30), False, 2.0),
    "10 steps, each pair": (partial(trial_of, 10), True, 10.0),
    "group of 10, each fault": (partial(trial_of, 0, group=10), False, None),
    "5 steps and a group of 5, each pair": (partial(trial_of, 5, group=5), True, None),
}


def measure(case: str, backend: str) -> tuple[float, Report]:
    trial, pairs, _ = CASES[case]
    begun = time.perf_counter()
    report = anyio.run(partial(explore, trial, pairs=pairs, progress=False), backend=backend)
    return time.perf_counter() - begun, report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    print("| case | loop | runs | seconds | goal |\n|---|---|---|---|---|")
    for case, (_, _, goal) in CASES.items():
        for backend in ("asyncio", "trio"):
            measured = [measure(case, backend) for _ in range(repeats)]
            seconds = median(taken for taken, _ in measured)
            assert all(report.ok for _, report in measured)
            runs = len(measured[0][1].results)
            print(f"| {case} | {backend} | {runs} | {seconds:.2f} | {goal or ''} |")


if __name__ == "__main__":
    main()
