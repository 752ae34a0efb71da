"""Whatever is done in a transaction ends as it does in SQLAlchemy alone: rows, errors and state, after each step.

The same list of operations runs through an engine that fictive prepared and through a stock one, on two schemas that
are the same; and once more through `OptInSession` next to `sqlalchemy.orm.Session`. `FICTIVE_EXAMPLES=2000` tries that
many lists; without it about a hundred.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fictive.drivers import TransactionStatus, driver_for, sqlstate
from fictive.drivers.base import dbapi_connection
from fictive.errors import TransactionAborted
from fictive.session import private
from fictive.session.engines import prepare
from fictive.sqlalchemy import OptInSession

EXAMPLES = int(os.environ.get("FICTIVE_EXAMPLES", "100"))
PROFILE = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 100,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
pytestmark = [
    pytest.mark.timeout(60 + 2 * EXAMPLES),
    # psycopg, of a server-side cursor whose DECLARE failed: SQLAlchemy leaves it to the garbage collector
    pytest.mark.filterwarnings("ignore:.*ServerCursor:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Session's state has been changed on a non-active transaction"),
]

METADATA = sa.MetaData()
T = sa.Table(
    "stateful",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("v", sa.Integer, sa.CheckConstraint("v < 90"), nullable=False),
    sa.Column("later", sa.Integer, sa.ForeignKey("stateful.id", deferrable=True, initially="DEFERRED")),
)
SCHEMAS = ("ours", "stock")

# -- what may happen --------------------------------------------------------------------------------------------------

NUMBERS = st.integers(0, 5)
INSERT = st.tuples(st.just("insert"), NUMBERS, st.sampled_from([1, 2, 99]))
STATEMENTS = st.one_of(
    INSERT,
    INSERT,
    st.tuples(st.just("insert many"), st.lists(NUMBERS, min_size=2, max_size=4)),
    st.tuples(st.just("insert returning"), st.lists(NUMBERS, min_size=1, max_size=3)),
    st.tuples(st.just("update"), NUMBERS, st.sampled_from([3, 4, 99])),
    st.tuples(st.just("update where"), NUMBERS),
    st.tuples(st.just("delete"), NUMBERS),
    st.tuples(st.just("dangling"), NUMBERS),  # refused by COMMIT
    st.tuples(st.just("select")),
    st.tuples(st.just("select one"), NUMBERS),
    st.tuples(st.just("stream")),
    st.tuples(
        st.just("sql"),
        st.sampled_from(
            [
                "selec 1",
                "select 1 from",
                "select * from nowhere",
                "select nothing from stateful",
                "select 'x'::int",
                "select 1/0",
                "select 1/(id - id) from stateful",
                "select cast(v as text)::int from stateful order by id",
                "set constraints all immediate",
                "insert into stateful values (0, 1); select count(*) from stateful",
                "insert into stateful values (0, 1); select nothing",
                "insert into stateful values (0, 1); selec",
                "/* c */ select 1 -- c",
            ]
        ),
    ),
    st.tuples(st.just("bind"), st.sampled_from(["x", "1", None])),  # invalid input by value
    st.tuples(st.just("unadaptable")),
)
CONTROL = st.one_of(
    st.tuples(st.just("begin")),
    st.tuples(st.just("begin")),
    st.tuples(st.just("savepoint")),
    st.tuples(st.just("savepoint")),
    st.tuples(st.just("savepoint")),
    st.tuples(st.just("release"), st.integers(0, 3)),
    st.tuples(st.just("roll back to"), st.integers(0, 3)),
    st.tuples(st.just("roll back to"), st.integers(0, 3)),
    st.tuples(st.just("commit")),
    st.tuples(st.just("rollback")),
)
# A statement, or a control statement; several of one kind in a row are as likely as they need to be.
OPERATIONS = st.lists(st.one_of(CONTROL, STATEMENTS), min_size=3, max_size=25)


class Unadaptable:
    """No driver knows what to do with it."""


def core(operation: tuple[Any, ...]) -> tuple[Any, Any]:
    """The statement of an operation and its parameters."""
    kind, *args = operation
    if kind == "insert":
        return sa.insert(T), {"id": args[0], "v": args[1]}
    if kind == "insert many":
        return sa.insert(T), [{"id": number, "v": 1} for number in args[0]]
    if kind == "insert returning":
        return sa.insert(T).returning(T.c.id), [{"id": number, "v": 1} for number in args[0]]
    if kind == "update":
        return sa.update(T).where(T.c.id == args[0]).values(v=args[1]), None
    if kind == "update where":
        return sa.update(T).where(T.c.id >= args[0]).values(v=T.c.v + 1), None
    if kind == "delete":
        return sa.delete(T).where(T.c.id == args[0]), None
    if kind == "dangling":
        return sa.insert(T), {"id": args[0], "v": 1, "later": 77}
    if kind == "select":
        return sa.select(T).order_by(T.c.id), None
    if kind == "select one":
        return sa.select(T).where(T.c.id == args[0]), None
    if kind == "stream":
        return sa.select(T).order_by(T.c.id).execution_options(stream_results=True), None
    if kind == "sql":
        return sa.text(args[0].replace(":", r"\:")), None
    if kind == "bind":
        return sa.text("select cast(cast(:x as text) as integer)"), {"x": args[0]}
    return sa.text("select :x"), {"x": Unadaptable()}


# -- what is seen of it -----------------------------------------------------------------------------------------------


def outcome(run: Callable[[], Any]) -> Any:
    """Rows, or the class of the error with its SQLSTATE, position and first line."""
    try:
        return run()
    except Exception as error:
        original = getattr(error, "orig", None)
        position = getattr(getattr(original, "diag", None), "statement_position", None)
        if sqlstate(error) in ("25P02", "26000"):
            # psycopg believes prepared what it tried to prepare in an aborted transaction
            return "aborted", None, "25P02", None, None
        return type(error), type(original), sqlstate(error), position, getattr(error, "statement", None)


def rows(result: sa.Result[Any] | sa.CursorResult[Any]) -> Any:
    if getattr(result, "returns_rows", True):
        return [tuple(row) for row in result]
    return getattr(result, "rowcount", None)


def state(connection: sa.Connection | None) -> TransactionStatus | None:
    if connection is None or connection.closed or connection.invalidated:
        return None
    return driver_for(connection.dialect).status(dbapi_connection(connection))


class CoreSide:
    """One side of the comparison, on `Connection.begin()` and `begin_nested()`."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self.connection = engine.connect()
        self.savepoints: list[sa.NestedTransaction] = []
        self.touched = False  # whether anything but control statements came in this transaction

    def do(self, operation: tuple[Any, ...]) -> Any:
        kind = operation[0]
        if kind in ("begin", "savepoint", "release", "roll back to", "commit", "rollback"):
            return outcome(lambda: self.control(kind, *operation[1:]))
        statement, params = core(operation)
        # what cannot be adapted is refused before anything is sent; the stock driver has sent its BEGIN by then
        self.touched = self.touched or kind != "unadaptable"
        return outcome(lambda: rows(self.connection.execute(statement, params)))

    def control(self, kind: str, index: int = 0) -> None:
        connection = self.connection
        if kind == "begin":
            if not connection.in_transaction():
                connection.begin()
        elif kind == "savepoint":
            self.savepoints.append(connection.begin_nested())
        elif kind in ("commit", "rollback"):
            self.savepoints.clear()
            self.touched = False
            getattr(connection, kind)()
        elif self.savepoints:
            index = min(index, len(self.savepoints) - 1)
            savepoint = self.savepoints[-1 - index]
            del self.savepoints[-1 - index :]
            savepoint.commit() if kind == "release" else savepoint.rollback()

    def state(self) -> Any:
        # a BEGIN that no statement has needed yet is not on the server: that is the point
        server = state(self.connection) if self.touched else None
        return server, self.connection.in_transaction(), self.connection.in_nested_transaction()

    def close(self) -> None:
        self.connection.close()


class Base(sa_orm.DeclarativeBase):
    metadata = METADATA


class Row(Base):
    __table__ = T


class SessionSide:
    """One side of the comparison, on a session."""

    def __init__(self, session: sa_orm.Session) -> None:
        self.session = session
        self.savepoints: list[Any] = []
        self.ours = isinstance(session, OptInSession)

    def do(self, operation: tuple[Any, ...]) -> Any:
        kind = operation[0]
        if kind in ("begin", "savepoint", "release", "roll back to", "commit", "rollback"):
            return _aborted(outcome(lambda: self.control(kind, *operation[1:])))
        if kind == "insert" and operation[2] == 2:

            def add() -> Any:
                self.session.add(Row(id=operation[1], v=2))
                self.session.flush()

            return outcome(add)
        statement, params = core(operation)
        return outcome(lambda: rows(self.session.execute(statement, params)))

    def control(self, kind: str, index: int = 0) -> None:
        session = self.session
        if kind == "begin":
            if not session.in_transaction():
                session.begin()
        elif kind == "savepoint":
            if session.in_transaction():
                self.savepoints.append(session.begin_nested())
        elif kind in ("commit", "rollback"):
            if session.in_transaction():
                self.savepoints.clear()
                if kind == "commit" and not self.ours and self._is_aborted():
                    session.rollback()
                    raise TransactionAborted  # which SQLAlchemy's session would report as a success
                try:
                    getattr(session, kind)()
                except sa.exc.DBAPIError:
                    if not self.ours:
                        session.rollback()  # ours works at once
                    raise
        elif self.savepoints:
            index = min(index, len(self.savepoints) - 1)
            savepoint = self.savepoints[-1 - index]
            del self.savepoints[-1 - index :]
            if kind == "release" and not self.ours and self._is_aborted():
                savepoint.rollback()
                raise TransactionAborted  # SQLAlchemy's session says so only where it has sent the SAVEPOINT
            savepoint.commit() if kind == "release" else savepoint.rollback()

    def _is_aborted(self) -> bool:
        """Whether the server has given the transaction up, or SQLAlchemy has, after a flush that failed."""
        root = self.session.get_transaction()
        connections = (
            private.connections_of(root) if root is not None else []
        )  # asking the session would send SAVEPOINT
        return not self.session.is_active or TransactionStatus.ABORTED in map(state, connections)

    def state(self) -> Any:
        transaction = self.session.get_transaction()
        return self.session.in_transaction(), transaction is not None and self.session.in_nested_transaction()

    def close(self) -> None:
        self.session.close()


# -- the comparison ---------------------------------------------------------------------------------------------------


@pytest.fixture
def engines(database_url: str, look: Callable[..., list[Any]]) -> Iterator[dict[str, sa.Engine]]:
    """Two engines, of one connection each, on two schemas that are the same; `ours` is prepared."""
    made: dict[str, sa.Engine] = {}
    for name in SCHEMAS:
        look(f"create schema {name}")
        made[name] = sa.create_engine(
            database_url,
            pool_size=1,
            max_overflow=0,
            connect_args={"options": f"-csearch_path={name} -cdeadlock_timeout=10s -clock_timeout=5s"},
        )
    prepare(made["ours"])
    for engine in made.values():
        METADATA.create_all(engine)
    yield made
    for engine in made.values():
        engine.dispose()


def compare(
    sides: dict[str, Any], operations: list[tuple[Any, ...]], look: Callable[..., list[Any]], engines: dict[str, Any]
) -> None:
    """Do `operations` on both sides; the first step after which they differ is in the message."""

    def saved() -> dict[str, Any]:
        return {name: look(f"select * from {name}.stateful order by id") for name in SCHEMAS}

    done: list[Any] = []
    try:
        for operation in operations:
            found = {name: (side.do(operation), side.state()) for name, side in sides.items()}
            done.append((operation, found["stock"]))
            assert found["ours"] == found["stock"], _told(done)
            if operation[0] in ("commit", "rollback"):
                rows = saved()
                assert rows["ours"] == rows["stock"], _told(done)
    finally:
        for side in sides.values():
            with contextlib.suppress(sa.exc.DBAPIError):
                side.close()
    rows = saved()
    assert rows["ours"] == rows["stock"], _told(done)
    for engine in engines.values():
        assert engine.pool.checkedout() == 0
        with engine.connect() as connection:
            assert state(connection) is TransactionStatus.IDLE
            # what was left waiting would come with this one
            assert connection.scalar(sa.text("select 1")) == 1
            connection.rollback()


def _told(done: list[Any]) -> str:
    return "\n" + "\n".join(f"{operation} -> {found}" for operation, found in done)


def empty(look: Callable[..., list[Any]]) -> None:
    look("truncate ours.stateful, stock.stateful")


def test_core(engines: dict[str, sa.Engine], look: Callable[..., list[Any]]) -> None:
    @PROFILE
    @given(OPERATIONS)
    def check(operations: list[tuple[Any, ...]]) -> None:
        empty(look)
        compare({name: CoreSide(engine) for name, engine in engines.items()}, operations, look, engines)

    check()


def _mend(operations: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """For sessions: what is outside is fictive's own, so all runs between begin and commit or rollback."""
    mended: list[tuple[Any, ...]] = []
    inside = False
    for operation in operations:
        if operation[0] in ("commit", "rollback"):
            inside = False
        elif not inside:
            mended.append(("begin",))
            inside = True
        mended.append(operation)
    return mended


def test_session(engines: dict[str, sa.Engine], look: Callable[..., list[Any]]) -> None:
    """In `begin()` blocks, where the two sessions promise the same."""

    @PROFILE
    @given(OPERATIONS)
    def check(operations: list[tuple[Any, ...]]) -> None:
        empty(look)
        sides = {
            "ours": SessionSide(OptInSession(engines["ours"])),
            "stock": SessionSide(sa_orm.Session(engines["stock"], autoflush=False, expire_on_commit=False)),
        }
        compare(sides, _mend(operations), look, engines)

    check()


def test_session_outside(engines: dict[str, sa.Engine], look: Callable[..., list[Any]]) -> None:
    """Outside statements commit at once: the other side has a transaction around each."""

    class Outside(SessionSide):
        def do(self, operation: tuple[Any, ...]) -> Any:
            found = _shorter(super().do(operation))
            if not self.ours and not self.explicit and operation[0] not in ("begin",):
                ended = _shorter(outcome(self.session.rollback if _failed(found) else self.session.commit))
                if _failed(ended):
                    found = ended
                    self.session.rollback()
            return found

        explicit = False

        def control(self, kind: str, index: int = 0) -> None:
            if kind in ("savepoint",) and not self.explicit:
                return
            if kind == "begin":
                if self.explicit:
                    return
                self.explicit = True
            elif kind in ("commit", "rollback"):
                if not self.explicit:
                    return
                self.explicit = False
            super().control(kind, index)

        def state(self) -> Any:
            return self.explicit, bool(self.savepoints)

    @PROFILE
    @given(OPERATIONS)
    def check(operations: list[tuple[Any, ...]]) -> None:
        empty(look)
        sides = {
            "ours": Outside(OptInSession(engines["ours"])),
            "stock": Outside(sa_orm.Session(engines["stock"], autoflush=False, expire_on_commit=False)),
        }
        # neither has a meaning outside: both are tried by the tests of contract A
        operations = [each for each in operations if each != ("stream",) and "set constraints" not in str(each)]
        compare(sides, operations, look, engines)

    check()


def _failed(found: Any) -> bool:
    return isinstance(found, tuple) and len(found) >= 3 and (isinstance(found[0], type) or found[0] == "aborted")


def _shorter(found: Any) -> Any:
    """Without the statement, which is COMMIT on one side and the user's own on the other."""
    return found[:3] if _failed(found) else found


def _aborted(found: Any) -> Any:
    """fictive says `TransactionAborted` where, in an aborted transaction, RELEASE is refused and COMMIT ignored."""
    if _failed(found) and (found[0] in (TransactionAborted, sa.exc.PendingRollbackError) or found[2] == "25P02"):
        return (TransactionAborted, None, None, None, None)
    return found
