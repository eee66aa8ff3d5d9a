"""A journal that remembers as long as its process does: for tests of what a crash leaves behind."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Self

from anyio.lowlevel import checkpoint

from ._codec import Codec
from ._errors import JournalError, OtherRun, RunInProgress
from ._events import Event, EventKind, Path, RunInfo, RunState
from ._journal import Journal
from ._storage import Claim, Ending, RunGone, Stored

__all__ = ["MemoryJournal", "in_words", "not_so_any_more", "other_run"]


@dataclass
class _Run:
    stored: Stored
    started: float
    events: list[Event] = field(default_factory=list[Event])
    ending: Ending | None = None
    ended: float | None = None
    held: bool = True


class MemoryJournal(Journal):
    """Keeps runs in memory: it survives a crash that is only acted, and no real one."""

    def __init__(self, codec: Codec | None = None) -> None:
        """Starts with no runs."""
        super().__init__(codec)
        self._runs: dict[int, _Run] = {}
        self._key_of: dict[str, int] = {}
        # No key is used again: an outcome that is kept may know a run that was pruned.
        self._keys = count()

    def in_next_process(self) -> Self:
        """Gives the journal as the next process finds it: with the same runs, none of them in hand."""
        journal = copy(self)
        journal._in_hand = set()
        for run in self._runs.values():
            run.held = False
        return journal

    async def _claim(
        self,
        run_id: str,
        saga: str,
        version: str | None,
        args: bytes,
        now: float,
        *,
        create: bool = False,
    ) -> Claim:
        await checkpoint()
        key = self._key_of.get(run_id)
        if key is None:
            if not create:
                raise RunGone(f"run {run_id!r}")
            key = self._key_of[run_id] = next(self._keys)
            self._runs[key] = _Run(Stored(run_id, saga, version, args, RunState.RUNNING, key), now)
            return Claim(key, is_new=True)
        run = self._runs[key]
        problem = other_run(run.stored, saga, args)
        if problem is not None:
            raise OtherRun(problem)
        if run.ending is None and run.held:
            raise RunInProgress(f"run {run_id!r} is under way")
        run.held = run.ending is None
        return Claim(key, run.ending)

    async def _release(self, key: int, last: Event | None = None) -> None:
        run = self._runs[key]
        run.held = False
        if last is not None:
            run.events.append(last)

    async def _load(self, key: int) -> list[Event]:
        return list(self._runs[key].events)

    def _append(self, key: int, kind: EventKind, path: Path, name: str, data: bytes = b"", /) -> None:
        self._runs[key].events.append(Event(kind, path, name, data, time.time()))

    async def _flush(self, key: int) -> None:
        del key
        await checkpoint()

    async def _end(self, key: int, ending: Ending) -> None:
        run = self._runs[key]
        run.ending, run.held = ending, False
        run.ended = run.events[-1].at if run.events else run.started
        run.stored = run.stored._replace(state=ending.state)

    async def _reopen(self, key: int, was: RunState) -> None:
        run = self._runs.get(key)
        if run is None:
            raise RunGone("this run")
        if run.stored.state is not was:
            raise not_so_any_more(run.stored.run_id, run.stored.state, was)
        run.ending, run.ended, run.held = None, None, True
        run.stored = run.stored._replace(state=RunState.RUNNING)

    async def _unfinished(self) -> list[Stored]:
        return [run.stored for run in self._runs.values() if run.ending is None]

    async def _stored(self, run_id: str) -> Stored | None:
        key = self._key_of.get(run_id)
        return None if key is None else self._runs[key].stored

    async def _list(self, since: float = -math.inf, run_id: str | None = None) -> list[RunInfo]:
        return [
            RunInfo(
                run.stored.run_id,
                run.stored.saga,
                run.stored.version,
                run.stored.state,
                run.started,
                run.ended,
                in_words(run.ending.error) if run.ending is not None and run.ending.error else None,
                run.held,
            )
            for run in self._runs.values()
            if (run.ended is None or run.ended >= since) and run_id in (None, run.stored.run_id)
        ]

    async def _events(self, run_id: str) -> list[Event]:
        key = self._key_of.get(run_id)
        if key is None:
            raise JournalError(f"run {run_id!r} is not in the journal")
        return list(self._runs[key].events)

    async def _prune(self, before: float) -> int:
        gone = [
            key
            for key, run in self._runs.items()
            if run.ended is not None
            and run.ended < before
            and run.stored.state in (RunState.COMPLETED, RunState.COMPENSATED)
        ]
        for key in gone:
            del self._key_of[self._runs.pop(key).stored.run_id]
        return len(gone)


def in_words(error: Mapping[str, Any]) -> str:
    """Says what a recorded exception was, in a line."""
    name = error["type"].rpartition(":")[2]
    return f"{name}: {error['text']}" if error["text"] else name


def not_so_any_more(run_id: str, state: RunState, was: RunState) -> JournalError:
    """Makes the error for a run with which somebody else has done something."""
    if state is RunState.RUNNING:
        return RunInProgress(f"run {run_id!r} is under way: somebody else has taken it up")
    return JournalError(f"run {run_id!r} is {state.value}, and not {was.value} any more")


def other_run(stored: Stored, saga: str, args: bytes) -> str | None:
    """Says why a recorded run is not the one that is asked for."""
    if stored.saga != saga:
        return f"run {stored.run_id!r} is one of saga {stored.saga!r}, not of {saga!r}"
    if stored.args != args:
        return (
            f"run {stored.run_id!r} of saga {saga!r} has other arguments: recorded are "
            f"{stored.args.decode(errors='replace')}, given {args.decode(errors='replace')}; a run id "
            "belongs to one call"
        )
    return None
