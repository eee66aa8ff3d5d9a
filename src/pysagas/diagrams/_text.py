"""Names, as a picture may show them: they can hold anything."""

from __future__ import annotations

from collections.abc import Callable

from pysagas import TreeNode

__all__ = ["called", "label", "plain"]

_LONGEST_NAME = 40

# Besides letters and digits: what means nothing to Mermaid, to its Markdown, or to HTML.
_LITERAL = " _-.,()"


def plain(name: str) -> str:
    """Gives a name of one line, not too long, of characters that can be seen."""
    if len(name) > _LONGEST_NAME:
        return plain(name[: _LONGEST_NAME - 1]) + "…"
    return "".join(map(_seen, name))


def label(name: str) -> str:
    """Gives a name as Mermaid shows it literally: without markup, HTML, or the end of a label."""
    return "".join(map(_coded, plain(name)))


def called(node: TreeNode, shown: Callable[[str], str]) -> str:
    """Gives what a place is called; a group that has a name is said to be one."""
    # What is given no name is called by what it is.
    named = node.kind == "group" and node.name != "parallel"
    return f"parallel: {shown(node.name)}" if named else shown(node.name)


def _seen(character: str) -> str:
    if character == "\n":
        return "↵"
    if character.isspace():
        return " "
    return character if character.isprintable() else "\N{REPLACEMENT CHARACTER}"


def _coded(character: str) -> str:
    literal = character.isalnum() or character in _LITERAL or character in "↵…\N{REPLACEMENT CHARACTER}"
    return character if literal else f"#{ord(character)};"
