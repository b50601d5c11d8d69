"""The checks on OpenAI shapes reject what they should."""

from __future__ import annotations

import copy
from typing import Any, Callable

import pytest
import schemas

Chunks = list[dict[str, Any]]


def chunk(delta: Any, finish: str | None = None, **more: Any) -> dict[str, Any]:
    """Return one chunk of a chat stream."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1}
    return {**base, "model": "m", "choices": [choice], **more}


def call(index: int, **fields: Any) -> dict[str, Any]:
    """Return a chunk with a part of a tool call."""
    return chunk({"tool_calls": [{"index": index, **fields}]})


ROLE = chunk({"role": "assistant", "content": "", "refusal": None})
TEXT = [ROLE, chunk({"reasoning_content": "x"}), chunk({"content": "y"})]
GOOD = [*TEXT, chunk({}, "stop")]
USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
LAST = chunk({}, choices=[], usage=USAGE)
WITH_USAGE = [*({**part, "usage": None} for part in GOOD), LAST]
NAMED = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}
CALLS = [
    ROLE,
    call(0, **NAMED),
    call(0, function={"arguments": "{}"}),
    call(1, **NAMED),
    chunk({}, "tool_calls"),
]


def without(chunks: Chunks, number: int, key: str) -> Chunks:
    """Return the chunks, one of them without a key of its choice."""
    changed = copy.deepcopy(chunks)
    del changed[number]["choices"][0][key]
    return changed


def test_good_streams_pass() -> None:
    schemas.check_chat_stream(GOOD)
    schemas.check_chat_stream(CALLS)
    schemas.check_chat_stream(WITH_USAGE, include_usage=True)


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param([], id="empty"),
        pytest.param(TEXT, id="no-finish"),
        pytest.param(GOOD[1:], id="no-role"),
        pytest.param([ROLE, *GOOD], id="two-roles"),
        pytest.param([*GOOD, TEXT[2]], id="text-after-finish"),
        pytest.param([*GOOD, GOOD[3]], id="two-finishes"),
        pytest.param([*TEXT, chunk({"content": "z"}, "stop")], id="text-in-finish"),
        pytest.param([*GOOD, LAST], id="usage-not-asked-for"),
        pytest.param([*TEXT, chunk({}, "stop", id="other")], id="another-id"),
        pytest.param([*TEXT, chunk({}, "stop", created=2)], id="another-time"),
        pytest.param([*TEXT, chunk({}, "stop", model="n")], id="another-model"),
        pytest.param([*TEXT, {"error": {"message": "x"}}], id="error"),
        pytest.param([*TEXT, chunk(None, "stop")], id="delta-null"),
        pytest.param(without(GOOD, 1, "index"), id="no-index"),
        pytest.param(without(GOOD, 1, "delta"), id="no-delta"),
        pytest.param([ROLE, CALLS[2], CALLS[4]], id="call-without-name"),
        pytest.param([ROLE, CALLS[1], CALLS[1], CALLS[4]], id="call-named-twice"),
        pytest.param([ROLE, CALLS[3], CALLS[4]], id="call-index-gap"),
    ],
)
def test_bad_streams_fail(chunks: Chunks) -> None:
    with pytest.raises(AssertionError):
        schemas.check_chat_stream(chunks)


@pytest.mark.parametrize("chunks", [GOOD, WITH_USAGE[:-1], [*GOOD, LAST]])
def test_usage_that_was_asked_for_must_come(chunks: Chunks) -> None:
    with pytest.raises(AssertionError):
        schemas.check_chat_stream(chunks, include_usage=True)


@pytest.mark.parametrize(
    ("check", "value"),
    [
        (schemas.validate_event, {"type": "response.unknown"}),
        (schemas.validate_event, {"type": "response.output_text.delta"}),
        (lambda value: schemas.validate("ErrorResponse", value), {"error": "x"}),
    ],
)
def test_values_that_do_not_fit(check: Callable[[Any], None], value: Any) -> None:
    with pytest.raises(AssertionError):
        check(value)
