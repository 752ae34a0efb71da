"""`flask fictive doctor --code` (rule J2): what is found by reading an app's source."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import pytest
from click.testing import CliRunner
from flask import Flask

from fictive.__main__ import main
from fictive.command_line.doctor_code import code_findings
from tests.models import opt_in

pytestmark = pytest.mark.any_sqlalchemy


def checks(tmp_path: Path, source: str, mode: str = "commit") -> list[tuple[str, str, int]]:
    """Check, severity and line of each finding, without views that have one write."""
    (tmp_path / "app.py").write_text(textwrap.dedent(source), encoding="utf-8")
    return [
        (each.check, each.severity.value, int(each.what.split(":")[1]))
        for each in code_findings(tmp_path, (), mode)
        if each.check != "commit-in-view"
    ]


VIEW = "@app.post('/')\ndef view(id):\n"


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("Thing.query.delete()\ndb.session.add(Thing())\ndb.session.commit()", ("split-writes", 3)),
        ("db.session.execute(sa.update(Thing))\ndb.session.execute(text('DELETE FROM t'))", ("split-writes", 3)),
        ("db.session.add(a)\ndb.session.flush()\ndb.session.add(b)\ndb.session.commit()", ("split-writes", 4)),
        ("for x in y:\n    db.session.execute(update(Thing))\ndb.session.commit()", ("split-writes", 4)),
        ("x = db.session.get(Thing, id)\nx.n = 1\ndb.session.execute(insert(L))\ndb.session.commit()",
         ("split-writes", 5)),
        ("x = Thing.query.first()\nif not x:\n    x = Thing()\n    db.session.add(x)\n    db.session.flush()\n"
         "x.n += 1\ndb.session.commit()", ("split-writes", 7)),
        ("rows = sa.insert(Thing)\ndb.session.execute(rows)\ndb.session.scalars(rows)", ("split-writes", 4)),
        ("if x:\n    session.execute(insert(T))\n    session.execute(insert(U))", ("split-writes", 4)),
        ("try:\n    session.execute(insert(T))\n    session.commit()\nexcept E:\n    session.rollback()",
         ("rollback-too-late", 7)),
        ("db.session.add(Thing())\nfound = Thing.query.all()\ndb.session.commit()", ("no-autoflush", 4)),
        ("db.session.get(Thing, 1, with_for_update=True)", ("needs-transaction", 3)),
        ("db.session.scalars(select(Thing).with_for_update())", ("needs-transaction", 3)),
        ("Thing.query.with_for_update().first()", ("needs-transaction", 3)),
        ("rows = select(Thing)\ndb.session.scalars(db.claim(rows))", ("needs-transaction", 4)),
        ("db.session.execute(text('SET LOCAL lock_timeout = 1'))", ("needs-transaction", 3)),
        ("db.session.connection()", ("needs-transaction", 3)),
        ("with db.session.begin():\n    db.session.add(x)\n    db.session.commit()", ("commit-in-block", 5)),
        ("with db.transaction():\n    requests.post(url)", ("slow-call-in-block", 4)),
        ("event.listen(db.session, 'after_begin', f)", ("listener", 3)),
        ("s = db.session\ns.execute(insert(T))\ns.execute(insert(U))\ns.commit()", ("split-writes", 4)),
        ("x: Thing = db.session.get(Thing, id)\nx.n = 1\ndb.session.flush()\nx.n = 2\ndb.session.commit()",
         ("split-writes", 5)),
        ("if (x := db.session.get(Thing, id)):\n    x.n = 1\n    db.session.flush()\n    x.n = 2\ndb.session.commit()",
         ("split-writes", 5)),
        ("[db.session.execute(insert(T).values(n=n)) for n in m]\ndb.session.commit()", ("split-writes", 3)),
        ("try:\n    session.execute(insert(T))\n    session.commit()\nexcept* E:\n    session.rollback()",
         ("rollback-too-late", 7)),
    ],
)  # fmt: skip
def test_j2_a_view_is_read(tmp_path: Path, body: str, found: tuple[str, int]) -> None:
    severe = [each for each in checks(tmp_path, VIEW + textwrap.indent(body, "    ")) if each[1] != "info"]
    assert [(check, line) for check, _, line in severe] == [found]


@pytest.mark.parametrize(
    "body",
    [
        "return Thing.query.all()",
        "db.session.add_all([a, b])\ndb.session.commit()",
        "Thing.query.delete()\ndb.session.commit()",
        "db.session.execute(update(Thing))\ndb.session.commit()\ndb.session.execute(update(Thing))\ndb.session.commit()",
        "if x:\n    db.session.execute(insert(T))\nelse:\n    db.session.execute(insert(U))\ndb.session.commit()",
        "if x:\n    db.session.execute(insert(T))\n    return\ndb.session.execute(insert(U))",
        "with db.session.begin():\n    Thing.query.delete()\n    db.session.add(Thing())",
        "try:\n    db.session.add(Thing())\n    db.session.commit()\nexcept E:\n    db.session.rollback()",
        "db.wait_for_rows(db.claim(select(Thing)))",
        "statement = select(Thing).with_for_update()",
        "session['user'] = 1\nsession.update(a=1)\nsession.pop('user')",
        "requests.get(url)",
        "response.status_code = 201\ndb.session.commit()",
        "on_commit(lambda: requests.post(url))",
        "event.listen(Thing, 'before_insert', f)",
    ],
)
def test_j2_what_is_fine_is_not_named(tmp_path: Path, body: str) -> None:
    assert checks(tmp_path, VIEW + textwrap.indent(body, "    ")) == []


SPLIT = VIEW + "    Thing.query.delete()\n    db.session.add(Thing())\n    db.session.commit()\n"


@pytest.mark.parametrize(
    ("mode", "found"),
    [
        ("commit", [("split-writes", "warning", 3)]),
        ("begin", [("split-writes", "info", 3)]),
        ("report", [("split-writes", "info", 3)]),
        ("refuse", [("write-outside", "error", 3)]),
    ],
)
def test_j2_the_setting_decides_how_bad_it_is(tmp_path: Path, mode: str, found: list[object]) -> None:
    assert checks(tmp_path, SPLIT, mode) == found


def test_j2_a_class_based_view_is_a_view(tmp_path: Path) -> None:
    body = "        Thing.query.delete()\n        db.session.add(Thing())\n        db.session.commit()\n"
    method = f"    def post(self):\n{body}"
    assert checks(tmp_path, f"class Page(MethodView):\n{method}") == [("split-writes", "warning", 3)]
    assert checks(tmp_path, f"class Client:\n{method}") == [("split-writes", "info", 3)]


def test_j2_views_with_one_write_are_listed(tmp_path: Path) -> None:
    view = VIEW + "    db.session.add(Thing())\n    db.session.commit()\n"
    (tmp_path / "app.py").write_text(view + view, encoding="utf-8")
    found = [(each.check, each.severity.value, each.what) for each in code_findings(tmp_path)]
    assert found == [("commit-in-view", "info", "app.py: views that commit one write (lines 4, 8).")]


def test_j2_a_helper_goes_by_its_callers(tmp_path: Path) -> None:
    helper = "def helper():\n    db.session.execute(insert(T))\n    db.session.execute(insert(U))\n"
    assert checks(tmp_path, helper) == [("split-writes", "info", 2)]
    caller = VIEW + "    with db.session.begin():\n        helper()\n"
    assert checks(tmp_path, helper + caller) == []
    decorated = "@db.transactional\n" + VIEW.partition("\n")[2] + "    helper()\n"
    assert checks(tmp_path, helper + decorated) == []
    assert checks(tmp_path, helper + caller + VIEW + "    helper()\n") == [("split-writes", "warning", 2)]


def test_j2_a_query_in_a_helper_is_a_query(tmp_path: Path) -> None:
    helper = "def count():\n    return db.session.scalar(select(func.count()))\n"
    view = VIEW + "    db.session.delete(x)\n    x.total = count()\n    db.session.commit()\n"
    assert checks(tmp_path, helper + view) == [("no-autoflush", "warning", 6)]
    assert checks(tmp_path, helper + view.replace("delete(x)", "flush()")) == []


def test_j2_tests_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "helper.py").write_text(SPLIT, encoding="utf-8")
    assert checks(tmp_path, "") == []


def test_j2_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    files = {
        "broken.py": b"def (",
        "bytes.py": b"x = '\xe9'\n",
        "zero.py": b"x = 1\0\n",
        "deep.py": b"x = a" + b".b()" * 5000,
        "deeper.py": b"x = " + b"(" * 3000 + b")" * 3000,
        "python2.py": b"print 'x'\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_bytes(text)
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    (tmp_path / "warns.py").write_text("x = '\\d'\nx is 'a'\n", encoding="utf-8")
    found = list(code_findings(tmp_path))
    assert {(each.check, each.severity.value) for each in found} == {("not-read", "info")}
    assert sorted(each.what.split(":")[0] for each in found) == sorted(files)
    assert "line 1" in next(each.what for each in found if each.what.startswith("broken.py"))


def test_j2_a_file_is_read_once_and_a_pipe_never(tmp_path: Path) -> None:
    (tmp_path / "link.py").symlink_to("app.py")
    (tmp_path / "nowhere.py").symlink_to("nothing")
    (tmp_path / "loop").symlink_to(".")
    os.mkfifo(tmp_path / "pipe.py")
    assert len(checks(tmp_path, SPLIT)) == 1


def test_j2_the_command_reads_without_a_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "views.py").write_text(SPLIT, encoding="utf-8")
    result = CliRunner().invoke(main, ["doctor", "--code"])
    assert result.exit_code == 1
    assert result.stdout.startswith("warning split-writes: views.py:3: view() writes in 2 steps (lines 3, 5)")

    app = Flask("views", root_path=str(tmp_path))
    app.config["SQLALCHEMY_DATABASE_URI"] = "postgresql+psycopg2://nobody@127.0.0.1:1/nothing"
    app.config["FICTIVE_WRITES_OUTSIDE"] = "begin"
    opt_in.db.init_app(app)
    result = app.test_cli_runner().invoke(args=["fictive", "doctor", "--code"])
    assert result.exit_code == 0, result.output
    assert "info    split-writes: views.py:3" in result.stdout
    assert result.stdout.rstrip().endswith("Nothing is wrong.")
