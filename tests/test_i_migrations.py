"""Contract I6, and what I2 says of autogenerate: migrations through Flask-Migrate's own commands."""

from __future__ import annotations

import datetime
import importlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import produce_migrations, render_python_code
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.operations.ops import UpgradeOps
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from pytest_postgresql.janitor import DatabaseJanitor
from sqlalchemy.orm import DeclarativeBase

import fictive.migrations
from fictive.changes.notify_triggers import notify_changes
from fictive.errors import ConfigurationError, LockLost, LockTimeout
from fictive.flask_sqlalchemy import OptInTransactionMixin
from fictive.locks.advisory import lock_key
from fictive.migrations.running import KEY
from fictive.migrations.watching import Watch
from fictive.models.naming import check_names, naming_convention
from fictive.testing import postgres
from tests.conftest import MakeApp
from tests.migrations import Project, logging_as_it_was
from tests.test_f_locks import wait_until

# the environment that Flask-Migrate writes tries the name of Flask-SQLAlchemy 2 first
pytestmark = pytest.mark.filterwarnings("ignore:'get_engine' is deprecated:DeprecationWarning")

Look = Callable[..., list[Any]]

HELD = (
    "from pg_locks where locktype = 'advisory'"
    " and database = (select oid from pg_database where datname = current_database())"
)
ADVISORY_LOCKS = f"select count(*) {HELD}"
OBJECTS = """
select relkind::text || ' ' || relname from pg_class where relnamespace = 'public'::regnamespace
union all select 'function ' || proname from pg_proc where pronamespace = 'public'::regnamespace
union all select 'type ' || typname from pg_type where typnamespace = 'public'::regnamespace and typtype = 'e'
union all select contype::text || ' ' || conname from pg_constraint where connamespace = 'public'::regnamespace
 and contype <> 'n'
union all select 'trigger ' || tgname from pg_trigger where not tgisinternal
order by 1
"""
EMPTY = ["p alembic_version_pkc", "r alembic_version"]
VERSION_TABLE = ["i alembic_version_pkc", *EMPTY]


class DB(OptInTransactionMixin, SQLAlchemy):
    pass


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    with logging_as_it_was():
        yield


@pytest.fixture(scope="session")
def template(pg: postgres.Server) -> Iterator[DatabaseJanitor]:
    """An empty one: all tables here are those of migrations."""
    name = f"fictive_migrations_{os.environ.get('PYTEST_XDIST_WORKER', 'main')}_{os.getpid()}_template"
    janitor = DatabaseJanitor(
        user=pg.user, host=pg.host, port=pg.port, dbname=name, password=pg.password, as_template=True
    )
    with janitor:
        yield janitor


class Guarded(Project):
    """A project whose env.py calls `fictive.migrations.run`."""

    def flask(self, *arguments: str, fails: bool = False) -> Any:
        # env.py keeps what it made for the first command of a process, of which there is but one elsewhere
        self.app.extensions["migrate"].configure_args.pop("process_revision_directives", None)
        return super().flask(*arguments, fails=fails)

    def init(self, arguments: str = "", engines: str = "get_engine()", *options: str) -> None:
        self.flask("init", *options)
        env = self.directory / "env.py"
        text = env.read_text()
        call = "else:\n    run_migrations_online()\n"
        assert text.endswith(call)
        text = text.replace(
            call,
            f"else:\n    fictive.migrations.run(run_migrations_online, {engines}{arguments and ', '}{arguments})\n",
        )
        env.write_text("import fictive.migrations\n" + text)


@pytest.fixture
def project(make_app: MakeApp, tmp_path: Path) -> Guarded:
    db = DB()
    return Guarded(make_app(db), db, tmp_path, **fictive.migrations.options())


@pytest.fixture
def blocker(pg: postgres.Server, database_name: str, look: Look) -> Iterator[psycopg.Connection[Any]]:
    """Another program, which reads the table `busy` in a transaction that it leaves open."""
    look("create table busy (id int)")
    with psycopg.connect(pg.url(database_name), application_name="the blocker") as connection:
        connection.execute("select * from busy")
        yield connection


class Logged:
    """What `run` logs; `then` is called at the first line. A filter, since env.py takes away all handlers."""

    def __init__(self, then: Callable[[], object] = lambda: None) -> None:
        self.lines: list[str] = []
        self._then = then
        logging.getLogger("alembic.fictive").addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        self.lines.append(record.getMessage())
        if len(self.lines) == 1:
            self._then()
        return True


@pytest.fixture
def logged() -> Iterator[Callable[..., Logged]]:
    logger = logging.getLogger("alembic.fictive")
    yield Logged
    logger.filters.clear()


# -- the names of files -----------------------------------------------------------------------------------------------


def test_i6_file_names(tmp_path: Path) -> None:
    app = Flask(__name__, instance_path=str(tmp_path))
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    project = Project(app, DB(app), tmp_path)
    project.migrate.configure(fictive.migrations.dated_file_names)
    project.flask("init")
    versions = project.directory / "versions"

    def files() -> list[str]:
        return sorted(path.name for path in versions.glob("*.py"))

    before = datetime.date.today()
    project.flask("revision", "-m", "Orders have a Note!")
    name = files()[0]
    assert name in [f"{day}_orders_have_a_note.py" for day in (before, datetime.date.today())]
    if not name.startswith(str(datetime.date.today())):
        pytest.skip("it is just midnight")
    written = (versions / name).read_text()
    project.flask("revision", "-m", "orders have a note", fails=True)
    project.flask("revision", fails=True)
    assert files() == [name]
    assert (versions / name).read_text() == written
    ini = project.directory / "alembic.ini"
    ini.write_text(ini.read_text().replace("# file_template =", "file_template ="))
    project.flask("revision", "-m", "orders have a note", "--rev-id", "abc")
    assert "abc_orders_have_a_note.py" in files()


TEMPLATES = ["%%(year)d-%%(month).2d-%%(day).2d_%%(slug)s", "%%(slug)s", "%%(year)d/%%(slug)s"]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("guarded_by", ["dated_file_names", "run"])
def test_i6_no_migration_takes_the_place_of_another_whatever_the_template(
    template: str, guarded_by: str, tmp_path: Path
) -> None:
    app = Flask(__name__, instance_path=str(tmp_path))
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite:///x.db"
    db = DB(app)
    if guarded_by == "run":
        project: Project = Guarded(app, db, tmp_path)
        project.init()  # type: ignore[attr-defined]
    else:
        project = Project(app, db, tmp_path)
        project.flask("init")
        project.migrate.configure(fictive.migrations.dated_file_names)
    ini = project.directory / "alembic.ini"
    options = f"file_template = {template}\nrevision_environment = true\nrecursive_version_locations = true"
    ini.write_text(ini.read_text().replace("[alembic]", f"[alembic]\n{options}", 1))
    versions = project.directory / "versions"
    before = datetime.date.today()
    project.flask("revision", "-m", "Orders have a Note!")
    (first,) = versions.rglob("*.py")
    written = first.read_text()
    project.flask("revision", "-m", "orders have a note", fails=before == datetime.date.today())
    assert first.read_text() == written
    project.flask("revision", "-m", "something else")
    assert len(list(versions.rglob("*.py"))) >= 2
    with app.app_context():
        db.engine.dispose()


def test_i6_file_names_of_what_is_no_configuration() -> None:
    with pytest.raises(TypeError, match="Alembic's Config"):
        fictive.migrations.dated_file_names("alembic.ini")


def test_i6_file_names_in_plain_alembic(tmp_path: Path) -> None:
    config = Config()
    config.set_main_option("script_location", str(tmp_path / "alembic"))
    config.config_file_name = str(tmp_path / "alembic.ini")
    command.init(config, str(tmp_path / "alembic"))
    config = fictive.migrations.dated_file_names(Config(str(tmp_path / "alembic.ini")))
    command.revision(config, "A table")
    assert [path.name[10:] for path in (tmp_path / "alembic" / "versions").glob("*.py")] == ["_a_table.py"]


# -- autogenerate -----------------------------------------------------------------------------------------------------


def first_schema(db: SQLAlchemy) -> None:
    """Each kind of constraint and index, and a trigger."""

    class Customer(db.Model):  # type: ignore[name-defined, misc]
        id = sa.Column(sa.Integer, primary_key=True)
        email = sa.Column(sa.String, unique=True)
        name = sa.Column(sa.String, index=True)

    class Order(db.Model):  # type: ignore[name-defined, misc]
        number = sa.Column(sa.Integer, primary_key=True)
        year = sa.Column(sa.Integer, primary_key=True)
        amount = sa.Column(sa.Integer, sa.CheckConstraint("amount > 0", name="amount_positive"))
        customer_id = sa.Column(sa.ForeignKey("customer.id"))
        __table_args__ = (
            sa.UniqueConstraint("year", "amount"),
            sa.CheckConstraint("year > 2000", name="year_recent"),
        )

    class Gone(db.Model):  # type: ignore[name-defined, misc]
        id = sa.Column(sa.Integer, primary_key=True)

    notify_changes(Order)
    notify_changes(Gone)


def second_schema(db: SQLAlchemy) -> None:
    """The tables that stay, with no constraint but keys, and no index; the trigger is on the other one."""

    class Customer(db.Model):  # type: ignore[name-defined, misc]
        id = sa.Column(sa.Integer, primary_key=True)
        email = sa.Column(sa.String)
        name = sa.Column(sa.String)

    class Order(db.Model):  # type: ignore[name-defined, misc]
        number = sa.Column(sa.Integer, primary_key=True)
        year = sa.Column(sa.Integer, primary_key=True)
        amount = sa.Column(sa.Integer)
        customer_id = sa.Column(sa.Integer)

    notify_changes(Customer)


@pytest.mark.parametrize(
    ("driver", "style"), [("psycopg2", "postgresql"), ("psycopg", "prefixed")], indirect=["driver"]
)
def test_i2_i6_autogenerate_creates_and_drops_every_constraint_index_and_trigger(
    make_app: MakeApp, tmp_path: Path, look: Look, style: str
) -> None:
    def project_of(define: Callable[[SQLAlchemy], None]) -> Guarded:
        db = DB(metadata=sa.MetaData(naming_convention=naming_convention(style)), disable_autonaming=False)
        define(db)
        check_names(db.metadata)
        return Guarded(make_app(db), db, tmp_path, **fictive.migrations.options())

    project = project_of(first_schema)
    project.init()
    project.flask("migrate", "-m", "first")
    project.flask("upgrade")
    first = look(OBJECTS)
    assert first.count("trigger fictive_notify_changes") == 2
    names = {
        "postgresql": {"u customer_email_key", "f order_customer_id_fkey", "c order_amount_positive_check",
                       "c order_year_recent_check",
                       "i customer_name_idx", "u order_year_amount_key", "p order_pkey"},
        "prefixed": {"u uq_customer_email", "f fk_order_customer_id_customer", "c ck_order_amount_positive",
                     "c ck_order_year_recent",
                     "i ix_customer_name", "u uq_order_year_amount", "p pk_order"},
    }  # fmt: skip
    assert names[style] <= set(first)
    project.flask("migrate", "-m", "nothing")
    assert len(list((project.directory / "versions").glob("*.py"))) == 1

    project = project_of(second_schema)
    output = project.flask("check", fails=True).output
    assert "('drop_notify_changes', 'gone', ['id'], None)" in output
    assert "('create_notify_changes', 'customer', ['id'], None)" in output
    project.flask("migrate", "-m", "second")
    text = next((project.directory / "versions").glob("*_second.py")).read_text()
    assert "import fictive.migrations" in text
    assert "op.drop_notify_changes('order', ['number', 'year'])" in text
    project.flask("upgrade")
    second = look(OBJECTS)
    assert {line for line in second if line[:2] in ("u ", "f ", "c ")} == set()
    assert [line for line in second if line.startswith(("trigger", "function"))] == [
        "function fictive_notify_customer",
        "trigger fictive_notify_changes",
        "trigger fictive_notify_changes_truncate",
    ]
    project.flask("migrate", "-m", "nothing")
    assert len(list((project.directory / "versions").glob("*.py"))) == 2

    project.flask("downgrade")
    assert look(OBJECTS) == first
    project.flask("downgrade", "base")
    assert sorted(look(OBJECTS)) == sorted(VERSION_TABLE)


@pytest.mark.parametrize("driver", ["psycopg"], indirect=True)
def test_i6_autogenerate_of_triggers(database_url: str, look: Look) -> None:
    """A key that changed, half of the triggers, another schema, tables that are not ours, and a new one elsewhere."""
    look("create schema s")

    class Base(DeclarativeBase):
        pass

    class Keyed(Base):
        __tablename__ = 'ke"yed'
        id = sa.Column(sa.Integer, primary_key=True)
        other = sa.Column("Ot her", sa.Integer, primary_key=True)

    class Inside(Base):
        __tablename__ = "inside"
        __table_args__ = {"schema": "s"}
        id = sa.Column(sa.Integer, primary_key=True)

    class Plain(Base):
        __tablename__ = "plain"
        id = sa.Column(sa.Integer, primary_key=True)

    notify_changes(Keyed)
    notify_changes(Inside)
    engine = sa.create_engine(database_url, poolclass=sa.NullPool)

    def found(**options: Any) -> str:
        with engine.connect() as connection:
            options = {"include_schemas": True, **fictive.migrations.options(), **options}
            context = MigrationContext.configure(connection, opts=options)
            ops = produce_migrations(context, Base.metadata).upgrade_ops
            assert isinstance(ops, UpgradeOps)
            return (
                render_python_code(ops).split("please adjust! ###\n")[1].replace("# ### end Alembic commands ###", "")
            )

    Base.metadata.create_all(engine)
    assert found().split() == ["pass"]
    look("""alter table "ke""yed" rename "Ot her" to gone; alter table "ke""yed" rename id to "Ot her";
        alter table "ke""yed" rename gone to id""")
    look("drop trigger fictive_notify_changes_truncate on s.inside")
    look("create table theirs (id int primary key)")
    with engine.begin() as connection:
        op = Operations(MigrationContext.configure(connection))
        op.invoke(fictive.migrations.CreateNotifyChanges("plain", ["id"]))
        op.invoke(fictive.migrations.CreateNotifyChanges("theirs", ["id"]))
        op.invoke(fictive.migrations.CreateNotifyChanges('ke"yed', ["id"]))
    ours = {"include_name": lambda name, kind, parents: name != "theirs"}
    assert [line.strip() for line in found(**ours).splitlines() if line.strip()] == [
        """op.drop_notify_changes('ke"yed', ['id'])""",
        "op.drop_notify_changes('plain', ['id'])",
        "op.drop_notify_changes('inside', ['id'], schema='s')",
        """op.create_notify_changes('ke"yed', ['id', 'Ot her'])""",
        "op.create_notify_changes('inside', ['id'], schema='s')",
    ]
    look("drop table s.inside cascade; drop function s.fictive_notify_inside")
    assert "op.create_notify_changes('inside', ['id'], schema='s')" in found(include_schemas=False)
    all_of_them = found()
    assert all_of_them.index("drop_notify_changes('theirs'") < all_of_them.index("op.drop_table('theirs')")


# -- one deployment at a time -----------------------------------------------------------------------------------------

DEPLOY = """
import sys
from flask import Flask
from flask_migrate import Migrate, upgrade
from flask_sqlalchemy import SQLAlchemy
app = Flask("deployed")
app.config["SQLALCHEMY_DATABASE_URI"] = sys.argv[1]
Migrate(app, SQLAlchemy(app), directory=sys.argv[2])
input()
with app.app_context():
    upgrade()
"""


def deployment(url: str, directory: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", DEPLOY, url, str(directory)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("driver", ["psycopg"], indirect=True)
def test_i6_two_processes_migrate_one_after_the_other(
    project: Guarded, look: Look, database_url: str, blocker: psycopg.Connection[Any]
) -> None:
    """The second waits while the first makes an index CONCURRENTLY, which waits for all snapshots there are."""
    project.init("lock_timeout=None")
    project.write(
        "aaa",
        None,
        """op.execute("lock table busy")
    op.create_table("a", sa.Column("id", sa.Integer))
    with op.get_context().autocommit_block():
        op.create_index("a_id_idx", "a", ["id"], postgresql_concurrently=True)""",
    )
    first, second = (deployment(database_url, project.directory) for _ in range(2))
    assert first.stdin is not None
    assert second.stdin is not None
    assert second.stderr is not None
    print(file=first.stdin, flush=True)
    wait_until(lambda: look("select count(*) from pg_locks where relation = 'busy'::regclass and not granted") == [1])
    print(file=second.stdin, flush=True)
    line = next(line for line in second.stderr if "Another process migrates" in line)
    assert "Waiting for up to 600 s. pid " in line
    blocker.rollback()
    said, said_second = first.communicate(timeout=60)[1], second.communicate(timeout=60)[1]
    assert (first.returncode, second.returncode) == (0, 0), (said, said_second)
    assert "Running upgrade  -> aaa" in said
    assert "Running" not in said_second
    assert look("select version_num from alembic_version") == ["aaa"]
    assert look(ADVISORY_LOCKS) == [0]


def test_i6_who_waits_too_long_is_told_who_holds_the_lock(project: Guarded, look: Look) -> None:
    project.init("wait='50ms'")
    project.write("aaa", None, 'op.create_table("a", sa.Column("id", sa.Integer))')
    (pid,) = look("select pg_backend_pid()")
    look(f"select pg_advisory_lock({lock_key(KEY).numbers[0]})")
    for arguments in ["current"], ["history"], ["upgrade", "--sql"]:  # these change nothing
        project.flask(*arguments)
    error = project.flask("upgrade", fails=True).exception
    assert isinstance(error, LockTimeout)
    assert f"pid {pid} (" in str(error)
    assert "holds the lock" in str(error)
    assert look(OBJECTS) == []
    look("select pg_advisory_unlock_all()")
    project.flask("upgrade")
    assert look("select version_num from alembic_version") == ["aaa"]


def test_i6_a16_a_failing_migration_leaves_nothing_and_no_lock(project: Guarded, look: Look) -> None:
    project.init()
    project.write("aaa", None, 'op.create_table("a", sa.Column("id", sa.Integer)); op.execute("select 1/0")')
    error = project.flask("upgrade", fails=True).exception
    assert isinstance(error, sa.exc.DataError)
    assert look(OBJECTS) == []
    assert look(ADVISORY_LOCKS) == [0]
    project.write("aaa", None, 'op.create_table("a", sa.Column("id", sa.Integer)); raise KeyboardInterrupt')
    project.flask("upgrade", fails=True)
    assert look(OBJECTS) == []
    assert look(ADVISORY_LOCKS) == [0]


def test_i6_a_lock_that_was_lost_is_told_and_so_is_a_connection(project: Guarded, look: Look) -> None:
    project.init()
    ends = f"select pg_terminate_backend(pid, 5000) {HELD}"
    project.write("aaa", None, f'op.create_table("a", sa.Column("id", sa.Integer)); op.execute("{ends}")')
    error = project.flask("upgrade", fails=True).exception
    assert isinstance(error, LockLost)
    assert look("select version_num from alembic_version") == ["aaa"]  # what the migration did is done
    project.write("bbb", "aaa", 'op.execute("select pg_terminate_backend(pg_backend_pid())")')
    error = project.flask("upgrade", fails=True).exception
    assert isinstance(error, sa.exc.OperationalError)
    assert not isinstance(error, (LockLost, LockTimeout))
    assert look(ADVISORY_LOCKS) == [0]


@pytest.mark.parametrize("driver", ["psycopg"], indirect=True)
def test_i6_every_command_that_changes_something_takes_the_lock(project: Guarded, look: Look) -> None:
    project.init()
    check = f"assert op.get_bind().scalar(sa.text({ADVISORY_LOCKS!r})) == 1"
    project.write("aaa", None, f'op.create_table("a", sa.Column("id", sa.Integer)); {check}')
    project.write("bbb", "aaa", f'op.create_table("b", sa.Column("id", sa.Integer)); {check}')
    path = project.directory / "versions" / "bbb_.py"
    path.write_text(path.read_text().replace('op.drop_table("a")', f'op.drop_table("b"); {check}'))
    for arguments in ["upgrade", "+1"], ["upgrade", "heads"], ["downgrade"], ["upgrade", "aaa+1"]:
        project.flask(*arguments)
    assert look("select version_num from alembic_version") == ["bbb"]
    look(f"select pg_advisory_lock({lock_key(KEY).numbers[0]})")
    env = project.directory / "env.py"
    env.write_text(env.read_text().replace("get_engine())\n", "get_engine(), wait='1ms')\n"))
    for command_and_revision in ["stamp", "aaa"], ["stamp", "base"], ["downgrade", "base"]:
        assert isinstance(project.flask(*command_and_revision, fails=True).exception, LockTimeout)
    look("select pg_advisory_unlock_all()")
    project.flask("stamp", "aaa")
    assert look("select version_num from alembic_version") == ["aaa"]


# -- locks on tables --------------------------------------------------------------------------------------------------

BUSY = 'op.add_column("busy", sa.Column("note", sa.String))'


@pytest.mark.parametrize(
    ("driver", "per_migration"), [("psycopg2", False), ("psycopg", False), ("psycopg", True)], indirect=["driver"]
)
def test_i6_ddl_that_cannot_get_its_lock_is_tried_again(
    project: Guarded, look: Look, blocker: psycopg.Connection[Any], logged: Callable[..., Logged], per_migration: bool
) -> None:
    project.app.extensions["migrate"].configure_args["transaction_per_migration"] = per_migration
    project.init("lock_timeout='50ms'")
    project.write("aaa", None, 'op.create_table("a", sa.Column("id", sa.Integer))')
    project.write("bbb", "aaa", 'op.create_table("b", sa.Column("id", sa.Integer)); ' + BUSY)
    seen = []

    def free() -> None:
        seen.extend(look("select relname::text from pg_class where relname in ('a', 'b') order by 1"))
        blocker.rollback()

    log = logged(free)
    project.flask("upgrade")
    assert seen == (["a"] if per_migration else [])
    (line,) = log.lines
    assert "ALTER TABLE busy ADD COLUMN note" in line
    assert f"attempt 2 of 5 in 0.05 s. pid {blocker.info.backend_pid} (" in line
    assert "the blocker" in line
    assert "holds AccessShareLock on busy" in line
    assert look("select version_num from alembic_version") == ["bbb"]
    assert look(ADVISORY_LOCKS) == [0]
    with project.app.app_context(), project.db.engine.begin() as connection:
        assert connection.scalar(sa.text("show lock_timeout")) == "0"


def test_i6_giving_up_names_who_is_in_the_way_and_leaves_nothing(
    project: Guarded, look: Look, blocker: psycopg.Connection[Any], logged: Callable[..., Logged]
) -> None:
    project.init("lock_timeout='20ms', tries=3")
    project.write("aaa", None, 'op.create_table("a", sa.Column("id", sa.Integer)); ' + BUSY)
    log = logged()
    error = project.flask("upgrade", fails=True).exception
    assert isinstance(error, LockTimeout)
    assert len(log.lines) == 2
    assert "Tried 3 times; nothing of the migration is left." in str(error)
    assert f"pid {blocker.info.backend_pid} (" in str(error)
    assert "holds AccessShareLock on busy; its query: select * from busy" in str(error)
    assert look(OBJECTS) == ["r busy"]
    assert look(ADVISORY_LOCKS) == [0]


def test_i6_what_was_committed_in_the_middle_is_not_run_again(
    project: Guarded, look: Look, blocker: psycopg.Connection[Any], logged: Callable[..., Logged]
) -> None:
    project.init("lock_timeout='20ms'")
    project.write(
        "aaa",
        None,
        """op.create_table("a", sa.Column("id", sa.Integer))
    with op.get_context().autocommit_block():
        op.create_index("a_id_idx", "a", ["id"], postgresql_concurrently=True)
    op.create_table("b", sa.Column("id", sa.Integer))
    """
        + BUSY,
    )
    log = logged()
    error = project.flask("upgrade", fails=True).exception
    assert isinstance(error, sa.exc.OperationalError)
    assert not isinstance(error, LockTimeout)
    assert log.lines == []
    assert [line for line in look(OBJECTS) if line[0] in "ri" and "alembic" not in line] == [
        "i a_id_idx", "r a", "r busy",
    ]  # fmt: skip
    assert look(ADVISORY_LOCKS) == [0]


def test_i6_what_counts_as_committed_in_the_middle(database_url: str, look: Look) -> None:
    look("create table a (id int)")
    engine = sa.create_engine(database_url, poolclass=sa.NullPool)
    insert = sa.text("insert into a values (1)")

    def reads(connection: sa.Connection) -> None:
        connection.execute(sa.select(1))
        connection.commit()

    def rolls_back(connection: sa.Connection) -> None:
        connection.execute(insert)
        connection.rollback()

    def commits(connection: sa.Connection) -> None:
        connection.execute(insert)
        connection.commit()

    def commits_by_text(connection: sa.Connection) -> None:
        connection.execute(insert)
        connection.exec_driver_sql("COMMIT")

    def in_autocommit(connection: sa.Connection) -> None:
        connection.execution_options(isolation_level="AUTOCOMMIT").execute(insert)

    def fails_in_autocommit(connection: sa.Connection) -> None:
        with pytest.raises(sa.exc.ProgrammingError):
            connection.execution_options(isolation_level="AUTOCOMMIT").execute(sa.text("nonsense"))

    def in_another_thread(connection: sa.Connection) -> None:
        def work() -> None:
            with engine.begin() as other:
                other.execute(insert)
                timeouts.append(other.scalar(sa.text("show lock_timeout")))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    timeouts: list[Any] = []
    whole = {}
    for work in (
        reads, rolls_back, commits, commits_by_text, in_autocommit, fails_in_autocommit, in_another_thread
    ):  # fmt: skip
        with Watch([engine, engine], 1234) as watch, engine.connect() as connection:
            if work is rolls_back:
                timeouts.append(connection.scalar(sa.text("show lock_timeout")))
            work(connection)
        whole[work.__name__] = watch.whole
    assert [name for name, is_whole in whole.items() if is_whole] == ["reads", "rolls_back", "in_another_thread"]
    assert timeouts == ["1234ms", "0"]


@pytest.mark.parametrize("driver", ["psycopg"], indirect=True)
def test_i6_several_databases(
    make_app: MakeApp, tmp_path: Path, look: Look, database_url: str, logged: Callable[..., Logged]
) -> None:
    """Two binds that are one database, which must not wait for itself, and one that is SQLite."""
    db = DB()
    binds = {"same": database_url, "lite": f"sqlite:///{tmp_path / 'lite.db'}"}
    project = Guarded(make_app(db, SQLALCHEMY_BINDS=binds), db, tmp_path)
    project.init("wait='5s'", "*target_db.engines.values()", "--multidb")
    project.write("aaa", None, "op.create_table(engine_name or 'a', sa.Column('id', sa.Integer))")
    path = project.directory / "versions" / "aaa_.py"
    path.write_text(path.read_text().replace("upgrade()", "upgrade(engine_name)"))
    env = project.directory / "env.py"
    # one database cannot have its version table made twice
    env.write_text(env.read_text().replace("**conf_args", "version_table=f'version_{name}', **conf_args"))
    log = logged()
    project.flask("upgrade")
    assert log.lines == []
    assert look("select tablename from pg_tables where schemaname = 'public' order by 1") == [
        "a", "same", "version_", "version_same",
    ]  # fmt: skip
    assert look(ADVISORY_LOCKS) == [0]


# -- bad input --------------------------------------------------------------------------------------------------------


def test_i6_bad_arguments() -> None:
    engine = sa.create_engine("postgresql+psycopg2://")
    bad: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((), {}, "expected the engines"),
        (("postgresql://",), {}, "expected the engines"),
        ((engine,), {"tries": 0}, "tries = 0"),
        ((engine,), {"tries": True}, "tries = True"),
        ((engine,), {"wait": 0}, "wait = 0"),
        ((engine,), {"lock_timeout": "5 parsecs"}, "lock_timeout = '5 parsecs'"),
    ]
    for engines, arguments, message in bad:
        with pytest.raises(ConfigurationError, match=message):
            fictive.migrations.run(lambda: pytest.fail("it was called"), *engines, **arguments)


def test_i6_without_alembic(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("fictive.migrations")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "alembic.runtime.plugins", None)
    with pytest.raises(ImportError, match=r"pip install flask-migrate 'alembic>=1.19.2'"):
        importlib.import_module("fictive.migrations")
