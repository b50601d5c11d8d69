"""Rooms Answers, Handlers and Server in one process: on loopback, before a fake Dify.

`proxy()` starts both; `Proxy.chat` sends a chat request on a connection of its own.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import itertools
import json
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Callable
from urllib.parse import quote, quote_plus

import fake_dify as fake
import pytest
from clock import now
from expected_answers import EXPECTED, Expected
from fake_dify import FakeDify, Hang, Send, Sleep, Status, Step
from schemas import check_chat_stream, validate
from test_dify import check_text, row_id

import opendify

JSONObject = dict[str, Any]
Headers = dict[str, str]
HI = [{"role": "user", "content": "Hi"}]
KEY = "app-secret-key-1"
NOW = 1700000000.5
TOOLS = [{"type": "function", "function": {"name": "look"}}]
SOON = pytest.approx  # times, on a clock that jumps


# ------------------------------------------------------------------------------
# A proxy, and a client of it
# ------------------------------------------------------------------------------


class Call:
    """One request and its response, as it comes."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._reader = reader
        self._writer = writer
        self.status = 0
        self.headers: Headers = {}
        self.head_at = 0.0

    async def read_head(self) -> None:
        """Read the response's head."""
        data = await self._reader.readuntil(b"\r\n\r\n")
        self.head_at = now()
        first, *lines = data.decode("latin-1").strip().split("\r\n")
        self.status = int(first.split()[1])
        fields = (line.partition(":") for line in lines)
        self.headers = {name.lower(): value.strip() for name, _, value in fields}

    async def read_piece(self) -> bytes:
        """Return the next chunk of a chunked body; b"" at its end."""
        size = int(await self._reader.readuntil(b"\r\n"), 16)
        return (await self._reader.readexactly(size + 2))[:-2]

    async def read_text(self) -> str:
        """Return the first text of a chat stream."""
        await self.read_head()
        while True:
            for chunk in chunks_of(await self.read_piece()):
                text = delta_of(chunk).get("content")
                if text:
                    return str(text)

    async def read_rest(self) -> Got:
        """Return the response, its body read to its end."""
        if not self.status:
            await self.read_head()
        pieces: list[tuple[float, bytes]] = []
        loop = asyncio.get_running_loop()
        if "content-length" in self.headers:
            size = int(self.headers["content-length"])
            pieces.append((loop.time(), await self._reader.readexactly(size)))
        while self.headers.get("transfer-encoding") == "chunked":
            data = await self.read_piece()
            if not data:
                break
            pieces.append((loop.time(), data))
        return Got(self.status, self.headers, pieces, self.head_at)

    async def leave(self) -> None:
        """Close the connection, whatever comes."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


@dataclass
class Got:
    """A whole response; `pieces` are what was read, and when."""

    status: int
    headers: Headers
    pieces: list[tuple[float, bytes]]
    head_at: float = 0.0

    @property
    def body(self) -> bytes:
        """The body in one piece."""
        return b"".join(data for _, data in self.pieces)

    @property
    def json(self) -> Any:
        """The body of a JSON response."""
        assert self.headers["content-type"] == "application/json"
        return json.loads(self.body)

    @property
    def chunks(self) -> list[JSONObject]:
        """The chunks of a stream, without [DONE]."""
        assert self.headers["content-type"].startswith("text/event-stream")
        assert self.body.endswith(b"data: [DONE]\n\n")
        return chunks_of(self.body)

    @property
    def deltas(self) -> list[str]:
        """The texts of a stream, one by one."""
        texts = [delta_of(chunk).get("content") for chunk in self.chunks]
        return [str(text) for text in texts if text]

    @property
    def reasoning(self) -> str:
        """The reasoning of a stream."""
        deltas = [delta_of(chunk) for chunk in self.chunks]
        return "".join(delta.get("reasoning_content", "") for delta in deltas)

    @property
    def message(self) -> JSONObject:
        """The message of a whole answer."""
        assert self.status == 200, self.body
        validate("CreateChatCompletionResponse", self.json)
        message: JSONObject = self.json["choices"][0]["message"]
        return message

    @property
    def error(self) -> JSONObject:
        """The error of a response, or the one that ends a stream."""
        value: JSONObject = self.json if self.status != 200 else self.chunks[-1]
        validate("ErrorResponse", value)
        error: JSONObject = value["error"]
        return error

    def times_of(self, data: bytes) -> list[float]:
        """Return when pieces with exactly these bytes were read."""
        return [seconds for seconds, piece in self.pieces if piece == data]


def chunks_of(data: bytes) -> list[JSONObject]:
    """Return the JSON events in some SSE bytes."""
    lines = [line for line in data.decode().split("\n") if line.startswith("data: {")]
    return [json.loads(line[len("data: ") :]) for line in lines]


def delta_of(chunk: JSONObject) -> JSONObject:
    """Return a chunk's delta, {} if it has none."""
    choices = chunk.get("choices") or [{}]
    delta: JSONObject = choices[0].get("delta", {})
    return delta


@dataclass
class Proxy:
    """The server under test, and the fake Dify behind it."""

    port: int
    dify: FakeDify
    server: opendify.Server
    site: opendify.Site
    asked: list[Call] = field(default_factory=list)

    async def open(
        self,
        method: str,
        path: str,
        body: JSONObject | None = None,
        headers: Headers | None = None,
    ) -> Call:
        """Send a request."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        data = b"" if body is None else json.dumps(body).encode()
        fields = {"Host": "localhost", "Content-Length": str(len(data))}
        lines = [
            f"{name}: {value}" for name, value in (fields | (headers or {})).items()
        ]
        head = "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""])
        writer.write(head.encode("latin-1") + data)
        call = Call(reader, writer)
        self.asked.append(call)
        return call

    async def get(
        self, path: str, headers: Headers | None = None, method: str = "GET"
    ) -> Got:
        """Return the response to a request without a body."""
        call = await self.open(method, path, headers=headers)
        return await call.read_rest()

    async def begin(self, headers: Headers | None = None, **fields: Any) -> Call:
        """Send a chat request to the model `m`."""
        body = {"model": "m", "messages": HI, **fields}
        return await self.open("POST", "/v1/chat/completions", body, headers)

    async def chat(self, headers: Headers | None = None, **fields: Any) -> Got:
        """Return the response to a chat request."""
        call = await self.begin(headers, **fields)
        return await call.read_rest()

    @property
    def turns(self) -> list[fake.Request]:
        """The turns that Dify was asked for."""
        return [
            row for row in self.dify.requests if "response_mode" in (row.json or {})
        ]


@contextlib.asynccontextmanager
async def proxy(
    script: fake.Script | None = None,
    *,
    mode: str = "chat",
    config: JSONObject | None = None,
    variables: Headers | None = None,
    **app: Any,
) -> AsyncIterator[Proxy]:
    """Give a proxy whose model `m` is one app of a fake Dify.

    Args:
        script: what the app answers.
        mode: the app's mode, known from the configuration.
        config: more of the model's configuration, over `key` and `mode`.
        variables: further settings.
        app: further settings of the fake app.
    """
    async with FakeDify() as dify:
        dify.app(KEY, mode=mode, script=script, **app)
        model = {"key": KEY, "mode": mode, **(config or {})}
        settings = opendify.parse_settings(
            {
                "MODEL_CONFIG": json.dumps({"m": model}),
                "DIFY_API_BASE": dify.base,
                "STREAM_MAX_LAG": "0.1",  # few jumps of the clock: each takes 2 ms
                **(variables or {}),
            }
        )
        async with serving(settings, dify) as made:
            yield made


@contextlib.asynccontextmanager
async def demo() -> AsyncIterator[Proxy]:
    """Give a proxy whose model `m` is the demo's app."""
    app = opendify.DemoApp()
    ((host, port),) = await app.listen("127.0.0.1", 0)
    try:
        variables = {"DIFY_API_BASE": f"http://{host}:{port}/v1"}
        async with proxy(variables=variables) as made:
            yield made
    finally:
        assert await app.stop(1)


@contextlib.asynccontextmanager
async def serving(settings: opendify.Settings, dify: FakeDify) -> AsyncIterator[Proxy]:
    """Give a running proxy; once its clients have left, it must end at once."""
    store, ttl_s = settings.conversation_store, settings.conversation_ttl
    conversations, complaint = opendify.open_conversations(store, ttl_s)
    assert not complaint
    client = opendify.Dify(settings, opendify.open_wire)
    ids = itertools.count(1)
    site = opendify.Site(client, conversations, lambda: f"a{next(ids)}", lambda: NOW)
    server = opendify.Server(site)
    ((_, port),) = await server.listen("127.0.0.1", 0)
    made = Proxy(port, dify, server, site)
    try:
        try:
            yield made
        finally:
            for call in made.asked:
                await call.leave()
        assert await server.drain()
    finally:
        await server.drain(0)
        client.close()
        conversations.close()


def own_tasks() -> list[str]:
    """Return the code under test that is running in tasks, by name."""
    coroutines: list[Any] = [task.get_coro() for task in asyncio.all_tasks()]
    return [
        coroutine.__qualname__
        for coroutine in coroutines
        if coroutine.cr_code.co_filename == opendify.__file__
    ]


# ------------------------------------------------------------------------------
# Routes, models, keys
# ------------------------------------------------------------------------------

ITEM_OF_CONVERSATION = "conversations/{id}/items/{id}"
CHAT = "chat/completions"


@pytest.mark.parametrize(
    ("path", "endpoint", "name"),
    [
        ("/v1/chat/completions", CHAT, ""),
        ("/chat/completions", CHAT, ""),
        ("/v1/v1/chat/completions", CHAT, ""),
        ("/v1//chat/completions", CHAT, ""),
        ("//v1/chat//completions", CHAT, ""),
        ("/v1/chat/completions/", CHAT, ""),
        ("/v1/chat/completions//", CHAT, ""),
        ("/v1/chat/completions/chat/completions", CHAT, ""),
        ("/v1/chat/completions/chat/completions/chat/completions", CHAT, ""),
        ("/v1/chat/completions/models", "models", ""),
        ("/v1/chat/completions/models/m", "models/{model}", "m"),
        ("/v1/chat/completions/files/f/content", "files/{id}/content", "f"),
        ("/v1/completions/completions", "completions", ""),
        ("/v1/responses/responses_1", "responses/{id}", "responses_1"),
        ("/v1/responses/compact", "responses/compact", ""),
        ("/v1/responses/input_tokens", "responses/input_tokens", ""),
        ("/v1/conversations/c/items", "conversations/{id}/items", "c"),
        ("/v1/conversations/c/items/i", ITEM_OF_CONVERSATION, "c/i"),
        ("/v1/conversations/c/d/items/i", "conversations/c/d/items/i", ""),
        ("/v1/responses/responses", "responses", ""),
        ("/v1/responses/models", "models", ""),
        ("/api/v1/chat/completions", CHAT, ""),
        ("/openai/v1/chat/completions", CHAT, ""),
        ("/openai/chat/completions", CHAT, ""),
        ("/openai/deployments/m/chat/completions", CHAT, "m"),
        ("/openai/deployments/team%2Fapp/chat/completions", CHAT, "team/app"),
        ("/openai/deployments/team/app/chat/completions", CHAT, "team/app"),
        ("/v1/engines/m/chat/completions", CHAT, "m"),
        ("/openai/deployments/a/models/b/chat/completions", CHAT, "a/models/b"),
        ("/openai/deployments/m/responses", "responses", "m"),
        ("/openai/deployments/m/responses/r/cancel", "responses/{id}/cancel", "r"),
        ("/openai/deployments/m/conversations/c", "conversations/{id}", "c"),
        ("/v1/engines/m/conversations/c/items/i", ITEM_OF_CONVERSATION, "c/i"),
        ("/v1/engines/m/files/f/content", "files/{id}/content", "f"),
        ("/v1/engines/m/models/other", "models/{model}", "other"),
        ("/v1/models", "models", ""),
        ("/models", "models", ""),
        ("/v1/models/", "models", ""),
        ("/v1//models", "models", ""),
        ("/v1/models/m", "models/{model}", "m"),
        ("/models/m", "models/{model}", "m"),
        ("/v1/models/team/app", "models/{model}", "team/app"),
        ("/v1/models/team%2Fapp", "models/{model}", "team/app"),
        ("/v1/models/v1", "models/{model}", "v1"),
        ("/health", "health", ""),
    ],
)
def test_endpoint_is_found_by_the_tail(path: str, endpoint: str, name: str) -> None:
    assert opendify.find_endpoint(path) == (endpoint, name)


BASE_HINT = " Clients add a path to it; for a browser there is a page at /."


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/v1", BASE_HINT),
        ("/v1/", BASE_HINT),
        ("/v1/chat", ""),
        ("/v1/chat/completionsx", ""),
        ("/v1/x", ""),
        ("/v1x/models", " A base URL ends in /v1."),
    ],
)
async def test_unknown_path_is_a_json_404(path: str, hint: str) -> None:
    async with proxy() as served:
        got = await served.get(path)
    assert (got.status, got.error["code"]) == (404, "unknown_url")
    assert got.error["message"] == f"Invalid URL (GET {path}).{hint}"
    assert got.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("method", "path", "told"),
    [
        (
            "POST",
            "/openai/deployments/app-aBc123XyZ/embeddings",
            "Invalid URL (POST /openai/deployments/app-…/embeddings).",
        ),
        ("GET", "/v1/responses/app-aBc123XyZ", "Response with id 'app-…' not found."),
        ("GET", "/v1/files/app-aBc123XyZ", "No such File object: app-…. An id is"),
    ],
)
async def test_app_key_in_a_path_that_leads_nowhere_is_masked(
    method: str, path: str, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    """For an app's key is taken for a model's name, and the log has the message."""
    caplog.set_level("INFO")
    async with proxy() as served:
        got = await served.get(path, method=method)
    (line,) = [row for row in caplog.messages if "NotFound" in row]
    for said in (got.error["message"], line):
        assert told in said


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("POST", "/v1/models", "GET"),
        ("DELETE", "/v1/models/m", "GET"),
    ],
)
async def test_wrong_method(method: str, path: str, allowed: str) -> None:
    async with proxy() as served:
        got = await served.get(path, method=method)
    assert (got.status, got.headers["allow"]) == (405, allowed)
    assert got.error["code"] == "method_not_supported"
    assert got.error["message"] == f"{method} is not allowed; use {allowed}."


def model(name: str, **more: str) -> JSONObject:
    """Return a model as it is listed."""
    return {
        "id": name,
        "object": "model",
        "created": int(NOW),
        "owned_by": "dify",
        **more,
    }


async def test_models_of_the_configuration_are_listed_without_asking_dify() -> None:
    config = {"b": "app-b", "a": {"key": "app-a"}, "应用": "app-c"}
    variables = {"MODEL_CONFIG": json.dumps(config)}
    async with proxy(variables=variables) as served:
        got = await served.get("/v1/models")
        assert served.dify.requests == []
    validate("ListModelsResponse", got.json)
    names = ["b", "a", "应用"]
    assert got.json == {"object": "list", "data": [model(name) for name in names]}


async def test_apps_without_a_model_name_are_listed_by_their_own(
    caplog: pytest.LogCaptureFixture,
) -> None:
    variables = {"DIFY_API_KEYS": "app-one,app-two,app-broken,app-slow"}
    async with proxy(variables=variables) as served:
        served.dify.app("app-one", name="Helper 一")
        served.dify.app("app-two", name="m")
        served.dify.app("app-slow", overrides={"/info": [fake.Hang()]})
        got = await served.get("/v1/models")
        assert [row["id"] for row in got.json["data"]] == [
            *("m", "Helper 一"),
            "m (503e)",  # the name is taken
            *("app-ce5ac345", "app-d4cf0029"),  # that Dify does not tell
        ]
        asked = len(served.dify.requests)
        begun = now()
        chat = await served.chat(model="Helper 一")
        assert chat.message["content"].startswith("Hello! You said: Hi")
        await served.chat(model="m (503e)")
        await served.chat()
        assert now() < begun + 3  # nobody waits for a name
        assert len(served.dify.requests) == asked + 5  # the mode of two, three turns
    assert [row.key for row in served.turns] == ["app-one", "app-two", KEY]
    (warning,) = [row for row in caplog.messages if "DIFY_API_KEYS" in row]
    assert warning.startswith("app-br… of DIFY_API_KEYS: ")


@pytest.mark.parametrize(
    ("steps", "status"),
    [
        ([fake.Status(502, "")], 502),
        ([fake.Hang()], 504),
        ([fake.Status(401, {"code": "unauthorized", "message": "No"})], 404),
    ],
    ids=["gone", "busy", "refused"],
)
async def test_model_may_exist_while_dify_does_not_tell_its_name(
    steps: list[fake.Step], status: int
) -> None:
    """A client repeats no 404, and OpenDify may have started before Dify did."""
    async with proxy(variables={"DIFY_API_KEYS": "app-one"}) as served:
        served.dify.app("app-one", name="One", overrides={"/info": steps})
        got = await served.chat(model="One")
        served.dify.app("app-one", name="One")
        assert (await served.chat(model="One")).status == 200
        assert (await served.chat(model="Two")).status == 404
    assert got.status == status
    assert got.error["message"].startswith("The model 'One' ")


async def test_key_that_dify_repeats_is_in_no_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    denied = {"code": "unauthorized", "message": "app-secret is invalid", "status": 401}
    async with proxy(variables={"DIFY_API_KEYS": "app-secret"}) as served:
        served.dify.app("app-secret", overrides={"/info": [fake.Status(401, denied)]})
        assert (await served.get("/v1/models")).status == 200
    assert "app-se… of DIFY_API_KEYS: " in caplog.text
    assert "is invalid" in caplog.text and "app-secret" not in caplog.text


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_model_whose_key_dify_refuses_is_named(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    denied = fake.Status(401, {"code": "unauthorized", "message": "No", "status": 401})
    variables = {"MODEL_CONFIG": json.dumps({"助手": {"key": KEY, "mode": "chat"}})}
    async with proxy([denied], variables=variables) as served:
        got = await served.chat(model="助手", stream=stream)
    said = "The model '助手': Dify refused the app key (401 unauthorized: No). Check "
    assert (got.status, got.error["message"][: len(said)]) == (502, said)
    assert f"ConfigurationFault: {said}" in caplog.text


ODD = "team/应用 + 1"


@pytest.mark.parametrize(
    "written",
    [
        quote(ODD),  # openai-python 1.x: the slash is raw
        quote(ODD, safe=""),  # openai-python 3.x, openai-node
        quote_plus(ODD),  # openai-python 0.28
    ],
)
@pytest.mark.parametrize("base", ["/v1", "", "/v1/", "/openai/v1"])
async def test_model_is_found_in_every_encoding(base: str, written: str) -> None:
    variables = {"MODEL_CONFIG": json.dumps({ODD: KEY, "a+b": KEY})}
    async with proxy(variables=variables) as served:
        got = await served.get(f"{base}/models/{written}")
        plus = await served.get(f"{base}/models/a+b")
    validate("Model", got.json)
    assert (got.json, plus.json) == (model(ODD), model("a+b"))


@pytest.mark.parametrize(
    "path",
    [
        f"/openai/deployments/{quote(ODD)}/chat/completions?api-version=2024-10-21",
        f"/openai/deployments/{quote(ODD, safe='')}/chat/completions",
        f"/v1/engines/{quote_plus(ODD)}/chat/completions",
    ],
    ids=["azure-raw-slash", "azure", "engines-form-quoting"],
)
async def test_model_is_found_in_the_path_of_a_chat(path: str) -> None:
    variables = {"MODEL_CONFIG": json.dumps({ODD: {"key": KEY, "mode": "chat"}})}
    async with proxy(variables=variables) as served:
        call = await served.open("POST", path, {"messages": HI})
        got = await call.read_rest()
    assert got.message["content"].startswith("Hello! You said: Hi")
    assert got.json["model"] == ODD


async def test_unknown_model() -> None:
    async with proxy() as served:
        answers = [
            await served.get("/v1/models/other"),
            await served.chat(model="other"),
            await served.chat(model="other", stream=True),
            await served.chat(model="half \ud800"),
        ]
    for got in answers:
        assert (got.status, got.error["code"]) == (404, "model_not_found")
        assert got.error["param"] == "model"
        assert "Available: m" in got.error["message"]


async def test_head_has_no_body() -> None:
    async with proxy() as served:
        call = await served.open("HEAD", "/v1/models")
        await call.read_head()
        assert (call.status, call.headers["content-type"]) == (200, "application/json")
        assert int(call.headers["content-length"]) > 0


RIGHT, OTHER, WRONG = "sk-right", "sk-other", "sk-wrong"
KEYS = {"VALID_API_KEYS": f"{OTHER},{RIGHT}"}


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {RIGHT}"},
        {"Authorization": f"bearer {RIGHT}"},
        {"authorization": f"BEARER   {RIGHT}  "},
        {"Authorization": f"Bearer {OTHER}"},
        {"api-key": RIGHT},
        {"X-API-Key": RIGHT},
        {"Authorization": "Bearer", "api-key": RIGHT},
        {"Authorization": "Basic dTpw", "x-api-key": RIGHT},
    ],
)
async def test_key_is_found_wherever_clients_put_it(headers: Headers) -> None:
    async with proxy(variables=KEYS) as served:
        listed = await served.get("/v1/models", headers)
        got = await served.chat(headers)
    assert (listed.status, got.status) == (200, 200)


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {WRONG}"},
        {"Authorization": f"Bearer {RIGHT}x"},
        {"Authorization": "Bearer undefined"},
        {"api-key": WRONG},
        {"x-api-key": "ключ".encode().decode("latin-1")},
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions"])
async def test_wrong_key_is_refused(path: str, headers: Headers) -> None:
    async with proxy(variables=KEYS) as served:
        method = "GET" if path.endswith("models") else "POST"
        got = await served.get(path, headers, method)
        assert served.dify.requests == []
    assert (got.status, got.error["code"]) == (401, "invalid_api_key")
    assert got.error["message"].startswith("Incorrect API key provided")
    assert got.error["type"] == "invalid_request_error"
    assert got.headers["www-authenticate"] == "Bearer"
    assert WRONG.encode() not in got.body


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer"}, {"Authorization": "Bearer  "}]
)
async def test_missing_key_is_refused(headers: Headers) -> None:
    async with proxy(variables=KEYS) as served:
        got = await served.get("/v1/models", headers)
    assert (got.status, got.error["code"]) == (401, None)
    assert got.error["type"] == "invalid_request_error"
    assert got.headers["www-authenticate"] == "Bearer"


async def test_any_key_will_do_when_none_is_configured() -> None:
    async with proxy() as served:
        for headers in ({}, {"Authorization": "Bearer sk-no-key-required"}):
            assert (await served.get("/v1/models", headers)).status == 200


async def test_health_needs_no_key() -> None:
    async with proxy(variables=KEYS) as served:
        got = await served.get("/health")
    assert (got.status, got.json["status"]) == (200, "ok")


# ------------------------------------------------------------------------------
# Answers
# ------------------------------------------------------------------------------

MODES = ("chat", "agent-chat", "advanced-chat", "agent", "completion", "workflow")
QUERY = {"user_input_form": [fake.text_input("query")]}


def form_of(mode: str) -> JSONObject:
    """Return an app's parameters: the text goes to an input where there is no query."""
    return QUERY if mode in ("completion", "workflow") else {}


def answer(mode: str, *pieces: str) -> list[Step]:
    """Return an app's answer."""
    makers: dict[str, Callable[..., list[Step]]] = {
        "agent-chat": fake.agent_answer,
        "agent": fake.agent_answer,
        "advanced-chat": fake.chatflow_answer,
        "completion": fake.completion_answer,
        "workflow": fake.workflow_answer,
    }
    return makers.get(mode, fake.chat_answer)(*pieces)


@pytest.mark.parametrize("mode", MODES)
async def test_answer_of_every_mode(mode: str) -> None:
    pieces = ("Hé", "llo\u2028", "👩\u200d💻")
    async with proxy(
        answer(mode, *pieces), mode=mode, parameters=form_of(mode)
    ) as served:
        whole = await served.chat(user="al")
        got = await served.chat(stream=True, user="al", inputs={"x": 1})
        first, second = served.turns
    assert whole.message["content"] == "".join(pieces)
    assert whole.json["choices"][0]["finish_reason"] == "stop"
    check_chat_stream(got.chunks)
    assert "".join(got.deltas) == "".join(pieces)
    assert got.headers["cache-control"] == "no-cache, no-transform"
    assert got.headers["x-accel-buffering"] == "no"
    assert (first.user, second.json["inputs"].get("x")) == ("al", 1)
    for turn in (first, second):
        asked = turn.json.get("query") or turn.json["inputs"]["query"]
        assert (asked, turn.json["response_mode"]) == ("Hi", "streaming")


@pytest.mark.parametrize("stream", [False, True])
async def test_ids_of_dify_go_along(stream: bool) -> None:
    async with proxy() as served:
        got = await served.chat(stream=stream)
        (conversation,) = served.dify.conversations.values()
    ids = {
        "conversation_id": conversation.id,
        "message_id": conversation.messages[0].id,
    }
    shown = got.chunks[0]["dify"] if stream else got.json["dify"]
    assert shown == ids
    assert got.headers["x-dify-conversation-id"] == ids["conversation_id"]
    assert got.headers["x-dify-message-id"] == ids["message_id"]
    if stream:
        assert [chunk for chunk in got.chunks[1:] if "dify" in chunk] == []


async def test_workflow_has_the_id_of_its_run_alone() -> None:
    async with proxy(mode="workflow", parameters=QUERY) as served:
        got = await served.chat(stream=True)
    (run,) = served.dify.runs
    assert got.chunks[0]["dify"] == {"workflow_run_id": run}
    ids = {name: id_ for name, id_ in got.headers.items() if name.startswith("x-dify-")}
    assert ids == {"x-dify-workflow-run-id": run}


@pytest.mark.parametrize("place", ["body", "metadata", "header"])
async def test_named_conversation_is_continued(place: str) -> None:
    known = "2d7a3b1e-0000-4000-8000-00000000000a"
    named: dict[str, JSONObject] = {
        "body": {"conversation_id": known},
        "metadata": {"metadata": {"conversation_id": known}},
        "header": {"headers": {"X-Dify-Conversation-Id": known}},
    }
    async with proxy() as served:
        got = await served.chat(**named[place])
        (turn,) = served.turns
    assert turn.json["conversation_id"] == known
    assert got.headers["x-dify-conversation-id"] == known


async def test_usage_comes_on_request_only() -> None:
    script = fake.chat_answer("Hi", usage=(3, 4))
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    async with proxy(script) as served:
        whole = await served.chat(stream_options={"include_usage": False})
        plain = await served.chat(stream=True)
        asked = await served.chat(stream=True, stream_options={"include_usage": True})
    assert whole.json["usage"] == usage
    check_chat_stream(plain.chunks)
    check_chat_stream(asked.chunks, include_usage=True)
    assert asked.chunks[-1]["usage"] == usage


@pytest.mark.parametrize(
    ("fields", "headers", "user"),
    [
        ({"user": "al"}, {}, "al"),
        ({"user": {"id": "u1", "name": "Al"}}, {}, "u1"),
        ({"safety_identifier": "s", "user": "al"}, {}, "s"),
        ({}, {"X-OpenWebUI-User-Id": "u%20%E4%B8%80"}, "u 一"),
        ({"user": "al"}, {"X-OpenWebUI-User-Id": "u1"}, "al"),
    ],
)
async def test_end_user_reaches_dify(
    fields: JSONObject, headers: Headers, user: str
) -> None:
    async with proxy() as served:
        await served.chat(headers, **fields)
        (turn,) = served.turns
    assert turn.user == user


async def test_end_user_without_a_name_is_the_key_s() -> None:
    async with proxy() as served:
        for key in ("sk-1", "sk-2", "sk-1"):
            await served.chat({"Authorization": f"Bearer {key}"})
        one, two, again = [turn.user for turn in served.turns]
    assert one == again != two
    assert "sk-1" not in one


async def test_request_id_is_the_trace_id() -> None:
    async with proxy() as served:
        got = await served.chat()
        (turn,) = served.turns
    assert turn.json["trace_id"] == got.headers["x-request-id"]


# Modes that are not known, or wrong...


@pytest.mark.parametrize("version", ["1.12.1", "0.15.3"])
@pytest.mark.parametrize("mode", ["chat", "completion", "workflow"])
async def test_mode_is_found_out_once(mode: str, version: str) -> None:
    config = {"mode": ""}
    async with proxy(
        mode=mode, config=config, version=version, parameters=form_of(mode)
    ) as served:
        for _ in range(2):
            got = await served.chat()
            assert got.message["content"].startswith("Hello! You said: Hi")
        asked = [row.path for row in served.dify.requests]
    assert asked.count("/info") == 1
    assert len(served.turns) == 2


@pytest.mark.parametrize(
    ("believed", "real"),
    [("chat", "workflow"), ("workflow", "chat"), ("completion", "advanced-chat")],
)
async def test_wrong_mode_is_corrected_in_the_same_request(
    believed: str, real: str
) -> None:
    config = {"mode": believed}
    form = {"user_input_form": [fake.text_input("query", required=False)]}
    async with proxy(mode=real, config=config, parameters=form) as served:
        got = await served.chat(stream=True)
    assert "".join(got.deltas).startswith("Hello! You said: Hi")


async def test_app_without_a_text_input_may_be_no_workflow() -> None:
    async with proxy(mode="chat", config={"mode": "workflow"}) as served:
        got = await served.chat()
    assert got.message["content"].startswith("Hello! You said: Hi")


async def test_app_whose_mode_is_told_otherwise_each_time_is_given_up() -> None:
    told = itertools.cycle(["completion", "chat"])

    def info(_: fake.Request) -> list[Step]:
        return [Status(200, {"name": "App", "mode": next(told)})]

    config, overrides = {"mode": ""}, {"/info": info}
    async with proxy(mode="workflow", config=config, overrides=overrides) as served:
        got = await served.chat()
        paths = [row.path for row in served.dify.requests if row.method == "POST"]
    assert (got.status, got.error["code"]) == (502, "upstream_error")
    assert paths == ["/completion-messages", "/chat-messages", "/completion-messages"]


async def test_apps_tell_of_a_wrong_mode() -> None:
    async with proxy(mode="chat", config={"mode": "workflow"}) as served:
        (row,) = (await served.get("/v1/apps")).json["data"]
    told = "mode in MODEL_CONFIG is workflow, but the app is chat."
    assert row == {"id": "m", "error": told}


# Conversations...


async def said(served: Proxy, messages: list[JSONObject], **fields: Any) -> str:
    """Return the answer to some messages, and put it behind them."""
    got = await served.chat(messages=messages, stream=True, user="al", **fields)
    check_chat_stream(got.chunks)
    text = "".join(got.deltas)
    messages.append({"role": "assistant", "content": text})
    return text


def user(text: str) -> JSONObject:
    """Return a user's message."""
    return {"role": "user", "content": text}


@pytest.mark.parametrize("mode", ["chat", "advanced-chat"])
async def test_dify_s_memory_works_for_unchanged_clients(mode: str) -> None:
    async with proxy(mode=mode, memory=True) as served:
        messages = [user("one")]
        await said(served, messages)
        messages.append(user("two"))
        text = await said(served, messages)
        first, second = served.turns
    assert second.json["query"] == "two"
    assert second.json["conversation_id"]
    assert "conversation_id" not in first.json
    assert (
        text
        == "Answer 2. The model was shown: user: one; assistant: Answer 1; user: two"
    )


@pytest.mark.parametrize("was_sent", [False, True], ids=["unsent", "sent"])
async def test_conversation_waits_for_dify_unless_it_may_have_the_turn(
    was_sent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kept connection that breaks may have brought it; a new one can't be had."""

    async def connect(*_: Any, **options: Any) -> opendify.Wire:
        raise ConnectionRefusedError

    answer = fake.chat_answer("One.")
    broken: list[Step] = [fake.Close()]
    scripts = [answer, broken, answer] if was_sent else [answer, answer]
    async with proxy(lambda _: scripts.pop(0)) as served:
        messages = [user("one")]
        await said(served, messages)
        messages.append(user("two"))
        if not was_sent:
            await asyncio.sleep(opendify.IDLE_CONNECTION_S + 1)
        with monkeypatch.context() as patch:
            patch.setattr(served.site.dify.api.pool, "connect", connect)
            failed = await served.chat(messages=messages, user="al")
        assert (failed.status, failed.error["type"]) == (502, "server_error")
        await asyncio.sleep(opendify.CIRCUIT_S + 1)
        await said(served, messages)
        assert bool(served.turns[-1].json.get("conversation_id")) is not was_sent


@pytest.mark.parametrize("status", [400, 401, 429])
async def test_conversation_goes_on_behind_a_refusal(status: int) -> None:
    """Nothing has run, and Dify was asked but once."""
    answer = fake.chat_answer("One.")
    refused: list[Step] = [Status(status, {"code": "no", "message": "No."})]
    scripts = [answer, refused, answer]
    async with proxy(lambda _: scripts.pop(0)) as served:
        messages = [user("one")]
        await said(served, messages)
        messages.append(user("two"))
        assert (await served.chat(messages=messages, user="al")).status != 200
        await said(served, messages)
        first, *rest = [turn.json.get("conversation_id") for turn in served.turns]
    assert first is None
    assert rest[0] == rest[1] is not None


async def test_history_is_folded_when_the_conversation_is_gone() -> None:
    async with proxy(memory=True) as served:
        messages = [user("one")]
        await said(served, messages)
        served.dify.conversations.clear()
        messages.append(user("two"))
        await said(served, messages)
        _, refused, folded = served.turns
    assert refused.json["query"] == "two"
    assert "conversation_id" not in folded.json
    for text in ("one", "Answer 1", "two"):
        assert text in folded.json["query"]


async def test_edited_history_starts_a_new_conversation() -> None:
    async with proxy(memory=True) as served:
        messages = [user("one")]
        await said(served, messages)
        messages[0] = user("uno")
        messages.append(user("two"))
        await said(served, messages)
        _, second = served.turns
    assert "conversation_id" not in second.json
    assert "uno" in second.json["query"]


async def test_failed_turn_is_forgotten() -> None:
    async with proxy(memory=True) as served:
        messages = [user("one")]
        await said(served, messages)
        messages.append(user("two"))
        script = [fake.message("Hel"), fake.error_event()]
        served.dify.app(KEY, memory=True, script=script)
        got = await served.chat(messages=messages, user="al")
        assert got.status == 502
        served.dify.app(KEY, memory=True)
        await said(served, messages)
        _, second, third = served.turns
    assert second.json["query"] == "two"
    assert "conversation_id" not in third.json
    assert "one" in third.json["query"]


async def test_turn_that_a_client_left_is_not_continued() -> None:
    """Dify may have stored another text than the client has seen."""
    async with proxy(memory=True) as served:
        messages = [user("one")]
        await said(served, messages)
        messages.append(user("two"))
        served.dify.app(KEY, memory=True, script=[fake.message("Long" * 99), Hang()])
        call = await served.begin(messages=messages, stream=True, user="al")
        text = await call.read_text()
        await call.leave()
        await served.dify.until(lambda: served.dify.stops and not served.dify.running)
        served.dify.app(KEY, memory=True)
        messages += [{"role": "assistant", "content": text}, user("three")]
        await said(served, messages)
        third = served.turns[-1]
    assert "conversation_id" not in third.json
    for part in ("one", "two", text, "three"):
        assert part in third.json["query"]


@pytest.mark.parametrize(
    ("answer", "fields"),
    [
        pytest.param("Long text <tool_call>", {"tools": TOOLS}, id="call"),
        pytest.param("Long text EN", {"stop": ["END"]}, id="stop"),
        pytest.param("Long text.", {}, id="plain"),
    ],
)
async def test_turn_that_was_left_goes_on_only_if_nothing_of_it_was_held(
    answer: str, fields: JSONObject
) -> None:
    """What may become a call or a stop is stored in Dify, and was not shown."""
    steps: list[Step] = [fake.message(answer), Hang()]
    async with proxy(steps, variables={"STREAM_SMOOTHING": "off"}) as served:
        messages = [user("one")]
        call = await served.begin(messages=messages, stream=True, user="al", **fields)
        text = await call.read_text()
        await call.leave()
        await served.dify.until(lambda: served.dify.stops and not served.dify.running)
        await served.dify.until(lambda: not served.dify.open_connections)
        served.dify.app(KEY)
        messages += [{"role": "assistant", "content": text}, user("two")]
        await said(served, messages)
        second = served.turns[-1]
    assert ("conversation_id" in second.json) == (not fields)


@pytest.mark.parametrize("mode", ["agent-chat", "chat"])
async def test_agent_that_was_stopped_is_shown_what_it_said(mode: str) -> None:
    """Dify stores its text, yet shows an agent only its rounds that have ended."""
    said_so_far = "Once upon a time."
    event = "message" if mode == "chat" else "agent_message"
    steps: list[Step] = [Send({"event": event, "answer": said_so_far}), Hang()]
    variables = {"STREAM_SMOOTHING": "off"}
    async with proxy(steps, mode=mode, variables=variables) as served:
        messages = [user("Tell a story.")]
        call = await served.begin(messages=messages, stream=True, user="al")
        text = await call.read_text()
        await call.leave()
        await served.dify.until(lambda: served.dify.stops and not served.dify.running)
        await served.dify.until(lambda: not served.dify.open_connections)
        served.dify.app(KEY, mode=mode)
        messages += [{"role": "assistant", "content": text}, user("Go on.")]
        await said(served, messages)
        shown = served.dify.contexts[-1]
    assert text == said_so_far
    assert said_so_far in str(shown)


async def test_two_requests_at_once_do_not_share_a_conversation() -> None:
    async with proxy(memory=True) as served:
        messages = [user("one")]
        await said(served, messages)
        messages.append(user("two"))
        both = (served.chat(messages=messages, user="al") for _ in range(2))
        await asyncio.gather(*both)
        known = ["conversation_id" in turn.json for turn in served.turns[1:]]
    assert sorted(known) == [False, True]


async def test_side_request_does_not_move_a_conversation() -> None:
    async with proxy(memory=True) as served:
        messages = [user("one")]
        await said(served, messages)
        task = user(f"### Task:\nMake a title.\n{messages}")
        await served.chat(messages=[task], user="al")
        messages.append(user("two"))
        await said(served, messages)
        _, side, second = served.turns
    assert "conversation_id" not in side.json
    assert second.json["query"] == "two"


async def test_conversations_of_other_users_are_out_of_reach() -> None:
    async with proxy(memory=True) as served:
        messages = [user("one")]
        await said(served, messages)
        messages.append(user("two"))
        got = await served.chat(messages=messages, user="bo")
        _, second = served.turns
    assert got.status == 200
    assert "conversation_id" not in second.json


async def test_system_text_reaches_the_app() -> None:
    system = {"role": "system", "content": "Be brief."}
    async with proxy(memory=True) as served:
        messages = [system, user("one")]
        await said(served, messages)
        messages.append(user("two"))
        await said(served, messages)
        first, second = served.turns
    assert "Be brief." in first.json["query"] and "one" in first.json["query"]
    assert second.json["query"] == "two"


# ------------------------------------------------------------------------------
# Smoothing
# ------------------------------------------------------------------------------

LONG = "One long sentence that comes at once, as some models and gateways send it. " * 3


@pytest.mark.parametrize(
    ("variable", "of_model", "header", "is_smooth"),
    [
        (None, None, None, True),
        (None, None, "off", False),
        (None, None, "OFF", False),
        (None, None, "on", True),
        (None, None, "maybe", True),
        ("off", None, None, False),
        ("off", None, "on", True),
        ("off", True, None, True),
        ("on", False, None, False),
        ("on", False, "on", True),
    ],
)
async def test_smoothing_switches(
    variable: str | None, of_model: bool | None, header: str | None, is_smooth: bool
) -> None:
    variables = {"STREAM_SMOOTHING": variable} if variable else {}
    variables["STREAM_MAX_LAG"] = "0.4"
    config = {} if of_model is None else {"smoothing": of_model}
    headers = {"X-OpenDify-Smoothing": header} if header else {}
    script = fake.chat_answer(LONG)
    async with proxy(script, config=config, variables=variables) as served:
        got = await served.chat(headers, stream=True)
    check_chat_stream(got.chunks)
    assert "".join(got.deltas) == LONG
    assert (len(got.deltas) > 10) == is_smooth
    assert (len(got.deltas) == 1) == (not is_smooth)


async def test_pieces_pass_one_for_one_when_smoothing_is_off() -> None:
    pieces = ["He", "l", "lo ", "👩", "\u200d", "💻", " ", "\n", "end" * 500]
    async with proxy(fake.chat_answer(*pieces)) as served:
        got = await served.chat({"X-OpenDify-Smoothing": "off"}, stream=True)
    assert got.deltas == pieces


async def test_client_that_reads_late_gets_each_piece_once() -> None:
    pieces = [letter * 300_000 for letter in "abcdefgh"]
    async with proxy(fake.chat_answer(*pieces, delay=0.1)) as served:
        call = await served.begin({"X-OpenDify-Smoothing": "off"}, stream=True)
        await asyncio.sleep(5)
        got = await call.read_rest()
    most = opendify.MAX_CHUNK_CHARS
    assert got.deltas == [
        p[at : at + most] for p in pieces for at in range(0, len(p), most)
    ]


async def test_lags_are_told_to_a_client_that_asks() -> None:
    texts = map(fake.message, ("One.", " Two and three."))
    async with proxy([*texts, Sleep(1), *fake.chat_answer()]) as served:
        asked = await served.chat({"X-OpenDify-Lag": "on"}, stream=True)
        metrics = (await served.get("/metrics")).body.decode()
        plain = await served.chat(stream=True)
    lags = [row for row in asked.body.split(b"\n\n") if row.startswith(b":")]
    assert lags[0] == b": lag 0.000"
    assert all(0 < float(row[len(b": lag ") :]) <= 0.4 for row in lags[1:])
    assert len(lags) == len([text for text in asked.deltas if text])
    assert f"opendify_pacer_lag_seconds_count {len(lags)}\n" in metrics
    assert b": lag" not in plain.body
    assert "".join(asked.deltas) == "".join(plain.deltas)


async def test_text_is_held_no_longer_than_the_lag() -> None:
    script = [fake.message(LONG), Sleep(3), fake.message("Bye"), *fake.chat_answer()]
    async with proxy(script, variables={"STREAM_MAX_LAG": "0.3"}) as served:
        got = await served.chat(stream=True)
    texts = [(at, data) for at, data in got.pieces if b'"content":"' in data]
    before = [at - got.head_at for at, _ in texts if at < got.head_at + 2]
    assert before[0] == SOON(0, abs=0.01)
    assert before[-1] == SOON(0.3, abs=0.05)
    gaps = [late - early for early, late in zip(before, before[1:])]
    assert max(gaps) < 0.05
    assert "".join(got.deltas) == f"{LONG}Bye"


async def test_error_before_the_first_text_is_still_a_status() -> None:
    failing: list[Step] = [Sleep(1), fake.error_event()]
    script = [Send({"event": "workflow_started"}), *failing]
    async with proxy(script, mode="advanced-chat") as served:
        got = await served.chat(stream=True)
    assert (got.status, got.error["message"]) == (502, "the model failed")


async def test_text_is_complete_before_thoughts_that_follow() -> None:
    thought = fake.message("\n<think>\nHm.\n</think>\n\nBye")
    async with proxy([fake.message(LONG), thought, fake.message_end()]) as served:
        got = await served.chat(stream=True)
    kinds = ["content" in delta_of(chunk) for chunk in got.chunks[1:-1]]
    assert [kind for kind, _ in itertools.groupby(kinds)] == [True, False, True]


async def test_more_than_anyone_can_read_is_not_held_back() -> None:
    script: list[Step] = [fake.message("x" * 200_000), Sleep(1), fake.message_end()]
    async with proxy(script, variables={"STREAM_MAX_LAG": "5"}) as served:
        got = await served.chat(stream=True)
    texts = [at for at, data in got.pieces if b"xxx" in data]
    assert max(texts) - got.head_at < 0.5


@pytest.mark.parametrize("smoothing", ["on", "off"])
async def test_held_text_comes_before_an_error(smoothing: str) -> None:
    steps: list[Any] = [fake.message(LONG), fake.error_event()]
    at_once = Send(b"".join([fake.encode_event(step.data) for step in steps]))
    async with proxy([at_once]) as served:
        got = await served.chat({"X-OpenDify-Smoothing": smoothing}, stream=True)
    assert "".join(got.deltas) == LONG
    assert got.pieces[-1][0] - got.head_at < 0.1  # an error is not delayed


async def test_reasoning_is_complete_before_the_answer() -> None:
    script = fake.chat_answer(f"<think>\n{LONG}</think>", f"\n\n{LONG}")
    async with proxy(script) as served:
        got = await served.chat(stream=True)
    kinds = ["content" in delta_of(chunk) for chunk in got.chunks[1:-1]]
    assert kinds == sorted(kinds)
    assert got.reasoning.strip() == LONG.strip()
    assert "".join(got.deltas).strip() == LONG.strip()


async def test_thoughts_that_were_shown_as_text_are_seen_to_end() -> None:
    async with proxy(fake.chat_answer("I think", "\n</think>\n\nYes.")) as served:
        got = await served.chat(stream=True)
    assert "".join(got.deltas) == "I think\n</think>\n\nYes."


async def test_streamed_answer_may_be_an_image_alone() -> None:
    image = {"type": "image", "url": "http://x/a.png", "belongs_to": "assistant"}
    script = [Send({"event": "message_file", **image}), fake.message_end()]
    async with proxy(script) as served:
        got = await served.chat(stream=True)
    assert "".join(got.deltas) == "![a.png](http://x/a.png)"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_replaced_text_that_is_still_held_is_never_seen(stream: bool) -> None:
    replaced = Send({"event": "message_replace", "answer": "He said nothing."})
    script = [fake.message(f"He{LONG}"), replaced, *fake.chat_answer()]
    async with proxy(script) as served:
        got = await served.chat(stream=stream)
    text = "".join(got.deltas) if stream else got.message["content"]
    assert text == "He said nothing."


async def test_thoughts_that_are_still_held_outlast_replaced_text() -> None:
    thought, text = f"<think>\n{LONG}\n</think>\n\n", "No."
    replaced = {"event": "message_replace", "answer": text}
    burst = [{"event": "message", "answer": thought}, replaced]
    script = [Send(b"".join(map(fake.encode_event, burst))), *fake.chat_answer()]
    async with proxy(script) as served:
        got = await served.chat(stream=True)
    assert (got.reasoning.strip(), "".join(got.deltas)) == (LONG.strip(), text)


@pytest.mark.parametrize(
    ("answer", "shown"), [("Hello there", "Hello there"), ("Sorry.", "Hello")]
)
async def test_replaced_text_that_is_partly_out_gets_what_it_lacks(
    answer: str, shown: str
) -> None:
    held = {"event": "message", "answer": LONG}
    replaced = {"event": "message_replace", "answer": answer}
    burst = b"".join(map(fake.encode_event, (held, replaced)))
    script = [fake.message("Hello"), Sleep(1), Send(burst), *fake.chat_answer()]
    async with proxy(script) as served:
        got = await served.chat(stream=True)
    assert "".join(got.deltas) == shown


async def test_text_too_long_to_be_kept_is_not_sent_again_when_replaced() -> None:
    said = "x" * (opendify.MAX_KEPT_CHARS + 1)
    replaced = Send({"event": "message_replace", "answer": "No."})
    script = [fake.message(said), Sleep(1), replaced, *fake.chat_answer()]
    async with proxy(script) as served:
        got = await served.chat(stream=True)
    assert "".join(got.deltas) == said


async def test_texts_of_one_read_are_paced_as_one_text() -> None:
    events = [{"event": "message", "answer": f"{word} "} for word in LONG.split()]
    burst = Send(b"".join(map(fake.encode_event, events)))
    script = [fake.message("Hi "), Sleep(1), burst, Sleep(1), *fake.chat_answer()]
    async with proxy(script) as served:
        got = await served.chat(stream=True)
    times = [at for at, data in got.pieces if b'"content":"' in data]
    late = [at for at in times if at > times[0] + 0.5]
    assert len(set(late)) > 4
    assert late[-1] - late[0] == SOON(0.1, abs=0.05)


async def test_texts_of_one_read_are_known_though_they_are_not_paced() -> None:
    """Their conversation goes on; and none that is empty makes a chunk."""
    events = [{"event": "message", "answer": text} for text in ("b", "", "c")]
    burst = Send(b"".join(map(fake.encode_event, events)))
    script = [fake.message("a"), Sleep(1), burst, Sleep(1), *fake.chat_answer()]
    async with proxy(script) as served:
        got = await served.chat({"X-OpenDify-Smoothing": "off"}, stream=True)
        contents = [delta_of(chunk).get("content") for chunk in got.chunks]
        assert [text for text in contents if text is not None] == ["", "a", "b", "c"]
        messages = [*HI, {"role": "assistant", "content": "abc"}, user("More")]
        await served.chat(messages=messages)
        assert served.turns[-1].json["query"] == "More"


# ------------------------------------------------------------------------------
# Errors
# ------------------------------------------------------------------------------

PAGE = "<html><body>502 Bad Gateway</body></html>"
HTML = {"Content-Type": "text/html"}
UPSTREAM = (502, "server_error", "upstream_error")


def refusal(status: int, code: str, text: str = "It can't be.") -> list[Step]:
    """Return an error response as Dify writes it."""
    return [Status(status, {"code": code, "message": text, "status": status})]


@dataclass(frozen=True)
class Fault:
    """What Dify does, and what the client is told."""

    script: list[Step]
    expected: tuple[int, str, str]  # status, type, code
    message: str  # a part of it
    retry: str | None = None  # the header x-should-retry


INVALID = "invalid_request_error"
BEFORE = {
    "400": Fault(
        refusal(400, "invalid_param"), (400, INVALID, "invalid_param"), "It can't be."
    ),
    "400-app": Fault(
        refusal(400, "provider_not_initialize"),
        (400, INVALID, "provider_not_initialize"),
        "It can't be.",
    ),
    "401": Fault(
        refusal(401, "unauthorized", f"Access token {KEY} is invalid"),
        UPSTREAM,
        "MODEL_CONFIG",
        "false",
    ),
    "403": Fault(refusal(403, "forbidden"), UPSTREAM, "MODEL_CONFIG", "false"),
    "404": Fault(
        refusal(404, "not_found", "Workflow not found with id: x"),
        (400, INVALID, "not_found"),
        "Workflow not found",
    ),
    "429": Fault(
        refusal(429, "too_many_requests"),
        (429, "requests", "rate_limit_exceeded"),
        "It can't be.",
    ),
    "quota": Fault(
        refusal(400, "provider_quota_exceeded"),
        (429, "insufficient_quota", "insufficient_quota"),
        "It can't be.",
        "false",
    ),
    "500": Fault(refusal(500, "internal_server_error"), UPSTREAM, "It can't be."),
    "500-empty": Fault([Status(500)], UPSTREAM, "500"),
    "page-502": Fault([Status(502, PAGE, HTML)], UPSTREAM, "502"),
    "page-504": Fault(
        [Status(504, PAGE, HTML)], (504, "server_error", "upstream_timeout"), "504"
    ),
    "page-200": Fault([Status(200, PAGE, HTML)], UPSTREAM, "DIFY_API_BASE", "false"),
    "page-404": Fault([Status(404, PAGE, HTML)], UPSTREAM, "DIFY_API_BASE", "false"),
    "redirect": Fault(
        [Status(301, b"", {"Location": "https://x/v1"})],
        UPSTREAM,
        "DIFY_API_BASE",
        "false",
    ),
    "nothing": Fault([fake.Close()], UPSTREAM, "without an answer"),
    "reset": Fault([fake.Reset()], UPSTREAM, "without an answer"),
    "head-only": Fault([Send(b""), fake.Close()], UPSTREAM, "", "false"),
    "stream-of-nothing": Fault([Send(b"")], UPSTREAM, "broke off", "false"),
    "error-event": Fault(
        [fake.error_event("The model failed.", "completion_request_error")],
        (502, "server_error", "completion_request_error"),
        "The model failed.",
        "false",
    ),
    "error-event-invalid": Fault(
        [fake.error_event("Run failed: no", "invalid_param", 400)],
        (502, "server_error", "invalid_param"),
        "Run failed: no",
        "false",
    ),
    "error-event-429": Fault(
        [fake.error_event("Error: 429 Too Many Requests")],
        (429, "requests", "rate_limit_exceeded"),
        "Too Many Requests",
    ),
    "error-event-bare": Fault(
        [Send(b'data: {"event": "error"}\n\n')], UPSTREAM, "", "false"
    ),
    "silence": Fault(
        [Hang()], (504, "server_error", "upstream_timeout"), "does not answer"
    ),
    "pings-only": Fault(
        [fake.PING, Hang()],
        (504, "server_error", "upstream_timeout"),
        "DIFY_FIRST_EVENT_TIMEOUT",
    ),
}


@pytest.mark.parametrize("fault", BEFORE.values(), ids=BEFORE.keys())
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_error_before_the_answer(stream: bool, fault: Fault) -> None:
    """It is a real HTTP error, and the next request is served as if nothing was."""
    variables = {"DIFY_FIRST_EVENT_TIMEOUT": "3"}
    async with proxy(fault.script, variables=variables) as served:
        got = await served.chat(stream=stream)
        served.dify.app(KEY)
        after = await served.chat(stream=stream)
    error = got.error
    assert (got.status, error["type"], error["code"]) == fault.expected
    assert fault.message in error["message"]
    assert KEY not in error["message"]
    assert got.headers.get("x-should-retry") == fault.retry
    is_limited = fault.expected[2] == "rate_limit_exceeded"
    assert ("retry-after" in got.headers) == is_limited
    assert after.status == 200


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "script",
    [
        pytest.param([Status(500, PAGE, HTML)], id="refused"),
        pytest.param([fake.message("Half"), fake.error_event()], id="error"),
        pytest.param([fake.message("Half"), fake.Close()], id="broken"),
        pytest.param([fake.message("Half"), Send(b"{}\n\n"), Hang()], id="silent"),
    ],
)
async def test_failed_request_does_not_wait_for_garbage_collection(
    script: list[Step], stream: bool
) -> None:
    """A question may be long; the error's frames hold it, and the error."""
    gc.collect()
    gc.disable()
    try:
        async with proxy(script) as served:
            await served.chat(stream=stream)
            await asyncio.sleep(opendify.STOP_DRAIN_S + 1)
            held = [o for o in gc.get_objects() if isinstance(o, opendify.Question)]
    finally:
        gc.enable()
    assert held == []


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_dify_that_can_not_be_reached(stream: bool) -> None:
    async with proxy() as served:
        served.dify.refuse_next()
        refused = await served.chat(stream=stream)
        assert (await served.chat(stream=stream)).status == 200
    variables = {"DIFY_API_BASE": "http://127.0.0.1:1/v1"}
    async with proxy(variables=variables) as served:
        closed = await served.chat(stream=stream)
    for got in (refused, closed):
        error = got.error
        assert (got.status, error["type"], error["code"]) == UPSTREAM


AFTER = {
    "error": Fault(
        [fake.error_event("The model failed.")],
        (502, "server_error", "completion_request_error"),
        "The model failed.",
        "false",
    ),
    "rate-limit": Fault(
        [fake.error_event("Rate limit reached")],
        (429, "requests", "rate_limit_exceeded"),
        "Rate limit reached",
    ),
    "cut": Fault([fake.Close()], UPSTREAM, "", "false"),
    "reset": Fault([fake.Reset()], UPSTREAM, "", "false"),
    "end-without-an-end": Fault([], UPSTREAM, "broke off", "false"),
    "half-an-event": Fault(
        [Send(b'data: {"event": "mess'), fake.Close()], UPSTREAM, "", "false"
    ),
    "silence": Fault(
        [Hang()], (504, "server_error", "upstream_timeout"), "IDLE", "false"
    ),
}


@pytest.mark.parametrize("fault", AFTER.values(), ids=AFTER.keys())
async def test_error_in_the_middle_of_a_stream(fault: Fault) -> None:
    """The text before it stays; no finish reason pretends that this is the answer."""
    script = [fake.message("Hel"), fake.message("lo"), *fault.script]
    async with proxy(script, variables={"DIFY_IDLE_TIMEOUT": "30"}) as served:
        got = await served.chat(stream=True)
        served.dify.app(KEY)
        after = await served.chat(stream=True)
    *chunks, last = got.chunks
    assert got.status == 200
    assert list(last) == ["error"]
    assert (got.error["type"], got.error["code"]) == fault.expected[1:]
    assert fault.message in got.error["message"]
    assert "".join(got.deltas) == "Hello"
    assert {chunk["choices"][0]["finish_reason"] for chunk in chunks} == {None}
    assert after.chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("fault", AFTER.values(), ids=AFTER.keys())
async def test_error_in_the_middle_of_an_answer_that_is_not_streamed(
    fault: Fault,
) -> None:
    script = [fake.message("Hel"), fake.message("lo"), *fault.script]
    async with proxy(script, variables={"DIFY_IDLE_TIMEOUT": "30"}) as served:
        got = await served.chat()
        served.dify.app(KEY)
        after = await served.chat()
    error = got.error
    assert (got.status, error["type"], error["code"]) == fault.expected
    assert fault.message in error["message"]
    assert got.headers.get("x-should-retry") == fault.retry
    assert after.message["content"].startswith("Hello! You said")


async def test_run_that_is_given_up_is_stopped() -> None:
    """It would go on unseen, and cost."""
    script: list[Step] = [fake.message("Hello"), Hang()]
    async with proxy(script, variables={"DIFY_IDLE_TIMEOUT": "30"}) as served:
        got = await served.chat(user="al")
        await served.dify.until(lambda: not served.dify.running)
        stops = [(stop.user, stop.effective) for stop in served.dify.stops]
    assert got.status == 504
    assert stops == [("al", True)]


@pytest.mark.parametrize("text", ["Hello", ""], ids=["after-text", "at-once"])
async def test_run_with_an_event_that_is_no_json_is_stopped(text: str) -> None:
    """It goes on, and a client that repeats the request would begin others."""
    said = json.dumps({"event": "message", "task_id": "t1", "answer": text}).encode()
    script: list[Step] = [Send(b"data: %b\n\ndata: {oops\n\n" % said), Hang()]
    async with proxy(script) as served:
        got = await served.chat(user="al")
        await served.dify.until(lambda: served.dify.stops)
        assert [stop.task_id for stop in served.dify.stops] == ["t1"]
    assert (got.status, got.headers.get("x-should-retry")) == (502, "false")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("stored", "is_good"), [("Hello, world", True), ("Goodbye", False), ("", False)]
)
async def test_rest_of_a_broken_stream_is_what_dify_stored(
    stored: str, is_good: bool, stream: bool
) -> None:
    script: list[Step] = [fake.message("Hel"), fake.message("lo"), fake.Close()]

    async with proxy(script) as served:

        def page(_: fake.Request) -> list[Step]:
            (conversation,) = served.dify.conversations.values()
            row = {"id": conversation.messages[0].id, "answer": stored}
            return [Status(200, {"limit": 5, "has_more": False, "data": [row]})]

        served.dify.app(KEY, script=script, overrides={"/messages": page})
        got = await served.chat(stream=stream)
    if not is_good:
        assert got.error["code"] == "upstream_error"
    elif stream:
        check_chat_stream(got.chunks)
        assert "".join(got.deltas) == stored
    else:
        assert got.message["content"] == stored


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"model": "m"}', b'{"messages": []}']
)
async def test_bad_body_is_refused_without_asking_dify(body: bytes) -> None:
    async with proxy() as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        call = Call(reader, writer)
        served.asked.append(call)
        got = await call.read_rest()
        assert served.dify.requests == []
    assert (got.status, got.error["type"]) == (400, INVALID)


# ------------------------------------------------------------------------------
# Time
# ------------------------------------------------------------------------------

KEEP_ALIVE = b": keep-alive\n\n"


@pytest.mark.parametrize("seconds", [0, 3, 4.9])
async def test_head_waits_for_the_first_event(seconds: float) -> None:
    async with proxy([Sleep(seconds), *fake.chat_answer("Hi")]) as served:
        start = now()
        got = await served.chat(stream=True)
    assert got.head_at - start == SOON(seconds, abs=0.05)
    assert (
        got.headers["x-dify-conversation-id"]
        == got.chunks[0]["dify"]["conversation_id"]
    )


async def test_head_waits_five_seconds_at_most_then_comments_keep_it_alive() -> None:
    async with proxy([Sleep(60), *fake.chat_answer("Hi")]) as served:
        start = now()
        got = await served.chat(stream=True)
    assert got.head_at - start == SOON(5, abs=0.05)
    beats = [at - start for at in got.times_of(KEEP_ALIVE)]
    assert beats == SOON([20, 35, 50], abs=0.1)
    check_chat_stream(got.chunks)
    assert "".join(got.deltas) == "Hi"


@pytest.mark.parametrize("is_strict", [False, True], ids=["plain", "strict"])
async def test_head_of_a_silent_answer_has_ids_unless_others_may_follow(
    is_strict: bool,
) -> None:
    fields = {"response_format": {"type": "json_object"}} if is_strict else {}
    script = [fake.message(""), Sleep(10), *fake.chat_answer("{}")]
    async with proxy(script) as served:
        start = now()
        got = await served.chat(stream=True, **fields)
    assert got.head_at - start == SOON(5, abs=0.05)
    id_ = got.headers.get("x-dify-conversation-id")
    (known,) = served.dify.conversations
    assert id_ == (None if is_strict else known)


async def test_comments_keep_a_silent_answer_alive() -> None:
    script = [fake.message("a"), Sleep(40), *fake.chat_answer("b")]
    async with proxy(script) as served:
        got = await served.chat(stream=True)
    beats = [at - got.head_at for at in got.times_of(KEEP_ALIVE)]
    assert beats == SOON([15, 30], abs=0.1)
    assert "".join(got.deltas) == "ab"


async def test_silent_choices_are_kept_alive_by_one_comment() -> None:
    script = [fake.message(""), Sleep(40), *fake.chat_answer("Hi")]
    async with proxy(script) as served:
        start = now()
        got = await served.chat(stream=True, n=3)
    beats = [at - start for at in got.times_of(KEEP_ALIVE)]
    assert beats == SOON([20, 35], abs=0.1)
    assert "x-dify-conversation-id" not in got.headers  # there are three


async def test_no_comments_while_text_flows() -> None:
    script = fake.chat_answer(*"abcdef", delay=10)
    async with proxy(script) as served:
        got = await served.chat(stream=True)
    assert got.times_of(KEEP_ALIVE) == []


@pytest.mark.parametrize(
    ("late", "code"),
    [
        (refusal(400, "invalid_param"), "invalid_param"),
        ([fake.error_event()], "completion_request_error"),
    ],
    ids=["status", "event"],
)
async def test_late_refusal_is_an_event(late: list[Step], code: str) -> None:
    async with proxy([Sleep(8), *late]) as served:
        got = await served.chat(stream=True)
    begin, last = got.chunks
    assert (got.status, list(last)) == (200, ["error"])
    assert delta_of(begin)["role"] == "assistant"
    assert got.error["code"] == code


async def test_whole_answer_may_take_its_time() -> None:
    async with proxy([Sleep(100), *fake.chat_answer("Hi")]) as served:
        got = await served.chat()
    assert got.message["content"] == "Hi"


# ------------------------------------------------------------------------------
# Inputs
# ------------------------------------------------------------------------------

TONE = {
    "select": {
        "label": "Tone",
        "variable": "tone",
        "required": False,
        "options": ["formal", "casual"],
    }
}
FORM = {"user_input_form": [fake.text_input("topic"), TONE]}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("mode", ["chat", "advanced-chat"])
async def test_missing_input_lists_what_the_app_wants(mode: str, stream: bool) -> None:
    async with proxy(mode=mode, parameters=FORM) as served:
        got = await served.chat(stream=stream, inputs={"other": 1})
    assert (got.status, got.error["type"]) == (400, INVALID)
    assert got.error["param"] == "inputs"
    for text in ("topic is required", "topic (", "tone (select", "formal, casual"):
        assert text in got.error["message"]


async def test_missing_input_lists_what_the_app_wants_by_now() -> None:
    before = {"user_input_form": [fake.text_input("query")]}
    async with proxy(mode="workflow", parameters=before) as served:
        await served.chat()
        served.dify.app(KEY, mode="workflow", parameters=FORM)
        got = await served.chat()
    assert got.status == 400 and "are: topic (" in got.error["message"]


async def test_workflow_without_a_text_input_lists_its_inputs() -> None:
    async with proxy(mode="workflow", parameters={"user_input_form": [TONE]}) as served:
        got = await served.chat()
        assert served.turns == []
    assert (got.status, got.error["type"]) == (400, INVALID)
    assert "tone (select" in got.error["message"]


async def test_inputs_of_the_request_lie_over_those_of_the_model() -> None:
    config = {"inputs": {"topic": "zebras", "tone": "formal"}}
    async with proxy(config=config, parameters=FORM) as served:
        await served.chat(inputs={"tone": "casual"})
        await served.chat(metadata={"inputs": '{"topic": "ants"}'})
        seen = [turn.json["inputs"] for turn in served.turns]
    assert seen == [
        {"topic": "zebras", "tone": "casual"},
        {"topic": "ants", "tone": "formal"},
    ]


@pytest.mark.parametrize(
    ("names", "config", "variable"),
    [
        (["about", "question"], {}, "question"),
        (["about"], {}, "about"),
        (["a", "b"], {"query_variable": "b"}, "b"),
    ],
)
async def test_text_goes_to_a_workflow_s_input(
    names: list[str], config: JSONObject, variable: str
) -> None:
    rows = [fake.text_input(name, required=False) for name in names]
    async with proxy(
        mode="workflow", config=config, parameters={"user_input_form": rows}
    ) as served:
        await served.chat()
        (turn,) = served.turns
    assert turn.json["inputs"] == {variable: "Hi"}


# ------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------

PNG = b"\x89PNG\r\n\x1a\n\xfb\xef\xbe\r\n--\r\n" + bytes(range(256))
PDF = b"%PDF-1.7\r\n\xff\x00"
IMAGE_URL = "https://pictures.example/a b/cat.png?x=1"


def base64_of(data: bytes) -> str:
    """Return data in Base64."""
    return base64.b64encode(data).decode()


PNG_URL = f"data:image/png;base64,{base64_of(PNG)}"
PDF_URL = f"data:application/pdf;base64,{base64_of(PDF)}"
SAFE_URL = f"data:image/png;base64,{base64.urlsafe_b64encode(PNG).decode().rstrip('=')}"
UPLOADED: dict[str, tuple[JSONObject, tuple[str, str, bytes], str]] = {
    "image-data-url": (
        {"type": "image_url", "image_url": {"url": PNG_URL, "detail": "high"}},
        ("image.png", "image/png", PNG),
        "image",
    ),
    "image-string": (
        {"type": "image_url", "image_url": PNG_URL},
        ("image.png", "image/png", PNG),
        "image",
    ),
    "image-input": (
        {"type": "input_image", "image_url": SAFE_URL},
        ("image.png", "image/png", PNG),
        "image",
    ),
    "image-quoted": (
        {
            "type": "image_url",
            "image_url": {"url": f"data:image/png,{quote(PNG, safe='')}"},
        },
        ("image.png", "image/png", PNG),
        "image",
    ),
    "video-data-url": (
        {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}},
        ("video.mp4", "video/mp4", bytes(3)),
        "video",
    ),
    "audio-data-url": (
        {"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64,AAAA"}},
        ("audio.wav", "audio/wav", bytes(3)),
        "audio",
    ),
    "file-base64": (
        {
            "type": "file",
            "file": {"file_data": base64_of(PDF), "filename": "Über 1.pdf"},
        },
        ("Über 1.pdf", "application/pdf", PDF),
        "document",
    ),
    "file-data-url": (
        {"type": "file", "file": {"file_data": PDF_URL, "filename": "a.pdf"}},
        ("a.pdf", "application/pdf", PDF),
        "document",
    ),
    "file-of-langbot": (
        {"type": "file_base64", "file_base64": PDF_URL, "file_name": "a.pdf"},
        ("a.pdf", "application/pdf", PDF),
        "document",
    ),
    "file-of-perplexity": (
        {"type": "file_url", "file_url": {"url": base64_of(PDF)}, "file_name": "a.pdf"},
        ("a.pdf", "application/pdf", PDF),
        "document",
    ),
    "file-no-name": (
        {"type": "file", "file": {"file_data": PDF_URL}},
        ("file.pdf", "application/pdf", PDF),
        "document",
    ),
    "file-input": (
        {"type": "input_file", "file_data": base64_of(PDF), "filename": "a.pdf"},
        ("a.pdf", "application/pdf", PDF),
        "document",
    ),
    "audio": (
        {"type": "input_audio", "input_audio": {"data": "SUQz", "format": "mp3"}},
        ("audio.mp3", "audio/mpeg", b"ID3"),
        "audio",
    ),
}
ALL_FILES: dict[str, JSONObject] = {
    "file_upload": {
        "enabled": True,
        "allowed_file_types": ["image", "document", "audio", "video"],
        "allowed_file_extensions": [],
        "allowed_file_upload_methods": ["local_file", "remote_url"],
        "number_limits": 3,
        "image": {
            "enabled": True,
            "number_limits": 3,
            "transfer_methods": ["local_file", "remote_url"],
        },
    },
    "system_parameters": {"image_file_size_limit": 1, "file_size_limit": 1},
}


def with_parts(*parts: JSONObject) -> list[JSONObject]:
    """Return messages whose last one has a text and some parts."""
    return [{"role": "user", "content": [{"type": "text", "text": "Look"}, *parts]}]


@pytest.mark.parametrize(
    ("row", "expected", "kind"), UPLOADED.values(), ids=UPLOADED.keys()
)
@pytest.mark.parametrize("mode", ["chat", "advanced-chat"])
async def test_file_arrives_byte_for_byte(
    mode: str, row: JSONObject, expected: tuple[str, str, bytes], kind: str
) -> None:
    async with proxy(mode=mode, parameters=ALL_FILES) as served:
        got = await served.chat(messages=with_parts(row), user="al")
        (upload,) = served.dify.uploads.values()
        (turn,) = served.turns
    assert got.status == 200
    assert (upload.name, upload.mime_type, upload.data) == expected
    assert (upload.user, upload.key, turn.user) == ("al", KEY, "al")
    mapping = {"type": kind, "transfer_method": "local_file"}
    assert turn.json["files"] == [{**mapping, "upload_file_id": upload.id}]
    assert turn.json["query"] == "Look"


async def test_large_file_arrives_byte_for_byte() -> None:
    data = random.Random(1).randbytes(3 << 20)
    url = f"data:image/png;base64,{base64_of(data)}"
    limits = {**ALL_FILES, "system_parameters": {"image_file_size_limit": "10"}}
    async with proxy(parameters=limits) as served:
        got = await served.chat(
            messages=with_parts({"type": "image_url", "image_url": url})
        )
        (upload,) = served.dify.uploads.values()
    assert got.status == 200
    assert upload.data == data


@pytest.mark.parametrize(
    ("row", "kind", "url"),
    [
        ({"type": "image_url", "image_url": {"url": IMAGE_URL}}, "image", IMAGE_URL),
        ({"type": "image_url", "image_url": "http://x/p"}, "image", "http://x/p"),
        (
            {"type": "video_url", "video_url": {"url": "http://x/v"}},
            "video",
            "http://x/v",
        ),
        (
            {"type": "audio_url", "audio_url": {"url": "http://x/a"}},
            "audio",
            "http://x/a",
        ),
        (
            {"type": "input_file", "file_url": "https://x/a.pdf"},
            "document",
            "https://x/a.pdf",
        ),
        (
            {"type": "file_url", "file_url": "https://x/a?b", "file_name": "a.pdf"},
            "document",
            "https://x/a?b",
        ),
        (
            {"type": "file_url", "file_url": {"url": "https://x/a.pdf"}},
            "document",
            "https://x/a.pdf",
        ),
    ],
)
async def test_url_of_a_file_is_passed_on(row: JSONObject, kind: str, url: str) -> None:
    async with proxy(parameters=ALL_FILES) as served:
        await served.chat(messages=with_parts(row))
        (turn,) = served.turns
        assert served.dify.uploads == {}
    assert turn.json["files"] == [
        {"type": kind, "transfer_method": "remote_url", "url": url}
    ]


async def test_files_of_earlier_messages_are_not_lost() -> None:
    first = with_parts(UPLOADED["image-data-url"][0])
    messages = [
        *first,
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "What colour?"},
    ]
    async with proxy(parameters=ALL_FILES) as served:
        await served.chat(messages=messages)
        (turn,) = served.turns
        (upload,) = served.dify.uploads.values()
    assert upload.data == PNG
    assert [file["upload_file_id"] for file in turn.json["files"]] == [upload.id]
    for text in ("Look", "A cat.", "What colour?"):
        assert text in turn.json["query"]


async def test_file_goes_to_a_workflow_s_file_input() -> None:
    row = {"variable": "paper", "label": "Paper", "required": True}
    form = [
        fake.text_input("query"),
        {"file": {**row, "allowed_file_types": ["document"]}},
    ]
    async with proxy(mode="workflow", parameters={"user_input_form": form}) as served:
        await served.chat(messages=with_parts(UPLOADED["file-base64"][0]))
        (turn,) = served.turns
        (upload,) = served.dify.uploads.values()
    mapping = {"type": "document", "transfer_method": "local_file"}
    assert turn.json["inputs"] == {
        "query": "Look",
        "paper": {**mapping, "upload_file_id": upload.id},
    }


IMAGE = UPLOADED["image-data-url"][0]
BIG = {"type": "file", "file": {"file_data": base64_of(b"a" * (1 << 20) + b"b")}}
BIG["file"]["filename"] = "big.txt"  # type: ignore[index]
ONLY_IMAGES = {
    "file_upload": {**ALL_FILES["file_upload"], "allowed_file_types": ["image"]}
}
NO_URLS = {
    "file_upload": {
        **ALL_FILES["file_upload"],
        "allowed_file_upload_methods": ["local_file"],
    }
}


OVER_A_LIMIT = pytest.mark.parametrize(
    ("parameters", "parts", "texts"),
    [
        pytest.param({}, [IMAGE], ["image.png", "takes no files"], id="off"),
        pytest.param(ALL_FILES, [IMAGE] * 4, ["image.png", "3 files"], id="too-many"),
        pytest.param(ALL_FILES, [BIG], ["big.txt", "large", "1 MB"], id="too-big"),
        pytest.param(
            ONLY_IMAGES,
            [IMAGE, UPLOADED["file-data-url"][0]],
            ["a.pdf", "image, not document"],
            id="kind",
        ),
        pytest.param(
            NO_URLS,
            [{"type": "image_url", "image_url": "http://x/c.png"}],
            ["c.png", "URL"],
            id="no-urls",
        ),
    ],
)


@OVER_A_LIMIT
async def test_file_over_a_limit_is_refused_before_anything_is_uploaded(
    parameters: JSONObject, parts: list[JSONObject], texts: Sequence[str]
) -> None:
    async with proxy(parameters=parameters) as served:
        got = await served.chat(messages=with_parts(*parts))
        assert (served.dify.uploads, served.turns) == ({}, [])
    assert (got.status, got.error["param"]) == (400, "messages")
    for text in texts:
        assert text in got.error["message"]


@OVER_A_LIMIT
async def test_earlier_file_over_a_limit_is_only_named(
    parameters: JSONObject, parts: list[JSONObject], texts: Sequence[str]
) -> None:
    """Such as one that another model has answered."""
    answered = {"role": "assistant", "content": "A cat."}
    async with proxy(parameters=parameters) as served:
        messages = [*with_parts(*parts), answered, user("Sure?")]
        assert (await served.chat(messages=messages)).status == 200
        (turn,) = served.turns
    assert ("files" in turn.json, served.dify.uploads) == (False, {})
    _, _, named = turn.json["query"].partition('file_not_included="')
    assert texts[0] in named.partition('">')[0]


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ([Status(413, {"code": "file_too_large", "message": "", "status": 413})], 413),
        ([Status(415, {"code": "unsupported_file_type", "message": "No."})], 400),
        ([Status(500, {"code": "internal_server_error", "message": "x"})], 502),
        ([fake.Close()], 502),
        ([Status(201, {"name": "no id"})], 502),
    ],
    ids=["too-large", "unsupported", "crash", "cut", "no-id"],
)
async def test_failed_upload_names_the_file(script: list[Step], status: int) -> None:
    overrides = {"/files/upload": script}
    async with proxy(parameters=ALL_FILES, overrides=overrides) as served:
        got = await served.chat(messages=with_parts(UPLOADED["file-base64"][0]))
        assert served.turns == []
    assert got.status == status
    assert "Über 1.pdf" in got.error["message"]


def test_files_of_the_tables_are_of_eleven_kinds() -> None:
    """Five ways to send an image, one of them by URL, and six to send a file."""
    ways = [name.partition("-")[0] for name in UPLOADED]
    assert (ways.count("image") + 1, ways.count("file")) == (5, 6)


# ------------------------------------------------------------------------------
# Leaving early
# ------------------------------------------------------------------------------

STOP_PATHS = {
    "completion": "/completion-messages/{}/stop",
    "workflow": "/workflows/tasks/{}/stop",
}


def unfinished(mode: str) -> list[Step]:
    """Return the beginning of an answer that hangs after its first text."""
    if mode == "workflow":
        return [Send({"event": "workflow_started"}), fake.text_chunk("Hello"), Hang()]
    if mode in ("agent-chat", "agent"):
        text = Send({"event": "agent_message", "answer": "Hello"})
        return [fake.agent_thought(), text, Hang()]
    return [fake.message("Hello"), Hang()]


async def see_stop(served: Proxy, mode: str) -> None:
    """Check that Dify is told to stop within a second, and that nothing is left."""
    start = now()
    await served.dify.until(lambda: served.dify.stops and not served.dify.running)
    assert now() - start <= 1
    (stop,) = served.dify.stops
    path = STOP_PATHS.get(mode, "/chat-messages/{}/stop").format(stop.task_id)
    assert (stop.user, stop.key, stop.path, stop.effective) == ("al", KEY, path, True)
    await served.dify.until(lambda: not served.dify.open_connections)
    assert own_tasks() == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("smoothing", ["on", "off"])
async def test_run_is_stopped_when_the_client_leaves_a_stream(
    mode: str, smoothing: str
) -> None:
    async with proxy(unfinished(mode), mode=mode, parameters=form_of(mode)) as served:
        headers = {"X-OpenDify-Smoothing": smoothing}
        call = await served.begin(headers, stream=True, user="al")
        assert "Hello".startswith(await call.read_text())
        await call.leave()
        await see_stop(served, mode)


async def test_run_is_stopped_when_the_client_reads_nothing() -> None:
    script = fake.chat_answer(*["x" * 500_000] * 200, delay=1.0)
    async with proxy(script) as served:
        call = await served.begin(stream=True)
        # Under load the kernel takes a little more later: then the wait begins anew.
        await asyncio.sleep(3 * opendify.WRITE_TIMEOUT_S)
        assert [stop.effective for stop in served.dify.stops] == [True]
        await call.leave()


@pytest.mark.parametrize("mode", MODES)
async def test_run_is_stopped_when_the_client_leaves_before_the_answer(
    mode: str,
) -> None:
    async with proxy(unfinished(mode), mode=mode, parameters=form_of(mode)) as served:
        call = await served.begin(user="al")
        await served.dify.until(lambda: served.dify.running)
        await asyncio.sleep(1)
        await call.leave()
        await see_stop(served, mode)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_run_is_stopped_as_soon_as_it_has_a_name(stream: bool) -> None:
    """The client leaves before Dify has said a word: no task id is known yet."""
    gate = asyncio.Event()
    script = [fake.Wait(gate), *unfinished("chat")]
    async with proxy(script) as served:
        call = await served.begin(stream=stream, user="al")
        await served.dify.until(lambda: served.dify.running)
        await call.leave()
        await asyncio.sleep(1)
        assert served.dify.stops == []
        gate.set()
        await see_stop(served, "chat")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("late", [False, True], ids=["named", "named-later"])
async def test_run_without_text_so_far_is_stopped(late: bool, stream: bool) -> None:
    """A workflow may show its output at its end only."""
    gate, mode = asyncio.Event(), "workflow"
    script: list[Step] = [fake.Wait(gate), Send({"event": "workflow_started"}), Hang()]
    async with proxy(script, mode=mode, parameters=form_of(mode)) as served:
        call = await served.begin(stream=stream, user="al")
        await served.dify.until(lambda: served.dify.running)
        if not late:
            gate.set()
        await asyncio.sleep(1)
        await call.leave()
        await asyncio.sleep(0)
        gate.set()
        await see_stop(served, mode)


FAILING_CHOICES: dict[str, tuple[list[list[Step]], float]] = {
    # Dify may take its time to stop the run of the other one.
    "late": (
        [
            [fake.message("One."), Hang()],
            [Sleep(1), Send({"event": "error", "code": "x", "message": "No."})],
        ],
        8.0,
    ),
    # Dify's limit lets one run through, which has no name yet: it is stopped later.
    "at-once": (
        [
            [Status(429, {"code": "too_many_requests", "message": "No."})],
            [Sleep(3), fake.message("One."), Hang()],
        ],
        0.05,
    ),
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("how", FAILING_CHOICES)
async def test_failed_choice_does_not_wait_for_the_others(
    how: str, stream: bool
) -> None:
    """Their runs are stopped beside."""
    scripts, stop_delay_s = FAILING_CHOICES[how]
    turns = iter(scripts)
    async with proxy(lambda _: next(turns), stop_delay_s=stop_delay_s) as served:
        start = now()
        got = await served.chat(n=2, stream=stream)
        assert got.error["message"] == "No."
        assert now() - start < 2
        await served.dify.until(lambda: not served.dify.open_connections)
        assert [stop.effective for stop in served.dify.stops] == [True]


async def test_request_that_was_left_lasts_until_all_its_runs_are_stopped() -> None:
    """The server would not wait for them at its end; one has no name for a while."""
    scripts: list[list[Step]] = [
        [fake.message("One."), Hang()],
        [Sleep(5), fake.message("Two."), Hang()],
    ]
    async with proxy(lambda _: scripts.pop(0)) as served:
        call = await served.begin(n=2, stream=True)
        await served.dify.until(lambda: len(served.turns) == 2)
        await asyncio.sleep(1)
        await call.leave()
        await served.dify.until(lambda: served.dify.stops)
        assert await served.server.drain(30)
        assert [stop.effective for stop in served.dify.stops] == [True, True]


@pytest.mark.parametrize("turns", range(8))
async def test_choice_that_was_late_writes_nothing_behind_the_end(
    turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to Python 3.11 `wait_for` may swallow a cancel that comes with its result."""
    begun = opendify._begun
    failed, connections = asyncio.Event(), itertools.count()

    async def fail(*arguments: Any) -> opendify.Turn:
        try:
            return await begun(*arguments)
        except opendify.ProxyError:
            failed.set()
            raise

    async def connect(*address: Any, **options: Any) -> opendify.Wire:
        wire = await opendify.open_wire(*address, **options)
        try:
            if next(connections) == 1:
                await failed.wait()
                for _ in range(turns):
                    await asyncio.sleep(0)
        except asyncio.CancelledError:
            wire.abort()
            raise
        return wire

    monkeypatch.setattr(opendify, "_begun", fail)
    scripts: list[list[Step]] = [
        [Sleep(0.2), fake.error_event("No.")],
        fake.chat_answer("Late."),
    ]
    async with proxy(lambda _: scripts.pop(0)) as served:
        monkeypatch.setattr(served.site.dify.api.pool, "connect", connect)
        call = await served.begin(n=2, stream=True)
        assert (await call.read_rest()).error["message"] == "No."
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(call._reader.read(1), 2)


async def test_choice_that_was_held_back_is_shown_before_the_error_of_another() -> None:
    """It is over in Dify, and its text still being shown; nothing is behind the end."""
    scripts: list[list[Step]] = [
        [fake.message("One."), Sleep(0.3), fake.error_event("No.")],
        [*fake.chat_answer("A", "b" * 400, delay=0.1)],
    ]
    async with proxy(
        lambda _: scripts.pop(0), variables={"STREAM_MAX_LAG": "1"}
    ) as served:
        call = await served.begin(n=2, stream=True)
        got = await call.read_rest()
        assert got.error["message"] == "No."
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(call._reader.read(1), 2)
    said = ["", ""]
    for chunk in got.chunks[:-1]:
        said[chunk["choices"][0]["index"]] += delta_of(chunk).get("content", "")
    assert sorted(said) == ["A" + "b" * 400, "One."]


async def test_answer_that_was_cut_is_stopped_once() -> None:
    """The client leaves while what came before its stop is still being shown."""
    script: list[Step] = [fake.message("One."), fake.message(" Two. STOP"), Hang()]
    async with proxy(script, variables={"STREAM_MAX_LAG": "5"}) as served:
        call = await served.begin(stream=True, stop=["STOP"], user="al")
        await call.read_text()
        await call.leave()
        await see_stop(served, "chat")
        assert len(served.dify.stops) == 1


async def test_answer_does_not_wait_at_its_end_for_what_can_not_come() -> None:
    """An emoji may grow, but not once the answer is over."""
    script = fake.chat_answer("Hi, good 👍")
    async with proxy(script, variables={"STREAM_MAX_LAG": "5"}) as served:
        await served.chat(stream=True)
        assert now() < 1


async def test_no_turn_is_asked_for_when_the_client_has_left_before() -> None:
    info = [Sleep(2), Status(200, {"name": "App", "mode": "chat"})]
    async with proxy(config={"mode": ""}, overrides={"/info": info}) as served:
        call = await served.begin()
        await served.dify.until(lambda: served.dify.requests)
        await call.leave()
        await asyncio.sleep(5)
        assert [row.path for row in served.dify.requests] == ["/info"]


async def test_finished_answer_is_not_stopped() -> None:
    async with proxy(fake.chat_answer("Hi")) as served:
        call = await served.begin(stream=True)
        await call.read_rest()
        await call.leave()
        await served.dify.until(lambda: not served.dify.open_connections)
        assert (served.dify.stops, own_tasks()) == ([], [])


async def test_run_that_can_not_be_stopped_is_given_up() -> None:
    async with proxy(unfinished("chat"), stoppable=False) as served:
        call = await served.begin(stream=True)
        await call.read_text()
        await call.leave()
        await served.dify.until(lambda: not served.dify.running)
        await served.dify.until(lambda: not served.dify.open_connections)
        assert own_tasks() == []


async def test_text_that_was_held_back_comes_before_an_error() -> None:
    script: list[Step] = [
        fake.message("One,"),
        Sleep(0.5),
        fake.message(" two" * 50),
        Hang(),
    ]
    async with proxy(script, variables={"STREAM_MAX_LAG": "5"}) as served:
        call = await served.begin(stream=True)
        text = await call.read_text()
        await asyncio.sleep(1)
        assert not await served.server.drain(0)
        got = await call.read_rest()
    assert text + "".join(got.deltas) == "One," + " two" * 50
    assert got.error["code"] == "server_is_overloaded"


async def test_runs_are_stopped_when_the_server_is() -> None:
    async with proxy(unfinished("chat")) as served:
        call = await served.begin(stream=True, user="al")
        await call.read_text()
        assert not await served.server.drain(1)
        await see_stop(served, "chat")


# ------------------------------------------------------------------------------
# Recordings
# ------------------------------------------------------------------------------

ROWS = {(row.file, row.exchange): row for row in EXPECTED}
SAMPLE = [
    ROWS[name]
    for name in [
        ("dify-0.15.3/chat-streaming.json", 0),
        ("dify-0.15.3/chat-text-content.json", 0),
        ("dify-0.15.3/chat-big-answer.json", 0),
        ("dify-0.15.3/advanced-wrap-streaming.json", 0),
        ("dify-0.15.3/agent-streaming-two-tools.json", 0),
        ("dify-0.15.3/agent-text-content.json", 1),
        ("dify-0.15.3/completion-text-content.json", 2),
        ("dify-0.15.3/files-in-workflow.json", 7),
        ("dify-0.15.3/model-half-surrogates.json", 2),
        ("dify-0.15.3/moderation.json", 2),
        ("dify-0.15.3/think.json", 2),
        ("dify-0.15.3/workflow-multi-streaming.json", 0),
        ("dify-1.12.1/advanced-loop-with-answer.json", 0),
        ("dify-1.12.1/advanced-stop.json", 0),
        ("dify-1.12.1/advanced-text-content.json", 4),
        ("dify-1.12.1/agent-react-streaming.json", 0),
        ("dify-1.12.1/chat-big-answer.json", 0),
        ("dify-1.12.1/chat-client-disconnects.json", 0),
        ("dify-1.12.1/chat-model-error-at-start.json", 0),
        ("dify-1.12.1/chat-model-error-mid-stream.json", 1),
        ("dify-1.12.1/completion-streaming.json", 0),
        ("dify-1.12.1/knowledge-base.json", 0),
        ("dify-1.12.1/nginx-chat.json", 1),
        ("dify-1.12.1/nginx-chat.json", 4),
        ("dify-1.12.1/workflow-big-events.json", 0),
        ("dify-1.12.1/workflow-text-content.json", 0),
        ("streams/agent-chat-tool-call.sse", 0),
        ("streams/agent-new-mode.sse", 0),
        ("streams/chat-message-replace-midway.sse", 0),
        ("streams/chat-think-marker.sse", 0),
        ("streams/chat-unicode-line-separators.sse", 0),
        ("streams/chatflow-human-input-pause.sse", 0),
        ("streams/chatflow-reasoning-chunk.sse", 0),
        ("streams/workflow-outputs-only.sse", 0),
        ("streams/workflow-text-chunk.sse", 0),
    ]
]


def recording(row: Expected) -> Any:
    """Return what starts a proxy that answers with a recording."""
    script = fake.replay(row.file, row.exchange)
    return proxy(script, mode=row.mode, parameters=form_of(row.mode))


def check_text_and_files(row: Expected, text: str, base: str) -> None:
    """Check a text, with the files that follow it, against what is expected."""
    root = base.rpartition("/v1")[0]
    for kind, url, name in row.files:
        sign = "!" if kind == "image" else ""
        shown = name or url.partition("?")[0].rpartition("/")[2]
        absolute = url.replace("http://dify.example", root)
        link = f"\n\n{sign}[{shown}]({absolute})"
        assert text.endswith(link)
        text = text[: -len(link)]
    check_text(row, text)


def check_reasoning(row: Expected, text: str) -> None:
    """Check that each block of reasoning is there, and nothing where none is due."""
    assert bool(text) == bool(row.reasoning)
    assert all(block in text for block in row.reasoning)


@pytest.mark.parametrize("row", SAMPLE, ids=row_id)
async def test_recorded_answer_in_one_piece(row: Expected) -> None:
    async with recording(row) as served:
        got = await served.chat()
        base = served.dify.base
    if row.error:
        assert (got.status, got.error["code"]) == (row.error.status, row.error.code)
        assert row.error.contains in got.error["message"]
        return
    message, usage = got.message, got.json["usage"]
    check_text_and_files(row, message["content"], base)
    check_reasoning(row, message.get("reasoning_content", ""))
    assert got.json["choices"][0]["finish_reason"] == row.finish
    counts = (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"])
    assert counts == row.usage
    cited = [
        (citation["position"], citation["document_name"])
        for citation in message.get("citations", ())
    ]
    assert cited == row.citations
    ids = got.json.get("dify", {})
    assert (ids.get("conversation_id"), ids.get("message_id")) == (
        row.conversation_id,
        row.message_id,
    )


@pytest.mark.parametrize("row", SAMPLE, ids=row_id)
async def test_recorded_answer_streamed(row: Expected) -> None:
    """Smoothed as by default, but for the pauses, which a recording has not."""
    async with recording(row) as served:
        got = await served.chat(stream=True, stream_options={"include_usage": True})
        base = served.dify.base
    if row.error and not row.text:
        assert (got.status, got.error["code"]) == (row.error.status, row.error.code)
        return
    text = "".join(got.deltas)
    if row.error:
        assert (got.error["code"], text) == (row.error.code, row.text)
        return
    check_chat_stream(got.chunks, include_usage=True)
    *_, finish, last = got.chunks
    check_text_and_files(row, text, base)
    check_reasoning(row, got.reasoning)
    assert finish["choices"][0]["finish_reason"] == row.finish
    assert last["usage"]["total_tokens"] == row.usage[2]
    cited = [
        (citation["position"], citation["document_name"])
        for citation in delta_of(finish).get("citations", ())
    ]
    assert cited == row.citations
