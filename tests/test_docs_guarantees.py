"""docs/reference/guarantees.md says all guarantees, and the tests that it names exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "reference" / "guarantees.md").read_text(encoding="utf-8")
# The sections by number: "## G7. Title", up to the next heading.
SECTIONS = dict(re.findall(r"^## ([GD]\d+)\. (.+?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
ALL = [*(f"G{number}" for number in range(1, 16)), *(f"D{number}" for number in range(1, 10))]


@cache
def functions(path: Path) -> set[str]:
    """The names of the test functions of a file, those in classes included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_every_guarantee_has_a_section_in_order():
    assert list(SECTIONS) == ALL


@pytest.mark.parametrize("number", ALL)
def test_every_guarantee_names_tests_that_exist(number):
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", SECTIONS[number])
    assert named, f"{number} names no test"
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not (ROOT / file).exists() or name not in functions(ROOT / file)
    ]
    assert not missing
