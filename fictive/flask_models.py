"""`db.Model` on a declarative base of dataclasses, which Flask-SQLAlchemy 3.1 cannot make on SQLAlchemy 2.1."""

from __future__ import annotations

import inspect
import types
from typing import TYPE_CHECKING, Any

import flask_sqlalchemy
import sqlalchemy.orm as sa_orm
from flask_sqlalchemy.model import BindMixin, Model, NameMixin

__all__ = ["MakesModels"]

if TYPE_CHECKING:
    _Base = flask_sqlalchemy.SQLAlchemy
else:
    _Base = object

_DECLARATIVE = (sa_orm.DeclarativeBase, sa_orm.DeclarativeBaseNoMeta)


class MakesModels(_Base):
    """What the mixins for a Flask-SQLAlchemy class share: a `db.Model` for every kind of `model_class`."""

    def _make_declarative_base(self, model_class: Any, disable_autonaming: bool = False) -> Any:
        if not _is_base_of_dataclasses(model_class):
            return super()._make_declarative_base(model_class, disable_autonaming)
        model = _subclass(self, model_class, disable_autonaming)
        # as Flask-SQLAlchemy's own does at its end
        if None in self.metadatas:
            model.metadata = self.metadatas[None]
        else:
            model.metadata.info["bind_key"] = None
            self.metadatas[None] = model.metadata
        model.query_class = self.Query
        return model


def _is_base_of_dataclasses(model_class: Any) -> bool:
    if not isinstance(model_class, type) or not issubclass(model_class, sa_orm.MappedAsDataclass):
        return False
    # of two declarative bases, or none, Flask-SQLAlchemy complains
    return sum(issubclass(base, _DECLARATIVE) for base in model_class.__bases__) == 1


def _subclass(db: Any, model_class: Any, disable_autonaming: bool) -> Any:
    """`model_class` with what Flask-SQLAlchemy gives to its models.

    Flask-SQLAlchemy makes a class anew of its body instead, which SQLAlchemy 2.1 has made a dataclass already, and in
    which the methods' `super()` is that of another class.
    """
    body = {"__abstract__": True, "__fsa__": db, "__module__": model_class.__module__, "__doc__": model_class.__doc__}
    if hasattr(model_class, "__table_cls__"):  # before that of NameMixin
        body["__table_cls__"] = inspect.getattr_static(model_class, "__table_cls__")
    named = () if disable_autonaming else (NameMixin,)
    return types.new_class(
        "FlaskSQLAlchemyBase", (BindMixin, *named, model_class, Model), {}, lambda ns: ns.update(body)
    )
