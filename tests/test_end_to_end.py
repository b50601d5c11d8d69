"""The whole program as a process, and OpenAI's own clients of three generations.

Each client runs a script of its own in the Python that has it, and prints what it got
as JSON. Behind the proxy stands a fake Dify in the process of the tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Callable

import fake_dify as fake
import pytest
from expected_answers import EXPECTED
from fake_dify import FakeDify
from processes import few_variables

JSONObject = dict[str, Any]
SOURCE = Path(__file__).resolve().parent.parent / "opendify.py"
(RECORDED,) = [
    row
    for row in EXPECTED
    if (row.file, row.exchange) == ("dify-1.12.1/chat-text-content.json", 0)
]
ODD = "team/应用 1"


# ------------------------------------------------------------------------------
# Processes
# ------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Return the variables of a process: none that change what it does."""
    return {**few_variables(), "PYTHONIOENCODING": "utf-8", "NO_PROXY": "*"}


@contextlib.asynccontextmanager
async def running(
    folder: Path, *arguments: str, **variables: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Give a running `python opendify.py` and its base URL; it is ended by SIGTERM.

    Args:
        folder: a copy of the program runs in it, beside its .env.
        arguments: of the command line.
        variables: the lines of .env.
    """
    lines = [f"{name}='{value}'\n" for name, value in variables.items()]
    if lines:
        (folder / ".env").write_text("".join(lines), encoding="utf-8")
    program = str(shutil.copy(SOURCE, folder))
    server = await asyncio.create_subprocess_exec(
        sys.executable,
        *[program, "--port", "0", *arguments],
        cwd=folder,
        env=environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert server.stdout and server.stderr
    try:
        line = (await server.stdout.readline()).decode()
        address = re.search(r"http://127\.0\.0\.1:\d+/v1$", line.strip())
        assert address, line + (await server.stderr.read()).decode()
        yield server, address[0]
        if server.returncode is None:
            server.send_signal(signal.SIGTERM)
        _, log = await server.communicate()
        assert server.returncode == 0, log.decode()
        for complaint in (b"Traceback", b"raised exception"):
            assert complaint not in log, log.decode()
    finally:
        if server.returncode is None:
            server.kill()
            await server.communicate()


async def run_client(python: str, script: str, base: str) -> JSONObject:
    """Return what a client's script prints, parsed."""
    client = await asyncio.create_subprocess_exec(
        *[python, "-c", script, base],
        env=environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await client.communicate()
    assert client.returncode == 0, errors.decode()
    value: JSONObject = json.loads(output)
    return value


class RawStream:
    """A streamed chat at the level of bytes."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._reader = reader
        self._writer = writer
        self.texts: list[str] = []

    def ask(self, model: str) -> None:
        """Send the request."""
        messages = [{"role": "user", "content": "Hi"}]
        body = json.dumps({"model": model, "messages": messages, "stream": True})
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        self._writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())

    async def read_text(self) -> str:
        """Return the next text; "" when the stream ends with [DONE]."""
        while True:
            line = (await self._reader.readline()).decode()
            assert line, "the connection was closed"
            if line.strip() == "data: [DONE]":
                return ""
            found = re.match(r'data: .*"delta":({"content":.*?}),"logprobs"', line)
            if found and json.loads(found[1])["content"]:
                self.texts.append(json.loads(found[1])["content"])
                return self.texts[-1]

    async def close(self) -> None:
        """Leave."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


@contextlib.asynccontextmanager
async def raw_stream(base: str, model: str) -> AsyncIterator[RawStream]:
    """Give a streamed chat, from its request on; it is left at the end."""
    port = int(base.rpartition(":")[2].partition("/")[0])
    stream = RawStream(*await asyncio.open_connection("127.0.0.1", port))
    try:
        stream.ask(model)
        yield stream
    finally:
        await stream.close()


# ------------------------------------------------------------------------------
# OpenAI's clients
# ------------------------------------------------------------------------------

# As users of the first OpenDify wrote it.
OLD_SCRIPT = """
import asyncio, json, sys
import openai

openai.api_base = sys.argv[1]
openai.api_key = "sk-any"
messages = [{"role": "user", "content": "Hi"}]
got = {"release": openai.version.VERSION}
got["models"] = [model["id"] for model in openai.Model.list()["data"]]
got["odd"] = openai.Model.retrieve("team/\\u5e94\\u7528 1")["id"]

answer = openai.ChatCompletion.create(model="recorded", messages=messages)
got["whole"] = answer.choices[0].message.content
got["usage"] = answer.usage.to_dict()
answer = openai.ChatCompletion.create(engine="recorded", messages=messages)
got["engine"] = answer["choices"][0]["message"]["content"]


def stream(model, texts):
    chunks = openai.ChatCompletion.create(model=model, messages=messages, stream=True)
    for chunk in chunks:
        texts.append(chunk["choices"][0]["delta"].get("content", ""))
        got["finish"] = chunk["choices"][0]["finish_reason"]


async def astream(texts):
    chunks = await openai.ChatCompletion.acreate(
        model="recorded", messages=messages, stream=True
    )
    async for chunk in chunks:
        texts.append(chunk.choices[0].delta.get("content", ""))


async def awhole():
    answer = await openai.ChatCompletion.acreate(model="recorded", messages=messages)
    got["async_whole"] = answer.choices[0].message.content
    await openai.aiosession.get().close() if openai.aiosession.get() else None


def texts_of(run, *arguments):
    texts = []
    result = run(*arguments, texts)
    if asyncio.iscoroutine(result):
        asyncio.run(result)
    return "".join(texts)


got["streamed"] = texts_of(stream, "recorded")
got["async_streamed"] = texts_of(astream)
asyncio.run(awhole())
got["half"] = texts_of(stream, "half")
broken = []
try:
    stream("broken", broken)
except openai.error.APIError as error:
    got["broken"] = ["".join(broken), type(error).__name__, str(error)]
for model in ("none", "refused"):
    try:
        stream(model, [])
    except openai.error.OpenAIError as error:
        got[model] = [type(error).__name__, error.http_status, error.code]
print(json.dumps(got))
"""

SCRIPT = """
import asyncio, json, sys
import openai

options = {"base_url": sys.argv[1], "api_key": "sk-any", "max_retries": 0}
client = openai.OpenAI(**options)
messages = [{"role": "user", "content": "Hi"}]
create = client.chat.completions.create
got = {"release": openai.__version__}
got["models"] = [model.id for model in client.models.list()]
got["odd"] = client.models.retrieve("team/\\u5e94\\u7528 1").id
bare = client.with_options(base_url=sys.argv[1][: -len("/v1")])
assert [model.id for model in bare.models.list()] == got["models"]

answer = create(model="recorded", messages=messages)
got["whole"] = answer.choices[0].message.content
got["usage"] = {
    name: getattr(answer.usage, name)
    for name in ("prompt_tokens", "completion_tokens", "total_tokens")
}


def stream(model, texts):
    for chunk in create(model=model, messages=messages, stream=True):
        texts.append(chunk.choices[0].delta.content or "")
        got["finish"] = chunk.choices[0].finish_reason


def helper(texts):
    with client.chat.completions.stream(
        model="recorded", messages=messages, stream_options={"include_usage": True}
    ) as events:
        for event in events:
            pass
        answer = events.get_final_completion()
    assert answer.usage.total_tokens == got["usage"]["total_tokens"], answer.usage
    assert answer.choices[0].message.role == "assistant"
    texts.append(answer.choices[0].message.content)


async def arun(streamed, whole):
    async with openai.AsyncOpenAI(**options) as client:
        create = client.chat.completions.create
        answer = await create(model="recorded", messages=messages)
        whole.append(answer.choices[0].message.content)
        async for chunk in await create(
            model="recorded", messages=messages, stream=True
        ):
            streamed.append(chunk.choices[0].delta.content or "")


def texts_of(run, *arguments):
    texts = []
    run(*arguments, texts)
    return "".join(texts)


got["streamed"] = texts_of(stream, "recorded")
got["helper"] = texts_of(helper)
streamed, whole = [], []
asyncio.run(arun(streamed, whole))
got["async_whole"], got["async_streamed"] = whole[0], "".join(streamed)
got["half"] = texts_of(stream, "half")
broken = []
try:
    stream("broken", broken)
except openai.APIError as error:
    got["broken"] = ["".join(broken), type(error).__name__, str(error)]
    assert (error.type, error.code) == ("server_error", "completion_request_error")
for model in ("none", "refused"):
    try:
        stream(model, [])
    except openai.APIStatusError as error:
        assert error.request_id.startswith("req_")
        got[model] = [type(error).__name__, error.status_code, error.code]
print(json.dumps(got))
"""


@pytest.fixture(params=["0.28.1", "1.109.1", "newest"])
def client_of(
    request: pytest.FixtureRequest, openai_python: Callable[[str], str]
) -> tuple[str, str]:
    """A release of OpenAI's client, and a Python that has it."""
    release = str(request.param)
    if release != "newest":
        return release, openai_python(release)
    if importlib.util.find_spec("openai") is None:
        pytest.skip("openai is not installed beside the tests")
    return release, sys.executable


def add_apps(dify: FakeDify) -> dict[str, str]:
    """Add the apps that the clients talk to; returns their settings."""
    recorded = fake.replay(RECORDED.file, RECORDED.exchange)
    dify.app("app-recorded", script=recorded)
    half = fake.chat_answer("half \ud83d", " and \ude00 \u2028\u2029\x85.")
    dify.app("app-half", version="0.15.3", script=half)  # it writes ASCII
    hello = [fake.message("Hel"), fake.message("lo")]
    dify.app("app-broken", script=[*hello, fake.error_event("The model failed.")])
    text = "The credentials are not initialized."
    body = {"code": "provider_not_initialize", "message": text, "status": 400}
    dify.app("app-refused", script=[fake.Status(400, body)])
    models: JSONObject = {
        name: {"key": f"app-{name}", "mode": "chat"}
        for name in ("recorded", "half", "broken", "refused")
    }
    models[ODD] = "app-recorded"
    return {
        "MODEL_CONFIG": json.dumps(models),
        "DIFY_API_BASE": dify.base,
        "STREAM_MAX_LAG": "0.05",  # the recordings are replayed without their pauses
    }


@pytest.mark.real_clock
async def test_openai_client(client_of: tuple[str, str], tmp_path: Path) -> None:
    release, python = client_of
    is_old = release == "0.28.1"
    async with FakeDify() as dify:
        settings = add_apps(dify)
        async with running(tmp_path, **settings) as (_, base):
            got = await run_client(python, OLD_SCRIPT if is_old else SCRIPT, base)
    assert release in ("newest", got.pop("release"))
    got.pop("release", None)
    text, counts = RECORDED.text, RECORDED.usage
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    broken, *kind = got.pop("broken")
    message = kind.pop()
    assert (broken, kind) == ("Hello", ["APIError"])
    assert message.startswith("The model failed.")
    assert got == {
        "models": ["recorded", "half", "broken", "refused", ODD],
        "odd": ODD,
        "whole": text,
        "usage": dict(zip(names, counts)),
        "streamed": text,
        "async_whole": text,
        "async_streamed": text,
        **({"engine": text} if is_old else {"helper": text}),
        "finish": None,  # of the broken stream, which came last
        "half": "half \ufffd and \ufffd \u2028\u2029\x85.",
        "none": [
            "InvalidRequestError" if is_old else "NotFoundError",
            404,
            "model_not_found",
        ],
        "refused": [
            "InvalidRequestError" if is_old else "BadRequestError",
            400,
            "provider_not_initialize",
        ],
    }


# ------------------------------------------------------------------------------
# The program
# ------------------------------------------------------------------------------


@pytest.mark.real_clock
async def test_demo_runs_without_any_configuration(tmp_path: Path) -> None:
    """Its answer comes in bursts of a sentence; the client sees far smaller pieces."""
    async with running(tmp_path, "--demo") as (_, base):
        async with raw_stream(base, "demo") as stream:
            while "demo app." not in "".join(stream.texts):
                assert await stream.read_text()
        assert "".join(stream.texts).startswith("Hello! This is OpenDify's demo app.")
        assert len(stream.texts) > 5


@pytest.mark.real_clock
async def test_sigterm_lets_a_running_answer_end(tmp_path: Path) -> None:
    gate = asyncio.Event()
    script = [fake.message("Hello"), fake.Wait(gate), *fake.chat_answer(" there")]
    async with FakeDify() as dify:
        settings = one_app(dify, script)
        async with running(tmp_path, **settings) as (server, base):
            async with raw_stream(base, "m") as stream:
                assert await stream.read_text()
                server.send_signal(signal.SIGTERM)
                await no_more_connections(base)
                gate.set()
                while await stream.read_text():
                    pass
            assert await server.wait() == 0
    assert "".join(stream.texts) == "Hello there"


@pytest.mark.real_clock
async def test_run_is_stopped_when_the_client_s_connection_ends(tmp_path: Path) -> None:
    async with FakeDify() as dify:
        settings = one_app(dify, [fake.message("Hello" * 20), fake.Hang()])
        async with running(tmp_path, **settings) as (_, base):
            async with raw_stream(base, "m") as stream:
                assert await stream.read_text()
            await dify.until(lambda: dify.stops and not dify.running)
    assert [stop.effective for stop in dify.stops] == [True]


async def no_more_connections(base: str) -> None:
    """Wait until the server accepts none; the signal reaches it at its own time."""
    with contextlib.suppress(OSError):
        while True:
            async with raw_stream(base, "none"):
                await asyncio.sleep(0)


def one_app(dify: FakeDify, script: list[fake.Step]) -> dict[str, str]:
    """Add an app, the model `m`; returns the settings."""
    dify.app("app-key", script=script)
    model = {"m": {"key": "app-key", "mode": "chat"}}
    return {"MODEL_CONFIG": json.dumps(model), "DIFY_API_BASE": dify.base}
