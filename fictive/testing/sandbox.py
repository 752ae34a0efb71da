"""A sandbox for tests: the application works as ever, and nothing of it remains."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy import event
from sqlalchemy.pool import ConnectionPoolEntry

from ..connection.engines import listeners_of, prepare, takers
from ..connection.pool import BorrowingPool
from ..connection.replicas import has_replicas, is_replica, replicas_of, without_replicas
from ..drivers import driver_for, replace_driver
from ..errors import ConfigurationError, SandboxError, UnsupportedDialect
from ..session import private
from ..session.durations import Duration, timeout_in_ms
from .sandbox_driver import sandbox_driver
from .shared_connection import OVER, Recording, SandboxConnection, SharedConnection

if TYPE_CHECKING:
    from .remote import Place, TokenServer

__all__ = ["Sandbox", "engines_of", "place_of", "primaries_alone", "replaced_pool", "roots_of", "sandbox"]

log = logging.getLogger("fictive.testing")

_MANY = 1000


class Source(Protocol):
    """Where a sandbox's connections come from: this process's server connection, or another process."""

    def connect(self) -> Any: ...


_open: dict[sa.Engine, Source] = {}
"""The engines that are in a sandbox."""


@contextlib.contextmanager
def sandbox(*engines: sa.Engine, patience: Duration = "10s") -> Iterator[Sandbox]:
    """`with sandbox(engine) as box:` everything done through the engines is rolled back at the end of the block.

    The application's own code is not changed: its `begin()` is a savepoint, its `commit()` releases it and checks the
    deferred constraints, and a statement outside a transaction stands alone. Sessions, `engine.begin()`,
    `engine.connect()` and `engine.raw_connection()` all use one server connection for each database. Threads take
    turns: where one has written in a transaction that is open, another waits for its end, up to `patience` (seconds,
    `"10s"` or a timedelta), and raises `SandboxError` then.

    Sandboxes nest: the inner one undoes what was done in it. Sessions on the engines are closed at the end.

    Raises `ConfigurationError` where a session has a transaction open, and `UnsupportedDialect` for other databases
    than PostgreSQL by psycopg2 or psycopg. Price: 1 round trip at the end, and 1 before the first commit, which asks
    whether a constraint is deferrable; where one is, 1 for each commit. Savepoints travel with statements; on psycopg2
    they are a message of their own for a text that is sent for the first time, and once the application has used a
    named cursor. COMMIT costs nothing. Replicas are not read from.
    """
    seconds = (timeout_in_ms(patience, "patience") or 0) / 1000
    roots = roots_of(engines)
    if any(not isinstance(source, SharedConnection) for engine, source in _open.items() if engine in roots):
        raise ConfigurationError("sandbox() does not go into the sandbox of another process.")
    box = Sandbox(patience=seconds)
    with contextlib.ExitStack() as stack:
        if has_replicas():
            stack.enter_context(primaries_alone(roots))
        box._enter(roots, stack)
        stack.enter_context(box._taking_in(stack))
        stack.callback(box._close_token)
        yield box


def roots_of(engines: Iterable[sa.Engine]) -> list[sa.Engine]:
    """The engines that a sandbox is for; raises what `sandbox()` raises where there is none, or one is in use."""
    roots = [engine for engine in dict.fromkeys(map(private.root_engine, engines)) if not is_replica(engine)]
    if not roots:
        raise ConfigurationError("sandbox() needs an engine.")
    for engine in roots:
        if (engine.dialect.name, engine.dialect.driver) not in (("postgresql", "psycopg2"), ("postgresql", "psycopg")):
            raise UnsupportedDialect(
                "sandbox() needs PostgreSQL by psycopg2 or psycopg, not "
                f"{engine.dialect.name}+{engine.dialect.driver}."
            )
    for link in _links(roots):
        if link.in_transaction or link.owner.keeps:
            raise ConfigurationError("sandbox() goes around transactions and pinned(), and a session has one open.")
    return roots


def engines_of(app: Any) -> list[sa.Engine]:
    """All engines of a Flask app; an engine, or several, are what they are."""
    if not hasattr(app, "app_context"):
        return list(app) if isinstance(app, (list, tuple)) else [app]
    with app.app_context():
        return list(app.extensions["sqlalchemy"].engines.values())


class Sandbox:
    """What `with db.sandbox() as box:` gives."""

    def __init__(self, *, patience: float) -> None:
        self._patience = patience
        self._staged: deque[str] = deque()
        self._keeps = False
        self._outer: list[SharedConnection] = []
        self._places: dict[Place, SharedConnection] = {}
        self._token_server: TokenServer | None = None

    def fail_next_commit(self, sqlstate: str = "40001") -> None:
        """Let the next COMMIT of the application fail with an error of this SQLSTATE, as the server raises it.

        `"40001"` is a serialization failure, `"40P01"` a deadlock: what `retries` runs again. Each call stages one.
        Statements outside a transaction have no COMMIT. Sends nothing.
        """
        if len(sqlstate) != 5 or not sqlstate.isalnum():
            raise ConfigurationError(f"{sqlstate!r} is no SQLSTATE: five letters or digits, such as '40001'.")
        self._staged.append(sqlstate.upper())

    def keep(self) -> None:
        """Commit at the end of the sandbox instead of rolling back, to look at the rows: a log line says where they
        are. For debugging."""
        self._keeps = True
        for shared in self._outer:
            shared.is_kept = True

    @contextlib.contextmanager
    def record(self) -> Iterator[Recording]:
        """`with box.record() as log:` what the application sends: `log.statements`, and `log.round_trips` as they are
        outside of a sandbox. Of one engine's connections with psycopg2 or psycopg; sends nothing itself."""
        recording = Recording()
        for shared in self._outer:
            shared.recordings.append(recording)
        try:
            yield recording
        finally:
            for shared in self._outer:
                shared.recordings = [each for each in shared.recordings if each is not recording]

    def token(self) -> str:
        """What lets another process of this machine use the sandbox, by `fictive.testing.join`: it takes turns as
        another thread does.

        Pass it to a child process, or in the header `Fictive-Sandbox` of a request. It is valid until the sandbox
        ends; who has it can run code in this process. The first call opens a port of loopback.
        """
        from .remote import TokenServer

        if self._token_server is None:
            self._token_server = TokenServer(self._connect_to)
        return self._token_server.token

    def _connect_to(self, place: Place) -> SandboxConnection:
        if place not in self._places:
            raise ConfigurationError(
                f"The sandbox has no database {_named(place)}, only {', '.join(map(_named, self._places))}."
            )
        return self._places[place].connect()

    def _close_token(self) -> None:
        if self._token_server is not None:
            self._token_server.close()

    def _enter(self, engines: list[sa.Engine], stack: contextlib.ExitStack) -> None:
        shared_by_engine = {engine: each for engine, each in _open.items() if isinstance(each, SharedConnection)}
        by_url = {_key(engine): shared for engine, shared in shared_by_engine.items()}
        nested: dict[SharedConnection, None] = {}
        for engine in engines:
            found = by_url.get(_key(engine))
            if found is not None:
                self._places[place_of(engine)] = found
            if engine in shared_by_engine:
                nested[shared_by_engine[engine]] = None
                continue
            if found is None:
                prepare(engine)
                found = by_url[_key(engine)] = SharedConnection(engine, staged=self._staged, patience=self._patience)
                self._places[place_of(engine)] = found
                stack.callback(self._end, found, engine)
            elif found not in self._outer:
                nested[found] = None
            self._outer.append(found)
            stack.enter_context(replaced_pool(engine, found))
        for shared in nested:
            self._outer.append(shared)
            stack.enter_context(self._nested(shared))

    @contextlib.contextmanager
    def _taking_in(self, stack: contextlib.ExitStack) -> Iterator[None]:
        """Engines that are made meanwhile, with the URL of one of the sandbox's, are in it: those of an app that a
        test makes for itself."""

        def take(engine: sa.Engine) -> None:
            for other, shared in list(_open.items()):
                if engine not in _open and shared in self._outer and _key(other) == _key(engine):
                    stack.enter_context(replaced_pool(engine, shared))

        takers.append(take)
        try:
            yield
        finally:
            takers.remove(take)

    def _end(self, shared: SharedConnection, engine: sa.Engine) -> None:
        keeps = self._keeps or shared.is_kept
        shared.end(keep=keeps)
        if keeps:
            log.warning("the rows of the sandbox were kept, in %s", engine.url.render_as_string())

    @contextlib.contextmanager
    def _nested(self, shared: SharedConnection) -> Iterator[None]:
        """A sandbox in another one."""
        engines = [engine for engine, each in _open.items() if each is shared]
        known = {session: list(session) for session in _sessions(engines)}
        inner = shared.nest(self._staged)
        try:
            yield
        finally:
            engines = [engine for engine, each in _open.items() if each is shared]
            for connection in list(shared.connections):
                shared.rollback(connection)
            shared.unnest(inner, keep=self._keeps)
            for session in _sessions(engines):
                private.scope_of(session).committed_writes.clear()
                session.rollback() if session.in_transaction() else None
                before = set(map(id, known.get(session, ())))
                for instance in [*session]:
                    if id(instance) not in before:
                        session.expunge(instance)
                session.expire_all()


class SandboxPool(BorrowingPool):
    """In place of an engine's pool: each connection is one over the sandbox's."""

    def __init__(self, engine: sa.Engine) -> None:
        self.source: Source | None = None
        super().__init__(self._connect_to_source, pool_size=_MANY, max_overflow=-1, dialect=engine.dialect)
        for name, listener in listeners_of(engine, sandbox_driver(driver_for(engine.dialect))):
            event.listen(self, name, listener)
        self._replaced = engine.pool
        self._found = _listeners(engine.pool)
        for name, listeners in zip(_EVENTS, self._found, strict=True):
            for listener in listeners:
                if not private.is_own_listener(listener):
                    event.listen(self, name, listener)
        self._own = _listeners(self)
        self.find_listeners()

    def _connect_to_source(self) -> Any:
        if self.source is None:
            raise SandboxError(OVER)
        return self.source.connect()

    def fits(self, engine: sa.Engine) -> bool:
        """Whether it is as one that is made now: nobody listens to more, or to less."""
        return (
            self.source is None
            and engine.pool is self._replaced
            and _listeners(engine.pool) == self._found
            and _listeners(self) == self._own
        )

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        dbapi: Any = record.dbapi_connection
        if dbapi is not None:
            if isinstance(dbapi, SandboxConnection) and dbapi.is_ended:
                return  # it comes back after the end
            dbapi.renew()
        super()._do_return_conn(record)

    def recreate(self) -> SandboxPool:
        return self  # `engine.dispose()` of the application

    def dispose(self) -> None:
        """Nothing to close before the sandbox ends."""

    def end(self) -> None:
        self.check_in_all()
        self.source = None
        private.forget_entries(self)


_EVENTS = ("checkout", "checkin", "reset")


def _listeners(pool: Any) -> list[list[Any]]:
    return [list(getattr(pool.dispatch, name)) for name in _EVENTS]


_POOL = "_fictive_sandbox_pool"
"""The engine's attribute with the pool of a sandbox that has ended, for the next one: making it is half of the price.
Not in a weak dictionary, since a listener may hold the engine."""


def _pool_for(engine: sa.Engine, source: Source) -> SandboxPool:
    pool: SandboxPool | None = vars(engine).pop(_POOL, None)
    if pool is None or not pool.fits(engine):
        pool = SandboxPool(engine)
    pool.source = source
    return pool


@contextlib.contextmanager
def replaced_pool(engine: sa.Engine, source: Source) -> Iterator[None]:
    """All connections of the engine come from there."""
    original, driver, before = engine.pool, driver_for(engine.dialect), _open.get(engine)
    pool = _pool_for(engine, source)
    links = _links([engine])
    try:
        for link in links:
            link.let_go()
        _open[engine] = source
        replace_driver(engine.dialect, sandbox_driver(driver))
        engine.pool = pool
        _retarget(links)
        yield
    finally:
        try:
            links = _closed(engine)
            pool.end()
        finally:
            engine.pool = original
            if before is None:
                _open.pop(engine, None)
                replace_driver(engine.dialect, None)
                vars(engine)[_POOL] = pool
            else:  # that of the parent process
                _open[engine] = before
                replace_driver(engine.dialect, driver)
            _retarget(links)


def _closed(engine: sa.Engine) -> list[Any]:
    """Close the engine's sessions; returns their links."""
    found = _sessions_and_links([engine])
    for session, _ in found:
        try:
            session.close()
        except Exception:
            log.warning("closing a session at the end of the sandbox failed", exc_info=True)
    return [link for _, link in found]


def _retarget(links: list[Any]) -> None:
    """Let the connection objects of sessions that are there take their connections from the engine's pool of now."""
    for link in links:
        link.driver = driver_for(link.dialect)
        link.idle = getattr(link.engine.pool, "idle", deque(maxlen=0))


@contextlib.contextmanager
def primaries_alone(engines: list[sa.Engine]) -> Iterator[None]:
    """Without replicas, also for the sessions that are there: each connection object knows those of its engine."""
    try:
        with without_replicas(engines):
            _find_replicas(engines)
            yield
    finally:
        _find_replicas(engines)


def _find_replicas(engines: list[sa.Engine]) -> None:
    for link in _links(engines):
        link.replicas = replicas_of(link.engine)
        for replica in () if link.replicas is None else link.replicas.members:
            prepare(replica.engine)


def _sessions(engines: Iterable[sa.Engine]) -> list[sa_orm.Session]:
    return [session for session, link in _sessions_and_links(engines)]


def _links(engines: Iterable[sa.Engine]) -> list[Any]:
    return [link for _, link in _sessions_and_links(engines)]


def _sessions_and_links(engines: Iterable[sa.Engine]) -> list[tuple[sa_orm.Session, Any]]:
    sessions = private.sessions()
    if not sessions:
        return []
    roots = set(engines)
    return [
        (session, connection.link)
        for session in sessions
        if (scope := private.scope_of(session)) is not None
        for engine, connection in list(scope.connections.items())
        if private.root_engine(engine) in roots
    ]


def _key(engine: sa.Engine) -> tuple[object, ...]:
    """What engines have in common whose connections could be each other's."""
    return *engine.url[:-1], str(engine.url.query)


def place_of(engine: sa.Engine) -> Place:
    """Which database, whoever asks."""
    url = engine.url
    return url.host or "", url.port or 5432, url.database or "", engine.dialect.driver


def _named(place: Place) -> str:
    host, port, database, driver = place
    return f"{host}:{port}/{database} by {driver}"
