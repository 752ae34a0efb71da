"""What a transaction is in a Flask app: around a view, and around a piece of work with an app context of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import flask
from werkzeug.exceptions import HTTPException

from .session.blocks import TransactionBlock
from .session.contexts import finishing
from .session.session import OptInSession
from .session.transaction import Rollback
from .session.unentered import needs_with

if TYPE_CHECKING:
    from .config import Settings

__all__ = ["app_context", "around_view"]

_View = TypeVar("_View", bound=Callable[..., Any])


def around_view(block: TransactionBlock, view: _View) -> _View:
    """`view` in `block`; the response, or the HTTP exception, decides which way it ends."""

    @functools.wraps(view)
    def run(*args: Any, **kwargs: Any) -> Any:
        ended_with: list[Any] = []

        def once() -> None:
            ended_with.clear()
            app = flask.current_app
            try:
                response = app.make_response(app.ensure_sync(view)(*args, **kwargs))
                status = response.status_code
                ended_with.append(response)
            except HTTPException as error:
                status = error.get_response().status_code
                ended_with.append(error)
            settings: Settings = app.extensions["fictive"]
            if status in settings.rollback_statuses:
                raise Rollback

        block.run(once)
        if not ended_with:  # a Rollback of the view's own, which has no response to give
            raise Rollback
        (found,) = ended_with
        if isinstance(found, HTTPException):
            raise found
        return found

    return run  # type: ignore[return-value]


@needs_with("db.context(app)")
def app_context(app: flask.Flask, session: Callable[[], OptInSession]) -> Iterator[OptInSession]:
    """An app context with its session: what is pending or open at its end is committed, an exception rolls back."""
    with app.app_context():
        current = session()
        with finishing(current):
            yield current
