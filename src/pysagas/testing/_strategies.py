"""Plans drawn by Hypothesis: several faults in one run, shrunk to the fewest that do the harm."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from ._explore import Exploration, Only, check_no_loop, options_of
from ._faults import MakeTrial, Plan
from ._limit import LIMIT

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

__all__ = ["fault_plans"]


def fault_plans(
    trial: MakeTrial,
    *,
    most: int = 3,
    kills: bool = False,
    only: Only | None = None,
    backend: str = "asyncio",
    backend_options: Mapping[str, Any] | None = None,
    timeout: float = LIMIT,
) -> SearchStrategy[Plan]:
    """Draws plans of some faults that can happen in one run, for ``hypothesis.given``.

    To be tried with `explore`: ``report = anyio.run(explore, trial, [plan])``. A plan that fails is
    shrunk to the fewest faults, at the earliest places. The saga is run while plans are drawn: to
    learn its places, and what can still happen after a fault; each such run is made once.

    Args:
        trial: As for `explore`.
        most: Faults in one plan, at least 1.
        kills: As for `explore`.
        only: As for `explore`.
        backend: As for `pysagas.testing.faults`.
        backend_options: As for ``anyio.run``.
        timeout: As for `explore`.

    Raises:
        ImportError: Hypothesis is not installed.
        ValueError: `most` is no number of faults.
        CannotExplore: As for `explore`, when a plan is drawn.
    """
    try:
        from hypothesis import strategies as st  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ImportError(
            'fault_plans needs Hypothesis, which is not installed: pip install "pysagas[testing]"'
        ) from error
    if most < 1:
        raise ValueError(f"fault_plans: most must be at least 1, not {most!r}")
    run = partial(anyio.run, backend=backend, backend_options=options_of(backend_options))
    exploration = Exploration(trial, kills=kills, only=only, timeout=timeout)
    # By what is planned so far: what could be added.
    known: dict[Plan | None, list[Plan]] = {}

    async def first() -> list[Plan]:
        with exploration.limit:
            await exploration.learn()
        return exploration.plans()

    async def next_after(plan: Plan) -> list[Plan]:
        with exploration.limit:
            return exploration.following(await exploration.run(plan))

    def choices(plan: Plan | None) -> list[Plan]:
        if plan not in known:
            check_no_loop("fault_plans")
            known[plan] = run(first) if plan is None else run(next_after, plan)
        return known[plan]

    @st.composite
    def plans(draw: DrawFn) -> Plan:
        plan = draw(st.sampled_from(choices(None)))
        for _ in range(draw(st.integers(0, most - 1)) if plan.faults else 0):
            later = choices(plan)
            if later:
                plan = draw(st.sampled_from(later))
        return plan

    return plans()
