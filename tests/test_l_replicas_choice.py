"""L1, L2: which replica a read goes to. Pure; `test_l_replicas` has real nodes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from fictive.connection.replicas import (
    Positions,
    Replicas,
    check_position,
    format_lsn,
    on_primary,
    parse_lsn,
    positions_of,
    replicas_of,
    set_replicas,
    using_positions,
    wants_primary,
)
from fictive.errors import ConfigurationError


def an_engine(host: str = "replica") -> sa.Engine:
    return sa.create_engine(f"postgresql+psycopg2://{host}/d")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@given(st.integers(0, 2**64 - 1))
def test_l2_positions_are_numbers(position: int) -> None:
    assert parse_lsn(format_lsn(position)) == position


def test_l2_positions_as_postgresql_writes_them() -> None:
    assert parse_lsn("16/B374D848") == 0x16B374D848
    assert format_lsn(0x16B374D848) == "16/B374D848"
    assert "'0/3000148'::pg_catalog.pg_lsn" in check_position(0x3000148)


def test_l1_the_least_busy_one_then_any() -> None:
    draws = iter([0.9, 0.1, 0.5, 0.5, 0.5, 0.1])
    replicas = Replicas(an_engine("primary"), [an_engine("a"), an_engine("b")], order=lambda: next(draws))
    a, b = replicas.members
    assert replicas.choose() is b
    b.busy.append(None)
    assert replicas.choose() is a
    a.busy.append(None)
    assert replicas.choose() is b


def test_l2_a_lag_is_paid_once() -> None:
    clock = Clock()
    replicas = Replicas(an_engine("primary"), [an_engine()], clock=clock)
    (replica,) = replicas.members
    assert replicas.choose(50) is replica
    replica.was_behind(50)
    assert replicas.choose(50) is None
    assert replicas.choose(60) is None
    assert replicas.choose(40) is replica  # somebody who wrote earlier
    assert replicas.choose() is replica  # and who did not write at all
    clock.now += 0.11
    assert replicas.choose(50) is replica
    replica.was_behind(50)  # still: the next try comes later
    clock.now += 0.11
    assert replicas.choose(50) is None
    clock.now += 0.1
    assert replicas.choose(50) is replica
    replica.passed(50)
    assert replicas.choose(60) is replica
    assert not replica.state().is_behind
    for _ in range(20):  # short lags make short pauses
        replica.was_behind(70)
        clock.now += 0.01
        replica.passed(70)
    replica.was_behind(80)
    clock.now += 0.02
    assert replicas.choose(80) is replica


def test_l1_one_that_fails_is_left_out_for_a_while() -> None:
    clock = Clock()
    replicas = Replicas(an_engine("primary"), [an_engine("a"), an_engine("b")], clock=clock)
    a, b = replicas.members
    a.failed(lost=True)
    assert {replicas.choose() for _ in range(20)} == {b}
    assert a.state().is_down
    b.failed(lost=False)  # a statement that cannot run there
    assert replicas.choose() is b
    b.failed(lost=True)
    assert replicas.choose() is None
    clock.now += 1.1
    assert replicas.choose() is not None
    a.failed(lost=True)
    b.failed(lost=True)
    clock.now += 1.5
    assert replicas.choose() is None  # twice as long the second time
    clock.now += 1
    assert replicas.choose() is not None
    for _ in range(20):
        a.failed(lost=True)
    clock.now += 30
    assert a.may_have(0, clock())
    a.passed(0)
    a.failed(lost=True)
    clock.now += 1.1
    assert a.may_have(0, clock())


def test_l2_positions_grow_and_are_completed_by_one_look() -> None:
    one, other = an_engine("a"), an_engine("b")
    positions = Positions({one: 5})
    assert (positions[one], positions[other], positions.changed) == (5, 0, False)
    positions.raise_to(one, 3)
    assert positions[one] == 5
    positions.written(one, 7)
    positions.written(other, None)
    assert positions.needs_primary(other)
    assert not positions.needs_primary(one)
    asked: list[sa.Engine] = []

    def ask(engine: sa.Engine) -> int:
        asked.append(engine)
        return 9

    assert positions.complete(ask) == {one: 7, other: 9}
    assert positions.complete(ask) == {one: 7, other: 9}
    assert asked == [other]
    assert positions.changed


def test_l2_sessions_of_a_request_share_positions() -> None:
    first: dict[object, object] = {}
    second: dict[object, object] = {}
    assert positions_of(first) is positions_of(first)
    assert positions_of(first) is not positions_of(second)
    with using_positions(Positions()) as shared:
        assert positions_of(first) is positions_of(second) is shared
    assert positions_of(first) is not shared


def test_l1_intent() -> None:
    @on_primary()
    def inside() -> bool:
        return wants_primary()

    assert not wants_primary()
    assert inside()
    with on_primary(), on_primary():
        assert wants_primary()
    assert not wants_primary()


@pytest.fixture
def lite() -> Iterator[sa.Engine]:
    engine = sa.create_engine("sqlite://")
    yield engine
    engine.dispose()


def test_l1_an_engine_and_its_replicas(lite: sa.Engine) -> None:
    primary, replica = an_engine("primary"), an_engine()
    assert replicas_of(primary) is None
    set_replicas(primary, [replica])
    found = replicas_of(primary)
    assert found is not None
    assert [state.url.host for state in found.states()] == ["replica"]
    for other in (lite, sa.create_engine("postgresql+psycopg://replica/d")):
        with pytest.raises(ConfigurationError, match="same driver"):
            set_replicas(primary, [other])
    set_replicas(primary, [])
    assert replicas_of(primary) is None
