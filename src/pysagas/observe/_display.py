"""Where progress is shown: a tree that is drawn again and again, or lines. All that needs rich."""

from __future__ import annotations

import atexit
import sys
from itertools import islice
from threading import Event, RLock, Thread, current_thread
from typing import Final, NamedTuple, cast

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group
from rich.errors import LiveError
from rich.live import Live
from rich.text import Text

from pysagas import Effect, SagaState, StepState

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
# Seconds for which a run waits for its drawing: a terminal may be stopped, and a saga must not be.
_PATIENCE = 1.0
# Characters of a name or an error. No terminal is that wide, and measuring a text takes time.
_LONGEST = 240
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


def _tree(run: Run, console: Console, most: int) -> list[Text]:
    now = console.get_time()
    ascii_only = console.options.ascii_only
    spinner = _SPINNER[ascii_only]
    frame = spinner[int(now * _RATE) % len(spinner)]
    nodes, rest = run.choose(most)
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
            f"  {detail}" if detail else "",
        )
        lines.append(line)
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


def _shown(text: str, console: Console) -> str:
    """Keeps a name or an error from moving the cursor, and to what the terminal can show."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - 3]}..."
    text = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
    return text.encode(console.encoding, "backslashreplace").decode(console.encoding)


def _raised(error: BaseException | None) -> list[str]:
    """What an exception says; nothing for an interruption, of which the word says all."""
    if not isinstance(error, Exception):
        return []
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
    what they are, under a lock that is never held while something is drawn; one that begins a run,
    or ends it, waits until that is to be seen.
    """

    def __init__(self, console: Console | None) -> None:
        self._given = console
        # The garbage collector may close a run in any thread at any line, here too: so one that can
        # be taken again.
        self._lock = RLock()
        self._runs: dict[str, Run] = {}
        # Those of which the final tree is not on the screen yet.
        self._ended: list[Run] = []
        self._painter: Thread | None = None
        self._wake = Event()
        # Whether somebody has waited in vain: a terminal may be stopped, and nobody waits for it again.
        self._stuck = False
        self._broken = False
        # What the painter met, for an effect to raise, so that it is logged.
        self._met: BaseException | None = None
        # Of the runs under way.
        self._console: Console | None = None
        self._draws = False

    def begin(self, effect: Effect, token: object) -> None:
        started: Event | None = None
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
                if len(self._runs) > 1:
                    for one in self._runs.values():
                        one.among_others = True
            node = run.begin(effect, token, _shown(effect.name, console), console.get_time())
            if self._draws and self._painter is None:
                self._wake.clear()
                started = Event()
                painter = Thread(
                    target=self._paint, args=(console, started), name="pysagas progress", daemon=True
                )
                try:
                    painter.start()
                except Exception:
                    self._give_up()
                    raise
                self._painter = painter
                # For a run that nobody ends: a program must not leave a terminal without cursor.
                atexit.register(self._close)
        if started is not None:
            self._stuck = not started.wait(_PATIENCE)
        elif not self._draws and not is_step(effect) and effect.kind != "commit":
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
        with self._lock:
            run = self._runs.get(effect.run_id)
            painter = self._painter
            if run is not None:
                assert self._console is not None
                console = self._console
                try:
                    node = run.open.pop(token, None)
                    if node is not None:
                        shown = [_shown(one, console) for one in errors]
                        run.end(effect, node, state, error, shown, console.get_time())
                finally:
                    # A Ctrl-C may arrive here, too.
                    if not run.open:
                        del self._runs[effect.run_id]
                        if painter is not None:
                            self._ended.append(run)
                            self._wake.set()
        if run is not None and painter is None:
            if node is not None and not node.open and effect.kind != "group":
                says = run.says(node)
                self._say(run, node, f"{run.word(node)} in {_time(node.took)}{says and ': '}{says}")
        elif run is not None and not run.open and painter is not current_thread():
            assert painter is not None
            # Only who is the last waits: while others are under way it will be drawn soon enough.
            if not self._runs and not self._stuck:
                self._stuck = not run.shown.wait(_PATIENCE)
            if not self._stuck and self._painter is not painter:
                painter.join(_PATIENCE)
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
            painter = self._painter
        if painter is not None:
            painter.join(_PATIENCE)

    # --- as a tree, in a thread of its own

    def _paint(self, console: Console, started: Event) -> None:
        last: list[Run] = []
        try:
            while True:
                live = Live(
                    console=console,
                    auto_refresh=False,
                    vertical_overflow="crop",
                    # What goes to a file has to get there, though the tree stands on a terminal.
                    redirect_stdout=_is_terminal(sys.stdout),
                    redirect_stderr=_is_terminal(sys.stderr),
                )
                try:
                    live.start()
                except BaseException:
                    # All that it had done: `stop` would undo more than that.
                    console.clear_live()
                    raise
                try:
                    self._keep_up_to_date(live, last, started)
                finally:
                    live.stop()
                with self._lock:
                    if not self._runs and not self._ended:
                        self._forget_painter()
                        return
                for run in last:
                    run.shown.set()
        except BaseException as error:
            # In a thread of its own nobody else could take it, whatever it is.
            with self._lock:
                last += self._ended
                self._give_up()
                self._forget_painter()
                self._met = error if isinstance(error, Exception) else _broken(error)
        finally:
            started.set()
            for run in last:
                run.shown.set()

    def _forget_painter(self) -> None:
        self._painter = None
        atexit.unregister(self._close)

    def _keep_up_to_date(self, live: Live, last: list[Run], started: Event) -> None:
        """Draws until no run is under way.

        Args:
            live: What draws.
            last: For those that have just ended. They are told later than the others: when the
                cursor is there again.
            started: To be set when something has been drawn: what an action prints while that is
                being written would tear it.
        """
        console = live.console
        while True:
            most = max(2, console.height - 1)
            with self._lock:
                self._wake.clear()
                last[:], self._ended = self._ended, []
                finals = [line for run in last for line in _tree(run, console, most)]
                runs = [*self._runs.values()]
                lines = _trees(runs, console, most)
            if not runs:
                live.update(Group(*finals))  # which stays when it is stopped
                return
            live.update(Group(*lines), refresh=True)
            started.set()
            if finals:
                console.print(Group(*finals))
            for run in last:
                run.shown.set()
            self._wake.wait(1 / _RATE)


def _is_terminal(stream: object) -> bool:
    isatty = getattr(stream, "isatty", None)
    return isatty is not None and bool(isatty())


def _broken(error: BaseException) -> Exception:
    """Makes what an observer may raise of an end of the program."""
    broken = BrokenPipeError("nobody reads any more what the progress is written to")
    broken.__cause__ = error
    return broken
