"""What the page "Types" shows runs, and what an editor shows on hover is there."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from fictive.rows import descriptors
from tests import typing_recipe
from tests.conftest import MakeApp
from tests.typing_recipe import City, db, grow, load


@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
def test_the_recipe_for_mypy_runs(make_app: MakeApp) -> None:
    assert typing_recipe.Model is db.Model
    with make_app(db).app_context():
        db.create_all()
        assert (grow("Paris"), grow("Paris")) == (1, 2)
        assert [city.name for city in load(["Rome", "Bern"])] == ["Rome", "Bern"]
        db.drop_all()


METHODS = ("find_or_create", "get_or_create", "update_or_create", "insert_many", "upsert_many", "update_many")


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_models_have_docstrings(name: str, make_app: MakeApp) -> None:
    """As `help()` and an editor's signature help show them."""
    with make_app(db).app_context():
        method: Any = getattr(City, name)
        documented = inspect.getdoc(method) or ""
    assert len(documented) > 60
    assert "partial" not in documented
    camel = "".join(word.title() for word in name.split("_"))
    protocol: Any = getattr(descriptors, f"_{camel}")
    overloads = [each for each in vars(protocol).values() if callable(each) and each.__name__ == "__call__"]
    assert all(len(each.__doc__ or "") > 20 for each in overloads)
