"""Rows read in batches, and the bar that shows how far they are. No database."""

from __future__ import annotations

import io
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, synonym

from fictive.errors import ConfigurationError, DuplicateRows, RowsDiffer, UnknownAttribute
from fictive.rows import progress
from fictive.rows.bulk_input import RowReader, attribute_named, without_duplicates


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


def _reader(rows: Any, size: int = 2) -> RowReader:
    return RowReader(MAPPER, rows, size, "f()")


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
    assert not reader.is_fewer_than(3)
    found = list(reader.batches())
    assert found[0] is head
    assert [batch.size for batch in found] == [2, 2, 1]
    assert {name: list(values) for name, values in found[1].columns.items()} == {
        "name": ["pet 2", "pet 3"],
        "age": [2, 3],
    }
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
    with pytest.raises(RowsDiffer, match=r"Row 4 has other keys than row 1: it lacks age and it also has owner_id"):
        list(_reader(rows).batches())
    with pytest.raises(RowsDiffer, match=r"Row 2 has other keys than row 1: it lacks age\. Give"):
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
    with pytest.raises(ConfigurationError, match=r"pip install rich"), progress.bar():
        pass
