#!/usr/bin/env python3
"""Measure how evenly text is shown, against the smoothest schedule there is.

    python tests/bench_pacing.py                  # the pacer, then the whole server
    python tests/bench_pacing.py --pure --seeds 20
    python tests/bench_pacing.py --pure --svg pacing.svg

Each shape is a way in which text reaches the proxy: tokens, clumps, bursts, silences.
It is played through the pacer alone, on a clock that is only a number, and then
through opendify.py on loopback, between a small Dify and a client; passing through
(smoothing off) stands beside it. Standard library only.

The columns: `first`, milliseconds added to the first character; `lag50`, `lag99` and
`lag_max`, how long characters were held; `end`, what was added to the last one; `gap`,
the longest silence while text was held; `pieces`, the most in any second; `ratio`, the
unevenness over the least that is possible when nothing is held longer than max_lag.

Unevenness is the number of characters that share a character's tenth of a second: the
sum of squares over the sum, in bins of 0.1 s from the first character on. The least
possible follows from the taut string: between what has arrived and the same curve
max_lag later, the shortest line is also the smoothest (Salehi, Zhang, Kurose, Towsley:
"Supporting stored video", 1998). It knows the future, so 1.00 is out of reach.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opendify import Pacer

Sizes = Sequence[tuple[float, float]]  # (seconds, characters)
Arrivals = Sequence[tuple[float, int]]  # the same, whole characters
Texts = Sequence[tuple[float, str]]  # (seconds, text)
Scores = dict[str, list[dict[str, float]]]  # by shape, one for each seed

REPOSITORY = Path(__file__).resolve().parent.parent
BIN_S, FRAME_S = 0.1, 0.02
COLUMNS = ("first", "lag50", "lag99", "lag_max", "end", "gap", "pieces", "ratio")
TOLERANCE = 1e-9

# ------------------------------------------------------------------------------
# Shapes: (seconds, characters), the same for the same seed
# ------------------------------------------------------------------------------


def tokens(rng: Random, per_second: int, size: int, seconds: int) -> Arrivals:
    """Tokens of about `size` characters, nearly even."""
    at, arrivals = 0.0, []
    while at < seconds:
        arrivals.append((at, max(1, round(rng.gauss(size, 1.5)))))
        at += max(0.002, rng.gauss(1 / per_second, 0.15 / per_second))
    return arrivals


def bunched(rng: Random, arrivals: Arrivals) -> Iterator[tuple[float, int]]:
    """The same tokens, one to twelve of them handed over together."""
    left = list(arrivals)
    while left:
        count = rng.choice([1, 1, 1, 2, 3, 5, 8, 12])
        bunch, left = left[:count], left[count:]
        yield bunch[-1][0], sum(size for _, size in bunch)


def bursts(
    rng: Random, seconds: int, pause: tuple[float, float], size: tuple[int, int]
) -> Arrivals:
    """A sentence at a time."""
    at, arrivals = 0.0, []
    while at < seconds:
        arrivals.append((at, rng.randint(*size)))
        at += rng.uniform(*pause)
    return arrivals


def interrupted(rng: Random) -> Arrivals:
    """Even tokens, 2.5 s of nothing, a clump, even tokens."""
    before = tokens(rng, 35, 4, 3)
    resumed = before[-1][0] + 2.5
    after = [(resumed + 0.03 + at, size) for at, size in tokens(rng, 35, 4, 3)]
    return [*before, (resumed, 160), *after]


def scattered(rng: Random) -> Arrivals:
    """Pieces of any size after gaps of any length."""
    at, arrivals = 0.0, []
    while at < 8:
        arrivals.append((at, rng.randint(1, 40)))
        at += min(1.5, rng.expovariate(5))
    return arrivals


def headed(rng: Random) -> Arrivals:
    """One large piece, then an even flow."""
    return [(0.0, 1000), *((0.04 + at, size) for at, size in tokens(rng, 30, 4, 6))]


SHAPES: dict[str, Callable[[Random], Arrivals]] = {
    "steady": lambda rng: tokens(rng, 30, 4, 8),
    "clumped": lambda rng: list(bunched(rng, tokens(rng, 40, 4, 8))),
    "bursty": lambda rng: bursts(rng, 8, (0.25, 0.8), (30, 120)),
    "stalled": interrupted,
    "fast": lambda rng: tokens(rng, 250, 4, 4),
    "slow": lambda rng: tokens(rng, 6, 3, 8),
    "whole": lambda rng: [(0.0, 1500)],
    "paragraphs": lambda rng: [(0.9 * turn, 500) for turn in range(9)],
    "headed": headed,
    "scattered": scattered,
    "two bursts": lambda rng: [(0.0, 300), (rng.uniform(0.3, 1.5), 300)],
    "paced": lambda rng: [(0.05 * turn, 4) for turn in range(160)],
    "chinese": lambda rng: list(bunched(rng, tokens(rng, 25, 2, 6))),
    "emoji": lambda rng: list(bunched(rng, tokens(rng, 20, 3, 6))),
}
PROSE = {
    "chinese": "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "emoji": "👩\u200d💻🇨🇳✍🏽 👨\u200d👩\u200d👧 ❤\ufe0f\u200d🔥 ok ",
}
DEFAULT_PROSE = "The quick brown fox jumps over 12 lazy dogs. 你好，世界。 Ça va? "


def shape(name: str, seed: int) -> Texts:
    """The arrivals of a shape with their text: [(seconds, text)]."""
    arrivals = SHAPES[name](Random(seed))
    prose = PROSE.get(name, DEFAULT_PROSE)
    text = prose * (sum(size for _, size in arrivals) // len(prose) + 1)
    ends = list(accumulate(size for _, size in arrivals))
    return [
        (round(at, 4), text[end - size : end])
        for (at, size), end in zip(arrivals, ends)
    ]


# ------------------------------------------------------------------------------
# Score
# ------------------------------------------------------------------------------


def sizes(pieces: Texts) -> Arrivals:
    """[(seconds, text)] as [(seconds, characters)]."""
    return [(at, len(text)) for at, text in pieces]


def unevenness(pieces: Sizes) -> float:
    """How many characters share a character's bin, on average."""
    bins: dict[int, float] = {}
    for at, size in pieces:
        number = math.floor((at - pieces[0][0]) / BIN_S + TOLERANCE)
        bins[number] = bins.get(number, 0) + size
    return sum(size**2 for size in bins.values()) / sum(bins.values())


def sampled(source: Sizes, count: int, delay: float) -> list[float]:
    """How much of the source had come at each frame, `delay` seconds ago."""
    start, total, after = source[0][0], 0.0, 0
    curve: list[float] = []
    for frame in range(count + 1):
        until = start + frame * FRAME_S - delay + TOLERANCE
        while after < len(source) and source[after][0] <= until:
            total, after = total + source[after][1], after + 1
        curve.append(total)
    return curve


def taut_string(source: Sizes, max_lag: float) -> Sizes:
    """The smoothest schedule that holds nothing longer than max_lag.

    From the last knot, every line that stays between floor and ceiling has a slope
    between two limits, which close in as the line gets longer. Where they cross, the
    string bends around the corner that set the limit it would break.
    """
    count = math.ceil((source[-1][0] + max_lag - source[0][0]) / FRAME_S) + 1
    floor, ceiling = sampled(source, count, max_lag), sampled(source, count, 0.0)
    floor[0] = ceiling[0] = 0
    floor[count] = ceiling[count] = sum(size for _, size in source)
    knots: list[tuple[int, float]] = [(0, 0.0)]
    while knots[-1][0] < count:
        knots.append(next_knot(floor, ceiling, *knots[-1]))
    schedule: list[tuple[float, float]] = []
    for (begin, low), (end, high) in zip(knots, knots[1:]):
        step = (high - low) / (end - begin)
        frames = range(begin + 1, end + 1) if step > TOLERANCE else ()
        schedule += [(source[0][0] + frame * FRAME_S, step) for frame in frames]
    return schedule


def next_knot(
    floor: list[float], ceiling: list[float], begin: int, level: float
) -> tuple[int, float]:
    """Where the string that leaves (begin, level) bends next: (frame, level)."""
    limit, corner = [-math.inf, math.inf], [begin, begin]
    for frame in range(begin + 1, len(floor)):
        lower = (floor[frame] - level) / (frame - begin)
        upper = (ceiling[frame] - level) / (frame - begin)
        if lower > limit[1]:
            return corner[1], ceiling[corner[1]]
        if upper < limit[0]:
            return corner[0], floor[corner[0]]
        if lower >= limit[0]:
            limit[0], corner[0] = lower, frame
        if upper <= limit[1]:
            limit[1], corner[1] = upper, frame
    return len(floor) - 1, floor[-1]


def silence(source: Arrivals, pieces: Arrivals) -> float:
    """The longest time without a piece while text was held."""
    events = sorted(
        [(at, 0, size) for at, size in source] + [(at, 1, -size) for at, size in pieces]
    )
    held, since, longest = 0, 0.0, 0.0
    for at, is_piece, size in events:
        longest = max(longest, at - since if held else 0.0)
        since = at if is_piece or not held else since
        held += size
    return longest


def busiest_second(pieces: Sizes) -> int:
    """The most pieces in any second."""
    times = [at for at, _ in pieces]
    most, first = 0, 0
    for last, at in enumerate(times):
        while times[first] <= at - 1 + TOLERANCE:
            first += 1
        most = max(most, last - first + 1)
    return most


def score(source: Arrivals, pieces: Arrivals, max_lag: float) -> dict[str, float]:
    """The columns, for [(seconds, characters)] that came and that were shown."""
    came = [at for at, size in source for _ in range(size)]
    went = [at for at, size in pieces for _ in range(size)]
    held = sorted(late - early for early, late in zip(came, went))
    best = unevenness(taut_string(source, max_lag))
    return {
        "first": 1000 * (pieces[0][0] - source[0][0]),
        "lag50": 1000 * held[len(held) // 2],
        "lag99": 1000 * held[len(held) * 99 // 100],
        "lag_max": 1000 * held[-1],
        "end": 1000 * (pieces[-1][0] - source[-1][0]),
        "gap": 1000 * silence(source, pieces),
        "pieces": busiest_second(pieces),
        "ratio": unevenness(pieces) / best,
    }


# ------------------------------------------------------------------------------
# The pacer alone
# ------------------------------------------------------------------------------


def paced(arrivals: Texts, max_lag: float) -> Texts:
    """What the pacer makes of [(seconds, text)], on a clock that is a number."""
    sys.path.insert(0, str(REPOSITORY))
    from opendify import Pacer  # noqa: PLC0415 (the server needs no import)

    pacer, pieces = Pacer(max_lag), list[tuple[float, str]]()

    def take(now: float) -> None:
        text = pacer.take(now)
        if text:
            pieces.append((now, text))

    for at, text in arrivals:
        drain(pacer, take, at)
        pacer.push(text, at)
        take(at)
    pacer.close(arrivals[-1][0])
    drain(pacer, take, math.inf)
    return pieces


def alone(names: list[str], seeds: range, max_lag: float) -> tuple[Scores, Scores]:
    """Scores of the pacer, and of passing through."""
    pure: Scores = {name: [] for name in names}
    through: Scores = {name: [] for name in names}
    for name in names:
        for seed in seeds:
            arrivals = shape(name, seed)
            source, pieces = sizes(arrivals), sizes(paced(arrivals, max_lag))
            pure[name].append(score(source, pieces, max_lag))
            through[name].append(score(source, source, max_lag))
    return pure, through


def drain(pacer: Pacer, take: Callable[[float], None], until: float) -> None:
    """Take at every due time before `until`."""
    for _ in range(100_000):
        due = pacer.next_due()
        if due is None or due >= until:
            return
        take(due)
    raise SystemExit("the pacer never let go")


# ------------------------------------------------------------------------------
# The whole server
# ------------------------------------------------------------------------------


class SmallDify:
    """The part of Dify's API that one streamed chat needs; queries name a shape."""

    def __init__(self) -> None:
        self.sent: dict[
            str, list[tuple[float, str]]
        ] = {}  # query -> [(seconds, text)], as they were sent

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """One connection, request after request, until the proxy closes it."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                method, path, body = await self.read_request(reader)
                if method == "POST" and path.endswith("/chat-messages"):
                    await self.stream(writer, json.loads(body)["query"])
                else:
                    self.answer(writer, path)
                await writer.drain()
        writer.close()

    @staticmethod
    async def read_request(reader: asyncio.StreamReader) -> tuple[str, str, bytes]:
        """(method, path, body) of the next request."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ")
        fields = dict(line.lower().split(":", 1) for line in head[1:] if ":" in line)
        length = int(fields.get("content-length", "0"))
        return method, target.split("?")[0], await reader.readexactly(length)

    @staticmethod
    def answer(writer: asyncio.StreamWriter, path: str) -> None:
        """What an app says about itself, and "success" to all the rest."""
        about: dict[str, Any] = {
            "info": {"name": "bench", "description": "", "tags": [], "mode": "chat"},
            "parameters": {"user_input_form": [], "file_upload": {}},
        }
        body = json.dumps(about.get(path.rsplit("/", 1)[-1], {"result": "success"}))
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body.encode())
        )

    async def stream(self, writer: asyncio.StreamWriter, query: str) -> None:
        """Answer with the shape that the query names, at its own pace."""
        name, seed, _ = query.rsplit("/", 2)
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        sent = self.sent[query] = list[tuple[float, str]]()
        start = time.perf_counter()
        for at, text in shape(name, int(seed)):
            await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
            sent.append((time.perf_counter(), text))
            self.send(writer, {"event": "message", "answer": text})
            await writer.drain()
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        self.send(writer, {"event": "message_end", "metadata": {"usage": usage}})
        writer.write(b"0\r\n\r\n")

    @staticmethod
    def send(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
        """One event, in one chunk."""
        ids = {"task_id": "task", "message_id": "message", "conversation_id": "talk"}
        data = json.dumps({**event, **ids, "created_at": 1700000000})
        line = b"data: %b\n\n" % data.encode()
        writer.write(b"%x\r\n%b\r\n" % (len(line), line))


async def ask(port: int, query: str, smoothing: str) -> Texts:
    """The pieces of one streamed chat completion, as the client sees them."""
    body = json.dumps(
        {
            "model": "bench",
            "stream": True,
            "messages": [{"role": "user", "content": query}],
        }
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        b"Authorization: Bearer bench\r\nContent-Type: application/json\r\n"
        b"X-OpenDify-Smoothing: %b\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
        % (smoothing.encode(), len(body), body)
    )
    pieces: list[tuple[float, str]] = []
    async for line in reader:
        now = time.perf_counter()
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if "error" in event:
                raise SystemExit(f"{query}: {event['error']}")
            for choice in event["choices"]:
                if choice["delta"].get("content"):
                    pieces.append((now, choice["delta"]["content"]))
    writer.close()
    return pieces


async def start_server(
    dify_port: int, max_lag: float
) -> tuple[asyncio.subprocess.Process, int]:
    """Start opendify.py on a free port; returns (process, port)."""
    script = REPOSITORY / "opendify.py"
    environment = {
        **os.environ,
        "MODEL_CONFIG": json.dumps({"bench": "app-bench"}),
        "DIFY_API_BASE": f"http://127.0.0.1:{dify_port}/v1",
        "SERVER_HOST": "127.0.0.1",
        "SERVER_PORT": str(free_port()),
        "STREAM_MAX_LAG": str(max_lag),
        "NO_PROXY": "127.0.0.1",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(script),
        env=environment,
        cwd=tempfile.mkdtemp(),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    port = int(environment["SERVER_PORT"])
    for _ in range(100):
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return process, port
        await asyncio.sleep(0.1)
    process.kill()
    raise SystemExit(f"{script} did not listen within 10 s")


def free_port() -> int:
    """A port of loopback that is free at present."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def served(
    names: list[str], seeds: range, options: argparse.Namespace
) -> dict[str, Scores]:
    """Scores through the server: {smoothing: {name: [score]}}."""
    dify = SmallDify()
    upstream = await asyncio.start_server(dify.serve, "127.0.0.1", 0)
    dify_port = upstream.sockets[0].getsockname()[1]
    process, port = await start_server(dify_port, options.max_lag)
    turns = asyncio.Semaphore(options.jobs)

    async def turn(name: str, seed: int, smoothing: str) -> dict[str, float]:
        query = f"{name}/{seed}/{smoothing}"
        async with turns:
            pieces = await asyncio.wait_for(ask(port, query, smoothing), 60)
        source = dify.sent[query]
        if "".join(text for _, text in pieces) != "".join(text for _, text in source):
            raise SystemExit(f"{query}: the text that arrived is not the text sent")
        return score(sizes(source), sizes(pieces), options.max_lag)

    try:
        await ask(port, "whole/1/warm-up", "off")
        plan = [(n, s, way) for way in ("on", "off") for n in names for s in seeds]
        scores = await asyncio.gather(*(turn(*entry) for entry in plan))
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 40)
        upstream.close()
    found: dict[str, Scores] = {
        way: {name: [] for name in names} for way in ("on", "off")
    }
    for (name, _, way), row in zip(plan, scores):
        found[way][name].append(row)
    return found


# ------------------------------------------------------------------------------
# Reports
# ------------------------------------------------------------------------------


def geometric_mean(values: Sequence[float]) -> float:
    """The mean for ratios."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


def print_table(title: str, rows: Scores) -> None:
    """One line a shape: medians of lag50 and lag99, means of ratio, else the worst."""
    print(f"\n{title}")
    print("shape".ljust(11) + "".join(name.rjust(9) for name in COLUMNS) + "    worst")
    means = []
    for name, scores in rows.items():
        cells = []
        for column in COLUMNS[:-1]:
            values = [row[column] for row in scores]
            is_typical = column in ("lag50", "lag99")
            value = statistics.median(values) if is_typical else max(values)
            cells.append(f"{value:9.0f}")
        ratios = [row["ratio"] for row in scores]
        means.append(geometric_mean(ratios))
        print(name.ljust(11) + "".join(cells) + f"{means[-1]:9.3f}{max(ratios):9.3f}")
    print("geometric mean".ljust(74) + f"{geometric_mean(means):9.3f}")


def draw(path: str, seed: int, max_lag: float) -> None:
    """An SVG of what came, what was shown and what is best, for a bursty source."""
    arrivals = [arrival for arrival in shape("bursty", seed) if arrival[0] < 4.5]
    came, shown = sizes(arrivals), sizes(paced(arrivals, max_lag))
    best = taut_string(came, max_lag)
    total, seconds = sum(size for _, size in came), came[-1][0] + max_lag + 0.1
    width, height, left, bottom = 760, 380, 50, 40

    def place(at: float, level: float) -> str:
        x = left + at / seconds * (width - left - 10)
        return f"{x:.1f},{height - bottom - level / total * (height - bottom - 20):.1f}"

    def line(
        pieces: Sizes, color: str, label: str, row: int, *, steps: bool = True
    ) -> str:
        level, points = 0.0, [place(0, 0)]
        for at, size in pieces:
            points += [place(at, level)] if steps else []
            level += size
            points.append(place(at, level))
        points.append(place(seconds, level))
        y = 30 + 20 * row
        return (
            f'<polyline fill="none" stroke="{color}" stroke-width="2" '
            f'points="{" ".join(points)}"/>'
            f'<path d="M{left + 20} {y - 4}h24" stroke="{color}" stroke-width="3"/>'
            f'<text x="{left + 52}" y="{y}">{escape(label)}</text>'
        )

    ticks = "".join(
        f'<text x="{place(second, 0).split(",")[0]}" y="{height - bottom + 18}" '
        f'text-anchor="middle">{second} s</text>'
        for second in range(int(seconds) + 1)
    )
    corner = f"{left} {height - bottom}"
    Path(path).write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="13" fill="#444">'
        f'<rect width="{width}" height="{height}" fill="#fff"/>'
        f'<path d="M{left} 15V{height - bottom}H{width - 10}" '
        'fill="none" stroke="#888"/>'
        f'<path d="M{corner}m-4 0h4" stroke="#888"/>{ticks}'
        f'<text x="{left - 6}" y="24" text-anchor="end">{total}</text>'
        + line(came, "#d1495b", "arrived from Dify (characters)", 0)
        + line(best, "#9aa5b1", f"smoothest within {max_lag} s", 1, steps=False)
        + line(shown, "#00798c", "shown by OpenDify", 2)
        + "</svg>\n",
        encoding="utf-8",
    )


def main() -> None:
    """Parse the arguments, play, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--pure", action="store_true", help="no server")
    parser.add_argument("--seeds", type=int, default=1, help="so many of each (1)")
    parser.add_argument("--first-seed", type=int, default=1, help="start with this one")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--max-lag", type=float, default=0.4, help="seconds (0.4)")
    parser.add_argument("--jobs", type=int, default=4, help="streams at a time (4)")
    parser.add_argument("--svg", metavar="FILE", help="draw a bursty source")
    options = parser.parse_args()
    seeds = range(options.first_seed, options.first_seed + max(1, options.seeds))
    pure, through = alone(options.shapes, seeds, options.max_lag)
    print_table("The pacer alone", pure)
    print_table("Passing through", through)
    if options.svg:
        draw(options.svg, options.first_seed + 2, options.max_lag)
    if not options.pure:
        found = asyncio.run(served(options.shapes, seeds, options))
        print_table("Through the server", found["on"])
        print_table("Through the server, X-OpenDify-Smoothing: off", found["off"])


if __name__ == "__main__":
    main()
