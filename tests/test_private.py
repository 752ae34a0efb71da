"""What fictive uses of SQLAlchemy that has no public name is still what it was. One failure here names the thing."""

from __future__ import annotations

import contextlib
import inspect
import re
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask
from sqlalchemy.dialects import sqlite

import fictive
from fictive.drivers import psycopg as psycopg_driver
from fictive.session import private
from tests import lint_super, models

ROOT = Path(fictive.__file__).parent


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (sa_orm.Session, "_connection_for_bind", ["self", "engine", "execution_options", "kw"]),
        (sa_orm.Session, "_autoflush", ["self"]),
        (sa_orm.Session, "_autobegin_t", ["self", "begin"]),
        (sa_orm.Session, "_is_clean", ["self"]),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value)[:30],
)  # fmt: skip
def test_signatures(owner: type, name: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(owner, name)).parameters) == parameters


def test_the_transaction_object_is_where_it_was(lite: sa.Engine) -> None:
    session = sa_orm.Session(lite)
    assert session._transaction is None
    assert session._flushing is False
    transaction = session.begin()
    assert session._transaction is transaction
    connection = session.connection()
    assert private.connections_of(transaction) == [connection]
    session.close()


def test_a_session_past_its_ended_block(lite: sa.Engine) -> None:
    with sa_orm.Session(lite) as session, session.begin() as outer:
        inner = session.begin_nested()
        with inner:
            inner.rollback()
            assert session._trans_context_manager is inner
            with private.past_ended_blocks(session):
                assert session._trans_context_manager is outer
                assert session.scalar(sa.text("select 1")) == 1
            with pytest.raises(sa.exc.InvalidRequestError, match="inside context manager"):
                session.scalar(sa.text("select 1"))


def test_a_commit_still_flushes_unless_a_flush_is_under_way() -> None:
    """`commit_as_is` stands on it."""
    source = inspect.getsource(sa_orm.SessionTransaction._prepare_impl)
    assert "if not self.session._flushing:" in source


def test_allow_autobegin_keeps_the_transaction_object_away(lite: sa.Engine) -> None:
    with sa.Connection(lite, _allow_autobegin=False) as connection:
        connection.execute(sa.text("select 1"))
        assert not connection.in_transaction()


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner, names in private.JOINTS for name in names])
def test_private_names_are_there(owner: Any, name: str, lite: sa.Engine) -> None:
    """What is used on the way of each statement, where a function around it would cost too much."""
    made = {
        sa_orm.Session: lambda: sa_orm.Session(lite),
        sa_orm.SessionTransaction: lambda: sa_orm.Session(lite).begin(),
        sa.Connection: lambda: sa.Connection(lite),
        sa.QueuePool: lambda: sa.QueuePool(lambda: None),
        sa.Select: lambda: sa.select(1),
    }
    with contextlib.ExitStack() as stack:
        thing = made[owner]() if owner in made else owner
        if owner in made and hasattr(thing, "close"):
            stack.callback(thing.close)
        assert hasattr(thing, name)


def test_constructs_still_tell() -> None:
    table = sa.table("t", sa.column("a"))
    assert private.locks_rows(sa.select(table).with_for_update())
    assert not private.locks_rows(sa.select(table))
    assert isinstance(private.resolved(sa.lambda_stmt(lambda: sa.select(table))), sa.Select)


def test_a_mapper_tells_whether_anyone_listens() -> None:
    registry = sa_orm.registry()
    table = sa.Table("b", registry.metadata, sa.Column("id", sa.Integer, primary_key=True))
    base = registry.mapped(type("Base", (), {"__table__": table}))
    sub = registry.mapped(type("Sub", (base,), {}))
    assert not private.has_listeners(sa.inspect(sub), "before_insert", "after_insert")
    sa.event.listen(base, "after_insert", lambda *_: None, propagate=True)
    assert private.has_listeners(sa.inspect(sub), "before_insert", "after_insert")
    assert not private.has_listeners(sa.inspect(sub), "before_insert")


def test_a_composite_is_nobody_who_listens() -> None:
    """SQLAlchemy lets a composite listen to the flushes of its mapper, to drop the value that it keeps."""

    class Base(sa_orm.DeclarativeBase):
        pass

    class Place(Base):
        __tablename__ = "place"
        id: sa_orm.Mapped[int] = sa_orm.mapped_column(primary_key=True)
        at = sa_orm.composite(lambda x, y: (x, y), sa_orm.mapped_column("x"), sa_orm.mapped_column("y"))

    mapper = sa.inspect(Place)
    sa_orm.configure_mappers()
    assert mapper.dispatch.after_insert
    assert not private.has_listeners(mapper, "after_insert", "after_update")
    for raw in (False, True):
        listener = lambda *_: None  # noqa: E731
        sa.event.listen(Place, "after_insert", listener, raw=raw)
        assert private.has_listeners(mapper, "after_insert", "after_update")
        sa.event.remove(Place, "after_insert", listener)


def test_a_view_of_an_engine_names_the_engine(lite: sa.Engine) -> None:
    assert private.root_engine(lite.execution_options(a=1).execution_options(b=2)) is lite


def test_psycopg_begins_its_transactions_where_it_did() -> None:
    """Where one of these is missing nothing rides; where one means something else, this test says so."""
    assert all(hasattr(owner, name) for owner, names in psycopg_driver.JOINTS.items() for name in names)
    assert psycopg_driver.PsycopgDriver.carries
    assert "_get_tx_start_command" in inspect.getsource(psycopg.Connection._start_query)
    assert "yield from self._start_query" in inspect.getsource(psycopg.Cursor._execute_gen)
    assert "self._execute_gen(query, params" in inspect.getsource(psycopg.Cursor.execute)


def test_nothing_else_in_fictive_touches_sqlalchemys_underscores() -> None:
    """`self._x` is our own; `x._y` on anything else belongs into `session/private.py`."""
    foreign = re.compile(r"\b(?!self\b|cls\b)\w+(?:\(\))?\._(?!_)\w+")
    # extension points: of SQLAlchemy's pools (documented for subclasses) and of Flask-SQLAlchemy's class
    allowed = {
        "drivers/sqlite.py": {"super()._do_get", "super()._do_return_conn"},
        "cli.py": {"current_app._get_current_object", "db._engine_options"},
        "flask_models.py": {"super()._make_declarative_base"},
        "flask_sqlalchemy.py": {
            "session._app_ctx_id", "session._is_clean",
            "super()._make_declarative_base", "super()._make_session_factory",
            "super()._fictive_settings", "super()._make_engine", "super()._teardown_session",
            "super()._apply_driver_defaults", "sys._getframe",
        },
        "connection/prepared.py": {"dbapi._prepared", "manager._prepared_idx", "manager._names"},
        "connection/watched.py": {"Link._drop"},
        "report/guards.py": {"sys._current_frames"},
        "report/requests.py": {"request_ctx._get_current_object"},
        "report/watching.py": {"session._fictive"},
        "rows/stored_values.py": {"found._variant_mapping", "type_._isnull"},
        "session/callers.py": {"sys._getframe"},
        "session/reading.py": {"mapper._identity_class", "sys._getframe"},
    }  # fmt: skip
    joints = {name for _, names in private.JOINTS for name in names}
    joints |= {  # fictive's own, among modules that are one thing
        "_around", "_end", "_fictive", "_fictive_place", "_short_transaction",
        "_fictive_settings", "_hand_over", "_has_due", "_is_entered", "_is_left", "_is_outside",
        "_dict", "_fictive_columns", "_link", "_raise_if_ended", "_rows", "_stream",
    }  # fmt: skip
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if path.name == "private.py" or "testing" in path.parts or name == "drivers/psycopg.py":
            continue
        inner = name.startswith(("connection/", "session/"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found += [
                f"{name}:{number}: {match}"
                for match in foreign.findall(line)
                if match not in allowed.get(name, set()) and not (inner and match.rpartition(".")[2] in joints)
            ]
    assert found == [], "\n".join(found)


@pytest.mark.parametrize(
    ("body", "is_found"),
    [
        ("    super().set_session(level)", True),
        ("    super().set_session(level)  # type: ignore[misc]", True),
        ("    return [super(A, self).set_session(a) for a in '#']", True),
        ("    return functools.partial(super().set_session, level)", True),
        ("    super().begin()", False),
        ("    super().set_session(level)  # the driver's: ours would begin", False),
        ("    # The driver's: ours would begin.\n    super().set_session(level)", False),
        ("    # Unrelated.\n    level += 1\n    super().set_session(level)", True),
        ("    class Inner(A):\n      def set_session(self):\n        super().set_session(1)", False),
        ("    def inner():\n      super().set_session(1)", True),
    ],
)
def test_lint_finds_a_call_of_another_method_of_super(body: str, is_found: bool) -> None:
    """An override that is passed over silently was a fault once (A25); `./run lint` asks why."""
    found = lint_super.findings(f"class A(B):\n  def begin(self):\n{body}\n")
    assert [text.partition(":")[0] for _, text in found] == ["begin() uses super().set_session"] * is_found


def test_lint_of_super_passes_here_and_run_calls_it() -> None:
    assert lint_super.main() == 0
    assert '"-m tests.lint_super"' in (ROOT.parent / "run").read_text(encoding="utf-8")


def test_a_kept_insert_is_compiled_once(lite: sa.Engine) -> None:
    """SQLAlchemy 2.0 has no key for one with ON CONFLICT."""
    table = sa.Table("kept", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True), sa.Column("n", sa.Integer))
    insert = sqlite.insert(table).values(n=sa.bindparam("number"))
    kept = private.cached_as_it_is(insert.on_conflict_do_nothing(index_elements=["id"])).returning(table.c.n)
    other = private.cached_as_it_is(insert.on_conflict_do_nothing()).returning(table.c.n)
    compiled: list[str] = []
    with lite.connect() as connection:
        table.create(connection)
        for number in range(3):
            result = connection.execute(kept, {"number": number})
            compiled.append(result.context.cache_hit.name)
            assert result.scalars().all() == [number]
        assert connection.execute(other, {"number": 9}).context.cache_hit.name == "CACHE_MISS"
    assert compiled == ["CACHE_MISS", "CACHE_HIT", "CACHE_HIT"]


def test_what_a_pool_was_made_with() -> None:
    engine = sa.create_engine(
        "postgresql+psycopg://", pool_size=2, max_overflow=3, pool_timeout=4, pool_recycle=5, pool_pre_ping=True
    )
    assert private.pool_settings(engine.pool) == {
        "pool_size": 2, "max_overflow": 3, "pool_timeout": 4, "pool_recycle": 5, "pool_pre_ping": True
    }  # fmt: skip


def _is_named(cls: Any) -> Any:
    return cls.name.is_not(None)


def test_the_options_of_a_select_and_the_mapper_of_its_table() -> None:
    option = sa_orm.lazyload("*")
    statement = sa.select(models.Item).options(option)
    assert list(private.options_of(statement)) == [option]
    assert not private.options_of(sa.select(models.Item))
    criteria = sa_orm.with_loader_criteria(models.Item, _is_named)
    assert private.criterion_of(criteria) is _is_named
    assert private.criterion_of(option) is None
    tables = [element for element in sa.sql.visitors.iterate(statement) if isinstance(element, sa.Table)]
    assert {private.mapper_of(table) for table in tables} == {sa.inspect(models.Item)}


def test_a_statement_that_the_driver_runs_in_its_own_way(lite: sa.Engine) -> None:
    """Seen by listeners and logged as any other, with SQLAlchemy's errors."""
    seen: list[str] = []
    sa.event.listen(lite, "before_cursor_execute", lambda *args: seen.append(args[2]))
    with lite.connect() as connection:
        private.run_on_cursor(connection, "own", lambda cursor: cursor.execute("create table t (n)"))
        assert connection.scalar(sa.text("select count(*) from t")) == 0
        with pytest.raises(sa.exc.OperationalError, match="no such table") as caught:
            private.run_on_cursor(connection, "own as well", lambda cursor: cursor.execute("select * from u"))
        assert caught.value.statement == "own as well"
    assert seen == ["own", "select count(*) from t", "own as well"]


def test_which_relationship_a_lazy_load_is_for_and_of_which_query(app: Flask) -> None:
    """And its options, its place in the path, and a result for it; what batches of lazy loads are made of."""
    loads = []

    def look_at(state: sa_orm.ORMExecuteState) -> Any:
        if not state.is_relationship_load:
            return None
        loads.append((private.relationship_of_load(state), private.load_run(state.lazy_loaded_from)))
        assert private.loaded_as(sa.select(models.Child), state.statement)._compile_options is not None
        return private.result_of([children[0], children[0]])

    item = models.Item(name="a", children=[models.Child(), models.Child()])
    models.db.session.add(item)
    models.db.session.commit()
    children = list(item.children)
    models.db.session.expire(item)
    found = models.db.session.scalars(sa.select(models.Item)).one()
    sa.event.listen(models.db.session(), "do_orm_execute", look_at)
    assert found.children == [children[0], children[0]]
    state = sa.inspect(found)
    assert loads == [(models.Item.children.property, private.load_run(state))]
    assert private.key_of(state) == (found.id,)
    joined = sa.select(models.Item).options(sa_orm.joinedload(models.Item.children))
    for statement, must in ((sa.select(models.Item), False), (joined, True)):
        assert private.must_be_unique(models.db.session.execute(statement)) is must


@pytest.mark.parametrize("options", [{}, {"named": True}, {"once": True}])
def test_whose_a_listener_is_whatever_sqlalchemy_wraps_it_in(options: Any) -> None:
    pool = sa.create_engine("sqlite://").pool
    assert {private.is_own_listener(each) for each in pool.dispatch.connect.listeners} == {True}
    sa.event.listen(pool, "checkout", lambda *_, **__: None, **options)
    assert [private.is_own_listener(each) for each in pool.dispatch.checkout] == [False]


def test_a_statement_of_which_no_listener_is_told(lite: sa.Engine) -> None:
    told: list[Any] = []
    with sa_orm.Session(lite) as session:
        sa.event.listen(session, "do_orm_execute", told.append)
        execute = private.without_listeners(session.execute)
        assert execute(sa.text("SELECT :value"), {"value": 1}).scalar_one() == 1
        assert told == []
        session.execute(sa.text("SELECT 1"))
        assert len(told) == 1


def test_an_execute_of_the_applications_is_left_to_itself(lite: sa.Engine) -> None:
    class Own(sa_orm.Session):
        def execute(self, statement: Any, params: Any = None) -> Any:  # type: ignore[override]
            return super().execute(statement, params)

    with Own(lite) as session:
        assert private.without_listeners(session.execute)(sa.text("SELECT 1")).scalar_one() == 1


def test_a_new_object_with_the_id_of_one_that_is_gone_is_listened_to() -> None:
    ids: set[int] = set()
    for _ in range(20):
        maker = sa_orm.sessionmaker()
        ids.add(id(maker))
        for _ in range(2):
            private.listen_once(maker, "do_orm_execute", print)
        assert list(maker().dispatch.do_orm_execute) == [print]
        del maker
    assert len(ids) < 20, "no id was given twice"
