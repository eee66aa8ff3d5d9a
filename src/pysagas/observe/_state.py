"""What an observer can tell of an effect that has ended."""

from __future__ import annotations

from pysagas import CallNext, Effect, SagaState, StepState, outcome_of

__all__ = ["one_line", "printable", "state_of"]


def state_of(
    effect: Effect, call_next: CallNext, error: BaseException | None
) -> StepState | SagaState | None:
    """Says how a step, or a whole run, stands after its effect; None for what has no state."""
    if call_next.step is not None:
        return call_next.step.state
    if effect.kind == "saga":
        if error is None:
            return SagaState.COMPLETED
        # It may be that of another run, which this one has called; and a saga inside another is not
        # taken back yet.
        outcome = outcome_of(error)
        if outcome is not None and outcome.run_id == effect.run_id:
            return outcome.state
    return None


def one_line(text: str) -> str:
    """Keeps a name or a message, which may hold anything, from ending its line or moving the cursor."""
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """Shows characters that would move the cursor as their escapes."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
