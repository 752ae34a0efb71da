"""Contract A, what stays SQLAlchemy's and what goes around it: A16, A19, A20, A22, and the session without Flask."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flask_sqlalchemy.model
import flask_sqlalchemy.query
import flask_sqlalchemy.record_queries
import flask_sqlalchemy.session
import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask
from pytest_postgresql.janitor import DatabaseJanitor
from sqlalchemy.orm import DeclarativeBase, DeclarativeBaseNoMeta, Mapped, MappedAsDataclass, mapped_column

from fictive.errors import ConfigurationError, TransactionAborted, TransactionAlreadyBegun, TransactionRequired
from fictive.sqlalchemy import OptInScopedSession, OptInSession, Transaction, WritesOutside, sessionmaker
from fictive.testing import postgres
from fictive.testing.wire import Wire
from tests.conftest import MakeApp
from tests.models import DB, Booking, Child, Item, Tag, db
from tests.wirelog import own_verbs, verbs

Look = Callable[..., list[Any]]
Backends = Callable[[], list[str]]


# -- A16 --------------------------------------------------------------------------------------------------------------


def use_session() -> None:
    """Let the session change the modes of the one pooled connection first."""
    db.session.execute(sa.text("select 1"))
    db.session.execute(sa.insert(Tag).values(label="before"))
    with contextlib.suppress(ZeroDivisionError), db.session.begin():
        db.session.execute(sa.text("select 1"))
        raise ZeroDivisionError


@pytest.mark.usefixtures("app")
class TestCore:
    @pytest.mark.parametrize("error", [None, ZeroDivisionError])
    def test_a16_engine_begin_is_atomic(self, error: type[Exception] | None, wire: Wire, look: Look) -> None:
        use_session()
        with wire.record() as log, contextlib.suppress(ZeroDivisionError), db.engine.begin() as connection:
            connection.execute(sa.insert(Item).values(name="a"))
            connection.execute(sa.insert(Item).values(name="b"))
            assert look("select count(*) from item") == [0]
            if error:
                raise error
        assert own_verbs(log) == ["BEGIN", "INSERT", "INSERT", "ROLLBACK" if error else "COMMIT"]
        assert look("select count(*) from item") == [0 if error else 2]

    def test_a16_engine_connect_begins_by_itself_and_forgets_what_was_not_committed(
        self, wire: Wire, look: Look
    ) -> None:
        use_session()
        with wire.record() as log, db.engine.connect() as connection:
            connection.execute(sa.insert(Item).values(name="a"))
            assert connection.in_transaction()
            connection.commit()
            connection.execute(sa.insert(Item).values(name="b"))
        assert own_verbs(log) == ["BEGIN", "INSERT", "COMMIT", "BEGIN", "INSERT", "ROLLBACK"]
        assert look("select name from item") == ["a"]

    def test_a16_savepoints_of_core(self, look: Look) -> None:
        use_session()
        with db.engine.begin() as connection:
            connection.execute(sa.insert(Item).values(name="a"))
            with contextlib.suppress(sa.exc.IntegrityError), connection.begin_nested():
                connection.execute(sa.insert(Item).values(name="a"))
        assert look("select name from item") == ["a"]

    def test_a16_autocommit_asked_of_core_is_autocommit(self, wire: Wire, look: Look) -> None:
        use_session()
        with wire.record() as log, db.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.insert(Item).values(name="a"))
            assert look("select count(*) from item") == [1]
        assert "BEGIN" not in verbs(log)
        with wire.record() as log, pytest.raises(ZeroDivisionError), db.engine.begin() as connection:
            connection.execute(sa.insert(Item).values(name="b"))
            raise ZeroDivisionError
        assert look("select count(*) from item") == [1]
        with wire.record() as log, db.session.begin():
            db.session.execute(sa.insert(Item).values(name="c"))
        assert own_verbs(log) == ["BEGIN", "INSERT", "COMMIT"]

    def test_a16_raw_connections_are_transactional(self, look: Look) -> None:
        use_session()
        raw = db.engine.raw_connection()
        cursor = raw.cursor()
        cursor.execute("insert into item (name) values ('a')")
        raw.close()
        assert look("select count(*) from item") == [0]

    def test_a16_get_bind_is_the_engine(self, look: Look) -> None:
        assert db.session.get_bind() is db.engine
        assert db.session().get_bind(sa.inspect(Item)) is db.engine
        db.session.execute(sa.text("select 1"))
        assert db.session.get_bind() is db.engine
        with db.session.begin():
            db.session.execute(sa.text("select 1"))
            assert db.session.get_bind() is db.engine
        with contextlib.suppress(ZeroDivisionError), db.session.get_bind().begin() as connection:
            connection.execute(sa.insert(Item).values(name="a"))
            raise ZeroDivisionError
        assert look("select count(*) from item") == [0]

    def test_a16_a_transaction_begun_on_the_bind_within_pinned_is_one(self, look: Look) -> None:
        with db.pinned():
            db.session.execute(sa.text("select 1"))
            with contextlib.suppress(ZeroDivisionError), db.session.get_bind().begin():
                bind = db.session.get_bind()
                if isinstance(bind, sa.Connection):
                    bind.execute(sa.insert(Item).values(name="a"))
                else:
                    db.session.execute(sa.insert(Item).values(name="a"))
                assert look("select count(*) from item") == [0]
                raise ZeroDivisionError
        assert look("select count(*) from item") == [0]

    @pytest.mark.parametrize("door", ["create_all", "metadata", "connection"])
    def test_a16_create_all_is_atomic(self, door: str, make_app: MakeApp, look: Look) -> None:
        class Base(DeclarativeBase):
            pass

        other = DB(model_class=Base)
        other.Table("first_table", sa.Column("id", sa.Integer, primary_key=True))
        other.Table(
            "second_table",
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("first_id", sa.ForeignKey("first_table.id")),
            sa.Column("n", sa.Integer, server_default=sa.text("no_such_function()")),
        )
        app = make_app(other)
        with app.app_context():
            other.session.execute(sa.text("select 1"))
            with pytest.raises(sa.exc.ProgrammingError):
                if door == "create_all":
                    other.create_all()
                elif door == "metadata":
                    other.metadata.create_all(other.session.get_bind())
                else:
                    with other.session.begin():
                        other.metadata.create_all(other.session.connection())
            assert other.engine.pool.checkedout() == 0
        assert look("select tablename from pg_tables where tablename in ('first_table', 'second_table')") == []

    def test_a16_create_all_and_drop_all_work(self, app: Flask, look: Look) -> None:
        use_session()
        db.drop_all()
        assert look("select count(*) from pg_tables where schemaname = 'public'") == [0]
        db.create_all()
        assert look("select count(*) from pg_tables where schemaname = 'public'") == [7]
        db.session.add(Item(name="a"))
        db.session.commit()

    def test_a16_reflect_and_inspect(self) -> None:
        use_session()
        assert "item" in sa.inspect(db.engine).get_table_names()
        assert db.engine.pool.checkedout() == 0


ENV = """
from alembic import context
from flask import current_app

engine = current_app.extensions["sqlalchemy"].engine
with engine.connect() as connection:
    context.configure(connection=connection, target_metadata=None)
    with context.begin_transaction():
        context.run_migrations()
"""

MIGRATION = """
from alembic import op
import sqlalchemy as sa

revision = "{revision}"
down_revision = {down}


def upgrade():
    {upgrade}


def downgrade():
    {downgrade}
"""


class TestMigrations:
    """Through Alembic's commands, with the env.py that Flask-Migrate's users have: on `db.engine.connect()`."""

    @pytest.fixture
    def alembic(self, tmp_path: Path, app: Flask) -> Any:
        pytest.importorskip("alembic")
        from alembic import command
        from alembic.config import Config

        versions = tmp_path / "migrations" / "versions"
        versions.mkdir(parents=True)
        (tmp_path / "migrations" / "env.py").write_text(ENV)

        class Migrations:
            config = Config()

            def write(self, revision: str, upgrade: str, downgrade: str = "pass", down: str | None = None) -> None:
                text = MIGRATION.format(revision=revision, down=repr(down), upgrade=upgrade, downgrade=downgrade)
                (versions / f"{revision}.py").write_text(text)

            def upgrade(self, to: str = "head") -> None:
                command.upgrade(self.config, to)

            def downgrade(self, to: str) -> None:
                command.downgrade(self.config, to)

        Migrations.config.set_main_option("script_location", str(tmp_path / "migrations"))
        Migrations.config.set_main_option("path_separator", "os")
        return Migrations()

    def tables(self, look: Look) -> list[str]:
        return look(
            "select tablename from pg_tables where tablename in ('one', 'two', 'three', 'alembic_version') order by 1"
        )

    def test_a16_a_migration_whose_second_operation_fails_leaves_nothing(
        self, alembic: Any, look: Look, wire: Wire, backends: Backends
    ) -> None:
        use_session()
        alembic.write("a1", "op.create_table('one', sa.Column('id', sa.Integer)); op.execute('select 1/0')")
        with wire.record() as log, pytest.raises(sa.exc.DBAPIError):
            alembic.upgrade()
        assert self.tables(look) == []
        assert own_verbs(log)[-1] == "ROLLBACK"
        assert backends() == ["idle"]
        assert db.session.scalar(sa.text("select 1")) == 1

    def test_a16_of_two_migrations_the_second_fails_and_nothing_is_left(self, alembic: Any, look: Look) -> None:
        use_session()
        alembic.write("a1", "op.create_table('one', sa.Column('id', sa.Integer))")
        alembic.write("a2", "op.create_table('two', sa.Column('id', sa.Integer)); op.execute('nonsense')", down="a1")
        with pytest.raises(sa.exc.DBAPIError):
            alembic.upgrade()
        assert self.tables(look) == []

    def test_a16_a_good_migration_and_a_failing_downgrade(self, alembic: Any, look: Look) -> None:
        use_session()
        alembic.write(
            "a1",
            "op.create_table('one', sa.Column('id', sa.Integer))",
            "op.drop_table('one'); op.execute('select 1/0')",
        )
        alembic.upgrade()
        assert self.tables(look) == ["alembic_version", "one"]
        with pytest.raises(sa.exc.DBAPIError):
            alembic.downgrade("base")
        assert self.tables(look) == ["alembic_version", "one"]
        assert look("select version_num from alembic_version") == ["a1"]

    def test_a16_operations_on_a_connection_of_the_session(self, alembic: Any, look: Look) -> None:
        from alembic.migration import MigrationContext
        from alembic.operations import Operations

        with contextlib.suppress(sa.exc.DBAPIError), db.session.begin():
            operations = Operations(MigrationContext.configure(db.session.connection()))
            operations.create_table("one", sa.Column("id", sa.Integer))
            operations.execute("select 1/0")
        assert self.tables(look) == []


# -- A19 --------------------------------------------------------------------------------------------------------------


class _Base(DeclarativeBase):
    pass


two = DB(model_class=_Base)


class Here(two.Model):  # type: ignore[name-defined, misc]
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


class There(two.Model):  # type: ignore[name-defined, misc]
    __bind_key__ = "other"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    seat: Mapped[int | None]
    lines: Mapped[list[ThereLine]] = sa_orm.relationship(cascade="all, delete-orphan")
    __table_args__ = (sa.UniqueConstraint("seat", deferrable=True, initially="DEFERRED"),)


class ThereLine(two.Model):  # type: ignore[name-defined, misc]
    __bind_key__ = "other"
    id: Mapped[int] = mapped_column(primary_key=True)
    there_id: Mapped[int] = mapped_column(sa.ForeignKey("there.id"))
    size: Mapped[int] = mapped_column(sa.CheckConstraint("size > 0"), default=1)


class TestBinds:
    @pytest.fixture
    def other_name(self, pg: postgres.Server, database_name: str) -> Iterator[str]:
        janitor = DatabaseJanitor(
            user=pg.user, host=pg.host, port=pg.port, dbname=f"{database_name}_other", password=pg.password
        )
        with janitor:
            yield janitor.dbname

    @pytest.fixture
    def look_there(self, pg: postgres.Server, other_name: str) -> Iterator[Look]:
        import psycopg

        with psycopg.connect(pg.url(other_name), autocommit=True) as connection:

            def look(query: str) -> list[Any]:
                cursor = connection.execute(query)
                rows = cursor.fetchall() if cursor.description else []
                return [row[0] if len(row) == 1 else row for row in rows]

            yield look

    @pytest.fixture
    def make_two(
        self, make_app: MakeApp, pg: postgres.Server, wire: Wire, other_name: str, driver: str, look_there: Look
    ) -> Callable[..., Flask]:
        def make(own: dict[str, Any] | None = None, **config: Any) -> Flask:
            url = wire.url(pg.url(other_name, driver=driver))
            bind: Any = url if own is None else {"url": url, **own}
            app = make_app(two, SQLALCHEMY_BINDS={"other": bind}, **config)
            with app.app_context():
                two.create_all()
            return app

        return make

    @pytest.fixture
    def there(self, make_two: Callable[..., Flask]) -> Iterator[Flask]:
        app = make_two()
        with app.app_context():
            yield app
            assert not two.session.in_transaction()
            for engine in two.engines.values():
                assert engine.pool.checkedout() == 0

    @pytest.mark.usefixtures("there")
    def test_a19_a_statement_is_one_round_trip(self, wire: Wire, look_there: Look) -> None:
        look_there("insert into there (name) values ('a')")
        look_there("insert into there_line (there_id, size) values (1, 1)")
        with wire.record() as log:
            row = two.session.get(There, 1)
            assert len(row.lines) == 1
            assert two.session.scalar(sa.select(There.name)) == "a"
            assert There.query.count() == 1
            assert two.paginate(sa.select(There)).total == 1
            two.session.execute(sa.insert(There).values(name="b"))
            two.session.execute(sa.update(There).where(There.name == "b").values(seat=1))
            two.session.execute(sa.text("select 1"), bind_arguments={"bind": two.engines["other"]})
        assert verbs(log) == ["SELECT"] * 6 + ["INSERT", "UPDATE", "SELECT"]
        assert log.time_in_transaction == 0
        assert two.engines["other"].pool.checkedout() == 0
        assert look_there(
            "select state from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
        ) == ["idle"]

    @pytest.mark.usefixtures("there")
    @pytest.mark.parametrize("error", [None, ValueError(), KeyboardInterrupt()])
    def test_a19_a_block_is_a_transaction(self, error: BaseException | None, wire: Wire, look_there: Look) -> None:
        two.session.execute(sa.select(There))
        with wire.record() as log, pytest.raises(type(error)) if error else contextlib.nullcontext():
            with two.session.begin():
                two.session.add(There(name="a"))
                two.session.flush()
                assert look_there("select count(*) from there") == [0]
                with contextlib.suppress(sa.exc.IntegrityError), two.session.begin_nested():
                    two.session.execute(sa.insert(There).values(name="a"))
                if error:
                    raise error
        assert own_verbs(log) == [
            "BEGIN", "INSERT", "SAVEPOINT", "INSERT", "ROLLBACK", "ROLLBACK" if error else "COMMIT",
        ]  # fmt: skip
        assert look_there("select count(*) from there") == [0 if error else 1]

    @pytest.mark.usefixtures("there")
    @pytest.mark.parametrize(
        "write",
        [
            lambda: (two.session.add(There(name="p", lines=[ThereLine(), ThereLine(size=-1)])), two.session.flush()),
            lambda: (two.session.add_all([There(name="x"), There(name="x")]), two.session.commit()),
            lambda: two.session.execute(sa.insert(There), [{"name": "x"}, {"name": "x"}]),
            lambda: two.session.bulk_save_objects([There(name="x"), There(name="x")]),
            lambda: two.session.bulk_insert_mappings(There, [{"name": "x"}, {"name": "x"}]),
            lambda: (two.session.add_all([There(name="1", seat=1), There(name="2", seat=1)]), two.session.flush()),
        ],
    )
    def test_a19_a_flush_outside_is_atomic(self, write: Callable[[], Any], look_there: Look) -> None:
        with pytest.raises(sa.exc.IntegrityError):
            write()
        assert look_there("select count(*) from there") == [0]
        assert two.engines["other"].pool.checkedout() == 0
        assert two.session.scalar(sa.select(sa.func.count()).select_from(There)) == 0

    @pytest.mark.usefixtures("there")
    def test_a19_commit_and_rollback_outside(self, wire: Wire, look_there: Look) -> None:
        two.session.add(There(name="a"))
        with wire.record() as log:
            two.session.commit()
            two.session.commit()
        assert verbs(log) == ["BEGIN", "INSERT", "COMMIT"]
        two.session.add(There(name="b"))
        with wire.record() as log:
            two.session.rollback()
        assert verbs(log) == []
        assert look_there("select name from there") == ["a"]

    @pytest.mark.usefixtures("there")
    @pytest.mark.parametrize("begin", ["block", "flush", "commit", "bulk"])
    def test_a19_one_failing_bind_takes_the_other_with_it(self, begin: str, look: Look, look_there: Look) -> None:
        look_there("insert into there (name) values ('taken')")
        objects = [Here(name="a"), There(name="taken")]
        with pytest.raises(sa.exc.IntegrityError):
            if begin == "block":
                with two.session.begin():
                    two.session.add_all(objects)
            elif begin == "bulk":
                two.session.bulk_save_objects(objects)
            else:
                two.session.add_all(objects)
                getattr(two.session, begin)()
        assert look("select count(*) from here") == [0]

    @pytest.mark.usefixtures("there")
    @pytest.mark.parametrize("aborted", ["here", "there"])
    def test_a19_an_honest_commit_over_both(self, aborted: str, look: Look, look_there: Look) -> None:
        with pytest.raises(TransactionAborted) as raised, two.session.begin():
            two.session.execute(sa.insert(Here).values(name="a"))
            two.session.execute(sa.insert(There).values(name="a"))
            bind = two.engine if aborted == "here" else two.engines["other"]
            with pytest.raises(sa.exc.DBAPIError) as first:
                two.session.execute(sa.text("select 1/0"), bind_arguments={"bind": bind})
        assert raised.value.__cause__ is first.value
        assert (look("select count(*) from here"), look_there("select count(*) from there")) == ([0], [0])

    @pytest.mark.usefixtures("there")
    def test_a19_both_in_one_block(self, wire: Wire, look: Look, look_there: Look) -> None:
        with wire.record() as log, two.session.begin():
            two.session.add_all([Here(name="a"), There(name="a")])
        assert sorted(verbs(log)) == ["BEGIN", "BEGIN", "COMMIT", "COMMIT", "INSERT", "INSERT"]
        assert (look("select count(*) from here"), look_there("select count(*) from there")) == ([1], [1])

    @pytest.mark.usefixtures("there")
    def test_a19_streams_guards_and_options(self, wire: Wire, look_there: Look) -> None:
        look_there("insert into there (name) select g\\:\\:text from generate_series(1, 5) g".replace("\\", ""))
        with wire.record() as log:
            rows = two.session.scalars(sa.select(There), execution_options={"yield_per": 2})
            assert len(rows.all()) == 5
        assert "READ ONLY" in log.statements[0]
        with wire.record() as log, pytest.raises(TransactionRequired):
            two.session.execute(sa.select(There).with_for_update())
        assert verbs(log) == []
        with wire.record() as log, two.session().transaction(isolation_level="SERIALIZABLE", read_only=True):
            two.session.scalars(sa.select(There)).all()
        assert all(word in log.statements[0] for word in ("SERIALIZABLE", "READ ONLY"))
        with wire.record() as log, two.session.begin():
            two.session.scalars(sa.select(There)).all()
        assert log.statements[0].startswith("BEGIN")
        assert not {"SERIALIZABLE", "READ"} & set(log.statements[0].split())

    @pytest.mark.usefixtures("there")
    def test_a19_pinned_keeps_one_connection_for_each(self, look_there: Look) -> None:
        def pids() -> tuple[int, int]:
            here, there = (
                two.session.scalar(sa.text("select pg_backend_pid()"), bind_arguments={"bind": bind})
                for bind in (two.engine, two.engines["other"])
            )
            return here, there

        with two.pinned():
            first = pids()
            two.session.execute(sa.text("set work_mem = '3MB'"), bind_arguments={"bind": two.engines["other"]})
            two.session.execute(sa.insert(There).values(name="a"))
            with two.session.begin():
                assert pids() == first
            assert pids() == first
        show = sa.text("show work_mem")
        assert two.session.scalar(show, bind_arguments={"bind": two.engines["other"]}) != "3MB"

    def test_a19_the_configuration_is_left_as_it_was(self, make_two: Callable[..., Flask]) -> None:
        options = {"pool_size": 3}
        app = make_two({"pool_recycle": 5}, SQLALCHEMY_ENGINE_OPTIONS=options)
        assert options == {"pool_size": 3}
        assert set(app.config["SQLALCHEMY_BINDS"]["other"]) == {"url", "pool_recycle"}

    def test_a19_a_bind_on_another_kind_of_database(self, make_app: MakeApp, tmp_path: Path, look: Look) -> None:
        mixed = DB(model_class=type("Base", (DeclarativeBase,), {}))
        columns = [sa.Column("id", sa.Integer, primary_key=True), sa.Column("name", sa.String)]
        here = mixed.Table("here", *[column._copy() for column in columns])
        there = mixed.Table("there", *[column._copy() for column in columns], bind_key="other")
        app = make_app(
            mixed,
            SQLALCHEMY_BINDS={"other": f"sqlite:///{tmp_path / 'other.db'}"},
            SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 3, "connect_args": {"options": "-c work_mem=3MB"}},
        )
        with app.app_context():
            mixed.create_all()
            for error in (ZeroDivisionError, None):
                with contextlib.suppress(ZeroDivisionError), mixed.session.begin():
                    mixed.session.execute(sa.insert(here).values(name="a"))
                    mixed.session.execute(sa.insert(there).values(name="a"))
                    if error:
                        raise error
                count = sa.select(sa.func.count()).select_from(there)
                found = mixed.session.scalar(count, bind_arguments={"clause": there})
                assert found == look("select count(*) from here")[0] == (0 if error else 1)

    def test_a19_autocommit_on_a_bind_is_refused(
        self, make_app: MakeApp, pg: postgres.Server, other_name: str
    ) -> None:
        with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
            make_app(
                DB(),
                SQLALCHEMY_BINDS={
                    "other": {"url": pg.url(other_name, driver="psycopg"), "isolation_level": "AUTOCOMMIT"}
                },
            )


# -- A20 --------------------------------------------------------------------------------------------------------------


class TestLog:
    @pytest.fixture
    def said(self, make_app: MakeApp, caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
        """What `SQLALCHEMY_ECHO` has logged since it was last asked: first words, parameters left out."""
        app = make_app(db, SQLALCHEMY_ECHO=True)
        with app.app_context():
            caplog.clear()

            def messages() -> list[str]:
                found = [record.getMessage() for record in caplog.records if "sqlalchemy.engine" in record.name]
                caplog.clear()
                assert not [message for message in found if "autocommit" in message.lower()]
                return [message.split()[0] for message in found if not message.startswith("[")]

            yield messages

    def test_a20_outside_only_the_statements(self, said: Callable[[], list[str]]) -> None:
        db.session.scalars(sa.select(Item)).all()
        assert db.session.get(Item, 1) is None
        db.session.execute(sa.insert(Tag).values(label="a"))
        db.session.commit()
        assert said() == ["SELECT", "SELECT", "INSERT"]

    def test_a20_an_error_outside_rolls_nothing_back(self, said: Callable[[], list[str]], wire: Wire) -> None:
        seen: list[str] = []
        sa.event.listen(db.engine, "rollback", lambda conn: seen.append("rollback"))
        with wire.record() as log, pytest.raises(sa.exc.DBAPIError):
            db.session.execute(sa.text("select 1/0"))
        assert verbs(log) == ["SELECT"]
        assert said() == ["select"]
        assert seen == []

    def test_a20_inside_begin_to_commit(self, said: Callable[[], list[str]]) -> None:
        for _ in range(3):
            db.session.execute(sa.text("select 1"))
            with db.session.begin():
                db.session.execute(sa.text("select 2"))
                with db.session.begin_nested():
                    db.session.execute(sa.text("select 3"))
            assert said() == ["select", "BEGIN", "select", "SAVEPOINT", "select", "RELEASE", "COMMIT"]
            with contextlib.suppress(ZeroDivisionError), db.session.begin():
                db.session.execute(sa.text("select 2"))
                raise ZeroDivisionError
            assert said() == ["BEGIN", "select", "ROLLBACK"]

    def test_a20_flushes_streams_and_core(self, said: Callable[[], list[str]]) -> None:
        db.session.add(Item(name="a"))
        db.session.flush()
        assert said() == ["BEGIN", "INSERT", "COMMIT"]
        db.session.add(Item(name="b"))
        db.session.commit()
        assert said() == ["BEGIN", "INSERT", "COMMIT"]
        db.session.scalars(sa.select(Item), execution_options={"yield_per": 1}).all()
        assert said() in (["BEGIN", "SELECT", "COMMIT"], ["BEGIN", "SELECT", "ROLLBACK"])
        with db.engine.begin() as connection:
            connection.execute(sa.text("select 1"))
        assert said() == ["BEGIN", "select", "COMMIT"]
        with db.pinned():
            db.session.execute(sa.text("select 1"))
            with db.session.begin():
                db.session.execute(sa.text("select 2"))
            db.session.execute(sa.text("select 3"))
        assert said() == ["select", "BEGIN", "select", "COMMIT", "select"]

    def test_a20_what_is_logged_is_what_was_sent(self, said: Callable[[], list[str]], wire: Wire) -> None:
        with wire.record() as log:
            db.session.execute(sa.text("select 1"))
            db.session.add(Item(name="a"))
            db.session.commit()
            db.session.add(Item(name="a"))
            with contextlib.suppress(sa.exc.DBAPIError):
                db.session.commit()
            with db.session.begin():
                db.session.execute(sa.text("select 1"))
            with db.session.begin():
                pass
        assert [word.upper() for word in said()] == own_verbs(log)

    @pytest.mark.usefixtures("app")
    def test_a20_listeners_see_the_users_statements_only(self) -> None:
        seen: list[str] = []

        def before(conn: Any, cursor: Any, statement: str, *_: Any) -> None:
            seen.append(statement.split()[0].upper())

        sa.event.listen(sa.Engine, "before_cursor_execute", before)
        try:
            db.session.execute(sa.text("select 1"))
            db.session.add(Item(name="a"))
            db.session.commit()
            with db.session.transaction(isolation_level="SERIALIZABLE"):
                db.session.execute(sa.text("select 1"))
            with db.session.begin():
                db.session.execute(sa.insert(Item).values(name="b"))
            db.session.scalars(sa.select(Item), execution_options={"yield_per": 1}).all()
            with db.pinned():
                db.session.execute(sa.text("select 1"))
        finally:
            sa.event.remove(sa.Engine, "before_cursor_execute", before)
        assert seen == ["SELECT", "INSERT", "SELECT", "INSERT", "SELECT", "SELECT"]

    def test_a20_m3_transaction_events_of_the_engine_tell_the_truth(self, app: Flask) -> None:
        seen: list[str] = []
        for name in ("commit", "rollback"):
            sa.event.listen(db.engine, name, lambda conn, name=name: seen.append(name))
        db.session.execute(sa.text("select 1"))
        db.session.execute(sa.insert(Tag).values(label="a"))
        db.session.commit()
        assert seen == []
        with db.session.begin():
            db.session.execute(sa.text("select 1"))
        assert seen == ["commit"]
        seen.clear()

        sa.event.listen(db.engine, "begin", lambda conn: seen.append("begin"))
        with db.session.begin():
            db.session.execute(sa.text("select 1"))
        assert seen == ["begin", "commit"]
        db.session.execute(sa.text("select 1"))
        assert seen == ["begin", "commit"] * 2
        db.session.scalars(sa.select(Tag), execution_options={"yield_per": 1}).all()
        assert seen[4] == "begin"
        assert len(seen) == 6

    def test_a20_recorded_queries(self, make_app: MakeApp) -> None:
        app = make_app(db, SQLALCHEMY_RECORD_QUERIES=True)
        with app.app_context():
            db.session.add(Item(name="a"))
            db.session.commit()
            db.session.scalars(sa.select(Item)).all()
            with db.session.begin():
                db.session.execute(sa.text("select 1"))
            db.session.execute(sa.text("select 2"))
            db.session.scalars(sa.select(Item), execution_options={"yield_per": 1}).all()
            found = flask_sqlalchemy.record_queries.get_recorded_queries()
        assert [info.statement.split()[0].upper() for info in found] == [
            "INSERT",
            "SELECT",
            "SELECT",
            "SELECT",
            "SELECT",
        ]
        assert all(info.duration >= 0 for info in found)


# -- A22 --------------------------------------------------------------------------------------------------------------


def make_thing(other: Any) -> Any:
    """A model on whatever base `other` has."""
    namespace = {"__tablename__": "tag", "__module__": __name__, "__qualname__": "Thing"}
    declared = issubclass(other.Model, (DeclarativeBase, DeclarativeBaseNoMeta))
    if issubclass(other.Model, MappedAsDataclass):
        namespace["__annotations__"] = {"id": Mapped[int], "label": Mapped[str]}
        namespace.update(id=mapped_column(primary_key=True, init=False), label=mapped_column(unique=True))
    elif declared:
        namespace["__annotations__"] = {"id": Mapped[int], "label": Mapped[str]}
        namespace.update(id=mapped_column(primary_key=True), label=mapped_column(unique=True))
    else:
        namespace.update(
            id=other.Column(other.Integer, primary_key=True), label=other.Column(other.String, unique=True)
        )
    return type(other.Model)("Thing", (other.Model,), namespace)


class LegacyModel(flask_sqlalchemy.model.Model):
    def hello(self) -> str:
        return "hello"


MODEL_CLASSES: dict[str, Callable[[], dict[str, Any]]] = {
    "default": dict,
    "legacy": lambda: {"model_class": LegacyModel},
    "declarative": lambda: {"model_class": type("Base", (DeclarativeBase,), {})},
    "no meta": lambda: {"model_class": type("Base", (DeclarativeBaseNoMeta,), {})},
    "dataclass": lambda: {"model_class": type("Base", (DeclarativeBase, MappedAsDataclass), {})},
    "dataclass no meta": lambda: {"model_class": type("Base", (MappedAsDataclass, DeclarativeBaseNoMeta), {})},
}


class TestOwnClasses:
    @pytest.mark.parametrize("options", MODEL_CLASSES.values(), ids=MODEL_CLASSES.keys())
    def test_a22_model_class(self, options: Callable[[], dict[str, Any]], make_app: MakeApp, wire: Wire) -> None:
        other = DB(**options())
        self.use(other, make_thing(other), make_app, wire)

    def test_a22_models_that_are_dataclasses_themselves(self, make_app: MakeApp, wire: Wire) -> None:
        other = DB(model_class=type("Base", (DeclarativeBase,), {}))

        class Thing(MappedAsDataclass, other.Model):  # type: ignore[name-defined, misc]
            __tablename__ = "tag"
            id: Mapped[int] = mapped_column(primary_key=True, init=False)
            label: Mapped[str] = mapped_column(unique=True)

        self.use(other, Thing, make_app, wire)

    def use(self, other: Any, Thing: Any, make_app: MakeApp, wire: Wire) -> None:
        app = make_app(other)
        with app.app_context():
            other.session.add(Thing(label="a"))
            with wire.record() as log:
                other.session.commit()
                assert [thing.label for thing in Thing.query.all()] == ["a"]
                assert other.session.scalars(sa.select(Thing)).one().label == "a"
                assert other.get_or_404(Thing, 1).label == "a"
            assert verbs(log) == ["BEGIN", "INSERT", "COMMIT", "SELECT", "SELECT", "SELECT"]
            with contextlib.suppress(ZeroDivisionError), other.session.begin():
                other.session.add(Thing(label="b"))
                other.session.flush()
                raise ZeroDivisionError
            other.session.add_all([Thing(label="c"), Thing(label="c")])
            with pytest.raises(sa.exc.IntegrityError):
                other.session.commit()
            assert Thing.query.count() == 1

    def test_a22_a_session_class_that_overrides_execute_commit_and_get_bind(
        self, make_app: MakeApp, wire: Wire, look: Look
    ) -> None:
        calls: list[str] = []

        class Mine(flask_sqlalchemy.session.Session):
            extra = "kept"

            def execute(self, *args: Any, **kwargs: Any) -> Any:
                calls.append("execute")
                return super().execute(*args, **kwargs)

            def commit(self) -> None:
                calls.append("commit")
                super().commit()

            def rollback(self) -> None:
                calls.append("rollback")
                super().rollback()

            def flush(self, *args: Any, **kwargs: Any) -> None:
                calls.append("flush")
                super().flush(*args, **kwargs)

            def get_bind(self, *args: Any, **kwargs: Any) -> Any:
                calls.append("get_bind")
                return super().get_bind(*args, **kwargs)

        other = DB(model_class=type("Base", (DeclarativeBase,), {}), session_options={"class_": Mine})
        app = make_app(other)
        Thing = make_thing(other)
        with app.app_context():
            session = other.session()
            assert isinstance(session, Mine)
            assert isinstance(session, OptInSession)
            assert session.extra == "kept"
            assert type(session).__name__ == "Mine"
            for call, expected in (
                (lambda: other.session.execute(sa.text("select 1")), ["execute", "get_bind"]),
                (lambda: other.session.commit(), ["commit"]),
                (lambda: other.session.rollback(), ["rollback"]),
                (lambda: other.session.scalars(sa.select(Thing)).all(), ["execute", "get_bind"]),
                (lambda: other.session.get(Thing, 1), ["execute", "get_bind"]),
            ):
                calls.clear()
                with wire.record() as log:
                    call()
                assert [each for each in expected if each in calls] == expected
                assert not {"BEGIN", "COMMIT", "ROLLBACK"} & set(verbs(log))
            calls.clear()
            other.session.add(Thing(label="a"))
            with wire.record() as log:
                other.session.commit()
            assert "commit" in calls
            assert verbs(log) == ["BEGIN", "INSERT", "COMMIT"]
            with wire.record() as log, other.session.begin():
                other.session.add(Thing(label="b"))
            assert verbs(log) == ["BEGIN", "INSERT", "COMMIT"]
            assert look("select label from tag order by 1") == ["a", "b"]
            assert other.engine.pool.checkedout() == 0

    def test_a22_a_session_class_that_routes_reads_to_a_replica(
        self, make_app: MakeApp, wire: Wire, database_url: str, look: Look
    ) -> None:
        class Routing(flask_sqlalchemy.session.Session):
            def get_bind(self, mapper: Any = None, clause: Any = None, bind: Any = None, **kwargs: Any) -> Any:
                if bind is None and not self._flushing and isinstance(clause, sa.Select):
                    return replica
                return super().get_bind(mapper=mapper, clause=clause, bind=bind, **kwargs)

        replica = sa.create_engine(
            wire.url(database_url), connect_args={"options": "-c default_transaction_read_only=on"}
        )
        replica.connect().close()
        other = DB(model_class=type("Base", (DeclarativeBase,), {}), session_options={"class_": Routing})
        app = make_app(other)
        Thing = make_thing(other)
        with app.app_context():
            show = sa.select(sa.func.current_setting("default_transaction_read_only"))
            assert other.session.scalar(show) == "on"
            other.session.add(Thing(label="a"))
            other.session.commit()
            other.session.execute(sa.insert(Thing).values(label="b"))
            with other.session.begin():
                other.session.add(Thing(label="c"))
                assert other.session.scalar(show) == "on"
            assert len(other.session.scalars(sa.select(Thing)).all()) == 3
            assert replica.pool.checkedout() == other.engine.pool.checkedout() == 0
        replica.dispose()
        assert look("select count(*) from tag") == [3]

    def test_a22_a_session_class_that_is_opt_in_already(self, make_app: MakeApp, wire: Wire) -> None:
        class Mine(OptInSession, flask_sqlalchemy.session.Session):
            pass

        other = DB(model_class=type("Base", (DeclarativeBase,), {}), session_options={"class_": Mine})
        app = make_app(other, FICTIVE_WRITES_OUTSIDE="refuse")
        with app.app_context(), wire.record() as log:
            other.session.execute(sa.text("select 1"))
            assert other.session.writes_outside is WritesOutside.REFUSE
        assert verbs(log) == ["SELECT"]

    def test_a22_something_else_as_a_session_class(self) -> None:
        for wrong in (object, "Session", sa_orm.scoped_session):
            with pytest.raises(ConfigurationError, match="class_"):
                DB(session_options={"class_": wrong})

    def test_a22_scopefunc(self, make_app: MakeApp, wire: Wire) -> None:
        other = DB(
            model_class=type("Base", (DeclarativeBase,), {}), session_options={"scopefunc": threading.get_ident}
        )
        app = make_app(other)
        sessions: list[Any] = []
        with app.app_context():
            sessions.append(other.session())
            assert other.session() is sessions[0]
            with wire.record() as log:
                other.session.execute(sa.text("select 1"))
            assert verbs(log) == ["SELECT"]

            def elsewhere() -> None:
                with app.app_context():
                    sessions.append(other.session())
                    with other.session.begin():
                        other.session.execute(sa.text("select 1"))

            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            assert sessions[1] is not sessions[0]
            assert other.session() is sessions[0]

    @pytest.mark.parametrize("how", ["query_cls", "query_class"])
    def test_a22_query_class(self, how: str, make_app: MakeApp, wire: Wire) -> None:
        class Mine(flask_sqlalchemy.query.Query):  # type: ignore[type-arg]
            def labels(self) -> list[str]:
                return [thing.label for thing in self.all()]

        base = type("Base", (DeclarativeBase,), {})
        other = (
            DB(model_class=base, session_options={"query_cls": Mine})
            if how == "query_cls"
            else DB(model_class=base, query_class=Mine)
        )
        app = make_app(other)
        Thing = make_thing(other)
        with app.app_context():
            other.session.add(Thing(label="a"))
            other.session.commit()
            with wire.record() as log:
                assert other.session.query(Thing).labels() == ["a"]
            assert verbs(log) == ["SELECT"]
            if how == "query_class":
                assert Thing.query.labels() == ["a"]

    @pytest.mark.parametrize("value", [True, False])
    def test_a22_session_options_of_sqlalchemy(self, value: bool, make_app: MakeApp) -> None:
        other = DB(session_options={"autoflush": value, "expire_on_commit": value, "info": {"a": 1}})
        app = make_app(other)
        with app.app_context():
            assert other.session().autoflush is value
            assert other.session().expire_on_commit is value
            assert other.session().info["a"] == 1

    def test_a22_events_on_the_users_session_class(self, make_app: MakeApp) -> None:
        class Mine(flask_sqlalchemy.session.Session):
            pass

        seen: list[str] = []
        for name in ("before_flush", "after_flush", "before_commit", "after_commit"):
            sa.event.listen(Mine, name, lambda *_, name=name: seen.append(name))
        other = DB(model_class=type("Base", (DeclarativeBase,), {}), session_options={"class_": Mine})
        app = make_app(other)
        Thing = make_thing(other)
        with app.app_context():
            other.session.add(Thing(label="a"))
            other.session.commit()
        assert {"before_flush", "after_flush", "before_commit", "after_commit"} <= set(seen)


class TestSeveralApps:
    @pytest.fixture
    def other_url(
        self, pg: postgres.Server, template: DatabaseJanitor, database_name: str, driver: str
    ) -> Iterator[str]:
        janitor = DatabaseJanitor(
            user=pg.user,
            host=pg.host,
            port=pg.port,
            dbname=f"{database_name}_second",
            password=pg.password,
            template_dbname=template.dbname,
        )
        with janitor:
            yield pg.url(janitor.dbname, driver=driver)

    @pytest.fixture
    def apps(self, make_app: MakeApp, wire: Wire, other_url: str) -> tuple[Flask, Flask, Flask]:
        return (
            make_app(db, FICTIVE_WRITES_OUTSIDE="commit", FICTIVE_UNSAVED_CHANGES="error"),
            make_app(
                db,
                SQLALCHEMY_DATABASE_URI=wire.url(other_url),
                FICTIVE_WRITES_OUTSIDE="refuse",
                FICTIVE_UNSAVED_CHANGES="ignore",
            ),
            make_app(db, SQLALCHEMY_DATABASE_URI=wire.url(other_url), FICTIVE_WRITES_OUTSIDE="begin"),
        )

    def database(self) -> str:
        return str(db.session.scalar(sa.text("select current_database()")))

    def test_a22_settings_and_databases_stay_apart(self, apps: tuple[Flask, Flask, Flask], database_name: str) -> None:
        expected = [
            (WritesOutside.COMMIT, database_name, False),
            (WritesOutside.REFUSE, f"{database_name}_second", False),
            (WritesOutside.BEGIN, f"{database_name}_second", True),
        ]
        for _ in range(2):
            for app, (mode, name, expires) in zip(apps, expected, strict=True):
                with app.app_context():
                    assert db.session.writes_outside is mode
                    assert self.database() == name
                    assert db.session().expire_on_commit is expires

    def test_a22_interleaved(self, apps: tuple[Flask, Flask, Flask], look: Look) -> None:
        first, second, third = apps
        with first.app_context():
            db.session.begin()
            db.session.execute(sa.insert(Item).values(name="first"))
            with second.app_context():
                assert not db.session.in_transaction()
                with pytest.raises(TransactionRequired):
                    db.session.execute(sa.insert(Item).values(name="second"))
                db.session.add(Item(name="ignored"))
                with third.app_context():
                    assert not db.session.in_transaction()
                    db.session.execute(sa.insert(Item).values(name="third"))
                    assert db.session.in_transaction()
                    with first.app_context():
                        assert not db.session.in_transaction()
                        db.session.execute(sa.insert(Item).values(name="first again"))
                assert not db.session.in_transaction()
                assert db.session.scalar(sa.select(sa.func.count()).select_from(Item)) == 0  # third was rolled back
            assert db.session.in_transaction()
            with pytest.raises(TransactionAlreadyBegun):
                db.session.begin()
            db.session.rollback()
        assert look("select name from item") == ["first again"]

    def test_a22_in_threads(self, apps: tuple[Flask, Flask, Flask], database_name: str, look: Look) -> None:
        together = threading.Barrier(6)

        def work(number: int) -> tuple[WritesOutside, str]:
            with apps[number % 3].app_context():
                together.wait(20)
                with db.session.begin():
                    db.session.add(Item(name=f"thread {number}"))
                    db.session.flush()
                    together.wait(20)
                return db.session.writes_outside, self.database()

        with ThreadPoolExecutor(6) as threads:
            results = list(threads.map(work, range(6)))
        assert results == 2 * [
            (WritesOutside.COMMIT, database_name),
            (WritesOutside.REFUSE, f"{database_name}_second"),
            (WritesOutside.BEGIN, f"{database_name}_second"),
        ]
        assert look("select name from item order by 1") == ["thread 0", "thread 3"]

    @pytest.mark.parametrize("setting", [{"FICTIVE_WRITES_OUTSIDE": "perhaps"}, {"FICTIVE_WRITE_OUTSIDE": "begin"}])
    def test_a22_a_bad_setting_leaves_app_and_db_untouched(
        self, setting: dict[str, str], apps: tuple[Flask, Flask, Flask], database_url: str, database_name: str
    ) -> None:
        app = Flask(__name__)
        app.config.update(SQLALCHEMY_DATABASE_URI=database_url, **setting)
        with pytest.raises(ConfigurationError, match="FICTIVE_WRITES_OUTSIDE"):
            db.init_app(app)
        assert not app.extensions
        with apps[0].app_context():
            assert self.database() == database_name
            assert db.session.writes_outside is WritesOutside.COMMIT

    def test_a22_two_databases_objects_in_one_app(self, make_app: MakeApp, other_url: str, wire: Wire) -> None:
        """Flask-SQLAlchemy allows one per app; that is what it goes on to say."""
        app = make_app(db)
        with pytest.raises(RuntimeError, match="already been registered"):
            DB().init_app(app)
        with app.app_context():
            assert db.session.scalar(sa.text("select 1")) == 1


# -- without Flask ----------------------------------------------------------------------------------------------------


class TestWithoutFlask:
    @pytest.fixture
    def engine(self, wire: Wire, database_url: str) -> Iterator[sa.Engine]:
        engine = sa.create_engine(wire.url(database_url), pool_size=5, max_overflow=0, pool_timeout=5)
        engine.connect().close()
        yield engine
        assert engine.pool.checkedout() == 0
        engine.dispose()

    def test_a1_a_session_on_an_engine(self, engine: sa.Engine, wire: Wire, look: Look, backends: Backends) -> None:
        with OptInSession(engine) as session:
            with wire.record() as log:
                session.scalars(sa.select(Item)).all()
                session.get(Item, 1)
                session.execute(sa.insert(Item).values(name="a"))
            assert verbs(log) == ["SELECT", "SELECT", "INSERT"]
            assert backends() == ["idle"]
            with wire.record() as log, session.begin() as transaction:
                assert isinstance(transaction, Transaction)
                session.add(Item(name="b"))
            assert verbs(log) == ["BEGIN", "INSERT", "COMMIT"]
            assert session.get_bind() is engine
            assert look("select name from item order by 1") == ["a", "b"]

    def test_a1_the_first_statement_on_a_fresh_engine(self, wire: Wire, database_url: str, look: Look) -> None:
        engine = sa.create_engine(wire.url(database_url))
        with OptInSession(engine) as session:
            session.execute(sa.insert(Item).values(name="a"))
        with OptInSession(engine) as session, contextlib.suppress(ZeroDivisionError), session.begin():
            session.execute(sa.insert(Item).values(name="b"))
            raise ZeroDivisionError
        engine.dispose()
        assert look("select name from item") == ["a"]

    def test_a18_an_engine_used_before_the_first_session(self, engine: sa.Engine, wire: Wire, look: Look) -> None:
        with engine.begin() as connection:
            connection.execute(sa.insert(Item).values(name="before"))
        with OptInSession(engine) as session:
            session.execute(sa.text("select 1"))
        with contextlib.suppress(ZeroDivisionError), engine.begin() as connection:
            connection.execute(sa.insert(Item).values(name="after"))
            raise ZeroDivisionError
        assert look("select name from item") == ["before"]

    def test_a18_a_connection_that_is_out_while_the_first_session_comes(self, engine: sa.Engine, look: Look) -> None:
        with engine.connect() as connection:
            connection.execute(sa.insert(Item).values(name="core"))
            with OptInSession(engine) as session:
                session.execute(sa.insert(Item).values(name="session"))
            connection.commit()
        with contextlib.suppress(ZeroDivisionError), engine.begin() as connection:
            connection.execute(sa.insert(Item).values(name="lost"))
            raise ZeroDivisionError
        assert look("select name from item order by 1") == ["core", "session"]

    def test_a1_sessionmaker(self, engine: sa.Engine, wire: Wire, look: Look) -> None:
        Session = sessionmaker(engine)
        with wire.record() as log, Session() as session:
            assert isinstance(session, OptInSession)
            assert (session.autoflush, session.expire_on_commit) == (False, False)
            session.execute(sa.text("select 1"))
        assert verbs(log) == ["SELECT"]
        with wire.record() as log, Session.begin() as session:
            session.add(Item(name="a"))
        assert verbs(log) == ["BEGIN", "INSERT", "COMMIT"]
        with pytest.raises(ZeroDivisionError), Session.begin() as session:
            session.add(Item(name="b"))
            session.flush()
            raise ZeroDivisionError
        assert look("select name from item") == ["a"]
        with Session(writes_outside="refuse") as session, pytest.raises(TransactionRequired):
            session.execute(sa.insert(Item).values(name="c"))
        Refusing = sessionmaker(engine, writes_outside="refuse", autoflush=True, expire_on_commit=True)
        assert Refusing().writes_outside is WritesOutside.REFUSE
        assert (Refusing().autoflush, Refusing().expire_on_commit) == (True, True)
        late = sessionmaker()
        late.configure(bind=engine)
        assert late().scalar(sa.text("select 1")) == 1

    def test_a1_sqlalchemys_sessionmaker_with_the_class(self, engine: sa.Engine, wire: Wire) -> None:
        Session = sa_orm.sessionmaker(engine, class_=OptInSession)
        with wire.record() as log, Session() as session:
            session.execute(sa.text("select 1"))
        assert verbs(log) == ["SELECT"]

    def test_a1_scoped_session(self, engine: sa.Engine, wire: Wire, look: Look) -> None:
        session = OptInScopedSession(sessionmaker(engine))
        with wire.record() as log:
            session.execute(sa.text("select 1"))
            assert not session.in_transaction()
            with session.begin():
                assert session.in_transaction()
                session.add(Item(name="a"))
            session.scalars(sa.select(Item)).all()
        assert verbs(log) == ["SELECT", "BEGIN", "INSERT", "COMMIT", "SELECT"]
        with session.pinned():
            pid = session.scalar(sa.text("select pg_backend_pid()"))
            assert session.scalar(sa.text("select pg_backend_pid()")) == pid
        with pytest.raises(sa.exc.DBAPIError), session.transaction(read_only=True):
            session.execute(sa.insert(Item).values(name="b"))
        session.remove()
        assert look("select name from item") == ["a"]

    def test_a1_a_scoped_session_in_threads(self, engine: sa.Engine, look: Look) -> None:
        session = OptInScopedSession(sessionmaker(engine))
        together = threading.Barrier(20)

        def work(number: int) -> bool:
            session.execute(sa.text("select 1"))
            together.wait(20)  # twenty sessions between two statements, on five connections
            with contextlib.suppress(ZeroDivisionError), session.begin():
                session.add(Item(name=str(number)))
                session.flush()
                if number % 2:
                    raise ZeroDivisionError
            inside = session.in_transaction()
            session.remove()
            return inside

        with ThreadPoolExecutor(20) as threads:
            assert list(threads.map(work, range(20))) == [False] * 20
        assert look("select count(*) from item") == [10]

    def test_a5_a_view_of_an_engine(self, engine: sa.Engine, wire: Wire, look: Look) -> None:
        view = engine.execution_options(schema_translate_map={None: "public"})
        with OptInSession(view) as session:
            with wire.record() as log:
                session.scalars(sa.select(Item)).all()
            assert verbs(log) == ["SELECT"]
            session.add_all([Item(name="a"), Item(name="a")])
            with pytest.raises(sa.exc.IntegrityError):
                session.commit()
        assert look("select count(*) from item") == [0]

    def test_a5_binds_by_class(self, engine: sa.Engine, wire: Wire, look: Look) -> None:
        with OptInSession(binds={Item: engine, Tag: engine}) as session:
            with wire.record() as log:
                session.scalars(sa.select(Item)).all()
            assert verbs(log) == ["SELECT"]
            session.add(Item(name="a"))
            session.commit()
            with pytest.raises(sa.exc.UnboundExecutionError):
                session.execute(sa.text("select 1"))
            assert look("select count(*) from item") == [1]

    def test_a4_a_session_on_a_connection_joins_its_transaction(self, engine: sa.Engine, look: Look) -> None:
        """SQLAlchemy's recipe for test suites: what the session does ends with the connection's transaction."""
        with engine.connect() as connection:
            outer = connection.begin()
            with OptInSession(connection, join_transaction_mode="create_savepoint") as session:
                session.execute(sa.insert(Item).values(name="bare"))
                session.add(Item(name="committed"))
                session.commit()
                with session.begin():
                    session.add(Item(name="in a block"))
                with contextlib.suppress(ZeroDivisionError), session.begin():
                    session.add(Item(name="undone"))
                    session.flush()
                    raise ZeroDivisionError
                names = session.scalars(sa.select(Item.name).order_by(Item.name)).all()
                assert names == ["bare", "committed", "in a block"]
            assert look("select count(*) from item") == [0]
            outer.rollback()
        assert look("select count(*) from item") == [0]

    def test_a4_a_session_on_an_idle_connection(self, engine: sa.Engine, look: Look) -> None:
        with engine.connect() as connection:
            with OptInSession(connection) as session:
                session.execute(sa.insert(Item).values(name="bare"))
                assert look("select name from item") == ["bare"]
                with contextlib.suppress(ZeroDivisionError), session.begin():
                    session.execute(sa.insert(Item).values(name="undone"))
                    raise ZeroDivisionError
                session.add(Item(name="committed"))
                session.commit()
                assert look("select count(*) from item") == [2]
                assert session.scalar(sa.select(sa.func.count()).select_from(Item)) == 2
            assert not connection.in_transaction()
        assert look("select name from item order by 1") == ["bare", "committed"]

    def test_a15_an_honest_commit_without_flask(self, engine: sa.Engine) -> None:
        with OptInSession(engine) as session, pytest.raises(TransactionAborted):
            with session.begin():
                with pytest.raises(sa.exc.DBAPIError):
                    session.execute(sa.text("select 1/0"))

    def test_a15_deferred_constraint(self, engine: sa.Engine, look: Look) -> None:
        with OptInSession(engine) as session:
            with pytest.raises(sa.exc.IntegrityError), session.begin():
                session.add_all([Booking(seat=1), Booking(seat=1)])
            assert session.scalars(sa.select(Booking)).all() == []
        assert look("select count(*) from booking") == [0]

    def test_a2_objects_outlive_their_statement(self, engine: sa.Engine, look: Look) -> None:
        look("insert into item (name) values ('a')")
        look("insert into child (item_id, size) values (1, 1)")
        with OptInSession(engine) as session:
            item = session.get(Item, 1)
            engine.dispose()
            assert [child.size for child in item.children] == [1]
            assert isinstance(item.children[0], Child)

    @pytest.mark.parametrize("where", ["engine", "options", "view"])
    def test_a4_an_autocommit_engine_never_leaves_a_block_unprotected(
        self, where: str, wire: Wire, database_url: str, look: Look
    ) -> None:
        url = wire.url(database_url)
        engine = (
            sa.create_engine(url, isolation_level="AUTOCOMMIT")
            if where == "engine"
            else sa.create_engine(url, execution_options={"isolation_level": "AUTOCOMMIT"})
            if where == "options"
            else sa.create_engine(url).execution_options(isolation_level="AUTOCOMMIT")
        )
        with OptInSession(engine) as session:
            with pytest.raises((ConfigurationError, ZeroDivisionError)), session.begin():
                session.execute(sa.insert(Item).values(name="unprotected"))
                raise ZeroDivisionError
        assert look("select count(*) from item") == [0]
        engine.dispose()

    def test_a20_echo_of_a_plain_engine(self, engine: sa.Engine, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, logger="sqlalchemy.engine"):
            with OptInSession(engine) as session:
                session.execute(sa.text("select 1"))
                with session.begin():
                    session.execute(sa.text("select 2"))
        said = [record.getMessage().split()[0] for record in caplog.records]
        assert [word for word in said if not word.startswith("[")] == ["select", "BEGIN", "select", "COMMIT"]
