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
TimedReads = list[tuple[float, bytes]]


@cache
def load(file: str) -> dict[str, Any]:
    """Return a recording as it is written; a bare stream as `{"stream": bytes}`."""
    if file.endswith(".sse"):
        return {"stream": (DATA / file).read_bytes()}
    text = (DATA / "recordings" / file).read_text(encoding="utf-8")
    recording: dict[str, Any] = json.loads(text)
    return recording


def timed_reads(file: str, exchange: int = 0) -> TimedReads:
    """Return the answer as it was read from the wire: (seconds, bytes) of each read.

    The seconds count from the sending of the request. A bare stream is one read, with
    a response head put before it.
    """
    recording = load(file)
    if "stream" in recording:
        head = "".join(f"{name}: {value}\r\n" for name, value in STREAM_HEADERS)
        text = f"HTTP/1.1 200 OK\r\n{head}Connection: close\r\n\r\n"
        return [(0.0, text.encode() + recording["stream"])]
    if "one_connection" in recording:
        return _split_connection(file)[exchange][1]
    exchanged = recording["exchanges"][exchange]
    start = exchanged.get("sent_at", 0.0)
    raw = exchanged["response"]["raw"]
    return [(max(0.0, round(at - start, 3)), _as_bytes(data)) for at, data in raw]


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


def is_complete(file: str, exchange: int = 0) -> bool:
    """Tell whether the body reached its end: last chunk, length or the server's EOF."""
    if "stream" in load(file):
        return True
    _, fields = status_and_headers(file, exchange)
    lengths = [int(value) for name, value in fields if name.lower() == "content-length"]
    if lengths:
        return len(stream_bytes(file, exchange)) == lengths[0]
    if _is_chunked(file, exchange):
        body = _wire(file, exchange).partition(b"\r\n\r\n")[2]
        return _unchunked(body)[1] >= 0
    recording = load(file)
    if "one_connection" in recording:
        return True
    end: str = recording["exchanges"][exchange]["response"]["end"]
    return "server" in end


def request_body(file: str, exchange: int = 0) -> Any:
    """Return the body sent: JSON as a value, anything else as text or its parts."""
    recording = load(file)
    if "stream" in recording:
        return None
    if "one_connection" in recording:
        head, _, body = _split_connection(file)[exchange][0].partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" in head.lower():
            body = _unchunked(body)[0]
        return json.loads(body) if body else None
    return recording["exchanges"][exchange]["request"].get("body")


def _wire(file: str, exchange: int) -> bytes:
    """Return the answer in one piece, without `100 Continue` before it."""
    data = b"".join(data for _, data in timed_reads(file, exchange))
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
def _split_connection(file: str) -> list[tuple[bytes, TimedReads]]:
    """Cut one connection into (request, reads of its answer), pipelined ones too."""
    entries = [(at, way, _as_bytes(data)) for at, way, data in _entries(file)]
    sends = [(at, data) for at, way, data in entries if way == "sent"]
    reads = [(at, data) for at, way, data in entries if way == "received"]
    sent = b"".join(data for _, data in sends)
    received = b"".join(data for _, data in reads)
    exchanges: list[tuple[bytes, TimedReads]] = []
    asked = answered = 0
    while asked < len(sent):
        request = sent[asked : asked + _message_length(sent[asked:])]
        end = answered + _answer_length(received[answered:])
        start = _cut(sends, asked, asked + len(request))[0][0]
        answer = _cut(reads, answered, end)
        exchanges.append(
            (request, [(round(at - start, 3), data) for at, data in answer])
        )
        asked, answered = asked + len(request), end
    return exchanges


def _entries(file: str) -> list[Any]:
    """Return what passed on one connection, without the remark at its end."""
    entries: list[Any] = load(file)["one_connection"]
    return [e for e in entries if not str(e[2]).startswith("(end of stream")]


def _cut(parts: TimedReads, begin: int, end: int) -> TimedReads:
    """Return the parts that hold the bytes from `begin` to `end`, trimmed to them."""
    cut: TimedReads = []
    position = 0
    for at, data in parts:
        part = data[max(0, begin - position) : max(0, end - position)]
        if part:
            cut.append((at, part))
        position += len(data)
    return cut


def _answer_length(data: bytes) -> int:
    """Return the length of the first answer in the data, with any 100 before it."""
    if data.startswith(b"HTTP/1.1 100"):
        interim = data.index(b"\r\n\r\n") + 4
        return interim + _answer_length(data[interim:])
    return _message_length(data, until_eof=True)


def _message_length(data: bytes, *, until_eof: bool = False) -> int:
    """Return the length of the first HTTP message in the data."""
    head, _, body = data.partition(b"\r\n\r\n")
    begin = len(head) + 4
    fields = dict(
        line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line
    )
    if fields.get(b"transfer-encoding", b"").strip() == b"chunked":
        end = _unchunked(body)[1]
        return len(data) if end < 0 else begin + end
    if b"content-length" in fields:
        return min(len(data), begin + int(fields[b"content-length"]))
    return len(data) if until_eof else begin
