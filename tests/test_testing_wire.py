"""The proxy between driver and server: what it writes down, and how it disturbs."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import psycopg2
import pytest
import sqlalchemy as sa

from fictive.testing import postgres
from fictive.testing import wire as wire_module
from fictive.testing.wire import Exchange, Wire, _Frames
from tests.fresh_database import OWN

pytestmark = pytest.mark.any_sqlalchemy

DRIVERS = [psycopg2, psycopg]
every_driver = pytest.mark.parametrize("driver", [module.__name__ for module in DRIVERS])


@pytest.fixture
def api(driver: str) -> Any:
    """The driver's module."""
    return importlib.import_module(driver)


@pytest.fixture(scope="module")
def url(pg: postgres.Server) -> Iterator[str]:
    """The URL of a database of our own: other workers use the same server."""
    name = f"wire_{os.getpid()}"
    with direct(pg.url()) as cursor:
        cursor.execute(f"create database {name}")
    yield pg.url(name)
    with direct(pg.url()) as cursor:
        cursor.execute(f"drop database {name} with (force)")


@pytest.fixture
def wire(pg: postgres.Server) -> Iterator[Wire]:
    before = set(threading.enumerate())
    with Wire(pg.host, pg.port) as wire:
        yield wire
    assert set(threading.enumerate()) <= before
    assert wire.open_connections == 0


@pytest.fixture
def connect(url: str, wire: Wire) -> Iterator[Callable[..., Any]]:
    """Return a function that connects through the proxy; close what it opened."""
    with contextlib.ExitStack() as stack:

        def connect(driver: Any, *, autocommit: bool = False, **options: Any) -> Any:
            connection = driver.connect(wire.url(url), **options)
            stack.callback(connection.close)
            connection.autocommit = autocommit
            return connection

        yield connect


@pytest.fixture
def table(url: str) -> Iterator[str]:
    """A table that a connection past the proxy has made, and removes."""
    with direct(url) as cursor:
        cursor.execute("create table wired (id int primary key, name text)")
        yield "wired"
        # Backends of connections that a test broke may still hold it for a moment.
        cursor.execute(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
            " where pid <> pg_backend_pid() and datname = current_database()"
        )
        cursor.execute("drop table wired")


@contextlib.contextmanager
def direct(url: str) -> Iterator[Any]:
    with contextlib.closing(psycopg2.connect(url)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            yield cursor


def count(url: str, table: str) -> int:
    with direct(url) as cursor:
        cursor.execute(f"select count(*) from {table}")
        return int(cursor.fetchone()[0])


def next_result(pgconn: Any) -> Any:
    """Return libpq's next result. Its own call would wait with the GIL, which the proxy needs."""
    pgconn.flush()
    while pgconn.is_busy():
        assert select.select([pgconn.socket], [], [], 10)[0]
        pgconn.consume_input()
    return pgconn.get_result()


@contextlib.contextmanager
def raw_client(wire: Wire) -> Iterator[socket.socket]:
    """A session without a driver, which would hide how it ends."""
    with socket.create_connection((wire.host, wire.port), timeout=10) as client:
        body = struct.pack("!I", 3 << 16) + b"user\0postgres\0\0"
        client.sendall(struct.pack("!I", len(body) + 4) + body)
        while not client.recv(65536).endswith(b"Z\0\0\0\5I"):
            pass
        yield client


def send_query(client: socket.socket, sql: bytes) -> None:
    client.sendall(b"Q" + struct.pack("!I", len(sql) + 5) + sql + b"\0")


def wait_until(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


# What it writes down -------------------------------------------------------------------------


@every_driver
def test_a_plain_select_is_three_round_trips(wire: Wire, connect: Any, api: Any) -> None:
    with wire.record() as log:
        connection = connect(api)
        connection.cursor().execute("select 1")
        connection.rollback()
    assert log.statements == ["BEGIN", "select 1", "ROLLBACK"]
    assert log.round_trips == 3
    assert log.connections_opened == 1
    assert [exchange.status for exchange in log.exchanges] == ["T", "T", "I"]
    assert [exchange.tags for exchange in log.exchanges] == [["BEGIN"], ["SELECT 1"], ["ROLLBACK"]]
    assert [exchange.rows for exchange in log.exchanges] == [0, 1, 0]
    assert len({exchange.connection for exchange in log.exchanges}) == 1


@every_driver
def test_an_autocommit_select_is_one_round_trip(wire: Wire, connect: Any, api: Any) -> None:
    connection = connect(api, autocommit=True)
    with wire.record() as log:
        connection.cursor().execute("select 1")
    assert log.statements == ["select 1"]
    assert log.connections_opened == 0
    assert log.time_in_transaction == 0


def test_statements_in_one_message_are_one_round_trip(wire: Wire, connect: Any) -> None:
    connection = connect(psycopg2, autocommit=True)
    with wire.record() as log:
        connection.cursor().execute("begin; select 1; select 2 union select 3; commit")
    assert log.statements == ["begin; select 1; select 2 union select 3; commit"]
    assert log.exchanges[0].tags == ["BEGIN", "SELECT 1", "SELECT 2", "COMMIT"]
    assert log.exchanges[0].rows == 3
    assert log.exchanges[0].status == "I"


def test_psycopg_prepares_on_the_sixth_run(wire: Wire, connect: Any) -> None:
    connection = connect(psycopg, autocommit=True)
    trips = []
    with wire.record() as log:
        for number in range(8):
            before = log.round_trips
            connection.execute("select %s::int", [number])
            trips.append(log.round_trips - before)
    assert trips == [1, 1, 1, 1, 1, 2, 1, 1]
    # The Parse alone is a round trip without a statement; later runs are resolved by name.
    assert log.statements == ["select $1::int"] * 8
    assert [exchange.statements for exchange in log.exchanges].count([]) == 1


@every_driver
def test_an_error_is_recorded_with_its_sqlstate(wire: Wire, connect: Any, api: Any) -> None:
    connection = connect(api)
    with wire.record() as log:
        with pytest.raises(api.Error):
            connection.cursor().execute("select 1/0")
        connection.rollback()
    assert [exchange.status for exchange in log.exchanges] == ["T", "E", "I"]
    assert [exchange.sqlstate for exchange in log.exchanges] == [None, "22012", None]
    assert log.exchanges[1].tags == []


def test_a_pipeline_is_one_round_trip(wire: Wire, connect: Any, table: str) -> None:
    connection = connect(psycopg, autocommit=True)
    with wire.record() as log:
        with connection.pipeline():
            for number in range(50):
                connection.execute("insert into wired values (%s, 'x')", [number], prepare=False)
    assert log.round_trips == 1
    assert log.statements == ["insert into wired values ($1, 'x')"] * 50
    assert log.exchanges[0].tags == ["INSERT 0 1"] * 50


def test_a_pipeline_with_an_error_ends_at_its_sync(wire: Wire, connect: Any) -> None:
    connection = connect(psycopg, autocommit=True)
    with wire.record() as log:
        with pytest.raises(psycopg.errors.DivisionByZero):
            with connection.pipeline() as pipeline:
                connection.execute("select 1", prepare=False)
                pipeline.sync()
                connection.execute("select 1/0", prepare=False)
                connection.execute("select 2", prepare=False)
        assert connection.execute("select 3").fetchone() == (3,)
    assert [exchange.sqlstate for exchange in log.exchanges] == [None, "22012", None]
    assert log.exchanges[1].statements == ["select 1/0", "select 2"]
    assert log.statements[-1] == "select 3"


@pytest.mark.parametrize("parameters", [None, [7]], ids=["simple", "extended"])
def test_copy_with_psycopg(wire: Wire, connect: Any, table: str, parameters: Any) -> None:
    connection = connect(psycopg, autocommit=True)
    source = "copy (select g, 'x' from generate_series(1, %s) g) to stdout"
    with wire.record() as log:
        with connection.cursor() as cursor:
            with cursor.copy("copy wired from stdin") as copy:
                for number in range(20_000):
                    copy.write_row((number, "x" * 50))
            with cursor.copy(source if parameters else source % 7, parameters) as copy:
                assert len(list(copy.rows())) == 7
        connection.execute("select 1")
    assert [exchange.tags for exchange in log.exchanges] == [["COPY 20000"], ["COPY 7"], ["SELECT 1"]]
    assert [exchange.rows for exchange in log.exchanges] == [0, 0, 1]
    assert log.statements[0] == "copy wired from stdin"


def test_copy_in_the_extended_protocol_is_one_round_trip(wire: Wire, connect: Any, table: str) -> None:
    # libpq sends Sync after Execute and again after the data; the server answers once.
    pgconn = connect(psycopg, autocommit=True).pgconn
    with wire.record() as log:
        for data, status in [(b"1\tx\n", "COMMAND_OK"), (b"1\tx\n", "FATAL_ERROR"), (b"2\ty\n", "COMMAND_OK")]:
            result = pgconn.exec_params(b"copy wired from stdin", None)
            assert result.status == psycopg.pq.ExecStatus.COPY_IN
            pgconn.put_copy_data(data)
            pgconn.put_copy_end()
            assert next_result(pgconn).status == psycopg.pq.ExecStatus[status]
            assert next_result(pgconn) is None
        pgconn.exec_params(b"select 1", None)
    assert log.statements == ["copy wired from stdin"] * 3 + ["select 1"]
    assert [exchange.sqlstate for exchange in log.exchanges] == [None, "23505", None, None]


def test_copy_with_psycopg2(wire: Wire, connect: Any, table: str) -> None:
    connection = connect(psycopg2, autocommit=True)
    text = "".join(f"{number}\t{'y' * 100}\n" for number in range(20_000))
    with wire.record() as log, connection.cursor() as cursor:
        cursor.copy_expert("copy wired from stdin", io.StringIO(text))
        out = io.StringIO()
        cursor.copy_expert("copy wired to stdout", out)
    assert out.getvalue() == text
    assert [exchange.tags for exchange in log.exchanges] == [["COPY 20000"]] * 2


@every_driver
def test_large_statements_and_results_pass_unharmed(wire: Wire, connect: Any, api: Any) -> None:
    connection = connect(api, autocommit=True)
    text = "ä" * 3_000_000
    with wire.record() as log, connection.cursor() as cursor:
        cursor.execute("select %s::text", [text])
        assert cursor.fetchone() == (text,)
        cursor.execute("select g, repeat('x', g %% 50) from generate_series(1, %s) g", [100_000])
        assert len(cursor.fetchall()) == 100_000
    assert [exchange.rows for exchange in log.exchanges] == [1, 100_000]
    if api is psycopg2:  # which puts the value into the statement
        assert log.statements[0] == f"select '{text}'::text"


def test_notices_and_notifications_pass(wire: Wire, connect: Any) -> None:
    connection = connect(psycopg, autocommit=True)
    notices: list[str] = []
    connection.add_notice_handler(lambda notice: notices.append(notice.message_primary))
    with wire.record() as log:
        connection.execute("do $$ begin raise notice 'look'; end $$")
        connection.execute("listen ch")
        connect(psycopg, autocommit=True).execute("notify ch, 'here'")
        received = list(connection.notifies(timeout=10, stop_after=1))
    assert notices == ["look"]
    assert [notification.payload for notification in received] == ["here"]
    assert log.round_trips == 3


def test_a_query_can_be_cancelled(wire: Wire, connect: Any) -> None:
    # Not psycopg2: its cancel() waits for the server with the GIL, which the proxy needs.
    connection = connect(psycopg, autocommit=True)
    timer = threading.Timer(0.3, connection.cancel_safe)
    timer.start()
    with wire.record() as log:
        with pytest.raises(psycopg.errors.QueryCanceled):
            connection.execute("select pg_sleep(30)")
    timer.join()
    assert log.exchanges[0].sqlstate == "57014"
    assert log.connections_opened == 0


def test_encryption_is_refused_and_optional(url: str, wire: Wire) -> None:
    with psycopg.connect(wire.url(url), sslmode="prefer") as connection:
        assert connection.execute("select 1").fetchone() == (1,)
    with pytest.raises(psycopg.OperationalError, match="SSL"):
        psycopg.connect(wire.url(url), sslmode="require")


def test_records_are_complete_and_nest(wire: Wire, connect: Any) -> None:
    connections = [connect(module, autocommit=True) for module in DRIVERS * 4]

    def work(connection: Any) -> None:
        for _ in range(50):
            connection.cursor().execute("select 1")

    for _ in range(5):
        with wire.record() as outer:
            connections[0].cursor().execute("select 0")
            with wire.record() as inner:
                threads = [threading.Thread(target=work, args=[c]) for c in connections]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
        work(connections[0])
        # psycopg prepares "select 1" once per connection, in a round trip of its own.
        assert inner.statements == ["select 1"] * 400
        assert outer.statements == ["select 0", *inner.statements]


class Clock:
    """Stands still, and goes on when it is told to: for the proxy, in place of the module `time`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._now = 100.0
        self.sleeps = 0  # begun so far

    def monotonic(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        with self._changed:
            until = self._now + seconds
            self.sleeps += 1
            self._changed.wait_for(lambda: self._now >= until)

    def advance(self, seconds: float) -> None:
        with self._changed:
            self._now += seconds
            self._changed.notify_all()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(wire_module, "time", clock)
    yield clock
    clock.advance(1e9)  # a test that failed leaves sleepers


@pytest.fixture
def beside() -> Iterator[ThreadPoolExecutor]:
    """A thread beside the test's own."""
    with ThreadPoolExecutor(1) as thread:
        yield thread


@every_driver
def test_time_in_transaction(
    wire: Wire, connect: Any, api: Any, url: str, clock: Clock, beside: ThreadPoolExecutor
) -> None:
    connection = connect(api)
    waiting = f"select count(*) from pg_locks where locktype = 'advisory' and not granted and database = ({OWN})"
    with direct(url) as cursor, wire.record() as log:

        def waits() -> bool:
            cursor.execute(waiting)
            return bool(cursor.fetchone()[0])

        cursor.execute("select pg_advisory_lock(7)")
        clock.advance(5)
        done = beside.submit(lambda: connection.cursor().execute("select pg_advisory_xact_lock(7)"))
        wait_until(waits)
        clock.advance(10)
        cursor.execute("select pg_advisory_unlock(7)")
        done.result(10)
        clock.advance(20)
        connection.commit()
        clock.advance(5)
    assert log.time_in_transaction == 30
    assert log.idle_in_transaction == 20
    assert log.exchanges[1].end - log.exchanges[1].start == 10


def test_time_in_a_transaction_that_spans_the_record(wire: Wire, connect: Any, clock: Clock) -> None:
    connection = connect(psycopg2)
    connection.cursor().execute("select 1")
    with wire.record() as log:
        clock.advance(1)
        assert log.time_in_transaction == 1
        clock.advance(1)
    clock.advance(1)
    assert log.time_in_transaction == log.idle_in_transaction == 2
    with wire.record() as log:
        connection.close()
        wait_until(lambda: not wire.open_connections)
        clock.advance(1)
    assert log.time_in_transaction == 0


def test_url_keeps_everything_else(wire: Wire) -> None:
    here = f"{wire.host}:{wire.port}"
    assert wire.url("postgresql+psycopg2://u:p%40@db:1/d?sslmode=disable") == (
        f"postgresql+psycopg2://u:p%40@{here}/d?sslmode=disable"
    )
    assert wire.url("postgresql:///d?host=/run/pg&port=1") == f"postgresql://{here}/d"
    assert wire.url(sa.make_url("postgresql://u:p@db/d")) == f"postgresql://u:p@{here}/d"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
def test_messages_are_found_however_the_stream_is_cut(size: int) -> None:
    def message(kind: bytes, body: bytes) -> bytes:
        return kind + struct.pack("!I", len(body) + 4) + body

    wanted = [(b"C", b"SELECT 2\0"), (b"Z", b"I"), (b"E", b"x" * 300), (b"Z", b"E")]
    stream = message(b"D", b"row") * 2 + message(*wanted[0]) + message(*wanted[1])
    stream += message(b"d", b"y" * 500) + message(b"D", b"") + message(*wanted[2]) + message(*wanted[3])
    frames = _Frames(b"CEZ", counted=ord("D"))
    found, rows, base = [], [], 0
    for start in range(0, len(stream), size):
        for kind, body, begin, end in frames.feed(stream[start : start + size]):
            found.append((bytes([kind]), body))
            rows.append(frames.take_count())
            assert stream[start + begin : start + end] == message(*found[-1])
        base += size
    assert found == wanted
    assert rows == [2, 0, 1, 0]


# What it disturbs ----------------------------------------------------------------------------


@every_driver
def test_delay_is_added_each_way(wire: Wire, connect: Any, api: Any, clock: Clock, beside: ThreadPoolExecutor) -> None:
    connection = connect(api, autocommit=True)
    wire.delay = 2.0
    with wire.record() as log:
        done = beside.submit(lambda: connection.cursor().execute("select 1"))
        for sleeps in (1, 2):  # on the way to the server, on the way back
            wait_until(lambda sleeps=sleeps: clock.sleeps == sleeps)
            clock.advance(2.0)
        done.result(10)
        wire.delay = 0
        connection.cursor().execute("select 2")
    assert [exchange.end - exchange.start for exchange in log.exchanges] == [4.0, 0.0]


def test_delay_does_not_add_up_within_a_burst(wire: Wire, clock: Clock) -> None:
    """Ten pieces sent at once, each late by 50 s, are all there after 50 s, not after 500."""
    with socket.create_server(("127.0.0.1", 0)) as echo:
        with Wire(*echo.getsockname()) as proxy:
            proxy.delay = 50.0
            with socket.create_connection((proxy.host, proxy.port)) as client:
                client.sendall(struct.pack("!II", 8, 3 << 16))
                server, _ = echo.accept()
                with server:
                    wait_until(lambda: clock.sleeps == 1)
                    clock.advance(50.0)
                    assert server.recv(8, socket.MSG_WAITALL)
                    piece = b"p" + struct.pack("!I", 4)
                    client.sendall(piece)
                    wait_until(lambda: clock.sleeps == 2)
                    outlets = [outlet for connection in proxy._connections.values() for outlet in connection.outlets]
                    for _ in range(9):
                        client.sendall(piece)
                    wait_until(lambda: sum(len(data) for out in outlets for _, data, *_ in tuple(out._queue)) == 45)
                    proxy.delay = 0.0
                    clock.advance(50.0)
                    assert len(server.recv(50, socket.MSG_WAITALL)) == 50


@every_driver
def test_cut_is_silent_until_restored(wire: Wire, connect: Any, api: Any) -> None:
    connection = connect(api, autocommit=True)
    wire.cut()
    done = threading.Event()

    def work() -> None:
        connection.cursor().execute("select 1")
        done.set()

    thread = threading.Thread(target=work)
    with wire.record() as log:
        thread.start()
        assert not done.wait(0.3)
        with pytest.raises(api.OperationalError, match="timeout"):
            connect(api, connect_timeout=2)
        assert log.round_trips == 0
        wire.restore()
        assert done.wait(10)
        thread.join()
    assert log.statements == ["select 1"]


def test_cut_hides_a_closed_client_from_the_server(url: str, wire: Wire, connect: Any) -> None:
    connection = connect(psycopg)
    connection.execute("select 1")
    pid = connection.info.backend_pid
    sql = "select count(*) from pg_stat_activity where pid = %s"
    wire.cut()
    connection.close()
    with direct(url) as cursor:

        def backends() -> int:
            cursor.execute(sql, [pid])
            return int(cursor.fetchone()[0])

        time.sleep(0.2)
        assert backends() == 1
        wire.restore()
        wait_until(lambda: not backends())


@every_driver
@pytest.mark.parametrize("how", ["reset", "close_connections"])
def test_breaking_connections(wire: Wire, connect: Any, api: Any, how: str) -> None:
    connections = [connect(api, autocommit=True) for _ in range(3)]
    other = connect(api)
    other.cursor().execute("select 1")
    with wire.record() as log:
        getattr(wire, how)()
    assert wire.open_connections == 0
    assert log.time_in_transaction < 1
    for connection in [*connections, other]:
        with pytest.raises((api.OperationalError, api.InterfaceError)):
            connection.cursor().execute("select 1")
    again = connect(api, autocommit=True)
    again.cursor().execute("select 1")


@pytest.mark.parametrize("reset", [True, False])
def test_a_reset_is_a_reset_and_a_close_is_not(wire: Wire, reset: bool) -> None:
    with raw_client(wire) as client:
        if reset:
            wire.reset()
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        else:
            wire.close_connections()
            assert client.recv(1) == b""


def test_reset_does_not_wait_for_a_client_that_does_not_read(wire: Wire, beside: ThreadPoolExecutor) -> None:
    with raw_client(wire) as client:
        send_query(client, b"select repeat('x', 1000) from generate_series(1, 100000)")
        assert select.select([client], [], [], 10)[0]  # the answer comes, and is not read
        beside.submit(wire.reset).result(30)


def test_the_servers_last_words_and_its_end_arrive(wire: Wire) -> None:
    with raw_client(wire) as client:
        send_query(client, b"select pg_terminate_backend(pg_backend_pid())")
        received = b""
        while data := client.recv(65536):
            received += data
    assert b"C57P01" in received


@every_driver
def test_refuse(wire: Wire, connect: Any, api: Any) -> None:
    open_already = connect(api, autocommit=True)
    wire.refuse = True
    with wire.record() as log:
        with pytest.raises(api.OperationalError):
            connect(api)
    assert log.connections_opened == 0
    open_already.cursor().execute("select 1")
    wire.refuse = False
    connect(api)


def test_a_server_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with Wire("127.0.0.1", port) as wire:
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(host=wire.host, port=wire.port)


def insert(connection: Any, number: int) -> None:
    connection.cursor().execute("insert into wired values (%s, 'x')", [number])


@every_driver
def test_reset_before_a_statement(url: str, wire: Wire, connect: Any, table: str, api: Any) -> None:
    connection = connect(api)
    insert(connection, 1)
    trigger = wire.reset_when(lambda sql: sql == "COMMIT")
    with pytest.raises(api.OperationalError):
        connection.commit()
    assert trigger.fired == 1
    assert count(url, table) == 0
    # Once is enough, unless told otherwise.
    connection = connect(api)
    insert(connection, 1)
    connection.commit()
    assert count(url, table) == 1


@every_driver
@pytest.mark.parametrize("delay", [0, 0.002])
def test_reset_after_the_commit_was_executed(
    url: str, wire: Wire, connect: Any, table: str, api: Any, delay: float
) -> None:
    wire.delay = delay
    connection = connect(api)
    insert(connection, 1)
    wire.reset_when(lambda sql: sql == "COMMIT", when="after")
    with wire.record() as log:
        with pytest.raises(api.OperationalError):
            connection.commit()
    assert count(url, table) == 1
    assert log.statements == ["COMMIT"]
    assert (log.exchanges[0].status, log.exchanges[0].delivered) == ("I", False)


@every_driver
def test_cut_before_a_statement(url: str, wire: Wire, connect: Any, table: str, api: Any) -> None:
    connection = connect(api, autocommit=True)
    trigger = wire.cut_before(lambda sql: sql.startswith("insert"), times=None)
    thread = threading.Thread(target=insert, args=[connection, 1])
    thread.start()
    wait_until(lambda: trigger.fired)
    assert count(url, table) == 0
    wire.restore()
    thread.join(10)
    assert count(url, table) == 1
    trigger.remove()
    insert(connection, 2)
    assert (trigger.fired, count(url, table)) == (1, 2)


@every_driver
def test_one_connection_is_disturbed_and_the_others_are_not(wire: Wire, connect: Any, api: Any) -> None:
    one, other = connect(api, autocommit=True), connect(api, autocommit=True)
    with wire.record() as log:
        one.cursor().execute("select 1")
    number = log.exchanges[0].connection
    assert number in wire.connections
    wire.cut(number)
    other.cursor().execute("select 1")
    thread = threading.Thread(target=one.cursor().execute, args=["select 1"])
    thread.start()
    other.cursor().execute("select 1")
    assert thread.is_alive()
    wire.restore()
    thread.join(10)
    assert not thread.is_alive()
    wire.reset(number)
    other.cursor().execute("select 1")
    with pytest.raises(api.OperationalError):
        one.cursor().execute("select 1")


@every_driver
def test_a_half_closed_connection_still_reaches_the_server(
    url: str, wire: Wire, connect: Any, table: str, api: Any
) -> None:
    connection = connect(api, autocommit=True)
    wire.half_close()
    with pytest.raises(api.OperationalError):
        insert(connection, 1)
    wait_until(lambda: not wire.connections)


@every_driver
def test_an_answer_that_is_cut_short(url: str, wire: Wire, connect: Any, table: str, api: Any) -> None:
    connection = connect(api)
    insert(connection, 1)
    trigger = wire.truncate_when(lambda sql: sql == "COMMIT")
    with wire.record() as log, pytest.raises(api.OperationalError):
        connection.commit()
    assert trigger.fired == 1
    assert not log.exchanges[-1].delivered
    assert count(url, table) == 1


def test_a_trigger_inside_a_pipeline(url: str, wire: Wire, connect: Any, table: str) -> None:
    connection = connect(psycopg, autocommit=True)
    wire.reset_when(lambda sql: sql == "select 2")
    with wire.record() as log:
        with pytest.raises(psycopg.OperationalError):
            with connection.pipeline():
                insert(connection, 1)
                connection.execute("select 2")
    assert log.exchanges == []
    assert count(url, table) == 0


def test_a_predicate_that_fails_ends_the_connection(wire: Wire, connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: raised.append(arguments.exc_type))
    connection = connect(psycopg2, autocommit=True)
    wire.reset_when(lambda sql: bool(1 / 0))
    with pytest.raises(psycopg2.OperationalError):
        connection.cursor().execute("select 1")
    wire.close()
    assert raised == [ZeroDivisionError]


def test_close_leaves_no_thread_and_no_socket(pg: postgres.Server, url: str) -> None:
    before = set(threading.enumerate())
    wire = Wire(pg.host, pg.port)
    wire.delay = 0.001
    connections = [psycopg2.connect(wire.url(url)) for _ in range(10)]
    wire.cut()
    wire.close()
    wire.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((wire.host, wire.port))
    for connection in connections:
        connection.close()


def test_exchanges_read_well() -> None:
    shown = repr(Exchange(1, 2.0, ["select 1"], "I"))
    assert shown.startswith("Exchange(connection=1, start=2.0, statements=['select 1'], status='I'")
    assert "_" not in shown
