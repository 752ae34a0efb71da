"""The Python in README.md and docs/ runs, and the SQL shown there is what goes over the wire."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from fictive import errors, flask_sqlalchemy, migrations, models
from fictive import sqlalchemy as fictive_sqlalchemy
from fictive.config import Settings, setting_name
from tests.docs_runner import DocsError, read_blocks, run_page

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [
    page
    for page in sorted(ROOT.glob("docs/**/*.rst"))
    if "_build" not in page.parts and any(block.kind == "python" for block in read_blocks(page))
]


@pytest.fixture
def page_wire(database_url: str, wire: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The wire, with DATABASE_URL leading through it and files of a page going elsewhere."""
    if sa.make_url(database_url).get_backend_name() != "postgresql":
        pytest.skip("the docs are about PostgreSQL")
    monkeypatch.setenv("DATABASE_URL", wire.url(database_url))
    monkeypatch.chdir(tmp_path)
    return wire


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_page_runs_and_shows_what_is_sent(
    page: Path, database_url: str, page_wire: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPLICA_URL", database_url)  # a replica that is never behind
    if "POOLER_URL" in page.read_text(encoding="utf-8"):
        monkeypatch.setenv("POOLER_URL", request.getfixturevalue("pooler").url(database_url))
        monkeypatch.setenv("DIRECT_URL", database_url)
    compare = sa.make_url(database_url).get_driver_name() == "psycopg2"
    with run_page(page, page_wire, compare_sql=compare):
        pass


def test_every_setting_is_on_the_page_configuration() -> None:
    text = (ROOT / "docs" / "configuration.rst").read_text(encoding="utf-8")
    settings = [setting_name(each.name) for each in dataclasses.fields(Settings)]
    assert [name for name in settings if f"``{name}``\n" not in text] == []


def test_the_defaults_on_the_page_configuration_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "configuration.rst").read_text(encoding="utf-8")
    rows = re.findall(r"\* - ``(FICTIVE_\w+)``\n +- ``(.+)``\n", text)
    shown = {name: eval(value, {"range": range}) for name, value in rows}
    assert Settings.from_mapping(shown) == Settings()


@pytest.mark.parametrize("module", [flask_sqlalchemy, migrations, models, fictive_sqlalchemy])
def test_the_reference_has_every_public_name(module: Any) -> None:
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.rst")]
    words = set(re.findall(r"\w+", "\n".join(pages)))
    assert set(module.__all__) - words == set()


def test_what_the_docs_name_is_there() -> None:
    """Files of this repository, modules that are run, and the commands of `./run`."""
    pages = [README, ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.rst"), *ROOT.glob("examples/*/README.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    found = re.findall(r"`((?:benchmarks|docs|examples|fictive|tests)/[\w./-]*\w)`", text)
    files = [each for each in found if not each.startswith("docs/_build/")]  # made by `./run docs`
    modules = re.findall(r"python -m ((?:benchmarks|examples|fictive|tests)[\w.]*\w)", text)
    paths = [*files, *(f"{each.replace('.', '/')}.py" for each in modules)]
    gone = [each for each in paths if not ((ROOT / each).exists() or (ROOT / each.removesuffix(".py")).is_dir())]
    commands = set(re.findall(r"\./run ([a-z][\w-]*)", text))
    known = set(re.findall(r'^    "([\w-]+)": \(', (ROOT / "run").read_text(encoding="utf-8"), re.MULTILINE))
    assert (gone, commands - known) == ([], set())


def test_a26_the_session_has_no_public_names_but_sqlalchemys_and_documented_ones() -> None:
    text = (ROOT / "docs" / "reference" / "session.rst").read_text(encoding="utf-8")
    members = re.search(r"OptInSession\n   :members:(.*?)\n\n", text, re.DOTALL)
    assert members
    documented = {name.strip() for name in members[1].split(",")}
    engine = sa.create_engine("sqlite://", poolclass=sa.NullPool)
    with fictive_sqlalchemy.OptInSession(engine) as ours, sa.orm.Session(engine) as theirs:
        own = {name for name in set(dir(ours)) - set(dir(theirs)) if not name.startswith("_")}
    assert own - documented == set()


def test_the_reference_has_every_error() -> None:
    text = (ROOT / "docs" / "reference" / "errors.rst").read_text(encoding="utf-8")
    assert [name for name in errors.__all__ if not re.search(rf"^ +{name}( \(|$)", text, re.MULTILINE)] == []


def test_every_error_is_on_the_page_messages() -> None:
    text = (ROOT / "docs" / "messages.rst").read_text(encoding="utf-8")
    bases = {"FictiveError", "FictiveWarning"}
    assert [name for name in errors.__all__ if name not in bases and f"\n``{name}``\n~~" not in text] == []


def test_readme_quick_start(tmp_path: Path, page_wire: Any) -> None:
    """Extracted as a reader would copy it, then used: GET is one round trip, PATCH is atomic."""
    text = README.read_text(encoding="utf-8")
    match = re.search(r"<!-- quick-start -->\n(.*?)<!-- /quick-start -->", text, re.DOTALL)
    assert match is not None
    page = tmp_path / "quick_start.md"
    page.write_text(match[1], encoding="utf-8")
    assert sum(1 for line in match[1].splitlines() if line.strip()) <= 32  # "30-line", the fence too

    with run_page(page, page_wire) as namespace:
        app, db, thing = namespace["app"], namespace["db"], namespace["Thing"]
        client = app.test_client()
        with app.app_context():
            db.session.add(thing(id=1, name="first"))
            db.session.commit()

        with page_wire.record() as log:
            assert client.get("/things/1").json == {"id": 1, "name": "first", "edits": 0}
        assert len(log.statements) == 1
        assert log.statements[0].startswith("SELECT")
        assert log.round_trips == 1

        changed = client.patch("/things/1", json={"name": "second"})
        assert changed.json == {"id": 1, "name": "second", "edits": 1}
        assert client.get("/things/1").json == changed.json
        assert client.get("/things/2").status_code == 404

        refused = client.patch("/things/1", json={"name": None})
        assert refused.status_code == 500
        assert client.get("/things/1").json == changed.json


# The runner itself, without a database


@dataclass
class Log:
    statements: list[str] = field(default_factory=list)

    @property
    def round_trips(self) -> int:
        return len(self.statements)


class FakeWire:
    """What a page sends is what it passes to `send`, a name given to it."""

    def __init__(self) -> None:
        self.log = Log()

    @contextlib.contextmanager
    def record(self) -> Iterator[Log]:
        self.log = Log()
        yield self.log

    def send(self, statement: str) -> None:
        self.log.statements.append(statement)


def run_text(tmp_path: Path, text: str, name: str = "page.rst") -> dict[str, Any]:
    page = tmp_path / name
    page.write_text(text, encoding="utf-8")
    wire = FakeWire()
    with run_page(page, wire, given={"send": wire.send}) as namespace:
        return dict(namespace)


def test_runner_shares_one_namespace_and_runs_hidden_blocks(tmp_path: Path) -> None:
    namespace = run_text(
        tmp_path,
        """\
.. run: hidden

   total = 1

Text.

   .. code-block:: python
      :caption: nested in a list

      for n in (1, 2):
          total += n

          total += n

.. code-block:: console

   not python

.. run: skip because it is only for show
.. code-block:: python

   raise SystemExit
""",
    )
    assert namespace["total"] == 7


def test_runner_compares_what_was_sent(tmp_path: Path) -> None:
    run_text(
        tmp_path,
        """\
.. code-block:: python

   send("BEGIN;SELECT a,\\n b FROM t WHERE id = 1 ;")
   send("COMMIT")

.. wire:: 2 round trips

   BEGIN; SELECT …
     WHERE id = 1    -- one message
   -- and then
   COMMIT

.. code-block:: python

   pass

.. wire:: nothing
""",
    )


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        (".. wire::\n\n   SELECT 2", "another happened"),
        (".. wire::\n\n   SELECT 1\n   SELECT 1", "another happened"),
        (".. wire:: 2 round trips\n\n   SELECT 1", "1 round trips, the page says 2"),
        (".. wire:: one\n\n   SELECT 1", "is not `N round trips`"),
        (".. wire:: nothing", "another happened"),
        (".. wire::\n", "no statements"),
        (".. run: output\n.. code-block:: text\n\n   hello", "another happened"),
        (".. run: raises KeyError\n.. code-block:: python\n\n   pass", "was not raised"),
        (".. run: raises KeyError: x\n.. code-block:: python\n\n   {}['y']", "not in the message"),
        (".. run: skip\n.. code-block:: python\n\n   pass", "`run: skip`"),
        (".. run: skip this\n\nText.", "no block follows"),
    ],
)
def test_runner_reports_a_page_that_is_wrong(tmp_path: Path, shown: str, message: str) -> None:
    text = f'.. code-block:: python\n\n   send("SELECT 1")\n\n{shown}\n'
    with pytest.raises(DocsError, match=re.escape(message)) as caught:
        run_text(tmp_path, text)
    assert str(caught.value).startswith("page.rst:")


def test_runner_checks_output_and_exceptions(tmp_path: Path) -> None:
    run_text(
        tmp_path,
        """\
.. code-block:: python

   print("2 rows in 13 ms")

.. run: output
.. code-block:: text

   2 rows in … ms

.. run: raises LookupError: 'y'
.. code-block:: python

   {}["y"]
""",
    )


def test_runner_shows_the_line_of_the_page(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run_text(tmp_path, "Title\n\n```python\nx = 1\nx / 0\n```\n", "page.md")
    assert caught.traceback[-1].lineno == 4  # counted from 0: the page's fifth line
