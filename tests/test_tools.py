"""What OpenAI's fields are worth on a Dify app, through the whole proxy.

Tools, output formats, stops, several choices, legacy completions: each is asked of a
fake Dify in words, and its scripted answers are read back. The last table has one row
for every field of a chat request.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple

import fake_dify as fake
import pytest
from clock import now
from fake_dify import Hang, Sleep, Wait
from schemas import FILE, check_chat_stream, validate
from test_handlers import HI, KEY, MODES, Got, Proxy, answer, form_of, proxy
from work import at_most

import opendify
from opendify import (
    MAX_CHOICES,
    Message,
    ToolCall,
    call_ids,
    in_rounds,
    with_tool_names,
)

JSONObject = dict[str, Any]
WHOLE_OR_STREAMED = pytest.mark.parametrize(
    "stream", [False, True], ids=["whole", "streamed"]
)


# ------------------------------------------------------------------------------
# Answers, and what clients get of them
# ------------------------------------------------------------------------------


class Choice(NamedTuple):
    """One choice of an answer, the same whether it was streamed or not."""

    text: str
    calls: list[tuple[str, Any]]  # (name, arguments)
    finish: str | None


def function(name: str, *properties: str) -> JSONObject:
    """Return a function of strings."""
    strings = {name: {"type": "string"} for name in properties}
    schema = {"type": "object", "properties": strings, "required": list(properties)}
    return {"name": name, "description": f"It can {name}.", "parameters": schema}


def tool(name: str, *properties: str) -> JSONObject:
    """Return a tool as a request describes it."""
    return {"type": "function", "function": function(name, *properties)}


def called(name: str = "get_weather", /, **arguments: str) -> str:
    """Return a call as the app is asked to write it."""
    call = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{call}\n</tool_call>"


TOOLS = [tool("get_weather", "city"), tool("get_time", "zone")]
OSLO = called(city="Oslo")
OSLO_CALL = Choice("", [("get_weather", {"city": "Oslo"})], "tool_calls")


def pieces_of(text: str, size: int = 5) -> list[str]:
    """Return a text in small pieces."""
    return [text[at : at + size] for at in range(0, len(text), size)]


def says(*texts: str) -> fake.Script:
    """Return a script: the turns of an app say these texts, one after another."""
    left = list(texts)
    return lambda _: fake.chat_answer(*pieces_of(left.pop(0)))


END = {"event": "message_end", "metadata": {"usage": fake.usage_of(14, 8)}}


def at_once(text: str, *ends: JSONObject) -> list[fake.Step]:
    """Return an answer whose events come in one read."""
    ids = {"task_id": "t", "message_id": "m", "conversation_id": "c"}
    events: list[JSONObject] = [{"event": "message", "answer": text}, *(ends or [END])]
    data = b"".join(fake.encode_event({**event, **ids}) for event in events)
    return [fake.Send(data)]


def choices_of(got: Got, *, include_usage: bool = False) -> list[Choice]:
    """Return the choices of an answer, after checking that it is a valid one."""
    if got.headers["content-type"] == "application/json":
        assert got.status == 200, got.body
        validate("CreateChatCompletionResponse", got.json)
        rows = got.json["choices"]
        assert [row["index"] for row in rows] == list(range(len(rows)))
        return [_choice([row["message"]], row["finish_reason"]) for row in rows]
    check_chat_stream(got.chunks, include_usage=include_usage)
    rows = [row for chunk in got.chunks for row in chunk["choices"]]
    choices = []
    for index in sorted({row["index"] for row in rows}):
        mine = [row for row in rows if row["index"] == index]
        deltas = [row["delta"] for row in mine]
        choices.append(_choice(deltas, mine[-1]["finish_reason"]))
    return choices


def _choice(deltas: Sequence[JSONObject], finish: str | None) -> Choice:
    """Put a choice together from its deltas; a whole message is but one."""
    text = "".join(delta.get("content") or "" for delta in deltas)
    calls: dict[int, list[str]] = {}
    for delta in deltas:
        legacy = [delta["function_call"]] if "function_call" in delta else []
        rows = [row.get("function", {}) for row in delta.get("tool_calls", [])] + legacy
        places = [row.get("index") for row in delta.get("tool_calls", [])]
        for number, row in enumerate(rows):
            place = (places[number : number + 1] or [0])[0]
            call = calls.setdefault(number if place is None else place, ["", ""])
            call[0] += row.get("name", "")
            call[1] += row.get("arguments", "")
    parsed = [(name, json.loads(text or "{}")) for name, text in calls.values()]
    return Choice(text, parsed, finish)


def with_system(words: str, text: str) -> str:
    """Return the query of a conversation's first turn with words for the app."""
    return f'<message role="system">\n{words}\n</message>\n\n{text}'


def query(served: Proxy, turn: int = -1) -> str:
    """Return what the app was asked in a turn."""
    return str(served.turns[turn].json["query"])


def expect_refusal(got: Got, served: Proxy, param: str, code: str | None) -> None:
    """Check that a request was refused, and that Dify never saw it."""
    assert (got.status, got.error["type"]) == (400, "invalid_request_error")
    assert (got.error["param"], got.error["code"]) == (param, code)
    assert served.turns == []


# ------------------------------------------------------------------------------
# Tools
# ------------------------------------------------------------------------------

AUTO = "If you need no tool, answer as usual, without such a block."
MUST = "This time you must call a tool: write nothing but the blocks."
REQUIRED = f"{AUTO} {MUST}"
NONE = "Write no <tool_call> block this time: answer without one."


SEVERAL, ONE = (
    "For several calls write several blocks. Stop after the last one: the results come "
    "in the next message.",
    "Write one block only. Stop after it: the result comes in the next message.",
)


def words_about(
    tools: Sequence[JSONObject], rule: str = AUTO, number: str = SEVERAL
) -> str:
    """Return what the app is told about tools, as the README has it."""
    rows = [
        json.dumps({key: row["function"][key] for key in row["function"]})
        for row in tools
    ]
    lines = "\n".join(rows)
    return f"""\
You can call the tools below. They are run for you: you only write the call.

<tools>
{lines}
</tools>

To call a tool, write a block like this, with the tool's name and its arguments, a \
JSON object that fits the tool's parameters:

<tool_call>
{{"name": "<name>", "arguments": {{<arguments>}}}}
</tool_call>

{number} Never make up a result, and call no tool that is not listed. {rule}"""


TWICE = Choice(
    "", [*OSLO_CALL.calls, ("get_time", {"zone": "Europe/Oslo"})], "tool_calls"
)


@WHOLE_OR_STREAMED
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("It is sunny.", Choice("It is sunny.", [], "stop"), id="text"),
        pytest.param(OSLO, OSLO_CALL, id="call"),
        pytest.param(
            f"I'll look.\n\n{OSLO}",
            OSLO_CALL._replace(text="I'll look.\n\n"),
            id="text-and-call",
        ),
        pytest.param(
            f"{OSLO}\n{called('get_time', zone='Europe/Oslo')}\n", TWICE, id="two-calls"
        ),
        pytest.param(
            '```json\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n```',
            OSLO_CALL,
            id="fenced",
        ),
        pytest.param(
            '{"tool": "get_weather", "args": "{\'city\': \'Oslo\',}"}',
            OSLO_CALL,
            id="sloppy",
        ),
        pytest.param(
            called("get_rain", city="Oslo"),
            Choice(called("get_rain", city="Oslo"), [], "stop"),
            id="unknown-tool",
        ),
        pytest.param(
            f"Write `{OSLO}` to call it.",
            Choice(f"Write `{OSLO}` to call it.", [], "stop"),
            id="quoted",
        ),
    ],
)
async def test_answer_with_tools(text: str, expected: Choice, stream: bool) -> None:
    async with proxy(says(text)) as served:
        got = await served.chat(tools=TOOLS, stream=stream)
    assert choices_of(got) == [expected]
    assert query(served) == with_system(words_about(TOOLS), "Hi")


async def test_call_has_the_shape_that_clients_read() -> None:
    async with proxy(says(f"{OSLO}\n{OSLO}", f"{OSLO}\n{OSLO}")) as served:
        whole = await served.chat(tools=TOOLS)
        got = await served.chat(tools=TOOLS, stream=True)
    assert whole.message["content"] is None
    first, second = whole.message["tool_calls"]
    assert first == {
        "id": first["id"],
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
    }
    assert first["id"].startswith("call_") and second["id"] != first["id"]
    assert len(first["id"]) <= 64
    deltas = [
        row
        for chunk in got.chunks
        for row in chunk["choices"][0]["delta"].get("tool_calls", [])
    ]
    opening, given = deltas[:2]
    assert opening == {
        "index": 0,
        "id": opening["id"],
        "type": "function",
        "function": {"name": "get_weather", "arguments": ""},
    }
    assert given == {"index": 0, "function": {"arguments": '{"city": "Oslo"}'}}
    assert [row["index"] for row in deltas] == [0, 0, 1, 1]


@pytest.mark.parametrize("mode", MODES)
@WHOLE_OR_STREAMED
async def test_tools_work_with_every_mode(mode: str, stream: bool) -> None:
    script = answer(mode, *pieces_of(OSLO))
    async with proxy(script, mode=mode, parameters=form_of(mode)) as served:
        got = await served.chat(tools=TOOLS, stream=stream)
    assert choices_of(got) == [OSLO_CALL]
    body = served.turns[0].json
    asked = body.get("query") or body["inputs"]["query"]
    assert asked == with_system(words_about(TOOLS), "Hi")


NAMED = {"type": "function", "function": {"name": "get_weather"}}


def allowed(mode: str, *names: str) -> JSONObject:
    """Return a choice among some of the tools."""
    rows = [{"type": "function", "function": {"name": name}} for name in names]
    allowed_tools = {"mode": mode, "tools": rows}
    return {"type": "allowed_tools", "allowed_tools": allowed_tools}


@WHOLE_OR_STREAMED
@pytest.mark.parametrize(
    ("choice", "words"),
    [
        pytest.param(None, words_about(TOOLS), id="null"),
        pytest.param("auto", words_about(TOOLS), id="auto"),
        pytest.param("required", words_about(TOOLS, REQUIRED), id="required"),
        pytest.param(NAMED, words_about(TOOLS[:1], REQUIRED), id="named"),
        pytest.param(
            allowed("auto", "get_weather"), words_about(TOOLS[:1]), id="allowed-auto"
        ),
        pytest.param(
            allowed("required", "get_weather", "get_time"),
            words_about(TOOLS, REQUIRED),
            id="allowed-required",
        ),
    ],
)
async def test_choice_of_a_tool(choice: Any, words: str, stream: bool) -> None:
    async with proxy(says(OSLO)) as served:
        got = await served.chat(tools=TOOLS, tool_choice=choice, stream=stream)
    assert choices_of(got) == [OSLO_CALL]
    assert query(served) == with_system(words, "Hi")


@WHOLE_OR_STREAMED
async def test_no_tool_is_called_when_none_is_to_be(stream: bool) -> None:
    async with proxy(says(OSLO)) as served:
        got = await served.chat(tools=TOOLS, tool_choice="none", stream=stream)
    assert choices_of(got) == [Choice(OSLO, [], "stop")]
    assert query(served) == with_system(NONE, "Hi")


@WHOLE_OR_STREAMED
async def test_tool_that_is_not_allowed_is_not_called(stream: bool) -> None:
    choice = allowed("auto", "get_time")
    async with proxy(says(OSLO)) as served:
        got = await served.chat(tools=TOOLS, tool_choice=choice, stream=stream)
    assert choices_of(got) == [Choice(OSLO, [], "stop")]


async def test_system_text_comes_before_the_words() -> None:
    messages = [{"role": "system", "content": "Be kind."}, *HI]
    async with proxy(says(OSLO)) as served:
        await served.chat(tools=TOOLS, messages=messages)
    assert query(served) == with_system(f"Be kind.\n\n{words_about(TOOLS)}", "Hi")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tools": [], "tool_choice": NAMED}, "tool_choice", "invalid_value"),
        (
            {"tools": TOOLS[1:], "tool_choice": NAMED},  # another tool
            "tool_choice",
            "invalid_value",
        ),
        (
            {"tools": TOOLS, "tool_choice": allowed("required", "get_rain")},
            "tool_choice",
            "invalid_value",
        ),
        ({"tools": "get_weather"}, "tools", "invalid_type"),
        (
            {"functions": [], "function_call": {"name": "f"}},
            "function_call",
            "invalid_value",
        ),
    ],
)
async def test_choice_that_can_not_be_met_is_refused(
    fields: JSONObject, param: str, code: str
) -> None:
    async with proxy() as served:
        expect_refusal(await served.chat(**fields), served, param, code)


async def test_tools_of_other_types_are_ignored() -> None:
    """Codex and Open WebUI send some; to refuse them would break those clients."""
    others = [{"type": "web_search"}, {"type": "namespace", "name": "grep"}]
    async with proxy(says("Hello", "Hello")) as served:
        got = await served.chat(tools=others)
        await served.chat(tools=[*others, TOOLS[0]])
    assert choices_of(got) == [Choice("Hello", [], "stop")]
    assert query(served, 0) == "Hi"
    assert query(served, 1) == with_system(words_about(TOOLS[:1]), "Hi")


# Custom tools, that are called with a text...

GREP: JSONObject = {
    "type": "custom",
    "custom": {"name": "grep", "description": "Search."},
}
GREP_CALL = f"<tool_call>\n{json.dumps({'name': 'grep', 'input': 'a b'})}\n</tool_call>"


@WHOLE_OR_STREAMED
async def test_custom_tool_is_called_with_a_text(stream: bool) -> None:
    """Chunks of such calls are not in OpenAI's schema, but in its answers."""
    async with proxy(says(GREP_CALL, "Found."), memory=True) as served:
        got = await served.chat(tools=[GREP], stream=stream)
        if stream:
            deltas = [chunk["choices"][0]["delta"] for chunk in got.chunks]
            first, second = (row["tool_calls"] for row in deltas if "tool_calls" in row)
            call, rest = first[0], second[0]
            assert (call.pop("index"), rest["index"]) == (0, 0)
            assert call["custom"]["input"] == ""
            call["custom"]["input"] += rest["custom"]["input"]
            finish = got.chunks[-1]["choices"][0]["finish_reason"]
        else:
            assert choices_of(got)[0].finish == "tool_calls"
            (call,), finish = got.message["tool_calls"], "tool_calls"
        answer = {"role": "assistant", "content": None, "tool_calls": [call]}
        messages = [*HI, answer, result_of(call, "3 lines")]
        await served.chat(tools=[GREP], messages=messages)
    custom = {"name": "grep", "input": "a b"}
    assert call == {"id": call["id"], "type": "custom", "custom": custom}
    assert finish == "tool_calls"
    text = {"type": "string"}
    schema = {"type": "object", "properties": {"input": text}, "required": ["input"]}
    told = {"function": {"type": "custom", **GREP["custom"], "parameters": schema}}
    assert query(served, 0) == with_system(words_about([told]), "Hi")
    assert query(served, 1) == '<message role="tool" name="grep">\n3 lines\n</message>'


# Functions, the legacy form...

FUNCTIONS = [row["function"] for row in TOOLS]


@WHOLE_OR_STREAMED
@pytest.mark.parametrize(
    ("choice", "words", "text"),
    [
        (None, words_about(TOOLS, AUTO, ONE), "Well.\n"),
        ("auto", words_about(TOOLS, AUTO, ONE), "Well.\n"),
        ({"name": "get_weather"}, words_about(TOOLS[:1], REQUIRED, ONE), ""),
    ],
)
async def test_function_is_called(
    choice: Any, words: str, text: str, stream: bool
) -> None:
    async with proxy(says(f"Well.\n{OSLO}")) as served:
        fields: JSONObject = {"functions": FUNCTIONS, "function_call": choice}
        got = await served.chat(stream=stream, **fields)
    expected = OSLO_CALL._replace(text=text, finish="function_call")
    assert choices_of(got) == [expected]
    assert query(served) == with_system(words, "Hi")
    if stream:
        deltas = [chunk["choices"][0]["delta"] for chunk in got.chunks]
        assert [row["function_call"] for row in deltas if "function_call" in row] == [
            {"name": "get_weather", "arguments": ""},
            {"arguments": '{"city": "Oslo"}'},
        ]
    else:
        call = {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
        assert got.message["function_call"] == call
    assert b"tool_calls" not in got.body


@WHOLE_OR_STREAMED
async def test_legacy_function_is_no_custom_tool(stream: bool) -> None:
    """Not even one that says so: a `function_call` has no other form."""
    functions = [{**row, "type": "custom"} for row in FUNCTIONS]
    async with proxy(says(OSLO)) as served:
        got = await served.chat(functions=functions, stream=stream)
    assert choices_of(got) == [OSLO_CALL._replace(finish="function_call")]
    assert query(served) == with_system(words_about(TOOLS, AUTO, ONE), "Hi")


async def test_function_is_not_called_when_none_is_to_be() -> None:
    async with proxy(says(OSLO)) as served:
        got = await served.chat(functions=FUNCTIONS, function_call="none")
    assert choices_of(got) == [Choice(OSLO, [], "stop")]
    assert query(served) == with_system(NONE, "Hi")


@WHOLE_OR_STREAMED
async def test_legacy_clients_get_the_first_of_several_calls(stream: bool) -> None:
    text = f"{OSLO}\n{called('get_time', zone='Europe/Oslo')}"
    async with proxy(says(text)) as served:
        got = await served.chat(functions=FUNCTIONS, stream=stream)
    assert choices_of(got) == [OSLO_CALL._replace(finish="function_call")]


# The results, in the next turn...


def history_of(message: JSONObject, *results: JSONObject) -> list[JSONObject]:
    """Return the messages of the turn after a call."""
    return [*HI, {"role": "assistant", **message}, *results]


def result_of(call: JSONObject, text: str) -> JSONObject:
    """Return what a tool gave back."""
    return {"role": "tool", "tool_call_id": call["id"], "content": text}


CALLED = {
    "content": None,
    "tool_calls": [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
        }
    ],
}
SUNNY = '<message role="tool" name="get_weather">\nSunny\n</message>'


async def call_once(served: Proxy, stream: bool) -> JSONObject:
    """Return the message of a turn in which a tool was called, as clients keep it."""
    got = await served.chat(tools=TOOLS, stream=stream)
    if not stream:
        return got.message
    calls: list[JSONObject] = []
    for chunk in got.chunks:
        for row in chunk["choices"][0]["delta"].get("tool_calls", []):
            if "id" in row:
                calls.append(json.loads(json.dumps(row)))
            else:
                calls[-1]["function"]["arguments"] += row["function"]["arguments"]
    return {"content": None, "tool_calls": calls}


@WHOLE_OR_STREAMED
async def test_result_continues_the_conversation(stream: bool) -> None:
    async with proxy(says(OSLO, "It is sunny.", "Yes."), memory=True) as served:
        message = await call_once(served, stream)
        messages = history_of(message, result_of(message["tool_calls"][0], "Sunny"))
        got = await served.chat(tools=TOOLS, messages=messages, stream=stream)
        more = [
            *messages,
            {"role": "assistant", "content": "It is sunny."},
            {"role": "user", "content": "Sure?"},
        ]
        await served.chat(tools=TOOLS, messages=more, stream=stream)
    assert choices_of(got) == [Choice("It is sunny.", [], "stop")]
    ids = [turn.json.get("conversation_id") for turn in served.turns]
    assert ids[1] == ids[2] == next(iter(served.dify.conversations))
    assert (query(served, 1), query(served, 2)) == (SUNNY, "Sure?")


@WHOLE_OR_STREAMED
async def test_client_that_keeps_no_text_beside_a_call_goes_on(stream: bool) -> None:
    async with proxy(says(f"Let me see.\n\n{OSLO}", "Sunny."), memory=True) as served:
        message = {**await call_once(served, stream), "content": None}
        messages = history_of(message, result_of(message["tool_calls"][0], "Sunny"))
        await served.chat(tools=TOOLS, messages=messages, stream=stream)
    assert len(served.dify.conversations) == 1
    assert query(served, 1) == SUNNY


async def test_results_of_several_calls_go_together() -> None:
    both = f"{OSLO}\n{called('get_time', zone='Europe/Oslo')}"
    async with proxy(says(both, "Sunny, noon."), memory=True) as served:
        message = await call_once(served, False)
        results = [
            result_of(call, text)
            for call, text in zip(message["tool_calls"], ["Sunny", "12:00"])
        ]
        await served.chat(tools=TOOLS, messages=history_of(message, *results))
    assert len(served.dify.conversations) == 1
    noon = '<message role="tool" name="get_time">\n12:00\n</message>'
    assert query(served) == f"{SUNNY}\n{noon}"


async def test_result_of_an_unknown_conversation_comes_with_its_history() -> None:
    message = {"role": "tool", "tool_call_id": "call_1", "content": "Sunny"}
    async with proxy(says("It is sunny.")) as served:
        await served.chat(tools=TOOLS, messages=history_of(CALLED, message))
    assert served.turns[0].json.get("conversation_id", "") == ""
    assert query(served) == (
        f"""\
The conversation so far:

<message role="system">
{words_about(TOOLS)}
</message>
<message role="user">
Hi
</message>
<message role="assistant">
{OSLO}
</message>
{SUNNY}

Write the assistant's next message."""
    )


async def test_result_of_a_function_comes_with_its_history() -> None:
    call = {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
    messages = history_of(
        {"content": None, "function_call": call},
        {"role": "function", "name": "get_weather", "content": "Sunny"},
    )
    async with proxy(says("It is sunny.")) as served:
        await served.chat(functions=FUNCTIONS, messages=messages)
    assert OSLO in query(served)
    assert f"{SUNNY}\n\nWrite the assistant's next message." in query(served)


async def test_calls_of_answers_without_ids_have_different_ones() -> None:
    """A conversation that has both could not tell what their results answer."""
    events: list[dict[str, Any]] = [{"event": "message", "answer": OSLO}, END]
    body = b"".join([fake.encode_event(event) for event in events])
    async with proxy([fake.Send(body)]) as served:
        calls = [(await served.chat(tools=TOOLS)).message for _ in range(2)]
    first, second = (call["tool_calls"][0]["id"] for call in calls)
    assert first != second


# A call that must be...

SECOND_TRY = (
    "Your last answer calls no tool, but it must. Call get_weather, get_time. "
    "Write the <tool_call> block and nothing else."
)


@WHOLE_OR_STREAMED
async def test_second_try_gives_the_call_that_was_required(stream: bool) -> None:
    async with proxy(says("It is sunny.", f"Sorry. {OSLO}")) as served:
        fields: JSONObject = {
            "tools": TOOLS,
            "tool_choice": "required",
            "stream": stream,
        }
        got = await served.chat(**fields)
    assert choices_of(got) == [OSLO_CALL]
    assert "It is sunny." in query(served) and len(served.turns) == 2
    assert query(served).endswith(f"Answer this message:\n\n{SECOND_TRY}")


@WHOLE_OR_STREAMED
async def test_call_that_a_stop_cuts_off_is_none(stream: bool) -> None:
    answers = [at_once(f"Let me see.\n\n{OSLO}"), at_once(OSLO)]
    async with proxy(lambda _: answers.pop(0)) as served:
        fields: JSONObject = {"tool_choice": "required", "stop": "\n\n"}
        got = await served.chat(tools=TOOLS, stream=stream, **fields)
    assert choices_of(got) == [OSLO_CALL] and len(served.turns) == 2


async def test_call_that_was_only_thought_of_is_none_beside_json() -> None:
    thought = f"I could write\n{OSLO}\nbut no.\n</think>\n\n"
    async with proxy(at_once(f"{thought}{GOOD}")) as served:
        got = await served.chat(tools=TOOLS, response_format=CITY)
    assert choices_of(got) == [Choice(GOOD, [], "stop")]


async def test_call_that_was_only_thought_of_is_none_where_one_is_required() -> None:
    thought = f"I could write\n{OSLO}\nbut no.\n</think>\n\n"
    answers = [at_once(f"{thought}It is sunny."), at_once(OSLO)]
    async with proxy(lambda _: answers.pop(0)) as served:
        got = await served.chat(tools=TOOLS, tool_choice="required")
    assert choices_of(got) == [OSLO_CALL] and len(served.turns) == 2


@WHOLE_OR_STREAMED
async def test_thoughts_before_a_required_call_leave_no_text(stream: bool) -> None:
    """Not the end of their tag either, whose beginning was missing."""
    async with proxy(at_once(f"They ask for Oslo.</think>{OSLO}")) as served:
        got = await served.chat(tools=TOOLS, tool_choice="required", stream=stream)
    assert choices_of(got) == [OSLO_CALL]


@WHOLE_OR_STREAMED
@pytest.mark.parametrize("stop", ["```", "\n\n", "}"])
async def test_stop_is_not_looked_for_where_json_is_wanted(
    stop: str, stream: bool
) -> None:
    async with proxy(at_once(f"Sure!\n\n```json\n{GOOD}\n```")) as served:
        got = await served.chat(response_format=CITY, stop=stop, stream=stream)
    assert choices_of(got) == [Choice(GOOD, [], "stop")] and len(served.turns) == 1


@WHOLE_OR_STREAMED
@pytest.mark.parametrize("kind", ["call", "json"])
async def test_usage_is_that_of_both_tries(kind: str, stream: bool) -> None:
    answers = [
        fake.chat_answer("No.", usage=(9, 2)),
        at_once({"call": OSLO, "json": GOOD}[kind]),
    ]
    fields: JSONObject = {"stream": stream, "stream_options": {"include_usage": True}}
    if kind == "call":
        fields.update(tools=TOOLS, tool_choice="required")
    else:
        fields.update(response_format=CITY)
    async with proxy(lambda _: answers.pop(0)) as served:
        got = await served.chat(**fields)
    usage = (got.chunks[-1] if stream else got.json)["usage"]
    counts = [usage[f"{name}_tokens"] for name in ("prompt", "completion", "total")]
    assert counts == [9 + 14, 2 + 8, 33]


@WHOLE_OR_STREAMED
async def test_second_try_has_nothing_of_the_first(stream: bool) -> None:
    texts = ["<think>One.</think>No.", f"<think>Two.</think>{OSLO}"]
    async with proxy(says(*texts)) as served:
        got = await served.chat(tools=TOOLS, tool_choice="required", stream=stream)
        first, second = served.dify.conversations
    assert choices_of(got) == [OSLO_CALL]
    assert b"Two." in got.body and b"One." not in got.body
    assert got.headers["x-dify-conversation-id"] == second != first


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": TOOLS[:1], "tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": NAMED},
        {"tools": TOOLS, "tool_choice": allowed("required", "get_weather")},
        {"functions": FUNCTIONS, "function_call": {"name": "get_weather"}},
    ],
    ids=["required", "named", "allowed", "function"],
)
@WHOLE_OR_STREAMED
async def test_call_that_is_never_made_is_an_error(
    fields: JSONObject, stream: bool
) -> None:
    other = called("get_rain")
    async with proxy(says("No.", other)) as served:
        got = await served.chat(stream=stream, **fields)
    assert (got.status, got.headers["x-should-retry"]) == (502, "false")
    assert got.error == {
        "message": "The app called no tool, although one was required. "
        "Call get_weather.",
        "type": "server_error",
        "param": "tool_choice",
        "code": "tool_choice_unsatisfied",
    }
    assert len(served.turns) == 2
    only = SECOND_TRY.replace(", get_time", "")
    assert query(served).endswith(f"Answer this message:\n\n{only}")


@WHOLE_OR_STREAMED
@pytest.mark.parametrize("kind", ["text", "json_object"])
async def test_text_beside_a_required_call_is_reasoning(
    kind: str, stream: bool
) -> None:
    """OpenAI's models say nothing there: some clients take any content for it all."""
    async with proxy(says(f"Sorry. {OSLO}\nDone.")) as served:
        fields: JSONObject = {"tools": TOOLS, "tool_choice": "required"}
        fields["response_format"] = {"type": kind}
        got = await served.chat(stream=stream, **fields)
    assert choices_of(got) == [OSLO_CALL]
    rows = [row for chunk in got.chunks for row in chunk["choices"]] if stream else []
    deltas = [row["delta"] for row in rows] if stream else [got.message]
    thoughts = "".join(delta.get("reasoning_content", "") for delta in deltas)
    assert thoughts == "Sorry. \nDone."


@WHOLE_OR_STREAMED
async def test_arguments_alone_are_the_call_that_is_required(stream: bool) -> None:
    text = '<think>{"city": "Rome"}?</think>Look:\n```json\n{"city": "Oslo"}\n```'
    async with proxy(says(text)) as served:
        got = await served.chat(tools=TOOLS, tool_choice=NAMED, stream=stream)
    assert choices_of(got) == [OSLO_CALL] and len(served.turns) == 1
    assert b"Rome" in got.body and b"Look" not in got.body


async def test_required_call_lets_go_of_the_answer_before_its_end() -> None:
    gate = asyncio.Event()
    script = [fake.message(f"Sorry. {OSLO}"), Wait(gate), *fake.chat_answer("Done.")]
    fields: JSONObject = {"tools": TOOLS, "tool_choice": "required"}
    async with proxy(script) as served:
        call = await served.begin(stream=True, **fields)
        await call.read_head()
        first = b""
        while b"Oslo" not in first:
            first += await call.read_piece()
        gate.set()
        got = await call.read_rest()
    assert b"Sorry. " in first and len(served.turns) == 1
    assert got.chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_call_that_is_never_made_ends_a_stream_that_has_begun() -> None:
    """Dify is so slow that the head had to go before it had said anything."""
    script = [Sleep(6), *fake.chat_answer("No.")]
    async with proxy(script) as served:
        got = await served.chat(tools=TOOLS, tool_choice="required", stream=True)
    assert (got.status, got.error["code"]) == (200, "tool_choice_unsatisfied")
    assert got.deltas == []


@WHOLE_OR_STREAMED
async def test_second_try_stays_in_the_conversation_that_was_named(
    stream: bool,
) -> None:
    """Its client sends no history: what came before is known to Dify alone."""
    async with proxy(says("Hello", "No.", OSLO), memory=True) as served:
        first = await served.chat()
        named = first.json["dify"]["conversation_id"]
        fields: JSONObject = {
            "tools": TOOLS,
            "tool_choice": "required",
            "stream": stream,
        }
        got = await served.chat(conversation_id=named, **fields)
    assert choices_of(got) == [OSLO_CALL]
    ids = [turn.json.get("conversation_id") for turn in served.turns]
    assert ids[1:] == [named, named]
    assert got.headers["x-dify-conversation-id"] == named


async def test_second_try_has_the_history_of_a_conversation_that_was_found() -> None:
    async with proxy(says("Hello", "No.", OSLO), memory=True) as served:
        messages = history_of((await served.chat()).message)
        fields: JSONObject = {"tools": TOOLS, "tool_choice": "required"}
        messages.append({"role": "user", "content": "Where?"})
        await served.chat(messages=messages, **fields)
    first, second, third = (turn.json.get("conversation_id") for turn in served.turns)
    assert (first, bool(second), third) == (None, True, None)
    said = re.findall(r"^(Hi|Hello|Where\?|No\.)$", query(served), re.MULTILINE)
    assert said == ["Hi", "Hello", "Where?", "No."]


async def test_second_try_repeats_nothing_where_a_response_is_followed() -> None:
    async with proxy(says("Hello", "No.", GOOD), memory=True) as served:

        async def respond(items: Any, **fields: Any) -> Got:
            body = {"model": "m", "input": items, **fields}
            call = await served.open("POST", "/v1/responses", body, {})
            return await call.read_rest()

        one = (await respond("Hi")).json["id"]
        items = [*history_of({"content": "Ho"}), {"role": "user", "content": "Where?"}]
        form = {"format": {"type": "json_object"}}
        got = await respond(items, previous_response_id=one, text=form)
        assert got.status == 200
    assert ["Ho" in query(served, turn) for turn in (1, 2)] == [True, False]


@pytest.mark.parametrize(
    ("mode", "question"),
    [("completion", "Where?"), ("chat", "### Task:\nWhere?")],
    ids=["no-memory", "side-request"],
)
async def test_second_try_beside_the_named_conversation_has_the_question(
    mode: str, question: str
) -> None:
    answers = [fake.DEFAULT_ANSWER[mode](text) for text in ("Oslo.", GOOD)]
    async with proxy(lambda _: answers.pop(0), mode=mode) as served:
        messages = [{"role": "user", "content": question}]
        fields: JSONObject = {"messages": messages, "response_format": CITY}
        got = await served.chat(conversation_id=str(uuid.UUID(int=1)), **fields)
    assert got.message["content"] == GOOD
    assert f">\n{question}\n<" in query(served)


async def test_conversation_goes_on_after_a_second_try() -> None:
    async with proxy(says("No.", OSLO, "It is sunny."), memory=True) as served:
        first = await served.chat(tools=TOOLS, tool_choice="required")
        result = result_of(first.message["tool_calls"][0], "Sunny")
        messages = history_of(first.message, result)
        got = await served.chat(tools=TOOLS, messages=messages)
    assert choices_of(got) == [Choice("It is sunny.", [], "stop")]
    assert OSLO in query(served) and SUNNY in query(served)


@pytest.mark.parametrize(
    ("said", "fields"),
    [
        pytest.param("No.", {"tools": TOOLS, "tool_choice": "required"}, id="no-call"),
        pytest.param("x" * 1001, {"stream": True}, id="too-long"),
    ],
)
async def test_conversation_of_an_answer_that_is_not_kept_is_left(
    said: str, fields: JSONObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dify remembers it; some clients go on as if the answer had been empty."""
    monkeypatch.setattr(opendify, "MAX_KEPT_CHARS", 1000)
    messages = [*history_of({"content": ""}), {"role": "user", "content": "Why?"}]
    async with proxy(says(*[said] * 3), memory=True) as served:
        await served.chat(**fields)
        await served.chat(messages=messages)
    assert "conversation_id" not in served.turns[-1].json


async def test_app_is_told_in_each_turn_that_it_must_call() -> None:
    async with proxy(says(*[OSLO] * 4), memory=True) as served:
        messages: list[JSONObject] = HI
        for choice in ("required", "required", "auto", "required"):
            fields: JSONObject = {"tools": TOOLS, "tool_choice": choice}
            got = (await served.chat(messages=messages, **fields)).message
            result = result_of(got["tool_calls"][0], "Sunny")
            messages = [*messages, {"role": "assistant", **got}, result]
    told = f'<message role="system">\n{MUST}\n</message>\n{SUNNY}'
    assert [query(served, turn) for turn in (1, 2, 3)] == [told, SUNNY, told]
    assert all(turn.json["conversation_id"] for turn in served.turns[1:])


async def test_call_that_the_client_does_not_take_is_forgotten() -> None:
    fields: JSONObject = {"tools": TOOLS, "parallel_tool_calls": False}
    async with proxy(says(OSLO + called(city="Rome"), "Dry."), memory=True) as served:
        first = (await served.chat(**fields)).message
        result = result_of(first["tool_calls"][0], "Sunny")
        await served.chat(messages=history_of(first, result), **fields)
    assert OSLO in query(served) and "Rome" not in query(served)
    assert "conversation_id" not in served.turns[-1].json


async def test_second_try_is_stopped_when_the_client_leaves() -> None:
    answers: list[list[fake.Step]] = [
        fake.chat_answer("No."),
        [fake.message("Well"), Hang()],
    ]
    async with proxy(lambda _: answers.pop(0)) as served:
        fields: JSONObject = {"tools": TOOLS, "tool_choice": "required"}
        call = await served.begin(stream=True, **fields)
        await served.dify.until(lambda: len(served.turns) == 2)
        await asyncio.sleep(1)
        await call.leave()
        await served.dify.until(lambda: not served.dify.running)
        await served.dify.until(lambda: not served.dify.open_connections)
    assert [row.effective for row in served.dify.stops] == [True]


async def test_app_that_fails_is_not_asked_once_more() -> None:
    async with proxy(FAILURE) as served:
        got = await served.chat(tools=TOOLS, tool_choice="required")
    assert (got.status, got.error["code"]) == (502, "completion_request_error")
    assert len(served.turns) == 1


# Where the words go...


@WHOLE_OR_STREAMED
async def test_words_are_an_input_of_the_app(stream: bool) -> None:
    async with proxy(says(OSLO), config={"tools": "inputs"}) as served:
        got = await served.chat(tools=TOOLS, inputs={"x": 1}, stream=stream)
    assert choices_of(got) == [OSLO_CALL]
    assert query(served) == "Hi"
    assert served.turns[0].json["inputs"] == {"x": 1, "tools": words_about(TOOLS)}


@WHOLE_OR_STREAMED
@pytest.mark.parametrize("choice", [None, "auto", "none"])
async def test_tools_are_switched_off(choice: Any, stream: bool) -> None:
    async with proxy(says(OSLO), config={"tools": "off"}) as served:
        got = await served.chat(tools=TOOLS, tool_choice=choice, stream=stream)
    assert choices_of(got) == [Choice(OSLO, [], "stop")]
    assert (query(served), served.turns[0].json["inputs"]) == ("Hi", {})


async def test_required_call_is_refused_when_tools_are_switched_off() -> None:
    async with proxy(config={"tools": "off"}) as served:
        got = await served.chat(tools=TOOLS, tool_choice="required")
        expect_refusal(got, served, "tool_choice", "unsupported_parameter")


# Text is not held back...


@pytest.mark.parametrize(
    "text",
    [
        "It is sunny in Oslo, and it will stay so.",
        "If x < 3 and y > 4, then [1] holds; see `f(x)`.",
        "在奥斯陆天气晴朗，明天也是。",
        "# Oslo\n\n- Sunny\n- 20 °C\n",
    ],
)
async def test_first_text_comes_no_later_with_tools(text: str) -> None:
    script = fake.chat_answer(*pieces_of(text, 3), delay=0.03)
    times = []
    for tools in (None, TOOLS):
        async with proxy(script) as served:
            loop = asyncio.get_running_loop()
            start = loop.time()
            call = await served.begin(tools=tools, stream=True)
            await call.read_text()
            times.append(loop.time() - start)
            await call.read_rest()
    assert times[1] == pytest.approx(times[0], abs=1e-9)


# ------------------------------------------------------------------------------
# Output formats
# ------------------------------------------------------------------------------

CITY_SCHEMA: JSONObject = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "size": {"type": "integer"},
        "kind": {"enum": ["town", "city"]},
        "twins": {"type": "array", "items": {"$ref": "#/$defs/Twin"}},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
    "$defs": {
        "Twin": {
            "type": "object",
            "properties": {"name": {"type": "string"}},
            "required": ["name"],
        }
    },
}
CITY = {
    "type": "json_schema",
    "json_schema": {"name": "city", "schema": CITY_SCHEMA, "strict": True},
}
OBJECT = {"type": "json_object"}
GOOD = '{"name": "Oslo", "size": 7, "twins": [{"name": "Bonn"}]}'
JSON_WORDS = (
    "Write your final answer as JSON and nothing else: one JSON object{name}, without "
    "an introduction, an explanation or a code fence."
)
CITY_WORDS = (
    f"{JSON_WORDS.format(name=' (city)')} It must be valid against this JSON Schema:"
    f"\n\n{json.dumps(CITY_SCHEMA)}"
)
WORDS_OF = {"json_object": JSON_WORDS.format(name=""), "json_schema": CITY_WORDS}


@WHOLE_OR_STREAMED
@pytest.mark.parametrize("output", [OBJECT, CITY], ids=["object", "schema"])
@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"```json\n{GOOD}\n```",
        f"Sure! Here is the JSON:\n\n```\n{GOOD}\n```\nLet me know.",
        f"{GOOD}\n\nThat is it.",
    ],
    ids=["bare", "fenced", "chatter", "remark"],
)
async def test_json_is_all_that_is_left(
    text: str, output: JSONObject, stream: bool
) -> None:
    async with proxy(says(text)) as served:
        got = await served.chat(response_format=output, stream=stream)
    assert choices_of(got) == [Choice(GOOD, [], "stop")]
    assert query(served) == with_system(WORDS_OF[output["type"]], "Hi")


@WHOLE_OR_STREAMED
async def test_json_is_not_looked_for_in_reasoning(stream: bool) -> None:
    """Some models leave out the opening tag."""
    thoughts = "Some {braces}."
    async with proxy(says(f"{thoughts}\n</think>\n\n{GOOD}")) as served:
        got = await served.chat(response_format=CITY, stream=stream)
    assert choices_of(got) == [Choice(GOOD, [], "stop")]
    assert len(served.turns) == 1


@WHOLE_OR_STREAMED
async def test_files_of_the_app_do_not_follow_json(stream: bool) -> None:
    file = {
        "type": "image",
        "url": "/files/a.png",
        "belongs_to": "assistant",
        "id": "f",
    }
    events = [fake.message(GOOD), fake.Send({"event": "message_file", **file})]
    async with proxy([*events, *fake.chat_answer("")]) as served:
        got = await served.chat(response_format=CITY, stream=stream)
    assert choices_of(got) == [Choice(GOOD, [], "stop")]


@WHOLE_OR_STREAMED
@pytest.mark.parametrize(
    "fields",
    [{"response_format": OBJECT}, {"tools": TOOLS, "tool_choice": "required"}],
    ids=["json", "call"],
)
async def test_withdrawn_answer_is_not_asked_for_again(
    fields: JSONObject, stream: bool
) -> None:
    replace = fake.Send({"event": "message_replace", "answer": "No."})
    script = [fake.message("Well"), replace, *fake.chat_answer("")]
    async with proxy(script) as served:
        got = await served.chat(**fields, stream=stream)
    assert choices_of(got)[0].finish == "content_filter"
    assert len(served.turns) == 1


@WHOLE_OR_STREAMED
@pytest.mark.parametrize(
    "schema",
    [{"type": "string"}, {"type": ["string", "null"]}, {"enum": ["Oslo"]}, {}],
    ids=str,
)
async def test_json_of_one_text_is_known_at_its_end(
    schema: JSONObject, stream: bool
) -> None:
    form = {"name": "n", "schema": schema}
    output = {"type": "json_schema", "json_schema": form}
    async with proxy(says('"Oslo"')) as served:
        got = await served.chat(response_format=output, stream=stream)
    assert choices_of(got) == [Choice('"Oslo"', [], "stop")]


@WHOLE_OR_STREAMED
async def test_text_is_asked_for_without_words(stream: bool) -> None:
    async with proxy(says(f"So: {GOOD}")) as served:
        got = await served.chat(response_format={"type": "text"}, stream=stream)
    assert choices_of(got) == [Choice(f"So: {GOOD}", [], "stop")]
    assert query(served) == "Hi"


SLOPPY = "{'name': 'Oslo', 'size': 7, 'twins': [],}"


async def test_json_is_streamed_as_soon_as_it_is_certain() -> None:
    gate = asyncio.Event()
    begin = fake.message(f"Sure: ```json\n{GOOD[:20]}")
    async with proxy([begin, Wait(gate), *fake.chat_answer(GOOD[20:], "```")]) as one:
        call = await one.begin(response_format=CITY, stream=True)
        first = await call.read_text()
        gate.set()
        got = await call.read_rest()
    assert GOOD.startswith(first)
    texts = "".join(
        str(c["choices"][0]["delta"].get("content", "")) for c in got.chunks
    )
    assert first + texts == GOOD


@WHOLE_OR_STREAMED
@pytest.mark.parametrize("text", [SLOPPY, SLOPPY.replace("'", '"')])
async def test_sloppy_json_is_mended(text: str, stream: bool) -> None:
    """That of a stream, too, while nothing of it was sent."""
    async with proxy(at_once(f"Here: {text}\nBye.")) as served:
        got = await served.chat(response_format=CITY, stream=stream)
    (choice,) = choices_of(got)
    assert json.loads(choice.text) == {"name": "Oslo", "size": 7, "twins": []}
    assert len(served.turns) == 1


async def test_streamed_text_that_was_taken_for_no_json_is_mended() -> None:
    script = fake.chat_answer("<think>hm</think>", *SLOPPY, delay=0.1)
    async with proxy(script) as served:
        got = await served.chat(response_format=CITY, stream=True)
    assert json.loads(choices_of(got)[0].text)["size"] == 7
    assert got.reasoning == "hm"


@WHOLE_OR_STREAMED
async def test_text_beside_a_call_is_no_json(stream: bool) -> None:
    """Clients parse every text that comes when they asked for JSON."""
    async with proxy(says(f"Let me look that up.\n{called(city='Oslo')}")) as served:
        got = await served.chat(response_format=CITY, tools=TOOLS, stream=stream)
    (choice,) = choices_of(got)
    assert choice == Choice("", [("get_weather", {"city": "Oslo"})], "tool_calls")
    assert len(served.turns) == 1


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("name", [{}, {"name": "f"}], ids=["by-id", "and-by-name"])
async def test_results_are_told_in_the_order_of_their_calls(
    order: int, name: JSONObject
) -> None:
    """Two calls of one tool: only the order tells the app which result is whose."""
    names = {"a": "first", "b": "second"}
    function = {"name": "f", "arguments": "{}"}
    calls = [{"id": id_, "type": "function", "function": function} for id_ in names]
    results = [
        {"role": "tool", "tool_call_id": id_, "content": text, **name}
        for id_, text in names.items()
    ]
    messages: Any = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        *results[::order],
    ]
    async with proxy() as served:
        await served.chat(messages=messages)
    told = re.findall(r'name="(\w+)">\n(\w+)', query(served))
    assert told == [("f", "first"), ("f", "second")]


async def test_functions_beside_tools_change_nothing() -> None:
    async with proxy(says(OSLO + OSLO)) as served:
        got = await served.chat(tools=TOOLS, functions=FUNCTIONS)
    assert len(got.message["tool_calls"]) == 2
    assert query(served) == with_system(words_about(TOOLS), "Hi")


@pytest.mark.parametrize(
    "shown", ["as one answer's", "each by itself", "behind their text"]
)
async def test_conversation_goes_on_however_its_calls_are_shown(shown: str) -> None:
    """Mastra puts those of several answers together, multi-llm-ts takes them apart.

    Pipecat parts them from the text before them, too.
    """
    async with proxy(says(OSLO, OSLO + OSLO, "Dry."), memory=True) as served:
        first = (await served.chat(tools=TOOLS)).message
        results = [result_of(first["tool_calls"][0], "Sunny")]
        messages = history_of(first, *results)
        second = (await served.chat(tools=TOOLS, messages=messages)).message
        results += [result_of(call, "Rain") for call in second["tool_calls"]]
        calls = [*first["tool_calls"], *second["tool_calls"]]
        answers: Any = [{"role": "assistant", "tool_calls": [call]} for call in calls]
        rows = [row for pair in zip(answers, results) for row in pair]
        if shown == "as one answer's":
            rows = [{"role": "assistant", "tool_calls": calls}, *results]
        if shown == "behind their text":
            text = {"role": "assistant", "content": "I'll look."}
            rows = [text, *rows[:2], text, *rows[2:]]
        await served.chat(tools=TOOLS, messages=[*HI, *rows])
    rain = SUNNY.replace("Sunny", "Rain")
    assert query(served) == f"{rain}\n{rain}"
    assert served.turns[-1].json["conversation_id"]


def test_calls_of_nobody_s_stay_as_they_are() -> None:
    def call(id_: str) -> Message:
        return Message("assistant", id_, tool_calls=(ToolCall(id_, "f", "{}"),))

    ours, other = itertools.islice(call_ids("m"), 2)
    result = Message("tool", "x", call_id=ours)
    for id_ in ("call_1", f"call_{'Z' * 24}_0", f"call_{'0' * 24}0"):
        rows = [call(ours), call(other), result, call(id_)]
        assert in_rounds(rows) == rows
    rows = [call(ours), Message("tool", "x", call_id=next(call_ids("n")))]
    assert in_rounds(rows) == rows


def test_calls_go_with_the_text_of_who_makes_them() -> None:
    call = Message("assistant", "", tool_calls=(ToolCall("1", "f", "{}"),))
    said = Message("assistant", "I look.", "Ada")
    mine, theirs = (call._replace(name=name) for name in ("Ada", "Bob"))
    spoken = Message("assistant", "", spoken_id="audio_1")
    assert in_rounds([said, mine]) == [mine._replace(text="I look.")]
    for rows in (
        [said, theirs],
        [said, mine._replace(text="Now.")],
        [Message("user", "Look."), call],
        [spoken, said._replace(name="")],
        [call, spoken],
        [call, spoken._replace(tool_calls=call.tool_calls)],
        [Message("assistant", ""), spoken],
    ):
        assert in_rounds(rows) == rows


def test_calls_that_are_shown_one_by_one_are_of_one_answer() -> None:
    """Before their results, and whoever made their ids."""
    both = tuple(ToolCall(id_, "f", "{}") for id_ in "12")
    rows = [Message("assistant", "", tool_calls=(call,)) for call in both]
    results = [Message("tool", "x", call_id=id_) for id_ in "12"]
    said = rows[0]._replace(tool_calls=both)
    assert in_rounds([*rows, *results]) == [said, *results]


def test_many_results_take_little_time() -> None:
    rows = []
    for number in map(str, range(8000)):
        rows.append(Message("assistant", "", tool_calls=(ToolCall(number, "f", ""),)))
        rows.append(Message("tool", "x", call_id=number))
    with at_most(80):
        assert {row.name for row in with_tool_names(rows)} == {"", "f"}


def test_ids_of_calls_may_return() -> None:
    """Some clients count them anew in each answer."""
    rows = []
    for name in ("f", "g"):
        rows.append(Message("assistant", "", tool_calls=(ToolCall("1", name, "{}"),)))
        rows.append(Message("tool", "x", call_id="1"))
    named = with_tool_names(rows)
    assert [row.name for row in named] == ["", "f", "", "g"]


def test_results_of_one_call_keep_their_order() -> None:
    call = Message("assistant", "", tool_calls=(ToolCall("1", "f", "{}"),))
    pairs = [("1", "b"), ("1", "a"), ("y", "d"), ("x", "c")]
    results = [Message("tool", text, call_id=id_) for id_, text in pairs]
    named = with_tool_names([call, *results])[1:]
    assert [row.text for row in named] == list("badc")


BAD_ANSWERS = {
    "text": ("I can't.", "it is not valid JSON"),
    "cut": ('{"name": "Oslo", "si', "it is not valid JSON"),
    "missing": ('{"name": "Oslo"}', "$ breaks required"),
    "type": ('{"name": "Oslo", "size": "7"}', "$.size"),
    "enum": ('{"name": "Oslo", "size": 7, "kind": "village"}', "$.kind"),
    "nested": (
        '{"name": "Oslo", "size": 7, "twins": [{}]}',
        "$.twins[0] breaks required",
    ),
    "surplus": ('{"name": "Oslo", "size": 7, "x": 1}', "x"),
}


@pytest.mark.parametrize("bad", BAD_ANSWERS)
async def test_json_is_asked_for_once_more(bad: str) -> None:
    text, problem = BAD_ANSWERS[bad]
    async with proxy(says(text, f"Sorry.\n{GOOD}")) as served:
        got = await served.chat(response_format=CITY)
    assert choices_of(got) == [Choice(GOOD, [], "stop")]
    asked = query(served)
    assert text in asked and len(served.turns) == 2
    last = asked.rpartition("Answer this message:\n\n")[2]
    assert last.startswith("Your last answer is not the JSON that was asked for: ")
    assert last.endswith(". Write the whole JSON again, corrected, and nothing else.")
    assert problem in last


@pytest.mark.parametrize("url", ["data:image/png;base64,AAAA", "https://a.b/c.png"])
async def test_files_that_went_with_the_first_try_go_with_the_second(url: str) -> None:
    """Dify does not say how many a list takes: it took these."""
    form = {"variable": "pics", "required": True, "allowed_file_types": ["image"]}
    parameters = {"user_input_form": [{"file-list": form}]}
    part = {"type": "image_url", "image_url": {"url": url}}
    messages = [{"role": "user", "content": [part, part]}]
    async with proxy(says("Well.", GOOD), parameters=parameters) as served:
        got = await served.chat(messages=messages, response_format=CITY)
        first, second = (turn.json["inputs"]["pics"] for turn in served.turns)
        uploads = len(served.dify.uploads)
    assert choices_of(got) == [Choice(GOOD, [], "stop")]
    assert first == second
    assert (len(first), uploads) == (2, 0 if url.startswith("https") else 2)


async def test_others_have_their_turn_while_a_long_answer_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a workflow's output comes: in one event."""
    rounds, text = 0, "{\n" * 50_000
    read: list[tuple[int, int]] = []  # in which round, how many characters
    feed = opendify.Reading.feed

    async def others() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            await asyncio.sleep(0)

    def noted(reading: opendify.Reading, parts: list[opendify.Part]) -> Any:
        texts = [part.text for part in parts if isinstance(part, opendify.Text)]
        read.append((rounds, sum(map(len, texts))))
        return feed(reading, parts)

    monkeypatch.setattr(opendify.Reading, "feed", noted)
    async with proxy(lambda _: at_once(text)) as served:
        ticking = asyncio.ensure_future(others())
        got = await served.chat(tools=[tool("get_weather")])
        ticking.cancel()
        await asyncio.wait([ticking])
    assert choices_of(got) == [Choice(text, [], "stop")]
    assert sum(size for _, size in read) == len(text)
    assert max(size for _, size in read) <= opendify.MAX_READ_CHARS
    assert len({at for at, _ in read}) >= len(read) - 1


async def test_long_answer_is_not_shown_as_an_empty_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(opendify, "MAX_KEPT_CHARS", 1000)
    async with proxy(says("x" * 1001, GOOD)) as served:
        got = await served.chat(response_format=CITY)
    assert choices_of(got) == [Choice(GOOD, [], "stop")]
    assert 'role="assistant">\n[1001 characters]\n' in query(served)


@pytest.mark.parametrize("bad", BAD_ANSWERS)
async def test_json_is_asked_for_once_more_while_nothing_was_streamed(bad: str) -> None:
    """The whole answer comes at once, so nothing has to be taken back."""
    text, _ = BAD_ANSWERS[bad]
    answers = [at_once(text), at_once(GOOD)]
    async with proxy(lambda _: answers.pop(0)) as served:
        got = await served.chat(response_format=CITY, stream=True)
    assert choices_of(got) == [Choice(GOOD, [], "stop")]
    assert len(served.turns) == 2


@WHOLE_OR_STREAMED
async def test_log_does_not_say_what_is_wrong_with_an_answer(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Its names, too, may be what was asked for: people, say, and their ages."""
    schema = {"type": "object", "additionalProperties": {"type": "integer"}}
    output = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    async with proxy(says('{"Ada Doe": "old"}', '{"Ada Doe": "old"}')) as served:
        got = await served.chat(response_format=output, stream=stream)
    assert '$.Ada Doe breaks type "integer"' in got.error["message"]
    assert "The app's answer is not the JSON that was asked for: …. id=" in caplog.text
    assert "Ada" not in caplog.text


@WHOLE_OR_STREAMED
@pytest.mark.parametrize("output", [OBJECT, CITY], ids=["object", "schema"])
async def test_hopeless_answer_is_an_error(output: JSONObject, stream: bool) -> None:
    async with proxy(says("I can't.", "I really can't.")) as served:
        got = await served.chat(response_format=output, stream=stream)
    assert (got.status, got.headers["x-should-retry"]) == (502, "false")
    error = got.error
    message = error.pop("message")
    assert message.startswith("The app's answer is not the JSON that was asked for: ")
    assert error == {
        "type": "server_error",
        "param": "response_format",
        "code": "response_format_unsatisfied",
    }
    assert len(served.turns) == 2


@pytest.mark.parametrize("bad", [name for name in BAD_ANSWERS if name != "text"])
async def test_streamed_json_that_turns_out_wrong_is_an_error(bad: str) -> None:
    text, problem = BAD_ANSWERS[bad]
    script = [fake.message(text[:9]), Sleep(1), *fake.chat_answer(text[9:])]
    async with proxy(script) as served:
        got = await served.chat(response_format=CITY, stream=True)
    assert (got.status, got.error["code"]) == (200, "response_format_unsatisfied")
    assert problem in got.error["message"]
    finishes = [c["choices"][0]["finish_reason"] for c in got.chunks if "choices" in c]
    assert set(finishes) == {None}
    sent = "".join(got.deltas)
    assert sent and text.startswith(sent)
    assert len(served.turns) == 1


@WHOLE_OR_STREAMED
async def test_failure_before_the_json_is_a_status(stream: bool) -> None:
    """The talk before it was not sent on, so the client has no answer yet."""
    script: list[fake.Step] = [fake.message("Sure: "), Sleep(1)]
    script.append(fake.error_event("The model failed."))
    async with proxy(script) as served:
        got = await served.chat(response_format=CITY, stream=stream)
    assert (got.status, got.error["code"]) == (502, "completion_request_error")


async def test_streamed_json_is_not_asked_for_again_after_talk_behind_it() -> None:
    script: list[fake.Step] = [fake.message('{"town": 5}'), Sleep(1)]
    script += [fake.message(" That's it."), Sleep(1), fake.message_end()]
    async with proxy(script) as served:
        got = await served.chat(response_format=CITY, stream=True)
    assert (got.status, got.error["code"]) == (200, "response_format_unsatisfied")
    assert len(served.turns) == 1


@WHOLE_OR_STREAMED
async def test_call_comes_before_the_final_json(stream: bool) -> None:
    async with proxy(says(OSLO, GOOD), memory=True) as served:
        fields: JSONObject = {"tools": TOOLS, "response_format": CITY, "stream": stream}
        first = await served.chat(**fields)
        message = result_of(CALLED["tool_calls"][0], "Sunny")  # type: ignore[index]
        messages = history_of(CALLED, message)
        second = await served.chat(messages=messages, **fields)
    assert choices_of(first) == [OSLO_CALL]
    assert choices_of(second) == [Choice(GOOD, [], "stop")]
    assert query(served, 0) == with_system(
        f"{words_about(TOOLS)}\n\n{CITY_WORDS}", "Hi"
    )
    assert len(served.dify.conversations) == 1


@pytest.mark.parametrize(
    ("output", "param"),
    [
        ({"type": "yaml"}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema.schema"),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": "y"}},
            "response_format.json_schema.schema",
        ),
    ],
)
async def test_unknown_format_is_refused(output: JSONObject, param: str) -> None:
    async with proxy() as served:
        got = await served.chat(response_format=output)
    assert (got.status, got.error["param"], served.turns) == (400, param, [])


# ------------------------------------------------------------------------------
# Stops
# ------------------------------------------------------------------------------

REACT = "Thought: look.\nAction: search\nObservation: made up"
CUT = "Thought: look.\nAction: search\n"


@WHOLE_OR_STREAMED
@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("Observation:", CUT),
        (["Observation:"], CUT),
        (["never", "Observation:"], CUT),
        (["\nObservation:", "\nAction: s", "x", "y"], "Thought: look."),
        ("Thought", ""),
    ],
)
async def test_answer_is_cut_and_the_app_stopped(
    stop: Any, text: str, size: int, stream: bool
) -> None:
    script: list[fake.Step] = [*map(fake.message, pieces_of(REACT, size)), Hang()]
    async with proxy(script) as served:
        start = now()
        got = await served.chat(stop=stop, stream=stream)
        assert now() - start < 1
        await served.dify.until(lambda: served.dify.stops and not served.dify.running)
    assert choices_of(got) == [Choice(text, [], "stop")]
    assert [row.effective for row in served.dify.stops] == [True]


@pytest.mark.parametrize("mode", MODES)
@WHOLE_OR_STREAMED
async def test_app_of_every_mode_is_stopped(mode: str, stream: bool) -> None:
    script = answer(mode, CUT, "Observation:", " made up")
    said = next(i for i, step in enumerate(script) if "Observation:" in repr(step))
    script = [*script[: said + 1], Hang()]
    async with proxy(script, mode=mode, parameters=form_of(mode)) as served:
        got = await served.chat(stop="Observation:", stream=stream)
        await served.dify.until(lambda: served.dify.stops and not served.dify.running)
    assert choices_of(got) == [Choice(CUT, [], "stop")]
    assert [row.effective for row in served.dify.stops] == [True]


@WHOLE_OR_STREAMED
async def test_usage_of_a_first_try_is_told_where_a_stop_cuts_the_second(
    stream: bool,
) -> None:
    scripts: list[list[fake.Step]] = [
        fake.chat_answer("No.", usage=(9, 2)),
        [fake.message(f"{OSLO}\nand STOP here"), fake.Hang()],
    ]
    fields: JSONObject = {"stream_options": {"include_usage": True}} if stream else {}
    async with proxy(lambda _: scripts.pop(0)) as served:
        got = await served.chat(
            stream=stream, stop="STOP", tools=TOOLS, tool_choice="required", **fields
        )
    usage = (got.chunks[-1] if stream else got.json)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (9, 2)


@WHOLE_OR_STREAMED
async def test_usage_that_came_with_the_stop_is_told(stream: bool) -> None:
    async with proxy(at_once("one STOP two")) as served:
        more: JSONObject = {"stream_options": {"include_usage": True}} if stream else {}
        got = await served.chat(stop="STOP", stream=stream, **more)
    usage = got.chunks[-1]["usage"] if stream else got.json["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (14, 8)


@WHOLE_OR_STREAMED
@pytest.mark.parametrize(
    "ends",
    [
        pytest.param([{"event": "error", "message": "broken"}], id="error"),
        pytest.param(
            [{"event": "message_replace", "answer": "No."}, END], id="replaced"
        ),
        pytest.param(
            [{"event": "message", "answer": "</think>No."}, END], id="thought"
        ),
    ],
)
async def test_what_comes_with_the_stop_changes_nothing(
    ends: list[JSONObject], stream: bool
) -> None:
    """It would not have been waited for, had it come later."""
    async with proxy(at_once("one STOP two", *ends)) as served:
        got = await served.chat(stop="STOP", stream=stream)
    assert choices_of(got) == [Choice("one ", [], "stop")]


@WHOLE_OR_STREAMED
@pytest.mark.parametrize(
    "stop", [None, [], "", [""], "never", ["made upX"], list("1234")]
)
async def test_answer_without_a_stop_is_whole(stop: Any, stream: bool) -> None:
    async with proxy(says(REACT)) as served:
        got = await served.chat(stop=stop, stream=stream)
    assert choices_of(got) == [Choice(REACT, [], "stop")]
    assert served.dify.stops == []


@pytest.mark.parametrize(
    ("stop", "code"), [(list("abcde"), "invalid_value"), ([1], "invalid_type")]
)
async def test_stop_that_is_none_is_refused(stop: Any, code: str) -> None:
    async with proxy() as served:
        expect_refusal(await served.chat(stop=stop), served, "stop", code)


async def test_stop_within_a_call_does_not_cut_it() -> None:
    async with proxy(says(OSLO)) as served:
        got = await served.chat(tools=TOOLS, stop="Oslo")
    assert choices_of(got) == [OSLO_CALL]


async def test_cut_answer_is_not_continued() -> None:
    """Dify remembers more than the client has seen."""
    async with proxy(says(REACT, "Yes."), memory=True) as served:
        got = await served.chat(stop="Observation:")
        said = {"role": "assistant", "content": got.message["content"]}
        messages = [*HI, said, {"role": "user", "content": "More"}]
        await served.chat(messages=messages)
    assert served.turns[1].json.get("conversation_id", "") == ""
    assert query(served).endswith("Answer this message:\n\nMore")


# ------------------------------------------------------------------------------
# Several choices
# ------------------------------------------------------------------------------


def numbered(count: int) -> fake.Script:
    """Return a script: turn i says "i.0", "i.1" …, one after another."""
    turns = iter(range(100))

    def script(_: fake.Request) -> list[fake.Step]:
        turn = next(turns)
        texts = [f"{turn}.{piece} " for piece in range(count)]
        return fake.chat_answer(*texts, delay=0.2, usage=(10, 1 + turn))

    return script


def text_of(turn: str, count: int) -> str:
    """Return what a turn of `numbered` says."""
    return "".join(f"{turn}.{piece} " for piece in range(count))


@WHOLE_OR_STREAMED
@pytest.mark.parametrize("n", [2, 8])
async def test_choices_are_independent_turns(n: int, stream: bool) -> None:
    async with proxy(numbered(3)) as served:
        loop = asyncio.get_running_loop()
        start = loop.time()
        fields: JSONObject = {
            "stream": stream,
            "stream_options": {"include_usage": True},
        }
        got = await served.chat(n=n, **fields)
        assert loop.time() - start < 3 * 0.2 + 0.5, "they ran one after another"
    choices = choices_of(got, include_usage=True)
    texts = {text_of(str(turn), 3) for turn in range(n)}
    assert {row.text for row in choices} == texts and len(choices) == n
    assert {row.finish for row in choices} == {"stop"}
    usage = (got.chunks[-1] if stream else got.json)["usage"]
    completion = sum(range(1, n + 1))
    assert usage == {
        "prompt_tokens": 10 * n,
        "completion_tokens": completion,
        "total_tokens": 10 * n + completion,
    }
    assert len(served.turns) == n
    assert {turn.json["query"] for turn in served.turns} == {"Hi"}


async def test_streams_of_choices_are_interleaved() -> None:
    async with proxy(numbered(4)) as served:
        headers = {"X-OpenDify-Smoothing": "off"}
        got = await served.chat(headers, n=2, stream=True)
    rows = [row for chunk in got.chunks for row in chunk["choices"]]
    order = [row["index"] for row in rows if row["delta"].get("content")]
    assert [sorted(order[at : at + 2]) for at in (0, 2, 4, 6)] == [[0, 1]] * 4
    assert len(order) == 8
    assert [chunk for chunk in got.chunks if "usage" in chunk] == []


@pytest.mark.parametrize("smoothing", ["on", "off"])
@pytest.mark.parametrize("first", range(3))
async def test_choices_begin_in_order(first: int, smoothing: str) -> None:
    """openai-python counts them as they come."""
    turns = iter(range(3))

    def script(_: fake.Request) -> list[fake.Step]:
        is_first = next(turns) == first
        return [Sleep(0.0 if is_first else 1.0), *fake.chat_answer(str(is_first))]

    async with proxy(script) as served:
        headers = {"X-OpenDify-Smoothing": smoothing}
        got = await served.chat(headers, n=3, stream=True)
    rows = [row for chunk in got.chunks for row in chunk["choices"]]
    assert [row["index"] for row in rows if "role" in row["delta"]] == [0, 1, 2]
    assert sorted(row.text for row in choices_of(got)) == ["False", "False", "True"]


async def test_choices_call_tools_each_on_its_own() -> None:
    async with proxy(lambda _: fake.chat_answer(OSLO)) as served:
        whole = await served.chat(n=3, tools=TOOLS)
        got = await served.chat(n=3, tools=TOOLS, stream=True)
    assert choices_of(whole) == choices_of(got) == [OSLO_CALL] * 3
    calls = [row["message"]["tool_calls"][0]["id"] for row in whole.json["choices"]]
    assert len(set(calls)) == 3


async def test_choices_join_no_conversation() -> None:
    def say(number: int) -> str:
        return f"The answer of turn {number}, long enough to be known again later."

    texts = [say(number) for number in range(5)]
    async with proxy(says(*texts), memory=True) as served:
        await served.chat()
        history = [*HI, {"role": "assistant", "content": say(0)}]
        messages = [*history, {"role": "user", "content": "More"}]
        got = await served.chat(messages=messages, n=2)
        said = {"role": "assistant", "content": choices_of(got)[0].text}
        await served.chat(messages=[*messages, said, *HI])
        # The conversation is where it was: n = 1 goes on with it.
        await served.chat(messages=messages)
    ids = [turn.json.get("conversation_id", "") for turn in served.turns]
    assert ids[:4] == [""] * 4
    assert ids[4] == next(iter(served.dify.conversations))
    assert query(served, 1) == query(served, 2)
    assert say(0) in query(served, 1)


@pytest.mark.parametrize(
    ("n", "code"),
    [
        *((9, "invalid_value"), (0, "invalid_value")),
        *(("2", "invalid_type"), (True, "invalid_type")),
    ],
)
async def test_number_of_choices_is_refused(n: Any, code: str) -> None:
    async with proxy() as served:
        expect_refusal(await served.chat(n=n), served, "n", code)


def failing(number: int, error: list[fake.Step]) -> fake.Script:
    """Return a script: the turns hang after a text, but for one that fails."""
    turns = iter(range(100))

    def script(_: fake.Request) -> list[fake.Step]:
        if next(turns) == number:
            return error
        return [fake.message("Hello"), Hang()]

    return script


FAILURE: list[fake.Step] = [
    fake.message("Hel"),
    Sleep(1),
    fake.error_event("The model failed."),
]


@WHOLE_OR_STREAMED
async def test_choice_that_fails_fails_the_answer(stream: bool) -> None:
    async with proxy(failing(1, FAILURE)) as served:
        got = await served.chat(n=3, stream=stream)
        await served.dify.until(lambda: not served.dify.running)
    assert (got.status == 200) is stream
    assert got.error["message"].startswith("The model failed.")
    assert got.error["code"] == "completion_request_error"
    assert [row.effective for row in served.dify.stops] == [True, True]
    if stream:
        rows = [row for chunk in got.chunks[:-1] for row in chunk["choices"]]
        assert {row["finish_reason"] for row in rows} == {None}


async def test_choice_that_is_refused_refuses_the_answer() -> None:
    body = {"code": "invalid_param", "message": "It can't be.", "status": 400}
    async with proxy(failing(1, [Sleep(1), fake.Status(400, body)])) as served:
        got = await served.chat(n=3)
        await served.dify.until(lambda: not served.dify.running)
    assert (got.status, len(served.dify.stops)) == (400, 2)


@WHOLE_OR_STREAMED
async def test_all_runs_are_stopped_when_the_client_leaves(stream: bool) -> None:
    async with proxy([fake.message("Hello"), Hang()]) as served:
        call = await served.begin(n=3, stream=stream)
        if stream:
            await call.read_text()
        await served.dify.until(lambda: served.dify.running == 3)
        await asyncio.sleep(1)
        await call.leave()
        await served.dify.until(lambda: not served.dify.running)
        await served.dify.until(lambda: not served.dify.open_connections)
    assert [row.effective for row in served.dify.stops] == [True] * 3


# ------------------------------------------------------------------------------
# POST /completions
# ------------------------------------------------------------------------------


async def complete(served: Proxy, path: str = "/v1/completions", **fields: Any) -> Got:
    """Return the response to a legacy request for the model `m`."""
    body = {"model": "m", "prompt": "Once", **fields}
    call = await served.open("POST", path, body)
    return await call.read_rest()


def texts_of(got: Got) -> list[tuple[str, str | None]]:
    """Return (text, finish reason) of each choice, after checking the answer."""
    is_whole = got.headers["content-type"] == "application/json"
    values = [got.json] if is_whole else got.chunks
    assert got.status == 200, got.body
    found: dict[int, tuple[str, str | None]] = {}
    for value in values:
        finished = [row["finish_reason"] or "stop" for row in value["choices"]]
        rows = [
            {**row, "finish_reason": reason}
            for row, reason in zip(value["choices"], finished)
        ]
        checked = {key: value[key] for key in value if key != "usage" or value[key]}
        validate("CreateCompletionResponse", {**checked, "choices": rows})
        for row in value["choices"]:
            text, reason = found.get(row["index"], ("", None))
            assert reason is None, "a choice goes on after its end"
            found[row["index"]] = (text + row["text"], row["finish_reason"])
    assert {value["id"] for value in values} == {values[0]["id"]}
    return [found[index] for index in range(len(found))]


@pytest.mark.parametrize("mode", MODES)
@WHOLE_OR_STREAMED
async def test_completion_of_every_mode(mode: str, stream: bool) -> None:
    pieces = ("upon", " a\u2028", "time 👩\u200d💻")
    script = answer(mode, *pieces)
    async with proxy(script, mode=mode, parameters=form_of(mode)) as served:
        got = await complete(served, stream=stream, user="al")
    assert texts_of(got) == [("".join(pieces), "stop")]
    (turn,) = served.turns
    asked = turn.json.get("query") or turn.json["inputs"]["query"]
    assert (asked, turn.user) == ("Once", "al")


def parrot(request: fake.Request) -> list[fake.Step]:
    """Repeat the query."""
    return fake.chat_answer("after ", str(request.json["query"]), usage=(3, 4))


@WHOLE_OR_STREAMED
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": ["A"]}, ["after A"]),
        ({"prompt": ["A", "B"]}, ["after A", "after B"]),
        ({"prompt": "A", "n": 3}, ["after A"] * 3),
        ({"prompt": ["A", "B"], "n": 2}, ["after A"] * 2 + ["after B"] * 2),
        ({"prompt": "A. ", "echo": True}, ["A. after A. "]),
        ({"prompt": ["A ", "B "], "echo": True}, ["A after A ", "B after B "]),
        ({"prompt": "A", "stop": "r A"}, ["afte"]),
        ({"prompt": "A", "stop": None, "echo": None, "suffix": None}, ["after A"]),
        ({"prompt": "A", "suffix": ""}, ["after A"]),
    ],
    ids=str,
)
async def test_completion(
    fields: JSONObject, expected: list[str], stream: bool
) -> None:
    async with proxy(parrot) as served:
        got = await complete(served, stream=stream, **fields)
    assert texts_of(got) == [(text, "stop") for text in expected]


PROMPTS = [f"{number}." for number in range(20)]  # LangChain sends so many


@WHOLE_OR_STREAMED
async def test_many_prompts_are_answered_a_few_at_once(stream: bool) -> None:
    gate = asyncio.Event()
    async with proxy(lambda request: [Wait(gate), *parrot(request)]) as served:
        body = {"model": "m", "prompt": PROMPTS, "stream": stream}
        call = await served.open("POST", "/v1/completions", body)
        await served.dify.until(lambda: served.dify.running == MAX_CHOICES)
        await asyncio.sleep(1)  # of the virtual clock
        assert len(served.turns) == MAX_CHOICES
        gate.set()
        got = await call.read_rest()
    assert texts_of(got) == [(f"after {prompt}", "stop") for prompt in PROMPTS]


async def test_prompts_that_wait_are_not_asked_when_another_has_failed() -> None:
    def script(request: fake.Request) -> Sequence[fake.Step]:
        is_third = request.json["query"] == "3."
        return FAILURE if is_third else [fake.message("A"), Hang()]

    async with proxy(script) as served:
        got = await complete(served, prompt=PROMPTS)
        await served.dify.until(lambda: not served.dify.running)
        assert len(served.turns) == MAX_CHOICES
    assert got.error["code"] == "completion_request_error"


async def test_prompts_that_wait_are_not_asked_when_the_client_leaves() -> None:
    async with proxy([fake.message("A"), Hang()]) as served:
        body = {"model": "m", "prompt": PROMPTS, "stream": True}
        call = await served.open("POST", "/v1/completions", body)
        await served.dify.until(lambda: served.dify.running == MAX_CHOICES)
        await call.leave()
        await served.dify.until(lambda: not served.dify.running)
        assert len(served.turns) == MAX_CHOICES


async def test_usage_of_a_completion() -> None:
    async with proxy(parrot) as served:
        whole = await complete(served, prompt=["A", "B"])
        options: JSONObject = {
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        got = await complete(served, prompt=["A", "B"], **options)
        bare = await complete(served, prompt=["A", "B"], stream=True)
    usage = {"prompt_tokens": 6, "completion_tokens": 8, "total_tokens": 14}
    assert whole.json["usage"] == got.chunks[-1]["usage"] == usage
    assert (got.chunks[-1]["choices"], got.chunks[0]["usage"]) == ([], None)
    assert [chunk for chunk in bare.chunks if "usage" in chunk] == []
    assert {chunk["object"] for chunk in got.chunks} == {"text_completion"}
    assert whole.json["id"].startswith("cmpl-")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/engines/m/completions",
        "/engines/m/completions",
        "/openai/deployments/m/completions?api-version=2024-06-01",
        "/v1//completions/",
        "/v1/completions/completions",
    ],
)
@WHOLE_OR_STREAMED
async def test_completion_of_a_model_in_the_path(path: str, stream: bool) -> None:
    named = {} if "/m/" in path else {"model": "m"}
    async with proxy(parrot) as served:
        body = {"prompt": "A", "stream": stream, **named}
        call = await served.open("POST", path, body)
        got = await call.read_rest()
    assert texts_of(got) == [("after A", "stop")]


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/v1/chat/completions", "messages"),
        ("/v1/completions", "prompt"),
        ("/v1/responses", "input"),
    ],
)
async def test_prompt_too_long_names_the_field_of_the_endpoint(
    path: str, param: str
) -> None:
    async with proxy([fake.error_event("prompt is too long")]) as served:
        asked = HI if param == "messages" else "A"
        call = await served.open("POST", path, {"model": "m", param: asked})
        got = await call.read_rest()
    assert (got.status, got.error["param"]) == (400, param)
    assert got.error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"suffix": "the end"}, "suffix", "unsupported_parameter"),
        ({"prompt": [1, 2, 3]}, "prompt", "invalid_value"),
        ({"prompt": [[1, 2], [3]]}, "prompt", "invalid_value"),
        ({"prompt": {"text": "A"}}, "prompt", "invalid_value"),
        ({"prompt": None}, "prompt", "missing_required_parameter"),
        ({"prompt": []}, "prompt", "missing_required_parameter"),
        ({"prompt": ["A"] * 129}, "prompt", "invalid_value"),
        ({"prompt": ["A"] * 17, "n": 8}, "prompt", "invalid_value"),
        ({"n": 9}, "n", "invalid_value"),
        ({"stop": list("abcde")}, "stop", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_type"),
        ({"model": ""}, "model", "missing_required_parameter"),
    ],
    ids=str,
)
async def test_completion_is_refused(fields: JSONObject, param: str, code: str) -> None:
    async with proxy() as served:
        expect_refusal(await complete(served, **fields), served, param, code)


async def test_completion_of_an_unknown_model() -> None:
    async with proxy() as served:
        got = await complete(served, model="none")
    assert (got.status, got.error["code"]) == (404, "model_not_found")


@WHOLE_OR_STREAMED
async def test_completion_that_fails(stream: bool) -> None:
    async with proxy(FAILURE) as served:
        got = await complete(served, stream=stream)
    assert (got.status == 200) is stream
    assert got.error["code"] == "completion_request_error"


COMPLETION_FIELDS: JSONObject = {
    "best_of": 2,
    "frequency_penalty": 0.5,
    "logit_bias": {"50256": -100},
    "logprobs": 3,
    "max_tokens": 1,
    "presence_penalty": 1,
    "seed": 7,
    "temperature": 0,
    "top_p": 0.1,
    # Not of this API, but clients share the code of both:
    "messages": [{"role": "user", "content": "Else"}],
    "tools": TOOLS,
    "tool_choice": "required",
    "functions": FUNCTIONS,
    "function_call": {"name": "get_weather"},
    "response_format": CITY,
}
PROVED_ABOVE = {
    *{"model", "prompt", "echo", "n", "stop", "stream", "stream_options"},
    *{"suffix", "user"},
}


@pytest.mark.parametrize("field", COMPLETION_FIELDS)
async def test_field_of_a_completion_is_ignored(field: str) -> None:
    async with proxy(parrot) as served:
        got = await complete(served, **{field: COMPLETION_FIELDS[field]})
    assert texts_of(got) == [("after Once", "stop")]
    assert (len(served.turns), query(served)) == (1, "Once")


def test_every_field_of_a_completion_has_a_test() -> None:
    assert set(fields_of("CreateCompletionRequest")) - PROVED_ABOVE <= set(
        COMPLETION_FIELDS
    )


# ------------------------------------------------------------------------------
# What is not served
# ------------------------------------------------------------------------------


IMAGES = ("images/generations", "images/edits", "images/variations")


@pytest.mark.parametrize(
    "path",
    [
        *[f"/v1/{name}" for name in ("embeddings", "moderations", *IMAGES)],
        *["/embeddings", "/moderations", "/images/generations"],
        *["/v1/engines/m/embeddings", "/openai/deployments/m/embeddings"],
        "/openai/deployments/m/images/generations",
    ],
)
@pytest.mark.parametrize("method", ["POST", "GET"])
async def test_endpoint_that_no_app_can_serve(path: str, method: str) -> None:
    async with proxy() as served:
        call = await served.open(method, path, {"model": "m", "input": "Hi"})
        got = await call.read_rest()
        assert served.dify.requests == []
    assert (got.status, got.error["type"]) == (404, "invalid_request_error")
    hint = "Dify apps can't do that; ask a model provider directly."
    assert got.error["message"] == f"Invalid URL ({method} {path}). {hint}"


@pytest.mark.parametrize(
    "path",
    [
        *["/v1/fine_tuning/jobs", "/v1/batches", "/v1/threads", "/v1/assistants"],
        *["/v1/images", "/v1/embeddings/x", "/v1/chat", "/dashboard/billing/usage"],
    ],
)
async def test_unknown_path(path: str) -> None:
    async with proxy() as served:
        call = await served.open("POST", path, {"model": "m"})
        got = await call.read_rest()
    assert (got.status, got.error["code"]) == (404, "unknown_url")
    assert got.error["message"].startswith(f"Invalid URL (POST {path})")


# ------------------------------------------------------------------------------
# Every field of a chat request
# ------------------------------------------------------------------------------


@functools.cache
def fields_of(name: str) -> tuple[str, ...]:
    """Return the fields of a request, from OpenAI's own schema."""
    document = json.loads(Path(FILE).read_text(encoding="utf-8"))

    def walk(schema: JSONObject) -> list[str]:
        if "$ref" in schema:
            return walk(document["$defs"][schema["$ref"].rpartition("/")[2]])
        inner = [*schema.get("allOf", []), *schema.get("anyOf", [])]
        return [*schema.get("properties", {}), *(f for row in inner for f in walk(row))]

    return tuple(dict.fromkeys(walk(document["$defs"][name])))


# What is ignored must change nothing, neither for Dify nor for the client.
IGNORED: JSONObject = {
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "prompt_cache_options": {},
    "max_tokens": 1,
    "max_completion_tokens": 1,
    "temperature": 0.1,
    "top_p": 0.2,
    "presence_penalty": 1,
    "frequency_penalty": 1,
    "logit_bias": {"50256": -100},
    "seed": 7,
    "reasoning_effort": "high",
    "verbosity": "low",
    "service_tier": "flex",
    "store": True,
    "prediction": {"type": "content", "content": "Hello"},
    "moderation": {"model": "omni-moderation-latest"},
    "web_search_options": {},
    "logprobs": True,
    "top_logprobs": 3,
    "modalities": ["text"],
}
# This app has no speech; test_spoken.py has one that speaks.
AUDIO = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}
REFUSED: JSONObject = {"audio": AUDIO}

# What Dify gets of a field: (the request's fields, what to look at, what is there).
Look = Callable[[Proxy], Any]
FORWARDED: dict[str, tuple[JSONObject, Look, Any]] = {
    "model": ({"model": "other"}, lambda p: p.turns[-1].key, "app-other"),
    "messages": (
        {"messages": [{"role": "user", "content": "Hello?"}]},
        query,
        "Hello?",
    ),
    "user": ({"user": "al"}, lambda p: p.turns[-1].user, "al"),
    "safety_identifier": (
        {"safety_identifier": "al"},
        lambda p: p.turns[-1].user,
        "al",
    ),
    "metadata": (
        {"metadata": {"inputs": '{"x": 1}', "other": "y"}},
        lambda p: p.turns[-1].json["inputs"],
        {"x": 1},
    ),
}

# What the client gets of one: (the request's fields, what the app says, the choices).
ANSWERED: dict[str, tuple[JSONObject, str, list[Choice]]] = {
    "stop": ({"stop": "lo"}, "Hello", [Choice("Hel", [], "stop")]),
    "n": ({"n": 2}, "Hello", [Choice("Hello", [], "stop")] * 2),
    "response_format": (
        {"response_format": OBJECT},
        "So: {}",
        [Choice("{}", [], "stop")],
    ),
    "tools": ({"tools": TOOLS}, OSLO, [OSLO_CALL]),
    "tool_choice": (
        {"tools": TOOLS, "tool_choice": "none"},
        OSLO,
        [Choice(OSLO, [], "stop")],
    ),
    "parallel_tool_calls": (
        {"tools": TOOLS, "parallel_tool_calls": False},
        OSLO + OSLO,
        [OSLO_CALL],
    ),
    "functions": (
        {"functions": FUNCTIONS},
        OSLO + OSLO,
        [OSLO_CALL._replace(finish="function_call")],
    ),
    "function_call": (
        {"functions": FUNCTIONS, "function_call": "none"},
        OSLO,
        [Choice(OSLO, [], "stop")],
    ),
}
STREAMED = ("stream", "stream_options")  # test_stream_is_what_is_asked_for


def test_every_field_of_a_chat_request_has_one_row() -> None:
    rows = [*IGNORED, *REFUSED, *FORWARDED, *ANSWERED, *STREAMED]
    assert sorted(rows) == sorted(fields_of("CreateChatCompletionRequest"))


@pytest.mark.parametrize("field", IGNORED)
@WHOLE_OR_STREAMED
async def test_ignored_field_changes_nothing(field: str, stream: bool) -> None:
    fields: JSONObject = {field: IGNORED[field]}
    body = {"model": "m", "messages": HI, "stream": stream, **fields}
    validate("CreateChatCompletionRequest", body)
    seen: list[Any] = []
    for more in ({}, fields):
        async with proxy(says("Hello")) as served:
            got = await served.chat(stream=stream, **more)
        (turn,) = served.turns
        asked = {key: turn.json[key] for key in turn.json if key != "trace_id"}
        values = got.chunks if stream else [got.json]
        seen.append([asked, [{**value, "dify": None} for value in values]])
        assert choices_of(got) == [Choice("Hello", [], "stop")]
    assert seen[0] == seen[1]


@pytest.mark.parametrize("field", REFUSED)
@WHOLE_OR_STREAMED
async def test_refused_field_is_named(field: str, stream: bool) -> None:
    async with proxy() as served:
        got = await served.chat(stream=stream, **REFUSED[field])
    assert (got.status, got.error["type"]) == (400, "invalid_request_error")
    assert got.error["param"] in REFUSED[field]
    assert served.turns == []


@pytest.mark.parametrize("field", FORWARDED)
@WHOLE_OR_STREAMED
async def test_forwarded_field_reaches_dify(field: str, stream: bool) -> None:
    fields, look, expected = FORWARDED[field]
    models = {
        name: {"key": key, "mode": "chat"}
        for name, key in {"m": KEY, "other": "app-other"}.items()
    }
    async with proxy(variables={"MODEL_CONFIG": json.dumps(models)}) as served:
        served.dify.app("app-other")
        got = await served.chat(stream=stream, **fields)
    assert [row.finish for row in choices_of(got)] == ["stop"]
    assert look(served) == expected


@pytest.mark.parametrize("field", ANSWERED)
@WHOLE_OR_STREAMED
async def test_emulated_field_shapes_the_answer(field: str, stream: bool) -> None:
    fields, text, expected = ANSWERED[field]
    async with proxy(lambda _: fake.chat_answer(*pieces_of(text))) as served:
        got = await served.chat(stream=stream, **fields)
    assert choices_of(got) == expected


@pytest.mark.parametrize("stream", [None, False, True])
@pytest.mark.parametrize("options", [None, {}, {"include_usage": True}])
async def test_stream_is_what_is_asked_for(stream: bool | None, options: Any) -> None:
    async with proxy(says("Hello")) as served:
        got = await served.chat(stream=stream, stream_options=options)
    assert choices_of(got, include_usage=bool(options)) == [Choice("Hello", [], "stop")]
    is_json = got.headers["content-type"] == "application/json"
    assert is_json is not bool(stream)
