"""L2: whoever wrote sees it, by whatever way it was written; on a replica that replays nothing meanwhile."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from fictive.connection.replicas import positions_of
from fictive.sqlalchemy import OptInSession
from tests.fix_nodes import Nodes
from tests.models import Item, opt_in
from tests.test_l_replicas import NAMES, Pair

db = opt_in.db
FUNCTIONS = """
create function put(name text) returns setof int language plpgsql as
  $$ begin insert into item (name) values (put.name); return; end $$;
create function put_one(name text) returns int language plpgsql as
  $$ begin insert into item (name) values (put_one.name); return 1; end $$;
create table told (i int);
create function tell() returns trigger language plpgsql as
  $$ begin insert into item (name) values ('a'); return null; end $$;
create trigger tell after update on told for each statement execute function tell();
create view putting as select put_one('a') as i
"""
WRITES = {
    "a function without rows": "select * from put('a')",
    "a CTE behind which nothing comes": "with a as (insert into item (name) values ('a')) select 1 where false",
    "a text of two statements": "insert into item (name) values ('a'); update item set note = 'b' where false",
    "a trigger of a statement that met no row": "update told set i = 1 where false",
}
VIEW = sa.text("select i from putting").execution_options(fictive_writes=True)


@pytest.fixture
def pair(nodes: Nodes, node_database: str, driver: str) -> Iterator[Pair]:
    pair = Pair(nodes, node_database, driver)
    with pair.engine.begin() as connection:
        connection.exec_driver_sql(FUNCTIONS)
    nodes.catch_up()
    nodes.pause()
    yield pair
    nodes.resume()
    pair.close()


@pytest.fixture
def session(pair: Pair) -> Iterator[OptInSession]:
    with OptInSession(pair.engine) as session:
        yield session


@pytest.mark.parametrize("settings", [{}, {"app.a": "b"}], ids=["", "with settings"])
def test_l2_a_write_whose_answer_has_no_rows_is_seen(pair: Pair, settings: dict[str, Any]) -> None:
    missed = []
    for way, text in WRITES.items():
        with pair.engine.begin() as connection:
            connection.execute(sa.delete(Item))
        with OptInSession(pair.engine, local_settings=lambda: settings) as session:
            session.execute(sa.text(text))
            if session.scalars(NAMES).all() != ["a"]:
                missed.append(way)
    assert missed == []


def test_l2_a_read_that_says_it_writes_goes_to_the_primary(pair: Pair, session: OptInSession) -> None:
    with pair.replica.record() as replica:
        assert session.scalar(VIEW) == 1
    assert replica.round_trips == 0
    assert session.scalars(NAMES).all() == ["a"]


def test_l2_a_read_that_says_it_writes_is_a_write_in_a_block(session: OptInSession) -> None:
    with session.begin():
        session.execute(VIEW)
    assert session.scalars(NAMES).all() == ["a"]


def _by_the_driver(session: OptInSession) -> None:
    session.connection().connection.dbapi_connection.cursor().execute("insert into item (name) values ('a')")  # type: ignore[union-attr]


def _by_a_cursor(session: OptInSession) -> None:
    cursor: Any = session.connection().connection.cursor()
    if hasattr(cursor, "copy_expert"):
        cursor.copy_expert("copy item (name) from stdin", io.StringIO("a\n"))
    else:
        with cursor.copy("copy item (name) from stdin") as copy:
            copy.write("a\n")
    cursor.close()


def test_l2_what_is_written_on_a_pinned_connection_is_seen(pair: Pair) -> None:
    for write in (_by_the_driver, _by_a_cursor):
        with pair.engine.begin() as connection:
            connection.execute(sa.delete(Item))
        with OptInSession(pair.engine) as session:
            with session.pinned():
                write(session)
            assert session.scalars(NAMES).all() == ["a"], write.__name__


def test_l2_a_write_that_met_no_row_warns_of_nothing(session: OptInSession, recwarn: pytest.WarningsRecorder) -> None:
    session.execute(sa.update(Item).values(note="b"))
    session.rollback()
    assert not recwarn.list
    assert positions_of(session.info).changed


@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
def test_l2_a_token_takes_nothing_away(pair: Pair, tmp_path: Path) -> None:
    app = Flask(__name__, instance_path=str(tmp_path))
    app.config.update(
        SECRET_KEY="secret",
        SQLALCHEMY_DATABASE_URI=pair.engine.url.render_as_string(hide_password=False),
        FICTIVE_REPLICAS=[pair.copy.url.render_as_string(hide_password=False)],
    )
    db.init_app(app)

    def add(name: str) -> str:
        with db.session.begin():
            db.session.add(Item(name=name))
        return read()

    def read() -> str:
        return ",".join(db.session.scalars(NAMES))

    @app.get("/")
    def index() -> list[str]:
        found = [add("a")]
        for token in (None, db.token()):
            with db.using_token(token):
                found += [read(), add("b" if token is None else "c")]
            found.append(read())
        return found

    @app.get("/again")
    def again() -> list[str]:
        return [read()]

    user = app.test_client()
    assert user.get("/").json == ["a", "a", "a,b", "a,b", "a,b", "a,b,c", "a,b,c"]
    assert user.get("/again").json == ["a,b,c"]
    assert app.test_client().get("/again").json == [""]
    with app.app_context():  # without a request
        assert add("d") == "a,b,c,d"
        with db.using_token(None):
            assert read() == "a,b,c,d"
            add("e")
        assert read() == "a,b,c,d,e"
        with db.using_token(db.token()):
            assert read() == "a,b,c,d,e"
    with app.app_context():
        assert read() == ""
        for engine in db.engines.values():
            engine.dispose()
