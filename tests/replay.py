"""Recorded answers of Dify servers, as bytes, for the tests.

The recordings lie in `data/recordings/dify-VERSION/NAME.json`, bare event streams in
`data/streams/NAME.sse`; a file is named `dify-VERSION/NAME.json` or
`streams/NAME.sse`. A recording has either `exchanges` (each a request and its
answer) or `one_connection` (all that was sent and received on one connection), which
is cut into exchanges here, so that both are read alike.
"""

from __future__ import annotations

import base64
import json
from functools import cache
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
STREAM_HEADERS = [("Content-Type", "text/event-stream; charset=utf-8")]

Headers = list[tuple[str, str]]


@cache
def load(file: str) -> dict[str, Any]:
    """Return a recording as it is written; a bare stream as `{"stream": bytes}`."""
    if file.endswith(".sse"):
        return {"stream": (DATA / file).read_bytes()}
    text = (DATA / "recordings" / file).read_text(encoding="utf-8")
    recording: dict[str, Any] = json.loads(text)
    return recording


def reads(file: str, exchange: int = 0) -> list[bytes]:
    """Return the answer as it was read from the wire, read by read.

    A bare stream is one read, with a response head put before it.
    """
    recording = load(file)
    if "stream" in recording:
        head = "".join(f"{name}: {value}\r\n" for name, value in STREAM_HEADERS)
        text = f"HTTP/1.1 200 OK\r\n{head}Connection: close\r\n\r\n"
        return [text.encode() + recording["stream"]]
    if "one_connection" in recording:
        return _split_connection(file)[exchange]
    raw = recording["exchanges"][exchange]["response"]["raw"]
    return [_as_bytes(data) for _, data in raw]


def status_and_headers(file: str, exchange: int = 0) -> tuple[int, Headers]:
    """Return the status and the header fields, in order, spelled as received."""
    head, _, _ = _wire(file, exchange).partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    fields = (line.partition(":") for line in lines)
    return int(first.split()[1]), [(name, value.strip()) for name, _, value in fields]


def stream_bytes(file: str, exchange: int = 0) -> bytes:
    """Return the body without its chunked framing; cut where the recording is cut."""
    _, _, body = _wire(file, exchange).partition(b"\r\n\r\n")
    if not _is_chunked(file, exchange):
        return body
    return _unchunked(body)[0]


def _wire(file: str, exchange: int) -> bytes:
    """Return the answer in one piece, without `100 Continue` before it."""
    data = b"".join(reads(file, exchange))
    while data.startswith(b"HTTP/1.1 100"):
        data = data.partition(b"\r\n\r\n")[2]
    return data


def _is_chunked(file: str, exchange: int) -> bool:
    """Tell whether the answer came in chunks."""
    _, fields = status_and_headers(file, exchange)
    return ("transfer-encoding", "chunked") in [(n.lower(), v) for n, v in fields]


def _unchunked(body: bytes) -> tuple[bytes, int]:
    """Return the joined chunks, and where the framing ended (-1: it did not)."""
    chunks: list[bytes] = []
    at = 0
    while True:
        line_end = body.find(b"\r\n", at)
        if line_end < 0:
            return b"".join(chunks), -1
        size = int(body[at:line_end].split(b";")[0], 16)
        if size == 0:
            return b"".join(chunks), line_end + 4
        chunks.append(body[line_end + 2 : line_end + 2 + size])
        at = line_end + 2 + size + 2


def _as_bytes(data: str | dict[str, str]) -> bytes:
    """Return the bytes of one recorded read; half characters are kept in base64."""
    if isinstance(data, dict):
        return base64.b64decode(data["base64"])
    return data.encode("utf-8")


@cache
def _split_connection(file: str) -> list[list[bytes]]:
    """Cut one connection into the reads of each answer, pipelined ones too."""
    received = [
        _as_bytes(data)
        for _, way, data in load(file)["one_connection"]
        if way == "received" and not str(data).startswith("(end of stream")
    ]
    whole = b"".join(received)
    answers: list[list[bytes]] = []
    at = 0
    while at < len(whole):
        end = at + _answer_length(whole[at:])
        answers.append(_cut(received, at, end))
        at = end
    return answers


def _cut(parts: list[bytes], begin: int, end: int) -> list[bytes]:
    """Return the parts that hold the bytes from `begin` to `end`, trimmed to them."""
    cut: list[bytes] = []
    position = 0
    for data in parts:
        part = data[max(0, begin - position) : max(0, end - position)]
        if part:
            cut.append(part)
        position += len(data)
    return cut


def _answer_length(data: bytes) -> int:
    """Return the length of the first answer in the data, with any 100 before it."""
    head, _, body = data.partition(b"\r\n\r\n")
    begin = len(head) + 4
    if head.startswith(b"HTTP/1.1 100"):
        return begin + _answer_length(body)
    lines = (line.lower() for line in head.split(b"\r\n")[1:])
    fields = dict(line.split(b":", 1) for line in lines)
    if fields.get(b"transfer-encoding", b"").strip() == b"chunked":
        end = _unchunked(body)[1]
        return len(data) if end < 0 else begin + end
    if b"content-length" in fields:
        return min(len(data), begin + int(fields[b"content-length"]))
    return len(data)
