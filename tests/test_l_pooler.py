"""L4, C5: behind a real PgBouncer in transaction mode, with two server connections."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fictive.changes.listener import listening
from fictive.connection.pooler import find_pooler, is_pooled, way_around
from fictive.connection.servers import patience_of
from fictive.errors import ConfigurationError, DirectConnectionRequired, LockTimeout
from fictive.flask_sqlalchemy import OptInTransactionMixin
from fictive.sqlalchemy import (
    OptInSession,
    advisory_lock,
    cleanup_tables,
    notify_changes,
    set_pooler,
    update_many,
    upsert_many,
    wait_for_rows,
)
from tests.fix_pooler import Pooler
from tests.models import Item, opt_in

TURNS = int(os.environ.get("FICTIVE_MIXED_TURNS", "40"))
"""Of seven statements each, by eight threads."""

Look = Callable[..., list[Any]]
LOCKS = (
    "select count(*) from pg_locks where locktype = 'advisory'"
    " and database = (select oid from pg_database where datname = current_database())"
)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    for listener in listening():
        listener.end()


@pytest.fixture
def engine(pooler: Pooler, database_url: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(pooler.url(database_url), pool_size=20)
    set_pooler(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def direct(pooler: Pooler, database_url: str) -> Iterator[sa.Engine]:
    """One that knows the way around."""
    engine = sa.create_engine(pooler.url(database_url), pool_size=20)
    set_pooler(engine, direct_url=database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def app(pooler: Pooler, database_url: str, tmp_path: Any) -> Iterator[Flask]:
    app = Flask(__name__, instance_path=str(tmp_path))
    app.config.update(SQLALCHEMY_DATABASE_URI=pooler.url(database_url), FICTIVE_POOLER="transaction")
    opt_in.db.init_app(app)
    with app.app_context():
        yield app
        opt_in.db.engine.dispose()


def test_l4_mixed_statements_by_many_threads(app: Flask) -> None:
    """Nothing of one client is seen by another, and no prepared statement is missed."""
    wrong: list[Any] = []

    def work(number: int) -> None:
        with app.app_context():
            session = opt_in.db.session
            try:
                for turn in range(TURNS):
                    name = f"{number} {turn}"
                    session.add(Item(name=name))
                    session.commit()
                    with session.begin():
                        session.execute(sa.text("select set_config('app.me', :me, true)"), {"me": name})
                        item = session.scalars(sa.select(Item).where(Item.name == name)).one()
                        item.note = session.scalar(sa.text("select current_setting('app.me')"))
                    with opt_in.db.transaction(statement_timeout="9s"):
                        found = session.scalar(sa.text("select current_setting('statement_timeout')"))
                    left = session.scalar(sa.text("select current_setting('statement_timeout')"))
                    if (item.note, found, left) != (name, "9s", "0"):
                        wrong.append((item.note, found, left))
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert opt_in.db.session.scalar(sa.text("select count(*) from item where name = note")) == 8 * TURNS


@pytest.mark.any_sqlalchemy
def test_l4_the_suite_runs_through_a_pooler() -> None:
    """A sample; `./run test --pooler` runs all."""
    options = ["-q", "--pooler", "--drivers", "psycopg", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, "tests/test_other_names.py"]
    found = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert " passed" in found.stdout
    assert " xfailed" in found.stdout


def test_c5_l4_the_features_of_one_transaction_work(app: Flask) -> None:
    db = opt_in.db
    with db.session.begin():
        db.session.add(Item(name="a"))
        with db.session.begin_nested():
            db.session.add(Item(name="b"))
        with db.lock_tables([Item]), db.advisory_lock("k"):
            pass
    names = [row.name for row in db.session.execute(sa.select(Item.name).execution_options(yield_per=1))]
    assert sorted(names) == ["a", "b"]
    assert db.session.scalars(sa.select(Item).where(Item.name == "a")).one().children == []


def test_l4_one_holder_at_a_time_outside(engine: sa.Engine, look: Look) -> None:
    look("insert into item (name, note) values ('counter', '0')")
    held: list[int] = []
    most: list[int] = []

    def work() -> None:
        with OptInSession(engine) as session:
            for _ in range(10):
                with advisory_lock(session, "counter"):
                    held.append(1)
                    most.append(len(held))
                    item = session.scalars(sa.select(Item).execution_options(populate_existing=True)).one()
                    session.execute(sa.update(Item).values(note=str(int(item.note) + 1)))
                    held.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert look("select note from item") == ["80"]


def test_l4_the_lock_is_a_transaction_of_the_session(engine: sa.Engine, look: Look) -> None:
    with OptInSession(engine) as session, OptInSession(engine) as other:
        with advisory_lock(session, 1):
            assert session.in_transaction()
            with pytest.raises(LockTimeout), advisory_lock(other, 1, nowait=True):
                raise AssertionError
            with advisory_lock(session, 1):
                session.add(Item(name="a"))
        assert not session.in_transaction()
        assert look("select name from item") == ["a"]
        with pytest.raises(ZeroDivisionError), advisory_lock(session, 1):
            session.add(Item(name="b"))
            session.flush()
            raise ZeroDivisionError
        assert look("select name from item") == ["a"]


def test_c5_l4_what_needs_one_server_connection_refuses_and_says_why(engine: sa.Engine) -> None:
    with OptInSession(engine) as session:
        with pytest.raises(DirectConnectionRequired, match="FICTIVE_DIRECT_URL"), session.pinned():
            raise AssertionError


class Base(DeclarativeBase):
    pass


class Parcel(Base):
    __tablename__ = "parcel"
    id: Mapped[int] = mapped_column(primary_key=True)


notify_changes(Parcel, inserts=True)


def test_l4_listen_goes_around_it_or_waiters_poll(engine: sa.Engine, direct: sa.Engine, look: Look) -> None:
    with direct.begin() as connection:
        Base.metadata.create_all(connection)
    with OptInSession(engine) as session:
        with pytest.raises(ConfigurationError, match="FICTIVE_DIRECT_URL"):
            wait_for_rows(session, Parcel)
        assert listening() == []
        look("insert into parcel default values")
        wait_for_rows(session, sa.select(Parcel), interval="10ms")
    with OptInSession(direct) as session:
        wait_for_rows(session, sa.select(Parcel), interval=3600)
        assert len(listening()) == 1


def test_l4_the_direct_url_serves_session_locks(direct: sa.Engine, look: Look) -> None:
    with OptInSession(direct) as session:
        with advisory_lock(session, 1):
            assert not session.in_transaction()
            assert look(LOCKS) == [1]
        assert look(LOCKS) == [0]


def test_l4_the_direct_url_serves_pinned_blocks(direct: sa.Engine) -> None:
    with OptInSession(direct) as session:
        with session.pinned():
            session.execute(sa.text("create temporary table mine (i int)"))
            with session.begin():
                session.execute(sa.text("insert into mine values (1)"))
            session.execute(sa.text("set statement_timeout = '77s'"))
            assert session.scalar(sa.text("select count(*) from mine")) == 1
        assert session.scalar(sa.text("select to_regclass('pg_temp.mine')")) is None
        assert session.scalar(sa.text("select current_setting('statement_timeout')")) == "0"


def test_l4_what_would_stay_on_a_server_connection_is_refused(engine: sa.Engine) -> None:
    texts = [
        "set statement_timeout = '77s'",
        "set role postgres",
        "listen a",
        "prepare p as select 1",
        "select pg_advisory_lock(1)",
        "select set_config('search_path', 'nowhere', false)",
        "create temporary table t (i int)",
    ]
    with OptInSession(engine) as session:
        for text in texts:
            with pytest.raises(DirectConnectionRequired, match="FICTIVE_DIRECT_URL"):
                session.execute(sa.text(text))
            with pytest.raises(DirectConnectionRequired), session.begin():
                session.execute(sa.text(text))
        with session.begin():
            session.execute(sa.text("set local statement_timeout = '77s'"))
            session.execute(sa.text("select pg_advisory_xact_lock(1)"))


def test_l4_bulk_writes_and_cleaning_up_work(app: Flask) -> None:
    """What they leave ends with the transaction: a temporary table ON COMMIT DROP, a `set_config(…, true)`."""
    db = opt_in.db
    rows = [{"id": number, "name": str(number)} for number in range(1, 1001)]
    for _ in range(2):
        upsert_many(db.session, Item, rows, key="id")
    update_many(db.session, Item, [{"id": number, "note": "x"} for number in range(1, 1001)])
    assert db.session.scalar(sa.text("select count(*) from item where note = 'x'")) == 1000
    cleanup_tables(db.session, Item.metadata)
    with db.session.begin():
        db.session.execute(sa.text("create temp table t on commit drop as select 1 as i"))
        assert db.session.scalar(sa.text("select i from t")) == 1
    assert db.session.scalar(sa.text("select count(*) from item")) == 0


def test_l4_d8_staged_rows_go_with_their_transaction(engine: sa.Engine) -> None:
    with OptInSession(engine) as session:
        rows = [{"id": n, "name": str(n), "note": "a"} for n in range(600)]
        assert upsert_many(session, Item, rows, key="id") == (600, 0, 0)
        assert update_many(session, Item, [{"id": n, "note": "b"} for n in range(600)]) == 600
        assert session.scalar(sa.select(sa.func.count()).where(Item.note == "b")) == 600


def test_l4_found_out(engine: sa.Engine, database_url: str) -> None:
    found = find_pooler(engine)
    assert found is not None
    assert found.mode == "transaction"
    assert (found.version or "").startswith("PgBouncer")
    straight = sa.create_engine(database_url)
    assert find_pooler(straight) is None
    straight.dispose()


def test_l4_settings(lite: sa.Engine, database_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    engine = sa.create_engine(database_url)
    for wrong in ("session", "statement", ""):
        with pytest.raises(ConfigurationError, match="transaction"):
            set_pooler(engine, wrong)
    with pytest.raises(ConfigurationError, match="PostgreSQL"):
        set_pooler(lite)
    with pytest.raises(ConfigurationError, match="PostgreSQL"):
        set_pooler(engine, direct_url="sqlite://")
    with pytest.raises(ConfigurationError, match="URL"):
        set_pooler(engine, direct_url="nothing")
    assert not is_pooled(engine)
    assert way_around(engine) is engine

    class DB(OptInTransactionMixin, SQLAlchemy):
        pass

    def made(**config: Any) -> Any:
        app = Flask(__name__, instance_path=str(tmp_path))
        db = DB(model_class=type("Base", (DeclarativeBase,), {}))
        app.config.update(SQLALCHEMY_DATABASE_URI=database_url, SQLALCHEMY_BINDS={"more": database_url}, **config)
        db.init_app(app)
        with app.app_context():
            return db.engines

    engines = made(FICTIVE_POOLER="transaction", FICTIVE_DIRECT_URL={"more": database_url}, FICTIVE_PATIENCE="7s")
    assert is_pooled(engines[None])
    assert way_around(engines[None]) is None
    direct = way_around(engines["more"])
    assert direct is not None
    assert patience_of(direct) == patience_of(engines[None]) == 7
    assert not is_pooled(made()[None])
    with pytest.raises(ConfigurationError, match="FICTIVE_DIRECT_URL"):
        made(FICTIVE_DIRECT_URL="x")
    for key, value in {"FICTIVE_POOLER": "session", "FICTIVE_DIRECT_URL": "sqlite://", "FICTIVE_PATIENCE": 61}.items():
        with pytest.raises(ConfigurationError, match=key):
            made(**{key: value})
    made(FICTIVE_PATIENCE=0)
    monkeypatch.setenv("DB_PGBOUNCER", "true")
    assert is_pooled(made()[None])
