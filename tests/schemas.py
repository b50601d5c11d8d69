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


# Responses...

_TERMINAL = ("response.completed", "response.incomplete", "response.failed")
_LIFECYCLE = ("response.created", "response.in_progress", "error", *_TERMINAL)

# What stands between an item's `added` and `done`: the event that opens its one part,
# the deltas, their end with the key of the whole, and the end of the part.
_FORMS = {
    "message": ("content_part", "output_text", "text", "content_index"),
    "reasoning": (
        "reasoning_summary_part",
        "reasoning_summary_text",
        "text",
        "summary_index",
    ),
    "function_call": ("", "function_call_arguments", "arguments", ""),
    "custom_tool_call": ("", "custom_tool_call_input", "input", ""),
}


def check_responses_stream(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Check the events of a Responses stream for shape and order.

    Every event fits its schema and has the next sequence_number. `created` comes first
    and once, `in_progress` after it, one terminal event last, after an `error` if it
    is a failure; all tell of the same response. Items are added at indexes 0, 1, 2 …,
    under ids of their own; each goes from added through its parts and deltas to done,
    deltas joined are the whole, and the response at the end has every item as it was
    done. Of the items only reasoning comes while another one, the message, is open. In
    a failed stream items may stay open.

    Returns:
        The response of the terminal event.

    Raises:
        AssertionError: a rule is broken; the message names it and the event.
    """
    assert events, "no events"
    for number, event in enumerate(events):
        validate_event(event)
        assert event["sequence_number"] == number, f"expected {number}: {event}"
    _check_lifecycle(events)
    end: dict[str, Any] = events[-1]["response"]
    items = [event for event in events if event["type"] not in _LIFECYCLE]
    added = [row for row in items if row["type"] == "response.output_item.added"]
    indexes = [row["output_index"] for row in added]
    assert indexes == list(range(len(added))), f"indexes with gaps: {indexes}"
    ids = [row["item"]["id"] for row in added]
    assert all(ids) and len(set(ids)) == len(ids), f"ids empty or used twice: {ids}"
    assert len(end["output"]) == len(added), f"other items at the end: {end}"
    has_failed = events[-1]["type"] == "response.failed"
    for index, item in enumerate(end["output"]):
        own = [row for row in items if row["output_index"] == index]
        _check_item(own, item, may_be_open=has_failed)
    _check_nesting(items)
    _check_heartbeats(events)
    return end


def _check_lifecycle(events: Sequence[dict[str, Any]]) -> None:
    types = [event["type"] for event in events]
    assert types[:2] == ["response.created", "response.in_progress"], types[:2]
    assert types.count("response.created") == 1, "created twice"
    assert types[-1] in _TERMINAL, f"no terminal event at the end: {events[-1]}"
    for event in events[:-1]:
        assert event["type"] not in _TERMINAL, f"ended too early: {event}"
    errors = [at for at, name in enumerate(types) if name == "error"]
    has_failed = types[-1] == "response.failed"
    assert errors == ([len(types) - 2] if has_failed else []), types
    responses = [event["response"] for event in events if "response" in event]
    for response in responses:
        for constant in ("id", "created_at", "model"):
            assert response[constant] == responses[0][constant], f"other {constant}"
    for response in responses[:-1]:
        assert response["status"] == "in_progress", f"status of {response}"
        assert "usage" not in response, f"usage before the end: {response}"
    end, status = responses[-1], types[-1].split(".")[1]
    assert end["status"] == status, f"status of {end}"
    assert ("usage" in end) == (status != "failed"), f"usage of {end}"
    assert bool(end["error"]) == (status == "failed"), f"error of {end}"
    assert bool(end["incomplete_details"]) == (status == "incomplete"), end


def _check_item(
    own: Sequence[dict[str, Any]], item: dict[str, Any], *, may_be_open: bool
) -> None:
    """Check all events of one item, and what the response at the end says of it."""
    part, text, key, index = _FORMS[item["type"]]
    names = [event["type"][len("response.") :] for event in own]
    is_done = names[-1] == "output_item.done"
    assert is_done or may_be_open, f"never done: {item}"
    deltas = [event["delta"] for event in own if "delta" in event]
    notes = [event for event in own if "annotation" in event]
    order = ["output_item.added", *([f"{part}.added"] if part else [])]
    order += [f"{text}.delta"] * len(deltas)
    order += [f"{text}.annotation.added"] * len(notes)
    order += [f"{text}.done", *([f"{part}.done"] if part else []), "output_item.done"]
    assert names == (order if is_done else order[: len(names)]), f"order: {names}"
    assert own[0]["item"]["id"] == item["id"], f"another id: {own[0]}"
    assert own[0]["item"]["type"] == item["type"], f"another type: {own[0]}"
    for event in own[1:]:
        assert event.get("item_id", item["id"]) == item["id"], f"other item: {event}"
        if index and "item" not in event:
            assert event[index] == 0, f"one part only: {event}"
    whole = _text_of(item)
    assert whole == "".join(deltas), f"deltas are not the whole: {item}"
    if is_done:
        assert own[-1]["item"] == item, f"not as it was done: {item}"
        done = next(event for event in own if event["type"].endswith(f"{text}.done"))
        assert done[key] == whole, f"not the whole text: {done}"
        _check_notes(item, notes)


def _check_notes(item: dict[str, Any], notes: Sequence[dict[str, Any]]) -> None:
    told = [event["annotation"] for event in notes]
    numbers = [event["annotation_index"] for event in notes]
    assert numbers == list(range(len(notes))), f"annotation indexes: {numbers}"
    if item["type"] == "message":
        assert item["content"][0]["annotations"] == told, f"annotations of {item}"


def _check_heartbeats(events: Sequence[dict[str, Any]]) -> None:
    """Check that `in_progress` has all output so far; clients may go on from it."""
    texts: dict[str, str] = {}
    for event in events:
        if event["type"] in ("response.created", "response.in_progress"):
            told = {row["id"]: _text_of(row) for row in event["response"]["output"]}
            assert told == texts, f"not the output so far: {event}"
        elif event["type"] == "response.output_item.added":
            texts[event["item"]["id"]] = ""
        elif "delta" in event:
            texts[event["item_id"]] += event["delta"]


def _text_of(item: dict[str, Any]) -> str:
    for key in ("arguments", "input"):
        if key in item:
            return str(item[key])
    parts = item["content"] if item["type"] == "message" else item["summary"]
    return "".join(part["text"] for part in parts)


def _check_nesting(items: Sequence[dict[str, Any]]) -> None:
    """Check that an item begins when all are done; reasoning may interrupt the message.

    So events of an item belong to the one that was opened last.
    """
    open_: list[tuple[int, str]] = []
    for event in items:
        if event["type"] == "response.output_item.added":
            kind = event["item"]["type"]
            outer = [name for _, name in open_]
            allowed = ["message"] if kind == "reasoning" else []
            assert outer in ([], allowed), f"begins while another is open: {event}"
            open_.append((event["output_index"], kind))
        at = event["output_index"]
        assert open_ and open_[-1][0] == at, f"inside another item: {event}"
        if event["type"] == "response.output_item.done":
            open_.pop()
