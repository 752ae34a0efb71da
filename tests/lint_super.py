"""`./run lint`: in the rooms below a method that calls `super().another_name()` says why, in a comment there.

Such a call passes over an override. It was the way to a silent fault: `super().set_session()` of a connection reached
another class than was meant, and the isolation level was lost. Run as `python -m tests.lint_super`.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("drivers", "connection", "session")


def findings(source: str) -> list[tuple[int, str]]:
    """Line and text of each use of `super().another_name` without a comment on that line or the one before."""
    told = _commented(source)
    return [
        (number, f"{method}() uses super().{name}: say why in a comment there")
        for number, method, name in _others(ast.parse(source), None, in_class=False)
        if not {number - 1, number} & told
    ]


def _others(node: ast.AST, method: str | None, *, in_class: bool) -> Iterator[tuple[int, str, str]]:
    """Line, method and name of each `super().name` in a method that has another name."""
    if in_class and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        method = node.name
    if isinstance(node, ast.Attribute) and _is_super(node.value) and method not in (None, node.attr):
        yield node.end_lineno or node.lineno, str(method), node.attr
    for child in ast.iter_child_nodes(node):
        yield from _others(child, method, in_class=isinstance(node, ast.ClassDef))


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _commented(source: str) -> set[int]:
    """Lines with a comment that is more than an order to a checker."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    orders = r"#\s*(type:\s*ignore(\[[^]]*\])?|noqa(:\s*[A-Z0-9, ]+)?|pragma:.*|fmt:.*)"
    return {line for line, comment in comments.items() if re.sub(orders, "", comment).strip(" #-")}


def main() -> int:
    """1 where there is a finding, each of which is printed."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {text}"
        for room in ROOMS
        for path in sorted((ROOT / "fictive" / room).rglob("*.py"))
        for number, text in findings(path.read_text(encoding="utf-8"))
    ]
    print("\n".join(found) or "super(): each call of another method says why")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
