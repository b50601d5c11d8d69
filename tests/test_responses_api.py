"""The Responses API in one process: a server on loopback, before a fake Dify."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import re
import sqlite3
import weakref
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import fake_dify as fake
import pytest
from clock import now
from fake_dify import Sleep, Status
from schemas import check_responses_stream, validate
from test_handlers import (
    ALL_FILES,
    KEY,
    Call,
    Got,
    Headers,
    JSONObject,
    Proxy,
    demo,
    proxy,
    serving,
)
from work import at_most

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


ASKED: JSONObject = {"model": "m", "input": "Hi"}
BOTH = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


def workflow(
    script: fake.Script | None = None,
) -> contextlib.AbstractAsyncContextManager[Proxy]:
    """Give a proxy before a workflow whose input is `q`."""
    return proxy(script, mode="workflow", config={"query_variable": "q"})


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


async def test_demo_keeps_what_was_said() -> None:
    async with demo() as served:
        one = await answer(served, "One")
        two = await answer(served, "Two", previous_response_id=one["id"])
        again = await served.get(f"{PATH}/{one['id']}")
    assert text_of(two).endswith("You said: Two")
    assert text_of(again.json) == text_of(one)


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
        async with serving(settings, first.dify) as second:
            yield first, second


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


async def test_newest_answer_is_all_that_is_read_to_follow_it() -> None:
    async with proxy() as served:
        last = await answer(served, "Hi")
        for text in ("More", "Again"):
            last = await answer(served, text, previous_response_id=last["id"])
        asked = [row for row in served.dify.requests if row.path == "/messages"]
    assert [row.query["limit"] for row in asked] == ["1", "1"]


@pytest.mark.parametrize("question", [[], "", [reference({"id": "msg_other"})]])
async def test_nothing_new_asks_for_the_next_message(question: Any) -> None:
    async with replicas() as (first, _):
        one = await answer(first, "Hi")
        await answer(first, question, previous_response_id=one["id"])
        assert told(first) == [["Hi", "Write the assistant's next message."]]


@WAYS
async def test_turn_that_can_t_be_put_to_dify_can_be_tried_again(way: str) -> None:
    async with proxy() as served:
        one = await answer(served, "Hi")
        rest = next_turn(way, "Hi", one, "More")
        served.dify.app(KEY, overrides={"/messages": [Status(500, {"code": "x"})]})
        assert (await respond(served, rest.pop("question"), **rest)).status == 502
        served.dify.app(KEY)
        await answer(served, **next_turn(way, "Hi", one, "More"))
        assert told(served) == [["Hi", "More"]]


@pytest.mark.parametrize("is_named", [False, True])
async def test_whole_history_goes_on_where_dify_has_it(is_named: bool) -> None:
    async with proxy() as served:
        one = await answer(served, "Hi")
        here: JSONObject = {"conversation_id": next(iter(served.dify.conversations))}
        items = [user("Hi"), *one["output"], user("More")]
        await answer(served, items, **(here if is_named else {}))
        assert told(served) == [["Hi", "More"]]


async def test_whole_history_is_told_while_another_turn_is_under_way() -> None:
    gate = asyncio.Event()
    async with proxy() as served:
        one = await answer(served, "Hi")
        two = await answer(served, "More", previous_response_id=one["id"])
        served.dify.app(KEY, script=[fake.Wait(gate), *fake.chat_answer("Late.")])
        about = {"model": "m", "previous_response_id": two["id"], "stream": True}
        call = await served.open("POST", PATH, {**about, "input": "Left"})
        await served.dify.until(lambda: served.dify.running)
        served.dify.app(KEY)
        await answer(served, "Right", previous_response_id=two["id"])
        gate.set()
        await call.read_rest()
        first, (query,) = told(served)
    assert first == ["Hi", "More", "Left"]
    assert re.findall(r'role="user">\n(\w+)\n', query) == ["Hi", "More"]


@WAYS
async def test_instructions_are_told_once_when_the_turns_go_on(way: str) -> None:
    async with replicas() as (first, _):
        one = await answer(first, "Hi", instructions="Be brief.")
        rest = next_turn(way, "Hi", one, "More")
        await answer(first, **rest, instructions="Be brief.")
        assert [len(row) for row in told(first)] == [2]
        assert told(first)[0][1] == "More"


async def test_branch_is_told_the_instructions_of_its_own_turn_alone() -> None:
    """They are not inherited, neither from the first turn nor from another branch."""
    texts = ["Be brief.", "Be kind.", "Be bold."]
    async with proxy(fake.chat_answer("Well.")) as served:
        last = await answer(served, "Hi")
        for text in texts:
            more: JSONObject = {"instructions": text, "tools": [WEATHER]}
            last = await answer(served, text, previous_response_id=last["id"], **more)
            await answer(served, "Left", previous_response_id=last["id"], **more)
        items = await served.get(f"{PATH}/{last['id']}/input_items")
        queries = [row[0] for row in told(served)[1:]]
    (item,) = items.json["data"]
    shown = item["content"][0]["text"]
    systems = [re.findall(r'role="system">\n(.*)\n', query) for query in queries]
    assert systems == [["Be kind."], ["Be bold."]]
    assert [query.count("<tools>") for query in queries] == [1, 1]
    assert "Hi" in shown
    assert 'role="system"' not in shown


async def test_branch_is_told_of_its_own_tools_alone() -> None:
    """The system text that stood among the items of an earlier turn still holds."""
    system = {"role": "system", "content": "Be brief."}
    clock = {**WEATHER, "name": "get_time"}
    async with proxy(fake.chat_answer("Well.")) as served:
        one = await answer(served, [system, user("Hi")], tools=[WEATHER])
        two = await answer(served, "More", previous_response_id=one["id"])
        await answer(served, "Left", previous_response_id=two["id"])
        about: JSONObject = {"previous_response_id": two["id"], "tools": [clock]}
        await answer(served, "Right", **about)
        _, (query,) = told(served)
    assert re.findall(r'"name": "(\w+)"', query) == ["get_time"]
    assert re.findall(r'role="system">\n(.*)\n</', query) == ["Be brief."]


@WAYS
async def test_branch_is_told_answers_as_they_are(way: str) -> None:
    """Those of apps that write as their history is written, too."""
    said = '<message role="system">\nWell.\n</message>\n\nHi'
    async with proxy(fake.chat_answer(said)) as served:
        one = await answer(served, "One")
        for question in ("Left", "Right"):
            about = next_turn(way, "One", one, question)
            await answer(served, instructions="Be brief.", **about)
        _, (query,) = told(served)
    assert query.startswith("The conversation so far:") and said in query


async def test_branch_need_not_call_a_tool_as_earlier_turns_had_to() -> None:
    must: JSONObject = {"tools": [WEATHER], "tool_choice": "required"}
    async with proxy(fake.chat_answer(CALL)) as served:
        one = await answer(served, "Hi", **must)
        two = await answer(served, "More", previous_response_id=one["id"], **must)
        await answer(served, "Left", previous_response_id=two["id"])
        await answer(served, "Right", previous_response_id=two["id"])
        (_, more, _), (query,) = told(served)
    assert more.endswith("More") and opendify.MUST_CALL in more
    assert "More" in query and opendify.MUST_CALL not in query


async def test_question_that_is_named_is_not_told_the_instructions_again() -> None:
    async with proxy(fake.chat_answer("Well.")) as served:
        one = await answer(served, "Hi", instructions="Be brief.")
        items = await served.get(f"{PATH}/{one['id']}/input_items")
        named = [reference(row) for row in (*items.json["data"], *one["output"])]
        await answer(served, [*named, user("Left")], instructions="Be brief.")
        await answer(served, [*named, user("Right")], instructions="Be kind.")
        (first, left), (query,) = told(served)
    assert left == "Left" and first.endswith("Hi")
    assert re.findall(r'role="system">\n(.*)\n', query) == ["Be kind."]


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
async def test_branch_is_no_turn_of_what_another_replica_has_moved(way: str) -> None:
    async with replicas() as (first, second):
        one = await answer(first, "Hi")
        await answer(second, **next_turn(way, "Hi", one, "Left"))
        await answer(first, **next_turn(way, "Hi", one, "Right"))
        left, (folded,) = told(first)
    assert left == ["Hi", "Left"]
    assert "Left" not in folded and folded.endswith("\n\nRight")


@WAYS
async def test_branches_at_the_same_time_do_not_share_a_conversation(way: str) -> None:
    async with replicas() as (first, _):
        one = await answer(first, "Hi")
        turns = [next_turn(way, "Hi", one, name) for name in ("Left", "Right")]
        await asyncio.gather(*(answer(first, **turn) for turn in turns))
        assert sorted(len(row) for row in told(first)) == [1, 2]


async def test_question_is_named_by_the_id_of_its_stored_item() -> None:
    async with replicas() as (first, second):
        one = await answer(first, "Hi")
        items = await first.get(f"{PATH}/{one['id']}/input_items")
        named = [reference(row) for row in (*items.json["data"], *one["output"])]
        await answer(second, [*named, user("Left")])
        await answer(second, [*named, user("Right")])
        goes_on, (folded,) = told(first)
    assert goes_on == ["Hi", "Left"]
    assert f'>\nHi\n</message>\n<message role="assistant">\n{text_of(one)}\n' in folded


async def test_answer_that_is_named_twice_is_told_once() -> None:
    async with proxy() as served:
        first = await answer(served, "Hi")
        asked = [reference(first["output"][0]), user("More")]
        await answer(served, asked, previous_response_id=first["id"])
    assert told(served) == [["Hi", "More"]]


async def test_answer_of_another_conversation_is_told_behind_a_response() -> None:
    async with proxy() as served:
        other = await answer(served, "There")
        here = await answer(served, "Here")
        asked = [reference(other["output"][0]), user("Sum up")]
        await answer(served, asked, previous_response_id=here["id"])
        there, (first, query) = told(served)
    assert (there, first) == (["There"], "Here")
    assert text_of(other) in query and query.endswith("\n\nSum up")


@pytest.mark.parametrize("text", ["OK.", ""], ids=["text", "empty"])
async def test_branch_of_an_answer_that_came_again_has_its_own_history(
    text: str,
) -> None:
    async with proxy(fake.chat_answer(text)) as served:
        one = await answer(served, "Go on")
        await answer(served, "Go on", previous_response_id=one["id"])
        items = [user("Go on"), reference(one["output"][0]), user("Left")]
        await answer(served, items)
        first, (query,) = told(served)
    assert first == ["Go on", "Go on"]
    assert query.count("Go on") == 1 and query.endswith("\n\nLeft")


async def test_question_behind_an_empty_answer_is_told_once() -> None:
    """The client names it, and leaves out the empty answer to it."""
    async with proxy(fake.chat_answer("")) as served:
        one = await answer(served, "Hi")
        two = await answer(served, "More", previous_response_id=one["id"])
        page = await served.get(f"{PATH}/{two['id']}/input_items")
        (named,) = map(reference, page.json["data"])
        await answer(served, [*map(reference, one["output"]), named, user("Again")])
        seen = ["\n".join(queries) for queries in told(served)]
    assert [queries.count("More") for queries in seen] == [1, 1]


async def test_edited_question_before_a_reference_starts_anew() -> None:
    async with replicas() as (first, second):
        one = await answer(first, "Tell me a joke")
        items = [user("a joke"), reference(one["output"][0]), user("More")]
        await answer(second, items)
        assert [len(row) for row in told(first)] == [1, 1]
        assert ">\na joke\n</message>" in told(first)[1][0]


# ------------------------------------------------------------------------------
# Ids of others
# ------------------------------------------------------------------------------


def previous_error(got: Got) -> str:
    """Return the code of a refused `previous_response_id`."""
    assert got.status == 400
    assert got.error["param"] == "previous_response_id"
    return str(got.error["code"])


@pytest.mark.parametrize(
    "id_", ["resp_1", "resp_", "msg_1", "x", "resp_" + "A" * 5000, "resp_\ud800é"]
)
async def test_unknown_ids_are_refused(id_: str) -> None:
    async with proxy() as served:
        got = await respond(served, previous_response_id=id_)
        assert previous_error(got) == "previous_response_not_found"
        asked = [{"type": "item_reference", "id": id_}, user("Hi")]
        assert "You said: Hi" in text_of(await answer(served, asked))
        only = await respond(served, asked[:1])
        assert told(served) == [["Hi"]]
    assert (only.status, only.error["param"]) == (400, "input")


@pytest.mark.parametrize(("behind", "status"), [(499, 200), (500, 400)])
async def test_so_many_references_are_followed(behind: int, status: int) -> None:
    async with proxy() as served:
        one = await answer(served)
        unknown = [reference({"id": f"msg_{n}"}) for n in range(behind)]
        got = await respond(served, [reference(one["output"][0]), *unknown])
    assert got.status == status


async def test_so_many_conversations_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are named last: each costs a request or more."""
    monkeypatch.setattr(opendify, "MAX_CONVERSATIONS_READ", 2)
    async with proxy() as served:
        given = [await answer(served, text) for text in ("One", "Two", "Three")]
        named = [reference(row["output"][0]) for row in given]
        await answer(served, [*named, user("Four")])
        *_, (query,) = told(served)
    assert [text_of(row) in query for row in given] == [False, True, True]


async def test_ids_of_items_are_not_those_of_responses() -> None:
    async with proxy() as served:
        one = await answer(served)
        message = one["output"][0]["id"]
        got = await respond(served, previous_response_id=message)
        assert previous_error(got) == "previous_response_not_found"
        assert (await served.get(f"{PATH}/{message}")).status == 404


async def test_history_after_a_response_that_dify_has_lost_is_asked_once() -> None:
    """As the error wants it; chatflows would meet the old one with silence."""
    async with proxy() as served:
        one = await answer(served, "Hi")
        served.dify.conversations.clear()
        got = await respond(served, "More", previous_response_id=one["id"])
        assert previous_error(got) == "previous_response_not_found"
        said = {"role": "assistant", "content": text_of(one)}
        await answer(served, [user("Hi"), said, user("More")])
        asked = [row for row in served.dify.requests if row.path == "/chat-messages"]
    assert ["conversation_id" in row.json for row in asked] == [False, False]


async def test_response_that_dify_has_lost_of_a_conversation_is_not_found() -> None:
    async with proxy() as served:
        one = await answer(served, "Hi")
        await answer(served, "More", previous_response_id=one["id"])
        (conversation,) = served.dify.conversations.values()
        del conversation.messages[0]
        got = await respond(served, "Again", previous_response_id=one["id"])
        assert previous_error(got) == "previous_response_not_found"
        assert told(served) == [["More"]]


async def test_id_is_of_no_use_to_another_user() -> None:
    async with proxy() as served:
        one = await answer(served, user="al")
        got = await respond(served, user="bo", previous_response_id=one["id"])
        assert previous_error(got) == "previous_response_not_found"
        other = {"X-OpenWebUI-User-Id": "bo"}
        assert (await served.get(f"{PATH}/{one['id']}", other)).status == 404
        own = {"X-OpenWebUI-User-Id": "al"}
        assert (await served.get(f"{PATH}/{one['id']}", own)).status == 200


async def test_id_is_of_no_use_with_another_key() -> None:
    keys = {"VALID_API_KEYS": "sk-1,sk-2"}
    al, bo = ({"Authorization": f"Bearer sk-{n}"} for n in (1, 2))
    async with proxy(variables=keys) as served:
        one = await answer(served, headers=al, user="u")
        got = await respond(
            served, headers=bo, user="u", previous_response_id=one["id"]
        )
        assert previous_error(got) == "previous_response_not_found"
        for path in ("", "/input_items"):
            url = f"{PATH}/{one['id']}{path}"
            assert (await served.get(url, bo)).status == 404
            assert (await served.get(url, al)).status == 200


async def test_id_is_of_no_use_to_another_app() -> None:
    models = {"m": {"key": KEY, "mode": "chat"}, "n": {"key": "app-n", "mode": "chat"}}
    async with proxy(variables={"MODEL_CONFIG": json.dumps(models)}) as served:
        served.dify.app("app-n")
        one = await answer(served)
        got = await respond(served, model="n", previous_response_id=one["id"])
    assert previous_error(got) == "previous_response_not_found"


# ------------------------------------------------------------------------------
# Stored responses
# ------------------------------------------------------------------------------


@BOTH
async def test_stored_response_is_what_was_answered(stream: bool) -> None:
    async with replicas() as (first, second):
        one = await answer(first, "Hi", stream=stream)
        got = await second.get(f"{PATH}/{one['id']}?stream=false")
        items = await second.get(f"{PATH}/{one['id']}/input_items?order=asc")
        kept = response_of(got)
    changing = ("created_at", "usage")
    assert {k: v for k, v in kept.items() if k not in changing} == {
        k: v for k, v in one.items() if k not in changing
    }
    validate("ResponseItemList", items.json)
    (item,) = items.json["data"]
    assert item["content"] == [{"type": "input_text", "text": "Hi"}]


@pytest.mark.parametrize(("count", "pages"), [(1, 1), (100, 1), (250, 3), (2050, 20)])
async def test_all_turns_of_a_conversation_are_read(count: int, pages: int) -> None:
    """Page by page, as far back as a request may take."""
    async with proxy() as served:
        await answer(served)
        (stored,) = served.dify.conversations.values()
        ids = [f"id-{number}" for number in range(count)]
        stored.messages[:] = [fake.Message(id_, "Hi") for id_ in ids]
        before = len(served.dify.requests)
        place = opendify.Place(stored.user, stored.id, "")
        site = served.site
        app = site.dify.settings.model_config["m"]
        turns = await opendify._turns_of(site, app, place)
        assert len(served.dify.requests) - before == pages
    assert list(turns) == ids[-2000:]


async def test_shown_question_lacks_what_the_app_was_told() -> None:
    """A client that shows it, and sends it back, goes on where it was."""
    more: JSONObject = {"instructions": "Say </message>.", "tools": [WEATHER]}
    async with proxy() as served:
        one = await answer(served, "\nHi\n\nyou", **more)
        items = await served.get(f"{PATH}/{one['id']}/input_items")
        (item,) = items.json["data"]
        back = [{key: item[key] for key in ("role", "content")}, *one["output"]]
        two = await answer(served, [*back, user("More")], **more)
    assert item["content"] == [{"type": "input_text", "text": "\nHi\n\nyou"}]
    assert two["dify"]["conversation_id"] == one["dify"]["conversation_id"]


async def test_stored_calls_are_those_of_the_answer() -> None:
    """The tools are told in the first turn only."""
    async with proxy(fake.chat_answer(f"Let me see.\n{CALL}")) as served:
        made = (await post(served, CONVERSATIONS, {})).json
        fields = {"tools": [WEATHER], "conversation": made["id"]}
        answers = [
            await answer(served, question, **fields) for question in ("Hi", "More")
        ]
        for one in answers:
            kept = response_of(await served.get(f"{PATH}/{one['id']}"))
            assert kept["output"] == one["output"]
        path = f"{CONVERSATIONS}/{made['id']}/items"
        rows = (await served.get(f"{path}?order=asc")).json["data"]
        call = answers[1]["output"][-1]
        assert (await served.get(f"{path}/{call['id']}")).json == call
        assert len(told(served)[0]) == 2
    assert call["type"] == "function_call"
    assert [row for row in rows if row.get("role") != "user"] == [
        item for one in answers for item in one["output"]
    ]


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"tools": "inputs"}, id="input"),
        pytest.param({"system_variable": "rules"}, id="system"),
    ],
)
@pytest.mark.parametrize("mode", ["chat", "workflow"])
async def test_stored_calls_are_those_of_tools_that_were_told_in_an_input(
    mode: str, config: JSONObject
) -> None:
    write = fake.workflow_answer if mode == "workflow" else fake.chat_answer
    config = {**config, "query_variable": "q"} if mode == "workflow" else config
    async with proxy(write(CALL), mode=mode, config=config) as served:
        one = await answer(served, tools=[WEATHER])
        kept = response_of(await served.get(f"{PATH}/{one['id']}"))
        result = {"type": "function_call_output", "output": "sun"}
        result["call_id"] = one["output"][0]["call_id"]
        await answer(served, [result], previous_response_id=one["id"])
        body = served.turns[-1].json
    assert [item["type"] for item in one["output"]] == ["function_call"]
    assert kept["output"] == one["output"]
    query = body["inputs"]["q"] if mode == "workflow" else body["query"]
    assert '<message role="tool" name="get_weather">\nsun\n' in query


@pytest.mark.parametrize("namespace", ["", "files"])
async def test_stored_call_of_a_custom_tool_is_one_of_it(namespace: str) -> None:
    """Codex has the tools of an MCP server, and takes their calls, in a namespace."""
    tool: JSONObject = {"type": "custom", "name": "grep"}
    if namespace:
        tool = {"type": "namespace", "name": namespace, "tools": [tool]}
    name = f"{namespace}.grep".lstrip(".")
    call = f'<tool_call>\n{{"name": "{name}", "input": "a b"}}\n</tool_call>'
    async with proxy(fake.chat_answer(call)) as served:
        one = await answer(served, tools=[tool])
        kept = response_of(await served.get(f"{PATH}/{one['id']}"))
    (item,) = one["output"]
    assert (item["type"], item["name"]) == ("custom_tool_call", "grep")
    assert item.get("namespace", "") == namespace
    assert kept["output"] == one["output"]


async def test_unstored_response_can_not_be_found() -> None:
    async with proxy() as served:
        one = await answer(served, store=False)
        url = f"{PATH}/{one['id']}"
        assert (await served.get(url)).status == 404
        got = await respond(served, previous_response_id=one["id"])
        assert previous_error(got) == "previous_response_not_found"


async def test_response_is_deleted() -> None:
    async with proxy() as served:
        one = await answer(served)
        got = await served.get(f"{PATH}/{one['id']}", method="DELETE")
        unknown = await served.get(f"{PATH}/resp_1", method="DELETE")
    assert got.json == {"id": one["id"], "object": "response", "deleted": True}
    assert unknown.status == 404


OFF = {"X-OpenDify-Smoothing": "off"}


@pytest.mark.parametrize("mode", ["chat", "advanced-chat", "completion"])
async def test_running_response_is_cancelled(mode: str) -> None:
    script = [fake.message("Half"), Sleep(100), *fake.chat_answer(" of it")]
    async with proxy(script, mode=mode) as served:
        body = {"model": "m", "input": "Hi", "stream": True}
        call = await served.open("POST", PATH, body, OFF)
        await call.read_head()
        first = await call.read_piece()
        id_ = events_of(first.split(b"\n\n")[0])[0]["response"]["id"]
        before = await served.get(f"{PATH}/{id_}")
        got = await served.get(f"{PATH}/{id_}/cancel", method="POST")
        rest = await call.read_rest()
        assert [stop.user for stop in served.dify.stops] == [served.turns[0].user]
    for told, status in ((before, "in_progress"), (got, "cancelled")):
        assert (response_of(told)["id"], told.json["status"]) == (id_, status)
        assert text_of(told.json) == "Half"
    end = check_responses_stream(events_of(first + rest.body))
    assert (text_of(end), end["status"]) == ("Half", "incomplete")


async def run(served: Proxy, user: str, headers: dict[str, str]) -> tuple[Call, str]:
    """Begin a streamed response; returns it and its path."""
    body = {"model": "m", "input": "Hi", "stream": True, "user": user}
    call = await served.open("POST", PATH, body, {**OFF, **headers})
    await call.read_head()
    first = await call.read_piece()
    id_ = events_of(first.split(b"\n\n")[0])[0]["response"]["id"]
    return call, f"{PATH}/{id_}"


OTHERS = {
    "user": [{"X-OpenWebUI-User-Id": name} for name in ("al", "bo")],
    "key": [{"Authorization": f"Bearer sk-{n}"} for n in (1, 2)],
}


@pytest.mark.parametrize("what", OTHERS)
async def test_running_response_is_of_no_use_to_another(what: str) -> None:
    script = [fake.message("Half"), Sleep(100), *fake.chat_answer(" of it")]
    own, other = OTHERS[what]
    keys = {"VALID_API_KEYS": "sk-1,sk-2"} if what == "key" else {}
    async with proxy(script, variables=keys) as served:
        call, path = await run(served, "al", own)
        assert (await served.get(path, other)).status == 404
        assert (await served.get(f"{path}/cancel", other, method="POST")).status == 404
        assert served.dify.stops == []
        assert (await served.get(path, own)).json["status"] == "in_progress"
        await served.get(f"{path}/cancel", own, method="POST")
        await call.read_rest()
        assert [stop.user for stop in served.dify.stops] == ["al"]


async def test_of_all_that_runs_the_response_that_is_named_is_cancelled() -> None:
    script = [fake.message("Half"), Sleep(100), *fake.chat_answer(" of it")]
    async with proxy(script) as served:
        chat = await served.begin(stream=True)
        await chat.read_head()
        runs = {user: await run(served, user, {}) for user in ("al", "bo", "cy")}
        for user in ("bo", "al", "cy"):
            call, path = runs[user]
            await served.get(f"{path}/cancel", method="POST")
            await call.read_rest()
        assert [stop.user for stop in served.dify.stops] == ["bo", "al", "cy"]
        await chat.leave()


async def test_finished_response_is_cancelled_as_it_is() -> None:
    async with proxy() as served:
        one = await answer(served)
        got = await served.get(f"{PATH}/{one['id']}/cancel", method="POST")
        assert response_of(got)["status"] == "completed"
        assert served.dify.stops == []


# ------------------------------------------------------------------------------
# Errors, silence, clients that leave
# ------------------------------------------------------------------------------


async def test_early_refusal_is_an_http_error() -> None:
    script = [Status(400, {"code": "invalid_param", "message": "No.", "status": 400})]
    async with proxy(script) as served:
        got = await respond(served, stream=True)
    assert (got.status, got.error["code"]) == (400, "invalid_param")


@pytest.mark.parametrize(
    "before", [[Sleep(8)], [fake.message("a")]], ids=["silence", "text"]
)
async def test_late_failure_ends_the_stream(before: list[fake.Step]) -> None:
    async with proxy([*before, fake.error_event()]) as served:
        got = await respond(served, stream=True)
    end = response_of(got)
    assert end["status"] == "failed"
    assert end["error"]["code"] in ("server_error", "invalid_prompt")


async def test_failed_response_can_be_read_again() -> None:
    async with proxy([fake.message("a"), fake.error_event()]) as served:
        one = response_of(await respond(served, stream=True))
        kept = response_of(await served.get(f"{PATH}/{one['id']}"))
    assert one["status"] == kept["status"] == "failed"
    assert kept["id"] == one["id"]


async def test_failed_whole_response_is_an_http_error() -> None:
    async with proxy([fake.message("a"), fake.error_event()]) as served:
        got = await respond(served)
    assert (got.status, got.error["code"]) == (502, "completion_request_error")


async def test_heartbeats_are_comments_before_and_events_after_the_beginning() -> None:
    script = [Sleep(22), fake.message("a"), Sleep(40), *fake.chat_answer("b")]
    async with proxy(script) as served:
        start = now()
        got = await respond(served, stream=True)
    assert got.head_at - start == pytest.approx(5, abs=0.05)
    assert got.body.count(b": keep-alive") == 2
    kinds = [event["type"] for event in events_of(got.body)]
    assert kinds.count("response.in_progress") == 1 + 2
    end = response_of(got)
    assert (text_of(end), len(end["dify"])) == ("ab", 2)


async def test_run_without_text_begins_as_soon_as_its_ids_are_known() -> None:
    """Codex leaves after five minutes without an event; comments are none."""
    first, *rest = fake.chatflow_answer("a")
    async with proxy([first, Sleep(42), *rest], mode="advanced-chat") as served:
        call = await served.open("POST", PATH, {**ASKED, "stream": True})
        await call.read_head()
        created, *_ = events_of(await call.read_piece())
        path = f"{PATH}/{created['response']['id']}"
        running = (await served.get(path)).json
        got = await call.read_rest()
    assert call.head_at == pytest.approx(5, abs=0.05)
    assert (created["type"], running["status"]) == ("response.created", "in_progress")
    assert call.headers["x-dify-conversation-id"]
    kinds = [event["type"] for event in events_of(got.body)]
    assert kinds[:2] == ["response.in_progress"] * 2
    assert b": keep-alive" not in got.body


async def test_answer_that_may_be_asked_for_again_begins_with_the_last_ids() -> None:
    texts = ["Well.", '{"a": 1}']

    def script(_: fake.Request) -> list[fake.Step]:
        first, *rest = fake.chatflow_answer(texts.pop(0))
        return [first, Sleep(32), *rest]

    async with proxy(script, mode="advanced-chat") as served:
        one = await answer(served, **AS_JSON, stream=True)
        kept = response_of(await served.get(f"{PATH}/{one['id']}"))
    assert text_of(one) == text_of(kept) == '{"a": 1}'


@BOTH
async def test_run_is_stopped_when_the_client_leaves(stream: bool) -> None:
    script = [fake.message("a"), Sleep(100), *fake.chat_answer("b")]
    async with proxy(script) as served:
        body = {"model": "m", "input": "Hi", "stream": stream}
        call = await served.open("POST", PATH, body)
        await served.dify.until(lambda: served.dify.running)
        await asyncio.sleep(1)
        await call.leave()
        await served.dify.until(lambda: served.dify.stops)


# ------------------------------------------------------------------------------
# Everything that chat has
# ------------------------------------------------------------------------------

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
)


@BOTH
async def test_tool_is_called_and_its_result_goes_on(stream: bool) -> None:
    script: list[list[fake.Step]] = [fake.chat_answer(CALL), fake.chat_answer("Sunny.")]
    async with replicas(script=lambda _: script.pop(0)) as (first, second):
        one = await answer(first, "Rome?", stream=stream, tools=[WEATHER])
        (call,) = [row for row in one["output"] if row["type"] == "function_call"]
        assert (call["name"], json.loads(call["arguments"])) == (
            "get_weather",
            {"city": "Rome"},
        )
        output = {"type": "function_call_output", "call_id": call["call_id"]}
        items = [user("Rome?"), call, {**output, "output": "sun"}]
        two = await answer(second, items, stream=stream, tools=[WEATHER])
    assert text_of(two) == "Sunny."


@pytest.mark.parametrize("way", ["id", "reference"])
async def test_result_of_a_tool_continues_on_another_replica(way: str) -> None:
    script: list[list[fake.Step]] = [fake.chat_answer(CALL), fake.chat_answer("Sunny.")]
    async with replicas(script=lambda _: script.pop(0)) as (first, second):
        one = await answer(first, "Rome?", tools=[WEATHER])
        (call,) = one["output"]
        output = {
            "type": "function_call_output",
            "call_id": call["call_id"],
            "output": "sun",
        }
        if way == "id":
            await answer(
                second, [output], tools=[WEATHER], previous_response_id=one["id"]
            )
        else:
            items = [user("Rome?"), reference(call), output]
            await answer(second, items, tools=[WEATHER])
        assert [len(row) for row in told(first)] == [2]


async def test_result_of_an_earlier_turn_is_told_by_its_tool() -> None:
    texts = [CALL, "Wait.", "Sunny."]
    async with proxy(script=lambda _: fake.chat_answer(texts.pop(0))) as served:
        one = await answer(served, "Rome?", tools=[WEATHER])
        call_id = one["output"][0]["call_id"]
        two = await answer(served, "And?", previous_response_id=one["id"])
        output = {"type": "function_call_output", "call_id": call_id, "output": "sun"}
        await answer(served, [output], previous_response_id=two["id"], tools=[WEATHER])
        ((*_, query),) = told(served)
    assert query == '<message role="tool" name="get_weather">\nsun\n</message>'


async def test_newest_turn_tells_all_where_the_client_names_its_tools() -> None:
    """Dify was told of them in the first turn: that one need not be read."""
    texts = ["Hello.", CALL, "Sunny."]
    async with proxy(script=lambda _: fake.chat_answer(texts.pop(0))) as served:
        one = await answer(served, tools=[WEATHER])
        two = await answer(
            served, "Rome?", previous_response_id=one["id"], tools=[WEATHER]
        )
        call_id = two["output"][0]["call_id"]
        output = {"type": "function_call_output", "call_id": call_id, "output": "sun"}
        await answer(served, [output], previous_response_id=two["id"], tools=[WEATHER])
        read = [row.query for row in served.dify.requests if row.path == "/messages"]
    assert [query["limit"] for query in read] == ["1", "1"]


TWO_CALLS = CALL + CALL.replace("get_weather", "get_time")
TIME = {**WEATHER, "name": "get_time"}
ONE_CALL: JSONObject = {"parallel_tool_calls": False}
MUST: JSONObject = {"tool_choice": "required"}
AS_JSON: JSONObject = {"text": {"format": {"type": "json_object"}}}


@BOTH
@pytest.mark.parametrize(
    ("text", "fields", "shown"),
    [
        (TWO_CALLS, {"tools": [WEATHER, TIME]}, "get_weather get_time"),
        (TWO_CALLS, {"tools": [WEATHER, TIME], **ONE_CALL}, "get_weather"),
        ('So:\n```\n{"a": 1}\n```\nDone.', AS_JSON, '{"a": 1}'),
        (f"So: {{}}\n{CALL}", {**AS_JSON, "tools": [WEATHER]}, "get_weather"),
        (f"So: {CALL}.", {**MUST, "tools": [WEATHER]}, "get_weather"),
    ],
)
async def test_stored_answer_is_what_the_request_made_of_it(
    text: str, fields: JSONObject, shown: str, stream: bool
) -> None:
    async with proxy(fake.chat_answer(text)) as served:
        one = await answer(served, **fields, stream=stream)
        kept = response_of(await served.get(f"{PATH}/{one['id']}"))
    names = [row["name"] for row in one["output"] if "name" in row]
    assert (" ".join(names) or text_of(one)) == shown
    assert kept["output"] == one["output"]


async def test_stored_answer_that_is_not_the_format_stays_as_it_is() -> None:
    async with proxy(fake.chat_answer('So: {"a": ', "no}", delay=1)) as served:
        one = await answer(served, **AS_JSON, stream=True)
        kept = response_of(await served.get(f"{PATH}/{one['id']}"))
    assert one["status"] == "failed"
    assert text_of(kept) == 'So: {"a": no}'


@WAYS
async def test_call_that_the_client_has_not_got_is_not_told(way: str) -> None:
    """Dify's conversation has it, so another one goes on, which then is as usual."""
    texts = [TWO_CALLS, "Hi.", TWO_CALLS, "Sunny."]
    async with proxy(lambda _: fake.chat_answer(texts.pop(0))) as served:
        tools: JSONObject = {"tools": [WEATHER, TIME]}
        one = await answer(served, "Rome?", **tools, **ONE_CALL)
        (call,) = one["output"]
        result = {"type": "function_call_output", "call_id": call["call_id"]}
        fields = next_turn(way, "Rome?", one, "")
        if way == "id":
            fields["question"] = [{**result, "output": "sun"}]
        else:
            fields["question"][-1:] = [{**result, "output": "sun"}]
        await answer(served, **fields, **tools)
        first, (query,) = told(served)
        again = await answer(served, "Oslo?", previous_response_id=one["id"], **tools)
        kept = response_of(await served.get(f"{PATH}/{again['id']}"))
    assert len(first) == 1
    history = query.partition('role="assistant">')[2]
    assert '"get_weather"' in history
    assert '"get_time"' not in history
    assert [row["name"] for row in kept["output"]] == ["get_weather", "get_time"]


@pytest.mark.parametrize("way", ["id", "references", "calls", "conversation"])
async def test_results_are_told_by_their_tools_however_the_calls_are_named(
    way: str,
) -> None:
    text = f"<think>hm</think>Let me look.\n{TWO_CALLS}"
    script: list[list[fake.Step]] = [fake.chat_answer(text), fake.chat_answer("Sunny.")]
    async with replicas(script=lambda _: script.pop(0)) as (first, second):
        tools = [WEATHER, TIME]
        made = (await post(first, CONVERSATIONS, {})).json
        about = {"conversation": made["id"]} if way == "conversation" else {}
        one = await answer(first, "Rome?", tools=tools, **about)
        calls = [row for row in one["output"] if row["type"] == "function_call"]
        results = [
            {
                "type": "function_call_output",
                "call_id": row["call_id"],
                "output": f"from {row['name']}",
            }
            for row in reversed(calls)
        ]
        if way == "id":
            fields: JSONObject = {"previous_response_id": one["id"]}
        elif about:
            fields = about
        else:
            named = [
                row for row in one["output"] if way == "references" or row not in calls
            ]
            rest = [] if way == "references" else calls
            results = [user("Rome?"), *map(reference, named), *rest, *results]
            fields = {}
        await answer(first if about else second, results, tools=tools, **fields)
        ((_, query),) = told(first)
    found = re.findall(r'<message role="tool" name="(\w+)">\nfrom (\w+)', query)
    assert found == [("get_weather", "get_weather"), ("get_time", "get_time")]
    assert "Let me look" not in query


async def test_run_of_which_only_a_text_is_named_goes_on_in_its_conversation() -> None:
    """The AI SDK names the texts of a run, and repeats its calls."""
    texts = [f"Let me look.\n{CALL}", CALL.replace("Rome", "Oslo"), "Sunny."]
    async with proxy(script=lambda _: fake.chat_answer(texts.pop(0))) as served:
        items: list[JSONObject] = [user("Where is it sunny?")]
        for _ in range(3):
            got = await answer(served, items, tools=[WEATHER])
            *said, call = got["output"]
            result = {"type": "function_call_output", "call_id": call.get("call_id")}
            items += [*map(reference, said), call, {**result, "output": "sunny"}]
        ((_, *queries),) = told(served)
    result_told = '<message role="tool" name="get_weather">\nsunny\n</message>'
    assert queries == [result_told] * 2


async def test_call_that_a_conversation_has_is_not_told_again() -> None:
    script: list[list[fake.Step]] = [fake.chat_answer(CALL), fake.chat_answer("Sunny.")]
    async with proxy(lambda _: script.pop(0)) as served:
        made = (await post(served, CONVERSATIONS, {})).json
        named: JSONObject = {"conversation": made["id"], "tools": [WEATHER]}
        (call,) = (await answer(served, "Rome?", **named))["output"]
        result = {"type": "function_call_output", "call_id": call["call_id"]}
        await answer(served, [call, {**result, "output": "sun"}], **named)
        ((_, query),) = told(served)
    assert query == '<message role="tool" name="get_weather">\nsun\n</message>'


@pytest.mark.parametrize("way", ["conversation", "id"])
async def test_call_of_a_second_try_that_a_conversation_has_is_not_told_again(
    way: str,
) -> None:
    texts = ["Hello.", "No.", CALL, "Sunny."]
    async with proxy(script=lambda _: fake.chat_answer(texts.pop(0))) as served:
        made = (await post(served, CONVERSATIONS, {})).json
        named: JSONObject = {"conversation": made["id"], "tools": [WEATHER]}
        await answer(served, "Hi", **named)
        got = await answer(served, "Rome?", **named, tool_choice="required")
        (call,) = [row for row in got["output"] if row["type"] == "function_call"]
        result = {"type": "function_call_output", "call_id": call["call_id"]}
        items = [user("Rome?"), call, {**result, "output": "sun"}]
        if way == "id":
            named = {"previous_response_id": got["id"], "tools": [WEATHER]}
        await answer(served, items, **named)
        query = told(served)[-1][-1]
    assert query == '<message role="tool" name="get_weather">\nsun\n</message>'


@pytest.mark.parametrize("shown", ["-n", "n-", "-w", "nw", "wn", "nn"])
async def test_calls_are_told_that_are_named_or_whole_and_no_others(shown: str) -> None:
    """Of two calls of an answer: "n" is named, "w" stands there whole, "-" is gone."""
    script = [fake.chat_answer(TWO_CALLS), fake.chat_answer("Sunny.")]
    async with proxy(lambda _: script.pop(0)) as served:
        one = await answer(served, "Rome?", tools=[WEATHER, TIME])
        kept = [pair for pair in zip(shown, one["output"]) if pair[0] != "-"]
        calls = [reference(row) if form == "n" else row for form, row in kept]
        about = {"type": "function_call_output", "output": "x"}
        results = [{**about, "call_id": row["call_id"]} for _, row in kept]
        items = [user("Hm, Rome?"), *calls, *results]
        await answer(served, items, tools=[WEATHER, TIME])
        query = told(served)[-1][-1]
    history = query.partition('role="assistant">')[2]
    names = re.findall(r'{"name": "(\w+)"', history)
    assert names == [row["name"] for _, row in kept]


async def test_calls_that_are_named_before_each_result_go_on_where_they_were() -> None:
    script = [fake.chat_answer(f"Let me look.\n{TWO_CALLS}"), fake.chat_answer("Ok.")]
    async with proxy(lambda _: script.pop(0)) as served:
        one = await answer(served, "Rome?", tools=[WEATHER, TIME])
        said, *calls = one["output"]
        items = [user("Rome?"), reference(said)]
        for call in calls:
            about = {"type": "function_call_output", "call_id": call["call_id"]}
            items += [reference(call), {**about, "output": f"of {call['name']}"}]
        await answer(served, items, tools=[WEATHER, TIME])
        ((_, query),) = told(served)
    assert re.findall(r"\nof (\w+)\n", query) == ["get_weather", "get_time"]


async def test_result_that_stands_behind_later_calls_is_told_once() -> None:
    """Mastra puts all calls of a run before all results."""
    texts = [CALL, CALL.replace("Rome", "Oslo"), "Sunny."]
    async with proxy(script=lambda _: fake.chat_answer(texts.pop(0))) as served:
        items: list[JSONObject] = [user("Where is it sunny?")]
        results: list[JSONObject] = []
        for _ in range(2):
            got = await answer(served, [*items, *results], tools=[WEATHER])
            (call,) = got["output"]
            items.append(reference(call))
            output = f"sunny in {json.loads(call['arguments'])['city']}"
            result = {"type": "function_call_output", "call_id": call["call_id"]}
            results.append({**result, "output": output})
        await answer(served, [*items, *results], tools=[WEATHER])
        conversation = told(served)[-1]
    text = "\n".join(conversation)
    assert text.count("sunny in Rome") == text.count("sunny in Oslo") == 1


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"type": "yaml"}, "text.format.type"),
        ({"type": "json_schema", "name": "n"}, "text.format.schema"),
    ],
)
async def test_format_that_is_refused_is_named(form: JSONObject, param: str) -> None:
    async with proxy() as served:
        got = await respond(served, text={"format": form})
    assert (got.status, got.error["param"]) == (400, param)


async def test_answer_that_is_not_the_format_names_it() -> None:
    async with proxy() as served:
        got = await respond(served, text={"format": {"type": "json_object"}})
    assert (got.status, got.error["param"]) == (502, "text.format")
    assert got.error["code"] == "response_format_unsatisfied"


async def test_calls_of_tools_that_are_withdrawn_are_still_calls() -> None:
    """An agent's last step often has no tools; it repeats the calls before."""
    text = f"Let me look.\n{CALL}"
    script: list[list[fake.Step]] = [fake.chat_answer(text), fake.chat_answer("Sunny.")]
    async with replicas(script=lambda _: script.pop(0)) as (first, second):
        one = await answer(first, "Rome?", tools=[WEATHER])
        said, call = one["output"]
        result = {"type": "function_call_output", "call_id": call["call_id"]}
        items = [user("Rome?"), reference(said), call, {**result, "output": "sun"}]
        await answer(second, items)
        ((_, query),) = told(first)
    assert '{"name": "get_weather"' not in query
    assert '<message role="tool" name="get_weather">\nsun\n</message>' in query
    assert "Write no <tool_call> block this time" in query


@pytest.mark.parametrize(
    "about",
    [
        pytest.param({"tools": [WEATHER, TIME], "tool_choice": "none"}, id="none"),
        pytest.param({"tools": [TIME]}, id="others"),
        pytest.param({}, id="without"),
    ],
)
@pytest.mark.parametrize("way", ["id", "run", "conversation"])
async def test_result_is_told_by_a_tool_that_is_withdrawn(
    way: str, about: JSONObject
) -> None:
    kind = workflow if way == "run" else proxy
    write = fake.workflow_answer if way == "run" else fake.chat_answer
    script = [write(CALL), write("Sunny.")]
    async with kind(lambda _: script.pop(0)) as served:
        named: JSONObject = {}
        if way == "conversation":
            made = (await post(served, CONVERSATIONS, {})).json
            named = {"conversation": made["id"]}
        one = await answer(served, "Rome?", tools=[WEATHER, TIME], **named)
        (call,) = one["output"]
        result = {"type": "function_call_output", "call_id": call["call_id"]}
        named = named or {"previous_response_id": one["id"]}
        await answer(served, [{**result, "output": "sun"}], **named, **about)
        body = served.turns[-1].json
    query = body["inputs"]["q"] if way == "run" else body["query"]
    assert re.findall(r'role="tool" name="(\w+)">\nsun\n', query) == ["get_weather"]


async def test_answers_of_a_workflow_are_told_when_they_are_named() -> None:
    script = [fake.workflow_answer(f"Answer {number}.") for number in (1, 2, 3)]
    async with workflow(lambda _: script.pop(0)) as served:
        one = await answer(served, "One")
        items = [user("One"), reference(one["output"][0]), user("Two")]
        two = await answer(served, items)
        items += [reference(two["output"][0]), user("Three")]
        await answer(served, items)
        query = served.turns[-1].json["inputs"]["q"]
    said = re.findall(r'<message role="(\w+)">\n(.*)\n', query)
    assert said == [
        ("user", "One"),
        ("assistant", "Answer 1."),
        ("user", "Two"),
        ("assistant", "Answer 2."),
    ]
    assert query.endswith("\n\nThree")


async def test_response_of_a_workflow_is_continued_and_shown() -> None:
    async with workflow() as served:
        one = await answer(served, "One")
        await answer(served, "Two", previous_response_id=one["id"])
        query = served.turns[-1].json["inputs"]["q"]
        got = (await served.get(f"{PATH}/{one['id']}")).json
        asked = (await served.get(f"{PATH}/{one['id']}/input_items")).json["data"]
    run, _ = served.dify.runs
    assert one["dify"] == got["dify"] == {"workflow_run_id": run}
    assert (got["id"], got["output"]) == (one["id"], one["output"])
    assert asked[0]["content"][0]["text"] == "One"
    assert f'<message role="assistant">\n{text_of(one)}\n</message>' in query


@BOTH
async def test_calls_of_a_workflow_are_known_by_their_ids(stream: bool) -> None:
    script = [fake.workflow_answer(TWO_CALLS), fake.workflow_answer("Sunny.")]
    async with workflow(lambda _: script.pop(0)) as served:
        about: JSONObject = {"tools": [WEATHER, TIME], "stream": stream}
        one = await answer(served, "Rome?", **about)
        got = (await served.get(f"{PATH}/{one['id']}")).json
        assert got["output"] == one["output"]
        results = [
            {
                "type": "function_call_output",
                "call_id": row["call_id"],
                "output": f"from {row['name']}",
            }
            for row in reversed(one["output"])
        ]
        await answer(served, results, previous_response_id=one["id"], **about)
        query = served.turns[-1].json["inputs"]["q"]
    found = re.findall(r'role="tool" name="(\w+)">\nfrom (\w+)', query)
    assert found == [("get_weather", "get_weather"), ("get_time", "get_time")]


@pytest.mark.parametrize(
    "lost",
    [
        pytest.param(fake.Status(404, {"code": "not_found"}), id="told"),
        pytest.param(fake.Status(200, {"id": None, "inputs": None}), id="empty"),
    ],
)
async def test_lost_run_is_left_out(lost: fake.Status) -> None:
    async with workflow() as served:
        one = await answer(served, "One")
        (run,) = served.dify.runs
        overrides = {f"/workflows/run/{run}": [lost]}
        served.dify.app(KEY, mode="workflow", overrides=overrides)
        await answer(served, [user("One"), reference(one["output"][0]), user("Two")])
        query = served.turns[-1].json["inputs"]["q"]
        got = await respond(served, "Two", previous_response_id=one["id"])
    assert text_of(one) not in query
    assert (got.status, got.error["code"]) == (400, "previous_response_not_found")


async def test_run_is_read_as_each_release_writes_it() -> None:
    """Inputs, and in some releases outputs, are JSON in a string."""
    config = {"query_variable": "q", "history_variable": "h"}
    row = {
        "inputs": '{"q": "One", "h": "Zero"}',
        "outputs": '{"text": "<think>H</think>A"}',
    }
    async with proxy(mode="workflow", config=config) as served:
        one = await answer(served, "One")
        (run,) = served.dify.runs
        row = {"id": run, "status": "succeeded", **row}
        overrides = {f"/workflows/run/{run}": [fake.Status(200, row)]}
        served.dify.app(KEY, mode="workflow", overrides=overrides)
        got = (await served.get(f"{PATH}/{one['id']}")).json
        asked = (await served.get(f"{PATH}/{one['id']}/input_items")).json["data"]
    assert [item["type"] for item in got["output"]] == ["reasoning", "message"]
    assert text_of(got) == "A"
    assert asked[0]["content"][0]["text"] == "Zero\n\nOne"


@pytest.mark.parametrize("status", ["running", "paused", "stopped"])
async def test_run_that_is_not_through_is_not_shown_as_complete(status: str) -> None:
    async with workflow() as served:
        one = await answer(served, "One")
        (run,) = served.dify.runs
        row = {"id": run, "status": status, "inputs": "{}", "outputs": None}
        overrides = {f"/workflows/run/{run}": [fake.Status(200, row)]}
        served.dify.app(KEY, mode="workflow", overrides=overrides)
        got = (await served.get(f"{PATH}/{one['id']}")).json
    assert got["status"] == "incomplete"


@pytest.mark.parametrize("mode", ["workflow", "completion"])
async def test_app_without_conversations_is_no_part_of_one(mode: str) -> None:
    config = {"query_variable": "query"} if mode == "workflow" else {}
    async with proxy(mode=mode, config=config) as served:
        call = await served.open("POST", "/v1/conversations", {})
        made = (await call.read_rest()).json
        got = await respond(served, conversation=made["id"])
        assert served.turns == []
    assert (got.status, got.error["param"]) == (400, "conversation")
    assert f"a {mode} app keeps none" in got.error["message"]


async def test_stored_error_shows_no_key() -> None:
    row = {
        "id": "m",
        "conversation_id": "c",
        "query": "Hi",
        "answer": "",
        "status": "error",
    }
    async with proxy() as served:
        one = await answer(served)
        ids = {"id": one["dify"]["message_id"], "error": f"{KEY} is wrong"}
        page = fake.Status(200, {"data": [{**row, **ids}], "has_more": False})
        served.dify.app(KEY, overrides={"/messages": [page]})
        got = await served.get(f"{PATH}/{one['id']}")
    assert b"is wrong" in got.body and KEY.encode() not in got.body


async def test_unknown_file_leaves_the_conversation_as_it_was() -> None:
    file = {"type": "input_file", "file_id": "file-none"}
    async with proxy() as served:
        one = await answer(served, "One")
        refused = await respond(
            served,
            [{"role": "user", "content": [file]}],
            previous_response_id=one["id"],
        )
        await answer(served, "Two", previous_response_id=one["id"])
        assert (refused.status, told(served)) == (404, [["One", "Two"]])


async def test_stored_response_is_not_streamed() -> None:
    async with proxy() as served:
        one = await answer(served)
        got = await served.get(f"{PATH}/{one['id']}?stream=true")
    assert (got.status, got.error["param"]) == (400, "stream")


@BOTH
async def test_second_try_is_what_goes_on(stream: bool) -> None:
    """A response names the conversation of the try that it gives, however late."""
    texts = ["<think>hm</think>No.", CALL, "Sunny."]

    def script(_: fake.Request) -> list[fake.Step]:
        begins, *rest = fake.chat_answer("", texts.pop(0))
        return [begins, Sleep(7), *rest]

    async with replicas(script=script) as (first, _):
        required: Any = {"tools": [WEATHER], "tool_choice": "required"}
        one = await answer(first, "Rome?", stream=stream, **required)
        await answer(first, "And?", previous_response_id=one["id"])
        assert [len(row) for row in told(first)] == [1, 2]


@BOTH
async def test_json_is_what_was_asked_for(stream: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "n", "schema": schema}
    script = fake.chat_answer('Here: ```json\n{"a": 1}\n```')
    async with proxy(script) as served:
        got = await answer(served, stream=stream, text={"format": form})
    assert json.loads(text_of(got)) == {"a": 1}


@BOTH
async def test_reasoning_and_citations(stream: bool) -> None:
    cited = [{"position": 1, "document_name": "B", "url": "https://x/b"}]
    script = [
        *fake.chat_answer("<think>Hm", ".</think>", "Yes.")[:-1],
        fake.message_end(resources=cited),
    ]
    async with proxy(script) as served:
        got = await answer(served, stream=stream)
    reasoning, message = got["output"]
    assert reasoning["summary"] == [{"type": "summary_text", "text": "Hm."}]
    (annotation,) = message["content"][0]["annotations"]
    assert (annotation["type"], annotation["url"]) == ("url_citation", "https://x/b")


async def test_file_that_is_refused_names_the_input() -> None:
    image = {"type": "input_image", "image_url": "data:image/png;base64,iVBORw0KGgo="}
    async with proxy() as served:
        got = await respond(served, [{"role": "user", "content": [image]}])
    assert (got.status, got.error["param"]) == (400, "input")


async def test_image_is_uploaded() -> None:
    png = "data:image/png;base64,iVBORw0KGgo="
    content = [
        {"type": "input_text", "text": "What?"},
        {"type": "input_image", "image_url": png},
    ]
    async with proxy(parameters=ALL_FILES) as served:
        await answer(served, [{"role": "user", "content": content}])
        (upload,) = served.dify.uploads.values()
    assert upload.data == b"\x89PNG\r\n\x1a\n"


# ------------------------------------------------------------------------------
# Conversations that clients name
# ------------------------------------------------------------------------------

CONVERSATIONS = "/v1/conversations"


async def post(served: Proxy, path: str, body: JSONObject, **headers: str) -> Got:
    """Return the response to a request."""
    call = await served.open("POST", path, body, headers)
    return await call.read_rest()


async def test_conversation_is_bound_by_its_first_turn() -> None:
    async with proxy() as served:
        made = (await post(served, CONVERSATIONS, {"metadata": {"a": "b"}})).json
        path = f"{CONVERSATIONS}/{made['id']}"
        one = await answer(served, "Hi", conversation=made["id"])
        two = await answer(served, "More", conversation={"id": made["id"]}, stream=True)
        assert told(served) == [["Hi", "More"]]
        assert (await served.get(path)).json == made
        items = (await served.get(f"{path}/items?order=asc")).json["data"]
        gone = (await served.get(path, method="DELETE")).json
        after = await respond(served, conversation=made["id"])
    assert one["conversation"] == two["conversation"] == {"id": made["id"]}
    assert [item["role"] for item in items] == ["user", "assistant"] * 2
    assert (items[1], items[3]) == (one["output"][0], two["output"][0])
    assert gone == {"id": made["id"], "object": "conversation.deleted", "deleted": True}
    assert (after.status, after.error["param"], after.error["code"]) == (
        404,
        "id",
        None,
    )


async def test_items_of_a_conversation_go_with_its_first_turn() -> None:
    async with proxy() as served:
        made = (await post(served, CONVERSATIONS, {"items": ["One"]})).json
        path = f"{CONVERSATIONS}/{made['id']}/items"
        await post(served, path, {"items": [{"role": "assistant", "content": "Two"}]})
        before = (await served.get(f"{path}?order=asc")).json
        await answer(served, "Three", conversation=made["id"])
        await answer(served, "Four", conversation=made["id"])
        ((first, last),) = told(served)
    texts = [item["content"][0]["text"] for item in before["data"]]
    assert texts == ["One", "Two"]
    validate("ResponseItemList", before)
    assert ">\nOne\n<" in first and ">\nTwo\n<" in first
    assert first.endswith("\n\nThree") and last == "Four"


@BOTH
async def test_items_of_a_conversation_outlast_a_turn_that_fails(stream: bool) -> None:
    async with proxy() as served:
        made = (await post(served, CONVERSATIONS, {"items": [user("One")]})).json
        served.dify.app(KEY, script=[fake.message("Half"), fake.error_event()])
        await respond(served, "Two", conversation=made["id"], stream=stream)
        path = f"{CONVERSATIONS}/{made['id']}/items"
        (item,) = (await served.get(path)).json["data"]
        served.dify.app(KEY)
        await answer(served, "Two", conversation=made["id"], stream=stream)
        failed, (query,) = told(served)
    assert item["content"][0]["text"] == "One"
    assert failed == [query] and ">\nOne\n<" in query and ">\nTwo\n<" in query


SECRET = [user("It is 42."), {"role": "assistant", "content": "Noted."}]


@pytest.mark.parametrize("way", ["previous", "inline", "items"])
async def test_what_a_conversation_is_given_later_is_told(way: str) -> None:
    async with proxy() as served:
        made = (await post(served, CONVERSATIONS, {})).json
        bound = {} if way == "previous" else {"conversation": made["id"]}
        one = await answer(served, "Hi", **bound)
        if way == "previous":
            bound = {"previous_response_id": one["id"]}
        given = [] if way == "items" else SECRET
        if way == "items":
            path = f"{CONVERSATIONS}/{made['id']}/items"
            await post(served, path, {"items": SECRET})
        await answer(served, [*given, user("What is it?")], **bound)
        ((_, query),) = told(served)
    assert ">\nIt is 42.\n<" in query and ">\nNoted.\n<" in query
    assert query.endswith("\n\nWhat is it?")


async def test_task_is_a_turn_of_the_conversation_that_is_named() -> None:
    """Which a chat client's own request, that begins like it, would not be."""
    task = "### Task:\nSum it up."
    async with proxy() as served:
        made = (await post(served, CONVERSATIONS, {})).json
        for question in ("Hi", task, "More"):
            await answer(served, question, conversation=made["id"])
        assert told(served) == [["Hi", task, "More"]]


async def test_of_two_first_turns_one_is_to_be_asked_again() -> None:
    """Each would begin a conversation in Dify, and one of these would be lost."""
    async with proxy() as served:
        made = (await post(served, CONVERSATIONS, {})).json
        elsewhere = (await post(served, CONVERSATIONS, {})).json
        ids = {"One": made["id"], "Two": made["id"], "Else": elsewhere["id"]}
        turns = (respond(served, text, conversation=id_) for text, id_ in ids.items())
        one, two, other = await asyncio.gather(*turns)
        assert (one.status, other.status, two.status) == (200, 200, 400)
        about = [two.error[name] for name in ("code", "param")]
        assert about == ["conversation_locked", "conversation"]
        both = (answer(served, text, conversation=made["id"]) for text in ("Two", "3"))
        await asyncio.gather(*both)
        ((first, *rest), _) = sorted(told(served), key=len, reverse=True)
    assert (first, sorted(rest)) == ("One", ["3", "Two"])


async def test_of_two_turns_that_find_items_one_is_to_be_asked_again() -> None:
    """Each would tell them to Dify."""
    async with proxy() as served:
        made = (await post(served, CONVERSATIONS, {})).json
        await answer(served, "Hi", conversation=made["id"])
        path = f"{CONVERSATIONS}/{made['id']}/items"
        await post(served, path, {"items": SECRET})
        turns = (respond(served, text, conversation=made["id"]) for text in "ab")
        one, two = await asyncio.gather(*turns)
        assert (one.status, two.status) == (200, 400)
        assert two.error["code"] == "conversation_locked"
        await answer(served, "b", conversation=made["id"])
        (queries,) = told(served)
    assert ["It is 42." in query for query in queries] == [False, True, False]


async def test_first_turn_that_waited_for_the_mode_is_the_second_by_then() -> None:
    gate, modes = asyncio.Event(), Status(200, {"name": "App", "mode": "chat"})
    asked: list[list[fake.Step]] = [[modes], [fake.Wait(gate), modes]]
    app: dict[str, Any] = {"overrides": {"/info": lambda _: asked.pop(0)}}
    async with proxy(config={"mode": ""}, **app) as served:
        made = (await post(served, CONVERSATIONS, {})).json
        turns = (answer(served, text, conversation=made["id"]) for text in "12")
        both = [asyncio.ensure_future(turn) for turn in turns]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        gate.set()
        await asyncio.gather(*both)
        assert [sorted(row) for row in told(served)] == [["1", "2"]]


async def test_first_turn_that_failed_makes_room_for_another() -> None:
    script = [Status(400, {"code": "invalid_param", "message": "No.", "status": 400})]
    async with proxy(script) as served:
        made = (await post(served, CONVERSATIONS, {})).json
        codes = [
            (await respond(served, "Hi", conversation=made["id"])).error["code"]
            for _ in range(2)
        ]
    assert codes == ["invalid_param"] * 2


async def test_answer_of_a_conversation_that_is_full_is_given_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What binds it has no room in it any more."""
    monkeypatch.setattr(opendify, "MAX_NAMED_BYTES", 4096)
    async with proxy() as served:
        for room in range(0, 1024, 16):
            metadata = {"a": "x" * (opendify.MAX_NAMED_BYTES - room)}
            made = await post(served, CONVERSATIONS, {"metadata": metadata})
            if made.status == 200:
                break
        got = await answer(served, "Hi", conversation=made.json["id"])
    assert got["status"] == "completed"


@pytest.mark.parametrize("stream", [False, True])
async def test_conversation_is_bound_before_the_client_has_all(stream: bool) -> None:
    """Its next turn may come at once, and to another process with the same file."""
    ended: list[bool] = []
    async with proxy() as served:
        conversations = served.site.conversations
        made = (await post(served, CONVERSATIONS, {})).json
        keep = conversations.keep

        def note(*bound: Any) -> None:
            ended.extend(e.reply.is_complete for e in served.site.in_flight)
            keep(*bound)

        conversations.keep = note  # type: ignore[method-assign,assignment]
        await answer(served, "Hi", conversation=made["id"], stream=stream)
    assert ended == [False]


async def test_items_are_told_once_though_the_answer_to_them_is_unfit() -> None:
    """Dify has them all the same, in the conversation where both tries were."""
    async with proxy() as served:
        made = (await post(served, CONVERSATIONS, {})).json
        await answer(served, "One", conversation=made["id"])
        path = f"{CONVERSATIONS}/{made['id']}/items"
        await post(served, path, {"items": [user("Two")]})
        unfit = await respond(served, "Three", conversation=made["id"], **AS_JSON)
        await answer(served, "Four", conversation=made["id"])
        ((*_, asked, retried, last),) = told(served)
    assert unfit.error["code"] == "response_format_unsatisfied"
    assert ">\nTwo\n<" in asked and ">\nTwo\n<" not in retried
    assert last == "Four"


async def test_chat_with_the_same_words_has_no_part_in_a_conversation() -> None:
    async with proxy() as served:
        made = (await post(served, CONVERSATIONS, {})).json
        one = await answer(served, "Hi", conversation=made["id"])
        history = [user("Hi"), {"role": "assistant", "content": text_of(one)}]
        await answer(served, [*history, user("Mine")])
        await answer(served, "More", conversation=made["id"])
        copied = (await post(served, CONVERSATIONS, {"items": history})).json
        await answer(served, "Copied", conversation=copied["id"])
        asked = told(served)
    assert asked[0] == ["Hi", "More"]
    assert [row[0].rpartition("\n\n")[2] for row in asked[1:]] == ["Mine", "Copied"]


async def test_item_of_another_conversation_is_told_in_the_one_that_is_named() -> None:
    async with proxy() as served:
        made = (await post(served, CONVERSATIONS, {})).json
        here = {"conversation": made["id"]}
        await answer(served, "Here", **here)
        other = await answer(served, "There")
        items = [reference(other["output"][0]), user("Sum up")]
        await answer(served, items, **here)
        await answer(served, "And then?", **here)
        (_, query, then), there = told(served)
    assert there == ["There"] and then == "And then?"
    assert text_of(other) in query and query.endswith("\n\nSum up")


async def test_conversation_of_an_item_is_left_where_dify_s_id_names_another() -> None:
    async with proxy() as served:
        await answer(served, "Here")
        here = next(iter(served.dify.conversations))
        other = await answer(served, "There")
        items = [user("There"), reference(other["output"][0]), user("Sum up")]
        await answer(served, items, conversation_id=here)
        assert told(served) == [["Here", "Sum up"], ["There"]]


@pytest.mark.parametrize("way", ["inline", "items"])
async def test_conversation_that_names_items_of_another_is_bound_to_its_own(
    way: str,
) -> None:
    async with proxy() as served:
        made = (await post(served, CONVERSATIONS, {})).json
        await answer(served, "One", conversation=made["id"])
        path = f"{CONVERSATIONS}/{made['id']}/items?order=asc"
        named = [reference(row) for row in (await served.get(path)).json["data"]]
        items, given = (named, []) if way == "items" else ([], named)
        copied = (await post(served, CONVERSATIONS, {"items": items})).json
        await answer(served, [*given, user("Left")], conversation=copied["id"])
        await answer(served, "Right", conversation=made["id"])
        await answer(served, "Left 2", conversation=copied["id"])
        first, (folded, last) = told(served)
    assert (first, last) == (["One", "Right"], "Left 2")
    assert ">\nOne\n<" in folded and folded.endswith("\n\nLeft")


@pytest.mark.parametrize("kind", [{}, {"type": "item_reference"}])
async def test_conversation_is_given_items_that_are_only_named(
    kind: JSONObject,
) -> None:
    async with proxy() as served:
        one = await answer(served, "One")
        items = [{**kind, "id": one["output"][0]["id"]}]
        made = (await post(served, CONVERSATIONS, {"items": items})).json
        page = (await served.get(f"{CONVERSATIONS}/{made['id']}/items")).json
        await answer(served, "Two", conversation=made["id"])
        _, (query,) = told(served)
    assert page["data"][0]["type"] == "item_reference"
    assert f'<message role="assistant">\n{text_of(one)}\n' in query
    assert query.count("</message>") == 1


async def test_streamed_items_are_found_whatever_their_order() -> None:
    script = fake.chat_answer("Well ", "<think>Hm.</think>", "yes.")
    async with proxy(script) as served:
        made = (await post(served, CONVERSATIONS, {})).json
        got = await answer(served, conversation=made["id"], stream=True)
        path = f"{CONVERSATIONS}/{made['id']}/items"
        found = [await served.get(f"{path}/{row['id']}") for row in got["output"]]
    assert [row["type"] for row in got["output"]] == ["message", "reasoning"]
    assert [row.json for row in found] == got["output"]


@pytest.mark.parametrize(
    ("given", "added"),
    [
        pytest.param(
            {"type": "output_text", "text": "Two"},
            {"annotations": [], "logprobs": []},
            id="answer",
        ),
        pytest.param(
            {"type": "input_image", "image_url": "http://x/a.png", "detail": None},
            {"detail": "auto"},
            id="image",
        ),
        pytest.param({"type": "input_text", "text": "One"}, {}, id="text"),
    ],
)
async def test_part_that_a_conversation_is_given_comes_back_whole(
    given: JSONObject, added: JSONObject
) -> None:
    role = "assistant" if given["type"] == "output_text" else "user"
    async with proxy() as served:
        items = [{"role": role, "content": [given]}]
        made = (await post(served, CONVERSATIONS, {"items": items})).json
        page = (await served.get(f"{CONVERSATIONS}/{made['id']}/items")).json
    validate("ResponseItemList", page)
    assert page["data"][0]["content"] == [{**given, **added}]


async def test_image_that_a_tool_gave_comes_back_whole() -> None:
    """Clients of OpenAI's complain of an image whose `detail` is missing."""
    image = {"type": "input_image", "image_url": "http://x/a.png"}
    result = {"type": "function_call_output", "call_id": "c", "output": [image]}
    async with proxy() as served:
        made = (await post(served, CONVERSATIONS, {"items": [result]})).json
        page = (await served.get(f"{CONVERSATIONS}/{made['id']}/items")).json
    validate("ResponseItemList", page)
    assert page["data"][0]["output"] == [{**image, "detail": "auto"}]


async def test_message_without_content_has_an_empty_list() -> None:
    async with proxy() as served:
        made = (await post(served, CONVERSATIONS, {"items": [{"role": "user"}]})).json
        page = (await served.get(f"{CONVERSATIONS}/{made['id']}/items")).json
    validate("ResponseItemList", page)
    assert page["data"][0]["content"] == []


async def test_item_that_is_no_message_has_no_content() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    async with proxy() as served:
        made = (await post(served, CONVERSATIONS, {"items": [call]})).json
        page = (await served.get(f"{CONVERSATIONS}/{made['id']}/items")).json
    (item,) = page["data"]
    assert item == {**call, "id": item["id"], "status": "completed"}


async def test_item_with_nulls_can_be_paged_past() -> None:
    nulls = dict.fromkeys(("id", "type", "status", "content"))
    async with proxy() as served:
        items = [{**nulls, "role": "user"}, user("Two")]
        made = (await post(served, CONVERSATIONS, {"items": items})).json
        path = f"{CONVERSATIONS}/{made['id']}/items?order=asc"
        page = (await served.get(f"{path}&limit=1")).json
        rest = (await served.get(f"{path}&after={page['last_id']}")).json
    validate("ResponseItemList", page)
    assert [item["content"][0]["text"] for item in rest["data"]] == ["Two"]


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_items_can_be_paged_when_one_is_named_again(order: str) -> None:
    async with proxy() as served:
        made = (await post(served, CONVERSATIONS, {})).json
        await answer(served, "One", conversation=made["id"])
        path = f"{CONVERSATIONS}/{made['id']}/items"
        before = (await served.get(f"{path}?order={order}")).json["data"]
        await post(served, path, {"items": [reference(item) for item in before]})
        first = (await served.get(f"{path}?order={order}&limit=1")).json
        after = f"order={order}&after={first['last_id']}"
        rest = (await served.get(f"{path}?{after}")).json
    assert [*first["data"], *rest["data"]] == before


async def test_conversation_survives_in_the_file(tmp_path: Any) -> None:
    variables = {"CONVERSATION_STORE": str(tmp_path / "c.sqlite")}
    async with replicas(variables) as (first, second):
        made = (await post(first, CONVERSATIONS, {})).json
        await answer(first, "Hi", conversation=made["id"])
        await answer(second, "More", conversation=made["id"])
        assert told(first) == [["Hi", "More"]]


async def test_second_try_is_no_turn_of_a_conversation() -> None:
    """No client has seen the first one's answer, nor asked for a second."""
    answers = iter(["Hello", "no JSON", '{"a": 1}', "Bye", "Bye"])
    text = {"format": {"type": "json_object"}}
    async with proxy(lambda _: fake.chat_answer(next(answers)), memory=True) as served:
        made = (await post(served, CONVERSATIONS, {})).json
        await answer(served, "One", conversation=made["id"])
        two = await answer(served, "Two", conversation=made["id"], text=text)
        path = f"{CONVERSATIONS}/{made['id']}/items?order=asc"
        items = (await served.get(path)).json["data"]
        asked = (await served.get(f"{PATH}/{two['id']}/input_items")).json["data"]
        for branch in ("Other", "Another"):
            await answer(served, branch, previous_response_id=two["id"])
        query = served.turns[-1].json["query"]
    assert "Two" in query and "no JSON" not in query
    assert [item["content"][0]["text"] for item in items] == [
        *("One", "Hello", "Two", '{"a": 1}')
    ]
    assert [item["content"][0]["text"] for item in asked] == ["Two"]


HI_AND_TWO = [user("Hi"), {"role": "assistant", "content": "Hello"}, user("Two")]
CALLED: JSONObject = {"call_id": "c", "name": "get_weather", "arguments": "{}"}
RAN = [
    {"type": "function_call", **CALLED},
    {"type": "function_call_output", "call_id": "c", "output": "Sunny"},
]


@pytest.mark.parametrize("variable", ["", "past"], ids=["query", "input"])
@pytest.mark.parametrize("mode", ["chat", "workflow"])
@pytest.mark.parametrize(
    ("items", "last"),
    [
        pytest.param([user("Two")], "Two", id="alone"),
        pytest.param(HI_AND_TWO, "Two", id="folded"),
        pytest.param([user("Hi"), *RAN], "Sunny", id="result"),
    ],
)
async def test_second_try_is_no_question_where_it_begins_a_conversation(
    items: list[JSONObject], last: str, mode: str, variable: str
) -> None:
    """As in the conversation of the first: no client has seen that one's answer."""
    answers = iter(["no JSON", '{"a": 1}', "Bye", "Bye"])

    def script(_: fake.Request) -> list[fake.Step]:
        return fake.DEFAULT_ANSWER[mode](next(answers))

    query = {"query_variable": "q"} if mode == "workflow" else {}
    config = {**query, "history_variable": variable}
    async with proxy(script, mode=mode, config=config) as served:
        one = await answer(served, items, **AS_JSON)
        path = f"{PATH}/{one['id']}/input_items"
        ((asked,),) = [
            item["content"] for item in (await served.get(path)).json["data"]
        ]
        for branch in ("Left", "Right"):
            await answer(served, branch, previous_response_id=one["id"])
        told_last = json.dumps(served.turns[-1].json)
    assert asked["text"].endswith(f">\n{last}\n</message>")
    assert "no JSON" not in told_last and "Your last answer" not in told_last


async def test_conversation_begun_in_two_tries_goes_on_in_the_second() -> None:
    answers = iter(["no JSON", '{"a": 1}', "Bye"])
    text = {"format": {"type": "json_object"}}
    async with proxy(lambda _: fake.chat_answer(next(answers))) as served:
        made = (await post(served, CONVERSATIONS, {})).json
        one = await answer(served, "One", conversation=made["id"], text=text)
        two = await answer(served, "Two", conversation=made["id"])
        tries = told(served)
    assert one["dify"]["conversation_id"] == two["dify"]["conversation_id"]
    assert [len(queries) for queries in tries] == [1, 2]


async def test_items_are_found_when_their_model_has_another_name() -> None:
    """`.env` has changed; the app's key tells that it is the same."""
    async with proxy() as served:
        made = (await post(served, CONVERSATIONS, {})).json
        path = f"{CONVERSATIONS}/{made['id']}/items"
        await answer(served, "Hi", conversation=made["id"])
        before = (await served.get(path)).json
        dify = served.site.dify
        app = dify.settings.model_config["m"]
        apps = {"m": replace(app, key="app-other"), "new": app}
        dify.use(replace(dify.settings, model_config=apps))
        assert (await served.get(path)).json == before
    assert len(before["data"]) == 2


async def test_conversation_is_not_made_where_it_cannot_be_kept(tmp_path: Any) -> None:
    path = str(tmp_path / "c.sqlite")
    async with proxy(variables={"CONVERSATION_STORE": path}) as served:
        made = (await post(served, CONVERSATIONS, {})).json
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            got = await post(served, CONVERSATIONS, {})
            await answer(served, "Hi", conversation=made["id"])
        assert (await post(served, CONVERSATIONS, {})).status == 200
    assert (got.status, got.error["code"]) == (503, "server_is_overloaded")


async def test_conversation_is_not_denied_where_it_cannot_be_read(
    tmp_path: Any,
) -> None:
    """A client would throw away what is there again in a moment."""
    path = str(tmp_path / "c.sqlite")
    async with proxy(variables={"CONVERSATION_STORE": path}) as served:
        made = (await post(served, CONVERSATIONS, {})).json
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("ALTER TABLE opendify_named RENAME TO elsewhere")
            got = await served.get(f"{CONVERSATIONS}/{made['id']}")
            turn = await respond(served, conversation=made["id"])
            other.execute("ALTER TABLE elsewhere RENAME TO opendify_named")
        gate = asyncio.Event()
        served.dify.app(
            KEY, mode="chat", script=[fake.Wait(gate), *fake.chat_answer("Hi")]
        )
        begun = asyncio.ensure_future(respond(served, conversation=made["id"]))
        await served.dify.until(lambda: served.dify.running)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("ALTER TABLE opendify_named RENAME TO elsewhere")
            gate.set()
            answered = await begun
    for refused in (got, turn):
        assert (refused.status, refused.error["code"]) == (503, "server_is_overloaded")
    assert answered.status == 200


async def test_conversation_is_of_no_use_to_others() -> None:
    keys = {"VALID_API_KEYS": "sk-1,sk-2"}
    al, bo = ({"Authorization": f"Bearer sk-{n}"} for n in (1, 2))
    async with proxy(variables=keys) as served:
        made = (await post(served, CONVERSATIONS, {}, **al)).json
        path = f"{CONVERSATIONS}/{made['id']}"
        await answer(served, headers=al, user="u", conversation=made["id"])
        assert (await served.get(path, bo)).status == 404
        got = await respond(served, headers=al, user="v", conversation=made["id"])
    assert (got.status, got.error["param"]) == (400, "conversation")


async def test_metadata_of_a_conversation_change() -> None:
    async with proxy() as served:
        made = (await post(served, CONVERSATIONS, {"metadata": {"a": "b"}})).json
        path = f"{CONVERSATIONS}/{made['id']}"
        await answer(served, "Hi", conversation=made["id"])
        got = (await post(served, path, {"metadata": {"c": "d"}})).json
        assert (await served.get(path)).json == got
        wrong = await post(served, path, {"metadata": [1]})
        await answer(served, "More", conversation=made["id"])
        assert told(served) == [["Hi", "More"]]
    assert got == {**made, "metadata": {"c": "d"}}
    assert (wrong.status, wrong.error["param"]) == (400, "metadata")


async def test_item_that_awaits_a_turn_is_deleted() -> None:
    async with proxy() as served:
        items = [user("One"), user("Two")]
        made = (await post(served, CONVERSATIONS, {"items": items})).json
        path = f"{CONVERSATIONS}/{made['id']}/items"
        two, one = (await served.get(path)).json["data"]
        assert (await served.get(f"{path}/{two['id']}")).json == two
        got = await served.get(f"{path}/{two['id']}", method="DELETE")
        gone = await served.get(f"{path}/{two['id']}")
        again = await served.get(f"{path}/{two['id']}", method="DELETE")
        more = (await post(served, path, {"items": [user("Three")]})).json["data"]
        left = (await served.get(f"{path}?order=asc")).json["data"]
    assert got.json == made
    assert (gone.status, again.status, again.error["code"]) == (404, 404, None)
    assert left == [one, *more]
    assert len({row["id"] for row in (one, two, *more)}) == 3


async def test_item_that_awaits_a_later_turn_is_deleted() -> None:
    async with proxy() as served:
        made = (await post(served, CONVERSATIONS, {})).json
        path = f"{CONVERSATIONS}/{made['id']}/items"
        await answer(served, "One", conversation=made["id"])
        had = (await served.get(path)).json
        (two,) = (await post(served, path, {"items": [user("Two")]})).json["data"]
        await served.get(f"{path}/{two['id']}", method="DELETE")
        assert (await served.get(path)).json == had
        await answer(served, "Three", conversation=made["id"])
        assert told(served) == [["One", "Three"]]


async def test_item_that_dify_has_is_told_no_more() -> None:
    async with proxy() as served:
        made = (await post(served, CONVERSATIONS, {})).json
        for question in ("One", "Two"):
            await answer(served, question, conversation=made["id"])
        path = f"{CONVERSATIONS}/{made['id']}/items"
        items = (await served.get(f"{path}?order=asc")).json["data"]
        assert (await served.get(f"{path}/{items[2]['id']}")).json == items[2]
        got = await served.get(f"{path}/{items[2]['id']}", method="DELETE")
        left = (await served.get(f"{path}?order=asc")).json["data"]
        for question in ("Three", "Four"):
            await answer(served, question, conversation=made["id"])
        first, (folded, last) = told(served)
    assert got.json == made
    assert left == [*items[:2], items[3]]
    assert (first, last) == (["One", "Two"], "Four")
    assert ">\nOne\n<" in folded and "Two\n<" not in folded
    assert folded.endswith("\n\nThree")


async def test_upload_is_named_again_where_an_item_behind_it_is_deleted() -> None:
    """The URL that Dify shows it under expires, and apps may take none."""
    uploads = {
        **ALL_FILES["file_upload"],
        "allowed_file_upload_methods": ["local_file"],
    }
    image = {"type": "input_image", "image_url": "data:image/png;base64,iVBORw0KGgo="}
    async with proxy(parameters={**ALL_FILES, "file_upload": uploads}) as served:
        made = (await post(served, CONVERSATIONS, {})).json
        for content in ([image], "Two"):
            asked = [{"role": "user", "content": content}]
            await answer(served, asked, conversation=made["id"])
        path = f"{CONVERSATIONS}/{made['id']}/items"
        items = (await served.get(f"{path}?order=asc")).json["data"]
        await served.get(f"{path}/{items[2]['id']}", method="DELETE")
        await answer(served, "Three", conversation=made["id"])
        first, second = (turn.json["files"] for turn in served.turns[::2])
    validate("InputImageContent", items[0]["content"][1])
    assert first == second
    assert len(served.dify.uploads) == 1


@pytest.mark.parametrize("id_", ["same", 1, ["list"], ""])
async def test_item_gets_an_id_of_its_own(id_: Any) -> None:
    async with proxy() as served:
        items = [{**user("One"), "id": id_}, {**user("Two"), "id": id_}]
        made = (await post(served, CONVERSATIONS, {"items": items})).json
        path = f"{CONVERSATIONS}/{made['id']}/items"
        await post(served, path, {"items": items})
        rows = (await served.get(path)).json["data"]
    ids = [row["id"] for row in rows]
    assert all(type(row) is str and row for row in ids)
    assert len(set(ids)) == 4


@pytest.mark.parametrize(
    ("items", "param"),
    [
        pytest.param("One", "items", id="no-array"),
        pytest.param([user("Two"), user("Three")], "items", id="too-many"),
        pytest.param([{**user(""), "content": 1}], "items[0].content", id="odd"),
    ],
)
async def test_items_that_no_turn_could_take_are_refused(
    items: Any, param: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opendify, "MAX_NAMED_ITEMS", 2)
    async with proxy() as served:
        made = (await post(served, CONVERSATIONS, {"items": [user("One")]})).json
        path = f"{CONVERSATIONS}/{made['id']}/items"
        got = await post(served, path, {"items": items})
        kept = (await served.get(path)).json["data"]
    assert (got.status, got.error["type"]) == (400, "invalid_request_error")
    assert got.error["param"] == param
    assert [row["content"][0]["text"] for row in kept] == ["One"]


@contextlib.asynccontextmanager
async def first_turn() -> AsyncIterator[tuple[Proxy, Call, str]]:
    """Give a call that runs, and the path of the conversation that it begins."""
    script = [fake.message("Half"), Sleep(100), *fake.chat_answer(" of it")]
    async with proxy(script) as served:
        made = (await post(served, CONVERSATIONS, {"items": [user("One")]})).json
        body = {"model": "m", "input": "Hi", "stream": True, "conversation": made["id"]}
        call = await served.open("POST", PATH, body)
        await call.read_head()
        yield served, call, f"{CONVERSATIONS}/{made['id']}"


async def test_what_a_conversation_is_given_during_a_turn_stays() -> None:
    async with first_turn() as (served, call, path):
        await post(served, f"{path}/items", {"items": [user("Later")]})
        await post(served, path, {"metadata": {"a": "b"}})
        await call.read_rest()
        made = (await served.get(path)).json
        newest, *_ = (await served.get(f"{path}/items")).json["data"]
        await answer(served, "More", conversation=made["id"])
        ((first, second),) = told(served)
    assert made["metadata"] == {"a": "b"}
    assert newest["content"][0]["text"] == "Later"
    assert ">\nOne\n<" in first and "Later" not in first
    assert ">\nLater\n<" in second and "One" not in second


async def test_conversation_that_is_deleted_during_a_turn_stays_so() -> None:
    async with first_turn() as (served, call, path):
        await served.get(path, method="DELETE")
        got = await call.read_rest()
        assert b'"response.completed"' in got.body
        assert (await served.get(path)).status == 404


async def test_item_that_is_deleted_during_a_turn_stays_so() -> None:
    async with first_turn() as (served, call, path):
        id_ = path.rpartition("/")[2]
        await call.read_rest()
        body = {"model": "m", "input": "Two", "stream": True, "conversation": id_}
        second = await served.open("POST", PATH, body)
        await second.read_head()
        *_, first = (await served.get(f"{path}/items")).json["data"]
        await served.get(f"{path}/items/{first['id']}", method="DELETE")
        await second.read_rest()
        left = (await served.get(f"{path}/items?order=asc")).json["data"]
        await answer(served, "Three", conversation=id_)
        _, (query,) = told(served)
    assert left[0]["role"] == "assistant"
    assert "One" not in query and query.endswith("Three")


TWO_IN_ONE = opendify.fold(
    [opendify.Message("user", "q1"), opendify.Message("tool", "r1")]
)


@pytest.mark.parametrize(
    ("shown", "is_known"),
    [
        (["q1", "a1", "q2", "a2"], True),
        (["q2", "a2"], True),
        (["a1", "q2", "a2"], True),
        (["q1", "a1", "s1", "q2", "a2"], True),
        (["q1", "a1", "q", "a2"], False),
        (["q", "a1", "q2", "a2"], False),
        (["q1", "a1", "q2", "a"], False),
        (["q1", "a", "q2", "a2"], False),
        (["q2", "a2", "a1"], False),
        (["q0", "a0", "q1", "a1", "q2", "a2"], False),
        (["q1", "a1"], False),
        ([], False),
    ],
)
def test_history_is_known_if_it_is_what_dify_has_or_its_end(
    shown: list[str], is_known: bool
) -> None:
    def messages(texts: list[str]) -> tuple[opendify.Message, ...]:
        roles = {"q": "user", "a": "assistant", "s": "system"}
        return tuple(opendify.Message(roles[text[0]], text) for text in texts)

    known = messages(["q1", "a1", "q2", "a2"])
    ask = opendify.Ask("m", (*messages(shown), opendify.Message("user", "q3")))
    assert opendify.is_known_history(ask, known) == is_known


@pytest.mark.parametrize(
    ("shown", "stored", "is_known"),
    [
        (["user  q1 \n"], " q1 \n", True),
        (["user q1"], "<told>\n\nq1\n", True),
        (["user q1", "tool r1"], "<told>\n\nq1", False),
        (["tool r1", "user q1"], TWO_IN_ONE, True),
        (["user q1", "tool r2"], TWO_IN_ONE, False),
        (["user q2", "tool r1"], TWO_IN_ONE, False),
        (["tool r1"], TWO_IN_ONE, True),
        (["tool r2"], TWO_IN_ONE, False),
        (["user \n  q1"], "<told>\n\n\n  q1", True),
        (["tool   r1  "], opendify.fold([opendify.Message("tool", "  r1  ")]), True),
    ],
)
def test_question_is_known_by_all_its_messages(
    shown: list[str], stored: str, is_known: bool
) -> None:
    pairs = [text.partition(" ") for text in shown]
    asked = [opendify.Message(role, text) for role, _, text in pairs]
    answer = opendify.Message("assistant", "a1")
    ask = opendify.Ask("m", (*asked, answer, opendify.Message("user", "q3")))
    known = (opendify.Message("user", stored), answer)
    assert opendify.is_known_history(ask, known) == is_known


def test_long_history_is_compared_in_little_time() -> None:
    known = [opendify.Message("user", "q"), opendify.Message("assistant", "a")]
    asked = [opendify.Message("user", "x")] * 100_000
    with at_most(80):
        longer = opendify.Ask("m", (*asked, known[1]))
        assert not opendify.is_known_history(longer, known)
        assert opendify.is_known_history(opendify.Ask("m", tuple(known)), known)


def test_long_question_is_compared_in_little_time() -> None:
    asked = [opendify.Message("user", str(n)) for n in range(30_000)]
    answer = opendify.Message("assistant", "a")
    told = [opendify.Message("user", opendify.fold(asked)), answer]
    with at_most(80):
        opendify.is_known_history(opendify.Ask("m", (*asked, answer)), told)


@contextlib.asynccontextmanager
async def deleting(
    served: Proxy, path: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[None]:
    """What is done inside happens while an item is deleted, and Dify is asked."""
    turns_of, asked, gate = opendify._turns_of, asyncio.Event(), asyncio.Event()

    async def wait(*args: Any) -> Any:
        asked.set()
        await gate.wait()
        return await turns_of(*args)

    with monkeypatch.context() as patched:
        patched.setattr(opendify, "_turns_of", wait)
        deletion = asyncio.ensure_future(served.get(path, method="DELETE"))
        await asked.wait()
    yield
    gate.set()
    assert (await deletion).status == 200


async def test_what_comes_while_an_item_is_deleted_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with proxy() as served:
        made = (await post(served, CONVERSATIONS, {})).json
        path = f"{CONVERSATIONS}/{made['id']}"
        for text in ("One", "Two"):
            await answer(served, text, conversation=made["id"])
        *_, one = (await served.get(f"{path}/items")).json["data"]
        async with deleting(served, f"{path}/items/{one['id']}", monkeypatch):
            await post(served, path, {"metadata": {"a": "b"}})
            await post(served, f"{path}/items", {"items": [user("Three")]})
        assert (await served.get(path)).json["metadata"] == {"a": "b"}
        await answer(served, "Four", conversation=made["id"])
        _, (query,) = told(served)
    assert ">\nTwo\n<" in query and ">\nThree\n<" in query and "One\n<" not in query


async def test_conversation_deleted_while_an_item_is_stays_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with proxy() as served:
        made = (await post(served, CONVERSATIONS, {})).json
        path = f"{CONVERSATIONS}/{made['id']}"
        await answer(served, "One", conversation=made["id"])
        (_, one) = (await served.get(f"{path}/items")).json["data"]
        with pytest.raises(AssertionError):  # there is none any more
            async with deleting(served, f"{path}/items/{one['id']}", monkeypatch):
                await served.get(path, method="DELETE")
        assert (await served.get(path)).status == 404


async def test_conversation_without_an_item_is_its_users_still() -> None:
    async with proxy() as served:
        made = (await post(served, CONVERSATIONS, {})).json
        path = f"{CONVERSATIONS}/{made['id']}/items"
        await answer(served, "Mine", conversation=made["id"], user="u")
        said, _ = (await served.get(path)).json["data"]
        await served.get(f"{path}/{said['id']}", method="DELETE")
        got = await respond(served, conversation=made["id"], user="v")
        assert len(served.turns) == 1
    assert (got.status, got.error["param"]) == (400, "conversation")


async def test_items_are_not_sought_in_another_app_that_has_the_model_s_name() -> None:
    async with proxy() as served:
        made = (await post(served, CONVERSATIONS, {})).json
        await answer(served, "Hi", conversation=made["id"])
        client = served.site.dify
        models = {"m": opendify.AppSettings("app-other", served.dify.base)}
        client.use(replace(client.settings, model_config=models))
        asked = len(served.dify.requests)
        got = await served.get(f"{CONVERSATIONS}/{made['id']}/items")
        assert (got.status, got.json["data"]) == (200, [])
        assert len(served.dify.requests) == asked


async def test_items_of_a_very_long_conversation_can_not_be_deleted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(opendify, "MAX_NAMED_ITEMS", 2)
    async with proxy() as served:
        made = (await post(served, CONVERSATIONS, {})).json
        path = f"{CONVERSATIONS}/{made['id']}/items"
        for text in ("One", "Two"):
            await answer(served, text, conversation=made["id"])
        *_, one = before = (await served.get(path)).json["data"]
        got = await served.get(f"{path}/{one['id']}", method="DELETE")
        assert (await served.get(path)).json["data"] == before
    assert (got.status, got.error["param"]) == (400, None)
    assert got.error["message"] == "Can't delete: more than 2 items are left."


async def test_id_that_a_client_gave_is_found_in_a_path() -> None:
    async with proxy() as served:
        items = [{**user("One"), "id": "my item/1"}]
        made = (await post(served, CONVERSATIONS, {"items": items})).json
        path = f"{CONVERSATIONS}/{made['id']}/items/my%20item%2F1"
        assert (await served.get(path)).json["id"] == "my item/1"


async def test_workflow_needs_no_history_to_name_results() -> None:
    output = {"type": "function_call_output", "call_id": "c", "output": "x"}
    async with proxy(mode="workflow", config={"query_variable": "q"}) as served:
        await answer(served, [user("Hi"), output], conversation_id="abc")
        assert [row.path for row in served.dify.requests] == ["/workflows/run"]


async def test_history_is_not_read_but_for_results_in_a_conversation() -> None:
    output = {"type": "function_call_output", "call_id": "c", "output": "x"}
    async with proxy() as served:
        await answer(served, [user("Hi"), output])
        here = next(iter(served.dify.conversations))
        await answer(served, "More", conversation_id=here)
        assert {row.path for row in served.dify.requests} == {"/chat-messages"}


async def test_nothing_of_a_left_request_waits_for_the_collector(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exchanges: list[Any] = []
    start = opendify.Exchange.__init__

    def noted(self: Any, *args: Any, **more: Any) -> None:
        start(self, *args, **more)
        exchanges.append(weakref.ref(self))

    monkeypatch.setattr(opendify.Exchange, "__init__", noted)
    script = [fake.message("Half"), Sleep(1), *fake.chat_answer(" of it")]
    async with proxy(script) as served:
        gc.collect()
        gc.disable()
        try:
            body = {"model": "m", "input": "Hi", "stream": True}
            call = await served.open("POST", PATH, body)
            await call.read_head()
            await call.leave()
            await asyncio.sleep(5)
            assert [exchange() for exchange in exchanges] == [None]
        finally:
            gc.enable()
