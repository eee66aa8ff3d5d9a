"""What an exploration found, for a person to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Self

from pysagas import Outcome

from ._faults import Place, Plan

__all__ = ["Report", "Result", "differences"]

# How many kinds of harm are shown, and how many plans that do it.
_SHOWN = 10


def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """Says where two states differ, a line for each difference."""
    if before == after:
        return
    kinds: list[Any] = [type(before), type(after)]
    if all(issubclass(kind, Mapping) for kind in kinds):
        for key in dict.fromkeys([*before, *after]):
            place = f"{where}[{key!r}]" if where else _bare(key)
            if key not in after:
                yield f"{place}: was {before[key]!r}, is gone"
            elif key not in before:
                yield f"{place}: was not there, is {after[key]!r}"
            else:
                yield from differences(before[key], after[key], place)
        return
    if kinds[0] is kinds[1] and is_dataclass(kinds[0]):
        found: list[str] = []
        for known in fields(before):
            name = f"{where}.{known.name}" if where else known.name
            found += differences(getattr(before, known.name), getattr(after, known.name), name)
        if found:
            yield from found
            return
    elif all(issubclass(kind, AbstractSet) for kind in kinds):
        for what, values in (("is gone", before - after), ("is left", after - before)):
            for value in sorted(values, key=repr):
                yield f"{where}: {value!r} {what}" if where else f"{value!r} {what}"
        return
    yield f"{where}: was {before!r}, is {after!r}" if where else f"was {before!r}, is {after!r}"


def _bare(key: object) -> str:
    return key if isinstance(key, str) and key.isidentifier() else f"[{key!r}]"


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one plan.

    Attributes:
        plan: What was to go wrong.
        problem: What is wrong with what came of it; None where everything was restored.
        left: Where the state differs from what it should be, a line for each difference.
        outcome: The saga's own report; None where there is none.
        error: What the run ended with.
        reported: Whether a compensation failed, as planned: then not everything was restored, and
            the run has reported just that.
        reached: Whether each fault was met. In a group the loop decides what comes second, so a
            second fault may be passed by.
    """

    plan: Plan
    problem: str | None = None
    left: tuple[str, ...] = ()
    outcome: Outcome[Any] | None = field(default=None, repr=False)
    error: BaseException | None = field(default=None, repr=False)
    reported: bool = False
    reached: bool = True

    @property
    def ok(self) -> bool:
        """Whether everything was as it should be."""
        return self.problem is None

    def __str__(self) -> str:
        if self.problem is None:
            return f"{self.plan}: {'reported' if self.reported else 'restored'}"
        return "\n".join(
            (str(self.plan), f"    {self.problem}", *(f"      {line}" for line in self.left))
        )


class Report(str):
    """What came of each plan that was tried, as a text for people.

    First what was not restored, the shortest first; then each place with the number of faults that
    were tried there. It is a string so that a failed ``assert report.ok, report`` shows it whole:
    pytest cuts short the message of an assertion that is anything else.

    Attributes:
        saga: The name of the saga.
        results: In the order in which the plans were tried.
        notes: What could not be checked, and why.
    """

    __slots__ = ("notes", "results", "saga")

    saga: str
    results: tuple[Result, ...]
    notes: tuple[str, ...]

    def __new__(cls, saga: str, results: tuple[Result, ...], notes: tuple[str, ...] = ()) -> Self:
        """Makes the report of an exploration; for the library's own use."""
        report = super().__new__(cls, "\n".join(_lines(saga, results, notes)))
        report.saga = saga
        report.results = results
        report.notes = notes
        return report

    @property
    def ok(self) -> bool:
        """Whether something was tried, and each time everything was restored."""
        return bool(self.results) and not self.failures

    @property
    def failures(self) -> tuple[Result, ...]:
        """What was not restored, the shortest first: fewer faults, then less that was left."""
        return tuple(_failures(self.results))

    def __bool__(self) -> bool:
        """Refuses: a report is not its own verdict.

        Raises:
            TypeError: Always; a test that forgot ``.ok`` could not fail.
        """
        raise TypeError("a Report is neither true nor false: write `assert report.ok, report`")

    def __repr__(self) -> str:
        return f"<Report of {self.saga}: {len(self.failures)} of {len(self.results)} runs not restored>"


def _failures(results: Iterable[Result]) -> list[Result]:
    failed = (result for result in results if not result.ok)
    return sorted(failed, key=lambda result: (len(result.plan.faults), len(result.left)))


def _lines(saga: str, results: Sequence[Result], notes: Iterable[str]) -> Iterator[str]:
    failures = _failures(results)
    smallest = _smallest(failures)
    if not results:
        yield f"{saga}: nothing was tried"
    elif failures:
        yield f"{saga}: NOT RESTORED after {len(failures)} of {len(results)} runs"
    else:
        yield f"{saga}: everything restored after {len(results)} runs"
    reported = sum(result.reported for result in results)
    if reported:
        yield f"(in {reported} of them a compensation was made to fail: that was reported)"
    passed_by = sum(not result.reached for result in results)
    if passed_by:
        yield f"({passed_by} did not come to their second fault)"
    # Faults that do the same harm stand together.
    harms: dict[tuple[object, ...], list[Plan]] = {}
    for result in smallest:
        harms.setdefault((result.problem, *result.left), []).append(result.plan)
    for (problem, *left), plans in list(harms.items())[:_SHOWN]:
        yield ""
        yield from map(str, plans[:_SHOWN])
        if len(plans) > _SHOWN:
            yield f"... and {len(plans) - _SHOWN} more"
        yield f"    {problem}"
        for line in left:
            yield f"      {line}"
    if len(harms) > _SHOWN:
        yield ""
        yield f"... and {len(harms) - _SHOWN} other ways: see report.failures"
    repeats = len(failures) - len(smallest)
    if repeats:
        yield ""
        yield f"{repeats} more plans have one of these in them, and another fault besides."
    yield ""
    yield from _table(results, smallest)
    for note in notes:
        yield ""
        yield note


def _table(results: Iterable[Result], smallest: Iterable[Result]) -> Iterator[str]:
    tried = Counter(fault.place for result in results for fault in result.plan.faults)
    failed = Counter(fault.place for result in smallest for fault in result.plan.faults)
    width = max((len(str(place)) for place in tried), default=0)
    for place, number in tried.items():
        verdict = f"{failed[place]} NOT RESTORED" if failed[place] else "ok"
        yield f"  {place!s:<{width}}  {_where(place):<7} {number:>6} tried  {verdict}"


def _where(place: Place) -> str:
    return ".".join(map(str, place.path))


def _smallest(failures: Sequence[Result]) -> list[Result]:
    """Leaves out what goes wrong with fewer faults already."""
    found: list[Result] = []
    for result in failures:
        faults = set(result.plan.faults)
        if not any(
            # What goes wrong without any fault does so beside each one that the saga survives.
            faults > set(known.plan.faults) and (known.plan.faults or known.left == result.left)
            for known in found
        ):
            found.append(result)
    return found
