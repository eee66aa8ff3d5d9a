"""A limit in real time for what runs on a loop whose time may be virtual."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

from anyio import from_thread
from anyio.lowlevel import current_token

__all__ = ["LIMIT", "Limit"]

# Seconds that one run may take, unless told otherwise; and after which it is looked at again.
LIMIT = 60.0
PACE = 1.0


class Limit:
    """Cuts off what takes too long, from a thread of its own; within the block alone it does.

    Attributes:
        seconds: That one run may take.
    """

    def __init__(self, seconds: float = LIMIT) -> None:
        number: object = seconds
        if isinstance(number, bool) or not isinstance(number, int | float) or not number > 0:
            raise ValueError(f"explore: timeout must be seconds, more than 0, not {seconds!r}")
        self.seconds = seconds
        self._left = threading.Event()
        self._current: tuple[float, Any, Callable[[], object]] | None = None

    def __enter__(self) -> Self:
        self._left = threading.Event()
        threading.Thread(
            target=self._watch, args=(self._left,), name="pysagas-limit", daemon=True
        ).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._left.set()

    @contextmanager
    def on(self, cut_off: Callable[[], object]) -> Generator[None]:
        """Has this called, in the loop, when the block takes too long."""
        self._current = (time.monotonic() + self.seconds, current_token(), cut_off)
        try:
            yield
        finally:
            self._current = None

    def _watch(self, left: threading.Event) -> None:
        while not left.wait(min(PACE, self.seconds / 10)):
            current = self._current
            if current is not None and time.monotonic() >= current[0]:
                self._current = None
                with suppress(RuntimeError):  # the loop has just ended
                    from_thread.run_sync(current[2], token=current[1])
