"""Does an engine, or a journal of your own, keep what the guarantees promise?

The same sagas, faults and checks for every place where sagas run: a `Harness` says how one is
asked to run, cancel and kill.
"""

from ._check import CHECKS, Check, CheckResult, ConformanceReport, check
from ._harness import Ability, Harness, OnCrash
from ._sagas import SAGAS, Order

__all__ = [
    "CHECKS",
    "SAGAS",
    "Ability",
    "Check",
    "CheckResult",
    "ConformanceReport",
    "Harness",
    "OnCrash",
    "Order",
    "check",
]
