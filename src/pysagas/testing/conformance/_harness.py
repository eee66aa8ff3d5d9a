"""What the checks ask of the place where sagas run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from pysagas import Outcome, Saga

from ._sagas import Order

__all__ = ["Ability", "Harness", "OnCrash"]

OnCrash = Literal["rollback", "resume"]
"""What becomes of a run whose process was killed."""

Ability = Literal["cut", "journal", "refuse_changed", "rollback_on_crash", "rollback_timeout", "trio"]
"""What a place may lack.

- ``"cut"``: it can cut off an action that is under way, when a sibling fails or the run is cancelled.
- ``"journal"``: it remembers what ran when a process is killed, and knows run ids.
- ``"refuse_changed"``: it raises `SagaChanged` for a run that it cannot go on with; without, the run
  waits until the saga is as it was.
- ``"rollback_on_crash"``: it can take back a run whose process was killed, not only go on with it.
- ``"rollback_timeout"``: it accepts sagas with a `rollback_timeout`.
- ``"trio"``: steps run on the loop of the caller, asyncio or Trio; without, on asyncio.
"""


class Harness(ABC):
    """A place where sagas run: in memory, under a journal, on an engine.

    Attributes:
        name: For the report.
        lacks: What it cannot do, each with the reason, one short sentence for people. The checks do
            not pass over it: they check that it is so.
    """

    name: str
    lacks: Mapping[Ability, str] = {}

    @abstractmethod
    async def run(
        self,
        saga: Saga[..., Any],
        order: Order,
        *,
        run_id: str,
        exceptions: Any = (),
        on_crash: OnCrash = "rollback",
    ) -> Outcome[Any]:
        """Runs a saga, or waits for a run of this id, or goes on with it if it was killed.

        Args:
            saga: One of the sagas of this package.
            order: What it is called with.
            run_id: The name of the run.
            exceptions: As for `Saga.run`.
            on_crash: What becomes of it if it was killed.

        Returns:
            The outcome.

        Raises:
            BaseException: As for `Saga.run`. Of a run that was cancelled, any `Exception` of which
                `outcome_of` gives the outcome, or which has it as its ``outcome``.
        """

    @abstractmethod
    async def cancel(self, run_id: str) -> None:
        """Cancels a run that `run` waits for, in another task."""

    @abstractmethod
    async def start(
        self, saga: Saga[..., Any], order: Order, *, run_id: str, on_crash: OnCrash = "rollback"
    ) -> None:
        """Starts a run, or goes on with one that was killed, in a process that `kill` can kill.

        Does not wait for it. The arguments are those of `run`.
        """

    @abstractmethod
    async def kill(self) -> None:
        """Kills the process in which runs were started, with SIGKILL; returns when it is dead."""
