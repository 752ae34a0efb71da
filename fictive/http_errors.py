"""Errors as HTTP answers: 404 and 400 in every app, 409 and 503 where an app asks for them.

No answer contains a value of the database's or of the request's.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import flask
import sqlalchemy as sa
from sqlalchemy.orm.exc import StaleDataError
from werkzeug.exceptions import BadRequest, Conflict, HTTPException, NotFound, ServiceUnavailable

from .drivers import sqlstate
from .errors import ConfigurationError, InvalidCursor, InvalidFilter, KeyOfDeletedRow, LockTimeout, NotFoundError

__all__ = ["init_default_handlers", "init_error_handlers"]

log = logging.getLogger("fictive.http")

# SQLSTATEs (PostgreSQL documentation, "PostgreSQL Error Codes")
_UNIQUE_VIOLATION = "23505"
_LOCK_NOT_AVAILABLE = "55P03"
_LOST_A_RACE = ("40001", "40P01")
_OF_SQLITE = ("SQLITE_CONSTRAINT_UNIQUE", "SQLITE_CONSTRAINT_PRIMARYKEY")

_DEFAULT = (NotFoundError, InvalidCursor, InvalidFilter)
_ALL = (*_DEFAULT, LockTimeout, sa.exc.TimeoutError, StaleDataError, sa.exc.DBAPIError)


def init_default_handlers(app: flask.Flask) -> None:
    """What needs no asking: a row that is not there is 404, a malformed cursor or filter is 400.

    Answered as by `abort()`, so that the app's own pages for these codes are shown.
    """
    _register(app, _DEFAULT, _Answers(app))


def init_error_handlers(app: flask.Flask, metadatas: Mapping[Any, sa.MetaData], *, retry_after: int = 1) -> None:
    """`OptInTransactionMixin.init_error_handlers`; `metadatas` tell the columns of a constraint."""
    if isinstance(retry_after, bool) or not isinstance(retry_after, int) or retry_after < 0:
        raise ConfigurationError(f"retry_after = {retry_after!r}: expected whole seconds.")
    _register(app, _ALL, _AnswersInJSON(app, metadatas, retry_after))


class _Answers:
    """An error handler of one app."""

    def __init__(self, app: flask.Flask) -> None:
        self._app = app

    def __call__(self, error: Exception) -> Any:
        if (handler := self._apps_own(error)) is not None:
            return self._app.ensure_sync(handler)(error)
        answer = self.answer_to(error)
        if answer is None:
            raise error  # an error of the server's, as without us
        handled: Any = self._app.handle_http_exception(answer)
        return self.render(answer) if handled is answer else handled

    def answer_to(self, error: Exception) -> HTTPException | None:
        if isinstance(error, NotFoundError):
            return NotFound("The requested object was not found.")
        if isinstance(error, InvalidCursor):
            return BadRequest("Malformed pagination cursor, or one from a different ordering.")
        if isinstance(error, InvalidFilter):
            return BadRequest(str(error))
        return None

    def render(self, answer: HTTPException) -> Any:
        return answer

    def _apps_own(self, error: Exception) -> Any:
        """The app's handler for a base class of the error, which Flask passes over for the one of ours.

        One for every `Exception` is asked only where we have no answer: Flask gives it our `HTTPException` then.
        """
        too_general = (Exception, BaseException) if self.answer_to(error) is not None else ()
        for name in (*flask.request.blueprints, None):
            handlers = self._app.error_handler_spec[name][None]
            for class_ in type(error).__mro__:
                handler = handlers.get(class_)
                if handler is not None and not isinstance(handler, _Answers) and class_ not in too_general:
                    return handler
        return None


class _AnswersInJSON(_Answers):
    """All answers, in JSON or HTML, whichever the client prefers."""

    def __init__(self, app: flask.Flask, metadatas: Mapping[Any, sa.MetaData], retry_after: int) -> None:
        super().__init__(app)
        self._metadatas = metadatas
        self._retry_after = retry_after

    def answer_to(self, error: Exception) -> HTTPException | None:
        if (answer := super().answer_to(error)) is not None:
            return answer
        state = sqlstate(error)
        if isinstance(error, LockTimeout) or state == _LOCK_NOT_AVAILABLE:
            return self._later("The data is locked by another operation. Try again.")
        if isinstance(error, sa.exc.TimeoutError):
            return self._later("The database is busy. Try again.")
        if state in _LOST_A_RACE:
            return self._later("The data was changed by another operation at the same time. Try again.")
        if isinstance(error, StaleDataError):
            return Conflict("The object was changed or deleted meanwhile.")
        if state == _UNIQUE_VIOLATION or isinstance(error, KeyOfDeletedRow) or _is_unique_violation_of_sqlite(error):
            columns = _columns(self._metadatas.values(), error)
            answer = Conflict("There is one already" + (f" with the same {', '.join(columns)}." if columns else "."))
            answer.columns = columns  # type: ignore[attr-defined]
            return answer
        return None

    def _later(self, description: str) -> HTTPException:
        return ServiceUnavailable(description, retry_after=self._retry_after)

    def __call__(self, error: Exception) -> Any:
        found = super().__call__(error)
        if isinstance(error, (LockTimeout, sa.exc.TimeoutError, sa.exc.OperationalError)):
            # no traceback in the log otherwise, as there is for an error 500
            log.warning("%s %s", flask.request.method, flask.request.path, exc_info=error)
        return found

    def render(self, answer: HTTPException) -> Any:
        response = answer.get_response()
        if _wants_json():
            body = {"code": answer.code, "name": answer.name, "description": answer.description}
            if (columns := getattr(answer, "columns", None)) is not None:
                body["columns"] = columns
            response.data = json.dumps(body)
            response.content_type = "application/json"
        return response


def _wants_json() -> bool:
    """Whether the client prefers JSON; one that has no preference gets what it sent."""
    accepted = flask.request.accept_mimetypes
    if accepted.best_match(["text/html", "application/json"]) == "application/json":
        return True
    return flask.request.is_json and accepted["application/json"] >= accepted["text/html"]


def _register(app: flask.Flask, errors: Iterable[type[Exception]], answers: _Answers) -> None:
    """Not over a handler of the app's own, nor over one that answers more."""
    handlers = app.error_handler_spec[None][None]
    for error in errors:
        if error not in handlers or type(handlers[error]) is _Answers:
            app.register_error_handler(error, answers)


def _is_unique_violation_of_sqlite(error: Exception) -> bool:
    return getattr(getattr(error, "orig", None), "sqlite_errorname", None) in _OF_SQLITE


def _columns(metadatas: Iterable[sa.MetaData], error: Exception) -> list[str]:
    """The columns of the constraint or unique index that was violated; none where it is not in the metadata."""
    told: Any = getattr(getattr(error, "orig", None), "diag", None)
    name, table_name = getattr(told, "constraint_name", None), getattr(told, "table_name", None)
    if not name or not table_name:
        return []
    for metadata in metadatas:
        for table in metadata.tables.values():
            if table.name == table_name and table.schema in (None, told.schema_name):
                for item in (*table.constraints, *table.indexes):
                    columns = [column.name for column in getattr(item, "columns", ())]
                    if columns and name == (_name(item) or _name_by_postgresql(item, table, columns)):
                        return columns
    return []


def _name(item: Any) -> str | None:
    """The name in the database, cut off where it is too long for it."""
    if not isinstance(item.name, str):
        return None
    from sqlalchemy.dialects import postgresql  # not before it is used: an app on SQLite never does

    preparer = postgresql.dialect(paramstyle="named").identifier_preparer  # type: ignore[no-untyped-call]
    rendered = preparer.format_constraint(item)
    return rendered.strip('"').replace('""', '"') if rendered else None


def _name_by_postgresql(item: Any, table: sa.Table, columns: list[str]) -> str | None:
    """The name that PostgreSQL gives to a constraint without one (short names only)."""
    if isinstance(item, sa.PrimaryKeyConstraint):
        return f"{table.name}_pkey"
    return f"{table.name}_{'_'.join(columns)}_key" if isinstance(item, sa.UniqueConstraint) else None
