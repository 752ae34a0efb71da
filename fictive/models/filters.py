"""Conditions, search and order from the parameters of a URL, against an allow list. Nothing is sent."""

from __future__ import annotations

import datetime
import decimal
import difflib
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from ..errors import ConfigurationError, InvalidFilter
from .url_values import read_datetime, read_decimal, read_time

__all__ = ["FilterSet"]

_Attributes = Sequence[Any] | Mapping[str, Any]


class FilterSet:
    """What a list view takes from `request.args`: `class ToyFilters(FilterSet): filters = [Toy.color]`.

    `ToyFilters(request.args)` has `where`, a list of conditions, and `order_by`; the reading methods of a `Repository`
    take it among their conditions: `toys.page(1, 20, ToyFilters(request.args))`. The class names what is allowed:

    `filters`
        attributes, or a mapping of other names to attributes. `color=red` is equality, a parameter that comes several
        times is any of its values, and `size__gt=3` compares: `ne`, `lt`, `le`, `gt`, `ge`; `isnull` (`true`,
        `false`); for text `contains` and `startswith`, whatever the case.
    `search`
        attributes of text; each word of `q` has to be in one of them, whatever the case.
    `order`
        attributes, or a mapping; `order=-size,name` is by size, the largest first, then by name.
    `join`
        the relationships that attributes of other models are reached by, for the repository.
    `ignored`
        parameters of the view's own, such as the number of a page. A filter of that name comes first.

    Raises `InvalidFilter`, which a view answers by 400, for a parameter that is not allowed and for a value that is
    not of the column's type; the message names the parameters. Values are bound, never part of the SQL.
    """

    filters: ClassVar[_Attributes] = ()
    search: ClassVar[Sequence[Any]] = ()
    order: ClassVar[_Attributes] = ()
    join: ClassVar[Any] = ()
    ignored: ClassVar[Iterable[str]] = ("page", "per_page", "size", "limit", "offset", "after", "before")
    search_parameter: ClassVar[str] = "q"
    order_parameter: ClassVar[str] = "order"

    _filters: ClassVar[Mapping[str, Any]] = {}
    _order: ClassVar[Mapping[str, Any]] = {}

    relationships: ClassVar[tuple[Any, ...]] = ()
    """What `join` names."""
    where: list[sa.ColumnElement[bool]]
    """The conditions."""
    order_by: list[sa.ColumnElement[Any]]
    """The order; empty without `order=`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._filters, cls._order = _named(cls, "filters"), _named(cls, "order")
        cls.relationships = tuple(cls.join) if isinstance(cls.join, Sequence) else (cls.join,)
        for each in cls.relationships:
            if not isinstance(getattr(each, "property", None), sa_orm.RelationshipProperty):
                raise ConfigurationError(
                    f"{cls.__name__}.join: expected relationships such as Toy.shop, not {each!r}."
                )
        for attribute in cls.search:
            if not isinstance(_checked(cls, "search", attribute).type, sa.String):
                raise ConfigurationError(f"{cls.__name__}.search: {attribute} is not text.")

    def __init__(self, args: Mapping[str, Any]) -> None:
        """`args` is `request.args`, or any mapping of names to a text or several."""
        self.where, self.order_by = [], []
        refused = []
        for parameter in args:
            texts = _texts(args, parameter)
            name, _, operator = parameter.partition("__")
            if name in self._filters:
                self.where.append(_condition(parameter, self._filters[name], operator, texts))
            elif parameter == self.search_parameter and self.search:
                self.where += [self._search(word) for text in texts for word in _text(text, parameter).split()]
            elif parameter == self.order_parameter and self._order:
                self.order_by += [self._direction(each) for text in texts for each in text.split(",") if each.strip()]
            elif parameter not in self.ignored:
                refused.append(parameter)
        if refused:
            raise InvalidFilter(f"No such filter: {', '.join(refused)}.{_meant(refused, self._allowed())}")

    def _allowed(self) -> list[str]:
        found = list(self._filters)
        return found + [self.search_parameter] * bool(self.search) + [self.order_parameter] * bool(self._order)

    def _search(self, word: str) -> sa.ColumnElement[bool]:
        return sa.or_(*(attribute.icontains(word, autoescape=True) for attribute in self.search))

    def _direction(self, text: str) -> sa.ColumnElement[Any]:
        descending, name = text.strip().startswith("-"), text.strip().lstrip("-")
        if name not in self._order:
            raise InvalidFilter(f"{self.order_parameter}: cannot order by {name}.{_meant([name], list(self._order))}")
        attribute = self._order[name]
        found: sa.ColumnElement[Any] = attribute.desc() if descending else attribute.asc()
        return found


def _named(cls: type[FilterSet], what: str) -> dict[str, Any]:
    given = getattr(cls, what)
    if isinstance(given, Mapping):
        return {name: _checked(cls, what, attribute) for name, attribute in given.items()}
    return {_checked(cls, what, attribute).key: attribute for attribute in given}


def _checked(cls: type[FilterSet], what: str, attribute: Any) -> Any:
    if not isinstance(attribute, sa_orm.QueryableAttribute) or not hasattr(attribute, "type"):
        raise ConfigurationError(f"{cls.__name__}.{what}: expected attributes such as Toy.color, not {attribute!r}.")
    if isinstance(getattr(attribute, "property", None), sa_orm.RelationshipProperty):
        raise ConfigurationError(
            f"{cls.__name__}.{what}: {attribute} is a relationship; name a column of it, and join."
        )
    return attribute


def _texts(args: Mapping[str, Any], parameter: str) -> list[str]:
    several = getattr(args, "getlist", None)
    found = several(parameter) if several is not None else args[parameter]
    found = [found] if isinstance(found, str) or not isinstance(found, (list, tuple)) else list(found)
    if not all(isinstance(each, str) for each in found):
        raise TypeError(f"{parameter}: expected texts, as request.args has them.")
    return found


def _meant(refused: Sequence[str], allowed: Sequence[str]) -> str:
    near = [name for each in refused for name in difflib.get_close_matches(each, allowed, n=1)]
    if near:
        return f" Did you mean {', '.join(near)}?"
    return f" There are: {', '.join(allowed)}." if allowed else ""


# -- conditions -------------------------------------------------------------------------------------------------------

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "ne": lambda attribute, value: attribute.is_distinct_from(value),
    "lt": lambda attribute, value: attribute < value,
    "le": lambda attribute, value: attribute <= value,
    "gt": lambda attribute, value: attribute > value,
    "ge": lambda attribute, value: attribute >= value,
}
_OF_TEXT: dict[str, Callable[[Any, Any], Any]] = {
    "contains": lambda attribute, value: attribute.icontains(value, autoescape=True),
    "startswith": lambda attribute, value: attribute.istartswith(value, autoescape=True),
}
_NULL = "isnull"


def _condition(parameter: str, attribute: Any, operator: str, texts: list[str]) -> sa.ColumnElement[bool]:
    condition: sa.ColumnElement[bool]
    if "__" not in parameter:
        values = [_value(parameter, attribute, text) for text in texts]
        condition = attribute == values[0] if len(values) == 1 else attribute.in_(values)
        return condition
    if len(texts) != 1:
        raise InvalidFilter(f"{parameter}: expected once.")
    if operator == _NULL:
        null = _boolean(texts[0], parameter)
        condition = attribute.is_(None) if null else attribute.is_not(None)
        return condition
    is_text = isinstance(attribute.type, sa.String) and not isinstance(attribute.type, sa.Enum)
    operators = {**_COMPARE, **(_OF_TEXT if is_text else {})}
    if operator not in operators:
        raise InvalidFilter(f"{parameter}: expected one of {', '.join([*operators, _NULL])} after __.")
    condition = operators[operator](attribute, _value(parameter, attribute, texts[0]))
    return condition


# -- values -----------------------------------------------------------------------------------------------------------


def _value(parameter: str, attribute: Any, text: str) -> Any:
    """`text` as a value of the column; `InvalidFilter` names the parameter, and not the value."""
    kind = attribute.type
    if isinstance(kind, sa.Enum):
        return _member(kind, text, parameter)
    try:
        python_type = kind.python_type
    except NotImplementedError:
        python_type = object
    if python_type not in _READERS:
        raise InvalidFilter(f"{parameter}: cannot be compared by a text.")
    read, expected = _READERS[python_type]
    try:
        value = read(text, parameter)
    except InvalidFilter:
        raise
    except (ValueError, ArithmeticError):
        raise InvalidFilter(f"{parameter}: expected {expected}.") from None
    if isinstance(value, int) and not isinstance(value, bool):
        bits = 15 if isinstance(kind, sa.SmallInteger) else 63 if isinstance(kind, sa.BigInteger) else 31
        if not -(1 << bits) <= value < 1 << bits:
            raise InvalidFilter(f"{parameter}: expected a smaller number.")
    return value


def _member(kind: sa.Enum, text: str, parameter: str) -> Any:
    """A value of an enumeration, by the text that the database has for it."""
    if text not in kind.enums:
        raise InvalidFilter(f"{parameter}: expected one of {', '.join(kind.enums)}.")
    if kind.enum_class is None:
        return text
    by_text = dict(zip(kind.enums, kind.enum_class, strict=False))
    return by_text[text]


def _text(text: str, parameter: str) -> str:
    if "\0" in text:
        raise InvalidFilter(f"{parameter}: expected a text without zero bytes.")
    return text.encode(errors="replace").decode()  # halves of surrogate pairs


def _boolean(text: str, parameter: str) -> bool:
    if text.lower() not in ("true", "1", "false", "0"):
        raise InvalidFilter(f"{parameter}: expected true or false.")
    return text.lower() in ("true", "1")


_READERS: dict[type, tuple[Callable[[str, str], Any], str]] = {
    str: (_text, "a text"),
    bool: (_boolean, "true or false"),
    int: (lambda text, _: int(text), "a whole number"),
    float: (lambda text, _: float(text), "a number"),
    decimal.Decimal: (lambda text, _: read_decimal(text), "a number"),
    uuid.UUID: (lambda text, _: uuid.UUID(text), "a UUID"),
    datetime.datetime: (
        lambda text, _: read_datetime(text),
        "a date and time such as 2026-01-31T12:00",
    ),
    datetime.date: (lambda text, _: datetime.date.fromisoformat(text), "a date such as 2026-01-31"),
    datetime.time: (lambda text, _: read_time(text), "a time such as 12:00"),
}
