"""Mixins for a Flask-SQLAlchemy class: `class DB(OptInTransactionMixin, SQLAlchemy): ...`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

import flask
import flask_sqlalchemy
import flask_sqlalchemy.cli
import flask_sqlalchemy.extension
import flask_sqlalchemy.query
import flask_sqlalchemy.session
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from . import cli
from .config import LazyLoads, NPlusOne, Settings, refuse_unknown
from .connection.engines import prepare, takers
from .connection.pool import BorrowingPool
from .connection.pooler import set_pooler
from .connection.replicas import on_primary, positions_of, set_replicas
from .connection.servers import set_patience
from .connection.statement_settings import SettingsFunction, SettingsSource
from .databases.engine_options import POOL_OPTIONS, add_options, merged_connect_args, timeout_option, value_options
from .databases.urls import database_url
from .errors import ConfigurationError, DatabaseNotConfigured, SettingIgnoredWarning
from .flask_config import ENVIRONMENT, Environment, check_urls, option_layers, read_environment, shared_layers
from .flask_models import MakesModels
from .flask_transactions import app_context, around_view
from .flask_views import Decorated
from .http_errors import init_default_handlers, init_error_handlers
from .other_names import also_named
from .report.watcher import WATCHER
from .session.blocks import TransactionBlock, on_commit, on_rollback, run_transaction, transaction_required
from .session.durations import Duration
from .session.retry import BeforeRetry
from .session.scoped import OptInScopedSession
from .session.session import OptInSession, check_options, report_committed, report_unsaved

__all__ = ["BulkMixin", "FilterByOrCreateMixin", "OptInTransactionMixin"]

_NEEDED = {"flask-sqlalchemy": "3.1", "sqlalchemy": "2.0.43"}

# Modules that a first request does not need are imported where they are used: a worker starts sooner.

# The class itself: the name in flask_sqlalchemy may come to be somebody's subclass, made with these mixins.
_SQLAlchemy = flask_sqlalchemy.extension.SQLAlchemy

_T = TypeVar("_T")
_Function = TypeVar("_Function", bound=Callable[..., Any])
_SettingsFunction = TypeVar("_SettingsFunction", bound=SettingsFunction)

if TYPE_CHECKING:
    from flask_sqlalchemy.extension import _FSAModel
    from typing_extensions import ParamSpec, Unpack

    from .locks.advisory import AdvisoryKey, AdvisoryLockOptions
    from .locks.rows import ClaimOptions, Rows
    from .locks.tables import LockTablesOptions
    from .replica_tokens import Tokens
    from .rows.descriptors import (
        FindOrCreateDescriptor,
        GetOrCreateDescriptor,
        InsertManyDescriptor,
        UpdateManyDescriptor,
        UpdateOrCreateDescriptor,
        UpsertManyDescriptor,
    )
    from .rows.many_to_many import LinkChanges
    from .session.model_events import Told
    from .session.options import TransactionArguments
    from .testing.sandbox import Sandbox

    class ModelMethods:
        """What Flask-SQLAlchemy and the mixins give a model, for type checkers: see the page "Types"."""

        query: ClassVar[flask_sqlalchemy.query.Query]
        find_or_create: FindOrCreateDescriptor
        """The object with these attributes, created if it does not exist: `find_or_create(defaults, name="x")`."""
        get_or_create: GetOrCreateDescriptor
        """As `find_or_create`, returning `(object, created)`."""
        update_or_create: UpdateOrCreateDescriptor
        """Set attributes on the object that is looked up, or create it; returns `(object, created)`."""
        insert_many: InsertManyDescriptor
        """Insert rows from any iterable, by COPY where that is faster; returns how many."""
        upsert_many: UpsertManyDescriptor
        """Insert rows, or update those whose `key` is there; returns how many of each."""
        update_many: UpdateManyDescriptor
        """Update rows by their key; returns how many there were."""

    class _RowsModel(ModelMethods, _FSAModel):
        """One class, since a database object with both mixins has one type of Model."""

    _Arguments = ParamSpec("_Arguments")


def request_being_served() -> flask.Request | None:
    """The request of this thread, found on the stack where Flask has put its context away already (`teardown`)."""
    if flask.has_request_context():
        return flask.request
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "wsgi_app" and hasattr(context := frame.f_locals.get("ctx"), "request"):
            return context.request  # type: ignore[no-any-return,union-attr]
        frame = frame.f_back  # type: ignore[assignment]
    return None


class _AppSession(OptInSession):
    """The opt-in session with the settings of the app in whose context it is made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if "db" in kwargs:  # also a function that is registered later counts
            self._fictive.local_settings = kwargs["db"]._settings_source
        settings = self._fictive.settings
        if settings.report:
            from .report.requests import collector_of_context

            self.info[WATCHER] = collector_of_context()
        if settings.lazy_loads is not LazyLoads.LOAD or settings.n_plus_one is not NPlusOne.OFF:
            from .models.lazy_loads import set_lazy_loads

            set_lazy_loads(self, settings.lazy_loads, n_plus_one=settings.n_plus_one)

    def _fictive_place(self) -> str:
        request = request_being_served()
        return "" if request is None else f" ({request.method} {request.path}, endpoint {request.endpoint})"

    def _fictive_settings(self) -> Settings:
        try:
            settings = flask.current_app.extensions["fictive"]
        except (RuntimeError, KeyError):  # no application context, or one of another extension
            settings = None
        if settings.__class__ is Settings:
            return settings
        return super()._fictive_settings()


class _Block(TransactionBlock):
    """Remembers the functions that it decorates."""

    def __init__(self, decorated: Decorated, session: Callable[[], Any], **options: Any) -> None:
        super().__init__(session, **options)
        self._decorated = decorated

    def __call__(self, function: _Function) -> _Function:
        self._unused = False
        self._decorated.check(function, "transaction")
        return self._decorated.add(super().__call__(function), "transaction")


class OptInTransactionMixin(MakesModels):
    """Makes `db.session` an `OptInSession`: no transaction but where the code says `with db.session.begin():`.

    Goes before `SQLAlchemy` in the bases. Everything else is Flask-SQLAlchemy's; a `class_` in `session_options` is
    kept, with the opt-in session in front of it. Settings in `app.config`: `FICTIVE_WRITES_OUTSIDE`,
    `FICTIVE_UNSAVED_CHANGES`, `FICTIVE_RETRY_READS`, `FICTIVE_ROLLBACK_STATUSES`.

    Raises `ConfigurationError` where the class is made, or in `init_app`, for what cannot work.
    """

    if TYPE_CHECKING:
        session: OptInScopedSession  # type: ignore[assignment]

    @functools.cached_property
    def _decorated(self) -> Decorated:
        return Decorated()

    @functools.cached_property
    def _settings_source(self) -> SettingsSource:
        return SettingsSource()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _check_order(cls, OptInTransactionMixin)
        _check_versions()

    def init_app(self, app: flask.Flask, *args: Any, **kwargs: Any) -> None:
        """As Flask-SQLAlchemy's; reads the `FICTIVE_*` settings first, so that a bad one leaves the app untouched.

        What `fictive.settings.DatabaseSettings` reads from the environment lies beneath the app's configuration:
        `DATABASE_URL` counts where that names no default database, `DB_POOL_SIZE` and the like where it does not say
        otherwise. Adds the commands `flask fictive ...`.
        """
        settings = Settings.from_mapping(app.config)
        before = {key: app.config[key] for key in ("SQLALCHEMY_DATABASE_URI", "SQLALCHEMY_BINDS") if key in app.config}
        registered = "sqlalchemy" in app.extensions
        if not registered:
            check_urls(app.config, self._engine_options)
            environment = read_environment(app.config, self._engine_options)
            _add_urls(app, environment, self._engine_options)
            app.extensions[ENVIRONMENT] = environment
        try:
            super().init_app(app, *args, **kwargs)
            for engine in self._app_engines[app].values():
                set_patience(engine, settings.patience)
            self._find_replicas(app, settings)
            _tell_of_poolers(self._app_engines[app], settings, app.extensions[ENVIRONMENT])
        except BaseException:
            if not registered:
                self._undo_init_app(app)
                for key in ("SQLALCHEMY_DATABASE_URI", "SQLALCHEMY_BINDS"):
                    app.config.pop(key, None)
                app.config.update(before)
            raise
        settings = dataclasses.replace(settings, report=settings.wants_report(app.debug))
        init_default_handlers(app)
        app.extensions["fictive"] = settings
        self._decorated.watch(app)
        app.cli.add_command(cli.fictive)
        if settings.report:
            from .report import requests

            requests.install(app, settings, self._app_engines[app])
        if settings.report_tags:
            from .report.tags import tag_statements

            for engine in self._app_engines[app].values():
                tag_statements(engine)

    def init_error_handlers(self, app: flask.Flask, *, retry_after: int = 1) -> None:
        """Answer errors of the database by HTTP status codes instead of 500, in JSON or HTML as the client prefers.

        404: `NotFoundError`. 400: `InvalidCursor`, `InvalidFilter`. (These two in every app, without this call.)
        409: a unique key that exists already, with the columns of its constraint; `StaleDataError`. 503 with
        `Retry-After` of `retry_after` seconds: `LockTimeout`, a lock that was not had at once, no connection in the
        pool, a serialization failure or deadlock after its retries.

        Other errors stay as they are. The app's own error handlers come first: those for these errors or for their
        base classes, and those for the status codes. An answer contains no value. Each 503 is a log record with its
        traceback (`fictive.http`).
        """
        init_error_handlers(app, self.metadatas, retry_after=retry_after)

    def _find_replicas(self, app: flask.Flask, settings: Settings) -> None:
        """Pair each primary's engine with those of its replicas, which are made where they are given as URLs."""
        if not settings.replicas:
            return
        from .replica_tokens import Tokens
        from .replica_tokens import install as install_tokens

        engines = self._app_engines[app]
        for key, names in settings.replicas:
            if key not in engines:
                raise ConfigurationError(f"FICTIVE_REPLICAS: there is no bind {key!r}.")
            members = []
            for number, name in enumerate(names, 1):
                bind = name if isinstance(name, str) and name in engines else f"{key or 'default'} replica {number}"
                if bind not in engines:
                    layers = option_layers(app.config, self._engine_options, app.extensions[ENVIRONMENT], key)
                    options = value_options(layer.options for layer in layers)
                    options["url"] = url = _replica_url(name)
                    if (timeout := app.extensions[ENVIRONMENT].timeouts.get(key)) is not None:
                        options["connect_args"] = {"options": timeout_option(timeout, url, os.environ)}
                    engines[bind] = self._make_engine(bind, options, app)
                members.append(engines[bind])
            set_replicas(engines[key], members)
        tokens = Tokens(app, settings, lambda: self._app_engines[app])
        app.extensions["fictive.tokens"] = tokens
        install_tokens(app, tokens, settings)

    def primary(self) -> contextlib.AbstractContextManager[None]:
        """`with db.primary():` or `@db.primary()`: reads go to the primary, and not to a replica."""
        return on_primary()

    def token(self) -> str:
        """A signed text that says how far to see, for a job or another request: `db.using_token(token)`.

        It stands for all that was committed in this request, job or session, so take it after the commit, as in
        `on_commit`. Sends nothing, but for one round trip where something was written outside a transaction. Raises
        `ConfigurationError` where the app has no `FICTIVE_REPLICAS`.
        """
        return self._tokens().make(positions_of(self.session.info))

    def using_token(self, token: str | None) -> contextlib.AbstractContextManager[None]:
        """`with db.using_token(token):` reads see at least what was committed when the token was made.

        A token older than `FICTIVE_REPLICA_TOKEN_AGE`, or None, changes nothing. Raises `InvalidToken` for one that
        this app has not made.
        """
        return self._tokens().using(token)

    def _tokens(self) -> Tokens:
        tokens: Tokens | None = flask.current_app.extensions.get("fictive.tokens")
        if tokens is None:
            raise ConfigurationError("The app has no FICTIVE_REPLICAS, and so no tokens.")
        return tokens

    def _undo_init_app(self, app: flask.Flask) -> None:
        """Leave an app whose engines could not be made as it was, for a second try with another configuration."""
        app.extensions.pop("sqlalchemy", None)
        app.extensions.pop(ENVIRONMENT, None)
        for engine in self._app_engines.pop(app, {}).values():
            engine.dispose()
        registered: list[Any] = [app.teardown_appcontext_funcs, app.shell_context_processors]
        for functions in registered:
            functions[:] = [function for function in functions if not _belongs_to(function, self)]

    @overload
    def transaction(self, function: _Function, /) -> _Function: ...

    @overload
    def transaction(
        self,
        function: None = None,
        /,
        *,
        retries: int | None = None,
        before_retry: BeforeRetry | None = None,
        **options: Unpack[TransactionArguments],
    ) -> TransactionBlock: ...

    def transaction(self, function: Any = None, /, **options: Any) -> Any:
        """`fictive.sqlalchemy.transaction` of the current session: `with db.transaction():`, `@db.transaction`, or
        `@db.transaction(retries=3)`."""
        block = _Block(self._decorated, lambda: self.session, **options)
        return block if function is None else block(function)

    get_transaction = transaction

    def run_transaction(
        self,
        function: Callable[[], _T],
        *,
        retries: int = 3,
        before_retry: BeforeRetry | None = None,
        **options: Unpack[TransactionArguments],
    ) -> _T | None:
        """`fictive.sqlalchemy.run_transaction` in the current session."""
        return run_transaction(self.session, function, retries=retries, before_retry=before_retry, **options)

    def transaction_required(self, function: _Function) -> _Function:
        """Decorator: `function` raises `TransactionRequired` when called in autocommit. Goes below `@app.route`."""
        self._decorated.check(function, "transaction_required")
        return self._decorated.add(transaction_required(self.session)(function), "transaction_required")

    @overload
    def transactional(self, view: _Function, /) -> _Function: ...

    @overload
    def transactional(
        self,
        view: None = None,
        /,
        *,
        retries: int | None = None,
        before_retry: BeforeRetry | None = None,
        **options: Unpack[TransactionArguments],
    ) -> Callable[[_Function], _Function]: ...

    def transactional(self, view: Any = None, /, **options: Any) -> Any:
        """Decorator: the view runs in a `transaction()`. Goes below `@app.route`; above it, the first request raises
        `ConfigurationError`. Takes the options of `transaction()`.

        COMMIT comes before the response leaves, so that a COMMIT that fails is an error response. An exception rolls
        back, and so does a response with one of the status codes in `FICTIVE_ROLLBACK_STATUSES` (400 to 599 by
        default), returned or raised by `abort()`; a redirect is a success, raised or not. What a streamed response
        runs while it is sent comes after the COMMIT, in autocommit.
        """
        block = TransactionBlock(lambda: self.session, called="transactional()", **options)

        def decorate(view: _Function) -> _Function:
            self._decorated.check(view, "transactional")
            return self._decorated.add(around_view(block, view), "transactional")

        return decorate if view is None else decorate(view)

    def on_commit(self, fn: Callable[_Arguments, object], *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        """`fictive.sqlalchemy.on_commit` of the current session."""
        on_commit(self.session, fn, *args, **kwargs)

    def on_rollback(
        self, fn: Callable[_Arguments, object], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> None:
        """`fictive.sqlalchemy.on_rollback` of the current session."""
        on_rollback(self.session, fn, *args, **kwargs)

    def after_commit_of(self, model: type[_T]) -> Callable[[Told[_T]], Told[_T]]:
        """`fictive.sqlalchemy.after_commit_of`: a decorator of `def index(created, changed, deleted): ...`."""
        from .session.model_events import after_commit_of

        return after_commit_of(model)

    def local_settings(self, function: _SettingsFunction) -> _SettingsFunction:
        """Decorator: `function` gives PostgreSQL settings for what runs now: `return {"app.tenant": g.tenant}`.

        They hold for what sessions of this object send, of all bind keys. In a transaction they travel with its
        BEGIN, and end with it; the function is asked once, at its first statement. In autocommit it is asked for each
        statement, the settings travel in the statement's one message, and end with it. No round trip either way, and
        nothing stays on the connection. Streams ask when they begin.

        `function` is called without arguments, or with the engine, and returns a dict: names such as `"app.tenant"`,
        `"search_path"`, `"role"`, `"statement_timeout"`; values as text, integers, UUIDs, True and False as PostgreSQL
        takes them, or None for the setting's default. What it raises comes out where the statement is, and nothing
        was sent. It cannot use the session.

        Raises `ConfigurationError` for a second function, and where statements are run `LocalSettingsError` for a
        setting that cannot be, and for a statement that PostgreSQL refuses in a transaction (VACUUM, CREATE
        DATABASE), `UnsupportedDialect` where there are settings for another database than PostgreSQL. `db.engine` is
        not touched, nor what comes from it.
        """
        self._settings_source.register(function)
        return function

    def context(self, app: flask.Flask) -> contextlib.AbstractContextManager[OptInSession]:
        """`with db.context(app) as session:` for scripts, jobs and commands: an app context with its session.

        At its end what is pending is written and committed, in the transaction that is open or in one of its own; an
        exception rolls back and comes out unchanged; the session is closed. Each context has a session of its own,
        nested ones as well. See `fictive.sqlalchemy.create_db_context`.
        """
        return app_context(app, self.session)

    def pinned(self) -> contextlib.AbstractContextManager[OptInSession]:
        """`OptInSession.pinned` of the current session."""
        return self.session.pinned()

    @also_named(rel_attr="relationship")
    def m2m_add(
        self,
        instance: object,
        relationship: sa_orm.QueryableAttribute[Any],
        *related: Any,
        ignore_conflicts: bool = False,
    ) -> tuple[Any, ...]:
        """`fictive.sqlalchemy.m2m_add` in the current session."""
        from .rows.many_to_many import m2m_add

        return m2m_add(self.session, instance, relationship, *related, ignore_conflicts=ignore_conflicts)

    @also_named(rel_attr="relationship")
    def m2m_remove(
        self, instance: object, relationship: sa_orm.QueryableAttribute[Any], *related: Any
    ) -> tuple[Any, ...]:
        """`fictive.sqlalchemy.m2m_remove` in the current session."""
        from .rows.many_to_many import m2m_remove

        return m2m_remove(self.session, instance, relationship, *related)

    @also_named(rel_attr="relationship")
    def m2m_set(self, instance: object, relationship: sa_orm.QueryableAttribute[Any], *related: Any) -> LinkChanges:
        """`fictive.sqlalchemy.m2m_set` in the current session."""
        from .rows.many_to_many import m2m_set

        return m2m_set(self.session, instance, relationship, *related)

    @also_named(rel_attr="relationship")
    def m2m_clear(self, instance: object, relationship: sa_orm.QueryableAttribute[Any]) -> tuple[Any, ...]:
        """`fictive.sqlalchemy.m2m_clear` in the current session."""
        from .rows.many_to_many import m2m_clear

        return m2m_clear(self.session, instance, relationship)

    def lock_tables(
        self, tables: Iterable[Any], **options: Unpack[LockTablesOptions]
    ) -> contextlib.AbstractContextManager[sa_orm.Session]:
        """`fictive.sqlalchemy.lock_tables` with the current session."""
        from .locks.tables import LockTablesOptions, lock_tables

        refuse_unknown(options, LockTablesOptions.__annotations__, "lock_tables()")
        return lock_tables(self.session, tables, **options)

    def advisory_lock(
        self, key: AdvisoryKey, **options: Unpack[AdvisoryLockOptions]
    ) -> contextlib.AbstractContextManager[sa_orm.Session]:
        """`fictive.sqlalchemy.advisory_lock` with the current session."""
        from .locks.advisory import AdvisoryLockOptions, advisory_lock

        refuse_unknown(options, AdvisoryLockOptions.__annotations__, "advisory_lock()")
        return advisory_lock(self.session, key, **options)

    def claim(self, statement: Rows, limit: int | None = None, **options: Unpack[ClaimOptions]) -> Rows:
        """`fictive.sqlalchemy.claim`, which needs no session."""
        from .locks.rows import ClaimOptions, claim

        refuse_unknown(options, ClaimOptions.__annotations__, "claim()")
        return claim(statement, limit, **options)

    def sandbox(
        self, app: flask.Flask | None = None, *, patience: Duration = "10s"
    ) -> contextlib.AbstractContextManager[Sandbox]:
        """`with db.sandbox():` for tests: what the app does with its databases is rolled back at the end of the block.

        For all bind keys of `app`; of the current app where none is given. See `fictive.testing.sandbox.sandbox`.
        """
        from .testing.sandbox import sandbox

        engines = self.engines if app is None else self._app_engines[app]
        return sandbox(*engines.values(), patience=patience)

    def cleanup_tables(self, *, lock_timeout: Duration | None = "5s") -> None:
        """`fictive.sqlalchemy.cleanup_tables` for the tables of all bind keys, with the current session."""
        from .databases.cleanup import cleanup_tables

        for metadata in self.metadatas.values():
            cleanup_tables(self.session, metadata, lock_timeout=lock_timeout)

    @also_named(pk_value="pk")
    def wait_for_row_change(
        self,
        model: type[_T],
        pk: Any,
        *,
        columns: Iterable[str | sa_orm.QueryableAttribute[Any]] | None = None,
        interval: Duration = 0.5,
        timeout: Duration | None = None,
    ) -> _T:
        """`fictive.sqlalchemy.wait_for_row_change` in the current session."""
        from .changes.row_change import wait_for_row_change

        return wait_for_row_change(self.session, model, pk, columns=columns, interval=interval, timeout=timeout)

    def wait_for_rows(
        self, rows: type[Any] | sa.Select[Any], *, interval: Duration = 5, timeout: Duration | None = None
    ) -> None:
        """`fictive.sqlalchemy.wait_for_rows` in the current session."""
        from .changes.new_rows import wait_for_rows

        wait_for_rows(self.session, rows, interval=interval, timeout=timeout)

    # -- what Flask-SQLAlchemy builds itself of ---------------------------------------------------------------------

    def _make_scoped_session(self, options: dict[str, Any]) -> Any:
        scope = options.pop("scopefunc", flask_sqlalchemy.session._app_ctx_id)
        return OptInScopedSession(self._make_session_factory(options), scope)

    def _make_session_factory(self, options: dict[str, Any]) -> sa_orm.sessionmaker[Any]:
        options["class_"] = _opt_in(options.get("class_", flask_sqlalchemy.session.Session))
        check_options(options)
        # SQLAlchemy's sessionmaker would name its own defaults, and the session could not tell them from the user's
        options.setdefault("autoflush", None)
        options.setdefault("expire_on_commit", None)
        if (given := options.pop("local_settings", None)) is not None:
            self._settings_source.register(given)
        return super()._make_session_factory(options)

    def _apply_driver_defaults(self, options: dict[str, Any], app: flask.Flask) -> None:
        if "module" not in options:
            options["url"] = database_url(options["url"], "The database's URL")
        if "connect_args" in options:  # Flask-SQLAlchemy adds to it, and it may be that of other engines too
            options["connect_args"] = dict(options["connect_args"] or {})
        super()._apply_driver_defaults(options, app)

    def _make_engine(self, bind_key: str | None, options: dict[str, Any], app: flask.Flask) -> sa.Engine:
        url = sa.make_url(options["url"])
        environment = app.extensions.get(ENVIRONMENT, Environment())
        _complete_options(options, app.config, self._engine_options, environment, bind_key, url)
        if url.get_backend_name() == "sqlite":
            from .drivers.sqlite import TakeTurnsPool, is_memory_url

            if is_memory_url(url) and options.get("poolclass") in (None, sa.StaticPool):
                options["poolclass"] = TakeTurnsPool
        elif url.get_backend_name() == "postgresql" and not {"poolclass", "pool"} & options.keys():
            options["poolclass"] = BorrowingPool
        engine = super()._make_engine(bind_key, options, app)
        prepare(engine)
        for take in takers[:]:
            take(engine)
        return engine

    def _teardown_session(self, exc: BaseException | None) -> None:
        try:
            registry = self.session.registry
            if (session := registry.registry.get(registry.scopefunc())) is not None:
                if exc is None:
                    if not session._is_clean():
                        report_unsaved(session)
                else:
                    report_committed(session)
        finally:
            super()._teardown_session(exc)


def _replica_url(name: str | sa.URL) -> sa.URL:
    try:
        return sa.make_url(name)
    except sa.exc.ArgumentError:
        raise ConfigurationError("FICTIVE_REPLICAS: expected bind keys and database URLs.") from None


def _tell_of_poolers(engines: Mapping[str | None, sa.Engine], settings: Settings, environment: Environment) -> None:
    direct = dict(settings.direct_url)
    for key, engine in engines.items():
        pooled = settings.pooler is not None or key in environment.pooled
        if pooled and engine.dialect.name == "postgresql":
            set_pooler(engine, direct_url=direct.get(key))


def _add_urls(app: flask.Flask, environment: Environment, class_options: Mapping[str, Any]) -> None:
    """Let Flask-SQLAlchemy make engines of the databases that only the environment names."""
    for name in ("SQLALCHEMY_BINDS", "SQLALCHEMY_ENGINE_OPTIONS"):
        if name in app.config and not app.config[name]:
            app.config[name] = {}
    uri = app.config.get("SQLALCHEMY_DATABASE_URI")
    if isinstance(uri, str) and not uri.strip():
        app.config["SQLALCHEMY_DATABASE_URI"] = None
    if None in environment.urls:
        app.config["SQLALCHEMY_DATABASE_URI"] = environment.urls[None]
    if more := {key: url for key, url in environment.urls.items() if key is not None}:
        app.config["SQLALCHEMY_BINDS"] = {**(app.config.get("SQLALCHEMY_BINDS") or {}), **more}
    if not (
        app.config.get("SQLALCHEMY_DATABASE_URI")
        or app.config.get("SQLALCHEMY_BINDS")
        or {**class_options, **(app.config.get("SQLALCHEMY_ENGINE_OPTIONS") or {})}.get("url")
    ):
        raise DatabaseNotConfigured(
            "No database is configured. Before init_app() set SQLALCHEMY_DATABASE_URI or SQLALCHEMY_BINDS in "
            "app.config, or DATABASE_URL in the environment (pip install pydantic-settings)."
        )


def _complete_options(
    options: dict[str, Any],
    config: Mapping[str, Any],
    class_options: Mapping[str, Any],
    environment: Environment,
    key: str | None,
    url: sa.URL,
) -> None:
    """Add to an engine's options, as Flask-SQLAlchemy puts them together, those of the environment, and of the default
    engine those about pools, which Flask-SQLAlchemy keeps from the others."""
    layers = option_layers(config, class_options, environment, key)
    given = environment.options.get(key, {})
    plain = options.get("connect_args")
    if len([layer for layer in layers if layer.options.get("connect_args")]) > 1 or given.get("connect_args"):
        merged = merged_connect_args(layer.options for layer in layers)
        options["connect_args"] = {**(plain or {}), **merged}
    if given.get("execution_options"):
        options["execution_options"] = {**given["execution_options"], **options.get("execution_options", {})}
    explicit = {name for layer in layers if layer.origin for name in layer.options}
    implied = {name: options.pop(name) for name in ("echo", "echo_pool") if name in options and name not in explicit}
    for name in add_options(options, given):
        variable = f"{key}_DB_{name}".upper() if key else f"DB_{name}".upper()
        warnings.warn(
            f"{variable} is without effect: the engine has a pool of its own kind, which has no {name}.",
            SettingIgnoredWarning,
            stacklevel=5,
        )
    if key is not None:
        for layer in reversed(shared_layers(config, class_options, environment, url)):
            add_options(options, {name: value for name, value in layer.options.items() if name in POOL_OPTIONS})
    for name, value in implied.items():
        options.setdefault(name, value)


class FilterByOrCreateMixin(MakesModels):
    """Gives every model `find_or_create`, `get_or_create` and `update_or_create`, which use `db.session`.

    Goes before `SQLAlchemy` in the bases, with `OptInTransactionMixin` in any order, or without it. What they do:
    `fictive.sqlalchemy.FindOrCreateDescriptor`. A model or base class that has one of these names keeps its own.
    """

    if TYPE_CHECKING:
        Model: type[_RowsModel]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _check_order(cls, FilterByOrCreateMixin)
        _check_versions()

    def _make_declarative_base(self, *args: Any, **kwargs: Any) -> Any:
        from .rows.descriptors import FindOrCreateDescriptor, GetOrCreateDescriptor, UpdateOrCreateDescriptor

        base = super()._make_declarative_base(*args, **kwargs)
        return _with_methods(
            base,
            self,
            find_or_create=FindOrCreateDescriptor,
            get_or_create=GetOrCreateDescriptor,
            update_or_create=UpdateOrCreateDescriptor,
        )


class BulkMixin(MakesModels):
    """Gives every model `insert_many`, `upsert_many` and `update_many`, which use `db.session`.

    Goes before `SQLAlchemy` in the bases, with the other mixins in any order, or without them. What they do:
    `fictive.sqlalchemy.insert_many` and so on. A model or base class that has one of these names keeps its own.
    """

    if TYPE_CHECKING:
        Model: type[_RowsModel]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _check_order(cls, BulkMixin)
        _check_versions()

    def _make_declarative_base(self, *args: Any, **kwargs: Any) -> Any:
        from .rows.descriptors import InsertManyDescriptor, UpdateManyDescriptor, UpsertManyDescriptor

        base = super()._make_declarative_base(*args, **kwargs)
        return _with_methods(
            base,
            self,
            insert_many=InsertManyDescriptor,
            upsert_many=UpsertManyDescriptor,
            update_many=UpdateManyDescriptor,
        )


def _with_methods(
    base: Any, db: flask_sqlalchemy.SQLAlchemy, **descriptors: Callable[[Callable[[], Any]], Any]
) -> Any:
    """`base` with the descriptors on the session of `db`, but for names that it has already."""
    for name, descriptor in descriptors.items():
        if not hasattr(base, name):
            setattr(base, name, descriptor(lambda: db.session))
    return base


def _check_order(cls: type, mixin: type) -> None:
    order = cls.__mro__
    if _SQLAlchemy in order and order.index(mixin) > order.index(_SQLAlchemy):
        other = next(each for each in cls.__bases__ if _SQLAlchemy in each.__mro__ and each is not mixin)
        raise ConfigurationError(
            f"{mixin.__name__} comes after {other.__name__} in the bases of {cls.__name__}, without effect. "
            f"Write: class {cls.__name__}({mixin.__name__}, {other.__name__})."
        )


def _belongs_to(function: Any, db: object) -> bool:
    return getattr(function, "__self__", None) is db or function is flask_sqlalchemy.cli.add_models_to_shell


def _opt_in(class_: type[Any]) -> type[OptInSession]:
    """`class_` with the opt-in session in front."""
    if not (isinstance(class_, type) and issubclass(class_, sa_orm.Session)):
        raise ConfigurationError(
            f"session_options={{'class_': {class_!r}}}: expected a subclass of flask_sqlalchemy.session.Session."
        )
    if issubclass(class_, _AppSession):
        return class_
    return type(class_.__name__, (_AppSession, class_), {"__module__": class_.__module__})


def _check_versions() -> None:
    for package, needed in _NEEDED.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # vendored, or a package in its place
            continue
        if _numbers(found) < _numbers(needed):
            raise ConfigurationError(
                f"fictive needs {package} {needed} or later and found {found}: pip install '{package}>={needed}'."
            )


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()
