"""What can go wrong with a journal, sorted by who must act."""

from __future__ import annotations

from typing import Any

from pysagas import Outcome, SagaError

__all__ = [
    "Interrupted",
    "JournalError",
    "NotRecordable",
    "OtherRun",
    "RecordedError",
    "RunInProgress",
    "RunInterrupted",
    "SagaChanged",
]


class JournalError(SagaError):
    """The journal cannot be read or written: the disk is full, the file locked, foreign, or newer.

    Raised by a step, it takes the run back in this process; what was recorded until then is still
    in the journal, and `Journal.recover` goes on from there in the next one.
    """


class RunInProgress(JournalError):
    """A run of this id is under way: in this process, or in another one that lives."""


class OtherRun(JournalError):
    """A run of this id is recorded, but of another saga, or with other arguments. Nothing has run."""


class SagaChanged(JournalError):
    """The saga is not the one that was recorded, so its run cannot be gone on with.

    Nothing has run, and the recorded run is as it was: recover it with the saga as it was.
    """


class NotRecordable(JournalError):
    """A value cannot be written to the journal so that it comes back as it was."""


class RunInterrupted(JournalError):
    """This run was cut off: its process died, or it was cancelled. It has been taken back.

    Raised by a later call of its id. One that had passed its commit has failed: only what came after
    that has been taken back, and `retry` goes on from there.

    Attributes:
        outcome: The report of the run.
    """

    outcome: Outcome[Any] | None = None


class RecordedError(SagaError):
    """Stands for an exception that is recorded, and cannot be made again.

    Attributes:
        kind: The module and name of its class.
    """

    kind: str = ""


class Interrupted(BaseException):
    """Raised in a run that is recovered, where its process had died, to take it back.

    A BaseException, so that ``except Exception`` in a saga does not take it for a failure. It is
    raised again by every later call on that run.
    """
