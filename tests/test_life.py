"""The life of the whole program: load that stalls, signals, settings that change under
it, clocks that jump, descriptors that run out; and what it tells about itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import re
import shutil
import signal
import socket
import sys
import tracemalloc
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Callable

import pytest
from clock import now
from fake_dify import (
    Close,
    FakeDify,
    Hang,
    Raw,
    Send,
    Sleep,
    Status,
    Wait,
    chat_answer,
    message,
)
from sites import listening
from test_end_to_end import environment
from test_faults import understand
from test_upstream import HEAD, chunk, event, raw_server, read_request

import opendify
from opendify import DRAIN_S, MAX_DESCRIPTORS, Metrics, Server, Site, parse_settings

SOURCE = Path(__file__).resolve().parent.parent / "opendify.py"
KEY = "app-key-of-the-tests"
HI = [{"role": "user", "content": "Hi"}]
MIB = 2**20


def chat(model: str = "m", *fields: str, **more: Any) -> bytes:
    body = json.dumps({"model": model, "messages": HI, **more}).encode()
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", *fields]
    lines += [f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


def get(path: str, *fields: str) -> bytes:
    lines = [f"GET {path} HTTP/1.1", "Host: localhost", "Connection: close", *fields]
    return "\r\n".join([*lines, "", ""]).encode()


async def talk(port: int, data: bytes, *, ends: bool = False) -> bytes:
    """All that comes back until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        if ends:
            writer.write_eof()
        return await reader.read()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def ask(port: int, model: str = "m", *fields: str, stream: bool = False) -> Any:
    """The outcome of one turn on a connection of its own."""
    data = await talk(port, chat(model, "Connection: close", *fields, stream=stream))
    return understand(data, stream=stream)[0]


def status_of(data: bytes) -> int:
    return int(data.split()[1])


# ------------------------------------------------------------------------------
# In this process
# ------------------------------------------------------------------------------


class Front:
    """A proxy in this process."""

    def __init__(self, port: int, site: Site, server: Server) -> None:
        self.port = port
        self.site = site
        self.server = server


@contextlib.asynccontextmanager
async def proxying(
    base: str, wall_clock: Callable[[], float] = lambda: 1.8e9, **variables: str
) -> AsyncIterator[Front]:
    models = {"MODEL_CONFIG": json.dumps({"m": {"key": KEY, "mode": "chat"}})}
    settings = parse_settings({**models, "DIFY_API_BASE": base, **variables})
    async with listening(settings, wall_clock=wall_clock) as (site, server, port):
        try:
            yield Front(port, site, server)
        finally:
            await asyncio.sleep(0.01)


# ------------------------------------------------------------------------------
# Backpressure
# ------------------------------------------------------------------------------

PIECE = chunk(event("message", answer="x" * 60_000))
PIECES = 100 * MIB // 60_000


class Flood:
    """An upstream that answers 100 MB as fast as they are taken, to who asks twice."""

    def __init__(self) -> None:
        self.taken = 0  # pieces of the flood that went out
        self.is_begun = asyncio.Event()

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while True:
            request = await read_request(reader)
            if b"flood" not in request:
                writer.write(HEAD + chunk(event("message", answer="Hello")))
                end = event("message_end", metadata={})
                writer.write(chunk(end) + b"0\r\n\r\n")
                continue
            writer.write(HEAD)
            for _ in range(PIECES):
                writer.write(PIECE)
                await writer.drain()
                self.taken += 1
                self.is_begun.set()

    async def stands_still(self) -> None:
        """Wait until nothing more is taken."""
        await self.is_begun.wait()
        seen = [-1]
        while seen[-3:] != [self.taken] * 3:
            seen.append(self.taken)
            await asyncio.sleep(0.1)  # real time: the kernel's buffers fill


@pytest.mark.real_clock
@pytest.mark.parametrize("smoothing", ["on", "off"])
async def test_client_that_stops_reading_holds_little_and_slows_nobody(
    smoothing: str,
) -> None:
    flood = Flood()
    server = raw_server(flood.serve)
    async with server as base, proxying(base, STREAM_SMOOTHING=smoothing) as front:
        assert (await ask(front.port)).end == "finish"  # all is loaded
        loop = asyncio.get_running_loop()
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
            sock.setblocking(False)
            await loop.sock_connect(sock, ("127.0.0.1", front.port))
            await loop.sock_sendall(sock, chat(user="flood", stream=True))
            await flood.stands_still()
            held, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert flood.taken < PIECES / 2, "nobody reads, yet all is taken"
            assert held - before < MIB
            assert peak - before < 4 * MIB
            began = loop.time()
            outcomes = await asyncio.gather(
                *(ask(front.port, stream=bool(n % 2)) for n in range(20))
            )
            assert {outcome.end for outcome in outcomes} == {"finish"}
            assert loop.time() - began < 5
            stood_at = flood.taken
            while flood.taken == stood_at:  # it reads again, and the answer goes on
                assert await loop.sock_recv(sock, 65_536)


# ------------------------------------------------------------------------------
# Clocks that jump
# ------------------------------------------------------------------------------


async def test_wall_clock_that_jumps_does_no_harm() -> None:
    times = iter([1.8e9, 1.7e9, 2.5e9, 0.0, 1.8e9, 4e9])
    at = 1.8e9

    def wall_clock() -> float:
        return at

    async with FakeDify() as dify, proxying(dify.base, wall_clock) as front:
        dify.app(KEY, memory=True, script=chat_answer("Hello there, how are you?"))
        for jump in times:
            at = jump
            for stream in (True, False):
                outcome = await ask(front.port, stream=stream)
                assert outcome == (200, "Hello there, how are you?", "finish")


async def test_loop_that_stood_still_finishes_its_streams() -> None:
    """A machine that slept, or a process that was stopped: all timers are late."""
    async with FakeDify() as dify, proxying(dify.base) as front:
        steps = [message("one "), Sleep(1), message("two "), Sleep(1)]
        dify.app(KEY, script=[*steps, *chat_answer("three")])
        asking = asyncio.ensure_future(ask(front.port, stream=True))
        await asyncio.sleep(0.5)
        loop: Any = asyncio.get_running_loop()
        loop.jumping.now += 3
        assert await asking == (200, "one two three", "finish")


# ------------------------------------------------------------------------------
# What it tells about itself
# ------------------------------------------------------------------------------

METRICS = (
    *("opendify_requests_total", "opendify_requests_in_flight", "opendify_bytes_total"),
    *("opendify_first_text_seconds", "opendify_request_seconds"),
    *("opendify_upstream_errors_total", "opendify_conversations"),
    "opendify_pacer_lag_seconds",
)
SAMPLE = re.compile(
    r'[a-z_]+(?:\{[a-z]+="[^"\n]*"(?:,[a-z]+="[^"\n]*")*\})? [0-9.e+-]+'
)


def samples_of(data: bytes) -> dict[str, float]:
    """Prometheus' text: every line is a comment or a sample, none twice."""
    top, _, body = data.decode().partition("\r\n\r\n")
    assert "Content-Type: text/plain; version=0.0.4" in top
    assert body.endswith("\n")
    lines = [line for line in body.splitlines() if not line.startswith("# ")]
    assert all(SAMPLE.fullmatch(line) for line in lines), body
    samples = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines
    }
    assert len(samples) == len(lines)
    return samples


async def test_metrics_tell_what_happened() -> None:
    async with FakeDify() as dify, proxying(dify.base) as front:
        dify.app(KEY, script=chat_answer(*["word "] * 20, delay=0.05))
        await ask(front.port, stream=True)
        await ask(front.port)
        dify.app(KEY, script=[Status(500, "<html>")])
        await ask(front.port)
        dify.app(KEY, script=[message("Hel"), Hang()])
        asking = asyncio.ensure_future(ask(front.port))
        await dify.until(lambda: dify.running)
        data = await talk(front.port, get("/metrics"))
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await dify.until(lambda: not dify.running)
    samples = samples_of(data)
    for name in METRICS:
        assert re.search(
            rf"(?m)^# TYPE {name} (counter|gauge|histogram)$", data.decode()
        )
    route = 'opendify_requests_total{route="chat/completions",model="m",status='
    assert samples[route + '"200"}'] == 2
    assert samples[route + '"502"}'] == 1
    assert samples['opendify_upstream_errors_total{kind="upstream_error"}'] == 1
    assert samples["opendify_requests_in_flight"] == 2  # it and the hanging one
    assert samples["opendify_first_text_seconds_count"] == 2
    assert samples['opendify_request_seconds_bucket{le="+Inf"}'] == 3
    assert samples['opendify_bytes_total{direction="out"}'] > 1000
    assert samples['opendify_bytes_total{direction="in"}'] > 200
    assert samples['opendify_pacer_lag_seconds_bucket{le="0.5"}'] > 5


async def test_codes_of_dify_make_no_metrics() -> None:
    """A plugin may fail with any: each would stay for ever, and in every scrape."""
    async with FakeDify() as dify, proxying(dify.base) as front:
        for number in range(3):
            fields = {"event": "error", "code": f"code_{number}", "message": "x"}
            dify.app(KEY, script=[Send(b"data: %b\n\n" % json.dumps(fields).encode())])
            await ask(front.port)
        samples = samples_of(await talk(front.port, get("/metrics")))
    assert samples['opendify_upstream_errors_total{kind="upstream_error"}'] == 3


@pytest.mark.parametrize(
    ("status", "text", "kind"),
    [
        (400, "no", None),  # the request's fault
        (400, "Too many requests", "rate_limit_exceeded"),
        (400, "insufficient_quota", "insufficient_quota"),
        (504, "<html>", "upstream_timeout"),
    ],
)
async def test_errors_of_dify_are_counted(
    status: int, text: str, kind: str | None
) -> None:
    async with FakeDify() as dify, proxying(dify.base) as front:
        dify.app(KEY, script=[Status(status, {"code": "x", "message": text})])
        await ask(front.port)
        samples = samples_of(await talk(front.port, get("/metrics")))
    counted = {name for name in samples if name.startswith("opendify_upstream_err")}
    expected = {f'opendify_upstream_errors_total{{kind="{kind}"}}'} if kind else set()
    assert counted == expected


async def test_guessed_keys_are_no_errors_of_dify(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connection_made = opendify.Wire.connection_made

    def made_from_afar(wire: opendify.Wire, transport: asyncio.BaseTransport) -> None:
        connection_made(wire, transport)
        wire.peer = "203.0.113.7"

    monkeypatch.setattr(opendify.Wire, "connection_made", made_from_afar)
    right, wrong = (f"Authorization: Bearer sk-{n}" for n in (1, 2))
    async with FakeDify() as dify, proxying(dify.base, VALID_API_KEYS="sk-1") as front:
        await talk(front.port, get("/metrics", right))
        told = [await talk(front.port, get("/v1/models", wrong)) for _ in range(21)]
        samples = samples_of(await talk(front.port, get("/metrics", right)))
    assert [status_of(data) for data in told] == [401] * 20 + [429]
    assert not any("upstream_errors" in name for name in samples)


def test_large_counters_are_exact() -> None:
    metrics = Metrics()
    metrics.count("bytes_total", 123_456_789, direction="in")
    assert 'bytes_total{direction="in"} 123456789\n' in metrics.render({})


async def test_histograms_are_cumulative() -> None:
    async with FakeDify() as dify, proxying(dify.base) as front:
        for delay in (0.01, 0.2, 2):
            dify.app(KEY, script=chat_answer("x", delay=delay))
            await ask(front.port, stream=True)
        samples = samples_of(await talk(front.port, get("/metrics")))
    prefix = "opendify_first_text_seconds_bucket"
    values = [value for name, value in samples.items() if name.startswith(prefix)]
    assert values == sorted(values)
    assert values[-1] == samples["opendify_first_text_seconds_count"] == 3
    for name in ("opendify_first_text_seconds", "opendify_request_seconds"):
        assert samples[f"{name}_sum"] == pytest.approx(2.21, abs=0.1)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("model", ["m", "nobody"])
async def test_nothing_of_a_request_waits_for_the_collector(
    model: str, stream: bool
) -> None:
    """A question may have 64 MiB, and few objects: a collection can be far away."""
    async with FakeDify() as dify, proxying(dify.base) as front:
        dify.app(KEY, script=chat_answer("Hello"))
        exchanges: list[Any] = []
        running: set[Any] = front.site.in_flight
        front.server.before_request = lambda: exchanges.extend(
            map(weakref.ref, running)
        )
        gc.collect()
        gc.disable()
        try:
            await ask(front.port, model, stream=stream)
            await asyncio.sleep(1)
            assert [exchange() for exchange in exchanges] == [None]
        finally:
            gc.enable()


async def test_metrics_need_a_key_where_keys_are_configured() -> None:
    async with proxying("http://127.0.0.1:9/v1", VALID_API_KEYS="k") as front:
        assert status_of(await talk(front.port, get("/metrics"))) == 401
        right = get("/metrics", "Authorization: Bearer k")
        assert status_of(await talk(front.port, right)) == 200


async def test_nothing_is_ready_without_an_app() -> None:
    async with proxying("http://127.0.0.1:9/v1", MODEL_CONFIG="{}") as front:
        assert status_of(await talk(front.port, get("/ready"))) == 503


async def test_why_nothing_is_ready_is_for_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It names hosts of the operator's, and who asks needs no key."""
    async with proxying("http://127.0.0.1:9/v1", VALID_API_KEYS="k") as front:
        answer = await talk(front.port, get("/ready"))
        assert status_of(answer) == 503
        assert b"No app answers" in answer
        assert b"127.0.0.1" not in answer
    reason = "the app of 'm' does not answer: No connection with http://127.0.0.1:9"
    assert reason in caplog.text


DENIED = Status(401, {"code": "unauthorized", "message": "No.", "status": 401})


@pytest.mark.parametrize("refusal", [DENIED, Status(200, "<html>web</html>")])
async def test_what_refuses_or_is_no_app_is_never_ready(refusal: Status) -> None:
    async with FakeDify() as dify, proxying(dify.base) as front:
        dify.app(KEY, overrides={"/info": [refusal]})
        for _ in range(2):  # that is no answer that counts for a while
            assert status_of(await talk(front.port, get("/ready"))) == 503
        await ask(front.port)
        assert status_of(await talk(front.port, get("/ready"))) == 200, "by its turn"


async def test_one_app_that_answers_is_enough_to_be_ready() -> None:
    apps = json.dumps({"bad": KEY, "worse": "app-worse", "good": "app-good"})
    async with FakeDify() as dify, proxying(dify.base, MODEL_CONFIG=apps) as front:
        for key in (KEY, "app-worse", "app-good"):
            dify.app(key, overrides={"/info": [DENIED]})
        dify.app("app-worse", overrides={"/info": [Status(504, "<html>")]})
        assert status_of(await talk(front.port, get("/ready"))) == 503, "the first's"
        dify.app("app-worse", overrides={"/info": [Hang()]})
        dify.app("app-good")
        asked_at = now()
        assert status_of(await talk(front.port, get("/ready"))) == 200
        assert now() - asked_at < 1, "others are not waited for"


async def test_health_and_readiness_need_no_key() -> None:
    async with FakeDify() as dify, proxying(dify.base, VALID_API_KEYS="k") as front:
        dify.app(KEY, overrides={"/info": [Status(500, "<html>")]})
        assert status_of(await talk(front.port, get("/health"))) == 200
        assert status_of(await talk(front.port, get("/ready"))) == 503
        dify.app(KEY)
        assert status_of(await talk(front.port, get("/ready"))) == 200
        asked = len(dify.requests)
        assert status_of(await talk(front.port, get("/ready"))) == 200
        assert len(dify.requests) == asked, "it has answered lately"
        await asyncio.sleep(3600)
        assert status_of(await talk(front.port, get("/ready"))) == 200
        assert len(dify.requests) > asked
        head = get("/ready").replace(b"GET", b"HEAD")
        assert status_of(await talk(front.port, head)) == 200


# ------------------------------------------------------------------------------
# As a process
# ------------------------------------------------------------------------------


class Process:
    """A running `python opendify.py`, and all that it says."""

    def __init__(self, process: asyncio.subprocess.Process, folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.port = 0
        self.output = b""
        self.log: list[str] = []
        self.changed = asyncio.Event()
        self._reading = asyncio.ensure_future(self._read_log())

    async def _read_log(self) -> None:
        assert self.process.stderr
        while line := await self.process.stderr.readline():
            self.log.append(line.decode().rstrip("\n"))
            self.changed.set()

    async def until_logged(self, words: str) -> str:
        """Wait for a line of the log."""
        while True:
            for line in self.log:
                if words in line:
                    return line
            self.changed.clear()
            await self.changed.wait()

    async def end(self, number: int | None = signal.SIGTERM) -> int:
        """Send a signal, and wait for the end; returns the status."""
        if number is not None and self.process.returncode is None:
            self.process.send_signal(number)
        assert self.process.stdout
        self.output += await self.process.stdout.read()
        await self._reading
        return await self.process.wait()

    def write_env(self, **variables: str) -> None:
        """Replace .env, as editors do."""
        new = self.folder / ".env.new"
        lines = [f"{name}='{value}'\n" for name, value in variables.items()]
        new.write_text("".join(lines), encoding="utf-8")
        new.replace(self.folder / ".env")


@contextlib.asynccontextmanager
async def running(
    folder: Path, *arguments: str, limit: str = "", **variables: str
) -> AsyncIterator[Process]:
    """The program on a free port; `limit` is a shell command that goes before it."""
    program = [sys.executable, str(shutil.copy(SOURCE, folder)), "--port", "0"]
    program += arguments
    if limit:
        program = ["sh", "-c", f'{limit}; exec "$@"', "sh", *program]
    lines = [f"{name}='{value}'\n" for name, value in variables.items()]
    (folder / ".env").write_text("".join(lines), encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        *program,
        cwd=folder,
        env=environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    running_ = Process(process, folder)
    assert process.stdout
    try:
        running_.output = await process.stdout.readline()
        found = re.search(rb":(\d+)/v1\b", running_.output)
        if found:
            running_.port = int(found[1])
        yield running_
    finally:
        if process.returncode is None:
            process.kill()
        await running_.end(None)


def models(*names: str) -> str:
    return json.dumps({name: {"key": KEY, "mode": "chat"} for name in names})


@pytest.mark.real_clock
async def test_signal_lets_answers_end_and_takes_no_more(tmp_path: Path) -> None:
    async with FakeDify() as dify:
        gate = asyncio.Event()
        dify.app(KEY, script=lambda _: [message("Hel"), Wait(gate), *chat_answer("lo")])
        settings = {"MODEL_CONFIG": models("m"), "DIFY_API_BASE": dify.base}
        async with running(tmp_path, **settings) as server:
            idle = await asyncio.open_connection("127.0.0.1", server.port)
            asked = await asyncio.open_connection("127.0.0.1", server.port)
            asked[1].write(chat())
            streaming = asyncio.ensure_future(ask(server.port, stream=True))
            await dify.until(lambda: dify.running == 2)
            server.process.send_signal(signal.SIGTERM)
            assert await idle[0].read() == b""  # closed at once
            with pytest.raises(OSError):
                await asyncio.open_connection("127.0.0.1", server.port)
            gate.set()
            answer = await asked[0].read()
            assert b"\r\nConnection: close\r\n" in answer
            assert b'"content":"Hello"' in answer
            assert await streaming == (200, "Hello", "finish")
            for _, writer in (idle, asked):
                writer.close()
            assert await server.end(None) == 0


@pytest.mark.real_clock
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_second_signal_ends_at_once(tmp_path: Path, number: int) -> None:
    async with FakeDify() as dify:
        dify.app(KEY, script=[message("Hel"), Hang()])
        settings = {"MODEL_CONFIG": models("m"), "DIFY_API_BASE": dify.base}
        async with running(tmp_path, **settings) as server:
            asking = asyncio.ensure_future(talk(server.port, chat(stream=True)))
            await dify.until(lambda: dify.running)
            server.process.send_signal(number)
            await server.until_logged("stopping")
            assert await asyncio.wait_for(server.end(number), DRAIN_S / 2) == 1
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            assert not [line for line in server.log if "Traceback" in line]


@pytest.mark.real_clock
async def test_log_begins_with_the_bases_that_are_used(tmp_path: Path) -> None:
    far = {"key": KEY, "base": "https://me:planted@far.test/v1"}
    config = json.dumps({"near": KEY, "far": far, "farther": far})
    settings = {"MODEL_CONFIG": config, "DIFY_API_BASE": "http://near.test/v1"}
    async with running(tmp_path, DIFY_API_KEYS="app-x", **settings) as server:
        assert await server.end() == 0
    line, *_ = server.log
    bases = "http://near.test/v1, https://…@far.test/v1"
    assert line.endswith(f"models: near, far, farther, 1 named by Dify; Dify: {bases}")
    assert not [line for line in server.log if "VALID_API_KEYS" in line]  # it is local


@pytest.mark.real_clock
async def test_open_server_without_keys_is_warned_of(tmp_path: Path) -> None:
    arguments = ("--host", "0.0.0.0")
    async with running(tmp_path, *arguments, MODEL_CONFIG=models("m")) as server:
        assert await server.end() == 0
    assert len([line for line in server.log if "set VALID_API_KEYS" in line]) == 1


class Load:
    """Workers that ask again and again; none of them may notice anything."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._is_over = False
        self._workers = [
            asyncio.ensure_future(self._work(stream=bool(n % 2))) for n in range(4)
        ]

    async def _work(self, *, stream: bool) -> int:
        count = 0
        while not self._is_over:
            outcome = await ask(self._port, stream=stream)
            assert outcome == (200, "Hello", "finish")
            count += 1
        return count

    async def end(self) -> int:
        """How many turns the slowest worker had."""
        self._is_over = True
        return min(await asyncio.gather(*self._workers))


async def until_served(port: int, model: str, status: int) -> None:
    """Ask until the answer is this one: settings are looked at once a second."""
    while (await ask(port, model)).status != status:
        pass


@pytest.mark.real_clock
async def test_settings_change_under_load(tmp_path: Path) -> None:
    """Good ones are taken, bad ones are told once, and no request notices."""
    async with FakeDify() as dify:
        dify.app(KEY, script=chat_answer("Hel", "lo", delay=0.01))
        one = {"MODEL_CONFIG": models("m"), "DIFY_API_BASE": dify.base}
        two = {"MODEL_CONFIG": models("m", "other"), "DIFY_API_BASE": dify.base}
        async with running(tmp_path, **one) as server:
            load = Load(server.port)
            await until_served(server.port, "other", 404)
            server.write_env(**two)
            await until_served(server.port, "other", 200)
            server.write_env(**one, STREAM_MAX_LAG="much")
            await server.until_logged("STREAM_MAX_LAG")
            assert (await ask(server.port, "other")).status == 200  # all stays
            (tmp_path / ".env").unlink()
            assert (await ask(server.port, "other")).status == 200
            server.write_env(**one)
            await until_served(server.port, "other", 404)
            assert await load.end() > 5
            assert len([line for line in server.log if "STREAM_MAX_LAG" in line]) == 1
            assert await server.end() == 0


@pytest.mark.real_clock
async def test_more_connections_may_come_while_all_are_taken(tmp_path: Path) -> None:
    """No request may be served that would have the settings read anew."""
    variables = {"MODEL_CONFIG": models("m"), "DIFY_API_BASE": "http://127.0.0.1:1"}
    async with running(tmp_path, **variables, MAX_CONNECTIONS="1") as server:
        answer, taken = await asyncio.open_connection("127.0.0.1", server.port)
        taken.write(get("/health").replace(b"close", b"keep-alive"))
        assert status_of(await answer.readuntil(b"}")) == 200
        assert status_of(await talk(server.port, get("/health"), ends=True)) == 503
        server.write_env(**variables, MAX_CONNECTIONS="9")
        await asyncio.sleep(1.1)  # they are looked at once a second
        assert status_of(await talk(server.port, get("/health"), ends=True)) == 200
        taken.close()


@pytest.mark.real_clock
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
async def test_descriptors_exhausted_is_logged_once_and_over_when_they_are_back(
    tmp_path: Path,
) -> None:
    async with FakeDify() as dify:
        dify.app(KEY, script=chat_answer("Hello"))
        settings = {"MODEL_CONFIG": models("m"), "DIFY_API_BASE": dify.base}
        async with running(tmp_path, limit="ulimit -n 40", **settings) as server:
            held = [
                await asyncio.open_connection("127.0.0.1", server.port)
                for _ in range(60)
            ]
            held[0][1].write(get("/health"))  # who is in is served
            assert status_of(await held[0][0].read()) == 200
            await server.until_logged("descriptors")
            for _, writer in held:
                writer.close()
            outcome = await ask(server.port)  # waits till accepting goes on
            assert outcome == (200, "Hello", "finish")
            assert len([line for line in server.log if "descriptors" in line]) == 1
            assert len(server.log) < 20
            assert not [line for line in server.log if "Traceback" in line]
            assert await server.end() == 0


@pytest.mark.real_clock
async def test_server_takes_the_descriptors_that_it_may_have(tmp_path: Path) -> None:
    """On macOS a process begins with 256: too few for MAX_CONNECTIONS."""
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("only Linux tells the limits of another process")
    settings = {"MODEL_CONFIG": models("m")}
    async with running(tmp_path, limit="ulimit -Sn 40", **settings) as server:
        soft, hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
        assert soft == min(hard, MAX_DESCRIPTORS)
        assert await server.end() == 0


# ------------------------------------------------------------------------------
# Logs
# ------------------------------------------------------------------------------

SECRETS = {
    "app key": "app-planted-key-1",
    "client key": "sk-planted-client-2",
    "wrong key": "sk-planted-wrong-3",
    "question": "planted question 4",
    "answer": "planted answer 5",
    "system": "planted system 6",
    "file": "planted file 7",
    "user": "planted-user-8",
    "query string": "planted-query-9",
    "header": "planted-header-10",
}


@pytest.mark.real_clock
@pytest.mark.parametrize("log_format", ["json", "text"])
async def test_logs_and_errors_hold_no_secrets(
    tmp_path: Path, log_format: str, deaf_port: int
) -> None:
    """The scenarios of this suite at DEBUG; in JSON, every line is an object."""
    echo = f"{SECRETS['app key']} is wrong"
    refusal = {"code": "invalid_param", "message": echo, "status": 400}
    denied = {"code": "unauthorized", "message": echo, "status": 401}
    app = {"key": SECRETS["app key"], "mode": "chat"}
    dead = f"http://127.0.0.1:{deaf_port}/v1"
    scripts: list[Any] = [
        chat_answer(SECRETS["answer"]),
        [message(SECRETS["answer"]), Send(b"data: {planted answer 5\n\n")],
        [message(SECRETS["answer"]), Send({"event": "error", "message": echo})],
        [Status(400, refusal)],
        [Status(401, denied)],
        [Status(502, f"<html>{echo}</html>")],
        [Status(302, "", {"Location": f"https://x/?{SECRETS['app key']}"})],
        [Raw(f"HTTP/1.1 200 OK\r\nA : {echo}\r\n\r\n".encode()), Close()],
    ]
    received = []
    async with FakeDify() as dify:
        settings = {
            "MODEL_CONFIG": json.dumps({"m": app, "dead": {**app, "base": dead}}),
            "DIFY_API_BASE": dify.base,
            "VALID_API_KEYS": SECRETS["client key"],
            "LOG_LEVEL": "DEBUG",
            "LOG_FORMAT": log_format,
            "MODEL_CONFIGG": "an unknown variable is a warning",
            "HTTP_PROXY": "http://me:planted-password@127.0.0.1:9",
        }
        async with running(tmp_path, **settings) as server:
            for script in scripts:
                dify.app(SECRETS["app key"], script=script)
                for stream in (True, False):
                    received.append(await talk(server.port, secret_chat(stream=stream)))
            talks = [talk(server.port, data) for data in BAD_REQUESTS]
            talks.append(talk(server.port, MALFORMED, ends=True))
            received += await asyncio.gather(*talks)
            assert await server.end() == 0
    log = "\n".join(server.log) + server.output.decode()
    assert len(server.log) > 20
    assert "planted" not in log
    errors = [data for data in received if SECRETS["answer"].encode() not in data]
    assert len(errors) > 10
    for data in errors:
        assert b"planted" not in data
    if log_format == "json":
        for line in (server.output.decode(), *server.log):  # a container's are joined
            assert {"time", "level", "message"} <= set(json.loads(line))


@pytest.mark.real_clock
@pytest.mark.parametrize("log_format", ["json", "text"])
async def test_log_lacks_only_lines_when_its_disk_was_full(
    tmp_path: Path, log_format: str
) -> None:
    """What Python tells of a log that fails it would tell in the log, in no form."""
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("only Linux sets the limits of another process")
    settings, log = {"LOG_FORMAT": log_format}, tmp_path / "log"
    async with running(tmp_path, "--demo", limit="exec 2>log", **settings) as server:
        pid, kind = server.process.pid, resource.RLIMIT_FSIZE
        _, hard = resource.prlimit(pid, kind)
        resource.prlimit(pid, kind, (log.stat().st_size + 1000, hard))
        for _ in range(100):
            assert status_of(await talk(server.port, get("/v1/models"))) == 200
        resource.prlimit(pid, kind, (hard, hard))
        assert status_of(await talk(server.port, get("/v1/none"))) == 404
        assert await server.end() == 0
    lines = log.read_text(encoding="utf-8").splitlines()
    shape = r"\{.*\}|\d{4}-\d\d-\d\d .*( id=req_\w{32}| to end|/v1)"
    assert [line for line in lines if not re.fullmatch(shape, line)] == []
    assert len([line for line in lines if "/v1/none" in line]) == 2
    assert len(lines) < 100


@pytest.mark.real_clock
async def test_what_dify_says_begins_no_line_of_the_log(tmp_path: Path) -> None:
    error = Send({"event": "error", "message": "one\nERROR two\u2028\x1b[2J é"})
    async with FakeDify() as dify:
        dify.app(KEY, script=[error])
        settings = {"MODEL_CONFIG": models("m"), "DIFY_API_BASE": dify.base}
        async with running(tmp_path, **settings) as server:
            await talk(server.port, chat("m", "Connection: close"))
            assert await server.end() == 0
    written = [line for line in server.log if "two" in line]
    assert len(written) == 1
    assert r"one\nERROR two\u2028\x1b[2J é" in written[0]
    assert all(re.match(r"\d{4}-\d\d-\d\d ", line) for line in server.log)


RIGHT = f"Authorization: Bearer {SECRETS['client key']}"


def secret_chat(model: str = "m", credentials: str = RIGHT, **more: Any) -> bytes:
    """A chat request full of secrets."""
    messages = [
        {"role": "system", "content": SECRETS["system"]},
        {"role": "user", "content": SECRETS["question"]},
    ]
    body = {"messages": messages, "user": SECRETS["user"], **more}
    fields = (credentials, f"X-Planted: {SECRETS['header']}", "Connection: close")
    return chat(model, *fields, **body)


BAD_PART = {"type": "file", "file": {"file_data": SECRETS["file"]}}
BAD_REQUESTS = (
    secret_chat(credentials=f"api-key: {SECRETS['wrong key']}"),
    secret_chat("dead"),
    secret_chat("none"),
    secret_chat(messages=[{"content": 1}, {"content": SECRETS["question"]}]),
    secret_chat(messages=[{"content": [BAD_PART]}]),
    secret_chat()[:-9] + b"planted 9",
    get(f"/v1/models?api-key={SECRETS['query string']}"),
    get(f"/v1/models?api-key={SECRETS['query string']}", RIGHT),
    get("/metrics", RIGHT),
    secret_chat().replace(b"Content-Length", b"X-Length").replace(b"close", b"")
    + get("/health"),  # the body is the next head's first line
    secret_chat(credentials=RIGHT.replace(":", " :")),
    secret_chat(credentials=RIGHT.replace(":", "")),
    get("/v1/models?api-key=planted query 9", RIGHT),
)
MALFORMED = b"GET / HTTP/1.1\r\nA\x00: planted file 7\r\n\r\n"
