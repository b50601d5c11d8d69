"""Room Settings: every setting parses, complaints say what to change, no key shows."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Optional

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import opendify
from opendify import (
    APP_MODES,
    AppSettings,
    Settings,
    SettingsError,
    mask_key,
    parse_settings,
    setting_rows,
    unknown_variables,
    written,
)

BASE = "https://api.dify.ai/v1"
KEY = "app-0123456789abcdef"
LONG_KEY = "app-0123456789abcdefABCDEFGH"  # as Dify makes them
VARIABLES = [variable for variable, _, _ in setting_rows()]


def complaints(**variables: str) -> list[str]:
    """What is wrong with these variables; [] if nothing is."""
    try:
        parse_settings(variables)
    except SettingsError as error:
        return str(error).splitlines()
    return []


def models(value: Any, **variables: str) -> dict[str, AppSettings]:
    """What MODEL_CONFIG becomes."""
    text = value if isinstance(value, str) else json.dumps(value)
    settings = parse_settings({"MODEL_CONFIG": text, **variables})
    return dict(settings.model_config)


# ------------------------------------------------------------------------------
# Values
# ------------------------------------------------------------------------------

DEFAULTS = {
    "model_config": {},
    "dify_api_keys": (),
    "dify_api_base": BASE,
    "server_host": "127.0.0.1",
    "server_port": 5000,
    "valid_api_keys": (),
    "stream_smoothing": True,
    "stream_max_lag": 0.4,
    "conversation_store": "memory",
    "conversation_ttl": 7 * 86400,
    "show_process": False,
    "dify_connect_timeout": 10,
    "dify_first_event_timeout": 120,
    "dify_idle_timeout": 600,
    "max_body_mb": 64,
    "max_connections": 2000,
    "allowed_origins": (),
    "log_level": "INFO",
    "log_format": "text",
    "dify_ca_file": "",
    "ssl_cert_file": "",
    "https_proxy": "",
    "http_proxy": "",
    "no_proxy": "",
}


def test_settings_have_their_defaults_when_nothing_is_set() -> None:
    assert vars(parse_settings({})) == DEFAULTS


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("blank", ["", "  ", "\t\n"], ids=["empty", "spaces", "tab"])
def test_setting_keeps_its_default_when_blank(variable: str, blank: str) -> None:
    assert parse_settings({variable: blank}) == parse_settings({})


def test_default_as_written_is_the_default() -> None:
    defaults = {variable: default for variable, default, _ in setting_rows()}
    assert parse_settings(defaults) == parse_settings({})


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        *[
            pytest.param("STREAM_SMOOTHING", text, value, id=f"switch-{text}")
            for value, texts in (
                (True, ("on", "true", "yes", "1", "ON", "True")),
                (False, ("off", "false", "no", "0", "OFF", "False")),
            )
            for text in texts
        ],
        pytest.param("SHOW_PROCESS", " yes ", True, id="switch-spaces"),
        pytest.param("SERVER_PORT", "0", 0, id="int-least"),
        pytest.param("SERVER_PORT", "65535", 65535, id="int-most"),
        pytest.param("SERVER_PORT", " 8080\n", 8080, id="int-spaces"),
        pytest.param("SERVER_HOST", "::", "::", id="text"),
        pytest.param("CONVERSATION_STORE", "a b.db", "a b.db", id="text-space"),
        pytest.param("DIFY_API_BASE", f"{BASE}//", BASE, id="url-slashes"),
        pytest.param(
            "DIFY_API_BASE", "http://[::1]:80/v1", "http://[::1]:80/v1", id="url-ipv6"
        ),
        pytest.param("VALID_API_KEYS", "a", ("a",), id="list-of-one"),
        pytest.param("VALID_API_KEYS", " a, b ,,c,a", ("a", "b", "c"), id="list"),
        pytest.param("VALID_API_KEYS", "me:1", ("me:1",), id="list-like-a-proxy"),
        pytest.param("DIFY_API_KEYS", ",", (), id="list-of-none"),
        pytest.param("CONVERSATION_TTL", "90", 90.0, id="seconds"),
        pytest.param("CONVERSATION_TTL", "1.5", 1.5, id="seconds-fraction"),
        pytest.param("CONVERSATION_TTL", "30s", 30.0, id="seconds-s"),
        pytest.param("CONVERSATION_TTL", "5m", 300.0, id="seconds-m"),
        pytest.param("CONVERSATION_TTL", "12H", 43200.0, id="seconds-h"),
        pytest.param("CONVERSATION_TTL", "0.5 d", 43200.0, id="seconds-d"),
        pytest.param("STREAM_MAX_LAG", "0", 0.0, id="seconds-least"),
        *[
            pytest.param("ALLOWED_ORIGINS", origin, (origin,), id=f"origin-{origin}")
            for origin in (
                "*",
                "null",
                "file://",
                "https://A.example/",
                "HTTPS://a.example",
                "http://[::1]:80",
                "chrome-extension://abc",
            )
        ],
        pytest.param("LOG_LEVEL", "DEBUG", "DEBUG", id="level"),
        pytest.param("LOG_LEVEL", "warning", "WARNING", id="level-lower-case"),
        pytest.param("LOG_FORMAT", "json", "json", id="format"),
        pytest.param("MAX_BODY_MB", "1", 1, id="body-least"),
        pytest.param(
            "HTTPS_PROXY", "http://me:x@p:3128", "http://me:x@p:3128", id="proxy"
        ),
        pytest.param(
            "HTTP_PROXY", "me:x@p:3128", "http://me:x@p:3128", id="proxy-as-curl-has-it"
        ),
    ],
)
def test_value_parses(variable: str, text: str, value: object) -> None:
    settings = parse_settings({variable: text})
    parsed = getattr(settings, variable.lower())
    assert parsed == value
    assert type(parsed) is type(value)


def test_other_variables_are_ignored() -> None:
    variables = {"PATH": "/bin", "server_port": "7", "OPENDIFY_PORT": "7"}
    assert parse_settings(variables) == parse_settings({})


# ------------------------------------------------------------------------------
# Complaints
# ------------------------------------------------------------------------------

DURATION = "must be seconds, or like 30s, 5m, 12h, 7d, not"


@pytest.mark.parametrize(
    ("variable", "text", "complaint"),
    [
        pytest.param(
            "SERVER_PORT", "http", "must be a whole number, not 'http'", id="int"
        ),
        pytest.param(
            "SERVER_PORT", "8.5", "must be a whole number, not '8.5'", id="int-dot"
        ),
        *[
            pytest.param(
                "SERVER_PORT", text, f"must be a whole number, not {shown!r}", id=text
            )
            for text, shown in (
                ("app-12345678", "app-12345678"),  # no key: too short
                ("app-123456789", "app-…"),
                ("webapp-123456789", "webapp-123456789"),
            )
        ],
        pytest.param("SERVER_PORT", "-1", "must be 0 or more, not -1", id="int-below"),
        pytest.param("SERVER_PORT", "65536", "must be 65535 or less", id="int-above"),
        pytest.param(
            "STREAM_SMOOTHING", "maybe", "must be on or off, not 'maybe'", id="switch"
        ),
        pytest.param("STREAM_MAX_LAG", "soon", f"{DURATION} 'soon'", id="seconds"),
        pytest.param("STREAM_MAX_LAG", "-1", f"{DURATION} '-1'", id="seconds-minus"),
        pytest.param("STREAM_MAX_LAG", "1e3", f"{DURATION} '1e3'", id="seconds-power"),
        pytest.param("STREAM_MAX_LAG", "nan", f"{DURATION} 'nan'", id="seconds-nan"),
        pytest.param("CONVERSATION_TTL", "1w", f"{DURATION} '1w'", id="seconds-week"),
        pytest.param(
            "CONVERSATION_TTL", "0.5s", "must be 1 or more, not 0.5s", id="ttl-below"
        ),
        pytest.param(
            "DIFY_IDLE_TIMEOUT", "0", "must be 0.001 or more, not 0", id="timeout-0"
        ),
        *[
            pytest.param(
                "DIFY_API_BASE",
                base,
                f"must be a URL like https://host/v1, not {base!r}",
                id=f"url-{base}",
            )
            for base in (
                "dify.local/v1",
                "ftp://dify.local/v1",
                "https://",
                "https://:80/v1",
                "https://dify.local:0/v1",
                "https://dify.local:99999/v1",
                "https://dify.local:port/v1",
                "https://[::1/v1",
                "https://dify.例子/v1",
                "https://dify.local/v 1",
                "https://dify.local/\nv1",
            )
        ],
        pytest.param(
            "LOG_LEVEL",
            "LOUD",
            "must be one of DEBUG, INFO, WARNING, ERROR",
            id="level",
        ),
        pytest.param("LOG_FORMAT", "xml", "must be one of text, json", id="format"),
        pytest.param("MAX_BODY_MB", "0", "must be 1 or more, not 0", id="body-below"),
        pytest.param(
            "MAX_CONNECTIONS", "0", "must be 1 or more, not 0", id="connections-below"
        ),
        pytest.param(
            "HTTPS_PROXY",
            "socks5://proxy:1080",
            "must be a URL like http://host:3128, not 'socks5://proxy:1080'",
            id="proxy",
        ),
        pytest.param(
            "HTTPS_PROXY",
            "https://me:x@proxy",
            "must be a URL like http://host:3128, not 'https://…@proxy'",
            id="proxy-in-tls",
        ),
        *[
            pytest.param(
                "HTTPS_PROXY",
                f"http://me:1{sign}x@proxy:3128",
                "must be a URL like http://host:3128, not 'http://…@proxy:3128'",
                id=f"proxy-with-{sign}-in-its-password",
            )
            for sign in "/?#"
        ],
        *[
            pytest.param(
                "ALLOWED_ORIGINS",
                origin,
                f"{origin!r} is not like https://host",
                id=f"origin-{origin}",
            )
            for origin in (
                "http://[a.b",
                "a.example",
                "*.a.example",
                "https://*.a.example",
                "https://a.example/path",
                "https://例子.example",
            )
        ],
    ],
)
def test_bad_value_is_a_complaint_that_says_what_to_write(
    variable: str, text: str, complaint: str
) -> None:
    assert complaints(**{variable: text}) == [f"{variable}: {complaint}"]


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        pytest.param(
            "gpt=app-1",
            "is not valid JSON (Expecting value: line 1 column 1 (char 0)); "
            'it must be like {"name": "app-…"}',
            id="not-json",
        ),
        pytest.param(
            '{"m": "app-1", "n": "app-2", "m": "app-3"}',
            'is not valid JSON (it has \'m\' twice); it must be like {"name": "app-…"}',
            id="name-twice",
        ),
        pytest.param(
            [KEY], 'must be a JSON object like {"name": "app-…"}', id="an-array"
        ),
        pytest.param(
            {"": "app-1"}, "a model needs a name that is not empty", id="no-name"
        ),
        pytest.param(
            {"m": ""}, '\'m\' needs an app key: "app-…" or {"key": "app-…"}', id="empty"
        ),
        pytest.param(
            {"m": None},
            '\'m\' needs an app key: "app-…" or {"key": "app-…"}',
            id="null",
        ),
        pytest.param(
            {"m": {"mode": "chat"}},
            '\'m\' needs an app key: "app-…" or {"key": "app-…"}',
            id="object-without-key",
        ),
        pytest.param(
            {"m": {"key": KEY, "mod": "chat"}},
            "'m' has an unknown 'mod'; did you mean mode?",
            id="unknown-near",
        ),
        pytest.param(
            {"m": {"key": KEY, "zzz": 1}}, "'m' has an unknown 'zzz'", id="unknown-far"
        ),
        pytest.param(
            {"m": {"key": KEY, "inputs": "a=b"}},
            "the inputs of 'm' must be a JSON object",
            id="inputs-type",
        ),
        pytest.param(
            {"m": {"key": KEY, "smoothing": "off"}},
            "the smoothing of 'm' must be true or false",
            id="smoothing-type",
        ),
        pytest.param({"m": {"key": 5}}, "the key of 'm' must be a text", id="key-type"),
        pytest.param(
            {LONG_KEY: "m", "n": KEY},
            "'app-…' is an app's key: the model's name goes first",
            id="swapped",
        ),
        pytest.param(
            {LONG_KEY: {"key": "m"}},
            "'app-…' is an app's key: the model's name goes first",
            id="swapped-object",
        ),
        pytest.param(
            {"m": {"key": KEY, "mode": "chatbot"}},
            f"the mode of 'm' must be one of {', '.join(APP_MODES)}",
            id="mode",
        ),
        pytest.param(
            {"m": {"key": KEY, "tools": "input"}},
            "the tools of 'm' must be prompt or inputs or off",
            id="tools",
        ),
        pytest.param(
            {"a": "", "b": {"key": KEY, "bas": BASE}},
            '\'a\' needs an app key: "app-…" or {"key": "app-…"}; '
            "'b' has an unknown 'bas'; did you mean base?",
            id="two-models",
        ),
    ],
)
def test_bad_model_config_is_one_complaint(value: Any, complaint: str) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    assert complaints(MODEL_CONFIG=text) == [f"MODEL_CONFIG: {complaint}"]


def test_bad_base_of_a_model_names_the_model() -> None:
    app = {"key": KEY, "base": "host"}
    assert complaints(MODEL_CONFIG=json.dumps({"m": app})) == [
        "MODEL_CONFIG: base of 'm': must be a URL like https://host/v1, not 'host'"
    ]


def test_bad_key_of_a_model_names_the_model() -> None:
    models = {"m": KEY, "other": {"key": "app-with a blank"}}
    assert complaints(MODEL_CONFIG=json.dumps(models)) == [
        "MODEL_CONFIG: key of 'other': 'app-wi…' has characters no key has"
    ]


def test_all_complaints_come_at_once_and_in_order() -> None:
    assert complaints(
        SERVER_PORT="http",
        STREAM_SMOOTHING="maybe",
        DIFY_API_BASE="dify.local",
        MODEL_CONFIG="[]",
        CONVERSATION_TTL="0s",
        LOG_LEVEL="LOUD",
        DIFY_API_KEYS="app-fine,app with blanks",
        VALID_API_KEYS="a fine key,schlüssel",
    ) == [
        'MODEL_CONFIG: must be a JSON object like {"name": "app-…"}',
        "SERVER_PORT: must be a whole number, not 'http'",
        "STREAM_SMOOTHING: must be on or off, not 'maybe'",
        "CONVERSATION_TTL: must be 1 or more, not 0s",
        "DIFY_API_BASE: must be a URL like https://host/v1, not 'dify.local'",
        "DIFY_API_KEYS: 'app wi…' has characters no key has",
        "VALID_API_KEYS: 'schlüs…' has characters no header has",
        "LOG_LEVEL: must be one of DEBUG, INFO, WARNING, ERROR",
    ]


@pytest.mark.parametrize(
    ("name", "warning"),
    [
        pytest.param("SERVER_PORT", None, id="known"),
        pytest.param(
            "SERVER_PROT",
            "SERVER_PROT is not a setting of OpenDify; did you mean SERVER_PORT?",
            id="misspelled",
        ),
        pytest.param(
            "dify_api_base",
            "dify_api_base is not a setting of OpenDify; did you mean DIFY_API_BASE?",
            id="lower-case",
        ),
        pytest.param(
            "DIFY_API_KEY",
            "DIFY_API_KEY is not a setting of OpenDify; did you mean DIFY_API_KEYS?",
            id="singular",
        ),
        pytest.param("QQQ", "QQQ is not a setting of OpenDify", id="nothing-near"),
    ],
)
def test_unknown_variable_names_the_nearest(name: str, warning: Optional[str]) -> None:
    assert unknown_variables([name]) == ([warning] if warning else [])


# ------------------------------------------------------------------------------
# MODEL_CONFIG
# ------------------------------------------------------------------------------


def test_text_value_is_an_app_key() -> None:
    assert models({"m": KEY}) == {"m": AppSettings(KEY, BASE)}


def test_object_value_has_every_field() -> None:
    described: dict[str, Any] = {
        "key": KEY,
        "base": "http://dify.local:8080/v1/",
        "mode": "workflow",
        "inputs": {"tone": "kind", "n": 3},
        "query_variable": "q",
        "output_variable": "o",
        "system_variable": "s",
        "history_variable": "h",
        "smoothing": False,
        "tools": "inputs",
    }
    assert set(described) == {row.name for row in dataclasses.fields(AppSettings)}
    base = {"base": "http://dify.local:8080/v1"}
    assert models({"m": described}) == {"m": AppSettings(**{**described, **base})}


def test_models_take_the_common_base_unless_they_have_their_own() -> None:
    value = {"a": KEY, "b": {"key": KEY, "base": "http://b/v1"}}
    apps = models(value, DIFY_API_BASE="http://a/v1/")
    assert {name: app.base for name, app in apps.items()} == {
        "a": "http://a/v1",
        "b": "http://b/v1",
    }


def test_models_keep_their_order_and_any_name() -> None:
    names = ["团队/应用 1", "b", "a", "gpt-4o", "app-translation", LONG_KEY]
    assert list(models(dict.fromkeys(names, KEY))) == names


@pytest.mark.parametrize("mode", APP_MODES)
def test_every_mode_is_taken(mode: str) -> None:
    assert models({"m": {"key": KEY, "mode": mode}})["m"].mode == mode


# ------------------------------------------------------------------------------
# Secrets
# ------------------------------------------------------------------------------


def test_no_key_is_in_any_repr() -> None:
    settings = parse_settings(
        {
            "MODEL_CONFIG": json.dumps({"m": KEY, "n": {"key": KEY, "mode": "chat"}}),
            "DIFY_API_KEYS": KEY,
            "VALID_API_KEYS": KEY,
        }
    )
    shown = [repr(settings), str(settings), f"{settings.model_config}"]
    assert [text for text in shown if KEY in text] == []
    assert "mode='chat'" in shown[2]


@pytest.mark.parametrize(
    "value",
    [
        pytest.param({"m": f"{KEY} {KEY}"}, id="blank-in-key"),
        pytest.param({"m": f"{KEY}é"}, id="letter-in-key"),
        pytest.param({"m": {"key": KEY, "mode": "x"}}, id="mode"),
        pytest.param({"m": {"key": KEY, "base": "x"}}, id="base"),
        pytest.param({"m": {"key": KEY, "keys": KEY}}, id="unknown"),
        pytest.param({"m": {"key": [KEY]}}, id="type"),
        pytest.param([KEY], id="array"),
        pytest.param(f'{{"m": "{KEY}"', id="cut"),
        pytest.param(f"m={KEY}", id="not-json"),
    ],
)
def test_no_key_is_in_any_complaint(value: Any) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    said = complaints(MODEL_CONFIG=text)
    assert len(said) == 1
    assert KEY not in said[0]


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("text", [KEY, json.dumps({"m": f"{KEY} "})])
def test_key_in_a_wrong_variable_is_in_no_complaint(variable: str, text: str) -> None:
    assert [said for said in complaints(**{variable: text}) if KEY in said] == []


@pytest.mark.parametrize("variable", ["DIFY_API_BASE", "HTTP_PROXY", "HTTPS_PROXY"])
@pytest.mark.parametrize(
    "url",
    [
        "socks5://me:our-secret@proxy:1080",
        "me:our-secret@proxy",
        "http://me:p/our-secret@proxy:3128",
    ],
)
def test_no_password_is_in_any_complaint(variable: str, url: str) -> None:
    said = complaints(**{variable: url})
    assert len(said) == 1
    assert "our-secret" not in said[0]


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        pytest.param(KEY, "app-01…", id="usual"),
        pytest.param("123456789", "123456…", id="nine"),
        pytest.param("12345678", "…", id="eight"),
        pytest.param("", "…", id="empty"),
    ],
)
def test_masked_key_shows_its_beginning(key: str, shown: str) -> None:
    assert mask_key(key) == shown


# ------------------------------------------------------------------------------
# Properties
# ------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=9) | st.just("key"), inner, max_size=3)
    ),
    max_leaves=8,
)
TEXTS = st.text(max_size=30) | JSON.map(json.dumps)


@given(st.dictionaries(st.sampled_from(VARIABLES), TEXTS))
@example({"SERVER_PORT": "9" * 5000, "STREAM_MAX_LAG": "9" * 5000})
@example({"DIFY_API_BASE": "https://[v1.x]/v1"})
@example({"MODEL_CONFIG": '{"m": {"key": "k", "mode": []}}'})
@example({"MODEL_CONFIG": '{"m": "\\ud800"}'})
@example({"DIFY_API_KEYS": "app-a\nb-key", "VALID_API_KEYS": "key-a\nb-key"})
def test_any_text_parses_or_is_complained_about(variables: dict[str, str]) -> None:
    try:
        settings = parse_settings(variables)
    except SettingsError as error:
        assert all(str(error).split("\n"))
    else:
        assert isinstance(settings, Settings)


@pytest.mark.parametrize("opening", ["[", '{"m":'], ids=["arrays", "objects"])
def test_nesting_without_end_is_a_complaint(opening: str) -> None:
    said = complaints(MODEL_CONFIG=opening * 100_000)
    assert [line.partition(" (")[0] for line in said] == [
        "MODEL_CONFIG: is not valid JSON"
    ]


@given(st.floats(0.001, 1e6), st.sampled_from(["", "s", "m", "h", "d"]))
def test_any_duration_is_its_number_times_its_unit(number: float, unit: str) -> None:
    text = f"{number:.3f}{unit}"
    seconds = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[unit]
    settings = parse_settings({"DIFY_IDLE_TIMEOUT": text})
    assert settings.dify_idle_timeout == float(f"{number:.3f}") * seconds
    text = written(settings.dify_idle_timeout)
    again = parse_settings({"DIFY_IDLE_TIMEOUT": text}).dify_idle_timeout
    assert again == pytest.approx(settings.dify_idle_timeout, rel=1e-12, abs=1e-6)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://proxy:3128", "http://proxy:3128"),
        ("http://user:p@ss@proxy:3128", "http://…@proxy:3128"),
        ("user:p@ss@proxy:3128", "…@proxy:3128"),
    ],
)
def test_no_part_of_a_password_is_shown(url: str, shown: str) -> None:
    assert opendify.mask_password(url) == shown
