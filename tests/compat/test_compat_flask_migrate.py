"""Flask-Migrate by its own commands, in a directory of its own (A16)."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from tests import migrations
from tests.compat.ways import Way
from tests.migrations import logging_as_it_was

# the environment that Flask-Migrate writes tries the name of Flask-SQLAlchemy 2 first
pytestmark = pytest.mark.filterwarnings("ignore:'get_engine' is deprecated:DeprecationWarning")

AppOf = Callable[..., Flask]
Look = Callable[..., list[Any]]


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    with logging_as_it_was():
        yield


class Project(migrations.Project):
    """The example of Flask-Migrate's documentation."""

    def __init__(self, way: Way, app_of: AppOf, directory: Path, **config: Any) -> None:
        db = way.db_class()
        super().__init__(app_of(db, **config), db, directory)

        class User(self.db.Model):  # type: ignore[name-defined, misc]
            id = self.db.Column(self.db.Integer, primary_key=True)
            name = self.db.Column(self.db.String(128))


@pytest.fixture
def project(way: Way, app_of: AppOf, tmp_path: Path) -> Project:
    return Project(way, app_of, tmp_path)


TABLES = "select tablename from pg_tables where schemaname = 'public' order by 1"


def test_init_migrate_upgrade_downgrade(project: Project, look: Look) -> None:
    project.flask("init")
    project.flask("migrate", "-m", "Initial migration.")
    project.flask("upgrade")
    assert look(TABLES) == ["alembic_version", "user"]
    look("insert into \"user\" (name) values ('adam')")
    with project.app.app_context():
        project.db.session.execute(sa.text('select * from "user"')).all()

    project.db.metadata.tables["user"].append_column(sa.Column("email", sa.String))
    project.flask("migrate", "-m", "A column.")
    project.flask("upgrade")
    assert look('select name, email from "user"') == [("adam", None)]
    assert len(look("select version_num from alembic_version")) == 1
    project.flask("downgrade")
    assert look("select count(*) from information_schema.columns where column_name = 'email'") == [0]
    project.flask("downgrade", "base")
    assert look(TABLES) == ["alembic_version"]
    assert look("select count(*) from alembic_version") == [0]


TWO_TABLES_SECOND_FAILS = (
    'op.create_table("a", sa.Column("id", sa.Integer)); op.create_table("b", sa.Column("id", sa.Integer)); '
    'op.execute("insert into a values (1)"); op.create_table("b", sa.Column("id", sa.Integer))'
)


def test_a16_a_migration_whose_second_operation_fails_leaves_nothing(project: Project, look: Look) -> None:
    project.flask("init")
    project.write("aaa", None, TWO_TABLES_SECOND_FAILS)
    result = project.flask("upgrade", fails=True)
    assert isinstance(result.exception, sa.exc.ProgrammingError)
    assert look(TABLES) == []


def test_a16_of_two_migrations_in_one_go_none_is_left_when_one_fails(project: Project, look: Look) -> None:
    project.flask("init")
    project.write("aaa", None, 'op.create_table("first", sa.Column("id", sa.Integer))')
    project.flask("upgrade")
    project.write("bbb", "aaa", 'op.create_table("second", sa.Column("id", sa.Integer))')
    project.write("ccc", "bbb", TWO_TABLES_SECOND_FAILS)
    project.flask("upgrade", fails=True)
    assert look(TABLES) == ["alembic_version", "first"]
    assert look("select version_num from alembic_version") == ["aaa"]
    project.flask("upgrade", "bbb")
    assert look("select version_num from alembic_version") == ["bbb"]


def test_a16_a_migration_that_uses_a_session_on_its_connection(project: Project, look: Look) -> None:
    """As https://alembic.sqlalchemy.org/en/latest/cookbook.html does for data: a plain session on `op.get_bind()`."""
    project.flask("init")
    project.write(
        "aaa",
        None,
        'op.create_table("a", sa.Column("id", sa.Integer)); from sqlalchemy.orm import Session; '
        's = Session(op.get_bind()); s.execute(sa.text("insert into a values (1)")); s.flush(); 1 / 0',
    )
    project.flask("upgrade", fails=True)
    assert look(TABLES) == []


def test_a19_several_databases(way: Way, app_of: AppOf, tmp_path: Path, look: Look, other_database_url: str) -> None:
    project = Project(way, app_of, tmp_path, SQLALCHEMY_BINDS={"auth": other_database_url})
    db = project.db

    class Login(db.Model):  # type: ignore[name-defined, misc]
        __bind_key__ = "auth"
        id = db.Column(db.Integer, primary_key=True)

    project.flask("init", "--multidb")
    project.flask("migrate", "-m", "Initial migration.")
    project.flask("upgrade")
    assert look(TABLES) == ["alembic_version", "user"]
    with project.app.app_context(), db.engines["auth"].connect() as connection:
        assert connection.scalars(sa.text(TABLES)).all() == ["alembic_version", "login"]
    project.flask("downgrade")
    assert look(TABLES) == ["alembic_version"]


def test_a16_several_databases_are_migrated_together_or_not_at_all(
    way: Way, app_of: AppOf, tmp_path: Path, look: Look, other_database_url: str
) -> None:
    project = Project(way, app_of, tmp_path, SQLALCHEMY_BINDS={"auth": other_database_url})
    project.flask("init", "--multidb")
    (project.directory / "versions" / "aaa_.py").write_text(
        textwrap.dedent(
            """
            from alembic import op
            import sqlalchemy as sa

            revision = "aaa"
            down_revision = None

            def upgrade(engine_name):
                op.create_table("a", sa.Column("id", sa.Integer))
                if engine_name == "auth":
                    op.create_table("a", sa.Column("id", sa.Integer))
            """
        )
    )
    project.flask("upgrade", fails=True)
    assert look(TABLES) == []
    with project.app.app_context(), project.db.engines["auth"].connect() as connection:
        assert connection.scalars(sa.text(TABLES)).all() == []
