"""`transaction()` on any session: a context manager, a decorator, and a runner that tries again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType, TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from ..config import refuse_unknown
from ..errors import ConfigurationError, TransactionAlreadyBegun, TransactionEnded, TransactionRequired
from . import private
from .given import session_of
from .hooks import Hook, HookKind, check_hook
from .local_settings import LocalSettings
from .options import OPTIONS, BlockOptions, block_options
from .retry import BeforeRetry, check_retries, run_with_retries
from .session import OptInSession
from .transaction import Joined, Kind, Transaction, adopt, innermost, is_enclosed
from .unentered import warn_not_entered

if TYPE_CHECKING:
    from typing_extensions import ParamSpec, Unpack

    from .options import TransactionArguments

    _Arguments = ParamSpec("_Arguments")

__all__ = [
    "TransactionBlock",
    "get_transaction",
    "on_commit",
    "on_rollback",
    "run_transaction",
    "transaction",
    "transaction_required",
]

_T = TypeVar("_T")
_Function = TypeVar("_Function", bound=Callable[..., Any])
_NAMES = (*OPTIONS, "retries", "before_retry")


class TransactionBlock:
    """What `transaction()` returns: `with` begins it and gives the `Transaction`; as a decorator it is around a call.

    Nothing is begun before. For one thread at a time as a context manager, for any number as a decorator. One that is
    dropped without either gives a `NotEnteredWarning` and a record of the logger `fictive.unentered`.
    """

    _unused = False

    def __init__(
        self,
        session: Callable[[], Any],
        *,
        retries: int | None = None,
        before_retry: BeforeRetry | None = None,
        called: str = "transaction()",
        **arguments: Unpack[TransactionArguments],
    ) -> None:
        """`session` is called for the session each time; `called` is the function that messages name."""
        refuse_unknown(arguments, _NAMES, called)
        block_options(**arguments)
        if before_retry is not None and (retries is None or not callable(before_retry)):
            raise ConfigurationError("before_retry is a function, and comes with retries.")
        self._retries = None if retries is None else check_retries(retries)
        self._before_retry = before_retry
        self._arguments = arguments
        self._session = session
        self._entered: Transaction | None = None
        self._unused = called == "transaction()"

    def begin(self) -> Transaction:
        """Begin it now; `Transaction.commit()` and `rollback()` end it."""
        self._unused = False
        session = session_of(self._session())
        if isinstance(session, OptInSession):
            return session.transaction(**self._arguments)
        return _begin_on_plain_session(session, block_options(**self._arguments))

    def __enter__(self) -> Transaction:
        self._unused = False
        if self._retries is not None:
            raise ConfigurationError(
                "A `with` block cannot be run a second time, so retries are for functions: decorate one with "
                "@db.transaction(retries=n), or call db.run_transaction(function, retries=n)."
            )
        if self._entered is not None:
            raise TransactionAlreadyBegun("This transaction() has been entered already; call transaction() once more.")
        block = self.begin()
        self._entered = block
        return block.__enter__()

    def __exit__(
        self, type_: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        block, self._entered = self._entered, None
        assert block is not None
        return block.__exit__(type_, error, traceback)

    def __del__(self) -> None:
        if self._unused:
            warn_not_entered("transaction()")

    def __call__(self, function: _Function) -> _Function:
        self._unused = False
        _check_function(function)

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            return self.run(functools.partial(function, *args, **kwargs))

        return run  # type: ignore[return-value]

    def run(self, function: Callable[[], _T]) -> _T | None:
        """Call `function` in it, with retries as asked for. None after a `Rollback`."""
        self._unused = False

        def once() -> _T | None:
            with self.begin():
                return function()
            return None

        if not self._retries:
            return once()
        return run_with_retries(session_of(self._session()), once, self._retries, self._before_retry)


def _begin_on_plain_session(session: sa_orm.Session, options: BlockOptions) -> Transaction:
    """`transaction()` on a session of SQLAlchemy's own, which begins by itself with whatever it runs first."""
    if options.settings:
        options.check(session.get_bind().dialect)
    if not session.in_transaction():
        block = adopt(session.begin())
        assert block is not None
        if asked := private.core_options(options.begin):
            try:
                session.connection(execution_options=asked)
            except BaseException:
                block.rollback()
                raise
        block.options = options.begin
        # a session bound to a connection may be part of a transaction that is not its own
        whole = isinstance(session.get_bind(), sa.Engine) if options.settings else False
    else:
        around = innermost(session)
        assert around is not None
        root = session.get_transaction()
        options.check_inside(adopt(root).options, enclosed=is_enclosed(session))  # type: ignore[union-attr]
        whole = False
        if not options.savepoint:
            return cast(Transaction, Joined(session, around, options.settings))
        block = adopt(session.begin_nested())
        assert block is not None
    block.kind = Kind.BLOCK
    if options.settings:
        LocalSettings(block, options.settings, whole=whole)
    return block


def _check_function(function: object) -> None:
    if not callable(function):
        raise TypeError(f"transaction() decorates functions, not {function!r}. Options go by keyword.")
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise TypeError(
            f"{function!r} does its work after it has returned, and so after the transaction. Put "
            "`with transaction():` in it instead."
        )


def transaction(
    session: Any,
    *,
    retries: int | None = None,
    before_retry: BeforeRetry | None = None,
    **options: Unpack[TransactionArguments],
) -> TransactionBlock:
    """Begin a transaction, or a savepoint in an open one: for code that must be atomic wherever it is called.

    `with transaction(session) as tx:`, or `@transaction(session)` on a function. `session` is any session or
    `scoped_session`; a `scoped_session` is asked anew for each call.

    `isolation_level` ("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"), `read_only` and `deferrable` go into
    BEGIN itself, and what is not given is the server's default (PostgreSQL documentation, "SET TRANSACTION"). They
    cannot change in an open transaction: there, one that differs raises `TransactionAlreadyBegun`.

    `lock_timeout` and `statement_timeout` (`"5s"`, seconds, a timedelta) hold for the statements of the block, and
    not past it; they are sent with the first statement. PostgreSQL only.

    `durable=True` promises that the block is committed when it ends: it raises `TransactionAlreadyBegun` in a
    transaction. `savepoint=False` is part of the transaction that is open, and begins one only in autocommit.

    `retries=n`, for functions only: on SQLSTATE 40001 and 40P01, from COMMIT as well, the transaction is run up to n
    more times, after a pause with jitter, on a session that has forgotten the failed try; before each
    `before_retry(number, error)` is called. Refused in a transaction, and with unsaved changes in the session; never
    done after `CommitOutcomeUnknown`.

    Costs one round trip more than its statements; as a savepoint none, or one where it is sent alone. On a plain
    session whatever has run has begun a transaction, which its owner commits: there it is a savepoint.
    """
    return TransactionBlock(lambda: session, retries=retries, before_retry=before_retry, **options)


get_transaction = transaction


def run_transaction(
    session: Any,
    function: Callable[[], _T],
    *,
    retries: int = 3,
    before_retry: BeforeRetry | None = None,
    **options: Unpack[TransactionArguments],
) -> _T | None:
    """Call `function` in a `transaction()`, with retries, and return what it returns; None after a `Rollback`.

    `function` may run several times: what it does outside the database belongs in an `on_commit` hook.
    """
    _check_function(function)
    block = TransactionBlock(
        lambda: session, retries=retries, before_retry=before_retry, called="run_transaction()", **options
    )
    return block.run(function)


def transaction_required(session: Any) -> Callable[[_Function], _Function]:
    """Decorator: the function raises `TransactionRequired` where it is called in autocommit. Sends nothing."""

    def decorate(function: _Function) -> _Function:
        _check_function(function)

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if not session_of(session).in_transaction():
                raise TransactionRequired(
                    f"{getattr(function, '__qualname__', function)}() has to be called in a transaction, and none is "
                    "open. Put the call in `with db.session.begin():`."
                )
            return function(*args, **kwargs)

        return run  # type: ignore[return-value]

    return decorate


def on_commit(
    session: Any, fn: Callable[_Arguments, object], *args: _Arguments.args, **kwargs: _Arguments.kwargs
) -> None:
    """Call `fn(*args, **kwargs)` after the COMMIT of the whole transaction, in autocommit.

    Hooks run in the order of registration, and may use the session and begin transactions. Dropped when the savepoint
    it was registered in, or one around it, is rolled back. In autocommit, where each statement is committed already,
    `fn` is called at once. In a block whose transaction has ended: `TransactionEnded`. `TypeError` at the call for
    what is not a function, for a coroutine function, and for one that takes other arguments.

    All hooks run even if one raises; then `HooksFailed` has all errors, and the transaction is still committed. After
    `CommitOutcomeUnknown` neither kind of hook runs. A hook is not kept anywhere but in this process: what must not be
    lost belongs in a table.
    """
    _add("commit", session, fn, args, kwargs)


def on_rollback(
    session: Any, fn: Callable[_Arguments, object], *args: _Arguments.args, **kwargs: _Arguments.kwargs
) -> None:
    """Call `fn(*args, **kwargs)` when what is done now is undone: after the rollback of the savepoint it was
    registered in, or of one around it, or of the whole transaction.

    In autocommit there is nothing to undo, and `fn` is never called. Otherwise as `on_commit`. When an error
    ends the block, that error is raised, and those of hooks are logged.
    """
    _add("rollback", session, fn, args, kwargs)


def _add(kind: HookKind, given: Any, fn: Callable[..., object], args: Any, kwargs: Any) -> None:
    session = session_of(given)
    check_hook(fn)
    _check_arguments(kind, fn, args, kwargs)
    hook: Hook = functools.partial(fn, *args, **kwargs) if args or kwargs else fn
    if isinstance(session, OptInSession):
        session._raise_if_ended()
    if session.in_transaction():
        current = innermost(session)
        assert current is not None
        if not (current.is_active or isinstance(session, OptInSession)):
            raise TransactionEnded(f"on_{kind}() in a transaction that has failed; rollback() ends it.")
        current.add_hook(kind, hook)
    elif kind == "commit":
        hook()


def _check_arguments(kind: str, fn: Any, args: Any, kwargs: Any) -> None:
    """Raise `TypeError` now for a function that could not be called later."""
    if type(fn) is FunctionType and not (args or kwargs or fn.__code__.co_argcount or fn.__code__.co_kwonlyargcount):
        return  # the usual case, at no price
    try:
        inspect.signature(fn).bind(*args, **kwargs)
    except ValueError:  # a built-in function that does not tell
        return
    except TypeError as error:
        raise TypeError(
            f"on_{kind}(): {getattr(fn, '__qualname__', fn)} cannot be called like that: {error}. Give its arguments "
            f"after it, on_{kind}(fn, argument), or a lambda."
        ) from None
