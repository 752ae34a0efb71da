"""Runs the Python in a page of the docs, and compares the SQL the page shows with what was sent.

How a page (reST in docs/, or Markdown) is written so that it runs:

* All its Python blocks run in order in one namespace, as one module, on a fresh database whose URL
  is in ``os.environ["DATABASE_URL"]``::

      .. code-block:: python

         thing = db.session.get(Thing, 1)

* What the Python block before it sent, one statement a line, an indented line going on with the
  one above. The argument may be left out; ``nothing`` says that nothing was sent::

      .. wire:: 1 round trip

         SELECT … FROM thing WHERE thing.id = 1  -- and the connection is back

  ``…`` stands for any text; white space, a ``;`` at the end and ``--`` comments do not count.
  ``BEGIN; SELECT …`` on one line is one message. The SQL is psycopg2's, which puts the values into
  the text; on another driver the Python runs and the SQL is not compared.

* Comments, which readers do not see, before a block: ``.. run: skip WHY`` leaves it out,
  ``.. run: raises NAME`` or ``.. run: raises NAME: part of the message`` expects an exception,
  ``.. run: output`` before a ``text`` block compares it with what the Python before it printed.
  ``.. run: hidden`` with an indented block below it runs that block: preparations and checks.

In Markdown the blocks are fenced, and the marks are ``<!-- run: skip WHY -->``.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from flask import Flask, has_app_context
from flask.globals import app_ctx
from flask_sqlalchemy import SQLAlchemy

_DIRECTIVE = re.compile(r"^(?P<indent>\s*)\.\. (?P<name>code-block|wire)::(?P<rest>.*)$")
_MARK = re.compile(r"^(?P<indent>\s*)\.\. run: (?P<words>.+)$")
_FENCE = re.compile(r"^(?P<indent>\s*)```(?P<rest>\w*)\s*$")
_MARKDOWN_MARK = re.compile(r"^\s*<!-- run: (?P<words>.+?) -->\s*$")
_OPTION = re.compile(r"^\s*:[\w-]+:( |$)")
_TRIPS = re.compile(r"^(\d+) round trips?$")


class DocsError(AssertionError):
    """A page that does not say what happens; the message starts with file and line."""


@dataclass
class Block:
    kind: str  # "python", "wire", "output"
    line: int  # of its first line of content
    text: str
    argument: str = ""
    raises: str = ""
    skip: str = ""


def read_blocks(page: Path) -> list[Block]:
    """The blocks of a page that are run or compared, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    found = _read_markdown(page, lines) if page.suffix == ".md" else _read_rest(page, lines)
    return [block for block in found if not block.skip]


def _read_rest(page: Path, lines: list[str]) -> Iterator[Block]:
    mark: tuple[int, str] | None = None
    at = 0
    while at < len(lines):
        if hit := _MARK.match(lines[at]):
            words = hit["words"].strip()
            if words == "hidden":
                start, at, text = _indented(lines, at + 1, len(hit["indent"]), options=False)
                yield Block("python", start, text)
                continue
            mark = (at + 1, words)
        elif hit := _DIRECTIVE.match(lines[at]):
            start, at, text = _indented(lines, at + 1, len(hit["indent"]), options=True)
            rest = hit["rest"].strip()
            kind = "wire" if hit["name"] == "wire" else rest
            yield from _block(page, kind, start, text, mark, rest if kind == "wire" else "")
            mark = None
            continue
        at += 1
    if mark:
        raise DocsError(f"{page.name}:{mark[0]}: no block follows `run: {mark[1]}`")


def _read_markdown(page: Path, lines: list[str]) -> Iterator[Block]:
    mark: tuple[int, str] | None = None
    at = 0
    while at < len(lines):
        if hit := _MARKDOWN_MARK.match(lines[at]):
            mark = (at + 1, hit["words"])
        elif hit := _FENCE.match(lines[at]):
            start = at + 1
            end = start
            while end < len(lines) and lines[end].strip() != "```":
                end += 1
            text = textwrap.dedent("\n".join(lines[start:end]))
            yield from _block(page, hit["rest"], start + 1, text, mark, "")
            mark = None
            at = end
        at += 1
    if mark:
        raise DocsError(f"{page.name}:{mark[0]}: no block follows `run: {mark[1]}`")


def _indented(lines: list[str], at: int, indent: int, *, options: bool) -> tuple[int, int, str]:
    """First line number, index after the end, and text of the content below a directive."""
    while options and at < len(lines) and _OPTION.match(lines[at]):
        at += 1
    while at < len(lines) and not lines[at].strip():
        at += 1
    start = at
    while at < len(lines) and (not lines[at].strip() or len(lines[at]) - len(lines[at].lstrip()) > indent):
        at += 1
    return start + 1, at, textwrap.dedent("\n".join(lines[start:at])).rstrip()


def _block(
    page: Path, kind: str, line: int, text: str, mark: tuple[int, str] | None, argument: str
) -> Iterator[Block]:
    word, _, rest = mark[1].partition(" ") if mark else ("", "", "")
    allowed = {"python": ("", "skip", "raises"), "wire": ("", "skip"), "text": ("", "output")}
    if word not in allowed.get(kind, ("", "skip")) or (word in ("skip", "raises") and not rest):
        raise DocsError(f"{page.name}:{line}: `run: {mark and mark[1]}` before a {kind} block")
    if kind == "python":
        yield Block(
            kind,
            line,
            text,
            raises=rest if word == "raises" else "",
            skip=rest if word == "skip" else "",
        )
    elif kind == "wire":
        yield Block(kind, line, text, argument=argument, skip=rest if word == "skip" else "")
    elif kind == "text" and word == "output":
        yield Block("output", line, text)


# Running


@contextlib.contextmanager
def run_page(
    page: Path, wire: Any, *, compare_sql: bool = True, given: Mapping[str, object] | None = None
) -> Iterator[dict[str, Any]]:
    """Run a page and hand out its namespace; its engines are disposed of afterwards.

    `given` are names that the page finds in its namespace.
    """
    module = types.ModuleType("page_" + re.sub(r"\W", "_", page.stem))
    module.__file__ = str(page)
    module.__dict__.update(given or {})
    # Annotations such as Mapped[int] are looked up in the module that a class names.
    sys.modules[module.__name__] = module
    try:
        _run_blocks(page, read_blocks(page), module.__dict__, wire, compare_sql)
        yield module.__dict__
    finally:
        del sys.modules[module.__name__]
        _dispose(module.__dict__)
        leave_app_contexts()


def leave_app_contexts() -> None:
    """A page pushes one to show what happens in it, and need not say how that ends."""
    while has_app_context():
        app_ctx._get_current_object().pop()  # type: ignore[attr-defined]


def _run_blocks(page: Path, blocks: list[Block], namespace: dict[str, Any], wire: Any, compare_sql: bool) -> None:
    log: Any = None
    printed = io.StringIO()
    for block in blocks:
        where = f"{page.name}:{block.line}"
        if block.kind == "python":
            printed = io.StringIO()
            with wire.record() as log, contextlib.redirect_stdout(printed):
                _run_python(page, where, block, namespace)
        elif log is None:
            raise DocsError(f"{where}: no Python block stands before this one")
        elif block.kind == "wire" and compare_sql:
            _compare_wire(where, block, log)
        elif block.kind == "output":
            _compare_text(where, block.text.splitlines(), printed.getvalue().splitlines())


def _run_python(page: Path, where: str, block: Block, namespace: dict[str, Any]) -> None:
    # Blank lines in front make a traceback show the page's own line numbers.
    code = compile("\n" * (block.line - 1) + block.text, str(page), "exec", dont_inherit=True)
    if not block.raises:
        exec(code, namespace)
        return
    name, _, words = (part.strip() for part in block.raises.partition(":"))
    try:
        exec(code, namespace)
    except Exception as error:
        if name not in {kind.__name__ for kind in type(error).__mro__}:
            raise
        if words not in str(error):
            raise DocsError(f"{where}: {words!r} is not in the message: {error}") from error
    else:
        raise DocsError(f"{where}: {name} was not raised")


def _compare_wire(where: str, block: Block, log: Any) -> None:
    expected = parse_statements(block.text)
    if block.argument == "nothing":
        if expected:
            raise DocsError(f"{where}: `nothing` with statements below it")
    elif not expected:
        raise DocsError(f"{where}: no statements; write `.. wire:: nothing` if none are sent")
    sent = [normalise(statement) for statement in log.statements]
    _compare_text(where, expected, sent)
    if block.argument not in ("", "nothing"):
        trips = _TRIPS.match(block.argument)
        if trips is None:
            raise DocsError(f"{where}: `{block.argument}` is not `N round trips` or `nothing`")
        if log.round_trips != int(trips[1]):
            raise DocsError(f"{where}: {log.round_trips} round trips, the page says {trips[1]}")


def parse_statements(text: str) -> list[str]:
    """The statements that a wire block shows, normalised."""
    statements: list[str] = []
    for line in text.splitlines():
        bare = re.sub(r"(^|\s)--(\s.*)?$", "", line)
        if not bare.strip():
            continue
        if bare[0].isspace() and statements:
            statements[-1] += bare
        else:
            statements.append(bare)
    return [normalise(statement) for statement in statements]


def normalise(statement: str) -> str:
    one_line = " ".join(statement.split()).rstrip("; ")
    return re.sub(r"\s*;\s*", "; ", one_line)


def _matches(expected: str, actual: str) -> bool:
    pattern = ".*".join(re.escape(part) for part in expected.split("…"))
    return re.fullmatch(pattern, actual, re.DOTALL) is not None


def _compare_text(where: str, expected: list[str], actual: list[str]) -> None:
    if len(expected) == len(actual) and all(map(_matches, expected, actual)):
        return
    raise DocsError(
        "\n".join(
            [
                f"{where}: the page says one thing and another happened",
                "the page:",
                *(f"    {line}" for line in expected or ["(nothing)"]),
                "happened:",
                *(f"    {line}" for line in actual or ["(nothing)"]),
            ]
        )
    )


def _dispose(namespace: dict[str, Any]) -> None:
    apps = [value for value in namespace.values() if isinstance(value, Flask)]
    for value in list(namespace.values()):
        if isinstance(value, sa.Engine):
            value.dispose()
        elif isinstance(value, SQLAlchemy):
            _dispose_engines(value, apps)


def _dispose_engines(db: SQLAlchemy, apps: list[Flask]) -> None:
    for app in apps:
        if app.extensions.get("sqlalchemy") is db:
            with app.app_context():
                for engine in db.engines.values():
                    engine.dispose()
