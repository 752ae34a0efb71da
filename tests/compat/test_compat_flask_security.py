"""Flask-Security's `SQLAlchemyUserDatastore`: its quick start, and what an error in between leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask, render_template_string
from flask_security import Security, SQLAlchemyUserDatastore, auth_required, hash_password, roles_required
from flask_security.models import fsqla_v3 as fsqla

from tests.compat.ways import Way

AppOf = Callable[..., Flask]
Look = Callable[..., list[Any]]

# Flask-Principal 0.4, which Flask-Security needs, and Flask-Login 0.6 are older than Python 3.11 and Flask 3.1
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:flask_(principal|login)")


@dataclasses.dataclass
class Site:
    db: Any
    app: Flask
    store: SQLAlchemyUserDatastore


@pytest.fixture
def site(way: Way, app_of: AppOf) -> Site:
    """https://flask-security.readthedocs.io/en/stable/quickstart.html#basic-flask-sqlalchemy-application"""
    app = app_of(
        None,
        SECURITY_PASSWORD_SALT="146585145368132386173505678016728509634",
        SECURITY_PASSWORD_HASH="pbkdf2_sha512",  # the default needs one more package
        SECURITY_TRACKABLE=True,
        WTF_CSRF_ENABLED=False,
        REMEMBER_COOKIE_SAMESITE="strict",
        SESSION_COOKIE_SAMESITE="strict",
    )
    db = way.db_class()
    fsqla.FsModels.set_db_info(db)

    class Role(db.Model, fsqla.FsRoleMixin):  # type: ignore[name-defined, misc]
        pass

    class User(db.Model, fsqla.FsUserMixin):  # type: ignore[name-defined, misc]
        pass

    db.init_app(app)
    user_datastore = SQLAlchemyUserDatastore(db, User, Role)
    app.security = Security(app, user_datastore)  # type: ignore[attr-defined]

    @app.route("/")
    @auth_required()
    def home() -> str:
        return render_template_string("Hello {{ current_user.email }}")

    @app.route("/admin")
    @roles_required("admin")
    def admin() -> str:
        return "admins only"

    with app.app_context():
        db.create_all()
        if not app.security.datastore.find_user(email="test@me.com"):  # type: ignore[attr-defined]
            app.security.datastore.create_user(  # type: ignore[attr-defined]
                email="test@me.com", password=hash_password("password")
            )
        db.session.commit()
    return Site(db, app, user_datastore)


def test_quick_start_login(site: Site, look: Look) -> None:
    client = site.app.test_client()
    assert client.get("/").status_code == 302
    page = client.post("/login", data={"email": "test@me.com", "password": "wrong password"})
    assert "Invalid password" in page.text or "not valid" in page.text or "failed" in page.text
    response = client.post("/login", data={"email": "test@me.com", "password": "password"})
    assert response.status_code == 302
    assert client.get("/").text == "Hello test@me.com"
    assert look('select login_count from "user"') == [1]  # committed after the request, by the datastore
    client.post("/logout")
    assert client.get("/").status_code == 302


def test_roles(site: Site, look: Look) -> None:
    client = site.app.test_client()
    client.post("/login", data={"email": "test@me.com", "password": "password"})
    assert client.get("/admin").status_code in (302, 403)
    with site.app.app_context():
        role = site.store.create_role(name="admin", permissions={"read", "write"})
        user = site.store.find_user(email="test@me.com")
        assert site.store.add_role_to_user(user, role) is True
        assert site.store.add_role_to_user(user, role) is False
        site.store.commit()
    assert look("select r.name from role r join roles_users on role_id = r.id") == ["admin"]
    assert client.get("/admin").text == "admins only"
    with site.app.app_context():
        assert site.store.find_or_create_role("admin").name == "admin"
        assert site.store.remove_role_from_user(site.store.find_user(email="test@me.com"), "admin") is True
        site.store.commit()
    assert client.get("/admin").status_code in (302, 403)


def test_an_error_before_commit_leaves_nothing(way: Way, site: Site, look: Look) -> None:
    with pytest.raises(ZeroDivisionError), site.app.app_context():
        role = site.store.create_role(name="admin")
        user = site.store.create_user(email="new@me.com", password=hash_password("password"), roles=[role])
        site.store.deactivate_user(user)
        raise ZeroDivisionError
    assert look('select email from "user"') == ["test@me.com"]
    assert look("select count(*) from role") == [0]


def test_a_duplicate_leaves_nothing(site: Site, look: Look) -> None:
    with site.app.app_context():
        role = site.store.create_role(name="admin")
        site.store.create_user(email="test@me.com", password=hash_password("password"), roles=[role])
        with pytest.raises(sa.exc.IntegrityError):
            site.store.commit()
        site.db.session.rollback()
        assert site.store.find_role("admin") is None
        site.store.create_role(name="editor")
        site.store.commit()
    assert look("select name from role") == ["editor"]
    assert look('select count(*) from "user"') == [1]


def test_delete_and_deactivate(site: Site, look: Look) -> None:
    client = site.app.test_client()
    with site.app.app_context():
        user = site.store.find_user(email="test@me.com")
        assert site.store.deactivate_user(user) is True
        site.store.commit()
    client.post("/login", data={"email": "test@me.com", "password": "password"})
    assert client.get("/").status_code == 302
    with site.app.app_context():
        site.store.delete_user(site.store.find_user(email="test@me.com"))
        site.store.commit()
    assert look('select count(*) from "user"') == [0]
