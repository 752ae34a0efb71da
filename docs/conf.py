"""Sphinx configuration, and the `wire` directive that the pages use."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from pygments.lexers.sql import PostgresLexer
from pygments.token import Comment, Error
from sphinx.application import Sphinx
from sphinx.directives.code import CodeBlock

import fictive

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
html_title = f"fictive {release}"
html_show_sphinx = False
highlight_language = "default"  # Python, where a literal block is that


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
            ('<th class="head"></th>', '<td class="head"></td>'),  # over a table's first column
            ('<div id="search-results"></div>', '<h1>Search</h1><div id="search-results"></div>'),
        ):
            new = new.replace(part, better)
        if new != old:
            path.write_text(new, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("wire", WireDirective)
    app.add_lexer("wire", WireLexer)
    app.connect("build-finished", mend_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
