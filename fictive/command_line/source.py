"""The app's source files."""

from __future__ import annotations

import ast
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sqlalchemy.orm as sa_orm

__all__ = ["Unreadable", "parsed", "read", "source_files"]

_PASSED_OVER = frozenset({"site-packages", "dist-packages", "node_modules", "__pycache__", "tests", "test"})
_LARGEST = 2_000_000  # bytes of a source file


class Unreadable(Exception):
    """Why a file could not be read as Python."""


def source_files(source: Path | None, mappers: Iterable[sa_orm.Mapper[Any]] = ()) -> Iterator[Path]:
    """The Python files below `source`, and those with the models; without tests and installed packages."""
    roots = [source] if source is not None else []
    for mapper in mappers:
        file = getattr(sys.modules.get(mapper.class_.__module__), "__file__", None)
        if file and not _PASSED_OVER & set(Path(file).parts[:-1]) - {"tests", "test"}:
            roots.append(Path(file))
    seen: set[str] = set()
    """Without symbolic links, which may name one file twice."""
    for root in roots:
        for path in [root] if root.is_file() else _below(root):
            if (real := os.path.realpath(path)) not in seen and path.is_file():
                seen.add(real)
                yield path


def _below(root: Path) -> Iterator[Path]:
    for directory, directories, files in os.walk(root):
        directories[:] = [
            each for each in sorted(directories)
            if each not in _PASSED_OVER and each[0] != "." and not Path(directory, each, "pyvenv.cfg").exists()
        ]  # fmt: skip
        yield from (Path(directory, file) for file in sorted(files) if file.endswith(".py"))


def read(path: Path) -> ast.Module:
    """The file's syntax tree. Raises `Unreadable` for what is not Python, cannot be read, or is huge."""
    try:
        if path.stat().st_size > _LARGEST:
            raise Unreadable("it is huge")
        return _parse(path.read_bytes())
    except SyntaxError as error:
        raise Unreadable(f"{error.msg}, line {error.lineno}" if error.lineno else str(error)) from error
    except (OSError, ValueError) as error:
        raise Unreadable(getattr(error, "strerror", None) or str(error)) from error
    except (RecursionError, MemoryError) as error:
        raise Unreadable("it is nested too deeply") from error


def parsed(path: Path, containing: bytes = b"") -> ast.Module | None:
    """The same; None where it cannot be read, or lacks the bytes `containing`."""
    try:
        if path.stat().st_size > _LARGEST or containing not in path.read_bytes():
            return None
        return read(path)
    except (OSError, Unreadable):
        return None


def _parse(text: bytes) -> ast.Module:
    with warnings.catch_warnings():  # of the compiler's about the app's code, such as an escape that is none
        warnings.simplefilter("ignore")
        return ast.parse(text)
