#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["h11>=0.16,<1", "python-dotenv>=1.0"]
# ///
"""OpenDify: talk to Dify apps through the OpenAI API.

    python opendify.py             # reads .env, listens on 127.0.0.1:5000
    python opendify.py --demo      # no configuration: a built-in app to chat with
    uv run opendify.py --help      # the same, dependencies included

One chat turn:

    client -> Server -> OpenAI -> Conversations -> Dify -> Upstream -> Dify's server
    client <- Server <- OpenAI <- Pacer <- Dify <- SSE <- Upstream <---- Dify's server

The rooms, in reading order. Each uses only those above it; 1-8 are pure.

     1. Settings       every setting, its default and its meaning
     2. Errors         what can go wrong, as OpenAI says it
     3. SSE            bytes to events, events to bytes
     4. Turn           the hub: what is asked, what is answered, in nobody's dialect
     5. Dify           questions to Dify requests, Dify events to answer parts
     6. OpenAI         OpenAI requests to questions, answer parts to chunks and objects
     7. Conversations  which Dify conversation a request continues
     8. Pacer          when each piece of text is due
     9. Wire           HTTP/1.1 over asyncio streams, both roles
    10. Upstream       the connection pool and the Dify client
    11. Handlers       the routes, one coroutine each
    12. Server         connections, the error boundary, shutdown
    13. Command line   arguments, logging, signals, main()
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import hmac
import html
import http.client
import json
import logging
import math
import os
import re
import signal
import socket
import sqlite3
import ssl
import sys
import time
import unicodedata
import urllib.parse
import uuid
from collections import deque
from collections.abc import Awaitable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from math import exp, inf, sqrt
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Union, cast

try:
    import h11
    from dotenv import dotenv_values
except ImportError as missing:
    sys.exit(
        f"OpenDify needs the package {missing.name!r}. Install what it needs with:"
        f"\n    {sys.executable} -m pip install h11 python-dotenv"
    )

__version__ = "0.1.0"

log = logging.getLogger("opendify")

# ==============================================================================
# 1. Settings
# ==============================================================================
#
# Every setting with its default and its meaning, once: the parser, the help and the
# test of the documents read this table. A setting is its variable in lower case; the
# type of its default chooses its parser. Knows no environment and no files: the
# command line hands the variables in.
#
#     {"SERVER_PORT": "8080", …}  ->  Settings(server_port=8080, …)

CHAT_MODES = ("chat", "agent-chat", "advanced-chat", "agent")
APP_MODES = (*CHAT_MODES, "completion", "workflow")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_SWITCHES = {
    **dict.fromkeys(("on", "true", "yes", "1"), True),
    **dict.fromkeys(("off", "false", "no", "0"), False),
}


class SettingsError(Exception):
    """Everything that is wrong with the settings: `complaints`, a line each."""

    def __init__(self, complaints: Sequence[str]) -> None:
        super().__init__("\n".join(complaints))
        self.complaints = list(complaints)


class Seconds(float):
    """A duration; written `90`, `1.5`, `30s`, `5m`, `12h` or `7d`."""


@dataclass(frozen=True)
class AppSettings:
    """One Dify app, as far as the operator described it.

    Empty texts mean "find out": the base from DIFY_API_BASE, the mode from Dify, the
    variables by their names.
    """

    key: str = field(repr=False)
    base: str = ""
    mode: str = ""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    query_variable: str = ""
    output_variable: str = ""
    system_variable: str = ""
    history_variable: str = ""
    smoothing: bool | None = None


def _setting(default: Any, meaning: str, least: float | None = None) -> Any:
    """A field of Settings: default, meaning for the help, and lowest value."""
    metadata = {"default": default, "meaning": meaning, "least": least}
    return field(default_factory=lambda: default, metadata=metadata)


@dataclass(frozen=True, repr=False)
class Settings:
    """The whole configuration; made by `parse_settings`, printed by nobody."""

    model_config: Mapping[str, AppSettings] = _setting(
        {}, 'JSON object: model name to app key, or to {"key": …, "mode": …, …}'
    )
    dify_api_keys: tuple[str, ...] = _setting(
        (), "comma-separated app keys, each listed under its app's name"
    )
    dify_api_base: str = _setting(
        "https://api.dify.ai/v1", "Dify's API, with its /v1 at the end"
    )
    server_host: str = _setting("127.0.0.1", "address to listen on")
    server_port: int = _setting(5000, "port to listen on; 0 takes a free one", 0)
    valid_api_keys: tuple[str, ...] = _setting(
        (), "comma-separated keys, one of which clients must present; empty: any"
    )
    stream_smoothing: bool = _setting(True, "let streamed text appear evenly")
    stream_max_lag: Seconds = _setting(
        Seconds(0.4), "seconds that text may be held back, at most", 0
    )
    conversation_store: str = _setting(
        "memory", "or the path of an SQLite file, to survive a restart"
    )
    conversation_ttl: Seconds = _setting(
        Seconds(7 * 86400), "how long an unused conversation is remembered", 1
    )
    show_process: bool = _setting(
        False, "agent tools and workflow steps as reasoning text"
    )
    dify_connect_timeout: Seconds = _setting(
        Seconds(10), "seconds to reach Dify", 0.001
    )
    dify_first_event_timeout: Seconds = _setting(
        Seconds(120), "seconds until Dify's first event; pings do not count", 0.001
    )
    dify_idle_timeout: Seconds = _setting(
        Seconds(600), "seconds between two events; pings do not count", 0.001
    )
    log_level: str = _setting("INFO", ", ".join(LOG_LEVELS))


def setting_rows() -> list[tuple[str, str, str]]:
    """(variable, default as one writes it, meaning) of every setting, in order."""
    return [
        (row.name.upper(), _written(row.metadata["default"]), row.metadata["meaning"])
        for row in dataclasses.fields(Settings)
    ]


def parse_settings(variables: Mapping[str, str]) -> Settings:
    """Settings from variables; those that are absent or blank keep their default.

    Raises:
        SettingsError: something does not parse; it names every such variable.
    """
    values: dict[str, Any] = {}
    complaints: list[str] = []
    for row in dataclasses.fields(Settings):
        text = variables.get(row.name.upper(), "").strip()
        if not text:
            continue
        default, least = row.metadata["default"], row.metadata["least"]
        try:
            value = values[row.name] = _PARSERS[type(default)](text)
            if least is not None and value < least:
                raise ValueError(f"must be {least:g} or more, not {text}")
        except ValueError as error:
            complaints.append(f"{row.name.upper()}: {error}")
    complaints += _complaints(values)
    if complaints:
        raise SettingsError(complaints)
    settings = Settings(**values)
    base = settings.dify_api_base.rstrip("/")
    apps = {
        model: dataclasses.replace(app, base=(app.base or base).rstrip("/"))
        for model, app in settings.model_config.items()
    }
    return dataclasses.replace(settings, dify_api_base=base, model_config=apps)


def unknown_variables(names: Iterable[str]) -> list[str]:
    """A warning for each name of an env file that is no setting: what was meant?"""
    known = [variable for variable, _, _ in setting_rows()]
    warnings = []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name.upper(), known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            warnings.append(f"{name} is not a setting of OpenDify{hint}")
    return warnings


def mask_key(key: str) -> str:
    """A key as it may be shown: its beginning, and that there is more."""
    return key[:6] + "…" if len(key) > 8 else "…"


def _written(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, Seconds) and default >= _UNITS_S["d"]:
        return f"{default / _UNITS_S['d']:g}d"
    return f"{default:g}" if isinstance(default, float) else str(default or "")


def _complaints(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with values that parsed."""
    complaints = []
    bases = {"DIFY_API_BASE": values.get("dify_api_base", "")}
    for model, app in values.get("model_config", {}).items():
        bases[f"MODEL_CONFIG: base of {model!r}"] = app.base
    for name, base in bases.items():
        if base and not _is_base_url(base):
            complaints.append(f"{name}: must be a URL like https://host/v1, not {base}")
    if values.get("log_level", "INFO") not in LOG_LEVELS:
        complaints.append(f"LOG_LEVEL: must be one of {', '.join(LOG_LEVELS)}")
    if values.get("server_port", 0) > 65535:
        complaints.append("SERVER_PORT: must be 65535 or less")
    return complaints


def _is_base_url(base: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(base)
        return (
            parts.scheme in ("http", "https")
            and bool(parts.hostname and (parts.port is None or parts.port))
            and base.isascii()
        )
    except ValueError:
        return False


def _parse_switch(text: str) -> bool:
    if text.lower() not in _SWITCHES:
        raise ValueError(f"must be on or off, not {text!r}")
    return _SWITCHES[text.lower()]


def _parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"must be a whole number, not {text!r}") from None


def _parse_seconds(text: str) -> Seconds:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.lower())
    if not match:
        raise ValueError(f"must be seconds, or like 30s, 5m, 12h, 7d, not {text!r}")
    return Seconds(float(match[1]) * _UNITS_S[match[2]])


def _parse_list(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


def _parse_models(text: str) -> dict[str, AppSettings]:
    try:
        models = json.loads(text)
    except ValueError as error:
        raise ValueError(f'is not JSON ({error}): {{"name": "app-…"}}') from None
    if not isinstance(models, dict):
        raise ValueError('must be a JSON object like {"name": "app-…"}')
    problems: list[str] = []
    apps = {name: _parse_app(name, value, problems) for name, value in models.items()}
    if problems:
        raise ValueError("; ".join(problems))
    return apps


def _parse_app(name: str, value: Any, problems: list[str]) -> AppSettings:
    """One entry of MODEL_CONFIG; what is wrong with it is added to `problems`."""
    described: Any = {"key": value} if isinstance(value, str) else value
    if not isinstance(described, dict) or not described.get("key"):
        problems.append(f'{name!r} needs an app key: "app-…" or {{"key": "app-…"}}')
        return AppSettings("")
    known = [row.name for row in dataclasses.fields(AppSettings)]
    for key, entry in described.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            problems.append(f"{name!r} has an unknown {key!r}{hint}")
        elif not isinstance(entry, _APP_TYPES.get(key, str)):
            wanted = _APP_TYPES.get(key, str).__name__
            problems.append(f"the {key} of {name!r} must be of type {wanted}")
    if described.get("mode", "") not in ("", *APP_MODES):
        problems.append(f"the mode of {name!r} must be one of {', '.join(APP_MODES)}")
    return AppSettings(**{key: described[key] for key in known if key in described})


_APP_TYPES: Mapping[str, type] = {"inputs": dict, "smoothing": bool}
_PARSERS: Mapping[type, Callable[[str], Any]] = {
    bool: _parse_switch,
    int: _parse_int,
    Seconds: _parse_seconds,
    str: str,
    tuple: _parse_list,
    dict: _parse_models,
}


# ==============================================================================
# 2. Errors
# ==============================================================================
#
# What can go wrong, and how OpenAI says it: one class a cause, one table of status,
# type and code (the error table of OpenAI's API, as its clients read it). Messages
# are shown to end users as they are: they say what to do, and hold no secret.
#
#     ModelNotFound("…")  <->  404 {"error": {"message", "type", "param", "code"}}
#
# OpenAI's SDKs repeat 408, 409, 429 and every 5xx twice, unless told not to by
# `x-should-retry: false`; that is said wherever a repeat can't help.


class ProxyError(Exception):
    """Anything that is answered with an error; itself a bug's answer, 500.

    Args:
        message: for the client's user: what is wrong and what to do.
        param: the request's field at fault.
        code: OpenAI's or Dify's code, where it differs from the class's.
        status: likewise.
        retry: whether repeating the request can help; None leaves it to the client.
        headers: further response headers, (name, value).
    """

    status = 500
    type = "server_error"
    code: str | None = None
    retry: bool | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry: bool | None = None,
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.code
        self.retry = self.retry if retry is None else retry
        self.headers = list(headers)


class BadRequest(ProxyError):
    """The request can't be served as it is."""

    status, type = 400, "invalid_request_error"


class Unauthorized(BadRequest):
    """No key, or none that this server knows."""

    status, code = 401, "invalid_api_key"


class Forbidden(BadRequest):
    """Not from here, or not for this key."""

    status, code = 403, "permission_denied"


class NotFound(BadRequest):
    """Nothing is served at this path."""

    status, code = 404, "unknown_url"


class ModelNotFound(BadRequest):
    """No app goes by this name."""

    status, code = 404, "model_not_found"


class MethodNotAllowed(BadRequest):
    """The path exists, for another method."""

    status, code = 405, "method_not_supported"


class RequestTimeout(BadRequest):
    """The client took too long to send its request."""

    status = 408


class BodyTooLarge(BadRequest):
    """The body is over the limit."""

    status = 413


class HeadTooLarge(BadRequest):
    """The request's head is over the limit (RFC 6585, section 5)."""

    status = 431


class RateLimited(ProxyError):
    """Dify, or the model behind it, wants fewer requests."""

    status, type, code = 429, "requests", "rate_limit_exceeded"


class QuotaExceeded(ProxyError):
    """Credit is used up: a repeat can't help."""

    status, type, code, retry = 429, "insufficient_quota", "insufficient_quota", False


class UpstreamRejected(BadRequest):
    """Dify refuses the request before it runs; the code is Dify's."""


class UpstreamFailed(ProxyError):
    """No connection, a broken answer, or a run that failed."""

    status, code = 502, "upstream_error"


class ConfigurationFault(UpstreamFailed):
    """The operator has to mend something, such as an app's key."""

    retry = False


class UpstreamTimeout(ProxyError):
    """Dify is too slow."""

    status, code = 504, "upstream_timeout"


class Overloaded(ProxyError):
    """Too many connections, or shutting down."""

    status, code = 503, "server_is_overloaded"


def error_body(error: ProxyError) -> dict[str, Any]:
    """The error as OpenAI's clients read it; all four keys, always."""
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def error_headers(error: ProxyError) -> list[tuple[str, str]]:
    """The headers that go with an error's response."""
    headers = list(error.headers)
    if error.retry is not None:
        headers.append(("x-should-retry", str(error.retry).lower()))
    if error.status == 401:
        headers.append(("WWW-Authenticate", "Bearer"))
    return headers


# ==============================================================================
# 3. SSE
# ==============================================================================
#
# Bytes in, events out; events in, bytes out. Follows "Server-sent events" of the HTML
# standard. Knows nothing of JSON, OpenAI, Dify, sockets or time.
#
#     event: message\ndata: {"answer": "Hel"}\n\n   <->   ServerSentEvent("{…")

# Dify sends whole node outputs and audio in one line: megabytes are normal.
MAX_EVENT_BYTES = 32 * 1024 * 1024


class ServerSentEvent(NamedTuple):
    """One event: its data lines joined by newlines, and its type."""

    data: str
    event: str = "message"


class SSEOverflow(ValueError):
    """An event is longer than MAX_EVENT_BYTES."""


class SSEDecoder:
    """Cuts a stream of bytes into events, however the bytes are cut.

    Lines end with LF, CR LF or CR. Bytes that are not UTF-8 become U+FFFD. An event
    without data is an event with data "" only if it has a type (a heartbeat, such as
    Dify's `event: ping`). An event whose blank line never comes is dropped, as the
    standard demands.
    """

    def __init__(self) -> None:
        self._line = bytearray()  # the beginning of a line that has no end yet
        self._data: list[str] = []
        self._event = ""
        self._size = 0
        self._after_cr = False  # an LF now belongs to a CR that ended the last read
        self._at_start = True

    def feed(self, data: bytes) -> list[ServerSentEvent]:
        """The events that these bytes complete."""
        if b"\r" in data or self._after_cr:
            data = self._ended_by_lf(data)
        if not data:
            return []
        self._size += len(data)
        if b"\n" not in data:
            self._line += data
            self._check_size()
            return []
        lines = data.split(b"\n")
        if self._line:
            lines[0] = bytes(self._line) + lines[0]
            self._line.clear()
        self._line += lines.pop()
        events: list[ServerSentEvent] = []
        for line in lines:
            if not line:
                self._dispatch(events)
            else:
                self._read_line(line)
        self._check_size()
        return events

    def _ended_by_lf(self, data: bytes) -> bytes:
        if self._after_cr and data:
            self._after_cr = False
            data = data[1:] if data.startswith(b"\n") else data
        self._after_cr = self._after_cr or data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _read_line(self, line: bytes) -> None:
        if self._at_start:
            self._at_start = False
            line = line[3:] if line.startswith(b"\xef\xbb\xbf") else line
        if line.startswith(b"data: "):  # Dify's only form, so first
            self._data.append(line[6:].decode("utf-8", "replace"))
            return
        name, _, value = line.decode("utf-8", "replace").partition(":")
        value = value[1:] if value.startswith(" ") else value
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value

    def _dispatch(self, events: list[ServerSentEvent]) -> None:
        if self._data or self._event:
            data = self._data[0] if len(self._data) == 1 else "\n".join(self._data)
            events.append(ServerSentEvent(data, self._event or "message"))
        self._data.clear()
        self._event = ""
        self._size = len(self._line)

    def _check_size(self) -> None:
        if self._size > MAX_EVENT_BYTES:
            raise SSEOverflow(f"an event of more than {MAX_EVENT_BYTES >> 20} MiB")


def encode_event(data: bytes, event: str = "") -> bytes:
    """One event of one data line; `data` must hold no line break (JSON has none)."""
    head = b"event: %b\n" % event.encode() if event else b""
    return b"%bdata: %b\n\n" % (head, data)


def encode_comment(text: str) -> bytes:
    """A comment: keeps a connection alive, and is an event to nobody."""
    return b": %b\n\n" % text.encode()


# ==============================================================================
# 4. Turn
# ==============================================================================
#
# The hub. What is asked and what is answered, in nobody's dialect: room 5 (Dify) and
# room 6 (OpenAI) meet only here, so a new app mode works on every surface at once,
# and a new surface with every app.
#
#     OpenAI request -> Ask -> Dify request        Dify events -> parts -> OpenAI chunks


@dataclass(frozen=True)
class Attachment:
    """A file that came with a message: its bytes, or the URL where they are.

    `data` and `url` exclude each other. `media_type` is "" where the client did not
    say; `name` never has a path in it.
    """

    name: str
    media_type: str = ""
    data: bytes = field(default=b"", repr=False)
    url: str = field(default="", repr=False)


@dataclass(frozen=True)
class ToolCall:
    """One call of a client's tool; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One message of the client's history.

    `role` is "system", "user", "assistant" or "tool". `name` is who speaks: the
    message's `name`, or the tool whose result it is.
    """

    role: str
    text: str
    name: str = ""
    attachments: tuple[Attachment, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Ask:
    """What a client wants of an app, whichever API it came by.

    `messages` is the whole visible history in order, the new message(s) last, without
    the system text that opens it: that is `system`. `conversation_id` is the explicit
    one, "" where the client named none.
    """

    model: str
    messages: tuple[Message, ...]
    system: str = ""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    user: str = ""
    conversation_id: str = ""


# The parts of an answer, in the order in which they come: reasoning and text mixed,
# then files, citations and usage, then exactly one Finish or Failure. They are plain
# classes with slots because thousands of Texts are made a second.


@dataclass
class Text:
    """More of the answer."""

    __slots__ = ("text",)
    text: str


@dataclass
class Reasoning:
    """More of what the model thinks before or between its text."""

    __slots__ = ("text",)
    text: str


@dataclass(frozen=True)
class Replace:
    """Forget the text so far, this is it (moderation does that)."""

    text: str


@dataclass(frozen=True)
class Recast:
    """The text so far was reasoning: its opening tag was missing."""


@dataclass(frozen=True)
class Media:
    """A file that the app made; `url` is absolute, `kind` is its type in Dify."""

    kind: str
    url: str
    name: str


@dataclass(frozen=True)
class Citations:
    """Where the answer comes from: Dify's `retriever_resources`, as they are."""

    resources: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Usage:
    """Token counts; zero where Dify does not know."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Always the sum: Dify's own total is wrong in some releases."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Finish:
    """The answer is complete: "stop", "length" or "content_filter"."""

    reason: str = "stop"


@dataclass(frozen=True)
class Failure:
    """The answer ends here, unfinished."""

    error: ProxyError


Part = Union[Text, Reasoning, Replace, Recast, Media, Citations, Usage, Finish, Failure]


# ==============================================================================
# 5. Dify
# ==============================================================================
#
# Dify's dialect, both ways: what an app is and wants, questions to request bodies for
# each app mode, events to answer parts. Holds every quirk of Dify's releases from 0.6
# to 1.17, and knows nothing of OpenAI, bytes or sockets.
#
#     {"event":"message","answer":"Hel"} …            ->  Text("Hel") …
#     {"event":"message_end","metadata":{"usage":…}}  ->  Usage(…), Finish("stop")
#
# An answer ends with message_end, error or workflow_paused; in a workflow also with
# workflow_finished. In a chatflow message_end comes before that one (1.13.1 and
# later), after it (before 1.13) or never (1.13.0), hence `AnswerReader.is_closing`.
# The end of the body ends nothing, and pings prove nothing.

BROKEN_OFF = "Dify's answer broke off before its end."
_QUERY_NAMES = ("query", "input", "prompt", "question", "text")
_OUTPUT_NAMES = ("text", "answer", "output", "result", "response")
_MODEL_NODES = ("llm", "agent", "question-classifier", "parameter-extractor")
_TEXT_TYPES = ("text-input", "paragraph")
_FILE_TYPES = ("file", "file-list")
_KIND_BY_EXTENSION = {
    extension: kind
    for kind, extensions in {
        "image": "jpg jpeg png webp gif svg",
        "video": "mp4 mov mpeg webm",
        "audio": "mp3 m4a wav amr mpga",
        "document": "txt markdown md mdx pdf html htm xlsx xls docx csv vtt properties"
        " doc eml msg ppt pptx xml epub",
    }.items()
    for extension in extensions.split()
}


# What an app is...


@dataclass(frozen=True)
class AppInput:
    """One field of an app's form; `type` in Dify's words ("text-input", "select").

    `kinds` are the kinds of files that a file field takes; empty: any.
    """

    variable: str
    type: str
    required: bool = False
    options: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class AppForm:
    """What `GET /parameters` tells: the inputs, and which files may be sent."""

    inputs: tuple[AppInput, ...] = ()
    uploads: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)


def parse_form(parameters: Mapping[str, Any]) -> AppForm:
    """`GET /parameters` to a form; anything missing or odd is left out."""
    inputs = []
    for entry in parameters.get("user_input_form") or ():
        for type_, row in entry.items() if isinstance(entry, dict) else ():
            if isinstance(row, dict) and row.get("variable"):
                inputs.append(
                    AppInput(
                        str(row["variable"]),
                        str(row.get("type") or type_),
                        bool(row.get("required")),
                        _texts(row.get("options")),
                        _texts(row.get("allowed_file_types")),
                    )
                )
    return AppForm(
        tuple(inputs),
        _object(parameters.get("file_upload")),
        _object(parameters.get("system_parameters")),
    )


def mode_from_probe(conversations: str, completion_stop: str) -> str:
    """The mode of an app older than 1.4, whose `/info` does not tell it.

    Args:
        conversations: code of the error that `GET /conversations` gave, "" if none.
        completion_stop: the same of `POST /completion-messages/{any}/stop`.
    """
    if conversations != "not_chat_app":
        return "chat"  # or an agent or a chatflow: the same endpoint serves all three
    return "workflow" if completion_stop == "app_unavailable" else "completion"


def query_variable(mode: str, form: AppForm) -> str:
    """The input that takes the user's text in a workflow or a text generator.

    Raises:
        BadRequest: the app has none; the message lists what it has.
    """
    texts = [row for row in form.inputs if row.type in _TEXT_TYPES]
    names = [row.variable for row in texts]
    required = [row.variable for row in texts if row.required]
    for name in _QUERY_NAMES:
        if name in names:
            return name
    if len(required) == 1 or names:
        return required[0] if len(required) == 1 else names[0]
    if mode == "completion":
        return "query"
    raise BadRequest(
        "This app has no text input that could take the message. "
        + describe_inputs(form)
    )


def describe_inputs(form: AppForm) -> str:
    """A sentence for error messages: each input, its type and its options."""
    if not form.inputs:
        return "The app declares no inputs."
    rows = []
    for row in form.inputs:
        need = ", required" if row.required else ""
        options = f", one of {', '.join(row.options)}" if row.options else ""
        rows.append(f"{row.variable} ({row.type}{need}{options})")
    return f"The app's inputs are: {'; '.join(rows)}. Send them as `inputs`."


# Files for the app...


def check_files(form: AppForm, files: Sequence[Attachment]) -> None:
    """Refuse files that the app would refuse, or lose, before they are uploaded.

    Raises:
        BadRequest: it names the file, and the limit.
    """
    has_fields = any(row.type in _FILE_TYPES for row in form.inputs)
    images = _object(form.uploads.get("image"))
    is_on = form.uploads.get("enabled") or images.get("enabled")
    rules = {**images, **form.uploads} if is_on else {}
    limit = _count(rules.get("number_limits"))
    for index, file in enumerate(files):
        reason = _size_problem(form, file)
        if not has_fields and not is_on:
            reason = "the app takes no files; file upload is switched on in Dify"
        elif not has_fields and limit and index >= limit:
            reason = f"the app takes {limit} files at a time"
        elif not has_fields:
            reason = reason or _kind_problem(rules, file)
        if reason:
            raise _refused_file(file, reason)


def _size_problem(form: AppForm, file: Attachment) -> str:
    kind = file_kind(file.name, file.media_type)
    name = "file" if kind in ("document", "custom") else f"{kind}_file"
    limit_mb = _count(form.limits.get(f"{name}_size_limit"))
    if not limit_mb or len(file.data) <= limit_mb << 20:
        return ""
    return f"it has {len(file.data) / (1 << 20):.1f} MB, the app takes {limit_mb} MB"


def _kind_problem(rules: Mapping[str, Any], file: Attachment) -> str:
    kind = file_kind(file.name, file.media_type)
    kinds = _texts(rules.get("allowed_file_types")) or ("image",)
    extensions = _texts(rules.get("allowed_file_extensions"))
    extension = file.name.rpartition(".")[2].lower()
    is_named = extension in [text.lower().strip(".") for text in extensions]
    if kind not in kinds and not ("custom" in kinds and is_named):
        return f"the app takes files of type {', '.join(kinds)}, not {kind}"
    methods = _texts(rules.get("allowed_file_upload_methods"))
    methods = methods or _texts(rules.get("transfer_methods"))
    if file.url and methods and "remote_url" not in methods:
        return "the app takes no URLs; send the file's data"
    if file.data and methods and "local_file" not in methods:
        return "the app takes URLs only"
    return ""


def _refused_file(file: Attachment, reason: str) -> BadRequest:
    return BadRequest(
        f"The file {file.name!r} can't be sent: {reason}.",
        param="messages",
        code="invalid_value",
    )


def file_mapping(file: Attachment, upload_id: str = "") -> dict[str, str]:
    """A file as a request names it: by its upload, else by its URL."""
    kind = file_kind(file.name, file.media_type)
    if upload_id:
        where = {"transfer_method": "local_file", "upload_file_id": upload_id}
    else:
        where = {"transfer_method": "remote_url", "url": file.url}
    return {"type": kind, **where}


def place_files(
    form: AppForm, mappings: Sequence[dict[str, str]], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Where files go in a request: the app's file inputs first, then `files`.

    Returns:
        {"inputs": {variable: mapping or list}, "files": [mapping, …]}
    """
    rest = list(mappings)
    inputs: dict[str, Any] = {}
    for row in form.inputs:
        if row.type in _FILE_TYPES and row.variable not in given:
            fit = [file for file in rest if not row.kinds or file["type"] in row.kinds]
            fit = fit[:1] if row.type == "file" else fit
            rest = [file for file in rest if file not in fit]
            if fit:
                inputs[row.variable] = fit[0] if row.type == "file" else fit
    return {"inputs": inputs, "files": rest}


def encode_upload(file: Attachment, user: str) -> tuple[str, bytes]:
    """(content type, body) of an upload: multipart/form-data (RFC 7578)."""
    boundary = hashlib.sha256(file.data).hexdigest()[:32]
    name = file.name.encode("utf-8", "replace")
    head = (
        b'--%b\r\nContent-Disposition: form-data; name="user"\r\n\r\n%b\r\n'
        b'--%b\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\n'
        b"Content-Type: %b\r\n\r\n"
    )
    mark = boundary.encode()
    media_type = (file.media_type or "application/octet-stream").encode(
        "ascii", "replace"
    )
    user_bytes = user.encode("utf-8", "replace")
    start = head % (mark, user_bytes, mark, name, media_type)
    body = start + file.data + b"\r\n--%b--\r\n" % mark
    return f"multipart/form-data; boundary={boundary}", body


def file_kind(name: str, media_type: str) -> str:
    """Dify's type of a file: by its extension, else by its media type."""
    extension = name.rpartition(".")[2].lower()
    family = media_type.partition("/")[0]
    other = family if family in ("image", "audio", "video") else "custom"
    return _KIND_BY_EXTENSION.get(extension, other)


# Questions to requests...


@dataclass(frozen=True)
class DifyRequest:
    """What is sent to Dify: the path below the base, and the JSON body."""

    path: str
    body: Mapping[str, Any]


_PATHS = {"completion": "/completion-messages", "workflow": "/workflows/run"}


def dify_request(
    mode: str,
    query: str,
    common: Mapping[str, Any],
    *,
    variable: str = "",
    conversation_id: str = "",
) -> DifyRequest:
    """The request for one turn.

    Always streaming: agents refuse the blocking mode, 1.13.0 ignores it, and gateways
    cut it. Inputs go with every turn, since releases from 1.3 want them each time.

    Args:
        mode: one of APP_MODES.
        query: the text for the app.
        common: `inputs`, `user`, and what else any mode takes (`files`, `trace_id`).
        variable: the input that takes the text, where the mode has no query.
        conversation_id: "" starts a new conversation.
    """
    body = {**common, "response_mode": "streaming"}
    if mode in _PATHS:
        body["inputs"] = {**common["inputs"], variable: query}
        if mode == "completion" and variable == "query":
            body["query"] = query  # apps of old take it here
        return DifyRequest(_PATHS[mode], body)
    body.update(query=query, auto_generate_name=False)
    if conversation_id:
        body["conversation_id"] = conversation_id
    return DifyRequest("/chat-messages", body)


def stop_path(mode: str, task_id: str) -> str:
    """Where a running turn is stopped."""
    task = urllib.parse.quote(task_id, safe="")
    if mode == "workflow":
        return f"/workflows/tasks/{task}/stop"
    return f"{_PATHS.get(mode, '/chat-messages')}/{task}/stop"


# Errors...


class ConversationGone(BadRequest):
    """Dify does not know this conversation (any more) for this app and user."""

    status, code = 404, "not_found"


class WrongMode(UpstreamRejected):
    """The app is of another mode than its request was made for."""


class MissingInput(UpstreamRejected):
    """The app wants an input that was not sent."""


_WRONG_MODE = ("not_chat_app", "app_unavailable", "not_workflow_app")
# What the texts of providers' errors tell: Dify's codes and statuses say "400" to all.
_BY_WORDING: tuple[tuple[str, type[ProxyError], str], ...] = (
    (r"conversation not exists", ConversationGone, ""),
    (r"insufficient.{0,3}quota|quota.{0,20}exceeded|credit balance", QuotaExceeded, ""),
    (r"too many requests|rate.?limit|\b429\b", RateLimited, ""),
    (r"timed? ?out|timeout", UpstreamTimeout, ""),
)


def error_from_dify(
    status: int, code: str, message: str, *, in_run: bool = False
) -> ProxyError:
    """What an error of Dify's means to the client.

    Args:
        status: of the HTTP response, or of the error event.
        code: Dify's code, "" if none came.
        message: Dify's message, "" if none came.
        in_run: it came as an event: the request was accepted, its run failed.
    """
    text = _innermost_message(message) or code or f"status {status}"
    text = text.partition(" You have requested this URI")[0]
    if status in (401, 403) and not in_run:
        return ConfigurationFault(
            f"Dify refused the app key ({status} {code}: {text}). Check the key in "
            "MODEL_CONFIG or DIFY_API_KEYS, and that API access is on for the app."
        )
    if code == "provider_quota_exceeded":
        return QuotaExceeded(text)
    if code in ("too_many_requests", "rate_limit_error") or status == 429:
        return RateLimited(text)
    for wording, error, error_code in _BY_WORDING:
        if re.search(wording, text, re.IGNORECASE) and (
            in_run or error is not UpstreamTimeout
        ):
            return error(text, code=error_code)
    if in_run:
        return UpstreamFailed(text, code=code, retry=False)
    return _refusal(status, code, text)


def error_from_body(status: int, body: bytes) -> ProxyError:
    """An HTTP error of Dify, or of what stands before it, by its body.

    A body that is no JSON comes from the web UI (the base URL lacks its /v1) or from
    a gateway (nginx, Cloudflare).
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        code, message = value.get("code"), value.get("message")
        return error_from_dify(status, str(code or ""), str(message or ""))
    if status in (413, 414, 431):
        return BodyTooLarge(f"The gateway before Dify refused the size ({status}).")
    if status == 504:
        return UpstreamTimeout("The gateway before Dify timed out (504).")
    if status == 429:
        return RateLimited("The gateway before Dify wants fewer requests (429).")
    if status >= 500:
        return UpstreamFailed(f"The gateway before Dify answered {status}.")
    return ConfigurationFault(
        f"DIFY_API_BASE does not lead to Dify's API: the answer ({status}) is no "
        "JSON. It must be like https://host/v1."
    )


def _refusal(status: int, code: str, text: str) -> ProxyError:
    """A refusal before the run, by what can be done about it."""
    if status >= 500:
        return UpstreamFailed(f"Dify failed ({status}): {text}")
    if code in _WRONG_MODE:
        return WrongMode(text, code=code)
    if code == "invalid_param" and "required in input form" in text:
        return MissingInput(text, code=code)
    if status == 413:
        return BodyTooLarge(text, code=code)
    return UpstreamRejected(text, code=code)


def _innermost_message(message: str) -> str:
    """The message inside a plugin's nested JSON, or the text as it is."""
    start = message.find("{")
    while start >= 0:
        try:
            inner, _ = json.JSONDecoder().raw_decode(message, start)
        except (ValueError, RecursionError):
            return message
        found = inner.get("message") or _object(inner.get("error")).get("message")
        if not isinstance(found, str) or not found:
            return message
        message, start = found, found.find("{")
    return message


# Reasoning inside the text...

# Dify 0.15 wraps reasoning in one fixed <details>; all later releases in <think>, whose
# DeepSeek plugin adds the marker and escapes the reasoning as HTML.
_DETAILS = (
    '<details style="color:gray;background-color: #f8f8f8;padding: 8px;'
    'border-radius: 4px;" open> <summary> Thinking... </summary>'
)
_MARKER = "<!--dify-deepseek-reasoning-->"


def _beginnings(tag: str, last: str = "") -> str:
    """A pattern that matches every beginning of `tag`, and then `last`."""
    pattern = last
    for character in reversed(tag[1:]):
        pattern = f"(?:{re.escape(character)}{pattern})?"
    return re.escape(tag[0]) + pattern


# For each state the tags that end it, and what may become one when more text comes:
# only that is held back, so never more than the longest tag (or entity).
_ATTRIBUTES = r"(?:\s[^<>]{0,64})?"
_OUTSIDE = re.compile(rf"<think{_ATTRIBUTES}>|</think>|{re.escape(_DETAILS)}", re.I)
_OUTSIDE_BEGUN = re.compile(
    rf"(?:{_beginnings('<think', _ATTRIBUTES)}|{_beginnings('</think')}"
    rf"|{_beginnings(_DETAILS)})\Z",
    re.I,
)
_INSIDE = {
    tag: re.compile(rf"\n{{0,4}}{tag}\s{{0,4}}>", re.I)
    for tag in ("</think", "</details")
}
_SPACES = r"\s{0,4}"
_INSIDE_BEGUN = {
    tag: re.compile(
        rf"(?:\n{{0,4}}(?:{_beginnings(tag, _SPACES)})?|&[a-z]{{0,3}})\Z", re.I
    )
    for tag in _INSIDE
}


class ReasoningSplitter:
    """Tells reasoning from answer in text with tags, however the text is cut.

    Newlines beside the tags belong to the tags. A closing tag alone means that all
    the text before it was reasoning. A block never closed is reasoning to the end.
    """

    def __init__(self) -> None:
        self.blocks = 0
        self._held = ""
        self._closing = ""  # the tag that ends the block we are in; "" outside
        self._is_fresh = False  # only newlines and the marker since the opening tag
        self._is_escaped = False
        self._newlines = 0  # that may still be dropped after a closing tag

    def feed(self, text: str) -> list[Part]:
        """The parts that are certain now."""
        if "<" in text or self._held or self._closing or self._newlines:
            return self._split(self._held + text, is_last=False)
        return [Text(text)]

    def close(self) -> list[Part]:
        """What is still held back; no more text will come."""
        return self._split(self._held, is_last=True)

    def _split(self, text: str, *, is_last: bool) -> list[Part]:
        parts: list[Part] = []
        self._held = ""
        while text:
            step = self._split_inside if self._closing else self._split_outside
            text = step(parts, text, is_last)
        return parts

    def _split_outside(self, parts: list[Part], text: str, is_last: bool) -> str:
        """Take the text up to the next tag, and the tag; returns the rest."""
        while self._newlines and text.startswith("\n"):
            text, self._newlines = text[1:], self._newlines - 1
        if text:
            self._newlines = 0
        tag = _OUTSIDE.search(text)
        if not tag:
            return self._take(parts, text, None if is_last else _OUTSIDE_BEGUN)
        self._take(parts, text[: tag.start()], None)
        if tag[0].startswith("</"):
            self._newlines = 2
            if not self.blocks:
                parts.append(Recast())
        else:
            self._closing = "</details" if tag[0][1] in "dD" else "</think"
            self._is_fresh, self._is_escaped = True, False
            self.blocks += 1
        return text[tag.end() :]

    def _split_inside(self, parts: list[Part], text: str, is_last: bool) -> str:
        if self._is_fresh:
            text = text.lstrip("\n")
            if text.startswith(_MARKER):
                self._is_escaped = True
                return text[len(_MARKER) :]
            if _MARKER.startswith(text) and not is_last:
                self._held = text
                return ""
            self._is_fresh = False
        tag = _INSIDE[self._closing].search(text)
        if not tag:
            begun = None if is_last else _INSIDE_BEGUN[self._closing]
            return self._take(parts, text, begun)
        self._take(parts, text[: tag.start()], None)
        self._closing, self._newlines = "", 2
        return text[tag.end() :]

    def _take(self, parts: list[Part], text: str, begun: re.Pattern[str] | None) -> str:
        """Add the text as a part, but hold back what may be the beginning of a tag."""
        held = begun.search(text) if begun else None
        certain = text[: held.start()] if held else text
        self._held = text[len(certain) :]
        if certain and self._closing:
            certain = html.unescape(certain) if self._is_escaped else certain
            parts.append(Reasoning(certain))
        elif certain:
            parts.append(Text(certain))
        return ""


# Events to parts...


class AnswerReader:
    """Turns the events of one turn into answer parts.

    `read` each event, in order, until `is_finished`; `end` when the body ends first,
    or when `is_closing` and nothing came for GRACE_S. The ids are "" until known.
    """

    def __init__(
        self,
        mode: str,
        base: str,
        *,
        output_variable: str = "",
        show_process: bool = False,
    ) -> None:
        self.conversation_id = self.message_id = self.task_id = ""
        self.is_finished = False
        self.is_closing = False
        self._mode = mode
        self._base = base
        self._output_variable = output_variable
        self._show_process = show_process
        self._splitter = ReasoningSplitter()
        self._half = ""  # the first half of a surrogate pair
        self._answer: list[str] = []  # the text as Dify sent it
        self._reasoned_in: object = None  # the block that reasoning was last added to
        self._thoughts: dict[str, str] = {}  # snapshots by id
        self._files: dict[str, Media] = {}
        self._resources: list[Mapping[str, Any]] = []
        self._usage: Usage | None = None  # as message_end tells it
        self._node_usage = Usage()
        self._total_tokens = 0
        self._reason = "stop"
        self._is_stored = False

    def read(self, event: ServerSentEvent) -> list[Part]:
        """The parts that this event adds; [] for one that adds none."""
        data = event.data
        if self.is_finished or not data or data == "ping":
            return []
        if len(data) > _LONG_EVENT:
            name = _EVENT_NAME.match(data)
            if name and name[1] not in _TRANSLATORS:
                return []  # spares parsing megabytes that nobody reads
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return self.fail(UpstreamFailed("Dify sent an event that is not JSON."))
        if not isinstance(value, dict):
            return []
        if not self.task_id or not self.conversation_id:
            self._learn_ids(value)
        translate = _TRANSLATORS.get(value.get("event"))
        return translate(self, value) if translate else []

    def end(self) -> list[Part]:
        """The parts that are left when no more events come."""
        if self.is_finished:
            return []
        if self.is_closing:
            return self._finish()
        return self.fail(UpstreamFailed(BROKEN_OFF, retry=False))

    @property
    def can_recover(self) -> bool:
        """Whether something came, of an answer that Dify stores."""
        return bool(self._answer and self.conversation_id and self.message_id)

    def recover(self, answer: str) -> list[Part]:
        """The rest of a broken answer, as Dify stored it.

        Returns:
            [] if the stored answer does not extend what was streamed.
        """
        streamed = "".join(self._answer)
        if not answer.startswith(streamed):
            return []
        return self._add_text(answer[len(streamed) :]) + self._finish()

    @property
    def is_as_sent(self) -> bool:
        """Whether Dify has stored exactly the text that it sent."""
        return self._is_stored and self._reason != "content_filter"

    # Text and reasoning...

    def _message(self, value: dict[str, Any]) -> list[Part]:
        answer = value.get("answer")
        if not isinstance(answer, str):
            return []
        if self._mode == "agent" and value["event"] == "message" and self._answer:
            # The New Agent closes with the whole of its last round.
            if not answer or "".join(self._answer).rstrip().endswith(answer.strip()):
                return []
            answer = "\n\n" + answer
        return self._add_text(answer)

    def _text_chunk(self, value: dict[str, Any]) -> list[Part]:
        text = _object(value.get("data")).get("text")
        return self._add_text(text) if isinstance(text, str) else []

    def _replace(self, value: dict[str, Any]) -> list[Part]:
        answer = value.get("answer", _object(value.get("data")).get("text"))
        if not isinstance(answer, str):
            return []
        if not answer.startswith("".join(self._answer)):
            self._reason = "content_filter"
        self._answer, self._half = [], ""
        self._splitter = ReasoningSplitter()
        text = "".join(
            part.text
            for part in self._add_text(answer) + self._splitter.close()
            if isinstance(part, Text)
        )
        return [Replace(text)]

    def _add_text(self, text: str) -> list[Part]:
        if self._half or not text.isascii():
            text = self._whole_characters(text)
        if not text:
            return []
        self._answer.append(text)
        parts = self._splitter.feed(text)
        if self._splitter.blocks:
            return self._mark_blocks(parts)
        return parts

    def _whole_characters(self, text: str) -> str:
        """Join surrogate halves that came apart; one that stays alone is U+FFFD."""
        text, self._half = self._half + text, ""
        if "\ud800" <= text[-1:] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def _mark_blocks(self, parts: list[Part]) -> list[Part]:
        marked: list[Part] = []
        for part in parts:
            if isinstance(part, Reasoning):
                marked += self._reason_in(("tag", self._splitter.blocks), part.text)
            else:
                marked.append(part)
        return marked

    def _reason_in(self, block: object, text: str) -> list[Part]:
        """Reasoning of one block (a tag, a node, a thought): blocks stand apart."""
        if not text:
            return []
        if self._reasoned_in not in (None, block):
            text = "\n\n" + text
        self._reasoned_in = block
        return [Reasoning(text)]

    def _reasoning_chunk(self, value: dict[str, Any]) -> list[Part]:
        data = _object(value.get("data"))
        text = data.get("reasoning")
        block = ("node", data.get("node_id"))
        return self._reason_in(block, text) if isinstance(text, str) else []

    def _thought(self, value: dict[str, Any]) -> list[Part]:
        """A snapshot of an agent's round; in `agent`, without a tool, it is reasoning."""
        id_, tool, thought = (
            str(value.get(key) or "") for key in ("id", "tool", "thought")
        )
        if tool:
            line = f"{tool} {value.get('tool_input') or ''}".strip()
            return self._process(
                ("tool", id_), f"Tool: {line}", value.get("observation")
            )
        if self._mode != "agent" or not thought:
            return []
        last = self._thoughts.get(id_, "")
        self._thoughts[id_] = thought
        new = thought[len(last) :] if thought.startswith(last) else thought
        return self._reason_in(("thought", id_), new)

    # What happens beside the text...

    def _process(self, block: object, line: str, is_certain: object) -> list[Part]:
        """A line about the run, once, if the operator wants such lines."""
        key = repr(block)
        if not self._show_process or not is_certain or key in self._thoughts:
            return []
        self._thoughts[key] = line
        return self._reason_in(block, line)

    def _node_started(self, value: dict[str, Any]) -> list[Part]:
        data = _object(value.get("data"))
        title = data.get("title") or data.get("node_type")
        return self._process(("step", data.get("id")), f"Step: {title}", title)

    def _agent_log(self, value: dict[str, Any]) -> list[Part]:
        data = _object(value.get("data"))
        return self._process(
            ("log", data.get("id")), f"{data.get('label')}", data.get("label")
        )

    def _node_finished(self, value: dict[str, Any]) -> list[Part]:
        data = _object(value.get("data"))
        outputs = _object(data.get("outputs"))
        if data.get("node_type") in _MODEL_NODES:
            usage = outputs.get("usage") or _object(data.get("process_data")).get(
                "usage"
            )
            more = _usage(_object(usage))
            self._node_usage = Usage(
                self._node_usage.prompt_tokens + more.prompt_tokens,
                self._node_usage.completion_tokens + more.completion_tokens,
            )
        elif (
            data.get("node_type") == "knowledge-retrieval" and self._mode == "workflow"
        ):
            for row in _objects(outputs.get("result")):
                source = {**_object(row.get("metadata"))}
                source["content"] = row.get("content")
                self._resources.append(source)
        return []

    def _message_file(self, value: dict[str, Any]) -> list[Part]:
        if isinstance(value.get("answer"), str):  # text, by a bug of 1.11.2 and later
            return self._message(value)
        if value.get("belongs_to") != "user":
            self._add_file(value)
        return []

    def _add_file(self, value: Mapping[str, Any]) -> None:
        url = value.get("url") or value.get("remote_url")
        if isinstance(url, str) and url:
            url = urllib.parse.urljoin(self._base, url)
            key = _SIGNATURE.sub("", url)
            name = value.get("filename") or urllib.parse.unquote(
                urllib.parse.urlsplit(url).path.rpartition("/")[2]
            )
            media = Media(str(value.get("type") or "custom"), url, str(name))
            self._files.setdefault(key, media)

    def _human_input(self, value: dict[str, Any]) -> list[Part]:
        data = _object(value.get("data"))
        actions = [
            str(row.get("title") or row.get("id"))
            for row in _objects(data.get("actions"))
        ]
        lines = [
            str(
                data.get("form_content") or data.get("node_title") or "Input is needed."
            )
        ]
        if actions:
            lines.append("Actions: " + ", ".join(actions))
        if data.get("form_token"):
            lines.append(f"Form: {data['form_token']}")
        text = "\n\n".join(lines)
        return self._add_text("\n\n" + text if self._answer else text)

    # The end...

    def _message_end(self, value: dict[str, Any]) -> list[Part]:
        metadata = _object(value.get("metadata"))
        self._usage = _usage(_object(metadata.get("usage")))
        self._resources += _objects(metadata.get("retriever_resources"))
        for file in _objects(value.get("files")):
            self._add_file(file)
        parts: list[Part] = []
        if self._reasoned_in is None:
            for node, text in _object(metadata.get("reasoning")).items():
                parts += self._reason_in(("node", node), str(text or ""))
        return parts + self._finish()

    def _workflow_finished(self, value: dict[str, Any]) -> list[Part]:
        data = _object(value.get("data"))
        outputs = _object(data.get("outputs"))
        self._total_tokens = _count(data.get("total_tokens"))
        if data.get("status") == "failed":
            text = str(data.get("error") or "the workflow failed")
            return self.fail(error_from_dify(200, "", text, in_run=True))
        if data.get("status") == "stopped":
            self._reason = "length"
        for file in [*_objects(data.get("files")), *_files_in(outputs)]:
            self._add_file(file)
        parts: list[Part] = []
        if not self._answer:
            text = answer_from_outputs(outputs, self._output_variable, self._mode)
            parts = self._add_text(text)
        if self._mode == "workflow":
            return parts + self._finish()
        self.is_closing = True
        return parts

    def _error(self, value: dict[str, Any]) -> list[Part]:
        code, message = value.get("code"), value.get("message")
        status = _count(value.get("status")) or 500
        error = error_from_dify(
            status, str(code or ""), str(message or ""), in_run=True
        )
        return self.fail(error)

    def _paused(self, value: dict[str, Any]) -> list[Part]:
        return self._finish()

    def _close_text(self) -> list[Part]:
        parts = self._mark_blocks(self._splitter.close())
        if self._half:
            self._half = ""
            parts.append(Text("\ufffd"))
        return parts

    def _finish(self) -> list[Part]:
        self.is_finished = self._is_stored = True
        parts = self._close_text()
        answer = "".join(self._answer)
        for key, media in self._files.items():
            if urllib.parse.urlsplit(key).path not in answer:
                parts.append(media)
        if self._resources:
            parts.append(Citations(tuple(self._resources)))
        return [*parts, self._final_usage(), Finish(self._reason)]

    def _final_usage(self) -> Usage:
        """As message_end tells it, else the sum of the nodes if it adds up."""
        if self._usage and self._usage.total_tokens:
            return self._usage
        nodes, total = self._node_usage, self._total_tokens
        if total and nodes.total_tokens != total:
            completion = min(nodes.completion_tokens, total)
            return Usage(total - completion, completion)
        return nodes

    def fail(self, error: ProxyError) -> list[Part]:
        """End the answer with an error."""
        self.is_finished = True
        return [*self._close_text(), Failure(error)]

    def _learn_ids(self, value: dict[str, Any]) -> None:
        self.task_id = self.task_id or str(value.get("task_id") or "")
        self.message_id = self.message_id or str(value.get("message_id") or "")
        self.conversation_id = self.conversation_id or str(
            value.get("conversation_id") or ""
        )


_TRANSLATORS: Mapping[Any, Callable[[AnswerReader, dict[str, Any]], list[Part]]] = {
    "message": AnswerReader._message,
    "agent_message": AnswerReader._message,
    "message_file": AnswerReader._message_file,
    "text_chunk": AnswerReader._text_chunk,
    "message_replace": AnswerReader._replace,
    "text_replace": AnswerReader._replace,
    "agent_thought": AnswerReader._thought,
    "reasoning_chunk": AnswerReader._reasoning_chunk,
    "node_started": AnswerReader._node_started,
    "node_finished": AnswerReader._node_finished,
    "agent_log": AnswerReader._agent_log,
    "human_input_required": AnswerReader._human_input,
    "message_end": AnswerReader._message_end,
    "workflow_finished": AnswerReader._workflow_finished,
    "workflow_paused": AnswerReader._paused,
    "error": AnswerReader._error,
}
_LONG_EVENT = 4096  # characters; a text delta is shorter
_EVENT_NAME = re.compile(r'\{"event": ?"(\w+)"')
_SIGNATURE = re.compile(r"[?&](?:timestamp|nonce|sign|as_attachment)=[^&]*")


def answer_from_outputs(
    outputs: Mapping[str, Any], variable: str, mode: str = ""
) -> str:
    """The output of a run that is its answer, when none was streamed.

    The one the operator named; else by a usual name; else the only one; else all, as
    JSON. Files are left out: they follow as links.
    """
    if mode != "workflow":
        return str(outputs.get("answer") or "")
    texts = {key: value for key, value in outputs.items() if not _files_in(value)}
    if variable:
        texts = {variable: texts[variable]} if variable in texts else {}
    for name in _OUTPUT_NAMES:
        if isinstance(texts.get(name), str):
            return str(texts[name])
    if not texts:
        return ""
    value = next(iter(texts.values())) if len(texts) == 1 else texts
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _files_in(value: Any) -> list[Mapping[str, Any]]:
    """The file objects in an output, however deep in lists and objects."""
    if isinstance(value, dict):
        if value.get("dify_model_identity") == "__dify__file__":
            return [value]
        value = list(value.values())
    if isinstance(value, list):
        return [file for item in value for file in _files_in(item)]
    return []


def _usage(usage: Mapping[str, Any]) -> Usage:
    return Usage(
        _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    )


def _count(value: Any) -> int:
    """A number of Dify's, which may be text, null or absent."""
    try:
        return max(0, int(value))
    except (TypeError, ValueError, OverflowError):
        return 0


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _objects(value: Any) -> list[dict[str, Any]]:
    return (
        [item for item in value if isinstance(item, dict)]
        if isinstance(value, list)
        else []
    )


# ==============================================================================
# 6. OpenAI
# ==============================================================================
#
# OpenAI's dialect, both ways: requests to an Ask, answer parts to chunks and whole
# objects. Reads liberally (clients send nulls, strings for objects, fields that no app
# can honour) and writes strictly (inside OpenAI's own schemas). Ids and times are
# arguments. Knows nothing of Dify, sockets or keys.

MAX_USER_CHARS = 200  # Dify keeps the end user's name in a column of 255
_FINGERPRINT = "fp_opendify"
_CREATIVE_ROLES = {"developer": "system", "function": "tool"}
_ROLES = ("system", "user", "assistant", "tool")
_EXTENSION_BY_MEDIA_TYPE = {
    "image/jpeg": "jpg",
    "image/svg+xml": "svg",
    "audio/mpeg": "mp3",
    "audio/x-wav": "wav",
    "audio/mp4": "m4a",
    "text/plain": "txt",
    "text/markdown": "md",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": "docx",
    "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet": "xlsx",
    "application/vnd.openxmlformats-officedocument.presentationml.presentation": "pptx",
    "application/msword": "doc",
    "application/vnd.ms-excel": "xls",
    "application/octet-stream": "bin",
}
_MEDIA_TYPE_BY_EXTENSION = {
    extension: media_type for media_type, extension in _EXTENSION_BY_MEDIA_TYPE.items()
}


# Requests...


@dataclass(frozen=True)
class ChatRequest:
    """A chat request: what is asked, and how the answer is to be written."""

    ask: Ask
    stream: bool = False
    include_usage: bool = False


def parse_json_object(body: bytes) -> dict[str, Any]:
    """A request's body.

    Raises:
        BadRequest: it is not a JSON object.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise BadRequest("The body of the request is not valid JSON.") from None
    if not isinstance(value, dict):
        raise BadRequest("The body of the request must be a JSON object.")
    return value


def parse_chat_request(body: Mapping[str, Any]) -> ChatRequest:
    """The body of `POST /chat/completions`; unknown fields and nulls are normal.

    Raises:
        BadRequest: a required field is missing, or one has the wrong type.
    """
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise _missing("model")
    rows = body.get("messages")
    if rows is None or rows == []:
        raise _missing("messages")
    if not isinstance(rows, list):
        raise _bad_type("messages", "an array")
    stream = body.get("stream")
    if stream not in (None, True, False):
        raise _bad_type("stream", "true or false")
    messages = [_parse_message(row, f"messages[{i}]") for i, row in enumerate(rows)]
    opening = 0
    while opening < len(messages) and messages[opening].role == "system":
        opening += 1
    metadata = body.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    conversation_id = body.get("conversation_id") or metadata.get("conversation_id")
    options = body.get("stream_options")
    ask = Ask(
        model=model,
        messages=tuple(messages[opening:]),
        system="\n\n".join(row.text for row in messages[:opening] if row.text.strip()),
        inputs=_parse_inputs(body.get("inputs"), metadata.get("inputs")),
        user=_parse_user(body),
        conversation_id=conversation_id if isinstance(conversation_id, str) else "",
    )
    include_usage = isinstance(options, dict) and bool(options.get("include_usage"))
    return ChatRequest(ask, bool(stream), include_usage)


def end_user(asked: str, forwarded: str, key: str) -> str:
    """The name by which Dify knows the end user; never empty, never too long.

    Args:
        asked: what the request's body says, "" if nothing.
        forwarded: what a front end says in a header (`X-OpenWebUI-User-Id`).
        key: the client's key; users of one key are one user when nobody says more.
    """
    name = asked or forwarded
    if not name:
        name = "opendify-" + hashlib.sha256(key.encode()).hexdigest()[:16]
    if len(name) > MAX_USER_CHARS:
        name = "user-" + hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()
    return name


def _missing(field_name: str) -> BadRequest:
    return BadRequest(
        f"Missing required parameter: '{field_name}'.",
        param=field_name,
        code="missing_required_parameter",
    )


def _bad_type(field_name: str, wanted: str) -> BadRequest:
    return BadRequest(
        f"Invalid type for '{field_name}': it must be {wanted}.",
        param=field_name,
        code="invalid_type",
    )


def _bad_value(field_name: str, problem: str) -> BadRequest:
    return BadRequest(
        f"Invalid value for '{field_name}': {problem}",
        param=field_name,
        code="invalid_value",
    )


def _parse_inputs(direct: Any, in_metadata: Any) -> dict[str, Any]:
    """The app's inputs: `inputs` as an object, over `metadata.inputs` as JSON text."""
    inputs: dict[str, Any] = {}
    if isinstance(in_metadata, str) and in_metadata:
        try:
            in_metadata = json.loads(in_metadata)
        except (ValueError, RecursionError):
            raise _bad_value("metadata.inputs", "it is not JSON text.") from None
    for name, value in (("metadata.inputs", in_metadata), ("inputs", direct)):
        if isinstance(value, dict):
            inputs.update(value)
        elif value not in (None, ""):
            raise _bad_type(name, "an object")
    return inputs


def _parse_user(body: Mapping[str, Any]) -> str:
    for name in ("safety_identifier", "user"):
        user = body.get(name)
        if isinstance(user, dict):  # Open WebUI's pipelines send an object
            user = user.get("id") or user.get("email") or user.get("name")
        if user not in (None, "") and isinstance(user, (str, int)):
            return str(user)
    return ""


def _parse_message(row: Any, where: str) -> Message:
    if not isinstance(row, dict):
        raise _bad_type(where, "an object")
    role = str(row.get("role") or "user")
    role = _CREATIVE_ROLES.get(role, role)
    role = role if role in _ROLES else "user"
    text, attachments = _parse_content(row.get("content"), f"{where}.content")
    name = row.get("name") or (row.get("tool_call_id") if role == "tool" else "")
    return Message(role, text, str(name or ""), attachments, _parse_calls(row))


def _parse_calls(row: Mapping[str, Any]) -> tuple[ToolCall, ...]:
    """Earlier calls of an assistant's message, of both generations."""
    calls = row.get("tool_calls")
    calls = list(calls) if isinstance(calls, list) else []
    if row.get("function_call"):
        calls.append({"function": row["function_call"]})
    parsed = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            arguments = function.get("arguments")
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments or {}, ensure_ascii=False)
            name, id_ = str(function.get("name") or ""), str(call.get("id") or "")
            parsed.append(ToolCall(id_, name, arguments))
    return tuple(parsed)


def _parse_content(content: Any, where: str) -> tuple[str, tuple[Attachment, ...]]:
    """A message's text, its parts joined by newlines, and its files."""
    if content is None or isinstance(content, str):
        return content or "", ()
    if not isinstance(content, list):
        raise _bad_type(where, "a string or an array of parts")
    texts, files = [], []
    for index, part in enumerate(content):
        place = f"{where}[{index}]"
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise _bad_type(place, "an object")
        parse = _FILE_PARTS.get(str(part.get("type")))
        if parse:
            files.append(parse(part, place))
        elif isinstance(text := part.get("text", part.get("refusal")), str):
            texts.append(text)
        else:
            raise _bad_value(
                place, f"content of type {part.get('type')!r} can't be sent to an app."
            )
    return "\n".join(texts), tuple(files)


# Files in requests...


def _parse_image(part: Mapping[str, Any], where: str) -> Attachment:
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, dict) else image
    if not isinstance(url, str) or not url:
        raise _bad_value(
            where, "an image needs `image_url.url`: an http(s) or data URL."
        )
    return _attachment(url, "", "image", where)


def _parse_audio(part: Mapping[str, Any], where: str) -> Attachment:
    audio = part.get("input_audio")
    data = audio.get("data") if isinstance(audio, dict) else None
    if not isinstance(audio, dict) or not isinstance(data, str) or not data:
        raise _bad_value(
            where, "audio needs `input_audio.data` in base64, and `format`."
        )
    if data.startswith("data:"):
        return _attachment(data, "", "audio", where)
    extension = re.sub(r"\W", "", str(audio.get("format") or "wav")).lower()
    media_type = _MEDIA_TYPE_BY_EXTENSION.get(extension, f"audio/{extension}")
    return Attachment(f"audio.{extension}", media_type, _decode_base64(data, where))


def _parse_file(part: Mapping[str, Any], where: str) -> Attachment:
    file = part.get("file", part)
    file = file if isinstance(file, dict) else {}
    name = str(file.get("filename") or "")
    data = file.get("file_data") or file.get("file_url")
    if not isinstance(data, str) or not data:
        raise _bad_value(where, "a file needs `file.file_data` (base64 or a data URL).")
    return _attachment(data, name, "file", where)


_FILE_PARTS: Mapping[str, Callable[[Mapping[str, Any], str], Attachment]] = {
    "image_url": _parse_image,
    "input_image": _parse_image,
    "input_audio": _parse_audio,
    "file": _parse_file,
    "input_file": _parse_file,
}


def _attachment(source: str, name: str, stem: str, where: str) -> Attachment:
    """A file from an http(s) URL, a data URL or bare base64."""
    if re.match(r"https?://", source, re.IGNORECASE):
        path = urllib.parse.urlsplit(source).path
        name = name or urllib.parse.unquote(path.rpartition("/")[2])
        family = f"{stem}/*" if stem in ("image", "audio") else ""
        return Attachment(_plain_name(name or stem, ""), family, url=source)
    if source[:5].lower() == "data:":
        media_type, data = _parse_data_url(source, where)
    else:
        media_type, data = "", _decode_base64(source, where)
    extension = name.rpartition(".")[2].lower() if "." in name else ""
    media_type = media_type or _guess_media_type(extension, data)
    return Attachment(_plain_name(name or stem, media_type), media_type, data)


def _parse_data_url(url: str, where: str) -> tuple[str, bytes]:
    """(media type, bytes) of a data URL (RFC 2397), in every form that clients send."""
    head, comma, payload = url[5:].partition(",")
    if not comma:
        raise _bad_value(where, "the data URL has no comma.")
    fields = [row.strip() for row in head.split(";")]
    if fields[-1].lower() == "base64":
        return fields[0].lower(), _decode_base64(urllib.parse.unquote(payload), where)
    return fields[0].lower() or "text/plain", urllib.parse.unquote_to_bytes(payload)


def _decode_base64(text: str, where: str) -> bytes:
    """Base64 with or without padding, white space, or the URL-safe alphabet."""
    plain = re.sub(r"\s+", "", text).translate({45: 43, 95: 47}).rstrip("=")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise _bad_value(where, "the file's data is not base64.") from None


def _guess_media_type(extension: str, data: bytes) -> str:
    """For data whose type nobody told: by the extension, else by the first bytes."""
    if extension in _MEDIA_TYPE_BY_EXTENSION:
        return _MEDIA_TYPE_BY_EXTENSION[extension]
    if extension in ("png", "gif", "webp", "bmp"):
        return f"image/{extension}"
    for magic, media_type in _MAGIC:
        if data.startswith(magic):
            return media_type
    return (
        f"application/{extension}"
        if extension.isalnum()
        else "application/octet-stream"
    )


_MAGIC = (
    (b"%PDF", "application/pdf"),
    (b"\x89PNG", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"RIFF", "image/webp"),
)


def _plain_name(name: str, media_type: str) -> str:
    """A file name that every Dify takes: no path, no reserved sign, an extension."""
    name = re.sub(r'[\\/:*?"<>|\x00-\x1f\ud800-\udfff]', "_", name)[-150:].strip(". ")
    if "." not in name and media_type:
        subtype = re.sub(r"\W.*", "", media_type.partition("/")[2])
        name += "." + _EXTENSION_BY_MEDIA_TYPE.get(media_type, subtype or "bin")
    return name or "file"


# Answers...


@dataclass(frozen=True)
class Envelope:
    """What all chunks of an answer, or the whole one, say of themselves.

    `extra` are further keys of the answer's first object (Dify's ids).
    """

    id: str
    created: int
    model: str


class Answer:
    """A whole answer, collected part by part."""

    def __init__(self) -> None:
        self._ends: dict[type, Any] = {}  # the parts that come once, at the end
        self._texts: list[str] = []
        self._reasonings: list[str] = []

    @property
    def text(self) -> str:
        """The answer without its reasoning, with links to its files."""
        return "".join(self._texts)

    @property
    def reasoning(self) -> str:
        """What the model thought, "" if nothing."""
        return "".join(self._reasonings)

    @property
    def citations(self) -> tuple[Mapping[str, Any], ...]:
        """Where the answer comes from."""
        return cast("Citations", self._ends.get(Citations, Citations(()))).resources

    @property
    def usage(self) -> Usage:
        """Token counts."""
        return cast("Usage", self._ends.get(Usage, Usage()))

    @property
    def finish_reason(self) -> str:
        """How it ended, "" if it did not yet."""
        return self._ends[Finish].reason if Finish in self._ends else ""

    def add(self, part: Part) -> None:
        """Take the next part in; raises the error of a Failure."""
        if isinstance(part, Failure):
            raise part.error
        if isinstance(part, Text):
            self._texts.append(part.text)
        elif isinstance(part, Reasoning):
            self._reasonings.append(part.text)
        elif isinstance(part, Replace):
            self._texts = [part.text]
        elif isinstance(part, Recast):
            self._texts, self._reasonings = [], self._reasonings + self._texts
        else:
            self._ends[type(part)] = part


def media_text(media: Media, *, is_first: bool) -> str:
    """A file of the app's, as Markdown that follows the text."""
    name = re.sub(r"([\[\]\\])", r"\\\1", media.name) or media.kind
    url = media.url.replace(" ", "%20").replace("(", "%28").replace(")", "%29")
    sign = "!" if media.kind == "image" else ""
    return f"{'' if is_first else chr(10) * 2}{sign}[{name}]({url})"


def chat_completion(
    envelope: Envelope, answer: Answer, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """The whole object of a chat completion; `extra` are further keys of it."""
    message: dict[str, Any] = {
        "role": "assistant",
        "content": answer.text,
        "refusal": None,
    }
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    message.update(_cited(answer.citations, len(answer.text)))
    choice = {
        "index": 0,
        "message": message,
        "logprobs": None,
        "finish_reason": answer.finish_reason,
    }
    return {
        "id": envelope.id,
        "object": "chat.completion",
        "created": envelope.created,
        "model": envelope.model,
        "system_fingerprint": _FINGERPRINT,
        "choices": [choice],
        "usage": _usage_object(answer.usage),
        **extra,
    }


class ChatStream:
    """Writes the chunks of one streamed chat completion as SSE.

    Call `begin`, then `encode` for each part, in order; Finish, or `fail`, ends the
    stream with [DONE]. Text and Reasoning are written from a template: `dumps` of a
    whole chunk costs twenty times as much.
    """

    def __init__(self, envelope: Envelope, *, include_usage: bool) -> None:
        self._envelope = envelope
        self._usage_key = {"usage": None} if include_usage else {}
        head, _, tail = self._chunk({"@": 0}, None).partition(b'{"@":0}')
        self._text = (head + b'{"content":', b"}" + tail)
        self._reasoning = (head + b'{"reasoning_content":', b"}" + tail)
        self._chars = 0
        self._citations: tuple[Mapping[str, Any], ...] = ()
        self._usage = Usage()

    def begin(self, extra: Mapping[str, Any]) -> bytes:
        """The first chunk: the role, and `extra` keys beside the standard ones."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self._chunk(delta, None, extra)

    def encode(self, part: Part) -> bytes:
        """The chunks that a part becomes; b"" for one that is kept for the end."""
        if isinstance(part, Text):
            self._chars += len(part.text)
            head, tail = self._text
            return head + json_string(part.text) + tail
        if isinstance(part, Reasoning):
            head, tail = self._reasoning
            return head + json_string(part.text) + tail
        if isinstance(part, Citations):
            self._citations = part.resources
        elif isinstance(part, Usage):
            self._usage = part
        elif isinstance(part, Finish):
            return self._end(part.reason)
        return b""

    def fail(self, error: ProxyError) -> bytes:
        """The end of a stream that can't be finished: no finish_reason, ever."""
        return encode_event(json_bytes(error_body(error))) + _DONE

    def _end(self, reason: str) -> bytes:
        end = self._chunk(_cited(self._citations, self._chars), reason)
        if self._usage_key:
            usage = {"usage": _usage_object(self._usage)}
            end += self._chunk(None, None, usage)
        return end + _DONE

    def _chunk(
        self,
        delta: Mapping[str, Any] | None,
        finish_reason: str | None,
        extra: Mapping[str, Any] | None = None,
    ) -> bytes:
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        chunk = {
            "id": self._envelope.id,
            "object": "chat.completion.chunk",
            "created": self._envelope.created,
            "model": self._envelope.model,
            "system_fingerprint": _FINGERPRINT,
            "choices": [] if delta is None else [choice],
            **self._usage_key,
            **(extra or {}),
        }
        return encode_event(json_bytes(chunk))


def models_list(models: Iterable[tuple[str, str]], created: int) -> dict[str, Any]:
    """`GET /models`: from (model, name of its app or "")."""
    data = [model_object(model, name, created) for model, name in models]
    return {"object": "list", "data": data}


def model_object(model: str, name: str, created: int) -> dict[str, Any]:
    """One model; the app's name goes along where it is known and another."""
    named = {"name": name} if name and name != model else {}
    return {
        "id": model,
        "object": "model",
        "created": created,
        "owned_by": "dify",
        **named,
    }


def json_bytes(value: Any) -> bytes:
    """Compact JSON on one line that no client's reader can break.

    U+2028, U+2029 and U+0085 are escaped, since readers built on `str.splitlines` cut
    lines there; a lone surrogate becomes U+FFFD, since UTF-8 has none.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return _one_line(text)


def json_string(text: str) -> bytes:
    """The same for one string, ten times faster."""
    return _one_line(json.encoder.encode_basestring(text))


def _one_line(text: str) -> bytes:
    if not text.isascii():
        text = _LINE_BREAKERS.sub(_escape, text)
    return text.encode()


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return "\ufffd" if 0xD800 <= code <= 0xDFFF else f"\\u{code:04x}"


_LINE_BREAKERS = re.compile("[\x85\u2028\u2029\ud800-\udfff]")
_DONE = b"data: [DONE]\n\n"


def _usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }


def _cited(resources: Sequence[Mapping[str, Any]], at: int) -> dict[str, Any]:
    """Citations as OpenAI's annotations, where they have a URL, and complete."""
    annotations = []
    for row in resources:
        url = _url_of(row)
        if url:
            title = str(row.get("title") or row.get("document_name") or url)
            citation = {"start_index": 0, "end_index": at, "url": url, "title": title}
            annotations.append({"type": "url_citation", "url_citation": citation})
    cited: dict[str, Any] = {"annotations": annotations} if annotations else {}
    return {**cited, "citations": list(resources)} if resources else {}


def _url_of(resource: Mapping[str, Any]) -> str:
    metadata = resource.get("doc_metadata")
    values = list(metadata.values()) if isinstance(metadata, dict) else []
    for value in [*values, resource.get("url")]:
        if isinstance(value, str) and re.match(r"https?://\S+\Z", value):
            return value
    return ""


# ==============================================================================
# 7. Conversations
# ==============================================================================
#
# Which Dify conversation a request continues. OpenAI's clients send their whole history
# each time, Dify keeps it by conversation_id; the table of tails here maps one to the
# other. It is only a cache: whenever the answer is "don't know", the history is folded
# into the query of a new conversation, and the answer is right all the same.
#
#     [u1 a1 u2 a2] + u3  ends like a known transcript -> u3, to that conversation
#     [u1 a1 u2 a2] + u3  does not                     -> "u1 a1 u2 a2 u3", to a new one
#
# (1) A history matches a transcript that it equals (any length, by a chained hash); or
#     one that it ends, as clients do that cut old messages: a window. A window must be
#     unmistakable: two answers or a long one in it, standing nowhere else in the
#     transcript (as far as that is kept), and in no other transcript of the user.
# (2) Who takes a tail has it alone until it is put back, in all processes. A tail that
#     is never put back is lost: nobody knows what its turn did to Dify's memory.
# (3) An explicit conversation_id is taken as given. If a turn is under way there, the
#     order of the two is unknown, and neither is recorded.
# (4) App key and user are part of every hash, so a conversation is out of reach for
#     others, and the table tells nothing to a reader without the key: no text, no key.
# (5) Reasoning is no part of a message, system text no part of a history; a system
#     text is told again when it has changed, and otherwise breaks nothing.
#
# Pure but for SQLite, which holds the table in memory too. No failure of it reaches a
# request. `now` is wall-clock time in seconds: a table outlives its process.

MAX_CONVERSATIONS = 100_000  # some 50 MB
_KEPT_MESSAGES = 128  # the longest window; 1 KiB a conversation, at most
_DIGEST_BYTES = 8
_CLEAR_BYTES = 200  # of answers: no greeting or other stock phrase is that long
_ABANDONED_AFTER_S = 3600.0  # three times what Dify lets a run take (1200 s)
_BUSY_TIMEOUT_S = 0.05  # the event loop stands still meanwhile
_MAX_CANDIDATES = (
    64  # that end in the same answer; with more, a window is stock phrases
)
_SWEEP_EVERY = 100  # new tails: counting 100,000 of them takes a millisecond
_SWEEP_MOST = 1000  # a sweep's rows, for the same reason
_UNRECORDED = -1
_GO_ON = "Continue your last message exactly where it ends, without repeating it."
_SIDE_REQUESTS = (
    "### Task:",  # Open WebUI; the others: NextChat and its descendants
    "Please generate a four to five word title",
    "使用四到五个字直接返回这句话的简要主题",
    "Summarize the discussion briefly in",
    "简要总结一下对话内容，用作后续的上下文提示",
)
_REASONING = re.compile(
    r"(?:\s*(?:<(think(?:ing)?|thought|reason(?:ing)?)\b[^>]*>.*?</\1>"
    r"|<details\b[^>]*>\s*<summary[^>]*>\s*(?:Thinking|Thought).*?</details>))+",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class Transcript:
    """Messages as hashes; system messages are none.

    `chain` stands for all `length` of them, `digests` has one hash each for the last
    ones. `weight` tells how unmistakable they are, 200 and more is enough.
    """

    scope: bytes = field(repr=False)
    chain: bytes
    length: int = 0
    digests: bytes = b""
    weight: int = 0

    def extend(self, messages: Sequence[Message]) -> Transcript:
        """The transcript with these messages behind it."""
        digests, chain, weight, length = (
            [self.digests],
            self.chain,
            self.weight,
            self.length,
        )
        for message in messages:
            if message.role == "system":
                continue
            digest = message_digest(self.scope, message)
            digests.append(digest)
            chain = _hash(self.scope, chain + digest, 16)
            length += 1
            if message.role == "assistant":
                weight += max(len(_plain_text(message).encode()), _CLEAR_BYTES // 2)
        kept = b"".join(digests)[-_KEPT_MESSAGES * _DIGEST_BYTES :]
        return Transcript(self.scope, chain, length, kept, weight)

    def ends(self, length: int, digests: bytes) -> bool:
        """Whether it ends that longer transcript, and stands nowhere else in it."""
        if self.length >= length or not digests.endswith(self.digests):
            return False
        starts = range(0, len(digests), _DIGEST_BYTES)
        return sum(digests.startswith(self.digests, start) for start in starts) == 1


@dataclass(frozen=True)
class Tail:
    """Where a conversation stands.

    `system` is the hash of the system text that it was told last, `folded` how many of
    its first messages Dify has as an input only. `turn` counts its takers.
    """

    conversation_id: str
    transcript: Transcript
    system: bytes = b""
    folded: int = 0
    turn: int = 0


@dataclass(frozen=True)
class Plan:
    """How a turn is put to Dify.

    `tail.conversation_id` is "" for a new conversation; `inputs` go over the app's own,
    `files` go with the query.
    """

    query: str
    inputs: Mapping[str, Any]
    files: tuple[Attachment, ...]
    tail: Tail

    def finish(self, conversation_id: str, answer: Message) -> Tail:
        """The tail to put into the table once Dify and the client have the answer."""
        transcript = self.tail.transcript.extend([answer])
        turn = self.tail.turn
        if turn > 0 and conversation_id != self.tail.conversation_id:
            turn = 0  # Dify began another one
        return replace(
            self.tail, conversation_id=conversation_id, transcript=transcript, turn=turn
        )


def scope_of(app_key: str, user: str) -> bytes:
    """The key of all hashes of one user's conversations with one app; a secret."""
    name = json.dumps([app_key, user]).encode()
    return hashlib.blake2b(name, digest_size=32, person=b"OpenDify").digest()


def split_turn(ask: Ask) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """(history, new): the messages up to the last answer, and those after it."""
    at = len(ask.messages)
    while at and ask.messages[at - 1].role != "assistant":
        at -= 1
    return ask.messages[:at], ask.messages[at:]


def is_side_request(ask: Ask) -> bool:
    """Whether a client asks for its own sake: a title, tags, a summary."""
    last = ask.messages[-1].text if ask.messages else ask.system
    return last.lstrip().startswith(_SIDE_REQUESTS)


# Hashing...


def message_digest(scope: bytes, message: Message) -> bytes:
    """What makes two messages the same: not white space, reasoning, ids of calls."""
    content = [
        message.role,
        ""
        if message.role == "assistant"
        else message.name,  # its name may be the model
        _plain_text(message),
        [[call.name, _canonical(call.arguments)] for call in message.tool_calls],
        [
            file.url or hashlib.sha256(file.data).hexdigest()
            for file in message.attachments
        ],
    ]
    return _hash(scope, json.dumps(content).encode(), _DIGEST_BYTES)


def _hash(scope: bytes, data: bytes, size: int) -> bytes:
    return hashlib.blake2b(data, digest_size=size, key=scope).digest()


def _plain_text(message: Message) -> str:
    text = message.text
    if message.role == "assistant" and (match := _REASONING.match(text)):
        text = text[match.end() :]
    # Half a surrogate pair reaches clients as U+FFFD, and comes back as that.
    text = text.replace("\ufffd", "?").encode("utf-8", "replace").decode()
    return " ".join(text.split())


def _canonical(arguments: str) -> str:
    try:
        return json.dumps(json.loads(arguments), sort_keys=True)
    except (ValueError, RecursionError):
        return " ".join(arguments.split())


# Putting a turn to Dify...


def plan_turn(
    ask: Ask,
    scope: bytes,
    tail: Tail | None,
    *,
    system_variable: str = "",
    history_variable: str = "",
) -> Plan:
    """What to send: the new messages to the tail's conversation, or all to a new one.

    Args:
        ask: what the client wants.
        scope: of the app and the user, see `scope_of`.
        tail: what `Conversations.take` gave; None folds the history.
        system_variable: the app's input for the system text, "" if it has none.
        history_variable: likewise for the history.
    """
    history, new = split_turn(ask)
    opening = [Message("system", ask.system)] if ask.system.strip() else []
    told = [] if system_variable else opening
    system = told + [row for row in history if row.role == "system"]
    if tail is None:
        transcript = Transcript(scope, scope).extend(history)
        # Nobody can tell how a client will show an answer continued, or a title.
        turn = 0 if new and not is_side_request(ask) else _UNRECORDED
        folded = transcript.length if history_variable else 0
        tail = Tail("", transcript, folded=folded, turn=turn)
        elsewhere = history if history_variable else ()
        context = told if history_variable else told + list(history)
    else:
        elsewhere = _folded_history(history, tail)
        context = [] if _system_hash(scope, system) == tail.system else system
    inputs = dict(ask.inputs)
    if system_variable and opening:
        inputs[system_variable] = ask.system
    if history_variable and elsewhere:
        inputs[history_variable] = fold(elsewhere, ())
    heard = system + [row for row in new if row.role == "system"]
    after = replace(
        tail,
        transcript=tail.transcript.extend(new),
        system=_system_hash(scope, heard) or tail.system,
    )
    query = _query(context, new) or (ask.system if not ask.messages else _GO_ON)
    files = tuple(file for row in new for file in row.attachments)
    return Plan(query or " ", inputs, files, after)


def _system_hash(scope: bytes, messages: Sequence[Message]) -> bytes:
    texts = [row.text for row in messages if row.text.strip()]
    return _hash(scope, json.dumps(texts).encode(), _DIGEST_BYTES) if texts else b""


def _folded_history(history: tuple[Message, ...], tail: Tail) -> tuple[Message, ...]:
    """The messages that Dify has not in its memory, but in an input of each turn."""
    at, remembered = len(history), tail.transcript.length - tail.folded
    while at and remembered:
        at -= 1
        remembered -= history[at].role != "system"
    return history[:at] if tail.folded else ()


def _query(context: Sequence[Message], new: Sequence[Message]) -> str:
    """One text for all: the messages with their roles, and what to do with them."""
    last = (
        new[0] if len(new) == 1 and new[0].role == "user" and not new[0].name else None
    )
    if last and not context:
        return _said(last)
    is_history = any(row.role != "system" for row in context)
    parts = ["The conversation so far:"] if is_history else []
    parts.append(fold(context, () if last else new, beside=_said(last) if last else ""))
    if last:
        parts += ["Answer this message:"] if is_history else []
        parts.append(_said(last))
    elif is_history:
        parts.append("Write the assistant's next message." if new else _GO_ON)
    return "\n\n".join(part for part in parts if part)


def _said(message: Message) -> str:
    """A message's text as a query; Dify refuses an empty one."""
    if message.attachments and not message.text.strip():
        return f"[attached: {_file_names(message)}]"
    return message.text or " "


def fold(old: Sequence[Message], new: Sequence[Message], *, beside: str = "") -> str:
    """Messages as text, each between tags that occur in none, nor in `beside`.

        <message role="user" name="Ada">
        What's the weather?
        </message>

    Files of new messages go with the query, those of old ones do not.
    """
    rows = [row for message in old for row in _rows(message, "file_not_included")]
    rows += [row for message in new for row in _rows(message, "file")]
    used: set[str] = set()
    for text in [beside, *(text for _, text in rows)]:
        used.update(re.findall(r"</?message(?:-(\d+))?", text, re.IGNORECASE))
    free = next(n for n in count(2) if str(n) not in used)
    tag = f"message-{free}" if used else "message"
    return "\n".join(
        f"<{tag}{attributes}>\n{text}\n</{tag}>" for attributes, text in rows
    )


def _rows(message: Message, file_key: str) -> list[tuple[str, str]]:
    """A message's elements: itself, and one for each tool call; (attributes, text)."""
    about = {"role": message.role, "name": message.name, file_key: _file_names(message)}
    rows = [(_attributes(about), message.text)]
    if message.tool_calls and not (message.text or message.attachments):
        rows = []
    for call in message.tool_calls:
        about = {"role": message.role, "tool_call": call.name, "id": call.id}
        rows.append((_attributes(about), call.arguments))
    return rows


def _attributes(values: Mapping[str, str]) -> str:
    quoted = {
        name: json.dumps(text, ensure_ascii=False) for name, text in values.items()
    }
    return "".join(f" {name}={quoted[name]}" for name in values if values[name])


def _file_names(message: Message) -> str:
    names = []
    for file in message.attachments:
        kind = f" ({file.media_type})" if file.media_type else ""
        names.append(f"{file.url or file.name or 'file'}{kind}")
    return "; ".join(names)


# The table...

_SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS opendify_tails (
    id BLOB PRIMARY KEY, conversation_id TEXT, last BLOB, chain BLOB, length INTEGER,
    digests BLOB, system BLOB, folded INTEGER, turn INTEGER, taken INTEGER, used REAL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS opendify_by_chain ON opendify_tails (last, chain, taken);
CREATE INDEX IF NOT EXISTS opendify_by_use ON opendify_tails (used);
PRAGMA user_version = 1;
"""
_COLUMNS = "id, conversation_id, chain, length, digests, system, folded, turn, taken"
_ALIVE = "used >= CASE taken WHEN 0 THEN ? ELSE ? END"


class Conversations:
    """The table of tails, in an SQLite file or, for ":memory:", in memory.

    FREE -> TAKEN [take], TAKEN -> FREE [put], either -> gone [forget, or by age]. A row
    that is taken by id while it is TAKEN stays so until it is abandoned.

    Raises:
        sqlite3.Error: the file can't be used. No method raises it later.
    """

    def __init__(
        self, path: str, ttl_s: float, max_conversations: int = MAX_CONVERSATIONS
    ) -> None:
        self._ttl_s = ttl_s
        self._max_conversations = max_conversations
        self._until_sweep = 0
        self._db = sqlite3.connect(
            path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        try:
            self._db.executescript(_SCHEMA)
        except sqlite3.Error:
            self._db.close()
            raise

    def __len__(self) -> int:
        """How many there are, those under way included."""
        rows = self._read("SELECT COUNT(*) FROM opendify_tails")
        return int(rows[0][0]) if rows else 0

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._db.close()

    def take(self, ask: Ask, scope: bytes, now: float) -> Tail | None:
        """The conversation that a request continues, None to fold its history.

        Follow it with `put` or `forget`, whatever happens.
        """
        history, new = split_turn(ask)
        if is_side_request(ask):
            return None
        if ask.conversation_id:
            return self._take_by_id(ask.conversation_id, scope, now)
        transcript = Transcript(scope, scope).extend(history)
        if not new or not transcript.length:
            return None
        row = self._find(transcript, now)
        return self._taken(row, scope, now) if row and not row[8] else None

    def put(self, tail: Tail, now: float) -> None:
        """Record a tail: of a new conversation, moved on by a turn, or unchanged."""
        if tail.turn == 0 and tail.conversation_id:
            self._insert(tail, now)
            self._sweep(now)
        elif tail.turn > 0:
            row = tail.transcript
            self._write(
                "UPDATE opendify_tails SET last = ?, chain = ?, length = ?, digests = ?,"
                " system = ?, folded = ?, taken = 0, used = ?"
                " WHERE id = ? AND turn = ? AND taken = 1",
                (row.digests[-_DIGEST_BYTES:], row.chain, row.length, row.digests)
                + (tail.system, tail.folded, now, _id_of(tail), tail.turn),
            )

    def forget(self, tail: Tail | None) -> None:
        """Drop a conversation, unless another turn has it by now."""
        if tail:
            sql = "DELETE FROM opendify_tails WHERE id = ? AND turn = ?"
            self._write(sql, (_id_of(tail), tail.turn))

    # Finding and taking...

    def _find(self, history: Transcript, now: float) -> Any:
        """The row that a history matches, if need be one that is taken."""
        last = history.digests[-_DIGEST_BYTES:]
        sql = f"SELECT {_COLUMNS} FROM opendify_tails WHERE last = ? AND {_ALIVE}"
        key = (last, now - self._ttl_s, now - _ABANDONED_AFTER_S)
        equal = f"{sql} AND chain = ? ORDER BY taken LIMIT 1"
        if rows := self._read(equal, (*key, history.chain)):
            return rows[0]
        if history.length > _KEPT_MESSAGES or history.weight < _CLEAR_BYTES:
            return None
        rows = self._read(f"{sql} LIMIT {_MAX_CANDIDATES + 1}", key)
        matches = {row[2] for row in rows if history.ends(row[3], row[4])}
        if len(matches) != 1 or len(rows) > _MAX_CANDIDATES:
            return None
        rows = self._read(equal, (*key, *matches))
        return rows[0] if rows else None

    def _taken(self, row: Any, scope: bytes, now: float) -> Tail | None:
        """The row's tail, None if another process was faster."""
        key, conversation_id, chain, length, digests, system, folded, turn, taken = row
        is_ours = self._write(
            "UPDATE opendify_tails SET taken = 1, turn = turn + 1, used = ?"
            " WHERE id = ? AND turn = ? AND (taken = 0 OR used < ?)",
            (now, key, turn, now - _ABANDONED_AFTER_S),
        )
        transcript = Transcript(scope, chain, length, digests)
        if taken:  # and abandoned
            return replace(_unknown(conversation_id, scope), turn=turn + 1)
        tail = Tail(conversation_id, transcript, system, folded, turn + 1)
        return tail if is_ours else None

    def _take_by_id(self, conversation_id: str, scope: bytes, now: float) -> Tail:
        tail = _unknown(conversation_id, scope)
        self._insert(tail, now)  # unless it is there
        rows = self._read(
            f"SELECT {_COLUMNS} FROM opendify_tails WHERE id = ?", (_id_of(tail),)
        )
        if taken := self._taken(rows[0], scope, now) if rows else None:
            return taken
        sql = "UPDATE opendify_tails SET turn = turn + 1, used = ? WHERE id = ?"
        self._write(sql, (now, _id_of(tail)))
        return replace(tail, turn=_UNRECORDED)

    # SQLite...

    def _insert(self, tail: Tail, now: float) -> None:
        row = tail.transcript
        self._write(
            "INSERT OR IGNORE INTO opendify_tails VALUES (?,?,?,?,?,?,?,?,?,?,?)",
            (
                _id_of(tail),
                tail.conversation_id,
                row.digests[-_DIGEST_BYTES:],
                row.chain,
            )
            + (row.length, row.digests, tail.system, tail.folded, 0, 0, now),
        )

    def _sweep(self, now: float) -> None:
        """Now and then, drop what is too old or too much."""
        self._until_sweep -= 1
        if self._until_sweep > 0:
            return
        self._until_sweep = min(_SWEEP_EVERY, self._max_conversations // 100)
        drop = "DELETE FROM opendify_tails WHERE id IN (SELECT id FROM opendify_tails"
        old = f"{drop} WHERE used < ? LIMIT {_SWEEP_MOST})"
        self._write(old, (now - max(self._ttl_s, _ABANDONED_AFTER_S),))
        excess = min(len(self) - self._max_conversations, _SWEEP_MOST)
        self._write(f"{drop} ORDER BY used LIMIT ?)", (max(excess, 0),))

    def _read(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.Error:
            return []

    def _write(self, sql: str, values: Sequence[Any]) -> bool:
        try:
            return self._db.execute(sql, values).rowcount == 1
        except sqlite3.Error:
            return False


def _id_of(tail: Tail) -> bytes:
    return _hash(
        tail.transcript.scope, tail.conversation_id.encode("utf-8", "replace"), 16
    )


def _unknown(conversation_id: str, scope: bytes) -> Tail:
    """A conversation of which only the id is known: one unknown message, in effect."""
    tail = Tail(conversation_id, Transcript(scope, b"", 1))
    return replace(tail, transcript=Transcript(scope, _id_of(tail), 1))


def open_conversations(store: str, ttl_s: float) -> tuple[Conversations, str]:
    """The table, and a complaint if it can't be where CONVERSATION_STORE wants it.

    Args:
        store: "memory" or the path of an SQLite file.
        ttl_s: the age after which an unused conversation is forgotten.
    """
    complaint = ""
    if store.lower() not in ("", "memory"):
        try:
            return Conversations(store, ttl_s), ""
        except (sqlite3.Error, ValueError) as error:
            complaint = (
                f"CONVERSATION_STORE: {store} can't be used ({error}). Conversations are"
                " kept in memory and do not survive a restart."
            )
    return Conversations(":memory:", ttl_s), complaint


# ==============================================================================
# 8. Pacer
# ==============================================================================
#
# Says when each piece of streamed text is due, so that text which arrives in
# clumps is shown evenly. Knows nothing of asyncio, sleeping, clocks or events:
# `now` is an argument, in seconds that never run backwards.
#
#     shown
#       |            arrived ______|‾‾‾‾     the ceiling: nothing before it came
#       |       ____|    . ' shown
#       |      |    . '     _____|‾‾‾‾‾      the floor: the ceiling, max_lag later
#       |    . ' ______|‾‾‾‾
#       +--|-----------|---------------> time
#          0        max_lag
#
# Every schedule that keeps the bound runs between the two curves. The smoothest
# is a string pulled tight between them (Salehi, Zhang, Kurose, Towsley 1998), but
# that one knows the future. Pacer follows the same floor, which is known, and
# puts what the source did lately in the place of what it will do:
#
# (1) Floor. Of the text held, c characters must be out within d seconds, for
#     each arrival. No slower than the steepest of these slopes is ever right:
#         floor = max c / d
# (2) Pace. The source brings `rate` characters a second, and B held characters
#     should stand for `lag` seconds, which would take B / lag a second. Between
#     what keeps the speed even and what keeps the lag, the geometric mean:
#         pace = sqrt(rate * B / lag)
#     It settles where B = rate * lag, never runs dry (it falls with B), answers a
#     doubled backlog with 1.4 times the speed, and forgets in about 2 lags.
# (3) Lag. To bridge a source's pauses, text must be held for about as long as
#     they are, and to spread a source's clumps, for about as long as they last
#     at its rate. Both are means in which the long and the large count for more
#     (the pause that a random moment falls in, the clump of a random character):
#         lag = sum(gap^2) / sum(gap) + sum(size^2) / sum(size) / rate
#     Even tokens, 30 a second, are held for two gaps, 66 ms; sentences as long as
#     the bound allows, which is 3/4 of max_lag, to leave room for mishaps.
# (4) Look-back. The sums fade with LOOK_BACK_S, and begin as if an even source had
#     been heard for a moment; so a source that turns even is let through quickly.
#
# Text moves on at max(floor, pace), in pieces that stand on a beat. After close()
# nothing more will come, and it moves on at max(floor, rate) till nothing is held.
#
# Pieces end where grapheme clusters do (UAX #29, with a few ties added: nothing is
# cut after a joiner or a virama). The last cluster held may still grow when its
# next half is in the next token: an emoji, a flag's first letter, a letter of a
# script that writes marks after it. It waits for the next push, which ends the
# doubt; letters of Latin, Cyrillic, CJK and the like never wait for that.
#
# Where the rules collide: the lag bound wins (even over a cluster), then "first
# text at once" (even if it may still grow), then whole clusters, then evenness.

# What is remembered of the source fades by 1/e in this time: long against a clump,
# so that the rate is even; short against an answer, so that it follows a change.
_LOOK_BACK_S = 3.0
# The sums to begin with, soon outweighed: as if 5 tokens of 4 characters had come, one
# every 60 ms. A first text of this size is shown like a slow source, a large one like
# a burst, over all of max_lag.
_PRIOR = (5 * 0.06, 5 * 0.06**2, 5 * 4.0, 5 * 4.0**2)
# Shares of max_lag: the longest lag aimed at, and the longest gap that counts (what
# is far beyond max_lag cannot be bridged, and says nothing about the pace).
_LAG_SHARE, _GAP_SHARE = 0.75, 2.5
# Text this close together came in one network packet, and is one arrival.
_SAME_ARRIVAL_S = 0.005
# Seconds between pieces, for a source with gaps below the first number. A piece costs
# a wake-up and a write, so dense tokens are shown at 30 a second, tokens with gaps of
# about 50 ms one by one, and only what is sparser in finer steps: under 50 a second,
# even when a timer was late.
_BEATS = ((0.04, 1 / 30), (0.06, 1 / 20), (inf, 1 / 49))
# A longer silence with text in hand looks stuck; the promise is 0.15, timers are late.
_SILENCE_S = 0.12
# Timers may fire this much early: clocks are coarse.
_EARLY_S = 0.0005
# No honest cluster is longer: UAX #15 (stream-safe text) allows 30 marks on a letter.
# Beyond it a cluster is cut, so that hostile text costs no more than any other.
_MAX_CLUSTER = 32
# Marks, and format characters (joiners, tags); and the combining class of viramas,
# which bind the next consonant, too.
_TYING, _VIRAMA = ("Mn", "Mc", "Me", "Cf"), 9
_FLAGS = "".join(map(chr, range(0x1F1E6, 0x1F200)))
# Pairs that no category tells: joiners, prepended signs and initial jamo with what is
# after them; AM of Thai and Lao, other jamo, halfwidth voicing marks and skin tones
# with what is before them.
_PAIR = re.compile(
    "(?s)[\u0600-\u0605\u06dd\u070f\u08e2\u1100-\u115f\u200d\ua960-\ua97c]."
    "|.[\u0e33\u0eb3\u1160-\u11ff\ud7b0-\ud7fb\uff9e\uff9f\U0001f3fb-\U0001f3ff]"
)
# What the next token may add to: CR; letters of scripts whose marks follow (Hebrew to
# Myanmar, Tagalog to Vedic, and later ones), jamo; marks; symbols, emoji, their parts.
_GROWING = re.compile(
    "[\r\u0590-\u109f\u1100-\u11ff\u1700-\u1cff\ua800-\uabff\U00010a00-\U00016fdf"
    "\u0300-\u036f\u1dc0-\u1dff\u200d\u203c-\u2049\u20d0-\u2bff\u3030-\u303d\u3099\u309a"
    "\u3297-\u3299\ufe00-\ufe2f\U0001f000-\U0001faff\U000e0020-\U000e007f]"
)


class Pacer:
    """Holds streamed text back just enough to show it evenly.

    After `push(text, now)` call `take(now)`, arm a timer for `next_due()`, and call
    `take` again when it fires; a timer that is late shifts nothing but its own piece.

    Args:
        max_lag_s: Seconds that a character may be held at most; 0 holds nothing.
    """

    def __init__(self, max_lag_s: float = 0.4) -> None:
        self._max_lag_s = max(max_lag_s, _EARLY_S)
        # What is held; how many characters came and went since the beginning; and by
        # when (keys, in order) how many must have gone.
        self._texts: list[str] = []
        self._came = self._gone = 0
        self._deadlines: dict[float, int] = {}
        # The source: faded sums of gap, gap^2, size, size^2; the arrival not yet in.
        self._sums = list(_PRIOR)
        self._heard, self._heard_size = -inf, 0
        self._tune()
        # The curve: drawn until, next piece at, last piece at; and how much of the
        # next character is due already: all of it, so that the first goes at once.
        self._drawn = self._tick = self._shown = -inf
        self._credit = 1.0
        self._is_closed = False

    @property
    def held(self) -> int:
        """Characters held back at present."""
        return self._came - self._gone

    def push(self, text: str, now: float) -> None:
        """Take in text that arrived at `now`; call `take(now)` next."""
        if not text:
            return
        self._listen(len(text), now)
        if not self.held:  # the curve starts anew, a beat ago
            self._drawn = max(self._drawn, now - self._beat_s)
            self._tick = max(self._tick, now)
        self._tick = min(self._tick, self._drawn + self._beat_s)
        self._texts.append(text)
        self._came += len(text)
        self._deadlines[self._heard + self._max_lag_s] = self._came

    def take(self, now: float) -> str:
        """Give back the text that is due at `now`; "" if none is."""
        due = self.next_due()
        if due is None or now < due - _EARLY_S:
            return ""
        at = max(min(self._tick, now + _EARLY_S), now - self._beat_s)
        speed, must = self._speed(now)
        wish = self._credit + speed * (at - self._drawn)
        if now + self._beat_s > self._shown + _SILENCE_S:
            wish = max(wish, 1.0)
        piece = self._cut(int(wish + 1e-6), must)
        self._drawn, self._credit = at, max(-wish, min(1.0, wish - len(piece)))
        self._shown = now if piece else self._shown
        # The next beat is when the next character is due, but never in a silence; and
        # if a cluster waits for its end, not before something is pushed or overdue.
        tick = min(at + (1.0 - self._credit) / speed, self._shown + _SILENCE_S)
        self._tick = max(at + self._beat_s, tick) if piece or wish < 1.0 else inf
        return piece

    def next_due(self) -> Optional[float]:
        """When to call `take` next; None while nothing is held."""
        return min(self._tick, next(iter(self._deadlines))) if self.held else None

    def close(self, now: float) -> None:
        """No more text will come; keep calling `take` until nothing is held."""
        self._is_closed = True
        self._tick = min(self._tick, max(now, self._drawn + self._beat_s))

    def flush(self) -> str:
        """Give back everything held, at once; more text may follow."""
        self._drawn = self._tick = -inf
        self._credit = 1.0
        return self._cut(self.held, self.held)

    def _listen(self, size: int, now: float) -> None:
        """Keep the faded sums, an arrival late: its gap is known when it is over."""
        gap = min(now - self._heard, _GAP_SHARE * self._max_lag_s)
        if self._came and gap < _SAME_ARRIVAL_S:
            self._heard_size += size
            return
        if self._came:
            fade = exp(-gap / _LOOK_BACK_S)
            news = (gap, gap**2, self._heard_size, self._heard_size**2)
            self._sums = [old * fade + new for old, new in zip(self._sums, news)]
            self._tune()
        self._heard, self._heard_size = now, size

    def _tune(self) -> None:
        """Derive rate, lag and beat from the sums."""
        gaps, gaps2, sizes, sizes2 = self._sums
        gap_s, self._rate = gaps2 / gaps, sizes / gaps
        lag_s = gap_s + sizes2 / sizes / self._rate
        self._lag_s = min(lag_s, _LAG_SHARE * self._max_lag_s)
        self._beat_s = next(beat_s for below_s, beat_s in _BEATS if gap_s < below_s)

    def _speed(self, now: float) -> tuple[float, int]:
        """Characters a second to move on at, and how many must go with this beat."""
        pace = sqrt(self._rate * self.held / self._lag_s)
        speed, must = self._rate if self._is_closed else pace, 0
        for deadline, came in self._deadlines.items():
            left_s = deadline - now
            if left_s < self._beat_s + _EARLY_S:
                must, left_s = came - self._gone, self._beat_s
            speed = max(speed, (came - self._gone) / left_s)
        return speed, must

    def _cut(self, wish: int, must: int) -> str:
        """Remove about `wish` characters from what is held, and no less than `must`."""
        text = "".join(self._texts)
        end = _boundary(text, min(len(text), max(wish, must, 0)), 1)
        if end == len(text) > must and not self._is_closed and _GROWING.match(text[-1]):
            whole = _boundary(text, end - 1, -1)
            if whole >= must and (whole or self._gone):
                end = whole
        self._texts = [text[end:]]
        self._gone += end
        self._deadlines = {by: n for by, n in self._deadlines.items() if n > self._gone}
        return text[:end]


def _boundary(text: str, at: int, step: int) -> int:
    """The first place from `at` on, in steps of +1 or -1, that parts no cluster."""
    stop = at + step * _MAX_CLUSTER
    while at != stop and 0 < at < len(text) and _is_tied(text, at):
        at += step
    return at


def _is_tied(text: str, at: int) -> bool:
    """Whether the characters before and at `at` must not be parted."""
    before, after = text[at - 1], text[at]
    if before < "\u0300" and after < "\u0300":  # nearly always
        return before == "\r" and after == "\n"
    run = text[max(0, at - 2 * _MAX_CLUSTER) : at]  # flags are pairs in a run
    is_half = after in _FLAGS and (len(run) - len(run.rstrip(_FLAGS))) % 2 == 1
    is_mark = unicodedata.category(after) in _TYING
    binds = unicodedata.combining(before) == _VIRAMA
    return is_half or is_mark or binds or bool(_PAIR.match(before + after))


# ==============================================================================
# 9. Wire
# ==============================================================================
#
# HTTP/1.1 over asyncio streams, both roles (RFC 9112). h11 reads and writes every
# head; bodies are decoded here, beside it, since h11's own decoder costs 10 µs a
# chunk. Rule 1: a head is read strictly, also where h11 is lenient. Rule 2: the
# happy path, back to it, or close. Knows nothing of JSON and of routes.
#
#     IDLE -> HEAD -> BODY -> IDLE      [read_head, read_body, …]
#     any  -> closed                    [EOF, a deadline, malformed bytes, close]

# nginx and Node allow 32 and 16 KiB; cookies of a shared host can be large.
MAX_HEAD_BYTES = 32 * 1024
MAX_FIELDS = 200
# What a stream may hold unread before its socket is paused.
READ_BUFFER_BYTES = 64 * 1024
WRITE_TIMEOUT_S = 60.0  # for a peer that reads nothing

_BARE_LINE_END = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")
# The size line of a chunk, behind the end of the chunk before it, and its beginnings.
_SIZE, _EXTENSION = rb"([0-9A-Fa-f]{1,15})", rb"[ \t]*(?:;[^\r\n]*)?"
_FIRST_CHUNK = re.compile(_SIZE + _EXTENSION + rb"\r\n")
_NEXT_CHUNK = re.compile(rb"\r\n" + _SIZE + _EXTENSION + rb"\r\n")
_FIRST_BEGUN = re.compile(rb"(?:" + _SIZE + _EXTENSION + rb"\r?)?\Z")
_NEXT_BEGUN = re.compile(rb"\r?\Z|\r\n(?:" + _SIZE + _EXTENSION + rb"\r?)?\Z")


class MalformedHTTP(BadRequest):
    """The peer does not speak HTTP/1.1 as it must be spoken."""


class ConnectionBroken(Exception):
    """The peer closed or reset the connection in the middle of something."""


class WatchedReader(asyncio.StreamReader):
    """A stream that tells at once when its peer leaves, though nobody reads it."""

    on_leave: Callable[[], None] | None = None

    def feed_eof(self) -> None:
        """The peer has closed its side."""
        super().feed_eof()
        if self.on_leave:
            self.on_leave()

    def set_exception(self, exc: Exception) -> None:
        """The connection is lost, or a deadline has passed."""
        super().set_exception(exc)
        if self.on_leave and isinstance(exc, OSError):
            self.on_leave()


class BodyDecoder:
    """Takes a message's body out of the bytes that follow its head.

    Args:
        length: the Content-Length; None for chunked coding, -1 for "until the end".
    """

    def __init__(self, length: int | None) -> None:
        self.is_complete = length == 0
        self.rest = b""  # what came after the body's end
        self._is_chunked = length is None
        self._left = length or 0  # of the body, or of the current chunk
        self._buffer = b""  # of chunked coding: bytes that are not understood yet
        self._next, self._begun = _FIRST_CHUNK, _FIRST_BEGUN
        self._trailer_bytes = -1  # -1: the last chunk has not come

    def feed(self, data: bytes) -> bytes:
        """The bytes of the body in `data`; raises MalformedHTTP."""
        if self._is_chunked:
            return self._feed_chunks(data)
        if self._left < 0:
            return data
        body, self.rest = data[: self._left], data[self._left :]
        self._left -= len(body)
        self.is_complete = not self._left
        return body

    def feed_eof(self) -> None:
        """The peer closed: fine for "until the end", else ConnectionBroken."""
        if not self.is_complete and self._left >= 0:
            raise ConnectionBroken("closed in the middle of a body")
        self.is_complete = True

    def _feed_chunks(self, data: bytes) -> bytes:
        """Each event of Dify's is a chunk: this runs thousands of times a second."""
        data = self._buffer + data if self._buffer else data
        pieces, at, end = [], 0, len(data)
        while at < end:
            if self._left:
                piece = data[at : at + self._left]
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                continue
            if self._trailer_bytes >= 0:
                at = self._skip_trailers(data, at)
                break
            head = self._next.match(data, at)
            if not head:
                self._check_begun(data, at)
                break
            at, self._left = head.end(), int(head[1], 16)
            self._next, self._begun = _NEXT_CHUNK, _NEXT_BEGUN
            self._trailer_bytes = -1 if self._left else 0
        self._buffer = b"" if self.is_complete else data[at:]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _check_begun(self, data: bytes, at: int) -> None:
        """A size line may be incomplete, but it must look like one, and end soon."""
        if not self._begun.match(data, at):
            raise MalformedHTTP("The size of a chunk is malformed.")
        if len(data) - at >= MAX_HEAD_BYTES:
            raise MalformedHTTP("The extension of a chunk is too long.")

    def _skip_trailers(self, data: bytes, at: int) -> int:
        """Pass the trailer fields; nobody here needs them."""
        while True:
            end = data.find(b"\r\n", at)
            size = (end if end >= 0 else len(data)) - at
            if size + self._trailer_bytes > MAX_HEAD_BYTES:
                raise MalformedHTTP("The trailers are too long.")
            if end < 0:
                return at
            line, at = data[at:end], end + 2
            if not line:
                self.is_complete, self.rest = True, data[at:]
                return at
            if _BARE_LINE_END.search(line) or not re.match(
                rb"[!#$%&'*+.^_`|~\w-]+:", line
            ):
                raise MalformedHTTP("A trailer field is malformed.")
            self._trailer_bytes += len(line) + 2


class Wire:
    """One connection: reads heads and bodies, writes bytes, keeps deadlines.

    A deadline is one timer that is re-armed: moving it costs an assignment, where a
    timeout around each read would cost a task.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._loop = asyncio.get_running_loop()
        self._buffer = b""  # read, and not used yet
        self._deadline = 0.0  # 0: none
        self._on_deadline: Callable[[], Exception] = ConnectionBroken
        self._timer: asyncio.TimerHandle | None = None

    @property
    def peer(self) -> str:
        """The peer's address, for the log."""
        name = self._writer.get_extra_info("peername")
        return str(name[0]) if isinstance(name, tuple) else "-"

    def on_leave(self, callback: Callable[[], None] | None) -> None:
        """Be told at once when the peer leaves (of a WatchedReader only)."""
        if isinstance(self._reader, WatchedReader):
            self._reader.on_leave = callback

    # Deadlines...

    def allow(self, seconds: float, error: Callable[[], Exception]) -> None:
        """What is awaited from now on may take `seconds`; then it raises `error()`."""
        self._deadline = self._loop.time() + seconds
        self._on_deadline = error
        if self._timer is None or self._timer.when() > self._deadline:
            self._arm()

    def allow_any_time(self) -> None:
        """No deadline any more."""
        self._deadline = 0.0

    def _arm(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._deadline, self._check_deadline)

    def _check_deadline(self) -> None:
        self._timer = None
        if not self._deadline:
            return
        if self._loop.time() < self._deadline:
            self._arm()
            return
        self._reader.set_exception(self._on_deadline())
        if self._writer.transport.get_write_buffer_size():
            self._writer.transport.abort()  # or `drain` would wait for ever

    # Reading...

    @property
    def is_stale(self) -> bool:
        """Whether an idle connection is of no use any more."""
        return (
            bool(self._buffer or self._reader.at_eof() or self._reader.exception())
            or self._writer.is_closing()
        )

    @property
    def has_unread(self) -> bool:
        """Whether bytes are here that nobody asked for yet (a pipelined request)."""
        return bool(self._buffer)

    async def read(self) -> bytes:
        """Some bytes, b"" at the end; may raise ConnectionBroken, or the deadline's."""
        if self._buffer:
            data, self._buffer = self._buffer, b""
            return data
        try:
            return await self._reader.read(READ_BUFFER_BYTES)
        except OSError as error:  # reset, aborted, TLS cut off
            raise ConnectionBroken(str(error)) from error

    async def wait_for_data(self) -> bool:
        """Whether anything comes before the peer closes."""
        self._buffer = await self.read()
        return bool(self._buffer)

    async def read_head(self) -> bytes:
        """The next head, its blank line included; b"" if the peer closed before one."""
        data, checked = b"", 0
        while True:
            end = data.find(b"\r\n\r\n", max(0, checked - 3))
            size = len(data) if end < 0 else end
            if _BARE_LINE_END.search(data, max(0, checked - 1), size):
                raise MalformedHTTP("Lines must end with CR LF.")
            if size > MAX_HEAD_BYTES:
                raise HeadTooLarge(f"The head is over {MAX_HEAD_BYTES >> 10} KiB.")
            if end >= 0:
                self._buffer = data[end + 4 :]
                return data[: end + 4]
            checked = size
            more = await self.read()
            if not more and data:
                raise ConnectionBroken("closed in the middle of a head")
            if not more:
                return b""
            data += more
            while data.startswith(b"\r\n"):  # RFC 9112, section 2.2
                data = data[2:]

    async def read_body(self, decoder: BodyDecoder) -> bytes:
        """The next bytes of a body; b"" when it is complete."""
        while not decoder.is_complete:
            data = await self.read()
            if not data:
                decoder.feed_eof()
                return b""
            body = decoder.feed(data)
            if decoder.is_complete:
                self._buffer = decoder.rest
            if body:
                return body
        return b""

    # Writing...

    def write(self, data: bytes) -> None:
        """Hand bytes over; `drain` afterwards, at the latest before the next read."""
        self._writer.write(data)

    async def drain(self) -> None:
        """Wait until the peer has taken most of what was written."""
        try:
            if self._writer.transport.get_write_buffer_size():
                self.allow(WRITE_TIMEOUT_S, ConnectionBroken)
                await self._writer.drain()
                self.allow_any_time()
            elif self._writer.is_closing():
                raise ConnectionBroken("closed")
        except OSError as error:
            raise ConnectionBroken(str(error)) from error

    def close(self) -> None:
        """Close after what was written is sent; may be called twice."""
        self.allow_any_time()
        if self._timer:
            self._timer.cancel()
            self._timer = None
        self._writer.close()

    def abort(self) -> None:
        """Close now."""
        self.close()
        self._writer.transport.abort()


# Heads...


@dataclass(frozen=True)
class Request:
    """A request's head; `path` and `query` are still percent-encoded.

    Header names are in lower case; the values of a repeated one are joined by commas.
    """

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    http_version: str = "1.1"

    @property
    def wants_close(self) -> bool:
        """Whether the client will send nothing more on this connection."""
        tokens = self.headers.get("connection", "").lower().replace(" ", "").split(",")
        return "close" in tokens or self.http_version == "1.0"

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits for a 100 before it sends the body."""
        expect = self.headers.get("expect", "").lower()
        return expect == "100-continue" and self.http_version == "1.1"


NO_REQUEST = Request("-", "-", "", {})  # before one was understood


@dataclass(frozen=True)
class Response:
    """A whole response; its length is written for it."""

    status: int
    body: bytes = b""
    headers: Sequence[tuple[str, str]] = ()


def parse_request_head(head: bytes) -> tuple[h11.Connection, Request]:
    """A request, and the h11 connection that can write the response's head.

    Raises:
        MalformedHTTP: it is not what RFC 9112 allows, or allows two readings of it.
        HeadTooLarge: too many fields.
    """
    connection = h11.Connection(h11.SERVER, MAX_HEAD_BYTES * 2)
    try:
        connection.receive_data(head)
        event = connection.next_event()
    except h11.RemoteProtocolError as error:
        problem = MalformedHTTP(f"Malformed HTTP: {error}.")
        problem.status = 501 if error.error_status_hint == 501 else 400
        raise problem from error
    if not isinstance(event, h11.Request):
        raise MalformedHTTP("Malformed HTTP: no request.")
    headers = read_fields(event.headers)
    version = event.http_version.decode()
    if version not in ("1.0", "1.1"):
        problem = MalformedHTTP(f"HTTP/{version} is not spoken here.")
        problem.status = 505
        raise problem
    target = event.target.decode("latin-1")
    path, host = _split_target(event.method, target)
    if host:
        headers["host"] = host
    path, _, query = path.partition("?")
    method = event.method.decode()
    return connection, Request(method, path, query, headers, version)


def body_decoder(headers: Mapping[str, str], *, until_end: bool) -> BodyDecoder:
    """How a message's body ends; `until_end` where no length means "at the close"."""
    if "transfer-encoding" in headers:
        return BodyDecoder(None)
    if "content-length" in headers:
        return BodyDecoder(int(headers["content-length"]))
    return BodyDecoder(-1 if until_end else 0)


def read_fields(fields: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Header fields by name; refuses what h11 lets pass and a strict reader must not.

    Two framings, or one given twice, let two readers disagree about where a message
    ends: request smuggling (RFC 9112, section 11.2).
    """
    headers: dict[str, str] = {}
    count = 0
    for raw_name, raw_value in fields:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        count += 1
        if name in headers:
            if name in ("content-length", "transfer-encoding", "host"):
                raise MalformedHTTP(f"The field {name} is given twice.")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    if count > MAX_FIELDS:
        raise HeadTooLarge(f"There are more than {MAX_FIELDS} header fields.")
    if "transfer-encoding" in headers and "content-length" in headers:
        raise MalformedHTTP("Transfer-Encoding and Content-Length exclude each other.")
    if len(headers.get("content-length", "")) > 18:
        raise MalformedHTTP("The Content-Length is out of any range.")
    return headers


def _split_target(method: bytes, target: str) -> tuple[str, str]:
    """(path with query, host) of a request target; the host is "" if it names none."""
    if target.startswith("/"):
        return target, ""
    if target == "*" and method == b"OPTIONS":
        return "/", ""
    match = re.match(r"https?://([^/?#@]+)(/[^#]*)?\Z", target, re.IGNORECASE)
    if not match:
        raise MalformedHTTP("The request target must be a path.")
    return match[2] or "/", match[1]


_SPENT = h11.Connection(h11.SERVER)  # stands for one whose head is written


class Reply:
    """The response to one request: `send` it whole, or `start`, `write` and `end`.

    The head waits for the first bytes of the body, to leave in one packet with them.
    """

    def __init__(
        self,
        wire: Wire,
        connection: h11.Connection | None = None,
        request: Request = NO_REQUEST,
    ) -> None:
        self.status = 0  # 0: not started
        self.is_complete = False
        self.must_close = request is NO_REQUEST or request.wants_close
        self.headers: list[tuple[str, str]] = []  # that go with any response
        self.body_bytes = 0
        self._wire = wire
        self._connection = connection or h11.Connection(h11.SERVER)
        self._is_bare = request.method == "HEAD"
        self._is_old = request.http_version == "1.0"
        self._is_chunked = False
        self._head = b""

    def send(self, response: Response) -> None:
        """The whole response at once."""
        self.start(response.status, response.headers, len(response.body))
        self.end(response.body)

    def start(
        self,
        status: int,
        headers: Sequence[tuple[str, str]] = (),
        length: int | None = None,
    ) -> None:
        """The head; without a length the body is chunked, or ends at the close."""
        fields = [*headers, *self.headers]
        if length is not None and status != 204:
            fields.append(("Content-Length", str(length)))
        elif length is None:
            self._is_chunked = not self._is_old
            self.must_close = self.must_close or self._is_old
            fields += [("Transfer-Encoding", "chunked")] * self._is_chunked
        if self.must_close:
            fields.append(("Connection", "close"))
        reason = http.client.responses.get(status, "")
        head = h11.Response(status_code=status, headers=fields, reason=reason)
        self._head = self._connection.send(head) or b""
        self._connection, self.status = _SPENT, status

    def write(self, data: bytes) -> None:
        """More of the body."""
        if data and not self._is_bare:
            self.body_bytes += len(data)
            if self._is_chunked:
                data = b"%x\r\n%b\r\n" % (len(data), data)
            self._flush(data)

    def end(self, data: bytes = b"") -> None:
        """The last of the body, and its end, in one packet."""
        last = b"0\r\n\r\n" if self._is_chunked and not self._is_bare else b""
        self.is_complete = True
        if data and not self._is_bare:
            self.body_bytes += len(data)
            if self._is_chunked:
                data = b"%x\r\n%b\r\n" % (len(data), data)
            self._flush(data + last)
        else:
            self._flush(last)

    def _flush(self, data: bytes) -> None:
        if self._head or data:
            self._wire.write(self._head + data)
            self._head = b""

    async def drain(self) -> None:
        """Wait until the client has taken most of what was written."""
        await self._wire.drain()


# ==============================================================================
# 10. Upstream
# ==============================================================================
#
# The way to Dify: connections that are kept and reused, TLS that is always verified,
# the Dify client, and one turn's stream of answer parts. Every error of sockets, TLS
# and HTTP becomes a ProxyError in `_as_proxy_errors`, and nowhere else.
#
# A connection:  none -> open -> sent -> head -> body -> idle -> sent …
#                [_open, _exchange, read, release]; anything unexpected -> closed
#
# Only one thing is ever repeated: a request on a reused connection that yields no byte
# of an answer (Dify closes idle connections after 2 s, so that race is common).

# Dify's default server has ten connections in all, idle ones included.
IDLE_CONNECTION_S = 15.0
MAX_IDLE_CONNECTIONS = 64
GRACE_S = 1.0  # for message_end after a chatflow's workflow_finished
CALL_TIMEOUT_S = 30.0  # for the head of a small call's answer
UPLOAD_TIMEOUT_S = 120.0
MAX_INTERIM_RESPONSES = 10  # 1xx before the final response
STOP_DRAIN_S = 10.0  # reading on after a stop, so that Dify stores what it has
MAX_ERROR_BYTES = 256 * 1024
MAX_JSON_BYTES = 16 * 1024 * 1024
LINGER_S = 2.0  # for the end of a body after its last event
FORM_FRESH_S = 300.0  # what an app said of itself is asked again after this time


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[..., Awaitable[Streams]]


class Origin(NamedTuple):
    """Where connections lead."""

    scheme: str
    host: str
    port: int


def origin_of(url: str) -> Origin:
    """The origin of an http(s) URL."""
    parts = urllib.parse.urlsplit(url)
    default = 443 if parts.scheme == "https" else 80
    return Origin(parts.scheme, parts.hostname or "", parts.port or default)


@contextlib.contextmanager
def _as_proxy_errors(origin: Origin) -> Iterator[None]:
    """Turn what sockets, TLS and HTTP raise into errors that say what to do."""
    where = f"{origin.scheme}://{origin.host}:{origin.port}"
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise ConfigurationFault(
            f"The certificate of {where} is not trusted ({error.verify_message}). If "
            "it is of a private authority, name that authority's file in SSL_CERT_FILE."
        ) from error
    except ssl.SSLError as error:
        raise UpstreamFailed(
            f"TLS with {where} failed ({error.reason or error}); check the scheme and "
            "the port of DIFY_API_BASE."
        ) from error
    except socket.gaierror as error:
        raise UpstreamFailed(
            f"The host name {origin.host!r} can't be resolved; check DIFY_API_BASE."
        ) from error
    except asyncio.TimeoutError as error:
        raise UpstreamTimeout(
            f"{where} does not accept connections in time."
        ) from error
    except (OSError, ConnectionBroken) as error:
        raise UpstreamFailed(f"No connection with {where}: {error}.") from error
    except (h11.RemoteProtocolError, MalformedHTTP, HeadTooLarge) as error:
        raise UpstreamFailed(f"{where} does not speak proper HTTP: {error}") from error


class UpstreamResponse:
    """A response of Dify's: read its body to the end, or `close` it."""

    def __init__(
        self, pool: Pool, origin: Origin, wire: Wire, head: h11.Response
    ) -> None:
        self.status = head.status_code
        with _as_proxy_errors(origin):
            self.headers = read_fields(head.headers)
        self._pool = pool
        self._origin = origin
        self._wire = wire
        has_body = self.status not in (204, 304)
        self._body = (
            body_decoder(self.headers, until_end=True) if has_body else BodyDecoder(0)
        )
        close = "close" in self.headers.get("connection", "").lower()
        self._can_reuse = head.http_version == b"1.1" and not close
        self._is_released = False

    @property
    def is_event_stream(self) -> bool:
        """Whether the body is SSE."""
        return self.headers.get("content-type", "").startswith("text/event-stream")

    def allow(self, seconds: float, error: Callable[[], Exception]) -> None:
        """What is read from now on may take `seconds`; then `error()` is raised."""
        self._wire.allow(seconds, error)

    async def read(self) -> bytes:
        """The next bytes of the body; b"" at its end."""
        with _as_proxy_errors(self._origin):
            data = await self._wire.read_body(self._body)
        if self._body.is_complete:
            self._release()
        return data

    async def read_all(self, limit: int) -> bytes:
        """The whole body."""
        pieces, size = [], 0
        try:
            while data := await self.read():
                pieces.append(data)
                size += len(data)
                if size > limit:
                    raise UpstreamFailed(f"Dify's answer is over {limit >> 10} KiB.")
        finally:
            self.close()
        return b"".join(pieces)

    def close(self) -> None:
        """Give up what is unread; may be called twice, and after the end."""
        if not self._is_released:
            self._is_released = True
            self._wire.abort()

    def close_soon(self) -> None:
        """Read what little is left first, so that the connection can be kept."""
        if not self._is_released:
            self._pool.run_beside(self._linger())

    async def _linger(self) -> None:
        try:
            self.allow(LINGER_S, _Silence)
            await self.read_all(MAX_ERROR_BYTES)
        except (ProxyError, _Silence):
            pass  # it was not worth the wait

    def _release(self) -> None:
        """The body is complete: hand the connection back."""
        if self._is_released:
            return
        self._is_released = True
        if self._can_reuse and not self._wire.is_stale:
            self._pool.give_back(self._origin, self._wire)
        else:
            self._wire.close()


class Pool:
    """Keeps connections to Dify for the next request.

    Args:
        connect: opens streams as `asyncio.open_connection` does.
        connect_timeout_s: for name look-up, TCP and TLS together.
    """

    def __init__(self, connect: Connect, connect_timeout_s: float) -> None:
        self._connect = connect
        self._connect_timeout_s = connect_timeout_s
        self._idle: dict[Origin, deque[tuple[float, Wire]]] = {}
        self._tls: ssl.SSLContext | None = None
        self._reaper: asyncio.TimerHandle | None = None
        self._beside: set[asyncio.Task[None]] = set()

    def run_beside(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run something that nobody waits for; `close` cancels it."""
        task = asyncio.ensure_future(coroutine)
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    async def request(
        self, origin: Origin, head: h11.Request, body: bytes, timeout_s: float
    ) -> UpstreamResponse:
        """Send a request and read the head of its response.

        Raises:
            UpstreamFailed, UpstreamTimeout, ConfigurationFault.
        """
        wire = self._take_idle(origin)
        if wire:
            try:
                return await self._exchange(origin, wire, head, body, timeout_s)
            except _NoAnswer:
                pass
        with _as_proxy_errors(origin):
            wire = await self._open(origin)
        try:
            return await self._exchange(origin, wire, head, body, timeout_s)
        except _NoAnswer as error:
            raise UpstreamFailed(
                "Dify closed the connection without an answer."
            ) from error

    def give_back(self, origin: Origin, wire: Wire) -> None:
        """Keep a connection whose last response was read to its end."""
        loop = asyncio.get_running_loop()
        wire.allow_any_time()
        idle = self._idle.setdefault(origin, deque())
        idle.append((loop.time(), wire))
        if len(idle) > MAX_IDLE_CONNECTIONS:
            idle.popleft()[1].close()
        if not self._reaper:
            self._reaper = loop.call_later(IDLE_CONNECTION_S, self._reap)

    def close(self) -> None:
        """Close all idle connections."""
        for task in self._beside:
            task.cancel()
        if self._reaper:
            self._reaper.cancel()
            self._reaper = None
        for idle in self._idle.values():
            for _, wire in idle:
                wire.close()
        self._idle.clear()

    def _reap(self) -> None:
        """Close what was idle for too long, or was closed by Dify."""
        self._reaper = None
        now = asyncio.get_running_loop().time()
        for origin, idle in list(self._idle.items()):
            kept: deque[tuple[float, Wire]] = deque()
            for since, wire in idle:
                if wire.is_stale or now - since >= IDLE_CONNECTION_S:
                    wire.close()
                else:
                    kept.append((since, wire))
            self._idle[origin] = kept
            if not kept:
                del self._idle[origin]
        if self._idle:
            loop = asyncio.get_running_loop()
            self._reaper = loop.call_later(IDLE_CONNECTION_S / 4, self._reap)

    def _take_idle(self, origin: Origin) -> Wire | None:
        idle = self._idle.get(origin)
        while idle:
            _, wire = idle.pop()  # the newest: it lives most likely
            if not wire.is_stale:
                return wire
            wire.close()
        return None

    async def _open(self, origin: Origin) -> Wire:
        options: dict[str, Any] = {"limit": READ_BUFFER_BYTES}
        if origin.scheme == "https":
            self._tls = self._tls or ssl.create_default_context()
            options.update(ssl=self._tls, server_hostname=origin.host)
        opening = self._connect(origin.host, origin.port, **options)
        reader, writer = await asyncio.wait_for(opening, self._connect_timeout_s)
        return Wire(reader, writer)

    async def _exchange(
        self,
        origin: Origin,
        wire: Wire,
        head: h11.Request,
        body: bytes,
        timeout_s: float,
    ) -> UpstreamResponse:
        """Write a request, read the head of its response; _NoAnswer if none comes."""
        connection = h11.Connection(h11.CLIENT, MAX_HEAD_BYTES * 2)
        try:
            with _as_proxy_errors(origin):
                wire.allow(timeout_s, lambda: UpstreamTimeout("Dify does not answer."))
                wire.write((connection.send(head) or b"") + body)
                answer = await _read_response_head(wire, connection)
                return UpstreamResponse(self, origin, wire, answer)
        except BaseException:
            wire.abort()
            raise


class _NoAnswer(Exception):
    """The connection was closed before a byte of an answer."""


async def _read_response_head(wire: Wire, connection: h11.Connection) -> h11.Response:
    """The head of the final response; interim ones (1xx) are passed over."""
    try:
        has_answer = await wire.wait_for_data()
    except ConnectionBroken:
        has_answer = False
    if not has_answer:
        raise _NoAnswer
    for _ in range(MAX_INTERIM_RESPONSES):
        connection.receive_data(await wire.read_head())
        event = connection.next_event()
        if isinstance(event, h11.Response):
            return event
        if not isinstance(event, h11.InformationalResponse):
            break
    raise MalformedHTTP("no response came")


class TurnStream:
    """One turn's answer, as it comes: `read` until [], then or before `close`.

    `answer` knows the ids of the turn, and whether it is finished.
    """

    def __init__(
        self,
        response: UpstreamResponse,
        answer: AnswerReader,
        idle_timeout_s: float,
        find_stored: Callable[[AnswerReader], Awaitable[str]],
    ) -> None:
        self.answer = answer
        self._response = response
        self._idle_timeout_s = idle_timeout_s
        self._find_stored = find_stored
        self._decoder = SSEDecoder()
        self._has_event = False

    async def read(self) -> list[Part]:
        """The next parts; [] after the last. A failure is a part, not an exception."""
        while not self.answer.is_finished:
            try:
                data = await self._response.read()
                events = self._decoder.feed(data)
            except _Silence:
                return self.answer.end()
            except SSEOverflow as error:
                return self.answer.fail(UpstreamFailed(f"Dify sent {error}."))
            except ProxyError as error:
                return await self._recover(error)
            if not data:
                return await self._recover(UpstreamFailed(BROKEN_OFF, retry=False))
            parts = self._translate(events)
            if parts:
                return parts
        return []

    async def _recover(self, error: ProxyError) -> list[Part]:
        """The stream broke: the rest of the answer, if Dify has stored it."""
        answer, parts = self.answer, list[Part]()
        if answer.is_closing:
            return answer.end()
        if answer.can_recover and not isinstance(error, UpstreamTimeout):
            parts = answer.recover(await self._find_stored(answer))
        return parts or answer.fail(error)

    def _translate(self, events: Sequence[ServerSentEvent]) -> list[Part]:
        parts: list[Part] = []
        is_alive = False
        for event in events:
            if event.data and event.data != "ping":
                is_alive = True
                parts += self.answer.read(event)
        if self.answer.is_closing:
            self._response.allow(GRACE_S, _Silence)
        elif is_alive:
            self._response.allow(self._idle_timeout_s, _too_silent)
        return parts

    def close(self) -> None:
        """Let the connection go; the end of an answer is waited for beside."""
        if self.answer.is_finished:
            self._response.close_soon()
        else:
            self._response.close()

    async def drain(self) -> bool:
        """Read on until Dify has ended the answer; whether more text came."""
        self._response.allow(STOP_DRAIN_S, _Silence)
        self._idle_timeout_s = STOP_DRAIN_S
        has_text = False
        while parts := await self.read():
            has_text = has_text or any(isinstance(part, Text) for part in parts)
        return has_text


class _Silence(Exception):
    """Nothing came for so long that nothing will."""


def _too_silent() -> ProxyError:
    return UpstreamTimeout(
        "Dify sent nothing but heartbeats for too long (DIFY_IDLE_TIMEOUT).",
        retry=False,
    )


def _too_late() -> ProxyError:
    return UpstreamTimeout(
        "Dify accepted the request, but its run did not begin in time "
        "(DIFY_FIRST_EVENT_TIMEOUT)."
    )


@dataclass
class AppFacts:
    """What Dify told about one app; None: not asked yet, or too long ago."""

    mode: str = ""
    name: str = ""
    form: AppForm | None = None
    asked_at: float = -math.inf


def parse_json(content: bytes) -> dict[str, Any]:
    """A JSON object of Dify's; {} for anything else."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


class Dify:
    """The client of Dify's API, for all apps and bases at once."""

    def __init__(self, settings: Settings, connect: Connect) -> None:
        self._settings = settings
        self._pool = Pool(connect, settings.dify_connect_timeout)
        self._facts: dict[tuple[str, str], AppFacts] = {}

    # Facts about apps...

    def known_name(self, app: AppSettings) -> str:
        """The app's name, "" if nobody has asked yet."""
        return self._facts_of(app).name

    async def name_of(self, app: AppSettings) -> str:
        """The app's name in Dify; kept."""
        facts = self._facts_of(app)
        if not facts.name:
            await self._ask_info(app)
        return facts.name

    async def mode_of(self, app: AppSettings) -> str:
        """The app's mode: as configured, as `/info` tells, or as a probe shows."""
        facts = self._facts_of(app)
        if not facts.mode:
            facts.mode = app.mode or await self._ask_info(app) or await self._probe(app)
        return facts.mode

    async def correct_mode(self, app: AppSettings) -> str:
        """The mode, asked anew: Dify says that the known one is wrong."""
        facts = self._facts_of(app)
        facts.mode = await self._ask_info(app) or await self._probe(app)
        return facts.mode

    async def form_of(self, app: AppSettings, *, anew: bool = False) -> AppForm:
        """The app's inputs and limits; kept for some minutes."""
        facts = self._facts_of(app)
        now = asyncio.get_running_loop().time()
        if facts.form is None or anew or now - facts.asked_at > FORM_FRESH_S:
            facts.form = parse_form(await self.call(app, "GET", "/parameters"))
            facts.asked_at = now
        return facts.form

    def _facts_of(self, app: AppSettings) -> AppFacts:
        return self._facts.setdefault((app.base, app.key), AppFacts())

    async def _ask_info(self, app: AppSettings) -> str:
        info = await self.call(app, "GET", "/info")
        self._facts_of(app).name = str(info.get("name") or "")
        mode = info.get("mode")
        return mode if mode in APP_MODES else ""

    async def _probe(self, app: AppSettings) -> str:
        """Calls that run no model; their refusals tell the mode."""
        codes = []
        task = str(uuid.UUID(int=0))
        for method, path, value in (
            ("GET", "/conversations?user=opendify&limit=1", None),
            ("POST", f"/completion-messages/{task}/stop", {"user": "opendify"}),
        ):
            try:
                await self.call(app, method, path, value)
                codes.append("")
            except UpstreamRejected as refusal:
                codes.append(refusal.code or "")
        return mode_from_probe(codes[0], codes[1])

    # Calls...

    async def call(
        self, app: AppSettings, method: str, path: str, value: Any = None
    ) -> dict[str, Any]:
        """A call whose answer is a JSON object; raises the ProxyError of an error."""
        body = b"" if value is None else json_bytes(value)
        response = await self._request(app, method, path, body, CALL_TIMEOUT_S)
        content = await response.read_all(MAX_JSON_BYTES)
        if response.status >= 300:
            raise self._error(response, content, app)
        answer = parse_json(content) if content else {}
        if not answer and content.lstrip()[:1] not in (b"{", b""):
            raise error_from_body(response.status, content)
        return answer

    async def upload(self, app: AppSettings, file: Attachment, user: str) -> str:
        """Upload a file; returns its id in Dify."""
        content_type, body = encode_upload(file, user)
        response = await self._request(
            app, "POST", "/files/upload", body, UPLOAD_TIMEOUT_S, content_type
        )
        content = await response.read_all(MAX_ERROR_BYTES)
        if response.status not in (200, 201):
            error = self._error(response, content, app)
            error.message = f"The upload of {file.name!r} failed: {error.message}"
            raise error
        id_ = parse_json(content).get("id")
        if not id_:
            raise UpstreamFailed(f"Dify gave no id for the file {file.name!r}.")
        return str(id_)

    async def stored_answer(
        self, app: AppSettings, answer: AnswerReader, user: str
    ) -> str:
        """The answer to a message as Dify stored it, "" if it did not."""
        query = urllib.parse.urlencode(
            {"conversation_id": answer.conversation_id, "user": user, "limit": 5}
        )
        try:
            page = await self.call(app, "GET", f"/messages?{query}")
        except ProxyError:
            return ""
        rows = page.get("data")
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, dict) and row.get("id") == answer.message_id:
                return str(row.get("answer") or "")
        return ""

    async def open_turn(
        self, app: AppSettings, mode: str, request: DifyRequest
    ) -> TurnStream:
        """Send a turn; its answer's stream has begun when this returns.

        Raises:
            ProxyError: Dify refused it, or can't be reached.
        """
        settings = self._settings
        timeout_s = settings.dify_first_event_timeout
        body = json_bytes(request.body)
        response = await self._request(app, "POST", request.path, body, timeout_s)
        if response.status != 200 or not response.is_event_stream:
            content = await response.read_all(MAX_ERROR_BYTES)
            raise self._error(response, content, app)
        response.allow(timeout_s, _too_late)
        answer = AnswerReader(
            mode,
            app.base,
            output_variable=app.output_variable,
            show_process=settings.show_process,
        )
        user = str(request.body["user"])

        async def find_stored(answer: AnswerReader) -> str:
            return await self.stored_answer(app, answer, user)

        return TurnStream(response, answer, settings.dify_idle_timeout, find_stored)

    async def stop(self, app: AppSettings, mode: str, task_id: str, user: str) -> None:
        """Ask Dify to stop a run, as well as it can."""
        try:
            await self.call(app, "POST", stop_path(mode, task_id), {"user": user})
        except ProxyError as error:
            log.warning("stop of task %s failed: %s", task_id, error.message)

    def close(self) -> None:
        """Close the connections that are kept."""
        self._pool.close()

    async def _request(
        self,
        app: AppSettings,
        method: str,
        path: str,
        body: bytes,
        timeout_s: float,
        content_type: str = "application/json",
    ) -> UpstreamResponse:
        origin = origin_of(app.base)
        base_path = urllib.parse.urlsplit(app.base).path.rstrip("/")
        host = f"[{origin.host}]" if ":" in origin.host else origin.host
        headers = [
            ("Host", f"{host}:{origin.port}"),
            ("Authorization", f"Bearer {app.key}"),
            ("User-Agent", f"OpenDify/{__version__}"),
            ("Accept-Encoding", "identity"),
        ]
        if body:
            headers.append(("Content-Type", content_type))
            headers.append(("Content-Length", str(len(body))))
        head = h11.Request(method=method, target=base_path + path, headers=headers)
        return await self._pool.request(origin, head, body, timeout_s)

    def _error(
        self, response: UpstreamResponse, content: bytes, app: AppSettings
    ) -> ProxyError:
        if 300 <= response.status < 400:
            return ConfigurationFault(
                f"Dify redirects ({response.status}) to "
                f"{response.headers.get('location', 'nowhere')!r}; set DIFY_API_BASE "
                "to where the API really is."
            )
        error = error_from_body(response.status, content)
        error.message = error.message.replace(app.key, mask_key(app.key))
        return error


# ==============================================================================
# 11. Handlers
# ==============================================================================
#
# The routes, one coroutine each: a request in, a reply out. Finds the app, checks the
# key, runs a turn and drives the pacer. Catches nothing that the error boundary of
# room 12 can answer. Never touches sockets and h11.
#
# One turn:  parse -> plan -> open -> (read -> put -> drain)* -> settle
#            the client leaves -> stop, read on, then settle or forget

MAX_TRIES = 4  # of one turn: a lost conversation and a wrong mode, each corrected
HEAD_AFTER_S = 5.0  # the status line waits for Dify's first event, this long at most
KEEP_ALIVE_S = 15.0  # nginx closes after 60 s of silence, Node's fetch after 300 s
NAMES_TIMEOUT_S = 5.0  # Open WebUI gives the model list 10 s
_SSE_HEADERS = [
    ("Content-Type", "text/event-stream; charset=utf-8"),
    ("Cache-Control", "no-cache"),
    ("X-Accel-Buffering", "no"),
]
_PREFIX = re.compile(r"(?:(?:v1|api|openai)(?:/|\Z))+")
_DEPLOYMENT = re.compile(r"(?:deployments|engines)/([^/]+)/(.+)\Z")


@dataclass
class Exchange:
    """One request and its reply, and what the log will say of them.

    `fail` writes an error as the end of a reply that has begun; `on_leave` is called
    when the client leaves before the reply is complete.
    """

    reply: Reply
    id: str
    peer: str = ""
    request: Request = NO_REQUEST
    decoder: BodyDecoder | None = None  # of the request's body
    body: bytes = b""
    started_at: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    fail: Callable[[ProxyError], bytes] | None = None
    on_leave: Callable[[], Any] | None = None
    has_left: bool = False
    name_in_path: str = ""
    model: str = ""
    first_text_at: float = 0.0
    text_chars: int = 0

    def leave(self) -> None:
        """The client has gone; what serves it is interrupted if it wants to be."""
        self.has_left = True
        if self.on_leave:
            self.on_leave()


def find_endpoint(path: str) -> tuple[str, str]:
    """(endpoint, name in the path) of a request's path.

    Clients are given base URLs with no `/v1`, with one or two, with `//`, with a
    reverse proxy's prefix, with the endpoint itself, or Azure's and the engines' forms
    that name the model. So the tail decides.

        /v1//chat/completions                          ("chat/completions", "")
        /openai/deployments/m/chat/completions         ("chat/completions", "m")
        /v1/models/team%2Fapp                          ("models/", "team%2Fapp")
    """
    tail = re.sub(r"/{2,}", "/", path).strip("/")
    tail = tail[_prefix_length(tail) :]
    name = ""
    deployment = _DEPLOYMENT.match(tail)
    if deployment:
        name, tail = deployment[1], deployment[2]
        tail = tail[_prefix_length(tail) :]
    if tail.startswith("models/"):
        return "models/", tail[len("models/") :]
    return re.sub(r"\A(.+?)(?:/\1)+\Z", r"\1", tail), name


def _prefix_length(tail: str) -> int:
    prefix = _PREFIX.match(tail)
    return prefix.end() if prefix else 0


def client_key(headers: Mapping[str, str]) -> str:
    """The key that a client presents, in any of the usual places; "" if none."""
    scheme, _, token = headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return (headers.get("api-key") or headers.get("x-api-key") or "").strip()


class Outlet:
    """A streamed answer on its way to the client: parts in, even text out.

    `put` never waits: text that is not due yet is written by a timer, so reading from
    Dify never waits for the pacer.
    """

    def __init__(
        self, exchange: Exchange, stream: ChatStream, pacer: Pacer | None
    ) -> None:
        self._exchange = exchange
        self._reply = exchange.reply
        self._stream = stream
        self._pacer = pacer
        self._paced: type[Text] | type[Reasoning] = Text  # what the pacer holds
        self._sent: list[str] = []
        self._end = b""
        self._loop = asyncio.get_running_loop()
        self._due: asyncio.TimerHandle | None = None
        self._drained: asyncio.Future[None] | None = None
        self._written_at = self._loop.time()
        self._beat = self._loop.call_later(HEAD_AFTER_S, self._on_beat)

    @property
    def text(self) -> str:
        """The answer's text as the client has it so far."""
        return "".join(self._sent)

    @property
    def is_behind(self) -> bool:
        """Whether text is held that the client has not seen."""
        return self._pacer is not None and self._pacer.held > 0

    def begin(self, ids: Mapping[str, str]) -> None:
        """Send the head and the first chunk, unless they are sent."""
        if not self._reply.status:
            self._exchange.fail = self._stream.fail
            self._reply.start(200, [*_SSE_HEADERS, *id_headers(ids)])
            self._write(self._stream.begin({"dify": dict(ids)} if ids else {}))

    def put(self, parts: Sequence[Part]) -> None:
        """Take parts in and write what is due; raises the error of a Failure."""
        now = self._loop.time()
        out: list[bytes] = []
        for part in parts:
            if isinstance(part, Failure):
                self._write(b"".join([*out, self._flush()]))
                raise part.error
            out.append(self._put(part, now))
        if self._pacer:
            out.append(self._encode(self._pacer.take(now)))
            self._arm()
        self._write(b"".join(out))

    async def finish(self) -> None:
        """Let go what the pacer holds, evenly, and end the reply."""
        if self._pacer:
            self._pacer.close(self._loop.time())
            self._on_due()
            if self._due:
                self._drained = self._loop.create_future()
                await self._drained
        self.close()
        self._reply.end(self._end)

    def close(self) -> None:
        """Stop the timers; nothing is written any more."""
        self._beat.cancel()
        if self._due:
            self._due.cancel()
            self._due = None

    def _put(self, part: Part, now: float) -> bytes:
        """What a part adds to the stream at once."""
        if isinstance(part, Media):
            part = Text(media_text(part, is_first=not self._sent))
        elif isinstance(part, Recast):  # the text is out: show at least where it ends
            part = Text("</think>\n\n")
        elif isinstance(part, Replace):
            part = Text(self._unsent(part.text))
        if isinstance(part, (Text, Reasoning)):
            kind = type(part)
            if not self._pacer:
                return self._encode(part.text, kind)
            flushed = self._flush() if kind is not self._paced else b""
            self._paced = kind
            self._pacer.push(part.text, now)
            return flushed
        if isinstance(part, Finish):
            self._end = self._stream.encode(part)
            return b""
        return self._stream.encode(part)

    def _unsent(self, text: str) -> str:
        """What is to be sent when `text` replaces the answer; drops what is held."""
        if self._pacer and self._paced is Text:
            self._pacer.flush()
        sent = self.text
        if text.startswith(sent):
            return text[len(sent) :]
        log.warning(
            "the app replaced text that was sent already [%s]", self._exchange.id
        )
        return ""

    def _encode(
        self, text: str, kind: type[Text] | type[Reasoning] | None = None
    ) -> bytes:
        if not text:
            return b""
        kind = kind or self._paced
        if kind is Text:
            self._sent.append(text)
            self._exchange.text_chars += len(text)
        self._exchange.first_text_at = self._exchange.first_text_at or self._loop.time()
        return self._stream.encode(kind(text))

    def _flush(self) -> bytes:
        return self._encode(self._pacer.flush()) if self._pacer else b""

    def _write(self, data: bytes) -> None:
        if data:
            self._written_at = self._loop.time()
            self._reply.write(data)

    # Timers...

    def _arm(self) -> None:
        """Be woken when text is due; a timer that comes earlier will do."""
        due = self._pacer.next_due() if self._pacer else None
        if due is None or (self._due and self._due.when() <= due):
            return
        if self._due:
            self._due.cancel()
        self._due = self._loop.call_at(due, self._on_due)

    def _on_due(self) -> None:
        self._due = None
        if self._pacer:
            self._write(self._encode(self._pacer.take(self._loop.time())))
        self._arm()
        if not self._due and self._drained and not self._drained.done():
            self._drained.set_result(None)

    def _on_beat(self) -> None:
        """Dify is silent: begin without it, then keep the connection alive."""
        if not self._reply.status:
            self.begin({})
        elif self._loop.time() - self._written_at >= KEEP_ALIVE_S:
            self._write(encode_comment("keep-alive"))
        next_at = self._written_at + KEEP_ALIVE_S
        self._beat = self._loop.call_at(next_at, self._on_beat)


class Collector:
    """A whole answer, with the same methods as an Outlet."""

    def __init__(self, exchange: Exchange, envelope: Envelope) -> None:
        self._exchange = exchange
        self._envelope = envelope
        self._answer = Answer()
        self._ids: Mapping[str, str] = {}

    is_behind = False  # it holds nothing back

    @property
    def text(self) -> str:
        """The answer's text so far."""
        return self._answer.text

    def begin(self, ids: Mapping[str, str]) -> None:
        """Dify has accepted."""
        self._ids = ids

    def put(self, parts: Sequence[Part]) -> None:
        """Take parts in; raises the error of a Failure."""
        for part in parts:
            if isinstance(part, Media):
                link = media_text(part, is_first=not self._answer.text)
                self._answer.add(Text(link))
            else:
                self._answer.add(part)
        if not self._exchange.first_text_at and self._answer.text:
            self._exchange.first_text_at = asyncio.get_running_loop().time()

    async def finish(self) -> None:
        """Send the answer."""
        ids = self._ids
        self._exchange.text_chars = len(self._answer.text)
        extra = {"dify": dict(ids)} if ids else {}
        value = chat_completion(self._envelope, self._answer, extra)
        self._exchange.reply.send(json_response(value, id_headers(ids)))

    def close(self) -> None:
        """Nothing to stop."""


def id_headers(ids: Mapping[str, str]) -> list[tuple[str, str]]:
    """Dify's ids as response headers."""
    return [
        (f"X-Dify-{name.title().replace('_', '-')}", urllib.parse.quote(id_, safe=""))
        for name, id_ in ids.items()
    ]


def json_response(
    value: Any, headers: Sequence[tuple[str, str]] = (), status: int = 200
) -> Response:
    """A response of JSON."""
    fields = [("Content-Type", "application/json"), *headers]
    return Response(status, json_bytes(value), fields)


class Handlers:
    """Answers the requests; see ROUTES.

    Args:
        settings: the configuration.
        dify: the client of Dify.
        conversations: what is known of them.
        new_id: makes a fresh id for an answer, without its prefix.
        wall_clock: seconds since the epoch.
    """

    def __init__(
        self,
        settings: Settings,
        dify: Dify,
        conversations: Conversations,
        new_id: Callable[[], str],
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._dify = dify
        self._conversations = conversations
        self._new_id = new_id
        self._wall_clock = wall_clock
        self._created = int(wall_clock())

    def find(self, exchange: Exchange) -> Handler:
        """The handler of a request.

        Raises:
            NotFound, MethodNotAllowed, Unauthorized.
        """
        request = exchange.request
        endpoint, exchange.name_in_path = find_endpoint(request.path)
        methods = ROUTES.get(endpoint)
        if methods is None:
            raise NotFound(f"Invalid URL ({request.method} {request.path}).")
        method = "GET" if request.method == "HEAD" else request.method
        if method not in methods:
            allowed = ", ".join(methods)
            raise MethodNotAllowed(
                f"{request.method} is not possible here, but {allowed}.",
                headers=[("Allow", allowed)],
            )
        if endpoint not in OPEN_ENDPOINTS:
            self._check_key(client_key(request.headers))
        return functools.partial(methods[method], self)

    def _check_key(self, key: str) -> None:
        """Compare with all keys, so that the time tells nothing."""
        valid = self._settings.valid_api_keys
        matches = [hmac.compare_digest(key.encode(), known.encode()) for known in valid]
        if valid and not key:
            raise Unauthorized(
                "No API key. Send one as `Authorization: Bearer KEY`.", code=None
            )
        if valid and not any(matches):
            raise Unauthorized(
                "Incorrect API key provided. It must be one of this server's "
                "VALID_API_KEYS."
            )

    # Models...

    async def list_models(self, exchange: Exchange) -> None:
        """`GET /models`."""
        models = await self._models()
        rows = [(name, self._dify.known_name(app)) for name, app in models.items()]
        exchange.reply.send(json_response(models_list(rows, self._created)))

    async def get_model(self, exchange: Exchange) -> None:
        """`GET /models/{id}`, in each of the encodings that clients use."""
        raw = exchange.name_in_path
        models = await self._models()
        for name in (urllib.parse.unquote(raw), urllib.parse.unquote_plus(raw)):
            if name in models:
                app_name = self._dify.known_name(models[name])
                value = model_object(name, app_name, self._created)
                exchange.reply.send(json_response(value))
                return
        raise _no_such_model(urllib.parse.unquote(raw), models)

    async def health(self, exchange: Exchange) -> None:
        """`GET /health`: the process is alive."""
        value = {"status": "ok", "version": __version__}
        exchange.reply.send(json_response(value))

    async def _app(self, model: str) -> AppSettings:
        models = self._settings.model_config
        if model not in models:
            models = await self._models()
        if model not in models:
            raise _no_such_model(model, models)
        return models[model]

    async def _models(self) -> Mapping[str, AppSettings]:
        """All apps by model name; those of DIFY_API_KEYS by their names in Dify."""
        models = dict(self._settings.model_config)
        apps = [
            AppSettings(key, self._settings.dify_api_base)
            for key in self._settings.dify_api_keys
        ]
        unnamed = [app for app in apps if not self._dify.known_name(app)]
        if unnamed:
            asking = [asyncio.ensure_future(self._dify.name_of(app)) for app in unnamed]
            _, late = await asyncio.wait(asking, timeout=NAMES_TIMEOUT_S)
            for task in late:
                task.cancel()
            for task in asking:
                if not task.cancelled() and task.done() and task.exception():
                    log.warning("an app of DIFY_API_KEYS: %s", task.exception())
        for app in apps:
            digest = hashlib.sha256(app.key.encode()).hexdigest()
            name = self._dify.known_name(app) or f"app-{digest[:8]}"
            if name in models:
                name = f"{name} ({digest[:4]})"
            models[name] = app
        return models

    # Chat...

    async def chat_completions(self, exchange: Exchange) -> None:
        """`POST /chat/completions`."""
        body = parse_json_object(exchange.body)
        exchange.body = b""
        if exchange.name_in_path:
            body["model"] = urllib.parse.unquote(exchange.name_in_path)
        chat = parse_chat_request(body)
        exchange.model = chat.ask.model
        app = await self._app(chat.ask.model)
        envelope = Envelope(
            f"chatcmpl-{self._new_id()}", int(self._wall_clock()), chat.ask.model
        )
        sink: Outlet | Collector
        if chat.stream:
            stream = ChatStream(envelope, include_usage=chat.include_usage)
            sink = Outlet(exchange, stream, self._pacer(exchange, app))
        else:
            sink = Collector(exchange, envelope)
        try:
            await self._run_turn(exchange, app, chat.ask, sink)
        finally:
            sink.close()

    def _pacer(self, exchange: Exchange, app: AppSettings) -> Pacer | None:
        """The delay buffer, unless the operator or the request switched it off."""
        asked = exchange.request.headers.get("x-opendify-smoothing", "").lower()
        is_on = (
            app.smoothing
            if app.smoothing is not None
            else self._settings.stream_smoothing
        )
        if asked in ("on", "off"):
            is_on = asked == "on"
        return Pacer(self._settings.stream_max_lag) if is_on else None

    # Turns...

    async def _run_turn(
        self, exchange: Exchange, app: AppSettings, ask: Ask, sink: Outlet | Collector
    ) -> None:
        """One turn from the question to the end of the answer."""
        turn = await self._open_turn(exchange, app, ask)
        task = cast("asyncio.Task[None]", asyncio.current_task())
        is_stored = False
        try:
            exchange.on_leave = task.cancel
            if exchange.has_left:
                raise ConnectionBroken("the client left before the answer began")
            parts = turn.first_parts
            while parts:
                sink.begin(turn.ids)
                sink.put(parts)
                await exchange.reply.drain()
                parts = await turn.stream.read()
            await sink.finish()
            is_stored = turn.stream.answer.is_as_sent
        except (asyncio.CancelledError, ConnectionBroken):
            exchange.on_leave = None
            is_stored = await self._stop(turn) and not sink.is_behind
            raise
        finally:
            exchange.on_leave = None
            turn.stream.close()
            self._settle(turn, sink.text if is_stored else None)

    def _settle(self, turn: Turn, text: str | None) -> None:
        """Record where the conversation stands; without text nobody knows."""
        answer = turn.stream.answer
        if text is None or not answer.conversation_id:
            self._conversations.forget(turn.plan.tail)
        else:
            said = Message("assistant", text)
            tail = turn.plan.finish(answer.conversation_id, said)
            self._conversations.put(tail, self._wall_clock())

    async def _stop(self, turn: Turn) -> bool:
        """The client has left: end the run, and read on so that Dify stores it.

        Returns:
            Whether Dify has ended the answer with not a word more than was read before.
        """
        answer = turn.stream.answer
        if not answer.is_finished and answer.task_id:
            await self._dify.stop(turn.app, turn.mode, answer.task_id, turn.user)
        return not await turn.stream.drain() and answer.is_as_sent

    async def _open_turn(self, exchange: Exchange, app: AppSettings, ask: Ask) -> Turn:
        """Send the question to Dify, until it begins to answer."""
        headers = exchange.request.headers
        forwarded = urllib.parse.unquote(headers.get("x-openwebui-user-id", ""))
        user = end_user(ask.user, forwarded, client_key(headers))
        explicit = ask.conversation_id or headers.get("x-dify-conversation-id", "")
        ask = replace(ask, conversation_id=explicit)
        question = Question(app, ask, user, scope_of(app.key, user), exchange.id)
        try:
            return await self._ask(question)
        except MissingInput as error:
            self._give_back(question.tail)
            form = await self._dify.form_of(app, anew=True)
            message = f"{error.message}. {describe_inputs(form)}"
            raise BadRequest(message, param="inputs") from error
        except (BadRequest, ConfigurationFault):
            self._give_back(question.tail)  # nothing ran
            raise
        except BaseException:
            self._conversations.forget(question.tail)
            raise

    async def _ask(self, question: Question) -> Turn:
        """Ask, and ask again where Dify shows that a conversation or a mode is wrong."""
        mode = await self._dify.mode_of(question.app)
        if mode in CHAT_MODES:
            now = self._wall_clock()
            question.tail = self._conversations.take(question.ask, question.scope, now)
        for _ in range(MAX_TRIES):
            try:
                return await self._try_turn(question, mode)
            except ConversationGone:
                if question.ask.conversation_id or not question.tail:
                    raise
                self._conversations.forget(question.tail)
                question.tail = None
            except WrongMode:
                corrected = await self._dify.correct_mode(question.app)
                if corrected == mode:
                    raise
                mode = corrected
        raise UpstreamFailed("Dify contradicts itself about this app's mode.")

    def _give_back(self, tail: Tail | None) -> None:
        if tail:
            self._conversations.put(tail, self._wall_clock())

    async def _try_turn(self, question: Question, mode: str) -> Turn:
        """One attempt; raises what Dify says before its first word."""
        app = question.app
        plan = plan_turn(
            question.ask,
            question.scope,
            question.tail,
            system_variable=app.system_variable,
            history_variable=app.history_variable,
        )
        request = await self._request_for(question, plan, mode)
        stream = await self._dify.open_turn(app, mode, request)
        try:
            parts = await stream.read()
            if parts and isinstance(parts[0], Failure):
                raise parts[0].error
        except BaseException:
            stream.close()
            raise
        return Turn(app, mode, question.user, plan, stream, parts)

    async def _request_for(
        self, question: Question, plan: Plan, mode: str
    ) -> DifyRequest:
        """The request to Dify, with its files uploaded."""
        app = question.app
        needs_form = plan.files or (mode not in CHAT_MODES and not app.query_variable)
        form = await self._dify.form_of(app) if needs_form else AppForm()
        inputs = {**app.inputs, **plan.inputs}
        common: dict[str, Any] = {"inputs": inputs, "user": question.user}
        common["trace_id"] = question.trace_id
        if plan.files:
            check_files(form, plan.files)
            mappings = [await self._mapping(question, file) for file in plan.files]
            placed = place_files(form, mappings, inputs)
            common["inputs"] = {**inputs, **placed["inputs"]}
            common["files"] = placed["files"]
        variable = ""
        if mode not in CHAT_MODES:
            variable = app.query_variable or query_variable(mode, form)
        conversation_id = plan.tail.conversation_id
        return dify_request(
            mode, plan.query, common, variable=variable, conversation_id=conversation_id
        )

    async def _mapping(self, question: Question, file: Attachment) -> dict[str, str]:
        """How the request names a file; its data is uploaded, once a request."""
        if file.url:
            return file_mapping(file)
        if id(file) not in question.uploads:
            upload_id = await self._dify.upload(question.app, file, question.user)
            question.uploads[id(file)] = upload_id
        return file_mapping(file, question.uploads[id(file)])


@dataclass
class Question:
    """What is asked of an app, and what was done for it so far."""

    app: AppSettings
    ask: Ask
    user: str
    scope: bytes
    trace_id: str
    tail: Tail | None = None
    uploads: dict[int, str] = field(default_factory=dict)  # by the id() of the file


@dataclass
class Turn:
    """A turn that Dify has begun to answer."""

    app: AppSettings
    mode: str
    user: str
    plan: Plan
    stream: TurnStream
    first_parts: list[Part]

    @property
    def ids(self) -> dict[str, str]:
        """Dify's ids, as far as known."""
        answer = self.stream.answer
        ids = {
            "conversation_id": answer.conversation_id,
            "message_id": answer.message_id,
        }
        return {name: id_ for name, id_ in ids.items() if id_}


def _no_such_model(model: str, models: Iterable[str]) -> ProxyError:
    known = ", ".join(models) or "none"
    return ModelNotFound(
        f"The model {model!r} does not exist here. Available: {known}.", param="model"
    )


Handler = Callable[[Exchange], Awaitable[None]]
ROUTES: Mapping[str, Mapping[str, Callable[[Handlers, Exchange], Awaitable[None]]]] = {
    "chat/completions": {"POST": Handlers.chat_completions},
    "models": {"GET": Handlers.list_models},
    "models/": {"GET": Handlers.get_model},
    "health": {"GET": Handlers.health},
}
OPEN_ENDPOINTS = ("health",)


# ==============================================================================
# 12. Server
# ==============================================================================
#
# Accepts connections and runs their requests one after another; the only place that
# turns exceptions into responses. Knows nothing of Dify and OpenAI.
#
# General theory: take the happy path, get back to it, or close. After an error the
# connection is kept only if the request was read to its end and the response written
# to its end; then it is as good as new. Everything else is closed, after a pause in
# which what the client still sends is thrown away: closing at once would reset the
# connection, and the client might never see the response.
#
#     idle -> head -> body -> handler -> idle     [_serve_one]
#     any -> closed                               [EOF, a deadline, an error, drain]

IDLE_TIMEOUT_S = 75.0  # longer than nginx's 60 s, so that nginx closes first
HEAD_TIMEOUT_S = 30.0
BODY_TIMEOUT_S = 60.0  # between two reads
DISCARD_S, DISCARD_BYTES = 2.0, 1024 * 1024  # of a request that was refused
CANCEL_S = 2.0  # for what was cut to stop its runs in Dify
DRAIN_S = 30.0  # Kubernetes kills after 30 s by default
MAX_BODY_BYTES = 64 * 1024 * 1024
_CORS_EXPOSED = "x-request-id, retry-after, retry-after-ms, x-should-retry"


class _Idle(Exception):
    """A kept connection that nobody used."""


class Server:
    """Listens, serves, and drains.

    Args:
        handlers: what answers the requests.
        new_id: makes a fresh request id.
    """

    def __init__(self, handlers: Handlers, new_id: Callable[[], str]) -> None:
        self._handlers = handlers
        self._new_id = new_id
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle: set[Wire] = set()
        self._is_draining = False
        self._servers: list[asyncio.base_events.Server] = []

    async def listen(self, host: str, port: int) -> list[tuple[str, int]]:
        """Begin to accept; returns the real addresses. Raises OSError."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(self._protocol, host, port, backlog=2048)
        self._servers.append(server)
        return [socket_.getsockname()[:2] for socket_ in server.sockets]

    async def drain(self, grace_s: float = DRAIN_S) -> bool:
        """Stop accepting, let running requests end; whether all of them did."""
        self._is_draining = True
        for server in self._servers:
            server.close()
        for wire in list(self._idle):
            wire.close()
        late = await _settled(self._tasks, grace_s)
        for task in late:
            task.cancel()
        await _settled(late, CANCEL_S)
        return not late

    def _protocol(self) -> asyncio.StreamReaderProtocol:
        reader = WatchedReader(limit=READ_BUFFER_BYTES)
        return asyncio.StreamReaderProtocol(reader, self.serve)

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """One connection, from its first byte to its last."""
        task = cast("asyncio.Task[None]", asyncio.current_task())
        self._tasks.add(task)
        wire = Wire(reader, writer)
        try:
            while await self._serve_one(wire) and not self._is_draining:
                pass
        except (_Idle, ConnectionBroken):
            pass
        finally:
            self._tasks.discard(task)
            wire.close()

    async def _serve_one(self, wire: Wire) -> bool:
        """One request and its response; whether another may follow."""
        if not await self._is_called(wire):
            return False
        exchange = Exchange(Reply(wire), self._new_id(), wire.peer)
        wire.allow(HEAD_TIMEOUT_S, _slow_request)
        try:
            connection, exchange.request = parse_request_head(await wire.read_head())
            exchange.reply = Reply(wire, connection, exchange.request)
            decoder = body_decoder(exchange.request.headers, until_end=False)
            exchange.decoder = decoder
            await self._answer(exchange, wire, decoder)
        except ConnectionBroken:
            raise
        except ProxyError as error:
            _refuse(exchange, error)
        except Exception:
            log.exception("a bug, in request %s", exchange.id)
            _refuse(exchange, ProxyError("OpenDify failed; its log says more."))
        finally:
            wire.on_leave(None)
            log_exchange(exchange)
        return await _make_ready(exchange, wire)

    async def _is_called(self, wire: Wire) -> bool:
        """Wait for the next request; False if the client closes."""
        self._idle.add(wire)
        wire.allow(IDLE_TIMEOUT_S, _Idle)
        try:
            return await wire.wait_for_data()
        finally:
            self._idle.discard(wire)

    async def _answer(
        self, exchange: Exchange, wire: Wire, decoder: BodyDecoder
    ) -> None:
        """Find the handler, read the body, and let the handler reply."""
        request, reply = exchange.request, exchange.reply
        reply.must_close = reply.must_close or self._is_draining
        reply.headers += [("x-request-id", exchange.id), *_cors(request)]
        if request.method == "OPTIONS":
            exchange.reply.send(Response(204, b"", _preflight(request)))
            return
        handler = self._handlers.find(exchange)
        if request.expects_continue and not decoder.is_complete:
            wire.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        exchange.body = await _read_whole(wire, decoder, MAX_BODY_BYTES)
        wire.allow_any_time()
        wire.on_leave(exchange.leave)
        await handler(exchange)
        await reply.drain()


def log_exchange(exchange: Exchange) -> None:
    """One line for each request; never a key, never a text."""
    request, reply = exchange.request, exchange.reply
    took_s = asyncio.get_running_loop().time() - exchange.started_at
    fields = [request.method, request.path, reply.status or "-"]
    if exchange.model:
        fields.append(f"model={exchange.model!r}")
    if exchange.first_text_at:
        fields.append(f"first={exchange.first_text_at - exchange.started_at:.3f}s")
    fields.append(f"took={took_s:.3f}s")
    if exchange.text_chars:
        fields.append(f"chars={exchange.text_chars}")
    if exchange.has_left:
        fields.append("client-left")
    log.info("%s id=%s", " ".join(map(str, fields)), exchange.id)


def _slow_request() -> ProxyError:
    return RequestTimeout("The request took too long to arrive.")


def _refuse(exchange: Exchange, error: ProxyError) -> None:
    """The error as a response, or as the end of one that has begun."""
    reply = exchange.reply
    log_level = logging.WARNING if error.status >= 500 else logging.INFO
    log.log(log_level, "%s: %s id=%s", type(error).__name__, error.message, exchange.id)
    if not reply.status:
        body = json_bytes(error_body(error))
        headers = [("Content-Type", "application/json"), *error_headers(error)]
        reply.send(Response(error.status, body, headers))
    elif exchange.fail and not reply.is_complete:
        reply.end(exchange.fail(error))


async def _make_ready(exchange: Exchange, wire: Wire) -> bool:
    """Throw away what is left of the request; whether the connection may go on."""
    reply, body = exchange.reply, exchange.decoder
    is_good = reply.is_complete and not reply.must_close
    if body and body.is_complete:
        return is_good
    wire.allow(DISCARD_S, _Idle)
    size = 0
    while size < DISCARD_BYTES:
        data = await (wire.read_body(body) if body else wire.read())
        size += len(data)
        if not data:
            return is_good
    return False


async def _read_whole(wire: Wire, body: BodyDecoder, limit: int) -> bytes:
    """The request's body in one piece."""
    pieces: list[bytes] = []
    size = 0
    while True:
        wire.allow(BODY_TIMEOUT_S, _slow_request)
        data = await wire.read_body(body)
        if not data:
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.append(data)
        size += len(data)
        if size > limit:
            raise BodyTooLarge(f"The body is over {limit >> 20} MiB.")


def _cors(request: Request) -> list[tuple[str, str]]:
    """Headers that let a web page read the response, errors included."""
    if "origin" not in request.headers:
        return []
    return [
        ("Access-Control-Allow-Origin", "*"),
        ("Access-Control-Expose-Headers", _CORS_EXPOSED),
    ]


def _preflight(request: Request) -> list[tuple[str, str]]:
    asked = request.headers.get("access-control-request-headers", "")
    headers = [
        ("Access-Control-Allow-Methods", "GET, POST, DELETE, OPTIONS"),
        ("Access-Control-Max-Age", "86400"),
    ]
    if re.match(r"[\w, -]+\Z", asked, re.ASCII):
        headers.append(("Access-Control-Allow-Headers", asked))
    if request.headers.get("access-control-request-private-network") == "true":
        headers.append(("Access-Control-Allow-Private-Network", "true"))
    return headers


async def _settled(
    tasks: Iterable[asyncio.Task[None]], seconds: float
) -> set[asyncio.Task[None]]:
    """Wait for tasks; returns those that are still running."""
    tasks = set(tasks)
    if not tasks:
        return set()
    _, running = await asyncio.wait(tasks, timeout=seconds)
    return running


# ==============================================================================
# 13. Command line
# ==============================================================================
#
# Arguments, the env file, logging, signals, the self-check and the demo app. The only
# room that reads the environment and files. Exit status: 0 after a clean stop, 1 if
# something could not be done or was cut short, 2 for bad usage or settings.

_NOTHING_CONFIGURED = """\
No Dify app is configured. Either

  configure one: write a file named .env with these two lines, and start again
      MODEL_CONFIG={"my-model": "app-YOUR-KEY"}
      DIFY_API_BASE=https://api.dify.ai/v1

  or look around first, without Dify:
      python opendify.py --demo"""
_DEMO_MODEL = "demo"
_DEMO_ANSWER = (
    "Hello! This is OpenDify's demo app. It stands where your Dify app will stand and "
    "speaks Dify's own protocol, so what you see has come all the way through the "
    "proxy. My text is sent in bursts, a sentence at a time, with pauses between them. "
    "Yet you see it flow evenly, because OpenDify holds each burst back for a moment "
    "and lets it out as it goes. 流式文字会平稳地出现，而不是一阵一阵地跳出来。 Send "
    "the header `X-OpenDify-Smoothing: off` to see the difference. "
)


def build_parser() -> argparse.ArgumentParser:
    """The arguments; the help ends with the settings."""
    width = max(len(variable) for variable, _, _ in setting_rows())
    lines = [
        f"  {variable:{width}}  {meaning}" + (f" [{default}]" if default else "")
        for variable, default, meaning in setting_rows()
    ]
    parser = argparse.ArgumentParser(
        prog="opendify.py",
        description="Talk to Dify apps through the OpenAI API.",
        epilog="settings, from the environment or .env [default]:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--host", help="address to listen on (SERVER_HOST)")
    add("--port", help="port to listen on (SERVER_PORT)")
    add("--env-file", metavar="FILE", help="read this instead of .env")
    add(
        "--log-level", metavar="LEVEL", help="DEBUG, INFO, WARNING or ERROR (LOG_LEVEL)"
    )
    add("--check", action="store_true", help="check settings and apps, and exit")
    add("--demo", action="store_true", help="serve a built-in app, without any Dify")
    add("--version", action="version", version=f"OpenDify {__version__}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run OpenDify; returns the exit status."""
    options = build_parser().parse_args(argv)
    try:
        settings = _load_settings(options)
    except SettingsError as error:
        for complaint in error.complaints:
            print(f"opendify: {complaint}", file=sys.stderr)
        return 2
    logging.basicConfig(
        stream=sys.stderr,
        level=settings.log_level,
        format="%(asctime)s %(levelname)-7s %(message)s",
    )
    if not (settings.model_config or settings.dify_api_keys or options.demo):
        print(_NOTHING_CONFIGURED, file=sys.stderr)
        return 2
    try:
        if options.check:
            return asyncio.run(_check(settings))
        return asyncio.run(_serve(settings, is_demo=options.demo))
    except KeyboardInterrupt:
        return 1


def _load_settings(options: argparse.Namespace) -> Settings:
    """Settings from the env file, the environment and the arguments; the last win."""
    written = _read_env_file(options.env_file)
    for warning in unknown_variables(written):
        print(f"opendify: warning: {warning}", file=sys.stderr)
    arguments = {
        "SERVER_HOST": options.host,
        "SERVER_PORT": options.port,
        "LOG_LEVEL": options.log_level and options.log_level.upper(),
    }
    given = {name: value for name, value in arguments.items() if value is not None}
    return parse_settings({**written, **os.environ, **given})


def _read_env_file(path: str | None) -> dict[str, str]:
    """The variables of the env file: the one named, or .env here or beside this."""
    if path is not None and not Path(path).is_file():
        raise SettingsError([f"--env-file: there is no file {path}"])
    here = [Path.cwd() / ".env", Path(__file__).resolve().parent / ".env"]
    for candidate in [Path(path)] if path is not None else here:
        if candidate.is_file():
            try:
                values = dotenv_values(candidate, encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise SettingsError([f"{candidate} can't be read: {error}"]) from error
            return {name: value or "" for name, value in values.items()}
    return {}


async def _serve(settings: Settings, *, is_demo: bool) -> int:
    """Serve until a signal; returns the exit status."""
    demo = DemoApp()
    if is_demo:
        app = AppSettings("app-demo", await demo.listen(), "chat")
        models = {**settings.model_config, _DEMO_MODEL: app}
        settings = replace(settings, model_config=models)
    store, ttl_s = settings.conversation_store, settings.conversation_ttl
    conversations, complaint = open_conversations(store, ttl_s)
    if complaint:
        log.warning(complaint)
    dify = Dify(settings, asyncio.open_connection)
    handlers = Handlers(settings, dify, conversations, lambda: uuid.uuid4().hex)
    server = Server(handlers, new_id=lambda: f"req_{uuid.uuid4().hex}")
    try:
        return await _serve_until_signal(settings, server)
    finally:
        dify.close()
        conversations.close()
        await demo.close()


async def _serve_until_signal(settings: Settings, server: Server) -> int:
    stop = asyncio.Event()
    _on_signals(stop)
    host, port = settings.server_host, settings.server_port
    try:
        addresses = await server.listen(host, port)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        print(f"opendify: can't listen on {host}:{port}: {reason}", file=sys.stderr)
        return 1
    _announce(settings, addresses)
    await stop.wait()
    log.info("stopping: open requests have %g s to end", DRAIN_S)
    return 0 if await server.drain() else 1


def _announce(settings: Settings, addresses: Sequence[tuple[str, int]]) -> None:
    for host, port in addresses:
        shown = f"[{host}]" if ":" in host else host
        print(f"OpenDify {__version__} listens on http://{shown}:{port}/v1", flush=True)
    names = ", ".join(settings.model_config) or "named by Dify"
    log.info("models: %s; Dify: %s", names, settings.dify_api_base)
    is_local = all(_is_loopback(host) for host, _ in addresses)
    if not settings.valid_api_keys and not is_local:
        log.warning("anyone who reaches this port can use the apps: set VALID_API_KEYS")


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host == "::1"


def _on_signals(stop: asyncio.Event) -> None:
    """The first signal asks for a clean stop, the second ends at once."""
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, on_signal)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(on_signal))


# The self-check...


async def _check(settings: Settings) -> int:
    """Print the settings and what each app says; 0 if all is well."""
    for row in dataclasses.fields(settings):
        print(f"{row.name.upper():26}{_masked(getattr(settings, row.name))}")
    dify = Dify(settings, asyncio.open_connection)
    apps = dict(settings.model_config)
    for key in settings.dify_api_keys:
        apps[mask_key(key)] = AppSettings(key, settings.dify_api_base)
    results = await asyncio.gather(*(_check_app(dify, app) for app in apps.values()))
    table = [("MODEL", "APP", "MODE", "STATUS", "WHAT TO FIX")]
    table += [(model, *result) for model, result in zip(apps, results)]
    widths = [max(len(line[column]) for line in table) for column in range(4)]
    print()
    for line in table:
        cells = [f"{cell:{width}}" for cell, width in zip(line, widths)]
        print("  ".join([*cells, line[4]]).rstrip())
    dify.close()
    return 0 if all(status == "ok" for _, _, status, _ in results) else 1


async def _check_app(dify: Dify, app: AppSettings) -> tuple[str, str, str, str]:
    """(name, mode, status, what to fix) of one app."""
    try:
        return await dify.name_of(app), await dify.mode_of(app), "ok", ""
    except ProxyError as error:
        return "-", app.mode or "-", "failed", error.message


def _masked(value: Any) -> str:
    """A setting as it may be shown."""
    if isinstance(value, tuple):
        return ", ".join(map(mask_key, value)) or "-"
    if isinstance(value, dict):
        shown = [f"{model} ({mask_key(app.key)})" for model, app in value.items()]
        return ", ".join(shown) or "-"
    return {True: "on", False: "off"}.get(value, str(value)) if value != "" else "-"


# The demo...


class DemoApp:
    """A Dify chat app in miniature, on a free loopback port, in Dify's wire format."""

    def __init__(self) -> None:
        self._server: asyncio.base_events.Server | None = None

    async def listen(self) -> str:
        """Begin to serve; returns the API's base URL."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}/v1"

    async def close(self) -> None:
        """Stop serving."""
        if self._server:
            self._server.close()

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        wire = Wire(reader, writer)
        try:
            while head := await wire.read_head():
                connection, request = parse_request_head(head)
                body = b""
                decoder = body_decoder(request.headers, until_end=False)
                while data := await wire.read_body(decoder):
                    body += data
                reply = Reply(wire, connection, request)
                await self._reply(reply, request.path, body)
        except ConnectionBroken:
            pass
        finally:
            wire.close()

    async def _reply(self, reply: Reply, path: str, body: bytes) -> None:
        if path.endswith("/chat-messages"):
            await self._stream(reply, json.loads(body))
        else:
            facts = {"name": "OpenDify demo", "mode": "chat", "result": "success"}
            reply.send(json_response(facts))

    async def _stream(self, reply: Reply, asked: Mapping[str, Any]) -> None:
        """An answer in bursts; events and framing are those of Dify 1.12."""
        ids = {
            "conversation_id": asked.get("conversation_id") or str(uuid.uuid4()),
            "message_id": str(uuid.uuid4()),
            "created_at": int(time.time()),
            "task_id": str(uuid.uuid4()),
        }
        reply.start(200, [("Content-Type", "text/event-stream; charset=utf-8")])
        text = f"{_DEMO_ANSWER}You said: {asked['query']}"
        for burst in re.findall(r"[^.。;,]+[.。;,]?\s*", text):
            event = {"event": "message", **ids, "answer": burst}
            reply.write(encode_event(json_bytes(event)))
            await reply.drain()
            await asyncio.sleep(len(burst) / 160)
        words = len(text.split())
        usage = {"prompt_tokens": 0, "completion_tokens": words, "total_tokens": words}
        end = {"event": "message_end", **ids, "metadata": {"usage": usage}}
        reply.end(encode_event(json_bytes(end)))


if __name__ == "__main__":
    sys.exit(main())
