"""Tool calls, output formats and stop strings, as models write them."""

from __future__ import annotations

import json
import random
import tracemalloc
from dataclasses import replace
from itertools import count, repeat
from math import inf
from typing import Any, Union

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from work import at_most

from opendify import (
    Ask,
    BadRequest,
    CallReader,
    Citations,
    Failure,
    Finish,
    JsonReader,
    KeptText,
    Media,
    OutputFormat,
    Part,
    Reading,
    Reasoning,
    Recast,
    Replace,
    StopReader,
    Text,
    Tool,
    ToolCall,
    UpstreamFailed,
    Usage,
    call_ids,
    describe_call,
    describe_format,
    describe_tools,
    extract_json,
    is_retry,
    json_problem,
    parse_output_format,
    parse_tools,
    retry_text,
    schema_problems,
    told_ask,
)

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "hourly": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["city"],
}
FILE = {
    "type": "object",
    "properties": {"path": {"type": "string"}, "content": {"type": "string"}},
}
TOOLS = (
    Tool("get_weather", "The weather of a city.", WEATHER),
    Tool("get_time", "The time.", {"type": "object", "properties": {}}),
    Tool("search", "", {"type": "object", "properties": {"query": {"type": "string"}}}),
    Tool("write_file", "", FILE),
)
PARIS = {"city": "Paris"}
Expected = Union[str, tuple[str, dict[str, Any]]]


def text_tool(name: str, description: str, form: str) -> Tool:
    """A custom tool, and what its text must be."""
    text = {"type": "string", "description": form}
    schema = {"type": "object", "properties": {"input": text}, "required": ["input"]}
    return Tool(name, description, schema, is_custom=True)


def reader() -> CallReader:
    return CallReader(TOOLS, (f"call_{number}" for number in count(1)), inf)


def read(*pieces: str) -> list[Part]:
    """The parts of an answer that comes in these pieces, its texts joined."""
    calls = reader()
    parts: list[Part] = []
    for piece in pieces:
        parts += calls.feed([Text(piece)])
    return joined(parts + calls.close())


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"arguments": {"input": "a\nb"}}, "a\nb"),
        ({"input": "a\nb"}, "a\nb"),
        ({"arguments": "[1]"}, "[1]"),
        ({"arguments": '{"input": "a"}'}, "a"),
        ({"arguments": {"other": 1}}, '{"other": 1}'),
        ({"arguments": {"input": {"a": "é"}}}, '{"a": "é"}'),
    ],
)
def test_custom_tool_is_called_with_a_text(given: dict[str, Any], text: str) -> None:
    calls = CallReader([text_tool("patch", "", "")], repeat("call_1"), inf)
    written = json.dumps({"name": "patch", **given})
    found = calls.feed([Text(f"<tool_call>\n{written}\n</tool_call>")])
    (call,) = found
    assert isinstance(call, ToolCall)
    assert (call.name, call.given) == ("patch", text)


def test_code_that_was_withdrawn_hides_no_call() -> None:
    calls = reader()
    calls.feed([Text("```\nIt is a"), Recast(10)])
    assert calls.feed([Text(f"<tool_call>{CALL}</tool_call>")]) == parts_of(PARIS_CALL)


def joined(parts: list[Part]) -> list[Part]:
    whole: list[Part] = []
    for part in parts:
        if isinstance(part, Text) and whole and isinstance(whole[-1], Text):
            whole[-1] = Text(whole[-1].text + part.text)
        else:
            whole.append(part)
    return whole


def parts_of(expected: list[Expected]) -> list[Part]:
    numbers = count(1)
    return [
        Text(row)
        if isinstance(row, str)
        else ToolCall(
            f"call_{next(numbers)}", row[0], json.dumps(row[1], ensure_ascii=False)
        )
        for row in expected
    ]


CALL = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
PARIS_CALL: list[Expected] = [("get_weather", PARIS)]
SAMPLES: dict[str, tuple[str, list[Expected]]] = {
    # What is asked for.
    "ours": (f"<tool_call>\n{CALL}\n</tool_call>", PARIS_CALL),
    "ours-one-line": (f"<tool_call>{CALL}</tool_call>", PARIS_CALL),
    "ours-prose-before": (
        f"Let me check.\n\n<tool_call>\n{CALL}\n</tool_call>\n",
        ["Let me check.\n\n", *PARIS_CALL],
    ),
    "ours-prose-same-line": (
        f"Let me check. <tool_call>{CALL}</tool_call>",
        ["Let me check. ", *PARIS_CALL],
    ),
    "ours-prose-after": (
        f"<tool_call>\n{CALL}\n</tool_call>\n\nI will tell you soon.",
        [*PARIS_CALL, "\n\nI will tell you soon."],
    ),
    "ours-blank-before": (f"\n\n<tool_call>{CALL}</tool_call>\n\n", PARIS_CALL),
    "ours-two": (
        f'<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{{"name": "search", '
        '"arguments": {"query": "a } b"}}\n</tool_call>',
        [*PARIS_CALL, ("search", {"query": "a } b"})],
    ),
    "ours-two-in-one-block": (
        f"<tool_call>\n{CALL}\n{CALL}\n</tool_call>",
        PARIS_CALL * 2,
    ),
    "ours-list-in-block": (f"<tool_call>[{CALL}, {CALL}]</tool_call>", PARIS_CALL * 2),
    "ours-prose-between": (
        f"<tool_call>{CALL}</tool_call>\nAnd the time:\n"
        '<tool_call>{"name": "get_time", "arguments": {}}</tool_call>',
        [*PARIS_CALL, "\nAnd the time:\n", ("get_time", {})],
    ),
    "no-arguments": ('<tool_call>{"name": "get_time"}</tool_call>', [("get_time", {})]),
    "null-arguments": (
        '<tool_call>{"name": "get_time", "arguments": null}</tool_call>',
        [("get_time", {})],
    ),
    "empty-text-arguments": (
        '<tool_call>{"name": "get_time", "arguments": ""}</tool_call>',
        [("get_time", {})],
    ),
    "arguments-as-text": (
        r'<tool_call>{"name": "get_weather", "arguments": "{\"city\": \"Paris\"}"}'
        "</tool_call>",
        PARIS_CALL,
    ),
    "arguments-first": (
        '<tool_call>{"arguments": {"city": "Paris"},'
        ' "name": "get_weather"}</tool_call>',
        PARIS_CALL,
    ),
    "with-id": (
        '<tool_call>{"id": "call_9", "name": "get_weather", "arguments": '
        '{"city": "Paris"}}</tool_call>',
        PARIS_CALL,
    ),
    "with-any-id-first": (
        f'<tool_call>{{"id": "toolu_1", {CALL[1:]}</tool_call>'
        f'<tool_call>{{"index": 0, {CALL[1:]}</tool_call>',
        PARIS_CALL * 2,
    ),
    "cjk": (
        '我来查一下。\n<tool_call>\n{"name": "get_weather", "arguments": '
        '{"city": "北京"}}\n</tool_call>',
        ["我来查一下。\n", ("get_weather", {"city": "北京"})],
    ),
    "escapes": (
        '<tool_call>{"name": "write_file", "arguments": {"path": "a\\\\b", '
        '"content": "x = {\\"a\\": [1]}\\n</tool_call> \\u4e2d"}}</tool_call>',
        [
            (
                "write_file",
                {"path": "a\\b", "content": 'x = {"a": [1]}\n</tool_call> 中'},
            )
        ],
    ),
    "with-a-thought": (
        f'<tool_call>{{"thought": "Where?", {CALL[1:-1]}, "result": 3}}</tool_call>',
        PARIS_CALL,
    ),
    # Sloppy and broken.
    "no-closing-tag": (f"<tool_call>\n{CALL}", PARIS_CALL),
    "no-closing-tag-text-after": (
        f"<tool_call>\n{CALL}\nDone.",
        [*PARIS_CALL, "\nDone."],
    ),
    "no-opening-tag": (f"{CALL}\n</tool_call>", PARIS_CALL),
    "opening-tag-twice": (f"<tool_call>\n{CALL}\n<tool_call>", PARIS_CALL),
    "plural-tag": (f"<tool_calls>\n{CALL}\n</tool_calls>", PARIS_CALL),
    "plural-around-singular": (
        f"<tool_calls><tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>"
        "</tool_calls>",
        PARIS_CALL * 2,
    ),
    "tools-tag": (f"<tools>\n{CALL}\n</tools>", PARIS_CALL),
    "function-call-tag": (f"<function_call>{CALL}</function_call>", PARIS_CALL),
    "tool-use-tag": (f"<tool_use>{CALL}</tool_use>", PARIS_CALL),
    "tag-behind-bracket": (f"[<tool_call>{CALL}</tool_call>", ["[", *PARIS_CALL]),
    "fence-in-tag": (f"<tool_call>\n```json\n{CALL}\n```\n</tool_call>", PARIS_CALL),
    "tag-in-fence": (f"```xml\n<tool_call>\n{CALL}\n</tool_call>\n```", PARIS_CALL),
    "tag-behind-a-code-block": (
        f"```python\nrun()\n```\nNow:\n<tool_call>\n{CALL}\n</tool_call>",
        ["```python\nrun()\n```\nNow:\n", *PARIS_CALL],
    ),
    "tag-behind-a-call-in-quotes": (
        f'"```json\n{CALL}\n```<tool_call>{CALL}</tool_call>"',
        ['"', *PARIS_CALL * 2, '"'],
    ),
    "missing-brace": (f"<tool_call>\n{CALL[:-1]}\n</tool_call>", PARIS_CALL),
    "missing-braces-at-end": (f"<tool_call>{CALL[:-2]}", PARIS_CALL),
    "one-brace-too-many": (f"<tool_call>{CALL}}}</tool_call>", PARIS_CALL),
    "trailing-commas": (
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris",},}'
        "</tool_call>",
        PARIS_CALL,
    ),
    "single-quotes": (
        "<tool_call>{'name': 'get_weather', 'arguments': {'city': 'L\\'Aquila', "
        "'hourly': True, 'tags': None}}</tool_call>",
        [("get_weather", {"city": "L'Aquila", "hourly": True, "tags": None})],
    ),
    "single-quotes-with-double-inside": (
        "<tool_call>{'name': 'search', 'arguments': {'query': 'say \"hi\"'}}"
        "</tool_call>",
        [("search", {"query": 'say "hi"'})],
    ),
    "unquoted-keys": (
        '<tool_call>{name: "get_weather", arguments: {city: "Paris", days: 1e1}}'
        "</tool_call>",
        [("get_weather", {"city": "Paris", "days": 10.0})],
    ),
    "raw-line-break": (
        '<tool_call>{"name": "write_file", "arguments": {"path": "a", "content": '
        '"one\ntwo\tthree"}}</tool_call>',
        [("write_file", {"path": "a", "content": "one\ntwo\tthree"})],
    ),
    "stray-backslash": (
        r'<tool_call>{"name": "write_file", "arguments": {"path": "C:\Users\d", '
        r'"content": "a"}}</tool_call>'.replace(r"\U", r"\W"),
        [("write_file", {"path": r"C:\Wsers\d", "content": "a"})],
    ),
    "path-of-windows": (
        r'<tool_call>{"name": "write_file", "arguments": {"path": "src\ui\u00e9.py"}}'
        "</tool_call>",
        [("write_file", {"path": r"src\uié.py"})],
    ),
    # Bare and fenced JSON.
    "bare": (CALL, PARIS_CALL),
    "bare-pretty": (json.dumps(json.loads(CALL), indent=4), PARIS_CALL),
    "bare-after-prose": (
        f"I will look that up.\n\n{CALL}\n",
        ["I will look that up.\n\n", *PARIS_CALL],
    ),
    "bare-after-colon": (f"Tool call: {CALL}", ["Tool call: ", *PARIS_CALL]),
    **{
        f"bare-after-{lead}": (f"I look{lead} {CALL}", [f"I look{lead} ", *PARIS_CALL])
        for lead in ".!?*。！？"
    },
    "bare-after-cjk": (f"好的，我来查询：{CALL}", ["好的，我来查询：", *PARIS_CALL]),
    "bare-lines": (f"{CALL}\n{CALL}", PARIS_CALL * 2),
    "bare-semicolon": (f"{CALL}; {CALL};{CALL}", PARIS_CALL * 3),
    "bare-list": (f"[{CALL}, {CALL}]", PARIS_CALL * 2),
    "bare-tool-args": (
        '{"tool": "get_weather", "args": {"city": "Paris"}}',
        PARIS_CALL,
    ),
    "bare-parameters": (
        '{"name": "get_weather", "parameters": {"city": "Paris"}}',
        PARIS_CALL,
    ),
    **{
        f"bare-{name}-{given}": (
            f'{{"{name}": "get_weather", "{given}": {{"city": "Paris"}}}}',
            PARIS_CALL,
        )
        for name, given in (
            *(("tool_name", "params"), ("function", "input")),
            ("function_name", "tool_input"),
        )
    },
    **{
        f"bare-within-{key}": (f'{{"{key}": [{CALL}]}}', PARIS_CALL)
        for key in ("function_calls", "calls", "tool_call", "tool")
    },
    "bare-with-ids": (
        '{"id": "call_1", "index": 0, "call_id": "1", "tool_call_id": "1", '
        f'"type": "function", {CALL[1:]}',
        PARIS_CALL,
    ),
    "bare-type-first": (
        '{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}',
        PARIS_CALL,
    ),
    "bare-responses": (
        f'{{"type": "function_call", "call_id": "call_1", {CALL[1:]}',
        PARIS_CALL,
    ),
    "bare-anthropic": (
        '{"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": '
        '{"city": "Paris"}}',
        PARIS_CALL,
    ),
    "bare-openai": (
        '{"type": "function", "function": {"name": "get_weather", "arguments": '
        r'"{\"city\": \"Paris\"}"}}',
        PARIS_CALL,
    ),
    "bare-openai-list": (
        '{"tool_calls": [{"id": "call_x", "type": "function", "function": {"name": '
        r'"get_weather", "arguments": "{\"city\": \"Paris\"}"}}]}',
        PARIS_CALL,
    ),
    "bare-openai-id-first": (
        '[{"id": "call_x", "type": "function", "function": {"name": "get_weather", '
        '"arguments": {"city": "Paris"}}}]',
        PARIS_CALL,
    ),
    "bare-function-call": (
        '{"function_call": {"name": "get_weather", "arguments": {"city": "Paris"}}}',
        PARIS_CALL,
    ),
    "bare-parallel": (
        '{"tool_uses": [{"recipient_name": "functions.get_weather", "parameters": '
        '{"city": "Paris"}}]}',
        PARIS_CALL,
    ),
    "bare-missing-brace": (CALL[:-1], PARIS_CALL),
    "fenced": (f"```json\n{CALL}\n```", PARIS_CALL),
    "fenced-no-language": (f"```\n{CALL}\n```\n", PARIS_CALL),
    **{
        f"fenced-{language}": (f"```{language}\n{CALL}\n```", PARIS_CALL)
        for language in ("json5", "jsonc", "tool_call", "tool_calls", "tool_code")
    },
    "fenced-two": (f"```json\n{CALL}\n{CALL}\n```", PARIS_CALL * 2),
    "fenced-two-and-a-comma": (f"```json\n{CALL},\n{CALL}\n```", PARIS_CALL * 2),
    "code-block-behind": (
        f"{CALL}\n```\nrun()\n```",
        [*PARIS_CALL, "\n```\nrun()\n```"],
    ),
    "fenced-list": (f"```json\n[\n  {CALL},\n  {CALL}\n]\n```", PARIS_CALL * 2),
    "fenced-not-closed": (f"```json\n{CALL}\n", PARIS_CALL),
    "fences-two": (f"```json\n{CALL}\n```\n\n```json\n{CALL}\n```", PARIS_CALL * 2),
    "fenced-prose-around": (
        f"I'll call:\n```json\n{CALL}\n```\nPlease wait.",
        ["I'll call:\n", *PARIS_CALL, "\nPlease wait."],
    ),
    # Other dialects.
    "invoke": (
        '<function_calls>\n<invoke name="get_weather">\n<parameter name="city">Paris'
        '</parameter>\n<parameter name="days">3</parameter>\n</invoke>\n'
        "</function_calls>",
        [("get_weather", {"city": "Paris", "days": 3})],
    ),
    "invoke-two": (
        '<function_calls><invoke name="get_weather">'
        '<parameter name="city">12</parameter>'
        '<parameter name="tags">["a"]</parameter></invoke><invoke name="get_time">'
        "</invoke></function_calls>",
        [("get_weather", {"city": "12", "tags": ["a"]}), ("get_time", {})],
    ),
    "invoke-alone": (
        '<invoke name="write_file"><parameter name="path">a.html</parameter>'
        '<parameter name="content">\n<b>x</b>\n{"name": 1}\n</parameter></invoke>',
        [("write_file", {"path": "a.html", "content": '<b>x</b>\n{"name": 1}'})],
    ),
    "invoke-loosely": (
        "<invoke name = 'get_weather'><parameter name = 'city'>Paris</parameter>"
        "</invoke>",
        PARIS_CALL,
    ),
    "invoke-closer-forgotten": (
        '<invoke name="get_weather"><parameter name="city">Paris\n'
        '<parameter name="hourly">true</parameter></invoke>',
        [("get_weather", {"city": "Paris", "hourly": True})],
    ),
    "qwen-coder": (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
        "<parameter=hourly>\ntrue\n</parameter>\n</function>\n</tool_call>",
        [("get_weather", {"city": "Paris", "hourly": True})],
    ),
    "qwen-coder-closer-forgotten": (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n<parameter=a>\n"
        "<parameter=hourly>\ntrue\n</parameter>\n</function>\n</tool_call>",
        [("get_weather", {"city": "Paris\n<parameter=a>", "hourly": True})],
    ),
    "qwen-agent": (
        '✿FUNCTION✿: get_weather\n✿ARGS✿: {"city": "Paris"}\n'
        "✿FUNCTION✿: get_time\n✿ARGS✿: {}\n✿RESULT✿",
        [*PARIS_CALL, ("get_time", {})],
    ),
    "qwen-agent-made-up": (
        'So:\n✿FUNCTION✿ get_weather\n✿ARGS✿ {"city": "Paris"}\n✿RESULT✿: 20°',
        ["So:\n", *PARIS_CALL, "\n✿RESULT✿: 20°"],
    ),
    "minimax": (
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris'
        "</parameter>\n</invoke>\n</minimax:tool_call>",
        PARIS_CALL,
    ),
    "seed": (
        "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Paris</parameter>\n"
        "</function>\n</seed:tool_call>",
        PARIS_CALL,
    ),
    "llama-function": (
        '<function=get_weather>{"city": "Paris"}</function>',
        PARIS_CALL,
    ),
    "llama-python-tag": (
        '<|python_tag|>{"name": "get_weather", '
        '"parameters": {"city": "Paris"}}<|eom_id|>',
        PARIS_CALL,
    ),
    "glm": (
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>北京</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
        [("get_weather", {"city": "北京", "days": 2})],
    ),
    "deepseek-v3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
        '```json\n{"city": "Paris"}\n```<｜tool▁'
        "call▁end｜>\n<｜tool▁call▁begin｜>function"
        "<｜tool▁sep｜>get_time\n```json\n{}\n`"
        "``<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        [*PARIS_CALL, ("get_time", {})],
    ),
    "deepseek-v31": (
        "查一下：<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
        '{"city": "杭州"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        ["查一下：", ("get_weather", {"city": "杭州"})],
    ),
    "deepseek-dsml": (
        "<｜DSML｜function_calls>\n<｜DSML｜invoke "
        'name="get_weather">\n<｜DSML｜parameter '
        'name="city" string="true">Paris</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        "</｜DSML｜function_calls>",
        PARIS_CALL,
    ),
    "deepseek-ascii": (
        "<|tool▁calls▁begin|><|tool▁call▁begin|>get_weather<|tool▁sep|>"
        '{"city": "Paris"}<|tool▁call▁end|><|tool▁calls▁end|>',
        PARIS_CALL,
    ),
    **{
        f"deepseek{sign}": (
            f"<｜tool{sign}calls{sign}begin｜><｜tool{sign}call{sign}begin｜>function"
            f'<｜tool{sign}sep｜>get_weather\n```json\n{{"city": "Paris"}}\n```'
            f"<｜tool{sign}call{sign}end｜><｜tool{sign}calls{sign}end｜>",
            PARIS_CALL,
        )
        for sign in ("_", " ", "\\_")  # as some servers and clients write its blanks
    },
    "kimi": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        '<|tool_call_argument_begin|>{"city": "Paris"}<|tool_call_end|>'
        "<|tool_calls_section_end|>",
        PARIS_CALL,
    ),
    "mistral": (f"[TOOL_CALLS][{CALL}]", PARIS_CALL),
    "mistral-names": (
        '[TOOL_CALLS]get_weather{"city": "Paris"}[TOOL_CALLS]get_time[ARGS]{}',
        [*PARIS_CALL, ("get_time", {})],
    ),
    "mistral-behind-text": (
        'I look[TOOL_CALLS]get_weather{"city": "Paris"}',
        ["I look", *PARIS_CALL],
    ),
    "folded-history": (
        '<message role="assistant" tool_call="get_weather" id="call_1">\n'
        '{"city": "Paris"}\n</message>',
        PARIS_CALL,
    ),
    "functions-prefix": (
        '{"name": "functions.get_weather", "arguments": {"city": "Paris"}}',
        PARIS_CALL,
    ),
    "invoke-in-a-namespace": (
        '<antml:function_calls>\n<antml:invoke name="get_weather">\n'
        '<antml:parameter name="city">Paris</antml:parameter>\n'
        "</antml:invoke>\n</antml:function_calls>",
        PARIS_CALL,
    ),
    "function-with-a-name": (
        '<function name="get_weather"><parameter name="city">Paris</parameter>'
        "</function>",
        PARIS_CALL,
    ),
    "invoke-not-closed": (
        '<invoke name="search"><parameter name="query">a</parameter>\n'
        '<invoke name="get_weather">\n<parameter name="city">Paris</parameter>',
        [("search", {"query": "a"}), *PARIS_CALL],
    ),
    "invoke-not-closed-before-tag": (
        '<invoke name="search"><parameter name="query">a</parameter>\n'
        f"<tool_call>{CALL}</tool_call>",
        [("search", {"query": "a"}), *PARIS_CALL],
    ),
    "granite": (f"<|tool_call|>[{CALL}]", PARIS_CALL),
    "phi": (f"<|tool_call|>[{CALL}]<|/tool_call|>\nSoon.", [*PARIS_CALL, "\nSoon."]),
}
TEXTS = {
    "wrong-name": '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
    "wrong-name-longer": '<tool_call>{"name": "get_weathers",'
    ' "arguments": {}}</tool_call>',
    "wrong-name-bare": '{"name": "Alice", "arguments": {"x": 1}}',
    "wrong-name-invoke": '<invoke name="rm"><parameter name="a">1</parameter></invoke>',
    "one-of-list-wrong": f'[{CALL}, {{"name": "rm", "arguments": {{}}}}]',
    "one-of-list-wrong-pretty": f'[\n  {CALL},\n  {{"name": "'
    f'rm", "arguments": {{}}}}\n]',
    "arguments-no-object": '<tool_call>{"name": "search", '
    '"arguments": [1]}</tool_call>',
    "arguments-broken-text": '<tool_call>{"name": "search", '
    '"arguments": "x"}</tool_call>',
    "cut-in-string": '<tool_call>{"name": "write_file", "arguments": {"content": "ab',
    "cut-after-name": '<tool_call>{"name": "get_time",',
    "cut-between-arguments": f"<tool_call>{CALL[:-2]}, ",
    "cut-in-parameter": '<invoke name="search"><parameter name="query">ab',
    "empty-tag": "<tool_call></tool_call> is how a call begins",
    "tag-in-prose": "Models write <tool_call> before a call.",
    "tag-in-backticks": f"Write `<tool_call>{CALL}</tool_call>` to call.",
    "tag-in-quotes": f'It says "<tool_call>{CALL}</tool_call>".',
    **{
        f"tag-behind-{quote}": f"Write {quote}<tool_call>\n{CALL}\n</tool_call>."
        for quote in "'“‘「\\"
    },
    "json-in-backticks": f"Write `{CALL}` to call.",
    "json-in-sentence": f"An object such as {CALL} is a call.",
    "json-then-sentence": f"{CALL} would be a call.",
    "json-in-json": f'{{"example": {CALL}}}',
    "json-in-pretty-json": f'{{\n  "calls_made": [\n    {CALL}\n  ]\n}}',
    "json-assigned": f"call = {CALL}\n",
    "json-then-semicolon-and-text": f"{CALL}; x",
    "python-block": f"```python\ncall = {CALL}\nrun(\n{CALL}\n)\n```",
    "bash-block": f"```bash\ncurl -d '{CALL}' x\n```\nThat is it.",
    "markdown-block": f"```markdown\n<tool_call>\n{CALL}\n</tool_call>\n```",
    "markdown-block-of-four": f"````markdown\n<tool_call>{CALL}</tool_call>\n````",
    "json-block-and-more": f"```json\n{CALL}\n// that is a call\n```",
    "json-block-of-nothing": "```json\n```\nThat is it.",
    "json-block-of-other": '```json\n{"name": "Bob", "age": 3}\n```\nOK',
    "definition": '{"name": "search", "description": "x", "parameters": {}}',
    "definition-in-tag": '<tools>{"name": "search", "description": "x", '
    '"parameters": {}}</tools>',
    "definition-openai": '{"type": "function", "function": {"name": "search", '
    '"parameters": {"type": "object", "properties": {}}}}',
    "definition-short": '{"name": "search", "parameters": {"type": "object", '
    '"properties": {"query": {"type": "string"}}}}',
    "name-only": '{"name": "search"}',
    "result": '{"name": "search", "arguments": {}, "result": 3}',
    "infinite": '{"name": "search", "arguments": {"query": 1e999}}',
    "not-json": "{name} and [tool_calls] and {tool: and <invoke name",
    "unfinished": '{"name": "sea',
    "marker-begun": "a <tool_c",
    "react": 'Thought: look\nAction: search\nAction Input: {"query": "x"}',
    "checkboxes": "- [ ] one\n- [x] two [link](http://a/b) [1][2]",
    "generics": "Map<String, List<tool_call>> m; a < b; <function foo>; x <invoke> y",
    "blank": " \n ",
    "cjk": "「<tool_call>」是标记。{“name”: “search”}",
    "mistral-word": "[TOOL_CALLS] is Mistral's marker",
    "qwen-agent-in-backticks": "Write `✿FUNCTION✿: search ✿ARGS✿: {}` to call.",
    "qwen-agent-word": "✿FUNCTION✿ is a marker, ✿ is a flower",
    "deepseek-word": "<｜tool▁calls▁begin｜> is a token",
}


def sample_table() -> list[Any]:
    rows = [pytest.param(*row, id=name) for name, row in SAMPLES.items()]
    return rows + [
        pytest.param(text, [text], id=f"text-{name}") for name, text in TEXTS.items()
    ]


def test_samples_are_many() -> None:
    assert len(SAMPLES) >= 60


@pytest.mark.parametrize("text, expected", sample_table())
def test_answer_is_read_as_calls_and_text(text: str, expected: list[Expected]) -> None:
    assert read(text) == parts_of(expected)


@pytest.mark.parametrize("text, expected", sample_table())
def test_answer_is_read_the_same_however_it_is_cut(
    text: str, expected: list[Expected]
) -> None:
    wanted = parts_of(expected)
    assert read(*text) == wanted
    for at in range(1, len(text)):
        assert read(text[:at], text[at:]) == wanted, at


def test_white_space_before_json_is_the_same_however_it_is_cut() -> None:
    text = f"x <tool_call>{' ' * 100}y{' ' * 100}{CALL}"
    wanted = read(text)
    for at in range(1, len(text)):
        assert read(text[:at], text[at:]) == wanted, at


@pytest.mark.parametrize("name", SAMPLES)
def test_call_after_prose_is_read(name: str) -> None:
    text, expected = SAMPLES[name]
    got = read(f"Well.\n{text.lstrip()}")
    wanted = ["Well.\n", *expected]
    assert got == joined(parts_of(wanted))


@pytest.mark.parametrize("name", SAMPLES)
def test_call_after_call_is_read(name: str) -> None:
    text, expected = SAMPLES[name]
    first = f"<tool_call>{CALL}</tool_call>"
    assert read(f"{first}\n{text}") == parts_of([*PARIS_CALL, *lead(expected)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"```json\n{CALL}\n```\nDone.", [*PARIS_CALL, "\nDone."]),
        ('get_weather\n\n{"days": 1}', ['get_weather\n\n{"days": 1}']),
    ],
    ids=["fence", "name"],
)
def test_what_stands_behind_a_tag_is_not_in_it(
    text: str, expected: list[Expected]
) -> None:
    call = f"<tool_call>{CALL}</tool_call>"
    wanted = [*PARIS_CALL, *lead(expected), "\n", *PARIS_CALL]
    assert read(f"{call}\n{text}\n{call}") == joined(parts_of(wanted))


def test_fence_at_the_end_of_calls_is_no_text() -> None:
    """Models close one that they have not opened, or opened within the tag."""
    for opener in ("", "```json\n"):
        call = f"<tool_call>\n{opener}{CALL}\n</tool_call>\n```"
        for text in (call, f"{call}\n"):
            assert read(text) == parts_of(PARIS_CALL)


def lead(expected: list[Expected]) -> list[Expected]:
    """After a call the line break before text belongs to the text."""
    first = expected[0]
    return [f"\n{first}", *expected[1:]] if isinstance(first, str) else expected


def test_other_parts_keep_their_order_and_end_what_is_held() -> None:
    calls = reader()
    picture = Media("image", "https://dify.example.com/a.png", "a.png")
    parts: list[Part] = [
        Reasoning("hm"),
        Text("a <tool_"),
        picture,
        Text(CALL[:-1]),
        Usage(1, 2),
        Finish(),
    ]
    got = calls.feed(parts) + calls.close()
    wanted = [Reasoning("hm"), Text("a <tool_"), picture, Text(CALL[:-1])]
    assert joined(got) == [*wanted, Usage(1, 2), Finish()]
    assert calls.found == 0
    got = calls.feed([Reasoning("hm"), Text(f"\n{CALL[:-1]}"), Usage(1, 2), Finish()])
    call = ToolCall("call_1", "get_weather", '{"city": "Paris"}')
    assert joined(got) == [Reasoning("hm"), Text("\n"), call, Usage(1, 2), Finish()]
    assert calls.found == 1


@pytest.mark.parametrize("cut", [1, 5, 20, 40])
def test_reasoning_beside_a_call_does_not_end_it(cut: int) -> None:
    """Such as the step of another branch: it is told while the call is written."""
    text = f"<tool_call>\n{CALL}\n</tool_call>"
    calls = reader()
    got = calls.feed([Text(text[:cut]), Reasoning("Step: Log"), Text(text[cut:])])
    call = ToolCall("call_1", "get_weather", '{"city": "Paris"}')
    assert got + calls.close() == [Reasoning("Step: Log"), call]


def test_long_answer_is_not_kept_for_its_tools() -> None:
    """An answer that can call tools grows as any other, and costs as little."""
    ask = Ask("m", (), tools=(Tool("f"),))
    reading = Reading(ask, "m", is_whole=False, spent=Usage())
    tracemalloc.start()
    try:
        for number in range(4_000):
            assert reading.feed([Text(f"{number} words and more, " * 4)])
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size < 100_000


def test_text_in_small_pieces_is_kept_in_few() -> None:
    """Each would cost several times what its characters do."""
    text = KeptText()
    tracemalloc.start()
    try:
        for number in range(10_000):
            text.add(f"{number:7} ")
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert text.text == "".join(f"{number:7} " for number in range(10_000))
    assert size < 2 * text.size


def test_json_in_what_was_reasoning_is_no_answer() -> None:
    """Not even if it must be mended, and is looked for when all is said."""
    reading = Reading(Ask("m", (), output=ANY), "m", is_whole=False, spent=Usage())
    parts: list[Part] = [Text("They want {'a': 1}."), Recast(19), Text("No."), Finish()]
    assert reading.feed(parts) == []
    assert "not valid JSON" in reading.problem


def test_reasoning_beside_a_stop_does_not_part_it() -> None:
    stop = StopReader(["END"])
    got = stop.feed([Text("a E"), Reasoning("Step: Log"), Text("ND b")])
    assert got == [Text("a "), Reasoning("Step: Log"), Usage(), Finish()]


def test_call_comes_with_its_last_character() -> None:
    calls = reader()
    text = f"<tool_call>\n{CALL}"
    assert calls.feed([Text(text[:-1])]) == []
    call = ToolCall("call_1", "get_weather", '{"city": "Paris"}')
    assert calls.feed([Text(text[-1])]) == [call]


@pytest.mark.parametrize("is_declared", [True, False])
def test_arguments_may_look_like_a_description_if_declared(is_declared: bool) -> None:
    arguments = {"type": "Person", "properties": {"name": "Ada"}}
    properties: dict[str, Any] = {"type": {}, "properties": {}} if is_declared else {}
    calls = CallReader([Tool("add", "", {"properties": properties})], repeat("c"), inf)
    text = json.dumps({"name": "add", "arguments": arguments})
    got = calls.feed([Text(f"<tool_call>{text}</tool_call>")]) + calls.close()
    call: Part = ToolCall("c", "add", json.dumps(arguments))
    assert got == [call if is_declared else Text(f"<tool_call>{text}</tool_call>")]


def test_described_call_is_read_back() -> None:
    call = ToolCall("call_1", "search", '{"query": "\\"<tool_call>中\\n"}')
    assert read(describe_call(call)) == [call]


# Ordinary text...


SCRAPS = (
    "The quick brown fox: it jumps over 3 < 4 dogs, and 5 > 2 cats.",
    "今天天气很好。我们去公园吧！“好的”，他说：「走」。",
    'Set `{"name": "search"}` in `config.json`'
    ", or [see the docs](https://a.b/c?d[]=1).",
    '{"name": "Ada", "age": 36, "tags": ["a", "b"], "nested": {"name": "x"}}',
    '[{"id": 1, "type": "user"}, {"id": 2, "type": "admin"}]',
    '[{"type": "function", "async": true}, {"function": 1}]',
    '{\n  "tool": "hammer",\n  "args": ["--fast"]\n}',
    '{"function": "f(x) = x^2", "domain": [0, 1]}',
    '{"tools": [{"name": "search", "description": "finds", "parameters": {}}]}',
    '```json\n{"name": "opendify", "version": "1.0", "scripts": {"test": "x"}}\n```',
    "```python\ndef get_weather(city):\n    return {'name': city}[\"name\"]\n```",
    '```bash\nfor f in *.py; do [ -f "$f" ] && echo "{$f}"; done\n```',
    '```xml\n<tools>\n  <tool name="saw"/>\n</tools>\n```',
    "```\nplain block with <invoke> and [TOOL_\n```",
    '```html\n<div class="a"><p>{{ name }}</p>'
    "</div>\n<script>f({a: [1]})</script>\n```",
    "<details><summary>More</summary>\n\nText "
    "with <b>bold</b> &amp; <br/>.\n</details>",
    "Use <function name> or <tool> tags; Map<String, List<Integer>> m = new Foo<>();",
    "SELECT name FROM tools WHERE args = '{\"a\": 1}' AND id IN (1, 2);",
    "- [ ] todo\n- [x] done\n1. {first}\n2. [second]",
    "| a | b |\n|---|---|\n| `{` | `[` |",
    "$\\\\frac{a}{b} \\\\in [0, 1]$ and \\\\{x : x < 1\\\\}",
    "if (a[i] < b[j] && c) { name: 'x' } else { tool = 1; }",
    "f\"{name!r:>{width}}\" and {'name': 'Bob'} and {name: 1}",
    "<!-- comment --> <invoker/> <functional> <toolbox> <messages> <message/>",
    '<message from="a">hi</message> <function name="f">x</function>',
    "``double ` tick`` and ```inline``` fences, and ~~~\ntildes\n~~~",
    'Thought: I should search.\nAction: search\nAction Input: {"query": "x"}',
    "search and get_weather are tools. get_weather(city='Paris') is a call.",
    "name: search\narguments:\n  query: x",
    "{" * 5 + "}" * 5 + "[" * 5 + "]" * 5,
    "<|endoftext|> <|im_start|>user <｜begin▁of▁sentence｜> [INST] [/INST] [TOOL]",
    "\x00\u2028\ud83d\udc4d👍🏽 café ﷽",
    "<tool_call><parameter=city>Paris</parameter></tool_call>",
    "<svg><function/></svg> <parameter name='x'>1</parameter> </invoke> </tool_call>",
)
JOINTS = ("\n", "\n\n", " ", "", "\n> ", "\n\n\t", "：", ": ")


def paragraphs(number: int) -> list[str]:
    chance = random.Random(7)
    return [
        "".join(
            chance.choice(SCRAPS) + chance.choice(JOINTS)
            for _ in range(chance.randint(1, 6))
        )
        for _ in range(number)
    ]


def test_ordinary_text_stays_text_to_the_character() -> None:
    for text in paragraphs(1000):
        assert read(text) == [Text(text)]


def test_ordinary_text_stays_text_however_it_is_cut() -> None:
    chance = random.Random(8)
    for text in paragraphs(1000):
        at, pieces = 0, []
        while at < len(text):
            size = chance.choice((1, 1, 2, 3, 5, 8, 40))
            pieces.append(text[at : at + size])
            at += size
        assert read(*pieces) == [Text(text)]


@pytest.mark.parametrize("depth", [600, 3000])  # the latter: Python 3.13 reads it
@pytest.mark.parametrize(("opener", "closer"), [("[", "]"), ('{"calls": ', "}")])
def test_lists_without_end_are_text(opener: str, closer: str, depth: int) -> None:
    text = f"<tool_call>{opener * depth}[]{closer * depth}"
    assert read(text) == [Text(text)]


def test_ordinary_text_is_hardly_held_back() -> None:
    """Nothing is, but a beginning of a marker, or of JSON with a call's first key."""
    for text in paragraphs(300):
        calls, given = reader(), 0
        for at, character in enumerate(text, 1):
            for part in calls.feed([Text(character)]):
                assert isinstance(part, Text)
                given += len(part.text)
            assert at - given <= 100, text[given:at]


@pytest.mark.parametrize("text", ["Hello", "Hello, 世界. It is 5 > 3.", "a\nb\n"])
def test_plain_text_goes_on_at_once(text: str) -> None:
    calls = reader()
    for character in text:
        assert calls.feed([Text(character)]) == [Text(character)]


def test_a_name_that_only_begins_as_a_tools_holds_nothing_back() -> None:
    text = '{"name": "searching", "about": "what was'
    assert reader().feed([Text(text)]) == [Text(text)]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                *"{}[]<>`\"':,\n a",
                CALL,
                "<tool_call>",
                "</tool_call>",
                "```",
                "```json\n",
                "name",
                "get_weather",
                "<invoke name=",
                "[TOOL_CALLS]",
                "✿FUNCTION✿:",
                "✿ARGS✿",
                '<parameter name="a">',
                "</parameter>",
                "<function=search>",
                "\\\\",
            ]
        ),
        max_size=25,
    )
)
def test_any_text_reads_the_same_however_it_is_cut(words: list[str]) -> None:
    text = "".join(words)
    whole = read(text)
    assert read(*text) == whole
    assert read(*words) == whole
    if not any(isinstance(part, ToolCall) for part in whole):
        assert whole == ([Text(text)] if text else [])


@pytest.mark.parametrize(
    "content",
    ["x = {'a': \"b\"} # <tag> \\n" * 2000, "word " * 20_000, "\\" * 50_000],
    ids=["code", "words", "backslashes"],
)
def test_long_arguments_take_no_quadratic_time(content: str) -> None:
    call = json.dumps({"name": "write_file", "arguments": {"content": content}})
    text = f"<tool_call>{call}</tool_call>"
    with at_most(240):
        (part,) = read(*(text[at : at + 4] for at in range(0, len(text), 4)))
        assert isinstance(part, ToolCall)
        assert json.loads(part.arguments) == {"content": content}


def test_long_parameter_takes_no_quadratic_time() -> None:
    content = "<b>word</b> " * 10_000
    text = f'<invoke name="write_file"><parameter name="content">{content}</parameter>'
    with at_most(320):
        (part,) = read(
            *(text[at : at + 4] for at in range(0, len(text), 4)), "</invoke>"
        )
        assert isinstance(part, ToolCall)
        assert json.loads(part.arguments) == {"content": content}


@pytest.mark.parametrize(
    "before, sign, after",
    [
        pytest.param("<function=search><parameter=query>", "a b ", "", id="parameter"),
        pytest.param(CALL, "\n", "", id="behind-json"),
        pytest.param("", "\n", CALL, id="before-json"),
    ],
)
def test_text_without_end_takes_no_quadratic_time(
    before: str, sign: str, after: str
) -> None:
    text = before + sign * (250_000 // len(sign)) + after
    with at_most(240):
        read(*(text[at : at + 4] for at in range(0, len(text), 4)))


def test_blank_json_takes_no_quadratic_time() -> None:
    json_reader = JsonReader(ANY)
    assert json_reader.feed([Text("{")]) == []
    with at_most(80):
        for _ in range(50_000):
            assert json_reader.feed([Text("\n")]) == []


def test_hostile_answers_take_no_quadratic_time() -> None:
    call = '{"name": "search", "arguments": {"query": '
    for text in (f"\n{call}" * 3_000, ":{" * 50_000, "<tool_call" * 10_000):
        with at_most(320):
            assert read(text) == [Text(text)]
            assert read(f'<tool_call>{call}"{text}') == [
                Text(f'<tool_call>{call}"{text}')
            ]


def test_calls_begun_in_calls_take_no_quadratic_time() -> None:
    """Each is read up to the end of all, and found to be none there."""
    text = ('\n{"name": "search",' * 800 + "<") * 4
    with at_most(40):
        assert read(text) == [Text(text)]


def test_call_stands_in_what_was_begun_as_calls() -> None:
    text = '{"name": "search",\n' * 20
    whole = read(f"{text}{CALL}\n{CALL}")
    assert [type(part) for part in whole] == [Text, ToolCall, ToolCall]


@pytest.mark.parametrize(
    "text", ['{"a": "' + '\\"' * 50_000, "{'" + "\\'" * 50_000, "{" + "a-" * 50_000]
)
def test_repair_takes_no_quadratic_time(text: str) -> None:
    with at_most(80):
        found, _ = extract_json(text, OutputFormat("json_object"))
        assert not found


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>search\n<arg_key>" + " " * 4000 + "<x",
        ('<invoke name="' + "a" * 2000) * 500,
        ("<tool_call>search\n<parameter=" + "a" * 2000) * 500,
        "<function=search><parameter=query>" * 30_000,
    ],
)
def test_unfinished_tags_take_no_quadratic_time(text: str) -> None:
    with at_most(160):
        assert read(text) == [Text(text)]


@pytest.mark.parametrize("text", ["a", "a</arg_key> "])
def test_endless_key_takes_no_quadratic_time(text: str) -> None:
    text = "<tool_call>search\n<arg_key>" + text + text[-1] * 60_000
    with at_most(80):
        assert read(*text) == [Text(text)]


def test_text_that_comes_at_once_takes_no_quadratic_time() -> None:
    """As a workflow's output does; what is refused is not copied for each marker."""
    text = "<function=x>" * 60_000
    with at_most(200):
        assert read(text) == [Text(text)]


def test_spaces_around_a_key_are_not_its_own() -> None:
    text = "<tool_call>search\n<arg_key> query </arg_key> <arg_value>x</arg_value>"
    (part,) = read(text + "</tool_call>")
    assert isinstance(part, ToolCall) and part.arguments == '{"query": "x"}'


@pytest.mark.parametrize(
    "schema, text, value",
    [
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "2024", "2024"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", None),
        ({"type": ["string", "null"]}, "true", "true"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"type": ["string", "integer"]}, "1", 1),
        ({"type": "integer"}, "1.5", 1.5),
        ({"type": "integer"}, "three", "three"),
        ({"type": "boolean"}, "True", True),
        ({"type": ["boolean", "string"]}, "it's", "it's"),
        ({"type": "array"}, "['a', None]", ["a", None]),
        ({"$ref": "#/properties/zip"}, "75001", "75001"),  # as Zod's schemas have it
        ({"allOf": [{"$ref": "#/properties/zip"}]}, "null", "null"),
        ({"$ref": "#/$defs/lost"}, "1", 1),
        ({"$ref": "#/properties/x/not", "not": {"type": "integer"}}, "1.5", 1.5),
        ({}, "1", 1),
    ],
)
def test_parameter_has_the_type_that_is_due(schema: Any, text: str, value: Any) -> None:
    properties = {"zip": {"type": "string"}, "x": schema}
    tool = Tool("f", "", {"type": "object", "properties": properties})
    call = f"<function=f>\n<parameter=x>\n{text}\n</parameter>\n</function>"
    (part,) = CallReader([tool], repeat(""), inf).feed([Text(call)])
    assert isinstance(part, ToolCall) and json.loads(part.arguments) == {"x": value}


@pytest.mark.parametrize(
    "name",
    [
        *("server/get:it", "get weather", "查询", "a-b.c"),
        *("cloud_functions.deploy", "functions.deploy"),
    ],
)
def test_name_may_have_any_sign(name: str) -> None:
    text = describe_call(ToolCall("", name, '{"a": 1}'))
    for pieces in ([text], list(text)):
        calls = CallReader([Tool(name, "", {})], repeat(""), inf)
        parts = [part for piece in pieces for part in calls.feed([Text(piece)])]
        assert parts == [ToolCall("", name, '{"a": 1}')]


@pytest.mark.parametrize("lead", ["", "functions."])
@pytest.mark.parametrize("name", ["deploy", "functions.deploy"])
@pytest.mark.parametrize(
    "form",
    [
        '{"name": "%s", "arguments": {"a": 1}}',
        '```json\n{"name": "%s", "arguments": {"a": 1}}\n```',
        '<tool_call>{"name": "%s", "arguments": {"a": 1}}</tool_call>',
        "<tool_call>%s\n<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>",
        '<invoke name="%s"><parameter name="a">1</parameter></invoke>',
        '<|tool_call_begin|>%s:0<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|>',
    ],
    ids=["json", "fenced", "tagged", "word", "invoke", "kimi"],
)
def test_functions_may_lead_a_name_in_every_form(
    form: str, name: str, lead: str
) -> None:
    text = form % (lead + name)
    for pieces in ([text], list(text)):
        calls = CallReader([Tool(name, "", {})], repeat(""), inf)
        parts = [part for piece in pieces for part in calls.feed([Text(piece)])]
        assert parts + calls.close() == [ToolCall("", name, '{"a": 1}')]


def test_json_that_only_begins_with_a_tool_s_name_goes_on_at_once() -> None:
    begun = Text('{"about": "search", ')
    assert reader().feed([begun]) == [begun]


# Stop strings...


def cut(stops: list[str], *pieces: str) -> tuple[list[Part], bool]:
    stop = StopReader(stops)
    parts: list[Part] = []
    for piece in pieces:
        parts += stop.feed([Text(piece)])
        if stop.is_cut:
            break
    return joined(parts + stop.close()), stop.is_cut


END = [Usage(), Finish()]  # of an answer that is cut


@pytest.mark.parametrize(
    "stops, text, before",
    [
        pytest.param(["Observation:"], "a\nObservation: b", "a\n", id="plain"),
        pytest.param(["\n\n"], "a\nb\n\nc", "a\nb", id="overlap"),
        pytest.param(["aab"], "aaab", "a", id="self-overlap"),
        pytest.param(["cd", "bcde"], "abcdef", "ab", id="complete-first"),
        pytest.param(["c", "abc"], "abc", "", id="same-end-longest"),
        pytest.param(["中文"], "说中国中文吧", "说中国", id="cjk"),
        pytest.param(["END", "STOP"], "go STOP END", "go ", id="several"),
        pytest.param(["a"], "a", "", id="at-once"),
    ],
)
def test_answer_is_cut_before_the_first_stop(
    stops: list[str], text: str, before: str
) -> None:
    wanted = ([Text(before), *END] if before else END, True)
    assert cut(stops, text) == wanted
    assert cut(stops, *text) == wanted
    for at in range(1, len(text)):
        assert cut(stops, text[:at], text[at:]) == wanted


@pytest.mark.parametrize("stops", [["xyz"], ["Observation:", "\n\n\n"]])
def test_answer_without_stop_is_whole(stops: list[str]) -> None:
    text = "a\n\nObservatio\n Obs xy"
    assert cut(stops, text) == ([Text(text)], False)
    assert cut(stops, *text) == ([Text(text)], False)


def test_stop_holds_back_partial_matches_only() -> None:
    stop = StopReader(["</end>"])
    got = [stop.feed([Text(piece)]) for piece in ("a<", "/e", "b </", "end> c")]
    assert got == [[Text("a")], [], [Text("</eb ")], END]
    assert stop.is_cut


@pytest.mark.parametrize(
    "end", [Finish(), Finish("length"), Failure(UpstreamFailed("broken"))], ids=str
)
def test_parts_after_the_stop_are_dropped_but_those_beside_the_text(end: Part) -> None:
    stop = StopReader(["X"])
    call = ToolCall("c", "f", "{}")
    parts: list[Part] = [Reasoning("r"), Text("aX"), Text("b"), call, Reasoning("r")]
    parts += [Recast(3), Replace("not that")]
    got = stop.feed([*parts, Citations(()), Usage(1, 1), end])
    known = [Citations(()), Usage(1, 1)]
    assert got == [Reasoning("r"), Text("a"), *known, Finish()]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4),
    st.text("abc", max_size=20),
)
def test_stop_is_that_of_a_model_that_stops_there(stops: list[str], text: str) -> None:
    ends = [n for n in range(len(text) + 1) if text[:n].endswith(tuple(stops))]
    wanted = text
    if ends:
        longest = max(len(s) for s in stops if text[: ends[0]].endswith(s))
        wanted = text[: ends[0] - longest]
    parts = [*([Text(wanted)] if wanted else []), *(END if ends else [])]
    assert cut(stops, *text) == (parts, bool(ends))
    assert cut(stops, text) == cut(stops, *text)


# JSON...


ANY = OutputFormat("json_object", schema={"type": "object"})
PERSON = OutputFormat(
    "json_schema",
    "person",
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
)
LIST = OutputFormat(
    "json_schema", "list", {"type": "array", "items": {"type": "integer"}}
)
WORD = OutputFormat("json_schema", "word", {"type": "string"})
ADA = '{"name": "Ada", "age": 36}'


@pytest.mark.parametrize(
    "text, output, found",
    [
        pytest.param(ADA, PERSON, ADA, id="bare"),
        pytest.param(f" \n{ADA}\n", PERSON, ADA, id="blanks"),
        pytest.param(f"```json\n{ADA}\n```", PERSON, ADA, id="fence"),
        pytest.param(f"```\n{ADA}\n```\nHope it helps!", PERSON, ADA, id="fence-talk"),
        pytest.param(
            f"Here is {{the}} JSON:\n\n{ADA}\n\nBye {{x}}", PERSON, ADA, id="talk"
        ),
        pytest.param(f"当然：{ADA}。", PERSON, ADA, id="cjk"),
        pytest.param(
            '{"a": "}]{", "b": [{}]} {', ANY, '{"a": "}]{", "b": [{}]}', id="nested"
        ),
        pytest.param("{}", ANY, "{}", id="empty"),
        pytest.param("[1, 2]", LIST, "[1, 2]", id="array"),
        pytest.param("See:\n[\n 1]", LIST, "[\n 1]", id="array-talk"),
        pytest.param('"yes"', WORD, '"yes"', id="scalar"),
        pytest.param('{"a": 1,}', ANY, '{"a": 1}', id="comma"),
        pytest.param("```\n{'a': True}\n```", ANY, '{"a": true}', id="python"),
        pytest.param('{"a": "x\ny"}', ANY, '{"a": "x\\ny"}', id="raw-line-break"),
        pytest.param('{"a": {"b": [1', ANY, '{"a": {"b": [1]}}', id="not-closed"),
    ],
)
def test_json_is_found_in_answer(text: str, output: OutputFormat, found: str) -> None:
    assert extract_json(text, output) == (found, "")


@pytest.mark.parametrize(
    "text, output, problem",
    [
        pytest.param("", ANY, "there is no JSON in it", id="empty"),
        pytest.param(
            '{"name": "Ada"}', PERSON, '$ breaks required ["name", "age"]', id="missing"
        ),
        pytest.param(
            '{"name": 1, "age": 1.5, "x": 0}',
            PERSON,
            '$.name breaks type "string"; $.age '
            'breaks type "integer"; $.x is not allowed',
            id="several",
        ),
        pytest.param("[1]", ANY, '$ breaks type "object"', id="array"),
    ],
)
def test_json_that_breaks_the_schema_is_none(
    text: str, output: OutputFormat, problem: str
) -> None:
    assert extract_json(text, output) == ("", problem)


@pytest.mark.parametrize("text", ["I can't do that.", "{ a", '{"a": NaN}', "{]"])
def test_answer_that_is_not_json_is_none(text: str) -> None:
    json_text, problem = extract_json(text, ANY)
    assert json_text == ""
    assert problem.startswith("it is not valid JSON")


def test_json_nested_without_end_is_none() -> None:
    assert extract_json("[" * 100_000, ANY)[0] == ""
    assert extract_json('{"a":' * 100_000, ANY)[0] == ""


def stream(output: OutputFormat, *pieces: str) -> list[Part]:
    json_reader = JsonReader(output)
    parts = [part for piece in pieces for part in json_reader.feed([Text(piece)])]
    assert json_reader.text == "".join(p.text for p in parts if isinstance(p, Text))
    return parts


@pytest.mark.parametrize(
    "text, output, found",
    [
        pytest.param(f"```json\n{ADA}\n```", PERSON, ADA, id="fence"),
        pytest.param(f"Sure {{name}}:\n{ADA} ok {{}}", PERSON, ADA, id="talk"),
        pytest.param("[1] is: [ 1, [2]]", ANY, "", id="none"),
        pytest.param('x [\n {"a": "\\"]"}] y', LIST, '[\n {"a": "\\"]"}]', id="array"),
    ],
)
def test_json_is_streamed_without_what_is_around(
    text: str, output: OutputFormat, found: str
) -> None:
    wanted = [Text(found)] if found else []
    assert joined(stream(output, text)) == wanted
    assert joined(stream(output, *text)) == wanted
    for at in range(1, len(text)):
        assert joined(stream(output, text[:at], text[at:])) == wanted


def test_json_is_streamed_as_soon_as_it_is_certain() -> None:
    got = stream(PERSON, "```json\n{", '"na', 'me": ', '"Ada"', "}\n", "```")
    assert got == [Text('{"na'), Text('me": '), Text('"Ada"'), Text("}")]


def test_json_in_what_turns_out_to_be_reasoning_is_not_read() -> None:
    reader = JsonReader(ANY)
    assert not reader.feed([Text("I think of {"), Recast(12), Text("So: ")])
    assert reader.feed([Text('{"a": 1}')]) == [Text('{"a": 1}')]
    assert not reader.feed([Recast(12), Text('{"b": 1}')])  # too late to say another
    assert not reader.feed([Recast(8), Text('{"c": 1}')])  # still
    assert reader.text == ""


def test_other_parts_pass_the_json_reader() -> None:
    parts: list[Part] = [Reasoning("r"), Text("x"), Usage(1, 1), Finish()]
    assert JsonReader(ANY).feed(parts) == [Reasoning("r"), Usage(1, 1), Finish()]


TOLD = f"<tool_call>{CALL}</tool_call>"


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        pytest.param(Ask("m", (), output=ANY), ['{"a": ', TOLD], id="broken-json"),
        pytest.param(Ask("m", (), output=ANY), ['{"a": 1}', TOLD], id="json"),
        pytest.param(Ask("m", (), output=ANY), [TOLD, '\n{"a": 1}'], id="json-behind"),
        pytest.param(
            Ask("m", (), tool_mode="required"), [TOLD, Recast(99), "No."], id="thought"
        ),
    ],
)
def test_answer_that_comes_at_once_is_judged_as_a_whole_one(
    ask: Ask, said: list[str | Part]
) -> None:
    texts = (Text(part) if isinstance(part, str) else part for part in said)
    parts = [*texts, Usage(1, 2), Finish()]

    def judged(reading: Reading, *reads: list[Part]) -> tuple[list[Part], str, Usage]:
        given = [part for read in reads for part in reading.feed(read)]
        return given, reading.problem, reading.usage

    asked = ask._replace(tools=TOOLS)
    at_once = Reading(asked, "m", is_whole=False, spent=Usage())
    whole, in_pieces = (
        Reading(asked, "m", is_whole=True, spent=Usage()) for _ in range(2)
    )
    wanted = judged(whole, [*parts])
    assert judged(at_once, [*parts]) == wanted
    assert judged(in_pieces, *([part] for part in parts)) == wanted


@pytest.mark.parametrize("is_at_once", [False, True])
@pytest.mark.parametrize(
    ("ask", "before", "given"),
    [
        pytest.param(
            Ask("m", (), tools=TOOLS),
            [Text(f"Well.<tool_call>{CALL[:-1]}")],
            [Text("Well.")],
            id="tools",
        ),
        pytest.param(Ask("m", (), stops=("X!",)), [Text("aX")], [Text("a")], id="stop"),
        pytest.param(
            Ask("m", (), tools=TOOLS, tool_mode="required"),
            [Reasoning("Hm."), Text("Bad. "), Recast(5), Text("Bad.")],
            [Reasoning("Hm.")],
            id="required",
        ),
        pytest.param(Ask("m", (), output=ANY), [Text("So")], [], id="json"),
        pytest.param(
            Ask("m", (), output=PERSON),
            [Text('So: {"name": "no')],
            [Text('{"name": "no')],
            id="json-begun",
        ),
    ],
)
def test_text_that_is_replaced_takes_with_it_what_is_held_back(
    ask: Ask, before: list[Part], given: list[Part], is_at_once: bool
) -> None:
    """And what comes in its place passes as it is: it says that this is withheld."""
    reading = Reading(ask, "m", is_whole=False, spent=Usage(2, 2))
    text: list[Part] = [Replace("So: "), Text(f"no.{TOLD}X!"), Recast(2), Replace("No")]
    parts = [*before, *text, Usage(1, 1), Finish("content_filter")]
    batches = [parts] if is_at_once else [[part] for part in parts]
    got = [out for batch in batches for out in reading.feed(batch)]
    assert got == [*given, *text, Usage(3, 3), Finish("content_filter")]
    assert not (reading.problem or reading.is_cut)


def test_answer_that_was_cut_is_replaced_by_nothing() -> None:
    reading = Reading(Ask("m", (), stops=("X",)), "m", is_whole=True, spent=Usage())
    got = reading.feed([Text("aX"), Replace("No"), Finish("content_filter")])
    assert got == [Text("a"), Usage(), Finish()]


FORM = Tool("form", "", PERSON.schema)
INPUT = {"type": "object", "properties": {"input": {"type": "string"}}}
PATCH = Tool("apply_patch", "", INPUT, is_custom=True)


def demanded(text: str, *tools: Tool, stop: str = "") -> tuple[list[Part], str]:
    """The parts of an answer that has to call one of the tools, and its problem."""
    stops = (stop,) if stop else ()
    ask = Ask("m", (), tools=tools, tool_mode="required", stops=stops)
    reading = Reading(ask, "m", is_whole=False, spent=Usage())
    return reading.feed([Text(text), Usage(1, 2), Finish()]), reading.problem


@pytest.mark.parametrize(
    ("text", "tool", "arguments"),
    [
        pytest.param(ADA, FORM, ADA, id="bare"),
        pytest.param(f"Here:\n```json\n{ADA}\n```", FORM, ADA, id="fenced"),
        pytest.param(f"```json\n{ADA}", FORM, ADA, id="open-fence"),
        pytest.param('{\n  "city":"Oslo"}', TOOLS[0], '{"city": "Oslo"}', id="lines"),
        pytest.param('{"query": ""}', TOOLS[2], '{"query": ""}', id="optional"),
        pytest.param('{"input": "a"}', PATCH, '{"input": "a"}', id="custom"),
    ],
)
def test_arguments_alone_are_the_call_of_the_only_tool(
    text: str, tool: Tool, arguments: str
) -> None:
    """Models that are made to fill in a form write just that."""
    parts, problem = demanded(text, tool)
    call = ToolCall(next(call_ids("m")), tool.name, arguments, tool.is_custom)
    given = [part for part in parts if part != Reasoning("")]
    assert (given, problem) == ([call, Usage(1, 2), Finish()], "")


@pytest.mark.parametrize(
    ("text", "tools", "stop"),
    [
        pytest.param('{"city": "Oslo"}', TOOLS[:2], "", id="two-tools"),
        pytest.param('{"name": "Ada"}', (FORM,), "", id="lacks-a-key"),
        pytest.param('{"name": "Ada", "age": "36"}', (FORM,), "", id="wrong-type"),
        pytest.param('{"error": "no data"}', TOOLS[2:3], "", id="unknown-key"),
        pytest.param("{}", TOOLS[1:2], "", id="no-key"),
        pytest.param('{"a": 1}', (Tool("f"),), "", id="no-parameters"),
        pytest.param(f"[{ADA}]", (FORM,), "", id="list"),
        pytest.param(ADA[:-1], (FORM,), "", id="unfinished"),
        pytest.param('{"query": "a b"}', TOOLS[2:3], " b", id="stopped"),
        pytest.param(f"{ADA}\n{ADA}", (FORM,), "", id="two"),
        pytest.param(f"{{'a': 1}}\n{ADA}", (FORM,), "", id="beside-other-json"),
    ],
)
def test_what_may_be_no_call_is_asked_for_again(
    text: str, tools: tuple[Tool, ...], stop: str
) -> None:
    names = ", ".join([tool.name for tool in tools])
    assert demanded(text, *tools, stop=stop) == ([], f"Call {names}.")


@pytest.mark.parametrize(("output", "begin"), [(ANY, '{"a": '), (LIST, "[1, ")])
def test_json_that_shows_where_it_begins_is_given_as_it_comes(
    output: OutputFormat, begin: str
) -> None:
    ask = Ask("m", (), output=output)
    reading = Reading(ask, "m", is_whole=False, spent=Usage())
    assert reading.feed([Text(begin)]) == [Text(begin)]


def test_json_that_a_call_breaks_off_is_not_judged() -> None:
    ask = Ask("m", (), output=ANY, tools=TOOLS)
    reading = Reading(ask, "m", is_whole=False, spent=Usage())
    assert reading.feed([Text('{"a": 1, ')]) == [Text('{"a": 1, ')]
    (call,) = reading.feed([Text(TOLD)])
    assert isinstance(call, ToolCall)
    assert reading.feed([Finish()]) == [Finish()]


def test_call_beside_json_of_any_type_waits_for_the_end() -> None:
    """Talk may stand beside both, and only the end shows where such JSON begins."""
    ask = Ask("m", (), output=WORD, tools=TOOLS)
    reading = Reading(ask, "m", is_whole=False, spent=Usage())
    assert reading.feed([Text("Let me look.")]) == reading.feed([Text(TOLD)]) == []
    parts = [part for part in reading.feed([Finish()]) if part != Reasoning("")]
    assert [type(part) for part in parts if part != Text("")] == [ToolCall, Finish]


# The validator, against the one everybody uses...


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([0.5, 1.0]),
    st.sampled_from(["", "a", "ab", "2024"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    ),
    max_leaves=6,
)
TYPES = ("string", "number", "integer", "boolean", "null", "object", "array")
simple = st.one_of(
    st.sampled_from(TYPES).map(lambda kind: {"type": kind}),
    st.lists(st.sampled_from(TYPES), min_size=1, max_size=3, unique=True).map(
        lambda kinds: {"type": kinds}
    ),
    st.lists(scalars, min_size=1, max_size=3).map(lambda rows: {"enum": rows}),
    scalars.map(lambda one: {"const": one}),
    st.sampled_from(
        [
            {},
            True,
            False,
            {"minimum": 1},
            {"maximum": 1},
            {"exclusiveMinimum": 0},
            {"exclusiveMaximum": 2},
            {"multipleOf": 2},
            {"minLength": 1},
            {"maxLength": 1},
            {"minItems": 1},
            {"maxItems": 1},
            {"pattern": "^[a-z]+$"},
            {"pattern": "\\d{4}"},
            {"$ref": "#/$defs/tree"},
            {"$ref": "#/$defs/a~1b"},
            {"format": "email", "title": "x"},
        ]
    ),
)
schemas = st.recursive(
    simple,
    lambda inner: st.one_of(
        st.builds(
            lambda properties, required, others: {
                "type": "object",
                "properties": properties,
                "required": required,
                "additionalProperties": others,
            },
            st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
            st.lists(st.sampled_from("abc"), max_size=2, unique=True),
            st.one_of(st.booleans(), inner),
        ),
        inner.map(lambda one: {"type": "array", "items": one}),
        st.builds(
            lambda first, rest: {"prefixItems": first, "items": rest},
            st.lists(inner, min_size=1, max_size=2),
            inner,
        ),
        st.lists(inner, min_size=1, max_size=2).map(lambda rows: {"anyOf": rows}),
        st.lists(inner, min_size=1, max_size=2).map(lambda rows: {"allOf": rows}),
    ),
    max_leaves=5,
)
DEFS = {
    "tree": {
        "type": "object",
        "properties": {"a": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}},
        "required": ["a"],
        "additionalProperties": False,
    },
    "a/b": {"type": ["integer", "string"]},
}


@settings(max_examples=400, deadline=None)
@given(values, schemas)
def test_validator_agrees_with_jsonschema(value: Any, schema: Any) -> None:
    root = {"anyOf": [schema], "$defs": DEFS}
    oracle = jsonschema.Draft202012Validator(root)
    assert (not schema_problems(value, root)) == oracle.is_valid(value)


@pytest.mark.parametrize(
    "value, schema, problems",
    [
        pytest.param(None, {"type": "string", "nullable": True}, [], id="nullable"),
        pytest.param(1, {"oneOf": [{"type": "integer"}]}, [], id="one-of"),
        pytest.param(
            {"a": [{"b": 1}]},
            {"properties": {"a": {"items": {"properties": {"b": {"type": "string"}}}}}},
            ['$.a[0].b breaks type "string"'],
            id="path",
        ),
        pytest.param("c", {"enum": ["a", 1]}, ['$ breaks enum ["a", 1]'], id="enum"),
        pytest.param(9, {"maximum": 5}, ["$ breaks maximum 5"], id="limit"),
        pytest.param("1", {"pattern": "^a"}, ['$ breaks pattern "^a"'], id="pattern"),
        pytest.param(
            1,
            {"anyOf": [{"type": "string"}, {"type": "null"}]},
            ['$ breaks anyOf [{"type": "string"}, {"type": "null"}]'],
            id="any-of",
        ),
        pytest.param(
            [1] * 9,
            {"items": {"type": "null"}},
            [f'$[{n}] breaks type "null"' for n in range(5)],
            id="first-few",
        ),
        pytest.param(1, {"$ref": "#"}, [], id="endless"),
        pytest.param(1, {"$ref": "#/$defs/x"}, [], id="unresolved"),
        pytest.param({}, {"required": 3}, [], id="no-sense"),
        pytest.param(1, {"$ref": 3}, [], id="reference-to-nothing"),
        pytest.param(1, {"multipleOf": 0}, [], id="no-step"),
        pytest.param([1], {"prefixItems": {"0": {}}}, [], id="no-list-of-schemas"),
        pytest.param("a" * 40 + "b", {"pattern": "^(a+)+$"}, [], id="slow-pattern"),
        pytest.param("a" * 40 + "b", {"pattern": "("}, [], id="broken-pattern"),
        pytest.param(19.99, {"multipleOf": 0.01}, [], id="decimal-step"),
        pytest.param(
            1.005,
            {"multipleOf": 0.01},
            ["$ breaks multipleOf 0.01"],
            id="between-steps",
        ),
        pytest.param(1, {"exclusiveMinimum": True}, [], id="draft-4"),
        pytest.param(1, {"exclusiveMaximum": 2, "exclusiveMinimum": 0}, [], id="in"),
        pytest.param(
            2,
            {"exclusiveMaximum": 2, "exclusiveMinimum": 2},
            ["$ breaks exclusiveMaximum 2", "$ breaks exclusiveMinimum 2"],
            id="at-the-limit",
        ),
        pytest.param(1, {"$ref": "#item"}, [], id="anchor"),
        pytest.param(1, {"$ref": "other.json#/type"}, [], id="elsewhere"),
        pytest.param(
            1,
            {"$ref": "#/$defs/a~01b~1c", "$defs": {"a~1b/c": {"type": "string"}}},
            ['$ breaks type "string"'],
            id="escaped-name",
        ),
        pytest.param(
            {"k1": "x", "k": 1, "z": 1},
            {
                "properties": {"k": {"type": "string"}},
                "patternProperties": {"^k": {"type": "integer"}},
                "additionalProperties": False,
            },
            [
                '$.k1 breaks type "integer"',
                '$.k breaks type "string"',
                "$.z is not allowed",
            ],
            id="pattern-properties",
        ),
        pytest.param(
            {"k" * 1000: 1},
            {"additionalProperties": {"enum": ["e" * 1000]}},
            [f'$.{"k" * 198} breaks enum ["{"e" * 198}'],
            id="only-the-beginning-of-what-is-long",
        ),
    ],
)
def test_problems_say_what_and_where(
    value: Any, schema: dict[str, Any], problems: list[str]
) -> None:
    assert schema_problems(value, schema) == problems


def test_validator_takes_no_exponential_time() -> None:
    both = {"anyOf": [{"items": {"$ref": "#"}}, {"items": {"$ref": "#"}}], "not": {}}
    schema = {**both, "type": "array"}
    value: Any = 1
    for _ in range(40):
        value = [value]
    with at_most(160):
        schema_problems(value, schema)


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        pytest.param(1, {"enum": [f"x{n}" for n in range(9000)]}, id="enum"),
        pytest.param({}, {"required": [f"x{n}" for n in range(9000)]}, id="required"),
        pytest.param(1, {**{f"x{n}": 1 for n in range(9000)}, "enum": []}, id="keys"),
        pytest.param("a" * 100, {"pattern": "a*a*b"}, id="pattern"),
        pytest.param(
            {"a" * 100: 1},
            {"patternProperties": {f"a*a*{n}|a": {"enum": []} for n in range(200)}},
            id="pattern-properties",
        ),
        pytest.param(
            {"a" * 5_000_000: 1}, {"additionalProperties": {"enum": []}}, id="name"
        ),
        pytest.param(1, {"$ref": "#" + "/a" * 100_000}, id="reference"),
        pytest.param(
            [[*range(1000, 500_000), 1]],
            {"const": [[*range(1000, 500_000), 2]]},
            id="const",
        ),
    ],
)
def test_validator_pays_for_large_rules(value: Any, schema: dict[str, Any]) -> None:
    """Ten thousand references to one rule are a schema of few kilobytes."""
    inner = {"anyOf": [{"$ref": "#/$defs/rule"}] * 100}
    root = {"anyOf": [{"$ref": "#/$defs/inner"}] * 100}
    with at_most(240):
        schema_problems(value, {**root, "$defs": {"inner": inner, "rule": schema}})
        schema_problems([value] * 10_000, {"items": schema})


def test_parameters_of_an_answer_share_what_their_checks_may_take() -> None:
    rules = {"anyOf": [{"type": "null"}] * 100_000}
    tool = Tool("f", parameters={"properties": {"a": rules}})
    text = "<function=f>" + "<parameter=a>1</parameter>" * 100 + "</function>"
    calls = CallReader([tool], call_ids("m"), inf)
    with at_most(240):
        (part,) = calls.feed([Text(text)])
    assert isinstance(part, ToolCall) and part.arguments == '{"a": 1}'


TEXT = {"type": "string"}
DESCRIBED = {"type": "string", "description": "a" * 500}
DATE = {"type": "string", "pattern": r"^\d{4}-\d\d-\d\d$"}


def test_validator_pays_for_many_rules() -> None:
    """Each takes its time, though what it is compared with is small."""
    lists = {"enum": [0.5] * 17 + [1], "required": ["a"] * 18}
    small = {**lists, "type": ["array"] * 17 + ["integer"]}
    sizes = {f"{end}{of}": 1 for end in ("min", "max") for of in ("Length", "Items")}
    limits = {"minimum": 0, "maximum": 1, "exclusiveMinimum": 0, "exclusiveMaximum": 2}
    rules = {**small, **sizes, **limits, "const": 1, "multipleOf": 1}
    assert schema_problems([1] * 9_000 + [2], {"items": rules})
    assert not schema_problems([1] * 18_000 + [2], {"items": rules})


@pytest.mark.parametrize(
    ("rows", "wrong", "schema"),
    [
        pytest.param(
            [{"a": "x", "b": "y"}] * 1500,
            {"a": 1},
            {"properties": {"a": DESCRIBED, "b": DESCRIBED}},
            id="described",
        ),
        pytest.param(["2024-01-31"] * 1500, "bad", DATE, id="pattern"),
        pytest.param(
            [{f"a{n}": "x" for n in range(5)}] * 500,
            {"a9": 1},
            {"patternProperties": {"^a[0-9]+$": TEXT}},
            id="pattern-properties",
        ),
        pytest.param(["a" * 2_000_000], 1, TEXT, id="long"),
    ],
)
def test_fault_at_the_end_of_a_long_answer_is_found(
    rows: list[Any], wrong: Any, schema: dict[str, Any]
) -> None:
    (problem,) = schema_problems([*rows, wrong], {"items": schema})
    assert problem.startswith(f"$[{len(rows)}]")


# What is asked, and the words...


def chat_tool(name: str) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object"}},
    }


def test_choice_of_many_tools_takes_no_quadratic_time() -> None:
    tools = [chat_tool(f"f{number}") for number in range(10_000)]
    choice = {"type": "allowed_tools", "allowed_tools": {"tools": tools}}
    with at_most(20):
        chosen, _ = parse_tools({"tools": tools, "tool_choice": choice})
    assert len(chosen) == 10_000


A, B = (Tool(name, "", {"type": "object"}) for name in "ab")
BOTH = {"tools": [chat_tool("a"), chat_tool("b")]}


def in_namespace(name: str, tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": "namespace", "name": name, "tools": [tool]}


@pytest.mark.parametrize(
    "body, expected",
    [
        pytest.param({}, ((), "auto"), id="nothing"),
        pytest.param({"tools": None, "tool_choice": None}, ((), "auto"), id="nulls"),
        pytest.param({"tools": [], "tool_choice": "auto"}, ((), "auto"), id="empty"),
        pytest.param(
            {"tools": [], "tool_choice": "none"}, ((), "auto"), id="none-of-none"
        ),
        pytest.param(BOTH, ((A, B), "auto"), id="chat"),
        pytest.param({**BOTH, "tool_choice": "none"}, ((), "none"), id="none"),
        pytest.param(
            {**BOTH, "tool_choice": "required"}, ((A, B), "required"), id="required"
        ),
        pytest.param({**BOTH, "tool_choice": "any"}, ((A, B), "required"), id="any"),
        pytest.param(
            {**BOTH, "tool_choice": {"type": "function", "function": {"name": "b"}}},
            ((B,), "required"),
            id="named",
        ),
        pytest.param(
            {**BOTH, "tool_choice": {"type": ["custom"], "name": 1}},
            ((A, B), "auto"),
            id="no-sense",
        ),
        pytest.param(
            {**BOTH, "tool_choice": {"type": "function"}},
            ((A, B), "auto"),
            id="no-name",
        ),
        pytest.param(
            {**BOTH, "tool_choice": {"type": "allowed_tools", "tools": 5}},
            ((A, B), "auto"),
            id="allowed-no-sense",
        ),
        pytest.param(
            {**BOTH, "tool_choice": {"type": "allowed_tools", "tools": ["a"]}},
            ((), "auto"),
            id="allowed-no-object",
        ),
        pytest.param(
            {**BOTH, "tool_choice": {"type": "custom", "name": "b"}},
            ((B,), "required"),
            id="custom",
        ),
        pytest.param(
            {**BOTH, "tool_choice": {"type": "function", "name": "b"}},
            ((B,), "required"),
            id="named-responses",
        ),
        pytest.param(
            {
                **BOTH,
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "required", "tools": [chat_tool("a")]},
                },
            },
            ((A,), "required"),
            id="allowed",
        ),
        pytest.param(
            {
                **BOTH,
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [
                        {"type": "function", "name": "a"},
                        {"type": "web_search"},
                    ],
                },
            },
            ((A,), "auto"),
            id="allowed-responses",
        ),
        pytest.param(
            {
                "functions": [{"name": "a", "parameters": {"type": "object"}}],
                "function_call": {"name": "a"},
            },
            ((A,), "required"),
            id="legacy",
        ),
        pytest.param(
            {
                "tools": [
                    {"type": "function", "name": "a", "parameters": {"type": "object"}}
                ]
            },
            ((A,), "auto"),
            id="responses",
        ),
        pytest.param(
            {
                "tools": [
                    {"type": "web_search"},
                    1,
                    None,
                    {},
                    {"type": "namespace", "tools": [{"name": "b"}]},
                    {"type": "function", "function": None},
                ],
                "tool_choice": {"type": "web_search"},
            },
            ((), "auto"),
            id="other-types",
        ),
        pytest.param(
            {
                "tools": [
                    {"type": "custom", "name": "c"},
                    {
                        "type": "custom",
                        "custom": {
                            "name": "d",
                            "description": "D",
                            "format": {
                                "type": "grammar",
                                "grammar": {"syntax": "regex", "definition": "a+"},
                            },
                        },
                    },
                ],
                "tool_choice": {"type": "custom", "custom": {"name": "d"}},
            },
            ((text_tool("d", "D", "It must fit this regex grammar: a+"),), "required"),
            id="custom",
        ),
        pytest.param(
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": "a",
                            "parameters": None,
                            "description": None,
                        },
                    }
                ]
            },
            ((Tool("a"),), "auto"),
            id="bare-function",
        ),
        pytest.param(
            {"tools": [in_namespace("n" * 128, {"name": "b"}), {"name": "c"}]},
            ((Tool(f"{'n' * 128}.b", namespace="n" * 128), Tool("c")), "auto"),
            id="namespace",
        ),
        pytest.param(
            {
                "tools": [
                    in_namespace("n", in_namespace("m", {"name": "b"})),
                    in_namespace("n" * 129, {"name": "b"}),
                ]
            },
            ((), "auto"),
            id="namespace-too-long-or-inside-another",
        ),
        pytest.param(
            {"tools": [{"name": "b", "namespace": "n"}]},
            ((Tool("b"),), "auto"),
            id="namespace-that-the-name-lacks",
        ),
    ],
)
def test_tools_are_parsed(body: dict[str, Any], expected: Any) -> None:
    assert parse_tools(body) == expected


@pytest.mark.parametrize(
    "body, param, code",
    [
        pytest.param({"tools": "a"}, "tools", "invalid_type", id="type"),
        pytest.param(
            {"tool_choice": "required"}, "tool_choice", "invalid_value", id="no-tools"
        ),
        pytest.param(
            {**BOTH, "tool_choice": "maybe"}, "tool_choice", "invalid_value", id="mode"
        ),
        pytest.param(
            {**BOTH, "tool_choice": {"type": "function", "function": {"name": "c"}}},
            "tool_choice",
            "invalid_value",
            id="unknown",
        ),
        pytest.param(
            {**BOTH, "tool_choice": {"type": "custom", "custom": {"name": "c"}}},
            "tool_choice",
            "invalid_value",
            id="custom",
        ),
        pytest.param(
            {**BOTH, "function_call": {"name": "c"}},
            "function_call",
            "invalid_value",
            id="legacy",
        ),
        pytest.param(
            {**BOTH, "tool_choice": "function"},
            "tool_choice",
            "invalid_value",
            id="kind",
        ),
    ],
)
def test_tools_are_refused(body: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_tools(body)
    assert (caught.value.param, caught.value.code) == (param, code)


@pytest.mark.parametrize(
    "body, expected",
    [
        pytest.param({}, OutputFormat(), id="nothing"),
        pytest.param(
            {"response_format": None, "text": None}, OutputFormat(), id="nulls"
        ),
        pytest.param({"response_format": {"type": "text"}}, OutputFormat(), id="text"),
        pytest.param({"text": {"verbosity": "low"}}, OutputFormat(), id="verbosity"),
        pytest.param({"response_format": {"type": "json_object"}}, ANY, id="object"),
        pytest.param(
            {"response_format": {"type": "json_object", "schema": {"type": "string"}}},
            OutputFormat("json_schema", schema={"type": "string"}),
            id="object-with-schema",
        ),
        pytest.param(
            {"response_format": {"type": "json_object", "value": {"type": "string"}}},
            OutputFormat("json_schema", schema={"type": "string"}),
            id="object-with-value",
        ),
        pytest.param(
            {"response_format": {"type": "json_schema", "schema": {}}},
            OutputFormat("json_schema", schema={}),
            id="schema-of-anything",
        ),
        pytest.param(
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {
                        "name": "person",
                        "strict": True,
                        "schema": PERSON.schema,
                    },
                }
            },
            PERSON,
            id="chat",
        ),
        pytest.param(
            {
                "text": {
                    "format": {
                        "type": "json_schema",
                        "name": "person",
                        "schema": PERSON.schema,
                        "description": None,
                    }
                }
            },
            replace(PERSON, param="text.format"),
            id="responses",
        ),
        pytest.param(
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {
                        "name": "a",
                        "description": "b",
                        "schema": {"type": "object"},
                    },
                }
            },
            OutputFormat("json_schema", "a", {"description": "b", "type": "object"}),
            id="description",
        ),
    ],
)
def test_output_format_is_parsed(body: dict[str, Any], expected: OutputFormat) -> None:
    assert parse_output_format(body) == expected


@pytest.mark.parametrize(
    "row, param",
    [
        pytest.param({"type": "grammar"}, "response_format.type", id="kind"),
        pytest.param(
            {"type": "json_schema"},
            "response_format.json_schema.schema",
            id="no-schema",
        ),
        pytest.param(
            {"type": "json_schema", "json_schema": {"name": "a", "schema": "b"}},
            "response_format.json_schema.schema",
            id="text-schema",
        ),
        pytest.param(
            {"type": "json_schema", "json_schema": "b"},
            "response_format.json_schema.schema",
            id="text",
        ),
        pytest.param(7, "response_format.type", id="number"),
    ],
)
def test_output_format_is_refused(row: Any, param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_output_format({"response_format": row})
    assert caught.value.param == param


def test_words_say_which_tools_there_are() -> None:
    words = describe_tools([Tool("f", "Does f.", {"type": "object"})], "auto")
    row = '{"name": "f", "description": "Does f.", "parameters": {"type": "object"}}'
    assert f"<tools>\n{row}\n</tools>" in words
    assert words.endswith("answer as usual, without such a block.")
    assert describe_tools(TOOLS, "required").endswith("write nothing but the blocks.")
    assert describe_tools((), "auto") == ""
    assert (
        describe_tools((), "none")
        == "Write no <tool_call> block this time: answer without one."
    )


@pytest.mark.parametrize("is_serial", [False, True])
@pytest.mark.parametrize("mode", ["auto", "required"])
def test_described_tools_are_read_back(mode: str, is_serial: bool) -> None:
    words = describe_tools([TOOLS[0]], "auto", is_serial=not is_serial)
    words += describe_tools(TOOLS, mode, is_serial=is_serial)
    asked = told_ask(f"<message>\n{words}\n</message>\n\nHi")
    assert (asked.tools, asked.is_serial) == ((*TOOLS,), is_serial)
    assert asked.tool_mode == mode
    assert asked.output == OutputFormat()


@pytest.mark.parametrize("schema", [{"type": "object"}, {"type": "array"}])
def test_described_format_is_read_back(schema: dict[str, Any]) -> None:
    words = describe_format(OutputFormat("json_schema", "n", schema))
    output = told_ask(f"{words}\n\nHi").output
    assert output.kind == "json_schema"
    assert (output.schema == schema) == (schema["type"] == "object")


@pytest.mark.parametrize(
    "lines", ["", "{", "[]", "...", "[" * 50_000], ids=lambda text: text[:3]
)
def test_what_is_not_described_is_no_tool(lines: str) -> None:
    opener = describe_tools(TOOLS, "auto").partition("{")[0]
    block = f"\n<tools>\n{lines}\n</tools>\n"
    for text in (f"{opener}{lines}\n</tools>\n", block, opener + lines):
        assert told_ask(text) == Ask("", ())
    assert told_ask(describe_tools(TOOLS, "auto") + block).tools == (*TOOLS,)


def test_a_described_tool_that_was_cut_hides_no_other() -> None:
    words = describe_tools(TOOLS, "auto")
    cut = words.replace("\n</tools>\n", '\n{"name": "cu\n</tools>\n')
    assert told_ask(cut).tools == (*TOOLS,)


def test_words_are_not_read_as_calls() -> None:
    """Models repeat their instructions when they are asked for them."""
    words = describe_tools(TOOLS, "auto")
    assert read(words) == [Text(words)]


def test_words_say_which_format_is_due() -> None:
    assert describe_format(OutputFormat()) == ""
    assert describe_format(ANY) == (
        "Write your final answer as JSON and nothing else: one JSON object, without an "
        "introduction, an explanation or a code fence."
    )
    words = describe_format(PERSON)
    assert words.endswith(json.dumps(PERSON.schema))
    assert "(person)" in words


def test_words_of_the_further_try_hold_the_reason() -> None:
    for mode, demand in (("required", "calls no tool"), ("auto", "is not the JSON")):
        told = retry_text(Ask("", (), tool_mode=mode, output=ANY), "BECAUSE")
        assert demand in told and "BECAUSE" in told and is_retry(told)


def test_json_problem_is_strict() -> None:
    assert json_problem(ADA, PERSON) == ""
    assert json_problem("{'a': 1}", ANY).startswith("it is not valid JSON")
