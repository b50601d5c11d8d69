"""Room Upstream: reuse, faults at every step of an exchange, TLS, modes, timeouts."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple

import fake_dify
import pytest
from clock import now
from fake_dify import (
    PING,
    Close,
    FakeDify,
    Hang,
    Raw,
    Reset,
    Send,
    Sleep,
    Status,
    Step,
    Wait,
    chat_answer,
    chatflow_answer,
    message,
    message_end,
    workflow_finished,
)

from opendify import (
    BROKEN_OFF,
    FORM_FRESH_S,
    IDLE_CONNECTION_S,
    MAX_IDLE_CONNECTIONS,
    MAX_INTERIM_RESPONSES,
    RACE_S,
    RETRY_AFTER_S,
    STOP_DRAIN_S,
    UPLOAD_TIMEOUT_S,
    WRITE_TIMEOUT_S,
    AppSettings,
    Attachment,
    ConfigurationFault,
    ConnectionBroken,
    Dify,
    DifyRequest,
    Failure,
    Finish,
    Origin,
    Part,
    ProxyError,
    Settings,
    Text,
    TurnStream,
    UpstreamFailed,
    Usage,
    Wire,
    dify_request,
    error_headers,
    open_wire,
    origin_of,
    parse_settings,
    stop_path,
)

TLS = Path(__file__).parent / "data" / "tls"
KEY = "app-key-of-the-tests"
USER = "someone"
NEVER = 1e9  # seconds

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]


# ------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------


def settings_for(base: str, **variables: str) -> Settings:
    models = {"MODEL_CONFIG": json.dumps({"m": {"key": KEY, "mode": "chat"}})}
    return parse_settings({**models, "DIFY_API_BASE": base, **variables})


@contextlib.asynccontextmanager
async def client(
    base: str, mode: str = "chat", **variables: str
) -> AsyncIterator[tuple[Dify, AppSettings]]:
    """The client of Dify, and an app at this base."""
    settings = settings_for(base, **variables)
    dify = Dify(settings, open_wire)
    try:
        yield dify, dataclasses.replace(settings.model_config["m"], mode=mode)
    finally:
        await some_turns()
        dify.close()
        await some_turns()


async def some_turns() -> None:
    """Let what was begun go on, without waiting for anything."""
    for _ in range(5):
        await asyncio.sleep(0)


def question(mode: str = "chat", **fields: Any) -> DifyRequest:
    common = {"inputs": {}, "user": USER, **fields}
    return dify_request(mode, "Hi", common, variable="query")


class Outcome(NamedTuple):
    """What a turn gave: its text, and "finish" or the error's class name."""

    text: str
    end: str
    status: int = 200
    is_final: bool = False


def outcome_of(text: str, error: ProxyError) -> Outcome:
    return Outcome(text, type(error).__name__, error.status, error.is_final)


def joined(parts: Iterable[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Text))


async def read_turn(stream: TurnStream, takes: str = "") -> Outcome:
    """Read all; text that comes meanwhile is taken (+) or refused (-), in turns."""
    text = ""
    answers = itertools.cycle(takes)

    def carry(parts: list[Part]) -> bool:
        nonlocal text
        is_taken = next(answers) == "+"
        text += joined(parts) if is_taken else ""
        return is_taken

    if takes:
        stream.carry_by(carry)
    try:
        while parts := await stream.read():
            text += joined(parts)
            for part in parts:
                if isinstance(part, Failure):
                    return outcome_of(text, part.error)
                if isinstance(part, Finish):
                    return Outcome(text, "finish")
    finally:
        stream.close()
    return Outcome(text, "nothing")


async def turn(
    dify: Dify, app: AppSettings, mode: str = "chat", takes: str = ""
) -> Outcome:
    """One whole turn."""
    try:
        stream = await dify.open_turn(app, mode, question(mode))
    except ProxyError as error:
        return outcome_of("", error)
    return await read_turn(stream, takes)


@contextlib.asynccontextmanager
async def raw_server(
    serve: Serve, tls: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """A server whose connections are served by `serve`; gives its base."""
    tasks: list[asyncio.Task[None]] = []

    async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await serve(reader, writer)
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.ensure_future(run(reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls)
    scheme = "https" if tls else "http"
    try:
        yield f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await some_turns()


def json_answer(value: Any, *fields: str) -> bytes:
    body = json.dumps(value).encode()
    lines = [f"Content-Length: {len(body)}", *fields]
    return f"HTTP/1.1 200 OK\r\n{_lines(lines)}\r\n".encode() + body


def _lines(fields: Sequence[str]) -> str:
    return "".join(f"{field}\r\n" for field in fields)


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return head + await reader.readexactly(int(line.split(b":")[1]))
    return head


# ------------------------------------------------------------------------------
# Connections are reused
# ------------------------------------------------------------------------------


async def test_calls_one_after_another_share_a_connection() -> None:
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        fake.app(KEY, script=chat_answer("Hello", "!"))
        for _ in range(3):
            assert await turn(dify, app) == Outcome("Hello!", "finish")
            await dify.api.call(app, "/info")
        assert [(r.connection, r.number) for r in fake.requests] == [
            (1, number) for number in range(1, 7)
        ]


async def test_calls_at_once_have_connections_of_their_own() -> None:
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        fake.app(KEY)
        calls = [dify.api.call(app, "/info") for _ in range(5)]
        await asyncio.gather(*calls)
        assert fake.connections == 5
        await asyncio.gather(*[dify.api.call(app, "/info") for _ in range(5)])
        assert fake.connections == 5


async def test_error_does_not_cost_the_connection() -> None:
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        fake.app(KEY, overrides={"/info": [Status(500, "<html>")]})
        for _ in range(2):
            with pytest.raises(ProxyError):
                await dify.api.call(app, "/info")
        assert fake.connections == 1


@pytest.mark.parametrize(
    ("value", "requests"),
    [
        pytest.param("Close", [1, 1, 1], id="close"),
        pytest.param("x-a, close", [1, 1, 1], id="beside-another"),
        pytest.param("keep-alive, x-closed", [3], id="in-another-word"),
    ],
)
async def test_connection_is_used_again_unless_the_answer_says_close(
    value: str, requests: list[int]
) -> None:
    seen: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(0)
        while await read_request(reader):
            seen[-1] += 1
            writer.write(json_answer({"name": "n"}, f"Connection: {value}"))

    async with raw_server(serve) as base, client(base) as (dify, app):
        for _ in range(3):
            assert await dify.api.call(app, "/info") == {"name": "n"}
    assert seen == requests


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        pytest.param(b'HTTP/1.0 200 OK\r\n\r\n{"name": "n"}', {"name": "n"}, id="1.0"),
        pytest.param(b"HTTP/1.1 204 No Content\r\n\r\n", {}, id="no-content"),
        pytest.param(  # a length is then that of another answer (RFC 9112, section 6.3)
            b"HTTP/1.1 204 No Content\r\nContent-Length: 20\r\n\r\n", {}, id="length"
        ),
        pytest.param(
            b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n",
            {},
            id="chunked",
        ),
    ],
)
async def test_answer_without_a_length_has_an_end(
    answer: bytes, value: dict[str, Any]
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(answer)
        if not value:
            await reader.read()

    async with raw_server(serve) as base, client(base) as (dify, app):
        assert await dify.api.call(app, "/stop", {"user": USER}) == value
        assert now() == 0


@pytest.mark.parametrize(
    ("last", "read_after_s", "seconds"),
    [
        pytest.param(lambda writer: writer.write_eof(), 0, 0.2, id="dify-ends-it"),
        pytest.param(lambda writer: writer.write_eof(), 1, 0.1, id="ended-before"),
        pytest.param(
            lambda writer: writer.write(b"\r\n"),  # as some servers do behind a body
            *(0, IDLE_CONNECTION_S + 1),
            id="stray-bytes",
        ),
    ],
)
async def test_idle_connection_is_closed(
    last: Callable[[asyncio.StreamWriter], None], read_after_s: float, seconds: float
) -> None:
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(json_answer({}))
        await asyncio.sleep(0.1)
        last(writer)
        await reader.read()
        ended.set()

    async with raw_server(serve) as base, client(base) as (dify, app):
        response = await dify.api.request(app, "/info")
        await asyncio.sleep(read_after_s)
        await dify.api.read_object(response, app)
        await asyncio.sleep(0.15)
        await dify.api.call(app, "/info")  # finds that it is of no use
        await asyncio.wait_for(ended.wait(), seconds)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}", id="1.0"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}{}", id="too-long"
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\n"
            b'Content-Length: 15\r\n\r\n{"name": "evil"}',
            id="answer-nobody-asked-for",
        ),
    ],
)
async def test_connection_in_doubt_is_not_used_again(answer: bytes) -> None:
    seen: list[list[bytes]] = []  # the paths, by connection

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append([])
        while True:
            seen[-1].append((await read_request(reader)).split()[1])
            writer.write(answer)

    async with raw_server(serve) as base, client(base) as (dify, app):
        assert await dify.api.call(app, "/one") == {}
        assert await dify.api.call(app, "/two") == {}
    assert seen == [[b"/v1/one"], [b"/v1/two"]]


def refusing(
    seen: list[bytes], rest: Callable[[asyncio.StreamReader], Awaitable[Any]]
) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    """Return what refuses uploads, does with the `rest` as told, and answers others."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        if b"upload" not in seen[-1]:
            writer.write(json_answer({"name": "n"}))
            return
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        await rest(reader)

    return serve


async def test_connection_is_not_kept_when_a_file_is_refused_before_its_end() -> None:
    """What followed would be read as more of the file."""
    seen: list[bytes] = []

    async def read_all(reader: asyncio.StreamReader) -> None:
        while await reader.read(1000):
            pass

    async def read() -> bytes:
        await asyncio.sleep(0.1)
        return b"more"

    file = Attachment("a.bin", "image/png")
    serve = refusing(seen, read_all)
    async with raw_server(serve) as base, client(base) as (dify, app):
        with pytest.raises(ProxyError) as caught:
            await dify.send_file(app, "/files/upload", file, read, lambda: USER)
        assert caught.value.status == 413
        assert await dify.api.call(app, "/info") == {"name": "n"}
    assert len(seen) == 2


async def test_refusal_is_read_though_the_connection_is_reset_behind_it() -> None:
    """A server that closes with some of the file unread resets the connection."""
    answer = b'{"code": "file_too_large", "message": "No.", "status": 413}'
    head = b"HTTP/1.1 413 CONTENT TOO LARGE\r\nContent-Length: %d\r\n\r\n"
    reads = 0
    with socket.create_server(("127.0.0.1", 0)) as server:

        async def read() -> bytes:
            nonlocal reads
            reads += 1
            if reads == 2:
                with server.accept()[0] as connection:
                    connection.sendall(head % len(answer) + answer)
            return b"more" if reads < 10 else b""

        file = Attachment("a.bin", "image/png")
        base = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        async with client(base) as (dify, app):
            with pytest.raises(ProxyError) as caught:
                await dify.send_file(app, "/files/upload", file, read, lambda: USER)
    assert caught.value.status == 413
    assert reads == 2


async def test_file_is_read_no_further_when_dify_closes_without_an_answer() -> None:
    reads = 0

    async def close(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")

    async def read() -> bytes:
        nonlocal reads
        reads += 1
        await asyncio.sleep(0.1)
        return b"more" if reads < 100 else b""

    file = Attachment("a.bin", "image/png")
    async with raw_server(close) as base, client(base) as (dify, app):
        with pytest.raises(UpstreamFailed):
            await dify.send_file(app, "/files/upload", file, read, lambda: USER)
    assert reads < 10


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("is_tls", [False, True])
async def test_connection_is_not_kept_while_its_request_is_not_taken(
    is_tls: bool,
) -> None:
    """An early refusal leaves megabytes of the upload unsent."""
    seen: list[bytes] = []

    async def read_nothing(_: asyncio.StreamReader) -> None:
        await asyncio.Event().wait()

    file = Attachment("a.bin", "image/png", b"x" * 20_000_000)
    serve = refusing(seen, read_nothing)
    tls = tls_context("localhost") if is_tls else None
    async with raw_server(serve, tls) as base, client(base) as (dify, app):
        with pytest.raises(ProxyError) as caught:
            await dify.upload(app, file, USER)
        assert caught.value.status == 413
        assert await dify.api.call(app, "/info") == {"name": "n"}
        assert now() == 0


async def test_connection_closed_while_idle_costs_no_request() -> None:
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        fake.app(KEY, script=chat_answer("Hello"))
        for number in range(1, 4):
            assert await turn(dify, app) == Outcome("Hello", "finish")
            await asyncio.sleep(fake_dify.KEEP_ALIVE_S + 1)
            assert fake.open_connections == 0
            assert (fake.connections, len(fake.requests)) == (number, number)


async def test_answer_closed_twice_before_its_end_still_keeps_its_connection() -> None:
    connections, is_closed = [0], asyncio.Event()
    events = b'data: {"event": "message", "answer": "Hello"}\n\n'
    events += b'data: {"event": "message_end"}\n\n'

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections[0] += 1
        await read_request(reader)
        head = "Content-Type: text/event-stream", "Transfer-Encoding: chunked"
        writer.write(f"HTTP/1.1 200 OK\r\n{_lines(head)}\r\n".encode())
        writer.write(b"%x\r\n%b\r\n" % (len(events), events))
        await is_closed.wait()
        writer.write(b"0\r\n\r\n")
        await read_request(reader)
        writer.write(json_answer({"name": "n"}))

    async with raw_server(serve) as base, client(base) as (dify, app):
        stream = await dify.open_turn(app, "chat", question())
        assert await read_turn(stream) == Outcome("Hello", "finish")
        for _ in range(3):
            stream.close()
            await some_turns()
        is_closed.set()
        await asyncio.sleep(0.1)
        assert await dify.api.call(app, "/info") == {"name": "n"}
    assert connections == [1]


@pytest.mark.parametrize("how", ["end", "reset"])
async def test_connection_closed_when_the_request_is_written_costs_no_request(
    how: str,
) -> None:
    """The race: the idle connection looked alive when it was taken."""
    seen: list[tuple[int, bytes]] = []
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        for number in range(2):
            seen.append((connections, (await read_request(reader)).split()[1]))
            if connections == 1 and number == 1:
                if how == "reset":
                    writer.transport.abort()
                return
            writer.write(json_answer({"name": "n"}))

    async with raw_server(serve) as base, client(base) as (dify, app):
        assert await dify.api.call(app, "/one") == {"name": "n"}
        assert await dify.api.call(app, "/two") == {"name": "n"}
    assert seen == [(1, b"/v1/one"), (1, b"/v1/two"), (2, b"/v1/two")]


async def test_request_is_not_repeated_once_it_may_have_been_served() -> None:
    """An idle connection that was dead is known to be so at once."""
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await read_request(reader))
        writer.write(json_answer({}))
        requests.append(await read_request(reader))
        await asyncio.sleep(RACE_S + 1)  # the run, and then its process dies

    async with raw_server(serve) as base, client(base) as (dify, app):
        assert await dify.api.call(app, "/info") == {}
        assert await turn(dify, app) == Outcome("", "UpstreamFailed", 502)
    assert len(requests) == 2


async def test_reused_connection_is_retried_once_only() -> None:
    """The fresh connection has no second chance."""
    requests = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        while await read_request(reader):
            requests += 1
            if requests > 1:
                return
            writer.write(json_answer({}))

    async with raw_server(serve) as base, client(base) as (dify, app):
        assert await dify.api.call(app, "/info") == {}
        with pytest.raises(ProxyError) as caught:
            await dify.api.call(app, "/info")
    assert (caught.value.status, requests) == (502, 3)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param([Raw(b"H"), Close()], id="end-after-a-byte"),
        pytest.param([Raw(b"HTTP/1.1 200 OK\r\n"), Reset()], id="reset-in-head"),
        pytest.param([Send(b""), Close()], id="end-after-head"),
        pytest.param([Status(500)], id="500"),
        pytest.param([Status(502, "<html>")], id="502"),
        pytest.param([Status(503)], id="503"),
        pytest.param([Status(429)], id="429"),
        pytest.param([Status(408)], id="408"),
        pytest.param([Hang()], id="stall"),
    ],
)
async def test_nothing_else_is_ever_repeated(answer: list[Step]) -> None:
    async with FakeDify(ping_s=NEVER) as fake, client(fake.base) as (dify, app):
        fake.app(KEY, script=answer)
        await dify.api.call(app, "/info")  # the turn's connection is a reused one
        assert (await turn(dify, app)).end != "finish"
        assert [r.path for r in fake.requests] == ["/info", "/chat-messages"]


async def test_idle_connections_are_closed_after_some_time() -> None:
    async with FakeDify(keep_alive_s=NEVER) as fake, client(fake.base) as (dify, app):
        fake.app(KEY)
        await dify.api.call(app, "/info")
        await asyncio.sleep(IDLE_CONNECTION_S - 1)
        await dify.api.call(app, "/info")
        assert (fake.connections, fake.open_connections) == (1, 1)
        await asyncio.sleep(IDLE_CONNECTION_S - 1)
        assert fake.open_connections == 1
        await asyncio.sleep(IDLE_CONNECTION_S / 2)
        assert fake.open_connections == 0


async def test_age_of_an_idle_connection_is_not_that_of_its_last_answer() -> None:
    """The answer came at once with its end: its deadline is none of the pool's."""
    whole = plain(f"Content-Length: {len(HELLO + END)}\r\n", HELLO + END)
    async with FakeDify(keep_alive_s=NEVER) as fake, client(fake.base) as (dify, app):
        fake.app(KEY, script=[whole])
        assert await turn(dify, app) == FINE
        assert fake.open_connections == 1
        await asyncio.sleep(IDLE_CONNECTION_S * 1.5)
        assert fake.open_connections == 0


async def test_end_of_a_whole_answer_is_none_of_the_next_one() -> None:
    """Which has the connection by then, and may be silent for longer."""
    whole = plain(f"Content-Length: {len(HELLO + END)}\r\n", HELLO + END)
    slow = [Raw(HEAD), Sleep(2 * STOP_DRAIN_S), Raw(chunk(HELLO + END) + b"0\r\n\r\n")]
    async with FakeDify(ping_s=NEVER) as fake, client(fake.base) as (dify, app):
        fake.app(KEY, script=[whole])
        first = await dify.open_turn(app, "chat", question())
        await first.read()
        fake.app(KEY, script=slow)
        second = await dify.open_turn(app, "chat", question())
        assert fake.connections == 1
        assert await first.end()
        assert await read_turn(second) == FINE


async def test_idle_connections_are_limited_in_number() -> None:
    async with FakeDify(keep_alive_s=NEVER) as fake, client(fake.base) as (dify, app):
        fake.app(KEY)
        wanted = MAX_IDLE_CONNECTIONS + 6
        calls = [dify.api.call(app, "/info") for _ in range(wanted)]
        await asyncio.gather(*calls)
        assert fake.connections == wanted
        await fake.until(lambda: fake.open_connections == MAX_IDLE_CONNECTIONS)


async def test_closing_the_client_closes_idle_connections() -> None:
    async with FakeDify(keep_alive_s=NEVER) as fake, client(fake.base) as (dify, app):
        fake.app(KEY)
        await dify.api.call(app, "/info")
        dify.close()
        await fake.until(lambda: fake.open_connections == 0)


async def test_closing_the_client_at_once_closes_what_still_ends() -> None:
    async with FakeDify(keep_alive_s=NEVER) as fake, client(fake.base) as (dify, app):
        fake.app(KEY, script=[message("Hello"), message_end(), Hang()])
        assert await turn(dify, app) == FINE
        dify.close()
        await fake.until(lambda: fake.open_connections == 0)


async def test_cancelled_call_closes_its_connection() -> None:
    gate = asyncio.Event()
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        fake.app(KEY, overrides={"/info": [Wait(gate)]})
        calling = asyncio.ensure_future(dify.api.call(app, "/info"))
        await fake.until(lambda: fake.running == 1)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        await fake.until(lambda: fake.open_connections == 0)


@pytest.mark.parametrize("turns", range(7))
async def test_connection_made_while_its_call_is_cancelled_is_closed(
    turns: int,
) -> None:
    gate = asyncio.Event()
    async with FakeDify() as fake:
        fake.app(KEY)
        made = await open_wire(*origin_of(fake.base)[1:])

        async def connect(*_: Any, **__: Any) -> Wire:
            try:
                await gate.wait()
            except asyncio.CancelledError:
                made.close()
                raise
            return made

        settings = settings_for(fake.base)
        dify = Dify(settings, connect)
        app = settings.model_config["m"]
        calling = asyncio.ensure_future(dify.api.call(app, "/info"))
        await some_turns()
        gate.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        dify.close()
        await fake.until(lambda: fake.open_connections == 0)


async def test_call_that_is_cancelled_while_it_connects_fails_no_other() -> None:
    gate = asyncio.Event()

    async def connect(*address: Any, **options: Any) -> Wire:
        await gate.wait()
        return await open_wire(*address, **options)

    async with raw_server(answer_info) as base:
        settings = settings_for(base)
        dify = Dify(settings, connect)
        calls = [dify.api.call(settings.model_config["m"], "/info") for _ in range(2)]
        left, staying = map(asyncio.ensure_future, calls)
        await some_turns()
        left.cancel()
        await some_turns()
        gate.set()
        assert await staying == {"name": "n"}
        dify.close()


async def test_connection_of_old_settings_is_not_used_again() -> None:
    """It may lead through a proxy that they name no more."""
    async with FakeDify(keep_alive_s=NEVER) as fake, client(fake.base) as (dify, app):
        fake.app(KEY)
        await dify.api.call(app, "/info")
        running = await dify.api.request(app, "/info")
        await dify.api.call(app, "/info")
        dify.use(settings_for(fake.base))
        await running.read_all(1000)
        await dify.api.call(app, "/info")
        assert fake.connections == 3
        await some_turns()
        assert fake.open_connections == 1


async def test_origins_do_not_share_connections() -> None:
    async with FakeDify() as one, FakeDify() as two, client(one.base) as (dify, app):
        one.app(KEY, name="one")
        two.app(KEY, name="two")
        other = dataclasses.replace(app, base=two.base)
        for _ in range(2):
            assert (await dify.api.call(app, "/info"))["name"] == "one"
            assert (await dify.api.call(other, "/info"))["name"] == "two"
        assert (one.connections, two.connections) == (1, 1)


async def test_difys_do_not_share_what_is_known_of_their_apps() -> None:
    async with FakeDify() as one, FakeDify() as two, client(one.base) as (dify, app):
        one.app(KEY, parameters={"text_to_speech": {"enabled": True}})
        two.app(KEY, parameters={"text_to_speech": {"enabled": False}})
        other = dataclasses.replace(app, base=two.base)
        assert (await dify.facts.form_of(app)).speaks
        assert not (await dify.facts.form_of(other)).speaks


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("http://h/v1", Origin("http", "h", 80)),
        ("https://h/v1", Origin("https", "h", 443)),
        ("https://h:8443/v1", Origin("https", "h", 8443)),
        ("http://[::1]:5001/v1", Origin("http", "::1", 5001)),
    ],
)
def test_origin_of_a_url(url: str, origin: Origin) -> None:
    assert origin_of(url) == origin


async def test_request_as_it_is_sent() -> None:
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await read_request(reader))
        writer.write(json_answer({}))

    async with raw_server(serve) as base, client(base + "/") as (dify, app):
        await dify.api.call(app, "/x?y=z", {"q": "ü"})
    host = base.split("/")[2]
    agent = next(line for line in seen[0].split(b"\r\n") if b"User-Agent" in line)
    assert seen[0] == (
        b"POST /v1/x?y=z HTTP/1.1\r\nHost: %b\r\nAuthorization: Bearer %b\r\n%b\r\n"
        b"Accept-Encoding: identity\r\nContent-Type: application/json\r\n"
        b'Content-Length: 10\r\n\r\n{"q":"\xc3\xbc"}'
        % (host.encode(), KEY.encode(), agent)
    )


# ------------------------------------------------------------------------------
# Faults at every step of a turn
# ------------------------------------------------------------------------------

HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
IDS = {"conversation_id": "c", "message_id": "m", "task_id": "t"}


def event(kind: str, **fields: Any) -> bytes:
    return b"data: " + json.dumps({"event": kind, **IDS, **fields}).encode() + b"\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


HELLO = event("message", answer="Hello")
END = event("message_end", metadata={})


def plain(fields: str, body: bytes, version: str = "1.1") -> Raw:
    """An answer that is not chunked."""
    stream = "Content-Type: text/event-stream\r\n"
    return Raw(f"HTTP/{version} 200 OK\r\n{stream}{fields}\r\n".encode() + body)


FINE = Outcome("Hello", "finish")
REFUSED = Outcome("", "UpstreamFailed", 502)  # a retry can help: nothing ran for sure
UNANSWERED = Outcome("", "NoAnswer", 502)
BROKEN = Outcome("Hello", "UpstreamFailed", 502, is_final=True)
BROKEN_EARLY = Outcome("", "UpstreamFailed", 502, is_final=True)
MISLED = Outcome("", "ConfigurationFault", 502, is_final=True)
LONG = "x" * 8_000_000
SAID = b'data: {"event": "message", "answer": "%b"}\n\n' % LONG[:50_000].encode()

FAULTS: list[Any] = [
    # Before the head
    pytest.param([Close()], UNANSWERED, id="end-before-head"),
    pytest.param([Reset()], UNANSWERED, id="reset-before-head"),
    # In the head
    pytest.param([Raw(HEAD[:20]), Close()], REFUSED, id="end-in-head"),
    pytest.param([Raw(HEAD[:20]), Reset()], REFUSED, id="reset-in-head"),
    # Before the first event
    pytest.param([Raw(HEAD), Close()], BROKEN_EARLY, id="end-after-head"),
    pytest.param([Raw(HEAD), Reset()], BROKEN_EARLY, id="reset-after-head"),
    pytest.param([Raw(HEAD + b"0\r\n\r\n")], BROKEN_EARLY, id="no-event"),
    pytest.param([PING, PING], BROKEN_EARLY, id="only-pings"),
    # In the middle
    pytest.param([message("Hello"), Close()], BROKEN, id="end-in-middle"),
    pytest.param([message("Hello"), Reset()], BROKEN, id="reset-in-middle"),
    pytest.param([message("Hello")], BROKEN, id="last-chunk-in-middle"),
    pytest.param([message("Hello"), PING], BROKEN, id="ping-then-last-chunk"),
    pytest.param(
        [message("Hello"), Send(b"data: {"), Close()], BROKEN, id="end-in-event"
    ),
    pytest.param([message("Hello"), Send(b"data: {")], BROKEN, id="event-not-ended"),
    pytest.param(
        [Raw(HEAD + chunk(HELLO) + b"40\r\ndata:"), Close()], BROKEN, id="end-in-chunk"
    ),
    pytest.param(
        [Raw(HEAD + chunk(HELLO)), Sleep(1), Raw(b"\r\nzz\r\n")],
        BROKEN,
        id="chunk-size-malformed",
    ),
    pytest.param(
        [Raw(HEAD + chunk(HELLO)[:-2]), Sleep(1), Raw(b"0\r\n\r\n")],
        BROKEN,
        id="chunk-overrun",
    ),
    # After the terminal event
    pytest.param(
        [message("Hello"), message_end(), Close()], FINE, id="end-before-last-chunk"
    ),
    pytest.param(
        [message("Hello"), message_end(), Reset()], FINE, id="reset-before-last-chunk"
    ),
    pytest.param(
        [message("Hello"), message_end(), Hang()], FINE, id="stall-before-last-chunk"
    ),
    pytest.param(
        [Raw(HEAD + chunk(HELLO + END) + b"0\r\nX: y\r\n\r\n")], FINE, id="trailer"
    ),
    # Framing
    pytest.param([plain("", HELLO + END), Close()], FINE, id="no-length"),
    pytest.param([plain("", HELLO), Close()], BROKEN, id="no-length-cut"),
    pytest.param([plain("", HELLO + END, "1.0"), Close()], FINE, id="http-1.0"),
    pytest.param(
        [plain(f"Content-Length: {len(HELLO + END)}\r\n", HELLO + END)],
        FINE,
        id="length",
    ),
    pytest.param(
        [plain("Content-Length: 9999\r\n", HELLO), Close()],
        BROKEN,
        id="length-too-long",
    ),
    pytest.param(
        [plain(f"Content-Length: {len(HELLO)}\r\n", HELLO + END)],
        BROKEN,
        id="length-too-short",
    ),
    pytest.param(
        [plain("Content-Length: 9\r\nContent-Length: 8\r\n", HELLO)],
        REFUSED,
        id="two-lengths",
    ),
    pytest.param(
        [plain("Content-Length: 9\r\nTransfer-Encoding: chunked\r\n", HELLO)],
        REFUSED,
        id="two-framings",
    ),
    pytest.param([plain("Transfer-Encoding: gzip\r\n", HELLO)], REFUSED, id="coding"),
    pytest.param(
        [Raw(HEAD.replace(b"text/", b"Text/") + chunk(HELLO + END) + b"0\r\n\r\n")],
        FINE,
        id="upper-case",
    ),
    # Interim responses
    pytest.param(
        [
            Raw(b"HTTP/1.1 100 Continue\r\n\r\n"),
            Raw(
                b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 102 P\r\n\r\n"
            ),
            Raw(HEAD + chunk(HELLO + END) + b"0\r\n\r\n"),
        ],
        FINE,
        id="1xx",
    ),
    *(
        pytest.param(
            [
                Raw(b"HTTP/1.1 102 Processing\r\n\r\n" * number),
                Raw(HEAD + chunk(HELLO + END) + b"0\r\n\r\n"),
            ],
            outcome,
            id=f"{number}-1xx",
        )
        for number, outcome in (
            (MAX_INTERIM_RESPONSES, FINE),
            (MAX_INTERIM_RESPONSES + 1, REFUSED),
        )
    ),
    pytest.param(
        [Raw(b"HTTP/1.1 100 Continue\r\n\r\n"), Close()], REFUSED, id="end-after-1xx"
    ),
    pytest.param(
        [Raw(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n")],
        REFUSED,
        id="101",
    ),
    # Not HTTP
    pytest.param([Raw(b"SSH-2.0-OpenSSH_9.6\r\n"), Close()], REFUSED, id="ssh"),
    pytest.param([Raw(b"\x15\x03\x01\x00\x02\x02\x46"), Close()], REFUSED, id="tls"),
    pytest.param([Raw(b"220 mail ESMTP\r\n\r\n")], REFUSED, id="smtp"),
    pytest.param([Raw(b"HTTP/1.1 200 OK\nA: b\n\n")], REFUSED, id="bare-lf"),
    pytest.param([Raw(b"HTTP/1.1 2OO OK\r\n\r\n")], REFUSED, id="status-no-number"),
    pytest.param([Raw(b"<html>" * 20_000)], REFUSED, id="endless-head"),
    pytest.param(
        [Raw(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 999 + b"\r\n")],
        REFUSED,
        id="too-many-fields",
    ),
    # Not Dify
    pytest.param([Status(200, "<html>web</html>")], MISLED, id="html-200"),
    pytest.param([Status(404, "<html>web</html>")], MISLED, id="html-404"),
    pytest.param([Status(405, "<html>web</html>")], MISLED, id="html-405"),
    pytest.param([Status(502, "<html>nginx</html>")], REFUSED, id="html-502"),
    pytest.param(
        [Status(504, "<html>")], Outcome("", "UpstreamTimeout", 504), id="html-504"
    ),
    pytest.param(
        [Status(413, "<html>")], Outcome("", "BodyTooLarge", 413), id="html-413"
    ),
    pytest.param([Status(204)], MISLED, id="no-content"),
    *(
        pytest.param(
            [Status(status, "", {"Location": "https://evil.example/v1/chat-messages"})],
            MISLED,
            id=f"redirect-{status}",
        )
        for status in (301, 302, 303, 307, 308)
    ),
    pytest.param([Status(307, "", {"Location": ""})], MISLED, id="redirect-nowhere"),
    # Streams that are no streams
    pytest.param(
        [Raw(HEAD + chunk(b"\x1f\x8b\x08\x00\n\n\x00") + b"0\r\n\r\n")],
        BROKEN_EARLY,
        id="gzip",
    ),
    pytest.param(
        [message("Hello"), Send(b"data: {nonsense\n\n"), message_end()],
        BROKEN,
        id="event-not-json",
    ),
    pytest.param(
        [Raw(HEAD + chunk(b": comment\nid: 1\nretry: 5\n\n" + HELLO + END)), Close()],
        FINE,
        id="other-sse-fields",
    ),
    # Sizes
    pytest.param(chat_answer(LONG), Outcome(LONG, "finish"), id="8-mb-line"),
    pytest.param(
        [
            Send({"event": "node_finished", "data": {"outputs": LONG}}),
            *chat_answer("a"),
        ],
        Outcome("a", "finish"),
        id="8-mb-of-no-interest",
    ),
    pytest.param(  # more than is taken at once, and some of it may be refused
        [message("a"), Sleep(1), Send(SAID * 9), message_end()],
        Outcome("a" + LONG[:50_000] * 9, "finish"),
        id="much-at-once",
    ),
]


@pytest.mark.parametrize("takes", ["", "+", "+-"], ids=["read", "carried", "both"])
@pytest.mark.parametrize(("script", "expected"), FAULTS)
async def test_turn_when_dify_fails(
    script: list[Step], expected: Outcome, takes: str
) -> None:
    async with FakeDify(ping_s=NEVER) as fake, client(fake.base) as (dify, app):
        fake.app(KEY, script=script)
        assert await turn(dify, app, takes=takes) == expected
        fake.app(KEY, script=chat_answer("next"))  # what follows is not disturbed
        assert await turn(dify, app) == Outcome("next", "finish")
        asked = [r.path for r in fake.requests if r.path != "/messages"]
        assert asked == ["/chat-messages"] * 2


async def test_text_is_carried_while_the_reading_task_sleeps() -> None:
    pieces = ["a", "b", "", "字", "d"]
    async with FakeDify(ping_s=NEVER) as fake, client(fake.base) as (dify, app):
        fake.app(KEY, script=chat_answer(*pieces, delay=1.0))
        stream = await dify.open_turn(app, "chat", question())
        carried: list[Part] = []

        def carry(parts: list[Part]) -> bool:
            carried.extend(parts)
            return True

        stream.carry_by(carry)
        first, last = await stream.read(), await stream.read()
        stream.close()
    assert first == [Text("a")]  # it came with the head
    assert carried == [Text("b"), Text("字")]
    assert [type(part) for part in last] == [Text, Usage, Finish]


@pytest.mark.parametrize("takes", ["", "+"], ids=["read", "carried"])
async def test_events_after_the_end_do_not_cost_the_connection(takes: str) -> None:
    """What is left of the body is read in peace, though it comes bit by bit."""
    late = Send({"event": "tts_message_end", "audio": ""})
    script = [*chat_answer("a", "b", delay=1.0), Sleep(0.2), late, Sleep(0.2), late]
    async with FakeDify(ping_s=NEVER) as fake, client(fake.base) as (dify, app):
        fake.app(KEY, script=script)
        for _ in range(2):
            assert await turn(dify, app, takes=takes) == Outcome("ab", "finish")
            await asyncio.sleep(1)
        assert fake.connections == 1


async def test_carried_text_keeps_the_stream_from_timing_out() -> None:
    limit = {"DIFY_IDLE_TIMEOUT": "2"}
    async with (
        FakeDify(ping_s=NEVER) as fake,
        client(fake.base, **limit) as (dify, app),
    ):
        fake.app(KEY, script=chat_answer(*"abcdef", delay=1.5))
        assert await turn(dify, app, takes="+") == Outcome("abcdef", "finish")
        fake.app(KEY, script=chat_answer(*"ab", delay=2.5))
        outcome = await turn(dify, app, takes="+")
        assert outcome.end == "UpstreamTimeout"


async def test_endless_line_ends_at_its_limit() -> None:
    part = Send(b"x" * 3_000_000)
    async with FakeDify(ping_s=NEVER) as fake, client(fake.base) as (dify, app):
        fake.app(KEY, script=[message("Hello"), Send(b"data: "), *[part] * 14])
        outcome = await turn(dify, app)
        assert outcome == Outcome("Hello", "UpstreamFailed", 502, is_final=True)


async def test_turn_when_nobody_listens(deaf_port: int) -> None:
    async with client(f"http://127.0.0.1:{deaf_port}/v1") as (dify, app):
        assert await turn(dify, app) == REFUSED


async def test_turn_when_the_host_is_unknown() -> None:
    def connect(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    settings = settings_for("http://no-such-host.invalid/v1")
    dify = Dify(settings, connect)
    with pytest.raises(ProxyError) as caught:
        await dify.api.call(settings.model_config["m"], "/info")
    assert caught.value.status == 502
    assert "no-such-host.invalid" in caught.value.message
    assert "DIFY_API_BASE" in caught.value.message


@pytest.mark.parametrize("turns", range(9))
async def test_attempts_that_fail_together_do_so_though_settings_change(
    turns: int,
) -> None:
    gates = [asyncio.Event(), asyncio.Event()]  # the second is never set
    next_gate = iter(gates).__next__

    async def connect(*_: Any, **__: Any) -> Any:
        await next_gate().wait()
        raise OSError("no route")

    settings = settings_for("http://192.0.2.1/v1")
    dify, app = Dify(settings, connect), settings.model_config["m"]
    calls = [asyncio.ensure_future(dify.api.call(app, "/info")) for _ in gates]
    await some_turns()
    gates[0].set()
    for _ in range(turns):
        await asyncio.sleep(0)
    dify.use(settings)
    ends = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(end) for end in ends] == [UpstreamFailed] * 2


async def test_failure_of_old_settings_is_none_of_the_new() -> None:
    gate = asyncio.Event()
    async with FakeDify() as fake:
        fake.app(KEY)
        settings = settings_for(fake.base)

        async def connect(*address: Any, **options: Any) -> Wire:
            is_old = dify.settings is settings
            await gate.wait()
            if is_old:
                raise OSError("no route")
            return await open_wire(*address, **options)

        dify, app = Dify(settings, connect), settings.model_config["m"]
        old = asyncio.ensure_future(dify.api.call(app, "/info"))
        await some_turns()
        dify.use(settings_for(fake.base))
        new = asyncio.ensure_future(dify.api.call(app, "/info"))
        await some_turns()
        gate.set()
        with pytest.raises(UpstreamFailed):
            await old
        assert (await new)["mode"] == "chat"
        assert (await dify.api.call(app, "/info"))["mode"] == "chat"
        dify.close()


async def test_answer_that_broke_in_the_middle_says_so() -> None:
    """Not "no connection": there was one."""
    for fault in (Close(), Reset(), Send(b"")):
        async with FakeDify(ping_s=NEVER) as fake, client(fake.base) as (dify, app):
            fake.app(KEY, script=[message("Hello"), fault])
            stream = await dify.open_turn(app, "chat", question())
            failures: list[ProxyError] = []
            while parts := await stream.read():
                failures += [part.error for part in parts if isinstance(part, Failure)]
            stream.close()
            assert [failure.message for failure in failures] == [BROKEN_OFF]


@pytest.mark.parametrize("status", [307, 308])
async def test_redirect_within_the_origin_is_followed_once(status: int) -> None:
    def script(request: fake_dify.Request) -> list[Step]:
        if "moved" in request.target:
            return chat_answer("Hello")
        return [Status(status, "", {"Location": "/v1/chat-messages?moved"})]

    async with FakeDify() as fake, client(fake.base) as (dify, app):
        fake.app(KEY, script=script)
        assert await turn(dify, app) == FINE
        bodies = [request.json for request in fake.requests]
        assert bodies == [bodies[0]] * 2


async def test_redirect_in_a_circle_is_not_followed_for_ever() -> None:
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        fake.app(KEY, script=[Status(307, "", {"Location": "/v1/chat-messages"})])
        assert await turn(dify, app) == MISLED
        assert len(fake.requests) <= 2


async def test_redirect_elsewhere_never_takes_the_key_along() -> None:
    async with FakeDify() as fake, FakeDify() as other, client(fake.base) as pair:
        target = f"{other.base}/chat-messages"
        for status in (301, 302, 303, 307, 308):
            fake.app(KEY, script=[Status(status, "", {"Location": target})])
            with pytest.raises(ProxyError) as caught:
                await pair[0].open_turn(pair[1], "chat", question())
            assert "DIFY_API_BASE" in caught.value.message
        assert other.connections == 0


async def test_key_in_an_error_of_dify_is_masked() -> None:
    body = {"code": "bad", "message": f"no {KEY} here", "status": 400}
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        fake.app(KEY, script=[Status(400, body)])
        with pytest.raises(ProxyError) as caught:
            await dify.open_turn(app, "chat", question())
        assert caught.value.message == "no app-ke… here"


@pytest.mark.parametrize(
    ("status", "told", "given"),
    [
        (429, "120", "120"),
        (429, "Wed, 21 Oct 2026 07:28:00 GMT", RETRY_AFTER_S),
        (500, "120", None),
    ],
)
@pytest.mark.parametrize("body", ["<html>", {"message": "slow"}], ids=["page", "json"])
async def test_wait_that_a_gateway_asks_for_is_passed_on(
    body: Any, status: int, told: str, given: str | None
) -> None:
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        fake.app(KEY, script=[Status(status, body, {"Retry-After": told})])
        with pytest.raises(ProxyError) as caught:
            await dify.open_turn(app, "chat", question())
    assert dict(error_headers(caught.value)).get("Retry-After") == given


async def test_small_answers_are_bounded() -> None:
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        fake.app(KEY, overrides={"/info": [Status(500, b"x" * 20_000_000)]})
        with pytest.raises(ProxyError) as caught:
            await dify.api.call(app, "/info")
        assert caught.value.status == 502
        fake.app(KEY)
        assert await dify.api.call(app, "/info")


NO_OBJECT = [
    pytest.param(Status(204), id="no-content"),
    pytest.param(Status(200, b""), id="empty"),
    pytest.param(Status(200, b" \n"), id="blank"),
    pytest.param(Status(200, b'{"user_input_form": ['), id="cut"),
    pytest.param(Status(200, b'{"a": "\xff"}'), id="not-utf-8"),
    pytest.param(Status(200, b"null"), id="null"),
    pytest.param(Status(200, b"[]"), id="list"),
    pytest.param(Status(200, b"<html>"), id="html"),
]


@pytest.mark.parametrize("answer", NO_OBJECT)
async def test_form_that_is_no_object_is_an_error_and_not_kept(answer: Step) -> None:
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        fake.app(KEY, overrides={"/parameters": [answer]})
        with pytest.raises(UpstreamFailed):
            await dify.facts.form_of(app)
        rows = [{"paragraph": {"variable": "text"}}]
        fake.app(KEY, parameters={"user_input_form": rows})
        assert [row.variable for row in (await dify.facts.form_of(app)).inputs] == [
            "text"
        ]


async def test_changed_form_is_known_after_some_minutes() -> None:
    """An app may be edited while it is served."""
    forms = []
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        for name in ("old", "new"):
            rows = [{"paragraph": {"variable": name}}]
            fake.app(KEY, parameters={"user_input_form": rows})
            for _ in range(2):
                forms += [
                    row.variable for row in (await dify.facts.form_of(app)).inputs
                ]
                await asyncio.sleep(FORM_FRESH_S / 2)
            await asyncio.sleep(1)
        assert [row.path for row in fake.requests] == ["/parameters"] * 2
    assert forms == ["old", "old", "new", "new"]


@pytest.mark.parametrize("answer", [Status(204), Status(200, b""), Status(200, b"{}")])
async def test_what_is_no_question_needs_no_answer(answer: Step) -> None:
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        fake.app(KEY, overrides={"stop": [answer]})
        path = stop_path("chat", "t")
        assert await dify.api.call(app, path, {"user": USER}) == {}


# ------------------------------------------------------------------------------
# Timeouts
# ------------------------------------------------------------------------------

LIMITS = {
    "DIFY_CONNECT_TIMEOUT": "7",
    "DIFY_FIRST_EVENT_TIMEOUT": "50",
    "DIFY_IDLE_TIMEOUT": "90",
}


async def timed(script: Sequence[Step], ping_s: float = NEVER) -> tuple[Outcome, float]:
    """The outcome of a turn, and after how many seconds it was there."""
    async with FakeDify(ping_s=ping_s) as fake, client(fake.base, **LIMITS) as pair:
        fake.app(KEY, script=script)
        outcome = await turn(*pair)
        return outcome, now()


async def test_connecting_has_a_limit() -> None:
    async def connect(*_: Any, **__: Any) -> Any:
        await asyncio.Event().wait()

    settings = settings_for("http://192.0.2.1/v1", **LIMITS)
    with pytest.raises(ProxyError) as caught:
        await Dify(settings, connect).api.call(settings.model_config["m"], "/info")
    assert (caught.value.status, caught.value.code) == (504, "upstream_timeout")
    assert now() == 7


NO_HEAD = Outcome("", "UpstreamTimeout", 504)
LATE = Outcome("", "NoFirstEvent", 504)
SILENT = Outcome("Hello", "UpstreamTimeout", 504, is_final=True)


@pytest.mark.parametrize(
    ("script", "ping_s", "expected", "seconds"),
    [
        pytest.param([Hang()], NEVER, NO_HEAD, 50, id="no-head"),
        pytest.param([Raw(HEAD[:9]), Hang()], NEVER, NO_HEAD, 50, id="half-a-head"),
        pytest.param([Send(b""), Hang()], NEVER, LATE, 50, id="head-at-once"),
        pytest.param([Hang()], 10, LATE, 50, id="head-with-late-pings"),
        pytest.param([PING, Hang()], 10, LATE, 50, id="head-with-early-pings"),
        pytest.param(
            [Send(b"data: ping\n\n"), Hang()], NEVER, LATE, 50, id="pings-of-old"
        ),
        pytest.param([Send(b"data: \n\n"), Hang()], NEVER, LATE, 50, id="no-data"),
        pytest.param(
            [Sleep(49), *chat_answer("Hello")], 10, FINE, 49, id="first-event-in-time"
        ),
        pytest.param([message("Hello"), Hang()], NEVER, SILENT, 90, id="idle"),
        pytest.param([message("Hello"), Hang()], 10, SILENT, 90, id="idle-with-pings"),
        pytest.param(
            [message("Hel"), Sleep(89), message("lo"), Sleep(89), message_end()],
            10,
            FINE,
            178,
            id="slow-but-alive",
        ),
        pytest.param(
            [message("Hello"), Sleep(89), Send(b"data: {"), Sleep(2), message_end()],
            NEVER,
            SILENT,
            90,
            id="half-an-event-is-none",
        ),
    ],
)
async def test_turn_has_limits_that_pings_do_not_move(
    script: list[Step], ping_s: float, expected: Outcome, seconds: float
) -> None:
    outcome, took = await timed(script, ping_s)
    assert (outcome, round(took, 3)) == (expected, seconds)


async def test_question_over_a_slow_line_has_its_answer() -> None:
    asked = dify_request("chat", "Hi" * 6_000_000, {"inputs": {}, "user": USER})

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = 0
        while size < len(asked.body["query"]):
            await asyncio.sleep(1)
            size += len(await reader.read(120_000))
        writer.write(HEAD)
        await asyncio.sleep(1)
        writer.write(chunk(HELLO) + chunk(END) + chunk(b""))

    async with raw_server(serve) as base, client(base, **LIMITS) as (dify, app):
        stream = await dify.open_turn(app, "chat", asked)
        assert await read_turn(stream) == FINE
        assert now() > 2 * float(LIMITS["DIFY_FIRST_EVENT_TIMEOUT"])


async def test_call_has_a_limit() -> None:
    async with FakeDify(ping_s=NEVER) as fake, client(fake.base) as (dify, app):
        fake.app(KEY, overrides={"/info": [Hang()]})
        with pytest.raises(ProxyError) as caught:
            await dify.api.call(app, "/info")
        assert (caught.value.status, now()) == (504, 30)


async def test_call_has_a_limit_for_its_body_too() -> None:
    half = Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{")
    async with FakeDify(ping_s=NEVER) as fake, client(fake.base) as (dify, app):
        fake.app(KEY, overrides={"/info": [half, Hang()]})
        with pytest.raises(ProxyError) as caught:
            await dify.api.call(app, "/info")
        assert caught.value.status == 504
        assert now() <= 60


DONE = workflow_finished(outputs={"answer": "Hello"})


def _slowly(data: bytes, pause_s: float) -> Iterator[Step]:
    """An event in four pieces, each after a pause: sources may make it megabytes."""
    size = -(-len(data) // 4)
    for at in range(0, len(data), size):
        yield from (Sleep(pause_s), Send(data[at : at + size]))


@pytest.mark.parametrize(
    ("after", "seconds"),
    [
        pytest.param([Hang()], 1, id="nothing"),
        pytest.param([Sleep(0.9), message_end()], 0.9, id="message-end-in-time"),
        pytest.param([Sleep(5), message_end()], 1, id="message-end-too-late"),
        pytest.param(
            [*_slowly(b'data: {"event": "message_end", "metadata": {}}\n\n', 0.9)],
            3.6,
            id="message-end-in-pieces",
        ),
        pytest.param([Sleep(0.6), PING] * 4 + [Hang()], 1, id="pings"),
        pytest.param([Sleep(0.6), Send(b": alive\n\n")] * 4, 1, id="comments"),
        pytest.param([], 0, id="last-chunk"),
        pytest.param([Close()], 0, id="end"),
        pytest.param([Reset()], 0, id="reset"),
    ],
)
async def test_chatflow_ends_soon_after_workflow_finished(
    after: list[Step], seconds: float
) -> None:
    async with FakeDify(ping_s=NEVER) as fake, client(fake.base) as (dify, app):
        started = Send({"event": "workflow_started"})
        script = [started, message("Hello"), DONE, *after]
        fake.app(KEY, mode="advanced-chat", script=script)
        assert await turn(dify, app, "advanced-chat") == FINE
        assert round(now(), 3) == seconds
        assert [request.path for request in fake.requests] == ["/chat-messages"]


@pytest.mark.parametrize("order", ["old", "new", "lost"])
async def test_chatflow_ends_in_every_order_of_the_last_events(order: str) -> None:
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        script = chatflow_answer("Hel", "lo", order=order)
        fake.app(KEY, mode="advanced-chat", script=script)
        for _ in range(2):
            assert await turn(dify, app, "advanced-chat") == FINE
            await asyncio.sleep(0.1)
        assert fake.connections == 1  # read to the last chunk, and kept


async def test_connection_is_kept_until_the_last_chunk_of_a_body_comes() -> None:
    async with FakeDify(ping_s=NEVER) as fake, client(fake.base) as (dify, app):
        fake.app(KEY, script=[message("Hello"), message_end(), Sleep(1)])
        for connections in (1, 2, 3):  # none is over, and each is kept
            assert await turn(dify, app) == FINE
            assert fake.connections == connections
        await asyncio.sleep(2)
        for _ in range(3):
            assert await turn(dify, app) == FINE
        assert fake.connections == 3


async def test_connection_is_kept_if_the_last_chunk_came_before_it_was_closed() -> None:
    """A client may take its time for the last text."""
    async with FakeDify(ping_s=NEVER) as fake, client(fake.base) as (dify, app):
        fake.app(KEY, script=[message("Hello"), message_end(), Sleep(1)])
        for _ in range(2):
            stream = await dify.open_turn(app, "chat", question())
            while not stream.reader.is_finished:
                await stream.read()
            await asyncio.sleep(2)
            stream.close()
        assert fake.connections == 1


async def test_connection_that_lacks_a_last_chunk_is_used_behind_others() -> None:
    async with FakeDify(ping_s=NEVER) as fake, client(fake.base) as (dify, app):
        fake.app(KEY, script=[message("Hello"), message_end(), Sleep(1)])
        assert await turn(dify, app) == FINE
        for _ in range(3):
            await dify.api.call(app, "/info")
        assert fake.connections == 2


@pytest.mark.parametrize("ends", [True, False])
async def test_connection_is_closed_if_no_last_chunk_comes(
    ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes instead is no chunk, or too much."""
    monkeypatch.setattr("opendify.MAX_JSON_BYTES", 1000)
    opened = closed = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened, closed
        opened += 1
        await read_request(reader)
        writer.write(HEAD + chunk(HELLO + END if ends else b"x" * 1001))
        await asyncio.sleep(1)
        writer.write(b"none" if ends else b"")
        await reader.read()
        closed += 1

    async with raw_server(serve) as base, client(base) as (dify, app):
        if ends:
            assert await turn(dify, app) == FINE
            await asyncio.sleep(2)
        with pytest.raises(UpstreamFailed):
            await dify.api.call(app, "/info")
        await asyncio.sleep(2)
        assert opened == closed == 1 + ends


async def test_body_that_does_not_end_keeps_no_other_connection_from_use() -> None:
    async with FakeDify(ping_s=NEVER) as fake, client(fake.base) as (dify, app):
        for ends_after_s in (10, 0.1, 0.1, 0.1):
            script = [message("Hello"), message_end(), Sleep(ends_after_s)]
            fake.app(KEY, script=script)
            assert await turn(dify, app) == FINE
            await asyncio.sleep(1)
        assert fake.connections == 2


# ------------------------------------------------------------------------------
# A broken stream: what Dify has stored
# ------------------------------------------------------------------------------


def stored(answer: str, **fields: Any) -> dict[str, Any]:
    """An override of `/messages`: the last turn with this answer."""

    def messages(request: fake_dify.Request) -> list[Step]:
        asked = {name: request.query[name] for name in ("conversation_id", "user")}
        assert asked == {"conversation_id": "c", "user": USER}
        row = {"id": "m", "answer": answer, **fields}
        page = {"data": [{"id": "other", "answer": "no"}, row, None], "limit": 5}
        return [Status(200, page)]

    return {"/messages": messages}


BREAKS: list[Any] = [
    pytest.param([Raw(HEAD + chunk(HELLO)), Close()], id="end"),
    pytest.param([Raw(HEAD + chunk(HELLO)), Reset()], id="reset"),
    pytest.param([Raw(HEAD + chunk(HELLO) + b"0\r\n\r\n")], id="last-chunk"),
]


@pytest.mark.parametrize("script", BREAKS)
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        pytest.param(
            stored("Hello world"), Outcome("Hello world", "finish"), id="more"
        ),
        pytest.param(stored("Hello"), FINE, id="all"),
        pytest.param(stored("Hell"), BROKEN, id="less"),
        pytest.param(stored("Other text"), BROKEN, id="other"),
        pytest.param(stored(""), BROKEN, id="nothing"),
        pytest.param(stored("Hello", id="m2"), BROKEN, id="other-message"),
        pytest.param(stored("Hello wor", status="error"), BROKEN, id="failed"),
        pytest.param(stored("Hello", status="normal"), FINE, id="normal"),
        pytest.param({"/messages": [Status(404, {"code": "x"})]}, BROKEN, id="404"),
        pytest.param({"/messages": [Status(200, {"data": 5})]}, BROKEN, id="odd"),
        pytest.param({"/messages": [Status(200, "<html>")]}, BROKEN, id="html"),
        pytest.param({"/messages": [Reset()]}, BROKEN, id="reset"),
    ],
)
async def test_broken_stream_is_completed_by_what_dify_stored(
    script: list[Step], overrides: dict[str, Any], expected: Outcome
) -> None:
    async with FakeDify(ping_s=NEVER) as fake, client(fake.base) as (dify, app):
        fake.app(KEY, script=script, overrides=overrides)
        assert await turn(dify, app) == expected
        if expected is BROKEN:  # its run may go on
            await fake.until(lambda: fake.requests[-1].path.endswith("/stop"))
        await asyncio.sleep(1)
        assert bool(fake.stops) == (expected is BROKEN)


async def test_silent_stream_is_not_completed() -> None:
    """The run may go on: what is stored is not the end of it."""
    async with FakeDify(ping_s=NEVER) as fake, client(fake.base) as (dify, app):
        script = [Raw(HEAD + chunk(HELLO)), Hang()]
        fake.app(KEY, script=script, overrides=stored("Hello world"))
        assert await turn(dify, app) == SILENT
        assert [request.path for request in fake.requests] == ["/chat-messages"]


# ------------------------------------------------------------------------------
# Stop, read on, let go
# ------------------------------------------------------------------------------


async def test_run_that_has_ended_is_not_stopped() -> None:
    """Its client may leave while the pacer still has text."""
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        fake.app(KEY)
        stream = await dify.open_turn(app, "chat", question("chat"))
        while await stream.read():
            pass
        await stream.end()
        assert [request.path for request in fake.requests] == ["/chat-messages"]


async def test_stream_that_is_closed_before_its_end_is_not_read_on() -> None:
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        fake.app(KEY, script=[message("Hello"), Hang()])
        stream = await dify.open_turn(app, "chat", question())
        assert await stream.read() == [Text("Hello")]
        stream.close()
        assert not dify.background


@pytest.mark.parametrize("mode", ["chat", "agent-chat", "advanced-chat", "completion"])
async def test_stop_ends_the_run_and_the_answer_is_stored(mode: str) -> None:
    kind = "agent_message" if mode == "agent-chat" else "message"
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        script = [Send({"event": kind, "answer": "Hello"}), Hang()]
        fake.app(KEY, mode=mode, script=script)
        stream = await dify.open_turn(app, mode, question(mode))
        assert await stream.read() == [Text("Hello")]
        assert await stream.end() == (mode != "agent-chat")
        (stop,) = fake.stops
        path = "completion" if mode == "completion" else "chat"
        assert stop == fake_dify.Stop(
            stream.reader.task_id,
            USER,
            KEY,
            f"/{path}-messages/{stream.reader.task_id}/stop",
            effective=True,
        )
        assert now() < 2
        if mode != "completion":
            (conversation,) = fake.conversations.values()
            assert [m.answer for m in conversation.messages] == ["Hello"]


@pytest.mark.parametrize("is_carried", [False, True])
@pytest.mark.parametrize("has_more", [False, True])
async def test_end_tells_whether_more_text_came(
    is_carried: bool, has_more: bool
) -> None:
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        gate = asyncio.Event()
        more = [Sleep(0.5), message("lo" if has_more else ""), Sleep(0.5)]
        script = [message("Hel"), Wait(gate), *more, message_end()]
        fake.app(KEY, script=script, stoppable=False)
        stream = await dify.open_turn(app, "chat", question())
        assert await stream.read() == [Text("Hel")]
        if is_carried:
            stream.carry_by(lambda parts: True)
        gate.set()
        assert await stream.end() is not has_more


@pytest.mark.parametrize(
    "script",
    [
        pytest.param([message("Hello"), Hang()], id="silent"),
        pytest.param(
            [message("Hello"), *[step for _ in range(99) for step in (Sleep(3), PING)]],
            id="pings",
        ),
        pytest.param(
            [message("Hello")]
            + [step for _ in range(99) for step in (Sleep(3), message("more"))],
            id="talking-on",
        ),
    ],
)
async def test_end_is_brief_when_the_run_does_not_stop(script: list[Step]) -> None:
    async with FakeDify(ping_s=NEVER) as fake, client(fake.base) as (dify, app):
        fake.app(KEY, script=script, stoppable=False)
        stream = await dify.open_turn(app, "chat", question())
        assert await stream.read() == [Text("Hello")]
        assert not await stream.end()
        assert now() <= STOP_DRAIN_S


async def test_stop_that_fails_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        refusal = [Status(500, "<html>")]
        fake.app(KEY, script=[message("Hello"), Hang()], overrides={"stop": refusal})
        stream = await dify.open_turn(app, "chat", question())
        await stream.read()
        await stream.stop()
        stream.close()
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert KEY not in record.getMessage()


async def test_turn_that_is_let_go_closes_its_connection() -> None:
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        fake.app(KEY, script=[message("Hello"), Hang()])
        stream = await dify.open_turn(app, "chat", question())
        await stream.read()
        stream.close()
        await fake.until(lambda: fake.open_connections == 0)


async def test_end_of_a_finished_turn_is_waited_for_beside() -> None:
    gate = asyncio.Event()
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        fake.app(KEY, script=[message("Hello"), message_end(), Wait(gate)])
        assert await turn(dify, app) == FINE
        assert fake.open_connections == 1
        gate.set()
        await asyncio.sleep(0.1)
        await dify.api.call(app, "/info")
        assert fake.connections == 1


# ------------------------------------------------------------------------------
# Uploads
# ------------------------------------------------------------------------------


async def test_upload_arrives_byte_for_byte() -> None:
    data = bytes(range(256)) * 40_000  # 10 MB, with every byte there is
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        fake.app(KEY)
        file = Attachment("image.png", "image/png", data)
        id_ = await dify.upload(app, file, "üser")
        assert fake.uploads == {
            id_: fake_dify.Upload(id_, KEY, "üser", "image.png", "image/png", data)
        }


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("is_tls", [False, True])
async def test_upload_over_a_slow_line_has_the_time_that_it_needs(is_tls: bool) -> None:
    data = bytes(24_000_000)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = 0
        while size < len(data):
            await asyncio.sleep(1)
            size += len(await reader.read(120_000))
        writer.write(json_answer({"id": "f"}))

    tls = tls_context("localhost") if is_tls else None
    async with raw_server(serve, tls) as base, client(base) as (dify, app):
        assert await dify.upload(app, Attachment("a.png", "", data), USER) == "f"
        assert now() > 1.5 * UPLOAD_TIMEOUT_S


async def send_pieces(dify: Dify, app: AppSettings, every_s: float = 0) -> Any:
    """Send a file in four pieces; return what Dify answers."""
    pieces = iter([b"x"] * 4)

    async def read() -> bytes:
        await asyncio.sleep(every_s)
        return next(pieces, b"")

    file = Attachment("a.png", "image/png")
    return await dify.send_file(app, "/files/upload", file, read, lambda: USER)


async def test_upload_of_a_slow_client_has_the_time_that_it_needs() -> None:
    almost_s = UPLOAD_TIMEOUT_S - 1
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        script = [Sleep(almost_s), Status(201, {"id": "f"})]
        fake.app(KEY, overrides={"/files/upload": script})
        assert await send_pieces(dify, app, every_s=almost_s) == {"id": "f"}
        assert now() == 6 * almost_s


@pytest.mark.parametrize(
    "interim", [b"100 Continue\r\n", b"103 Early Hints\r\nA: b\r\n"]
)
@pytest.mark.parametrize("refuses", [False, True])
async def test_only_the_final_response_ends_an_upload(
    interim: bytes, refuses: bool
) -> None:
    """Some servers send interim ones though nobody has asked for them."""
    sent: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 %b\r\n" % interim * 2)
        writer.write(json_answer({"id": "f"}) if refuses else b"")
        sent.append(await reader.readuntil(b"\r\n0\r\n\r\n"))
        writer.write(json_answer({"id": "f"}))

    async with raw_server(serve) as base, client(base) as (dify, app):
        assert await send_pieces(dify, app, every_s=1) == {"id": "f"}
    assert len(sent) == (not refuses)


@pytest.mark.parametrize(("option", "count"), [("keep-alive", 1), ("close", 2)])
async def test_connection_of_an_upload_is_used_again_unless_the_answer_says_close(
    option: str, count: int
) -> None:
    answer = json_answer({"id": "f"}, f"Connection: {option}")
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        fake.app(KEY, overrides={"/files/upload": [Raw(answer)]})
        assert await send_pieces(dify, app) == {"id": "f"}
        await dify.api.call(app, "/info")
        assert fake.connections == count


async def test_connection_is_closed_when_the_client_leaves_after_an_early_answer() -> (
    None
):
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(json_answer({}))
        with contextlib.suppress(OSError):
            while await reader.read(1000):
                pass
        ended.set()

    async def read() -> bytes:
        await asyncio.sleep(0.1)
        raise ConnectionBroken

    file = Attachment("a.bin", "image/png")
    async with raw_server(serve) as base, client(base) as (dify, app):
        with pytest.raises(ConnectionBroken):
            await dify.send_file(app, "/files/upload", file, read, lambda: USER)
        await asyncio.wait_for(ended.wait(), 1)


async def test_nobody_can_write_a_part_of_an_upload() -> None:
    """Who knew the boundary could: in a file, or in a user's name."""
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        fake.app(KEY)
        for _ in range(2):
            await dify.upload(app, Attachment("a.png", "image/png", b"x"), USER)
        kinds = {request.headers["content-type"] for request in fake.requests}
        assert len(kinds) == 2


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (Status(413, {"code": "file_too_large", "message": ""}), 413),
        (Status(415, {"code": "unsupported_file_type", "message": "no"}), 400),
        (Status(500, "<html>"), 502),
        (Status(201, {}), 502),
        (Status(201, "<html>"), 502),
        (Reset(), 502),
    ],
)
async def test_upload_that_fails(answer: Step, status: int) -> None:
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        fake.app(KEY, overrides={"/files/upload": [answer]})
        with pytest.raises(ProxyError) as caught:
            await dify.upload(app, Attachment("a.png", "image/png", b"x"), USER)
        assert caught.value.status == status


# ------------------------------------------------------------------------------
# The mode of an app
# ------------------------------------------------------------------------------

MODES = ["chat", "agent-chat", "advanced-chat", "completion", "workflow"]


@pytest.mark.parametrize("mode", [*MODES, "agent"])
async def test_mode_is_told_by_info_and_kept(mode: str) -> None:
    async with (
        FakeDify(version="1.16.0") as fake,
        client(fake.base, mode="") as (dify, app),
    ):
        fake.app(KEY, mode=mode, name="Name")
        assert dify.facts.of(app).name == ""
        assert [await dify.facts.mode_of(app) for _ in range(3)] == [mode] * 3
        assert dify.facts.of(app).name == "Name"
        assert [request.path for request in fake.requests] == ["/info"]


@pytest.mark.parametrize("mode", MODES)
async def test_mode_is_probed_before_1_4_without_running_anything(mode: str) -> None:
    async with (
        FakeDify(version="1.3.1") as fake,
        client(fake.base, mode="") as (dify, app),
    ):
        fake.app(KEY, mode=mode)
        expected = "chat" if mode in fake_dify.CHAT_MODES else mode
        assert [await dify.facts.mode_of(app) for _ in range(2)] == [expected] * 2
        paths = [request.path for request in fake.requests]
        assert paths[:2] == ["/info", "/conversations"]
        assert len(paths) == (2 if expected == "chat" else 3)
        assert fake.contexts == []


async def test_configured_mode_is_not_asked_for() -> None:
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        assert await dify.facts.mode_of(app) == "chat"
        assert fake.requests == []


async def test_mode_is_that_of_the_newest_settings() -> None:
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        assert await dify.facts.mode_of(app) == "chat"
        dify.use(settings_for(fake.base))
        changed = dataclasses.replace(app, mode="advanced-chat")
        assert await dify.facts.mode_of(changed) == "advanced-chat"


async def test_wrong_mode_is_corrected() -> None:
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        fake.app(KEY, mode="workflow")
        assert await dify.facts.mode_of(app) == "chat"
        assert (await turn(dify, app)).end == "WrongMode"
        assert await dify.facts.ask_mode(app) == "workflow"
        assert await dify.facts.mode_of(app) == "workflow"


@pytest.mark.parametrize("mode", ["", "chat"])
async def test_right_mode_is_confirmed(mode: str) -> None:
    async with FakeDify() as fake, client(fake.base, mode=mode) as (dify, app):
        fake.app(KEY)
        assert await dify.facts.confirmed_mode(app) == "chat"
        assert dify.facts.of(app).version == "1.12.1"


async def test_wrong_mode_is_not_confirmed() -> None:
    async with FakeDify() as fake, client(fake.base) as (dify, app):
        fake.app(KEY, mode="agent-chat")
        with pytest.raises(ConfigurationFault, match="but the app is agent-"):
            await dify.facts.confirmed_mode(app)


async def test_configured_mode_is_believed_before_1_4() -> None:
    async with (
        FakeDify(version="1.3.1") as fake,
        client(fake.base, mode="workflow") as (dify, app),
    ):
        fake.app(KEY, mode="chat")
        assert await dify.facts.confirmed_mode(app) == "workflow"


async def test_unknown_mode_is_probed() -> None:
    async with FakeDify() as fake, client(fake.base, mode="") as (dify, app):
        info = [Status(200, {"name": "n", "mode": "channel"})]
        fake.app(KEY, mode="completion", overrides={"/info": info})
        assert await dify.facts.mode_of(app) == "completion"


@pytest.mark.parametrize("fault", [Reset(), Status(500, "<html>"), Status(503)])
async def test_mode_is_asked_again_after_a_failure(fault: Step) -> None:
    async with FakeDify() as fake, client(fake.base, mode="") as (dify, app):
        fake.app(KEY, mode="workflow", overrides={"/info": [fault]})
        with pytest.raises(ProxyError):
            await dify.facts.mode_of(app)
        fake.app(KEY, mode="workflow")
        assert await dify.facts.mode_of(app) == "workflow"


async def test_failing_probe_decides_nothing() -> None:
    """A 500 is not a mode: "chat" would be remembered for ever."""
    async with (
        FakeDify(version="1.3.1") as fake,
        client(fake.base, mode="") as (dify, app),
    ):
        down = {"/conversations": [Status(500, {"code": "internal_server_error"})]}
        fake.app(KEY, mode="workflow", overrides=down)
        with pytest.raises(ProxyError):
            await dify.facts.mode_of(app)
        fake.app(KEY, mode="workflow")
        assert await dify.facts.mode_of(app) == "workflow"


async def test_wrong_key_is_the_operators_fault() -> None:
    async with FakeDify() as fake, client(fake.base, mode="") as (dify, app):
        with pytest.raises(ProxyError) as caught:
            await dify.facts.mode_of(app)
        error = caught.value
        assert outcome_of("", error) == MISLED
        assert "MODEL_CONFIG" in error.message
        assert KEY not in error.message
        assert len(fake.requests) == 1


# ------------------------------------------------------------------------------
# TLS
# ------------------------------------------------------------------------------
#
# data/tls holds a private authority and certificates signed by it, valid to 2126 (but
# for the expired one), and an authority with one as `openssl req` and `openssl x509`
# make them. They serve these tests and nothing else.


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the tests' authority the one that is trusted."""
    monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "authority.pem"))
    return iter(())


def tls_context(certificate: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / f"{certificate}.pem")
    return context


async def answer_info(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    while await read_request(reader):
        writer.write(json_answer({"name": "n"}))


@contextlib.contextmanager
def quiet_loop() -> Iterator[None]:
    """The server's side of a refused handshake is an error in the loop, no bug."""
    loop = asyncio.get_running_loop()
    handler = loop.get_exception_handler()
    loop.set_exception_handler(
        lambda loop, context: (
            None
            if isinstance(context.get("exception"), OSError)
            else handler and handler(loop, context)
        )
    )
    yield


async def fails(base: str, **variables: str) -> ProxyError:
    async with client(base, **variables) as (dify, app):
        with pytest.raises(ProxyError) as caught:
            await dify.api.call(app, "/info")
        return caught.value


@pytest.mark.real_clock
async def test_authority_is_trusted_from_when_the_settings_name_it() -> None:
    async with contextlib.AsyncExitStack() as stack:
        serving = raw_server(answer_info, tls_context("localhost"))
        base = await stack.enter_async_context(serving)
        dify, app = await stack.enter_async_context(client(base))
        with quiet_loop(), pytest.raises(ProxyError):
            await dify.api.call(app, "/info")
        dify.use(settings_for(base, DIFY_CA_FILE=str(TLS / "authority.pem")))
        assert await dify.api.call(app, "/info") == {"name": "n"}


@pytest.mark.real_clock
async def test_home_made_authority_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lacks a Key Usage, and its certificate the authority's key: RFC 5280's forms.

    Python 3.13 and later ask for them, and so does every Python here.
    """
    make_context = ssl.create_default_context

    def make_strict_context() -> ssl.SSLContext:
        context = make_context()
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    monkeypatch.setattr(ssl, "create_default_context", make_strict_context)
    async with contextlib.AsyncExitStack() as stack:
        serving = raw_server(answer_info, tls_context("home-made"))
        base = await stack.enter_async_context(serving)
        here = client(base, DIFY_CA_FILE=str(TLS / "home-authority.pem"))
        dify, app = await stack.enter_async_context(here)
        assert await dify.api.call(app, "/info") == {"name": "n"}


@pytest.mark.real_clock
async def test_authority_is_trusted_from_when_its_file_has_it(tmp_path: Path) -> None:
    """An authority is renewed in its place, or could not be read at first."""
    ca = tmp_path / "ca.pem"
    ca.write_bytes((TLS / "other-host.pem").read_bytes())
    async with contextlib.AsyncExitStack() as stack:
        serving = raw_server(answer_info, tls_context("localhost"))
        base = await stack.enter_async_context(serving)
        here = client(base, DIFY_CA_FILE=str(ca))
        dify, app = await stack.enter_async_context(here)
        with quiet_loop(), pytest.raises(ProxyError):
            await dify.api.call(app, "/info")
        ca.write_bytes((TLS / "authority.pem").read_bytes())
        # By another name, for which nobody has failed just now.
        again = dataclasses.replace(app, base=base.replace("127.0.0.1", "localhost"))
        assert await dify.api.call(again, "/info") == {"name": "n"}


@pytest.mark.real_clock
@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_tls_connection_is_made_and_reused(host: str) -> None:
    accepted = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        accepted += 1
        await answer_info(reader, writer)

    async with contextlib.AsyncExitStack() as stack:
        base = await stack.enter_async_context(
            raw_server(serve, tls_context("localhost"))
        )
        named = client(base.replace("127.0.0.1", host))
        dify, app = await stack.enter_async_context(named)
        for _ in range(3):
            assert await dify.api.call(app, "/info") == {"name": "n"}
    assert accepted == 1


@pytest.mark.parametrize("is_kept", [False, True])
async def test_tls_connection_ends_though_its_peer_says_no_goodbye(
    is_kept: bool,
) -> None:
    """Before Python 3.11, asyncio would wait for it for ever."""
    peers: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()

    def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        peers.put_nowait(writer)

    server = await asyncio.start_server(
        accept, "127.0.0.1", 0, ssl=tls_context("localhost")
    )
    async with server:
        address = server.sockets[0].getsockname()
        trust = ssl.create_default_context(cafile=str(TLS / "authority.pem"))
        wire = await open_wire(*address, ssl=trust, server_hostname="localhost")
        peer = await peers.get()
        wire.on_leave = wire.close if is_kept else None  # by a pool
        wire.close()
        await asyncio.sleep(WRITE_TIMEOUT_S + 1)
        assert wire._is_lost
        peer.transport.abort()
        await asyncio.sleep(0.1)


@pytest.mark.real_clock
@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize(
    ("certificate", "reason"),
    [
        ("expired", "expired. Have it renewed, or set this machine's clock."),
        ("other-host", "not valid for '127.0.0.1'. Name the host that it is for in "),
    ],
)
async def test_tls_refuses_a_certificate(certificate: str, reason: str) -> None:
    with quiet_loop():
        async with raw_server(answer_info, tls_context(certificate)) as base:
            error = await fails(base)
    assert outcome_of("", error) == MISLED
    assert reason in error.message


@pytest.mark.real_clock
async def test_tls_refuses_an_unknown_authority(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with quiet_loop():
        async with raw_server(answer_info, tls_context("localhost")) as base:
            error = await fails(base)
    assert outcome_of("", error) == MISLED
    for cure in ("DIFY_CA_FILE", "Install Certificates.command", "ca-certificates"):
        assert cure in error.message


@pytest.mark.real_clock
async def test_tls_on_a_plain_port_names_the_setting() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(9)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    async with raw_server(serve) as base:
        error = await fails(base.replace("http:", "https:"))
    assert outcome_of("", error)[:3] == ("", "UpstreamFailed", 502)
    assert "DIFY_API_BASE" in error.message


@pytest.mark.real_clock
async def test_plain_request_on_a_tls_port_names_the_setting() -> None:
    with quiet_loop():
        async with raw_server(answer_info, tls_context("localhost")) as base:
            error = await fails(base.replace("https:", "http:"))
    assert outcome_of("", error)[:3] == ("", "NoAnswer", 502)
    assert "check the scheme in DIFY_API_BASE" in error.message


@pytest.mark.real_clock
async def test_server_that_shakes_no_hand_names_the_setting() -> None:
    async def serve(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    async with raw_server(serve) as base:
        error = await fails(base.replace("http:", "https:"), DIFY_CONNECT_TIMEOUT="0.2")
    assert outcome_of("", error)[:3] == ("", "UpstreamTimeout", 504)
    assert "accepts no connection in time; check DIFY_API_BASE" in error.message


@pytest.mark.real_clock
async def test_handshake_that_is_cut_off_is_an_error() -> None:
    async def serve(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read(9)

    async with raw_server(serve) as base:
        error = await fails(base.replace("http:", "https:"))
    assert outcome_of("", error)[:3] == ("", "UpstreamFailed", 502)


@pytest.mark.real_clock
@pytest.mark.usefixtures("trusted")
async def test_tls_connection_cut_off_in_the_middle_is_broken() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(HEAD + chunk(HELLO))
        await writer.drain()
        if (await reader.read(0)) == b"":
            writer.transport.abort()

    tls = tls_context("localhost")
    async with raw_server(serve, tls) as base, client(base) as (dify, app):
        assert await turn(dify, app) == BROKEN
