"""Rows read in batches, and written as COPY's text. No database."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import io
import uuid
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, synonym

from fictive.drivers.copying import NotCopyable
from fictive.errors import ConfigurationError, DuplicateRows, RowsDiffer, UnknownAttribute
from fictive.rows import progress
from fictive.rows.batches import Reader, attribute_named
from fictive.rows.copying import Encoder, array_text, escaped
from fictive.rows.duplicates import without_duplicates
from fictive.rows.merging import can_compare


class Base(DeclarativeBase):
    pass


class Owner(Base):
    __tablename__ = "owner"
    id: Mapped[int] = mapped_column(primary_key=True)


class Pet(Base):
    __tablename__ = "pet"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column("pet_name")
    nick = synonym("name")
    age: Mapped[int | None]
    owner_id: Mapped[int] = mapped_column(sa.ForeignKey("owner.id"))
    owner: Mapped[Owner] = relationship()

    @hybrid_property
    def called(self) -> str:
        return self.name

    @hybrid_property
    def loud(self) -> str:
        return self.name.upper()

    @loud.inplace.expression
    @classmethod
    def _loud(cls) -> Any:
        return sa.func.upper(cls.name)


MAPPER = sa.inspect(Pet)


def _reader(rows: Any, size: int = 2) -> Reader:
    return Reader(MAPPER, rows, size, "f()")


# Names


@pytest.mark.parametrize("name", ["name", "nick", "called", Pet.name, Pet.called])
def test_a_name_of_a_column(name: Any) -> None:
    assert attribute_named(MAPPER, name, "key") == "name"


@pytest.mark.parametrize(
    ("name", "message"),
    [("nmae", "did you mean 'name'"), ("owner", "Pet.owner in key"), ("loud", "Pet.loud in key"), (3, "names")],
)
def test_a_name_of_no_column(name: Any, message: str) -> None:
    with pytest.raises(UnknownAttribute, match=message):
        attribute_named(MAPPER, name, "key")


# Reading


def test_d8_rows_are_read_a_batch_at_a_time() -> None:
    asked = []

    def rows() -> Any:
        for number in range(5):
            asked.append(number)
            yield {"called": f"pet {number}", "age": number}

    reader = _reader(rows())
    assert (reader.total, reader.is_held) == (None, False)
    head = reader.head()
    assert asked == [0, 1]
    assert not reader.at_end_after_head()
    found = list(reader.batches())
    assert found[0] is head
    assert [batch.size for batch in found] == [2, 2, 1]
    assert [batch.first for batch in found] == [0, 2, 4]
    assert found[1].names == ("name", "age")
    assert [list(column) for column in found[1].columns] == [["pet 2", "pet 3"], [2, 3]]
    assert found[2].mappings() == [{"name": "pet 4", "age": 4}]
    assert reader.head() is None


def test_rows_of_a_part() -> None:
    reader = _reader([{"name": "x"}] * 5)
    assert reader.total == 5
    assert [[batch.size for batch in reader.batches(3)] for _ in range(3)] == [[2, 1], [2], []]


def test_objects_are_rows_of_what_is_set_on_them() -> None:
    pets = [Pet(name="a", age=None), Pet(id=None, name="b", age=3)]
    assert [batch.mappings() for batch in _reader(pets).batches()] == [
        [{"name": "a", "age": None}, {"name": "b", "age": 3}]
    ]


def test_d8_rows_with_different_keys_raise_with_the_difference() -> None:
    rows = [{"name": "a", "age": 1}] * 3 + [{"name": "b", "owner_id": 2}]
    with pytest.raises(RowsDiffer, match=r"Row 4 has not the keys of row 1: it lacks age and it also has owner_id"):
        list(_reader(rows).batches())
    with pytest.raises(RowsDiffer, match=r"Row 2 has not the keys of row 1: it lacks age\. Give"):
        list(_reader([{"name": "a", "age": 1}, {"name": "b"}]).batches())
    with pytest.raises(RowsDiffer, match=r"Row 2 .* it also has age"):
        list(_reader([{}, {"age": 1}]).batches())
    with pytest.raises(RowsDiffer, match=r"gives Pet\.name twice"):
        list(_reader([{"name": "a", "nick": "b"}]).batches())


@pytest.mark.parametrize("rows", [{"name": "a"}, "text", 5, None])
def test_what_is_no_rows(rows: Any) -> None:
    with pytest.raises(TypeError, match=r"f\(\) takes an iterable of dicts or of Pet"):
        _reader(rows)


@pytest.mark.parametrize("row", [3, Owner(), ("a", 1)])
def test_what_is_no_row(row: Any) -> None:
    with pytest.raises(TypeError, match="Row 2 is neither a dict nor a Pet"):
        list(_reader([{"name": "a"}, row]).batches())


# Duplicates


def test_d8_duplicates_in_a_batch() -> None:
    rows = [{"name": name, "age": number} for number, name in enumerate("abac")]

    def found(duplicates: Any, keys: list[str], rows: Any = rows) -> list[Any]:
        return [batch.mappings() for batch in without_duplicates(_reader(rows, 9).batches(), keys, duplicates)]

    with pytest.raises(DuplicateRows, match="have the key name='a'"):
        found("error", ["name"])
    assert found("last", ["name"]) == [[rows[1], rows[2], rows[3]]]
    assert found("error", ["name", "age"]) == [rows]
    nulls = [{"name": "a", "age": None}] * 2
    assert found("error", ["name", "age"], nulls) == found("last", ["name", "age"], nulls) == [nulls]
    with pytest.raises(DuplicateRows, match="name='a', age=1"):
        found("error", ["name", "age"], [*nulls, {"name": "a", "age": 1}, {"name": "a", "age": 1}])


# COPY's text


class Colour(enum.Enum):
    RED = "r"


class Size(enum.IntEnum):
    BIG = 3


class Word(str, enum.Enum):
    NO = "n\to"


class Backwards(sa.types.TypeDecorator[str]):
    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:
        return value and value[::-1]


def _refuse(value: Any) -> str:
    raise NotCopyable


def _block(type_: Any, *values: Any) -> str:
    return Encoder(postgresql.dialect(), [sa.Column("c", type_)], _refuse).block([values])


@pytest.mark.parametrize(
    ("type_", "value", "text"),
    [
        (sa.Integer, 5, "5"),
        (sa.Integer, Size.BIG, "3"),
        (sa.Boolean, True, "t"),
        (sa.Float, 0.1, "0.1"),
        (sa.Float, float("-inf"), "-inf"),
        (sa.Numeric, decimal.Decimal("1.10"), "1.10"),
        (sa.Text, None, "\\N"),
        (sa.Text, "", ""),
        (sa.Text, "\\N", "\\\\N"),
        (sa.Text, "\\.", "\\\\."),
        (sa.Text, "a\tb\nc\rd\\e", "a\\tb\\nc\\rd\\\\e"),
        (sa.Text, Word.NO, "n\\to"),
        (Backwards, "a\t", "\\ta"),
        (sa.Enum(Colour), Colour.RED, "RED"),
        (sa.Date, dt.date(2024, 2, 29), "2024-02-29"),
        (sa.DateTime, dt.datetime(2024, 2, 29, 1, 2, 3, 4), "2024-02-29T01:02:03.000004"),
        (sa.DateTime, dt.datetime(2024, 1, 1, tzinfo=dt.timezone.utc), "2024-01-01T00:00:00+00:00"),
        (sa.Interval, dt.timedelta(days=-1, microseconds=5), "-1 days 0.000005 seconds"),
        (sa.Uuid, uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (sa.ARRAY(sa.Text), ["a", None, 'q"\\', "null"], '{"a",NULL,"q\\\\"\\\\\\\\","null"}'),
        (sa.ARRAY(sa.Integer), [[1, 2], [3, 4]], '{{"1","2"},{"3","4"}}'),
        (sa.ARRAY(sa.Integer), [], "{}"),
    ],
)
def test_the_text_of_a_value(type_: Any, value: Any, text: str) -> None:
    assert _block(type_, value) == text + "\n"
    # among others of its kind, and with NULLs
    assert _block(type_, value, None, value) == f"{text}\n\\N\n{text}\n"


def test_lines_of_several_columns() -> None:
    columns = [sa.Column("a", sa.Integer), sa.Column("b", sa.Text)]
    assert Encoder(postgresql.dialect(), columns, _refuse).block([[1, 2], ["x", "y\n"]]) == "1\tx\n2\ty\\n\n"


def test_values_without_a_text() -> None:
    with pytest.raises(NotCopyable):
        _block(sa.Text, "a", object())
    with pytest.raises(ValueError, match="A value for c has a NUL"):
        _block(sa.Text, "a\0b", "c")


def test_escaping_leaves_alone_what_is_fine() -> None:
    fine = ["a", "b c"]
    assert escaped(fine) is fine
    assert escaped([]) == []
    assert array_text([], str) == "{}"


def test_types_that_can_be_compared() -> None:
    assert can_compare(sa.ARRAY(Backwards()))
    assert can_compare(postgresql.JSONB())
    assert not can_compare(sa.JSON())
    assert not can_compare(sa.types.NullType())


# The bar


def test_a_bar_shows_how_far_it_is() -> None:
    from rich.console import Console

    out = io.StringIO()
    with progress.bar("Loading", console=Console(file=out, width=120)) as tell:
        tell(1000, None)
        tell(2000, 2000)
    assert "Loading" in out.getvalue()
    assert "2,000 rows" in out.getvalue()


def test_a_bar_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rich.progress", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'fictive\[progress\]'"), progress.bar():
        pass
