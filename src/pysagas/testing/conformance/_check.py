"""The checks in a list, each with what it is about; and how a harness goes through them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import anyio

from . import _guarantees as g
from ._harness import Ability, Harness
from ._stage import Run, Stage

__all__ = ["CHECKS", "Check", "CheckResult", "ConformanceReport", "check"]

_Checks = Callable[[Stage], Awaitable[None]]

# Seconds that one check may take: with processes that start and are killed, on a busy machine.
_LIMIT = 40.0


@dataclass(frozen=True, slots=True)
class Check:
    """One promise, and how it is checked.

    Attributes:
        guarantee: The number of the guarantee that it belongs to; "" for what is none.
        says: What is promised, in a sentence.
        holds: Checks that it is kept.
        without: Checks what is so instead, where a place lacks an ability that this takes.
    """

    guarantee: str
    says: str
    holds: _Checks = field(repr=False)
    without: Mapping[Ability, _Checks] = field(default_factory=dict[Ability, _Checks], repr=False)

    async def __call__(self, harness: Harness) -> CheckResult:
        """Checks it.

        Returns:
            The result; a check that fails does not raise.
        """
        lack, checks = None, self.holds
        for ability, instead in self.without.items():
            if ability in harness.lacks:
                lack, checks = harness.lacks[ability], instead
                break
        with TemporaryDirectory(prefix="pysagas-") as folder:
            runs: list[Run] = []
            problem: str | None = None
            try:
                with anyio.fail_after(_LIMIT):
                    await checks(Stage(harness, Path(folder), runs))
            except Exception as error:
                problem = "\n".join(_told(error, runs))
        return CheckResult(self, lack, problem)


def _told(error: Exception, runs: Iterable[Run]) -> Iterator[str]:
    """Tells what went wrong, and what the steps of the runs did."""
    name = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    yield f"{name}{error}"
    for run in runs:
        yield f"  {run.run_id}, with {run.order.faults}: {', '.join(run.events)}"


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What came of one check.

    Attributes:
        check: The check.
        lack: Why the promise is not kept there; None where it is.
        problem: What is wrong: what was found and what should have been, and what the steps did.
            None where all is as it is said to be.
    """

    check: Check
    lack: str | None = None
    problem: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the promise is kept, or broken in the way that is said."""
        return self.problem is None

    @property
    def verdict(self) -> str:
        """The result in a word: ``"holds"``, ``"no"`` (as it is said to be), or ``"WRONG"``."""
        if self.problem is not None:
            return "WRONG"
        return "holds" if self.lack is None else "no"


class ConformanceReport(str):
    """What came of each check, as a table for people.

    A string, so that a failed ``assert report.ok, report`` shows it whole.

    Attributes:
        name: The name of the harness.
        results: In the order of the checks.
    """

    __slots__ = ("name", "results")

    name: str
    results: tuple[CheckResult, ...]

    def __new__(cls, name: str, results: Iterable[CheckResult]) -> Self:
        """Makes the report; for the library's own use."""
        known = tuple(results)
        report = super().__new__(cls, "\n".join(_lines(name, known)))
        report.name = name
        report.results = known
        return report

    @property
    def ok(self) -> bool:
        """Whether something was checked, and all of it was as it should be."""
        return bool(self.results) and all(result.ok for result in self.results)

    def __bool__(self) -> bool:
        """Refuses: a report is not its own verdict.

        Raises:
            TypeError: Always; a test that forgot ``.ok`` could not fail.
        """
        raise TypeError(
            "a ConformanceReport is neither true nor false: write `assert report.ok, report`"
        )

    def __repr__(self) -> str:
        wrong = sum(not result.ok for result in self.results)
        return f"<ConformanceReport of {self.name}: {wrong} of {len(self.results)} checks are wrong>"


def _lines(name: str, results: tuple[CheckResult, ...]) -> Iterator[str]:
    wrong = [result for result in results if not result.ok]
    yield f"{name}: {len(wrong)} of {len(results)} checks are wrong"
    yield ""
    reasons = list(dict.fromkeys(result.lack for result in results if result.lack and result.ok))
    for result in results:
        note = (
            f"{result.verdict} ({reasons.index(result.lack) + 1})"
            if result.lack and result.ok
            else result.verdict
        )
        yield f"  {result.check.guarantee:<4} {note:<7} {result.check.says}"
    if reasons:
        yield ""
    for number, reason in enumerate(reasons, 1):
        yield f"  ({number}) {reason}"
    for result in wrong:
        yield ""
        yield f"{result.check.guarantee} {result.check.says}".strip()
        yield f"  {result.problem}"


_FORGOTTEN: Mapping[Ability, _Checks] = {"journal": g.forgotten}
_NO_MEMORY: Mapping[Ability, _Checks] = {"journal": g.no_memory}
_GOES_ON: Mapping[Ability, _Checks] = {**_FORGOTTEN, "rollback_on_crash": g.goes_on_all_the_same}

CHECKS: tuple[Check, ...] = (
    Check("G1", "Steps run in order.", g.in_order),
    Check("G1", "Results reach the saga, those of a group in the order of its members.", g.results),
    Check("G1", "Members of a group run at the same time.", g.at_the_same_time),
    Check("G1", "With a limit no more than that run at once.", g.limit),
    Check("G2", "A function may catch a failure and go another way.", g.caught),
    Check("G2", "A call that cannot be taken back fails the saga.", g.caught_and_failed),
    Check("G3", "What has returned is taken back by its undo, with its result.", g.undo),
    Check("G3", "What is in doubt is compensated, or stays unknown.", g.in_doubt),
    Check("G3", "What says that it did nothing is not taken back.", g.not_applied),
    Check("G4", "Where members in flight are to finish, they do so before any goes back.", g.finish),
    Check(
        "G4",
        "Otherwise a failure cuts off the siblings.",
        g.siblings_are_cut,
        {"cut": g.siblings_finish},
    ),
    Check("G5", "A step's own exception reaches the caller, with a note.", g.own_exception),
    Check("G5", "A group's failures are an exception group, their types kept.", g.group_exception),
    Check("G6", "Shielded and blocking steps are waited for.", g.waited_for),
    Check("G7", "Everything is taken back in reverse, members at the same time.", g.in_reverse),
    Check("G8", "A run that is cancelled is taken back, and begins nothing more.", g.cancelled),
    Check("G8", "What is in flight then is cut off.", g.cut_off, {"cut": g.not_cut_off}),
    Check("G9", "Cancelling a rollback cuts nothing off.", g.cancelled_again),
    Check("G10", "A step that takes longer than its `timeout` fails.", g.step_timeout),
    Check("G10", "So does a compensation; the others run.", g.compensation_timeout),
    Check(
        "G10",
        "A saga's `rollback_timeout` bounds its rollback.",
        g.rollback_timeout,
        {"rollback_timeout": g.rollback_timeout_is_refused},
    ),
    Check("G11", "A compensation that fails stops no other; all are told.", g.failing_compensations),
    Check("G12", "An expected failure is swallowed if nothing is left.", g.expected),
    Check("G13", "Each step ends in exactly one of six states.", g.states),
    Check("G14", "What was done before a commit stays.", g.commit),
    Check("G15", "Members are entered in the order given.", g.entered_in_order),
    Check("", "Steps run on the caller's loop, asyncio or Trio.", g.own_loop, {"trio": g.other_loop}),
    Check("D1", "A run that has ended gives its outcome again.", g.recalled, _NO_MEMORY),
    Check("D1", "A run that has failed raises its error again.", g.recalled_failure, _NO_MEMORY),
    Check("D1", "A run that is started twice at once happens once.", g.started_twice, _NO_MEMORY),
    Check("D1", "Its id is for one saga and its arguments.", g.other_call, _NO_MEMORY),
    Check(
        "D2",
        "Killed between an effect and its record: it is tried again, under the same key.",
        partial(g.goes_on, kill="after its effect"),
        _FORGOTTEN,
    ),
    Check(
        "D3",
        "Killed in an action: what is recorded is not run again.",
        partial(g.goes_on, kill="in an action"),
        _FORGOTTEN,
    ),
    Check("D3", "Killed in a group: the same.", partial(g.goes_on, kill="in a group"), _FORGOTTEN),
    Check(
        "D3",
        "Killed in a compensation: the same, and the rest is taken back.",
        partial(g.goes_on, kill="in a compensation"),
        _FORGOTTEN,
    ),
    Check(
        "D3", "Killed twice: the same.", partial(g.goes_on, kill="in an action", times=2), _FORGOTTEN
    ),
    Check(
        "D3",
        "A run that was killed in an action can be taken back.",
        partial(g.goes_back, kill="in an action"),
        _GOES_ON,
    ),
    Check(
        "D3",
        "So can one that was killed between an effect and its record.",
        partial(g.goes_back, kill="after its effect"),
        _GOES_ON,
    ),
    Check(
        "D3",
        "So can one that was killed in a group.",
        partial(g.goes_back, kill="in a group"),
        _GOES_ON,
    ),
    Check("D3", "So can one that is killed again as it goes back.", g.goes_back_killed_again, _GOES_ON),
    Check(
        "D4",
        "A changed saga is refused, and nothing is lost.",
        g.changed,
        {**_FORGOTTEN, "refuse_changed": g.changed_waits},
    ),
    Check("D5", "Arguments and results come back as what they were.", g.rich_types, _FORGOTTEN),
    Check(
        "D5",
        "What cannot be recorded is taken back with the real object.",
        g.not_recordable,
        {"journal": g.any_object},
    ),
)
"""All checks, in the order of the guarantees."""


async def check(harness: Harness, checks: Iterable[Check] = CHECKS) -> ConformanceReport:
    """Runs the checks, one after the other, and reports.

    Works on the loop it is called on. It starts and kills processes, as the harness does it; files
    stand in a temporary directory, and are removed.

    Args:
        harness: The place that is checked.
        checks: Which ones, of `CHECKS`.

    Returns:
        The report, for ``assert report.ok, report``.
    """
    return ConformanceReport(harness.name, [await one(harness) for one in checks])
