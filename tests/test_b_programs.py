"""Contract B1, B4, B5: random programs of blocks, savepoints, hooks and errors, compared with a small model.

The same programs for each run, on an opt-in and on a plain session: which rows stay, which hooks run and in which
order, and whether an error comes out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from fictive.sqlalchemy import Rollback, on_commit, on_rollback, transaction
from tests.models import Tag

Step = tuple[Any, ...]
Program = list[Step]
Look = Callable[..., list[Any]]


class Raised(Exception):
    """By the program itself."""


def program(dice: random.Random, depth: int = 0) -> Program:
    steps: Program = []
    for _ in range(dice.randint(1, 4)):
        chance = dice.random()
        if chance < 0.45:
            steps.append((dice.choice(("insert", "on_commit", "on_rollback")),))
        elif chance < 0.75 and depth < 4:
            steps.append(("block", dice.random() < 0.7, program(dice, depth + 1)))
        elif chance < 0.85 and depth < 4:
            steps.append(("try", program(dice, depth + 1)))
        elif chance < 0.9:
            steps.append(("failing flush",))
        elif chance < 0.95:
            steps.append(("raise",))
        else:
            steps.append(("Rollback", dice.randrange(3)))
    return steps


@dataclasses.dataclass
class Block:
    """What the model knows of a transaction or savepoint."""

    rows: list[int] = dataclasses.field(default_factory=list)
    hooks: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    is_over: bool = False


class Undo(Exception):
    """The model's `Rollback`."""

    def __init__(self, block: Block) -> None:
        self.block = block


class Model:
    """What should happen."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.ran: list[tuple[str, int]] = []
        self.blocks: list[Block] = []
        self.n = 0

    def run(self, steps: Program) -> None:
        for step in steps:
            self.n += 1
            if self.blocks and self.blocks[-1].is_over:
                raise Raised  # after a flush that failed nothing can run in its block
            self.step(step)

    def step(self, step: Step) -> None:
        what, n = step[0], self.n
        block = self.blocks[-1] if self.blocks else None
        if what == "block":
            self.block(*step[1:])
        elif what == "try":
            with contextlib.suppress(Raised):
                self.run(step[1])
        elif what == "raise":
            raise Raised
        elif block is None:
            return
        elif what == "insert":
            block.rows.append(n)
        elif what == "failing flush":
            block.is_over = True
            raise Raised
        elif what == "Rollback":
            raise Undo(self.blocks[-1 - step[1] % len(self.blocks)])
        else:
            block.hooks.append((what, n))

    def block(self, savepoint: bool, body: Program) -> None:
        if self.blocks and not savepoint:
            self.blocks.append(self.blocks[-1])
            try:
                self.run(body)
            finally:
                self.blocks.pop()
            return
        block = Block()
        self.blocks.append(block)
        try:
            self.run(body)
            if block.is_over:
                raise Raised
        except (Raised, Undo) as error:
            self.blocks.pop()
            self.ran += [hook for hook in block.hooks if hook[0] == "on_rollback"]
            if isinstance(error, Undo) and error.block is block:
                return
            raise
        self.blocks.pop()
        if self.blocks:
            self.blocks[-1].rows += block.rows
            self.blocks[-1].hooks += block.hooks
        else:
            self.rows += block.rows
            self.ran += [hook for hook in block.hooks if hook[0] == "on_commit"]


class Run:
    """What happens."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.ran: list[tuple[str, int]] = []
        self.blocks: list[Any] = []
        self.n = 0

    def run(self, steps: Program) -> None:
        for step in steps:
            self.n += 1
            if self.blocks and not self.blocks[-1].is_active:
                raise Raised
            self.step(step)

    def step(self, step: Step) -> None:
        what, n, session = step[0], self.n, self.session
        if what == "block":
            with transaction(session, savepoint=step[1]) as block:
                self.blocks.append(block)
                try:
                    self.run(step[2])
                finally:
                    self.blocks.pop()
        elif what == "try":
            with contextlib.suppress(Raised, sa.exc.SQLAlchemyError):
                self.run(step[1])
        elif what == "raise":
            raise Raised
        elif not self.blocks:
            return
        elif what in ("insert", "failing flush"):
            session.add(Tag(label=str(n) if what == "insert" else "taken"))
            session.flush()
        elif what == "Rollback":
            raise Rollback(self.blocks[-1 - step[1] % len(self.blocks)])
        elif what == "on_commit":
            on_commit(session, self.ran.append, (what, n))
        else:
            on_rollback(session, self.ran.append, (what, n))


@pytest.mark.parametrize("seed", range(2))
def test_b5_programs_of_blocks_and_hooks(seed: int, session: Any, app: Flask, look: Look) -> None:
    dice = random.Random(seed)
    for _ in range(30):
        steps = program(dice)
        look("delete from tag")
        look("insert into tag (label) values ('taken')")
        model, run = Model(), Run(session)
        try:
            model.run(steps)
            expected = None
        except Raised:
            expected = Raised
        try:
            run.run(steps)
            error = None
        except (Raised, sa.exc.SQLAlchemyError):
            error = Raised
        session.rollback()
        assert (error, run.ran) == (expected, model.ran), steps
        assert look("select label::int from tag where label <> 'taken' order by 1") == sorted(model.rows), steps
