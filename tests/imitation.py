"""Restate, imitated within this process: what an attempt asks for is kept by its number, and given again.

It keeps what the real one keeps: the names of what was asked for, in their order, and what came of each, in
the order in which that was recorded. An attempt can be ended at each of these moments.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import restate

from pysagas import Saga
from pysagas.durable import JSONCodec
from pysagas.durable._storage import Ending
from pysagas.engines import _attempt
from pysagas.engines._attempt import Attempt


class Disconnected(Exception):
    """The server has gone: this attempt is over."""


class OtherHistory(Exception):
    """An attempt has asked for something else than the one before it."""


@dataclass
class Imitation:
    """The server, and what it has of one run."""

    saga: Saga[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    # What was asked for; what was recorded of it, by its number; and in which order. None is a cancellation.
    names: list[str] = field(default_factory=list)
    values: dict[int, Any] = field(default_factory=dict)
    order: list[int | None] = field(default_factory=list)
    # The attempt ends when so much was recorded.
    ends_at: set[int] = field(default_factory=set)
    # The run is cancelled when so much was recorded.
    cancelled_at: int | None = None

    async def attempt(self, *args: Any) -> Ending:
        context: Any = Context(self)
        retries = self.options.get("retries", {})
        attempt = Attempt(context, self.saga, "run", JSONCodec(), retries)
        try:
            return await attempt.carry_out(args, {})
        finally:
            self.records, self.asked = attempt.records, context.asked
            # What was to begin just then begins in vain.
            late = [action() for action in context.to_do.values()]
            for task in context.tasks:
                task.cancel()
            await asyncio.gather(*context.tasks, *late, return_exceptions=True)

    async def run(self, *args: Any) -> Ending:
        """Makes attempts until one is the last."""
        while True:
            try:
                return await self.attempt(*args)
            except Disconnected:
                pass

    def __post_init__(self) -> None:
        if self.cancelled_at == 0:
            self.order.append(None)

    def keep(self, number: int, value: Any) -> None:
        self.values[number] = value
        self.order.append(number)
        if len(self.order) == self.cancelled_at:
            self.order.append(None)
        if len(self.order) in self.ends_at:
            self.ends_at.discard(len(self.order))
            raise Disconnected


class Future:
    """Something that was asked for."""

    def __init__(self, context: Context, number: int) -> None:
        self.context = context
        self.number = number

    def is_completed(self) -> bool:
        return self.number in self.context.order[: self.context.seen]

    def __await__(self) -> Any:
        async def value() -> Any:
            await asyncio.sleep(0)
            return self.context.server.values[self.number]

        assert self.is_completed()
        return value().__await__()


class Context:
    """What an attempt has of the server."""

    def __init__(self, server: Imitation) -> None:
        self.server = server
        self.asked = 0
        # How much of what is recorded this attempt has seen, and how much there was at its beginning.
        self.seen = 0
        self.order = server.order
        self.to_do: dict[int, Callable[[], Awaitable[Any]]] = {}
        self.tasks: set[asyncio.Task[Any]] = set()
        self.problem: BaseException | None = None
        self.something = asyncio.Event()

    def ask(self, name: str, action: Callable[[], Awaitable[Any]]) -> Future:
        number = self.asked
        self.asked += 1
        if number == len(self.server.names):
            self.server.names.append(name)
        elif self.server.names[number] != name:
            raise OtherHistory(f"{name} comes in the place of {self.server.names[number]}")
        if number not in self.server.values:
            self.to_do[number] = action
        return Future(self, number)

    def run_typed(self, name: str, action: Callable[[], Awaitable[Any]], options: Any) -> Future:
        assert isinstance(options, restate.RunOptions)
        return self.ask(name, action)

    def sleep(self, length: Any, name: str) -> Future:
        return self.ask(f"{name}, {length.total_seconds()} s", lambda: asyncio.sleep(0))

    async def next(self) -> None:
        """Waits until something more is recorded, and sees it."""
        while self.seen == len(self.order):
            if self.problem is not None:
                raise self.problem
            self.something.clear()  # before they begin: an eager task may be over at once
            for number in sorted(self.to_do):
                self.tasks.add(asyncio.ensure_future(self.do(number, self.to_do.pop(number))))
            await self.something.wait()
        self.seen += 1
        if self.order[self.seen - 1] is None:
            raise restate.TerminalError("cancelled", 409)

    async def do(self, number: int, action: Callable[[], Awaitable[Any]]) -> None:
        try:
            self.server.keep(number, await action())
        except Disconnected as problem:
            self.problem = problem
        finally:
            self.something.set()


async def wait_completed(*futures: Future) -> tuple[list[Future], list[Future]]:
    while not any(future.is_completed() for future in futures):
        await futures[0].context.next()
    done = [future for future in futures if future.is_completed()]
    return done, [future for future in futures if not future.is_completed()]


async def gather(*futures: Future) -> list[Future]:
    while not all(future.is_completed() for future in futures):
        await futures[0].context.next()
    return list(futures)


def imitate(monkeypatch: Any) -> None:
    """Has attempts wait for what is imitated."""
    monkeypatch.setattr(_attempt.restate, "wait_completed", wait_completed)
    monkeypatch.setattr(_attempt.restate, "gather", gather)
