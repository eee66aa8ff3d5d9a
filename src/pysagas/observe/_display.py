"""Where progress is shown: a tree that is drawn again and again, or lines. All that needs rich."""

from __future__ import annotations

import atexit
import os
import sys
from itertools import islice
from threading import Event, RLock, Thread, current_thread
from typing import Final, NamedTuple, cast
from weakref import WeakSet

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group
from rich.errors import LiveError
from rich.live import Live
from rich.text import Text

from pysagas import CompensationFailed, Effect, SagaState, StepState

from ._state import printable
from ._tree import Node, Run, Word, is_step

__all__ = ["Display"]


class _Look(NamedTuple):
    style: str
    mark: str
    # For a terminal that has no more than ASCII.
    plain_mark: str


# A word says it too: colours and marks are for who sees them.
_LOOKS: Final[dict[Word, _Look]] = {
    "running": _Look("cyan", "", ""),
    "being taken back": _Look("yellow", "", ""),
    "could not be taken back": _Look("bold red", "✗", "X"),
    "failed": _Look("red", "✗", "x"),
    "interrupted": _Look("yellow", "!", "!"),
    "taken back": _Look("yellow", "↺", "<"),
    "done": _Look("green", "✓", "+"),
}
_SPINNER: Final = ("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "|/-\\")

# How often a second the tree is drawn, whatever the number of effects.
_RATE = 10
# Seconds for which the last run under way waits for its drawing: a terminal may be stopped, and a saga
# must not be.
_PATIENCE = 0.2
# How many trees of runs that have ended are drawn at once: what waits for one of them has patience.
_AT_ONCE = 50
# Characters of a name, and of an error. Measuring a text takes time.
_LONGEST = 240
_LONGEST_ERROR = 2000
# A deeper node is no further to the right: its name would be out of sight.
_DEEPEST = 12


# --- the lines ----------------------------------------------------------------------------------


def _trees(runs: list[Run], console: Console, most: int) -> list[Text]:
    """Draws the runs that are under way, in so many lines at most."""
    lines: list[Text] = []
    shown = runs if len(runs) <= most else runs[: most - 1]
    room = most - (len(shown) < len(runs))
    for index, run in enumerate(shown):
        # What one does not need, the next ones have.
        lines += _tree(run, console, (room - len(lines)) // (len(shown) - index))
    if len(shown) < len(runs):
        lines.append(Text(f"and {len(runs) - len(shown)} more sagas", no_wrap=True))
    return lines


def _tree(run: Run, console: Console, most: int, *, whole: bool = False) -> list[Text]:
    """Draws a run.

    Args:
        run: Which.
        console: Where to.
        most: So many nodes at most, or one less and a line that counts the others.
        whole: Whether an error for which its line has no room is written below it, rather than cut.
    """
    now = console.get_time()
    ascii_only = console.options.ascii_only
    spinner = _SPINNER[ascii_only]
    frame = spinner[int(now * _RATE) % len(spinner)]
    nodes, rest = run.choose(most)
    if not nodes:
        return []  # a Ctrl-C has met the run before its first node was written down
    rows: list[tuple[str, Word, str, str]] = []
    for node in nodes:
        word = run.word(node)
        mark = (_LOOKS[word].plain_mark if ascii_only else _LOOKS[word].mark) or frame
        indent = "  " * min(run.depth(node), _DEEPEST)
        seconds = now - node.begun if node.open else node.took
        which = f" {run.run_id}" if run.among_others and not rows else ""
        rows.append((f"{indent}{mark} {node.name}{which}", word, _time(seconds), run.says(node)))
    width = min(max(cell_len(row[0]) for row in rows), max(console.width // 2, 16))
    word_width = max(len(row[1]) for row in rows)
    time_width = max(len(row[2]) for row in rows)
    lines: list[Text] = []
    for left, word, took, detail in rows:
        cut = "~" if ascii_only else "…"
        name = left if cell_len(left) <= width else set_cell_size(left, width - 1) + cut
        line = Text.assemble(
            set_cell_size(name, width),
            "  ",
            (f"{word:<{word_width}}", _LOOKS[word].style),
            f"  {took:>{time_width}}",
        )
        lines.append(line)
        room = console.width - line.cell_len - 2
        if whole and cell_len(detail) > room:
            shift = min(len(left) - len(left.lstrip(" ")) + 4, console.width // 2)
            below = Text(detail).wrap(console, console.width - shift)
            for part in below:
                part.pad_left(shift)
            lines += below
        elif detail:
            line.append(f"  {detail[: console.width]}")
    if rest:
        lines.append(Text(f"  {rest}"))
    for line in lines:
        line.no_wrap = True
        line.overflow = "crop" if ascii_only else "ellipsis"
    return lines


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2f} s"
    whole = int(seconds)
    hours, minutes, left = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def _shown(text: str, console: Console, longest: int = _LONGEST) -> str:
    """Keeps a name or an error from moving the cursor, and to what the terminal can show."""
    if len(text) > longest:
        text = f"{text[: longest - 3]}..."
    if text.isascii() and text.isprintable():
        return text  # as nearly all are, of thousands
    return printable(text).encode(console.encoding, "backslashreplace").decode(console.encoding)


def _raised(error: BaseException | None) -> list[str]:
    """What an exception says; nothing for an interruption, of which the word says all."""
    if not isinstance(error, Exception):
        return []
    if isinstance(error, CompensationFailed):
        # Its message lists these; those that a step has shown are not repeated.
        return [text for part in (error.error, *error.failures) for text in _raised(part)]
    if isinstance(error, ExceptionGroup):
        # Of a thousand members that fail a line has room for few.
        group = cast("ExceptionGroup[Exception]", error)
        return [text for part in islice(group.exceptions, 3) for text in _raised(part)]
    try:
        return [" ".join(repr(error).split())]
    except Exception:
        return [type(error).__name__]


# --- where it is shown --------------------------------------------------------------------------


class Display:
    """The runs that are under way, and the thread that draws them where there is a terminal.

    All of rich's work for a tree is done in that thread: so a Ctrl-C, which Python raises in the
    main thread, cannot leave it half done. It lives while a run is under way. The effects write down
    what they are, under a lock that is never held while something is drawn. Only where the last run
    under way ends the effect waits, so that what the program prints next stands below its tree.
    """

    def __init__(self, console: Console | None) -> None:
        self._given = console
        self._start()
        _DISPLAYS.add(self)

    def _start(self) -> None:
        # The garbage collector may close a run in any thread at any line, here too: so one that can
        # be taken again.
        self._lock = RLock()
        self._runs: dict[str, Run] = {}
        # Those of which the final tree is not on the screen yet.
        self._ended: list[Run] = []
        self._painter: Thread | None = None
        self._wake = Event()
        # Of the last run that has waited in vain. Until it is set the terminal is taken for stopped,
        # and nobody else waits.
        self._missed = Event()
        self._missed.set()
        self._broken = False
        # What the painter met, for an effect to raise, so that it is logged.
        self._met: BaseException | None = None
        # Of the runs under way.
        self._console: Console | None = None
        self._draws = False

    def start_afresh(self) -> None:
        """Forgets, in a child of a fork, the runs of the parent and its painter, which is not there.

        What the painter held when the process was forked nobody gives back in the child: so its
        console is used no more, neither for runs nor for what is printed.
        """
        if self._painter is not None:
            for name in ("stdout", "stderr"):
                stream = getattr(sys, name)
                setattr(sys, name, getattr(stream, "rich_proxied_file", stream))
            if self._given is not None:
                self._given = Console(file=self._given.file, force_terminal=self._given.is_terminal)
        self._start()

    def begin(self, effect: Effect, token: object) -> None:
        with self._lock:
            if self._broken:
                return
            if not self._runs and self._painter is None:
                self._look_where()
            assert self._console is not None
            console = self._console
            run = self._runs.get(effect.run_id)
            if run is None:
                run = self._runs[effect.run_id] = Run(_shown(effect.run_id, console))
                run.among_others = len(self._runs) > 1
                if len(self._runs) == 2:
                    # The other one was alone until now.
                    for one in self._runs.values():
                        one.among_others = True
            node = run.begin(effect, token, _shown(effect.name, console), console.get_time())
            if self._draws and self._painter is None:
                painter = Thread(
                    target=self._paint, args=(console,), name="pysagas progress", daemon=True
                )
                try:
                    painter.start()
                except Exception:
                    self._give_up()
                    raise
                self._painter = painter
                # For a run that nobody ends: what comes after the program begins on a line of its own.
                atexit.register(self._close)
        if not self._draws and not is_step(effect) and effect.kind != "commit":
            assert node.word is not None
            self._say(run, node, node.word)

    def end(
        self,
        effect: Effect,
        token: object,
        state: StepState | SagaState | None,
        error: BaseException | None,
    ) -> None:
        errors = _raised(error)
        node: Node | None = None
        is_last = False
        with self._lock:
            run = self._runs.get(effect.run_id)
            painter = self._painter
            if run is not None:
                assert self._console is not None
                console = self._console
                try:
                    node = run.open.pop(token, None)
                    if node is not None:
                        shown = [_shown(one, console, _LONGEST_ERROR) for one in errors]
                        run.end(effect, node, state, error, shown, console.get_time())
                finally:
                    # A Ctrl-C may arrive here, too.
                    if not run.open:
                        del self._runs[effect.run_id]
                        is_last = not self._runs
                        if painter is not None:
                            self._ended.append(run)
                            self._wake.set()
        if run is not None and painter is None:
            if node is not None and not node.open and effect.kind != "group":
                word, says = run.word(node), run.says(node)
                # What a step raised that was then taken back is no error of that.
                link = (", after " if word == "taken back" else ": ") if says else ""
                self._say(run, node, f"{word} in {_time(node.took)}{link}{says}")
        elif run is not None and is_last and painter is not current_thread() and self._missed.is_set():
            assert painter is not None
            if not run.shown.wait(_PATIENCE):
                self._missed = run.shown
            else:
                # It is about to end, unless another run has begun.
                painter.join(0 if self._painter is painter else _PATIENCE)
        met, self._met = self._met, None
        if met is not None:
            raise met

    def _look_where(self) -> None:
        """Finds out where to show the run that begins, and how."""
        console = self._console = Console() if self._given is None else self._given
        self._draws = console.is_terminal and console.is_interactive
        if self._draws:
            # Where something else is drawn already, lines are printed above it. Depending on its
            # version rich refuses a second one, or draws it inside the first, and neither may
            # end before the other.
            try:
                self._draws = console.set_live(Live(console=console)) is not False
                console.clear_live()
            except LiveError:
                self._draws = False

    # --- as lines

    def _say(self, run: Run, node: Node, what: str) -> None:
        """Prints a line, without what only a terminal understands."""
        assert self._console is not None
        which = f"{run.run_id}: " if run.among_others else ""
        indent = "  " * min(run.depth(node), _DEEPEST)
        try:
            self._console.print(Text(f"{which}{indent}{node.name}: {what}"), soft_wrap=True)
        except Exception:
            self._give_up()
            raise
        except SystemExit as error:
            # So rich ends the program if nobody reads any more. The saga has to go on.
            if not isinstance(error.__context__, BrokenPipeError):
                raise
            self._give_up()
            raise _broken(error) from error

    def _give_up(self) -> None:
        with self._lock:
            self._broken = True
            self._runs.clear()
            self._ended.clear()

    def _close(self) -> None:
        """Ends the drawing, whatever is still under way."""
        with self._lock:
            self._ended += self._runs.values()
            self._runs.clear()
            self._wake.set()
            painter, ended = self._painter, [*self._ended]
        if painter is not None and all(run.shown.wait(_PATIENCE) for run in ended):
            painter.join(_PATIENCE)

    # --- as a tree, in a thread of its own

    def _paint(self, console: Console) -> None:
        last: list[Run] = []
        try:
            while True:
                # What goes into a file has to get there.
                live = Live(
                    console=console,
                    auto_refresh=False,
                    vertical_overflow="crop",
                    redirect_stdout=_is_terminal(sys.stdout),
                    redirect_stderr=_is_terminal(sys.stderr),
                )
                try:
                    with console:
                        live.start()
                        # rich hides it; a program that is killed could not show it again.
                        console.show_cursor(True)
                    self._keep_up_to_date(live, last)
                finally:
                    live.stop()
                with self._lock:
                    is_over = not self._runs and not self._ended
                    if is_over:
                        self._forget_painter()
                _tell(last)
                if is_over:
                    return
        except BaseException as error:
            # In a thread of its own nobody else could take it, whatever it is.
            with self._lock:
                last += self._ended
                self._give_up()
                self._forget_painter()
                self._met = error if isinstance(error, Exception) else _broken(error)
            _tell(last)

    def _forget_painter(self) -> None:
        self._painter = None
        atexit.unregister(self._close)

    def _keep_up_to_date(self, live: Live, last: list[Run]) -> None:
        """Draws until no run is under way.

        Args:
            live: What draws.
            last: For those that have just ended. They are told later than the others: when nothing
                is drawn any more.
        """
        console = live.console
        while True:
            most = max(2, console.height - 1)
            with self._lock:
                last[:] = self._ended[:_AT_ONCE]
                del self._ended[:_AT_ONCE]
                if not self._ended:
                    self._wake.clear()
                is_over = not self._runs and not self._ended
                lines = _trees([*self._runs.values()], console, most)
            finals = [line for run in last for line in _tree(run, console, most, whole=True)]
            if is_over:
                live.update(Group(*finals))  # which stays when it is stopped
                return
            live.update(Group(*lines), refresh=True)
            if finals:
                console.print(Group(*finals))
            _tell(last)
            self._wake.wait(1 / _RATE)


def _tell(runs: list[Run]) -> None:
    for run in runs:
        run.shown.set()


def _is_terminal(stream: object) -> bool:
    """Tells it of ``sys.stdout``, which a program may have closed, or set to anything."""
    try:
        return bool(stream.isatty())  # type: ignore[attr-defined]
    except Exception:
        return False


def _broken(error: BaseException) -> Exception:
    """Makes what an observer may raise of an end of the program."""
    broken = BrokenPipeError("nobody reads any more what the progress is written to")
    broken.__cause__ = error
    return broken


_DISPLAYS: Final[WeakSet[Display]] = WeakSet()


def _start_afresh() -> None:
    for display in _DISPLAYS:
        display.start_afresh()


if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has no fork
    os.register_at_fork(after_in_child=_start_afresh)
