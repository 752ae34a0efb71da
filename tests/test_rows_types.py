"""Rule A31: the value that is stored does not depend on the way it was written, nor on the number of rows.

`tests/types_matrix.py` has the types, the values and the ways. A sample of the cells is tried here; all of them, some
hours of work, with `--all-cells` (`tox -e types`): a test for each type then, so that one sees how far it is.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import decimal
import random
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.types_matrix import BY_VALUE, TYPES, VALUES, WAYS, Matrix

PARTS = 8  # of the sample
_SAMPLE = 2  # values and ways of each type, by a seed that is the type's name; values beside those below
_OFTEN = ["None", "sql null"]
_KINDS: dict[str, list[str]] = {
    # by the beginning of a type's name: values that are stored, in another form or just so
    "Int": ["2.5", "True", "2**40"], "Small": ["2.5", "2**40"], "Num": ["D1.005", "0.1+0.2", "DNaN", "D1.500"],
    "Float": ["-0.0", "0.1", "nan"], "REAL": ["0.1", "16777217.0"], "String": ["'abc     '", "True", "escapes"],
    "CHAR": ["'bob '", "'abcdefgh'"], "Text": ["NUL", "surrogate"], "Date": ["datetime", "datetime aware", "date"],
    "TIME": ["datetime 0.6", "time", "datetime aware"], "Time": ["datetime", "time aware", "time"],
    "INTERVAL": ["timedelta", "timedelta -"], "JSON": ["JSON.NULL", "{b, a}", "[1, 2]"],
    "ARRAY": ["[1.0]", "[]", "[[1], [2]]"],
    "LargeB": ["'a'", "1", "b'a\\0\\xff'"], "CITEXT": ["'bob '"], "INT4": ["Range", "Range empty"],
    "MONEY": ["D1.005"],
    "BIT": ["'101'"], "Uuid": ["uuid", "'UUID'"], "Enum": ["'red'", "color", "'a'"],
}  # fmt: skip


def _chosen(name: str, all_cells: bool) -> tuple[list[str], list[str]]:
    ways = [*WAYS, BY_VALUE]
    if all_cells:
        return list(VALUES), ways
    draw = random.Random(name)
    mine = [value for start, values in _KINDS.items() if name.startswith(start) for value in values]
    values = dict.fromkeys([*_OFTEN, *mine, *draw.sample(list(VALUES), _SAMPLE)])
    return list(values), draw.sample(ways, _SAMPLE)


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(database_url)
    yield engine
    engine.dispose()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "names" in metafunc.fixturenames:
        all_cells = metafunc.config.getoption("--all-cells")
        parts = len(TYPES) if all_cells else PARTS
        names = [list(TYPES)[part::parts] for part in range(parts)]
        metafunc.parametrize("names", names, ids=list(TYPES) if all_cells else None)


@pytest.mark.timeout(20_000)
def test_a31_a_flush_and_every_other_way(engine: sa.Engine, names: list[str], pytestconfig: pytest.Config) -> None:
    wrong = []
    with contextlib.closing(Matrix(engine, names)) as matrix:
        for name in names:
            values, ways = _chosen(name, pytestconfig.getoption("--all-cells"))
            wrong += [(name, *cell) for cell in matrix.cells(name, values, ways) if cell[-2] != cell[-1]]
    assert not wrong, "\n".join(map(str, wrong))


# Values that are drawn: of a type's own class, with the edges always among them

_numbers = st.none() | st.decimals(allow_nan=True, allow_infinity=True) | st.floats() | st.integers(-(2**70), 2**70)
_texts = st.none() | st.text(alphabet=st.characters(codec=None), max_size=12)
_moments = st.none() | st.datetimes(timezones=st.none() | st.timezones(no_cache=False).map(lambda zone: zone))
_DRAWN: dict[str, st.SearchStrategy[Any]] = {
    "Integer": _numbers, "Numeric(10,2)": _numbers, "Numeric": _numbers, "REAL": _numbers, "Float": _numbers,
    "String(5)": _texts, "CHAR(5)": _texts, "Text": _texts, "CITEXT": _texts, "LargeBinary": st.binary() | _texts,
    "DateTime": _moments, "DateTime tz": _moments, "TIMESTAMP(3) tz": _moments,
    "Time": st.none() | st.times() | st.datetimes(), "Time tz": st.times(timezones=st.just(dt.timezone.utc)),
    "INTERVAL(0)": st.timedeltas(), "Uuid": st.none() | st.uuids() | st.just("x"),
    "JSON": st.recursive(st.booleans() | _numbers | _texts, lambda each: st.lists(each) | st.dictionaries(
        st.text(max_size=3), each), max_leaves=5),
    "ARRAY(Text)": st.lists(_texts, max_size=4),
    "ARRAY(Integer)": st.lists(st.none() | st.integers(), max_size=4),
    "ARRAY(Float)": st.lists(st.none() | st.floats(), max_size=4),
    "ARRAY(DateTime)": st.lists(_moments, max_size=3), "ARRAY(Numeric(5,1))": st.lists(_numbers, max_size=3),
    "ARRAY(2)": st.lists(st.lists(st.none() | st.integers(), max_size=3), max_size=3),
}  # fmt: skip
_ONE_OF = st.sampled_from(list(_DRAWN)).flatmap(lambda name: st.tuples(st.just(name), _DRAWN[name]))
_DRAWN_WAYS = ["insert 1", "insert 20", "upsert 1 twice", "update 5", "update_or_create twice"]
_FAR = dt.timezone(dt.timedelta(seconds=3661))
EDGES: dict[str, tuple[str, Any]] = {
    "scale": ("Numeric(10,2)", decimal.Decimal("1.005")), "trailing zeros": ("Numeric", decimal.Decimal("1.500")),
    "precision": ("REAL", 1 + 2**-24), "too much": ("Numeric(10,2)", decimal.Decimal("1e8")),
    "padding": ("CHAR(5)", "ab "), "blanks too many": ("String(5)", "abc      "), "too long": ("String(5)", "abcdef"),
    "None": ("Numeric(10,2)", None), "None in JSON": ("JSON", None), "NaN": ("Numeric", decimal.Decimal("NaN")),
    "a float's NaN": ("Float", float("nan")), "infinity": ("Numeric", decimal.Decimal("-Infinity")),
    "a float's infinity": ("REAL", float("inf")), "zero": ("Float", -0.0),
    "no zone": ("TIMESTAMP(3) tz", dt.datetime(2026, 3, 29, 2, 30)), "zone": ("DateTime", dt.datetime(
        2026, 3, 29, 2, 30, tzinfo=_FAR)), "zone's seconds": ("TIMESTAMP(3) tz", dt.datetime(
        2026, 3, 29, 2, 30, 0, 600, tzinfo=_FAR)), "part of a second": ("INTERVAL(0)", dt.timedelta(
        days=-1, microseconds=500_000)),
    "empty array": ("ARRAY(Integer)", []), "nested array": ("ARRAY(2)", [[1], [None]]), "empty ones within": (
        "ARRAY(2)", [[], []]), "ragged": ("ARRAY(2)", [[1], [2, 3]]),
    "escapes": ("Text", 'a\\b\n\t\r\\N\\.\'"'), "escapes in an array": ("ARRAY(Text)", ["NULL", None, "", '{"\\,']),
    "NUL": ("Text", "a\0"), "NUL in JSON": ("JSON", {"b": "\0", "a": [None, float("nan")]}),
    "surrogate": ("Text", "\ud800"), "surrogate in JSON": ("JSON", {"a": "\ud800"}), "nil": ("Uuid", uuid.UUID(int=0)),
}  # fmt: skip


@pytest.mark.timeout(20_000)
def test_a31_values_that_are_drawn(engine: sa.Engine, pytestconfig: pytest.Config) -> None:
    matrix = Matrix(engine, _DRAWN)
    many = 2_000 if pytestconfig.getoption("--all-cells") else 15

    def every_way(drawn: tuple[str, Any]) -> None:
        name, value = drawn
        expected = matrix.flushed(name, value)
        found = {way: matrix.written(name, value, WAYS[way]) for way in _DRAWN_WAYS}
        assert found == dict.fromkeys(_DRAWN_WAYS, expected)

    for edge in EDGES.values():
        every_way = example(edge)(every_way)
    drawn = given(_ONE_OF)(every_way)
    with contextlib.closing(matrix):
        settings(max_examples=many, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))(drawn)()
