"""The database's settings, read from the environment and from a `.env` file by pydantic-settings.

Needs the extra `fictive[settings]`.
"""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import sqlalchemy as sa

try:
    import dotenv
    from pydantic import BeforeValidator, Field, PrivateAttr, SecretStr, ValidationError
    from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
except ImportError as error:
    raise ImportError(
        "fictive.settings needs pydantic-settings (extra fictive[settings]): pip install pydantic-settings."
    ) from error

from .connection.link import STATEMENT_TIMEOUT
from .databases.engine_options import timeout_option
from .databases.urls import EXAMPLE, database_url
from .errors import ConfigurationError, SettingIgnoredWarning
from .session.durations import timeout_in_ms

__all__ = ["DatabaseSettings"]

_FILE = Path(".env")
_QUEUE_OPTIONS = ("pool_size", "max_overflow", "pool_timeout")

_EXAMPLES = {
    "database_url": EXAMPLE,
    "db_pool_size": "5",
    "db_max_overflow": "10",
    "db_pool_timeout": "30",
    "db_pool_recycle": "1800",
    "db_pool_pre_ping": "false",
    "db_echo": "false",
    "db_statement_timeout": "30s",
    "db_pgbouncer": "true",
    "db_binds": "reports,audit",
}


def _milliseconds(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, str) and value.strip().replace(".", "", 1).isdigit():
        value = float(value)
    if value == 0:
        return 0
    try:
        return timeout_in_ms(value, "")
    except ConfigurationError as error:
        raise ValueError("is" + str(error).removeprefix(" =").rstrip(".")) from None


def _words(value: Any) -> Any:
    return tuple(word.strip() for word in value.split(",") if word.strip()) if isinstance(value, str) else value


class DatabaseSettings(BaseSettings):
    """The settings of an app's databases: `app.config.from_mapping(DatabaseSettings().flask_config())`.

    `DATABASE_URL`
        `postgres://` and `postgresql://` take the driver that is installed
    `DB_POOL_SIZE`, `DB_MAX_OVERFLOW`
        connections that the pool keeps, and how many more it may open
    `DB_POOL_TIMEOUT`, `DB_POOL_RECYCLE`
        whole seconds to wait for a connection, and after which one is replaced
    `DB_POOL_PRE_PING`
        a round trip before each use; not needed on PostgreSQL, where fictive looks at the socket
    `DB_ECHO`
        log all SQL
    `DB_STATEMENT_TIMEOUT`
        `"30s"`, `"500ms"`, seconds: PostgreSQL's `statement_timeout`; 0 for none
    `DB_PGBOUNCER`
        the URL is that of a PgBouncer in transaction mode, see `engine_options`
    `DB_BINDS`
        keys of further databases; for `reports` each variable has a second one with `REPORTS_` in front

    What is not set, or empty, stays at Flask-SQLAlchemy's and SQLAlchemy's own default. Raises `ConfigurationError`
    naming the variable, the problem and an example, and never a value of `DATABASE_URL`. A `DB_` variable that is
    nearly one of these is a `SettingIgnoredWarning`. Passwords are hidden in its `repr`. Sends nothing.

    A subclass may have fields of its own, and other types for these (`database_url: str`), an `env_prefix` or an
    `env_file`.
    """

    model_config = SettingsConfigDict(
        extra="ignore", frozen=True, hide_input_in_errors=True, env_file_encoding="utf-8", env_ignore_empty=True
    )

    database_url: SecretStr
    db_pool_size: int | None = Field(None, ge=0)
    db_max_overflow: int | None = Field(None, ge=-1)
    db_pool_timeout: int | None = Field(None, gt=0)
    """Whole seconds: Flask-SQLAlchemy and SQLAlchemy cut a fraction off, and half a second would be no wait at all."""
    db_pool_recycle: int | None = Field(None, ge=-1)
    db_pool_pre_ping: bool | None = None
    db_echo: bool | None = None
    db_statement_timeout: Annotated[int | None, BeforeValidator(_milliseconds)] = None
    """In milliseconds, once read."""
    db_pgbouncer: bool = False
    db_binds: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_words)] = ()

    _prefix: str = PrivateAttr("")
    _file: Any = PrivateAttr(None)
    _given: frozenset[str] = PrivateAttr(frozenset())
    _url: sa.URL = PrivateAttr()
    _binds: dict[str, DatabaseSettings] = PrivateAttr(default_factory=dict)

    def __init__(self, *, env_file: str | Path | None = _FILE, prefix: str | None = None, **values: Any) -> None:
        if env_file is _FILE:
            env_file = type(self).model_config.get("env_file") or _FILE  # type: ignore[assignment]
        if prefix is None:
            prefix = type(self).model_config.get("env_prefix") or ""
        _warn_of_near_misses(prefix, variables(env_file), type(self).model_fields)
        try:
            super().__init__(_env_file=env_file, _env_file_encoding="utf-8", _env_prefix=prefix, **values)
        except ValidationError as error:
            raise ConfigurationError("; ".join(_problems(error, prefix, type(self).model_fields))) from None
        self._prefix, self._file, self._given = prefix, env_file, frozenset(values)
        self._url = database_url(_revealed(self.database_url), f"{prefix}database_url".upper())

    @classmethod
    def of_url(cls, url: str | sa.URL, *, prefix: str = "") -> DatabaseSettings:
        """The settings for a database that the environment need not name."""
        text = url.render_as_string(hide_password=False) if isinstance(url, sa.URL) else url
        return cls(prefix=prefix, database_url=text)

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, self._url.render_as_string() if name == "database_url" and isinstance(value, str) else value

    @property
    def url(self) -> sa.URL:
        """The URL with a driver in it."""
        return self._url

    def bind(self, key: str) -> DatabaseSettings:
        """The settings of the database with that bind key."""
        if key not in self._binds:
            self._binds[key] = DatabaseSettings(env_file=self._file, prefix=f"{key.upper()}_")
        return self._binds[key]

    def engine_options(self) -> dict[str, Any]:
        """The arguments of `sqlalchemy.create_engine` other than the URL.

        `DB_STATEMENT_TIMEOUT` goes along when the connection is made, after the `options` of the URL or `PGOPTIONS`,
        and holds for all that runs on it. PgBouncer refuses that, and in transaction mode would hand a SET on to other
        clients: with `DB_PGBOUNCER` the timeout is a SET LOCAL that rides with each transaction's first statement, and
        statements in autocommit run under the server's own (`ALTER ROLE app SET statement_timeout = '30s'`). psycopg's
        prepared statements are off then.
        """
        given = {
            "pool_size": self.db_pool_size,
            "max_overflow": self.db_max_overflow,
            "pool_timeout": self.db_pool_timeout,
            "pool_recycle": self.db_pool_recycle,
            "pool_pre_ping": self.db_pool_pre_ping,
            "echo": self.db_echo,
        }
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        url = self.url
        if url.get_backend_name() != "postgresql":
            if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
                for name in _QUEUE_OPTIONS:  # there is one connection, and no queue
                    options.pop(name, None)
            return options
        connect: dict[str, Any] = {}
        libpq = url.get_driver_name() in ("psycopg", "psycopg2")
        if self.db_statement_timeout is not None and libpq and not self.db_pgbouncer:
            connect["options"] = timeout_option(self.db_statement_timeout, url, os.environ)
        elif self.db_statement_timeout is not None:
            options["execution_options"] = {STATEMENT_TIMEOUT: self.db_statement_timeout}
        if self.db_pgbouncer and url.get_driver_name() == "psycopg":
            connect["prepare_threshold"] = None
        return {**options, "connect_args": connect} if connect else options

    def flask_config(self) -> dict[str, Any]:
        """What goes into `app.config`."""
        config: dict[str, Any] = {"SQLALCHEMY_DATABASE_URI": self.url}
        if options := self.engine_options():
            config["SQLALCHEMY_ENGINE_OPTIONS"] = options
        if self.db_binds:
            binds = {key: self.bind(key) for key in self.db_binds}
            config["SQLALCHEMY_BINDS"] = {
                key: {"url": each.url, **each.engine_options()} for key, each in binds.items()
            }
        return config

    def origins(self) -> dict[str, str]:
        """Where each variable that is set comes from, those of the binds included: `"environment"` or the file."""
        found = self.own_origins()
        for key in self.db_binds:
            found |= self.bind(key).own_origins()
        return dict(sorted(found.items())) if self.db_binds else found

    def own_origins(self) -> dict[str, str]:
        """`origins` without those of the binds."""
        names = {f"{self._prefix}{name}".upper() for name in self.model_fields_set - self._given}
        environment = _set_ones(os.environ)
        read = variables(self._file)
        return {
            name: "environment" if name in environment else str(self._file) for name in sorted(names) if name in read
        }


def is_configured(env_file: str | Path | None = ".env") -> bool:
    """Whether the environment or the file has a `DATABASE_URL` that is not empty."""
    return "DATABASE_URL" in variables(env_file)


def variables(env_file: Any) -> set[str]:
    """The names, in capitals, of what is set in the environment and the file or files, and is not empty."""
    names = _set_ones(os.environ)
    for file in env_file if isinstance(env_file, (list, tuple)) else [env_file]:
        if file is not None and os.path.isfile(file):
            names |= _set_ones(dotenv.dotenv_values(file, encoding="utf-8", interpolate=False))
    return names


def _set_ones(values: Mapping[str, str | None]) -> set[str]:
    return {name.upper() for name, value in values.items() if value}


def _warn_of_near_misses(prefix: str, names: Iterable[str], fields: Iterable[str]) -> None:
    """Other programs have variables that start with DB_ too: one that is nearly ours is a mistake, or theirs."""
    known = {f"{prefix}{name}".upper() for name in fields}
    start = f"{prefix}DB_".upper()
    for name in sorted(names):
        if name.startswith(start) and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
            if near:
                warnings.warn(
                    f"Unknown variable {name}: did you mean {near[0]}? It may also belong to another program.",
                    SettingIgnoredWarning,
                    stacklevel=3,
                )


def _problems(error: ValidationError, prefix: str, fields: Iterable[str]) -> Iterator[str]:
    for each in error.errors():
        field = str(each["loc"][0]) if each["loc"] else ""
        variable = (prefix + field if field in set(fields) else field).upper()
        example = f" For example: {variable}={_EXAMPLES[field]}" if field in _EXAMPLES else ""
        yield f"{variable} {_sentence(each['msg'])}.{example}"


def _sentence(message: str) -> str:
    message = message.removeprefix("Value error, ").removeprefix("Input ")
    return "is not set" if message == "Field required" else message


def _revealed(value: Any) -> Any:
    """The text of a URL, whatever type a subclass gives the field."""
    if isinstance(value, (str, sa.URL)):
        return value
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)
