"""The box office with a PostgreSQL of its own and a concert with three seats."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import sqlalchemy as sa
from werkzeug.serving import make_server

from examples.objects import options
from fictive.testing import postgres

from .app import add_concert, create_app
from .models import db


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./run tickets", description=__doc__)
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one; default: %(default)s")
    parser.add_argument("--driver", choices=("psycopg2", "psycopg"), default="psycopg2", help="default: %(default)s")
    given = parser.parse_args(arguments)
    return options.run(lambda: _serve(given.port, given.driver), given.driver)


def _serve(port: int, driver: str) -> int:
    name = f"tickets_{os.getpid()}"
    with postgres.server() as pg:
        url = pg.url(name, driver=driver)
        maintenance = sa.create_engine(pg.url(driver=driver), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with maintenance.connect() as connection:
            connection.execute(sa.text(f"create database {name}"))
        app = create_app(url)
        try:
            with app.app_context():
                db.create_all()
                add_concert("Winterreise", seats=3)
            try:
                server = make_server("127.0.0.1", port, app, threaded=True)
            except OSError as error:
                print(f"error: port {port}: {error.strerror}", file=sys.stderr)
                return 1
            print(f"in a browser: http://127.0.0.1:{server.port}/", flush=True)
            print("the worker that prints the tickets, in another terminal:", flush=True)
            print(f"DATABASE_URL={url} {sys.executable} -m flask --app examples.tickets.app tickets work", flush=True)
            server.serve_forever()
        finally:
            with app.app_context():
                db.engine.dispose()
            with maintenance.connect() as connection:
                connection.execute(sa.text(f"drop database {name} with (force)"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
