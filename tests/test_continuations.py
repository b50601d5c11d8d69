"""Conversations through the whole proxy: what the model sees is what the client shows.

A fake Dify with real memory stands behind a real server. Whatever a client does with
its history, and however a turn ends, Dify's memory and the query together must hold
exactly the messages that the client sent: continued, or folded and read back here.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import json
import os
import re
import socket
import tempfile
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable
from urllib.parse import urlsplit

import fake_dify as fake
import pytest
from clock import VirtualClockLoop
from fake_dify import Close, FakeDify, Hang, Reset, Send, Sleep, Status, Step
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)
from test_end_to_end import running
from test_handlers import Call, Got, Proxy, chunks_of, delta_of, serving

import opendify

JSONObject = dict[str, Any]
Messages = list[JSONObject]

KEY = "app-secret-key-1"
NOBODY = "2d7a3b1e-0000-4000-8000-00000000000a"  # an id that no conversation has
OPENING = "hi"  # all chats that begin with it get the same answer
GREETING = "Hello! How can I help you?"
CAT = b"\x89PNG\r\n\x1a\n a cat"

# How often the state machine is run; each time with fresh random numbers.
RUNS = int(os.environ.get("CONTINUATION_RUNS", "1"))


# ------------------------------------------------------------------------------
# What the model was shown
# ------------------------------------------------------------------------------

HEADING = "The conversation so far:\n\n"
ENDINGS = (
    "Write the assistant's next message.",
    "Continue your last message exactly where it ends, without repeating it.",
)
ELEMENT = re.compile(
    r'<(?P<tag>message(?:-\d+)?)(?P<about>(?: \w+="(?:[^"\\]|\\.)*")+)>\n'
    r"(?P<text>.*?)\n</(?P=tag)>(?:\n|\Z)",
    re.DOTALL,
)


def read_back(query: str) -> Messages:
    """Return the messages that a query holds."""
    rows = []
    rest = query[len(HEADING) :] if query.startswith(HEADING) else query
    while element := ELEMENT.match(rest):
        pairs = re.findall(r' (\w+)=("(?:[^"\\]|\\.)*")', element["about"])
        about = {name: json.loads(value) for name, value in pairs}
        rows.append({**about, "content": element["text"]})
        rest = rest[element.end() :]
    rest = rest[1:] if rows else rest  # the empty line behind the elements
    if query.startswith(HEADING) and rest not in ENDINGS:
        start, mark, rest = rest.partition("Answer this message:\n\n")
        assert (start, mark) == ("", "Answer this message:\n\n")
    return rows + [user(rest)] * (rest not in ("", *ENDINGS))


def remembered(context: Sequence[tuple[str, str]]) -> Messages:
    """Return all messages that the model was shown, those of folds one by one."""
    return [
        row
        for role, text in context
        for row in (read_back(text) if role == "user" else [assistant(text)])
    ]


def without_system(messages: Messages) -> Messages:
    """Return what is no system text."""
    return [row for row in messages if row["role"] != "system"]


def user(text: str) -> JSONObject:
    """Return a user's message."""
    return {"role": "user", "content": text}


def assistant(text: str) -> JSONObject:
    """Return an answer."""
    return {"role": "assistant", "content": text}


def system(text: str) -> JSONObject:
    """Return a system message."""
    return {"role": "system", "content": text}


def talk(*texts: str) -> Messages:
    """Return messages of user and assistant in turn."""
    return [(assistant if i % 2 else user)(text) for i, text in enumerate(texts)]


# ------------------------------------------------------------------------------
# An app with memory, a proxy, and clients
# ------------------------------------------------------------------------------


class Site:
    """A fake Dify, and the proxy before it.

    The model's answer says which turn of the app it is, so no two are alike, unless
    it greets. Its prompt tokens say the same: they lead to what the model was shown.
    """

    def __init__(self, dify: FakeDify, mode: str, **app: Any) -> None:
        self.dify = dify
        self.mode = mode
        self.app = {"mode": mode, "memory": True, **app}
        self.delay = 0.0
        self.greets_always = False
        self.proxy: Proxy
        self.answers(self.script)

    def answers(self, script: fake.Script | None = None, **app: Any) -> None:
        """From now on the app answers so; as always, by default."""
        self.dify.app(KEY, **{**self.app, "script": script or self.script, **app})

    def script(self, request: fake.Request) -> list[Step]:
        """Return the answer to a turn."""
        number = len(self.dify.contexts)
        is_stock = request.json.get("query") == OPENING and self.is_stock(request)
        text = GREETING if is_stock else f"Answer {number}."
        return complete(self.mode, text, number, self.dify.version, self.delay)

    def is_stock(self, request: fake.Request) -> bool:
        """Tell whether an opening is answered as always: at the beginning, usually."""
        return self.greets_always or not self.conversation_of(request)

    @contextlib.asynccontextmanager
    async def serve(self, settings: opendify.Settings) -> AsyncIterator[Proxy]:
        """Run a proxy; clients that are still connected leave at its end."""
        async with serving(settings, self.dify) as self.proxy:
            yield self.proxy

    @property
    def turns(self) -> list[fake.Request]:
        """The turns that Dify was asked for."""
        return self.proxy.turns

    def conversation_of(self, request: fake.Request) -> str:
        """Return the conversation that a turn asked for."""
        return str(request.json.get("conversation_id", ""))

    async def quiet(self) -> None:
        """Wait until no turn runs, and the proxy has no connection to Dify."""
        await self.dify.until(lambda: not self.dify.running)
        await self.dify.until(lambda: not self.dify.open_connections)


def settings_of(
    dify: FakeDify, mode: str, config: JSONObject | None = None, **variables: str
) -> opendify.Settings:
    """Return the settings of a proxy whose model `m` is the app of KEY."""
    model = {"key": KEY, "mode": mode, **(config or {})}
    return opendify.parse_settings(
        {
            "MODEL_CONFIG": json.dumps({"m": model}),
            "DIFY_API_BASE": dify.base,
            "STREAM_MAX_LAG": "0.1",
            "STREAM_SMOOTHING": "off",  # each jump of the clock takes 2 ms
            **variables,
        }
    )


@contextlib.asynccontextmanager
async def site(
    mode: str = "chat",
    version: str = "1.12.1",
    *,
    config: JSONObject | None = None,
    variables: dict[str, str] | None = None,
    **app: Any,
) -> AsyncIterator[Site]:
    """Give a running site.

    Args:
        mode: of its app.
        version: of Dify.
        config: of the model, beside key and mode.
        variables: further settings.
        app: further settings of the fake app.
    """
    async with FakeDify(version=version) as dify:
        made = Site(dify, mode, **app)
        async with made.serve(settings_of(dify, mode, config, **(variables or {}))):
            yield made


def begin_of(mode: str, *pieces: str) -> list[Step]:
    """Return the beginning of an answer."""
    if mode == "agent-chat":
        texts = [Send({"event": "agent_message", "answer": piece}) for piece in pieces]
        return [fake.agent_thought(), *texts]
    start = [Send({"event": "workflow_started"})] if mode == "advanced-chat" else []
    return [*start, *map(fake.message, pieces)]


def complete(
    mode: str, text: str, number: int, version: str, delay: float = 0
) -> list[Step]:
    """Return a whole answer, in words; its prompt tokens are `number`."""
    pieces = re.findall(r"\s*\S+", text)
    usage = (number, 1)
    if mode == "advanced-chat":
        order = "old" if is_old(version) else "new"
        return fake.chatflow_answer(*pieces, usage=usage, delay=delay, order=order)
    if mode == "workflow":
        return fake.workflow_answer(*pieces, usage=usage)
    if mode == "agent-chat":
        steps = fake.agent_answer(*pieces, delay=delay)
        return [*steps[:-1], fake.message_end(usage)]
    return fake.chat_answer(*pieces, usage=usage, delay=delay)


def is_old(version: str) -> bool:
    """Tell whether a release ends its chatflows in the old way."""
    return [int(part) for part in version.split(".")] < [1, 13]


@dataclass
class Client:
    """A client that shows its messages and sends the last ones.

    Args:
        site: whom it asks.
        messages: what it shows.
        window: how many of them it sends.
        fields: of its requests.
        headers: of its requests.
    """

    site: Site
    messages: Messages = field(default_factory=list)
    window: int = 1000
    fields: JSONObject = field(default_factory=lambda: {"user": "al"})
    headers: dict[str, str] = field(default_factory=dict)
    conversation: str = ""  # that the last answer came from
    context: Messages = field(default_factory=list)  # that led to it

    def copy(self, messages: Messages | None = None) -> Client:
        """Return a client that shows the same, or something else."""
        shown = self.messages if messages is None else messages
        return copy.copy(self)._with(copy.deepcopy(shown))

    def _with(self, messages: Messages) -> Client:
        self.messages = messages
        return self

    async def say(self, text: str, **fields: Any) -> Got:
        """Send one more message, and show the answer."""
        self.messages.append(user(text))
        return await self.send(**fields)

    async def begin(self, **fields: Any) -> Call:
        """Send what is shown."""
        sent = self.messages[-self.window :]
        options = {"stream_options": {"include_usage": True}, **self.fields, **fields}
        return await self.site.proxy.begin(
            self.headers, **{"messages": sent, "stream": True, **options}
        )

    async def send(self, **fields: Any) -> Got:
        """Send what is shown, and show the answer; learn what the model was shown."""
        got = await (await self.begin(**fields)).read_rest()
        assert got.status == 200, got.body
        if got.headers["content-type"] == "application/json":
            text, usage = got.message["content"], got.json["usage"]
        else:
            text, usage = "".join(got.deltas), got.chunks[-1]["usage"]
        self.messages.append(assistant(text))
        self.conversation = got.headers.get("x-dify-conversation-id", "")
        self.context = remembered(self.site.dify.contexts[usage["prompt_tokens"] - 1])
        return got

    def check(self) -> None:
        """Check that the model was shown what this client shows, and nothing else."""
        assert without_system(self.context) == self.messages[:-1]

    async def chat(self, *texts: str, **fields: Any) -> list[str]:
        """Say some things and check each; returns the conversations, one a turn."""
        used = []
        for text in texts:
            await self.say(text, **fields)
            self.check()
            used.append(self.conversation)
        return used


# ------------------------------------------------------------------------------
# Continuing
# ------------------------------------------------------------------------------

TWENTY = [f"question {i}" for i in range(20)]
APPS = [
    pytest.param("chat", "1.12.1", id="chat"),
    pytest.param("agent-chat", "1.12.1", id="agent-chat"),
    pytest.param("advanced-chat", "0.15.3", id="advanced-chat-old"),
    pytest.param("advanced-chat", "1.13.1", id="advanced-chat-new"),
]


@pytest.mark.parametrize(("mode", "version"), APPS)
async def test_twenty_turns_are_one_conversation(mode: str, version: str) -> None:
    async with site(mode, version) as served:
        client = Client(served)
        for number, text in enumerate(TWENTY):
            await client.chat(text, stream=number % 2 == 0)
        (conversation,) = served.dify.conversations.values()
        assert [row.query for row in conversation.messages] == TWENTY
        assert client.conversation == conversation.id
        asked = [served.conversation_of(turn) for turn in served.turns]
        assert asked == [""] + [conversation.id] * 19


@pytest.mark.real_clock
async def test_twenty_turns_of_openai_s_client_are_one_conversation() -> None:
    openai = pytest.importorskip("openai")
    async with site() as served:
        base = f"http://127.0.0.1:{served.proxy.port}/v1"
        messages: Messages = []
        async with openai.AsyncOpenAI(
            base_url=base, api_key="any", max_retries=0
        ) as client:
            create = client.chat.completions.create
            for text in TWENTY[:-1]:
                messages.append(user(text))
                stream = await create(model="m", messages=messages, stream=True)
                deltas = [
                    chunk.choices[0].delta.content or "" async for chunk in stream
                ]
                messages.append(assistant("".join(deltas)))
            messages.append(user(TWENTY[-1]))
            answer = await create(model="m", messages=messages)
        assert answer.choices[0].message.content == "Answer 20."
        assert remembered(served.dify.contexts[-1]) == messages
        (conversation,) = served.dify.conversations.values()
        assert [row.query for row in conversation.messages] == TWENTY


@pytest.mark.parametrize("window", [4, 5])
@pytest.mark.parametrize("has_system", [False, True], ids=["plain", "system"])
async def test_client_that_sends_its_last_messages_continues(
    window: int, has_system: bool
) -> None:
    async with site() as served:
        client = Client(served, window=window)
        for text in TWENTY:
            client.messages.append(user(text))
            sent = client.messages[-window:]
            if has_system:
                sent = [system("Be brief."), *sent]
            await client.send(messages=sent)
            client.check()
        assert len(served.dify.conversations) == 1


def with_file(dify: FakeDify, folder: Path) -> tuple[Site, opendify.Settings]:
    """Return a site, and settings under which its table survives a restart."""
    store = str(folder / "conversations.db")
    return Site(dify, "chat"), settings_of(dify, "chat", CONVERSATION_STORE=store)


async def test_conversation_goes_on_after_a_restart(tmp_path: Path) -> None:
    async with FakeDify() as dify:
        served, options = with_file(dify, tmp_path)
        client, window = Client(served), Client(served, window=4)
        for number in range(4):
            async with served.serve(options):
                await client.chat(f"question {number}", f"and {number}")
                await window.chat(f"frage {number}", f"und {number}")
        assert len(dify.conversations) == 2


async def test_history_is_folded_after_a_restart_without_a_file() -> None:
    async with FakeDify() as dify:
        served = Site(dify, "chat")
        client = Client(served)
        for number in range(2):
            async with served.serve(settings_of(dify, "chat")):
                await client.chat(f"question {number}", f"and {number}")
        sizes = [len(row.messages) for row in dify.conversations.values()]
    assert sizes == [2, 2]


async def test_turn_that_a_restart_cut_is_not_continued(tmp_path: Path) -> None:
    async with FakeDify() as dify:
        served, options = with_file(dify, tmp_path)
        client = Client(served)
        async with served.serve(options) as proxy:
            await client.chat("one")
            served.answers([fake.message("Half"), Hang()], stoppable=False)
            client.messages.append(user("two"))
            text = await (await client.begin()).read_text()
            assert not await proxy.server.drain(0)
        client.messages.append(assistant(text))
        served.answers()
        async with served.serve(options):
            await client.chat("three", "four")
        assert len(dify.conversations) == 2


async def test_question_that_a_restart_cut_is_not_put_to_the_same_conversation(
    tmp_path: Path,
) -> None:
    """Dify may remember it, though it has not begun to answer."""
    async with FakeDify() as dify:
        served, options = with_file(dify, tmp_path)
        client = Client(served)
        async with served.serve(options) as proxy:
            await client.chat("one")
            served.answers([Hang()], stoppable=False)
            client.messages.append(user("two"))
            await client.begin()
            await dify.until(lambda: len(served.turns) == 2)
            assert not await proxy.server.drain(0)
        served.answers()
        async with served.serve(options):
            await client.send()
            client.check()
        asked = [bool(served.conversation_of(turn)) for turn in served.turns]
        assert asked == [False, True, False]


@pytest.mark.real_clock
async def test_two_processes_share_a_file(tmp_path: Path) -> None:
    async with FakeDify() as dify, contextlib.AsyncExitStack() as stack:
        served = Site(dify, "chat")
        options = {
            "MODEL_CONFIG": json.dumps({"m": {"key": KEY, "mode": "chat"}}),
            "DIFY_API_BASE": dify.base,
            "STREAM_SMOOTHING": "off",
            "CONVERSATION_STORE": str(tmp_path / "conversations.db"),
        }
        proxies: list[Any] = []
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            program = running(tmp_path / name, **options)
            _, base = await stack.enter_async_context(program)
            port: Any = urlsplit(base).port
            proxies.append(Proxy(port, dify, None, None))  # type: ignore[arg-type]
        client, window = Client(served), Client(served, window=4)
        for number, text in enumerate(TWENTY[:10]):
            served.proxy = proxies[number % 2]
            await client.chat(text)
            await window.chat(f"or {text}")
        assert [len(row.messages) for row in dify.conversations.values()] == [10, 10]

        served.delay = 0.01
        openings = [Client(served, talk(OPENING, GREETING)) for _ in range(20)]
        for opening in openings[:10]:
            await opening.copy([]).chat(OPENING)
        turns = []
        for number, opening in enumerate(openings):
            served.proxy = proxies[number % 2]
            turns.append(asyncio.ensure_future(opening.say(f"and {number}")))
            await asyncio.sleep(0)  # it has taken its proxy
        await asyncio.gather(*turns)
        for opening in openings:
            opening.check()
        assert len({opening.conversation for opening in openings}) == 20
        for call in proxies[0].asked + proxies[1].asked:
            await call.leave()


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_tail_is_recorded_before_the_client_sees_the_end(stream: bool) -> None:
    """A client's next request may reach another process at once.

    The clock is asked for each record: what has the client got by then?
    """
    arrived: list[bytes] = []
    with socket.socket() as client:

        def wall_clock() -> float:
            with contextlib.suppress(OSError):
                arrived.append(client.recv(1 << 16, socket.MSG_PEEK))
            return 1700000000.0

        async with FakeDify() as dify, proxy_with_clock(dify, wall_clock) as port:
            dify.app(KEY, script=fake.chat_answer("Hello"))
            client.connect(("127.0.0.1", port))
            client.setblocking(False)
            value = {"model": "m", "stream": stream, "messages": [user("Hi")]}
            body = json.dumps(value)
            head = f"POST /chat/completions HTTP/1.1\r\nContent-Length: {len(body)}"
            client.send(f"{head}\r\nHost: localhost\r\n\r\n{body}".encode())
            await dify.until(lambda: dify.contexts and not dify.running)
            await asyncio.sleep(1)
            end = b"[DONE]" if stream else b"Hello"
            assert end in client.recv(1 << 16)
            client.close()
    assert [data for data in arrived if end in data] == []


@contextlib.asynccontextmanager
async def proxy_with_clock(
    dify: FakeDify, wall_clock: Callable[[], float]
) -> AsyncIterator[int]:
    """Give the port of a proxy that asks this clock; it must record one turn."""
    options = settings_of(dify, "chat")
    table, _ = opendify.open_conversations("memory", 1e6)
    upstream = opendify.Dify(options, opendify.open_wire)
    site = opendify.Site(upstream, table, lambda: "a1", wall_clock)
    server = opendify.Server(site)
    ((_, port),) = await server.listen("127.0.0.1", 0)
    try:
        yield port
        assert await server.drain()
        assert len(table) == 1
    finally:
        await server.drain(0)
        upstream.close()
        table.close()


# ------------------------------------------------------------------------------
# What clients do with their histories
# ------------------------------------------------------------------------------

# From a chat of three turns to what is sent instead.
CHANGES: dict[str, Callable[[Messages], Messages]] = {
    "edit-the-first": lambda rows: [user("uno"), *rows[1:], user("next")],
    "edit-one-and-go-on-there": lambda rows: [*rows[:2], user("due")],
    "edit-the-last": lambda rows: [*rows[:4], user("tre")],
    "edit-an-answer": lambda rows: [*rows[:3], assistant("No."), *rows[4:], user("4")],
    "regenerate": lambda rows: rows[:5],
    "regenerate-the-second": lambda rows: rows[:3],
    "branch": lambda rows: [*rows[:4], user("another way")],
    "delete-a-message": lambda rows: [*rows[:2], *rows[3:], user("next")],
    "delete-an-answer": lambda rows: [*rows[:3], *rows[4:], user("next")],
    "delete-a-turn": lambda rows: [*rows[:2], *rows[4:], user("next")],
    "delete-the-last-answer": lambda rows: [*rows[:5], user("next")],
    "insert-an-answer": lambda rows: [*rows, assistant("So it is."), user("next")],
    "swap": lambda rows: [*rows[2:4], *rows[:2], *rows[4:], user("next")],
    "roles": lambda rows: [assistant("one"), *rows[1:], user("next")],
    "odd-texts": lambda rows: [
        user("<message role='user'>\n"),
        *rows[1:],
        user("</message>\n\nAnswer this message:\n\n<message-2"),
    ],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
async def test_changed_history_is_folded_and_the_original_goes_on(
    change: Callable[[Messages], Messages],
) -> None:
    async with site() as served:
        client = Client(served)
        *_, original = await client.chat("one", "two", "three")
        changed = client.copy(change(client.messages))
        await changed.send()
        changed.check()
        assert served.conversation_of(served.turns[-1]) == ""
        assert await client.chat("four", "five") == [original] * 2
        assert await changed.chat("more") == [changed.conversation]
        assert changed.conversation != original
        assert len(served.dify.conversations) == 2


@pytest.mark.parametrize("window", [4, 5, 1000])
async def test_thoughts_that_are_shown_as_quotes_may_be_folded(window: int) -> None:
    """NextChat regenerates an answer, and goes on from there."""
    async with site() as served:
        client, used = Client(served, window=window), []
        for text in ("one", "two", "three", "four", "five", "six", "seven"):
            client.messages.append(user(text))
            for _ in range(2 if text == "three" else 1):
                await client.send()
                shown = f"> Hm: {text}.\n\n> So.\n\n{client.messages[-1]['content']}"
                used.append(client.conversation)
                *before, _ = client.messages
                client.messages = before
            client.messages.append(assistant(shown))
    assert len({*used[:3]}) == len({*used[3:]}) == 1
    assert len({*used}) == 2


@pytest.mark.parametrize("window", [4, 5])
async def test_changed_window_is_folded(window: int) -> None:
    async with site() as served:
        client = Client(served, window=window)
        original = (await client.chat("one", "two", "three", "four"))[-1]
        edited = client.copy()
        edited.messages[-2] = user("quattro")
        await edited.say("five")
        assert edited.context == edited.messages[:-1][-window:]
        assert edited.conversation != original
        regenerated = client.copy(client.messages[:-1])
        await regenerated.send()
        assert regenerated.context == regenerated.messages[:-1][-window:]
        assert await client.chat("five") == [original]


async def test_window_of_stock_phrases_does_not_lead_into_another_chat() -> None:
    """Its own chat ends so as well, but for holding the same twice."""
    async with site() as served:
        served.greets_always = True
        await Client(served).chat("my secret", OPENING, OPENING)
        window = Client(served, window=4)
        for text in (OPENING, OPENING, OPENING, OPENING, "and?"):
            await window.say(text)
            assert user("my secret") not in window.context
        assert window.context[-4:] == window.messages[-5:-1]


CANNED = "We are open from nine to five, and on Sundays from ten to two.\n" * 4 + "Bye!"


@pytest.mark.parametrize("how", ["left", "of two", "failed"])
async def test_answer_in_set_words_does_not_lead_into_another_chat(how: str) -> None:
    """Not even if its own conversation could not be recorded."""
    async with site() as served:
        other = Client(served)
        await other.chat("my secret")
        served.answers(lambda _: fake.chat_answer(CANNED, usage=(9, 1)))
        await (await other.copy([*other.messages, user("when?")]).begin()).read_rest()
        client = Client(served, [user("when?")])
        if how == "left":
            served.answers([fake.message(CANNED), Hang()], stoppable=False)
            call = await client.begin()
            await read_until(call, CANNED)
            await call.leave()
            await served.quiet()
        elif how == "failed":
            served.answers([fake.message(CANNED), fake.error_event()])
            client.headers["X-OpenDify-Smoothing"] = "on"  # some of it is held back
            await (await client.begin()).read_rest()
        else:
            await (await client.begin(n=2)).read_rest()
        served.answers()
        client.messages.append(assistant(CANNED))
        turns = len(served.turns)
        await client.chat("thanks")
        assert (
            len(served.turns) == turns + 1
        )  # Dify is not asked for what it can't have


async def test_letter_identical_chats_are_never_shared() -> None:
    """By app, by user however named, by key."""
    known: list[tuple[JSONObject, dict[str, str]]] = [
        ({"user": "al"}, {}),
        ({"user": "bo"}, {}),
        ({"user": "al", "model": "n"}, {}),
        ({"safety_identifier": "cy"}, {}),
        ({}, {"Authorization": "Bearer key-1"}),
        ({}, {"Authorization": "Bearer key-2"}),
        ({}, {"X-OpenWebUI-User-Id": "dee"}),
        ({"model": "n"}, {"X-OpenWebUI-User-Id": "dee"}),
    ]
    apps = {"m": {"key": KEY, "mode": "chat"}, "n": {"key": "app-2", "mode": "chat"}}
    async with site(variables={"MODEL_CONFIG": json.dumps(apps)}) as served:

        def script(request: fake.Request) -> list[Step]:
            text = f"So {request.json['query']}."
            return fake.chat_answer(text, usage=(len(served.dify.contexts), 1))

        for key in (KEY, "app-2"):
            served.dify.app(key, memory=True, script=script)
        clients = [
            Client(served, fields=fields, headers=headers) for fields, headers in known
        ]
        for text in ("one", "two", "three"):
            for client in clients:
                await client.chat(text)
        assert all(client.messages == clients[0].messages for client in clients)
        ids = [client.conversation for client in clients]
        assert ids == list(served.dify.conversations)  # one each
        rows = served.dify.conversations.values()
        assert len({(row.key, row.user) for row in rows}) == len(clients)
        assert [len(row.messages) for row in rows] == [3] * len(clients)


async def test_two_windows_of_a_user_meet_only_while_they_are_identical() -> None:
    async with site() as served:
        one, other = Client(served), Client(served)
        for client in (one, other, other, one):
            client.messages = []
            await client.chat(OPENING)
        for client in (one, other):
            await client.chat("what differs", "more")
        assert one.conversation != other.conversation
        own = one.conversation, other.conversation
        for number in range(2):
            await other.chat(f"b{number}")
            await one.chat(f"a{number}")
        assert (one.conversation, other.conversation) == own


async def test_models_of_one_app_keep_to_their_own_chats() -> None:
    """Their inputs tell them apart; old releases read those of the first turn only."""
    app = {"key": KEY, "mode": "chat"}
    models = {name: {**app, "inputs": {"language": name}} for name in "abcde"}
    async with site(variables={"MODEL_CONFIG": json.dumps(models)}) as served:
        clients = [Client(served, fields={"model": name}) for name in models]
        for client in clients:
            await client.chat(OPENING)
        for client in reversed(clients):
            await client.chat("and?")
        rows = served.dify.conversations.values()
        told = [
            "".join(row.inputs["language"] for row in talk.messages) for talk in rows
        ]
        assert told == ["aa", "bb", "cc", "dd", "ee"]


async def test_a_hundred_parallel_turns_share_nothing() -> None:
    async with site() as served:
        served.delay = 0.01  # so that they overlap
        openings = [Client(served) for _ in range(10)]
        await asyncio.gather(*(client.say(OPENING) for client in openings))
        assert len(served.dify.conversations) == 10
        clients = [openings[0].copy() for _ in range(100)]
        for wave in ("first", "second"):
            says = (client.say(f"{wave} {i}") for i, client in enumerate(clients))
            await asyncio.gather(*says)
            # A conversation with two turns at once would show one without an answer.
            for client in clients:
                client.check()
            assert len({client.conversation for client in clients}) == 100
        assert len(served.dify.conversations) == 100
        asked = [served.conversation_of(turn) for turn in served.turns]
        first, second = asked[10:110], asked[110:]
        assert (sum(map(bool, first)), sum(map(bool, second))) == (10, 100)


# ------------------------------------------------------------------------------
# Conversations that are gone, and those that are named
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize(("mode", "version"), APPS)
async def test_deleted_conversation_costs_one_request(
    mode: str, version: str, stream: bool
) -> None:
    async with site(mode, version) as served:
        client = Client(served)
        await client.chat("one", "two", stream=stream)
        served.dify.conversations.clear()
        before = len(served.dify.requests)
        (fresh,) = await client.chat("three", stream=stream)
        assert len(served.dify.requests) == before + 2
        assert await client.chat("four", stream=stream) == [fresh]
        assert len(served.dify.requests) == before + 3
        assert len(served.proxy.site.conversations) == 1


async def test_deleted_conversation_that_is_met_with_silence() -> None:
    """Chatflows of 1.13 and later: 200 and pings (contract of Dify, 3.2)."""
    async with site("advanced-chat", "1.13.1") as served:
        client = Client(served)
        (gone,) = await client.chat("one")

        def script(request: fake.Request) -> list[Step]:
            if served.conversation_of(request) == gone:
                return [Send(b""), Hang()]
            return served.script(request)

        served.answers(script)
        await client.chat("two")
        _, fresh = served.dify.conversations
        assert await client.chat("three") == [fresh]


@pytest.mark.parametrize(("mode", "said"), [("advanced-chat", []), ("chat", ["one"])])
async def test_silence_that_tells_of_no_lost_conversation_is_met_once(
    mode: str, said: list[str]
) -> None:
    """A chatflow has none yet, or the app is one that would answer 404."""
    async with site(mode, "1.13.1") as served:
        client = Client(served)
        await client.chat(*said)
        served.answers([Send(b""), Hang()])
        client.messages.append(user("two"))
        got = await (await client.begin()).read_rest()
        assert (got.error["type"], len(served.turns)) == ("server_error", 1 + len(said))


COMPLETED = "The conversation has ended. Please start a new conversation."
OVER = {
    "unsaid": Status(404, {"code": "not_found", "message": None, "status": 404}),
    "completed": Status(400, {"code": "conversation_completed", "message": COMPLETED}),
}


@pytest.mark.parametrize("over", OVER.values(), ids=OVER)
async def test_conversation_that_is_over_is_begun_anew(over: Step) -> None:
    async with site() as served:
        client = Client(served)
        (own,) = await client.chat("one")

        def script(request: fake.Request) -> list[Step]:
            is_over = served.conversation_of(request) == own
            return [over] if is_over else served.script(request)

        served.answers(script)
        await client.say("two")
        fresh = client.conversation
        assert fresh != own
        assert await client.chat("three") == [fresh]
        call = await client.begin(conversation_id=own)
        got = await call.read_rest()
        assert (got.status, got.error["code"]) == (404, "not_found")
        assert "conversation" in got.error["message"]


async def test_nothing_found_without_a_conversation_is_no_lost_one() -> None:
    async with site() as served:
        served.answers([OVER["unsaid"]])
        client = Client(served, [user("one")])
        got = await (await client.begin()).read_rest()
        assert (got.status, got.error["code"]) == (400, "not_found")


async def test_run_whose_app_calls_a_lost_conversation_is_not_repeated() -> None:
    async with site("advanced-chat") as served:
        client = Client(served)
        await client.chat("one")
        before = len(served.turns)
        inner = '{"code": "not_found", "message": "Conversation Not Exists."}'
        served.answers([fake.error_event(f"Run failed: status 404: {inner}")])
        client.messages.append(user("two"))
        got = await (await client.begin()).read_rest()
        assert (got.status, len(served.turns)) == (502, before + 1)


PLACES: dict[str, Callable[[str], JSONObject]] = {
    "body": lambda id_: {"conversation_id": id_},
    "metadata": lambda id_: {"metadata": {"conversation_id": id_}},
    "header": lambda id_: {"headers": {"X-Dify-Conversation-Id": id_}},
    "body-first": lambda id_: {
        "conversation_id": id_,
        "headers": {"X-Dify-Conversation-Id": NOBODY},
    },
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
async def test_named_conversation_is_used_and_its_tail_moves(
    place: Callable[[str], JSONObject],
) -> None:
    async with site() as served:
        client = Client(served)
        await client.chat("one", "two")
        named = place(client.conversation)
        brief = Client(served, headers=named.pop("headers", {}))
        await brief.say("by name", **named)
        # The client sent one message, and named what came before.
        assert brief.context == [*client.messages, user("by name")]
        assert brief.conversation == client.conversation
        whole = client.copy([*client.messages, *brief.messages])
        assert await client.chat("three") != [whole.conversation]  # it has moved on
        assert await whole.chat("four", "five") == [brief.conversation] * 2


@pytest.mark.parametrize("believed", ["workflow", "completion"])
async def test_named_conversation_is_used_if_the_mode_was_wrong(believed: str) -> None:
    async with FakeDify() as dify:
        served = Site(dify, "chat")
        client = Client(served)
        async with served.serve(settings_of(dify, "chat")):
            await client.chat("one")
        async with served.serve(settings_of(dify, believed)):
            await client.chat("two", conversation_id=client.conversation)
        assert len(dify.conversations) == 1


async def test_mode_that_dify_refuses_to_tell_is_asked_again() -> None:
    refusal = Status(400, {"code": "app_unavailable"})
    told = [refusal, Status(200, {"name": "A", "mode": "chat"})]
    async with FakeDify() as dify:
        served = Site(dify, "chat")
        served.answers(overrides={"/info": lambda _: [told.pop(0)]})
        model = json.dumps({"m": {"key": KEY}})
        async with served.serve(settings_of(dify, "chat", MODEL_CONFIG=model)):
            await Client(served).chat("one")
    assert told == []


async def test_name_hides_no_history_from_an_app_without_memory() -> None:
    """The app was taken for one that has conversations."""
    async with site("completion", config={"mode": "chat"}) as served:
        client = Client(served, talk("one", "Answer 1."))
        await client.say("two", conversation_id=NOBODY)
        client.check()


async def test_whole_history_with_a_name_is_not_told_twice() -> None:
    async with site() as served:
        client = Client(served)
        await client.chat("one")
        for text in ("two", "three"):
            await client.chat(text, conversation_id=client.conversation)
        assert await client.chat("four") == [client.conversation]
        assert len(served.dify.conversations) == 1


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("whose", ["nobody's", "another user's", "deleted"])
async def test_unknown_named_conversation_is_a_404_that_says_so(
    place: Callable[[str], JSONObject], whose: str
) -> None:
    async with site() as served:
        stranger = Client(served, fields={"user": "bo"})
        client = Client(served)
        (own,) = await client.chat("one")
        (foreign,) = await stranger.chat("one")
        if whose == "deleted":
            del served.dify.conversations[own]
        ids = {"nobody's": NOBODY, "another user's": foreign, "deleted": own}
        before = len(served.dify.requests)
        for stream in (True, False):
            named = place(ids[whose])
            call = await served.proxy.begin(
                named.pop("headers", {}),
                messages=[*client.messages, user("two")],
                **{"stream": stream, "user": "al", **named},
            )
            got = await call.read_rest()
            assert (got.status, got.error["code"]) == (404, "not_found")
            assert "conversation" in got.error["message"].lower()
        assert len(served.dify.requests) == before + 2
        (after,) = await client.chat("two")
        assert (after == own) == (whose != "deleted")
        assert await stranger.chat("two") == [foreign]


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize(("mode", "version"), APPS)
async def test_ids_come_with_every_answer(
    mode: str, version: str, stream: bool
) -> None:
    async with site(mode, version) as served:
        client = Client(served)
        for number in range(2):
            got = await client.say(f"question {number}", stream=stream)
            (conversation,) = served.dify.conversations.values()
            ids = (conversation.id, conversation.messages[-1].id)
            names = ("conversation_id", "message_id")
            headers = ("x-dify-conversation-id", "x-dify-message-id")
            assert tuple(got.headers[name] for name in headers) == ids
            first = got.chunks[0] if stream else got.json
            assert first["dify"] == dict(zip(names, ids))
            others = got.chunks[1:] if stream else []
            assert [chunk for chunk in others if "dify" in chunk] == []


# ------------------------------------------------------------------------------
# Turns that do not end well
# ------------------------------------------------------------------------------

OLD_AND_NEW = [
    (mode, version)
    for mode in ("chat", "agent-chat", "advanced-chat")
    for version in ("0.15.3", "1.13.1")
]


Interruption = Callable[[Site, Client], Coroutine[Any, Any, str]]


async def read_until(call: Call, text: str) -> str:
    """Read a stream until this much text is there; returns all that is."""
    await call.read_head()
    seen = ""
    while len(seen) < len(text):
        chunks = chunks_of(await call.read_piece())
        seen += "".join(delta_of(chunk).get("content") or "" for chunk in chunks)
    return seen


async def broken_turn(served: Site, client: Client, *steps: Step, **app: Any) -> str:
    """A turn that ends by itself, somehow; returns what the client was shown."""
    served.answers(steps, **app)
    got = await (await client.begin()).read_rest()
    if got.status != 200:
        return ""
    texts = [delta_of(chunk).get("content") for chunk in chunks_of(got.body)]
    return "".join(text for text in texts if text)


def leaves(*after: Step, text: str = "Hello", **app: Any) -> Interruption:
    """The client leaves when it has this text; what comes after it is the model's."""

    async def leave(served: Site, client: Client) -> str:
        steps = begin_of(served.mode, *re.findall(r" ?[^ ]+", text))
        end = complete(served.mode, "", 0, served.dify.version)
        ending = [step for step in end if step not in begin_of(served.mode)]
        served.answers([*(steps if text else [Send(b"")]), *after, *ending], **app)
        call = await client.begin()
        seen = await read_until(call, text) if text else ""
        await served.dify.until(lambda: served.dify.running)
        await call.leave()
        await served.quiet()
        return seen

    return leave


async def leaves_while_a_stop_may_come(served: Site, client: Client) -> str:
    """The client leaves when it has all but what may be the beginning of its stop."""
    client.fields = {**client.fields, "stop": ["END"]}
    return await leaves(fake.message("EN"), Hang())(served, client)


def leaves_whole(*after: Step) -> Interruption:
    """The client leaves a turn that is not streamed."""

    async def leave(served: Site, client: Client) -> str:
        served.answers([*begin_of(served.mode, "Hel", "lo"), *after])
        call = await client.begin(stream=False, stream_options=None)
        await served.dify.until(lambda: served.dify.running)
        await asyncio.sleep(1)
        await call.leave()
        await served.quiet()
        return ""

    return leave


def ends(*after: Step, **app: Any) -> Interruption:
    """The answer begins, and then this happens."""

    async def end(served: Site, client: Client) -> str:
        begin = begin_of(served.mode, "Hel", "lo")
        return await broken_turn(served, client, *begin, *after, **app)

    return end


def fails(*steps: Step) -> Interruption:
    """This happens before any text."""

    async def fail(served: Site, client: Client) -> str:
        return await broken_turn(served, client, *begin_of(served.mode), *steps)

    return fail


def refuses(
    status: int, code: str = "invalid_param", text: str = "No."
) -> Interruption:
    """Dify refuses before it stores anything."""
    body = {"status": status, "code": code, "message": text}

    async def refuse(served: Site, client: Client) -> str:
        overrides = {"/chat-messages": [Status(status, body)]}
        return await broken_turn(served, client, overrides=overrides)

    return refuse


async def is_stopped_by_others(served: Site, client: Client) -> str:
    """Somebody stops the run, in Dify's own pages, say."""
    served.answers([*begin_of(served.mode, "Hel", "lo"), Hang()])
    call = await client.begin()
    seen = await read_until(call, "Hello")
    (turn,) = served.dify._turns.values()
    turn.stopped.set()
    await call.read_rest()
    return seen


async def fails_as_a_workflow(served: Site, client: Client) -> str:
    """Releases to 1.12 say it twice."""
    failed = fake.workflow_finished(status="failed", error="no such tool", outputs={})
    is_flow = served.mode == "advanced-chat"
    steps = [failed] if is_flow else []
    if not is_flow or is_old(served.dify.version):
        steps.append(fake.error_event())
    begin = begin_of(served.mode, "Hel", "lo")
    return await broken_turn(served, client, *begin, *steps)


async def replaces(served: Site, client: Client) -> str:
    """Moderation takes back what was shown already."""
    sorry = Send({"event": "message_replace", "answer": "Sorry.", "reason": "no"})
    steps = [*begin_of(served.mode, "Hello", " there"), Sleep(3), sorry]
    return await broken_turn(served, client, *steps, fake.message_end())


GZIPPED = {"Content-Type": "text/event-stream", "Content-Encoding": "gzip"}
NEEDS_INPUT = "topic is required in input form"
TALKS_ON: list[Step] = [Sleep(0.2), fake.message(" you")] * 9
# After these the memory is known to agree with the client: the conversation goes on.
KEPT = {
    "leaves-before-its-end": leaves(Sleep(9), text="Hello there"),
    "is-stopped": is_stopped_by_others,
}
UNKNOWN = {("agent-chat", "leaves-before-its-end")}  # it recalls no stopped round
# After these it may have to begin anew.
ENDED: dict[str, Interruption] = {
    "leaves-while-it-talks": leaves(*TALKS_ON),
    "leaves-while-it-is-silent": leaves(Hang()),
    "leaves-in-a-burst": leaves(fake.message(" and so on" * 99), Hang()),
    "leaves-while-a-stop-may-come": leaves_while_a_stop_may_come,
    "leaves-before-a-word": leaves(Hang(), text=""),
    "leaves-before-the-first-word": leaves(
        Sleep(2), fake.message("Hello"), Hang(), text=""
    ),
    "leaves-and-the-stop-fails": leaves(Hang(), stoppable=False),
    "leaves-and-it-is-told-more": leaves(
        Sleep(0.5), fake.message(" you"), stoppable=False
    ),
    "leaves-and-the-rest-is-lost": leaves(Sleep(0.5), Close()),
    "leaves-a-whole-answer": leaves_whole(Hang()),
    "leaves-a-whole-answer-that-breaks": leaves_whole(Sleep(5), Close()),
    "breaks-off": ends(Close()),
    "is-reset": ends(Reset()),
    "breaks-off-before-a-word": fails(Send(b""), Close()),
    "fails": ends(fake.error_event()),
    "fails-at-once": fails(fake.error_event()),
    "fails-for-an-input": fails(fake.error_event(NEEDS_INPUT, "invalid_param")),
    "fails-for-the-rate": fails(fake.error_event("429 Too many requests")),
    "fails-as-a-workflow": fails_as_a_workflow,
    "falls-silent": ends(Hang()),
    "is-replaced": replaces,
    "no-json": ends(Send(b"data: {oops\n\n")),
    "500": refuses(500, "internal_server_error"),
    "compressed": lambda *of: broken_turn(*of, Status(200, b"\x1f\x8b", GZIPPED)),
}
REFUSED = {
    "400": refuses(400),
    "401": refuses(401, "unauthorized"),
    "413": refuses(413, "file_too_large"),
    "429": refuses(429, "too_many_requests"),
    "400-no-quota": refuses(400, "provider_quota_exceeded", "Your quota is exceeded."),
    "400-too-many": refuses(400, text="Too many requests. Please try again later."),
}


@pytest.mark.parametrize("name", [*KEPT, *ENDED])
async def test_memory_and_client_agree_after_a_turn_that_did_not_end_well(
    name: str,
) -> None:
    """Whatever the client shows afterwards: what it saw, or as if nothing had been."""
    checks = [check_after(name, *app) for app in OLD_AND_NEW]  # on one clock
    results = await asyncio.gather(*checks, return_exceptions=True)
    assert dict(zip(OLD_AND_NEW, results)) == dict.fromkeys(OLD_AND_NEW)


async def check_after(name: str, mode: str, version: str) -> None:
    """Check what the model is shown after a turn that ended so."""
    variables = {"DIFY_IDLE_TIMEOUT": "9", "DIFY_FIRST_EVENT_TIMEOUT": "9"}
    variables["STREAM_SMOOTHING"] = "on"
    async with site(mode, version, variables=variables) as served:
        client = Client(served)
        (before,) = await client.chat("one")
        client.messages.append(user("two"))
        seen = await {**KEPT, **ENDED}[name](served, client)
        served.answers()
        client.headers = {"X-OpenDify-Smoothing": "off"}
        shows = client.copy([*client.messages, assistant(seen)])
        drops = client.copy(client.messages[:-1])
        is_known = name in KEPT and (mode, name) not in UNKNOWN
        assert await shows.chat("three") == [before] or not is_known
        await drops.chat("three")
        await client.send()  # it tries again
        client.check()


@pytest.mark.parametrize("how", ["fails", "fails-at-once", "500"])
async def test_conversation_that_a_turn_has_lost_is_learned_anew_by_its_name(
    how: str,
) -> None:
    async with site() as served:
        client = Client(served)
        (named,) = await client.chat("one")
        client.messages.append(user("two"))
        await ENDED[how](served, client)
        served.answers()
        client = Client(served)
        for text in ("three", "four"):
            await client.say(text, conversation_id=named)
        await client.say("five")
        assert client.conversation == named


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("refuse", REFUSED.values(), ids=REFUSED)
async def test_conversation_goes_on_after_a_refusal(
    refuse: Interruption, stream: bool
) -> None:
    async with site() as served:
        client = Client(served)
        (before,) = await client.chat("one", stream=stream)
        client.messages.append(user("two"))
        assert await refuse(served, client) == ""
        served.answers()
        await client.send(stream=stream)
        client.check()
        assert client.conversation == before


@pytest.mark.parametrize("is_asked", [False, True], ids=["before", "meanwhile"])
async def test_conversation_goes_on_if_dify_was_down_before_it_was_asked(
    is_asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object) -> None:
        raise ConnectionRefusedError

    async with site() as served:
        client = Client(served)
        (before,) = await client.chat("one")
        if is_asked:  # by a kept connection, on which no answer comes
            served.answers([Close()])
        else:
            await served.quiet()
        client.messages.append(user("two"))
        with monkeypatch.context() as patched:
            patched.setattr(opendify.Pool, "_connect_to", refuse)
            for _ in range(2):  # the second is not even tried
                assert (await (await client.begin()).read_rest()).status == 502
        await asyncio.sleep(opendify.CIRCUIT_S)
        served.answers()
        await client.send()
        client.check()
        assert (client.conversation == before) is not is_asked


async def test_agent_s_rounds_are_one_answer() -> None:
    """Dify stores them apart by a line break that it does not stream."""
    async with site("agent-chat") as served:
        client = Client(served)
        rounds = fake.agent_answer("It is late.", tool="clock", before=["I look."])
        served.answers([*rounds[:-1], fake.message_end((1, 1))])
        await client.say("one")
        assert client.messages[-1] == assistant("I look.It is late.")
        served.answers()
        await client.say("two")
        assert client.context[1] == assistant("I look.\nIt is late.")
        assert len(served.dify.conversations) == 1


# ------------------------------------------------------------------------------
# System texts, side requests, files, tools, apps without memory
# ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shown",
    [[], [assistant("")], [assistant("<think>Hm.</think>\n\n")]],
    ids=["not", "empty", "with thoughts"],
)
@pytest.mark.parametrize("is_named", [False, True], ids=["found", "named"])
async def test_empty_answer_does_not_break_a_conversation(
    shown: Messages, is_named: bool
) -> None:
    """The AI SDK, the Agents SDK, Mastra and llm send a history without it."""
    async with site() as served:
        client = Client(served)
        await client.say("one")
        served.answers(complete("chat", "", 2, "1.12.1"))
        await client.say("two")
        assert client.messages.pop() == assistant("")
        client.messages += shown
        served.answers()
        about = {"conversation_id": client.conversation} if is_named else {}
        for text in ("three", "four"):
            await client.say(text, **about)
        queries = [turn.json["query"] for turn in served.turns]
    assert queries == ["one", "two", "three", "four"]
    assert len(served.dify.conversations) == 1


async def test_empty_answer_that_is_not_shown_is_not_told_either() -> None:
    async with site() as served:
        client = Client(served)
        served.answers(complete("chat", "", 1, "1.12.1"))
        await client.say("one")
        assert client.messages.pop() == assistant("")
        served.answers()
        served.dify.conversations.clear()
        await client.say("two")
        client.check()
        assert "assistant" not in served.turns[-1].json["query"]


async def test_system_text_that_changes_does_not_break_a_conversation() -> None:
    async with site() as served:
        client = Client(served)
        for number in range(5):
            text = f"It is {number} o'clock."
            client.messages.append(user(f"question {number}"))
            await client.send(messages=[system(text), *client.messages])
            client.check()
            told = [row for row in client.context if row["role"] == "system"]
            assert told[-1] == system(text)
        assert len(served.dify.conversations) == 1


async def test_system_text_that_stays_is_told_once() -> None:
    async with site() as served:
        client = Client(served, [system("Be brief.")])
        for text in ("one", "two", "three"):
            await client.say(text)
        assert client.context == client.messages[:-1]
        assert [turn.json["query"] for turn in served.turns[1:]] == ["two", "three"]


async def test_system_variable_gets_the_system_text_in_every_turn() -> None:
    async with site(config={"system_variable": "rules"}) as served:
        client = Client(served)
        for number in range(3):
            client.messages.append(user(f"question {number}"))
            await client.send(messages=[system(f"Rule {number}"), *client.messages])
            assert client.context == client.messages[:-1]
        inputs = [turn.json["inputs"] for turn in served.turns]
        assert inputs == [{"rules": f"Rule {number}"} for number in range(3)]
        assert len(served.dify.conversations) == 1


async def test_history_variable_gets_what_dify_does_not_remember() -> None:
    async with site(config={"history_variable": "past"}) as served:
        past = talk("one", "Uno.", "two", "Due.")
        client = Client(served, list(past))
        for text in ("three", "four"):
            await client.say(text)
            assert read_back(served.turns[-1].json["inputs"]["past"]) == past
            assert [*past, *client.context] == client.messages[:-1]
        assert len(served.dify.conversations) == 1


async def test_history_variable_is_sent_again_where_a_conversation_is_named() -> None:
    """Dify has the history as an input of the last turn only, the client not at all."""
    async with site(config={"history_variable": "past"}) as served:
        past = talk("one", "Uno.")
        client = Client(served, list(past))
        await client.say("two")
        named = {"user": "al", "conversation_id": client.conversation}
        brief = Client(served, fields=named)
        for text in ("three", "four"):
            await brief.say(text)
            assert read_back(served.turns[-1].json["inputs"]["past"]) == past
        assert [*past, *brief.context] == [*client.messages, *brief.messages[:-1]]
        await Client(served, fields={**named, "inputs": {"past": "mine"}}).say("five")
        assert served.turns[-1].json["inputs"] == {"past": "mine"}
        fresh = Client(served, fields={"user": "al"})
        for text in ("one", "two"):  # the app may have a default for who has no past
            await fresh.say(text)
            fresh.fields["conversation_id"] = fresh.conversation
            assert served.turns[-1].json["inputs"] == {}


@pytest.mark.parametrize(
    ("config", "is_named"), [({}, True), ({"history_variable": "past"}, False)]
)
async def test_history_is_not_asked_for_where_it_is_no_input_or_is_shown(
    config: JSONObject, is_named: bool
) -> None:
    async with site(config=config) as served:
        client = Client(served)
        (own,) = await client.chat("one")
        before = len(served.dify.requests)
        await client.say("two", **({"conversation_id": own} if is_named else {}))
        assert len(served.dify.requests) == before + 1


async def test_named_conversation_that_is_lost_is_told_before_a_turn_is_sent() -> None:
    """A chatflow of Dify 1.13 says nothing to it, for minutes."""
    async with site(config={"history_variable": "past"}, memory=True) as served:
        client = Client(served, fields={"user": "al"})
        (lost,) = await client.chat("one")
        served.dify.conversations.clear()
        client.messages.append(user("two"))
        got = await (await client.begin(conversation_id=lost)).read_rest()
        assert (got.status, got.error["code"]) == (404, "not_found")
        await client.send()  # nor by its history, from then on
        asked = [served.conversation_of(turn) for turn in served.turns]
        assert asked == ["", ""]
        assert len(served.proxy.site.conversations) == 1


async def test_history_variable_is_told_with_what_follows_a_response() -> None:
    """In its conversation, and where it is folded, since that has moved on."""
    async with site(config={"history_variable": "past"}) as served:

        async def respond(text: Any, **fields: Any) -> str:
            body = {"model": "m", "user": "al", "input": text, **fields}
            call = await served.proxy.open("POST", "/v1/responses", body, {})
            return str((await call.read_rest()).json["id"])

        first = await respond([*talk("one", "Uno."), user("two")])
        for text in ("three", "other"):
            await respond(text, previous_response_id=first)
        told, same, folded = (turn.json["inputs"]["past"] for turn in served.turns)
        assert read_back(told) == talk("one", "Uno.")
        assert same == told
        asked, said = read_back(folded)
        assert (asked["content"], said["content"]) == (f"{told}\n\ntwo", "Answer 1.")
        assert len(served.dify.conversations) == 2


CONTEXT = """### Task:
Respond to the user query using the provided context, with citations.

<context>
<source id="1">Leave is 25 days.</source>
</context>

"""
SIDE_REQUESTS = {
    "open-webui": [user("### Task:\nSuggest 3-5 follow-ups.\n{history}")],
    "nextchat-title": [
        *talk("one", "Answer 1.", "two", "Answer 2."),
        user("Please generate a four to five word title summarizing our conversation"),
    ],
    "nextchat-title-cn": [
        *talk("one", "Answer 1.", "two", "Answer 2."),
        user("使用四到五个字直接返回这句话的简要主题，不要解释"),
    ],
    "nextchat-summary": [
        *talk("one", "Answer 1.", "two", "Answer 2."),
        system("Summarize the discussion briefly in 200 words or less"),
    ],
    "qwen-code-memory": [
        *talk("one", "Answer 1.", "two", "Answer 2."),
        user("Managed memory directory: `/home/ada/memory`\n\nScan the conversation"),
    ],
    "qwen-code-btw": [
        *talk("one", "Answer 1.", "two", "Answer 2."),
        user("<system-reminder>\nThis is a side question from the user.\n\nWhy?"),
    ],
    "nextchat-summary-cn": [
        *talk("one", "Answer 1.", "two", "Answer 2."),
        system("简要总结一下对话内容，用作后续的上下文提示 prompt，控制在 200 字以内"),
    ],
}


@pytest.mark.parametrize("is_named", [False, True], ids=["", "named"])
@pytest.mark.parametrize("side", SIDE_REQUESTS.values(), ids=SIDE_REQUESTS)
async def test_side_request_neither_joins_nor_moves_a_conversation(
    side: Messages, is_named: bool
) -> None:
    async with site() as served:
        client = Client(served)
        *_, own = await client.chat("one", "two")
        titles = client.copy(list(side))
        named = {"conversation_id": own} if is_named else {}
        await titles.send(stream=False, stream_options=None, **named)
        assert titles.context == side
        assert titles.conversation != own
        assert await client.chat("three") == [own]
        await titles.say("a title's next")
        assert titles.conversation not in (own, list(served.dify.conversations)[1])


async def test_context_before_a_question_does_not_break_a_conversation() -> None:
    """Open WebUI puts what it found before a question, and shows it never again."""
    query = f"{CONTEXT}three"
    async with site() as served:
        client = Client(served)
        *_, own = await client.chat("one", "two")
        asking = client.copy([*client.messages, user(query)])
        await asking.send()
        assert served.turns[-1].json["query"] == query
        client.messages += [user("three"), asking.messages[-1]]
        await client.say("four")
        assert served.turns[-1].json["query"] == "four"
        assert asking.conversation == client.conversation == own


VISION = {"file_upload": {"image": {"enabled": True, "number_limits": 3}}}


def picture(text: str, data: bytes = CAT) -> JSONObject:
    """Return a user's message with an image."""
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    parts = [
        {"type": "text", "text": text},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    return {"role": "user", "content": parts}


async def test_images_of_earlier_messages_do_not_break_a_conversation() -> None:
    async with site(parameters=VISION) as served:
        client = Client(served, [picture("Who?")])
        await client.send()
        own = client.conversation
        await client.say("And its weight?")
        client.messages.append(picture("And that?", CAT + b" and a dog"))
        await client.send()
        assert client.conversation == own
        counts = [len(turn.json.get("files", [])) for turn in served.turns]
        assert (counts, len(served.dify.uploads)) == ([1, 0, 1], 2)

        other = client.copy([picture("Who?", b"\x89PNG\r\n\x1a\n a fish")])
        other.messages += client.messages[1:2]
        await other.say("And its weight?")
        assert other.conversation != own
        first, *rest = other.context
        assert (first["role"], first["content"]) == ("user", "Who?")
        assert first["file"].endswith("(image/png)")
        assert rest == other.messages[1:-1]
        (file,) = served.turns[-1].json["files"]
        assert served.dify.uploads[file["upload_file_id"]].data.endswith(b"a fish")
        own = other.conversation
        await other.say("And on?")
        assert other.conversation == own


@pytest.mark.parametrize("path", ["/files/upload", "/parameters"])
async def test_conversation_goes_on_if_its_question_did_not_get_to_dify(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opendify, "FORM_FRESH_S", -1.0)
    async with site(parameters=VISION) as served:
        client = Client(served, [picture("Who?")])
        await client.send()
        own = client.conversation
        client.messages.append(picture("And that?", CAT + b" and a dog"))
        served.answers(overrides={path: [Status(500, {"code": "x"})]})
        assert (await (await client.begin()).read_rest()).status == 502
        served.answers()
        await client.send()
        assert client.conversation == own


@pytest.mark.parametrize("path", ["/files/upload", "/parameters"])
async def test_nothing_is_asked_if_the_client_leaves_before(path: str) -> None:
    gate = asyncio.Event()
    late: list[Step] = [fake.Wait(gate), Status(200, {**VISION, "id": NOBODY})]
    async with site(parameters=VISION) as served:
        client = Client(served)
        await client.chat("one")
        served.answers(overrides={path: late})
        call = await client.copy([*client.messages, picture("two")]).begin()
        await served.dify.until(lambda: served.dify.requests[-1].path == path)
        await call.leave()
        gate.set()
        await served.quiet()
        assert len(served.turns) == 1
        served.answers()
        assert await client.chat("two") == [client.conversation]
        assert len(served.dify.conversations) == 1


async def test_tool_messages_are_folded_and_continued() -> None:
    call = {"name": "weather", "arguments": '{"at":"Rome"}'}
    tool_calls = [{"id": "call_1", "type": "function", "function": call}]
    ask: Messages = [
        user("Rain?"),
        {"role": "assistant", "content": None, "tool_calls": tool_calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "dry"},
    ]
    written = (
        '<tool_call>\n{"name": "weather", "arguments": {"at":"Rome"}}\n</tool_call>'
    )
    no_tools = "Write no <tool_call> block this time: answer without one."
    shown = [
        {"role": "system", "content": no_tools},
        user("Rain?"),
        {"role": "assistant", "content": written},
        {"role": "tool", "name": "weather", "content": "dry"},
    ]
    async with site() as served:
        client = Client(served, list(ask))
        await client.send()
        assert client.context == shown
        own = client.conversation
        for text in ("And tomorrow?", "And then?"):
            await client.say(text)
            assert client.context == [*shown, *client.messages[3:-1]]
            assert client.conversation == own
        client.messages[1]["tool_calls"][0]["function"]["arguments"] = "{}"
        await client.say("Really?")
        assert client.conversation != own


async def test_several_answers_take_no_conversation() -> None:
    async with site() as served:
        client = Client(served)
        (own,) = await client.chat("one")
        aside = client.copy([*client.messages, user("two")])
        await (await aside.begin(n=2)).read_rest()
        await client.say("three")
        client.check()
        assert client.conversation == own


@pytest.mark.parametrize("mode", ["completion", "workflow"])
async def test_apps_without_memory_are_told_everything(mode: str) -> None:
    form = {"user_input_form": [fake.text_input("query")]}
    async with site(mode, parameters=form) as served:
        client = Client(served, [system("Be brief.")])
        for text in ("one", "two", "three"):
            await client.say(text)
            assert client.context == client.messages[:-1]
        assert client.conversation == ""
        assert len(served.proxy.site.conversations) == 0


@pytest.mark.parametrize("mode", ["completion", "workflow"])
async def test_apps_without_memory_are_asked_for_none(mode: str) -> None:
    """Though a client names a conversation, as it would with another app."""
    form = {"user_input_form": [fake.text_input("query")]}
    async with site(
        mode, config={"history_variable": "past"}, parameters=form
    ) as served:
        client = Client(served, fields={"conversation_id": "c"})
        await client.say("one")
        assert client.context == client.messages[:-1]


# ------------------------------------------------------------------------------
# Any client
# ------------------------------------------------------------------------------


@dataclass
class Chat:
    """A client of the state machine.

    `past` is what it showed before its messages and no longer does. `own` is the
    conversation that its next turn must continue, "" if it may fold. `changed` is all
    that was said before each change: once the place is cut off, nobody sees it.
    """

    client: Client
    past: Messages = field(default_factory=list)
    own: str = ""
    changed: list[Messages] = field(default_factory=list)

    @property
    def shown(self) -> Messages:
        """What it shows."""
        return self.client.messages

    def check(self) -> None:
        """Check what the model saw against what the client shows.

        It must be all of it; but a conversation goes back to where the client's window
        began when it was new.
        """
        whole = [*self.past, *self.shown[:-1]]
        context = self.client.context
        sent = self.shown[:-1][-self.client.window :]
        if context != whole[max(0, len(whole) - len(context)) :]:
            at = len(context) - len(self.shown[:-1])
            assert context[at:] == self.shown[:-1]
            assert self.had_before(context[:at])
        assert len(context) >= len(sent)
        answers = [row for row in sent if row["role"] == "assistant"]
        if self.own and (len(answers) > 1 or len(sent) == len(whole)):
            assert self.client.conversation == self.own

    def had_before(self, past: Messages) -> bool:
        """Tell whether this stood before what is shown, until it was changed there."""
        return any(
            whole[:at][-len(past) :] == past
            for whole in self.changed
            for at in range(len(past), len(whole))
            if whole[at] == self.shown[0]
        )

    def will_change(self) -> None:
        """Note what was said until now."""
        self.changed.append([dict(row) for row in (*self.past, *self.shown)])

    def is_sent(self, at: int) -> bool:
        """Tell whether the next request holds this message: others nobody can see."""
        return len(self.shown) + 1 - self.client.window <= at < len(self.shown)

    def has_turned(self) -> None:
        """Note that a turn has ended well: the next one continues it."""
        answers = [row for row in self.shown if row["role"] == "assistant"]
        is_own = answers[-1]["content"] != GREETING
        self.own = self.client.conversation if is_own else ""


CHATS = st.integers(0, 3)
SAID = st.sampled_from([OPENING, OPENING, "go on", "and"])
STREAM = st.booleans()
BREAKS = ["leaves-while-it-talks", "leaves-in-a-burst", "leaves-before-its-end"]
BREAKS += ["leaves-and-the-stop-fails", "leaves-a-whole-answer", "breaks-off", "fails"]
BREAKS += ["leaves-and-it-is-told-more", "is-stopped", "is-reset", "429", "500"]


class Windows(RuleBasedStateMachine):
    """Random clients of one user before a proxy that is restarted now and then."""

    @initialize(
        app=st.sampled_from(OLD_AND_NEW),
        windows=st.tuples(*[st.sampled_from([1000, 1000, 5, 4])] * 4),
        in_file=st.booleans(),
    )
    def begin(
        self, app: tuple[str, str], windows: tuple[int, ...], in_file: bool
    ) -> None:
        self.loop = VirtualClockLoop()
        self.folder = tempfile.TemporaryDirectory()
        self.dify = FakeDify(version=app[1])
        self.do(self.dify.__aenter__())
        self.site = Site(self.dify, app[0])
        self.in_file = in_file
        store = str(Path(self.folder.name, "table.db")) if in_file else "memory"
        self.settings = settings_of(self.dify, app[0], CONVERSATION_STORE=store)
        self.start()
        self.chats = [Chat(Client(self.site, window=window)) for window in windows]

    def do(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run something to its end."""
        return self.loop.run_until_complete(coroutine)

    def start(self) -> None:
        self.stack = contextlib.AsyncExitStack()
        self.do(self.stack.enter_async_context(self.site.serve(self.settings)))

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        self.do(self.stack.aclose())
        self.do(self.dify.__aexit__())
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()
        self.folder.cleanup()

    # Turns...

    @rule(i=CHATS, texts=st.lists(SAID, min_size=1, max_size=2), stream=STREAM)
    def talk(self, i: int, texts: list[str], stream: bool) -> None:
        for text in texts:
            self.talk_once(i, text, stream)

    def talk_once(self, i: int, text: str, stream: bool = True) -> None:
        chat = self.chats[i]
        self.do(chat.client.say(text, stream=stream))
        chat.check()
        chat.has_turned()

    @rule(i=CHATS, j=CHATS, text=SAID, stream=STREAM)
    def talk_at_once(self, i: int, j: int, text: str, stream: bool) -> None:
        """Two turns that overlap."""

        async def both() -> None:
            says = [self.chats[n].client.say(text, stream=stream) for n in {i, j}]
            await asyncio.gather(*says)

        self.site.delay = 0.01
        self.do(both())
        self.site.delay = 0
        for n in {i, j}:
            self.chats[n].check()
            self.chats[n].has_turned()

    @rule(
        i=CHATS,
        text=SAID,
        name=st.sampled_from(BREAKS),
        shows=st.sampled_from(["what it saw", "the question", "nothing"]),
    )
    def is_interrupted(self, i: int, text: str, name: str, shows: str) -> None:
        chat = self.chats[i]
        chat.shown.append(user(text))
        turn = {**KEPT, **ENDED, **REFUSED}[name]
        seen = self.do(turn(self.site, chat.client))
        self.site.answers()
        if shows == "what it saw" and seen:
            chat.shown.append(assistant(seen))
        elif shows == "nothing":
            chat.shown.pop()
        chat.own = ""
        self.talk_once(i, text)

    @rule(i=CHATS, text=SAID)
    def is_cut_by_a_restart(self, i: int, text: str) -> None:
        chat = self.chats[i]
        chat.shown.append(user(text))
        begin = begin_of(self.site.mode, "Hel", "lo")
        self.site.answers([*begin, Hang()])
        call = self.do(chat.client.begin())
        seen = self.do(read_until(call, "Hello"))
        self.do(self.site.proxy.server.drain(0))
        self.site.answers()
        chat.shown.append(assistant(seen))
        chat.own = ""
        self.restart()
        self.talk_once(i, text)

    @rule()
    def restart(self) -> None:
        self.do(self.stack.aclose())
        self.start()
        for chat in self.chats:
            chat.own = chat.own if self.in_file else ""

    @rule(i=CHATS)
    def delete_in_dify(self, i: int) -> None:
        gone = self.chats[i].client.conversation
        self.dify.conversations.pop(gone, None)
        for chat in self.chats:
            if chat.own == gone:
                chat.own = ""
        self.talk_once(i, "still there?")

    # What clients do between turns...

    @rule(i=CHATS, j=CHATS)
    def branch(self, i: int, j: int) -> None:
        chat, window = self.chats[i], self.chats[j].client.window
        if i != j:
            copied = chat.client.copy()
            copied.window = window
            changed = list(chat.changed)
            self.chats[j] = Chat(copied, list(chat.past), changed=changed)
            chat.own = ""

    @rule(i=CHATS, at=st.integers(0, 9), text=SAID, goes_on=st.booleans())
    def edit(self, i: int, at: int, text: str, goes_on: bool) -> None:
        chat = self.chats[i]
        if chat.is_sent(at):
            chat.will_change()
            chat.shown[at]["content"] = f"{text}, {chat.shown[at]['content']}"
            if not goes_on:
                del chat.shown[at + 1 :]
            chat.own = ""
            self.talk_once(i, text)

    @rule(i=CHATS, stream=STREAM)
    def regenerate(self, i: int, stream: bool) -> None:
        chat = self.chats[i]
        chat.own = ""
        while chat.shown and chat.shown[-1]["role"] == "assistant":
            chat.shown.pop()
        if chat.shown:
            self.do(chat.client.send(stream=stream))
            chat.check()
            chat.has_turned()

    @rule(i=CHATS, at=st.integers(1, 6), size=st.integers(1, 2))
    def delete(self, i: int, at: int, size: int) -> None:
        chat = self.chats[i]
        if chat.is_sent(at - 1) and chat.is_sent(at + size):
            before = list(chat.shown)
            chat.will_change()
            del chat.shown[at : at + size]
            if chat.shown == before[size:]:  # nobody can tell this from a cut
                chat.past += before[:size]
            chat.own = ""
            self.talk_once(i, "and now?")

    @rule(i=CHATS, kept=st.integers(0, 5))
    def cut(self, i: int, kept: int) -> None:
        """It shows the last messages only, as after a summary that is not shown."""
        chat = self.chats[i]
        at = max(0, len(chat.shown) - kept)
        chat.past += chat.shown[:at]
        del chat.shown[:at]
        if at and kept < 4:
            chat.own = ""
        if not chat.shown:
            chat.past = []


@pytest.mark.parametrize("run", range(RUNS))
def test_the_model_sees_what_the_client_shows(run: int) -> None:
    run_state_machine_as_test(
        Windows,
        settings=settings(
            max_examples=40,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
