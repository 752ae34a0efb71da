"""Everything of SQLAlchemy that fictive uses and that has no public name, each behind a function that says why.

`tests/test_private.py` fails when one of these changes. Nothing else in fictive touches an underscore of SQLAlchemy's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.engine import cursor as sa_cursor
from sqlalchemy.engine import result as sa_result

__all__ = [
    "BareConnection",
    "JointedSession",
    "PinnedConnection",
    "StreamConnection",
    "as_single_insert",
    "bind_parameters",
    "buffer",
    "cache_key",
    "commit_as_is",
    "connections_of",
    "connects_in_autocommit",
    "cursor_result",
    "drop_connections",
    "has_listeners",
    "is_autocommit",
    "is_orm_dml",
    "is_watched",
    "keep_with",
    "key_of",
    "load_run",
    "loaded_as",
    "locks_rows",
    "mapper_of",
    "named_froms",
    "options_of",
    "past_ended_blocks",
    "pool_settings",
    "relationship_of_load",
    "resolved",
    "rest_of_a_stream",
    "result_of",
    "rollback_cause",
    "root_engine",
    "run_on_cursor",
    "streams",
    "texts_of",
    "yields_per",
]


class JointedSession(sa_orm.Session):
    """A session that asks its subclass at the three points where SQLAlchemy would take a transaction for granted.

    `execute`, `flush` and the rest are public and overridden as such; but which connection a statement runs on, and
    when a transaction object comes to be, SQLAlchemy decides in methods without a public name.
    """

    def bare_connection(self, bind: sa.Engine | sa.Connection) -> sa.Connection | None:
        """The connection for a statement outside; None to let SQLAlchemy take the transaction's."""
        raise NotImplementedError

    def may_autoflush(self) -> bool:
        """Whether a statement about to run may flush first."""
        raise NotImplementedError

    def changes_begin(self) -> None:
        """The first change since the last commit or rollback is about to be recorded; nothing is sent."""
        raise NotImplementedError

    def _connection_for_bind(self, engine: Any, execution_options: Any = None, **kwargs: Any) -> sa.Connection:
        connection = self.bare_connection(engine)
        if connection is not None:
            return connection
        return super()._connection_for_bind(engine, execution_options=execution_options, **kwargs)

    def _autoflush(self) -> None:
        if self.may_autoflush():
            super()._autoflush()

    def _autobegin_t(self, begin: bool = False) -> sa_orm.SessionTransaction:
        if self._transaction is None and not begin:
            self.changes_begin()
        return super()._autobegin_t(begin)

    # SQLAlchemy's transaction object remembers what to undo in Python on a rollback (objects added, deleted, renamed)
    # from the first change on, long before it has a connection. fictive lets it: outside it has none.

    def change_record(self) -> sa_orm.SessionTransaction | None:
        """SQLAlchemy's innermost transaction object, with or without a connection; None where nothing changed."""
        return self._transaction

    def open_change_record(self) -> sa_orm.SessionTransaction:
        """The same, made now where there is none."""
        return super()._autobegin_t()

    @contextlib.contextmanager
    def change_record_aside(self) -> Iterator[sa_orm.SessionTransaction]:
        """A fresh transaction object for a statement that has nothing to do with the changes recorded so far."""
        aside, self._transaction = self._transaction, None
        try:
            yield super()._autobegin_t(begin=True)
        finally:
            if self._transaction is None:
                self._transaction = aside

    def is_clean(self) -> bool:
        """Whether a flush would find nothing to look at."""
        return self._is_clean()

    @property
    def flushing(self) -> bool:
        return self._flushing


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


def drop_connections(transaction: sa_orm.SessionTransaction) -> None:
    """Let the transaction take new connections instead of those it has, on which nothing was done."""
    for connection in connections_of(transaction):
        connection.close()
    transaction._connections.clear()


def rollback_cause(transaction: sa_orm.SessionTransaction) -> BaseException | None:
    """The error of the flush that made SQLAlchemy roll the transaction back by itself."""
    return transaction._rollback_exception


class BareConnection(sa.Connection):
    """A connection that runs statements without SQLAlchemy's own transaction object around them.

    With it, each statement would log BEGIN and ROLLBACK that do not happen, and fire `begin` and `rollback` events.
    """

    def __init__(self, engine: sa.Engine) -> None:
        super().__init__(engine, _allow_autobegin=False)

    def _rollback_impl(self) -> None:
        if self.in_transaction():  # else SQLAlchemy cleans up after an error, where there is nothing to undo
            super()._rollback_impl()


class PinnedConnection(BareConnection):
    """A bare connection on which a transaction can be begun all the same, by whoever has it."""

    def __init__(self, engine: sa.Engine, leave_autocommit: Callable[[sa.Connection], None]) -> None:
        super().__init__(engine)
        self._leave_autocommit = leave_autocommit

    def begin(self) -> sa.RootTransaction:
        if not self.in_transaction():
            self._leave_autocommit(self)
        return super().begin()


class StreamConnection(sa.Connection):
    """A connection held for one result, and closed as soon as that lets its cursor go: exhausted, or closed."""

    held_for: Any = None
    """The driver's cursor of that result."""

    def _safe_close_cursor(self, cursor: Any) -> None:
        super()._safe_close_cursor(cursor)
        if cursor is self.held_for and cursor is not None:
            self.held_for = None
            self.close()


def cursor_result(result: Any) -> sa.CursorResult[Any] | None:
    """The result that reads from the driver's cursor, under the ORM's; None where there is none."""
    inner = result if isinstance(result, sa.CursorResult) else getattr(result, "raw", None)
    return inner if isinstance(inner, sa.CursorResult) else None


def buffer(result: Any) -> None:
    """Fetch all rows now, as the driver gave them, so that the connection is free of the result.

    SQLAlchemy has the strategy for it, and sets it itself for databases that need it, but offers no public switch
    (`prebuffer_rows` is for ORM rows only).
    """
    inner = cursor_result(result)
    if inner is None or inner.cursor is None or not inner.returns_rows:
        return
    strategy = inner.cursor_strategy
    if type(strategy) is not sa_cursor.CursorFetchStrategy:
        return  # its rows are in memory already
    try:
        rows = inner.cursor.fetchall()
    except BaseException as error:
        strategy.handle_exception(inner, inner.cursor, error)
    inner.cursor_strategy = sa_cursor.FullyBufferedCursorFetchStrategy(None, initial_buffer=rows)


def keep_with(result: Any, companion: object) -> None:
    """Let `companion` live as long as `result`, which has no place for a weak reference to it."""
    result._fictive_companion = companion


def resolved(statement: Any) -> Any:
    """The construct inside a lambda statement; any other as it is."""
    return getattr(statement, "_resolved", statement)


def cache_key(statement: Any) -> Any:
    """What SQLAlchemy knows a statement of this structure by, whatever its values; None for one that has no such key.

    It is kept with the statement and used again when it is compiled.
    """
    generate = getattr(statement, "_generate_cache_key", None)
    key = generate() if generate is not None else None
    return None if key is None else key.key


def is_autocommit(execution_options: Mapping[str, Any]) -> bool:
    """Whether execution options ask for AUTOCOMMIT, in whatever spelling SQLAlchemy takes."""
    return str(execution_options.get("isolation_level", "")).replace("_", " ").upper() == "AUTOCOMMIT"


def connects_in_autocommit(dialect: sa.Dialect) -> bool:
    """Whether `create_engine(isolation_level=...)` asked for AUTOCOMMIT; the dialect keeps it under its own name."""
    return is_autocommit({"isolation_level": getattr(dialect, "_on_connect_isolation_level", None)})


_OWN_LISTENERS = 2


def is_watched(engine: sa.Engine) -> bool:
    """Whether anyone but fictive (`engines.prepare`: one `checkout`, one `checkin`) is told of each connection that
    comes from or goes to the pool. SQLAlchemy tells of one listener whether it is there, but not how many there are.
    """
    pool = engine.pool.dispatch
    return (
        len(pool.checkout) + len(pool.checkin) + len(pool.reset) + len(engine.dispatch.engine_connect) > _OWN_LISTENERS
    )


def streams(engine: sa.Engine) -> bool:
    """Whether the engine's own options ask for cursors on the server."""
    options = engine.get_execution_options()
    return bool(options.get("stream_results") or options.get("yield_per"))


def yields_per(execution_options: Mapping[str, Any]) -> bool:
    """Whether `Query.yield_per()` was called; it goes another way than the execution option of the same name."""
    return bool(getattr(execution_options.get("_sa_orm_load_options"), "_yield_per", None))


def locks_rows(element: Any) -> bool:
    """Whether a SELECT has FOR UPDATE or FOR SHARE; SQLAlchemy has `with_for_update()` but no way to ask."""
    return getattr(element, "_for_update_arg", None) is not None


def texts_of(element: Any) -> list[str]:
    """SQL that a construct holds as text: literal columns, prefixes, suffixes and hints of a SELECT."""
    if getattr(element, "is_literal", False):
        return [str(element.name)]
    found = [str(text) for text, *_ in (*getattr(element, "_prefixes", ()), *getattr(element, "_suffixes", ()))]
    found += [str(text) for _, text in getattr(element, "_statement_hints", ())]
    return found


def bind_parameters(clause: sa.TextClause) -> Mapping[str, sa.BindParameter[Any]]:
    """The `:name` parameters of a text, with the values that `bindparams()` gave them."""
    return clause._bindparams


def options_of(statement: Any) -> Sequence[Any]:
    """What `options()` of a SELECT was given; there is no way to ask."""
    options: Sequence[Any] = getattr(statement, "_with_options", ())
    return options


def mapper_of(element: Any) -> sa_orm.Mapper[Any] | None:
    """The mapper that a table or column in a statement was named through; SQLAlchemy keeps it as an annotation."""
    entity = getattr(element, "_annotations", {}).get("parententity")
    return None if entity is None else entity.mapper


def named_froms(exists: Any) -> Sequence[Any]:
    """What `select_from()` of the SELECT in an `exists()` was given; `any()` and `has()` name their table so."""
    inner = exists.element
    froms: Sequence[Any] = getattr(getattr(inner, "element", inner), "_from_obj", ())
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


def root_engine(engine: sa.Engine) -> sa.Engine:
    """The engine under the views that `Engine.execution_options()` makes of it; they share its pool."""
    while (inner := getattr(engine, "_proxied", None)) is not None:
        engine = inner
    return engine


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
    """Whether anyone listens to one of these events of the mapper, its superclasses or all mappers.

    `event.contains` answers for one known function only.
    """
    return any(getattr(mapper.dispatch, name) for name in events)


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

    def execute(self, *_: Any) -> None:
        self._run(self._cursor)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)


def load_run(state: sa_orm.InstanceState[Any]) -> int:
    """The number of the query that loaded an object last: the same for all objects of one query."""
    run: int = state.runid or 0
    return run


def key_of(state: sa_orm.InstanceState[Any]) -> tuple[Any, ...]:
    """The primary key of a persistent object, as it is in the identity map."""
    assert state.key is not None
    return tuple(state.key[1])


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
