"""The app's source files."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sqlalchemy.orm as sa_orm

__all__ = ["parsed", "source_files"]

_PASSED_OVER = frozenset({"site-packages", "dist-packages", "node_modules", "__pycache__", "tests", "test"})
_LARGEST = 2_000_000  # bytes of a source file


def source_files(source: Path | None, mappers: Iterable[sa_orm.Mapper[Any]] = ()) -> Iterator[Path]:
    """The Python files below `source`, and those with the models; without tests and installed packages."""
    roots = [source] if source is not None else []
    for mapper in mappers:
        file = getattr(sys.modules.get(mapper.class_.__module__), "__file__", None)
        if file and not _PASSED_OVER & set(Path(file).parts[:-1]) - {"tests", "test"}:
            roots.append(Path(file))
    seen = set()
    for root in roots:
        for path in [root] if root.is_file() else _below(root):
            if path not in seen:
                seen.add(path)
                yield path


def _below(root: Path) -> Iterator[Path]:
    for directory, directories, files in os.walk(root):
        directories[:] = [
            each for each in sorted(directories)
            if each not in _PASSED_OVER and each[0] != "." and not Path(directory, each, "pyvenv.cfg").exists()
        ]  # fmt: skip
        yield from (Path(directory, file) for file in sorted(files) if file.endswith(".py"))


def parsed(path: Path, containing: bytes = b"") -> ast.Module | None:
    """The file's syntax tree; None where it is not Python, is huge, or lacks the bytes `containing`."""
    try:
        if path.stat().st_size > _LARGEST or containing not in (text := path.read_bytes()):
            return None
        return ast.parse(text)
    except (OSError, SyntaxError, ValueError):
        return None
