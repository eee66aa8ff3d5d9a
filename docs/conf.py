"""How the site is made of these pages: ``nox -s site``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from importlib import import_module
from importlib.metadata import version as version_of
from inspect import Parameter, signature
from pathlib import Path
from pkgutil import walk_packages

import pysagas
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.napoleon import Config, GoogleDocstring
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective
from sphinx.util.inspect import Signature

project = "pysagas"
author = "The pysagas authors"
project_copyright = author
release = version = version_of("pysagas")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
nitpicky = True

# --- the look --------------------------------------------------------------------------------------

# Links to headings are written as a site that shows the Markdown makes them.
myst_heading_anchors = 4
myst_fence_as_directive = {"mermaid"}

html_theme = "furo"
pygments_dark_style = "monokai"  # Furo's own underlines names as if they were links
html_title = f"pysagas {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}

# --- the reference, from the docstrings ---------------------------------------------------------

# What stands in single backticks in a docstring is a name of this project, or an argument.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autoclass_content = "both"
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

# Names of others: the site is built without asking their documentation where they are. And what is
# ours and in a signature, but not for users.
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(anyio|collections|contextlib|datetime|decimal|httpx|hypothesis|logging|opentelemetry|os|restate|rich|types|typing)\..*",
    ),
    (r"py:.*", r"(pysagas\.[\w.]+\.)?(P|S|T|T_co|Ts|T[1-8])(\.args|\.kwargs)?"),  # type variables
    (
        r"py:class",
        r"pysagas\._definitions\.Definition|pysagas\._saga\._SagaDecorator|MakeTrial|Only|pysagas\.testing\.conformance\._stage\.Stage",
    ),
    # Imported for type checkers alone, so that autodoc knows no more than their names.
    (r"py:class", r"Console|SearchStrategy|TracerProvider|MeterProvider|ASGIApp"),
    (r"py:class", r"AnySaga|timedelta"),  # imported by their own names, or of one module alone
]

# The modules from which users import. (The demo is no library.)
MODULES = [
    import_module(name)
    for name in ("pysagas", *(info.name for info in walk_packages(pysagas.__path__, "pysagas.")))
    if "._" not in name and name != "pysagas.demo"
]
NAMES = [
    (module, name, getattr(module, name))
    for module in MODULES
    for name in getattr(module, "__all__", ())
]
# Where each is defined, and where it is documented.
DOCUMENTED_AT = {
    f"{found.__module__}.{name}": f"{module.__name__}.{name}"
    for module, name, found in NAMES
    if hasattr(found, "__qualname__")
}


def arguments() -> Iterator[str]:
    """Yields the names of all arguments, of functions and methods."""
    for _, _, found in NAMES:
        for function in (found, *vars(found).values()) if isinstance(found, type) else (found,):
            if callable(function):
                with suppress(TypeError, ValueError):
                    yield from signature(function).parameters


MODULES_WITH_OVERLOADS = ["pysagas._definitions", "pysagas._saga", "pysagas._scope"]
ARGUMENTS = set(arguments())
GOOGLE_STYLE = Config(napoleon_attr_annotations=True)


def resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: nodes.Element
) -> nodes.Node | None:
    """Leads from where a name is defined to where it is documented; leaves arguments as they are."""
    target = node["reftarget"]
    if node["reftype"] == "obj" and target in ARGUMENTS:
        return shown
    # What is not of the module itself is one of the core's names.
    target = DOCUMENTED_AT.get(target, f"pysagas.{target}")
    domain = env.domains.python_domain
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, shown)


def read_docstring(
    app: Sphinx, what: str, name: str, found: object, options: object, lines: list[str]
) -> None:
    """Reads a docstring in Google's style.

    Not by Napoleon as an extension: of an attribute it takes what stands before the first colon for
    its type.
    """
    kind = "method" if what in ("property", "attribute") else what
    text = str(GoogleDocstring(lines, GOOGLE_STYLE, app, kind, name, found, options))
    # The type of an attribute beside its name, where there is room for it.
    attribute = r"(\.\. attribute:: \w+\n)((?:\n|   .*\n)*?)   :type: (.+)\n"
    lines[:] = re.sub(attribute, r"\1   :type: \3\n\2", text + "\n").splitlines()


def make_overloads_legible(app: Sphinx) -> None:
    """Leaves of each function only the overloads that tell a reader something."""
    for name in MODULES_WITH_OVERLOADS:
        analyzer = ModuleAnalyzer.for_module(name)
        analyzer.analyze()
        # One for each number of members, and the one for any number.
        analyzer.overloads.get("SagaScope.parallel", [])[:-1] = []
        for overloads in analyzer.overloads.values():
            overloads[:] = merged(overloads)


def merged(overloads: list[Signature]) -> Iterator[Signature]:
    """Makes one overload of those for an async and for a sync action."""
    for index, overload in enumerate(overloads):
        shown = {
            name: given.replace(annotation=plain(given)) for name, given in overload.parameters.items()
        }
        if "compensation" in shown:
            action = shown["action"]
            if "Awaitable" not in action.annotation:
                assert "Awaitable" in overloads[index - 1].parameters["action"].annotation
                continue
            either = re.sub(r"Awaitable\[(\w+)\]", r"\g<0> | \1", action.annotation)
            shown["action"] = action.replace(annotation=either)
        yield overload.replace(parameters=list(shown.values()))


def plain(parameter: Parameter) -> str:
    """Gives an annotation; none of what is a function's own arguments, of which Sphinx shows ``~P``."""
    return Parameter.empty if parameter.annotation in ("P.args", "P.kwargs") else parameter.annotation


def show_signature(
    app: Sphinx,
    what: str,
    name: str,
    found: object,
    options: object,
    shown: str | None,
    returns: str | None,
) -> tuple[str, str | None] | None:
    """Leaves out the same where there are no overloads."""
    return None if shown is None else (re.sub(r"(\*\w+): ~typing\.~P", r"\1", shown), returns)


# --- pages --------------------------------------------------------------------------------------


def leave_out_comments(app: Sphinx, page: str, source: list[str]) -> None:
    """Leaves out what is only there for the tests: a search would find it."""
    source[0] = re.sub(r"<!--.*?-->", "", source[0], flags=re.DOTALL)


class Drawing(SphinxDirective):
    """A Mermaid drawing: the picture that ``nox -s site`` has made of it, or else its text."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        text = "\n".join(self.content) + "\n"
        picture = (
            Path(self.env.app.outdir).parent / "drawings" / f"{sha256(text.encode()).hexdigest()}.svg"
        )
        if not picture.exists():
            return [nodes.literal_block(text, text, language="text")]
        svg = picture.read_text(encoding="utf-8")
        return [nodes.raw("", f'<div class="drawing">{svg}</div>', format="html")]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("mermaid", Drawing)
    app.connect("builder-inited", make_overloads_legible)
    app.connect("autodoc-process-signature", show_signature)
    app.connect("source-read", leave_out_comments)
    app.connect("autodoc-process-docstring", read_docstring)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
