"""M1, M2: settings that `@db.local_settings` gives travel with what runs, and end with it."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask

from fictive.errors import ConfigurationError, LocalSettingsError, UnsupportedDialect
from fictive.report.watching import watching
from fictive.session.local_settings import LocalSettings
from fictive.session.transaction import innermost
from fictive.sqlalchemy import OptInSession, sessionmaker
from fictive.testing.wire import Log, Wire
from tests.models import Item, db

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


@pytest.mark.parametrize("run", OUTSIDE.values(), ids=OUTSIDE)
def test_m1_outside_they_ride_with_the_statement_and_end_with_it(
    run: Callable[[], Any], given: Given, wire: Wire
) -> None:
    with wire.record() as log:
        assert run() == "a"
    assert log.round_trips == 1
    assert not any(text.startswith(("BEGIN", "COMMIT", "SET")) for text in sent(log))
    assert given.asked == 1
    assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    assert left() is None
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
