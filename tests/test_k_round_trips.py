"""Contract K: the round trips of each piece of work, exactly, next to those of plain Flask-SQLAlchemy."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from fictive.testing.wire import Log, Wire
from tests.conftest import MakeApp
from tests.models import opt_in, plain
from tests.wirelog import messages, own_verbs

Look = Callable[..., list[Any]]
Work = Callable[[types.SimpleNamespace], object]
Measure = Callable[..., Log]

RUNS = 8  # psycopg prepares a statement on its sixth run, which costs one round trip once


@pytest.fixture
def apps(make_app: MakeApp) -> dict[str, tuple[types.SimpleNamespace, Flask]]:
    return {"fictive": (opt_in, make_app(opt_in.db)), "plain": (plain, make_app(plain.db))}


@pytest.fixture
def measure(apps: dict[str, tuple[types.SimpleNamespace, Flask]], wire: Wire, look: Look) -> Measure:
    """`measure("plain", work)`: what one request whose view is `work` sends, once everything is warm."""
    look("insert into item (name) values ('first')")

    def run(side: str, work: Work) -> Log:
        models, app = apps[side]
        app.view_functions["work"] = lambda: (work(models), "")[1]
        if not any(rule.endpoint == "work" for rule in app.url_map.iter_rules()):
            app.add_url_rule("/", "work")
        client = app.test_client()
        for _ in range(RUNS):
            with wire.record() as log:
                assert client.get("/").status_code == 200
        assert log.connections_opened == 0
        assert not log.exchanges or log.exchanges[-1].status == "I"
        return log

    return run


def selects(count: int) -> Work:
    def work(m: types.SimpleNamespace) -> None:
        for _ in range(count):
            m.db.session.execute(sa.select(m.Item.id)).all()

    return work


@pytest.mark.parametrize("count", [1, 2, 5])
def test_k_selects(count: int, measure: Measure) -> None:
    ours, plains = measure("fictive", selects(count)), measure("plain", selects(count))
    assert messages(ours) == ["SELECT"] * count
    assert ours.round_trips == count
    assert messages(plains) == ["BEGIN", *["SELECT"] * count, "ROLLBACK"]
    assert plains.round_trips == count + 2
    assert ours.time_in_transaction == 0


@pytest.mark.parametrize("load", ["get", "scalars", "query", "lazy"])
def test_k_one_round_trip_for_each_way_to_read(load: str, measure: Measure) -> None:
    def work(m: types.SimpleNamespace) -> None:
        if load == "get":
            m.db.session.get(m.Item, 1)
        elif load == "scalars":
            m.db.session.scalars(sa.select(m.Item)).all()
        elif load == "query":
            m.db.session.query(m.Item).all()
        else:
            _ = [item.children for item in m.db.session.scalars(sa.select(m.Item))]

    count = 2 if load == "lazy" else 1
    assert messages(measure("fictive", work)) == ["SELECT"] * count
    assert measure("plain", work).round_trips == count + 2


def insert(m: types.SimpleNamespace) -> None:
    m.db.session.execute(sa.insert(m.Tag).values(label=sa.func.gen_random_uuid().cast(sa.Text)))


def block(m: types.SimpleNamespace) -> Any:
    """`begin()`; plain Flask-SQLAlchemy sends the same for `begin()` and for a commit at the end."""
    return m.db.session.begin()


def test_k_insert_in_begin(measure: Measure, look: Look) -> None:
    def work(m: types.SimpleNamespace) -> None:
        with block(m):
            insert(m)

    ours, plains = measure("fictive", work), measure("plain", work)
    assert messages(ours) == ["BEGIN+INSERT", "COMMIT"]
    assert ours.round_trips == 2
    assert messages(plains) == ["BEGIN", "INSERT", "COMMIT"]
    assert plains.round_trips == 3
    assert look("select count(*) from tag") == [2 * RUNS]


def test_k_insert_by_flush_in_begin(measure: Measure, look: Look) -> None:
    numbers = iter(range(1000))

    def work(m: types.SimpleNamespace) -> None:
        with block(m):
            m.db.session.add(m.Tag(label=str(next(numbers))))

    ours, plains = measure("fictive", work), measure("plain", work)
    assert messages(ours) == ["BEGIN+INSERT", "COMMIT"]
    assert plains.round_trips == 3
    assert look("select count(*) from tag") == [2 * RUNS]


def test_k_add_and_commit(measure: Measure, look: Look) -> None:
    numbers = iter(range(1000))

    def work(m: types.SimpleNamespace) -> None:
        m.db.session.add(m.Tag(label=str(next(numbers))))
        m.db.session.commit()

    ours, plains = measure("fictive", work), measure("plain", work)
    assert ours.round_trips <= 2
    assert plains.round_trips == 3
    assert look("select count(*) from tag") == [2 * RUNS]


def select_and_update(m: types.SimpleNamespace) -> None:
    number = m.db.session.scalar(sa.select(m.Item.id).where(m.Item.name == "first"))
    m.db.session.execute(sa.update(m.Item).where(m.Item.id == number).values(note="seen"))


def test_k_select_and_update_in_begin(measure: Measure) -> None:
    def work(m: types.SimpleNamespace) -> None:
        with block(m):
            select_and_update(m)

    ours, plains = measure("fictive", work), measure("plain", work)
    assert messages(ours) == ["BEGIN+SELECT", "UPDATE", "COMMIT"]
    assert ours.round_trips == 3
    assert messages(plains) == ["BEGIN", "SELECT", "UPDATE", "COMMIT"]
    assert plains.round_trips == 4


def test_k_insert_in_savepoint(measure: Measure, look: Look) -> None:
    def work(m: types.SimpleNamespace) -> None:
        with block(m), m.db.session.begin_nested():
            insert(m)

    ours, plains = measure("fictive", work), measure("plain", work)
    assert messages(ours) == ["BEGIN+SAVEPOINT+INSERT", "RELEASE+COMMIT"]
    assert ours.round_trips == 2
    assert messages(plains) == ["BEGIN", "SAVEPOINT", "INSERT", "RELEASE", "COMMIT"]
    assert plains.round_trips == 5
    assert look("select count(*) from tag") == [2 * RUNS]


def test_k_insert_in_nested_savepoints(measure: Measure, look: Look) -> None:
    def work(m: types.SimpleNamespace) -> None:
        with block(m), m.db.session.begin_nested(), m.db.session.begin_nested():
            insert(m)

    ours, plains = measure("fictive", work), measure("plain", work)
    assert messages(ours) == ["BEGIN+SAVEPOINT+SAVEPOINT+INSERT", "RELEASE+RELEASE+COMMIT"]
    assert plains.round_trips == 7
    assert look("select count(*) from tag") == [2 * RUNS]


def test_k_savepoint_within_a_transaction(measure: Measure, driver: str, look: Look) -> None:
    """The second savepoint's RELEASE and the third's SAVEPOINT go in one message, with the statement."""

    def work(m: types.SimpleNamespace) -> None:
        with block(m):
            for _ in range(3):
                with m.db.session.begin_nested():
                    insert(m)

    ours, plains = measure("fictive", work), measure("plain", work)
    assert messages(ours) == [
        "BEGIN+SAVEPOINT+INSERT",
        "RELEASE+SAVEPOINT+INSERT",
        "RELEASE+SAVEPOINT+INSERT",
        "RELEASE+COMMIT",
    ]
    assert plains.round_trips == 11
    assert look("select count(*) from tag") == [6 * RUNS]


@pytest.mark.parametrize("depth", [1, 2])
def test_k_savepoint_that_nothing_waits_with(depth: int, measure: Measure, look: Look) -> None:
    """In the middle of a transaction; what follows it takes no RELEASE along, which goes with COMMIT."""

    def work(m: types.SimpleNamespace) -> None:
        with block(m):
            insert(m)
            with contextlib.ExitStack() as savepoints:
                for _ in range(depth):
                    savepoints.enter_context(m.db.session.begin_nested())
                insert(m)
            insert(m)

    ours = measure("fictive", work)
    middle = "SAVEPOINT+" * depth + "INSERT"
    assert messages(ours) == ["BEGIN+INSERT", middle, "INSERT", "RELEASE+" * depth + "COMMIT"]
    assert measure("plain", work).round_trips == 5 + 2 * depth
    assert look("select count(*) from tag") == [6 * RUNS]


@pytest.mark.parametrize("divisor", [1, 0], ids=["taken back", "failed"])
def test_k_savepoint_that_nothing_waits_with_is_rolled_back(divisor: int, measure: Measure, look: Look) -> None:
    divide = sa.text("select 1 / :divisor")

    def work(m: types.SimpleNamespace) -> None:
        with block(m):
            m.db.session.execute(divide, {"divisor": 1})
            nested = m.db.session.begin_nested()
            with contextlib.nullcontext() if divisor else pytest.raises(sa.exc.DataError):
                m.db.session.execute(divide, {"divisor": divisor})
            nested.rollback()
            insert(m)

    ours = measure("fictive", work)
    assert messages(ours) == ["BEGIN+SELECT", "SAVEPOINT+SELECT", "ROLLBACK", "INSERT", "COMMIT"]
    assert measure("plain", work).round_trips == 7
    assert look("select count(*) from tag") == [2 * RUNS]


@pytest.mark.parametrize("statements", [0, 1])
def test_k_savepoint_rolled_back(statements: int, measure: Measure, look: Look) -> None:
    def work(m: types.SimpleNamespace) -> None:
        with block(m):
            nested = m.db.session.begin_nested()
            for _ in range(statements):
                insert(m)
            nested.rollback()

    ours = measure("fictive", work)
    assert messages(ours) == (["BEGIN+SAVEPOINT+INSERT", "ROLLBACK", "COMMIT"] if statements else [])
    assert ours.round_trips <= measure("plain", work).round_trips
    assert look("select count(*) from tag") == [0]


@pytest.mark.parametrize(
    ("options", "begin"),
    [
        ({"isolation_level": "SERIALIZABLE"}, "BEGIN ISOLATION LEVEL SERIALIZABLE"),
        (
            {"isolation_level": "SERIALIZABLE", "read_only": False, "deferrable": True},
            "BEGIN ISOLATION LEVEL SERIALIZABLE READ WRITE DEFERRABLE",
        ),
        ({"isolation_level": "REPEATABLE READ"}, "BEGIN ISOLATION LEVEL REPEATABLE READ"),
        ({}, "BEGIN"),
    ],
)
def test_k_serializable(options: dict[str, Any], begin: str, measure: Measure) -> None:
    def work(m: types.SimpleNamespace) -> None:
        with m.db.session.transaction(**options):
            select_and_update(m)

    def plain_work(m: types.SimpleNamespace) -> None:
        with m.db.session.begin():
            if level := options.get("isolation_level"):
                m.db.session.connection(execution_options={"isolation_level": level})
            select_and_update(m)

    ours, plains = measure("fictive", work), measure("plain", plain_work)
    assert messages(ours) == ["BEGIN+SELECT", "UPDATE", "COMMIT"]
    assert ours.statements[0].split(";")[0] == begin
    assert ours.round_trips == 3
    assert own_verbs(plains)[-4:] == ["BEGIN", "SELECT", "UPDATE", "COMMIT"]
    assert plains.round_trips >= 4


def test_k_nothing_costs_nothing(measure: Measure) -> None:
    def work(m: types.SimpleNamespace) -> None:
        m.db.session.commit()
        m.db.session.rollback()
        with block(m), m.db.session.begin_nested():
            pass

    assert measure("fictive", work).round_trips == 0
    assert measure("plain", work).round_trips == 0


@pytest.mark.parametrize(
    "work",
    [
        lambda m: m.db.session.execute(sa.select(m.Item).execution_options(yield_per=2)).all(),
        lambda m: (m.db.session.execute(sa.update(m.Item).values(note="x")), m.db.session.commit()),
        lambda m: m.db.session.rollback(),
    ],
    ids=["streaming", "write and commit", "rollback"],
)
def test_k_never_more_than_plain(work: Work, measure: Measure) -> None:
    assert measure("fictive", work).round_trips <= measure("plain", work).round_trips


def test_k_first_requests_are_never_more_than_plain(
    apps: dict[str, tuple[types.SimpleNamespace, Flask]], wire: Wire, look: Look
) -> None:
    """Cold: before anything is prepared or known to be parsed, request by request."""
    look("insert into item (name) values ('first')")

    def mixed(m: types.SimpleNamespace) -> None:
        select_and_update(m)
        with m.db.session.begin_nested():
            insert(m)
        m.db.session.commit()

    counts: dict[str, list[int]] = {}
    for side, (models, app) in apps.items():
        counts[side] = []
        for _ in range(RUNS):
            with app.app_context(), wire.record() as log:
                if side == "plain":
                    mixed(models)
                else:
                    with models.db.session.begin():
                        select_and_update(models)
                        with models.db.session.begin_nested():
                            insert(models)
            counts[side].append(log.round_trips)
    assert all(ours <= plains for ours, plains in zip(counts["fictive"], counts["plain"], strict=True)), counts
