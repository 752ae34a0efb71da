"""What is reported of a request (rules J1, J3): as many round trips as on the wire, the right lines, every output."""

from __future__ import annotations

import contextlib
import cProfile
import itertools
import json
import logging
import pstats
import threading
from collections.abc import Callable
from typing import Any

import flask
import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy.orm import selectinload

from fictive.config import Settings
from fictive.errors import ConfigurationError, TransactionAborted
from fictive.report.collector import MOST_EVENTS, Collector
from fictive.report.lines import is_library, register_application
from fictive.report.relationships import relationships_of
from fictive.report.report import Report
from fictive.report.requests import reports_of
from fictive.report.server_timing import server_timing
from fictive.report.signals import request_reported, transaction_ended
from fictive.report.watching import watching
from fictive.sqlalchemy import insert_many
from fictive.testing.wire import Wire
from tests.conftest import MakeApp
from tests.models import opt_in
from tests.test_j_outputs import UNPREPARED

db, Item, Child = opt_in.db, opt_in.Item, opt_in.Child
numbers = itertools.count()


def no_statement() -> None:
    pass


def one_select() -> None:
    db.session.execute(sa.select(Item)).all()


def five_gets() -> None:
    for n in range(1, 6):
        db.session.get(Item, n)


def insert_in_a_block() -> None:
    with db.session.begin():
        db.session.add(Item(name=f"new {next(numbers)}"))


def select_and_update_in_a_block() -> None:
    with db.session.begin():
        item = db.session.get(Item, 1)
        item.note = "changed"


def savepoint() -> None:
    with db.session.begin():
        with db.session.begin_nested():
            db.session.add(Item(name=f"new {next(numbers)}"))


def savepoint_rolled_back() -> None:
    with db.session.begin():
        db.session.get(Item, 1)
        nested = db.session.begin_nested()
        db.session.execute(sa.text("select 1"))
        nested.rollback()


def an_error_in_a_block() -> None:
    with pytest.raises(sa.exc.ProgrammingError), db.session.begin():
        db.session.execute(sa.text("select * from nowhere"))


def many_rows() -> None:
    insert_many(db.session, Item, ({"name": f"new {next(numbers)}"} for _ in range(6000)))


def a_stream() -> None:
    for _ in db.session.execute(sa.select(Item).execution_options(yield_per=2)):
        pass


def pinned() -> None:
    with db.pinned():
        db.session.execute(sa.text("select 1"))
        db.session.execute(sa.text("select 2"))


def rolled_back() -> None:
    with pytest.raises(ZeroDivisionError), db.session.begin():
        db.session.get(Item, 1)
        raise ZeroDivisionError


def add_and_commit() -> None:
    db.session.add(Item(name=f"new {next(numbers)}"))
    db.session.commit()


def lazy_loads() -> None:
    for item in db.session.scalars(sa.select(Item)):
        len(item.children)


def eager_loads() -> None:
    db.session.scalars(sa.select(Item).options(selectinload(Item.children))).all()


def options_and_level() -> None:
    with db.transaction(isolation_level="SERIALIZABLE", read_only=True):
        db.session.get(Item, 1)


def empty_block() -> None:
    with db.session.begin():
        pass


def an_error() -> None:
    with pytest.raises(sa.exc.ProgrammingError):
        db.session.execute(sa.text("select * from nowhere"))


def reads_within_a_stream() -> None:
    for (number,) in db.session.execute(sa.select(Item.id).execution_options(yield_per=2)):
        db.session.scalar(sa.select(Item.name).where(Item.id == number))


def an_advisory_lock() -> None:
    with db.advisory_lock("report"):
        one_select()


def a_transaction_that_a_text_ended() -> None:
    with pytest.raises(TransactionAborted), db.session.begin():
        db.session.execute(sa.text("select 1"))
        db.session.execute(sa.text("commit"))
        db.session.execute(sa.text("select 2"))


def rows_by_core() -> None:
    with db.engine.begin() as connection:
        connection.execute(sa.insert(Item), [{"name": f"new {next(numbers)}"} for _ in range(3)])


VIEWS = [
    no_statement, one_select, five_gets, insert_in_a_block, select_and_update_in_a_block, savepoint,
    savepoint_rolled_back, rolled_back, add_and_commit, lazy_loads, eager_loads, options_and_level, empty_block,
    an_error, an_error_in_a_block, many_rows, a_stream, pinned, reads_within_a_stream, an_advisory_lock,
    a_transaction_that_a_text_ended, rows_by_core,
]  # fmt: skip

Reported = Callable[..., Any]


@pytest.fixture
def watched(make_app: MakeApp) -> Callable[..., tuple[Flask, list[Any]]]:
    """`watched(view, **config)`: an app with that view at `/`, and the list of its reports."""

    def make(view: Callable[[], Any], **config: Any) -> tuple[Flask, list[Any]]:
        app = make_app(**{"FICTIVE_REPORT": True, **config})
        app.config["TESTING"] = True

        @app.get("/")
        def index() -> Any:
            answer = view()
            return "" if answer is None else answer

        with app.app_context():
            db.session.add_all([Item(id=n, name=f"item {n}", children=[Child(), Child()]) for n in range(1, 8)])
            db.session.flush()
            db.session.execute(sa.text("select setval('item_id_seq', 100)"))
            db.session.commit()
        found: list[Any] = []

        def note(app: Flask, report: Any) -> None:
            found.append(report)

        request_reported.connect(note, app, weak=False)
        return app, found

    return make


@pytest.mark.parametrize("mode", ["commit", "begin"])
@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_j1_counts_are_those_of_the_wire(
    view: Callable[[], None], mode: str, watched: Callable[..., Any], wire: Wire
) -> None:
    app, found = watched(view, FICTIVE_WRITES_OUTSIDE=mode)
    client = app.test_client()
    with wire.record() as log:
        assert client.get("/").status_code == 200
    (report,) = found
    assert report.round_trips == log.round_trips, [exchange.statements for exchange in log.exchanges]
    with wire.record() as log:  # now with what psycopg has prepared
        assert client.get("/").status_code == 200
    assert found[1].round_trips == log.round_trips, [exchange.statements for exchange in log.exchanges]
    assert not [each for each in report.transactions if each.ended is None]


def test_j1_hooks_are_told_by_their_kind(watched: Callable[..., Any]) -> None:
    def view() -> None:
        with db.session.begin():
            db.on_commit(lambda: None)
        with contextlib.suppress(ZeroDivisionError), db.session.begin():
            db.on_rollback(lambda: None)
            raise ZeroDivisionError

    app, found = watched(view)
    app.test_client().get("/")
    assert [hook[0] for hook in found[0].hooks] == ["commit", "rollback"]


def test_j1_a_statement_is_known_by_its_line(watched: Callable[..., Any]) -> None:
    def view() -> None:
        db.session.execute(sa.select(Item).where(Item.id == 3)).all()
        one_select()

    app, found = watched(view)
    app.test_client().get("/")
    (report,) = found
    first, second = report.statements
    assert str(first.line).startswith("tests/test_j_report.py:") or "test_j_report.py:" in str(first.line)
    assert (first.line.number, first.line.function) == (view.__code__.co_firstlineno + 1, "view")
    assert (second.line.number, second.line.function) == (one_select.__code__.co_firstlineno + 1, "one_select")
    assert (first.rows, second.rows) == (1, 7)
    assert first.kind == "read"
    assert report.rows == 8


def test_j1_a_statement_of_a_template_is_known_by_the_template_s_line(
    watched: Callable[..., Any], tmp_path: Any
) -> None:
    (tmp_path / "items.html").write_text("{% for item in items %}\n\n{{ item.children|length }}\n{% endfor %}")

    def view() -> str:
        return flask.render_template("items.html", items=db.session.scalars(sa.select(Item)).all())

    app, found = watched(view)
    app.template_folder = str(tmp_path)
    app.jinja_loader = None
    import jinja2

    app.jinja_env.loader = jinja2.FileSystemLoader(tmp_path)
    app.test_client().get("/")
    (report,) = found
    (finding,) = report.findings
    assert (finding.kind, finding.count) == ("n+1", 7)
    assert "items.html:3" in str(finding)


def test_j1_repeated_statements_are_found(watched: Callable[..., Any]) -> None:
    def view() -> None:
        lazy_loads()
        for _ in range(4):
            db.session.execute(sa.select(Item.name)).all()

    app, found = watched(view)
    app.test_client().get("/")
    n_plus_one, duplicate = found[0].findings
    assert (n_plus_one.kind, n_plus_one.count, n_plus_one.line.function) == ("n+1", 7, "lazy_loads")
    assert str(n_plus_one).startswith("7 similar SELECTs from ")
    assert str(n_plus_one).endswith("load them with their parents: selectinload(Item.children)")
    assert (duplicate.kind, duplicate.count, duplicate.line.function) == ("duplicate", 4, "view")


def test_j1_idle_time_has_the_lines_between_which_it_passed(watched: Callable[..., Any]) -> None:
    waited = threading.Event()

    def view() -> None:
        with db.session.begin():
            db.session.get(Item, 1)
            waited.wait(0.05)
            db.session.get(Item, 2)

    app, found = watched(view)
    app.test_client().get("/")
    (report,) = found
    first = view.__code__.co_firstlineno
    idle = report.longest_idle
    assert idle.seconds >= 0.05
    assert report.idle_seconds >= idle.seconds
    assert (idle.after.number, idle.before.number) == (first + 2, first + 4)
    assert idle.where.endswith(f":{first + 2} to {first + 4} in view")
    (transaction,) = report.transactions
    assert (transaction.outcome, transaction.statements) == ("committed", 2)
    assert transaction.line.number in (first + 1, first + 2)
    assert report.held_seconds >= idle.seconds
    assert report.pool_seconds <= report.seconds


def test_j1_core_s_statements_are_reported_too(watched: Callable[..., Any], wire: Wire) -> None:
    def view() -> None:
        with db.engine.begin() as connection:
            connection.execute(sa.text("select 1"))
            connection.execute(sa.text("select 2"))
        with db.engine.connect() as connection:
            connection.execute(sa.text("select 3"))

    app, found = watched(view)
    with wire.record() as log:
        app.test_client().get("/")
    (report,) = found
    assert [each.sql for each in report.statements] == ["select 1", "select 2", "select 3"]
    assert [each.outcome for each in report.transactions] == ["committed", "rolled back"]
    assert report.round_trips == log.round_trips


def test_j1_core_is_not_idle_while_its_first_statement_runs() -> None:
    """A BEGIN of the driver's goes before it, in a time that nobody knows."""
    collector = Collector()
    collector.transaction_began(-1)
    collector.command("BEGIN", 1.0, 1.0, 1, -1)
    collector.statement("select 1", None, 1.0, 3.0, 1, 1, (), -1, None)
    collector.transaction_ended(-1, "committed", 3.5, 3.5, 1)
    report = Report.of(collector.events, started=0.0, ended=4.0)
    assert [each.sql for each in report.sent] == ["BEGIN", "select 1"]
    assert (report.idle_seconds, report.database_seconds) == (0.5, 2.0)


def test_j1_server_timing(watched: Callable[..., Any]) -> None:
    app, _ = watched(select_and_update_in_a_block, FICTIVE_REPORT_SERVER_TIMING=True)
    header = app.test_client().get("/").headers["Server-Timing"]
    assert header.startswith("db;dur=")
    assert 'desc="2 statements, 3 round trips"' in header
    assert "db-idle;dur=" in header


def test_j1_no_server_timing_unless_asked_for(watched: Callable[..., Any]) -> None:
    app, _ = watched(one_select)
    assert "Server-Timing" not in app.test_client().get("/").headers


THRESHOLDS = {
    "FICTIVE_REPORT_ROUND_TRIPS": (6, "8 round trips (limit 6)"),
    "FICTIVE_REPORT_SLOW": ("1us", "ms in the database (limit"),
}


@pytest.mark.parametrize("name", THRESHOLDS)
def test_j1_a_log_record_above_a_threshold(
    name: str, watched: Callable[..., Any], caplog: pytest.LogCaptureFixture, driver: str
) -> None:
    value, message = THRESHOLDS[name]
    app, _ = watched(lazy_loads, FICTIVE_REPORT=None, **{name: value}, **UNPREPARED[driver])
    app.test_client().get("/", headers={"X-Request-ID": "r-17"})
    (record,) = [each for each in caplog.records if each.name == "fictive.report"]
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("GET / (endpoint index, id r-17): ")
    assert message in record.getMessage()
    assert "7 similar SELECTs from " in record.getMessage()
    assert record.report["round_trips"] == 8  # type: ignore[attr-defined]


def test_j1_a_log_record_of_idle_time_as_json(watched: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    def view() -> None:
        with db.session.begin():
            db.session.get(Item, 1)
            threading.Event().wait(0.01)

    app, _ = watched(view, FICTIVE_REPORT_IDLE="5ms", FICTIVE_REPORT_JSON=True)
    app.test_client().get("/")
    (record,) = [each for each in caplog.records if each.name == "fictive.report"]
    found = json.loads(record.getMessage())
    assert found["endpoint"] == "index"
    assert found["status"] == 200
    assert found["idle_seconds"] > 0.01
    assert "idle in a transaction (limit 5.0 ms), the longest time at " in found["reasons"][0]


def test_j1_below_all_thresholds_nothing_is_logged(
    watched: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    app, _ = watched(lazy_loads, FICTIVE_REPORT_SLOW="1min", FICTIVE_REPORT_ROUND_TRIPS=9, FICTIVE_REPORT_IDLE="1min")
    app.test_client().get("/")
    assert not [each for each in caplog.records if each.name == "fictive.report"]


def test_j3_a_signal_for_each_transaction(watched: Callable[..., Any]) -> None:
    def view() -> None:
        insert_in_a_block()
        rolled_back()

    app, _ = watched(view)
    found: list[Any] = []

    def note(app: Flask, transaction: Any) -> None:
        found.append(transaction)

    with transaction_ended.connected_to(note, app):
        app.test_client().get("/")
    assert [each.outcome for each in found] == ["committed", "rolled back"]
    assert [each.line.function for each in found] == ["insert_in_a_block", "rolled_back"]
    assert all(each.seconds > 0 for each in found)


def test_j1_requests_do_not_mix(watched: Callable[..., Any]) -> None:
    """Neither at the same time, nor in an app context that a test had pushed."""
    both = threading.Barrier(2)

    def view() -> None:
        db.session.get(Item, 1)
        if flask.request.args:
            both.wait()
        db.session.get(Item, 2)

    app, found = watched(view)
    threads = [threading.Thread(target=lambda: app.test_client().get("/?wait=1")) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(report.statements) for report in found] == [2, 2]
    found.clear()
    with app.app_context():
        for _ in range(2):
            app.test_client().get("/")
            db.session.expunge_all()
    assert [len(report.statements) for report in found] == [2, 2]


def test_j1_work_without_a_request(watched: Callable[..., Any]) -> None:
    app, found = watched(no_statement)

    @app.cli.command("work")
    def work() -> None:
        one_select()

    assert app.test_cli_runner().invoke(args=["work"]).exit_code == 0
    (report,) = found
    assert report.request["endpoint"] == "command work"
    assert len(report.statements) == 1
    with app.app_context():
        pass
    assert len(found) == 1


def test_j1_off_nothing_is_installed(make_app: MakeApp) -> None:
    app = make_app()
    assert reports_of(app) is None
    assert not list(flask.request_finished.receivers_for(app))
    with app.app_context():
        assert "fictive.watcher" not in db.session().info
    assert reports_of(make_app(FICTIVE_REPORT=False, FICTIVE_REPORT_SLOW="1s")) is None


def test_j1_a_failing_receiver_does_not_fail_the_request(
    watched: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    app, _ = watched(one_select)

    def fail(app: Flask, report: Any) -> None:
        raise RuntimeError("receiver")

    with request_reported.connected_to(fail, app):
        assert app.test_client().get("/").status_code == 200
    assert "the report of a request failed" in caplog.text


BAD = {
    "FICTIVE_REPORT": "yes",
    "FICTIVE_REPORT_SLOW": "soon",
    "FICTIVE_REPORT_ROUND_TRIPS": 0,
    "FICTIVE_REPORT_IDLE": -1,
    "FICTIVE_REPORT_JSON": None,
}


@pytest.mark.parametrize("name", BAD)
def test_j1_bad_settings_are_named(name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        Settings.from_mapping({name: BAD[name]})


# -- the collector and what is derived, without a database -----------------------------------------------------------


def told() -> Collector:
    """A collector that was told of all there is; times in seconds from its start."""
    collector = Collector()
    at = collector.started

    def statement(sql: str, since: float, until: float, transaction: int | None, *carried: str) -> None:
        collector.statement(sql, {"n": since}, at + since, at + until, 2, 1, carried, transaction, None)

    collector.waited_for_pool(at + 0.0, at + 0.5)
    collector.retried(2, sa.exc.OperationalError("x", {}, ValueError("lost")))
    collector.transaction_began(7)
    statement("SELECT 1", 1.0, 1.1, 7, "BEGIN")
    collector.command("ROLLBACK TO SAVEPOINT a", at + 1.3, at + 1.4, 1, 7)
    statement("UPDATE t SET n = 1", 2.0, 2.5, 7)
    collector.transaction_ended(7, "committed", at + 3.0, at + 3.1, 1)
    collector.hook_ran("commit", at + 3.1, at + 3.4, ValueError("in a hook"))
    collector.connection_lost()
    statement("/* of mine */ SELECT 2", 4.0, 4.2, None)
    collector.statement("DELETE FROM t", (), at + 5.0, at + 5.1, -1, 1, (), None, ValueError("refused\nin detail"))
    return collector


def test_j1_what_is_derived_from_the_events() -> None:
    collector = told()
    at = collector.started
    report = Report.of(collector.events, started=at, ended=at + 6.0)
    (transaction,) = report.transactions
    idle = [(round(each.started - at, 6), round(each.ended - at, 6)) for each in transaction.idle]
    assert idle == [(1.1, 1.3), (1.4, 2.0), (2.5, 3.0)]
    assert (transaction.outcome, transaction.statements, transaction.retries) == ("committed", 2, 2)
    assert transaction.seconds == pytest.approx(2.1)
    assert collector.totals() == (report.round_trips, pytest.approx(report.database_seconds), True)
    assert report.summary() == {
        "statements": 4,
        "round_trips": 6,
        "rows": 6,
        "transactions": 1,
        "seconds": 6.0,
        "database_seconds": pytest.approx(0.1 + 0.1 + 0.5 + 0.1 + 0.2 + 0.1),
        "pool_seconds": 0.5,
        "idle_seconds": pytest.approx(1.3),
        "held_seconds": pytest.approx(2.1 + 0.2 + 0.1),
        "hooks": 1,
        "retries": 1,
        "lost": 1,
        "replica_reads": 0,
        "replica_fallbacks": 0,
        "errors": 1,
        "findings": [],
        "idle_where": report.longest_idle.where if report.longest_idle else "",
    }
    assert [each.kind for each in report.statements] == ["read", "write", "read", "write"]
    assert report.statements[0].carried == ("BEGIN",)
    assert report.statements[3].error == "ValueError: refused"
    assert report.hooks[0][3] == "ValueError: in a hook"


def test_j1_a_transaction_that_is_open_still() -> None:
    collector = Collector()
    collector.transaction_began(1)
    assert list(collector.open) == [1]
    report = Report.of(collector.events, started=collector.started, ended=collector.started + 1)
    assert report.transactions[0].outcome == "open"
    assert server_timing(report).startswith('db;dur=0.00;desc="0 statements, 0 round trips"')


def test_j1_a_statement_costs_few_calls() -> None:
    collector = Collector()
    profile = cProfile.Profile()
    arguments: Any = ("SELECT 1", None, 0.0, 1.0, 1, 1, (), None, None)
    collector.statement(*arguments)
    profile.enable()
    collector.statement(*arguments)
    profile.disable()
    assert pstats.Stats(profile).total_calls <= 5  # type: ignore[attr-defined]


def test_j1_the_last_events_of_many_are_kept() -> None:
    collector = Collector()
    for n in range(MOST_EVENTS + 5):
        collector.statement(f"SELECT {n}", None, 0.0, 0.0, 1, 1, (), None, None)
    assert len(collector.events) == MOST_EVENTS
    assert Report.of(collector.events, started=0.0, ended=1.0).statements[-1].sql == f"SELECT {MOST_EVENTS + 4}"


LIBRARY_FILES = [
    sa.__file__, flask.__file__, json.__file__, "<frozen importlib._bootstrap>", "<string>",
    "/srv/app/.venv/lib/python3.12/site-packages/some/module.py",
    "/usr/lib/python3/dist-packages/other.py",
]  # fmt: skip


def test_j1_which_files_are_a_library_s() -> None:
    assert [file for file in LIBRARY_FILES if not is_library(file)] == []
    assert not is_library(__file__)
    assert not is_library("/srv/app/views.py")
    assert is_library("/opt/venv/lib/python3.12/site-packages/installed_app/views.py")
    register_application("/opt/venv/lib/python3.12/site-packages/installed_app")
    assert not is_library("/opt/venv/lib/python3.12/site-packages/installed_app/views.py")
    assert is_library("/opt/venv/lib/python3.12/site-packages/another/views.py")


def test_j1_which_relationship_a_statement_loads() -> None:
    mappers = db.Model.registry.mappers

    def load(sql: str) -> list[str]:
        return relationships_of(sql, mappers)

    assert load("SELECT child.id FROM child WHERE %(param_1)s = child.item_id") == ["Item.children"]
    assert load("SELECT tag.id FROM tag, item_tag WHERE $1 = item_tag.item_id AND tag.id = item_tag.tag_id") == [
        "Item.tags"
    ]
    assert load("SELECT item.id FROM item WHERE item.id = %(pk_1)s") == ["Child.item"]
    assert load("SELECT 1") == []
    assert load("SELECT x FROM elsewhere WHERE id = 1") == []


# -- watching a block -------------------------------------------------------------------------------------------------


def test_j1_a_block_can_be_watched(app: Flask) -> None:
    db.session.add_all([Item(id=n, name=f"item {n}", children=[Child()]) for n in range(1, 5)])
    db.session.commit()
    db.session.expunge_all()
    with watching(db.session) as watched:
        lazy_loads()
        with db.session.begin():
            with watching(db.session) as inner:
                one_select()
            db.session.get(Child, 1)
    one_select()
    report = watched.report
    assert len(report.statements) == 1 + 4 + 1
    assert report.round_trips == 7  # with COMMIT
    (finding,) = report.findings
    assert str(finding).startswith("4 similar SELECTs from ")
    assert [len(each.statements) for each in (inner.report,)] == [1]
    with pytest.raises(ConfigurationError, match="OptInSession"), watching(sa.orm.Session()):
        pass


def test_j1_a_statement_with_a_transaction_of_its_own_is_told_once(app: Flask, wire: Wire) -> None:
    session = db.session()
    sa.event.listen(session, "after_begin", lambda *_: None)
    with watching(session) as watched, wire.record() as log:
        one_select()
    assert [each.carried for each in watched.report.statements] == [("BEGIN",)]
    assert watched.report.round_trips == log.round_trips
