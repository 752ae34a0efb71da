"""What a lazy load does: one query, one for all of its kind, or an error; and who does too many, by line of code.

A session keeps its policy in `info`. One handler of `do_orm_execute`, attached when the first policy is set, looks at
the SELECTs that SQLAlchemy sends for a relationship of an object; all others pass it by.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from ..config import LazyLoads, NPlusOne, choice
from ..connection.block_variables import BlockVariable
from ..errors import LazyLoadRefused, NPlusOneError, NPlusOneWarning
from ..session import private
from ..session.callers import caller, stack_level
from ..session.session import OptInSession
from ..session.unentered import needs_with
from . import batch_loading

__all__ = ["THRESHOLD", "allow_lazy_loads", "set_lazy_loads"]

THRESHOLD = 5
"""How many objects of one query may load the same relationship one by one, from one line, before it is reported."""

_POLICY = "fictive.lazy_loads"
_SEEN = "fictive.lazy_loads.seen"
_MOST_SEEN = 1000

_allowed = BlockVariable("fictive.lazy_loads.allowed", False)


@dataclasses.dataclass(frozen=True)
class _Policy:
    lazy_loads: LazyLoads
    n_plus_one: NPlusOne


def set_lazy_loads(
    target: Any, lazy_loads: LazyLoads | str = LazyLoads.LOAD, *, n_plus_one: NPlusOne | str = NPlusOne.OFF
) -> None:
    """Say what lazy loads do in `target`: a session, a `scoped_session` (its current one), or a `sessionmaker`.

    `lazy_loads`
        `"load"`: one query each. `"batch"`: the first one on an object loads the relationship for all objects of the
        same query that are still in the session, in one statement for each 500 of them. `"raise"`: `LazyLoadRefused`.
    `n_plus_one`
        what happens when one line of code loads a relationship one by one on more than `THRESHOLD` objects of one
        query: `"off"`, `"warn"` (`NPlusOneWarning`, once for each line and query) or `"raise"` (`NPlusOneError`).

    In Flask apps `FICTIVE_LAZY_LOADS` and `FICTIVE_N_PLUS_ONE`. Nothing is sent.
    """
    policy = _Policy(choice(LazyLoads, lazy_loads, "lazy_loads"), choice(NPlusOne, n_plus_one, "n_plus_one"))
    if isinstance(target, sa_orm.scoped_session):
        target = target()
    if isinstance(target, sa_orm.sessionmaker):
        target.configure(info={**target.kw.get("info", {}), _POLICY: policy})
    else:
        target.info[_POLICY] = policy
    # on opt-in sessions once for all: listening on each new one would cost more than looking at its policy
    listening = OptInSession if isinstance(target, OptInSession) else target
    private.listen_once(listening, "do_orm_execute", _look_at)


@needs_with("allow_lazy_loads()")
def allow_lazy_loads() -> Iterator[None]:
    """Within the block lazy loads are neither refused nor reported: it is known, and meant."""
    with _allowed.set(True):
        yield


def _look_at(state: sa_orm.ORMExecuteState) -> sa.Result[Any] | None:
    if not state.is_select or not state.is_relationship_load:
        return None
    private.rest_of_a_stream(state)
    parent = state.lazy_loaded_from
    if parent is None:
        return None
    policy = state.session.info.get(_POLICY)
    relationship = private.relationship_of_load(state)
    if policy is None or relationship is None:
        return None
    allowed = _allowed.get()
    if policy.lazy_loads is LazyLoads.RAISE and not allowed:
        raise LazyLoadRefused(
            f'{relationship} is not loaded, and lazy loads are refused here (lazy_loads = "raise"). Load it with its '
            f"objects, .options(selectinload({relationship})), or put the line in `with allow_lazy_loads():`."
        )
    if policy.lazy_loads is LazyLoads.BATCH:
        result = batch_loading.load_for_all(state, parent, relationship)
        if result is not None:
            return result
    if policy.n_plus_one is not NPlusOne.OFF and not allowed:
        _count(state.session, relationship, private.load_run(parent), policy.n_plus_one)
    return None


def _count(
    session: sa_orm.Session, relationship: sa_orm.RelationshipProperty[Any], run: int, action: NPlusOne
) -> None:
    seen: Counter[Any] = session.info.setdefault(_SEEN, Counter())
    if len(seen) > _MOST_SEEN:  # a session that lives long; what is under way begins again
        seen.clear()
    line = caller()
    key = (relationship, line, run)
    seen[key] += 1
    if seen[key] <= THRESHOLD or (seen[key] > THRESHOLD + 1 and action is NPlusOne.WARN):
        return
    message = (
        f"{line} loads {relationship} one by one, on more than {THRESHOLD} objects of one query. Load it with them: "
        f'.options(selectinload({relationship})), or for all at once with lazy_loads = "batch".'
    )
    if action is NPlusOne.RAISE:
        raise NPlusOneError(message)
    warnings.warn(NPlusOneWarning(message), stacklevel=stack_level())
