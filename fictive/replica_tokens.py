"""How far a user must see, carried from one request to the next: a signed token in a cookie or a header.

It holds a position in the write-ahead log for each database with replicas. Whoever forged one could send their own
reads to the primary, and no more.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flask
import itsdangerous
import sqlalchemy as sa

from .config import Settings
from .connection.replicas import COMMIT_POSITION, Positions, current_positions, on_primary, parse_lsn, using_positions
from .errors import InvalidToken
from .session.private import root_engine
from .session.session import OptInSession

__all__ = ["COOKIE", "HEADER", "Tokens", "install"]

log = logging.getLogger("fictive.replicas")

COOKIE = "fictive_token"
HEADER = "Fictive-Token"

_BLOCK = "_fictive_positions"
_SEEN = "_fictive_positions_of_request"


class Tokens:
    """Makes and reads the tokens of one app."""

    def __init__(self, app: flask.Flask, settings: Settings, engines: Callable[[], Mapping[str | None, sa.Engine]]):
        self._app = app
        self._settings = settings
        self._engines = engines

    def make(self, positions: Positions) -> str:
        """The token of what was written; one round trip for each primary that was written to outside a transaction."""
        known = positions.complete(_ask)
        found = {key or "": known[engine] for key, engine in self._roots().items() if engine in known}
        return self._serializer().dumps(found)

    def read(self, token: str) -> Positions:
        """Raises `InvalidToken` for one that this app has not made; one that is too old says nothing."""
        try:
            found = self._serializer().loads(token, max_age=int(self._settings.replica_token_age))
        except itsdangerous.SignatureExpired:
            return Positions()
        except itsdangerous.BadData:
            raise InvalidToken("This application did not make that token with db.token().") from None
        engines = self._roots()
        return Positions(
            {engines[key or None]: position for key, position in found.items() if (key or None) in engines}
        )

    def _roots(self) -> dict[str | None, sa.Engine]:
        return {key: root_engine(engine) for key, engine in self._engines().items()}

    def _serializer(self) -> itsdangerous.URLSafeTimedSerializer:
        secret = self._app.secret_key or self._derived()
        return itsdangerous.URLSafeTimedSerializer(secret, salt="fictive.replicas")

    def _derived(self) -> bytes:
        """For an app without a secret key: what all its processes share, and nobody else knows."""
        urls = [engine.url.render_as_string(hide_password=False) for engine in self._engines().values()]
        return hashlib.sha256("\n".join(sorted(urls)).encode()).digest()

    @contextlib.contextmanager
    def using(self, token: str | None) -> Iterator[None]:
        """Reads in the block see at least what was there when the token was made, besides what they would see
        anyway."""
        positions = Positions(outer=current_positions())
        if token is not None:
            positions.include(self.read(token))
        with using_positions(positions):
            yield


def install(app: flask.Flask, tokens: Tokens, settings: Settings) -> None:
    """Take the token from each request, and put a new one into the response to a request that wrote."""

    def begin(sender: flask.Flask, **_: Any) -> None:
        positions = Positions()
        if (token := _sent(settings)) is not None:
            with contextlib.suppress(InvalidToken):  # of another deployment, or a client's invention
                positions = tokens.read(token)
        setattr(flask.g, _SEEN, positions)
        enter(positions)

    def enter(positions: Positions) -> None:
        block = using_positions(positions)
        block.__enter__()
        setattr(flask.g, _BLOCK, block)

    def begin_again(sender: flask.Flask, **_: Any) -> None:
        """A streamed response is made after the request's end, in its contexts, which are pushed once more for it."""
        if (positions := flask.g.get(_SEEN)) is not None and _BLOCK not in flask.g:
            enter(positions)

    def finish(response: flask.Response) -> flask.Response:
        positions = current_positions()
        if settings.replica_token is None or positions is None or not positions.changed:
            return response
        try:
            token = tokens.make(positions)
        except sa.exc.SQLAlchemyError:
            log.warning("the position of what was written could not be found out", exc_info=True)
            return response
        if settings.replica_token == "header":
            response.headers[HEADER] = token
        else:
            response.set_cookie(
                COOKIE,
                token,
                max_age=int(settings.replica_token_age),
                path=app.config["APPLICATION_ROOT"] or "/",
                domain=app.config["SESSION_COOKIE_DOMAIN"] or None,
                secure=app.config["SESSION_COOKIE_SECURE"],
                httponly=True,
                samesite=app.config["SESSION_COOKIE_SAMESITE"] or "Lax",
            )
            response.vary.add("Cookie")
        return response

    def end(error: BaseException | None) -> None:
        block = flask.g.pop(_BLOCK, None)
        if block is not None:
            with contextlib.suppress(ValueError):  # torn down in another context than it began in
                block.__exit__(None, None, None)

    # before any `before_request` function, which may read
    flask.request_started.connect(begin, app, weak=False)
    flask.appcontext_pushed.connect(begin_again, app, weak=False)
    app.after_request(finish)
    app.teardown_request(end)


def _sent(settings: Settings) -> str | None:
    if settings.replica_token == "header":
        return flask.request.headers.get(HEADER)
    return flask.request.cookies.get(COOKIE) if settings.replica_token == "cookie" else None


def _ask(engine: sa.Engine) -> int:
    with OptInSession(engine) as session, on_primary():
        query = sa.text(COMMIT_POSITION)
        return parse_lsn(str(session.scalar(query, execution_options={"fictive_writes": False})))
