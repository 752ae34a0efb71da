"""The commands, for any way to the databases: `install(group, load)` puts them into a click group."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import click
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from ..databases.cleanup import cleanup_tables
from ..databases.create import create_database, database_exists, drop_database
from ..errors import ConfigurationError, DatabaseInUse, FictiveError
from ..session.durations import timeout_in_ms
from .activity import activity, blocker_tree, locks, require_postgresql
from .doctor import examine, examine_code
from .findings import Severity
from .output import on_terminal, print_json, print_table, printable
from .protection import why_protected
from .settings import settings_of_databases
from .target import Database, Target, each_once

__all__ = ["EXIT_FOUND", "EXIT_REFUSED", "EXIT_UNREACHABLE", "EXIT_WRONG", "install"]

EXIT_FOUND = 1
"""`doctor` found something; `wait` waited in vain; a command failed."""
EXIT_WRONG = 2
"""An option or a setting, as click says for options."""
EXIT_UNREACHABLE = 3
EXIT_REFUSED = 4
"""A protected database, or one that others are connected to."""

_META = "fictive.command_line.load"
_PAUSE = 0.2
_MOST_NAMED = 10


def _seconds(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """Of `5s`, `100ms`, `1min`, or a number of seconds."""
    if value is None:
        return None
    number = re.fullmatch(r"\s*\d+(?:\.\d*)?\s*", value, re.ASCII)
    try:
        return timeout_in_ms(float(value) if number else value, "") / 1000
    except ConfigurationError:
        raise click.BadParameter(
            f"{value!r} is no duration from 1ms to 24d, such as 5s, 100ms, 1min or 30, which is seconds."
        ) from None


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
        _refuse(str(error.args[0]).replace("force=True", "--force"))  # as that argument is called here
        sys.exit(EXIT_REFUSED)
    except ConfigurationError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(EXIT_WRONG)
    except sa.exc.OperationalError as error:
        if error.statement is not None and not error.connection_invalidated:  # such as a timeout
            click.echo(f"Error: {error.orig}".rstrip(), err=True)
            sys.exit(EXIT_FOUND)
        lines = [line.strip() for line in str(error.orig or error).splitlines()]
        click.echo(f"The database cannot be reached: {'. '.join(filter(None, lines))}", err=True)
        sys.exit(EXIT_UNREACHABLE)
    except (FictiveError, sa.exc.SQLAlchemyError) as error:
        click.echo(f"Error: {getattr(error, 'orig', None) or error}".rstrip(), err=True)
        sys.exit(EXIT_FOUND)
    except OSError as error:
        if error.errno == errno.EPIPE:  # click ends quietly
            raise
        click.echo(f"Error: {error}", err=True)
        sys.exit(EXIT_FOUND)


# -- looking ----------------------------------------------------------------------------------------------------------


@click.command("doctor")
@_json
@_bind
@click.option("--patience", callback=_seconds, default="1s", show_default=True, metavar="DURATION",
              help="For how long somebody must be idle in a transaction, or blocked, to be named.")  # fmt: skip
@click.option("--code", is_flag=True, help="Read the app's source instead. No database is asked.")
def _doctor(target: Target, as_json: bool, bind: str | None, patience: float, code: bool) -> None:
    """Say what is wrong with the databases, or with the app's code. Changes nothing.

    Exit code 0: nothing; 1: something; 3: a database cannot be reached.
    """
    if code:
        found = examine_code(target)
    else:
        found = examine(target, bind, patience=patience)
    wrong = [each for each in found if each.severity is not Severity.INFO]
    if as_json:
        print_json({**dataclasses.asdict(each), "severity": each.severity.value} for each in found)
    else:
        for each in found:
            of = f"{each.bind}: " if each.bind and len(target.databases) > 1 else ""
            colour = {"error": "red", "warning": "yellow"}.get(each.severity.value)
            severity = click.style(each.severity.value.ljust(8), fg=colour)
            click.echo(f"{severity}{each.check}: {of}{printable(each.what)}")
            if each.remedy:
                click.echo(f"{'':8}{printable(each.remedy)}")
        click.echo(f"\n{len(wrong)} finding{'' if len(wrong) == 1 else 's'}." if wrong else "\nNothing is wrong.")
    if wrong:
        sys.exit(EXIT_FOUND)


@click.command("locks")
@_json
@_bind
@click.option("--waiting", is_flag=True, help="Only who waits, and for whom.")
def _locks(target: Target, as_json: bool, bind: str | None, waiting: bool) -> None:
    """Show who holds which lock, and who waits for whom."""
    databases = _of_postgresql(target, bind)
    for database in databases:
        rows = locks(database.engine)
        tree = list(blocker_tree(activity(database.engine)))
        if waiting:
            in_tree = {row["pid"] for row in tree}
            rows = [row for row in rows if row["pid"] in in_tree]
        if as_json:
            print_json({"bind": database.key, **row} for row in rows)
            continue
        _name_one_of(databases, database)
        print_table(
            ("pid", "user", "application", "mode", "object", "granted", "blocked_by", "endpoint", "query"), rows,
            empty="No locks.",
        )  # fmt: skip
        for row in tree:
            if row["depth"] == 0:
                click.echo()
            says = "waits: " if row["depth"] else "blocks: "
            click.echo(f"{'  ' * row['depth']}pid {row['pid']} {says}{printable(str(row.get('query') or ''))}")


@click.command("activity")
@_json
@_bind
@click.option("--watch", callback=_seconds, is_flag=False, flag_value="2s", default=None, metavar="[DURATION]",
              help="Again and again, every 2 seconds or as given, until Ctrl-C.")  # fmt: skip
@click.option("--times", type=click.IntRange(min=1), help="With --watch: so many times.")
@click.option("--all", "everyone", is_flag=True, help="Those that do nothing too.")
def _activity(
    target: Target, as_json: bool, bind: str | None, watch: float | None, times: int | None, everyone: bool
) -> None:
    """Show who is connected and what they do. The oldest transaction comes first."""
    databases = _of_postgresql(target, bind)
    done = 0
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            if watch and not as_json and on_terminal():
                click.clear()
            for database in databases:
                rows = [row for row in activity(database.engine) if everyone or row["state"] != "idle"]
                if as_json:
                    print_json({"bind": database.key, **row} for row in rows)
                else:
                    _name_one_of(databases, database)
                    print_table(
                        ("pid", "user", "application", "state", "transaction_seconds", "state_seconds", "waits_for",
                         "blocked_by", "endpoint", "query"),
                        rows,
                        empty="No other session is active." if not everyone else "No other session is connected.",
                    )  # fmt: skip
            done += 1
            if not watch or (times and done >= times):
                return
            time.sleep(watch)


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
@click.option("--timeout", callback=_seconds, default="30s", show_default=True, metavar="DURATION",
              help="For how long at most.")  # fmt: skip
def _wait(target: Target, as_json: bool, bind: str | None, timeout: float) -> None:
    """Wait until the databases answer.

    Exit code 0: they do; 1: not in the time given.
    """
    deadline = time.monotonic() + timeout
    for database in target.chosen(bind):
        started, error = time.monotonic(), _try(database, deadline)
        while error is not None and time.monotonic() < deadline:
            time.sleep(min(_PAUSE, max(0.0, deadline - time.monotonic())))
            error = _try(database, deadline)
        seconds = round(time.monotonic() - started, 3)
        if as_json:
            print_json([{"bind": database.key, "answers": error is None, "seconds": seconds, "error": error}])
        elif error is None:
            click.echo(f"{database.key}: answers, after {seconds:.1f} s.")
        else:
            click.echo(f"{database.key}: no answer in {timeout:g} s: {error}", err=True)
        if error is not None:
            sys.exit(EXIT_FOUND)


def _try(database: Database, deadline: float) -> str | None:
    """None, or why the database does not answer. An attempt is given up at the deadline, or some seconds later: a
    server that accepts a connection and says nothing would be waited for without end."""

    def connect(dialect: Any, record: Any, arguments: Any, options: dict[str, Any]) -> Any:
        seconds = max(1, math.ceil(deadline - time.monotonic()))
        if not 0 < int(options.get("connect_timeout") or 0) < seconds:
            options = {**options, "connect_timeout": seconds}
        return dialect.connect(*arguments, **options)

    limits = database.engine.dialect.driver in ("psycopg", "psycopg2")
    if limits:
        sa.event.listen(database.engine, "do_connect", connect)
    try:
        with database.engine.connect() as connection:
            connection.exec_driver_sql("SELECT 1")
    except sa.exc.DBAPIError as error:
        return " ".join(str(error.orig).split())
    finally:
        if limits:
            sa.event.remove(database.engine, "do_connect", connect)
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
    for database in _of_postgresql(target, bind):
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
    chosen = _of_postgresql(target, bind)
    databases = [each for each in chosen if database_exists(_name_of(each), server_url=each.engine.url)]
    for database in chosen:
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
@click.option("--lock-timeout", callback=_seconds, default="5s", show_default=True, metavar="DURATION")
def _cleanup(target: Target, as_json: bool, bind: str | None, yes: bool, lock_timeout: float) -> None:
    """Empty all tables of the app. Their sequences are set back; alembic_version stays as it is.

    Refused (exit code 4) for a protected database.
    """
    databases = target.chosen(bind)
    places = each_once(databases)
    _check_protection(target, places)
    for database in places:
        if database.engine.dialect.name == "postgresql":
            _name_the_connected(database)
    for database in databases:
        name = _name_of(database) or ":memory:"
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


def _of_postgresql(target: Target, bind: str | None) -> list[Database]:
    """The databases chosen, each once. Others than PostgreSQL are passed over where they are some of several."""
    chosen = target.chosen(bind)
    found = each_once(each for each in chosen if each.engine.dialect.name == "postgresql")
    if not found:
        require_postgresql(chosen[0].engine, "this command")
    for each in chosen:
        if each.engine.dialect.name != "postgresql":
            click.echo(f"{each.key}: passed over, since it is {each.engine.dialect.name}.", err=True)
    return found


def _name_one_of(databases: list[Database], database: Database) -> None:
    if len(databases) > 1:
        click.echo(f"{database.key}:")


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
        who = printable(", ".join(str(each) for each in known if each))
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
