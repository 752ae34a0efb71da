"""Contract A: what needs a transaction or a connection of its own, and what is left at the end: A11, A12, A13, A14."""

from __future__ import annotations

import contextlib
import gc
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask
from sqlalchemy.dialects.postgresql import insert as pg_insert

from fictive.errors import (
    PinnedConnectionLost,
    TransactionAlreadyBegun,
    TransactionRequired,
    UnsavedChangesError,
    UnsavedChangesWarning,
)
from fictive.sqlalchemy import OptInSession
from fictive.testing.wire import Wire
from tests.conftest import MakeApp
from tests.models import Child, Item, Tag, db
from tests.wirelog import own_verbs, verbs

Look = Callable[..., list[Any]]
Backends = Callable[[], list[str]]

POOL_OF_ONE = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 1}

# Other workers' tests have locks in their databases.
ADVISORY_LOCKS = (
    "select count(*) from pg_locks where locktype = 'advisory'"
    " and database = (select oid from pg_database where datname = current_database())"
)


@pytest.fixture
def rows(look: Look) -> None:
    look("insert into item (name) select 'n' || g from generate_series(1, 6) g")
    look("insert into child (item_id, size) select id, 1 from item")


@pytest.fixture
def items(app: Flask, rows: None) -> None:
    """The same rows, with an app whose context is pushed."""


def kill_others(look: Look) -> None:
    """Terminate this database's other backends, and wait until they are gone."""
    look(
        "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
        " where datname = current_database() and pid <> pg_backend_pid()"
    )


# -- A11 --------------------------------------------------------------------------------------------------------------

locked = sa.select(Item).with_for_update()
one_id = sa.select(Item.id).where(Item.id == 1).with_for_update(skip_locked=True)
xact_lock = sa.func.pg_advisory_xact_lock


def run(statement: Any, params: Any = None) -> Callable[[], Any]:
    return lambda: db.session.execute(statement, params)


CONSTRUCTS: dict[str, Callable[[], Any]] = {
    "for update": run(locked),
    "for share": run(sa.select(Item).with_for_update(read=True)),
    "for no key update": run(sa.select(Item).with_for_update(key_share=True)),
    "for key share": run(sa.select(Item).with_for_update(read=True, key_share=True)),
    "nowait of": run(sa.select(Item).with_for_update(nowait=True, of=Item)),
    "core table": run(sa.select(Item.__table__).with_for_update()),
    "scalars": lambda: db.session.scalars(locked).all(),
    "scalar": lambda: db.session.scalar(locked),
    "lambda": run(sa.lambda_stmt(lambda: sa.select(Item).with_for_update())),
    "streamed": lambda: db.session.execute(locked, execution_options={"yield_per": 2}).all(),
    "subquery": run(sa.select(locked.subquery())),
    "aliased subquery": run(sa.select(sa_orm.aliased(Item, locked.subquery()))),
    "scalar subquery": run(sa.select(one_id.scalar_subquery())),
    "in": run(sa.select(Tag).where(Tag.id.in_(one_id))),
    "exists": run(sa.select(sa.exists(one_id))),
    "lateral": run(sa.select(Item.id, one_id.lateral("x"))),
    "cte": run(sa.select(one_id.cte("x"))),
    "added cte": run(sa.select(sa.literal(1)).add_cte(one_id.cte("x"))),
    "union of subqueries": run(sa.union(sa.select(Tag.id), sa.select(one_id.subquery().c.id))),
    "deep": run(sa.select(sa.select(sa.select(one_id.cte("x")).subquery()).subquery())),
    "from_statement": run(sa.select(Item).from_statement(locked)),
    "from_statement text": run(sa.select(Item).from_statement(sa.text("select * from item for update"))),
    "textual columns": run(sa.text("select id from item for update").columns(Item.id)),
    "suffix": run(sa.select(Item.id).suffix_with("FOR UPDATE")),
    "hint": run(sa.select(Item.id).with_statement_hint("FOR UPDATE")),
    "update where": run(sa.update(Item).where(Item.id == one_id.scalar_subquery()).values(note="taken")),
    "delete where": run(sa.delete(Item).where(Item.id.in_(one_id))),
    "insert from select": run(pg_insert(Tag).from_select(["label"], sa.select(Item.name).with_for_update())),
    "get": lambda: db.session.get(Item, 1, with_for_update=True),
    "get read": lambda: db.session.get(Item, 1, with_for_update={"read": True}),
    "get_one": lambda: db.session.get_one(Item, 1, with_for_update={"nowait": True}),
    "refresh": lambda: db.session.refresh(db.session.get(Item, 6), with_for_update=True),
    "refresh dict": lambda: db.session.refresh(db.session.get(Item, 6), with_for_update={"skip_locked": True}),
    "query all": lambda: Item.query.with_for_update().all(),
    "query first": lambda: db.session.query(Item).filter_by(id=1).with_for_update(read=True).first(),
    "query iterated": lambda: list(db.session.query(Item.id).with_for_update()),
    "query yield_per": lambda: list(Item.query.with_for_update().yield_per(2)),
    "query from subquery": lambda: db.session.query(Item.query.with_for_update().subquery()).all(),
    "paginate": lambda: db.paginate(locked.order_by(Item.id)),
    "first_or_404": lambda: db.first_or_404(locked),
    "xact lock": run(sa.select(xact_lock(1))),
    "xact lock alone": run(xact_lock(1)),
    "xact lock scalar": lambda: db.session.scalar(xact_lock(1, 2)),
    "xact lock shared": run(sa.select(sa.func.pg_advisory_xact_lock_shared(1))),
    "try xact lock": run(sa.select(sa.func.pg_try_advisory_xact_lock(1))),
    "try xact lock shared": run(sa.select(sa.func.pg_try_advisory_xact_lock_shared(1, 2))),
    "xact lock in schema": run(sa.select(sa.func.pg_catalog.pg_advisory_xact_lock(1))),
    "xact lock with bind": run(sa.select(xact_lock(sa.bindparam("key"))), {"key": 7}),
    "xact lock where": run(sa.select(Item).where(sa.func.pg_try_advisory_xact_lock(Item.id))),
    "xact lock labelled": run(sa.select(sa.cast(xact_lock(1), sa.Text).label("x"))),
    "xact lock from": run(sa.select(sa.literal(1)).select_from(xact_lock(1).alias("x"))),
    "xact lock in case": run(sa.select(sa.case((Item.id > 1, sa.cast(xact_lock(1), sa.Text)), else_=""))),
    "xact lock in insert": run(sa.insert(Item).values(name=sa.cast(xact_lock(1), sa.Text))),
    "xact lock in update": run(sa.update(Item).values(note=sa.cast(xact_lock(1), sa.Text))),
    "xact lock as literal column": run(sa.select(sa.literal_column("pg_advisory_xact_lock(1)"))),
    "set_config": run(sa.select(sa.func.set_config("fictive.x", "1", True))),
    "set_config true()": run(sa.select(sa.func.set_config("fictive.x", "1", sa.true()))),
    "set_config bound": run(sa.select(sa.func.set_config("fictive.x", "1", sa.bindparam("loc"))), {"loc": True}),
    "set_config bound value": run(sa.select(sa.func.set_config("fictive.x", "1", sa.bindparam("loc", True)))),
    "set_config text value": run(sa.select(sa.func.set_config("fictive.x", "1", sa.text("true")))),
    "set_config in cte": run(sa.select(sa.select(sa.func.set_config("fictive.x", "1", True)).cte("x"))),
    "ddl lock table": run(sa.DDL("LOCK TABLE item")),
    "ddl set local": run(sa.DDL("SET LOCAL work_mem = '1MB'")),
}

TEXTS = [
    "select * from item for update",
    "SELECT * FROM item FOR UPDATE OF item NOWAIT",
    "select * from item For\n\tShare",
    "select * from item for no key update skip locked",
    "select * from item for key share",
    "select * from item for /* really */ update",
    "select * from item for -- really\n update",
    "select * from item where name = 'it''s' for update",
    "select * from item where name = E'it\\'s' for update",
    "select * from item where name = 'a\\' for update -- '",
    "select * from item where name like'\\' escape'' for update -- '",
    "select * from item where name = $$x$$ for update -- $$",
    'select "name" from "item" as "a ""b" for update',
    "select 1 /* /* nested */ ' */ from item for update -- '",
    "table item for update",
    "(select * from item for update)",
    "with x as (select * from item for update) select * from x",
    "with x as materialized (select * from item for share) select 1",
    "select * from (select * from item for update) x",
    "select 1 where exists (select 1 from item for update)",
    "update item set note = 'x' where id = (select id from item limit 1 for update skip locked)",
    "insert into tag (label) select name from item for update",
    "explain analyze select * from item for update",
    "lock table item",
    "LOCK item IN SHARE MODE NOWAIT",
    "  \n-- first\n/* then */ Lock\tTable only item",
    "lock table item;",
    "; lock table item",
    "select 1; lock table item",
    'lock "item"',
    "create temporary table t on commit drop as select 1",
    "set local work_mem = '1MB'",
    "SET\n\tLOCAL timezone TO 'UTC'",
    "set /* not session */ local work_mem to default",
    "set local role none",
    "select 1; set local lock_timeout = '1s'; select 2",
    "set transaction isolation level serializable",
    "set constraints all deferred",
    "select set_config('fictive.x', '1', true)",
    "SELECT SET_CONFIG ('fictive.x' , '1' , TRUE)",
    "select pg_catalog.set_config('fictive.x', '1', true)",
    "select set_config('fictive.x', lower('A'), true)",
    "select set_config('fictive.x', (select 'a,false'), true)",
    "select set_config('fictive.x', '1', 't')",
    "select set_config('fictive.x', '1', 1 = 1)",
    "select set_config('fictive.x', ', false)', true)",
    "select set_config('fictive.x', '1', /* false */ true)",
    "select \"set_config\"('fictive.x', '1', true)",
    "select pg_advisory_xact_lock(1)",
    "select PG_ADVISORY_XACT_LOCK\n(1, 2)",
    "select pg_advisory_xact_lock/* here */(1)",
    "select pg_advisory_xact_lock_shared(1)",
    "select pg_try_advisory_xact_lock(1)",
    "select pg_try_advisory_xact_lock_shared(1)",
    "select pg_catalog.pg_advisory_xact_lock(1)",
    "select pg_catalog . pg_advisory_xact_lock (1)",
    'select "pg_advisory_xact_lock"(1)',
    'select "pg_catalog"."pg_advisory_xact_lock"(1)',
    "select * from pg_advisory_xact_lock(1)",
    "select id from item where pg_try_advisory_xact_lock(id)",
    "with x as (select pg_advisory_xact_lock(1)) select * from x",
    "select 1 from (values (1)) v(a), lateral (select pg_advisory_xact_lock(a)) x",
    "select ((pg_advisory_xact_lock((1))))",
]

FALSE_ALARMS: dict[str, Any] = {
    "column": sa.select(sa.column("for update", _selectable=None)).select_from(
        sa.select(sa.literal(1).label("for update")).subquery()
    ),
    "label": sa.select(sa.literal(1).label("lock table item")),
    "literal": sa.select(sa.literal("lock table item")),
    "literal rendered": sa.select(sa.literal("set local x", literal_execute=True)),
    "bound value": sa.select(Item).where(Item.name == "select pg_advisory_xact_lock(1) for update"),
    "text literal": sa.text("select 'lock table item', 'it''s for update', E'\\' for share '"),
    "text dollar": sa.text("select $$ for update $$, $x$ lock $$ table $x$"),
    "text comment": sa.text("select 1 /* for update */ -- set_config('a', 'b', true)\n"),
    "text nested comment": sa.text("/* a /* b */ lock table item */ select 1"),
    "text comment first": sa.text("-- lock table item\nselect 1"),
    "text quoted name": sa.text('select 1 as "for update", 2 as "pg_advisory_xact_lock"'),
    "text name": sa.text("select 1 as for_update, 2 as lock"),
    "text name in parts": sa.text('select 1 as "for", 2 as update'),
    "cte named lock": sa.text("with lock as (select 1 as set) select * from lock"),
    "function named lock": sa.text("select lock(1)"),
    "function of a schema": sa.text("select public.lock(1)"),
    "function of mine": sa.select(sa.func.lock(1)),
    "function with the same name": sa.text("select mine.pg_advisory_xact_lock(1)"),
    "set_config read": sa.text("select current_setting('work_mem')"),
    "policy": sa.text("create policy p on item for update using (true)"),
    "view": sa.text("create view v as select * from item for update"),
    "function body": sa.text(
        "create function f() returns void language sql as $$ select pg_advisory_xact_lock(1); $$"
    ),
    "do": sa.text("do $$ begin perform pg_advisory_xact_lock(1); end $$"),
    "update of a text": sa.text("update item set note = 'for update'"),
    "insert of a text": sa.insert(Item).values(name="lock table item", note="set local"),
}


def assert_refused(call: Callable[[], Any], wire: Wire) -> TransactionRequired:
    with wire.record() as log, pytest.raises(TransactionRequired) as raised:
        call()
    assert verbs(log) == []
    assert log.connections_opened == 0
    assert "begin()" in str(raised.value)
    assert "fictive_outside=True" in str(raised.value)
    assert not db.session.in_transaction()
    assert db.engine.pool.checkedout() == 0
    return raised.value


@pytest.mark.usefixtures("items")
class TestGuards:
    @pytest.mark.parametrize("call", CONSTRUCTS.values(), ids=CONSTRUCTS.keys())
    def test_a11_a_construct_is_refused_outside(self, call: Callable[[], Any], wire: Wire, backends: Backends) -> None:
        held = db.session.get(Item, 6)  # refreshing it needs it in the identity map
        assert_refused(call, wire)
        assert held in db.session
        assert backends() == ["idle"]
        with wire.record() as log:
            assert db.session.scalar(sa.text("select 1")) == 1
        assert verbs(log) == ["SELECT"]

    def test_a11_nothing_is_refused_inside(self) -> None:
        texts = [run(sa.text(text.replace(":", "\\:"))) for text in TEXTS]
        for call in [*CONSTRUCTS.values(), *texts]:
            held = db.session.get(Item, 6)  # refreshing it needs it in the identity map
            # what PostgreSQL itself has to say of it is not the point here
            with contextlib.suppress(sa.exc.DBAPIError), db.session.begin():
                call()
            assert not db.session.in_transaction()
            del held

    @pytest.mark.parametrize("text", TEXTS)
    def test_a11_a_text_is_refused_outside(self, text: str, wire: Wire) -> None:
        assert_refused(run(sa.text(text.replace(":", "\\:"))), wire)

    @pytest.mark.parametrize("statement", FALSE_ALARMS.values(), ids=FALSE_ALARMS.keys())
    def test_a11_no_false_alarm(self, statement: Any, wire: Wire, look: Look) -> None:
        look("create function lock(int) returns int language sql as 'select $1'")
        look("create schema mine")
        look("create function mine.pg_advisory_xact_lock(int) returns int language sql as 'select $1'")
        with wire.record() as log:
            db.session.execute(statement)
        assert log.round_trips == 1
        assert own_verbs(log)[0] not in ("BEGIN", "COMMIT")
        assert db.engine.pool.checkedout() == 0

    @pytest.mark.parametrize(
        "call",
        [
            lambda **o: db.session.execute(locked, execution_options=o),
            lambda **o: db.session.execute(locked.execution_options(**o)),
            lambda **o: db.session.scalars(locked, execution_options=o).all(),
            lambda **o: db.session.scalar(locked, execution_options=o),
            lambda **o: Item.query.with_for_update().execution_options(**o).all(),
            lambda **o: db.session.get(Item, 1, with_for_update=True, execution_options=o),
            lambda **o: db.session.execute(sa.text("select * from item for update"), execution_options=o),
            lambda **o: db.session.execute(sa.text("select * from item for update").execution_options(**o)),
            lambda **o: db.session.execute(sa.select(xact_lock(1)), execution_options=o),
        ],
    )
    def test_a11_an_execution_option_lets_one_through(self, call: Callable[..., Any], wire: Wire) -> None:
        with wire.record() as log:
            call(fictive_outside=True)
        assert verbs(log) == ["SELECT"]
        assert db.engine.pool.checkedout() == 0
        # one statement and no other
        assert_refused(lambda: call(fictive_outside=False), wire)
        assert_refused(call, wire)

    def test_a11_a_job_taken_from_a_queue_in_one_statement(self, wire: Wire, look: Look) -> None:
        take = sa.update(Item).where(Item.id == one_id.scalar_subquery()).values(note="taken").returning(Item.id)
        with wire.record() as log:
            assert db.session.scalar(take, execution_options={"fictive_outside": True}) == 1
        assert verbs(log) == ["UPDATE"]
        assert look("select id from item where note = 'taken'") == [1]

    def test_a11_the_message_names_what_it_is(self, wire: Wire) -> None:
        assert "FOR UPDATE" in str(assert_refused(run(locked), wire))
        assert "LOCK TABLE" in str(assert_refused(run(sa.text("lock item")), wire))
        assert "SET LOCAL" in str(assert_refused(run(sa.text("set local x.y = 1")), wire))
        assert "set_config" in str(assert_refused(run(sa.func.set_config("x.y", "1", True)), wire))
        assert "pg_advisory_xact_lock" in str(assert_refused(run(xact_lock(1)), wire))
        assert isinstance(assert_refused(run(locked), wire), sa.exc.InvalidRequestError)

    @pytest.mark.parametrize(
        ("statement", "params", "local"),
        [
            (sa.text("select set_config('fictive.x', '1', :loc)"), {"loc": True}, True),
            (sa.text("select set_config('fictive.x', '1', :loc)"), {"loc": False}, False),
            (sa.text("select set_config(:a, :b, :loc)"), {"a": "fictive.x", "b": "1", "loc": True}, True),
            (sa.text("select set_config(:a, :b, :loc)"), {"a": "fictive.x", "b": "1", "loc": False}, False),
            (sa.text("select set_config('fictive.x', '1', :loc)").bindparams(loc=True), None, True),
            (sa.text("select set_config('fictive.x', '1', :loc)").bindparams(loc=False), None, False),
            (sa.text("select set_config('fictive.x', '1', cast(:loc as boolean))"), {"loc": True}, True),
            (sa.select(sa.func.set_config("fictive.x", "1", sa.bindparam("loc"))), {"loc": False}, False),
            (sa.select(sa.func.set_config("fictive.x", "1", False)), None, False),
            (sa.select(sa.func.set_config("fictive.x", "1", sa.false())), None, False),
            (sa.text("select set_config('fictive.x', '1', false)"), None, False),
            (sa.text("select set_config('fictive.x', lower('A'), false)"), None, False),
            (sa.text("select set_config('fictive.x', 'true', FALSE)"), None, False),
            (
                sa.text("select set_config('fictive.x', '1', false), set_config('fictive.y', '1', true)"),
                None,
                True,
            ),
            (
                sa.text("select set_config('fictive.x', '1', true), set_config('fictive.y', '1', false)"),
                None,
                True,
            ),
            (
                sa.select(
                    sa.func.set_config("fictive.x", "1", False), sa.func.set_config("fictive.y", "1", sa.true())
                ),
                None,
                True,
            ),
        ],
    )
    def test_a11_set_config_goes_by_its_last_argument_in_pinned(
        self, statement: Any, params: Any, local: bool, wire: Wire
    ) -> None:
        with db.pinned():
            db.session.scalar(sa.text("select 1"))
            if local:
                with wire.record() as log, pytest.raises(TransactionRequired):
                    db.session.execute(statement, params)
                assert verbs(log) == []
            else:
                db.session.execute(statement, params)
                assert db.session.scalar(sa.text("select current_setting('fictive.x', true)")) not in (None, "")

    @pytest.mark.parametrize(
        "text", ["select * from item for update", "lock table item", "set local work_mem = '1MB'"]
    )
    def test_a11_pinned_is_not_a_transaction(self, text: str, wire: Wire) -> None:
        with db.pinned():
            db.session.scalar(sa.text("select 1"))
            with wire.record() as log, pytest.raises(TransactionRequired):
                db.session.execute(sa.text(text))
            assert verbs(log) == []
            with db.session.begin():
                db.session.execute(sa.text(text))

    def test_a11_a_refused_statement_leaves_what_is_pending(self, look: Look) -> None:
        item = db.session.get(Item, 1)
        item.note = "changed"
        db.session.add(Item(name="pending"))
        for call in (
            run(locked),
            run(sa.text("lock table item")),
            lambda: db.session.refresh(item, with_for_update=True),
        ):
            with pytest.raises(TransactionRequired):
                call()
        db.session.commit()
        assert look("select note from item where id = 1") == ["changed"]
        assert look("select count(*) from item where name = 'pending'") == [1]

    def test_a11_fires_again_after_a_block(self, wire: Wire) -> None:
        for way_out in (db.session.commit, db.session.rollback, lambda: None):
            with db.session.begin():
                db.session.execute(locked)
                way_out()
            assert_refused(run(locked), wire)

    def test_a11_inside_it_does_lock(self, look: Look) -> None:
        with db.session.begin():
            db.session.execute(one_id)
            db.session.execute(sa.select(xact_lock(5)))
            assert look("select id from item where id in (1, 2) for update skip locked") == [2]
            assert look("select pg_try_advisory_xact_lock(5)") == [False]
        assert look("select pg_try_advisory_xact_lock(5)") == [True]


# -- A12 --------------------------------------------------------------------------------------------------------------

ids = sa.select(Item.id).order_by(Item.id)
STREAMS: dict[str, Callable[[], Any]] = {
    "execute yield_per": lambda: db.session.execute(sa.select(Item).order_by(Item.id).execution_options(yield_per=2)),
    "execute options": lambda: db.session.execute(ids, execution_options={"yield_per": 2}),
    "stream_results": lambda: db.session.execute(ids, execution_options={"stream_results": True, "max_row_buffer": 2}),
    "core": lambda: db.session.execute(
        sa.select(Item.__table__).order_by(Item.__table__.c.id), execution_options={"yield_per": 2}
    ),
    "text": lambda: db.session.execute(sa.text("select id from item order by id"), execution_options={"yield_per": 2}),
    "scalars": lambda: db.session.scalars(sa.select(Item).order_by(Item.id), execution_options={"yield_per": 2}),
    "scalars stream_results": lambda: db.session.scalars(
        sa.select(Item).order_by(Item.id).execution_options(stream_results=True, max_row_buffer=2)
    ),
    "from_statement": lambda: db.session.scalars(
        sa.select(Item).from_statement(sa.text("select * from item order by id")), execution_options={"yield_per": 2}
    ),
    "mappings": lambda: db.session.execute(ids, execution_options={"yield_per": 2}).mappings(),
    "query": lambda: Item.query.order_by(Item.id).yield_per(2)._iter(),
    "query of columns": lambda: db.session.query(Item.id).order_by(Item.id).yield_per(2)._iter(),
}


def ended(log: Any) -> bool:
    """Whether what was sent is one transaction, begun READ ONLY and ended."""
    sent = own_verbs(log)
    return "READ ONLY" in log.statements[0] and sent[0] == "BEGIN" and sent[-1] in ("COMMIT", "ROLLBACK")


def exhaust(result: Any) -> None:
    assert len(list(result)) == 6


def fail_half_way(result: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        for _ in result:
            _ = 1 / 0


def read_in_parts(result: Any) -> None:
    fetch = getattr(result, "fetchmany", None) or (lambda size: next(result.partitions(size), []))
    assert [len(part) for part in iter(lambda: fetch(2), [])] == [2, 2, 2]


def one_raises(result: Any) -> None:
    with pytest.raises(sa.exc.MultipleResultsFound):
        result.one()


ENDS: dict[str, Callable[[Any], Any]] = {
    "iterated": exhaust,
    "all": lambda result: result.all(),
    "fetchmany": read_in_parts,
    "first": lambda result: result.first(),
    "one raises": one_raises,
    "partitions": lambda result: [list(part) for part in result.partitions(2)],
    "closed": lambda result: (next(iter(result)), result.close()),
    "closed unread": lambda result: result.close(),
    "session closed": lambda result: (next(iter(result)), db.session.close()),
    "session removed": lambda result: (next(iter(result)), db.session.remove()),
    "session reset": lambda result: (next(iter(result)), db.session.reset()),
}


@pytest.mark.usefixtures("items")
class TestStreams:
    @pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS.keys())
    @pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
    def test_a12_ends_with_its_result(
        self, stream: Callable[[], Any], end: Callable[[Any], Any], wire: Wire, backends: Backends
    ) -> None:
        with wire.record() as log:
            result = stream()
            assert db.engine.pool.checkedout() == 1
            assert not db.session.in_transaction()
            end(result)
            assert db.engine.pool.checkedout() == 0  # while the result is still there
        assert ended(log)
        assert backends() == ["idle"]
        del result

    @pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS.keys())
    @pytest.mark.parametrize("read", [0, 1, 3])
    def test_a12_ends_when_dropped(self, stream: Callable[[], Any], read: int, wire: Wire, backends: Backends) -> None:
        with wire.record() as log:
            result = stream()
            rows = iter(result)
            for _ in range(read):
                next(rows)
            del result, rows
            gc.collect()
            assert db.engine.pool.checkedout() == 0
        assert ended(log)
        assert backends() == ["idle"]

    @pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS.keys())
    def test_a12_ends_when_the_loop_fails(self, stream: Callable[[], Any], wire: Wire, backends: Backends) -> None:
        with wire.record() as log:
            fail_half_way(stream())
            gc.collect()
            assert db.engine.pool.checkedout() == 0
        assert ended(log)
        assert backends() == ["idle"]
        assert db.session.scalar(sa.text("select 1")) == 1

    @pytest.mark.parametrize(
        "view",
        [
            lambda result: iter(result),
            lambda result: (row for row in result),
            lambda result: iter(result.partitions(1)),
            lambda result: iter(result.scalars()),
            lambda result: iter(result.scalars().partitions(1)),
            lambda result: iter(result.mappings()),
            lambda result: iter(result.mappings().partitions(1)),
            lambda result: iter(result.columns(0)),
            lambda result: iter(result.yield_per(1)),
        ],
    )
    @pytest.mark.parametrize("what", [ids, sa.select(Item).order_by(Item.id), sa.text("select id from item")])
    def test_a12_lives_as_long_as_anything_reads_from_it(self, view: Callable[[Any], Any], what: Any) -> None:
        rows = view(db.session.execute(what, execution_options={"yield_per": 1}))
        seen = 0
        for _ in rows:
            gc.collect()
            seen += 1
        assert seen == 6
        assert db.engine.pool.checkedout() == 0

    def test_a12_query_loop(self, wire: Wire) -> None:
        with wire.record() as log:
            assert [item.id for item in Item.query.order_by(Item.id).yield_per(2)] == [1, 2, 3, 4, 5, 6]
        assert ended(log)
        assert db.engine.pool.checkedout() == 0
        rows = iter(Item.query.yield_per(2))
        next(rows)
        assert db.engine.pool.checkedout() == 1
        del rows
        gc.collect()
        assert db.engine.pool.checkedout() == 0

    def test_a12_it_really_streams(self, wire: Wire, look: Look) -> None:
        with wire.record() as log:
            result = db.session.execute(
                sa.select(sa.func.generate_series(1, 100000)), execution_options={"yield_per": 10}
            )
            assert next(result.partitions()) is not None
            assert sum(each.rows for each in log.exchanges) <= 20
            result.close()

    def test_a12_an_empty_result(self, wire: Wire) -> None:
        with wire.record() as log:
            assert db.session.execute(ids.where(Item.id < 0), execution_options={"yield_per": 2}).all() == []
            assert list(Item.query.filter(Item.id < 0).yield_per(2)) == []
        assert "READ ONLY" in log.statements[0]
        assert db.engine.pool.checkedout() == 0

    @pytest.mark.parametrize(
        "call",
        [
            lambda **o: db.session.scalar(ids, execution_options=o),
            lambda **o: db.session.scalar(sa.select(Item).order_by(Item.id), execution_options=o).id,
            # get() makes rows unique, which SQLAlchemy does not combine with yield_per
            lambda **o: db.session.get(Item, 1, execution_options={**o, "yield_per": None}).id,
            lambda **o: db.session.scalars(ids, execution_options=o).first(),
            lambda **o: db.session.execute(ids, execution_options=o).scalar(),
            lambda **o: db.session.query(Item.id).order_by(Item.id).execution_options(**o).first()[0],
            lambda **o: db.first_or_404(sa.select(Item).order_by(Item.id).execution_options(**o)).id,
        ],
    )
    @pytest.mark.parametrize("options", [{"yield_per": 2}, {"stream_results": True}])
    def test_a12_never_the_drivers_complaint_of_a_named_cursor(
        self, call: Callable[..., Any], options: dict[str, Any], backends: Backends
    ) -> None:
        assert call(**options) == 1
        assert db.engine.pool.checkedout() == 0
        assert backends() == ["idle"]

    def test_a12_stream_results_as_an_option_of_the_engine(self, make_app: MakeApp) -> None:
        app = make_app(db, SQLALCHEMY_ENGINE_OPTIONS={"execution_options": {"stream_results": True}, **POOL_OF_ONE})
        with app.app_context():
            assert db.session.scalars(ids).all() == [1, 2, 3, 4, 5, 6]
            assert db.session.get(Item, 1).children != []
            db.session.execute(sa.update(Item).values(note="x"))
            db.session.add(Item(name="new"))
            db.session.commit()
            assert db.engine.pool.checkedout() == 0

    def test_a12_stream_results_as_an_option_of_another_bind(self) -> None:
        streaming = db.engine.execution_options(stream_results=True)
        result = db.session.execute(ids, bind_arguments={"bind": streaming})
        assert result.scalars().all() == [1, 2, 3, 4, 5, 6]
        assert db.engine.pool.checkedout() == 0

    def test_a12_an_error_of_the_server_half_way(self, wire: Wire, backends: Backends) -> None:
        with wire.record() as log:
            result = db.session.execute(
                sa.text("select 1 / (3 - g) from generate_series(1, 100) g"), execution_options={"yield_per": 1}
            )
            with pytest.raises(sa.exc.DBAPIError, match="division by zero"):
                list(result)
            assert db.engine.pool.checkedout() == 0
        assert own_verbs(log)[-1] == "ROLLBACK"
        assert backends() == ["idle"]
        assert db.session.scalar(sa.text("select 1")) == 1

    @pytest.mark.parametrize("text", ["select nothing from nowhere", "select from where", "select 1/0"])
    def test_a12_an_error_at_once(self, text: str, backends: Backends) -> None:
        with pytest.raises(sa.exc.DBAPIError):
            db.session.execute(sa.text(text), execution_options={"yield_per": 2}).all()
        assert db.engine.pool.checkedout() == 0
        assert backends() == ["idle"]

    def test_a12_a_connection_lost_half_way(self, look: Look) -> None:
        result = db.session.execute(
            sa.text("select g from generate_series(1, 1000) g"), execution_options={"yield_per": 1}
        )
        next(iter(result))
        kill_others(look)
        with pytest.raises(sa.exc.DBAPIError):
            list(result)
        assert db.engine.pool.checkedout() == 0
        assert db.session.scalar(sa.text("select 1")) == 1

    def test_a12_a_connection_lost_and_the_result_dropped(self, look: Look) -> None:
        result = db.session.execute(ids, execution_options={"yield_per": 1})
        next(iter(result))
        kill_others(look)
        del result
        gc.collect()
        assert db.engine.pool.checkedout() == 0
        assert db.session.scalar(sa.text("select 1")) == 1

    def test_a12_work_between_the_rows(self, wire: Wire, look: Look) -> None:
        for item in db.session.scalars(sa.select(Item).order_by(Item.id), execution_options={"yield_per": 2}):
            assert len(item.children) == 1
            if item.id == 2:
                db.session.execute(sa.update(Item).where(Item.id == 2).values(note="bare"))
            if item.id == 3:
                with db.session.begin():
                    item.note = "block"
            if item.id == 4:
                item.note = "commit"
                db.session.commit()
            if item.id == 5:
                db.session.rollback()
        assert look("select note from item where note is not null order by id") == ["bare", "block", "commit"]
        assert db.engine.pool.checkedout() == 0

    def test_a12_two_streams_at_once(self, backends: Backends) -> None:
        one = db.session.execute(ids, execution_options={"yield_per": 1})
        two = db.session.execute(ids, execution_options={"yield_per": 1})
        assert [(a.id, b.id) for a, b in zip(one, two, strict=True)] == [(n, n) for n in range(1, 7)]
        one.close()
        two.close()
        assert db.engine.pool.checkedout() == 0
        assert set(backends()) == {"idle"}

    @pytest.mark.parametrize("load", [sa_orm.selectinload, sa_orm.immediateload])
    def test_a12_eager_loads_need_no_second_connection(self, load: Any, make_app: MakeApp) -> None:
        app = make_app(db, SQLALCHEMY_ENGINE_OPTIONS=POOL_OF_ONE)
        with app.app_context():
            found = db.session.scalars(
                sa.select(Item).options(load(Item.children)), execution_options={"yield_per": 2}
            )
            assert [len(item.children) for item in found] == [1] * 6
            gc.collect()
            assert db.engine.pool.checkedout() == 0

    def test_a12_partitions_of_a_result_that_is_not_streamed(self, wire: Wire) -> None:
        with wire.record() as log:
            result = db.session.scalars(ids)
            assert db.engine.pool.checkedout() == 0
            assert [list(part) for part in result.partitions(4)] == [[1, 2, 3, 4], [5, 6]]
        assert verbs(log) == ["SELECT"]

    def test_a12_a_function_that_writes_is_not_lost_silently(self, look: Look) -> None:
        look(
            "create function note_down(i int) returns int language plpgsql as $$ begin"
            " insert into tag (label) values ('noted ' || i); return i; end $$"
        )
        # either it writes, or it says that it cannot; reporting success and keeping nothing is neither
        with contextlib.suppress(sa.exc.DBAPIError):
            rows = db.session.execute(sa.select(sa.func.note_down(Item.id)), execution_options={"yield_per": 2}).all()
            assert len(rows) == 6
            assert look("select count(*) from tag") == [6]
        assert db.engine.pool.checkedout() == 0

    def test_a12_a_write_is_refused_by_the_read_only_transaction(self, look: Look) -> None:
        look(
            "create function note_down(i int) returns int language plpgsql as $$ begin"
            " insert into tag (label) values ('noted ' || i); return i; end $$"
        )
        with pytest.raises(sa.exc.DBAPIError, match="read-only transaction"):
            db.session.execute(
                sa.select(sa.func.note_down(Item.id)), execution_options={"yield_per": 2, "fictive_writes": False}
            ).all()
        assert look("select count(*) from tag") == [0]

    def test_a12_inside_a_block_it_is_the_blocks_transaction(self, wire: Wire, look: Look) -> None:
        with wire.record() as log, db.session.begin():
            db.session.add(Item(name="z"))
            db.session.flush()
            rows = db.session.scalars(sa.select(Item), execution_options={"yield_per": 2})
            assert len(rows.all()) == 7
            assert db.session.in_transaction()
            assert db.engine.pool.checkedout() == 1
            for item in Item.query.yield_per(2):
                item.note = "seen"
        assert verbs(log).count("BEGIN") == 1
        assert verbs(log)[-1] == "COMMIT"
        assert "READ ONLY" not in log.statements[0]
        assert look("select count(*) from item where note = 'seen'") == [7]

    @pytest.mark.parametrize("error", [None, ZeroDivisionError])
    def test_a12_inside_a_block_left_half_read(self, error: type[Exception] | None, look: Look) -> None:
        with contextlib.suppress(ZeroDivisionError), db.session.begin():
            db.session.add(Item(name="z"))
            db.session.flush()
            rows = db.session.execute(ids, execution_options={"yield_per": 1})
            assert rows.fetchone() == (1,)
            if error:
                raise error
        rows.close()
        assert look("select count(*) from item where name = 'z'") == [0 if error else 1]
        assert db.engine.pool.checkedout() == 0

    def test_a12_a_stream_from_outside_is_not_ended_by_a_block(self, look: Look) -> None:
        rows = db.session.execute(ids, execution_options={"yield_per": 1})
        first = rows.fetchone()
        with db.session.begin():
            db.session.execute(sa.update(Item).values(note="x"))
        db.session.commit()
        db.session.rollback()
        assert first == (1,)
        assert rows.scalars().all() == [2, 3, 4, 5, 6]
        assert look("select count(*) from item where note = 'x'") == [6]

    def test_a12_read_to_the_end_on_a_pool_of_one(self, make_app: MakeApp, wire: Wire) -> None:
        app = make_app(db, SQLALCHEMY_ENGINE_OPTIONS=POOL_OF_ONE)
        with app.app_context():
            for _ in range(5):
                assert len(db.session.execute(ids, execution_options={"yield_per": 2}).all()) == 6
                db.session.execute(ids, execution_options={"yield_per": 2}).first()
            with wire.record() as log:
                db.session.execute(sa.update(Item).values(note="x"))
                with db.session.begin():
                    db.session.execute(sa.update(Item).values(note="y"))
            assert own_verbs(log) == ["UPDATE", "BEGIN", "UPDATE", "COMMIT"]
            assert "READ ONLY" not in " ".join(log.statements)

    def test_a12_the_end_of_the_context_ends_it(self, make_app: MakeApp, backends: Backends) -> None:
        app = make_app(db, SQLALCHEMY_ENGINE_OPTIONS=POOL_OF_ONE)
        with app.app_context():
            rows = db.session.execute(ids, execution_options={"yield_per": 1})
            next(iter(rows))
        with app.app_context():
            assert db.engine.pool.checkedout() == 0
            assert db.session.scalar(sa.text("select 1")) == 1
        with pytest.raises(sa.exc.SQLAlchemyError):
            rows.all()

    def test_a12_pinned_streams_within_begin(self, wire: Wire) -> None:
        with db.pinned():
            db.session.execute(sa.text("create temporary table t as select generate_series(1, 5) as n"))
            with db.session.begin():
                rows = db.session.execute(sa.text("select n from t"), execution_options={"yield_per": 2})
                assert len(rows.all()) == 5
            with wire.record() as log, pytest.raises(TransactionRequired, match="begin"):
                db.session.execute(sa.text("select n from t"), execution_options={"yield_per": 2})
            assert verbs(log) == []


# -- A13 --------------------------------------------------------------------------------------------------------------


def backend_pid() -> int:
    return int(db.session.scalar(sa.text("select pg_backend_pid()")))


LEAVE: dict[str, BaseException | None] = {
    "ok": None,
    "error": ZeroDivisionError(),
    "interrupt": KeyboardInterrupt(),
    "exit": GeneratorExit(),
}


@pytest.mark.usefixtures("items")
class TestPinned:
    @pytest.mark.parametrize("leave", LEAVE.values(), ids=LEAVE.keys())
    def test_a13_what_was_set_is_gone_afterwards(
        self, leave: BaseException | None, wire: Wire, look: Look, backends: Backends
    ) -> None:
        before = db.session.scalar(sa.text("show work_mem"))
        with pytest.raises(type(leave)) if leave else contextlib.nullcontext() as raised:
            with db.pinned() as session:
                with wire.record() as log:
                    db.session.execute(sa.text("create temporary table t (n int)"))
                    db.session.execute(sa.text("set work_mem = '3MB'"))
                    db.session.execute(sa.text("set search_path = pg_catalog"))
                    db.session.scalar(sa.select(sa.func.set_config("fictive.x", "mine", False)))
                    db.session.scalar(sa.select(sa.func.pg_advisory_lock(42)))
                    db.session.execute(sa.text("listen a_channel"))
                    db.session.execute(sa.text("insert into t values (1)"))
                    assert session.scalar(sa.text("select n from t")) == 1
                    assert session.scalar(sa.text("show work_mem")) == "3MB"
                assert log.round_trips == 9
                assert not {"BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT"} & set(verbs(log))
                assert not db.session.in_transaction()
                assert backends() == ["idle"]
                assert look(f"{ADVISORY_LOCKS} and objid = 42") == [1]
                if leave:
                    raise leave
        if leave:
            assert raised.value is leave
        assert db.engine.pool.checkedout() == 0
        assert db.session.scalar(sa.text("show work_mem")) == before
        assert db.session.scalar(sa.text("select to_regclass('pg_temp.t')")) is None
        assert db.session.scalar(sa.text("select current_setting('fictive.x', true)")) in (None, "")
        assert db.session.scalar(sa.text("select count(*) from item")) == 6  # the search path

    def test_a13_one_connection_for_everything(self, wire: Wire, look: Look) -> None:
        with db.pinned():
            pids = [backend_pid() for _ in range(3)]
            with wire.record() as log, db.session.begin():
                pids.append(backend_pid())
                db.session.add(Item(name="in the block"))
                with db.session.begin_nested():
                    pids.append(backend_pid())
            assert own_verbs(log) == ["BEGIN", "SELECT", "INSERT", "SAVEPOINT", "SELECT", "RELEASE", "COMMIT"]
            db.session.add(Item(name="flushed"))
            with wire.record() as log:
                db.session.flush()
            assert own_verbs(log) == ["BEGIN", "INSERT", "COMMIT"]
            assert db.session.get(Item, 1).children != []
            with wire.record() as log:
                pids.append(backend_pid())
            assert own_verbs(log) == ["SELECT"]
            assert db.engine.pool.checkedout() == 1
        assert len(set(pids)) == 1
        assert look("select count(*) from item where name in ('in the block', 'flushed')") == [2]

    def test_a13_a_flush_sees_the_temporary_table_and_the_role(self) -> None:
        with db.pinned():
            db.session.execute(sa.text("create temporary table item as select * from item with no data"))
            db.session.execute(sa.text("alter table pg_temp.item alter id set default 1"))
            db.session.add(Item(name="shadow"))
            db.session.commit()
            assert db.session.scalar(sa.text("select name from pg_temp.item")) == "shadow"
            assert db.session.scalar(sa.text("select count(*) from public.item")) == 6
            db.session.expunge_all()

    @pytest.mark.parametrize("error", [None, ZeroDivisionError])
    def test_a13_a_block_in_it_is_a_real_transaction(self, error: type[Exception] | None, look: Look) -> None:
        with db.pinned():
            db.session.execute(sa.text("select 1"))
            with contextlib.suppress(ZeroDivisionError), db.session.begin():
                db.session.execute(sa.text("insert into tag (label) values ('a')"))
                assert look("select count(*) from tag") == [0]
                if error:
                    raise error
            assert look("select count(*) from tag") == [0 if error else 1]
            db.session.execute(sa.text("insert into tag (label) values ('b')"))
            assert look("select count(*) from tag where label = 'b'") == [1]

    def test_a13_nested_it_changes_nothing(self, look: Look) -> None:
        with db.pinned():
            outer = backend_pid()
            db.session.execute(sa.text("set work_mem = '3MB'"))
            with pytest.raises(ZeroDivisionError), db.pinned():
                assert backend_pid() == outer
                db.session.execute(sa.text("create temporary table t (n int)"))
                _ = 1 / 0
            assert backend_pid() == outer
            assert db.session.scalar(sa.text("show work_mem")) == "3MB"
            assert db.session.scalar(sa.text("select count(*) from t")) == 0
        assert db.engine.pool.checkedout() == 0

    def test_a13_an_error_of_a_statement_leaves_it_usable(self) -> None:
        with db.pinned():
            pid = backend_pid()
            for text in ("select 1/0", "select from where"):
                with pytest.raises(sa.exc.DBAPIError):
                    db.session.execute(sa.text(text))
            db.session.add(Item(name="n1"))
            with pytest.raises(sa.exc.IntegrityError):
                db.session.flush()
            assert backend_pid() == pid
        assert db.engine.pool.checkedout() == 0

    def test_a13_a_lost_connection_is_not_replaced_silently(self, look: Look) -> None:
        with db.pinned():
            db.session.execute(sa.text("set work_mem = '3MB'"))
            kill_others(look)
            with pytest.raises(sa.exc.DBAPIError):
                db.session.execute(sa.text("show work_mem"))
            for again in (
                lambda: db.session.execute(sa.text("show work_mem")),
                lambda: db.session.get(Item, 1),
                lambda: (db.session.add(Item(name="z")), db.session.flush()),
            ):
                with pytest.raises(PinnedConnectionLost):
                    again()
            db.session.expunge_all()
        assert db.engine.pool.checkedout() == 0
        assert db.session.scalar(sa.text("select 1")) == 1

    def test_a13_a_connection_lost_in_a_block_in_it(self, look: Look) -> None:
        with db.pinned():
            with pytest.raises(sa.exc.DBAPIError), db.session.begin():
                db.session.execute(sa.text("insert into tag (label) values ('a')"))
                kill_others(look)
                db.session.execute(sa.text("select 1"))
            assert not db.session.in_transaction()
            with pytest.raises(PinnedConnectionLost), db.session.begin():
                db.session.execute(sa.text("select 1"))
        assert db.engine.pool.checkedout() == 0
        assert look("select count(*) from tag") == [0]
        with db.session.begin():
            assert db.session.scalar(sa.text("select 1")) == 1

    def test_a13_the_bodys_error_comes_out_when_the_connection_is_lost(self, look: Look) -> None:
        error = ValueError("mine")
        with pytest.raises(ValueError, match="mine") as raised, db.pinned():
            db.session.execute(sa.text("select 1"))
            kill_others(look)
            raise error
        assert raised.value is error
        assert db.session.scalar(sa.text("select 1")) == 1

    def test_a13_a_transaction_never_ended_is_rolled_back_with_it(self, wire: Wire, look: Look) -> None:
        with db.pinned():
            db.session.begin()
            db.session.execute(sa.text("insert into tag (label) values ('a')"))
        assert not db.session.in_transaction()
        assert db.engine.pool.checkedout() == 0
        assert look("select count(*) from tag") == [0]

    def test_a13_without_a_statement_it_costs_nothing(self, wire: Wire) -> None:
        with wire.record() as log, db.pinned():
            pass
        assert (verbs(log), log.connections_opened) == ([], 0)

    def test_a13_not_within_a_transaction(self) -> None:
        with db.session.begin():
            with pytest.raises(TransactionAlreadyBegun, match="pinned"), db.pinned():
                pytest.fail("entered")
            db.session.execute(sa.text("select 1"))

    def test_a13_the_connection_goes_back_when_the_session_is_removed_in_it(self, wire: Wire) -> None:
        for end in (db.session.remove, db.session.close):
            with db.pinned():
                db.session.execute(sa.text("set work_mem = '3MB'"))
                end()
            assert db.engine.pool.checkedout() == 0
            assert db.session.scalar(sa.text("show work_mem")) != "3MB"

    def test_a13_other_sessions_do_not_get_the_connection(self, app: Flask) -> None:
        with db.pinned():
            pid = backend_pid()
            with app.app_context():
                assert backend_pid() != pid
            found: list[int] = []

            def elsewhere() -> None:
                with app.app_context():
                    found.append(backend_pid())

            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            assert found != [pid]
            assert backend_pid() == pid

    @pytest.mark.parametrize(
        "text",
        [
            "set work_mem = '3MB'",
            "SET SESSION work_mem = '3MB'",
            "create temp table t (n int)",
            "create temporary table t as select 1",
            "create local temporary table t (n int)",
            "create temp view t as select 1",
            "create temporary sequence t",
            "select 1 as a into temporary table t",
            "select 1 as a into temp t",
            "select pg_advisory_lock(42)",
            "select pg_try_advisory_lock_shared(42)",
            'select "pg_advisory_lock"(42)',
            "select set_config('work_mem', '3MB', false)",
            "listen a_channel",
            "prepare p as select 1",
            "select 1; set work_mem = '3MB'",
        ],
    )
    def test_a13_outside_it_nothing_stays_with_a_pooled_connection(self, text: str, wire: Wire, look: Look) -> None:
        with wire.record() as log, pytest.raises(TransactionRequired, match="pinned"):
            db.session.execute(sa.text(text))
        assert verbs(log) == []

    def test_a13_the_pool_is_full_afterwards(self, make_app: MakeApp, backends: Backends) -> None:
        app = make_app(db, SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 2, "max_overflow": 0, "pool_timeout": 1})
        with app.app_context():
            for _ in range(5):
                with db.pinned():
                    db.session.execute(sa.text("set work_mem = '3MB'"))
            connections = [db.engine.connect() for _ in range(2)]
            for connection in connections:
                assert connection.scalar(sa.text("show work_mem")) != "3MB"
                connection.close()
            assert db.engine.pool.checkedout() == 0

    def test_a13_session_connection_is_the_pinned_one(self) -> None:
        with db.pinned():
            pid = backend_pid()
            assert db.session.connection().scalar(sa.text("select pg_backend_pid()")) == pid
            assert backend_pid() == pid
        assert db.engine.pool.checkedout() == 0

    def test_a13_lock_held_over_several_transactions(self, look: Look) -> None:
        with db.pinned():
            db.session.execute(sa.select(sa.func.pg_advisory_lock(7)))
            for error in (None, ZeroDivisionError, None):
                with contextlib.suppress(ZeroDivisionError), db.session.begin():
                    db.session.execute(sa.text("insert into tag (label) values (gen_random_uuid()\\:\\:text)"))
                    if error:
                        raise error
                assert look("select pg_try_advisory_lock(7)") == [False]
        assert look("select count(*) from tag") == [2]

    @pytest.mark.parametrize("leave", [None, ZeroDivisionError])
    def test_a13_a_lock_is_free_when_the_block_has_been_left(self, leave: type[Exception] | None, look: Look) -> None:
        for _ in range(20):
            with contextlib.suppress(ZeroDivisionError), db.pinned():
                assert db.session.scalar(sa.select(sa.func.pg_try_advisory_lock(7)))
                if leave:
                    raise leave
            assert look(ADVISORY_LOCKS) == [0]


# -- A14 --------------------------------------------------------------------------------------------------------------


def add() -> None:
    db.session.add(Item(name=f"never written {uuid.uuid4()}"))


def change() -> None:
    db.session.get(Item, 1).note = "never written"


def delete() -> None:
    db.session.delete(db.session.get(Item, 2))


def add_to_collection() -> None:
    item = db.session.get(Item, 3)
    item.tags.append(Tag(label="never written"))


def delete_orphan() -> None:
    item = db.session.get(Item, 4)
    item.children.clear()


def leave_block_open() -> None:
    db.session.begin()
    db.session.add(Item(name="never written"))


UNSAVED: dict[str, tuple[Callable[[], None], str]] = {
    "new": (add, r"Item.*new"),
    "dirty": (change, r"Item 1.*note"),
    "deleted": (delete, r"Item 2.*deleted"),
    "collection": (add_to_collection, r"Tag.*new"),
    "orphan": (delete_orphan, r"Item 4.*children"),
    "in a block left open": (leave_block_open, r"Item.*new"),
}


def change_back() -> None:
    item = db.session.get(Item, 1)
    old = item.note
    item.note = "other"
    item.note = old


def set_the_same() -> None:
    item = db.session.get(Item, 1)
    item.name = "n1"


def committed() -> None:
    add()
    item = db.session.get(Item, 1)
    item.note = str(uuid.uuid4())
    db.session.delete(db.session.scalars(sa.select(Item).where(Item.id > 1)).first())
    db.session.commit()
    assert item.note


def flushed() -> None:
    add()
    db.session.flush()


def rolled_back() -> None:
    add()
    change()
    delete()
    db.session.rollback()


def in_a_block() -> None:
    with db.session.begin():
        add()
        change()


def expunged() -> None:
    item = Item(name="x")
    db.session.add(item)
    db.session.expunge(item)
    change()
    db.session.expire_all()


def by_statement() -> None:
    db.session.execute(sa.update(Item).values(note="x"))
    db.session.get(Item, 1)


def appended_and_removed() -> None:
    item = db.session.get(Item, 1)
    child = Child(size=1)
    item.children.append(child)
    item.children.remove(child)


NOTHING_UNSAVED: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "read": lambda: db.session.scalars(sa.select(Item)).all(),
    "changed back": change_back,
    "set to the same": set_the_same,
    "committed": committed,
    "flushed": flushed,
    "rolled back": rolled_back,
    "in a block": in_a_block,
    "expunged": expunged,
    "by statement": by_statement,
    "appended and removed": appended_and_removed,
    "removed": lambda: (add(), db.session.remove()),
    "never added": lambda: Item(name="x"),
}


@pytest.mark.usefixtures("rows")
class TestUnsaved:
    @pytest.fixture(params=["context", "request", "cli"])
    def unit(self, request: pytest.FixtureRequest, make_app: MakeApp) -> Callable[..., Any]:
        """`unit(work, **config)` runs `work` in an app context, a request or a command of a fresh app."""

        def run_unit(work: Callable[[], None], **config: Any) -> Flask:
            app = make_app(db, TESTING=True, **config)
            if request.param == "context":
                with app.app_context():
                    work()
            elif request.param == "request":

                @app.get("/")
                def view() -> str:
                    work()
                    return "ok"

                assert app.test_client().get("/").text == "ok"
            else:

                @app.cli.command("work")
                def command() -> None:
                    work()

                result = app.test_cli_runner().invoke(args=["work"], catch_exceptions=False)
                assert result.exit_code == 0
            return app

        return run_unit

    @pytest.mark.parametrize(("work", "names"), UNSAVED.values(), ids=UNSAVED.keys())
    def test_a14_warns_by_default_and_names_the_objects(
        self, unit: Callable[..., Any], work: Callable[[], None], names: str, look: Look, backends: Backends
    ) -> None:
        with pytest.warns(UnsavedChangesWarning, match=names) as caught:
            app = unit(work)
        assert len([each for each in caught if issubclass(each.category, UnsavedChangesWarning)]) == 1
        assert "idle in transaction" not in backends()
        assert look("select count(*) from item where note is null") == [6]
        with app.app_context():
            assert not db.session.new
            assert db.session.get(Item, 1).note is None
            assert db.engine.pool.checkedout() == 0
            assert not db.session.in_transaction()

    @pytest.mark.parametrize(("work", "names"), UNSAVED.values(), ids=UNSAVED.keys())
    def test_a14_can_be_an_error_and_the_session_is_closed_all_the_same(
        self, unit: Callable[..., Any], work: Callable[[], None], names: str, make_app: MakeApp, backends: Backends
    ) -> None:
        with pytest.raises(UnsavedChangesError, match=names) as raised:
            unit(work, FICTIVE_UNSAVED_CHANGES="error")
        assert isinstance(raised.value, sa.exc.InvalidRequestError)
        assert "idle in transaction" not in backends()
        with make_app(db).app_context():
            assert not db.session.new
            assert not db.session.in_transaction()

    @pytest.mark.parametrize(("work", "names"), UNSAVED.values(), ids=UNSAVED.keys())
    def test_a14_can_be_silent(self, unit: Callable[..., Any], work: Callable[[], None], names: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            unit(work, FICTIVE_UNSAVED_CHANGES="ignore")

    @pytest.mark.parametrize("work", NOTHING_UNSAVED.values(), ids=NOTHING_UNSAVED.keys())
    def test_a14_not_for_what_was_written_or_did_not_change(
        self, unit: Callable[..., Any], work: Callable[[], None]
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            unit(work, FICTIVE_UNSAVED_CHANGES="warn")
            unit(work, FICTIVE_UNSAVED_CHANGES="error")

    @pytest.mark.parametrize("setting", ["warn", "error"])
    def test_a14_not_after_an_exception(self, unit: Callable[..., Any], setting: str, backends: Backends) -> None:
        def work() -> None:
            add()
            change()
            raise ZeroDivisionError

        with warnings.catch_warnings(), pytest.raises(ZeroDivisionError):
            warnings.simplefilter("error")
            unit(work, FICTIVE_UNSAVED_CHANGES=setting)
        assert set(backends()) <= {"idle"}

    def test_a14_many_objects_are_counted(self, unit: Callable[..., Any]) -> None:
        with pytest.warns(UnsavedChangesWarning, match=r"and 90 more"):
            unit(lambda: db.session.add_all([Item(name=str(n)) for n in range(100)]))

    def test_a14_looking_sends_nothing(self, make_app: MakeApp, wire: Wire) -> None:
        app = make_app(db)
        context = app.app_context()
        context.push()
        item = db.session.get(Item, 1)
        other = db.session.get(Item, 2)
        db.session.expire(item)
        item.note = "changed without loading"
        db.session.delete(other)
        db.session.expire(other)
        with wire.record() as log, pytest.warns(UnsavedChangesWarning) as caught:
            context.pop()
        assert verbs(log) == []
        assert "Item 1" in str(caught[0].message)
        assert "Item 2" in str(caught[0].message)

    def test_a14_a_model_whose_repr_fails(self, unit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Item, "__repr__", lambda self: 1 / 0)
        with pytest.warns(UnsavedChangesWarning, match="Item"):
            unit(add)

    def test_a14_objects_taken_back_by_a_failed_flush_are_not_forgotten(self, unit: Callable[..., Any]) -> None:
        """The error was swallowed; what is still changed is named, what SQLAlchemy has dropped cannot be."""

        def work() -> None:
            change()
            with pytest.raises(sa.exc.DBAPIError):
                db.session.execute(sa.text("select 1/0"))

        with pytest.warns(UnsavedChangesWarning, match="Item 1"):
            unit(work)


class TestUnsavedWithoutFlask:
    @pytest.fixture
    def engine(self, wire: Wire, database_url: str, look: Look) -> Iterator[sa.Engine]:
        look("insert into item (name) select 'n' || g from generate_series(1, 3) g")
        engine = sa.create_engine(wire.url(database_url))
        yield engine
        assert engine.pool.checkedout() == 0
        engine.dispose()

    def test_a14_a_with_block_of_a_session_warns(self, engine: sa.Engine, look: Look) -> None:
        session = OptInSession(engine)
        session.add(Item(name="new"))
        session.get(Item, 1).note = "x"
        session.delete(session.get(Item, 2))
        with pytest.warns(
            UnsavedChangesWarning, match=r"Item \(new, added at .*\).*Item 2 \(deleted\).*Item 1 \(changed: note\)"
        ):
            with session:
                pass
        assert not session.new
        assert look("select count(*), count(note) from item") == [(3, 0)]

    def test_a14_raises_and_closes(self, engine: sa.Engine) -> None:
        with pytest.raises(UnsavedChangesError, match="Item"):
            with OptInSession(engine, unsaved_changes="error") as session:
                session.add(Item(name="new"))
        assert not session.new
        assert session.scalar(sa.text("select 1")) == 1

    def test_a14_raises_and_closes_with_a_transaction_open(self, engine: sa.Engine, look: Look) -> None:
        with pytest.raises(UnsavedChangesError, match="Item"):
            with OptInSession(engine, unsaved_changes="error") as session:
                session.begin()
                session.execute(sa.text("insert into tag (label) values ('x')"))
                session.add(Item(name="new"))
        assert not session.in_transaction()
        assert engine.pool.checkedout() == 0
        assert look("select count(*) from tag") == [0]

    @pytest.mark.filterwarnings("error")
    def test_a14_silent_where_nothing_is_left(self, engine: sa.Engine) -> None:
        with OptInSession(engine, unsaved_changes="ignore") as session:
            session.add(Item(name="new"))
        with OptInSession(engine, unsaved_changes="error") as session:
            session.add(Item(name="committed"))
            session.commit()
            session.get(Item, 1).name = "n1"
        with pytest.raises(ZeroDivisionError), OptInSession(engine, unsaved_changes="error") as session:
            session.add(Item(name="new"))
            _ = 1 / 0
        session = OptInSession(engine, unsaved_changes="error")
        session.add(Item(name="new"))
        session.close()

    def test_a14_the_childs_change_is_named(self, engine: sa.Engine) -> None:
        session = OptInSession(engine)
        item = session.get(Item, 1)
        item.children.append(Child(size=1))
        with pytest.warns(UnsavedChangesWarning, match="Child"), session:
            pass

    @pytest.mark.filterwarnings("error")
    def test_a14_the_warning_as_an_error_closes_all_the_same(self, engine: sa.Engine) -> None:
        with pytest.raises(UnsavedChangesWarning):
            with OptInSession(engine) as session:
                session.add(Item(name="new"))
        assert not session.new
