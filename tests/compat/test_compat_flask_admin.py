"""Flask-Admin's `ModelView` through the test client: list, create, edit, delete, a bulk action."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flask_admin
import pytest
import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient
from flask_admin.actions import action
from flask_admin.contrib.sqla import ModelView

from tests.compat.ways import Way

# Flask-Admin 2.2 on WTForms 3.3
pytestmark = pytest.mark.filterwarnings("ignore:Yielding raw tuples from iter_choices:DeprecationWarning")

AppOf = Callable[..., Flask]
Look = Callable[..., list[Any]]

# Flask-Admin compares the ids of selected rows as the text they came in, which psycopg 3 hands on as text; on plain
# Flask-SQLAlchemy too.
bulk = pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)

POSTS = "select title from post order by id"


@dataclasses.dataclass
class Site:
    db: Any
    app: Flask
    client: FlaskClient

    def post(self, path: str, **form: Any) -> str:
        """What the page says after the redirect, if there is one."""
        return self.client.post(path, data=form, follow_redirects=True).text


@pytest.fixture
def site(way: Way, app_of: AppOf) -> Site:
    """As Flask-Admin's `examples/sqla` has it."""
    db = way.db_class()
    app = app_of(db)

    class User(db.Model):  # type: ignore[name-defined, misc]
        id = db.Column(db.Integer, primary_key=True)
        name = db.Column(db.String(20), unique=True, nullable=False)

        def __str__(self) -> str:
            return str(self.name)

    post_tags = db.Table(
        "post_tags",
        db.Column("post_id", db.ForeignKey("post.id"), primary_key=True),
        db.Column("tag_id", db.ForeignKey("tag.id"), primary_key=True),
    )

    class Post(db.Model):  # type: ignore[name-defined, misc]
        id = db.Column(db.Integer, primary_key=True)
        title = db.Column(db.String(20), unique=True, nullable=False)
        hidden = db.Column(db.Boolean, default=False, nullable=False)
        user_id = db.Column(db.ForeignKey("user.id"))
        user = db.relationship(User, backref="posts")
        tags = db.relationship("Tag", secondary=post_tags)

    class Tag(db.Model):  # type: ignore[name-defined, misc]
        id = db.Column(db.Integer, primary_key=True)
        name = db.Column(db.String(20))

    class PostView(ModelView):
        column_list = ("title", "user", "tags")
        column_searchable_list = ("title",)
        column_filters = ("title", "user.name")
        column_editable_list = ("title",)

        @action("hide", "Hide", "Are you sure?")
        def action_hide(self, ids: list[str]) -> None:
            for post in self.get_query().filter(self.model.id.in_(ids)):
                post.hidden = True
                if post.title == "fails":
                    raise ZeroDivisionError
            db.session.commit()

    class FastView(ModelView):
        fast_mass_delete = True

    admin = flask_admin.Admin(app, name="Example")
    admin.add_view(ModelView(User, db))
    admin.add_view(PostView(Post, db))
    admin.add_view(FastView(Tag, db))
    with app.app_context():
        db.create_all()
        db.session.add_all([User(name="adam"), User(name="eve"), Tag(name="t1"), Tag(name="t2")])
        db.session.commit()
    return Site(db, app, app.test_client())


def test_create_list_edit_delete(site: Site, look: Look) -> None:
    assert "was successfully created" in site.post("/admin/post/new/", title="one", user="1", tags=["1", "2"])
    assert "was successfully created" in site.post("/admin/post/new/", title="two", user="2")
    assert look("select title, user_id from post order by id") == [("one", 1), ("two", 2)]
    assert look("select count(*) from post_tags") == [2]

    page = site.client.get("/admin/post/").text
    assert all(text in page for text in ("one", "two", "adam", "eve"))
    found = site.client.get("/admin/post/?search=one&sort=0&desc=1").text
    assert "edit/?id=1" in found
    assert "edit/?id=2" not in found

    assert "adam" in site.client.get("/admin/post/edit/?id=1").text
    assert "was successfully saved" in site.post("/admin/post/edit/?id=1", title="uno", user="2", tags=["2"])
    assert look("select title, user_id from post where id = 1") == [("uno", 2)]
    assert look("select tag_id from post_tags") == [2]
    assert "was successfully saved" in site.post("/admin/post/ajax/update/", list_form_pk="2", title="due")
    assert look(POSTS) == ["uno", "due"]

    assert "was successfully deleted" in site.post("/admin/post/delete/", id="1")
    assert look(POSTS) == ["due"]
    assert look("select count(*) from post_tags") == [0]


def test_a_failed_create_says_so_and_leaves_nothing(site: Site, look: Look) -> None:
    site.post("/admin/user/new/", name="abel", posts=[])
    # past the form's own check: what an earlier request of another process added meanwhile
    look("create function refuse() returns trigger language plpgsql as $$ begin raise unique_violation; end $$")
    look("create trigger refuse before insert on post_tags for each row execute function refuse()")
    page = site.post("/admin/post/new/", title="one", user="1", tags=["1"])
    assert "Integrity error" in page
    assert look(POSTS) == []
    assert "was successfully created" in site.post("/admin/post/new/", title="one", user="1")


def test_a_failed_edit_leaves_the_row_as_it_was(site: Site, look: Look) -> None:
    site.post("/admin/post/new/", title="one", user="1")
    look("create function refuse() returns trigger language plpgsql as $$ begin raise unique_violation; end $$")
    look("create trigger refuse before insert on post_tags for each row execute function refuse()")
    assert "Integrity error" in site.post("/admin/post/edit/?id=1", title="uno", user="2", tags=["1"])
    assert look("select title, user_id from post") == [("one", 1)]


def test_delete_that_a_foreign_key_refuses(site: Site, look: Look) -> None:
    site.post("/admin/post/new/", title="one", tags=["1"])
    assert "Integrity error" in site.post("/admin/tag/delete/", id="1")
    assert "was successfully deleted" in site.post("/admin/tag/delete/", id="2")
    assert look("select name from tag") == ["t1"]


@bulk
def test_bulk_delete(site: Site, look: Look) -> None:
    for title in ("one", "two", "three"):
        site.post("/admin/post/new/", title=title, user="1")
    page = site.post("/admin/post/action/", action="delete", rowid=["1", "3"])
    assert "2 records were successfully deleted" in page
    assert look(POSTS) == ["two"]


@bulk
def test_fast_bulk_delete(site: Site, look: Look) -> None:
    assert "2 records were successfully deleted" in site.post("/admin/tag/action/", action="delete", rowid=["1", "2"])
    assert look("select count(*) from tag") == [0]


@bulk
def test_fast_bulk_delete_that_a_foreign_key_refuses(site: Site, look: Look) -> None:
    site.post("/admin/post/new/", title="one", tags=["2"])
    assert "Integrity error" in site.post("/admin/tag/action/", action="delete", rowid=["1", "2"])
    assert look("select count(*) from tag") == [2]


@bulk
def test_bulk_action_of_one_s_own(site: Site, way: Way, look: Look) -> None:
    for title in ("one", "two"):
        site.post("/admin/post/new/", title=title)
    site.post("/admin/post/action/", action="hide", rowid=["1", "2"])
    assert look("select hidden from post") == [True, True]


@bulk
def test_bulk_action_that_fails_in_the_middle(site: Site, way: Way, look: Look) -> None:
    for title in ("one", "fails", "three"):
        site.post("/admin/post/new/", title=title)
    with pytest.raises(ZeroDivisionError):
        site.post("/admin/post/action/", action="hide", rowid=["1", "2", "3"])
    assert look("select hidden from post") == [False, False, False]
    with site.app.app_context():
        assert site.db.session.scalar(sa.text("select count(*) from post")) == 3
