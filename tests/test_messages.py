"""What a mistake is told: at the call, by the names that the caller used, with the remedy."""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Blueprint, Flask
from flask.views import MethodView
from flask_sqlalchemy import SQLAlchemy

from fictive.config import nearest, refuse_unknown
from fictive.errors import ConfigurationError, NotFoundError, TransactionRequired, UnknownOption
from fictive.flask_sqlalchemy import OptInTransactionMixin
from fictive.models import Repository
from fictive.sqlalchemy import (
    OptInSession,
    get_transaction,
    on_commit,
    on_rollback,
    run_transaction,
    sessionmaker,
    transaction,
)
from tests.models import Item, db


class DB(OptInTransactionMixin, SQLAlchemy):
    pass


# Options that do not exist


def nothing() -> None:
    pass


BLOCKS: dict[str, Callable[..., Any]] = {
    "db.transaction": lambda session, **options: db.transaction(**options),
    "db.get_transaction": lambda session, **options: db.get_transaction(**options),
    "db.run_transaction": lambda session, **options: db.run_transaction(nothing, **options),
    "db.session.transaction": lambda session, **options: db.session.transaction(**options),
    "session.transaction": lambda session, **options: db.session().transaction(**options),
    "transaction": lambda session, **options: transaction(session, **options),
    "get_transaction": lambda session, **options: get_transaction(session, **options),
    "run_transaction": lambda session, **options: run_transaction(session, nothing, **options),
    "db.transactional": lambda session, **options: db.transactional(**options),
}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("isolation", "isolation_level"), ("level", "isolation_level"), ("readonly", "read_only"),
        ("lock_timout", "lock_timeout"), ("timeout", "lock_timeout or statement_timeout"), ("save_point", "savepoint"),
        ("deferable", "deferrable"), ("Durable", "durable"), ("nonsense", "it has"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("way", BLOCKS)
def test_an_unknown_option_of_a_block(way: str, given: str, meant: str, session: Any) -> None:
    with pytest.raises(UnknownOption, match=rf"\(\) has no option {given}: .*{meant}") as caught:
        BLOCKS[way](session, **{given: 1})
    assert "block_options" not in str(caught.value)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, ConfigurationError)
    assert not db.session.in_transaction()


@pytest.mark.parametrize("of", [lambda: db.session, lambda: db.session()], ids=["registry", "session"])
def test_options_of_begin(app: Flask, of: Any) -> None:
    with pytest.raises(UnknownOption, match=r"begin\(\) has no options; transaction\(\) has: .*isolation_level=..."):
        of().begin(isolation_level="SERIALIZABLE")
    with pytest.raises(UnknownOption, match=r"begin\(\) has no option nestd: did you mean nested\?"):
        of().begin(nestd=True)
    assert not db.session.in_transaction()


@pytest.mark.parametrize("way", [way for way in BLOCKS if "session.transaction" not in way])
def test_an_unknown_option_that_is_nearly_retries(way: str, session: Any) -> None:
    name = "transactional" if way == "db.transactional" else "run_transaction" if "run" in way else "transaction"
    with pytest.raises(UnknownOption, match=rf"^{name}\(\) has no option retires: did you mean retries\?$"):
        BLOCKS[way](session, retires=3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: db.lock_tables([Item], timout=3), r"^lock_tables\(\) has no option timout: did you mean timeout\?"),
        (lambda: db.lock_tables([Item], no_wait=True), r"^lock_tables\(\) .*did you mean nowait\?"),
        (lambda: db.advisory_lock(1, share=True), r"^advisory_lock\(\) .*did you mean shared\?"),
        (lambda: db.claim(sa.select(Item), skiplocked=True), r"^claim\(\) .*did you mean skip_locked\?"),
        (lambda: db.claim(sa.select(Item), xyz=True), r"it has key_share, nowait, of, skip_locked\."),
    ],
)
def test_an_unknown_option_of_a_lock(call: Callable[[], Any], message: str, app: Flask) -> None:
    with pytest.raises(UnknownOption, match=message):
        call()


@pytest.mark.parametrize("name", ["write_outside", "writes_outsides", "unsaved_change", "retry_read"])
def test_an_unknown_option_of_a_session(name: str, lite: sa.Engine) -> None:
    """At the call that gives it, not where the first session is made."""
    makers: list[Callable[[], Any]] = [
        lambda: OptInSession(lite, **{name: "begin"}),
        lambda: sessionmaker(lite, **{name: "begin"}),
        lambda: DB(session_options={name: "begin"}),
    ]
    for make in makers:
        with pytest.raises(UnknownOption, match=rf"has no option {name}: did you mean {name[:5]}"):
            make()


@pytest.mark.parametrize("value", [False, True])
def test_the_option_autocommit(value: bool, lite: sa.Engine) -> None:
    makers: list[Callable[[], Any]] = [
        lambda: OptInSession(lite, autocommit=value),
        lambda: sessionmaker(lite, autocommit=value),
        lambda: DB(session_options={"autocommit": value}),
    ]
    for make in makers:
        with pytest.raises(ConfigurationError, match=rf"autocommit={value} .*Leave it out.*FICTIVE_WRITES_OUTSIDE"):
            make()


def test_finding_what_was_meant() -> None:
    known = ["lock_timeout", "statement_timeout", "durable"]
    assert nearest("lock_timeou", known) == ["lock_timeout"]
    assert nearest("timeout", known) == ["lock_timeout", "statement_timeout"]
    assert nearest("xyz", known) == []
    refuse_unknown([], known, "f()")
    refuse_unknown(["durable"], known, "f()")


# Arguments of hooks


def test_arguments_of_a_hook(session: Any) -> None:
    seen: list[Any] = []
    register = on_commit
    register(session, seen.append, 0)
    with transaction(session):
        register(session, seen.append, 1)
        register(session, lambda *args, **kwargs: seen.append((args, kwargs)), 2, three=3)
        register(session, functools.partial(seen.append, 4))
        register(session, lambda: seen.append(5))
        register(session, lambda x=6: seen.append(x))
        assert seen == [0]
    assert seen == [0, 1, ((2,), {"three": 3}), 4, 5, 6]
    with contextlib.suppress(ZeroDivisionError), transaction(session):
        on_rollback(session, seen.append, 7)
        raise ZeroDivisionError
    assert seen[-1] == 7


def test_the_databases_hooks_take_arguments(app: Flask) -> None:
    seen: list[Any] = []
    db.on_commit(seen.append, 1)
    with db.session.begin():
        db.on_commit(seen.append, 2)
        db.on_rollback(seen.append, 3)
    assert seen == [1, 2]


@pytest.mark.parametrize(
    ("fn", "args", "kwargs"),
    [
        (lambda x: None, (), {}), (lambda: None, (1,), {}), (lambda *, x: None, (), {}),
        (lambda x: None, (), {"y": 1}),
        (lambda x, y=1: None, (), {}), (Flask, (), {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [on_commit, on_rollback])
def test_a_hook_that_could_not_be_called(kind: Any, fn: Any, args: Any, kwargs: Any, session: Any) -> None:
    with transaction(session):
        with pytest.raises(TypeError, match=rf"{kind.__name__}\(\): .*cannot be called like that.*lambda") as caught:
            kind(session, fn, *args, **kwargs)
    assert "given" not in str(caught.value)  # Python's count would include what is not the caller's


def test_a_built_in_function_is_taken_as_it_is(session: Any, capsys: pytest.CaptureFixture[str]) -> None:
    on_commit(session, print, 1)
    assert capsys.readouterr().out == "1\n"


# A decorator above the route


def served(make_views: Callable[[Any, Any], Any], tmp_path: Path, first: str = "init") -> tuple[Any, Flask]:
    """An app with these views, whose `db` is told of it before they are made or afterwards."""
    made, app = DB(), Flask(__name__, instance_path=str(tmp_path))
    app.config.update(SQLALCHEMY_DATABASE_URI="sqlite:///x.db", TESTING=True)
    if first == "init":
        made.init_app(app)
    make_views(made, app)
    if first == "views":
        made.init_app(app)
    return made, app


def other(function: Any) -> Any:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return run


DECORATORS: dict[str, Callable[[Any], Any]] = {
    "transactional": lambda made: made.transactional,
    "transactional(...)": lambda made: made.transactional(retries=1),
    "transaction": lambda made: made.transaction,
    "transaction(...)": lambda made: made.transaction(retries=1),
    "transaction_required": lambda made: made.transaction_required,
}


def above(made: Any, app: Any, decorator: Callable[[Any], Any]) -> None:
    @decorator(made)
    @app.get("/")
    def the_view() -> str:
        return "ok"


def above_with_another_between(made: Any, app: Any, decorator: Callable[[Any], Any]) -> None:
    @decorator(made)
    @other
    @app.get("/")
    def the_view() -> str:
        return "ok"


def above_one_that_is_decorated(made: Any, app: Any, decorator: Callable[[Any], Any]) -> None:
    @decorator(made)
    @app.get("/")
    @other
    def the_view() -> str:
        return "ok"


def above_a_blueprints(made: Any, app: Any, decorator: Callable[[Any], Any]) -> None:
    blueprint = Blueprint("pages", __name__)
    above(made, blueprint, decorator)
    app.register_blueprint(blueprint)


@pytest.mark.parametrize("first", ["init", "views"])
@pytest.mark.parametrize("decorator", DECORATORS)
@pytest.mark.parametrize("wrong", [above, above_with_another_between, above_one_that_is_decorated, above_a_blueprints])
def test_b7_above_the_route(wrong: Any, decorator: str, first: str, tmp_path: Path) -> None:
    made, app = served(lambda made, app: wrong(made, app, DECORATORS[decorator]), tmp_path, first)
    name = decorator.partition("(")[0]
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=rf"@db.{name} stands above the route of .*the_view\(\).*below"):
            app.test_client().get("/nowhere")
    app.config.update(TESTING=False, PROPAGATE_EXCEPTIONS=False)
    assert app.test_client().get("/").status_code == 500
    with app.app_context():
        made.engine.dispose()


def below(made: Any, app: Any) -> None:
    @app.get("/")
    @other
    @made.transactional
    @other
    def the_view() -> str:
        return str(made.session.in_transaction())


def below_in_a_class(made: Any, app: Any) -> None:
    class View(MethodView):
        decorators = [made.transactional]

        def get(self) -> str:
            return str(made.session.in_transaction())

    app.add_url_rule("/", view_func=View.as_view("view"))


def below_and_served_without_too(made: Any, app: Any) -> None:
    def the_view() -> str:
        return str(made.session.in_transaction())

    app.add_url_rule("/", view_func=made.transactional(the_view))
    app.add_url_rule("/without", "without", view_func=the_view)


def module_level_view() -> str:
    return "True"


def used_elsewhere(made: Any, app: Any) -> None:
    app.add_url_rule("/", view_func=module_level_view)
    app.extensions["kept"] = made.transactional(module_level_view)


@pytest.mark.parametrize("first", ["init", "views"])
@pytest.mark.parametrize("right", [below, below_in_a_class, below_and_served_without_too, used_elsewhere])
def test_b7_below_the_route(right: Any, first: str, tmp_path: Path) -> None:
    made, app = served(right, tmp_path, first)
    for _ in range(2):
        response = app.test_client().get("/")
        assert (response.status_code, response.text) == (200, "True")
    with app.app_context():
        made.engine.dispose()


def test_b7_transaction_required_below_the_route(tmp_path: Path) -> None:
    def views(made: Any, app: Any) -> None:
        @app.get("/")
        @made.transaction_required
        def view() -> str:
            return "ok"

    made, app = served(views, tmp_path)
    with pytest.raises(TransactionRequired):
        app.test_client().get("/")
    with app.app_context():
        made.engine.dispose()


def test_b7_nothing_is_called_after_the_first_request(tmp_path: Path) -> None:
    import flask

    made, app = served(below, tmp_path)
    assert flask.request_started.has_receivers_for(app)
    app.test_client().get("/")
    assert not list(flask.request_started.receivers_for(app))
    with app.app_context():
        made.engine.dispose()


def test_b7_above_a_command(tmp_path: Path) -> None:
    made, app = served(lambda made, app: None, tmp_path)
    for name in DECORATORS:
        with pytest.raises(TypeError, match=r"@db\.\w+ decorates a function; put it below @app.cli.command\(\)"):
            DECORATORS[name](made)(app.cli.command("x")(nothing))


# Writes that met nothing


@pytest.mark.parametrize(
    "write",
    [
        lambda: Repository[Item](db.session).update(99999, note="x"),
        lambda: Repository[Item](db.session).delete(99999),
        lambda: db.session.execute(sa.delete(Item)),
        lambda: db.session.execute(sa.update(Item).values(note="x").returning(Item.id)).all(),
        lambda: Item.query.delete(),
    ],
)
def test_a_write_that_met_no_row_is_not_called_committed(write: Callable[[], Any], make_app: Any) -> None:
    app = make_app()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with contextlib.suppress(NotFoundError, ZeroDivisionError), app.app_context():
            write()
            raise ZeroDivisionError
        with app.app_context():
            with contextlib.suppress(NotFoundError):
                write()
            db.session.rollback()


def test_a_write_that_met_a_row_still_is(app: Flask) -> None:
    db.session.add(Item(name="a"))
    db.session.commit()
    Repository[Item](db.session).update(db.session.scalars(sa.select(Item.id)).one(), note="x")
    with pytest.warns(UserWarning, match=re.escape("rollback() outside a transaction cannot undo")):
        db.session.rollback()


def test_plain_sessions_take_their_own_options(lite: sa.Engine) -> None:
    assert sa_orm.sessionmaker(lite, autocommit=False)().in_transaction() is False  # type: ignore[arg-type, call-overload]
