"""Ends an embedded server whose owner ended without doing so; run as a script, by `fictive.testing.postgres`.

The guard reads a pipe that the owner holds open. The kernel closes it however the owner ends, ``kill -9`` included;
then the guard stops PostgreSQL and deletes its directory. It runs in a session of its own, so that Ctrl-C at the
owner's terminal is not for it, and without site-packages: standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

_SECONDS = 5.0  # for PostgreSQL to heed a signal


def remove(instance: Path) -> None:
    """Stop the server in ``instance`` at once, if it runs, and delete the directory."""
    data = instance / "server" / "data"
    for number in (signal.SIGQUIT, signal.SIGKILL):  # SIGQUIT is an immediate shutdown
        pid = running(data)
        if pid is None:
            break
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + _SECONDS
        while running(data) == pid and time.monotonic() < deadline:
            time.sleep(0.005)
    shutil.rmtree(instance, ignore_errors=True)


def running(data: Path) -> int | None:
    """Return the process id of the server on the directory ``data``, None when none runs.

    A recorded process id may be another's by now, so it counts only where that process was started on ``data``.
    """
    try:
        pid = int((data / "postmaster.pid").read_text().split()[0])
        command = _command(pid)
    except (OSError, ValueError, IndexError):
        return None
    return pid if os.fsencode(data) in command else None


def _command(pid: int) -> bytes:
    if Path("/proc/self/cmdline").exists():
        return Path(f"/proc/{pid}/cmdline").read_bytes()  # empty for one that ended and was not waited for
    return subprocess.run(["ps", "-ww", "-o", "args=", "-p", str(pid)], stdout=subprocess.PIPE, check=False).stdout


def prefix() -> str:
    """Return how the names of this user's servers' directories begin."""
    return f"fictive-pg-{os.geteuid()}-"


def try_lock(instance: Path) -> int | None:
    """Lock ``instance`` and return the lock's descriptor, or None when a living process has it."""
    descriptor = os.open(instance / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def remove_orphans(parent: Path) -> None:
    """Stop and delete the servers whose owner and guard were both killed."""
    for instance in parent.glob(f"{prefix()}*"):
        with contextlib.suppress(OSError):  # another start is at it
            if instance.is_symlink() or instance.stat().st_uid != os.geteuid():
                continue
            lock = try_lock(instance)
            if lock is not None:
                remove(instance)
                os.close(lock)


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    sys.stdin.read()
    remove(Path(sys.argv[1]))
