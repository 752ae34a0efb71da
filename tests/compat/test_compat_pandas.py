"""pandas `read_sql` and `to_sql` on `db.engine` and its connections."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import pytest
import sqlalchemy as sa
from flask import Flask

from tests.compat.ways import Way

AppOf = Callable[..., Flask]
Look = Callable[..., list[Any]]


@pytest.fixture
def db(way: Way, app_of: AppOf, look: Look) -> Iterator[Any]:
    db = way.db_class()
    app = app_of(db)
    look("create table measure (n int primary key, name text not null)")
    look("insert into measure select i, 'm' || i from generate_series(1, 5) as i")
    with app.app_context():
        yield db


FRAME = pd.DataFrame({"n": [10, 11], "name": ["ten", "eleven"]})


def test_read_sql(db: Any) -> None:
    db.session.execute(sa.text("select 1"))
    assert pd.read_sql("select * from measure order by n", db.engine)["name"].tolist() == [
        "m1",
        "m2",
        "m3",
        "m4",
        "m5",
    ]
    assert pd.read_sql_table("measure", db.engine, index_col="n").loc[3, "name"] == "m3"
    query = sa.select(sa.column("n")).select_from(sa.table("measure")).where(sa.column("n") > 3)
    assert pd.read_sql(query, db.engine)["n"].tolist() == [4, 5]
    chunks = pd.read_sql_query(sa.text("select n from measure where n < :n"), db.engine, params={"n": 4}, chunksize=2)
    assert [len(chunk) for chunk in chunks] == [2, 1]
    with db.engine.connect() as connection:
        assert len(pd.read_sql("select * from measure", connection)) == 5
    assert db.engine.pool.checkedout() == (1 if db.session.registry().in_transaction() else 0)


def test_to_sql_on_the_engine(db: Any, look: Look) -> None:
    FRAME.to_sql("measure", db.engine, if_exists="append", index=False)
    assert look("select count(*) from measure") == [7]
    FRAME.to_sql("fresh", db.engine, index=False)
    FRAME.to_sql("fresh", db.engine, index=False, if_exists="replace", method="multi")
    assert look("select n, name from fresh order by n") == [(10, "ten"), (11, "eleven")]
    db.session.execute(sa.text("select * from fresh")).all()


def test_to_sql_is_atomic(db: Any, look: Look) -> None:
    bad = pd.DataFrame({"n": [20, 21, 1], "name": ["a", "b", "duplicate"]})
    for options in ({}, {"chunksize": 1}, {"method": "multi"}):
        with pytest.raises((sa.exc.IntegrityError, pd.errors.DatabaseError)):  # pandas wraps some
            bad.to_sql("measure", db.engine, if_exists="append", index=False, **options)
        assert look("select count(*) from measure") == [5]


def test_engine_begin_covers_all_of_it(db: Any, look: Look) -> None:
    with db.engine.begin() as connection:
        FRAME.to_sql("measure", connection, if_exists="append", index=False)
        assert len(pd.read_sql("select * from measure", connection)) == 7
        assert look("select count(*) from measure") == [5]
    assert look("select count(*) from measure") == [7]
    with pytest.raises(ZeroDivisionError), db.engine.begin() as connection:
        FRAME.assign(n=FRAME["n"] + 10).to_sql("measure", connection, if_exists="append", index=False)
        FRAME.to_sql("never", connection, index=False)
        raise ZeroDivisionError
    assert look("select count(*) from measure") == [7]
    assert look("select count(*) from pg_tables where tablename = 'never'") == [0]


def test_on_the_session_s_own_connection(way: Way, db: Any, look: Look) -> None:
    """Within `db.session.begin()`, which plain has too, what pandas writes belongs to the transaction."""
    with pytest.raises(ZeroDivisionError), db.session.begin():
        FRAME.to_sql("measure", db.session.connection(), if_exists="append", index=False)
        assert db.session.scalar(sa.text("select count(*) from measure")) == 7
        raise ZeroDivisionError
    assert look("select count(*) from measure") == [5]
    with db.session.begin():
        FRAME.to_sql("measure", db.session.connection(), if_exists="append", index=False)
    assert look("select count(*) from measure") == [7]
