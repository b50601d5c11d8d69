"""README.md and .env.example say what the file does, and their commands work."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import logging
import re
import shlex
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from dotenv import dotenv_values
from processes import few_variables

import opendify
from opendify import (
    OPEN_ENDPOINTS,
    ROUTES,
    TOOLS_PLACES,
    AppSettings,
    Ask,
    BadRequest,
    Message,
    ProxyError,
    build_parser,
    describe_format,
    describe_tools,
    find_endpoint,
    parse_chat_request,
    parse_completion_request,
    parse_output_format,
    parse_settings,
    parse_tools,
    plan_turn,
    setting_rows,
)

ROOT = Path(__file__).resolve().parent.parent
SOURCE = (ROOT / "opendify.py").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = (ROOT / ".env.example").read_text(encoding="utf-8")
SCHEMAS = ROOT / "tests" / "data" / "openai-schemas.json"
FIRST = ("MODEL_CONFIG", "DIFY_API_BASE", "SERVER_HOST", "SERVER_PORT")
MADE_BY_USERS = (".env",)
OF_OTHERS = {"DIFY_API_URL", "DIFY_SSL_VERIFY", "CONVERSATION_MEMORY_MODE"}


class Block(NamedTuple):
    """A fenced block: the line it begins at, its language, its text."""

    line: int
    language: str
    text: str


def fenced_blocks(markdown: str) -> Iterator[Block]:
    for match in re.finditer(r"(?ms)^```(\w*)\n(.*?)^```$", markdown):
        line = markdown.count("\n", 0, match.start()) + 1
        yield Block(line, match[1], match[2])


BLOCKS = list(fenced_blocks(README))
PROSE = re.sub(r"(?ms)^```.*?^```$", "", README)
FLAT = " ".join(PROSE.split())


def blocks(language: str) -> list[Block]:
    found = [block for block in BLOCKS if block.language == language]
    assert found, f"no block of {language}"
    return found


def block_id(block: Block) -> str:
    return f"line-{block.line}"


def block_after(text: str, language: str) -> str:
    """The first block of this language behind a text, which stands there once."""
    assert README.count(text) == 1, text
    line = README.count("\n", 0, README.index(text)) + 1
    return next(block.text for block in blocks(language) if block.line > line)


def table(heading: str) -> list[list[str]]:
    """The rows of a table whose first column has this heading."""
    _, start, rest = README.partition(f"\n| {heading} |")
    _, _, *lines = (start[1:] + rest).partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines]


def quoted(text: str) -> str:
    return f"`{text}`" if text else ""


# ------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------


def test_settings_table_is_what_the_file_says() -> None:
    expected = [
        [quoted(name), quoted(text), means] for name, text, means in setting_rows()
    ]
    assert table("Variable") == expected


def test_chinese_settings_table_has_the_same_variables_and_defaults() -> None:
    expected = [
        [quoted(variable), quoted(default)] for variable, default, _ in setting_rows()
    ]
    assert [row[:2] for row in table("变量")] == expected
    assert [row for row in table("变量") if not row[2]] == []


def test_table_of_model_config_has_every_key() -> None:
    fields = [quoted(row.name) for row in dataclasses.fields(AppSettings)]
    assert [row[0] for row in table("Key")] == fields


def test_env_example_has_every_setting_with_its_meaning_and_default() -> None:
    entries = re.findall(r"(?m)^# (.+)\n(#?)([A-Z_]+)=(.*)$", EXAMPLE)
    rows = setting_rows()
    first = [row for name in FIRST for row in rows if row[0] == name]
    assert [(name, means) for means, _, name, _ in entries] == [
        (name, means)
        for name, _, means in [*first, *(row for row in rows if row not in first)]
    ]
    defaults = {name: default for name, default, _ in rows}
    told = {name: text for _, _, name, text in entries if name != "MODEL_CONFIG"}
    assert told == {name: defaults[name] for name in told}


def test_env_example_sets_the_first_four_and_no_more() -> None:
    values = dotenv_values(stream=io.StringIO(EXAMPLE))
    assert tuple(values) == FIRST
    settings = parse_settings({name: text or "" for name, text in values.items()})
    key = {"my-model": AppSettings("app-YOUR-KEY", "https://api.dify.ai/v1")}
    assert settings == dataclasses.replace(parse_settings({}), model_config=key)


def test_env_example_has_the_defaults_when_all_of_it_is_set() -> None:
    text = re.sub(r"(?m)^#([A-Z])", r"\1", EXAMPLE)
    values = dotenv_values(stream=io.StringIO(text))
    assert set(values) == {variable for variable, _, _ in setting_rows()}
    settings = parse_settings({name: value or "" for name, value in values.items()})
    assert dataclasses.replace(settings, model_config={}) == parse_settings({})


def test_every_setting_that_is_named_exists() -> None:
    prefixes = r"DIFY|SERVER|STREAM|CONVERSATION|MAX|LOG|VALID|ALLOWED|SHOW|MODEL"
    named = set(re.findall(rf"\b(?:{prefixes})_[A-Z_]+\b", README))
    assert len(named) > 10
    assert named - OF_OTHERS <= {variable for variable, _, _ in setting_rows()}


# ------------------------------------------------------------------------------
# Blocks
# ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language == "toml"], ids=block_id
)
def test_toml_block_parses(block: Block) -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    value = tomllib.loads(block.text)
    (provider,) = value["model_providers"].values()
    assert find_endpoint(urlsplit(provider["base_url"]).path + "/responses") == (
        "responses",
        "",
    )
    assert "responses" in ROUTES


@pytest.mark.parametrize("block", blocks("python"), ids=block_id)
def test_python_block_compiles(block: Block) -> None:
    assert compile(block.text, f"README.md:{block.line}", "exec")


@pytest.mark.parametrize("block", blocks("ini"), ids=block_id)
def test_env_block_is_a_good_configuration(block: Block) -> None:
    values = dotenv_values(stream=io.StringIO(block.text))
    assert parse_settings({name: text or "" for name, text in values.items()})
    assert set(values) <= {variable for variable, _, _ in setting_rows()}


def test_pages_that_are_said_to_be_let_in_are() -> None:
    text = FLAT.partition("Pages of this machine's own servers")[2]
    own, _, foreign = text.partition("Other pages get 403")
    apps = re.findall(r"`([a-z-]+://[^`]*)`", own.replace("…", "abc"))
    assert len(apps) == 3
    assert [page for page in apps if not opendify._is_allowed(page, "h", [])] == []
    assert "a page opened from disk as `null`" in foreign
    assert not opendify._is_allowed("null", "h", [])
    assert opendify._is_allowed("null", "h", ["null"])


def test_example_of_model_config_is_a_good_one() -> None:
    values = dotenv_values(stream=io.StringIO(block_after("### Models", "ini")))
    settings = parse_settings({name: text or "" for name, text in values.items()})
    apps = settings.model_config
    assert list(apps) == ["assistant", "translator"]
    assert apps["translator"].inputs == {"target_language": "English"}


def test_every_block_says_what_it_is() -> None:
    known = {"sh", "text", "python", "ini", "yaml", "toml", "nginx", "caddy", "systemd"}
    assert [block for block in BLOCKS if block.language not in known] == []
    assert README.count("\n```") == 2 * len(BLOCKS)


def test_fold_is_shown_as_it_is() -> None:
    said = [("user", "Who wrote Faust?"), ("assistant", "Goethe."), ("user", "When?")]
    messages = tuple(Message(role, text) for role, text in said)
    ask = Ask("m", messages, system="Answer briefly.")
    shown = block_after("The history is sent like this", "text")
    plan = plan_turn(ask, b"scope", None, AppSettings("key"), lambda files: False)
    assert shown == plan.query + "\n"


def test_base_urls_reach_the_endpoint() -> None:
    text = FLAT.partition("it may end in any of these, too: ")[2].partition(". - ")[0]
    ends = re.findall(r"`(/[^`]*)`", text)
    assert len(ends) > 5
    assert [find_endpoint(f"{end}/chat/completions") for end in ends] == [
        ("chat/completions", "my-model" if "my-model" in end else "") for end in ends
    ]


def test_limits_are_those_of_the_file() -> None:
    numbers = [re.findall(r"\d[\d,]*", row[1]) for row in table("Limit")]
    given = [int(text.replace(",", "")) for row in numbers for text in row]
    assert given == [
        opendify.MAX_HEAD_BYTES >> 10,
        opendify.MAX_FIELDS,
        opendify.HEAD_TIMEOUT_S,
        opendify.MAX_MESSAGES,
        opendify.MAX_REFERENCES,
        opendify.BODY_TIMEOUT_S,
        opendify.IDLE_TIMEOUT_S,
        opendify.WRITE_TIMEOUT_S,
        opendify.MAX_KEY_FAILURES,
        opendify.KEY_FAILURES_S,
        opendify.MAX_STOPS,
        opendify.MAX_STOP_CHARS,
        opendify.MAX_USER_CHARS,
        opendify.MAX_KEPT_CHARS,
        opendify.MAX_CONVERSATIONS,
        40,  # MB of memory, as bench_conversations.py tells
        opendify.MAX_NAMED_ITEMS,
        opendify.MAX_NAMED_BYTES >> 20,
        opendify.MAX_NAMED,
        opendify.MAX_ALL_NAMED_BYTES >> 20,
        opendify.MAX_EVENT_BYTES >> 20,
        opendify.CIRCUIT_S,
    ]
    for text in (
        f"for {opendify.HEAD_AFTER_S:g} s at most",
        f"alive every {opendify.KEEP_ALIVE_S:g} s",
        f"finish, for {opendify.DRAIN_S:g} s at most",
        f"in the last {opendify.LATELY_S / 60:g} minutes",
        f"`n` over {opendify.MAX_CHOICES},",
        f"more than {opendify.MAX_STOPS} strings in `stop`",
        f"after {opendify._MAX_CHECKS:,} checks",
        f"a text of over {opendify._MAX_PATTERN_CHARS} characters",
        f"up to {opendify.MAX_COMPLETIONS} answers",
        f"up to {opendify.MAX_SPEECH_CHARS:,} characters",
        f"over {opendify._MAX_CONTEXT_CHARS:,} characters",
    ):
        assert text in FLAT


# ------------------------------------------------------------------------------
# The words for tools and formats
# ------------------------------------------------------------------------------

TOOLS = README.partition("\n### Tools\n")[2].partition("\n## Streaming\n")[0]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
}
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}


def test_words_are_those_that_are_sent() -> None:
    row = {"name": "city", "schema": SCHEMA}
    wanted = {"type": "json_schema", "json_schema": row}
    words = [
        describe_tools(*parse_tools({"tools": [WEATHER]})),
        describe_format(parse_output_format({"response_format": wanted})),
    ]
    shown = [block for block in fenced_blocks(TOOLS) if block.language != "python"]
    assert [block.text[:-1] for block in shown] == words


def test_clients_of_the_page_are_in_the_table() -> None:
    shown = re.findall(r"(?m)^ +\"?([A-Z][\w ]+)\"?: [\"`]", opendify._SCRIPT)
    assert len(shown) > 4
    assert [name for name in shown if name not in PROSE] == []


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(r"`(OPENAI_MODEL_LIST=[^`]*<[^`]*>)`", id="lobechat"),
        pytest.param(r"`(VISION_MODELS=[^`]*)`", id="nextchat"),
        pytest.param(r"`(capabilities: [^`]*)`", id="continue"),
    ],
)
def test_images_are_turned_on_in_the_same_way_in_both_languages(pattern: str) -> None:
    english, _, chinese = PROSE.partition("\n## 中文\n")
    assert len(re.findall(pattern, english)) == 1
    assert re.findall(pattern, english) == re.findall(pattern, chinese)


@pytest.mark.parametrize(
    "names",
    [("`FILES_URL`", "`FILES_URL`"), ("*Memory*", "“记忆”"), ("Cursor", "Cursor")],
)
def test_what_users_look_for_is_told_in_both_languages(names: tuple[str, str]) -> None:
    english, _, chinese = PROSE.partition("\n## 中文\n")
    assert [names[0] in english, names[1] in chinese] == [True, True]


def test_whole_urls_for_clients_are_served() -> None:
    urls = re.findall(r"`http://127\.0\.0\.1:5000(/[^`]*/chat/completions)`", PROSE)
    assert [find_endpoint(url) for url in urls] == [("chat/completions", "")] * 2


def test_formats_of_transcripts_are_those_of_the_file() -> None:
    text = FLAT.partition("the `response_format` may be ")[2].partition(
        ", or `stream`"
    )[0]
    assert sorted(re.findall(r"`(\w+)`", text)) == sorted(opendify._TRANSCRIPTS)


def test_formats_and_size_of_spoken_answers_are_those_of_the_file() -> None:
    text = FLAT.partition("The `format` may be ")[2].partition(", but")[0]
    assert sorted(re.findall(r"`(\w+)`", text)) == sorted(opendify._SOUND_FORMATS)
    assert f"up to {opendify.MAX_SOUND_BYTES >> 20} MB of it" in FLAT


def test_places_of_tools_are_those_there_are() -> None:
    (row,) = [row for row in table("Key") if row[0] == "`tools`"]
    assert tuple(re.findall(r"`(\w+)`", row[1])) == TOOLS_PLACES
    assert tuple(re.findall(r'`"(\w+)"`', TOOLS)) == TOOLS_PLACES


MARKUP = (
    '<tool_calls>[{"name": "get_weather", "arguments": {}}]</tool_calls>',
    '<tools>{"name": "get_weather", "arguments": {}}</tools>',
    '<tool_use>{"name": "get_weather", "arguments": {}}</tool_use>',
    '<function_call>{"name": "get_weather", "arguments": {}}</function_call>',
    "<function=get_weather>{}</function>",
    '<invoke name="get_weather"></invoke>',
)


@pytest.mark.parametrize("text", MARKUP, ids=[row[:9] for row in MARKUP])
def test_markup_that_is_said_to_be_read_is(text: str) -> None:
    assert f"`{text.partition('>')[0].split('get_weather')[0]}" in TOOLS
    tools, _ = parse_tools({"tools": [WEATHER]})
    reader = opendify.CallReader(tools, itertools.repeat("call_1"), 1)
    reader.feed([opendify.Text(text)])
    reader.close()
    assert reader.found == 1


# ------------------------------------------------------------------------------
# Requests and endpoints
# ------------------------------------------------------------------------------

PLAIN = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
CALLED = {"tools": [{"type": "function", "function": WEATHER}]}
LEGACY = {"functions": [WEATHER]}
VOICE = {"audio": {"voice": "nova", "format": "mp3"}}
FIELDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "model": ({}, {"model": "other"}),
    "messages": ({}, {"messages": [{"role": "user", "content": "Ho"}]}),
    "stream": ({}, {"stream": True}),
    "stream_options": ({}, {"stream_options": {"include_usage": True}}),
    "user": ({}, {"user": "ada"}),
    "safety_identifier": ({}, {"safety_identifier": "ada"}),
    "metadata": ({}, {"metadata": {"inputs": '{"a": 1}'}}),
    "stop": ({}, {"stop": ["."]}),
    "n": ({}, {"n": 2}),
    "tools": ({}, CALLED),
    "tool_choice": (CALLED, {**CALLED, "tool_choice": "required"}),
    "parallel_tool_calls": (CALLED, {**CALLED, "parallel_tool_calls": False}),
    "functions": ({}, LEGACY),
    "function_call": (LEGACY, {**LEGACY, "function_call": {"name": "get_weather"}}),
    "response_format": ({}, {"response_format": {"type": "json_object"}}),
    "modalities": (VOICE, {**VOICE, "modalities": ["text", "audio"]}),
    "audio": (
        {"modalities": ["audio"], **VOICE},
        {"modalities": ["audio"], "audio": {"voice": "echo", "format": "mp3"}},
    ),
    "inputs": ({}, {"inputs": {"a": 1}}),
    "conversation_id": ({}, {"conversation_id": "c1"}),
}


def fields(done: str) -> list[str]:
    (row,) = [row for row in table("Handling") if row[0].startswith(done)]
    return re.findall(r"`(\w+)`", row[1])


def test_chinese_list_of_honoured_fields_is_the_same() -> None:
    listed = re.search(r"有效的字段：([^。]+)。", PROSE)
    assert listed
    assert sorted(re.findall(r"`(\w+)`", listed[1])) == sorted(fields("honoured"))


@pytest.mark.parametrize("name", fields("honoured"))
def test_field_that_is_said_to_be_honoured_is(name: str) -> None:
    without, given = FIELDS[name]
    asked = [parse_chat_request({**PLAIN, **row}) for row in (without, given)]
    assert asked[0] != asked[1]


@pytest.mark.parametrize("name", fields("ignored"))
@pytest.mark.parametrize("value", [1, "x", ["x"], {"x": 1}, True], ids=repr)
def test_field_that_is_said_to_be_ignored_is(name: str, value: object) -> None:
    assert parse_chat_request({**PLAIN, name: value}) == parse_chat_request(PLAIN)


REFUSED: list[dict[str, Any]] = [
    {"n": opendify.MAX_CHOICES + 1},
    {"stop": ["."] * (opendify.MAX_STOPS + 1)},
    {"tool_choice": {"type": "function", "function": {"name": "other"}}, **CALLED},
    {"n": 2, "modalities": ["audio"], **VOICE},
    {"audio": {"format": "pcm16"}, "modalities": ["audio"]},
    {"response_format": {"type": "yaml"}},
    {"response_format": {"type": "json_schema"}},
    {"messages": [{"role": "user", "content": [{"type": "smell"}]}]},
]


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: next(iter(row)))
def test_field_that_is_said_to_be_refused_is(row: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as raised:
        parse_chat_request({**PLAIN, **row})
    assert raised.value.param
    assert raised.value.param.startswith(next(iter(row)))


@pytest.mark.parametrize("row", [{"suffix": "x"}, {"prompt": [1, 2]}], ids=repr)
def test_legacy_field_that_is_said_to_be_refused_is(row: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        parse_completion_request({"model": "m", "prompt": "Hi", **row})


def test_every_field_of_the_schema_is_named() -> None:
    document = json.loads(SCHEMAS.read_text(encoding="utf-8"))["$defs"]
    schemas = [document["CreateChatCompletionRequest"]]
    known: set[str] = set()
    for schema in schemas:
        known |= set(schema.get("properties", {}))
        for part in schema.get("allOf", []):
            name = part.get("$ref", "").rpartition("/")[2]
            schemas.append(document[name] if name else part)
    assert len(known) > 30
    assert (
        known - {*fields("honoured"), *fields("ignored"), *fields("refused")} == set()
    )


def test_table_of_endpoints_has_every_route() -> None:
    told: set[tuple[str, str]] = set()
    cells = (row[0] for row in table("Endpoint"))
    for methods, path in re.findall(r"`([^`]+) ([^` ]+)`", " ".join(cells)):
        endpoint = find_endpoint(path)[0]
        told |= {(method, endpoint) for method in re.findall(r"[A-Z]+", methods)}
    assert told == {(method, name) for name, row in ROUTES.items() for method in row}


def test_endpoints_without_a_key_are_those_of_the_file() -> None:
    rows = [row[0] for row in table("Endpoint") if row[1].endswith("; needs no key")]
    paths = [row[1:-1].split()[1] for row in rows]
    assert {find_endpoint(path)[0] for path in paths} == {*OPEN_ENDPOINTS}


def test_paths_that_are_said_to_be_served_are() -> None:
    paths = re.findall(r"`(?:GET|POST) (/[\w/]+)`", PROSE)
    assert len(paths) > 4
    assert [path for path in paths if find_endpoint(path)[0] not in ROUTES] == []


# ------------------------------------------------------------------------------
# Operation
# ------------------------------------------------------------------------------


def test_metrics_are_those_of_the_file() -> None:
    rows = {
        row[0].strip("`"): re.findall(r"`(\w+)`", row[1])
        for row in table("Metric of `GET /metrics`")
    }
    assert set(rows) == set(re.findall(r'"(opendify_\w+_\w+|opendify_\w+s)"', SOURCE))
    metrics = opendify.Metrics()
    for name, labels in rows.items():
        metrics.count(name, 1, **dict.fromkeys(labels, "x"))
        assert name in metrics.render({})


def test_routes_that_the_metrics_are_said_to_name_exist() -> None:
    text = FLAT.partition("A `route` is an endpoint")[2].partition("; `-`")[0]
    routes = [found for found in re.findall(r"`([^`]+)`", text) if found != "/v1/"]
    assert len(routes) == 3
    assert [route for route in routes if route not in opendify.ROUTES] == []


def block_of(language: str) -> str:
    return blocks(language)[0].text


def test_stops_of_the_recipes_wait_for_open_requests() -> None:
    least = opendify.DRAIN_S + 2 * opendify.CANCEL_S
    patterns = (
        r"TimeoutStopSec=(\d+)",
        r"terminationGracePeriodSeconds: (\d+)",
        r"--stop-timeout (\d+)",
    )
    found = [float(text) for row in patterns for text in re.findall(row, README)]
    assert len(found) == 3
    assert min(found) > least


def test_body_limit_of_nginx_is_that_of_the_file() -> None:
    megabytes = parse_settings({}).max_body_mb
    assert f"client_max_body_size {megabytes}m;" in block_of("nginx")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def run_tool(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def program(name: str) -> str:
    """Where a program is, if it is; else the test is skipped."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def test_nginx_takes_its_configuration(tmp_path: Path) -> None:
    nginx = program("nginx")
    text = block_of("nginx").replace("listen 80", f"listen 127.0.0.1:{free_port()}")
    paths = "".join(
        f"{row}_temp_path {tmp_path}/{row};\n"
        for row in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    head = f"pid {tmp_path}/pid;\nerror_log {tmp_path}/log;\nevents {{}}\n"
    path = tmp_path / "nginx.conf"
    path.write_text(f"{head}http {{\n{paths}{text}}}\n", encoding="utf-8")
    run_tool(nginx, "-t", "-p", str(tmp_path), "-c", str(path), "-e", f"{tmp_path}/log")


def test_caddy_takes_its_configuration(tmp_path: Path) -> None:
    path = tmp_path / "Caddyfile"
    path.write_text(block_of("caddy"), encoding="utf-8")
    run_tool(program("caddy"), "adapt", "--config", str(path), "--validate")


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    analyze = program("systemd-analyze")
    path = tmp_path / "opendify.service"
    text = block_of("systemd").replace("/opt/opendify/.venv/bin/python", sys.executable)
    path.write_text(text, encoding="utf-8")
    run_tool(analyze, "verify", str(path))


@pytest.mark.parametrize("block", blocks("sh"), ids=block_id)
def test_shell_block_parses(block: Block) -> None:
    run_tool(program("sh"), "-n", "-c", block.text)


def test_manifest_names_what_there_is() -> None:
    manifest = next(row.text for row in blocks("yaml") if "kind:" in row.text)
    paths = re.findall(r"path: (/\w+), port: (\d+)", manifest)
    assert {path[1:] for path, _ in paths} == {"ready", "health"} <= {*OPEN_ENDPOINTS}
    port = parse_settings({}).server_port
    ports = re.findall(r"(?:[pP]ort): (\d+)", manifest)
    assert set(ports) == {"80", str(port)}
    variables = re.findall(r"name: ([A-Z_]+), value: ([^}]+)\}", manifest)
    given = parse_settings(dict(variables))
    assert (given.server_host, given.log_format) == ("0.0.0.0", "json")
    made = re.findall(r"kubectl create (?:secret generic|configmap) (\w+)", README)
    used = re.findall(r"(?:secretRef|configMap): \{name: (\w+)\}", manifest)
    assert set(made) == set(used)
    assert "\t" not in manifest


def test_place_for_measured_numbers_is_there() -> None:
    start, end = "<!-- performance -->\n", "\n<!-- /performance -->\n"
    performance = README.partition("\n## Performance\n")[2].partition("\n## ")[0]
    assert (README.count(start), README.count(end)) == (1, 1)
    assert performance.partition(start)[2].partition(end)[0].strip()


# ------------------------------------------------------------------------------
# Commands, files and links
# ------------------------------------------------------------------------------


def test_every_header_that_is_named_exists() -> None:
    named = {name.lower() for name in re.findall(r"`(X-[\w-]+|x-[\w-]+)", PROSE)}
    others = {"x-api-key", "x-request-id", "x-should-retry", "x-accel-buffering"}
    assert len(named) > 6
    source = SOURCE.lower()
    made = {f"x-dify-{row}-id" for row in ("conversation", "message")}
    assert made | others <= named
    assert [name for name in sorted(named - made) if f'"{name}"' not in source] == []


def test_every_option_that_is_named_exists() -> None:
    options = {*re.findall(r"--[\w-]+", build_parser().format_usage()), "--help"}
    programs = r"opendify\.py((?: +--[\w-]+)+)"
    given = [word for m in re.findall(programs, README) for word in m.split()]
    named = re.findall(r"`(--[\w-]+)`", PROSE)
    assert len(given) > 8
    assert {*given, *named} == options


def test_every_file_that_is_named_exists() -> None:
    paths = set(re.findall(r"`(?:python )?((?:tests/|\.)[\w./-]+)`", PROSE))
    paths |= set(re.findall(r"(?<!\S)(\.ci/[\w.-]+)", README))
    paths = {path for path in paths if not path.startswith((".venv", *MADE_BY_USERS))}
    paths |= {".env.example"} if "`.env.example`" in PROSE else set()
    assert {".ci/pytest.ini", ".ci/requirements.txt", ".ci/run"} <= paths
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_every_benchmark_is_named() -> None:
    benches = {path.name for path in (ROOT / "tests").glob("bench_*.py")}
    assert set(re.findall(r"tests/(bench_\w+\.py)", README)) == benches


def test_install_line_has_the_dependencies_of_the_file() -> None:
    found = re.search(r"(?m)^# dependencies = (\[.*\])$", SOURCE)
    assert found
    names = [re.split(r"[<>=]", text)[0] for text in json.loads(found[1])]
    lines = re.findall(r"python -m pip install (?!-)([\w -]+?)(?: &&|\n)", README)
    assert [line.split() for line in lines] == [names] * 5


def test_first_command_is_one_line_and_the_same_in_both_languages() -> None:
    first = block_after("## Quick start", "sh")
    assert first == block_after("### 快速开始", "sh")
    steps = first.strip().split(" && ")
    assert len(steps) == 3
    assert first.count("\n") == 1
    assert steps[2] == ".venv/bin/python opendify.py --demo"


def test_every_link_leads_somewhere() -> None:
    targets = re.findall(r"\]\(([^)]*)\)", PROSE)
    headings = re.findall(r"(?m)^#+ (.+)$", PROSE)
    anchors = {"#" + heading.lower().replace(" ", "-") for heading in headings}
    assert "#中文" in targets
    assert "tests/data/pacing.svg" in targets
    lost = [row for row in targets if row not in anchors and not (ROOT / row).is_file()]
    assert lost == []


def test_last_chapter_is_chinese() -> None:
    assert re.findall(r"(?m)^## (.+)$", PROSE)[-1] == "中文"


# ------------------------------------------------------------------------------
# Errors
# ------------------------------------------------------------------------------


def all_errors(base: type[ProxyError] = ProxyError) -> set[type[ProxyError]]:
    inner = [all_errors(child) for child in base.__subclasses__()]
    return {base}.union(*inner)


def explained(pattern_: str) -> set[str]:
    """What the table of errors has in the place of the group, in any row."""
    cells = [cell for row in table("Status, code") for cell in row[:2]]
    return {found for cell in cells for found in re.findall(pattern_, cell)}


def test_every_status_of_an_error_is_explained_and_no_other() -> None:
    statuses = {str(error.status) for error in all_errors()}
    statuses |= set(re.findall(r"status=(\d+)", SOURCE))
    assert explained(r"\b(\d{3})\b") == statuses


def test_every_code_of_an_error_is_explained() -> None:
    codes = {error.code for error in all_errors() if error.code}
    codes |= set(re.findall(r'code="([a-z_]+)"', SOURCE))
    assert codes - explained(r"`([a-z_]+)`") == set()


def test_every_code_that_is_explained_exists() -> None:
    codes = explained(r"`([a-z_]+_[a-z_]+)`") - {"conversation_id"}
    assert len(codes) > 10
    assert [code for code in sorted(codes) if f'"{code}"' not in SOURCE] == []


# ------------------------------------------------------------------------------
# The quick start, as shown
# ------------------------------------------------------------------------------

START = [sys.executable, "-X", "utf8"]
SHOWN_BASE = "http://127.0.0.1:5000/v1"
LOG = "log.txt"


def pattern(shown: str) -> str:
    """A regular expression for an output in which `…` stands for an id or a time."""
    return re.escape(shown).replace(re.escape("…"), r"[\w-]+")


@pytest.fixture
def demo_base(tmp_path: Path) -> Iterator[str]:
    """The demo on a free port: its base URL."""
    command = [*START, str(ROOT / "opendify.py"), "--demo", "--port", "0"]
    with (
        (tmp_path / LOG).open("wb") as written,
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env=few_variables(),
            encoding="utf-8",
            stdout=subprocess.PIPE,
            stderr=written,
        ) as process,
    ):
        try:
            assert process.stdout
            line = process.stdout.readline().strip()
            base = line.rpartition(" ")[2]
            assert f"It prints `{line.replace(base, SHOWN_BASE)}`." in FLAT
            yield base
        finally:
            process.kill()


def run_curl(command: str, base: str) -> str:
    """What a curl command prints; urllib stands in, since curl may be absent."""
    program, *words = shlex.split(command.replace(SHOWN_BASE, base))
    assert (program, words[0], words[2]) == ("curl", "-s", "-d")
    request = urllib.request.Request(words[1], words[3].encode())
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request) as response:
        return str(response.read().decode())


def run_python(text: str, base: str) -> subprocess.Popen[str]:
    text = text.replace(SHOWN_BASE, base).replace("my-model", "demo")
    return subprocess.Popen(
        [*START, "-c", text],
        env=few_variables(),
        encoding="utf-8",
        stdout=subprocess.PIPE,
    )


def logged(line: str) -> str:
    """A line of the log without what differs each time."""
    return re.sub(r"\d+", "0", re.sub(r"id=req_\w{32}", "id=", line))


def test_quick_start_prints_what_it_shows(demo_base: str, tmp_path: Path) -> None:
    chat = block_after("With OpenAI's own client", "python")
    extra = block_after("specific to Dify goes", "python")
    extra = chat.partition("messages = ")[0] + extra  # the client is made there
    with run_python(chat, demo_base) as plain, run_python(extra, demo_base) as other:
        curled = run_curl(block_after("ask it something", "sh"), demo_base)
        printed, _ = plain.communicate()
        assert other.wait() == 0
    assert re.fullmatch(pattern(block_after("ask it something", "text")), curled + "\n")
    assert printed.strip() == json.loads(curled)["choices"][0]["message"]["content"]
    shown = logged(block_after("The log goes to standard error", "text").rstrip())
    lines = (tmp_path / LOG).read_text(encoding="utf-8").splitlines()
    assert [logged(line) for line in lines].count(shown) == 3


def test_log_in_json_is_as_shown() -> None:
    text = FLAT.partition("With `LOG_FORMAT=json` each line is an object like `")[2]
    shown = json.loads(text.partition("`")[0])
    record = logging.LogRecord("", logging.INFO, "", 0, shown["message"], (), None)
    written = json.loads(opendify._Formatter(is_json=True).format(record))
    assert {**written, "time": ""} == {**shown, "time": ""}
    assert logged(written["time"]) == logged(shown["time"])


def test_log_in_json_suits_every_encoding() -> None:
    """A stream that can't encode a letter writes what no JSON allows."""
    record = logging.LogRecord("", logging.INFO, "", 0, "应用 é", (), None)
    written = opendify._Formatter(is_json=True).format(record)
    assert written.isascii()
    assert json.loads(written)["message"] == "应用 é"
