"""M1, M2: settings that `@db.local_settings` gives travel with what runs, and end with it."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from fictive.drivers import sqlstate
from fictive.errors import ConfigurationError, LocalSettingsError, TransactionAborted, UnsupportedDialect
from fictive.report.watching import watching
from fictive.sqlalchemy import (
    FindOrCreateDescriptor,
    OptInSession,
    insert_many,
    m2m_add,
    sessionmaker,
    set_pooler,
    upsert_many,
)
from fictive.testing.wire import Log, Wire
from tests.conftest import MakeApp
from tests.models import DB, Item, db

Look = Callable[..., list[Any]]

SHOWN = sa.text("SELECT current_setting('app.tenant', true)")


class Given(dict[str, Any]):
    """What the function returns, and how often it was asked."""

    asked = 0


@pytest.fixture
def given(app: Flask) -> Iterator[Given]:
    given = Given({"app.tenant": "a"})

    @db.local_settings
    def settings() -> dict[str, Any]:
        given.asked += 1
        return given

    yield given
    db._settings_source.function = None


def sent(log: Log) -> list[str]:
    return [text for each in log.exchanges for text in each.statements]


def left(session: Any = None) -> Any:
    """What the next statement on the same connection sees, without settings."""
    with db.engine.connect() as connection:
        return connection.scalar(SHOWN) or None


# -- M1: outside -----------------------------------------------------------------------------------------------------

OUTSIDE: dict[str, Callable[[], Any]] = {
    "execute": lambda: db.session.execute(SHOWN).scalar(),
    "scalar": lambda: db.session.scalar(SHOWN),
    "core select": lambda: db.session.scalar(sa.select(sa.func.current_setting("app.tenant"))),
    "parameters": lambda: db.session.scalar(sa.text("SELECT current_setting(:name, true)"), {"name": "app.tenant"}),
    "list parameter": lambda: db.session.scalar(
        sa.text("SELECT current_setting(x) FROM unnest(:names) x").bindparams(
            sa.bindparam("names", ["app.tenant"], sa.ARRAY(sa.Text))
        )
    ),
    "insert": lambda: db.session.scalar(
        sa.insert(Item).values(name=sa.func.current_setting("app.tenant")).returning(Item.name)
    ),
    "query": lambda: db.session.query(sa.func.current_setting("app.tenant")).scalar(),
}


def test_m1_outside_they_ride_with_the_statement_and_end_with_it(given: Given, wire: Wire) -> None:
    for asked, (what, run) in enumerate(OUTSIDE.items(), 1):
        with wire.record() as log:
            assert run() == "a", what
        assert log.round_trips == 1, what
        assert not any(text.startswith(("BEGIN", "COMMIT", "SET")) for text in sent(log)), what
        assert given.asked == asked
        assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        assert left() is None, what
    given.clear()
    with wire.record() as log:
        assert db.session.scalar(SHOWN) in ("", None)
    assert log.round_trips == 1
    given["app.tenant"] = "b"
    assert db.session.scalar(SHOWN) == "b"


def test_m1_rows_and_rowcounts_are_those_of_the_statement(given: Given, look: Look) -> None:
    look("insert into item (name) select 'n' || g from generate_series(1, 3) g")
    assert len(db.session.scalars(sa.select(Item)).all()) == 3
    assert db.session.execute(sa.update(Item).values(note="x")).rowcount == 3
    assert db.session.execute(sa.select(Item.name).order_by(Item.name)).fetchmany(2) == [("n1",), ("n2",)]
    assert db.session.get(Item, db.session.scalar(sa.select(sa.func.min(Item.id)))).note == "x"


VALUES = ["o'neil", "a\\b", "100%", "%s %(x)s", "two\nlines", "'; DROP TABLE item; --", "ü€𝄞", '"q"', "$$", ""]


def test_m2_values_are_quoted_by_the_driver(given: Given) -> None:
    for value in VALUES:
        given["app.tenant"] = value
        assert db.session.scalar(SHOWN) == value
        assert db.session.scalar(sa.text("SELECT current_setting(:name)"), {"name": "app.tenant"}) == value
        with db.session.begin():
            assert db.session.scalar(SHOWN) == value
        assert left() is None


def test_m2_values_in_the_connections_own_encoding(given: Given, driver: str, database_url: str) -> None:
    given["app.tenant"] = "Müller"
    engine = sa.create_engine(database_url, connect_args={"client_encoding": "latin1"})
    with OptInSession(engine, local_settings=lambda: given) as session:
        assert session.scalar(SHOWN) == "Müller"
        with session.begin():
            assert session.scalar(SHOWN) == "Müller"
        with session.begin():
            session.connection().connection.dbapi_connection.cursor().close()
            assert session.scalar(SHOWN) == "Müller"
        given["app.tenant"] = "Łódź"  # which latin1 does not have
        with pytest.raises(UnicodeEncodeError):
            session.scalar(SHOWN)
        with pytest.raises(UnicodeEncodeError), session.begin():
            session.scalar(SHOWN)
        given["app.tenant"] = "a"
        assert session.scalar(SHOWN) == "a"
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    engine.dispose()


def test_m2_numbers_flags_uuids_and_none(given: Given) -> None:
    key = uuid.uuid4()
    for value, shown in ((7, "7"), (True, "on"), (False, "off"), (key, str(key)), (None, "")):
        given["app.tenant"] = value
        assert db.session.scalar(SHOWN) == shown
    with db.pinned():
        given.clear()
        db.session.execute(sa.text("SET app.tenant = 'of the connection'"))
        assert db.session.scalar(SHOWN) == "of the connection"
        given["app.tenant"] = None
        assert db.session.scalar(SHOWN) == ""
        given["app.tenant"] = "mine"
        assert db.session.scalar(SHOWN) == "mine"
        given.clear()
        assert db.session.scalar(SHOWN) == "of the connection"


BAD: dict[str, Any] = {
    "no name": {"app tenant": "x"},
    "an injected name": {"x', 'y', true), set_config('a": "x"},
    "a number as name": {7: "x"},
    "a list": {"app.tenant": ["x"]},
    "a float": {"app.tenant": 0.5},
    "bytes": {"app.tenant": b"x"},
    "a zero byte": {"app.tenant": "a\0b"},
    "a surrogate": {"app.tenant": "\ud800"},
    "nothing": None,
    "text": "app.tenant",
}


def test_m2_a_bad_name_or_value_raises_at_the_call_and_nothing_is_sent(app: Flask, wire: Wire) -> None:
    given: Any = None
    with OptInSession(db.engine, local_settings=lambda: given) as session, wire.record() as log:
        for given in BAD.values():  # noqa: B007 - the function returns it
            with pytest.raises(LocalSettingsError):
                session.scalar(SHOWN)
            with pytest.raises(LocalSettingsError), session.begin():
                session.scalar(SHOWN)
            session.add(Item(name="a"))
            with pytest.raises(LocalSettingsError):
                session.commit()
            session.rollback()
    assert log.round_trips == 0
    assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


REFUSED = {
    "statment_timeout": "2s",
    "statement_timeout": "soon",
    "role": "nobody_is_this",
    "transaction_isolation": "x",
}


def test_m2_what_the_server_refuses_raises_and_names_the_setting(given: Given, look: Look) -> None:
    runs: list[Callable[[], Any]] = [
        lambda: db.session.execute(sa.insert(Item).values(name="a")),
        lambda: db.session.execute(sa.text("SELECT 1")),
    ]
    for name, value in REFUSED.items():
        given[name] = value
        for run in runs:
            with pytest.raises(LocalSettingsError, match=name) as raised:
                run()
            assert isinstance(raised.value.__cause__, db.engine.dialect.loaded_dbapi.Error)
            with pytest.raises(LocalSettingsError, match=name), db.session.begin(), db.session.begin_nested():
                run()
        db.session.add(Item(name="b"))
        with pytest.raises(LocalSettingsError, match=name):
            db.session.commit()
        db.session.rollback()
        assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        del given[name]
    with db.session.begin():
        db.session.execute(sa.insert(Item).values(name="c"))
    assert look("select name from item") == ["c"]


STATES = {
    "22023": "SELECT current_setting('no.such')",
    "42704": "SELECT 'x'::nosuchtype",
    "42P01": "SELECT * FROM nosuch",
    "22012": "SELECT 1 / 0",
    "23505": "INSERT INTO item (name) VALUES ('x'), ('x')",
}


def test_m2_an_error_of_the_statement_is_its_own(given: Given) -> None:
    plain = OptInSession(db.engine)
    for text in STATES.values():
        with pytest.raises(sa.exc.DBAPIError) as alone:
            plain.execute(sa.text(text))
        with pytest.raises(sa.exc.DBAPIError) as outside:
            db.session.execute(sa.text(text))
        with pytest.raises(sa.exc.DBAPIError) as inside, db.session.begin():
            db.session.execute(sa.text(text))
        for raised in (outside, inside):
            assert sqlstate(raised.value) == sqlstate(alone.value)
            assert type(raised.value) is type(alone.value)
            assert str(raised.value.orig).splitlines()[0] == str(alone.value.orig).splitlines()[0]
            assert "set_config" not in str(raised.value)
        assert left() is None
        assert db.session.scalar(SHOWN) == "a"
    plain.close()


def test_m2_after_an_error_that_might_be_of_the_settings_the_block_is_aborted(given: Given, look: Look) -> None:
    with pytest.raises(TransactionAborted), db.session.begin():
        with pytest.raises(sa.exc.DBAPIError):
            db.session.execute(sa.text("SELECT 'x'::nosuchtype"))
    with db.session.begin():
        with pytest.raises(sa.exc.DBAPIError), db.session.begin_nested():
            db.session.execute(sa.text("SELECT 'x'::nosuchtype"))
        assert db.session.scalar(SHOWN) == "a"
        db.session.execute(sa.insert(Item).values(name="a"))
    assert look("select name from item") == ["a"]


ALONE = [
    "VACUUM item",
    "-- why\nVACUUM (ANALYZE) item",
    "CREATE DATABASE x",
    "DROP DATABASE IF EXISTS x",
    "CREATE UNIQUE INDEX CONCURRENTLY i ON item (note)",
    "DROP INDEX CONCURRENTLY IF EXISTS i",
    "REINDEX TABLE CONCURRENTLY item",
    "REINDEX DATABASE x",
    "CREATE TABLESPACE x LOCATION '/x'",
    "ALTER SYSTEM SET work_mem = '4MB'",
]


def test_m2_a_statement_that_cannot_share_a_message_raises(given: Given, wire: Wire) -> None:
    for text in ALONE:
        with wire.record() as log, pytest.raises(LocalSettingsError, match="cannot share"):
            db.session.execute(sa.text(text))
        assert log.round_trips == 0
    given.clear()
    db.session.execute(sa.text(ALONE[0]))


def test_m2_what_only_the_server_knows_to_stand_alone(given: Given) -> None:
    with pytest.raises(LocalSettingsError, match="cannot share"), db.pinned():
        db.session.execute(sa.text("DISCARD ALL"))
    with pytest.raises(LocalSettingsError, match="cannot share"):
        db.session.execute(sa.text("COMMIT"), execution_options={"fictive_outside": True})


def test_m1_a_procedure_that_commits_is_refused_and_others_are_run(given: Given, look: Look) -> None:
    look("create procedure p(commits bool) language plpgsql as $$ begin "
         "insert into item (name) values (current_setting('app.tenant')); if commits then commit; end if; "
         "insert into item (name) values (current_setting('app.tenant') || '2'); end $$")  # fmt: skip
    with pytest.raises(sa.exc.DBAPIError) as raised:
        db.session.execute(sa.text("/* x */ CALL p(true)"))
    assert sqlstate(raised.value) == "2D000"
    assert look("select name from item") == []
    db.session.execute(sa.text("CALL p(:commits)"), {"commits": False})
    assert look("select name from item order by id") == ["a", "a2"]
    db.session.execute(
        sa.text("DO $$ BEGIN INSERT INTO item (name) VALUES (current_setting('app.tenant') || '3'); END $$")
    )
    assert look("select name from item order by id") == ["a", "a2", "a3"]
    assert left() is None


def test_m1_several_statements_in_a_text(given: Given, look: Look) -> None:
    db.session.execute(
        sa.text(
            "INSERT INTO item (name) VALUES (current_setting('app.tenant')); "
            "INSERT INTO item (name) VALUES (current_setting('app.tenant') || CASE WHEN true THEN '2' END)"
        )
    )
    assert look("select name from item order by id") == ["a", "a2"]
    assert left() is None


# -- M1: in transactions ---------------------------------------------------------------------------------------------


def test_m1_inside_they_ride_with_begin_and_are_asked_for_once(given: Given, wire: Wire) -> None:
    with wire.record() as log, db.session.begin():
        assert db.session.scalar(SHOWN) == "a"
        given["app.tenant"] = "later"
        assert db.session.scalar(SHOWN) == "a"
        db.session.execute(sa.insert(Item).values(name="x"))
    assert log.round_trips == 4
    assert given.asked == 1
    assert left() is None
    with wire.record() as log, db.session.begin():
        pass
    assert (log.round_trips, given.asked) == (0, 1)


def test_m1_savepoints_keep_them(given: Given, wire: Wire, driver: str) -> None:
    with wire.record() as log, db.session.begin():
        with db.session.begin_nested():
            assert db.session.scalar(SHOWN) == "a"
        with pytest.raises(ZeroDivisionError), db.session.begin_nested():
            db.session.execute(sa.text("SELECT set_config('app.tenant', 'x', true)"))
            raise ZeroDivisionError
        assert db.session.scalar(SHOWN) == "a"
    assert given.asked == 1
    assert log.round_trips == (5 if driver == "psycopg" else 6)


FLUSHES: dict[str, tuple[int, Callable[[str], Any]]] = {
    "commit": (2, lambda name: (db.session.add(Item(name=name)), db.session.commit())),
    "flush": (2, lambda name: (db.session.add(Item(name=name)), db.session.flush())),
    "many rows": (2, lambda name: db.session.execute(sa.insert(Item), [{"name": name}, {"name": f"{name} too"}])),
    "bulk_save_objects": (2, lambda name: db.session.bulk_save_objects([Item(name=name)])),
    "find_or_create": (2, lambda name: FindOrCreateDescriptor(lambda: db.session).__get__(None, Item)(name=name)),
    "insert_many": (3, lambda name: insert_many(db.session, Item, [{"name": f"{name} {n}"} for n in range(50)])),
    "upsert_many": (2, lambda name: upsert_many(db.session, Item, [{"name": name}], key="name")),
}


def test_m1_flushes_and_bulk_work_have_them_at_no_round_trip(
    given: Given, wire: Wire, look: Look, driver: str
) -> None:
    for table in ("item", "item_tag"):
        look(f"alter table {table} add tenant text default current_setting('app.tenant', true)")
    for what, (trips, run) in FLUSHES.items():
        with wire.record() as log:
            run(what)
        # the pipeline that psycopg's executemany is takes no BEGIN along
        assert log.round_trips == trips + (what == "many rows" and driver == "psycopg"), (what, log.statements)
        assert left() is None, what
        assert not db.session.in_transaction()
    assert look("select distinct tenant from item") == ["a"]
    look("insert into tag (id, label) values (1, 't')")
    item = db.session.scalars(sa.select(Item).limit(1)).one()
    with wire.record() as log:
        m2m_add(db.session, item, Item.tags, 1)
    assert log.round_trips == 1
    assert look("select tenant from item_tag") == ["a"]


@pytest.mark.parametrize("mode", ["commit", "begin", "refuse", "report"])
def test_m1_under_each_mode_of_writes_outside(mode: str, given: Given, wire: Wire, look: Look) -> None:
    session = db.session()
    session.writes_outside = mode  # type: ignore[assignment]
    with wire.record() as log:
        assert session.scalar(SHOWN) == "a"
    assert log.round_trips == 1
    given["app.tenant"] = "b"
    insert = sa.insert(Item).values(name=sa.func.current_setting("app.tenant"))
    if mode == "refuse":
        with session.begin():
            session.execute(insert)
    else:
        session.execute(insert)
        given["app.tenant"] = "c"
        assert session.scalar(SHOWN) == ("c" if mode == "commit" else "b")
        session.commit()
    assert look("select name from item") == ["b"]
    given["app.tenant"] = "d"
    assert session.scalar(SHOWN) == "d"
    assert left() is None


def test_m1_a_blocks_own_timeout_comes_after(given: Given) -> None:
    given["statement_timeout"] = "7s"
    shown = sa.text("SELECT current_setting('statement_timeout')")
    assert db.session.scalar(shown) == "7s"
    with db.session.transaction(statement_timeout="2s"):
        assert db.session.scalar(shown) == "2s"
    with db.session.begin():
        with db.session.transaction(statement_timeout="3s"):
            assert db.session.scalar(shown) == "3s"
        assert db.session.scalar(shown) == "7s"


def test_m1_a_timeout_counts_for_the_statement_it_comes_with(given: Given) -> None:
    given["statement_timeout"] = "50ms"
    with pytest.raises(sa.exc.OperationalError) as raised:
        db.session.execute(sa.text("SELECT pg_sleep(20)"))
    assert sqlstate(raised.value) == "57014"
    with pytest.raises(sa.exc.OperationalError), db.session.begin():
        db.session.execute(sa.text("SELECT pg_sleep(20)"))


def test_m1_isolation_levels_and_read_only_blocks(given: Given, wire: Wire) -> None:
    with wire.record() as log, db.session.transaction(isolation_level="SERIALIZABLE", read_only=True):
        assert db.session.scalar(SHOWN) == "a"
        assert db.session.scalar(sa.text("SHOW transaction_isolation")) == "serializable"
    assert log.round_trips == 3


def test_m1_the_drivers_connection_in_a_block_has_them(given: Given) -> None:
    with db.session.begin():
        cursor = db.session.connection().connection.dbapi_connection.cursor()  # type: ignore[union-attr]
        cursor.execute("SELECT current_setting('app.tenant')")
        assert cursor.fetchone() == ("a",)
        assert db.session.scalar(SHOWN) == "a"
    given["role"] = "nobody_is_this"
    with pytest.raises(LocalSettingsError, match="role"), db.session.begin():
        db.session.connection().connection.dbapi_connection.cursor()  # type: ignore[union-attr]
    del given["role"]
    assert db.session.scalar(SHOWN) == "a"
    assert left() is None


def test_m1_two_phase_transactions_have_them(given: Given, database_url: str, look: Look) -> None:
    with OptInSession(db.engine, local_settings=lambda: given, twophase=True) as session:
        with contextlib.suppress(sa.exc.DBAPIError), session.begin():  # the server may have no slots for it
            session.execute(sa.insert(Item).values(name=sa.func.current_setting("app.tenant")))
            assert session.scalar(SHOWN) == "a"
    assert look("select gid from pg_prepared_xacts") == []


# -- M1: streams, pinned, the driver's own ways ----------------------------------------------------------------------


def test_m1_streams_have_those_of_their_beginning(given: Given, wire: Wire) -> None:
    rows = sa.text("SELECT g, current_setting('app.tenant') FROM generate_series(1, 4) g")
    with wire.record() as log:
        assert db.session.execute(rows, execution_options={"yield_per": 4}).all()[3] == (4, "a")
    assert len([text for text in sent(log) if "set_config" in text]) == 1
    result = iter(db.session.execute(rows, execution_options={"yield_per": 1}))
    assert next(result) == (1, "a")
    assert db.session.scalar(SHOWN) == "a"
    assert db.engine.pool.checkedout() == 1  # type: ignore[attr-defined]
    given["app.tenant"] = "b"
    assert db.session.scalar(SHOWN) == "b"
    assert [tenant for _, tenant in result] == ["a"] * 3
    given.clear()
    result = iter(db.session.execute(rows.bindparams(), execution_options={"yield_per": 1, "fictive_writes": False}))
    del result
    given["app.tenant"] = "c"
    result = iter(db.session.execute(rows, execution_options={"yield_per": 1}))
    next(result)
    given.clear()
    assert db.session.scalar(SHOWN) in ("", None), "a read without settings is not on the stream's connection"
    list(result)
    assert left() is None


def test_m1_pinned_and_executemany(given: Given, wire: Wire, look: Look) -> None:
    look("alter table item alter note set default current_setting('app.tenant', true)")
    with db.pinned():
        with wire.record() as log:
            assert db.session.scalar(SHOWN) == "a"
        assert log.round_trips == 1
        with db.session.begin():
            assert db.session.scalar(SHOWN) == "a"
        db.session.connection().exec_driver_sql("INSERT INTO item (name) VALUES (%(n)s)", [{"n": "x"}, {"n": "y"}])
        given.clear()
        assert db.session.scalar(SHOWN) in ("", None)
    assert look("select note from item") == ["a", "a"]


def test_m1_a_cursor_class_that_lets_nothing_ride(given: Given, database_url: str, driver: str, wire: Wire) -> None:
    """Its statements have a short transaction of their own."""
    if driver == "psycopg2":
        import psycopg2.extensions

        class Cursor(psycopg2.extensions.cursor):
            def execute(self, query: Any, vars: Any = None) -> Any:
                return psycopg2.extensions.cursor.execute(self, query, vars)
    else:
        import psycopg

        class Cursor(psycopg.Cursor):  # type: ignore[no-redef]
            def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
                return super().execute(query, params, **options)

    engine = sa.create_engine(wire.url(database_url), connect_args={"cursor_factory": Cursor})
    with OptInSession(engine, local_settings=lambda: given) as session:
        for _ in range(3):
            assert session.scalar(SHOWN) == "a"
            with session.begin():
                assert session.scalar(SHOWN) == "a"
        session.execute(sa.insert(Item).values(name="x"))
        given["role"] = "nobody_is_this"
        with pytest.raises(LocalSettingsError, match="role"):
            session.scalar(SHOWN)
        del given["role"]
        assert session.scalar(SHOWN) == "a"
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    engine.dispose()


def test_m1_a_lost_connection_is_replaced_and_they_are_there_again(given: Given, wire: Wire, look: Look) -> None:
    for run in (lambda: db.session.scalar(SHOWN), _in_a_block):
        assert run() == "a"
        look(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()"
        )
        assert run() == "a"


def _in_a_block() -> Any:
    with db.session.begin():
        return db.session.scalar(SHOWN)


def test_m1_where_somebody_listens_to_begin(given: Given, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[str] = []
    session = db.session()

    def begun(session: Any, transaction: Any, connection: Any) -> None:
        heard.append(connection.scalar(SHOWN))

    sa.event.listen(session, "after_begin", begun)
    with caplog.at_level(logging.INFO):
        assert session.scalar(SHOWN) == "a"
        assert session.scalar(SHOWN) == "a"
    sa.event.remove(session, "after_begin", begun)
    assert heard == ["a", "a"]
    assert session.scalar(SHOWN) == "a"
    assert left() is None


def test_m1_no_listener_and_no_word_where_a_statement_needs_a_transaction(
    given: Given, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fictive.session"):
        db.session.execute(sa.text("DO $$ BEGIN END $$"))
    assert "Somebody listens" not in caplog.text


# -- M1: what is around a session ------------------------------------------------------------------------------------


def test_m1_the_report_counts_statements_and_not_settings(given: Given, wire: Wire) -> None:
    with wire.record() as log, watching(db.session) as watched:
        assert db.session.scalar(SHOWN) == "a"
        with db.session.begin():
            assert db.session.scalar(SHOWN) == "a"
        db.session.execute(sa.text("DO $$ BEGIN END $$"))
        with pytest.raises(sa.exc.DBAPIError):
            db.session.execute(sa.text("SELECT 1 / 0"))
    report = watched.report
    assert len(report.statements) == 4
    assert report.round_trips == log.round_trips
    assert not any("set_config" in each.sql for each in report.statements)
    sa.event.listen(session := db.session(), "after_begin", lambda *_: None)
    with watching(session) as watched:
        session.scalar(SHOWN)
    assert len(watched.report.statements) == 1


def test_m1_listeners_to_statements_hear_the_users_own(given: Given) -> None:
    heard: list[str] = []

    def before(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        heard.append(statement)

    sa.event.listen(db.engine, "before_cursor_execute", before)
    db.session.scalar(SHOWN)
    with db.session.begin():
        db.session.scalar(SHOWN)
    sa.event.remove(db.engine, "before_cursor_execute", before)
    assert heard == [SHOWN.text] * 2


def test_m1_the_sandbox_has_them_as_without(given: Given, app: Flask) -> None:
    with db.sandbox() as box:
        with box.record() as log:
            assert db.session.scalar(SHOWN) == "a"
        assert (log.round_trips, len(log.statements)) == (1, 1)
        with db.engine.connect() as connection:
            assert connection.scalar(SHOWN) in ("", None)
        with box.record() as log, db.session.begin():
            assert db.session.scalar(SHOWN) == "a"
            db.session.execute(sa.insert(Item).values(name="x"))
        assert (log.round_trips, len(log.statements)) == (3, 2)
        given["app.tenant"] = "b"
        db.session.execute(sa.insert(Item).values(name=sa.func.current_setting("app.tenant")))
        with pytest.raises(sa.exc.IntegrityError):
            db.session.execute(sa.insert(Item).values(name="b"))
        given["role"] = "nobody_is_this"
        with pytest.raises(LocalSettingsError, match="role"):
            db.session.scalar(SHOWN)
        with pytest.raises(LocalSettingsError, match="role"), db.session.begin():
            db.session.scalar(SHOWN)
        given.clear()
        assert db.session.scalar(SHOWN) in ("", None)
        assert sorted(db.session.scalars(sa.select(Item.name))) == ["b", "x"]


def test_m1_core_is_not_touched(given: Given) -> None:
    with db.engine.begin() as connection:
        assert connection.scalar(SHOWN) is None
    with db.engine.connect() as connection:
        assert connection.scalar(SHOWN) is None
    assert given.asked == 0


def test_m1_without_flask(given: Given, database_url: str) -> None:
    engine = sa.create_engine(database_url)
    engines: list[sa.Engine] = []

    def settings(engine: sa.Engine) -> dict[str, str]:
        engines.append(engine)
        return {"app.tenant": "job"}

    for make in (sessionmaker(engine, local_settings=settings), lambda: OptInSession(engine, local_settings=settings)):
        with make() as session:
            assert session.scalar(SHOWN) == "job"
            with session.begin():
                assert session.scalar(SHOWN) == "job"
    assert engines == [engine] * 4
    with pytest.raises(ConfigurationError):
        OptInSession(engine, local_settings={"app.tenant": "x"})  # type: ignore[arg-type]
    engine.dispose()


def test_m1_a_session_on_a_connection_that_it_was_given(given: Given) -> None:
    with db.engine.connect() as connection:
        with OptInSession(connection, local_settings=lambda: given) as session:
            assert session.scalar(SHOWN) == "a"
            assert not connection.in_transaction()
            with session.begin():
                assert session.scalar(SHOWN) == "a"
            session.add(Item(name="x"))
            session.commit()
        assert (connection.scalar(SHOWN) or None) is None
        connection.rollback()
        with connection.begin(), OptInSession(connection, local_settings=lambda: given) as session:
            assert session.scalar(SHOWN) == "a"
            given["role"] = "nobody_is_this"
            with pytest.raises(LocalSettingsError, match="role"):
                session.scalar(SHOWN)


def test_m1_binds_and_a_function_that_takes_the_engine(make_app: MakeApp, database_url: str, wire: Wire) -> None:
    two = DB()
    by_engine = {}

    @two.local_settings
    def settings(engine: sa.Engine) -> dict[str, Any]:
        return by_engine[engine]

    app = make_app(two, SQLALCHEMY_BINDS={"other": wire.url(database_url), "lite": "sqlite://"})
    with app.app_context():
        by_engine.update({two.engines[key]: {"app.tenant": str(key)} for key in (None, "other")})
        by_engine[two.engines["lite"]] = {}
        for key in (None, "other"):
            bind = {"bind": two.engines[key]}
            assert two.session.scalar(SHOWN, bind_arguments=bind) == str(key)
        with two.session.begin():
            for key in (None, "other", None):
                assert two.session.scalar(SHOWN, bind_arguments={"bind": two.engines[key]}) == str(key)
        lite = {"bind": two.engines["lite"]}
        assert two.session.scalar(sa.text("SELECT 1"), bind_arguments=lite) == 1
        by_engine[two.engines["lite"]] = {"app.tenant": "x"}
        with pytest.raises(UnsupportedDialect, match=r"local_settings \(app.tenant\)"):
            two.session.scalar(sa.text("SELECT 1"), bind_arguments=lite)
        with pytest.raises(UnsupportedDialect), two.session.begin():
            two.session.scalar(sa.text("SELECT 1"), bind_arguments=lite)


def test_m1_behind_a_pooler(given: Given, pooler: Any, database_url: str) -> None:
    engine = sa.create_engine(pooler.url(database_url))
    set_pooler(engine)
    with OptInSession(engine, local_settings=lambda: given) as session:
        for given["app.tenant"] in ("a", "b") * 5:
            assert session.scalar(SHOWN) == given["app.tenant"]
            with session.begin():
                assert session.scalar(SHOWN) == given["app.tenant"]
            with engine.connect() as connection:
                assert connection.scalar(SHOWN) in ("", None)
    engine.dispose()


# -- the function ----------------------------------------------------------------------------------------------------


def test_m1_what_the_function_raises_comes_out_and_nothing_is_sent(given: Given, wire: Wire, look: Look) -> None:
    def fails() -> dict[str, Any]:
        raise LookupError("who is it?")

    with OptInSession(db.engine, local_settings=fails) as session:
        with wire.record() as log:
            with pytest.raises(LookupError):
                session.scalar(SHOWN)
            with pytest.raises(LookupError), session.begin():
                session.scalar(SHOWN)
            session.add(Item(name="x"))
            with pytest.raises(LookupError):
                session.commit()
            session.rollback()
            with pytest.raises(LookupError):
                session.execute(SHOWN, execution_options={"yield_per": 1})
        assert log.round_trips == 0
        assert not session.in_transaction()
    assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    assert look("select * from item") == []


def test_m1_the_function_cannot_use_the_session_but_an_engine(app: Flask) -> None:
    def asks_the_session() -> dict[str, Any]:
        return {"app.tenant": session.scalar(sa.text("SELECT 'x'"))}

    def asks_the_engine() -> dict[str, Any]:
        with db.engine.connect() as connection:
            return {"app.tenant": connection.scalar(sa.text("SELECT 'x'"))}

    with OptInSession(db.engine, local_settings=asks_the_session) as session:
        with pytest.raises(LocalSettingsError, match=r"asks_the_session.*has run a statement"):
            session.scalar(SHOWN)
    with OptInSession(db.engine, local_settings=asks_the_engine) as session:
        assert session.scalar(SHOWN) == "x"


def test_m1_one_function_and_the_same_one_anew() -> None:
    other = DB()

    def factory(value: str) -> None:
        @other.local_settings
        def settings() -> dict[str, Any]:
            return {"app.tenant": value}

    factory("a")
    factory("b")
    with pytest.raises(ConfigurationError, match="has a function already"):
        other.local_settings(dict)
    for bad in (7, {"a": "b"}, lambda a, b: {}):
        with pytest.raises(ConfigurationError):
            DB().local_settings(bad)  # type: ignore[type-var]
    with pytest.raises(ConfigurationError):
        DB(session_options={"local_settings": 7})


def test_m1_the_hook_is_also_an_option_of_sessions(make_app: MakeApp) -> None:
    own = DB(session_options={"local_settings": lambda: {"app.tenant": "option"}})
    with make_app(own).app_context():
        assert own.session.scalar(SHOWN) == "option"


def test_m1_a_role_and_a_search_path(given: Given, look: Look) -> None:
    look("create schema t1; create schema t2")
    look("create table t1.r (k text); create table t2.r (k text)")
    look("insert into t1.r values ('one'); insert into t2.r values ('two')")
    for schema, want in (("t1", "one"), ("t2", "two"), ("t1", "one")):
        given["search_path"] = f'"{schema}"'
        assert db.session.scalar(sa.text("SELECT k FROM r")) == want
        with db.session.begin():
            assert db.session.scalar(sa.text("SELECT k FROM r")) == want
    given.clear()
    given["role"] = "pg_read_all_settings"
    assert db.session.scalar(sa.text("SELECT current_user")) == "pg_read_all_settings"
    with pytest.raises(sa.exc.ProgrammingError) as raised:
        db.session.scalars(sa.text("SELECT * FROM t1.r"))
    assert sqlstate(raised.value) == "42501"
    with db.session.begin():
        assert db.session.scalar(sa.text("SELECT current_user")) == "pg_read_all_settings"
    given.clear()
    assert db.session.scalar(sa.text("SELECT current_user")) != "pg_read_all_settings"
