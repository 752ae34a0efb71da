"""The options of an engine, put together from several places that give some. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa

__all__ = ["POOL_OPTIONS", "add_options", "merged_connect_args", "startup_options", "timeout_option", "value_options"]

POOL_OPTIONS = frozenset(
    {
        "echo",
        "echo_pool",
        "hide_parameters",
        "max_overflow",
        "pool_pre_ping",
        "pool_recycle",
        "pool_reset_on_return",
        "pool_size",
        "pool_timeout",
        "pool_use_lifo",
        "poolclass",
    }
)
"""Options about how a pool behaves. The others say where and as whom to connect, or what a connection does."""

_OF_CONNECTIONS = frozenset({"connect_args", "creator", "execution_options", "module", "plugins", "pool", "url"})

_WITHOUT_POOL = frozenset({"echo", "hide_parameters"})
_OF_QUEUES = frozenset({"pool_size", "max_overflow", "pool_timeout", "pool_use_lifo"})


def add_options(options: dict[str, Any], more: Mapping[str, Any]) -> list[str]:
    """Add to `options` what it does not have; returns the names of those that cannot go with its pool."""
    refused = []
    for name in sorted(more, key=lambda each: each != "poolclass"):
        if name in options:
            continue
        if not _goes_with(options, name, more[name]):
            refused.append(name)
            continue
        options[name] = more[name]
    return refused


def value_options(layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Of an engine's options those that an engine on a replica needs to give the same values, such as
    `json_deserializer`: neither where and as whom to connect, nor how the pool behaves."""
    left_out = _OF_CONNECTIONS | POOL_OPTIONS
    return {name: value for layer in layers for name, value in layer.items() if name not in left_out}


def _goes_with(options: Mapping[str, Any], name: str, value: Any) -> bool:
    if name not in POOL_OPTIONS or name in _WITHOUT_POOL:
        return True
    if options.get("pool") is not None:
        return False
    if name == "poolclass":
        return _is_queue(value) or not _OF_QUEUES & options.keys()
    poolclass = options.get("poolclass")
    return name not in _OF_QUEUES or poolclass is None or _is_queue(poolclass)


def _is_queue(poolclass: Any) -> bool:
    return isinstance(poolclass, type) and issubclass(poolclass, sa.QueuePool)


def merged_connect_args(layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The `connect_args` of several layers of options, key by key; later ones win.

    PostgreSQL's `options` (`-c name=value ...`) are put one after another: of the same name the server takes the last.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in (layer.get("connect_args") or {}).items():
            if name == "options" and isinstance(merged.get(name), str) and isinstance(value, str):
                value = f"{merged[name]} {value}"
            merged[name] = value
    return merged


def timeout_option(milliseconds: int, url: sa.URL, environment: Mapping[str, str]) -> str:
    """PostgreSQL's `options` with a `statement_timeout`, beside those that a connection to `url` has anyway."""
    return f"{startup_options(url, environment)} -c statement_timeout={milliseconds}".strip()


def startup_options(url: sa.URL, environment: Mapping[str, str]) -> str:
    """PostgreSQL's `options` that a connection has without `connect_args`: those of the URL, else `PGOPTIONS`."""
    given = url.query.get("options", "")
    return (given if isinstance(given, str) else " ".join(given)) or environment.get("PGOPTIONS", "")
