"""Each rule of docs/contract.rst has a test that carries its number, and each number in a test's name is a rule's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.any_sqlalchemy

ROOT = Path(__file__).resolve().parent.parent


def rules() -> list[str]:
    text = (ROOT / "docs" / "contract.rst").read_text(encoding="utf-8")
    return re.findall(r"^   ([A-M]\d+b?)\n      ", text, re.MULTILINE)


def numbers_in_names() -> dict[str, str]:
    """The rules in tests' names, in lower case, each with a test that has it."""
    found = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for name in re.findall(r"def test_((?:[a-m]\d+b?_)+\w+)", path.read_text(encoding="utf-8")):
            for rule in re.match(r"(?:[a-m]\d+b?_)+", name)[0].rstrip("_").split("_"):  # type: ignore[index]
                found[rule] = f"{path.name}: test_{name}"
    return found


def test_rules_stand_once_and_in_order() -> None:
    found = rules()
    assert len(found) > 80
    assert len(set(found)) == len(found)
    for letter in sorted({rule[0] for rule in found}):
        numbers = [int(rule[1:]) for rule in found if rule[0] == letter and rule[1:].isdigit()]
        assert numbers == list(range(1, len(numbers) + 1)), letter


def test_each_rule_has_a_test() -> None:
    names = numbers_in_names()
    assert [rule for rule in rules() if rule.lower() not in names] == []


def test_each_number_in_a_tests_name_is_a_rules() -> None:
    known = {rule.lower() for rule in rules()}
    assert {rule: test for rule, test in numbers_in_names().items() if rule not in known} == {}
