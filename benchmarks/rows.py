"""Many rows at a time. What each contender is asked is the fast way that its documentation shows."""

from __future__ import annotations

import datetime as dt
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert as pg_insert

from fictive.sqlalchemy import insert_many, upsert_many

from .peers import PLAIN, Peer
from .results import CORE, LOOPBACK, MERGE, Case, Result
from .timing import interleave

if TYPE_CHECKING:
    from .measurements import Bench

__all__ = ["INSERTS", "execute", "inserts", "upserts"]

Row = dict[str, Any]
INSERTS = "narrow rows"
_BATCH = 5000
_NOW = dt.datetime(2024, 1, 1, tzinfo=dt.timezone.utc)


def events(count: int) -> Iterator[Row]:
    """Narrow rows, made as they are asked for."""
    return ({"item_id": number, "note": f"note {number}"} for number in range(count))


def items(count: int, counter: int) -> Iterator[Row]:
    return (
        {"id": number, "name": f"item {number}", "state": "stored", "counter": counter, "made_at": _NOW}
        for number in range(1, count + 1)
    )


def inserts(bench: Bench) -> Result:
    result = Result(
        "insert_rows",
        "Rows inserted per second",
        "rows/s",
        higher_is_better=True,
        what=f"Rows of a number and a text, dicts from a generator, in one transaction: {bench.scale.many_rows:,} for "
        f"fictive and for COPY by the driver alone, {bench.scale.rows:,} for the others.",
    )
    with bench.peers(LOOPBACK) as contenders:
        works = {name: functools.partial(_INSERTS[name], peer) for name, peer in contenders.items()}

        def job(name: str) -> float:
            count = bench.scale.many_rows if name in ("fictive", "raw") else bench.scale.rows
            execute(contenders[name], "truncate event")
            return _per_second(works[name], events(count), count, contenders[name])

        jobs = {name: functools.partial(job, name) for name in works}
        found = interleave(jobs, bench.scale.row_rounds, bench.told(INSERTS))
        result.cases.append(Case(INSERTS, LOOPBACK, found))
        if "fictive" in contenders:
            execute(contenders["fictive"], "truncate event")
            taken = _memory_taken(lambda: job("fictive"))
            if taken is not None:
                result.notes.append(f"With fictive the process grew by {taken:.0f} MiB at most.")
    return result


def upserts(bench: Bench) -> Result:
    count, fewer = bench.scale.rows, max(1, bench.scale.rows // 20)
    result = Result(
        "upsert_rows",
        "Rows upserted per second",
        "rows/s",
        higher_is_better=True,
        what=f"{count:,} rows of five columns that are all there, of which one column changes, in one transaction. "
        f"Flask-SQLAlchemy by {MERGE}, for {fewer:,} of the rows, and by {CORE} with {_BATCH:,} rows at a time.",
    )
    with bench.peers(LOOPBACK) as contenders:
        for peer in contenders.values():
            execute(
                peer,
                f"insert into item select n, 'item ' || n, 'stored', 0, now() from generate_series(1, {count}) n"
                " on conflict do nothing",
            )
            execute(peer, "vacuum analyze item")
        works = {name: (_UPSERTS[name], contenders[name], count) for name in contenders}
        if PLAIN in contenders:
            works[MERGE] = (_merge, contenders[PLAIN], fewer)
        counter = itertools.count(1)

        def job(name: str) -> float:
            work, peer, rows = works[name]
            return _per_second(functools.partial(work, peer), items(rows, next(counter)), rows, peer)

        jobs = {name: functools.partial(job, name) for name in works}
        told = bench.told("upserts")
        found = interleave(jobs, bench.scale.row_rounds, lambda n, name: told(n, PLAIN if name == MERGE else name))
        merged = found.pop(MERGE, None)
        result.cases.append(Case(f"plain by {CORE}", LOOPBACK, found))
        if merged is not None:
            result.cases.append(Case(f"plain by {MERGE}", LOOPBACK, {**found, PLAIN: merged}))
    return result


def _per_second(work: Callable[[Iterable[Row]], object], rows: Iterable[Row], count: int, peer: Peer) -> float:
    with peer.work():
        start = time.perf_counter()
        work(rows)
        return count / (time.perf_counter() - start)


def execute(peer: Peer, statement: str) -> None:
    engine = sa.create_engine(
        sa.make_url(peer.setup.url).set(drivername=f"postgresql+{peer.setup.driver}"),
        isolation_level="AUTOCOMMIT",
        poolclass=sa.NullPool,
    )
    with engine.connect() as connection:
        connection.execute(sa.text(statement))


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    rows = iter(rows)
    while batch := list(itertools.islice(rows, _BATCH)):
        yield batch


def _memory_taken(work: Callable[[], object]) -> float | None:
    """By how many MiB the process grows at most, as the kernel sees it; None where it does not tell."""
    try:
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew
    except OSError:
        return None
    work()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return float(line.split()[1])
    raise OSError(name)


# Inserting


def _insert_core(peer: Any, rows: Iterable[Row]) -> None:
    for batch in _batches(rows):
        peer.session.execute(sa.insert(peer.models.event), batch)
    peer.session.commit()


def _insert_django(peer: Any, rows: Iterable[Row]) -> None:
    from django.db import transaction  # type: ignore[import-untyped]

    event = peer.models.Event
    with transaction.atomic(using=peer.alias):
        for batch in _batches(rows):
            event.objects.using(peer.alias).bulk_create([event(**row) for row in batch])


def _insert_fictive(peer: Any, rows: Iterable[Row]) -> None:
    insert_many(peer.session, peer.models.event, rows)


def _insert_raw(peer: Any, rows: Iterable[Row]) -> None:
    with peer._transaction() as cursor:
        _copy(cursor, "COPY event (item_id, note) FROM STDIN", ("item_id", "note"), rows)


def _copy(cursor: Any, statement: str, names: tuple[str, ...], rows: Iterable[Row]) -> None:
    """By the driver's own means, each row as it comes."""
    if hasattr(cursor, "copy_expert"):
        cursor.copy_expert(statement, _Lines(names, rows))
    else:
        with cursor.copy(statement) as copy:
            for row in rows:
                copy.write_row([row[name] for name in names])


class _Lines:
    """psycopg2 reads COPY's text from a file; this is one."""

    def __init__(self, names: tuple[str, ...], rows: Iterable[Row]) -> None:
        self._names = names
        self._rows = iter(rows)

    def read(self, size: int) -> str:
        lines = []
        for row in itertools.islice(self._rows, 200):
            lines.append("\t".join([_text(row[name]) for name in self._names]) + "\n")
        return "".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
    return "\\N" if value is None else str(value)


_INSERTS: dict[str, Callable[..., None]] = {
    PLAIN: _insert_core,
    "lite": _insert_core,
    "django": _insert_django,
    "raw": _insert_raw,
    "fictive": _insert_fictive,
}

# Upserting


def _upsert_core(peer: Any, rows: Iterable[Row]) -> None:
    insert = pg_insert(peer.models.item)
    values = {name: insert.excluded[name] for name in ("name", "state", "counter", "made_at")}
    statement = insert.on_conflict_do_update(index_elements=["id"], set_=values)
    for batch in _batches(rows):
        peer.session.execute(statement, batch)
    peer.session.commit()


def _merge(peer: Any, rows: Iterable[Row]) -> None:
    for row in rows:
        peer.session.merge(peer.models.item(**row))
    peer.session.commit()


def _upsert_django(peer: Any, rows: Iterable[Row]) -> None:
    from django.db import transaction  # type: ignore[import-untyped]

    item = peer.models.Item
    with transaction.atomic(using=peer.alias):
        for batch in _batches(rows):
            item.objects.using(peer.alias).bulk_create(
                [item(**row) for row in batch],
                update_conflicts=True,
                unique_fields=["id"],
                update_fields=["name", "state", "counter", "made_at"],
            )


def _upsert_fictive(peer: Any, rows: Iterable[Row]) -> None:
    upsert_many(peer.session, peer.models.item, rows, key="id")


def _upsert_raw(peer: Any, rows: Iterable[Row]) -> None:
    names = ("id", "name", "state", "counter", "made_at")
    with peer._transaction() as cursor:
        cursor.execute("CREATE TEMPORARY TABLE staged ON COMMIT DROP AS SELECT * FROM item WITH NO DATA")
        _copy(cursor, f"COPY staged ({', '.join(names)}) FROM STDIN", names, rows)
        cursor.execute(
            "INSERT INTO item SELECT * FROM staged ON CONFLICT (id) DO UPDATE SET "
            + ", ".join(f"{name} = excluded.{name}" for name in names[1:])
        )


_UPSERTS: dict[str, Callable[..., None]] = {
    PLAIN: _upsert_core,
    "lite": _upsert_core,
    "django": _upsert_django,
    "raw": _upsert_raw,
    "fictive": _upsert_fictive,
}
