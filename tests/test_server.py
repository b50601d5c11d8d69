"""Room Server: connections, the error boundary, clients that leave, drain, the log."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import re
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Callable, cast

import pytest
from clock import now
from fake_dify import (
    FakeDify,
    Hang,
    Send,
    Sleep,
    Wait,
    chat_answer,
    error_event,
    message,
    message_end,
)
from sites import listening
from test_wire import HOSTILE, bytewise

import opendify
from opendify import (
    BODY_TIMEOUT_S,
    DISCARD_S,
    DRAIN_S,
    HEAD_TIMEOUT_S,
    IDLE_TIMEOUT_S,
    KEEP_ALIVE_S,
    MAX_DISCARD_S,
    Ask,
    BadRequest,
    ChatRequest,
    ChatStream,
    Envelope,
    Exchange,
    Server,
    Site,
    parse_settings,
)

KEY = "app-key-of-the-tests"
GENERIC = "OpenDify failed; its log says more."


# ------------------------------------------------------------------------------
# Routes of our own
# ------------------------------------------------------------------------------


@dataclass
class Stage:
    """What the test's routes do, and what became of them."""

    gate: asyncio.Event = field(default_factory=asyncio.Event)
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    bodies: list[bytes] = field(default_factory=list)

    async def echo(self, _: Site, exchange: Exchange) -> None:
        body = await opendify.read_whole(exchange.read)
        self.bodies.append(body)
        exchange.reply.send(200, body, [("Content-Type", "a/b")])

    async def explode(self, _: Site, __: Exchange) -> None:
        raise RuntimeError("a secret detail")

    async def refuse(self, _: Site, __: Exchange) -> None:
        error = BadRequest("Not so.", param="p")
        error.headers.append(("X-More", "y"))
        raise error

    def begin(self, exchange: Exchange) -> None:
        chat = ChatRequest(Ask("m", ()))
        exchange.fail = ChatStream(Envelope("id", 0, "m", chat)).fail
        exchange.reply.start(200, [("Content-Type", "text/event-stream")])
        exchange.reply.write(b"data: begun\n\n")

    async def explode_late(self, _: Site, exchange: Exchange) -> None:
        self.begin(exchange)
        raise RuntimeError("a secret detail")

    async def refuse_late(self, _: Site, exchange: Exchange) -> None:
        self.begin(exchange)
        raise opendify.UpstreamFailed("Broken off.")

    async def wait(self, _: Site, exchange: Exchange) -> None:
        """Answer when the gate opens, or end when the client leaves."""
        await opendify.read_whole(exchange.read)
        self.entered.set()
        try:
            with exchange:
                await self.gate.wait()
            exchange.reply.send(200, b"late")
        finally:
            self.ended.set()

    async def stream(self, site: Site, exchange: Exchange) -> None:
        """The same, after the head."""
        self.begin(exchange)
        await exchange.reply.drain()
        self.entered.set()
        try:
            with exchange:
                await self.gate.wait()
            exchange.reply.end(b"data: [DONE]\n\n")
        finally:
            self.ended.set()

    async def explode_at_the_end(self, _: Site, exchange: Exchange) -> None:
        self.begin(exchange)
        exchange.reply.end(b"data: [DONE]\n\n")
        raise RuntimeError("a secret detail")


PATHS = (
    *("echo", "explode", "refuse", "explode_late", "refuse_late", "explode_at_the_end"),
    *("wait", "stream"),
)


@dataclass
class Reading:
    """A response, read."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The error of a JSON body; it has the four keys."""
        error = cast("dict[str, Any]", json.loads(self.body)["error"])
        assert sorted(error) == ["code", "message", "param", "type"]
        return error

    @property
    def says_close(self) -> bool:
        return self.headers.get("connection") == "close"


class Client:
    """One connection to the server."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def ask(
        self, path: str, *fields: str, method: str = "GET", body: bytes = b""
    ) -> Reading:
        self.send(request(path, *fields, method=method, body=body))
        return await self.read(method)

    async def read(self, method: str = "GET") -> Reading:
        """The next response that is final."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head[:-4].split("\r\n")
        pairs = [line.split(": ", 1) for line in lines]
        headers = {name.lower(): value for name, value in pairs}
        assert len(headers) == len(pairs), f"a field twice in {head}"
        status = int(first.split()[1])
        if method == "HEAD" or status in (100, 204):
            return Reading(status, headers, b"")
        if headers.get("transfer-encoding") == "chunked":
            return Reading(status, headers, await self.read_chunks())
        if "content-length" in headers:
            body = await self.reader.readexactly(int(headers["content-length"]))
            return Reading(status, headers, body)
        return Reading(status, headers, await self.reader.read())

    async def read_chunks(self) -> bytes:
        body = b""
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            body += (await self.reader.readexactly(size + 2))[:-2]
        assert await self.reader.readexactly(2) == b"\r\n"
        return body

    async def is_closed(self) -> bool:
        """Wait for the end; whether nothing came before it."""
        try:
            return await self.reader.read() == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()

    def leave(self, how: str) -> None:
        """Close the connection: with an "end", or with a reset."""
        if how == "end":
            self.close()
        else:
            self.reset()


class World:
    """A server, and connections to it."""

    def __init__(self, server: Server, port: int, stage: Stage) -> None:
        self.server = server
        self.port = port
        self.stage = stage
        self.clients: list[Client] = []

    async def connect(self) -> Client:
        streams = await asyncio.open_connection("127.0.0.1", self.port, limit=2**24)
        self.clients.append(Client(*streams))
        return self.clients[-1]


def request(
    path: str,
    *fields: str,
    method: str = "GET",
    body: bytes = b"",
    version: str = "1.1",
) -> bytes:
    length = [f"Content-Length: {len(body)}"] if body else []
    lines = [f"{method} {path} HTTP/{version}", "Host: localhost", *fields, *length]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Stage]:
    """Add the routes `/t/NAME` of a Stage, for GET and POST."""

    def add() -> Stage:
        stage = Stage()
        table = cast("dict[str, Any]", opendify.ROUTES)
        for path in PATHS:
            handler = _handler(stage, path)
            monkeypatch.setitem(table, f"t/{path}", {"GET": handler, "POST": handler})
        return stage

    return add


def _handler(stage: Stage, name: str) -> Callable[[Site, Exchange], Any]:
    """The method of that name, as a plain function: routes are functions."""

    def handle(site: Site, exchange: Exchange) -> Any:
        return getattr(stage, name)(site, exchange)

    return handle


Serving = Callable[..., "contextlib.AbstractAsyncContextManager[World]"]


@pytest.fixture
def serving(routes: Callable[[], Stage]) -> Serving:
    """`async with serving(VARIABLE="…") as world`: a server on a real socket."""

    @contextlib.asynccontextmanager
    async def serve(base: str = "http://127.0.0.1:9/v1", **variables: str) -> Any:
        models = {"MODEL_CONFIG": json.dumps({"m": {"key": KEY, "mode": "chat"}})}
        settings = parse_settings({**models, "DIFY_API_BASE": base, **variables})
        async with listening(settings) as (_, server, port):
            world = World(server, port, routes())
            try:
                yield world
            finally:
                for client in world.clients:
                    client.close()
                await some_turns()

    return cast("Serving", serve)


async def some_turns() -> None:
    """Let what was begun go on, without waiting for anything."""
    for _ in range(10):
        await asyncio.sleep(0)


# ------------------------------------------------------------------------------
# Listening
# ------------------------------------------------------------------------------

V6 = (socket.AF_INET6, ("2001:db8::1", 0, 0, 0))  # for documents: nobody has it
V4 = (socket.AF_INET, ("127.0.0.1", 0))
UNKNOWN = (9999, ("127.0.0.1", 0))  # as IPv6 is for a kernel without it


class Deaf(opendify.Listener):
    """Serves nobody."""

    async def listen_at(self, *found: tuple[int, tuple[Any, ...]]) -> list[str]:
        """Listen under a name that has these addresses; returns the hosts."""

        async def resolve(*_: object, family: int = 0, **__: object) -> list[Any]:
            return [
                (kind, socket.SOCK_STREAM, 6, "", address)
                for kind, address in found
                if family in (0, kind)
            ]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
            addresses = await self.listen("localhost", 0)
        await self.stop(0)
        return [host for host, _ in addresses]


@pytest.mark.parametrize("found", [[V4], [V6, V4], [V4, V6], [UNKNOWN, V4]])
async def test_address_that_the_system_lacks_is_passed_over(found: Any) -> None:
    """Hosts files name ::1 where IPv6 is switched off, too."""
    assert await Deaf().listen_at(*found) == ["127.0.0.1"]


async def test_listening_socket_never_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On PyPy a socket made of a descriptor blocks, and so do all that share it."""
    make = socket.fromfd

    def make_blocking(*about: int) -> socket.socket:
        made = make(*about)
        made.setblocking(True)
        return made

    monkeypatch.setattr(socket, "fromfd", make_blocking)
    deaf = Deaf()
    await deaf.listen("127.0.0.1", 0)
    assert not os.get_blocking(deaf._servers[0].sockets[0].fileno())
    await deaf.stop(0)


async def test_kernel_may_lack_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """As gVisor's and that of the first WSL do."""
    options = [(socket.SOL_SOCKET, socket.SO_REUSEADDR)]
    set_option = socket.socket.setsockopt

    def choose(sock: socket.socket, level: int, option: int, *value: Any) -> None:
        if (level, option) not in options:
            raise OSError(errno.ENOPROTOOPT, "Protocol not available")
        set_option(sock, level, option, *value)

    monkeypatch.setattr(socket.socket, "setsockopt", choose)
    assert await Deaf().listen_at(V4) == ["127.0.0.1"]


@pytest.mark.parametrize("found", [[V6], [UNKNOWN]])
async def test_nobody_waits_for_a_server_without_an_address(found: Any) -> None:
    with pytest.raises(OSError):
        await Deaf().listen_at(*found)


# ------------------------------------------------------------------------------
# Requests on one connection
# ------------------------------------------------------------------------------


async def test_requests_one_after_another_share_a_connection(serving: Serving) -> None:
    async with serving() as world:
        client = await world.connect()
        for number in range(3):
            body = b"hello %d" % number
            reading = await client.ask("/t/echo", method="POST", body=body)
            assert (reading.status, reading.body) == (200, body)
            assert not reading.says_close


async def test_every_request_has_an_id_of_its_own(serving: Serving) -> None:
    async with serving() as world:
        client = await world.connect()
        paths = ["/health", "/t/echo", "/nowhere", "/t/refuse", "/t/explode"]
        ids = [(await client.ask(path)).headers["x-request-id"] for path in paths]
        assert len(set(ids)) == len(paths)
        assert all(re.fullmatch(r"req_\d+", id_) for id_ in ids)


async def test_no_cache_answers_in_place_of_the_server(serving: Serving) -> None:
    """Varnish would: a client without a key, with what an `x-api-key` was shown."""
    async with serving() as world:
        client = await world.connect()
        for path in ("/", "/health", "/metrics", "/v1/models", "/nowhere", "/t/echo"):
            reading = await client.ask(path)
            assert reading.headers["cache-control"] == "no-cache, no-transform"


@pytest.mark.parametrize("cut", ["at-once", "byte-by-byte"])
async def test_pipelined_requests_are_answered_in_order(
    serving: Serving, cut: str
) -> None:
    async with serving() as world:
        client = await world.connect()
        bodies = [b"%d" % number for number in range(16)]
        data = b"".join(request("/t/echo", method="POST", body=b) for b in bodies)
        for piece in [data] if cut == "at-once" else bytewise(data[:300]):
            client.send(piece)
            await asyncio.sleep(0)
        client.send(data[300:] if cut != "at-once" else b"")
        assert [(await client.read()).body for _ in bodies] == bodies


async def test_pipelined_requests_let_others_have_their_turn(serving: Serving) -> None:
    async with serving() as world:
        hasty, other = await world.connect(), await world.connect()
        hasty.send(request("/t/echo", method="POST", body=b"hasty") * 1000)
        other.send(request("/t/echo", method="POST", body=b"other"))
        assert (await other.read()).body == b"other"
        assert len(world.stage.bodies) < 100


async def test_pipelined_request_waits_for_the_one_before_it(serving: Serving) -> None:
    async with serving() as world:
        client = await world.connect()
        client.send(request("/t/wait") + request("/t/echo", method="POST", body=b"x"))
        await world.stage.entered.wait()
        await some_turns()
        assert world.stage.bodies == []
        world.stage.gate.set()
        assert (await client.read()).body == b"late"
        assert (await client.read()).body == b"x"


async def test_answer_may_take_longer_than_a_head(serving: Serving) -> None:
    async with serving() as world:
        client = await world.connect()
        client.send(request("/t/wait"))
        await asyncio.sleep(HEAD_TIMEOUT_S + 1)
        world.stage.gate.set()
        assert (await client.read()).body == b"late"
        assert (await client.ask("/t/echo")).status == 200


async def test_chunked_body_is_read(serving: Serving) -> None:
    async with serving() as world:
        client = await world.connect()
        head = request("/t/echo", "Transfer-Encoding: chunked", method="POST")
        for piece in bytewise(
            head + b"3;x=y\r\nabc\r\nA\r\n0123456789\r\n0\r\nT: v\r\n\r\n"
        ):
            client.send(piece)
            await asyncio.sleep(0)
        assert (await client.read()).body == b"abc0123456789"
        assert (await client.ask("/t/echo", method="POST", body=b"x")).body == b"x"


async def test_large_body_is_read(serving: Serving) -> None:
    async with serving() as world:
        client = await world.connect()
        body = bytes(range(256)) * 20_000
        reading = await client.ask("/t/echo", method="POST", body=body)
        assert reading.body == body


@pytest.mark.parametrize("framing", ["Content-Length: 2", "Transfer-Encoding: chunked"])
async def test_body_that_is_expected_is_asked_for(
    serving: Serving, framing: str
) -> None:
    async with serving() as world:
        client = await world.connect()
        head = request("/t/echo", "Expect: 100-continue", framing, method="POST")
        client.send(head)
        assert await client.reader.readuntil(b"\r\n\r\n") == (
            b"HTTP/1.1 100 Continue\r\n\r\n"
        )
        client.send(b"hi" if "Length" in framing else b"2\r\nhi\r\n0\r\n\r\n")
        assert (await client.read()).body == b"hi"


@pytest.mark.parametrize(
    ("path", "fields", "status"),
    [
        pytest.param("/nowhere", [], 404, id="path"),
        pytest.param("/health", [], 405, id="method"),
        pytest.param("/models", [], 405, id="method-with-key"),
        pytest.param("/t/echo", ["Authorization: Bearer wrong"], 401, id="key"),
    ],
)
async def test_body_of_a_refused_request_is_not_asked_for(
    serving: Serving, path: str, fields: list[str], status: int
) -> None:
    async with serving(VALID_API_KEYS="right") as world:
        client = await world.connect()
        fields = ["Expect: 100-continue", "Content-Length: 5", *fields]
        client.send(request(path, *fields, method="POST"))
        reading = await client.read()  # and not 100
        # The client may go on with its next request: Go 1.19 does, if it is not told.
        assert (reading.status, reading.says_close) == (status, True)


async def test_nothing_is_asked_for_when_no_body_comes(serving: Serving) -> None:
    async with serving() as world:
        client = await world.connect()
        assert (await client.ask("/t/echo", "Expect: 100-continue")).status == 200
        reading = await client.ask("/t/refuse", "Expect: 100-continue")
        assert (reading.status, reading.says_close) == (400, False)


async def test_http_1_0_is_answered_and_closed(serving: Serving) -> None:
    async with serving() as world:
        client = await world.connect()
        client.send(request("/t/echo", "Connection: keep-alive", version="1.0"))
        reading = await client.read()
        assert (reading.status, reading.says_close) == (200, True)
        assert await client.is_closed()
        assert now() == 0


async def test_stream_for_http_1_0_ends_with_the_connection(serving: Serving) -> None:
    async with serving() as world:
        client = await world.connect()
        world.stage.gate.set()
        client.send(request("/t/stream", version="1.0"))
        reading = await client.read()
        assert "transfer-encoding" not in reading.headers
        assert reading.body == b"data: begun\n\ndata: [DONE]\n\n"
        assert now() == 0  # its end is the end of the answer: it must come at once


async def test_connection_is_closed_when_the_client_asks(serving: Serving) -> None:
    async with serving() as world:
        client = await world.connect()
        both = request("/t/echo", "Connection: close") + request("/t/echo")
        client.send(both)
        assert (await client.read()).says_close
        assert await client.is_closed()  # the second one is not served
        assert now() == 0
        assert world.stage.bodies == [b""]


async def test_connection_is_closed_when_a_refused_body_has_come(
    serving: Serving,
) -> None:
    async with serving() as world:
        client = await world.connect()
        close = ("Connection: close",)
        reading = await client.ask("/nowhere", *close, method="POST", body=b"hello")
        assert (reading.status, reading.says_close) == (404, True)
        assert await client.is_closed()
        assert now() == 0


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nowhere", "/t/stream"])
async def test_head_is_get_without_a_body(serving: Serving, path: str) -> None:
    async with serving() as world:
        world.stage.gate.set()
        client = await world.connect()
        got = await client.ask(path)
        head = await client.ask(path, method="HEAD")
        assert head.status == got.status
        assert (await client.ask("/t/echo")).status == 200  # nothing was left over
        for reading in (got, head):
            for differs in ("x-request-id", "date"):
                reading.headers.pop(differs)
        if path != "/nowhere":  # its message names the method
            assert head.headers == got.headers


# ------------------------------------------------------------------------------
# Web pages
# ------------------------------------------------------------------------------

ORIGIN = "http://localhost:3000"


@pytest.mark.parametrize(
    "path", ["/", "*", "/v1/chat/completions", "/v1/models/a", "/health", "/nowhere"]
)
async def test_preflight_needs_no_key_on_any_path(serving: Serving, path: str) -> None:
    async with serving(VALID_API_KEYS="right") as world:
        client = await world.connect()
        reading = await client.ask(
            path,
            f"Origin: {ORIGIN}",
            "Access-Control-Request-Method: POST",
            "Access-Control-Request-Headers: authorization, content-type, x-title",
            method="OPTIONS",
        )
        assert (reading.status, reading.body) == (204, b"")
        assert reading.headers["access-control-allow-origin"] in ("*", ORIGIN)
        assert reading.headers["access-control-allow-methods"] == (
            "GET, POST, DELETE, OPTIONS"
        )
        assert reading.headers["access-control-allow-headers"] == (
            "authorization, content-type, x-title"
        )
        assert reading.headers["access-control-max-age"] == "86400"
        assert "access-control-allow-private-network" not in reading.headers
        assert "content-length" not in reading.headers
        assert (await client.ask("/health")).status == 200


async def test_preflight_for_the_private_network(serving: Serving) -> None:
    async with serving() as world:
        client = await world.connect()
        reading = await client.ask(
            "/v1/models",
            f"Origin: {ORIGIN}",
            "Access-Control-Request-Private-Network: true",
            method="OPTIONS",
        )
        assert reading.headers["access-control-allow-private-network"] == "true"


@pytest.mark.parametrize("names", ["<script>", "é"])
async def test_preflight_does_not_echo_what_is_no_list_of_names(
    serving: Serving, names: str
) -> None:
    async with serving() as world:
        client = await world.connect()
        reading = await client.ask(
            "/", f"Access-Control-Request-Headers: {names}", method="OPTIONS"
        )
        assert reading.status == 204
        assert "access-control-allow-headers" not in reading.headers


async def test_preflight_with_a_body_leaves_the_connection_good(
    serving: Serving,
) -> None:
    async with serving() as world:
        client = await world.connect()
        assert (await client.ask("/", method="OPTIONS", body=b"12345")).status == 204
        assert (await client.ask("/health")).status == 200


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/health", 200),
        ("/t/echo", 200),
        ("/nowhere", 404),
        ("/t/refuse", 400),
        ("/t/explode", 500),
        ("/t/explode_late", 200),
    ],
)
async def test_page_can_read_every_answer(
    serving: Serving, path: str, status: int
) -> None:
    async with serving() as world:
        client = await world.connect()
        reading = await client.ask(path, f"Origin: {ORIGIN}")
        assert reading.status == status
        assert reading.headers["access-control-allow-origin"] in ("*", ORIGIN)
        exposed = reading.headers["access-control-expose-headers"].split(", ")
        assert set(exposed) >= {
            "x-request-id",
            "retry-after",
            "retry-after-ms",
            "x-should-retry",
        }
        assert not any("access" in h for h in (await client.ask("/health")).headers)


async def test_page_can_read_a_missing_key(serving: Serving) -> None:
    async with serving(VALID_API_KEYS="right") as world:
        client = await world.connect()
        reading = await client.ask("/v1/models", f"Origin: {ORIGIN}")
        assert reading.status == 401
        assert "access-control-allow-origin" in reading.headers


# ------------------------------------------------------------------------------
# Limits
# ------------------------------------------------------------------------------


async def test_connection_goes_on_after_an_answer_that_took_minutes(
    serving: Serving,
) -> None:
    """No deadline is left of the request's body, which was there long ago."""
    async with serving() as world:
        client = await world.connect()
        client.send(request("/t/wait", method="POST", body=b"x"))
        await world.stage.entered.wait()
        await asyncio.sleep(3 * BODY_TIMEOUT_S)
        world.stage.gate.set()
        assert (await client.read()).status == 200
        assert (await client.ask("/health")).status == 200


async def test_head_that_is_slow_is_refused_in_time(serving: Serving) -> None:
    async with serving() as world:
        client = await world.connect()
        client.send(b"GET / HTTP/1.1\r\n")
        for second in range(1, 99):  # a byte a second does not buy more time
            asyncio.get_running_loop().call_later(second, _send_if_open, client, b"x")
        reading = await client.read()
        assert now() == HEAD_TIMEOUT_S
        assert (reading.status, reading.says_close) == (408, True)
        assert reading.error["type"] == "invalid_request_error"
        assert "x-request-id" in reading.headers
        assert await client.is_closed()


def _send_if_open(client: Client, data: bytes) -> None:
    if not client.writer.is_closing():
        client.send(data)


@pytest.mark.parametrize("framing", ["Content-Length: 9", "Transfer-Encoding: chunked"])
async def test_body_that_stalls_is_refused_in_time(
    serving: Serving, framing: str
) -> None:
    async with serving() as world:
        client = await world.connect()
        client.send(request("/t/echo", framing, method="POST"))
        await asyncio.sleep(BODY_TIMEOUT_S - 1)
        client.send(b"5\r\nx")  # each read has the whole time
        sent_at = now()
        reading = await client.read()
        assert now() == sent_at + BODY_TIMEOUT_S
        assert (reading.status, reading.says_close) == (408, True)
        assert await client.is_closed()
        assert world.stage.bodies == []


@pytest.mark.parametrize("after", ["nothing", "a request", "an error"])
async def test_idle_connection_is_closed_without_a_word(
    serving: Serving, after: str
) -> None:
    async with serving() as world:
        client = await world.connect()
        if after != "nothing":
            await client.ask("/t/echo" if after == "a request" else "/nowhere")
        await asyncio.sleep(IDLE_TIMEOUT_S - 1)
        assert not client.reader.at_eof()
        assert await client.is_closed()
        assert now() == IDLE_TIMEOUT_S


async def test_running_request_has_no_limit_of_the_servers(serving: Serving) -> None:
    async with serving() as world:
        client = await world.connect()
        client.send(request("/t/wait", method="POST", body=b"x"))
        await asyncio.sleep(3600)
        world.stage.gate.set()
        assert (await client.read()).status == 200


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_body_over_the_limit_is_refused_readably(
    serving: Serving, framing: str
) -> None:
    async with serving(MAX_BODY_MB="1") as world:
        client = await world.connect()
        body = b"x" * 8_000_000
        if framing == "length":
            client.send(request("/t/echo", method="POST", body=body))
        else:
            client.send(request("/t/echo", "Transfer-Encoding: chunked", method="POST"))
            client.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        reading = await client.read()
        assert (reading.status, reading.error["code"]) == (413, None)
        assert "1 MiB" in reading.error["message"]
        assert world.stage.bodies == []


async def test_body_at_the_limit_is_read(serving: Serving) -> None:
    async with serving(MAX_BODY_MB="1") as world:
        client = await world.connect()
        body = b"x" * 2**20
        reading = await client.ask("/t/echo", method="POST", body=body)
        assert reading.status == 200
        reading = await client.ask("/t/echo", method="POST", body=body + b"x")
        assert reading.status == 413


async def test_body_that_will_be_too_large_is_refused_before_it_comes(
    serving: Serving,
) -> None:
    async with serving(MAX_BODY_MB="1") as world:
        client = await world.connect()
        fields = ["Expect: 100-continue", "Content-Length: 9999999"]
        client.send(request("/t/echo", *fields, method="POST"))
        assert (await client.read()).status == 413
        assert now() == 0


async def test_refused_connection_that_lingers_takes_no_place(serving: Serving) -> None:
    async with serving(MAX_CONNECTIONS="2") as world:
        clients = [await world.connect() for _ in range(3)]
        clients[2].send(request("/health"))
        assert (await clients[2].read()).status == 503
        clients[0].close()
        await asyncio.sleep(0.1)
        assert (await (await world.connect()).ask("/health")).status == 200


async def test_connections_are_limited(serving: Serving) -> None:
    async with serving(MAX_CONNECTIONS="2") as world:
        clients = [await world.connect() for _ in range(2)]
        for client in clients:
            assert (await client.ask("/health")).status == 200
        for _ in range(2):  # who was refused, and has gone, leaves no room
            third = await world.connect()
            third.send(request("/health"))
            reading = await third.read()
            assert (reading.status, reading.says_close) == (503, True)
            assert reading.error["code"] == "server_is_overloaded"
            assert {"x-request-id", "retry-after"} <= set(reading.headers)
            assert await third.is_closed()
        clients[0].close()
        await asyncio.sleep(0.1)
        assert (await (await world.connect()).ask("/health")).status == 200


async def test_client_of_one_connection_too_many_can_send_its_request(
    serving: Serving,
) -> None:
    """It would lose the response, and when to come again, if it met a reset."""
    loop = asyncio.get_running_loop()
    async with serving(MAX_CONNECTIONS="1") as world:
        assert (await (await world.connect()).ask("/health")).status == 200
        with socket.create_connection(("127.0.0.1", world.port)) as late:
            late.setblocking(False)
            await asyncio.sleep(DISCARD_S / 2)
            for data in (request("/t/echo", "Content-Length: 1", method="POST"), b"x"):
                await loop.sock_sendall(late, data)
            last = await world.connect()  # so many wait, and no more
            assert (await last.read()).status == 503
            assert await last.is_closed()
            assert now() == DISCARD_S / 2
            got = await loop.sock_recv(late, 65_536)
            assert got.startswith(b"HTTP/1.1 503 ")
            assert await loop.sock_recv(late, 1) == b""
            assert now() == DISCARD_S * 1.5


async def test_client_that_is_refused_can_send_a_large_body(serving: Serving) -> None:
    """Node's `fetch` and Python's `urllib` would lose the response to a reset."""
    async with serving() as world:
        client = await world.connect()
        body = b"x" * 9_000_000
        assert (await client.ask("/nowhere", method="POST", body=body)).status == 404
        assert (await client.ask("/health")).status == 200


async def test_client_that_is_refused_can_send_its_body_slowly(
    serving: Serving,
) -> None:
    """As over a slow line, or through Apache, which reads no response meanwhile."""
    async with serving() as world:
        client = await world.connect()
        client.send(request("/nowhere", "Content-Length: 9", method="POST"))
        for _ in range(9):
            await asyncio.sleep(DISCARD_S * 0.9)
            client.send(b"x")
        assert (await client.read()).status == 404
        assert (await client.ask("/health")).status == 200


async def test_client_that_is_refused_can_not_send_for_ever(serving: Serving) -> None:
    async with serving() as world:
        client = await world.connect()
        client.send(request("/nowhere", "Content-Length: 99999", method="POST"))
        assert (await client.read()).status == 404
        while not client.reader.at_eof() and now() < MAX_DISCARD_S * 2:
            client.send(b"x")
            await asyncio.sleep(DISCARD_S / 2)
        assert MAX_DISCARD_S <= now() <= MAX_DISCARD_S + DISCARD_S


@pytest.mark.parametrize("body", [b"1\r\nx\r\nzz\r\n", b"zz\r\n"])
async def test_client_that_is_refused_can_send_a_malformed_body(
    serving: Serving, body: bytes
) -> None:
    """It would lose the response, if it met a reset while it still sends."""
    async with serving() as world:
        client = await world.connect()
        head = request("/nowhere", "Transfer-Encoding: chunked", method="POST")
        client.send(head + body)
        assert (await client.read()).status == 404
        assert await client.is_closed()
        assert now() == DISCARD_S


# ------------------------------------------------------------------------------
# Malformed requests
# ------------------------------------------------------------------------------


@pytest.mark.parametrize(("head", "status"), HOSTILE)
async def test_malformed_head_is_refused_and_closed(
    serving: Serving, head: bytes, status: int
) -> None:
    async with serving() as world:
        client = await world.connect()
        client.send(head + request("/t/echo"))
        reading = await client.read()
        assert (reading.status, reading.says_close) == (status, True)
        assert reading.error["type"] == "invalid_request_error"
        assert "x-request-id" in reading.headers
        assert reading.headers["content-type"] == "application/json"
        assert await client.is_closed()  # what follows it is no request
        assert world.stage.bodies == []
        assert (await (await world.connect()).ask("/health")).status == 200


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\nHost: a\n\n", b"\n", b"x" * 99_999])
async def test_no_head_at_all_is_refused_and_closed(
    serving: Serving, data: bytes
) -> None:
    async with serving() as world:
        client = await world.connect()
        client.send(data + b"\r\n\r\n")
        reading = await client.read()
        assert (reading.status, reading.says_close) in ((400, True), (431, True))
        assert await client.is_closed()


@pytest.mark.parametrize("body", [b"zz\r\n", b"2\r\nabc\r\n", b"1\na\r\n", b"-1\r\n"])
async def test_malformed_chunk_is_refused_and_closed(
    serving: Serving, body: bytes
) -> None:
    async with serving() as world:
        client = await world.connect()
        client.send(request("/t/echo", "Transfer-Encoding: chunked", method="POST"))
        client.send(body + b"0\r\n\r\n" + request("/t/echo"))
        reading = await client.read()
        assert (reading.status, reading.says_close) == (400, True)
        assert await client.is_closed()
        assert world.stage.bodies == []


async def test_nothing_is_understood_after_a_malformed_chunk(serving: Serving) -> None:
    """What looks like the end of the body, and like a request behind it, is neither."""
    async with serving() as world:
        client = await world.connect()
        client.send(request("/t/echo", "Transfer-Encoding: chunked", method="POST"))
        client.send(b"zz\r\n")
        assert (await client.read()).status == 400
        client.send(b"0\r\n\r\n" + request("/t/echo"))
        assert await client.is_closed()
        assert world.stage.bodies == []


async def test_malformed_body_of_a_refused_request_closes(serving: Serving) -> None:
    async with serving() as world:
        client = await world.connect()
        client.send(request("/nowhere", "Transfer-Encoding: chunked", method="POST"))
        client.send(b"zz\r\n" + request("/t/echo"))
        assert (await client.read()).status == 404
        assert await client.is_closed()
        assert world.stage.bodies == []


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\r\n", id="blank-line"),
        pytest.param(b"GET / HT", id="in-head"),
        pytest.param(request("/t/echo", "Content-Length: 9") + b"x", id="in-body"),
        pytest.param(
            request("/t/echo", "Transfer-Encoding: chunked") + b"5\r\nx", id="in-chunk"
        ),
        pytest.param(request("/nowhere", "Content-Length: 9"), id="in-refused-body"),
    ],
)
@pytest.mark.parametrize("how", ["end", "reset"])
async def test_client_that_leaves_early_is_no_error(
    serving: Serving, caplog: pytest.LogCaptureFixture, data: bytes, how: str
) -> None:
    async with serving() as world:
        client = await world.connect()
        client.send(data)
        await some_turns()
        client.leave(how)
        await asyncio.sleep(0.1)
        assert world.stage.bodies == []
        assert [r for r in caplog.records if r.levelno > logging.INFO] == []
        assert await world.server.drain(0)  # nothing of it is left


# ------------------------------------------------------------------------------
# The error boundary
# ------------------------------------------------------------------------------


async def test_error_is_a_response_and_the_connection_goes_on(serving: Serving) -> None:
    async with serving() as world:
        client = await world.connect()
        reading = await client.ask("/t/refuse")
        assert (reading.status, reading.headers["x-more"]) == (400, "y")
        assert reading.error == {
            "message": "Not so.",
            "type": "invalid_request_error",
            "param": "p",
            "code": None,
        }
        assert (await client.ask("/t/echo")).status == 200


async def test_bug_is_a_500_without_details(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as world:
        client = await world.connect()
        reading = await client.ask("/t/explode", method="POST", body=b"x")
        assert reading.status == 500
        assert reading.error == {
            "message": GENERIC,
            "type": "server_error",
            "param": None,
            "code": None,
        }
        assert "secret" in caplog.text  # the traceback is in the log
        assert reading.headers["x-request-id"] in caplog.text
        assert (await client.ask("/t/echo")).status == 200


@pytest.mark.parametrize(
    ("path", "message", "code"),
    [
        ("/t/explode_late", GENERIC, None),
        ("/t/refuse_late", "Broken off.", "upstream_error"),
    ],
)
async def test_error_after_the_head_is_an_event_and_the_end(
    serving: Serving, path: str, message: str, code: str | None
) -> None:
    async with serving() as world:
        client = await world.connect()
        reading = await client.ask(path)
        assert reading.status == 200
        begun, error, done, rest = reading.body.split(b"\n\n")
        assert (begun, done, rest) == (b"data: begun", b"data: [DONE]", b"")
        assert json.loads(error[len(b"data: ") :]) == {
            "error": {
                "message": message,
                "type": "server_error",
                "param": None,
                "code": code,
            }
        }
        assert b"finish_reason" not in reading.body
        assert (await client.ask("/t/echo")).status == 200


async def test_error_after_the_end_adds_nothing(serving: Serving) -> None:
    async with serving() as world:
        client = await world.connect()
        reading = await client.ask("/t/explode_at_the_end")
        assert reading.body == b"data: begun\n\ndata: [DONE]\n\n"
        assert (await client.ask("/t/echo")).status == 200


# ------------------------------------------------------------------------------
# Refused before the body was read
# ------------------------------------------------------------------------------


async def test_failed_stream_is_not_kept_alive(serving: Serving) -> None:
    """A heartbeat behind its end would begin the next response."""
    script = [message("Hel"), Sleep(1), error_event("No.")]
    body = {"model": "m", "messages": [{"content": "Hi"}], "stream": True}
    async with FakeDify() as dify, serving(dify.base) as world:
        dify.app(KEY, script=script)
        client = await world.connect()
        data = json.dumps(body).encode()
        got = await client.ask("/v1/chat/completions", method="POST", body=data)
        assert got.body.endswith(b"data: [DONE]\n\n")
        await asyncio.sleep(3 * KEEP_ALIVE_S)
        assert (await client.ask("/health")).status == 200


async def test_slow_reader_of_a_response_gets_all(serving: Serving) -> None:
    """A heartbeat says all that was said: more than it reads until the next one."""
    body = {"model": "m", "input": "Hi", "stream": True}
    data = json.dumps(body).encode()
    fields = ["Connection: close", "X-OpenDify-Smoothing: off"]
    asking = request("/v1/responses", *fields, method="POST", body=data)
    loop, ended, size = asyncio.get_running_loop(), b"", 0
    async with FakeDify() as dify, serving(dify.base) as world:
        dify.app(KEY, script=chat_answer("x" * 5_000_000))
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            sock.setblocking(False)
            await loop.sock_connect(sock, ("127.0.0.1", world.port))
            await loop.sock_sendall(sock, asking)
            while piece := await loop.sock_recv(sock, 100_000):
                ended = (ended + piece)[-100:]
                size += len(piece)
                await asyncio.sleep(1)
    assert ended.endswith(b"\n\n\r\n0\r\n\r\n")
    assert size < 6 * 5_000_000


async def test_small_body_of_a_refused_request_is_thrown_away(serving: Serving) -> None:
    async with serving() as world:
        client = await world.connect()
        for body in (b"x", b"x" * 500_000):
            reading = await client.ask("/nowhere", method="POST", body=body)
            assert (reading.status, reading.says_close) == (404, False)
        assert (await client.ask("/t/echo")).status == 200


async def test_body_that_never_comes_does_not_hold_the_connection(
    serving: Serving,
) -> None:
    async with serving() as world:
        client = await world.connect()
        fields = ["Content-Length: 99"]
        reading = await client.ask("/nowhere", *fields, method="POST")
        assert reading.status == 404
        assert await client.is_closed()
        assert now() <= 5


# ------------------------------------------------------------------------------
# Clients that leave
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["end", "reset"])
@pytest.mark.parametrize("path", ["/t/wait", "/t/stream"])
async def test_leaving_interrupts_the_handler(
    serving: Serving, caplog: pytest.LogCaptureFixture, path: str, how: str
) -> None:
    caplog.set_level(logging.INFO, "opendify")
    async with serving() as world:
        client = await world.connect()
        client.send(request(path))
        await world.stage.entered.wait()
        client.leave(how)
        await asyncio.wait_for(world.stage.ended.wait(), 1)
        await asyncio.sleep(0.1)
        assert "client-left" in caplog.text
        assert [r for r in caplog.records if r.levelno > logging.INFO] == []


@pytest.mark.parametrize("how", ["end", "reset"])
async def test_leaving_before_all_is_sent_is_noted(
    serving: Serving, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    caplog.set_level(logging.INFO, "opendify")
    async with serving() as world:
        client = await world.connect()
        client.send(request("/t/echo", "Content-Length: 9", method="POST") + b"x")
        await some_turns()
        client.leave(how)
        await asyncio.sleep(0.1)
        assert re.search(r"POST /t/echo - took=0\.\d+s client-left", caplog.text)


async def test_leaving_before_all_is_taken_is_noted(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "opendify")
    async with serving() as world:
        client = await world.connect()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.send(request("/t/echo", method="POST", body=b"x" * 15_000_000))
        await asyncio.sleep(1)
        client.reset()
        await asyncio.sleep(0.1)
        assert re.search(r"/t/echo 200 took=1\.\d+s client-left", caplog.text)


async def test_leaving_right_after_the_request_is_noticed(serving: Serving) -> None:
    async with serving() as world:
        client = await world.connect()
        client.send(request("/t/wait", method="POST", body=b"x" * 300_000))
        await client.writer.drain()
        client.close()
        await asyncio.wait_for(world.stage.ended.wait(), 1)


async def test_leaving_stops_the_run_in_dify(serving: Serving) -> None:
    async with FakeDify() as fake, serving(fake.base) as world:
        fake.app(KEY, script=[message("Hello"), Hang()])
        client = await world.connect()
        client.send(chat(ASKS, "X-OpenDify-Smoothing: off"))
        await client.reader.readuntil(b"Hello")
        client.close()
        await fake.until(lambda: fake.stops)
        await asyncio.sleep(1)
        assert [stop.effective for stop in fake.stops] == [True]
        assert fake.running == 0


ASKS = {
    "model": "m",
    "stream": True,
    "messages": [{"role": "user", "content": "a planted text"}],
}


def chat(body: dict[str, Any], *fields: str) -> bytes:
    data = json.dumps(body).encode()
    return request("/v1/chat/completions", *fields, method="POST", body=data)


# ------------------------------------------------------------------------------
# Drain
# ------------------------------------------------------------------------------


async def test_drain_closes_idle_connections_at_once(serving: Serving) -> None:
    async with serving() as world:
        fresh, used = await world.connect(), await world.connect()
        await used.ask("/health")
        assert await world.server.drain()
        assert await fresh.is_closed()
        assert await used.is_closed()
        assert now() == 0


@pytest.mark.real_clock
@pytest.mark.parametrize("turns", range(8))
async def test_drain_closes_who_has_just_come(serving: Serving, turns: int) -> None:
    async with serving() as world:
        with socket.create_connection(("127.0.0.1", world.port)):
            for _ in range(turns):
                await asyncio.sleep(0)
            assert await world.server.drain(2)


async def test_empty_line_behind_a_request_is_no_request(serving: Serving) -> None:
    async with serving() as world:
        client = await world.connect()
        await client.ask("/health")
        client.send(b"\r\n")
        await asyncio.sleep(40)  # longer than a head may take
        assert (await client.ask("/health")).status == 200
        assert await world.server.drain()


async def test_drain_accepts_nobody_any_more(serving: Serving) -> None:
    async with serving() as world:
        await world.server.drain()
        with pytest.raises(ConnectionRefusedError):
            await world.connect()


@pytest.mark.parametrize("path", ["/t/wait", "/t/stream"])
async def test_drain_lets_running_requests_end(serving: Serving, path: str) -> None:
    async with serving() as world:
        client = await world.connect()
        client.send(request(path) + request("/t/echo"))
        await world.stage.entered.wait()
        draining = asyncio.ensure_future(world.server.drain())
        await asyncio.sleep(DRAIN_S - 5)  # the rest is for a client that lingers
        assert not draining.done()
        world.stage.gate.set()
        assert await draining
        reading = await client.read()
        assert reading.status == 200
        if path == "/t/wait":  # the other's head was out before
            assert reading.says_close
        assert await client.is_closed()
        assert world.stage.bodies == []


@pytest.mark.parametrize("size", [1, 20, -1])
async def test_drain_answers_a_request_that_is_arriving(
    serving: Serving, size: int
) -> None:
    async with serving() as world:
        client = await world.connect()
        data = request("/t/echo", method="POST", body=b"x")
        client.send(data[:size])
        await asyncio.sleep(0.1)
        draining = asyncio.ensure_future(world.server.drain())
        await asyncio.sleep(1)
        client.send(data[size:])
        reading = await client.read()
        assert (reading.status, reading.body, reading.says_close) == (200, b"x", True)
        assert await client.is_closed()
        assert await draining


@pytest.mark.parametrize("turns", range(6))
async def test_drain_answers_a_request_that_has_just_arrived(
    serving: Serving, turns: int
) -> None:
    """Or it closes before it has read it; never is something done, and not told."""
    async with serving() as world:
        client = await world.connect()
        await client.ask("/health")
        client.send(request("/t/echo", method="POST", body=b"x"))
        for _ in range(turns):
            await asyncio.sleep(0)
        assert await world.server.drain()
        answer = b""
        with contextlib.suppress(ConnectionResetError):  # it came after the close
            answer = await client.reader.read()
        assert world.stage.bodies == [b"x"] * answer.startswith(b"HTTP/1.1 200")


async def test_drain_answers_what_follows_a_response_that_did_not_say_close(
    serving: Serving,
) -> None:
    async with serving() as world:
        client = await world.connect()
        client.send(request("/nowhere", "Content-Length: 1", method="POST"))
        reading = await client.read()
        assert (reading.status, reading.says_close) == (404, False)
        draining = asyncio.ensure_future(world.server.drain())
        await asyncio.sleep(0.1)
        client.send(b"x" + request("/t/echo", method="POST", body=b"y"))
        reading = await client.read()
        assert (reading.status, reading.body, reading.says_close) == (200, b"y", True)
        assert await client.is_closed()
        assert await draining


async def test_drain_says_close_with_an_error_too(serving: Serving) -> None:
    gate = asyncio.Event()
    async with FakeDify() as fake, serving(fake.base) as world:
        fake.app(KEY, script=[Wait(gate), error_event()])
        client = await world.connect()
        client.send(chat(ASKS))
        await fake.until(lambda: fake.running)
        draining = asyncio.ensure_future(world.server.drain())
        await asyncio.sleep(0)
        gate.set()
        reading = await client.read()
        assert (reading.status, reading.says_close) == (502, True)
        assert await draining


async def test_drain_cuts_what_does_not_end_and_says_so(serving: Serving) -> None:
    """A clean error, not a broken connection: the client can tell it from a fault."""
    async with serving() as world:
        waiting, streaming = await world.connect(), await world.connect()
        for client, path in ((waiting, "/t/wait"), (streaming, "/t/stream")):
            client.send(request(path))
            await world.stage.entered.wait()
            world.stage.entered.clear()
        assert not await world.server.drain()
        assert now() == DRAIN_S
        assert world.stage.ended.is_set()
        reading = await waiting.read()
        assert (reading.status, reading.says_close) == (503, True)
        assert reading.error["code"] == "server_is_overloaded"
        reading = await streaming.read()
        _, error, done, rest = reading.body.split(b"\n\n")
        assert b'"code":"server_is_overloaded"' in error
        assert (done, rest) == (b"data: [DONE]", b"")


async def test_drain_waits_for_runs_that_are_stopped_beside(serving: Serving) -> None:
    async with FakeDify() as fake, serving(fake.base) as world:
        fake.app(KEY, script=[message("Hello. Bye"), Hang()])
        client = await world.connect()
        client.send(chat({**ASKS, "stream": False, "stop": ["Bye"]}))
        assert (await client.read()).status == 200
        assert await world.server.drain()
        assert [stop.effective for stop in fake.stops] == [True]
        assert fake.running == 0


async def test_drain_stops_runs_in_dify_that_it_cuts(serving: Serving) -> None:
    async with FakeDify() as fake, serving(fake.base) as world:
        fake.app(KEY, script=[message("Hello"), Hang()])
        client = await world.connect()
        client.send(chat(ASKS, "X-OpenDify-Smoothing: off"))
        await client.reader.readuntil(b"Hello")
        assert not await world.server.drain(5)
        assert [stop.effective for stop in fake.stops] == [True]
        assert now() < 5 + opendify.CANCEL_S


async def test_drain_stops_runs_that_begin_when_it_has_cut_them(
    serving: Serving,
) -> None:
    async with FakeDify() as fake, serving(fake.base) as world:
        fake.app(KEY, script=[Send(b""), Sleep(6), message("Hello"), Hang()])
        client = await world.connect()
        client.send(chat(ASKS))
        await fake.until(lambda: fake.running)
        assert not await world.server.drain(5)
        assert [stop.effective for stop in fake.stops] == [True]
        assert now() < 5 + 2 * opendify.CANCEL_S


# ------------------------------------------------------------------------------
# The log
# ------------------------------------------------------------------------------


@pytest.fixture
def access_log(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """The access log's lines, with the times replaced by `…s`."""
    caplog.set_level(logging.DEBUG, "opendify")

    def lines() -> list[str]:
        messages = [record.getMessage() for record in caplog.records]
        lines = [line for line in messages if " took=" in line]
        return [re.sub(r"\d+\.\d{3}s", "…s", line) for line in lines]

    yield lines


async def test_log_has_one_line_a_request(
    serving: Serving, access_log: Callable[[], list[str]]
) -> None:
    async with serving() as world:
        client = await world.connect()
        await client.ask("/health")
        await client.ask("/v1/nowhere?secret=1", method="POST", body=b"x")
        await client.ask("/t/explode")
        await client.ask("/v1/models/app-aBc123XyZ?x")  # a key taken for a model's name
        client.send(b"nonsense\r\n\r\n")
        await client.is_closed()
    assert access_log() == [
        "GET /health 200 took=…s id=req_1",
        "POST /v1/nowhere 404 took=…s id=req_2",
        "GET /t/explode 500 took=…s id=req_3",
        "GET /v1/models/app-… 404 took=…s id=req_4",
        "- - 400 took=…s id=req_5",
    ]


@pytest.mark.parametrize("stream", [True, False])
async def test_log_line_of_a_turn(
    serving: Serving,
    access_log: Callable[[], list[str]],
    caplog: pytest.LogCaptureFixture,
    stream: bool,
) -> None:
    async with FakeDify() as fake, serving(fake.base) as world:
        fake.app(KEY, script=chat_answer("Hello", " world", delay=1))
        client = await world.connect()
        client.send(chat({**ASKS, "stream": stream, "n": 2}))
        reading = await client.read()
        assert reading.status == 200
    assert access_log() == [
        "POST /v1/chat/completions 200 model='m' first=…s took=…s chars=22 id="
        + reading.headers["x-request-id"]
    ]
    assert re.search(r" first=1\.\d+s took=[23]\.", caplog.text)


async def test_log_counts_no_text_that_came_due_after_the_client_had_left(
    serving: Serving, access_log: Callable[[], list[str]]
) -> None:
    async with FakeDify() as fake, serving(fake.base, STREAM_MAX_LAG="5") as world:
        fake.app(KEY, script=[message("word " * 99), Hang()], stoppable=False)
        client = await world.connect()
        client.send(chat({**ASKS, "stream": True}))
        await client.reader.readuntil(b"word")
        client.close()
        await fake.until(lambda: not fake.running)
        await fake.until(access_log)
    (line,) = access_log()
    (chars,) = map(int, re.findall(r"chars=(\d+) client-left", line))
    assert chars < 99


async def test_log_masks_a_client_s_key_wherever_it_was_put(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    key = "planted-client-key"
    fields = (f"Authorization: Bearer {key}",)
    async with FakeDify() as fake, serving(fake.base, VALID_API_KEYS=key) as world:
        client = await world.connect()
        for data in (
            chat({**ASKS, "model": key}, *fields),
            request(f"/v1/models/{key}", *fields),
            request(f"/v1/{key}/models", *fields),
            request(f"/openai/deployments/{key}/chat/completions"),
        ):
            client.send(data)
            assert (await client.read()).status in (404, 405)
    assert "The model 'plante…' does not exist" in caplog.text
    assert "GET /v1/models/plante… 404" in caplog.text
    assert key not in caplog.text


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO])
async def test_log_has_what_dify_is_sent_and_sends_at_debug(
    serving: Serving, caplog: pytest.LogCaptureFixture, level: int
) -> None:
    caplog.set_level(level)
    nameless = Send(b'data: {"x": 1}\n\n')
    script = [message("Hello"), Sleep(1), message(" you"), nameless, message_end()]
    ids = []
    async with FakeDify() as fake, serving(fake.base) as world:
        fake.app(KEY, script=script)
        client = await world.connect()
        for _ in range(2):  # the second on Dify's connection of the first
            client.send(chat({**ASKS, "stream": True}))
            ids.append((await client.read()).headers["x-request-id"])
    lines = [re.sub(r"\d+ (by|ch)", r"N \1", line) for line in caplog.messages]
    assert [line for line in lines if line[:2] in ("> ", "< ")] == [
        f"{line} id={id_}"
        for id_ in (ids if level == logging.DEBUG else ())
        for line in (
            f"> POST {fake.base}/chat-messages N bytes",
            "< 200 text/event-stream; charset=utf-8",
            "< message N characters",
            "< message N characters",
            "< event N characters",
            "< message_end N characters",
        )
    ]


async def test_log_never_holds_keys_or_texts(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    scripts: list[Any] = [
        chat_answer("a planted answer"),
        [message("a planted answer"), Send(b"data: {planted\n\n")],
        [Send({"event": "error", "message": f"{KEY} planted", "status": 400})],
    ]
    right = "planted-client-key"
    async with FakeDify() as fake, serving(fake.base, VALID_API_KEYS=right) as world:
        client = await world.connect()
        for script in scripts:
            fake.app(KEY, script=script)
            for key in (right, "planted-wrong-key"):
                client.send(chat(ASKS, f"Authorization: Bearer {key}"))
                assert KEY.encode() not in (await client.read()).body
    assert "chat/completions" in caplog.text
    assert KEY not in caplog.text
    for words in (right, "planted-wrong-key", "a planted"):
        assert words not in caplog.text
