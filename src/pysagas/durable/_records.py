"""The tables of a journal's file, and how the history of runs stands in them.

What one commit says of one run is one *record*: a row with a list of events, as JSON. A step that follows
another one is two events, the result of the one and the start of the other; the members of a group that
start together are as many events as they are. Rows are what SQLite takes most of its time for, so an
event is not a row. To read, there is the view ``events``, which has one for each.

What this must not know: who writes, and when.
"""

from __future__ import annotations

import json
import sqlite3
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple, cast

from ._errors import JournalError
from ._events import Event, EventKind, Path

__all__ = [
    "BEGIN_RUNS",
    "LARGE",
    "NOTHING",
    "OLDEST",
    "End",
    "Events",
    "Record",
    "Written",
    "end_run",
    "insert",
    "is_journal",
    "is_of_statement",
    "next_number",
    "prepare",
    "prepare_put",
    "put",
    "written",
]

# In the header of the file, so that no other database is taken for a journal.
APPLICATION_ID = 0x70736A31
FORMAT = 2

OLDEST = (3, 33, 0)
"""Of 2020; older releases of SQLite were not thought of."""

# For those who look into the file; what is here reads the records themselves.
EVENTS = """CREATE VIEW events AS SELECT
    run,
    seq + key AS seq,                                 -- the order in which they happened
    json_extract(value, '$[0]') AS kind,
    replace(trim(json_extract(value, '$[1]'), '[]'), ',', '.') AS path,   -- 0.2.1
    json_extract(value, '$[2]') AS name,
    coalesce(json_extract(value, '$[4]'), '') AS data,
    json_extract(value, '$[3]') AS at
    FROM records, json_each(records.events)"""

RECORDS = """CREATE TABLE records (
    run INTEGER NOT NULL REFERENCES runs (id),
    seq INTEGER NOT NULL,         -- the number of its first event
    events TEXT NOT NULL,         -- [[kind, path, name, at, data], ...], as JSON, without data that is empty
    PRIMARY KEY (run, seq)        -- an index; so the rows of many runs that go on at once stand together
)"""

UNFINISHED = "CREATE INDEX unfinished ON runs (state) WHERE state = 'running'"

SCHEMA = (
    """CREATE TABLE owners (
        id INTEGER PRIMARY KEY,
        token TEXT NOT NULL UNIQUE,   -- names the file with its lock: JOURNAL-owner-TOKEN
        host TEXT NOT NULL,
        pid INTEGER NOT NULL,
        started REAL NOT NULL         -- seconds since the epoch, here as everywhere
    )""",
    """CREATE TABLE runs (
        id INTEGER PRIMARY KEY AUTOINCREMENT,   -- never that of a run that was pruned
        run_id TEXT NOT NULL UNIQUE,
        saga TEXT NOT NULL,
        version TEXT,
        args BLOB NOT NULL,           -- [[positional, ...], {name: value, ...}], as JSON
        state TEXT NOT NULL,          -- running, completed, compensated, failed
        owner INTEGER REFERENCES owners (id),   -- NULL once it has ended
        started REAL NOT NULL,
        ended REAL,
        value BLOB,                   -- what the saga returned
        error TEXT                    -- what it raised, as JSON
    )""",
    UNFINISHED,
    RECORDS,
    EVENTS,
)

Record = tuple[int, int, str]
"""A row: the run, the number of the first event, the events."""

Written = tuple[str, Path, str, float] | tuple[str, Path, str, float, Any]
"""An event as it stands in a record."""


class Events:
    """Writes events as records have them, and reads them again."""

    def __init__(self) -> None:
        """Makes one."""
        self._encode: Callable[[object], bytes]
        self._decode: Callable[[str], Any]
        try:
            from msgspec.json import Decoder, Encoder  # noqa: PLC0415 - an extra
        except ImportError:  # the journal has a codec that does without, as this can
            self._encode = lambda events: json.dumps(events, separators=(",", ":")).encode()
            self._decode = json.loads
        else:
            # A name may be of a subclass of str, which msgspec does not know.
            self._encode = Encoder(enc_hook=str).encode
            self._decode = Decoder().decode

    def encode(self, events: object) -> str:
        """Gives the text of events; or of records, by run and number as `insert_all` takes them.

        Raises:
            ValueError: A name is no text that could be written.
        """
        return self._encode(events).decode()

    def decode(self, text: str) -> list[Event]:
        """Gives the events of a text.

        Raises:
            JournalError: It is damaged, or somebody else has written it.
        """
        try:
            return [
                Event(EventKind(kind), tuple(path), name, _bytes(*data), at)
                for kind, path, name, at, *data in self._decode(text)
            ]
        except (TypeError, ValueError, KeyError) as error:
            raise JournalError(f"a record cannot be read: {error}: {text[:200]!r}") from error


def written(kind: EventKind, path: Path, name: str, data: bytes, at: float) -> Written:
    """Gives an event as it stands in a record."""
    # `value` of an Enum is a descriptor in Python, and costs more than all else here.
    if not data:
        return (kind._value_, path, name, at)
    try:
        return (kind._value_, path, name, at, data.decode())
    except UnicodeDecodeError:  # a codec may write what it likes
        return (kind._value_, path, name, at, {"base64": b64encode(data).decode()})


def _bytes(data: str | dict[str, str] = "") -> bytes:
    return data.encode() if isinstance(data, str) else b64decode(data["base64"])


class End(NamedTuple):
    """How a run ended: its key, its state, what it returned, what it raised, and when."""

    run: int
    state: str
    value: bytes
    error: str | None
    at: float


# One statement, which lets go of the interpreter lock once: a busy event loop does not soon give it back.
# And a text: to hand over each value by itself takes time of the interpreter, which all wait for.
_PUT_RECORDS = """INSERT INTO records (run, seq, events)
    SELECT CAST(key AS INTEGER), CAST(substr(key, instr(key, '/') + 1) AS INTEGER), value
    FROM json_each({})"""

# Ends besides, by one statement as well. The views, and what is done in place of an insert into them, are this
# connection's own; no file holds them. Each end is an UPDATE by key: a join with the table of all runs is planned
# by statistics that somebody may have made when it was small, and then goes through all of it.
_PREPARE_PUT = (
    "PRAGMA temp_store = MEMORY",  # a disk that is full, or /tmp, says nothing of it
    "CREATE TEMP VIEW ended AS SELECT NULL AS run, NULL AS state, NULL AS value, NULL AS error, NULL AS at",
    """CREATE TEMP TRIGGER end_run INSTEAD OF INSERT ON ended BEGIN
        UPDATE runs SET
            state = NEW.state, value = NEW.value, error = NEW.error, ended = NEW.at, owner = NULL
            WHERE id = NEW.run;
    END""",
    "CREATE TEMP VIEW put AS SELECT NULL AS records, NULL AS ends",
    f"""CREATE TEMP TRIGGER put_all INSTEAD OF INSERT ON put BEGIN
        {_PUT_RECORDS.format("NEW.records")};
        INSERT INTO ended (run, state, value, error, at)
            SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'),
                CAST(json_extract(value, '$[2]') AS BLOB), json_extract(value, '$[3]'), json_extract(value, '$[4]')
            FROM json_each(NEW.ends);
    END""",  # noqa: S608 - of constants
)
_PUT = _PUT_RECORDS.format("?")
_PUT_BOTH = "INSERT INTO put (records, ends) VALUES (?, ?)"
_INSERT = "INSERT INTO records (run, seq, events) VALUES (?, ?, ?)"

NOTHING = "[]"
"""The text of no records, and of no ends."""

# In characters. There is an end to what SQLite takes as one text, and it makes copies of it.
LARGE = 10_000_000


def prepare_put(connection: sqlite3.Connection) -> None:
    """Makes what `put` needs."""
    for statement in _PREPARE_PUT:
        connection.execute(statement)


def put(connection: sqlite3.Connection, records: str, ends: str) -> None:
    """Puts records into the file, and how runs end, by one statement.

    Args:
        connection: To the file.
        records: For the run of each and the number of its first event, as ``17/5``, its events, as JSON.
        ends: A list of `End`, as JSON: of those whose values are text.
    """
    if ends == NOTHING:  # as most often; what the trigger does besides takes its time
        connection.execute(_PUT, (records,))
    else:
        connection.execute(_PUT_BOTH, (records, ends))


def end_run(connection: sqlite3.Connection, end: End) -> None:
    """Puts into the file how a run ends, of which the value may be any bytes, and of any size."""
    connection.execute("INSERT INTO ended (run, state, value, error, at) VALUES (?, ?, ?, ?, ?)", end)


def insert(connection: sqlite3.Connection, records: Iterable[Record]) -> None:
    """Puts records into the file, each by itself."""
    connection.executemany(_INSERT, records)


# So many rows at most are given to one statement; there is an end to the values that SQLite takes.
_MOST = 2048


class Many:
    """One statement for many rows, of values that are bytes, which JSON cannot hold."""

    def __init__(self, before: str, columns: int, after: str) -> None:
        """Makes one.

        Args:
            before: What stands before the table of the rows, whose columns are ``column1`` and so on.
            columns: How many those are.
            after: What stands behind it, and leaves out rows of NULL, which fill up.
        """
        self._before = before
        self._columns = columns
        self._after = after
        self._texts: dict[int, str] = {}

    def execute(self, connection: sqlite3.Connection, rows: Sequence[Sequence[object]]) -> int | None:
        """Carries it out; gives the id of the last row that it has put, where it puts any.

        Raises:
            ValueError: There are too many rows.
        """
        if len(rows) > _MOST:
            raise ValueError(f"{len(rows)} rows are too many for one statement")
        # Of few sizes, since SQLite has to understand each text once.
        size = 1 << (len(rows) - 1).bit_length()
        values = [*chain.from_iterable(rows), *(None,) * ((size - len(rows)) * self._columns)]
        return connection.execute(self._text(size), values).lastrowid

    def _text(self, size: int) -> str:
        if size not in self._texts:
            row = f"({', '.join('?' * self._columns)})"
            self._texts[size] = f"{self._before} (VALUES {', '.join([row] * size)}) {self._after}"
        return self._texts[size]


# Each row: its run_id, saga, version, args, state, owner, started.
BEGIN_RUNS = Many(
    "INSERT INTO runs (run_id, saga, version, args, state, owner, started) SELECT * FROM",
    7,
    "WHERE column1 IS NOT NULL",
)


def next_number(connection: sqlite3.Connection, run: int) -> int:
    """Gives the number that the next event of a run has."""
    last = "SELECT seq + json_array_length(events) FROM records WHERE run = ? ORDER BY seq DESC LIMIT 1"
    row = connection.execute(last, (run,)).fetchone()
    return cast("int", row[0]) if row else 0


# What is wrong with one statement; SQLite has undone it, and the transaction goes on.
_OF_STATEMENT = {
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_TOOBIG,
    sqlite3.SQLITE_CONSTRAINT,
    sqlite3.SQLITE_MISMATCH,
    sqlite3.SQLITE_MISUSE,
    sqlite3.SQLITE_RANGE,
}


def is_of_statement(error: sqlite3.Error) -> bool:
    """Tells whether an error is that of one statement, and says nothing against the file."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:  # Python's own: a value is of a type that SQLite does not know
        return isinstance(error, sqlite3.ProgrammingError | sqlite3.InterfaceError)
    return code & 0xFF in _OF_STATEMENT


def is_journal(connection: sqlite3.Connection, place: object) -> bool:
    """Tells whether a file is a journal already, of this format or an older one, and not a new file.

    Args:
        connection: To the file.
        place: How messages name it.

    Raises:
        JournalError: It is something else.
    """
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if not tables:
        return False
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    version = _version(connection)
    if application != APPLICATION_ID:
        raise JournalError(
            f"{place} is the database of something else, and no journal; it was left as it is"
        )
    if version > FORMAT:
        raise JournalError(
            f"journal {place} has format {version}, of a newer release of pysagas; this one "
            f"knows formats up to {FORMAT}: upgrade it. The journal was left as it is"
        )
    return True


def prepare(connection: sqlite3.Connection, place: object, is_alive: Callable[[str], bool]) -> None:
    """Makes the tables of a new file, or those of this format from those of an older one.

    Within a transaction of the caller's: of two processes that open a file at once, one does it.

    Args:
        connection: To the file.
        place: How messages name it.
        is_alive: Tells whether the owner of a token lives.

    Raises:
        JournalError: It is something else; or it is of an older format, and somebody has it open.
    """
    if is_journal(connection, place):
        if _version(connection) < FORMAT:
            _refuse_if_in_use(connection, place, is_alive)
        for version in range(_version(connection), FORMAT):
            MIGRATIONS[version](connection)
    else:
        for statement in SCHEMA:
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {FORMAT}")


def _refuse_if_in_use(
    connection: sqlite3.Connection, place: object, is_alive: Callable[[str], bool]
) -> None:
    for pid, token in connection.execute("SELECT pid, token FROM owners").fetchall():
        if is_alive(token):
            raise JournalError(
                f"journal {place} has format {_version(connection)}, of an older release of pysagas, and "
                f"process {pid} has it open, which would not find its tables any more if they were changed: "
                "let it end, then open the journal again. The journal was left as it is"
            )


def _from_1(connection: sqlite3.Connection) -> None:
    """Makes a record of each event: they had a row each."""
    connection.execute("DROP INDEX runs_by_state")
    connection.execute("ALTER TABLE events RENAME TO old")
    for statement in (UNFINISHED, RECORDS, EVENTS):
        connection.execute(statement)
    encode = Events().encode
    events = connection.execute("SELECT run, seq, kind, path, name, data, at FROM old")
    records = [
        (run, seq, encode([written(EventKind(kind), _path(path), name, data, at)]))
        for run, seq, kind, path, name, data, at in events
    ]
    insert(connection, records)
    connection.execute("DROP TABLE old")


def _path(text: str) -> Path:
    return tuple(map(int, text.split("."))) if text else ()


# What makes a file of the next format of one of an older one.
MIGRATIONS = {1: _from_1}


def _version(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return cast("int", version)
