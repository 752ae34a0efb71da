"""Database URLs, by one rule wherever they come from: configuration, environment, command line, a call."""

from __future__ import annotations

import importlib
from typing import Any

import sqlalchemy as sa

from ..errors import ConfigurationError

__all__ = ["EXAMPLE", "database_url", "installed_driver"]

EXAMPLE = "postgresql://app:PASSWORD@db.example.com:5432/shop"

# PostgreSQL drivers by the name of their package, which is that of the extra too, in SQLAlchemy 2.1's order.
_DRIVERS = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary"}  # and what to install for them
_LAST_RESORT = "pg8000"
_SYNCHRONOUS = {
    "sqlite": "sqlite",
    "mysql": "mysql+pymysql",
    "mariadb": "mariadb+pymysql",
    "oracle": "oracle+oracledb",
}


def database_url(given: object, name: str, *, any_driver: bool = False) -> sa.URL:
    """`given`, text or `sqlalchemy.URL`, as the URL of a driver that is installed. Sends nothing.

    `postgres://` is `postgresql://`, and a URL that names no driver takes the installed one: of psycopg and psycopg2
    the one that SQLAlchemy itself prefers (psycopg from 2.1 on, psycopg2 before). With `any_driver` so does a URL of
    PostgreSQL whose driver is not installed or is for asyncio; those of other databases are returned as they are.

    Raises `ConfigurationError` for text that is not a URL, for a database or driver that SQLAlchemy does not know, for
    a driver that is not installed (naming the extra) or is for asyncio (naming what to write instead). The message
    begins with `name` and has nothing of the URL but the driver.
    """
    url = _parsed(given, name)
    backend, _, driver = url.drivername.partition("+")
    if backend.lower() in ("postgres", "postgresql"):
        url = url.set(drivername=f"postgresql+{driver}" if driver else "postgresql")
        if not driver or (any_driver and not _is_usable(url)):
            query = {"sslmode" if key == "ssl" and driver else key: value for key, value in url.query.items()}
            return url.set(drivername=f"postgresql+{_chosen(name, any_driver=any_driver)}", query=query)
    elif any_driver:
        return url
    try:
        dialect = url.get_dialect()
    except Exception:
        raise ConfigurationError(
            f"{name} names a database or driver that SQLAlchemy does not have: {url.drivername}. "
            f"For example: {EXAMPLE}"
        ) from None
    if dialect.is_async:
        raise ConfigurationError(
            f"{name} names {url.drivername}, a driver for asyncio, and the sessions here are synchronous. "
            f"Write {_instead(url)} instead."
        )
    _check_installed(url, dialect, name)
    return url


def installed_driver(*, any_driver: bool = False) -> str | None:
    """The PostgreSQL driver for a URL that names none: that of SQLAlchemy's own choice, another one, or None."""
    preferred = sa.make_url("postgresql://").get_dialect().driver
    names = sorted(_DRIVERS, key=lambda each: each != preferred)
    if any_driver:
        names.append(_LAST_RESORT)
    return next((each for each in names if _can_import(each)), None)


def _parsed(given: object, name: str) -> sa.URL:
    url = None
    if isinstance(given, str) and given.strip():
        try:
            url = sa.make_url(given.strip())
        except Exception:  # with the URL, and so the password, in its message
            url = None
    elif isinstance(given, sa.URL):
        url = given
    if url is None:
        raise ConfigurationError(
            f"{name} is not a database URL such as {EXAMPLE}. Special characters in the password have to be escaped "
            "(urllib.parse.quote_plus)."
        )
    return url


def _chosen(name: str, *, any_driver: bool) -> str:
    chosen = installed_driver(any_driver=any_driver)
    if chosen is None:
        raise ConfigurationError(
            f"{name} needs a driver that is not installed (extra fictive[psycopg]): pip install 'psycopg[binary]'."
        )
    return chosen


def _instead(url: sa.URL) -> str:
    backend = url.get_backend_name()
    if backend == "postgresql":
        driver = installed_driver()
        return f"postgresql+{driver}://" if driver else "postgresql:// (pip install 'psycopg[binary]')"
    if backend in _SYNCHRONOUS:
        return f"{_SYNCHRONOUS[backend]}://"
    return f"a synchronous driver of {backend}"


def _check_installed(url: sa.URL, dialect: type[sa.Dialect], name: str) -> None:
    load: Any = getattr(dialect, "import_dbapi", None)
    try:
        if load is not None:
            load()
    except ImportError as error:
        driver = url.get_driver_name()
        if driver not in _DRIVERS:
            raise ConfigurationError(f"{name} names {url.drivername}, and its driver is missing: {error}") from error
        other = installed_driver()
        remedy = f", or write postgresql:// for {other}, which is installed" if other else ""
        raise ConfigurationError(
            f"{name} names {url.drivername}, and {driver} is not installed (extra fictive[{driver}]):"
            f" pip install {_DRIVERS[driver]}{remedy}."
        ) from error


def _is_usable(url: sa.URL) -> bool:
    driver = url.drivername.partition("+")[2]
    if driver in (*_DRIVERS, _LAST_RESORT):
        return _can_import(driver)
    try:
        return not url.get_dialect().is_async
    except Exception:  # unknown: the caller says so
        return True


def _can_import(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:  # not installed, or without the libpq that it needs
        return False
    return True
