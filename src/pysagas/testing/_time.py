"""Time that passes at once."""

from __future__ import annotations

from typing import Any

__all__ = ["virtual_time"]


def virtual_time(*, threshold: float = 0.0) -> dict[str, Any]:
    """Gives the backend options with which Trio's clock jumps to whatever is waited for.

    So retries and timeouts cost nothing: ``anyio.run(test, backend="trio",
    backend_options=virtual_time())``, or, with AnyIO's plugin for pytest, a fixture
    ``anyio_backend`` that returns ``("trio", virtual_time())``. asyncio has no such clock.

    Args:
        threshold: Seconds of real time in which nothing may happen before the clock jumps. Zero is
            right unless worker threads or sockets are waited for.

    Raises:
        ImportError: Trio is not installed.
    """
    try:
        from trio.testing import MockClock  # noqa: PLC0415 - Trio is an extra
    except ImportError as error:
        raise ImportError(
            'virtual_time is a clock of Trio, which is not installed: pip install "pysagas[trio]"'
        ) from error
    return _OfTrio(clock=MockClock(autojump_threshold=threshold))


class _OfTrio(dict[str, Any]):
    """Options that another backend must not pass over: it would wait for what Trio would not."""

    def get(self, key: str, default: Any = None) -> Any:
        """Refuses: Trio takes options whole, asyncio asks for its own."""
        del default
        raise ValueError(
            f"virtual_time() is a clock of Trio, and asyncio has none (it asks for {key!r}); give it "
            'with backend="trio"'
        )
