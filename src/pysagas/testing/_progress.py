"""How far an exploration has come, for who waits for it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import TextIO

__all__ = ["progress_on"]

# Seconds after which it is worth saying something, and between two lines that say it.
PATIENCE = 1.0
PACE = 0.2

Advance = Callable[[int, int | None], None]


@contextmanager
def progress_on(
    name: str, wanted: bool | None, *, clock: Callable[[], float] = time.monotonic
) -> Generator[Advance]:
    """Shows progress on standard error: with rich where that is installed, else as plain text.

    Args:
        name: Of what is explored.
        wanted: None for: where it takes long, and standard error is a terminal.
        clock: Seconds.

    Yields:
        What to call with how many are done, and how many there are, if that is known.
    """
    stream: TextIO | None = sys.stderr
    if stream is None:
        wanted = False  # as in a program without a console
    elif wanted is None:
        wanted = stream.isatty()
    begun = last = clock()
    shown: Advance | None = None
    with ExitStack() as stack:

        def advance(done: int, total: int | None) -> None:
            nonlocal shown, last
            now = clock()
            if stream is None or not wanted or now - begun < PATIENCE or now - last < PACE:
                return
            last = now
            if shown is None:
                shown = stack.enter_context(_bar(name, stream))
            shown(done, total)

        yield advance


@contextmanager
def _bar(name: str, stream: TextIO) -> Generator[Advance]:
    try:
        from rich.console import Console  # noqa: PLC0415 - only who waits long pays for it
        from rich.progress import Progress  # noqa: PLC0415 - as above
    except ImportError:
        yield from _plain(name, stream)
        return
    with Progress(console=Console(file=stream), transient=True) as bar:
        task = bar.add_task(f"exploring {name}", total=None)

        def advance(done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=total)

        yield advance


def _plain(name: str, stream: TextIO) -> Generator[Advance]:
    width = 0

    def advance(done: int, total: int | None) -> None:
        nonlocal width
        line = f"exploring {name}: {done} of {total or '?'} runs"
        width = max(width, len(line))
        stream.write(f"\r{line:<{width}}")
        stream.flush()

    try:
        yield advance
    finally:
        stream.write(f"\r{'':<{width}}\r")
        stream.flush()
