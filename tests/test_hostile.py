"""Hostile input on real sockets: hundreds of requests, each with its only outcome.

A case is what a client does (bytes, seconds of waiting, an end) and what it gets: the
statuses in their order, and whether the server closes. Where it does not close, the
connection must still be in step, so a further request on it is answered. The clock is
virtual, so that slow clients take no time.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import re
import socket
import struct
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple, Union

import pytest
from clock import now
from fake_dify import FakeDify, chat_answer
from sites import listening
from test_wire import HOSTILE
from work import at_most

from opendify import (
    BODY_TIMEOUT_S,
    DISCARD_S,
    HEAD_TIMEOUT_S,
    IDLE_TIMEOUT_S,
    KEY_FAILURES_S,
    MAX_FIELDS,
    MAX_HEAD_BYTES,
    MAX_KEY_FAILURES,
    WRITE_TIMEOUT_S,
    Exchange,
    KeysGuessed,
    Listener,
    Reply,
    Request,
    Server,
    Site,
    Unauthorized,
    Wire,
    authorized_handler,
    find_endpoint,
    is_loopback,
    parse_settings,
)

KEY = "app-key-of-the-tests"
PAGE = "http://localhost:3000"

Act = Union[bytes, float, str]  # bytes to send, seconds to wait, "end" or "reset"


class Case(NamedTuple):
    """What a client does, and all that it gets."""

    acts: Sequence[Act]
    statuses: tuple[int, ...] = ()
    closes: bool = False
    within_s: float = DISCARD_S  # of the loop's time, from the last act on
    settings: dict[str, str] = {}  # noqa: RUF012 - never written


class Answer(NamedTuple):
    """A response, parsed."""

    status: int
    headers: dict[str, str]
    body: bytes


def head(start: str, *fields: str, host: str | None = "localhost") -> bytes:
    lines = [start, *([f"Host: {host}"] if host is not None else []), *fields]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def get(path: str = "/health", *fields: str, host: str = "localhost") -> bytes:
    return head(f"GET {path} HTTP/1.1", *fields, host=host)


def post(body: bytes | str, *fields: str, path: str = "/v1/chat/completions") -> bytes:
    data = body if isinstance(body, bytes) else body.encode()
    length = f"Content-Length: {len(data)}"
    return head(f"POST {path} HTTP/1.1", length, *fields) + data


def chunked(body: bytes, *fields: str) -> bytes:
    """A POST whose body has still to be framed."""
    coding = "Transfer-Encoding: chunked"
    return head("POST /v1/chat/completions HTTP/1.1", coding, *fields) + body


def bytewise(data: bytes) -> list[Act]:
    return [data[at : at + 1] for at in range(len(data))]


def slowly(data: bytes, pause_s: float) -> list[Act]:
    return [act for byte in bytewise(data) for act in (byte, pause_s)]


# ------------------------------------------------------------------------------
# A server, and one client after another
# ------------------------------------------------------------------------------


class Host:
    """A server with one app behind it, and what is asked of it."""

    def __init__(self, site: Site, server: Server, port: int) -> None:
        self.site = site
        self.server = server
        self.port = port

    async def run(self, case: Case) -> list[Answer]:
        """Play a case and check its outcome; returns the answers."""
        reader, writer = await self.connect()
        try:
            for act in case.acts:
                await _act(writer, act)
            began = now()
            data = await asyncio.wait_for(self._outcome(reader, writer, case), 200)
            assert now() - began <= case.within_s + 0.5, "too late"
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        answers = list(parse_answers(data))
        assert tuple(answer.status for answer in answers) == case.statuses
        for answer in answers:
            assert_proper(answer)
        await quiet()
        return answers

    async def _outcome(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, case: Case
    ) -> bytes:
        """All bytes that come; to a connection that stays open, one more request."""
        if "reset" in case.acts:
            return b""
        if case.closes:
            return await read_to_the_end(reader)
        last = b"/in-step"
        writer.write(get(last.decode(), "Connection: close"))
        data = await read_to_the_end(reader)
        *_, final = parse_answers(data)
        assert (final.status, last in final.body) == (404, True), data
        return data[: data.rindex(b"HTTP/1.1 404 ")]

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, limit=2**24)

    async def still_serves(self) -> None:
        await self.run(Case([get()], (200,)))


async def _act(writer: asyncio.StreamWriter, act: Act) -> None:
    if isinstance(act, bytes):
        if not writer.is_closing():
            writer.write(act)
        await asyncio.sleep(0)
    elif isinstance(act, (int, float)):
        await asyncio.sleep(act)
    elif act == "end":
        writer.write_eof()
    else:
        linger = struct.pack("ii", 1, 0)
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()


async def read_to_the_end(reader: asyncio.StreamReader) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionResetError):  # after a refusal, at worst
        while piece := await reader.read(65536):
            data += piece
    return data


def parse_answers(data: bytes) -> Iterable[Answer]:
    while data:
        top, blank, data = data.partition(b"\r\n\r\n")
        assert blank, f"half a head: {top!r}"
        first, *lines = top.decode("latin-1").split("\r\n")
        assert re.match(r"HTTP/1\.1 [1-5]\d\d ", first), first
        pairs = [line.split(": ", 1) for line in lines]
        headers = {name.lower(): value for name, value in pairs}
        assert len(headers) == len(pairs), f"a field twice: {top!r}"
        size = int(headers.get("content-length", 0))
        assert len(data) >= size, "half a body"
        yield Answer(int(first.split()[1]), headers, data[:size])
        data = data[size:]


def assert_proper(answer: Answer) -> None:
    """Every refusal is OpenAI's error object, and nothing is a bug."""
    assert answer.status != 500
    if answer.status == 100:
        return
    assert answer.headers["x-request-id"].startswith("req_")
    if answer.status >= 400 and answer.body:
        error = json.loads(answer.body)["error"]
        assert sorted(error) == ["code", "message", "param", "type"]
        assert (error["type"] == "server_error") == (answer.status >= 500)


async def quiet() -> None:
    """Wait until nothing runs but the caller: no task is left of any client."""
    for _ in range(100):
        if len(asyncio.all_tasks()) == 1:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"left: {asyncio.all_tasks()}")


@contextlib.asynccontextmanager
async def hosting(
    base: str = "http://127.0.0.1:9/v1", **variables: str
) -> AsyncIterator[Host]:
    models = {"MODEL_CONFIG": json.dumps({"m": {"key": KEY, "mode": "chat"}})}
    limits = {"DIFY_API_BASE": base, "MAX_BODY_MB": "1"}
    settings = parse_settings({**models, **limits, **variables})
    async with listening(settings) as (site, server, port):
        # As if it listened where the settings say.
        server.is_local = is_loopback(settings.server_host)
        yield Host(site, server, port)


# ------------------------------------------------------------------------------
# The cases
# ------------------------------------------------------------------------------

SMUGGLED = get("/smuggled")
CHUNKS = b"2\r\n{}\r\n0\r\n\r\n"


def _heads() -> dict[str, Case]:
    """Each malformed head: cut at every byte, and behind a good request."""
    cases = {}
    for row in HOSTILE:
        data, status = row.values
        pieces = bytewise(data) if len(data) < 300 else [data[:99], data[99:]]
        cases[f"head-cut-{row.id}"] = Case(pieces, (status,), True)
        behind = [get() + data + SMUGGLED]
        cases[f"head-behind-{row.id}"] = Case(behind, (200, status), True)
    return cases


# A body whose end two readers might see in two places: one answer, then the end.
SMUGGLING: dict[str, bytes] = {
    "cl-te-body": head(
        "POST / HTTP/1.1", "Content-Length: 6", "Transfer-Encoding: chunked"
    )
    + b"0\r\n\r\n",
    "cl-0-te": head(
        "POST / HTTP/1.1", "Content-Length: 0", "Transfer-Encoding: chunked"
    )
    + CHUNKS,
    "te-lf": head("POST / HTTP/1.1", "A: b\nTransfer-Encoding: chunked") + CHUNKS,
    "te-cr": head("POST / HTTP/1.1", "A: b\rTransfer-Encoding: chunked") + CHUNKS,
    "te-space-colon": head("POST / HTTP/1.1", "Transfer-Encoding : chunked") + CHUNKS,
    "te-space-before": head("POST / HTTP/1.1", " Transfer-Encoding: chunked") + CHUNKS,
    "te-nul": head("POST / HTTP/1.1", "Transfer-Encoding\x00: chunked") + CHUNKS,
    "te-value-nul": head("POST / HTTP/1.1", "Transfer-Encoding: chunked\x00") + CHUNKS,
    "te-value-vt": head("POST / HTTP/1.1", "Transfer-Encoding:\x0bchunked") + CHUNKS,
    "cl-two-fields": head("POST / HTTP/1.1", "Content-Length: 2", "content-length: 0")
    + b"{}",
    "cl-space-colon": head("POST / HTTP/1.1", "Content-Length : 2") + b"{}",
    "cl-fold": head("POST / HTTP/1.1", "Content-Length:", " 2") + b"{}",
    "cl-nul": head("POST / HTTP/1.1", "Content-Length: 2\x00") + b"{}",
    "cl-float": head("POST / HTTP/1.1", "Content-Length: 2.0") + b"{}",
    "cl-exponent": head("POST / HTTP/1.1", "Content-Length: 2e0") + b"{}",
    "cl-quoted": head("POST / HTTP/1.1", 'Content-Length: "2"') + b"{}",
    "cl-full-width": head("POST / HTTP/1.1", "Content-Length: \xef\xbc\x92") + b"{}",
    "chunk-negative": chunked(b"-2\r\n{}\r\n0\r\n\r\n"),
    "chunk-hex-prefix": chunked(b"0x2\r\n{}\r\n0\r\n\r\n"),
    "chunk-no-size": chunked(b"\r\n{}\r\n0\r\n\r\n"),
    "chunk-overflow": chunked(b"1" + b"0" * 16 + b"2\r\n{}\r\n0\r\n\r\n"),
    "chunk-lf": chunked(b"2\n{}\n0\n\n"),
    "chunk-lf-last": chunked(b"2\r\n{}\r\n0\n\n"),
    "chunk-cr": chunked(b"2\r{}\r\n0\r\n\r\n"),
    "chunk-too-long": chunked(b"2\r\n{}}\r\n0\r\n\r\n"),
    "chunk-too-short": chunked(b"3\r\n{}\r\n0\r\n\r\n"),
    "chunk-space-before": chunked(b" 2\r\n{}\r\n0\r\n\r\n"),
    "chunk-underscore": chunked(b"0_2\r\n{}\r\n0\r\n\r\n"),
    "chunk-plus": chunked(b"+2\r\n{}\r\n0\r\n\r\n"),
    "chunk-ext-lf": chunked(b"2;a\nb\r\n{}\r\n0\r\n\r\n"),
    "chunk-ext-cr": chunked(b"2;a\rb\r\n{}\r\n0\r\n\r\n"),
    "chunk-ext-quoted-lf": chunked(b'2;a="\n"\r\n{}\r\n0\r\n\r\n'),
    "chunk-spill": chunked(b"2\r\n{}GET /x HTTP/1.1\r\n\r\n0\r\n\r\n"),
    "trailer-no-colon": chunked(b"2\r\n{}\r\n0\r\nGET / HTTP/1.1\r\n\r\n"),
    "trailer-lf": chunked(b"2\r\n{}\r\n0\r\na: b\n\r\n\r\n"),
    "trailer-folded": chunked(b"2\r\n{}\r\n0\r\na: b\r\n c\r\n\r\n"),
    "trailer-space-colon": chunked(b"2\r\n{}\r\n0\r\na : b\r\n\r\n"),
    "trailer-control": chunked(b"2\r\n{}\r\n0\r\na\x00: b\r\n\r\n"),
}


def _smuggling() -> dict[str, Case]:
    cases = {}
    for name, data in SMUGGLING.items():
        cases[f"smuggle-{name}"] = Case([data + SMUGGLED], (400,), True)
        pieces = bytewise(data)
        cases[f"smuggle-cut-{name}"] = Case([*pieces, 0.1, SMUGGLED], (400,), True)
    return cases


# What looks odd but has one reading only: the connection stays in step.
HARMLESS: dict[str, Case] = {
    "compressed": Case([post(b"\x1f\x8b\x08", "Content-Encoding: gzip")], (415,)),
    "not-compressed": Case([post("{}", "Content-Encoding: identity")], (400,)),
    "no-coding": Case([post("{}", "Content-Encoding: UTF-8")], (400,)),
    "underscores-are-no-framing": Case(
        [post("{}", "Transfer_Encoding: chunked", "Content_Length: 99")], (400,)
    ),
    "te-tab": Case(
        [head("POST /v1/models HTTP/1.1", "Transfer-Encoding:\tchunked\t") + CHUNKS],
        (405,),
    ),
    "te-upper": Case(
        [head("POST /v1/models HTTP/1.1", "TRANSFER-ENCODING: CHUNKED") + CHUNKS],
        (405,),
    ),
    "chunk-leading-zeros": Case([chunked(b"002\r\n{}\r\n000\r\n\r\n")], (400,)),
    "chunk-extension": Case([chunked(b'2;a="b;c"\r\n{}\r\n0;x\r\n\r\n')], (400,)),
    "trailers": Case(
        [chunked(b"2\r\n{}\r\n0\r\nContent-Length: 9\r\nHost: x\r\n\r\n")], (400,)
    ),
    "get-with-body": Case([get("/health", "Content-Length: 5") + b"hello"], (200,)),
    "get-with-chunks": Case(
        [get("/health", "Transfer-Encoding: chunked") + CHUNKS], (200,)
    ),
    "body-that-is-a-request": Case([post(SMUGGLED)], (400,)),
    "chunks-that-are-requests": Case(
        [chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED))], (400,)
    ),
    "options-with-body": Case(
        [head("OPTIONS /v1/x HTTP/1.1", "Content-Length: 2") + b"{}"], (204,)
    ),
    "two-hundred-in-one-packet": Case([get() * 200], (200,) * 200, within_s=5),
    "bodies-in-one-packet": Case([post("{}") * 50], (400,) * 50, within_s=5),
    "blank-lines-first": Case([b"\r\n\r\n\r\n" + get()], (200,)),
    "blank-lines-between": Case([get() + b"\r\n\r\n" + get()], (200, 200)),
    "cut-at-every-byte": Case(bytewise(get() + post("{}") + get()), (200, 400, 200)),
    "chunks-cut-at-every-byte": Case(
        bytewise(chunked(b"1;x\r\n{\r\n1\r\n}\r\n0\r\na: b\r\n\r\n") + get()),
        (400, 200),
    ),
    "upgrade-websocket": Case(
        [get("/health", "Connection: Upgrade", "Upgrade: websocket")], (200,)
    ),
    "upgrade-h2c": Case(
        [get("/health", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c")], (200,)
    ),
    "expect-without-body": Case([get("/health", "Expect: 100-continue")], (200,)),
    "expect-something-else": Case([post("{}", "Expect: 200-ok")], (400,)),
    "as-many-fields-as-may-be": Case(
        [get("/health", *[f"X-{n}: y" for n in range(MAX_FIELDS - 1)])], (200,)
    ),
    "as-large-a-head-as-may-be": Case(
        [get("/health", "X: " + "y" * (MAX_HEAD_BYTES - 60))], (200,)
    ),
    "absolute-form": Case([head("GET http://localhost/health HTTP/1.1")], (200,)),
    "absolute-form-beats-host": Case(
        [head("GET http://localhost/health HTTP/1.1", host="evil.example")], (200,)
    ),
    "latin-1-value": Case([get("/health", "X: \xff\xfe")], (200,)),
    "query-of-anything": Case([get("/health?%00=../..&<script>='\"")], (200,)),
    "connection-of-anything": Case([get("/health", "Connection: ,,x,,")], (200,)),
}

PATHS: dict[str, tuple[str, int]] = {
    "traversal": ("/../../etc/passwd", 404),
    "traversal-encoded": ("/%2e%2e/%2e%2e/etc/passwd", 404),
    "traversal-in-model": ("/v1/models/../../etc/passwd", 404),
    "nul": ("/%00", 404),
    "not-utf-8": ("/v1/models/%ff%fe", 404),
    "surrogate": ("/v1/models/%ed%a0%80", 404),
    "percent-broken": ("/v1/models/%", 404),
    "percent-twice": ("/v1/models/%2500", 404),
    "line-end": ("/v1/models/%0d%0aSet-Cookie:%20x=y", 404),
    "script": ("/<script>alert(1)</script>", 404),
    "backslash": ("/\\..\\..", 404),
    "long": ("/" + "a" * 30_000, 404),
    "slashes": ("/" * 30_000, 404),
    "prefixes": ("/" + "v1/" * 9_000, 404),
    "deployments": ("/" + "openai/deployments/" * 1_500, 404),
    "long-model": ("/v1/models/" + "%61" * 10_000, 404),
    "dot": ("/.", 404),
    "env-file": ("/.env", 404),
    "python-file": ("/opendify.py", 404),
    "parameters": ("/health;jsessionid=1", 404),
    "fragment": ("/#health", 404),
    "fragment-behind": ("/health#x", 404),
}
METHODS: dict[str, int] = {
    "TRACE": 405,
    "PUT": 405,
    "DELETE": 405,
    "PATCH": 405,
    "PROPFIND": 405,
    "get": 405,
    "GETT": 405,
    "M-SEARCH": 405,
    "X" * 30_000: 405,
}

BIG = b"x" * 65_536
MIB = 2**20
# Over the limits, by what: what is refused is refused before it is held.
OVERSIZED: dict[str, Case] = {
    "first-line": Case([get("/" + "a" * 40_000)], (431,), True),
    "method-endless": Case([b"G" * 70_000], (431,), True),
    "field": Case([get("/health", "X: " + "y" * 40_000)], (431,), True),
    "field-name": Case([get("/health", "y" * 40_000 + ": X")], (431,), True),
    "fields-in-all": Case([get("/health", *["X: " + "y" * 900] * 40)], (431,), True),
    "fields-in-number": Case([get("/health", *["X: y"] * 300)], (431,), True),
    "cookies": Case([get("/health", "Cookie: " + "a=b; " * 9_000)], (431,), True),
    "head-endless": Case(
        [get()[:-2], *[b"X: " + b"y" * 999 + b"\r\n"] * 99], (431,), True
    ),
    "length": Case([post(b" " * (MIB + 1))], (413,)),
    "length-told": Case(
        [head("POST /v1/chat/completions HTTP/1.1", f"Content-Length: {10**17}")],
        (413,),
        True,
    ),
    "length-told-and-expected": Case(
        [
            head(
                "POST /v1/chat/completions HTTP/1.1",
                f"Content-Length: {10**12}",
                "Expect: 100-continue",
            )
        ],
        (413,),
        True,
    ),
    "chunks": Case([chunked(b""), *[b"10000\r\n" + BIG + b"\r\n"] * 17], (413,), True),
    "chunks-of-one-byte": Case([chunked(b"1\r\nx\r\n" * (MIB + 1))], (413,), True),
    "chunk-of-any-size": Case(
        [chunked(b"fffffffffffffff\r\n"), *[BIG] * 17], (413,), True
    ),
    "extension": Case([chunked(b"2;" + b"x" * 99_999)], (400,), True),
    "extension-in-pieces": Case([chunked(b"2;"), *[b"x" * 999] * 99], (400,), True),
    "size-endless": Case([chunked(b"0" * 99_999)], (400,), True),
    "trailers": Case(
        [chunked(b"0\r\n"), *[b"X: " + b"y" * 999 + b"\r\n"] * 99], (400,), True
    ),
    "trailer-endless": Case([chunked(b"0\r\nX: "), *[BIG] * 2], (400,), True),
}

# Slow ones: how long they may hold a connection.
ONE_FIELD: list[Act] = [b"X: y\r\n", 4.9]
SLOW: dict[str, Case] = {
    "nothing": Case([], (), True, IDLE_TIMEOUT_S),
    "nothing-more": Case([get(), 0.1], (200,), True, IDLE_TIMEOUT_S),
    "one-byte": Case([b"G"], (408,), True, HEAD_TIMEOUT_S),
    "first-line-only": Case([b"GET / HTTP/1.1\r\n"], (408,), True, HEAD_TIMEOUT_S),
    "no-blank-line": Case([get()[:-2]], (408,), True, HEAD_TIMEOUT_S),
    "blank-line-only": Case([b"\r\n"], (), True, IDLE_TIMEOUT_S),
    "head-byte-by-byte": Case(slowly(get()[:8], 4.5), (408,), True),
    "blank-lines": Case(slowly(b"\r\n" * 4, 4.5), (408,), True),
    "fields-one-by-one": Case([get()[:-2], *ONE_FIELD * 6], (408,), True),
    "second-head": Case([get(), 1.0, b"GET"], (200, 408), True, HEAD_TIMEOUT_S),
    "no-body": Case([post(b"{}")[:-2]], (408,), True, BODY_TIMEOUT_S),
    "half-a-body": Case([post(b"{}")[:-1]], (408,), True, BODY_TIMEOUT_S),
    "body-byte-by-byte": Case(
        [post(b"{ }")[:-3], *slowly(b"{ }", BODY_TIMEOUT_S - 1)], (400,)
    ),
    "no-chunk": Case([chunked(b"")], (408,), True, BODY_TIMEOUT_S),
    "half-a-size": Case([chunked(b"2")], (408,), True, BODY_TIMEOUT_S),
    "half-a-chunk": Case([chunked(b"2\r\n{")], (408,), True, BODY_TIMEOUT_S),
    "no-last-chunk": Case([chunked(b"2\r\n{}\r\n")], (408,), True, BODY_TIMEOUT_S),
    "no-end-of-trailers": Case(
        [chunked(b"2\r\n{}\r\n0\r\n")], (408,), True, BODY_TIMEOUT_S
    ),
    "extension-byte-by-byte": Case(
        [chunked(b"2;"), *slowly(b"x" * 8, 9)], (408,), True, 0
    ),
    "trailers-byte-by-byte": Case(
        [chunked(b"0\r\n"), *slowly(b"a: b\r\nc:", 9)], (408,), True, 0
    ),
    "size-byte-by-byte": Case([chunked(b""), *slowly(b"0" * 8, 9)], (408,), True),
    "expected-body-never-comes": Case(
        [post(b"{}", "Expect: 100-continue")[:-2]], (100, 408), True, BODY_TIMEOUT_S
    ),
    "refused-body-never-comes": Case(
        [head("POST /nowhere HTTP/1.1", "Content-Length: 9")], (404,), True
    ),
    "refused-body-byte-by-byte": Case(
        [head("POST /nowhere HTTP/1.1", "Content-Length: 9"), *slowly(b"x" * 2, 0.9)],
        (404,),
        True,
    ),
}

# Clients that go.
LEAVING: dict[str, Case] = {
    "at-once": Case(["end"], (), True),
    "in-head": Case([get()[:9], "end"], (), True),
    "after-blank-line": Case([b"\r\n", "end"], (), True),
    "in-body": Case([post(b"{}")[:-1], "end"], (), True),
    "in-chunk": Case([chunked(b"5\r\n{}"), "end"], (), True),
    "in-trailers": Case([chunked(b"0\r\na: b"), "end"], (), True),
    "half-closed": Case([get(), "end"], (200,), True),
    "half-closed-after-many": Case([get() * 3, "end"], (200, 200, 200), True),
    "half-closed-after-garbage": Case([b"\x00\r\n\r\n", "end"], (400,), True),
    "reset-at-once": Case(["reset"]),
    "reset-in-head": Case([get()[:9], 0.1, "reset"]),
    "reset-in-body": Case([post(b"{}")[:-1], 0.1, "reset"]),
    "reset-after-request": Case([get() * 50, "reset"]),
    "reset-after-garbage": Case([b"\x00\r\n\r\n", "reset"]),
    "close-asked-for": Case(
        [get("/health", "Connection: close") + SMUGGLED], (200,), True
    ),
    "close-among-others": Case(
        [get("/health", "Connection: x, CLOSE") + SMUGGLED], (200,), True
    ),
    "old-version": Case([head("GET /health HTTP/1.0") + SMUGGLED], (200,), True),
    "old-version-without-host": Case(
        [head("OPTIONS / HTTP/1.0", host=None) + SMUGGLED], (204,), True
    ),
    "old-version-of-a-page": Case(
        [head("GET / HTTP/1.0", "Origin: https://evil.example", host=None)],
        (403,),
        True,
    ),
    "old-version-kept-alive": Case(
        [head("GET /health HTTP/1.0", "Connection: keep-alive") + SMUGGLED],
        (200,),
        True,
    ),
}

# Behind a good request, or behind its body.
GARBAGE: dict[str, bytes] = {
    "text": b"hello\r\n\r\n",
    "lf": b"GET / HTTP/1.1\nHost: localhost\n\n",
    "nul": b"\x00" * 9 + b"\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "ssh": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "socks": b"\x05\x01\x00\r\n\r\n",
    "proxy-protocol": b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\r\n\r\n",
    "response": b"HTTP/1.1 200 OK\r\nHost: localhost\r\n\r\n",
    "redis": b"*1\r\n$4\r\nPING\r\n\r\n",
    "smtp": b"EHLO localhost\r\n\r\n",
    "bom": b"\xef\xbb\xbfGET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "utf-16": "GET / HTTP/1.1".encode("utf-16") + b"\r\n\r\n",
    "shellshock": b"() { :;}; echo\r\n\r\n",
    "json": b'{"model": "m"}\r\n\r\n',
}


def _garbage() -> dict[str, Case]:
    cases = {}
    for name, data in GARBAGE.items():
        cases[f"garbage-{name}"] = Case([data], (400,), True)
        cases[f"garbage-behind-{name}"] = Case([get() + data], (200, 400), True)
        cases[f"garbage-behind-body-{name}"] = Case(
            [post("{}") + data], (400, 400), True
        )
    return cases


# Bodies that are no chat request; where the body is complete, all goes on.
BODIES: dict[str, tuple[bytes, int]] = {
    "empty": (b"", 400),
    "space": (b" \n\t", 400),
    "null": (b"null", 400),
    "number": (b"1", 400),
    "string": (b'"m"', 400),
    "array": (b"[]", 400),
    "nan": (b"NaN", 400),
    "form": (b"model=m&messages=x", 400),
    "multipart": (b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n', 400),
    "xml": (b"<?xml version='1.0'?>", 400),
    "gzip": (b"\x1f\x8b\x08\x00", 400),
    "not-utf-8": (b'{"model": "\xff\xfe"}', 400),
    "cut": (b'{"model": "m", "messages": [', 400),
    "twice": (b"{}{}", 400),
    "comment": (b"{} // x", 400),
    "deep-arrays": (b'{"a":' + b"[" * 300_000, 400),
    "deep-arrays-whole": (b'{"a":' + b"[" * 99_999 + b"]" * 99_999 + b"}", 400),
    "deep-objects": (b'{"a":' * 99_999, 400),
    "no-model": (b'{"messages": [{"role": "user", "content": "x"}]}', 400),
    "model-number": (b'{"model": 1, "messages": []}', 400),
    "model-unknown": (
        b'{"model": "x", "messages": [{"role": "user", "content": "x"}]}',
        404,
    ),
    "model-surrogate": (
        b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}',
        404,
    ),
    "no-messages": (b'{"model": "m"}', 400),
    "messages-text": (b'{"model": "m", "messages": "x"}', 400),
    "message-number": (b'{"model": "m", "messages": [1]}', 400),
    "content-number": (b'{"model": "m", "messages": [{"content": 1}]}', 400),
    "file-no-base64": (
        b'{"model": "m", "messages": [{"content": [{"type": "image_url", "image_url":'
        b' {"url": "data:image/png;base64,###"}}]}]}',
        400,
    ),
    "file-path": (
        b'{"model": "m", "messages": [{"content": [{"type": "image_url", "image_url":'
        b' {"url": "file:///etc/passwd"}}]}]}',
        400,
    ),
    "url-malformed": (
        b'{"model": "m", "messages": [{"content": [{"type": "image_url", "image_url":'
        b' {"url": "http://["}}]}]}',
        400,
    ),
}

# Host of a request -> the status, on loopback without keys.
HOSTS: dict[str, int] = {
    "localhost": 200,
    "localhost:5000": 200,
    "LOCALHOST": 200,
    "app.localhost": 200,
    "127.0.0.1": 200,
    "127.0.0.1:80": 200,
    "127.8.9.10": 200,
    "[::1]": 200,
    "[::1]:5000": 200,
    "evil.example": 403,
    "evil.example:5000": 403,
    "localhost.evil.example": 403,
    "127.0.0.1.evil.example": 403,
    "127.0.0.1.nip.io": 403,
    "evillocalhost": 403,
    "0.0.0.0": 403,
    "127.1": 403,
    "2130706433": 403,
    "0x7f000001": 403,
    "192.168.0.1": 403,
    "169.254.169.254": 403,
    "[::]": 403,
    "[::ffff:127.0.0.1]": 403,
    "[fe80::1]": 403,
    "": 400,
    ":5000": 400,
}

# Origin of a page -> the status, with the default settings.
ORIGINS: dict[str, int] = {
    "http://localhost": 200,
    "http://localhost:3000": 200,
    "HTTP://LOCALHOST:3000": 200,
    "https://127.0.0.1:8443": 200,
    "http://[::1]:8": 200,
    "http://app.localhost": 200,
    "app://obsidian.md": 200,
    "tauri://localhost": 200,
    "lsp://logseq.io": 200,
    "capacitor://localhost": 200,
    "ionic://localhost": 200,
    "vscode-file://vscode-app": 200,
    "vscode-webview://1a2b": 200,
    "chrome-extension://abcdef": 200,
    "moz-extension://1234-5678": 200,
    "safari-web-extension://1A2B": 200,
    "file://": 200,
    "file://evil.example": 403,
    "https://evil.example": 403,
    "http://localhost.evil.example": 403,
    "http://evil.example:3000": 403,
    "http://localhost@evil.example": 403,
    "http://127.0.0.1.evil.example": 403,
    "http://evillocalhost": 403,
    "http://0.0.0.0:3000": 403,
    "ftp://localhost": 403,
    "app://": 403,
    "null": 403,
    "": 403,
    "localhost": 403,
    "*": 403,
    "http://localhost, http://evil.example": 403,
    "http://evil.example, http://a.localhost": 403,
    "http://evil.example/.localhost": 403,
    "javascript://localhost": 403,
    "data:text/html,x": 403,
}

# What is answered to a page with an error, so that it can read it.
PAGE_ERRORS: dict[str, Case] = {
    "400": Case([post("{}", f"Origin: {PAGE}")], (400,)),
    "401": Case(
        [get("/v1/models", f"Origin: {PAGE}")], (401,), settings={"VALID_API_KEYS": "k"}
    ),
    "404": Case([get("/nowhere", f"Origin: {PAGE}")], (404,)),
    "405": Case([get("/v1/chat/completions", f"Origin: {PAGE}")], (405,)),
    "408": Case([post("{}", f"Origin: {PAGE}")[:-1]], (408,), True, BODY_TIMEOUT_S),
    "413": Case([post(b" " * (MIB + 1), f"Origin: {PAGE}")], (413,)),
    "chunk": Case([chunked(b"zz\r\n", f"Origin: {PAGE}")], (400,), True),
    "502": Case(
        [
            post(
                '{"model": "m", "messages": [{"role": "user", "content": "x"}]}',
                f"Origin: {PAGE}",
            )
        ],
        (502,),
    ),
}

ALLOWED = "https://chat.example"
LISTED = {"ALLOWED_ORIGINS": f"{ALLOWED}/, https://other.example"}
ANY = {"ALLOWED_ORIGINS": "*"}
KEYED = {"VALID_API_KEYS": "key-one, key-two"}
SIMPLE = ("Content-Type: text/plain", "Origin: https://evil.example")

SAFETY: dict[str, Case] = {
    "simple-request": Case([post("{}", *SIMPLE)], (403,)),
    "simple-request-with-keys": Case([post("{}", *SIMPLE)], (403,), settings=KEYED),
    "preflight-foreign": Case(
        [
            head(
                "OPTIONS /v1/models HTTP/1.1",
                "Origin: https://evil.example",
                "Access-Control-Request-Method: POST",
            )
        ],
        (403,),
    ),
    "preflight-rebound": Case(
        [head("OPTIONS /v1/models HTTP/1.1", host="evil.example")], (403,)
    ),
    "rebound": Case([get("/v1/models", host="evil.example")], (403,)),
    "rebound-same-origin": Case(
        [get("/v1/models", "Origin: http://evil.example", host="evil.example")], (403,)
    ),
    "rebound-absolute": Case([head("GET http://evil.example/health HTTP/1.1")], (403,)),
    "host-with-keys": Case([get(host="evil.example")], (200,), settings=KEYED),
    "host-beyond-loopback": Case(
        [get(host="evil.example")], (200,), settings={"SERVER_HOST": "0.0.0.0"}
    ),
    "same-origin-beyond-loopback": Case(
        [get("/health", "Origin: http://box:5000", host="box:5000")],
        (200,),
        settings={"SERVER_HOST": "0.0.0.0"},
    ),
    "address-as-origin-beyond-loopback": Case(
        [get("/health", "Origin: http://10.0.0.5:5000", host="10.0.0.5:5000")],
        (200,),
        settings={"SERVER_HOST": "0.0.0.0"},
    ),
    "rebound-beyond-loopback": Case(
        [get("/v1/models", "Origin: http://evil.example", host="evil.example")],
        (403,),
        settings={"SERVER_HOST": "0.0.0.0"},
    ),
    "domain-as-origin-with-keys": Case(
        [get("/health", "Origin: http://ai.example", host="ai.example")],
        (200,),
        settings={"SERVER_HOST": "0.0.0.0", **KEYED},
    ),
    "other-port-beyond-loopback": Case(
        [get("/health", "Origin: http://box:5001", host="box:5000")],
        (403,),
        settings={"SERVER_HOST": "0.0.0.0"},
    ),
    "listed-origin": Case(
        [get("/health", f"Origin: {ALLOWED}")], (200,), settings=LISTED
    ),
    "listed-host": Case([get(host="chat.example:5000")], (200,), settings=LISTED),
    "unlisted-origin": Case(
        [get("/health", "Origin: https://chat.example.evil")], (403,), settings=LISTED
    ),
    "unlisted-scheme": Case(
        [get("/health", "Origin: http://chat.example")], (403,), settings=LISTED
    ),
    "unlisted-port": Case(
        [get("/health", f"Origin: {ALLOWED}:8443")], (403,), settings=LISTED
    ),
    "null-with-list": Case([get("/health", "Origin: null")], (403,), settings=LISTED),
    "any-origin": Case(
        [get("/health", "Origin: https://evil.example")], (200,), settings=ANY
    ),
    "any-null": Case([get("/health", "Origin: null")], (200,), settings=ANY),
    "any-host": Case([get(host="evil.example")], (200,), settings=ANY),
}

# How a key is presented -> the status.
KEYS: dict[str, tuple[list[str], int]] = {
    "bearer": (["Authorization: Bearer key-one"], 200),
    "bearer-second": (["Authorization: Bearer key-two"], 200),
    "bearer-lower": (["authorization: bearer key-one"], 200),
    "bearer-upper": (["AUTHORIZATION: BEARER key-one"], 200),
    "bearer-spaces": (["Authorization:   Bearer    key-one  "], 200),
    "api-key": (["api-key: key-one"], 200),
    "api-key-upper": (["Api-Key: key-one"], 200),
    "x-api-key": (["x-api-key: key-two"], 200),
    "x-api-key-spaces": (["X-API-KEY:  key-two "], 200),
    "empty-bearer-and-api-key": (["Authorization: Bearer", "api-key: key-one"], 200),
    "basic-and-api-key": (["Authorization: Basic eDp5", "api-key: key-one"], 200),
    "none": ([], 401),
    "empty": (["Authorization: "], 401),
    "bearer-alone": (["Authorization: Bearer"], 401),
    "bare": (["Authorization: key-one"], 401),
    "basic": (["Authorization: Basic a2V5LW9uZQ=="], 401),
    "token": (["Authorization: Token key-one"], 401),
    "undefined": (["Authorization: Bearer undefined"], 401),
    "placeholder": (["Authorization: Bearer sk-no-key-required"], 401),
    "prefix": (["Authorization: Bearer key-on"], 401),
    "longer": (["Authorization: Bearer key-one1"], 401),
    "upper": (["Authorization: Bearer KEY-ONE"], 401),
    "both-keys": (["Authorization: Bearer key-one, key-two"], 401),
    "inner-space": (["Authorization: Bearer key-one key-one"], 401),
    "quoted": (['Authorization: Bearer "key-one"'], 401),
    "latin-1": (["Authorization: Bearer key-on\xe9"], 401),
    "long": (["Authorization: Bearer " + "k" * 20_000], 401),
    "twice": (["Authorization: Bearer key-one", "Authorization: Bearer key-one"], 401),
    "api-key-twice": (["api-key: key-one", "api-key: key-one"], 401),
    "wrong-bearer-right-api-key": (
        ["Authorization: Bearer no", "api-key: key-one"],
        401,
    ),
    "cookie": (["Cookie: api-key=key-one"], 401),
    "proxy": (["Proxy-Authorization: Bearer key-one"], 401),
    "underscore": (["api_key: key-one"], 401),
}


def _all_cases() -> dict[str, Case]:
    cases = {**_heads(), **_smuggling(), **_garbage()}
    tables = {
        "harmless": HARMLESS,
        "oversized": OVERSIZED,
        "slow": SLOW,
        "leaving": LEAVING,
        "page-reads": PAGE_ERRORS,
        "safety": SAFETY,
    }
    for prefix, table in tables.items():
        cases.update({f"{prefix}-{name}": case for name, case in table.items()})
    for name, (path, status) in PATHS.items():
        cases[f"path-{name}"] = Case([get(path)], (status,))
    for method, status in METHODS.items():
        line = head(f"{method} /health HTTP/1.1")
        cases[f"method-{method[:9]}"] = Case([line], (status,))
    for name, (body, status) in BODIES.items():
        cases[f"body-{name}"] = Case([post(body)], (status,))
    for host, status in HOSTS.items():
        cases[f"host-{host}"] = Case([get(host=host)], (status,))
    for origin, status in ORIGINS.items():
        cases[f"origin-{origin}"] = Case(
            [get("/health", f"Origin: {origin}")], (status,)
        )
    for name, (fields, status) in KEYS.items():
        asked = [get("/v1/models", *fields)]
        cases[f"key-{name}"] = Case(asked, (status,), settings=KEYED)
    return cases


CASES = _all_cases()


def test_there_are_as_many_cases_as_promised() -> None:
    assert len(CASES) >= 300


@pytest.mark.parametrize("name", CASES)
async def test_hostile_request(name: str) -> None:
    case = CASES[name]
    async with hosting(**case.settings) as host:
        answers = await host.run(case)
        await host.still_serves() if not case.settings else None
    for answer in answers:
        origin = answer.headers.get("access-control-allow-origin")
        if name.startswith("origin-"):
            asked = name[len("origin-") :]
            assert origin == (asked if answer.status == 200 else None)
        if name.startswith("page-reads-"):
            assert origin == PAGE
            assert "x-request-id" in answer.headers["access-control-expose-headers"]
            assert answer.headers["vary"] == "Origin"
        if answer.status == 401:
            assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("name", ["box.example", "[fd00::5]"])
async def test_refused_host_is_told_what_lets_it_in(name: str) -> None:
    asked = get("/health", "Connection: close", host=f"{name}:5000")
    async with hosting() as host:
        (refused,) = parse_answers(await talk(host, asked))
    told = re.search(r"add (\S+) to ALLOWED_ORIGINS", refused.body.decode())
    assert (refused.status, told and told[1]) == (403, f"http://{name}")
    async with hosting(ALLOWED_ORIGINS=f"http://{name}") as host:
        (let_in,) = parse_answers(await talk(host, asked))
    assert let_in.status == 200


async def test_all_of_them_leave_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole table again and again: no descriptor, no memory more."""
    monkeypatch.setattr(logging.getLogger("opendify"), "disabled", True)  # it is kept
    sizes = []
    async with FakeDify() as dify, hosting(dify.base) as host:
        dify.app(KEY, script=chat_answer("Hello"))
        for _ in range(3):
            for name, case in CASES.items():
                if not case.settings and not name.startswith(("slow", "oversized")):
                    await play(host, case.acts)
            assert b" 200 OK" in await talk(host, get("/health", "Connection: close"))
            await asyncio.sleep(200)  # lets every timer and idle connection end
            gc.collect()
            sizes.append((descriptors(), sys.getallocatedblocks()))
        (_, _), (fds, blocks), (fds_after, blocks_after) = sizes
        assert fds_after <= fds
        assert blocks_after - blocks < 1000, "memory grows"
        body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
        answer = await talk(host, post(json.dumps(body), "Connection: close"))
        assert b'"content":"Hello"' in answer


async def play(host: Host, acts: Sequence[Act]) -> None:
    """Do what a client does, without looking at what it gets."""
    _, writer = await host.connect()
    with contextlib.suppress(OSError):
        for act in acts:
            if isinstance(act, (bytes, str)):
                await _act(writer, act)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def talk(host: Host, data: bytes) -> bytes:
    reader, writer = await host.connect()
    writer.write(data)
    answer = await read_to_the_end(reader)
    writer.close()
    await writer.wait_closed()
    return answer


def descriptors() -> int:
    """How many descriptors are open, where the system tells."""
    with contextlib.suppress(OSError):
        return len(os.listdir("/dev/fd"))
    return 0


# ------------------------------------------------------------------------------
# What one client can do to the others
# ------------------------------------------------------------------------------


async def test_unknown_models_leave_nothing_behind() -> None:
    async with hosting() as host:
        row = '"messages": [{"role": "user", "content": "x"}]'
        many = b"".join(post(f'{{"model": "spam-{n}", {row}}}') for n in range(50))
        long = post(f'{{"model": "spam-{"x" * 99_999}", {row}}}', "Connection: close")
        answers = list(parse_answers(await talk(host, many + long)))
        assert [answer.status for answer in answers] == [404] * 51
        assert len(answers[-1].body) < 2000, "it is echoed whole"
        shown = await talk(host, get("/metrics", "Connection: close"))
        assert b"opendify_requests_total" in shown
        assert b"spam" not in shown


@pytest.mark.parametrize("path", ["/v1/audio/speech", "/v1/audio/transcriptions"])
async def test_key_in_the_place_of_a_model_is_nowhere_shown(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    audio = {"data": "AAAA", "format": "wav"}
    body = {"model": "app-pastedkey", "input": "x", "voice": "v", "input_audio": audio}
    kind = "Content-Type: application/json"
    async with hosting() as host:
        asked = post(json.dumps(body), kind, "Connection: close", path=path)
        (answer,) = parse_answers(await talk(host, asked))
        shown = await talk(host, get("/metrics", "Connection: close"))
    assert json.loads(answer.body)["error"]["code"] == "model_not_found"
    assert "pasted" not in caplog.text
    assert b"pasted" not in shown


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("/" + "a/" * 16_000 + "b", id="repeated-segment"),
        pytest.param("/" + "aa/a/" * 6_500 + "b", id="repeated-pair"),
        pytest.param("/" + "v1/" * 10_900 + "b", id="prefixes"),
        pytest.param("/" + "deployments/" * 2_700 + "x", id="deployments"),
        pytest.param("/" + "engines/a/completions/" * 1_450, id="engines"),
        pytest.param("/" * 32_000, id="slashes"),
    ],
)
def test_no_path_takes_long(path: str) -> None:
    """Anyone may ask for any path: it must not stop all other streams."""
    with at_most(8):
        find_endpoint(path)


@pytest.mark.parametrize("line", ["GET /v1/models", "GET /v1/none", "OPTIONS /v1"])
async def test_client_that_reads_nothing_is_cut_off(line: str) -> None:
    """It asks for more than it reads: first nothing more is read, then it is closed."""
    async with hosting() as host:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", host.port))
        request = head(f"{line} HTTP/1.1", f"X-Padding: {'x' * 400}")
        data, sent, began = b"", 0, now()
        with contextlib.suppress(OSError):
            while now() - began < 2 * WRITE_TIMEOUT_S and sent < 32 << 20:
                data = data or request * 500
                try:
                    size = sock.send(data)
                    data, sent = data[size:], sent + size
                except BlockingIOError:
                    await asyncio.sleep(1)
        assert sent < 32 << 20
        assert now() - began <= WRITE_TIMEOUT_S + 5
        sock.close()
        await quiet()
        await host.still_serves()


async def test_client_that_reads_slowly_gets_all() -> None:
    """The kernel would hold megabytes for it, and take more after minutes only."""

    class Sender(Listener):
        async def serve(self, wire: Wire) -> None:
            wire.write(bytes(8_000_000))
            await wire.drain()
            wire.close()

    listener = Sender()
    (address,) = await listener.listen("127.0.0.1", 0)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, address)
    got = 0
    while got < 8_000_000:
        await asyncio.sleep(1)
        got += len(sock.recv(20_000))
    assert now() > 5 * WRITE_TIMEOUT_S
    sock.close()
    assert await listener.stop(1)


async def test_address_that_guesses_keys_has_to_wait() -> None:
    """On loopback nobody guesses; so the address is given here."""
    async with hosting(**KEYED) as host:
        site = host.site

        def ask(key: str, peer: str = "203.0.113.7") -> int:
            fields = {"authorization": f"Bearer {key}"} if key else {}
            request = Request("GET", "/v1/models", "", fields)
            exchange = Exchange(Reply(Wire(), request), "id", peer)
            try:
                authorized_handler(site, exchange)
            except (Unauthorized, KeysGuessed) as error:
                if error.status == 429:
                    assert error.headers == [("Retry-After", "60")]
                return error.status
            return 200

        assert [ask("wrong") for _ in range(MAX_KEY_FAILURES)] == [401] * 20
        assert ask("wrong") == 429
        assert ask("key-one") == 429, "else the 21st guess would tell"
        assert ask("key-one", "203.0.113.8") == 200
        assert [ask("wrong", "203.0.113.8") for _ in range(20)] == [401] * 20
        assert ask("wrong", "203.0.113.8") == 429
        assert ask("key-one", "203.0.113.8") == 200, "it came from there before"
        assert ask("key-two", "203.0.113.8") == 429
        assert [ask("wrong", "127.0.0.1") for _ in range(30)] == [401] * 30
        assert [ask("wrong", "::1") for _ in range(30)] == [401] * 30
        await asyncio.sleep(KEY_FAILURES_S + 1)
        assert ask("key-one") == 200


async def test_guesses_count_for_the_address_of_their_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peers: list[str] = []

    def check_key(_: object, key: str, peer: str) -> str:
        peers.append(peer)
        return key

    monkeypatch.setattr(Site, "check_key", check_key)
    async with hosting(**KEYED) as host:
        await host.run(Case([get("/v1/models")], (200,)))
    assert peers == ["127.0.0.1"]


async def test_addresses_are_told_apart_and_not_kept_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("opendify.MAX_ADDRESSES", 4)
    async with hosting(**KEYED) as host:
        site = host.site
        peers = [f"203.0.113.{number}" for number in range(100)]

        def ask(peer: str) -> None:
            site.check_key("key-one", peer)
            with pytest.raises(Unauthorized):
                site.check_key("wrong", peer)

        for peer in peers[:4] * MAX_KEY_FAILURES:
            ask(peer)
        for peer in peers[:4]:
            site.check_key("key-one", peer)
            with pytest.raises(KeysGuessed):
                site.check_key("wrong", peer)
        for peer in peers[4:]:
            ask(peer)
        assert max(len(site._key_failures), len(site._right_keys)) <= 5


async def test_key_that_is_withdrawn_fails_without_being_counted_for_ever() -> None:
    async with hosting(**KEYED) as host:
        site = host.site
        site.check_key("key-one", "203.0.113.7")
        site.dify.use(replace(site.dify.settings, valid_api_keys=("key-two",)))
        for _ in range(3 * MAX_KEY_FAILURES):  # it came from there: never a 429
            with pytest.raises(Unauthorized):
                site.check_key("key-one", "203.0.113.7")
        assert len(site._key_failures["203.0.113.7"]) == MAX_KEY_FAILURES
        with pytest.raises(KeysGuessed):
            site.check_key("wrong", "203.0.113.7")


async def test_wrong_keys_from_loopback_are_never_too_many() -> None:
    async with hosting(**KEYED) as host:
        wrong = get("/v1/models", "Authorization: Bearer no")
        right = get("/v1/models", "Authorization: Bearer key-one")
        await host.run(Case([wrong * 21 + right], (401,) * 21 + (200,), within_s=2))


async def test_refusal_of_a_page_runs_nothing() -> None:
    async with FakeDify() as dify, hosting(dify.base) as host:
        dify.app(KEY, script=chat_answer("Hello"))
        body = '{"model": "m", "messages": [{"role": "user", "content": "x"}]}'
        for fields in (SIMPLE, (*SIMPLE[:1], "Origin: null")):
            await host.run(Case([post(body, *fields)], (403,)))
        rebound = post(body).replace(b"localhost", b"evil.example")
        await host.run(Case([rebound], (403,)))
        assert dify.requests == []
