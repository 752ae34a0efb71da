"""What a statement is, seen from outside a transaction: a read, a write, or something that needs one.

Pure functions of the statement; nothing is sent. SQLAlchemy constructs are walked, text is scanned: comments, quoted
names and literals are blanked first, then words are looked at. In doubt a statement is not a read.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.schema import DefaultGenerator, ExecutableDDLElement
from sqlalchemy.sql import visitors
from sqlalchemy.sql.expression import FunctionElement, TextClause, TextualSelect, UpdateBase

from . import private
from .read_functions import READ_FUNCTIONS

__all__ = ["PLAIN_READ", "Effect", "Nature", "nature_of", "summary"]


class Effect(enum.IntEnum):
    """What a statement does to data. In this order: of two parts of a statement the greater one counts."""

    READ = 0
    MAY_WRITE = 1
    """It calls a function that fictive does not know."""
    WRITE = 2


@dataclasses.dataclass(frozen=True)
class Nature:
    """What fictive knows of a statement before it is sent."""

    effect: Effect = Effect.READ
    transaction_only: str | None = None
    """The part that PostgreSQL ignores, or undoes at once, outside a transaction; None without one."""
    connection_state: str | None = None
    """The part whose effect stays with the connection, and would stay behind in the pool; None without one."""


def nature_of(statement: Any, params: Any = None) -> Nature:
    """What `statement` is. `params` decide where a bound value does, as in `set_config('a', 'b', :is_local)`."""
    statement = private.resolved(statement)
    if isinstance(statement, (sa_orm.FromStatement, TextualSelect)):
        return nature_of(statement.element, params)
    if isinstance(statement, TextClause):
        return _nature_of_text(statement, params)
    if isinstance(statement, sa.DDL):
        return dataclasses.replace(_scan(statement.statement), effect=Effect.WRITE)
    if isinstance(statement, (ExecutableDDLElement, DefaultGenerator)):
        return Nature(Effect.WRITE)
    key = private.cache_key(statement)
    nature = _known.get(key) if key is not None else None
    if nature is None:
        nature = _walk(statement, params)
        if key is not None and not _depends_on_values(nature):
            if len(_known) >= _MOST_KNOWN:
                _known.clear()
            _known[key] = nature
    return nature


# By SQLAlchemy's cache key, which it computes for the statement anyway and keeps with it: a walk costs twenty times
# the look-up.
_known: dict[Any, Nature] = {}
_MOST_KNOWN = 1000


def _depends_on_values(nature: Nature) -> bool:
    return "set_config" in f"{nature.transaction_only} {nature.connection_state}"


def _walk(statement: Any, params: Any) -> Nature:
    """The nature of a construct by all its parts."""
    effect, transaction_only, connection_state = Effect.READ, None, None
    for element in visitors.iterate(statement):
        if isinstance(element, UpdateBase):
            effect = Effect.WRITE
        elif private.locks_rows(element):
            transaction_only = transaction_only or "FOR UPDATE / FOR SHARE"
        elif isinstance(element, FunctionElement):
            name = str(getattr(element, "name", "")).lower()
            if name in _TRANSACTION_FUNCTIONS:
                transaction_only = transaction_only or name + "()"
            elif name in _SESSION_FUNCTIONS:
                connection_state = connection_state or name + "()"
            elif name == "set_config":
                if _is_local(element, params):
                    transaction_only = transaction_only or "set_config(.., true)"
                else:
                    connection_state = connection_state or "set_config(.., false)"
            elif name and name not in READ_FUNCTIONS:
                effect = max(effect, Effect.MAY_WRITE)
        for text in [element.text] if isinstance(element, TextClause) else private.texts_of(element):
            part = _fragment(text)
            effect = max(effect, part.effect)
            transaction_only = transaction_only or part.transaction_only
            connection_state = connection_state or part.connection_state
    if effect is Effect.READ and not (transaction_only or connection_state):
        return PLAIN_READ
    return Nature(effect, transaction_only, connection_state)


def summary(statement: Any) -> str:
    """A few words for messages: `UPDATE objects`, `DELETE user`, or the start of the text."""
    statement = private.resolved(statement)
    if isinstance(statement, (sa_orm.FromStatement, TextualSelect)):
        return summary(statement.element)
    if isinstance(statement, UpdateBase):
        verb = statement.__visit_name__.upper()
        table = getattr(statement, "table", None)
        return f"{verb} {getattr(table, 'fullname', table)}"
    if isinstance(statement, TextClause):
        text = " ".join(statement.text.split())
        return text if len(text) <= 60 else text[:57] + "..."
    if isinstance(statement, sa.SelectBase):
        writes = [each for each in visitors.iterate(statement) if isinstance(each, UpdateBase)]
        if writes:  # in WITH
            return ", ".join(dict.fromkeys(map(summary, writes)))
    return type(statement).__name__


PLAIN_READ = Nature()

_TRANSACTION_FUNCTIONS = frozenset(
    {
        "pg_advisory_xact_lock",
        "pg_advisory_xact_lock_shared",
        "pg_try_advisory_xact_lock",
        "pg_try_advisory_xact_lock_shared",
        "pg_export_snapshot",
    }
)
_SESSION_FUNCTIONS = frozenset(
    {
        "pg_advisory_lock",
        "pg_advisory_lock_shared",
        "pg_try_advisory_lock",
        "pg_try_advisory_lock_shared",
        "pg_advisory_unlock",
        "pg_advisory_unlock_shared",
        "pg_advisory_unlock_all",
    }
)

# Words that stand before a parenthesis without calling anything.
_SYNTAX = frozenset(
    """
    all and any array as asc between by case cast char character check collate cross cube day decimal dec desc
    distinct else end escape except exists extract false fetch filter float first for from full group having hour
    if ilike in inner intersect interval into is isnull join last lateral left like limit materialized minute month
    national natural nchar not notnull null nulls numeric offset on only or order ordinality outer over overlaps
    partition precision range recursive right rollup row rows second select sets similar some symmetric table
    tablesample then time timestamp timestamptz to trim true union unique using value values varbit varchar varying
    when where window with within without year zone bit grouping system bernoulli bpchar explain analyze verbose
    costs buffers format timing summary
    """.split()
)

_NOISE = re.compile(
    r"""
      (?P<line>--[^\n]*)                                # comment to the end of the line
    | (?P<comment>/\*)                                  # comment, which may nest
    | \$(?P<tag>\w*)\$.*?\$(?P=tag)\$                  # dollar-quoted text
    | (?<!\w)[eE]'(?:\\.|''|[^'\\])*'                  # text with escapes
    | '(?:''|[^'])*'                                    # text
    | "(?P<call>[a-z_]\w*)"(?=\s*[(.])                  # quoted name that is called, or a schema
    | "(?:""|[^"])*"                                    # quoted name
    """,
    re.VERBOSE | re.DOTALL,
)
_COMMENT_EDGE = re.compile(r"/\*|\*/")
_CALL = re.compile(r"(?:(\b[a-z_]\w*|q)\s*\.\s*)?\b([a-z_]\w*|q)\s*\(")
_NAMED_COLUMNS = re.compile(r"\b(\w+)\s*\([^()]*\)\s+as\s+(?:not\s+materialized\s*|materialized\s*)?\(")
_ALIAS = re.compile(r"\bas\s+\w+\s*\(")
_WRITING_WORD = re.compile(r"\b(insert|update|delete|merge|into|truncate)\b")
_ROW_LOCK = re.compile(r"\bfor\s+(?:no\s+key\s+update|update|key\s+share|share)\b")
_SET_CONFIG = re.compile(r"\bset_config\s*\(")
_WITH_BODY = re.compile(r"\s*create\s+(?:temp\s+|temporary\s+)?trigger\b")
_TEMPORARY = re.compile(r"\b(?:create|into)\s+(?:(?:local|global)\s+)?temp(?:orary)?\b")
_READING_VERBS = frozenset({"select", "values", "table", "show", "with", "explain"})
_TRANSACTION_VERBS = {
    "lock": "LOCK TABLE",
    "savepoint": "SAVEPOINT",
    "release": "RELEASE SAVEPOINT",
    "begin": "BEGIN",
    "start": "START TRANSACTION",
    "commit": "COMMIT",
    "end": "END",
    "rollback": "ROLLBACK",
    "abort": "ABORT",
    "declare": "DECLARE CURSOR",
    "fetch": "FETCH",
}
_CONNECTION_VERBS = {
    verb: verb.upper() for verb in ("attach", "detach", "listen", "unlisten", "prepare", "deallocate")
}


def _is_local(function: FunctionElement[Any], params: Any) -> bool:
    """Whether the third argument of `set_config` is true; a value that cannot be seen counts as true."""
    arguments = list(function.clauses)
    if len(arguments) != 3:
        return True
    value = arguments[2]
    if isinstance(value, sa.BindParameter):
        if isinstance(params, Mapping) and value.key in params:
            return bool(params[value.key])
        return bool(value.effective_value)
    return not isinstance(value, type(sa.false()))


def _nature_of_text(clause: TextClause, params: Any) -> Nature:
    nature = _scan(clause.text)
    name = (nature.transaction_only or "").partition(_BOUND)[2]
    if not name:
        return nature
    bind = private.bind_parameters(clause).get(name)
    value = params.get(name) if isinstance(params, Mapping) else None
    if value is None and bind is not None:
        value = bind.effective_value
    if value is None or value:  # one that cannot be seen counts as true
        return dataclasses.replace(nature, transaction_only="set_config(.., true)")
    return dataclasses.replace(nature, transaction_only=None, connection_state="set_config(.., false)")


_BOUND = "set_config(.., :"


def _blank(text: str) -> str:
    """`text` in lower case without comments; literals become `''`, and quoted names `q` unless they are called."""
    found, position = [], 0
    while match := _NOISE.search(text, position):
        found.append(text[position : match.start()])
        position = match.end()
        if match["comment"]:
            position = _end_of_comment(text, position)
            found.append(" ")
        elif match["call"]:
            found.append(match["call"])
        else:
            found.append(" " if match["line"] else "q" if match[0][0] == '"' else "''")
    found.append(text[position:])
    return "".join(found).lower()


def _end_of_comment(text: str, position: int) -> int:
    depth = 1
    while depth and (edge := _COMMENT_EDGE.search(text, position)):
        depth += 1 if edge[0] == "/*" else -1
        position = edge.end()
    return len(text) if depth else position


@functools.lru_cache(maxsize=1024)
def _scan(text: str) -> Nature:
    """The nature of a whole text, which may hold several statements."""
    effect, transaction_only, connection_state = Effect.READ, None, None
    blanked = _blank(text)
    for statement in [blanked] if _WITH_BODY.match(blanked) else filter(str.strip, blanked.split(";")):
        part = _scan_statement(statement)
        effect = max(effect, part.effect)
        transaction_only = transaction_only or part.transaction_only
        connection_state = connection_state or part.connection_state
    return Nature(effect, transaction_only, connection_state)


def _scan_statement(sql: str) -> Nature:
    words = re.findall(r"\w+", sql)
    verb = words[0] if words else ""
    if verb in _TRANSACTION_VERBS:
        return Nature(Effect.WRITE, transaction_only=_TRANSACTION_VERBS[verb])
    if verb in _CONNECTION_VERBS:
        return Nature(Effect.WRITE, connection_state=_CONNECTION_VERBS[verb])
    if verb in ("set", "reset"):
        second = words[1] if len(words) > 1 else ""
        if second in ("local", "transaction", "constraints"):
            return Nature(Effect.WRITE, transaction_only=f"SET {second.upper()}")
        return Nature(Effect.WRITE, connection_state=verb.upper())
    if _TEMPORARY.search(sql):
        return Nature(Effect.WRITE, connection_state="CREATE TEMPORARY TABLE")
    if verb in ("create", "alter", "drop", "comment", "grant", "revoke"):
        return Nature(Effect.WRITE)  # FOR UPDATE in a policy or a view locks nothing now
    if verb == "pragma":
        return Nature(Effect.WRITE if "=" in sql else Effect.READ)
    reads = verb in _READING_VERBS and not _WRITING_WORD.search(_ROW_LOCK.sub(" ", sql))
    if verb == "explain" and "analyze" not in words[:4] and "analyse" not in words[:4]:
        reads = True  # only planned
    rest = _fragment(sql, blanked=True)
    if rest.effect is not Effect.READ:
        reads = False  # text says less of itself than a construct: a call of an unknown function counts as a write
    return dataclasses.replace(rest, effect=Effect.READ if reads else Effect.WRITE)


def _fragment(text: str, *, blanked: bool = False) -> Nature:
    """The nature of a piece of SQL by its words and calls alone."""
    sql = text if blanked else _blank(text)
    transaction_only = "FOR UPDATE / FOR SHARE" if _ROW_LOCK.search(sql) else None
    connection_state = None
    effect = Effect.READ
    for name in _calls(sql):
        if name in _TRANSACTION_FUNCTIONS:
            transaction_only = transaction_only or name + "()"
        elif name in _SESSION_FUNCTIONS:
            connection_state = connection_state or name + "()"
        elif name == "set_config":
            for last in map(_last_argument, _SET_CONFIG.split(sql)[1:]):
                if last in ("false", "0::bool", "0::boolean"):
                    connection_state = connection_state or "set_config(.., false)"
                elif transaction_only is None or transaction_only.startswith(_BOUND):
                    transaction_only = _BOUND + last[1:] if last.startswith(":") else "set_config(.., true)"
        elif name not in READ_FUNCTIONS:
            effect = Effect.MAY_WRITE
    return Nature(effect, transaction_only, connection_state)


def _last_argument(sql: str) -> str:
    """The last argument of a call whose opening parenthesis stands before `sql`."""
    depth, start = 1, 0
    for position, character in enumerate(sql):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return sql[start:position].strip()
        if depth == 1 and character == ",":
            start = position + 1
    return ""


def _calls(sql: str) -> Iterator[str]:
    """Names of the functions that `sql` calls; a name in a schema other than pg_catalog with its schema."""
    own = set(_NAMED_COLUMNS.findall(sql))
    for schema, name in _CALL.findall(_ALIAS.sub(" as (", sql)):
        if schema and schema != "pg_catalog":
            yield f"{schema}.{name}"
        elif name not in _SYNTAX and name not in own:
            yield name
