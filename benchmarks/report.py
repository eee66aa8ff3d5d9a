"""The report of a run of the benchmarks, in Markdown."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from run import Results, Row

DOUBTS = """\
- Steps do nothing, or wait at one checkpoint: only overhead is seen. One call over a network hides
  all of it.
- Trust the ratios, not the times: a ratio compares two times of the same round, its median is that
  of all rounds, and its spread (the middle half of them) says how much to believe it. Other work on
  the machine makes the spread wide.
- The garbage collector runs, as in a program; it is emptied before each measurement.
"""


def publish(text: str, results: Any, options: Namespace) -> None:
    """Prints a report, and writes it, and the results themselves, where the options say."""
    print(f"\n{text}")
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    if options.json:
        options.json.write_text(
            json.dumps(asdict(results), indent=1, ensure_ascii=False), encoding="utf-8"
        )


def to_markdown(results: Results) -> str:
    parts = ["# Results", "", *_table(["what", "value"], results.environment.items()), "", DOUBTS]
    for name, reason in results.skipped.items():
        parts.append(f"- Skipped: {name}: {reason}.")
    judged = [row for row in results.rows if row.goal is not None]
    if judged:
        parts += ["", "## Goals", "", *_goals(judged)]
    timed = [row for row in results.rows if row.unit == "µs"]
    for loop in dict.fromkeys(row.loop for row in timed):
        for shape in dict.fromkeys(row.case.split()[0] for row in timed):
            rows = [row for row in timed if row.loop == loop and row.case.split()[0] == shape]
            for part in _by_baseline(rows):
                parts += ["", f"## {shape.capitalize()} on {loop}, against {part[0].baseline}", ""]
                parts += ["µs a step, and (x ratio, middle half of the ratios).", ""]
                parts += _times(part)
    parts += _others("Memory held for rollback, B a step", results.rows, "B")
    parts += _others("Import, ms", results.rows, "ms")
    return "\n".join(parts).rstrip() + "\n"


def _goals(rows: Sequence[Row]) -> list[str]:
    return _table(
        ["loop", "case", "ours", "against", "goal", "measured", "middle half", "met"],
        (
            [
                row.loop,
                row.case,
                row.contender,
                row.baseline,
                f"≤ {_goal(row)}",
                _number(_judged(row)),
                "" if row.unit == "B" else _spread(row.ratios),
                _verdict(row),
            ]
            for row in rows
            if row.goal is not None
        ),
    )


def _goal(row: Row) -> str:
    return {"B": f"{row.goal} B", "ms": f"+{row.goal} ms"}.get(row.unit, f"{row.goal}")


def _judged(row: Row) -> float:
    return median(row.values) if row.unit == "B" else median(row.ratios)


def _verdict(row: Row) -> str:
    assert row.goal is not None
    if round(_judged(row), 2) <= row.goal:
        return "yes"
    return "unclear" if _middle(row.ratios)[0] <= row.goal and row.unit != "B" else "**no**"


def _by_baseline(rows: Sequence[Row]) -> list[list[Row]]:
    return [
        [row for row in rows if row.baseline == baseline]
        for baseline in dict.fromkeys(row.baseline for row in rows)
    ]


def _times(rows: Sequence[Row]) -> list[str]:
    names = list(dict.fromkeys(row.contender for row in rows))
    labels = list(dict.fromkeys(row.case for row in rows))
    by_place = {(row.case, row.contender): row for row in rows}
    return _table(
        ["case", *names],
        ([label, *(_cell(by_place.get((label, name))) for name in names)] for label in labels),
    )


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    time = _number(median(row.values))
    if row.contender == row.baseline:
        return time
    return f"{time} (x{_number(median(row.ratios))}, {_spread(row.ratios)})"


def _others(title: str, rows: Sequence[Row], unit: str) -> list[str]:
    rows = [row for row in rows if row.unit == unit]
    if not rows:
        return []
    against = "difference" if unit == "ms" else "ratio"
    return [
        "",
        f"## {title}",
        "",
        *_table(
            ["loop", "contender", unit, f"{against} to {rows[0].baseline}"],
            (
                [row.loop, row.contender, f"{median(row.values):.1f}", _number(median(row.ratios))]
                for row in rows
            ),
        ),
    ]


def _middle(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile."""
    if len(values) < 2:
        return values[0], values[0]
    quartiles = quantiles(values, n=4, method="inclusive")
    return quartiles[0], quartiles[2]


def _spread(values: Sequence[float]) -> str:
    low, high = _middle(values)
    return f"{_number(low)}-{_number(high)}"


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
