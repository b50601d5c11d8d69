"""Audio and files: forms of every client, through the proxy, to the fake Dify.

`FORM_BODIES` in the environment is how many forms are made at random (1,000).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import random
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import pytest
from clock import now
from fake_dify import Close, Hang, Raw, Status, Step, Wait, chat_answer
from schemas import validate
from test_end_to_end import run_client
from test_handlers import (
    KEY,
    NOW,
    Call,
    Got,
    JSONObject,
    Proxy,
    demo,
    own_tasks,
    proxy,
    with_parts,
)

import opendify
from opendify import BadRequest, FormPart, FormReader, user_name

FORM_BODIES = int(os.environ.get("FORM_BODIES", "1000"))
Parts = list[tuple[FormPart, bytes]]
CRLF = b"\r\n"


# ------------------------------------------------------------------------------
# The reader of forms
# ------------------------------------------------------------------------------


def reader_of(content_type: str, pieces: Iterable[bytes]) -> FormReader:
    """Return the reader of a form that comes in pieces."""
    coming = filter(None, pieces)

    async def read() -> bytes:
        return next(coming, b"")

    return FormReader(content_type, read)


async def read_parts(reader: FormReader) -> Parts:
    parts = Parts()
    while head := await reader.next_part():
        data = b""
        while piece := await reader.read():
            data += piece
        parts.append((head, data))
    return parts


def at_once(reading: Coroutine[Any, Any, Parts]) -> Parts:
    """Return what is read; nothing has to be waited for."""
    try:
        reading.send(None)
    except StopIteration as result:
        return cast("Parts", result.value)
    raise AssertionError("it waits")


def decode(content_type: str, pieces: Iterable[bytes]) -> Parts:
    """Return the parts of a form that comes in pieces."""
    return at_once(read_parts(reader_of(content_type, pieces)))


def outcome(content_type: str, pieces: Iterable[bytes]) -> Parts | str:
    """Return the parts, or the message of the refusal."""
    try:
        return decode(content_type, pieces)
    except BadRequest as error:
        assert (error.status, error.type) == (400, "invalid_request_error")
        return error.message


def bytewise(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


def type_of(boundary: str) -> str:
    return f"multipart/form-data; boundary={boundary}"


def part(head: str, data: bytes = b"", boundary: str = "b") -> bytes:
    """Return a part as it is written, its boundary before it."""
    text = f"--{boundary}\r\nContent-Disposition: form-data; {head}\r\n\r\n"
    return text.encode() + data + CRLF


END = b"--b--\r\n"
FILE = 'name="file"; filename="a.bin"'
PNG = FormPart("file", "a.png", "image/png")
SAMPLES: dict[str, tuple[str, bytes, Parts]] = {
    "openai-python": (
        type_of("d41d8cd98f00b204"),
        part('name="model"', b"m", "d41d8cd98f00b204")
        + part(
            'name="file"; filename="a.png"\r\nContent-Type: image/png',
            b"\x89PNG\r\n\x1a\n",
            "d41d8cd98f00b204",
        )
        + b"--d41d8cd98f00b204--\r\n",
        [(FormPart("model"), b"m"), (PNG, b"\x89PNG\r\n\x1a\n")],
    ),
    "curl": (
        type_of("------------------------8d2f0a1b"),
        part(
            'name="file"; filename="a \\"b\\".mp3"\r\nContent-Type: audio/mpeg',
            b"ID3",
            "------------------------8d2f0a1b",
        )
        + part('name="model"', b"m", "------------------------8d2f0a1b")
        + b"--------------------------8d2f0a1b--\r\n",
        [
            (FormPart("file", 'a "b".mp3', "audio/mpeg"), b"ID3"),
            (FormPart("model"), b"m"),
        ],
    ),
    "browser": (
        type_of("----WebKitFormBoundary7MA4YWxk"),
        part(
            'name="file"; filename="图 %22q%22.png"\r\nContent-Type: image/png',
            b"x",
            "----WebKitFormBoundary7MA4YWxk",
        )
        + b"------WebKitFormBoundary7MA4YWxk--\r\n",
        [(FormPart("file", '图 "q".png', "image/png"), b"x")],
    ),
    "rfc-5987": (
        type_of("b"),
        part('name="file"; filename="a.txt"; filename*=UTF-8\'\'%e2%82%ac%20.txt')
        + part("name=\"file\"; filename*=utf-8'en'%C2%A3.txt", b"y")
        + part("name=\"file\"; filename*=iso-8859-1'en'%A3.txt", b"z")
        + END,
        [
            (FormPart("file", "€ .txt"), b""),
            (FormPart("file", "£.txt"), b"y"),
            (FormPart("file", "£.txt"), b"z"),
        ],
    ),
    "quoted-boundary": (
        'Multipart/Form-Data; charset=utf-8; Boundary="a b?=:(1)"; x=y',
        part('name="a"', b"1", "a b?=:(1)") + b"--a b?=:(1)--",
        [(FormPart("a"), b"1")],
    ),
    "nearly-boundaries": (
        type_of("bb"),
        part('name="a"', b"\r\n--b\r\n\r--bb\n--bb\r\n-\r\n-bb--\r\r\n", "bb")
        + b"--bb--",
        [(FormPart("a"), b"\r\n--b\r\n\r--bb\n--bb\r\n-\r\n-bb--\r\r\n")],
    ),
    "preamble-epilogue": (
        type_of("b"),
        b"This is ignored.\r\n--c\r\n"
        + part('name="a"', b"1")
        + b"--b--  and so\r\n--b\r\nis this",
        [(FormPart("a"), b"1")],
    ),
    "empty": (type_of("b"), b"--b--", []),
    "no-data-no-blank-line": (
        type_of("b"),
        b"--b\r\ncontent-disposition: form-data; name=a\r\n\r\n--b\r\nX-More: 1\r\n"
        b"CONTENT-DISPOSITION: FORM-DATA; NAME=b; \r\nContent-Type: a/b;c=d\r\n\r\n"
        b"\r\n--b--",
        [(FormPart("a"), b""), (FormPart("b", None, "a/b;c=d"), b"")],
    ),
    "odd-names": (
        type_of("b"),
        part('name="a;b=c"; filename="C:\\dir\\x.txt"')
        + part('name=""; filename=""', b"1")
        + part("name*=utf-8''%C3%BC; filename=x", b"2")
        + END,
        [
            (FormPart("a;b=c", "C:\\dir\\x.txt"), b""),
            (FormPart("", ""), b"1"),
            (FormPart("ü", "x"), b"2"),
        ],
    ),
}


@pytest.mark.parametrize(
    ("content_type", "body", "parts"), SAMPLES.values(), ids=SAMPLES.keys()
)
def test_form_is_the_same_however_it_is_cut(
    content_type: str, body: bytes, parts: Parts
) -> None:
    assert decode(content_type, [body]) == parts
    assert decode(content_type, bytewise(body)) == parts
    for at in range(len(body) + 1):
        assert decode(content_type, [body[:at], body[at:]]) == parts


@pytest.mark.parametrize(
    ("content_type", "body", "parts"), SAMPLES.values(), ids=SAMPLES.keys()
)
def test_form_that_breaks_off_is_refused(
    content_type: str, body: bytes, parts: Parts
) -> None:
    length = 2 + body.rindex(b"--" if b"and so" not in body else b"--  and so")
    for at in range(length):
        with pytest.raises(BadRequest, match="breaks off"):
            decode(content_type, [body[:at]])


def head_of(line: str) -> bytes:
    return b"--b\r\n" + line.encode() + b"\r\n\r\n\r\n" + END


MALFORMED: dict[str, tuple[str, bytes, str]] = {
    "no-boundary": ("multipart/form-data", END, "boundary"),
    "empty-boundary": ('multipart/form-data; boundary=""', END, "boundary"),
    "boundary-goes-on": (type_of("b"), b"--bx--", "boundary"),
    "boundary-then-text": (type_of("b"), part('name="a"') + b"--bx\r\n", "boundary"),
    "bare-lf": (type_of("b"), b"--b\nContent-Disposition: form-data\n\n", "CR LF"),
    "bare-lf-long": (type_of("b"), b"--b\nA: 1\n\n" + b"x" * 9000 + END, "CR LF"),
    "bare-lf-in-head": (type_of("b"), head_of("A: 1\nB: 2"), "head of a part"),
    "nul-in-head": (type_of("b"), head_of("A: \0"), "head of a part"),
    "no-field": (type_of("b"), head_of("form-data"), "head of a part"),
    "folded": (type_of("b"), head_of("Content-Disposition: f\r\n d"), "head of a part"),
    "no-disposition": (type_of("b"), head_of("A: 1"), "no name"),
    "no-head": (type_of("b"), b"--b\r\n\r\nx\r\n--b--", "no name"),
    "open-quote": (
        type_of("b"),
        head_of('Content-Disposition: form-data; name="a'),
        "no name",
    ),
    "base64": (
        type_of("b"),
        part('name="a"\r\nContent-Transfer-Encoding: BASE64') + END,
        "base64",
    ),
    "long-head": (type_of("b"), head_of("A: " + "x" * 9000), "too long"),
    "padding": (type_of("b"), b"--b \r\n" + END, "boundary"),
    "many-parts": (type_of("b"), part('name="a"') * 257 + END, "256 parts"),
}


@pytest.mark.parametrize(
    ("content_type", "body", "reason"), MALFORMED.values(), ids=MALFORMED.keys()
)
def test_malformed_form_is_refused(content_type: str, body: bytes, reason: str) -> None:
    whole = outcome(content_type, [body])
    assert reason in whole
    assert outcome(content_type, bytewise(body)) == whole


class FormMaker:
    """Makes forms at random, of what forms are made of."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        letters = "abc-'()+_,./:=?019"
        size = self.random.choice((1, 2, 5, 40, 70))
        self.boundary = "".join(self.random.choices(letters, k=size))
        self.mark = b"--" + self.boundary.encode()

    def data(self) -> bytes:
        """Return data that is full of what is nearly a boundary."""
        near = (b"\r", b"\n", CRLF, b"-", b"--", self.mark[:-1], b"\r\n\r\n", b"x")
        pieces = self.random.choices((*near, CRLF + self.mark[:-1]), k=8)
        data = b"".join(pieces)[: self.random.choice((0, 3, 200))]
        return data if CRLF + self.mark not in CRLF + data + CRLF[:1] else b""

    def make(self) -> tuple[str, bytes, Parts]:
        """Return the content type, a body, and its parts."""
        parts, body = Parts(), b""
        for number in range(self.random.randrange(4)):
            filename = self.random.choice((None, "", "a.png", "图.png"))
            head, data = FormPart(f"n{number}", filename), self.data()
            text = f'name="{head.name}"'
            text += "" if filename is None else f'; filename="{filename}"'
            body += part(text, data, self.boundary)
            parts.append((head, data))
        content_type = f'multipart/form-data; boundary="{self.boundary}"'
        return content_type, body + self.mark + b"--" + CRLF, parts

    def cut(self, body: bytes) -> list[bytes]:
        """Return the body in pieces."""
        cuts = sorted(self.random.choices(range(len(body) + 1), k=6))
        return [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)])]

    def spoil(self, body: bytes) -> bytes:
        """Return the body with some bytes lost, changed or put in."""
        for _ in range(self.random.randrange(1, 4)):
            at = self.random.randrange(len(body) + 1)
            more = self.random.choice((b"", b"\r", b"\n", b'"', b"\0", b"-", CRLF))
            body = body[:at] + more + body[at + self.random.randrange(3) :]
        return body


def test_forms_made_at_random_are_read_or_refused() -> None:
    """A good one gives what it was made of; a spoilt one the same however it is cut."""
    refused = 0
    for seed in range(FORM_BODIES):
        maker = FormMaker(seed)
        content_type, body, parts = maker.make()
        assert decode(content_type, maker.cut(body)) == parts, seed
        spoilt = maker.spoil(body)
        whole = outcome(content_type, [spoilt])
        assert outcome(content_type, maker.cut(spoilt)) == whole, seed
        refused += isinstance(whole, str)
    assert FORM_BODIES / 10 < refused < FORM_BODIES


async def test_reader_keeps_no_more_than_the_beginning_of_a_boundary() -> None:
    head, came, given = [part(FILE)[:-2]], 0, 0

    async def read() -> bytes:
        nonlocal came
        if head:
            return head.pop()
        assert came - given <= len(b"\r\n--")
        came += 65536
        return b"x" * 65532 + b"\r\n--"

    reader = FormReader(type_of("b"), read)
    assert await reader.next_part()
    while given < 6_000_000:
        given += len(await reader.read())


# ------------------------------------------------------------------------------
# Through the proxy
# ------------------------------------------------------------------------------

AUDIO: JSONObject = {
    "speech_to_text": {"enabled": True},
    "text_to_speech": {"enabled": True, "language": "", "voice": ""},
}
MP3 = b"ID3\x04\0" * 401
FILE_FIRST = "file, fields"  # as in OpenAI's examples for curl
WAV = (
    b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0"
    + (32000).to_bytes(4, "little")
    + (64000).to_bytes(4, "little")
    + b"\x02\0\x10\0data\0\0\0\0"
    + b"\0" * 96000  # more than is read at once
)


def form_of(
    data: bytes,
    filename: str = "a.mp3",
    media_type: str = "audio/mpeg",
    *,
    order: str = "fields, file",
    **fields: str,
) -> bytes:
    """Return a form as OpenAI's client writes it, or as curl: with the file first."""
    texts = b"".join(part(f'name="{name}"', v.encode()) for name, v in fields.items())
    head = f'name="file"; filename="{filename}"\r\nContent-Type: {media_type}'
    file = part(head, data)
    return (texts + file if order == "fields, file" else file + texts) + END


async def post(
    served: Proxy,
    path: str,
    body: bytes,
    content_type: str = "multipart/form-data; boundary=b",
    *,
    is_chunked: bool = False,
    headers: dict[str, str] | None = None,
) -> Got:
    """Return the response to a body of bytes; with no type if that is ""."""
    fields = {"Host": "localhost", "Content-Type": content_type, **(headers or {})}
    fields["Content-Length"] = str(len(body))
    if is_chunked:
        del fields["Content-Length"]
        fields["Transfer-Encoding"] = "chunked"
        pieces = [body[at : at + 700] for at in range(0, len(body), 700)]
        body = b"".join(b"%x\r\n%b\r\n" % (len(row), row) for row in [*pieces, b""])
    lines = [f"{name}: {value}" for name, value in fields.items() if value]
    head = "\r\n".join([f"POST {path} HTTP/1.1", *lines, "", ""])
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(head.encode() + body)
    call = Call(reader, writer)
    served.asked.append(call)
    return await call.read_rest()


def two_apps() -> dict[str, str]:
    """Return the settings of two models; the second one is of the fake's app."""
    models = {"first": {"key": "app-other", "mode": "chat"}, "m": {"key": KEY}}
    return {"MODEL_CONFIG": json.dumps(models)}


def sent(served: Proxy) -> list[tuple[str, str, str, bytes, str]]:
    """Return the files that Dify was sent: path, name, type, data and user."""
    rows = []
    for request in served.dify.requests:
        for row in request.parts:
            if row.filename is not None:
                kind = row.mime_type or ""
                about = (request.path, row.filename, kind, row.data, request.user)
                rows.append(about)
    return rows


# ------------------------------------------------------------------------------
# Transcriptions
# ------------------------------------------------------------------------------

TRANSCRIPTS = "/v1/audio/transcriptions"
FILES = "/v1/files"
SAID = "Hello, wörld"
DELTA = '{"type":"transcript.text.delta","delta":"Hello, wörld"}'
DONE = '{"type":"transcript.text.done","text":"Hello, wörld"}'
FORMATS: dict[str, tuple[dict[str, str], str, str]] = {
    "default": ({}, "application/json", '{"text":"Hello, wörld"}'),
    "json": ({"response_format": "json"}, "application/json", f'{{"text":"{SAID}"}}'),
    "text": ({"response_format": "text"}, "text/plain; charset=utf-8", f"{SAID}\n"),
    "srt": (
        {"response_format": "srt"},
        "text/plain; charset=utf-8",
        f"1\n00:00:00,000 --> 00:00:01,000\n{SAID}\n\n",
    ),
    "vtt": (
        {"response_format": "vtt"},
        "text/vtt; charset=utf-8",
        f"WEBVTT\n\n00:00:00.000 --> 00:00:01.000\n{SAID}\n\n",
    ),
    "stream": (
        {"stream": "true", "response_format": "text"},
        "text/event-stream; charset=utf-8",
        f"data: {DELTA}\n\ndata: {DONE}\n\n",
    ),
}


@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize(
    ("fields", "media_type", "body"), FORMATS.values(), ids=FORMATS.keys()
)
async def test_transcript_comes_in_every_format(
    fields: dict[str, str], media_type: str, body: str, is_chunked: bool
) -> None:
    async with proxy(parameters=AUDIO, transcript=SAID) as served:
        form = form_of(MP3, model="m", user="al", **fields)
        got = await post(served, TRANSCRIPTS, form, is_chunked=is_chunked)
        assert sent(served) == [("/audio-to-text", "a.mp3", "audio/mp3", MP3, "al")]
    assert (got.status, got.headers["content-type"]) == (200, media_type)
    assert got.body.decode() == body


@pytest.mark.parametrize("route", ["transcriptions", "translations"])
async def test_verbose_transcript_knows_how_long_a_wav_plays(route: str) -> None:
    async with proxy(parameters=AUDIO, transcript=SAID) as served:
        fields = {"response_format": "verbose_json", "language": "sv"}
        form = form_of(WAV, "a.wav", "audio/x-wav", model="m", **fields)
        got = await post(served, f"/v1/audio/{route}", form)
        fields["response_format"] = "srt"
        form = form_of(WAV, "a.wav", "audio/x-wav", model="m", **fields)
        srt = await post(served, f"/v1/audio/{route}", form)
    segment = got.json.pop("segments")[0]
    validate("CreateTranscriptionResponseVerboseJson", got.json)
    validate("TranscriptionSegment", segment)
    assert (segment["start"], segment["end"], segment["text"]) == (0, 1.5, SAID)
    value = {key: got.json[key] for key in got.json if key != "segments"}
    assert value == {
        "task": "transcribe" if route == "transcriptions" else "translate",
        "language": "sv",
        "duration": 1.5,
        "text": SAID,
        "usage": {"type": "duration", "seconds": 1.5},
    }
    assert srt.body.decode() == f"1\n00:00:00,000 --> 00:00:01,500\n{SAID}\n\n"


@pytest.mark.parametrize(
    ("filename", "media_type", "label"),
    [
        ("a.mp3", "audio/mpeg", "audio/mp3"),
        ("a.wav", "audio/x-wav", "audio/wav"),
        ("a.wav", "audio/wave", "audio/wav"),
        ("a.m4a", "audio/mp4", "audio/m4a"),
        ("a.m4a", "audio/x-m4a", "audio/m4a"),
        ("a.mp4", "video/mp4", "audio/m4a"),
        ("a.amr", "audio/amr", "audio/amr"),
        ("a.webm", "audio/webm;codecs=opus", "audio/mp3"),
        ("a.ogg", "audio/ogg", "audio/mp3"),
        ("a.FLAC", "application/octet-stream", "audio/mp3"),
        ("a.wav", "", "audio/wav"),
    ],
)
async def test_recording_is_called_what_dify_takes(
    filename: str, media_type: str, label: str
) -> None:
    async with proxy(parameters=AUDIO) as served:
        form = form_of(MP3, filename, media_type, model="m")
        got = await post(served, TRANSCRIPTS, form)
        assert [row[1:4] for row in sent(served)] == [(filename, label, MP3)]
    assert got.json == {"text": f"transcribed {len(MP3)} bytes"}


async def test_recording_may_have_no_name_and_no_type() -> None:
    """As OpenAI's clients send bytes in memory; Dify wants some type of sound."""
    async with proxy(parameters=AUDIO) as served:
        form = form_of(MP3, "upload", "application/octet-stream", model="m")
        got = await post(served, TRANSCRIPTS, form)
        assert [row[2] for row in sent(served)] == ["audio/mp3"]
    assert got.json == {"text": f"transcribed {len(MP3)} bytes"}


async def test_recording_of_silence_has_an_empty_transcript() -> None:
    overrides = {"/audio-to-text": [Status(200, {"text": None})]}
    async with proxy(parameters=AUDIO, overrides=overrides) as served:
        got = await post(served, TRANSCRIPTS, form_of(MP3, model="m"))
    assert (got.status, got.json) == (200, {"text": ""})


@pytest.mark.parametrize("kind", ["json", "text", "srt", "vtt", "verbose_json"])
async def test_transcript_may_have_half_a_surrogate_pair(kind: str) -> None:
    overrides = {"/audio-to-text": [Status(200, {"text": "a\ud83d"})]}
    async with proxy(parameters=AUDIO, overrides=overrides) as served:
        form = form_of(MP3, model="m", response_format=kind)
        got = await post(served, TRANSCRIPTS, form)
    assert (got.status, "a\ufffd" in got.body.decode()) == (200, True)


async def test_recording_is_not_sent_for_a_transcript_that_can_not_be() -> None:
    async with proxy(parameters=AUDIO) as served:
        got = await post(served, TRANSCRIPTS, form_of(MP3, response_format="xml"))
        assert (got.status, sent(served)) == (400, [])


@pytest.mark.parametrize("content_type", ["application/json", ""])
async def test_transcription_as_json(content_type: str) -> None:
    """Open WebUI's "json" mode; some clients leave out the type of JSON."""
    audio = {"data": base64.b64encode(MP3).decode(), "format": "mp3"}
    body = {"input_audio": audio, "response_format": "text", "seed": None}
    models = {"MODEL_CONFIG": json.dumps({"m": KEY, "other": "app-other"})}
    async with proxy(parameters=AUDIO, transcript=SAID, variables=models) as served:
        data = json.dumps(body).encode()
        got = await post(served, TRANSCRIPTS, data, content_type, is_chunked=True)
        assert [row[:4] for row in sent(served)] == [
            ("/audio-to-text", "audio.mp3", "audio/mp3", MP3)
        ]
    assert got.body.decode() == f"{SAID}\n"


async def test_recording_in_json_is_known_to_play_as_long_as_in_a_form() -> None:
    audio = {"data": base64.b64encode(WAV).decode(), "format": "wav"}
    body = {"model": "m", "input_audio": audio, "response_format": "verbose_json"}
    async with proxy(parameters=AUDIO, transcript=SAID) as served:
        data = json.dumps(body).encode()
        got = await post(served, TRANSCRIPTS, data, "application/json")
    assert got.json["duration"] == 1.5


@pytest.mark.parametrize("size", [10, 2_000_000], ids=["small", "on-disk"])
async def test_model_is_found_behind_the_file(size: int) -> None:
    """OpenAI's own curl examples put the file first."""
    async with proxy(parameters=AUDIO, variables=two_apps()) as served:
        form = form_of(b"x" * size, order=FILE_FIRST, model="m", user="al")
        got = await post(served, TRANSCRIPTS, form, is_chunked=size > 10)
        (request,) = [row for row in served.dify.requests if row.parts]
    assert got.json == {"text": f"transcribed {size} bytes"}
    assert (request.key, request.user) == (KEY, "al")


async def test_server_without_a_disk_takes_small_files_and_large_ones_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A container's file system may be read-only."""
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere/at-all")
    async with proxy(parameters=AUDIO, variables=two_apps()) as served:

        async def outcome(size: int, order: str) -> int:
            form = form_of(b"x" * size, order=order, model="m", user="al")
            got = await post(served, TRANSCRIPTS, form)
            if got.status == 503:
                message = got.error["message"]
                assert "(No such file or directory). Send the fields before" in message
            return got.status

        assert await outcome(10, FILE_FIRST) == 200
        assert await outcome(2_000_000, "fields, file") == 200
        assert await outcome(2_000_000, FILE_FIRST) == 503
    async with proxy(parameters=AUDIO) as served:  # only one app can be meant
        assert await outcome(2_000_000, FILE_FIRST) == 200


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is full")
async def test_disk_that_is_full_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it did not take is tried again when the file is closed."""
    full = Path("/dev/full").open
    monkeypatch.setattr(tempfile, "SpooledTemporaryFile", lambda _: full("w+b"))
    async with proxy(parameters=AUDIO, variables=two_apps()) as served:
        got = await post(served, TRANSCRIPTS, form_of(MP3, order=FILE_FIRST, model="m"))
    assert got.status == 503
    assert "(No space left on device). Send the fields" in got.error["message"]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (f"{TRANSCRIPTS}?model=m", {}),
        ("/openai/deployments/m/audio/transcriptions?api-version=1", {}),
        (TRANSCRIPTS, {"model": "m"}),
        ("/openai/deployments/m/audio/transcriptions", {"model": "whisper-1"}),
    ],
    ids=["query", "azure", "field", "azure-and-field"],
)
async def test_model_is_found_wherever_it_is_named(
    path: str, fields: dict[str, str]
) -> None:
    async with proxy(parameters=AUDIO, variables=two_apps()) as served:
        got = await post(served, path, form_of(MP3, **fields))
        (request,) = [row for row in served.dify.requests if row.parts]
    assert (got.status, request.key) == (200, KEY)


async def test_field_is_read_whole_whatever_is_in_it() -> None:
    form = part('name="user"', b"\xff" + b"u" * 100_000) + form_of(MP3, model="m")
    async with proxy(parameters=AUDIO) as served:
        await post(served, TRANSCRIPTS, form, "Multipart/Form-Data; boundary=b")
        ((*_, name),) = sent(served)
    assert name == user_name("\ufffd" + "u" * 100_000)


REFUSED: dict[str, tuple[bytes, str, int, str | None, str | None, str]] = {
    "no-file": (
        part('name="model"', b"m") + END,
        "b",
        400,
        "file",
        "missing_required_parameter",
        "file",
    ),
    "no-model": (form_of(MP3, model="no"), "b", 404, "model", "model_not_found", "no"),
    "late-model": (
        form_of(MP3, order=FILE_FIRST, model="no"),
        *("b", 404, "model", "model_not_found", "no"),
    ),
    "format": (
        form_of(MP3, model="m", response_format="xml"),
        *("b", 400, "response_format", "invalid_value", "srt"),
    ),
    "two-files": (
        part(FILE) + form_of(MP3, model="m"),
        *("b", 400, "file", None, "one file"),
    ),
    "not-sound": (
        form_of(b"x", "a.txt", "text/plain", model="m"),
        *("b", 400, None, "unsupported_audio_type", "'a.txt'"),
    ),
    "cut": (form_of(MP3, model="m")[:-9], "b", 400, None, None, "breaks off"),
    "boundary": (form_of(MP3, model="m"), "c", 400, None, None, "breaks off"),
    "long-fields": (
        form_of(MP3, model="m", prompt="x" * 600_000, language="x" * 600_000),
        *("b", 413, None, None, "1024 KiB"),
    ),
    "long-letters": (
        form_of(MP3, model="m", prompt="ü" * 400_000, language="ü" * 200_000),
        *("b", 413, None, None, "1024 KiB"),
    ),
}


@pytest.mark.parametrize("row", REFUSED.values(), ids=REFUSED.keys())
async def test_transcription_that_can_not_be_is_refused(
    row: tuple[bytes, str, int, str | None, str | None, str],
) -> None:
    body, boundary, status, param, code, text = row
    async with proxy(parameters=AUDIO) as served:
        content_type = f"multipart/form-data; boundary={boundary}"
        got = await post(served, TRANSCRIPTS, body, content_type)
        again = await served.chat()
    assert (got.status, got.error["param"], got.error["code"]) == (status, param, code)
    assert text in got.error["message"]
    assert again.status == 200


@pytest.mark.parametrize(
    ("path", "content_type"),
    [(TRANSCRIPTS, "application/x-www-form-urlencoded"), (FILES, "application/json")],
)
async def test_other_body_than_a_form_is_refused(path: str, content_type: str) -> None:
    async with proxy(parameters=AUDIO) as served:
        got = await post(served, path, b"{}", content_type)
    assert (got.status, got.error["type"]) == (400, "invalid_request_error")
    assert got.error["message"] == "A file must come as multipart/form-data."


async def test_app_that_does_not_hear_is_not_sent_anything() -> None:
    async with proxy() as served:
        got = await post(served, TRANSCRIPTS, form_of(MP3, model="m"))
        assert sent(served) == []
    assert (got.status, got.error["param"]) == (400, "model")
    assert "Speech to text is switched off" in got.error["message"]


async def test_refusal_of_dify_names_the_file() -> None:
    text = "Audio size larger than 30 mb"
    body = {"code": "audio_too_large", "message": text, "status": 413}
    overrides = {"/audio-to-text": [Status(413, body)]}
    async with proxy(parameters=AUDIO, overrides=overrides) as served:
        got = await post(served, TRANSCRIPTS, form_of(MP3, model="m"))
    assert (got.status, got.error["code"]) == (413, "audio_too_large")
    assert got.error["message"] == f"The file 'a.mp3' was refused: {text}"


@pytest.mark.parametrize("body", [b"<html>", b"null", b"", b"{}", b'{"result": "x"}'])
async def test_answer_that_is_no_transcript_is_an_error(body: bytes) -> None:
    overrides = {"/audio-to-text": [Status(200, body)]}
    async with proxy(parameters=AUDIO, overrides=overrides) as served:
        got = await post(served, TRANSCRIPTS, form_of(MP3, model="m"))
    assert (got.status, got.error["code"]) == (502, "upstream_error")


# ------------------------------------------------------------------------------
# Speech
# ------------------------------------------------------------------------------

SPEECH = "/v1/audio/speech"


def asked(served: Proxy) -> JSONObject:
    """Return what Dify was asked to say."""
    (row,) = [row for row in served.dify.requests if row.path == "/text-to-audio"]
    return {key: row.json[key] for key in row.json}


async def speak(served: Proxy, **fields: Any) -> Got:
    body = {"model": "m", "input": "Hi", "voice": "nova", "user": "al", **fields}
    return await post(served, SPEECH, json.dumps(body).encode(), "application/json")


async def test_speech_is_what_dify_makes_of_it() -> None:
    async with proxy(parameters=AUDIO) as served:
        got = await speak(served, response_format="wav", speed=2)
        assert asked(served) == {"text": "Hi", "voice": "nova", "user": "al"}
    assert (got.status, got.headers["content-type"]) == (200, "audio/mpeg")
    assert got.headers["x-accel-buffering"] == "no", "it is heard while it comes"
    assert got.body == b"ID3\x04fake audio"


async def test_speech_as_events() -> None:
    async with proxy(parameters=AUDIO) as served:
        got = await speak(served, stream_format="sse")
    assert got.headers["content-type"].startswith("text/event-stream")
    rows = [json.loads(line[6:]) for line in got.body.decode().split("\n\n") if line]
    audio = [base64.b64decode(row["audio"]) for row in rows[:-1]]
    assert b"".join(audio) == b"ID3\x04fake audio"
    assert {row["type"] for row in rows[:-1]} == {"speech.audio.delta"}
    usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    assert rows[-1] == {"type": "speech.audio.done", "usage": usage}


@pytest.mark.parametrize(
    ("own", "voice", "said"),
    [
        ("", "nova", "nova"),
        ("", {"id": "v1"}, "v1"),
        ("", None, None),
        ("", "default", None),
        ("onyx", "nova", "nova"),
        ("longxiaochun", "nova", "longxiaochun"),
        ("longxiaochun", "loongstella", "loongstella"),
    ],
)
async def test_voice_is_one_that_the_app_has(
    own: str, voice: Any, said: str | None
) -> None:
    speech = {"text_to_speech": {"enabled": True, "language": "", "voice": own}}
    async with proxy(parameters=speech) as served:
        assert (await speak(served, voice=voice)).status == 200
        assert asked(served).get("voice") == said


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": "x" * 4097}, "input", "invalid_value"),
        ({"input": ""}, "input", "missing_required_parameter"),
        ({"input": ["a"]}, "input", "invalid_type"),
        ({"model": None}, "model", "missing_required_parameter"),
        ({"model": "no"}, "model", "model_not_found"),
        ({"voice": 3}, "voice", "invalid_type"),
        ({"voice": {"id": None}}, None, None),
    ],
)
async def test_speech_that_can_not_be_is_refused(
    fields: JSONObject, param: str | None, code: str | None
) -> None:
    async with proxy(parameters=AUDIO) as served:
        got = await speak(served, **fields)
        again = await speak(served, input="x" * 4096)
    assert again.status == 200
    if code is None:
        assert got.status == 200
    else:
        assert (got.error["param"], got.error["code"]) == (param, code)


async def test_app_that_does_not_speak_is_not_asked() -> None:
    async with proxy() as served:
        got = await speak(served)
    assert (got.status, got.error["param"]) == (400, "model")
    assert "Text to speech is switched off" in got.error["message"]


NO_SOUND = {
    "page": b"HTTP/1.1 200 OK\r\nContent-Type: Text/HTML; charset=utf-8\r\n"
    b"Content-Length: 6\r\n\r\n<html>",
    "null": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    b"Content-Length: 5\r\n\r\nnull\n",
    "empty": b"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("answer", NO_SOUND.values(), ids=NO_SOUND.keys())
async def test_speech_without_sound_is_an_error(answer: bytes) -> None:
    overrides = {"/text-to-audio": [Raw(answer)]}
    async with proxy(parameters=AUDIO, overrides=overrides) as served:
        got = await speak(served)
    assert (got.status, got.error["code"]) == (502, "upstream_error")


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        pytest.param("", "application/octet-stream", id="none"),
        pytest.param(*["application/octet-stream"] * 2, id="any"),
        pytest.param(*["Audio/MPEG"] * 2, id="upper-case"),
    ],
)
async def test_speech_may_be_of_any_type_of_sound(kind: str, wanted: str) -> None:
    field = f"Content-Type: {kind}\r\n" if kind else ""
    answer = f"HTTP/1.1 200 OK\r\n{field}Content-Length: 3\r\n\r\nID3".encode()
    async with proxy(
        parameters=AUDIO, overrides={"/text-to-audio": [Raw(answer)]}
    ) as served:
        got = await speak(served)
    assert (got.status, got.body) == (200, b"ID3")
    assert got.headers["content-type"] == wanted


async def test_speech_that_breaks_off_is_not_complete() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\nTransfer-Encoding: chunked"
    overrides = {"/text-to-audio": [Raw(head + b"\r\n\r\n3\r\nID3\r\n"), Close()]}
    async with proxy(parameters=AUDIO, overrides=overrides) as served:
        start = now()
        with pytest.raises(asyncio.IncompleteReadError):
            await speak(served)
        assert now() - start < 1  # the client does not wait for what can't come
        got = await speak(served, stream_format="sse")
    first, failure, done = got.body.decode().strip().split("\n\n")
    assert json.loads(first[6:])["audio"] == base64.b64encode(b"ID3").decode()
    assert json.loads(failure[6:])["error"]["type"] == "server_error"
    assert done == "data: [DONE]"


async def test_voices_and_models_are_those_of_the_apps_that_speak() -> None:
    """As Open WebUI asks for them."""
    models = {name: {"key": f"k-{name}", "mode": "chat"} for name in "abcd"}
    speech = {"enabled": True, "language": "", "voice": "longxiaochun"}
    async with proxy(variables={"MODEL_CONFIG": json.dumps(models)}) as served:
        served.dify.app("k-a", parameters={"text_to_speech": speech})
        served.dify.app("k-b", parameters=AUDIO)
        served.dify.app("k-c")
        served.dify.app("k-d", parameters=AUDIO, overrides={"/parameters": [Hang()]})
        voices = await served.get("/v1/audio/voices")
        speakers = await served.get("/v1/audio/models")
    rows = [{"id": name, "name": name} for name in ("longxiaochun", "default")]
    assert voices.json == {"voices": rows}
    assert speakers.json == {"models": [{"id": name, "name": name} for name in "ab"]}


# ------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------

VISION: JSONObject = {
    "file_upload": {
        "enabled": True,
        "allowed_file_types": ["image", "document"],
        "allowed_file_upload_methods": ["local_file"],
        "number_limits": 3,
    },
    "system_parameters": {"file_size_limit": "1", "image_file_size_limit": 2},
}


def pdf(data: bytes = b"%PDF-1", **fields: str) -> bytes:
    return form_of(data, "图 1.pdf", "application/pdf", **fields)


async def upload(
    served: Proxy, body: bytes = b"", headers: dict[str, str] | None = None
) -> JSONObject:
    """Return the file object of a new file."""
    got = await post(served, FILES, body or pdf(purpose="user_data"), headers=headers)
    assert got.status == 200, got.body
    validate("OpenAIFile", got.json)
    value: JSONObject = got.json
    assert value["id"].startswith("file-")
    return value


async def test_file_is_uploaded_and_its_id_tells_all_of_it() -> None:
    async with proxy(parameters=VISION) as served:
        value = await upload(served, pdf(purpose="vision", user="al"))
        again = await served.get(f"{FILES}/{value['id']}")
        assert sent(served) == [
            ("/files/upload", "图 1.pdf", "application/pdf", b"%PDF-1", "al")
        ]
    assert again.json == value
    del value["id"]
    assert value == {
        "object": "file",
        "bytes": 6,
        "created_at": int(NOW),
        "filename": "图 1.pdf",
        "purpose": "vision",
        "status": "processed",
    }


async def test_image_is_uploaded_under_the_type_that_models_know() -> None:
    async with proxy(parameters=VISION) as served:
        await upload(served, form_of(b"\xff\xd8\xff", "a.jpg", "image/jpg"))
        assert sent(served)[0][:3] == ("/files/upload", "a.jpg", "image/jpeg")


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        pytest.param("😀" * 150, {"user": "😀" * 200}, id="names"),
        pytest.param("a.pdf", {"purpose": "p" * 3000}, id="purpose"),
    ],
)
async def test_id_of_a_file_is_good_however_long_what_it_tells(
    name: str, fields: dict[str, str]
) -> None:
    body = form_of(b"%PDF-1", name, f"application/{'x' * 127}", **fields)
    async with proxy(parameters=VISION) as served:
        value = await upload(served, body)
        assert (await served.get(f"{FILES}/{value['id']}")).json == value


async def test_id_of_a_file_is_good_after_a_restart() -> None:
    async with proxy(parameters=VISION) as served:
        id_ = (await upload(served))["id"]
    async with proxy(parameters=VISION) as served:
        assert (await served.get(f"{FILES}/{id_}")).json["id"] == id_


async def test_id_is_another_client_s_when_clients_have_keys() -> None:
    variables = {"VALID_API_KEYS": "one,two"}
    async with proxy(parameters=VISION, variables=variables) as served:
        id_ = (await upload(served, headers={"Authorization": "Bearer one"}))["id"]
        path = f"{FILES}/{id_}"
        mine = await served.get(path, {"Authorization": "Bearer one"})
        other = await served.get(path, {"Authorization": "Bearer two"})
    assert (mine.status, other.status) == (200, 404)


async def test_files_need_no_app_to_tell_its_name() -> None:
    variables = {"DIFY_API_KEYS": "app-slow"}
    async with proxy(parameters=VISION, variables=variables) as served:
        served.dify.app("app-slow", overrides={"/info": [Hang()]})
        id_ = (await upload(served, pdf(model="m")))["id"]
        assert (await served.get(f"{FILES}/{id_}")).json["id"] == id_
        assert now() < 3


async def test_list_of_files_is_empty_and_ends() -> None:
    async with proxy() as served:
        got = await served.get(f"{FILES}?purpose=vision&limit=2")
    validate("ListFilesResponse", got.json)
    assert (got.json["data"], got.json["has_more"]) == ([], False)


async def test_delete_does_not_claim_that_dify_has_deleted() -> None:
    async with proxy(parameters=VISION) as served:
        id_ = (await upload(served))["id"]
        call = await served.open("DELETE", f"{FILES}/{id_}")
        got = await call.read_rest()
    validate("DeleteFileResponse", got.json)
    assert got.json == {"id": id_, "object": "file", "deleted": False}


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("tail", ["file-abc", "x", "file-%C3%A4", "file-abc/content"])
async def test_unknown_file_is_not_found(method: str, tail: str) -> None:
    async with proxy() as served:
        call = await served.open(method, f"{FILES}/{tail}")
        got = await call.read_rest()
    if method == "DELETE" and tail.endswith("content"):
        assert got.status == 405
    else:
        assert (got.status, got.error["param"], got.error["code"]) == (404, "id", None)


async def test_file_that_gets_no_id_is_an_error() -> None:
    overrides = {"/files/upload": [Status(201, {"name": "a"})]}
    async with proxy(parameters=VISION, overrides=overrides) as served:
        got = await post(served, FILES, pdf())
    assert (got.status, got.error["code"]) == (502, "upstream_error")
    assert got.error["message"] == "Dify gave the file '图 1.pdf' no id."


@contextlib.asynccontextmanager
async def stored(*content: Step) -> AsyncIterator[tuple[Proxy, str]]:
    """Give a proxy, and the path to a file's content, which is this in Dify."""
    async with proxy(parameters=VISION) as served:
        id_ = (await upload(served))["id"]
        (upload_id,) = served.dify.uploads
        path = f"/files/{upload_id}/preview"
        served.dify.app(KEY, overrides={path: content})
        yield served, f"{FILES}/{id_}/content"


async def test_content_may_be_empty() -> None:
    async with stored(Status(200, b"")) as (served, path):
        got = await served.get(path)
    assert (got.status, got.body) == (200, b"")


async def test_content_is_given_up_when_the_client_leaves() -> None:
    async with stored(Hang()) as (served, path):
        call = await served.open("GET", path)
        await served.dify.until(lambda: served.dify.running)
        await call.leave()
        await served.dify.until(lambda: not served.dify.running)
        assert now() < 10


async def test_content_is_what_dify_gives() -> None:
    page = b"<script>alert(1)</script>" * 4000
    kind = {"Content-Type": "text/html; charset=utf-8"}
    async with proxy(parameters=VISION) as served:
        id_ = (await upload(served, pdf(user="al")))["id"]
        (upload_id,) = served.dify.uploads
        path = f"/files/{upload_id}/preview"
        served.dify.app(KEY, overrides={path: [Status(200, page, kind)]})
        got = await served.get(f"{FILES}/{id_}/content")
        assert served.dify.requests[-1].query == {"user": "al"}
    assert (got.status, got.body) == (200, page)
    name = quote("图 1.pdf")
    assert got.headers["content-disposition"] == f"attachment; filename*=UTF-8''{name}"
    assert got.headers["x-content-type-options"] == "nosniff"
    assert got.headers["content-type"] == kind["Content-Type"]


@pytest.mark.parametrize("status", [403, 404])
async def test_content_that_dify_does_not_give_is_not_found(status: int) -> None:
    refusal = Status(status, {"code": "file_not_found", "message": "No."})
    async with stored(refusal) as (served, path):
        got = await served.get(path)
    assert (got.status, got.error["param"]) == (404, "id")
    assert "1.7.2" in got.error["message"]


TOO_LARGE = "The file '图 1.pdf' is too large: the app takes 1 MB."


@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("model", ["", "m"], ids=["held", "at-once"])
async def test_file_over_the_app_s_limit_is_refused(
    is_chunked: bool, model: str
) -> None:
    """One whose length tells it is not sent at all."""
    variables = {"MAX_BODY_MB": "256", **two_apps()}
    async with proxy(parameters=VISION, variables=variables) as served:
        size = (1 << 20) + 1 if is_chunked else 20 << 20
        order = "fields, file" if model else FILE_FIRST
        body = pdf(b"x" * size, order=order, model="m")
        got = await post(served, FILES, body, is_chunked=is_chunked)
        assert served.dify.uploads == {}
    assert (got.status, got.error["param"]) == (413, "file")
    assert got.error["message"] == TOO_LARGE


async def test_demo_says_that_it_takes_no_files() -> None:
    async with demo() as served:
        got = await post(served, FILES, pdf())
    told = "The file '图 1.pdf' was refused: The demo app takes no files."
    assert (got.status, got.error["message"]) == (400, told)


async def test_file_of_the_app_s_limit_passes() -> None:
    async with proxy(parameters=VISION) as served:
        value = await upload(served, pdf(b"x" * (1 << 20)))
    assert value["bytes"] == 1 << 20


async def test_body_over_the_proxy_s_limit_is_refused() -> None:
    async with proxy(parameters=VISION, variables={"MAX_BODY_MB": "1"}) as served:
        got = await post(served, FILES, pdf(b"x" * (1 << 20)), is_chunked=True)
    assert (got.status, got.error["message"]) == (
        413,
        "The body is over 1 MiB (MAX_BODY_MB).",
    )


async def test_first_app_takes_a_file_that_names_none() -> None:
    async with proxy(parameters=VISION, variables=two_apps()) as served:
        served.dify.app("app-other", parameters=VISION)
        await upload(served)
        (file,) = served.dify.uploads.values()
    assert file.key == "app-other"


async def test_upload_ends_when_dify_refuses_it_early() -> None:
    """The client has not sent all by then: it gets Dify's answer nevertheless."""
    body = {"code": "unauthorized", "message": "No.", "status": 401}
    async with early_refusal(body) as (dify_base, seen):
        model = {"key": KEY, "mode": "chat", "base": dify_base}
        variables = {"MODEL_CONFIG": json.dumps({"m": model}), "MAX_BODY_MB": "256"}
        async with proxy(variables=variables) as served:
            got = await post(served, FILES, pdf(b"x" * 9_000_000, model="m"))
    assert (got.status, got.error["code"]) == (502, "upstream_error")
    assert "MODEL_CONFIG" in got.error["message"]
    assert seen[-1].startswith("POST /v1/files/upload")


@contextlib.asynccontextmanager
async def early_refusal(body: JSONObject) -> AsyncIterator[tuple[str, list[str]]]:
    """Give a Dify that refuses uploads by their heads, and what it was asked."""
    seen: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                seen.append(head.decode().partition("\r\n")[0])
                is_upload = "upload" in seen[-1]
                answer = json.dumps(body if is_upload else {}).encode()
                status = b"401 UNAUTHORIZED" if is_upload else b"200 OK"
                start = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\n" % status
                length = b"Content-Length: %d\r\n\r\n" % len(answer)
                writer.write(start + length + answer)
                if is_upload:
                    break
            await reader.read(100_000)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/v1", seen
    finally:
        server.close()
        await server.wait_closed()


async def test_upload_is_given_up_when_the_client_leaves() -> None:
    async with proxy(parameters=VISION) as served:
        _, writer = await asyncio.open_connection("127.0.0.1", served.port)
        head = (
            b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999\r\n"
        )
        writer.write(head + b"Content-Type: multipart/form-data; boundary=b\r\n\r\n")
        writer.write(pdf(b"x" * 100_000))
        await served.dify.until(lambda: served.dify.open_connections == 2)
        writer.close()
        await served.dify.until(lambda: served.dify.open_connections <= 1)
        assert served.dify.uploads == {}


@pytest.mark.parametrize(
    ("path", "kind", "body"),
    [
        (TRANSCRIPTS, type_of("b"), form_of(MP3, model="m")),
        (SPEECH, "application/json", b'{"model": "m", "input": "Hi", "voice": "v"}'),
    ],
    ids=["heard", "said"],
)
async def test_sound_is_given_up_when_the_client_leaves(
    path: str, kind: str, body: bytes
) -> None:
    hanging = {"/audio-to-text": [Hang()], "/text-to-audio": [Hang()]}
    async with proxy(parameters=AUDIO, overrides=hanging) as served:
        asking = asyncio.ensure_future(post(served, path, body, kind))
        await served.dify.until(lambda: served.dify.running)
        await served.asked[0].leave()
        await served.dify.until(lambda: not served.dify.running)
        assert now() < 10
        await asyncio.gather(asking, return_exceptions=True)


async def test_names_are_not_asked_for_after_the_client_left() -> None:
    """Their tasks would go on, and their errors reach nobody."""
    gate = asyncio.Event()
    async with proxy(variables={"DIFY_API_KEYS": "app-one"}) as served:
        served.dify.app("app-one", overrides={"/info": [Wait(gate)]})
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        form = pdf(model="Helper")
        head = b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n"
        kind = b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
        writer.write(head % len(form) + kind + form)
        await served.dify.until(lambda: served.dify.running)
        writer.close()
        await served.dify.until(lambda: not served.dify.open_connections)
        assert await reader.read() == b""
        assert own_tasks() == []


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
async def test_method_that_files_do_not_have(method: str) -> None:
    async with proxy() as served:
        call = await served.open(method, FILES)
        got = await call.read_rest()
    assert (got.status, got.headers["allow"]) == (405, "GET, POST")


# ------------------------------------------------------------------------------
# Chats with stored files
# ------------------------------------------------------------------------------

NAMED: dict[str, Callable[[str], JSONObject]] = {
    "file": lambda id_: {"type": "file", "file": {"file_id": id_}},
    "image_url": lambda id_: {"type": "image_url", "image_url": {"url": id_}},
    "image_url-string": lambda id_: {"type": "image_url", "image_url": id_},
    "input_file": lambda id_: {"type": "input_file", "file_id": id_},
    "input_image": lambda id_: {"type": "input_image", "file_id": id_},
}


@pytest.mark.parametrize("named", NAMED.values(), ids=NAMED.keys())
async def test_chat_uses_a_stored_file(named: Callable[[str], JSONObject]) -> None:
    """One that names no user speaks as the user who uploaded it."""
    async with proxy(parameters=VISION) as served:
        value = await upload(served, pdf(user="al"))
        got = await served.chat(messages=with_parts(named(value["id"])))
        (upload_id,) = served.dify.uploads
        (turn,) = served.turns
    assert got.status == 200
    assert turn.json["files"] == [
        {
            "type": "document",
            "transfer_method": "local_file",
            "upload_file_id": upload_id,
        }
    ]
    assert turn.user == "al"


@pytest.mark.parametrize(
    ("fields", "headers"),
    [({"user": "bo"}, {}), ({}, {"X-OpenWebUI-User-Id": "bo"})],
    ids=["field", "header"],
)
async def test_chat_that_names_a_user_speaks_as_that_one(
    fields: JSONObject, headers: dict[str, str]
) -> None:
    async with proxy(parameters=VISION) as served:
        value = await upload(served, pdf(user="al"))
        messages = with_parts({"type": "file", "file": {"file_id": value["id"]}})
        await served.chat(headers, messages=messages, **fields)
        assert [turn.user for turn in served.turns] == ["bo"]


async def test_file_of_another_app_may_stand_beside_one_of_the_message() -> None:
    async with proxy(parameters=VISION, variables=two_apps()) as served:
        served.dify.app("app-other", parameters=VISION)
        rows = [
            {"type": "input_file", "file_id": (await upload(served))["id"]},
            {"type": "input_image", "image_url": "data:image/png;base64,aaaa"},
        ]
        body = {"model": "m", "input": with_parts(*rows)}
        got = await (await served.open("POST", "/v1/responses", body)).read_rest()
        (turn,) = served.turns
    assert (got.status, got.json["model"], turn.key) == (200, "m", KEY)
    assert [row["type"] for row in turn.json["files"]] == ["document", "image"]


async def test_chat_with_a_stored_file_goes_on() -> None:
    async with proxy(chat_answer("Seen."), parameters=VISION, memory=True) as served:
        value = await upload(served)
        row = {"type": "file", "file": {"file_id": value["id"]}}
        messages = with_parts(row)
        await served.chat(messages=messages)
        messages += [
            {"role": "assistant", "content": "Seen."},
            {"role": "user", "content": "And?"},
        ]
        await served.chat(messages=messages)
        first, second = served.turns
    assert (len(first.json["files"]), second.json.get("files")) == (1, None)
    assert second.json["conversation_id"]


@pytest.mark.parametrize("route", ["chat/completions", "responses"])
async def test_chat_with_files_goes_on_where_they_stood_apart(route: str) -> None:
    """As gradio sends them first and shows them later."""
    field = "messages" if route == "chat/completions" else "input"
    link = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aaaa"}}
    file, text = ({"role": "user", "content": c} for c in ([link], "Look"))
    history = [*with_parts(link), {"role": "assistant", "content": "Seen."}]
    async with proxy(chat_answer("Seen."), parameters=VISION, memory=True) as served:
        for rows in ([file, text], [*history, {"role": "user", "content": "And?"}]):
            body = {"model": "m", field: rows}
            await (await served.open("POST", f"/v1/{route}", body)).read_rest()
        first, second = served.turns
    assert (first.json["query"], len(first.json["files"])) == ("Look", 1)
    assert (second.json["query"], second.json.get("files")) == ("And?", None)
    assert second.json["conversation_id"]


async def test_file_of_a_conversation_says_whose_turn_it_is() -> None:
    async with proxy(parameters=VISION, memory=True) as served:
        value = await upload(served, pdf(user="al"))
        text = {"type": "input_text", "text": "Read it."}
        file = {"type": "input_file", "file_id": value["id"]}
        items = [{"role": "user", "content": [text, file]}]
        call = await served.open("POST", "/v1/conversations", {"items": items})
        path = f"/v1/conversations/{(await call.read_rest()).json['id']}"
        body = {"model": "m", "input": "Hi", "conversation": path.rpartition("/")[2]}
        call = await served.open("POST", "/v1/responses", body)
        got = (await call.read_rest()).json
        stored = await served.get(f"/v1/responses/{got['id']}")
        newest, *_ = (await served.get(f"{path}/items")).json["data"]
        (turn,) = served.turns
    assert turn.user == "al"
    assert stored.json["output"] == got["output"] == [newest]


async def test_refused_app_is_named_where_a_path_has_an_id() -> None:
    """The path says no model: what the id belongs to is the log's and metrics', too."""
    denied = Status(401, {"code": "unauthorized", "message": "No.", "status": 401})
    async with proxy(parameters=VISION, memory=True) as served:
        file = await upload(served)
        call = await served.open("POST", "/v1/conversations", {})
        id_ = (await call.read_rest()).json["id"]
        body = {"model": "m", "input": "Hi", "conversation": id_}
        call = await served.open("POST", "/v1/responses", body)
        response = (await call.read_rest()).json
        (upload_id,) = served.dify.uploads
        paths = ("/messages", f"/files/{upload_id}/preview")
        served.dify.app(KEY, overrides={path: [denied] for path in paths})
        for path in (
            f"responses/{response['id']}",
            f"conversations/{id_}/items",
            f"files/{file['id']}/content",
        ):
            got = await served.get(f"/v1/{path}")
            assert got.status == 502
            assert got.error["message"].startswith("The model 'm': Dify refused")
        metrics = (await served.get("/metrics")).body.decode()
    for route in ("responses/{id}", "conversations/{id}/items", "files/{id}/content"):
        assert f'route="{route}",model="m",status="502"' in metrics


async def test_response_to_a_stored_file_goes_on_as_the_user_of_the_file() -> None:
    async with proxy(parameters=VISION, memory=True) as served:
        value = await upload(served, pdf(user="al"))
        text = {"type": "input_text", "text": "What is it?"}
        content = [text, {"type": "input_file", "file_id": value["id"]}]
        body: JSONObject = {
            "model": "m",
            "input": [{"role": "user", "content": content}],
        }
        call = await served.open("POST", "/v1/responses", body)
        first = (await call.read_rest()).json
        again = await served.get(f"/v1/responses/{first['id']}")
        body = {"model": "m", "input": "And?", "previous_response_id": first["id"]}
        call = await served.open("POST", "/v1/responses", {**body, "user": "al"})
        second = await call.read_rest()
        one, two = served.turns
    assert again.json["output"] == first["output"]
    assert second.status == 200
    assert [one.json["user"], two.json["user"]] == ["al", "al"]
    assert two.json["conversation_id"] == first["dify"]["conversation_id"]


@pytest.mark.parametrize("id_", ["file-abc", "assistant-abc", "1883fdfb-249b-58f5"])
async def test_chat_with_an_unknown_file_is_refused(id_: str) -> None:
    """Be it another service's: the message tells of the id, and asks for no data."""
    async with proxy(parameters=VISION) as served:
        row = {"type": "file", "file": {"file_id": id_}}
        got = await served.chat(messages=with_parts(row))
        item = {"type": "input_file", "file_id": id_}
        value = {"model": "m", "input": [{"role": "user", "content": [item]}]}
        other = await (await served.open("POST", "/v1/responses", value)).read_rest()
        assert served.turns == []
    for each in (got, other):
        assert (each.status, each.error["param"]) == (404, "id")
        assert each.error["message"].startswith(f"No such File object: {id_}. ")


async def test_file_that_is_named_often_is_sought_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sought: list[str] = []
    open_id = opendify.IdSealer.open

    def noted(sealer: opendify.IdSealer, id_: str, prefix: str) -> Any:
        sought.append(id_)
        return open_id(sealer, id_, prefix)

    monkeypatch.setattr(opendify.IdSealer, "open", noted)
    async with proxy() as served:
        value = await upload(served)
        row = {"type": "file", "file": {"file_id": value["id"]}}
        got = await served.chat(messages=with_parts(*[row] * 100))
    assert (got.status, sought) == (400, [value["id"]])


async def test_stored_file_over_the_limit_is_refused_in_a_chat() -> None:
    limits = {**VISION, "system_parameters": {"file_size_limit": 9}}
    async with proxy(parameters=limits) as served:
        value = await upload(served, pdf(b"x" * ((1 << 20) + 1)))
    async with proxy(parameters=VISION) as served:
        row = {"type": "file", "file": {"file_id": value["id"]}}
        got = await served.chat(messages=with_parts(row))
    assert got.status == 400
    reason = "it is too large: the app takes 1 MB."  # and not that it has 1.0 MB
    assert got.error["message"] == f"The file '图 1.pdf' can't be sent: {reason}"


# ------------------------------------------------------------------------------
# OpenAI's own clients
# ------------------------------------------------------------------------------

OLD_SCRIPT = """
import io, json, sys
import openai

openai.api_base, openai.api_key = sys.argv[1], "sk-any"
audio = io.BytesIO(b"ID3" * 9)
audio.name = "a.mp3"
got = {"json": openai.Audio.transcribe("m", audio).text}
for name in ("text", "srt"):  # it takes nothing but text/plain for text
    audio.seek(0)
    got[name] = openai.Audio.transcribe("m", audio, response_format=name)
audio.seek(0)
got["translated"] = openai.Audio.translate("m", audio).text
file = openai.File.create(file=io.BytesIO(b"%PDF"), purpose="assistants")
got["file"] = [file.bytes, file.filename, file.status]
got["found"] = openai.File.retrieve(file.id).id == file.id
got["list"] = openai.File.list()["data"]
got["deleted"] = openai.File.delete(file.id).deleted
print(json.dumps(got))
"""

SCRIPT = """
import json, sys
import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key="sk-any", max_retries=0)
asked = {"model": "m", "file": ("a.mp3", b"ID3" * 9, "audio/mpeg")}
create = client.audio.transcriptions.create
got = {"json": create(**asked).text}
for name in ("text", "srt", "vtt"):
    got[name] = create(**asked, response_format=name)
verbose = create(
    **asked, response_format="verbose_json", timestamp_granularities=["segment", "word"]
)
got["verbose"] = [verbose.language, verbose.text, len(verbose.segments)]
got["events"] = [event.type for event in create(**asked, stream=True)]
got["translated"] = client.audio.translations.create(**asked).text

said = {"model": "m", "voice": "nova", "input": "Hi"}
with client.audio.speech.with_streaming_response.create(**said) as response:
    got["speech"] = b"".join(response.iter_bytes()).decode("latin-1")
    got["type"] = response.headers["content-type"]
events = client.audio.speech.create(**said, stream_format="sse").read()
got["speech-events"] = events.decode().count("speech.audio.done")

file = client.files.create(file=("\\u56fe.pdf", b"%PDF"), purpose="user_data")
got["file"] = [file.bytes, file.filename, file.status]
got["found"] = client.files.retrieve(file.id) == file
got["list"] = list(client.files.list())
part = {"type": "file", "file": {"file_id": file.id}}
chat = client.chat.completions.create(
    model="m", messages=[{"role": "user", "content": [part]}]
)
got["chat"] = chat.choices[0].message.content
got["deleted"] = client.files.delete(file.id).deleted
try:
    client.files.content(file.id)
except openai.NotFoundError as error:
    got["content"] = error.param
print(json.dumps(got))
"""


@pytest.mark.real_clock
@pytest.mark.parametrize("release", ["0.28.1", "1.109.1", "newest"])
async def test_openai_client(release: str, openai_python: Callable[[str], str]) -> None:
    is_old = release == "0.28.1"
    python = sys.executable if release == "newest" else openai_python(release)
    parameters = {**AUDIO, **VISION}
    async with proxy(
        chat_answer("Seen."), parameters=parameters, transcript=SAID
    ) as served:
        base = f"http://127.0.0.1:{served.port}/v1"
        got = await run_client(python, OLD_SCRIPT if is_old else SCRIPT, base)
        files = [row for row in sent(served) if row[0] == "/files/upload"]
        sounds = [row[1:4] for row in sent(served) if row[0] == "/audio-to-text"]
    expected: JSONObject = {
        "json": SAID,
        "text": f"{SAID}\n",
        "srt": f"1\n00:00:00,000 --> 00:00:01,000\n{SAID}\n\n",
        "translated": SAID,
        "file": [4, "file.bin" if is_old else "图.pdf", "processed"],
        "found": True,
        "list": [],
        "deleted": False,
    }
    new: JSONObject = {
        "vtt": f"WEBVTT\n\n00:00:00.000 --> 00:00:01.000\n{SAID}\n\n",
        "verbose": ["unknown", SAID, 1],
        "events": ["transcript.text.delta", "transcript.text.done"],
        "speech": "ID3\x04fake audio",
        "type": "audio/mpeg",
        "speech-events": 1,
        "chat": "Seen.",
        "content": "id",
    }
    assert got == {**expected, **({} if is_old else new)}
    assert [row[3] for row in files] == [b"%PDF"]
    assert set(sounds) == {("a.mp3", "audio/mp3", b"ID3" * 9)}


# ------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------

SIZE = 100 << 20
PIECE = b"0123456789abcdef" * 4096
MOST_BYTES = 2_000_000

# A proxy that tells how much memory it held at most since it was asked last.
METER = """
import asyncio, sys, tracemalloc
import opendify

async def main():
    settings = opendify.parse_settings(
        {"MODEL_CONFIG": sys.argv[1], "MAX_BODY_MB": "256"}
    )
    conversations, _ = opendify.open_conversations("memory", 60)
    dify = opendify.Dify(settings, opendify.open_wire)
    site = opendify.Site(dify, conversations, lambda: "1")
    server = opendify.Server(site)
    ((_, port),) = await server.listen("127.0.0.1", 0)
    print(port, flush=True)
    loop = asyncio.get_running_loop()
    tracemalloc.start()
    before = 0
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(tracemalloc.get_traced_memory()[1] - before, flush=True)
        tracemalloc.clear_traces()
        before = tracemalloc.get_traced_memory()[0]
    await server.drain()
    dify.close()
    conversations.close()

asyncio.run(main())
"""


async def big_dify(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seen: list[int]
) -> None:
    """Take files of any size, and give 100 MB of sound; `seen` are body sizes."""
    form = {"system_parameters": {"file_size_limit": 200}, **AUDIO}
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            size, chunk = 0, 1
            while b"chunked" in head and chunk:
                chunk = int(await reader.readuntil(b"\r\n"), 16)
                await reader.readexactly(chunk + 2)
                size += chunk
            if b"Content-Length" in head:
                await reader.readexactly(
                    int(head.split(b"Content-Length: ")[1].split()[0])
                )
            if b"/text-to-audio" in head:
                length = b"Content-Length: %d\r\n\r\n" % SIZE
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\n" + length
                )
                for _ in range(SIZE // len(PIECE)):
                    writer.write(PIECE)
                    await writer.drain()
                continue
            seen += [size] if size else []
            answer = json.dumps({**form, "id": "u-1", "text": SAID}).encode()
            start = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
            writer.write(
                start + b"Content-Length: %d\r\n\r\n%b" % (len(answer), answer)
            )
    writer.close()


@dataclass
class Meter:
    """A proxy in a process of its own, whose memory is watched."""

    port: int
    process: asyncio.subprocess.Process
    seen: list[int]

    async def most(self) -> int:
        """Return how many bytes were held at most since the last call."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(b"\n")
        return int(await self.process.stdout.readline())

    async def call(self, path: str, kind: str, body: Sequence[bytes]) -> int:
        """Return the size of the response to a body of several pieces."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
        length = f"Content-Length: {sum(map(len, body))}\r\nConnection: close\r\n\r\n"
        writer.write((head + length).encode())
        for piece in body:
            writer.write(piece)
            await writer.drain()
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
        size = 0
        while data := await reader.read(1 << 16):
            size += len(data)
        writer.close()
        await writer.wait_closed()
        return size


@contextlib.asynccontextmanager
async def meter() -> AsyncIterator[Meter]:
    seen: list[int] = []
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.ensure_future(big_dify(reader, writer, seen)))

    dify = await asyncio.start_server(accept, "127.0.0.1", 0)
    base = f"http://127.0.0.1:{dify.sockets[0].getsockname()[1]}/v1"
    models = {name: {"key": "k", "mode": "chat", "base": base} for name in "am"}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-c", METER, json.dumps(models)],
        cwd=Path(opendify.__file__).parent,
        stdin=pipe,
        stdout=pipe,
    )
    assert process.stdin and process.stdout
    try:
        yield Meter(int(await process.stdout.readline()), process, seen)
        process.stdin.close()
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        dify.close()
        await asyncio.gather(*tasks)
        await dify.wait_closed()


@pytest.mark.real_clock
@pytest.mark.parametrize(
    "order", ["fields, file", FILE_FIRST], ids=["streamed", "on-disk"]
)
async def test_large_upload_is_not_held(order: str) -> None:
    """Not even where the file comes before the field that says where it goes."""
    empty = form_of(b"", "a.pdf", "application/pdf", order=order, model="m")
    at = empty.index(b"application/pdf\r\n\r\n") + len(b"application/pdf\r\n\r\n")
    pieces = [empty[:at], *[PIECE] * (SIZE // len(PIECE)), empty[at:]]
    async with meter() as metered:
        kind = type_of("b")
        await metered.call(FILES, kind, [empty])
        await metered.most()
        await metered.call(FILES, kind, pieces)
        assert await metered.most() < MOST_BYTES
        assert len(metered.seen) == 2
        assert metered.seen[1] - metered.seen[0] == SIZE


SAID_ALOUD: JSONObject = {
    "messages": [{"role": "user", "content": "Hi"}],
    "stream": True,
    "modalities": ["text", "audio"],
    "audio": {"voice": "nova", "format": "mp3"},
}


@pytest.mark.parametrize(
    ("path", "fields"),
    [(SPEECH, {"input": "Hi", "voice": "nova"}), ("/v1/chat/completions", SAID_ALOUD)],
    ids=["speech", "chat"],
)
async def test_download_waits_for_a_client_that_does_not_read(
    path: str, fields: JSONObject
) -> None:
    async with proxy(parameters=AUDIO, audio=MP3 + bytes(32 << 20)) as served:
        body = json.dumps({"model": "m", **fields}).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n"
        _, writer = await asyncio.open_connection("127.0.0.1", served.port, limit=1000)
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await served.dify.until(lambda: served.site.in_flight)
        (exchange,) = served.site.in_flight
        await asyncio.sleep(5)
        assert exchange.reply.must_drain()
        assert exchange.reply._wire._unsent < 1 << 20
        writer.close()
        await served.dify.until(lambda: served.dify.open_connections <= 1)


@pytest.mark.real_clock
async def test_large_download_is_not_held() -> None:
    body = json.dumps({"model": "m", "input": "Hi", "voice": "nova"}).encode()
    async with meter() as metered:
        await metered.call("/v1/audio/transcriptions", type_of("b"), [form_of(MP3)])
        await metered.most()
        assert await metered.call(SPEECH, "application/json", [body]) > SIZE
        assert await metered.most() < MOST_BYTES
