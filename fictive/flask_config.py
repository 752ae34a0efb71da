"""Where an app's databases are configured: in `app.config`, in the class, and in the environment beneath both."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import sqlalchemy as sa

from .config import DATABASE_VARIABLES
from .databases.engine_options import POOL_OPTIONS, merged_connect_args
from .databases.urls import database_url
from .errors import ConfigurationError, SettingIgnoredWarning

__all__ = [
    "ENVIRONMENT",
    "Environment",
    "Layer",
    "check_urls",
    "option_layers",
    "options_in_force",
    "read_environment",
    "shared_layers",
]

ENVIRONMENT = "fictive.environment"
"""The key in `app.extensions` of the `Environment`."""

_URI, _OPTIONS, _BINDS = "SQLALCHEMY_DATABASE_URI", "SQLALCHEMY_ENGINE_OPTIONS", "SQLALCHEMY_BINDS"
_NEEDED = "reading it needs pydantic-settings (extra fictive[settings]): pip install pydantic-settings"


@dataclasses.dataclass(frozen=True)
class Environment:
    """What the environment says of an app's databases; None is the key of the default one."""

    urls: Mapping[str | None, sa.URL] = dataclasses.field(default_factory=dict)
    """Of the databases that the app's configuration does not name."""
    options: Mapping[str | None, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    origins: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """By variable: `"environment"` or the file."""
    timeouts: Mapping[str | None, int] = dataclasses.field(default_factory=dict)
    """The `DB_STATEMENT_TIMEOUT` of each, in milliseconds, where it goes along when a connection is made."""
    pooled: frozenset[str | None] = frozenset()
    """The databases that are behind a PgBouncer in transaction mode."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """Options of an engine, and who gave them."""

    origin: str | None
    """None for the environment, whose variables each have their own."""
    options: Mapping[str, Any]


# -- URLs -------------------------------------------------------------------------------------------------------------


def check_urls(config: Mapping[str, Any], class_options: Mapping[str, Any]) -> None:
    """Raise `ConfigurationError` that names the key in `config` whose value or URL cannot be used."""
    for name in (_OPTIONS, _BINDS):
        if not isinstance(config.get(name) or {}, Mapping):
            raise ConfigurationError(f"{name} = {config[name]!r}: expected a dictionary.")
    for name, key, url in _named_urls(config, class_options):
        if not any("module" in layer.options for layer in option_layers(config, class_options, Environment(), key)):
            database_url(url, name)


def _named_urls(
    config: Mapping[str, Any], class_options: Mapping[str, Any]
) -> Iterator[tuple[str, str | None, object]]:
    for key, bind in (config.get(_BINDS) or {}).items():
        url = _url_of(bind) or class_options.get("url")
        if url is None:
            raise ConfigurationError(f"{_BINDS}[{key!r}] has no url.")
        yield f"{_BINDS}[{key!r}]", key, url
    if url := _default_url(config, class_options):
        yield (_URI if url is config.get(_URI) else f"{_OPTIONS}['url']"), None, url


def _default_url(config: Mapping[str, Any], class_options: Mapping[str, Any]) -> Any:
    """What the app names as its default database, but for a bind of the key None."""
    uri = config.get(_URI)
    if uri is not None and not _is_blank(uri):
        return uri
    return (config.get(_OPTIONS) or {}).get("url") or class_options.get("url")


def _url_of(bind: Any) -> Any:
    url = bind.get("url") if isinstance(bind, Mapping) else bind
    return None if _is_blank(url) else url


def _is_blank(url: object) -> bool:
    return isinstance(url, str) and not url.strip()


# -- options ----------------------------------------------------------------------------------------------------------


def option_layers(
    config: Mapping[str, Any], class_options: Mapping[str, Any], environment: Environment, key: str | None
) -> list[Layer]:
    """Who gives options to the engine of a bind key itself, the most general first."""
    layers = [Layer("engine_options", class_options), Layer(None, environment.options.get(key, {}))]
    bind = (config.get(_BINDS) or {}).get(key)
    if isinstance(bind, Mapping):
        layers.append(Layer("app.config", bind))
    if key is None:
        layers.append(Layer("app.config", config.get(_OPTIONS) or {}))
    return layers


def shared_layers(
    config: Mapping[str, Any], class_options: Mapping[str, Any], environment: Environment, url: sa.URL
) -> list[Layer]:
    """Layers of the default engine for the engine of a bind on `url`; none if they are different kinds of database."""
    default = _default_url(config, class_options) or environment.urls.get(None)
    if default is not None and sa.make_url(default).get_backend_name() != url.get_backend_name():
        return []
    return [Layer(None, environment.options.get(None, {})), Layer("app.config", config.get(_OPTIONS) or {})]


def options_in_force(
    config: Mapping[str, Any],
    class_options: Mapping[str, Any],
    environment: Environment,
    key: str | None,
    url: sa.URL,
) -> tuple[dict[str, Any], dict[str, str]]:
    """For those who look: an engine's options, and by the variable's name who gave them if not `app.config`."""
    own = option_layers(config, class_options, environment, key)
    layers = [Layer(each.origin, _about_pools(each.options)) for each in own]
    if key is not None:
        shared = shared_layers(config, class_options, environment, url)
        layers = [Layer(each.origin, _about_pools(each.options)) for each in shared] + layers
    options: dict[str, Any] = {} if key in environment.urls else {"url": url}
    if config.get("SQLALCHEMY_ECHO"):
        options["echo"] = True
    origins = {}
    for layer in layers:
        for name in layer.options:
            default = f"DB_{name.upper()}"
            variable = f"{key}_{default}".upper() if key else default
            origins[variable] = (
                layer.origin or environment.origins.get(variable) or environment.origins.get(default, "")
            )
        options |= layer.options
    for each in own:
        options |= {name: value for name, value in each.options.items() if name not in POOL_OPTIONS and name != "url"}
        startup = str((each.options.get("connect_args") or {}).get("options", ""))
        if "statement_timeout" in startup and each.origin:
            origins[f"{key}_DB_STATEMENT_TIMEOUT".upper() if key else "DB_STATEMENT_TIMEOUT"] = each.origin
    if connect_args := merged_connect_args(each.options for each in own):
        options["connect_args"] = connect_args
    return options, origins


def _about_pools(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in POOL_OPTIONS}


# -- the environment --------------------------------------------------------------------------------------------------


def read_environment(config: Mapping[str, Any], class_options: Mapping[str, Any]) -> Environment:
    """What the environment and the `.env` file say, by `fictive.settings.DatabaseSettings`.

    It is beneath the app's own configuration: a URL counts where the app names none, options where the app gives none.
    """
    names = _names()
    binds = config.get(_BINDS) or {}
    own = _default_url(config, class_options) or _url_of(binds.get(None))
    keys = [key for key in binds if isinstance(key, str)]  # others are keys too, but no variable can name them
    prefixes = ("DB_", *(f"{key.upper()}_DB_" for key in keys))
    if not any(name.startswith(prefixes) for name in names) and (own is not None or "DATABASE_URL" not in names):
        return Environment()
    try:
        from .settings import DatabaseSettings, is_configured
    except ImportError:
        _tell_unread(names, named=own is not None, any_named=own is not None or bool(binds))
        return Environment()

    def settings(key: str | None, own: Any) -> DatabaseSettings:
        prefix = f"{key.upper()}_" if key else ""
        return DatabaseSettings(prefix=prefix) if own is None else DatabaseSettings.of_url(own, prefix=prefix)

    found: dict[str | None, DatabaseSettings] = {}
    urls: dict[str | None, sa.URL] = {}
    if own is not None or is_configured():
        found[None] = settings(None, own)
        if own is None:
            urls[None] = found[None].url
        keys = [*found[None].db_binds, *keys]
    elif binds:  # no default engine, and so options for pools alone
        found[None] = settings(None, _url_of(next(iter(binds.values()))))
    else:
        return Environment()
    for key in dict.fromkeys(keys):
        url = _url_of(binds.get(key)) or (class_options.get("url") if key in binds else None)
        if url is None:
            found[key] = settings(key, None)
            urls[key] = found[key].url
        elif any(name.startswith(f"{key.upper()}_DB_") for name in names):
            found[key] = settings(key, url)
    options = {key: dict(each.engine_options()) for key, each in found.items()}
    if "SQLALCHEMY_ECHO" in config:
        for each in options.values():
            each.pop("echo", None)
    origins = {name: origin for each in found.values() for name, origin in each.own_origins().items()}
    pooled = frozenset(key for key, each in found.items() if each.db_pgbouncer)
    timeouts = {
        key: each.db_statement_timeout
        for key, each in found.items()
        if each.db_statement_timeout is not None and not each.db_pgbouncer
    }
    return Environment(urls, options, origins, timeouts, pooled)


def _names() -> set[str]:
    """Names of variables, for a first look; the file is read as `DatabaseSettings` does where there is a reader."""
    names = {name.upper() for name, value in os.environ.items() if value.strip()}
    if os.path.isfile(".env"):
        try:
            from .settings import variables
        except ImportError:
            return names
        names |= set(variables(".env"))
    return names


def _tell_unread(names: set[str], *, named: bool, any_named: bool) -> None:
    if "DATABASE_URL" in names and not any_named:
        raise ConfigurationError(
            f"The app names no database. DATABASE_URL is set, and {_NEEDED}, or set SQLALCHEMY_DATABASE_URI."
        )
    unread = [name for name in DATABASE_VARIABLES if name in names and not (named and name == "DATABASE_URL")]
    if unread:
        warnings.warn(f"{', '.join(unread)} set and without effect: {_NEEDED}.", SettingIgnoredWarning, stacklevel=4)
