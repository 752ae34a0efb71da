"""Contract B7 and B8: transactions of views, and sessions for scripts, jobs and other frameworks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import flask
import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask

from fictive.errors import (
    AlreadyCommittedWarning,
    ConfigurationError,
    TransactionAborted,
    TransactionAlreadyBegun,
    TransactionRequired,
)
from fictive.sqlalchemy import (
    OptInScopedSession,
    create_db_context,
    create_db_dependency,
    sessionmaker,
    transaction_required,
)
from fictive.testing.wire import Wire
from tests.conftest import MakeApp
from tests.models import Booking, Item, db

Look = Callable[..., list[Any]]


def test_b7_transaction_required(app: Flask, wire: Wire) -> None:
    @db.transaction_required
    def pay(amount: int) -> int:
        """Pays."""
        return amount

    @transaction_required(db.session)
    def pay_too() -> None: ...

    assert pay.__doc__ == "Pays."
    for call in (lambda: pay(1), pay_too):
        with wire.record() as log, pytest.raises(TransactionRequired, match=r"pay.*in a transaction"):
            call()
        assert not log.exchanges
        with db.session.begin():
            call()
    with db.session.begin():
        assert pay(1) == 1


class TestViews:
    def test_b7_the_outcome_decides(self, make_app: MakeApp, look: Look) -> None:
        app = make_app()
        client = app.test_client()

        @app.route("/<how>")
        @db.transactional
        def view(how: str) -> Any:
            assert db.session.in_transaction()
            db.session.add(Item(name=how))
            db.on_commit(lambda: committed.append(how))
            if how == "abort":
                flask.abort(404)
            if how == "redirect raised":
                flask.abort(flask.redirect("/elsewhere"))
            if how == "error":
                raise ValueError
            if how == "ended":
                db.session.commit()
            answers = {"redirect": flask.redirect("/elsewhere"), "bad": ("no", 400), "down": ("no", 503)}
            return answers.get(how, {"ok": True})

        statuses = {}
        committed: list[str] = []
        for how in ("fine", "redirect", "redirect raised", "bad", "down", "abort", "error", "ended"):
            statuses[how] = client.get(f"/{how}").status_code
        assert statuses == {
            "fine": 200, "redirect": 302, "redirect raised": 302, "bad": 400, "down": 503, "abort": 404, "error": 500,
            "ended": 200,
        }  # fmt: skip
        assert committed == ["fine", "redirect", "redirect raised", "ended"]
        assert look("select name from item order by id") == committed

    def test_b7_commit_comes_before_the_response(self, make_app: MakeApp, look: Look) -> None:
        app = make_app()

        @app.route("/")
        @db.transactional(isolation_level="SERIALIZABLE", lock_timeout="1s")
        def view() -> Any:
            db.session.add_all([Booking(seat=1), Booking(seat=flask.request.args.get("seat", type=int))])
            return flask.stream_with_context(body())  # type: ignore[arg-type]

        def body() -> Iterator[str]:
            assert not db.session.in_transaction()
            yield str(db.session.scalar(sa.select(sa.func.count()).select_from(Booking)))

        assert app.test_client().get("/?seat=1").status_code == 500
        assert look("select count(*) from booking") == [0]
        with app.test_client().get("/?seat=2") as response:
            assert response.text == "2"

    def test_b7_which_statuses_roll_back_is_a_setting(self, make_app: MakeApp, look: Look) -> None:
        app = make_app(FICTIVE_ROLLBACK_STATUSES=[409])

        @app.route("/<int:status>")
        @db.transactional
        def view(status: int) -> Any:
            db.session.add(Item(name=str(status)))
            return "", status

        for status in (200, 404, 409, 500):
            assert app.test_client().get(f"/{status}").status_code == status
        assert look("select name from item order by id") == ["200", "404", "500"]
        for wrong in (409, "409", "", b"", {}, {409: 1}, [99], [True], [600], ["409"], [None], [[409]]):
            with pytest.raises(ConfigurationError, match="FICTIVE_ROLLBACK_STATUSES"):
                make_app(FICTIVE_ROLLBACK_STATUSES=wrong)

    def test_b7_retries(self, make_app: MakeApp, look: Look) -> None:
        app = make_app()
        tries: list[int] = []
        look("insert into item (name, note) values ('a', '0')")

        @app.route("/", methods=["POST"])
        @db.transactional(retries=1, isolation_level="REPEATABLE READ")
        def view() -> Any:
            tries.append(1)
            item = db.session.get(Item, 1)
            assert item is not None
            item.note = f"{item.note}, {flask.request.get_data(as_text=True)}"
            if len(tries) == 1:
                look("update item set note = '1'")
            return "", 204

        assert app.test_client().post("/", data="posted").status_code == 204
        assert look("select note from item") == ["1, posted"]
        assert len(tries) == 2


class TestContexts:
    @pytest.fixture(params=["opt-in", "plain", "scoped", "opt-in scoped"])
    def factory(self, request: pytest.FixtureRequest, app: Flask) -> Iterator[Any]:
        makers = {
            "opt-in": lambda: sessionmaker(db.engine),
            "plain": lambda: sa_orm.sessionmaker(db.engine),
            "scoped": lambda: sa_orm.scoped_session(sa_orm.sessionmaker(db.engine)),
            "opt-in scoped": lambda: OptInScopedSession(sessionmaker(db.engine)),
        }
        factory = makers[request.param]()
        yield factory
        if isinstance(factory, sa_orm.scoped_session):
            assert not factory.registry.has()

    def test_b8_a_context(self, factory: Any, look: Look) -> None:
        db_context = create_db_context(factory)
        for _ in range(2):
            with db_context() as session:
                look("delete from item")
                session.begin()
                session.add(Item(name="a"))
            assert look("select name from item") == ["a"]
            assert not session.in_transaction()
            assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        with pytest.raises(KeyboardInterrupt), db_context() as session:
            session.begin()
            session.add(Item(name="b"))
            session.flush()
            raise KeyboardInterrupt
        with pytest.raises(sa.exc.IntegrityError), db_context() as session:
            session.begin()
            session.add_all([Booking(seat=1), Booking(seat=1)])
        with pytest.raises(TransactionAborted), db_context() as session:
            session.begin()
            with contextlib.suppress(sa.exc.DBAPIError):
                session.execute(sa.text("select 1 / 0"))
        with db_context() as session:
            assert session.scalar(sa.text("select 1")) == 1
            session.close()
        assert look("select name from item") == ["a"]
        if isinstance(factory, sa_orm.scoped_session):
            with db_context(), pytest.raises(TransactionAlreadyBegun, match="sessionmaker"), db_context():
                pass
        else:
            with db_context() as outer, db_context() as inner:
                assert outer is not inner

    def test_b8_a_dependency_of_another_framework(self, factory: Any, look: Look) -> None:
        """As FastAPI drives it: `next()`, then `next()` or `throw()`, maybe in another thread."""
        get_db = create_db_dependency(factory)

        steps = get_db()
        session = next(steps)
        session.begin()
        session.add(Item(name="a"))
        thread = threading.Thread(target=lambda: next(steps, None))
        thread.start()
        thread.join(30)
        assert look("select name from item") == ["a"]
        steps = get_db()
        session = next(steps)
        session.begin()
        session.add(Item(name="b"))
        with pytest.raises(ValueError, match="of the endpoint"):
            steps.throw(ValueError("of the endpoint"))  # type: ignore[attr-defined]
        assert look("select name from item") == ["a"]
        assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        if isinstance(factory, sa_orm.scoped_session):
            factory.remove()

    def test_b8_what_is_only_added_is_written(self, factory: Any, look: Look) -> None:
        db_context, get_db = create_db_context(factory), create_db_dependency(factory)
        with db_context() as session:
            session.add_all([Item(name="a"), Item(name="b")])
        for session in get_db():
            session.add(Item(name="c"))
        with db_context() as session:
            session.get(Item, 1).note = "changed"
            session.delete(session.get(Item, 2))
        assert look("select name, note from item order by id") == [("a", "changed"), ("c", None)]
        with pytest.raises(sa.exc.IntegrityError), db_context() as session:
            session.add_all([Booking(seat=1), Booking(seat=1)])
        assert look("select * from booking") == []
        assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]

    @pytest.mark.parametrize("kind", ["commit", "begin", "refuse", "plain"])
    def test_b8_after_an_error_what_stays_is_named(self, kind: str, app: Flask, look: Look) -> None:
        factory: Any = (
            sa_orm.sessionmaker(db.engine) if kind == "plain" else sessionmaker(db.engine, writes_outside=kind)
        )
        if kind == "refuse":
            with pytest.raises(TransactionRequired, match="INSERT of 1 Item"), create_db_context(factory)() as session:
                session.add(Item(name="a"))
            return
        stays = kind == "commit"
        warns = pytest.warns(AlreadyCommittedWarning, match="INSERT of 1 Item")
        with (
            warns if stays else contextlib.nullcontext(),
            pytest.raises(ZeroDivisionError),
            create_db_context(factory)() as session,
        ):
            session.add(Item(name="flushed"))
            session.flush()
            session.add(Item(name="pending"))
            raise ZeroDivisionError
        assert look("select name from item") == (["flushed"] if stays else [])

    def test_b8_a_warning_that_is_an_error_does_not_hide_the_users(
        self, app: Flask, caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(ZeroDivisionError), create_db_context(sessionmaker(db.engine))() as session:
            session.add(Item(name="flushed"))
            session.flush()
            raise ZeroDivisionError
        assert "INSERT of 1 Item" in caplog.text

    def test_b8_bad_input(self, app: Flask) -> None:
        with pytest.raises(TypeError, match="session_factory"):
            create_db_context(None)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"db\.session"), create_db_context(lambda: "session")():
            pass

    def test_b8_with_an_app_context(self, make_app: MakeApp, look: Look) -> None:
        app = make_app()
        with db.context(app) as session:
            assert flask.current_app == app
            assert session is db.session()
            session.begin()
            session.add(Item(name="a"))
            with db.context(app) as inner:
                assert inner is not session
                assert not inner.in_transaction()
        assert not flask.has_app_context()
        assert look("select name from item") == ["a"]
        with pytest.raises(ZeroDivisionError), db.context(app) as session:
            session.begin()
            session.execute(sa.insert(Item).values(name="b"))
            raise ZeroDivisionError
        with db.context(app) as session:
            session.add(Item(name="c"))
        assert look("select name from item") == ["a", "c"]
        warns = pytest.warns(AlreadyCommittedWarning, match="INSERT of 1 Item")
        with warns, pytest.raises(ZeroDivisionError), db.context(app) as session:
            session.add(Item(name="flushed"))
            session.flush()
            session.add(Item(name="pending"))
            raise ZeroDivisionError
        assert look("select name from item") == ["a", "c", "flushed"]
