"""The sandbox of a test's process, joined by another process that has its token: a child, a live server."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import sqlalchemy as sa

from ..connection.engines import prepare
from ..errors import SandboxError
from .remote import Place, RemoteConnection, pid_of
from .sandbox import engines_of, place_of, primaries_alone, replaced_pool, roots_of

__all__ = ["HEADER", "SandboxMiddleware", "join"]

HEADER = "Fictive-Sandbox"
"""The header of a request that is to run in a sandbox: its token."""

_SECONDS = 10.0


@contextlib.contextmanager
def join(token: str, *engines: sa.Engine) -> Iterator[None]:
    """`with join(token, engine):` all that this process does through the engines goes to the sandbox of the token.

    The token is that of `sandbox.token()` in another process of this machine. Each call of the driver goes over a
    socket to that process, and takes turns there; what is left open at the end of the block is rolled back. In the
    process that has the sandbox itself, nothing changes. For tests only: never take a token from a stranger.

    Raises `ConfigurationError` for what is no token, for a database that the sandbox has not, and where a session has
    a transaction open, and `SandboxError` when the sandbox has ended. Price: a tenth of a millisecond for each call of
    the driver, and one connection to the server of its own where the engine has not had one.
    """
    if pid_of(token) == os.getpid():
        yield
        return
    roots = roots_of(engines)
    with contextlib.ExitStack() as stack:
        stack.enter_context(primaries_alone(roots))
        for engine in roots:
            if not hasattr(engine.dialect, "default_isolation_level"):
                engine.connect().close()  # SQLAlchemy asks the server what it can
            prepare(engine)
            source = _Joined(token, engine)
            source.connect().close()  # raises what is wrong
            stack.enter_context(replaced_pool(engine, source))
        yield


class _Joined:
    """Where the connections of an engine come from."""

    def __init__(self, token: str, engine: sa.Engine) -> None:
        self._token = token
        self._place: Place = place_of(engine)
        self._adapters = getattr(engine.dialect, "_psycopg_adapters_map", None)

    def connect(self) -> RemoteConnection:
        return RemoteConnection(self._token, self._place, self._adapters)


class SandboxMiddleware:
    """Lets requests with the header `Fictive-Sandbox` run in the sandbox whose token that is: around the WSGI app of a
    server that tests start, as in `app.wsgi_app = SandboxMiddleware(app.wsgi_app, app)`.

    While such a request runs, all that the process does is in its sandbox. Requests of another one, or of none, wait
    for the end of those before them, up to 10 seconds, and raise `SandboxError` then. Use it in tests only: the header
    lets whoever sends it run code in the server.
    """

    def __init__(self, wsgi_app: Callable[..., Iterable[bytes]], app: Any) -> None:
        """`app` is the Flask app, an engine, or several."""
        self._wsgi_app = wsgi_app
        self._app = app
        self._changed = threading.Condition()
        self._token: str | None = None
        """That of the requests under way; empty where they have none, None where there are no requests."""
        self._requests = 0
        self._joined = contextlib.ExitStack()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        self._enter(environ.get("HTTP_" + HEADER.upper().replace("-", "_"), ""))
        try:
            return _Closing(self._wsgi_app(environ, start_response), self._leave)
        except BaseException:
            self._leave()
            raise

    def _enter(self, token: str) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._token in (None, token), _SECONDS):
                raise SandboxError(f"Requests of another sandbox have been running for {_SECONDS:g} seconds.")
            if self._token is None and token:
                self._joined.enter_context(join(token, *engines_of(self._app)))
            self._token = token
            self._requests += 1

    def _leave(self) -> None:
        with self._changed:
            self._requests -= 1
            if not self._requests:
                self._token = None
                self._changed.notify_all()
                self._joined.close()


class _Closing:
    """An answer, and what is called once it has been sent."""

    def __init__(self, answer: Iterable[bytes], then: Callable[[], None]) -> None:
        self._answer = answer
        self._then = then

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._answer)

    def close(self) -> None:
        try:
            if (close := getattr(self._answer, "close", None)) is not None:
                close()
        finally:
            self._then()
