"""What the text of a statement means to a sandbox: looked up once for each text, and remembered."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..connection.classify import Effect, StatementClass, classify

__all__ = ["ON_COMMIT", "SandboxText", "settings_of", "temporary_tables", "text_of"]

_CONTROL = re.compile(r"(BEGIN|START\s+TRANSACTION|COMMIT|END|ROLLBACK|ABORT)\b([^;]*)", re.IGNORECASE)
_READ_ONLY = re.compile(r"\bREAD\s+(ONLY|WRITE)\b", re.IGNORECASE)
_CHAIN = re.compile(r"\bAND\s+CHAIN\b", re.IGNORECASE)
_SET_TRANSACTION = re.compile(r"SET\s+(?:LOCAL\s+)?TRANSACTION\b(?!\s+SNAPSHOT)[^;]*", re.IGNORECASE)
_CURSOR = re.compile(r"\s*DECLARE\b.*?\bCURSOR\b.*?\bFOR\b(.*)", re.IGNORECASE | re.DOTALL)
_CURSOR_USE = re.compile(r"\s*(?:FETCH|MOVE|CLOSE)\b", re.IGNORECASE)
_CURSOR_NAME = re.compile(r'\s*(DECLARE|CLOSE)\s+("(?:[^"]|"")+"|\w+)', re.IGNORECASE)
_NAME = r'(?:"(?:[^"]|"")+"|[a-z_]\w*)'
_SET = re.compile(
    r"(?:^|;)\s*(?:RE)?SET\s+(?:(LOCAL|SESSION(?!\s+AUTHORIZATION))\s+)?"
    rf"(TIME\s+ZONE|SESSION\s+AUTHORIZATION|(?!CHARACTERISTICS|CONSTRAINTS|TRANSACTION){_NAME}(?:\.{_NAME})*)",
    re.IGNORECASE,
)
_SET_CONFIG = re.compile(r"\bset_config\s*\(\s*(?:'((?:[^']|'')+)'|%\((\w+)\)s|(%s))", re.IGNORECASE)
_TEMPORARY = re.compile(
    r"\bCREATE\s+(?:(?:LOCAL|GLOBAL)\s+)?TEMP(?:ORARY)?\s+TABLE\s+(?:IF\s+NOT\s+EXISTS\s+)?"
    r'((?:"(?:[^"]|"")+"|\w+)(?:\.(?:"(?:[^"]|"")+"|\w+))?)(.*?)(?:;|$)',
    re.IGNORECASE | re.DOTALL,
)
ON_COMMIT = re.compile(r"\bON\s+COMMIT\s+(DROP|DELETE\s+ROWS)\b", re.IGNORECASE)
_DML = re.compile(r"\s*(?:SELECT|INSERT|UPDATE|DELETE|WITH|VALUES|COPY|SET|SHOW|EXPLAIN|FETCH|MERGE)\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class SandboxText:
    """What is known of a text without its parameters."""

    text: str
    command: str
    """The same without what surrounds it."""
    statement: StatementClass
    savepoint: tuple[str, str] | None
    """SAVEPOINT, RELEASE or ROLLBACK TO, and the name."""
    verb: str | None
    """BEGIN, COMMIT or ROLLBACK, for each way to write it."""
    is_two_phase: bool
    chains: bool
    """COMMIT AND CHAIN."""
    sets_transaction: bool
    """SET TRANSACTION."""
    read_only: bool | None
    """What BEGIN or SET TRANSACTION says of it."""
    cursor: tuple[str, str] | None
    """DECLARE or CLOSE, and the name of the cursor."""
    only_reads: bool
    is_dml: bool
    """False where it may change the schema, as a function that fictive does not know may."""
    is_plain: bool
    """Whether it is no command about the transaction, and changes nothing but rows and the schema."""


_known: dict[str, SandboxText] = {}
_MOST_KNOWN = 5_000
_LONG = 5_000  # characters; longer texts are seldom sent again


def text_of(query: Any) -> SandboxText:
    """What is known of a statement; a dictionary access for a text that was seen before."""
    if isinstance(query, bytes):
        query = query.decode("utf-8", "replace")
    elif not isinstance(query, str):  # a template string, of which nothing is known
        return _examined("", StatementClass(Effect.MAY_WRITE))
    found = _known.get(query)
    if found is None:
        found = _examined(query, classify(query))
        if len(query) <= _LONG:
            if len(_known) >= _MOST_KNOWN:
                _known.clear()
            _known[query] = found
    return found


_VERBS = {"BEGIN": "BEGIN", "START": "BEGIN", "COMMIT": "COMMIT", "END": "COMMIT"}


def _examined(text: str, statement: StatementClass) -> SandboxText:
    command = text.strip().rstrip("; \n\t")
    savepoint = classify(command).savepoint
    control = _CONTROL.fullmatch(command)
    sets_transaction = _SET_TRANSACTION.fullmatch(command) is not None
    mode = _READ_ONLY.search(command) if control is not None or sets_transaction else None
    cursor = _CURSOR_NAME.match(text)
    has_settings = bool(statement.bound_flags) or _SET.search(text) is not None or "set_config" in text.lower()
    leaves = statement.connection_state is not None or statement.transaction_only is not None
    return SandboxText(
        text=text,
        command=command,
        statement=statement,
        savepoint=savepoint,
        verb=_VERBS.get(control[1].split()[0].upper(), "ROLLBACK") if control is not None else None,
        is_two_phase=control is not None and "PREPARED" in control[2].upper(),
        chains=control is not None and _CHAIN.search(control[2]) is not None,
        sets_transaction=sets_transaction,
        read_only=mode[1].upper() == "ONLY" if mode is not None else None,
        cursor=(cursor[1].upper(), cursor[2]) if cursor is not None else None,
        only_reads=_only_reads(text, statement),
        is_dml=_DML.match(text) is not None and ";" not in command and statement.effect is not Effect.MAY_WRITE,
        is_plain=not (
            savepoint
            or control
            or sets_transaction
            or statement.may_end_transaction
            or has_settings
            or leaves
            or cursor
            or _TEMPORARY.search(text)
        ),
    )


def _only_reads(text: str, statement: StatementClass) -> bool:
    if _CURSOR_USE.match(text):
        return True
    if (match := _CURSOR.match(text)) is not None:
        return classify(match[1].strip()).is_plain_read
    return statement.is_plain_read


def settings_of(text: str, parameters: Any, statement: StatementClass) -> list[tuple[str, bool]]:
    """The settings that a statement is about to change, and whether to the end of the transaction only."""
    found = []
    for scope, words in _SET.findall(text):
        name = "_".join(words.lower().replace('"', "").split())
        found.append(("timezone" if name == "time_zone" else name, scope.upper() == "LOCAL"))
    if "set_config" in text.lower():
        is_local = statement.transaction_only is not None and statement.transaction_only.startswith("set_config")
        for literal, key, positional in _SET_CONFIG.findall(text):
            given = literal.replace("''", "'") or _parameter(parameters, key, positional)
            if isinstance(given, str):
                found.append((given, is_local))
    return found


def _parameter(parameters: Any, key: str, positional: str) -> Any:
    if key and isinstance(parameters, Mapping):
        return parameters.get(key)
    if positional and isinstance(parameters, Sequence) and parameters:
        return parameters[0]
    return None


def temporary_tables(text: str) -> list[tuple[str, str]]:
    """The temporary tables that a text makes: the name, and what follows it."""
    return _TEMPORARY.findall(text)
