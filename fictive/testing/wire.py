"""A proxy on loopback that shows what goes over the wire to PostgreSQL, and can disturb it.

Only the wire tells whether a transaction was opened and what it cost: SQLAlchemy's events report
a BEGIN that was never sent. `Wire` stands between driver and server, reads the protocol both
ways (version 3) and groups it into round trips, each ended by one ReadyForQuery::

    with Wire(pg.host, pg.port) as wire:
        engine = sa.create_engine(wire.url(pg.url(driver="psycopg")))
        with wire.record() as log:
            ...
        assert log.statements == ["SELECT 1"]

It can add latency, cut the network silently, reset, close or half-close connections (all, or
one, now or when a statement goes by), and cut an answer short. It speaks no TLS and tells clients
so; a server that insists on TLS cannot be watched.

Each connection has one thread per direction, which reads, takes notes and passes on. What is
passed on is always the bytes that came, so that a message unknown here goes through unharmed.
With a delay, each direction has a second thread that passes on what the first read, each piece
when it is due: reading never waits, so pieces in flight together are late by one delay only.

The proxy needs the GIL. A driver call that waits for the server without giving it up waits for
ever; known are psycopg2's ``connection.cancel()`` and psycopg's raw ``pgconn.get_result()``.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import sqlalchemy as sa

_CHUNK = 256 * 1024
_LENGTH = struct.Struct("!I")
_HEADER = struct.Struct("!BI")

_CANCEL, _SSL, _GSSENC = 80877102, 80877103, 80877104
_STARTUP_MAJOR = 3

# What the client sends; the letters mean something else the other way.
_QUERY, _PARSE, _BIND, _EXECUTE, _SYNC, _FUNCTION, _COPY_DONE, _COPY_FAIL = b"QPBESFcf"
# What the server sends.
_COMPLETE, _ERROR, _READY, _DATA_ROW = b"CEZD"

# How many seconds late a sleeping thread wakes up, at least; slept less and spun instead.
_WAKING = 25e-6

Predicate = Callable[[str], bool]
_End = Callable[[], None]


@dataclass
class Exchange:
    """One round trip: what the client sent and the server's answer up to ReadyForQuery.

    `statements` has the text of each simple query as sent (several commands in one message are
    one text) and of each extended-protocol execution, whenever it was prepared. `status` is the
    connection's transaction status afterwards: "I" idle, "T" in a transaction, "E" in a failed
    one. `sqlstate` is that of the first error. `start` is when the client's first message
    arrived at the proxy, `end` when the answer left it, by `time.monotonic`; a delay lies
    between the two. `delivered` is False when a connection was reset in place of the answer.
    """

    connection: int
    start: float
    statements: list[str] = field(default_factory=list)
    status: str = ""
    rows: int = 0
    tags: list[str] = field(default_factory=list)
    sqlstate: str | None = None
    end: float = 0.0
    delivered: bool = True
    _extended: bool = field(default=False, repr=False, compare=False)
    _reset_after: bool = field(default=False, repr=False, compare=False)
    _truncate: bool = field(default=False, repr=False, compare=False)


class Log:
    """What went over the wire during one `Wire.record` block.

    Complete when the block ends: an answer is written down before the client can see it. A round
    trip belongs to the log when its answer came during the block.
    """

    def __init__(self, in_transaction: set[int]) -> None:
        self.exchanges: list[Exchange] = []
        self.connections_opened = 0
        self._stopped: float | None = None
        now = time.monotonic()
        # For each connection in a transaction: since when, until when it was last busy, and how
        # long it was busy in between.
        self._open = {number: [now, now, 0.0] for number in in_transaction}
        self._in_transaction = 0.0
        self._idle = 0.0

    @property
    def round_trips(self) -> int:
        """Round trips after the start-up of their connection."""
        return len(self.exchanges)

    @property
    def statements(self) -> list[str]:
        """The statements of all round trips, in the order in which these ended."""
        return [text for exchange in self.exchanges for text in exchange.statements]

    @property
    def time_in_transaction(self) -> float:
        """Seconds in transactions, summed over connections.

        From the start of the round trip that opened one to the end of the one that ended it, or
        to the loss of the connection. One opened and ended by the same round trip counts as
        nothing: the client was never in it.
        """
        return self._in_transaction + sum(now - since for since, _, _, now in self._still_open())

    @property
    def idle_in_transaction(self) -> float:
        """Of `time_in_transaction`, the seconds with no round trip under way."""
        return self._idle + sum(now - since - busy for since, _, busy, now in self._still_open())

    def _still_open(self) -> list[tuple[float, float, float, float]]:
        now = time.monotonic() if self._stopped is None else self._stopped
        return [(since, until, busy, now) for since, until, busy in self._open.values()]

    def _add(self, exchange: Exchange) -> None:
        self.exchanges.append(exchange)
        number = exchange.connection
        if exchange.status in "TE":
            # The first one in a transaction started it: it is busy from its own start.
            self._open.setdefault(number, [exchange.start, exchange.start, 0.0])
        if number in self._open:
            spell = self._open[number]
            # Pipelined round trips overlap: count only what no earlier one has covered.
            spell[2] += max(0.0, exchange.end - max(exchange.start, spell[1]))
            spell[1] = exchange.end
            if exchange.status == "I":
                self._leave(number, exchange.end)

    def _leave(self, number: int, now: float) -> None:
        spell = self._open.pop(number, None)
        if spell:
            since, _, busy = spell
            self._in_transaction += now - since
            self._idle += max(0.0, now - since - busy)

    def __repr__(self) -> str:
        return f"<Log round_trips={self.round_trips} statements={self.statements!r}>"


@dataclass
class Trigger:
    """A disturbance that waits for a statement; `fired` counts how often it struck."""

    _wire: Wire = field(repr=False)
    predicate: Predicate
    action: Literal["cut", "reset", "truncate"]
    when: Literal["before", "after"]
    times: int | None
    fired: int = 0

    def remove(self) -> None:
        """Let go: statements that come from now on pass undisturbed."""
        with self._wire._lock, contextlib.suppress(ValueError):
            self._wire._triggers.remove(self)


class Wire:
    """A proxy on 127.0.0.1 for the PostgreSQL server at ``host``:``port``; a context manager.

    Connect to `host` and `port`, or to `url(...)`. When the block ends, all connections are
    closed and no thread or socket remains.

    `delay` is in seconds, added each way to everything that passes, start-up included, so that
    a round trip takes ``2 * delay`` more; 0.0005 is a server in the same data centre. While
    `refuse` is true, new connections are closed at once.
    """

    def __init__(self, host: str, port: int) -> None:
        self.upstream = (host, port)
        self.delay = 0.0
        self.refuse = False
        self._lock = threading.Lock()
        self._connections: dict[int, _Connection] = {}
        self._logs: list[Log] = []
        self._triggers: list[Trigger] = []
        self._accepted = 0
        self._threads: list[threading.Thread] = []
        self._closed = False
        # Set while nothing may pass; those who wait for the end of it wait on the condition.
        self._is_cut = False
        self._flow = threading.Condition()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.host: str
        self.port: int
        self.host, self.port = self._listener.getsockname()
        self._acceptor = threading.Thread(target=self._accept, name="wire-accept", daemon=True)
        self._acceptor.start()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the proxy and every connection through it; return when its threads have ended."""
        if self._closed:
            return
        self._closed = True
        self.restore()
        # A connection of our own is what wakes accept() on every system.
        with contextlib.suppress(OSError):
            socket.create_connection((self.host, self.port), timeout=5).close()
        self._acceptor.join()
        self._listener.close()
        self.close_connections()
        # Those included whose connection had ended, or was ending, before.
        for thread in list(self._threads):
            thread.join(10)

    def url(self, url: str | sa.URL) -> str:
        """Return ``url``, a server's, with the proxy's address in place of the server's.

        The password stays in it.
        """
        parsed = sa.make_url(url).difference_update_query(["host", "port"])
        return parsed.set(host=self.host, port=self.port).render_as_string(hide_password=False)

    @property
    def open_connections(self) -> int:
        """Connections that are open now."""
        return len(self.connections)

    @property
    def connections(self) -> list[int]:
        """The numbers of the connections that are open now, as in `Exchange.connection`."""
        with self._lock:
            return list(self._connections)

    @contextlib.contextmanager
    def record(self) -> Iterator[Log]:
        """Yield a `Log` of what goes over all connections during the block; blocks may nest."""
        with self._lock:
            log = Log({c.number for c in self._connections.values() if c.status in ("T", "E")})
            self._logs.append(log)
        try:
            yield log
        finally:
            with self._lock:
                # By identity: two logs of the same traffic would compare equal one day.
                self._logs = [other for other in self._logs if other is not log]
                log._stopped = time.monotonic()

    # Disturbances ----------------------------------------------------------------------------

    def cut(self, connection: int | None = None) -> None:
        """From now on pass nothing, in either direction, without closing: a silent network failure.

        Connections stay open, closing included nothing gets through, new connections hang in
        their start-up. `restore` delivers what was held back, as TCP would. With the number of a
        ``connection``, only that one is cut.
        """
        with self._flow:
            if connection is None:
                self._is_cut = True
            else:
                for cut in self._chosen(connection):
                    cut.is_cut = True

    def restore(self) -> None:
        """End every `cut`."""
        with self._flow:
            self._is_cut = False
            for connection in self._chosen(None):
                connection.is_cut = False
            self._flow.notify_all()

    def reset(self, connection: int | None = None) -> None:
        """Break every connection, or the one of that number, with a TCP reset, to the client and to the server."""
        self._finish_all(connection, reset=True)

    def close_connections(self, connection: int | None = None) -> None:
        """Close every connection, or the one of that number, in order, as a server does that ends a session."""
        self._finish_all(connection, reset=False)

    def half_close(self, connection: int | None = None) -> None:
        """End the direction to the client only: it reads the end, while the server knows nothing of it.

        What the client sends still arrives. The server learns of the end when the client closes,
        or when it sends an answer.
        """
        for closed in self._chosen(connection):
            with contextlib.suppress(OSError):
                closed.client.shutdown(socket.SHUT_WR)

    def _chosen(self, number: int | None) -> list[_Connection]:
        with self._lock:
            return [each for each in self._connections.values() if number in (None, each.number)]

    def cut_before(self, predicate: Predicate, *, times: int | None = 1) -> Trigger:
        """`cut` when a statement for which ``predicate`` is true comes, before it is passed on.

        It strikes ``times`` times, None for always. The predicate is given each statement's
        text as in `Exchange.statements`, in a thread of the proxy.
        """
        return self._add_trigger(Trigger(self, predicate, "cut", "before", times))

    def reset_when(
        self,
        predicate: Predicate,
        when: Literal["before", "after"] = "before",
        *,
        times: int | None = 1,
    ) -> Trigger:
        """Reset the connection on which a statement comes for which ``predicate`` is true.

        "before": the server never sees it. "after": the server executes it, and the reset comes
        in place of its whole round trip's answer, which is recorded with ``delivered=False``:
        a COMMIT whose outcome the client cannot know. Otherwise as `cut_before`.
        """
        return self._add_trigger(Trigger(self, predicate, "reset", when, times))

    def truncate_when(self, predicate: Predicate, *, times: int | None = 1) -> Trigger:
        """Cut the answer to a statement for which ``predicate`` is true short, and close its connection.

        The server executes it. The client gets all of the answer but the last three bytes.
        Otherwise as `cut_before`; recorded with ``delivered=False``.
        """
        return self._add_trigger(Trigger(self, predicate, "truncate", "after", times))

    def _add_trigger(self, trigger: Trigger) -> Trigger:
        with self._lock:
            self._triggers.append(trigger)
        return trigger

    def _strike(self, statement: str) -> Trigger | None:
        """Return the trigger that ``statement`` sets off, counted; None when there is none."""
        with self._lock:
            armed = list(self._triggers)
        for trigger in armed:
            # Outside the lock: the predicate is the test's and may use the wire.
            if not trigger.predicate(statement):
                continue
            with self._lock:
                if trigger in self._triggers:
                    trigger.fired += 1
                    if trigger.fired == trigger.times:
                        self._triggers.remove(trigger)
                    return trigger
        return None

    # Connections -----------------------------------------------------------------------------

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(0.01)  # out of descriptors: a client may close one
                continue
            if self._closed:
                client.close()
                return
            if self.refuse:
                client.close()
                continue
            with self._lock:
                self._accepted += 1
                connection = _Connection(self, self._accepted, client)
                self._connections[connection.number] = connection
            connection.start()

    def _finish_all(self, number: int | None, *, reset: bool) -> None:
        for connection in self._chosen(number):
            connection.finish(reset=reset)

    def _opened(self) -> None:
        with self._lock:
            for log in self._logs:
                log.connections_opened += 1

    def _remember(self, thread: threading.Thread) -> None:
        with self._lock:
            self._threads = [other for other in self._threads if other.is_alive()]
            self._threads.append(thread)

    def _record(self, exchange: Exchange, connection: _Connection) -> None:
        with self._lock:
            exchange.end = time.monotonic()
            connection.status = exchange.status
            for log in self._logs:
                log._add(exchange)

    def _forget(self, connection: _Connection) -> None:
        with self._lock:
            if self._connections.pop(connection.number, None):
                now = time.monotonic()
                for log in self._logs:
                    log._leave(connection.number, now)


class _Connection:
    """One client's connection: its two sockets, the threads that serve them, what is known."""

    def __init__(self, wire: Wire, number: int, client: socket.socket) -> None:
        self.wire = wire
        self.number = number
        self.client = client
        self.server: socket.socket | None = None
        self.status = ""
        self.dead = False
        self.is_cut = False
        # Round trips under way, oldest first: the client's side appends, the server's removes.
        self.exchanges: deque[Exchange] = deque()
        self.threads: list[threading.Thread] = []
        self.outlets: list[_Outlet] = []
        self.lock = threading.Lock()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def start(self) -> None:
        self.spawn(self._run, "start")

    def spawn(self, target: Callable[[], None], role: str) -> None:
        thread = threading.Thread(target=target, name=f"wire-{self.number}-{role}", daemon=True)
        with self.lock:
            if self.dead:
                return
            self.threads.append(thread)
            # Under the lock: finish() joins what it finds in the list.
            thread.start()
        self.wire._remember(thread)

    def _run(self) -> None:
        """Serve the start-up, then the client's side of the conversation."""
        try:
            startup = self._negotiate()
            if startup is None:
                self.finish(reset=False)
                return
            server = socket.create_connection(self.wire.upstream)
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self.lock:
                self.server = server
            if self.dead:  # finish() came before it could see this socket
                server.close()
                return
            cancel = _LENGTH.unpack_from(startup, 4)[0] == _CANCEL
            if not cancel:
                self.wire._opened()
            to_server = _Outlet(self, server, "to-server")
            to_server.put(startup)
            to_client = _Outlet(self, self.client, "to-client")
            self.spawn(_FromServer(self, server, to_client).run, "from-server")
        except OSError:
            self.finish(reset=True)
            return
        _FromClient(self, self.client, to_server).run()

    def _negotiate(self) -> bytes | None:
        """Return the client's start-up or cancel packet; refuse encryption until it comes.

        None when the client goes away or speaks something else.
        """
        while True:
            packet = self._read_exactly(8)
            if packet is None:
                return None
            length, code = struct.unpack("!II", packet)
            if code in (_SSL, _GSSENC):
                self.wait_for_flow()
                self.client.sendall(b"N")
                continue
            if code != _CANCEL and code >> 16 != _STARTUP_MAJOR:
                return None
            rest = self._read_exactly(length - 8)
            return None if rest is None else packet + rest

    def _read_exactly(self, size: int) -> bytes | None:
        data = b""
        while len(data) < size:
            piece = self.client.recv(size - len(data))
            if not piece:
                return None
            data += piece
        return data

    def wait_for_flow(self) -> bool:
        """Wait out a cut; False when the connection has ended meanwhile."""
        wire = self.wire
        if wire._is_cut or self.is_cut:
            with wire._flow:
                wire._flow.wait_for(lambda: self.dead or not (wire._is_cut or self.is_cut))
        return not self.dead

    def finish(self, *, reset: bool) -> None:
        """End the connection on both sides, once; return when its sockets are closed.

        May be called from any thread, the connection's own included.
        """
        with self.lock:
            if self.dead:
                return
            self.dead = True
            threads = list(self.threads)
            sockets = [self.client] + ([self.server] if self.server else [])
        with self.wire._flow:
            self.wire._flow.notify_all()
        for outlet in list(self.outlets):
            outlet.wake()
        for sock in sockets:
            with contextlib.suppress(OSError):
                if reset:
                    # Seconds 0: close() throws away what is unsent and sends a reset.
                    linger = struct.pack("ii", 1, 0)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                # A close() alone neither wakes a thread that reads the socket nor takes effect
                # before it. Shutting down the reading end wakes it and sends nothing.
                sock.shutdown(socket.SHUT_RD if reset else socket.SHUT_RDWR)
        self._join(threads, 0.2 if reset else 5.0)
        # Only a thread stuck in sending, to a peer that does not read, may still be there.
        if reset and any(thread.is_alive() for thread in threads if self._is_other(thread)):
            for sock in sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            self._join(threads, 5.0)
        # Known as ended before the client can know.
        self.wire._forget(self)
        for sock in sockets:
            sock.close()

    def _join(self, threads: list[threading.Thread], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for thread in threads:
            if self._is_other(thread):
                thread.join(max(0.0, deadline - time.monotonic()))

    @staticmethod
    def _is_other(thread: threading.Thread) -> bool:
        return thread is not threading.current_thread()


class _Outlet:
    """Passes bytes on to one socket, late by the wire's delay, and records just before."""

    def __init__(self, connection: _Connection, sock: socket.socket, role: str) -> None:
        self._connection = connection
        self._wire = connection.wire
        self._socket = sock
        self._role = role
        self._queue: deque[tuple[float, bytes, list[Exchange], _End | None]] = deque()
        self._changed = threading.Condition()
        self._late = False  # the thread for delayed pieces runs
        self._waiting = 0
        connection.outlets.append(self)

    def put(self, data: bytes, exchanges: list[Exchange] | None = None, end: _End | None = None) -> None:
        """Pass on ``data``; first record ``exchanges``; afterwards call ``end``.

        Called by one thread only. Without delay it returns when the system has the data.
        """
        delay = self._wire.delay
        # While something waits, what follows must queue behind it, even if the delay is 0 now.
        if delay <= 0 and not self._waiting:
            self._deliver(data, exchanges or [], end)
            return
        due = time.monotonic() + delay
        with self._changed:
            # Bounded, so that a slow reader slows the sender down as it would without us.
            self._changed.wait_for(lambda: self._waiting < 256 or self._connection.dead)
            self._queue.append((due, data, exchanges or [], end))
            self._waiting += 1
            self._changed.notify_all()
        if not self._late:
            self._late = True
            self._connection.spawn(self._pass_on_when_due, f"{self._role}-delayed")

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _pass_on_when_due(self) -> None:
        _sleep_precisely()
        connection = self._connection
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._queue or connection.dead)
                    if connection.dead:
                        return
                    due, data, exchanges, end = self._queue.popleft()
                wait = due - time.monotonic() - _WAKING
                if wait > 0:
                    time.sleep(wait)
                while time.monotonic() < due:
                    pass
                self._deliver(data, exchanges, end)
                with self._changed:
                    self._waiting -= 1
                    self._changed.notify_all()
        except OSError:
            connection.finish(reset=True)

    def _deliver(self, data: bytes, exchanges: list[Exchange], end: _End | None) -> None:
        if not self._connection.wait_for_flow():
            return
        for exchange in exchanges:
            self._wire._record(exchange, self._connection)
        if data:
            self._socket.sendall(data)
        if end:
            end()


class _FromClient:
    """Reads what the client sends, notes its statements, sets off triggers, passes it on."""

    def __init__(self, connection: _Connection, sock: socket.socket, outlet: _Outlet) -> None:
        self._connection = connection
        self._socket = sock
        self._outlet = outlet
        self._frames = _Frames(b"QPBESFcf")
        self._prepared: dict[bytes, str] = {}
        self._portals: dict[bytes, str] = {}
        self._current: Exchange | None = None  # extended messages since the last Sync
        self._last: Exchange | None = None
        self._copy_ended = False

    def run(self) -> None:
        connection = self._connection
        try:
            while True:
                try:
                    data = self._socket.recv(_CHUNK)
                except OSError:
                    self._outlet.put(b"", end=lambda: connection.finish(reset=True))
                    return
                if not data:
                    # The server may still be at work; its side ends the connection.
                    self._outlet.put(b"", end=self._end)
                    return
                if not self._take(data):
                    return
        except OSError:
            # The server does not take it. What it said before it went, its side passes on.
            return
        except BaseException:  # a predicate failed: the test shall not wait for an answer
            connection.finish(reset=True)
            raise

    def _end(self) -> None:
        server = self._connection.server
        assert server is not None
        server.shutdown(socket.SHUT_WR)

    def _take(self, data: bytes) -> bool:
        """Note and pass on ``data``; False when that ended the connection."""
        wire = self._connection.wire
        now = time.monotonic()
        passed = 0
        for kind, body, begin, _ in self._frames.feed(data):
            exchange, statement = self._note(kind, body, now)
            if statement is None or not wire._triggers:
                continue
            trigger = wire._strike(statement)
            if trigger is None:
                continue
            if trigger.when == "after":
                exchange._truncate = trigger.action == "truncate"
                exchange._reset_after = not exchange._truncate
                continue
            # The first bytes of a message that came in pieces have gone already. No harm: the
            # server does nothing until it has all of it.
            begin = max(begin, passed)
            self._outlet.put(data[passed:begin])
            passed = begin
            if trigger.action == "cut":
                wire.cut()
            else:
                self._connection.finish(reset=True)
                return False
        self._outlet.put(data[passed:] if passed else data)
        return True

    def _note(self, kind: int, body: bytes, now: float) -> tuple[Exchange, str | None]:
        """Enter one message into its exchange; return that, and the statement if it runs one."""
        if kind in (_QUERY, _FUNCTION):
            exchange = self._begin(now, extended=False)
            if kind == _FUNCTION:
                return exchange, None
            statement = _text(body.rstrip(b"\0"))
            exchange.statements.append(statement)
            return exchange, statement
        if kind in (_COPY_DONE, _COPY_FAIL):
            self._copy_ended = True
            return self._last or self._begin(now, extended=False), None
        if kind == _SYNC and self._current is None and self._copy_ended:
            self._copy_ended = False
            if self._last and self._last._extended:
                # libpq ends COPY FROM in the extended protocol with a second Sync; the server
                # has skipped the first, which came while it was reading data.
                return self._last, None
        self._copy_ended = False
        if self._current is None:
            self._current = self._begin(now, extended=True)
        exchange = self._current
        if kind == _PARSE:
            name, sql, _ = body.split(b"\0", 2)
            self._prepared[name] = _text(sql)
        elif kind == _BIND:
            portal, name, _ = body.split(b"\0", 2)
            self._portals[portal] = self._prepared.get(name, "")
        elif kind == _EXECUTE:
            statement = self._portals.get(body.split(b"\0", 1)[0], "")
            exchange.statements.append(statement)
            return exchange, statement
        else:
            self._current = None
        return exchange, None

    def _begin(self, now: float, *, extended: bool) -> Exchange:
        exchange = Exchange(self._connection.number, now, _extended=extended)
        self._last = exchange
        # Before anything of it is passed on, so that the answer always finds it.
        self._connection.exchanges.append(exchange)
        return exchange


class _FromServer:
    """Reads what the server answers, completes the exchanges with it, passes it on."""

    def __init__(self, connection: _Connection, sock: socket.socket, outlet: _Outlet) -> None:
        self._connection = connection
        self._socket = sock
        self._outlet = outlet
        self._frames = _Frames(b"CEZ", counted=_DATA_ROW)
        self._started = False

    def run(self) -> None:
        connection = self._connection
        try:
            while True:
                try:
                    data = self._socket.recv(_CHUNK)
                except OSError:
                    self._outlet.put(b"", end=lambda: connection.finish(reset=True))
                    return
                if not data:
                    self._outlet.put(b"", end=lambda: connection.finish(reset=False))
                    return
                if not self._take(data):
                    return
        except OSError:  # the client does not take it
            connection.finish(reset=True)

    def _take(self, data: bytes) -> bool:
        """Note and pass on ``data``; False when that ends the connection."""
        waiting = self._connection.exchanges
        done: list[Exchange] = []
        answered = 0  # up to here, data belongs to round trips that are complete
        for kind, body, _, end in self._frames.feed(data):
            if not self._started:
                self._started = kind == _READY
                answered = end
                continue
            exchange = waiting[0] if waiting else Exchange(self._connection.number, time.monotonic())
            exchange.rows += self._frames.take_count()
            if kind == _COMPLETE:
                exchange.tags.append(_text(body.rstrip(b"\0")))
            elif kind == _ERROR:
                exchange.sqlstate = exchange.sqlstate or _sqlstate(body)
            else:
                exchange.status = chr(body[0])
                if waiting:
                    waiting.popleft()
                if exchange._reset_after:
                    self._outlet.put(data[:answered], done, partial(self._end_short, exchange, reset=True))
                    return False
                if exchange._truncate:
                    self._outlet.put(data[: end - 3], done, partial(self._end_short, exchange, reset=False))
                    return False
                done.append(exchange)
                answered = end
        if waiting and waiting[0]._reset_after:
            # Nothing of an answer that a reset will replace may reach the client.
            data = data[:answered]
        self._outlet.put(data, done)
        return True

    def _end_short(self, exchange: Exchange, *, reset: bool) -> None:
        exchange.delivered = False
        self._connection.wire._record(exchange, self._connection)
        self._connection.finish(reset=reset)


class _Frames:
    """Cuts a stream into protocol messages, of which only the wanted kinds are looked into.

    Of ``counted`` it only counts how many begin. Bodies of other kinds are skipped, not kept.
    """

    def __init__(self, wanted: bytes, counted: int = -1) -> None:
        self._wanted = frozenset(wanted)
        self._counted = counted
        self._count = 0
        self._skip = 0  # remaining bytes of a body that is skipped
        self._kept = bytearray()  # an incomplete header or wanted message
        self._need = 0  # how long that must be before it is worth another look

    def take_count(self) -> int:
        count, self._count = self._count, 0
        return count

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes, int, int]]:
        """Yield kind, body, and where in ``data`` each wanted message begins and ends.

        The beginning is negative when it lies in earlier data.
        """
        size = len(data)
        if self._skip >= size:
            self._skip -= size
            return
        position, self._skip = self._skip, 0
        earlier = len(self._kept)
        if earlier:
            self._kept += data
            size += earlier
            if size < self._need:
                return
            data = bytes(self._kept)
            self._kept.clear()
        self._need = 5
        wanted, counted, header = self._wanted, self._counted, _HEADER.unpack_from
        while size - position >= 5:
            kind, length = header(data, position)
            after = position + 1 + length
            if kind in wanted:
                if after > size:
                    self._need = after - position
                    break
                yield kind, data[position + 5 : after], position - earlier, after - earlier
            elif kind == counted:
                self._count += 1
            position = after
        if position > size:
            self._skip = position - size
        else:
            self._kept += data[position:]


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _sqlstate(body: bytes) -> str:
    """Return field C of an ErrorResponse."""
    for part in body.split(b"\0"):
        if part[:1] == b"C":
            return _text(part[1:])
    return ""


def _sleep_precisely() -> None:
    """Let this thread wake up when due: Linux adds up to 50 microseconds to every sleep."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(29, 1, 0, 0, 0)  # PR_SET_TIMERSLACK, nanoseconds
