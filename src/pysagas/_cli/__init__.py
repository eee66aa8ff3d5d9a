"""The ``pysagas`` command: looks into a journal, and recovers what is unfinished in it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

__all__ = ["main"]

BAD_USAGE = 64
NEEDED = ("typer", "rich", "msgspec")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: Those of the command line; None: the process's own.

    Returns:
        The exit status: 0 fine, 1 something is left to do, 64 bad usage; and those of the demo.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(
            f"pysagas: the command needs {', '.join(missing)}, not installed here: "
            'pip install "pysagas[cli]"',
            file=sys.stderr,
        )
        return BAD_USAGE
    from ._commands import run  # noqa: PLC0415 - needs the extra

    return run(sys.argv[1:] if arguments is None else arguments)
