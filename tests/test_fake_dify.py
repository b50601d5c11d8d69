"""The fake Dify against the recordings' facts, and the clock that tests run on."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import fake_dify as fake
import pytest
from clock import Deadlock, now
from fake_dify import FakeDify

JSON = "Content-Type: application/json\r\n"


class Client:
    """One connection to the fake, at the level of bytes."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.reader = reader
        self.writer = writer

    def send(
        self, method: str, path: str, body: Any = None, key: str = "app-key"
    ) -> None:
        """Send one request."""
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} /v1{path} HTTP/1.1\r\nHost: x\r\n{JSON}"
        head += f"Authorization: Bearer {key}\r\nContent-Length: {len(data)}\r\n\r\n"
        self.writer.write(head.encode() + data)

    async def head(self) -> str:
        """Read a response head."""
        return (await self.reader.readuntil(b"\r\n\r\n")).decode()

    async def chunk(self) -> bytes:
        """Read one chunk; the last one is empty."""
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def events(self) -> list[bytes]:
        """Read all chunks of a stream."""
        chunks = [await self.chunk()]
        while chunks[-1]:
            chunks.append(await self.chunk())
        return chunks[:-1]

    async def json(self) -> tuple[int, Any]:
        """Read a whole JSON response: status and body."""
        head = await self.head()
        size = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
        return int(head.split()[1]), json.loads(await self.reader.readexactly(size))


@contextlib.asynccontextmanager
async def client_of(dify: FakeDify) -> AsyncIterator[Client]:
    """Give a connection to the fake."""
    port = int(dify.base.split(":")[2].split("/")[0])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def ask(query: str = "Hi", **more: Any) -> dict[str, Any]:
    """Return the body of a streaming chat request."""
    body = {"inputs": {}, "query": query, "response_mode": "streaming", "user": "al"}
    return {**body, **more}


def events_of(chunks: list[bytes]) -> list[dict[str, Any]]:
    """Return the parsed events of a stream, without pings."""
    return [json.loads(chunk[6:]) for chunk in chunks if chunk.startswith(b"data: ")]


def text_of(chunks: list[bytes]) -> str:
    """Return the text of a chat stream."""
    return "".join(event.get("answer", "") for event in events_of(chunks))


async def turn(dify: FakeDify, body: dict[str, Any] | None = None) -> list[bytes]:
    """Return the chunks of one turn on a fresh connection."""
    async with client_of(dify) as client:
        client.send("POST", "/chat-messages", body or ask())
        await client.head()
        return await client.events()


async def test_clock_jumps_over_every_wait() -> None:
    loop = asyncio.get_running_loop()
    assert loop.time() == 0
    await asyncio.sleep(3600)
    assert loop.time() == pytest.approx(3600)


async def test_clock_finds_a_deadlock() -> None:
    with pytest.raises(Deadlock):
        asyncio.get_running_loop().jumping.select(None)  # type: ignore[attr-defined]


async def test_clock_waits_for_threads() -> None:
    gate = asyncio.Event()
    await asyncio.get_running_loop().run_in_executor(None, gate.set)
    assert gate.is_set()


@pytest.mark.real_clock
async def test_chat_stream_has_the_recorded_shape() -> None:
    async with FakeDify() as dify, client_of(dify) as client:
        dify.app("app-key")
        client.send("POST", "/chat-messages", ask())
        head = await client.head()
        first, *_, last = events_of(await client.events())
    assert head.startswith("HTTP/1.1 200 OK\r\nServer: gunicorn\r\n")
    assert "X-Version: 1.12.1\r\nX-Env: PRODUCTION\r\n\r\n" in head
    assert list(first) == [
        "event",
        "conversation_id",
        "message_id",
        "created_at",
        "task_id",
        "id",
        "answer",
        "from_variable_selector",
    ]
    assert list(last)[5:] == ["id", "metadata", "files"]
    assert last["metadata"]["usage"]["total_tokens"] == 22


async def test_old_releases_write_ascii_with_spaces_and_no_mode() -> None:
    async with FakeDify() as dify, client_of(dify) as client:
        script = fake.chat_answer("é")
        dify.app("app-key", version="0.15.3", script=script)
        chunks = await turn(dify)
        client.send("GET", "/info")
        _, info = await client.json()
    assert b'"answer": "\\u00e9"' in chunks[0]
    assert "mode" not in info


@pytest.mark.parametrize(
    ("mode", "path", "code"),
    [
        ("completion", "/chat-messages", "not_chat_app"),
        ("chat", "/completion-messages", "app_unavailable"),
        ("advanced-chat", "/workflows/run", "not_workflow_app"),
    ],
)
async def test_wrong_endpoint(mode: str, path: str, code: str) -> None:
    async with FakeDify() as dify, client_of(dify) as client:
        dify.app("app-key", mode=mode)
        client.send("POST", path, ask())
        status, body = await client.json()
    assert (status, body["code"]) == (400, code)


async def test_unknown_key() -> None:
    async with FakeDify() as dify, client_of(dify) as client:
        client.send("GET", "/info", key="app-other")
        status, body = await client.json()
    assert status == 401
    assert body["message"] == "Access token is invalid"


async def test_memory_is_of_one_user_and_app() -> None:
    async with FakeDify() as dify:
        dify.app("app-key", memory=True)
        first = await turn(dify, ask("one"))
        known = events_of(first)[0]["conversation_id"]
        await turn(dify, ask("two", conversation_id=known))
        async with client_of(dify) as client:
            bob = ask("three", conversation_id=known, user="bob")
            client.send("POST", "/chat-messages", bob)
            status, body = await client.json()
    assert text_of(first) == "Answer 1. The model was shown: user: one"
    assert dify.contexts[1] == [
        ("user", "one"),
        ("assistant", text_of(first)),
        ("user", "two"),
    ]
    assert status == 404
    assert body["message"].startswith("Conversation Not Exists.")


@pytest.mark.parametrize("drains", [True, False])
async def test_stopped_answer_is_stored_only_if_read_to_its_end(drains: bool) -> None:
    async with FakeDify() as dify:
        script = [fake.message("w0 "), fake.message("w1 "), fake.Hang()]
        dify.app("app-key", memory=True, script=script)
        async with client_of(dify) as client, client_of(dify) as other:
            client.send("POST", "/chat-messages", ask())
            await client.head()
            task_id = events_of([await client.chunk()])[0]["task_id"]
            await client.chunk()
            other.send("POST", f"/chat-messages/{task_id}/stop", {"user": "al"})
            assert await other.json() == (200, {"result": "success"})
            if drains:
                end = events_of(await client.events())[-1]
                assert end["event"] == "message_end"
                assert end["metadata"]["usage"]["total_tokens"] == 0
        await dify.until(lambda: not dify.running)
        (conversation,) = dify.conversations.values()
    assert dify.stops[0].effective
    assert conversation.messages[0].answer == ("w0 w1" if drains else "")


async def test_abandoned_answer_is_stored_empty() -> None:
    async with FakeDify() as dify:
        dify.app("app-key", memory=True, script=[fake.message("w0 "), fake.Hang()])
        async with client_of(dify) as client:
            client.send("POST", "/chat-messages", ask())
            await client.head()
        await dify.until(lambda: dify.connections and not dify.open_connections)
        (conversation,) = dify.conversations.values()
    assert conversation.messages[0].answer == ""


async def test_flow_endings_by_order() -> None:
    ends = {}
    async with FakeDify() as dify:
        for order in ("old", "new", "lost"):
            script = fake.chatflow_answer("Hi", order=order)
            dify.app("app-key", mode="advanced-chat", script=script)
            events = events_of(await turn(dify))
            ends[order] = [event["event"] for event in events[-2:]]
    assert ends == {
        "old": ["workflow_finished", "message_end"],
        "new": ["message_end", "workflow_finished"],
        "lost": ["node_finished", "workflow_finished"],
    }


async def test_pings_while_nothing_is_said() -> None:
    async with FakeDify() as dify, client_of(dify) as client:
        dify.app("app-key", script=[fake.Sleep(25), *fake.chat_answer("Hi")])
        client.send("POST", "/chat-messages", ask())
        await client.head()
        chunks = await client.events()
    assert chunks[:2] == [b"event: ping\n\n"] * 2
    assert text_of(chunks) == "Hi"


async def test_faults_of_the_connection() -> None:
    async with FakeDify() as dify:
        dify.app("app-key", script=[fake.message("a"), fake.Close()])
        async with client_of(dify) as client:
            client.send("POST", "/chat-messages", ask())
            await client.head()
            await client.chunk()
            assert await client.reader.read() == b""
        dify.app("app-key", script=[fake.Reset()])
        async with client_of(dify) as client:
            client.send("POST", "/chat-messages", ask())
            with pytest.raises(ConnectionResetError):
                await client.reader.read()
        dify.app("app-key", script=[fake.Status(502, "<html>")])
        async with client_of(dify) as client:
            client.send("POST", "/chat-messages", ask())
            assert (await client.head()).startswith("HTTP/1.1 502 BAD GATEWAY\r\n")
        dify.refuse_next()
        async with client_of(dify) as client:
            assert await client.reader.read() == b""


async def test_idle_connections_are_closed() -> None:
    async with FakeDify() as dify, client_of(dify) as client:
        dify.app("app-key")
        client.send("GET", "/site")
        assert (await client.json())[0] == 200
        start = now()
        assert await client.reader.read() == b""
        assert now() - start == pytest.approx(2)


async def test_override_of_another_endpoint() -> None:
    async with FakeDify() as dify, client_of(dify) as client:
        dify.app("app-key", overrides={"/info": [fake.Status(500, {"code": "x"})]})
        client.send("GET", "/info")
        assert await client.json() == (500, {"code": "x"})


async def test_blocking_answer() -> None:
    async with FakeDify() as dify, client_of(dify) as client:
        dify.app("app-key")
        client.send("POST", "/chat-messages", ask(response_mode="blocking"))
        status, body = await client.json()
    assert status == 200
    assert body["answer"] == "Hello! You said: Hi (user turns seen: 1, images: 0)"


def test_multipart_keeps_every_byte() -> None:
    data = bytes(range(256)) + b"\r\n--x\n\r\n"
    body = b'--b0\r\nContent-Disposition: form-data; name="user"\r\n\r\nal\r\n'
    body += b'--b0\r\nContent-Disposition: form-data; name="file"; filename="a.png"'
    body += b"\r\nContent-Type: image/png\r\n\r\n" + data + b"\r\n--b0--\r\n"
    assert fake.parse_multipart("multipart/form-data; boundary=b0", body) == [
        fake.Part("user", None, None, b"al"),
        fake.Part("file", "a.png", "image/png", data),
    ]


async def test_upload_keeps_the_bytes() -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="user"\r\n\r\nal\r\n'
    body += b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.png"'
    body += b"\r\nContent-Type: image/png\r\n\r\n\x89PNG\r\n--b--\r\n"
    head = "POST /v1/files/upload HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer app-key"
    head += "\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    head += "Transfer-Encoding: chunked\r\n\r\n"
    async with FakeDify() as dify, client_of(dify) as client:
        dify.app("app-key")
        client.writer.write(
            head.encode() + b"%X\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        )
        status, answer = await client.json()
    assert (status, answer["extension"], answer["size"]) == (201, "png", 4)
    expected = fake.Upload(
        answer["id"], "app-key", "al", "a.png", "image/png", b"\x89PNG"
    )
    assert dify.uploads == {answer["id"]: expected}


async def test_agent_rounds_are_stored_with_a_line_break() -> None:
    async with FakeDify() as dify:
        script = fake.agent_answer("Done.", tool="clock", before=["Let me look."])
        dify.app("app-key", mode="agent-chat", script=script)
        chunks = await turn(dify)
        (conversation,) = dify.conversations.values()
    assert text_of(chunks) == "Let me look.Done."
    assert conversation.messages[0].answer == "Let me look.\nDone."


async def test_gate_holds_the_answer_back() -> None:
    gate = asyncio.Event()
    async with FakeDify() as dify, client_of(dify) as client:
        dify.app("app-key", script=[fake.Wait(gate), *fake.chat_answer("Hi")])
        client.send("POST", "/chat-messages", ask())
        await dify.until(lambda: dify.running)
        gate.set()
        await client.head()
        assert text_of(await client.events()) == "Hi"
