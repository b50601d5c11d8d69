"""Room Command line: arguments, env file, exit statuses, the self-check, the demo."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import functools
import gc
import json
import logging
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import fake_dify
import pytest
from fake_dify import FakeDify, Request, Status, text_input
from processes import few_variables

import opendify
from opendify import setting_rows

FILE = Path(__file__).parent.parent / "opendify.py"
VERSION = f"OpenDify {opendify.__version__}\n"
KEY, OTHER_KEY = "app-0123456789abcdef", "app-01zzzzzzzzzzzzzz"
NOWHERE = "http://127.0.0.1:1/v1"  # nobody listens on the reserved port 1
SCREEN_LINES = 60
JSONObject = dict[str, Any]


class Outcome(NamedTuple):
    """How a run ended, and what it wrote."""

    status: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def quiet_logging() -> Iterator[None]:
    """Give the root logger back as it was: `main` sets it up anew."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers
    logging.raiseExceptions = True


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet_logging: None) -> Path:
    """An empty working directory, another one for the file, no variables set."""
    for variable, _, _ in setting_rows():
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.lower(), raising=False)
    for name in ("work", "beside"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(opendify, "__file__", str(tmp_path / "beside/opendify.py"))
    return tmp_path


@pytest.fixture
def run(home: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `main` with these arguments, in `home`."""
    assert home.is_dir()

    def call(*arguments: str) -> Outcome:
        try:
            status = opendify.main(arguments)
        except SystemExit as end:
            status = int(end.code or 0)
        return Outcome(status, *capsys.readouterr())

    return call


class Deaf(opendify.Listener):
    """Accepts, and serves nobody."""

    async def serve(self, wire: opendify.Wire) -> None:
        wire.close()


def shown(outcome: Outcome) -> dict[str, str]:
    """The settings that `--check` prints."""
    lines = outcome.out.partition("\n\n")[0].splitlines()
    return {
        name: text.strip() for name, _, text in (row.partition(" ") for row in lines)
    }


def rows(outcome: Outcome) -> list[list[str]]:
    """The cells of the table that `--check` prints."""
    lines = outcome.out.partition("\n\n")[2].splitlines()
    return [re.split(r"  +", line) for line in lines if not line.startswith(" ")]


def notes(outcome: Outcome) -> list[str]:
    """What `--check` prints below the rows, each on one line: "what: text"."""
    table = outcome.out.partition("\n\n")[2]
    found = re.findall(r"(?m)^    (\S.{8})(.+(?:\n {13}.+)*)", table)
    return [f"{what.strip()}: {' '.join(text.split())}" for what, text in found]


@pytest.fixture
def checked(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `--check` with one app that can't be reached."""
    app = {"key": KEY, "base": NOWHERE}
    monkeypatch.setenv("MODEL_CONFIG", json.dumps({"m": app}))
    return lambda *arguments: run("--check", *arguments)


# ------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------


def test_version_is_told(run: Run) -> None:
    assert run("--version") == Outcome(0, VERSION, "")


@pytest.mark.parametrize("columns", ["80", "100", "200"])
def test_help_fits_one_screen_and_lists_every_setting(
    run: Run, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    status, out, err = run("--help")
    lines = out.splitlines()
    assert (status, err) == (0, "")
    assert len(lines) <= SCREEN_LINES
    told = [line.split()[0] for line in lines if re.match(r"  [A-Z]+_", line)]
    assert told == [variable for variable, _, _ in setting_rows()]


def test_help_tells_defaults_and_meanings(run: Run) -> None:
    lines = [" ".join(line.split()) for line in run("--help").out.splitlines()]
    for variable, default, meaning in setting_rows():
        assert f"{variable} {meaning}" + (f" [{default}]" if default else "") in lines


@pytest.mark.parametrize("argument", ["--prot", "here", "--port"])
def test_bad_usage_ends_with_status_2(run: Run, argument: str) -> None:
    status, out, err = run(argument)
    assert (status, out) == (2, "")
    assert err.startswith("usage: opendify.py ")
    assert "Traceback" not in err


@pytest.mark.parametrize("argument", ["", "--check"], ids=["serve", "check"])
def test_both_ways_out_are_named_when_nothing_is_configured(
    run: Run, argument: str
) -> None:
    status, out, err = run(*argument.split())
    assert (status, out) == (2, "")
    assert err.startswith("No Dify app is configured. Either\n")
    for way in ("MODEL_CONFIG={", "DIFY_API_BASE=https://api.dify.ai/v1", " --demo"):
        assert way in err


def test_log_in_json_is_json_from_its_first_line(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOG_FORMAT", "json")
    (line,) = run().err.splitlines()
    assert json.loads(line)["message"].startswith("No Dify app is configured.")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        pytest.param(
            "--port http", "SERVER_PORT: must be a whole number, not 'http'", id="word"
        ),
        pytest.param(
            "--port 70000", "SERVER_PORT: must be 65535 or less", id="too-large"
        ),
        pytest.param(
            "--log-level loud",
            "LOG_LEVEL: must be one of DEBUG, INFO, WARNING, ERROR",
            id="level",
        ),
        pytest.param(
            "--env-file nowhere.env",
            "nowhere.env can't be read: [Errno 2] No such file or directory: "
            "'nowhere.env'",
            id="env",
        ),
    ],
)
def test_bad_value_is_one_line_and_status_2(
    run: Run, arguments: str, complaint: str
) -> None:
    assert run(*arguments.split()) == Outcome(2, "", f"opendify: {complaint}\n")


def test_path_with_an_at_sign_is_shown_whole(
    checked: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVERSATION_STORE", "/data/a@b/c.sqlite")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:planted@proxy:3128")
    settings = shown(checked())
    assert settings["CONVERSATION_STORE"] == "/data/a@b/c.sqlite"
    assert settings["HTTPS_PROXY"] == "http://…@proxy:3128"


def test_all_complaints_are_printed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOW_PROCESS", "maybe")
    monkeypatch.setenv("MODEL_CONFIG", f'{{"m": {{"key": "{KEY}", "mod": "x"}}}}')
    status, out, err = run("--port", "x", "--demo")
    assert (status, out) == (2, "")
    assert err.splitlines() == [
        "opendify: MODEL_CONFIG: 'm' has an unknown 'mod'; did you mean mode?",
        "opendify: SERVER_PORT: must be a whole number, not 'x'",
        "opendify: SHOW_PROCESS: must be on or off, not 'maybe'",
    ]


def test_unknown_name_is_told_beside_complaints(run: Run) -> None:
    """It may be the reason of them."""
    Path(".env").write_text("DIFY_API_BAS=x\nSERVER_PORT=x\n", encoding="utf-8")
    status, out, err = run()
    assert (status, out) == (2, "")
    assert err.splitlines() == [
        "opendify: DIFY_API_BAS is not a setting of OpenDify; did you mean "
        "DIFY_API_BASE?",
        "opendify: SERVER_PORT: must be a whole number, not 'x'",
    ]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_port_in_use_is_one_line_and_status_1(
    run: Run, monkeypatch: pytest.MonkeyPatch, log_format: str
) -> None:
    monkeypatch.setenv("LOG_FORMAT", log_format)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        status, out, err = run("--demo", "--port", str(port))
    (said,) = [line for line in err.splitlines() if str(port) in line]
    if log_format == "json":
        row = json.loads(said)
        assert row["level"] == "ERROR"
        said = row["message"]
    assert (status, out) == (1, "")
    assert said.startswith(f"opendify: can't listen on 127.0.0.1:{port}: ")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "host", ["192.0.2.1", "999.1.1.1", "::1%nowhere", "no host", "a\0b"]
)
def test_host_that_is_not_ours_is_one_line_and_status_1(run: Run, host: str) -> None:
    status, out, err = run("--demo", "--host", host)
    (said,) = [line for line in err.splitlines() if line.startswith("opendify: ")]
    assert (status, out) == (1, "")
    assert said.startswith(f"opendify: can't listen on {host}")
    assert ": None; " not in said
    assert "Traceback" not in err


# ------------------------------------------------------------------------------
# The env file
# ------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="names have no case there")
@pytest.mark.parametrize(
    "names",
    [
        ("https_proxy", "HTTPS_PROXY"),
        ("HTTPS_PROXY", "https_proxy"),
        ("HTTP_PROXY", "http_proxy"),
        ("NO_PROXY", "no_proxy"),
    ],
)
def test_proxy_in_lower_case_wins(
    checked: Run, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str]
) -> None:
    for name in names:
        monkeypatch.setenv(name, f"http://{name}:3128")
    assert shown(checked())[names[0].upper()] == f"http://{names[0].lower()}:3128"


def test_real_variable_wins_over_the_env_file(
    home: Path, checked: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "work/.env").write_text("SERVER_PORT=1001\nSERVER_HOST=localhost\n")
    monkeypatch.setenv("SERVER_PORT", "1002")
    settings = shown(checked())
    assert (settings["SERVER_PORT"], settings["SERVER_HOST"]) == ("1002", "localhost")


def test_argument_wins_over_all(
    home: Path, checked: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "work/.env").write_text("SERVER_PORT=1001\nLOG_LEVEL=INFO\n")
    monkeypatch.setenv("SERVER_PORT", "1002")
    settings = shown(
        checked("--port", "1003", "--host", "localhost", "--log-level", "error")
    )
    told = (settings["SERVER_PORT"], settings["SERVER_HOST"], settings["LOG_LEVEL"])
    assert told == ("1003", "localhost", "ERROR")


@pytest.mark.parametrize(
    ("files", "arguments", "port"),
    [
        pytest.param({}, "", "5000", id="none"),
        pytest.param({"beside": 1}, "", "1001", id="beside-the-file"),
        pytest.param({"work": 2}, "", "1002", id="working-directory"),
        pytest.param({"beside": 1, "work": 2}, "", "1002", id="both"),
        pytest.param(
            {"beside": 1, "work": 2, ".": 3}, "--env-file ../.env", "1003", id="named"
        ),
    ],
)
def test_env_file_is_found(
    home: Path, checked: Run, files: dict[str, int], arguments: str, port: str
) -> None:
    for folder, digit in files.items():
        (home / folder / ".env").write_text(f"SERVER_PORT=100{digit}\n")
    assert shown(checked(*arguments.split()))["SERVER_PORT"] == port


def test_folder_where_an_env_file_is_looked_for_is_none(
    home: Path, checked: Run
) -> None:
    """Docker makes one of what is to be mounted and is not there."""
    (home / "beside/.env").mkdir()
    assert shown(checked())["SERVER_PORT"] == "5000"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('MODEL_CONFIG={"a": "app-1", "b": "app-2"}', id="plain"),
        pytest.param(
            'MODEL_CONFIG=\'{\n "a": "app-1",\n "b": "app-2"\n}\'', id="lines"
        ),
        pytest.param('\ufeffMODEL_CONFIG={"a":"app-1","b":"app-2"}', id="bom"),
        pytest.param('export MODEL_CONFIG={"a":"app-1","b":"app-2"}\r\n', id="crlf"),
        pytest.param('MODEL_CONFIG = {"a":"app-1","b":"app-2"} # two', id="comment"),
    ],
)
def test_env_file_is_read_as_people_write_it(home: Path, run: Run, text: str) -> None:
    content = f"{text}\nDIFY_API_BASE={NOWHERE}\n"
    (home / "work/.env").write_bytes(content.encode())
    outcome = run("--check")
    assert [row[0] for row in rows(outcome)] == ["MODEL", "a", "b"]
    assert "app-1" not in outcome.out + outcome.err


def test_unknown_key_of_the_env_file_is_a_warning(home: Path, checked: Run) -> None:
    (home / "work/.env").write_text("SERVER_PROT=1\nQQQ=1\nSERVER_PORT=1001\n")
    outcome = checked()
    said = [line.partition(" WARNING ")[2] for line in outcome.err.splitlines()]
    assert said == [
        "SERVER_PROT is not a setting of OpenDify; did you mean SERVER_PORT?",
        "QQQ is not a setting of OpenDify",
    ]
    assert shown(outcome)["SERVER_PORT"] == "1001"


WRAPPED = [
    pytest.param(
        "DIFY_API_KEYS=app-0123456789abcdef,\n\napp-SECRET-key\nSECRETkey", id="list"
    ),
    pytest.param(
        'MODEL_CONFIG={\n\n"m": "app-SECRET-1",\n"SECRET":"app-SECRET-2"}', id="models"
    ),
    pytest.param("VALID_API_KEYS=a,\n\nSECRET+key==\n'SECRET' key", id="client-keys"),
    pytest.param('\n\nVALID_API_KEYS="SECRET"key\nVALID_API_KEYS="SECRET', id="quote"),
]


@pytest.mark.parametrize("text", WRAPPED)
def test_line_without_a_name_is_a_complaint_that_does_not_show_it(
    home: Path, checked: Run, text: str
) -> None:
    """It may be the rest of a list of keys; without it the port might be open."""
    (home / "work/.env").write_text(f"{text}\n")
    cure = "a value on several lines, or with quotes in it, needs single quotes"
    said = f"opendify: .env: no NAME=value in line 3, 4; {cure}\n"
    assert checked() == Outcome(2, "", said)


def test_reference_to_nothing_is_a_complaint(home: Path, checked: Run) -> None:
    """It would be left out: the port might be open, and a text of an input torn."""
    texts = ("OTHER=${NO}", "VALID_API_KEYS=${SECRET}", "NO_PROXY='a ${OTHER} b'")
    over = "MODEL_CONFIG=${NO}"  # the environment has it
    (home / "work/.env").write_text("\n".join([*texts, over, "SECRET=behind", ""]))
    cure = "for that very text write ${:-$}{NAME}"
    said = f"opendify: .env: a ${{NAME}} in line 2, 3 is not set; {cure}\n"
    assert checked() == Outcome(2, "", said)


def test_reference_is_what_the_environment_or_a_line_above_has(
    home: Path, checked: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HERE", "100")
    text = "BEFORE=2\nSERVER_PORT=${HERE}${BEFORE}\nLOG_LEVEL=${NOTHING:-ERROR}\n"
    (home / "work/.env").write_text(f"{text}HTTP_PROXY='http://u:${{:-$}}{{p}}@h'\n")
    found = shown(checked())
    assert (found["SERVER_PORT"], found["LOG_LEVEL"]) == ("1002", "ERROR")
    source = opendify.SettingsSource(opendify.build_parser().parse_args([]))
    assert source.load().http_proxy == "http://u:${p}@h"


def test_padded_key_on_a_line_of_its_own_is_not_shown(home: Path, run: Run) -> None:
    lines = "VALID_API_KEYS=a,\nSECRET1=\nSECRET2==\nNO_PROXY=\n"
    (home / "work/.env").write_text(lines)
    assert run("--check").err.startswith("No Dify app is configured.")


def test_line_without_a_name_in_a_changed_env_file_changes_nothing(
    edited: EditedFile, caplog: pytest.LogCaptureFixture
) -> None:
    edited.write("SERVER_PROT=1002")
    assert edited.port() == 5000
    caplog.clear()
    edited.write('SERVER_PORT=1002\nVALID_API_KEYS="SECRET')
    assert edited.port() is None
    (told,) = caplog.messages  # what was wrong before is not told again
    assert "edited.env: no NAME=value in line 2; " in told
    assert "SECRET" not in caplog.text


def test_folder_as_env_file_is_one_line_and_status_2(home: Path, run: Run) -> None:
    status, out, err = run("--demo", "--env-file", str(home))
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert f"{home} can't be read: " in err


def test_unreadable_env_file_is_one_line_and_status_2(home: Path, run: Run) -> None:
    (home / "work/.env").write_bytes("SERVER_PORT=1001".encode("utf-16"))
    status, out, err = run("--demo")
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert ".env can't be read: " in err
    assert err.endswith("; save it as UTF-8\n")


@pytest.mark.parametrize("arguments", ["", "--env-file .env"])
def test_folder_that_nobody_may_look_into_is_no_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    def stat(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", ".env")

    for call in ("open", "stat"):
        monkeypatch.setattr(Path, call, stat)
    monkeypatch.setattr(os, "stat", stat)
    status, _, err = run(*arguments.split())
    assert status == 2
    if arguments:
        refused = "[Errno 13] Permission denied: '.env'"
        assert err == f"opendify: .env can't be read: {refused}\n"
    else:
        assert err.startswith("No Dify app is configured.")


class Ticks:
    """The module `time`, with a clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class EditedFile:
    """An env file that is edited, and what is read of it."""

    def __init__(self, path: Path, ticks: Ticks) -> None:
        self._path, self._ticks = path, ticks
        self.write("SERVER_PORT=1001")
        options = opendify.build_parser().parse_args(["--env-file", str(path)])
        self.source = opendify.SettingsSource(options)

    def write(self, text: str) -> None:
        """Write the file, a second later."""
        self._ticks.now += 1
        self._path.write_text(f"{text}\n")
        os.utime(self._path, (self._ticks.now, self._ticks.now))

    def port(self) -> Optional[int]:
        """The port, if the file is read anew."""
        changed = self.source.load_if_changed()
        return changed.server_port if changed else None


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Ticks:
    clock = Ticks()
    monkeypatch.setattr(opendify, "time", clock)
    return clock


@pytest.fixture
def edited(home: Path, ticks: Ticks, monkeypatch: pytest.MonkeyPatch) -> EditedFile:
    monkeypatch.setenv("DIFY_API_KEYS", KEY)
    return EditedFile(home / "edited.env", ticks)


def test_env_file_is_read_again_when_it_changes(edited: EditedFile) -> None:
    assert edited.source.load().server_port == 1001
    edited.write("SERVER_PORT=1002")
    assert [edited.port(), edited.port()] == [1002, None]
    edited.write("SERVER_PORT=1002")
    assert edited.port() is None  # it says what it said


def test_env_file_is_looked_at_once_a_second(edited: EditedFile, ticks: Ticks) -> None:
    edited.write("SERVER_PORT=1002")
    assert edited.port() == 1002
    edited.write("SERVER_PORT=1003")
    ticks.now -= 0.1
    assert edited.port() is None
    ticks.now += 0.1
    assert edited.port() == 1003


def test_bad_env_file_is_reported_and_changes_nothing(
    edited: EditedFile, ticks: Ticks, caplog: pytest.LogCaptureFixture
) -> None:
    edited.write("SERVER_PORT=1002\nSHOW_PROCESS=maybe\nMAX_BODY_MB=x\nVALID_API_KEY=k")
    assert edited.port() is None
    assert [row.partition(" (")[0] for row in caplog.messages] == [
        "VALID_API_KEY is not a setting of OpenDify; did you mean VALID_API_KEYS?",
        "SHOW_PROCESS: must be on or off, not 'maybe'",
        "MAX_BODY_MB: must be a whole number, not 'x'",
    ]
    ticks.now += 1
    assert (edited.port(), len(caplog.messages)) == (None, 3)
    edited.write("SERVER_PORT=1003")
    assert edited.port() == 1003


@pytest.mark.parametrize(
    ("models", "keys", "shown"),
    [
        pytest.param('{"a": "app-1", "b": "app-2"}', "", "a, b", id="models"),
        pytest.param("", "app-1,app-2", "2 named by Dify", id="keys"),
        pytest.param('{"a": "app-1"}', "app-2", "a, 1 named by Dify", id="both"),
    ],
)
def test_models_of_a_changed_env_file_are_told(
    edited: EditedFile,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    models: str,
    keys: str,
    shown: str,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("DIFY_API_KEYS", keys)
    edited.write(f"MODEL_CONFIG={models}\nDIFY_API_BASE={NOWHERE}")
    assert edited.port() == 5000
    told = f"settings read anew: models: {shown}; Dify: {NOWHERE}"
    assert caplog.messages == [told]


def test_unknown_name_in_a_changed_env_file_is_a_warning(
    edited: EditedFile, caplog: pytest.LogCaptureFixture
) -> None:
    edited.write("SERVER_PORT=1002\nVALID_API_KEY=k")
    assert edited.port() == 1002
    assert any("VALID_API_KEYS" in text for text in caplog.messages)


def test_what_only_the_start_takes_is_a_warning_while_it_differs(
    edited: EditedFile, caplog: pytest.LogCaptureFixture
) -> None:
    edited.source.load()
    edited.write("SERVER_PORT=1001\nLOG_LEVEL=DEBUG\nMAX_BODY_MB=7")
    edited.port()
    edited.write("SERVER_PORT=1002\nCONVERSATION_TTL=1d")
    edited.port()
    edited.write("SERVER_PORT=1001\nSHOW_PROCESS=on")
    edited.port()
    assert caplog.messages == [
        f"{name} has changed: restart OpenDify, or put it back"
        for name in ("LOG_LEVEL", "SERVER_PORT", "CONVERSATION_TTL")
    ]


def test_env_file_that_names_no_app_any_more_changes_nothing(
    edited: EditedFile,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("DIFY_API_KEYS")
    edited.write("")
    assert edited.port() is None
    assert "no app any more" in caplog.text


def test_demo_stays_when_the_env_file_changes(
    edited: EditedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DIFY_API_KEYS")
    edited.source.built_in["demo"] = opendify.AppSettings(KEY)
    edited.write(f'MODEL_CONFIG={{"m": "{KEY}"}}')
    changed = edited.source.load_if_changed()
    assert changed and list(changed.model_config) == ["m", "demo"]
    edited.write("")
    changed = edited.source.load_if_changed()
    assert changed and list(changed.model_config) == ["demo"]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES])
def test_env_file_that_could_not_be_read_for_a_while_is_read(
    edited: EditedFile,
    ticks: Ticks,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    """No descriptor was left, nobody let us, or it was open elsewhere (Windows)."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    edited.write("SERVER_PORT=1002")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", refuse)
        for _ in range(3):
            assert edited.port() is None
            ticks.now += 1
    assert len(caplog.messages) == 1
    assert (edited.port(), edited.port()) == (1002, None)


def test_vanished_env_file_changes_nothing(
    home: Path, edited: EditedFile, ticks: Ticks
) -> None:
    (home / "edited.env").unlink()
    ticks.now += 1
    assert edited.port() is None
    edited.write("SERVER_PORT=1002")
    assert edited.port() == 1002


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_pipe_as_env_file_is_read_once(
    home: Path, ticks: Ticks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To open it again would wait for who writes it, and all requests with it."""
    pipe = home / "env.pipe"
    os.mkfifo(pipe)
    options = opendify.build_parser().parse_args(["--env-file", str(pipe)])
    text = f"DIFY_API_KEYS={KEY}\n"
    writer = threading.Thread(target=pipe.write_text, args=(text,), daemon=True)
    writer.start()
    source = opendify.SettingsSource(options)
    assert source.load().dify_api_keys == (KEY,)
    writer.join()
    opened: list[Path] = []
    monkeypatch.setattr(opendify, "_content_of", opened.append)
    ticks.now += 1
    assert (source.load_if_changed(), opened) == (None, [])


# ------------------------------------------------------------------------------
# The self-check
# ------------------------------------------------------------------------------

HEADINGS = ["MODEL", "APP", "MODE", "DIFY", "STATUS"]


async def check(
    run: Run, dify: FakeDify, monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> Outcome:
    """Run `--check` beside a fake Dify."""
    monkeypatch.setenv("DIFY_API_BASE", dify.base)
    call = functools.partial(run, "--check", *arguments)
    return await asyncio.get_running_loop().run_in_executor(None, call)


@pytest.mark.real_clock
async def test_check_tells_each_app_and_ends_with_0_when_all_is_well(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "MODEL_CONFIG", json.dumps({"one": KEY, "second model": {"key": OTHER_KEY}})
    )
    async with FakeDify() as dify:
        dify.app(KEY, mode="chat", name="First app")
        dify.app(OTHER_KEY, mode="completion", name="应用", version="0.15.3")
        outcome = await check(run, dify, monkeypatch)
    assert (outcome.status, outcome.err) == (0, "")
    assert rows(outcome) == [
        HEADINGS,
        ["one", "First app", "chat", "1.12.1", "ok"],
        ["second model", "应用", "completion", "0.15.3", "ok"],
    ]


@pytest.mark.real_clock
async def test_columns_of_the_check_are_straight_beside_chinese_names(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal gives each of their characters two columns."""
    config = {"客服": KEY, "second": OTHER_KEY}
    monkeypatch.setenv("MODEL_CONFIG", json.dumps(config))
    async with FakeDify() as dify:
        dify.app(KEY, name="客服助手")
        dify.app(OTHER_KEY, name="Desk")
        outcome = await check(run, dify, monkeypatch)
    assert outcome.out.splitlines()[-3:] == [
        "MODEL   APP       MODE  DIFY    STATUS",
        "客服    客服助手  chat  1.12.1  ok",
        "second  Desk      chat  1.12.1  ok",
    ]


REFUSED_KEY = (
    "to fix: Dify refused the app key (401 unauthorized: Access token is invalid). "
    "Check the key in MODEL_CONFIG or DIFY_API_KEYS, and that API access is on for the "
    "app."
)


@pytest.mark.real_clock
async def test_check_says_what_to_fix_and_ends_with_1_when_an_app_fails(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"good": KEY, "bad": OTHER_KEY, "far": {"key": KEY, "base": NOWHERE}}
    monkeypatch.setenv("MODEL_CONFIG", json.dumps(config))
    async with FakeDify() as dify:
        dify.app(KEY, name="Demo")
        outcome = await check(run, dify, monkeypatch)
    assert outcome.status == 1
    assert rows(outcome) == [
        HEADINGS,
        ["good", "Demo", "chat", "1.12.1", "ok"],
        ["bad", "-", "-", "1.12.1", "failed"],
        ["far", "-", "-", "-", "failed"],
    ]
    bad, far = notes(outcome)
    assert bad == REFUSED_KEY
    assert far.startswith("to fix: No connection with http://127.0.0.1:1 ")
    assert max(map(len, outcome.out.partition("\n\n")[2].splitlines())) <= 100


async def notes_on(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    *arguments: str,
    config: Optional[JSONObject] = None,
    posts: Optional[list[Request]] = None,
    **app: Any,
) -> tuple[int, list[str]]:
    """The status and the notes of `--check` for one app; `posts` are added to."""
    described = {"m": {"key": KEY, **(config or {})}}
    monkeypatch.setenv("MODEL_CONFIG", json.dumps(described))
    async with FakeDify() as dify:
        dify.app(KEY, **app)
        outcome = await check(run, dify, monkeypatch, *arguments)
    if posts is not None:
        posts += [row for row in dify.requests if row.method == "POST"]
    return outcome.status, notes(outcome)


FILES = {
    "enabled": True,
    "allowed_file_types": ["image", "custom"],
    "allowed_file_extensions": [".zip"],
    "number_limits": 3,
}
FORM = [text_input(name) for name in ("tone", "about", "past", "city")]
FORM += [text_input("note", required=False)]


@pytest.mark.real_clock
async def test_check_tells_inputs_uploads_and_speech(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {
        "inputs": {"tone": "calm"},
        "system_variable": "about",
        "history_variable": "past",
    }
    on = {"enabled": True}
    parameters = {"user_input_form": FORM, "file_upload": FILES}
    parameters.update(speech_to_text=on, text_to_speech=on)
    assert await notes_on(run, monkeypatch, config=config, parameters=parameters) == (
        0,
        [
            "inputs: tone (given), about (the system prompt), past (earlier messages), "
            "city (required of clients), note (optional)",
            "uploads: image, custom, .zip; 3 at a time",
            "speech: speech to text, text to speech",
        ],
    )


@pytest.mark.real_clock
@pytest.mark.parametrize("mode", ["completion", "workflow"])
async def test_check_tells_which_input_takes_the_message(
    run: Run, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    form = {"user_input_form": [text_input("city"), text_input("text")]}
    told = ["inputs: city (required of clients), text (the message)"]
    assert await notes_on(run, monkeypatch, mode=mode, parameters=form) == (0, told)
    told = ["inputs: city (the message), text (required of clients)"]
    config = {"query_variable": "city"}
    got = await notes_on(run, monkeypatch, config=config, mode=mode, parameters=form)
    assert got == (0, told)


@pytest.mark.real_clock
async def test_check_warns_of_inputs_that_the_app_lacks(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dify ignores them in silence."""
    config = {
        "inputs": {"tone": "calm", "city": "Rome"},
        "query_variable": "text",
        "system_variable": "abuot",
        "history_variable": "past",
        "tools": "inputs",
    }
    form = {"user_input_form": [text_input("tone"), text_input("past")]}
    lost = {"chat": "abuot, city, tools", "workflow": "abuot, city, text, tools"}
    for mode, names in lost.items():
        _, told = await notes_on(
            run, monkeypatch, config=config, mode=mode, parameters=form
        )
        warning = f"warning: Dify ignores what the app has no input for: {names}."
        assert told[1:] == [warning]


@pytest.mark.real_clock
async def test_check_tells_of_a_workflow_that_takes_no_message(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, (told,) = await notes_on(run, monkeypatch, mode="workflow")
    assert status == 1
    assert told.startswith("to fix: This app has no text input that could take the ")


@pytest.mark.real_clock
async def test_check_tells_of_a_wrong_mode(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = ["to fix: mode in MODEL_CONFIG is workflow, but the app is chat."]
    got = await notes_on(run, monkeypatch, config={"mode": "workflow"}, mode="chat")
    assert got == (1, told)


@pytest.mark.real_clock
@pytest.mark.parametrize(
    ("version", "mode", "threads"),
    [
        ("0.9.2", "chat", "but images|first turn"),
        ("1.2.0", "chat", "first turn"),
        ("1.3.0", "chat", ""),
        ("1.12.1", "advanced-chat", ""),
        ("1.13.3", "advanced-chat", "#32856|#38801"),
        ("1.13.3", "chat", ""),
        ("1.14.0", "chat", ""),
        ("1.14.0", "advanced-chat", "#38801|#36912"),
        ("1.14.2", "workflow", "#36912|#37755"),
        ("1.15.0", "workflow", ""),
        ("1.16.0", "chat", ""),
        ("1.16.0", "agent", "#40425"),
        ("1.17.0", "workflow", ""),
        ("1.17.1", "workflow", "#42268"),
        ("1.17.1", "advanced-chat", "#42268"),
        ("1.17.2", "advanced-chat", ""),
    ],
)
async def test_check_tells_known_problems_of_the_release(
    run: Run, monkeypatch: pytest.MonkeyPatch, version: str, mode: str, threads: str
) -> None:
    form = {"user_input_form": [text_input("text")]} if mode == "workflow" else {}
    status, told = await notes_on(
        run, monkeypatch, mode=mode, version=version, parameters=form
    )
    warnings = [note for note in told if note.startswith("warning: Dify ")]
    parts = [part for part in threads.split("|") if part]
    assert (status, len(warnings)) == (0, len(parts))
    for part, warning in zip(parts, warnings):
        assert part in warning and version in warning


@pytest.mark.parametrize("version", ["", "main", "-", "v", "9" * 5000])
def test_unknown_release_has_no_known_problems(version: str) -> None:
    assert opendify._known_problems(version, "chat") == []


HTML = Status(200, "<!DOCTYPE html><title>Dify</title>")


@pytest.mark.real_clock
async def test_check_tells_of_a_missing_v1(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FakeDify() as dify:
        dify.app(KEY, overrides={"/info": [HTML]})
        base = dify.base[: -len("/v1")]
        app = {"key": KEY, "base": base}
        monkeypatch.setenv("MODEL_CONFIG", json.dumps({"m": app}))
        outcome = await check(run, dify, monkeypatch)
    (told,) = notes(outcome)
    assert "it must be like https://host/v1. " in told
    assert told.endswith(f" {base} does not end in /v1.")


@pytest.mark.parametrize(
    ("base", "wanted"),
    [
        ("http://no-such-host.invalid/v1", "can't be resolved; check DIFY_API_BASE"),
        ("http://127.0.0.1:1/v1", "No connection with .*; check DIFY_API_BASE"),
        ("https://127.0.0.1:1/v1", "No connection with .*; check DIFY_API_BASE"),
    ],
)
def test_check_says_which_setting_leads_nowhere(
    run: Run, monkeypatch: pytest.MonkeyPatch, base: str, wanted: str
) -> None:
    apps = {"m": {"key": KEY, "base": base}}
    monkeypatch.setenv("MODEL_CONFIG", json.dumps(apps))
    outcome = run("--check")
    (told,) = notes(outcome)
    assert outcome.status == 1 and re.search(wanted, told), told
    assert "does not end" not in told


def test_check_cuts_no_address_at_its_hyphens(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who copies it has all of it."""
    host = "no-such-host." * 5 + "invalid"
    apps = {"m": {"key": KEY, "base": f"http://{host}/v1"}}
    monkeypatch.setenv("MODEL_CONFIG", json.dumps(apps))
    assert f"'{host}'" in run("--check").out


# One real turn...


@pytest.mark.real_clock
@pytest.mark.parametrize("mode", sorted(fake_dify.DEFAULT_ANSWER))
async def test_each_app_is_asked_for_one_word(
    run: Run, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    form = {"user_input_form": [text_input("text", required=False)]}
    script = fake_dify.DEFAULT_ANSWER[mode]("O", "K")
    app: JSONObject = {"mode": mode, "parameters": form, "script": script}
    posts: list[Request] = []
    status, told = await notes_on(run, monkeypatch, "--ask", posts=posts, **app)
    assert status == 0
    assert re.fullmatch(r'answer: "OK" after \d\.\d s', told[-1])
    (body,) = [row.json for row in posts]
    asked = body.get("query") or body["inputs"]["text"]
    assert (asked, body["user"]) == (opendify._ONE_WORD, "opendify-check")


@pytest.mark.real_clock
async def test_only_the_beginning_of_an_answer_is_shown(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = fake_dify.chat_answer("\x1b[31mO\n" + "K" * 80)
    _, told = await notes_on(run, monkeypatch, "--ask", script=script)
    assert f'answer: "\\x1b[31mO {"K" * 53}…" after ' in told[-1]


@pytest.mark.real_clock
async def test_turn_that_fails_is_to_be_fixed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = [fake_dify.error_event("no credentials")]
    got = await notes_on(run, monkeypatch, "--ask", script=script)
    assert got == (1, ["to fix: no credentials"])


@pytest.mark.real_clock
async def test_turn_that_does_not_end_is_stopped(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opendify, "ASK_S", 0.2)
    script = [fake_dify.message("O"), fake_dify.Hang()]
    posts: list[Request] = []
    got = await notes_on(run, monkeypatch, "--ask", posts=posts, script=script)
    assert got == (1, ["to fix: There is no whole answer after 0.2 s."])
    ends = [row.path.rpartition("/")[2] for row in posts]
    assert ends == ["chat-messages", "stop"]


@pytest.mark.real_clock
async def test_app_is_not_asked_without_what_clients_must_give(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = {"user_input_form": [text_input("city")]}
    status, told = await notes_on(run, monkeypatch, "--ask", parameters=form)
    assert (status, told[1]) == (
        0,
        "warning: No turn: city is required in input form; give it in the model's "
        "`inputs` to ask all the same.",
    )
    config = {"inputs": {"city": "Rome"}}
    status, told = await notes_on(
        run, monkeypatch, "--ask", config=config, parameters=form
    )
    assert (status, told[0]) == (0, "inputs: city (given)")
    assert told[1].startswith("answer: ")


def test_ask_without_check_is_bad_usage(run: Run) -> None:
    status, out, err = run("--ask", "--demo")
    assert (status, out) == (2, "")
    assert "--ask belongs to --check: say --check --ask" in err


def test_demo_can_be_checked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opendify, "_DEMO_ANSWER", opendify._DEMO_ANSWER[:40])
    outcome = run("--check", "--demo", "--ask")
    assert (outcome.status, outcome.err) == (0, "")
    assert rows(outcome)[1:] == [["demo", "OpenDify demo", "chat", "-", "ok"]]
    (told,) = notes(outcome)
    assert told.startswith("answer: \"Hello! This is OpenDify's demo app.")


@contextlib.asynccontextmanager
async def sent(
    port: int, line: str, body: str = ""
) -> AsyncIterator[asyncio.StreamReader]:
    """Send a request; give what is answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    fields = f"Host: a\r\nContent-Length: {len(body)}"
    writer.write(f"{line} HTTP/1.1\r\n{fields}\r\n\r\n{body}".encode())
    yield reader
    writer.close()
    await writer.wait_closed()


async def next_object(stream: asyncio.StreamReader, end: str) -> JSONObject:
    """Return the next object of JSON, known by its end."""
    text = (await stream.readuntil(end.encode())).decode()
    found: JSONObject = json.loads(text[text.index("{") :])
    return found


async def test_demo_stops_where_it_is_told_and_keeps_what_it_said() -> None:
    demo, said = opendify.DemoApp(), ""
    ((_, port),) = await demo.listen("127.0.0.1", 0)
    question = '{"query": "Hi", "conversation_id": "mine"}'
    async with sent(port, "POST /v1/chat-messages", question) as stream:
        event = await next_object(stream, "\n\n")
        async with sent(port, f"POST /v1/chat-messages/{event['task_id']}/stop"):
            while event["event"] == "message":
                said += event["answer"]
                event = await next_object(stream, "\n\n")
    assert 0 < len(said) < len(opendify._DEMO_ANSWER)
    asked = "GET /v1/messages?conversation_id="
    async with sent(port, asked + "mine") as stream:
        (row,) = (await next_object(stream, '"has_more":false}'))["data"]
    told = {"id": event["message_id"], "query": "Hi", "answer": said}
    assert {name: row[name] for name in told} == told
    async with sent(port, asked + "another") as stream:
        assert (await next_object(stream, '"has_more":false}'))["data"] == []
    await demo.stop(0)


async def test_demo_says_that_it_takes_no_files() -> None:
    demo = opendify.DemoApp()
    ((_, port),) = await demo.listen("127.0.0.1", 0)
    async with sent(port, "POST /v1/files/upload", "x") as stream:
        assert (await stream.readline()).startswith(b"HTTP/1.1 400 ")
        told = await next_object(stream, "}")
    assert told == {"message": "The demo app takes no files."}
    await demo.stop(0)


@pytest.mark.real_clock
async def test_few_apps_are_checked_at_once(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"app-{n:016}" for n in range(12)]
    monkeypatch.setenv("DIFY_API_KEYS", ",".join(keys))
    async with FakeDify() as dify:
        for key in keys:
            dify.app(key, name=key)
        outcome = await check(run, dify, monkeypatch)
        assert dify.connections <= opendify.CHECKS_AT_ONCE
    assert [row[1] for row in rows(outcome)[1:]] == keys


# Colours...


@pytest.mark.parametrize(
    ("is_terminal", "variables", "has_colours"),
    [
        pytest.param(True, {"TERM": "xterm"}, True, id="terminal"),
        pytest.param(True, {"TERM": "xterm", "NO_COLOR": ""}, True, id="empty"),
        pytest.param(True, {"TERM": "xterm", "NO_COLOR": "1"}, False, id="no-color"),
        pytest.param(True, {"TERM": "dumb"}, False, id="dumb"),
        pytest.param(True, {}, False, id="no-term"),
        pytest.param(False, {"TERM": "xterm"}, False, id="pipe"),
    ],
)
def test_colours_are_for_terminals(
    checked: Run,
    monkeypatch: pytest.MonkeyPatch,
    is_terminal: bool,
    variables: dict[str, str],
    has_colours: bool,
) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    plain = checked().out
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    out = checked().out
    for word in ("failed", "to fix   "):
        assert (f"\x1b[31m{word}\x1b[0m" in out) == has_colours
    assert re.sub(r"\x1b\[\d*m", "", out) == plain


# Settings and keys...


@pytest.mark.real_clock
async def test_check_tells_every_app_of_dify_api_keys(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their masked keys look alike: that must not hide one of them."""
    monkeypatch.setenv("DIFY_API_KEYS", f"{KEY}, {OTHER_KEY}")
    async with FakeDify() as dify:
        dify.app(KEY, name="One")
        dify.app(OTHER_KEY, name="Two")
        outcome = await check(run, dify, monkeypatch)
    assert outcome.status == 0
    assert [row[1] for row in rows(outcome)] == ["APP", "One", "Two"]


def test_check_tells_of_a_base_that_is_no_host_name(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    apps = {"m": {"key": KEY, "base": "http://api..dify.example/v1"}}
    monkeypatch.setenv("MODEL_CONFIG", json.dumps(apps))
    outcome = run("--check")
    assert outcome.status == 1
    assert "can't be resolved" in notes(outcome)[0]


def test_check_masks_keys(checked: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = [f"app-{digit * 20}" for digit in "12"] + ["sk-client-key-of-ours"]
    monkeypatch.setenv("MODEL_CONFIG", json.dumps({"m": secrets[0]}))
    monkeypatch.setenv("DIFY_API_KEYS", secrets[1])
    monkeypatch.setenv("VALID_API_KEYS", secrets[2])
    monkeypatch.setenv("DIFY_API_BASE", NOWHERE)
    outcome = checked()
    assert [key for key in secrets if key in outcome.out + outcome.err] == []
    settings = shown(outcome)
    assert settings["MODEL_CONFIG"] == "m (app-11…)"
    assert settings["DIFY_API_KEYS"] == "app-22…"
    assert settings["VALID_API_KEYS"] == "sk-cli…"


def test_check_masks_passwords_of_urls(
    checked: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:our-secret@proxy.example:3128")
    monkeypatch.setenv("DIFY_API_BASE", "https://me:our-secret@dify.example/v1")
    outcome = checked()
    assert "our-secret" not in outcome.out + outcome.err
    assert "proxy.example:3128" in shown(outcome)["HTTPS_PROXY"]
    assert shown(outcome)["DIFY_API_BASE"] == "https://…@dify.example/v1"


def test_check_shows_origins_whole(
    checked: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    origins = "https://chat.example.org, https://example.com:8443"
    monkeypatch.setenv("ALLOWED_ORIGINS", origins)
    assert shown(checked())["ALLOWED_ORIGINS"] == origins


def test_check_shows_every_setting(checked: Run) -> None:
    outcome = checked()
    assert outcome.status == 1
    assert list(shown(outcome)) == [variable for variable, _, _ in setting_rows()]
    assert "" not in shown(outcome).values()


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        pytest.param("SERVER_PORT", "1", id="port-1"),
        pytest.param("SERVER_PORT", "0", id="port-0"),
        pytest.param("STREAM_MAX_LAG", "1", id="one-second"),
        pytest.param("STREAM_MAX_LAG", "0", id="no-seconds"),
    ],
)
def test_check_shows_numbers_as_numbers(
    checked: Run, monkeypatch: pytest.MonkeyPatch, variable: str, text: str
) -> None:
    monkeypatch.setenv(variable, text)
    assert float(shown(checked())[variable].rstrip("s")) == float(text)


# ------------------------------------------------------------------------------
# As a process
# ------------------------------------------------------------------------------

START = [sys.executable, "-X", "utf8", str(FILE)]


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--check", 1)])
def test_output_in_another_encoding_is_no_failure(
    home: Path, argument: str, status: int
) -> None:
    app = json.dumps({"应用 \U0001f600": {"key": KEY, "base": NOWHERE}})
    names = {"PYTHONIOENCODING": "latin-1", "MODEL_CONFIG": app}
    ended = subprocess.run(
        [sys.executable, str(FILE), argument],
        env={**os.environ, **names},
        cwd=home,
        capture_output=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (status, b"")
    assert ended.stdout.endswith(b"\n")


@pytest.mark.parametrize("is_buffered", [True, False])
@pytest.mark.parametrize(
    ("argument", "status"), [("--help", 0), ("--version", 0), ("--check", 1)]
)
def test_output_that_nobody_reads_is_no_failure(
    home: Path, argument: str, status: int, *, is_buffered: bool
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    app = json.dumps({"m": {"key": KEY, "base": NOWHERE}})
    names = {"MODEL_CONFIG": app, "PYTHONUNBUFFERED": "" if is_buffered else "1"}
    ended = subprocess.run(
        [*START, argument],
        env={**few_variables(), **names},
        cwd=home,
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (status, b"")


@pytest.mark.parametrize("is_buffered", [True, False])
@pytest.mark.parametrize(
    ("argument", "in_file", "status"),
    [
        pytest.param("--bogus", "", 2, id="usage"),
        pytest.param("--port=x", "", 2, id="settings"),
        pytest.param("--port=0", "", 2, id="nothing-configured"),
        pytest.param("--host=1.2.3.4", f"DIFY_API_KEYS={KEY}", 1, id="host"),
        pytest.param("--check", f"DIFY_API_KEYS={KEY}\nBOGUS=1", 1, id="log"),
    ],
)
def test_complaint_that_nobody_reads_changes_no_status(
    home: Path, argument: str, in_file: str, status: int, *, is_buffered: bool
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    (home / "work/.env").write_text(f"{in_file}\nDIFY_API_BASE={NOWHERE}\n")
    unbuffered = {"PYTHONUNBUFFERED": "" if is_buffered else "1"}
    ended = subprocess.run(
        [*START, argument],
        env={**few_variables(), **unbuffered},
        cwd=home / "work",
        stdout=subprocess.DEVNULL,
        stderr=writer,
        check=False,
    )
    os.close(writer)
    assert ended.returncode == status


@pytest.mark.skipif(sys.platform == "win32", reason="no process is asked to stop there")
def test_stop_is_clean_though_nobody_reads_the_log_any_more(home: Path) -> None:
    """As after Ctrl-C in `python opendify.py 2>&1 | tee log`, which ends tee first."""
    server = subprocess.Popen(
        [*START, "--port=0"],
        env={**few_variables(), "DIFY_API_KEYS": KEY, "DIFY_API_BASE": NOWHERE},
        cwd=home,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    with server:
        assert server.stderr
        assert b"INFO    models: " in server.stderr.readline()
        server.stderr.close()
        server.terminate()
        assert server.wait(30) == 0


def test_check_needs_no_output(checked: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed one, or that of pythonw.exe, is None."""
    monkeypatch.setattr(sys, "stdout", None)
    assert checked().status == 1


def test_missing_package_is_one_line_and_status_1(tmp_path: Path) -> None:
    """Without site-packages there is neither h11 nor dotenv."""
    command = [sys.executable, "-I", "-S", str(FILE), "--version"]
    ended = subprocess.run(
        command, env=few_variables(), cwd=tmp_path, capture_output=True, check=False
    )
    err = ended.stderr.decode()
    assert (ended.returncode, ended.stdout) == (1, b"")
    assert len(err.splitlines()) == 1
    assert "'h11'" in err
    assert "-m pip install h11 python-dotenv" in err


@pytest.mark.parametrize("name", ["_sqlite3", "_ssl"])
def test_missing_part_of_python_is_one_line_and_status_1(name: str) -> None:
    """FreeBSD packages it apart; a Python built without its library lacks it, too."""
    code = (
        f"import runpy, sys; sys.modules[{name!r}] = None; "
        f"runpy.run_path({str(FILE)!r}, run_name='__main__')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, "--version"], capture_output=True, check=False
    )
    err = ended.stderr.decode()
    assert (ended.returncode, ended.stdout, len(err.splitlines())) == (1, b"", 1)
    assert f"{name!r}: a part of Python that some systems package apart" in err


@contextlib.contextmanager
def demo(folder: Path, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Give the demo on a free port, as a process, and the first line that it prints."""
    with subprocess.Popen(
        [*START, "--demo", "--port", "0"],
        cwd=folder,
        env={**few_variables(), **variables},
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout
            yield process, process.stdout.readline()
        finally:
            process.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
def test_demo_serves_until_a_signal_and_ends_with_0(tmp_path: Path) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    shown = re.escape(VERSION[:-1]) + r" listens on (http://127\.0\.0\.1:\d+/v1)\n"
    with demo(tmp_path) as (process, line):
        told = re.fullmatch(shown, line)
        assert told, line
        with direct.open(f"{told[1]}/models") as response:
            models = json.load(response)["data"]
        assert [model["id"] for model in models] == ["demo"]
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate()
    assert (process.returncode, out) == (0, "")
    assert " GET /v1/models 200 " in err
    assert "Traceback" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
def test_file_that_fails_later_is_a_warning(tmp_path: Path) -> None:
    path = str(tmp_path / "c.sqlite")
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with demo(tmp_path, CONVERSATION_STORE=path) as (process, line):
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for _ in range(3):
                with pytest.raises(urllib.error.HTTPError, match="503") as caught:
                    direct.open(f"{line.split()[-1]}/conversations", b"{}")
                caught.value.close()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate()
    assert err.count("WARNING CONVERSATION_STORE: database is locked; ") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_check_that_is_interrupted_ends_with_1(tmp_path: Path) -> None:
    """Nothing is wrong, but nothing is known either."""
    with socket.create_server(("127.0.0.1", 0)) as slow:
        app = {"key": KEY, "base": f"http://127.0.0.1:{slow.getsockname()[1]}/v1"}
        names = {"MODEL_CONFIG": json.dumps({"m": app})}
        with (
            subprocess.Popen(
                [*START, "--check"],
                cwd=tmp_path,
                env={**few_variables(), **names},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            ) as process,
            slow.accept()[0] as asked,
        ):
            asked.recv(1)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate()
    assert (process.returncode, err) == (1, b"")


async def test_file_that_can_not_be_used_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Conversations that end with the process should surprise nobody."""
    store = {"CONVERSATION_STORE": str(tmp_path)}
    settings = opendify.parse_settings({"DIFY_API_KEYS": KEY, **store})

    async def serve(*_: object) -> int:
        return 0

    monkeypatch.setattr(opendify, "_serve_until_signal", serve)
    source = opendify.SettingsSource(opendify.build_parser().parse_args([]))
    assert await opendify._serve(settings, source) == 0
    (told,) = caplog.messages
    assert told.startswith(f"CONVERSATION_STORE: the file {tmp_path} can't be used ")
    assert told.endswith("conversations are kept in memory and end with this process.")


async def test_changed_env_file_that_lets_anyone_in_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    closed = opendify.parse_settings({"DIFY_API_KEYS": KEY, "VALID_API_KEYS": "k"})
    source = opendify.SettingsSource(opendify.build_parser().parse_args([]))
    changes = iter([dataclasses.replace(closed, valid_api_keys=()), None])
    monkeypatch.setattr(source, "load_if_changed", lambda: next(changes))

    async def serve(_: object, server: opendify.Server) -> int:
        server.is_local = False
        server.before_request()
        server.before_request()
        return 0

    monkeypatch.setattr(opendify, "_serve_until_signal", serve)
    assert await opendify._serve(closed, source) == 0
    (told,) = caplog.messages
    assert told.startswith("anyone who reaches this port can use the apps")


async def served_at(
    host: str, patch: pytest.MonkeyPatch, *, is_clean: bool = True, keys: str = ""
) -> int:
    """Serve at this address until a signal that comes at once; returns the status."""
    variables = {"MODEL_CONFIG": json.dumps({"m": KEY}), "VALID_API_KEYS": keys}
    settings = opendify.parse_settings(variables)
    dify = opendify.Dify(settings, opendify.open_wire)
    conversations, _ = opendify.open_conversations("memory", 1.0)
    server = opendify.Server(opendify.Site(dify, conversations, str))

    async def listen(*_: object) -> list[tuple[str, int]]:
        server.is_local = opendify.is_loopback(host)
        return [(host, 5000)]

    async def drain(*_: object) -> bool:
        return is_clean

    patch.setattr(server, "listen", listen)
    patch.setattr(server, "drain", drain)
    patch.setattr(opendify, "_on_signals", lambda stop: stop.set())
    status = await opendify._serve_until_signal(settings, server)
    dify.close()
    conversations.close()
    return status


@pytest.mark.parametrize(("is_clean", "status"), [(True, 0), (False, 1)])
async def test_status_tells_whether_open_requests_could_end(
    is_clean: bool, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await served_at("127.0.0.1", monkeypatch, is_clean=is_clean) == status


@pytest.mark.parametrize(
    ("host", "keys", "is_warning"),
    [
        ("127.0.0.1", "", False),
        ("::1", "", False),
        ("::", "", True),
        ("0.0.0.0", "", True),
        ("0.0.0.0", "secret", False),
    ],
)
async def test_start_tells_who_can_reach_it(
    host: str,
    keys: str,
    is_warning: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    await served_at(host, monkeypatch, keys=keys)
    written = host if "." in host else f"[{host}]"
    assert capsys.readouterr().out.endswith(f" listens on http://{written}:5000/v1\n")
    assert any("set VALID_API_KEYS" in text for text in caplog.messages) == is_warning


@pytest.mark.parametrize("is_stopping", [True, False])
async def test_port_that_asyncio_gives_up_is_opened_again(
    is_stopping: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As on Windows, where the loop closes it as soon as the handler returns."""
    loop, stop, listener = asyncio.get_running_loop(), asyncio.Event(), Deaf()
    opendify._watch_loop(listener, stop)
    ((host, port),) = await listener.listen("127.0.0.1", 0)
    with socket.socket() as other:  # who takes the port for a while
        (lost,) = listener._servers
        context = {"message": "Accept failed on a socket", "exception": OSError("64")}
        loop.call_exception_handler({**context, "socket": lost.sockets[0]})
        lost.close()
        await asyncio.sleep(0)
        other.bind((host, port))
        other.listen()
        await asyncio.sleep(opendify.REOPEN_S * 3)
    if is_stopping:
        stop.set()
    await asyncio.sleep(opendify.REOPEN_S * 2)
    open_servers = [server for server in listener._servers if server.sockets]
    assert len(open_servers) == (0 if is_stopping else 1)
    assert caplog.messages == [f"port {port} was closed (64), and is opened again"]
    await listener.stop(0)


async def test_lack_of_descriptors_is_told_once_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The loop tries to accept again and again; other errors it tells as ever."""
    loop = asyncio.get_running_loop()
    opendify._watch_loop(Deaf(), asyncio.Event())
    told = []
    for error in (*[OSError(errno.EMFILE, "")] * 3, OSError(errno.ENFILE, ""), None):
        loop.call_exception_handler({"message": "odd", "exception": error})
        told.append([text.partition(":")[0] for text in caplog.messages])
        caplog.clear()
        await asyncio.sleep(31)
    lack = ["no descriptors are left"]
    assert told == [lack, [], lack, [], ["odd"]]


TAKEN = opendify.MAX_DESCRIPTORS


@pytest.mark.parametrize(
    ("soft", "hard", "taken"),
    [
        pytest.param(256, 4096, [(4096, 4096)], id="all"),
        pytest.param(256, TAKEN + 1, [(TAKEN, TAKEN + 1)], id="enough"),
        pytest.param(TAKEN + 1, TAKEN + 2, [], id="more-is-there"),
    ],
)
def test_as_many_descriptors_as_allowed_are_taken(
    soft: int, hard: int, taken: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    resource, done = pytest.importorskip("resource"), []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: done.append(both))
    opendify._raise_descriptor_limit()
    assert done == taken


async def test_what_stays_is_no_work_for_the_collector(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[tuple[int, ...]] = []
    monkeypatch.setattr(gc, "set_threshold", lambda *most: told.append(most))
    before = [object()]
    assert await served_at("127.0.0.1", monkeypatch) == 0
    after = [object()]
    looked_at = [id(item) for item in gc.get_objects()]
    assert (id(before) in looked_at, id(after) in looked_at) == (False, True)
    assert told == [(opendify.NEW_OBJECTS, 2, 2)]


def test_another_collector_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(gc, "freeze")
    monkeypatch.delattr(gc, "set_threshold")
    opendify._spare_collector()


def test_time_of_a_line_is_its_own() -> None:
    formatter, times = opendify._Formatter(is_json=False), []
    for created in (1700000000.25, 1700000000.5, 1700000001.75, 1700000061.0):
        record = logging.makeLogRecord({"msg": "x"})
        record.created, record.msecs = created, created % 1 * 1000
        times.append(formatter.format(record).split()[1][-6:])
    assert times == ["20,250", "20,500", "21,750", "21,000"]


@pytest.mark.parametrize("is_json", [False, True], ids=["text", "json"])
def test_log_has_the_traceback_of_a_bug(is_json: bool) -> None:
    try:
        raise ZeroDivisionError("a bug")
    except ZeroDivisionError:
        told = {"msg": "failed", "exc_info": sys.exc_info()}
    line = opendify._Formatter(is_json=is_json).format(logging.makeLogRecord(told))
    trace = line.partition("failed\n")[2]
    if is_json:
        value = json.loads(line)
        assert list(value) == ["time", "level", "message", "exception"]
        trace = value["exception"]
    assert trace.startswith("Traceback ") and trace.endswith("Error: a bug")
