"""The database's settings, read from the environment and from a `.env` file by pydantic-settings.

Needs the extra `fictive[settings]`.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import sqlalchemy as sa

try:
    import dotenv
    from pydantic import BeforeValidator, Field, PrivateAttr, SecretStr, ValidationError
    from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
except ImportError as error:
    raise ImportError("fictive.settings needs pydantic-settings: pip install 'fictive[settings]'.") from error

from .errors import ConfigurationError
from .session.durations import timeout_in_ms
from .session.engines import STATEMENT_TIMEOUT

__all__ = ["DatabaseSettings"]

# In the order of preference, which is that of SQLAlchemy 2.1 for a URL without a driver.
_DRIVERS = ("psycopg", "psycopg2")

_EXAMPLES = {
    "database_url": "postgresql://app:secret@db.example.com:5432/shop",
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
    try:
        return timeout_in_ms(value, "")
    except ConfigurationError as error:
        raise ValueError("is" + str(error).removeprefix(" =").rstrip(".")) from None


def _words(value: Any) -> Any:
    return tuple(word.strip() for word in value.split(",") if word.strip()) if isinstance(value, str) else value


class DatabaseSettings(BaseSettings):
    """The settings of an app's databases: `app.config.from_mapping(DatabaseSettings().flask_config())`.

    | variable | meaning |
    | --- | --- |
    | `DATABASE_URL` | `postgres://` and `postgresql://` take the driver that is installed, psycopg before psycopg2 |
    | `DB_POOL_SIZE`, `DB_MAX_OVERFLOW` | connections kept, and how many more at most |
    | `DB_POOL_TIMEOUT`, `DB_POOL_RECYCLE` | seconds to wait for one; seconds after which one is made anew |
    | `DB_POOL_PRE_PING` | a round trip before each use; not needed on PostgreSQL, where fictive looks at the socket |
    | `DB_ECHO` | log all SQL |
    | `DB_STATEMENT_TIMEOUT` | `"30s"`, `"500ms"`, seconds: PostgreSQL's `statement_timeout` |
    | `DB_PGBOUNCER` | the URL is that of a PgBouncer in transaction mode, see `engine_options` |
    | `DB_BINDS` | keys of further databases; of `reports`, each variable is there with `REPORTS_` in front |

    What is not set stays at Flask-SQLAlchemy's and SQLAlchemy's own default. Raises `ConfigurationError` naming the
    variable, the problem and an example, and never a value of `DATABASE_URL`; so it does for a `DB_` variable that is
    nearly one of these. Passwords are hidden in its `repr`. Sends nothing.
    """

    model_config = SettingsConfigDict(
        extra="ignore", frozen=True, hide_input_in_errors=True, env_file_encoding="utf-8"
    )

    database_url: SecretStr
    db_pool_size: int | None = Field(None, ge=0)
    db_max_overflow: int | None = Field(None, ge=-1)
    db_pool_timeout: float | None = Field(None, gt=0)
    db_pool_recycle: int | None = Field(None, ge=-1)
    db_pool_pre_ping: bool | None = None
    db_echo: bool | None = None
    db_statement_timeout: Annotated[int | None, BeforeValidator(_milliseconds)] = None
    """In milliseconds, once read."""
    db_pgbouncer: bool = False
    db_binds: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_words)] = ()

    _prefix: str = PrivateAttr("")
    _file: str | Path | None = PrivateAttr(None)

    def __init__(self, *, env_file: str | Path | None = ".env", prefix: str = "", **values: Any) -> None:
        _refuse_near_misses(prefix, _variables(env_file), type(self).model_fields)
        try:
            super().__init__(_env_file=env_file, _env_file_encoding="utf-8", _env_prefix=prefix, **values)
            _url(self.database_url.get_secret_value())
        except ValidationError as error:
            raise ConfigurationError("; ".join(_problems(error, prefix))) from None
        except ValueError as error:
            raise _bad(f"{prefix}database_url", str(error)) from None
        self._prefix, self._file = prefix, env_file

    @property
    def url(self) -> sa.URL:
        """The URL with a driver in it."""
        return _url(self.database_url.get_secret_value())

    def bind(self, key: str) -> DatabaseSettings:
        """The settings of the database with that bind key."""
        return DatabaseSettings(env_file=self._file, prefix=f"{key.upper()}_")

    def engine_options(self) -> dict[str, Any]:
        """The arguments of `sqlalchemy.create_engine` other than the URL.

        `DB_STATEMENT_TIMEOUT` goes along when the connection is made and holds for all that runs on it. PgBouncer
        refuses that, and in transaction mode would hand a SET on to other clients: with `DB_PGBOUNCER` the timeout is
        a SET LOCAL that rides with each transaction's first statement, and statements outside run under the server's
        own (`ALTER ROLE app SET statement_timeout = '30s'`). psycopg's prepared statements are off then.
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
            return options
        connect: dict[str, Any] = {}
        if self.db_statement_timeout is not None and not self.db_pgbouncer:
            connect["options"] = f"-c statement_timeout={self.db_statement_timeout}"
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
        names = {f"{self._prefix}{name}".upper() for name in self.model_fields_set}
        environment = {name.upper() for name in os.environ}
        found = {name: "environment" if name in environment else str(self._file) for name in sorted(names)}
        for key in self.db_binds:
            found |= self.bind(key).origins()
        return found


def is_configured(env_file: str | Path | None = ".env") -> bool:
    """Whether the environment or the file has a `DATABASE_URL`."""
    return "DATABASE_URL" in _variables(env_file)


def _variables(env_file: str | Path | None) -> set[str]:
    names = set(os.environ)
    if env_file is not None and os.path.isfile(env_file):
        names |= set(dotenv.dotenv_values(env_file, encoding="utf-8", interpolate=False))
    return {name.upper() for name in names}


def _refuse_near_misses(prefix: str, variables: Iterable[str], fields: Iterable[str]) -> None:
    """Others have variables that start with DB_ too; one that is nearly ours is a mistake."""
    known = {f"{prefix}{name}".upper() for name in fields}
    start = f"{prefix}DB_".upper()
    for name in sorted(variables):
        if name.startswith(start) and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
            if near:
                raise ConfigurationError(f"There is no variable {name}: did you mean {near[0]}?")


def _problems(error: ValidationError, prefix: str) -> list[str]:
    return [str(_bad(f"{prefix}{each['loc'][0]}", _sentence(each["msg"]), each["loc"][0])) for each in error.errors()]


def _sentence(message: str) -> str:
    message = message.removeprefix("Value error, ").removeprefix("Input ")
    return "is not set" if message == "Field required" else message


def _bad(name: str, problem: str, field: Any = "database_url") -> ConfigurationError:
    variable = name.upper()
    return ConfigurationError(f"{variable} {problem}. For example: {variable}={_EXAMPLES[str(field).lower()]}")


def _url(text: str) -> sa.URL:
    """Raises `ValueError` whose message has nothing of `text`."""
    text = text.strip()
    if text.startswith("postgres://"):  # what hosting services write
        text = "postgresql" + text.removeprefix("postgres")
    try:
        url = sa.make_url(text)
    except Exception:  # with the URL, and so the password, in its message
        raise ValueError("is not a database URL") from None
    if url.drivername == "postgresql":
        installed = [name for name in _DRIVERS if importlib.util.find_spec(name)]
        if not installed:
            raise ValueError("needs a driver that is not installed: pip install 'fictive[psycopg]'")
        url = url.set(drivername=f"postgresql+{installed[0]}")
    try:
        url.get_dialect()
    except Exception:
        raise ValueError(f"names a database or driver that SQLAlchemy does not have: {url.drivername}") from None
    return url
