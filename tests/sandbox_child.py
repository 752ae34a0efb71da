"""Child processes of `tests/test_h_processes.py`, which join the sandbox whose token they are given."""

from __future__ import annotations

import io
import os
import sys
import threading
import traceback
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask, redirect, request
from werkzeug.serving import make_server

from fictive import errors
from fictive.testing.join import SandboxMiddleware, join
from fictive.testing.sandbox import sandbox
from tests import test_h_sandbox as ways
from tests.models import opt_in

db = opt_in.db
Item = opt_in.Item


def all_ways() -> None:
    """What an app does, each way as in `test_h_sandbox`."""
    failed = []
    for way in [*ways.WAYS, values, raw_copies]:
        try:
            way()
            db.session.commit()
            assert ways.names() == ["x"], ways.names()
        except BaseException:
            failed.append(f"{way.__name__}: {traceback.format_exc()}")
        db.session.rollback()
        with db.session.begin():
            db.session.execute(sa.delete(Item))
            db.session.execute(sa.delete(opt_in.Tag))
    if failed:
        sys.exit("\n".join(failed))


def values() -> None:
    """Those that drivers wrap in objects of their own."""
    given = [b"\0bytes", {"a": [1, None]}, ["x", "y"]]
    kinds = [sa.LargeBinary(), sa.JSON(), sa.ARRAY(sa.Text())]
    row = db.session.execute(sa.select(*[sa.literal(value, kind) for value, kind in zip(given, kinds, strict=True)]))
    assert list(row.one()) == given
    ways.block()


def raw_copies() -> None:
    """COPY by the driver's own methods, and what a failure of the reader leaves."""
    raw = db.engine.raw_connection()
    cursor: Any = raw.cursor()
    if db.engine.dialect.driver == "psycopg":
        with cursor.copy("COPY item (name) FROM STDIN") as copy:
            copy.write_row(["x"])
        with cursor.copy("COPY item (name) TO STDOUT") as copy:
            assert b"".join(bytes(block) for block in copy) == b"x\n"
        with pytest.raises(ZeroDivisionError), cursor.copy("COPY item (name) FROM STDIN") as copy:
            raise ZeroDivisionError
        raw.rollback()
        cursor.execute("INSERT INTO item (name) VALUES ('x')")
    else:
        cursor.copy_from(io.StringIO("x\n"), "item", columns=["name"])
        for file in (io.StringIO(), io.BytesIO()):
            cursor.copy_expert("COPY item (name) TO STDOUT", file)
            assert file.getvalue() in ("x\n", b"x\n")
        cursor.copy_to(text := io.StringIO(), "item", columns=["name"])
        assert text.getvalue() == "x\n"
        raw.commit()
        with pytest.raises(ZeroDivisionError):
            cursor.copy_expert("COPY item (name) FROM STDIN", _Broken())
        with pytest.raises(db.engine.dialect.loaded_dbapi.Error):
            cursor.execute("SELECT 1")
        raw.rollback()
    raw.commit()
    raw.close()


class _Broken:
    def read(self, size: int) -> str:
        raise ZeroDivisionError


def add() -> None:
    assert ways.names() == ["of the test"]
    with db.session.begin():
        db.session.add(Item(name="of the child"))
    with pytest.raises(sa.exc.IntegrityError) as caught:
        db.session.execute(sa.insert(Item).values(name="of the child"))
    assert caught.value.orig.diag.constraint_name == "item_name_key"  # type: ignore[union-attr]
    with pytest.raises(errors.ConfigurationError), sandbox(db.engine):
        pass


def serve() -> None:
    """Until the parent closes its end of the pipe."""
    app = make_app()

    @app.get("/")
    def index() -> str:
        return "<form method=post action=/items><input name=name><button>Add</button></form>" + ", ".join(ways.names())

    @app.post("/items")
    def post() -> Any:
        with db.session.begin():
            db.session.add(Item(name=request.form["name"]))
        return redirect("/")

    app.wsgi_app = SandboxMiddleware(app.wsgi_app, app)  # type: ignore[method-assign]
    server = make_server("127.0.0.1", 0, app, threaded=True)
    print(server.port, flush=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    sys.stdin.read()
    server.shutdown()
    thread.join()
    server.server_close()


def make_app() -> Flask:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["URL"]
    db.init_app(app)
    return app


def main(name: str) -> None:
    if name == "serve":
        serve()
        return
    with make_app().app_context():
        with join(os.environ["SANDBOX"], *db.engines.values()):
            globals()[name]()
        for engine in db.engines.values():
            engine.dispose()


if __name__ == "__main__":
    main(*sys.argv[1:])
