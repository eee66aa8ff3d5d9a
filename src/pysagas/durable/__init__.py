"""Durable sagas: a killed process is rolled back, or resumed."""

from ._codec import Codec, JSONCodec
from ._errors import (
    Interrupted,
    JournalError,
    NotRecordable,
    OtherRun,
    RecordedError,
    RunInProgress,
    RunInterrupted,
    SagaChanged,
)
from ._events import Event, EventKind, RunInfo, RunState
from ._journal import Journal, Recovered, RecoveryReport
from ._memory import MemoryJournal
from ._sqlite import SQLiteJournal

__all__ = [
    "Codec",
    "Event",
    "EventKind",
    "Interrupted",
    "JSONCodec",
    "Journal",
    "JournalError",
    "MemoryJournal",
    "NotRecordable",
    "OtherRun",
    "RecordedError",
    "Recovered",
    "RecoveryReport",
    "RunInProgress",
    "RunInfo",
    "RunInterrupted",
    "RunState",
    "SQLiteJournal",
    "SagaChanged",
]
