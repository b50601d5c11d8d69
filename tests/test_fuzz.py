"""Fuzzing: whatever clients and Dify send, no 500, no traceback, and always an end.

Everything runs in this process, on streams in memory and a clock that jumps, so that
thousands of cases take seconds. `OPENDIFY_FUZZ_CASES=20000` asks for more of them than
the few that the usual run takes, and for others each time.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import random
import re
from collections.abc import Iterator
from typing import Any, Callable

import hypothesis
import pytest
from clock import VirtualClockLoop
from hypothesis import strategies as st
from test_faults import understand
from test_hostile import CASES

from opendify import (
    APP_MODES,
    ROUTES,
    Dify,
    Server,
    Site,
    Wire,
    open_conversations,
    parse_settings,
)

CASES_WANTED = os.environ.get("OPENDIFY_FUZZ_CASES", "")
CASES_IN_ALL = int(CASES_WANTED or 2000)
VARIANTS = 16  # of what hypothesis has made, which takes it longer than to run them
KEY = "app-key-of-the-tests"


def fuzz(share: float, variants: int = 1) -> hypothesis.settings:
    """The settings of a property that gets this share of all cases."""
    return hypothesis.settings(
        max_examples=math.ceil(CASES_IN_ALL * share / variants),
        deadline=None,
        derandomize=not CASES_WANTED,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )


# ------------------------------------------------------------------------------
# A proxy in memory
# ------------------------------------------------------------------------------


class Memory(asyncio.Transport):
    """One side of a connection; what is written is kept, or answered."""

    def __init__(self, on_write: Callable[[bytes], None] | None = None) -> None:
        super().__init__()
        self.sent: list[bytes] = []
        self.is_closed = False
        self._on_write = on_write

    def write(self, data: Any) -> None:
        self.sent.append(bytes(data))
        if self._on_write:
            self._on_write(bytes(data))

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name == "peername" else default

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    abort = close

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


def wired(transport: Memory) -> Wire:
    wire = Wire()
    wire.connection_made(transport)
    return wire


FINE = (
    b'data: {"event": "message", "conversation_id": "c", "message_id": "m", "task_id":'
    b' "t", "answer": "Hello"}\n\ndata: {"event": "message_end", "metadata": {}}\n\n'
)
SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
PARAMETERS = {
    "user_input_form": [{"text-input": {"variable": "query", "required": True}}],
    "file_upload": {
        "enabled": True,
        "number_limits": 9,
        "allowed_file_types": ["image", "document", "audio", "video", "custom"],
        "allowed_file_upload_methods": ["local_file", "remote_url"],
    },
}


class World:
    """A server whose Dify is in memory too: it gives `answer` to every turn."""

    def __init__(self) -> None:
        models = {
            mode: {"key": f"{KEY}-{mode}", "mode": mode, "query_variable": "query"}
            for mode in APP_MODES
        }
        models["m"] = {"key": KEY, "mode": "chat"}
        settings = parse_settings(
            {
                "MODEL_CONFIG": json.dumps(models),
                "DIFY_API_BASE": "http://127.0.0.1:9/v1",
                "MAX_BODY_MB": "1",
                "SHOW_PROCESS": "on",
            }
        )
        self.conversations, _ = open_conversations("memory", 3600)
        self.dify = Dify(settings, self._connect)
        self.site = Site(self.dify, self.conversations, lambda: "id")
        self.server = Server(self.site)
        self.answer = SSE_HEAD + FINE
        self.cuts: tuple[int, ...] = ()

    async def _connect(self, *_: Any, **__: Any) -> Any:
        def on_write(data: bytes) -> None:
            for piece in _cut(self._reply_to(data), self.cuts):
                wire.data_received(piece)
            wire.eof_received()

        wire = wired(Memory(on_write))
        return wire

    def _reply_to(self, request: bytes) -> bytes:
        line = request.partition(b"\r\n")[0]
        if re.search(rb"/(chat-messages|completion-messages|run) HTTP", line):
            return self.answer
        value = PARAMETERS if b"/parameters" in line else {"id": "f", "data": []}
        return b"HTTP/1.1 200 OK\r\n\r\n" + json.dumps(value).encode()

    async def talk(self, data: bytes, cuts: tuple[int, ...] = ()) -> bytes:
        """All that a client gets who sends `data` and then nothing more."""
        transport = Memory()
        wire = wired(transport)
        serving = asyncio.ensure_future(self.server.serve(wire))
        for piece in _cut(data, cuts):
            wire.data_received(piece)
            await asyncio.sleep(0)
        await asyncio.wait_for(serving, 1000)
        assert transport.is_closed
        return b"".join(transport.sent)


def _cut(data: bytes, cuts: tuple[int, ...]) -> list[bytes]:
    places = sorted({0, *(cut % (len(data) + 1) for cut in cuts), len(data)})
    return [data[a:b] for a, b in zip(places, places[1:])]


class Fuzzed:
    """The world on a loop of its own, for one case after another."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.loop = VirtualClockLoop()
        self.world = self.loop.run_until_complete(self._make())
        self._caplog = caplog
        self._errors: list[str] = []
        self.loop.set_exception_handler(
            lambda _, context: self._errors.append(str(context))
        )

    @staticmethod
    async def _make() -> World:
        return World()

    def talk(self, data: bytes, cuts: tuple[int, ...] = ()) -> bytes:
        self._caplog.clear()
        self._errors.clear()
        received: bytes = self.loop.run_until_complete(self.world.talk(data, cuts))
        bugs = [row.getMessage() for row in self._caplog.records if row.exc_info]
        assert not bugs, self._caplog.text
        assert not self._errors
        return received

    def close(self) -> None:
        self.loop.run_until_complete(self._end())
        self.loop.close()
        assert not self._errors

    async def _end(self) -> None:
        self.world.dify.close()
        self.world.conversations.close()
        for _ in range(5):
            await asyncio.sleep(0)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left


@pytest.fixture
def fuzzed(caplog: pytest.LogCaptureFixture) -> Iterator[Fuzzed]:
    caplog.set_level(logging.WARNING)
    world = Fuzzed(caplog)
    yield world
    world.close()


HEADS = re.compile(rb"(?:\A|(?<=\}))HTTP/1\.1 (\d\d\d) ")


def statuses_of(data: bytes) -> list[int]:
    return [int(status) for status in HEADS.findall(data)]


def assert_whole(received: bytes) -> None:
    """A response has all of its body, and that is JSON, or a stream with its end."""
    head, _, body = received.partition(b"\r\n\r\n")
    if b"\r\nContent-Type: text/event-stream" not in head:
        assert b"\r\nContent-Length: %d" % len(body) in head
        if b"\r\nContent-Type: application/json" in head:
            json.loads(body)
        return
    assert body.endswith(b"\r\n0\r\n\r\n")
    *rows, last = re.findall(rb"^data: (.*)$", body, re.MULTILINE)
    assert (last == b"[DONE]") or b"response." in last
    for row in rows:
        json.loads(row)


# ------------------------------------------------------------------------------
# Bytes instead of HTTP
# ------------------------------------------------------------------------------

TOKENS = st.sampled_from(
    [
        *[b"\r\n", b"\n", b"\r", b" ", b"\t", b":", b"\x00", b"\xff", b"\r\n\r\n"],
        *[b"GET", b"POST", b"HEAD", b"OPTIONS", b"/health", b"/v1/models", b"*"],
        *[b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"GET / HTTP/1.1\r\n"],
        *[b"Host: localhost\r\n", b"Host: a\r\n", b"Connection: close\r\n"],
        *[b"Content-Length: 2\r\n", b"Content-Length: 0\r\n", b"Content-Length: "],
        *[b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip\r\n"],
        *[b"Expect: 100-continue\r\n", b"Upgrade: h2c\r\n", b"Origin: null\r\n"],
        *[b"2\r\n{}\r\n", b"0\r\n\r\n", b"0\r\n", b"2;x=y\r\n", b"{}", b"ff", b"-1"],
        *[b"Authorization: Bearer x\r\n", b"X: " + b"y" * 999 + b"\r\n"],
    ]
)
GOOD = st.sampled_from(
    [
        act
        for case in CASES.values()
        for act in case.acts
        if isinstance(act, bytes) and 20 < len(act) < 2000
    ]
)
WILD = st.lists(st.one_of(TOKENS, TOKENS, GOOD, st.binary(max_size=20)), max_size=12)
CUTS = st.lists(st.integers(0, 400), max_size=4).map(tuple)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A request of the hostile suite, with some bytes replaced, lost or doubled."""
    data = draw(GOOD)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        until = at + draw(st.integers(0, 6))
        put = draw(st.one_of(TOKENS, st.binary(max_size=4), st.just(data[at:until])))
        data = data[:at] + put + data[until:]
    return data


@pytest.mark.parametrize("shard", range(6))
def test_bytes_for_a_request(fuzzed: Fuzzed, shard: int) -> None:
    bytes_sent = mutated() if shard % 3 else WILD.map(b"".join)

    @fuzz(0.05)
    @hypothesis.given(bytes_sent, CUTS)
    def check(data: bytes, cuts: tuple[int, ...]) -> None:
        received = fuzzed.talk(data, cuts)
        statuses = statuses_of(received)
        assert bool(received) == bool(statuses)
        assert 500 not in statuses

    check()


# ------------------------------------------------------------------------------
# JSON of any shape
# ------------------------------------------------------------------------------

# Texts that other readers stumble over, surrogates and what looks like a URL too.
TEXTS = st.one_of(
    st.sampled_from(
        [
            *["", " ", "\x00", "\ud800", "\udfff\ud800", "\u2028", "\r\nX: y", "m"],
            *["http://[", "http://", "https://h:99999/x", "http://a/\ud800.png"],
            *["data:", "data:,", "data:;base64,", "data:image/png;base64,aGk="],
            *["data:;;;,%ff", "data:image/png;base64,###", "file:///etc/passwd"],
            *["aGk=", "####", "{}", "[", '{"a": 1}', "null", "NaN", "1e999", "true"],
            *["chat", "workflow", "user", "assistant", "system", "tool", "developer"],
            *["text", "image_url", "input_audio", "file", "input_file", "input_text"],
            *["<think>", "</think>", "x" * 300, "../../x", "a/b.c", "%", "%00"],
            *["json_object", "json_schema", "function", "auto", "required", "none"],
        ]
    ),
    st.text(max_size=9),
)
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([2**63, -(2**64), 10**400, 0.5, -0.0, 1e308]),
    st.sampled_from([float("inf"), float("-inf"), float("nan")]),
)
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)


def nested(names: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.recursive(
        PLAIN,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.dictionaries(st.one_of(names, TEXTS), inner, max_size=4),
        ),
        max_leaves=8,
    )


NAMES = st.sampled_from(
    [
        *["role", "content", "name", "type", "text", "url", "image_url", "input_audio"],
        *["data", "format", "file", "file_data", "file_url", "filename", "file_id"],
        *["tool_calls", "function", "arguments", "id", "tool_call_id", "function_call"],
        *["inputs", "conversation_id", "include_usage", "email", "refusal", "detail"],
        *["parameters", "schema", "json_schema", "strict", "summary", "output"],
    ]
)
ANYTHING = nested(NAMES)


def sometimes(good: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(good, good, good, ANYTHING)


PART = st.fixed_dictionaries(
    {"type": sometimes(TEXTS)},
    optional={
        "text": sometimes(TEXTS),
        "refusal": sometimes(TEXTS),
        "image_url": sometimes(st.fixed_dictionaries({"url": TEXTS})),
        "input_audio": sometimes(st.fixed_dictionaries({"data": TEXTS})),
        "file": sometimes(
            st.fixed_dictionaries(
                {"file_data": TEXTS}, optional={"filename": sometimes(TEXTS)}
            )
        ),
        "file_data": TEXTS,
        "file_url": TEXTS,
        "filename": TEXTS,
    },
)
CALL = st.fixed_dictionaries(
    {"function": sometimes(st.fixed_dictionaries({"name": TEXTS, "arguments": TEXTS}))},
    optional={"id": sometimes(TEXTS), "type": TEXTS},
)
MESSAGE = st.fixed_dictionaries(
    {
        "role": sometimes(
            st.sampled_from(["user", "user", "assistant", "system", "tool", "function"])
        ),
        "content": sometimes(
            st.one_of(TEXTS, TEXTS, st.lists(sometimes(PART), max_size=3))
        ),
    },
    optional={
        "name": sometimes(TEXTS),
        "tool_calls": sometimes(st.lists(sometimes(CALL), max_size=2)),
        "function_call": ANYTHING,
        "tool_call_id": sometimes(TEXTS),
        "reasoning_content": TEXTS,
        "type": TEXTS,
    },
)
MODELS = st.sampled_from(["m", *APP_MODES])
MESSAGES = st.lists(sometimes(MESSAGE), max_size=4)
TOOL = st.fixed_dictionaries(
    {"type": TEXTS},
    optional={"function": sometimes(st.fixed_dictionaries({"name": TEXTS}))},
)
CHAT: dict[str, st.SearchStrategy[Any]] = {
    "stream": sometimes(st.booleans()),
    "stream_options": ANYTHING,
    "user": sometimes(TEXTS),
    "safety_identifier": ANYTHING,
    "metadata": ANYTHING,
    "inputs": sometimes(st.dictionaries(TEXTS, PLAIN, max_size=3)),
    "conversation_id": sometimes(TEXTS),
    "tools": sometimes(st.lists(sometimes(TOOL), max_size=2)),
    "functions": ANYTHING,
    "tool_choice": sometimes(TEXTS),
    "response_format": ANYTHING,
    "n": sometimes(st.integers(0, 3)),
    "stop": ANYTHING,
    "max_tokens": ANYTHING,
    "temperature": ANYTHING,
    "prompt": sometimes(TEXTS),
    "input": sometimes(st.one_of(TEXTS, MESSAGES)),
    "instructions": ANYTHING,
    "previous_response_id": sometimes(TEXTS),
    "text": ANYTHING,
    "reasoning": ANYTHING,
    "store": ANYTHING,
    "logprobs": ANYTHING,
    "unknown": ANYTHING,
}
FEW = {name: CHAT[name] for name in list(CHAT)[:6]}
BODY = st.fixed_dictionaries(
    {"model": sometimes(MODELS), "messages": sometimes(MESSAGES)}, optional=FEW
)
MORE = st.dictionaries(st.sampled_from(list(CHAT)), ANYTHING, max_size=3)
SEEDS = st.integers(0, 2**32)
JUNK: list[Any] = [
    *[None, True, False, 0, -1, 1.5, 10**400, float("inf"), float("nan"), "", "x"],
    *[[], {}, [[]], [None], [{}], {"": None}, "\ud800", "http://[", [1, "a", {}]],
    *["\r\nA: b", "data:", {"type": "text"}, {"type": "image_url", "image_url": 1}],
    *[{"id": []}, {"a": {"b": {"c": []}}}, "x" * 9999, 2**53, "</think>", "<think>"],
]


def variants(value: Any, seed: int) -> Iterator[Any]:
    """The value, and the value with some of what is in it replaced."""
    yield value
    chance = random.Random(seed)
    for _ in range(VARIANTS - 1):
        for _ in range(chance.randint(1, 3)):
            value = _with_junk(value, chance)
        yield value


def _with_junk(value: Any, chance: random.Random) -> Any:
    if not value or not isinstance(value, (dict, list)) or chance.random() < 0.15:
        return chance.choice(JUNK)
    if isinstance(value, list):
        place = chance.randrange(len(value))
        inner = _with_junk(value[place], chance)
        return [*value[:place], inner, *value[place + chance.randrange(2) :]]
    key = chance.choice(list(value))
    return {**value, key: _with_junk(value[key], chance)}


# Every endpoint that takes a body, whichever there are.
PATHS = [
    f"/v1/{endpoint.rstrip('/')}{'/x' if endpoint.endswith('/') else ''}"
    for endpoint, methods in ROUTES.items()
    if "POST" in methods
]


def post(path: str, body: bytes) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Connection: close"]
    lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@pytest.mark.parametrize("shard", range(4))
def test_json_for_a_request(fuzzed: Fuzzed, shard: int) -> None:
    path = st.sampled_from(PATHS if shard == 3 else PATHS[:1])

    @fuzz(0.09, VARIANTS)
    @hypothesis.given(path, BODY, MORE, SEEDS)
    def check(path: str, body: Any, more: Any, seed: int) -> None:
        for value in variants({**more, **body}, seed):
            received = fuzzed.talk(post(path, json.dumps(value).encode()))
            (status,) = statuses_of(received)
            assert status != 500
            assert_whole(received)

    check()


@pytest.mark.parametrize("path", PATHS)
def test_nothing_sensible_for_a_request(fuzzed: Fuzzed, path: str) -> None:
    @fuzz(0.04 / len(PATHS))
    @hypothesis.given(st.one_of(ANYTHING.map(json.dumps).map(str.encode), st.binary()))
    def check(body: bytes) -> None:
        (status,) = statuses_of(fuzzed.talk(post(path, body)))
        # A conversation may be made of nothing.
        is_enough = path == "/v1/conversations" and body[:1] in (b"", b"{")
        assert 400 <= status < 500 or (status == 200 and is_enough)

    check()


# ------------------------------------------------------------------------------
# Whatever Dify sends
# ------------------------------------------------------------------------------

EVENT_NAMES = st.sampled_from(
    [
        *["message", "message", "agent_message", "agent_thought", "message_file"],
        *["message_end", "message_replace", "error", "ping", "workflow_started"],
        *["node_started", "node_finished", "text_chunk", "workflow_finished"],
        *["workflow_paused", "tts_message", "iteration_started", "agent_log"],
        *["reasoning_chunk", "text_replace", "human_input_required", "loop_next"],
    ]
)
EVENT_FIELDS = st.sampled_from(
    [
        *["answer", "thought", "observation", "tool", "tool_input", "position", "url"],
        *["type", "belongs_to", "metadata", "usage", "retriever_resources", "files"],
        *["data", "outputs", "status", "error", "text", "total_tokens", "node_type"],
        *["reasoning", "reasoning_content", "is_final", "title", "message_files"],
        *["prompt_tokens", "completion_tokens", "document_name", "dataset_name"],
    ]
)
DEEP = nested(EVENT_FIELDS)


def rarely(good: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(good, good, good, good, DEEP)


ANSWERS = st.sampled_from(
    [
        "Hel",
        "lo",
        "",
        " ",
        "<think>",
        "</think>",
        "a</think>b",
        '{"name": "f", "arguments": {"a": 1}}',
        "<details",
        "👩‍👩‍👧",
        "\ud83d",
    ]
)
DATA = st.fixed_dictionaries(
    {},
    optional={
        "text": rarely(ANSWERS),
        "status": rarely(st.sampled_from(["succeeded", "failed", "stopped"])),
        "outputs": rarely(st.dictionaries(st.sampled_from(["text", "a"]), DEEP)),
        "error": rarely(TEXTS),
        "title": DEEP,
        "node_type": rarely(st.sampled_from(["llm", "answer", "tool", "end"])),
        "files": DEEP,
        "total_tokens": rarely(NUMBERS),
        "execution_metadata": DEEP,
        "reasoning": rarely(ANSWERS),
        "inputs": DEEP,
    },
)
EVENT = st.fixed_dictionaries(
    {"event": rarely(EVENT_NAMES)},
    optional={
        "answer": rarely(ANSWERS),
        "conversation_id": rarely(st.sampled_from(["c", "c", "", "\ud800", "\r\n"])),
        "message_id": rarely(st.sampled_from(["m", "n", "", "{}", "\ud800"])),
        "task_id": rarely(st.sampled_from(["t", "\ud800/../..", ""])),
        "id": rarely(st.sampled_from(["1", "2"])),
        "data": rarely(DATA),
        "metadata": rarely(st.fixed_dictionaries({"usage": DEEP})),
        "thought": rarely(ANSWERS),
        "tool": rarely(TEXTS),
        "tool_input": rarely(TEXTS),
        "observation": rarely(TEXTS),
        "position": rarely(NUMBERS),
        "message": rarely(TEXTS),
        "code": rarely(TEXTS),
        "status": rarely(st.sampled_from([400, 401, 429, 500, 504])),
        "url": rarely(TEXTS),
        "type": rarely(TEXTS),
        "belongs_to": rarely(TEXTS),
        "reasoning": rarely(ANSWERS),
    },
)


def _line(event: Any) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n\n"


NOISE = st.one_of(
    st.binary(max_size=20),
    st.sampled_from(
        [
            b"data\n\n",
            b"\n",
            b"\r",
            b"data:[]\n\n",
            b'data: "x"\n\n',
            b"event: ping\n\n",
        ]
    ),
)
EVENTS = st.lists(EVENT, max_size=5)
ENDINGS = st.sampled_from([b"", FINE, FINE, b'data: {"event": "error"}\n\n'])
QUESTION = {"messages": [{"role": "user", "content": "Hi"}]}
TOOLS = [{"type": "function", "function": {"name": "f"}}]
QUESTIONS: list[Any] = [
    QUESTION,
    {**QUESTION, "tools": TOOLS},
    {**QUESTION, "tools": TOOLS, "tool_choice": "required"},
    {**QUESTION, "response_format": {"type": "json_object"}},
    {**QUESTION, "stop": ["lo", "</"]},
]


@pytest.mark.parametrize("mode", APP_MODES)
def test_events_of_dify(fuzzed: Fuzzed, mode: str) -> None:
    @fuzz(0.05, VARIANTS)
    @hypothesis.given(EVENTS, NOISE, ENDINGS, CUTS, SEEDS)
    def check(
        events: list[Any], noise: bytes, end: bytes, cuts: tuple[int, ...], seed: int
    ) -> None:
        for number, value in enumerate(variants(events, seed)):
            rows = value if isinstance(value, list) else [value]
            lines = b"".join(map(_line, rows)) + noise
            fuzzed.world.answer, fuzzed.world.cuts = SSE_HEAD + lines + end, cuts
            stream = bool(number % 2)
            question = QUESTIONS[(seed + number // 2) % len(QUESTIONS)]
            body = json.dumps({**question, "model": mode, "stream": stream}).encode()
            received = fuzzed.talk(post(PATHS[0], body))
            outcome, message = understand(received, stream=stream)
            assert outcome.status != 500
            assert outcome.end == "finish" or message
            assert KEY not in message

    check()


@st.composite
def broken_answers(draw: st.DrawFn) -> bytes:
    """A whole response of Dify's, damaged anywhere; its head too."""
    coding = draw(st.sampled_from([b"", b"Transfer-Encoding: chunked\r\n"]))
    head = SSE_HEAD[:-2] + coding + b"\r\n"
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(FINE), FINE) if coding else FINE
    data = head + body
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, draw(st.sampled_from([60, len(data)]))))
        until = at + draw(st.integers(0, 9))
        put = draw(st.one_of(TOKENS, NOISE))
        data = data[:at] + put + data[until:]
    return data


@pytest.mark.parametrize("shard", range(2))
def test_bytes_of_dify(fuzzed: Fuzzed, shard: int) -> None:
    @fuzz(0.05)
    @hypothesis.given(broken_answers(), CUTS)
    def check(answer: bytes, cuts: tuple[int, ...]) -> None:
        fuzzed.world.answer, fuzzed.world.cuts = answer, cuts
        stream = bool(shard)
        body = json.dumps({**QUESTION, "model": "m", "stream": stream}).encode()
        outcome, message = understand(fuzzed.talk(post(PATHS[0], body)), stream=stream)
        assert outcome.status != 500
        assert outcome.end == "finish" or message

    check()


# ------------------------------------------------------------------------------
# What was found
# ------------------------------------------------------------------------------

IMAGE = '{"type": "image_url", "image_url": {"url": "http://["}}'
TRAPS: list[Any] = [
    pytest.param(f'{{"content": [{IMAGE}]}}', SSE_HEAD + FINE, id="url-malformed"),
    pytest.param(
        f'{{"content": [{IMAGE.replace("http://[", "data:," + chr(92) + "ud800")}]}}',
        SSE_HEAD + FINE,
        id="data-url-surrogate",
    ),
    pytest.param(
        '{"content": "Hi"}',
        SSE_HEAD + FINE.replace(b'"c"', b'"\\ud800"'),
        id="conversation-id-surrogate",
    ),
    pytest.param(
        '{"content": "Hi", "name": "\\ud800"}',
        SSE_HEAD + FINE[:99] + FINE[99:150],
        id="user-surrogate-and-broken-stream",
    ),
    pytest.param(
        '{"content": "Hi"}',
        SSE_HEAD + b'data: {"event": "message_file", "url": "http://["}\n\n' + FINE,
        id="url-malformed-from-dify",
    ),
]


@pytest.mark.parametrize("stream", ["true", "false"])
@pytest.mark.parametrize(("row", "answer"), TRAPS)
def test_known_traps(fuzzed: Fuzzed, row: str, answer: bytes, stream: str) -> None:
    fuzzed.world.answer = answer
    body = (
        f'{{"model": "m", "user": "\\ud800", "stream": {stream}, "messages": [{row}]}}'
    )
    (status,) = statuses_of(fuzzed.talk(post(PATHS[0], body.encode())))
    assert status != 500
