"""The journal of a run whose process is killed: kept in memory, it outlives that."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from itertools import count
from typing import Any, cast

from pysagas import Outcome, Saga
from pysagas.durable import MemoryJournal

from ._faults import Trial
from ._watched import current_watcher

__all__ = ["processes"]

RUN_ID = "explored"


def processes(saga: Saga[..., Any], trial: Trial) -> Iterator[Callable[[], Awaitable[Outcome[Any]]]]:
    """Gives what runs a saga in one process after the other: each goes on with the journal."""
    args, kwargs = trial.args, dict(trial.kwargs)
    journal = _KillableJournal(_ObjectCodec(args))
    while True:
        yield partial(journal._start, saga, args, kwargs, RUN_ID)
        journal = journal.in_next_process()


class _ObjectCodec:
    """Keeps the objects themselves: what is explored need not be JSON."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self._args = args
        self._objects: dict[bytes, Any] = {}
        self._numbers = count()

    def encode(self, value: object) -> bytes:
        if isinstance(value, list) and any(
            one is self._args
            for one in cast("list[Any]", value)  # type: ignore[redundant-cast]  # for pyright
        ):
            data = b"arguments"  # by which each process knows the run again
        else:
            data = str(next(self._numbers)).encode()
        self._objects[data] = value
        return data

    def decode(self, data: bytes, kind: Any) -> Any:
        del kind
        return self._objects[data]


class _KillableJournal(MemoryJournal):
    """A journal that takes nothing from a process which has been killed."""

    def _append(self, key: int, *event: Any) -> None:
        current_watcher.get().check()
        super()._append(key, *event)

    async def _flush(self, key: int) -> None:
        current_watcher.get().check()
        await super()._flush(key)
        current_watcher.get().check()

    async def _end(self, key: int, ending: Any) -> None:
        current_watcher.get().check()
        await super()._end(key, ending)
