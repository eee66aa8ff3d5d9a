"""The commands, and what each says."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from datetime import datetime
from enum import StrEnum
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import anyio
import typer

from pysagas import SagaError
from pysagas.diagrams import mermaid
from pysagas.durable import JournalError, RunInfo, RunInterrupted, RunState, SQLiteJournal

from ._app import AnySaga, BadApp, open_app
from ._graph import graph_of_run
from ._print import local_time, print_json, print_table, say, utc_time
from ._runs import State, saga_of, state_of
from ._steps import (
    CUT_STEP_COLUMNS,
    STEP_COLUMNS,
    StepLine,
    recorded_result,
    step_lines,
    step_rows,
)
from ._watch import watch_run, watch_runs

__all__ = ["run"]

T = TypeVar("T")

FINE, LEFT_TO_DO, BAD_USAGE = 0, 1, 64

STATUSES = (
    f"Exit status: {FINE} fine; {LEFT_TO_DO} something is left to do: `recover` found runs that it could "
    "not go on with, or that have failed, or a `retry` has failed again, or the run that was watched has not ended well; "
    f"{BAD_USAGE} bad usage: the command line, or what it names, is wrong, and nothing was done. "
    "`pysagas demo` has its own."
)

# typer's base class of all that is wrong with a command line, in whichever package it is.
UsageError = cast("type[Exception]", typer.BadParameter.__mro__[1])

commands = typer.Typer(
    name="pysagas",
    help="Looks into a journal of sagas, and recovers what is unfinished in it.",
    epilog=STATUSES,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Backend(StrEnum):
    """The event loop on which sagas are run."""

    ASYNCIO = "asyncio"
    TRIO = "trio"


class OnCrash(StrEnum):
    """What is done with a run whose process died."""

    ROLLBACK = "rollback"
    RESUME = "resume"


def backend_there(backend: Backend) -> Backend:
    if backend is Backend.TRIO and find_spec("trio") is None:
        raise typer.BadParameter('Trio is not installed: pip install "pysagas[trio]"')
    return backend


JOURNAL_OPTION: Any = typer.Option(
    "--journal",
    envvar="PYSAGAS_JOURNAL",
    metavar="PATH",
    help="The file of the journal; it must be there.",
    exists=True,
    dir_okay=False,
)
APP_OPTION: Any = typer.Option(
    "--app",
    metavar="MODULE:NAME",
    help="The sagas: a saga, a list of them, or a function that gives one of these, or a context "
    "manager of them. The module may be in the current directory.",
)
JournalOption = Annotated[Path, JOURNAL_OPTION]
AppOption = Annotated[str, APP_OPTION]
BackendOption = Annotated[
    Backend, typer.Option(help="The event loop of the sagas.", callback=backend_there)
]
JSONOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The id of the run.")]


def run(arguments: Sequence[str]) -> int:
    """Runs a command line; gives the exit status."""
    try:
        status: int = (
            commands(list(arguments) or ["--help"], prog_name="pysagas", standalone_mode=False) or FINE
        )
    except UsageError as error:
        cast("Any", error).show()
        return BAD_USAGE
    return status


# --- looking ------------------------------------------------------------------------------------


@commands.command("list", epilog=STATUSES)
def list_runs(
    journal: JournalOption,
    state: Annotated[State | None, typer.Option(help="Only the runs that stand so.")] = None,
    as_json: JSONOption = False,
) -> int:
    """Lists the runs, the newest last."""
    runs = [one for one in in_journal(journal, SQLiteJournal.runs) if state in (None, state_of(one))]
    if as_json:
        print_json([run_object(one) for one in runs])
    elif runs:
        print_table(
            ("RUN", "SAGA", "STATE", "STARTED", "ENDED", "ERROR"),
            [
                (
                    one.run_id,
                    saga_of(one),
                    state_of(one).value,
                    local_time(one.started),
                    local_time(one.ended),
                    one.error or "-",
                )
                for one in runs
            ],
            cut=("RUN", "SAGA", "ERROR"),
        )
    else:
        say("No runs." if state is None else f"No runs that are {state.value}.")
    return FINE


@commands.command(epilog=STATUSES)
def show(run_id: RunArgument, journal: JournalOption, as_json: JSONOption = False) -> int:
    """Shows how a run stands, step by step, and what is in doubt."""

    async def work(opened: SQLiteJournal) -> tuple[RunInfo, list[StepLine]]:
        info = await find(opened, run_id)
        running = state_of(info) is State.RUNNING
        return info, step_lines(await opened.history(run_id), running=running)

    info, lines = in_journal(journal, work)
    if as_json:
        print_json({**run_object(info), "steps": [step_object(line) for line in lines]})
        return FINE
    say(f"run      {info.run_id}")
    say(f"saga     {saga_of(info)}")
    in_doubt = [line.name for line in lines if line.in_doubt]
    but = ", but for what is in doubt" if in_doubt and info.state is RunState.COMPENSATED else ""
    say(f"state    {WORDS[state_of(info)]}{but}")
    say(f"started  {local_time(info.started)}")
    say(f"ended    {local_time(info.ended)}")
    if info.error is not None:
        say(f"error    {info.error}")
    if lines:
        say("")
        print_table(STEP_COLUMNS, step_rows(info, lines), cut=CUT_STEP_COLUMNS)
    if in_doubt:
        say(f"\nIN DOUBT (begun, and nobody knows what came of it): {', '.join(in_doubt)}")
    return FINE


@commands.command(epilog=STATUSES)
def graph(
    run_id: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="The id of a run; else a definition is drawn.")
    ] = None,
    journal: Annotated[Path | None, JOURNAL_OPTION] = None,
    app: Annotated[str | None, APP_OPTION] = None,
    saga: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which of the app's sagas, if there are several.")
    ] = None,
) -> int:
    """Draws a run of a journal, or a saga of an app, as a Mermaid flowchart.

    Of a run, `--app` adds what its history does not tell: what was not begun, and what takes a step
    back.
    """
    if run_id is None:
        print(definition(app, saga), end="")
        return FINE
    if journal is None:
        raise typer.BadParameter("a run is in a journal: which one?", param_hint="--journal")
    if saga is not None:
        raise typer.BadParameter("a run knows its saga", param_hint="--saga")

    async def draw(opened: SQLiteJournal, sagas: list[AnySaga] | None = None) -> str:
        info = await find(opened, run_id)
        its_saga = None if sagas is None else saga_of_run(info, sagas, app)
        return graph_of_run(info, await opened.history(run_id), its_saga)

    if app is None:
        print(in_journal(journal, draw), end="")
    else:
        print(with_app(journal, app, draw, Backend.ASYNCIO, quiet=True), end="")
    return FINE


@commands.command(epilog=STATUSES)
def watch(
    journal: JournalOption,
    run_id: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Only this run, step by step, to its end.")
    ] = None,
    every: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.01, help="How long to wait between two looks.")
    ] = 0.5,
) -> int:
    """Shows the runs while they go, until Ctrl-C; or one run, until it has ended.

    A terminal shows what is under way, and what has ended meanwhile; elsewhere each change is a line.
    """

    async def work(opened: SQLiteJournal) -> State:
        if run_id is None:
            return await watch_runs(opened, every)
        return await watch_run(opened, (await find(opened, run_id)).run_id, every)

    state = in_journal(journal, work)
    return FINE if state in (State.COMPLETED, State.COMPENSATED) else LEFT_TO_DO


# --- doing --------------------------------------------------------------------------------------


@commands.command(epilog=STATUSES)
def recover(
    journal: JournalOption,
    app: AppOption,
    on_crash: Annotated[
        OnCrash,
        typer.Option(
            help="Take the runs back, or go on with them; then actions that were under way are run "
            "again. A run that has passed its commit is gone on with in any case."
        ),
    ] = OnCrash.ROLLBACK,
    backend: BackendOption = Backend.ASYNCIO,
    as_json: JSONOption = False,
) -> int:
    """Takes back, or goes on with, all runs whose process has died."""
    mode: Any = on_crash.value

    async def work(opened: SQLiteJournal, sagas: list[AnySaga]) -> Any:
        return await opened.recover(sagas, on_crash=mode)

    report = with_app(journal, app, work, backend, quiet=as_json)
    groups = {"recovered": report.recovered, "failed": report.failed, "left": report.left}
    if as_json:
        found: dict[str, object] = {
            name: [
                {
                    "run_id": one.run_id,
                    "saga": one.saga,
                    "state": one.state.value if name != "left" else State.INTERRUPTED.value,
                    "error": told(one.error),
                    "in_doubt": [step.name for step in one.in_doubt],
                }
                for one in group
            ]
            for name, group in groups.items()
        }
        print_json({"ok": report.ok, **found, "in_progress": list(report.in_progress)})
    else:
        rows = [
            (
                one.run_id,
                one.saga,
                "left as it was" if name == "left" else one.state.value,
                told(one.error) or "-",
            )
            for name, group in groups.items()
            for one in group
        ]
        rows += [(run_id, "-", "in progress", "-") for run_id in report.in_progress]
        if rows:
            print_table(("RUN", "SAGA", "NOW", "ERROR"), rows, cut=("RUN", "SAGA", "ERROR"))
        else:
            say("Nothing to recover.")
        for one in report.in_doubt:
            names = ", ".join(step.name for step in one.in_doubt)
            say(
                f"\nIN DOUBT in run {one.run_id}: {names}. Look whether it happened; nobody took it back."
            )
        if report.failed:
            say("\nMend what made them fail, then try each again: pysagas retry RUN --app MODULE:NAME")
    return FINE if report.ok else LEFT_TO_DO


@commands.command(epilog=STATUSES)
def retry(
    run_id: RunArgument,
    journal: JournalOption,
    app: AppOption,
    backend: BackendOption = Backend.ASYNCIO,
    as_json: JSONOption = False,
) -> int:
    """Tries a failed run again, when the cause has been mended.

    What could not be taken back is tried again; a run that failed past its commit is carried on
    from there.
    """

    async def work(opened: SQLiteJournal, sagas: list[AnySaga]) -> tuple[RunInfo, str | None]:
        info = await find(opened, run_id)
        if info.state is not RunState.FAILED:
            word = state_of(info).value
            raise typer.BadParameter(f"run {run_id!r} is {word}, and not failed", param_hint="RUN")
        saga = saga_of_run(info, sagas, app)
        problem: Exception | None = None
        try:
            await opened.retry(saga, run_id)
        except Exception as error:
            problem = error
        info = await find(opened, run_id)
        # What the journal could not do is nowhere else; all other errors are in the run's record.
        return info, told(problem) if isinstance(problem, JournalError) else info.error

    info, problem = with_app(journal, app, work, backend, quiet=as_json)
    state = state_of(info)
    if as_json:
        print_json({**run_object(info), "error": problem})
    else:
        row = (info.run_id, saga_of(info), state.value, problem or "-")
        print_table(("RUN", "SAGA", "NOW", "ERROR"), [row], cut=("RUN", "SAGA", "ERROR"))
    return FINE if state in (State.COMPLETED, State.COMPENSATED) else LEFT_TO_DO


@commands.command(epilog=STATUSES)
def prune(
    journal: JournalOption,
    older_than: Annotated[
        str | None,
        typer.Option(metavar="AGE", help="How long ago a run must have ended: 90m, 12h, 30d, 4w."),
    ] = None,
    before: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="Or a time before which: 2026-11-23, 2026-11-23T12:00+01:00."
        ),
    ] = None,
    as_json: JSONOption = False,
) -> int:
    """Forgets runs that ended well some time ago; it does not ask.

    That is, that completed or were taken back. Those that failed or have not ended are never
    forgotten. A forgotten id can be used anew.
    """
    if (older_than is None) == (before is None):
        raise typer.BadParameter("give one of the two", param_hint="--older-than or --before")
    limit = moment(before) if older_than is None else time.time() - seconds(older_than)
    pruned = in_journal(journal, partial(SQLiteJournal.prune, before=limit))
    if as_json:
        print_json({"pruned": pruned, "before": utc_time(limit)})
    else:
        say(f"Forgot {pruned} {'run' if pruned == 1 else 'runs'}.")
    return FINE


@commands.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def demo(context: typer.Context) -> int:
    """Runs the demo: an order to break, kill and recover."""
    from pysagas._demo import main  # noqa: PLC0415 - nothing else needs it

    return main(context.args, "pysagas demo")


# --- how ----------------------------------------------------------------------------------------


def refuse_empty(path: Path) -> None:
    """Refuses a file that opening it would make a journal of."""
    if path.stat().st_size == 0:
        raise typer.BadParameter(f"{path} is empty, and no journal", param_hint="--journal")


def in_journal(path: Path, work: Callable[[SQLiteJournal], Awaitable[T]]) -> T:
    async def opened() -> T:
        async with SQLiteJournal(path) as journal:
            return await work(journal)

    refuse_empty(path)
    try:
        return anyio.run(opened)
    except JournalError as error:
        raise typer.BadParameter(str(error), param_hint="--journal") from error


def with_app(
    path: Path,
    app: str,
    work: Callable[[SQLiteJournal, list[AnySaga]], Awaitable[T]],
    backend: Backend,
    *,
    quiet: bool,
) -> T:
    """Does something with a journal and the sagas of an app.

    Args:
        path: The journal's.
        app: Where the sagas are.
        work: What to do.
        backend: On which event loop.
        quiet: Whether what the app prints goes to stderr, so that stdout is JSON alone.
    """

    async def opened() -> T:
        async with open_app(app) as sagas, SQLiteJournal(path) as journal:
            return await work(journal, sagas)

    refuse_empty(path)
    try:
        return run_app(opened, backend, quiet=quiet)
    except JournalError as error:
        raise typer.BadParameter(str(error), param_hint="--journal") from error


def run_app(opened: Callable[[], Awaitable[T]], backend: Backend, *, quiet: bool) -> T:
    try:
        with redirect_stdout(sys.stderr) if quiet else nullcontext():
            return anyio.run(opened, backend=backend.value)
    except BadApp as error:
        raise typer.BadParameter(str(error), param_hint="--app") from error


def definition(app: str | None, name: str | None) -> str:
    """Draws a saga of an app."""
    if app is None:
        raise typer.BadParameter("give a run, or an app whose saga is to be drawn", param_hint="--app")

    async def draw() -> str:
        async with open_app(app) as sagas:
            fitting = [one for one in sagas if name in (None, one.name)]
            if len(fitting) != 1:
                there = ", ".join(
                    f"{one.name} ({one.version})" if one.version else one.name for one in sagas
                )
                raise typer.BadParameter(
                    f"{app} has {len(fitting) or 'no'} sagas of that name; there are {there}; give a name, or "
                    "an app that leads to one of them",
                    param_hint="--saga",
                )
            return mermaid(fitting[0])

    return run_app(draw, Backend.ASYNCIO, quiet=True)


def saga_of_run(info: RunInfo, sagas: list[AnySaga], app: str | None) -> AnySaga:
    for one in sagas:
        if (one.name, one.version) == (info.saga, info.version):
            return one
    raise typer.BadParameter(
        f"run {info.run_id!r} is one of {saga_of(info)}, which is not in {app}", param_hint="--app"
    )


async def find(journal: SQLiteJournal, run_id: str) -> RunInfo:
    try:
        return await journal.info(run_id)
    except JournalError as error:
        raise typer.BadParameter(str(error), param_hint="RUN") from error


WORDS = {
    State.RUNNING: "running, in a process that lives",
    State.INTERRUPTED: "interrupted: its process died; `pysagas recover` goes on from here",
    State.COMPLETED: "completed",
    State.COMPENSATED: "compensated: all was taken back",
    State.FAILED: "failed: mend the cause, then `pysagas retry` it",
}


def run_object(info: RunInfo) -> dict[str, object]:
    return {
        "run_id": info.run_id,
        "saga": info.saga,
        "version": info.version,
        "state": state_of(info).value,
        "started": utc_time(info.started),
        "ended": utc_time(info.ended),
        "error": info.error,
    }


def step_object(line: StepLine) -> dict[str, object]:
    return {
        "kind": line.kind,
        "path": list(line.path),
        "name": line.name,
        "state": line.state,
        "started": utc_time(line.started),
        "last": utc_time(line.last),
        "result": None if line.result is None else recorded_result(line.result),
        "error": line.error,
        "in_doubt": line.in_doubt,
    }


def told(error: BaseException | None) -> str | None:
    """Says what a run ended with; that it was taken back since its process died is no news."""
    if error is None or isinstance(error, RunInterrupted):
        return None
    return str(error) if isinstance(error, SagaError) else f"{type(error).__name__}: {error}"


UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def seconds(age: str) -> float:
    found = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)([smhdw])", age, re.ASCII)
    if found is None:
        raise typer.BadParameter(
            f"{age!r} is no age; write a number and one of s, m, h, d, w: 30d",
            param_hint="--older-than",
        )
    return float(found[1]) * UNITS[found[2]]


def moment(text: str | None) -> float:
    assert text is not None
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise typer.BadParameter(
            f"{text!r} is no time; write 2026-11-23 or 2026-11-23T12:00 (here), or with +01:00 or Z",
            param_hint="--before",
        ) from error
