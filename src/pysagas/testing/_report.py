"""What an exploration found, for a person to read."""

from __future__ import annotations

import re
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
# As ``repr`` shows one, and as asyncio names a cancelled scope.
_ADDRESS = re.compile(r"(?<=0x)[0-9a-f]+|(?<=scope )[0-9a-f]+")


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
        tried: Whether the fault happened, or something was left all the same.
        suspected: Whether the problem names the steps that may have left something.
    """

    plan: Plan
    problem: str | None = None
    left: tuple[str, ...] = ()
    outcome: Outcome[Any] | None = field(default=None, repr=False)
    error: BaseException | None = field(default=None, repr=False)
    reported: bool = False
    reached: bool = True
    tried: bool = True
    suspected: bool = False

    @property
    def ok(self) -> bool:
        """Whether everything was as it should be."""
        return self.problem is None

    @property
    def harm(self) -> tuple[str, ...]:
        """What is wrong, and what is left, in lines."""
        return (f"    {self.problem}", *(f"      {line}" for line in self.left))

    def __str__(self) -> str:
        if self.problem is None:
            return f"{self.plan}: {'reported' if self.reported else 'restored'}"
        return "\n".join((str(self.plan), *self.harm))


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
        untried = sum(not result.tried for result in failures)
        verdicts = {"NOT RESTORED after": len(failures) - untried, "NOT TRIED in": untried}
        said = ", ".join(f"{verdict} {number}" for verdict, number in verdicts.items() if number)
        yield f"{saga}: {said} of {_counted(len(results), 'run')}"
    else:
        yield f"{saga}: everything restored after {_counted(len(results), 'run')}"
    reported = sum(result.reported for result in results)
    if reported:
        yield f"(in {reported} of them a compensation was made to fail: that was reported)"
    passed_by = sum(not result.reached for result in results)
    if passed_by:
        yield f"({passed_by} did not come to their second fault)"
    # Faults that do the same harm stand together, wherever the objects in it have their addresses.
    harms: dict[str, list[Result]] = {}
    for result in smallest:
        harms.setdefault(_ADDRESS.sub("", "\n".join(result.harm)), []).append(result)
    for results_alike in list(harms.values())[:_SHOWN]:
        yield ""
        for result in results_alike[:_SHOWN]:
            yield str(result.plan)
        if len(results_alike) > _SHOWN:
            yield f"... and {len(results_alike) - _SHOWN} more"
        yield from results_alike[0].harm
    if len(harms) > _SHOWN:
        yield ""
        yield f"... and {len(harms) - _SHOWN} other ways: see report.failures"
    known = set(map(id, smallest))
    repeats = [result for result in failures if id(result) not in known]
    # What is known of a single fault is known of none at all.
    anyway = [result for result in repeats if len(result.plan.faults) == 1]
    if anyway:
        leave = "leaves" if len(anyway) == 1 else "leave"
        yield ""
        yield f"{_counted(len(anyway), 'more run')} {leave} just what is left without any fault."
    if len(repeats) > len(anyway):
        more = len(repeats) - len(anyway)
        them = "has one of these in it" if more == 1 else "have one of these in them"
        yield ""
        yield f"{_counted(more, 'more plan')} {them}, and another fault besides."
    yield ""
    yield from _table(results, smallest, anyway)
    for note in notes:
        yield ""
        yield note


def _table(
    results: Iterable[Result], smallest: Iterable[Result], anyway: Iterable[Result]
) -> Iterator[str]:
    tried = Counter(_places(results))
    failed = {
        "NOT RESTORED": Counter(_places(result for result in smallest if result.tried)),
        "NOT TRIED": Counter(_places(result for result in smallest if not result.tried)),
        "cannot be told": Counter(_places(anyway)),
    }
    width = max((len(str(place)) for place in tried), default=0)
    for place, number in tried.items():
        said = [f"{places[place]} {verdict}" for verdict, places in failed.items() if places[place]]
        verdict = ", ".join(said) or "ok"
        yield f"  {place!s:<{width}}  {_where(place):<7} {number:>6} tried  {verdict}"


def _places(results: Iterable[Result]) -> Iterator[Place]:
    return (fault.place for result in results for fault in result.plan.faults)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


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
