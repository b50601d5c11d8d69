#!/usr/bin/env python3
"""Measure what the proxy costs, beside a relay that only copies bytes.

    python tests/bench_load.py                     # everything, medians of 3 runs
    python tests/bench_load.py --quick             # a first look, in half a minute
    python tests/bench_load.py --workloads W1,W5 --runs 5 --json load.json

opendify.py (with smoothing on and off) and the relay take turns on one core, started
anew for every run; a small Dify and the clients, a process each, share another core.
All of it stays on loopback and needs nothing but the standard library.

    W1     whole answers, 32 clients at a time
    W2     200 streams at a human pace: each event comes alone
    W3     32 streams as fast as they can be read, 25 events a write
    W4     1,000 streams held open, an event a second each; then 2,000
    W5     one stream after another: when does the first text come?
    start  from the start of the process until the port listens, and its imports

Every answer is compared with the text that was sent, and must have its end; what is not
right is an error, and then the exit status is 1. CPU time is that of the subject's
process alone. In W2 it is taken only while all streams are open, so that it holds no
connection's beginning or end. Latency is the time from an event's writing to its
reading; in W5 the time without any proxy between ("direct") is taken off. Memory is the
growth of resident memory for each stream. `others` is the share of the machine that
other processes used meanwhile: over a few percent, believe only ratios.

Linux tells CPU time and memory of other processes, and pins processes to cores;
elsewhere those figures are missing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import gc
import json
import math
import mmap
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from socket import create_connection, socket
from typing import Any, Callable, NamedTuple, Optional, cast

Row = dict[str, float]  # what one run measured
Runs = dict[str, dict[str, list[Row]]]  # by workload and subject

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "opendify.py"
THIS = str(Path(__file__).resolve())
HOST = "127.0.0.1"
KEY = "sk-bench"
RUN_LIMIT_S = 180.0
STOP_LIMIT_S = 35.0  # opendify.py lets its turns end for 30 s
BACKLOG = 4096
QUIET_PERCENT = 10  # of the machine, that others may use before it is worth a note

# ------------------------------------------------------------------------------
# Workloads, and what issue 5 asks of them
# ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """One kind of load; `gap_s` is between writes, each of `burst` events."""

    name: str
    clients: int
    requests: int
    events: int  # of each answer
    chars: int = 4  # of each event
    gap_s: float = 0.0
    burst: int = 1
    ramp_s: float = 0.0  # in which the clients start
    is_whole: bool = False  # not streamed
    subjects: tuple[str, ...] = ("off", "on", "relay")

    @property
    def family(self) -> str:
        """The name that --workloads takes."""
        return self.name.split("/")[0]

    def __str__(self) -> str:
        """What is asked for."""
        kind = "whole answers" if self.is_whole else "streams"
        pace = f", {self.burst} every {self.gap_s * 1000:g} ms" if self.gap_s else ""
        pace = pace or (f", {self.burst} a write" if self.burst > 1 else "")
        return (
            f"{self.requests:,} {kind}, {self.clients:,} at a time, "
            f"{self.events:,} events of {self.chars} characters{pace}"
        )


WORKLOADS = (
    Workload("W1", 32, 3000, 10, 20, is_whole=True, subjects=("on", "relay")),
    Workload("W2", 200, 200, 100, gap_s=0.05, ramp_s=1.037),
    Workload("W3", 32, 32, 2000, burst=25),
    Workload("W4", 1000, 1000, 10, gap_s=1.0, ramp_s=3.017),
    Workload("W4/2000", 2000, 2000, 10, gap_s=1.0, ramp_s=6.017, subjects=("on",)),
    Workload("W5", 1, 200, 5, gap_s=0.002, subjects=("off", "on", "relay", "direct")),
)
QUICK: dict[str, dict[str, Any]] = {
    "W1": {"requests": 600},
    "W2": {"events": 25, "ramp_s": 0.537},
    "W3": {"events": 1000},
    "W4": {"events": 4, "gap_s": 0.5, "ramp_s": 1.017, "subjects": ("on", "relay")},
    "W4/2000": {"events": 4, "gap_s": 0.8, "ramp_s": 2.017},
    "W5": {"requests": 15, "subjects": ("off", "on", "direct")},
}
START = "start"


class Figure(NamedTuple):
    """A line of the last table; `of` is what is bounded: the figure, or "ratio"."""

    workload: str
    label: str
    subject: str
    key: str
    style: str
    bound: float
    of: str = "at most"
    less: str = ""  # the subject whose figure is taken off


FIRST = "first_p50_ms"
FIGURES = (
    Figure("W1", "CPU us/request", "on", "cpu_us_request", ",.0f", 10, "ratio"),
    Figure("W1", "requests/s", "on", "requests_s", ",.0f", 2500, "at least"),
    Figure("W2", "CPU us/event, off", "off", "cpu_us_event", ".1f", 2.2, "ratio"),
    Figure("W2", "CPU us/event, on", "on", "cpu_us_event", ".1f", 4, "ratio"),
    Figure("W2", "latency p99 ms, off", "off", "latency_p99_ms", ".2f", 3),
    Figure("W3", "events/s, off", "off", "events_s", ",.0f", 150_000, "at least"),
    Figure("W4", "KB/stream, off", "off", "kb_stream", ".1f", 25),
    Figure("W4", "KB/stream, on", "on", "kb_stream", ".1f", 25),
    Figure("W4/2000", "errors, on", "on", "errors", ".0f", 0),
    Figure(
        "W5", "first text + ms, off", "off", "first_p50_ms", ".2f", 0.8, less="direct"
    ),
    Figure("W5", "first text + ms, on", "on", FIRST, ".2f", 0.8, less="direct"),
    Figure(START, "until it listens, ms", "on", "listens_ms", ".0f", 300),
    Figure(START, "imports, ms", "on", "imports_ms", ".0f", 80),
)
# What is printed of a run: heading and format. Keys that a run lacks are passed over.
COLUMNS = {
    "requests_s": ("req/s", ",.0f"),
    "cpu_us_request": ("CPU us/req", ",.0f"),
    "request_p50_ms": ("request p50 ms", ".2f"),
    "request_p99_ms": ("request p99 ms", ".2f"),
    "events_s": ("events/s", ",.0f"),
    "cpu_us_event": ("CPU us/event", ".2f"),
    "pieces_event": ("pieces/event", ".2f"),
    "latency_p50_ms": ("latency p50 ms", ".2f"),
    "latency_p99_ms": ("latency p99 ms", ".2f"),
    "first_p50_ms": ("first p50 ms", ".3f"),
    "first_p99_ms": ("first p99 ms", ".2f"),
    "kb_stream": ("KB/stream", ".1f"),
    "peak_mb": ("peak MB", ".1f"),
    "cpu_percent": ("CPU %", ".0f"),
    "listens_ms": ("listens ms", ".0f"),
    "listens_cpu_ms": ("CPU ms till then", ".0f"),
    "imports_ms": ("imports ms", ".1f"),
    "others_percent": ("others %", ".0f"),
    "errors": ("errors", ".0f"),
}
SHOWN = {
    "W1": "requests_s cpu_us_request request_p50_ms request_p99_ms",
    "W2": "cpu_us_event latency_p50_ms latency_p99_ms pieces_event cpu_percent",
    "W3": "events_s cpu_us_event pieces_event cpu_percent peak_mb",
    "W4": "kb_stream peak_mb latency_p99_ms first_p99_ms cpu_percent",
    "W5": "first_p50_ms first_p99_ms cpu_us_request",
    START: "listens_ms listens_cpu_ms imports_ms",
}

# ------------------------------------------------------------------------------
# Answers, known before they are asked for
# ------------------------------------------------------------------------------

POOL = "".join(Random(5).choices("abcdefghijklmnopqrstuvwxyz    ", k=1 << 16))
QUESTION = "Give me answer number {} of series {} please."
NUMBERS = re.compile(rb"answer number (\d+) of series (\d+) ")
SERIES_WARM, SERIES = 0, 1  # of a run: before it is measured, and while it is
SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n"
)


def json_data(value: Any) -> bytes:
    """JSON as Dify writes it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def json_response(value: Any) -> bytes:
    """A whole response of 200."""
    body = json_data(value)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d"
    return head % len(body) + b"\r\n\r\n" + body


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def text_of(number: int, load: Workload) -> bytes:
    """The text of an answer; no two neighbours have the same."""
    size = load.events * load.chars
    start = number * 61 % (len(POOL) - size)
    return POOL[start : start + size].encode()


class Board:
    """What Dify's process tells the clients' process: when it has sent what.

    Shared memory, because asking would disturb: the number of all events sent, and the
    time of each.
    """

    def __init__(self, path: Path, load: Workload) -> None:
        self._events = load.events
        size = 8 * (1 + load.requests * load.events)
        if not path.exists():
            path.write_bytes(bytes(size))
        with path.open("r+b") as file:
            self._cells = memoryview(mmap.mmap(file.fileno(), size)).cast("d")

    @property
    def sent(self) -> int:
        """How many events were sent."""
        return int(self._cells[0])

    def note(self, number: int, event: int, count: int) -> None:
        """So many events of an answer are being sent, from `event` on."""
        at = 1 + number * self._events + event
        now = time.perf_counter()
        for cell in range(at, at + count):
            self._cells[cell] = now
        self._cells[0] += count

    def times(self, number: int, begin: int, end: int) -> Sequence[float]:
        """When events of an answer were sent."""
        at = 1 + number * self._events
        return self._cells[at + begin : at + end]


class Answer:
    """What Dify says to request `number`: its text, and the bytes of it, ready made."""

    def __init__(self, number: int, load: Workload, board: Optional[Board]) -> None:
        self.number = number
        self.text = text_of(number, load)
        self.load = load
        self.board = board
        talk, message = f"{number:08x}-8118-4bc5", f"{number:08x}-f0c7-4085"
        ids = {"conversation_id": talk, "message_id": message, "created_at": 1705398420}
        self.ids = {**ids, "task_id": f"{number:08x}-a077-43df", "id": message}
        self.blocks = list(self._blocks())

    def _blocks(self) -> Iterator[bytes]:
        """What is written at once: `burst` events, each in its own chunk."""
        path = {"from_variable_selector": ["llm", "text"]}
        event = json_data({"event": "message", **self.ids, "answer": "@", **path})
        before, after = event.split(b"@")
        chars, step = self.load.chars, self.load.chars * self.load.burst
        head = b"%x\r\ndata: %b" % (len(event) - 1 + chars + 8, before)
        for start in range(0, len(self.text), step):
            block = self.text[start : start + step]
            yield b"".join(
                b"%b%b%b\n\n\r\n" % (head, block[at : at + chars], after)
                for at in range(0, len(block), chars)
            )

    @property
    def metadata(self) -> dict[str, Any]:
        """Usage, with the fields that Dify has."""
        count = self.load.events
        price = {"total_price": "0.0000130", "currency": "USD", "latency": 0.6}
        usage = {"prompt_tokens": 11, "completion_tokens": count}
        usage["total_tokens"] = 11 + count
        return {"usage": {**usage, **price}, "retriever_resources": []}

    def end(self) -> bytes:
        """What closes the stream."""
        event = {"event": "message_end", **self.ids, "metadata": self.metadata}
        return chunk(b"data: %b\n\n" % json_data(event)) + b"0\r\n\r\n"

    def whole(self) -> bytes:
        """The response, not streamed."""
        text = {"answer": self.text.decode(), "metadata": self.metadata}
        return json_response({"event": "message", "mode": "chat", **self.ids, **text})


# ------------------------------------------------------------------------------
# Dify
# ------------------------------------------------------------------------------


ABOUT = {  # what an app tells of itself
    b"info": json_response({"name": "bench", "tags": [], "mode": "chat"}),
    b"parameters": json_response({"user_input_form": [], "file_upload": {}}),
}


class Dify(asyncio.Protocol):
    """One connection with the proxy: requests are answered one after another."""

    def __init__(self, series: Sequence[Sequence[Answer]]) -> None:
        self.series = series
        self.buffer = b""
        self.answer: Optional[Answer] = None
        self.written = 0  # blocks
        self.is_writable = True
        self.timer: Optional[asyncio.Handle] = None
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The proxy has connected."""
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=1 << 18)

    def connection_lost(self, exc: Optional[Exception]) -> None:
        """The proxy has left."""
        if self.timer:
            self.timer.cancel()

    def data_received(self, data: bytes) -> None:
        """More of a request."""
        self.buffer += data
        if not self.answer:
            self.read_request()

    def read_request(self) -> None:
        """Answer the next request, if all of it is here."""
        head, blank, rest = self.buffer.partition(b"\r\n\r\n")
        found = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        size = int(found[1]) if found else 0
        if not blank or len(rest) < size:
            return
        body, self.buffer = rest[:size], rest[size:]
        numbers = NUMBERS.search(body)
        if numbers is None:
            path = head.split(b" ", 2)[1].rpartition(b"/")[2]
            result = json_response({"result": "success"})
            self.transport.write(ABOUT.get(path, result))
            return
        answer = self.series[int(numbers[2])][int(numbers[1])]
        if b'"blocking"' in body:
            self.transport.write(answer.whole())
            return
        self.transport.write(SSE_HEAD)
        self.answer, self.written = answer, 0
        self.due = self.loop.time()
        self.write_block()

    def write_block(self) -> None:
        """Write what is due, and come back for the next one."""
        answer = cast("Answer", self.answer)
        load = answer.load
        if answer.board:
            event = self.written * load.burst
            answer.board.note(answer.number, event, load.burst)
        self.transport.write(answer.blocks[self.written])
        self.written += 1
        if self.written == len(answer.blocks):
            self.timer = self.answer = None
            self.transport.write(answer.end())
        elif load.gap_s:
            self.due += load.gap_s
            self.timer = self.loop.call_at(self.due, self.write_block)
        elif self.is_writable:
            self.timer = self.loop.call_soon(self.write_block)
        else:
            self.timer = None

    def pause_writing(self) -> None:
        """The proxy reads too slowly."""
        self.is_writable = False

    def resume_writing(self) -> None:
        """The proxy has caught up."""
        self.is_writable = True
        if self.answer and not self.timer:
            self.write_block()


async def serve_dify(port: int, board_path: Path, plans: Sequence[Workload]) -> None:
    """Be Dify until killed, for the answers of all plans."""
    warm, plan = plans
    board = Board(board_path, plan)
    series = [
        [Answer(number, warm, None) for number in range(warm.requests)],
        [Answer(number, plan, board) for number in range(plan.requests)],
    ]
    gc.disable()  # nothing here is worth a pause
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Dify(series), HOST, port, backlog=BACKLOG)
    await server.serve_forever()


# ------------------------------------------------------------------------------
# Clients
# ------------------------------------------------------------------------------

# About as many fields as the OpenAI Python client sends, and as long.
FIELDS = {
    "Accept": "application/json",
    "Accept-Encoding": "gzip, deflate",
    "Connection": "keep-alive",
    "Content-Type": "application/json",
    "User-Agent": "OpenAI/Python 1.0.0 (bench)",
    "X-Stainless-Lang": "python",
    "X-Stainless-Package-Version": "1.0.0",
    "X-Stainless-OS": platform.system(),
    "X-Stainless-Arch": f"other:{platform.machine()}",
    "X-Stainless-Runtime": platform.python_implementation(),
    "X-Stainless-Runtime-Version": platform.python_version(),
    "X-Stainless-Async": "false",
    "X-Stainless-Retry-Count": "0",
    "X-Stainless-Read-Timeout": "600",
    "Authorization": f"Bearer {KEY}",
}


@dataclass(frozen=True)
class Dialect:
    """How one API is asked and read: patterns of its texts and of its end."""

    path: str
    text: re.Pattern[bytes]
    end: bytes
    body: Callable[[str, bool], dict[str, Any]]
    whole_text: Callable[[Any], str]

    def request(self, number: int, series: int, *, is_whole: bool) -> bytes:
        """The bytes that ask for an answer."""
        body = json_data(self.body(QUESTION.format(number, series), is_whole))
        fields = {"Host": HOST, **FIELDS, "Content-Length": str(len(body))}
        lines = [f"{name}: {value}\r\n" for name, value in fields.items()]
        head = f"POST /v1/{self.path} HTTP/1.1\r\n{''.join(lines)}\r\n"
        return head.encode() + body


OPENAI = Dialect(
    "chat/completions",
    re.compile(rb'"content": ?"([^"]*)"'),
    b"data: [DONE]\n\n",
    lambda question, is_whole: {
        "messages": [
            {"role": "system", "content": "You answer briefly and to the point."},
            {"role": "user", "content": question},
        ],
        "model": "bench",
        "stream": not is_whole,
    },
    lambda value: str(value["choices"][0]["message"]["content"]),
)
DIFY = Dialect(
    "chat-messages",
    re.compile(rb'"answer": ?"([^"]*)"'),
    b'"event":"message_end"',
    lambda question, is_whole: {
        "inputs": {},
        "query": question,
        "response_mode": "blocking" if is_whole else "streaming",
        "user": "bench",
    },
    lambda value: str(value["answer"]),
)


class Framing:
    """Takes a response's body out of its bytes; a wrong one raises ValueError."""

    def __init__(self) -> None:
        self.status = 0
        self.is_complete = False
        self._buffer = b""
        self._left = -1  # bytes of a body with a length; -1: chunked

    def feed(self, data: bytes) -> bytes:
        """The bytes of the body in `data`."""
        if not self.status:
            head, blank, data = (self._buffer + data).partition(b"\r\n\r\n")
            if not blank:
                self._buffer = head
                return b""
            self._buffer = b""
            self._read_head(head)
        if self._left < 0:
            return self._feed_chunks(self._buffer + data)
        self._left -= len(data)
        self.is_complete = not self._left
        if self._left < 0:
            raise ValueError("more than the length says")
        return data

    def _read_head(self, head: bytes) -> None:
        self.status = int(head.split(b" ", 2)[1])
        found = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        if found:
            self._left = int(found[1])
        elif not re.search(rb"\r\ntransfer-encoding: *chunked", head, re.IGNORECASE):
            raise ValueError("a body without an end")

    def _feed_chunks(self, data: bytes) -> bytes:
        at, pieces = 0, []
        while not self.is_complete:
            line = data.find(b"\r\n", at)
            end = line + 4 + int(data[at:line], 16) if line >= 0 else 0
            if line < 0 or end > len(data):
                break
            if data[end - 2 : end] != b"\r\n":
                raise ValueError("a chunk without its end")
            pieces.append(data[line + 2 : end - 2])
            self.is_complete = end == line + 4
            at = end
        self._buffer = data[at:]
        if self.is_complete and self._buffer:
            raise ValueError("bytes after the end")
        return b"".join(pieces)


class Run:
    """One load: what is to be asked, and what came of it."""

    def __init__(
        self, load: Workload, dialect: Dialect, board: Board, series: int, pid: int = 0
    ) -> None:
        self.load = load
        self.dialect = dialect
        self.board = board
        self.pid = pid
        self.series = series
        self.next_number = 0
        self.running = 0
        self.begun = 0
        self.pieces = 0
        self.request_s: list[float] = []
        self.first_s: list[float] = []
        self.latency_s: list[float] = []
        self.errors: list[str] = []
        self.marks: list[tuple[float, float, int]] = []  # all began; the first ended
        self.is_over = asyncio.get_running_loop().create_future()

    def mark(self) -> None:
        """Note (time, CPU seconds, events sent)."""
        spent = cpu_seconds(self.pid) if self.pid else math.nan
        self.marks.append((time.perf_counter(), spent, self.board.sent))

    def began(self) -> None:
        """A client has its first text."""
        self.begun += 1
        if self.begun == self.load.clients:
            self.mark()

    def ended(self) -> None:
        """A client has a whole stream."""
        if len(self.marks) == 1:
            self.mark()

    def steady_cpu_us(self) -> float:
        """CPU time for an event while all streams were open; NaN if they never were."""
        if len(self.marks) < 2:
            return math.nan
        (_, cpu, sent), (_, later_cpu, later_sent) = self.marks
        count = later_sent - sent
        is_long = count >= self.load.clients  # an event of each, at least
        return (later_cpu - cpu) / count * 1e6 if is_long else math.nan

    def left(self) -> None:
        """A client has nothing to do any more."""
        self.running -= 1
        if not self.running and not self.is_over.done():
            self.is_over.set_result(None)


class Client(asyncio.Protocol):
    """One client: asks, reads the answer, asks again, until all is asked."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.is_asking = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The first request."""
        self.transport = cast("asyncio.Transport", transport)
        self.ask()

    def ask(self) -> None:
        """Send the next request; leave if there is none."""
        run = self.run
        self.is_asking = run.next_number < run.load.requests
        if not self.is_asking:
            self.transport.close()
            return
        self.number = run.next_number
        is_whole = run.load.is_whole
        request = run.dialect.request(self.number, run.series, is_whole=is_whole)
        run.next_number += 1
        self.framing = Framing()
        self.body: list[bytes] = []
        self.part = b""  # of an event, or of a whole answer
        self.chars = 0
        self.has_end = False
        self.asked_at = time.perf_counter()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        """More of an answer."""
        now = time.perf_counter()
        if not self.is_asking:
            return self.fail("bytes that nobody asked for")
        try:
            body = self.framing.feed(data)
        except ValueError as error:
            return self.fail(f"bad HTTP: {error}")
        if body and self.run.load.is_whole:
            self.part += body
        elif body:
            self.read_events(body, now)
        if self.framing.is_complete:
            self.finish(now)
        return None

    def read_events(self, data: bytes, now: float) -> None:
        """Find the texts, and when they were sent."""
        run = self.run
        lines, end, self.part = (self.part + data).rpartition(b"\n\n")
        texts = run.dialect.text.findall(lines)
        self.has_end = run.dialect.end in lines + end
        text = b"".join(texts)
        if not text:
            return
        if not self.chars:
            run.first_s.append(now - self.asked_at)
            run.began()
        before, self.chars = self.chars, self.chars + len(text)
        run.pieces += len(texts)
        self.body.append(text)
        if run.load.gap_s:
            whole = (before // run.load.chars, self.chars // run.load.chars)
            run.latency_s += [now - at for at in run.board.times(self.number, *whole)]

    def finish(self, now: float) -> None:
        """Check the answer, and go on."""
        self.run.request_s.append(now - self.asked_at)
        self.run.ended()
        problem = self.problem()
        if problem:
            self.fail(problem)
        else:
            self.ask()

    def problem(self) -> str:
        """What is wrong with the answer; "" for nothing."""
        if self.framing.status != 200:
            return f"status {self.framing.status}: {self.part[:300]!r}"
        text = b"".join(self.body)
        if self.run.load.is_whole:
            try:
                value = json.loads(self.part)
                text = self.run.dialect.whole_text(value).encode()
            except (ValueError, LookupError, TypeError) as error:
                return f"not an answer: {error!r}"
        elif not self.has_end:
            return "a stream without its end"
        expected = text_of(self.number, self.run.load)
        return "" if text == expected else "not the text that was sent"

    def fail(self, problem: str) -> None:
        """This client will ask no more."""
        self.run.errors.append(problem)
        self.is_asking = False
        self.transport.abort()

    def connection_lost(self, exc: Optional[Exception]) -> None:
        """Closed, by whomever."""
        if self.is_asking:
            self.run.errors.append(f"connection lost ({exc or 'closed'})")
        self.run.left()


async def load(run: Run, port: int) -> None:
    """Put the load on a port; returns when all is answered."""
    loop = asyncio.get_running_loop()
    clients = run.running = run.load.clients
    start = loop.time()

    async def connect() -> None:
        try:
            await loop.create_connection(lambda: Client(run), HOST, port)
        except OSError as error:
            run.errors.append(f"no connection ({error})")
            run.left()

    tasks = []
    for number in range(clients):
        late = start + run.load.ramp_s * number / clients - loop.time()
        if late > 0:
            await asyncio.sleep(late)
        tasks.append(asyncio.ensure_future(connect()))
    try:
        await asyncio.wait_for(run.is_over, RUN_LIMIT_S)
    except asyncio.TimeoutError:
        run.errors.append(f"not over after {RUN_LIMIT_S:.0f} s")
    await asyncio.gather(*tasks)


# ------------------------------------------------------------------------------
# The relay
# ------------------------------------------------------------------------------


class End(asyncio.Protocol):
    """One end of a pair of connections: what it reads, the other writes."""

    def __init__(self, upstream_port: int, other: Optional[End] = None) -> None:
        self.upstream_port = upstream_port
        self.other = other
        self.is_client = other is None
        self.early: list[bytes] = []  # what came before the other end was there
        self.write: Callable[[bytes], None] = self.early.append

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client's end waits for the end at Dify's side."""
        self.transport = cast("asyncio.Transport", transport)
        if self.is_client:
            self.connecting = asyncio.ensure_future(self.connect())
        elif self.other:
            self.write = self.other.transport.write
            self.other.write = self.transport.write
            self.other.other = self
            self.transport.writelines(self.other.early)
            self.other.early.clear()

    async def connect(self) -> None:
        """Open the other end."""
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(
                lambda: End(self.upstream_port, self), HOST, self.upstream_port
            )
        except OSError:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """All there is to do."""
        self.write(data)

    def pause_writing(self) -> None:
        """This end cannot write more, so the other one stops reading."""
        if self.other:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        """Go on."""
        if self.other and not self.other.transport.is_closing():
            self.other.transport.resume_reading()

    def connection_lost(self, exc: Optional[Exception]) -> None:
        """Both ends close together."""
        if self.other:
            self.other.transport.close()


async def relay(port: int, upstream_port: int) -> None:
    """Copy bytes between clients and Dify until killed."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: End(upstream_port), HOST, port, backlog=BACKLOG
    )
    await server.serve_forever()


# ------------------------------------------------------------------------------
# Processes
# ------------------------------------------------------------------------------


class Cores(NamedTuple):
    """The cores of the subject and of all the rest; None where they can't be chosen."""

    subject: Optional[int]
    rest: Optional[int]


def choose_cores() -> Cores:
    """Two cores, if there are two and this system can pin processes to them."""
    if sys.platform == "linux":
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) > 1:
            return Cores(cores[0], cores[1])
    print("note: processes are not pinned to cores, so they disturb each other")
    return Cores(None, None)


def pin(core: Optional[int], pid: int = 0) -> None:
    """Keep a process on one core."""
    if sys.platform == "linux" and core is not None:
        os.sched_setaffinity(pid, {core})


def stay_awake() -> None:
    """Spin whenever this core has nothing else to do, until the parent is gone.

    An idle core dozes off, and what it then takes to handle a single event is mostly
    the waking, above all in a virtual machine.
    """
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        parent = os.getppid()
        while os.getppid() == parent:
            os.sched_yield()


@contextlib.contextmanager
def awake(cores: Cores) -> Iterator[list[int]]:
    """Both cores awake; gives the ids of the processes that see to it."""
    argv = [sys.executable, THIS, "--stay-awake"]
    wakers = []
    for core in cores:
        if core is not None:
            wakers.append(subprocess.Popen(argv))
            pin(core, wakers[-1].pid)
    try:
        yield [waker.pid for waker in wakers]
    finally:
        for waker in wakers:
            waker.kill()
            waker.wait()


def cpu_seconds(pid: int) -> float:
    """CPU time of a process; NaN where the system does not tell.

    The number of a process's clock is made of its id, as clock_getcpuclockid(3) does.
    """
    if sys.platform != "linux":
        return math.nan
    try:
        return time.clock_gettime(~pid << 3 | 2)
    except OSError:
        return math.nan


def resident_bytes(pid: int) -> float:
    """Resident memory of a process; NaN where the system does not tell."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
        return float(pages) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return math.nan


def busy_seconds() -> float:
    """CPU time that all cores have spent on anything; NaN if the system is silent."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return math.nan
    user, nice, system, _, _, *interrupts = map(int, first.split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def allow_files(count: int) -> bool:
    """Ask for so many open files, here and in the subjects; whether they are given."""
    try:
        import resource  # noqa: PLC0415 (Windows has none)
    except ImportError:
        return True
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY not in (soft, hard) and soft < count:
        soft = min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft == resource.RLIM_INFINITY or soft >= count


def free_port() -> int:
    """A port of loopback that is free at present."""
    with socket() as sock:
        sock.bind((HOST, 0))
        return int(sock.getsockname()[1])


class Child:
    """A process that listens on a port when this is made.

    Args:
        argv: what Python is to run.
        core: where to run it.
        port: where it will listen.
        home: its directory; its output goes to a file there.
        settings: added to the environment.
    """

    def __init__(
        self,
        argv: Sequence[str],
        core: Optional[int],
        port: int,
        home: Path,
        settings: Mapping[str, str],
    ) -> None:
        started_at = time.perf_counter()
        with (home / f"{port}.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *argv],
                env={**os.environ, **settings},
                cwd=home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.pid, self.port = self._process.pid, port
        pin(core, self.pid)
        while time.perf_counter() < started_at + 20 and self._process.poll() is None:
            with contextlib.suppress(OSError), create_connection((HOST, port)):
                self.listens_s = time.perf_counter() - started_at
                self.listens_cpu_s = cpu_seconds(self.pid)
                return
            time.sleep(0.002)
        self.stop()
        tail = (home / f"{port}.log").read_text(errors="replace")[-2000:]
        raise SystemExit(f"{argv[0]} does not listen:\n{tail}")

    def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def start_dify(plans: Sequence[Workload], core: Optional[int], home: Path) -> Child:
    """A small Dify, ready for all answers of the plans."""
    port = free_port()
    text = json.dumps([dataclasses.asdict(plan) for plan in plans])
    argv = [THIS, "--dify", str(port), str(home / "board"), text]
    return Child(argv, core, port, home, {})


def start_opendify(name: str, dify_port: int, core: Optional[int], home: Path) -> Child:
    """opendify.py, its smoothing "on" or "off"."""
    empty = home / "empty.env"  # not the .env of whoever runs this
    empty.touch()
    port = free_port()
    settings = {
        "MODEL_CONFIG": json.dumps({"bench": "app-bench"}),
        "DIFY_API_BASE": f"http://{HOST}:{dify_port}/v1",
        "DIFY_API_KEYS": "",
        "SERVER_HOST": HOST,
        "SERVER_PORT": str(port),
        "VALID_API_KEYS": KEY,
        "STREAM_SMOOTHING": name,
        "CONVERSATION_STORE": "memory",
        "LOG_LEVEL": "INFO",
    }
    argv = [str(SCRIPT), "--env-file", str(empty)]
    return Child(argv, core, port, home, settings)


def start_relay(dify_port: int, core: Optional[int], home: Path) -> Child:
    """The relay."""
    port = free_port()
    return Child([THIS, "--relay", str(port), str(dify_port)], core, port, home, {})


# ------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------


@dataclass
class Meter:
    """What the subject and the machine use during a run."""

    pid: int
    dify_pid: int
    wakers: list[int]
    rest_bytes: float = field(init=False)
    peak_bytes: float = field(init=False)

    def __post_init__(self) -> None:
        """Read the counters before the run."""
        self.rest_bytes = self.peak_bytes = resident_bytes(self.pid)
        self.started_at = time.perf_counter()
        self.begin = self._read()

    def _read(self) -> tuple[float, float]:
        """CPU seconds (of the subject, of strangers)."""
        own = cpu_seconds(self.pid) if self.pid else 0.0
        known = [self.dify_pid, *self.wakers]
        ours = own + time.process_time() + sum(map(cpu_seconds, known))
        return own, busy_seconds() - ours

    async def watch(self) -> None:
        """Look at the memory until cancelled."""
        while self.pid:
            self.peak_bytes = max(self.peak_bytes, resident_bytes(self.pid))
            await asyncio.sleep(0.1)

    def row(self, run: Run) -> Row:
        """The figures of a run that has just ended."""
        seconds = time.perf_counter() - self.started_at
        own, strangers = (b - a for a, b in zip(self.begin, self._read()))
        asked, events = len(run.request_s), run.board.sent
        row = {
            "seconds": seconds,
            "others_percent": max(0, strangers) / seconds / (os.cpu_count() or 1) * 100,
            "requests_s": asked / seconds,
            "events_s": events / seconds,
            "cpu_percent": own / seconds * 100,
            "cpu_us_request": own / max(asked, 1) * 1e6,
            "cpu_us_event": own / max(events, 1) * 1e6,
            "pieces_event": run.pieces / max(events, 1),
            "peak_mb": self.peak_bytes / 2**20,
            "kb_stream": (self.peak_bytes - self.rest_bytes) / 1024 / run.load.clients,
        }
        if run.load.gap_s:
            row["cpu_us_event"] = run.steady_cpu_us()
        for name in ("request", "first", "latency"):
            values = sorted(getattr(run, f"{name}_s"))
            for percent in (50, 99) if values else ():
                value = values[math.ceil(len(values) * percent / 100) - 1]
                row[f"{name}_p{percent}_ms"] = value * 1000
        return {key: value for key, value in row.items() if not math.isnan(value)}


@contextlib.contextmanager
def started(
    name: str, plans: Sequence[Workload], cores: Cores, home: Path
) -> Iterator[tuple[Child, Optional[Child]]]:
    """(Dify, the subject that stands before it); "direct" is no subject at all."""
    dify = start_dify(plans, cores.rest, home)
    subject = None
    try:
        if name == "relay":
            subject = start_relay(dify.port, cores.subject, home)
        elif name != "direct":
            subject = start_opendify(name, dify.port, cores.subject, home)
        yield dify, subject
    finally:
        if subject:
            subject.stop()
        dify.stop()


async def measure(plan: Workload, name: str, cores: Cores, wakers: list[int]) -> Row:
    """One run of one workload against one subject, which is started for it."""
    dialect = OPENAI if name in ("on", "off") else DIFY
    warm = replace(plan, clients=min(8, plan.clients), requests=16, ramp_s=0)
    warm = replace(warm, gap_s=0, events=min(20, plan.events), burst=1)
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        home = Path(directory)
        board = Board(home / "board", plan)
        with started(name, (warm, plan), cores, home) as (dify, subject):
            port = (subject or dify).port
            pid = subject.pid if subject else 0
            warm_up = Run(warm, dialect, board, SERIES_WARM)
            await load(warm_up, port)
            await asyncio.sleep(0.2)  # let connections close, and the start-up end
            gc.collect()
            gc.disable()
            run = Run(plan, dialect, board, SERIES, pid)
            meter = Meter(pid, dify.pid, wakers)
            watch = asyncio.ensure_future(meter.watch())
            await load(run, port)
            row = meter.row(run)
            watch.cancel()
            gc.enable()
    run.errors += warm_up.errors
    row["errors"] = len(run.errors)
    for problem in sorted(set(run.errors))[:3]:
        print(f"  {run.errors.count(problem)} x {problem}")
    return row


def imports_ms(argv: Sequence[str]) -> float:
    """What a Python program spends on its imports, by `-X importtime`."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *argv],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    return sum(map(int, re.findall(r"import time:\s+(\d+) \|", done.stderr))) / 1000


def measure_start(cores: Cores) -> Row:
    """How long it takes to start, and what of that are imports."""
    argv = [str(SCRIPT), "--version"]
    with tempfile.TemporaryDirectory(prefix="bench-") as home:
        server = start_opendify("on", free_port(), cores.subject, Path(home))
        server.stop()
    imports = imports_ms(argv) - imports_ms(["-c", "pass"])
    return {
        "listens_ms": server.listens_s * 1000,
        "listens_cpu_ms": server.listens_cpu_s * 1000,
        "imports_ms": imports,
    }


# ------------------------------------------------------------------------------
# Reports
# ------------------------------------------------------------------------------


def median(runs: Runs, figure: Figure, subject: str) -> float:
    """The median of a figure over a subject's runs; NaN if there is none."""
    rows = runs.get(figure.workload, {}).get(subject, [])
    values = [row[figure.key] for row in rows if figure.key in row]
    return statistics.median(values) if values else math.nan


def judged(runs: Runs, figure: Figure) -> Optional[dict[str, Any]]:
    """A figure beside the relay's, and whether it is within its bound."""
    if figure.subject not in runs.get(figure.workload, {}):
        return None
    ours, relays = (median(runs, figure, who) for who in (figure.subject, "relay"))
    if figure.less:
        floor = median(runs, figure, figure.less)
        ours, relays = ours - floor, relays - floor
    ratio = ours / relays if relays else math.nan
    value = ratio if figure.of == "ratio" else ours
    is_met = value >= figure.bound if figure.of == "at least" else value <= figure.bound
    return {
        "workload": figure.workload,
        "figure": figure.label,
        "ours": ours,
        "relay": relays,
        "ratio": ratio,
        "bound": f"{figure.of} {figure.bound:,g}",
        "is_met": None if math.isnan(value) else is_met,
    }


def print_table(runs: Runs) -> list[dict[str, Any]]:
    """Medians beside the bounds; returns the lines."""
    lines = []
    print(f"\n{'':32}{'ours':>10}{'relay':>10}{'ratio':>8}  bound")
    for figure in FIGURES:
        line = judged(runs, figure)
        if line is None:
            continue
        lines.append(line)
        cells = [(line["ours"], 10, figure.style), (line["relay"], 10, figure.style)]
        cells.append((line["ratio"], 8, ".2f"))
        text = "".join(
            ("-" if math.isnan(value) else format(value, style)).rjust(width)
            for value, width, style in cells
        )
        verdict = {True: "met", False: "MISSED", None: "unknown"}[line["is_met"]]
        name = f"{figure.workload}  {figure.label}"
        print(f"{name:32}{text}  {line['bound']:18} {verdict}")
    rows = [row for rows in runs.values() for many in rows.values() for row in many]
    others = max((row.get("others_percent", 0) for row in rows), default=0)
    if others > QUIET_PERCENT:
        print(f"note: other processes took up to {others:.0f}% of this machine")
    return lines


def print_row(family: str, name: str, row: Row) -> None:
    """One run."""
    keys = [*SHOWN[family].split(), "others_percent", "errors"]
    cells = [
        f"{COLUMNS[key][0]} {format(row[key], COLUMNS[key][1])}"
        for key in keys
        if key in row and not math.isnan(row[key])
    ]
    print(f"  {name:7}" + "  ".join(cells), flush=True)


def measure_all(options: argparse.Namespace, runs: Runs) -> None:
    """Fill in the runs; subjects take turns within a workload."""
    cores = choose_cores()
    pin(cores.rest)
    plans = [plan for plan in WORKLOADS if plan.family in options.workloads]
    if options.quick:
        plans = [replace(plan, **QUICK[plan.name]) for plan in plans]
    with awake(cores) as wakers:
        for plan in plans:
            print(f"\n{plan.name}: {plan}", flush=True)
            if not allow_files(2 * plan.clients + 100):
                print("  passed over: this system allows too few open files")
                continue
            rows = runs.setdefault(plan.name, {name: [] for name in plan.subjects})
            for _ in range(options.runs):
                for name in plan.subjects:
                    row = asyncio.run(measure(plan, name, cores, wakers))
                    rows[name].append(row)
                    print_row(plan.family, name, row)
        if START in options.workloads:
            print(f"\n{START}: until the port listens, and the cost of imports")
            for _ in range(max(3, options.runs)):
                row = measure_start(cores)
                runs.setdefault(START, {"on": []})["on"].append(row)
                print_row(START, "on", row)


def parse_options() -> argparse.Namespace:
    """The arguments."""
    names = [*dict.fromkeys(plan.family for plan in WORKLOADS), START]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--runs", type=int, help="of each, their median counts (3)")
    parser.add_argument("--quick", action="store_true", help="one smaller run of each")
    parser.add_argument("--workloads", default=",".join(names), help=",".join(names))
    parser.add_argument("--json", metavar="FILE", help="write all runs to a file")
    parser.add_argument("--relay", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--dify", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--stay-awake", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.workloads = options.workloads.split(",")
    unknown = set(options.workloads) - set(names)
    if unknown:
        parser.error(f"unknown workloads: {', '.join(sorted(unknown))}")
    options.runs = max(1, options.runs or (1 if options.quick else 3))
    return options


def is_helper(options: argparse.Namespace) -> bool:
    """Whether this process was started by another one of this file; it is over."""
    if options.stay_awake:
        stay_awake()
    elif options.relay:
        asyncio.run(relay(*map(int, options.relay)))
    elif options.dify:
        port, board, plans = options.dify
        loads = [Workload(**plan) for plan in json.loads(plans)]
        asyncio.run(serve_dify(int(port), Path(board), loads))
    else:
        return False
    return True


def main() -> int:
    """Parse the arguments, measure, print; 1 if an answer was wrong."""
    options = parse_options()
    if is_helper(options):
        return 0
    runs: Runs = {}
    measure_all(options, runs)
    lines = print_table(runs)
    if options.json:
        machine = {"system": platform.platform(), "python": platform.python_version()}
        for line in lines:  # JSON has no NaN
            unknown = [k for k, v in line.items() if v != v]  # noqa: PLR0124
            line.update(dict.fromkeys(unknown))
        report = {"machine": machine, "runs": runs, "table": lines}
        Path(options.json).write_text(json.dumps(report, indent=1), encoding="utf-8")
    rows = [row for rows in runs.values() for many in rows.values() for row in many]
    return int(any(row.get("errors") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
