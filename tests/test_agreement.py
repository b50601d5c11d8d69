"""One answer of Dify's, asked for in every way and cut in several: all tell the same.

Hypothesis makes plausible answers of each kind of app. What no two ways can agree on is
left out: a stream can't take back what it has said, when moderation replaces it or when
a closing tag alone shows that it was reasoning.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import hypothesis
import pytest
from hypothesis import strategies as st
from schemas import check_chat_stream, check_responses_stream, validate
from test_fuzz import SSE_HEAD, Fuzzed, Memory, World, fuzz, post, wired

from opendify import APP_MODES, CHAT_MODES

JSONObject = dict[str, Any]
IDS = {"task_id": "t", "message_id": "m", "conversation_id": "c"}
USAGE = {"prompt_tokens": 14, "completion_tokens": 8}


class Heard(NamedTuple):
    """What a client has got; `end` is the finish reason, or the error's message."""

    text: str
    reasoning: str
    calls: list[tuple[str, str]]
    end: str
    usage: tuple[int, int] | None


class Answer(NamedTuple):
    """What the app sends, what Dify then has stored, and the words in it."""

    body: bytes
    stored: str
    words: list[str]
    thoughts: list[str]


# ------------------------------------------------------------------------------
# Answers
# ------------------------------------------------------------------------------

BETWEEN = st.sampled_from(
    [
        *[" ", " ", "\n", "\n\n", "\r\n", "\u2028", "\x85", "\x00", "字", "e\u0301"],
        *["👩‍👩‍👧", "🇩🇪", "data: [DONE]", "\n\ndata: {}\n\n", ""],
        *["<", " < b", "</b>", "&lt;", "`", "```", "{", "}", '{"a": 1}', "[1]", '"'],
        *["</thin", "<thinker>", "<|", "[TOOL", "\t", "\\", "**", "<details"],
    ]
)
TAGS = [("<think>", "</think>"), ("<Think x>\n", "\n</THINK>\n\n")]
CALLS = [
    '\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
    '\n```json\n{"name": "f", "arguments": {"a": 2}}\n```\n',
    "\n<function=f>\n<parameter=a>\n3\n</parameter>\n</function>\n",
    '\n<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>\n',
]
TOOL = {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}
SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=5)


@st.composite
def answers(draw: st.DrawFn, mode: str) -> Answer:
    """What an app of this mode says, in one passage or several."""
    words: list[str] = []
    thoughts: list[str] = []

    def prose(sign: str, into: list[str]) -> str:
        text = ""
        for between in draw(st.lists(BETWEEN, min_size=1, max_size=5)):
            word = f"{sign}{len(into)}."
            into.append(word)
            text += word + between
        return text

    passages: list[str] = []
    for _ in range(draw(st.integers(1, 3))):
        passage = ""
        if draw(st.booleans()):
            opening, closing = draw(st.sampled_from(TAGS))
            start = "\n" if passages else ""  # a quote before it only names a tag
            passage = start + opening
            passage += prose("T", thoughts).replace("</", "") + closing
        passage += prose("W", words)
        passage += "".join(draw(st.lists(st.sampled_from(CALLS), max_size=2)))
        passages.append(passage)
    events = _events(mode, passages, draw(SIZES)) + draw(st.sampled_from(_ends(mode)))
    ids = {"task_id": "t"} if mode == "workflow" else IDS
    separators = draw(st.sampled_from([None, (",", ":")]))
    end = draw(st.sampled_from(["\n\n", "\n\n", "\r\n\r\n"]))
    rows = [json.dumps({**row, **ids}, separators=separators) for row in events]
    body = "".join(f"data: {row}{end}" for row in rows).encode()
    body = body[: draw(st.sampled_from([None, None, None, -99]))]
    return Answer(body, "".join(passages), words, thoughts)


def _events(mode: str, passages: list[str], sizes: list[int]) -> list[JSONObject]:
    events: list[JSONObject] = []
    for number, passage in enumerate(passages):
        events += _deltas(mode, f"llm{number}", passage, sizes)
    if mode == "agent":
        events.append({"event": "message", "answer": passages[-1]})
    return events


def _deltas(mode: str, node: str, text: str, sizes: list[int]) -> Iterator[JSONObject]:
    """The events of one passage, their text cut at sizes that recur."""
    at = number = 0
    while at < len(text):
        end = at + sizes[number % len(sizes)]
        piece, source = text[at:end], [node, "text"]
        if mode == "workflow":
            data = {"text": piece, "from_variable_selector": source}
            yield {"event": "text_chunk", "data": data}
        elif mode in ("agent", "agent-chat"):
            yield {"event": "agent_message", "answer": piece}
        else:
            more = {"from_variable_selector": source} if mode == "advanced-chat" else {}
            yield {"event": "message", "answer": piece, **more}
        at, number = end, number + 1
    if mode == "agent-chat":
        thought = {"thought": text, "tool": "web", "observation": "seen"}
        yield {"event": "agent_thought", "id": node, **thought}
    elif mode in ("advanced-chat", "workflow"):
        about = {"node_id": node, "node_type": "llm", "status": "succeeded"}
        yield {"event": "node_finished", "data": about}


def _ends(mode: str) -> list[list[JSONObject]]:
    end: JSONObject = {"event": "message_end", "metadata": {"usage": USAGE}}
    error: JSONObject = {
        "event": "error",
        "status": 400,
        "message": "Rate limit reached",
    }
    succeeded, failed, stopped = (
        {"event": "workflow_finished", "data": {"status": status, "error": "no"}}
        for status in ("succeeded", "failed", "stopped")
    )
    if mode == "workflow":
        return [[succeeded], [failed], [stopped], [error]]
    if mode == "advanced-chat":
        return [
            [end, succeeded],
            [succeeded, end],
            [succeeded],
            [failed, error],
            [stopped],
        ]
    return [[end], [end], [end, {"event": "tts_message", "audio": ""}], [error]]


# ------------------------------------------------------------------------------
# Ways to ask
# ------------------------------------------------------------------------------

CHAT: JSONObject = {"messages": [{"role": "user", "content": "Hi"}]}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
SMOOTH, ROUGH = ("X-OpenDify-Smoothing: on", "X-OpenDify-Smoothing: off")


class Cut(World):
    """Its Dify sends the answer in pieces of `size` bytes, and has stored it, too."""

    size = 0
    stored = ""

    def _reply_to(self, request: bytes) -> bytes:
        if b" /v1/messages?" in request.partition(b"\r\n")[0]:
            tokens = {"message_tokens": 14, "answer_tokens": 8}
            row = {"id": "m", "conversation_id": "c", "answer": self.stored, **tokens}
            page = {"data": [row] if self.stored else []}
            return b"HTTP/1.1 200 OK\r\n\r\n" + json.dumps(page).encode()
        return super()._reply_to(request)

    async def _connect(self, *_: Any, **__: Any) -> Any:
        loop = asyncio.get_running_loop()

        def on_write(data: bytes) -> None:
            reply = self._reply_to(data)
            size = self.size or len(reply)
            send(reply[at : at + size] for at in range(0, len(reply), size))

        def send(pieces: Iterator[bytes]) -> None:
            piece = next(pieces, None)
            if piece is None:
                wire.eof_received()
            else:
                wire.data_received(piece)
                loop.call_soon(send, pieces)

        wire = wired(Memory(on_write))
        return wire


class Asked(Fuzzed):
    """Such a world on a loop of its own; every answer is checked for its shape."""

    world: Cut

    @staticmethod
    async def _make() -> Cut:
        return Cut()

    def hear(self, path: str, body: JSONObject, header: str = "X: y") -> Heard:
        """What a client gets that asks in this way."""
        request = post(path, json.dumps(body).encode())
        head = f"HTTP/1.1\r\n{header}\r\n".encode()
        return understand(self.talk(request.replace(b"HTTP/1.1\r\n", head, 1)))


def understand(received: bytes) -> Heard:
    """What an answer says, by whichever way it came; its shape is checked."""
    head, _, body = received.partition(b"\r\n\r\n")
    is_stream = b"text/event-stream" in head
    rows = re.findall(rb"^data: (\{.*)$", body, re.MULTILINE) if is_stream else [body]
    values: list[JSONObject] = [json.loads(row) for row in rows]
    error = values[-1].get("error")
    if is_stream and "response" in values[-1]:
        values = [check_responses_stream(values)]
        error = values[0]["error"]
    elif is_stream and not error and "delta" in values[0]["choices"][0]:
        check_chat_stream(values, include_usage=True)
    elif values[0].get("object") in WHOLE:
        validate(WHOLE[values[0]["object"]], values[0])
    if error:
        return Heard("", "", [], error["message"], None)
    return _by_items(values[0]) if "output" in values[0] else _by_choices(values)


WHOLE = {"chat.completion": "CreateChatCompletionResponse", "response": "Response"}


def _by_choices(values: list[JSONObject]) -> Heard:
    text = reasoning = end = ""
    calls: list[tuple[str, str]] = []
    for choice in (row for value in values for row in value["choices"]):
        said = choice.get(
            "delta", choice.get("message", {"content": choice.get("text")})
        )
        text += said.get("content") or ""
        reasoning += said.get("reasoning_content") or ""
        for call in (row["function"] for row in said.get("tool_calls", ())):
            if call.get("name"):
                calls.append((call["name"], ""))
            calls[-1] = (calls[-1][0], calls[-1][1] + call["arguments"])
        assert not end, "something after the end"
        end = choice["finish_reason"] or ""
    usage = values[-1]["usage"]
    counts = (usage["prompt_tokens"], usage["completion_tokens"])
    return Heard(text, reasoning, calls, end, counts)


def _by_items(response: JSONObject) -> Heard:
    texts: dict[str, str] = {"message": "", "reasoning": ""}
    calls: list[tuple[str, str]] = []
    for item in response["output"]:
        if item["type"] == "function_call":
            calls.append((item["name"], item["arguments"]))
        else:
            (part,) = item.get("content") or item["summary"]
            texts[item["type"]] += part["text"]
    is_cut = response["status"] == "incomplete"
    end = "length" if is_cut else "tool_calls" if calls else "stop"
    usage = response["usage"]
    counts = (usage["input_tokens"], usage["output_tokens"])
    return Heard(texts["message"], texts["reasoning"], calls, end, counts)


def ask_in_all_ways(
    asked: Asked, mode: str, size: int, *, has_tools: bool
) -> Iterator[tuple[str, Heard]]:
    """The ways to ask, and what clients get."""
    tool = {"type": "function", "function": TOOL}
    chat: JSONObject = {**CHAT, "tools": [tool] if has_tools else []}
    flat = {"type": "function", "strict": False, **TOOL}
    items: JSONObject = {"input": "Hi", "tools": [flat] if has_tools else []}
    ways: list[tuple[str, JSONObject, JSONObject]]
    ways = [("chat/completions", chat, STREAM), ("responses", items, {"stream": True})]
    if not has_tools:
        ways.append(("completions", {"prompt": "Hi"}, STREAM))
    for name, fields, streamed in ways:
        path, body = f"/v1/{name}", {"model": mode, **fields}
        for asked.world.size in (0, size):
            yield name, asked.hear(path, body)
        for header in (SMOOTH, ROUGH):
            yield f"{name}, {header}", asked.hear(path, {**body, **streamed}, header)


@pytest.fixture
def asked(caplog: pytest.LogCaptureFixture) -> Iterator[Asked]:
    caplog.set_level(logging.WARNING)
    world = Asked(caplog)
    yield world
    world.close()


@pytest.mark.parametrize("has_tools", [False, True], ids=["plain", "tools"])
@pytest.mark.parametrize("mode", APP_MODES)
def test_all_ways_tell_the_same(asked: Asked, mode: str, has_tools: bool) -> None:
    """No word is lost, doubled or out of its place."""

    # Not shrunk: that takes longer than a test may.
    @hypothesis.settings(fuzz(0.0015), phases=[hypothesis.Phase.generate])
    @hypothesis.given(answers(mode), st.sampled_from([23, 300]))
    def check(answer: Answer, size: int) -> None:
        world = asked.world
        world.answer = SSE_HEAD + answer.body
        world.stored = answer.stored if mode in CHAT_MODES else ""
        (_, first), *others = ask_in_all_ways(asked, mode, size, has_tools=has_tools)
        for way, got in others:
            has_thoughts = not way.startswith("completions")
            reasoning = first.reasoning if has_thoughts else ""
            assert got == first._replace(reasoning=reasoning), way
        if first.usage:
            assert re.findall(r"W\d+\.", first.text) == answer.words
            assert re.findall(r"T\d+\.", first.reasoning) == answer.thoughts

    check()
