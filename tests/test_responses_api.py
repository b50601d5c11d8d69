"""The Responses API in one process: a server on loopback, before a fake Dify."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from schemas import check_responses_stream, validate
from test_handlers import KEY, Got, Headers, JSONObject, Proxy, proxy, serving

import opendify

PATH = "/v1/responses"


def events_of(data: bytes) -> list[JSONObject]:
    """Return the events of a stream; each says its type twice."""
    events = []
    for block in data.decode().strip().split("\n\n"):
        if block.startswith(":"):
            continue
        kind, line = block.split("\n")
        event: JSONObject = json.loads(line[len("data: ") :])
        assert kind == f"event: {event['type']}"
        events.append(event)
    return events


def response_of(got: Got) -> JSONObject:
    """Return the response of a checked stream, or of a checked whole answer."""
    assert got.status == 200, got.body
    if got.headers["content-type"].startswith("text/event-stream"):
        return check_responses_stream(events_of(got.body))
    value: JSONObject = got.json
    validate("Response", value)
    return value


def text_of(response: JSONObject) -> str:
    """Return the text of a response."""
    parts = [
        part["text"]
        for item in response["output"]
        if item["type"] == "message"
        for part in item["content"]
    ]
    return "".join(parts)


async def respond(
    served: Proxy, question: Any = "Hi", headers: Headers | None = None, **fields: Any
) -> Got:
    """Return what is answered to a request for a response of the model `m`."""
    body = {"model": "m", "input": question, **fields}
    call = await served.open("POST", PATH, body, headers)
    return await call.read_rest()


async def answer(
    served: Proxy, question: Any = "Hi", headers: Headers | None = None, **fields: Any
) -> JSONObject:
    """Return the checked response."""
    return response_of(await respond(served, question, headers, **fields))


BOTH = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@BOTH
@pytest.mark.parametrize("mode", opendify.APP_MODES)
async def test_every_app_mode_answers(mode: str, stream: bool) -> None:
    config = {"query_variable": "query"} if mode == "workflow" else {}
    async with proxy(mode=mode, config=config) as served:
        got = await answer(served, stream=stream)
    assert "You said: Hi" in text_of(got)
    assert got["id"].startswith("resp_")
    assert (got["model"], got["status"]) == ("m", "completed")


# ------------------------------------------------------------------------------
# Continuing
# ------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def replicas(
    variables: Headers | None = None, **app: Any
) -> AsyncIterator[tuple[Proxy, Proxy]]:
    """Give two proxies with the same configuration, and nothing else in common."""
    async with proxy(variables=variables, **app) as first:
        settings = opendify.parse_settings(
            {
                "MODEL_CONFIG": json.dumps({"m": {"key": KEY, "mode": "chat"}}),
                "DIFY_API_BASE": first.dify.base,
                "STREAM_SMOOTHING": "off",
                **(variables or {}),
            }
        )
        async with serving(settings) as (server, port):
            second = Proxy(port, first.dify, server)
            try:
                yield first, second
            finally:
                for call in second.asked:
                    await call.leave()


def reference(item: JSONObject) -> JSONObject:
    """Return an item that only names one; the AI SDK sends it."""
    return {"type": "item_reference", "id": item["id"]}


def user(text: str) -> JSONObject:
    """Return a user's message."""
    return {"role": "user", "content": text}


def told(served: Proxy) -> list[list[str]]:
    """Return the questions in each conversation that Dify has, oldest first."""
    return [
        [message.query for message in conversation.messages]
        for conversation in served.dify.conversations.values()
    ]


def next_turn(way: str, asked: str, given: JSONObject, question: str) -> JSONObject:
    """Return the fields of the request that follows on an answer."""
    if way == "id":
        return {"question": question, "previous_response_id": given["id"]}
    items = [user(asked), reference(given["output"][0]), user(question)]
    return {"question": items}


WAYS = pytest.mark.parametrize("way", ["id", "reference"])


@WAYS
@BOTH
async def test_second_turn_on_another_replica_goes_into_the_conversation(
    way: str, stream: bool
) -> None:
    async with replicas() as (first, second):
        one = await answer(first, "Hi", stream=stream)
        two = await answer(second, stream=stream, **next_turn(way, "Hi", one, "More"))
        three = await answer(first, "Again", previous_response_id=two["id"])
        assert told(first) == [["Hi", "More", "Again"]]
    ids = {row["dify"]["conversation_id"] for row in (one, two, three)}
    assert len(ids) == 1


@WAYS
async def test_instructions_are_told_once_when_the_turns_go_on(way: str) -> None:
    async with replicas() as (first, _):
        one = await answer(first, "Hi", instructions="Be brief.")
        rest = next_turn(way, "Hi", one, "More")
        await answer(first, **rest, instructions="Be brief.")
        assert [len(row) for row in told(first)] == [2]
        assert told(first)[0][1] == "More"


@WAYS
async def test_reference_continues_after_instructions_on_another_replica(
    way: str,
) -> None:
    async with replicas() as (first, second):
        one = await answer(first, "Hi", instructions="Be brief.")
        await answer(second, **next_turn(way, "Hi", one, "More"))
        assert [len(row) for row in told(first)] == [2]
        assert told(first)[0][1] == "More"


@WAYS
@pytest.mark.parametrize("other", [0, 1], ids=["here", "other-replica"])
async def test_each_branch_has_exactly_its_own_history(way: str, other: int) -> None:
    async with replicas() as served:
        first, second = served[0], served[other]
        one = await answer(first, "Hi")
        left = await answer(first, **next_turn(way, "Hi", one, "Left"))
        right = await answer(second, **next_turn(way, "Hi", one, "Right"))
        left = await answer(second, "Left 2", previous_response_id=left["id"])
        right = await answer(first, "Right 2", previous_response_id=right["id"])
        assert told(first)[0] == ["Hi", "Left", "Left 2"]
        (folded, last) = told(first)[1]
        assert last == "Right 2"
    assert "Left" not in folded and folded.endswith("\n\nRight")
    assert f'>\nHi\n</message>\n<message role="assistant">\n{text_of(one)}\n' in folded


@WAYS
async def test_branches_at_the_same_time_do_not_share_a_conversation(way: str) -> None:
    async with replicas() as (first, _):
        one = await answer(first, "Hi")
        turns = [next_turn(way, "Hi", one, name) for name in ("Left", "Right")]
        await asyncio.gather(*(answer(first, **turn) for turn in turns))
        assert sorted(len(row) for row in told(first)) == [1, 2]


async def test_edited_question_before_a_reference_starts_anew() -> None:
    async with replicas() as (first, second):
        one = await answer(first, "Tell me a joke")
        items = [user("a joke"), reference(one["output"][0]), user("More")]
        await answer(second, items)
        assert [len(row) for row in told(first)] == [1, 1]
        assert ">\na joke\n</message>" in told(first)[1][0]
