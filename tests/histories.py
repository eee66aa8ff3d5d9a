"""Changes to the histories in a journal's file, by SQL on their events: what a crash, or a fault, would leave."""

from __future__ import annotations

import sqlite3

# The view `events` cannot be written to. Here it can: what is written is a record with one event.
WRITABLE = (
    """CREATE TEMP TRIGGER added INSTEAD OF INSERT ON events BEGIN
        INSERT INTO records VALUES (NEW.run, NEW.seq, json_array(json_array(
            NEW.kind, json('[' || replace(NEW.path, '.', ',') || ']'), NEW.name, NEW.at,
            iif(NEW.data LIKE '{"base64":%', json(NEW.data), NEW.data)
        )));
    END""",
    """CREATE TEMP TRIGGER forgotten INSTEAD OF DELETE ON events BEGIN
        DELETE FROM records WHERE (run, seq) = (OLD.run, OLD.seq);
    END""",
)


def make_writable(connection: sqlite3.Connection) -> None:
    """Lets this connection insert and delete events, each of which is a record of its own from here on."""
    alone = connection.execute("SELECT run, seq, kind, path, name, data, at FROM events").fetchall()
    connection.execute("DELETE FROM records")
    for statement in WRITABLE:
        connection.execute(statement)
    connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", alone)
