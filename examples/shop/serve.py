"""The shop with a PostgreSQL of its own, its tables, and a few products in it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import flask_migrate
import sqlalchemy as sa
from werkzeug.serving import make_server

from examples.objects import options
from fictive.testing import postgres

from .app import create_app
from .database import db
from .importing import import_products
from .models import Stock

PRODUCTS = """\
sku,name,price_cents
a-1,Anchor,5000
b-1,Bell,900
c-1,Compass,2500
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./run shop", description=__doc__)
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one; default: %(default)s")
    parser.add_argument("--driver", choices=("psycopg2", "psycopg"), default="psycopg2", help="default: %(default)s")
    given = parser.parse_args(arguments)
    return options.run(lambda: _serve(given.port, given.driver), given.driver)


def _serve(port: int, driver: str) -> int:
    name = f"shop_{os.getpid()}"
    with postgres.server() as pg:
        maintenance = sa.create_engine(pg.url(driver=driver), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with maintenance.connect() as connection:
            connection.execute(sa.text(f"create database {name}"))
        app = create_app(SQLALCHEMY_DATABASE_URI=pg.url(name, driver=driver), DEBUG=True)
        try:
            with db.context(app):
                flask_migrate.upgrade()
                import_products(PRODUCTS.splitlines())
                db.session.execute(sa.update(Stock).values(on_hand=10))
            try:
                server = make_server("127.0.0.1", port, app, threaded=True)
            except OSError as error:
                print(f"error: port {port}: {error.strerror}", file=sys.stderr)
                return 1
            print(f"curl http://127.0.0.1:{server.port}/products", flush=True)
            print(f"in a browser: http://127.0.0.1:{server.port}/pages/", flush=True)
            print(f"what each request did: http://127.0.0.1:{server.port}/_fictive/", flush=True)
            worker = f"{sys.executable} -m flask --app examples.shop.app shop work"
            print(f"DATABASE_URL={pg.url(name, driver=driver)} {worker}", flush=True)
            server.serve_forever()
        finally:
            with app.app_context():
                db.engine.dispose()
            with maintenance.connect() as connection:
                connection.execute(sa.text(f"drop database {name} with (force)"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
