"""The three ways to run a statement outside a transaction, side by side: `python docs/measure_designs.py`.

Needs the extras `psycopg2`, `psycopg` and `embedded`. Prints what docs/design.rst shows. Every line comes from the
wire, the log, the driver's connection or a second look at the table; nothing is written down in advance.
"""

from __future__ import annotations

import contextlib
import io
import logging
import platform
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import psycopg2
import sqlalchemy as sa
from sqlalchemy.orm import Session

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fictive.sqlalchemy import OptInSession
from fictive.testing import postgres
from fictive.testing.wire import Log, Wire

SELECT = sa.text("SELECT n FROM t")
INSERT = sa.text("INSERT INTO t VALUES (1)")
RULE = "-" * 76


class EngineLevel:
    """AUTOCOMMIT on the engine; a transaction asks for the server's own level, as SQLAlchemy found it."""

    title = 'a level on the engine: create_engine(..., isolation_level="AUTOCOMMIT")'

    def __init__(self, url: str) -> None:
        self.bind = self.engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")

    def outside(self, statement: sa.TextClause) -> None:
        with self.engine.connect() as connection:
            connection.execute(statement)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Any]:
        level = self.engine.dialect.default_isolation_level
        with self.engine.connect().execution_options(isolation_level=level) as connection, connection.begin():
            yield connection


class SecondView:
    """The engine as it is for transactions, and a view of it in AUTOCOMMIT for the rest; they share a pool."""

    title = 'a second view of the engine: engine.execution_options(isolation_level="AUTOCOMMIT")'

    def __init__(self, url: str) -> None:
        self.engine = sa.create_engine(url)
        self.bind = self.engine.execution_options(isolation_level="AUTOCOMMIT")

    def outside(self, statement: sa.TextClause) -> None:
        with self.bind.connect() as connection:
            connection.execute(statement)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Any]:
        with self.engine.begin() as connection:
            yield connection


class DriverAttribute:
    """fictive: the driver's attribute, on a connection borrowed for one statement."""

    title = "the driver's autocommit attribute on a borrowed connection: fictive.sqlalchemy.OptInSession"

    def __init__(self, url: str) -> None:
        self.engine = sa.create_engine(url)
        self.bind = OptInSession(self.engine).get_bind()

    def outside(self, statement: sa.TextClause) -> None:
        with OptInSession(self.engine) as session:
            session.execute(statement)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Any]:
        with OptInSession(self.engine) as session, session.begin():
            yield session


DESIGNS: list[Callable[[str], Any]] = [EngineLevel, SecondView, DriverAttribute]


def main() -> None:
    with postgres.server() as pg, Wire(pg.host, pg.port) as wire, _database(pg) as (name, look):
        print(
            f"Python {platform.python_version()}, SQLAlchemy {sa.__version__}, "
            f"psycopg2 {psycopg2.__version__.split()[0]}, psycopg {psycopg.__version__}, "
            f"PostgreSQL {look('SHOW server_version')[0].split()[0]}"
        )
        for make in DESIGNS:
            for driver in ("psycopg2", "psycopg"):
                design = make(wire.url(pg.url(name, driver=driver)))
                print(f"\n{RULE}\n{design.title}\n{driver}\n{RULE}")
                for _ in range(3):  # what SQLAlchemy asks and sets the first time is not of interest
                    design.outside(SELECT)
                measure(design, wire, look)
                design.engine.dispose()
        print(f"\n{RULE}\nend of a transaction: does the pool have the connection when this fires?\n{RULE}")
        order_of_events(sa.create_engine(wire.url(pg.url(name, driver="psycopg2"))))


def measure(design: Any, wire: Wire, look: Callable[[str], list[Any]]) -> None:
    engine = design.engine

    with wire.record() as log:
        design.outside(SELECT)
    show("one SELECT", log)

    with wire.record() as log, design.transaction() as runner:
        runner.execute(INSERT)
    show("begin, INSERT, commit", log)

    with echo() as lines:
        design.outside(SELECT)
    print("ECHO of one SELECT:" + "".join(f"\n    {line}" for line in lines))
    with events(engine) as fired, wire.record() as log:
        design.outside(SELECT)
    sent = " / ".join(" ".join(statement.split()) for statement in log.statements)
    print(f"engine events of one SELECT, with listeners: {', '.join(fired) or 'none'}; sent: {sent}")

    print(f"engine.begin(), INSERT, error: {rolls_back(engine, look)}")
    print(f"session.get_bind().begin(), INSERT, error: {rolls_back(design.bind, look)}")

    kill(look)
    print(f"pooled connections killed; the next statements: {attempts(design)}")
    print(f"    then engine.begin(), INSERT, error: {rolls_back(engine, look)}")

    try:
        with design.transaction() as runner:
            runner.execute(INSERT)
            kill(look)
            runner.execute(SELECT)
    except sa.exc.DBAPIError as error:
        print(f"killed within a transaction: {type(error.orig).__name__}; the next statements: {attempts(design)}")
    print(f"    then engine.begin(), INSERT, error: {rolls_back(engine, look)}")
    print(f"    at rest in the pool: autocommit = {modes(engine)}")

    database = look("SELECT current_database()")[0]
    look(f'ALTER DATABASE "{database}" SET default_transaction_isolation = "repeatable read"')
    kill(look)
    attempts(design)
    with design.transaction() as runner:
        level = runner.execute(sa.text("SHOW transaction_isolation")).scalar()
    print(f"the server's default becomes REPEATABLE READ; the next transaction has: {level}")
    look(f'ALTER DATABASE "{database}" RESET default_transaction_isolation')


def order_of_events(engine: sa.Engine) -> None:
    """SQLAlchemy's own session, so that nothing of fictive's is in between."""
    session = Session(engine)

    def say(name: str) -> Callable[..., None]:
        return lambda *_: print(f"{name}: {'yes' if engine.pool.checkedin() else 'no'}")

    session.execute(SELECT)
    for target, name in ((engine, "reset"), (engine, "checkin"), (session, "after_transaction_end")):
        sa.event.listen(target, name, say(name))
    session.commit()
    engine.dispose()


def show(what: str, log: Log) -> None:
    print(f"{what}: {log.round_trips} round trip{'s' * (log.round_trips != 1)}")
    for statement in log.statements:
        print(f"    {' '.join(statement.split())}")


def rolls_back(engine: sa.Engine, look: Callable[[str], list[Any]]) -> str:
    """What is left of a transaction that failed."""
    look("DELETE FROM t")
    with contextlib.suppress(KeyError), engine.begin() as connection:
        connection.execute(INSERT)
        raise KeyError
    rows = look("SELECT count(*) FROM t")[0]
    return "rolled back" if rows == 0 else f"NOT ROLLED BACK, {rows} row stays"


def kill(look: Callable[[str], list[Any]]) -> None:
    """End every other backend of the database, and wait until it is gone."""
    others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    look(f"SELECT pg_terminate_backend(pid, 5000) {others}")


def attempts(design: Any) -> str:
    """How the first two statements end."""
    ends = []
    for _ in range(2):
        try:
            design.outside(SELECT)
            ends.append("ok")
        except sa.exc.SQLAlchemyError as error:
            ends.append(type(getattr(error, "orig", None) or error).__name__)
    return ", ".join(ends)


def modes(engine: sa.Engine) -> str:
    """The driver's attribute on each connection that the pool holds, past SQLAlchemy's own handling of it."""
    taken = []
    found = []
    while engine.pool.checkedin():
        connection = engine.raw_connection()
        taken.append(connection)
        found.append(str(connection.dbapi_connection.autocommit))
    for connection in taken:
        connection.close()
    return ", ".join(found) or "(none)"


@contextlib.contextmanager
def echo() -> Iterator[list[str]]:
    """What SQLALCHEMY_ECHO would print."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("sqlalchemy.engine.Engine")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    lines: list[str] = []
    try:
        yield lines
    finally:
        logger.setLevel(logging.NOTSET)
        logger.removeHandler(handler)
        lines += [line for line in stream.getvalue().splitlines() if not line.startswith("[")]


@contextlib.contextmanager
def events(engine: sa.Engine) -> Iterator[list[str]]:
    """Names of the engine events for transactions that fire."""
    fired: list[str] = []
    listeners = {name: (lambda *_, name=name: fired.append(name)) for name in ("begin", "commit", "rollback")}
    for name, listener in listeners.items():
        sa.event.listen(engine, name, listener)
    try:
        yield fired
    finally:
        for name, listener in listeners.items():
            sa.event.remove(engine, name, listener)


@contextlib.contextmanager
def _database(pg: postgres.Server) -> Iterator[tuple[str, Callable[[str], list[Any]]]]:
    """A database with a table, and a connection of its own to look into it."""
    name = f"designs_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(pg.url(), autocommit=True) as maintenance:
        maintenance.execute(f'CREATE DATABASE "{name}"')
        try:
            with psycopg.connect(pg.url(name), autocommit=True) as connection:
                connection.execute("CREATE TABLE t (n int)")

                def look(query: str) -> list[Any]:
                    cursor = connection.execute(query)
                    return [row[0] for row in cursor.fetchall()] if cursor.description else []

                yield name, look
        finally:
            maintenance.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


if __name__ == "__main__":
    main()
