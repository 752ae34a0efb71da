"""L2: the token that says how far to see, in cookies, headers and jobs. Nothing is read from a replica here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flask
import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy.orm import DeclarativeBase

from fictive.connection.replicas import current_positions, positions_of, replicas_of, wants_primary
from fictive.errors import ConfigurationError, InvalidToken
from fictive.session.private import root_engine
from fictive.testing.wire import Wire
from tests.models import DB, Item, opt_in

MakeApp = Callable[..., Flask]
db = opt_in.db


@pytest.fixture
def app(make_app: MakeApp, database_url: str, wire: Wire) -> Flask:
    app = make_app(SECRET_KEY="secret", FICTIVE_REPLICAS=[wire.url(database_url)])
    _views(app)
    return app


def _position() -> int:
    found = current_positions()
    return -1 if found is None else found[db.engine]


def _views(app: Flask) -> None:
    @app.get("/position")
    def position() -> dict[str, Any]:
        found = current_positions()
        assert found is not None
        return {"position": found[db.engine]}

    @app.get("/stream")
    def stream() -> flask.Response:
        if "more" in flask.request.args:
            positions_of(db.session.info).written(db.engine, 0x6000)
        return app.response_class(flask.stream_with_context(str(_position()) for _ in range(1)))

    @app.post("/bare")
    def bare() -> str:
        db.session.execute(sa.insert(Item).values(name="bare"))
        positions = positions_of(db.session.info)
        positions.written(db.engine, None)  # as the session does for a write outside
        return ""

    @app.post("/block")
    def block() -> str:
        positions_of(db.session.info).written(db.engine, 0x5000)
        return ""


def test_l2_a_request_that_wrote_is_remembered_by_its_user(app: Flask) -> None:
    user, other = app.test_client(), app.test_client()
    assert "Set-Cookie" not in user.get("/position").headers
    answer = user.post("/block")
    cookie = answer.headers["Set-Cookie"]
    assert cookie.startswith("fictive_token=")
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    assert "Cookie" in answer.headers["Vary"]
    assert user.get("/position").json == {"position": 0x5000}
    assert "Set-Cookie" not in user.get("/position").headers
    assert other.get("/position").json == {"position": 0}
    assert current_positions() is None


def test_l2_a_streamed_response_sees_what_its_user_wrote(app: Flask) -> None:
    """It is made after the request's end."""
    user = app.test_client()
    assert user.post("/block").status_code == 200
    assert user.get("/stream").text == str(0x5000)
    with user:
        assert user.get("/stream?more=1").text == str(0x6000)
        assert _position() == 0x6000
    assert current_positions() is None
    assert app.test_client().get("/stream").text == "0"


def test_l2_a_write_outside_costs_one_look_per_request(app: Flask, wire: Wire) -> None:
    user = app.test_client()
    with wire.record() as log:
        user.post("/bare")
    assert log.round_trips == 2
    assert "pg_current_wal_insert_lsn" in log.statements[-1]
    position = (user.get("/position").json or {})["position"]
    assert position > 0


def test_l2_a_cookie_that_was_changed_says_nothing(app: Flask) -> None:
    user = app.test_client()
    for value in ("x", "e30.x.y", "", "a" * 3000):
        user.set_cookie("fictive_token", value)
        assert user.get("/position").json == {"position": 0}


def test_l2_in_a_header(make_app: MakeApp, database_url: str) -> None:
    app = make_app(FICTIVE_REPLICAS=database_url, FICTIVE_REPLICA_TOKEN="header")
    _views(app)
    user = app.test_client()
    answer = user.post("/block")
    assert "Set-Cookie" not in answer.headers
    token = answer.headers["Fictive-Token"]
    assert user.get("/position", headers={"Fictive-Token": token}).json == {"position": 0x5000}
    assert user.get("/position").json == {"position": 0}


def test_l2_not_at_all(make_app: MakeApp, database_url: str) -> None:
    app = make_app(FICTIVE_REPLICAS=database_url, FICTIVE_REPLICA_TOKEN=None)
    _views(app)
    answer = app.test_client().post("/block")
    assert not {"Set-Cookie", "Fictive-Token"} & set(dict(answer.headers))


def test_l2_a_job_sees_what_made_it(app: Flask) -> None:
    with app.app_context():
        positions_of(db.session.info).written(db.engine, 0x7000)
        token = db.token()
    with app.app_context():
        assert positions_of(db.session.info)[db.engine] == 0
        with db.using_token(token):
            assert positions_of(db.session.info)[db.engine] == 0x7000
        with db.using_token(None):
            assert positions_of(db.session.info)[db.engine] == 0
        with pytest.raises(InvalidToken), db.using_token(token + "x"):
            raise AssertionError


@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
def test_l2_a_token_of_engines_that_are_views(make_app: MakeApp, database_url: str) -> None:
    """Of `execution_options()`: the position is that of the engine beneath."""

    class Viewing(DB):
        def _make_engine(self, bind_key: str | None, options: dict[str, Any], app: Flask) -> sa.Engine:
            return super()._make_engine(bind_key, options, app).execution_options(stream_results=False)

    class Base(DeclarativeBase):
        pass

    viewing = Viewing(model_class=Base)
    app = make_app(viewing, FICTIVE_REPLICAS=[database_url])
    with app.app_context():
        with viewing.session.begin():
            viewing.session.execute(sa.insert(Item.__table__).values(name="a"))
        token = viewing.token()
    with app.app_context(), viewing.using_token(token):
        positions = positions_of(viewing.session.info)
        assert positions[root_engine(viewing.engine)] > 0


@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
def test_l2_a_token_that_is_too_old_says_nothing(
    make_app: MakeApp, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(FICTIVE_REPLICAS=database_url, FICTIVE_REPLICA_TOKEN_AGE="1min")
    with app.app_context():
        positions_of(db.session.info).written(db.engine, 0x7000)
        token = db.token()
        import itsdangerous.timed

        now = itsdangerous.timed.time.time()
        monkeypatch.setattr(itsdangerous.timed.time, "time", lambda: now + 61)
    with app.app_context():
        with db.using_token(token):
            assert positions_of(db.session.info)[db.engine] == 0


@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
def test_l1_which_engines_are_replicas(make_app: MakeApp, database_url: str) -> None:
    more = {"copy": database_url, "audit": database_url}
    app = make_app(
        SQLALCHEMY_BINDS=more,
        SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 3},
        FICTIVE_REPLICAS={None: ["copy", database_url], "audit": database_url},
    )
    with app.app_context():
        engines = db.engines
        found = replicas_of(engines[None])
        assert found is not None
        assert [each.engine for each in found.members] == [engines["copy"], engines["default replica 2"]]
        assert engines["default replica 2"].pool.size() == 3  # type: ignore[attr-defined]
        audit = replicas_of(engines["audit"])
        assert audit is not None
        assert len(audit.members) == 1
        assert not wants_primary()
        with db.primary():
            assert wants_primary()
        with flask.current_app.test_request_context():
            assert not wants_primary()


def test_l1_rows_are_the_same_whoever_answers(make_app: MakeApp, database_url: str) -> None:
    """A replica that is given by its URL has its primary's options for values."""

    def loads(text: Any) -> Any:
        return ["read by the app", text]

    app = make_app(SQLALCHEMY_ENGINE_OPTIONS={"json_deserializer": loads}, FICTIVE_REPLICAS=[database_url])
    query = sa.select(sa.literal({"a": 1}, sa.JSON))
    with app.app_context():
        found = db.session.scalar(query)
        with db.primary():
            assert found == db.session.scalar(query)
        replicas = replicas_of(db.engine)
        assert replicas is not None
        assert replicas.states()[0].reads == 1
        db.engines["default replica 1"].dispose()


def test_l1_a_statement_timeout_of_the_environment_holds_on_a_replica(
    make_app: MakeApp, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_STATEMENT_TIMEOUT", "7s")
    app = make_app(FICTIVE_REPLICAS=[database_url])
    with app.app_context():
        assert db.session.scalar(sa.text("show statement_timeout")) == "7s"
        replicas = replicas_of(db.engine)
        assert replicas is not None
        assert replicas.states()[0].reads == 1


@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
def test_l1_settings_that_cannot_work(make_app: MakeApp, database_url: str) -> None:
    for wrong in (
        {"FICTIVE_REPLICAS": ["nothing"]},
        {"FICTIVE_REPLICAS": [""]},
        {"FICTIVE_REPLICAS": 3},
        {"FICTIVE_REPLICAS": {"no such bind": [database_url]}},
        {"FICTIVE_REPLICAS": ["sqlite://"]},
        {"FICTIVE_REPLICAS": database_url, "FICTIVE_REPLICA_TOKEN": "x"},
        {"FICTIVE_REPLICAS": database_url, "FICTIVE_REPLICA_TOKEN_AGE": 0},
        {"FICTIVE_REPLICAS": database_url, "FICTIVE_REPLICA_TOKEN_AGE": None},
        {"FICTIVE_REPLICAS": database_url, "FICTIVE_REPLICA_TOKEN_AGE": "500ms"},
    ):
        with pytest.raises(ConfigurationError, match=next(reversed(wrong)) if len(wrong) == 2 else "."):
            make_app(**wrong)
    app = make_app()
    with app.app_context(), pytest.raises(ConfigurationError, match="FICTIVE_REPLICAS"):
        db.token()
