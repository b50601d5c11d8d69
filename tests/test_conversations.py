"""Which conversation a request continues, and what Dify is told."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)
from work import at_most

import opendify
from opendify import (
    Ask,
    Attachment,
    Conversations,
    Message,
    NamedConversation,
    OutputFormat,
    Tail,
    Tool,
    ToolCall,
    fold,
    is_counted,
    is_side_request,
    message_digest,
    open_conversations,
    scope_of,
    split_turn,
)

WEEK = 7 * 24 * 3600.0
SCOPE = scope_of("app-key", "ada")
LONG = "An answer that nobody would mistake for another one. " * 4
CONTEXT = """### Task:
Respond to the user query using the provided context, with citations.

<context>
<source id="1">Leave is 25 days.</source>
</context>

"""


def plan_turn(
    request: Ask,
    scope: bytes,
    tail: Tail | None,
    has_room: opendify.HasRoom = lambda files: not files,
    **variables: Any,
) -> opendify.Plan:
    app = opendify.AppSettings("app-key", **variables)
    return opendify.plan_turn(request, scope, tail, app, has_room)


def user(text: str, name: str = "") -> Message:
    return Message("user", text, name)


def answer(text: str, *calls: ToolCall) -> Message:
    return Message("assistant", text, tool_calls=calls)


def chat(*texts: str) -> tuple[Message, ...]:
    """User and assistant in turn, the user first."""
    return tuple((answer if i % 2 else user)(text) for i, text in enumerate(texts))


def ask(*messages: Message, system: str = "", conversation_id: str = "") -> Ask:
    return Ask("m", messages, system, conversation_id=conversation_id)


def ask_of(*texts: str) -> Ask:
    return ask(*chat(*texts))


def record(store: Conversations, name: str, *messages: Message) -> None:
    """A conversation with this transcript, as if it had been led."""
    scope = SCOPE
    store.put(Tail(scope, name, chain=scope).extend(messages), 0.0)


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Conversations]:
    path = ":memory:" if request.param == "memory" else str(tmp_path / "table.db")
    with closing(Conversations(path, WEEK)) as table:
        yield table


def found(store: Conversations, request: Ask, scope: bytes = SCOPE) -> str:
    """The id of the conversation that is continued; it is given back."""
    tail = store.take(request, scope, 0.0)
    if tail is None:
        return ""
    store.put(tail, 0.0)
    return tail.conversation_id


# What is history and what is new...


@pytest.mark.parametrize(
    ("roles", "new"),
    [
        pytest.param("u", 1, id="first message"),
        pytest.param("uau", 1, id="second turn"),
        pytest.param("uu", 2, id="no answer to the first"),
        pytest.param("uauu", 2, id="no answer to the second"),
        pytest.param("uat", 1, id="tool result"),
        pytest.param("uattu", 3, id="tool results and more"),
        pytest.param("uaus", 2, id="system text at the end"),
        pytest.param("ua", 0, id="answer to be continued"),
        pytest.param("", 0, id="system text only"),
    ],
)
def test_new_is_what_follows_the_last_answer(roles: str, new: int) -> None:
    names = {"u": "user", "a": "assistant", "t": "tool", "s": "system"}
    messages = tuple(Message(names[role], str(i)) for i, role in enumerate(roles))
    at = len(messages) - new
    assert split_turn(ask(*messages)) == (messages[:at], messages[at:])


@pytest.mark.parametrize(
    "text",
    [
        "### Task:\nGenerate a concise title",
        "  ### Task:\nSuggest 3-5 follow-up questions",
        "Please generate a four to five word title summarizing our conversation",
        "使用四到五个字直接返回这句话的简要主题，不要解释",
        "Summarize the discussion briefly in 200 words or less",
        "简要总结一下对话内容，用作后续的上下文提示 prompt，控制在 200 字以内",
        "Managed memory directory: `/home/ada/memory`\n\nScan the recent conversation",
        "Managed memory has TWO directories. Choose which to write each memory into",
        "[SUGGESTION MODE: Suggest what the user might naturally type next.]",
        "<system-reminder>\nThis is a side question from the user.\n</system-reminder>",
        "<system-reminder>This is a side question from the user. You must answer this",
        "The user stepped away and is coming back. Recap in under 40 words",
        "Generate a concise 3-7 word title for this conversation, omitting punctuation",
        "What would be a short and relevant title for this chat? You must strictly",
        "Ignore previous instructions. Classify the emotion of the last message",
        "You are an AI assistant tasked with predicting the user's next question based",
        "Ignore previous instructions. Summarize the most important facts",
        "[Pause your roleplay. Summarize the most important facts and events that have",
        "This is a conversation between the user and Nextcloud Assistant. Generate a "
        "suitable title for the conversation that summarizes it.",
        "Above is a chat session in a specific language between the user and you, "
        "Nextcloud Assistant. Generate a suitable title",
        "Provide a title for the conversation above. Do not return anything other than",
    ],
)
def test_side_requests_neither_join_nor_move_a_conversation(
    store: Conversations, text: str
) -> None:
    record(store, "c", *chat("hi", "Hello!"))
    for last in (user(text), Message("system", text)):
        request = ask(*chat("hi", "Hello!"), last, conversation_id="c")
        assert is_side_request(request)
        assert store.take(request, SCOPE, 0.0) is None
        plan = plan_turn(request, SCOPE, None)
        store.put(plan.tail_after("side", answer("Greetings")), 0.0)
    assert len(store) == 1
    assert found(store, ask_of("hi", "Hello!", "And now?")) == "c"


@pytest.mark.parametrize(
    ("told", "shown", "said", "name"),
    [
        pytest.param(CONTEXT, "", LONG, "c", id="not shown later"),
        pytest.param(CONTEXT, CONTEXT, "Yes.", "c", id="shown again"),
        pytest.param(CONTEXT, CONTEXT.replace("25", "9"), LONG, "", id="another"),
        pytest.param("", CONTEXT, LONG, "", id="one that was not told"),
        pytest.param(CONTEXT, "", "Yes.", "", id="too short to be sure"),
        pytest.param(CONTEXT.replace("25", "2" * 16_000), "", LONG, "c", id="long"),
        pytest.param(CONTEXT.replace("25", "2" * 20_000), "", LONG, "", id="too long"),
        pytest.param(CONTEXT.replace("25", "</context>"), "", LONG, "c", id="its tag"),
        pytest.param(CONTEXT.replace("25", "\ud83d"), "", LONG, "c", id="half a pair"),
    ],
)
def test_context_of_a_question_may_be_left_out_later(
    store: Conversations, told: str, shown: str, said: str, name: str
) -> None:
    record(store, "c", user(told + "How long?"), answer(said))
    request = ask(user(shown + "How long?"), answer(said), user("And now?"))
    for tools in ((), (Tool("time"),)):  # a client may leave calls out, but no more
        assert found(store, request._replace(tools=tools)) == name


def test_questions_with_different_contexts_are_told_apart(store: Conversations) -> None:
    for days in ("25", "26"):
        told = CONTEXT.replace("25", days)
        record(store, days, user(told + "How long?"), answer(LONG))
    assert found(store, ask_of("How long?", LONG, "And now?")) == ""


def test_a_task_as_such_is_no_side_request() -> None:
    assert not is_side_request(ask_of("What does ### Task: mean?"))
    assert not is_side_request(ask_of(CONTEXT + "How long is leave?"))
    assert not is_side_request(ask_of("### Task: a title")._replace(is_all_new=True))
    assert is_side_request(ask(system="### Task: a title"))
    assert not is_side_request(ask())


@pytest.mark.parametrize(
    ("said", "shown", "name"),
    [
        pytest.param(
            "It is 42.", "> So be it.\n\n> Or\nso.\n\nIt is 42.", "c", id="thoughts"
        ),
        pytest.param("> A\n\nB", "> A\n\nB", "c", id="the app's quote"),
        pytest.param("> A\n\nB", "> Z\n\nB", "", id="another quote"),
        pytest.param("> A\n\nB", "B", "", id="a quote that is left out"),
        pytest.param("", "> A\n\n", "", id="nothing but a quote"),
    ],
)
def test_thoughts_may_be_shown_as_quotes(
    store: Conversations, said: str, shown: str, name: str
) -> None:
    record(store, "c", *chat("hi", said))
    request = ask_of("hi", shown, "And now?")
    assert found(store, request) == name
    if tail := store.take(request, SCOPE, 0.0):
        store.put(tail.extend(chat("And now?", "Bye!")), 0.0)
    assert found(store, ask_of("hi", shown, "And now?", "Bye!", "So?")) == name


# Which messages are equal...


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(user("a  b\n"), user(" a b"), id="white space"),
        pytest.param(
            answer("<think>\nhm\n</think>\n\nYes"), answer("Yes"), id="think block"
        ),
        pytest.param(
            answer("<THINK a=1>x</THINK> <think>y</think>Yes"), answer("Yes"), id="two"
        ),
        pytest.param(
            answer(
                '<details style="color:gray;" open> <summary> Thinking... </summary>'
                "\nhm\n</details>\n\nYes"
            ),
            answer("Yes"),
            id="details block of old releases",
        ),
        pytest.param(
            answer(
                '<details type="reasoning" done="true" duration="3">\n'
                "<summary>Thought for 3 seconds</summary>\n&gt; hm\n</details>\nYes"
            ),
            answer("Yes"),
            id="details block of Open WebUI",
        ),
        pytest.param(
            answer("", ToolCall("1", "f", "{a")),
            answer("", ToolCall("1", "f", " {a\n")),
            id="no JSON in white space",
        ),
        pytest.param(
            answer("", ToolCall("1", "f", '{"a":1,"b":"ü"}')),
            answer("", ToolCall("2", "f", '{"b": "\\u00fc", "a": 1}')),
            id="call written otherwise",
        ),
        pytest.param(
            answer("", ToolCall("call_1", "f", '{"a":1}')),
            answer("", ToolCall("call_1", "f", '{"a":1,"id":"call_1"}')),
            id="call with its id among the arguments, of n8n",
        ),
        pytest.param(
            answer('{"a": 1, "b": "\\u00fc"}'), answer('{"b":"ü","a":1}'), id="JSON"
        ),
        pytest.param(answer('{"a":\n1'), answer('{"a": 1'), id="no JSON"),
        pytest.param(
            answer("Let me see.", ToolCall("1", "f", "{}")),
            answer("", ToolCall("1", "f", "{}")),
            id="text beside a call",
        ),
        pytest.param(
            answer("x\ud83dy"), answer("x\ufffdy"), id="half a surrogate pair"
        ),
        pytest.param(
            answer("x"), Message("assistant", "x", name="gpt-4"), id="name of the model"
        ),
        pytest.param(
            Message("user", "x", attachments=(Attachment("a.png", data=b"1"),)),
            Message("user", "x", attachments=(Attachment("b.png", data=b"1"),)),
            id="file by another name",
        ),
    ],
)
def test_messages_that_are_the_same(one: Message, other: Message) -> None:
    assert message_digest(SCOPE, one) == message_digest(SCOPE, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(user("ab"), user("a b"), id="words"),
        pytest.param(user("a"), answer("a"), id="role"),
        pytest.param(user("a"), user("a", "Ada"), id="name of a user"),
        pytest.param(user("<think>x</think>a"), user("a"), id="a user's tags"),
        pytest.param(
            answer("see <think>x</think>"), answer("see"), id="tags inside an answer"
        ),
        pytest.param(
            answer("", ToolCall("", "f", "{}")),
            answer("", ToolCall("", "g", "{}")),
            id="call",
        ),
        pytest.param(
            answer("", ToolCall("", "f", '{"a":1}')),
            answer("", ToolCall("", "f", '{"a":2}')),
            id="arguments",
        ),
        pytest.param(answer('{"a": 1}'), answer('{"a": 2}'), id="value of JSON"),
        pytest.param(answer("{a"), answer("{b"), id="text like JSON"),
        pytest.param(
            answer("", ToolCall("call_1", "f", '{"id":1}')),
            answer("", ToolCall("call_1", "f", '{"id":2}')),
            id="an id among the arguments",
        ),
        pytest.param(
            answer("", ToolCall("", "f", "{a")),
            answer("", ToolCall("", "f", "{b")),
            id="arguments that are no JSON",
        ),
        pytest.param(
            Message("user", "x", attachments=(Attachment("a", data=b"1"),)),
            Message("user", "x", attachments=(Attachment("a", data=b"2"),)),
            id="bytes of a file",
        ),
        pytest.param(
            Message("user", "x", attachments=(Attachment("a", url="http://a/1"),)),
            Message("user", "x", attachments=(Attachment("a", url="http://a/2"),)),
            id="URL of a file",
        ),
        pytest.param(
            Message("user", "x", attachments=(Attachment("a", upload_id="1"),)),
            Message("user", "x", attachments=(Attachment("a", upload_id="2"),)),
            id="stored file",
        ),
        pytest.param(
            Message("user", "x", attachments=(Attachment("a", data=b"1"),)),
            user("x"),
            id="file or none",
        ),
    ],
)
def test_messages_that_are_not_the_same(one: Message, other: Message) -> None:
    assert message_digest(SCOPE, one) != message_digest(SCOPE, other)


def test_deep_arguments_and_many_open_tags_cost_little() -> None:
    tags = [user(f"<message-{n}>") for n in range(2000)]
    with at_most(24):
        message_digest(SCOPE, answer("", ToolCall("", "f", "[" * 100_000)))
        message_digest(SCOPE, answer("<think>" * 100_000))
        message_digest(SCOPE, answer("<details><summary>" + "Thinking" * 100_000))
        folded = fold([user("<message-" * 100_000), *tags])
    assert folded.startswith("<message-2000 ")


# What matches...

TALK = ("u1", LONG + "1", "u2", LONG + "2", "u3", LONG + "3", "u4", LONG + "4")
SHORT = ("u1", "a1", "u2", "a2", "u3", "a3")


@pytest.mark.parametrize(
    ("transcript", "request_"),
    [
        pytest.param(TALK, (*TALK, "new"), id="whole"),
        pytest.param(TALK[:2], (*TALK[:2], "new"), id="second turn"),
        pytest.param(TALK, (*TALK[4:], "new"), id="last 5"),
        pytest.param(TALK, (*TALK[6:], "new"), id="one exchange, a long answer"),
        pytest.param(
            *(("x", "OK", "问", "答案" * 40), ("问", "答案" * 40, "new")),
            id="one exchange, long in Chinese",
        ),
        pytest.param(("hi", "Hello!"), ("hi", "Hello!", "new"), id="short but whole"),
        pytest.param(SHORT, (*SHORT[2:], "new"), id="two exchanges, short answers"),
    ],
)
def test_a_history_that_ends_a_transcript_continues_it(
    store: Conversations, transcript: tuple[str, ...], request_: Any
) -> None:
    record(store, "c", *chat(*transcript))
    assert found(store, ask_of(*request_)) == "c"


def test_a_window_may_start_with_an_answer(store: Conversations) -> None:
    record(store, "c", *chat(*TALK))
    assert found(store, ask(*chat(*TALK)[5:], user("new"))) == "c"
    assert found(store, ask(*chat(*TALK)[7:], user("new"))) == "c"


@pytest.mark.parametrize(
    ("transcript", "request_"),
    [
        pytest.param(TALK, ("u1",), id="no history"),
        pytest.param(TALK, (*TALK[:6], "u4"), id="regenerated"),
        pytest.param(TALK, (*TALK[:3], "edited", *TALK[4:], "new"), id="answer edited"),
        pytest.param(TALK, ("edited", *TALK[1:], "new"), id="message edited"),
        pytest.param(TALK, (*TALK[:2], *TALK[4:], "new"), id="middle deleted"),
        pytest.param(TALK, ("u0", "a0", *TALK, "new"), id="longer"),
        pytest.param(SHORT, (*SHORT[4:], "new"), id="one exchange, a short answer"),
        pytest.param(
            ("x", LONG, "y", "OK") * 2,
            ("x", LONG, "y", "OK", "x"),
            id="stands there twice",
        ),
    ],
)
def test_another_history_does_not(
    store: Conversations, transcript: tuple[str, ...], request_: Any
) -> None:
    record(store, "c", *chat(*transcript))
    assert found(store, ask_of(*request_)) == ""
    assert found(store, ask_of(*transcript, "and on")) == "c"


def test_text_beside_a_call_makes_no_window_clear(store: Conversations) -> None:
    call = answer(LONG, ToolCall("1", "time", "{}"))
    result = Message("tool", "12:00")
    record(store, "c", user("x"), answer("OK"), user("y"), call)
    assert found(store, ask(user("y"), call, result)) == ""
    assert found(store, ask(*chat("x", "OK", "y"), call, result)) == "c"


def test_a_window_that_ends_two_transcripts_continues_neither(
    store: Conversations,
) -> None:
    record(store, "c1", *chat("x", "OK", *TALK))
    record(store, "c2", *chat("y", "OK", *TALK))
    assert found(store, ask_of(*TALK, "new")) == ""
    assert found(store, ask_of("y", "OK", *TALK, "new")) == "c2"
    record(store, "c3", *chat(*TALK))
    assert found(store, ask_of(*TALK, "new")) == "c3"


def test_nobody_else_finds_it(store: Conversations) -> None:
    record(store, "c", *chat(*TALK))
    request = ask_of(*TALK, "new")
    assert found(store, request, scope_of("app-key", "bob")) == ""
    assert found(store, request, scope_of("other-key", "ada")) == ""
    assert found(store, request, scope_of("app-keya", "da")) == ""
    explicit = ask_of(*TALK, "new")
    stranger = scope_of("app-key", "bob")
    tail = store.take(ask(*explicit.messages, conversation_id="c"), stranger, 0.0)
    assert tail is not None
    assert tail.length == 0  # all that is known is the id
    store.forget(tail)
    assert found(store, request) == "c"


def test_a_taken_tail_is_not_found_until_it_is_put_back(store: Conversations) -> None:
    record(store, "c", *chat(*TALK))
    request = ask_of(*TALK, "new")
    tail = store.take(request, SCOPE, 0.0)
    assert tail is not None
    assert store.take(request, SCOPE, 0.0) is None
    assert store.take(ask_of(*TALK[4:], "new"), SCOPE, 0.0) is None
    store.put(tail, 0.0)
    assert store.take(request, SCOPE, 0.0) == tail


def test_turn_that_failed_is_not_tried_again_in_another_conversation(
    store: Conversations,
) -> None:
    """Where an app answers in set words, another's may end as this one does."""
    record(store, "other", *chat("my secret", "Yes?", "when?", LONG))
    record(store, "own", *chat("when?", LONG))
    request = ask_of("when?", LONG, "thanks")
    tail = store.take(request, SCOPE, 0.0)
    assert tail is not None
    assert tail.conversation_id == "own"
    store.forget(tail)
    assert found(store, request) == ""


def test_conversation_whose_turn_failed_is_learned_anew_by_its_id(
    store: Conversations,
) -> None:
    """Else the system text would be told again in every turn there."""
    talk = chat("hi", "Hello!", "what?", "That.", "new")

    def by_id(id_: str, text: str) -> str:
        request = ask(user(text), conversation_id=id_, system="Be brief.")
        query, name = turn(store, request, "Yes.", id_)
        assert name == id_
        return query

    for id_ in "cd":  # equal ones
        record(store, id_, *talk[:-1])
    for _ in "cd":
        tail = store.take(ask(*talk), SCOPE, 0.0)
        assert tail is not None
        store.forget(tail)
    for id_ in "cd":
        assert "Be brief." in by_id(id_, "one")
        assert (by_id(id_, "two"), by_id(id_, "three")) == ("two", "three")
    assert found(store, ask(*talk)) == ""


@pytest.mark.parametrize("size", [4, 6])
def test_what_a_taken_transcript_ends_with_leads_into_no_other(
    store: Conversations, size: int
) -> None:
    """Sent twice, it must not go on where somebody said the same after other things."""
    talk = chat("a", "b", "hi", "Hello!", "bye", "Bye!")
    record(store, "own", *talk)
    record(store, "other", *chat("my secret", "Yes?"), *talk[-size:])
    sent_twice = ask(*talk[-size:], user("new"))
    by_id = ask(user("new"), conversation_id="own")
    for _ in range(2):  # after the second, nobody knows where it stands
        store.take(by_id, SCOPE, 0.0)
        assert found(store, sent_twice) == ""


@pytest.mark.parametrize("hidden", [0, 2], ids=["whole", "window"])
def test_identical_talks_each_have_one_taker(store: Conversations, hidden: int) -> None:
    talk = ("u", "OK", "hi", LONG)
    for i in range(10):
        record(store, f"c{i}", *chat(*talk))
    request = ask_of(*talk[hidden:], "new")
    tails = [store.take(request, SCOPE, 0.0) for _ in range(100)]
    taken = sorted(tail.conversation_id for tail in tails if tail)
    assert taken == sorted(f"c{i}" for i in range(10))


def test_a_stock_phrase_hides_nothing_but_windows(store: Conversations) -> None:
    for i in range(200):
        record(store, f"c{i}", *chat(f"x{i}", "OK", "y", "Bye!"))
    assert found(store, ask_of("x7", "OK", "y", "Bye!", "new")) == "c7"
    assert found(store, ask(*chat("x7", "OK", "y", "Bye!")[1:], user("new"))) == ""


def test_a_window_is_told_from_others_with_the_same_answer(
    store: Conversations,
) -> None:
    record(store, "c", *chat("u1", "OK", "u2", LONG))
    for i in range(63):
        record(store, f"c{i}", *chat("u1", "OK", f"x{i}", LONG))
    assert found(store, ask_of("u2", LONG, "new")) == "c"
    # Of more not all are looked at: one that is not may end so, too.
    record(store, "c63", *chat("u1", "OK", "x63", LONG))
    record(store, "other", *chat("x", "OK", "u2", LONG))
    assert store.take(ask_of("x", "OK", "u2", LONG, "new"), SCOPE, 0.0)
    assert found(store, ask_of("u2", LONG, "new")) == ""


def test_very_long_transcripts_match_whole_and_by_windows(store: Conversations) -> None:
    texts = tuple(f"text {i}" for i in range(1000))
    record(store, "c", *chat(*texts))
    assert found(store, ask_of(*texts, "new")) == "c"
    assert found(store, ask_of(*texts[-4:], "new")) == "c"
    assert found(store, ask_of(*texts[-128:], "new")) == "c"
    assert found(store, ask_of(*texts[-130:], "new")) == ""
    assert found(store, ask_of("edited", *texts[1:], "new")) == ""


def test_system_text_is_no_part_of_a_history(store: Conversations) -> None:
    record(store, "c", *chat(*TALK))
    messages = (Message("system", "12:00"), *chat(*TALK), user("new"))
    assert found(store, ask(*messages, system="It is 12:01.")) == "c"


def test_an_answer_to_be_continued_starts_anew_and_is_not_recorded(
    store: Conversations,
) -> None:
    record(store, "c", *chat(*TALK))
    request = ask(*chat(*TALK))
    assert store.take(request, SCOPE, 0.0) is None
    plan = plan_turn(request, SCOPE, None)
    store.put(plan.tail_after("c2", answer("more")), 0.0)
    assert len(store) == 1


# Explicit ids...


@pytest.mark.parametrize("id_", ["c", "C"])
def test_an_explicit_id_is_taken_as_given_and_moves_its_tail(
    id_: str, store: Conversations
) -> None:
    record(store, "c", *chat(*TALK))
    request = ask_of("only the new one")
    named = ask(*request.messages, conversation_id=id_)
    tail = store.take(named, SCOPE, 0.0)
    plan = plan_turn(named, SCOPE, tail)
    assert (plan.query, plan.tail.conversation_id) == ("only the new one", "c")
    store.put(plan.tail_after("c", answer("an answer")), 0.0)
    assert found(store, ask_of(*TALK, "new")) == ""
    whole = (*TALK, "only the new one", "an answer")
    assert found(store, ask_of(*whole, "new")) == "c"


def test_an_unknown_id_is_learned_from_its_end_only(store: Conversations) -> None:
    named = ask(*chat("u1", "a1", "u2"), conversation_id="c")
    for text in (LONG + "1", LONG + "2"):
        plan = plan_turn(named, SCOPE, store.take(named, SCOPE, 0.0))
        assert (plan.query, plan.tail.conversation_id) == ("u2", "c")
        store.put(plan.tail_after("c", answer(text)), 0.0)
    assert found(store, ask_of("u2", LONG + "2", "new")) == "c"
    assert found(store, ask_of("u2", LONG + "1", "u2", LONG + "2", "new")) == "c"
    assert found(store, ask_of("u1", "a1", "u2", LONG + "1", "new")) == ""


@pytest.mark.parametrize("tools", [(), (Tool("f"),)], ids=["plain", "with-tools"])
def test_what_is_known_by_its_end_is_never_a_whole_match(
    store: Conversations, tools: tuple[Tool, ...]
) -> None:
    """Nor where calls may have been left out: none were."""
    named = ask(user("hi"), conversation_id="c")
    plan = plan_turn(named, SCOPE, store.take(named, SCOPE, 0.0))
    store.put(plan.tail_after("c", answer("Hello!")), 0.0)
    request = ask_of("hi", "Hello!", "new")._replace(tools=tools)
    assert found(store, request) == ""


@pytest.mark.parametrize("is_first_late", [True, False])
def test_two_turns_at_once_by_id_leave_nothing_to_find(
    store: Conversations, is_first_late: bool
) -> None:
    record(store, "c", *chat(*TALK))
    guessed = ask_of(*TALK, "new")
    first = plan_turn(guessed, SCOPE, store.take(guessed, SCOPE, 0.0))
    named = ask(user("me too"), conversation_id="c")
    second = plan_turn(named, SCOPE, store.take(named, SCOPE, 0.0))
    assert second.tail.conversation_id == "c"
    tails = [
        second.tail_after("c", answer(LONG + "second")),
        first.tail_after("c", answer(LONG + "first")),
    ]
    for tail in tails if is_first_late else reversed(tails):
        store.put(tail, 0.0)
        assert found(store, ask_of("me too", LONG + "second", "x")) == ""
        assert found(store, ask_of(*TALK, "new", LONG + "first", "x")) == ""
    third = store.take(named, SCOPE, 0.0)
    assert third is not None
    assert third.conversation_id == "c"


@pytest.mark.parametrize("is_failed", [True, False])
def test_of_two_turns_at_once_by_id_both_are_lost_however_one_ends(
    store: Conversations, is_failed: bool
) -> None:
    """It failed, or continued an answer: what Dify remembers of it, nobody knows."""
    record(store, "c", *chat(*TALK))
    named = ask(user("me too"), conversation_id="c")
    one, other = (store.take(named, SCOPE, 0.0) for _ in range(2))
    assert one is not None
    if is_failed:
        store.forget(one)
    else:
        store.put(one._replace(length=0), 0.0)
    plan = plan_turn(named, SCOPE, other)
    store.put(plan.tail_after("c", answer(LONG)), 0.0)
    assert found(store, ask_of("me too", LONG, "x")) == ""


def test_an_answer_continued_by_id_is_learned_anew(store: Conversations) -> None:
    record(store, "c", *chat(*TALK))
    for text in ("more", LONG + "5"):
        named = ask(*chat(*TALK), conversation_id="c")
        tail = store.take(named, SCOPE, 0.0)
        assert tail is not None
        assert tail.is_taken
        store.put(plan_turn(named, SCOPE, tail).tail_after("c", answer(text)), 0.0)
        assert len(store) == 0
    assert found(store, ask_of(*TALK, "new")) == ""


def test_ids_that_are_no_ids_do_no_harm(store: Conversations) -> None:
    for bad in ("\ud800", "x" * 100_000, "'; DROP TABLE opendify_tails; --", "\0"):
        named = ask(user("hi"), conversation_id=bad)
        tail = store.take(named, SCOPE, 0.0)
        assert tail is not None
        assert tail.conversation_id == bad
        store.put(plan_turn(named, SCOPE, tail).tail_after(bad, answer("x")), 0.0)
        store.remove(tail)
    assert len(store) == 0


def test_an_id_that_is_no_id_harms_no_other(store: Conversations) -> None:
    for name in ("a", "\ud800", "b", "\udfff", "c2"):
        record(store, name, *chat(f"to {name!r}", "x"))
    for name in ("a", "b", "c2"):
        assert found(store, ask_of(f"to {name!r}", "x", "new")) == name


# The whole life of a turn...


def turn(
    store: Conversations, request: Ask, text: str, fresh: str, variable: str = ""
) -> tuple[str, str]:
    """One turn that goes well: (query, conversation)."""
    tail = store.take(request, SCOPE, 0.0)
    plan = plan_turn(request, SCOPE, tail, system_variable=variable)
    name = plan.tail.conversation_id or fresh
    store.put(plan.tail_after(name, answer(text)), 0.0)
    return plan.query, name


@pytest.mark.parametrize("window", [1000, 5, 4])
def test_twenty_turns_are_one_conversation(store: Conversations, window: int) -> None:
    texts: list[str] = []
    for i in range(20):
        texts.append(f"question {i}")
        visible = chat(*texts)[-window:]
        request = ask(*visible, system=f"It is {i} o'clock.")
        query, name = turn(store, request, f"answer {i}", f"c{i}")
        assert name == "c0"
        assert query.endswith(f"question {i}")
        texts.append(f"answer {i}")
    assert len(store) == 1


def test_a_tool_loop_is_one_conversation(store: Conversations) -> None:
    call = answer("Let me see.", ToolCall("call_1", "weather", '{"city": "Rome"}'))
    first = ask(user("Weather?"))
    plan = plan_turn(first, SCOPE, store.take(first, SCOPE, 0.0))
    store.put(plan.tail_after("c", call), 0.0)
    result = Message("tool", "21 degrees", name="call_1")
    sent_back = answer("Let me see.", ToolCall("call_1", "weather", '{"city":"Rome"}'))
    query, name = turn(store, ask(user("Weather?"), sent_back, result), "Warm.", "c2")
    assert name == "c"
    assert query == '<message role="tool" name="call_1">\n21 degrees\n</message>'
    last = ask(user("Weather?"), sent_back, result, answer("Warm."), user("Thanks"))
    assert turn(store, last, "Welcome.", "c3") == ("Thanks", "c")


CALL = answer("Let me see.", ToolCall("call_1", "weather", '{"city": "Rome"}'))
RESULT = Message("tool", "21 degrees")
WEATHER = Tool("weather")


def ask_with_tools(*messages: Message) -> Ask:
    return ask(*messages)._replace(tools=(WEATHER,))


def test_a_window_may_show_calls(store: Conversations) -> None:
    said = (user("Weather?"), CALL, RESULT, answer("Warm."))
    record(store, "c", *chat("Hi", "Hello!"), *said)
    assert found(store, ask_with_tools(*said, user("Thanks"))) == "c"


def test_calls_that_are_answered_may_be_left_out(store: Conversations) -> None:
    """n8n, Flowise and many frameworks store a question and its last answer."""
    record(store, "c", user("Weather?"), CALL, RESULT, CALL, RESULT, answer("Warm."))
    said = (user("Weather?"), answer("Warm."))
    request = ask_with_tools(*said, user("Thanks"))
    assert turn(store, request, "Welcome.", "c2") == ("Thanks", "c")
    assert (
        found(store, ask_with_tools(*request.messages, answer("Welcome."), user("Bye")))
        == "c"
    )
    later = (answer("Warm."), user("Thanks"), answer("Welcome."), user("Bye"))
    assert found(store, ask_with_tools(*later)) == "c"  # a window with two answers


@pytest.mark.parametrize("steps", [(CALL,), (CALL, RESULT, CALL)])
def test_calls_of_the_round_that_runs_are_shown(
    store: Conversations, steps: tuple[Message, ...]
) -> None:
    """Who leaves out the calls of earlier turns still shows those of the last one."""
    before, now = (user("Weather?"), answer("Warm.")), user("And now?")
    record(store, "c", before[0], CALL, RESULT, before[1], now, *steps)
    assert found(store, ask_with_tools(*before, now, *steps, RESULT)) == "c"
    assert found(store, ask_with_tools(*before, now, CALL, CALL, RESULT)) == ""


@pytest.mark.parametrize(
    "history",
    [
        pytest.param([user("Rain?"), answer("Warm.")], id="another question"),
        pytest.param([answer("Warm.")], id="a short window"),
        pytest.param([user(CONTEXT + "Weather?"), answer("Warm.")], id="a context"),
        pytest.param(
            [user("Weather?"), CALL, Message("tool", "9 degrees"), answer("Warm.")],
            id="another result",
        ),
        pytest.param([user("Weather?"), CALL], id="not answered"),
    ],
)
def test_what_else_is_shown_without_calls_is_another_chat(
    store: Conversations, history: list[Message]
) -> None:
    record(store, "c", user("Weather?"), CALL, RESULT, answer("Warm."))
    assert found(store, ask_with_tools(*history, user("Thanks"))) == ""


def test_chats_that_differ_in_their_calls_alone_are_not_confused(
    store: Conversations,
) -> None:
    said = (user("Weather?"), answer("Warm."))
    for name, result in (("c", RESULT), ("d", Message("tool", "19 degrees"))):
        record(store, name, said[0], CALL, result, said[1])
    assert found(store, ask_with_tools(*said, user("Thanks"))) == ""
    request = ask_with_tools(said[0], CALL, RESULT, said[1], user("Thanks"))
    assert found(store, request) == "c"


def test_calls_are_not_left_out_where_a_history_is_an_input(
    store: Conversations,
) -> None:
    """Which messages the input is to hold is found by their number."""
    tail = Tail(SCOPE, "c", chain=SCOPE, folded=1)
    said = (user("Weather?"), answer("Warm."))
    store.put(tail.extend((said[0], CALL, RESULT, said[1])), 0.0)
    assert found(store, ask_with_tools(*said, user("Thanks"))) == ""


def test_nothing_is_known_of_what_was_removed(store: Conversations) -> None:
    record(store, "c", *chat(*TALK))
    request = ask_of(*TALK, "new")
    tail = store.take(request, SCOPE, 0.0)
    assert tail is not None
    store.remove(tail)
    assert (found(store, request), len(store)) == ("", 0)


# System text...


def test_system_text_is_told_when_it_has_changed(store: Conversations) -> None:
    first = ask(user("hi"), system="Be brief.")
    query, _ = turn(store, first, "Hello!", "c")
    assert query == '<message role="system">\nBe brief.\n</message>\n\nhi'
    talk = chat("hi", "Hello!", "new")
    same = ask(*talk, system="Be brief.")
    assert turn(store, same, "1", "x") == ("new", "c")
    talk = (*talk, *chat("x", "1")[1:], user("more"))
    other = ask(*talk, system="Be kind.")
    expected = '<message role="system">\nBe kind.\n</message>\n\nmore'
    assert turn(store, other, "2", "x") == (expected, "c")
    talk = (*talk, answer("2"), user("go on"))
    assert turn(store, ask(*talk), "3", "x") == ("go on", "c")
    talk = (*talk, answer("3"), user("still"))
    assert turn(store, ask(*talk, system="Be kind."), "4", "x") == ("still", "c")


@pytest.mark.parametrize("variable", ["", "rules"])
@pytest.mark.parametrize("window", [0, 2])
def test_of_equal_talks_the_one_with_this_system_text_goes_on(
    store: Conversations, window: int, variable: str
) -> None:
    """Two assistants that are greeted alike keep their own memories."""
    long = "Hello! " * 40
    for name, system in (("a", "Be brief."), ("b", "Be kind."), ("c", "")):
        first = ask(*chat("earlier", "Yes?", "hi"), system=system)
        assert turn(store, first, long, name, variable)[1] == name
    talk = chat("earlier", "Yes?", "hi", long, "new")[window:]
    asked = {"b": "Be kind.", "a": "Be brief.", "c": "  "}
    assert [found(store, ask(*talk, system=text)) for text in asked.values()] == [
        *asked
    ]


@pytest.mark.parametrize("system", ["Today is day {}.", ""])
def test_of_equal_talks_the_one_with_these_inputs_goes_on(
    store: Conversations, system: str
) -> None:
    """What an app has read for one customer is not told to another."""

    def talk(number: int, *more: str) -> Ask:
        inputs: dict[str, Any] = {"customer": number, "lang": "en"}
        inputs = inputs if more else dict(sorted(inputs.items(), reverse=True))
        request = ask_of("hi", *more)._replace(inputs=inputs)
        return request._replace(system=system.format(len(more)))

    for number in (1, 2, 3):
        assert turn(store, talk(number), "Hello!", str(number))[1] == str(number)
    more = ("Hello!", "and?")
    assert [found(store, talk(number, *more)) for number in (3, 1, 2)] == [*"312"]
    assert store.take(talk(2, *more), SCOPE, 0.0)
    assert found(store, talk(2, *more)) == found(store, talk(4, *more)) == ""


def test_equal_talks_of_an_older_file_keep_to_their_system_texts(
    store: Conversations,
) -> None:
    """It has a hash of the system text alone, and none without one."""
    systems = ("Be brief.", "Be kind.", "", "Be rude.")
    for system in systems:
        plan = plan_turn(ask(user("hi"), system=system), SCOPE, None)
        tail = plan.tail_after(f"c {system}", answer("Hello!"))
        store.put(tail._replace(told=tail.told[:8] if system else b""), 0.0)
    for system in systems:
        request = ask(*chat("hi", "Hello!", "and?"), system=system)
        assert turn(store, request, "Yes.", "x") == ("and?", f"c {system}")


def test_inputs_may_change_where_no_other_talk_is_equal(store: Conversations) -> None:
    texts: list[str] = []
    for page in range(4):
        request = ask_of(*texts, "hi")._replace(inputs={"page": page})
        assert turn(store, request, f"answer {page}", f"c{page}")[1] == "c0"
        texts += ["hi", f"answer {page}"]


def test_system_text_between_messages_is_told_once(store: Conversations) -> None:
    first = ask(user("hi"), Message("system", "It rains."))
    query, _ = turn(store, first, "Hello!", "c")
    assert query == (
        '<message role="user">\nhi\n</message>\n'
        '<message role="system">\nIt rains.\n</message>'
    )
    again = ask(*first.messages, answer("Hello!"), user("new"))
    assert turn(store, again, "x", "c2") == ("new", "c")
    added = (Message("system", "It snows."), *again.messages, answer("x"), user("So?"))
    query, name = turn(store, ask(*added), "y", "c3")
    assert name == "c"
    assert query == (
        '<message role="system">\nIt snows.\n</message>\n'
        '<message role="system">\nIt rains.\n</message>\n\nSo?'
    )


def test_text_between_messages_is_told_again_when_it_has_changed(
    store: Conversations,
) -> None:
    turn(store, ask(user("hi"), system="Be kind."), "0", "c")
    queries, talk = [], [user("hi"), answer("0")]
    for number, weather in enumerate(["rains", "snows", "snows"]):
        talk.append(user(str(number)))
        told = Message("system", f"It {weather}.")
        query, name = turn(store, ask(told, *talk, system="Be kind."), "x", "new")
        assert name == "c"
        queries.append(re.findall("Be kind|It rains|It snows", query))
        talk.append(answer("x"))
    assert queries == [["Be kind", "It rains"], ["Be kind", "It snows"], []]


def test_file_of_a_system_message_is_sent_when_it_has_changed(
    store: Conversations,
) -> None:
    def sent(view: str, *talk: Message) -> tuple[str, ...]:
        file = Attachment("view.png", url=f"https://x/{view}.png")
        request = ask(Message("system", "The room:", attachments=(file,)), *talk)
        tail = store.take(request, SCOPE, 0.0)
        plan = plan_turn(request, SCOPE, tail, has_room=lambda _: True)
        store.put(plan.tail_after("c", answer("Yes.")), 0.0)
        assert all(file.url in plan.query for file in plan.files)
        return tuple(file.url for file in plan.files)

    assert sent("1", *chat("hi")) == ("https://x/1.png",)
    assert sent("1", *chat("hi", "Yes.", "and?")) == ()
    talk = chat("hi", "Yes.", "and?", "Yes.", "now?")
    assert sent("2", *talk) == ("https://x/2.png",)
    assert sent("2", *talk, answer("Yes."), user("So?")) == ()


def test_text_between_messages_is_told_once_beside_a_system_variable(
    store: Conversations,
) -> None:
    """The variable has the text that opens the history, whatever it says by now."""
    talk = [user("hi"), answer("0"), Message("system", "It rains."), user("1")]
    turn(store, ask(*talk[:1], system="It is noon."), "0", "c", "rules")
    query, _ = turn(store, ask(*talk, system="It is one."), "1", "x", "rules")
    assert "It rains." in query
    for hour in ("2", "3"):
        talk += [answer(talk[-1].text), user(hour)]
        request = ask(*talk, system=f"It is {hour}.")
        assert turn(store, request, hour, "x", "rules") == (hour, "c")
    talk += [answer("3"), user("4")]
    talk[2] = Message("system", "It snows.")
    query, name = turn(store, ask(*talk), "4", "x", "rules")
    assert ("It snows." in query, name) == (True, "c")


def test_a_system_variable_takes_the_system_text_in_every_turn() -> None:
    request = Ask("m", (user("hi"),), "Be brief.", inputs={"lang": "en"})
    plan = plan_turn(request, SCOPE, None, system_variable="persona")
    assert plan.query == "hi"
    assert plan.inputs == {"lang": "en", "persona": "Be brief."}
    tail = plan.tail_after("c", answer("Hello!"))
    request = ask(*chat("hi", "Hello!", "new"), system="Be kind.")
    plan = plan_turn(request, SCOPE, tail, system_variable="persona")
    assert (plan.query, plan.inputs) == ("new", {"persona": "Be kind."})
    plan = plan_turn(ask(user("hi")), SCOPE, None, system_variable="persona")
    assert plan.inputs == {}


def test_one_variable_takes_the_system_text_until_there_is_a_history() -> None:
    request = ask(user("hi"), system="Be brief.")
    plan = plan_turn(
        request, SCOPE, None, system_variable="past", history_variable="past"
    )
    assert plan.inputs == {"past": "Be brief."}


# The fold...


def queried(*messages: Message, system: str = "", **options: Any) -> str:
    return plan_turn(ask(*messages, system=system), SCOPE, None, **options).query


def test_a_single_message_is_sent_as_it_is() -> None:
    assert queried(user("  What <message> is it?\n")) == "  What <message> is it?\n"


@pytest.mark.parametrize("role", ["system", "tool"])
def test_a_single_message_of_no_user_says_whose_it_is(role: str) -> None:
    tail = plan_turn(ask_of("hi"), SCOPE, None).tail_after("c", answer("Hello!"))
    request = ask(*chat("hi", "Hello!"), Message(role, "12:00"))
    told = f'<message role="{role}">\n12:00\n</message>'
    assert plan_turn(request, SCOPE, tail).query == told


def test_a_history_is_folded_with_its_roles_and_in_order() -> None:
    assert queried(
        *chat("Hi, I'm Ada.", "Hello Ada!", "Who am I?"), system="Be brief."
    ) == (
        textwrap.dedent(
            """\
            The conversation so far:

            <message role="system">
            Be brief.
            </message>
            <message role="user">
            Hi, I'm Ada.
            </message>
            <message role="assistant">
            Hello Ada!
            </message>

            Answer this message:

            Who am I?"""
        )
    )


def test_names_calls_results_and_files_are_folded() -> None:
    cat = Attachment("cat.png", "image/png", data=b"1")
    page = Attachment("page", url="https://example.org/page")
    messages = (
        Message("user", "What's this?", "Ada", attachments=(cat, page)),
        answer("I look it up.", ToolCall("c1", "look", '{"at": "cat"}')),
        Message("tool", "a cat", "c1"),
        answer("", ToolCall("c2", "weigh", "{}"), ToolCall("c3", "pet", "{}")),
        Message("tool", "4 kg", "c2"),
        Message("user", "And this?", attachments=(cat,)),
    )
    assert queried(*messages) == (
        textwrap.dedent(
            """\
            The conversation so far:

            <message role="user" name="Ada" file_not_included="cat.png (image/png); https://example.org/page">
            What's this?
            </message>
            <message role="assistant">
            I look it up.
            <tool_call>
            {"name": "look", "arguments": {"at": "cat"}}
            </tool_call>
            </message>
            <message role="tool" name="c1">
            a cat
            </message>
            <message role="assistant">
            <tool_call>
            {"name": "weigh", "arguments": {}}
            </tool_call>
            <tool_call>
            {"name": "pet", "arguments": {}}
            </tool_call>
            </message>
            <message role="tool" name="c2">
            4 kg
            </message>
            <message role="user" file="cat.png (image/png)">
            And this?
            </message>

            Write the assistant's next message."""
        )
    )


def test_an_answer_to_be_continued_is_folded() -> None:
    assert queried(*chat("Count.", "1 2")) == (
        "The conversation so far:\n\n"
        '<message role="user">\nCount.\n</message>\n'
        '<message role="assistant">\n1 2\n</message>\n\n'
        "Continue your last message exactly where it ends, without repeating it."
    )


@pytest.mark.parametrize(
    "last",
    [
        ask(*chat("Count.", "1 2"))._replace(output=OutputFormat("json_object")),
        ask(*chat("Count.", "1 2"))._replace(tool_mode="required"),
        ask(user("Count."), Message("assistant", "1 2", "Other agent")),
    ],
    ids=["json", "call", "other's"],
)
def test_an_answer_of_another_kind_is_not_continued(last: Any) -> None:
    """Agents ask so for their result as JSON, after they had it as text."""
    query = plan_turn(last, SCOPE, None).query
    assert query.endswith("\n1 2\n</message>\n\nWrite the assistant's next message.")
    known = plan_turn(last, SCOPE, Tail(SCOPE, "c")).query
    assert known == "Write the assistant's next message."


def test_an_empty_answer_is_not_continued() -> None:
    """Haystack's agents ask again after one."""
    last = ask(*chat("Hi", ""))
    query = plan_turn(last, SCOPE, None).query
    assert query.endswith(
        '"assistant">\n\n</message>\n\nWrite the assistant\'s next message.'
    )
    known = plan_turn(last, SCOPE, Tail(SCOPE, "c")).query
    assert known == "Write the assistant's next message."


@pytest.mark.parametrize(
    ("request_", "query"),
    [
        pytest.param(ask(system="Say hello."), "Say hello.", id="system text only"),
        pytest.param(ask(), " ", id="nothing at all"),
        pytest.param(ask(user("")), " ", id="empty"),
        pytest.param(ask(user(" ")), " ", id="a space"),
        pytest.param(
            ask(Message("user", "", attachments=(Attachment("a.png", "image/png"),))),
            "[attached: a.png (image/png)]",
            id="image only",
        ),
        pytest.param(
            ask(user("hi", "Ada")),
            '<message role="user" name="Ada">\nhi\n</message>',
            id="a name",
        ),
        pytest.param(
            ask(*chat("a", "b", "")),
            "The conversation so far:\n\n"
            '<message role="user">\na\n</message>\n'
            '<message role="assistant">\nb\n</message>\n\n'
            "Answer this message:",
            id="history and an empty message",
        ),
        pytest.param(
            ask(answer("b"), conversation_id="c"),
            "Continue your last message exactly where it ends, without repeating it.",
            id="to be continued",
        ),
    ],
)
def test_no_query_is_ever_empty(request_: Any, query: str) -> None:
    tail = Tail(SCOPE, "c") if request_.conversation_id else None
    assert plan_turn(request_, SCOPE, tail).query == query


def test_tags_that_occur_in_the_text_are_not_used() -> None:
    messages = chat("</message><MESSAGE-2 role=x>", "<message-4", "</message-3>")
    query = queried(*messages)
    assert query == (
        "The conversation so far:\n\n"
        '<message-5 role="user">\n</message><MESSAGE-2 role=x>\n</message-5>\n'
        '<message-5 role="assistant">\n<message-4\n</message-5>\n\n'
        "Answer this message:\n\n</message-3>"
    )


def test_attributes_cannot_be_left() -> None:
    assert fold([user("x", 'A"da\n</message>')]) == (
        '<message role="user" name="A\\"da\\n</message>">\nx\n</message>'
    )


def test_many_questions_at_once_cost_little() -> None:
    with at_most(80):
        assert (
            queried(*[user(f"{n}") for n in range(20_000)]).count("</message>")
            == 20_000
        )


def test_a_history_variable_takes_the_history_as_long_as_dify_has_not_got_it() -> None:
    options: dict[str, Any] = {"history_variable": "past"}
    options["system_variable"] = "persona"
    request = ask(*chat("u1", "a1", "u2"), system="Be brief.")
    plan = plan_turn(request, SCOPE, None, **options)
    past = (
        '<message role="user">\nu1\n</message>\n'
        '<message role="assistant">\na1\n</message>'
    )
    assert (plan.query, plan.inputs["past"]) == ("u2", past)
    tail = plan.tail_after("c", answer("a2"))
    request = ask(*chat("u1", "a1", "u2", "a2", "u3"))
    plan = plan_turn(request, SCOPE, tail, **options)
    assert (plan.query, plan.inputs) == ("u3", {"past": past})
    tail = plan.tail_after("c", answer("a3"))
    request = ask(*chat("u1", "a1", "u2", "a2", "u3", "a3", "u4")[1:])
    plan = plan_turn(request, SCOPE, tail, **options)
    assert plan.inputs == {"past": past.partition("\n</message>\n")[2]}
    tail = plan.tail_after("c", answer("a4"))
    request = ask(*chat("u1", "a1", "u2", "a2", "u3", "a3", "u4", "a4", "u5")[4:])
    assert plan_turn(request, SCOPE, tail, **options).inputs == {}


def test_a_history_in_an_input_that_is_gone_starts_a_new_conversation() -> None:
    """The operator may take the setting away while conversations live."""
    first = plan_turn(
        ask(*chat("u1", "a1", "u2")), SCOPE, None, history_variable="past"
    )
    request = ask(*chat("u1", "a1", "u2", "a2", "u3"))
    plan = plan_turn(request, SCOPE, first.tail_after("c", answer("a2")))
    assert plan == plan_turn(request, SCOPE, None)
    assert [plan.query.count(text) for text in ("u1", "a1", "u2", "a2")] == [1] * 4


@pytest.mark.parametrize(("room", "says"), [(0, "file_not_included"), (1, "file")])
def test_a_history_in_an_input_says_which_files_are_there(room: int, says: str) -> None:
    shown = Message("user", "u1", attachments=(Attachment("a.png", data=b"1"),))
    request = ask(shown, answer("a1"), user("u2"), system="Be brief.")
    plan = plan_turn(
        request,
        SCOPE,
        None,
        history_variable="past",
        has_room=lambda files: len(files) <= room,
    )
    assert f'<message role="user" {says}="a.png">\nu1\n' in plan.inputs["past"]
    assert [*plan.inputs] == ["past"]
    assert len(plan.files) == room


def test_system_text_does_not_count_among_what_dify_remembers() -> None:
    rains, snows = Message("system", "It rains."), Message("system", "It snows.")
    talk = (user("u1"), rains, answer("a1"), user("u2"), snows)
    first = plan_turn(ask(*talk), SCOPE, None, history_variable="past")
    tail = first.tail_after("c", answer("a2"))
    request = ask(*talk, answer("a2"), user("u3"))
    plan = plan_turn(request, SCOPE, tail, history_variable="past")
    assert (plan.query, plan.inputs) == ("u3", first.inputs)


def test_what_a_conversation_lacks_is_told_once() -> None:
    """Beside a history that it has as an input only."""
    first = plan_turn(
        ask(*chat("u1", "a1", "u2")), SCOPE, None, history_variable="past"
    )
    tail = first.tail_after("c", answer("a2"))
    talk = (*chat("u3", "a3"), Message("system", "rain"), *chat("u4", "a4", "u5"))
    request = ask(*talk)._replace(is_all_new=True)
    plan = plan_turn(request, SCOPE, tail, history_variable="past")
    assert [plan.query.count(message.text) for message in talk] == [1] * len(talk)
    assert plan.inputs == {}


# Age, number, and files that fail...


def test_unused_conversations_are_forgotten() -> None:
    with closing(Conversations(":memory:", 100.0)) as store:
        record(store, "c", *chat(*TALK))
        request = ask_of(*TALK, "new")
        tail = store.take(request, SCOPE, 100.0)
        assert tail is not None
        store.put(tail, 100.0)
        assert store.take(request, SCOPE, 200.5) is None
        for i in range(200):
            store.put(Tail(SCOPE, str(i), bytes([i]), 2, bytes([i])), 300.0)
        assert len(store) == 200


def test_conversation_is_not_forgotten_during_a_turn() -> None:
    with closing(Conversations(":memory:", 100.0)) as store:
        record(store, "c", *chat(*TALK))
        request = ask_of(*TALK, "new")
        tail = store.take(request, SCOPE, 100.0)
        assert tail is not None
        for i in range(opendify._SWEEP_EVERY):
            store.put(Tail(SCOPE, str(i), bytes([i]), 2, bytes([i])), 150.0)
        store.put(tail, 150.0)
        assert store.take(request, SCOPE, 150.0) == tail


def test_a_sweep_drops_a_few_only() -> None:
    """All requests wait meanwhile."""
    every, most = opendify._SWEEP_EVERY, opendify._MAX_SWEPT
    with closing(Conversations(":memory:", 100.0)) as store:
        for i in range(10 * every):
            record(store, f"c{i}", *chat(f"u{i}", "a"))
        for i in range(every):
            store.put(Tail(SCOPE, str(i), bytes([i]), 2, bytes([i])), 300.0)
        assert len(store) == 11 * every - most


def test_a_full_table_is_not_read_as_a_whole(store: Conversations) -> None:
    """Counted are the steps of SQLite's virtual machine."""
    for i in range(2000):
        record(store, f"c{i}", *chat(f"u{i}", "OK"))
        store.keep(NamedConversation(f"conv_{i}", 0), "", 0.0)
    steps: list[None] = []
    store._db.set_progress_handler(lambda: steps.append(None), 1)
    assert found(store, ask_of("u7", "OK", "new")) == "c7"
    assert found(store, ask(user("new"), conversation_id="c8")) == "c8"
    for i in range(opendify._SWEEP_EVERY):
        record(store, f"d{i}", *chat(f"u{i}", "OK"))
    store.keep(NamedConversation("conv_7", 0), "", 0.0)
    assert len(steps) < 10_000  # to read one of the tables takes 8,000


@pytest.mark.parametrize("most", [1, 10, 150])
def test_there_are_never_many_more_than_allowed(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(opendify, "MAX_CONVERSATIONS", most)
    with closing(Conversations(":memory:", WEEK)) as store:
        for i in range(300):
            record_at = float(i)
            tail = Tail(SCOPE, str(i), chain=SCOPE).extend(chat(f"u{i}", "a"))
            store.put(tail, record_at)
            assert len(store) < most + opendify._SWEEP_EVERY
        assert store.take(ask_of("u299", "a", "new"), SCOPE, 300.0)
        assert store.take(ask_of("u0", "a", "new"), SCOPE, 300.0) is None


def test_the_least_recently_used_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opendify, "MAX_CONVERSATIONS", 2)
    monkeypatch.setattr(opendify, "_SWEEP_EVERY", 1)
    with closing(Conversations(":memory:", WEEK)) as store:
        for now, name in enumerate("ab"):
            store.put(Tail(SCOPE, name, chain=SCOPE).extend(chat(name, "x")), now)
        tail = store.take(ask_of("a", "x", "new"), SCOPE, 2.0)
        assert tail is not None
        store.put(tail, 3.0)
        store.put(Tail(SCOPE, "c", chain=SCOPE).extend(chat("c", "x")), 4.0)
        assert [found(store, ask_of(name, "x", "new")) for name in "abc"] == [
            "a",
            "",
            "c",
        ]


def test_a_file_holds_no_text_and_no_key(tmp_path: Path) -> None:
    path = tmp_path / "table.db"
    with closing(Conversations(str(path), WEEK)) as store:
        request = ask(user("a secret question"), system="secret instructions")
        turn(store, request, "a secret answer", "c")
    data = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert data.startswith(b"SQLite")
    for secret in (b"secret", b"app-key", b"ada", SCOPE, SCOPE.hex().encode()):
        assert secret not in data


def test_a_file_survives_a_restart(tmp_path: Path) -> None:
    path = str(tmp_path / "table.db")
    with closing(Conversations(path, WEEK)) as store:
        record(store, "c", *chat(*TALK))
    with closing(Conversations(path, WEEK)) as store:
        assert found(store, ask_of(*TALK, "new")) == "c"


def test_two_tables_on_one_file_are_one(tmp_path: Path) -> None:
    path = str(tmp_path / "table.db")
    with (
        closing(Conversations(path, WEEK)) as one,
        closing(Conversations(path, WEEK)) as other,
    ):
        record(one, "c", *chat(*TALK))
        request = ask_of(*TALK, "new")
        tail = other.take(request, SCOPE, 0.0)
        assert tail is not None
        assert one.take(request, SCOPE, 0.0) is None
        other.put(tail.extend([user("new"), answer("x")]), 0.0)
        assert found(one, request) == ""
        assert found(one, ask_of(*TALK, "new", "x", "y")) == "c"


def test_turn_of_another_process_may_come_first(tmp_path: Path) -> None:
    """A conversation that has moved on since it was found is not taken."""
    path, request = str(tmp_path / "table.db"), ask_of(*TALK, "new")

    class Late(Conversations):
        def _mark(self, tail: Tail, now: float) -> Tail | None:
            turn(other, request, "x", "new")
            return super()._mark(tail, now)

    with closing(Late(path, WEEK)) as late, closing(Conversations(path, WEEK)) as other:
        record(other, "c", *chat(*TALK))
        assert late.take(request, SCOPE, 0.0) is None
        assert found(other, ask_of(*TALK, "new", "x", "next")) == "c"


TAKER = """
import sys
from opendify import *
store, complaint = open_conversations(sys.argv[1], 1e6)
assert not complaint, complaint
print("ready", flush=True)
for line in sys.stdin:
    scope = scope_of("app-key", "ada")
    rows = Message("user", "hi"), Message("assistant", "Hello!"), Message("user", "")
    tails = [store.take(Ask("m", rows), scope, 0.0) for _ in range(60)]
    print(",".join(tail.conversation_id for tail in tails if tail), flush=True)
store.close()
"""


def test_processes_that_take_at_once_never_take_the_same(tmp_path: Path) -> None:
    path = str(tmp_path / "table.db")
    with closing(Conversations(path, 1e6)) as store:
        for i in range(50):
            record(store, f"c{i}", *chat("hi", "Hello!"))
    folder = str(Path(opendify.__file__).parent)
    command = [sys.executable, "-W", "error", "-c", TAKER, path]
    environment = {**os.environ, "PYTHONPATH": folder}
    takers = [
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for taker in takers:
        assert taker.stdout
        assert taker.stdout.readline() == "ready\n"
    for taker in takers:
        assert taker.stdin
        taker.stdin.write("\n")
        taker.stdin.flush()
    printed = [taker.communicate()[0].strip().split(",") for taker in takers]
    taken = [name for row in printed for name in row if name]
    assert len(taken) == len(set(taken))
    # One that lost a race folds, so some may be left, but not many.
    assert len(taken) >= 25


def unusable_files(folder: Path) -> dict[str, str]:
    (folder / "text.db").write_text("This is no database. " * 100)
    (folder / "folder.db").mkdir()
    with closing(sqlite3.connect(folder / "other.db")) as db:
        db.execute("CREATE TABLE opendify_tails (something_else)")
    return {
        "corrupt": str(folder / "text.db"),
        "a folder": str(folder / "folder.db"),
        "no such folder": str(folder / "missing" / "table.db"),
        "another table": str(folder / "other.db"),
        "no path": "a\0b",
    }


@pytest.mark.parametrize(
    "kind", ["corrupt", "a folder", "no such folder", "another table", "no path"]
)
def test_a_file_that_cannot_be_used_is_a_complaint(tmp_path: Path, kind: str) -> None:
    path = unusable_files(tmp_path)[kind]
    store, complaint = open_conversations(path, WEEK)
    with closing(store):
        assert complaint.startswith(
            f"CONVERSATION_STORE: the file {path} can't be used ("
        )
        assert "closed" not in complaint  # it says why, not what came of it
        record(store, "c", *chat(*TALK))
        assert found(store, ask_of(*TALK, "new")) == "c"


def test_a_locked_file_is_a_complaint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opendify, "_OPEN_TIMEOUT_S", 0.0)
    path = str(tmp_path / "table.db")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        store, complaint = open_conversations(path, WEEK)
        store.close()
        assert "locked" in complaint


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anything"
)
def test_a_read_only_file_is_a_complaint(tmp_path: Path) -> None:
    path = tmp_path / "table.db"
    Conversations(str(path), WEEK).close()
    path.chmod(0o400)
    store, complaint = open_conversations(str(path), WEEK)
    store.close()
    assert "readonly" in complaint


def test_memory_needs_no_file() -> None:
    for name in ("memory", "MEMORY", ""):
        store, complaint = open_conversations(name, WEEK)
        store.close()
        assert complaint == ""


Shared = tuple[Conversations, sqlite3.Connection]


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shared]:
    """A table in a file, and another connection to it; neither waits for a lock."""
    monkeypatch.setattr(opendify, "_BUSY_TIMEOUT_S", 0.0)
    path = str(tmp_path / "table.db")
    with (
        closing(Conversations(path, WEEK)) as store,
        closing(sqlite3.connect(path, isolation_level=None)) as other,
    ):
        yield store, other


def test_no_later_failure_reaches_a_request(shared: Shared) -> None:
    store, other = shared
    with closing(store):
        record(store, "c", *chat(*TALK))
        request = ask_of(*TALK, "new")
        tail = store.take(request, SCOPE, 0.0)
        assert tail is not None
        other.execute("BEGIN IMMEDIATE")
        assert store.take(request, SCOPE, 0.0) is None
        named = ask(user("x"), conversation_id="c")
        by_id = store.take(named, SCOPE, 0.0)
        assert by_id is not None
        assert by_id.conversation_id == "c"
        store.put(tail, 0.0)
        store.forget(tail)
        other.execute("ROLLBACK")
        assert len(store) == 1
        assert found(store, request) == ""  # it was never put back
        other.execute("DROP TABLE opendify_tails")
        assert (len(store), store.take(request, SCOPE, 0.0)) == (0, None)
    assert store.take(request, SCOPE, 0.0) is None
    store.put(tail, 0.0)
    store.close()


def test_failure_to_put_a_conversation_is_told(shared: Shared) -> None:
    store, other = shared
    other.execute("BEGIN IMMEDIATE")
    record(store, "c", *chat(*TALK))
    assert store.failure == "database is locked"


def test_left_turn_by_id_is_known_to_the_first_turn_beside_it() -> None:
    """Neither knows of the other: Dify's memory has more than each client."""
    with closing(Conversations(":memory:", WEEK)) as store:
        tail = store.take(ask(user("by id"), conversation_id="c"), SCOPE, 0.0)
        assert tail is not None
        store.forget(tail)  # its client left
        record(store, "c", *chat(*TALK))
        assert found(store, ask_of(*TALK, "new")) == ""


def test_what_a_locked_file_missed_is_made_up_for(shared: Shared) -> None:
    """A turn went into a conversation by its id while another process was writing."""
    store, other = shared
    record(store, "c", *chat(*TALK))
    other.execute("BEGIN IMMEDIATE")
    tail = store.take(ask(user("x"), conversation_id="c"), SCOPE, 0.0)
    other.execute("ROLLBACK")
    assert tail is not None
    store.put(tail.extend([user("x"), answer("y")]), 0.0)
    assert found(store, ask_of(*TALK, "new")) == ""


# Properties...

TEXTS = st.sampled_from(["hi", "OK", "more", LONG])
SCOPES = [scope_of("k", "ada"), scope_of("k", "bob"), scope_of("other", "ada")]


def histories(least: int, most: int) -> st.SearchStrategy[tuple[Message, ...]]:
    """Histories that end with an answer, of few different texts."""
    roles = st.sampled_from([user, user, answer])
    messages = st.builds(lambda role, text: role(text), roles, TEXTS)
    return st.builds(
        lambda rows, last: (*rows, answer(last)),
        st.lists(messages, min_size=least - 1, max_size=most - 1),
        TEXTS,
    )


def matches_of(
    history: tuple[Message, ...], transcripts: dict[str, tuple[Message, ...]]
) -> set[str]:
    """The rule, as one would write it down who cares for nothing but clearness."""
    equal = {name for name, rows in transcripts.items() if rows == history}
    answers = [row.text for row in history if row.role == "assistant"]
    if equal or (len(answers) == 1 and len(answers[0]) < 200):
        return equal
    size = len(history)
    near = {name: rows for name, rows in transcripts.items() if rows[-size:] == history}
    is_clear = all(
        [at for at in range(len(rows)) if rows[at : at + size] == history]
        == [len(rows) - size]
        for rows in near.values()
    )
    return set(near) if is_clear and len(set(near.values())) == 1 else set()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from(SCOPES), histories(1, 6)), max_size=6),
    histories(1, 5),
)
def test_what_is_found_is_what_the_rule_says(
    conversations: list[tuple[bytes, tuple[Message, ...]]], history: tuple[Message, ...]
) -> None:
    with closing(Conversations(":memory:", WEEK)) as store:
        by_scope: dict[bytes, dict[str, tuple[Message, ...]]] = {s: {} for s in SCOPES}
        for i, (scope, rows) in enumerate(conversations):
            by_scope[scope][f"c{i}"] = rows
            store.put(Tail(scope, f"c{i}", chain=scope).extend(rows), 0.0)
        for scope, transcripts in by_scope.items():
            expected = matches_of(history, transcripts)
            while expected:
                tail = store.take(ask(*history, user("new")), scope, 0.0)
                assert tail is not None
                assert tail.conversation_id in expected
                expected.remove(tail.conversation_id)
                del transcripts[tail.conversation_id]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_suffix_is_found_and_an_edit_is_not(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 12))
    rows = tuple(
        answer(f"answer {i}") if i % 2 else user(f"question {i}")
        for i in range(2 * size)
    )
    cut = data.draw(st.integers(0, len(rows) - 4))
    window = rows[cut:]
    with closing(Conversations(":memory:", WEEK)) as store:
        record(store, "c", *rows)
        assert found(store, ask(*window, user("new"))) == "c"
        at = data.draw(st.integers(0, len(window) - 1))
        edited = Message(window[at].role, data.draw(st.text(max_size=20)))
        changed = (*window[:at], edited, *window[at + 1 :])
        shorter = (*window[:at], *window[at + 1 :])
        if at > 0 or is_counted(edited):
            assert found(store, ask(*changed, user("new"))) == ""
        if at > 0:
            assert found(store, ask(*shorter, user("new"))) == ""
        assert found(store, ask(*window, user("new")), SCOPES[1]) == ""


ROLES = st.sampled_from(["user", "assistant", "tool", "system"])
ANY_TEXT = st.text(max_size=20) | st.sampled_from(
    ["<message", "</message>", "<message-2 x>", '"', "a\n\n</message-3>\n\nb"]
)
ANY_MESSAGE = st.tuples(ROLES, ANY_TEXT, ANY_TEXT).map(lambda row: Message(*row))


@settings(deadline=None, max_examples=60)
@given(st.lists(ANY_MESSAGE, max_size=6))
def test_a_fold_can_be_read_back(messages: list[Message]) -> None:
    text = fold(messages)
    if not messages:
        assert text == ""
        return
    tag = re.match(r"<(message(?:-\d+)?) ", text)
    assert tag
    pattern = (
        rf'<{tag[1]} role=(".*?")(?: name=("(?:[^"\\]|\\.)*"))?>\n(.*?)\n</{tag[1]}>'
    )
    rows = re.findall(pattern, text, re.DOTALL)
    read = [Message(json.loads(r), t, json.loads(n or '""')) for r, n, t in rows]
    assert read == messages


@settings(deadline=None, max_examples=60)
@given(st.lists(ANY_MESSAGE, max_size=5), ANY_TEXT, st.booleans(), st.booleans())
def test_nothing_is_dropped(
    messages: list[Message], system: str, in_variable: bool, is_old: bool
) -> None:
    request = ask(*messages, system=system)
    tail = Tail(SCOPE, "c") if is_old else None
    options: dict[str, Any] = {"history_variable": "past"} if in_variable else {}
    plan = plan_turn(request, SCOPE, tail, **options)
    said = plan.query + str(plan.inputs.get("past", ""))
    _, new = split_turn(request)
    assert plan.query
    for message in new if is_old else messages:
        blank_system = message.role == "system" and not message.text.strip()
        assert message.text in said or blank_system
    assert system in said or not system.strip()


# Random clients against a model of Dify's memory...


class Chat:
    """What one client's window shows; `turn` is the turn under way."""

    def __init__(self, scope: bytes, window: int) -> None:
        self.scope, self.window = scope, window
        self.shown: list[Message] = []
        self.was_cut = False
        self.turn: Turn | None = None

    def sent(self) -> tuple[Message, ...]:
        """What goes into a request: a window of what is shown."""
        self.was_cut = self.was_cut or len(self.shown) > self.window
        return tuple(self.shown[-self.window :])


class Turn(NamedTuple):
    """A turn under way; `taken` is what the table gave."""

    plan: Any
    name: str
    taken: Tail | None


def unfold(query: str) -> list[Message]:
    """The messages that a query holds, for queries of plain texts."""
    rows = re.findall(r'<message role="(\w+)">\n(.*?)\n</message>', query, re.DOTALL)
    plain = re.sub(r"<message .*</message>", "", query, flags=re.DOTALL)
    plain = plain.replace("The conversation so far:", "")
    plain = plain.replace("Answer this message:", "")
    plain = plain.replace("Write the assistant's next message.", "").strip()
    messages = [Message(role, text) for role, text in rows if role != "system"]
    return messages + ([user(plain)] if plain else [])


CHATS = st.integers(0, 3)
SAID = st.sampled_from(["hi", "hi", "go on"])
SYSTEM = st.sampled_from(["", "Be brief.", "It is 12:01."])


class Clients(RuleBasedStateMachine):
    """What the model sees is what the client shows, continued or folded.

    Clients see their own history or a window of it, and nothing else; Dify's memory is
    what its conversations were told, whether the client saw the answer or not.
    """

    in_file = False

    @initialize(windows=st.tuples(*[st.sampled_from([99, 99, 5, 4, 3])] * 4))
    def begin(self, windows: tuple[int, ...]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.path = (
            str(Path(self.folder.name, "table.db")) if self.in_file else ":memory:"
        )
        self.stores: list[Conversations] = []
        self.chats: list[Chat] = []
        self.restart()
        self.chats = [Chat(SCOPES[i == 3], window) for i, window in enumerate(windows)]
        self.dify: dict[str, tuple[bytes, list[Message]]] = {}
        self.joined: set[str] = set()  # named by one client while another's turn ran
        self.count = 0

    def teardown(self) -> None:
        for store in getattr(self, "stores", []):
            store.close()
        if hasattr(self, "folder"):
            self.folder.cleanup()

    def running(self, name: str) -> int:
        return sum(chat.turn.name == name for chat in self.chats if chat.turn)

    # Turns...

    @rule(
        i=CHATS, texts=st.lists(st.tuples(SAID, st.booleans()), min_size=1, max_size=3)
    )
    def talk(self, i: int, texts: list[tuple[str, bool]]) -> None:
        for text, is_stock in texts:
            self.send(i, text, 0, "")
            self.finish(i, is_stock, 1)

    @rule(i=CHATS, text=SAID, which=st.integers(0, 1), system=SYSTEM)
    def send(self, i: int, text: str, which: int, system: str) -> None:
        chat = self.chats[i]
        if chat.turn:
            return
        chat.shown.append(user(text))
        request = ask(*chat.sent(), system=system)
        store = self.stores[which % len(self.stores)]
        tail = store.take(request, chat.scope, 0.0)
        if tail and tail.conversation_id not in self.dify:  # 404
            store.remove(tail)
            tail = None
        plan = plan_turn(request, chat.scope, tail)
        name = plan.tail.conversation_id
        if not name:
            self.count += 1
            name = f"c{self.count}"
            self.dify[name] = (chat.scope, [])
        is_alone = name in self.joined or not self.running(name)
        assert is_alone, "two turns at once in one conversation"
        self.check(chat, request, name, self.dify[name][1] + unfold(plan.query))
        chat.turn = Turn(plan, name, tail)

    def check(self, chat: Chat, request: Ask, name: str, seen: list[Message]) -> None:
        """What the model sees against what the client sends."""
        assert self.dify[name][0] == chat.scope
        visible = list(request.messages)
        assert seen[len(seen) - len(visible) :] == visible
        is_unique = any(row.text.startswith("answer") for row in visible)
        if not chat.was_cut and (is_unique or len(visible) < 4):
            assert seen == visible
        # A window of stock phrases alone may be another's: it goes on there.
        chat.was_cut = chat.was_cut or seen != visible

    @rule(i=CHATS, text=SAID, data=st.data())
    def send_by_id(self, i: int, text: str, data: st.DataObject) -> None:
        """To any conversation of the user's, even while a turn runs there."""
        chat = self.chats[i]
        own = [name for name, (scope, _) in self.dify.items() if scope == chat.scope]
        if chat.turn or not own:
            return
        name = data.draw(st.sampled_from(own))
        if self.running(name):
            self.joined.add(name)
        chat.shown.append(user(text))
        chat.was_cut = True
        request = ask(*chat.sent(), conversation_id=name)
        tail = self.stores[-1].take(request, chat.scope, 0.0)
        plan = plan_turn(request, chat.scope, tail)
        assert plan.tail.conversation_id == name
        chat.turn = Turn(plan, name, tail)

    def end(self, chat: Chat, *answers: Message) -> Turn:
        """The turn arrives in Dify's memory, unless it was refused."""
        turn, chat.turn = chat.turn, None
        assert turn
        if answers and turn.name in self.dify:
            self.dify[turn.name][1].extend([*unfold(turn.plan.query), *answers])
        return turn

    @rule(i=CHATS, is_stock=st.booleans(), which=st.integers(0, 1))
    def finish(self, i: int, is_stock: bool, which: int) -> None:
        chat = self.chats[i]
        if chat.turn:
            self.count += 1
            said = answer("OK" if is_stock else f"answer {self.count}")
            turn = self.end(chat, said)
            chat.shown.append(said)
            store = self.stores[which % len(self.stores)]
            store.put(turn.plan.tail_after(turn.name, said), 0.0)

    @rule(i=CHATS, stored=st.sampled_from(["", "OK"]), is_shown=st.booleans())
    def leave_early(self, i: int, stored: str, is_shown: bool) -> None:
        chat = self.chats[i]
        if chat.turn:
            turn = self.end(chat, answer(stored))
            chat.shown += [answer("OK")] * is_shown
            self.stores[0].forget(turn.plan.tail)

    @rule(i=CHATS)
    def refuse(self, i: int) -> None:
        """Dify did not take the request, so nothing has changed there."""
        if self.chats[i].turn:
            turn = self.end(self.chats[i])
            if turn.taken:
                self.stores[0].put(turn.taken, 0.0)

    @rule(i=CHATS)
    def crash(self, i: int) -> None:
        """The process dies; Dify goes on, and nothing is put back."""
        chat = self.chats[i]
        if chat.turn and self.running(chat.turn.name) == 1:
            self.end(chat, answer("OK"))

    # What clients do between turns...

    @rule(i=CHATS, j=CHATS)
    def branch(self, i: int, j: int) -> None:
        chat, copy = self.chats[i], self.chats[j]
        if not chat.turn and not copy.turn:
            copy.shown, copy.was_cut = list(chat.shown), chat.was_cut

    @rule(i=CHATS, at=st.integers(0, 9), text=SAID, goes_on=st.booleans())
    def edit(self, i: int, at: int, text: str, goes_on: bool) -> None:
        chat = self.chats[i]
        if not chat.turn and at < len(chat.shown):
            chat.shown[at] = Message(chat.shown[at].role, text)
            if not goes_on:
                del chat.shown[at + 1 :]

    @rule(i=CHATS, size=st.integers(1, 4))
    def go_back(self, i: int, size: int) -> None:
        """To regenerate an answer, say."""
        if not self.chats[i].turn:
            del self.chats[i].shown[-size:]

    @rule(i=CHATS, at=st.integers(1, 5))
    def delete_from_the_middle(self, i: int, at: int) -> None:
        chat = self.chats[i]
        if not chat.turn and at + 2 < len(chat.shown):
            before = list(chat.shown)
            del chat.shown[at : at + 2]
            # Between messages that are alike, that is the same as cutting old ones.
            chat.was_cut |= chat.shown == before[2:]

    @rule(i=CHATS, size=st.integers(0, 4))
    def cut(self, i: int, size: int) -> None:
        chat = self.chats[i]
        if not chat.turn:
            chat.was_cut = size > 0
            chat.shown = chat.shown[-size:] if size else []

    @rule(number=st.integers(1, 20))
    def delete_in_dify(self, number: int) -> None:
        if not self.running(f"c{number}"):
            self.dify.pop(f"c{number}", None)

    @rule()
    def restart(self) -> None:
        """A table in memory dies with its process, and so do the turns of that."""
        if not self.in_file:
            for chat in self.chats:
                if chat.turn and self.running(chat.turn.name) == 1:
                    self.end(chat, answer("OK"))
            if any(chat.turn for chat in self.chats):
                return
        for store in self.stores:
            store.close()
        self.stores = [Conversations(self.path, WEEK) for _ in range(1 + self.in_file)]


class ClientsOfAFile(Clients):
    in_file = True


@pytest.mark.parametrize("machine", [Clients, ClientsOfAFile])
def test_the_model_sees_what_the_client_shows(machine: type[Clients]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_named_conversation_is_forgotten_when_nobody_uses_it(tmp_path: Path) -> None:
    named = NamedConversation("conv_1", 0, {"a": "b"}, [{"role": "user"}])
    for path in ("memory", str(tmp_path / "named.sqlite")):
        store, _ = open_conversations(path, 100.0)
        store.keep(named, "key", 5.0)
        assert store.named("conv_1", "key", 105.0) == named
        assert store.named("conv_1", "other", 6.0) is None
        assert store.named("conv_1", "key", 105.1) is None
        store.keep(replace(named, id="conv_2"), "key", 105.1)
        store.close()
    with closing(sqlite3.connect(path)) as file:  # nor are its texts kept
        assert [*file.execute("SELECT id FROM opendify_named")] == [("conv_2",)]


def test_named_conversation_of_a_later_version_is_read(tmp_path: Path) -> None:
    path = str(tmp_path / "named.sqlite")
    store, _ = open_conversations(path, 100.0)
    named = NamedConversation("conv_1", 0, {}, [])
    store.keep(named, "key", 5.0)
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("UPDATE opendify_named SET state = json_set(state, '$.new', 1)")
    assert store.named("conv_1", "key", 6.0) == named
    store.close()


def test_id_that_is_none_of_dify_s_is_not_kept(store: Conversations) -> None:
    """A client may send any text as one; Dify refuses it, and the turn is put back."""
    request = ask(user("u"), conversation_id="x" * 101)
    tail = store.take(request, SCOPE, 0.0)
    assert tail and not tail.is_taken
    store.put(tail, 0.0)
    assert len(store) == 0


def test_named_conversation_is_kept_or_dropped_or_refused(shared: Shared) -> None:
    """A client relies on either, unlike on a chat's being found again."""
    store, other = shared
    named = NamedConversation("conv_1", 0, items=[])
    store.keep(named, "key", 0.0)
    assert store.failure == ""
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(opendify.Overloaded):
        store.keep(replace(named, id="conv_2"), "key", 0.0)
    with pytest.raises(opendify.Overloaded):
        store.drop(named)
    assert store.named("conv_1", "key", 0.0) == named
    assert store.failure == "database is locked"
    other.execute("ROLLBACK")
    store.drop(named)
    store.drop(named)  # as another process may have done meanwhile


def test_named_conversation_is_not_denied_where_nobody_can_know(shared: Shared) -> None:
    store, other = shared
    store.keep(NamedConversation("conv_1", 0, items=[]), "key", 0.0)
    other.execute("ALTER TABLE opendify_named RENAME TO elsewhere")
    with pytest.raises(opendify.Overloaded):
        store.named("conv_1", "key", 0.0)
    other.execute("ALTER TABLE elsewhere RENAME TO opendify_named")
    assert store.named("conv_1", "key", 0.0)
    assert store.named("\ud800", "key", 0.0) is None


def test_failure_is_not_that_of_a_client_s_id(store: Conversations) -> None:
    store.put(Tail(SCOPE, "\ud800"), 0.0)
    assert (len(store), store.failure) == (0, "")


def test_named_conversations_are_so_many(
    store: Conversations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep drops those that nobody used for longest; it need not come at once."""
    monkeypatch.setattr(opendify, "MAX_NAMED", 100)
    for number in range(1000):
        store.keep(NamedConversation(f"conv_{number}", 0), "", number)
    left = [bool(store.named(f"conv_{number}", "", 1.0)) for number in range(1000)]
    assert left == sorted(left)
    assert 100 <= sum(left) <= 200


def test_named_conversations_have_room_for_so_much_text(
    store: Conversations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opendify, "MAX_NAMED_BYTES", 2000)
    monkeypatch.setattr(opendify, "MAX_ALL_NAMED_BYTES", 3000)
    for size in (1000, 1001, 1002):
        store.keep(NamedConversation(f"conv_{size}", 0, {}, ["x" * size]), "", size)
    with pytest.raises(opendify.BodyTooLarge):
        store.keep(NamedConversation("conv_2000", 0, {}, ["x" * 2000]), "", 2000)
    names = ("conv_1000", "conv_1001", "conv_1002", "conv_2000")
    assert [bool(store.named(name, "", 1.0)) for name in names] == [
        *(False, True, True, False)
    ]
