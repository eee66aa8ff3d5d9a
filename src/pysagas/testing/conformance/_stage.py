"""Where a check sees its sagas run: what they wrote, what came of them, and what they wait for."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio

from pysagas import Outcome, Saga, outcome_of

from ._harness import Ability, Harness, OnCrash
from ._sagas import Order

__all__ = ["Ending", "Run", "Stage", "expect"]

# Seconds between two looks at what another process writes.
_LOOK = 0.005


def expect(found: object, wanted: object, what: str) -> None:
    """Compares, and says what differs: an ``assert`` here would be silent outside of pytest.

    Raises:
        AssertionError: They are not equal.
    """
    if found != wanted:
        raise AssertionError(f"{what}: {found!r}, and should be {wanted!r}")


@dataclass(frozen=True, slots=True)
class Ending:
    """What came of a run: what it returned, or what it raised and the outcome that this carries."""

    outcome: Outcome[Any] | None
    error: Exception | None

    @property
    def state(self) -> str:
        """How it ended, in words for a comparison."""
        return "no outcome" if self.outcome is None else self.outcome.state.value

    @property
    def states(self) -> dict[str, str]:
        """How each step ended, by its name."""
        steps = () if self.outcome is None else self.outcome.steps
        return {step.name: step.state.value for step in steps}

    @property
    def value(self) -> object:
        """What the saga returned.

        Raises:
            AssertionError: It did not complete.
        """
        expect(repr(self.error), "None", "the error")
        return None if self.outcome is None else self.outcome.value


class Run:
    """One run of one saga."""

    def __init__(
        self, harness: Harness, folder: Path, saga: Saga[..., Any], faults: Mapping[str, str]
    ) -> None:
        self.harness = harness
        self.saga = saga
        self.run_id = f"{saga.name}-{uuid4().hex[:12]}"
        self.order = Order(str(folder / self.run_id), dict(faults))
        self.ending = Ending(None, None)

    # --- what it is asked ----------------------------------------------------------------------

    async def run(self, *, exceptions: Any = (), on_crash: OnCrash = "resume") -> Ending:
        """Runs it, or what the harness does with a run that is there already."""
        return await self.run_as(self.saga, self.order, exceptions=exceptions, on_crash=on_crash)

    async def run_as(
        self,
        saga: Saga[..., Any],
        order: Order,
        *,
        exceptions: Any = (),
        on_crash: OnCrash = "resume",
    ) -> Ending:
        """The same with another saga, or other arguments, under the same id."""
        ask = self.harness.run
        try:
            outcome = await ask(
                saga, order, run_id=self.run_id, exceptions=exceptions, on_crash=on_crash
            )
        except Exception as error:
            return Ending(outcome_of(error) or getattr(error, "outcome", None), error)
        return Ending(outcome, None)

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Runs it in the background of a block; `ending` is what came of it."""

        async def go() -> None:
            self.ending = await self.run()

        failure: Exception | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(go)
            try:
                yield
            except Exception as error:
                failure = error
                tasks.cancel_scope.cancel()
                self.let_all_go()  # what is being taken back cannot be cancelled
        if failure is not None:
            raise failure

    async def cancel(self) -> None:
        """Cancels it."""
        await self.harness.cancel(self.run_id)

    async def start(self, on_crash: OnCrash) -> None:
        """Starts it where it can be killed."""
        await self.harness.start(self.saga, self.order, run_id=self.run_id, on_crash=on_crash)

    async def kill_at(self, *lines: str, on_crash: OnCrash, times: int = 1) -> None:
        """Starts it, and kills its process once it has written the lines, each so many times."""
        await self.start(on_crash)
        for line in lines:
            await self.wait_for(line, times)
        await self.harness.kill()

    def lacks(self, ability: Ability) -> bool:
        """Whether the place is said to be unable to do this."""
        return ability in self.harness.lacks

    # --- what its steps wait for ---------------------------------------------------------------

    def let_go(self, *places: str) -> None:
        """Lets steps go on that wait."""
        for place in places:
            self.order.gate(place).touch()

    def let_all_go(self) -> None:
        """Lets all steps go on."""
        self.let_go(*self.order.faults)

    # --- what its steps wrote ------------------------------------------------------------------

    def _lines(self) -> list[list[str]]:
        path = Path(self.order.log)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        # What stands after the last end of a line is being written.
        return [line.split() for line in text.split("\n")[:-1]]

    @property
    def events(self) -> list[str]:
        """What the steps did: ``"begin book hotel"``, ``"done book hotel"``, ``"cut book hotel"``."""
        return [" ".join(words[:3]) for words in self._lines()]

    @property
    def done(self) -> list[str]:
        """What came to its end, in its order."""
        return [" ".join(words[1:3]) for words in self._lines() if words[0] == "done"]

    @property
    def begun(self) -> Counter[str]:
        """How often each action and each compensation was begun."""
        return Counter(" ".join(words[1:3]) for words in self._lines() if words[0] == "begin")

    @property
    def standing(self) -> list[str]:
        """What was made, and not taken back."""
        standing: dict[str, None] = {}
        for place in self.done:
            kind, _, name = place.partition(" ")
            if kind == "book":
                standing[name] = None
            else:
                standing.pop(name, None)
        return list(standing)

    @property
    def keys(self) -> dict[str, set[str]]:
        """The idempotency keys under which each action and compensation was tried."""
        keys: dict[str, set[str]] = {}
        for words in self._lines():
            keys.setdefault(" ".join(words[1:3]), set()).add(words[-1])
        return keys

    async def wait_for(self, line: str, times: int = 1) -> None:
        """Waits until the steps have written something."""
        while self.events.count(line) < times:  # noqa: ASYNC110 - another process writes
            await anyio.sleep(_LOOK)


@dataclass(frozen=True, slots=True)
class Stage:
    """Makes the runs of one check."""

    harness: Harness
    folder: Path
    runs: list[Run]

    def __call__(self, saga: Saga[..., Any], **faults: str) -> Run:
        """Makes a run. A fault's place is written with underscores: ``book_hotel="fails"``."""
        places = {place.replace("_", " "): fault for place, fault in faults.items()}
        run = Run(self.harness, self.folder, saga, places)
        self.runs.append(run)
        return run
