"""A connection of a sandbox, used by another process: each call goes over a socket to the sandbox's process.

Both sides prove that they know the token's secret before anything else is read, because what is read is unpickled.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import hmac
import io
import itertools
import os
import pickle
import re
import secrets
import socket
import struct
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import ConfigurationError, SandboxError
from .shared_connection import Psycopg2Cursor, PsycopgCursor, SandboxConnection, SandboxCursor, as_thread

__all__ = ["Place", "RemoteConnection", "TokenServer", "pid_of"]

Place = tuple[str, int, str, str]
"""Host, port, database and driver: which of a sandbox's connections."""

_LENGTH = struct.Struct("!Q")
_SECRET = 32  # bytes, as many as a proof has
_SECONDS = 10  # for a process to prove that it knows the secret
_FILES = {"copy_expert": 1, "copy_from": 0, "copy_to": 0}
"""psycopg2's methods that take a file, and as which argument."""
_FROM = re.compile(r"\bFROM\s+STDIN\b", re.IGNORECASE)


def pid_of(token: str) -> int:
    """The process that has the sandbox. Raises `ConfigurationError` for what is no token."""
    return _parts(token)[0]


def _parts(token: str) -> tuple[int, int, bytes]:
    match = re.fullmatch(r"(\d+)-(\d+)-([0-9a-f]{64})", token)
    if match is None:
        raise ConfigurationError("This is no token of a sandbox: they come from sandbox.token().")
    return int(match[1]), int(match[2]), bytes.fromhex(match[3])


# -- what goes over the socket ---------------------------------------------------------------------------------------


class _Pickler(pickle.Pickler):
    """Knows the values that drivers take and give, and that cannot be pickled."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.dispatch_table = copyreg.dispatch_table | {memoryview: lambda value: (bytes, (bytes(value),))}
        if (psycopg2 := sys.modules.get("psycopg2")) is not None:
            self.dispatch_table[psycopg2.extensions.Binary] = lambda value: (bytes, (bytes(value.adapted),))
        for module in ("psycopg.types.json", "psycopg2._json"):
            if module in sys.modules:
                for name in {"Json", "Jsonb"} & set(vars(sys.modules[module])):
                    self.dispatch_table[getattr(sys.modules[module], name)] = _reduced_json


def _reduced_json(value: Any) -> tuple[Any, ...]:
    """A driver's JSON value may have a function of the application's that makes its text."""
    import json

    if hasattr(value, "obj"):
        return type(value), (json.loads((value.dumps or json.dumps)(value.obj)),)
    return type(value), (json.loads(value.dumps(value.adapted)),)


def _pickled(value: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file).dump(value)
    return file.getvalue()


class _Line:
    """A socket, on which each side sends whole messages."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        connected.settimeout(_SECONDS)
        self.file = connected.makefile("rb")

    def send(self, message: bytes) -> None:
        self.socket.sendall(_LENGTH.pack(len(message)) + message)

    def receive(self) -> bytes:
        return self._read(_LENGTH.unpack(self._read(_LENGTH.size))[0])

    def _read(self, length: int) -> bytes:
        data = self.file.read(length)
        if len(data) != length:
            raise EOFError
        return data

    def prove(self, secret: bytes, role: bytes, other: bytes) -> None:
        """Raises `EOFError` when the other side does not know the secret."""
        mine = secrets.token_bytes(_SECRET)
        self.socket.sendall(mine)
        theirs = self._read(_SECRET)
        self.socket.sendall(hmac.digest(secret, role + theirs, "sha256"))
        if not hmac.compare_digest(self._read(_SECRET), hmac.digest(secret, other + mine, "sha256")):
            raise EOFError

    def close(self) -> None:
        self.file.close()
        self.socket.close()


# -- the process that has the sandbox ---------------------------------------------------------------------------------


class TokenServer:
    """Serves connections of a sandbox to processes that have its token, each in a thread of its own."""

    def __init__(self, connect: Callable[[Place], SandboxConnection]) -> None:
        self._connect = connect
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._secret = secrets.token_bytes(_SECRET)
        self.token = f"{os.getpid()}-{self._listening.getsockname()[1]}-{self._secret.hex()}"
        self._lock = threading.Lock()
        self._is_closing = False
        self._served: dict[threading.Thread, tuple[socket.socket, SandboxConnection | None]] = {}
        self._thread = threading.Thread(target=self._accept, name="fictive-sandbox", daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            connected, _ = self._listening.accept()
            with self._lock:
                if self._is_closing:
                    connected.close()
                    return
                thread = threading.Thread(
                    target=self._serve, args=(connected,), name="fictive-sandbox-process", daemon=True
                )
                self._served[thread] = connected, None
            thread.start()

    def _serve(self, connected: socket.socket) -> None:
        connection: SandboxConnection | None = None
        line = _Line(connected)
        try:
            line.prove(self._secret, b"sandbox", b"process")
            connected.settimeout(None)
            pid, place = pickle.loads(line.receive())
            try:
                connection = self._connect(place)
            except ConfigurationError as error:
                line.send(_pickled_error(error))
                return
            with self._lock:
                if self._is_closing:
                    return
                self._served[threading.current_thread()] = connected, connection
            line.send(_pickled(("value", None)))
            _serve(line, connection, pid)
        except (OSError, EOFError):
            """The other process has gone, or was told to."""
        finally:
            if connection is not None:
                with contextlib.suppress(Exception):  # the sandbox undoes what this one could not
                    connection.close()
            with self._lock:
                del self._served[threading.current_thread()]
            line.close()

    def close(self) -> None:
        """End all, and what they have open. Called by the thread that ends the sandbox."""
        with self._lock:
            self._is_closing = True
            served = dict(self._served)
            for connected, connection in served.values():
                if connection is not None:
                    connection.shared.abandon(connection)
                with contextlib.suppress(OSError):
                    connected.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            socket.create_connection(
                self._listening.getsockname(), timeout=_SECONDS
            ).close()  # so that accept() returns
        for thread in (self._thread, *served):
            thread.join()
        self._listening.close()


def _serve(line: _Line, connection: SandboxConnection, pid: int) -> None:
    """Do what the other process asks for, until it goes."""
    objects: dict[int, Any] = {0: connection}
    numbers = itertools.count(1)
    while True:
        request = line.receive()
        try:
            thread, dropped, number, verb, name, given = pickle.loads(request)
            for each in dropped:
                objects.pop(each, None)
            with as_thread((pid, thread)):
                value = _VERBS[verb](objects[number], name, *given)
        except Exception as error:
            answer = _pickled_error(error)
        else:
            if value is objects[number]:
                answer = _pickled(("self", None))
            elif verb == "get" and callable(value):
                answer = _pickled(("method", None))
            else:
                answer = _pickled_value(value, objects, numbers)
        line.send(answer)


def _pickled_value(value: Any, objects: dict[int, Any], numbers: Iterator[int]) -> bytes:
    """The value, or the number of an object that stays here."""
    if not isinstance(value, (SandboxConnection, SandboxCursor)):
        with contextlib.suppress(Exception):  # whatever it raises: it cannot be pickled
            return _pickled(("value", value))
    number = next(numbers)
    objects[number] = value
    return _pickled(("object", (number, type(value).__name__)))


def _pickled_error(error: Exception) -> bytes:
    told = getattr(error, "diag", None)  # which psycopg2 does not pickle
    names = [name for name in dir(told) if not name.startswith("_")] if hasattr(told, "sqlstate") else []
    fields = {name: value for name in names if isinstance(value := getattr(told, name), str | None)}
    try:
        message = _pickled(("error", (error, fields)))
        pickle.loads(message)
    except Exception:
        return _pickled(("error", (SandboxError(f"{type(error).__name__}: {error}"), {})))
    return message


def _copy_from(cursor: Any, name: str, arguments: list[Any], options: Any, data: str | bytes | None) -> None:
    """A method that reads a file. Without data: the reading failed, and so does the COPY."""
    file: Any = io.StringIO(data) if isinstance(data, str) else io.BytesIO(data) if data is not None else _BrokenFile()
    _call_with_file(cursor, name, arguments, options, file)


def _copy_to(cursor: Any, name: str, arguments: list[Any], options: Any, is_text: bool) -> str | bytes:
    """A method that writes to a file: gives what it wrote."""
    file = io.StringIO() if is_text else io.BytesIO()
    _call_with_file(cursor, name, arguments, options, file)
    return file.getvalue()


def _call_with_file(cursor: Any, name: str, arguments: list[Any], options: Any, file: Any) -> None:
    position = _FILES[name]
    getattr(cursor, name)(*arguments[:position], file, *arguments[position:], **options)


class _BrokenFile:
    def read(self, size: int = -1) -> bytes:
        raise RuntimeError("reading the data of a COPY failed in another process")


_VERBS: dict[str, Callable[..., Any]] = {
    "get": lambda target, name: getattr(target, name),
    "set": lambda target, name, value: setattr(target, name, value),
    "call": lambda target, name, arguments, options: getattr(target, name)(*arguments, **options),
    "copy_from": _copy_from,
    "copy_to": _copy_to,
}


# -- another process -------------------------------------------------------------------------------------------------


class _Client:
    """One connection's line to the process that has the sandbox."""

    def __init__(self, token: str, place: Place) -> None:
        _, port, secret = _parts(token)
        self.pid = os.getpid()
        self.is_lost = False
        self.dropped: list[int] = []
        self.methods: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        try:
            self._line = _Line(socket.create_connection(("127.0.0.1", port), timeout=_SECONDS))
            self._line.prove(secret, b"process", b"sandbox")
            self._line.socket.settimeout(None)
        except (OSError, EOFError):
            raise SandboxError(_ENDED) from None
        self._answer((self.pid, place))

    def ask(self, target: RemoteObject, verb: str, name: str, *given: Any) -> Any:
        if self.is_lost or os.getpid() != self.pid:
            raise SandboxError(_ENDED if self.is_lost else "A child process needs a join() of its own.")
        dropped, self.dropped = self.dropped, []
        answer, value = self._answer((threading.get_ident(), dropped, target._number, verb, name, given))
        if answer == "self":
            return target
        if answer == "object":
            return _KINDS.get(value[1], RemoteObject)(self, *value)
        if answer == "method":
            self.methods.add((target._kind, name))
            return functools.partial(target._call, name)
        return value

    def _answer(self, request: Any) -> tuple[str, Any]:
        try:
            message = _pickled(request)
        except Exception as error:
            raise SandboxError(f"Another process's sandbox takes only what can be pickled: {error}") from error
        with self._lock:
            try:
                self._line.send(message)
                found = self._line.receive()
            except (OSError, EOFError):
                self.close()
                raise SandboxError(_ENDED) from None
            except BaseException:  # an interrupt: the next answer would be that to this request
                self.close()
                raise
        answer, value = pickle.loads(found)
        if answer == "error":
            failure, told = value
            if told and failure.diag.sqlstate is None:
                kind = type(failure)
                failure.__class__ = type(kind.__name__, (kind,), {"diag": types.SimpleNamespace(**told)})
            raise failure
        return answer, value

    def close(self) -> None:
        self.is_lost = True
        self._line.close()

    def __del__(self) -> None:
        if "_line" in self.__dict__:
            self._line.close()


_ENDED = "The sandbox of this token has ended, or its process has."


class RemoteObject:
    """An object of the process that has the sandbox."""

    def __init__(self, client: _Client, number: int, kind: str) -> None:
        self.__dict__.update(_client=client, _number=number, _kind=kind)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_kind" not in self.__dict__:
            raise AttributeError(name)
        if (self._kind, name) in self._client.methods:
            return functools.partial(self._call, name)
        return self._client.ask(self, "get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._client.ask(self, "set", name, value)

    def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        return self._client.ask(self, "call", name, arguments, options)

    def __enter__(self) -> Any:
        return self._call("__enter__")

    def __exit__(self, type_: Any, value: Any, traceback: Any) -> Any:
        return self._call("__exit__", type_, value, None)

    def __iter__(self) -> Any:
        return self._call("__iter__")

    def __next__(self) -> Any:
        return self._call("__next__")

    def __del__(self) -> None:
        if (client := self.__dict__.get("_client")) is not None:
            client.dropped.append(self._number)


class RemoteCursor(RemoteObject):
    """A driver's cursor, as far as anybody can tell."""

    def executemany(self, query: Any, parameters: Any, **options: Any) -> None:
        self._call("executemany", query, list(parameters), **options)


class RemotePsycopg2Cursor(RemoteCursor):
    """psycopg2's, whose files are here."""

    def copy_expert(self, sql: str, file: Any, size: int = 8192) -> None:
        copy = self._copy_from if _FROM.search(sql) else self._copy_to
        copy("copy_expert", file, [sql], {})

    def copy_from(self, file: Any, *arguments: Any, **options: Any) -> None:
        self._copy_from("copy_from", file, arguments, options)

    def copy_to(self, file: Any, *arguments: Any, **options: Any) -> None:
        self._copy_to("copy_to", file, arguments, options)

    def _copy_from(self, name: str, file: Any, arguments: Any, options: Any) -> None:
        blocks = []
        try:
            while block := file.read(8192):
                blocks.append(block)
        except BaseException:
            with contextlib.suppress(Exception):
                self._client.ask(self, "copy_from", name, arguments, options, None)
            raise
        data = blocks[0][:0].join(blocks) if blocks else b""
        self._client.ask(self, "copy_from", name, arguments, options, data)

    def _copy_to(self, name: str, file: Any, arguments: Any, options: Any) -> None:
        file.write(self._client.ask(self, "copy_to", name, arguments, options, isinstance(file, io.TextIOBase)))


class RemoteConnection(RemoteObject):
    """A driver's connection, as far as anybody can tell."""

    def __init__(self, token: str, place: Place, adapters: Any) -> None:
        super().__init__(_Client(token, place), 0, SandboxConnection.__name__)
        self.__dict__.update(adapters=adapters, connection=None)

    @property
    def closed(self) -> bool:
        if not self._client.is_lost:
            with contextlib.suppress(SandboxError):
                return bool(self._client.ask(self, "get", "closed"))
        return True

    broken = closed

    def rollback(self) -> None:
        if not self.closed:
            self._call("rollback")

    def close(self) -> None:
        """Undo what is open, and go."""
        if not self._client.is_lost and os.getpid() == self._client.pid:
            with contextlib.suppress(SandboxError):
                self._call("close")
            self._client.close()


_KINDS: dict[str, type[RemoteObject]] = {
    PsycopgCursor.__name__: RemoteCursor,
    Psycopg2Cursor.__name__: RemotePsycopg2Cursor,
}
