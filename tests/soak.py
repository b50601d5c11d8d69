#!/usr/bin/env python3
"""Load the proxy for minutes, with faults: nothing may be lost, and nothing left over.

    python tests/soak.py                              # 500 streams for five minutes
    python tests/soak.py --minutes 1 --streams 100    # a first look

opendify.py and a small Dify run as processes of their own; the clients are here. Each
client asks again and again, mostly for streams. One in twenty leaves in the middle, and
one in twenty answers is broken by Dify, in one of several ways. Each request tells Dify
what to do, so the client knows what it must get, to the letter.

The exit status is 0 if every outcome was the one foreseen, the memory of the proxy was
flat after the warm-up (within 5%), its descriptors came back to those of the start, no
request is left running, and its log holds no traceback. Memory and descriptors are
looked at on Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import few_variables

ROOT = Path(__file__).resolve().parent.parent
THIS = str(Path(__file__).resolve())
HOST = "127.0.0.1"
KEY = "app-soak"
LEAVES, BREAKS, WHOLE = 0.05, 0.05, 0.2  # shares of the requests
EVENTS, GAP_S = 15, 0.2  # of an answer
REQUEST_LIMIT_S = 60.0
WARM_UP = 0.3  # of the time
TOLERANCE = 0.05
SETTLE_S = 40.0  # idle connections to Dify are kept for 15 s
STOP_LIMIT_S = 35.0
SHOWN = 5  # unforeseen outcomes

# What Dify can do in the middle of an answer, and what a client gets then.
FAULTS = {
    "close": "upstream_error",
    "reset": "upstream_error",
    "garbage": "upstream_error",
    "half": "upstream_error",
    "error": "completion_request_error",
    "refuse": "upstream_error",
}
HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
JSON_HEAD = (
    b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)


def piece(number: int, at: int) -> str:
    """Text `at` of answer `number`."""
    return f"word {number % 997}.{at} "


# ------------------------------------------------------------------------------
# Dify, a process of its own
# ------------------------------------------------------------------------------


async def run_dify() -> None:
    """Serve until the end; prints the port."""
    server = await asyncio.start_server(_serve_dify, HOST, 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def _serve_dify(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            body = await reader.readexactly(int(length[1]) if length else 0)
            if b"/chat-messages HTTP" in head:
                await _answer(writer, json.loads(body))
            else:  # a stop, or a question for what was stored
                writer.write(JSON_HEAD % (b"404 Not Found", 2) + b"{}")
    writer.close()


def _chunk(event: dict[str, Any]) -> bytes:
    data = b"data: " + json.dumps(event).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


async def _answer(writer: asyncio.StreamWriter, asked: dict[str, Any]) -> None:
    """The answer that the question asks for: "number N, fault F at E"."""
    found = re.search(r"number (\d+), fault (\w*) at (\d+)$", asked["query"])
    assert found, asked
    number, fault, place = int(found[1]), found[2], int(found[3])
    ids = {
        "conversation_id": asked.get("conversation_id") or f"c{number}",
        "message_id": f"m{number}",
        "task_id": f"t{number}",
    }
    if fault == "refuse":
        writer.write(JSON_HEAD % (b"500 Oops", 2) + b"{}")
        return
    writer.write(HEAD)
    for at in range(EVENTS):
        if fault and at == place:
            _break(writer, fault, ids)
            return
        writer.write(_chunk({"event": "message", **ids, "answer": piece(number, at)}))
        await writer.drain()
        await asyncio.sleep(GAP_S)
    writer.write(_chunk({"event": "message_end", **ids, "metadata": {}}) + b"0\r\n\r\n")


def _break(writer: asyncio.StreamWriter, fault: str, ids: dict[str, str]) -> None:
    if fault == "error":
        event = {"event": "error", **ids, "status": 400, "message": "Injected."}
        code = {"code": "completion_request_error"}
        writer.write(_chunk({**event, **code}) + b"0\r\n\r\n")
        return
    if fault == "half":
        writer.write(b"40\r\ndata: {")
    if fault == "garbage":
        writer.write(b"\x00\xffgarbage\r\n\r\n")
    if fault == "reset":
        writer.transport.abort()
    raise ConnectionResetError


# ------------------------------------------------------------------------------
# Clients
# ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """One request: what Dify does, and what the client does."""

    number: int
    fault: str
    place: int
    is_stream: bool
    leaves: bool

    @property
    def question(self) -> str:
        """What Dify reads."""
        return f"number {self.number}, fault {self.fault} at {self.place}"

    def is_foreseen(self, status: int, text: str, end: str) -> bool:
        """Whether this outcome is the right one."""
        count = EVENTS if not self.fault else self.place
        count = 0 if self.fault == "refuse" else count
        whole = "".join(piece(self.number, at) for at in range(count))
        if not self.fault:
            return (status, text, end) == (200, whole, "stop")
        is_late = self.is_stream and self.fault != "refuse"
        if is_late and self.fault == "garbage" and whole.startswith(text):
            whole = text  # what is in one packet with garbage is thrown away with it
        wanted = (200, whole) if is_late else (502, "")
        return (status, text, end) == (*wanted, FAULTS[self.fault])


@dataclass
class Tally:
    """What became of all requests."""

    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    unforeseen: list[str] = field(default_factory=list)


def make_plan(number: int, chance: random.Random) -> Plan:
    """What the next request is to be."""
    lot = chance.random()
    fault = chance.choice(list(FAULTS)) if lot < BREAKS else ""
    is_stream = chance.random() >= WHOLE
    place = chance.randrange(1, EVENTS)
    return Plan(number, fault, place, is_stream, BREAKS <= lot < BREAKS + LEAVES)


async def run_client(index: int, port: int, until: float, tally: Tally) -> None:
    """Ask one question after another."""
    chance = random.Random(index)
    await asyncio.sleep(chance.random() * EVENTS * GAP_S)
    count = 0
    while time.monotonic() < until:
        plan = make_plan(index + 10_000 * count, chance)
        count += 1
        try:
            kind = await asyncio.wait_for(ask(index, port, plan), REQUEST_LIMIT_S)
        except (OSError, asyncio.TimeoutError, ValueError, LookupError) as error:
            kind = f"unforeseen: {error!r}"
        tally.outcomes[kind.partition(":")[0]] += 1
        if kind.startswith("unforeseen"):
            tally.unforeseen.append(f"{plan}: {kind}")


async def ask(index: int, port: int, plan: Plan) -> str:
    """One request; returns what to count."""
    value = {
        "model": "m",
        "messages": [{"role": "user", "content": plan.question}],
        "stream": plan.is_stream,
        "conversation_id": f"client-{index}",  # one row each in the proxy's table
    }
    body = json.dumps(value).encode()
    lines = ["POST /v1/chat/completions HTTP/1.1", f"Host: {HOST}", "Connection: close"]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode()
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(head + body)
        if plan.leaves:
            if plan.is_stream:
                await reader.read(1)
            await asyncio.sleep(plan.place * GAP_S)
            return "left"
        status, text, end = understand(await reader.read(), plan)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    if plan.is_foreseen(status, text, end):
        return f"broken by {plan.fault}" if plan.fault else "whole"
    return f"unforeseen: {status} {end} {text[-80:]!r}"


def understand(data: bytes, plan: Plan) -> tuple[int, str, str]:
    """(status, text, finish reason or error code) of a response."""
    head, _, body = data.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    if status != 200:
        return status, "", str(json.loads(body)["error"]["code"])
    if not plan.is_stream:
        (choice,) = json.loads(body)["choices"]
        return status, choice["message"]["content"], choice["finish_reason"]
    if not body.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
        return status, "", "cut off"
    text, ends = "", list[str]()
    for row in re.findall(rb"^data: (\{.*)$", body, re.MULTILINE):
        event = json.loads(row)
        if "error" in event:
            ends.append(event["error"]["code"])
            continue
        (choice,) = event["choices"]
        text += choice["delta"].get("content") or ""
        ends += [choice["finish_reason"]] if choice["finish_reason"] else []
    return status, text, " ".join(ends)


# ------------------------------------------------------------------------------
# Processes, and what they use
# ------------------------------------------------------------------------------


class Watched:
    """The proxy's process, looked at once a second."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.sizes_mb: list[float] = []

    @property
    def can_tell(self) -> bool:
        """Whether this system tells."""
        return Path(f"/proc/{self._pid}/statm").exists()

    def size_mb(self) -> float:
        """Resident memory."""
        text = Path(f"/proc/{self._pid}/statm").read_text(encoding="ascii")
        return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def descriptors(self) -> int:
        """How many are open."""
        return len(list(Path(f"/proc/{self._pid}/fd").iterdir()))

    async def watch(self) -> None:
        """Note the memory for ever."""
        while self.can_tell:
            self.sizes_mb.append(self.size_mb())
            await asyncio.sleep(1)

    def growth(self) -> tuple[float, float]:
        """Mean MB at the beginning and the end of the time after the warm-up."""
        sizes = self.sizes_mb[int(len(self.sizes_mb) * WARM_UP) :]
        window = max(1, len(sizes) // 4)
        return statistics.mean(sizes[:window]), statistics.mean(sizes[-window:])


@contextlib.asynccontextmanager
async def started(
    arguments: list[str], environment: dict[str, str], log: Path
) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """A process and the port that it prints."""
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            cwd=log.parent,
            env=environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
        )
    assert process.stdout
    try:
        line = await process.stdout.readline()
        found = re.search(rb"(\d+)(?:/v1)?\s*$", line)
        assert found, f"it did not start; see {log}"
        yield process, int(found[1])
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def environment_for(base: str) -> dict[str, str]:
    """The settings of the proxy."""
    return {
        **few_variables(),
        "MODEL_CONFIG": json.dumps({"m": {"key": KEY, "mode": "chat"}}),
        "DIFY_API_BASE": base,
        "NO_PROXY": "*",
        "MAX_CONNECTIONS": "5000",
    }


async def is_idle(port: int) -> bool:
    """Whether the proxy runs no request but this one."""
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n")
    data = await reader.read()
    writer.close()
    return b"\nopendify_requests_in_flight 1\n" in data


async def soak(minutes: float, streams: int, folder: Path) -> bool:
    """Run it all; prints a summary, and returns whether all is well."""
    dify_log, log = folder / "dify.log", folder / "opendify.log"
    program = str(shutil.copy(ROOT / "opendify.py", folder))
    tally = Tally()
    async with contextlib.AsyncExitStack() as stack:
        dify = started([THIS, "--dify"], few_variables(), dify_log)
        _, dify_port = await stack.enter_async_context(dify)
        environment = environment_for(f"http://{HOST}:{dify_port}/v1")
        proxy = started([program, "--port", "0"], environment, log)
        process, port = await stack.enter_async_context(proxy)
        watched = Watched(process.pid)
        assert await is_idle(port)
        before = watched.descriptors() if watched.can_tell else 0
        watching = asyncio.ensure_future(watched.watch())
        until = time.monotonic() + minutes * 60
        clients = [run_client(n, port, until, tally) for n in range(streams)]
        await asyncio.gather(*clients)
        watching.cancel()
        after = await settled(watched, port, before)
        process.send_signal(signal.SIGTERM)
        status = await asyncio.wait_for(process.wait(), STOP_LIMIT_S)
    checks = list(_checks(tally, watched, (before, after), status, log))
    for is_good, words in checks:
        print(f"  {'ok  ' if is_good else 'FAIL'} {words}")
    return all(is_good for is_good, _ in checks)


async def settled(watched: Watched, port: int, before: int) -> int:
    """Wait until the descriptors are back, for a while; returns how many there are."""
    until = time.monotonic() + SETTLE_S
    after = -1
    while time.monotonic() < until:
        after = watched.descriptors() if watched.can_tell else before
        if after <= before and await is_idle(port):
            return after
        await asyncio.sleep(1)
    return after if await is_idle(port) else -1


def _checks(
    tally: Tally, watched: Watched, descriptors: tuple[int, int], status: int, log: Path
) -> Iterator[tuple[bool, str]]:
    """(whether it is well, what was looked at) for each thing that is promised."""
    total = sum(tally.outcomes.values())
    counts = ", ".join(
        f"{count} {kind}" for kind, count in tally.outcomes.most_common()
    )
    yield bool(total) and not tally.unforeseen, f"{total} requests: {counts}"
    for words in tally.unforeseen[:SHOWN]:
        yield False, words
    if watched.sizes_mb:
        begin, end = watched.growth()
        flat = abs(end - begin) <= begin * TOLERANCE
        yield flat, f"memory after the warm-up: {begin:.1f} MB, at the end {end:.1f} MB"
        before, after = descriptors
        yield 0 <= after <= before, f"descriptors before: {before}, after: {after}"
    lines = log.read_text(encoding="utf-8").splitlines()
    bugs = sum("Traceback" in line or " bug" in line for line in lines)
    yield not bugs, f"{len(lines)} lines of log, {bugs} of them tell of a bug"
    yield status == 0, f"it stopped with status {status}"


def main() -> int:
    """Run as a script; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--dify", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.dify:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(run_dify())
        return 0
    print(f"{options.streams} streams for {options.minutes:g} minutes")
    with tempfile.TemporaryDirectory() as folder:
        is_good = asyncio.run(soak(options.minutes, options.streams, Path(folder)))
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
