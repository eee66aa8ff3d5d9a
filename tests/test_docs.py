"""Every code block of every document runs, every command is a known one, every link leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sybil import Document
from sybil.parsers.markdown import PythonCodeBlockParser

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [
        *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
        *(ROOT / "docs").rglob("*.md"),
    ]
)
EACH_DOCUMENT = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS]
)

# Markdown allows more (tildes, fences in lists and quotes); a document that needs it changes this.
FENCE = re.compile(r"^```(?P<language>[^\n]*)\n(?P<source>.*?)^```$", re.MULTILINE | re.DOTALL)
INVISIBLE = re.compile(r"^<!--- invisible-code-block: python$", re.MULTILINE)

# What a line of a shell block may be. `&&` joins several.
COMMANDS = re.compile(
    r"python3 -m venv \.venv"
    r"|\.venv/bin/pip install (--upgrade pip|nox|-e \.|\.|\"\.\[(cli|durable|testing|trio)\]\")( --group \w+)*"
    r"|\.venv/bin/python -m pysagas"
    r"|\.venv/bin/pysagas (demo|list|show|recover|retry|prune)( [\w.:-]+)*"
    r"|\.venv/bin/nox -s [\w-]+( [\w-]+)*( -- .+)?"
)


def blocks(path: Path) -> list[tuple[int, str, str]]:
    """Line, language and source of each fenced block."""
    text = path.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, fence.start()) + 1, fence["language"], fence["source"])
        for fence in FENCE.finditer(text)
    ]


def anchors(path: Path) -> set[str]:
    """The fragments by which a document's headings are linked to."""
    prose = FENCE.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_there_are_documents():
    assert {"README.md", "guarantees.md", "tutorial.md"} <= {path.name for path in DOCUMENTS}


@EACH_DOCUMENT
def test_every_example_runs(path):
    document = Document.parse(str(path), PythonCodeBlockParser())
    # As in a file that is run: so that `if __name__ == "__main__"` of an example holds.
    document.namespace["__name__"] = "__main__"
    document.namespace["__file__"] = str(path)
    examples = list(document.examples())
    visible = [language for _, language, _ in blocks(path)].count("python")
    invisible = len(INVISIBLE.findall(path.read_text(encoding="utf-8")))
    assert len(examples) == visible + invisible
    for example in examples:
        example.evaluate()


@EACH_DOCUMENT
def test_every_block_is_python_or_a_known_command_or_text(path):
    wrong = []
    for line, language, source in blocks(path):
        if language == "sh":
            wrong += [
                f"{path.name}:{line}: {command!r} is not in the list of commands"
                for one_line in source.splitlines()
                for command in one_line.split(" && ")
                if not COMMANDS.fullmatch(command)
            ]
        elif language not in ("python", "text"):
            wrong.append(f"{path.name}:{line}: a block must be python, sh or text, not {language!r}")
    assert not wrong, "\n".join(wrong)


@EACH_DOCUMENT
def test_every_fence_is_found(path):
    text = path.read_text(encoding="utf-8")
    assert len(re.findall(r"```|~~~", text)) == 2 * len(blocks(path))


@EACH_DOCUMENT
def test_every_link_leads_somewhere(path):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", path.read_text(encoding="utf-8"))):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_the_index_names_every_document():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    missing = [
        str(path.relative_to(ROOT / "docs"))
        for path in DOCUMENTS
        if (ROOT / "docs") in path.parents
        and path.name != "README.md"
        and f"]({path.relative_to(ROOT / 'docs').as_posix()})" not in index
    ]
    assert not missing


def test_the_readme_marks_one_command_that_runs_the_tests():
    """So that a machine can take it out of the README and run it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [command] = re.findall(r"<!-- test-command -->\n+```sh\n([^\n]+)\n```", text)
    assert command == ("python3 -m venv .venv && .venv/bin/pip install nox && .venv/bin/nox -s tests")


def test_a_block_of_another_language_is_refused(tmp_path):
    document = tmp_path / "bad.md"
    document.write_text("```yaml\na: 1\n```\n\n```sh\nrm -rf .venv\n```\n\n```\nnothing\n```\n")
    with pytest.raises(AssertionError) as caught:
        test_every_block_is_python_or_a_known_command_or_text(document)
    assert "'yaml'" in str(caught.value)
    assert "rm -rf" in str(caught.value)
    assert "not ''" in str(caught.value)


def test_an_example_that_is_wrong_is_found(tmp_path):
    document = tmp_path / "bad.md"
    document.write_text("```python\nassert 1 + 1 == 3\n```\n")
    with pytest.raises(AssertionError):
        test_every_example_runs(document)


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    document = tmp_path / "bad.md"
    document.write_text("# A title\n\n[here](#a-title) [gone](#another) [lost](lost.md)\n")
    with pytest.raises(AssertionError) as caught:
        test_every_link_leads_somewhere(document)
    assert "['#another', 'lost.md']" in str(caught.value)
