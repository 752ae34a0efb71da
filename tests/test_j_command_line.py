"""The commands `flask fictive ...` and `python -m fictive` (rule J2)."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import textwrap
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fictive.__main__ import main
from fictive.cli import fictive
from fictive.command_line import output
from fictive.command_line.activity import endpoint_of
from fictive.flask_sqlalchemy import FilterByOrCreateMixin, OptInTransactionMixin
from fictive.testing.postgres import Server
from tests.conftest import MakeApp
from tests.models import DB, opt_in


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variables of this machine's, and no `.env` file."""
    for name in list(os.environ):
        if "DB_" in name or "DATABASE_URL" in name or name in ("FLASK_ENV", "APP_ENV", "ENVIRONMENT", "ENV"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def run(app: Flask, *words: str, **options: Any) -> Any:
    return app.test_cli_runner().invoke(args=["fictive", *words], **options)


def rows(result: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def wrong(result: Any) -> list[dict[str, Any]]:
    return [row for row in rows(result) if row["severity"] != "info"]


def plain_url(url: str) -> str:
    return sa.make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


@pytest.fixture
def other(database_url: str) -> Iterator[Callable[[], psycopg.Connection[Any]]]:
    """Connections of others; closed after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(
            contextlib.closing(psycopg.connect(plain_url(database_url), application_name="other"))
        )


@contextlib.contextmanager
def waiting(connection: psycopg.Connection[Any], statement: str, look: Callable[..., list[Any]]) -> Iterator[None]:
    """`statement` waits for a lock in another thread."""
    done: queue.Queue[BaseException | None] = queue.Queue()

    def work() -> None:
        try:
            connection.execute(statement)  # type: ignore[call-overload]
        except psycopg.Error as error:
            done.put(error)
        else:
            done.put(None)

    pid = connection.info.backend_pid
    thread = threading.Thread(target=work)
    thread.start()
    while not look("select 1 where cardinality(pg_blocking_pids(%s)) > 0", pid):
        pass
    try:
        yield
    finally:
        look("select pg_cancel_backend(%s)", pid)
        thread.join()


# -- doctor -----------------------------------------------------------------------------------------------------------


def test_j2_doctor_finds_nothing_on_a_good_database(make_app: MakeApp, look: Callable[..., list[Any]]) -> None:
    app = make_app()
    look("create index on child (item_id); create index on item_tag (tag_id)")
    with undo(look, "drop index child_item_id_idx; drop index item_tag_tag_id_idx"):
        result = run(app, "doctor", "--json")
        assert wrong(result) == []
        assert result.exit_code == 0
        facts = " ".join(row["what"] for row in rows(result))
        assert "PostgreSQL" in facts
        assert "BEGIN travels" in facts
        assert run(app, "doctor").stdout.rstrip().endswith("Nothing is wrong.")


@contextlib.contextmanager
def undo(look: Callable[..., list[Any]], statements: str) -> Iterator[None]:
    try:
        yield
    finally:
        look(statements)


FAULTY = """
from examples_of_doctor import Thing

def work():
    Thing.find_or_create(colour="red", defaults={"name": "x"})
    Thing.get_or_create(name="unique")
    Thing.query.filter_by(colour="red")
"""


def faulty_app(url: str, tmp_path: Path, **config: Any) -> tuple[Any, Flask]:
    class Base(DeclarativeBase):
        pass

    class DB(OptInTransactionMixin, FilterByOrCreateMixin, SQLAlchemy):
        pass

    db = DB(model_class=Base)

    class Thing(db.Model):  # type: ignore[name-defined, misc]
        __tablename__ = "doctor_thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(unique=True)
        colour: Mapped[str]

    class Unmade(db.Model):  # type: ignore[name-defined, misc]
        __tablename__ = "doctor_unmade"
        id: Mapped[int] = mapped_column(primary_key=True)

    root = tmp_path / "faulty"
    root.mkdir()
    (root / "views.py").write_text(textwrap.dedent(FAULTY))
    app = Flask(__name__, root_path=str(root), instance_path=str(tmp_path))
    app.config.update(SQLALCHEMY_DATABASE_URI=url, **config)
    db.init_app(app)
    return db, app


SEED = """
create index on child (item_id); create index on item_tag (tag_id);
create table doctor_thing (id serial primary key, name text not null, colour text not null, parent_id int);
alter table doctor_thing add constraint parent foreign key (parent_id) references doctor_thing not valid;
create table doctor_heap (thing_id int, n smallint);
create sequence doctor_n as smallint start 30000 owned by doctor_heap.n;
select nextval('doctor_n');
create index doctor_a on doctor_thing (colour);
create index doctor_b on doctor_thing (colour);
create function doctor_nothing() returns trigger language plpgsql as 'begin return new; end';
create trigger doctor_off before insert on doctor_thing for each row execute function doctor_nothing();
alter table doctor_thing disable trigger doctor_off;
insert into doctor_thing (name, colour) values ('a', 'red'), ('a', 'red');
"""
UNDO = (
    "drop table doctor_heap, doctor_thing cascade; drop function doctor_nothing();"
    "drop index child_item_id_idx; drop index item_tag_tag_id_idx"
)
EXPECTED = {
    "foreign-key-index": "doctor_thing(parent_id)",
    "not-valid": "parent",
    "primary-key": "doctor_heap",
    "sequence": "doctor_n",
    "duplicate-index": "doctor_a, doctor_b",
    "disabled-trigger": "doctor_off",
    "invalid-index": "doctor_bad",
    "missing-unique-key": "doctor_thing(name)",
    "missing-table": "doctor_unmade",
    "find-or-create-key": "views.py:5: Thing.find_or_create(colour)",
    "idle-in-transaction": "endpoint shop.cart",
    "blocked": "select 1 from doctor_thing for update",
    "begin": "creator",
    "settings": "DB_POOL_SIZE is 9 in the environment, and 5 is in force",
}


def test_j2_doctor_names_each_fault_and_only_those(
    database_url: str,
    driver: str,
    other: Callable[[], psycopg.Connection[Any]],
    look: Callable[..., list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    autocommit = other()
    autocommit.autocommit = True
    autocommit.execute(SEED)  # type: ignore[call-overload]
    with pytest.raises(psycopg.errors.UniqueViolation):
        autocommit.execute("create unique index concurrently doctor_bad on doctor_thing (name, colour)")
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("DB_POOL_SIZE", "9")
    url = sa.make_url(database_url)
    module = __import__(url.get_driver_name())

    def creator() -> Any:
        connection = module.connect(plain_url(database_url))
        cursor = module.extensions.cursor if driver == "psycopg2" else module.Cursor
        connection.cursor_factory = lambda *args, **options: cursor(*args, **options)  # a function: nothing can ride
        return connection

    db, app = faulty_app(database_url, tmp_path, SQLALCHEMY_ENGINE_OPTIONS={"creator": creator, "pool_size": 5})
    idle, waiter = other(), other()
    idle.execute("update doctor_thing set colour = 'blue' /*route='shop.cart'*/")
    with undo(look, UNDO):
        with waiting(waiter, "select 1 from doctor_thing for update", look):
            result = run(app, "doctor", "--json", "--patience", "1ms")
        idle.close()
        waiter.close()
        with app.app_context():
            db.engine.dispose()
    assert result.exit_code == 1, result.output
    found = wrong(result)
    assert sorted(row["check"] for row in found) == sorted(EXPECTED)
    for row in found:
        assert EXPECTED[row["check"]] in row["what"], row
        assert row["remedy"]


def test_j2_doctor_sees_autocommit_and_another_database(
    pg: Server, database_url: str, driver: str, tmp_path: Path, look: Callable[..., list[Any]]
) -> None:
    module: Any = __import__(driver)

    def creator() -> Any:
        connection = module.connect(sa.make_url(plain_url(database_url)).set(database="postgres")
                                    .render_as_string(hide_password=False))  # fmt: skip
        connection.autocommit = True
        return connection

    app = Flask(__name__, instance_path=str(tmp_path))
    app.config.update(SQLALCHEMY_DATABASE_URI=database_url, SQLALCHEMY_ENGINE_OPTIONS={"creator": creator})

    class DB(OptInTransactionMixin, SQLAlchemy):
        pass

    db = DB()
    db.init_app(app)
    found = {row["check"]: row["what"] for row in wrong(run(app, "doctor", "--json"))}
    assert "creator connects to 'postgres'" in found["creator"]
    assert "autocommit mode" in found["autocommit"]
    with app.app_context():
        db.engine.dispose()


def test_j2_doctor_of_a_database_that_cannot_be_reached(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--url", "postgresql://app:hunter2@127.0.0.1:1/x", "doctor"])
    assert result.exit_code == 3
    assert "cannot be reached" in result.stderr
    assert "hunter2" not in result.output


# -- locks and activity -----------------------------------------------------------------------------------------------


def test_j2_locks_and_activity(
    make_app: MakeApp, other: Callable[[], psycopg.Connection[Any]], look: Callable[..., list[Any]]
) -> None:
    app, holder, waiter = make_app(), other(), other()
    holder.execute("lock table item in exclusive mode /*route='admin.freeze'*/")
    with waiting(waiter, "lock table item in share mode", look):
        found = {row["pid"]: row for row in rows(run(app, "activity", "--json"))}
        assert found[waiter.info.backend_pid]["blocked_by"] == [holder.info.backend_pid]
        assert found[holder.info.backend_pid]["state"] == "idle in transaction"
        assert found[holder.info.backend_pid]["endpoint"] == "admin.freeze"
        assert "admin.freeze" in run(app, "activity").stdout
        watched = run(app, "activity", "--json", "--watch", "1ms", "--times", "2").stdout.splitlines()
        assert len([line for line in watched if json.loads(line)["pid"] == holder.info.backend_pid]) == 2
        held = [row for row in rows(run(app, "locks", "--json")) if row["object"] == "item"]
        assert [(row["pid"], row["granted"], row["mode"]) for row in held] == [
            (waiter.info.backend_pid, False, "ShareLock"), (holder.info.backend_pid, True, "ExclusiveLock")
        ]  # fmt: skip
        shown = run(app, "locks", "--waiting").stdout
        assert f"pid {holder.info.backend_pid} blocks:" in shown
        assert f"  pid {waiter.info.backend_pid} waits:" in shown
    holder.rollback()
    waiter.rollback()
    assert run(app, "locks", "--waiting").stdout.strip() == "No locks."


def test_j2_endpoint_of_a_statement_with_tags() -> None:
    assert endpoint_of("select 1 /*db_driver='psycopg2',route='shop%3Acart',traceparent='0'*/") == "shop:cart"
    assert endpoint_of("select 1") is None
    assert endpoint_of(None) is None


# -- create, drop, cleanup, wait --------------------------------------------------------------------------------------


@pytest.fixture
def new_url(pg: Server, driver: str) -> Iterator[str]:
    """The URL of a database that is not there yet."""
    name = f"cli_{uuid.uuid4().hex}"
    yield pg.url(name, driver=driver)
    with psycopg.connect(pg.url("postgres", driver="psycopg").replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f'drop database if exists "{name}" with (force)')  # type: ignore[call-overload]


def python_m(url: str, *words: str, **options: Any) -> Any:
    return CliRunner().invoke(main, ["--url", url, *words], **options)


def test_j2_a_database_from_beginning_to_end(new_url: str) -> None:
    name = str(sa.make_url(new_url).database)
    assert python_m(new_url, "wait", "--timeout", "1ms").exit_code == 1
    assert python_m(new_url, "create").stdout == f"{name}: created.\n"
    assert python_m(new_url, "create").stdout == f"{name}: is there already.\n"
    assert python_m(new_url, "wait").exit_code == 0
    with contextlib.closing(psycopg.connect(plain_url(new_url), application_name="guest")) as guest:
        guest.execute("create table t (id int primary key)")
        guest.execute("insert into t values (1)")
        guest.commit()
        result = python_m(new_url, "drop", "--yes")
        assert result.exit_code == 4
        assert "guest" in result.stderr
        result = python_m(new_url, "cleanup", "--yes")
        assert (result.exit_code, result.stdout) == (0, f"{name}: 1 tables emptied.\n")
        assert "guest" in result.stderr
        assert guest.execute("select count(*) from t").fetchone() == (0,)
        guest.commit()
        assert python_m(new_url, "drop", input="something else\n").exit_code in (1, 4)
        assert python_m(new_url, "drop", "--force", input="something else\n").exit_code == 1
        assert python_m(new_url, "wait").exit_code == 0
        assert python_m(new_url, "drop", "--force", input=f"{name}\n").exit_code == 0
    assert python_m(new_url, "drop", "--yes").stdout == f"{name}: is not there.\n"


def test_j2_protected_databases_are_not_touched(new_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert python_m(new_url, "create").exit_code == 0
    name = str(sa.make_url(new_url).database)
    for variable, value in {"FICTIVE_PROTECTED": "1", "FLASK_ENV": "production", "APP_ENV": "prod"}.items():
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            for command in ("drop", "cleanup"):
                result = python_m(new_url, command, "--yes")
                assert (result.exit_code, variable in result.stderr) == (4, True)
    with psycopg.connect(plain_url(new_url), autocommit=True) as connection:
        connection.execute(f'alter database "{name}" set fictive.protected = on')  # type: ignore[call-overload]
    monkeypatch.setenv("FICTIVE_PROTECTED", "0")
    result = python_m(new_url, "drop", "--yes", "--force")
    assert (result.exit_code, "fictive.protected" in result.stderr) == (4, True)
    assert python_m(new_url, "wait").exit_code == 0


def test_j2_protection_by_the_app_and_its_lifting(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app(ENV="production")
    with app.app_context():
        opt_in.db.session.add(opt_in.Item(name="x"))
        opt_in.db.session.commit()
        opt_in.db.session.remove()
        assert run(app, "cleanup", "--yes").exit_code == 4
        assert opt_in.db.session.query(opt_in.Item).count() == 1
        opt_in.db.session.remove()
        monkeypatch.setenv("FICTIVE_PROTECTED", "false")
        assert run(app, "cleanup", "--yes", "--json").exit_code == 0
        assert opt_in.db.session.query(opt_in.Item).count() == 0


def test_j2_one_bind_of_several(make_app: MakeApp, database_url: str) -> None:
    app = make_app(DB(model_class=type("Base", (DeclarativeBase,), {})), SQLALCHEMY_BINDS={"reports": database_url})
    assert {row["bind"] for row in rows(run(app, "wait", "--json"))} == {"default", "reports"}
    assert [row["bind"] for row in rows(run(app, "wait", "--json", "--bind", "reports"))] == ["reports"]
    result = run(app, "wait", "--bind", "none")
    assert result.exit_code == 2
    assert "default, reports" in result.stderr


def test_j2_python_m_fictive_needs_no_flask(database_url: str) -> None:
    code = (
        "import sys; sys.modules['flask'] = None; sys.modules['rich'] = None; sys.modules['pydantic_settings'] = None;"
        "sys.argv = ['fictive', 'wait', '--json']; import runpy; runpy.run_module('fictive', run_name='__main__')"
    )
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": root, "DATABASE_URL": database_url},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["answers"] is True


# -- wrong arguments, and what a terminal is --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("doctor", "--patience", "x"),
        ("wait", "--timeout", "0"),
        ("activity", "--watch", "99999d"),
        ("cleanup", "--yes", "--lock-timeout", "-1s"),
    ],
)
def test_j2_a_wrong_duration_is_a_wrong_option(database_url: str, words: tuple[str, ...]) -> None:
    result = python_m(database_url, *words)
    assert result.exit_code == 2
    assert "is no duration" in result.stderr


def test_j2_a_number_is_seconds(database_url: str) -> None:
    assert python_m(database_url, "wait", "--timeout", "30").exit_code == 0


@pytest.mark.parametrize("pydantic", [True, False])
def test_j2_an_empty_url_is_no_other_database(
    database_url: str, monkeypatch: pytest.MonkeyPatch, pydantic: bool
) -> None:
    monkeypatch.setenv("DATABASE_URL", database_url)
    if not pydantic:
        monkeypatch.setitem(sys.modules, "pydantic_settings", None)
        monkeypatch.delitem(sys.modules, "fictive.settings", raising=False)
    result = python_m("", "drop", "--yes", "--force")
    assert result.exit_code == 2
    assert "--url is not a database URL" in result.stderr
    assert python_m(database_url, "wait").exit_code == 0


def test_j2_wait_ends_though_a_server_says_nothing(driver: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"postgresql+{driver}://app@127.0.0.1:{server.getsockname()[1]}/x"
        result = python_m(url, "wait", "--timeout", "1s")
    assert result.exit_code == 1
    assert "no answer in 1 s" in result.stderr


def test_j2_a_cancelled_query_is_no_unreachable_database(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled = "SELECT pg_cancel_backend(pg_backend_pid()), pg_sleep(60)"
    monkeypatch.setattr("fictive.command_line.activity._ACTIVITY", cancelled)
    result = python_m(database_url, "activity")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: canceling statement")


def test_j2_binds_that_lead_to_one_database(new_url: str, make_app: MakeApp) -> None:
    """The other engines of this process are not others who are connected."""
    assert python_m(new_url, "create").exit_code == 0
    db = DB(model_class=type("Base", (DeclarativeBase,), {}))
    app = make_app(db, SQLALCHEMY_DATABASE_URI=new_url, SQLALCHEMY_BINDS={"same": new_url, "lite": "sqlite://"})
    found = [row["bind"] for row in rows(run(app, "doctor", "--json")) if row["check"] == "begin"]
    assert found == ["default", "same"]
    result = run(app, "activity", "--json")
    assert (result.exit_code, result.stderr) == (0, "lite: passed over, since it is sqlite.\n")
    assert run(app, "activity", "--bind", "lite").exit_code == 1
    with app.app_context():
        for key in (None, "same"):
            with db.engines[key].connect():
                """Each has a connection in its pool by now."""
        db.engines["same"].dispose()
    assert run(app, "cleanup", "--yes").exit_code == 0
    with app.app_context():
        for engine in db.engines.values():
            engine.dispose()
    result = run(app, "drop", "--yes", "--force")
    assert (result.exit_code, result.stdout) == (0, f"{sa.make_url(new_url).database}: dropped.\n")


def test_j2_an_app_without_a_database_says_so() -> None:
    app = Flask("none")
    app.cli.add_command(fictive)
    result = run(app, "doctor")
    assert result.exit_code == 2
    assert "db.init_app(app)" in result.stderr


def test_j2_a_refusal_names_the_option(new_url: str) -> None:
    assert python_m(new_url, "create").exit_code == 0
    name = str(sa.make_url(new_url).database)
    with psycopg.connect(plain_url(new_url)) as guest:
        pid = guest.info.backend_pid
        result = python_m(new_url, "drop", "--yes")
        assert result.exit_code == 4
        assert f"connected to {name!r}: pid {pid}" in result.stderr
    url = sa.make_url(new_url).set(database="postgres").render_as_string(hide_password=False)
    result = python_m(url, "drop", "--yes")  # refused by the server: the command itself has to be connected to one
    assert result.exit_code == 4
    assert "--force" in result.stderr
    assert "sqlalche.me" not in result.stderr


ROWS = [{"pid": 1, "state": "idle in transaction", "blocked_by": [], "query": "SELECT '\x1b[2J\n  wide'" + "x" * 200}]


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("columns", [1, 20, 80, 300])
def test_j2_every_width_of_a_terminal_shows_who_and_what(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int, rich: bool
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(output, "on_terminal", lambda: True)
    if not rich:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    output.print_table(("pid", "state", "waits_for_something_of_a_long_name", "blocked_by", "query"), ROWS, empty="")
    shown = capsys.readouterr().out
    for text in ("1", "idle", "transaction", "SELECT '\\x1b"):
        assert text in shown
    assert "\x1b[2J" not in shown


def test_j2_without_an_output_there_is_no_traceback(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert not output.on_terminal()


def test_j2_an_output_that_cannot_be_written(database_url: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fictive", "--url", database_url, "settings"], stdout=full, stderr=subprocess.PIPE,
            text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("Error: [Errno 28]")
    assert "Traceback" not in done.stderr
