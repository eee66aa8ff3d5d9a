"""docs/explanation/architecture.md names code and tests that exist, and every layer of the core."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
from test_api import LAYERS
from test_docs_guarantees import functions

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "explanation" / "architecture.md").read_text(encoding="utf-8")

# `_run.conclude`, `durable._writer.Writer`: what stands in `pysagas`.
PACKAGE = "(?:durable|engines|observe|testing)"
NAME = rf"(?<![\w./])((?:{PACKAGE}\.)?_\w+(?:\.\w+)*|{PACKAGE}\.\w+(?:\.\w+)*)"
NAMES = sorted(set(re.findall(NAME, TEXT)))


def find(name: str) -> object:
    """What a name of the page stands for."""
    parts = name.split(".")
    found = import_module("pysagas")
    for depth, part in enumerate(parts, start=1):
        try:
            found = getattr(found, part)
        except AttributeError:
            found = import_module(".".join(["pysagas", *parts[:depth]]))
    return found


def test_the_page_names_code():
    assert {"_scope.SagaScope.step", "_effects.through", "durable._storage.Storage"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_code_exists(name):
    assert find(name) is not None


@pytest.mark.parametrize("name", ["_scope.SagaScope.stop", "_scoop", "durable._storage.Storage._lose"])
def test_a_name_that_does_not_exist_is_found(name):
    with pytest.raises(ImportError):
        find(name)


def test_every_test_that_is_named_exists():
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", TEXT)
    assert len(named) > 10
    assert [f"{file}::{name}" for file, name in named if name not in functions(ROOT / file)] == []


def test_every_file_that_is_named_exists():
    named = set(re.findall(r"`((?:tests|benchmarks)/[\w./]+)`", TEXT))
    assert named
    assert [file for file in named if not (ROOT / file).exists()] == []


def test_the_layers_stand_in_their_order():
    table = TEXT.partition("\n## The layers\n")[2].partition("\nBeside the core")[0]
    assert re.findall(r"^\| `(\w+)` ", table, re.MULTILINE) == LAYERS
