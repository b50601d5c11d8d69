"""What OpenAI's clients may rely on: the official schemas, and the order of events."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

FILE = Path(__file__).parent / "data" / "openai-schemas.json"
FINISH_REASONS = ("stop", "length", "tool_calls", "content_filter", "function_call")


@functools.cache
def _document() -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads(FILE.read_text(encoding="utf-8")))


@functools.cache
def _validator(name: str) -> Draft202012Validator:
    return Draft202012Validator({**_document(), "$ref": f"#/$defs/{name}"})


def validate(name: str, value: Any) -> None:
    """Check a value against a schema, such as "CreateChatCompletionResponse".

    Raises:
        AssertionError: it does not fit; the message says where and why.
        KeyError: there is no schema of that name.
    """
    if name not in _document()["$defs"]:
        raise KeyError(name)
    error = best_match(_validator(name).iter_errors(value))
    if error is not None:
        text = json.dumps(value, ensure_ascii=False, default=repr)
        where = f"{name}{error.json_path[1:]}"
        raise AssertionError(f"{where}: {error.message}\nin {text:.2000}")


def validate_event(event: dict[str, Any]) -> None:
    """Check one event of a Responses stream against the schema of its type.

    Raises:
        AssertionError: it does not fit, or its type is unknown.
    """
    name = _document()["streamEvents"].get(event.get("type"))
    assert name is not None, f"unknown event type {event.get('type')!r}"
    validate(name, event)


def check_chat_stream(
    events: Sequence[dict[str, Any]], *, include_usage: bool = False
) -> None:
    """Check the chunks of a chat stream, without `[DONE]`, for shape and order.

    Every chunk fits its schema and has the same id, created and model. For each
    choice: the role once and first, one chunk with a finish reason and without
    content, nothing after it. Usage comes last and only if it was asked for.

    Raises:
        AssertionError: a rule is broken; the message names it and the chunk.
    """
    assert events, "no chunks"
    chunks = list(events)
    for number, chunk in enumerate(chunks):
        _check_chunk(chunk, chunks[0], f"chunk {number}: {chunk}")
    _check_usage(chunks, include_usage)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    indexes = sorted({choice["index"] for choice in choices})
    assert indexes == list(range(len(indexes))), f"indexes with gaps: {indexes}"
    for index in indexes:
        _check_choice([choice for choice in choices if choice["index"] == index])


def _check_chunk(chunk: dict[str, Any], first: dict[str, Any], where: str) -> None:
    assert "error" not in chunk, f"an error in {where}"
    for choice in chunk.get("choices", ()):
        assert isinstance(choice.get("index"), int), f"no index in {where}"
        assert isinstance(choice.get("delta"), dict), f"no delta object in {where}"
    validate("CreateChatCompletionStreamResponse", chunk)
    for constant in ("id", "created", "model"):
        assert chunk[constant] == first[constant], f"another {constant} in {where}"


def _check_usage(chunks: Sequence[dict[str, Any]], include_usage: bool) -> None:
    """Check that usage is where it was asked for, and nowhere else."""
    if not include_usage:
        for chunk in chunks:
            assert "usage" not in chunk, f"usage was not asked for: {chunk}"
            assert chunk["choices"], f"a chunk without choices: {chunk}"
        return
    *before, last = chunks
    for chunk in before:
        assert chunk.get("usage", "missing") is None, f"usage is not null: {chunk}"
        assert chunk["choices"], f"a chunk without choices before the end: {chunk}"
    assert last["choices"] == [], f"the last chunk has choices: {last}"
    assert last.get("usage"), f"the last chunk has no usage: {last}"


def _check_choice(choices: Sequence[dict[str, Any]]) -> None:
    """Check the chunks of one choice."""
    first, *others = [choice["delta"] for choice in choices]
    assert first.get("role") == "assistant", f"the first delta has no role: {first}"
    for delta in others:
        assert "role" not in delta, f"a second role: {delta}"
    *before, last = choices
    for choice in before:
        assert choice.get("finish_reason") is None, f"finished too early: {choice}"
    reason = last.get("finish_reason")
    assert reason in FINISH_REASONS, f"no finish reason at the end: {last}"
    assert not last["delta"].get("content"), f"content in the finish chunk: {last}"
    _check_tool_calls([choice["delta"] for choice in choices])


def _check_tool_calls(deltas: Sequence[dict[str, Any]]) -> None:
    """Check that calls come one after another, each named once and first."""
    calls = [call for delta in deltas for call in delta.get("tool_calls") or ()]
    current = -1
    for call in calls:
        assert isinstance(call.get("index"), int), f"a call without index: {call}"
        named = {"id", "type"} & set(call) or call.get("function", {}).get("name")
        if call["index"] == current + 1:
            current += 1
            function = call.get("function", {})
            whole = call.get("id") and call.get("type") and function.get("name")
            assert whole, f"a call begins without id, type and name: {call}"
        else:
            assert call["index"] == current, f"calls out of order: {call}"
            assert not named, f"a call is named twice: {call}"
