"""The command line of the demo, and how it says what came of the order."""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from secrets import token_hex
from typing import NoReturn

import anyio

from pysagas import Outcome, Saga, SagaState, StepState, outcome_of
from pysagas.durable import JournalError, SQLiteJournal

from ._order import AFTER_COMMIT, LAST_BEFORE_COMMIT, ORDER, STEPS, app, describe, order_saga, progress
from ._shop import NotAShop, Order, Shop, State, look, open_shop

__all__ = ["main"]

COMPLETED, ROLLED_BACK, NOT_RESTORED, BAD_USAGE = 0, 1, 2, 64

Run = Callable[[], Awaitable[Outcome[object]]]


# --- placing the order --------------------------------------------------------------------------
#
# Every failure is expected here: taken back, it is an outcome like another.


async def in_memory(
    shop: Shop, order: Order, cancel_after: float, outcomes: list[Outcome[object]]
) -> None:
    run = Saga(ORDER, name="order", middleware=[progress()]).run
    await bounded(partial(run, shop, order, exceptions=Exception), cancel_after, outcomes)


async def in_journal(
    journal: SQLiteJournal,
    shop: Shop,
    order: Order,
    cancel_after: float,
    outcomes: list[Outcome[object]],
) -> None:
    run = partial(
        journal.run,
        order_saga(lambda _: shop),
        str(shop.database),
        order,
        run_id=order.id,
        exceptions=Exception,
    )
    async with journal:
        await bounded(run, cancel_after, outcomes)


async def bounded(run: Run, cancel_after: float, outcomes: list[Outcome[object]]) -> None:
    """Runs the saga, and leaves its outcome in `outcomes`, in whatever way the run ends."""
    with anyio.move_on_after(cancel_after):
        try:
            outcomes.append(await run())
        except BaseException as error:
            outcome = outcome_of(error)
            if outcome is not None:
                outcomes.append(outcome)
            # A failure is in the outcome; a cancellation belongs to whoever cancelled.
            if outcome is None or not isinstance(error, Exception):
                raise


async def recover(journal: SQLiteJournal) -> None:
    """Takes back what earlier processes left unfinished, as every program does before new work."""
    async with journal:
        with app() as sagas:
            report = await journal.recover(sagas)
    for run in report.recovered + report.failed:
        print(f"Recovered first: order {run.run_id}, {run.state.value}.\n")


# --- the printing -------------------------------------------------------------------------------


def show(before: State, after: State) -> None:
    width = max(len(row) for rows in before.values() for row in ("before", *rows))
    print(f"\n{'':9}  {'before':<{width}}  after")
    for name in before:
        label = name
        for left, right in zip_longest(before[name] or ["-"], after[name] or ["-"], fillvalue=""):
            print(f"{label:<9}  {left:<{width}}  {right}".rstrip())
            label = ""
    print()


def differences(before: State, after: State) -> str:
    return ", ".join(name for name in before if before[name] != after[name])


RESTORED = "Restored: the tables, the files and the endpoint are what they were before."


def conclude(outcome: Outcome[object] | None, before: State, after: State) -> int:
    """Says how the run ended, checks that against what is there, and gives the exit status."""
    if outcome is None:
        print("The run was ended before it could report.")
    elif outcome.error is None:
        print("Completed: the order is placed.")
        return COMPLETED
    else:
        print(f"Not completed ({outcome.state.value}): {describe(outcome.error)}.")
        for report in outcome.steps:
            if report.state is StepState.COMPENSATION_FAILED:
                assert report.compensation_error is not None
                why = describe(report.compensation_error)
                print(f"The compensation of {report.name} did not end: {why}.")
        stays = [report.name for report in outcome.steps if report.state is StepState.COMPLETED]
        if stays:
            print(f"It had passed its commit, so this stays done: {', '.join(stays)}.")
            print("Only what came after the commit was to be taken back.")
    changed = differences(before, after)
    if changed:
        print(f"NOT RESTORED: {changed} differ from before.")
        return NOT_RESTORED
    print(RESTORED)
    if outcome is not None and outcome.state is SagaState.FAILED:
        print("But the saga could not know: somebody would have had to look.")
        return NOT_RESTORED
    return ROLLED_BACK


def notes(database: Path) -> Path:
    """The file in which a run writes down what was there before it, for ``--look``."""
    return database.with_name(f"{database.name}-before.json")


def compare(shop: Shop) -> int:
    """Shows what is there now beside what was there before the last run; gives the exit status."""
    before: State = json.loads(notes(shop.database).read_text(encoding="utf-8"))
    after = look(shop)
    show(before, after)
    changed = differences(before, after)
    print(f"Since before the last run, these have changed: {changed}." if changed else RESTORED)
    return NOT_RESTORED if changed else COMPLETED


# --- the command line ---------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser that ends with the status which sysexits.h has for a bad command line."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(BAD_USAGE, f"{self.prog}: error: {message}\n")


def seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError(text)
    return value


def make_parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        description="Places an order in a small shop: a SQLite database, invoice files and an HTTP "
        "endpoint, changed by one saga. Break it with the options, or press Ctrl-C.",
        epilog=f"STEP is one of: {', '.join(STEPS)}. Exit status: {COMPLETED} completed, "
        f"{ROLLED_BACK} rolled back, {NOT_RESTORED} not restored (a compensation failed or was cut "
        f"off, or the commit had been passed), {BAD_USAGE} bad usage. With --look: {COMPLETED} all is "
        f"what it was, {NOT_RESTORED} something has changed.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--fail", choices=STEPS, metavar="STEP", help="a step that fails, after its work was done")
    add(
        "--fail-compensation",
        choices=STEPS,
        metavar="STEP",
        help="a step whose compensation fails. Without --fail or --cancel-after there must be "
        f"something to roll back, so {LAST_BEFORE_COMMIT} fails too, the last step before the commit; "
        f"or {AFTER_COMMIT}, where that is STEP",
    )
    add("--cancel-after", type=seconds, metavar="SECONDS", help="cancel the saga from outside")
    add("--backend", choices=("asyncio", "trio"), default="asyncio", help="default: asyncio")
    add(
        "--database",
        type=Path,
        metavar="PATH",
        help="the shop's SQLite file, made if it is new; kept, and so is what belongs to it, under "
        "PATH-invoices, PATH-warehouse and PATH-before.json. Default: a temporary one, or with "
        "--journal shop.db beside the journal",
    )
    add(
        "--journal",
        type=Path,
        metavar="PATH",
        help="record the run in this file, made if it is new, and first take back what earlier runs "
        "left unfinished there. Needs msgspec",
    )
    add(
        "--crash",
        choices=STEPS,
        metavar="STEP",
        help="kill this process (SIGKILL) in STEP, after its work was done and before that is "
        "recorded. Needs --journal, by which the run can be recovered",
    )
    add(
        "--look",
        action="store_true",
        help="place no order: compare what is there with what was there before the last run",
    )
    add(
        "--pace",
        type=seconds,
        default=0.12,
        metavar="SECONDS",
        help="what a step takes; with 2 there is time to press Ctrl-C. Default: 0.12",
    )
    return parser


def main(arguments: Sequence[str] | None = None, prog: str = "python -m pysagas") -> int:
    """Runs the demo.

    Args:
        arguments: Those of the command line; None: the process's own.
        prog: How the usage names the program.

    Returns:
        The exit status: 0 completed, 1 rolled back, 2 not restored.

    Raises:
        SystemExit: With 64, for a command line that cannot work; with 0, for ``--help``.
    """
    parser = make_parser(prog)
    options = parser.parse_args(arguments)
    if options.backend == "trio" and find_spec("trio") is None:
        parser.error('--backend trio needs Trio, which is not installed: pip install "pysagas[trio]"')
    if options.crash is not None and options.journal is None:
        parser.error("--crash needs --journal PATH, or nothing is known of the run afterwards")
    path: Path | None = options.database
    if path is None and options.journal is not None:
        path = options.journal.with_name("shop.db")
    if options.look and (path is None or not notes(path).exists()):
        parser.error("--look needs the shop of an earlier run: the same --database or --journal")
    fail, unrepairable = options.fail, options.fail_compensation
    cancel_after = math.inf if options.cancel_after is None else options.cancel_after
    if unrepairable is not None and fail is None and options.cancel_after is None:
        fail = AFTER_COMMIT if unrepairable == AFTER_COMMIT else LAST_BEFORE_COMMIT
    outcomes: list[Outcome[object]] = []
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    try:
        with open_shop(path) as place:
            shop = Shop(*place, options.pace, fail, unrepairable, options.crash, options.journal)
            if options.look:
                return compare(shop)
            run = in_memory
            if options.journal is not None:
                journal = SQLiteJournal(options.journal)
                anyio.run(recover, journal, backend=options.backend)
                run = partial(in_journal, journal)
            before = look(shop)
            notes(shop.database).write_text(json.dumps(before), encoding="utf-8")
            with suppress(KeyboardInterrupt):  # its outcome is there all the same
                anyio.run(
                    run, shop, Order(token_hex(4)), cancel_after, outcomes, backend=options.backend
                )
            # What is left takes a moment, and is what somebody impatient wants to know.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            after = look(shop)
            show(before, after)
            return conclude(outcomes[0] if outcomes else None, before, after)
    except (NotAShop, JournalError, ImportError) as error:
        parser.error(str(error))
    finally:
        signal.signal(signal.SIGINT, on_ctrl_c)
