"""A process that is killed, and the next one: acted, with a journal that outlives the run.

Nothing of the run may happen after it is killed. So the watched functions call nothing any more,
what was waiting in one of them stays where it is, and the journal takes nothing more.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any

from pysagas import Outcome
from pysagas.durable import Event, MemoryJournal

from ._watched import Killed

if TYPE_CHECKING:
    from ._run import TrialRun

__all__ = ["run_killed"]

RUN_ID = "explored"


class _ObjectCodec:
    """Keeps the objects themselves: what is explored need not be JSON."""

    def __init__(self) -> None:
        self._objects: dict[bytes, Any] = {}
        self._numbers = count()

    def encode(self, value: object) -> bytes:
        data = str(next(self._numbers)).encode()
        self._objects[data] = value
        return data

    def decode(self, data: bytes, kind: Any) -> Any:
        del kind
        return self._objects[data]


class _KillableJournal(MemoryJournal):
    """A journal that takes nothing from a run which has been killed."""

    def __init__(self, run: TrialRun) -> None:
        super().__init__(_ObjectCodec())
        self._run = run

    def _append(self, key: int, event: Event) -> None:
        self._check()
        super()._append(key, event)

    async def _flush(self) -> None:
        self._check()
        await super()._flush()
        self._check()

    async def _end(self, key: int, ending: Any) -> None:
        self._check()
        await super()._end(key, ending)

    def _check(self) -> None:
        if self._run.killed is not None:
            raise self._run.killed


async def run_killed(run: TrialRun) -> tuple[Outcome[Any] | None, BaseException | None]:
    """Runs a trial whose process is killed, and recovers it as often as that takes.

    Returns:
        The outcome, and what it ended with.

    Raises:
        BaseException: What the run ended with, if it ended before its process could be killed.
    """
    journal = _KillableJournal(run)
    ended: tuple[Outcome[Any] | None, BaseException | None] = (None, None)
    try:
        outcome = await journal._start(run.saga, run.trial.args, {**run.trial.kwargs}, RUN_ID)
        ended = (outcome, outcome.error)
    except* Killed:
        pass
    while run.killed is not None:
        run.killed = None
        journal = journal.in_next_process()
        try:
            report = await journal.recover([run.saga])
            (found,) = (*report.recovered, *report.failed, *report.left)
            ended = (found.outcome, found.error)
        except* Killed:
            pass
    return ended
