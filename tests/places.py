"""The places where the conformance suite runs its sagas: memory, a SQLite journal, Restate."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import anyio
import conformance_child
import httpx
import msgspec
from conformance_child import Start

from pysagas import Outcome, Saga, attach_outcome, outcome_of
from pysagas.durable import SQLiteJournal
from pysagas.engines.restate import RestateEngine
from pysagas.testing.conformance import SAGAS, Harness, OnCrash, Order

AnySaga = Saga[..., Any]

# None of the children measures itself: what they run is measured by the tests of one process.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
ROOT = Path(__file__).parent.parent
WORKER = Path(__file__).with_name("restate_worker.py")


def child(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "error", conformance_child.__file__, *arguments]
    return subprocess.Popen(command, env=ENVIRONMENT, **options)


class Cancelled(Exception):
    """Stands for the cancellation of a run, outside of what was cancelled."""


class InProcess(Harness):
    """What runs sagas in the process of the caller; those that are to be killed, in a child."""

    backend = "asyncio"

    def __init__(self) -> None:
        self.scopes: dict[str, anyio.CancelScope] = {}
        self.journal = ""
        # A child that has started and waits for its run; so that nobody waits for it to start.
        self.next: subprocess.Popen[bytes] | None = None
        self.children: list[subprocess.Popen[bytes]] = []

    async def __aenter__(self) -> Self:
        in_trio = anyio.get_cancelled_exc_class().__module__.startswith("trio")
        self.backend = "trio" if in_trio else "asyncio"
        self.next = self._child()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.children.append(self.next)
        await self.kill()

    def _child(self) -> subprocess.Popen[bytes]:
        return child(self.journal, self.backend, stdin=subprocess.PIPE)

    async def run(
        self,
        saga: AnySaga,
        order: Order,
        *,
        run_id: str,
        exceptions: Any = (),
        on_crash: OnCrash = "rollback",
    ) -> Outcome[Any]:
        with anyio.CancelScope() as scope:
            self.scopes[run_id] = scope
            ended: Outcome[Any] | None = None
            try:
                return await self.run_here(saga, order, run_id, exceptions, on_crash)
            except anyio.get_cancelled_exc_class() as error:
                ended = outcome_of(error)
                raise
        cancelled = Cancelled(run_id)
        attach_outcome(cancelled, ended)
        raise cancelled

    @abstractmethod
    async def run_here(
        self, saga: AnySaga, order: Order, run_id: str, exceptions: Any, on_crash: OnCrash
    ) -> Outcome[Any]: ...

    async def cancel(self, run_id: str) -> None:
        self.scopes[run_id].cancel()

    async def start(
        self, saga: AnySaga, order: Order, *, run_id: str, on_crash: OnCrash = "rollback"
    ) -> None:
        line = msgspec.json.encode(Start(saga.name, order, run_id, on_crash)) + b"\n"
        started, self.next = self.next, self._child()
        self.children.append(started)
        started.stdin.write(line)
        started.stdin.flush()

    async def kill(self) -> None:
        for started in self.children:
            started.kill()
            started.wait()
            started.stdin.close()
        self.children.clear()


class Memory(InProcess):
    name = "memory"
    lacks = {
        "journal": "nothing is recorded: a process that is killed is forgotten, and so is a run id"
    }

    async def run_here(
        self, saga: AnySaga, order: Order, run_id: str, exceptions: Any, on_crash: OnCrash
    ) -> Outcome[Any]:
        return await saga.run_with((order,), run_id=run_id, exceptions=exceptions)


class SQLite(InProcess):
    name = "SQLite journal"

    def __init__(self, path: str) -> None:
        super().__init__()
        self.journal = path

    async def run_here(
        self, saga: AnySaga, order: Order, run_id: str, exceptions: Any, on_crash: OnCrash
    ) -> Outcome[Any]:
        async with SQLiteJournal(self.journal) as journal:
            return await journal.run(
                saga, order, run_id=run_id, exceptions=exceptions, on_crash=on_crash
            )


# --- Restate ------------------------------------------------------------------------------------

SERVER = "@restatedev/restate-server@1.7.12"
STARTS = 3
SECONDS = 30


class Missing(Exception):
    """There is no server of Restate, and none can be had; the message says why."""


def restate_server() -> Path:
    """The server's program; installed once, for all processes, into a folder that git ignores."""
    folder = ROOT / "build" / SERVER.rpartition("/")[2]
    program = "node_modules/@restatedev/restate-server-*/bin/restate-server"
    if not folder.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise Missing("npm is missing, which installs the server of Restate")
        folder.parent.mkdir(exist_ok=True)
        # Two processes may do this at once: what is there, under its name, is there whole.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="restate-") as made:
            install = (npm, "install", "--silent", "--ignore-scripts", "--prefix", made, SERVER)
            ran = subprocess.run(install, capture_output=True, text=True, check=False)
            if not list(Path(made).glob(program)):
                raise Missing(
                    f"npm cannot install {SERVER}: {(ran.stdout + ran.stderr).strip()[-500:]}"
                )
            with suppress(OSError):
                Path(made).rename(folder)
            Path(made).mkdir(exist_ok=True)  # to be removed
    [found] = folder.glob(program)
    return found


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


class Server:
    """A server of Restate on ports of its own, without telemetry, in a folder of its own."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.program = program
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        self.has_started = False
        self._choose_ports()

    def _choose_ports(self) -> None:
        self.ports = {name: free_port() for name in ("node", "ingress", "admin")}
        self.ingress, self.admin = (
            f"http://127.0.0.1:{self.ports[name]}" for name in ("ingress", "admin")
        )

    def start(self) -> None:
        """Starts it, or starts it again on its folder and its ports; returns when it answers."""
        for _ in range(STARTS):
            if self._start():
                return
            if not self.has_started:
                self._choose_ports()  # somebody else was quicker
        raise AssertionError((self.folder / "server.log").read_text()[-3000:])

    def _start(self) -> bool:
        environment = {
            "RESTATE_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "1",
            "RESTATE_LISTEN_MODE": "tcp",
            "RESTATE_BIND_IP": "127.0.0.1",
            "RESTATE_BIND_PORT": str(self.ports["node"]),
            "RESTATE_INGRESS__BIND_PORT": str(self.ports["ingress"]),
            "RESTATE_ADMIN__BIND_PORT": str(self.ports["admin"]),
            "RESTATE_DEFAULT_NUM_PARTITIONS": "1",
            "RESTATE_ROCKSDB_TOTAL_MEMORY_SIZE": "256MB",
            # Hypercorn loses a wake-up now and then, and sleeps until the next ping of the server.
            "RESTATE_WORKER__INVOKER__HTTP2_KEEP_ALIVE_INTERVAL": "1s",
        }
        command = [self.program, "--no-logo", "--base-dir", self.folder / "data", "--node-name", "n1"]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env=ENVIRONMENT | environment, stdout=log, stderr=subprocess.STDOUT
            )
        until = time.monotonic() + SECONDS
        while self.process.poll() is None and time.monotonic() < until:
            with suppress(httpx.HTTPError):
                healths = (f"{self.admin}/health", f"{self.ingress}/restate/health")
                if all(httpx.get(url).status_code == 200 for url in healths):
                    self.has_started = True
                    return True
            time.sleep(0.02)
        self.kill()
        return False

    def register(self, uri: str, worker: subprocess.Popen[bytes]) -> None:
        """Tells it of the worker at an address, once that answers."""
        while worker.poll() is None:
            # On a socket that nobody serves yet a request waits for ever.
            with suppress(httpx.TimeoutException):
                body = {"uri": uri, "force": True}
                answer = httpx.post(f"{self.admin}/deployments", json=body, timeout=5.0)
                assert answer.is_success, answer.text
                return
        raise AssertionError((self.folder / "worker.log").read_text()[-3000:])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Workers:
    """Workers behind one address, which stays though they die: all of them listen on one socket."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = "http://{}:{}".format(*self.socket.getsockname())
        self.alive: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        number = self.socket.fileno()
        with (self.server.folder / "worker.log").open("ab") as log:
            started = subprocess.Popen(
                [
                    sys.executable,
                    str(WORKER),
                    self.server.ingress,
                    str(number),
                ],
                env=ENVIRONMENT,
                pass_fds=(number,),
                stdout=log,
                stderr=log,
            )
        self.alive.append(started)
        return started

    def kill(self, *which: subprocess.Popen[bytes]) -> None:
        for worker in which or tuple(self.alive):
            worker.kill()
            worker.wait()
            self.alive.remove(worker)


@contextmanager
def restate() -> Iterator[Restate]:
    """A server of Restate with a worker that knows the sagas.

    Raises:
        Missing: There is no server.
    """
    program = restate_server()
    with tempfile.TemporaryDirectory(prefix="pysagas-restate-") as folder:
        server = Server(program, Path(folder))
        workers = Workers(server)
        try:
            server.start()
            server.register(workers.address, workers.start())
            yield Restate(server, workers)
        finally:
            workers.kill()
            workers.socket.close()
            server.kill()


class Restate(Harness):
    name = "Restate"
    lacks = {
        "cut": "a step in flight is never cut off: it comes to its own end, and is then taken back",
        "refuse_changed": "a run whose saga has changed waits, and goes on when the saga is as it was",
        "rollback_on_crash": "a run whose worker died is always gone on with",
        "rollback_timeout": "refused when the engine is made: a replay could not keep that time",
        "trio": "workers run on asyncio, as the library of Restate does",
    }

    def __init__(self, server: Server, workers: Workers) -> None:
        self.server = server
        self.workers = workers
        self.engine = RestateEngine(SAGAS, ingress=server.ingress)

    def _revive(self) -> None:
        if not self.workers.alive:
            self.workers.start()

    async def run(
        self,
        saga: AnySaga,
        order: Order,
        *,
        run_id: str,
        exceptions: Any = (),
        on_crash: OnCrash = "rollback",
    ) -> Outcome[Any]:
        self._revive()
        engine = self.engine if saga in SAGAS else RestateEngine([saga], ingress=self.server.ingress)
        return await engine.run(saga, order, run_id=run_id, exceptions=exceptions)

    async def cancel(self, run_id: str) -> None:
        await self.engine.cancel(run_id)

    async def start(
        self, saga: AnySaga, order: Order, *, run_id: str, on_crash: OnCrash = "rollback"
    ) -> None:
        self._revive()
        await self.engine.submit(saga, order, run_id=run_id)

    async def kill(self) -> None:
        self.workers.kill()
