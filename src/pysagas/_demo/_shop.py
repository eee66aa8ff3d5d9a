"""The shop: a SQLite file, a directory of invoices, and a warehouse that is told of orders over HTTP."""

from __future__ import annotations

import http.client
import json
import sqlite3
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer
from tempfile import TemporaryDirectory
from threading import Thread

__all__ = ["NotAShop", "Order", "Shop", "State", "Warehouse", "WarehouseRequest", "look", "open_shop"]

# Stands in the header of a shop's file, so that no other database is taken for one.
APPLICATION_ID = 0x73686F70

SCHEMA = (
    f"PRAGMA application_id = {APPLICATION_ID}",
    "CREATE TABLE stock (item TEXT PRIMARY KEY, quantity INTEGER CHECK (quantity >= 0))",
    "CREATE TABLE accounts (name TEXT PRIMARY KEY, balance INTEGER CHECK (balance >= 0))",
    "CREATE TABLE shipments (order_id TEXT PRIMARY KEY, state TEXT)",
    "CREATE TABLE applied (key TEXT PRIMARY KEY)",
    "INSERT INTO stock VALUES ('lamp', 5)",
    "INSERT INTO accounts VALUES ('ada', 100)",
)


class NotAShop(Exception):
    """The path given cannot be used as a shop's database; what was there is as it was."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is ordered, by whom, at what price."""

    id: str
    item: str = "lamp"
    quantity: int = 1
    customer: str = "ada"
    price: int = 40


@dataclass(frozen=True, slots=True)
class Shop:
    """Where everything is, and how the demo is to go.

    Attributes:
        database: The SQLite file.
        invoices: The directory of the invoices.
        port: The warehouse's, on 127.0.0.1.
        pace: Seconds that a step takes, and that a compensation waits before its work.
        fail: The step that is to fail.
        fail_compensation: The step whose compensation is to fail.
        crash: The step in which the process is to be killed.
        journal: Where the run is recorded, if anywhere.
    """

    database: Path
    invoices: Path
    port: int
    pace: float = 0
    fail: str | None = None
    fail_compensation: str | None = None
    crash: str | None = None
    journal: Path | None = None

    @contextmanager
    def transaction(self) -> Generator[sqlite3.Connection]:
        """Opens the database: what the block executes is applied whole or not at all."""
        with closing(sqlite3.connect(self.database)) as connection, connection:
            yield connection


class Warehouse(TCPServer):
    """The HTTP endpoint: the orders that it was told of, each a file, so that they outlive it.

    It serves one request at a time, in the order in which clients connected. So the DELETE that
    takes back a POST cannot overtake it, even if the POST's client was cancelled and has gone.
    """

    def __init__(self, orders: Path) -> None:
        self.orders = orders
        super().__init__(("127.0.0.1", 0), WarehouseRequest)

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing: a client that was cancelled has hung up."""


class WarehouseRequest(BaseHTTPRequestHandler):
    """``POST /orders/ID``, ``DELETE /orders/ID``, and GET for a list."""

    timeout = 5  # seconds, for a client that connects and says nothing

    @property
    def orders(self) -> Path:
        assert isinstance(self.server, Warehouse)
        return self.server.orders

    def do_POST(self) -> None:
        (self.orders / self.path.rpartition("/")[2]).touch()
        self.answer(201)

    def do_DELETE(self) -> None:
        # Fine if it is not there: the compensation of a POST that never arrived must not fail.
        (self.orders / self.path.rpartition("/")[2]).unlink(missing_ok=True)
        self.answer(204)

    def do_GET(self) -> None:
        self.answer(200, json.dumps(sorted(order.name for order in self.orders.iterdir())).encode())

    def answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: the demo prints what happens."""


def make_tables(path: Path) -> None:
    """Makes the tables in a new file; leaves a shop's as they are, and refuses all else."""
    with closing(sqlite3.connect(path, timeout=1)) as database, database:
        # At once, so that a file that cannot be written is found here and not by the saga.
        database.execute("BEGIN IMMEDIATE")
        if not database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            for statement in SCHEMA:
                database.execute(statement)
        elif database.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise NotAShop(f"{path} is the database of something else")


@contextmanager
def open_shop(path: Path | None) -> Generator[tuple[Path, Path, int]]:
    """Opens the shop at `path`, or a temporary one, and its warehouse; closes them in the end.

    Yields:
        The database, the directory of the invoices, and the port of the warehouse.

    Raises:
        NotAShop: The path cannot be used.
    """
    with ExitStack() as stack:
        if path is None:
            path = Path(stack.enter_context(TemporaryDirectory(prefix="pysagas-"))) / "shop.db"
        path = path.absolute()  # so that :memory: is a file like any other
        invoices = path.with_name(f"{path.name}-invoices")
        orders = path.with_name(f"{path.name}-warehouse")
        try:
            make_tables(path)
            invoices.mkdir(exist_ok=True)
            orders.mkdir(exist_ok=True)
        except (OSError, sqlite3.Error) as error:
            raise NotAShop(f"{path} cannot be used as the shop's database: {error}") from error
        warehouse = stack.enter_context(Warehouse(orders))
        # A daemon: Ctrl-C may come between any two lines here, and must not leave us waiting for it.
        Thread(target=warehouse.serve_forever, args=(0.02,), daemon=True).start()
        stack.callback(warehouse.shutdown)
        yield path, invoices, warehouse.server_address[1]


State = Mapping[str, Sequence[str]]


def look(shop: Shop) -> State:
    """Reads everything that the saga changes, from where it really is."""
    found: dict[str, list[str]] = {}
    with shop.transaction() as database:
        for table in ("stock", "accounts", "shipments", "applied"):
            rows = database.execute(f"SELECT * FROM {table} ORDER BY 1")  # noqa: S608 - ours
            found[table] = [" ".join(map(str, row)) for row in rows]
    files = sorted(shop.invoices.glob("*.txt"))
    found["invoices"] = [f"{file.name}: {file.read_text().strip()}" for file in files]
    with closing(http.client.HTTPConnection("127.0.0.1", shop.port, timeout=5)) as client:
        client.request("GET", "/orders")
        found["warehouse"] = json.loads(client.getresponse().read())
    return found
