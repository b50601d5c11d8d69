"""README.md and .env.example say what the file does, and their commands work."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
from dotenv import dotenv_values

import opendify
from opendify import (
    ROUTES,
    AppSettings,
    Ask,
    Message,
    ProxyError,
    build_parser,
    find_endpoint,
    parse_chat_request,
    parse_settings,
    plan_turn,
    setting_rows,
)

ROOT = Path(__file__).resolve().parent.parent
SOURCE = (ROOT / "opendify.py").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = (ROOT / ".env.example").read_text(encoding="utf-8")
FIRST = ("MODEL_CONFIG", "DIFY_API_BASE", "SERVER_HOST", "SERVER_PORT")
MADE_BY_USERS = (".env",)


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


def table(heading: str, number: int = 0) -> list[list[str]]:
    """The rows of a table whose first column has this heading."""
    start = [match.start() for match in re.finditer(rf"(?m)^\| {heading} \|", README)]
    text = README[start[number] :].partition("\n\n")[0]
    _, _, *lines = text.splitlines()
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
    assert named <= {variable for variable, _, _ in setting_rows()}


# ------------------------------------------------------------------------------
# Blocks
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks("json"), ids=block_id)
def test_json_block_parses(block: Block) -> None:
    assert json.loads(block.text)


@pytest.mark.parametrize("block", blocks("python"), ids=block_id)
def test_python_block_compiles(block: Block) -> None:
    assert compile(block.text, f"README.md:{block.line}", "exec")


@pytest.mark.parametrize("block", blocks("ini"), ids=block_id)
def test_env_block_is_a_good_configuration(block: Block) -> None:
    values = dotenv_values(stream=io.StringIO(block.text))
    assert parse_settings({name: text or "" for name, text in values.items()})
    assert set(values) <= {variable for variable, _, _ in setting_rows()}


def test_example_of_model_config_is_a_good_one() -> None:
    text = block_after("### Models", "json")
    apps = parse_settings({"MODEL_CONFIG": text}).model_config
    assert list(apps) == ["assistant", "translator"]
    assert apps["translator"].inputs == {"target_language": "English"}


def test_every_block_says_what_it_is() -> None:
    known = {"sh", "text", "python", "json", "ini"}
    assert [block for block in BLOCKS if block.language not in known] == []
    assert README.count("\n```") == 2 * len(BLOCKS)


def test_fold_is_shown_as_it_is() -> None:
    said = [("user", "Who wrote Faust?"), ("assistant", "Goethe."), ("user", "When?")]
    messages = tuple(Message(role, text) for role, text in said)
    ask = Ask("m", messages, system="Answer briefly.")
    shown = block_after("How the history is told", "text")
    assert shown == plan_turn(ask, b"scope", None).query + "\n"


def test_picture_and_rooms_are_those_of_the_file() -> None:
    told = opendify.__doc__ or ""
    picture = [row[4:] for row in told.splitlines() if "Dify's server" in row]
    rooms = [row[4:] for row in told.splitlines() if re.match(r" +\d+\. ", row)]
    drawn = [block.text.splitlines() for block in blocks("text")]
    assert picture in drawn
    assert rooms in drawn


def test_rooms_are_the_banners_of_the_file() -> None:
    banners = re.findall(r"(?m)^# (\d+\. .+)$", SOURCE)
    shown = re.findall(r"(?m)^ ?(\d+\. .+?)  ", README)
    assert shown == banners


def test_base_urls_reach_the_endpoint() -> None:
    urls = block_after("what\nthey like:", "text").split()
    assert len(urls) > 5
    found = [find_endpoint(urlsplit(f"{url}/chat/completions").path) for url in urls]
    assert found == [
        ("chat/completions", "my-model" if "deployments" in url else "") for url in urls
    ]


def test_limits_are_those_of_the_file() -> None:
    sentence = re.search(r"Limits that are no settings: [^.]*\.", README)
    assert sentence
    assert [float(text) for text in re.findall(r"\d+", sentence[0])] == [
        opendify.MAX_HEAD_BYTES >> 10,
        opendify.HEAD_TIMEOUT_S,
        opendify.BODY_TIMEOUT_S,
        opendify.IDLE_TIMEOUT_S,
        opendify.MAX_EVENT_BYTES >> 20,
    ]
    for text in (
        f"for {opendify.HEAD_AFTER_S:g} s at most",
        f"alive every {opendify.KEEP_ALIVE_S:g} s",
        f"for {opendify.DRAIN_S:g} seconds at most",
        f"beyond\n{opendify.MAX_CONVERSATIONS:,}",
    ):
        assert text in README


NOT_TRANSLATED = README.partition("### What is not\n")[2].partition("\n## ")[0]
VALUES = {"n": 2, "stop": ["."], "tools": [{"type": "function"}], "logprobs": True}


def test_fields_that_are_said_to_have_no_effect_have_none() -> None:
    first = NOT_TRANSLATED.strip().partition("\n- ")[0]
    fields = re.findall(r"`([a-z_]+)`", first)
    assert len(fields) > 8
    messages = [{"role": "user", "content": "Hi"}]
    plain = {"model": "m", "messages": messages}
    given = {**plain, **{name: VALUES.get(name, "x") for name in fields}}
    assert parse_chat_request(given) == parse_chat_request(plain)


def test_paths_that_are_said_to_be_missing_are() -> None:
    paths = re.findall(r"`(/v1/\w+)`", NOT_TRANSLATED)
    others = [
        "embeddings",
        "images/generations",
        "audio/speech",
        "files",
        "moderations",
    ]
    assert len(paths) > 1
    paths += [f"/v1/{path}" for path in others]
    assert [path for path in paths if find_endpoint(path)[0] in ROUTES] == []


def test_paths_that_are_said_to_be_served_are() -> None:
    paths = re.findall(r"`GET (/[\w/]+)`", PROSE)
    assert len(paths) > 4
    assert [path for path in paths if find_endpoint(path)[0] not in ROUTES] == []


# ------------------------------------------------------------------------------
# Commands, files and links
# ------------------------------------------------------------------------------


def test_every_option_that_is_named_exists() -> None:
    options = {*re.findall(r"--[\w-]+", build_parser().format_usage()), "--help"}
    programs = r"opendify\.py((?: +--[\w-]+)+)"
    given = [word for m in re.findall(programs, README) for word in m.split()]
    named = re.findall(r"`(--[\w-]+)`", PROSE)
    assert len(given) > 8
    assert {*given, *named} <= options
    assert options == set(named)


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
    assert [line.split() for line in lines] == [names] * 3


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
    assert [target for target in targets if target not in anchors] == []


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
    assert explained(r"\b(\d{3})\b") == statuses


def test_every_code_of_an_error_is_explained() -> None:
    codes = {error.code for error in all_errors() if error.code}
    assert codes - explained(r"`([a-z_]+)`") == set()


def test_every_code_that_is_explained_exists() -> None:
    codes = explained(r"`([a-z_]+_[a-z_]+)`") - {"conversation_id"}
    assert len(codes) > 10
    assert [code for code in sorted(codes) if f'"{code}"' not in SOURCE] == []


# ------------------------------------------------------------------------------
# The quick start, as shown
# ------------------------------------------------------------------------------

START = [sys.executable, "-X", "utf8"]
KEPT = ("PATH", "SYSTEMROOT", "LANG", "TMPDIR", "TEMP")
SHOWN_BASE = "http://127.0.0.1:5000/v1"


def pattern(shown: str) -> str:
    """A regular expression for an output in which `…` stands for an id or a time."""
    return re.escape(shown).replace(re.escape("…"), r"[\w-]+")


@pytest.fixture
def demo_base(tmp_path: Path) -> Iterator[str]:
    """The demo on a free port: its base URL."""
    command = [*START, str(ROOT / "opendify.py"), "--demo", "--port", "0"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env={name: os.environ[name] for name in KEPT if name in os.environ},
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            shown = block_after("says where it listens:", "text")
            base = line.rpartition(" ")[2].strip()
            assert line.replace(base, SHOWN_BASE) == shown
            yield base
        finally:
            process.kill()


def run_curl(command: str, base: str) -> str:
    """What a curl command prints; urllib stands in, since curl may be absent."""
    program, *words = shlex.split(command.replace(SHOWN_BASE, base))
    assert (program, words[0], words[2]) == ("curl", "-s", "-d")
    request = urllib.request.Request(words[1], words[3].encode())
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=20) as response:
        return str(response.read().decode())


def test_quick_start_prints_what_it_shows(demo_base: str) -> None:
    program = block_after("The same in Python", "python").replace(SHOWN_BASE, demo_base)
    with subprocess.Popen(
        [*START, "-c", program],
        env={name: os.environ[name] for name in KEPT if name in os.environ},
        encoding="utf-8",
        stdout=subprocess.PIPE,
    ) as python:
        curled = run_curl(block_after("Ask it something", "sh"), demo_base)
        printed, _ = python.communicate(timeout=20)
    assert re.fullmatch(pattern(block_after("Ask it something", "text")), curled + "\n")
    assert printed == block_after("with OpenAI's own\nclient", "text")
