"""The benchmarks measure what they say. Tiny runs, for real; nothing here depends on how fast anything is."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from benchmarks import calls, cleanup, cost, counts, hooks, instructions, peers, plots, queue, report, sandbox, timing
from benchmarks.__main__ import main
from benchmarks.measurements import MEASUREMENTS, SMOKE, Bench, round_trip
from benchmarks.peers import Setup
from benchmarks.proxy import ROOT, delayed
from benchmarks.results import (
    BATCH,
    BY_HAND,
    CALLS,
    DELAYED,
    DETECTOR,
    INSTRUCTIONS,
    KEYSET,
    LOOPBACK,
    NO_COLUMNS,
    Case,
    Cost,
    Counts,
    Result,
    Run,
    targets,
)
from benchmarks.schema import Databases
from benchmarks.timing import Crew, Progress, Spread, interleave, ratios
from benchmarks.work import PEERS, WORK
from fictive.testing.postgres import Server
from fictive.testing.wire import Wire

pytestmark = pytest.mark.any_sqlalchemy

TINY = dataclasses.replace(SMOKE, latency_requests=2, objects=50)


# Rounds and samples


def test_contenders_take_turns_and_each_round_is_begun_by_another() -> None:
    order: list[str] = []
    told: list[tuple[int, str]] = []

    def job(name: str) -> int:
        order.append(name)
        return len(order)

    jobs = {name: functools.partial(job, name) for name in ("a", "b", "c")}
    found = interleave(jobs, 3, lambda number, name: told.append((number, name)))
    assert order == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert found == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}
    assert told == [(index // 3, name) for index, name in enumerate(order)]


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    assert Spread.of([5, 1, 3, 2, 4]) == Spread(2, 3, 4)
    assert Spread.of([7]) == Spread(7, 7, 7)


def test_ratios_are_of_samples_of_the_same_round_and_more_is_better() -> None:
    # Everything slows down to half in the second round, for both: the ratio stays.
    assert ratios([300, 150], [100, 50], higher_is_better=True) == Spread(3, 3, 3)
    assert ratios([10, 20], [30, 60], higher_is_better=False) == Spread(3, 3, 3)


def test_a_crew_works_at_the_same_time_and_its_threads_stay() -> None:
    import threading

    together = threading.Barrier(4)
    crew = Crew(4)
    try:
        seconds, first = crew.run(lambda: (together.wait(10), threading.get_ident())[1])
        _, second = crew.run(threading.get_ident)
    finally:
        crew.close()
    assert seconds > 0
    assert len(set(first)) == 4
    assert set(first) == set(second)


# Round trips


def test_round_trips_are_exact(pg: Server, driver: str) -> None:
    found = counts.measure(pg.url(), driver, ["plain", "raw", "fictive"])
    assert {label: row["plain"] for label, row in found.items()} == {
        "view with 1 SELECT": "3",
        "view with 5 SELECTs": "7",
        "view with 1 SELECT, safe from dead connections": "4",
        "transaction: 1 INSERT": "3",
        "transaction: SELECT + UPDATE": "4",
        "transaction + savepoint: 1 INSERT": "5",
        "SERIALIZABLE + timeouts: SELECT + UPDATE": "6",
        "find or create: found": "3",
        "find or create: created": "4",
        # psycopg2's executemany sends a DELETE for each link.
        "set 100 many-to-many links, 10 changed": {"psycopg2": "14", "psycopg": "5"}[driver],
        "lock a table + UPDATE": "5",
        "clean up 50 tables": "52",
    }
    assert (found["view with 1 SELECT"]["raw"], found["view with 5 SELECTs"]["raw"]) == ("1", "5")
    assert (found["view with 1 SELECT"]["fictive"], found["view with 5 SELECTs"]["fictive"]) == ("1", "5")
    for label, row in found.items():
        assert int(row["fictive"]) <= int(row["plain"]), label
    kept = ("SERIALIZABLE + timeouts: SELECT + UPDATE", "find or create: created", "lock a table + UPDATE")
    assert [found[label]["fictive"] for label in kept] == ["3", "2", "3"]


def test_what_a_contender_does_not_offer_is_a_dash(pg: Server, driver: str) -> None:
    with Databases(pg.url(), driver) as databases, Wire(pg.host, pg.port) as wire:
        peer = peers.load("plain")(Setup(databases.url("dash"), driver))
        with contextlib.closing(peer):
            assert counts.count(peer, counts.Work("there is no such thing", method="nothing"), wire) == "-"


@pytest.mark.parametrize("name", peers.NAMES)
@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
def test_contenders_load_the_same(pg: Server, driver: str, name: str) -> None:
    if name not in peers.installed():
        pytest.skip(f"{name} is not installed")
    with Databases(pg.url(), driver) as databases, Wire(pg.host, pg.port) as wire:
        url = databases.url(name)
        peer = peers.load(name)(Setup(wire.url(url), driver))
        with contextlib.closing(peer):
            assert peer.request("/selects/3") == b"item 1,item 2,item 3"
            assert peer.request("/slow") == b"item 1,item 2"
            with peer.work():
                assert len(peer.load(10)) == 10
                with wire.record() as log:
                    for key in (7, 7):
                        peer.get(key)
                        peer.select(key)
            assert sum("SELECT" in text for text in log.statements) == 4
            with peer.work():
                before = _state(url, driver)
                peer.insert()
                peer.savepoint_insert()
                peer.select_update()
            after = _state(url, driver)
            assert (after[0] - before[0], after[1] - before[1]) == (2, 1)


def _state(url: str, driver: str) -> tuple[int, int, int]:
    """How many events there are, how often an item was counted, and how many tags there are."""
    engine = sa.create_engine(sa.make_url(url).set(drivername=f"postgresql+{driver}"), poolclass=sa.NullPool)
    with engine.connect() as connection:
        row = connection.execute(
            sa.text("select (select count(*) from event), sum(counter), (select count(*) from tag) from item")
        ).one()
        return row[0], row[1], row[2]


# Times


@pytest.fixture(scope="module")
def ways(pg: Server) -> Iterator[dict[str, sa.URL]]:
    with delayed(pg.url(), 0.0005) as url:
        yield {LOOPBACK: sa.make_url(pg.url()), DELAYED: url}


@pytest.fixture
def bench(pg: Server, driver: str, ways: dict[str, sa.URL]) -> Iterator[Bench]:
    with Databases(pg.url(), driver) as databases:
        yield Bench(databases, driver, TINY, Progress(), ways, peers.installed())


SHAPES = {
    "views": ["1 SELECT", "5 SELECTs"] * 2,
    "slow": ["50 threads"],
    "latency": ["p50", "p95", "p99"] * 2,
    "statements": ["session.get", "session.execute(select)"],
    "transactions": ["INSERT", "SELECT + UPDATE", "savepoint INSERT"] * 2,
    "memory": ["objects held"],
    "find_or_create": ["found", "made"] * 2,
    "links": ["by key", "loaded"],
    "insert_rows": ["narrow rows"],
    "upsert_rows": ["plain by insert().on_conflict_do_update()", "plain by session.merge()"],
    "models": [BY_HAND, NO_COLUMNS, BATCH, DETECTOR, KEYSET],
}


@pytest.mark.parametrize("name", MEASUREMENTS)
@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
def test_each_measurement_has_a_sample_a_round_of_every_contender(bench: Bench, name: str) -> None:
    result = MEASUREMENTS[name](bench)
    assert result.name == name
    assert [case.label for case in result.cases] == SHAPES[name]
    rounds = TINY.slow_rounds if name == "slow" else TINY.rounds
    names = result.titles or bench.names
    for case in result.cases:
        assert {peer: len(samples) for peer, samples in case.samples.items()} == dict.fromkeys(names, rounds)
        assert all(math.isfinite(value) and value > 0 for samples in case.samples.values() for value in samples)
        ratio = result.ratio(case, "plain")
        assert ratio is not None
        assert ratio.median == 1


@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
def test_measurements_are_interleaved(bench: Bench) -> None:
    asked: list[str] = []
    works = {name: (lambda name=name: asked.append(name)) for name in ("plain", "fictive")}
    bench.time_each("work", LOOPBACK, works, lambda seconds: seconds)
    # Once to warm up; then two rounds of three each, the second begun by the other.
    assert asked == ["plain", "fictive"] + ["plain"] * 3 + ["fictive"] * 6 + ["plain"] * 3


def test_the_proxy_delays_both_ways_and_ends(bench: Bench) -> None:
    assert round_trip(bench, DELAYED).low >= 1000  # microseconds, and never less
    with delayed(bench.ways[LOOPBACK].render_as_string(hide_password=False), 0) as url:
        pass
    engine = sa.create_engine(url.set(drivername=f"postgresql+{bench.driver}"))
    with pytest.raises(sa.exc.OperationalError):
        engine.connect()


# Calls and instructions

READS = ("select", "query", "get", "get_or_404", "find_hit")
WRITES = {"insert": (1, 0, 0), "add_commit": (1, 0, 0), "savepoint_insert": (1, 0, 0), "select_update": (0, 1, 0)}
WRITES |= {"read_update": (0, 1, 0), "find_miss": (0, 0, 1)}


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
def test_the_work_is_what_its_label_says(pg: Server, driver: str, name: str) -> None:
    """As many SELECTs of a row, events made, items counted and tags made with plain as with fictive."""
    with Databases(pg.url(), driver) as databases, Wire(pg.host, pg.port) as wire:
        url = databases.url(name)
        with contextlib.closing(peers.load(name)(Setup(wire.url(url), driver))) as peer:
            WORK[0].on(peer)()  # connects
            for work in WORK:
                before = _state(url, driver)
                with wire.record() as log:
                    work.on(peer)()
                done = tuple(b - a for a, b in zip(before, _state(url, driver), strict=True))
                assert done == WRITES.get(work.method, (0, 0, 0)), work
                if work.method in READS:
                    assert sum("SELECT" in text for text in log.statements) == max(work.times, 1), work


def test_calls_are_counted_exactly() -> None:
    def inner() -> None:
        len([])

    def work() -> None:
        inner()
        inner()

    found = calls.count(work, 3)
    assert found == {"tests/test_benchmarks.py: work": 1, "tests/test_benchmarks.py: inner": 4}


@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
def test_instructions_are_those_of_the_work(pg: Server, driver: str) -> None:
    if not instructions.available():
        pytest.skip("valgrind is not installed")
    with (
        Databases(pg.url(), driver) as databases,
        instructions.Child(sys.executable, driver, "fictive", databases.url("a")) as child,
    ):
        one, five = (child.instructions(label, 2) for label in ("get", "get x 5"))
    assert 100_000 < one < five / 2
    assert child.versions["SQLAlchemy"] == sa.__version__


def test_instructions_without_valgrind_name_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["instructions"]) == 1
    assert "install the Debian package valgrind" in capsys.readouterr().err


@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
def test_the_functions_of_a_row_that_is_short_are_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = {"plain": {"a": 5.0, "b": 1.0}, "fictive": {"a": 1.0, "b": 3.0, "c": 5.0}}
    found = calls.Found({"SQLAlchemy": "2"}, {"get": functions, "add + commit": dict(functions, plain={"a": 9.0})})
    monkeypatch.setattr(calls, "measure", lambda *_, **__: found)
    counted = cost.count_calls(bench, "python", ["psycopg2"])
    assert counted.rows["get"] == {"psycopg2": {"plain": 6, "fictive": 9}}
    assert counted.profiles == {("get", "psycopg2"): [("c", 0, 5), ("b", 1, 3)]}
    assert counted.short() == [("get", "psycopg2")]


# What is shown


def _cost(name: str, fictive: float) -> Cost:
    row = {driver: {"plain": 100.0, "fictive": fictive} for driver in ("psycopg2", "psycopg")}
    cost = Cost(name, {"SQLAlchemy": "2.1"}, {"get": row, "begin + INSERT": row})
    cost.profiles = {pair: [("session.py: work_", 0.0, 4.0)] for pair in cost.short()}
    return cost


def _run() -> Run:
    """A run with round numbers: fictive is twice as good as plain at everything, which it does in two rounds."""
    one = {"plain": [100.0, 200.0], "django": [100.0, 100.0], "fictive": [200.0, 400.0]}
    less = {"plain": [3000.0, 3000.0], "fictive": [1500.0, 1500.0]}
    copied = {"plain": [10.0, 10.0], "raw": [100.0, 100.0], "fictive": [50.0, 50.0]}
    inserts = Result("insert_rows", "Rows", "rows/s", True, "", cases=[Case("narrow rows", LOOPBACK, copied)])
    views = Result("views", "Views", "requests/s", True, "What a *view* takes_.")
    views.cases = [
        Case("1 SELECT", LOOPBACK, one),
        Case("5 SELECTs", LOOPBACK, dict(one)),
        Case("1 SELECT", DELAYED, one),
    ]
    slow = Result("slow", "Slow", "requests/s", True, "", notes=["Few."], cases=[Case("50 threads", LOOPBACK, one)])
    transactions = Result("transactions", "Transactions", "µs", False, "", cases=[Case("INSERT", DELAYED, less)])
    rows = {
        "view": {"psycopg2": {"plain": "3", "fictive": "1"}, "psycopg": {"plain": "3", "fictive": "1"}},
        "links": {"psycopg2": {"plain": "14", "fictive": "1"}, "psycopg": {"plain": "5", "fictive": "1"}},
    }
    return Run(
        smoke=False,
        driver="psycopg2",
        rounds=2,
        machine={"CPU": "one"},
        versions={"fictive": "0"},
        peers=["plain", "django", "fictive"],
        counts=Counts(rows, ["Counted."]),
        costs=[_cost(CALLS, 90), _cost(INSTRUCTIONS, 90)],
        results=[views, slow, transactions, inserts],
    )


def test_targets_are_judged_on_the_runs_own_ratios() -> None:
    run = _run()
    judged = {target.text.partition(":")[0]: (target.met, target.found) for target in targets(run)}
    assert judged == {
        "view with 1 SELECT on loopback": (True, ("2.00 (2.00 to 2.00)",)),
        "view with 5 SELECTs on loopback": (True, ("2.00 (2.00 to 2.00)",)),
        "50 threads on a pool of 5": (False, ("2.00 (2.00 to 2.00)",)),
        "view with 1 SELECT, 0.5 ms each way": (False, ("2.00 (2.00 to 2.00)",)),
        "INSERT in a transaction, 0.5 ms each way": (True, ("2.00 (2.00 to 2.00)",)),
        "INSERT in a savepoint, 0.5 ms each way": (None, ("not measured",)),
        "10,000 links set": (None, ("not measured",)),
        "rows upserted": (None, ("not measured",)),
        "rows upserted, without merge()": (None, ("not measured",)),
        "mixins": (None, ("not measured",)),
        "lazy loads in batches": (None, ("not measured",)),
        "N+1 detector": (None, ("not measured",)),
        "page 1,000 by keyset": (None, ("not measured",)),
        "rows inserted": (False, ("0.50 (0.50 to 0.50)",)),
        "nothing slower than plain on loopback": (True, ("views, 1 SELECT: 2.00 (2.00 to 2.00)",)),
        "function calls": (True, ("in each row",)),
        "instructions": (
            False,
            ("get, psycopg2, SQLAlchemy 2.1: 1.11", "get, psycopg, SQLAlchemy 2.1: 1.11"),
        ),
    }
    run.results[0].cases[1].samples["fictive"] = [90.0, 180.0]
    slower = next(target for target in targets(run) if target.text.startswith("nothing slower"))
    assert slower.found == ("views, 5 SELECTs: 0.90 (0.90 to 0.90)",)
    assert slower.met is False


def test_tables_name_the_machine_the_versions_and_every_number() -> None:
    text = report.as_text(_run())
    for part in ("CPU one", "fictive 0", "psycopg2, 2 rounds", "14 / 5", "MISS", "pass"):
        assert part in text
    line = next(line for line in text.splitlines() if line.startswith("50 threads"))
    assert line.split() == ["50", "threads", "150", "100", "300"]
    assert f"{plots.TIMES}2.00 (2.00\N{EN DASH}2.00)" in text
    assert "SMOKE" not in text
    assert "SMOKE" in report.as_text(dataclasses.replace(_run(), smoke=True))


def test_the_docs_get_one_file_to_include_and_the_plots_it_shows(tmp_path: Path) -> None:
    (tmp_path / "gone.svg").write_text("of an earlier run")
    run = _run()
    written = report.write(run, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {path.name for path in written}
    drawn = {"views-loopback.svg", "views-delayed.svg", "slow.svg", "transactions.svg", "insert_rows.svg"}
    assert names == {"results.inc", "calls.inc", "instructions.inc", *drawn}
    text = (tmp_path / "results.inc").read_text(encoding="utf-8")
    for name in drawn:
        assert f"benchmarks/{name}" in text
        drawing = ET.fromstring((tmp_path / name).read_text(encoding="utf-8"))
        title = drawing.find("{http://www.w3.org/2000/svg}title")
        assert title is not None
        assert title.text
        shown = "".join(drawing.itertext())
        assert "fictive" in shown
        assert "prefers-color-scheme: dark" in shown


def test_calls_alone_leave_the_times_in_the_docs(tmp_path: Path) -> None:
    (tmp_path / "views.svg").write_text("of an earlier run")
    run = dataclasses.replace(_run(), counts=None, results=[], costs=[_cost(CALLS, 125)])
    assert [path.name for path in report.write(run, tmp_path)] == ["calls.inc"]
    assert (tmp_path / "views.svg").exists()
    text = (tmp_path / "calls.inc").read_text(encoding="utf-8")
    for part in ("SQLAlchemy 2.1", "psycopg: ratio", "0.80", "what fictive calls more often"):
        assert part in text
    assert "CPU one" not in text


def test_the_docs_file_is_clean_rest() -> None:
    docutils = pytest.importorskip("docutils.core", reason="docutils comes with the docs extra")
    settings = {"report_level": 1, "halt_level": 2}
    document = docutils.publish_doctree(report.as_rst(_run()), settings_overrides=settings)
    assert "What a *view* takes_." in document.astext()
    docutils.publish_doctree(report.costs_as_rst(_run(), INSTRUCTIONS), settings_overrides=settings)


def test_json_has_every_sample() -> None:
    run = _run()
    found = json.loads(report.as_json(run))
    assert found["results"][0]["cases"][0]["samples"] == run.results[0].cases[0].samples
    assert found["counts"]["rows"] == run.counts.rows if run.counts else None
    assert [target["met"] for target in found["targets"]] == [target.met for target in targets(run)]


# The command


@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
def test_the_command(driver: str, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    command = [sys.executable, "-m", "benchmarks", "calls", "--smoke", "--only", "statements", "--driver", driver]
    done = subprocess.run([*command, "--json", str(file)], cwd=ROOT, capture_output=True, text=True, check=False)
    missing = set(peers.NAMES) - set(peers.installed())
    assert done.returncode == bool(missing), done.stderr
    assert "Cost of a statement" in done.stdout
    assert "SMOKE" in done.stdout
    assert "statements:" in done.stderr
    found = json.loads(file.read_text(encoding="utf-8"))
    assert [result["name"] for result in found["results"]] == ["statements"]
    assert [(each["name"], list(each["rows"])) for each in found["costs"]] == [(CALLS, [work.label for work in WORK])]
    assert found["versions"]["SQLAlchemy"] == sa.__version__
    assert {"CPU", "cores", "Python"} <= set(found["machine"])


def test_help_names_the_measurements_and_bad_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("round-trips", "calls", "instructions", *MEASUREMENTS))
    for bad in (["--only", "nothing"], ["nothing"], ["--driver", "oracle"], ["--rounds", "0"], ["--python", "/no/py"]):
        with pytest.raises(SystemExit, match="2"):
            main(bad)


def test_processors_are_kept_awake_where_that_is_allowed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = tmp_path / "cpu_dma_latency"
    monkeypatch.setattr(timing, "_LATENCY", request)
    assert main(["--awake", "views"]) == 1
    assert "--awake needs Linux, and root" in capsys.readouterr().err
    request.touch()
    with timing.awake():
        assert request.read_bytes() == bytes(4)  # microseconds that a processor may take to wake up


def test_benchmarks_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert queue.main(["--smoke"]) == 0
    assert capsys.readouterr().out.count("200 of 200 jobs done, 0 more than once") == 2
    assert cleanup.main(["--smoke"]) == 0
    assert "TRUNCATE of all" in capsys.readouterr().out
    assert sandbox.main(["--smoke"]) == 0
    assert "create_all, drop_all" in capsys.readouterr().out
    hooks.main(["--smoke"])
    assert capsys.readouterr().out.count("100 hooks add") == 4
