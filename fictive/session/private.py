"""Everything of SQLAlchemy that fictive uses and that has no public name, each behind a function that says why.

`tests/test_private.py` fails when one of these changes. Nothing else in fictive touches an underscore of SQLAlchemy's.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import time
import types
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.engine import result as sa_result
from sqlalchemy.event.attr import _EmptyListener as EmptyListener
from sqlalchemy.orm import identity as sa_identity
from sqlalchemy.orm import loading as sa_loading
from sqlalchemy.orm import session as sa_session
from sqlalchemy.orm import state_changes as sa_state_changes

__all__ = [
    "ACTIVE",
    "BEGIN_OPTIONS",
    "CLOSED",
    "COMMITTED",
    "JOINTS",
    "PREPARED",
    "EmptyListener",
    "IdentityMapBase",
    "as_single_insert",
    "cached_as_it_is",
    "columns_set",
    "commit_as_is",
    "connections_of",
    "connects_in_autocommit",
    "core_options",
    "criterion_of",
    "describe",
    "expire_loaded_since",
    "expire_with_savepoint",
    "forget_entries",
    "from_statement",
    "given_by_statement",
    "has_listeners",
    "hear_engine_only",
    "is_autocommit",
    "is_composite_key",
    "is_orm_dml",
    "is_own_listener",
    "join_events",
    "key_of",
    "listen_once",
    "listeners_to",
    "load_numbers",
    "load_of_row",
    "load_run",
    "loaded_as",
    "locks_rows",
    "mapper_of",
    "must_be_unique",
    "named_froms",
    "note_lazy_load",
    "note_savepoint_write",
    "object_of_key",
    "options_of",
    "other_sides",
    "others_look_on",
    "own_options",
    "past_ended_blocks",
    "pending_states",
    "pool_of",
    "pool_settings",
    "recycle",
    "relationship_of_load",
    "resolved",
    "rest_of_a_stream",
    "result_of",
    "return_interrupted",
    "return_unheard",
    "root_engine",
    "run_on_cursor",
    "scope_of",
    "sessions",
    "text_of",
    "without_listeners",
]


COMMITTED = sa_session.SessionTransactionState.COMMITTED
"""The state of a `SessionTransaction` whose COMMIT, or RELEASE, was answered."""

ACTIVE = sa_session.SessionTransactionState.ACTIVE
"""The state of one that can be used."""

PREPARED = sa_session.SessionTransactionState.PREPARED
"""The state of one whose flush is done, and whose COMMIT is what comes next."""

CLOSED = sa_session.SessionTransactionState.CLOSED
"""The state of one that has ended."""

_IN_PROGRESS = sa_state_changes._StateChangeStates.CHANGE_IN_PROGRESS

JOINTS: list[tuple[Any, tuple[str, ...]]] = [
    (sa_orm.Session, ("_autobegin_t", "_autoflush", "_connection_for_bind", "_delete_impl", "_deleted",
                      "_dirty_states", "_flushing", "_is_clean", "_merge", "_nested_transaction", "_new",
                      "_trans_context_manager", "_transaction")),
    (sa_orm.SessionTransaction, ("_connection_for_bind", "_connections", "_current_fn", "_expect_state", "_next_state",
                                 "_parent", "_raise_for_prerequisite_state", "_restore_snapshot",
                                 "_rollback_can_be_called", "_rollback_exception", "_state",
                                 "_transaction_is_active")),
    (sa.Connection, ("_Connection__savepoint_seq", "_commit_impl", "_commit_twophase_impl", "_dbapi_connection",
                     "_echo", "_execution_options", "_handle_dbapi_exception", "_has_events",
                     "_prepare_twophase_impl", "_release_savepoint_impl", "_rollback_impl", "_rollback_twophase_impl",
                     "_savepoint_impl", "_transaction")),
    (sa.QueuePool, ("_dec_overflow", "_do_get", "_do_return_conn", "_invalidate", "_invalidate_time", "_overflow",
                    "_pre_ping", "_recycle", "_return_conn")),
    (sa.pool._ConnectionFairy, ("_connection_record", "_pool")),
    (sa.pool.base._ConnectionRecord, ("_ConnectionRecord__pool", "fairy_ref")),
    (sa.Select, ("_execution_options", "_for_update_arg")),
]  # fmt: skip
"""Private names that `connection/` and `session/` use where a function around each would cost every statement a
call."""


IdentityMapBase: Any = (
    getattr(sa_identity, "_WeakInstanceDict", None) or getattr(sa_identity, "WeakInstanceDict")  # noqa: B009
)
"""The class of a session's identity map; its name has an underscore from SQLAlchemy 2.1 on."""


def load_numbers() -> Any:
    """The counter from which SQLAlchemy numbers the loads of a process, oldest first (`InstanceState.runid`)."""
    cells = getattr(sa_loading._new_runid, "__closure__", None) or ()
    found = [cell.cell_contents for cell in cells if isinstance(cell.cell_contents, itertools.count)]
    return found[0] if found else iter(sa_loading._new_runid, object())


_ROW_PROCESSOR = next(
    each for each in sa_loading._instance_processor.__code__.co_consts if getattr(each, "co_name", None) == "_instance"
)
"""The code by which SQLAlchemy makes an object of a row, or finds it in the session."""


def load_of_row(caller: types.FrameType) -> Any:
    """The `QueryContext` of the row that `caller` reads; None where it is other code, which reads none."""
    return caller.f_locals["context"] if caller.f_code is _ROW_PROCESSOR else None


def given_by_statement(compile_state: Any) -> tuple[Collection[str], Collection[Any]]:
    """Of `select(...).from_statement(statement)`: the names of the statement's columns, and the mappers of what is
    made of its rows."""
    statement = getattr(compile_state, "statement", None)
    names = {str(each.name) for each in getattr(statement, "exported_columns", ())}
    mappers = [each.mapper for each in getattr(compile_state, "_entities", ()) if getattr(each, "mapper", None)]
    return names, mappers


def from_statement(statement: Any) -> Any:
    """The statement within `select(...).from_statement(statement)`; any other as it is."""
    return statement.element if isinstance(statement, sa_orm.FromStatement) else statement


def object_of_key(session: sa_orm.Session, mapper: Any, ident: Any, options: Mapping[str, Any]) -> Any:
    """The object that the session has for what `get()` takes, expired or not; None where it has none."""
    if isinstance(ident, Mapping):
        ident = [
            ident.get(each.key) for each in (mapper.get_property_by_column(column) for column in mapper.primary_key)
        ]
    elif not isinstance(ident, (tuple, list)):
        ident = [ident]
    return session.identity_map.get(mapper.identity_key_from_primary_key(tuple(ident), **options))


def is_composite_key(mapper: sa_orm.Mapper[Any]) -> bool:
    """Whether a primary key value is an object of a composite, which `get()` takes apart."""
    keys = set(mapper.primary_key)
    return any(keys & set(each.columns) for each in mapper.composites)


def scope_of(session: sa_orm.Session) -> Any:
    """The `Scope` of an opt-in session; None of any other."""
    return getattr(session, "_fictive", None)


def origin(session: sa_orm.Session, begin: bool) -> Any:
    """What `SessionTransaction` is to be made with, by `begin()` or by what begins one by itself."""
    if begin:
        return sa_session.SessionTransactionOrigin.BEGIN
    if not session.autobegin:
        raise sa.exc.InvalidRequestError(
            "Autobegin is disabled on this Session; please call session.begin() to start a new transaction"
        )
    return sa_session.SessionTransactionOrigin.AUTOBEGIN


def return_interrupted(pool: Any, record: Any, error: BaseException) -> bool:
    """Give a pool the entry whose check-in was interrupted, its connection closed: SQLAlchemy would forget it, and the
    pool would be smaller for good. False where the check-in has not begun."""
    if error.__dict__.get("fictive_returned") is record:  # nearer to the interrupt; another thread may have it by now
        return True
    if record.fairy_ref is not None:
        return False
    if record not in getattr(getattr(pool, "_pool", None), "queue", ()):
        record.invalidate(error)
        error.__dict__["fictive_returned"] = record
        pool._do_return_conn(record)
    return True


def pool_of(record: Any) -> Any:
    """The pool of an entry, which has it under a name of its class's own."""
    return record._ConnectionRecord__pool


def return_unheard(fairy: Any) -> None:
    """Give a pool the entry of a connection without telling the listeners to check-ins, who have been told."""
    record, pool = fairy._connection_record, fairy._pool
    record.fairy_ref = None
    fairy.dbapi_connection = fairy._connection_record = None
    pool._return_conn(record)


def listeners_to(dispatch: Any, event: str) -> tuple[Sequence[Any], Sequence[Any]]:
    """The listeners to an event of an object, and those to that of its classes; both show those that come later."""
    found = getattr(dispatch, event).for_modify(dispatch)
    return found.listeners, found.parent_listeners


def pending_states(session: sa_orm.Session) -> list[tuple[str, list[Any]]]:
    """What a flush would look at. The public `new`, `dirty` and `deleted` make sets of objects for it."""
    dirty = [state for state in session._dirty_states if state not in session._deleted]
    return [("INSERT", list(session._new)), ("UPDATE", dirty), ("DELETE", list(session._deleted))]


@contextlib.contextmanager
def past_ended_blocks(session: sa_orm.Session) -> Iterator[None]:
    """Let a session of SQLAlchemy's own be used as after its `with session.begin():` blocks that have ended.

    It refuses statements until such a block is left; what runs at the end of the transaction runs within the leaving.
    """
    left = block = session._trans_context_manager
    while block is not None and not block._transaction_is_active():
        block = block._outer_trans_ctx
    session._trans_context_manager = block
    try:
        yield
    finally:
        session._trans_context_manager = left


def expecting_the_end(transaction: Any) -> contextlib.AbstractContextManager[Any]:
    """Before SQLAlchemy 2.1 a two-phase commit whose PREPARE fails calls `rollback()` without a word to its own check
    of states, which then raises in place of the error."""
    within = transaction._current_fn
    if within is None or within.__name__ != "_prepare_impl" or transaction._next_state is not _IN_PROGRESS:
        return contextlib.nullcontext()
    return transaction._expect_state(CLOSED)  # type: ignore[no-any-return]


def commit_as_is(session: sa_orm.Session, transaction: sa_orm.SessionTransaction) -> None:
    """Commit what was sent, without flushing what is pending and without expiring what is loaded.

    `SessionTransaction.commit` flushes unless a flush is under way, and there is no option to stop it.
    """
    expire, session.expire_on_commit = session.expire_on_commit, False
    flushing, session._flushing = session._flushing, True
    try:
        transaction.commit()
    finally:
        session.expire_on_commit = expire
        session._flushing = flushing


def connections_of(transaction: sa_orm.SessionTransaction) -> list[sa.Connection]:
    """The connections a transaction has taken so far; takes none. Public only from SQLAlchemy 2.1.7 on."""
    return list({id(entry[0]): entry[0] for entry in transaction._connections.values()}.values())


def expire_with_savepoint(session: sa_orm.Session, state: Any) -> None:
    """Let the rollback of the savepoint that is open, if one is, expire an object, as it does those that it wrote."""
    savepoint = session._nested_transaction
    if savepoint is not None:
        savepoint._dirty[state] = True


def note_savepoint_write(session: sa_orm.Session) -> None:
    """Remember that something was written in the savepoint that is open, if one is, and so in those around it."""
    savepoint: Any = session._nested_transaction
    while savepoint is not None:
        savepoint.has_written = True
        savepoint = savepoint._parent


def note_lazy_load(session: sa_orm.Session, options: Mapping[str, Any]) -> None:
    """In a savepoint: let its rollback expire the object of a lazy load, whose execution options these are."""
    load = options.get("_sa_orm_load_options")
    state = getattr(load, "_lazy_loaded_from", None)
    if state is not None:
        expire_with_savepoint(session, state)


def expire_loaded_since(savepoint: Any, number: int) -> None:
    """Let a rollback of a savepoint expire the objects that were read since the load of this number."""
    for state in savepoint.session.identity_map.all_states():
        if state.runid is not None and state.runid >= number:
            savepoint._dirty[state] = True


def columns_set(update: Any, params: Any) -> frozenset[str] | None:
    """The keys of the columns that an UPDATE sets; None where its parameters may be values of any."""
    if params:
        return None
    ordered = getattr(update, "_ordered_values", None) or ()  # a list of its own in SQLAlchemy 2.0
    given = [*(update._values or ()), *(column for column, _ in ordered)]
    return frozenset(getattr(each, "key", each) for each in given)


def resolved(statement: Any) -> Any:
    """The construct inside a lambda statement; any other as it is."""
    return getattr(statement, "_resolved", statement)


def is_autocommit(execution_options: Mapping[str, Any]) -> bool:
    """Whether execution options ask for AUTOCOMMIT, in whatever spelling SQLAlchemy takes."""
    return str(execution_options.get("isolation_level", "")).replace("_", " ").upper() == "AUTOCOMMIT"


def connects_in_autocommit(dialect: sa.Dialect) -> bool:
    """Whether `create_engine(isolation_level=...)` asked for AUTOCOMMIT; the dialect keeps it under its own name."""
    return is_autocommit({"isolation_level": getattr(dialect, "_on_connect_isolation_level", None)})


def locks_rows(element: Any) -> bool:
    """Whether a SELECT has FOR UPDATE or FOR SHARE; SQLAlchemy has `with_for_update()` but no way to ask."""
    return getattr(element, "_for_update_arg", None) is not None


def options_of(statement: Any) -> Sequence[Any]:
    """What `options()` of a SELECT was given; there is no way to ask."""
    options: Sequence[Any] = getattr(statement, "_with_options", ())
    return options


def criterion_of(option: Any) -> Any:
    """What `with_loader_criteria()` was given; an option that was pickled is another object, of the same criterion."""
    return getattr(option, "_where_crit_orig", None)


def mapper_of(element: Any) -> sa_orm.Mapper[Any] | None:
    """The mapper that a table or column in a statement was named through; SQLAlchemy keeps it as an annotation."""
    entity = getattr(element, "_annotations", {}).get("parententity")
    return None if entity is None else entity.mapper


def describe(statement: Any) -> str:
    """A few words for messages: `UPDATE objects`, before the statement is compiled."""
    statement = resolved(statement)
    if isinstance(statement, sa.UpdateBase):
        table = getattr(statement, "table", None)
        return f"{statement.__visit_name__.upper()} {getattr(table, 'fullname', table)}"
    return type(statement).__name__


def text_of(statement: Any, dialect: sa.Dialect) -> str:
    """The SQL of a statement, for looking at it; SQLAlchemy compiles it again, with values, when it is sent."""
    statement = resolved(statement)
    if isinstance(statement, sa.TextClause):
        return statement.text
    try:
        return str(statement.compile(dialect=dialect))
    except sa.exc.SQLAlchemyError:  # one that is complete with values only
        return describe(statement)


OPTIONS = frozenset({"fictive_writes", "fictive_outside", "fictive_primary"})
"""The execution options of fictive's own."""


def own_options(statement: Any, execution_options: Mapping[str, Any], session: sa_orm.Session) -> Mapping[str, Any]:
    """The execution options of fictive's that hold for a statement; the statement's own are kept without a public name
    that works on every kind of statement."""
    found: dict[str, Any] = {}
    for options in (
        getattr(session, "execution_options", None),
        getattr(statement, "_execution_options", None),
        execution_options,
    ):
        if options:
            found.update({name: options[name] for name in OPTIONS if name in options})
    return found


BEGIN_OPTIONS = {
    "isolation_level": "isolation_level",
    "postgresql_readonly": "read_only",
    "postgresql_deferrable": "deferrable",
}
"""The execution options of a Core connection for what a transaction is asked for, with the fields of
`TransactionOptions` (SQLAlchemy documentation, "Setting READ ONLY / DEFERRABLE" of the PostgreSQL dialect)."""


def core_options(options: Any) -> dict[str, Any]:
    """`TransactionOptions` as those."""
    return {name: value for name, field in BEGIN_OPTIONS.items() if (value := getattr(options, field)) is not None}


def join_events(connection: sa.Connection, engine: sa.Engine) -> None:
    """Let a connection hear what is listened for on its engine, without the listener that SQLAlchemy itself attaches
    for the engine's isolation level."""
    connection.dispatch = connection.dispatch._join(engine.dispatch)
    connection._has_events = False  # SQLAlchemy asks the engine besides
    if engine._has_events:
        for listener in connection.dispatch.engine_connect:
            if listener.__module__ != "sqlalchemy.engine.default":
                listener(connection)


def hear_engine_only(connection: sa.Connection, engine: sa.Engine) -> None:
    """Drop the listeners that were attached to the connection itself."""
    del connection.dispatch  # its own, over that of all connections
    connection.dispatch = connection.dispatch._join(engine.dispatch)
    connection._has_events = False


def named_froms(exists: Any) -> Sequence[Any]:
    """What the SELECT in an `exists()` is of, where its columns do not say so: `any()` and `has()` name their table by
    `select_from()`, and `exists().where(...)` in its conditions."""
    select = getattr(exists.element, "element", exists.element)
    froms: Sequence[Any] = getattr(select, "_from_obj", ())
    if not froms and isinstance(select, sa.Select) and not any(map(mapper_of, select._raw_columns)):
        froms = select.get_final_froms()
    return froms


def is_orm_dml(statement: Any) -> bool:
    """Whether INSERT, UPDATE or DELETE names a mapped class, so that the ORM may split it into several statements."""
    return isinstance(statement, sa.UpdateBase) and statement._propagate_attrs.get("compile_state_plugin") == "orm"


def as_single_insert(statement: Any, params: Any) -> Any | None:
    """An ORM INSERT of one row as a statement with its values, which is one round trip; None where it may be more.

    SQLAlchemy sends `execute(insert(Model), {...})` through its bulk path, which wants a transaction of the session.
    """
    if not isinstance(statement, sa.Insert):
        return None
    if isinstance(params, Sequence) and len(params) == 1:
        params = params[0]
    if not isinstance(params, Mapping):
        return None
    subject = statement._propagate_attrs.get("plugin_subject")
    mapper = getattr(subject, "mapper", None)
    if mapper is None or len(mapper.tables) != 1 or statement._values or statement._multi_values:
        return None
    if statement.get_execution_options().get("dml_strategy", "auto") != "auto":
        return None
    return statement.values(dict(params))


def sessions() -> list[sa_orm.Session]:
    """All sessions of the process, as `close_all_sessions()` finds them."""
    return list(sa_session._sessions.values())


def is_own_listener(listener: Any) -> bool:
    """Whether a listener of a pool is one that fictive or the dialect attached, and not the application."""
    return _home_of(listener).startswith(("sqlalchemy.", "fictive.connection."))


def others_look_on(listeners: Any) -> bool:
    """Whether one of a session's listeners to `do_orm_execute` is not fictive's."""
    return any(not _home_of(each).startswith("fictive.models.") for each in listeners)


def _home_of(listener: Any) -> str:
    """The module of a listener's function, which may be within a `functools.partial`, and which SQLAlchemy puts into
    a function of its own for `named=True` and `once=True`."""
    if isinstance(listener, functools.partial):
        return _home_of(listener.func)
    module = getattr(listener, "__module__", None) or ""
    closure = getattr(listener, "__closure__", None)
    if closure and module.startswith(("sqlalchemy.event.", "sqlalchemy.util.")):
        return _home_of(dict(zip(listener.__code__.co_freevars, closure, strict=True))["fn"].cell_contents)
    return module


class _AllTold:
    """The state of a statement of whose listeners none are left to be told."""

    def _remaining_events(self) -> Sequence[Any]:
        return ()


_ALL_TOLD = _AllTold()


def without_listeners(execute: Any) -> Any:
    """A session's `execute()` that does not tell the listeners to `do_orm_execute`, which costs SQLAlchemy a fifth of
    a SELECT. One of another class than SQLAlchemy's as it is."""
    if getattr(execute, "__func__", None) is sa_orm.Session.execute and _can_be_unheard:
        return functools.partial(execute, _parent_execute_state=_ALL_TOLD)
    return execute


_can_be_unheard = (
    "_parent_execute_state" in inspect.signature(sa_orm.Session.execute).parameters
    and hasattr(sa_orm.ORMExecuteState, "_remaining_events")
)  # fmt: skip


_listening: weakref.WeakKeyDictionary[Any, set[Any]] = weakref.WeakKeyDictionary()


def listen_once(target: Any, name: str, listener: Any) -> None:
    """`event.listen()`, where that listener does not listen yet. `event.contains()` goes by `id()`, and so takes a new
    object for one that is gone."""
    known = _listening.setdefault(target, set())
    if (name, listener) not in known:
        sa.event.listen(target, name, listener)
        known.add((name, listener))


def root_engine(engine: sa.Engine) -> sa.Engine:
    """The engine under the views that `Engine.execution_options()` makes of it; they share its pool."""
    while (inner := getattr(engine, "_proxied", None)) is not None:
        engine = inner
    return engine


def recycle(pool: sa.Pool) -> None:
    """Let a pool replace each connection that was made before now when it is next taken, as SQLAlchemy does after an
    error that says that a connection was lost."""
    pool._invalidate_time = time.time()


def forget_entries(pool: Any) -> None:
    """Leave a pool as it was made, without closing what is in it, and with nothing counted that is out."""
    pool._pool.queue.clear()
    pool._overflow = -pool.size()


def pool_settings(pool: sa.Pool) -> dict[str, Any]:
    """What a pool was made with, as far as its kind has it; a pool tells only some of it."""
    kept = {"max_overflow": "_max_overflow", "pool_recycle": "_recycle", "pool_pre_ping": "_pre_ping"}
    found = {name: getattr(pool, attribute) for name, attribute in kept.items() if hasattr(pool, attribute)}
    if isinstance(pool, sa.QueuePool):
        found |= {"pool_size": pool.size(), "pool_timeout": pool.timeout()}
    return found


def exclusions_of(constraint: Any) -> Sequence[Any]:
    """The expressions of a PostgreSQL `ExcludeConstraint`, each a tuple that begins with it."""
    found: Sequence[Any] = constraint._render_exprs
    return found


def has_listeners(mapper: sa_orm.Mapper[Any], *events: str) -> bool:
    """Whether the application listens to one of these events of the mapper, its superclasses or all mappers.

    `event.contains` answers for one known function only. A composite listens itself, to drop the value that it keeps.
    """
    return any(not _is_of_composite(listener) for name in events for listener in getattr(mapper.dispatch, name))


def _is_of_composite(listener: Any) -> bool:
    """Whether SQLAlchemy attached a mapper's listener for a composite; what it calls is in its closure."""
    names = getattr(getattr(listener, "__code__", None), "co_freevars", ())
    called = listener.__closure__[names.index("fn")].cell_contents if "fn" in names else None
    return getattr(called, "__module__", None) == sa_orm.CompositeProperty.__module__


def run_on_cursor(connection: sa.Connection, statement: str, run: Callable[[Any], None]) -> None:
    """Let `run` do with the driver's cursor what `statement` says, as if SQLAlchemy had executed it.

    SQLAlchemy knows no COPY FROM STDIN, which needs more of the driver than `execute`. This way it is logged, seen by
    listeners, and its errors are SQLAlchemy's, like those of any statement (`Connection.exec_driver_sql` does the
    same with the dialect's own context).
    """
    made_by = connection.dialect.execution_ctx_cls

    class Context(made_by):  # type: ignore[misc, valid-type]
        def create_cursor(self) -> Any:
            return _Instead(super().create_cursor(), run)

    options = connection._execution_options
    connection._execute_context(connection.dialect, Context._init_statement, statement, None, options, statement, ())


class _Instead:
    """A cursor that does something else when it is told to execute."""

    def __init__(self, cursor: Any, run: Callable[[Any], None]) -> None:
        self._cursor = cursor
        self._run = run

    def execute(self, statement: Any, *_: Any) -> None:
        watched = getattr(type(self._cursor), "run_instead", None)  # it tells its watcher
        if watched is not None:
            watched(self._cursor, self._run, statement)
        else:
            self._run(self._cursor)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)


def cached_as_it_is(statement: Any) -> Any:
    """An INSERT that is kept, has its values as parameters and nobody changes: compiled once.

    SQLAlchemy 2.0 compiles one with ON CONFLICT at each execution: its class has no key in the cache of statements.
    """
    if statement._generate_cache_key() is None:
        made_by: Any = type(statement)
        statement.__class__ = _with_itself_as_key(made_by)
    return statement


@functools.cache
def _with_itself_as_key(class_: type) -> type:
    def key(self: Any, anon_map: Any, bindparams: list[Any]) -> tuple[Any, ...]:
        return (self,)

    return type(class_.__name__, (class_,), {"inherit_cache": False, "_gen_cache_key": key})


def load_run(state: sa_orm.InstanceState[Any]) -> int:
    """The number of the query that loaded an object last: the same for all objects of one query."""
    run: int = state.runid or 0
    return run


def must_be_unique(result: sa.Result[Any]) -> bool:
    """Whether an ORM result can be read through `unique()` only, as with a collection that is loaded by a join."""
    state: Any = getattr(result, "_unique_filter_state", None)
    return bool(state)


def key_of(state: sa_orm.InstanceState[Any]) -> tuple[Any, ...]:
    """The primary key of a persistent object, as it is in the identity map."""
    assert state.key is not None
    return tuple(state.key[1])


def other_sides(relation: Any) -> Collection[Any]:
    """The relationships that show the same links from the other side, by `back_populates`."""
    found: Collection[Any] = relation._reverse_property
    return found


def relationship_of_load(state: sa_orm.ORMExecuteState) -> sa_orm.RelationshipProperty[Any] | None:
    """Which relationship a lazy load is for. The path is public, and how to read it is not."""
    path = state.loader_strategy_path
    found = path.path[-1] if path else None
    return found if isinstance(found, sa_orm.RelationshipProperty) else None


def loaded_as(statement: sa.Select[Any], lazy_load: Any) -> sa.Select[Any]:
    """`statement`, with the options of a lazy load's, and at its place in the path that these speak of."""
    result = statement.options(*options_of(lazy_load))
    result._compile_options = lazy_load._compile_options
    return result


class _Distinct(sa.engine.IteratorResult[Any]):
    """Objects that are distinct already, as a result; asking it to make them so would need them to be hashable."""

    def unique(self, strategy: Any = None) -> Any:
        return self


def result_of(objects: Sequence[Any]) -> sa.Result[Any]:
    """A result of one column with `objects`, for whoever expects one. Its metadata has no public maker."""
    return _Distinct(sa_result.SimpleResultMetaData(["object"]), iter([(each,) for each in objects]))


def rest_of_a_stream(state: sa_orm.ORMExecuteState) -> None:
    """For each handler of `do_orm_execute`: let eager loads work under `yield_per`.

    SQLAlchemy 2.0 prepares a statement twice where there is such a handler, and the second time takes the `yield_per`
    of the SELECT around it for its own, which an eager load cannot have.
    """
    if state.is_relationship_load and state.local_execution_options.get("yield_per"):
        state.update_execution_options(yield_per=None)
