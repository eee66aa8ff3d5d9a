"""What a journal needs of the place where it keeps its runs: runs and events, and nothing of sagas."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable
from typing import Any, NamedTuple

from ._errors import JournalError
from ._events import Event, EventKind, Path, RunInfo, RunState

__all__ = ["Claim", "Ending", "RunGone", "Storage", "Stored"]


class RunGone(JournalError):
    """A run was in the journal, and is not any more: it had ended, and somebody has pruned it."""

    def __init__(self, run: str) -> None:
        """Says so; `run` names it."""
        super().__init__(f"{run} is not in the journal any more: it had ended, and was pruned")


class Ending(NamedTuple):
    """How a run ended, as it is recorded.

    Attributes:
        state: Which of the three ends.
        value: What the saga returned; empty where it did not.
        error: What it raised, as `encode_error` gives it; None where it did not.
    """

    state: RunState
    value: bytes
    error: dict[str, Any] | None


class Claim(NamedTuple):
    """A run that this process has taken into its hands, or found ended.

    Attributes:
        key: By which the storage knows it.
        ending: How it ended; None for one that has not.
        is_new: Whether it has just been started.
    """

    key: int
    ending: Ending | None = None
    is_new: bool = False


class Stored(NamedTuple):
    """A run as it is stored: what is needed to go on with it."""

    run_id: str
    saga: str
    version: str | None
    args: bytes
    state: RunState
    key: int


class Storage(ABC):
    """Keeps runs and their events. `Journal` is built on it; a subclass of that says how."""

    @abstractmethod
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
        """Takes a run into hand: a new one, or one whose process died; or finds it ended.

        Args:
            run_id: The name of the run.
            saga: The name of its saga.
            version: The version of that.
            args: What it is called with.
            now: The time.
            create: Whether it is made if it is not there. Who has seen it there makes no other: it
                has ended meanwhile, and was pruned.

        Raises:
            RunInProgress: A process that lives has it.
            OtherRun: It is of another saga, or has other arguments.
            RunGone: It is not there, and is not to be made.
        """

    @abstractmethod
    async def _release(self, key: int, last: Event | None = None) -> None:
        """Lets a run go that has not ended, so that somebody can recover it.

        No cancellation of a scope cuts that off.

        Args:
            key: The run.
            last: Put behind what is on disk of it, whatever else was lost; then it has not ended,
                even if its end was written and that was not noticed.
        """

    def _let_go(self) -> None:  # noqa: B027 - most storages have nothing to do
        """Called when the last run that this process had in hand has ended."""

    @abstractmethod
    async def _load(self, key: int) -> list[Event]:
        """Gives the events of a run, in their order."""

    @abstractmethod
    def _append(self, key: int, kind: EventKind, path: Path, name: str, data: bytes = b"", /) -> None:
        """Takes an event that happens now, to be written with the next batch.

        Args:
            key: The run.
            kind: What happens.
            path: Its place in the tree of the run.
            name: Of the step, or of what is taken back.
            data: What the kind says.

        Raises:
            JournalError: It cannot be taken.
        """

    @abstractmethod
    def _flush(self, key: int) -> Awaitable[None]:
        """Waits until all that was appended to a run is on disk.

        Raises:
            JournalError: Something of it could not be written.
        """

    @abstractmethod
    async def _end(self, key: int, ending: Ending) -> None:
        """Records how a run ended, after all that was appended.

        No cancellation of a scope cuts that off. Any other interruption is raised when it is recorded; where
        it could not be, with the JournalError as its cause.
        """

    @abstractmethod
    async def _reopen(self, key: int, was: RunState) -> None:
        """Takes into hand a run that had ended so.

        An interruption is raised when that is done; where it could not be, with the error as its cause.

        Raises:
            RunInProgress: Somebody else has done so.
            RunGone: It is not there any more.
            JournalError: It has ended otherwise meanwhile.
        """

    @abstractmethod
    async def _unfinished(self) -> list[Stored]:
        """Gives the runs that have not ended, the oldest first."""

    @abstractmethod
    async def _stored(self, run_id: str) -> Stored | None:
        """Gives one run; None where there is none of that id."""

    @abstractmethod
    async def _list(self, since: float = -math.inf, run_id: str | None = None) -> list[RunInfo]:
        """Lists the runs that had not ended before a time, the oldest first; all, or the one of an id."""

    @abstractmethod
    async def _events(self, run_id: str) -> list[Event]:
        """Gives the events of a run, by its id."""

    @abstractmethod
    async def _prune(self, before: float) -> int:
        """Forgets runs that ended before, and did not fail."""
