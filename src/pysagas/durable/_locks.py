"""The locks by which a process is known to live.

An *owner*, the journal object of one process, holds an exclusive lock, for as long as its process
lives, on a file of its own beside the journal; the kernel drops it when the process dies, however that
happens. The lock is one of SQLite's own, which works wherever the journal itself does.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

__all__ = ["is_locked", "make_file", "take_lock"]


def make_file(path: Path) -> None:
    """Makes a file that nobody else can read, not even for a moment, if it is not there.

    One that is there is not touched: to close it would drop all locks that this process has on it,
    those of another journal on the same file too.
    """
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))


def _locked(path: Path) -> sqlite3.Connection:
    """Locks an owner's file, for as long as the connection, or the process, lives.

    Raises:
        sqlite3.Error: Somebody else has the lock; or the file is not there, or cannot be opened.
    """
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode=rw",  # which makes no file
        uri=True,
        timeout=0,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        # No second file beside this one; nothing is ever written to it.
        connection.execute("PRAGMA journal_mode = MEMORY")
        connection.execute("BEGIN EXCLUSIVE")
    except BaseException:
        connection.close()
        raise
    return connection


def take_lock(path: Path) -> sqlite3.Connection | None:
    """Makes an owner's file, and locks it; gives None where somebody who cleans up came between.

    To him, a file that is made and not yet locked is one of a process that was killed at that moment,
    and he removes it with its lock in hand. So here either the lock is refused, or the file is gone
    once it is locked.
    """
    make_file(path)
    try:
        connection = _locked(path)
    except sqlite3.OperationalError as error:
        if path.exists() and error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
            raise
        return None
    if path.exists():
        return connection
    connection.close()
    return None


def is_locked(path: Path) -> bool:
    """Tells whether an owner lives; removes the file of one that does not."""
    try:
        if not path.exists():
            return False
        with closing(_locked(path)), suppress(PermissionError):  # Windows keeps what somebody has open
            path.unlink(missing_ok=True)
    except (OSError, sqlite3.Error):
        # Somebody has the lock. Or the file cannot be opened: no file descriptors are left, it is
        # another user's. Then nobody can tell, and to take the run of a process that lives is worse
        # than to leave that of a dead one; and other runs have nothing to do with it.
        return True
    return False
