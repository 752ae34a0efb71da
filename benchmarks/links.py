"""Setting many links of which few change."""

from __future__ import annotations

import functools
import gc
from typing import TYPE_CHECKING

import sqlalchemy as sa

from .peers import Peer
from .results import LOOPBACK, Case, Result
from .timing import interleave, seconds_each

if TYPE_CHECKING:
    from .measurements import Bench

CHANGED = 100  # one in that many


def links(bench: Bench) -> Result:
    count = bench.scale.links
    result = Result(
        "links",
        f"Setting {count:,} many-to-many links of which {count // CHANGED} change",
        "ms",
        higher_is_better=False,
        what="All tags of an object are set to others, most of which it has: by their keys, where Flask-SQLAlchemy "
        "has to load the tags to assign them; and tags that are loaded already.",
        digits=1,
    )

    def by_key(peer: Peer) -> float:
        with peer.work():
            return seconds_each(peer.set_links, 1) * 1000  # type: ignore[attr-defined]

    def loaded(peer: Peer) -> float:
        with peer.work():
            replace = peer.replace_links()  # type: ignore[attr-defined]
            gc.collect()  # loading ten thousand objects has made a whole collection due
            return seconds_each(replace, 1) * 1000

    with bench.peers(LOOPBACK) as contenders:
        for peer in contenders.values():
            peer.links = (count, count // CHANGED)
            _add_tags(bench, peer, count + count // CHANGED)
        for label, job in (("by key", by_key), ("loaded", loaded)):
            jobs = {name: functools.partial(job, peer) for name, peer in contenders.items()}
            for warm in [*jobs.values()] * 2:
                warm()
            found = interleave(jobs, min(10, bench.scale.rounds), bench.told(label), generation=2)
            result.cases.append(Case(label, LOOPBACK, found))
    return result


def _add_tags(bench: Bench, peer: Peer, until: int) -> None:
    engine = sa.create_engine(bench.databases.url(peer.name).replace("postgresql:", f"postgresql+{bench.driver}:"))
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "insert into tag (id, name) overriding system value"
                " select n, 'one more ' || n from generate_series(1, :until) n on conflict do nothing"
            ),
            {"until": until},
        )
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(sa.text("vacuum analyze tag, item_tag"))
    engine.dispose()
