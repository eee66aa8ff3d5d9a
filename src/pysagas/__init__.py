"""Sagas for asyncio and Trio: whatever goes wrong, everything that happened is taken back."""

from ._attempts import Retry
from ._definitions import Bound, Commit, Parallel, Step
from ._effects import (
    CallNext,
    Effect,
    EffectKind,
    Middleware,
    StepInHand,
    current_effect,
    note_time,
    observer,
)
from ._errors import (
    AlreadyCommitted,
    CompensationFailed,
    MiddlewareError,
    SagaDefinitionError,
    SagaError,
    ScopeBusy,
    ScopeClosed,
)
from ._outcome import (
    Outcome,
    Ran,
    SagaState,
    StepReport,
    StepState,
    TreeNode,
    attach_outcome,
    outcome_of,
)
from ._saga import Saga, SagaBuilder, SagaMethod, saga
from ._scope import SagaScope, open_saga

__all__ = [
    "AlreadyCommitted",
    "Bound",
    "CallNext",
    "Commit",
    "CompensationFailed",
    "Effect",
    "EffectKind",
    "Middleware",
    "MiddlewareError",
    "Outcome",
    "Parallel",
    "Ran",
    "Retry",
    "Saga",
    "SagaBuilder",
    "SagaDefinitionError",
    "SagaError",
    "SagaMethod",
    "SagaScope",
    "SagaState",
    "ScopeBusy",
    "ScopeClosed",
    "Step",
    "StepInHand",
    "StepReport",
    "StepState",
    "TreeNode",
    "attach_outcome",
    "current_effect",
    "note_time",
    "observer",
    "open_saga",
    "outcome_of",
    "saga",
]
