"""The fault matrix: all that can go wrong behind the proxy, at every point, as clients
see it, streamed and not; and the ways to Dify: circuit, proxies, TLS, several bases.

Behind a real server stands an upstream that is scripted in bytes. Whatever happens
there, a client gets a whole answer, or an error that says so: never a hang, never an
empty 200, never a finish that did not happen.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import json
import re
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Callable, NamedTuple, Union

import pytest
from clock import now
from fake_dify import FakeDify, chat_answer
from schemas import FINISH_REASONS
from sites import listening
from test_upstream import (
    END,
    HEAD,
    KEY,
    TLS,
    chunk,
    event,
    quiet_loop,
    raw_server,
    read_request,
    tls_context,
)

import opendify
from opendify import CIRCUIT_S, Origin, Wire, open_wire, parse_settings, proxy_for

FIRST_EVENT_S, IDLE_S, CONNECT_S = 20, 40, 10
LIMITS = {
    "DIFY_FIRST_EVENT_TIMEOUT": str(FIRST_EVENT_S),
    "DIFY_IDLE_TIMEOUT": str(IDLE_S),
    "DIFY_CONNECT_TIMEOUT": str(CONNECT_S),
    "STREAM_SMOOTHING": "off",
}
Act = Union[bytes, str]  # bytes to send; "close", "reset", "half-close", "stall"
Connect = Callable[..., Any]
NO_VARIABLES: Mapping[str, str] = {}


# ------------------------------------------------------------------------------
# An upstream in bytes, and a client that reads all there is
# ------------------------------------------------------------------------------


@dataclass
class Upstream:
    """What answers a turn; other calls are refused, as by an app that knows nothing."""

    acts: Sequence[Act] = ()
    asked: list[bytes] = field(default_factory=list)
    repeated: bytes = b""  # sent again and again, once all acts are done

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while True:
            request = await read_request(reader)
            self.asked.append(request.partition(b"\r\n")[0])
            if b"/chat-messages HTTP" in self.asked[-1]:
                await self._answer(reader, writer)
            else:
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}")

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        for act in self.acts:
            if isinstance(act, bytes):
                writer.write(act)
                await writer.drain()
                await asyncio.sleep(0.01 if len(act) > 1 else 0)
            else:
                await _end(act, reader, writer)
        while self.repeated:
            writer.write(self.repeated)
            await writer.drain()
            await asyncio.sleep(5)


async def _end(
    act: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    if act == "reset":
        linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()
        raise ConnectionResetError
    if act == "close":
        raise ConnectionAbortedError
    if act == "half-close":
        writer.write_eof()
    await reader.read()  # till the proxy gives up
    raise ConnectionAbortedError


class Outcome(NamedTuple):
    """What a client has in the end.

    `end` is "finish", or the code of the error. `status` is that of the response.
    """

    status: int
    text: str
    end: str


class Asked(NamedTuple):
    """An outcome, and the words of its error."""

    outcome: Outcome
    message: str = ""
    took_s: float = 0.0


class Front:
    """A running proxy."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def ask(
        self, *, stream: bool, model: str = "m", content: Any = "Hi", user: str = "u"
    ) -> Asked:
        """One chat request, read to its very end."""
        messages = [{"role": "user", "content": content}]
        value = {"model": model, "messages": messages, "stream": stream, "user": user}
        body = json.dumps(value).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        began = now()
        lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost"]
        lines += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
        writer.write("\r\n".join(lines).encode() + body)
        data = await asyncio.wait_for(reader.read(-1), 1000)
        took_s = now() - began
        writer.close()
        await writer.wait_closed()
        outcome, message = understand(data, stream=stream)
        return Asked(outcome, message, took_s)


def understand(data: bytes, *, stream: bool) -> tuple[Outcome, str]:
    """(outcome, message of the error) of a whole response."""
    top, _, body = data.partition(b"\r\n\r\n")
    status = int(top.split()[1])
    if status != 200 or not stream:
        assert b"content-length: %d\r\n" % len(body) in top.lower() + b"\r\n"
        return _understand_whole(status, json.loads(body))
    return _understand_stream(_unchunked(body))


def _understand_whole(status: int, value: dict[str, Any]) -> tuple[Outcome, str]:
    if status != 200:
        error = value["error"]
        assert (error["type"] == "server_error") == (status >= 500)
        return Outcome(status, "", str(error["code"])), error["message"]
    (choice,) = value["choices"]
    assert choice["finish_reason"] in FINISH_REASONS
    return Outcome(200, choice["message"]["content"], "finish"), ""


def _understand_stream(body: bytes) -> tuple[Outcome, str]:
    """The stream ends with [DONE]; before it with a finish or an error, never both."""
    rows = re.findall(rb"^data: (.*)$", body, re.MULTILINE)
    assert rows[-1] == b"[DONE]"
    text, ends, message = "", list[str](), ""
    for row in map(json.loads, rows[:-1]):
        if "error" in row:
            ends.append(str(row["error"]["code"]))
            message = row["error"]["message"]
            continue
        (choice,) = row["choices"]
        assert not ends, "something after the end"
        text += choice["delta"].get("content") or ""
        ends += ["finish"] * (choice["finish_reason"] is not None)
    (end,) = ends
    return Outcome(200, text, end), message


def _unchunked(data: bytes) -> bytes:
    body = b""
    while True:
        size, _, data = data.partition(b"\r\n")
        if not int(size, 16):
            assert data == b"\r\n", "no end of the body, or more than it"
            return body
        body, data = body + data[: int(size, 16)], data[int(size, 16) + 2 :]


@contextlib.asynccontextmanager
async def proxying(
    base: str,
    connect: Connect = open_wire,
    models: dict[str, Any] | None = None,
    variables: Mapping[str, str] = NO_VARIABLES,
) -> AsyncIterator[Front]:
    """The proxy in front of a base."""
    models = models or {"m": {"key": KEY, "mode": "chat"}}
    values = {"MODEL_CONFIG": json.dumps(models), "DIFY_API_BASE": base}
    settings = parse_settings({**values, **LIMITS, **variables})
    async with listening(settings, connect) as (_, _, port):
        try:
            yield Front(port)
        finally:
            await asyncio.sleep(0.01)


# ------------------------------------------------------------------------------
# The matrix
# ------------------------------------------------------------------------------

HEL, LO = event("message", answer="Hel"), event("message", answer="lo")
EMPTY = event("message", answer="")
ALL = HEL + LO + EMPTY + END

# How far the answer has come when the fault happens.
POINTS: dict[str, bytes] = {
    "before-head": b"",
    "in-head": HEAD[:30],
    "before-first-event": HEAD,
    "in-first-event": HEAD + chunk(HEL)[:25],
    "after-first-event": HEAD + chunk(HEL),
    "in-middle": HEAD + chunk(HEL) + chunk(LO)[:-9],
    "before-end": HEAD + chunk(HEL) + chunk(LO) + chunk(EMPTY),
    "in-end": HEAD + chunk(HEL) + chunk(LO) + chunk(EMPTY) + chunk(END)[:-9],
    "after-end": HEAD + chunk(HEL) + chunk(LO) + chunk(EMPTY) + chunk(END),
}
TEXTS = dict(zip(POINTS, ["", "", "", "", "Hel", "Hel", "Hello", "Hello", "Hello"]))

BROKEN, SLOW, FINE = "upstream_error", "upstream_timeout", "finish"
STATUS = {BROKEN: 502, SLOW: 504, FINE: 200, "completion_request_error": 502}
#                    head            first           later          after the end
ENDS_BROKEN = dict(zip(POINTS, [*[BROKEN] * 8, FINE]))
ENDS_SLOW = dict(zip(POINTS, [*[SLOW] * 8, FINE]))
ONLY_BETWEEN_EVENTS = ["before-first-event", "after-first-event", "before-end"]


@dataclass(frozen=True)
class Fault:
    """What goes wrong, at which points, and how a turn ends then."""

    acts: Sequence[Act]
    ends: dict[str, str]  # by point
    points: Sequence[str] = tuple(POINTS)
    repeated: bytes = b""


LAST = b"0\r\n\r\n"
PING = chunk(b"event: ping\n\n")
ERROR = event("error", code="completion_request_error", status=400, message="No.")
FAULTS: dict[str, Fault] = {
    "closed": Fault(["close"], ENDS_BROKEN),
    "reset": Fault(["reset"], ENDS_BROKEN),
    "half-closed": Fault(["half-close"], ENDS_BROKEN),
    "stalled": Fault(["stall"], ENDS_SLOW),
    "garbage": Fault([b"\x00\xff\r\n\r\n garbage", "close"], ENDS_BROKEN),
    "garbage-then-silence": Fault(
        [b"\x00\xff\r\n\r\n" * 9, "stall"],
        # between two chunks it is no size; within one it is data of it
        {**ENDS_BROKEN, "in-first-event": BROKEN, "in-middle": BROKEN},
    ),
    "another-response": Fault(
        [b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", "close"], ENDS_BROKEN
    ),
    "last-chunk": Fault([LAST], ENDS_BROKEN, ONLY_BETWEEN_EVENTS),
    "last-chunk-with-trailers": Fault(
        [b"0\r\nX-Checksum: 1\r\n\r\n"], ENDS_BROKEN, ONLY_BETWEEN_EVENTS
    ),
    "trailers-without-end": Fault(
        [b"0\r\n" + b"X: y\r\n" * 9999, "stall"], ENDS_BROKEN, ONLY_BETWEEN_EVENTS
    ),
    "bad-chunk-size": Fault([b"zz\r\n", "stall"], ENDS_BROKEN, ONLY_BETWEEN_EVENTS),
    "huge-chunk-size": Fault(
        [b"f" * 16 + b"\r\n", "stall"], ENDS_BROKEN, ONLY_BETWEEN_EVENTS
    ),
    "endless-extension": Fault(
        [b"2;" + b"x" * 99_999, "stall"], ENDS_BROKEN, ONLY_BETWEEN_EVENTS
    ),
    "only-pings": Fault([], ENDS_SLOW, ONLY_BETWEEN_EVENTS, PING),
    "only-comments": Fault([], ENDS_SLOW, ONLY_BETWEEN_EVENTS, chunk(b": hm\n\n")),
    "only-half-lines": Fault([], ENDS_SLOW, ONLY_BETWEEN_EVENTS, chunk(b"data: x")),
    "error-event": Fault(
        [chunk(ERROR), LAST],
        dict.fromkeys(POINTS, "completion_request_error"),
        ONLY_BETWEEN_EVENTS,
    ),
    "error-event-then-silence": Fault(
        [chunk(ERROR), "stall"],
        dict.fromkeys(POINTS, "completion_request_error"),
        ONLY_BETWEEN_EVENTS,
    ),
    "error-event-then-reset": Fault(
        [chunk(ERROR), "reset"],
        dict.fromkeys(POINTS, "completion_request_error"),
        ONLY_BETWEEN_EVENTS,
    ),
    "error-event-without-fields": Fault(
        [chunk(b'data: {"event": "error"}\n\n'), LAST], ENDS_BROKEN, ONLY_BETWEEN_EVENTS
    ),
    "event-that-is-no-json": Fault(
        [chunk(b"data: {nonsense\n\n"), "stall"], ENDS_BROKEN, ONLY_BETWEEN_EVENTS
    ),
    "event-that-is-no-object": Fault(
        [chunk(b"data: [1]\n\n"), LAST], ENDS_BROKEN, ONLY_BETWEEN_EVENTS
    ),
}


def _cells() -> list[Any]:
    cells = []
    for name, fault in FAULTS.items():
        for point in fault.points:
            code, text = fault.ends[point], TEXTS[point]
            cells.append(pytest.param(fault, point, text, code, id=f"{name}-{point}"))
    return cells


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize(("fault", "point", "text", "code"), _cells())
async def test_fault_at_a_point(
    fault: Fault, point: str, text: str, code: str, stream: bool
) -> None:
    before = [POINTS[point]] if POINTS[point] else []
    upstream = Upstream([*before, *fault.acts], repeated=fault.repeated)
    async with raw_server(upstream.serve) as base, proxying(base) as front:
        asked = await front.ask(stream=stream)
    # What waits for Dify for more than 5 s begins to stream without it.
    has_begun = stream and (bool(text) or asked.took_s > 5)
    if code == FINE:
        assert asked.outcome == Outcome(200, text, FINE)
    elif has_begun:
        assert asked.outcome == Outcome(200, text, code)
    else:
        assert asked.outcome == Outcome(STATUS[code], "", code)
    assert bool(asked.message) == (code != FINE)
    assert asked.took_s <= FIRST_EVENT_S + IDLE_S + 2
    assert KEY not in asked.message
    turns = [line for line in upstream.asked if b"/chat-messages " in line]
    assert len(turns) == 1, "a turn is never repeated"


def with_length(length: int, body: bytes) -> bytes:
    line = b"Content-Length: %d" % length
    return HEAD.replace(b"Transfer-Encoding: chunked", line) + body


def with_fields(fields: bytes, body: bytes = ALL) -> bytes:
    return HEAD[:-2] + fields + b"\r\n" + chunk(body) + LAST


def status(line: bytes, fields: bytes = b"", body: bytes = b"{}") -> bytes:
    length = b"Content-Length: %d\r\n" % len(body)
    return b"HTTP/1.1 " + line + b"\r\n" + fields + length + b"\r\n" + body


def moved(line: bytes, to: bytes) -> bytes:
    return status(line, b"Location: " + to + b"\r\n")


WHOLE = HEAD + chunk(ALL) + LAST
REFUSED = Outcome(502, "", BROKEN)
TIMED_OUT = Outcome(504, "", SLOW)
HELLO = Outcome(200, "Hello", FINE)


class Row(NamedTuple):
    """What Dify sends, how both kinds of turns end, words of the message."""

    acts: Sequence[Act]
    streamed: Outcome = REFUSED
    whole: Outcome = REFUSED
    words: str = ""


ANSWERS: dict[str, Row] = {
    "in-one-piece": Row([WHOLE], HELLO, HELLO),
    "byte-by-byte": Row([WHOLE[at : at + 1] for at in range(len(WHOLE))], HELLO, HELLO),
    "interim-responses": Row(
        [
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nA: b\r\n\r\n"
            + WHOLE
        ],
        HELLO,
        HELLO,
    ),
    "trailers": Row(
        [HEAD + chunk(ALL) + b"0\r\nX-Sum: 1\r\nSet-Cookie: a=b\r\n\r\n"], HELLO, HELLO
    ),
    "length-right": Row([with_length(len(ALL), ALL)], HELLO, HELLO),
    # Its end was seen.
    "length-too-long": Row([with_length(len(ALL) + 9, ALL), "close"], HELLO, HELLO),
    "length-too-long-midway": Row(
        [with_length(9999, HEL), "close"], Outcome(200, "Hel", BROKEN)
    ),
    "length-too-short": Row([with_length(len(HEL), ALL)], Outcome(200, "Hel", BROKEN)),
    "length-zero": Row([with_length(0, ALL)]),
    "length-negative": Row([with_length(-1, ALL)], words="proper HTTP"),
    "length-twice": Row(
        [with_fields(b"Content-Length: 9\r\nContent-Length: 8\r\n")],
        words="proper HTTP",
    ),
    "two-framings": Row([with_fields(b"Content-Length: 9\r\n")], words="proper HTTP"),
    "gzip": Row(
        [with_fields(b"Content-Encoding: gzip\r\n", gzip.compress(ALL))],
        words="compresses",
    ),
    "gzip-coding": Row(
        [HEAD.replace(b"chunked", b"gzip, chunked") + chunk(gzip.compress(ALL)) + LAST],
        words="proper HTTP",
    ),
    "moved": Row(
        [moved(b"301 Moved Permanently", b"https://evil.example/v1/chat-messages")],
        words="DIFY_API_BASE",
    ),
    "moved-temporarily-elsewhere": Row(
        [moved(b"307 Temporary Redirect", b"https://evil.example/v1/chat-messages")],
        words="DIFY_API_BASE",
    ),
    "moved-to-another-scheme": Row(
        [moved(b"308 Permanent Redirect", b"ftp://127.0.0.1/v1/chat-messages")],
        words="DIFY_API_BASE",
    ),
    "moved-to-nothing-readable": Row(
        [moved(b"307 Temporary Redirect", b"http://[")], words="DIFY_API_BASE"
    ),
    "moved-to-no-port": Row(
        [moved(b"307 Temporary Redirect", b"http://127.0.0.1:99999/v1")],
        words="DIFY_API_BASE",
    ),
    "html-of-the-web-ui": Row(
        [status(b"200 OK", b"Content-Type: text/html\r\n", b"<html>" * 9999)],
        words="DIFY_API_BASE",
    ),
    "html-of-a-gateway": Row(
        [status(b"502 Bad Gateway", b"", b"<html>nginx")], words="gateway"
    ),
    "gateway-timeout": Row(
        [status(b"504 Gateway Time-out", b"", b"<html>nginx")],
        TIMED_OUT,
        TIMED_OUT,
        words="gateway",
    ),
    "wrong-app-key": Row(
        [status(b"401 Unauthorized", b"", b'{"code":"unauthorized","message":"x"}')],
        words="MODEL_CONFIG",
    ),
    "not-modified": Row([b"HTTP/1.1 304 Not Modified\r\n\r\n"]),
    "no-content": Row([b"HTTP/1.1 204 No Content\r\n\r\n"]),
    "json-that-is-no-stream": Row([status(b"200 OK")]),
    "error-page-without-end": Row(
        [b"HTTP/1.1 500 Oops\r\nContent-Length: 9999999\r\n\r\n" + b"x" * 300_000]
    ),
    "endless-head": Row([b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 9999]),
    "endless-first-line": Row([b"HTTP/1.1 200 " + b"O" * 99_999]),
    "endless-interim": Row([b"HTTP/1.1 100 Continue\r\n\r\n" * 99]),
    "switching-protocols": Row(
        [b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"]
    ),
    "http-2": Row([b"\x00\x00\x12\x04\x00\x00\x00\x00\x00", "close"]),
    "tls-alert": Row([b"\x15\x03\x01\x00\x02\x02\x46", "close"]),
    "ids-with-surrogates": Row(
        [
            HEAD
            + chunk(
                ALL.replace(b'"conversation_id": "c"', b'"conversation_id": "\\ud800"')
            )
            + LAST
        ],
        HELLO,
        HELLO,
    ),
    "ids-that-break-lines": Row(
        [
            HEAD
            + chunk(
                ALL.replace(b'"conversation_id": "c"', b'"conversation_id": "\\r\\nA:"')
            )
            + LAST
        ],
        HELLO,
        HELLO,
    ),
}


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("name", ANSWERS)
async def test_answer_of_dify(name: str, stream: bool) -> None:
    acts, streamed, whole, words = ANSWERS[name]
    upstream = Upstream(acts)
    async with raw_server(upstream.serve) as base, proxying(base) as front:
        asked = await front.ask(stream=stream)
        assert asked.outcome == (streamed if stream else whole)
        assert words in asked.message
        assert KEY not in asked.message
        assert asked.took_s < 5
        upstream.acts = [WHOLE]  # the next turn is not disturbed
        again = await front.ask(stream=stream)
        assert again.outcome == Outcome(200, "Hello", FINE)


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_line_without_end(stream: bool) -> None:
    more: list[Act] = [chunk(b"x" * 4_000_000)]
    acts: list[Act] = [HEAD + chunk(HEL) + chunk(b"data: "), *more * 9]
    async with raw_server(Upstream(acts).serve) as base, proxying(base) as front:
        asked = await front.ask(stream=stream)
    assert asked.outcome == (Outcome(200, "Hel", BROKEN) if stream else REFUSED)


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_odd_user_when_the_stream_breaks(stream: bool) -> None:
    acts: list[Act] = [HEAD + chunk(HEL), "close"]
    async with raw_server(Upstream(acts).serve) as base, proxying(base) as front:
        asked = await front.ask(stream=stream, user="\ud800\r\n/..")
    assert asked.outcome == (Outcome(200, "Hel", BROKEN) if stream else REFUSED)


# ------------------------------------------------------------------------------
# Before there is a connection
# ------------------------------------------------------------------------------


def raising(error: BaseException) -> Connect:
    async def connect(*_: Any, **__: Any) -> Any:
        await asyncio.sleep(0.01)
        raise error

    return connect


async def never(*_: Any, **__: Any) -> Any:
    await asyncio.sleep(1e9)


NO_CONNECTION: dict[str, tuple[Connect, Outcome, str]] = {
    "unknown-host": (
        raising(socket.gaierror(socket.EAI_NONAME, "Name or service not known")),
        REFUSED,
        "'127.0.0.1' can't be resolved; check DIFY_API_BASE (or the model's `base`)",
    ),
    "refused": (
        raising(ConnectionRefusedError(111, "refused")),
        REFUSED,
        "127.0.0.1:9",
    ),
    "unreachable": (raising(OSError(113, "No route to host")), REFUSED, "No route"),
    "reset": (raising(ConnectionResetError(104, "reset")), REFUSED, "127.0.0.1:9"),
    "lost-in-tls": (raising(ConnectionResetError()), REFUSED, "9 (it was closed)"),
    "no-descriptors": (
        raising(OSError(24, "Too many open files")),
        Outcome(503, "", "server_is_overloaded"),
        "to Dify (Too many open files); raise `ulimit -n`",
    ),
    "black-hole": (never, Outcome(504, "", SLOW), "in time"),
}


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("name", NO_CONNECTION)
async def test_no_connection(name: str, stream: bool) -> None:
    connect, outcome, words = NO_CONNECTION[name]
    async with proxying("http://127.0.0.1:9/v1", connect) as front:
        asked = await front.ask(stream=stream)
    if stream and outcome.status == 504:  # the head goes out after 5 s
        outcome = Outcome(200, "", SLOW)
    assert asked.outcome == outcome
    assert words in asked.message
    assert asked.took_s <= CONNECT_S + 0.1


async def test_ipv6_address_is_told_as_in_a_url() -> None:
    connect = raising(ConnectionRefusedError(111, "refused"))
    async with proxying("http://[::1]:9/v1", connect) as front:
        asked = await front.ask(stream=True)
    assert "http://[::1]:9 " in asked.message


async def test_really_nobody_listens(deaf_port: int) -> None:
    async with proxying(f"http://127.0.0.1:{deaf_port}/v1") as front:
        for stream in (True, False):
            assert (await front.ask(stream=stream)).outcome == REFUSED


# ------------------------------------------------------------------------------
# The circuit
# ------------------------------------------------------------------------------


class Gate:
    """Connections that hang till they are let go, all refused or all made."""

    def __init__(self) -> None:
        self.calls = 0
        self.refuses = False
        self.decided = asyncio.Event()

    async def connect(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        number = self.calls
        if number < 50:
            await asyncio.sleep(1e9)
        await self.decided.wait()
        raise ConnectionRefusedError(111, "refused")


async def test_waiting_requests_fail_at_once_when_dify_refuses() -> None:
    gate = Gate()
    async with proxying("http://127.0.0.1:9/v1", gate.connect) as front:
        asking = [asyncio.ensure_future(front.ask(stream=False)) for _ in range(50)]
        await asyncio.sleep(3)
        assert gate.calls == 50
        gate.decided.set()
        answers = await asyncio.gather(*asking)
        assert {answer.outcome for answer in answers} == {REFUSED}
        assert all(answer.took_s < 3.5 for answer in answers)
        more = await front.ask(stream=True)  # for a moment nobody even tries
        assert (more.outcome, more.took_s < 0.5, gate.calls) == (REFUSED, True, 50)


async def test_circuit_closes_again() -> None:
    async with FakeDify() as dify:
        dify.app(KEY, script=chat_answer("Hello"))
        calls = 0

        async def connect(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise ConnectionRefusedError(111, "refused")
            return await open_wire(*arguments, **options)

        async with proxying(dify.base, connect) as front:
            for _ in range(3):
                assert (await front.ask(stream=True)).outcome == REFUSED
            assert calls == 1
            await asyncio.sleep(CIRCUIT_S)
            assert (await front.ask(stream=True)).outcome.end == FINE


async def test_circuit_is_of_one_base_only(deaf_port: int) -> None:
    async with FakeDify() as dify:
        dify.app(KEY, script=chat_answer("Hello"))
        dead = f"http://127.0.0.1:{deaf_port}/v1"
        models = {
            "dead": {"key": KEY, "mode": "chat", "base": dead},
            "m": {"key": KEY, "mode": "chat"},
        }
        async with proxying(dify.base, models=models) as front:
            assert (await front.ask(stream=True, model="dead")).outcome == REFUSED
            assert (await front.ask(stream=True)).outcome == Outcome(200, "Hello", FINE)


async def test_open_circuit_tells_nothing_of_other_requests() -> None:
    is_down = False

    async def connect(*arguments: Any, **options: Any) -> Any:
        if is_down:
            raise ConnectionRefusedError(111, "refused")
        return await open_wire(*arguments, **options)

    upload = {"enabled": True, "allowed_file_types": ["document"]}
    methods = {"allowed_file_upload_methods": ["local_file"]}
    parameters = {"file_upload": {**upload, **methods}}
    async with FakeDify() as dify:
        dify.app(KEY, parameters=parameters, script=chat_answer("Hello"))
        async with proxying(dify.base, connect) as front:
            for name in ("first.txt", "my-secret.txt"):
                file = {"filename": name, "file_data": "data:text/plain;base64,aGk="}
                content = [{"type": "file", "file": file}]
                asked = await front.ask(stream=False, content=content)
                assert (asked.outcome.end == FINE) == (not is_down)
                await asyncio.sleep(0 if is_down else 60)  # no connection is kept
                is_down = True
            assert "my-secret.txt" in asked.message
            other = await front.ask(stream=False, user="other")
    assert other.outcome == REFUSED
    assert "my-secret" not in other.message


# ------------------------------------------------------------------------------
# TLS
# ------------------------------------------------------------------------------


CERTIFICATES: dict[str, tuple[str, dict[str, str], Outcome, str]] = {
    "trusted": (
        "localhost",
        {"DIFY_CA_FILE": str(TLS / "authority.pem")},
        Outcome(200, "Hello", FINE),
        "",
    ),
    "trusted-by-ssl-cert-file": (
        "localhost",
        {"SSL_CERT_FILE": str(TLS / "authority.pem")},
        Outcome(200, "Hello", FINE),
        "",
    ),
    "unknown-authority": ("localhost", {}, REFUSED, "DIFY_CA_FILE"),
    "expired": (
        "expired",
        {"DIFY_CA_FILE": str(TLS / "authority.pem")},
        REFUSED,
        "expired",
    ),
    "wrong-host": (
        "other-host",
        {"DIFY_CA_FILE": str(TLS / "authority.pem")},
        REFUSED,
        "DIFY_API_BASE",
    ),
    "no-ca-file": (
        "localhost",
        {"DIFY_CA_FILE": "/nowhere"},
        REFUSED,
        "DIFY_CA_FILE: /nowhere can't be read",
    ),
    "ca-file-no-name": (
        "localhost",
        {"DIFY_CA_FILE": "/a\0b"},
        REFUSED,
        "DIFY_CA_FILE: /a\0b can't be read",
    ),
    "ca-file-no-pem": (
        "localhost",
        {"DIFY_CA_FILE": __file__},
        REFUSED,
        f"DIFY_CA_FILE: {__file__} can't be read as PEM",
    ),
}


@pytest.mark.real_clock
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("name", CERTIFICATES)
async def test_certificate_of_dify(
    name: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    certificate, variables, outcome, words = CERTIFICATES[name]
    with quiet_loop():
        server = raw_server(Upstream([WHOLE]).serve, tls_context(certificate))
        async with server as base, proxying(base, variables=variables) as front:
            asked = await front.ask(stream=stream)
    assert asked.outcome == outcome
    assert words in asked.message


TLS_FAULTS: dict[str, tuple[list[Act], str]] = {
    "closed-before-head": (["close"], ""),
    "closed-in-middle": ([HEAD + chunk(HEL), "close"], "Hel"),
    "reset-before-head": (["reset"], ""),
    "reset-in-middle": ([HEAD + chunk(HEL), "reset"], "Hel"),
}


@pytest.mark.real_clock
@pytest.mark.parametrize("name", TLS_FAULTS)
async def test_tls_connection_breaks(name: str) -> None:
    acts, text = TLS_FAULTS[name]
    ca = {"DIFY_CA_FILE": str(TLS / "authority.pem")}
    with quiet_loop():
        server = raw_server(Upstream(acts).serve, tls_context("localhost"))
        async with server as base, proxying(base, variables=ca) as front:
            whole = await front.ask(stream=False)
            streamed = await front.ask(stream=True)
    assert whole.outcome == REFUSED
    assert streamed.outcome == (Outcome(200, text, BROKEN) if text else REFUSED)


@pytest.mark.real_clock
async def test_server_name_is_told_in_the_handshake() -> None:
    context = tls_context("localhost")
    names: list[str | None] = []
    context.sni_callback = lambda _, name, __: names.append(name)
    ca = {"DIFY_CA_FILE": str(TLS / "authority.pem")}
    async with raw_server(Upstream([WHOLE]).serve, context) as address:
        base = address.replace("127.0.0.1", "localhost")
        async with proxying(base, variables=ca) as front:
            assert (await front.ask(stream=False)).outcome.end == FINE
    assert names == ["localhost"]


# ------------------------------------------------------------------------------
# Proxies on the way
# ------------------------------------------------------------------------------


@dataclass
class Between:
    """An HTTP proxy: tunnels to one port, or answers plain requests by itself."""

    target_port: int = 0
    answer: bytes = b"HTTP/1.1 200 Connection established\r\n\r\n"
    plain: bytes = WHOLE
    heads: list[bytes] = field(default_factory=list)

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while True:
            request = await read_request(reader)
            self.heads.append(request.partition(b"\r\n\r\n")[0])
            if request.startswith(b"CONNECT "):
                writer.write(self.answer)
                if b" 200" in self.answer:
                    await self._tunnel(reader, writer)
                elif not self.answer:
                    await reader.read()
                return
            writer.write(self.plain)

    async def _tunnel(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        there = await asyncio.open_connection("127.0.0.1", self.target_port)
        back = asyncio.ensure_future(_copy(there[0], writer))
        try:
            await _copy(reader, there[1])
        finally:
            back.cancel()
            there[1].close()
            await asyncio.gather(back, return_exceptions=True)

    def fields(self, number: int = 0) -> dict[str, str]:
        lines = self.heads[number].decode().split("\r\n")[1:]
        return {
            line.split(": ", 1)[0].lower(): line.split(": ", 1)[1] for line in lines
        }

    def first_line(self, number: int = 0) -> str:
        return self.heads[number].partition(b"\r\n")[0].decode()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


def port_of(base: str) -> int:
    return int(base.split(":")[2].partition("/")[0])


AUTHORITY = {"DIFY_CA_FILE": str(TLS / "authority.pem")}
SECRET = "p@ss:wo%rd"
AUTHORIZATION = "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode()


@pytest.mark.real_clock
@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(Between.answer, id="as-usual"),
        pytest.param(b"HTTP/1.0 200\r\n\r\n", id="no-reason"),
    ],
)
async def test_https_goes_through_a_tunnel_with_authentication(answer: bytes) -> None:
    between = Between(answer=answer)
    upstream = Upstream([WHOLE])
    async with raw_server(upstream.serve, tls_context("other-host")) as there:
        proxy = raw_server(between.serve)
        async with proxy as here:
            between.target_port = port_of(there)
            url = f"http://me:p%40ss%3Awo%25rd@127.0.0.1:{port_of(here)}"
            base = "https://dify.example:8443/v1"
            async with proxying(
                base, variables={"HTTPS_PROXY": url, **AUTHORITY}
            ) as front:
                for stream in (True, False):
                    asked = await front.ask(stream=stream)
                    assert asked.outcome == Outcome(200, "Hello", FINE)
    assert between.first_line() == "CONNECT dify.example:8443 HTTP/1.1"
    assert between.fields() == {
        "host": "dify.example:8443",
        "proxy-authorization": AUTHORIZATION,
    }
    assert len(between.heads) == 1, "the tunnel is kept"
    assert b"Proxy-Authorization" not in b"".join(upstream.asked)


@pytest.mark.real_clock
async def test_certificate_is_verified_through_a_tunnel() -> None:
    between, base = Between(), "https://dify.example/v1"
    upstream = raw_server(Upstream([WHOLE]).serve, tls_context("localhost"))
    async with upstream as there, raw_server(between.serve) as here:
        between.target_port = port_of(there)
        url = f"http://127.0.0.1:{port_of(here)}"
        async with proxying(base, variables={"HTTPS_PROXY": url, **AUTHORITY}) as front:
            asked = await front.ask(stream=True)
    assert asked.outcome == REFUSED
    assert "The certificate of https://dify.example:443 fails" in asked.message


@pytest.mark.real_clock
async def test_proxy_can_say_nothing_in_the_name_of_dify() -> None:
    """What it sends behind its answer, more than one read takes, is not in TLS."""
    pad = opendify.READ_BUFFER_BYTES - len(Between.answer)
    between = Between(answer=Between.answer + b"x" * pad + WHOLE)
    there = raw_server(Upstream([WHOLE]).serve, tls_context("other-host"))
    async with there as target, raw_server(between.serve) as here:
        between.target_port = port_of(target)
        url = f"http://127.0.0.1:{port_of(here)}"
        variables = {"HTTPS_PROXY": url, **AUTHORITY}
        async with proxying("https://dify.example/v1", variables=variables) as front:
            asked = await front.ask(stream=False)
    assert asked.outcome == REFUSED


async def test_proxy_that_leaves_after_its_answer_is_not_waited_for() -> None:
    async def connect(*address: Any, **options: Any) -> Wire:
        wire = await open_wire(*address, **options)
        await wire.wait_for_data()
        wire.abort()  # as if it had been reset
        await asyncio.sleep(0)
        return wire

    async def serve(_: object, writer: asyncio.StreamWriter) -> None:
        writer.write(Between.answer)

    async with raw_server(serve) as here:
        variables = {"HTTPS_PROXY": f"http://127.0.0.1:{port_of(here)}"}
        base = "https://dify.example/v1"
        async with proxying(base, connect, variables=variables) as front:
            asked = await front.ask(stream=False)
    assert asked.outcome == REFUSED
    assert "(it was closed, or spoke before TLS began)" in asked.message


@pytest.mark.real_clock
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        pytest.param(
            b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "407", id="407"
        ),
        pytest.param(b"HTTP/1.1 403 Forbidden\r\n\r\n<html>", "403", id="403"),
        pytest.param(b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "SSH", id="no-proxy"),
        pytest.param(b"HTTP/1.1 503 \xe9\r\n\r\n", "503", id="latin-1"),
        pytest.param(b"220 mail\n\n", "(Lines must end with CR LF)", id="smtp"),
    ],
)
async def test_proxy_that_refuses_is_named(answer: bytes, words: str) -> None:
    between = Between(answer=answer)
    async with raw_server(between.serve) as here:
        url = f"http://me:secret-word@127.0.0.1:{port_of(here)}"
        async with proxying(
            "https://dify.example/v1", variables={"HTTPS_PROXY": url}
        ) as front:
            asked = await front.ask(stream=True)
    assert asked.outcome == REFUSED
    for part in (words, "HTTPS_PROXY", f"127.0.0.1:{port_of(here)}"):
        assert part in asked.message
    assert "secret-word" not in asked.message


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"message": "Who are you?"}'])
async def test_proxy_for_http_that_refuses_is_named(body: bytes) -> None:
    head = b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: %d\r\n\r\n"
    between = Between(plain=head % len(body) + body)
    async with raw_server(between.serve) as here:
        url = f"http://me:secret-word@127.0.0.1:{port_of(here)}"
        async with proxying(
            "http://dify.example/v1", variables={"HTTP_PROXY": url}
        ) as front:
            asked = await front.ask(stream=True)
    assert asked.outcome == REFUSED
    assert "(407). Check HTTP_PROXY and NO_PROXY." in asked.message
    assert "DIFY_API_BASE" not in asked.message
    assert "secret-word" not in asked.message


@pytest.mark.parametrize("end", ["reset", "close"])
@pytest.mark.parametrize(
    ("status", "words"), [(407, "(407). Check HTTP_PROXY"), (500, "answered 500")]
)
async def test_refusal_counts_though_its_page_breaks_off(
    status: int, words: str, end: str
) -> None:
    """A proxy that has not read the request resets the connection (tinyproxy)."""
    page = b"HTTP/1.1 %d No\r\nContent-Length: 99\r\n\r\n<html>" % status
    server = raw_server(Upstream([page, end]).serve)
    async with server as base, proxying(base) as front:
        asked = await front.ask(stream=True)
    assert asked.outcome == REFUSED
    assert words in asked.message


async def test_each_address_of_a_proxy_is_tried(
    monkeypatch: pytest.MonkeyPatch, deaf_port: int
) -> None:
    between = Between(answer=b"HTTP/1.1 403 Forbidden\r\n\r\n")
    async with raw_server(between.serve) as here:
        ports = [deaf_port, port_of(here)]

        async def resolve(*_: object, **__: object) -> list[tuple[Any, ...]]:
            inet, stream = socket.AF_INET, socket.SOCK_STREAM
            return [(inet, stream, 6, "", ("127.0.0.1", port)) for port in ports]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
        variables = {"HTTPS_PROXY": "http://two.example:3128"}
        async with proxying("https://[2001:db8::1]/v1", variables=variables) as front:
            asked = await front.ask(stream=False)
    assert between.first_line() == "CONNECT [2001:db8::1]:443 HTTP/1.1"
    assert between.fields() == {"host": "[2001:db8::1]:443"}
    assert (asked.outcome, "two.example:3128" in asked.message) == (REFUSED, True)


async def test_proxy_that_says_nothing_has_a_limit() -> None:
    async with raw_server(Between(answer=b"").serve) as here:
        url = f"http://127.0.0.1:{port_of(here)}"
        async with proxying(
            "https://dify.example/v1", variables={"HTTPS_PROXY": url}
        ) as front:
            asked = await front.ask(stream=False)
    assert (asked.outcome, asked.took_s <= CONNECT_S + 1) == (
        Outcome(504, "", SLOW),
        True,
    )


async def test_proxy_that_is_not_there_is_named(deaf_port: int) -> None:
    url = f"http://127.0.0.1:{deaf_port}"
    async with proxying(
        "https://dify.example/v1", variables={"HTTPS_PROXY": url}
    ) as front:
        asked = await front.ask(stream=False)
    assert asked.outcome == REFUSED
    assert "HTTPS_PROXY" in asked.message


async def test_proxy_whose_name_is_unknown_is_named() -> None:
    connect = raising(socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
    variables = {"HTTP_PROXY": "http://proxy.example:3128"}
    base = "http://dify.example/v1"
    async with proxying(base, connect, variables=variables) as front:
        asked = await front.ask(stream=False)
    assert asked.outcome == REFUSED
    assert asked.message.endswith(
        "The host name 'proxy.example' can't be resolved; check HTTP_PROXY: "
        "proxy.example:3128."
    )


@pytest.mark.parametrize("user", ["me:p%40ss%3Awo%25rd@", ""], ids=["user", "no-user"])
async def test_plain_http_goes_through_a_proxy(user: str) -> None:
    between = Between()
    async with raw_server(between.serve) as here:
        url = f"http://{user}127.0.0.1:{port_of(here)}"
        async with proxying(
            "http://dify.example/v1", variables={"HTTP_PROXY": url}
        ) as front:
            for stream in (True, False):
                asked = await front.ask(stream=stream)
                assert asked.outcome == Outcome(200, "Hello", FINE)
    line = "POST http://dify.example/v1/chat-messages HTTP/1.1"
    assert [between.first_line(number) for number in (0, 1)] == [line] * 2
    assert between.fields()["host"] == "dify.example"
    wanted = AUTHORIZATION if user else None
    assert between.fields().get("proxy-authorization") == wanted


@pytest.mark.parametrize(
    ("no_proxy", "is_direct"),
    [
        ("dify.example", True),
        (".example", True),
        ("*.example", True),
        ("example", True),
        ("DIFY.EXAMPLE", True),
        ("dify.example:80", True),
        ("other.example, dify.example", True),
        ("*", True),
        ("", False),
        ("ify.example", False),
        ("dify.example:81", False),
        ("dify.example.org", False),
        ("other.example", False),
    ],
)
async def test_no_proxy_names_what_is_reached_directly(
    no_proxy: str, is_direct: bool
) -> None:
    between = Between()
    async with raw_server(between.serve) as here:
        asked_for: list[tuple[str, int, float | None]] = []

        async def connect(host: str, port: int, **options: Any) -> Any:
            race_s = options.pop("happy_eyeballs_delay")  # of a name's addresses
            asked_for.append((host, port, race_s))
            address = ("127.0.0.1", port_of(here))
            return await open_wire(*address, **options)

        url = f"http://127.0.0.1:{port_of(here)}"
        variables = {"HTTP_PROXY": url, "NO_PROXY": no_proxy}
        base = "http://dify.example/v1"
        async with proxying(base, connect, variables=variables) as front:
            assert (await front.ask(stream=False)).outcome.end == FINE
    proxy = ("127.0.0.1", port_of(here), None)
    assert asked_for == [("dify.example", 80, 0.25) if is_direct else proxy]


@pytest.mark.parametrize(
    ("host", "no_proxy", "is_direct"),
    [
        ("10.1.2.3", "localhost,10.0.0.0/8,.svc", True),
        ("10.1.2.3", "10.1.2.9/24", True),
        ("11.1.2.3", "10.0.0.0/8", False),
        ("dify.example", "0.0.0.0/0", False),
        ("10.1.2.3", "10.0.0.0/99,/", False),
        ("fd00::1", "fd00::/8", True),
        ("fd00::1", "10.0.0.0/8", False),
        ("fd00::1", "[fd00::1]", True),
        ("fd00::1", "[fd00::1]:80", True),
        ("fd00::1", "[fd00::1]:81", False),
    ],
)
def test_no_proxy_may_name_a_network(host: str, no_proxy: str, is_direct: bool) -> None:
    variables = {"HTTP_PROXY": "http://proxy.example:3128", "NO_PROXY": no_proxy}
    settings = parse_settings(variables)
    assert (proxy_for(Origin("http", host, 80), settings) is None) == is_direct


async def test_loopback_needs_no_proxy(deaf_port: int) -> None:
    url = f"http://127.0.0.1:{deaf_port}"
    async with raw_server(Upstream([WHOLE]).serve) as base:
        variables = {"HTTP_PROXY": url, "HTTPS_PROXY": url}
        async with proxying(base, variables=variables) as front:
            assert (await front.ask(stream=False)).outcome.end == FINE


# ------------------------------------------------------------------------------
# Addresses, and several of them
# ------------------------------------------------------------------------------


async def test_base_may_be_an_ipv6_address() -> None:
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await read_request(reader))
        writer.write(WHOLE)
        await writer.drain()
        writer.close()

    try:
        server = await asyncio.start_server(serve, "::1", 0)
    except OSError:
        pytest.skip("this machine has no IPv6")
    port = server.sockets[0].getsockname()[1]
    async with server, proxying(f"http://[::1]:{port}/v1") as front:
        assert (await front.ask(stream=True)).outcome == Outcome(200, "Hello", FINE)
        await asyncio.sleep(0.1)
    assert f"\r\nHost: [::1]:{port}\r\n".encode() in heads[0]


@pytest.mark.parametrize(
    ("base", "host"),
    [
        ("http://dify.example/v1", "dify.example"),
        ("http://dify.example:80/v1", "dify.example"),
        ("http://dify.example:443/v1", "dify.example:443"),
        ("http://user:word@[2001:db8::1]:5001/v1", "[2001:db8::1]:5001"),
    ],
)
async def test_host_has_a_port_only_if_it_is_not_the_schemes_own(
    base: str, host: str
) -> None:
    between = Between()
    async with raw_server(between.serve) as here:

        async def connect(*_: Any, **__: Any) -> Any:
            return await open_wire("127.0.0.1", port_of(here))

        async with proxying(base, connect) as front:
            assert (await front.ask(stream=False)).outcome.end == FINE
    assert between.fields()["host"] == host


async def test_second_address_is_tried_when_the_first_does_not_answer() -> None:
    """`localhost` is ::1 first on many machines, and Dify listens on 127.0.0.1."""
    async with raw_server(Upstream([WHOLE]).serve) as address:
        base = address.replace("127.0.0.1", "localhost")
        async with proxying(base) as front:
            asked = await front.ask(stream=False)
    assert asked.outcome == Outcome(200, "Hello", FINE)
    assert asked.took_s < 1


async def test_several_bases_at_once() -> None:
    async with FakeDify() as one, FakeDify() as two:
        one.app("key-one", script=chat_answer("one", delay=0.1))
        two.app("key-two", script=chat_answer("two", delay=0.1))
        models = {
            name: {"key": f"key-{name}", "mode": "chat", "base": dify.base}
            for name, dify in (("one", one), ("two", two))
        }
        async with proxying("http://127.0.0.1:9/v1", models=models) as front:
            names = ["one", "two"] * 10
            asked = await asyncio.gather(
                *(front.ask(stream=True, model=name) for name in names)
            )
            assert [row.outcome.text for row in asked] == names
        for dify, key in ((one, "key-one"), (two, "key-two")):
            assert {request.key for request in dify.requests} == {key}
            assert len(dify.requests) == 10
