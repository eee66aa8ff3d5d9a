"""Measures what our sagas cost on an engine: ``python benchmarks/engines.py``.

Beside a handler for Restate that is written by hand, makes the same calls, and compensates. Both are
served by one worker, in one process and one event loop, and called in turn in the same rounds. Starts
the server that it finds, or that ``--server`` names, and stops it; all of it on the loopback device.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, count
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import anyio
from report import _middle, _spread, _table, publish
from run import environment

from pysagas import Parallel, Saga, Step

if TYPE_CHECKING:
    import httpx

NAME = "Ours"
GOAL = 1.15
"""Times that ours may take, where the handler written by hand takes 1."""
LIBRARIES = ("restate-sdk", "hypercorn", "httpx", "msgspec")
WORKER = Path(__file__).with_name("engines_worker.py")
BUILD = Path(__file__).parent.parent / "build"
SECONDS = 30
"""Until the server, or the worker, has to answer."""


async def action(argument: int) -> int:
    return argument


async def slow_action(argument: int) -> int:
    await asyncio.sleep(0.001)  # the fastest of calls to anything else
    return argument


async def compensation(argument: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Shape:
    """A saga of so many steps, one after the other or at once."""

    steps: int
    grouped: bool
    waits: bool
    """Whether each step takes a millisecond, or does nothing at all."""

    @property
    def name(self) -> str:
        return f"{'group' if self.grouped else 'sequence'} {self.steps}{' 1 ms' if self.waits else ''}"

    def saga(self) -> Saga[..., None]:
        function = slow_action if self.waits else action
        steps = [Step(function, compensation, name=f"step {number}") for number in range(self.steps)]
        return Saga([Parallel(*steps)] if self.grouped else steps, name=self.name)


@dataclass(frozen=True, slots=True)
class Case:
    """So many runs at once of one shape."""

    runs: int
    shape: Shape

    @property
    def label(self) -> str:
        runs = "1 saga" if self.runs == 1 else f"{self.runs} sagas at once"
        return f"{runs}, {'a group of ' if self.shape.grouped else ''}{self.shape.steps} steps"


def cases(*sizes: tuple[int, int, bool]) -> tuple[Case, ...]:
    return tuple(
        Case(runs, Shape(steps, grouped, waits))
        for waits in (False, True)
        for runs, steps, grouped in sizes
    )


CASES = cases((1, 100, False), (100, 10, False), (4, 50, True))
QUICK = cases((1, 10, False), (5, 3, False), (2, 5, True))


@dataclass(slots=True)
class Row:
    """What was measured of one contender in one case."""

    case: str
    takes: str
    contender: str
    seconds: list[float]
    steps: int
    ratios: list[float]
    """To the handler written by hand, in the same rounds."""
    goal: float | None = None

    @property
    def steps_a_second(self) -> float:
        return self.steps / median(self.seconds)


@dataclass(slots=True)
class Results:
    environment: dict[str, str]
    rows: list[Row] = field(default_factory=list)


# --- the server and the worker --------------------------------------------------------------------


def find_server(given: Path | None = None) -> Path | None:
    """Finds the server's program: what is given, what npm has put into a folder of `build`, or on PATH."""
    if given is not None:
        return given
    found = BUILD.glob("restate*/node_modules/@restatedev/restate-server-*/bin/restate-server")
    on_path = shutil.which("restate-server")
    return next(iter(sorted(found, reverse=True)), Path(on_path) if on_path else None)


def missing(server: Path | None) -> str | None:
    for package in LIBRARIES:
        try:
            version(package)
        except PackageNotFoundError:
            return f"{package} is not installed: pip install --group bench ."
    if server is None or not server.exists():
        return (
            f"there is no {server or 'restate-server'}: npm install --prefix build/restate "
            "@restatedev/restate-server, or --server PATH"
        )
    return None


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@dataclass(frozen=True, slots=True)
class Engine:
    """A server that is up, with a worker that serves both contenders."""

    ingress: str


@asynccontextmanager
async def engine(server: Path) -> AsyncIterator[Engine]:
    import httpx  # noqa: PLC0415 - it may be missing

    node, ingress, admin, ours, by_hand = (free_port() for _ in range(5))
    settings = {
        "RESTATE_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "RESTATE_LISTEN_MODE": "tcp",
        "RESTATE_BIND_IP": "127.0.0.1",
        "RESTATE_BIND_PORT": str(node),
        "RESTATE_INGRESS__BIND_PORT": str(ingress),
        "RESTATE_ADMIN__BIND_PORT": str(admin),
        "RESTATE_DEFAULT_NUM_PARTITIONS": "1",
        "RESTATE_ROCKSDB_TOTAL_MEMORY_SIZE": "256MB",
        # Hypercorn loses a wake-up now and then, and sleeps until the next ping of the server.
        "RESTATE_WORKER__INVOKER__HTTP2_KEEP_ALIVE_INTERVAL": "1s",
    }
    at = f"http://127.0.0.1:{ingress}"
    started: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("ab") as log:

        def start(*command: object, **settings: str) -> None:
            started.append(
                subprocess.Popen(
                    [str(part) for part in command],
                    env={**os.environ, **settings},
                    stdout=log,
                    stderr=log,
                )
            )

        async with httpx.AsyncClient(timeout=SECONDS) as client:
            try:
                data = Path(folder) / "data"
                start(server, "--no-logo", "--base-dir", data, "--node-name", "n1", **settings)
                start(sys.executable, WORKER, ours, by_hand, at)
                with anyio.fail_after(SECONDS):
                    await until(client.get, f"http://127.0.0.1:{admin}/health")
                    await until(client.get, f"{at}/restate/health")
                    for port in (ours, by_hand):
                        uri = {"uri": f"http://127.0.0.1:{port}"}
                        await until(client.post, f"http://127.0.0.1:{admin}/deployments", json=uri)
                yield Engine(at)
            except TimeoutError as error:
                raise RuntimeError((Path(folder) / "log").read_text()[-3000:]) from error
            finally:
                for process in started:
                    process.kill()
                    process.wait()


async def until(ask: Callable[..., Awaitable[httpx.Response]], url: str, **options: Any) -> None:
    """Asks until the answer is a good one."""
    import httpx  # noqa: PLC0415 - it may be missing

    while True:
        with suppress(httpx.TransportError):
            if (await ask(url, **options)).is_success:
                return
        await anyio.sleep(0.02)


# --- the contenders -------------------------------------------------------------------------------

numbers = count()
Run = Callable[[Engine, Shape], Awaitable[int]]
"""Carries out one run; gives how many steps it did."""


async def call(engine: Engine, workflow: str, body: object) -> Any:
    import httpx  # noqa: PLC0415 - it may be missing

    url = f"{engine.ingress}/{workflow}/run-{next(numbers)}/run"
    # A client for each: one for all of them looks through all its connections at each request, which
    # with a hundred costs more than what is measured. Nothing is encrypted here.
    async with httpx.AsyncClient(timeout=120, verify=False) as client:
        answer = await client.post(url, json=body)
    answer.raise_for_status()
    return answer.json()


async def by_hand(engine: Engine, shape: Shape) -> int:
    return await call(engine, "ByHand", {"shape": asdict(shape), "argument": 1})


async def ours(engine: Engine, shape: Shape) -> int:
    """Our worker, called as the one written by hand is: what is compared is the workers alone."""
    from pysagas.durable import JSONCodec  # noqa: PLC0415 - it may be missing
    from pysagas.durable._codec import as_text, encode_arguments  # noqa: PLC0415 - likewise

    args = as_text(encode_arguments(JSONCodec(), (1,), {}, action, ""))
    answer = await call(engine, NAME, {"saga": shape.name, "version": None, "args": args})
    events = chain.from_iterable(map(json.loads, answer["records"]))
    return sum(kind == "done" for kind, *_ in events)


async def ours_by_our_client(engine: Engine, shape: Shape) -> int:
    """The whole of it: two calls of the server for each run, and the outcome read."""
    client, saga = our_client(engine.ingress, shape)
    outcome = await client.run(saga, 1, run_id=f"run-{next(numbers)}")
    return len(outcome.steps)


@cache
def our_client(ingress: str, shape: Shape) -> tuple[Any, Saga[..., None]]:
    from pysagas.engines.restate import RestateEngine  # noqa: PLC0415 - it may be missing

    saga = shape.saga()
    return RestateEngine([saga], name=NAME, ingress=ingress), saga


BY_HAND = "by hand"
OURS = "pysagas"
CONTENDERS: dict[str, Run] = {
    BY_HAND: by_hand,
    OURS: ours,
    "pysagas, `engine.run`": ours_by_our_client,
}


# --- rounds ---------------------------------------------------------------------------------------


async def timed(run: Run, engine: Engine, case: Case) -> float:
    done: list[int] = []

    async def one() -> None:
        done.append(await run(engine, case.shape))

    gc.collect()
    begun = time.perf_counter()
    async with anyio.create_task_group() as tasks:
        for _ in range(case.runs):
            tasks.start_soon(one)
    seconds = time.perf_counter() - begun
    assert done == [case.shape.steps] * case.runs, done
    return seconds


async def measure(engine: Engine, case: Case, repeats: int) -> list[Row]:
    """Measures all contenders in rounds, in an order that rotates."""
    took: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for repeat in range(-1, repeats):
        names = list(CONTENDERS)
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            seconds = await timed(CONTENDERS[name], engine, case)
            if repeat >= 0:  # the first round fills caches and opens connections
                took[name].append(seconds)
    return [
        Row(
            case.label,
            "1 ms" if case.shape.waits else "nothing",
            name,
            seconds,
            case.runs * case.shape.steps,
            [one / other for one, other in zip(seconds, took[BY_HAND], strict=True)],
            GOAL if name == OURS else None,
        )
        for name, seconds in took.items()
    ]


# --- the report -----------------------------------------------------------------------------------

DOUBTS = """\
- *by hand*: a handler that awaits `ctx.run_typed` for each step, `restate.gather` for a group, and
  compensates in `except`. *pysagas*: our worker, called by the same client in the same way; the goal is
  for it. *pysagas, `engine.run`*: called by our client, which starts a run, then waits for its outcome.
- Each ratio is of one round, in which all ran in turn; "cost" is by how much more time than the handler
  written by hand takes. Its spread is the middle half of the rounds.
- Steps that do nothing show overhead and nothing else; those of 1 ms are the shortest of real ones.
- Server, worker and client share this machine.
"""


def to_markdown(results: Results) -> str:
    parts = ["# Results of the engines", ""]
    parts += [*_table(["what", "value"], results.environment.items()), "", DOUBTS]
    parts += ["## Steps a second, on Restate", ""]
    parts += _table(
        ["case", "a step takes", "who", "steps/s", "cost", "middle half", "goal", "met"],
        (
            [
                row.case,
                row.takes,
                row.contender,
                f"{row.steps_a_second:,.0f}",
                "" if row.contender == BY_HAND else _percent(median(row.ratios)),
                "" if row.contender == BY_HAND else " to ".join(map(_percent, _middle(row.ratios))),
                "" if row.goal is None else f"≤ {_percent(row.goal)}",
                _met(row),
            ]
            for row in results.rows
        ),
    )
    return "\n".join(parts).rstrip() + "\n"


def _percent(ratio: float) -> str:
    return f"{round((ratio - 1) * 100)} %"


def _met(row: Row) -> str:
    if row.goal is None:
        return ""
    if round(median(row.ratios), 2) <= row.goal:
        return "yes"
    return "unclear" if _middle(row.ratios)[0] <= row.goal else "**no**"


# --- the runner -----------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less of everything: a few seconds")
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds; by default 15")
    parser.add_argument("--server", type=Path, metavar="PATH", help="the program restate-server")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw rows there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the report there")
    return parser.parse_args(arguments)


async def on_restate(server: Path, options: argparse.Namespace, results: Results) -> None:
    async with engine(server) as up:
        for case in QUICK if options.quick else CASES:
            rows = await measure(up, case, options.repeats or (2 if options.quick else 15))
            results.rows += rows
            for row in rows:
                print(
                    f"{row.case:38} {row.takes:8} {row.contender:22} {row.steps_a_second:7,.0f} steps/s "
                    f"x{median(row.ratios):.2f} ({_spread(row.ratios)})",
                    flush=True,
                )


def main(arguments: Sequence[str] | None = None) -> Results | None:
    options = parse(arguments)
    server = find_server(options.server)
    reason = missing(server)
    if server is None or reason is not None:
        print(f"Left out: {reason}.")
        return None
    results = Results(environment())
    for package in LIBRARIES:
        results.environment[package] = version(package)
    said = subprocess.run([server, "--version"], capture_output=True, text=True, check=True).stdout
    results.environment["server"] = said.split("(")[0].strip()
    anyio.run(partial(on_restate, server, options, results), backend="asyncio")
    publish(to_markdown(results), results, options)
    return results


if __name__ == "__main__":
    main()
