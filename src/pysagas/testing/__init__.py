"""Prove your rollback: every fault, at every place of a saga, in your own test suite."""

from ._explore import explore, faults
from ._faults import (
    CannotExplore,
    Fault,
    FaultKind,
    InjectedFailure,
    Place,
    Plan,
    Trial,
)
from ._ledger import EffectsLedger, LedgerError
from ._report import Report, Result
from ._strategies import fault_plans
from ._time import virtual_time

__all__ = [
    "CannotExplore",
    "EffectsLedger",
    "Fault",
    "FaultKind",
    "InjectedFailure",
    "LedgerError",
    "Place",
    "Plan",
    "Report",
    "Result",
    "Trial",
    "explore",
    "fault_plans",
    "faults",
    "virtual_time",
]
