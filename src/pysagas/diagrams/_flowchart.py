"""Draws a saga, or what became of one, as a Mermaid flowchart.

Steps stand one below the other, members of a parallel group side by side; dotted lines lead to what
takes a step back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from pysagas import Outcome, Saga, TreeNode

from ._text import called, label

__all__ = ["flowchart", "mermaid"]

_Inner = dict[tuple[int, ...], list[TreeNode]]
# For each place how it stands, in words.
_States = Mapping[tuple[int, ...], str]
_Failed = Collection[tuple[int, ...]]

# Each has its own fill, border and text, so that it is legible on light pages and on dark ones. The
# state is written out too, for whoever does not tell the colours apart.
_WRONG = "fill:#ffd6d3,stroke:#cf222e,color:#67060c,stroke-width:4px"
_DOUBT = "fill:#fff1c2,stroke:#bf8700,color:#4d3300,stroke-width:3px,stroke-dasharray:8 4"
_UNDER_WAY = "fill:#e8dff5,stroke:#8250df,color:#3e1f79,stroke-width:3px"
_STYLES = {
    "not started": "fill:#ffffff,stroke:#8c959f,color:#57606a,stroke-dasharray:3 3",
    "running": _UNDER_WAY,
    "completed": "fill:#d1f0d9,stroke:#1a7f37,color:#0b3d1c",
    "not applied": "fill:#e6e6e6,stroke:#57606a,color:#24292f",
    "unknown": _DOUBT,
    "interrupted": _DOUBT,
    "compensating": _UNDER_WAY,
    "compensated": "fill:#d6e8fb,stroke:#0969da,color:#0a2f5c",
    "compensation failed": _WRONG,
    "failed": _WRONG,
}
_BACK = "fill:#f6f8fa,stroke:#8c959f,color:#24292f,stroke-dasharray:2 2"
_COMMIT = "fill:#24292f,stroke:#8c959f,color:#ffffff"


def mermaid(drawn: Saga[..., Any] | Outcome[Any]) -> str:
    """Draws a saga, or the outcome of a run, as a Mermaid flowchart.

    The two have the same shape; in that of an outcome each step has the colour of its state. The
    steps of a saga written as a function are known only from an outcome.

    Args:
        drawn: The saga or the outcome. It holds all that is drawn: names, of steps and of the
            functions that take them back, and states; no arguments, results or errors.

    Returns:
        The flowchart, the same each time. (Mermaid draws up to 500 lines between nodes, three for
        a step, unless its ``maxEdges`` says otherwise.)

    Raises:
        TypeError: It is something else.
    """
    states: dict[tuple[int, ...], str] = {}
    failed: set[tuple[int, ...]] = set()
    if isinstance(drawn, Outcome):
        states = {(): drawn.state.value, **{step.path: step.state.value for step in drawn.steps}}
        failed = {step.path for step in drawn.steps if isinstance(step.error, Exception)}
    elif not isinstance(drawn, Saga):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"mermaid draws a Saga or an Outcome, not {drawn!r}")
    return flowchart(drawn.tree, states, failed)


def flowchart(tree: Iterable[TreeNode], states: _States, failed: _Failed) -> str:
    """Draws a tree as a Mermaid flowchart.

    Args:
        tree: Its places, in the order of their paths, the saga itself first.
        states: How each stands, in words; of a definition, where nothing has run, empty.
        failed: The steps whose action raised, whatever became of them then.
    """
    tree = list(tree)
    inner: _Inner = {node.path: [] for node in tree}
    for node in tree[1:]:
        inner[node.path[:-1]].append(node)
    lines = ["flowchart TB"]
    for node in (tree[0], *inner[()]):
        lines += [f"  {line}" for line in _nodes(node, inner, states, failed)]
    # After all boxes: Mermaid puts a node into the box in which it is first named.
    for node in tree:
        lines += [f"  {edge}" for edge in _edges(node, inner[node.path])]
    shown = {*states.values(), *(["not started"] if states else [])}
    lines += [f"  classDef {_class(word)} {_STYLES[word]}" for word in _STYLES if word in shown]
    lines += [f"  classDef back {_BACK}", f"  classDef commit {_COMMIT}"]
    return "\n".join(lines) + "\n"


def _nodes(node: TreeNode, inner: _Inner, states: _States, failed: _Failed) -> Iterator[str]:
    """Yields the lines of a place; of one that holds others, a box with all that is in it."""
    state = states.get(node.path)
    text = called(node, label)
    if inner[node.path] and node.path:
        yield f'subgraph {_id(node)}["{text}"]'
        yield "  direction TB"  # else Mermaid turns a box within a box by a quarter
        for part in inner[node.path]:
            yield from (f"  {line}" for line in _nodes(part, inner, states, failed))
        yield "end"
        return
    mark = ""
    if node.kind == "commit":
        passed = node.passed or not states
        mark = ":::commit" if passed else f":::{_class('not started')}"
        text += "" if passed else "<br/>not passed"
    elif state is not None:
        mark = f":::{_class(state)}"
        text += f"<br/>failed, {state}" if node.path in failed else f"<br/>{state}"
    begin, end = _shape(node, inner)
    yield f'{_id(node)}{begin}"{text}"{end}{mark}'
    ways = [
        f"{kind}: {label(way)}"
        for kind, way in (("undo", node.undo), ("compensation", node.compensation))
        if way is not None
    ]
    if ways:
        yield f'{_id(node)}_back(["{"<br/>".join(ways)}"]):::back'


def _shape(node: TreeNode, inner: _Inner) -> tuple[str, str]:
    if node.kind == "commit":
        return "{{", "}}"
    if node.kind == "step":
        return "[", "]"
    # The start of all; or what holds nothing, or nobody knows yet what.
    return ("([", "])") if inner[node.path] else ("[[", "]]")


def _edges(node: TreeNode, inner: list[TreeNode]) -> Iterator[str]:
    """Yields the lines that join what is in a sequence, and the one from a step to its way back."""
    if _has_way_back(node):
        yield f"{_id(node)} -.-> {_id(node)}_back"
    if node.kind in ("saga", "scope"):
        start = [] if node.path else [node]
        for before, after in pairwise([*start, *inner]):
            yield f"{_id(before)} --> {_id(after)}"
            # A line that is not drawn: it keeps the ways back in a column. Without it each step is
            # put a little to the side of the one before, and a long saga becomes a wide picture.
            if _has_way_back(before) and _has_way_back(after):
                yield f"{_id(before)}_back ~~~ {_id(after)}_back"


def _has_way_back(node: TreeNode) -> bool:
    return node.undo is not None or node.compensation is not None


def _class(state: str) -> str:
    return state.replace(" ", "_")


def _id(node: TreeNode) -> str:
    return "_".join(["n", *map(str, node.path)])
