"""Measures what pysagas costs, beside what one would use in its place: ``python benchmarks/run.py``.

All contenders of a case are measured in one process, one after the other, again and again; a ratio
compares two times of the same round. So what slows the machine for a while slows both.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from statistics import median

import anyio
from contenders import (
    NO_OP,
    ONE_CHECKPOINT,
    BareTaskGroup,
    Contender,
    ExitStack,
    Failed,
    Go,
    LimitedTaskGroup,
    PysagasBuilt,
    PysagasData,
    PysagasFunction,
    PysagasRepeated,
    Work,
    contenders,
)
from report import publish, to_markdown

LOOPS = ("asyncio", "trio")
OURS = (PysagasData.name, PysagasFunction.name)


@dataclass(frozen=True, slots=True)
class Case:
    """Work of one shape and size, done by all who can."""

    shape: str
    ending: str
    size: int
    baseline: str
    limit: int | None = None
    waiting: bool = False
    """Whether each action and compensation waits at one checkpoint, or does nothing at all."""
    goal: float | None = None
    """The ratio to the baseline that ours must not pass."""
    repeats: int | None = None
    """As many at most."""

    @property
    def label(self) -> str:
        limit = f", limit={self.limit}" if self.limit else ""
        waiting = ", checkpoint" if self.waiting else ""
        return f"{self.shape} {self.ending} {self.size}{limit}{waiting}"

    def prepare(self, contender: Contender) -> Go | None:
        work = ONE_CHECKPOINT if self.waiting else NO_OP
        fails = self.ending == "rollback"
        if self.shape == "sequence":
            return contender.sequence(work, self.size, fails=fails)
        return contender.group(work, self.size, fails=fails, limit=self.limit)


@dataclass(slots=True)
class Row:
    """What was measured of one contender: one number a repeat."""

    loop: str
    case: str
    contender: str
    unit: str
    values: list[float]
    """Per step, in `unit`; for imports in all."""
    baseline: str
    ratios: list[float]
    """To the baseline's value of the same repeat. For imports the difference, in `unit`."""
    goal: float | None = None
    note: str = ""


@dataclass(slots=True)
class Results:
    environment: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def cases(*, quick: bool) -> Iterator[Case]:
    sizes = (10, 100, 1000)
    for ending, size in product(("success", "rollback"), sizes):
        goal = None if (ending, size) == ("rollback", 10) else 1.0
        yield Case("sequence", ending, size, ExitStack.name, goal=goal)
    for waiting, ending, size in product((False, True), ("success", "rollback"), sizes):
        yield Case("group", ending, size, BareTaskGroup.name, waiting=waiting, goal=1.05)
    many = 1000 if quick else 10_000
    for waiting, ending in product((False, True), ("success", "rollback")):
        yield Case(
            "group",
            ending,
            many,
            LimitedTaskGroup.name,
            limit=100,
            waiting=waiting,
            goal=0.5 if ending == "success" else None,
            repeats=3,
        )


# --- time ---------------------------------------------------------------------------------------


async def seconds(go: Go, times: int, *, collecting: bool = True) -> float:
    """Measures a run, as the mean of so many in a row."""
    gc.collect()
    if not collecting:
        gc.disable()
    try:
        begun = time.perf_counter()
        for _ in range(times):
            await go()
        return (time.perf_counter() - begun) / times
    finally:
        gc.enable()


async def calibrate(go: Go, target: float) -> int:
    """Finds how many runs in a row take about `target` seconds."""
    await go()
    once = min([await seconds(go, 1), await seconds(go, 2)])
    return max(1, round(target / once))


async def measure(
    loop: str, case: Case, taking_part: Sequence[Contender], repeats: int, target: float
) -> list[Row]:
    runs: dict[str, tuple[Go, int]] = {}
    for contender in taking_part:
        go = case.prepare(contender)
        if go is not None and loop in contender.loops:
            runs[contender.name] = go, await calibrate(go, target)
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for repeat in range(min(repeats, case.repeats or repeats)):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(await seconds(*runs[name]) / case.size)
    return [
        Row(
            loop=loop,
            case=case.label,
            contender=name,
            unit="µs",
            values=[value * 1e6 for value in times[name]],
            baseline=case.baseline,
            ratios=ratios(times[name], times[case.baseline]),
            goal=case.goal if name in OURS else None,
        )
        for name in names
    ]


def ratios(values: Sequence[float], baseline: Sequence[float]) -> list[float]:
    return [value / base for value, base in zip(values, baseline, strict=True)]


async def measure_linear(loop: str, many: int, repeats: int) -> list[Row]:
    """Compares the time per step of a very long sequence with that of a short one.

    With the collector off as well: it goes through everything that is alive, again and again, and
    a million steps held for rollback are alive. That is its price, whoever holds them.
    """
    few = 1000
    rows = []
    for contender, ending in product((PysagasRepeated(), PysagasFunction()), ("success", "rollback")):
        fails = ending == "rollback"
        short = contender.sequence(NO_OP, few, fails=fails)
        long = contender.sequence(NO_OP, many, fails=fails)
        assert short is not None
        assert long is not None
        await seconds(short, 10)
        await long()  # a definition's arguments are checked in its first run
        for collecting in (True, False):
            of_short: list[float] = []
            of_long: list[float] = []
            for _ in range(repeats):
                of_short.append(
                    await seconds(short, max(1, many // few // 4), collecting=collecting) / few
                )
                of_long.append(await seconds(long, 1, collecting=collecting) / many)
            rows.append(
                Row(
                    loop=loop,
                    case=f"linear {ending} {many}" + ("" if collecting else ", collector off"),
                    contender=contender.name,
                    unit="µs",
                    values=[value * 1e6 for value in of_long],
                    baseline=f"itself, {few} steps",
                    ratios=ratios(of_long, of_short),
                    goal=1.2,
                )
            )
    return rows


# --- memory -------------------------------------------------------------------------------------


async def measure_memory(loop: str, taking_part: Sequence[Contender]) -> list[Row]:
    """Asks at the failing action, when all steps are held for rollback, what has been allocated."""
    size = 10_000
    held: list[int] = []

    async def fail(argument: int) -> None:
        held.append(tracemalloc.get_traced_memory()[0])
        raise Failed

    work = Work(NO_OP.action, NO_OP.compensation, fail)
    values: dict[str, float] = {}
    for contender in taking_part:
        go = contender.sequence(work, size, fails=True)
        if go is None or isinstance(contender, PysagasBuilt):
            continue
        await go()
        gc.collect()  # which empties the free lists, too: what is taken from those is not traced
        tracemalloc.start()
        try:
            await go()
        finally:
            tracemalloc.stop()
        values[contender.name] = held[-1] / size
    return [
        Row(
            loop=loop,
            case=f"memory sequence {size}",
            contender=name,
            unit="B",
            values=[value],
            baseline=ExitStack.name,
            ratios=[value / values[ExitStack.name]],
            goal=170 if name in OURS else None,
            note="goal in B",
        )
        for name, value in values.items()
    ]


# --- import -------------------------------------------------------------------------------------


ANYIO_IN_USE = (
    "from anyio import CancelScope, Event, create_task_group, get_cancelled_exc_class, to_thread; "
    "from anyio.lowlevel import checkpoint_if_cancelled"
)


def measure_import(repeats: int) -> list[Row]:
    """Imports in fresh processes, in turn.

    `import anyio` loads little: AnyIO loads the rest when it is asked for. So what a program that
    uses the same parts of AnyIO pays is shown as well.
    """
    imports = {
        "anyio": "import anyio",
        "anyio, with what pysagas uses of it": ANYIO_IN_USE,
        "pysagas": "import pysagas",
    }
    times: dict[str, list[float]] = {name: [] for name in imports}
    with tempfile.TemporaryDirectory() as compiled:
        # Compiled once, wherever the sources are, and whatever the machine says about bytecode.
        variables = {**os.environ, "PYTHONPYCACHEPREFIX": compiled}
        variables.pop("PYTHONDONTWRITEBYTECODE", None)
        for _ in range(repeats + 1):
            for name, statement in imports.items():
                code = (
                    "import time; begun = time.perf_counter()\n"
                    f"{statement}\nprint((time.perf_counter() - begun) * 1000)"
                )
                done = subprocess.run(
                    [sys.executable, "-c", code],
                    check=True,
                    capture_output=True,
                    text=True,
                    env=variables,
                )
                times[name].append(float(done.stdout))
    compared = {name: its_times[1:] for name, its_times in times.items()}  # the first one compiles
    return [
        Row(
            loop="-",
            case="import",
            contender=name,
            unit="ms",
            values=values,
            baseline="anyio",
            ratios=[value - base for value, base in zip(values, compared["anyio"], strict=True)],
            goal=10 if name == "pysagas" else None,
            note="difference in ms",
        )
        for name, values in compared.items()
    ]


# --- the runner ---------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    found = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(os.cpu_count()),
    }
    if hasattr(os, "getloadavg"):
        found["load at the start"] = f"{os.getloadavg()[0]:.1f}"
    for name in ("pysagas", "anyio", "trio", "simple-saga", "sagah"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "unknown"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less of everything: under a minute")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases with this in their name")
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds a case; by default 9")
    parser.add_argument("--backend", choices=LOOPS, help="only on this loop")
    parser.add_argument("--seed", type=Path, metavar="SDIST", help="the sdist of pysagas 0.0.3")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw rows there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the report there")
    return parser.parse_args(arguments)


async def on_loop(
    loop: str, options: argparse.Namespace, taking_part: Sequence[Contender], results: Results
) -> None:
    repeats = options.repeats or (3 if options.quick else 9)
    target = 0.006 if options.quick else 0.03

    def add(label: str, rows: list[Row]) -> None:
        results.rows += rows
        shown = "; ".join(f"{row.contender} {median(row.ratios):.2f}" for row in rows)
        print(f"{loop:8} {label:45} {shown}", flush=True)

    for case in cases(quick=options.quick):
        if options.only in case.label:
            add(case.label, await measure(loop, case, taking_part, repeats, target))
    many = 100_000 if options.quick else 1_000_000
    if options.only in f"linear {many}":
        add(f"linear {many}", await measure_linear(loop, many, min(repeats, 3)))
    if options.only in "memory":
        add("memory", await measure_memory(loop, taking_part))


def main(arguments: Sequence[str] | None = None) -> Results:
    options = parse(arguments)
    results = Results(environment())
    for key, value in results.environment.items():
        print(f"{key}: {value}")
    taking_part = []
    for contender in contenders(options.seed):
        reason = contender.missing()
        if reason is None:
            taking_part.append(contender)
        else:
            results.skipped[contender.name] = reason
            print(f"skipped: {contender.name}: {reason}")
    for loop in LOOPS:
        if options.backend in (None, loop):
            try:
                anyio.run(anyio.sleep, 0, backend=loop)
            except (ImportError, LookupError) as error:
                results.skipped[loop] = f"the loop cannot be used: {error}"
                print(f"skipped: {loop}: {error}")
            else:
                anyio.run(partial(on_loop, loop, options, taking_part, results), backend=loop)
    if options.only in "import" and options.backend is None:
        results.rows += measure_import(3 if options.quick else 15)
    publish(to_markdown(results), results, options)
    return results


if __name__ == "__main__":
    main()
