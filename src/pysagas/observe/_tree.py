"""What is known of the runs whose progress is shown: a tree for each, and of what lines it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from threading import Event
from typing import Final, Literal, get_args

from pysagas import Effect, SagaState, StepState

__all__ = ["Node", "Run", "Word", "is_step"]

Path = tuple[int, ...]
Word = Literal[
    "running",
    "being taken back",
    "could not be taken back",
    "failed",
    "interrupted",
    "taken back",
    "done",
]
WORDS: Final[tuple[Word, ...]] = get_args(Word)


class Node:
    """A saga, a group or a step; or what a rollback takes back."""

    __slots__ = (
        "back",
        "begun",
        "counted",
        "detail",
        "in_doubt",
        "name",
        "open",
        "path",
        "took",
        "word",
    )

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        # None before the first effect.
        self.word: Word | None = None
        # The word by which it counts as a step of what is around it.
        self.counted: Word | None = None
        # How many steps in it had been taken back, or not, when it ended.
        self.back = 0
        # What it raised.
        self.detail = ""
        # Whether its action may have taken effect, though it raised.
        self.in_doubt = False
        # How many effects of it are under way: a saga and its rollback.
        self.open = 0
        self.begun = 0.0
        self.took = 0.0


class Run:
    """What one run does, as far as its effects tell."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.nodes: dict[Path, Node] = {}
        self.open: dict[object, Node] = {}
        # The nodes by their word, the latest last. So what is shown of 10,000 need not be searched.
        self.by_word: dict[Word, dict[Path, Node]] = {word: {} for word in WORDS}
        # How many steps are in each state, at any depth below a path.
        self.below: dict[Path, Counter[Word]] = {}
        # The errors that a step has shown: what is around it failed for the same reason.
        self.told: set[str] = set()
        # Whether another one was under way meanwhile: then it is shown which is which.
        self.among_others = False
        # Set when its final tree is on the screen, or never will be.
        self.shown = Event()

    def begin(self, effect: Effect, token: object, name: str, now: float) -> Node:
        node = self.nodes.get(effect.path)
        if node is None:
            node = self.nodes[effect.path] = Node(name, effect.path)
        self.open[token] = node
        node.open += 1
        if node.open == 1:
            node.begun = now
        goes_back = effect.kind in ("rollback", "compensation")
        self._put(node, "being taken back" if goes_back else "running", is_step(effect))
        return node

    def end(
        self,
        effect: Effect,
        node: Node,
        state: StepState | SagaState | None,
        error: BaseException | None,
        errors: list[str],
        now: float,
    ) -> None:
        node.open -= 1
        node.took = now - node.begun
        new = [one for one in errors if is_step(effect) or one not in self.told]
        if new:
            node.detail = ", ".join(new)
            self.told.update(new)
        node.in_doubt = state is StepState.UNKNOWN
        below = self.below.get(node.path, Counter[Word]())
        word: Word
        if effect.kind == "rollback":
            if node.word != "being taken back":
                return  # of a step, whose compensation has said how that ended
            not_back = error is not None or below["could not be taken back"]
            word = "could not be taken back" if not_back else "taken back"
        elif effect.kind == "compensation":
            word = "could not be taken back" if error is not None else "taken back"
        elif error is None:
            word = "done"
        elif state is SagaState.COMPENSATED:
            word = "taken back"
        elif state is SagaState.FAILED and below["could not be taken back"]:
            word = "could not be taken back"
        else:
            word = "failed" if isinstance(error, Exception) else "interrupted"
        self._put(node, word, is_step(effect))
        node.back = _gone_back(below)

    def _put(self, node: Node, word: Word, is_step: bool) -> None:
        was = node.word
        if was is not None:
            self.by_word[was].pop(node.path, None)
        node.word = word
        self.by_word[word][node.path] = node
        if is_step or node.counted is not None:
            for length in range(len(node.path)):
                below = self.below.setdefault(node.path[:length], Counter())
                below[word] += 1
                if node.counted is not None:
                    below[node.counted] -= 1
            node.counted = word

    def word(self, node: Node) -> Word:
        """Gives the word for a node: what has ended may be taken back by what is around it."""
        assert node.word is not None
        below = self.below.get(node.path)
        if node.open or below is None or _gone_back(below) == node.back:
            return node.word
        goes_back = self.by_word["being taken back"]
        if below["being taken back"] or (below["taken back"] and below["done"] and goes_back):
            return "being taken back"
        if below["could not be taken back"]:
            return "could not be taken back"
        return "taken back" if below["taken back"] else node.word

    def says(self, node: Node) -> str:
        """What more there is to say of a node."""
        if not node.in_doubt or node.word not in ("failed", "interrupted"):
            return node.detail
        return f"in doubt: {node.detail}" if node.detail else "in doubt"

    def depth(self, node: Node) -> int:
        """How many of the nodes around it are known: a nested scope has no effect of its own."""
        return sum(node.path[:length] in self.nodes for length in range(len(node.path)))

    def choose(self, most: int) -> tuple[list[Node], str]:
        """Chooses the lines that matter: what is under way and around it, failures, the latest.

        Returns:
            The nodes, in the order of the tree; and a line that counts the others, if any.
        """
        if len(self.nodes) <= most:
            return sorted(self.nodes.values(), key=_path), ""
        room = max(1, most - 1)
        words = self.by_word
        under_way = [
            *islice(chain(words["being taken back"].values(), words["running"].values()), room)
        ]
        candidates: Iterator[Node] = chain(
            islice(self.nodes.values(), 1),
            # Of a thousand at the same time not all: a failure must be seen, too.
            under_way[: max(1, room * 2 // 3)],
            words["could not be taken back"].values(),
            words["failed"].values(),
            words["interrupted"].values(),
            under_way,
            reversed(words["taken back"].values()),
            reversed(words["done"].values()),
        )
        chosen: dict[Path, Node] = {}
        for node in candidates:
            around = (node.path[:length] for length in range(len(node.path) + 1))
            needed = [path for path in around if path in self.nodes and path not in chosen]
            if len(chosen) + len(needed) > room:
                break
            chosen |= {path: self.nodes[path] for path in needed}
        if most == room:
            return [*chosen.values()], ""
        hidden = Counter({word: len(nodes) for word, nodes in words.items()})
        hidden.subtract(node.word for node in chosen.values() if node.word is not None)
        counts = ", ".join(f"{count} {word}" for word, count in hidden.items() if count)
        return sorted(chosen.values(), key=_path), f"and {sum(hidden.values())} more: {counts}"


def _path(node: Node) -> Path:
    return node.path


def _gone_back(below: Counter[Word]) -> int:
    return below["being taken back"] + below["could not be taken back"] + below["taken back"]


def is_step(effect: Effect) -> bool:
    return effect.kind in ("action", "compensation")
