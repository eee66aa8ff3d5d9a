"""Every code block of every document runs, every command is a known one, every link leads somewhere."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import pytest
from sybil import Document
from sybil.parsers.markdown import PythonCodeBlockParser

import pysagas

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [
        *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
        *(ROOT / "docs").rglob("*.md"),
    ]
)
DOCS = ROOT / "docs"
INDEX = DOCS / "index.md"
# What only the site understands, and where it is allowed; elsewhere these would be shown as they stand.
FOR_THE_SITE = {("{toctree}", DOCS), ("{eval-rst}", DOCS / "reference")}
EACH_DOCUMENT = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS]
)

# Markdown allows more (tildes, fences in lists and quotes); a document that needs it changes this.
FENCE = re.compile(r"^```(?P<language>[^\n]*)\n(?P<source>.*?)^```$", re.MULTILINE | re.DOTALL)
INVISIBLE = re.compile(r"^<!--- invisible-code-block: python$", re.MULTILINE)

# What a line of a shell block may be. `&&` joins several.
COMMANDS = re.compile(
    r"python3 -m venv \.venv"
    r"|\.venv/bin/pip install (--upgrade pip|nox|-e \.|\.|\"\.\[(cli|durable|opentelemetry|progress|restate|testing|trio)\]\")( hypercorn| fastapi uvicorn)?( --group \w+)*"
    r"|npm install --ignore-scripts @restatedev/restate-server"
    r"|\.venv/bin/python -m pysagas"
    r"|\.venv/bin/pysagas (demo|list|show|watch|graph|recover|retry|prune)( [\w.:-]+)*"
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
    assert {"README.md", "guarantees.md", "booking-a-trip.md"} <= {path.name for path in DOCUMENTS}


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
        elif (
            language not in ("python", "text", "mermaid")
            and (language, path.parent) not in FOR_THE_SITE
        ):
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
    """Twice: with a link to it, and in the list of pages of which the site makes its navigation."""
    index = INDEX.read_text(encoding="utf-8")
    lists = "".join(source for _, language, source in blocks(INDEX) if language == "{toctree}")
    pages = [
        path.relative_to(DOCS).with_suffix("").as_posix()
        for path in DOCUMENTS
        if DOCS in path.parents and path != INDEX
    ]
    assert [page for page in pages if f"]({page}.md)" not in index] == []
    assert sorted(re.findall(r"[\w-]+/[\w.-]+", lists)) == sorted(pages)


def test_every_document_is_of_one_kind():
    """Each stands in one of the folders of Diátaxis."""
    kinds = {path.relative_to(DOCS).parts[0] for path in DOCUMENTS if DOCS in path.parents}
    assert kinds == {"index.md", "tutorials", "how-to", "reference", "explanation"}


def test_the_reference_has_every_public_name():
    """Each name of the modules that users import from is in the reference, under that module."""
    documented = set()
    for path in sorted((DOCS / "reference").glob("*.md")):
        module = None
        for _, language, source in blocks(path):
            if language == "{eval-rst}":
                for directive, name in re.findall(r"^\.\. (\w+):: ([\w.]+)", source, re.MULTILINE):
                    if directive in ("module", "currentmodule"):
                        module = name
                    elif directive == "automodule":
                        documented |= {f"{name}.{one}" for one in import_module(name).__all__}
                    else:
                        documented.add(f"{module}.{name}")
    assert documented == {
        f"{module.__name__}.{name}" for module in public_modules() for name in module.__all__
    }


def public_modules():
    """Those that have names, and none of whose own names is private. (The demo is no library.)"""
    for info in walk_packages(pysagas.__path__, "pysagas."):
        if "._" not in info.name and info.name != "pysagas.demo":
            module = import_module(info.name)
            if hasattr(module, "__all__"):
                yield module
    yield pysagas


def test_the_readme_marks_one_command_that_runs_the_tests():
    """So that a machine can take it out of the README and run it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [command] = re.findall(r"<!-- test-command -->\n+```sh\n([^\n]+)\n```", text)
    assert command == ("python3 -m venv .venv && .venv/bin/pip install nox && .venv/bin/nox -s tests")


def test_a_block_of_another_language_is_refused(tmp_path):
    document = tmp_path / "bad.md"
    document.write_text(
        "```yaml\na: 1\n```\n\n```sh\nrm -rf .venv\n```\n\n```\nnothing\n```\n\n"
        "```{eval-rst}\n.. note::\n```\n"
    )
    with pytest.raises(AssertionError) as caught:
        test_every_block_is_python_or_a_known_command_or_text(document)
    assert "'yaml'" in str(caught.value)
    assert "rm -rf" in str(caught.value)
    assert "not ''" in str(caught.value)
    assert "'{eval-rst}'" in str(caught.value)


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
