"""The modes of a psycopg2 connection, for one that psycopg2 itself has in autocommit all the time."""

from __future__ import annotations

from typing import Any

import psycopg2
import psycopg2.extensions as ext

__all__ = ["LEVELS", "ModesConnection"]

_Connection: Any = ext.connection

LEVELS = {1: "READ COMMITTED", 2: "REPEATABLE READ", 3: "SERIALIZABLE", 4: "READ UNCOMMITTED"}
_LEVEL_NUMBERS = {name: number for number, name in LEVELS.items()}


class ModesConnection(_Connection):  # type: ignore[misc]
    """Autocommit, isolation level, READ ONLY and DEFERRABLE as the user sees them, each in psycopg2's words.

    Outside autocommit the BEGIN says them; in autocommit they are settings of the server's session, which psycopg2
    sends at once (psycopg2 documentation, "connection.set_session"; its `conn_set_session`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._autocommit = False
        self._characteristics: dict[str, Any] = dict.fromkeys(("isolation_level", "readonly", "deferrable"))
        super().__init__(*args, **kwargs)

    @property
    def autocommit(self) -> bool:
        return self._autocommit

    @autocommit.setter
    def autocommit(self, value: bool) -> None:
        self._refuse_in_transaction("set_session")
        self._change({}, autocommit=bool(value))

    @property
    def isolation_level(self) -> int | None:
        level: int | None = self._characteristics["isolation_level"]
        return level

    @isolation_level.setter
    def isolation_level(self, value: int | str | None) -> None:
        self._refuse_in_transaction("set_session")
        self._change({"isolation_level": _level(value)})

    @property
    def readonly(self) -> bool | None:
        value: bool | None = self._characteristics["readonly"]
        return value

    @readonly.setter
    def readonly(self, value: bool | str | None) -> None:
        self._refuse_in_transaction("set_session")
        self._change({"readonly": _flag(value)})

    @property
    def deferrable(self) -> bool | None:
        value: bool | None = self._characteristics["deferrable"]
        return value

    @deferrable.setter
    def deferrable(self, value: bool | str | None) -> None:
        self._refuse_in_transaction("set_session")
        self._change({"deferrable": _flag(value)})

    def set_session(
        self,
        isolation_level: int | str | None = None,
        readonly: bool | str | None = None,
        deferrable: bool | str | None = None,
        autocommit: bool | None = None,
    ) -> None:
        self._refuse_in_transaction("set_session")
        given: dict[str, Any] = {}
        if isolation_level is not None:
            given["isolation_level"] = _level(isolation_level)
        if readonly is not None:
            given["readonly"] = _flag(readonly)
        if deferrable is not None:
            given["deferrable"] = _flag(deferrable)
        self._change(given, autocommit=None if autocommit is None else bool(autocommit))

    def set_isolation_level(self, level: int | None) -> None:
        wanted = None if level == ext.ISOLATION_LEVEL_AUTOCOMMIT else _level(level)  # a wrong one changes nothing
        self.rollback()
        if level == ext.ISOLATION_LEVEL_AUTOCOMMIT:
            self._change({}, autocommit=True)
        else:
            self._change({"isolation_level": wanted}, autocommit=False)

    def _change(self, given: dict[str, Any], *, autocommit: bool | None = None) -> None:
        """Set the characteristics `given`, None being the server's default, and autocommit."""
        wanted = self._autocommit if autocommit is None else autocommit
        settings: dict[str, Any] = {}
        if wanted:
            settings = {name: "DEFAULT" if value is None else value for name, value in given.items()}
        elif self._autocommit:  # from here on BEGIN says them
            settings = {name: "DEFAULT" for name, value in self._characteristics.items() if value is not None}
        if settings:
            super().set_session(**settings)
        self._autocommit = wanted
        self._characteristics.update(given)

    def _forget_modes(self) -> None:
        """As a new connection has them."""
        self._autocommit = False
        self._characteristics = dict.fromkeys(self._characteristics)

    def _refuse_in_transaction(self, name: str) -> None:
        if self.closed:
            raise psycopg2.InterfaceError("connection already closed")
        if self.status != ext.STATUS_READY:
            raise psycopg2.ProgrammingError(f"{name} cannot be used inside a transaction")


def _level(value: int | str | None) -> int | None:
    if value is None or (isinstance(value, str) and value.upper() == "DEFAULT"):
        return None
    number = _LEVEL_NUMBERS.get(value.upper()) if isinstance(value, str) else value
    if number not in LEVELS:
        raise ValueError(f"bad value for isolation_level: {value!r}")
    return number


def _flag(value: bool | str | None) -> bool | None:
    if isinstance(value, str) and value.upper() != "DEFAULT":
        raise ValueError(f"the only string accepted is 'default'; got {value}")
    return None if value is None or isinstance(value, str) else bool(value)
