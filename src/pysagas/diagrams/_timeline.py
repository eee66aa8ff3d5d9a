"""Says who ran when: a table with bars for a terminal, a Gantt chart for Mermaid."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from io import StringIO
from typing import TYPE_CHECKING, Any

from pysagas import Outcome, Ran, SagaState, StepReport, StepState, TreeNode

from ._text import called, label, plain

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.text import Text

__all__ = ["Timeline", "timeline"]

# What an axis counts, in seconds, the finest first: the coarsest that a run has several of.
_UNITS = ((1e-6, "µs"), (1e-3, "ms"), (1.0, "s"), (60.0, "min"), (3600.0, "h"))
_SEVERAL = 5

_MOST_TICKS = 7
# A bar that is narrower cannot be seen: a part of the whole, in the Gantt chart.
_NARROWEST_BAR = 1 / 300

# In characters: of a timeline as text, of a column of bars, and of one of names where space is short.
_WIDTH = 100
_FEWEST_CELLS = 10
_SHORTEST_NAMES = 8
_GAP = "  "

# Told apart without colours too.
_FORWARD, _BACK, _WRONG, _OPEN = "█", "░", "x", "?"

_STYLES: dict[object, str] = {
    StepState.NOT_STARTED: "dim",
    StepState.COMPLETED: "green",
    StepState.NOT_APPLIED: "dim",
    StepState.UNKNOWN: "yellow",
    StepState.COMPENSATED: "blue",
    StepState.COMPENSATION_FAILED: "bold red",
    SagaState.COMPLETED: "green",
    SagaState.COMPENSATED: "blue",
    SagaState.FAILED: "bold red",
}


class Timeline:
    """Who ran when in a run; made by `timeline`.

    Printed with `rich <https://rich.readthedocs.io>`__ it is a table in the width of the terminal: a line
    for each place in the run, with a bar for the action and one for what took it back.
    """

    __slots__ = ("_outcome", "_reports", "_span", "_times")

    def __init__(self, outcome: Outcome[Any]) -> None:
        """For the library's own use."""
        self._outcome = outcome
        self._reports = {step.path: step for step in outcome.steps}
        self._times: dict[tuple[int, ...], list[Ran]] = {}
        for ran in outcome.times:
            self._times.setdefault(ran.path, []).append(ran)
        ends = [ran.began if ran.ended is None else ran.ended for ran in outcome.times]
        self._span = max(*ends, 0.0)

    def __repr__(self) -> str:
        return f"<Timeline of saga {self._outcome.saga!r}: {self._whole().took}>"

    def __str__(self) -> str:
        """Gives the table as plain text, a hundred characters wide.

        Raises:
            ImportError: rich is not installed.
        """
        try:
            from rich.console import Console  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise ImportError(
                "a timeline as text needs rich, which is not installed: "
                'pip install "pysagas[progress]"; its mermaid() does without'
            ) from error
        text = StringIO()
        Console(
            file=text, width=_WIDTH, color_system=None, force_terminal=False, force_jupyter=False
        ).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text  # noqa: PLC0415 - who calls this has it

        outcome = self._outcome
        rows = self._rows()
        widths = [max(cell.cell_len for cell in column) for column in zip(*rows, strict=True)]
        room = options.max_width - sum(widths) - len(_GAP) * len(widths)
        if room < _FEWEST_CELLS:  # names are cut, before bars are
            shorter = max(widths[1] - (_FEWEST_CELLS - room), min(widths[1], _SHORTEST_NAMES))
            room = max(room + widths[1] - shorter, _FEWEST_CELLS)
            widths[1] = shorter
        bars = [
            Text(f"0 to {self._whole().took}"),
            *(self._bars(self._times.get(node.path, ()), room) for node in outcome.tree[1:]),
        ]
        state = (outcome.state.value, _STYLES[outcome.state])
        lines = [Text.assemble(f"saga {plain(outcome.saga)}: ", state)]
        for cells, bar in zip(rows, bars, strict=True):
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True)):
                cell.truncate(width, overflow="ellipsis")
                cell.align("right" if index > 2 else "left", width)
            lines.append(Text(_GAP).join([*cells, bar]))
        lines[1].stylize("bold")
        glyphs = (
            (_FORWARD, "action"),
            (_BACK, "taken back"),
            (_WRONG, "failed"),
            (_OPEN, "end unknown"),
        )
        lines.append(Text(_GAP.join(map(" ".join, glyphs)), "dim"))
        for line in lines:
            line.no_wrap, line.overflow = True, "crop"
            yield line

    def _rows(self) -> list[list[Text]]:
        """Gives all cells of the table, but the bars: as Text, so that no name is taken for markup."""
        from rich.text import Text  # noqa: PLC0415

        unit, name = _unit(self._span)
        rows = [[*map(Text, ("", "step", "state", "began", "took", "back"))]]
        for node in self._outcome.tree[1:]:
            times = self._times.get(node.path, [])
            state, style = _state(node, self._reports.get(node.path))
            rows.append(
                [
                    Text(".".join(map(str, node.path)), "dim"),
                    Text("  " * (len(node.path) - 1) + called(node, plain)),
                    Text(state, style),
                    Text(f"{times[0].began / unit:.1f} {name}" if times else ""),
                    Text(_took(ran for ran in times if ran.kind == "action")),
                    Text(_took(ran for ran in times if ran.kind == "compensation")),
                ]
            )
        return rows

    def _bars(self, times: Collection[Ran], width: int) -> Text:
        from rich.text import Text  # noqa: PLC0415

        cells = [(" ", "")] * width
        free = 0
        for number, ran in enumerate(times):
            # In cells. What follows in an instant is put beside, not above: each can be seen, and at
            # the end of the run there is room for those that come.
            first, last = (
                int(at / self._span * width) if self._span else 0
                for at in (ran.began, ran.began if ran.ended is None else ran.ended)
            )
            room = max(width - (len(times) - 1 - number), 1)
            first = min(max(first, free), room - 1)
            free = max(first + 1, min(last, room))
            cell = (_FORWARD, "green") if ran.kind == "action" else (_BACK, "blue")
            if ran.ended is None:
                cell = (_OPEN, "yellow")
            elif self._wrong(ran):
                cell = (_WRONG, "red")
            cells[first:free] = [cell] * (free - first)
        return Text.assemble(*cells)

    def mermaid(self) -> str:
        """Draws it as a Mermaid Gantt chart: what went forward, and below that what was taken back.

        It holds names, states and durations; no arguments, results or errors. rich is not needed.
        """
        unit, name = _unit(self._span)
        outcome = self._outcome
        ticks = next(
            step * 10**power
            for power in range(20)
            for step in (1, 2, 5)
            if self._span / unit <= step * 10**power * _MOST_TICKS
        )
        lines = [
            "gantt",
            f"  title {label(outcome.saga)}, {outcome.state.value}, in {self._whole().took}",
            # Mermaid's clock counts whole milliseconds, and seconds are what an axis of its shows as
            # a plain number. So a second there is one of the units here.
            "  dateFormat x",
            f"  axisFormat %s {name}",
            f"  tickInterval {1000 * ticks}millisecond",
            "  todayMarker off",
        ]
        times = sorted(outcome.times, key=lambda ran: ran.path)
        forward = [ran for ran in times if ran.kind == "action"]
        back = [ran for ran in reversed(times) if ran.kind == "compensation"]
        for title, those in (("forward", forward), ("taken back", back)):
            if those:
                lines.append(f"  section {title}")
                those.sort(key=lambda ran: ran.began)
                lines += (f"    {task}" for task in self._tasks(those, unit))
        return "\n".join(lines) + "\n"

    def _tasks(self, times: Iterable[Ran], unit: float) -> Iterator[str]:
        least = max(1, round(self._span / unit * 1000 * _NARROWEST_BAR))
        for ran in times:
            wrong = self._wrong(ran)
            words = [label(self._reports[ran.path].name), *([wrong] if wrong else []), ran.took]
            began = round(ran.began / unit * 1000)
            ended = began if ran.ended is None else round(ran.ended / unit * 1000)
            # A path first: so no name stands where Mermaid looks for a word of its own.
            place = ".".join(map(str, ran.path))
            mark = "crit, " if wrong else "done, " if ran.kind == "compensation" else ""
            yield f"{place} {', '.join(words)} :{mark}{began}, {max(ended, began + least)}"

    def _wrong(self, ran: Ran) -> str:
        """Says in a word what went wrong with an action, or with what was to take it back."""
        report = self._reports[ran.path]
        if ran.kind == "compensation":
            return "failed" if report.state is StepState.COMPENSATION_FAILED else ""
        if report.state is StepState.NOT_APPLIED:
            return "not applied"
        return "" if report.error is None else "failed"

    def _whole(self) -> Ran:
        return Ran((), "action", 0.0, self._span)


def timeline(outcome: Outcome[Any]) -> Timeline:
    """Shows who ran when in a run: actions, and what took them back.

    Args:
        outcome: Of a run that was watched by ``pysagas.observe.timing.record_times``, or one that a
            journal recalls.

    Returns:
        A table with bars when printed with rich, or by ``str()``; and by `Timeline.mermaid` a Gantt
        chart.

    Raises:
        TypeError: It is no outcome.
        ValueError: It holds no times: nothing ran, or nobody looked at a clock.
    """
    if not isinstance(outcome, Outcome):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"timeline shows an Outcome, not {outcome!r}")
    if not outcome.times:
        raise ValueError(
            f"{outcome!r} holds no times, as nothing ran in it, or nobody looked at a clock; write "
            "Saga(..., middleware=[record_times()]), with record_times from pysagas.observe.timing"
        )
    return Timeline(outcome)


def _unit(span: float) -> tuple[float, str]:
    fitting = [unit for unit in _UNITS if span >= _SEVERAL * unit[0]]
    return fitting[-1] if fitting else _UNITS[0]


def _state(node: TreeNode, report: StepReport | None) -> tuple[str, str]:
    if node.kind == "commit":
        return ("passed", "green") if node.passed else ("not passed", "dim")
    return ("", "") if report is None else (report.state.value, _STYLES[report.state])


def _took(times: Iterable[Ran]) -> str:
    """Says how long something took; together, where it ran several times."""
    times = list(times)
    spent = [ran.ended - ran.began for ran in times if ran.ended is not None]
    words = [Ran((), "action", 0.0, sum(spent)).took] if spent else []
    return " + ".join([*words, *([_OPEN] if len(spent) < len(times) else [])])
