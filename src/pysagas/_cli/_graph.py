"""Draws a run as far as its history goes, or a definition."""

from __future__ import annotations

from collections.abc import Iterable

from pysagas import TreeNode
from pysagas.diagrams._flowchart import flowchart
from pysagas.durable import Event, EventKind, RunInfo

from ._app import AnySaga
from ._runs import State, state_of
from ._steps import step_lines

__all__ = ["graph_of_run"]


def graph_of_run(info: RunInfo, events: Iterable[Event], saga: AnySaga | None) -> str:
    """Draws a run, under way or ended.

    Args:
        info: Which run.
        events: Its history.
        saga: Its saga. None where nobody gives it: then what holds steps is drawn as a box, without
            what takes a step back.
    """
    events = list(events)
    lines = step_lines(events, running=state_of(info) is State.RUNNING)
    states = {line.path: line.state for line in lines if line.kind == "step"}
    known = saga is not None and saga.function is None
    tree = saga.tree if saga is not None and known else _tree_of(info, events)
    passed = {event.path for event in events if event.kind is EventKind.COMMITTED}
    for node in tree:
        if node.kind == "step":
            states.setdefault(node.path, "not started")
    states[()] = state_of(info).value
    went_wrong = [line for line in lines if line.kind == "step" and line.error is not None]
    failed = {line.path for line in went_wrong if line.state != "compensation failed"}
    return flowchart((node._replace(passed=node.path in passed) for node in tree), states, failed)


def _tree_of(info: RunInfo, events: Iterable[Event]) -> list[TreeNode]:
    """Gives the places that a history names; what is around steps has its name where it has ended."""
    nodes: dict[tuple[int, ...], TreeNode] = {(): TreeNode("saga", info.saga, ())}
    for event in events:
        path = event.path
        for depth in range(1, len(path)):
            nodes.setdefault(path[:depth], TreeNode("part", "part", path[:depth]))
        if event.kind is EventKind.COMMITTED:
            nodes[path] = TreeNode("commit", event.name, path)
        elif event.kind in (EventKind.STARTED, EventKind.COMPENSATING):
            nodes[path] = TreeNode("step", event.name, path)
        elif path in nodes and nodes[path].kind == "part":
            nodes[path] = TreeNode("part", event.name, path)
    return [nodes[path] for path in sorted(nodes)]
