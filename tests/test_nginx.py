"""A real nginx in front of two replicas, as DESIGN and README advise it for growth.

nginx comes from the system's packages (`apt-get install nginx-light`); where it is not
installed, these tests are skipped. It runs as the user of the tests, in a directory of
its own, and is ended with them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fake_dify import FakeDify, Wait, chat_answer, message, message_end
from test_docs import free_port
from test_faults import Outcome, understand
from test_life import KEY, Process, chat, running

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
pytestmark = [
    pytest.mark.real_clock,
    pytest.mark.skipif(
        NGINX is None, reason="nginx is not installed (apt-get install nginx-light)"
    ),
]

# Nothing is said about buffering: X-Accel-Buffering in the answers has to do.
CONFIGURATION = """
daemon off;
master_process off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log info;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream opendify {{
        server 127.0.0.1:{one} max_fails=1 fail_timeout=60s;
        server 127.0.0.1:{two} max_fails=1 fail_timeout=60s;
        keepalive 16;
    }}
    server {{
        listen 127.0.0.1:{port};
        client_max_body_size 64m;
        location / {{
            proxy_pass http://opendify;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $http_host;
            proxy_read_timeout 600s;
            proxy_next_upstream error non_idempotent;
        }}
    }}
}}
"""


class Site(NamedTuple):
    """nginx, and the replicas behind it."""

    port: int
    replicas: tuple[Process, Process]
    folder: Path


@contextlib.asynccontextmanager
async def nginx_before(folder: Path, ports: tuple[int, int]) -> AsyncIterator[int]:
    """Give nginx's port."""
    assert NGINX
    port = free_port()
    text = CONFIGURATION.format(folder=folder, port=port, one=ports[0], two=ports[1])
    path = folder / "nginx.conf"
    path.write_text(text, encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        *[NGINX, "-p", str(folder), "-c", str(path), "-e", str(folder / "error.log")],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        await _until_it_listens(process, port)
        yield port
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.communicate()


async def _until_it_listens(process: asyncio.subprocess.Process, port: int) -> None:
    for _ in range(200):
        assert process.returncode is None, "nginx ended"
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            await writer.wait_closed()
            return
        await asyncio.sleep(0.02)
    raise AssertionError("nginx does not listen")


@contextlib.asynccontextmanager
async def site(folder: Path, base: str) -> AsyncIterator[Site]:
    settings = {
        "MODEL_CONFIG": json.dumps({"m": {"key": KEY, "mode": "chat"}}),
        "DIFY_API_BASE": base,
        "STREAM_SMOOTHING": "off",  # a text arrives as it was sent
    }
    folders = [folder / name for name in ("one", "two", "nginx")]
    for each in folders:
        each.mkdir()
    async with contextlib.AsyncExitStack() as stack:
        one = await stack.enter_async_context(running(folders[0], **settings))
        two = await stack.enter_async_context(running(folders[1], **settings))
        nginx = nginx_before(folders[2], (one.port, two.port))
        port = await stack.enter_async_context(nginx)
        yield Site(port, (one, two), folders[2])


class Answer:
    """A streamed answer on its way through nginx."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._reader = reader
        self._writer = writer
        self.data = b""

    async def until(self, words: bytes) -> None:
        """Read until these words are there."""
        while words not in self.data:
            piece = await self._reader.read(65_536)
            assert piece, self.data
            self.data += piece

    async def rest(self) -> bytes:
        """All there is, to the end."""
        while piece := await self._reader.read(65_536):
            self.data += piece
        await self.close()
        return self.data

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def outcome(self) -> Outcome | None:
        """What a client has in the end; None if the answer was cut off."""
        data = await self.rest()
        if not data.endswith(b"0\r\n\r\n"):
            return None
        return understand(data, stream=True)[0]


async def ask(port: int, *, stream: bool = True) -> Answer:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(chat("m", "Connection: close", stream=stream))
    return Answer(reader, writer)


HELLO = Outcome(200, "Hello", "finish")


async def test_streaming_is_not_buffered(tmp_path: Path) -> None:
    """Each text is at the client before Dify sends the next one."""
    gates = [asyncio.Event() for _ in range(4)]
    script: list[Any] = []
    for number, gate in enumerate(gates):
        script += [message(f"word{number} "), Wait(gate)]
    async with FakeDify() as dify, site(tmp_path, dify.base) as front:
        dify.app(KEY, script=[*script, message_end()])
        answer = await ask(front.port)
        for number, gate in enumerate(gates):
            await answer.until(b"word%d" % number)
            gate.set()
        assert await answer.outcome() == (200, "word0 word1 word2 word3 ", "finish")


async def test_errors_pass_unchanged(tmp_path: Path) -> None:
    async with FakeDify() as dify, site(tmp_path, dify.base) as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(chat("none", "Connection: close"))
        data = await reader.read()
        writer.close()
        await writer.wait_closed()
    assert understand(data, stream=False)[0] == (404, "", "model_not_found")
    assert b"\r\nx-request-id: req_" in data


async def test_client_that_leaves_nginx_stops_the_run(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with FakeDify() as dify, site(tmp_path, dify.base) as front:
        dify.app(KEY, script=[message("Hel"), Wait(gate), *chat_answer("lo")])
        answer = await ask(front.port)
        await answer.until(b"Hel")
        await answer.close()
        await dify.until(lambda: dify.stops)
        assert [stop.effective for stop in dify.stops] == [True]
        gate.set()


async def test_killed_replica_costs_its_open_streams_only(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with FakeDify() as dify, site(tmp_path, dify.base) as front:
        dify.app(KEY, script=[message("Hel"), Wait(gate), *chat_answer("lo")])
        streams = [await ask(front.port) for _ in range(20)]
        for stream in streams:
            await stream.until(b"Hel")
        of_one = await running_in(front.replicas[0])
        assert 0 < of_one < 20, "both replicas serve"
        front.replicas[0].process.kill()
        await front.replicas[0].process.wait()
        gate.set()
        later = [await ask(front.port, stream=True) for _ in range(40)]
        assert [await answer.outcome() for answer in later] == [HELLO] * 40
        outcomes = [await stream.outcome() for stream in streams]
        assert outcomes.count(None) == of_one
        assert outcomes.count(HELLO) == 20 - of_one
        front.replicas[1].process.send_signal(signal.SIGTERM)
        assert await front.replicas[1].end(None) == 0


async def running_in(replica: Process) -> int:
    """How many requests run in a replica, but the one that asks."""
    reader, writer = await asyncio.open_connection("127.0.0.1", replica.port)
    writer.write(
        b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    )
    data = await reader.read()
    writer.close()
    await writer.wait_closed()
    line = data.partition(b"\nopendify_requests_in_flight ")[2].split()[0]
    return int(line) - 1


async def test_replica_that_is_stopped_costs_nothing(tmp_path: Path) -> None:
    """A rolling restart: SIGTERM under load, and every request has its answer."""
    async with FakeDify() as dify, site(tmp_path, dify.base) as front:
        dify.app(KEY, script=chat_answer("Hel", "lo", delay=0.05))
        waiting = [await ask(front.port) for _ in range(20)]
        await dify.until(lambda: dify.running == 20)
        front.replicas[0].process.send_signal(signal.SIGTERM)
        for _ in range(4):
            waiting += [await ask(front.port) for _ in range(10)]
            await dify.until(lambda: not dify.running)
        assert [await answer.outcome() for answer in waiting] == [HELLO] * 60
        assert await front.replicas[0].end(None) == 0
