"""What sagas do, as a tree on the terminal that is kept up to date. Needs the extra ``progress``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pysagas import CallNext, Effect, Middleware, observer

from ._state import state_of

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["show_progress"]


def show_progress(console: Console | None = None) -> Middleware:
    """Makes a middleware that shows what runs, what is done and what is being taken back.

    On a terminal that is a tree, in which each saga, group and step has a line, with its state and
    how long it took. It is kept up to date while a run is under way, and stays on the screen when
    it has ended; what is printed meanwhile stands above it, unless it goes elsewhere. Of a tree that
    is taller than the terminal the lines that matter are shown, and the others counted. Elsewhere, in
    a file or a pipe, it is a line where a saga or a rollback begins, and one where a step ends.

    Several sagas can share it, in several threads, too. A terminal has room for one: give sagas that
    run at the same time the same one. A block of `open_saga` has no effect of its own, so each call
    in it is a tree by itself.

    As an `observer` it cannot harm the saga. After an error of the console, which is logged, it shows
    nothing any more. The tree is drawn in a thread: a terminal that is stopped, with Ctrl-S, holds the
    program up for a fraction of a second, where its last run ends, and where it ends itself. Lines are
    written at once: a pipe that nobody reads holds the program up when it is full, as ``print`` does.
    A child of `os.fork` shows the runs that begin in it, and none of its parent's.

    Args:
        console: Where to; None: what is ``sys.stdout`` when a run begins. Its clock is used.

    Raises:
        ImportError: rich is not installed.

    Example:
        ::

            book_trip = Saga([...], name="trip", middleware=[show_progress()])
    """
    try:
        from ._display import Display  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ImportError(
            'show_progress needs rich, which is not installed: pip install "pysagas[progress]"'
        ) from error
    display = Display(console)

    async def show_effect(effect: Effect, call_next: CallNext) -> object:
        # Tells this effect from another of the same kind and path: the same run may be seen twice,
        # by sagas in each other that share the middleware.
        token = object()
        try:
            # Inside: a Ctrl-C may arrive in the middle of it, and then it has to end.
            display.begin(effect, token)
            result = await call_next()
        except BaseException as error:
            display.end(effect, token, state_of(effect, call_next, error), error)
            raise
        display.end(effect, token, state_of(effect, call_next, None), None)
        return result

    return observer(show_effect)
