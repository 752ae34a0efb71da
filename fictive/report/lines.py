"""Which line of the application a statement came from: not one of a library it came through."""

from __future__ import annotations

import dataclasses
import os
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from types import CodeType
from typing import Any, TypeAlias

__all__ = ["LIBRARY", "Line", "Place", "is_library", "line_of", "register_application"]

Place: TypeAlias = "tuple[CodeType, int, Mapping[str, Any]]"
"""What is kept of a frame: its code, the line in it, and its globals, which lead from a template's code to its
text."""

LIBRARY: dict[str, bool] = {}
"""By file name: whether it is a library's. Filled by `is_library`."""

_FOLDERS = ("site-packages", "dist-packages")
_OWN = str(Path(__file__).parents[1])
_LIBRARY_ROOTS = {
    os.path.realpath(path)
    for name, path in sysconfig.get_paths().items()
    if name in ("stdlib", "platstdlib", "purelib", "platlib")
} | {_OWN}
_application_roots: set[str] = set()


def register_application(root: str) -> None:
    """Say that the code below `root` is the application's, even where it is installed among the libraries."""
    root = os.path.realpath(root)
    if root not in _application_roots:
        _application_roots.add(root)
        LIBRARY.clear()


def is_library(file: str) -> bool:
    """Whether a code object's file is a library's: the innermost of the roots it lies in decides."""
    found = LIBRARY[file] = _is_library(file)
    return found


def _is_library(file: str) -> bool:
    if file.startswith("<"):
        return file != "<template>"  # frozen modules, generated methods, a prompt
    path = os.path.realpath(file)
    library = max((len(root) for root in _LIBRARY_ROOTS if _below(path, root)), default=0)
    for folder in _FOLDERS:
        if (at := path.rfind(f"{os.sep}{folder}{os.sep}")) >= 0:
            library = max(library, at + len(folder) + 1)
    application = max((len(root) for root in _application_roots if _below(path, root)), default=0)
    return library > application


def _below(path: str, root: str) -> bool:
    return path == root or path.startswith(root + os.sep)


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the application's code."""

    file: str
    number: int
    function: str

    def __str__(self) -> str:
        return f"{self.short}:{self.number}" + (f" in {self.function}" if self.function else "")

    @property
    def short(self) -> str:
        """The file, relative to the application or the working directory where it lies below one."""
        path = os.path.realpath(self.file)
        roots = [os.path.dirname(root) for root in _application_roots if _below(path, root)] or [os.getcwd()]
        root = min(roots, key=len)
        return os.path.relpath(path, root) if _below(path, root) else self.file


def line_of(place: Place | None) -> Line | None:
    """The line, that of a Jinja template where the code is a template's."""
    if place is None:
        return None
    code, number, names = place
    template = names.get("__jinja_template__")
    if template is not None:
        return Line(str(template.filename or template.name), template.get_corresponding_lineno(number), "")
    return Line(code.co_filename, number, _function(getattr(code, "co_qualname", code.co_name)))


def _function(name: str) -> str:
    """The function's name without those it is nested in; of a comprehension or a lambda, that of its function."""
    while name.endswith(">") and "." in name:
        name = name.rpartition(".")[0].removesuffix(".<locals>")
    return name.rpartition("<locals>.")[2]
