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

The rooms, in reading order. Each uses only those above it; 1-12 are pure.

     1. Settings       every setting, its default and its meaning
     2. Errors         what can go wrong, as OpenAI says it
     3. SSE            bytes to events, events to bytes
     4. JSON           text to values and back, whatever it is like
     5. Turn           the hub: what is asked, what is answered, in no API's terms
     6. Calls          tools and output formats, in words
     7. Dify           questions to Dify requests, Dify events to answer parts
     8. Ids            ids that say where in Dify they belong
     9. OpenAI         OpenAI requests to questions, answer parts to chunks and objects
    10. Responses      the same for OpenAI's newer API: items, events, objects
    11. Conversations  which Dify conversation a request continues
    12. Pacer          when each piece of text is due
    13. Wire           HTTP/1.1 over asyncio's transports, both roles
    14. Upstream       the connection pool and the Dify client
    15. Answers        one turn, from a question to its answer's last word
    16. Handlers       the routes, one coroutine each
    17. Server         connections, the error boundary, shutdown
    18. Page           a playground and the clients' settings at /
    19. Command line   arguments, logging, signals, main()
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import bisect
import contextlib
import copy
import dataclasses
import difflib
import errno
import functools
import gc
import hashlib
import hmac
import http
import io
import itertools
import json
import logging
import operator
import os
import re
import signal
import socket
import sys
import tempfile
import textwrap
import time
import unicodedata
import urllib.parse
from collections import defaultdict, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import count
from math import exp, inf, isclose, isfinite, sqrt
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Callable, NamedTuple, TypeVar, Union, cast

try:
    import sqlite3
    import ssl

    import h11
    from dotenv import dotenv_values
    from dotenv import parser as env_parser
except ImportError as missing:
    is_own = str(missing.name).startswith("_")  # _sqlite3 and _ssl, in C
    pip = f"{sys.executable} -m pip install h11 python-dotenv"
    cure = "a part of Python that some systems package apart" if is_own else pip
    sys.exit(f"OpenDify needs the package {missing.name!r}: {cure}")

__version__ = "0.1.0"

log = logging.getLogger("opendify")
request_id: ContextVar[str] = ContextVar("request_id", default="-")  # for the log

Json = Mapping[str, Any]  # an object of JSON, to be read; what is made is a dict
UnixTime = int  # seconds since 1970, as Dify and OpenAI tell a time
T = TypeVar("T")

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
TOOLS_PLACES = ("prompt", "inputs", "off")
BASE_SETTING = "DIFY_API_BASE (or the model's `base`)"  # as errors name it
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_ON, _OFF = ("on", "true", "yes", "1"), ("off", "false", "no", "0")
_PROXIES = ("https_proxy", "http_proxy")


class SettingsError(Exception):
    """Everything that is wrong with the settings, a line each."""


Seconds = float  # a duration; written `90`, `1.5`, `30s`, `5m`, `12h` or `7d`


@dataclass(frozen=True)
class AppSettings:
    """One Dify app, as far as the operator described it.

    Empty texts mean "find out": the base from DIFY_API_BASE, the mode from Dify, the
    variables by their names. `tools` says where the words about a client's tools go:
    into the prompt, into the app's input `tools`, or nowhere.
    """

    key: str = field(repr=False)
    base: str = ""
    mode: str = ""
    inputs: Json = field(default_factory=dict)
    query_variable: str = ""
    output_variable: str = ""
    system_variable: str = ""
    history_variable: str = ""
    smoothing: bool | None = None
    tools: str = "prompt"

    @property
    def filled(self) -> set[str]:
        """The inputs that get something else than the message."""
        tools = {"tools"} if self.tools == "inputs" else set()
        return {*self.inputs, self.system_variable, self.history_variable, *tools}


def _setting(default: Any, meaning: str, least: float | None = None) -> Any:
    """A field of Settings: default, meaning for the help, and lowest value."""
    metadata = {"default": default, "meaning": meaning, "least": least}
    return field(default_factory=lambda: default, metadata=metadata)


@dataclass(frozen=True, repr=False)
class Settings:
    """The whole configuration, made by `parse_settings`; never printed: it has keys."""

    model_config: Mapping[str, AppSettings] = _setting(
        {}, 'JSON object of models: name to app key, or to {"key": …, "mode": …, …}'
    )
    dify_api_keys: tuple[str, ...] = _setting(
        (), "comma-separated app keys; each becomes a model with its app's name"
    )
    dify_api_base: str = _setting("https://api.dify.ai/v1", "Dify's API, /v1 included")
    server_host: str = _setting("127.0.0.1", "address to listen on")
    server_port: int = _setting(5000, "port to listen on; 0 takes a free one", 0)
    valid_api_keys: tuple[str, ...] = _setting(
        (), "comma-separated keys; clients must send one of them, or any if empty"
    )
    stream_smoothing: bool = _setting(True, "make streamed text appear evenly")
    stream_max_lag: Seconds = _setting(0.4, "seconds that text may be held back", 0)
    conversation_store: str = _setting(
        "memory", "memory, or the path of an SQLite file, which survives a restart"
    )
    conversation_ttl: Seconds = _setting(
        7 * 86400.0, "how long an unused conversation is remembered", 1
    )
    show_process: bool = _setting(False, "show tools and workflow steps as reasoning")
    dify_connect_timeout: Seconds = _setting(10.0, "seconds to connect to Dify", 0.001)
    dify_first_event_timeout: Seconds = _setting(
        120.0, "seconds until Dify's first event; pings do not count", 0.001
    )
    dify_idle_timeout: Seconds = _setting(
        600.0, "seconds between two events; pings do not count", 0.001
    )
    max_body_mb: int = _setting(64, "largest request body, in MiB", 1)
    max_connections: int = _setting(2000, "maximum number of client connections", 1)
    allowed_origins: tuple[str, ...] = _setting(
        (), "origins of web pages that may call, or *; local pages and apps always may"
    )
    log_level: str = _setting(
        "INFO", "DEBUG (also what Dify is sent, and sends), INFO, WARNING or ERROR"
    )
    log_format: str = _setting("text", "text, or json with one object per line")
    dify_ca_file: str = _setting("", "PEM file of more authorities to trust for Dify")
    ssl_cert_file: str = _setting("", "the same, under the name that other tools use")
    https_proxy: str = _setting("", "proxy for https: http://user:password@host:port")
    http_proxy: str = _setting("", "proxy for http")
    no_proxy: str = _setting("", "hosts and networks without a proxy; * for all")

    @property
    def has_apps(self) -> bool:
        """Whether there is anything to serve."""
        return bool(self.model_config or self.dify_api_keys)

    @property
    def keyed_apps(self) -> list[AppSettings]:
        """The apps of DIFY_API_KEYS, which Dify names."""
        return [AppSettings(key, self.dify_api_base) for key in self.dify_api_keys]


def setting_rows() -> list[tuple[str, str, str]]:
    """(variable, default as it is written, meaning) of every setting, in order."""
    return [
        (row.name.upper(), written(row.metadata["default"]), row.metadata["meaning"])
        for row in dataclasses.fields(Settings)
    ]


def parse_settings(variables: Mapping[str, str]) -> Settings:
    """Settings from variables; those that are absent or blank keep their default.

    Raises:
        SettingsError: something does not parse; it names every such variable.
    """
    values: dict[str, Any] = {}
    complaints: list[str] = []
    for setting in dataclasses.fields(Settings):
        text = variables.get(setting.name.upper(), "").strip()
        if not text:
            continue
        default, least = setting.metadata["default"], setting.metadata["least"]
        try:
            text = text.upper() if setting.name == "log_level" else text
            if setting.name in _PROXIES and re.fullmatch(r"[^/]+:\d+", text):
                text = f"http://{text}"  # as curl and others read it
            values[setting.name] = value = _PARSERS[type(default)](text)
            if least is not None and value < least:
                raise ValueError(f"must be {least:g} or more, not {text}")
        except ValueError as error:
            complaints.append(f"{setting.name.upper()}: {error}")
    settings = Settings(**values)
    complaints += [*_complaints_of_urls(settings), *_complaints(settings)]
    if complaints:  # a key may have got into another variable
        raise SettingsError(mask_app_keys("\n".join(complaints)))
    base = settings.dify_api_base.rstrip("/")
    apps = {
        model: replace(app, base=(app.base or base).rstrip("/"))
        for model, app in settings.model_config.items()
    }
    return replace(settings, dify_api_base=base, model_config=apps)


def unknown_variables(names: Iterable[str]) -> list[str]:
    """A warning for each name that is no setting, with the setting it is most like."""
    known = [variable for variable, _, _ in setting_rows()]
    return [
        f"{name} is not a setting of OpenDify{_hint(name.upper(), known)}"
        for name in names
        if name not in known
    ]


def _hint(name: str, known: Sequence[str]) -> str:
    """The end of a complaint about an unknown name: the known one it is most like."""
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def mask_key(key: str) -> str:
    """A key as it may be shown: its beginning, and that there is more."""
    return key[:6] + "…" if len(key) > 8 else "…"


def mask_app_keys(text: str) -> str:
    """A text that others wrote, without what may be an app's key in it."""
    return _APP_KEY.sub("app-…", text)


_APP_KEY = re.compile(r"\bapp-\w{9,}")


def mask_password(url: str) -> str:
    """A URL as it may be shown: without the user and password in it."""
    return re.sub(r"^(\w+://)?.*@", r"\1…@", url)


def written(value: Any) -> str:
    """A value as it is written in an env file; "" for none."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        days, rest = divmod(value, _UNITS_S["d"])
        number = f"{value:f}".rstrip("0").rstrip(".")  # with no exponent
        return f"{days:.0f}d" if days and not rest else number
    return "" if value in ((), {}) else str(value)


def _complaints_of_urls(settings: Settings) -> Iterator[str]:
    """What is wrong with addresses; no password in them is shown."""
    names = ("dify_api_base", *_PROXIES)
    urls = {name.upper(): getattr(settings, name) for name in names}
    for model, app in settings.model_config.items():
        urls[f"MODEL_CONFIG: base of {model!r}"] = app.base
    for name, url in urls.items():
        is_proxy = name.endswith("PROXY")  # they are not spoken to over TLS
        if url and not _is_url(url, ("http",) if is_proxy else ("http", "https")):
            like = "http://host:3128" if is_proxy else "https://host/v1"
            yield f"{name}: must be a URL like {like}, not {mask_password(url)!r}"
    for origin in settings.allowed_origins:
        if not _is_origin(origin):
            yield f"ALLOWED_ORIGINS: {origin!r} is not like https://host"


def _complaints(settings: Settings) -> Iterator[str]:
    """What is wrong with other values that parsed."""
    models = settings.model_config.items()
    app_keys = [(f"MODEL_CONFIG: key of {name!r}", app.key) for name, app in models]
    app_keys += [("DIFY_API_KEYS", key) for key in settings.dify_api_keys]
    for where, key in app_keys:
        if not re.fullmatch(r"[!-~]+", key):
            yield f"{where}: {mask_key(key)!r} has characters no key has"
    for key in settings.valid_api_keys:
        if not re.fullmatch(r"[\t -~]+", key):  # clients encode others differently
            yield f"VALID_API_KEYS: {mask_key(key)!r} has characters no header has"
    for name, choices in (("log_level", LOG_LEVELS), ("log_format", ("text", "json"))):
        if getattr(settings, name) not in choices:
            yield f"{name.upper()}: must be one of {', '.join(choices)}"
    if settings.server_port > 65535:
        yield "SERVER_PORT: must be 65535 or less"


def _is_url(text: str, schemes: Sequence[str]) -> bool:
    try:
        parts = urllib.parse.urlsplit(text)
        leads = parts.scheme in schemes and parts.hostname and parts.port != 0
        rest = parts.path + parts.query + parts.fragment  # of a password, after a "#"
        return bool(leads and "@" not in rest and re.fullmatch(r"[!-~]+", text))
    except ValueError:
        return False


def _is_origin(text: str) -> bool:
    """Whether a browser may send it (no bare host, no path), or it is * for any."""
    shape = r"\*|null|[a-z][a-z\d+.-]*://(\[[\da-f:.]+\]|[\w.-]*)(:\d+)?/?"
    return re.fullmatch(shape, text, re.ASCII | re.IGNORECASE) is not None


def _parse_switch(text: str) -> bool:
    if text.lower() not in (*_ON, *_OFF):
        raise ValueError(f"must be on or off, not {text!r}")
    return text.lower() in _ON


def _parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"must be a whole number, not {text!r}") from None


def _parse_seconds(text: str) -> Seconds:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.lower())
    if not match:
        raise ValueError(f"must be seconds, or like 30s, 5m, 12h, 7d, not {text!r}")
    return float(match[1]) * _UNITS_S[match[2]]


def _parse_list(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))


def _parse_models(text: str) -> dict[str, AppSettings]:
    try:
        models = json.loads(text, object_pairs_hook=_object_of)
    except (ValueError, RecursionError) as error:
        like = 'it must be like {"name": "app-…"}'
        raise ValueError(f"is not valid JSON ({error}); {like}") from None
    if not isinstance(models, dict):
        raise ValueError('must be a JSON object like {"name": "app-…"}')
    problems = ["a model needs a name that is not empty"] if "" in models else []
    apps = {name: _parse_app(name, value, problems) for name, value in models.items()}
    for name, app in apps.items():  # clients and the log would be told the key
        if re.fullmatch(r"app-\w{24}", name) and not str(app.key).startswith("app-"):
            problems.append(f"{name!r} is an app's key: the model's name goes first")
    if problems:
        raise ValueError("; ".join(problems))
    return apps


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; refuses a name that is given twice: one would be lost."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"it has {max(names, key=names.count)!r} twice")
    return dict(pairs)


def _parse_app(name: str, value: Any, problems: list[str]) -> AppSettings:
    """One entry of MODEL_CONFIG; what is wrong with it is added to `problems`."""
    described: Any = {"key": value} if isinstance(value, str) else value
    if not isinstance(described, dict) or not described.get("key"):
        problems.append(f'{name!r} needs an app key: "app-…" or {{"key": "app-…"}}')
        return AppSettings("")
    known = [setting.name for setting in dataclasses.fields(AppSettings)]
    for key, entry in described.items():
        type_, wanted = _APP_TYPES.get(key, (str, "a text"))
        if key not in known:
            problems.append(f"{name!r} has an unknown {key!r}{_hint(key, known)}")
        elif not isinstance(entry, type_):
            problems.append(f"the {key} of {name!r} must be {wanted}")
    if described.get("tools", "prompt") not in TOOLS_PLACES:
        problems.append(f"the tools of {name!r} must be {' or '.join(TOOLS_PLACES)}")
    if described.get("mode", "") not in ("", *APP_MODES):
        problems.append(f"the mode of {name!r} must be one of {', '.join(APP_MODES)}")
    return AppSettings(**{key: described[key] for key in known if key in described})


_APP_TYPES: Mapping[str, tuple[type, str]] = {
    "inputs": (dict, "a JSON object"),
    "smoothing": (bool, "true or false"),
}
_PARSERS: Mapping[type, Callable[[str], Any]] = {
    bool: _parse_switch,
    int: _parse_int,
    float: _parse_seconds,
    str: str,
    tuple: _parse_list,
    dict: _parse_models,
}


# ==============================================================================
# 2. Errors
# ==============================================================================
#
# What can go wrong, and how OpenAI says it: a class for each cause, with the status,
# type and code by which OpenAI's clients know it. Messages are shown to end users as
# they are: they say what to do, and hold no secret.
#
#     ModelNotFound("…")  <->  404 {"error": {"message", "type", "param", "code"}}
#
# OpenAI's SDKs repeat 408, 409, 429 and every 5xx twice, unless told not to by
# `x-should-retry: false`; that is said wherever a repeat can't help.


RETRY_AFTER_S = "5"  # a run of Dify's lasts seconds; Dify itself never says


class ProxyError(Exception):
    """Anything that is answered with an error; by itself, a bug (500).

    Args:
        message: for the client's user: what is wrong and what to do.
        param: the request's field at fault.
        code: where it differs from the class's: OpenAI's or Dify's.
        is_final: a repeat of the request can't help; else that is left to the client.
    """

    status = 500
    type = "server_error"
    code: str | None = None
    param: str | None = None
    is_final = False
    is_unsent = False  # nothing of the request has reached Dify
    quoted = ""  # a part of the message that may hold some of an answer

    def __init__(
        self, message: str, *, param: str = "", code: str = "", is_final: bool = False
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param or self.param
        self.code = code or self.code
        self.is_final = is_final or self.is_final
        self.headers: list[tuple[str, str]] = []  # further ones of the response

    def __str__(self) -> str:
        """The message as it is now: a key may have been masked in it."""
        return self.message

    @property
    def for_log(self) -> str:
        """The message without what it quotes of an answer."""
        return self.message.replace(self.quoted, "…") if self.quoted else self.message


class BadRequest(ProxyError):
    """The request can't be served as it is."""

    status, type = 400, "invalid_request_error"


class Unauthorized(BadRequest):
    """No key, or none that this server knows."""

    status = 401


class KeysGuessed(BadRequest):
    """Too many wrong keys came from this address."""

    status, type, code = 429, "requests", "rate_limit_exceeded"


class Forbidden(BadRequest):
    """Not from here, or not for this key."""

    status, code = 403, "permission_denied"


class NotFound(BadRequest):
    """Nothing is served at this path."""

    status, code = 404, "unknown_url"


class IdNotFound(BadRequest):
    """An id leads to nothing that this client may have."""

    status, param = 404, "id"


class ConversationLocked(BadRequest):
    """Another turn is under way that this one would have to follow."""

    code, param = "conversation_locked", "conversation"


class ModelNotFound(BadRequest):
    """No app goes by this name."""

    status, code, param = 404, "model_not_found", "model"


class MethodNotAllowed(BadRequest):
    """The path exists, for another method."""

    status, code = 405, "method_not_supported"


class RequestTimeout(BadRequest):
    """The client took too long to send its request."""

    status = 408


class BodyTooLarge(BadRequest):
    """The body is over the limit."""

    status = 413


class UnsupportedCoding(BadRequest):
    """The body is compressed (RFC 9110, section 15.5.16)."""

    status = 415


class HeadTooLarge(BadRequest):
    """The request's head is over the limit (RFC 6585, section 5)."""

    status = 431


class PromptTooLong(BadRequest):
    """The model can't read so much at once."""

    code, param = "context_length_exceeded", "messages"


class ContentRefused(BadRequest):
    """The model's provider does not allow what is asked, or what came of it."""

    code = "content_policy_violation"


class RateLimited(ProxyError):
    """Dify, or the model behind it, wants fewer requests."""

    status, type, code = 429, "requests", "rate_limit_exceeded"


class QuotaExceeded(ProxyError):
    """Credit is used up: a repeat can't help."""

    status, type, code = 429, "insufficient_quota", "insufficient_quota"
    is_final = True


class UpstreamRejected(BadRequest):
    """Dify refuses the request before it runs; the code is Dify's."""


class UpstreamFailed(ProxyError):
    """No connection, a broken answer, or a run that failed."""

    status, code = 502, "upstream_error"


class ConfigurationFault(UpstreamFailed):
    """The operator has to mend something, such as an app's key."""

    is_final = True


class UpstreamTimeout(ProxyError):
    """Dify is too slow."""

    status, code = 504, "upstream_timeout"


class Overloaded(ProxyError):
    """Too many connections or files, a full disk, shutting down, no app answers."""

    status, code = 503, "server_is_overloaded"


def bad_type(field_name: str, wanted: str) -> BadRequest:
    """The error for a field of the wrong type."""
    message = f"Invalid type for '{field_name}': it must be {wanted}."
    return BadRequest(message, param=field_name, code="invalid_type")


def bad_value(field_name: str, problem: str) -> BadRequest:
    """The error for a value that a field can't have."""
    message = f"Invalid value for '{field_name}': {problem}"
    return BadRequest(message, param=field_name, code="invalid_value")


def of_type(value: Any, kind: type[T], field_name: str, wanted: str = "") -> T:
    """The value of a field; raises BadRequest if it is of another type."""
    if type(value) is not kind:  # a bool would be an int, too
        raise bad_type(field_name, wanted or _JSON_TYPES[kind])
    return value


_JSON_TYPES: Mapping[type, str] = {str: "a string", list: "an array", dict: "an object"}


def missing_parameter(field_name: str) -> BadRequest:
    """The error for a field that a request lacks."""
    message = f"Missing required parameter: '{field_name}'."
    return BadRequest(message, param=field_name, code="missing_required_parameter")


def error_body(error: ProxyError) -> dict[str, Any]:
    """The error as OpenAI's clients read it; all four keys, always."""
    keys = ("message", "type", "param", "code")
    return {"error": {key: getattr(error, key) for key in keys}}


def error_headers(error: ProxyError) -> list[tuple[str, str]]:
    """The headers that go with an error's response."""
    headers = list(error.headers)
    if error.is_final:
        headers.append(("x-should-retry", "false"))
    elif error.status in (429, 503) and not headers:
        headers.append(("Retry-After", RETRY_AFTER_S))  # else Codex repeats no 429
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
#     event: message\ndata: {"answer": "Hel"}\n\n   <->   {"answer": "Hel"}

# Dify sends whole node outputs and audio in one line: megabytes are normal.
MAX_EVENT_BYTES = 32 * 1024 * 1024


class SSEOverflow(ValueError):
    """An event is longer than MAX_EVENT_BYTES."""


class SSEDecoder:
    """Cuts a stream of bytes into its events' data, however the bytes are cut.

    Lines end with LF, CR LF or CR; data lines are joined by newlines. Bytes that are
    not UTF-8 become U+FFFD. Types and ids are ignored, since Dify names an event in its
    data. What has no data is no event (Dify's heartbeat, `event: ping`), and one
    whose blank line never comes is dropped, as the standard demands.
    """

    def __init__(self) -> None:
        self._line = bytearray()  # the beginning of a line that has no end yet
        self._data: list[str] = []
        self._size = 0  # of the event that is not complete
        self._after_cr = False  # an LF now belongs to a CR that ended the last read
        self._encoding = "utf-8-sig"  # a BOM may stand at the start, and nowhere else

    @property
    def has_part(self) -> bool:
        """Whether an event has begun that is not complete."""
        return bool(self._line or self._data)

    def feed(self, data: bytes) -> list[str]:
        """The data of the events that these bytes complete; raises SSEOverflow."""
        if b"\r" in data or (self._after_cr and data):
            data = self._ended_by_lf(data)
        is_whole = data.startswith(b"data: ") and data.endswith(b"\n\n")
        if is_whole and not (self._size or self._data) and len(data) <= MAX_EVENT_BYTES:
            # Dify's form, as a rule: nothing but whole events of one line each.
            events = data[6:-2].decode("utf-8", "replace").split("\n\ndata: ")
            if "\n" not in "".join(events):
                self._encoding = "utf-8"
                return events
        self._size += len(data)
        if self._size > MAX_EVENT_BYTES:
            raise SSEOverflow(f"an event of more than {MAX_EVENT_BYTES >> 20} MiB")
        end = data.rfind(b"\n") + 1
        if not end:
            self._line += data
            return []
        # All lines at once: decoding each costs more. No line end cuts a character.
        lines = self._line + data[:end] if self._line else data[:end]
        self._line = bytearray(data[end:])
        events = self._read_lines(lines.decode(self._encoding, "replace"))
        self._encoding = "utf-8"
        if events or not self._data:
            self._size = len(self._line)
        return events

    def _read_lines(self, text: str) -> list[str]:
        events: list[str] = []
        *blocks, rest = text.split("\n\n")
        for block in blocks:
            # As above, in a read that ends anywhere: 5% of a stream without pauses.
            if block.startswith("data: ") and "\n" not in block and not self._data:
                events.append(block[6:])
            else:
                for line in (*block.split("\n"), ""):
                    self._read_line(line, events)
        for line in rest.split("\n")[:-1]:
            self._read_line(line, events)
        return events

    def _read_line(self, line: str, events: list[str]) -> None:
        name, _, value = line.partition(":")
        if name == "data":
            self._data.append(value.removeprefix(" "))
        elif not line and self._data:
            events.append("\n".join(self._data))
            self._data = []

    def _ended_by_lf(self, data: bytes) -> bytes:
        if self._after_cr:
            data = data.removeprefix(b"\n")
        self._after_cr = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def encode_event(data: bytes, event: str = "") -> bytes:
    """One event of one data line; `data` must hold no line break (JSON has none)."""
    head = b"event: %b\n" % event.encode() if event else b""
    return b"%bdata: %b\n\n" % (head, data)


def encode_comment(text: str) -> bytes:
    """A comment: it keeps a connection alive, and no client reads it as an event."""
    return b": %b\n\n" % text.encode()


# ==============================================================================
# 4. JSON
# ==============================================================================
#
# Text to values and back. Python's reader and writer allow more than JSON does: NaN,
# any depth, half a surrogate pair. Models get quotes, commas and braces wrong, or leave
# them out. Knows nothing of what a value means.
#
#     '{"a": NaN}'  ->  {"a": None}  ->  b'{"a":null}'
#
# Four readers, by what they make of that:
#
#     decode_json        NaN becomes None                   (bodies of requests)
#     read_json          so does what is nested too deeply  (what Dify sends)
#     parse_json_text    both are errors                    (JSON as an answer)
#     parse_sloppy_json  the same, after a repair           (calls that models write)

MAX_NESTING = 100  # of lists and objects: the code that walks them is recursive
_PAIRS = {"{": "}", "[": "]"}
_STRING_SIGN = re.compile(r"\\(?:[^u]|u[0-9a-fA-F]{4})|[\"\\]")
_SLOPPY = re.compile(
    r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|\b(?:True|False|None)\b"
    r"|(?<![\w$-])[^\W\d][\w$-]*(?=\s*:)|,(?=\s*[}\]])|[{}\[\]\"']",
    re.DOTALL,
)
_WORDS = {"True": "true", "False": "false", "None": "null", ",": ""}


# Values of any shape...


def object_of(value: Any) -> dict[str, Any]:
    """The value, {} if it is no object."""
    return value if isinstance(value, dict) else {}


def objects_of(value: Any) -> list[dict[str, Any]]:
    """The objects in a list, [] if it is none."""
    items = value if isinstance(value, list) else []
    return [item for item in items if isinstance(item, dict)]


# Reading...


def read_json(text: str) -> Any:
    """A value that can be written as JSON again.

    NaN and 1e999, which JSON lacks, become null, and so does what is nested deeper than
    MAX_NESTING; all of it, if it is too deep to be read. Raises ValueError.
    """
    try:
        value = decode_json(text)
    except RecursionError:
        return None
    may_be_deep = text.count("[") + text.count("{") > MAX_NESTING
    return _shallow(value, MAX_NESTING) if may_be_deep else value


def read_json_object(data: str | bytes) -> dict[str, Any] | None:
    """The same for an object; None if it is none, or no JSON."""
    with contextlib.suppress(ValueError):
        if isinstance(data, bytes):
            data = data.decode(json.detect_encoding(data))
        value = read_json(data)
        return value if isinstance(value, dict) else None
    return None


def _shallow(value: Any, depth: int) -> Any:
    if isinstance(value, dict) and depth:
        return {key: _shallow(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list) and depth:
        return [_shallow(item, depth - 1) for item in value]
    return None if isinstance(value, (dict, list)) else value


def _or_null(text: str) -> float | None:
    number = float(text)
    return number if isfinite(number) else None


# As `json.loads`, but numbers that JSON lacks are None.
decode_json = json.JSONDecoder(parse_float=_or_null, parse_constant=_or_null).decode


def parse_json_text(text: str, *, strict: bool = True) -> Any:
    """The value of JSON text, or ValueError; `strict` allows no raw line breaks."""
    try:
        return json.loads(
            text, strict=strict, parse_float=_finite, parse_constant=_finite
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _finite(text: str) -> float:
    if not isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return number


def parse_sloppy_json(text: str) -> Any:
    """The value of JSON text that may need one repair, or ValueError.

    It mends single quotes, names without quotes, Python's words, surplus commas, braces
    missing at the end, line breaks and stray backslashes in strings. What ends with a
    comma was cut off.
    """
    try:
        return parse_json_text(text, strict=False)
    except ValueError:
        return parse_json_text(_mended(text), strict=False)


def _mended(text: str) -> str:
    opened: list[str] = []

    def mend(match: re.Match[str]) -> str:
        piece = match[0]
        if piece in _PAIRS:
            opened.append(_PAIRS[piece])
        elif piece in "}]":
            del opened[-1:]
        elif piece in "\"'":
            raise ValueError("a quote is never closed")
        elif piece[0] in "\"'":
            return '"' + _STRING_SIGN.sub(_mended_escape, piece[1:-1]) + '"'
        else:
            return _WORDS.get(piece, f'"{piece}"')
        return piece

    return _SLOPPY.sub(mend, text) + "".join(reversed(opened))


def _mended_escape(match: re.Match[str]) -> str:
    sign = match[0]
    if sign == "\\'":
        return "'"
    return sign if sign[1:] and sign[1] in '"\\/bfnrtu' else "\\" + sign


# Writing...


# As models and people read it: letters as they are, a space behind commas and colons.
json_text = json.JSONEncoder(ensure_ascii=False).encode


def json_bytes(value: Any) -> bytes:
    """Compact JSON on one line that no client's reader can break.

    U+2028, U+2029 and U+0085 are escaped, since readers built on `str.splitlines` cut
    lines there; a lone surrogate becomes U+FFFD, since UTF-8 has none.
    """
    return _one_line(_encode(value))


def json_string(text: str) -> bytes:
    """The same for one string, ten times faster."""
    return _one_line(json.encoder.encode_basestring(text))


def whole_characters(text: str) -> str:
    """The text with surrogate pairs joined; half of one is U+FFFD: UTF-8 has none."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _one_line(text: str) -> bytes:
    try:  # of all that `splitlines` knows, JSON text holds none but those to escape
        if text.isascii() or len(text.splitlines()) == 1:
            return text.encode()
    except UnicodeEncodeError:
        pass  # half a surrogate pair
    return _LINE_BREAKERS.sub(_escape, text).encode()


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return "\ufffd" if 0xD800 <= code <= 0xDFFF else f"\\u{code:04x}"


_encode = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), check_circular=False
).encode
_LINE_BREAKERS = re.compile("[\x85\u2028\u2029\ud800-\udfff]")


# ==============================================================================
# 5. Turn
# ==============================================================================
#
# The hub. What is asked and what is answered, in no API's terms: Dify's API and those
# of OpenAI meet only here, so a new app mode works on every surface at once, and a new
# surface with every app.
#
#     OpenAI request -> Ask -> Dify request        Dify events -> parts -> OpenAI chunks


@dataclass(frozen=True)
class Attachment:
    """A file that came with a message: its bytes, or the URL where they are.

    `data` and `url` exclude each other; an `upload_id` goes before both. `media_type`
    is "" where the client did not say; `name` never has a path in it.
    """

    name: str
    media_type: str = ""
    data: bytes = field(default=b"", repr=False)
    url: str = field(default="", repr=False)
    file_id: str = ""  # of a stored file, as the client names it
    upload_id: str = ""  # of a stored file, as Dify names it
    size: int = 0  # of a stored file, in bytes

    @property
    def extension(self) -> str:
        """What follows the last dot of its name, in lower case; without one, all."""
        return self.name.rpartition(".")[2].lower()


@dataclass(frozen=True)
class ToolCall:
    """One call of a client's tool; `arguments` is JSON text.

    A custom tool is called with one text, which is its only argument here: `input`. The
    name of a tool in a `namespace` begins with it.
    """

    id: str
    name: str
    arguments: str
    is_custom: bool = False
    namespace: str = ""

    @property
    def given(self) -> str:
        """What the tool is given: its arguments, or a custom tool's text."""
        if not self.is_custom:
            return self.arguments
        text = (read_json_object(self.arguments) or {}).get("input", self.arguments)
        return text if isinstance(text, str) else json_text(text)


class Message(NamedTuple):
    """One message of the client's history.

    `role` is "system", "user", "assistant" or "tool". `name` is who speaks: the
    message's `name`, or the tool whose result it is.
    """

    role: str
    text: str
    name: str = ""
    attachments: tuple[Attachment, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    spoken_id: str = ""  # of a spoken answer, in the place of its text
    call_id: str = ""  # of a tool's result, until its tool is known


Messages = Sequence[Message]  # of a history, in order

# What Open WebUI puts before a question where it has found something: texts of files
# or of the web, up to the end of their tag.
CONTEXT_BEGINS = "### Task:\nRespond to the user query"
_MAX_CONTEXT_CHARS = 16384  # with longer ones, a conversation in Dify is not continued

# What leads a history, and the question behind it, where one is put into the query.
HISTORY_BEGINS, QUESTION_BEGINS = "The conversation so far:", "Answer this message:"


def context_of(message: Message) -> str:
    """What stands before a question, and is not sent with it again in later turns."""
    if message.role != "user" or not message.text.startswith(CONTEXT_BEGINS):
        return ""
    return "".join(message.text[:_MAX_CONTEXT_CHARS].rpartition("</context>")[:2])


def plain_text(message: Message) -> str:
    """A message's text as it is compared: without thoughts, in single spaces.

    The context of a question is left out, too.
    """
    text = message.text[len(context_of(message)) :]
    if message.role == "assistant" and (match := _REASONING.match(text)):
        text = text[match.end() :]
    # Half a surrogate pair reaches the client as U+FFFD, and comes back so.
    text = text.replace("\ufffd", "?").encode("utf-8", "replace").decode()
    return " ".join(text.split())


_REASONING = re.compile(
    r"(?:\s*(?:<(think(?:ing)?|thought|reason(?:ing)?)\b[^>]*>.*?</\1>"
    r"|<details\b[^>]*>\s*<summary[^>]*>\s*(?:Thinking|Thought).*?</details>))+",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class Tool:
    """A function of the client's that the app may call; `parameters` is JSON Schema.

    A custom tool `is_custom`, and stands for a function of one text, its `input`. The
    name of one in a `namespace` begins with it: "mcp__docs.search".
    """

    name: str
    description: str = ""
    parameters: Json = field(default_factory=dict)
    is_custom: bool = False
    namespace: str = ""


@dataclass(frozen=True)
class OutputFormat:
    """How the answer is written: kind "text", "json_object" or "json_schema".

    `name` and `schema` say more of a json_schema; an empty schema allows any JSON.
    `param` is the field that asked for it.
    """

    kind: str = "text"
    name: str = ""
    schema: Json = field(default_factory=dict)
    param: str = "response_format"


AS_TEXT = OutputFormat()


class Ask(NamedTuple):
    """What a client wants of an app, whichever API it came by.

    `messages` is the whole visible history in order, the new message(s) last, without
    the system text that opens it: that is `system`. `conversation_id` is the one that
    the client named; if it is "", one with this history is looked for. Dify has all
    messages up to the last answer in that conversation; none of them if `is_all_new`,
    and then no conversation is looked for.
    """

    model: str
    messages: tuple[Message, ...]
    system: str = ""
    inputs: Json = MappingProxyType({})
    user: str = ""
    conversation_id: str = ""
    is_all_new: bool = False
    tools: tuple[Tool, ...] = ()  # that may be called
    tool_mode: str = "auto"  # or "none" or "required"
    is_serial: bool = False  # an answer may hold one call only
    output: OutputFormat = AS_TEXT
    stops: tuple[str, ...] = ()
    voice: str | None = None  # to say the answer in, "" for the app's; None: in writing

    @property
    def is_strict(self) -> bool:
        """Whether its answer must be a call, or JSON, and is asked for again if not."""
        return self.tool_mode == "required" or self.output.kind != "text"


# The parts of an answer, in the order in which they come: reasoning, text and calls
# mixed, then files, citations and usage, then exactly one Finish or Failure. Where the
# answer is spoken, Sounds follow. Text and Reasoning are not frozen, since thousands of
# them are made a second.


@dataclass
class Text:
    """More of the answer."""

    __slots__ = ("text",)
    text: str


@dataclass
class Reasoning:
    """More of what the model thinks; `is_inline` if it stood in the text, in tags."""

    text: str
    is_inline: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Replace:
    """Forget the text so far, this is it (moderation does that).

    `reasoning` is what stood in the new text; that of the old one is forgotten, too.
    """

    text: str
    reasoning: str = ""


@dataclass(frozen=True)
class Recast:
    """The last text was reasoning, `size` characters: its opening tag was missing."""

    size: int


@dataclass(frozen=True)
class Media:
    """A file that the app made; `url` is absolute, `kind` is its type in Dify."""

    kind: str
    url: str
    name: str


@dataclass(frozen=True)
class Citations:
    """Where the answer comes from: Dify's `retriever_resources`, as they are."""

    resources: tuple[Json, ...]


@dataclass(frozen=True)
class Usage:
    """Token counts; zero where Dify does not know."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        """The tokens of both."""
        prompt = self.prompt_tokens + other.prompt_tokens
        return Usage(prompt, self.completion_tokens + other.completion_tokens)

    @property
    def total_tokens(self) -> int:
        """Always the sum: Dify's own total is wrong in some releases."""
        return self.prompt_tokens + self.completion_tokens


NO_USAGE = Usage()


@dataclass(frozen=True)
class Finish:
    """The answer is complete: "stop", "length" or "content_filter"."""

    reason: str = "stop"


@dataclass(frozen=True)
class Failure:
    """The answer ends here, unfinished."""

    error: ProxyError


@dataclass(frozen=True)
class Sound:
    """More of the file that says the answer aloud."""

    data: bytes


# Dify's ids of an answer, as far as known: {"conversation_id": …, "message_id": …}, of
# a workflow {"workflow_run_id": …}.
DifyIds = Mapping[str, str]


class KeptText:
    """Text that grows, remembered as far as it is of use: up to MAX_KEPT_CHARS.

    A longer answer streams on, but it can't be recovered, and its conversation is not
    remembered: that would hold megabytes for each stream.
    """

    __slots__ = ("_data", "size")  # each stream has three: they save it 0.3 KB

    def __init__(self) -> None:
        self.size = 0  # characters, whether they are kept or not
        self._data = bytearray()  # grows in place, and its characters are small

    @property
    def is_whole(self) -> bool:
        """Whether `text` is all of it."""
        return self.size <= MAX_KEPT_CHARS

    @property
    def text(self) -> str:
        """What is kept; nothing, once it is too much."""
        return self._data.decode("utf-8", "surrogatepass")

    def add(self, text: str) -> None:
        """Add more text."""
        self.size += len(text)
        self._data += text.encode("utf-8", "surrogatepass")
        if self.size > MAX_KEPT_CHARS:
            self._data.clear()


MAX_KEPT_CHARS = 128 * 1024

Part = Union[
    Union[Text, Reasoning, Replace, Recast, ToolCall, Media, Citations, Usage],
    Union[Finish, Failure, Sound],
]


class Answer:
    """A whole answer, collected part by part."""

    def __init__(self) -> None:
        self.calls: list[ToolCall] = []
        self.sounds: list[bytes] = []
        self.citations: tuple[Json, ...] = ()
        self.usage = NO_USAGE
        self.finish_reason = ""  # until it is finished
        self._texts: list[str] = []
        self._reasonings: list[Reasoning] = []

    @property
    def text(self) -> str:
        """The answer without its reasoning, with links to its files."""
        return "".join(self._texts)

    @property
    def reasoning(self) -> str:
        """What the model thought, "" if nothing."""
        return "".join([part.text for part in self._reasonings])

    def add(self, parts: Iterable[Part]) -> None:
        """Take the next parts in; raises the error of a Failure."""
        for part in parts:
            if isinstance(part, Text):  # nearly always
                self._texts.append(part.text)
            else:
                self._add_other(part)

    def _add_other(self, part: Part) -> None:
        if isinstance(part, Reasoning):
            self._reasonings.append(part)
        elif isinstance(part, Usage):
            self.usage = part
        elif isinstance(part, Finish):
            self.finish_reason = part.reason
        elif isinstance(part, Failure):
            raise part.error
        elif isinstance(part, ToolCall):
            self.calls.append(part)
        elif isinstance(part, Sound):
            self.sounds.append(part.data)
        elif isinstance(part, Citations):
            self.citations = part.resources
        else:
            self._change_text(part)

    def _change_text(self, part: Part) -> None:
        if isinstance(part, Media):
            self._texts.append(media_text(part, is_first=not any(self._texts)))
        elif isinstance(part, Replace):
            self._reasonings = [r for r in self._reasonings if not r.is_inline]
            self._texts = [part.text]
            self._think(part.reasoning)
        elif isinstance(part, Recast):
            self._think(self._taken(part.size))

    def _taken(self, size: int) -> str:
        """The last so many characters of the text, which are gone from it."""
        first = len(self._texts)
        while size > 0 and first:  # calls may be gone from it
            first -= 1
            size -= len(self._texts[first])
        text, kept = "".join(self._texts[first:]), max(0, -size)
        self._texts[first:] = [text[:kept]] if kept else []
        return text[kept:]

    def _think(self, reasoning: str) -> None:
        """Add what was thought in the place of text, and of the calls so far."""
        self.calls = []
        if reasoning:
            apart = "\n\n" if self._reasonings else ""
            self._reasonings.append(Reasoning(apart + reasoning, is_inline=True))


def media_text(media: Media, *, is_first: bool) -> str:
    """A file of the app's, as Markdown that follows the text."""
    name = re.sub(r"([\[\]\\])", r"\\\1", media.name) or media.kind
    url = media.url.replace(" ", "%20").replace("(", "%28").replace(")", "%29")
    sign = "!" if media.kind == "image" else ""
    return ("" if is_first else "\n\n") + f"{sign}[{name}]({url})"


# ==============================================================================
# 6. Calls
# ==============================================================================
#
# Tools and output formats, for apps that know of neither: what the app is told, in
# words, and how its answer is read. Knows nothing of Dify, and of OpenAI only how a
# request names tools and formats.
#
#     <tool_call>\n{"name": "f", "arguments": {…}}\n</tool_call>  ->  ToolCall(…)
#
# CallReader, StopReader and JsonReader stand one behind the other: each takes the parts
# of an answer as they come (`feed`), and gives on those that are certain. A Reading is
# made of those that its request needs.
#
# One way to write calls is asked for; every other one that models fall into is read:
#
# (1) A call names a tool of the request, and its arguments are an object, or a custom
#     tool's text. All else is text, to the character; a list is calls only if each of
#     its items is. Where one tool must be called, its arguments alone will do.
# (2) Text goes on at once. Held back is what may become a marker, and then a block
#     that begins as calls do, until it is certain what it is.
# (3) JSON without a marker is a call only where one can stand: at the start of a line
#     or after ":", "." and the like, not quoted, not within other JSON. A code block
#     must hold calls alone, else it is text, whatever it holds.
# (4) What is read does not depend on how the text was cut into parts, nor on what is
#     reasoned beside it: that goes on at once, before what is held back.


# Reading tools and output formats in a request...

_MODES = {"auto": "auto", "none": "none", "required": "required", "any": "required"}
_MAX_NAMESPACE_CHARS = 128  # of its name, which the name of each of its tools repeats


def parse_tools(body: Json) -> tuple[tuple[Tool, ...], str]:
    """(tools that may be called; "auto", "none" or "required"), of either generation.

    Tools of other types than function and custom are ignored, as clients expect.

    Raises:
        BadRequest: they can't be read, or a tool must be called that is not there.
    """
    source = "tools" if body.get("tools") else "functions"
    choice_name = "tool_choice" if body.get("tool_choice") else "function_call"
    given = of_type(body.get(source) or [], list, source)
    wish, names = _parse_choice(body.get(choice_name) or "auto")
    if not (mode := _MODES.get(wish)):
        problem = f"{wish!r} is none of auto, none, required, a tool, allowed_tools."
        raise bad_value(choice_name, problem)
    known = _parse_tools(given, "function" if source == "functions" else "")
    chosen = {name for name in names if isinstance(name, str)}
    tools = [tool for tool in known if not names or tool.name in chosen]
    if mode == "required" and not tools:
        problem = "it asks for a call of a function that is not in `tools`."
        raise bad_value(choice_name, problem)
    return (() if mode == "none" else tuple(tools)), mode if tools else "auto"


def _function(tool: Json) -> dict[str, Any]:
    """The function of a tool or a choice: nested (Chat) or flat (Responses, legacy)."""
    nested = tool.get("function", tool.get("custom"))
    return nested if isinstance(nested, dict) else {**tool}


def _parse_tools(given: Any, all_are: str = "", namespace: str = "") -> Iterator[Tool]:
    """The functions and custom tools of a list and its namespaces, others left out.

    All are of the type `all_are`, whatever they say, if the list knows no other. A
    `namespace` has no further ones in it.
    """
    for tool in objects_of(given):
        function, kind = _function(tool), all_are or tool.get("type") or "function"
        name, is_custom = function.get("name"), kind == "custom"
        if not (name and isinstance(name, str)):
            continue
        if kind == "namespace" and not namespace and len(name) <= _MAX_NAMESPACE_CHARS:
            yield from _parse_tools(tool.get("tools"), namespace=name)
        elif kind in ("function", "custom"):
            description = str(function.get("description") or "")
            form = object_of(function.get("format" if is_custom else "parameters"))
            parameters = _text_parameters(form) if is_custom else form
            name = f"{namespace}.{name}" if namespace else name
            yield Tool(name, description, parameters, is_custom, namespace)


def _text_parameters(form: Json) -> dict[str, Any]:
    """The parameters of a custom tool, one text, described by the tool's grammar."""
    text = {"type": "string"}
    grammar = object_of(form.get("grammar") or form)  # nested in Chat
    if definition := grammar.get("definition"):
        syntax = grammar.get("syntax")
        text["description"] = f"It must fit this {syntax} grammar: {definition}"
    return {"type": "object", "properties": {"input": text}, "required": ["input"]}


def _parse_choice(choice: Any) -> tuple[str, list[Any]]:
    """(its mode as it is written, the names to choose from; [] for all)."""
    if not isinstance(choice, dict):
        return str(choice)[:80], []
    kind = choice.get("type")
    if kind == "allowed_tools":
        allowed = object_of(choice.get("allowed_tools")) or choice
        tools = allowed.get("tools")
        tools = tools if isinstance(tools, list) else []
        names = [_function(object_of(tool)).get("name") for tool in tools]
        return str(allowed.get("mode") or "auto")[:80], names
    name = _function(choice).get("name")
    if kind in (None, "function", "tool", "custom") and name:
        return "required", [name]
    return (kind if kind in [*_MODES] else "auto"), []  # a hosted tool, or none


def parse_output_format(body: Json) -> OutputFormat:
    """What `response_format` (Chat) or `text.format` (Responses) asks for.

    Raises:
        BadRequest: the kind is unknown, or the schema missing.
    """
    where = "response_format"
    if not (spec := body.get(where)):
        where, spec = "text.format", object_of(body.get("text")).get("format")
    if not isinstance(spec, dict):
        spec = {"type": spec or "text"}
    kind = spec.get("type", "text")
    if kind == "text":
        return AS_TEXT
    if kind not in ("json_object", "json_schema"):
        raise bad_value(f"{where}.type", "it must be text, json_object or json_schema.")
    spec = object_of(spec.get("json_schema") or spec)
    # Beside json_object Together's clients have it, too, and Hugging Face's as `value`.
    schema = spec.get("schema", spec.get("value"))
    if kind == "json_object" and not schema:
        return OutputFormat(kind, schema={"type": "object"}, param=where)
    place = f"{where}.json_schema" if where == "response_format" else where
    schema = of_type(schema, dict, f"{place}.schema", "a JSON Schema, an object")
    if spec.get("description"):
        schema = {"description": spec["description"], **schema}
    return OutputFormat("json_schema", str(spec.get("name") or ""), schema, where)


# Describing them to the app...

_TOOLS_TEXT = """\
You can call the tools below. They are run for you: you only write the call.

<tools>
{tools}
</tools>

To call a tool, write a block like this, with the tool's name and its arguments, a \
JSON object that fits the tool's parameters:

<tool_call>
{{"name": "<name>", "arguments": {{<arguments>}}}}
</tool_call>

{number} Never make up a result, and call no tool that is not listed. If you need no \
tool, answer as usual, without such a block."""
_SEVERAL = """\
For several calls write several blocks. Stop after the last one: the results come in \
the next message."""
_ONE = "Write one block only. Stop after it: the result comes in the next message."
MUST_CALL = "This time you must call a tool: write nothing but the blocks."
_NO_TOOLS_TEXT = "Write no <tool_call> block this time: answer without one."
_FORMAT_TEXT = """\
Write your final answer as JSON and nothing else: {what}, without an introduction, an \
explanation or a code fence."""
_SCHEMA_TEXT = " It must be valid against this JSON Schema:\n\n"
_RETRY_TEXTS = {  # by whether a call is required, and so no JSON
    True: "Your last answer calls no tool, but it must. {reason} Write the "
    "<tool_call> block and nothing else.",
    False: "Your last answer is not the JSON that was asked for: {reason}. "
    "Write the whole JSON again, corrected, and nothing else.",
}
_ALL_WORDS = (_TOOLS_TEXT, MUST_CALL, _NO_TOOLS_TEXT, _FORMAT_TEXT)
_WORDS_BEGIN = tuple(text.partition("{")[0] for text in _ALL_WORDS)
RETRY_BEGINS = tuple(text.partition("{")[0] for text in _RETRY_TEXTS.values())


def describe_tools(tools: Sequence[Tool], mode: str, *, is_serial: bool = False) -> str:
    """What the app is told of the tools that `parse_tools` gives, "" for nothing."""
    if not tools:
        return _NO_TOOLS_TEXT if mode == "none" else ""
    fields, lines = ("name", "description", "parameters"), []
    for tool in tools:
        kind = {"type": "custom"} if tool.is_custom else {}  # for `told_ask`
        inside = {"namespace": tool.namespace} if tool.namespace else {}  # likewise
        about = {**kind, **inside, **{name: getattr(tool, name) for name in fields}}
        lines.append(json_text(about))
    number = _ONE if is_serial else _SEVERAL
    words = _TOOLS_TEXT.format(tools="\n".join(lines), number=number)
    return f"{words} {MUST_CALL}" if mode == "required" else words


def told_ask(text: str) -> Ask:
    """The tools and the output format that the app is told of in a text.

    Of several lists of tools the last one counts; of a format only its kind is known.
    """
    _, is_json, what = text.rpartition(_FORMAT_TEXT.partition("{")[0])
    schema = {"type": "object"} if what.startswith("one JSON object") else {}
    output = OutputFormat("json_schema", schema=schema) if is_json else AS_TEXT
    _, opener, rest = text.rpartition(_TOOLS_TEXT.partition("{")[0])
    lines, closer, rest = rest.partition("\n</tools>\n")
    rows = [read_json_object(t) or {} for t in lines.split("\n") if opener and closer]
    spaces = {str(row.get("name")): str(row.get("namespace") or "") for row in rows}
    tools = [replace(t, namespace=spaces.get(t.name, "")) for t in _parse_tools(rows)]
    told = Ask("", (), tools=(*tools,), is_serial=_ONE in rest, output=output)
    return told._replace(tool_mode="required") if MUST_CALL in text else told


def without_words(system: str) -> str:
    """A system text without what `with_words` puts behind it."""
    for begin in _WORDS_BEGIN:
        system, _, _ = system.partition(begin)
    return system.rstrip()


def describe_call(call: ToolCall) -> str:
    """A call as the app is to write it, for the history of a conversation."""
    name = json_text(call.name)
    arguments = call.arguments.strip() or "{}"
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'


def describe_format(output: OutputFormat) -> str:
    """What the app is told of the output format, "" for plain text."""
    if output.kind == "text":
        return ""
    what = "one JSON object" if output.schema.get("type") == "object" else "one value"
    what += f" ({output.name})" if output.name else ""
    words = _FORMAT_TEXT.format(what=what)
    if output.kind == "json_schema":
        words += _SCHEMA_TEXT + json_text(output.schema)
    return words


def with_words(ask: Ask, place: str) -> Ask:
    """The question with the words about its tools and its output's format.

    Args:
        ask: the question.
        place: of the words about tools, one of TOOLS_PLACES.

    Raises:
        BadRequest: a call is required, but the tools are "off".
    """
    if place == "off":
        if ask.tool_mode == "required":
            problem = "Tools are switched off for this model."
            raise BadRequest(problem, param="tool_choice", code="unsupported_parameter")
        ask, tools = ask._replace(tools=()), ""
    else:
        has_called = any([m.tool_calls or m.role == "tool" for m in ask.messages])
        mode = "none" if has_called and not ask.tools else ask.tool_mode
        tools = describe_tools(ask.tools, mode, is_serial=ask.is_serial)
    if place == "inputs" and tools:
        ask, tools = ask._replace(inputs={**ask.inputs, "tools": tools}), ""
    words = filter(None, (ask.system, tools, describe_format(ask.output)))
    system = "\n\n".join(words)
    return ask if system == ask.system else ask._replace(system=system)


def retry_text(ask: Ask, reason: str) -> str:
    """What the app is told in its second and last try: why the last answer is unfit."""
    return _RETRY_TEXTS[ask.tool_mode == "required"].format(reason=reason)


def is_retry(text: str) -> bool:
    """Whether a question is what `retry_text` says."""
    return text.startswith(RETRY_BEGINS)


# Finding calls in the answer...

# How calls are written: our way (Hermes', Qwen's), then Anthropic's, DeepSeek's, GLM's,
# MiniMax's, Seed's, Mistral's, Llama's, Kimi's, Qwen-Agent's, and that of a history
# that was folded into a query.
_MARKERS = (
    *("<tool_call", "<tools>", "<tool_use>", "<function_call"),
    *("<function=", "<function ", "<invoke ", "<antml:"),
    *("<｜DSML｜", "<｜tool", "<|tool▁call", "<|tool_call", "<message "),
    *("<minimax:tool_call>", "<seed:tool_call>"),
    *("<|python_tag|>", "[TOOL_CALLS]", "✿FUNCTION✿", "```"),
)
_FENCE, _SIGNS = re.compile("`{1,3}"), re.compile(r"```|[<\[{`✿]")  # in code; elsewhere
_BEGINNINGS = {marker[:size] for marker in _MARKERS for size in range(1, len(marker))}
_LONGEST = max(map(len, _MARKERS))
_CONTEXT_CHARS = 80  # before JSON, that tell whether a call can stand there
_MAX_PIECE_CHARS = 4096  # read at once: what follows a marker is copied for each
_MAX_BLANK = 1000  # that is looked through; a model that is stuck writes more
_MAX_REREAD = 16_384  # in what turns out to be no blocks; the rest is text then
_TOKEN = re.compile(
    r"""(?P<space>[\s;,}\]]+)
    |(?P<opener><(?:\w+:|｜DSML｜)?(?:tool_calls?|tools|tool_use|function_calls?)>
        |<[|｜](?!/)[^<>|｜]{1,40}(?<!end)(?<!_id)[|｜]>|\[TOOL_CALLS\]|\[ARGS\]
        |✿[A-Z]+✿:?
        |<(?:(?:antml:|｜DSML｜)?(?:invoke|function|tool_call)(?:=|\ +name\ *=\ *)["']?
        |message\s[^<>]*?\btool_call=")(?P<name>[\w.-]+)(?![\w.-])[^<>]*>)
    |(?P<parameter>
        <(?P<tag>(?:antml:|｜DSML｜)?parameter)(?:=|\ +name\ *=\ *)
            ["']?(?P<key>[\w.-]+)(?![\w.-])[^<>]*>
        |<arg_key>(?P<arg_key>[^<>]{1,200})</arg_key>\s{0,200}<(?P<arg_tag>arg_value)>)
    |(?P<closer></(?:\w+:|｜DSML｜)?(?:tool_calls?|tools|tool_use|function_calls?|function
        |invoke|message)>|<[|｜][^<>|｜]{1,40}[|｜]>)
    |(?P<fence>```[\w-]{0,40}[ \t]*)
    |(?P<json>[\[{])
    |(?P<word>[\w.-]{1,200}(?::\d{0,9})?)""",
    re.VERBOSE,
)
_UNFINISHED = re.compile(  # tokens that may be whole when more text comes
    r"<[^<>]{0,200}\Z|<arg_key>[^<>]{0,200}(?:</?[^<>]{0,20}(?:>\s{0,200})?){0,2}\Z"
    r"|\[[A-Z_]{0,10}\Z|✿[A-Z]{0,10}✿?\Z|`{1,2}\Z|```[\w-]{0,40}[ \t]*\Z"
)
_FENCES = ("", "json", "json5", "jsonc", "xml", "tool_call", "tool_calls", "tool_code")
QUOTES = ("`", '"', "'", "“", "‘", "「", "\\")
_LEADS = tuple(":.!?*：。！？")
_QUOTED_MARKER = re.compile(r"[`\"'“‘「\\]<[^<>]{1,40}>\s*\Z")
_HEAD = re.compile(  # of JSON: its first key, and how the value of that one begins
    r"(?:\[\s{0,40})?(?:\{\s{0,40}[\"']?(?P<key>\w{0,40})[\"']?\s{0,8}"
    r"(?::\s{0,40}(?P<value>[\[{]|[\"'][^\"'\\]{0,99}[\"']?)?)?)?"
)
_NAMES = ("name", "tool", "tool_name", "function", "function_name", "recipient_name")
_ARGUMENTS = ("arguments", "args", "parameters", "params", "input", "tool_input")
_INNER = (
    *("tool_calls", "function_calls", "tool_uses", "calls"),
    *("tool_call", "function_call", "function", "tool"),
)
_CALL_KEYS = {*_NAMES, *_ARGUMENTS, "id", "type", "call_id", "tool_call_id", "index"}
_FIRST_VALUES = {  # by the first key of a call: how its value begins
    **dict.fromkeys((*_INNER, "arguments"), ("{", "[")),
    "type": ("function", "tool_"),
    "id": ("call_",),
}
_NEXT_PARAMETER = re.compile(
    r"\n<(?:antml:|｜DSML｜)?parameter(?:=|\ +name\ *=\ *)[\"']?(?P<key>[\w.-]+)"
)

_Calls = list[tuple[Tool, dict[str, Any]]]


class CallReader:
    """Finds the tool calls in an answer; other parts go through.

    Text that may be a call is held back until that is certain, or until a part comes
    that is neither text nor reasoning. Call `feed` with parts as they come, then
    `close`, which may be called again. `found` counts the calls so far; those beyond
    `most` are dropped. White space before the first call, between calls and after the
    last one is dropped where no text stands beside it.
    """

    def __init__(self, tools: Sequence[Tool], ids: Iterator[str], most: float) -> None:
        self.found = 0
        self.most = most
        leads = ("functions.", "")  # some models put the first before each name
        self._tools = {lead + tool.name: tool for lead in leads for tool in tools}
        self._only_tool = tools[0] if len(tools) == 1 else None
        self._work = _Work()  # of telling what the parameters are
        self._ids = ids
        self._text = ""  # that is not given on yet
        self._block: _Block | None = None  # what the text begins with
        self._is_code = False  # up to the next fence
        self._tail = ""  # of what was given on: the context of a marker
        # Characters from here on that were no block, and how many were read for that.
        self._looked_at = self._reread = 0
        self._blank: str | None = ""  # white space after a call; None after text

    def feed(self, parts: Iterable[Part]) -> list[Part]:
        """The parts that are certain now."""
        done: list[Part] = []
        for part in parts:
            if isinstance(part, Text):
                for at in range(0, len(part.text), _MAX_PIECE_CHARS):
                    self._text += part.text[at : at + _MAX_PIECE_CHARS]
                    self._read(done, is_last=False)
            else:
                held = [] if isinstance(part, Reasoning) else self.close()
                done += [*held, part]
            if isinstance(part, Recast):  # what comes follows other text
                self._is_code, self._tail = False, ""
        return done

    def close(self) -> list[Part]:
        """What is still held back, as if no more text came."""
        done: list[Part] = []
        self._read(done, is_last=True)
        if self._blank and not self.found:
            done.append(Text(self._blank))
            self._blank = None
        return done

    def bare_call(self, text: str) -> list[Part]:
        """The call that is meant by arguments alone, where one had to be made.

        It is certain if there is one tool only, and they are whole, fit it, have no key
        but its own, and no other JSON stands beside them.
        """
        done: list[Part] = []
        if tool := self._only_tool:
            output = OutputFormat("json_schema", schema=tool.parameters)
            reader = JsonReader(output)
            reader.feed([Text(text)])
            arguments = read_json_object(reader.text) or {}
            others = {*arguments} - {*_properties(tool)}
            is_alone = not {*"[]{}"} & {*text.replace(reader.text, "", 1)}
            fits = not (others or json_problem(reader.text, output))
            if arguments and is_alone and fits:
                self._add_calls(done, [(tool, arguments)])
        return done

    def _read(self, done: list[Part], *, is_last: bool) -> None:
        """Add what is certain now to `done`."""
        while block := self._block or self._find_block(done, is_last):
            is_over = block.read(self._text, is_last=is_last)
            self._block = None if is_over else block
            if block.taken:
                self._add_calls(done, block.calls)
                block.calls = []
            if not is_over:
                return
            self._pass(block.taken)
            if not block.taken:  # but calls may stand behind its first sign
                self._is_code = self._text.startswith("```")
                first = 3 if self._is_code else 1
                self._reread = block.reach + (self._reread if self._looked_at else 0)
                self._looked_at = max(self._looked_at, block.reach)
                is_much = self._reread >= _MAX_REREAD
                self._give(done, max(first, block.reach) if is_much else first)

    def _find_block(self, done: list[Part], is_last: bool) -> _Block | None:
        """Give the text on up to what begins as calls do; None if nothing does yet."""
        text, end = self._text, 0
        while found := (_FENCE if self._is_code else _SIGNS).search(text, end):
            at, end = found.span()
            if text[at : at + _LONGEST] in _BEGINNINGS and not is_last:
                self._give(done, at)
                return None
            if self._is_code:
                self._is_code = found[0] != "```"
            elif self._may_be_call(text, at):
                self._give(done, at)
                return _Block(self._tools, self._work)
        self._give(done, len(text))
        return None

    def _may_be_call(self, text: str, at: int) -> bool:
        """Whether a marker or JSON stands here, where a call can stand."""
        before = (self._tail + text[max(at - _CONTEXT_CHARS, 0) : at])[-_CONTEXT_CHARS:]
        if text.startswith(_MARKERS, at):
            return text[at] not in "<✿" or not before.endswith(QUOTES)
        line = before.rpartition("\n")[2].rstrip(" \t")
        is_json = text[at] in "[{" and not _QUOTED_MARKER.search(before)
        return is_json and (not line or line.endswith(_LEADS))

    def _add_calls(self, done: list[Part], calls: _Calls) -> None:
        for tool, arguments in calls:
            self.found += 1
            self._tail = self._blank = ""
            if self.found <= self.most:
                about = (json_text(arguments), tool.is_custom, tool.namespace)
                done.append(ToolCall(next(self._ids), tool.name, *about))

    def _give(self, done: list[Part], size: int) -> None:
        """Give so much of the text on, but not white space beside calls."""
        text = self._pass(size)
        self._tail = (self._tail + text)[-_CONTEXT_CHARS:]
        if self._blank is not None:
            text = self._blank + text
            self._blank = None if text.strip() or len(text) > _MAX_BLANK else text
        if not text or self._blank is not None:
            return
        last = done[-1] if done else None
        if isinstance(last, Text) and len(last.text) < _MAX_PIECE_CHARS:
            done[-1] = Text(last.text + text)
        else:
            done.append(Text(text))

    def _pass(self, size: int) -> str:
        """Go on behind so much of the text, which is returned."""
        text, self._text = self._text[:size], self._text[size:]
        self._looked_at = max(0, self._looked_at - size)
        return text


class _Unfinished(Exception):
    """More text must come before it is certain how this goes on."""


class _Block:
    """Text that begins as calls do, read token by token as it grows.

    `calls` are those that nobody has taken from it yet. They are certain once some text
    is `taken`: so many characters of it are calls. A method that takes a token raises
    ValueError or LookupError if it can't be part of calls, RecursionError if they would
    stand in too many lists.
    """

    def __init__(self, tools: Mapping[str, Tool], work: _Work) -> None:
        self.calls: _Calls = []
        self.taken = 0
        self._tools, self._work = tools, work
        self._text, self._at, self._is_last = "", 0, False
        self._is_tagged = self._is_fenced = False
        self._tool: Tool | None = None  # whose call has begun
        self._given: dict[str, Any] = {}
        self._value = _ValueEnd()  # of the JSON or the parameter that comes next

    def read(self, text: str, *, is_last: bool) -> bool:
        """Go on with the whole text so far; whether the block is over."""
        self._text, self._is_last = text, is_last
        try:
            while self._at < len(text):
                self._take_token()
        except _Unfinished:
            return is_last
        except (ValueError, LookupError, RecursionError):
            return True
        if is_last:
            if self._tool and self._given:
                self._finish([(self._tool, self._given)], self._at)
            if not self._tool and (self.calls or self.taken):
                self.taken = self._at  # empty markup goes, too
        return is_last

    @property
    def reach(self) -> int:
        """How far it has looked."""
        return max(self._at, self._value.reach)

    def _take_token(self) -> None:
        if not self._is_last and _UNFINISHED.match(self._text, self._at):
            raise _Unfinished
        token = _TOKEN.match(self._text, self._at)
        if not token:
            raise ValueError
        if token.lastgroup != "space":
            getattr(self, f"_take_{token.lastgroup}")(token)
        self._at = max(self._at, token.end())  # a value ends behind its first token

    def _take_opener(self, token: re.Match[str]) -> None:
        if self._tool and self._given:  # that call was not closed
            self._finish([(self._tool, self._given)], self._at)
        if token["name"]:
            self._tool = self._tools[token["name"]]
        self._is_tagged = not self._is_fenced

    def _take_word(self, token: re.Match[str]) -> None:
        """The tool's name, bare: `functions.get_weather:0`."""
        if not self._is_tagged or self._tool:
            raise ValueError
        if token.end() == len(self._text) and not self._is_last:
            raise _Unfinished
        if token[0] != "function":  # that leads DeepSeek's
            self._tool = self._tools[token[0].partition(":")[0]]

    def _take_parameter(self, token: re.Match[str]) -> None:
        tool = self._tool
        if not tool:
            raise ValueError
        closer = f"</{token['tag'] or token['arg_tag']}>"
        end = self._text.find(closer, max(self._value.reach, token.end()))
        if end < 0:
            self._value.reach = len(self._text) - len(closer) + 1
            raise _Unfinished
        key = token["key"] or token["arg_key"].strip()
        for other in _NEXT_PARAMETER.finditer(self._text, token.end(), end):
            if other["key"] in _properties(tool):  # the closer before it is missing
                end, closer = other.start(), ""
                break
        text = re.sub(r"\A\n|\n\Z", "", self._text[token.end() : end])
        self._given[key] = _typed(tool, key, text, self._work)
        self._at, self._value = end + len(closer), _ValueEnd()

    def _take_closer(self, token: re.Match[str]) -> None:
        if self._tool:
            self._finish([(self._tool, self._given)], token.end())
        elif self.taken:  # empty markup goes, too
            self.taken = token.end()
        self._is_tagged = False

    def _take_fence(self, token: re.Match[str]) -> None:
        language, end = token[0].strip("` \t").lower(), token.end()
        if self._is_tagged or not self._at:
            self._is_fenced = not self._is_tagged
            if language in _FENCES:
                return
        elif self._is_fenced and not language and self.calls:
            self.taken = end  # here the block ends
        elif self.taken and not self._text[end : end + _MAX_BLANK].strip():
            if self._is_last:  # it is a stray one, and closes nothing
                return
            raise _Unfinished
        raise ValueError

    def _take_json(self, _token: re.Match[str]) -> None:
        if not (self._tool or self._is_tagged):
            self._expect_call()
        end = self._value.find(self._text, self._at)
        if not end and not self._is_last:
            raise _Unfinished
        end = end or len(self._text)
        if not self._is_tagged and not self._is_fenced:
            self._expect_end(self._text[end : end + _MAX_BLANK])
        calls = self._calls_in(parse_sloppy_json(self._text[self._at : end]))
        self._finish(calls, end)

    def _expect_call(self) -> None:
        """JSON must begin as a call does."""
        head = cast("re.Match[str]", _HEAD.match(self._text, self._at))
        key, value = head["key"], (head["value"] or "").lstrip("\"'")
        starts, is_name = _FIRST_VALUES.get(key, ()), key in _NAMES
        name = value[:-1] if is_name else ""  # without its quote
        is_call = name in self._tools or value.startswith(starts)
        may_be_one = is_name or starts or not head["value"]
        if not (is_call or (may_be_one and head.end() == len(self._text))):
            raise ValueError

    def _expect_end(self, rest: str) -> None:
        """JSON followed by this must not be part of other JSON, or of a sentence."""
        if not rest.replace(";", "").strip():
            if not self._is_last and len(rest) < _MAX_BLANK:
                raise _Unfinished
        elif not re.match(r"\s*(?:(?:;\s*)?[{\[<`]|\n\s*[^\s,\]}])", rest):
            raise ValueError

    def _calls_in(self, value: Any) -> _Calls:
        """The calls that a value makes; raises if it is not only calls of tools."""
        if self._tool:
            return [(self._tool, _arguments(value, self._tool))]
        if isinstance(value, list) and value:
            return [call for item in value for call in self._calls_in(item)]
        if not isinstance(value, dict):
            raise ValueError
        inner = [value[k] for k in _INNER if isinstance(value.get(k), (dict, list))]
        if inner:
            return self._calls_in(inner[0])
        # In a tag, what has arguments is no definition, and no data.
        is_call = self._is_tagged and "arguments" in value
        if not is_call and value.keys() - _CALL_KEYS:
            raise ValueError
        name, *_ = (value[key] for key in _NAMES if isinstance(value.get(key), str))
        tool = self._tools[name]
        given = [value[key] for key in _ARGUMENTS if key in value]
        given += [{}] if self._is_tagged else []
        return [(tool, _arguments(given[0], tool))]

    def _finish(self, calls: _Calls, end: int) -> None:
        self.calls += calls
        self._tool, self._given, self._value = None, {}, _ValueEnd()
        self._at = end
        if not self._is_fenced:  # it may still hold other things
            self.taken = end


def _arguments(given: Any, tool: Tool) -> dict[str, Any]:
    """A call's arguments from an object, JSON text or nothing; else ValueError.

    A custom tool may be given its text as it is.
    """
    if tool.is_custom and isinstance(given, str) and given.lstrip()[:1] != "{":
        return {"input": given}
    if isinstance(given, str) and given.strip():
        given = parse_sloppy_json(given)
    value: dict[str, Any] = {} if given in (None, "") else given
    if not isinstance(value, dict):
        raise ValueError
    described = {"type", "properties"}  # by the words for a tool
    if described <= value.keys() and not described <= _properties(tool).keys():
        raise ValueError
    return value


def _properties(tool: Tool) -> dict[str, Any]:
    return object_of(tool.parameters.get("properties"))


def _typed(tool: Tool, key: str, text: str, work: _Work) -> Any:
    """A parameter written as an element: JSON, unless only a string will do."""
    schema, root = object_of(_properties(tool).get(key)), tool.parameters
    if schema.get("type") != "string":
        with contextlib.suppress(ValueError):
            value = parse_sloppy_json(text)
            is_text = not schema_problems(text, schema, root, work)
            if not (is_text and schema_problems(value, schema, root, work)):
                return value
    return text


# Finding where a JSON value ends...

_VALUE_SIGN = re.compile(r"\\.|[\"'{}\[\]<`]", re.DOTALL)
_DEPTHS = {"{": 1, "[": 1, "}": -1, "]": -1}


class _ValueEnd:
    """Finds the end of a JSON value, sloppy ones included, in text that grows.

    `reach` is how far it has looked.
    """

    def __init__(self) -> None:
        self.reach = self._end = self._depth = 0
        self._quote = ""

    def find(self, text: str, start: int) -> int:
        """Where the value that begins at `start` ends, 0 for not yet."""
        if self._end:
            return self._end
        for sign in _VALUE_SIGN.finditer(text, max(self.reach, start)):
            self.reach, mark = sign.end(), sign[0]
            if self._quote or mark in "\"'":
                self._quote = "" if mark == self._quote else self._quote or mark
                continue
            self._depth += _DEPTHS.get(mark, 0)
            if mark in "<`" or (mark in "}]" and self._depth <= 0):
                # A tag or a fence where JSON has none: braces are missing.
                self._end = sign.start() if mark in "<`" else sign.end()
                return self._end
        self.reach = max(self.reach, len(text) - 1)
        return 0


# Cutting the answer at a stop text...


class StopReader:
    """Cuts an answer before the first of its stop texts; other parts go through.

    There is at least one, and none is empty. Of several the one counts that is complete
    first, as for a model that stops there. With the cut the answer is over, however the
    app would have ended it: only its Citations and Usage still go through, if they have
    come, and a Finish follows.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.is_cut = False
        self._stops = stops
        self._held = ""

    def feed(self, parts: Iterable[Part]) -> list[Part]:
        """The parts that are certain now; no more may come once it `is_cut`."""
        done: list[Part] = []
        for part in parts:
            if isinstance(part, Text) and not self.is_cut:
                done += self._cut(self._held + part.text)
            elif not self.is_cut or isinstance(part, (Citations, Usage)):
                held = [] if isinstance(part, Reasoning) else self.close()
                done += [*held, part]
        if self.is_cut:
            is_known = any(isinstance(part, Usage) for part in done)
            done += [Finish()] if is_known else [NO_USAGE, Finish()]
        return done

    def close(self) -> list[Part]:
        """What is still held back, as if no more text came."""
        held, self._held = self._held, ""
        return [Text(held)] if held else []

    def _cut(self, text: str) -> list[Part]:
        found = [(text.find(stop), stop) for stop in self._stops]
        ends = [(at + len(stop), at) for at, stop in found if at >= 0]
        self.is_cut = bool(ends)
        begun = (_begun_at(text, stop) for stop in self._stops)
        size = min(ends)[1] if ends else min(begun)
        self._held = "" if ends else text[size:]
        return [Text(text[:size])] if size else []


def _begun_at(text: str, stop: str) -> int:
    """Where `stop` may have begun at the text's end; the text's length if nowhere."""
    first = max(len(text) - len(stop) + 1, 0)
    starts = (at for at in range(first, len(text)) if stop.startswith(text[at:]))
    return next(starts, len(text))


# Taking the JSON out of the answer...

# How JSON begins: for certain, where a group is matched; else more text must tell.
_OBJECT = r"\{\s{0,999}(?:([\"}])|\Z)"
_ARRAY = r"\[\s{0,999}(?:([\"{\[\]\dtfn-])|\Z)"


class JsonReader:
    """Passes on the JSON in an answer, without fences and talk, and the other parts.

    `text` is the JSON so far, "" until some has begun; `talk` is the text until then.
    At the end `json_problem` tells whether it is whole and valid.
    """

    def __init__(self, output: OutputFormat) -> None:
        self.text = ""
        self.talk = KeptText()
        is_object = output.schema.get("type") == "object"
        self._start = re.compile(_OBJECT if is_object else f"{_OBJECT}|{_ARRAY}")
        self._held = ""
        self._value = _ValueEnd()
        self._is_over = False

    def feed(self, parts: Iterable[Part]) -> list[Part]:
        """The parts that are certain now."""
        done: list[Part] = []
        for part in parts:
            if isinstance(part, Recast):  # what was read was reasoning
                # The client has it: nothing can follow.
                self._is_over |= bool(self.text)
                self.text = self._held = ""
                self.talk = KeptText()
            elif not isinstance(part, Text):
                done.append(part)
            elif more := self._read(part.text):
                done.append(Text(more))
        return done

    def _read(self, text: str) -> str:
        if self._is_over:
            return ""
        self._held += text
        if not self.text:
            self.talk.add(text)
            start = self._start.search(self._held)
            self._held = self._held[start.start() :] if start else ""
            if not (start and start.lastindex):
                return ""
        end = self._value.find(self._held, 0)
        self._is_over = bool(end)
        before, self.text = self.text, self._held[: end or None]
        return self.text[len(before) :]


def extract_json(text: str, output: OutputFormat) -> tuple[str, str]:
    """(the valid JSON text in a whole answer, "") or ("", what is wrong with it)."""
    reader = JsonReader(output)
    reader.feed([Text(text)])
    source = reader.text or text[max(text.find("{"), 0) :].strip()
    source = source[: _ValueEnd().find(source, 0) or None]
    try:
        parse_json_text(source)
    except ValueError:
        with contextlib.suppress(ValueError):
            source = json_text(parse_sloppy_json(source))
    problem = json_problem(source, output)
    return ("" if problem else source), problem


def json_problem(text: str, output: OutputFormat) -> str:
    """What is wrong with JSON text, "" if it is what was asked for."""
    if not text:
        return "there is no JSON in it"
    try:
        value = parse_json_text(text)
    except ValueError as error:
        return f"it is not valid JSON, {error}"
    return "; ".join(schema_problems(value, output.schema))


# Checking it against a schema...

_MAX_CHECKS = 50_000  # of one answer, a third of a second; what is left passes
_MAX_PROBLEMS, _MAX_TOLD_CHARS = 5, 200  # of a place, and of the rule broken there
_NO_SENSE = (TypeError, AttributeError, ValueError, LookupError, ArithmeticError)
_MAX_PATTERN_CHARS, _PATTERN_CHECKS = 100, 100  # what one may take, in checks


def schema_problems(
    value: Any, schema: Json, root: Json | None = None, work: _Work | None = None
) -> list[str]:
    """The first few breaches of a schema; one that makes no sense forbids nothing.

    It is a part of `root`, if that is given: references begin there. `work` was done
    for the same answer before.
    """
    problems: list[str] = []
    found = _Checker(root or schema, work or _Work()).check(value, schema, "$")
    with contextlib.suppress(RecursionError, re.error, *_NO_SENSE):
        for at, keyword, limit in itertools.islice(found, _MAX_PROBLEMS):
            rule = json_text(limit)[:_MAX_TOLD_CHARS]
            broken = f"breaks {keyword} {rule}" if keyword else "is not allowed"
            problems.append(f"{at[:_MAX_TOLD_CHARS]} {broken}")
    return problems


class _Work:
    """Counts the work for an answer in checks, and stops where it is too much."""

    def __init__(self) -> None:
        self._checks = 0

    def spend(self, checks: int) -> None:
        """Do so much more; raises RecursionError where it is too much."""
        self._checks += checks
        if self._checks > _MAX_CHECKS:
            raise RecursionError


class _Checker:
    """Checks values against a JSON Schema: what OpenAI's strict mode knows, and more.

    A keyword that is not known forbids nothing.
    """

    def __init__(self, root: Json, work: _Work) -> None:
        self._root, self._spend = root, work.spend
        self._patterns: set[str] = set()

    def check(self, value: Any, schema: Any, at: str) -> Iterator[tuple[str, str, Any]]:
        """(where, the keyword that is broken, its rule); "" if the schema is false."""
        self._spend(1 + len(at) // 5000 + _size(schema) // 5)
        if schema is False:
            yield at, "", None
        if not isinstance(schema, dict) or (value is None and schema.get("nullable")):
            return
        for keyword, limit in schema.items():
            if not self._holds(keyword, limit, value, at):
                yield at, keyword, limit
        for item, inner, place in self._inner(value, schema, at):
            yield from self.check(item, inner, place)

    def _matches(self, value: Any, pattern: str) -> bool:
        """Whether text matches; a pattern that could keep the server busy always does.

        It is paid for as compiled once, and searched in cubic time at worst.
        """
        is_text = isinstance(value, str) and len(value) <= _MAX_PATTERN_CHARS
        size = len(value) if is_text else 0
        compiling = 0 if pattern in self._patterns else _PATTERN_CHECKS
        self._patterns.add(pattern)
        self._spend(1 + compiling + len(pattern) // 20 + size**3 // 10_000)
        repeats = len(re.findall(r"[*+?]|\{\d*,", pattern)) - pattern.startswith("^")
        is_nested = re.search(r"\)[*+?{]|\\[1-9]|\(\?", pattern)
        is_unsafe = not is_text or repeats > 2 or is_nested
        return bool(is_unsafe or re.search(pattern, value))

    def _holds(self, keyword: str, limit: Any, value: Any, at: str) -> bool:
        if keyword in ("anyOf", "oneOf"):
            return any(not next(self.check(value, branch, at), ()) for branch in limit)
        if keyword == "pattern":
            return self._matches(value, limit)
        if keyword not in _HOLDS:
            return True
        kind, holds = _HOLDS[keyword]
        size_of = _whole_size if keyword in ("const", "enum") else _size
        self._spend((_size(value) + size_of(limit)) // 20)
        if kind and (isinstance(limit, bool) or not _is_a(value, kind)):
            return True  # such as "exclusiveMinimum": true, of draft 4 and OpenAPI 3.0
        return holds(value, limit)

    def _target(self, ref: str) -> Any:
        """The schema that is referred to; None for an anchor or another document."""
        self._spend(len(ref) // 50)
        document, *steps = ref.split("/")
        target: Any = self._root if document == "#" else None
        for step in steps if target else ():
            target = target.get(step.replace("~1", "/").replace("~0", "~"), {})
        return target

    def _inner(
        self, value: Any, schema: Any, at: str
    ) -> Iterator[tuple[Any, Any, str]]:
        """(value, schema, place) of all that other schemas say, inside or elsewhere."""
        if "$ref" in schema:
            yield value, self._target(schema["$ref"]), at
        for part in schema.get("allOf", ()):
            yield value, part, at
        if isinstance(value, dict):
            for name, item in value.items():
                for rule in self._rules_of(schema, name):
                    yield item, rule, f"{at}.{name}"
        elif isinstance(value, list):
            first, others = schema.get("prefixItems", ()), schema.get("items")
            for index, item in enumerate(value):
                inner = first[index] if index < len(first) else others
                yield item, inner, f"{at}[{index}]"

    def _rules_of(self, schema: Any, name: str) -> list[Any]:
        """The schemas for a property of this name."""
        known = schema.get("properties", {})
        rules = [known[name]] if name in known else []
        for pattern, rule in schema.get("patternProperties", {}).items():
            rules += [rule] if self._matches(name, pattern) else []
        return rules or [schema.get("additionalProperties")]


def _size(value: Any) -> int:
    """How many things there are to look at in a value; a text is compared quickly."""
    if isinstance(value, str):
        return len(value) // 1000
    return len(value) if isinstance(value, (dict, list)) else 1


def _whole_size(value: Any) -> int:
    """The same with all that is in them, as it is compared, up to what is too much."""
    size, inner = 0, [value]
    while inner and size < _MAX_CHECKS * 20:
        one = inner.pop()
        size += _size(one)
        if isinstance(one, (dict, list)):
            inner += one.values() if isinstance(one, dict) else one
    return size


def _is_a(value: Any, kind: Any) -> bool:
    if isinstance(kind, list):
        return any(_is_a(value, option) for option in kind)
    if isinstance(value, bool):
        return bool(kind == "boolean")
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES.get(kind, ()))


def _is_same(value: Any, other: Any) -> bool:
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _is_multiple(value: Any, step: Any) -> bool:
    """Whether a number is a multiple as it is written: 19.99 is one of 0.01."""
    if isinstance(step, int) and isinstance(value, int):
        return value % step == 0
    return isclose(value / step, round(value / step), rel_tol=1e-12)


_TYPES: Mapping[str, Any] = {
    **{"string": str, "object": dict, "array": list, "null": type(None)},
    **{"integer": int, "number": (int, float)},
}
# By keyword: the type of the values that it is for ("": all), and whether a value keeps
# to it.
_HOLDS: Mapping[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "type": ("", _is_a),
    "enum": ("", lambda value, allowed: any(_is_same(value, one) for one in allowed)),
    "const": ("", _is_same),
    "required": ("object", lambda value, names: {*names} <= {*value}),
    "minimum": ("number", operator.ge),
    "maximum": ("number", operator.le),
    "exclusiveMinimum": ("number", operator.gt),
    "exclusiveMaximum": ("number", operator.lt),
    "multipleOf": ("number", _is_multiple),
    "minLength": ("string", lambda value, least: len(value) >= least),
    "maxLength": ("string", lambda value, most: len(value) <= most),
    "minItems": ("array", lambda value, least: len(value) >= least),
    "maxItems": ("array", lambda value, most: len(value) <= most),
}


# All of that, as a request needs it...


def call_ids(message_id: str) -> Iterator[str]:
    """The ids of an answer's calls, in their order."""
    data = message_id.encode("utf-8", "replace")
    answer = hashlib.blake2b(data, digest_size=12).hexdigest()
    return (f"call_{answer}_{number}" for number in count())


def answer_of_call(call_id: str) -> str:
    """What the ids of all calls of its answer begin with; "" if it is none of ours."""
    ours = re.match("call_[0-9a-f]{24}_", call_id)
    return ours[0] if ours else ""


class Reading:
    """Reads an answer as its request demands: calls, stops, JSON.

    Parts go in as the app makes them, and come out as the client is to get them. None
    do while the answer may still prove unfit, since a second try would follow it: a
    stream, until a call has come or the JSON has begun; a whole answer, to its end.

    `problem` says, when the answer is over, why it is unfit, and `usage` what that
    took, with what was `spent` before. The ids of calls follow from a `seed`, the
    message's id, so that an answer that is read again has the same.
    """

    def __init__(self, ask: Ask, seed: str, *, is_whole: bool, spent: Usage) -> None:
        self.problem = ""
        self.usage = self._spent = spent
        self.said = KeptText()  # as the app wrote it
        self._ask = ask
        self._is_required = ask.tool_mode == "required"  # a call, and so no JSON
        self._is_json = ask.output.kind != "text" and not self._is_required
        self.is_plain = not (ask.tools or ask.stops or self._is_json)
        most = 1 if ask.is_serial else inf
        self._calls = CallReader(ask.tools, call_ids(seed), most) if ask.tools else None
        # Cut in half, JSON is none; and what stands around it never reaches the client.
        self._stop = StopReader(ask.stops) if ask.stops and not self._is_json else None
        is_streamed = self._is_json and not is_whole
        # Only a brace or a bracket shows for certain that JSON begins.
        is_shown = is_streamed and ask.output.schema.get("type") in ("object", "array")
        self._json = JsonReader(ask.output) if is_shown else None
        # Whether a part can be given before the end; it can't be taken back.
        self._can_begin = is_shown or (self._is_required and not is_whole)
        self._may_fail = self._is_required or self._is_json  # nothing is given yet
        self._held: list[Part] = []  # until something is
        self._is_replaced = False  # by text that is read no more

    @property
    def is_cut(self) -> bool:
        """Whether a stop was found, and the app need not go on."""
        return bool(self._stop and self._stop.is_cut)

    @property
    def is_short(self) -> bool:
        """Whether the client lacks what the app wrote: the end, or further calls."""
        return self.is_cut or bool(self._calls and self._calls.found > self._calls.most)

    def has_given_all(self, text: str) -> bool:
        """Whether this text is all that the app wrote."""
        return self.is_plain or (self.said.is_whole and self.said.text == text)

    def feed(self, parts: list[Part]) -> list[Part]:
        """The parts that are certain now.

        Raises:
            UpstreamFailed: it is unfit, and the client has a part of it already.
        """
        if self.is_plain:
            return parts
        if Replace in map(type, parts) and not self._is_replaced:
            return self._feed_replaced(parts)
        self.said.add("".join([p.text for p in parts if isinstance(p, Text)]))
        ready = self._read(parts)
        self._held += ready
        end = next((p for p in ready if isinstance(p, (Finish, Failure))), None)
        if self._may_fail and not end:
            has_call = self._calls and self._calls.found
            has_begun = has_call or (self._json and self._json.text)
            self._may_fail = not (self._can_begin and has_begun)
            if self._may_fail:
                return []
        if isinstance(end, Finish) and end.reason != "content_filter":
            self._judge()
        held, self._held = [] if self.problem else self._held, []
        if self._is_required:  # the answer is the call: text is none
            thought = functools.partial(Reasoning, is_inline=True)
            held = [thought(p.text) if isinstance(p, Text) else p for p in held]
        return held

    def _feed_replaced(self, parts: list[Part]) -> list[Part]:
        """The parts of an answer that the app replaces: all text from there as it is.

        The old text takes with it what is held back; the new one says that the answer
        is withheld, so it need be no call and no JSON.
        """
        at = [*map(type, parts)].index(Replace)
        given = self.feed(parts[:at])
        if self.is_cut:  # before
            return given
        self._is_replaced = True
        self._calls = self._stop = self._json = None
        self._is_required = self._is_json = self._may_fail = False
        self._held = [p for p in self._held if isinstance(p, (Reasoning, Media))]
        return given + self.feed(parts[at:])

    def _read(self, parts: list[Part]) -> list[Part]:
        """The parts as the client is to get them, if the answer will do."""
        if self._is_json:  # there is no room for links beside it
            parts = [part for part in parts if not isinstance(part, Media)]
        parts = self._calls.feed(parts) if self._calls else parts
        parts = self._stop.feed(parts) if self._stop else parts
        parts = self._json.feed(parts) if self._json else parts
        return [self._spent + p if isinstance(p, Usage) else p for p in parts]

    def _judge(self) -> None:
        """The answer is over: will it do? Beside a call no JSON is needed."""
        if self._may_fail:
            self._judge_held()
        elif self._json and not (self._calls and self._calls.found):
            problem = json_problem(self._json.text, self._ask.output)
            if problem:
                raise unsatisfied(self._ask, problem)

    def _judge_held(self) -> None:
        """Judge a whole answer, and take the call or the JSON out of it."""
        answer = Answer()  # it knows what was reasoning after all, calls too
        answer.add([part for part in self._held if not isinstance(part, Media)])
        self.usage, text = answer.usage, ""
        if self._is_required:
            if answer.calls:
                return
            answer.add(self._calls.bare_call(answer.text) if self._calls else [])
            names = ", ".join(tool.name for tool in self._ask.tools)
            self.problem = "" if answer.calls else f"Call {names}."
        else:
            reader = self._json
            read = (reader.text or reader.talk.text) if reader else answer.text
            text, problem = extract_json(read, self._ask.output)
            self.problem = "" if answer.calls else problem
        kinds = (Text, Reasoning, Recast, ToolCall)
        rest = [part for part in self._held if not isinstance(part, kinds)]
        self._held = [Reasoning(answer.reasoning), Text(text), *answer.calls, *rest]


def unsatisfied(ask: Ask, reason: str) -> UpstreamFailed:
    """The error where even the second try is not what the request demands."""
    if ask.tool_mode == "required":
        message = f"The app called no tool, although one was required. {reason}"
        param, code = "tool_choice", "tool_choice_unsatisfied"
    else:
        message = f"The app's answer is not the JSON that was asked for: {reason}."
        param, code = ask.output.param, "response_format_unsatisfied"
    error = UpstreamFailed(message, param=param, code=code, is_final=True)
    error.quoted = reason  # names of the app's own making may stand in it
    return error


# ==============================================================================
# 7. Dify
# ==============================================================================
#
# Dify's dialect, both ways: what an app is and wants, questions to request bodies for
# each app mode, events to answer parts. Holds every quirk of Dify's releases from 0.6
# to 1.17, and knows nothing of OpenAI or sockets.
#
#     {"event":"message","answer":"Hel"} …            ->  Text("Hel") …
#     {"event":"message_end","metadata":{"usage":…}}  ->  Usage(…), Finish("stop")
#
# An answer ends with message_end, error or workflow_paused; in a workflow also with
# workflow_finished. In a chatflow message_end comes before that one (1.13.1 and
# later), after it (before 1.13) or never (1.13.0), hence `AnswerReader.is_closing`.
# The end of the body ends nothing, and pings prove nothing. The reader knows the
# events; Blocks, AnswerText and Appendix know what they add to the answer.


# What an app is...


class AppInput(NamedTuple):
    """One field of an app's form; `type` in Dify's words ("text-input", "select").

    `rules` is all that Dify says of it, as of the place for files beside the fields.
    """

    variable: str
    type: str
    rules: Json = MappingProxyType({})


class AppForm(NamedTuple):
    """What `GET /parameters` says of an app: its inputs, files, and speech."""

    inputs: tuple[AppInput, ...] = ()
    uploads: Json = MappingProxyType({})  # rules for files beside these; {}: none may
    limits: Json = MappingProxyType({})  # of sizes, by kinds of files
    hears: bool = True  # speech to text is switched on
    speaks: bool = True  # text to speech is
    voice: str = ""  # its own


NO_FORM = AppForm()  # of an app that was not asked


def parse_form(parameters: Json) -> AppForm:
    """`GET /parameters` to a form; anything missing or odd is left out."""
    entries = objects_of(parameters.get("user_input_form"))
    rows = [row for entry in entries for row in entry.items()]
    named = [(kind, row) for kind, row in rows if object_of(row).get("variable")]
    inputs = tuple(AppInput(str(row["variable"]), kind, row) for kind, row in named)
    names = ("file_upload", "system_parameters", "speech_to_text", "text_to_speech")
    files, limits, hearing, speaking = (object_of(parameters.get(n)) for n in names)
    hears, speaks = (bool(rules.get("enabled", True)) for rules in (hearing, speaking))
    voice, uploads = str(speaking.get("voice") or ""), _upload_rules(files)
    return AppForm(inputs, uploads, limits, hears, speaks, voice)


def _upload_rules(files: Json) -> dict[str, Any]:
    """The rules for files beside the inputs; {} where none may be: Dify drops them."""
    images = object_of(files.get("image"))
    is_on = files.get("enabled") or images.get("enabled")
    kinds = files.get("allowed_file_types") or ["image"]
    return {**images, **files, "allowed_file_types": kinds} if is_on else {}


_QUERY_NAMES = ("query", "input", "prompt", "question", "text")
_TEXT_TYPES = ("text-input", "paragraph")
_FILE_TYPES = ("file", "file-list")


def query_variable(mode: str, form: AppForm, app: AppSettings) -> str:
    """The input that takes the user's text; "" in a chat, where the query does.

    It is one that is filled with something else, or hidden from users since its value
    is known, only if there is no other.

    Raises:
        WrongMode: the app has none; the message lists what it has.
    """
    if mode in CHAT_MODES:
        return ""
    if app.query_variable:
        return app.query_variable
    texts = [row for row in form.inputs if row.type in _TEXT_TYPES]
    texts = [row for row in texts if row.variable not in app.filled] or texts
    texts = [row for row in texts if not row.rules.get("hide")] or texts
    names = [row.variable for row in texts]
    usual = [name for name in _QUERY_NAMES if name in names]
    required = [row.variable for row in texts if row.rules.get("required")]
    if texts:
        return (usual or (required if len(required) == 1 else names))[0]
    if mode == "completion":
        return "query"
    problem = "This app has no text input that could take the message."
    cure = "Add one, or set `query_variable` to any name: Dify ignores unknown ones."
    raise WrongMode(f"{problem} {cure} {describe_inputs(form)}")


def describe_inputs(form: AppForm) -> str:
    """A sentence for error messages: each input, its type and its options."""
    if not form.inputs:
        return "The app declares no inputs."
    described = []
    for input_ in form.inputs:
        need = ", required" if input_.rules.get("required") else ""
        options = ", ".join(_texts(input_.rules.get("options")))
        choice = f", one of {options}" if options else ""
        described.append(f"{input_.variable} ({input_.type}{need}{choice})")
    return f"The app's inputs are: {'; '.join(described)}. Send them as `inputs`."


# Files for the app...


def check_files(form: AppForm, files: Sequence[Attachment], given: Json) -> None:
    """Refuse files that the app would refuse, or lose, before they are uploaded.

    Args:
        form: the app's.
        files: that go with one message.
        given: inputs that the request has already.

    Raises:
        BadRequest: it names the file, and the limit.
    """
    if problem := _problem_with(form, files, given):
        raise BadRequest(problem, param="messages", code="invalid_value")


def has_room(form: AppForm, files: Sequence[Attachment], given: Json) -> bool:
    """Whether the app surely takes these files; the arguments of `check_files`.

    One, where Dify does not say how many.
    """
    rules, rows = form.uploads, [row for row in form.inputs if row.type in _FILE_TYPES]
    sizes = {row.variable: _most_in(row) or 1 for row in rows}
    most = (count_of(rules.get("number_limits")) or 1) if rules else sum(sizes.values())
    if len(files) > most:
        return False  # without a look at each: many are asked about many times
    if not rules:  # only those inputs have room that take some of them
        inputs, _ = place_files(form, files, given)
        most = sum(map(sizes.__getitem__, inputs))
    return len(files) <= most and not _problem_with(form, files, given)


def _problem_with(form: AppForm, files: Sequence[Attachment], given: Json) -> str:
    """What to say of the first file that can't be sent; "" if all can."""
    rules, (_, beside) = form.uploads, place_files(form, files, given)
    limit = count_of(rules.get("number_limits")) or len(files)
    problems = [(file, _problem_beside(form, file)) for file in beside[:limit]]
    problems += [(f, f"the app takes {limit} files at a time") for f in beside[limit:]]
    problems += [(file, _size_problem(form, file)) for file in files]
    said = [f"The file {f.name!r} can't be sent: {p}." for f, p in problems if p]
    return said[0] if said else ""


def describe_uploads(form: AppForm) -> str:
    """Which files may go beside the inputs, "" if none may."""
    return _limits_in(form.uploads, count_of(form.uploads.get("number_limits")))


def _limits_in(rules: Json, most: int) -> str:
    limits = _kinds_in(rules), f"{most} at a time" if most else ""
    return "; ".join(filter(None, limits))


def size_limit_mb(form: AppForm, file: Attachment) -> int:
    """How many MB a file of this kind may have; 0 if the app does not say."""
    kind = file_kind(file)
    name = "file" if kind in ("document", "custom") else f"{kind}_file"
    return count_of(form.limits.get(f"{name}_size_limit"))


def _size_problem(form: AppForm, file: Attachment) -> str:
    limit_mb, size = size_limit_mb(form, file), file.size or len(file.data)
    is_large = limit_mb and size > limit_mb << 20
    return f"it is too large: the app takes {limit_mb} MB" if is_large else ""


def _problem_beside(form: AppForm, file: Attachment) -> str:
    """Why a file can't go beside the inputs; "" if it can."""
    if not (rules := form.uploads):
        none = "the app takes no files beside its inputs, and has no file input left"
        rows = [row for row in form.inputs if row.type in _FILE_TYPES]
        told = [f"{r.variable}: {_limits_in(r.rules, _most_in(r))}" for r in rows]
        there = f" ({'. '.join(told)})" if told else ""
        return f"{none} that takes it{there}; switch file upload on in Dify"
    if not _kind_among(file, rules):
        kind = file_kind(file).replace("custom", f".{file.extension}")
        return f"the app takes files of type {_kinds_in(rules)}, not {kind}"
    methods = _texts(rules.get("allowed_file_upload_methods"))
    methods = methods or _texts(rules.get("transfer_methods"))
    method = "remote_url" if file.url and not file.upload_id else "local_file"
    if not methods or method in methods:
        return ""
    no_urls = "the app takes no URLs; send the file's data"
    return no_urls if method == "remote_url" else "the app takes URLs only"


def place_files(
    form: AppForm, files: Iterable[Attachment], given: Json
) -> tuple[dict[str, Any], list[Attachment]]:
    """Where files go in a request: the app's file inputs first.

    Args:
        form: the app's.
        files: uploaded, or to go by their URL; of others the inputs are of no use.
        given: inputs that the request has already.

    Returns:
        ({file input: mapping or list}, the files that no input takes)
    """
    rest = list(files)
    inputs: dict[str, Any] = {}
    for input_ in form.inputs:
        if input_.type in _FILE_TYPES and input_.variable not in given:
            placed: list[dict[str, str]] = []
            waiting, rest = rest, []
            for file in waiting:
                kind = _kind_among(file, input_.rules)
                if kind and len(placed) < (_most_in(input_) or inf):
                    placed.append(_file_mapping(file, kind))
                else:
                    rest.append(file)
            if placed:
                inputs[input_.variable] = placed[0] if input_.type == "file" else placed
    return inputs, rest


def _most_in(input_: AppInput) -> int:
    """How many files a file input takes; 0 for a list of which Dify does not say it."""
    return 1 if input_.type == "file" else count_of(input_.rules.get("max_length"))


def files_beside(form: AppForm, files: Iterable[Attachment]) -> list[Any]:
    """The files that no input takes, as a request's `files`."""
    return [_file_mapping(file, _kind_among(file, form.uploads)) for file in files]


def _file_mapping(file: Attachment, kind: str) -> dict[str, str]:
    """A file as a request names it: by its upload, else by its URL."""
    if file.upload_id:
        where = {"transfer_method": "local_file", "upload_file_id": file.upload_id}
    else:
        where = {"transfer_method": "remote_url", "url": file.url}
    return {"type": kind, **where}


def _allowed(rules: Json) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(kinds, extensions) of the files that are taken; without a kind, all are."""
    kinds, extensions = "allowed_file_types", "allowed_file_extensions"
    return _texts(rules.get(kinds)), _texts(rules.get(extensions))


def _kinds_in(rules: Json) -> str:
    return ", ".join(itertools.chain(*_allowed(rules)))


def _kind_among(file: Attachment, rules: Json) -> str:
    """The kind that a file is sent as by these rules; "" if it is not taken.

    The app's own extensions are for files that are sent as custom. A link to a file of
    no other kind passes: Dify may learn another name for it from its URL.
    """
    kind, (kinds, extensions) = file_kind(file), _allowed(rules)
    if not kinds or (kind in kinds and kind != "custom"):
        return kind
    is_link = file.url and not file.upload_id
    may_be_any = kind == "custom" and (is_link or not extensions)
    is_listed = file.extension in [text.lower().strip(".") for text in extensions]
    return "custom" if "custom" in kinds and (is_listed or may_be_any) else ""


def upload_head(file: Attachment, boundary: str) -> bytes:
    """What comes before a file's data in an upload: multipart/form-data (RFC 7578).

    Nobody may guess the boundary: a file or a user's name could hold it.
    """
    rest = f'name="file"; filename="{file.name}"\r\nContent-Type: {file.media_type}'
    return _part_head(boundary, rest).encode("utf-8", "replace")


def upload_end(user: str, boundary: str) -> bytes:
    """What comes after it, to the body's end."""
    head = _part_head(boundary, 'name="user"')
    return f"\r\n{head}{user}\r\n--{boundary}--\r\n".encode("utf-8", "replace")


def _part_head(boundary: str, rest: str) -> str:
    return f"--{boundary}\r\nContent-Disposition: form-data; {rest}\r\n\r\n"


def _by_word(**lists: str) -> dict[str, str]:
    """{"x": "a", "y": "a"} of a="x y"."""
    return {word: name for name, words in lists.items() for word in words.split()}


# Recordings by the subtype of their media type or by their extension, and the subtypes
# that all releases take. Dify looks at nothing else, and names whatever it is
# "temp.mp3" to the model. One that has neither a name nor a type, as of bytes in
# memory, is a "bin".
_SOUNDS = _by_word(
    wav="wav x-wav wave vnd.wave",
    m4a="m4a mp4 x-m4a",
    mp3="mp3 mpeg mpga aac flac ogg oga opus webm bin",
    amr="amr",
)


def audio_type(file: Attachment) -> str:
    """The media type under which Dify takes a recording; another file's own."""
    family, _, subtype = file.media_type.partition("/")
    if family in ("audio", "video"):
        return f"audio/{_SOUNDS.get(subtype, 'mp3')}"
    sound = _SOUNDS.get(file.extension)
    return f"audio/{sound}" if sound else file.media_type


_KINDS = _by_word(
    image="jpg jpeg png webp gif svg",
    video="mp4 mov mpeg webm",
    audio="mp3 m4a wav amr mpga",
    document="txt markdown md mdx pdf html htm xlsx xls docx csv vtt properties"
    " doc eml msg ppt pptx xml epub",
)


def file_kind(file: Attachment) -> str:
    """Dify's type of a file: by its extension, else by its media type."""
    family = file.media_type.partition("/")[0]
    other = family if family in ("image", "audio", "video") else "custom"
    return _KINDS.get(file.extension, other)


# Questions to requests...


class DifyRequest(NamedTuple):
    """What is sent to Dify: the path below the base, and the JSON body."""

    path: str
    body: Json


_PATHS = {"completion": "/completion-messages", "workflow": "/workflows/run"}


def dify_request(
    mode: str, query: str, common: Json, variable: str = "", conversation_id: str = ""
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
    if mode in CHAT_MODES:
        body.update(query=query, auto_generate_name=False)
        if conversation_id:
            body["conversation_id"] = conversation_id
    else:
        body["inputs"] = {**common["inputs"], variable: query}
    if mode == "completion" and variable == "query":
        body["query"] = query  # old apps read it here
    return DifyRequest(_PATHS.get(mode, "/chat-messages"), body)


def stop_path(mode: str, task_id: str) -> str:
    """Where a running turn is stopped."""
    task = urllib.parse.quote(task_id, safe="", errors="replace")
    tasks = {**_PATHS, "workflow": "/workflows/tasks"}.get(mode, "/chat-messages")
    return f"{tasks}/{task}/stop"


# Errors...


class ConversationGone(BadRequest):
    """Dify does not know this conversation (any more) for this app and user."""

    status, code = 404, "not_found"


class WrongMode(UpstreamRejected):
    """The app is of another mode than its request was made for."""


class MissingInput(UpstreamRejected):
    """The app wants an input that was not sent."""


_MAX_TOLD = 10_000  # characters of an error that are searched for what it means
_LONG_MESSAGE = re.compile(r"(.{1000}).+(.{1000})", re.DOTALL)  # its ends are shown
_WRONG_MODE = ("not_chat_app", "app_unavailable", "not_workflow_app")
# What an error means by the words in its message or its code, which stands at the end.
# Status and code say less: most of these are 400, with one of several codes of Dify's.
_BY_WORDING: Mapping[str, type[ProxyError]] = {
    # Said by this app, not by one that a node calls...
    r"\Aconversation not exists|\bconversation_completed\Z": ConversationGone,
    r"\A\S+ is required in input form": MissingInput,
    # ... before the run, though flows from 1.13 on say it in an event.
    r"\A(?:\(.*\) )?\S+ in input form must be |\Ainvalid upload file"
    r"|\A(?:file validation failed|detected file type)": UpstreamRejected,
    # Said by the model's provider, or by Dify's cloud of its own...
    r"insufficient.{0,3}(?:quota|balance|credits)|quota.{0,20}(?:exceeded|reached)"
    r"|no credits remaining|credit balance|余额不足|欠费": QuotaExceeded,
    r"context.?(?:length|window)|(?:prompt|input) is too long|range of input length"
    r"|model token limit|exceeds the maximum number of tokens": PromptTooLong,
    r"content management policy|content_(?:filter|policy)|data_?inspection_?failed"
    r"|inappropriate content|content exists risk": ContentRefused,
    r"too many requests|(?<!gene)rate.?limit|\b429\b": RateLimited,
}


def error_from_dify(
    status: int, code: object, message: object, *, in_run: bool = False
) -> ProxyError:
    """What an error of Dify's means to the client.

    Args:
        status: of the HTTP response, or of the error event.
        code: Dify's code, if one came.
        message: Dify's message, likewise.
        in_run: it came as an event: the request was accepted, its run failed.
    """
    code, whole = str(code or "")[:100], str(message or "")
    text = _innermost_message(whole) or code or f"no reason is given ({status})"
    text = re.split(r" You have requested this URI| \{message\}", text)[0]
    if status in (401, 403) and not in_run:
        return ConfigurationFault(
            f"Dify refused the app key ({status} {code}: {text}). Check the key in "
            "MODEL_CONFIG or DIFY_API_KEYS, and that API access is on for the app."
        )
    # The provider's status and code stand around its text, which may echo megabytes.
    excerpt = " ".join([whole[:_MAX_TOLD], whole[-_MAX_TOLD:], text[:_MAX_TOLD], code])
    for wording, error in _BY_WORDING.items():
        if re.search(wording, excerpt, re.IGNORECASE):
            return error(text, code=error.code or code)
    if status == 429:
        return RateLimited(text)
    if in_run:
        is_late = re.search("timed? ?out", text, re.IGNORECASE)
        failed = UpstreamFailed(text, code=code, is_final=True)
        return UpstreamTimeout(text) if is_late else failed
    if status >= 500:
        return UpstreamFailed(f"Dify failed ({status}): {text}")
    refusal = WrongMode if code in _WRONG_MODE else UpstreamRejected
    return BodyTooLarge(text, code=code) if status == 413 else refusal(text, code=code)


def presentable(error: ProxyError, app: AppSettings) -> ProxyError:
    """The error as it may be shown: the app's key masked, and not too long.

    Some providers echo the request, files and all, between what they have to say.
    """
    message = error.message.replace(app.key, mask_key(app.key))
    error.message = _LONG_MESSAGE.sub(r"\1 … \2", message)
    return error


def error_from_body(status: int, body: bytes) -> ProxyError:
    """An HTTP error of Dify, or of what stands before it, by its body.

    A body that is no JSON comes from the web UI (the base URL lacks its /v1) or from
    a gateway (nginx, Cloudflare); some gateways speak JSON too (Kong, AWS), and so do
    other APIs: their 404 names no code, as all of Dify's do.
    """
    if status in (408, 504, 522, 524):  # never Dify's own; the last two: Cloudflare's
        return UpstreamTimeout(f"The gateway before Dify timed out ({status}).")
    if (value := read_json_object(body)) and (status != 404 or "code" in value):
        reasons = map(str, object_of(value.get("errors")).values())  # around 1.9
        message = "; ".join([str(value.get("message") or ""), *reasons])
        return error_from_dify(status, value.get("code"), message)
    if status in (413, 414, 431):
        return BodyTooLarge(f"The gateway before Dify refused the size ({status}).")
    if status == 429:
        return RateLimited("The gateway before Dify wants fewer requests (429).")
    if status >= 500:
        return UpstreamFailed(f"The gateway before Dify answered {status}.")
    problem = f"The base URL does not lead to Dify's API: the answer ({status})"
    cure = f"Check {BASE_SETTING}: it must be like https://host/v1."
    return ConfigurationFault(f"{problem} is not Dify's. {cure}")


def _innermost_message(message: str) -> str:
    """The message inside a plugin's nested JSON, or the text as it is."""
    with contextlib.suppress(ValueError, RecursionError):
        while (start := message.find("{")) >= 0:
            inner, _ = json.JSONDecoder().raw_decode(message, start)
            found = inner.get("message") or object_of(inner.get("error")).get("message")
            if not isinstance(found, str) or not found:
                break
            message = found
    return message


# Reasoning inside the text...

# Dify 0.15 wraps reasoning in one fixed <details>; all later releases in <think>, whose
# DeepSeek plugin adds the marker and escapes the reasoning as HTML.
_GRAY = "color:gray;background-color: #f8f8f8;padding: 8px;border-radius: 4px;"
_DETAILS = f'<details style="{_GRAY}" open> <summary> Thinking... </summary>'
_MARKER = "<!--dify-deepseek-reasoning-->"


def _beginnings(tag: str, last: str = "") -> str:
    """A pattern that matches every beginning of `tag`, and then `last`."""
    pattern = last
    for character in reversed(tag[1:]):
        pattern = f"(?:{re.escape(character)}{pattern})?"
    return re.escape(tag[0]) + pattern


class _State(NamedTuple):
    """What is looked for in a block of reasoning, or outside of all."""

    tags: re.Pattern[str]  # that end it, with the newlines that belong to them
    begun: re.Pattern[str]  # what may become one of them, or an entity, with more text


def _state(tags: str, begun: str) -> _State:
    return _State(re.compile(tags, re.I), re.compile(rf"(?:{begun})\Z", re.I))


# The states by the name of the tag that opened the block we are in; None is outside.
# Only what has `begun` is held back, so never more than the longest tag.
_ATTRIBUTES, _SPACES = r"(?:\s[^<>]{0,64})?", r"\s{0,4}"
_OPENING = rf"(?:(?P<think><think{_ATTRIBUTES}>)|(?P<details>{re.escape(_DETAILS)}))"
_STATES: dict[str | None, _State] = {
    name: _state(
        rf"\n{{0,4}}</{name}{_SPACES}>\n{{0,2}}",
        rf"\n{{0,4}}(?:{_beginnings('</' + name, _SPACES)})?|&#?[a-z0-9]{{0,4}}",
    )
    for name in ("think", "details")
}
_STATES[None] = _state(
    rf"{_OPENING}\n{{0,64}}(?:(?-i:{_MARKER})\n{{0,64}})?|</think>\n{{0,2}}",
    f"{_beginnings('<think', _ATTRIBUTES)}|{_beginnings('</think')}"
    f"|{_beginnings(_DETAILS)}",
)
_MORE_OF_TAG = re.compile(rf"(?:{_beginnings(_MARKER)})?\Z")  # newlines may come, too


_LINES = ("step", "tool", "log")  # kinds of blocks that are not a model's thoughts
_LONG_LINE = re.compile(r"(.{200}).+")  # a tool may be given a whole document


class Blocks:
    """Keeps blocks of reasoning apart: those of a tag, a node, a thought, a step.

    Lines about steps, tools and logs come once, and only if the operator wants them.
    """

    def __init__(self, *, has_lines: bool = False) -> None:
        self.has_thought = False  # whether some of it was a model's thoughts
        self._has_lines = has_lines
        self._last: object = None  # the block that was last added to
        self._told: dict[str, str] = {}  # thoughts and lines, by their block

    def add(self, block: tuple[str, object], text: str) -> list[Part]:
        """More reasoning of one block: (its kind, its id)."""
        if not text:
            return []
        if self._last not in (None, block):
            text = "\n\n" + text
        self._last = block
        self.has_thought = self.has_thought or block[0] not in _LINES
        return [Reasoning(text, block[0] == "tag")]

    def add_round(self, value: Json, *, is_thought: bool) -> list[Part]:
        """A snapshot of an agent's round: of a tool, or of text that may be thought."""
        tool, thought = (str(value.get(name) or "") for name in ("tool", "thought"))
        if not tool:
            return self.add_whole("thought", value, thought if is_thought else "")
        line = f"Tool: {tool} {value.get('tool_input') or ''}".rstrip()
        return self.add_whole("tool", value, line if value.get("observation") else "")

    def add_whole(self, kind: str, value: Json, text: str) -> list[Part]:
        """What is new in the text of something with an id; "" for none yet."""
        if kind in _LINES:
            if not self._has_lines:
                return []
            text = _LONG_LINE.sub(r"\1 …", " ".join(text.split()))
        block = (kind, value.get("id"))
        told = self._told.get(repr(block), "")
        self._told[repr(block)] = text or told
        return self.add(block, text.removeprefix(told))


class AnswerText:
    """Turns what an app says into parts, however it is cut.

    Reasoning may stand in it, in tags; what comes by itself goes to the same `blocks`.
    Newlines beside the tags belong to the tags. A closing tag alone means that all the
    text before it was reasoning. A block never closed is reasoning to the end. A tag in
    quotes, or in code that names it, is text.

    Text belongs to its source; what one leaves open ends with it, and a closing tag
    does not reach over its beginning. `close` it at the end.
    """

    def __init__(self, blocks: Blocks) -> None:
        self.kept = KeptText()  # as Dify sent it
        self.is_replaced = False  # by moderation: Dify may have stored another
        self._blocks = blocks
        self._source: object = None  # where the text is from: [node, variable]
        self._half = ""  # the first half of a surrogate pair
        self._held = ""  # what may be a tag, or a part of one
        self._last = ""  # the character before it
        self._opened: re.Match[str] | None = None  # the tag of the block we are in
        self._state = _STATES[None]  # what that block may hold
        self._is_named = False  # whether an opening tag was, and its closing one is due
        # Since the source began:
        self._has_block = False
        self._size = 0  # of its text, in characters

    @property
    def has_come(self) -> bool:
        """Whether there is text, or was."""
        return bool(self.kept.size or self.is_replaced)

    def add(self, *texts: str) -> list[Part]:
        """The parts that are certain by these texts: in the same pieces."""
        text = "".join(texts)
        if not text:
            return []
        if self._half or (not text.isascii() and _HALF.search(text)):
            texts = (*map(self._whole_characters, texts),)
            text = "".join(texts)
        self.kept.add(text)
        if "<" in text or self._held or self._opened:
            return [part for text in texts for part in self._split(text)]
        self._last = text[-1:] or self._last
        self._size += len(text)
        return [Text(text) for text in texts if text]

    def add_from(self, source: object, text: str) -> list[Part]:
        """The same for the text of a source: [node, variable]."""
        if source != self._source:
            # The words of an Answer node may frame those of others.
            is_framed = _texts(self._source)[1:] == ("answer",)
            if not (is_framed and self._is_inside):
                self._source = source
                return self.end_block() + self.add(text)
        return self.add(text)

    def add_apart(self, text: str) -> list[Part]:
        """The same for text of no source: no block of reasoning reaches into it."""
        before = self.add("\n\n" if self.kept.size else "") + self.end_block()
        return before + self.add(text) + self.end_block()

    def end_block(self) -> list[Part]:
        """What is still held back: a node or round is over, or begins anew.

        A model that was cut off while it thought has left its block open.
        """
        parts = self._split("", is_last=True)
        self._opened, self._state = None, _STATES[None]
        self._last, self._is_named = "", False
        self._has_block, self._size = False, 0
        return parts

    def end_node(self, node: object) -> list[Part]:
        """The same, if the text is from this node."""
        return self.end_block() if _texts(self._source)[:1] == (node,) else []

    def complete(self, whole: str) -> list[Part] | None:
        """The rest of the whole text; None if it does not begin as this one."""
        if not self.kept.is_whole or not whole.startswith(self.kept.text):
            return None
        self._half = ""  # the whole has both
        return self.add(whole[self.kept.size :])

    def replace(self, whole: str) -> list[Part]:
        """Begin anew with this text, or go on if it begins as this one."""
        parts = self.complete(whole)
        if parts is not None:
            return parts
        self.is_replaced, self.kept = True, KeptText()
        self._half = self._held = ""
        self.end_block()
        answer = Answer()
        answer.add(self.add(whole) + self.close())
        return [Replace(answer.text, answer.reasoning.lstrip("\n"))]

    def close(self) -> list[Part]:
        """What is still held back; no more text will come."""
        rest, self._half = "\ufffd" if self._half else "", ""
        return self._split(rest, is_last=True)

    def _whole_characters(self, text: str) -> str:
        """Join surrogate halves that came apart; one that stays alone is U+FFFD."""
        text, self._half = self._half + text, ""
        if "\ud800" <= text[-1:] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        return whole_characters(text)

    # Reasoning in tags...

    @property
    def _is_inside(self) -> bool:
        """Whether a block of reasoning is open, or will be after what is held back."""
        tag = self._state.tags.match(self._held)
        return bool(tag.lastgroup if tag else self._opened)

    def _split(self, more: str, *, is_last: bool = False) -> list[Part]:
        parts: list[Part] = []
        text, start = self._held + more, 0
        while tag := self._state.tags.search(text, start):
            if not is_last and _MORE_OF_TAG.match(text, tag.end()):
                break
            is_text = not self._opened and self._names(text, tag)
            self._take(parts, text[start : tag.end() if is_text else tag.start()])
            if not is_text:
                self._cross(parts, tag)
            start = tag.end()
        held = None if is_last else tag or self._state.begun.search(text, start)
        end = held.start() if held else len(text)
        self._take(parts, text[start:end])
        self._last, self._held = text[end - 1 : end] or self._last, text[end:]
        return parts

    def _names(self, text: str, tag: re.Match[str]) -> bool:
        """Whether the text only names this tag: in quotes, or as one of a named pair.

        A thought may end with a quote, so a closing tag needs another one behind it.
        """
        first, end = tag.start(), tag.end()
        is_quoted = (text[first - 1] if first else self._last) in QUOTES
        if tag.lastgroup:
            self._is_named = is_quoted
            return is_quoted
        is_second, self._is_named = self._is_named, False
        is_shut = text[end - 1] == ">" and text[end : end + 1] in QUOTES
        return is_second or (is_quoted and is_shut)

    def _cross(self, parts: list[Part], tag: re.Match[str]) -> None:
        """Go over a tag, into a block of reasoning or out of it."""
        self._state = _STATES[tag.lastgroup]
        self._opened = tag if tag.lastgroup else None
        if self._opened:
            self._has_block = True
        elif self._size and not self._has_block:
            parts.append(Recast(self._size))
            self._size = 0

    def _take(self, parts: list[Part], text: str) -> None:
        """Add the text as a part."""
        if self._opened:
            if _MARKER in self._opened[0]:  # its text is escaped
                import html  # noqa: PLC0415  (at the top it costs each start 3 ms)

                text = html.unescape(text)
            parts += self._blocks.add(("tag", self._opened), text)
        elif text:
            self._size += len(text)
            parts.append(Text(text))


_HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair


# Events to parts...


SILENT = frozenset(("", "ping"))  # events that are no sign of life of a run
_NOT_JSON = "Dify sent an event that is not JSON."


class AnswerReader:
    """Turns the events of one turn into answer parts.

    `read` the events, in order, until `is_finished`; `give_up` where they can't be read
    on, or when `is_closing` and nothing came for GRACE_S. The ids are "" until known; a
    workflow has no conversation and no message, but a run. An event is read by the
    method `_on_` and its name; one without a method is skipped.
    """

    task_id = conversation_id = message_id = workflow_run_id = ""

    def __init__(
        self, mode: str, app: AppSettings, *, show_process: bool = False
    ) -> None:
        self.mode, self.app = mode, app
        own = "workflow_run_id" if mode == "workflow" else "conversation_id message_id"
        self._unknown_ids = f"task_id {own}".split()
        # Stored, as Dify says itself; given up: the run may go on, and must be stopped.
        self.is_finished = self.is_closing = self.is_stored = self.is_given_up = False
        self._deltas = DeltaReader()
        self._blocks = Blocks(has_lines=show_process)
        self._text = AnswerText(self._blocks)
        self._appendix = Appendix(mode, app.base)
        self.has_rounds = False  # an agent_message had text
        self._has_asked = False  # the user, for what the run pauses for
        self.finish_reason = "stop"  # why the app says no more

    def read(self, events: Iterable[str]) -> list[Part]:
        """The parts that these events add; one part for each delta of text.

        Deltas in a row share what has to be done once, which saves a quarter.

        Args:
            events: the data of each.
        """
        parts: list[Part] = []
        rest = iter(events)
        while not self.is_finished:
            texts, other = self._deltas.texts_of(rest)
            parts += self._text.add(*texts)
            if other is None:
                break
            parts += self._read(other)
        return parts

    def _read(self, data: str) -> list[Part]:
        """The parts that one event adds; [] for one that adds none."""
        if data in SILENT or (_is_unread(data) and not self._unknown_ids):
            return []
        try:
            value = object_of(read_json(data))  # {} if too deep: some tool's output
        except ValueError:
            return self.give_up(UpstreamFailed(_NOT_JSON, is_final=True))
        for id_ in self._unknown_ids:
            setattr(self, id_, str(value.get(id_) or ""))
        self._unknown_ids = [id_ for id_ in self._unknown_ids if not getattr(self, id_)]
        name = str(value.get("event"))
        value.update(object_of(value.get("data")))  # a workflow's events say it there
        if name in _DELTAS and self.mode != "agent":
            self._deltas.learn(data, value)
        return _READERS[name](self, value) if name in _READERS else []

    # Text and reasoning...

    def _on_message(self, value: dict[str, Any]) -> list[Part]:
        answer = value.get("answer", value.get("text"))  # the latter in a workflow
        if not isinstance(answer, str):
            return []
        if value.get("event") == "agent_message":
            self.has_rounds = self.has_rounds or bool(answer)
        elif self.mode == "agent" and self.has_rounds:
            # The New Agent closes with the whole of its last round.
            kept = self._text.kept.text.rstrip()
            if not self._text.kept.is_whole or kept.endswith(answer.strip()):
                return []
            answer = "\n\n" + answer
        return self._text.add_from(value.get("from_variable_selector"), answer)

    _on_agent_message = _on_text_chunk = _on_message

    def _on_message_replace(self, value: dict[str, Any]) -> list[Part]:
        answer = value.get("answer", value.get("text"))
        return self._text.replace(answer) if isinstance(answer, str) else []

    _on_text_replace = _on_message_replace

    def _on_reasoning_chunk(self, data: dict[str, Any]) -> list[Part]:
        block = ("node", data.get("node_id"))
        return self._blocks.add(block, str(data.get("reasoning") or ""))

    # What happens beside the text...

    def _on_agent_thought(self, value: dict[str, Any]) -> list[Part]:
        ended = self._text.end_block() if self.mode != "agent" else []
        return ended + self._blocks.add_round(value, is_thought=self.mode == "agent")

    def _on_node_started(self, data: dict[str, Any]) -> list[Part]:
        title = data.get("title") or data.get("node_type")
        return self._blocks.add_whole("step", data, f"Step: {title}" if title else "")

    _on_iteration_started = _on_loop_started = _on_node_started  # come in its place

    def _on_agent_log(self, data: dict[str, Any]) -> list[Part]:
        ended = self._text.end_node(data.get("node_id"))  # or what it says in a round
        return ended + self._blocks.add_whole("log", data, str(data.get("label") or ""))

    def _on_node_finished(self, data: dict[str, Any]) -> list[Part]:
        self._appendix.add_node(data)
        return self._text.end_node(data.get("node_id"))

    _on_node_retry = _on_node_finished  # what it has used counts, and it begins anew

    def _on_message_file(self, value: dict[str, Any]) -> list[Part]:
        if isinstance(value.get("answer"), str):  # text, by a bug of 1.11.2 and later
            return self._on_message(value)
        self._appendix.add_file(value)
        return []

    def _on_human_input_required(self, data: dict[str, Any]) -> list[Part]:
        self._has_asked = True
        return self._text.add_apart(_text_of_form(data))

    # The end...

    def _on_message_end(self, value: dict[str, Any]) -> list[Part]:
        metadata = object_of(value.get("metadata"))
        self._appendix.add_message(objects_of(value.get("files")), metadata)
        parts: list[Part] = []
        if not self._blocks.has_thought:
            for node, text in object_of(metadata.get("reasoning")).items():
                parts += self._blocks.add(("node", node), str(text or ""))
        if self.mode != "advanced-chat" or self._text.has_come or self.is_closing:
            return parts + self._finish()
        self.is_closing = True  # the outputs may have it
        return parts

    def _on_workflow_finished(self, data: dict[str, Any]) -> list[Part]:
        if data.get("status") == "failed":
            return self._on_error(data)
        if data.get("status") in _NOT_ALL_SAID:
            self.finish_reason = "length"
        self._appendix.add_run(data)
        parts: list[Part] = []
        if not self._text.has_come:
            outputs = object_of(data.get("outputs"))
            text = answer_from_outputs(outputs, self.app.output_variable, self.mode)
            parts = self._text.add(text)
        if self.mode == "workflow" or self.is_closing:
            return parts + self._finish()
        self.is_closing = True
        return parts

    def _on_workflow_paused(self, data: dict[str, Any]) -> list[Part]:
        self._appendix.add_run(data)
        parts: list[Part] = []
        for reason in () if self._has_asked else objects_of(data.get("reasons")):
            parts += self._on_human_input_required(reason)
        return parts + self._finish()

    def _on_error(self, value: Json) -> list[Part]:
        status = count_of(value.get("status")) or 500  # a failed run has it in words
        code, message = value.get("code"), value.get("message") or value.get("error")
        return self._fail(error_from_dify(status, code, message, in_run=True))

    def _finish(self) -> list[Part]:
        self.is_finished = self.is_stored = True
        reason = "content_filter" if self._text.is_replaced else self.finish_reason
        appendix = self._appendix.parts(self._text.kept.text)
        return [*self._text.close(), *appendix, Finish(reason)]

    def _fail(self, error: ProxyError) -> list[Part]:
        self.is_finished = True
        return [*self._text.close(), Failure(presentable(error, self.app))]

    def give_up(self, error: ProxyError) -> list[Part]:
        """End the answer early: well if only its last event is missing."""
        if self.is_closing:
            return self._finish()
        self.is_given_up = True
        return self._fail(error)

    @property
    def is_as_sent(self) -> bool:
        """Whether Dify has stored exactly the text that it sent."""
        return self.is_stored and not self._text.is_replaced

    @property
    def can_recover(self) -> bool:
        """Whether something came, of an answer that Dify stores."""
        return bool(self._text.kept.size and self.conversation_id and self.message_id)

    def recover(self, row: Json) -> list[Part]:
        """The rest of a broken answer, by its row in Dify's store.

        Returns:
            [] if the stored answer does not extend what was streamed.
        """
        stored = str(row.get("answer") or "")
        parts = self._text.complete(_as_sent(stored, self._text.kept.text))
        if parts is None:
            return []
        if row.get("status") == "error":
            return parts + self._on_error(row)
        files = objects_of(row.get("message_files"))
        prompt, completion = row.get("message_tokens"), row.get("answer_tokens")
        usage = {"prompt_tokens": prompt, "completion_tokens": completion}
        self._appendix.add_message(files, {**row, "usage": usage})
        return parts + self._finish()


def _as_sent(stored: str, sent: str) -> str:
    """A stored answer, with the white space and the signatures of what was sent of it.

    Dify strips an answer before it stores it, and joins an agent's rounds by newlines.
    Links to its files it signs anew whenever an answer is read.
    """
    said, kept = ("".join(_unsigned(text).split()) for text in (sent, stored))
    if not said or not kept.startswith(said):
        return stored
    *_, last = itertools.islice(re.finditer(r"\S", stored), len(said))
    return stored if stored.startswith(sent) else sent + stored[last.end() :]


def _unsigned(text: str) -> str:
    """The text with links to Dify's files as if they were never signed, yet as long."""
    return _SIGNED_LINK.sub(lambda signature: "0" * len(signature[0]), text)


_SIGNED_LINK = re.compile(r"(?<=[?&]timestamp=)\d+&nonce=\w+&sign=[\w=-]+(?=\))", re.A)


_READERS = {name[4:]: f for name, f in vars(AnswerReader).items() if name[:4] == "_on_"}
_DELTAS = ("message", "agent_message", "text_chunk", "message_file")  # have text
_NOT_ALL_SAID = ("stopped", "running", "paused")  # the last two of a stored run
_LONG_EVENT = 4096  # characters; a text delta is shorter
_EVENT_NAME = re.compile(r'\{"event": ?"(\w{1,64})"')


def event_name(data: str) -> str:
    """An event's name, without parsing it; "" if it does not begin with that."""
    name = _EVENT_NAME.match(data)
    return name[1] if name else ""


def _is_unread(data: str) -> bool:
    """Whether an event is long, and of a kind of which nobody reads more than ids."""
    name = event_name(data) if len(data) > _LONG_EVENT else ""
    return bool(name) and name not in _READERS


class DeltaReader:
    """Reads the text of a delta without parsing its event: five times faster.

    What stands around the text is the same in the next event: it is learnt from an
    example, which was read as a whole.
    """

    def __init__(self) -> None:
        # What stands around the text; until it is known, what no event begins with.
        self._before, self._after = "\0", ""

    def texts_of(self, events: Iterator[str]) -> tuple[list[str], str | None]:
        """(the texts of the next events, the first that is not like the example)."""
        texts: list[str] = []
        before, after = self._before, self._after
        for event in events:
            if not event.startswith(before):
                return texts, event
            try:
                text, end = _scan_string(event, len(before))
            except ValueError:
                return texts, event
            if event[end:] != after:
                return texts, event
            texts.append(text)
        return texts, None

    def learn(self, data: str, value: Json) -> None:
        """Take an event, of this value, for the example."""
        self._before = "\0"
        starts = [key.end() for key in _TEXT_KEY.finditer(data)]
        if len(starts) == 1:
            text, end = _scan_string(data, starts[0])
            if text in (value.get("answer"), value.get("text")):
                self._before, self._after = data[: starts[0]], data[end:]


_TEXT_KEY = re.compile(r'"(?:answer|text)":\s*"')
# What `json.loads` reads strings with: (text, where it begins) -> (string, its end).
_scan_string: Callable[[str, int], tuple[str, int]] = vars(json.decoder)["scanstring"]


def _text_of_form(data: Json) -> str:
    """What a run that pauses asks the user for."""
    content = data.get("form_content") or data.get("message")
    text = str(content or data.get("node_title") or "Input is needed.")
    if actions := objects_of(data.get("actions")):
        names = ", ".join(str(a.get("title") or a.get("id")) for a in actions)
        text += f"\n\nActions: {names}"
    if token := data.get("form_token"):
        text += f"\n\nForm: {token}"
    return text


_MODEL_NODES = ("llm", "agent", "question-classifier", "parameter-extractor")


class Appendix:
    """Collects what follows the text of an answer: files, citations, usage."""

    def __init__(self, mode: str, base: str) -> None:
        self._mode, self._base = mode, base
        self._files: dict[str, tuple[str, Media]] = {}  # by URL, unsigned: path
        self._resources: list[Json] = []
        self._usage = NO_USAGE  # as message_end tells it
        self._node_usage = NO_USAGE  # of a run, where that is missing

    def add_file(self, value: Json) -> None:
        """A file that the app made: {"type", "url" or "remote_url", "filename"}."""
        url = value.get("url") or value.get("remote_url")
        if not isinstance(url, str) or not url or self._is_users(value):
            return
        url, path = _resolved(self._base, url)
        name = value.get("filename") or urllib.parse.unquote(path.rpartition("/")[2])
        media = Media(str(value.get("type") or "custom"), url, str(name))
        self._files.setdefault(_SIGNATURE.sub("", url), (path, media))

    def _is_users(self, file: Json) -> bool:
        """Whether a file came with the question: newer releases list those, too.

        In a flow it may be part of the answer.
        """
        if owner := file.get("belongs_to"):
            return bool(owner == "user")
        is_sent = file.get("transfer_method") in ("local_file", "remote_url")
        return is_sent and self._mode not in ("advanced-chat", "workflow")

    def add_node(self, data: Json) -> None:
        """What a node has used and, in a workflow, found."""
        kind, outputs = data.get("node_type"), object_of(data.get("outputs"))
        if kind in _MODEL_NODES:
            process = object_of(data.get("process_data"))
            self._node_usage += _usage(outputs.get("usage") or process.get("usage"))
        elif kind == "knowledge-retrieval" and self._mode == "workflow":
            for hit in objects_of(outputs.get("result")):
                about = object_of(hit.get("metadata"))
                self._resources.append({**about, "content": hit.get("content")})

    def add_message(self, files: Sequence[Json], metadata: Json) -> None:
        """What belongs to a message: files, {"usage", "retriever_resources"}."""
        for file in files:
            self.add_file(file)
        self._resources += objects_of(metadata.get("retriever_resources"))
        self._usage = _usage(metadata.get("usage"))

    def add_run(self, data: Json) -> None:
        """What a workflow has made and used; it may correct the sum of its nodes."""
        total = count_of(data.get("total_tokens")) or self._node_usage.total_tokens
        completion = min(self._node_usage.completion_tokens, total)
        self._node_usage = Usage(total - completion, completion)
        files = objects_of(data.get("files"))
        _take_files(object_of(data.get("outputs")), files)
        for file in files:
            self.add_file(file)

    def parts(self, answer: str) -> list[Part]:
        """All of it, without the files that the answer links to itself.

        A link of Dify's without a host, as in old releases, leads a client nowhere.
        """
        parts: list[Part] = []
        for number, (unsigned, (path, media)) in enumerate(self._files.items()):
            sought = answer if number < _MAX_FILES_SOUGHT else ""
            behind = sought.split(unsigned)[1:]
            if path.startswith("/files/"):
                pieces = sought.split(path)
                pairs = zip(pieces[1:], map(_HOST_AT_END.search, pieces))
                behind += [after for after, host in pairs if host]
            if all(map(_MORE_OF_URL.match, behind)):
                parts.append(media)
        if self._resources:
            parts.append(Citations(tuple(self._resources)))
        return [*parts, self._usage if self._usage.total_tokens else self._node_usage]


_SIGNED = "(?:timestamp|nonce|sign|as_attachment)="
_SIGNATURE = re.compile(rf"[?&]{_SIGNED}[^&]*")
_HOST_AT_END = re.compile(r"://[^/\s]+\Z")  # of what stands before a URL's path
_MAX_FILES_SOUGHT = 500  # in the text of one answer: each looks at all of it
# Behind a file's URL in a text; then it is a longer one, of another file.
_MORE_OF_URL = re.compile(rf"(?a:[\w/%~-]|\.\w|[?&](?!{_SIGNED})\w)")


def _resolved(base: str, url: str) -> tuple[str, str]:
    """(a file's URL made absolute, its path); a malformed one as it is, twice."""
    with contextlib.suppress(ValueError):
        url = urllib.parse.urljoin(base, url)
        return url, urllib.parse.urlsplit(url).path
    return url, url


_OUTPUT_NAMES = ("text", "answer", "output", "result", "response")


def answer_from_outputs(outputs: Json, variable: str, mode: str) -> str:
    """The output of a run that is its answer, when none was streamed.

    The one that the operator named, if the run has it; else one of a usual name, not an
    empty one if possible; else the only one; else all, as JSON. Files are left out:
    they follow as links.
    """
    if mode != "workflow":
        return str(outputs.get("answer") or "")
    named = {variable: outputs[variable]} if variable in outputs else outputs
    texts = {key: x for key, item in named.items() for x in _take_files(item, [])}
    usual = [texts[name] for name in _OUTPUT_NAMES if isinstance(texts.get(name), str)]
    if usual:
        return next(filter(None, usual), "")
    value = next(iter(texts.values()), "") if len(texts) < 2 else texts
    if value is None:  # what it is taken from has not run
        return ""
    return value if isinstance(value, str) else json_text(value)


def _take_files(value: Any, files: list[dict[str, Any]]) -> list[Any]:
    """Add the files in an output, however deep in lists and objects, to `files`.

    Returns:
        [the output without them], or [] if it held nothing else.
    """
    if object_of(value).get("dify_model_identity") == "__dify__file__":
        files.append(value)
        return []
    kept = value
    if isinstance(value, dict):
        kept = {key: x for key, item in value.items() for x in _take_files(item, files)}
    elif isinstance(value, list):
        kept = [x for item in value for x in _take_files(item, files)]
    return [kept] if kept or not value else []


def _usage(value: Any) -> Usage:
    usage = object_of(value)
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return Usage(count_of(prompt), count_of(completion))


def count_of(value: Any) -> int:
    """A count of Dify's, 0 or more; it may come as text, as null or not at all."""
    try:
        return max(0, int(value))
    except (TypeError, ValueError, OverflowError):
        return 0


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()


# What Dify has stored (`GET /messages`, `GET /workflows/run/{id}`)...


class StoredTurn(NamedTuple):
    """A stored message or run: a question, and the parts of its answer.

    `told` has the tools and the output format that the app was told of in this turn,
    or the tools of an earlier one, where those were read too. A workflow's run is a
    conversation by itself: its id stands for both.
    """

    conversation_id: str
    message_id: str
    created: UnixTime
    question: Message
    parts: Sequence[Part]
    told: Ask
    past: str = ""  # before the question, as the app's input had it

    @property
    def ids(self) -> dict[str, str]:
        """Dify's ids, as an answer has them."""
        if self.conversation_id == self.message_id:
            return {"workflow_run_id": self.message_id}
        return {"conversation_id": self.conversation_id, "message_id": self.message_id}

    @property
    def is_short(self) -> bool:
        """Whether the app made several calls, and the client got the one it wanted."""
        return self.told.is_serial and self._read_as(self.told)[0].is_short

    def answer(self, tools: Iterable[Tool] = ()) -> Answer:
        """What the app said, read as it was told to write: calls are no text.

        Args:
            tools: the client's, beside those that the app was told of.
        """
        if self.told.tool_mode == "required":
            tools = ()  # one of those that it was told of had to be called
        known = {tool.name: tool for tool in (*self.told.tools, *tools)}
        ask = self.told._replace(tools=tuple(known.values()))
        reading, parts = self._read_as(ask)
        if reading.problem:  # it is no call, or not the JSON: it stays as it is
            told = ask._replace(output=AS_TEXT, tool_mode="auto")
            return self._replace(told=told).answer()
        answer = Answer()
        answer.add(part for part in parts if not isinstance(part, Failure))
        return answer

    def _read_as(self, ask: Ask) -> tuple[Reading, list[Part]]:
        reading = Reading(ask, self.message_id, is_whole=True, spent=NO_USAGE)
        return reading, reading.feed([*self.parts])

    def message(self, tools: Iterable[Tool]) -> Message:
        """The answer as a message of a history."""
        answer = self.answer(tools)
        return Message("assistant", answer.text, tool_calls=tuple(answer.calls))


def stored_turn(row: Json, app: AppSettings) -> StoredTurn:
    """A row as parts, by the same reader as a stream.

    {"id", "conversation_id", "inputs", "query", "answer", "message_files", "status",
    "retriever_resources", "error", "created_at"}, newer also "message_tokens",
    "answer_tokens"
    """
    names = ("conversation_id", "id", "query")
    conversation_id, id_, query = (str(row.get(name) or "") for name in names)
    inputs, files = object_of(row.get("inputs")), objects_of(row.get("message_files"))
    attached = [f for f in files if f.get("belongs_to") == "user" and f.get("url")]
    attachments = tuple(_stored_file(file, app.base) for file in attached)
    question = Message("user", query, attachments=attachments)
    parts = AnswerReader("chat", app).recover(row)
    told = _told_in([*inputs.values(), query])
    past = str(inputs.get(app.history_variable) or "")
    created = count_of(row.get("created_at"))
    return StoredTurn(conversation_id, id_, created, question, parts, told, past)


def stored_run(run: Json, app: AppSettings, query: str) -> StoredTurn:
    """A workflow's run as parts, by the same reader as a stream.

    {"id", "inputs", "outputs", "status", "error", "total_tokens", "created_at"}; the
    inputs, in some releases the outputs too, are JSON in a string

    Args:
        run: of Dify's store.
        app: the workflow.
        query: the input that takes the user's text.
    """
    inputs, outputs = (_unpacked(run.get(name)) for name in ("inputs", "outputs"))
    given = (inputs.get(name) for name in (query, app.history_variable))
    text, past = (value if isinstance(value, str) else "" for value in given)
    reader = AnswerReader("workflow", app)
    parts = reader._on_workflow_finished({**run, "outputs": outputs})
    id_, created = str(run.get("id") or ""), count_of(run.get("created_at"))
    question, told = Message("user", text), _told_in(inputs.values())
    return StoredTurn(id_, id_, created, question, parts, told, past)


def _told_in(values: Iterable[Any]) -> Ask:
    """What the app was told to write, in its query or in whatever input.

    What stands in a folded history was told in earlier turns, and does not count.
    """
    texts = (_HISTORY.split(text, 1)[0] for text in values if isinstance(text, str))
    return told_ask("\n".join(texts))


_HISTORY = re.compile(r'<message(?:-\d+)? role="(?!system)')


def _unpacked(value: Any) -> dict[str, Any]:
    return object_of(read_json_object(value) if isinstance(value, str) else value)


def _stored_file(file: Json, base: str) -> Attachment:
    """A file of a user's; what was uploaded is named by its upload again."""
    url, path = _resolved(base, str(file["url"]))
    upload = _UPLOADED.match(path)
    name = str(file.get("filename") or file.get("type") or "file")
    media_type = str(file.get("mime_type") or "")
    return Attachment(name, media_type, url=url, upload_id=upload[1] if upload else "")


_UPLOADED = re.compile(r"/files/([0-9a-f-]{36})/(?:file|image)-preview\Z")


# ==============================================================================
# 8. Ids
# ==============================================================================
#
# Ids that themselves say where in Dify they belong, so that no table is needed, and
# every replica can read them, even after a restart. Nobody else can read, change or
# make one. Knows nothing of OpenAI, of what is in Dify, or of settings.
#
#     tag    = HMAC-SHA256(key 1, bound, prefix, fields), its first 16 bytes
#     stream = SHAKE-256(key 2, tag), as long as the fields
#     id     = prefix + base64url(tag, fields XOR stream)
#
# That is SIV (RFC 5297) built from the standard library: the tag is the cipher's nonce,
# so there is none to keep, and the same fields have the same id. What it does not hide:
# that two ids are equal, and how long the fields are. The tag is 128 bits: a forger
# has one chance in 2^128 a try, and streams begin to repeat after some 2^64 ids. An id
# never expires; it is void once the key changes. UUIDs take 16 bytes: with a user's
# name of 200 bytes an id has some 350 characters.

MAX_ID_CHARS = 3000  # the longest names of a user and a file take 2300
_TAG_BYTES = 16
_UUID_PARTS = re.compile("(.{8})(.{4})(.{4})(.{4})(.{12})")
_UUID = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class IdSealer:
    """Makes and opens ids.

    Args:
        secret: the app's key, so an id is good for its app only, and other apps come
            and go without harm.
        bound: what else an id is bound to, such as the client's key.
    """

    def __init__(self, secret: str, bound: str = "") -> None:
        key = hmac.new(b"OpenDify ids 1", _pack([secret]), hashlib.sha256).digest()
        self._mac_key = hashlib.sha256(b"mac" + key).digest()
        self._stream_key = hashlib.sha256(b"stream" + key).digest()
        self._bound = bound

    def seal(self, prefix: str, fields: Sequence[str], nonce: str = "") -> str:
        """An id of these fields; a nonce makes another one of the same fields."""
        plain = _pack([nonce, *fields])
        tag = self._tag(prefix, plain)
        return prefix + _spelled(tag + self._cipher(tag, plain))

    def open(self, id_: str, prefix: str) -> tuple[str, ...] | None:
        """The fields of an id; None if this sealer did not make it as this kind."""
        text = id_[len(prefix) : MAX_ID_CHARS]
        try:
            data = decode_base64(text)
        except ValueError:
            return None
        tag, sealed = data[:_TAG_BYTES], data[_TAG_BYTES:]
        plain = self._cipher(tag, sealed)
        is_ours = hmac.compare_digest(tag, self._tag(prefix, plain))
        # Base64 has several spellings for the same bytes; an id has one.
        is_ours = is_ours and prefix + _spelled(data) == id_
        return _unpack(plain)[1:] if is_ours else None

    def _tag(self, prefix: str, plain: bytes) -> bytes:
        data = _pack([self._bound, prefix, str(len(plain))]) + plain
        return hmac.new(self._mac_key, data, hashlib.sha256).digest()[:_TAG_BYTES]

    def _cipher(self, tag: bytes, data: bytes) -> bytes:
        stream = hashlib.shake_256(self._stream_key + tag).digest(len(data))
        mixed = int.from_bytes(data, "big") ^ int.from_bytes(stream, "big")
        return mixed.to_bytes(len(data), "big")


def decode_base64(text: str) -> bytes:
    """The bytes of Base64 in either alphabet, padded or not; raises ValueError.

    Since Python 3.15 `urlsafe_b64decode` warns of the plain alphabet.
    """
    plain = text.replace("-", "+").replace("_", "/").rstrip("=")
    return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)


def _spelled(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _pack(fields: Iterable[str]) -> bytes:
    """Texts as bytes, in one way only: b"u" and a UUID's 16 bytes, or b"4:text"."""
    return b"".join(map(_packed, fields))


def _packed(text: str) -> bytes:
    if _UUID.fullmatch(text):
        return b"u" + bytes.fromhex(text.replace("-", ""))
    data = text.encode("utf-8", "surrogatepass")
    return b"%d:%b" % (len(data), data)


def _unpack(data: bytes) -> tuple[str, ...]:
    fields = []
    while data:
        if data[:1] == b"u":
            fields.append("-".join(_UUID_PARTS.findall(data[1:17].hex())[0]))
            data = data[17:]
        else:
            size, _, data = data.partition(b":")
            fields.append(data[: int(size)].decode("utf-8", "surrogatepass"))
            data = data[int(size) :]
    return tuple(fields)


class Place(NamedTuple):
    """Where in Dify an id belongs: a stored answer, or one item of it.

    A workflow's run has one id, which stands for both. `item` is the item's number in
    the output; "in" for the question.
    """

    user: str
    conversation_id: str
    message_id: str
    item: str = ""


def open_place(sealer: IdSealer, id_: str, user: str) -> Place | None:
    """What an id stands for; None if it is not ours, not stored, or another user's.

    Args:
        sealer: of the app, and the client's key.
        id_: of a response (`resp_…`) or an item.
        user: who asks; "" where a request can't say it (`GET /responses/{id}`).
    """
    fields = sealer.open(id_, id_[: id_.find("_") + 1])
    if not fields or (user and user != fields[0]):
        return None
    return Place(*fields)


# ==============================================================================
# 9. OpenAI
# ==============================================================================
#
# OpenAI's dialect, both ways: requests to an Ask, answer parts to chunks and whole
# objects. Reads liberally (clients send nulls, strings for objects, fields that no app
# can honour) and writes strictly (inside OpenAI's own schemas). What can't be read is a
# BadRequest that names the field. Ids and times are arguments. Knows nothing of
# sockets, and of Dify only what it takes.

MAX_USER_CHARS = 200  # Dify keeps the end user's name in a column of 255
MAX_STOPS, MAX_STOP_CHARS, MAX_CHOICES = 4, 1000, 8  # the first is OpenAI's own
MAX_COMPLETIONS = 128  # of one request, for which LangChain sends 20 prompts
# No model reads more. A body has room for 20 million: minutes of work, and gigabytes.
MAX_MESSAGES = 20_000


# Requests...


class ChatRequest(NamedTuple):
    """A chat request: what is asked, and how the answer is to be written."""

    ask: Ask
    stream: bool = False
    include_usage: bool = False  # in the last chunk
    n: int = 1
    is_legacy: bool = False  # calls are answered as `function_call`
    echoes: Sequence[str] = ()  # of a legacy completion: how each answer begins


def parse_body(body: bytes) -> dict[str, Any]:
    """A request's body; NaN and the like, which are no JSON, become null.

    Raises:
        BadRequest: it is not a JSON object.
    """
    try:
        text = body.decode(json.detect_encoding(body), "surrogatepass")
        value = decode_json(text)
    except (ValueError, RecursionError):
        raise BadRequest("The body of the request is not valid JSON.") from None
    if not isinstance(value, dict):
        raise BadRequest("The body of the request must be a JSON object.")
    if body.count(b"{") + body.count(b"[") > MAX_NESTING and _is_deep(value):
        raise BadRequest(f"The JSON is nested more than {MAX_NESTING} levels deep.")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_NESTING):
        level = [
            item
            for part in level
            for item in (part.values() if isinstance(part, dict) else part)
            if isinstance(item, (dict, list))
        ]
    return bool(level)


def parse_chat_request(body: Json) -> ChatRequest:
    """The body of `POST /chat/completions`; unknown fields and nulls are normal.

    Raises:
        BadRequest: a required field is missing, or one has the wrong type.
    """
    ask, stream = parse_ask(body), parse_stream(body)
    include_usage = bool(object_of(body.get("stream_options")).get("include_usage"))
    system, messages = _parse_messages(body.get("messages"))
    n = 1 if body.get("n") is None else _parse_n(body["n"])
    stops, voice = _parse_stops(body.get("stop")), _parse_spoken(body, n)
    ask = ask._replace(system=system, messages=messages, stops=stops, voice=voice)
    return ChatRequest(ask, stream, include_usage, n, _is_legacy(body))


def _is_legacy(body: Json) -> bool:
    """Whether calls are answered in the older form, which has room for one."""
    return bool(body.get("functions")) and not body.get("tools")


def parse_ask(body: Json) -> Ask:
    """What all requests say alike: everything but the messages."""
    model = _parse_required(body, "model")
    tools, tool_mode = parse_tools(body)
    metadata = object_of(body.get("metadata"))
    conversation_id = body.get("conversation_id") or metadata.get("conversation_id")
    return Ask(
        model=model,
        messages=(),
        inputs=parse_inputs(body.get("inputs"), metadata.get("inputs")),
        user=parse_user(body),
        conversation_id=conversation_id if isinstance(conversation_id, str) else "",
        tools=tools,
        tool_mode=tool_mode,
        is_serial=body.get("parallel_tool_calls") is False or _is_legacy(body),
        output=parse_output_format(body),
    )


def parse_stream(body: Json) -> bool:
    """Whether a request wants its answer as a stream."""
    stream = body.get("stream")
    return stream is not None and of_type(stream, bool, "stream", "true or false")


def split_system(items: Sequence[Any], first: str = "") -> tuple[str, tuple[Any, ...]]:
    """(the system text that opens a history, all other items)."""
    opening = [*itertools.takewhile(_is_system_text, items)]
    said = [m for m in (Message("system", first), *opening) if m.text.strip()]
    texts = [f"{m.name}: {m.text}" if m.name else m.text for m in said]
    return "\n\n".join(texts), tuple(items[len(opening) :])


def _is_system_text(item: Any) -> bool:
    """Whether it is a system message of text alone: the files of others go along."""
    return getattr(item, "role", "") == "system" and not item.attachments


def _parse_required(body: Json, name: str) -> str:
    """A text that a request must have."""
    text = body.get(name)
    if text is None or text == "":
        raise missing_parameter(name)
    return of_type(text, str, name)


def parse_each(
    given: Any, name: str, wanted: str, parse: Callable[[Any, str], Any]
) -> list[Any]:
    """Each element of a list, parsed with its place: messages, items, parts of one.

    Raises:
        BadRequest: it is no list, as `wanted` says that it must be, or too long.
    """
    values = of_type(given, list, name, wanted)
    if len(values) > MAX_MESSAGES:
        raise bad_value(name, f"there may be {MAX_MESSAGES} at most.")
    return [parse(value, f"{name}[{index}]") for index, value in enumerate(values)]


def _parse_messages(given: Any) -> tuple[str, tuple[Message, ...]]:
    if given is None or given == []:
        raise missing_parameter("messages")
    messages = parse_each(given, "messages", "an array", parse_message)
    if any([m.role == "tool" or m.tool_calls or m.attachments for m in messages]):
        messages = with_tool_names(in_rounds(messages))
    return split_system(messages)


def in_rounds(messages: Iterable[Message]) -> list[Message]:
    """The messages, calls with those of the same answer, and results behind them.

    Some clients join the calls of several answers in a message, others spread those of
    one, or part them from its text. A user's message of nothing but files is joined to
    the words beside it.
    """
    answers = _in_answers(messages)
    runs = itertools.groupby(answers, lambda m: bool(m.tool_calls or m.call_id))
    ordered: list[Message] = []
    for is_of_calls, run in runs:
        ordered += _by_answer([*run]) if is_of_calls else _files_joined([*run])
    return ordered


def _in_answers(messages: Iterable[Message]) -> list[Message]:
    """The messages; the thoughts, text and calls of one answer become one.

    These come in any order. Two texts are two messages: agents that take turns leave
    several.
    """
    groups: list[list[Message]] = []
    for message in messages:
        if groups and _is_one_answer(groups[-1][-1], message):
            groups[-1].append(message)
        else:
            groups.append([message])
    return [joined(group) if len(group) > 1 else group[0] for group in groups]


def _is_one_answer(said: Message, more: Message) -> bool:
    """Whether a message is more of an answer: not both have a text, or will have."""
    if not said.role == more.role == "assistant":
        return False
    is_text = more.text if more.tool_calls else plain_text(said) or said.spoken_id
    return said.name == more.name and not (is_text or more.spoken_id)


def _files_joined(messages: list[Message]) -> list[Message]:
    """The messages; one of a user's that has only files joins the next, or the last.

    Gradio sends files ahead of their question, and later shows both as one message.
    """
    said: list[Message] = []
    for (role, _), run in itertools.groupby(messages, lambda m: (m.role, m.name)):
        group = [*run]
        if role == "user" and len(group) > 1:
            numbered = enumerate(group, 1)
            ends = [at for at, m in numbered if m.text.strip() or not m.attachments]
            bounds = [0, *ends[:-1], len(group)]
            group = [joined(group[a:b]) for a, b in zip(bounds, bounds[1:])]
        said += group
    return said


def _by_answer(messages: list[Message]) -> list[Message]:
    """Calls and results by the answers that made them; unchanged if one is not ours."""
    calls: dict[str, list[Message]] = defaultdict(list)  # by answer
    results: dict[str, list[Message]] = defaultdict(list)  # of these calls
    for message in messages:
        said = message
        for call in message.tool_calls:
            calls[answer_of_call(call.id)].append(said._replace(tool_calls=(call,)))
            said = Message("assistant", "")  # its text goes with its first call
        if message.call_id:
            results[answer_of_call(message.call_id)].append(said)
    if "" in calls or not results.keys() <= calls.keys():
        return messages
    return [m for key, answer in calls.items() for m in (joined(answer), *results[key])]


def joined(said: Messages) -> Message:
    """The messages of one answer, or one question, as one."""
    return said[0]._replace(
        text="\n".join(m.text for m in said if m.text),
        attachments=tuple(file for m in said for file in m.attachments),
        tool_calls=tuple(call for m in said for call in m.tool_calls),
    )


def with_tool_names(messages: list[Message]) -> list[Message]:
    """The messages, tool results under their tools' names and in their calls' order.

    The app knows no ids: only the order tells apart the results of two calls of a tool.
    """
    calls: dict[str, tuple[float, str]] = {}  # id: (which of all, the tool's name)
    ordered: list[Message] = []
    numbers = count()

    def called(result: Message) -> tuple[float, str]:
        unknown = (inf, result.name or result.call_id)
        return calls.get(result.call_id or result.name, unknown)

    for role, run in itertools.groupby(messages, operator.attrgetter("role")):
        group = list(run)
        if role == "tool":
            known = sorted([(*called(m), m) for m in group], key=operator.itemgetter(0))
            group = [m._replace(name=name, call_id="") for _, name, m in known]
        for call in (call for message in group for call in message.tool_calls):
            calls[call.id] = (next(numbers), call.name)  # ids may return
        ordered += group
    return ordered


def _parse_stops(stop: Any) -> tuple[str, ...]:
    if not stop:
        return ()
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise bad_type("stop", "a string or an array of strings")
    if len(stops) > MAX_STOPS or max(map(len, stops)) > MAX_STOP_CHARS:
        problem = f"at most {MAX_STOPS}, of {MAX_STOP_CHARS} characters each."
        raise bad_value("stop", problem)
    return tuple(filter(None, stops))


def _parse_n(n: Any) -> int:
    number = of_type(n, int, "n", "a whole number")
    if not 1 <= number <= MAX_CHOICES:
        raise bad_value("n", f"it must be from 1 to {MAX_CHOICES}.")
    return number


def parse_inputs(direct: Any, in_metadata: Any) -> dict[str, Any]:
    """The app's inputs: `inputs` as an object, over `metadata.inputs` as JSON text."""
    inputs: dict[str, Any] = {}
    if isinstance(in_metadata, str) and in_metadata:
        try:
            in_metadata = read_json(in_metadata)
        except ValueError:
            raise bad_value("metadata.inputs", "it is not JSON text.") from None
    for name, value in (("metadata.inputs", in_metadata), ("inputs", direct)):
        if value not in (None, ""):
            inputs.update(of_type(value, dict, name))
    return inputs


def parse_user(body: Json) -> str:
    """The end user that a request names, "" if none."""
    for name in ("safety_identifier", "user"):
        user = body.get(name)
        if isinstance(user, dict):  # Open WebUI's pipelines send an object
            user = user.get("id") or user.get("email") or user.get("name")
        if user not in (None, "") and isinstance(user, (str, int)):
            return user_name(str(user))
    return ""


def user_name(name: str) -> str:
    """The name by which Dify knows an end user: a hash of one that is too long."""
    if len(name) <= MAX_USER_CHARS:
        return name
    return "user-" + hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()


@functools.lru_cache(maxsize=256)
def user_of_key(key: str) -> str:
    """The end user where nobody says more: all who use a client's key are one."""
    return "opendify-" + hashlib.sha256(key.encode()).hexdigest()[:16]


_ROLES = {role: role for role in ("system", "assistant", "tool")}
_ROLES |= {"developer": "system", "function": "tool"}  # every other is the user's


def parse_message(message: Any, where: str) -> Message:
    """One message of a history."""
    message = of_type(message, dict, where)
    role = _ROLES.get(str(message.get("role")), "user")
    text, attachments = parse_content(message.get("content"), f"{where}.content")
    name = message.get("name") if message.get("name") != role else ""  # AutoGen's users
    spoken_id = call_id = ""
    if role == "tool":
        call_id = str(message.get("tool_call_id") or "")
    elif role == "assistant" and not text:
        audio = object_of(message.get("audio"))
        text = str(message.get("refusal") or audio.get("transcript") or "")
        spoken_id = "" if text else str(audio.get("id") or "")
    calls = parse_calls(message)
    return Message(role, text, str(name or ""), attachments, calls, spoken_id, call_id)


def parse_calls(message: Json) -> tuple[ToolCall, ...]:
    """Earlier calls of an assistant's message, of both generations."""
    given, legacy = message.get("tool_calls"), message.get("function_call")
    if not (given or legacy):  # nearly always
        return ()
    calls = objects_of(given) + ([{"function": legacy}] if legacy else [])
    parsed = []
    for call in calls:
        kind = "custom" if isinstance(call.get("custom"), dict) else "function"
        if isinstance(call.get(kind), dict):
            parsed.append(parse_call(kind, call.get("id"), call[kind]))
    return tuple(parsed)


def parse_call(kind: str, id_: Any, called: Json) -> ToolCall:
    """A call of a "function", or of a "custom" tool, whose text is an argument.

    The name of one in a namespace begins with it.
    """
    names = filter(None, (called.get("namespace"), called.get("name")))
    arguments = called.get("arguments")
    if kind == "custom":
        arguments = {"input": called.get("input") or ""}
    if not isinstance(arguments, str):
        arguments = json_text(arguments or {})
    return ToolCall(str(id_ or ""), ".".join(map(str, names)), arguments)


def parse_content(content: Any, where: str) -> tuple[str, tuple[Attachment, ...]]:
    """A message's text, its parts joined by newlines, and its files."""
    if content is None or isinstance(content, str):
        return content or "", ()
    parts = parse_each(content, where, "a string or an array of parts", _parse_part)
    texts = [part for part in parts if isinstance(part, str)]
    files = [part for part in parts if isinstance(part, Attachment)]
    return "\n".join(texts), tuple(files)


def _parse_part(part: Any, where: str) -> str | Attachment | None:
    if isinstance(part, str):
        return part
    part = of_type(part, dict, where)
    kind = str(part.get("type"))
    if kind in _FILE_PARTS:
        return _parse_file(part, where)
    if kind in ("thinking", "redacted_thinking", "reasoning"):
        return None  # clients of other APIs send back what an assistant thought
    text = part.get("text", part.get("refusal"))
    if "text" in part or isinstance(text, str):
        return of_type(text, str, f"{where}.text")
    raise bad_value(where, f"content of type {kind!r:.100} can't be sent to an app.")


_CHAT_ONLY = (
    *("tools", "tool_choice", "functions", "function_call", "response_format"),
    *("text", "modalities"),
)


def parse_completion_request(body: Json) -> tuple[ChatRequest, list[Ask]]:
    """The body of `POST /completions`: each prompt, n times, is a question.

    Returns:
        A chat request with the same options and `echoes`, and the questions.
    """
    prompt = body.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not prompts:
        raise missing_parameter("prompt")
    if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
        raise bad_value("prompt", "token ids can't be sent to an app; send text.")
    if body.get("suffix"):
        problem = "Unsupported parameter: 'suffix'; no app can write between two texts."
        raise BadRequest(problem, param="suffix", code="unsupported_parameter")
    # Fields that both APIs have; `text`, say, would be read as the format of Responses.
    fields = {name: body[name] for name in body if name not in _CHAT_ONLY}
    chat = parse_chat_request({**fields, "messages": [{"role": "user", "content": ""}]})
    each = [prompt for prompt in prompts for _ in range(chat.n)]
    if len(each) > MAX_COMPLETIONS:
        raise bad_value("prompt", f"there may be {MAX_COMPLETIONS} choices at most.")
    asks = [chat.ask._replace(messages=(Message("user", text),)) for text in each]
    echoes = [text if body.get("echo") else "" for text in each]
    return chat._replace(echoes=echoes), asks


# Files in requests...


_MEDIA_TYPES = {  # by extension; a file without one gets the last of its type
    **{kind: f"image/{kind}" for kind in ("bmp", "gif", "jpeg", "png", "webp")},
    **{kind: f"video/{kind}" for kind in ("mp4", "mpeg", "webm")},
    "jpg": "image/jpeg",
    "svg": "image/svg+xml",
    "mp3": "audio/mpeg",
    "wav": "audio/x-wav",
    "m4a": "audio/mp4",
    "mov": "video/quicktime",
    "txt": "text/plain",
    "md": "text/markdown",
    "docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    "xlsx": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
    "pptx": "application/vnd.openxmlformats-officedocument.presentationml.presentation",
    "doc": "application/msword",
    "xls": "application/vnd.ms-excel",
    "bin": "application/octet-stream",
}
_EXTENSIONS = {media_type: extension for extension, media_type in _MEDIA_TYPES.items()}
# Of each kind of part that brings a file: the file's name where nothing tells one, the
# key of what has it, and of the URL or the data in that. Clients of vLLM and OpenRouter
# send video and sound in an image's form, those of GLM and Perplexity a file, too, and
# LangBot also its data; Responses has no object around a file.
_FILE_PARTS = {
    "image_url": ("image", "image_url", "url"),
    "input_image": ("image", "image_url", "url"),
    "video_url": ("video", "video_url", "url"),
    "audio_url": ("audio", "audio_url", "url"),
    "input_audio": ("audio", "input_audio", "data"),
    "file_url": ("file", "file_url", "url"),
    "file_base64": ("file", "file_base64", "url"),
    "file": ("file", "file", "file_data"),
    "input_file": ("file", "file", "file_data"),
}


def _parse_file(part: Json, where: str) -> Attachment:
    """The file of a part; a stored one's id may stand in the place of a URL."""
    stem, key, source_key = _FILE_PARTS[part["type"]]
    given = part.get(key)
    file = {**part, **(given if isinstance(given, dict) else {"url": given})}
    named, source = file.get("file_id"), file.get(source_key) or file.get("file_url")
    id_ = named or file.get("url")
    # With nothing beside it, a `file_id` is an id even if it is another service's.
    if isinstance(id_, str) and (id_.startswith(FILE_PREFIX) or (named and not source)):
        return Attachment("file", file_id=id_)
    if not isinstance(source, str) or not source:
        problem = f"the {stem} needs `{key}.{source_key}`: a URL, or data in base64."
        raise bad_value(where, problem)
    name = str(file.get("filename") or file.get("file_name") or "")
    if key != "input_audio":
        return _attachment(source, name, stem, where)
    if not _is_data_url(source):
        name = f"audio.{file.get('format') or 'wav'}".lower()
    sound = _attachment(source, name, stem, where)
    # By its name alone it could be a video.
    return replace(sound, media_type=f"audio/{sound.media_type.partition('/')[2]}")


def _attachment(source: str, name: str, stem: str, where: str) -> Attachment:
    """A file from an http(s) URL, a data URL or bare base64."""
    if re.match(r"https?://", source, re.IGNORECASE):
        try:
            path = urllib.parse.urlsplit(source).path
        except ValueError:
            raise bad_value(where, "the URL is malformed.") from None
        name = name or urllib.parse.unquote(path.rpartition("/")[2])
        family = "" if stem == "file" else f"{stem}/*"
        return Attachment(_plain_name(name or stem, ""), family, url=source)
    url = source if _is_data_url(source) else f"data:;base64,{source}"
    return known_file(name or stem, *_parse_data_url(url, where))


def known_file(name: str, media_type: str, data: bytes = b"") -> Attachment:
    """A file under a name and a media type that Dify takes, guessed if need be."""
    media_type = media_type.partition(";")[0].strip().lower()
    shape = r"[\w.+-]{1,127}/[\w.+-]{1,127}"  # RFC 6838, section 4.2
    is_told = re.fullmatch(shape, media_type, re.ASCII)
    if not is_told or media_type == "application/octet-stream":
        media_type = _guess_media_type(name, data)
    if media_type.startswith("image/"):
        # Dify passes it on, and some models take an image under its true type only.
        proper = _MEDIA_TYPES.get(media_type.partition("/")[2], media_type)
        by_bytes = _type_by_bytes(data)
        media_type = by_bytes if by_bytes.startswith("image/") else proper
    return Attachment(_plain_name(name, media_type), media_type, data)


def _is_data_url(source: str) -> bool:
    return source[:5].lower() == "data:"


def _parse_data_url(url: str, where: str) -> tuple[str, bytes]:
    """(media type, bytes) of a data URL (RFC 2397), in every form that clients send."""
    head, comma, payload = url[5:].partition(",")
    if not comma:
        raise bad_value(where, "the data URL has no comma.")
    fields = [part.strip().lower() for part in head.split(";")]
    media_type = fields[0] if "/" in fields[0] else ""
    if "base64" in fields:  # last, says the RFC
        return media_type, _parse_base64(urllib.parse.unquote(payload), where)
    data = urllib.parse.unquote_to_bytes(payload.encode("utf-8", "replace"))
    return media_type or "text/plain", data


def _parse_base64(text: str, where: str) -> bytes:
    """Base64 with or without padding, white space, or the URL-safe alphabet."""
    try:
        return decode_base64("".join(text.split()))
    except ValueError:
        raise bad_value(where, "the file's data is not base64.") from None


def _guess_media_type(name: str, data: bytes) -> str:
    """For data of an unknown type: by the extension, else by the first bytes."""
    extension = _extension(name)
    known = _MEDIA_TYPES.get(extension) or _type_by_bytes(data)
    return known or f"application/{extension or 'octet-stream'}"


def _type_by_bytes(data: bytes) -> str:
    """What the first bytes tell of a file's type; "" if they tell nothing."""
    kinds = (kind for magic, kind in _MAGIC if re.match(magic, data, re.DOTALL))
    return next(kinds, "")


def _extension(name: str) -> str:
    """What follows the last dot, in lower case; "" for a number: "Report v1.2"."""
    match = re.search(r"\.(\d*[A-Za-z]\w{0,9})\Z", name, re.ASCII)
    return match[1].lower() if match else ""


_MAGIC = (
    (rb"%PDF", "application/pdf"),
    (rb"\x89PNG", "image/png"),
    (rb"\xff\xd8\xff", "image/jpeg"),
    (rb"GIF8", "image/gif"),
    (rb"RIFF....WEBP", "image/webp"),
    (rb"RIFF....WAVE", "audio/x-wav"),
)


def _plain_name(name: str, media_type: str) -> str:
    """A file name that every Dify takes: no path, safe characters, an extension."""
    name = re.sub(r'[\\/:*?"<>|\x00-\x1f\ud800-\udfff]', "_", name)[-150:].strip(". ")
    name = name or "file"
    if media_type and not _extension(name):
        subtype = re.sub(r"\Ax-|\W.*", "", media_type.partition("/")[2])
        name += "." + _EXTENSIONS.get(media_type, subtype or "bin")
    return name


# Audio...

MAX_SPEECH_CHARS = 4096  # OpenAI's own
# OpenAI's own; they mean nothing to the model of another provider.
_VOICES = (
    *("alloy", "ash", "ballad", "cedar", "coral", "echo", "fable", "marin", "nova"),
    *("onyx", "sage", "shimmer", "verse"),
)
_SOUND_FORMATS = ("wav", "aac", "mp3", "flac", "opus")
_TRANSCRIPTS = ("json", "text", "srt", "verbose_json", "vtt")
_CHARS_PER_S = 15.0  # of speech, where nothing tells how long it takes


class SpeechRequest(NamedTuple):
    """What is to be said aloud; `voice` is "" for the app's own."""

    model: str
    text: str
    voice: str
    user: str
    is_sse: bool


def parse_speech_request(body: Json) -> SpeechRequest:
    """The body of `POST /audio/speech`; the format is the app's choice."""
    model, text = _parse_required(body, "model"), _parse_required(body, "input")
    if len(text) > MAX_SPEECH_CHARS:
        raise bad_value("input", f"it is over {MAX_SPEECH_CHARS} characters.")
    voice = _parse_voice(body.get("voice"), "voice")
    is_sse = body.get("stream_format") == "sse"
    return SpeechRequest(model, text, voice, parse_user(body), is_sse)


def parse_audio_request(body: Json) -> tuple[dict[str, str], Attachment]:
    """(fields, file) of a transcription that comes as JSON: Open WebUI's other way.

    {"model": "m", "input_audio": {"data": "<base64>", "format": "mp3"}}
    """
    given = {name: value for name, value in body.items() if value is not None}
    part = {"type": "input_audio", "input_audio": given.pop("input_audio", None)}
    file = _parse_file(part, "input_audio")
    if not file.data:
        raise bad_value("input_audio", "`data` must be a recording in base64.")
    fields = {k: v if isinstance(v, str) else json.dumps(v) for k, v in given.items()}
    return fields, file


def _parse_voice(voice: Any, field_name: str) -> str:
    voice = voice.get("id") if isinstance(voice, dict) else voice
    voice = "" if voice in (None, "default") else voice
    return of_type(voice, str, field_name, "a string, or an object with an `id`")


def _parse_spoken(body: Json, n: int) -> str | None:
    """The voice in which a chat's answer is to be said; None for one in writing."""
    modalities, audio = body.get("modalities"), body.get("audio")
    if not isinstance(modalities, list) or "audio" not in modalities:
        return None
    if audio is None:
        raise missing_parameter("audio")
    audio = of_type(audio, dict, "audio")
    if n > 1:
        raise bad_value("n", "a spoken answer has one choice.")
    if audio.get("format") not in (None, *_SOUND_FORMATS):
        problem = "Dify's speech is a file of its own format: ask for mp3 or wav."
        raise bad_value("audio.format", problem)
    return _parse_voice(audio.get("voice"), "audio.voice")


def voice_for(voice: str, own: str) -> str:
    """The voice to ask the app for: its `own` in the place of one of OpenAI's names.

    Those mean nothing to another provider's model, unless its own voice is one of them.
    """
    return own if own and own not in _VOICES and voice in _VOICES else voice


def encode_speech(audio: bytes) -> bytes:
    """Some audio as an event of speech that is streamed as SSE; b"" ends it."""
    if audio:
        text = base64.b64encode(audio).decode()
        return encode_event(json_bytes({"type": "speech.audio.delta", "audio": text}))
    usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    return encode_event(json_bytes({"type": "speech.audio.done", "usage": usage}))


def transcript_format(fields: Mapping[str, str]) -> str:
    """How a form wants its transcript: its `response_format`, or "stream"."""
    wanted = fields.get("response_format") or "json"
    if wanted not in _TRANSCRIPTS:
        raise bad_value("response_format", f"it can be {', '.join(_TRANSCRIPTS)}.")
    return "stream" if fields.get("stream", "").lower() in ("true", "1") else wanted


def transcript(
    text: str, fields: Mapping[str, str], task: str, seconds: float
) -> tuple[str, bytes]:
    """(media type, body) of a transcript, as a form wants it.

    Dify tells no times: it is one segment, and one cue. `seconds` are 0 where they are
    not known; then a cue lasts as long as its words take to say.
    """
    text = whole_characters(text)
    wanted = transcript_format(fields)
    if wanted == "stream":
        delta = {"type": "transcript.text.delta", "delta": text}
        done = {"type": "transcript.text.done", "text": text}
        events = encode_event(json_bytes(delta)) + encode_event(json_bytes(done))
        return "text/event-stream; charset=utf-8", events
    if wanted == "text":
        return "text/plain; charset=utf-8", f"{text}\n".encode()
    if wanted in ("srt", "vtt"):
        head, kind = ("1\n", "plain") if wanted == "srt" else ("WEBVTT\n\n", "vtt")
        end = _cue_time(seconds or max(1.0, len(text) / _CHARS_PER_S))
        cue = f"{_cue_time(0)} --> {end}".replace(".", "," if wanted == "srt" else ".")
        lines = re.sub(r"\n\s*\n", "\n", text.strip())  # a blank line would end it
        return f"text/{kind}; charset=utf-8", f"{head}{cue}\n{lines}\n\n".encode()
    value: dict[str, Any] = {"text": text}
    if wanted == "verbose_json":
        language = fields.get("language") or "unknown"
        about = {"task": task, "language": language, "duration": seconds}
        value = {**about, **value, "segments": _segments(text, seconds)}
    if seconds:
        value["usage"] = {"type": "duration", "seconds": seconds}
    return "application/json", json_bytes(value)


def wav_seconds(start: bytes, size: int) -> float:
    """How long a WAV file of `size` bytes plays, by its head; 0 for any other file."""
    is_wav = re.match(rb"RIFF....WAVEfmt ", start, re.DOTALL) and size > 44
    bytes_per_s = int.from_bytes(start[28:32], "little") if is_wav else 0
    return round((size - 44) / bytes_per_s, 3) if bytes_per_s else 0.0


def _segments(text: str, seconds: float) -> list[dict[str, Any]]:
    unknown = ("temperature", "avg_logprob", "compression_ratio", "no_speech_prob")
    place = {"id": 0, "seek": 0, "start": 0.0, "end": seconds, "text": text}
    return [{**place, "tokens": [], **dict.fromkeys(unknown, 0.0)}] if text else []


def _cue_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds * 1000), 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{rest / 1000:06.3f}"


# Files...

FILE_PREFIX = "file-"  # of an id
_PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data")


class StoredFile(NamedTuple):
    """What a file's id says of it (`file-…`): nothing else is kept here."""

    upload_id: str
    user: str
    name: str
    media_type: str
    size: str  # in bytes; an id holds texts
    created: str  # a UnixTime
    purpose: str

    @property
    def attachment(self) -> Attachment:
        """The file as part of a message."""
        name, media_type, size = self.name, self.media_type, int(self.size)
        return Attachment(name, media_type, upload_id=self.upload_id, size=size)


def file_object(id_: str, file: StoredFile) -> dict[str, Any]:
    """A file as OpenAI shows it."""
    return {
        "id": id_,
        "object": "file",
        "bytes": int(file.size),
        "created_at": int(file.created),
        "filename": file.name,
        "purpose": file.purpose if file.purpose in _PURPOSES else "user_data",
        "status": "processed",
    }


# Answers...


class Envelope(NamedTuple):
    """What all chunks of a completion, or the whole one, have in common.

    The `chat` request says how they are written; an answer that is said aloud is
    `spoken`.
    """

    id: str
    created: UnixTime
    model: str
    chat: ChatRequest
    spoken: Spoken | None = None

    def head(self, kind: str) -> dict[str, Any]:
        """The keys with which an object of this kind begins."""
        about = {"id": self.id, "object": kind, "created": self.created}
        return {**about, "model": self.model, "system_fingerprint": "fp_opendify"}

    def stream(self, index: int) -> ChatStream:
        """What writes the chunks of a choice."""
        if self.spoken:
            return SpokenStream(self, self.spoken)
        return (CompletionStream if self.chat.echoes else ChatStream)(self, index)

    def whole(self, answers: Sequence[Answer], ids: DifyIds) -> dict[str, Any]:
        """The object of the whole answers, one for each choice."""
        choices, echoes = [], self.chat.echoes
        for index, answer in enumerate(answers):
            if echoes:
                content: Json = {"text": echoes[index] + answer.text}
            else:
                content = {"message": self._message(answer, ids)}
            reason = _finish_reason(answer, self.chat.is_legacy)
            choices.append(_choice(index, content, reason))
        head = self.head("text_completion" if echoes else "chat.completion")
        usage = _usage_object(sum([answer.usage for answer in answers], NO_USAGE))
        return {**head, "choices": choices, "usage": usage, **dify_key(ids)}

    def _message(self, answer: Answer, ids: DifyIds) -> dict[str, Any]:
        text = answer.text
        said: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if answer.calls:
            said["content"] = text or None
            calls = [_call_object(call) for call in answer.calls]
            if self.chat.is_legacy:
                said["function_call"] = calls[0]["function"]
            else:
                said["tool_calls"] = calls
        if answer.reasoning:
            said["reasoning_content"] = answer.reasoning
        said.update(cite(answer.citations, len(text)))
        if self.spoken and answer.sounds:
            said["content"] = None
            said["audio"] = {
                "id": self.spoken.id_of(ids),
                "expires_at": self.spoken.expires_at,
                "data": base64.b64encode(b"".join(answer.sounds)).decode(),
                "transcript": text,
            }
        return said


class Spoken(NamedTuple):
    """What spoken answers have besides their words and their sound.

    `id_of` makes an answer's id from Dify's.
    """

    id_of: Callable[[DifyIds], str]
    expires_at: UnixTime


def dify_key(ids: DifyIds) -> dict[str, Any]:
    """The key beside OpenAI's own that tells Dify's ids, where they are known."""
    return {"dify": dict(ids)} if ids else {}


def _choice(index: int, content: Json, reason: str | None) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": None, "finish_reason": reason}


def _call_object(call: ToolCall) -> dict[str, Any]:
    kind, key = _CALL_FORMS[call.is_custom]
    return {"id": call.id, "type": kind, kind: {"name": call.name, key: call.given}}


# By whether the tool is a custom one: a call's type, which is also the key of what is
# called, and the key of what it is given.
_CALL_FORMS = {False: ("function", "arguments"), True: ("custom", "input")}


def _finish_reason(answer: Answer, is_legacy: bool) -> str:
    if answer.finish_reason != "stop" or not answer.calls:
        return answer.finish_reason
    return "function_call" if is_legacy else "tool_calls"


_HERE = {"@": 0}  # where the text of a chunk goes
_HERE_JSON = json_bytes(_HERE)


def _template(chunk: bytes, content: bytes) -> bytes:
    """A chunk with this content in the place of `_HERE`, for any text in that of %b.

    Written so, a chunk costs a twentieth of what `dumps` of the whole one would.
    """
    return chunk.replace(b"%", b"%%").replace(_HERE_JSON, content)


# One API reads lines of 64 KiB, and aiohttp's older readers twice that; a character
# may take six bytes. Base64 that is cut here stays whole.
MAX_CHUNK_CHARS = 8 * 1024


def _pieces(text: str) -> list[str]:
    """A text as the chunks that it fits in."""
    starts = range(0, len(text), MAX_CHUNK_CHARS)
    return [text[at : at + MAX_CHUNK_CHARS] for at in starts]


def _written(template: bytes, text: str) -> bytes:
    """The chunks that a text becomes."""
    if len(text) <= MAX_CHUNK_CHARS:  # saves a sixth of a stream without pauses
        return template % json_string(text)
    return b"".join([template % json_string(piece) for piece in _pieces(text)])


def encode_failure(error: ProxyError) -> bytes:
    """The end of a stream of chunks, or of speech, that can't be finished."""
    return encode_event(json_bytes(error_body(error))) + _DONE


class ChatStream:
    """Writes the chunks of one choice of a streamed chat completion as SSE."""

    needs_ids = False
    _kind, _key = "chat.completion.chunk", "delta"
    # The content of the first chunk, and of one with text.
    _first = b'{"role":"assistant","content":"","refusal":null}'
    _of_text = b'{"content":%b}'

    def __init__(self, envelope: Envelope, index: int = 0) -> None:
        self.summary = Answer()  # what is no text: calls, citations, usage, the end
        self._head = envelope.head(self._kind)
        self._usage_key = {"usage": None} if envelope.chat.include_usage else {}
        self._index = index
        self._is_legacy = envelope.chat.is_legacy
        self._text = self._reasoning = b""  # templates of chunks, once it has begun
        self._chars = 0

    def begin(self, ids: DifyIds) -> bytes:
        """The first chunk: the role, and Dify's ids."""
        chunk = self._chunk(_HERE)
        self._text = _template(chunk, self._of_text)
        self._reasoning = _template(chunk, b'{"reasoning_content":%b}')
        return self._chunk(_HERE, **dify_key(ids)).replace(_HERE_JSON, self._first)

    def encode(self, part: Part) -> bytes:
        """The chunks that a part becomes; b"" for one that is kept for the end."""
        if isinstance(part, Text):
            self._chars += len(part.text)
            return _written(self._text, part.text)
        if isinstance(part, Reasoning):
            return _written(self._reasoning, part.text)
        self.summary.add([part])
        if isinstance(part, ToolCall):
            return self._call(part)
        if isinstance(part, Finish):
            reason = _finish_reason(self.summary, self._is_legacy)
            return self._chunk(cite(self.summary.citations, self._chars), reason)
        return b""

    def end(self, usage: Usage) -> bytes:
        """The end of the stream, once all its choices are finished."""
        if not self._usage_key:
            return _DONE
        return self._chunk(None, usage=_usage_object(usage)) + _DONE

    def fail(self, error: ProxyError) -> bytes:
        """The end of a stream that can't be finished: no finish_reason, ever."""
        return encode_failure(error)

    def heartbeat(self) -> bytes:
        """A comment, which every reader skips."""
        return encode_comment("keep-alive")

    def _call(self, call: ToolCall) -> bytes:
        """Two chunks: which tool, and with what; more if that is long."""
        kind, key = _CALL_FORMS[call.is_custom]
        named = {"name": call.name, key: ""}
        rest = [{key: piece} for piece in _pieces(call.given) or [""]]
        if self._is_legacy:  # then this is the only call
            deltas = (named, *rest)
            return b"".join(self._chunk({"function_call": delta}) for delta in deltas)
        index = len(self.summary.calls) - 1
        about = {"index": index, "id": call.id, "type": kind, kind: named}
        entries = (about, *({"index": index, kind: piece} for piece in rest))
        return b"".join(self._chunk({"tool_calls": [entry]}) for entry in entries)

    def _chunk(self, content: Any, reason: str | None = None, **extra: Any) -> bytes:
        """One chunk: some content of the choice, or None beside all choices."""
        choice = _choice(self._index, {self._key: content}, reason)
        choices = [] if content is None else [choice]
        chunk = {**self._head, "choices": choices, **self._usage_key, **extra}
        return encode_event(json_bytes(chunk))


class SpokenStream(ChatStream):
    """The same for a spoken answer: its text is what the audio says, which follows.

    The audio is cut where its base64 is whole, so that a client may decode the pieces
    one by one, or joined.
    """

    needs_ids = True
    _first = b'{"role":"assistant","content":null,"refusal":null}'
    _of_text = b'{"audio":{"transcript":%b}}'

    def __init__(self, envelope: Envelope, spoken: Spoken) -> None:
        super().__init__(envelope)
        self._spoken = spoken
        self._id = ""  # until it is told, with the first text
        self._sound: bytes | None = None  # what is not written yet

    def begin(self, ids: DifyIds) -> bytes:
        """The first chunk; the audio's id waits for the first text."""
        self._id = self._spoken.id_of(ids)
        return super().begin(ids)

    def encode(self, part: Part) -> bytes:
        """The chunks that a part becomes."""
        events = b""
        if isinstance(part, Text) and self._id:
            events, self._id = self._audio({"id": self._id, "transcript": ""}), ""
        elif isinstance(part, Sound):
            sound = (self._sound or b"") + part.data
            return self._data(sound, len(sound) // 3 * 3)
        elif isinstance(part, Finish) and self._sound is not None:
            events = self._data(self._sound, len(self._sound))
            events += self._audio({"expires_at": self._spoken.expires_at})
        return events + super().encode(part)

    def _data(self, sound: bytes, size: int) -> bytes:
        """The chunks of the first bytes of the audio; the others wait."""
        self._sound, text = sound[size:], base64.b64encode(sound[:size]).decode()
        return b"".join([self._audio({"data": piece}) for piece in _pieces(text)])

    def _audio(self, audio: Json) -> bytes:
        return self._chunk({"audio": audio})


class CompletionStream(ChatStream):
    """The same for a choice of the legacy API: `POST /completions`."""

    _kind, _key = "text_completion", "text"
    _of_text = b"%b"

    def __init__(self, envelope: Envelope, index: int) -> None:
        super().__init__(envelope, index)
        self._first = json_string(envelope.chat.echoes[index])  # the prompt, if at all

    def encode(self, part: Part) -> bytes:
        """The chunks that a part becomes; b"" for one that has no place here."""
        if isinstance(part, Finish):
            return self._chunk("", part.reason)
        return super().encode(part) if isinstance(part, (Text, Usage)) else b""


def model_object(model: str, name: str, created: UnixTime) -> dict[str, Any]:
    """One model, with its app's name where that is known and differs."""
    named = {"name": name} if name and name != model else {}
    about = {"id": model, "object": "model", "created": created}
    return {**about, "owned_by": "dify", **named}


_DONE = b"data: [DONE]\n\n"


def _usage_object(usage: Usage) -> dict[str, Any]:
    return {**vars(usage), "total_tokens": usage.total_tokens}


def cite(resources: Sequence[Json], at: int) -> dict[str, Any]:
    """Citations as OpenAI's annotations, where they have a URL, and complete.

    Dify does not tell what they are for: they are put to all text, up to `at`.
    """
    annotations = []
    for resource in resources:
        if url := url_of(resource):
            title = str(resource.get("title") or resource.get("document_name") or url)
            citation = {"start_index": 0, "end_index": at, "url": url, "title": title}
            annotations.append({"type": "url_citation", "url_citation": citation})
    cited: dict[str, Any] = {"annotations": annotations} if annotations else {}
    return {**cited, "citations": list(resources)} if resources else {}


def url_of(resource: Json) -> str:
    """Where the cited document is, "" if that is unknown."""
    metadata = object_of(resource.get("doc_metadata"))
    for value in (*metadata.values(), resource.get("url")):
        if isinstance(value, str) and re.match(r"https?://\S+\Z", value):
            return value
    return ""


# ==============================================================================
# 10. Responses
# ==============================================================================
#
# OpenAI's newer dialect, both ways, built on the older one: requests to an Ask, answer
# parts to events and whole objects. Keeps nothing: its ids say where in Dify an answer
# is.

# Requests...


Item = Union[Message, str]  # a message, or the id of one that the server has


class ResponsesRequest(NamedTuple):
    """A request for a response.

    `ask` has no messages yet: `ask_of` makes them from `items`, once it is known what
    the references stand for, and what was said before. `previous_response_id` and
    `conversation` are "" where the client named none. `echo` holds the fields that the
    response repeats, in the form that OpenAI's schemas want.
    """

    ask: Ask
    items: tuple[Item, ...]
    stream: bool = False
    previous_response_id: str = ""
    conversation: str = ""
    echo: Json = MappingProxyType({})

    @property
    def references(self) -> tuple[str, ...]:
        """The ids of the items that are only named, in order."""
        return tuple(item for item in self.items if isinstance(item, str))

    @property
    def known_tools(self) -> tuple[Tool, ...]:
        """The tools whose calls stored answers may hold, withdrawn ones included."""
        calls = [c for item in self.items for c in getattr(item, "tool_calls", ())]
        tools = (*(Tool(call.name) for call in calls), *self.ask.tools)
        return tuple({tool.name: tool for tool in tools}.values())


def parse_responses_request(body: Json) -> ResponsesRequest:
    """The body of `POST /responses`; unknown fields, items and nulls are normal.

    Raises:
        BadRequest: a required field is missing, or one has the wrong type.
    """
    previous = _parse_id(body, "previous_response_id")
    conversation = _parse_id(body, "conversation")
    if previous and conversation:
        raise bad_value("previous_response_id", "it can't go with a `conversation`.")
    instructions = of_type(body.get("instructions") or "", str, "instructions")
    items: Sequence[Item] = parse_items(body.get("input"))
    if not items and not previous and not conversation:
        raise missing_parameter("input")
    system, items = split_system(items, instructions)
    ask = parse_ask(body)._replace(system=system)
    stream, echo = parse_stream(body), echo_of(body)
    return ResponsesRequest(ask, items, stream, previous, conversation, echo)


def echo_of(body: Json) -> dict[str, Any]:
    """The fields that a response repeats of its request; of {}, their defaults."""
    return {name: valid(body.get(name)) for name, valid in _ECHOED.items()}


def ask_of(
    request: ResponsesRequest,
    found: Mapping[str, Message | None],
    before: Messages = (),
    told: Messages = (),
) -> Ask:
    """What is asked, in full.

    Args:
        request: the request.
        found: what its references stand for; one that is not found is left out. Of an
            answer some items may be named and others not: the AI SDK names the text
            before its calls, Mastra the calls behind their text.
        before: what was said up to `previous_response_id`.
        told: what Dify has of it, which only names the tools of new results.

    Raises:
        BadRequest: there is nothing but references, and all are unknown.
    """
    said = (found.get(i) if isinstance(i, str) else i for i in request.items)
    messages = [*before, *filter(None, said)]
    messages = with_tool_names([*told, *in_rounds(messages)])[len(told) :]
    if request.references and not (messages or told):
        raise bad_value("input", "none of the items that it names is known.")
    return request.ask._replace(messages=tuple(messages))


def item_named(id_: str, number: str, answer: Message) -> Message | None:
    """What an id means of an answer: one item, or all of it without a `number`.

    Thoughts say nothing: an app's are not sent back to it.
    """
    if not number:
        return answer
    if id_.startswith(_MESSAGE_SHAPE.prefix):
        return answer._replace(tool_calls=())
    if id_.startswith((_CALL_SHAPE.prefix, _CUSTOM_SHAPE.prefix)):
        calls = answer.tool_calls[int(number) :][:1]
        return answer._replace(text="", tool_calls=calls) if calls else None
    return None


def _parse_id(body: Json, name: str) -> str:
    return of_type(_id_in(body.get(name)) or "", str, name)


def _id_in(value: Any) -> Any:
    """The id in "conv_…" or {"id": "conv_…"}; None if there is none."""
    return (value.get("id") if isinstance(value, dict) else value) or None


def parse_items(value: Any, name: str = "input") -> list[Item]:
    """The items that say something to an app, in order."""
    if value is None or isinstance(value, str):
        return [Message("user", value)] if value else []
    parsed = parse_each(value, name, "a string or an array of items", _parse_item)
    return [*filter(None, parsed)]


def _parse_item(item: Any, where: str) -> Item | None:
    """An item of a kind that says something to an app; None for all others."""
    if isinstance(item, str):
        return Message("user", item)
    item = of_type(item, dict, where)
    kind = item.get("type") or ("message" if "role" in item else "item_reference")
    parse = _ITEMS.get(str(kind))
    return parse(item, where) if parse else None


def _parse_call(item: Json, where: str) -> Message:
    kind = "custom" if item.get("type") == "custom_tool_call" else "function"
    call = parse_call(kind, item.get("call_id"), item)
    return Message("assistant", "", tool_calls=(call,))


def _parse_result(item: Json, where: str) -> Message:
    output = item.get("output")
    if output is not None and not isinstance(output, (str, list)):
        output = json_text(output)
    text, files = parse_content(output, f"{where}.output")
    call_id = str(item.get("call_id") or "")
    return Message("tool", text, attachments=files, call_id=call_id)


_ITEMS: Mapping[str, Callable[[dict[str, Any], str], Item | None]] = {
    "message": parse_message,
    "item_reference": lambda item, where: str(item.get("id") or ""),
    "function_call": _parse_call,
    "custom_tool_call": _parse_call,
    "function_call_output": _parse_result,
    "custom_tool_call_output": _parse_result,
}


def _echo_metadata(value: Any) -> dict[str, str]:
    return {name: x for name, x in object_of(value).items() if isinstance(x, str)}


def _echo_tools(value: Any) -> list[dict[str, Any]]:
    """The tools that an app can be told of; others may have any shape (Codex)."""
    tools = []
    for given in objects_of(value):
        kind, name = given.get("type"), given.get("name")
        inner = _echo_tools(given.get("tools")) if kind == "namespace" else []
        is_told = kind in ("function", "custom") or inner
        if not (is_told and isinstance(name, str)):
            continue
        about = str(given.get("description") or "")
        tool: dict[str, Any] = {"type": kind, "name": name, "description": about}
        if kind == "custom":
            tool["format"] = _echo_form(given.get("format"))
        if kind == "function":
            tool["parameters"] = object_of(given.get("parameters"))
            tool["strict"] = bool(given.get("strict"))
        tools.append({**tool, "tools": inner} if inner else tool)
    return tools


def _echo_form(value: Any) -> dict[str, Any]:
    """What a custom tool is given: a text, free unless it says what it must fit."""
    form = object_of(value)
    syntax, definition = form.get("syntax"), form.get("definition")
    if syntax in ("lark", "regex") and isinstance(definition, str):
        return {"type": "grammar", "syntax": syntax, "definition": definition}
    return {"type": "text"}


def _echo_choice(value: Any) -> Any:
    choice = object_of(value)
    kind, name, tools = (choice.get(key) for key in ("type", "name", "tools"))
    if kind in ("function", "custom") and isinstance(name, str):
        return {"type": kind, "name": name}
    if kind == "allowed_tools" and isinstance(tools, list):
        mode = "required" if choice.get("mode") == "required" else "auto"
        return {"type": kind, "mode": mode, "tools": objects_of(tools)}
    return value if value in ("none", "auto", "required") else "auto"


def _echo_text(value: Any) -> dict[str, Any]:
    spec = object_of(object_of(value).get("format"))
    name, schema = spec.get("name"), spec.get("schema")
    if spec.get("type") == "json_schema" and isinstance(schema, dict):
        echo = {"type": "json_schema", "name": str(name or ""), "schema": schema}
        about = str(spec.get("description") or "")
        strict = bool(spec.get("strict"))
        return {"format": {**echo, "description": about, "strict": strict}}
    is_object = spec.get("type") == "json_object"
    return {"format": {"type": "json_object" if is_object else "text"}}


def _echo_name(value: Any) -> Any:
    is_valid = isinstance(value, str) and len(value) <= 64  # OpenAI's own limit
    return value if is_valid else None


def _echo_number(value: Any, most: int) -> float:
    is_valid = type(value) in (int, float) and 0 <= value <= most
    # With a point, as OpenAI writes it: to Dart and Gleam, 1 is no fraction.
    return float(value) if is_valid else 1.0


# What a response repeats of its request: null, and what no schema allows, becomes what
# the field's absence means.
_ECHOED: Mapping[str, Callable[[Any], Any]] = {
    "instructions": lambda value: value if isinstance(value, str) else None,
    "metadata": _echo_metadata,
    "tools": _echo_tools,
    "tool_choice": _echo_choice,
    "parallel_tool_calls": lambda value: value is not False,
    "temperature": lambda value: _echo_number(value, 2),
    "top_p": lambda value: _echo_number(value, 1),
    "presence_penalty": lambda value: 0.0,
    "frequency_penalty": lambda value: 0.0,
    "top_logprobs": lambda value: 0,
    "text": _echo_text,
    "reasoning": lambda value: {"effort": None, "summary": None},
    "max_output_tokens": lambda value: value if type(value) is int else None,
    "max_tool_calls": lambda value: None,
    "truncation": lambda value: "auto" if value == "auto" else "disabled",
    "previous_response_id": _id_in,
    "conversation": lambda value: {"id": _id_in(value)} if _id_in(value) else None,
    "store": lambda value: value is not False,
    "background": lambda value: False,  # it runs in the foreground, and is complete
    "service_tier": lambda value: "default",
    "safety_identifier": _echo_name,
    "prompt_cache_key": _echo_name,
}


# Objects...


@dataclass(frozen=True)
class ResponseFrame:
    """What a response says of itself, and how its ids are made.

    Its ids hold Dify's (`ids`). Where these are unknown, or nothing is to be stored,
    they are made of `fresh` and lead nowhere.
    """

    created: UnixTime
    model: str
    echo: Json
    sealer: IdSealer
    user: str
    fresh: str
    ids: DifyIds = field(default_factory=dict)

    def id(self, prefix: str, item: int | str = "") -> str:
        """The id of the response, or of an item of it."""
        run = self.ids.get("workflow_run_id", "")
        place = [self.ids.get("conversation_id", run), self.ids.get("message_id", run)]
        if all(place) and self.echo["store"]:
            return self.sealer.seal(prefix, [self.user, *place, str(item)])
        return self.sealer.seal(prefix, (), f"{self.fresh}.{item}")

    def stream(self, index: int) -> ResponseStream:
        """What writes the events of the response, which is the only choice."""
        return ResponseStream(self)

    def whole(
        self, answers: Sequence[Answer], ids: DifyIds, error: ProxyError | None = None
    ) -> dict[str, Any]:
        """The object of the whole answer: what a stream of the same parts ends with."""
        (answer,), stream = answers, self.stream(0)
        stream.begin(ids)
        said: list[Part] = [Reasoning(answer.reasoning), Text(answer.text)]
        for part in (*said, *answer.calls, Citations(answer.citations), answer.usage):
            stream.encode(part)
        if error:
            stream.fail(error)
        else:
            stream.encode(Finish(answer.finish_reason))
        return stream.response


_TOLD = re.compile(
    rf"\A({HISTORY_BEGINS}\n\n)?"
    r'(<(message(?:-\d+)?) role="system">\n)(.*?)(\n</\3>\n\n?)',
    re.DOTALL,
)
_END_OF_FOLDED = re.compile(r"</(message(?:-\d+)?)>\n\n\Z")


def asked_text(message: Message, *, keeps_system: bool = False) -> str:
    """A stored question's text, without what the app was told before it.

    With `keeps_system` only the words about tools and formats are left out, which each
    turn is told anew.
    """

    def kept(found: re.Match[str]) -> str:
        heading, begin, _, told, end = found.groups("")
        system = without_words(told) if keeps_system else ""
        return heading + (begin + system + end if system else "")

    return _TOLD.sub(kept, message.text)


def with_past(question: Message, past: str) -> Message:
    """A stored question behind what the app had as an input, without a failed try.

    Where a second try began a conversation of its own, it was told the first one's
    answer, which no client has seen.
    """
    text = f"{past}\n\n{asked_text(question)}" if past else question.text
    words_at = max(0, *map(text.rfind, RETRY_BEGINS))
    said = text[:words_at].removesuffix(f"{QUESTION_BEGINS}\n\n")
    if end := _END_OF_FOLDED.search(said):
        last = said.rfind(f"\n<{end[1]} ")
        if said.startswith(f'\n<{end[1]} role="assistant">', last):
            text = said[:last]
    return question._replace(text=text)


def input_item(id_: str, message: Message) -> dict[str, Any]:
    """A stored question as an item."""
    text = asked_text(message)
    content: list[dict[str, Any]] = [{"type": "input_text", "text": text}]
    for file in message.attachments:
        is_image = file.media_type.startswith("image/")
        image = {"type": "input_image", "image_url": file.url, "detail": "auto"}
        other = {"type": "input_file", "filename": file.name, "file_url": file.url}
        named = {"file_id": file.file_id} if file.file_id else {}  # the URL expires
        content.append({**(image if is_image else other), **named})
    item = {"id": id_, "type": "message", "status": "completed"}
    return {**item, "role": message.role, "content": content}


def stored_item(value: Any, id_: str, taken: Collection[str]) -> dict[str, Any]:
    """An item that a client gave to a conversation, as it is given back.

    It keeps its own id if that is not `taken`: a list is paged by its ids.
    """
    given = {"role": "user", "content": value} if isinstance(value, str) else value
    kind = "message" if "role" in given else "item_reference"
    item: dict[str, Any] = {"id": id_, "type": kind, "status": "completed"}
    item.update((name, v) for name, v in given.items() if v is not None)
    if not (item["id"] and isinstance(item["id"], str)) or item["id"] in taken:
        item["id"] = id_
    content = item.get("content") or []
    if isinstance(content, str):
        kind = "output_text" if item.get("role") == "assistant" else "input_text"
        content = [{"type": kind, "text": content}]
    if item["type"] == "message":
        item["content"] = [_complete(part) for part in content]
    if isinstance(item.get("output"), list):  # a tool's result
        item["output"] = [_complete(part) for part in item["output"]]
    return item


def _complete(part: Any) -> Any:
    """A part of an item, with what clients may leave out of one, but expect in it."""
    shapes = {"output_text": _MESSAGE_SHAPE.part, "input_image": {"detail": "auto"}}
    shape = shapes.get(str(object_of(part).get("type")), {})
    missing = {name: v for name, v in shape.items() if part.get(name) is None}
    return {**part, **missing} if missing else part


def list_page(items: Sequence[Json], query: Mapping[str, str]) -> dict[str, Any]:
    """A page of a list, newest first unless `order` is "asc".

    Args:
        items: all, oldest first.
        query: the request's: `after`, `limit`, `order`.
    """
    try:
        limit = min(max(int(query.get("limit") or 20), 1), 100)
    except ValueError:
        raise bad_value("limit", "it must be a number from 1 to 100.") from None
    ordered = items if query.get("order") == "asc" else items[::-1]
    places = {item["id"]: number for number, item in enumerate(ordered, 1)}
    after = query.get("after")
    start = places.get(after, len(ordered)) if after else 0
    page = ordered[start : start + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else "",
        "last_id": page[-1]["id"] if page else "",
        "has_more": start + limit < len(ordered),
    }


def conversation_object(id_: str, created: UnixTime, metadata: Any) -> dict[str, Any]:
    """A conversation (`conv_…`)."""
    about = {"id": id_, "object": "conversation", "created_at": created}
    return {**about, "metadata": _echo_metadata(metadata)}


def deleted_object(id_: str) -> dict[str, Any]:
    """What is left of a response or a conversation."""
    kind = "conversation.deleted" if id_.startswith("conv_") else "response"
    return {"id": id_, "object": kind, "deleted": True}


def _annotations(resources: Sequence[Json], at: int) -> list[Any]:
    """Citations in the flat form: pages that have a URL, and documents, each once."""
    cited = cite(resources, at).get("annotations", ())
    pages = {c["url"]: c for c in (a["url_citation"] for a in cited)}
    files = {
        str(doc["document_id"]): str(doc["document_name"])
        for doc in resources
        if doc.get("document_id") and doc.get("document_name") and not url_of(doc)
    }
    documents = [
        {"type": "file_citation", "file_id": id_, "filename": name, "index": index}
        for index, (id_, name) in enumerate(files.items())
    ]
    return [*({"type": "url_citation", **page} for page in pages.values()), *documents]


def _usage_of_response(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }


def _failure_code(error: ProxyError) -> str:
    """The code by which Codex decides whether to run the turn again.

    `server_error` and `rate_limit_exceeded` are repeated. What a repeat can't help is
    `invalid_prompt`: final, shown with its message, and the one code of that kind that
    OpenAI's schema has (`insufficient_quota` is not in it).
    """
    if error.is_final or (error.status < 500 and error.status != 429):
        return "invalid_prompt"
    return "rate_limit_exceeded" if error.status == 429 else "server_error"


# Streams...


class _Shape(NamedTuple):
    """How items of a kind are written: their keys, their part, their events."""

    prefix: str
    type: str
    key: str  # where the item has its text, or the part with it
    text_event: str
    added: Mapping[str, Any] = {"status": "in_progress"}  # further keys of the item
    part_event: str = ""
    part: Mapping[str, Any] = {}
    more: Mapping[str, Any] = {}  # further keys of the events of the text


_MESSAGE_SHAPE = _Shape(
    *("msg_", "message", "content", "output_text"),
    added={"status": "in_progress", "role": "assistant"},
    part_event="content_part",
    part={"type": "output_text", "text": "", "annotations": [], "logprobs": []},
    more={"logprobs": []},
)
_REASONING_SHAPE = _Shape(
    *("rs_", "reasoning", "summary", "reasoning_summary_text"),
    part_event="reasoning_summary_part",
    part={"type": "summary_text", "text": ""},
)
_CALL_SHAPE = _Shape("fc_", "function_call", "arguments", "function_call_arguments")
_CUSTOM_SHAPE = _Shape("ctc_", "custom_tool_call", "input", "custom_tool_call_input")
_CAUSES = {"length": "max_output_tokens", "content_filter": "content_filter"}


class _OpenItem:
    """An item that is being written."""

    def __init__(self, shape: _Shape, item: dict[str, Any], at: int) -> None:
        self.shape = shape
        self.item = item
        self.texts: list[str] = []
        self.place = {"item_id": item["id"], "output_index": at}
        if shape.part:
            self.place[f"{shape.key}_index"] = 0
        # How the event of a delta begins: its number and its text follow.
        kind = f"response.{shape.text_event}.delta"
        fields = json_bytes({"type": kind, **self.place, **shape.more})[:-1]
        self.head = encode_event(fields + b',"sequence_number":', kind).rstrip()

    def update(self, status: str, **more: Any) -> str:
        """Put the text so far into the item, with `more` fields of its part.

        Returns:
            the text.
        """
        text = "".join(self.texts)
        part = {**self.shape.part, "text": text, **more}
        self.item[self.shape.key] = [part] if self.shape.part else text
        self.item["status"] = status
        return text


class ResponseStream:
    """Writes the events of one streamed response as SSE.

    Finish, or `fail`, ends the stream; `response` is then the whole object.

        created, in_progress, [reasoning], message, [call]*, completed

    The message stays open while the app thinks again in between: the answer is one
    message, since clients take the last one for all of it. Calls follow the message.
    """

    needs_ids = True  # its own ids have Dify's in them

    def __init__(self, frame: ResponseFrame) -> None:
        self.response: dict[str, Any] = {}
        self.frame = frame
        self.summary = Answer()  # what is no text: calls, citations, usage, the end
        self._output: list[dict[str, Any]] = []
        self._open: dict[str, _OpenItem] = {}  # by prefix
        self._numbers = count()  # of its events
        self._item_numbers: defaultdict[str, Iterator[int]] = defaultdict(count)

    def begin(self, ids: DifyIds) -> bytes:
        """The first events, which tell Dify's ids."""
        self.frame = replace(self.frame, ids=ids)
        return self._lifecycle("in_progress", "created") + self.heartbeat()

    def heartbeat(self) -> bytes:
        """Keeps a connection alive, and may be sent between any two events.

        It has all output so far: openai-node goes on from the response in it.
        """
        if not self.response:
            return encode_comment("keep-alive")
        return self._lifecycle("in_progress")

    def so_far(self, status: str, **more: Any) -> dict[str, Any]:
        """The response with the output that it has by now."""
        for item in self._open.values():
            item.update(status if status == "in_progress" else "incomplete")
        frame = self.frame
        return {
            "id": frame.id("resp_"),
            "object": "response",
            "created_at": frame.created,
            "completed_at": None,  # not known here, but strict clients want the field
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": frame.model,
            "output": list(self._output),
            **frame.echo,
            **dify_key(frame.ids),
            **more,
        }

    def encode(self, part: Part) -> bytes:
        """The events that a part becomes; b"" for one that is kept for the end."""
        if isinstance(part, (Text, Reasoning)):
            shape = _MESSAGE_SHAPE if isinstance(part, Text) else _REASONING_SHAPE
            return self._write(shape, part.text) if part.text else b""
        self.summary.add([part])
        return self._finish() if isinstance(part, Finish) else b""

    def end(self, usage: Usage) -> bytes:
        """Nothing follows: Finish has ended the stream."""
        return b""

    def fail(self, error: ProxyError) -> bytes:
        """The end of a stream that can't be finished; open items stay open.

        It is told twice, as OpenAI does: without the first event AI SDK 5 and Pydantic
        AI take the text for all of the answer, without the second Codex knows no end.
        """
        begun = b"" if self.response else self.begin({})
        details = {"code": _failure_code(error), "message": error.message}
        nested = {**error_body(error)["error"], **details}
        number = next(self._numbers)
        event = {**nested, "type": "error", "sequence_number": number, "error": nested}
        told = encode_event(json_bytes(event), "error")
        return begun + told + self._lifecycle("failed", error=details)

    def _finish(self) -> bytes:
        cause = _CAUSES.get(self.summary.finish_reason)
        status = "incomplete" if cause else "completed"
        # Not even an empty answer is without its message, unless there are calls.
        events = self._close("rs_")
        events += self._write(_MESSAGE_SHAPE, "") if not self.summary.calls else b""
        events += self._close("msg_", status)
        events += b"".join(self._call(call) for call in self.summary.calls)
        usage = _usage_of_response(self.summary.usage)
        details = {"reason": cause} if cause else None
        return events + self._lifecycle(status, usage=usage, incomplete_details=details)

    # Items...

    def _write(self, shape: _Shape, text: str, **fields: str) -> bytes:
        """More text of an item, which is opened if it isn't yet."""
        events = self._close("rs_") if shape is not _REASONING_SHAPE else b""
        if shape.prefix not in self._open:
            events += self._add_item(shape, fields)
        item = self._open[shape.prefix]
        if text:
            # From a template: `dumps` of a whole delta costs ten times as much.
            number = next(self._numbers)
            events += b'%b%d,"delta":%b}\n\n' % (item.head, number, json_string(text))
            item.texts.append(text)
        return events

    def _add_item(self, shape: _Shape, fields: Mapping[str, str]) -> bytes:
        at = len(self._output)
        # By its number among its kind: read again, reasoning comes before the text.
        # Calls of both shapes are of one kind, for `item_named`.
        number = next(self._item_numbers[shape.part_event])
        about = {"id": self.frame.id(shape.prefix, number), "type": shape.type}
        if shape is _REASONING_SHAPE and not self.frame.echo["store"]:
            # The AI SDK warns of reasoning that is not stored and lacks this.
            about["encrypted_content"] = about["id"]
        item = {**about, **shape.added, shape.key: [] if shape.part else "", **fields}
        self._output.append(item)
        self._open[shape.prefix] = opened = _OpenItem(shape, item, at)
        added = self._event("output_item.added", output_index=at, item=item)
        if shape.part:
            name = f"{shape.part_event}.added"
            added += self._event(name, **opened.place, part=shape.part)
        return added

    def _close(self, prefix: str, status: str = "completed") -> bytes:
        """The events that end an item; b"" if it is not open."""
        if not (opened := self._open.pop(prefix, None)):
            return b""
        shape, item, place = opened.shape, opened.item, opened.place
        cited = self.summary.citations if shape is _MESSAGE_SHAPE else ()
        annotations = _annotations(cited, sum(map(len, opened.texts)))
        more = {"annotations": annotations} if annotations else {}
        text = opened.update(status, **more)
        events = b""
        for index, annotation in enumerate(annotations):
            fields = {"annotation_index": index, "annotation": annotation}
            events += self._event("output_text.annotation.added", **place, **fields)
        done = {"text" if shape.part else shape.key: text, **shape.more}
        if shape is _CALL_SHAPE:
            done["name"] = item["name"]
        events += self._event(f"{shape.text_event}.done", **place, **done)
        if shape.part:
            part = item[shape.key][0]
            events += self._event(f"{shape.part_event}.done", **place, part=part)
        at = place["output_index"]
        return events + self._event("output_item.done", output_index=at, item=item)

    def _call(self, call: ToolCall) -> bytes:
        shape = _CUSTOM_SHAPE if call.is_custom else _CALL_SHAPE
        inside = {"namespace": call.namespace} if call.namespace else {}
        name = call.name.removeprefix(f"{call.namespace}.") if inside else call.name
        written = self._write(shape, call.given, call_id=call.id, name=name, **inside)
        return written + self._close(shape.prefix)

    # Events...

    def _lifecycle(self, status: str, event: str = "", **more: Any) -> bytes:
        """An event with the whole response as it now is, called by its status."""
        self.response = self.so_far(status, **more)
        return self._event(event or status, response=self.response)

    def _event(self, name: str, /, **fields: Any) -> bytes:
        kind, number = f"response.{name}", next(self._numbers)
        event = {"type": kind, "sequence_number": number, **fields}
        return encode_event(json_bytes(event), kind)


# Writes one answer as the SSE of one API: `begin` once, then `encode` for each part, in
# order, then `end`; `fail` instead at any time. `heartbeat` may be sent between any two
# of them. `begin` waits until Dify's ids are known if it `needs_ids`; `summary` has the
# token counts, once they are known.
AnswerStream = Union[ChatStream, ResponseStream]
# How the answers to a request are written: `stream` makes what writes one choice of
# them as it comes, `whole` the object of all.
AnswerForm = Union[Envelope, ResponseFrame]


# ==============================================================================
# 11. Conversations
# ==============================================================================
#
# Which Dify conversation a request continues. OpenAI's clients send their history each
# time, Dify keeps it by conversation_id; a table of tails maps one to the other. It is
# only a cache: when the answer is "don't know", the history is folded into the query
# of a new conversation, and the model sees what the client shows all the same.
#
#     u1 a1 u2 a2 + u3   ends a known transcript  -> u3, into its conversation
#     u1 a1 u2 a2 + u3   else                     -> all of it, into a new conversation
#
# (1) A history matches the transcript that it equals, however long, or the one that it
#     ends, since clients cut old messages. Such a window must be unmistakable: with
#     two answers or a long one, standing nowhere else in the transcript (as far as
#     that is kept), and at the end of no other transcript of this user, free or not.
# (2) A tail that is taken belongs to one turn alone, across processes, until it is put
#     back. If it never is, it is lost: nobody knows what the turn did to Dify's memory.
# (3) An explicit conversation_id is used as given. If another turn runs there, their
#     order is unknown, and the conversation is found by its id only from then on.
# (4) App key and user go into every hash: nobody reaches a conversation of others, and
#     the table tells nothing to anyone without the key. It holds no text and no key.
# (5) Reasoning, white space, how JSON is written, text beside calls, system messages
#     and empty answers make no difference to a match, nor does leaving out all calls
#     and results once they are answered. A system text is told to Dify when it differs
#     from the one told last. Where nothing matches, quotes before the last answer are
#     taken for its thoughts, as NextChat shows them.
# (6) If several transcripts have the same messages, only those match that had the same
#     inputs, and among these one with the same system text is preferred.
# (7) A question's context counts in `chain` only: in later turns clients show the
#     question without it, so their histories match as windows, not as a whole.
#
# Pure but for SQLite, which keeps the table in memory too; its failures mean "don't
# know", but of what a client named. `now` is wall-clock time in seconds, since a table
# outlives its process.
#
#     none, TAKEN -> FREE [put], FREE -> TAKEN [take], TAKEN -> LOST [take by id],
#     FREE -> LOST [put, by one who has not taken it],
#     FREE, TAKEN -> LOST, by another name, if more is known than the id [forget],
#     FREE, TAKEN -> none [remove; put, if nothing is known of it]

MAX_CONVERSATIONS = 100_000  # some 40 MB
MAX_NAMED = 10_000  # that clients named; these hold texts until their next turn
MAX_NAMED_ITEMS = 2000  # of one, that no turn has taken yet
MAX_NAMED_BYTES = 16 << 20  # of one
MAX_ALL_NAMED_BYTES = 256 << 20
_KEPT_MESSAGES = 128  # a transcript's last ones, and so the longest window: 1 KiB
_DIGEST_BYTES = 8
_OF_TOOLS = b"\0\0"  # begins the digests of calls and of their results
# Where `told` has the hashes of all system text, of inputs, and of the system text
# that stands between messages, which it may lack.
_SYSTEM, _INPUTS, _WITHIN = slice(8), slice(8, 16), slice(16, None)
_SIDE_REQUESTS = (
    # Open WebUI; Qwen Code, after each turn; Claude Code (through LiteLLM), for recaps;
    # the /btw of both; Zed; Chatpad and its like; FastGPT; SillyTavern, now and
    # formerly; Nextcloud, likewise; Witsy. The last four are of NextChat and its
    # descendants.
    *("### Task:", "Managed memory ", "[SUGGESTION MODE", "The user stepped away and "),
    *("<system-reminder>\nThis is a side ", "<system-reminder>This is a side "),
    "Generate a concise 3-7 word title for this conversation",
    "What would be a short and relevant title for this chat",
    "You are an AI assistant tasked with predicting the user's next question",
    "Ignore previous instructions. Summarize the most important facts",
    "Ignore previous instructions. Classify the emotion of the last message",
    "[Pause your roleplay",
    "This is a conversation between the user and Nextcloud Assistant. Generate a",
    "Above is a chat session in a specific language between the user and you, ",
    "Provide a title for the conversation above",
    "Please generate a four to five word title",
    "使用四到五个字直接返回这句话的简要主题",
    "Summarize the discussion briefly in",
    "简要总结一下对话内容，用作后续的上下文提示",
)


class Tail(NamedTuple):
    """Where a conversation stands, or a history: its messages as hashes.

    `chain` stands for all `length` messages, and for none is the scope; `digests` has
    one hash each for the last. `told` is what Dify was told last beside messages, of
    `_told_hashes`, `folded` the number of first messages that Dify has as an input
    only. With a `length` of 0 nothing is known but the id.
    """

    scope: bytes
    conversation_id: str = ""
    chain: bytes = b""
    length: int = 0
    digests: bytes = b""
    told: bytes = b""
    folded: int = 0
    is_taken: bool = False

    def __repr__(self) -> str:
        """Without the scope, which is secret."""
        return f"Tail({', '.join(map(repr, self[1:]))})"

    def extend(self, messages: Messages, **more: Any) -> Tail:
        """The tail with these messages behind it, and with `more` fields changed."""
        chain, digests = self.chain, [self.digests]
        for m in messages:
            if is_counted(m):
                digests.append(message_digest(self.scope, m))
                told = digests[-1] + context_of(m).encode("utf-8", "replace")
                chain = _hash(self.scope, chain + told, 16)
        kept = b"".join(digests)[-_KEPT_MESSAGES * _DIGEST_BYTES :]
        length = self.length + len(digests) - 1
        return self._replace(chain=chain, length=length, digests=kept, **more)

    def retold(self, said: Messages, shown: Messages) -> Tail:
        """The tail that was found by what was `said`, as a client shows it."""
        if said is shown:
            return self
        found, seen = (_window(self.scope, messages) for messages in (said, shown))
        chain = seen.chain if self.chain == found.chain else self.chain
        digests = self.digests[:-_DIGEST_BYTES] + seen.digests[-_DIGEST_BYTES:]
        return self._replace(chain=chain, digests=digests)

    def shown_as(self, window: Tail) -> bytes:
        """Its digests, without those of tools if the window's client leaves these out.

        Nobody leaves out calls that no answer has followed yet, with their results. A
        history that was folded into an input is counted by its messages: there nothing
        may be left out.
        """
        whole = self.digests
        is_in = window.digests[:_DIGEST_BYTES] in whole
        if whole.endswith(window.digests) or self.folded or not is_in:
            return whole
        digests = re.findall(rb".{%d}" % _DIGEST_BYTES, whole, re.DOTALL)
        running: list[bytes] = []
        while digests and digests[-1].startswith(_OF_TOOLS):
            running.insert(0, digests.pop())
        said = [d for d in digests if not d.startswith(_OF_TOOLS)]
        return b"".join(said + running)

    def ends(self, longer: Tail, *, is_clear: bool) -> bool:
        """Whether this window ends that transcript, and stands nowhere else in it.

        A window that is not clear must be all of the transcript but its calls.
        """
        window, shown = self.digests, longer.shown_as(self)
        is_whole = len(window) == self.length * _DIGEST_BYTES
        is_once = shown.find(window) == len(shown) - len(window)
        return is_whole and is_once and (is_clear or longer.digests != shown == window)

    def surely_ends(self, history: Messages) -> bool:
        """Whether this transcript is that history, or unmistakably ends with it."""
        window = _window(self.scope, history)
        is_clear = _is_clear(history)
        return self.chain == window.chain or window.ends(self, is_clear=is_clear)


class Plan(NamedTuple):
    """How a turn is put to Dify: `files` belong to the query, `inputs` go over others.

    `tail` is where the conversation stands before `new`, what the `ask` adds to it;
    that of a new one has no conversation_id. If `new` is empty, where it stands
    afterwards is not known.
    """

    query: str
    inputs: Json
    files: tuple[Attachment, ...]
    tail: Tail
    ask: Ask
    new: Messages

    def tail_after(self, conversation_id: str, answer: Message) -> Tail:
        """The tail to put into the table when Dify and the client have the answer.

        What was new is hashed now, not while the question waits to be sent.
        """
        tail, ask = self.tail, self.ask
        if not self.new:
            return tail._replace(length=0)
        told = _told_hashes(tail.scope, ask, ask.messages, tail.told)
        said = [*self.new, answer]
        return tail.extend(said, conversation_id=conversation_id, told=told)


@functools.lru_cache(maxsize=256)
def scope_of(app_key: str, user: str) -> bytes:
    """What all hashes of a user's conversations with an app are keyed with; secret."""
    name = json.dumps([app_key, user]).encode()
    return hashlib.blake2b(name, digest_size=32, person=b"OpenDify").digest()


def split_turn(ask: Ask) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """(history, new): the messages up to the last answer, and those after it."""
    at = len(ask.messages)
    while at and ask.messages[at - 1].role != "assistant":
        at -= 1
    return ask.messages[:at], ask.messages[at:]


def is_counted(message: Message) -> bool:
    """Whether a message counts in a transcript: no system text, no empty answer."""
    if message.role != "assistant" or message.tool_calls or message.attachments:
        return message.role != "system"
    text = message.text.strip()  # and that without thoughts, where it may have some
    text = plain_text(message) if text.startswith("<") else text
    return bool(text or message.spoken_id)


def is_side_request(ask: Ask) -> bool:
    """Whether a client asks for its own purposes: a title, tags, what to remember.

    Such requests bring the whole chat; one whose messages are `is_all_new` is none.
    """
    last = ask.messages[-1].text if ask.messages else ask.system
    is_own = last.lstrip().startswith(_SIDE_REQUESTS)
    return is_own and not (ask.is_all_new or last.startswith(CONTEXT_BEGINS))


_QUOTES = re.compile(r"(?:>[^\n]*(?:\n[^\n]+)*\n\n+)+(?=\S)")


def _readings(history: Messages) -> Iterator[Messages]:
    """A history as it is shown; and without quotes before its last answer, if any.

    NextChat shows thoughts so, and sends them back. Other quotes are the app's own. How
    the answers before it are shown is known from earlier turns, or Dify was told so.
    """
    yield history
    *before, last = history
    if match := _QUOTES.match(last.text):
        yield (*before, last._replace(text=last.text[match.end() :]))


# Hashes...


def message_digest(scope: bytes, message: Message) -> bytes:
    """The hash by which messages are compared.

    Ids of calls, the name of an answer and the context of a question do not count.
    """
    role, files = message.role, message.attachments
    name = message.name if role != "assistant" else ""
    calls = [[c.name, _canonical(c.arguments, c.id)] for c in message.tool_calls]
    ids = [f.url or f.upload_id or _hash(scope, f.data, 16).hex() for f in files]
    about = [role, name, calls, ids]
    mark = _OF_TOOLS if calls or role == "tool" else b""
    return mark + _digest(scope, f"{about!a}\0{_matched_text(message)}")[len(mark) :]


def _matched_text(message: Message) -> str:
    """The text that is compared: none beside calls, where some clients drop it.

    JSON counts as the value that it is: clients that parse an answer write it anew.
    """
    text = "" if message.tool_calls else plain_text(message)
    is_json = message.role == "assistant" and text.startswith("{")
    return _canonical(text) if is_json else text


def _digest(scope: bytes, text: str) -> bytes:
    return _hash(scope, text.encode(), _DIGEST_BYTES)


def _hash(scope: bytes, data: bytes, size: int) -> bytes:
    return hashlib.blake2b(data, digest_size=size, key=scope).digest()


def _canonical(text: str, call_id: str = "") -> str:
    """One text for one JSON value; n8n's agent adds a call's id to its arguments."""
    try:
        value = parse_json_text(text)
    except ValueError:
        return text.strip()
    if call_id and isinstance(value, dict) and value.get("id") == call_id:
        del value["id"]
    return json.dumps(value, sort_keys=True)


def _told_hashes(scope: bytes, ask: Ask, said: Messages, before: bytes = b"") -> bytes:
    """What Dify is told beside messages, as hashes.

    Without a system text the hashes of what was told `before` still hold.
    """
    within = [message_digest(scope, m) for m in said if m.role == "system"]
    opening = ask.system.replace(f" {MUST_CALL}", "")  # which is said each time
    texts = [opening, *within] if opening.strip() else within
    given = json.dumps({**ask.inputs}, sort_keys=True) if ask.inputs else ""
    before = before.ljust(_DIGEST_BYTES)  # where nothing was told
    system = _digest(scope, ascii(texts)) if texts else before[_SYSTEM]
    inputs = _digest(scope, given) if given else bytes(_DIGEST_BYTES)
    last = _digest(scope, ascii(within)) if within else before[_WITHIN]
    return system + inputs + last


# A history beside what Dify has stored...

MAX_MESSAGES_SOUGHT = 1000  # in a stored question; with more it is taken for another


def is_known_history(ask: Ask, known: Sequence[Message]) -> bool:
    """Whether the history that a client shows is what Dify has stored, or its end.

    Args:
        ask: what the client wants; without a history none is known.
        known: the stored messages, question, answer, question and so on. A question
            may hold more than the client's: what was folded, and results of tools.
    """
    history, _ = split_turn(ask)
    said = [message for message in history if message.role != "system"]
    runs = itertools.groupby(said, lambda message: message.role == "assistant")
    groups = [[*run] for _, run in runs]  # they alternate, too, and end with an answer
    if not 0 < len(groups) <= len(known):
        return False
    return all(map(_is_said, groups, known[-len(groups) :]))


def _is_said(group: Sequence[Message], stored: Message) -> bool:
    """Whether messages are a stored answer, or in any order a stored question."""
    if stored.role == "assistant":
        said, kept = (message_digest(b"", message) for message in (group[0], stored))
        return len(group) == 1 and said == kept
    if len(group) > MAX_MESSAGES_SOUGHT:
        return False
    whole = stored.text.strip()
    if len(group) == 1 and group[0].role == "user":
        text = group[0].text.rstrip()
        return whole == text.lstrip() or whole.endswith(f"\n\n{text}")
    return all(f"\n{message.text}\n" in whole for message in group)


# Putting a turn to Dify...

_NEXT = "Write the assistant's next message."
_GO_ON = "Continue your last message exactly where it ends, without repeating it."
_TAG = re.compile(r"<(?i:/?message(?:-(\d+))?)")  # of a folded message

HasRoom = Callable[[Sequence[Attachment]], bool]


def plan_turn(
    ask: Ask, scope: bytes, tail: Tail | None, app: AppSettings, has_room: HasRoom
) -> Plan:
    """What goes to Dify: the new messages to the tail's conversation, or all of them.

    Args:
        ask: what the client wants.
        scope: the app's and the user's, of `scope_of`.
        tail: what `Conversations.take` returned; None starts a new conversation.
        app: which may have inputs for the system text and the folded history.
        has_room: whether the app takes these files; those of earlier messages go
            along with a folded history as far as there is room, the newest first.
    """
    history, new = split_turn(ask)
    said = tuple(m for m in history if m.role != "system")
    if tail and tail.folded and not (app.history_variable or ask.conversation_id):
        tail = None  # its beginning went into an input that is gone
    bare = ask.system if tail is None or ask.system.strip() else _NEXT
    if tail is None:
        elsewhere = history if app.history_variable else ()
        tail = Tail(scope, chain=scope, folded=sum(map(is_counted, elsewhere)))
        shown = lacked = history
        context = (*_opening(ask, app), *history[len(elsewhere) :])
    else:
        lacked = said if ask.is_all_new else ()  # by the conversation
        elsewhere = () if lacked else _only_in_input(history, tail)
        shown = context = (*_untold(ask, app, history, tail), *lacked)
    files = _with_room(shown, new, has_room)
    past = fold(elsewhere, files)
    own = (app.system_variable, ask.system), (app.history_variable, past)
    given = {name: text for name, text in own if name and text.strip()}
    query = _query(ask, context, new, files) if ask.messages else bare
    # Nobody can tell how a client shows an answer that was continued, or a title.
    is_shown = new and not is_side_request(ask)
    added = (*lacked, *new) if is_shown else ()
    inputs = {**ask.inputs, **given}
    return Plan(query or " ", inputs, tuple(files), tail, ask, added)


def _opening(ask: Ask, app: AppSettings) -> list[Message]:
    """The system text that opens the query, unless the app has an input for it."""
    is_here = ask.system.strip() and not app.system_variable
    return [Message("system", ask.system)] if is_here else []


def _untold(ask: Ask, app: AppSettings, history: Messages, tail: Tail) -> list[Message]:
    """The system texts, if others were told last; else what is said each time."""
    opening, part = _opening(ask, app), _WITHIN if app.system_variable else _SYSTEM
    if _told_hashes(tail.scope, ask, history)[part] != tail.told[part]:
        return [*opening, *(m for m in history if m.role == "system")]
    return [Message("system", MUST_CALL) for m in opening if MUST_CALL in m.text]


def _with_room(history: Messages, new: Messages, has_room: HasRoom) -> list[Attachment]:
    """The new messages' files, behind those of earlier ones that have room beside."""
    files = [file for message in new for file in message.attachments]
    for message in reversed(history):
        if message.attachments and has_room([*message.attachments, *files]):
            files = [*message.attachments, *files]
    return files


def _only_in_input(history: tuple[Message, ...], tail: Tail) -> tuple[Message, ...]:
    """The messages that Dify does not remember: they are an input of every turn."""
    if not tail.folded:
        return ()
    at, remembered = len(history), max(0, tail.length - tail.folded)
    while at and remembered:
        at -= 1
        remembered -= is_counted(history[at])
    return history[:at]


def _query(
    ask: Ask, context: Messages, new: Messages, files: Sequence[Attachment]
) -> str:
    """The new messages and, if need be, what Dify does not know yet, as one text."""
    is_history = any([message.role != "system" for message in context])
    parts = [HISTORY_BEGINS] if is_history else []
    if len(new) == 1 and new[0].role == "user" and not new[0].name:
        text = new[0].text  # as it is: apps search and branch by their query
        if not text.strip() and new[0].attachments:
            text = f"[attached: {_file_names(new[0])}]"
        ending = [QUESTION_BEGINS, text] if is_history else [text]
        parts += [fold(context, files, beside=text), *ending]
    else:
        parts.append(fold([*context, *new], files))
        ask_for = _NEXT if is_history or not new else ""
        # A call, JSON and the words of another speaker are no end of the last message,
        # and an empty one has none.
        last = ask.messages[-1]
        goes_on = last.text.strip() and not (new or ask.is_strict or last.name)
        parts.append(_GO_ON if goes_on else ask_for)
    return "\n\n".join(filter(None, parts))


def fold(messages: Messages, files: Sequence[Attachment] = (), beside: str = "") -> str:
    """Messages as text, between tags that neither they nor the text beside contain.

        <message role="user" name="Ada">
        What's the weather like?
        </message>

    These `files` go with the query, those of other messages don't.
    """
    if not messages:
        return ""
    sent = set(map(id, files))
    pairs = [_element(message, sent) for message in messages]
    used = {*_TAG.findall("\n".join([beside, *[text for _, text in pairs]]))}
    numbers = (n for n in count(2) if str(n) not in used)
    tag = f"message-{next(numbers)}" if used else "message"
    return "\n".join([f"<{tag}{about}>\n{text}\n</{tag}>" for about, text in pairs])


def _element(message: Message, sent: set[int]) -> tuple[str, str]:
    """(attributes, text) of a message; its calls are written as the app writes them."""
    given = {"role": message.role, "name": message.name}
    is_sent = sent.issuperset(map(id, message.attachments))
    given["file" if is_sent else "file_not_included"] = _file_names(message)
    quoted = json.encoder.encode_basestring
    about = [f" {name}={quoted(value)}" for name, value in given.items() if value]
    texts = [message.text, *map(describe_call, message.tool_calls)]
    return "".join(about), "\n".join(filter(None, texts))


def _file_names(message: Message) -> str:
    files = [(file.url or file.name, file.media_type) for file in message.attachments]
    return "; ".join(f"{name} ({kind})" if kind else name for name, kind in files)


# The table...

_CONVERSATION_ID = re.compile(r"[ -~]{0,100}")  # Dify makes UUIDs
_CLEAR_BYTES = 200  # no greeting or other stock phrase is that long
_BUSY_TIMEOUT_S = 0.05  # the event loop waits meanwhile
_OPEN_TIMEOUT_S = 1.0  # other processes may be opening it too
_MAX_CANDIDATES = 64  # with the same last answer; with more it is a stock phrase
_MAX_WAITING = 64  # rows for a table in memory
_SWEEP_EVERY = 100  # new tails, and named ones: a sweep takes milliseconds
_MAX_SWEPT = 200  # old tails

_FREE, _TAKEN, _LOST = 0, 1, 2
_FAILED = -2  # rows changed: nobody knows; -1 is SQLite's own "it was no change"
_SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS opendify_tails (
    id BLOB PRIMARY KEY, state INTEGER, used REAL, last BLOB, conversation_id TEXT,
    chain BLOB, length INTEGER, digests BLOB, system BLOB, folded INTEGER
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS opendify_match ON opendify_tails (last, state, chain);
CREATE INDEX IF NOT EXISTS opendify_age ON opendify_tails (used);
CREATE TABLE IF NOT EXISTS opendify_named (
    id TEXT PRIMARY KEY, owner BLOB, used REAL, state TEXT
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS opendify_named_age ON opendify_named (used);
DELETE FROM opendify_tails WHERE used < 0;  -- fails if the file can't be written
"""
# The columns are named as in older files: `system` holds a tail's `told`.
_SELECT = """
SELECT conversation_id, chain, length, digests, system, folded FROM opendify_tails"""
# Any state will do; they are listed for the index, which has `chain` behind them.
_MATCH = f"""{_SELECT}
WHERE last = ? AND state IN ({_FREE}, {_TAKEN}, {_LOST}) AND used >= ?"""
_PUT = f"""
INSERT OR REPLACE INTO opendify_tails
VALUES (?, CASE WHEN (SELECT state FROM opendify_tails WHERE id = ?) IS ?
           THEN {_FREE} ELSE {_LOST} END, ?, ?, ?, ?, ?, ?, ?, ?)"""
_REMOVE = f"DELETE FROM opendify_tails WHERE id = ? AND state != {_LOST}"
_FORGET = f"""
UPDATE OR REPLACE opendify_tails SET state = {_LOST}, id = ?, conversation_id = ?
WHERE id = ? AND state != {_LOST}"""
_SWEEP = f"""
DELETE FROM opendify_tails WHERE id IN (
SELECT id FROM opendify_tails ORDER BY used LIMIT MIN({_MAX_SWEPT}, MAX(0,
(SELECT COUNT(*) FROM opendify_tails) - ?,
(SELECT COUNT(*) FROM opendify_tails WHERE used < ?))))"""
_NAMED = "SELECT state FROM opendify_named WHERE id = ? AND owner = ? AND used >= ?"
# Sorted afterwards (+): to read large rows by an index takes twenty times as long.
_NAMED_SIZES = "SELECT id, LENGTH(state) FROM opendify_named ORDER BY +used DESC"
_DROP_NAMED = "DELETE FROM opendify_named WHERE id = ?"


@dataclass(frozen=True)
class NamedConversation:
    """One that a client made through the Conversations API, by the id it got there.

    `items` were given to it, and Dify does not have them yet. It is made without an
    app: its first turn binds it to a Dify conversation of an app and an end user,
    under a `seal` of both.
    """

    id: str
    created: UnixTime
    metadata: Json = field(default_factory=dict)
    items: Sequence[Any] = ()
    user: str = ""
    conversation_id: str = ""
    seal: str = ""

    def is_bound_to(self, scope: bytes) -> bool:
        """Whether a turn of this app and user may go there."""
        return not self.seal or self.seal == _hash(scope, b"named", 16).hex()

    def bind(
        self, scope: bytes, told: Sequence[Any], user: str, conversation_id: str
    ) -> NamedConversation:
        """The same after a turn there, which has told Dify these items."""
        ids = {item["id"] for item in told}
        items = tuple(item for item in self.items if item["id"] not in ids)
        seal = _hash(scope, b"named", 16).hex()
        there: Json = {"user": user, "conversation_id": conversation_id, "seal": seal}
        return replace(self, items=items, **there)


class Conversations:
    """The table of tails, and of named conversations: an SQLite file, or ":memory:".

    Beyond MAX_CONVERSATIONS those go that have been unused for longest.

    Args:
        path: of the file.
        ttl_s: after how long an unused conversation is forgotten.

    Raises:
        sqlite3.Error: the file can't be used. No method raises it later: then the last
            such `failure` is told, and "don't know" is the answer; but Overloaded is
            raised where a client relies on what it named.
    """

    def __init__(self, path: str, ttl_s: float) -> None:
        """Open the table, or make it."""
        self._ttl_s, self._puts = ttl_s, 0
        self.failure = ""
        self._not_swept = inf  # named ones since a sweep, in bytes; none was yet
        self._waiting: list[Sequence[Any]] = []  # rows for _PUT, not in the table yet
        self._max_waiting = _MAX_WAITING if path == ":memory:" else 1
        self._db = sqlite3.connect(path, timeout=_OPEN_TIMEOUT_S, isolation_level=None)
        try:
            self._db.executescript(_SCHEMA)
        except sqlite3.Error:
            self._db.close()
            raise
        self._db.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_S * 1000:.0f}")

    def __len__(self) -> int:
        """How many there are, those included with a turn under way."""
        rows, _ = self._run("SELECT COUNT(*) FROM opendify_tails")
        return int(rows[0][0]) if rows else 0

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._db.close()

    def take(self, ask: Ask, scope: bytes, now: float) -> Tail | None:
        """The conversation that a request continues; None starts a new one.

        After the turn `put` its new tail, or the same if nothing was sent, or `forget`
        it, or `remove` it.
        """
        history, new = split_turn(ask)
        if is_side_request(ask):
            return None
        if ask.conversation_id:
            if tail := self.take_by_id(scope, ask.conversation_id, now):
                return tail
            lost = _unknown(scope, ask.conversation_id)  # another turn runs there
            self.forget(lost)
            return lost
        may_go_on = history and new and not ask.is_all_new
        for said in _readings(history) if may_go_on else ():
            if tail := self._find(scope, ask, said, now):
                tail = self._mark(tail, now)
                return tail and tail.retold(said, history)
        return None

    def take_by_id(self, scope: bytes, conversation_id: str, now: float) -> Tail | None:
        """The conversation of this id; None while others may have a turn there."""
        tail = _unknown(scope, conversation_id)
        rows, _ = self._run(f"{_SELECT} WHERE id = ?", _id(tail))
        if not rows:
            self._put(tail, now)
        return self._mark(Tail(scope, *rows[0]) if rows else tail, now)

    def put(self, tail: Tail, now: float) -> None:
        """Record where a conversation, new or taken, stands for the next turn."""
        if tail.length:
            self._put(tail, now)
        elif tail.is_taken:
            self.remove(tail)  # it can be learned anew by its id

    def remove(self, tail: Tail) -> None:
        """Know nothing of a conversation: Dify has lost it, or it is learned anew."""
        self._run(_REMOVE, _id(tail))

    def forget(self, tail: Tail) -> None:
        """Continue a conversation no more: Dify may remember what no client saw.

        Its transcript stays, as lost and under another id: without it a repeated
        request would match another conversation that ends with the same words. Its own
        id can then be learned anew. If that was all that was known, it is lost as well:
        somebody's first turn may be under way there.
        """
        left = _alone(tail) if tail.length else tail
        self._run(_FORGET, _id(left), left.conversation_id, _id(tail))

    def note_shown(self, tail: Tail, now: float) -> None:
        """Remember as lost what a client shows, and Dify may not have so.

        A request with this history finds it, rather than one that only ends so, and is
        folded. `_PUT` makes a tail lost that says it is taken, but has no taken row.
        """
        if tail.length and tail.conversation_id:
            self._put(_alone(tail)._replace(is_taken=True), now)

    def named(self, id_: str, owner: str, now: float) -> NamedConversation | None:
        """What a client of this key has named so; raises Overloaded as `keep` does."""
        rows = self._surely(_NAMED, id_, _owner(owner), now - self._ttl_s)
        if not rows:
            return None
        known = NamedConversation.__dataclass_fields__  # a later version has more
        state = json.loads(rows[0][0]).items()
        return NamedConversation(**{name: v for name, v in state if name in known})

    def keep(self, named: NamedConversation, owner: str, now: float) -> None:
        """Record it, with the texts that it has, and drop old ones.

        The limits on all of them hold only from sweep to sweep, since one looks at the
        whole table: it comes after _SWEEP_EVERY of them, or MAX_NAMED_BYTES.

        Raises:
            BodyTooLarge: it has more text than one may have.
            Overloaded: the file can't be used.
        """
        # Bytes, whose length SQLite knows without reading them.
        state = json.dumps(dataclasses.asdict(named)).encode()
        if len(state) > MAX_NAMED_BYTES:
            most = f"{MAX_NAMED_BYTES >> 20} MiB"
            text = f"A conversation's items that await a turn may have {most}."
            raise BodyTooLarge(text)
        sql = "INSERT OR REPLACE INTO opendify_named VALUES (?, ?, ?, ?)"
        self._surely(sql, named.id, _owner(owner), now, state)
        self._run("DELETE FROM opendify_named WHERE used < ?", now - self._ttl_s)
        self._not_swept += max(len(state), MAX_NAMED_BYTES // _SWEEP_EVERY)
        if self._not_swept > MAX_NAMED_BYTES:
            self._sweep_named()

    def drop(self, named: NamedConversation) -> None:
        """Forget it; Dify's conversation stays. Raises Overloaded as `keep` does."""
        self._surely(_DROP_NAMED, named.id)

    def _sweep_named(self) -> None:
        self._not_swept, total = 0.0, 0
        for number, (id_, size) in enumerate(self._run(_NAMED_SIZES)[0]):
            total += size
            if number >= MAX_NAMED or total > MAX_ALL_NAMED_BYTES:
                self._run(_DROP_NAMED, id_)

    def _find(self, scope: bytes, ask: Ask, said: Messages, now: float) -> Tail | None:
        """The conversation that ends with what was `said`, free or not."""
        window = _window(scope, said)
        key = (window.digests[-_DIGEST_BYTES:], now - self._ttl_s)
        equal = f"{_MATCH} AND chain = ? ORDER BY state LIMIT {_MAX_CANDIDATES}"
        rows, _ = self._run(equal, *key, window.chain)
        tails = [Tail(scope, *row) for row in rows]
        # A window ignores contexts, and one that is shown may not be what Dify has.
        may_be_cut = not (tails or any(map(context_of, said)))
        is_clear = may_be_cut and _is_clear(said)
        if is_clear or (may_be_cut and ask.tools):
            most = _MAX_CANDIDATES + 1
            rows, _ = self._run(f"{_MATCH} ORDER BY state LIMIT {most}", *key)
            near = [Tail(scope, *row) for row in rows]
            near = [t for t in near if t.shown_as(window).endswith(window.digests)]
            if len(rows) == most or len({tail.chain for tail in near}) > 1:
                return None
            tails = [tail for tail in near if window.ends(tail, is_clear=is_clear)]
        if len(tails) > 1:
            tails = _told_alike(tails, _told_hashes(scope, ask, said))
        return tails[0] if tails else None

    def _put(self, tail: Tail, now: float) -> None:
        if not _CONVERSATION_ID.fullmatch(tail.conversation_id):
            return
        key, state = _id(tail), _TAKEN if tail.is_taken else None
        last = tail.digests[-_DIGEST_BYTES:]
        row = tail[1:7]  # as _SELECT reads it
        self._waiting.append([key, key, state, now, last, *row])
        if len(self._waiting) >= self._max_waiting:
            self._put_waiting()
        self._puts += 1
        if self._puts % _SWEEP_EVERY == 0:
            self._run(_SWEEP, MAX_CONVERSATIONS, now - self._ttl_s)

    def _mark(self, tail: Tail, now: float) -> Tail | None:
        """The tail, taken, unless somebody was faster."""
        sql = f"UPDATE opendify_tails SET state = {_TAKEN}, used = ?"
        sql += f" WHERE id = ? AND chain = ? AND state = {_FREE}"
        _, changed = self._run(sql, now, _id(tail), tail.chain)
        return tail._replace(is_taken=True) if changed == 1 else None

    def _put_waiting(self) -> None:
        """Put the rows that wait: in memory, many at once save 7% of a whole answer."""
        waiting, self._waiting = self._waiting, []
        try:
            self._db.executemany(_PUT, waiting)
        except sqlite3.Error as error:
            self.failure = str(error)

    def _surely(self, sql: str, *values: Any) -> list[Any]:
        """Run it, or raise Overloaded: a client relies on what it named."""
        rows, changed = self._run(sql, *values)
        if changed == _FAILED:
            raise Overloaded("The table of conversations can't be used at present.")
        return rows

    def _run(self, sql: str, *values: Any) -> tuple[list[Any], int]:
        if self._waiting:
            self._put_waiting()
        try:
            cursor = self._db.execute(sql, values)
            return cursor.fetchall(), cursor.rowcount
        except sqlite3.Error as error:
            self.failure = str(error)
            return [], _FAILED
        except ValueError:
            return [], 0  # the client's id is to blame


def take_as_meant(
    table: Conversations, ask: Ask, scope: bytes, now: float
) -> tuple[Ask, Tail | None]:
    """(a request as it continues a conversation, that one); as it is, if it does none.

    Many clients leave an empty answer out: it may have stood before the last message.
    """
    asks, (_, new) = [ask], split_turn(ask)
    if len(new) > 1 and new[-1].role == "user":
        *before, last = ask.messages
        asks.append(ask._replace(messages=(*before, Message("assistant", ""), last)))
    found = ((each, tail) for each in asks if (tail := table.take(each, scope, now)))
    meant, tail = next(found, (ask, None))
    if tail and ask.conversation_id:  # it is taken by that, however it is meant
        fitting = (each for each in asks if tail.surely_ends(split_turn(each)[0]))
        meant = next(fitting, ask)
    return meant, tail


def _owner(key: str) -> bytes:
    return hashlib.sha256(b"owner" + key.encode("utf-8", "replace")).digest()[:16]


def _id(tail: Tail) -> bytes:
    id_ = tail.conversation_id.lower()  # Swift writes Dify's UUIDs in capitals
    return _hash(tail.scope, id_.encode("utf-8", "replace"), 16)


def _unknown(scope: bytes, conversation_id: str) -> Tail:
    """A conversation of which nothing is known but its id, which is its chain, too."""
    tail = Tail(scope, conversation_id)
    return tail._replace(chain=_id(tail))


def _alone(tail: Tail) -> Tail:
    """Its transcript, under an id that no conversation of Dify's has."""
    return tail._replace(conversation_id=tail.chain.hex())


def _told_alike(tails: Iterable[Tail], told: bytes) -> list[Tail]:
    """Those of tails with the same messages that fit what is told now, the best first.

    Other inputs do not fit: what the app has read for them, for another customer's
    number say, is not meant.
    """
    inputs = (told[_INPUTS], b"")  # unknown in older files
    alike = [tail for tail in tails if tail.told[_INPUTS] in inputs]
    return sorted(alike, key=lambda t: (not told.startswith(t.told), -len(t.told)))


def _window(scope: bytes, history: Messages) -> Tail:
    """What a client shows, to be compared with transcripts."""
    return Tail(scope, chain=scope).extend(history)


def _is_clear(history: Messages) -> bool:
    """Whether a window can be told from others: two answers, or a long one."""
    said = filter(is_counted, history)
    answers = [_matched_text(m) for m in said if m.role == "assistant"]
    return len(answers) > 1 or len("".join(answers).encode()) >= _CLEAR_BYTES


def open_conversations(store: str, ttl_s: float) -> tuple[Conversations, str]:
    """The table, and a complaint if it can't be where CONVERSATION_STORE wants it.

    Args:
        store: "memory" or the path of an SQLite file.
        ttl_s: after how long an unused conversation is forgotten.
    """
    path = ":memory:" if store.lower() in ("", "memory") else store
    try:
        return Conversations(path, ttl_s), ""
    except (sqlite3.Error, ValueError) as error:  # a NUL in the path
        complaint = f"CONVERSATION_STORE: the file {store} can't be used ({error});"
        complaint += " conversations are kept in memory and end with this process."
        return Conversations(":memory:", ttl_s), complaint


# ==============================================================================
# 12. Pacer
# ==============================================================================
#
# Says when each piece of streamed text is due, so that text which arrives in
# clumps is shown evenly. Knows nothing of asyncio, sleeping, clocks or events:
# `now` is an argument, in seconds that never run backwards.
#
#   characters
#     |             .-------------------  arrived: nothing is shown before it came
#     |             |       _.-'  .-----  arrived max_lag ago: shown by now, always
#     |      .------'   _.-'      |
#     |      |      _.-'   .------'
#     |      |  _.-' shown |
#     +------'-------------'------------  time
#
# Every schedule that keeps the bound runs between the two stairs. The smoothest
# is a string pulled tight between them (Salehi, Zhang, Kurose, Towsley 1998), but
# that one knows the future. Pacer follows the same lower stairs, which are known,
# and puts what the source did lately in the place of what it will do:
#
# (1) Floor. For every arrival held, c characters, up to its last one, must be out
#     within d seconds. Never slower than the steepest of these slopes:
#         floor = max c / d
# (2) Pace. The source brings `rate` characters a second, which would be the most
#     even speed; the B characters held should stand for `lag` seconds, which would
#     take the speed B / lag. The pace is the geometric mean of the two:
#         pace = sqrt(rate * B / lag)
#     It rests where B = rate * lag, and comes back to it by 1/e in 2 lags. Double
#     the backlog makes it 1.4 times as fast, and what is held when it rests lasts
#     through a silence of 2 lags, ever slower.
# (3) Lag. To bridge a source's gaps, text must be held for about as long as they
#     are, and to spread a source's clumps, for about as long as these last at its
#     rate. Both are means in which the long and the large count for more (the gap
#     that a random moment falls in, the clump of a random character):
#         lag = sum(gap^2) / sum(gap) + sum(size^2) / sum(size) / rate
#     Even tokens, 30 a second, are held for two gaps, 66 ms; sentences for 3/4 of
#     max_lag, which leaves room to be late before the floor takes over.
# (4) Look-back. The sums fade with time, and begin as if an even source had been
#     heard for a moment.
#
# Text moves on at max(floor, pace), in pieces that stand on a beat: the first character
# at once, then what has come due since the last piece. The fraction of a character that
# is left, or what a cluster took ahead to be whole, counts for the next piece. After
# close() nothing more will come, and it moves on at max(floor, rate) till nothing is
# held. All of it costs a few additions for each arrival, and for each piece a division
# for each arrival held.
#
# Pieces end where grapheme clusters do (UAX #29, with a few ties added: nothing is
# cut after a joiner or a virama, nor within a blank line, which NextChat looks for).
# The last cluster held may still grow, if its other half is in the next token: an
# emoji, half a flag, a letter of a script that writes marks after it. It waits for the
# next push, which ends the doubt. Digits, and letters of Latin, Cyrillic, CJK and the
# like, never wait for that: few of them grow.
#
# Where the rules collide: the lag bound wins (even over a cluster), then "first
# text at once" (even if it may still grow), then whole clusters (even over a
# silence), then evenness.

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
    "[\u0600-\u0605\u06dd\u070f\u0890\u0891\u08e2\u0d4e\u1100-\u115f\u200d\ua960-\ua97c]."
    "|.[\u0e33\u0eb3\u1160-\u11ff\ud7b0-\ud7fb\uff9e\uff9f\U0001f3fb-\U0001f3ff]"
)
# What the next token may add to: CR; letters of scripts whose marks follow (Hebrew to
# Myanmar, Tagalog to Vedic, and later ones), jamo; marks; symbols, emoji, their parts.
_GROWING = re.compile(
    "[\r\xa9\xae\u0590-\u109f\u1100-\u11ff\u1700-\u1cff\ua800-\uabff"
    "\U00010a00-\U00016fdf\U0001e000-\U0001e95f\u0300-\u036f\u1dc0-\u1dff\u200d"
    "\u203c-\u2049\u20d0-\u2bff\u3030-\u303d\u3099\u309a\u3297-\u3299\ufe00-\ufe2f"
    "\U0001f000-\U0001faff\U000e0020-\U000e007f]"
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
        self._half = ""  # of a flag that was shown without its other half
        self._is_closed = False

    @property
    def oldest(self) -> float:
        """When the oldest text held arrived; infinity if nothing is held."""
        return next(iter(self._deadlines), inf) - self._max_lag_s

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
        # A cluster may take more than is due; at most as much again is owed for it.
        self._drawn, self._credit = at, max(-abs(wish), min(1.0, wish - len(piece)))
        self._shown = now if piece else self._shown
        # The next beat is when the next character is due, but never in a silence.
        tick = min(at + (1.0 - self._credit) / speed, self._shown + _SILENCE_S)
        self._tick = max(at + self._beat_s, tick)
        return piece

    def next_due(self) -> float | None:
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
        text, shown = self._half + "".join(self._texts), len(self._half)
        least = shown + must
        end = _boundary(text, min(len(text), max(shown + wish, least)), 1)
        may_grow = _GROWING.match(text[-1:]) and not self._is_closed
        if may_grow and end == len(text) > least:
            whole = _boundary(text, end - 1, -1)
            if whole >= least and (whole > shown or self._gone):
                end = whole
        self._half = text[end - 1 : end] if _ends_in_half_a_flag(text[:end]) else ""
        self._texts = [text[end:]]
        self._gone += end - shown
        self._deadlines = {by: n for by, n in self._deadlines.items() if n > self._gone}
        return text[shown:end]


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
        is_blank = before == "\n" != text[at - 2 : at - 1]
        return after == "\n" and (is_blank or before == "\r")
    run = text[max(0, at - 2 * _MAX_CLUSTER) : at]
    is_half = after in _FLAGS and _ends_in_half_a_flag(run)
    is_mark = unicodedata.category(after) in _TYING
    binds = unicodedata.combining(before) == _VIRAMA
    return is_half or is_mark or binds or bool(_PAIR.match(before + after))


def _ends_in_half_a_flag(text: str) -> bool:
    return (len(text) - len(text.rstrip(_FLAGS))) % 2 == 1  # they are pairs in a run


# ==============================================================================
# 13. Wire
# ==============================================================================
#
# HTTP/1.1 over asyncio's transports, both roles (RFC 9112). h11 reads every head;
# bodies are decoded here, since h11's own decoder costs 10 µs a chunk. Rule 1: a head
# is read strictly, also where h11 is lenient. Rule 2: what leaves the path below either
# gets back to it or closes. Knows nothing of JSON or of routes.
#
#     IDLE -> HEAD -> BODY -> IDLE      [read_head, read_body, …]
#     any  -> closed                    [EOF, a deadline, malformed bytes, close]

# nginx and Node allow 32 and 16 KiB; cookies of a shared host can be large.
MAX_HEAD_BYTES = 32 * 1024
MAX_FIELDS = 200  # Apache and Python's http.client allow 100
# What is taken at once, and what a wire may hold unread before it reads no more.
READ_BUFFER_BYTES = 64 * 1024
WRITE_TIMEOUT_S = 60.0  # for a peer that reads nothing
MAX_TIMER_S = 30.0  # a far deadline arms its timer again: a nearer one may come first
# A timer that is so late was stopped with the whole process (by Ctrl-Z, `docker pause`)
# and may run before what came meanwhile is read: that is read first.
STOPPED_S = 1.0

MAX_EXTENSION_BYTES = 1024  # of a chunk; nobody reads it
# A chunk's size line, with the line end of the chunk before it; and what may be the
# beginning of one.
_SIZE_LINE = rb"([0-9A-Fa-f]{1,15})[ \t]{0,64}(?:;[^\r\n]{0,%d})?" % MAX_EXTENSION_BYTES
_CHUNK = re.compile(rb"\r\n" + _SIZE_LINE + rb"\r\n")
_CHUNK_BEGUN = re.compile(rb"\r?\Z|\r\n(?:" + _SIZE_LINE + rb"\r?)?\Z")
_TRAILERS = re.compile(rb"(?:\r\n[!#$%&'*+.^_`|~\w-]+:[^\r\n]*)*\r\n\r\n")
_LAST_CHUNK = b"0\r\n\r\n"  # without trailers
_BAD_CHUNK = "The size of a chunk is malformed, or its extension too long."

Fields = Sequence[tuple[str, str]]  # of a head: (name, value)
Read = Callable[[], Awaitable[bytes]]  # more of a body, b"" at its end
Fault = Callable[[], Exception]  # makes what is raised


class MalformedHTTP(BadRequest):
    """The peer does not speak HTTP/1.1 as it must be spoken."""


class ConnectionBroken(Exception):
    """The peer closed or reset the connection in the middle of something."""


class BodyDecoder:
    """Takes a message's body out of the bytes that follow its head.

    Args:
        length: the Content-Length; None for chunked coding, -1 for "until the end".
    """

    def __init__(self, length: int | None) -> None:
        self.is_complete = length == 0
        self.rest = b""  # what came after the body's end
        self.failure = ""  # of the framing: what to raise MalformedHTTP with
        self._is_chunked = length is None
        self._left = length or 0  # of the body, or of the current chunk
        # Of chunked coding: bytes that are not understood yet. The line end behind a
        # chunk is read with the next one; the first is read as if one came before it.
        self._buffer = b"\r\n"

    def feed(self, data: bytes) -> bytes:
        """The bytes of the body in `data`, up to a `failure` if it leaves one."""
        if self._is_chunked:
            pieces: list[bytes] = []
            try:
                if self._buffer == b"\r\n":
                    chunks = data.removesuffix(_LAST_CHUNK)
                    if body := _whole_chunks(chunks):
                        self.is_complete = chunks != data
                        return body
                self._feed_chunks(data, pieces)
            except MalformedHTTP as error:
                self.failure = error.message
            return b"".join(pieces)
        if self._left < 0:
            return data
        body, self.rest = data[: self._left], data[self._left :]
        self._left -= len(body)
        self.is_complete = not self._left
        return body

    def feed_eof(self) -> None:
        """The peer closed before the end; ConnectionBroken if that is not the end."""
        if self._left >= 0:
            raise ConnectionBroken("closed in the middle of a body")
        self.is_complete = True

    def _feed_chunks(self, data: bytes, pieces: list[bytes]) -> None:
        """Take chunks one by one: those that are cut, and what is beside them."""
        data = self._buffer + data
        at, left = 0, self._left
        while at < len(data):
            if not left:
                if not (line := _CHUNK.match(data, at)):
                    if not _CHUNK_BEGUN.match(data, at):
                        raise MalformedHTTP(_BAD_CHUNK)
                    break
                left = int(line[1], 16)
                if not left:
                    self._skip_trailers(data, line.end() - 2)
                    break
                at = line.end()
            piece = data[at : at + left]
            pieces.append(piece)
            at += len(piece)
            left -= len(piece)
        self._left, self._buffer = left, data[at:]

    def _skip_trailers(self, data: bytes, at: int) -> None:
        """Pass the trailer fields, once all are here; nobody needs them."""
        end = data.find(b"\r\n\r\n", at)
        if (len(data) if end < 0 else end) - at > MAX_HEAD_BYTES:
            raise MalformedHTTP("The trailers are too long.")
        if end < 0:
            check_line_ends(data[at:])
        elif not _TRAILERS.fullmatch(data, at, end + 4):
            raise MalformedHTTP("A trailer field is malformed.")
        else:
            self.is_complete, self.rest = True, data[end + 4 :]


def _whole_chunks(data: bytes) -> bytes:
    """The body of chunks that all came whole, if their data holds no CR LF, else b"".

    Dify's events are such chunks, so most reads are understood at once: 5% of the
    instructions of a whole answer.
    """
    lines = data.split(b"\r\n")
    chunks = lines[1::2]
    sizes = [b"%x" % len(chunk) for chunk in chunks]
    is_whole = lines[::2] == [*sizes, b""]  # nothing follows the last line end
    return b"".join(chunks) if is_whole and all(chunks) else b""


# A form's parts in number, and the head of one: browsers send some 200 bytes.
MAX_FORM_PARTS, MAX_PART_HEAD_BYTES = 256, 8 * 1024
_PART_FIELD = re.compile(r"\r\n([\w-]+):([^\r\n\0]*)")
_PARAMETER = re.compile(
    r';\s*([\w*-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s;"]+))', re.DOTALL
)


class FormPart(NamedTuple):
    """The head of a form's part; `filename` is None for a plain field."""

    name: str
    filename: str | None = None
    media_type: str = ""


class FormReader:
    """Takes a form apart while it comes: multipart/form-data, RFC 7578.

    It keeps no more than what was read at once, and the beginning of a boundary or of a
    part's head. Both methods raise BadRequest.

    Args:
        content_type: the request's, with the boundary.
        read_body: gives more of the body.
    """

    def __init__(self, content_type: str, read_body: Read) -> None:
        if not (boundary := _parameters(content_type).get("boundary")):
            raise BadRequest("The Content-Type of the form names no boundary.")
        self._delimiter = b"\r\n--" + boundary.encode("latin-1", "replace")
        self._read_body = read_body
        # The line end before a boundary belongs to it, so data is read with the line
        # end before it, which is skipped; the whole body is taken as if it had one.
        self._buffer, self._skip = b"\r\n", 2
        self._parts = 0

    async def next_part(self) -> FormPart | None:
        """The head of the next part, None after the last; passes what is before it."""
        while await self.read():
            pass
        size = len(self._delimiter)
        while len(self._buffer) < size + 2:
            await self._read_more()
        if self._buffer[size : size + 2] == b"--":
            return None
        if not self._buffer.startswith(b"\r\n", size):
            raise BadRequest("Each boundary of the form must end with CR LF.")
        self._parts += 1
        if self._parts > MAX_FORM_PARTS:
            raise BadRequest(f"The form has more than {MAX_FORM_PARTS} parts.")
        self._buffer = self._buffer[size:]
        return _parse_part_head(await self._read_head())

    async def read(self) -> bytes:
        """More of the part's data; b"" at its end."""
        while True:
            data = self._buffer
            found = data.find(self._delimiter)
            end = found if found >= 0 else max(0, len(data) - len(self._delimiter) + 1)
            piece = data[self._skip : end]
            self._buffer, self._skip = data[end:], max(0, self._skip - end)
            if piece or found >= 0:
                return piece
            await self._read_more()

    async def _read_head(self) -> bytes:
        """A part's head, each line behind its line end."""
        most = MAX_PART_HEAD_BYTES
        while (end := self._buffer.find(b"\r\n\r\n")) < 0 and len(self._buffer) <= most:
            await self._read_more()
        if not 0 <= end <= most:
            raise BadRequest("The head of a part of the form is too long.")
        head, self._buffer, self._skip = self._buffer[:end], self._buffer[end + 2 :], 2
        return head

    async def _read_more(self) -> None:
        if not (data := await self._read_body()):
            raise BadRequest("The form breaks off before its last boundary.")
        self._buffer += data


def _parse_part_head(head: bytes) -> FormPart:
    text = head.decode("utf-8", "replace")
    if _PART_FIELD.sub("", text):
        raise BadRequest("The head of a part of the form is malformed.")
    fields = {name.lower(): value.strip() for name, value in _PART_FIELD.findall(text)}
    names = _parameters(fields.get("content-disposition", ""))
    if "name" not in names:
        raise BadRequest("A part of the form has no name.")
    coding = fields.get("content-transfer-encoding", "binary").lower()
    if coding not in ("binary", "8bit", "7bit"):  # RFC 7578, section 4.7
        raise BadRequest(f"Content-Transfer-Encoding {coding!r} is not read in forms.")
    media_type = fields.get("content-type", "")
    return FormPart(names["name"], names.get("filename"), media_type)


def _parameters(field: str) -> dict[str, str]:
    """The parameters of a header field; encoded ones (RFC 5987) go before plain ones.

    For a quote, browsers write `%22`, curl also a backslash before it.
    """
    parameters = {}
    for name, quoted, token in sorted(_PARAMETER.findall(field)):
        value = re.sub(r'\\(["\\])', r"\1", quoted or token).replace("%22", '"')
        if name.endswith("*"):  # UTF-8''%C3%BC.png, or ISO-8859-1''%FC.png
            coding = "latin-1" if value.upper().startswith("ISO-8859-1'") else "utf-8"
            value = urllib.parse.unquote(value.split("'", 2)[-1], coding)
        parameters[name.lower().rstrip("*")] = value
    return parameters


class Wire(asyncio.Protocol):
    """One connection: reads and writes bytes, keeps deadlines.

    A protocol of its own: with asyncio's streams an open answer takes 15% more memory.
    Only one task reads: it is woken when something has come, unless `on_data` takes
    that first. Any task may write.

    All deadlines share one timer that is re-armed: moving it costs an assignment, where
    a timeout around each read would cost a task. It is never armed for long, so that a
    nearer deadline seldom needs another one.

    Args:
        on_open: told when the connection is made.
    """

    def __init__(self, on_open: Callable[[Wire], None] | None = None) -> None:
        self._on_open = on_open
        self.on_leave: Callable[[], None] | None = None  # called when the peer closes
        self.on_data: Callable[[], None] | None = None  # called in place of `wake`
        self._loop = asyncio.get_running_loop()
        self.peer = "-"  # its address
        # None until it is connected; `_plain` is the one under TLS.
        self._transport = self._plain = cast(asyncio.Transport, None)
        self.unread = b""  # what came and nobody has taken yet; some is put back
        self._is_paused = False  # reading, since too much is unread
        self._is_at_end = False  # the peer sends nothing more
        self._is_lost = False  # the connection
        self._failure: Exception | None = None  # of the connection, or a deadline's
        self._reader: asyncio.Future[None] | None = None  # who waits for bytes
        self._room: asyncio.Event | None = None  # set when one may write; None: one may
        self._was_unsent = 0  # when the deadline of a write was set
        self._deadline = 0.0  # 0: none
        self._on_deadline: Fault = ConnectionBroken
        self._timer: asyncio.TimerHandle | None = None
        self._check_at = inf  # when it is due; inf: it is not armed

    @property
    def _unsent(self) -> int:
        """Bytes that the socket has not taken yet; those under TLS may count twice."""
        try:
            under = self._plain.get_write_buffer_size()
            return under + self._transport.get_write_buffer_size()
        except AttributeError:
            return 0  # a TLS transport whose connection is lost, in some Pythons

    # What the transport tells...

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is open."""
        self._transport = self._plain = cast(asyncio.Transport, transport)
        if isinstance(address := transport.get_extra_info("peername"), tuple):
            self.peer = str(address[0])
        if self._on_open:
            self._on_open(self)

    def data_received(self, data: bytes) -> None:
        """Some bytes came."""
        self.unread = self.unread + data if self.unread else data
        if len(self.unread) > READ_BUFFER_BYTES and not self._reader:
            self._is_paused = True
            self._transport.pause_reading()
        take = self.on_data or self.wake
        while self.unread and self._reader and not self._reader.done():
            take()

    def eof_received(self) -> bool:
        """The peer sends nothing more; whether it may still be written to."""
        self._end()
        return self._transport.get_extra_info("sslcontext") is None  # TLS can't

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed: by the peer, the network, or ourselves."""
        if exc and not self._failure:
            self._failure = ConnectionBroken(str(exc))
        self._is_lost = True
        if self._timer:
            self._timer.cancel()
        self._end()
        self.resume_writing()

    def pause_writing(self) -> None:
        """More is unsent than should be."""
        self._room = asyncio.Event()

    def resume_writing(self) -> None:
        """Most of it is sent."""
        if self._room:
            self._room.set()
            self._room = None

    def _end(self) -> None:
        self._is_at_end = True
        self.wake()
        if self.on_leave:
            self.on_leave()

    def wake(self) -> None:
        """Wake the task that waits for bytes, whether there are any or not."""
        if self._reader and not self._reader.done():
            self._reader.set_result(None)

    async def start_tls(self, trust: ssl.SSLContext, host: str) -> None:
        """Go on in TLS, as its client; raises OSError (ssl too) or ConnectionBroken."""
        # TLS speaks only when spoken to: what came would be taken for the peer's.
        # Nor does asyncio tell that TLS begins on a lost connection.
        if self.is_stale:
            raise ConnectionBroken("it was closed, or spoke before TLS began")
        start: Any = self._loop.start_tls
        self._transport = await start(self._plain, self, trust, server_hostname=host)

    # Deadlines...

    def set_deadline(self, seconds: float, error: Fault, sends: bool = False) -> None:
        """What is awaited from now on may take `seconds`; then it raises `error()`.

        With `sends` it moves on as long as the peer takes what was written before.
        """
        self._was_unsent = self._unsent if sends else 0
        self._deadline = self._loop.time() + seconds
        self._on_deadline = error
        if self._deadline < self._check_at:
            self._arm()

    def clear_deadline(self) -> None:
        """What is awaited may take any time."""
        self._deadline = 0.0

    def _arm(self) -> None:
        if self._timer:
            self._timer.cancel()
        now = self._loop.time()
        self._check_at = max(now, min(self._deadline, now + MAX_TIMER_S))
        self._timer = self._loop.call_at(self._check_at, self._check_deadline)

    def _check_deadline(self) -> None:
        late_s, self._check_at = self._loop.time() - self._check_at, inf
        if not self._deadline or self._is_lost:
            return
        must_abort = self._unsent or self._transport.is_closing()
        if late_s > STOPPED_S or self._loop.time() < self._deadline:
            self._arm()
        elif self.on_leave == self.close and not must_abort:
            self.close()  # it was idle in a pool for so long: what came is stray
        elif self._unsent < self._was_unsent:  # it reads, if slowly
            self.set_deadline(WRITE_TIMEOUT_S, self._on_deadline, sends=True)
        elif self.unread and not must_abort:
            self._deadline = 0.0  # we are late, not the peer
        else:
            self._failure = self._failure or self._on_deadline()
            self.wake()
            if must_abort:
                self._transport.abort()  # or `drain` would wait for ever

    # Reading...

    @property
    def is_stale(self) -> bool:
        """Whether an idle connection is of no use any more."""
        is_over = self._transport.is_closing() or self._is_at_end or self._failure
        return bool(is_over or self.unread or self._unsent)

    async def wait_for_data(self) -> bool:
        """Whether anything comes, or `wake` is called, before the peer closes.

        Raises:
            ConnectionBroken, or what the deadline raises.
        """
        if not (self.unread or self._failure or self._is_at_end):
            self._reader = self._loop.create_future()
            self.read_on()
            try:
                await self._reader
            finally:
                self._reader = None
        if self._failure and not self.unread:
            raise self._failure
        return bool(self.unread) or not self._is_at_end

    def read_on(self) -> None:
        """Let more come once all is taken; nobody is told else that the peer leaves."""
        if self._is_paused and not (self.unread or self._is_lost):
            self._is_paused = False
            self._transport.resume_reading()

    # Writing...

    def must_drain(self) -> bool:
        """Whether `drain` would wait or raise."""
        return self._room is not None or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        """Hand bytes over; `drain` afterwards, at the latest before the next read."""
        self._transport.write(data)

    async def drain(self) -> None:
        """Wait until the peer has taken most of what was written."""
        if self._room:
            self.set_deadline(WRITE_TIMEOUT_S, ConnectionBroken, sends=True)
            await self._room.wait()
            self.clear_deadline()
        if self._transport.is_closing():
            raise self._failure or ConnectionBroken("closed")

    def close(self) -> None:
        """Close after what was written is sent; may be called twice."""
        if not self._transport.is_closing():
            self._transport.close()
            # A peer that reads nothing must not hold it for ever, nor one that never
            # answers TLS's close_notify.
            self.set_deadline(WRITE_TIMEOUT_S, ConnectionBroken, sends=True)

    def abort(self) -> None:
        """Close now."""
        self.close()
        if not self._is_lost:  # asyncio's transports can't be aborted any more then
            self._transport.abort()


async def open_wire(*address: Any, **options: Any) -> Wire:
    """A new connection; the arguments are those of asyncio's `create_connection`."""
    loop = asyncio.get_running_loop()
    _, wire = await loop.create_connection(Wire, *address, **options)
    return wire


# Heads and bodies...


async def read_head(wire: Wire) -> bytes:
    """The next head, its blank line included; b"" if the peer closed before one."""
    data, checked = b"", 0
    while wire.unread or await wire.wait_for_data():
        data, wire.unread = _without_empty_lines(data + wire.unread), b""
        end = data.find(b"\r\n\r\n", max(0, checked - 3))
        if (len(data) if end < 0 else end) > MAX_HEAD_BYTES:
            raise HeadTooLarge(f"The head is over {MAX_HEAD_BYTES >> 10} KiB.")
        if end >= 0:
            wire.unread = data[end + 4 :]
            wire.read_on()
            return data[: end + 4]
        check_line_ends(data[max(0, checked - 1) :])
        checked = len(data)
    if data:
        raise ConnectionBroken("closed in the middle of a head")
    return b""


def skip_empty_lines(wire: Wire) -> bool:
    """Drop the empty lines before a request; whether anything else is here."""
    wire.unread = _without_empty_lines(wire.unread)
    return bool(wire.unread)


def _without_empty_lines(data: bytes) -> bytes:
    """Data without the empty lines that may precede a head (RFC 9112, section 2.2)."""
    return re.sub(rb"\A(?:\r\n)+", b"", data) if data.startswith(b"\r\n") else data


def check_line_ends(data: bytes) -> None:
    """Refuse an LF without CR, or a CR without LF; one may end or begin the data."""
    pairs = data.count(b"\r\n")
    first = data.startswith(b"\n")  # its CR was checked before
    last = data.endswith(b"\r")  # its LF may still come
    if data.count(b"\n") != pairs + first or data.count(b"\r") != pairs + last:
        is_tls = data.startswith(b"\x16\x03")  # a handshake (RFC 8446, section 5.1)
        cure = "This port speaks no TLS: the base URL begins with http://."
        raise MalformedHTTP(cure if is_tls else "Lines must end with CR LF.")


def ends_connection(headers: Mapping[str, str], version: str) -> bool:
    """Whether nothing follows on the connection, by a head (RFC 9112, section 9.3)."""
    options = "".join(headers.get("connection", "").lower().split()).split(",")
    return "close" in options or version != "1.1"


class Request(NamedTuple):
    """A request's head; `path` and `query` are still percent-encoded.

    Header names are in lower case; the values of a repeated one are joined by commas.
    """

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    http_version: str = "1.1"

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits for a 100 before it sends the body."""
        expect = self.headers.get("expect", "").lower()
        return expect == "100-continue" and self.http_version == "1.1"


_NO_REQUEST = Request("-", "-", "", {}, "1.0")  # until one is understood


# What h11 lets pass or mends: folded lines, control characters, a length given twice.
_LENIENT = re.compile(
    rb"\r\n[ \t]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r\ncontent-length:(?:[^\r]*,"
    rb"|(?s:.*?)\r\ncontent-length:)",
    re.IGNORECASE,
)
# A Content-Encoding that matters; some name a charset there.
COMPRESSED = re.compile("gzip|deflate|compress|br|zstd", re.IGNORECASE)
_HOST = re.compile(
    r"(?:\[[0-9A-Fa-f:.]+\]|[\w.~!$&'()*+;=%-]*)(?::\d{0,5})?\Z", re.ASCII
)


def parse_request_head(head: bytes) -> Request:
    """A request's head, read by h11 and then more strictly.

    The heads of one client differ in the body's length alone, as a rule, so what was
    made of one serves for the next: that saves 50 µs of each request.

    Raises:
        MalformedHTTP: it is not what RFC 9112 allows, or allows two readings of it.
        HeadTooLarge: too many fields.
    """
    cut = _LENGTH.split(head)
    if len(cut) != 3 or len(head) > _MAX_KEPT_HEAD:
        return _parse_request_head(head)
    before, length, after = cut
    like = _kept_request_head(b"%b\r\nContent-Length: 1%b" % (before, after))
    headers = {**like.headers, "content-length": length.decode()}
    return Request(like.method, like.path, like.query, headers, like.http_version)


_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: (\d{1,18})(?=\r\n)")
_MAX_KEPT_HEAD = 4096


def _parse_request_head(head: bytes) -> Request:
    """As `parse_request_head`, which may know it already."""
    event = h11_event(h11.SERVER, head)
    if _LENIENT.search(head):
        raise MalformedHTTP("Malformed HTTP: folding, control byte or length list.")
    headers = read_fields(event.headers)
    version = event.http_version.decode()
    if version not in ("1.0", "1.1"):
        raise MalformedHTTP(f"HTTP/{version} is not spoken here.")
    path, host = _split_target(event.method, event.target.decode("latin-1"))
    if host:
        headers["host"] = host
    if not _HOST.match(headers.get("host", "")):
        raise MalformedHTTP("The Host is malformed.")
    if version == "1.0" and "transfer-encoding" in headers:
        raise MalformedHTTP("HTTP/1.0 has no Transfer-Encoding.")
    path, _, query = path.partition("?")
    return Request(event.method.decode(), path, query, headers, version)


_kept_request_head = functools.lru_cache(maxsize=256)(_parse_request_head)


def h11_event(role: type[h11.SERVER] | type[h11.CLIENT], head: bytes) -> Any:
    """What h11 reads in a whole head: a request, or a response; raises MalformedHTTP.

    Args:
        role: ours: h11.SERVER or h11.CLIENT.
        head: its lines end with CR LF.
    """
    check_line_ends(head)
    connection = h11.Connection(role, MAX_HEAD_BYTES * 2)
    try:
        connection.receive_data(head)
        event = connection.next_event()
    except h11.RemoteProtocolError as error:
        # Not h11's status: a 501 is of type `server_error`, and would be repeated. Nor
        # the bytes that it quotes: a key or a message's text is in them.
        about = str(error).partition(": b")[0]  # ": bytearray(b'…')"
        raise MalformedHTTP(f"Malformed HTTP: {about}.") from error
    if not isinstance(event, (h11.Request, h11.Response)):  # 1xx, or nothing
        raise MalformedHTTP("Malformed HTTP: neither a request nor a response.")
    return event


def read_fields(fields: Collection[tuple[bytes, bytes]]) -> dict[str, str]:
    """Header fields by name; refuses what h11 lets pass and a strict reader must not.

    Two framings let two readers disagree about where a message ends: request smuggling
    (RFC 9112, section 11.2). h11 and `_LENIENT` refuse the same one given twice.
    """
    headers: dict[str, str] = {}
    for raw_name, raw_value in fields:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if len(fields) > MAX_FIELDS:
        raise HeadTooLarge(f"There are more than {MAX_FIELDS} header fields.")
    if "transfer-encoding" in headers and "content-length" in headers:
        raise MalformedHTTP("Transfer-Encoding and Content-Length exclude each other.")
    return headers


def _split_target(method: bytes, target: str) -> tuple[str, str]:
    """(path with query, host) of a request target; the host is "" if it names none."""
    if target.startswith("/"):
        return target, ""
    if target == "*" and method == b"OPTIONS":
        return "/", ""
    absolute = r"https?://([^/?#@]+)(?![^/?])/?([^#]*)\Z"
    if not (match := re.match(absolute, target, re.IGNORECASE)):
        raise MalformedHTTP("The request target must be a path.")
    return f"/{match[2]}", match[1]


def encode_head(start: str, fields: Fields) -> bytes:
    """A head to be sent; raises ValueError if a value would break out of its line.

    h11 would check the grammar of our own names, too, at ten times the price.
    """
    lines = [start, *map(": ".join, fields)]
    text = "".join(lines)
    if "\r" in text or "\n" in text:
        raise ValueError("a line end in a header field")
    return "\r\n".join([*lines, "\r\n"]).encode("latin-1")


def body_decoder(headers: Mapping[str, str], *, until_end: bool) -> BodyDecoder:
    """How a message's body ends; `until_end` where no length means "at the close"."""
    length = int(headers.get("content-length", -1 if until_end else 0))
    return BodyDecoder(None if "transfer-encoding" in headers else length)


async def read_body(wire: Wire, decoder: BodyDecoder) -> bytes:
    """The next bytes of a body; b"" when it is complete, or `wake` was called."""
    while not decoder.is_complete:
        if decoder.failure:
            raise MalformedHTTP(decoder.failure)
        if not (wire.unread or await wire.wait_for_data()):
            decoder.feed_eof()
        elif not wire.unread:
            break
        elif body := take_body(wire, decoder):
            return body
    return b""


def take_body(wire: Wire, decoder: BodyDecoder) -> bytes:
    """What has come of a body; READ_BUFFER_BYTES at most, since asyncio reads more."""
    rest = wire.unread[READ_BUFFER_BYTES:]
    body = decoder.feed(wire.unread[:READ_BUFFER_BYTES])
    wire.unread = decoder.rest + rest
    wire.read_on()
    return body


async def read_whole(read: Read) -> bytes:
    """A body in one piece."""
    pieces: list[bytes] = []
    while data := await read():
        pieces.append(data)
    return b"".join(pieces)  # of one piece it makes no copy


_PHRASES = {status.value: status.phrase for status in http.HTTPStatus}


@functools.lru_cache(maxsize=1)
def _http_date(second: int) -> str:
    """A time as `Date` tells it (RFC 9110, section 5.6.7); made once a second."""
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(second))


class Reply:
    """The response to one request: `send` it whole, or `start`, `write` and `end`.

    The head waits for the first bytes of the body, to leave in one packet with them.
    """

    def __init__(self, wire: Wire, request: Request = _NO_REQUEST) -> None:
        self.request = request  # that it answers
        self.status = self.body_bytes = 0  # 0: not started
        self.is_complete = self.must_close = self._is_bare = self._is_chunked = False
        self.headers: list[tuple[str, str]] = []  # that go with any response
        self._wire = wire
        self._head = b""
        self.drain, self.must_drain = wire.drain, wire.must_drain

    def send(self, status: int, body: bytes = b"", headers: Fields = ()) -> None:
        """The whole response at once."""
        self.start(status, headers, len(body))
        self.end(body)

    def start(self, status: int, headers: Fields = (), size: int | None = None) -> None:
        """The head; without a size the body is chunked, or ends at the close."""
        request = self.request
        self.must_close |= ends_connection(request.headers, request.http_version)
        self._is_bare = request.method == "HEAD"
        date = _http_date(int(time.time()))
        fields = [("Date", date), *headers, *self.headers]
        self._is_chunked = size is None and request.http_version != "1.0"
        if self._is_chunked:
            fields.append(("Transfer-Encoding", "chunked"))
        elif size is not None and status != 204:
            fields.append(("Content-Length", str(size)))
        if self.must_close:  # as always for HTTP/1.0
            fields.append(("Connection", "close"))
        start = f"HTTP/1.1 {status} {_PHRASES[status]}"
        self._head, self.status = encode_head(start, fields), status

    def write(self, data: bytes, last: bytes = b"", *, waits: bool = False) -> None:
        """More of the body; with `waits` it leaves with the next, as the head does."""
        if self._is_bare:
            data = last = b""
        if data:
            self.body_bytes += len(data)
            data = b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data
        if waits:
            self._head += data
        elif self._head or data or last:
            self._wire.write(self._head + data + last)
            self._head = b""

    def end(self, data: bytes = b"") -> None:
        """The last of the body, and its end, in one packet."""
        self.is_complete = True
        self.write(data, _LAST_CHUNK if self._is_chunked else b"")


# ==============================================================================
# 14. Upstream
# ==============================================================================
#
# The way to Dify: connections that are kept and reused, TLS that is always verified,
# the Dify client (`Api` sends a call, `Facts` knows the apps), and one turn's stream of
# answer parts. Every error of sockets, TLS and HTTP becomes a ProxyError in
# `_error_from_wire`, but for one: that a connection was closed before it brought a
# byte of an answer, which `_read_response_head` tells.
#
# A connection:  none -> open -> sent -> head -> body -> idle -> sent …
#                [_open, _exchange, read, close]; anything unexpected -> closed
#
# Only one thing is ever repeated: a request on a reused connection that is closed at
# once without a byte of an answer (Dify closes idle ones after 2 s: a common race).
#
# At DEBUG the log has what is sent to Dify, and what it sends, without any text:
#
#     > POST https://host/v1/chat-messages 97 bytes    < 200 text/event-stream
#                                                      < message 310 characters

# Dify's default server has ten connections in all, idle ones included.
IDLE_CONNECTION_S = 15.0
MAX_IDLE_CONNECTIONS = 64  # to one origin
GRACE_S = 1.0  # for a chatflow's last event, once `AnswerReader.is_closing`
CALL_TIMEOUT_S = 30.0  # for the head of a small call's answer
UPLOAD_TIMEOUT_S = 120.0  # until Dify has stored a file, or heard a recording
CIRCUIT_S = 1.0  # in which nobody tries an origin that could not be reached
RACE_S = 2.0  # what is closed this soon was never read: the request may be repeated
MAX_INTERIM_RESPONSES = 10  # 1xx before the final response
STOP_DRAIN_S = 10.0  # reading on after a stop, so that Dify stores what it has
MAX_ERROR_BYTES = 256 * 1024  # gateways send whole pages
MAX_JSON_BYTES = 16 * 1024 * 1024  # a page of 100 stored messages
FORM_FRESH_S = 300.0  # what an app said of itself is asked again after this time


Connect = Callable[..., Awaitable[Wire]]
Body = Union[bytes, Read]  # of a request; the latter gives it piece by piece


class Origin(NamedTuple):
    """Where connections lead."""

    scheme: str
    host: str
    port: int


class Proxy(NamedTuple):
    """A proxy on the way; `headers` are for it alone."""

    host: str
    port: int
    headers: Fields


@functools.lru_cache(maxsize=64)
def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    own = r"(?:.*\.)?localhost|\[?::1\]?|127(?:\.\d{1,3}){3}"
    return re.fullmatch(own, host, re.IGNORECASE) is not None


def is_address(host: str) -> bool:
    """Whether a host is an IP address, and no name."""
    return ":" in host or re.fullmatch(r"[\d.]+", host, re.ASCII) is not None


def proxy_for(origin: Origin, settings: Settings) -> Proxy | None:
    """The proxy on the way to an origin; loopback and NO_PROXY's hosts need none."""
    url = settings.https_proxy if origin.scheme == "https" else settings.http_proxy
    if not url or is_loopback(origin.host):
        return None
    names = (origin.host, _authority(origin), _authority(origin, origin.port))
    for suffix in re.findall(r"[^\s,]+", settings.no_proxy.lower()):
        plain = suffix.lstrip("*").lstrip(".")
        if not plain or any(f".{name}".endswith(f".{plain}") for name in names):
            return None
        if "/" in suffix and _is_within(origin.host, suffix):
            return None
    parts = urllib.parse.urlsplit(url)
    user = urllib.parse.unquote(f"{parts.username or ''}:{parts.password or ''}")
    token = base64.b64encode(user.encode()).decode()
    headers = [("Proxy-Authorization", f"Basic {token}")] if parts.username else []
    return Proxy(parts.hostname or "", parts.port or 80, headers)


def _is_within(host: str, network: str) -> bool:
    """Whether a host is an address of a network, as 10.0.0.0/8."""
    import ipaddress  # noqa: PLC0415  (at the top it costs each start 2 ms)

    with contextlib.suppress(ValueError):  # a name, or no network
        address = ipaddress.ip_address(host)
        return address in ipaddress.ip_network(network, strict=False)
    return False


@functools.lru_cache(maxsize=64)
def origin_of(url: str) -> Origin:
    """The origin of an http(s) URL."""
    parts = urllib.parse.urlsplit(url)
    default = 443 if parts.scheme == "https" else 80
    return Origin(parts.scheme, parts.hostname or "", parts.port or default)


def _authority(origin: Origin, default_port: int = 0) -> str:
    """Host and port as requests name them (RFC 3986, section 3.2)."""
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    return host if origin.port == default_port else f"{host}:{origin.port}"


_CERTIFICATE_CURES = {  # by X509_V_ERR_…
    **dict.fromkeys((9, 10), "Have it renewed, or set this machine's clock."),
    **dict.fromkeys((62, 64), f"Name the host that it is for in {BASE_SETTING}."),
}
_UNKNOWN_AUTHORITY = (
    "If a private authority signed it, name its file in DIFY_CA_FILE. If this Python "
    "knows no authority at all, give it some: on macOS by its `Install "
    "Certificates.command`, on Linux by the package ca-certificates."
)


EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_NO_MEANS = (
    "This server can open no more connections to Dify (%s); raise `ulimit -n`, or "
    "lower MAX_CONNECTIONS."
)


def _error_from_wire(
    origin: Origin, error: Exception, proxy: Proxy | None = None
) -> ProxyError:
    """What to do about an error of sockets, TLS or HTTP, on the way to a proxy too."""
    where, setting = f"{origin.scheme}://{_authority(origin)}", BASE_SETTING
    if proxy:
        setting = f"{origin.scheme.upper()}_PROXY: {proxy.host}:{proxy.port}"
    if isinstance(error, ssl.SSLCertVerificationError):
        cure = _CERTIFICATE_CURES.get(error.verify_code, _UNKNOWN_AUTHORITY)
        reason = error.verify_message.rstrip(".")
        return ConfigurationFault(f"The certificate of {where} fails: {reason}. {cure}")
    if isinstance(error, asyncio.TimeoutError):
        text = f"{where} accepts no connection in time; check {setting}."
        return UpstreamTimeout(text)
    if isinstance(error, OSError) and error.errno in EXHAUSTED:
        return Overloaded(_NO_MEANS % os.strerror(error.errno))
    if isinstance(error, ssl.SSLError):
        setting = f"scheme and port in {BASE_SETTING}"
        text = f"TLS with {where} failed ({error.reason or error})"
    elif isinstance(error, (socket.gaierror, UnicodeError)):  # the latter: no such name
        text = f"The host name {(proxy or origin).host!r} can't be resolved"
    elif isinstance(error, (OSError, ConnectionBroken)):
        # asyncio's own reset says nothing.
        text = f"No connection with {where} ({str(error) or 'it was closed'})"
    else:
        text = f"{where} does not answer in proper HTTP ({str(error).rstrip('.')})"
    return UpstreamFailed(f"{text}; check {setting}.")


_WIRE_ERRORS = (
    *(OSError, asyncio.TimeoutError, ConnectionBroken, UnicodeError),
    *(MalformedHTTP, HeadTooLarge),
)


class UpstreamResponse:
    """A response of Dify's: read its body to the end, or `close` it."""

    def __init__(
        self, pool: Pool, origin: Origin, wire: Wire, head: ResponseHead
    ) -> None:
        self.status, self.headers = head.status, head.headers
        self.content_type = self.headers.get("content-type", "application/octet-stream")
        self._pool, self._origin, self._wire = pool, origin, wire
        has_body = self.status not in (204, 304)  # whatever their length says
        self._body = body_decoder(self.headers if has_body else {}, until_end=has_body)
        self.can_reuse = not ends_connection(self.headers, head.http_version)
        self._is_released = False

    def set_deadline(self, seconds: float, error: Fault) -> None:
        """What is read from now on may take `seconds`; then it raises `error()`."""
        if not self._is_released:  # else it would be the next one's
            self._wire.set_deadline(seconds, error)

    async def read(self) -> bytes:
        """The next bytes of the body; b"" at its end."""
        try:
            data = await read_body(self._wire, self._body)
        except _WIRE_ERRORS as error:
            raise _error_from_wire(self._origin, error) from error
        if self._body.is_complete:
            self.close()
        return data

    def hand_to(self, take: Callable[[bytes], bool]) -> None:
        """Hand to `take` what comes while `read` waits.

        At the body's end, and when `take` says so, `read` returns b"".
        """
        if not self._is_released:
            self._wire.on_data = functools.partial(self._hand_over, take)

    def _hand_over(self, take: Callable[[bytes], bool]) -> None:
        body = self._body
        if take(take_body(self._wire, body)) or body.is_complete or body.failure:
            self._wire.wake()

    async def read_all(self, limit: int) -> bytes:
        """The whole body; raises UpstreamFailed if it has more bytes than that."""
        content = bytearray()
        try:
            while data := await self.read():
                content += data
                if len(content) > limit:
                    raise UpstreamFailed(f"Dify's answer is over {limit >> 10} KiB.")
        finally:
            self.close()
        return bytes(content)

    def close(self, *, is_over: bool = False) -> None:
        """Let the connection go: to the pool if the body is complete, else for good.

        Of one that `is_over` nobody needs what may still come. May be called twice.
        """
        if self._is_released:
            return
        self._is_released = True
        wire, body = self._wire, self._body
        wire.on_data = None
        if is_over and not body.is_complete:
            take_body(wire, body)  # what came meanwhile
        is_good = self.can_reuse and (is_over or body.is_complete)
        if is_good and not (wire.is_stale or self._pool.is_closed):
            self._pool.give_back(self._origin, wire, body)
        else:
            wire.abort()


class Pool:
    """Keeps connections to Dify for the next request, and knows how to open them.

    Other settings need another pool: these connections may lead through a proxy that
    is no longer to be used, and what could not be reached may be reached by now.

    Args:
        connect: opens a connection as `open_wire` does.
        settings: the time to connect, proxies, authorities to trust.
    """

    def __init__(self, connect: Connect, settings: Settings) -> None:
        self.connect, self.settings, self.is_closed = connect, settings, False
        # With the bodies that were read last: the end of one may still be on its way.
        self._idle: dict[Origin, deque[tuple[Wire, BodyDecoder]]] = defaultdict(deque)
        self._faults: dict[Origin, asyncio.Future[ProxyError]] = {}

    async def request(
        self, origin: Origin, request: bytes, timeout_s: float
    ) -> UpstreamResponse:
        """Send a request and read the head of its response.

        Raises:
            UpstreamFailed, UpstreamTimeout, ConfigurationFault, Overloaded.
        """
        if kept := self._take_idle(origin):
            with contextlib.suppress(NoAnswer):
                return await self._exchange(origin, kept, request, timeout_s)
        try:
            wire = await self._open(origin)
        except ProxyError as error:
            error.is_unsent = not kept
            raise
        return await self._exchange(origin, wire, request, timeout_s)

    async def send(
        self, origin: Origin, head: bytes, read: Read, timeout_s: float
    ) -> UpstreamResponse:
        """Send a request whose body comes piece by piece; read its response's head.

        What was sent can't be had again: nothing is repeated, and so no kept connection
        is used, which may be dead. An answer that comes early ends the sending, and the
        connection with it.

        Args:
            origin: where to.
            head: the request's; it says that the body is chunked.
            read: gives more of the body, b"" at its end. What it raises is not Dify's
                fault, and passes.
            timeout_s: for the answer, when all is sent.
        """
        wire, is_sent = await self._open(origin), False
        try:
            wire.write(head)
            while not (is_sent or _ANSWER.search(wire.unread) or wire.must_drain()):
                data = await read()
                for _ in range(2):  # one turn finds an answer that came, one reads it
                    await asyncio.sleep(0)  # before a write fails
                wire.write(b"%x\r\n%b\r\n" % (len(data), data))  # the last is empty
                is_sent = not data
                with contextlib.suppress(ConnectionBroken):  # `_exchange` tells why
                    await wire.drain()
        except BaseException:
            wire.abort()
            raise
        response = await self._exchange(origin, wire, b"", timeout_s)
        response.can_reuse &= is_sent
        return response

    def give_back(self, origin: Origin, wire: Wire, body: BodyDecoder) -> None:
        """Keep a connection whose last response is over."""
        wire.on_leave = wire.close
        wire.set_deadline(IDLE_CONNECTION_S, ConnectionBroken)
        idle = self._idle[origin]
        idle.append((wire, body))
        if len(idle) > MAX_IDLE_CONNECTIONS:
            idle.popleft()[0].close()

    def close(self) -> None:
        """Close all idle connections, and keep none any more."""
        self.is_closed = True
        for wire, _ in itertools.chain.from_iterable(self._idle.values()):
            wire.close()

    def _take_idle(self, origin: Origin) -> Wire | None:
        idle = self._idle[origin]
        for _ in range(len(idle)):
            wire, body = idle.pop()  # the newest, the least likely to be closed soon
            if not body.is_complete:
                take_body(wire, body)
            if wire.is_stale or body.failure:
                wire.close()
            elif body.is_complete:
                wire.on_leave = None
                return wire
            else:  # one used later may be complete
                idle.appendleft((wire, body))
        return None

    # Opening...

    async def _open(self, origin: Origin) -> Wire:
        """A new connection; when one attempt fails, all that wait fail at once.

        A server that can't be reached would else hold every request for the whole
        time to connect. For CIRCUIT_S nobody tries again.
        """
        loop, faults = asyncio.get_running_loop(), self._faults
        fault = faults.setdefault(origin, loop.create_future())
        if fault.done():
            raise copy.copy(fault.result())
        proxy, until = proxy_for(origin, self.settings), asyncio.FIRST_COMPLETED
        timeout_s = self.settings.dify_connect_timeout
        opening = asyncio.ensure_future(self._connect_to(origin, proxy))
        either: set[asyncio.Future[Any]] = {opening, fault}
        try:
            await asyncio.wait(either, timeout=timeout_s, return_when=until)
            if opening.done():
                return opening.result()
            # Another attempt failed, or this one takes too long.
            raise copy.copy(fault.result()) if fault.done() else asyncio.TimeoutError
        except BaseException as error:
            opening.cancel()
            opening.add_done_callback(_abort_made)  # it may be too late to cancel
            if isinstance(error, _WIRE_ERRORS):
                error = _error_from_wire(origin, error, proxy)
            if isinstance(error, ProxyError) and not fault.done():
                fault.set_result(copy.copy(error))  # without its frames
                loop.call_later(CIRCUIT_S, faults.pop, origin, None)
            raise error

    async def _connect_to(self, origin: Origin, proxy: Proxy | None) -> Wire:
        trust = self._trust if origin.scheme == "https" else None
        peer = proxy or origin
        race_s = None if is_address(peer.host) else 0.25  # of a name's addresses
        wire = await self.connect(peer.host, peer.port, happy_eyeballs_delay=race_s)
        try:
            if trust and proxy:
                await _tunnel(wire, proxy, origin)
            if trust:
                await wire.start_tls(trust, origin.host)
            return wire
        except BaseException as error:
            wire.abort()
            if isinstance(error, ssl.SSLCertVerificationError):
                vars(self).pop("_trust", None)  # its files may be better by now
            raise

    @functools.cached_property
    def _trust(self) -> ssl.SSLContext:
        """The system's authorities and the operator's; verification is always on."""
        context = ssl.create_default_context()
        # Python 3.13 began to ask for forms that home-made certificates seldom have.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        for name in ("dify_ca_file", "ssl_cert_file"):
            path = getattr(self.settings, name)
            try:
                if path:
                    context.load_verify_locations(path)
            except (OSError, ValueError) as error:  # ValueError: no file's name
                raise ConfigurationFault(
                    f"{name.upper()}: {path} can't be read as PEM ({error})."
                ) from error
        return context

    async def _exchange(
        self, origin: Origin, wire: Wire, request: bytes, timeout_s: float
    ) -> UpstreamResponse:
        """Write a request, read the head of its response; NoAnswer if none comes."""
        try:
            wire.write(request)
            wire.set_deadline(timeout_s, _too_slow, sends=True)
            return UpstreamResponse(self, origin, wire, await _read_response_head(wire))
        except BaseException as error:
            wire.abort()
            if isinstance(error, _WIRE_ERRORS):
                raise _error_from_wire(origin, error) from error
            raise


def _abort_made(opening: asyncio.Task[Wire]) -> None:
    """End a connection that was made though its call was cancelled."""
    if not (opening.cancelled() or opening.exception()):
        opening.result().abort()


async def _tunnel(wire: Wire, proxy: Proxy, origin: Origin) -> None:
    """A way to the origin through a proxy, by CONNECT (RFC 9110, section 9.3.6)."""
    where = _authority(origin)
    fields = [("Host", where), *proxy.headers]
    wire.write(encode_head(f"CONNECT {where} HTTP/1.1", fields))
    head = await read_head(wire)
    if not re.match(rb"HTTP/1\.[01] 2\d\d[ \r]", head):
        answer = head.partition(b"\r\n")[0].decode("latin-1") or "nothing"
        raise ConfigurationFault(
            f"The proxy {proxy.host}:{proxy.port} refuses {where}: {answer}. Check "
            "HTTPS_PROXY and NO_PROXY."
        )


def _too_slow() -> ProxyError:
    return UpstreamTimeout("Dify does not answer in time.")


class NoAnswer(UpstreamFailed):
    """The connection was closed at once, before a byte of an answer."""


async def _read_response_head(wire: Wire) -> ResponseHead:
    """The head of the final response; interim ones (1xx) are passed over."""
    now = asyncio.get_running_loop().time
    until = now() + RACE_S
    has_answer = False
    with contextlib.suppress(ConnectionBroken):
        has_answer = await wire.wait_for_data()
    if not has_answer:
        raise (NoAnswer if now() < until else UpstreamFailed)(
            "Dify closed the connection without an answer. If it always does, check "
            f"the scheme in {BASE_SETTING}."
        )
    for _ in range(MAX_INTERIM_RESPONSES + 1):
        head = await read_head(wire)
        if not _INTERIM.match(head):
            return _parse_response_head(head)
    raise MalformedHTTP("no response came")


class ResponseHead(NamedTuple):
    """What Dify answers before the body."""

    status: int
    headers: Mapping[str, str]
    http_version: str


@functools.lru_cache(maxsize=64)
def _parse_response_head(head: bytes) -> ResponseHead:
    """A response's head, read by h11; those of one second are the same, as a rule."""
    event = h11_event(h11.CLIENT, head)
    headers, version = read_fields(event.headers), event.http_version.decode()
    return ResponseHead(event.status_code, headers, version)


_INTERIM = re.compile(rb"HTTP/1\.[01] 1(?!01)\d\d[ \r]")
_ANSWER = re.compile(rb"(?:\A|\r\n)HTTP/1\.[01] (?!1(?!01)\d\d[ \r])")  # behind those


BROKEN_OFF = "Dify's answer broke off before its end."


class TurnStream:
    """One turn's answer, as it comes: `read` until []; `close` then, or before.

    `reader` knows the ids of the turn, and whether it is finished.

    Args:
        dify: the client that opened it.
        reader: what its events go to.
        user: who asks.
        response: the stream.
    """

    def __init__(
        self, dify: Dify, reader: AnswerReader, user: str, response: UpstreamResponse
    ) -> None:
        self.reader = reader
        self._dify, self._user, self._response = dify, user, response
        self._idle_timeout_s = dify.settings.dify_idle_timeout
        self._decoder = SSEDecoder()
        self._logged_as = request_id.get() if log.isEnabledFor(logging.DEBUG) else ""
        self.parts: list[Part] = []  # that `read` is to return
        self._carry: Callable[[list[Part]], bool] | None = None
        self._is_draining = False  # `end` reads what nobody gets any more

    async def read(self, *, until_stoppable: bool = False) -> list[Part]:
        """The next parts; [] after the last. A failure is a part, not an exception.

        With `until_stoppable` also [] when the run's task is known, which a stop names.
        """
        while not (self.parts or self.reader.is_finished):
            if until_stoppable and self.reader.task_id:
                break
            data = b""
            try:
                data = await self._response.read()
            except UpstreamTimeout as error:
                self.parts += self.reader.give_up(error)
            except ProxyError:
                pass  # it broke off: `_recover` follows
            if data:
                self.parts += self._translate(data)
            elif not self.parts:
                return await self._recover()
        parts, self.parts = self.parts, []
        return parts

    def carry_by(self, carry: Callable[[list[Part]], bool]) -> None:
        """Hand text to `carry` as it comes while `read` waits, unless it refuses.

        So no task is woken, which would run through a dozen coroutines: an event that
        comes alone costs a fifth less.
        """
        self._carry = carry
        self._response.hand_to(self._take)

    def _take(self, data: bytes) -> bool:
        """Carry what came to the client; whether `read` has to return instead."""
        parts = self._translate(data)
        is_text = _FLOWING.issuperset(map(type, parts))
        if not (is_text and self._carry and self._carry(parts)):
            self.parts = parts
        return bool(self.parts)

    async def _recover(self) -> list[Part]:
        """The stream broke: the rest of the answer, if Dify has stored it."""
        reader = self.reader
        if reader.can_recover and not reader.is_closing:
            row = await self._dify.stored_row(reader, self._user)
            if parts := reader.recover(row):
                return parts
        return reader.give_up(UpstreamFailed(BROKEN_OFF, is_final=True))

    def _translate(self, data: bytes) -> list[Part]:
        try:
            events = self._decoder.feed(data)
        except SSEOverflow as error:
            told = UpstreamFailed(f"Dify sent {error}.", is_final=True)
            return self.reader.give_up(told)
        for event in events if self._logged_as else ():
            name = event_name(event) or "event"
            log.debug("< %s %d characters id=%s", name, len(event), self._logged_as)
        parts = self.reader.read(events)
        is_closing = self.reader.is_closing  # then a part of the last event counts, too
        is_alive = is_closing and self._decoder.has_part
        if not self._is_draining and (is_alive or not SILENT.issuperset(events)):
            limit_s = GRACE_S if is_closing else self._idle_timeout_s
            self._response.set_deadline(limit_s, _too_silent)
        return parts

    def close(self) -> None:
        """Let the connection go; stop a run that was given up, in the background."""
        if self.reader.is_given_up and not self._is_draining:
            self._dify.run_in_background(self.end())
        else:
            self._response.close(is_over=self.reader.is_finished)

    async def stop(self) -> None:
        """Have Dify end the run, if it may still go on."""
        reader = self.reader
        may_go_on = reader.is_given_up or not reader.is_finished
        if may_go_on and reader.task_id:
            reader.finish_reason = "length"  # not all is said
            path = stop_path(reader.mode, reader.task_id)
            try:
                await self._dify.api.call(reader.app, path, {"user": self._user})
            except ProxyError as error:
                log.warning("stop of task %s failed: %s", reader.task_id, error.message)

    async def end(self) -> bool:
        """Stop the run, read on so that Dify stores what it has, and close.

        Returns:
            Whether Dify has ended the answer with not a word more than was read before,
            and its app knows it: an agent, only the rounds that were not stopped.
        """
        has_more, self._carry = False, None
        self._is_draining = True
        try:
            self.parts = await self.read(until_stoppable=True)  # a stop names its task
            await self.stop()
            self._response.set_deadline(STOP_DRAIN_S, _too_silent)
            while parts := await self.read():
                has_more = has_more or any(isinstance(part, Text) for part in parts)
        finally:
            self.close()
        is_lost = self.reader.has_rounds and self.reader.finish_reason == "length"
        return self.reader.is_as_sent and not (has_more or is_lost)


_FLOWING = frozenset((Text, Reasoning))


def _too_silent() -> ProxyError:
    return UpstreamTimeout(
        "Dify sent nothing but heartbeats for too long (DIFY_IDLE_TIMEOUT).",
        is_final=True,
    )


class NoFirstEvent(UpstreamTimeout):
    """Dify accepted a turn, and then nothing happened."""


def _too_late() -> ProxyError:
    return NoFirstEvent(
        "Dify accepted the request, but its run did not begin in time "
        "(DIFY_FIRST_EVENT_TIMEOUT)."
    )


class Api:
    """Requests to Dify's API, each with an app's key, and what answers them."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.answered_at = -inf  # when an app accepted a turn or a call last

    async def call(self, app: AppSettings, path: str, value: Any = None) -> Json:
        """A call whose answer is a JSON object; raises the ProxyError of an error.

        It is a GET, or a POST of `value`, which may be answered by nothing: {}.
        """
        body = b"" if value is None else json_bytes(value)
        response = await self.request(app, path, body)
        return await self.read_object(response, app, or_nothing=bool(body))

    async def request(
        self,
        app: AppSettings,
        path: str,
        body: Body = b"",
        timeout_s: float = CALL_TIMEOUT_S,
        kind: str = "application/json",
    ) -> UpstreamResponse:
        """GET a path, or POST a body of this media type; one redirect is followed.

        The head of the answer must be here after `timeout_s`, or later where a slow
        line is still taking the body.
        """
        target = urllib.parse.urlsplit(app.base).path + path
        response = await self._send(app, target, body, timeout_s, kind)
        # A body that came piece by piece is gone.
        can_follow = response.status in (307, 308) and isinstance(body, bytes)
        if can_follow and (moved := await _redirected(response, app, path)):
            response = await self._send(app, moved, body, timeout_s, kind)
        return response

    async def _send(
        self, app: AppSettings, target: str, body: Body, timeout_s: float, kind: str
    ) -> UpstreamResponse:
        origin = origin_of(app.base)
        method = "POST" if body else "GET"
        # Gateways that choose by the Host know none with the scheme's own port.
        host = _authority(origin, 443 if origin.scheme == "https" else 80)
        fields = _fields_for(app, host, body, kind)
        if is_logged := log.isEnabledFor(logging.DEBUG):
            url = f"{origin.scheme}://{host}{target.partition('?')[0]}"
            size = f"{len(body)} bytes" if isinstance(body, bytes) else "in chunks"
            log.debug("> %s %s %s id=%s", method, url, size, request_id.get())
        proxy = proxy_for(origin, self.pool.settings)
        if proxy and origin.scheme == "http":  # RFC 9112, section 3.2.2
            target = f"http://{host}{target}"
            fields += proxy.headers
        head = encode_head(f"{method} {target} HTTP/1.1", fields)
        if isinstance(body, bytes):
            response = await self.pool.request(origin, head + body, timeout_s)
        else:
            response = await self.pool.send(origin, head, body, timeout_s)
        if is_logged:
            told = response.status, response.content_type, request_id.get()
            log.debug("< %d %s id=%s", *told)
        if COMPRESSED.search(response.headers.get("content-encoding", "")):
            response.close()
            raise UpstreamFailed(  # perhaps after a run
                "What stands before Dify compresses its answers, though it is asked "
                "not to; switch that off there.",
                is_final=True,
            )
        return response

    async def read_object(
        self, response: UpstreamResponse, app: AppSettings, *, or_nothing: bool = False
    ) -> Json:
        """The JSON object that answers a call; raises the ProxyError of an error."""
        if response.status >= 300:
            raise await _refusal_in(response, app)
        content = await response.read_all(MAX_JSON_BYTES)
        if or_nothing and not content:
            return {}
        if (value := read_json_object(content)) is not None:
            self.answered_at = asyncio.get_running_loop().time()
            return value
        if content.lstrip()[:1] in (b"", b"{"):
            raise UpstreamFailed("Dify's answer is empty, or it broke off.")
        raise error_from_body(response.status, content)


def _fields_for(
    app: AppSettings, host: str, body: Body, kind: str
) -> list[tuple[str, str]]:
    fields = [
        ("Host", host),
        ("Authorization", f"Bearer {app.key}"),
        ("User-Agent", f"OpenDify/{__version__}"),
        ("Accept-Encoding", "identity"),
    ]
    if body:
        fields.append(("Content-Type", kind))
    if not isinstance(body, bytes):
        fields.append(("Transfer-Encoding", "chunked"))
    elif body:
        fields.append(("Content-Length", str(len(body))))
    return fields


async def _redirected(response: UpstreamResponse, app: AppSettings, path: str) -> str:
    """Where a redirect leads within the same origin, as a path; "" if nowhere."""
    location = response.headers.get("location", "")
    try:
        target = urllib.parse.urljoin(app.base + path, location)
        if not location or origin_of(target) != origin_of(app.base):
            return ""
    except ValueError:  # malformed
        return ""
    await response.read_all(MAX_ERROR_BYTES)
    parts = urllib.parse.urlsplit(target)
    moved = f"{parts.path}?{parts.query}".rstrip("?")
    return urllib.parse.quote(moved, "%/?:&=+,;@~", errors="replace")


async def _refusal_in(response: UpstreamResponse, app: AppSettings) -> ProxyError:
    """What Dify, or what stands before it, says where no answer came."""
    content, status, headers = b"", response.status, response.headers
    with contextlib.suppress(ProxyError):  # a reset, where not all was read
        content = await response.read_all(MAX_ERROR_BYTES)
    error = error_from_body(status, content)
    if status == 407:
        error = ConfigurationFault(
            "The proxy on the way to Dify wants other credentials (407). Check "
            "HTTP_PROXY and NO_PROXY."
        )
    elif status < 300:
        error = ConfigurationFault(
            f"What the base URL leads to answers {status}, but without an event "
            f"stream. Check {BASE_SETTING}: it must be like https://host/v1."
        )
    elif status < 400:
        error = ConfigurationFault(
            f"Dify redirects ({status}) to {headers.get('location', 'nowhere')!r}; "
            f"say in {BASE_SETTING} where the API really is."
        )
    wait_s = headers.get("retry-after", "")
    if isinstance(error, RateLimited) and wait_s.isdecimal():
        error.headers.append(("Retry-After", wait_s))  # a gateway's
    return presentable(error, app)


@dataclass
class AppFacts:
    """What Dify told about one app; "" where nobody has asked yet."""

    mode: str = ""
    name: str = ""
    version: str = ""  # of Dify
    form: AppForm = NO_FORM
    asked_at: float = -inf  # for the form, by the loop's clock


class Facts:
    """Finds out what Dify's apps are, and remembers it."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._facts: dict[tuple[str, ...], AppFacts] = defaultdict(AppFacts)

    async def mode_of(self, app: AppSettings) -> str:
        """The app's mode: as `ask_mode` found it, else as configured; else asked."""
        return self.of(app).mode or app.mode or await self.ask_mode(app)

    async def confirmed_mode(self, app: AppSettings) -> str:
        """The app's mode, asked anew; a ProxyError if the configured one is wrong.

        Releases before 1.4 do not tell it: there the mode is what `mode_of` says.
        """
        mode = await self.ask_info(app)
        if mode and app.mode and mode != app.mode:
            raise ConfigurationFault(
                f"mode in MODEL_CONFIG is {app.mode}, but the app is {mode}."
            )
        return mode or await self.mode_of(app)

    async def ask_mode(self, app: AppSettings) -> str:
        """The app's mode, asked anew: as `/info` tells, or as a probe shows."""
        facts = self.of(app)
        facts.mode = await self.ask_info(app) or await self._probe(app)
        return facts.mode

    async def form_of(self, app: AppSettings, *, anew: bool = False) -> AppForm:
        """The app's inputs and limits; kept for some minutes."""
        facts = self.of(app)
        now = asyncio.get_running_loop().time()
        if anew or now - facts.asked_at > FORM_FRESH_S:
            facts.form = parse_form(await self._api.call(app, "/parameters"))
            facts.asked_at = now
        return facts.form

    def of(self, app: AppSettings) -> AppFacts:
        """What is known by now."""
        return self._facts[app.base, app.key, app.mode]

    async def ask_info(self, app: AppSettings) -> str:
        """Ask for the app's name, Dify's version, and its mode, "" if not told."""
        facts = self.of(app)
        response = await self._api.request(app, "/info")
        facts.version = response.headers.get("x-version", "")
        info = await self._api.read_object(response, app)
        facts.name = str(info.get("name") or "")
        mode = info.get("mode")
        return mode if mode in APP_MODES else ""

    async def _probe(self, app: AppSettings) -> str:
        """The mode by calls that run no model, where `/info` does not tell it."""
        conversations = "/conversations?user=opendify&limit=1"
        if await self._refusal(app, conversations) != "not_chat_app":
            return "chat"  # or an agent or a chatflow: one endpoint serves all three
        stop = "/completion-messages/00000000-0000-0000-0000-000000000000/stop"
        code = await self._refusal(app, stop, {"user": "opendify"})
        return "workflow" if code == "app_unavailable" else "completion"

    async def _refusal(self, app: AppSettings, path: str, value: Any = None) -> str:
        """The code by which Dify refuses a call, "" if it does not."""
        try:
            await self._api.call(app, path, value)
        except UpstreamRejected as refusal:
            return refusal.code or ""
        return ""


class Dify:
    """The client of Dify's API, for all apps and bases at once.

    `settings` are those that hold now; `api` sends any call; `facts` knows what the
    apps are; `background` are the tasks that nobody waits for: most of them end runs.
    """

    def __init__(self, settings: Settings, connect: Connect) -> None:
        self.settings = settings
        self.background: set[asyncio.Task[Any]] = set()
        self.api = Api(Pool(connect, settings))
        self.facts = Facts(self.api)

    def use(self, settings: Settings) -> None:
        """Go on with other settings."""
        self.settings = settings
        self.api.pool.close()
        self.api.pool = Pool(self.api.pool.connect, settings)

    def close(self) -> None:
        """End what runs in the background, and close the connections that are kept."""
        for task in self.background:
            task.cancel()
        self.api.pool.close()

    def run_in_background(self, job: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run something that nobody waits for; `close` cancels it."""
        task = asyncio.ensure_future(job)
        self.background.add(task)
        task.add_done_callback(self.background.discard)
        return task

    # Turns...

    async def open_turn(
        self, app: AppSettings, mode: str, request: DifyRequest
    ) -> TurnStream:
        """Send a turn; its answer's stream has begun when this returns.

        Raises:
            ProxyError: Dify refused it, or can't be reached.
        """
        timeout_s = self.settings.dify_first_event_timeout
        body, loop = json_bytes(request.body), asyncio.get_running_loop()
        until = loop.time() + timeout_s
        response = await self.api.request(app, request.path, body, timeout_s)
        is_stream = response.content_type.lower().startswith("text/event-stream")
        if response.status != 200 or not is_stream:
            error = await _refusal_in(response, app)
            is_bare = error.message == error.code == "not_found"  # nothing else is said
            if is_bare and request.body.get("conversation_id"):
                error = ConversationGone("Dify does not know this conversation.")
            raise error
        self.api.answered_at = now = loop.time()
        left_s = until - now  # none, where a slow line took longer to send it
        response.set_deadline(left_s if left_s > 0 else timeout_s, _too_late)
        reader = AnswerReader(mode, app, show_process=self.settings.show_process)
        return TurnStream(self, reader, str(request.body["user"]), response)

    # Files...

    async def upload(self, app: AppSettings, file: Attachment, user: str) -> str:
        """Upload a file; returns its id in Dify. Errors name the file."""
        boundary = os.urandom(16).hex()
        body = upload_head(file, boundary) + file.data + upload_end(user, boundary)
        try:
            response = await self._send_form(app, "/files/upload", body, boundary)
            if id_ := (await self.api.read_object(response, app)).get("id"):
                return str(id_)
            raise UpstreamFailed("Dify gave it no id.")
        except ProxyError as error:
            error.message = f"The upload of {file.name!r} failed: {error.message}"
            raise

    async def send_file(
        self,
        app: AppSettings,
        path: str,
        file: Attachment,
        read: Read,
        user: Callable[[], str],
    ) -> Json:
        """Send a file as it comes; returns Dify's answer. Its errors name the file.

        Args:
            app: whose key is used.
            path: where to.
            file: its name and media type.
            read: gives its next bytes, b"" at its end.
            user: gives the end user; asked when the file is through.
        """
        boundary = os.urandom(16).hex()

        async def form() -> AsyncIterator[bytes]:
            yield upload_head(file, boundary)
            while data := await read():
                yield data
            yield upload_end(user(), boundary)
            yield b""

        response = await self._send_form(app, path, form().__anext__, boundary)
        if response.status < 300:
            return await self.api.read_object(response, app)
        error = await _refusal_in(response, app)
        error.message = f"The file {file.name!r} was refused: {error.message}"
        raise error

    async def _send_form(
        self, app: AppSettings, path: str, body: Body, boundary: str
    ) -> UpstreamResponse:
        kind = f"multipart/form-data; boundary={boundary}"
        return await self.api.request(app, path, body, UPLOAD_TIMEOUT_S, kind)

    async def fetch_file(
        self, app: AppSettings, path: str, body: bytes, missing: ProxyError | None
    ) -> UpstreamResponse:
        """The file that answers a call, not read yet: of a GET, or a POST of a body.

        Raises `missing`, if it is given, where Dify does not have the file.
        """
        timeout_s = self.settings.dify_first_event_timeout
        response = await self.api.request(app, path, body, timeout_s)
        if response.status == 200:
            return response
        error = await _refusal_in(response, app)
        raise missing if missing and response.status in (403, 404) else error

    async def read_file(self, response: UpstreamResponse) -> bytes:
        """The next bytes of a file; b"" at its end."""
        response.set_deadline(self.settings.dify_idle_timeout, _too_silent)
        return await response.read()

    # What Dify has stored...

    async def stored_row(self, reader: AnswerReader, user: str) -> Json:
        """The row of an answer in Dify's store, {} if it has none, or failed."""
        with contextlib.suppress(ProxyError):
            id_ = reader.conversation_id
            page = await self._messages(reader.app, id_, user, limit=5)
            for row in objects_of(page.get("data")):
                if row.get("id") == reader.message_id and row.get("status") != "error":
                    return row
        return {}

    async def messages(
        self, app: AppSettings, place: Place, *, most: int = 100, first_id: str = ""
    ) -> tuple[list[StoredTurn], bool]:
        """(the newest turns of a conversation, oldest first; whether there are older).

        Args:
            app: that has the conversation.
            place: in it, or in a workflow's run; one that is lost has no turns.
            most: how many, 100 at most.
            first_id: only those before this message, "" for the newest.
        """
        if await self.facts.mode_of(app) == "workflow":
            return await self._run(app, place.conversation_id), False
        more = {"limit": most, **({"first_id": first_id} if first_id else {})}
        try:
            page = await self._messages(app, place.conversation_id, place.user, **more)
        except ConversationGone:
            return [], False
        turns = [stored_turn(row, app) for row in objects_of(page.get("data"))]
        return turns, page.get("has_more") is True

    async def _run(self, app: AppSettings, id_: str) -> list[StoredTurn]:
        """A workflow's run; [] if Dify does not have it (404, or nulls)."""
        run: Json = {}
        with contextlib.suppress(UpstreamRejected):
            path = f"/workflows/run/{urllib.parse.quote(id_, safe='')}"
            run = await self.api.call(app, path)
        if run.get("id") != id_:
            return []
        form = NO_FORM if app.query_variable else await self.facts.form_of(app)
        query = query_variable("workflow", form, app)
        return [stored_run(run, app, query)]

    async def _messages(
        self, app: AppSettings, conversation_id: str, user: str, **more: object
    ) -> Json:
        about = {"conversation_id": conversation_id, "user": user, **more}
        query = urllib.parse.urlencode(about, errors="replace")
        return await self.api.call(app, f"/messages?{query}")


# ==============================================================================
# 15. Answers
# ==============================================================================
#
# One turn, from a question to the last word of its answer: finds the conversation that
# it continues, asks Dify, carries what comes through the pacer to the client, and
# records where the conversation stands. Never touches sockets or h11.
#
#     plan -> open -> (read -> put -> drain)* -> settle
#     the client leaves -> stop, read on, then settle or forget
#
# An Exchange is one request and its reply. Turns puts its Question to Dify; the parts
# that the TurnStream reads go through a Reading, which looks for calls, stops and JSON,
# into an Outlet, which paces and writes a streamed answer, or into a Collector, which
# keeps a whole one.

MAX_TRIES = 3  # of one turn: the mode that Dify told may be wrong, too
HEAD_AFTER_S = 5.0  # the status line waits for the answer, this long at most
MAX_HELD_CHARS = 128 * 1024  # by the pacer: nobody reads so fast that it would show
MAX_READ_CHARS = 8 * 1024  # in one go, for calls and the like: 30 ms at worst
KEEP_ALIVE_S = 15.0  # nginx closes after 60 s of silence, Node's fetch after 300 s
UNBUFFERED = ("X-Accel-Buffering", "no")  # by nginx
# A cache in front knows one key's answers by `Authorization` only, and a proxy that
# compresses them, as Express's `compression` does, would hold a stream to its end.
CACHE_CONTROL = ("Cache-Control", "no-cache, no-transform")
SSE_HEADERS = [("Content-Type", "text/event-stream; charset=utf-8"), UNBUFFERED]
_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_NO_COUNTS = [0] * (len(_BUCKETS_S) + 1)  # in each bucket, and above the last
_QUESTION_PARAMS = {"responses": "input", "completions": "prompt"}  # else `messages`
# What Dify says before anything runs.
_REFUSALS = (BadRequest, ConfigurationFault, RateLimited, QuotaExceeded)


class Metrics:
    """Counters and histograms, as Prometheus reads them (text format 0.0.4)."""

    def __init__(self) -> None:
        # Counters by name and labels; histograms by name: their buckets and sums.
        self._counts: dict[tuple[Any, ...], int] = defaultdict(int)
        self._buckets: dict[str, list[int]] = defaultdict(_NO_COUNTS.copy)
        self._sums: dict[str, float] = defaultdict(float)

    def count(self, name: str, amount: int = 1, **labels: object) -> None:
        """Add to a counter."""
        self._counts[(name, *labels.items())] += amount

    def observe(self, name: str, seconds: float) -> None:
        """Add to a histogram."""
        self._buckets[name][bisect.bisect_left(_BUCKETS_S, seconds)] += 1
        self._sums[name] += seconds

    def render(self, gauges: Mapping[str, float]) -> str:
        """All of them, and `gauges`, as text."""
        lines: list[str] = []
        for (name, *labels), amount in sorted(self._counts.items(), key=repr):
            text = ",".join(f'{label}="{_label(of)}"' for label, of in labels)
            lines += [f"# TYPE {name} counter", f"{name}{{{text}}} {amount}"]
        bounds = [*map("{:g}".format, _BUCKETS_S), "+Inf"]
        for name, counts in sorted(self._buckets.items()):
            lines.append(f"# TYPE {name} histogram")
            for bound, below in zip(bounds, itertools.accumulate(counts)):
                lines.append(f'{name}_bucket{{le="{bound}"}} {below}')
            lines.append(f"{name}_sum {self._sums[name]:.6f}")
            lines.append(f"{name}_count {sum(counts)}")
        for name, value in gauges.items():
            lines += [f"# TYPE {name} gauge", f"{name} {value:g}"]
        return "\n".join(dict.fromkeys(lines)) + "\n"  # each type once


def _label(value: object) -> str:
    return str(value).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class Exchange:
    """One request and its reply, and what the log will say of them.

    What runs `with` an exchange ends when the client leaves, or has its response.
    `fail` writes an error as the end of a reply that has begun.
    """

    decoder: BodyDecoder | None = None  # of the request's body
    read: Read  # more of it
    fail: Callable[[ProxyError], bytes] | None = None
    has_left: bool = False
    name_in_path: str = ""
    alone_in: str = ""  # the id of a named conversation that no other may find so
    turn: Turn | None = None  # that Dify answers, or has answered last
    key: str = ""  # that the client presents
    owner: str = ""  # of ids: this key, "" where keys do not tell clients apart
    route: str = "-"  # the endpoint, for the metrics
    model: str = ""  # for the log and the metrics: only one that is known here
    first_text_at: float | None = None  # by the loop's clock
    text_chars: int = 0
    beat: asyncio.TimerHandle | None = None  # of a streamed answer

    def __init__(self, reply: Reply, id_: str, peer: str = "") -> None:
        self.reply, self.id, self.peer = reply, f"req_{id_}", peer
        self._tasks: set[asyncio.Task[Any] | None] = set()  # that run with it
        self.outlets: list[Outlet] = []  # that its answers, if streamed, go through
        self.started_at = self.written_at = asyncio.get_running_loop().time()
        reply.headers += [CACHE_CONTROL, ("x-request-id", self.id)]
        request_id.set(self.id)

    @property
    def request(self) -> Request:
        """The request, once its head is read."""
        return self.reply.request

    @property
    def forwarded_user(self) -> str:
        """The end user that Open WebUI names in a header, "" if none."""
        name = self.request.headers.get("x-openwebui-user-id", "")
        return user_name(urllib.parse.unquote(name)) if name else ""

    def user_of(self, name: str) -> str:
        """The end user's name in Dify, by the body, a header, or the key."""
        return name or self.forwarded_user or user_of_key(self.key)

    def explain(self, error: ProxyError) -> None:
        """Let an error name the model, and the field as the endpoint calls it."""
        if error.param == "messages":
            error.param = _QUESTION_PARAMS.get(self.route, error.param)
        if isinstance(error, ConfigurationFault) and self.model:
            error.message = f"The model {self.model!r}: {error.message}"

    def __enter__(self) -> None:
        """Begin; raises ConnectionBroken if the client has left or got all."""
        if self.has_left or self.reply.is_complete:  # another choice has failed
            raise ConnectionBroken("nobody waits")
        self._tasks.add(asyncio.current_task())

    def __exit__(self, *_: object) -> None:
        """End, with or without an error."""
        self._tasks.discard(asyncio.current_task())

    def leave(self) -> None:
        """The client has gone: what runs with it ends."""
        self.has_left = True
        self.cut()

    def cut(self) -> None:
        """Cancel the tasks that run with it."""
        for task in filter(None, self._tasks):
            task.cancel()

    # A streamed answer...

    def start_events(self, ids: DifyIds) -> None:
        """Begin the reply, if nothing has."""
        if not self.reply.status:
            self.fail = self._fail
            self.reply.start(200, [*SSE_HEADERS, *id_headers(ids)])

    def _fail(self, error: ProxyError) -> bytes:
        held = [outlet.flush() for outlet in self.outlets]
        return b"".join(held) + self.outlets[0].stream.fail(error)

    def keep_alive(self) -> None:
        """Dify has no text: begin without it, then keep the connection alive."""
        loop, outlet, turn = asyncio.get_running_loop(), self.outlets[0], self.turn
        now, is_only = loop.time(), len(self.outlets) == 1
        # A second try would have others.
        ids = turn.ids if turn and is_only and not turn.plan.ask.is_strict else {}
        if self.reply.must_drain():  # what is on its way keeps it alive
            self.written_at = now
        elif not outlet.has_begun and (ids or not outlet.stream.needs_ids):
            outlet.begin(ids)
            self.reply.write(b"")
        elif now >= self.written_at + KEEP_ALIVE_S or not outlet.has_begun:
            self.start_events({})
            self.reply.write(outlet.stream.heartbeat())
            self.written_at = now
        self.beat = loop.call_at(self.written_at + KEEP_ALIVE_S, self.keep_alive)


class Outlet:
    """A streamed answer on its way to the client: parts in, events out.

    Those of an exchange are made in order, one for each choice. With a pacer the text
    comes out evenly. `put` never waits: text that is not due yet is written by a timer,
    so reading from Dify never waits for the pacer.
    """

    def __init__(
        self,
        exchange: Exchange,
        stream: AnswerStream,
        pacer: Pacer | None,
        metrics: Metrics,
    ) -> None:
        self._before = exchange.outlets[-1] if exchange.outlets else None
        exchange.outlets.append(self)
        self._exchange, self._reply = exchange, exchange.reply
        self.stream, self._pacer, self._metrics = stream, pacer, metrics
        self._paced: type[Text] | type[Reasoning] = Text  # what the pacer holds
        self._tells_lag = self._reply.request.headers.get("x-opendify-lag") == "on"
        self._sent = KeptText()
        self.calls = stream.summary.calls
        self.has_begun = self.is_withdrawn = False
        self._finish = Finish()
        self._loop = asyncio.get_running_loop()
        later = self._loop.call_later
        exchange.beat = exchange.beat or later(HEAD_AFTER_S, exchange.keep_alive)
        self._due: asyncio.TimerHandle | None = None
        self._drained: asyncio.Future[None] | None = None

    @property
    def text(self) -> str:
        """The answer's text as the client has it so far."""
        return self._sent.text

    @property
    def is_behind(self) -> bool:
        """Whether `text` lacks some of the answer: held back, or too long to keep."""
        is_held = self._pacer is not None and self._pacer.held > 0
        return is_held or not self._sent.is_whole

    def begin(self, ids: DifyIds) -> None:
        """Begin with the head and the first chunk; they leave with the first text.

        openai-python wants the first chunks of all choices in order.
        """
        self._exchange.start_events(ids)
        if self._before and not self._before.has_begun:
            self._before.begin({})
        self.has_begun, self._exchange.written_at = True, self._loop.time()
        self._reply.write(self.stream.begin(ids), waits=True)

    def put(self, parts: Sequence[Part]) -> None:
        """Take parts in and write what is due; raises the error of a Failure."""
        now, pacer = self._loop.time(), self._pacer
        data = self._take_in(parts, now)
        if pacer:
            is_flood = pacer.held > MAX_HELD_CHARS
            data += self.flush() if is_flood else self._take(pacer, now)
        self._write(data, now)
        if pacer:
            self._arm(pacer)

    async def finish(self) -> None:
        """Let go what is held back, evenly."""
        if self._pacer and self._pacer.held:
            self._pacer.close(self._loop.time())
            self._arm(self._pacer)
            self._drained = self._loop.create_future()
            await self._drained

    def end(self) -> bytes:
        """What is left to be sent: the last chunk."""
        return self.stream.encode(self._finish)

    def close(self) -> None:
        """Stop the timers; nothing is written any more."""
        for timer in (self._due, self._exchange.beat):
            if timer:
                timer.cancel()

    def _take_in(self, parts: Sequence[Part], now: float) -> bytes:
        """What the parts add to the stream at once."""
        if len(parts) > 1 and set(map(type, parts)) == {Text}:
            return self._put_texts(cast("Sequence[Text]", parts), now)
        out: list[bytes] = []
        for part in parts:
            if isinstance(part, (Text, Reasoning)):
                out.append(self._put_text(part, now))
            elif isinstance(part, Failure):
                self._write(b"".join([*out, self.flush()]), now)
                raise part.error
            else:
                out.append(self._put_other(part, now))
        return b"".join(out)

    def _put_other(self, part: Part, now: float) -> bytes:
        """What a part that is no text adds."""
        has_text = self._sent.size > 0 or (self._paced is Text and self.is_behind)
        if isinstance(part, Media):
            return self._put_text(Text(media_text(part, is_first=not has_text)), now)
        if isinstance(part, Replace):
            return self._put_text(Text(self._rest_of(part.text)), now)
        if isinstance(part, Recast):  # thoughts that are out as text: show their end
            end = Text("</think>\n\n")
            return self._put_text(end, now) if has_text else b""
        if isinstance(part, Finish):
            self._finish = part
            return b""
        if isinstance(part, ToolCall):
            return self.flush() + self.stream.encode(part)
        return self.stream.encode(part)

    def _rest_of(self, text: str) -> str:
        """What is to be sent when `text` replaces the answer; what is held never is."""
        if self._pacer and self._paced is Text:
            self._pacer.flush()
        sent = self.text
        if self._sent.is_whole and text.startswith(sent):
            return text[len(sent) :]
        self.is_withdrawn = True
        log.warning("the app replaced what was sent already [%s]", self._exchange.id)
        return ""

    def _put_text(self, part: Text | Reasoning, now: float) -> bytes:
        if not self._pacer:
            return self._encode(part)
        kind = type(part)
        flushed = self.flush() if kind is not self._paced else b""
        self._paced = kind
        self._pacer.push(part.text, now)
        return flushed

    def _put_texts(self, parts: Sequence[Text], now: float) -> bytes:
        """Text of one read, taken as one: saves a tenth of a stream without pauses."""
        text = "".join([part.text for part in parts])
        if self._pacer:
            return self._put_text(Text(text), now)
        self._note(text)
        return b"".join([self.stream.encode(part) for part in parts if part.text])

    def flush(self) -> bytes:
        """What was held back until now."""
        return self._encode(self._paced(self._pacer.flush())) if self._pacer else b""

    def _encode(self, part: Text | Reasoning) -> bytes:
        if not part.text:
            return b""
        self._note(part.text if isinstance(part, Text) else "")
        return self.stream.encode(part)

    def _note(self, text: str) -> None:
        """Note what the client gets, "" for reasoning."""
        if text:
            self._sent.add(text)
            self._exchange.text_chars += len(text)
        if self._exchange.first_text_at is None:
            self._exchange.first_text_at = self._loop.time()

    def _write(self, data: bytes, now: float) -> None:
        if data:
            self._exchange.written_at = now
        self._reply.write(data)

    # Timers...

    def _take(self, pacer: Pacer, now: float) -> bytes:
        """What is due now."""
        came_at = pacer.oldest
        if not (text := pacer.take(now)):
            return b""
        self._metrics.observe("opendify_pacer_lag_seconds", now - came_at)
        told = encode_comment(f"lag {now - came_at:.3f}") if self._tells_lag else b""
        return told + self._encode(self._paced(text))

    def _arm(self, pacer: Pacer) -> None:
        """Be woken when text is due; a timer that comes earlier will do."""
        due = pacer.next_due()
        if due is None or (self._due and self._due.when() <= due):
            return
        if self._due:
            self._due.cancel()
        self._due = self._loop.call_at(due, self._on_due, pacer)

    def _on_due(self, pacer: Pacer) -> None:
        self._due, now = None, self._loop.time()
        self._write(self._take(pacer, now), now)
        self._arm(pacer)
        if self._drained and not (self._due or self._drained.done()):
            self._drained.set_result(None)


class Collector(Answer):
    """A whole answer, with the methods of an Outlet."""

    is_behind = is_withdrawn = False  # it holds nothing back, and gives nothing early
    has_begun = False  # so that it gets the latest ids

    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self.ids: DifyIds = {}
        self._exchange = exchange

    def begin(self, ids: DifyIds) -> None:
        """Keep the ids, the latest if it begins again."""
        self.ids = ids

    def put(self, parts: Sequence[Part]) -> None:
        """Take parts in; raises the error of a Failure."""
        self.add(parts)
        if self._exchange.first_text_at is None and self.text:
            self._exchange.first_text_at = asyncio.get_running_loop().time()

    async def finish(self) -> None:
        """Nothing is held back."""
        self._exchange.text_chars += len(self.text)

    def close(self) -> None:
        """Nothing to stop."""


# Where an answer goes: `begin`, `put` its parts, `finish`; `close` in any case. `text`
# and `calls` are what the client gets; there is more to the text if it `is_behind`, and
# the app says something else by now if it `is_withdrawn`.
Sink = Union[Outlet, Collector]


_ID_HEADERS = {
    "conversation_id": "X-Dify-Conversation-Id",
    "message_id": "X-Dify-Message-Id",
    "workflow_run_id": "X-Dify-Workflow-Run-Id",
}
_SAFE = re.compile(r"[\w.~-]*", re.ASCII)  # in a header; all else is percent-encoded


def id_headers(ids: DifyIds) -> list[tuple[str, str]]:
    """Dify's ids as response headers."""
    return [(_ID_HEADERS[name], _quoted(ids[name])) for name in ids]


def _quoted(id_: str) -> str:
    is_safe = _SAFE.fullmatch(id_)
    return id_ if is_safe else urllib.parse.quote(id_, safe="", errors="replace")


@dataclass
class Question:
    """What is asked of an app, and what was done for it so far."""

    exchange: Exchange  # whose client waits
    app: AppSettings
    ask: Ask
    joins: bool  # whether it may continue a conversation, and be continued
    tail: Tail | None = None  # the conversation that it continues, once taken
    sent: dict[int, Attachment] = field(default_factory=dict)  # files, by their id()
    spent: Usage = NO_USAGE  # by a first try
    may_have_run: bool = False  # and then Dify may remember it
    named: NamedConversation | None = None  # that it is a turn of
    user: str = field(init=False)  # who asks, as Dify knows them
    scope: bytes = field(init=False, repr=False)  # its conversations are found in it

    def __post_init__(self) -> None:
        """Settle who asks, whatever becomes of the question."""
        self.user = self.exchange.user_of(self.ask.user)
        self.scope = scope_of(self.app.key, self.user)

    def has_room(self, form: AppForm, files: Sequence[Attachment]) -> bool:
        """Whether the app surely takes these files; it took those of a first try."""
        is_again = self.sent.keys() >= set(map(id, files))
        return is_again or has_room(form, files, self.ask.inputs)


@dataclass
class Turn:
    """A turn that Dify has begun to answer."""

    plan: Plan
    stream: TurnStream

    @property
    def ids(self) -> dict[str, str]:
        """Dify's ids, as far as known."""
        reader = self.stream.reader
        return {name: id_ for name in _ID_HEADERS if (id_ := getattr(reader, name))}


@dataclass(frozen=True)
class Turns:
    """Asks apps, and carries their answers to the clients.

    Args:
        dify: the client of Dify.
        conversations: what is known of them.
        wall_clock: seconds since the epoch.
    """

    dify: Dify
    conversations: Conversations
    wall_clock: Callable[[], float]

    async def run(self, question: Question, sink: Sink) -> None:
        """One turn, and another one if its answer will not do.

        Raises:
            UpstreamFailed: neither will do.
        """
        ask, headers = question.ask, question.exchange.request.headers
        id_ = ask.conversation_id or headers.get("x-dify-conversation-id", "")
        if id_ or question.app.inputs:
            given = {**question.app.inputs, **ask.inputs}
            question.ask = ask = ask._replace(inputs=given, conversation_id=id_)
        reading = await self._run_once(question, sink)
        if not reading.problem:
            return
        words, said = Message("user", retry_text(ask, reading.problem)), reading.said
        text = said.text if said.is_whole else f"[{said.size} characters]"
        # What came before in a conversation that is named, Dify alone knows.
        goes_on = bool(ask.conversation_id and question.tail)
        before = () if goes_on else (*ask.messages, Message("assistant", text))
        again = ask._replace(messages=(*before, words))
        question = replace(question, ask=again, joins=goes_on, spent=reading.usage)
        question.tail, question.may_have_run = None, False
        reading = await self._run_once(question, sink)
        if reading.problem:
            raise unsatisfied(ask, reading.problem)

    @contextlib.contextmanager
    def holding(self, question: Question) -> Iterator[None]:
        """What fails inside lets go of the conversation that was taken for it."""
        try:
            yield
        except BaseException as error:
            tail, question.tail = question.tail, None
            if tail and isinstance(error, ConversationGone):
                self.conversations.remove(tail)
            elif tail and question.may_have_run:
                self.conversations.forget(tail)
            elif tail:
                self.conversations.put(tail, self.wall_clock())
            raise

    async def _run_once(self, question: Question, sink: Sink) -> Reading:
        """Ask, and carry the answer to the sink; the reading says if it will do."""
        exchange = question.exchange
        turn = await self._open_turn(question)
        reader = turn.stream.reader
        seed = reader.message_id or reader.workflow_run_id or exchange.id
        is_whole, spent = isinstance(sink, Collector), question.spent
        reading = Reading(question.ask, seed, is_whole=is_whole, spent=spent)
        can_go_on = False
        try:
            with exchange:
                await self._pass_on(exchange, turn, sink, reading)
            will_do = not (reading.problem or reading.is_short or sink.is_behind)
            can_go_on = reader.is_as_sent and will_do
        except (asyncio.CancelledError, ConnectionBroken):
            sink.close()  # nobody reads any more
            has_all = not sink.is_behind and reading.has_given_all(sink.text)
            can_go_on = await turn.stream.end() and has_all
            raise
        finally:
            turn.stream.close()
            self._settle(turn, sink, can_go_on=can_go_on and question.joins)
            if question.named:  # before its client can go on
                self._bind(question.named, question, turn)
        return reading

    async def _pass_on(
        self, exchange: Exchange, turn: Turn, sink: Sink, reading: Reading
    ) -> None:
        """Carry the answer from Dify to the client."""

        def carry(parts: list[Part]) -> bool:
            has_room = not exchange.reply.must_drain()
            if has_room:
                sink.put(parts)
            return has_room

        while parts := await _read_some(turn.stream, reading):
            ready = reading.feed(parts)
            # Until something is certain, an error can still be a status.
            if ready and not (sink.has_begun or isinstance(ready[0], Failure)):
                sink.begin(turn.ids)
            sink.put(ready)
            await exchange.reply.drain()
            if reading.is_plain:
                turn.stream.carry_by(carry)
            elif reading.is_cut:
                turn.stream.reader.is_given_up = True
                break
        await sink.finish()

    def _settle(self, turn: Turn, sink: Sink, *, can_go_on: bool) -> None:
        """Record where the conversation stands, or that nobody knows."""
        id_, now = turn.stream.reader.conversation_id, self.wall_clock()
        answer = Message("assistant", sink.text, tool_calls=tuple(sink.calls))
        tail = turn.plan.tail_after(id_, answer)
        if can_go_on and id_:
            self.conversations.put(tail, now)
        else:
            self.conversations.forget(turn.plan.tail)
            self.conversations.note_shown(tail, now)

    def _bind(self, named: NamedConversation, question: Question, turn: Turn) -> None:
        """Bind a named conversation to the one that a turn began in Dify, if it did.

        Dify has now what `named` held when the turn began; what has been added since
        awaits the next one. Of a turn that failed, some releases remember nothing.
        """
        reader, scope, table = turn.stream.reader, question.scope, self.conversations
        id_ = reader.conversation_id if reader.is_stored else ""
        exchange, now = question.exchange, self.wall_clock()
        with contextlib.suppress(ProxyError):  # the answer is there all the same
            latest = table.named(named.id, exchange.owner, now)
            if not (id_ and latest and latest.conversation_id == named.conversation_id):
                return
            bound = latest.bind(scope, named.items, question.user, id_)
            table.keep(bound, exchange.owner, now)
            # From here a second try may bind it to another one.
            question.named = replace(named, conversation_id=id_)
            # No chat with the same words may go on in it.
            if tail := table.take_by_id(scope, id_, now):
                table.put(tail._replace(digests=b""), now)

    async def _open_turn(self, question: Question) -> Turn:
        """Send the question to Dify, until it begins to answer."""
        facts, app, mode = self.dify.facts, question.app, ""
        for _ in range(MAX_TRIES):
            try:
                with self.holding(question):
                    mode = await facts.mode_of(app)
                    return await self._ask(question, mode)
            except WrongMode:
                if await facts.ask_mode(app) == mode:
                    raise
            except MissingInput as error:
                form = await facts.form_of(app, anew=True)
                message = f"{error.message}. {describe_inputs(form)}"
                raise BadRequest(message, param="inputs") from error
        raise UpstreamFailed("Dify contradicts itself about this app's mode.")

    async def _ask(self, question: Question, mode: str) -> Turn:
        """Ask an app of this mode, and anew if the conversation is lost."""
        ask = question.ask
        if mode in CHAT_MODES and question.joins and not question.tail:
            scope, now = question.scope, self.wall_clock()
            ask, question.tail = take_as_meant(self.conversations, ask, scope, now)
        try:
            return await self._try_turn(question, ask, mode)
        except (ConversationGone, NoFirstEvent) as error:
            # Chatflows from 1.13 on met a lost conversation with silence.
            is_lost = isinstance(error, ConversationGone) or mode == "advanced-chat"
            if ask.conversation_id or not (question.tail and is_lost):
                raise
            self.conversations.remove(question.tail)
        question.tail = None
        return await self._try_turn(question, question.ask, mode)

    async def _try_turn(self, question: Question, ask: Ask, mode: str) -> Turn:
        """One attempt; raises what Dify says before its first word."""
        app = question.app
        has_files = any([message.attachments for message in ask.messages])
        needs_form = has_files or (mode not in CHAT_MODES and not app.query_variable)
        form = await self.dify.facts.form_of(app) if needs_form else NO_FORM
        has_room = functools.partial(question.has_room, form)
        plan = plan_turn(ask, question.scope, question.tail, app, has_room)
        with question.exchange:
            request = await _request_for(self.dify, question, plan, mode, form)
        question.may_have_run = True
        try:
            stream = await self.dify.open_turn(app, mode, request)
        except ProxyError as error:
            is_refused = error.is_unsent or isinstance(error, _REFUSALS)
            question.may_have_run = not is_refused
            raise
        return await _begun(question.exchange, Turn(plan, stream))


async def _read_some(stream: TurnStream, reading: Reading) -> list[Part]:
    """The next parts; of much text a piece, if to read it may hold others up."""
    parts = await stream.read()
    if not reading.is_plain:
        parts, stream.parts = _cut(parts)
        if stream.parts:
            await asyncio.sleep(0)
    return parts


def _cut(parts: list[Part]) -> tuple[list[Part], list[Part]]:
    """Parts of hardly more text than MAX_READ_CHARS, and the rest."""
    size = 0
    for number, part in enumerate(parts):
        text = part.text if isinstance(part, Text) else ""
        size += len(text)
        if len(text) > MAX_READ_CHARS:
            starts = range(0, len(text), MAX_READ_CHARS)
            pieces = [Text(text[at : at + MAX_READ_CHARS]) for at in starts]
            return [*parts[:number], pieces[0]], [*pieces[1:], *parts[number + 1 :]]
        if size >= MAX_READ_CHARS:
            return parts[: number + 1], parts[number + 1 :]
    return parts, []


async def _begun(exchange: Exchange, turn: Turn) -> Turn:
    """The turn, once its run can be stopped; raises the error that it begins with."""
    exchange.turn, stream = turn, turn.stream
    try:
        parts = await stream.read(until_stoppable=True)
        if parts and isinstance(parts[0], Failure):
            raise parts[0].error
    except BaseException as error:
        stream.reader.is_given_up |= isinstance(error, asyncio.CancelledError)
        stream.close()
        raise
    stream.parts = parts
    return turn


async def _request_for(
    dify: Dify, question: Question, plan: Plan, mode: str, form: AppForm
) -> DifyRequest:
    """The request to Dify, with its files uploaded."""
    app, trace_id = question.app, question.exchange.id
    inputs = await _with_past(dify, question, plan)
    common = {"inputs": inputs, "user": question.user, "trace_id": trace_id}
    if plan.files:
        check_files(form, plan.files, inputs)
        files = [await _uploaded(dify, question, file) for file in plan.files]
        placed, beside = place_files(form, files, inputs)
        common["inputs"] = {**inputs, **placed}
        common["files"] = files_beside(form, beside)
    variable = query_variable(mode, form, app)
    conversation_id = plan.tail.conversation_id
    return dify_request(mode, plan.query, common, variable, conversation_id)


async def _uploaded(dify: Dify, question: Question, file: Attachment) -> Attachment:
    """The file as Dify knows it: its data is uploaded, once a request."""
    sent = question.sent.get(id(file), file)
    if not (sent.url or sent.upload_id):
        id_ = await dify.upload(question.app, file, question.user)
        sent = replace(file, upload_id=id_)
    return question.sent.setdefault(id(file), sent)


async def _with_past(dify: Dify, question: Question, plan: Plan) -> Json:
    """The inputs, with the history that Dify has as an input only.

    A client that names the conversation does not send it again; the last turn had it.
    """
    name, is_named = question.app.history_variable, question.ask.conversation_id
    if not (name and plan.tail.conversation_id and is_named) or name in plan.inputs:
        return plan.inputs
    here = Place(question.user, plan.tail.conversation_id, "")
    turns, _ = await dify.messages(question.app, here, most=1)
    if not turns:  # some chatflows would meet the question with silence
        raise ConversationGone("Dify does not know this conversation.")
    past = turns[-1].past
    return {**plan.inputs, name: past} if past else plan.inputs


# ==============================================================================
# 16. Handlers
# ==============================================================================
#
# The routes, one coroutine each: it returns the JSON that answers a request, or replies
# by itself. First comes what they share: the Site, which each of them is given, then
# Form, which reads a request that brings a file, and the functions that read back what
# Dify keeps of earlier turns. Then come the handlers, API by API, then ROUTES, the
# table of all. Catches nothing that the error boundary of room 17 can answer. Never
# touches sockets or h11.

MAX_KEY_FAILURES, KEY_FAILURES_S = 20, 60.0  # of an address that guesses keys
MAX_ADDRESSES = 10_000  # that are remembered for it
MAX_REFERENCES = 500  # to stored items; the body of a request has room for a million
MAX_CONVERSATIONS_READ, MAX_PAGES = 40, 20  # for a request; a run counts as one
LATELY_S = 300.0  # what `GET /ready` takes as proof
NAMES_TIMEOUT_S = 5.0  # Open WebUI gives the model list 10 s
MAX_FIELDS_BYTES = 1024 * 1024  # of a form, beside its file
MAX_HELD_BYTES = 512 * 1024  # of a file in memory, until it is known where it goes
MAX_SOUND_BYTES = MAX_JSON_BYTES  # of a whole answer: a quarter of an hour of mp3


# What all handlers share...


@dataclass(eq=False)
class Site:
    """What the handlers share; it knows the apps, and which clients may ask.

    Args:
        dify: the client of Dify; it has the settings as they are now.
        conversations: what is known of them.
        new_id: makes a fresh id, without its prefix.
        wall_clock: seconds since the epoch.
    """

    dify: Dify
    conversations: Conversations
    new_id: Callable[[], str]
    wall_clock: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        """Begin with nothing in flight, and no key tried."""
        self.turns = Turns(self.dify, self.conversations, self.wall_clock)
        self.metrics = Metrics()
        self.in_flight: set[Exchange] = set()
        self.created = int(self.wall_clock())  # the time of each model
        self._key_failures: dict[str, list[float]] = {}  # times, by address
        self._right_keys: set[tuple[str, str]] = set()  # that came, by address

    def check_key(self, key: str, peer: str) -> str:
        """Whose ids a client may open: its key's, or "" where no key is needed.

        It is compared with all keys, so that the time tells nothing. An address that
        sends many wrong ones may use only those that it has used before: who guesses
        learns nothing, and does not shut out its other clients.

        Raises:
            Unauthorized, KeysGuessed.
        """
        valid = self.dify.settings.valid_api_keys
        if not valid:
            return ""
        now = asyncio.get_running_loop().time()
        since = now - KEY_FAILURES_S
        failures = [at for at in self._key_failures.get(peer, ()) if at >= since]
        given = key.encode()
        matches = [hmac.compare_digest(given, known.encode()) for known in valid]
        is_shut = len(failures) >= MAX_KEY_FAILURES
        if is_shut and (peer, key) not in self._right_keys:
            error = KeysGuessed("Too many wrong API keys from this address.")
            error.headers.append(("Retry-After", f"{KEY_FAILURES_S:g}"))
            raise error
        if any(matches):
            if len(self._right_keys) > MAX_ADDRESSES:
                self._right_keys.clear()
            self._right_keys.add((peer, key))
            return key
        if not key:
            raise Unauthorized("No API key. Send one as `Authorization: Bearer KEY`.")
        if not is_loopback(peer):
            if len(self._key_failures) > MAX_ADDRESSES:
                self._key_failures.clear()
            self._key_failures[peer] = [*failures, now][-MAX_KEY_FAILURES:]
        raise Unauthorized(
            "Incorrect API key provided: it is none of this server's VALID_API_KEYS.",
            code="invalid_api_key",
        )

    def masked(self, text: str) -> str:
        """A text for the log, without keys that a client put in a wrong place."""
        for key in self.dify.settings.valid_api_keys:
            if len(key) > 8:  # a shorter one may be any word
                text = text.replace(key, mask_key(key))
        return mask_app_keys(text)

    async def find_app(self, exchange: Exchange, model: str) -> AppSettings:
        """The app of this name; the log and the metrics say it from now on.

        Old clients form-encode a name in a path: there a space is a plus. The error
        for a name that Dify may tell later says why it does not now.
        """
        models, untold = self.known_models(), None
        if model not in models:
            untold = await self._learn_names()
            models = self.known_models()
        quoted = (name for name in models if name.replace(" ", "+") == model)
        if name := model if model in models else next(quoted, ""):
            exchange.model = name
            return models[name]
        shown = _shown(model)
        if untold:
            untold.message = f"The model {shown} is not known yet: {untold.message}"
            raise untold
        known = ", ".join(models) or "none"
        text = f"The model {shown} does not exist here. Available: {known}."
        raise ModelNotFound(text)

    async def models(self) -> Mapping[str, AppSettings]:
        """All apps by model name, as far as Dify tells the names in time."""
        await self._learn_names()
        return self.known_models()

    async def _learn_names(self) -> ProxyError | None:
        """Ask Dify for names that are not known; returns why one may be known later."""
        facts = self.dify.facts
        untold: ProxyError | None = None
        apps = [app for app in self.dify.settings.keyed_apps if not facts.of(app).name]
        results = await _in_time(map(facts.ask_info, apps))
        for app, got in zip(apps, results):
            if isinstance(got, asyncio.TimeoutError):
                untold = UpstreamTimeout("Dify does not tell an app's name in time.")
            elif isinstance(got, Exception):
                log.warning("%s of DIFY_API_KEYS: %s", mask_key(app.key), got)
            if isinstance(got, ProxyError) and got.status >= 500 and not got.is_final:
                untold = got
        return untold

    def known_models(self) -> Mapping[str, AppSettings]:
        """All apps by model name; those of DIFY_API_KEYS as far as Dify has named them.

        One of them that never answers must not hold up the others' turns.
        """
        models = dict(self.dify.settings.model_config)
        for app in self.dify.settings.keyed_apps:
            digest = hashlib.sha256(app.key.encode()).hexdigest()
            name = self.dify.facts.of(app).name or f"app-{digest[:8]}"
            if name in models:
                name = f"{name} ({digest[:4]})"
            models[name] = app
        return models


async def _in_time(awaitables: Iterable[Awaitable[T]]) -> list[T | BaseException]:
    """What each gives within NAMES_TIMEOUT_S, or the exception that it raises."""
    timed = [asyncio.wait_for(awaitable, NAMES_TIMEOUT_S) for awaitable in awaitables]
    return await asyncio.gather(*timed, return_exceptions=True)


async def _json_of(exchange: Exchange) -> dict[str, Any]:
    """The request's JSON; raises BadRequest if it is no object."""
    return parse_body(await read_whole(exchange.read))


async def _body_of(exchange: Exchange) -> dict[str, Any]:
    """The same, its model as the path names it, if it does."""
    body = await _json_of(exchange)
    if exchange.name_in_path:
        body["model"] = exchange.name_in_path
    return body


def query_of(request: Request) -> dict[str, str]:
    """The fields after the `?`; the last one of a name counts."""
    return dict(urllib.parse.parse_qsl(request.query, errors="replace"))


def send_json(reply: Reply, value: Any, more: Fields = (), status: int = 200) -> None:
    """Reply with JSON, and with `more` header fields."""
    fields = [("Content-Type", "application/json"), *more]
    reply.send(status, json_bytes(value), fields)


def _not_found(kind: str, id_: str) -> IdNotFound:
    return IdNotFound(f"{kind} with id {_shown(id_)} not found.")


def _shown(id_: str) -> str:
    """An id or a name of a client's, where a key may have been pasted."""
    masked = mask_app_keys(id_)
    return repr(masked if len(masked) <= 100 else masked[:100] + "…")


# Requests that bring a file...

_NO_ROOM = (
    "The file can't be kept until it is known where it goes (%s). Send the fields "
    "before the file, or let the server's TMPDIR name a folder with room."
)
_LONG_FIELDS = f"The fields of a form may have {MAX_FIELDS_BYTES >> 10} KiB."
_BESIDE_FILE_BYTES = MAX_FIELDS_BYTES + MAX_FORM_PARTS * 2 * MAX_PART_HEAD_BYTES
_START_BYTES = 64  # of a recording: the head of a WAV file


class Form:
    """A request that brings a file: its fields, and the file piece by piece.

    `open` it, `find_app`, `forward` it there, `close` it. Fields may stand before and
    behind the file: `fields`, `model` and `size` are final when it is forwarded. It is
    multipart, or the JSON that `parse_audio_request` reads.

    Args:
        site: what all handlers share.
        exchange: the request; its body is not read yet.
    """

    _reader: FormReader  # of one that is multipart

    def __init__(self, site: Site, exchange: Exchange) -> None:
        self.fields: dict[str, str] = {}
        self.file: Attachment | None = None
        self.start = b""  # of the file
        self.size = 0  # of the file, as far as forwarded
        self._site, self._exchange = site, exchange
        self._store: IO[bytes] | None = None  # of a file that is read already
        self._field_bytes = 0
        self._most_mb = 0  # of the file; 0: any size

    @property
    def model(self) -> str:
        """The model that the path, the form or the query names, "" if none does yet."""
        named = self._exchange.name_in_path or self.fields.get("model")
        return named or query_of(self._exchange.request).get("model", "")

    def user(self) -> str:
        """The end user's name in Dify, as far as the form names one so far."""
        return self._exchange.user_of(parse_user(self.fields))

    async def open(self) -> Attachment:
        """Read on to the file; raises BadRequest if there is none."""
        content_type = self._exchange.request.headers.get("content-type") or "json"
        if content_type.lower().startswith("multipart/form-data"):
            self._reader = FormReader(content_type, self._exchange.read)
            await self._read_fields()
        elif "json" in content_type.lower() and self._exchange.route != "files":
            self.fields, self.file = parse_audio_request(await _json_of(self._exchange))
            self._store = io.BytesIO(self.file.data)
        else:
            raise BadRequest("A file must come as multipart/form-data.")
        if not self.file:
            raise missing_parameter("file")
        return self.file

    async def find_app(self) -> AppSettings:
        """The app that is named, before the file or behind it; else the first."""
        models = self._site.known_models()
        if not (self.model or self._store) and len(models) > 1:
            await self._hold()
        name = self.model or next(iter(models), "")
        return await self._site.find_app(self._exchange, name)

    async def forward(
        self, app: AppSettings, path: str, file: Attachment, most_mb: int = 0
    ) -> Json:
        """Pass the file on to Dify as it comes; returns Dify's answer.

        A file of more than `most_mb` (0: any) is refused; at once, if its size is told.
        """
        self._most_mb = most_mb
        length = int(self._exchange.request.headers.get("content-length", 0))
        self._check_size(length - _BESIDE_FILE_BYTES)
        send = self._site.dify.send_file
        answer = await send(app, path, file, self._read, self.user)
        if self.model:  # perhaps it stands behind the file
            await self._site.find_app(self._exchange, self.model)
        return answer

    def close(self) -> None:
        """Let go of what is held."""
        with contextlib.suppress(OSError):  # a full disk, again
            if self._store:
                self._store.close()

    async def _read(self) -> bytes:
        """More of the file, to be forwarded; b"" at its end."""
        store = self._store
        data = store.read(READ_BUFFER_BYTES) if store else await self._read_part()
        self.size += len(data)
        self._check_size(self.size)
        self.start += data[: _START_BYTES - len(self.start)]
        return data

    async def _read_part(self) -> bytes:
        """More of the file; b"" when it and the fields behind it are read."""
        if not (data := await self._reader.read()):
            await self._read_fields()
        return data

    async def _hold(self) -> None:
        """Read all now, for the fields behind the file; a large one goes to disk."""
        store = tempfile.SpooledTemporaryFile(MAX_HELD_BYTES)  # noqa: SIM115 - `close`
        self._store = cast("IO[bytes]", store)
        try:
            while data := await self._read_part():
                store.write(data)
            store.seek(0)
        except OSError as error:  # a full disk, or one that may not be written
            raise Overloaded(_NO_ROOM % os.strerror(error.errno or 0)) from error

    async def _read_fields(self) -> None:
        """Read those before the file, or those behind it."""
        while part := await self._reader.next_part():
            if part.name == "file":
                if self.file:
                    raise BadRequest("A form brings one file at a time.", param="file")
                self.file = known_file(part.filename or "", part.media_type)
                return
            value = b""
            while data := await self._reader.read():
                value += data
                self._field_bytes += len(data)
                if self._field_bytes > MAX_FIELDS_BYTES:
                    raise BodyTooLarge(_LONG_FIELDS)
            self.fields[part.name] = value.decode("utf-8", "replace")

    def _check_size(self, size: int) -> None:
        if self.file and self._most_mb and size > self._most_mb << 20:
            name, most = self.file.name, self._most_mb
            message = f"The file {name!r} is too large: the app takes {most} MB."
            raise BodyTooLarge(message, param="file")


# What Dify keeps of earlier turns...

_NO_SPOKEN = (
    "no answer of this app to this user has the audio id %s; send its transcript as "
    "`content`."
)


class PreviousGone(ConversationGone):
    """Dify does not have the response that is named, nor its conversation."""

    status, param = 400, "previous_response_id"
    code = "previous_response_not_found"


async def _join(
    site: Site, question: Question, request: ResponsesRequest, sealer: IdSealer
) -> None:
    """Put the request into the question, and take the conversation that it continues.

    An answer that is named is continued where it stands, if Dify's conversation ends
    with what the client has seen, and nobody else has a turn there. Else its history
    is folded.
    """
    user, previous = question.user, request.previous_response_id
    places = _places_of((previous, *reversed(request.references)), sealer, user)
    if previous and not (previous in places and previous.startswith("resp_")):
        raise _no_previous(previous)
    if not places:
        question.ask = await _join_named(site, question, request)
        return
    anchor = next(iter(places.values()))
    here, table = anchor.conversation_id, site.conversations
    # It may also name another conversation, or one that has none in Dify yet.
    is_here = (request.ask.conversation_id or request.conversation) in ("", here)
    if is_here and anchor.message_id != here:  # no run of a workflow
        question.tail = table.take_by_id(question.scope, here, site.wall_clock())
    question.ask = await _join_at(site, question, request, places)
    if question.tail and question.ask.conversation_id != here:
        table.put(question.tail, site.wall_clock())
        question.tail = None


def _places_of(ids: Iterable[str], sealer: IdSealer, user: str) -> dict[str, Place]:
    """Where in Dify ids lead, as `open_place` says; the first MAX_REFERENCES count."""
    first = itertools.islice(dict.fromkeys(filter(None, ids)), MAX_REFERENCES)
    places = {id_: open_place(sealer, id_, user) for id_ in first}
    return {id_: place for id_, place in places.items() if place}


async def _join_named(site: Site, question: Question, request: ResponsesRequest) -> Ask:
    """The question in the conversation of its id, if any, or in a new one."""
    app, id_ = question.app, request.ask.conversation_id
    told: list[Message] = []
    has_results = any(getattr(item, "role", "") == "tool" for item in request.items)
    if has_results and id_ and await site.dify.facts.mode_of(app) in CHAT_MODES:
        turns, _ = await site.dify.messages(app, Place(question.user, id_, ""))
        told = _transcript(_as_asked(turns), request.known_tools)
    ask = ask_of(request, {}, told=told)
    return ask._replace(is_all_new=ask.is_all_new and not is_known_history(ask, told))


async def _turns_named(
    site: Site, question: Question, request: ResponsesRequest, places: dict[str, Place]
) -> dict[str, StoredTurn]:
    """The turns that tell what a request names, by their ids."""
    app, anchor = question.app, next(iter(places.values()))
    # Nearly always the newest answer is named and nothing else: one turn tells all.
    if question.tail and not request.references:
        newest, _ = await site.dify.messages(app, anchor, most=1)
        stored = {turn.message_id: turn for turn in newest}
        if anchor.message_id in stored and _tells_all(request, newest):
            return stored
    return await _turns_of(site, app, *places.values())


async def _join_at(
    site: Site, question: Question, request: ResponsesRequest, places: dict[str, Place]
) -> Ask:
    """The question as it continues the first place's conversation, or folds it.

    It continues it, under its id, only if the question has taken its tail.
    """
    previous, tools = request.previous_response_id, request.known_tools
    named, anchor = next(iter(places.items()))
    stored = await _turns_named(site, question, request, places)
    here = anchor.conversation_id
    turns = [turn for turn in stored.values() if turn.conversation_id == here]
    ids = [turn.message_id for turn in turns]
    if previous and anchor.message_id not in ids:
        raise _no_previous(previous)
    found = {
        id_: turn.question
        if place.item == "in"
        else item_named(id_, place.item, turn.message(tools))
        for id_, place in places.items()
        if (turn := stored.get(place.message_id))
    }
    is_newest = ids[-1:] == [anchor.message_id]
    can_join = is_newest if previous else _tells_rest(request, named, anchor, ids)
    if question.tail and can_join and not any(turn.is_short for turn in turns):
        known = _transcript(turns, tools)
        ask = ask_of(request, found, told=known)
        is_known = is_known_history(ask, known)
        if previous or is_known:
            return ask._replace(conversation_id=here, is_all_new=not is_known)
    end = ids.index(anchor.message_id) + 1 if previous else 0
    # Its system text, if any, stands for what the app was told in those turns.
    bare = functools.partial(_without_told, keeps_system=not request.ask.system)
    said = {id_: message and bare(message) for id_, message in found.items()}
    before = map(bare, _transcript(turns[:end], tools))
    ask = ask_of(request, said, [*before])
    # Another replica may have gone on there: the table would find it as it was.
    is_all_new = ask.is_all_new or not (is_newest or ask.conversation_id)
    return ask._replace(is_all_new=is_all_new)


async def _with_text(site: Site, exchange: Exchange, app: AppSettings, ask: Ask) -> Ask:
    """The question with the texts of the answers that are named by their audio.

    Raises:
        BadRequest: an id is not ours, or Dify does not have its answer any more.
    """
    ids = [message.spoken_id for message in ask.messages if message.spoken_id]
    if not ids:  # nearly always
        return ask
    sealer, user = IdSealer(app.key, exchange.owner), exchange.user_of(ask.user)
    places = _places_of(ids, sealer, user)
    stored = await _turns_of(site, app, *places.values())
    texts: dict[str, str] = {}
    for id_ in dict.fromkeys(ids):
        place = places.get(id_)
        if not (place and id_.startswith("audio_") and place.message_id in stored):
            raise bad_value("messages", _NO_SPOKEN % _shown(id_))
        texts[id_] = stored[place.message_id].answer(ask.tools).text
    messages = (m._replace(text=texts.get(m.spoken_id, m.text)) for m in ask.messages)
    return ask._replace(messages=tuple(messages))


async def _turns_of(site: Site, app: AppSettings, *at: Place) -> dict[str, StoredTurn]:
    """All turns of the places' first few conversations, in order, by their ids."""
    by_conversation = {place.conversation_id: place for place in at}
    stored: dict[str, StoredTurn] = {}
    for place in list(by_conversation.values())[:MAX_CONVERSATIONS_READ]:
        turns: list[StoredTurn] = []
        for _ in range(MAX_PAGES):
            first_id = turns[0].message_id if turns else ""
            page, has_more = await site.dify.messages(app, place, first_id=first_id)
            turns = [*page, *turns]
            if not (page and has_more):
                break
        stored.update((turn.message_id, turn) for turn in _as_asked(turns))
    return stored


def _as_asked(turns: Iterable[StoredTurn]) -> list[StoredTurn]:
    """The turns of a conversation as clients know them, with the tools told by then.

    The first one's question begins with what Dify has as an input only. A second try
    answers the question of the first.
    """
    known: list[StoredTurn] = []
    last = Ask("", ())
    for turn in turns:
        last = turn.told if turn.told.tools else last
        # All else holds only for the turn that is told it.
        told = last._replace(tool_mode=turn.told.tool_mode, output=turn.told.output)
        question = turn.question
        if known and is_retry(asked_text(question)):
            question = known.pop().question
        elif not known:  # all others have the same past
            question = with_past(question, turn.past)
        known.append(turn._replace(told=told, question=question))
    return known


def _transcript(turns: Iterable[StoredTurn], tools: Sequence[Tool]) -> list[Message]:
    return [m for turn in turns for m in (turn.question, turn.message(tools))]


def _tells_rest(
    request: ResponsesRequest, id_: str, place: Place, ids: Sequence[str]
) -> bool:
    """Whether whole items tell of all turns behind the last item that is only named.

    Args:
        request: what has the items.
        id_: of the last one that is only named.
        place: where that leads.
        ids: of all turns there, in order.
    """
    behind = itertools.takewhile(lambda item: item != id_, reversed(request.items))
    runs = itertools.groupby(getattr(item, "role", "") for item in behind)
    answers = [role for role, _ in runs].count("assistant")
    turns = [*itertools.dropwhile(lambda turn: turn != place.message_id, ids)]
    return bool(turns) and len(turns) - (place.item != "in") <= answers


def _without_told(message: Message, *, keeps_system: bool) -> Message:
    """A stored message, a question without what `asked_text` leaves out."""
    if message.role != "user":
        return message
    return message._replace(text=asked_text(message, keeps_system=keeps_system))


def _tells_all(request: ResponsesRequest, turns: Sequence[StoredTurn]) -> bool:
    """Whether the calls of all results are in these turns or among the items.

    Not if a client lacks some of these turns, or knows a second try by the question of
    the first: then the turns before them count, too.
    """
    if any(turn.is_short or is_retry(asked_text(turn.question)) for turn in turns):
        return False
    told = _transcript(turns, request.known_tools)
    messages = [*told, *(item for item in request.items if isinstance(item, Message))]
    calls = {call.id for message in messages for call in message.tool_calls}
    return calls.issuperset(message.call_id for message in messages if message.call_id)


def _no_previous(id_: str) -> PreviousGone:
    return PreviousGone(
        f"Previous response with id {_shown(id_)} not found. Send the history instead."
    )


# Models and health...


async def list_models(site: Site, exchange: Exchange) -> Json:
    """`GET /models`."""
    apps, facts = (await site.models()).items(), site.dify.facts
    data = [model_object(id_, facts.of(app).name, site.created) for id_, app in apps]
    return {"object": "list", "data": data}


async def get_model(site: Site, exchange: Exchange) -> Json:
    """`GET /models/{id}`, in each of the encodings that clients use."""
    app = await site.find_app(exchange, exchange.name_in_path)
    return model_object(exchange.model, site.dify.facts.of(app).name, site.created)


async def list_apps(site: Site, exchange: Exchange) -> Json:
    """`GET /apps`: how each app does just now, for the page."""
    models = await site.models()
    rows = await asyncio.gather(*(_app_row(site, *pair) for pair in models.items()))
    return {"object": "list", "data": rows}


async def _app_row(site: Site, model: str, app: AppSettings) -> dict[str, str]:
    try:
        mode = await site.dify.facts.confirmed_mode(app)
    except ProxyError as error:
        return {"id": model, "error": error.message}
    return {"id": model, "name": site.dify.facts.of(app).name, "mode": mode}


async def show_health(site: Site, exchange: Exchange) -> Json:
    """`GET /health`: the process is alive."""
    return {"status": "ok", "version": __version__}


async def show_readiness(site: Site, exchange: Exchange) -> Json:
    """`GET /ready`: an app has answered lately, or answers now."""
    models, dify = await site.models(), site.dify
    silent_s = asyncio.get_running_loop().time() - dify.api.answered_at
    if silent_s > LATELY_S:
        asked = [dify.run_in_background(_answers(site, *row)) for row in models.items()]
        for answer in asyncio.as_completed(asked):
            if await answer:
                break
        else:
            raise Overloaded("No app answers; the log says why.")
    return {"status": "ready"}


async def _answers(site: Site, model: str, app: AppSettings) -> bool:
    """Whether an app answers; why not is for the log, since who asks needs no key."""
    try:
        await site.dify.api.call(app, "/info")
    except ProxyError as error:
        log.warning("the app of %r does not answer: %s", model, error.message)
        return False
    return True


async def show_metrics(site: Site, exchange: Exchange) -> None:
    """`GET /metrics`, for Prometheus."""
    gauges = {
        "opendify_requests_in_flight": len(site.in_flight),
        "opendify_conversations": len(site.conversations),
    }
    fields = [("Content-Type", "text/plain; version=0.0.4; charset=utf-8")]
    body = site.metrics.render(gauges).encode("utf-8", "replace")
    exchange.reply.send(200, body, fields)


# Chat...


async def create_chat_completion(site: Site, exchange: Exchange) -> None:
    """`POST /chat/completions`."""
    chat = parse_chat_request(await _body_of(exchange))
    app = await site.find_app(exchange, chat.ask.model)
    ask = _with_stored_files(site, exchange, with_words(chat.ask, app.tools))
    spoken = await _spoken(site, exchange, app, ask) if ask.voice is not None else None
    ask = await _with_text(site, exchange, app, ask)
    id_, now = f"chatcmpl-{site.new_id()}", int(site.wall_clock())
    envelope = Envelope(id_, now, exchange.model, chat, spoken)
    questions = [Question(exchange, app, ask, chat.n == 1) for _ in range(chat.n)]
    await _answer_all(site, questions, envelope, is_streamed=chat.stream)


async def create_completion(site: Site, exchange: Exchange) -> None:
    """`POST /completions`, the legacy API."""
    chat, asks = parse_completion_request(await _body_of(exchange))
    app = await site.find_app(exchange, chat.ask.model)
    id_, now = f"cmpl-{site.new_id()}", int(site.wall_clock())
    envelope = Envelope(id_, now, exchange.model, chat)
    questions = [Question(exchange, app, ask, len(asks) == 1) for ask in asks]
    await _answer_all(site, questions, envelope, is_streamed=chat.stream)


# Responses...


async def create_response(site: Site, exchange: Exchange) -> None:
    """`POST /responses`."""
    request = parse_responses_request(await _body_of(exchange))
    app, named = await site.find_app(exchange, request.ask.model), None
    if request.conversation:
        await _check_keeps(site, app)
        # Nothing is awaited from here until its first turn is known to be under way.
        named = _named(site, exchange, request.conversation)
        request = _within(named, request)
    # Its ids hold the user, whom its files may name.
    items = tuple(item for item in request.items if isinstance(item, Message))
    ask = _with_stored_files(site, exchange, request.ask._replace(messages=items))
    user, sealer = exchange.user_of(ask.user), IdSealer(app.key, exchange.owner)
    now, new_id = int(site.wall_clock()), site.new_id()
    frame = ResponseFrame(now, exchange.model, request.echo, sealer, user, new_id)
    question = Question(exchange, app, ask, joins=True, named=named)
    if named:
        _check_fits(site, question, named)
    with site.turns.holding(question):
        await _join(site, question, request, sealer)
        ask = with_words(question.ask, app.tools)
        question.ask = _with_stored_files(site, exchange, ask)
    await _answer_all(site, [question], frame, is_streamed=request.stream)


def _within(named: NamedConversation, request: ResponsesRequest) -> ResponsesRequest:
    """The request with what the conversation that it names has."""
    items = (*parse_items(list(named.items)), *request.items)
    ask = request.ask._replace(conversation_id=named.conversation_id, is_all_new=True)
    return request._replace(ask=ask, items=items)


_NOT_TOLD = (
    "A turn that begins this conversation, or tells the items that were added to it, "
    "is still running. Retry in a few seconds."
)


async def _check_keeps(site: Site, app: AppSettings) -> None:
    """Refuse a turn of a conversation if the app keeps none."""
    mode = await site.dify.facts.mode_of(app)
    if mode not in CHAT_MODES:
        problem = f"a {mode} app keeps none; send the history as `input`."
        raise bad_value("conversation", problem)


def _check_fits(site: Site, question: Question, named: NamedConversation) -> None:
    """Refuse a turn that the conversation can't have.

    Of two first ones, each would begin another conversation in Dify, and of two that
    find items, each would tell these.
    """
    if not named.is_bound_to(question.scope):
        raise bad_value("conversation", "it belongs to another model or end user.")
    if named.items or not named.conversation_id:
        if any(other.alone_in == named.id for other in site.in_flight):
            raise ConversationLocked(_NOT_TOLD)
        question.exchange.alone_in = named.id


async def get_response(site: Site, exchange: Exchange) -> Json:
    """`GET /responses/{id}`: the answer, as Dify has stored it."""
    if query_of(exchange.request).get("stream", "").lower() == "true":
        raise bad_value("stream", "a stored response comes whole.")
    if running := _running_as(site, exchange):
        return running[0].so_far("in_progress")
    response, _ = await _stored_response(site, exchange)
    return response


async def get_input_items(site: Site, exchange: Exchange) -> Json:
    """`GET /responses/{id}/input_items`: the question of an answer."""
    _, question = await _stored_response(site, exchange)
    return list_page([question], query_of(exchange.request))


async def delete_response(site: Site, exchange: Exchange) -> Json:
    """`DELETE /responses/{id}`. Dify can't forget one message: it stays there."""
    await _stored_response(site, exchange)
    return deleted_object(exchange.name_in_path)


async def cancel_response(site: Site, exchange: Exchange) -> Json:
    """`POST /responses/{id}/cancel`: the app stops, its stream ends incomplete."""
    if running := _running_as(site, exchange):
        stream, turn = running
        value = stream.so_far("cancelled")
        await turn.stream.stop()
        return value
    return await get_response(site, exchange)


def _running_as(site: Site, exchange: Exchange) -> tuple[ResponseStream, Turn] | None:
    """The streamed response that a path names, with its turn, while it runs."""
    user = exchange.forwarded_user
    streams = [(out.stream, other) for other in site.in_flight for out in other.outlets]
    for stream, other in streams:
        if not isinstance(stream, ResponseStream):
            continue
        response = stream.response
        is_it = response.get("id") == exchange.name_in_path
        is_theirs = other.owner == exchange.owner and user in ("", stream.frame.user)
        if is_it and is_theirs and other.turn and response["status"] == "in_progress":
            exchange.model = other.model
            return stream, other.turn
    return None


async def _stored_response(site: Site, exchange: Exchange) -> tuple[Json, Json]:
    """The response that a path names, and its question, as Dify has stored them."""
    id_, user = exchange.name_in_path, exchange.forwarded_user
    for model, app in (await site.models()).items():
        sealer = IdSealer(app.key, exchange.owner)
        if id_.startswith("resp_") and (place := open_place(sealer, id_, user)):
            exchange.model = model
            stored = await _turns_of(site, app, place)
            if turn := stored.get(place.message_id):
                return _as_response(turn, model, sealer, place.user)
    raise _not_found("Response", id_)


def _as_response(
    turn: StoredTurn, model: str, sealer: IdSealer, user: str
) -> tuple[Json, Json]:
    """A stored answer and its question, with the ids that they were sent with."""
    frame = ResponseFrame(turn.created, model, echo_of({}), sealer, user, "", turn.ids)
    error = next((part.error for part in turn.parts if isinstance(part, Failure)), None)
    files = tuple(_named_file(f, turn, sealer, user) for f in turn.question.attachments)
    asked = turn.question._replace(attachments=files)
    question = input_item(frame.id("msg_", "in"), asked)
    return frame.whole([turn.answer()], turn.ids, error), question


def _named_file(
    file: Attachment, turn: StoredTurn, sealer: IdSealer, user: str
) -> Attachment:
    """A file of a stored question under an id, if it was uploaded."""
    if not file.upload_id:
        return file
    size, created = str(file.size), str(turn.created)
    about = (file.name, file.media_type, size, created, "user_data")
    stored = StoredFile(file.upload_id, user, *about)
    return replace(file, file_id=sealer.seal(FILE_PREFIX, stored))


# Conversations...


async def create_conversation(site: Site, exchange: Exchange) -> Json:
    """`POST /conversations`."""
    body = parse_body(await read_whole(exchange.read) or b"{}")
    id_, now = f"conv_{site.new_id()}", int(site.wall_clock())
    items = _with_items(site, body, ())
    named = NamedConversation(id_, now, _parse_metadata(body), items)
    return _keep(site, exchange, named)


async def get_conversation(site: Site, exchange: Exchange) -> Json:
    """`GET /conversations/{id}`."""
    return _shown_conversation(_named(site, exchange))


async def update_conversation(site: Site, exchange: Exchange) -> Json:
    """`POST /conversations/{id}`: other metadata."""
    metadata = _parse_metadata(await _json_of(exchange))
    named = _named(site, exchange)
    return _keep(site, exchange, replace(named, metadata=metadata))


async def delete_conversation(site: Site, exchange: Exchange) -> Json:
    """`DELETE /conversations/{id}`."""
    named = _named(site, exchange)
    site.conversations.drop(named)
    return deleted_object(named.id)


async def add_items(site: Site, exchange: Exchange) -> Json:
    """`POST /conversations/{id}/items`: they go to Dify with the next turn."""
    body = await _json_of(exchange)
    named = _named(site, exchange)
    items = _with_items(site, body, named.items)
    _keep(site, exchange, replace(named, items=items))
    added = items[len(named.items) :]
    return list_page(added, {"order": "asc", "limit": "100"})


async def list_items(site: Site, exchange: Exchange) -> Json:
    """`GET /conversations/{id}/items`: all turns in Dify, and what awaits one."""
    return list_page(await _items_of(site, exchange), query_of(exchange.request))


async def get_item(site: Site, exchange: Exchange) -> Json:
    """`GET /conversations/{id}/items/{id}`."""
    item_id = exchange.name_in_path.partition("/")[2]
    for item in await _items_of(site, exchange):
        if item["id"] == item_id:
            return item
    raise _not_found("Item", item_id)


async def delete_item(site: Site, exchange: Exchange) -> Json:
    """`DELETE /conversations/{id}/items/{id}`.

    Dify can't forget one that it has: a new conversation is told the others.
    """
    item_id = exchange.name_in_path.partition("/")[2]
    named = _named(site, exchange)
    while not any(item["id"] == item_id for item in named.items):
        before, items = named, await _items_of(site, exchange)
        named = _named(site, exchange)
        if named == before:  # nobody has changed it while Dify was asked
            named = replace(named, conversation_id="", items=tuple(items))
            break
    rest = [item for item in named.items if item["id"] != item_id]
    if len(rest) == len(named.items):
        raise _not_found("Item", item_id)
    if len(rest) > MAX_NAMED_ITEMS:
        raise BadRequest(f"Can't delete: more than {MAX_NAMED_ITEMS} items are left.")
    return _keep(site, exchange, replace(named, items=tuple(rest)))


async def _items_of(site: Site, exchange: Exchange) -> list[Json]:
    """What Dify has of a conversation, and what awaits a turn, each id once."""
    items: list[Json] = []
    named = _named(site, exchange)
    place = Place(named.user, named.conversation_id, "")
    models = await site.models() if place.conversation_id else {}
    for model, app in models.items():
        if named.is_bound_to(scope_of(app.key, named.user)):
            exchange.model, sealer = model, IdSealer(app.key, exchange.owner)
            for turn in (await _turns_of(site, app, place)).values():
                answer, question = _as_response(turn, model, sealer, named.user)
                items += [question, *answer["output"]]
            break
    known = {item["id"] for item in items}  # a waiting item may name one of these
    return [*items, *(item for item in named.items if item["id"] not in known)]


def _with_items(site: Site, body: Json, kept: Sequence[Any]) -> tuple[Any, ...]:
    """The items of a conversation and those that a request adds, under ids."""
    given = body.get("items")
    added = of_type([] if given is None else given, list, "items")
    if len(kept) + len(added) > MAX_NAMED_ITEMS:
        raise bad_value("items", f"there may be {MAX_NAMED_ITEMS} at most.")
    parse_items(added, "items")  # refuses what no turn could take
    items = {item["id"]: item for item in kept}
    for value in added:
        item = stored_item(value, f"item_{site.new_id()}", items)
        items[item["id"]] = item
    return tuple(items.values())


def _named(site: Site, exchange: Exchange, id_: str = "") -> NamedConversation:
    """The client's conversation of this id, or of the one in the path."""
    id_ = id_ or exchange.name_in_path.partition("/")[0]
    named = site.conversations.named(id_, exchange.owner, site.wall_clock())
    if not named:
        raise _not_found("Conversation", id_)
    return named


def _keep(site: Site, exchange: Exchange, named: NamedConversation) -> Json:
    """Record a client's conversation; returns it as the client sees it."""
    site.conversations.keep(named, exchange.owner, site.wall_clock())
    return _shown_conversation(named)


def _parse_metadata(body: Json) -> dict[str, Any]:
    return of_type(body.get("metadata") or {}, dict, "metadata")


def _shown_conversation(named: NamedConversation) -> Json:
    return conversation_object(named.id, named.created, named.metadata)


# Turns...


async def _answer_all(
    site: Site, questions: Sequence[Question], form: AnswerForm, *, is_streamed: bool
) -> None:
    """Answer each question, of one client and to one app, as a choice."""
    exchange = questions[0].exchange
    outlets: list[Outlet] = []
    collectors: list[Collector] = []
    if is_streamed:
        outlets = [_outlet(site, q, form.stream(i)) for i, q in enumerate(questions)]
    else:
        collectors = [Collector(exchange) for _ in questions]
    sinks: list[Sink] = [*outlets, *collectors]
    try:
        if len(questions) == 1:
            await site.turns.run(questions[0], sinks[0])
        else:
            await _run_all(site, questions, sinks)
        if questions[0].ask.voice is not None:  # then it is the only one
            await _say(site, questions[0], sinks[0])
    finally:
        for sink in sinks:
            sink.close()
    if is_streamed:
        usage = sum((outlet.stream.summary.usage for outlet in outlets), NO_USAGE)
        ends = [outlet.end() for outlet in outlets]
        exchange.reply.end(b"".join(ends) + outlets[0].stream.end(usage))
        return
    ids = collectors[0].ids
    send_json(exchange.reply, form.whole(collectors, ids), id_headers(ids))


async def _run_all(
    site: Site, questions: Sequence[Question], sinks: Sequence[Sink]
) -> None:
    """Run all turns, MAX_CHOICES at once; when one fails, no other begins.

    Those that have begun end as if the client had left. Their runs are stopped in the
    background: the client's error does not wait for that, nor for the name of a run,
    without which it can't be stopped.
    """
    exchange, pairs = questions[0].exchange, zip(questions, sinks)

    async def run_next() -> None:
        for question, sink in pairs:
            await site.turns.run(question, sink)

    tasks = [asyncio.ensure_future(run_next()) for _ in questions[:MAX_CHOICES]]
    try:
        await asyncio.gather(*tasks)  # takes note of all errors
    except asyncio.CancelledError:  # all are cancelled, or see that the client left
        await asyncio.wait(tasks)
        raise
    except Exception:
        exchange.cut()
        site.dify.run_in_background(asyncio.wait(tasks))
        raise


def _outlet(site: Site, question: Question, stream: AnswerStream) -> Outlet:
    """The way to the client; even, unless operator or request switched that off."""
    exchange, settings = question.exchange, site.dify.settings
    wish = exchange.request.headers.get("x-opendify-smoothing", "").lower()
    is_on = {"on": True, "off": False}.get(wish, question.app.smoothing)
    if is_on is None:
        is_on = settings.stream_smoothing
    pacer = Pacer(settings.stream_max_lag) if is_on else None
    return Outlet(exchange, stream, pacer, site.metrics)


# Audio...

_NO_SOUND = "Dify made no sound of this text."
_UNSPOKEN = "The app has answered, but its speech failed: "
_LONG_SOUND = f"It is over {MAX_SOUND_BYTES >> 20} MB; a streamed answer may be longer."


async def transcribe(site: Site, exchange: Exchange) -> None:
    """`POST /audio/transcriptions`, and translations: Dify has one for both."""
    with exchange, contextlib.closing(Form(site, exchange)) as form:
        file = await form.open()
        transcript_format(form.fields)  # refused before the upload, if known
        app = await form.find_app()
        if not (await site.dify.facts.form_of(app)).hears:
            raise _switched_off("Speech to text", exchange.model)
        file = replace(file, media_type=audio_type(file))
        answer = await form.forward(app, "/audio-to-text", file)
    if "text" not in answer:  # of silence, too, there is one: "" or null
        raise UpstreamFailed(f"Dify gave the file {file.name!r} no transcript.")
    task = "translate" if exchange.route.endswith("translations") else "transcribe"
    text = str(answer["text"] or "")
    seconds = wav_seconds(form.start, form.size)
    kind, body = transcript(text, form.fields, task, seconds)
    exchange.reply.send(200, body, [("Content-Type", kind)])


async def speak(site: Site, exchange: Exchange) -> None:
    """`POST /audio/speech`: audio as it comes, in the format that the app makes."""
    speech = parse_speech_request(await _body_of(exchange))
    app = await site.find_app(exchange, speech.model)
    if not (await site.dify.facts.form_of(app)).speaks:
        raise _switched_off("Text to speech", exchange.model)
    user = exchange.user_of(speech.user)
    with exchange:
        response = await _open_speech(site, app, speech.text, speech.voice, user)
        if speech.is_sse:
            exchange.fail = encode_failure
            await _pass_file(site, exchange, response, SSE_HEADERS, encode_speech)
        else:
            fields = [("Content-Type", response.content_type), UNBUFFERED]
            await _pass_file(site, exchange, response, fields)


async def list_speakers(site: Site, exchange: Exchange) -> Json:
    """`GET /audio/models` and `/audio/voices`, as Open WebUI asks for them.

    The apps whose text to speech is on, as far as they say so in time, and the
    voices that they are set to.
    """
    models = await site.models()
    forms = await _in_time(map(site.dify.facts.form_of, models.values()))
    voices = {
        model: form.voice or "default"
        for model, form in zip(models, forms)
        if isinstance(form, AppForm) and form.speaks
    }
    names = {"models": list(voices), "voices": dict.fromkeys(voices.values())}
    kind = exchange.route.rpartition("/")[2]
    return {kind: [{"id": name, "name": name} for name in names[kind]]}


async def _open_speech(
    site: Site, app: AppSettings, text: str, voice: str, user: str
) -> UpstreamResponse:
    """The sound of a text, not read yet."""
    voice = voice_for(voice, (await site.dify.facts.form_of(app)).voice)
    body = {"text": text, "user": user, **({"voice": voice} if voice else {})}
    response = await site.dify.fetch_file(app, "/text-to-audio", json_bytes(body), None)
    kind = response.content_type.lower()
    if not kind.startswith(("audio/", "application/octet-stream")):
        response.close()
        raise UpstreamFailed(_NO_SOUND)
    return response


async def _spoken(site: Site, exchange: Exchange, app: AppSettings, ask: Ask) -> Spoken:
    """How the answer is named; raises BadRequest if the app can't say it aloud."""
    if not (await site.dify.facts.form_of(app)).speaks:
        raise _switched_off("Text to speech", exchange.model, "modalities")
    now, fresh, user = int(site.wall_clock()), site.new_id(), exchange.user_of(ask.user)
    sealer, echo = IdSealer(app.key, exchange.owner), echo_of({})
    frame = ResponseFrame(now, exchange.model, echo, sealer, user, fresh)
    expires_at = now + int(site.dify.settings.conversation_ttl)
    return Spoken(lambda ids: replace(frame, ids=ids).id("audio_"), expires_at)


async def _say(site: Site, question: Question, sink: Sink) -> None:
    """Have the app say its answer; a call, or nothing, or what it withdrew is not said.

    The conversation has the text by now, and goes on whatever happens to its sound.
    """
    has_words = sink.text.strip() or sink.is_behind
    if sink.calls or sink.is_withdrawn or not has_words:
        return
    app, exchange, size = question.app, question.exchange, 0
    voice = question.ask.voice or ""
    try:
        if sink.is_behind:
            raise UpstreamFailed("The text is too long.")
        with exchange:
            response = await _open_speech(site, app, sink.text, voice, question.user)
            with contextlib.closing(response):
                while data := await site.dify.read_file(response):
                    size += len(data)
                    if isinstance(sink, Collector) and size > MAX_SOUND_BYTES:
                        raise UpstreamFailed(_LONG_SOUND)
                    sink.put([Sound(data)])
                    await exchange.reply.drain()
        if not size:
            raise UpstreamFailed(_NO_SOUND)
    except ProxyError as error:
        error.message = _UNSPOKEN + error.message
        error.is_final = True  # the question would be asked again
        raise


def _switched_off(feature: str, model: str, param: str = "model") -> BadRequest:
    return BadRequest(
        f"{feature} is switched off in the app of {model!r}; switch it on among the "
        "app's features in Dify.",
        param=param,
    )


# Files...

_NO_FILE = (
    "An id is good for the key of the client that uploaded the file, and as long as "
    "the app's key in Dify stays the same."
)
_NO_CONTENT = "Dify (from 1.7.2 on) gives a file back once a message has used it."


async def create_file(site: Site, exchange: Exchange) -> Json:
    """`POST /files`: to Dify; all that is known of the file goes into its id."""
    with exchange, contextlib.closing(Form(site, exchange)) as form:
        file = await form.open()
        app = await form.find_app()
        most_mb = size_limit_mb(await site.dify.facts.form_of(app), file)
        answer = await form.forward(app, "/files/upload", file, most_mb)
    if not answer.get("id"):
        raise UpstreamFailed(f"Dify gave the file {file.name!r} no id.")
    size, created = str(form.size), str(int(site.wall_clock()))
    purpose = form.fields.get("purpose", "")[:20]  # the known ones are shorter
    about = (file.name, file.media_type, size, created, purpose)
    stored = StoredFile(str(answer["id"]), form.user(), *about)
    id_ = IdSealer(app.key, exchange.owner).seal(FILE_PREFIX, stored)
    return file_object(id_, stored)


async def list_files(site: Site, exchange: Exchange) -> Json:
    """`GET /files`: none, for neither Dify nor OpenDify keeps a list of them."""
    return list_page([], {})


async def get_file(site: Site, exchange: Exchange) -> Json:
    """`GET /files/{id}`: what the id says."""
    _, stored = _file_of(site, exchange, exchange.name_in_path)
    return file_object(exchange.name_in_path, stored)


async def get_file_content(site: Site, exchange: Exchange) -> None:
    """`GET /files/{id}/content`; Dify has it once a message has used the file."""
    app, stored = _file_of(site, exchange, exchange.name_in_path)
    query = urllib.parse.urlencode({"user": stored.user})
    upload_id = urllib.parse.quote(stored.upload_id, safe="")
    path = f"/files/{upload_id}/preview?{query}"
    with exchange:
        missing = _no_such_file(stored.name, _NO_CONTENT)
        response = await site.dify.fetch_file(app, path, b"", missing)
        name = urllib.parse.quote(stored.name, safe="")
        # As an attachment: a page that somebody uploaded must not be one of here.
        headers = [
            ("Content-Type", response.content_type),
            ("Content-Disposition", f"attachment; filename*=UTF-8''{name}"),
            ("X-Content-Type-Options", "nosniff"),
        ]
        await _pass_file(site, exchange, response, headers)


async def delete_file(site: Site, exchange: Exchange) -> Json:
    """`DELETE /files/{id}`: Dify's API can't delete, and the answer says so."""
    _file_of(site, exchange, exchange.name_in_path)
    return {"id": exchange.name_in_path, "object": "file", "deleted": False}


async def _pass_file(
    site: Site,
    exchange: Exchange,
    response: UpstreamResponse,
    headers: Fields,
    encode: Callable[[bytes], bytes] = bytes,
) -> None:
    """Carry a file from Dify to the client as it comes; encode(b"") is its end."""
    reply = exchange.reply
    with contextlib.closing(response):
        data = await site.dify.read_file(response)
        if not data and exchange.route == "audio/speech":
            raise UpstreamFailed(_NO_SOUND)
        reply.start(200, headers)
        while data:
            reply.write(encode(data))
            await reply.drain()
            data = await site.dify.read_file(response)
        reply.end(encode(b""))


def _file_of(
    site: Site, exchange: Exchange, id_: str
) -> tuple[AppSettings, StoredFile]:
    """The app and the upload behind an id; raises BadRequest if it is not ours."""
    for model, app in site.known_models().items():
        if fields := IdSealer(app.key, exchange.owner).open(id_, FILE_PREFIX):
            exchange.model = exchange.model or model
            return app, StoredFile(*fields)
    raise _no_such_file(id_, _NO_FILE)


def _no_such_file(name: str, reason: str) -> IdNotFound:
    return IdNotFound(f"No such File object: {mask_app_keys(name):.80}. {reason}")


def _with_stored_files(site: Site, exchange: Exchange, ask: Ask) -> Ask:
    """The question with its stored files; as their uploader's, if it names no user."""
    files = [file for message in ask.messages for file in message.attachments]
    ids = dict.fromkeys([file.file_id for file in files if file.file_id])
    if not ids:
        return ask
    stored = [_file_of(site, exchange, id_)[1] for id_ in ids]
    known = {id_: file.attachment for id_, file in zip(ids, stored)}
    messages = []
    for message in ask.messages:
        files = [known.get(file.file_id, file) for file in message.attachments]
        messages.append(message._replace(attachments=tuple(files)))
    user = ask.user if ask.user or exchange.forwarded_user else stored[0].user
    return ask._replace(messages=tuple(messages), user=user)


# Routes...

Handler = Callable[[Site, Exchange], Awaitable[Union[Json, None]]]  # None: it replied
# Paths of what no app can do end with these: embeddings, moderations, images.
NOT_SERVED = ("embeddings", "moderations", "generations", "edits", "variations")
ROUTES: dict[str, Mapping[str, Handler]] = {
    "chat/completions": {"POST": create_chat_completion},
    "completions": {"POST": create_completion},
    "responses": {"POST": create_response},
    "responses/{id}": {"GET": get_response, "DELETE": delete_response},
    "responses/{id}/input_items": {"GET": get_input_items},
    "responses/{id}/cancel": {"POST": cancel_response},
    "conversations": {"POST": create_conversation},
    "conversations/{id}": {
        "GET": get_conversation,
        "POST": update_conversation,
        "DELETE": delete_conversation,
    },
    "conversations/{id}/items": {"GET": list_items, "POST": add_items},
    "conversations/{id}/items/{id}": {"GET": get_item, "DELETE": delete_item},
    "models": {"GET": list_models},
    "models/{model}": {"GET": get_model},
    "audio/transcriptions": {"POST": transcribe},
    "audio/translations": {"POST": transcribe},
    "audio/speech": {"POST": speak},
    "audio/voices": {"GET": list_speakers},
    "audio/models": {"GET": list_speakers},
    "files": {"GET": list_files, "POST": create_file},
    "files/{id}": {"GET": get_file, "DELETE": delete_file},
    "files/{id}/content": {"GET": get_file_content},
    "apps": {"GET": list_apps},
    "health": {"GET": show_health},
    "ready": {"GET": show_readiness},
    "metrics": {"GET": show_metrics},
}
OPEN_ENDPOINTS = ("/", "health", "ready")

_PREFIX = re.compile(  # before an endpoint; another one may stand there, too
    r"\A(?:(?:v1|api|openai|(?:chat/)?completions(?=/.)"
    r"|responses(?=/(?:responses|models)(?:/|\Z)))(?:/|\Z))+"
)
_ENDPOINTS = "|".join(re.sub(r"{\w+}", "[^/]+", key) for key in ROUTES)
_DEPLOYMENT = re.compile(rf"(?:deployments|engines)/(.+?)/(?:v1/)?({_ENDPOINTS})\Z")
_NO_NAMES = ("responses/compact", "responses/input_tokens")  # OpenAI's own endpoints
_PATTERNS = [  # of the endpoints that name something; a model's name may have slashes
    (key, re.compile(key.replace("{id}", "([^/]+)").replace("{model}", "(.+)") + r"\Z"))
    for key in ROUTES
    if "{" in key
]


@functools.lru_cache(maxsize=64)
def find_endpoint(path: str) -> tuple[str, str]:
    """(endpoint, name in the path, decoded) of a request's path.

    Clients are given base URLs with no `/v1`, with one or two, with `//`, with a
    reverse proxy's prefix, with the endpoint itself, or Azure's and the engines' forms
    that name the model. So the tail decides.

        /v1//chat/completions                          ("chat/completions", "")
        /openai/deployments/m/chat/completions         ("chat/completions", "m")
        /v1/models/team%2Fapp                 ("models/{model}", "team/app")
        /v1/responses/resp_x/cancel         ("responses/{id}/cancel", "resp_x")
        /v1/conversations/c/items/i   ("conversations/{id}/items/{id}", "c/i")
    """
    if path == "/":
        return path, ""
    tail = _PREFIX.sub("", re.sub(r"/{2,}", "/", path).strip("/"))
    name = ""
    if deployment := _DEPLOYMENT.match(tail):
        name, tail = deployment.groups()
    for endpoint, pattern in _PATTERNS:
        if tail not in _NO_NAMES and (match := pattern.match(tail)):
            return endpoint, urllib.parse.unquote("/".join(match.groups()))
    return tail, urllib.parse.unquote(name)


def _client_key(headers: Mapping[str, str]) -> str:
    """The key that a client presents, in any of the usual places; "" if none."""
    scheme, _, token = headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return (headers.get("api-key") or headers.get("x-api-key") or "").strip()


def authorized_handler(site: Site, exchange: Exchange) -> Handler:
    """The handler of a request, if its client may call it.

    The exchange has its route, its key and its owner from now on.

    Raises:
        NotFound, MethodNotAllowed, Unauthorized, KeysGuessed.
    """
    request = exchange.request
    endpoint, exchange.name_in_path = find_endpoint(request.path)
    methods = ROUTES.get(endpoint)
    if methods is None:
        path = mask_app_keys(request.path)  # for a model's name, in an Azure URL say
        hint = "" if "/v1/" in path else " A base URL ends in /v1."
        if path.rstrip("/").endswith("/v1"):  # as it is shown at the start
            hint = " Clients add a path to it; for a browser there is a page at /."
        if endpoint.endswith(NOT_SERVED):
            hint = " Dify apps can't do that; ask a model provider directly."
        raise NotFound(f"Invalid URL ({request.method} {path}).{hint}")
    method = "GET" if request.method == "HEAD" else request.method
    if method not in methods:
        allowed = ", ".join(methods)
        error = MethodNotAllowed(f"{request.method} is not allowed; use {allowed}.")
        error.headers.append(("Allow", allowed))
        raise error
    exchange.route, exchange.key = endpoint, _client_key(request.headers)
    if endpoint not in OPEN_ENDPOINTS:
        exchange.owner = site.check_key(exchange.key, exchange.peer)
    return methods[method]


# ==============================================================================
# 17. Server
# ==============================================================================
#
# Accepts connections and runs their requests one after another; the only place that
# turns exceptions into responses. Knows nothing of what Dify and OpenAI say.
#
# After an error a connection is kept only if the request was read to its end and the
# response written to its end; then it is as good as new. Else it is closed, after a
# pause in which what the client still sends is thrown away: closing at once would reset
# the connection, and the client might never see the response.
#
#     idle -> head -> body -> handler -> idle     [_wait_for_request, _serve_one]
#     any -> closed                               [EOF, a deadline, an error, drain]

IDLE_TIMEOUT_S = 75.0  # longer than nginx's 60 s, so that nginx closes first
HEAD_TIMEOUT_S = 30.0
BODY_TIMEOUT_S = 60.0  # between two reads
# The backlog that asyncio is given is also how many connections it accepts in a row,
# and how often it fails when descriptors are used up. So it gets a small one, and a
# second `listen` sets the real one. (Neither is so on Windows.)
ACCEPTS_AT_ONCE, BACKLOG = 16, 2048
# What the kernel may hold for a client that is not on its way yet. It would take
# megabytes, and then no more until a third of them has gone: a client that reads slowly
# would seem not to read.
NOT_SENT_BYTES = 128 * 1024
# Between two reads of a request that was refused, and in all.
DISCARD_S, MAX_DISCARD_S = 2.0, 60.0
CANCEL_S = 2.0  # for what was cut to stop its runs in Dify, and for the background
DRAIN_S = 30.0  # Kubernetes kills after 30 s by default
_CORS_EXPOSED = (
    "x-request-id, retry-after, retry-after-ms, x-should-retry, openai-processing-ms, "
    "x-dify-conversation-id, x-dify-message-id, x-dify-workflow-run-id"
)
# Desktop apps and editor or browser extensions: pages that the user has installed.
_APP_PAGE = "file://"  # of Electron (Cherry Studio, Chatbox); in a browser it is "null"
_APP_SCHEMES = (
    *("app", "capacitor", "ionic", "lsp", "tauri", "vscode-file", "vscode-webview"),
    *("chrome-extension", "moz-extension", "safari-web-extension"),
)


class Listener:
    """Accepts connections, and serves each in a task of its own."""

    def __init__(self) -> None:
        self.is_local = True  # only this machine can reach it
        self._tasks: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.base_events.Server] = []

    async def listen(self, host: str, port: int) -> list[tuple[str, int]]:
        """Begin to accept; returns the real addresses. Raises OSError."""
        create_server = asyncio.get_running_loop().create_server
        backlog = BACKLOG if sys.platform == "win32" else ACCEPTS_AT_ONCE
        make_wire = functools.partial(Wire, self._accept)
        bind = functools.partial(create_server, make_wire, host, port, backlog=backlog)
        try:
            server = await bind()
        except OSError as error:
            # `localhost` may have an IPv6 address though the system has no IPv6. Python
            # 3.13 passes over what is not there, earlier ones fail.
            if error.errno != errno.EADDRNOTAVAIL or ":" in host:
                raise
            server = await bind(family=socket.AF_INET)
        if not server.sockets:  # asyncio passes over kinds that the system lacks
            raise OSError("the system has no addresses of this kind")
        self._servers.append(server)
        addresses = [socket_.getsockname()[:2] for socket_ in server.sockets]
        self.is_local &= all(is_loopback(host) for host, _ in addresses)
        for socket_ in server.sockets:
            with socket.fromfd(socket_.fileno(), socket_.family, socket_.type) as twin:
                twin.setblocking(False)  # on PyPy `fromfd` makes both of them block
                twin.listen(BACKLOG)
                # Not on Windows, nor where a kernel is imitated (gVisor, WSL 1).
                with contextlib.suppress(AttributeError, OSError):
                    option = (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
                    twin.setsockopt(*option, NOT_SENT_BYTES)
        return addresses

    async def stop(self, grace_s: float) -> bool:
        """Stop accepting, let connections end; whether all of them did in time."""
        for socket_ in [each for server in self._servers for each in server.sockets]:
            # asyncio makes an accepted connection's transport in the next round, and
            # fails if its server is closed then (CPython's issue 109564).
            with contextlib.suppress(NotImplementedError):  # Windows
                asyncio.get_running_loop().remove_reader(socket_.fileno())
        await asyncio.sleep(0)
        for server in self._servers:
            server.close()
        await _wait_for_end(self._tasks, grace_s)
        late = [task for task in self._tasks if not task.done()]
        for task in late:
            task.cancel()
        await _wait_for_end(late, CANCEL_S)
        return not late

    def _accept(self, wire: Wire) -> None:
        task = asyncio.ensure_future(self.serve(wire))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def serve(self, wire: Wire) -> None:
        """One connection, from its first byte to its last."""
        raise NotImplementedError


class Server(Listener):
    """Listens, serves, and drains.

    Args:
        site: what the handlers share.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        self._site = site
        self.before_request: Callable[[], None] = lambda: None  # reads settings anew
        self._idle: set[Wire] = set()
        self._refused: set[Wire] = set()  # beyond MAX_CONNECTIONS, and as many at most
        self._is_draining = False

    async def drain(self, grace_s: float = DRAIN_S) -> bool:
        """Stop accepting, let running requests end; whether all of them did."""
        self._is_draining = True
        for wire in self._idle:
            wire.wake()
        for exchange in self._site.in_flight:
            exchange.reply.must_close = True
        is_in_time = await self.stop(grace_s)
        await _wait_for_end(self._site.dify.background, CANCEL_S)
        return is_in_time

    async def serve(self, wire: Wire) -> None:
        """One connection, from its first byte to its last."""
        try:
            self.before_request()  # MAX_CONNECTIONS may have been raised
            most = self._site.dify.settings.max_connections
            if len(self._tasks) - len(self._refused) > most:
                exchange = Exchange(Reply(wire), self._site.new_id(), wire.peer)
                error = Overloaded("Too many connections (MAX_CONNECTIONS).")
                self._refuse(exchange, error)
                if len(self._refused) < most:  # the others may not see the response
                    self._refused.add(wire)
                    await _make_ready(exchange, wire)
                return
            while await self._wait_for_request(wire) and await self._serve_one(wire):
                pass
        except (ConnectionBroken, ProxyError):
            pass  # it was told before
        finally:
            self._refused.discard(wire)
            wire.close()

    async def _serve_one(self, wire: Wire) -> bool:
        """One request and its response; whether another may follow."""
        exchange = Exchange(Reply(wire), self._site.new_id(), wire.peer)
        wire.set_deadline(HEAD_TIMEOUT_S, _slow_request)
        self._site.in_flight.add(exchange)
        try:
            await self._answer(exchange, wire)
        except ConnectionBroken:
            raise
        except asyncio.CancelledError:
            if not exchange.has_left:
                self._refuse(exchange, Overloaded("OpenDify is shutting down."))
            raise
        except ProxyError as error:
            self._refuse(exchange, error)
            _drop_frames(error)
        except Exception:
            log.exception("a bug, in request %s", exchange.id)
            self._refuse(exchange, ProxyError("OpenDify failed; its log says more."))
        finally:
            self._site.in_flight.discard(exchange)
            wire.on_leave = None
            self._record(exchange)
            # They refer back to it: a long question would wait for garbage collection.
            exchange.fail, exchange.turn, exchange.outlets = None, None, []
        return await _make_ready(exchange, wire)

    async def _wait_for_request(self, wire: Wire) -> bool:
        """Wait for the next request; False if none will come."""
        if wire.unread:  # it was sent ahead: first let others have their turn
            await asyncio.sleep(0)
        self._idle.add(wire)
        wire.set_deadline(IDLE_TIMEOUT_S, ConnectionBroken)
        try:
            while not skip_empty_lines(wire):
                if self._is_draining or not await wire.wait_for_data():
                    return False
            return True
        finally:
            self._idle.discard(wire)

    async def _answer(self, exchange: Exchange, wire: Wire) -> None:
        """Read the request, check who sends it, and let its handler reply."""
        reply = exchange.reply
        reply.request = request = parse_request_head(await read_head(wire))
        reply.must_close = self._is_draining
        exchange.decoder = decoder = body_decoder(request.headers, until_end=False)
        self.before_request()
        _check_origin(request, self._site.dify.settings, is_local=self.is_local)
        reply.headers += _cors_headers(request)
        if request.method == "OPTIONS":
            reply.send(204, b"", _preflight(request))
            return
        handler = authorized_handler(self._site, exchange)
        wire.on_leave = exchange.leave
        exchange.read = self._body_reader(request, wire, decoder)
        value = await handler(self._site, exchange)
        if value is not None:
            send_json(reply, value)
        await reply.drain()  # it is over when the client has it

    def _body_reader(self, request: Request, wire: Wire, body: BodyDecoder) -> Read:
        """What reads the request's body; the client is told to send it."""
        got, metrics = 0, self._site.metrics
        most_mb = self._site.dify.settings.max_body_mb
        wire.clear_deadline()  # the head was in time
        if COMPRESSED.search(request.headers.get("content-encoding", "")):
            raise UnsupportedCoding("Send the body without a Content-Encoding.")
        _check_size(int(request.headers.get("content-length", 0)), most_mb)
        if request.expects_continue and not body.is_complete:
            wire.write(b"HTTP/1.1 100 Continue\r\n\r\n")

        async def read() -> bytes:
            nonlocal got
            if body.is_complete:
                return b""
            wire.set_deadline(BODY_TIMEOUT_S, _slow_request)
            data = await read_body(wire, body)
            wire.clear_deadline()
            metrics.count("opendify_bytes_total", len(data), direction="in")
            got += len(data)
            _check_size(got, most_mb)
            return data

        return read

    def _refuse(self, exchange: Exchange, error: ProxyError) -> None:
        """The error as a response, or as the end of one that has begun."""
        reply = exchange.reply
        exchange.explain(error)
        # A client that waits for a 100 may send its next request in place of the body.
        is_whole = exchange.decoder is None or exchange.decoder.is_complete
        waits = exchange.request.expects_continue and not is_whole
        reply.must_close |= waits or isinstance(error, _LAST_ERRORS)
        kind = type(error)
        level = logging.WARNING if error.status >= 500 else logging.INFO
        told = self._site.masked(error.for_log)
        log.log(level, "%s: %s id=%s", kind.__name__, told, exchange.id)
        if issubclass(kind, _UPSTREAM_ERRORS):  # an error's own code may be any text
            self._site.metrics.count("opendify_upstream_errors_total", kind=kind.code)
        if not reply.status:
            send_json(reply, error_body(error), error_headers(error), error.status)
        elif exchange.fail and not reply.is_complete:
            reply.end(exchange.fail(error))

    def _record(self, exchange: Exchange) -> None:
        """One line for each request, never a key or a text; and the metrics."""
        metrics, reply = self._site.metrics, exchange.reply
        took_s = asyncio.get_running_loop().time() - exchange.started_at
        metrics.observe("opendify_request_seconds", took_s)
        path = self._site.masked(reply.request.path)
        told = [reply.request.method, path, str(reply.status or "-")]
        if exchange.model:
            told.append(f"model={exchange.model!r}")
        if exchange.first_text_at is not None:
            waited_s = exchange.first_text_at - exchange.started_at
            metrics.observe("opendify_first_text_seconds", waited_s)
            told.append(f"first={waited_s:.3f}s")
        told.append(f"took={took_s:.3f}s")
        if exchange.text_chars:
            told.append(f"chars={exchange.text_chars}")
        if exchange.has_left:
            told.append("client-left")
        log.info("%s id=%s", " ".join(told), exchange.id)
        route, model, status = exchange.route, exchange.model, reply.status or "none"
        metrics.count(
            "opendify_requests_total", route=route, model=model, status=status
        )
        metrics.count("opendify_bytes_total", reply.body_bytes, direction="out")


def _slow_request() -> ProxyError:
    return RequestTimeout("The request took too long to arrive.")


_UPSTREAM_ERRORS = (UpstreamFailed, UpstreamTimeout, RateLimited, QuotaExceeded)
# After these nobody knows where the next request begins.
_LAST_ERRORS = (MalformedHTTP, RequestTimeout)


def _drop_frames(error: BaseException | None) -> None:
    """Let go of what an error was raised through, which holds it and the request.

    Else a long question would wait for garbage collection.
    """
    while error:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _check_size(body_bytes: int, most_mb: int) -> None:
    if body_bytes > most_mb << 20:
        raise BodyTooLarge(f"The body is over {most_mb} MiB (MAX_BODY_MB).")


async def _make_ready(exchange: Exchange, wire: Wire) -> bool:
    """Have the reply taken, and throw away what is left of the request.

    However much that is, over a slow line too: Node's `fetch`, Python's `urllib` and
    Apache would lose the reply to a reset.

    Returns:
        Whether the connection may go on.
    """
    reply, body = exchange.reply, exchange.decoder or BodyDecoder(-1)
    await reply.drain()
    now = asyncio.get_running_loop().time
    until = now() + MAX_DISCARD_S
    while not body.is_complete and now() < until:
        if body.failure:
            body = BodyDecoder(-1)  # nobody knows what belongs to it
        wire.set_deadline(DISCARD_S, ConnectionBroken)
        with contextlib.suppress(MalformedHTTP):  # then `body` has a failure
            await read_body(wire, body)
    return body.is_complete and reply.is_complete and not reply.must_close


def _check_origin(request: Request, settings: Settings, *, is_local: bool) -> None:
    """Refuse what a foreign web page makes the browser of a user send.

    The Origin tells whose page it is. But a page can also reach 127.0.0.1 under a name
    of its own that resolves there (DNS rebinding), and so seem to be ours: the Host
    gives it away where only this machine should reach the server. In HTTP/1.0, which no
    browser speaks, there may be none: HAProxy's health checks have none.

    Raises:
        Forbidden: the request is another page's.
        BadRequest: its Host is empty.
    """
    origin, host = request.headers.get("origin"), request.headers.get("host", "")
    is_private = is_local and not settings.valid_api_keys and "host" in request.headers
    if origin is None and not is_private:
        return
    allowed = [entry.rstrip("/").lower() for entry in settings.allowed_origins]
    name = _host_name(host)
    if is_private and not name:
        raise BadRequest("The request has no Host header.")
    hosts = (_host_name(entry.partition("://")[2]) for entry in allowed)
    if is_private and not (is_loopback(name) or "*" in allowed or name in hosts):
        raise Forbidden(
            f"The host {name!r} is not this server's. If it is meant, add "
            f"http://{name} to ALLOWED_ORIGINS, or set VALID_API_KEYS."
        )
    if origin is None:
        return
    # Without keys a domain may be a stranger's that resolves here: to a container, say.
    is_own = bool(settings.valid_api_keys or "." not in name or is_address(name))
    own = host.lower() if is_own else ""
    if not _is_allowed(origin.lower(), own, allowed):
        raise Forbidden(
            f"Pages of {origin!r} may not call this server; add it to ALLOWED_ORIGINS."
        )


@functools.lru_cache(maxsize=64)
def _host_name(host: str) -> str:
    """A Host header without its port."""
    return re.sub(r":\d*\Z", "", host.lower())


def _is_allowed(origin: str, host: str, allowed: Sequence[str]) -> bool:
    """Whether pages of an origin may call: our own, local ones, apps, those listed."""
    scheme, _, rest = origin.partition("://")
    if "*" in allowed or origin in (_APP_PAGE, *allowed):
        return True
    if scheme in ("http", "https"):
        is_one = re.fullmatch(r"[\w.:\[\]-]+", rest, re.ASCII) is not None
        return is_one and (is_loopback(_host_name(rest)) or rest == host)
    return scheme in _APP_SCHEMES and bool(rest)


def _cors_headers(request: Request) -> list[tuple[str, str]]:
    """Headers that let a page which may call read the response, errors included."""
    origin = request.headers.get("origin")
    if origin is None:
        return []
    return [
        ("Access-Control-Allow-Origin", origin),
        ("Access-Control-Expose-Headers", _CORS_EXPOSED),
        ("Vary", "Origin"),
    ]


def _preflight(request: Request) -> list[tuple[str, str]]:
    names = request.headers.get("access-control-request-headers", "")
    headers = [
        ("Access-Control-Allow-Methods", "GET, POST, DELETE, OPTIONS"),
        ("Access-Control-Max-Age", "86400"),
    ]
    if re.match(r"[\w, -]+\Z", names, re.ASCII):
        headers.append(("Access-Control-Allow-Headers", names))
    if request.headers.get("access-control-request-private-network") == "true":
        headers.append(("Access-Control-Allow-Private-Network", "true"))
    return headers


async def _wait_for_end(tasks: Collection[asyncio.Task[Any]], seconds: float) -> None:
    """Wait until all tasks have ended, but not for longer than that."""
    if tasks:
        await asyncio.wait(tasks, timeout=seconds)


# ==============================================================================
# 18. Page
# ==============================================================================
#
# What a browser shows at /: the apps, the settings of clients, and a playground. No
# external resource, and a policy that names its style and its script by their hashes.
# What comes from elsewhere becomes text, links and images by DOM calls, never HTML.
# The forms have the method "dialog", but no dialog: to submit one loads no page.
# The script is a client like any other, but asks by X-OpenDify-Lag for the lag of each
# piece, which comes as a comment before it: `: lag 0.1`.

_STYLE = """
:root { color-scheme: light; --page: light-dark(#f4f6f5, #101415); --card:
light-dark(#fff, #191f20); --text: light-dark(#1b2422, #e5ebe9); --soft:
light-dark(#56635f, #9fada9); --line: light-dark(#dce3e0, #2d3739); --edge:
light-dark(#7f8c88, #6f7d79); --good: light-dark(#0b6b5b, #5ed1b9); --warm:
light-dark(#a8480a, #f2ad62); --bad: light-dark(#b3261e, #ff9d92) }
:root:has(#theme:checked) { color-scheme: dark } * { box-sizing: border-box; margin: 0;
padding: 0; font: inherit; color: inherit } #door[hidden] { display: none } body {
background: var(--page); color: var(--text); max-width: 84rem; margin: auto; padding: 0
1rem 2rem; overflow-wrap: anywhere; font: 1rem/1.6 system-ui, "Noto Sans CJK SC",
"Microsoft YaHei", sans-serif } h1, h2, b, dd { font-weight: 600 } h1 { font-size:
1.4rem; padding: 1.1rem 0 } h2, dd { font-size: 1.1rem } .bar, label, dl { display:
flex; flex-wrap: wrap; gap: .5rem .9rem; align-items: center } label { flex-wrap:
nowrap; gap: .5rem; min-width: 0 } .bar > :first-child { margin-right: auto } small, dt,
.bar button, pre, code { font-size: .85rem; font-weight: 400 } small, #hint, details {
color: var(--soft) } main small { display: block } main, section, #apps, #talk, .answer
{ display: grid; gap: .9rem } main { gap: 1.25rem; align-items: start } section {
min-width: 0; background: var(--card); border: 1px solid var(--line); border-radius:
.9rem; padding: 1.25rem; align-content: start } button, select, textarea, input {
border: 1px solid var(--edge); border-radius: .55rem; background: var(--card); padding:
.35rem .7rem; min-width: 0; accent-color: var(--good) } button { cursor: pointer } #send
{ background: var(--good); color: var(--card); padding: .6rem 1.2rem } :focus-visible {
outline: 3px solid var(--good); outline-offset: 2px } a { color: var(--good) } code, pre
{ font-family: ui-monospace, Menlo, Consolas, monospace } pre, .user, svg { background:
var(--page); border-radius: .55rem; padding: .6rem .9rem } pre, .user, .text {
white-space: pre-wrap } .user, .text, textarea { unicode-bidi: plaintext } #apps {
max-height: 22rem; overflow: auto; list-style: none } li, details, .error, dl div {
padding-left: .8rem; border-left: 4px solid var(--line) } .good, #pieces { border-color:
var(--good) } .bad { border-color: var(--bad) } .bad small, .error { color: var(--bad) }
#lag { border-color: var(--warm) } #log { height: 25rem; overflow: auto; display: flex;
flex-direction: column-reverse } #talk { margin-bottom: auto; padding: .2rem } .user {
justify-self: end; max-width: 85% } img { display: block; max-width: 100%; max-height:
20rem; border-radius: .55rem } #ask { display: flex; gap: .6rem; align-items: end } #ask
label { flex: 1; display: grid; gap: .2rem } svg { width: 100%; height: 7rem; padding: 0
} path { fill: none; vector-effect: non-scaling-stroke; stroke-width: 2 } #bars { fill:
var(--good); opacity: .5 } #lags { stroke: var(--warm) } #first { stroke: var(--soft);
stroke-dasharray: 4 4 } select { max-width: 9rem } label span { flex: none } dl {
font-variant-numeric: tabular-nums } #said { position: absolute; width: 1px; height:
1px; overflow: hidden; clip-path: inset(50%) } @media (min-width: 60rem) { main { grid:
auto 1fr / 23rem 1fr } #play { grid-area: 1 / 2 / 3 } }
"""
_BODY = """
<!doctype html><html lang="en" data-key="@KEY@"><head><meta charset="utf-8"><meta
name="viewport" content="width=device-width, initial-scale=1"><link rel="icon"
href="data:,"><title>OpenDify</title><style>@STYLE@</style></head><body><header
class="bar"><h1>OpenDify <small>@VERSION@</small></h1><label><input id="theme"
type="checkbox"><span data-zh="深色">Dark</span></label></header><main><section
aria-labelledby="h1"><div class="bar"><h2 id="h1" data-zh="应用">Apps</h2><button
id="again" data-zh="重新检查">Check again</button></div><form id="door" method="dialog"
class="bar" hidden><label><span data-zh="API 密钥">API key</span><input id="key"
type="password" autocomplete="off" required></label><button data-zh="继续">Go
on</button></form><ul id="apps" tabindex="0" aria-labelledby="h1"
aria-live="polite"></ul></section><section id="play" aria-labelledby="h2"><div
class="bar"><h2 id="h2" data-zh="试用">Playground</h2><label><span
data-zh="模型">Model</span><select id="model"></select></label><label><input id="smooth"
type="checkbox" checked><span data-zh="平滑输出">Smoothing</span></label><button
id="clear" data-zh="新对话">New chat</button></div><div id="log" role="log"
aria-live="off" tabindex="0" aria-labelledby="h2"><div id="talk"><p id="hint"
data-zh="按 Enter 发送，Shift+Enter 换行，Esc 停止。">Enter sends, Shift+Enter breaks
the line, Esc stops.</p></div></div><form id="ask" method="dialog"><label><small
data-zh="消息">Message</small><textarea id="text" rows="2"></textarea></label><button
id="send" data-zh="发送">Send</button></form><svg viewBox="0 0 600 100"
preserveAspectRatio="none" aria-hidden="true"><path id="bars"/><path id="lags"/><path
id="first"/></svg><dl><div><dt data-zh="首字时间">First text</dt><dd
id="n0">–</dd></div><div id="pieces"><dt data-zh="每秒段数">Pieces/s</dt><dd
id="n1">–</dd></div><div id="lag"><dt data-zh="平滑延迟">Lag</dt><dd
id="n2">–</dd></div></dl></section><section aria-labelledby="h3"><h2 id="h3"
data-zh="连接客户端">Connect a client</h2><div class="bar"><div><small
data-zh="接口地址">Base URL</small><code id="base"></code></div><button
data-copy="base"></button></div><div class="bar"><label><span
data-zh="客户端">Client</span><select id="client"></select></label><button
data-copy="settings"></button></div><pre id="settings"></pre></section></main><p
id="said" role="status"></p><script type="module">@SCRIPT@</script></body></html>
"""
_SCRIPT = r"""
const $ = (id) => document.getElementById(id), now = () => performance.now() / 1000;
const base = new URL("v1", location.href).href, root = document.documentElement;
const zh = navigator.language.startsWith("zh"), talk = $("talk"), hint = $("hint");
const copiers = document.querySelectorAll("[data-copy]");
const say = (english, chinese) => zh ? chinese : english;
const CLIENTS = { "Open WebUI": "OPENAI_API_BASE_URL=<v1>\nOPENAI_API_KEY=<key>",
  LobeChat: "OPENAI_PROXY_URL=<v1>\nOPENAI_API_KEY=<key>\nOPENAI_MODEL_LIST=-all,+<id>",
  NextChat: "BASE_URL=<host>\nOPENAI_API_KEY=<key>\nCUSTOM_MODELS=-all,+<id>",
  "Cherry Studio": "API Host: <host>\nAPI Key: <key>\nModel ID: <id>",
  Chatbox: "API Mode: OpenAI\nAPI Host: <host>\nAPI Key: <key>\nModel: <id>",
  Continue: `name: OpenDify\nversion: 1.0.0\nschema: v1\nmodels:\n  - name: <json>
    model: <json>\n    provider: openai\n    apiBase: <v1>\n    apiKey: "<key>"`,
  "openai-python": 'client = OpenAI(base_url="<v1>", api_key="<key>")',
  curl: `curl <v1>/chat/completions -H 'Authorization: Bearer <key>' \\
  -H 'Content-Type: application/json' -d '{"model": <json>,
  "messages": [{"role": "user", "content": "Hello"}]}'` };
const LABEL = /(!?)\[((?:\\.|[^\]\\]){0,300})\]/.source; // else "[[[…" takes minutes
const TO = /((?:https?:\/\/|data:image\/)[^\s()]*(?:\([^\s()]*\)[^\s()]*)*)/.source;
const LINK = RegExp(`${LABEL}\\(${TO}\\)`);
let key, past = [], run = {};
try { key = sessionStorage.getItem("api-key"); } catch { } // of blocked cookies
const make = (tag, content, fields) => {
  const node = Object.assign(document.createElement(tag), fields);
  return node.append(...[content].flat().filter(Boolean)), node;
};
const link = (text, href) => make(href ? "a" : "b", text, { href, target: "_blank" });
const prose = (raw) => raw.split(LINK).map((part, i, { [i - 2]: sign, [i - 1]: to }) =>
  i % 4 < 3 ? i % 4 ? "" : part : sign ? make("img", [], { alt: to, src: part }) :
    link(to.replace(/\\(.)/g, "$1") || part, part));
const render = (raw) => raw.split(/^ *```[^`\n]*\n([^]*?)^ *```.*\n?/m).flatMap(
  (part, i) => i % 2 ? make("pre", part) : prose(part));
const fault = (error, ...facts) => Error([error?.message, ...facts,
  error?.code || error?.type].filter(Boolean).join(" · "));
const told = ({ name, message }) => name !== "TypeError" ? message :
  say("OpenDify can't be reached.", "无法连接 OpenDify。");
async function call(path, options = {}) {
  if (key) options.headers = { ...options.headers, Authorization: `Bearer ${key}` };
  const response = await fetch(base + path, options);
  if (response.ok) return response;
  if (response.status === 401) openDoor();
  const { error } = await response.json().catch(() => ({}));
  throw fault(error, `HTTP ${response.status}`, response.headers.get("x-request-id"));
}
const openDoor = () => { // a wrong key is typed over
  $("door").hidden = false, $("key").focus(), $("key").select();
};
const list = async (path) => (await (await call(path)).json()).data;
async function load() {
  if (root.dataset.key && !key) return openDoor();
  try {
    const ids = (await list("/models")).map(({ id }) => id), was = $("model").value;
    $("model").replaceChildren(...ids.map((id) => make("option", id)));
    if (ids.includes(was)) $("model").value = was;
    if (!$("door").hidden) $("door").hidden = true, $("text").focus();
    showSettings(), showApps(ids.map((id) => ({ id }))), showApps(await list("/apps"));
  } catch (error) {
    $("apps").replaceChildren(make("li", told(error), { className: "error" }));
  }
}
const showApps = (apps) => $("apps").replaceChildren(...apps.map((app) => {
  const { id, name, mode, error } = app, className = error ? "bad" : mode ? "good" : "";
  const is = mode ? say("ready", "正常") : say("checking…", "检查中…");
  const facts = error || [name !== id && name, mode, is].filter(Boolean).join(" · ");
  return make("li", [make("b", id), make("small", facts)], { className });
}), apps.length ? "" : make("li", say("No app is configured.", "没有配置应用。")));
function showSettings() {
  const id = $("model").value || "MODEL", secret = root.dataset.key || "any";
  const json = JSON.stringify(id).replaceAll("'", "\\u0027"); // for the shell
  const values = { v1: base, host: base.slice(0, -3), id, json };
  $("settings").textContent = CLIENTS[$("client").value].replace(/<(\w+)>/g,
    (all, name) => values[name] || secret);
  for (const button of copiers) button.textContent = say("Copy", "复制");
}
function draw() { // bars: pieces per second; line: lag; dashes: the first text
  const { pieces, lags, from } = run, counts = {}, last = pieces.length - 1;
  const x = 600 / Math.max(5, now() - from), top = Math.min;
  for (const at of pieces) counts[at * 4 | 0] = (counts[at * 4 | 0] || 0) + 1;
  const plot = (id, paths) => $(id).setAttribute("d", paths.join(""));
  plot("bars", Object.entries(counts).map(([at, count]) =>
    `M${at / 4 * x} 100v${-top(count * 6, 98)}h${x / 4 - 1}V100z`));
  plot("lags", lags.map(([at, s], i) => "ML"[+!!i] + [at * x, 98 - top(s, .5) * 190]));
  plot("first", pieces.slice(0, 1).map((at) => `M${at * x} 0V100`));
  const lag = lags.reduce((sum, row) => sum + row[1], 0) / (lags.length || 1);
  const took = pieces[last] - pieces[0]; // too short a time tells no rate
  $("n0").textContent = last < 0 ? "–" : pieces[0].toFixed(2) + " s";
  $("n1").textContent = took >= .25 ? Math.ceil(last / took) : "–";
  $("n2").textContent = last < 0 ? "–" : lag.toFixed(2) + " s";
}
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", got; !(got = await reader.read()).done;) {
    const events = (rest + got.value).split("\n\n");
    rest = events.pop(); yield* events;
  }
}
async function chat(question) {
  if (!question) return;
  const text = make("div", [], { className: "text" }), thought = text.cloneNode();
  const thinking = make("details", [make("summary", say("Thinking", "思考")), thought]);
  const answer = make("div", [thinking, text], { className: "answer" });
  hint.remove(), talk.append(make("div", question, { className: "user" }), answer);
  $("text").value = "", $("log").scrollTop = 0; // which is its end
  const messages = [...past, { role: "user", content: question }];
  const body = JSON.stringify({ model: $("model").value, messages, stream: true });
  const headers = { "Content-Type": "application/json", "X-OpenDify-Lag": "on",
    "X-OpenDify-Smoothing": $("smooth").checked ? "on" : "off" };
  const mine = run = { pieces: [], lags: [], from: now(), stop: new AbortController() };
  let end, said = "", timer = setInterval(draw, 100), clock = () => now() - mine.from;
  $("send").textContent = say("Stop", "停止"), thinking.hidden = thinking.open = true;
  try {
    const options = { method: "POST", headers, body, signal: mine.stop.signal };
    for await (const event of eventsOf(await call("/chat/completions", options))) {
      if (event.startsWith(": lag ")) mine.lags.push([clock(), +event.slice(6)]);
      if (!event.startsWith("data: {")) continue;
      const { error, choices: [choice] = [] } = JSON.parse(event.slice(6));
      if (error) throw fault(error);
      const { content, reasoning_content: reasoning } = choice.delta;
      if (content || reasoning) mine.pieces.push(clock());
      if (reasoning) thinking.hidden = false, thought.append(reasoning);
      if (content) thinking.open &&= said > "", said += content, text.append(content);
      if (choice.finish_reason) end = choice.delta;
    }
    if (!end) throw Error(say("The answer broke off.", "回答中断了。"));
    past = [...messages, { role: "assistant", content: said }];
    text.replaceChildren(...render(said)), $("said").textContent = said;
    const links = (end.annotations || []).map((link) => link.url_citation);
    const sources = (end.citations || []).map(({ title, document_name, content }) => {
      const name = title || document_name, to = links[0]?.url; // in the same order
      const href = to && links[0].title === (name || to) ? links.shift().url : "";
      return make("p", [link(name || href, href), make("small", content)]);
    });
    sources.unshift(make("summary", say("Sources", "引用来源")));
    if (sources[1]) answer.append(make("details", sources));
  } catch (error) {
    const why = told(mine.stop.signal.reason || error);
    answer.append(make("p", why, { className: "error", role: "alert" }));
    if (answer.isConnected) $("text").value ||= question; // not after "New chat"
  }
  clearInterval(timer), mine.stop = undefined, draw();
  $("send").textContent = say("Send", "发送");
}
const stop = () => run.stop?.abort(Error(say("Stopped.", "已停止。")));
if (zh) for (const node of document.querySelectorAll("[data-zh]"))
  node.textContent = node.dataset.zh;
for (const button of copiers) button.onclick = () => {
  showSettings(); // no other button says any more that its text is copied
  getSelection().selectAllChildren($(button.dataset.copy));
  document.execCommand("copy"); // since plain http has no `navigator.clipboard`
  $("said").textContent = button.textContent = say("Copied", "已复制");
};
$("ask").onsubmit = () => { run.stop ? stop() : chat($("text").value.trim()); };
$("text").onkeydown = (event) => {
  if (event.keyCode !== 13 || event.shiftKey) return; // an input method's is 229
  event.preventDefault(), run.stop || $("ask").requestSubmit();
};
$("door").onsubmit = () => {
  key = $("key").value.replace(/[^ -~]/g, "?"); // a header takes no others
  load(), sessionStorage.setItem("api-key", key); // if it can be kept
};
onkeydown = (event) => { if (event.keyCode === 27) stop(); };
$("clear").onclick = () => {
  stop(), past = [], talk.replaceChildren(hint), $("text").focus();
};
$("model").onchange = $("client").onchange = showSettings, $("again").onclick = load;
$("theme").checked = matchMedia("(prefers-color-scheme: dark)").matches;
$("client").append(...Object.keys(CLIENTS).map((name) => make("option", name)));
root.lang = say("en", "zh-CN"), $("base").textContent = base, showSettings();
$("text").focus({ preventScroll: true }), load();
"""


def _hash_of(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


_POLICY = (
    f"default-src 'none'; style-src {_hash_of(_STYLE)}; script-src {_hash_of(_SCRIPT)}"
    "; connect-src 'self'; img-src https: http: data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)


async def show_page(site: Site, exchange: Exchange) -> None:
    """`GET /`; the page asks for a key at once if it will need one."""
    key = "YOUR-KEY" if site.dify.settings.valid_api_keys else ""
    text = _BODY.replace("@KEY@", key).replace("@VERSION@", __version__)
    text = text.replace("@STYLE@", _STYLE).replace("@SCRIPT@", _SCRIPT)
    headers = [
        ("Content-Type", "text/html; charset=utf-8"),
        ("Content-Security-Policy", _POLICY),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
    ]
    exchange.reply.send(200, text.encode(), headers)


ROUTES["/"] = {"GET": show_page}


# ==============================================================================
# 19. Command line
# ==============================================================================
#
# Arguments, the env file, logging, signals, the self-check and the demo app. The only
# room that reads the environment and files. Exit status: 0 after a clean stop, 1 if
# something could not be done or was cut short, 2 for bad usage or settings.

MAX_DESCRIPTORS = 65_536
NEW_OBJECTS = 5000  # that may hold others, until Python looks for cycles among them
REOPEN_S = 0.2  # until a port that was lost is opened again
CHECKS_AT_ONCE = 4  # Dify's default server has ten connections in all
ASK_S = 300.0  # that an app may take to answer one word
_AT_START = ("server_", "log_", "conversation_")  # settings read only at the start
_NOTHING_CONFIGURED = """\
No Dify app is configured. Either

  configure one: write a file named .env with these two lines, and start again
      MODEL_CONFIG={"my-model": "app-YOUR-KEY"}
      DIFY_API_BASE=https://api.dify.ai/v1

  or look around first, without Dify:
      python opendify.py --demo"""


def build_parser() -> argparse.ArgumentParser:
    """The arguments, with settings by their names; the help ends with all of these."""
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
        add_help=False,  # it would be printed without `_show`, and so would a version
    )
    add = parser.add_argument
    add("-h", "--help", action="store_true", help="show this help, and exit")
    add("--host", dest="SERVER_HOST", help="address to listen on")
    add("--port", dest="SERVER_PORT", help="port to listen on")
    add("--env-file", metavar="FILE", help="read this instead of .env")
    add("--log-level", dest="LOG_LEVEL", help="DEBUG, INFO, WARNING or ERROR")
    add("--check", action="store_true", help="check settings and apps, and exit")
    add("--ask", action="store_true", help="with --check: ask each app for one word")
    add("--demo", action="store_true", help="serve a built-in app, without any Dify")
    add("--version", action="store_true", help="show the version, and exit")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run OpenDify; returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _status_of(argv)
    except KeyboardInterrupt:
        return 1
    finally:
        _show(end="", stream=sys.stderr)  # what the log could not write


def _status_of(argv: Sequence[str] | None) -> int:
    """Do what the arguments ask for; returns the exit status."""
    parser = build_parser()
    try:
        options = parser.parse_args(argv)
        if options.help or options.version:
            _show(parser.format_help() if options.help else f"OpenDify {__version__}")
            return 0
        if options.ask and not options.check:
            parser.error("--ask belongs to --check: say --check --ask")
    except OSError:  # in older Pythons, if nobody reads what it complains of
        return 2
    return asyncio.run(_run(options))


def _show(text: str = "", *, end: str = "\n", stream: IO[str] | None = None) -> None:
    """Print it; from the first failure on, what is printed goes nowhere.

    A pipe that nobody reads any more (`--check | head`) and a full disk are no reason
    for a traceback, nor for another exit status: what Python still holds to be
    written would fail again at its exit.
    """
    try:
        print(text.rstrip("\n"), end=end, file=stream, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, (stream or sys.stdout).fileno())
        os.close(nowhere)


class SettingsSource:
    """Where settings come from: arguments over environment over the env file."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.warnings: list[str] = []
        self.built_in: dict[str, AppSettings] = {}  # models beside those configured
        self._first: Settings | None = None
        # Those for settings have their names; `parse_settings` ignores the others.
        self._given = {k: v for k, v in vars(options).items() if v is not None}
        self._path = path = _find_env_file(options.env_file)
        # It may be a pipe. A named one is read in any case, to complain if it can't.
        is_there = os.path.exists(path) and not os.path.isdir(path)
        is_meant = is_there or options.env_file is not None
        self._content = _content_of(path) if is_meant else ("", "")
        self._looked_at = time.monotonic()

    def load(self) -> Settings:
        """The settings by the env file as last read; raises SettingsError."""
        self.warnings = []
        text, complaint = self._content
        if complaint:
            raise SettingsError(complaint)
        in_file = _variables_in(text, self._path)
        # A key that wrapped to a line of its own may end in "=", and is no name.
        names = [name for name, value in in_file.items() if value.strip("=")]
        self.warnings = unknown_variables(names)
        lower = {"https_proxy", "http_proxy", "no_proxy"} & {*os.environ}
        proxies = {name.upper(): os.environ[name] for name in lower}  # as curl has it
        settings = parse_settings({**in_file, **os.environ, **proxies, **self._given})
        models = {**settings.model_config, **self.built_in}
        settings = replace(settings, model_config=models)
        first = self._first = self._first or settings
        self.warnings += [
            f"{name.upper()} has changed: restart OpenDify, or put it back"
            for name, value in vars(settings).items()
            if name.startswith(_AT_START) and value != getattr(first, name)
        ]
        return settings

    def load_if_changed(self) -> Settings | None:
        """The settings if the env file has changed and is good; looks once a second.

        A bad value is reported, and a vanished file ignored: the last good settings
        stay.
        """
        now = time.monotonic()
        if now - self._looked_at < 1:
            return None
        self._looked_at, before = now, self._content
        if os.path.isfile(self._path):  # a pipe is read once
            self._content = _content_of(self._path)
        if self._content == before:
            return None
        try:
            settings = self.load()
            if not settings.has_apps:
                raise SettingsError(f"{self._path} has no app any more")
        except SettingsError as error:
            for complaint in [*self.warnings, *str(error).splitlines()]:
                log.error("%s (the settings stay as they were)", complaint)
            return None
        log.info("settings read anew: %s", _models_shown(settings))
        for warning in self.warnings:
            log.warning(warning)
        return settings


def _find_env_file(name: str | None) -> Path:
    """The one named, or .env in the working directory, or .env beside this file."""
    if name is not None:
        return Path(name)
    is_here = os.path.isfile(".env")  # False also where nobody may look; Path's raises
    return (Path() if is_here else Path(__file__).resolve().parent) / ".env"


def _content_of(path: Path) -> tuple[str, str]:
    """The env file's text, and why it can't be read, if so."""
    try:
        return path.read_text(encoding="utf-8-sig"), ""
    except (OSError, UnicodeDecodeError) as error:
        cure = "; save it as UTF-8" if isinstance(error, UnicodeError) else ""
        return "", f"{path} can't be read: {error}{cure}"


def _variables_in(text: str, path: Path) -> dict[str, str]:
    """The variables of an env file; raises SettingsError for a line that sets none.

    Nor may a setting's text have a reference to nothing, which would be left out of it.
    Without them VALID_API_KEYS might be empty, and let anyone in. The lines are not
    shown: they may hold a key.
    """
    bindings = [*env_parser.parse_stream(io.StringIO(text))]
    if lines := ", ".join(_line_of(b) for b in bindings if not _is_sound(b)):
        cure = "a value on several lines, or with quotes in it, needs single quotes"
        raise SettingsError(f"{path}: no NAME=value in line {lines}; {cure}")
    if lines := ", ".join(map(_line_of, _referring_to_nothing(bindings))):
        cure = "for that very text write ${:-$}{NAME}"
        raise SettingsError(f"{path}: a ${{NAME}} in line {lines} is not set; {cure}")
    values = dotenv_values(stream=io.StringIO(text))
    return {name: value or "" for name, value in values.items()}


_REFERENCE = re.compile(r"\$\{([^}:]*)(:-[^}]*)?\}")  # as python-dotenv reads it


def _referring_to_nothing(
    bindings: Iterable[env_parser.Binding],
) -> Iterator[env_parser.Binding]:
    """The settings with a `${NAME}` that neither the environment has nor a line above.

    Not those that the environment has, too; what else a file sets is for others, but
    with nothing in it, it is nothing to refer to.
    """
    known, settings = {*os.environ}, {variable for variable, _, _ in setting_rows()}
    settings -= known
    for binding in bindings:
        found = _REFERENCE.findall(binding.value or "")
        is_lost = any(not default and name not in known for name, default in found)
        if not is_lost:
            known.add(binding.key or "")
        elif binding.key in settings:
            yield binding


def _is_sound(binding: env_parser.Binding) -> bool:
    """Whether it sets a variable, or is a comment or blank."""
    if binding.key is None:
        return not binding.error
    return binding.value is not None and re.fullmatch(r"\w+", binding.key) is not None


def _line_of(binding: env_parser.Binding) -> str:
    """The number of its line; the parser counts blank ones before it as part of it."""
    text, line = binding.original
    return str(line + text[: -len(text.lstrip())].count("\n"))


class _Formatter(logging.Formatter):
    """A plain line for each record, or with `is_json` an object on one line."""

    def __init__(self, *, is_json: bool) -> None:
        super().__init__()
        self._is_json = is_json

    def format(self, record: logging.LogRecord) -> str:
        """The record; what could begin a line within its text is escaped (CWE-117)."""
        at = f"{_second_shown(int(record.created))},{int(record.msecs):03d}"
        level, message = record.levelname, record.getMessage()
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if self._is_json:  # in ASCII, whatever the log's encoding is
            value = {"time": at, "level": level, "message": message}
            return json.dumps({**value, "exception": trace} if trace else value)
        return f"{at} {level:7} {_printable(message)}" + ("\n" + trace if trace else "")


@functools.lru_cache(maxsize=1)
def _second_shown(second: int) -> str:
    """A time as a log line begins with it; made once a second."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join([c if c.isprintable() else ascii(c)[1:-1] for c in text])


def _set_up_logging(settings: Settings) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter(is_json=settings.log_format == "json"))
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)
    logging.raiseExceptions = False  # a full disk would be told in the log, in no form
    # What no line shows is not looked up ("Optimization" in Python's logging HOWTO).
    for name in ("logThreads", "logProcesses", "logMultiprocessing", "_srcfile"):
        setattr(logging, name, None)


def _watch_loop(server: Listener, stop: asyncio.Event) -> None:
    """Have the loop say that descriptors are used up, once a minute, not each time.

    On Windows asyncio closes a port for good when a client resets its connection before
    it is accepted (python/cpython#93821): here it is opened again, until `stop`.
    """
    said_at, reopening = -inf, set[asyncio.Task[None]]()

    async def reopen(host: str, port: int) -> None:
        await asyncio.sleep(REOPEN_S)
        while not stop.is_set():
            with contextlib.suppress(OSError):
                await server.listen(host, port)
                return
            await asyncio.sleep(REOPEN_S)

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal said_at
        error = context.get("exception")
        if context.get("message") == "Accept failed on a socket":
            host, port = context["socket"].getsockname()[:2]
            log.warning("port %d was closed (%s), and is opened again", port, error)
            reopening.add(asyncio.ensure_future(reopen(host, port)))
        elif not (isinstance(error, OSError) and error.errno in EXHAUSTED):
            loop.default_exception_handler(context)
        elif loop.time() - said_at > 60:
            said_at = loop.time()
            log.error("no descriptors are left: connections wait (raise `ulimit -n`)")

    asyncio.get_running_loop().set_exception_handler(handle)


def _raise_descriptor_limit() -> None:
    """Take what the system allows: 2,000 streams need twice as many descriptors."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # it is worth a try
        import resource  # noqa: PLC0415  (there is none on Windows)

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = min(hard, MAX_DESCRIPTORS)
        if soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _spare_collector() -> None:
    """Leave what is here by now to itself, and look for cycles of garbage more seldom.

    All of it stays to the end, but to look it through stops every stream for 16 ms, and
    requests make few cycles: asyncio's transports do. What is left is soon looked
    through, and so more often. It saves 5% of a whole answer.
    """
    gc.collect()
    with contextlib.suppress(AttributeError):  # PyPy's collector is another one
        gc.freeze()
        gc.set_threshold(NEW_OBJECTS, 2, 2)


async def _run(options: argparse.Namespace) -> int:
    """Check or serve, the demo app too if it is wanted; returns the exit status."""
    demo, source = DemoApp(), SettingsSource(options)
    if options.demo:
        ((host, port),) = await demo.listen("127.0.0.1", 0)
        app = AppSettings("app-demo", f"http://{host}:{port}/v1", "chat")
        source.built_in["demo"] = app
    try:
        settings = source.load()
        _set_up_logging(settings)
        for warning in source.warnings:
            log.warning(warning)
        if not settings.has_apps:
            _announce(settings, logging.ERROR, _NOTHING_CONFIGURED)
            return 2
        if options.check:
            return await _check(settings, asks=options.ask)
        return await _serve(settings, source)
    except SettingsError as error:
        for complaint in [*source.warnings, *str(error).splitlines()]:
            _show(f"opendify: {complaint}", stream=sys.stderr)
        return 2
    finally:
        await demo.stop(0)


async def _serve(settings: Settings, source: SettingsSource) -> int:
    """Serve until a signal; returns the exit status."""
    store, ttl_s = settings.conversation_store, settings.conversation_ttl
    conversations, complaint = open_conversations(store, ttl_s)
    if complaint:
        log.warning(complaint)
    dify = Dify(settings, open_wire)
    site = Site(dify, conversations, lambda: os.urandom(16).hex())
    server = Server(site)

    told = ""  # the failure that was logged: once, not with each request

    def refresh() -> None:
        nonlocal told
        if changed := source.load_if_changed():
            dify.use(changed)
            _warn_if_open(changed, server)
        if told != conversations.failure:
            told = conversations.failure
            log.warning("CONVERSATION_STORE: %s; chats start anew meanwhile", told)

    server.before_request = refresh
    with contextlib.closing(conversations), contextlib.closing(dify):
        return await _serve_until_signal(settings, server)


def _announce(settings: Settings, level: int, text: str) -> None:
    """Print a text beside the log, which may be joined to it: as JSON if that is JSON.

    An error, which is why there is nothing to serve, goes to stderr.
    """
    if settings.log_format == "json":
        record = log.makeRecord(log.name, level, "", 0, text, (), None)
        text = _Formatter(is_json=True).format(record)
    _show(text, stream=sys.stderr if level == logging.ERROR else sys.stdout)


async def _serve_until_signal(settings: Settings, server: Server) -> int:
    stop = asyncio.Event()
    _on_signals(stop)
    _raise_descriptor_limit()
    _watch_loop(server, stop)
    host, port = settings.server_host, settings.server_port
    try:
        addresses = await server.listen(host, port)
    except (OSError, OverflowError, ValueError) as error:  # ValueError: "\0" in a host
        reason = getattr(error, "strerror", None) or error
        text = f"opendify: can't listen on {host}:{port}: {reason}"
        cure = "choose another with --host or --port"
        _announce(settings, logging.ERROR, f"{text}; {cure}")
        return 1
    for host, port in addresses:
        shown = f"[{host}]" if ":" in host else host
        text = f"OpenDify {__version__} listens on http://{shown}:{port}/v1"
        _announce(settings, logging.INFO, text)
    log.info(_models_shown(settings))
    _warn_if_open(settings, server)
    _spare_collector()
    await stop.wait()
    log.info("stopping: open requests have %g s to end", DRAIN_S)
    return 0 if await server.drain() else 1


def _models_shown(settings: Settings) -> str:
    """The models and where their apps are, for the log."""
    names, keyed_apps = list(settings.model_config), settings.keyed_apps
    if keyed_apps:
        names.append(f"{len(keyed_apps)} named by Dify")
    bases = [app.base for app in (*settings.model_config.values(), *keyed_apps)]
    shown = ", ".join(map(mask_password, dict.fromkeys(bases)))
    return f"models: {', '.join(names)}; Dify: {shown}"


def _warn_if_open(settings: Settings, server: Server) -> None:
    if not settings.valid_api_keys and not server.is_local:
        log.warning("anyone who reaches this port can use the apps: set VALID_API_KEYS")


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

_ONE_WORD = "Reply with one word: OK"
_COLOURS = {"ok": 32, "failed": 31, "to fix": 31, "warning": 33}
_AGENT, _CHATFLOW, _FLOWS = ["agent"], ["advanced-chat"], ["advanced-chat", "workflow"]
# Faults that one may notice, and can do something about: the first release with it, the
# first without it, as far as is known, and the modes of app that have it.
_KNOWN_PROBLEMS: Sequence[tuple[list[float], list[float], Sequence[str], str]] = [
    ([0], [0, 10], APP_MODES, "takes no files but images"),
    ([0], [1, 3], CHAT_MODES, "keeps the inputs of a conversation's first turn"),
    ([1, 13], [1, 14], _CHATFLOW, "may lose an answer's end and citations (#32856)"),
    ([1, 13], [1, 15], _CHATFLOW, "is silent in a conversation it has lost (#38801)"),
    ([1, 14], [1, 15], _FLOWS, "may refuse uploads, or be silent about them (#36912)"),
    ([1, 14, 2], [1, 14, 3], APP_MODES, "may go on with a stopped answer (#37755)"),
    ([1, 16], [inf], _AGENT, "does not show images to the model (#40425)"),
    ([1, 17, 1], [1, 17, 2], _FLOWS, "is silent while an Agent node works (#42268)"),
]
Note = tuple[str, str]  # below an app's row: what it is about, and what it says


async def _check(settings: Settings, *, asks: bool) -> int:
    """Print the settings and how each app does; 0 if all is well."""
    for name, value in vars(settings).items():
        _show(f"{name.upper():26}{_masked(name, value)}")
    _show()
    dify, limit = Dify(settings, open_wire), asyncio.Semaphore(CHECKS_AT_ONCE)
    apps = [*settings.model_config.items()]
    apps += [(mask_key(app.key), app) for app in settings.keyed_apps]
    checks = (_check_app(dify, name, app, limit, asks=asks) for name, app in apps)
    results = await asyncio.gather(*checks)
    dify.close()
    table = [(["MODEL", "APP", "MODE", "DIFY", "STATUS"], []), *results]
    widths = [max(map(_width_of, row)) for row in zip(*(cells for cells, _ in table))]
    for (*cells, status), notes in table:
        padded = [c + " " * (width - _width_of(c)) for c, width in zip(cells, widths)]
        _show("  ".join([*padded, _painted(status)]))
        for topic, text in notes:
            plain = _printable(" ".join(text.split()))
            lines = textwrap.wrap(plain, 87, break_on_hyphens=False)
            _show(f"    {_painted(f'{topic:9}')}" + f"\n{'':13}".join(lines))
    return 0 if all(cells[-1] == "ok" for cells, _ in results) else 1


def _width_of(text: str) -> int:
    """How wide a terminal shows a text: Chinese characters take two columns each."""
    return sum(1 + (unicodedata.east_asian_width(c) in "FW") for c in text)


def _painted(text: str) -> str:
    """A word in its colour, where there are colours (https://no-color.org)."""
    colour = _COLOURS.get(text.strip())
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    if not colour or is_plain or not (sys.stdout and sys.stdout.isatty()):
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"


async def _check_app(
    dify: Dify, model: str, app: AppSettings, limit: asyncio.Semaphore, *, asks: bool
) -> tuple[list[str], list[Note]]:
    """An app's cells of the table, and what there is to say below them."""
    mode, status, notes = app.mode, "failed", list[Note]()
    facts = dify.facts.of(app)
    async with limit:
        try:
            mode = await dify.facts.confirmed_mode(app)
            form = await dify.facts.form_of(app)
            variable = query_variable(mode, form, app)
            notes += _notes_on(app, form, variable)
            notes += _known_problems(facts.version, mode)
            if asks:
                notes.append(("answer", await _ask(dify, app, mode, variable)))
            status = "ok"
        except MissingInput as error:
            status, cure = "ok", "give it in the model's `inputs` to ask all the same."
            notes.append(("warning", f"No turn: {error.message}; {cure}"))
        except ProxyError as error:
            is_odd = BASE_SETTING in error.message and not app.base.endswith("/v1")
            odd = f" {mask_password(app.base)} does not end in /v1." if is_odd else ""
            notes.insert(0, ("to fix", error.message + odd))
    cells = [model, facts.name, mode, facts.version, status]
    return [_printable(cell) or "-" for cell in cells], notes


def _notes_on(app: AppSettings, form: AppForm, variable: str) -> list[Note]:
    """What an app takes, and who gives it; `variable` takes the message, if any."""
    roles = {**dict.fromkeys(app.inputs, "given"), variable: "the message"}
    roles[app.system_variable] = "the system prompt"
    roles[app.history_variable] = "earlier messages"
    inputs = []
    for input_ in form.inputs:
        need = "required of clients" if input_.rules.get("required") else "optional"
        inputs.append(f"{input_.variable} ({roles.get(input_.variable, need)})")
    speech = ["speech to text"] * form.hears + ["text to speech"] * form.speaks
    named = {*app.filled, variable}
    known = {"", "query", *(input_.variable for input_ in form.inputs)}
    lost = named - known  # old text generators do not declare their `query`
    warning = f"Dify ignores what the app has no input for: {', '.join(sorted(lost))}."
    notes = {"inputs": inputs, "uploads": [describe_uploads(form)], "speech": speech}
    notes["warning"] = [warning] * bool(lost)
    return [(topic, ", ".join(texts)) for topic, texts in notes.items() if any(texts)]


def _known_problems(version: str, mode: str) -> list[Note]:
    """The faults of a release of Dify, for apps of this mode; [] if it is unknown."""
    release: list[float] = [int(n) for n in re.findall(r"\d{1,9}", version)[:3]]
    return [
        ("warning", f"Dify {version} {text}.".replace("(#", "(langgenius/dify#"))
        for first, until, modes, text in _KNOWN_PROBLEMS
        if first <= release < until and mode in modes
    ]


async def _ask(dify: Dify, app: AppSettings, mode: str, variable: str) -> str:
    """What an app answers to one word; OpenDify remembers nothing of the turn."""
    started_at, answer, user = time.monotonic(), Answer(), "opendify-check"
    common = {"inputs": app.inputs, "user": user}
    request = dify_request(mode, _ONE_WORD, common, variable=variable)
    stream = await dify.open_turn(app, mode, request)
    try:
        until = started_at + ASK_S
        while parts := await asyncio.wait_for(stream.read(), until - time.monotonic()):
            answer.add(parts)
    except asyncio.TimeoutError:
        raise UpstreamTimeout(f"There is no whole answer after {ASK_S:g} s.") from None
    finally:
        await stream.stop()
        stream.close()
    text = " ".join(answer.text.split())
    begin = text[:60] + "…" * (len(text) > 60)
    return f'"{begin}" after {time.monotonic() - started_at:.1f} s'


def _masked(name: str, value: Any) -> str:
    """A setting as it may be shown."""
    if isinstance(value, tuple):
        is_secret = name.endswith("_keys")
        return ", ".join(mask_key(v) if is_secret else v for v in value) or "-"
    if isinstance(value, dict):
        shown = [f"{model} ({mask_key(app.key)})" for model, app in value.items()]
        return ", ".join(shown) or "-"
    text = written(value)
    return (mask_password(text) if name.endswith(("_base", "_proxy")) else text) or "-"


# The demo...

_DEMO_ANSWER = (
    "Hello! This is OpenDify's demo app. It stands where your Dify app will stand and "
    "speaks Dify's own protocol, so what you see has come all the way through the "
    "proxy. My text is sent in bursts, a sentence at a time, with pauses between them. "
    "Yet you see it flow evenly, because OpenDify holds each burst back for a moment "
    "and lets it out as it goes. 流式文字会平稳地出现，而不是一阵一阵地跳出来。 Send "
    "the header `X-OpenDify-Smoothing: off` to see the difference. "
)


class DemoApp(Listener):
    """A Dify chat app in miniature, on a free loopback port, in Dify's wire format."""

    def __init__(self) -> None:
        super().__init__()
        self._stopped: set[str] = set()  # tasks of Dify's
        self._rows: deque[dict[str, Any]] = deque(maxlen=200)  # of `GET /messages`

    async def serve(self, wire: Wire) -> None:
        """One connection of the client of Dify."""
        with contextlib.closing(wire), contextlib.suppress(ConnectionBroken):
            while head := await read_head(wire):
                request = parse_request_head(head)
                decoder = body_decoder(request.headers, until_end=False)
                body = await read_whole(functools.partial(read_body, wire, decoder))
                await self._reply(Reply(wire, request), request, body)

    async def _reply(self, reply: Reply, request: Request, body: bytes) -> None:
        if request.path.endswith("/chat-messages"):
            await self._stream(reply, json.loads(body))
        elif request.path.endswith("/messages"):
            id_ = query_of(request)["conversation_id"]
            rows = [row for row in self._rows if row["conversation_id"] == id_]
            send_json(reply, {"data": rows, "has_more": False})
        elif "/files/" in request.path:
            send_json(reply, {"message": "The demo app takes no files."}, status=400)
        else:  # `/info`, `/parameters`, or a stop: that has the task's id in its path
            self._stopped.update(request.path.split("/"))
            off = {"enabled": False}
            facts = {"speech_to_text": off, "text_to_speech": off}
            send_json(reply, {"name": "OpenDify demo", **facts})

    async def _stream(self, reply: Reply, body: Json) -> None:
        """An answer in bursts; events and framing are those of Dify 1.12."""
        import uuid  # noqa: PLC0415  (at the top it costs each start 5 ms)

        ids = {
            "conversation_id": body.get("conversation_id") or str(uuid.uuid4()),
            "message_id": str(uuid.uuid4()),
            "created_at": int(time.time()),
            "task_id": str(uuid.uuid4()),
        }
        reply.start(200, [("Content-Type", "text/event-stream; charset=utf-8")])
        row = {**ids, "id": ids["message_id"], "query": body["query"], "answer": ""}
        text = f"{_DEMO_ANSWER}You said: {body['query']}"
        for burst in re.split(r"(?<=[.。;,])", text):
            if ids["task_id"] in self._stopped:
                break
            event = {"event": "message", **ids, "answer": burst}
            reply.write(encode_event(json_bytes(event)))
            await reply.drain()
            row["answer"] += burst
            await asyncio.sleep(len(burst) / 160)
        self._rows.append(row)
        words = len(text.split())
        usage = {"prompt_tokens": 0, "completion_tokens": words, "total_tokens": words}
        end = {"event": "message_end", **ids, "metadata": {"usage": usage}}
        reply.end(encode_event(json_bytes(end)))


if __name__ == "__main__":
    sys.exit(main())
