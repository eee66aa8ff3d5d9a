"""What is checked, and how: ``nox -s tests`` first, ``nox`` for all that a change must pass."""

from __future__ import annotations

import re
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
# Whoever has one Python runs the tests on that one; a missing one is said, and is no failure.
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["lint", "types", "tests", "lowest", "coverage", "docs", "build"]

PROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PROJECT)
OLDEST, NEWEST = PYTHONS[0], PYTHONS[-1]
# The oldest AnyIO that is supported: the one in the project's own requirement.
LOWEST_ANYIO = re.findall(r"anyio>=([\d.]+)", " ".join(PROJECT["project"]["dependencies"]))[0]


def install(session: nox.Session, group: str, *more: str) -> None:
    session.install("-q", *nox.project.dependency_groups(PROJECT, group), *more)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Runs the tests, each on every loop, with the newest libraries."""
    install(session, "tests", ".")
    session.run("pytest", *session.posargs)


@nox.session(python=OLDEST)
def lowest(session: nox.Session) -> None:
    """Runs the tests with the oldest AnyIO that is supported."""
    install(session, "tests", ".", f"anyio=={LOWEST_ANYIO}.*")
    session.run("pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Checks style and format."""
    install(session, "lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Checks types: of the source, of what users write, and that the public ones are complete."""
    install(session, "types", ".")
    session.run("mypy")
    session.run("pyright")
    session.run("pyright", "--verifytypes", "pysagas", "--ignoreexternal")


# The oldest and the newest: what depends on the version of Python is seen by one of the two.
@nox.session(python=[OLDEST, NEWEST])
def coverage(session: nox.Session) -> None:
    """Runs the tests under coverage."""
    install(session, "tests", "-e", ".", *nox.project.dependency_groups(PROJECT, "coverage"))
    session.run("coverage", "run", f"--data-file=.coverage.{session.python}", "-m", "pytest", "-q")
    session.notify("coverage_report")


@nox.session
def coverage_report(session: nox.Session) -> None:
    """Combines what `coverage` has measured, and fails below 100 % of lines and branches."""
    install(session, "coverage")
    data = sorted(map(str, Path().glob(".coverage.*")))
    session.run("coverage", "combine", *data)
    if len(data) < len({OLDEST, NEWEST}):
        session.warn(f"only {data}: lines for other Pythons are missing, so no limit is set")
        session.run("coverage", "report", "--fail-under=0")
    else:
        session.run("coverage", "report")


@nox.session
def docs(session: nox.Session) -> None:
    """Runs every code block of the documents."""
    install(session, "tests", ".")
    session.run("pytest", "-q", "tests/test_docs.py", "tests/test_docs_guarantees.py")


@nox.session
def build(session: nox.Session) -> None:
    """Builds wheel and sdist; runs each from a clean environment, with AnyIO alone."""
    session.install("-q", "build")
    dist = Path(session.create_tmp()) / "dist"
    session.run("python", "-m", "build", "--outdir", str(dist))
    names = "import sagas, pysagas; [getattr(pysagas, name) for name in pysagas.__all__]"
    for built in sorted(dist.glob("pysagas-*")):
        clean = Path(session.create_tmp()) / f"clean-{built.suffix[1:]}"
        session.run("python", "-m", "venv", "--clear", str(clean))
        python = str(clean / "bin" / "python")
        session.run(python, "-m", "pip", "install", "-q", str(built), external=True)
        session.run(python, "-W", "error", "-c", names, external=True)
        session.run(python, "-m", "pysagas", external=True)
        built.unlink()


@nox.session
def bench(session: nox.Session) -> None:
    """Measures, beside the others; takes minutes."""
    install(session, "bench", ".")
    session.run("python", "benchmarks/run.py", *session.posargs)
