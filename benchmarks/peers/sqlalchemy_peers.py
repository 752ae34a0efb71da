"""Plain Flask-SQLAlchemy, Flask-SQLAlchemy-Lite, and fictive: one app, three ways to get a session."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from fictive.flask_sqlalchemy import FilterByOrCreateMixin, OptInTransactionMixin
from fictive.sqlalchemy import cleanup_tables, lock_tables, m2m_set

from .. import schema
from . import SLEEP, Peer, Setup


class _OptInDatabase(OptInTransactionMixin, FilterByOrCreateMixin, SQLAlchemy):
    pass


class SQLAlchemyPeer(Peer):
    """What is the same for all three. The transactions are as one writes them for a plain session."""

    db: Any
    models: schema.Models

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        url = sa.make_url(setup.url).set(drivername=f"postgresql+{setup.driver}")
        options = {"pool_size": setup.pool_size, "max_overflow": setup.max_overflow, **self.safety()}
        # An instance path that need not be searched for, and where nothing is ever written.
        self.app = self.flask = Flask(f"benchmarks.{self.name}", instance_path=tempfile.gettempdir())
        self.flask.config["PROPAGATE_EXCEPTIONS"] = True  # to where it is measured, not into a log
        self.set_up(url.render_as_string(hide_password=False), options)
        self._add_views()

    def set_up(self, url: str, options: dict[str, Any]) -> None:
        """Make `db` and `models`."""
        raise NotImplementedError

    def safety(self) -> dict[str, Any]:
        return {"pool_pre_ping": True} if self.setup.safe else {}

    @property
    def session(self) -> Any:
        return self.db.session

    def _add_views(self) -> None:
        item = self.models.item

        @self.flask.get("/selects/<int:count>")
        def selects(count: int) -> str:
            return ",".join(self.db.session.get(item, key).name for key in range(1, count + 1))

        @self.flask.get("/slow")
        def slow() -> str:
            first = self.db.session.get(item, 1).name
            time.sleep(SLEEP)
            return f"{first},{self.db.session.get(item, 2).name}"

    def work(self) -> AbstractContextManager[Any]:
        return self.flask.app_context()

    def get(self, key: int) -> object:
        return self.db.session.get(self.models.item, key)

    def select(self, key: int) -> object:
        item = self.models.item
        return self.db.session.execute(sa.select(item).where(item.id == key)).scalar_one()

    def query(self, key: int) -> object:
        return self.models.item.query.filter_by(id=key).one()

    def get_or_404(self, key: int) -> object:
        return self.db.get_or_404(self.models.item, key)

    def load(self, count: int) -> Sequence[object]:
        item = self.models.item
        found: Sequence[object] = self.db.session.scalars(sa.select(item).where(item.id <= count)).all()
        return found

    def insert(self) -> None:
        self.session.add(self.new_event())
        self.session.commit()

    add_commit = insert

    def select_update(self) -> None:
        self.session.get(self.models.item, self.next_key()).counter += 1
        self.session.commit()

    read_update = select_update

    def savepoint_insert(self) -> None:
        with self.session.begin_nested():
            self.session.add(self.new_event())
        self.session.commit()

    def serializable(self) -> None:
        session = self.session
        session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        session.execute(sa.text("SET LOCAL lock_timeout = '5s'"))
        session.execute(sa.text("SET LOCAL statement_timeout = '30s'"))
        session.get(self.models.item, self.next_key()).counter += 1
        session.commit()

    def find_hit(self) -> None:
        self._find_or_insert("tag 1")

    def find_miss(self) -> None:
        self._find_or_insert(self.next_name())

    def _find_or_insert(self, name: str) -> None:
        # The short way, which fails when two do it at once.
        tag = self.models.tag
        if self.session.scalars(sa.select(tag).filter_by(name=name)).one_or_none() is None:
            self.session.add(tag(name=name))
            self.session.commit()

    def replace_links(self) -> Callable[[], None]:
        """What sets the tags of an object; the object and the tags are loaded already."""
        item, tags = self._item_and_tags()
        # A rollback would expire what was loaded in the transaction.
        self.session.expunge_all()
        self.session.rollback()
        self.session.add_all([item, *tags])

        def replace() -> None:
            item.tags = tags
            self.session.commit()

        return replace

    def set_links(self) -> None:
        item, tags = self._item_and_tags()
        item.tags = tags
        self.session.commit()

    def _item_and_tags(self) -> tuple[Any, list[Any]]:
        tag = self.models.tag
        tags = self.session.scalars(sa.select(tag).where(tag.id.in_(self.next_links()))).all()
        return self.session.get(self.models.item, 1), list(tags)

    def lock_and_update(self) -> None:
        self.session.execute(sa.text("SET LOCAL lock_timeout = '5s'"))
        self.session.execute(sa.text("LOCK TABLE item IN SHARE UPDATE EXCLUSIVE MODE"))
        self._update()
        self.session.commit()

    def _update(self) -> None:
        item = self.models.item
        change = sa.update(item).where(item.id == self.next_key()).values(state="lent")
        self.session.execute(change.execution_options(synchronize_session=False))

    def clean_up(self) -> None:
        for table in reversed(schema.SideBase.metadata.sorted_tables):
            self.session.execute(sa.delete(table))
        self.session.commit()

    def new_event(self) -> Any:
        return self.models.event(item_id=self.next_key(), note="seen")

    def close(self) -> None:
        with self.flask.app_context():
            self.db.engine.dispose()


class Plain(SQLAlchemyPeer):
    name = "plain"
    title = "Flask-SQLAlchemy"
    database_class: type[Any] = SQLAlchemy

    def set_up(self, url: str, options: dict[str, Any]) -> None:
        class Base(sa_orm.DeclarativeBase):
            pass

        self.flask.config.update(SQLALCHEMY_DATABASE_URI=url, SQLALCHEMY_ENGINE_OPTIONS=options)
        self.db = self.database_class(self.flask, model_class=Base)
        self.models = schema.define(self.db.Model)


class Lite(SQLAlchemyPeer):
    name = "lite"
    title = "Flask-SQLAlchemy-Lite"

    def set_up(self, url: str, options: dict[str, Any]) -> None:
        from flask_sqlalchemy_lite import SQLAlchemy as LiteSQLAlchemy

        class Base(sa_orm.DeclarativeBase):
            pass

        self.flask.config["SQLALCHEMY_ENGINES"] = {"default": {"url": url, **options}}
        self.db = LiteSQLAlchemy(self.flask)
        self.models = schema.define(Base)


class Fictive(Plain):
    """On the class with the mixin, transactions where they are meant."""

    name = "fictive"
    title = "fictive"

    database_class = _OptInDatabase

    def safety(self) -> dict[str, Any]:
        return {}  # without being asked, and without a ping

    def insert(self) -> None:
        with self.session.begin():
            self.session.add(self.new_event())

    def select_update(self) -> None:
        with self.session.begin():
            self.session.get(self.models.item, self.next_key()).counter += 1

    def read_update(self) -> None:
        item = self.session.get(self.models.item, self.next_key())
        with self.session.begin():
            item.counter += 1

    def savepoint_insert(self) -> None:
        with self.session.begin(), self.session.begin_nested():
            self.session.add(self.new_event())

    def serializable(self) -> None:
        with self.session.transaction(isolation_level="SERIALIZABLE", lock_timeout="5s", statement_timeout="30s"):
            self.session.get(self.models.item, self.next_key()).counter += 1

    def find_hit(self) -> None:
        self._find_or_create("tag 1")

    def find_miss(self) -> None:
        self._find_or_create(self.next_name())

    def _find_or_create(self, name: str) -> None:
        self.models.tag.find_or_create(name=name)

    def replace_links(self) -> Callable[[], None]:
        item, tags = self._item_and_tags()
        return functools.partial(m2m_set, self.session, item, self.models.item.tags, *tags)

    def set_links(self) -> None:
        item = self.session.get(self.models.item, 1)
        m2m_set(self.session, item, self.models.item.tags, *self.next_links())

    def lock_and_update(self) -> None:
        with lock_tables(self.session, [self.models.item], timeout="5s"):
            self._update()

    def clean_up(self) -> None:
        cleanup_tables(self.session, schema.SideBase)
