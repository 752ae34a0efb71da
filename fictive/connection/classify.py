"""What SQL does, told by its text: a read or a write, what needs a transaction, what stays with the connection.

Pure functions of the text as it is sent, whatever made it: Core, the ORM, a listener or the user. Comments, quoted
names and literals are blanked first, then words and calls are looked at. In doubt a statement is not a read.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .read_functions import READ_FUNCTIONS

__all__ = [
    "PLAIN_READ",
    "Effect",
    "StatementClass",
    "classify",
    "classify_with",
    "counts_its_rows",
    "known_texts",
    "summary",
]


class Effect(enum.IntEnum):
    """What a statement does to data. In this order: of two parts of a statement the greater one counts."""

    READ = 0
    MAY_WRITE = 1
    """It calls a function that fictive does not know, or is text whose effect cannot be seen."""
    WRITE = 2


@dataclasses.dataclass(frozen=True)
class StatementClass:
    """What fictive knows of a statement before it is sent."""

    effect: Effect = Effect.READ
    transaction_only: str | None = None
    """The part that PostgreSQL ignores, or undoes at once, outside a transaction."""
    connection_state: str | None = None
    """The part whose effect stays with the connection beyond the transaction."""
    savepoint: tuple[str, str] | None = None
    """SAVEPOINT, RELEASE or ROLLBACK TO, and the name."""
    may_end_transaction: bool = False
    """It has a COMMIT, ROLLBACK or the like, so that what comes after it may be in another transaction."""
    bound_flags: tuple[str, ...] = ()
    """The parameters that decide whether a `set_config` is local to the transaction."""
    leaves_something: bool = False
    """Whether a transaction has to remember that it was run: a savepoint, an end, or what stays with the
    connection."""
    alone: str | None = None
    """The part that cannot run in a transaction, nor in one message with other statements."""

    def __post_init__(self) -> None:
        leaves = self.savepoint is not None or self.connection_state is not None or self.may_end_transaction
        object.__setattr__(self, "leaves_something", leaves or bool(self.bound_flags))

    @property
    def is_plain_read(self) -> bool:
        return self.effect is Effect.READ and not (self.transaction_only or self.connection_state)

    def resolved(self, parameters: Any) -> StatementClass:
        """The class with `bound_flags` decided by the parameters. Values that cannot be seen may be either."""
        if not self.bound_flags:
            return self
        if isinstance(parameters, Mapping):
            flags = [parameters.get(name, _UNSEEN) for name in self.bound_flags]
        elif isinstance(parameters, Sequence) and parameters:
            flags = list(parameters)  # which of them is the flag is not known
        else:
            flags = [_UNSEEN]
        stays = any(flag is _UNSEEN or _is_false(flag) for flag in flags)
        local = _UNSEEN in flags or not stays
        return dataclasses.replace(
            self,
            bound_flags=(),
            transaction_only=self.transaction_only or ("set_config(.., true)" if local else None),
            connection_state=self.connection_state or ("set_config(.., false)" if stays else None),
        )


_UNSEEN = object()
_FALSE_WORDS = frozenset(("0", "f", "fa", "fal", "fals", "false", "n", "no", "of", "off", "none"))


def _is_false(value: Any) -> bool:
    """Whether PostgreSQL takes a value for false, or NULL, which is no better (PostgreSQL documentation, "Boolean
    Type")."""
    return str(value).strip().lower() in _FALSE_WORDS


PLAIN_READ = StatementClass()

known_texts: dict[str, StatementClass] = {}
"""By text. Long texts (IN lists, VALUES of many rows) are kept by their shape, in `_shapes`."""
_shapes: dict[str, StatementClass] = {}
_MOST_KNOWN = 5_000
_LONG = 1_000

_PLACEHOLDERS = re.compile(
    r"(?:%\(\w+\)s|%s|\?|:\w+)(?:::[\w \[\]]+)?(?:\s*,\s*(?:%\(\w+\)s|%s|\?|:\w+)(?:::[\w \[\]]+)?)+"
)
_ROWS = re.compile(r"\(\?\)(?:\s*,\s*\(\?\))+")


def classify(query: Any) -> StatementClass:
    """The class of a text; a dictionary access for one that was seen before."""
    if isinstance(query, bytes):
        query = query.decode("utf-8", "replace")
    elif not isinstance(query, str):
        return _classify(_composed(query))
    found = known_texts.get(query)
    if found is not None:
        return found
    if len(query) > _LONG:
        shape = _ROWS.sub("(?)", _PLACEHOLDERS.sub("?", query))
        if (found := _shapes.get(shape)) is None:
            found = _keep(_shapes, shape, _classify(query))
        return found
    return _keep(known_texts, query, _classify(query))


def _composed(query: Any) -> str:
    """The text of one that is composed by the driver's `sql` module, which has no hash; values without a connection to
    quote them for are left out."""
    parts = getattr(query, "__iter__", None)
    if parts is not None:
        return "".join(map(_composed, parts()))
    try:
        return str(query.as_string(None))
    except Exception:  # whatever it is that wants a connection, or is no such thing
        return ' "" '


def _keep(where: dict[str, StatementClass], text: str, found: StatementClass) -> StatementClass:
    if len(where) >= _MOST_KNOWN:
        where.clear()
    where[text] = found
    return found


def classify_with(found: StatementClass, parameters: Any, options: Mapping[str, Any]) -> StatementClass:
    """The class of a text with its parameters, and with what execution options say of it."""
    found = found.resolved(parameters)
    if (says := options.get("fictive_writes")) is not None:
        found = dataclasses.replace(found, effect=Effect.WRITE if says else Effect.READ)
    if options.get("fictive_outside"):
        found = dataclasses.replace(found, transaction_only=None, connection_state=None)
    return found


_TABLE = r'((?:"(?:[^"]|"")+"|\w+)(?:\s*\.\s*(?:"(?:[^"]|"")+"|\w+))?)'
_SUBJECT = re.compile(
    rf"\b(INSERT\s+INTO|UPDATE(?:\s+ONLY)?|DELETE\s+FROM(?:\s+ONLY)?|MERGE\s+INTO)\s+{_TABLE}", re.IGNORECASE
)


def summary(query: Any) -> str:
    """A few words for messages: `UPDATE objects`, or the start of the text."""
    text = " ".join(_without_comments(query if isinstance(query, str) else str(query)).split())
    found = [f"{verb.split()[0].upper()} {table.replace(chr(34), '')}" for verb, table in _SUBJECT.findall(text)]
    if found:
        return ", ".join(dict.fromkeys(found))
    return text if len(text) <= 60 else text[:57] + "..."


_COUNTING = re.compile(r"(?:insert|update|delete|merge)\b[^;]*;?", re.IGNORECASE)


def counts_its_rows(query: Any) -> bool:
    """Whether a text is one DML statement, whose answer says how many rows it wrote. Not WITH, whose last part may
    have written none, nor a function, which has the rows that it returns. In doubt it is not."""
    text = query.decode("utf-8", "replace") if isinstance(query, bytes) else query
    return isinstance(text, str) and _COUNTING.fullmatch(_AROUND.sub("", text)) is not None


def _without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/|--[^\n]*", " ", text, flags=re.DOTALL)


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
_TEMPORARY = re.compile(
    r"\b(?:create|into)\s+(?:(?:local|global)\s+)?temp(?:orary)?\b|\b(?:create|into)\b[^;]*\bpg_temp\s*\."
)
_SETTINGS_VIEW = re.compile(r"\bupdate\s+(?:only\s+)?(?:pg_catalog\s*\.\s*)?pg_settings\b")
_INSERT_INTO = re.compile(r"\b(?:insert|merge)\s+into\b")
_DROPPED_AT_COMMIT = re.compile(r"\bon\s+commit\s+drop\b")
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
    verb: verb.upper()
    for verb in ("attach", "detach", "listen", "unlisten", "prepare", "deallocate", "load", "discard")
}


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


_AROUND = re.compile(r"^(?:\s|/\*(?:[^*]|\*(?!/))*\*/)+|(?:\s|/\*(?:[^*]|\*(?!/))*\*/)+$")
"""Space and comments around a statement, such as tools put there."""


def _classify(text: str) -> StatementClass:
    """The class of a whole text, which may hold several statements."""
    control = _SAVEPOINT.fullmatch(_AROUND.sub("", text))
    if control:
        verb = " ".join(control[1].upper().split())
        return StatementClass(
            Effect.WRITE, transaction_only=_TRANSACTION_VERBS[verb.split()[0].lower()], savepoint=(verb, control[2])
        )
    blanked = _blank(text)
    statements = [blanked] if _WITH_BODY.match(blanked) else [each for each in blanked.split(";") if each.strip()]
    parts = [_classify_one(each) for each in statements]
    if any(each.lstrip().startswith("do") for each in statements):
        bodies = _BODY.findall(text) or [quoted.replace("''", "'") for quoted in _QUOTED_BODY.findall(text)]
        parts += [_classify_body(body) for body in bodies]
    found = StatementClass()
    for part in parts:
        found = StatementClass(
            max(found.effect, part.effect),
            found.transaction_only or part.transaction_only,
            found.connection_state or part.connection_state,
            None,
            found.may_end_transaction or part.may_end_transaction,
            found.bound_flags + part.bound_flags,
            alone=found.alone or part.alone,
        )
    return PLAIN_READ if found == PLAIN_READ else found


_SAVEPOINT = re.compile(r'(SAVEPOINT|RELEASE|ROLLBACK\s+TO)(?:\s+SAVEPOINT)?\s+(\w+|"(?:[^"]|"")+")', re.IGNORECASE)
_BODY = re.compile(r"\$(?:\w*)\$(.*)\$(?:\w*)\$", re.DOTALL)
_QUOTED_BODY = re.compile(r"'((?:''|[^'])*)'")
_ENDING_VERBS = frozenset({"commit", "end", "rollback", "abort"})


def _classify_body(body: str) -> StatementClass:
    """What a DO block leaves on the connection. It cannot end a transaction that was open before it."""
    text = _blank(body.replace("''", "'"))
    for statement in re.split(r";|\b(?:begin|then|else|loop)\b", text):
        part = _classify_one(statement)
        if part.connection_state:
            return StatementClass(Effect.WRITE, connection_state=part.connection_state)
    if re.search(r"\bexecute\b", text) and _DYNAMIC.search(_LOCAL_CONFIG.sub(" ", body.lower())):
        return StatementClass(Effect.WRITE, connection_state="SET in EXECUTE")
    return StatementClass(Effect.WRITE)


_LOCAL_CONFIG = re.compile(r"\bset_config\s*\([^()]*,\s*true\s*\)")
_DYNAMIC = re.compile(r"\bset\s+(?!local\b)\w|\blisten\b|\bprepare\b|\btemp(?:orary)?\s+table\b|set_config")


def _classify_one(sql: str) -> StatementClass:
    words = re.findall(r"\w+", sql)
    verb = words[0] if words else ""
    second = words[1] if len(words) > 1 else ""
    if verb in _TRANSACTION_VERBS:
        state: str | None = None
        flags: tuple[str, ...] = ()
        if verb == "declare":
            query = _by_calls(sql)
            holds = "hold" in words and "without" not in words
            state = "DECLARE CURSOR WITH HOLD" if holds else query.connection_state
            flags = query.bound_flags
        ends = verb in _ENDING_VERBS and not (verb == "rollback" and "to" in words)
        return StatementClass(Effect.WRITE, _TRANSACTION_VERBS[verb], state, None, ends, bound_flags=flags)
    if verb == "prepare" and second == "transaction":
        return StatementClass(Effect.WRITE, "PREPARE TRANSACTION", None, None, True)
    if verb in _CONNECTION_VERBS:
        return StatementClass(Effect.WRITE, connection_state=_CONNECTION_VERBS[verb])
    if verb in ("set", "reset"):
        if second in ("local", "transaction", "constraints"):
            return StatementClass(Effect.WRITE, transaction_only=f"SET {second.upper()}")
        return StatementClass(Effect.WRITE, connection_state=verb.upper())
    if _TEMPORARY.search(_INSERT_INTO.sub(" ", sql)):
        if verb == "create" and _DROPPED_AT_COMMIT.search(sql):
            return StatementClass(Effect.WRITE, transaction_only="CREATE TEMPORARY TABLE … ON COMMIT DROP")
        return StatementClass(Effect.WRITE, connection_state="CREATE TEMPORARY TABLE")
    if _SETTINGS_VIEW.search(sql):
        return StatementClass(Effect.WRITE, connection_state="UPDATE pg_settings")
    alone = _cannot_share(verb, second, words)
    if verb in ("create", "alter", "drop", "comment", "grant", "revoke"):
        return StatementClass(Effect.WRITE, alone=alone)  # FOR UPDATE in a policy or a view locks nothing now
    if verb == "pragma":
        return StatementClass(Effect.WRITE if "=" in sql else Effect.READ)
    reads = verb in _READING_VERBS and not _WRITING_WORD.search(_ROW_LOCK.sub(" ", sql))
    if verb == "explain" and "analyze" not in words[:4] and "analyse" not in words[:4]:
        reads = True  # only planned
    if verb == "copy" and "to" in words and "from" not in words:
        reads = True
    found = _by_calls(sql)
    effect = found.effect if reads else Effect.WRITE
    return dataclasses.replace(found, effect=effect, alone=alone)


def _cannot_share(verb: str, second: str, words: Sequence[str]) -> str | None:
    """Of a statement that PostgreSQL refuses in a transaction, what to call it; others the server tells of itself."""
    if verb == "vacuum" or (verb in ("create", "drop") and second in ("database", "tablespace", "subscription")):
        return f"{verb} {second}".upper() if verb != "vacuum" else "VACUUM"
    if verb == "alter" and second == "system":
        return "ALTER SYSTEM"
    if verb in ("create", "drop", "reindex", "alter") and "concurrently" in words:
        return f"{verb.upper()} … CONCURRENTLY"
    if verb == "reindex" and not {"database", "system", "schema"}.isdisjoint(words[1:]):
        return "REINDEX of a whole database or schema"
    return None


def _by_calls(sql: str) -> StatementClass:
    """The class by words and calls alone."""
    transaction_only = "FOR UPDATE / FOR SHARE" if _ROW_LOCK.search(sql) else None
    connection_state = None
    bound_flags: tuple[str, ...] = ()
    effect = Effect.READ
    for name in _calls(sql):
        if name in _TRANSACTION_FUNCTIONS:
            transaction_only = transaction_only or name + "()"
        elif name in _SESSION_FUNCTIONS:
            connection_state = connection_state or name + "()"
        elif name == "set_config":
            for last in map(_last_argument, _SET_CONFIG.split(sql)[1:]):
                if last in _TRUE:
                    transaction_only = transaction_only or "set_config(.., true)"
                elif placeholder := _PLACEHOLDER.fullmatch(last):
                    bound_flags += (placeholder[1] or placeholder[2] or "",)
                else:
                    connection_state = connection_state or "set_config(.., false)"
                    if last not in _FALSE:  # an expression may be either
                        transaction_only = transaction_only or "set_config(.., true)"
        elif name not in READ_FUNCTIONS:
            effect = Effect.MAY_WRITE
    return StatementClass(effect, transaction_only, connection_state, bound_flags=bound_flags)


_TRUE = ("true", "true::bool", "true::boolean")
_FALSE = ("false", "false::bool", "false::boolean")
_PLACEHOLDER = re.compile(r"(?:%\((\w+)\)s|%s|\?|:(\w+))(?:\s*::\s*bool(?:ean)?)?")


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
