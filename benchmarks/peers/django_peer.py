"""Django, with what its documentation recommends: persistent connections, and autocommit, its default."""

# Django carries no types.
# mypy: disable-error-code="import-untyped, misc"

from __future__ import annotations

import contextlib
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import django
import sqlalchemy as sa
from django.apps import AppConfig
from django.conf import settings
from django.core.handlers.wsgi import WSGIHandler
from django.db import connections, transaction

from . import Peer, Setup

_aliases = itertools.count(1)


class Config(AppConfig):
    name = "benchmarks.peers"
    label = "benchmarks"


class Django(Peer):
    """One of them is a database alias; there is one Django in a process, and it speaks one driver."""

    name = "django"
    title = "Django"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        _start(setup.driver)
        self.alias = f"benchmark{next(_aliases)}"
        url = sa.make_url(setup.url)
        configured = {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": url.database,
            "USER": url.username or "",
            "PASSWORD": url.password or "",
            "HOST": url.host,
            "PORT": url.port,
            "CONN_MAX_AGE": None,
            "CONN_HEALTH_CHECKS": setup.safe,
        }
        every = connections.configure_settings({"default": {}, self.alias: configured})
        connections.settings[self.alias] = every[self.alias]
        self.app = WSGIHandler()
        self.models = importlib.import_module("benchmarks.peers.django_app")

    def environ(self, path: str) -> dict[str, Any]:
        return {**super().environ(path), "benchmarks.alias": self.alias}

    def _all(self, model: Any) -> Any:
        return model.objects.using(self.alias)

    def get(self, key: int) -> object:
        found: object = self._all(self.models.Item).get(pk=key)
        return found

    def select(self, key: int) -> object:
        found: object = self._all(self.models.Item).filter(id=key).get()
        return found

    def load(self, count: int) -> Sequence[object]:
        return list(self._all(self.models.Item).filter(id__lte=count))

    def insert(self) -> None:
        with transaction.atomic(using=self.alias):
            self._insert()

    def _insert(self) -> None:
        self._all(self.models.Event).create(item_id=self.next_key(), note="seen")

    def select_update(self) -> None:
        with transaction.atomic(using=self.alias):
            self._select_update()

    def _select_update(self) -> None:
        item = self._all(self.models.Item).get(pk=self.next_key())
        item.counter += 1
        item.save(update_fields=["counter"])

    def savepoint_insert(self) -> None:
        with transaction.atomic(using=self.alias), transaction.atomic(using=self.alias):
            self._insert()

    def serializable(self) -> None:
        with transaction.atomic(using=self.alias):
            self._execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
            self._execute("SET LOCAL lock_timeout = '5s'")
            self._execute("SET LOCAL statement_timeout = '30s'")
            self._select_update()

    def find_hit(self) -> None:
        self._all(self.models.Tag).get_or_create(name="tag 1")

    def find_miss(self) -> None:
        self._all(self.models.Tag).get_or_create(name=self.next_name())

    def replace_links(self) -> Callable[[], None]:
        item = self._all(self.models.Item).get(pk=1)
        tags = list(self._all(self.models.Tag).filter(pk__in=self.next_links()))
        return lambda: item.tags.set(tags)

    def set_links(self) -> None:
        self._all(self.models.Item).get(pk=1).tags.set(self.next_links())

    def lock_and_update(self) -> None:
        with transaction.atomic(using=self.alias):
            self._execute("SET LOCAL lock_timeout = '5s'")
            self._execute("LOCK TABLE item IN SHARE UPDATE EXCLUSIVE MODE")
            self._all(self.models.Item).filter(pk=self.next_key()).update(state="lent")

    def _execute(self, statement: str) -> None:
        with connections[self.alias].cursor() as cursor:
            cursor.execute(statement)

    def leave_thread(self) -> None:
        connections[self.alias].close()  # a connection belongs to its thread

    def close(self) -> None:
        connections[self.alias].close()


_driver: str | None = None


def _start(driver: str) -> None:
    global _driver
    if _driver is None:
        settings.configure(
            DATABASES={},
            ALLOWED_HOSTS=["*"],
            ROOT_URLCONF="benchmarks.peers.django_app",
            MIDDLEWARE=[],
            INSTALLED_APPS=["benchmarks.peers.django_peer.Config"],
            LOGGING_CONFIG=None,
            USE_TZ=True,
        )
        with _hidden("psycopg" if driver == "psycopg2" else None):
            importlib.import_module("django.db.backends.postgresql.base")
        django.setup()
        _driver = driver
    elif _driver != driver:
        raise RuntimeError(f"Django already speaks {_driver} in this process, and cannot change to {driver}.")


@contextlib.contextmanager
def _hidden(module: str | None) -> Iterator[None]:
    """Make `module` look as if it were not installed: Django takes psycopg where it finds it."""
    if module is None:
        yield
        return
    before = sys.modules.get(module)
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is None:
            del sys.modules[module]
        else:
            sys.modules[module] = before
