"""Spoken answers: chats whose `modalities` include audio, from an app with speech."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from typing import Any, Callable

import fake_dify as fake
import pytest
from clock import now
from fake_dify import Close, Hang, Raw, Send, Sleep, Status, Step, chat_answer
from schemas import check_chat_stream
from test_end_to_end import run_client
from test_files import VISION, form_of, post
from test_handlers import (
    HI,
    KEY,
    NOW,
    SOON,
    Got,
    JSONObject,
    Proxy,
    chunks_of,
    delta_of,
    own_tasks,
    proxy,
    serving,
)

import opendify
from opendify import Finish, Sound, Text

SPEAKS: JSONObject = {"text_to_speech": {"enabled": True, "language": "", "voice": ""}}
SOUND = b"ID3\x04fake audio"
ASKED: JSONObject = {
    "modalities": ["text", "audio"],
    "audio": {"voice": "nova", "format": "mp3"},
}
EXPIRES_AT = int(NOW) + 7 * 86400
HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\nTransfer-Encoding: chunked\r\n\r\n"
)
WHOLE_OR_STREAMED = pytest.mark.parametrize(
    "stream", [False, True], ids=["whole", "streamed"]
)


def chunk(data: bytes) -> Raw:
    """Return one chunk of sound."""
    return Raw(b"%x\r\n%b\r\n" % (len(data), data))


def joined(audios: list[JSONObject]) -> JSONObject:
    """Return the audio of a stream, put together as OpenAI's client does it."""
    whole: JSONObject = {}
    for audio in audios:
        for key, value in audio.items():
            whole[key] = whole[key] + value if key in whole else value
    return whole


def audios_of(chunks: list[JSONObject]) -> list[JSONObject]:
    """Return the audio of each chunk that has some."""
    return [delta_of(row)["audio"] for row in chunks if "audio" in delta_of(row)]


def audio_of(got: Got) -> JSONObject:
    """Return the audio of an answer, whole or streamed; its id was looked at."""
    if got.headers["content-type"] == "application/json":
        message = got.message
        assert message["content"] is None
        audio: JSONObject = dict(message["audio"])
    else:
        check_chat_stream(got.chunks)
        assert got.deltas == []
        audio = joined(audios_of(got.chunks))
    assert audio.pop("id").startswith("audio_")
    return audio


def said(text: str, sound: bytes = SOUND) -> JSONObject:
    """Return the audio of an answer, without its id."""
    data = base64.b64encode(sound).decode()
    return {"transcript": text, "data": data, "expires_at": EXPIRES_AT}


def speeches(served: Proxy) -> list[JSONObject]:
    """Return what Dify was asked to say."""
    rows = [row for row in served.dify.requests if row.path == "/text-to-audio"]
    return [dict(row.json) for row in rows]


def finishes(chunks: list[JSONObject]) -> list[str]:
    """Return the finish reasons of a stream."""
    choices = [choice for row in chunks for choice in row.get("choices", ())]
    return [row["finish_reason"] for row in choices if row["finish_reason"]]


# ------------------------------------------------------------------------------
# Requests
# ------------------------------------------------------------------------------

VOICES: dict[str, tuple[JSONObject, str | None]] = {
    "name": ({"audio": {"voice": "nova", "format": "wav"}}, "nova"),
    "object": ({"audio": {"voice": {"id": "v-1"}, "format": "aac"}}, "v-1"),
    "default": ({"audio": {"voice": "default", "format": "flac"}}, ""),
    "none": ({"audio": {"format": "opus"}}, ""),
    "no-format": ({"audio": {}}, ""),
    "audio-only": ({"modalities": ["audio"], "audio": {"voice": "nova"}}, "nova"),
    "text": ({"modalities": ["text"], "audio": {"voice": "nova"}}, None),
    "null": ({"modalities": None}, None),
    "odd": ({"modalities": "audio"}, None),
}


@pytest.mark.parametrize(("fields", "voice"), VOICES.values(), ids=VOICES.keys())
def test_voice_is_the_one_that_is_asked_for(
    fields: JSONObject, voice: str | None
) -> None:
    body = {"model": "m", "messages": HI, **ASKED, **fields}
    assert opendify.parse_chat_request(body).ask.voice == voice


REFUSED: dict[str, tuple[JSONObject, str, str]] = {
    "no-audio": ({"audio": None}, "audio", "missing_required_parameter"),
    "audio-text": ({"audio": "nova"}, "audio", "invalid_type"),
    "pcm": (
        {"audio": {"voice": "nova", "format": "pcm16"}},
        "audio.format",
        "invalid_value",
    ),
    "format": ({"audio": {"format": "ogg"}}, "audio.format", "invalid_value"),
    "format-type": ({"audio": {"format": ["mp3"]}}, "audio.format", "invalid_value"),
    "voice": ({"audio": {"voice": 3}}, "audio.voice", "invalid_type"),
    "n": ({"n": 2}, "n", "invalid_value"),
}


@pytest.mark.parametrize(
    ("fields", "param", "code"), REFUSED.values(), ids=REFUSED.keys()
)
@WHOLE_OR_STREAMED
async def test_speech_that_can_not_be_is_refused(
    stream: bool, fields: JSONObject, param: str, code: str
) -> None:
    async with proxy(parameters=SPEAKS) as served:
        got = await served.chat(stream=stream, **{**ASKED, **fields})
    assert (got.status, got.error["param"], got.error["code"]) == (400, param, code)
    assert served.dify.requests == []


def test_pcm_is_refused_with_what_to_ask_for() -> None:
    body = {"model": "m", "messages": HI, **ASKED, "audio": {"format": "pcm16"}}
    with pytest.raises(opendify.BadRequest, match="ask for mp3 or wav"):
        opendify.parse_chat_request(body)


@WHOLE_OR_STREAMED
async def test_app_that_does_not_speak_is_not_asked(stream: bool) -> None:
    async with proxy() as served:
        got = await served.chat(stream=stream, **ASKED)
    assert (got.status, got.error["param"]) == (400, "modalities")
    assert got.error["message"] == (
        "Text to speech is switched off in the app of 'm'; switch it on among the "
        "app's features in Dify."
    )
    assert (served.turns, speeches(served)) == ([], [])


# ------------------------------------------------------------------------------
# Answers
# ------------------------------------------------------------------------------


@WHOLE_OR_STREAMED
async def test_answer_is_said_aloud(stream: bool) -> None:
    async with proxy(chat_answer("Hel", "lo!"), parameters=SPEAKS) as served:
        got = await served.chat(stream=stream, user="al", **ASKED)
    assert audio_of(got) == said("Hello!")
    assert speeches(served) == [{"text": "Hello!", "voice": "nova", "user": "al"}]


@pytest.mark.parametrize("smoothing", ["on", "off"])
async def test_stream_is_transcript_then_sound_as_it_comes(smoothing: str) -> None:
    script = [Raw(HEAD), chunk(b"abcd"), Sleep(1), chunk(b"ef"), Raw(b"0\r\n\r\n")]
    async with proxy(
        chat_answer("H"), parameters=SPEAKS, overrides={"/text-to-audio": script}
    ) as served:
        headers = {"X-OpenDify-Smoothing": smoothing}
        options = {"include_usage": True}
        got = await served.chat(headers, stream=True, stream_options=options, **ASKED)
    check_chat_stream(got.chunks, include_usage=True)
    assert got.chunks[-1]["usage"]["total_tokens"] == 22
    assert finishes(got.chunks) == ["stop"]
    assert [delta_of(row) for row in got.chunks[:-1]] == [
        {"role": "assistant", "content": None, "refusal": None},
        {"audio": {"id": id_of(got), "transcript": ""}},
        {"audio": {"transcript": "H"}},
        {"audio": {"data": base64.b64encode(b"abc").decode()}},
        {"audio": {"data": base64.b64encode(b"def").decode()}},
        {"audio": {"expires_at": EXPIRES_AT}},
        {},
    ]


async def test_head_of_a_silent_answer_does_not_wait_for_the_audio_s_id() -> None:
    script = [Sleep(30), *chat_answer("Hi")]
    async with proxy(script, parameters=SPEAKS) as served:
        start = now()
        got = await served.chat(stream=True, **ASKED)
        await served.chat(messages=named(id_of(got)))
    assert got.head_at - start == pytest.approx(5, abs=0.05)
    assert audio_of(got) == said("Hi")
    assert conversations(served)[1][1] == "And?"  # the id tells which it is


SHORT_SOUND, LONG_SOUND = bytes(range(20)), bytes(100_000)


@pytest.mark.parametrize(
    ("sound", "size"), [*((SHORT_SOUND, n) for n in range(1, 8)), (LONG_SOUND, 65_536)]
)
def test_base64_is_whole_in_every_piece(sound: bytes, size: int) -> None:
    chat = opendify.ChatRequest(opendify.Ask("m", ()))
    envelope = opendify.Envelope("chatcmpl-1", 1, "m", chat)
    spoken = opendify.Spoken(lambda _: "audio_1", 9)
    stream = opendify.SpokenStream(envelope, spoken)
    cuts = range(0, len(sound), size)
    parts: list[opendify.Part] = [Sound(sound[at : at + size]) for at in cuts]
    parts = [Text("H"), Text("i"), *parts, Finish()]
    data = stream.begin({}) + b"".join(map(stream.encode, parts))
    assert max(map(len, data.split(b"\n"))) < 64 * 1024
    audios = audios_of(chunks_of(data))
    pieces = [row["data"] for row in audios if "data" in row]
    assert b"".join(map(base64.b64decode, pieces)) == sound
    assert base64.b64decode("".join(pieces), validate=True) == sound
    assert all(pieces)
    others = [row for row in audios if "data" not in row]
    texts = [{"transcript": text} for text in "Hi"]
    begun = {"id": "audio_1", "transcript": ""}
    assert others == [begun, *texts, {"expires_at": 9}]


OWN_VOICES = {
    "mapped": ("longxiaochun", "nova", {}),
    "own": ("longxiaochun", "longwan", {"voice": "longwan"}),
    "none": ("", None, {}),
    "openai": ("onyx", "nova", {"voice": "nova"}),
}


@pytest.mark.parametrize(
    ("own", "voice", "expected"), OWN_VOICES.values(), ids=OWN_VOICES.keys()
)
async def test_voice_is_passed_on_as_for_speech(
    own: str, voice: str | None, expected: JSONObject
) -> None:
    parameters = {"text_to_speech": {"enabled": True, "language": "", "voice": own}}
    if own == "longxiaochun" and voice == "nova":
        expected = {"voice": own}
    async with proxy(chat_answer("Hi"), parameters=parameters) as served:
        await served.chat(user="al", **{**ASKED, "audio": {"voice": voice}})
    assert speeches(served) == [{"text": "Hi", "user": "al", **expected}]


@WHOLE_OR_STREAMED
async def test_reasoning_and_citations_stay_as_they_are(stream: bool) -> None:
    source = {"document_name": "a.pdf", "content": "So."}
    script = chat_answer("<think>Hm.</think>", "Yes.", resources=[source])
    async with proxy(script, parameters=SPEAKS) as served:
        got = await served.chat(stream=stream, **ASKED)
    assert audio_of(got) == said("Yes.")
    deltas = [delta_of(row) for row in got.chunks] if stream else [got.message]
    thought = "".join(row.get("reasoning_content", "") for row in deltas)
    assert (thought.strip(), deltas[-1]["citations"]) == ("Hm.", [source])
    assert [row["text"] for row in speeches(served)] == ["Yes."]


CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    ("text", "finish"),
    [(CALL, "tool_calls"), (f"I look.\n{CALL}", "tool_calls"), ("", "stop")],
    ids=["call", "text-beside-call", "empty"],
)
@WHOLE_OR_STREAMED
async def test_what_is_no_text_is_not_said(
    stream: bool, text: str, finish: str
) -> None:
    async with proxy(chat_answer(text), parameters=SPEAKS) as served:
        got = await served.chat(stream=stream, tools=TOOLS, **ASKED)
    if stream:
        check_chat_stream(got.chunks)
        rows = audios_of(got.chunks)
        shown = "".join(row.pop("transcript") for row in rows)
        assert (shown, finishes(got.chunks)) == (text.replace(CALL, ""), [finish])
        assert not any("data" in row for row in rows)
    else:
        assert "audio" not in got.message
        assert got.json["choices"][0]["finish_reason"] == finish
    assert speeches(served) == []


async def test_text_that_the_app_has_withdrawn_is_not_said() -> None:
    """It was shown by then, but moderation has its reasons."""
    replaced = Send({"event": "message_replace", "answer": "No."})
    script = [fake.message("Hello"), Sleep(1), replaced, *chat_answer()]
    async with proxy(script, parameters=SPEAKS) as served:
        streamed = await served.chat(stream=True, **ASKED)
        assert speeches(served) == []
        whole = await served.chat(**ASKED)
    rows = audios_of(streamed.chunks)
    assert "".join(row.pop("transcript") for row in rows) == "Hello"
    assert not any("data" in row for row in rows)
    assert finishes(streamed.chunks) == ["content_filter"]
    assert audio_of(whole) == said("No.")


# ------------------------------------------------------------------------------
# Speech that fails, and clients that leave
# ------------------------------------------------------------------------------

PROBLEM = {"code": "provider_quota_exceeded", "message": "No credit.", "status": 400}
FAILURES: dict[str, tuple[list[Step], int, str]] = {
    "refused": ([Status(400, PROBLEM)], 429, "insufficient_quota"),
    "failed": ([Status(500, "")], 502, "upstream_error"),
    "empty": ([Raw(HEAD + b"0\r\n\r\n")], 502, "upstream_error"),
    "broken": ([Raw(HEAD), chunk(b"ID3"), Close()], 502, "upstream_error"),
}


@pytest.mark.parametrize(
    ("script", "status", "code"), FAILURES.values(), ids=FAILURES.keys()
)
@WHOLE_OR_STREAMED
async def test_speech_that_fails_is_an_error(
    stream: bool, script: list[Step], status: int, code: str
) -> None:
    overrides = {"/text-to-audio": script}
    async with proxy(
        chat_answer("Hello!"), parameters=SPEAKS, overrides=overrides
    ) as served:
        got = await served.chat(stream=stream, **ASKED)
        assert len(served.turns) == 1
    assert got.error["code"] == code
    assert got.error["message"].startswith(
        "The app has answered, but its speech failed: "
    )
    if stream:
        assert got.status == 200
        assert joined(audios_of(got.chunks))["transcript"] == "Hello!"
        assert finishes(got.chunks) == []
    else:
        assert (got.status, got.headers["x-should-retry"]) == (status, "false")


async def test_connection_stays_alive_while_speech_is_made() -> None:
    script = [Raw(HEAD), Sleep(40), chunk(SOUND), Raw(b"0\r\n\r\n")]
    async with proxy(
        chat_answer("Hello!"),
        parameters=SPEAKS,
        overrides={"/text-to-audio": script},
        variables={"STREAM_SMOOTHING": "off"},
    ) as served:
        got = await served.chat(stream=True, **ASKED)
        assert audio_of(got) == said("Hello!")
        beats = got.times_of(b": keep-alive\n\n")
        assert [at - got.head_at for at in beats] == [SOON(15, abs=1), SOON(30, abs=1)]


@pytest.mark.parametrize(
    "script", [[Raw(HEAD), chunk(SOUND), Hang()], [Sleep(100), Status(500)]]
)
@WHOLE_OR_STREAMED
async def test_speech_ends_when_the_client_leaves(
    stream: bool, script: list[Step]
) -> None:
    overrides = {"/text-to-audio": script}
    async with proxy(
        chat_answer("Hello!"), parameters=SPEAKS, overrides=overrides
    ) as served:
        call = await served.begin(stream=stream, **ASKED)
        await served.dify.until(lambda: speeches(served) and served.dify.running)
        await asyncio.sleep(1)
        assert served.dify.running
        await call.leave()
        await asyncio.sleep(1)
        assert not served.dify.running
        assert own_tasks() == []


async def test_whole_answer_is_bounded_and_a_streamed_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(opendify, "MAX_SOUND_BYTES", 1 << 20)
    sound = bytes((1 << 20) + 1)
    async with proxy(chat_answer("Hi"), parameters=SPEAKS, audio=sound) as served:
        whole = await served.chat(**ASKED)
        streamed = await served.chat(stream=True, **ASKED)
    assert (whole.status, whole.error["message"]) == (
        502,
        "The app has answered, but its speech failed: It is over 16 MB; a streamed "
        "answer may be longer.",
    )
    pieces = [row.get("data", "") for row in audios_of(streamed.chunks)]
    assert sum(len(base64.b64decode(row)) for row in pieces) == len(sound)
    assert finishes(streamed.chunks) == ["stop"]


@WHOLE_OR_STREAMED
async def test_text_that_is_too_long_to_be_kept(stream: bool) -> None:
    """A stream's text is not kept beyond a limit, so it can't be said."""
    text = "x" * (opendify.MAX_KEPT_CHARS + 1)
    async with proxy(chat_answer(text), parameters=SPEAKS) as served:
        got = await served.chat(stream=stream, **ASKED)
    if stream:
        assert "The text is too long." in got.error["message"]
        assert (finishes(got.chunks), speeches(served)) == ([], [])
    else:
        assert audio_of(got) == said(text)


# ------------------------------------------------------------------------------
# Histories
# ------------------------------------------------------------------------------

MORE = {"role": "user", "content": "And?"}


def id_of(got: Got) -> str:
    """Return the id of an answer's audio."""
    is_whole = got.headers["content-type"] == "application/json"
    audio = got.message["audio"] if is_whole else joined(audios_of(got.chunks))
    return str(audio["id"])


def named(id_: str, **fields: Any) -> list[JSONObject]:
    """Return a history whose answer is only named."""
    answer = {"role": "assistant", "audio": {"id": id_}, **fields}
    return [*HI, answer, MORE]


def conversations(served: Proxy) -> list[tuple[str, str]]:
    """Return the conversation and the query of each turn."""
    return [
        (row.json.get("conversation_id", ""), row.json["query"]) for row in served.turns
    ]


@pytest.mark.parametrize("more", [{}, ASKED], ids=["written", "spoken"])
@WHOLE_OR_STREAMED
async def test_conversation_goes_on_by_the_audio_s_id(
    stream: bool, more: JSONObject
) -> None:
    async with proxy(parameters=SPEAKS, memory=True) as served:
        first = await served.chat(stream=stream, **ASKED)
        got = await served.chat(messages=named(id_of(first)), stream=stream, **more)
        again = await served.chat(messages=named(id_of(first)), **ASKED)
    assert (got.status, again.status) == (200, 200)
    (start, _), second, (third, folded) = conversations(served)
    here = first.headers["x-dify-conversation-id"]
    assert (start, second, third) == ("", (here, "And?"), "")
    answer = joined(audios_of(first.chunks)) if stream else first.message["audio"]
    assert answer["transcript"] in folded


async def test_conversation_goes_on_by_the_transcript() -> None:
    async with proxy(parameters=SPEAKS, memory=True) as served:
        first = await served.chat(**ASKED)
        text = first.message["audio"]["transcript"]
        rows = named("audio_whatever", content=text)
        got = await served.chat(messages=rows, **ASKED)
    assert got.status == 200
    here = first.headers["x-dify-conversation-id"]
    assert conversations(served)[1] == (here, "And?")


@contextlib.asynccontextmanager
async def restarted(before: Proxy) -> AsyncIterator[Proxy]:
    """Give another proxy before the same Dify: it knows no conversation."""
    models = json.dumps({"m": {"key": KEY, "mode": "chat"}})
    settings = opendify.parse_settings(
        {"MODEL_CONFIG": models, "DIFY_API_BASE": before.dify.base}
    )
    async with serving(settings, before.dify) as made:
        yield made


async def test_history_is_folded_after_a_restart() -> None:
    """The id alone says where in Dify the answer is."""
    async with proxy(chat_answer("A spoken answer."), parameters=SPEAKS) as served:
        id_ = id_of(await served.chat(**ASKED))
        async with restarted(served) as anew:
            got = await anew.chat(messages=named(id_))
    assert got.message["content"] == "A spoken answer."
    _, (conversation, query) = conversations(served)
    assert conversation == ""
    assert "A spoken answer." in query


async def test_history_of_several_spoken_answers_is_read_once() -> None:
    async with proxy(parameters=SPEAKS, memory=True) as served:
        rows: list[JSONObject] = []
        for text in ("Hi", "And?", "So?"):
            rows.append({"role": "user", "content": text})
            got = await served.chat(messages=rows, **ASKED)
            rows.append({"role": "assistant", "audio": {"id": id_of(got)}})
        reads = [row for row in served.dify.requests if row.path == "/messages"]
    here = got.headers["x-dify-conversation-id"]
    assert conversations(served) == [("", "Hi"), (here, "And?"), (here, "So?")]
    assert len(reads) == 2


UNKNOWN = {
    "none": lambda id_: "audio_none",
    "changed": lambda id_: id_[:-2] + "AA",
    "other-kind": lambda id_: "resp_" + id_[len("audio_") :],
    "empty-kind": lambda id_: id_[len("audio_") :],
}


@pytest.mark.parametrize("change", UNKNOWN.values(), ids=UNKNOWN.keys())
async def test_id_that_is_not_ours_is_refused(change: Callable[[str], str]) -> None:
    async with proxy(parameters=SPEAKS, memory=True) as served:
        id_ = change(id_of(await served.chat(**ASKED)))
        got = await served.chat(messages=named(id_))
    assert (got.status, got.error["param"]) == (400, "messages")
    shown = id_ if len(id_) <= 100 else id_[:100] + "…"
    assert got.error["message"] == (
        f"Invalid value for 'messages': no answer of this app to this user has the "
        f"audio id {shown!r}; send its transcript as `content`."
    )
    assert len(served.turns) == 1


async def test_id_of_an_answer_that_is_text_is_refused() -> None:
    async with proxy(parameters=SPEAKS, memory=True) as served:
        body = json.dumps({"model": "m", "input": "Hi"}).encode()
        made = await post(served, "/v1/responses", body, "application/json")
        got = await served.chat(messages=named(made.json["id"]))
    assert (made.status, got.status, got.error["param"]) == (200, 400, "messages")


async def test_so_many_ids_are_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes up to a millisecond, in which all streams stand still."""
    opened: list[str] = []

    def noted(sealer: opendify.IdSealer, id_: str, prefix: str) -> None:
        opened.append(id_)

    monkeypatch.setattr(opendify.IdSealer, "open", noted)
    rows = [row for number in range(501) for row in named(f"audio_{number}")]
    async with proxy(parameters=SPEAKS) as served:
        got = await served.chat(messages=rows)
    assert (got.status, got.error["param"]) == (400, "messages")
    assert opened == [f"audio_{number}" for number in range(500)]


async def test_answer_of_another_user_is_not_known() -> None:
    async with proxy(parameters=SPEAKS, memory=True) as served:
        id_ = id_of(await served.chat(user="al", **ASKED))
        got = await served.chat(messages=named(id_), user="bo")
        own = await served.chat(messages=named(id_), user="al")
    assert (got.status, own.status) == (400, 200)


async def test_answer_to_another_key_is_not_known() -> None:
    """Though both clients name the same user."""
    keys = {"VALID_API_KEYS": "sk-1,sk-2"}
    one, two = ({"Authorization": f"Bearer sk-{n}"} for n in "12")
    async with proxy(parameters=SPEAKS, memory=True, variables=keys) as served:
        id_ = id_of(await served.chat(one, user="al", **ASKED))
        got = await served.chat(two, messages=named(id_), user="al")
        own = await served.chat(one, messages=named(id_), user="al")
    assert (got.status, own.status) == (400, 200)


async def test_answer_about_a_stored_file_is_its_owner_s() -> None:
    """Who names no user speaks as the one who uploaded the file."""
    form = form_of(b"%PDF", "a.pdf", "application/pdf", model="m", user="al")
    async with proxy(parameters={**SPEAKS, **VISION}, memory=True) as served:
        file_id = (await post(served, "/v1/files", form)).json["id"]
        part = {"type": "file", "file": {"file_id": file_id}}
        question = {"role": "user", "content": [part]}
        first = await served.chat(messages=[question], **ASKED)
        rows = [question, *named(id_of(first))[1:]]
        got = await served.chat(messages=rows, **ASKED)
    assert got.status == 200
    assert [row.user for row in served.turns] == ["al", "al"]
    assert {row["user"] for row in speeches(served)} == {"al"}
    assert conversations(served)[1][0] == first.headers["x-dify-conversation-id"]


async def test_choices_share_the_answer_that_is_named() -> None:
    """None of them continues its conversation: each is told the answer."""
    async with proxy(chat_answer("A spoken answer."), parameters=SPEAKS) as served:
        id_ = id_of(await served.chat(**ASKED))
        got = await served.chat(messages=named(id_), n=2)
    assert len(got.json["choices"]) == 2
    _, *turns = conversations(served)
    assert [row[0] for row in turns] == ["", ""]
    assert all("A spoken answer." in row[1] for row in turns)


async def test_answer_that_dify_has_lost_is_not_known() -> None:
    async with proxy(parameters=SPEAKS, memory=True) as served:
        id_ = id_of(await served.chat(**ASKED))
        served.dify.conversations.clear()
        got = await served.chat(messages=named(id_))
    assert (got.status, got.error["param"]) == (400, "messages")


async def test_answer_without_a_conversation_has_an_id_that_leads_nowhere() -> None:
    script = fake.completion_answer("Hello!")
    async with proxy(script, mode="completion", parameters=SPEAKS) as served:
        first = await served.chat(**ASKED)
        got = await served.chat(messages=named(id_of(first)))
    assert audio_of(first) == said("Hello!")
    assert (got.status, got.error["param"]) == (400, "messages")


# ------------------------------------------------------------------------------
# OpenAI's own client
# ------------------------------------------------------------------------------

SCRIPT = """
import base64, json, sys
import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key="sk-any", max_retries=0)
asked = {
    "model": "m",
    "modalities": ["text", "audio"],
    "audio": {"voice": "nova", "format": "mp3"},
}
messages = [{"role": "user", "content": "Hi"}]
create = client.chat.completions.create
answer = create(messages=messages, **asked).choices[0].message
audio = answer.audio
got = {"content": answer.content, "transcript": audio.transcript}
got["data"] = base64.b64decode(audio.data).decode("latin-1")
got["expires"] = audio.expires_at > 0

messages.append({"role": "assistant", "audio": {"id": audio.id}})
messages.append({"role": "user", "content": "And?"})
whole, pieces = {}, []
for chunk in create(messages=messages, stream=True, **asked):
    piece = chunk.choices[0].delta.to_dict().get("audio", {})
    pieces.append(base64.b64decode(piece.get("data", "")))
    for key, value in piece.items():
        whole[key] = whole[key] + value if key in whole else value
    got["finish"] = chunk.choices[0].finish_reason
got["second"] = whole["transcript"]
assert base64.b64decode(whole["data"], validate=True) == b"".join(pieces)
got["streamed"] = b"".join(pieces).decode("latin-1")

messages.append({"role": "assistant", "audio": {"id": whole["id"]}})
messages.append({"role": "user", "content": "So?"})
with client.chat.completions.stream(messages=messages, **asked) as events:
    for event in events:
        pass
    last = events.get_final_completion().choices[0].message
got["third"] = last.audio.transcript
got["helper"] = base64.b64decode(last.audio.data).decode("latin-1")
try:
    create(messages=messages, **{**asked, "audio": {"voice": "a", "format": "pcm16"}})
except openai.BadRequestError as error:
    got["refused"] = error.param
print(json.dumps(got))
"""


@pytest.mark.real_clock
@pytest.mark.parametrize("release", ["1.109.1", "newest"])
async def test_openai_client(release: str, openai_python: Callable[[str], str]) -> None:
    python = sys.executable if release == "newest" else openai_python(release)
    answers = iter(["One.", "Two.", "Three."])
    async with proxy(lambda _: chat_answer(next(answers)), parameters=SPEAKS) as served:
        got = await run_client(python, SCRIPT, f"http://127.0.0.1:{served.port}/v1")
    sound = SOUND.decode("latin-1")
    assert got == {
        "content": None,
        "transcript": "One.",
        "data": sound,
        "expires": True,
        "finish": "stop",
        "second": "Two.",
        "streamed": sound,
        "third": "Three.",
        "helper": sound,
        "refused": "audio.format",
    }
    ids = [row[0] for row in conversations(served)]
    assert (ids[0], len(set(ids[1:]))) == ("", 1)
