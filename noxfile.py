"""What is checked, and how: ``nox -s tests`` first, ``nox`` for all that a change must pass."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from hashlib import sha256
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
# Whoever has one Python runs the tests on that one; a missing one is said, and is no failure.
nox.options.error_on_missing_interpreters = False
nox.options.sessions = [
    "lint",
    "types",
    "tests",
    "lowest",
    "coverage",
    "coverage_report",
    "docs",
    "site",
    "build",
]

PROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PROJECT)
OLDEST, NEWEST = PYTHONS[0], PYTHONS[-1]
# The oldest AnyIO that is supported: the one in the project's own requirement.
LOWEST_ANYIO = re.findall(r"anyio>=([\d.]+)", " ".join(PROJECT["project"]["dependencies"]))[0]
# What draws the diagrams, see `drawer`.
MERMAID = "@mermaid-js/mermaid-cli@11.17.0"


def install(session: nox.Session, group: str, *more: str) -> None:
    session.install("-q", *nox.project.dependency_groups(PROJECT, group), *more)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Runs the tests, each on every loop, with the newest libraries."""
    install(session, "tests", ".")
    session.run("pytest", "-q", "--numprocesses=2", *session.posargs)


@nox.session(python=OLDEST)
def lowest(session: nox.Session) -> None:
    """Runs the tests with the oldest AnyIO that is supported."""
    install(session, "tests", ".", f"anyio=={LOWEST_ANYIO}.*")
    session.run("pytest", "-q", "--numprocesses=2", *session.posargs)


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
    """Builds wheel and sdist; runs each from a clean environment, with AnyIO alone, and the command."""
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
        # Without its extra, the command says what to install; with it, it works.
        command = str(clean / "bin" / "pysagas")
        session.run(command, "list", external=True, success_codes=[64])
        session.run(python, "-m", "pip", "install", "-q", f"{built}[cli]", external=True)
        journal = str(clean / "sagas.db")
        session.run(command, "demo", "--journal", journal, external=True)
        session.run(command, "list", "--journal", journal, external=True)
        recover = ("recover", "--journal", journal, "--app", "pysagas.demo:app")
        session.run(command, *recover, external=True)
        built.unlink()


# Named, one or several, after `--`: `nox -s mutation -- _rollback _shelter`.
@nox.session(python=OLDEST)
def mutation(session: nox.Session) -> None:
    """Runs the tests against mutants of the core; takes hours, or minutes for one small module."""
    install(session, "tests", *nox.project.dependency_groups(PROJECT, "mutation"), ".")
    mutants = [f"pysagas.{module}.*" for module in session.posargs]
    session.run("mutmut", "run", "--max-children", "2", *mutants)
    # Those that survived. What of them is known, and why it is let be, is in tests/MUTANTS.md.
    session.run("mutmut", "results")


# How long is told after `--`: `nox -s deep -- 30m`, or `8h`; or how many examples for each test and
# loop: `nox -s deep -- 100000`.
@nox.session
def deep(session: nox.Session) -> None:
    """Holds the engine against the model, on drawn sagas, new ones each time; for as long as told."""
    told, *options = session.posargs or ["10m"]
    minutes = {"m": 1, "h": 60}.get(told[-1])
    examples = "2000" if minutes else told
    until = time.monotonic() + 60 * minutes * float(told[:-1]) if minutes else 0
    install(session, "tests", ".")
    env = {"PYSAGAS_PROFILE": "deep", "PYSAGAS_EXAMPLES": examples}
    command = ("pytest", "-q", "--durations=0", "tests/test_properties.py", "tests/test_machine.py")
    session.run(*command, *options, env=env)
    while time.monotonic() < until:
        session.run(*command, *options, env=env)


# How many kills is told after `--`: `nox -s crash -- 5000`; where they fall, by PYSAGAS_SEED.
@nox.session
def crash(session: nox.Session) -> None:
    """Kills processes that run sagas under a journal, and has others recover them; takes minutes."""
    install(session, "tests", ".")
    env = {"PYSAGAS_KILLS": session.posargs[0] if session.posargs else "500"}
    session.run("pytest", "-q", "-rP", "tests/test_durable_crash.py", *session.posargs[1:], env=env)


# How many kills is told after `--`: `nox -s engines -- 500`; where they fall, by PYSAGAS_SEED.
@nox.session
def engines(session: nox.Session) -> None:
    """Runs sagas on the real server of Restate, and kills workers and servers; needs npm, takes minutes."""
    install(session, "tests", ".")
    kills = session.posargs[0] if session.posargs else "100"
    env = {"PYSAGAS_KILLS": kills, "PYSAGAS_ENGINES": "required"}
    session.run("pytest", "-q", "-rP", "tests/test_engines_restate.py", *session.posargs[1:], env=env)


@nox.session
def conformance(session: nox.Session) -> None:
    """Writes docs/reference/conformance.md, by what each place does; needs npm."""
    install(session, "tests", ".")
    session.run("python", "tests/conformance_page.py")


def chromium() -> str | None:
    """A browser, which the environment may name: CHROMIUM."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium")


def drawer(session: nox.Session) -> tuple[str, ...] | None:
    """The command that draws a Mermaid diagram; None where npm cannot install it, or without Chromium."""
    browser = chromium()
    if browser is None or shutil.which("npm") is None:
        return None
    tools = Path(session.cache_dir) / MERMAID.rpartition("/")[2]
    command = tools / "node_modules" / ".bin" / "mmdc"
    if not command.exists():
        # The browser that is there does; the package would download one of its own.
        env = {"PUPPETEER_SKIP_DOWNLOAD": "1"}
        install_it = ("npm", "install", "--silent", "--prefix", str(tools), MERMAID)
        session.run(*install_it, env=env, external=True, success_codes=range(256))
    if not command.exists():
        return None  # there is an npm, and nothing for it to install from
    settings = tools / "puppeteer.json"
    settings.write_text(json.dumps({"executablePath": browser, "args": ["--no-sandbox"]}))
    return (str(command), "--quiet", "-p", str(settings))


# Needs npm and a Chromium. Whoever changes how sagas are drawn looks at these; the text of each
# golden file is what `pictures()` in tests/test_diagrams.py, or test_diagrams_timeline.py, gives.
@nox.session
def pictures(session: nox.Session) -> None:
    """Has Mermaid draw the golden files of the diagrams, on a light page and on a dark one."""
    draw = drawer(session)
    if draw is None:
        session.skip("there is no chromium, or no npm that can install what draws")
    made = Path(session.create_tmp())
    for golden in sorted(Path("tests/golden").glob("*.mmd")):
        for theme, page in (("default", "white"), ("dark", "#0d1117")):
            picture = made / f"{golden.stem}-{theme}.png"
            look = ("-t", theme, "-b", page, "-w", "1400")
            session.run(*draw, *look, "-i", str(golden), "-o", str(picture), external=True)
    session.log(f"the pictures are in {made}")


SITE = Path("build/site")
# What is looked at when the site has changed; and how wide and high a window that is.
LOOKED_AT = (
    "index",
    "tutorials/booking-a-trip",
    "how-to/prove-your-rollback",
    "reference/guarantees",
    "reference/steps-and-sagas",
    "reference/scopes",
    "explanation/architecture",
    "explanation/pysagas-and-the-others",
)
WINDOWS = {"desktop": "1440,2600", "phone": "390,2600"}


# With `-- screenshots`, pictures of some of its pages, for looking at.
@nox.session
def site(session: nox.Session) -> None:
    """Builds the documentation site, with each reference in it resolved; a warning is an error."""
    install(session, "docs", ".[durable,opentelemetry,progress,restate,testing]")
    draw_pages(session)
    shutil.rmtree(SITE / "html", ignore_errors=True)  # pages that are no more would stay
    folders = ("-d", str(SITE / "doctrees"), "docs", str(SITE / "html"))
    session.run("sphinx-build", "-q", "-E", "-n", "-W", "--keep-going", "-b", "html", *folders)
    session.log(f"the site is in {SITE / 'html'}")
    if session.posargs == ["screenshots"]:
        take_screenshots(session)


def draw_pages(session: nox.Session) -> None:
    """Draws the diagrams of the documents, each under a name by which docs/conf.py finds it."""
    draw = drawer(session)
    if draw is None:
        session.warn(
            "the site shows diagrams as text: there is no chromium, or no npm that can install what draws"
        )
        return
    made = SITE / "drawings"
    made.mkdir(parents=True, exist_ok=True)
    for page in sorted(Path("docs").rglob("*.md")):
        for text in re.findall(r"(?ms)^```mermaid\n(.*?)^```$", page.read_text(encoding="utf-8")):
            name = sha256(text.encode()).hexdigest()
            if not (made / f"{name}.svg").exists():
                source = made / f"{name}.mmd"
                source.write_text(text, encoding="utf-8")
                # As wide as the text of a page. Several may stand on one: each with an id of its own.
                look = ("-b", "transparent", "-w", "760", "--svgId", f"drawing-{name[:8]}")
                picture = str(source.with_suffix(".svg"))
                session.run(*draw, *look, "-i", str(source), "-o", picture, external=True)


def take_screenshots(session: nox.Session) -> None:
    browser = chromium()
    if browser is None:
        session.skip("there is no chromium")
    made = SITE / "screenshots"
    made.mkdir(exist_ok=True)
    for page in LOOKED_AT:
        url = (SITE / "html" / f"{page}.html").resolve().as_uri()
        for window, size in WINDOWS.items():
            for theme, scheme in (("light", 1), ("dark", 0)):
                picture = made / f"{page.replace('/', '-')}-{window}-{theme}.png"
                session.run(
                    *(browser, "--headless", "--no-sandbox", "--hide-scrollbars"),
                    f"--blink-settings=preferredColorScheme={scheme}",
                    f"--user-data-dir={session.create_tmp()}/profile",
                    f"--window-size={size}",
                    f"--screenshot={picture}",
                    url,
                    external=True,
                    silent=True,
                )
    session.log(f"the screenshots are in {made}")


@nox.session
def bench(session: nox.Session) -> None:
    """Measures, beside the others; takes minutes."""
    install(session, "bench", ".")
    session.run("python", "benchmarks/run.py", *session.posargs)
