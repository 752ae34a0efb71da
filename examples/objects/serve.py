"""`python -m examples.objects.serve`: the app on both database classes, and a page that draws what they send.

The apps themselves are there too, under /plain/ and /fictive/; what is sent to them shows on the page as well:

    curl http://127.0.0.1:8000/fictive/objects/3
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flask import Flask, Response, redirect, render_template, request, url_for
from werkzeug.datastructures import MultiDict
from werkzeug.exceptions import BadRequest
from werkzeug.serving import make_server

from . import options, timeline
from .models import PLACES
from .sides import AT_ONCE, POOL_SIZE, Call, Measurement, Side, answers_as_compared, both_sides

REMEMBERED = 20


@dataclass(frozen=True)
class Experiment:
    """A call that one side or both have answered."""

    number: int
    at: str
    call: Call
    sides: list[tuple[Side, Measurement]]

    @property
    def axis(self) -> timeline.Axis:
        return timeline.Axis.for_all([measurement for _, measurement in self.sides])

    @property
    def same(self) -> bool:
        """Whether all sides gave the same answers."""
        first, *others = [answers_as_compared(measurement) for _, measurement in self.sides]
        return all(other == first for other in others)


class Laboratory:
    """Both sides, and the experiments made with them, the newest first."""

    def __init__(self, sides: Sequence[Side]) -> None:
        self.sides = {side.name: side for side in sides}
        self.experiments: deque[Experiment] = deque(maxlen=REMEMBERED)
        self._count = 0
        # One experiment at a time, or they would be in each other's way and no number would mean anything.
        self._lock = threading.Lock()

    def send(self, call: Call, *names: str) -> Experiment:
        """Send `call` to the named sides, one after the other; to all of them when none is named."""
        with self._lock:
            sides = [self.sides[name] for name in names or self.sides]
            measured = [(side, side.measure(call)) for side in sides]
            self._count += 1
            experiment = Experiment(self._count, time.strftime("%H:%M:%S"), call, measured)
            self.experiments.appendleft(experiment)
            return experiment

    def start_over(self) -> None:
        """The sample data in both databases, and no experiments."""
        with self._lock:
            for side in self.sides.values():
                side.start_over()
            self.experiments.clear()


def call_of(form: MultiDict[str, str]) -> Call:
    """The call that one of the page's forms asks for."""
    number = form.get("id", 3, type=int)
    match form.get("call"):
        case "show":
            return Call("GET", f"/objects/{number}")
        case "insurance":
            return Call("GET", f"/objects/{number}/insurance")
        case "burst":
            return Call("GET", f"/objects/{number}/insurance", times=AT_ONCE)
        case "index":
            return Call("GET", f"/objects?page={form.get('page', 1, type=int)}")
        case "overview":
            return Call("GET", "/overview")
        case "create":
            tags = [tag.strip() for tag in form.get("tags", "").split(",") if tag.strip()]
            return Call("POST", "/objects", {"name": form.get("name", ""), "tags": tags})
        case "move":
            return Call("PATCH", f"/objects/{number}", {"state": form.get("state", "")})
    raise BadRequest("No such call.")


def create_page(laboratory: Laboratory, about: str) -> Flask:
    """The page, and behind it the two apps."""
    page = Flask("examples.objects")
    page.jinja_env.filters["ms"] = timeline.ms
    page.jinja_env.filters["pretty"] = lambda value: json.dumps(value, indent=2, ensure_ascii=False)
    page.jinja_env.globals.update(lanes=timeline.lanes, lines=timeline.lines)

    @page.get("/")
    def show() -> Response:
        response = Response(
            render_template(
                "page.html",
                about=about,
                at_once=AT_ONCE,
                experiments=list(laboratory.experiments),
                places=PLACES,
                pool_size=POOL_SIZE,
            )
        )
        response.headers["Cache-Control"] = "no-store"
        return response

    @page.post("/send")
    def send() -> Any:
        experiment = laboratory.send(call_of(request.form))
        return redirect(url_for("show", _anchor=f"r{experiment.number}"), 303)

    @page.post("/start-over")
    def start_over() -> Any:
        laboratory.start_over()
        return redirect(url_for("show"), 303)

    @page.route("/<any(plain, fictive):name>/<path:path>", methods=["GET", "POST", "PATCH"])
    def app(name: str, path: str) -> Any:
        local_path = request.full_path.removeprefix(f"/{name}").removesuffix("?")
        experiment = laboratory.send(Call(request.method, local_path, request.get_json(silent=True)), name)
        answer = experiment.sides[0][1].answers[0]
        headers = {"Location": f"/{name}{answer.location}"} if answer.location else {}
        return answer.body, answer.status, headers

    return page


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options.parser("./run serve", "Keep the app running, with a page that draws its wire.")
    parser.add_argument("--port", type=_port, default=8000, help="default: %(default)s; 0 takes a free one")
    given = parser.parse_args(arguments)
    return options.run(lambda: _serve(given), given.driver)


def _serve(given: argparse.Namespace) -> int:
    try:
        listener = socket.create_server(("127.0.0.1", given.port))
    except OSError as error:
        reason = "it is in use" if error.errno == errno.EADDRINUSE else error.strerror
        print(f"error: cannot listen on port {given.port}: {reason}. Choose another with --port.", file=sys.stderr)
        return 1
    with listener:
        print("starting PostgreSQL and warming up ...", flush=True)
        seconds, latency = given.api_ms / 1000, given.latency_ms / 1000
        with both_sides(given.driver, insurer_seconds=seconds, latency=latency) as sides:
            laboratory = Laboratory(sides)
            for call in ("burst", "insurance", "show"):  # so that there is something to look at
                laboratory.send(call_of(MultiDict({"call": call})))
            added = f"{given.latency_ms:g} ms added each way" if latency else "nothing added to loopback"
            about = f"{given.driver}, {added}; the insurer takes {given.api_ms:g} ms."
            logging.getLogger("werkzeug").setLevel(logging.WARNING)
            port = listener.getsockname()[1]
            server = make_server(
                "127.0.0.1", port, create_page(laboratory, about), threaded=True, fd=listener.fileno()
            )
            print(f"http://127.0.0.1:{port}/  (Ctrl-C ends it)", flush=True)
            server.serve_forever()  # returns on Ctrl-C
            print("\nstopping", flush=True)
    return 0


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError("expected a number from 0 to 65535")
    return number


if __name__ == "__main__":
    sys.exit(main())
