"""The commands, for any way to the databases: `install(group, load)` puts them into a click group."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import click
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from ..databases.cleanup import cleanup_tables
from ..databases.create import create_database, database_exists, drop_database
from ..errors import DatabaseInUse, FictiveError
from ..session.durations import timeout_in_ms
from .activity import activity, blocker_tree, locks
from .doctor import examine, examine_code
from .findings import Severity
from .output import print_json, print_table
from .protection import why_protected
from .settings import settings_of_databases
from .target import Database, Target

__all__ = ["EXIT_FOUND", "EXIT_REFUSED", "EXIT_UNREACHABLE", "install"]

EXIT_FOUND = 1
"""`doctor` found something; `wait` waited in vain; a command failed."""
EXIT_UNREACHABLE = 3
EXIT_REFUSED = 4
"""A protected database, or one that others are connected to."""

_META = "fictive.command_line.load"
_PAUSE = 0.2
_MOST_NAMED = 10

_json = click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
_bind = click.option("--bind", metavar="KEY", help="One database: its bind key, or 'default'.")
_yes = click.option("--yes", is_flag=True, help="Do not ask.")


def install(group: click.Group, load: Callable[[], Target]) -> None:
    """Add the commands to `group`. `load` is called when a command needs the databases."""
    for command in (_doctor, _locks, _activity, _create, _drop, _cleanup, _wait, _settings):
        group.add_command(_with_target(command, load))


def _with_target(command: click.Command, load: Callable[[], Target]) -> click.Command:
    """A copy of `command` whose first argument is the target."""
    run = command.callback
    assert run is not None

    def callback(**arguments: Any) -> Any:
        with _readable_errors():
            target = load()
            try:
                return run(target, **arguments)
            finally:
                if target.owned:
                    for database in target.databases:
                        database.engine.dispose()

    copy: click.Command = type(command)(
        command.name, params=command.params, callback=callback, help=command.help, short_help=command.short_help
    )
    return copy


@contextlib.contextmanager
def _readable_errors() -> Iterator[None]:
    """Errors as one line and an exit code, without a traceback."""
    try:
        yield
    except DatabaseInUse as error:
        click.echo(f"Refused: {error}", err=True)
        sys.exit(EXIT_REFUSED)
    except sa.exc.OperationalError as error:
        lines = [line.strip() for line in str(error.orig or error).splitlines()]
        click.echo(f"The database cannot be reached: {'. '.join(filter(None, lines))}", err=True)
        sys.exit(EXIT_UNREACHABLE)
    except (FictiveError, sa.exc.SQLAlchemyError) as error:
        click.echo(f"Error: {getattr(error, 'orig', None) or error}".rstrip(), err=True)
        sys.exit(EXIT_FOUND)


# -- looking ----------------------------------------------------------------------------------------------------------


@click.command("doctor")
@_json
@_bind
@click.option("--patience", default="1s", show_default=True, metavar="DURATION",
              help="For how long somebody must be idle in a transaction, or blocked, to be named.")  # fmt: skip
@click.option("--code", is_flag=True, help="Read the app's source instead. No database is asked.")
def _doctor(target: Target, as_json: bool, bind: str | None, patience: str, code: bool) -> None:
    """Say what is wrong with the databases, or with the app's code. Changes nothing.

    Exit code 0: nothing; 1: something; 3: a database cannot be reached.
    """
    if code:
        found = examine_code(target)
    else:
        found = examine(target, bind, patience=timeout_in_ms(patience, "--patience") / 1000)
    wrong = [each for each in found if each.severity is not Severity.INFO]
    if as_json:
        print_json({**dataclasses.asdict(each), "severity": each.severity.value} for each in found)
    else:
        for each in found:
            of = f"{each.bind}: " if each.bind and len(target.databases) > 1 else ""
            colour = {"error": "red", "warning": "yellow"}.get(each.severity.value)
            click.echo(f"{click.style(each.severity.value.ljust(8), fg=colour)}{each.check}: {of}{each.what}")
            if each.remedy:
                click.echo(f"{'':8}{each.remedy}")
        click.echo(f"\n{len(wrong)} finding{'' if len(wrong) == 1 else 's'}." if wrong else "\nNothing is wrong.")
    if wrong:
        sys.exit(EXIT_FOUND)


@click.command("locks")
@_json
@_bind
@click.option("--waiting", is_flag=True, help="Only who waits, and for whom.")
def _locks(target: Target, as_json: bool, bind: str | None, waiting: bool) -> None:
    """Show who holds which lock, and who waits for whom."""
    for database in target.chosen(bind):
        rows = locks(database.engine)
        tree = list(blocker_tree(activity(database.engine)))
        if waiting:
            in_tree = {row["pid"] for row in tree}
            rows = [row for row in rows if row["pid"] in in_tree]
        if as_json:
            print_json({"bind": database.key, **row} for row in rows)
            continue
        print_table(
            ("pid", "user", "application", "mode", "object", "granted", "blocked_by", "endpoint", "query"), rows,
            empty="No locks.",
        )  # fmt: skip
        for row in tree:
            if row["depth"] == 0:
                click.echo()
            says = "waits: " if row["depth"] else "blocks: "
            query = " ".join(str(row.get("query") or "").split())
            click.echo(f"{'  ' * row['depth']}pid {row['pid']} {says}{query}")


@click.command("activity")
@_json
@_bind
@click.option("--watch", is_flag=False, flag_value="2s", default=None, metavar="[DURATION]",
              help="Again and again, every 2 seconds or as given, until Ctrl-C.")  # fmt: skip
@click.option("--times", type=click.IntRange(min=1), help="With --watch: so many times.")
@click.option("--all", "everyone", is_flag=True, help="Those that do nothing too.")
def _activity(
    target: Target, as_json: bool, bind: str | None, watch: str | None, times: int | None, everyone: bool
) -> None:
    """Show who is connected and what they do. The oldest transaction comes first."""
    pause = timeout_in_ms(watch, "--watch") / 1000 if watch else None
    done = 0
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            if pause and not as_json and sys.stdout.isatty():
                click.clear()
            for database in target.chosen(bind):
                rows = [row for row in activity(database.engine) if everyone or row["state"] != "idle"]
                if as_json:
                    print_json({"bind": database.key, **row} for row in rows)
                else:
                    print_table(
                        ("pid", "user", "application", "state", "transaction_seconds", "state_seconds", "waits_for",
                         "blocked_by", "endpoint", "query"),
                        rows,
                        empty="No other session is active." if not everyone else "No other session is connected.",
                    )  # fmt: skip
            done += 1
            if not pause or (times and done >= times):
                return
            time.sleep(pause)


@click.command("settings")
@_json
def _settings(target: Target, as_json: bool) -> None:
    """Show what is in force, and where it came from. Passwords are hidden."""
    rows = [dataclasses.asdict(row) for row in settings_of_databases(list(target.databases), target.origins)]
    rows += (dict(row) for row in target.settings())
    if as_json:
        print_json(rows)
        return
    widths = [max(len(str(row[name])) for row in rows) for name in ("bind", "name", "value")]
    for row in rows:
        cells = (row["bind"].ljust(widths[0]), row["name"].ljust(widths[1]), row["value"].ljust(widths[2]))
        click.echo("  ".join((*cells, row["origin"])).rstrip())


@click.command("wait")
@_json
@_bind
@click.option("--timeout", default="30s", show_default=True, metavar="DURATION", help="For how long at most.")
def _wait(target: Target, as_json: bool, bind: str | None, timeout: str) -> None:
    """Wait until the databases answer.

    Exit code 0: they do; 1: not in the time given.
    """
    deadline = time.monotonic() + timeout_in_ms(timeout, "--timeout") / 1000
    for database in target.chosen(bind):
        started, error = time.monotonic(), _try(database)
        while error is not None and time.monotonic() < deadline:
            time.sleep(min(_PAUSE, max(0.0, deadline - time.monotonic())))
            error = _try(database)
        seconds = round(time.monotonic() - started, 3)
        if as_json:
            print_json([{"bind": database.key, "answers": error is None, "seconds": seconds, "error": error}])
        elif error is None:
            click.echo(f"{database.key}: answers, after {seconds:.1f} s.")
        else:
            click.echo(f"{database.key}: no answer in {timeout}: {error}", err=True)
        if error is not None:
            sys.exit(EXIT_FOUND)


def _try(database: Database) -> str | None:
    """None, or why the database does not answer. A connection attempt is given up after a while."""
    try:
        with database.engine.connect() as connection:
            connection.exec_driver_sql("SELECT 1")
    except sa.exc.DBAPIError as error:
        return " ".join(str(error.orig).split())
    return None


# -- changing ---------------------------------------------------------------------------------------------------------


@click.command("create")
@_json
@_bind
@click.option("--template", metavar="NAME", help="The database to copy.")
@click.option("--owner", metavar="ROLE")
@click.option("--encoding", metavar="NAME")
def _create(
    target: Target, as_json: bool, bind: str | None, template: str | None, owner: str | None, encoding: str | None
) -> None:
    """Create the databases, where they are not there yet."""
    for database in target.chosen(bind):
        name = _name_of(database)
        made = create_database(
            name, server_url=database.engine.url, template=template, owner=owner, encoding=encoding, exist_ok=True
        )
        _say(as_json, database, created=made, text=f"{name}: {'created' if made else 'is there already'}.")


@click.command("drop")
@_json
@_bind
@_yes
@click.option("--force", is_flag=True, help="End the sessions of those who are connected.")
def _drop(target: Target, as_json: bool, bind: str | None, yes: bool, force: bool) -> None:
    """Drop the databases with all that is in them.

    Refused (exit code 4) for a protected database, and while others are connected, unless --force.
    """
    databases = [each for each in target.chosen(bind) if database_exists(_name_of(each), server_url=each.engine.url)]
    for database in target.chosen(bind):
        if database not in databases:
            _say(as_json, database, dropped=False, text=f"{database.engine.url.database}: is not there.")
    _check_protection(target, databases)
    for database in databases:
        _name_the_connected(database)
        if not force and (rows := activity(database.engine)):
            raise click.exceptions.Exit(_refuse(f"{len(rows)} others are connected: --force ends their sessions."))
    for database in databases:
        name = _name_of(database)
        _confirm(yes, f"Drop the database {name!r} at {_where(database)}, with all that is in it?", name)
        database.engine.dispose()
        dropped = drop_database(name, server_url=database.engine.url, force=force, missing_ok=True)
        _say(as_json, database, dropped=dropped, text=f"{name}: dropped.")


@click.command("cleanup")
@_json
@_bind
@_yes
@click.option("--lock-timeout", default="5s", show_default=True, metavar="DURATION")
def _cleanup(target: Target, as_json: bool, bind: str | None, yes: bool, lock_timeout: str) -> None:
    """Empty all tables of the app. Their sequences are set back; alembic_version stays as it is.

    Refused (exit code 4) for a protected database.
    """
    timeout_in_ms(lock_timeout, "--lock-timeout")
    databases = target.chosen(bind)
    _check_protection(target, databases)
    for database in databases:
        if database.engine.dialect.name == "postgresql":
            _name_the_connected(database)
    for database in databases:
        name = str(database.engine.url.database)
        metadata = database.metadata if database.metadata is not None else _reflected(database.engine)
        _confirm(yes, f"Empty {len(metadata.tables)} tables of {name!r} at {_where(database)}?", name)
        with sa_orm.Session(database.engine) as session, session.begin():
            cleanup_tables(session, metadata, lock_timeout=lock_timeout)
        _say(as_json, database, emptied=len(metadata.tables), text=f"{name}: {len(metadata.tables)} tables emptied.")


def _reflected(engine: sa.Engine) -> sa.MetaData:
    metadata = sa.MetaData()
    metadata.reflect(engine, only=lambda name, _: name != "alembic_version", resolve_fks=False)
    return metadata


def _name_of(database: Database) -> str:
    return database.engine.url.database or ""


def _where(database: Database) -> str:
    url = database.engine.url
    return f"{url.host or 'localhost'}:{url.port or 5432}"


def _check_protection(target: Target, databases: Any) -> None:
    for database in databases:
        if (why := why_protected(database.engine, target.config)) is not None:
            raise click.exceptions.Exit(_refuse(f"{database.engine.url.database!r} is protected: {why}."))


def _refuse(why: str) -> int:
    click.echo(f"Refused: {why}", err=True)
    return EXIT_REFUSED


def _name_the_connected(database: Database) -> None:
    rows = activity(database.engine)
    for row in rows[:_MOST_NAMED]:
        known = (row["user"], row["application"], row["address"], row["state"])
        who = ", ".join(str(each) for each in known if each)
        click.echo(f"connected to {_name_of(database)!r}: pid {row['pid']} ({who})", err=True)
    if len(rows) > _MOST_NAMED:
        click.echo(f"and {len(rows) - _MOST_NAMED} more", err=True)


def _confirm(yes: bool, question: str, name: str) -> None:
    if yes:
        return
    if click.prompt(f"{question} Type its name", default="", show_default=False, err=True) != name:
        raise click.Abort


def _say(as_json: bool, database: Database, *, text: str, **facts: Any) -> None:
    if as_json:
        print_json([{"bind": database.key, "database": database.engine.url.database, **facts}])
    else:
        click.echo(text)
