"""What the tests of ``pysagas.testing`` share: worlds that write down what was called, and how far it came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from anyio.lowlevel import checkpoint

from pysagas import Saga, Step
from pysagas.testing import Report, Trial, explore


class World:
    """Effects that stand, by name, and a log of what was called.

    The log has ``a>`` where an action begins, ``a`` where it takes effect and ``a<`` where it ends,
    and the same with a minus for what takes it back. So it says how far a call came.
    """

    def __init__(self) -> None:
        self.standing: set[str] = set()
        self.log: list[str] = []
        # What each action returned, and each undo got.
        self.given: list[object] = []

    def __str__(self) -> str:
        return " ".join(self.log)

    def state(self) -> set[str]:
        """The live object itself: who compares it has to copy it."""
        return self.standing

    def make(self, name: str) -> None:
        self.log.append(name)
        self.standing.add(name)

    def remove(self, name: str) -> None:
        self.log.append(f"-{name}")
        self.standing.discard(name)

    def action(self, name: str) -> Callable[..., Any]:
        """An async action with a checkpoint before its effect, and one after it."""

        async def action(*args: object, **kwargs: object) -> str:
            self.log.append(f"{name}>")
            await checkpoint()
            self.make(name)
            await checkpoint()
            self.log.append(f"{name}<")
            return f"result of {name}"

        action.__name__ = name
        return action

    def back(self, name: str) -> Callable[..., Any]:
        """What takes it back: a compensation or an undo, with one checkpoint, before its effect."""

        async def back(*args: object, **kwargs: object) -> None:
            self.log.append(f"-{name}>")
            self.given += args
            await checkpoint()
            self.remove(name)
            self.log.append(f"-{name}<")

        return back

    def sync_action(self, name: str) -> Callable[..., Any]:
        def action(*args: object) -> str:
            self.log.append(f"{name}>")
            self.make(name)
            self.log.append(f"{name}<")
            return f"result of {name}"

        action.__name__ = name
        return action

    def sync_back(self, name: str) -> Callable[..., Any]:
        def back(*args: object) -> None:
            self.log.append(f"-{name}>")
            self.given += args
            self.remove(name)
            self.log.append(f"-{name}<")

        return back

    def step(self, name: str, **options: Any) -> Step[..., Any]:
        return Step(self.action(name), self.back(name), name=name, **options)


class Lab:
    """Makes trials of one saga, each in a world of its own, and keeps the worlds.

    Args:
        build: Makes the saga, of a world.
        **options: Of the `Trial`.
    """

    def __init__(self, build: Callable[[World], Saga[..., Any]], **options: Any) -> None:
        self.build = build
        self.options = options
        self.worlds: list[World] = []

    def __call__(self) -> Trial:
        world = World()
        self.worlds.append(world)
        return Trial(self.build(world), **{"state": world.state, **self.options})

    def logs(self, report: Report) -> dict[str, str]:
        """What was called in the run of each plan of the last exploration, by the plan's text."""
        plans = [str(result.plan) for result in report.results]
        return dict(zip(plans, map(str, self.worlds[-len(plans) :]), strict=True))


async def logs(build: Callable[[World], Saga[..., Any]], **options: Any) -> dict[str, str]:
    """Explores a saga that is right; see `Lab.logs`."""
    lab = Lab(build, **options)
    report = await explore(lab)
    assert report.ok, report
    return lab.logs(report)


def found(report: Report) -> set[str]:
    """The plans that did harm, as a person reads them."""
    return {str(result.plan) for result in report.failures}


def without_native(texts: Any) -> Any:
    """Leaves out what only asyncio has."""
    if isinstance(texts, dict):
        return {plan: log for plan, log in texts.items() if "natively" not in plan}
    return {plan for plan in texts if "natively" not in plan}


def native(texts: dict[str, str]) -> dict[str, str]:
    """Gives what only asyncio has, under the names of what every loop has."""
    return {
        plan.replace("cancelled natively", "cancelled"): log
        for plan, log in texts.items()
        if "natively" in plan
    }


async def three_times(attempt: Callable[[], Any]) -> Any:
    """A plain retry: the third failure is the last."""
    for _ in range(2):
        try:
            return await attempt()
        except Exception:
            continue
    return await attempt()
