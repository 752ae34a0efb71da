"""Sphinx configuration, and the `wire` directive that the pages use."""

import enum
import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from docutils import nodes
from docutils.statemachine import StringList
from pygments.lexers.sql import PostgresLexer
from pygments.token import Comment, Error
from sphinx.application import Sphinx
from sphinx.directives.code import CodeBlock

import fictive
from fictive.sqlalchemy import Settings, Transaction

# autodoc looks at the columns of mixins, and imports Alembic: neither has anything to say to who builds the docs.
warnings.filterwarnings("ignore", message="Unmanaged access of declarative attribute", category=sa.exc.SAWarning)
logging.getLogger("alembic").setLevel(logging.WARNING)

ROOT = Path(__file__).resolve().parent.parent
project = "fictive"
author = copyright = "fictive contributors"
version = release = fictive.__version__

# No intersphinx: it fetches other projects' inventories, and the build needs no network.
extensions = ["sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton", "myst_parser"]
exclude_patterns = ["_build", "benchmarks"]
source_suffix = {".rst": "restructuredtext"}  # Markdown is only included, by docs/changes.rst
suppress_warnings = ["myst.header"]  # CHANGES.md is included from its second line on
default_role = "code"  # `name` is code, in pages and in docstrings
nitpicky = False

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True

html_theme = "furo"
html_theme_options = {"top_of_page_buttons": []}
html_static_path = ["_static"]
html_css_files = ["fictive.css"]
html_title = f"fictive {release}"
html_search_scorer = str(ROOT / "docs" / "scorer.js")
html_show_sphinx = False
highlight_language = "default"  # Python, where a literal block is that


WIRE_BOX = re.compile(
    r'(?P<head><div class="highlight-wire[^>]*><div class="highlight"><pre[^>]*>)(?P<lines>.*?)</pre>', re.DOTALL
)

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


class WireLexer(PostgresLexer):
    """PostgreSQL's SQL with `…` for what is left out, also within a body between dollars."""

    def get_tokens_unprocessed(self, text: str, *options: object) -> Iterator[tuple[int, Any, str]]:
        for index, kind, value in super().get_tokens_unprocessed(text, *options):
            yield index, Comment if kind is Error and value == "…" else kind, value


class WireDirective(CodeBlock):
    """The statements that the Python block before it sent, one a line.

    ``.. wire:: 2 round trips`` checks their number too. What is compared, and how, is in
    tests/docs_runner.py.
    """

    optional_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        if not self.content:
            self.content = StringList(["-- nothing"], source="wire")
        trips = "".join(self.arguments)
        self.arguments = ["wire"]
        self.options.setdefault("caption", f"On the wire: {trips}" if trips else "On the wire")
        return super().run()


def shorten_signature(_app: Sphinx, what: str, _name: str, thing: object, *rest: Any) -> tuple[str, str | None] | None:
    """Leave out what no caller gives: private parameters of SQLAlchemy, arguments of classes that fictive makes."""
    signature, returns = rest[-2:]
    if what == "class" and inspect.isclass(thing) and issubclass(thing, (enum.Enum, Settings, Transaction)):
        return "", returns
    if signature and re.search(r"[(, ]_\w+", signature):
        public = [each for each in signature.strip("()").split(", ") if not each.startswith("_")]
        return f"({', '.join(public)})", returns
    return None


def write_all(_app: Sphinx, env: Any) -> Sequence[str]:
    """All pages: of those that are not written anew the search would lose what `index` says."""
    return sorted(env.found_docs)


def mark_statements(box: re.Match[str]) -> str:
    """Each line of a wire box in an element of its own, which sets in what does not fit on one."""
    lines = box["lines"].removesuffix("\n").split("\n")
    return box["head"] + "".join(f'<span class="statement">{line}\n</span>' for line in lines) + "</pre>"


def mend_pages(app: Sphinx, error: Exception | None) -> None:
    """Add to the pages what axe-core misses in Furo's, and take this machine's paths out of the diffs."""
    if error or app.builder.format != "html":
        return
    for path in Path(app.outdir).rglob("*.html"):
        old = new = path.read_text(encoding="utf-8")
        for part, better in (
            (f"{ROOT}/", ""),
            ('<p class="caption" role="heading">', '<p class="caption" role="heading" aria-level="2">'),
            ('<aside class="sidebar-drawer">', '<aside class="sidebar-drawer" aria-label="Pages">'),
            ('<aside class="toc-drawer">', '<aside class="toc-drawer" aria-label="On this page">'),
            ('<aside class="toc-drawer no-toc">', '<aside class="toc-drawer no-toc" aria-label="On this page">'),
            # What scrolls has to be within the keyboard's reach.
            ("<pre>", '<pre tabindex="0">'),
            ('<div class="table-wrapper', '<div tabindex="0" class="table-wrapper'),
            ('<div class="wide-image', '<div tabindex="0" class="wide-image'),
            ('<span class="pre">--', '<span class="pre option-name">--'),
            ("F-S-Lite", "F\u2011S\u2011Lite"),  # hyphens that no line breaks at
            ('<th class="head"></th>', '<td class="head"></td>'),  # over a table's first column
            ('<div id="search-results"></div>', '<h1>Search</h1><div id="search-results"></div>'),
        ):
            new = new.replace(part, better)
        new = WIRE_BOX.sub(mark_statements, new)
        if new != old:
            path.write_text(new, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("wire", WireDirective)
    app.add_lexer("wire", WireLexer)
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("env-updated", write_all)
    app.connect("build-finished", mend_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
