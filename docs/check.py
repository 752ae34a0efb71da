"""Opens each page of the built docs in headless Chromium, as readers do: `./run check-docs`.

Each page, at 1280 and 390 px, light and dark, has no error box and no horizontal overflow, and axe-core finds nothing.
No link within the docs is dead, and no path of this machine is in a page. The search puts first what SEARCHES says.
Screenshots of ten pages go to docs/_build/screenshots.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import http.server
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urldefrag, urljoin

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, sync_playwright

DOCS = "http://docs.invalid/"  # urljoin knows what is relative in the schemes of the web only
WIDTHS = (1280, 390)
SCHEMES = ("light", "dark")
# What readers search for, and the page that has to be the first result.
SEARCHES = {
    "n+1": "lazy-loads",
    "connection pool exhausted": "deployment",
    "idle in transaction": "monitoring",
    "rollback in tests": "testing",
    "row level security": "tenants",
    "multi-tenant": "tenants",
    "upsert": "bulk",
    "bulk insert": "bulk",
    "csv": "bulk",
    "get_or_create": "find-or-create",
    "deadlock retry": "blocks",
    "on_commit": "blocks",
    "savepoint": "transactions",
    "isolation level": "transactions",
    "sqlite": "transactions",
    "pagination": "repository",
    "optimistic locking": "models",
    "soft delete": "models",
    "alembic": "migrations",
    "celery": "how-to-queue",
    "skip locked": "locks",
    "listen notify": "waiting",
    "gunicorn": "deployment",
    "pgbouncer prepared statement": "deployment",
    "read replica": "deployment",
    "server closed the connection unexpectedly": "connections",
    "DetachedInstanceError": "messages",
    "async": "comparison",
    "migrate from flask-sqlalchemy": "moving-over",
    "pytest": "testing",
    "mypy": "types",
}
SCREENSHOTS = (
    *("index", "start", "transactions", "round-trips", "find-or-create", "configuration", "moving-over"),
    *("reference", "reference/transactions", "benchmarks"),
)
FOUND = """() => ({
    errors: [...document.querySelectorAll(".system-message, .problematic, .admonition.error, .highlight .err")]
        .map(each => each.textContent.trim().slice(0, 100)),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
})"""
LINKS = """() => ({
    links: [...document.querySelectorAll("a[href], link[href], img[src], script[src]")]
        .map(each => each.getAttribute("href") ?? each.getAttribute("src")),
    ids: [...document.querySelectorAll("[id]")].map(each => each.id),
})"""
# Results are sorted with the best one last.
FIRST_RESULT = """words => Search._performSearch(...Search._parseQuery(words)).at(-1)?.[0] ?? "nothing" """
# A page with one fault of each kind, and the words by which they are reported.
PLANTED = """<!doctype html><html lang="en"><title>Planted</title><main><h1>Planted</h1>
<div class="system-message">an error</div><div style="width: 3000px">wide</div><img src="planted.html">
<p style="color: #999; background: #aaa">grey on grey</p><a href="gone.html">a link</a></main></html>"""
SEEN = ("error box: an error", "px wider", "axe image-alt", "axe color-contrast", "dead link: gone.html")


class Trouble(list[str]):
    """What is wrong, a line each."""

    def add(self, page: str, text: str) -> None:
        self.append(f"{page}: {text}")


@contextlib.contextmanager
def served(directory: Path) -> Iterator[str]:
    """Serve `directory` on loopback; yield its URL."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@contextlib.contextmanager
def opened(chromium: str) -> Iterator[Page]:
    """A page of a new browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser.new_page()
        browser.close()


def check(page: Page, name: str, url: str, screenshots: Path, trouble: Trouble) -> dict[str, list[str]]:
    """Look at one page in all its shapes; return its links and ids."""
    page.goto(url + name)
    seen = set()
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        for scheme in SCHEMES:
            page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            place = f"{name} ({width} px, {scheme})"
            found = page.evaluate(FOUND)
            for error in found["errors"]:
                trouble.add(place, f"error box: {error}")
            if found["overflow"] > 0:
                trouble.add(place, f"{found['overflow']} px wider than the window")
            for violation in Axe().run(page, *axe_options(name, width, scheme)).response["violations"]:
                for node in violation["nodes"][:3]:
                    line = f"axe {violation['id']}: {node['html'][:120]}"
                    if line not in seen:  # said once for each page
                        seen.add(line)
                        trouble.add(place, line)
            stem = name.removesuffix(".html")
            if stem in SCREENSHOTS:
                page.screenshot(path=screenshots / f"{stem.replace('/', '-')}-{width}-{scheme}.png")
    return page.evaluate(LINKS)  # type: ignore[no-any-return]


def axe_options(name: str, width: int, scheme: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What axe looks at: most of the time goes there.

    Of the navigation, which is the same on each page, the front page's is enough. Contrast, the slowest rule,
    depends on the scheme and not on the width; the other rules on the width and not on the scheme.
    """
    context = {} if name == "index.html" else {"exclude": [[".sidebar-drawer"], [".toc-drawer"]]}
    contrast = width == WIDTHS[0]
    if scheme == SCHEMES[0]:
        return context, {"rules": {"color-contrast": {"enabled": contrast}}}
    return context, {"runOnly": ["color-contrast" if contrast else "scrollable-region-focusable"]}


def check_links(pages: dict[str, dict[str, list[str]]], directory: Path, trouble: Trouble) -> None:
    for name, found in pages.items():
        for link in found["links"]:
            target, anchor = urldefrag(urljoin(f"{DOCS}{name}", link))
            if not target.startswith(DOCS):
                continue
            target = unquote(target.removeprefix(DOCS).partition("?")[0]) or name
            if not (directory / target).exists():
                trouble.add(name, f"dead link: {link}")
            elif anchor and target in pages and unquote(anchor) not in pages[target]["ids"]:
                trouble.add(name, f"dead link: {link} (there is no such id)")


def check_paths(names: Sequence[str], directory: Path, trouble: Trouble) -> None:
    here = str(Path(__file__).resolve().parent.parent)
    for name in names:
        if here in (directory / name).read_text(encoding="utf-8"):
            trouble.add(name, f"a path of this machine: {here}")


def check_searches(page: Page, url: str, trouble: Trouble) -> None:
    """One search in the page as a reader sees it, the others by the function behind it, in a hundredth of the time."""
    page.goto(f"{url}search.html?q={quote(next(iter(SEARCHES)), safe='')}")
    page.wait_for_selector("ul.search li > a", timeout=10_000)
    for words, wanted in SEARCHES.items():
        found = page.evaluate(FIRST_RESULT, words)
        if found != wanted:
            trouble.add("search.html", f"{words!r} should find {wanted} first, not {found}")


def check_itself(page: Page, screenshots: Path, trouble: Trouble) -> None:
    """A fault of each kind must be seen, or that nothing is wrong would mean nothing."""
    found = Trouble()
    with tempfile.TemporaryDirectory() as directory:
        planted = Path(directory, "planted.html")
        planted.write_text(PLANTED, encoding="utf-8")
        with served(planted.parent) as url:
            links = check(page, planted.name, url, screenshots, found)
        check_links({planted.name: links}, planted.parent, found)
    for words in SEEN:
        if not any(words in line for line in found):
            trouble.add("docs/check.py", f"does not see what is planted: {words}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./run check-docs", description=__doc__)
    parser.add_argument("html", type=Path, help="the directory of the built docs")
    parser.add_argument("names", nargs="*", help="pages to look at; default: all")
    options = parser.parse_args(arguments)
    screenshots = options.html.parent / "screenshots"
    screenshots.mkdir(exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("There is no Chromium to look at the docs with: apt-get install chromium", file=sys.stderr)
        return 1 if os.environ.get("CI") else 0
    names = [str(path.relative_to(options.html)) for path in sorted(options.html.rglob("*.html"))]
    names = [name for name in names if not name.startswith("_modules/")]
    trouble, started = Trouble(), time.monotonic()
    chosen = [name for name in names if not options.names or name.removesuffix(".html") in options.names]
    pages: dict[str, dict[str, list[str]]] = {}
    with served(options.html) as url:

        def look(share: Sequence[str]) -> None:
            """In a thread of its own, with a browser of its own: each is busy with one page at a time."""
            with opened(chromium) as page:
                pages.update((name, check(page, name, url, screenshots, trouble)) for name in share)

        with opened(chromium) as page:
            check_itself(page, screenshots, trouble)
            check_searches(page, url, trouble)
        browsers = os.cpu_count() or 1
        with concurrent.futures.ThreadPoolExecutor(browsers) as pool:
            list(pool.map(look, [chosen[n::browsers] for n in range(browsers)]))
    check_links(pages, options.html, trouble)
    check_paths(names, options.html, trouble)
    print("\n".join(trouble) or "nothing is wrong")
    print(f"{len(pages)} pages in {time.monotonic() - started:.0f} s; screenshots in {screenshots}")
    return 1 if trouble else 0


if __name__ == "__main__":
    raise SystemExit(main())
