"""Rooms Ids and Responses: requests to an Ask, parts to events, ids without a table."""

from __future__ import annotations

import base64
import json
import string
from dataclasses import replace
from typing import Any, Union

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schemas import check_responses_stream, validate
from work import at_most

import opendify
from opendify import (
    Answer,
    AppForm,
    AppSettings,
    Ask,
    Attachment,
    BadRequest,
    Citations,
    ConfigurationFault,
    Failure,
    Finish,
    IdSealer,
    Media,
    Message,
    Overloaded,
    Part,
    Place,
    ProxyError,
    QuotaExceeded,
    RateLimited,
    Reasoning,
    ResponseFrame,
    ResponsesRequest,
    ResponseStream,
    Text,
    Tool,
    ToolCall,
    UpstreamFailed,
    UpstreamRejected,
    UpstreamTimeout,
    Usage,
    ask_of,
    check_files,
    conversation_object,
    deleted_object,
    describe_tools,
    input_item,
    item_named,
    list_page,
    open_place,
    parse_responses_request,
    stored_turn,
)

JSONObject = dict[str, Any]
HI = Message("user", "Hi")
CONVERSATION = "3f88b6bc-86a9-4c8f-80f8-adf2225ba207"
MESSAGE = "e1202ab8-4a0c-47fc-94d9-6a5b1f00c2d3"
IDS = {"conversation_id": CONVERSATION, "message_id": MESSAGE}
KEY = "app-1"
APP = AppSettings(KEY, "http://dify/v1")
SEALER = IdSealer(KEY)


# Requests...


def request(*items: Any, **fields: Any) -> JSONObject:
    """Return the body of a request."""
    return {"model": "m", "input": list(items) or "Hi", **fields}


def items_of(*items: Any, **fields: Any) -> tuple[Any, ...]:
    """Return the items of a request as they are understood."""
    return parse_responses_request(request(*items, **fields)).items


def messages_of(*items: Any) -> tuple[Message, ...]:
    """Return what a request with these items asks."""
    return ask_of(parse_responses_request(request(*items)), {}).messages


def test_smallest_request() -> None:
    parsed = parse_responses_request(request())
    echo = parsed.echo
    assert parsed == ResponsesRequest(Ask("m", ()), (HI,), echo=echo)
    assert ask_of(parsed, {}) == Ask("m", (HI,))
    assert echo == {
        "instructions": None,
        "metadata": {},
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "temperature": 1,
        "top_p": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "top_logprobs": 0,
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": None, "summary": None},
        "max_output_tokens": None,
        "max_tool_calls": None,
        "truncation": "disabled",
        "previous_response_id": None,
        "conversation": None,
        "store": True,
        "background": False,
        "service_tier": "default",
        "safety_identifier": None,
        "prompt_cache_key": None,
    }


CALL = {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"}
CALLED = ToolCall("call_1", "f", "{}")
PNG = "data:image/png;base64,iVBORw0KGgo="
IMAGE = Attachment("image.png", "image/png", b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"role": "user", "content": "a"}, Message("user", "a")),
        ({"role": "user", "content": "a", "type": "message"}, Message("user", "a")),
        ({"role": "user", "content": "a", "type": None}, Message("user", "a")),
        ("a", Message("user", "a")),
        ({"role": "critic", "content": "a"}, Message("user", "a")),
        (
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            Message("user", "a"),
        ),
        (
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "a"},
                    {"type": "input_image", "image_url": PNG},
                    {"type": "input_file", "filename": "b.md", "file_data": "aGk="},
                    {"type": "input_file", "file_url": "https://x/c.pdf"},
                ],
            },
            Message(
                "user",
                "a",
                attachments=(
                    IMAGE,
                    Attachment("b.md", "text/markdown", b"hi"),
                    Attachment("c.pdf", url="https://x/c.pdf"),
                ),
            ),
        ),
        (
            {"role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
            Message("assistant", "a"),
        ),
        (
            {
                "id": "msg_1",
                "type": "message",
                "status": "completed",
                "role": "assistant",
                "content": [
                    {"type": "output_text", "text": "a", "annotations": []},
                    {"type": "refusal", "refusal": "b"},
                ],
            },
            Message("assistant", "a\nb"),
        ),
        (CALL, Message("assistant", "", tool_calls=(CALLED,))),
        (
            {**CALL, "id": "fc_1", "status": "completed", "arguments": {"a": 1}},
            Message("assistant", "", tool_calls=(ToolCall("call_1", "f", '{"a": 1}'),)),
        ),
        (
            {"type": "custom_tool_call", "call_id": "c", "name": "f", "input": "x\n"},
            Message(
                "assistant", "", tool_calls=(ToolCall("c", "f", '{"input": "x\\n"}'),)
            ),
        ),
        (
            {**CALL, "namespace": "n"},
            Message("assistant", "", tool_calls=(replace(CALLED, name="n.f"),)),
        ),
        (
            {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
            Message("tool", "sunny", call_id="call_1"),
        ),
        (
            {"type": "custom_tool_call_output", "call_id": "c", "output": "sunny"},
            Message("tool", "sunny", call_id="c"),
        ),
        (
            {"type": "function_call_output", "call_id": "c", "output": {"t": 20}},
            Message("tool", '{"t": 20}', call_id="c"),
        ),
        (
            {"type": "function_call_output", "call_id": "c", "output": None},
            Message("tool", "", call_id="c"),
        ),
        (
            {
                "type": "function_call_output",
                "call_id": "c",
                "output": [
                    {"type": "input_text", "text": "a"},
                    {"type": "input_image", "image_url": PNG},
                ],
            },
            Message("tool", "a", attachments=(IMAGE,), call_id="c"),
        ),
        ({"type": "item_reference", "id": "msg_1"}, "msg_1"),
        ({"id": "msg_1"}, "msg_1"),
        ({"id": "msg_1", "type": None}, "msg_1"),
        ({"type": "item_reference", "id": None}, None),
        ({"type": "reasoning", "id": "rs_1", "summary": []}, None),
        ({"type": "web_search_call", "id": "ws_1", "status": "completed"}, None),
        ({"type": "tomorrow", "role": "user", "content": 5}, None),
        ({"type": ["message"], "role": "user", "content": 5}, None),
        ({}, None),
    ],
)
def test_item(item: Any, expected: Any) -> None:
    expected = [] if expected is None else [expected]
    assert items_of(HI_ROW, item) == (HI, *expected)


HI_ROW = {"role": "user", "content": "Hi"}
SAID = {"role": "assistant", "content": "a"}


def test_calls_join_the_message_that_they_follow() -> None:
    other = {**CALL, "call_id": "call_2"}
    output = {"type": "function_call_output", "call_id": "call_1", "output": "x"}
    thought = {"type": "reasoning", "id": "rs_1", "summary": []}
    rows = [HI_ROW, thought, SAID, CALL, thought, other, output, CALL, SAID, HI_ROW]
    assert messages_of(*rows) == (
        HI,
        Message("assistant", "a", tool_calls=(CALLED, ToolCall("call_2", "f", "{}"))),
        Message("tool", "x", "f"),
        Message("assistant", "a", tool_calls=(CALLED,)),
        HI,
    )


def test_many_thoughts_take_little_time() -> None:
    thought = {"role": "assistant", "content": "<think>abc</think>"}
    with at_most(80):
        (message,) = messages_of(*[thought] * 8000)
    assert message.text.count("abc") == 8000


def test_thoughts_join_the_message_that_they_lead_to() -> None:
    """Some clients send them back as a message of their own."""
    thought = {"role": "assistant", "content": "<think>hm</think>"}
    other = {"role": "assistant", "content": "b"}
    assert messages_of(HI_ROW, thought, SAID, other, HI_ROW) == (
        HI,
        Message("assistant", "<think>hm</think>\na"),
        Message("assistant", "b"),
        HI,
    )


@pytest.mark.parametrize(
    ("fields", "system", "rest"),
    [
        ({"instructions": "Be brief."}, "Be brief.", 1),
        ({"instructions": None}, "", 1),
        ({"instructions": " "}, "", 1),
        ({"input": [{"role": "developer", "content": "A"}, HI_ROW]}, "A", 1),
        (
            {
                "instructions": "Be brief.",
                "input": [{"role": "system", "content": "A"}, HI_ROW],
            },
            "Be brief.\n\nA",
            1,
        ),
        ({"input": [HI_ROW, {"role": "system", "content": "A"}]}, "", 2),
    ],
)
def test_system_text(fields: JSONObject, system: str, rest: int) -> None:
    parsed = parse_responses_request(request(**fields))
    assert (parsed.ask.system, len(parsed.items)) == (system, rest)


def test_references_stand_in_order_for_what_they_name() -> None:
    silent = {"role": "user", "content": ""}
    rows = [HI_ROW, {"id": "msg_1"}, {"id": "fc_1"}, {"id": "msg_?"}, silent]
    rows.append({"id": "fc_1"})
    parsed = parse_responses_request(request(*rows))
    assert parsed.references == ("msg_1", "fc_1", "msg_?", "fc_1")
    said = Message("assistant", "a")
    call = Message("assistant", "", tool_calls=(CALLED,))
    whole = said._replace(tool_calls=(CALLED,))
    earlier = [Message("user", "0"), Message("assistant", "00")]
    ask = ask_of(parsed, {"msg_1": said, "fc_1": call}, earlier)
    assert ask.messages == (*earlier, HI, whole, Message("user", ""), call)


ANSWER = Message(
    "assistant",
    "a",
    tool_calls=tuple(
        ToolCall(f"call_{n}", "f", "{}", is_custom=n == 1) for n in range(3)
    ),
)


@pytest.mark.parametrize(
    ("id_", "number", "text", "calls"),
    [
        ("resp_x", "", "a", [0, 1, 2]),
        ("msg_x", "0", "a", []),
        ("fc_x", "0", "", [0]),
        ("ctc_x", "1", "", [1]),
        ("fc_x", "2", "", [2]),
    ],
)
def test_item_that_is_named_is_that_part_of_its_answer(
    id_: str, number: str, text: str, calls: list[int]
) -> None:
    own = tuple(ANSWER.tool_calls[n] for n in calls)
    said = Message("assistant", text, tool_calls=own)
    assert item_named(id_, number, ANSWER) == said


@pytest.mark.parametrize(("id_", "number"), [("rs_x", "0"), ("fc_x", "3")])
def test_thoughts_and_calls_that_are_not_there_say_nothing(
    id_: str, number: str
) -> None:
    assert item_named(id_, number, ANSWER) is None


def test_calls_after_a_reference_belong_to_what_it_names() -> None:
    """The AI SDK names the message that came with the calls, and repeats them."""
    output = {"type": "function_call_output", "call_id": "call_1", "output": "x"}
    parsed = parse_responses_request(request(HI_ROW, {"id": "msg_1"}, CALL, output))
    said = Message("assistant", "a")
    result = Message("tool", "x", "f")  # the tool's name, not the call's id
    own = said._replace(tool_calls=(CALLED,))
    assert ask_of(parsed, {"msg_1": said}).messages == (HI, own, result)
    alone = Message("assistant", "", tool_calls=(CALLED,))
    assert ask_of(parsed, {}).messages == (HI, alone, result)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([{"id": "rs_1"}, SAID, CALL], id="thoughts"),
        pytest.param([{"id": "rs_1"}, SAID, {"id": "fc_1"}], id="around"),
        pytest.param([{"id": "rs_1"}, {"id": "fc_1"}, SAID], id="calls"),
        pytest.param([SAID, {"id": "fc_1"}], id="behind"),
    ],
)
def test_answer_that_is_named_in_part_is_one_message(rows: list[Any]) -> None:
    said = Message("assistant", "a", tool_calls=(CALLED,))
    parsed = parse_responses_request(request(HI_ROW, *rows, HI_ROW))
    named = {"rs_1": None, "fc_1": said._replace(text="")}
    assert ask_of(parsed, named).messages == (HI, said, HI)


def test_another_answer_after_one_that_is_named_is_said_too() -> None:
    parsed = parse_responses_request(request(HI_ROW, {"id": "msg_1"}, SAID))
    other = Message("assistant", "b")
    said = Message("assistant", "a")
    assert ask_of(parsed, {"msg_1": other}).messages == (HI, other, said)


def test_answer_that_is_named_behind_another_s_equal_text_is_said_too() -> None:
    parsed = parse_responses_request(request(HI_ROW, {"id": "msg_1"}, {"id": "fc_1"}))
    one = Message("assistant", "a")
    two = one._replace(tool_calls=(CALLED,))
    assert ask_of(parsed, {"msg_1": one, "fc_1": two}).messages == (HI, one, two)


def test_calls_after_a_question_that_is_named_are_no_part_of_it() -> None:
    parsed = parse_responses_request(request({"id": "msg_1"}, CALL))
    alone = Message("assistant", "", tool_calls=(CALLED,))
    assert ask_of(parsed, {"msg_1": HI}).messages == (HI, alone)


def test_calls_with_text_of_their_own_are_no_part_of_what_is_named() -> None:
    text = {"role": "assistant", "content": "b"}
    parsed = parse_responses_request(request({"id": "msg_1"}, text, CALL))
    said = Message("assistant", "a")
    own = Message("assistant", "b", tool_calls=(CALLED,))
    assert ask_of(parsed, {"msg_1": said}).messages == (said, own)


@pytest.mark.parametrize("field", ["previous_response_id", "conversation"])
def test_continued_request_needs_no_input(field: str) -> None:
    body = {"model": "m", field: "x_1"}
    parsed = parse_responses_request(body)
    assert parsed.items == ()
    assert getattr(parsed, field) == "x_1"
    assert ask_of(parsed, {}).messages == ()


def test_conversation_may_be_an_object() -> None:
    parsed = parse_responses_request(request(conversation={"id": "conv_1"}))
    assert parsed.conversation == "conv_1"
    assert parsed.echo["conversation"] == {"id": "conv_1"}


MISSING, TYPE, VALUE = "missing_required_parameter", "invalid_type", "invalid_value"


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        pytest.param({"input": "Hi"}, "model", MISSING, id="no-model"),
        pytest.param(request(model=5), "model", TYPE, id="model-number"),
        pytest.param({"model": "m"}, "input", MISSING, id="no-input"),
        pytest.param(request(input=None), "input", MISSING, id="input-null"),
        pytest.param(request(input=""), "input", MISSING, id="input-empty"),
        pytest.param(request(input=[]), "input", MISSING, id="input-no-items"),
        pytest.param(
            request({"type": "reasoning"}), "input", MISSING, id="nothing-known"
        ),
        pytest.param(request(input=5), "input", TYPE, id="input-number"),
        pytest.param(request(5), "input[0]", TYPE, id="item-number"),
        pytest.param(
            request(*[HI_ROW] * (opendify.MAX_MESSAGES + 1)),
            "input",
            VALUE,
            id="too-many-items",
        ),
        pytest.param(
            request({"role": "user", "content": 5}),
            "input[0].content",
            TYPE,
            id="content-number",
        ),
        pytest.param(
            request(HI_ROW, {"role": "user", "content": [{"type": "input_video"}]}),
            "input[1].content[0]",
            VALUE,
            id="part-unknown",
        ),
        pytest.param(request(stream="yes"), "stream", TYPE, id="stream-string"),
        pytest.param(
            request(instructions=["a"]), "instructions", TYPE, id="instructions-list"
        ),
        pytest.param(
            request(previous_response_id=5), "previous_response_id", TYPE, id="id"
        ),
        pytest.param(
            request(conversation={"id": 5}), "conversation", TYPE, id="conversation"
        ),
        pytest.param(
            request(previous_response_id="resp_1", conversation="conv_1"),
            "previous_response_id",
            VALUE,
            id="both",
        ),
    ],
)
def test_refused_field_is_named(body: JSONObject, param: str, code: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_responses_request(body)
    error = caught.value
    assert (error.status, error.param, error.code) == (400, param, code)


TOOL = {
    "type": "function",
    "name": "f",
    "description": "d",
    "parameters": {"type": "object"},
    "strict": True,
}
CUSTOM = {"type": "custom", "name": "p", "description": "d"}
LARK = {"type": "grammar", "syntax": "lark", "definition": 'start: "x"'}
SCHEMA = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
BARE, FULL = ({"description": d, "strict": bool(d)} for d in ("", "d"))
ALLOWED = {
    "type": "allowed_tools",
    "mode": "required",
    "tools": [{"type": "function", "name": "f"}],
}
ECHOED = [
    ("instructions", "Be brief.", "Be brief."),
    ("metadata", {"a": "b", "inputs": {"c": 1}}, {"a": "b"}),
    ("metadata", "odd", {}),
    ("tools", [TOOL], [TOOL]),
    (
        "tools",
        [{"type": "function", "name": "f"}],
        [{**TOOL, "description": "", "parameters": {}, "strict": False}],
    ),
    ("tools", [{"type": "namespace", "tools": []}, {"type": "web_search"}, 5], []),
    ("tools", [{"type": "function"}, {"type": "namespace", "tools": [TOOL]}], []),
    (
        "tools",
        [{"type": "custom", "name": "p", "format": {"type": "grammar"}}],
        [{**CUSTOM, "description": "", "format": {"type": "text"}}],
    ),
    ("tools", [{**CUSTOM, "format": {**LARK, "odd": 1}}], [{**CUSTOM, "format": LARK}]),
    (
        "tools",
        [{"type": "namespace", "name": "n", "tools": [TOOL, {"type": "web_search"}]}],
        [{"type": "namespace", "name": "n", "description": "", "tools": [TOOL]}],
    ),
    ("tool_choice", "none", "none"),
    ("tool_choice", "required", "required"),
    (
        "tool_choice",
        {"type": "function", "name": "f"},
        {"type": "function", "name": "f"},
    ),
    ("tool_choice", {"type": "custom", "name": "f"}, {"type": "custom", "name": "f"}),
    ("tool_choice", ALLOWED, ALLOWED),
    ("tool_choice", {**ALLOWED, "mode": "auto"}, {**ALLOWED, "mode": "auto"}),
    ("tool_choice", {"type": "odd"}, "auto"),
    ("tool_choice", {"type": "mcp", "server_label": "s", "name": "f"}, "auto"),
    ("tool_choice", {"type": "function"}, "auto"),
    ("parallel_tool_calls", False, False),
    ("temperature", 0, 0),
    ("temperature", 2, 2),
    ("temperature", 99, 1),
    ("temperature", -0.5, 1),
    ("temperature", True, 1),
    ("top_p", 0.5, 0.5),
    ("top_p", "much", 1),
    ("text", {"format": {"type": "json_object"}}, {"format": {"type": "json_object"}}),
    ("text", {"format": SCHEMA}, {"format": {**SCHEMA, **BARE}}),
    ("text", {"format": {**SCHEMA, **FULL}}, {"format": {**SCHEMA, **FULL}}),
    ("text", {"verbosity": "loud"}, {"format": {"type": "text"}}),
    ("reasoning", {"effort": "odd"}, {"effort": None, "summary": None}),
    ("max_output_tokens", 5, 5),
    ("max_output_tokens", "5", None),
    ("truncation", "auto", "auto"),
    ("truncation", "odd", "disabled"),
    ("previous_response_id", "resp_1", "resp_1"),
    ("store", False, False),
    ("background", True, False),
    ("service_tier", "flex", "default"),
    ("safety_identifier", "ada", "ada"),
    ("safety_identifier", 65 * "a", None),
    ("prompt_cache_key", "k", "k"),
    ("prompt_cache_key", ["k"], None),
]


LARK_TEXT = {"description": 'It must fit this lark grammar: start: "x"'}


@pytest.mark.parametrize(
    ("form", "description"), [(None, {}), ({"type": "text"}, {}), (LARK, LARK_TEXT)]
)
def test_tool_of_a_custom_type_is_told_as_a_function_of_one_text(
    form: Any, description: dict[str, str]
) -> None:
    tool = {"type": "custom", "name": "p", "description": "d", "format": form}
    told = {
        "type": "object",
        "properties": {"input": {"type": "string", **description}},
        "required": ["input"],
    }
    asked = parse_responses_request(request(tools=[TOOL, tool])).ask.tools
    assert asked == (
        Tool("f", "d", {"type": "object"}),
        Tool("p", "d", told, is_custom=True),
    )


@pytest.mark.parametrize(("name", "value", "repeated"), ECHOED)
def test_response_repeats_a_field(name: str, value: Any, repeated: Any) -> None:
    fields = {"tools": [TOOL], name: value}  # of which one may have to be called
    parsed = parse_responses_request(request(**fields))
    assert parsed.echo[name] == repeated
    whole(Finish(), body=request(**fields))


@pytest.mark.parametrize("given", [0, 1, 0.5, "odd", None])
def test_number_that_may_be_a_fraction_is_written_as_one(given: Any) -> None:
    """Typed clients take a number without a point for an integer."""
    echo = parse_responses_request(request(temperature=given, top_p=given)).echo
    penalties = ("presence_penalty", "frequency_penalty")
    kinds = {type(echo[name]) for name in ("temperature", "top_p", *penalties)}
    assert kinds == {float}


OPTIONAL = [name for name, _, _ in ECHOED] + [
    *["conversation", "user", "safety_identifier", "inputs", "conversation_id"],
    *["stream", "stream_options", "include", "prompt", "prompt_cache_key"],
    *["max_tool_calls", "top_logprobs", "client_metadata", "context_management"],
]


@pytest.mark.parametrize("field", sorted(set(OPTIONAL)))
def test_null_is_as_good_as_nothing(field: str) -> None:
    parsed = parse_responses_request(request(**{field: None}))
    assert parsed == parse_responses_request(request())


def test_fields_that_chat_has_too() -> None:
    parsed = parse_responses_request(
        request(
            stream=True,
            store=False,
            user="u",
            metadata={"inputs": '{"a": 1}'},
            inputs={"b": 2},
            conversation_id="c",
        )
    )
    ask = Ask("m", (), inputs={"a": 1, "b": 2}, user="u", conversation_id="c")
    assert (parsed.ask, parsed.stream, parsed.echo["store"]) == (ask, True, False)


# Streams...


def frame_of(body: JSONObject | None = None) -> ResponseFrame:
    """Return a frame for the answer to a request."""
    echo = parse_responses_request(body or request()).echo
    return ResponseFrame(1700000000, "team/应用 1", echo, SEALER, "u", "fresh")


def events_of(data: bytes) -> list[JSONObject]:
    """Return the events of a stream; each is named by its type, too."""
    rows = data.decode().split("\n\n")
    assert rows.pop() == ""
    events = []
    for row in rows:
        head, tail = row.split("\n")
        event = json.loads(tail[len("data: ") :])
        assert (head, tail[:6]) == (f"event: {event['type']}", "data: ")
        events.append(event)
    return events


def streamed(
    *parts: Part, error: ProxyError | None = None, body: JSONObject | None = None
) -> tuple[list[JSONObject], JSONObject]:
    """Return the checked events that parts become, and the response at their end."""
    stream = ResponseStream(frame_of(body))
    data = stream.begin(IDS) + b"".join(stream.encode(part) for part in parts)
    events = events_of(data + stream.fail(error) if error else data)
    end = check_responses_stream(events)
    assert end == json.loads(opendify.json_bytes(stream.response))
    return events, end


def whole(*parts: Part, body: JSONObject | None = None) -> JSONObject:
    """Return the whole object that parts become, as it is sent."""
    answer = Answer()
    answer.add(parts)
    data = opendify.json_bytes(frame_of(body).whole([answer], IDS))
    value: JSONObject = json.loads(data)
    validate("Response", value)
    return value


def item_id(prefix: str, item: object = "") -> str:
    """Return the id of an item of these answers."""
    return SEALER.seal(prefix, ("u", CONVERSATION, MESSAGE, str(item)))


URL = {
    "position": 1,
    "document_name": "B",
    "document_id": "d0",
    "doc_metadata": {"source": "https://x/b"},
}
FILE = {"position": 2, "document_name": "a.txt", "document_id": "d1", "content": "A"}
NAMELESS = ({"position": 3, "document_name": "c"}, {"position": 4, "document_id": "d2"})
CITED = (URL, FILE, FILE, URL, *NAMELESS)
ANNOTATIONS = [
    {
        "type": "url_citation",
        "start_index": 0,
        "end_index": 5,
        "url": "https://x/b",
        "title": "B",
    },
    {"type": "file_citation", "file_id": "d1", "filename": "a.txt", "index": 0},
]
USAGE = {
    "input_tokens": 3,
    "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
    "output_tokens": 4,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 7,
}


def test_whole_stream() -> None:
    """Every event of an answer with everything in it, to the byte of its JSON."""
    events, end = streamed(
        Reasoning("Hm"),
        Reasoning("…"),
        Text("Hel"),
        Text("lo"),
        ToolCall("call_1", "f", '{"a": 1}'),
        Citations(CITED),
        Usage(3, 4),
        Finish(),
    )
    rs, msg, fc = item_id("rs_", 0), item_id("msg_", 0), item_id("fc_", 0)
    at_rs = {"item_id": rs, "output_index": 0, "summary_index": 0}
    at_msg = {"item_id": msg, "output_index": 1, "content_index": 0}
    at_fc = {"item_id": fc, "output_index": 2}
    blank = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    part = {**blank, "text": "Hello", "annotations": ANNOTATIONS}
    thought = {"type": "summary_text", "text": "Hm…"}
    items: list[JSONObject] = [
        {"id": rs, "type": "reasoning", "status": "completed", "summary": [thought]},
        {
            "id": msg,
            "type": "message",
            "status": "completed",
            "role": "assistant",
            "content": [part],
        },
        {
            "id": fc,
            "type": "function_call",
            "status": "completed",
            "arguments": '{"a": 1}',
            "call_id": "call_1",
            "name": "f",
        },
    ]
    response = {
        "id": item_id("resp_"),
        "object": "response",
        "created_at": 1700000000,
        "completed_at": None,
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "model": "team/应用 1",
        "output": items,
        **parse_responses_request(request()).echo,
        "dify": IDS,
        "usage": USAGE,
    }
    begun = {**response, "status": "in_progress", "output": []}
    del begun["usage"]
    logprobs: JSONObject = {"logprobs": []}
    expected: list[tuple[str, JSONObject]] = [
        ("created", {"response": begun}),
        ("in_progress", {"response": begun}),
        (
            "output_item.added",
            {
                "item": {**items[0], "status": "in_progress", "summary": []},
                "output_index": 0,
            },
        ),
        ("reasoning_summary_part.added", {**at_rs, "part": {**thought, "text": ""}}),
        ("reasoning_summary_text.delta", {**at_rs, "delta": "Hm"}),
        ("reasoning_summary_text.delta", {**at_rs, "delta": "…"}),
        ("reasoning_summary_text.done", {**at_rs, "text": "Hm…"}),
        ("reasoning_summary_part.done", {**at_rs, "part": thought}),
        ("output_item.done", {"item": items[0], "output_index": 0}),
        (
            "output_item.added",
            {
                "item": {**items[1], "status": "in_progress", "content": []},
                "output_index": 1,
            },
        ),
        ("content_part.added", {**at_msg, "part": blank}),
        ("output_text.delta", {**at_msg, **logprobs, "delta": "Hel"}),
        ("output_text.delta", {**at_msg, **logprobs, "delta": "lo"}),
        *(
            (
                "output_text.annotation.added",
                {**at_msg, "annotation_index": index, "annotation": annotation},
            )
            for index, annotation in enumerate(ANNOTATIONS)
        ),
        ("output_text.done", {**at_msg, **logprobs, "text": "Hello"}),
        ("content_part.done", {**at_msg, "part": part}),
        ("output_item.done", {"item": items[1], "output_index": 1}),
        (
            "output_item.added",
            {
                "item": {**items[2], "status": "in_progress", "arguments": ""},
                "output_index": 2,
            },
        ),
        ("function_call_arguments.delta", {**at_fc, "delta": '{"a": 1}'}),
        (
            "function_call_arguments.done",
            {**at_fc, "name": "f", "arguments": '{"a": 1}'},
        ),
        ("output_item.done", {"item": items[2], "output_index": 2}),
        ("completed", {"response": response}),
    ]
    assert events == [
        {"type": f"response.{name}", "sequence_number": number, **fields}
        for number, (name, fields) in enumerate(expected)
    ]
    assert end == response


def test_thinking_again_does_not_end_the_message() -> None:
    parts = (Text("a"), Reasoning("b"), Text("c"), Reasoning("d"), Finish())
    _, end = streamed(*parts)
    texts = [
        part["text"]
        for item in end["output"]
        for part in item.get("content", item.get("summary"))
    ]
    assert texts == ["ac", "b", "d"]


@pytest.mark.parametrize(
    ("parts", "kinds"),
    [
        ((), ["message"]),
        ((Text(""), Reasoning("")), ["message"]),
        ((Reasoning("a"),), ["reasoning", "message"]),
        ((ToolCall("c", "f", "{}"),), ["function_call"]),
        (
            (ToolCall("c", "f", "{}"), Text("late"), ToolCall("d", "g", "")),
            ["message", "function_call", "function_call"],
        ),
    ],
    ids=["nothing", "empty", "thought", "call", "calls"],
)
def test_items_of_an_answer(parts: Any, kinds: list[str]) -> None:
    _, end = streamed(*parts, Finish())
    assert [item["type"] for item in end["output"]] == kinds
    assert whole(*parts, Finish()) == end


def test_call_of_a_tool_in_a_namespace_names_both() -> None:
    inside = ToolCall("call_1", "n.f", "{}", namespace="n")
    others = [ToolCall("call_2", name, "{}") for name in ("n.f", ".f")]
    calls = [inside, replace(inside, is_custom=True), *others]
    _, end = streamed(*calls, Finish())
    named = [(item.get("namespace"), item["name"]) for item in end["output"]]
    assert named == [("n", "f"), ("n", "f"), (None, "n.f"), (None, ".f")]


def test_call_of_a_custom_tool_has_text() -> None:
    body = request(tools=[{"type": "custom", "name": "patch"}, TOOL])
    calls = [
        ToolCall("call_1", "patch", '{"input": "*** Begin\\n"}', is_custom=True),
        ToolCall("call_2", "patch", "raw", is_custom=True),
        ToolCall("call_3", "f", "{}"),
    ]
    _, end = streamed(*calls, Finish("tool_calls"), body=body)
    custom = {"type": "custom_tool_call", "status": "completed", "name": "patch"}
    assert end["output"][:2] == [
        {
            **custom,
            "id": item_id("ctc_", 0),
            "call_id": "call_1",
            "input": "*** Begin\n",
        },
        {**custom, "id": item_id("ctc_", 1), "call_id": "call_2", "input": "raw"},
    ]
    assert end["output"][2]["type"] == "function_call"
    assert end["status"] == "completed"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"input": {"a": true, "b": "é"}}', '{"a": true, "b": "é"}'),
        ('{"input": 3}', "3"),
        ('{"other": 3}', '{"other": 3}'),
    ],
)
def test_input_of_a_custom_tool_that_is_no_text(arguments: str, text: str) -> None:
    body = request(tools=[{"type": "custom", "name": "patch"}])
    call = ToolCall("call_1", "patch", arguments, is_custom=True)
    _, end = streamed(call, Finish("tool_calls"), body=body)
    assert end["output"][0]["input"] == text


@pytest.mark.parametrize(
    ("reason", "status", "details"),
    [
        ("stop", "completed", None),
        ("tool_calls", "completed", None),
        ("length", "incomplete", {"reason": "max_output_tokens"}),
        ("content_filter", "incomplete", {"reason": "content_filter"}),
    ],
)
def test_end(reason: str, status: str, details: Any) -> None:
    events, end = streamed(Text("Hi"), Finish(reason))
    assert events[-1]["type"] == f"response.{status}"
    assert (end["status"], end["incomplete_details"]) == (status, details)
    assert end["output"][0]["status"] == status
    assert end["usage"]["total_tokens"] == 0
    assert whole(Text("Hi"), Finish(reason)) == end


FAILURES = [
    (UpstreamFailed("x"), "server_error"),
    (UpstreamFailed("x", is_final=True), "invalid_prompt"),
    (UpstreamTimeout("x"), "server_error"),
    (Overloaded("x"), "server_error"),
    (ProxyError("x"), "server_error"),
    (RateLimited("x"), "rate_limit_exceeded"),
    (QuotaExceeded("x"), "invalid_prompt"),
    (ConfigurationFault("x"), "invalid_prompt"),
    (UpstreamRejected("x"), "invalid_prompt"),
    (BadRequest("x"), "invalid_prompt"),
]


@pytest.mark.parametrize(
    ("error", "code"), FAILURES, ids=lambda value: type(value).__name__
)
def test_failed_stream(error: ProxyError, code: str) -> None:
    events, end = streamed(Reasoning("a"), Text("Hi"), error=error)
    assert events[-1]["type"] == "response.failed"
    assert end["error"] == {"code": code, "message": "x"}
    flat = {"code": code, "message": "x", "param": None}
    number = len(events) - 2
    about = {"type": "error", "sequence_number": number, "error": events[-2]["error"]}
    assert events[-2] == {**flat, **about}
    assert events[-2]["error"] == {**flat, "type": error.type}
    assert [item["status"] for item in end["output"]] == ["completed", "incomplete"]
    assert end["output"][1]["content"][0]["text"] == "Hi"


def test_stream_that_fails_while_it_thinks() -> None:
    _, end = streamed(Reasoning("a"), error=UpstreamFailed("x"))
    (item,) = end["output"]
    assert item["summary"] == [{"type": "summary_text", "text": "a"}]
    assert item["status"] == "incomplete"


def test_many_items_take_little_time() -> None:
    parts: list[Part] = [Reasoning("a"), Text("b")] * 4000
    parts += [ToolCall(f"call_{number}", "f", "{}") for number in range(4000)]
    stream = ResponseStream(frame_of())
    stream.begin(IDS)
    with at_most(300):
        for part in [*parts, Finish()]:
            stream.encode(part)
    assert len(stream.response["output"]) == 8001


def test_stream_that_fails_before_it_begins() -> None:
    stream = ResponseStream(frame_of())
    events = events_of(stream.fail(UpstreamFailed("x")))
    end = check_responses_stream(events)
    assert [event["type"] for event in events] == [
        "response.created",
        "response.in_progress",
        "error",
        "response.failed",
    ]
    assert open_place(SEALER, end["id"], "") is None


def test_heartbeats() -> None:
    """Before the first event only a comment; then the response as it stands."""
    stream = ResponseStream(frame_of())
    assert stream.heartbeat() == b": keep-alive\n\n"
    data = stream.begin(IDS) + stream.heartbeat() + stream.encode(Reasoning("a"))
    data += stream.heartbeat() + stream.encode(Text("b")) + stream.heartbeat()
    data += stream.encode(Reasoning("c")) + stream.encode(Text("d"))
    events = events_of(data + stream.heartbeat() + stream.encode(Finish()))
    check_responses_stream(events)
    beats = [row for row in events if row["type"] == "response.in_progress"]
    assert [len(beat["response"]["output"]) for beat in beats] == [0, 0, 1, 2, 3]
    _, message, _ = beats[-1]["response"]["output"]
    assert (message["status"], message["content"][0]["text"]) == ("in_progress", "bd")


def test_text_arrives_to_the_character() -> None:
    text = 'a"b\\c\u2028\u2029\x85\n\r\x00{"@":0}%d%b👩\u200d💻 \ufeff\U0010ffff'
    data = ResponseStream(frame_of()).encode(Text(text))
    assert len(data.decode().splitlines()) == data.count(b"\n")
    events, end = streamed(Reasoning(text), Text(text), Finish())
    deltas = [event["delta"] for event in events if "delta" in event]
    assert deltas == [text, text]
    assert end["output"][1]["content"][0]["text"] == text


texts = st.text(
    st.one_of(st.characters(), st.sampled_from("\u2028\u2029\x85\ud800\n\r\"\\<'")),
    max_size=8,
)
speech = st.lists(st.one_of(st.builds(Text, texts), st.builds(Reasoning, texts)))
calls = st.lists(st.builds(ToolCall, texts, texts, texts), max_size=2)


@settings(max_examples=60)
@given(
    speech,
    calls,
    st.sampled_from(["stop", "length"]),
    st.lists(st.sampled_from(CITED)),
    st.booleans(),
)
def test_streamed_and_whole_response_agree(
    said: list[Union[Text, Reasoning]],
    called: list[ToolCall],
    reason: str,
    cited: list[JSONObject],
    in_order: bool,
) -> None:
    if in_order:  # reasoning first, as most models have it: the objects are equal
        said.sort(key=lambda part: isinstance(part, Text))
    parts: list[Part] = [*said, *called]
    parts += [Citations(tuple(cited)), Usage(5, 6), Finish(reason)]
    (_, last), once = streamed(*parts), whole(*parts)
    assert in_order <= (last == once)
    assert _told(last) == _told(once)


def _told(response: JSONObject) -> JSONObject:
    """Return a response without what differs when thoughts come in between."""
    thoughts = []
    rows = []
    for item in response["output"]:
        if item["type"] == "reasoning":
            thoughts.append(item["summary"][0]["text"])
        else:
            rows.append({**item, "id": ""})
    return {**response, "output": rows, "thoughts": "".join(thoughts)}


# Ids...


def test_ids_lead_back_to_where_they_belong() -> None:
    _, end = streamed(Reasoning("a"), Text("b"), ToolCall("c", "f", "{}"), Finish())
    place = Place("u", CONVERSATION, MESSAGE)
    ids = [end["id"], *(item["id"] for item in end["output"])]
    assert [open_place(SEALER, id_, "u") for id_ in ids] == [
        place,
        *[Place("u", CONVERSATION, MESSAGE, "0")] * 3,
    ]
    assert open_place(SEALER, end["id"], "") == place  # who asks may be unknown


def test_nothing_is_found_under_the_id_of_a_response_that_is_not_stored() -> None:
    ids = set()
    for fresh in ("1", "2"):
        frame = frame_of(request(store=False))
        frame = replace(frame, ids=IDS, fresh=fresh)
        ids |= {frame.id("resp_"), frame.id("msg_", 0), frame.id("msg_", 1)}
    assert len(ids) == 6
    assert {open_place(SEALER, id_, "") for id_ in ids} == {None}


def test_reasoning_that_is_not_stored_has_encrypted_content() -> None:
    """The AI SDK warns of each that has none, at each later turn."""
    parts = Reasoning("a"), Text("b"), Finish()
    for end in (streamed(*parts)[1], whole(*parts)):
        assert "encrypted_content" not in end["output"][0]
    body = request(store=False)
    for end in (streamed(*parts, body=body)[1], whole(*parts, body=body)):
        assert end["output"][0]["encrypted_content"]


def test_nothing_is_found_when_dify_has_no_message() -> None:
    frame = frame_of()
    ids = [frame.id("resp_"), frame.id("msg_", 0)]
    assert [open_place(SEALER, id_, "") for id_ in ids] == [None, None]


FIELDS = ("user@example.org", CONVERSATION, MESSAGE, "1")
ID = SEALER.seal("msg_", FIELDS)


@pytest.mark.parametrize(
    ("sealer", "id_"),
    [
        pytest.param(IdSealer("app-2"), ID, id="another-app"),
        pytest.param(IdSealer(KEY, "sk-2"), ID, id="another-client-key"),
        pytest.param(SEALER, IdSealer(KEY, "sk-2").seal("msg_", FIELDS), id="no-key"),
        pytest.param(SEALER, ID[:-1], id="cut"),
        pytest.param(SEALER, ID + "A", id="longer"),
        pytest.param(SEALER, ID + "=", id="padded"),
        pytest.param(SEALER, ID + "\n", id="newline"),
        pytest.param(SEALER, "rs_" + ID[4:], id="another-kind"),
        pytest.param(SEALER, ID[:9] + "." + ID[9:], id="dot"),
        pytest.param(SEALER, "msg_", id="empty"),
        pytest.param(SEALER, "", id="nothing"),
        pytest.param(SEALER, "msg_abc", id="short"),
        pytest.param(SEALER, "msg_" + "A" * 200, id="zeros"),
        pytest.param(SEALER, "msg_" + "x" * 100_001, id="long"),
        pytest.param(SEALER, "msg_é\ud800", id="not-ascii"),
        pytest.param(SEALER, "resp_67ccd2bed1ec8190b14f964abc0542670bb6", id="openai"),
    ],
)
def test_foreign_id_is_nothing(sealer: IdSealer, id_: str) -> None:
    assert open_place(sealer, id_, "") is None
    assert sealer.open(id_, "msg_") is None


def test_id_is_no_good_for_another_user() -> None:
    assert open_place(SEALER, ID, "someone else") is None
    assert open_place(SEALER, ID, FIELDS[0]) == Place(*FIELDS)


@pytest.mark.parametrize("at", range(4, len(ID)))
def test_id_with_one_sign_changed_is_nothing(at: int) -> None:
    forged = ID[:at] + ("A" if ID[at] != "A" else "B") + ID[at + 1 :]
    assert SEALER.open(forged, "msg_") is None


def test_id_is_what_it_was_in_earlier_releases() -> None:
    """An id never expires, and both keys that make it come from the app's."""
    before = (
        "msg_TdZxIrUnNVUwMghyobLr46C-n1lCiG5kfVM9tS7U0Oeu_B-TqyXei0lm0S5JWHhDZUDZYMkIoK"
        "8wN2LtlmX9QEV1TxCVfHTZONQ"
    )
    assert IdSealer(KEY, "sk-1").seal("msg_", FIELDS) == before


def test_id_is_short_url_safe_and_does_not_tell() -> None:
    long = SEALER.seal("resp_", ("u" * 200, CONVERSATION, MESSAGE, ""))
    assert len(ID) < 120
    assert len(long) < 400
    for id_ in (ID, long):
        assert set(id_) <= {*string.ascii_letters, *string.digits, *"-_"}
    sealed = base64.urlsafe_b64decode(ID[4:] + "=" * (-len(ID[4:]) % 4))
    assert b"user" not in sealed
    assert b"example" not in sealed


any_text = st.text(
    st.one_of(st.characters(), st.characters(categories=["Cs"])), max_size=40
)
field_texts = st.one_of(
    *(any_text, st.uuids().map(str), st.just("0:"), st.just("u")),
    *(st.uuids().map(form.format) for form in ("{}0", "{}-ab", "u{}")),
)


@given(st.lists(field_texts, max_size=5).map(tuple), any_text, any_text)
def test_any_fields_come_back(fields: tuple[str, ...], nonce: str, bound: str) -> None:
    sealer, other = IdSealer(KEY, bound), IdSealer(KEY, bound)
    id_ = sealer.seal("resp_", fields, nonce)
    assert id_ == other.seal("resp_", fields, nonce)
    assert other.open(id_, "resp_") == fields
    assert sealer.seal("resp_", fields, nonce + "x") != id_
    assert IdSealer(KEY, bound + "x").open(id_, "resp_") is None


@given(
    st.lists(field_texts, max_size=4).map(tuple),
    st.lists(field_texts, max_size=4).map(tuple),
)
def test_ids_are_equal_exactly_when_the_fields_are(
    some: tuple[str, ...], others: tuple[str, ...]
) -> None:
    same = SEALER.seal("resp_", some) == SEALER.seal("resp_", others)
    assert same == (some == others)


@given(any_text)
def test_no_text_is_an_id(text: str) -> None:
    assert SEALER.open(text, "resp_") is None
    assert SEALER.open("resp_" + text, "resp_") is None
    assert open_place(SEALER, text, "") is None


# What Dify has stored, lists...

ROW: JSONObject = {
    "id": MESSAGE,
    "conversation_id": CONVERSATION,
    "inputs": {},
    "query": "What is it?",
    "answer": "<think>\nHm\n</think>\n\nA cat.",
    "message_files": [
        {
            "belongs_to": "user",
            "type": "image",
            "filename": "a.png",
            "mime_type": "image/png",
            "url": "http://x/a.png",
        },
        {"belongs_to": "assistant", "type": "image", "url": "/files/b.png?sign=1"},
        {"belongs_to": "user", "type": None, "url": None},
    ],
    "retriever_resources": [URL],
    "message_tokens": 3,
    "answer_tokens": 4,
    "status": "normal",
    "error": None,
    "created_at": 1795419289,
}


def test_stored_turn() -> None:
    turn = stored_turn(ROW, APP)
    assert (turn.conversation_id, turn.message_id) == (CONVERSATION, MESSAGE)
    assert turn.created == 1795419289
    image = Attachment("a.png", "image/png", url="http://x/a.png")
    assert turn.question == Message("user", "What is it?", attachments=(image,))
    assert turn.parts == [
        Reasoning("Hm"),
        Text("A cat."),
        Media("image", "http://dify/files/b.png?sign=1", "b.png"),
        Citations((URL,)),
        Usage(3, 4),
        Finish(),
    ]


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("/files/x/file-preview?sign=1", "http://dify/files/x/file-preview?sign=1"),
        ("https://h/a.png", "https://h/a.png"),
        ("http://[", "http://["),
    ],
)
def test_stored_file_of_the_user_has_a_whole_url(url: str, wanted: str) -> None:
    files = [{"belongs_to": "user", "type": "image", "url": url}]
    turn = stored_turn({**ROW, "message_files": files}, APP)
    assert [file.url for file in turn.question.attachments] == [wanted]


def test_stored_upload_is_named_by_its_upload() -> None:
    upload = "7bee7308-8ba2-4781-955a-f98e5e3f6fbb"
    file = {"type": "image", "filename": "a.png", "belongs_to": "user"}
    files = [{**file, "url": f"/files/{upload}/file-preview?timestamp=1&sign=2"}]
    turn = stored_turn({**ROW, "message_files": files}, APP)
    (found,) = turn.question.attachments
    assert found.upload_id == upload and found.url.startswith("http://dify/files/")
    uploads = {"enabled": True, "allowed_file_upload_methods": ["local_file"]}
    check_files(AppForm(uploads=uploads), [found], {})


def test_stored_turn_of_an_old_release() -> None:
    row = {"id": "m", "conversation_id": "c", "query": "q", "answer": "a"}
    turn = stored_turn(row, APP)
    assert turn.question == Message("user", "q")
    assert turn.parts == [Text("a"), Usage(), Finish()]


def test_stored_turn_that_failed() -> None:
    row = {**ROW, "answer": "A", "status": "error", "error": "no model"}
    *text, failure = stored_turn(row, APP).parts
    assert text == [Text("A")]
    assert isinstance(failure, Failure)
    assert "no model" in failure.error.message


def test_stored_response_is_the_same_as_when_it_was_streamed() -> None:
    """Ids too: what a client remembers of a stream it finds again."""
    parts = (Reasoning("Hm"), Text("A cat."), Citations((URL,)), Usage(3, 4), Finish())
    _, end = streamed(*parts)
    turn = stored_turn({**ROW, "message_files": []}, APP)
    assert whole(*turn.parts) == end


def test_stored_call_of_arguments_alone_is_read_as_it_was() -> None:
    """Whatever other tools the client has by then."""
    city = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools = [Tool(name, "", city) for name in ("get_weather", "get_time")]
    words = describe_tools(tools[:1], "required")
    row = {**ROW, "query": f"{words}\n\nHi", "answer": '{"city": "Oslo"}'}
    (call,) = stored_turn(row, APP).answer(tools).calls
    assert (call.name, call.arguments) == ("get_weather", row["answer"])
    row["query"] = "Hi"
    assert stored_turn(row, APP).answer(tools[:1]).calls == []


def test_failed_response_as_an_object() -> None:
    answer = Answer()
    answer.add([Text("A")])
    value = frame_of().whole([answer], {}, error=UpstreamFailed("x"))
    validate("Response", value)
    assert (value["status"], value["error"]["code"]) == ("failed", "server_error")


def test_question_as_an_item() -> None:
    question = Message(
        "user",
        "Hi",
        attachments=(
            Attachment("a.png", "image/png", url="http://x/a.png"),
            Attachment("b.pdf", "application/pdf", url="http://x/b.pdf"),
        ),
    )
    value = input_item("msg_1", question)
    validate("ItemResource", value)
    assert value == {
        "id": "msg_1",
        "type": "message",
        "status": "completed",
        "role": "user",
        "content": [
            {"type": "input_text", "text": "Hi"},
            {"type": "input_image", "image_url": "http://x/a.png", "detail": "auto"},
            {"type": "input_file", "filename": "b.pdf", "file_url": "http://x/b.pdf"},
        ],
    }


ITEMS = [input_item(f"msg_{number}", HI) for number in range(101)]


@pytest.mark.parametrize(
    ("query", "numbers", "has_more"),
    [
        ({}, range(100, 80, -1), True),
        ({"order": "desc", "limit": "2"}, [100, 99], True),
        ({"order": "asc", "limit": "2"}, [0, 1], True),
        ({"order": "asc", "limit": "100"}, range(100), True),
        ({"order": "asc", "limit": "9000"}, range(100), True),
        ({"order": "asc", "limit": "0"}, [0], True),
        ({"order": "asc", "after": "msg_80"}, range(81, 101), False),
        ({"order": "desc", "after": "msg_2"}, [1, 0], False),
        ({"after": "msg_0"}, [], False),
        ({"after": "msg_unknown"}, [], False),
    ],
)
def test_page_of_a_list(query: dict[str, str], numbers: Any, has_more: bool) -> None:
    value = list_page(ITEMS, query)
    validate("ResponseItemList", value)
    ids = [f"msg_{number}" for number in numbers]
    assert [item["id"] for item in value["data"]] == ids
    ends = (ids[0], ids[-1]) if ids else ("", "")
    assert (value["first_id"], value["last_id"]) == ends
    assert value["has_more"] == has_more


def test_limit_that_is_no_number() -> None:
    with pytest.raises(BadRequest) as caught:
        list_page(ITEMS, {"limit": "all"})
    assert caught.value.param == "limit"


def test_conversation_objects() -> None:
    assert conversation_object("conv_1", 5, {"a": "b", "c": 1}) == {
        "id": "conv_1",
        "object": "conversation",
        "created_at": 5,
        "metadata": {"a": "b"},
    }
    assert [deleted_object(id_)["object"] for id_ in ("conv_1", "resp_1")] == [
        "conversation.deleted",
        "response",
    ]
    assert deleted_object("resp_1") == {
        "id": "resp_1",
        "object": "response",
        "deleted": True,
    }


# The checker of streams...

GOOD, _ = streamed(
    Reasoning("a"),
    Text("b"),
    Reasoning("c"),
    Text("d"),
    ToolCall("c", "f", "{}"),
    Citations((URL,)),
    Finish(),
)


@pytest.mark.parametrize("number", range(len(GOOD)))
def test_checker_misses_each_event(number: int) -> None:
    rest = GOOD[:number] + GOOD[number + 1 :]
    with pytest.raises(AssertionError):
        check_responses_stream(_renumbered(rest))


@pytest.mark.parametrize("number", range(len(GOOD) - 1))
def test_checker_notices_two_events_exchanged(number: int) -> None:
    first, second = GOOD[number : number + 2]
    if first["type"] == second["type"]:
        return
    rows = [*GOOD[:number], second, first, *GOOD[number + 2 :]]
    with pytest.raises(AssertionError):
        check_responses_stream(_renumbered(rows))


def test_checker_notices_wrong_numbers() -> None:
    with pytest.raises(AssertionError, match="expected 0"):
        check_responses_stream([{**row, "sequence_number": 1} for row in GOOD])


def _renumbered(events: list[JSONObject]) -> list[JSONObject]:
    return [{**row, "sequence_number": at} for at, row in enumerate(events)]
