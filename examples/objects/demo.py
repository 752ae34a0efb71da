"""`./run demo`: What each view sends over the wire, plain and on fictive, side by side.

Every number is measured while it runs. Ends with an error when the two apps differ in an answer or in what is in
their databases afterwards.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
import pprint
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from . import options, replica_demo
from .sides import AT_ONCE, CALLS, POOL_SIZE, Measurement, answers_as_compared, both_sides, shortened

TIMES = 3
BOLD, DIM, GREEN, YELLOW, RED = "1", "2", "32", "33", "31"


class Paper:
    """Standard output: its width, and whether it takes colours."""

    def __init__(self) -> None:
        self.width = min(max(shutil.get_terminal_size().columns, 80), 120)
        self._colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def paint(self, text: str, *codes: str) -> str:
        return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if self._colours and codes and text.strip() else text

    def line(self, text: str = "") -> None:
        print(text.rstrip(), flush=True)

    def rule(self) -> None:
        self.line(self.paint("\u2500" * self.width, DIM))

    def beside(self, left: Sequence[Piece], right: Sequence[Piece]) -> None:
        """Two columns."""
        width = (self.width - 6) // 2
        empty = Piece("")
        columns = [[line for piece in pieces for line in piece.wrapped(width)] for pieces in (left, right)]
        for one, other in itertools.zip_longest(*columns, fillvalue=empty):
            self.line(f"  {self.paint(one.text.ljust(width), *one.codes)}  {self.paint(other.text, *other.codes)}")


@dataclass(frozen=True)
class Piece:
    """A text and how to paint it; where it is too long for its column, it goes on after `indent`."""

    text: str
    codes: tuple[str, ...] = ()
    indent: str = ""

    def wrapped(self, width: int) -> list[Piece]:
        lines = textwrap.wrap(
            self.text, width, subsequent_indent=self.indent, max_lines=3, placeholder=" \u2026", drop_whitespace=True
        )
        # textwrap takes leading blanks off the first line only if it is wrapped at them.
        return [Piece(line, self.codes, self.indent) for line in lines or [""]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options.parser("./run demo", (__doc__ or "").partition(": ")[2])
    parser.add_argument("--replica", action="store_true", help="show which of two servers answers each request")
    parser.add_argument(
        "--times",
        type=options.positive,
        default=TIMES,
        metavar="N",
        help="measure what only reads N times; default: %(default)s",
    )
    given = parser.parse_args(arguments)
    # Piped into something that does not speak UTF-8 the lines are less pretty, and nothing else.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    if given.replica:
        return options.run(lambda: replica_demo.main(given.driver), given.driver)
    seconds = (given.api_ms / 1000, given.latency_ms / 1000)
    return options.run(lambda: compare(given.driver, *seconds, given.times), given.driver)


def compare(driver: str, api_seconds: float, latency: float, times: int = TIMES) -> int:
    """Print what both apps send for each call, the summary first; 1 if their answers or rows differ, else 0.

    Times are in seconds. What only reads is measured `times` times, and the median shown.
    """
    paper = Paper()
    paper.line(paper.paint("A museum's objects: the same requests to the same app, twice", BOLD))
    way = f"{_ms(latency)} added each way" if latency else "nothing added to loopback"
    intro = (
        f"{driver}; the wire to PostgreSQL has {way}. Somebody else's API, an insurer's, takes {_ms(api_seconds)}. "
        f"Each app has a pool of {POOL_SIZE} connections and is warm. "
        f"What only reads is asked {_count(times, 'time')}, and the median is shown."
    )
    for line in textwrap.wrap(intro, paper.width):
        paper.line(line)

    measured: list[tuple[Measurement, Measurement]] = []
    differences: list[str] = []
    answers = 0
    with both_sides(driver, insurer_seconds=api_seconds, latency=latency) as sides:
        for call in CALLS:
            runs = []
            for _ in range(times if call.method == "GET" else 1):
                plain, fictive = (side.measure(call) for side in sides)
                runs.append((plain, fictive))
                if difference := _difference(answers_as_compared(plain), answers_as_compared(fictive)):
                    differences.append(f"{call.title}: the answers differ\n{difference}")
                if any(answer.status.startswith("5") for side in (plain, fictive) for answer in side.answers):
                    differences.append(f"{call.title}: an app failed, see its traceback above")
            answers += sum(len(plain.answers) for plain, _ in runs)
            measured.append((_median([plain for plain, _ in runs]), _median([fictive for _, fictive in runs])))
        if difference := _difference(*(side.rows() for side in sides)):
            differences.append(f"the rows in the two databases differ\n{difference}")
        titles = [side.title for side in sides]
    _summarise(paper, measured)
    paper.line()
    paper.line("What each view sends. Lines joined by \u2502 are one transaction.")
    for plain, fictive in measured:
        _show(paper, plain, fictive, titles)
    paper.line()
    for text in differences:
        paper.line(paper.paint(f"DIFFERENT: {text}", RED))
    if not differences:
        paper.line(
            paper.paint("\u2713 ", GREEN)
            + f"Both apps gave the same {answers} answers, and the same rows are in both databases."
        )
    return 1 if differences else 0


# One view


def _median(runs: list[Measurement]) -> Measurement:
    return sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]


def _show(paper: Paper, plain: Measurement, fictive: Measurement, titles: Sequence[str]) -> None:
    call = plain.call
    paper.line()
    paper.rule()
    sent = f"  {json.dumps(call.json)}" if call.json is not None else ""
    paper.line(paper.paint(call.title, BOLD) + paper.paint(sent, DIM))
    paper.line(paper.paint(f"{call.what}; {plain.answers[0].status}", DIM))
    paper.line()
    paper.beside([Piece(titles[0], (BOLD,))], [Piece(titles[1], (BOLD,))])
    if call.times == 1:
        paper.beside(_conversation(plain), _conversation(fictive))
        paper.line()
    paper.beside(_numbers(plain), _numbers(fictive))


def _conversation(measurement: Measurement) -> list[Piece]:
    """The round trips, one after another, and the waits between them."""
    if not measurement.exchanges:
        return [Piece("  nothing is sent", (DIM,))]
    pieces = []
    inside = False
    waits = list(measurement.waits)
    for exchange in measurement.exchanges:
        while waits and waits[0].start < exchange.start:
            wait = waits.pop(0)
            text = f"waits {_ms(wait.end - wait.start)} for the insurer, holding {_connections(wait.held)}"
            bar = "\u2502" if inside else " "
            pieces.append(Piece(f"{bar} ~ {text}", (YELLOW,) if wait.held else (GREEN,), f"{bar}   "))
        stays = exchange.status != "I"
        bar = {(False, True): "\u250c", (True, True): "\u2502", (True, False): "\u2514"}.get((inside, stays), " ")
        statement = shortened(exchange)
        control = statement.split(" ")[0] in ("BEGIN", "COMMIT", "ROLLBACK")
        pieces.append(Piece(f"{bar} {statement}", (DIM,) if control else (), "\u2502   " if stays else "    "))
        inside = stays
    return pieces


def _numbers(measurement: Measurement) -> list[Piece]:
    found = [
        Piece(_count(measurement.round_trips, "round trip"), (BOLD,)),
        Piece(
            f"{_ms(measurement.in_transaction)} in a transaction" if measurement.in_transaction else "no transaction"
        ),
    ]
    if measurement.in_transaction:
        found.append(Piece(f"{_ms(measurement.idle_in_transaction)} of that with nothing to do"))
    if measurement.held is not None:
        most = "at most " if len(measurement.waits) > 1 and measurement.held else ""
        found.append(Piece(f"{most}{_connections(measurement.held)} held while waiting"))
    found.append(
        Piece(
            f"{_ms(measurement.seconds)} until "
            + ("the last answer" if len(measurement.answers) > 1 else "the answer")
        )
    )
    return found


# All of them


def _summarise(paper: Paper, measured: Sequence[tuple[Measurement, Measurement]]) -> None:
    """A row for each view, and in each column the plain app's number and fictive's."""
    paper.line()
    paper.rule()
    paper.line(paper.paint("Summary", BOLD) + "  plain \u2192 fictive")
    paper.line()
    heads = ["round trips", "in tx, ms", "idle, ms", "held", "took, ms"]
    widths = [11, 10, 10, 6, 10]
    first = 80 - sum(widths) - len(widths)
    paper.line(
        paper.paint(" " * first + "".join(f" {head:>{width}}" for head, width in zip(heads, widths, strict=True)), DIM)
    )
    for plain, fictive in measured:
        cells = [
            (str(plain.round_trips), str(fictive.round_trips)),
            (_number(plain.in_transaction), _number(fictive.in_transaction)),
            (_number(plain.idle_in_transaction), _number(fictive.idle_in_transaction)),
            ("", "") if plain.held is None else (str(plain.held), str(fictive.held)),
            (_number(plain.seconds), _number(fictive.seconds)),
        ]
        row = f"{_label(plain):<{first}.{first}}"
        for (one, other), width in zip(cells, widths, strict=True):
            # A number that went down is what this is about.
            text = (f"{one} \u2192 {other}" if one else "\u00b7").rjust(width)
            row += " " + (paper.paint(text, GREEN) if one and float(other) < float(one) else text)
        paper.line(row)
    paper.line()
    notes = (
        "tx: transaction; idle: of that, with no round trip under way; held: connections of the pool, while waiting "
        f"for the insurer. Times in transactions are summed over connections, so {AT_ONCE} requests at once can spend "
        "more than they took."
    )
    for line in textwrap.wrap(notes, paper.width):
        paper.line(paper.paint(line, DIM))


def _label(measurement: Measurement) -> str:
    call = measurement.call
    if call.times > 1:
        return f"  {call.times} of it at once"
    code = measurement.answers[0].status.split(" ")[0]
    return f"{call.method} {call.path}" + (f" ({code})" if code >= "400" else "")


def _difference(one: object, other: object) -> str:
    if one == other:
        return ""
    return "\n".join(
        difflib.unified_diff(
            pprint.pformat(one, width=100).splitlines(),
            pprint.pformat(other, width=100).splitlines(),
            "plain",
            "fictive",
            lineterm="",
        )
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _connections(number: int) -> str:
    return _count(number, "connection") if number else "no connection"


def _number(seconds: float) -> str:
    return f"{seconds * 1000:.0f}" if seconds >= 0.01 or not seconds else f"{seconds * 1000:.1f}"


def _ms(seconds: float) -> str:
    return f"{_number(seconds)} ms"


if __name__ == "__main__":
    sys.exit(main())
