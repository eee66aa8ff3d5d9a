"""Writes docs/reference/conformance.md: ``python tests/conformance_page.py``, which takes half a minute.

It asks every place anew; the tests hold the page against what they find.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import anyio
from places import Memory, SQLite, restate

from pysagas.testing.conformance import CHECKS, CheckResult, ConformanceReport, Harness, check

REFERENCE = Path(__file__).parent.parent / "docs" / "reference"
PAGE = REFERENCE / "conformance.md"
START = """\
# What holds where

Each row is a promise, and each column a place where sagas run.
`holds`: the same sagas, faults and kills, run there on the real thing, came to what is promised.
`no`: it is not so there, for the reason below the table; that it is so has been checked as well.

The page is written by `nox -s conformance`, and the tests hold it against what they find.
[pysagas.testing.conformance](testing.md#engines-and-journals-of-your-own) checks an engine or a journal of your own.
Kills are SIGKILLs: of the process that runs the saga, or of Restate's worker.

"""


def headings() -> dict[str, str]:
    """The fragment of each guarantee, by its number."""
    text = (REFERENCE / "guarantees.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (([GD]\d+)\. .+)$", text, re.MULTILINE)
    return {
        number: re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title, number in titles
    }


def reasons(results: Iterable[CheckResult]) -> list[str]:
    return list(dict.fromkeys(result.lack for result in results if result.lack))


def cells(report: ConformanceReport) -> list[str]:
    """The column of a report."""
    known = reasons(report.results)
    return [
        result.verdict if result.lack is None else f"{result.verdict} ({known.index(result.lack) + 1})"
        for result in report.results
    ]


def notes(report: ConformanceReport) -> Iterator[str]:
    """What stands below the table."""
    if found := reasons(report.results):
        yield f"\n## {report.name}\n"
        for number, reason in enumerate(found, 1):
            yield f"{number}. {reason[0].upper()}{reason[1:]}."


def page(reports: list[ConformanceReport]) -> str:
    anchors = headings()
    lines = [
        f"| | | {' | '.join(report.name for report in reports)} |",
        "|---|---|" + "---|" * len(reports),
    ]
    for one, *row in zip(CHECKS, *map(cells, reports), strict=True):
        number = one.guarantee and f"[{one.guarantee}](guarantees.md#{anchors[one.guarantee]})"
        lines.append(f"| {number} | {one.says} | {' | '.join(row)} |")
    for report in reports:
        lines += notes(report)
    return START + "\n".join(lines) + "\n"


def rows(text: str) -> list[list[str]]:
    """The cells of the table, its head first."""
    table = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


async def asked(place: Harness) -> ConformanceReport:
    report = await check(place)
    sys.stderr.write(f"{report}\n\n")
    return report


async def in_process() -> list[ConformanceReport]:
    with tempfile.TemporaryDirectory() as folder:
        async with Memory() as memory, SQLite(f"{folder}/sagas.db") as journal:
            return [await asked(memory), await asked(journal)]


def main() -> None:
    reports = anyio.run(in_process)
    with restate() as place:
        reports.append(anyio.run(asked, place))
    if not all(report.ok for report in reports):
        sys.exit("a place is not what it is said to be: the page is as it was")
    PAGE.write_text(page(reports), encoding="utf-8")


if __name__ == "__main__":  # pragma: no cover
    main()
