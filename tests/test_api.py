"""The public surface, and the layers below it."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import pysagas
import pysagas.diagrams
import pysagas.durable
import pysagas.engines.restate
import pysagas.observe.logging
import pysagas.observe.opentelemetry
import pysagas.observe.progress
import pysagas.observe.timing
import pysagas.testing
import pysagas.testing.conformance
import sagas

SOURCES = Path(pysagas.__file__).parent

# Each module imports only from those above it.
LAYERS = [
    "_errors",
    "_signatures",
    "_outcome",
    "_effects",
    "_shelter",
    "_checks",
    "_attempts",
    "_definitions",
    "_log",
    "_rollback",
    "_forward",
    "_run",
    "_scope",
    "_saga",
]

# What the library is made of; everything else in the package uses public names only.
CORE = {*LAYERS, "__init__"}

PROMISED = {
    "AlreadyCommitted",
    "CallNext",
    "Commit",
    "CompensationFailed",
    "Effect",
    "Middleware",
    "MiddlewareError",
    "Outcome",
    "Parallel",
    "Ran",
    "Saga",
    "SagaBuilder",
    "SagaDefinitionError",
    "SagaError",
    "SagaScope",
    "SagaState",
    "ScopeBusy",
    "ScopeClosed",
    "Step",
    "StepReport",
    "StepState",
    "TreeNode",
    "current_effect",
    "note_time",
    "observer",
    "open_saga",
    "outcome_of",
    "saga",
}

PROMISED_FOR_TESTS = {
    "EffectsLedger",
    "FaultKind",
    "Plan",
    "Report",
    "Trial",
    "explore",
    "fault_plans",
    "faults",
    "virtual_time",
}

PROMISED_FOR_PLACES = {
    "CHECKS",
    "SAGAS",
    "Ability",
    "Check",
    "CheckResult",
    "ConformanceReport",
    "Harness",
    "OnCrash",
    "Order",
    "check",
}

PROMISED_FOR_JOURNALS = {
    "Codec",
    "Event",
    "EventKind",
    "Interrupted",
    "Journal",
    "JournalError",
    "MemoryJournal",
    "NotRecordable",
    "OtherRun",
    "RecordedError",
    "Recovered",
    "RecoveryReport",
    "RunInProgress",
    "RunInfo",
    "RunInterrupted",
    "RunState",
    "SQLiteJournal",
    "SagaChanged",
}

# A module each, imported by who uses it.
PROMISED_FOR_WATCHING = {
    pysagas.observe.logging: ["log_effects"],
    pysagas.observe.opentelemetry: ["trace_effects"],
    pysagas.observe.progress: ["show_progress"],
    pysagas.observe.timing: ["record_times"],
}


# --- the public names -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [pysagas, sagas, pysagas.testing, pysagas.testing.conformance, pysagas.durable],
    ids=lambda module: module.__name__,
)
def test_all_is_complete_and_sorted(module):
    """`__all__` lists every public name of the package, in order, each once."""
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }

    # Constants first, as Ruff sorts them.
    assert sorted(public, key=lambda name: (not name.isupper(), name)) == module.__all__


def test_promised_names():
    """The names that the design promises are there."""
    assert set() == PROMISED - set(pysagas.__all__)
    assert set() == PROMISED_FOR_TESTS - set(pysagas.testing.__all__)
    assert set() == PROMISED_FOR_PLACES ^ set(pysagas.testing.conformance.__all__)
    assert set() == PROMISED_FOR_JOURNALS - set(pysagas.durable.__all__)
    assert PROMISED_FOR_WATCHING == {module: module.__all__ for module in PROMISED_FOR_WATCHING}


def test_promised_diagrams():
    """One function draws sagas and outcomes, another one the times of a run."""
    assert ["Timeline", "mermaid", "timeline"] == pysagas.diagrams.__all__


def test_promised_engines():
    """One class runs sagas on Restate, and what can go wrong with the server is an `EngineError`."""
    assert ["EngineError", "EngineUnavailable", "RestateEngine"] == pysagas.engines.restate.__all__


def public_objects() -> Iterator[tuple[str, object]]:
    for module, prefix in (
        (pysagas, ""),
        (pysagas.diagrams, "diagrams."),
        (pysagas.testing, "testing."),
        (pysagas.testing.conformance, "testing.conformance."),
        (pysagas.durable, "durable."),
        (pysagas.engines.restate, "engines.restate."),
        (pysagas.observe.logging, "observe.logging."),
        (pysagas.observe.opentelemetry, "observe.opentelemetry."),
        (pysagas.observe.progress, "observe.progress."),
        (pysagas.observe.timing, "observe.timing."),
    ):
        for name, value in public_objects_of(module):
            yield prefix + name, value


def public_objects_of(module: ModuleType) -> Iterator[tuple[str, object]]:
    for name in module.__all__:
        value = getattr(module, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        yield name, value
        if inspect.isclass(value):
            for member, attribute in vars(value).items():
                is_public = not member.startswith("_") or member == "__call__"
                if is_public and (
                    inspect.isfunction(attribute) or isinstance(attribute, property | classmethod)
                ):
                    yield f"{name}.{member}", attribute


@pytest.mark.parametrize("value", [pytest.param(value, id=name) for name, value in public_objects()])
def test_public_names_have_docstrings(value):
    """Every public class, function, method and property has a docstring of its own."""
    assert (value.__doc__ or "").strip()


def test_aliases_are_what_they_say():
    """The public names that are neither classes nor functions are type aliases."""
    others = {
        name
        for name in pysagas.__all__
        if not inspect.isclass(getattr(pysagas, name))
        and not inspect.isfunction(getattr(pysagas, name))
    }

    assert {"EffectKind"} == others


def test_import_brings_in_no_event_loop_library():
    """Importing the library imports neither trio nor uvloop."""
    ran = subprocess.run(
        [sys.executable, "-c", "import sys, pysagas; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )

    assert "pysagas" in ran.stdout.split()
    assert set() == {"trio", "uvloop"} & set(ran.stdout.split())


def test_import_brings_in_nothing_for_tests():
    """Importing the library does not import what is for tests."""
    ran = subprocess.run(
        [sys.executable, "-c", "import sys, pysagas; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )

    assert not [name for name in ran.stdout.split() if name.startswith("pysagas.testing")]


def test_import_brings_in_nothing_for_journals():
    """Importing the library imports neither journals, nor SQLite, nor msgspec."""
    ran = subprocess.run(
        [sys.executable, "-c", "import sys, pysagas; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )

    assert not {"pysagas.durable", "sqlite3", "msgspec"} & set(ran.stdout.split())


@pytest.mark.parametrize("imported", ["pysagas", "pysagas.observe", "pysagas.observe.opentelemetry"])
def test_import_brings_in_no_opentelemetry(imported):
    """Importing the library, or what makes spans, does not import OpenTelemetry: a call does."""
    ran = subprocess.run(
        [sys.executable, "-c", f"import sys, {imported}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )

    assert imported in ran.stdout.split()
    assert "opentelemetry" not in ran.stdout.split()


WITHOUT_EXTRAS = """
import sys
for name in ("hypothesis", "rich", "trio"):
    sys.modules[name] = None
import anyio
from pysagas import Saga
from pysagas.testing import EffectsLedger, Trial, explore

def trial():
    ledger = EffectsLedger()
    return Trial(Saga([ledger.step("flight")]), state=ledger.snapshot)

print(anyio.run(explore, trial).ok)
"""


def test_what_is_for_tests_needs_no_extra():
    """Without Hypothesis, rich and Trio, sagas are explored all the same."""
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_EXTRAS],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (ran.stdout, ran.stderr) == ("True\n", "")


WITH_MSGSPEC_ALONE = """
import sys
for name in ("hypothesis", "rich", "trio", "typer"):
    sys.modules[name] = None
import anyio
from pysagas import Saga, Step
from pysagas.durable import SQLiteJournal

async def nothing():
    pass

async def main():
    async with SQLiteJournal(sys.argv[1]) as journal:
        print((await journal.run(Saga([Step(nothing)], name="s"), run_id="r")).state.name)

anyio.run(main)
"""


def test_a_journal_needs_no_extra_but_its_own(tmp_path):
    """Without Hypothesis, rich, Trio and typer, runs are journaled all the same."""
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITH_MSGSPEC_ALONE, str(tmp_path / "sagas.db")],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (ran.stdout, ran.stderr) == ("COMPLETED\n", "")


WITHOUT_MSGSPEC = """
import sys
sys.modules["msgspec"] = None
import anyio
from pysagas import Saga, Step
from pysagas.durable import MemoryJournal, SQLiteJournal

class Plain:
    def encode(self, value):
        return repr(value).encode()
    def decode(self, data, kind):
        return eval(data)

for make in (MemoryJournal, lambda: SQLiteJournal("sagas.db")):
    try:
        make()
    except ImportError as error:
        print(error)
MemoryJournal(Plain())

async def main():
    for _ in range(2):
        async with SQLiteJournal(sys.argv[1], codec=Plain()) as journal:
            outcome = await journal.run(saga, run_id="r")
            print(outcome.steps[0].state.name, len(await journal.history("r")))

saga = Saga([Step(lambda: None)])
anyio.run(main)
"""


def test_without_msgspec_a_journal_says_what_to_install(tmp_path):
    """Without msgspec a journal says what it needs; one that has a codec of its own needs nothing."""
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_MSGSPEC, str(tmp_path / "sagas.db")],
        capture_output=True,
        text=True,
        check=False,
    )

    line = 'a journal needs msgspec, which is not installed: pip install "pysagas[durable]"\n'
    assert (ran.stdout, ran.stderr) == (2 * line + 2 * "COMPLETED 2\n", "")


def test_the_package_is_typed():
    """Both import names are marked as typed."""
    assert (SOURCES / "py.typed").exists()
    assert (Path(sagas.__file__).parent / "py.typed").exists()


# --- the layers -------------------------------------------------------------------------------------


def imports(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """Yields each import as a module and the name taken from it, at any depth.

    What is imported for type checkers alone does not count.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from imports(other)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield "." * node.level + (node.module or ""), alias.name
        else:
            yield from imports(node)


def layer_problems(name: str, source: str) -> list[str]:
    """Says what a module of the core imports that it must not."""
    above = LAYERS[: LAYERS.index(name)]
    problems = []
    for module, taken in imports(ast.parse(source)):
        root = module.split(".")[0]
        if root in ("asyncio", "trio", "sniffio"):
            problems.append(f"{name} imports {module}")
        if root == "pysagas" or module == "." or module.startswith(".."):
            problems.append(f"{name} imports {taken} from {module}; write from ._module import name")
        elif module.startswith(".") and module[1:] not in above:
            problems.append(f"{name} imports {module}, which does not stand above it")
    return problems


def outer_problems(parts: tuple[str, ...], source: str) -> list[str]:
    """Says what a module outside of the core imports that is not public.

    Args:
        parts: The module's name, without the package's.
        source: Its text.
    """
    problems = []
    for module, taken in imports(ast.parse(source)):
        level = len(module) - len(module.lstrip("."))
        if level:
            around = ("pysagas", *parts)[: len(parts) + 1 - level]
            target = (*around, *filter(None, module.lstrip(".").split(".")))
        else:
            target = tuple(module.split("."))
        if target[0] != "pysagas":
            continue
        inside = target[1:] or ((taken,) if taken and (SOURCES / f"{taken}.py").exists() else ())
        if inside and inside[0] in CORE:
            problems.append(f"{'.'.join(parts)} imports {'.'.join(target)}, which is not public")
        elif not inside and taken is not None and taken not in pysagas.__all__:
            problems.append(f"{'.'.join(parts)} imports {taken}, which is not public")
    return problems


def test_every_module_has_its_layer():
    """Each private module of the package stands in the list of layers, or uses public names only."""
    modules = {path.stem for path in SOURCES.glob("_*.py")}

    assert set() == set(LAYERS) - modules
    assert modules - CORE <= {"_demo", "_cli", "__main__"}


@pytest.mark.parametrize("name", LAYERS)
def test_a_module_imports_only_from_those_above(name):
    """No module of the core imports from one below it, nor asyncio, trio or sniffio."""
    assert [] == layer_problems(name, (SOURCES / f"{name}.py").read_text())


def test_what_stands_outside_of_the_core_uses_public_names():
    """The demo, the command and the extras use what users have, and nothing else."""
    problems = []
    for path in SOURCES.rglob("*.py"):
        parts = path.relative_to(SOURCES).with_suffix("").parts
        if len(parts) > 1 or parts[0] not in CORE:
            problems += outer_problems(parts, path.read_text())

    assert [] == problems


@pytest.mark.parametrize(
    "source",
    [
        "from ._scope import SagaScope",
        "from ._outcome import Outcome",
        "def late():\n    from ._saga import Saga",
        "import asyncio",
        "import trio.lowlevel",
        "from sniffio import current_async_library",
        "from . import _saga",
        "from pysagas import Saga",
        "from ..other import name",
        "import pysagas._saga",
    ],
)
def test_layer_problems_are_found(source):
    """The check of the layers finds what it looks for."""
    assert 1 == len(layer_problems("_outcome", source))


@pytest.mark.parametrize(
    "source",
    [
        "from ._errors import SagaError",
        "import anyio",
        "from collections import deque",
        "if TYPE_CHECKING:\n    from ._saga import Saga\nelse:\n    from ._errors import SagaError",
    ],
)
def test_what_is_no_layer_problem(source):
    """The check of the layers lets through what is allowed."""
    assert [] == layer_problems("_outcome", source)


@pytest.mark.parametrize(
    ("parts", "source"),
    [
        (("_demo",), "from ._saga import Saga"),
        (("_demo",), "from pysagas._saga import Saga"),
        (("_demo",), "import pysagas._saga"),
        (("_demo",), "from pysagas import _saga"),
        (("_demo",), "from . import Secret"),
        (("durable", "_journal"), "from .._effects import Effect"),
        (("durable", "__init__"), "from .. import Record"),
    ],
)
def test_outer_problems_are_found(parts, source):
    """The check of what stands outside finds what it looks for."""
    assert 1 == len(outer_problems(parts, source))


@pytest.mark.parametrize(
    ("parts", "source"),
    [
        (("_demo",), "from pysagas import Saga, saga"),
        (("_demo",), "from . import Saga"),
        (("_demo",), "import pysagas"),
        (("__main__",), "from ._demo import main"),
        (("__main__",), "from . import _demo" if (SOURCES / "_demo.py").exists() else "import os"),
        (("durable", "_journal"), "from .. import Effect"),
        (("durable", "_journal"), "from ._codec import Codec"),
        (("durable", "_journal"), "import sqlite3"),
    ],
)
def test_what_is_no_outer_problem(parts, source):
    """The check of what stands outside lets through what is public, or its own."""
    assert [] == outer_problems(parts, source)
