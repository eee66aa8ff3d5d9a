"""Shows runs while they go: looks into the journal again and again.

The journal is all that is known of a run in another process, and a look does not keep that from
writing. What begins and ends between two looks is seen when it has ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager

from anyio import sleep
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from pysagas.durable import RunInfo, SQLiteJournal

from ._print import local_time, one_line, table
from ._runs import State, saga_of, state_of
from ._steps import CUT_STEP_COLUMNS, STEP_COLUMNS, StepLine, step_lines, step_rows

__all__ = ["watch_run", "watch_runs"]

COLUMNS = ("RUN", "SAGA", "STATE", "STARTED", "FOR", "DONE", "NOW")
CUT_COLUMNS = ("RUN", "SAGA", "NOW")
# Of the lines of a terminal: the header, the count of what there is no room for, the cursor's.
TAKEN = 3
MATTER = {"running", "compensating", "compensation failed"}
# In seconds. The time in a run's end is that before it was written: so much is looked at twice.
OVERLAP = 5.0

Draw = Callable[[Sequence[Text]], None]


async def watch_runs(journal: SQLiteJournal, every: float) -> State:
    """Shows the runs that are under way, and those that end from now on; never returns.

    Args:
        journal: Where they are.
        every: How long to wait between two looks, in seconds.
    """
    console = Console()
    begun = last = time.time()
    ended: dict[str, RunInfo] = {}
    states: dict[str, State] = {}
    with _drawing(console) as draw:
        while True:
            since, last = max(begun, last - OVERLAP), time.time()
            runs = await journal.runs(since=since)
            if console.is_terminal:
                under_way = [info for info in runs if info.ended is None]
                ended |= {info.run_id: info for info in runs if info.ended is not None}
                for info in under_way:
                    ended.pop(info.run_id, None)  # it is tried again
                room = max(1, console.height - TAKEN)
                for run_id in list(ended)[: max(0, len(ended) + len(under_way) - room)]:
                    del ended[run_id]
                shown = [*ended.values(), *under_way][:room]
                more = _more(len(under_way) - len(shown), "that are under way")
                draw([*await _board(journal, shown, console), *more])
            else:
                draw([_change(info) for info in runs if states.get(info.run_id) is not state_of(info)])
                states = {info.run_id: state_of(info) for info in runs}
            await sleep(every)


async def watch_run(journal: SQLiteJournal, run_id: str, every: float) -> State:
    """Shows the steps of a run, until it has ended, or its process has died.

    Args:
        journal: Where it is.
        run_id: Its name; it is there.
        every: How long to wait between two looks, in seconds.

    Returns:
        How it stands then.
    """
    console = Console()
    before: list[StepLine] = []
    with _drawing(console) as draw:
        while True:
            # Before its history, which then is whole if it has ended.
            info = await journal.info(run_id)
            state = state_of(info)
            running = state is State.RUNNING
            lines = step_lines(await journal.history(run_id), running=running)
            if console.is_terminal:
                shown = _that_matter(lines, max(1, console.height - TAKEN - 1))
                steps = table(
                    STEP_COLUMNS, step_rows(info, shown), cut=CUT_STEP_COLUMNS, console=console
                )
                title = Text(_told(info), no_wrap=True, overflow="ellipsis")
                draw([title, *steps, *_more(len(lines) - len(shown), "steps")])
            else:
                end = [] if running else [Text(_told(info))]
                draw([*_changed_steps(info, before, lines), *end])
            if not running:
                return state
            before = lines
            await sleep(every)


@contextmanager
def _drawing(console: Console) -> Generator[Draw]:
    """Gives what draws lines: in place of the last ones on a terminal, elsewhere after them."""
    if not console.is_terminal:

        def write(lines: Sequence[Text]) -> None:
            for line in lines:
                print(line.plain, flush=True)

        yield write
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda lines: live.update(Group(*lines), refresh=True)


async def _board(journal: SQLiteJournal, runs: Iterable[RunInfo], console: Console) -> list[Text]:
    rows: list[tuple[str, ...]] = []
    for info in runs:
        state = state_of(info)
        lines = step_lines(await journal.history(info.run_id), running=state is State.RUNNING)
        took = (time.time() if info.ended is None else info.ended) - info.started
        rows.append(
            (
                info.run_id,
                saga_of(info),
                state.value,
                local_time(info.started),
                f"{took:.1f} s",
                str(sum(line.state == "completed" for line in lines)),
                (info.error if info.ended is not None else ", ".join(_now(lines))) or "-",
            )
        )
    if not rows:
        return [Text("No run is under way.")]
    return table(COLUMNS, rows, cut=CUT_COLUMNS, console=console)


def _more(count: int, what: str) -> Iterator[Text]:
    if count > 0:
        yield Text(f"and {count} more {what}")


def _that_matter(lines: list[StepLine], most: int) -> list[StepLine]:
    """Chooses what there is room for: what is under way or went wrong, and what happened last."""
    matter = [line for line in lines if line.in_doubt or line.state in MATTER]
    others = sorted((line for line in lines if line not in matter), key=lambda line: -line.last)
    chosen = {id(line) for line in [*matter[-most:], *others][:most]}
    return [line for line in lines if id(line) in chosen]


def _now(lines: Iterable[StepLine]) -> Iterator[str]:
    """Names what is under way, or in doubt."""
    for line in lines:
        if line.in_doubt:
            yield f"in doubt: {line.name}"
        elif line.state == "running":
            yield line.name
        elif line.state == "compensating":
            yield f"taking back {line.name}"


def _change(info: RunInfo) -> Text:
    at = time.time() if info.ended is None else info.ended
    return Text(f"{local_time(at)}  {_told(info)}")


def _told(info: RunInfo) -> str:
    error = "" if info.error is None else f": {info.error}"
    return one_line(f"{info.run_id}  {saga_of(info)}  {state_of(info).value}{error}")


def _changed_steps(
    info: RunInfo, before: Sequence[StepLine], lines: Sequence[StepLine]
) -> Iterator[Text]:
    """Yields a line for each step of which there is more than before."""
    for index, (line, row) in enumerate(zip(lines, step_rows(info, lines), strict=True)):
        if index >= len(before) or before[index] != line:
            path, name, state, _, last, recorded = row
            yield Text(one_line(f"{last}  {path}  {name}  {state}  {recorded}"))
