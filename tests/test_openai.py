"""Room OpenAI: chat requests to an Ask, answer parts to chunks and whole objects."""

from __future__ import annotations

import base64
import json
import re
from typing import Any, Union
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schemas import check_chat_stream, validate
from work import at_most

import opendify
from opendify import (
    Answer,
    Ask,
    Attachment,
    BadRequest,
    ChatRequest,
    ChatStream,
    Citations,
    Envelope,
    Failure,
    Finish,
    Media,
    Message,
    Part,
    Reasoning,
    Recast,
    Replace,
    Text,
    ToolCall,
    UpstreamFailed,
    Usage,
    parse_chat_request,
)

JSONObject = dict[str, Any]
HI = Message("user", "Hi")
CHAT = ChatRequest(Ask("m", (HI,)))
ENVELOPE = Envelope("chatcmpl-1", 1700000000, "team/应用 1", CHAT)


def request(*messages: Any, **fields: Any) -> JSONObject:
    """Return the body of a chat request."""
    rows = list(messages) or [{"role": "user", "content": "Hi"}]
    return {"model": "m", "messages": rows, **fields}


def parsed(*messages: Any, **fields: Any) -> Ask:
    """Return what a chat request asks."""
    return parse_chat_request(request(*messages, **fields)).ask


def content(*parts: Any) -> JSONObject:
    """Return a user message of some parts."""
    return {"role": "user", "content": list(parts)}


# Requests...


def test_smallest_request() -> None:
    expected = ChatRequest(Ask("m", (HI,)), stream=False, include_usage=False)
    assert parse_chat_request(request()) == expected


@pytest.mark.parametrize(
    "body",
    [b"", b"nonsense", b"{", b"\xff", b"[]", b'"text"', b"null", b"[" * 200_000],
    ids=["empty", "word", "cut", "not-utf8", "array", "string", "null", "deep"],
)
def test_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        opendify.parse_body(body)
    assert (caught.value.param, caught.value.code) == (None, None)


@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a":', "}")])
def test_body_that_is_nested_too_deeply_is_refused(opening: str, closing: str) -> None:
    depth = opendify.MAX_NESTING - 1  # the body is a level, too
    body = '{"x": %s1%s, "y": [[], {}]}'
    whole = body % (opening * depth, closing * depth)
    assert opendify.parse_body(whole.encode())["y"] == [[], {}]
    deeper = body % (opening * (depth + 1), closing * (depth + 1))
    with pytest.raises(BadRequest, match="100 levels"):
        opendify.parse_body(deeper.encode())


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", b"  \r\n"])
def test_body_that_is_an_object(mark: bytes) -> None:
    body = mark + '{"model": "应用"}'.encode()
    assert opendify.parse_body(body) == {"model": "应用"}


@pytest.mark.parametrize(
    ("fields", "stream", "include_usage"),
    [
        ({"stream": None}, False, False),
        ({"stream": False}, False, False),
        ({"stream": True}, True, False),
        ({"stream": True, "stream_options": None}, True, False),
        ({"stream": True, "stream_options": {}}, True, False),
        ({"stream": True, "stream_options": {"include_usage": None}}, True, False),
        ({"stream": True, "stream_options": {"include_usage": False}}, True, False),
        ({"stream": True, "stream_options": {"include_usage": True}}, True, True),
        ({"stream": True, "stream_options": {"include_obfuscation": 1}}, True, False),
    ],
)
def test_stream_fields(fields: JSONObject, stream: bool, include_usage: bool) -> None:
    chat = parse_chat_request(request(**fields))
    assert (chat.stream, chat.include_usage) == (stream, include_usage)


# What no app can honour, as clients send it.
IGNORED: JSONObject = {
    "temperature": 99,
    "top_p": "much",
    "presence_penalty": 0,
    "frequency_penalty": 0.5,
    "logit_bias": {"50256": -100},
    "seed": 7,
    "top_k": 40,
    "min_p": 0.1,
    "max_tokens": 1,
    "max_completion_tokens": 0,
    "reasoning_effort": "none",
    "verbosity": "low",
    "service_tier": "flex",
    "store": True,
    "prediction": {"type": "content", "content": "x"},
    "web_search_options": {},
    "prompt_cache_key": "k",
    "parallel_tool_calls": True,
    "logprobs": None,
    "top_logprobs": 3,
    "modalities": ["text"],
    "n": 1,
    "chat_id": "c",
    "session_id": "s",
    "enable_thinking": False,
    "options": {"num_ctx": 4096},
    "client_metadata": {"a": "b"},
    "extra_body": {"x": 1},
    "anything": [None],
}


@pytest.mark.parametrize("field", IGNORED)
def test_fields_that_no_app_can_honour_are_ignored(field: str) -> None:
    assert parsed(**{field: IGNORED[field]}) == parsed()


OPTIONAL = [
    *IGNORED,
    *["stream", "stream_options", "user", "safety_identifier", "metadata", "inputs"],
    *["conversation_id", "stop", "response_format", "tools", "tool_choice"],
    *["functions", "function_call", "audio"],
]


@pytest.mark.parametrize("field", OPTIONAL)
def test_null_is_as_good_as_nothing(field: str) -> None:
    assert parse_chat_request(request(**{field: None})) == parse_chat_request(request())


def part(**fields: Any) -> JSONObject:
    """Return a request whose only message is one part."""
    return request(content(fields))


MISSING, TYPE, VALUE = "missing_required_parameter", "invalid_type", "invalid_value"
IN_PART = "messages[0].content[0]"
REFUSED = [
    pytest.param({"messages": [{}]}, "model", MISSING, id="no-model"),
    pytest.param(request(model=None), "model", MISSING, id="model-null"),
    pytest.param(request(model=""), "model", MISSING, id="model-empty"),
    pytest.param(request(model=5), "model", TYPE, id="model-number"),
    pytest.param(request(model=["m"]), "model", TYPE, id="model-array"),
    pytest.param({"model": "m"}, "messages", MISSING, id="no-messages"),
    pytest.param(request(messages=None), "messages", MISSING, id="messages-null"),
    pytest.param(request(messages=[]), "messages", MISSING, id="messages-empty"),
    pytest.param(request(messages="Hi"), "messages", TYPE, id="messages-string"),
    pytest.param(request(messages={"a": 1}), "messages", TYPE, id="messages-object"),
    pytest.param(request(messages={}), "messages", TYPE, id="messages-empty-object"),
    pytest.param(request(messages=True), "messages", TYPE, id="messages-bool"),
    pytest.param(request(functions="x"), "functions", TYPE, id="functions"),
    pytest.param(request("Hi"), "messages[0]", TYPE, id="message-string"),
    pytest.param(request({}, None), "messages[1]", TYPE, id="message-null"),
    pytest.param(
        request({"content": 5}), "messages[0].content", TYPE, id="content-number"
    ),
    pytest.param(
        request({"content": {"type": "text", "text": "Hi"}}),
        "messages[0].content",
        TYPE,
        id="content-object",
    ),
    pytest.param(request(content(5)), IN_PART, TYPE, id="part-number"),
    pytest.param(
        request(content("a", None)), f"{IN_PART[:-2]}1]", TYPE, id="part-null"
    ),
    pytest.param(part(type="text"), IN_PART, VALUE, id="text-without-text"),
    pytest.param(part(type="video", video="x"), IN_PART, VALUE, id="part-unknown"),
    pytest.param(
        part(type="text", text=None), f"{IN_PART}.text", TYPE, id="part-no-text"
    ),
    pytest.param(part(type="image_url"), IN_PART, VALUE, id="image-nothing"),
    pytest.param(
        part(type="image_url", image_url={}), IN_PART, VALUE, id="image-empty"
    ),
    pytest.param(
        part(type="image_url", image_url={"url": 5}), IN_PART, VALUE, id="image-number"
    ),
    pytest.param(
        part(type="image_url", image_url={"url": "ftp://x/a.png"}),
        IN_PART,
        VALUE,
        id="image-ftp",
    ),
    pytest.param(
        part(type="image_url", image_url={"url": "data:image/png;base64"}),
        IN_PART,
        VALUE,
        id="image-no-comma",
    ),
    pytest.param(
        part(type="image_url", image_url={"url": "data:image/png;base64,%%%"}),
        IN_PART,
        VALUE,
        id="image-not-base64",
    ),
    pytest.param(part(type="input_audio"), IN_PART, VALUE, id="audio-nothing"),
    pytest.param(
        part(type="input_audio", input_audio={"format": "wav"}),
        IN_PART,
        VALUE,
        id="audio-no-data",
    ),
    pytest.param(part(type="file", file={}), IN_PART, VALUE, id="file-empty"),
    pytest.param(
        request(messages=[{}] * (opendify.MAX_MESSAGES + 1)),
        "messages",
        VALUE,
        id="messages-too-many",
    ),
    pytest.param(request(stream="yes"), "stream", TYPE, id="stream-string"),
    pytest.param(request(stream=[]), "stream", TYPE, id="stream-array"),
    pytest.param(request(stop=5), "stop", TYPE, id="stop-number"),
    pytest.param(request(stop={"a": 1}), "stop", TYPE, id="stop-object"),
    pytest.param(request(stop=["a", 5]), "stop", TYPE, id="stop-of-numbers"),
    pytest.param(request(stop=["a", "b" * 1001]), "stop", VALUE, id="stop-long"),
    pytest.param(request(inputs="x"), "inputs", TYPE, id="inputs-string"),
    pytest.param(request(inputs=[1]), "inputs", TYPE, id="inputs-array"),
    pytest.param(
        request(metadata={"inputs": "{"}), "metadata.inputs", VALUE, id="metadata-cut"
    ),
    pytest.param(
        request(metadata={"inputs": "[1]"}), "metadata.inputs", TYPE, id="metadata-list"
    ),
]


def test_numbers_that_json_lacks_are_null() -> None:
    """Python would write them to Dify, and back to the client."""
    body = b'{"temperature": NaN, "inputs": {"a": [1e999, -Infinity, 1.5]}}'
    value = opendify.parse_body(b"\xef\xbb\xbf" + body)
    assert value == {"temperature": None, "inputs": {"a": [None, None, 1.5]}}


def test_inputs_in_metadata_can_be_written_again() -> None:
    """The depth of a body is limited, but this text hides its own in one string."""
    text = '{"a": NaN, "b": ' + "[" * 500 + "]" * 500 + "}"
    again = json.dumps(opendify.parse_inputs(None, text))
    assert again == '{"a": null, "b": ' + "[" * 99 + "null" + "]" * 99 + "}"


@pytest.mark.parametrize(("body", "param", "code"), REFUSED)
def test_refused_field_is_named(body: JSONObject, param: str, code: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_chat_request(body)
    error = caught.value
    assert (error.status, error.param, error.code) == (400, param, code)
    assert param in error.message
    validate("ErrorResponse", opendify.error_body(error))


@pytest.mark.parametrize(
    "body", [part(type=["x" * 9999]), request(tool_choice="x" * 9999)]
)
def test_error_repeats_little_of_the_request(body: JSONObject) -> None:
    """It goes to the log, too."""
    with pytest.raises(BadRequest) as caught:
        parse_chat_request(body)
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"role": "user", "content": "a"}, Message("user", "a")),
        ({"role": "user", "content": " "}, Message("user", " ")),
        ({"role": "user", "content": "a", "name": "al"}, Message("user", "a", "al")),
        ({"content": "a"}, Message("user", "a")),
        ({"role": None, "content": "a"}, Message("user", "a")),
        ({"role": "critic", "content": "a"}, Message("user", "a")),
        ({"role": "assistant", "content": "a"}, Message("assistant", "a")),
        ({"role": "assistant", "content": None}, Message("assistant", "")),
        ({"role": "assistant"}, Message("assistant", "")),
        (
            {"role": "assistant", "audio": {"id": "audio_1"}},
            Message("assistant", "", spoken_id="audio_1"),
        ),
        (
            {"role": "assistant", "content": "", "audio": {"id": "audio_1"}},
            Message("assistant", "", spoken_id="audio_1"),
        ),
        (
            {"role": "assistant", "content": "a", "audio": {"id": "audio_1"}},
            Message("assistant", "a"),
        ),
        ({"role": "assistant", "audio": {}}, Message("assistant", "")),
        ({"role": "assistant", "audio": None}, Message("assistant", "")),
        ({"role": "user", "audio": {"id": "audio_1"}}, Message("user", "")),
        ({"role": "system", "content": "a"}, Message("system", "a")),
        ({"role": "developer", "content": "a"}, Message("system", "a")),
        (
            {"role": "tool", "content": "9", "tool_call_id": "call_1"},
            Message("tool", "9", "call_1"),
        ),
        (
            {"role": "tool", "content": "9", "tool_call_id": "c", "name": "clock"},
            Message("tool", "9", "clock"),
        ),
        (
            {"role": "function", "content": "9", "name": "clock"},
            Message("tool", "9", "clock"),
        ),
        (content("a", {"type": "text", "text": "b"}), Message("user", "a\nb")),
        (content({"type": "input_text", "text": "a"}), Message("user", "a")),
        (content(), Message("user", "")),
        ({"role": "user", "content": "a", "name": "user"}, Message("user", "a")),
        (
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "x"},
                    {"type": "reasoning", "text": "hm"},
                    {"type": "text", "text": "a"},
                ],
            },
            Message("assistant", "a"),
        ),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            Message("assistant", "No."),
        ),
        (
            {"role": "assistant", "content": None, "refusal": "No."},
            Message("assistant", "No."),
        ),
        (
            {"role": "assistant", "audio": {"id": "audio_1", "transcript": "a"}},
            Message("assistant", "a"),
        ),
        (
            {"role": "assistant", "content": "a", "refusal": None},
            Message("assistant", "a"),
        ),
    ],
)
def test_message(row: JSONObject, message: Message) -> None:
    """It is the second one, so that system text stays in its place."""
    assert parsed({"content": "Hi"}, row).messages == (HI, message)


def test_system_text_at_the_beginning_stands_apart() -> None:
    ask = parsed(
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "system", "content": "  "},
        {"role": "user", "content": "Hi"},
        {"role": "system", "content": "Summarize."},
    )
    expected = Ask("m", (HI, Message("system", "Summarize.")), "Be brief.\n\nBe kind.")
    assert ask == expected


def test_examples_at_the_beginning_say_whose_they_are() -> None:
    """OpenAI's guides give them as system messages with names."""
    ask = parsed(
        {"role": "system", "content": "Translate."},
        {"role": "system", "name": "example_user", "content": "dog"},
        {"role": "system", "name": "example_user", "content": " "},
        {"role": "system", "name": "example_assistant", "content": "Hund"},
        {"role": "user", "content": "Hi"},
    )
    system = "Translate.\n\nexample_user: dog\n\nexample_assistant: Hund"
    assert ask == Ask("m", (HI,), system)


def test_system_message_with_files_is_no_mere_text() -> None:
    """Its files go to the app as those of any other message."""
    image = {"type": "image_url", "image_url": {"url": "https://x/a.png"}}
    text = {"type": "text", "text": "Draw like this."}
    ask = parsed(
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [text, image]},
        {"role": "user", "content": "Hi"},
    )
    files = (Attachment("a.png", "image/*", url="https://x/a.png"),)
    drawn = Message("system", "Draw like this.", attachments=files)
    assert ask == Ask("m", (drawn, HI), "Be brief.")


def test_request_without_a_user_message() -> None:
    ask = parsed({"role": "system", "content": "Say hello."})
    assert ask == Ask("m", (), "Say hello.")


CALL = {"name": "clock", "arguments": '{"zone": "UTC"}'}


@pytest.mark.parametrize(
    ("fields", "calls"),
    [
        (
            {"tool_calls": [{"id": "c1", "type": "function", "function": CALL}]},
            (ToolCall("c1", "clock", '{"zone": "UTC"}'),),
        ),
        ({"function_call": CALL}, (ToolCall("", "clock", '{"zone": "UTC"}'),)),
        (
            {"tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {}}}]},
            (ToolCall("1", "f", "{}"),),
        ),
        ({"tool_calls": None, "function_call": None}, ()),
        ({"tool_calls": []}, ()),
        ({"tool_calls": [{"function": {}}]}, (ToolCall("", "", "{}"),)),
        (
            {"tool_calls": [{"id": 1, "custom": {"name": 2}}]},
            (ToolCall("1", "2", '{"input": ""}'),),
        ),
        ({"tool_calls": "x"}, ()),
        ({"tool_calls": [None, {"id": "1", "function": "x"}]}, ()),
    ],
)
def test_earlier_tool_calls(fields: JSONObject, calls: tuple[ToolCall, ...]) -> None:
    row = {"role": "assistant", "content": None, **fields}
    expected = (HI, Message("assistant", "", tool_calls=calls))
    assert parsed({"content": "Hi"}, row).messages == expected


@pytest.mark.parametrize(
    ("fields", "inputs"),
    [
        ({"inputs": {"a": 1, "b": [2]}}, {"a": 1, "b": [2]}),
        ({"inputs": {}}, {}),
        ({"metadata": {"inputs": '{"a": 1}'}}, {"a": 1}),
        ({"metadata": {"inputs": {"a": 1}}}, {"a": 1}),
        ({"metadata": {"inputs": ""}}, {}),
        ({"metadata": {"other": "x"}}, {}),
        ({"metadata": "x"}, {}),
        (
            {"inputs": {"a": 1}, "metadata": {"inputs": '{"a": 2, "b": 3}'}},
            {"a": 1, "b": 3},
        ),
    ],
)
def test_inputs(fields: JSONObject, inputs: JSONObject) -> None:
    assert parsed(**fields).inputs == inputs


@pytest.mark.parametrize(
    ("fields", "user"),
    [
        ({"user": "al"}, "al"),
        ({"user": 5}, "5"),
        ({"user": ""}, ""),
        ({"user": {}}, ""),
        ({"user": {"id": "u1", "name": "Al", "email": "al@x", "role": "admin"}}, "u1"),
        ({"user": {"id": None, "name": "Al", "email": "al@x"}}, "al@x"),
        ({"user": {"name": "Al"}}, "Al"),
        ({"safety_identifier": "s"}, "s"),
        ({"safety_identifier": "s", "user": "al"}, "s"),
        ({"safety_identifier": None, "user": "al"}, "al"),
    ],
)
def test_user(fields: JSONObject, user: str) -> None:
    assert parsed(**fields).user == user


@pytest.mark.parametrize(
    ("fields", "conversation_id"),
    [
        ({"conversation_id": "c"}, "c"),
        ({"metadata": {"conversation_id": "c"}}, "c"),
        ({"conversation_id": "c", "metadata": {"conversation_id": "d"}}, "c"),
        ({"conversation_id": ""}, ""),
    ],
)
def test_explicit_conversation(fields: JSONObject, conversation_id: str) -> None:
    assert parsed(**fields).conversation_id == conversation_id


def test_end_user_is_called_as_the_request_says() -> None:
    assert opendify.user_name("al") == "al"
    assert opendify.user_name("a" * 200) == "a" * 200
    assert opendify.user_name("") == ""


def test_end_user_of_a_key_is_stable_and_does_not_tell_it() -> None:
    one, other, nobody = map(opendify.user_of_key, ("k1", "k2", ""))
    assert len({one, other, nobody}) == 3
    assert one == opendify.user_of_key("k1")
    assert "k1" not in one
    assert nobody


def test_end_user_that_is_too_long_becomes_a_hash() -> None:
    names = {opendify.user_name(last * 201) for last in ("a", "b", "ü", "\ud800")}
    assert len(names) == 4
    assert {len(name) <= 200 for name in names} == {True}


def test_nothing_longer_is_kept_of_an_end_user() -> None:
    """Names are kept for a while: a body has room for one of 64 MiB."""
    long = "a" * 201
    fields = ("user", "safety_identifier")
    (short,) = {opendify.parse_user({name: long}) for name in fields}
    assert len(short) < 100
    assert opendify.user_name(short) == short == opendify.user_name(long)


# Files in requests...

# Its Base64 has both signs that differ in the URL-safe alphabet, and padding.
PNG = b"\x89PNG\r\n\x1a\n\xfb\xef\xbe\xff" + bytes(range(256))
BASE64 = base64.b64encode(PNG).decode()
PDF = b"%PDF-1.7 \xff\xfe"
WAV = b"RIFF\x24\x00\x00\x00WAVEfmt "
URL = "https://x.example/a%20b/Caf%C3%A9.JPG?width=5#top"
IMAGE = Attachment("image.png", "image/png", PNG)

assert "+" in BASE64 and "/" in BASE64 and BASE64.endswith("=")


def base64_of(data: bytes) -> str:
    """Return data in Base64."""
    return base64.b64encode(data).decode()


def image(url: str) -> JSONObject:
    """Return an image part."""
    return {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}


def audio(data: str, **fields: Any) -> JSONObject:
    """Return an audio part."""
    return {"type": "input_audio", "input_audio": {"data": data, **fields}}


def file(data: str, **fields: Any) -> JSONObject:
    """Return a file part."""
    return {"type": "file", "file": {"file_data": data, **fields}}


FILES = [
    pytest.param(image(f"data:image/png;base64,{BASE64}"), IMAGE, id="image"),
    pytest.param(
        {"type": "image_url", "image_url": f"data:image/png;base64,{BASE64}"},
        IMAGE,
        id="image-as-string",
    ),
    pytest.param(
        {"type": "input_image", "image_url": f"data:image/png;base64,{BASE64}"},
        IMAGE,
        id="input-image",
    ),
    pytest.param(
        image(f"DATA:Image/PNG;BASE64,{BASE64}"), IMAGE, id="data-url-capitals"
    ),
    pytest.param(
        image(f"data:image/png;name=a.png; charset=x ;base64,{BASE64}"),
        IMAGE,
        id="data-url-parameters",
    ),
    pytest.param(
        image(f"data:image/png;base64;name=a.png,{BASE64}"),
        IMAGE,
        id="data-url-parameter-behind",
    ),
    pytest.param(image(f"data:;base64,{BASE64}"), IMAGE, id="data-url-no-type"),
    pytest.param(
        image(f"data:application/octet-stream;base64,{BASE64}"),
        IMAGE,
        id="data-url-any-type",
    ),
    pytest.param(image(f"data:base64,{BASE64}"), IMAGE, id="data-url-only-base64"),
    pytest.param(
        image(f"data:;charset=utf-8;base64,{BASE64}"), IMAGE, id="data-url-only-charset"
    ),
    pytest.param(
        image(f"data:image/png;base64,{BASE64.rstrip('=')}"),
        IMAGE,
        id="data-url-no-padding",
    ),
    pytest.param(
        image(f"data:image/png;base64,{base64.urlsafe_b64encode(PNG).decode()}"),
        IMAGE,
        id="data-url-safe-alphabet",
    ),
    pytest.param(
        image(f"data:image/png;base64,{BASE64[:50]}\r\n {BASE64[50:]}\n"),
        IMAGE,
        id="data-url-line-breaks",
    ),
    pytest.param(
        image(f"data:image/png;base64,{quote(BASE64, safe='')}"),
        IMAGE,
        id="data-url-base64-quoted",
    ),
    pytest.param(
        image(f"data:image/png,{quote(PNG, safe='')}"), IMAGE, id="data-url-quoted"
    ),
    pytest.param(image(BASE64), IMAGE, id="image-bare-base64"),
    pytest.param(
        file("data:text/plain;charset=utf-8,a%20b,c+d"),
        Attachment("file.txt", "text/plain", b"a b,c+d"),
        id="data-url-text",
    ),
    pytest.param(
        file("data:,hello"),
        Attachment("file.txt", "text/plain", b"hello"),
        id="default",
    ),
    *(
        pytest.param(
            image(f"data:image/{name};base64,/9j/"),
            Attachment("image.jpg", "image/jpeg", b"\xff\xd8\xff"),
            id=f"jpeg-called-{name}",
        )
        for name in ("jpeg", "jpg", "pjpeg", "png")
    ),
    pytest.param(
        image("data:image/heic;base64,AAAA"),
        Attachment("image.heic", "image/heic", b"\0\0\0"),
        id="image-of-another-type",
    ),
    pytest.param(
        file("data:audio/x-m4a;base64,/9j/"),
        Attachment("file.m4a", "audio/x-m4a", b"\xff\xd8\xff"),
        id="type-with-x",
    ),
    pytest.param(
        image(f"data:image/svg+xml,{quote('<svg/>')}"),
        Attachment("image.svg", "image/svg+xml", b"<svg/>"),
        id="svg",
    ),
    pytest.param(
        image(URL), Attachment("Café.JPG", "image/*", url=URL), id="image-url"
    ),
    pytest.param(
        image("HTTP://x/picture"),
        Attachment("picture", "image/*", url="HTTP://x/picture"),
        id="image-url-no-extension",
    ),
    pytest.param(
        image("http://x.example"),
        Attachment("image", "image/*", url="http://x.example"),
        id="image-url-no-path",
    ),
    pytest.param(
        audio(base64_of(WAV), format="wav"),
        Attachment("audio.wav", "audio/x-wav", WAV),
        id="audio-wav",
    ),
    pytest.param(
        audio(base64_of(b"ID3"), format="mp3"),
        Attachment("audio.mp3", "audio/mpeg", b"ID3"),
        id="audio-mp3",
    ),
    pytest.param(
        audio(base64_of(b"OggS"), format="ogg"),
        Attachment("audio.ogg", "audio/ogg", b"OggS"),
        id="audio-ogg",
    ),
    pytest.param(
        audio("data:audio/mpeg;base64,SUQz", format="wav"),
        Attachment("audio.mp3", "audio/mpeg", b"ID3"),
        id="audio-data-url",
    ),
    pytest.param(
        audio("DATA:audio/mpeg;base64,SUQz", format="wav"),
        Attachment("audio.mp3", "audio/mpeg", b"ID3"),
        id="audio-data-url-in-capitals",
    ),
    pytest.param(
        file(base64_of(PDF), filename="Bericht.pdf"),
        Attachment("Bericht.pdf", "application/pdf", PDF),
        id="file-base64",
    ),
    pytest.param(
        file(f"data:application/pdf;base64,{base64_of(PDF)}", filename="a.pdf"),
        Attachment("a.pdf", "application/pdf", PDF),
        id="file-data-url",
    ),
    pytest.param(
        file(f"data:application/pdf;base64,{base64_of(PDF)}"),
        Attachment("file.pdf", "application/pdf", PDF),
        id="file-without-a-name",
    ),
    pytest.param(
        file(base64_of(PDF)),
        Attachment("file.pdf", "application/pdf", PDF),
        id="file-by-its-first-bytes",
    ),
    pytest.param(
        file(base64_of(WAV)),
        Attachment("file.wav", "audio/x-wav", WAV),
        id="wav-by-its-first-bytes",
    ),
    pytest.param(
        file(base64_of(b"RIFF\x24\x00\x00\x00WEBPVP8 ")),
        Attachment("file.webp", "image/webp", b"RIFF\x24\x00\x00\x00WEBPVP8 "),
        id="webp-by-its-first-bytes",
    ),
    pytest.param(
        file(base64_of(b"??")),
        Attachment("file.bin", "application/octet-stream", b"??"),
        id="file-of-an-unknown-kind",
    ),
    pytest.param(
        file(base64_of(b"a"), filename="a/b\\c:d.md"),
        Attachment("a_b_c_d.md", "text/markdown", b"a"),
        id="file-with-a-path",
    ),
    pytest.param(
        file(base64_of(PDF), filename=" ..."),
        Attachment("file.pdf", "application/pdf", PDF),
        id="file-with-nothing-but-dots",
    ),
    pytest.param(
        file(f"data:application/pdf;base64,{base64_of(PDF)}", filename="Q3 v1.2"),
        Attachment("Q3 v1.2.pdf", "application/pdf", PDF),
        id="file-with-a-number-behind-the-dot",
    ),
    pytest.param(
        file(base64_of(PDF), filename="Q3. Report"),
        Attachment("Q3. Report.pdf", "application/pdf", PDF),
        id="file-with-words-behind-the-dot",
    ),
    pytest.param(
        file(base64_of(b"??"), filename="Q3 v1.2"),
        Attachment("Q3 v1.2.bin", "application/octet-stream", b"??"),
        id="file-of-an-unknown-kind-with-a-number",
    ),
    pytest.param(
        file(base64_of(b"??"), filename="a.JPEG"),
        Attachment("a.JPEG", "image/jpeg", b"??"),
        id="image-by-its-longer-extension",
    ),
    pytest.param(
        file(base64_of(b"??"), filename="a.mp4"),
        Attachment("a.mp4", "video/mp4", b"??"),
        id="video-by-its-extension",
    ),
    pytest.param(
        file(base64_of(b"??"), filename="a.mov"),
        Attachment("a.mov", "video/quicktime", b"??"),
        id="video-of-another-name",
    ),
    pytest.param(
        {"type": "input_audio", "input_audio": {"data": BASE64, "format": "mp4"}},
        Attachment("audio.mp4", "audio/mp4", PNG),
        id="sound-in-a-container-of-videos",
    ),
    pytest.param(
        file(base64_of(b"7z"), filename="a.7z"),
        Attachment("a.7z", "application/7z", b"7z"),
        id="file-with-a-number-in-its-extension",
    ),
    pytest.param(
        file(f"data:text/plain;base64,{base64_of(b'x')}", filename="a.py"),
        Attachment("a.py", "text/plain", b"x"),
        id="file-with-an-extension-of-its-own",
    ),
    pytest.param(
        {"type": "input_file", "filename": "a.pdf", "file_data": base64_of(PDF)},
        Attachment("a.pdf", "application/pdf", PDF),
        id="input-file",
    ),
    pytest.param(
        {"type": "input_file", "file_url": "https://x/a.pdf"},
        Attachment("a.pdf", "", url="https://x/a.pdf"),
        id="input-file-url",
    ),
]


@pytest.mark.parametrize(("row", "attachment"), FILES)
def test_file_part(row: JSONObject, attachment: Attachment) -> None:
    ask = parsed(content({"type": "text", "text": "Look"}, row))
    assert ask.messages == (Message("user", "Look", attachments=(attachment,)),)


@pytest.mark.parametrize(
    "sound",
    [None, {"format": "wav"}, {"data": "http://x/a.mp3"}, {"file_id": "file-1"}],
)
def test_recording_in_json_brings_its_data(sound: JSONObject | None) -> None:
    with pytest.raises(BadRequest) as caught:
        opendify.parse_audio_request({"model": "m", "input_audio": sound})
    assert caught.value.param == "input_audio"


def test_files_of_all_messages_are_kept_in_order() -> None:
    images, document = content(image(BASE64), image(URL)), content(file(base64_of(PDF)))
    ask = parsed(images, {"role": "assistant", "content": "Seen."}, document)
    names = [[file.name for file in row.attachments] for row in ask.messages]
    assert names == [["image.png", "Café.JPG"], [], ["file.pdf"]]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["x", "y", "a"], ["a xy"]),
        (["a", "x", "y"], ["a xy"]),
        (["a", "x", "b"], ["a ", "b x"]),
        (["x", "a", "b", "y"], ["a x", "b y"]),
        (["x", "y"], [" xy"]),
        (["a", " ", "b"], ["a ", "  ", "b "]),
    ],
)
def test_files_belong_to_the_words_beside_them(
    rows: list[str], said: list[str]
) -> None:
    """Gradio sends them ahead, n8n as a question is built; `x` and `y` are files."""
    links = {row: {"url": f"https://files.example/{row}"} for row in "xy"}
    parts = [
        {"type": "image_url", "image_url": links[row]}
        if row in links
        else {"type": "text", "text": row}
        for row in rows
    ]
    messages = parsed(*map(content, parts)).messages
    files = ["".join(file.name for file in row.attachments) for row in messages]
    assert [f"{row.text} {names}" for row, names in zip(messages, files)] == said


@given(st.binary(max_size=50), st.booleans(), st.booleans())
def test_data_of_a_file_arrives_whole(data: bytes, padded: bool, safe: bool) -> None:
    text = (base64.urlsafe_b64encode if safe else base64.b64encode)(data).decode()
    url = f"data:image/png;base64,{text if padded else text.rstrip('=')}"
    (message,) = parsed(content(image(url))).messages
    assert message.attachments[0].data == data


@given(st.text(max_size=20), st.text(max_size=20) | st.just("a/b\r\nX: y"))
def test_file_has_a_name_and_a_type_that_a_header_can_hold(
    name: str, kind: str
) -> None:
    file = opendify.known_file(name, kind)
    assert re.fullmatch(r"[\w.+-]+/[\w.+-]+", file.media_type, re.ASCII)
    assert not re.search(r'["\r\n]', file.name)


# Streamed answers...


def events(data: bytes) -> list[JSONObject]:
    """Return a chat stream's chunks as the strictest reader sees them.

    That one cuts lines as `str.splitlines` does, takes each `data:` line as a whole
    document, and wants nothing but those.
    """
    assert data.endswith(b"data: [DONE]\n\n")
    lines = data.decode().splitlines()
    assert lines[1::2] == [""] * (len(lines) // 2)
    texts = [line[len("data: ") :] for line in lines[::2] if line.startswith("data: ")]
    assert (len(texts) * 2, texts[-1]) == (len(lines), "[DONE]")
    return [json.loads(text) for text in texts[:-1]]


def streamed(*parts: Part, include_usage: bool = False) -> bytes:
    """Return the stream that parts become."""
    chat = CHAT._replace(include_usage=include_usage)
    stream = ChatStream(ENVELOPE._replace(chat=chat))
    data = stream.begin({}) + b"".join(stream.encode(part) for part in parts)
    return data + stream.end(stream.summary.usage)


def joined(chunks: list[JSONObject], key: str = "content") -> str:
    """Return all deltas of one kind, joined."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(choice["delta"].get(key) or "" for choice in choices)


def test_stream_to_the_byte() -> None:
    chat = CHAT._replace(include_usage=True)
    stream = ChatStream(Envelope("chatcmpl-1", 17, "m", chat))
    data = stream.begin({"message_id": "x"})
    for piece in (Reasoning("Hm"), Text("Hé\n\u2028"), Usage(3, 4), Finish("stop")):
        data += stream.encode(piece)
    data += stream.end(stream.summary.usage)
    head = (
        'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":17,'
        '"model":"m","system_fingerprint":"fp_opendify",'
    )
    begin, end = '"choices":[{"index":0,"delta":', ',"logprobs":null,"finish_reason":'
    usage = '"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}'
    rows = [
        f'{head}{begin}{{"role":"assistant","content":"","refusal":null}}{end}null}}],'
        '"usage":null,"dify":{"message_id":"x"}}',
        f'{head}{begin}{{"reasoning_content":"Hm"}}{end}null}}],"usage":null}}',
        f'{head}{begin}{{"content":"Hé\\n\\u2028"}}{end}null}}],"usage":null}}',
        f'{head}{begin}{{}}{end}"stop"}}],"usage":null}}',
        f'{head}"choices":[],{usage}}}',
        "data: [DONE]",
    ]
    assert data == "".join(f"{row}\n\n" for row in rows).encode()


@pytest.mark.parametrize("reason", ["stop", "length", "content_filter"])
def test_stream_fits_the_schemas(reason: str) -> None:
    parts = (Reasoning("Hm"), Text("Hi"), Usage(1, 2), Finish(reason))
    chunks = events(streamed(*parts))
    check_chat_stream(chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == reason
    check_chat_stream(events(streamed(*parts, include_usage=True)), include_usage=True)


@pytest.mark.parametrize("reason", ["length", "content_filter"])
def test_calls_do_not_hide_that_an_answer_was_cut(reason: str) -> None:
    parts = (ToolCall("call_1", "f", "{}"), Finish(reason))
    last = events(streamed(*parts))[-1]["choices"][0]
    assert last["finish_reason"] == reason
    whole = Answer()
    whole.add(parts)
    (choice,) = ENVELOPE.whole([whole], {})["choices"]
    assert choice["finish_reason"] == reason


def test_usage_that_dify_does_not_tell_is_zero() -> None:
    last = events(streamed(Text("Hi"), Finish(), include_usage=True))[-1]
    zeros = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    assert last["usage"] == zeros


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\u2028b\u2029c\x85d", None),
        ("tab\t cr\r lf\n vt\x0b ff\x0c nul\x00 fs\x1c gs\x1d rs\x1e del\x7f", None),
        ('"quoted" \\ </script> <b>&amp;', None),
        ("👩\u200d💻 🇨🇳 e\u0301 👍🏽", None),
        ("你好，世界。日本語テスト 한국어", None),
        ("\ufeff\ufffe\uffff\U0010ffff", None),
        ("half \ud83d and \ude00.", "half \ufffd and \ufffd."),
        ("data: [DONE]\n\ndata: {}\n\n", None),
        ('{"@":0}', None),
    ],
    ids=["breaks", "controls", "quotes", "emoji", "cjk", "odd", "half", "sse", "mark"],
)
def test_text_arrives_to_the_character(text: str, shown: str | None) -> None:
    chunks = events(streamed(Reasoning(text), Text(text), Finish()))
    check_chat_stream(chunks)
    expected = text if shown is None else shown
    assert joined(chunks) == expected
    assert joined(chunks, "reasoning_content") == expected


@pytest.mark.parametrize("text", ["好" * 30_000, "\u2028" * 30_000, "x" * 8193])
def test_no_line_is_longer_than_strict_readers_take(text: str) -> None:
    """One API reads lines of 64 KiB, and ends the answer at a longer one."""
    given = json.dumps({"text": text}, ensure_ascii=False)
    call = ToolCall("call_1", "f", given)
    data = streamed(Reasoning(text), Text(text), call, Finish())
    assert max(map(len, data.split(b"\n"))) < 64 * 1024
    chunks = events(data)
    check_chat_stream(chunks)
    assert joined(chunks) == joined(chunks, "reasoning_content") == text
    calls = [c["choices"][0]["delta"].get("tool_calls", []) for c in chunks]
    told = [entry["function"] for (entry,) in filter(None, calls)]
    assert "".join(function["arguments"] for function in told) == given


def test_odd_model_name_is_repeated_as_it_is() -> None:
    name = 'a"b\\c {"@":0}\u2028应用'
    stream = ChatStream(Envelope("chatcmpl-1", 1, name, CHAT))
    data = stream.begin({}) + stream.encode(Text("x")) + stream.encode(Finish())
    data += stream.end(stream.summary.usage)
    assert {chunk["model"] for chunk in events(data)} == {name}


def test_failed_stream_has_an_error_and_no_finish_reason() -> None:
    stream = ChatStream(ENVELOPE._replace(chat=CHAT._replace(include_usage=True)))
    data = stream.begin({}) + stream.encode(Text("Hi"))
    error = UpstreamFailed("Line\u2028one")
    *chunks, last = events(data + stream.fail(error))
    expected = {
        "message": "Line\u2028one",
        "type": "server_error",
        "param": None,
        "code": "upstream_error",
    }
    assert last == {"error": expected}
    validate("ErrorResponse", last)
    reasons = {chunk["choices"][0]["finish_reason"] for chunk in chunks}
    assert (joined(chunks), reasons) == ("Hi", {None})


RESOURCES: tuple[JSONObject, ...] = (
    {"position": 1, "document_name": "a.txt", "score": 0.5, "content": "A\u2028a"},
    {"position": 2, "document_name": "b", "doc_metadata": {"source": "https://x/b"}},
    {"position": 3, "title": "C", "url": "http://x/c"},
    {"position": 4, "document_name": "d", "doc_metadata": {"url": "no url", "n": 5}},
    {"position": 5, "url": "javascript:alert(1)", "doc_metadata": None},
)
ANNOTATIONS = [
    {
        "type": "url_citation",
        "url_citation": {"start_index": 0, "end_index": 5, "url": url, "title": title},
    }
    for url, title in [("https://x/b", "b"), ("http://x/c", "C")]
]


def test_citations_go_with_the_finish_chunk() -> None:
    parts = (Text("Hello"), Citations(RESOURCES), Finish())
    chunks = events(streamed(*parts))
    check_chat_stream(chunks)
    cited = {"annotations": ANNOTATIONS, "citations": list(RESOURCES)}
    assert [chunk["choices"][0]["delta"] for chunk in chunks[1:]] == [
        {"content": "Hello"},
        cited,
    ]


def test_citations_without_a_url_are_no_annotations() -> None:
    last = events(streamed(Text("x"), Citations(RESOURCES[:1]), Finish()))[-1]
    assert last["choices"][0]["delta"] == {"citations": [RESOURCES[0]]}
    last = events(streamed(Text("x"), Citations(()), Finish()))[-1]
    assert last["choices"][0]["delta"] == {}


# Whole answers...


def whole(*parts: Part, **ids: str) -> JSONObject:
    """Return the whole object that parts become, as it is sent."""
    answer = Answer()
    answer.add(parts)
    data = opendify.json_bytes(ENVELOPE.whole([answer], ids))
    value: JSONObject = json.loads(data)
    validate("CreateChatCompletionResponse", value)
    return value


def test_whole_answer() -> None:
    value = whole(
        Reasoning("Hm, "),
        Text("Hel"),
        Reasoning("well."),
        Text("lo"),
        Citations(RESOURCES),
        Usage(3, 4),
        Finish("length"),
        message_id="x",
    )
    assert value == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "team/应用 1",
        "system_fingerprint": "fp_opendify",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Hello",
                    "refusal": None,
                    "reasoning_content": "Hm, well.",
                    "annotations": ANNOTATIONS,
                    "citations": list(RESOURCES),
                },
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
        "dify": {"message_id": "x"},
    }


def test_whole_answer_of_nothing() -> None:
    value = whole(Finish())
    message = {"role": "assistant", "content": "", "refusal": None}
    assert value["choices"][0]["message"] == message
    assert value["usage"]["total_tokens"] == 0


def test_replaced_text_is_forgotten() -> None:
    parts = (Reasoning("r"), Text("bad"), Replace("good"), Text(" end"), Finish())
    message = whole(*parts)["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("good end", "r")


@pytest.mark.parametrize(
    ("parts", "text", "reasoning"),
    [
        ([Text("I "), Text("think"), Recast(7), Text("So")], "So", "I think"),
        (
            [Text("Dear Ada,\nI think"), Recast(7), Text("So")],
            "Dear Ada,\nSo",
            "I think",
        ),
        (
            [Reasoning("r"), Text("I think"), Recast(7), Text("So")],
            "So",
            "r\n\nI think",
        ),
        ([Text("less"), Recast(7), Text("So")], "So", "less"),
    ],
)
def test_text_that_turns_out_to_be_reasoning(
    parts: list[Part], text: str, reasoning: str
) -> None:
    message = whole(*parts, Finish())["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == (text, reasoning)


@pytest.mark.parametrize(
    "more", [[Media("image", "https://h/a", "a")], [Text("No. "), Recast(4)]]
)
def test_long_answer_is_not_copied_for_each_file_or_thought(more: list[Part]) -> None:
    answer = Answer()
    with at_most(40):
        answer.add([*[Text("word ")] * 200_000, *more * 5_000])
    assert len(answer.text + answer.reasoning) >= 1_020_000


@pytest.mark.parametrize("withdrawing", [Replace("Blocked."), Recast(7)])
def test_calls_are_withdrawn_with_their_text(withdrawing: Part) -> None:
    call = ToolCall("call_1", "clock", "{}")
    choice = whole(Text("I could"), call, withdrawing, Finish())["choices"][0]
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"
    choice = whole(Text("I could"), withdrawing, call, Finish())["choices"][0]
    assert [row["id"] for row in choice["message"]["tool_calls"]] == ["call_1"]


def test_failure_is_raised() -> None:
    error = UpstreamFailed("broken")
    with pytest.raises(UpstreamFailed) as caught:
        Answer().add([Failure(error)])
    assert caught.value is error


texts = st.text(
    st.one_of(st.characters(), st.sampled_from("\u2028\u2029\x85\ud800\n\r\"\\<'")),
    max_size=8,
)
speech = st.lists(st.one_of(st.builds(Text, texts), st.builds(Reasoning, texts)))


@settings(max_examples=60)
@given(speech, st.sampled_from(["stop", "length"]), st.booleans())
def test_streamed_and_whole_answer_agree(
    said: list[Union[Text, Reasoning]], reason: str, include_usage: bool
) -> None:
    parts: list[Part] = [*said, Usage(5, 6), Finish(reason)]
    chunks = events(streamed(*parts, include_usage=include_usage))
    check_chat_stream(chunks, include_usage=include_usage)
    choice = whole(*parts)["choices"][0]
    assert joined(chunks) == choice["message"]["content"]
    reasoning = choice["message"].get("reasoning_content", "")
    assert joined(chunks, "reasoning_content") == reasoning
    reasons = [row["finish_reason"] for chunk in chunks for row in chunk["choices"]]
    assert [*reasons[:-1], reason] == [*[None] * (len(reasons) - 1), reasons[-1]]


# Files in answers, models...


@pytest.mark.parametrize(
    ("media", "is_first", "text"),
    [
        (Media("image", "http://x/a.png", "a.png"), True, "![a.png](http://x/a.png)"),
        (Media("image", "http://x/a", ""), False, "\n\n![image](http://x/a)"),
        (Media("document", "http://x/a", "a.pdf"), False, "\n\n[a.pdf](http://x/a)"),
        (
            Media("audio", "http://x/a (1).mp3?s=a=", "[b] \\.mp3"),
            True,
            "[\\[b\\] \\\\.mp3](http://x/a%20%281%29.mp3?s=a=)",
        ),
    ],
)
def test_file_as_markdown(media: Media, is_first: bool, text: str) -> None:
    assert opendify.media_text(media, is_first=is_first) == text


def test_models_list() -> None:
    rows = [("m", ""), ("team/应用 1", "Helper"), ("same", "same")]
    data = [opendify.model_object(model, name, 17) for model, name in rows]
    value = {"object": "list", "data": data}
    validate("ListModelsResponse", value)
    common = {"object": "model", "created": 17, "owned_by": "dify"}
    assert value == {
        "object": "list",
        "data": [
            {"id": "m", **common},
            {"id": "team/应用 1", **common, "name": "Helper"},
            {"id": "same", **common},
        ],
    }
    validate("Model", value["data"][1])


@given(texts)
def test_string_is_json_that_no_reader_breaks(text: str) -> None:
    data = opendify.json_string(text)
    assert data == opendify.json_bytes(text)
    assert len(data.decode().splitlines()) == 1
    safe = "".join("\ufffd" if 0xD800 <= ord(c) <= 0xDFFF else c for c in text)
    assert json.loads(data) == safe
