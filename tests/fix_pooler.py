"""A real PgBouncer in transaction mode, before the server of the run. Started once, when first asked for."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from fictive.testing import postgres
from tests.fresh_database import PATIENCE

CONFIG = """
[databases]
* = host={host} port={port} user={user}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {own}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
default_pool_size = {size}
max_client_conn = 500
query_wait_timeout = {patience}
# otherwise a database that a test has dropped stays in it
server_idle_timeout = 60
server_login_retry = {retry}
ignore_startup_parameters = extra_float_digits
"""


def mark_exceptions(items: list[pytest.Item], *, whole_files: bool) -> None:
    """Expect the failure of what cannot pass through a pooler. In whole files, a name of no test is an error."""
    listed = tomllib.loads(Path(__file__).with_name("pooler_exceptions.toml").read_text(encoding="utf-8"))["because"]
    here, unknown = Path(__file__).parent, []
    names = {item: f"{item.path.relative_to(here)}::{item.nodeid.partition('::')[2]}" for item in items}
    for group in listed:
        mark = pytest.mark.xfail(reason=group["reason"], run=group.get("run", True), strict=True)
        for name in group["tests"]:
            found = [item for item, own in names.items() if _fits(own, name)]
            for item in found:
                item.add_marker(mark)
            if whole_files and not found and any(own.startswith(name.partition("::")[0]) for own in names.values()):
                unknown.append(name)
    if unknown:
        raise pytest.UsageError(f"pooler_exceptions.toml names tests that are not there: {unknown}")


def _fits(own: str, name: str) -> bool:
    own, _, parameters = own.partition("[")
    name, bracket, pattern = name.partition("[")
    if bracket:
        return own == name and fnmatch.fnmatchcase(parameters[:-1], pattern[:-1])
    return own == name or own.startswith(f"{name}::")


class Pooler:
    """A running PgBouncer."""

    def __init__(self, port: int) -> None:
        self.host = "127.0.0.1"
        self.port = port

    def url(self, url: str) -> str:
        """A server's URL, by way of the pooler."""
        return sa.make_url(url).set(host=self.host, port=self.port).render_as_string(hide_password=False)

    def console(self, command: str) -> list[dict[str, Any]]:
        """Run a command of its own console, such as `SHOW POOLS`."""
        # It speaks the simple protocol only.
        with psycopg.connect(
            host=self.host, port=self.port, dbname="pgbouncer", user="postgres", autocommit=True,
            cursor_factory=psycopg.ClientCursor, row_factory=psycopg.rows.dict_row,
        ) as connection:  # fmt: skip
            cursor = connection.execute(command.encode())
            return cursor.fetchall() if cursor.description else []


def program() -> str:
    """Where PgBouncer is. Where it is missing the test is skipped, and under CI it fails."""
    found = shutil.which("pgbouncer", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin")
    if found is None:
        why = "PgBouncer is not installed: apt-get install pgbouncer"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    return found


@contextlib.contextmanager
def started_pooler(
    server: Any, size: int = 2, patience: int = 120, retry: float = 15, mode: str = "transaction"
) -> Iterator[Pooler]:
    """A PgBouncer with `size` server connections for each database, for one of which it waits `patience` seconds; one
    that cannot be made it tries again after `retry` seconds."""
    executable = program()
    with tempfile.TemporaryDirectory(prefix="fictive-pooler-") as directory, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        file = Path(directory, "pgbouncer.ini")
        file.write_text(
            CONFIG.format(
                host=server.host,
                port=server.port,
                user=server.user,
                own=port,
                size=size,
                patience=patience,
                retry=retry,
                mode=mode,
            ),
            encoding="utf-8",
        )
        account: dict[str, Any] = {}
        if os.geteuid() == 0:  # as which it refuses to run
            nobody = pwd.getpwnam("nobody")
            account = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chmod(directory, 0o755)
        with Path(directory, "log").open("wb") as log:
            process = subprocess.Popen([executable, str(file)], stdout=log, stderr=log, cwd="/", **account)
        try:
            deadline = time.monotonic() + PATIENCE
            while not _accepts(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail("PgBouncer does not start:\n" + Path(directory, "log").read_text(errors="replace"))
                time.sleep(0.01)
            yield Pooler(port)
        finally:
            process.terminate()
            process.wait()


@pytest.fixture(scope="session")
def pooler(pg: postgres.Server, request: pytest.FixtureRequest) -> Iterator[Pooler]:
    """The pooler of this worker, with two server connections for each database."""
    patience = 5 if request.config.getoption("pooler") else 120  # tests that need a third connection are to fail soon
    with started_pooler(pg, patience=patience) as pooler:
        yield pooler


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
