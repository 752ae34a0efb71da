"""The example that sells tickets: its own tests, on each driver, and its pages in a browser."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fictive.testing.postgres import Server

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.any_sqlalchemy

ROOT = Path(__file__).parent.parent


def test_its_own_tests_with_the_plugin(pytester: pytest.Pytester, pg: Server, driver: str) -> None:
    plugin = ("-p", "no:fictive", "-p", "fictive.testing.plugin", "-p", "no:cacheprovider")  # not installed anew
    tests = str(ROOT / "examples" / "tickets")
    result = pytester.runpytest_inprocess(*plugin, "--db-url", pg.url(driver=driver), tests)
    result.assert_outcomes(passed=10)


def test_a_ticket_is_bought_in_a_browser(pg: Server) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium: apt-get install chromium")
    environment = {**os.environ, "FICTIVE_TEST_DATABASE_URL": pg.url(), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "examples.tickets.serve", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as serve:
        try:
            assert serve.stdout is not None
            url, _, worker = (serve.stdout.readline().strip() for _ in range(3))
            with playwright.sync_playwright() as started:
                browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                page = browser.new_page()
                page.goto(url.rpartition(" ")[2])
                assert axe.Axe().run(page).response["violations"] == []
                page.click("text=Winterreise")
                assert axe.Axe().run(page).response["violations"] == []
                page.fill("input", "Ann")
                page.click("button")
                assert page.inner_text("output") == "The ticket is being printed."
                assert axe.Axe().run(page).response["violations"] == []
                with subprocess.Popen(f"exec env {worker}", shell=True, cwd=ROOT, env=environment) as printer:
                    try:
                        page.wait_for_selector("output:has-text('Ticket: seat 1, Ann')")
                    finally:
                        printer.send_signal(signal.SIGINT)
                browser.close()
        finally:
            serve.send_signal(signal.SIGINT)
            assert serve.wait(60) in (0, 130)
