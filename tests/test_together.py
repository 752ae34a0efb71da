"""Functions of contracts B, D, E, F and I3 in one piece of work, on each kind of session, outside and inside."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask

from fictive.errors import TransactionRequired
from fictive.models import Repository
from fictive.rows.find_or_create import get_or_create
from fictive.sqlalchemy import (
    OptInSession,
    Rollback,
    advisory_lock,
    claim,
    get_transaction,
    insert_many,
    lock_tables,
    m2m_add,
    m2m_set,
    on_commit,
    on_rollback,
    run_transaction,
    transaction,
    upsert_many,
)
from tests.models import Item, Tag, db

Look = Callable[..., list[Any]]


def _work(session: sa_orm.Session, ran: list[str]) -> None:
    """Everything once, and nothing of it lost or written twice."""

    def timeout() -> str:
        return str(session.scalar(sa.text("show lock_timeout"), execution_options={"fictive_writes": False}))

    on_commit(session, lambda: ran.append("committed"))
    items = Repository[Item](session)
    item = items.create(name="a")
    assert get_or_create(session, Item, {"name": "a"}, {"note": "not taken"}) == (item, False)
    assert get_or_create(session, Item, {"note": "no key"}, {"name": "b"})[1]
    assert insert_many(session, Tag, ({"label": f"t{n}"} for n in range(30))) == 30
    done = upsert_many(session, Tag, [{"label": f"t{n}"} for n in range(600)], key="label", update=[])
    assert done.inserted == 570
    with advisory_lock(session, 'it\'s "a" %s :key'), advisory_lock(session, (1, 2), timeout="1s"):
        assert items.update(item.id, note="by key") is item
    with lock_tables(session, [Item, Tag], timeout="2s"):
        m2m_add(session, item, Item.tags, 1, 2)
        changes = m2m_set(session, item, Item.tags, 2, 3)
        assert (changes.added, changes.removed) == ((3,), (1,))
    assert timeout() == "0"
    with transaction(session, lock_timeout="3s"):
        with get_transaction(session, lock_timeout="1s") as inner:
            assert timeout() == "1s"
            assert session.scalars(claim(sa.select(Item).order_by(Item.id), 1)).all() == [item]
            on_commit(session, lambda: ran.append("never"))
            on_rollback(session, lambda: ran.append("rolled back"))
            items.create(name="undone")
            raise Rollback(inner)
        assert timeout() == "3s"
        assert not items.exists(name="undone")
    assert timeout() == "0"
    assert ran.count("rolled back") == 1


@pytest.mark.parametrize("kind", ["commit", "begin", "refuse", "plain"])
def test_b_d_e_f_i3_in_one_piece_of_work(kind: str, app: Flask, look: Look) -> None:
    engine = sa.create_engine(db.engine.url)
    for where in ("outside", "transaction", "savepoint", "retried"):
        ran: list[str] = []
        work = functools.partial(_work, ran=ran)
        with sa_orm.Session(engine) if kind == "plain" else OptInSession(engine, writes_outside=kind) as session:
            if where == "outside" and kind == "refuse":
                with pytest.raises(TransactionRequired, match=r"create\(\) outside a transaction"):
                    work(session)
                continue
            if where == "outside":
                work(session)
                session.commit()
            elif where == "retried":
                run_transaction(session, functools.partial(work, session), isolation_level="SERIALIZABLE")
            else:
                with session.begin(), session.begin_nested() if where == "savepoint" else contextlib.nullcontext():
                    work(session)
        assert sorted(ran) == ["committed", "rolled back"]
        links = "select note, array(select tag_id from item_tag order by 1) from item where name = 'a'"
        assert look(links) == [("by key", [2, 3])]
        assert look("select count(*) from tag") == [600]
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        look("truncate item, tag, item_tag, child restart identity")
    engine.dispose()
